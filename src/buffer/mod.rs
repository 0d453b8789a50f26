//! The pd_buffer's memory: allocated once, mapped by the engine's process, registered by a transfer engine.
//!
//! Host memory is a sealed memfd. Whoever may see `/proc/<pid>/fd` of its owner (the same user) can map it, it never
//! shrinks under a mapping, and the kernel takes it back when the last process that maps it is gone: nothing is left
//! behind after SIGKILL.

mod available;
mod cuda;
mod error;
mod handle;
mod host;
mod mapping;
mod region;

pub use cuda::cuda_device_count;
pub use error::BufferError;
pub use handle::HostHandle;
pub use host::HostMemory;
pub use mapping::HostMapping;

/// The memory behind a pd_buffer.
#[derive(Debug)]
pub enum Memory {
    /// Host memory, a memfd.
    Host(HostMemory),
}

impl Memory {
    /// How long it is, in bytes.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.len_bytes(),
        }
    }

    /// `host` or `device`, for messages.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Host(_) => "host",
        }
    }
}
