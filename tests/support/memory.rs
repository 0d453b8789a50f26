//! Buffers of either memory, ours and another process's.

use std::sync::Arc;

use pd_backend::buffer::{
    BufferError, CudaDevice, CudaHandle, CudaMapping, CudaMemory, HostHandle, HostMapping, HostMemory, Memory,
};

/// Where a test's buffers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// Host memory.
    Host,
    /// The first GPU.
    Gpu,
}

impl MemoryKind {
    /// As a variable of the environment says: `gpu`, or nothing for host memory.
    pub fn of_variable(name: &str) -> Self {
        if std::env::var(name).as_deref() == Ok("gpu") { Self::Gpu } else { Self::Host }
    }

    /// A buffer of `ceiling_bytes`, with the first `len_bytes` there; on a GPU all of it.
    pub fn allocate(self, ceiling_bytes: u64, len_bytes: u64) -> Arc<Memory> {
        Arc::new(match self {
            Self::Host => {
                let memory = HostMemory::reserve(ceiling_bytes).expect("the test's buffer fits");
                memory.populate(0..len_bytes).expect("the test's buffer fits");
                Memory::Host(memory)
            }
            Self::Gpu => {
                let device = CudaDevice::open(0).expect("this process sees a GPU");
                Memory::Cuda(CudaMemory::allocate(device, ceiling_bytes).expect("the test's buffer fits"))
            }
        })
    }
}

/// How another process opens it, as one word.
pub fn describe(memory: &Memory) -> String {
    let handle = match memory {
        Memory::Host(host) => Handle::Host(host.handle()),
        Memory::Cuda(cuda) => Handle::Cuda(cuda.handle()),
    };
    serde_json::to_string(&handle).expect("a handle is plain data")
}

/// Either handle.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub enum Handle {
    /// A memfd.
    Host(HostHandle),
    /// An allocation of a GPU.
    Cuda(CudaHandle),
}

/// Another process's buffer.
#[derive(Debug)]
pub enum Mapping {
    /// In host memory.
    Host(HostMapping),
    /// On a GPU.
    Cuda(CudaMapping),
}

impl Mapping {
    /// Opens what `describe` described.
    pub fn open(handle: &Handle) -> Result<Self, BufferError> {
        match handle {
            Handle::Host(handle) => HostMapping::open(handle).map(Self::Host),
            Handle::Cuda(handle) => CudaMapping::open(CudaDevice::of_uuid(handle.device)?, handle).map(Self::Cuda),
        }
    }

    /// Its length.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Host(mapping) => mapping.len_bytes(),
            Self::Cuda(mapping) => mapping.len_bytes(),
        }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BufferError> {
        match self {
            Self::Host(mapping) => mapping.write(offset, bytes),
            Self::Cuda(mapping) => mapping.write(offset, bytes),
        }
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BufferError> {
        match self {
            Self::Host(mapping) => mapping.read(offset, out),
            Self::Cuda(mapping) => mapping.read(offset, out),
        }
    }
}
