//! The engine `local`: two processes of one user on one host. It maps the peer's memfd and copies into it.
//!
//! It needs nothing installed. A peer on another host, in another pid namespace, or of another user is refused by
//! name at [`load_peer`](super::TransferEngine::load_peer).

mod cursor;
mod engine;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod identity;
mod peer;

pub use engine::LocalEngine;

use crate::ids::EngineKind;

/// The engine's name in configuration and on the wire.
pub const LOCAL_ENGINE_NAME: &str = EngineKind::Local.as_str();
