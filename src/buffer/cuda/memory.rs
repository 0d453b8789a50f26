//! Memory on a GPU that other processes of the same user can open.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::driver::Place;
use super::{CudaDevice, CudaHandle};
use crate::buffer::BufferError;
use crate::ids::Summing;

/// What is copied to the host at a time for a checksum.
const PIECE_LEN_BYTES: u64 = 1024 * 1024;

/// Smaller allocations share one of this length on the device, and who opens the handle of one has the others as well
/// (CUDA C++ Programming Guide, "Interprocess Communication"): so whole ones are taken.
const ALLOCATION_UNIT_BYTES: u64 = 2 * 1024 * 1024;

/// One plain allocation, exported.
#[derive(Debug)]
pub struct CudaMemory {
    device: Arc<CudaDevice>,
    address: u64,
    handle: CudaHandle,
}

impl CudaMemory {
    /// Allocates `len_bytes` on a device. What is in there is not said.
    ///
    /// # Errors
    /// [`BufferError::DeviceMemory`] when less is free; [`BufferError::NotExportable`] when other processes cannot open
    /// it; [`BufferError::DeviceLost`] and [`BufferError::Device`].
    pub fn allocate(device: Arc<CudaDevice>, len_bytes: u64) -> Result<Self, BufferError> {
        let address =
            device.context().allocate(allocation_bytes(len_bytes)).map_err(|error| match device.memory_info() {
                Ok((free_bytes, total_bytes)) if error.is_out_of_memory() => {
                    BufferError::DeviceMemory { len_bytes, device: device.to_string(), free_bytes, total_bytes }
                }
                _ => device.failed(error),
            })?;
        match export(&device, address, len_bytes) {
            Ok(handle) => Ok(Self { device, address, handle }),
            Err(error) => {
                // SAFETY: it was allocated above, and nobody has seen its address.
                let freed = unsafe { device.context().free(address) };
                freed
                    .err()
                    .into_iter()
                    .for_each(|error| tracing::warn!(%device, %error, "GPU memory is not given back"));
                Err(error)
            }
        }
    }

    /// Its length.
    pub const fn len_bytes(&self) -> u64 {
        self.handle.len_bytes
    }

    /// Where it is on the device: no address of the host.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The GPU that it is on.
    pub const fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// How another process of the same user opens it, for as long as this one lives.
    pub const fn handle(&self) -> CudaHandle {
        self.handle
    }

    /// Copies bytes to the host.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`]; [`BufferError::DeviceLost`] and [`BufferError::Device`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BufferError> {
        self.check(offset, out.len() as u64)?;
        // SAFETY: the range is inside the allocation, which is freed when `self` is dropped.
        unsafe { self.device.context().read(self.address + offset, out) }.map_err(|error| self.device.failed(error))
    }

    /// Copies bytes from the host.
    ///
    /// # Errors
    /// As [`read`](Self::read); nothing is written when the range is wrong.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BufferError> {
        self.check(offset, bytes.len() as u64)?;
        // SAFETY: as in `read`.
        unsafe { self.device.context().write(self.address + offset, bytes) }.map_err(|error| self.device.failed(error))
    }

    /// Adds bytes to a sum, which takes them through the host.
    ///
    /// # Errors
    /// As [`read`](Self::read). The sum is of no use then.
    pub fn sum(&self, offset: u64, len_bytes: u64, sum: &mut Summing) -> Result<(), BufferError> {
        self.check(offset, len_bytes)?;
        let mut piece = vec![0; PIECE_LEN_BYTES.min(len_bytes) as usize];
        let mut done_bytes = 0;
        while done_bytes < len_bytes {
            let len = PIECE_LEN_BYTES.min(len_bytes - done_bytes) as usize;
            self.read(offset + done_bytes, &mut piece[..len])?;
            sum.add(&piece[..len]);
            done_bytes += len as u64;
        }
        Ok(())
    }

    pub(super) const fn place(&self, offset: u64) -> Place {
        Place::Device(self.address + offset)
    }

    fn check(&self, offset: u64, len_bytes: u64) -> Result<(), BufferError> {
        let buffer_len_bytes = self.len_bytes();
        match offset.checked_add(len_bytes) {
            Some(end) if end <= buffer_len_bytes => Ok(()),
            _ => Err(BufferError::OutOfRange { offset, len_bytes, buffer_len_bytes }),
        }
    }
}

/// How much is taken of a device for a buffer of that length.
pub(super) const fn allocation_bytes(len_bytes: u64) -> u64 {
    len_bytes.div_ceil(ALLOCATION_UNIT_BYTES).saturating_mul(ALLOCATION_UNIT_BYTES)
}

/// The handle names the allocation as the driver sees it, which may begin before the address that it gave us.
fn export(device: &CudaDevice, address: u64, len_bytes: u64) -> Result<CudaHandle, BufferError> {
    let refuse = |error: super::driver::CudaError| match device.failed(error) {
        BufferError::Device { device, reason } => BufferError::NotExportable { len_bytes, device, reason },
        lost => lost,
    };
    let (base, allocation_bytes) = device.context().allocation_of(address).map_err(refuse)?;
    let ipc = device.context().export(address).map_err(refuse)?;
    Ok(CudaHandle {
        pid: std::process::id(),
        device: device.uuid(),
        ordinal: device.ordinal(),
        ipc,
        offset_bytes: address - base,
        allocation_bytes,
        len_bytes,
    })
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        // SAFETY: allocated once; whatever copies from or to it holds it.
        if let Err(error) = unsafe { self.device.context().free(self.address) } {
            tracing::warn!(device = %self.device, %error, "GPU memory is not given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_takes_whole_units_of_the_device() {
        // Broken in production: an engine that opens a small buffer has somebody else's memory open as well.
        assert_eq!(allocation_bytes(1), 2 << 20);
        assert_eq!(allocation_bytes(2 << 20), 2 << 20);
        assert_eq!(allocation_bytes((2 << 20) + 1), 4 << 20);
        assert_eq!(allocation_bytes(u64::MAX), u64::MAX, "what no device has is still refused by the device");
    }
}
