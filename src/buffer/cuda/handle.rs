//! What another process needs to open our GPU memory.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{DeviceId, IpcHandle};

/// Memory on a GPU, as another process on the same host finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CudaHandle {
    /// The owner's process.
    pub pid: u32,
    /// The GPU.
    pub device: DeviceId,
    /// What its owner calls that GPU; another process may call it otherwise.
    pub ordinal: u32,
    /// Names the whole allocation that the memory is in.
    pub ipc: IpcHandle,
    /// Where the memory starts in that allocation.
    pub offset_bytes: u64,
    /// Length of the allocation.
    pub allocation_bytes: u64,
    /// Length of the memory.
    pub len_bytes: u64,
}

impl CudaHandle {
    /// Says so unless the memory is inside its allocation.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self { offset_bytes, len_bytes, allocation_bytes, .. } = *self;
        match offset_bytes.checked_add(len_bytes) {
            Some(end) if len_bytes > 0 && end <= allocation_bytes => Ok(()),
            _ => Err(format!("{len_bytes} bytes at {offset_bytes} of an allocation of {allocation_bytes}")),
        }
    }
}

impl fmt::Display for CudaHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes on {} of process {}", self.len_bytes, self.device, self.pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_leaves_its_allocation_is_refused() {
        // Broken in production: a peer's word becomes addresses behind its buffer that are written to.
        let good = CudaHandle {
            pid: 1,
            device: DeviceId([0; 16]),
            ordinal: 0,
            ipc: IpcHandle([0; 64]),
            offset_bytes: 10,
            allocation_bytes: 100,
            len_bytes: 90,
        };
        assert_eq!(good.check(), Ok(()));
        for bad in [
            CudaHandle { len_bytes: 91, ..good },
            CudaHandle { len_bytes: 0, ..good },
            CudaHandle { offset_bytes: u64::MAX, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad}");
        }
    }
}
