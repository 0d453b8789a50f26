//! Events of other processes: what their streams have yet to do.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use super::CudaDevice;
use super::driver::CudaEvent;
use crate::buffer::BufferError;
use crate::ids::IpcHandle;

/// Events that other processes have told of, each opened once.
#[derive(Debug)]
pub struct Fences {
    device: Arc<CudaDevice>,
    open: BTreeMap<IpcHandle, CudaEvent>,
}

impl Fences {
    /// How many are kept open. An engine has some dozens; a client that makes a new one for each send has others
    /// closed.
    const OPEN_MAX: usize = 4096;

    /// None yet. Events are of one device: that of the memory whose writes they stand for.
    pub const fn new(device: Arc<CudaDevice>) -> Self {
        Self { device, open: BTreeMap::new() }
    }

    /// Whether everything that was on its stream when the event was last recorded has ended. Never waits.
    ///
    /// # Errors
    /// [`BufferError::Fence`] when the event cannot be opened; [`BufferError::DeviceLost`].
    pub fn is_passed(&mut self, handle: &IpcHandle) -> Result<bool, BufferError> {
        let event = match self.open.get(handle) {
            Some(event) => *event,
            None => self.open_event(handle)?,
        };
        self.device.context().is_done(event).map_err(|error| self.device.failed(error))
    }

    fn open_event(&mut self, handle: &IpcHandle) -> Result<CudaEvent, BufferError> {
        if self.open.len() >= Self::OPEN_MAX {
            self.close_all();
        }
        let opened = self.device.context().open_event(handle);
        let event = opened.map_err(|error| match self.device.failed(error) {
            BufferError::Device { device, reason } => BufferError::Fence { device, reason },
            lost => lost,
        })?;
        self.open.insert(*handle, event);
        Ok(event)
    }

    fn close_all(&mut self) {
        for event in std::mem::take(&mut self.open).into_values() {
            // SAFETY: opened once; nothing waits in it, since it is only ever asked.
            let _ = unsafe { self.device.context().close_event(event) };
        }
    }
}

impl Drop for Fences {
    fn drop(&mut self) {
        self.close_all();
    }
}
