//! What this crate asks of the CUDA driver. The library is loaded at run time; a machine without it gets an error.
#![allow(unsafe_code)]

use cudarc::driver::{result, sys};

use super::BufferError;

/// How many CUDA devices this process can see.
///
/// # Errors
/// [`BufferError::Cuda`] when there is no driver, or it does not work.
pub fn cuda_device_count() -> Result<u32, BufferError> {
    let refuse = |reason: String| BufferError::Cuda { reason };
    // cudarc panics when it is asked for anything without the library.
    // SAFETY: loads libcuda and closes it again; its initialisers are the driver's own and have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(refuse("the driver's library libcuda.so is not installed".to_owned()));
    }
    result::init().map_err(|error| refuse(format!("cuInit: {error:?}")))?;
    let count = result::device::get_count().map_err(|error| refuse(format!("cuDeviceGetCount: {error:?}")))?;
    u32::try_from(count).map_err(|_| refuse(format!("cuDeviceGetCount said {count}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_gets_an_error_and_no_panic() {
        // Broken in production: `pd_buffer_device: cuda` on a bare machine ends in a panic instead of exit code 3.
        match cuda_device_count() {
            Ok(count) => eprintln!("this machine has {count} CUDA devices"),
            Err(error) => assert!(error.to_string().contains("no usable CUDA device"), "{error}"),
        }
    }
}
