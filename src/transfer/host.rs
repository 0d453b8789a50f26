//! Where this process runs, as far as another one has to know to find it by its pid.

use std::fs;
use std::os::unix::fs::MetadataExt;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const PID_NAMESPACE: &str = "/proc/self/ns/pid";

/// A run of a host's kernel, and a pid namespace in it: pids mean the same processes only inside one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PidSpace {
    /// Boot id of the host's kernel.
    pub boot_id: String,
    /// Inode of the pid namespace.
    pub pid_namespace: u64,
}

impl PidSpace {
    /// This process's.
    ///
    /// # Errors
    /// Which file of /proc cannot be read, and why.
    pub fn of_this_process() -> Result<Self, String> {
        let boot_id = fs::read_to_string(BOOT_ID).map_err(|error| format!("{BOOT_ID}: {error}"))?;
        let namespace = fs::metadata(PID_NAMESPACE).map_err(|error| format!("{PID_NAMESPACE}: {error}"))?;
        Ok(Self { boot_id: boot_id.trim().to_owned(), pid_namespace: namespace.ino() })
    }
}
