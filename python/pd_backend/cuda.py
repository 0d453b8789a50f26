"""The CUDA driver's library through ctypes: what a client of a buffer in GPU memory needs, and no more.

A call works in the context that is current on its thread. Everything here makes the primary context of its device
current, which is the one that torch uses, and puts back what was current before.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import CudaError

_NOT_READY = 600
_LAZY_PEER_ACCESS = 1
_DISABLE_TIMING, _INTERPROCESS = 2, 4
_NON_BLOCKING = 1
#: Bytes of an IPC handle, of memory as of an event.
HANDLE_LEN_BYTES = 64


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * HANDLE_LEN_BYTES)]


class Driver:
    """The loaded library, initialised. One a process: `driver()`."""

    def __init__(self) -> None:
        """Raises `CudaError` when there is no driver, or it does not work."""
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(
                f"no CUDA driver in this process: {error}; the daemon's pd_buffer is in GPU memory"
            ) from error
        self.call("cuInit", 0)

    def status(self, name: str, *args: Any) -> int:
        """Calls a function of the driver; its status. Raises `CudaError` when the driver has no such function."""
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise CudaError(f"the CUDA driver has no {name}: it is too old") from None
        return int(function(*args))

    def call(self, name: str, *args: Any) -> None:
        """Calls a function of the driver. Raises `CudaError` with the name of any status but success."""
        status = self.status(name, *args)
        if status != 0:
            raise CudaError(f"{name}: {self._name_of(status)}")

    def _name_of(self, status: int) -> str:
        name = ctypes.c_char_p()
        found = self._library.cuGetErrorName(status, ctypes.byref(name))
        return name.value.decode() if found == 0 and name.value else f"error {status}"

    def uuids(self) -> list[str]:
        """Of the GPUs that this process sees, by its numbers for them, as `nvidia-smi -L` writes them."""
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return [self._uuid(ordinal) for ordinal in range(count.value)]

    def _uuid(self, ordinal: int) -> str:
        raw = (ctypes.c_ubyte * 16)()
        self.call("cuDeviceGetUuid_v2", raw, ctypes.c_int(ordinal))
        digits = bytes(raw).hex()
        return "-".join(["GPU", digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]])


@functools.cache
def driver() -> Driver:
    """This process's. Raises `CudaError` without one."""
    return Driver()


class Device:
    """A GPU of this process, with its primary context."""

    def __init__(self, ordinal: int) -> None:
        """Raises `CudaError`."""
        self.ordinal = ordinal
        self._driver = driver()
        self._context = ctypes.c_void_p()
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ctypes.c_int(ordinal))

    @staticmethod
    @functools.cache
    def of_uuid(uuid: str) -> Device:
        """The GPU of that UUID, whatever its number here. Raises `CudaError` when this process does not see it."""
        seen = driver().uuids()
        if uuid not in seen:
            names = ", ".join(seen) or "none"
            raise CudaError(
                f"the pd_buffer is on {uuid}, and this process sees {names}; let CUDA_VISIBLE_DEVICES name it here as "
                "well"
            )
        return Device(seen.index(uuid))

    @contextmanager
    def current(self) -> Iterator[Driver]:
        """Makes its context current on this thread."""
        before = ctypes.c_void_p()
        self._driver.call("cuCtxGetCurrent", ctypes.byref(before))
        if before.value == self._context.value:
            yield self._driver
            return
        self._driver.call("cuCtxSetCurrent", self._context)
        try:
            yield self._driver
        finally:
            self._driver.call("cuCtxSetCurrent", before)

    def memory_info(self) -> tuple[int, int]:
        """Bytes of its memory that are free, and that it has."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self.current() as cuda:
            cuda.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def synchronize(self) -> None:
        """Waits for everything that this process has put on the device."""
        with self.current() as cuda:
            cuda.call("cuCtxSynchronize")

    def open(self, ipc_handle: str) -> int:
        """Opens another process's allocation; its address. Raises `CudaError`."""
        address = ctypes.c_uint64()
        with self.current() as cuda:
            handle = _Handle.from_buffer_copy(bytes.fromhex(ipc_handle))
            cuda.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        """Closes what `open` opened."""
        with self.current() as cuda:
            cuda.call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def read(self, address: int, out: Any, len_bytes: int) -> None:
        """Copies device memory to host memory, and waits."""
        with self.current() as cuda:
            cuda.call("cuMemcpyDtoH_v2", ctypes.c_void_p(out), ctypes.c_uint64(address), ctypes.c_size_t(len_bytes))

    def write(self, address: int, source: Any, len_bytes: int) -> None:
        """Copies host memory to device memory, and waits until it is there."""
        with self.current() as cuda:
            cuda.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(source), ctypes.c_size_t(len_bytes))
            # The copy may return when the bytes are taken.
            cuda.call("cuStreamSynchronize", None)

    def stream(self) -> int:
        """A stream of its own, beside the others: for those who have no torch. It lives as long as the process."""
        stream = ctypes.c_void_p()
        with self.current() as cuda:
            cuda.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        return stream.value or 0


class Event:
    """An event that other processes can ask for: what a stream has yet to do."""

    def __init__(self, device: Device) -> None:
        """Raises `CudaError`."""
        self._device = device
        self._event = ctypes.c_void_p()
        handle = _Handle()
        with device.current() as cuda:
            flags = ctypes.c_uint(_DISABLE_TIMING | _INTERPROCESS)
            cuda.call("cuEventCreate", ctypes.byref(self._event), flags)
            cuda.call("cuIpcGetEventHandle", ctypes.byref(handle), self._event)
        #: What the daemon opens it by.
        self.handle = bytes(handle.bytes).hex()

    def record(self, stream: int) -> None:
        """Has it stand for everything that is on the stream now. 0 is the legacy default stream."""
        with self._device.current() as cuda:
            cuda.call("cuEventRecord", self._event, ctypes.c_void_p(stream))

    def is_done(self) -> bool:
        """Whether the GPU has passed it. Never waits."""
        with self._device.current() as cuda:
            status = cuda.status("cuEventQuery", self._event)
            if status == _NOT_READY:
                return False
            if status != 0:
                raise CudaError(f"cuEventQuery: {cuda._name_of(status)}")
            return True

    def close(self) -> None:
        """Destroys it."""
        with self._device.current() as cuda:
            cuda.call("cuEventDestroy_v2", self._event)


def current_stream(ordinal: int) -> int:
    """The stream that torch is using on that device, in a process that has torch; the legacy default stream otherwise.

    The legacy default stream waits for all blocking streams. torch's own other streams are none.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.current_stream(ordinal).cuda_stream)
