//! Copies that go on after the call that starts them.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::driver::{CudaEvent, Place, Stream};
use super::{CudaDevice, CudaMapping, PinnedHost};
use crate::buffer::{BufferError, Memory};

/// Where bytes come from or go to: kept alive by whatever copies them.
#[derive(Debug, Clone)]
pub enum CopyEnd {
    /// Our own.
    Memory(Arc<Memory>),
    /// Another process's host memory.
    Host(Arc<PinnedHost>),
    /// Another process's GPU memory.
    Cuda(Arc<CudaMapping>),
}

impl CopyEnd {
    /// Its length.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Memory(memory) => memory.len_bytes(),
            Self::Host(pinned) => pinned.len_bytes(),
            Self::Cuda(mapping) => mapping.len_bytes(),
        }
    }

    fn place(&self, offset: u64, len_bytes: u64) -> Result<Place, BufferError> {
        let buffer_len_bytes = self.len_bytes();
        if offset.checked_add(len_bytes).is_none_or(|end| end > buffer_len_bytes) {
            return Err(BufferError::OutOfRange { offset, len_bytes, buffer_len_bytes });
        }
        Ok(match self {
            Self::Memory(memory) => match &**memory {
                Memory::Host(host) => Place::Host(host.address() + offset),
                Memory::Cuda(cuda) => cuda.place(offset),
            },
            Self::Host(pinned) => Place::Host(pinned.address() + offset),
            Self::Cuda(mapping) => mapping.place(offset),
        })
    }
}

/// A device's stream, beside those of everybody else on that device.
#[derive(Debug)]
pub struct CopyStream {
    device: Arc<CudaDevice>,
    stream: Stream,
}

impl CopyStream {
    /// A new one.
    ///
    /// # Errors
    /// [`BufferError::DeviceLost`] or [`BufferError::Device`].
    pub fn new(device: Arc<CudaDevice>) -> Result<Arc<Self>, BufferError> {
        let stream = device.context().stream().map_err(|error| device.failed(error))?;
        Ok(Arc::new(Self { device, stream }))
    }

    /// The device.
    pub const fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }
}

impl Drop for CopyStream {
    fn drop(&mut self) {
        // SAFETY: made by `new`; batches hold their stream.
        if let Err(error) = unsafe { self.device.context().close_stream(self.stream) } {
            tracing::debug!(device = %self.device, %error, "a stream is not closed");
        }
    }
}

/// Copies between two memories that end together. Both are kept until they have ended: dropped before, it waits for
/// them.
#[derive(Debug)]
pub struct CopyBatch {
    stream: Arc<CopyStream>,
    source: CopyEnd,
    target: CopyEnd,
    /// Recorded behind the last copy.
    event: Option<CudaEvent>,
    ended: bool,
}

impl CopyBatch {
    /// An empty one.
    pub const fn new(stream: Arc<CopyStream>, source: CopyEnd, target: CopyEnd) -> Self {
        Self { stream, source, target, event: None, ended: true }
    }

    /// How long a copy to `target_offset` may be, and whether it goes on by itself: otherwise it holds up the thread that
    /// starts it.
    pub fn reach_at(&self, target_offset: u64) -> (u64, bool) {
        match &self.target {
            CopyEnd::Host(pinned) => pinned.reach_at(target_offset),
            CopyEnd::Memory(_) | CopyEnd::Cuda(_) => (u64::MAX, true),
        }
    }

    /// Starts a copy. Those of a batch may end in any order.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`]: nothing is copied then. [`BufferError::DeviceLost`] and [`BufferError::Device`].
    pub fn push(&mut self, source_offset: u64, target_offset: u64, len_bytes: u64) -> Result<(), BufferError> {
        let from = self.source.place(source_offset, len_bytes)?;
        let to = self.target.place(target_offset, len_bytes)?;
        let CopyStream { device, stream } = &*self.stream;
        self.ended = false;
        // SAFETY: both ranges are inside memories that `self` holds, and `drop` waits for the copy.
        unsafe { device.context().copy(to, from, len_bytes, *stream) }.map_err(|error| device.failed(error))
    }

    /// No more copies follow: from here on [`is_done`](Self::is_done) tells.
    ///
    /// # Errors
    /// [`BufferError::DeviceLost`] and [`BufferError::Device`].
    pub fn seal(&mut self) -> Result<(), BufferError> {
        let CopyStream { device, stream } = &*self.stream;
        let failed = |error| device.failed(error);
        let event = device.context().event().map_err(failed)?;
        self.event = Some(event);
        device.context().record(event, *stream).map_err(failed)
    }

    /// Whether every copy has ended. Never waits.
    ///
    /// # Errors
    /// [`BufferError::DeviceLost`] and [`BufferError::Device`]: the copies may have failed.
    pub fn is_done(&mut self) -> Result<bool, BufferError> {
        let device = &self.stream.device;
        let Some(event) = self.event else { return Ok(self.ended) };
        self.ended = self.ended || device.context().is_done(event).map_err(|error| device.failed(error))?;
        Ok(self.ended)
    }
}

impl Drop for CopyBatch {
    fn drop(&mut self) {
        let CopyStream { device, stream } = &*self.stream;
        // A device that is lost copies nothing any more.
        if !self.ended
            && let Err(error) = device.context().finish(*stream)
        {
            tracing::debug!(%device, %error, "copies that were given up did not end well");
        }
        if let Some(event) = self.event {
            // SAFETY: made by `seal`, and what it was recorded behind has ended.
            let _ = unsafe { device.context().close_event(event) };
        }
    }
}
