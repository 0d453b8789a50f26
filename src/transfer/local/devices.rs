//! The GPUs that an engine copies with: a stream on each, and the memory of peers that is open there.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use crate::buffer::{BufferError, CopyStream, CudaDevice, CudaHandle, CudaMapping};
use crate::ids::{DeviceId, IpcHandle};

/// Empty on a machine without a GPU, and where neither end of any connection is on one.
#[derive(Debug, Default)]
pub(super) struct Devices {
    streams: BTreeMap<DeviceId, Arc<CopyStream>>,
    /// One mapping for each allocation: the driver counts further ones, and some versions refuse them.
    mappings: BTreeMap<(IpcHandle, u64), Weak<CudaMapping>>,
}

impl Devices {
    /// The device of that UUID.
    pub(super) fn of_uuid(&self, uuid: DeviceId) -> Result<Arc<CudaDevice>, BufferError> {
        match self.streams.get(&uuid) {
            Some(stream) => Ok(Arc::clone(stream.device())),
            None => CudaDevice::of_uuid(uuid),
        }
    }

    /// The one stream that this engine has on a device.
    pub(super) fn stream(&mut self, device: &Arc<CudaDevice>) -> Result<Arc<CopyStream>, BufferError> {
        if let Some(stream) = self.streams.get(&device.uuid()) {
            return Ok(Arc::clone(stream));
        }
        let stream = CopyStream::new(Arc::clone(device))?;
        self.streams.insert(device.uuid(), Arc::clone(&stream));
        Ok(stream)
    }

    /// A peer's memory, for copies by `device`.
    pub(super) fn open(
        &mut self,
        device: &Arc<CudaDevice>,
        handle: &CudaHandle,
    ) -> Result<Arc<CudaMapping>, BufferError> {
        self.mappings.retain(|_, mapping| mapping.strong_count() > 0);
        let key = (handle.ipc, handle.offset_bytes);
        if let Some(mapping) = self.mappings.get(&key).and_then(Weak::upgrade)
            && mapping.handle() == handle
        {
            return Ok(mapping);
        }
        let mapping = Arc::new(CudaMapping::open(Arc::clone(device), handle)?);
        self.mappings.insert(key, Arc::downgrade(&mapping));
        Ok(mapping)
    }
}
