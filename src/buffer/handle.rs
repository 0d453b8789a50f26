//! How another process of the same user maps our host memory.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Names a memfd of a living process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostHandle {
    /// The owner's process.
    pub pid: u32,
    /// Its descriptor: `/proc/<pid>/fd/<fd>`.
    pub fd: i32,
    /// Length of the memory.
    pub len_bytes: u64,
    /// Inode of the memfd, to tell it from another file behind a reused pid or descriptor.
    pub inode: u64,
}

impl fmt::Display for HostHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/proc/{}/fd/{} ({} bytes, inode {})", self.pid, self.fd, self.len_bytes, self.inode)
    }
}
