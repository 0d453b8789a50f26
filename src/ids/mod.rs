//! The names of things: small types that keep an index from being taken for a count or a length.

mod checksum;
mod copy;
mod device;
mod engine;
mod failure;
mod hosts;
mod name;
mod pages;
mod peer;
mod printable;
mod registration;
mod secret;
mod slots;
mod truncate;

pub use checksum::{Checksum, ChecksumMode, SAMPLED_ONE_IN, Summing};
pub use copy::ByteCopy;
pub use device::{DeviceId, IpcHandle};
pub use engine::EngineKind;
pub use failure::{Failure, FailureKind};
pub use hosts::{HostList, stands_for_all};
pub use name::{CHUNK_KEY_LEN_BYTES_MAX, ChunkKey, NameError, REQUEST_ID_LEN_BYTES_MAX, RequestId};
pub use pages::Pages;
pub use peer::{ReceiverAddress, SourceAddress};
pub use printable::{Escaping, is_printable};
pub use registration::{REQUEST_IDS_MAX, Registration};
pub use secret::{SECRET_LEN_BYTES_MAX, SECRET_LEN_BYTES_MIN, SharedSecret};
pub(crate) use slots::nil_is_left_out;
pub use slots::{ReadyChunk, SlotPart, StagedSlot};
pub use truncate::truncate;

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

/// Most pieces that a pd_buffer is registered in: its first length, and the steps that it grows by. Each costs an engine
/// a registration, and every peer its address and key in the metadata.
pub const BUFFER_PIECES_MAX: usize = 256;
/// Most chunks of one request: as many keys as one message carries.
pub const REQUEST_CHUNKS_MAX: u32 = 16_384;
/// Most peers of one daemon: as many connections as one port has places for.
pub const PEERS_MAX: u32 = 4096;
/// Longest metadata of a peer's engine, in bytes. Some hundred bytes for each backend and each registered piece are usual.
pub const METADATA_LEN_BYTES_MAX: usize = 1 << 20;

number! {
    /// A slot of one pd_buffer: the bytes handed out for one chunk. It says which, not where: a short chunk's slot is as
    /// short as the chunk, and starts wherever there was room.
    SlotIndex(u32)
}
number! {
    /// Layers that keep the same shape of KV cache: the position of their group in the layout.
    GroupIndex(u8)
}
number! {
    /// What a receiver granted to one request: the right to write some of its slots. Never reused by one process.
    GrantId(u64)
}
number! {
    /// One set of copies posted to an engine. Never reused by one process.
    TransferId(u64)
}
number! {
    /// A peer that an engine has been introduced to. Never reused by one process.
    ConnectionId(u64)
}
number! {
    /// A process attached to the connector API. Never reused by one process.
    ClientId(u64)
}
number! {
    /// What a reader holds while it copies chunks out of a receiver's buffer. Never reused by one process.
    LeaseId(u64)
}
number! {
    /// Pairs a reply with its message, chosen by whoever asks.
    Seq(u64)
}
number! {
    /// A daemon that this node has connected to, a receiver or a source of parked chunks, from one handshake to its loss. Never reused by one
    /// process.
    PeerId(u64)
}
