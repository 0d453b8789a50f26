//! The calls into the CUDA driver. Nothing above this file names its library or has a raw status.
//!
//! A call works in the context that is current on its thread, so every call here is given one and makes it current.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::ids::{DeviceId, IpcHandle};

/// Everything that is called, looked up at once: cudarc panics over a name that is missing when it is called.
const SYMBOLS: [&str; 32] = [
    "cuInit",
    "cuGetErrorName",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceCanAccessPeer",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    "cuIpcOpenEventHandle",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyHtoD_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
];

/// A call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CudaError {
    operation: &'static str,
    code: u32,
}

impl CudaError {
    /// There is less memory than was asked for.
    pub(super) const fn is_out_of_memory(self) -> bool {
        self.code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32
    }

    /// The device cannot be used any more by this process, whatever is called.
    pub(super) const fn is_device_lost(self) -> bool {
        const LOST: [sys::CUresult; 9] = [
            sys::CUresult::CUDA_ERROR_DEINITIALIZED,
            sys::CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE,
            sys::CUresult::CUDA_ERROR_NO_DEVICE,
            sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
            sys::CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
            sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            sys::CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
            sys::CUresult::CUDA_ERROR_LAUNCH_FAILED,
            sys::CUresult::CUDA_ERROR_UNKNOWN,
        ];
        let mut at = 0;
        while at < LOST.len() {
            if LOST[at] as u32 == self.code {
                return true;
            }
            at += 1;
        }
        false
    }
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, name_of(self.code))
    }
}

fn name_of(code: u32) -> String {
    // Not by the bindings' own names: a newer driver has codes that they do not know.
    let Some(get_name) = error_names() else { return format!("error {code}") };
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: the driver writes the address of a text of its own, or nothing for a code that it does not know.
    let found = unsafe { get_name(code, &raw mut name) };
    if found != 0 || name.is_null() {
        return format!("error {code}");
    }
    // SAFETY: the text is the driver's, ends with a zero and stays for as long as the library does.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

type GetErrorName = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;

fn error_names() -> Option<GetErrorName> {
    // SAFETY: an error was seen, so the library is loaded.
    let library = unsafe { sys::culib() };
    // SAFETY: cuGetErrorName has this signature, with the code as a number.
    unsafe { library.get::<GetErrorName>(b"cuGetErrorName") }.ok().map(|symbol| *symbol)
}

fn check(operation: &'static str, status: sys::CUresult) -> Result<(), CudaError> {
    match status as u32 {
        0 => Ok(()),
        code => Err(CudaError { operation, code }),
    }
}

/// Loads the library and starts the driver, once a process. The reason when that is impossible.
pub(super) fn start() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // SAFETY: loads libcuda and closes it again; its initialisers are the driver's own.
            if !unsafe { sys::is_culib_present() } {
                return Err("the driver's library libcuda.so.1 is not installed".to_owned());
            }
            // SAFETY: it is present, so this loads it.
            let library = unsafe { sys::culib() };
            for name in SYMBOLS {
                // SAFETY: the symbol is looked up and not called.
                if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
                    return Err(format!("the driver's library has no {name}: it is too old, or no driver's library"));
                }
            }
            // SAFETY: cuInit has no preconditions.
            check("cuInit", unsafe { sys::cuInit(0) }).map_err(|error| error.to_string())
        })
        .clone()
}

/// How many devices this process sees.
pub(super) fn device_count() -> Result<u32, CudaError> {
    let mut count = 0;
    // SAFETY: the driver was started, and writes a number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn device(ordinal: u32) -> Result<sys::CUdevice, CudaError> {
    let mut device = 0;
    // SAFETY: as above.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal as i32) })?;
    Ok(device)
}

pub(super) fn device_uuid(ordinal: u32) -> Result<DeviceId, CudaError> {
    let device = device(ordinal)?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the driver writes 16 bytes.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    Ok(DeviceId(uuid.bytes.map(|byte| byte as u8)))
}

pub(super) fn device_name(ordinal: u32) -> Result<String, CudaError> {
    let device = device(ordinal)?;
    let mut name = [0_u8; 128];
    // SAFETY: the driver writes at most as many bytes as it is told, the last of them zero.
    let status = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device) };
    check("cuDeviceGetName", status)?;
    Ok(CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned()))
}

