//! What is said in step two: where the buffer is, and how much of it may be written.

use serde::{Deserialize, Serialize};

use crate::buffer::{CudaHandle, HostHandle, Memory};
use crate::transfer::blob::BlobKind;

const HOST: BlobKind = BlobKind { magic: b"pdlocaldesc", version: 2 };
/// A kind of its own: to releases that know host memory alone it is another word, and not a newer version of theirs.
const CUDA: BlobKind = BlobKind { magic: b"pdlocalcuda", version: 1 };

/// A buffer of either memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LocalBuffer {
    Host(HostDescriptor),
    Cuda(CudaHandle),
}

/// Host memory, at its ceiling's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostDescriptor {
    pub(super) handle: HostHandle,
    /// Grows; the memory behind the rest of the handle's length is not there yet.
    pub(super) len_bytes: u64,
}

impl LocalBuffer {
    /// Ours, with as much of it as is registered.
    pub(super) fn of(memory: &Memory, len_bytes: u64) -> Self {
        match memory {
            Memory::Host(host) => Self::Host(HostDescriptor { handle: host.handle(), len_bytes }),
            Memory::Cuda(cuda) => Self::Cuda(cuda.handle()),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Host(descriptor) => HOST.encode(descriptor),
            Self::Cuda(handle) => CUDA.encode(handle),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.starts_with(CUDA.magic) {
            let handle: CudaHandle = CUDA.decode(bytes)?;
            handle.check()?;
            return Ok(Self::Cuda(handle));
        }
        let descriptor: HostDescriptor = HOST.decode(bytes)?;
        let HostDescriptor { handle, len_bytes } = descriptor;
        if len_bytes == 0 || len_bytes > handle.len_bytes {
            return Err(format!("{len_bytes} bytes of a buffer of {}", handle.len_bytes));
        }
        Ok(Self::Host(descriptor))
    }

    /// The owner's process.
    pub(super) const fn pid(&self) -> u32 {
        match self {
            Self::Host(descriptor) => descriptor.handle.pid,
            Self::Cuda(handle) => handle.pid,
        }
    }

    /// How much of it may be written.
    pub(super) const fn len_bytes(&self) -> u64 {
        match self {
            Self::Host(descriptor) => descriptor.len_bytes,
            Self::Cuda(handle) => handle.len_bytes,
        }
    }

    /// Says so unless this is `before` with more of it, or the same.
    pub(super) fn check_grown_from(&self, before: &Self) -> Result<(), String> {
        let same = match (self, before) {
            (Self::Host(after), Self::Host(before)) => after.handle == before.handle,
            (after, before) => after == before,
        };
        if !same {
            return Err(format!("they name {self}, before it was {before}"));
        }
        if self.len_bytes() < before.len_bytes() {
            return Err(format!("{} bytes, before it was {}", self.len_bytes(), before.len_bytes()));
        }
        Ok(())
    }
}

impl std::fmt::Display for LocalBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host(descriptor) => descriptor.handle.fmt(f),
            Self::Cuda(handle) => handle.fmt(f),
        }
    }
}
