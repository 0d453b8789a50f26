//! The engine `local`: two processes of one user on one host. It maps the peer's memfd and copies into it; where either
//! buffer is on a GPU, that GPU copies, into memory that was opened by its IPC handle.
//!
//! It needs nothing installed but a GPU's driver where there is a GPU. A peer on another host, in another pid
//! namespace, or of another user is refused by name at [`load_peer`](super::TransferEngine::load_peer).

mod cursor;
mod descriptor;
mod devices;
mod engine;
mod flight;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod identity;
mod mapped;
mod peer;

pub use engine::LocalEngine;

use crate::ids::EngineKind;

/// The engine's name in configuration and on the wire.
pub const LOCAL_ENGINE_NAME: &str = EngineKind::Local.as_str();