/// Whether work on `from` can reach memory of `to`.
pub(super) fn can_access_peer(from: u32, to: u32) -> Result<bool, CudaError> {
    let (from, to) = (device(from)?, device(to)?);
    let mut can = 0;
    // SAFETY: the driver writes a number.
    check("cuDeviceCanAccessPeer", unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, from, to) })?;
    Ok(can != 0)
}

/// A device's primary context: the one that every library in a process shares.
#[derive(Debug)]
pub(super) struct Context {
    raw: sys::CUcontext,
    device: sys::CUdevice,
}

// SAFETY: a context belongs to the process; any thread may make it current, several at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn retain(ordinal: u32) -> Result<Self, CudaError> {
        let device = device(ordinal)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the driver writes a context, which `drop` releases.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) })?;
        Ok(Self { raw, device })
    }

    /// Makes it current on this thread.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained for as long as `self`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// Bytes free and in all.
    pub(super) fn memory_info(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    pub(super) fn allocate(&self, len_bytes: u64) -> Result<u64, CudaError> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: the driver writes an address.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, len_bytes as usize) })?;
        Ok(address)
    }

    /// # Safety
    /// `address` is from `allocate`, freed once, and nothing uses it any more.
    pub(super) unsafe fn free(&self, address: u64) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check("cuMemFree", unsafe { sys::cuMemFree_v2(address) })
    }

    /// Start and length of the allocation that an address is in.
    pub(super) fn allocation_of(&self, address: u64) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut base, mut len_bytes) = (0, 0);
        // SAFETY: the driver writes two numbers, and refuses an address that it does not know.
        let status = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut len_bytes, address) };
        check("cuMemGetAddressRange", status)?;
        Ok((base, len_bytes as u64))
    }

    pub(super) fn export(&self, address: u64) -> Result<IpcHandle, CudaError> {
        self.bind()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the driver writes 64 bytes, and refuses an address that it does not know.
        check("cuIpcGetMemHandle", unsafe { sys::cuIpcGetMemHandle(&raw mut handle, address) })?;
        Ok(IpcHandle(handle.reserved.map(|byte| byte as u8)))
    }

    /// Opens another process's memory; the address of the whole allocation here.
    pub(super) fn open(&self, handle: &IpcHandle) -> Result<u64, CudaError> {
        self.bind()?;
        let raw = sys::CUipcMemHandle { reserved: handle.0.map(|byte| byte as c_char) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
        let mut address = 0;
        // SAFETY: the driver checks the handle's bytes.
        check("cuIpcOpenMemHandle", unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, raw, flags) })?;
        Ok(address)
    }

    /// # Safety
    /// `address` is from `open`, closed once, and nothing uses it any more.
    pub(super) unsafe fn close(&self, address: u64) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check("cuIpcCloseMemHandle", unsafe { sys::cuIpcCloseMemHandle(address) })
    }

    /// Pins host memory, so that copies of it need no detour.
    ///
    /// # Safety
    /// The range is mapped until `unregister_host`.
    pub(super) unsafe fn register_host(&self, address: u64, len_bytes: u64) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        let status = unsafe { sys::cuMemHostRegister_v2(address as *mut c_void, len_bytes as usize, 0) };
        check("cuMemHostRegister", status)
    }

    /// # Safety
    /// The range was registered, and no copy of it goes on.
    pub(super) unsafe fn unregister_host(&self, address: u64) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check("cuMemHostUnregister", unsafe { sys::cuMemHostUnregister(address as *mut c_void) })
    }

    /// Copies host memory in, and waits until it is there.
    ///
    /// # Safety
    /// As many bytes as `bytes` has are device memory from `address` on.
    pub(super) unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise for the target; the source is borrowed until the call returns.
        check("cuMemcpyHtoD", unsafe { sys::cuMemcpyHtoD_v2(address, bytes.as_ptr().cast(), bytes.len()) })?;
        // It may return when the bytes are taken: what another process is told next must find them.
        self.finish(Stream(std::ptr::null_mut()))
    }

    /// Copies device memory out, and waits.
    ///
    /// # Safety
    /// As many bytes as `out` has are device memory from `address` on.
    pub(super) unsafe fn read(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise for the source; the target is borrowed until the call returns.
        check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), address, out.len()) })
    }

    pub(super) fn stream(&self) -> Result<Stream, CudaError> {
        self.bind()?;
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the driver writes a stream, which `close_stream` destroys.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut raw, flags) })?;
        Ok(Stream(raw))
    }

    /// # Safety
    /// The stream is of this context, and is not used any more.
    pub(super) unsafe fn close_stream(&self, stream: Stream) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(stream.0) })
    }

    /// Waits for all that was put on a stream.
    pub(super) fn finish(&self, stream: Stream) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: streams exist for as long as their owner keeps them.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.0) })
    }

    /// Puts a copy on a stream.
    ///
    /// # Safety
    /// Both ranges exist until the copy has ended.
    pub(super) unsafe fn copy(&self, to: Place, from: Place, len_bytes: u64, stream: Stream) -> Result<(), CudaError> {
        self.bind()?;
        let len = len_bytes as usize;
        match (to, from) {
            (Place::Device(to), Place::Device(from)) => {
                // SAFETY: the caller's promise.
                check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, len, stream.0) })
            }
            (Place::Device(to), Place::Host(from)) => {
                // SAFETY: the caller's promise.
                let status = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from as *const c_void, len, stream.0) };
                check("cuMemcpyHtoDAsync", status)
            }
            (Place::Host(to), Place::Device(from)) => {
                // SAFETY: the caller's promise.
                let status = unsafe { sys::cuMemcpyDtoHAsync_v2(to as *mut c_void, from, len, stream.0) };
                check("cuMemcpyDtoHAsync", status)
            }
            (Place::Host(_), Place::Host(_)) => {
                let code = sys::CUresult::CUDA_ERROR_INVALID_VALUE as u32;
                Err(CudaError { operation: "a copy from host to host", code })
            }
        }
    }

    pub(super) fn event(&self) -> Result<CudaEvent, CudaError> {
        self.bind()?;
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as c_uint;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the driver writes an event, which `close_event` destroys.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        Ok(CudaEvent(raw))
    }

    pub(super) fn open_event(&self, handle: &IpcHandle) -> Result<CudaEvent, CudaError> {
        self.bind()?;
        let handle = sys::CUipcEventHandle { reserved: handle.0.map(|byte| byte as c_char) };
        let mut raw = std::ptr::null_mut();
        // SAFETY: the driver checks the handle's bytes.
        check("cuIpcOpenEventHandle", unsafe { sys::cuIpcOpenEventHandle(&raw mut raw, handle) })?;
        Ok(CudaEvent(raw))
    }

    /// # Safety
    /// The event is of this context, and is not used any more.
    pub(super) unsafe fn close_event(&self, event: CudaEvent) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(event.0) })
    }

    /// Has the event wait for all that is on the stream now.
    pub(super) fn record(&self, event: CudaEvent, stream: Stream) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: both exist for as long as their owners keep them.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.0, stream.0) })
    }

    /// Whether all that an event was recorded behind has ended. Never waits.
    pub(super) fn is_done(&self, event: CudaEvent) -> Result<bool, CudaError> {
        self.bind()?;
        // SAFETY: the event exists for as long as its owner keeps it.
        let status = unsafe { sys::cuEventQuery(event.0) };
        if status as u32 == sys::CUresult::CUDA_ERROR_NOT_READY as u32 {
            return Ok(false);
        }
        check("cuEventQuery", status).map(|()| true)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `retain`. A device that is lost has nothing left to release.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A stream of a [`Context`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream(sys::CUstream);

/// An event of a [`Context`].
#[derive(Debug, Clone, Copy)]
pub(super) struct CudaEvent(sys::CUevent);

// SAFETY: streams and events belong to the process and not to a thread; the driver locks them itself.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Send for CudaEvent {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: as above.
unsafe impl Sync for CudaEvent {}

/// An address, and whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Host(u64),
    Device(u64),
}
