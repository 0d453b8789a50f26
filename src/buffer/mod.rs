//! The pd_buffer's memory: mapped once, at its ceiling's length, by us and by the engine's process; populated and
//! registered with a transfer engine all at once, or in steps as it is needed ([`MemoryManager`]).
//!
//! Host memory is a sealed memfd. Whoever may see `/proc/<pid>/fd` of its owner (the same user) can map it, it never
//! shrinks under a mapping, and the kernel takes it back when the last process that maps it is gone: nothing is left
//! behind after SIGKILL.

mod available;
mod block;
mod cuda;
mod error;
mod handle;
mod host;
mod layout;
mod manager;
mod mapping;
mod region;
mod steps;

pub use block::Block;
pub use cuda::cuda_device_count;
pub use error::BufferError;
pub use handle::HostHandle;
pub use host::HostMemory;
pub use layout::{BlockLayout, TensorShape};
pub use manager::{MemoryManager, MemoryOptions, MemoryUsage, Registrar, Space};
pub use mapping::HostMapping;
pub use steps::{MachineSteps, StepSource};

use crate::ids::Checksum;

/// The memory behind a pd_buffer.
#[derive(Debug)]
pub enum Memory {
    /// Host memory, a memfd.
    Host(HostMemory),
}

impl Memory {
    /// How long it is, in bytes, pages or not.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.len_bytes(),
        }
    }

    /// Where it is in this process's address space.
    pub fn address(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.address(),
        }
    }

    /// Sums bytes.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`].
    pub fn checksum(&self, offset: u64, len_bytes: u64) -> Result<Checksum, BufferError> {
        match self {
            Self::Host(memory) => memory.checksum(offset, len_bytes),
        }
    }

    /// `host` or `device`, for messages.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Host(_) => "host",
        }
    }
}
