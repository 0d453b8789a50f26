//! What a build without NIXL's bindings says.

use std::path::PathBuf;

use crate::ids::EngineKind;
use crate::transfer::TransferError;

/// Says that this build has no NIXL, where one that has would look for the library.
///
/// # Errors
/// Always [`TransferError::Unavailable`].
pub fn load_library(_lib_dirs: &[PathBuf]) -> Result<PathBuf, TransferError> {
    Err(not_built())
}

/// The error of everything that would need NIXL.
pub(in crate::transfer) fn not_built() -> TransferError {
    let reason = "this build has no NIXL (cargo feature nixl, which needs libclang); build it with scripts/cargo build \
                  --release, or use transfer_channel: local";
    TransferError::Unavailable { engine: EngineKind::Nixl.as_str(), reason: reason.to_owned() }
}
