//! Which GPU, and the context in which everything on it happens.

use std::sync::Arc;

use super::driver::{self, Context, CudaError};
use super::memory::allocation_bytes;
use crate::buffer::BufferError;
use crate::ids::DeviceId;

/// A GPU of this process, ready to be used.
#[derive(Debug)]
pub struct CudaDevice {
    context: Context,
    ordinal: u32,
    uuid: DeviceId,
    name: String,
}

impl CudaDevice {
    /// The device that this process knows by that number.
    ///
    /// # Errors
    /// [`BufferError::Cuda`] when there is no driver, or it does not work; [`BufferError::NoSuchDevice`].
    pub fn open(ordinal: u32) -> Result<Arc<Self>, BufferError> {
        start()?;
        let failed = |error: CudaError| BufferError::Cuda { reason: error.to_string() };
        let count = driver::device_count().map_err(failed)?;
        if ordinal >= count {
            return Err(BufferError::NoSuchDevice { ordinal, present: describe_all(count) });
        }
        let uuid = driver::device_uuid(ordinal).map_err(failed)?;
        let name = driver::device_name(ordinal).map_err(failed)?;
        let context = Context::retain(ordinal).map_err(failed)?;
        Ok(Arc::new(Self { context, ordinal, uuid, name }))
    }

    /// The device of that UUID, if this process sees it.
    ///
    /// # Errors
    /// [`BufferError::Cuda`]; [`BufferError::OtherDevice`] when it is not among those that this process sees.
    pub fn of_uuid(uuid: DeviceId) -> Result<Arc<Self>, BufferError> {
        start()?;
        match ordinal_of(uuid)? {
            Some(ordinal) => Self::open(ordinal),
            None => {
                let count = driver::device_count().unwrap_or(0);
                Err(BufferError::OtherDevice {
                    device: uuid,
                    reason: format!(
                        "this process sees {}; let CUDA_VISIBLE_DEVICES name it here as well",
                        describe_all(count)
                    ),
                })
            }
        }
    }

    /// Its number in this process.
    pub const fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Its name among all GPUs of the host.
    pub const fn uuid(&self) -> DeviceId {
        self.uuid
    }

    /// Has libraries that are called on this thread work on this device, as those expect that are given its memory.
    ///
    /// # Errors
    /// [`BufferError::DeviceLost`] or [`BufferError::Device`].
    pub fn make_current(&self) -> Result<(), BufferError> {
        self.context.bind().map_err(|error| self.failed(error))
    }

    /// Bytes of its memory that are free, and that it has.
    ///
    /// # Errors
    /// [`BufferError::DeviceLost`] or [`BufferError::Device`].
    pub fn memory_info(&self) -> Result<(u64, u64), BufferError> {
        self.context.memory_info().map_err(|error| self.failed(error))
    }

    /// Says so unless work here can reach memory of `uuid`.
    pub(super) fn check_reaches(&self, uuid: DeviceId) -> Result<(), BufferError> {
        if uuid == self.uuid {
            return Ok(());
        }
        let refuse = |reason: String| BufferError::OtherDevice { device: uuid, reason };
        let Some(other) = ordinal_of(uuid)? else {
            return Err(refuse(format!(
                "this process sees {}; let CUDA_VISIBLE_DEVICES name it here as well",
                describe_all(driver::device_count().unwrap_or(0))
            )));
        };
        match driver::can_access_peer(self.ordinal, other).map_err(|error| self.failed(error))? {
            true => Ok(()),
            false => Err(refuse(format!(
                "there is no peer access between it and {self}; put both buffers on one GPU, or on two that have it \
                 (nvidia-smi topo -p2p r), or set transfer_channel: nixl"
            ))),
        }
    }

    pub(super) const fn context(&self) -> &Context {
        &self.context
    }

    /// What a failed call means.
    pub(super) fn failed(&self, error: CudaError) -> BufferError {
        if error.is_device_lost() {
            BufferError::DeviceLost { device: self.to_string(), reason: error.to_string() }
        } else {
            BufferError::Device { device: self.to_string(), reason: error.to_string() }
        }
    }
}

impl std::fmt::Display for CudaDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({}, {})", self.ordinal, self.name, self.uuid)
    }
}

/// Says so unless a buffer of `len_bytes` can be had on that device now. What is free may be gone later.
///
/// # Errors
/// As [`CudaDevice::open`], and [`BufferError::DeviceMemory`].
pub fn check_cuda_device(ordinal: u32, len_bytes: u64) -> Result<(), BufferError> {
    let device = CudaDevice::open(ordinal)?;
    let (free_bytes, total_bytes) = device.memory_info()?;
    if allocation_bytes(len_bytes) > free_bytes {
        return Err(BufferError::DeviceMemory { len_bytes, device: device.to_string(), free_bytes, total_bytes });
    }
    Ok(())
}

fn start() -> Result<(), BufferError> {
    driver::start().map_err(|reason| BufferError::Cuda { reason })
}

fn ordinal_of(uuid: DeviceId) -> Result<Option<u32>, BufferError> {
    let failed = |error: CudaError| BufferError::Cuda { reason: error.to_string() };
    for ordinal in 0..driver::device_count().map_err(failed)? {
        if driver::device_uuid(ordinal).map_err(failed)? == uuid {
            return Ok(Some(ordinal));
        }
    }
    Ok(None)
}

fn describe_all(count: u32) -> String {
    let one = |ordinal: u32| match (driver::device_name(ordinal), driver::device_uuid(ordinal)) {
        (Ok(name), Ok(uuid)) => format!("cuda:{ordinal} ({name}, {uuid})"),
        (Err(error), _) | (_, Err(error)) => format!("cuda:{ordinal} ({error})"),
    };
    match count {
        0 => "no GPU".to_owned(),
        count => (0..count).map(one).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_gets_an_error_and_no_panic() {
        // Broken in production: `pd_buffer_device: cuda` on a bare machine ends in a panic instead of exit code 3.
        match CudaDevice::open(0) {
            Ok(device) => eprintln!("this machine has {device}"),
            Err(error) => assert!(error.to_string().contains("no usable CUDA device"), "{error}"),
        }
    }
}
