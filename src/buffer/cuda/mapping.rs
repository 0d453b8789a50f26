//! Another process's GPU memory, opened here.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::driver::Place;
use super::{CudaDevice, CudaHandle};
use crate::buffer::BufferError;

/// The memory that a [`CudaHandle`] names. While it is open the GPU keeps the memory, also when its owner has ended: so
/// it is closed as soon as the owner is known to be gone.
#[derive(Debug)]
pub struct CudaMapping {
    /// In whose context it is open: the memory's own, or one that reaches it.
    device: Arc<CudaDevice>,
    base: u64,
    handle: CudaHandle,
}

impl CudaMapping {
    /// Opens it for copies by `device`.
    ///
    /// # Errors
    /// [`BufferError::OtherDevice`] when `device` cannot reach it; [`BufferError::OpenDevice`] when its process is
    /// gone, or is this one; [`BufferError::DeviceLost`].
    pub fn open(device: Arc<CudaDevice>, handle: &CudaHandle) -> Result<Self, BufferError> {
        let refuse = |reason: String| BufferError::OpenDevice {
            pid: handle.pid,
            device: handle.device,
            len_bytes: handle.len_bytes,
            reason,
        };
        handle.check().map_err(refuse)?;
        device.check_reaches(handle.device)?;
        let base = device.context().open(&handle.ipc).map_err(|error| match device.failed(error) {
            BufferError::Device { reason, .. } => refuse(format!("{reason}; is the process alive, and another one?")),
            lost => lost,
        })?;
        let mapping = Self { device, base, handle: *handle };
        // What was opened says itself how long it is: an address behind it could be anybody's.
        match mapping.device.context().allocation_of(base) {
            Ok((_, len_bytes)) if len_bytes < handle.allocation_bytes => Err(refuse(format!(
                "the allocation has {len_bytes} bytes, expected {}: it is another one",
                handle.allocation_bytes
            ))),
            Ok(_) => Ok(mapping),
            Err(error) => {
                tracing::debug!(%error, "the length of a peer's allocation is its own word");
                Ok(mapping)
            }
        }
    }

    /// What it was opened with.
    pub const fn handle(&self) -> &CudaHandle {
        &self.handle
    }

    /// Its length.
    pub const fn len_bytes(&self) -> u64 {
        self.handle.len_bytes
    }

    /// In whose context it is open.
    pub const fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Copies bytes to the host.
    ///
    /// # Errors
    /// As [`CudaMemory::read`](super::CudaMemory::read).
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BufferError> {
        let address = self.address_of(offset, out.len() as u64)?;
        // SAFETY: the range is inside the memory, which is closed when `self` is dropped.
        unsafe { self.device.context().read(address, out) }.map_err(|error| self.device.failed(error))
    }

    /// Copies bytes from the host.
    ///
    /// # Errors
    /// As [`CudaMemory::write`](super::CudaMemory::write).
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BufferError> {
        let address = self.address_of(offset, bytes.len() as u64)?;
        // SAFETY: as in `read`.
        unsafe { self.device.context().write(address, bytes) }.map_err(|error| self.device.failed(error))
    }

    pub(super) const fn place(&self, offset: u64) -> Place {
        Place::Device(self.base + self.handle.offset_bytes + offset)
    }

    fn address_of(&self, offset: u64, len_bytes: u64) -> Result<u64, BufferError> {
        let buffer_len_bytes = self.len_bytes();
        match offset.checked_add(len_bytes) {
            Some(end) if end <= buffer_len_bytes => Ok(self.base + self.handle.offset_bytes + offset),
            _ => Err(BufferError::OutOfRange { offset, len_bytes, buffer_len_bytes }),
        }
    }
}

impl Drop for CudaMapping {
    fn drop(&mut self) {
        // SAFETY: opened once by `open`; whatever copies from or to it holds it.
        if let Err(error) = unsafe { self.device.context().close(self.base) } {
            tracing::warn!(device = %self.device, %error, "a peer's GPU memory is not closed");
        }
    }
}
