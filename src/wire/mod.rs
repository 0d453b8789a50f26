//! What travels between a pd-sender, a pd-receiver, a proxy and LMCache's peers: messages, their msgpack encoding,
//! and the limits that hold before anything is allocated. No sockets.

pub mod auth;
pub mod codec;
mod decode_error;
#[cfg(feature = "lmcache")]
pub mod descriptor_list;
pub mod limits;
mod lmcache_mode;
pub mod message;
mod refusal;
mod scan;

pub use codec::{decode, decoded_len_bytes, encode, type_name, unsigned_field};
pub use decode_error::DecodeError;
pub use lmcache_mode::LmcacheMode;
pub use message::Message;
pub use refusal::{refusal, unreadable_refusal};
