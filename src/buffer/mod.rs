//! The pd_buffer's memory: mapped once, at its ceiling's length, by us and by the engine's process; populated and
//! registered with a transfer engine all at once, or in steps as it is needed ([`MemoryManager`]).
//!
//! Host memory is a sealed memfd. Whoever may see `/proc/<pid>/fd` of its owner (the same user) can map it, it never
//! shrinks under a mapping, and the kernel takes it back when the last process that maps it is gone: nothing is left
//! behind after SIGKILL. GPU memory is one plain allocation, exported by the driver, with the same end.

mod available;
mod cuda;
mod elsewhere;
mod error;
mod handle;
mod host;
mod manager;
mod mapping;
mod region;
mod slices;
mod steps;

pub use cuda::{
    CopyBatch, CopyEnd, CopyStream, CudaDevice, CudaHandle, CudaMapping, CudaMemory, Fences, PinnedHost,
    check_cuda_device,
};
pub(crate) use elsewhere::DroppedElsewhere;
pub use error::BufferError;
pub use handle::HostHandle;
pub use host::HostMemory;
pub use manager::{MemoryManager, MemoryOptions, MemoryUsage};
pub use mapping::HostMapping;
pub use steps::{MachineSteps, StepSource};

use crate::ids::Summing;

/// The memory behind a pd_buffer.
#[derive(Debug)]
pub enum Memory {
    /// Host memory, a memfd.
    Host(HostMemory),
    /// Memory of a GPU.
    Cuda(CudaMemory),
}

impl Memory {
    /// How long it is, in bytes, pages or not.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.len_bytes(),
            Self::Cuda(memory) => memory.len_bytes(),
        }
    }

    /// Where it is: in this process's address space, or in the device's.
    pub fn address(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.address(),
            Self::Cuda(memory) => memory.address(),
        }
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], and those of a GPU.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BufferError> {
        match self {
            Self::Host(memory) => memory.read(offset, out),
            Self::Cuda(memory) => memory.read(offset, out),
        }
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], and those of a GPU; nothing is written when the range is wrong.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BufferError> {
        match self {
            Self::Host(memory) => memory.write(offset, bytes),
            Self::Cuda(memory) => memory.write(offset, bytes),
        }
    }

    /// Adds bytes to a sum.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], and those of a GPU. The sum is of no use then.
    pub fn sum(&self, offset: u64, len_bytes: u64, sum: &mut Summing) -> Result<(), BufferError> {
        match self {
            Self::Host(memory) => memory.sum(offset, len_bytes, sum),
            Self::Cuda(memory) => memory.sum(offset, len_bytes, sum),
        }
    }

    /// `host` or `GPU`, for messages.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Host(_) => "host",
            Self::Cuda(_) => "GPU",
        }
    }
}
