//! Reads the shared secret, and refuses a file that is none.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use super::error::ConfigError;
use super::keys;
use super::raw::RawConfig;
use super::{SecretFile, SharedSecret};
use crate::ids::{SECRET_LEN_BYTES_MAX, SECRET_LEN_BYTES_MIN};

/// Who must not have any right to the file: others, and the group to write it. The group may read it, as it does where a
/// cluster's own store of secrets hands them to a process of another user than root.
const MODE_REFUSED: u32 = 0o027;

/// The secret in the file that `pd_shared_secret_file` names.
///
/// # Errors
/// [`ConfigError::Refused`] when it cannot be read, is not kept from others, or has too few or too many bytes. Nothing of
/// its content is in the error.
pub(super) fn read_secret(raw: &RawConfig) -> Result<Option<SecretFile>, ConfigError> {
    let key = &keys::PD_SHARED_SECRET_FILE;
    let (Some(path), Some(entry)) = (raw.text(key)?, raw.entry(key)) else {
        return Ok(None);
    };
    let file = PathBuf::from(path);
    // A pipe without a writer would keep us waiting.
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("a flag of open(2)");
    let unreadable = |error: std::io::Error| {
        entry.refused(format!("cannot be read: {error}"), "give the path of a file that this daemon's user can read")
    };
    let opened = OpenOptions::new().read(true).custom_flags(nonblocking).open(&file).map_err(unreadable)?;
    // Of what was opened, not of what the path leads to by then.
    let metadata = opened.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(entry.refused("it is no regular file", "give the path of a file with the secret"));
    }
    let mode = metadata.mode() & 0o777;
    if mode & MODE_REFUSED != 0 {
        return Err(entry.refused(
            format!("its mode {mode:04o} gives others a right to it"),
            "chmod 0600 it, and make a new secret if others may have read it",
        ));
    }
    let mut bytes = Vec::new();
    // White space around it does not count, and nobody writes more of that than of secret.
    opened.take(2 * SECRET_LEN_BYTES_MAX as u64).read_to_end(&mut bytes).map_err(unreadable)?;
    let secret = SharedSecret::new(&bytes).map_err(|len_bytes| {
        entry.refused(
            format!(
                "it holds a secret of {len_bytes} bytes; expected {SECRET_LEN_BYTES_MIN} to {SECRET_LEN_BYTES_MAX}"
            ),
            "make one with: openssl rand -hex 32",
        )
    })?;
    Ok(Some(SecretFile { file, secret }))
}
