"""The daemon's pd_buffer in a GPU's memory, opened in this process. Nothing passes through the host."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from .cuda import Device
from .errors import CudaError, MappingError
from .messages import DeviceBuffer, ReadyChunk, StagedSlot


class CudaBuffer:
    """A daemon's buffer in GPU memory.

    Unlike that of a buffer in host memory, a view does not keep the memory: `close` gives it back at once, because as
    long as it is open here the GPU keeps it, also when the daemon has ended. Whoever still has a view, or a tensor made
    from one, must not use it then.
    """

    def __init__(self, handle: DeviceBuffer, *, writable: bool) -> None:
        """Opens it by its IPC handle, in the primary context of the GPU of that UUID.

        Raises `MappingError` when it cannot be opened.
        """
        self.len_bytes = handle.len_bytes
        #: The caller's word: a GPU has no read-only mappings.
        self.writable = writable
        if handle.offset_bytes + handle.len_bytes > handle.allocation_bytes:
            raise MappingError(
                f"{handle.len_bytes} bytes at {handle.offset_bytes} of an allocation of {handle.allocation_bytes}"
            )
        try:
            #: The GPU, by this process's number for it.
            self.device = Device.of_uuid(handle.device)
            self._mapping: _Mapping | None = _Mapping.acquire(self.device, handle)
        except CudaError as error:
            raise MappingError(
                f"cannot open {handle.len_bytes} bytes of process {handle.pid} on {handle.device}: {error.text}; the "
                "daemon must be alive and another process, on a GPU that this process sees"
            ) from error
        self._offset_bytes = handle.offset_bytes

    def view(self, chunk: StagedSlot | ReadyChunk) -> CudaView:
        """The bytes of a staged slot or a ready chunk, without copying.

        Raises `MappingError` when it lies outside of the buffer.
        """
        return self.range(chunk.offset_bytes, chunk.len_bytes)

    def range(self, offset_bytes: int, len_bytes: int) -> CudaView:
        """Bytes of the buffer, without copying. Raises `MappingError` when they lie outside of it, or after `close`."""
        self.address()
        if offset_bytes < 0 or len_bytes < 0 or offset_bytes + len_bytes > self.len_bytes:
            raise MappingError(
                f"{len_bytes} bytes at {offset_bytes} lie outside of the buffer of {self.len_bytes} bytes"
            )
        return CudaView(self, offset_bytes, len_bytes)

    def address(self) -> int:
        """Where it starts on the device. Raises `MappingError` after `close`."""
        if self._mapping is None:
            raise MappingError("the buffer was closed: its GPU memory may be another's by now")
        return self._mapping.address + self._offset_bytes

    def finish(self) -> None:
        """Waits for everything that this process has put on the device: what it does to the buffer is then done."""
        self.device.synchronize()

    def close(self) -> None:
        """Gives the memory up, once the device has done what this process asked of it. Closing twice does nothing."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.release()


class CudaView:
    """Bytes of a buffer on a GPU, for whoever understands `__cuda_array_interface__`: torch, cupy, numba."""

    def __init__(self, buffer: CudaBuffer, offset_bytes: int, len_bytes: int) -> None:
        self._buffer = buffer
        self._offset_bytes = offset_bytes
        self._len_bytes = len_bytes

    def __len__(self) -> int:
        return self._len_bytes

    @property
    def address(self) -> int:
        """Where it is on the device. Raises `MappingError` once the buffer is closed."""
        return self._buffer.address() + self._offset_bytes

    @property
    def device_ordinal(self) -> int:
        """This process's number for the GPU."""
        return self._buffer.device.ordinal

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3: one-dimensional bytes; no stream, since the connector API orders what is done with them."""
        return self._interface(read_only=not self._buffer.writable)

    def part(self, offset_bytes: int, len_bytes: int) -> CudaView:
        """Some of these bytes. Raises `MappingError` when they are not among them."""
        if offset_bytes < 0 or len_bytes < 0 or offset_bytes + len_bytes > self._len_bytes:
            raise MappingError(f"{len_bytes} bytes at {offset_bytes} lie outside of a view of {self._len_bytes} bytes")
        return CudaView(self._buffer, self._offset_bytes + offset_bytes, len_bytes)

    def torch(self, dtype: Any = None) -> Any:
        """A torch tensor of these bytes, without copying: of uint8, or reinterpreted as `dtype`.

        The tensor does not keep the memory: use it before the slot is sent, or the lease released. That of a receiver
        is to be read; torch knows no read-only tensors.
        """
        import torch

        tensor = torch.as_tensor(_Exposed(self._interface(read_only=False)), device=f"cuda:{self.device_ordinal}")
        return tensor if dtype is None else tensor.view(dtype)

    def read(self) -> np.ndarray:
        """Its bytes, copied to the host: for tests and tools."""
        out = np.empty(self._len_bytes, dtype=np.uint8)
        self._buffer.device.read(self.address, out.ctypes.data, self._len_bytes)
        return out

    def write(self, data: Any) -> None:
        """Copies bytes from the host, and waits: for tests and tools. Raises `MappingError` for another length."""
        source = np.ascontiguousarray(np.frombuffer(data, dtype=np.uint8))
        if len(source) != self._len_bytes:
            raise MappingError(f"{len(source)} bytes for a view of {self._len_bytes}")
        self._buffer.device.write(self.address, source.ctypes.data, self._len_bytes)

    def _interface(self, read_only: bool) -> dict[str, Any]:
        return {
            "shape": (self._len_bytes,),
            "typestr": "|u1",
            "data": (self.address, read_only),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class _Exposed:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


class _Mapping:
    """One opening of an allocation for this process, however many clients use it."""

    _open: dict[str, _Mapping] = {}
    _lock = threading.Lock()

    def __init__(self, device: Device, ipc_handle: str) -> None:
        self.address = device.open(ipc_handle)
        self._device = device
        self._ipc_handle = ipc_handle
        self._users = 0

    @classmethod
    def acquire(cls, device: Device, handle: DeviceBuffer) -> _Mapping:
        with cls._lock:
            mapping = cls._open.get(handle.ipc_handle)
            if mapping is None:
                mapping = cls._open[handle.ipc_handle] = cls(device, handle.ipc_handle)
            mapping._users += 1
            return mapping

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            del self._open[self._ipc_handle]
            try:
                # What still reads or writes it would end the whole process's work on the GPU.
                self._device.synchronize()
                self._device.close(self.address)
            except CudaError:
                pass  # A device that is lost has nothing left to give back.
