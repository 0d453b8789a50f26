"""The daemon's pd_buffer in this process, as numpy arrays that share its memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

import numpy as np

from .errors import MappingError
from .messages import HostBuffer, ReadyChunk, StagedSlot


_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
# Some milliseconds at a time: whoever else wants to map memory in this process waits for one of them.
_POPULATED_LEN_BYTES = 8 << 20

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PdBuffer:
    """A mapping of a daemon's buffer. Views are one-dimensional uint8 arrays; nothing is copied.

    The memory behind a view lives as long as the view, even after `close` and after the daemon's death; what it holds
    then means nothing. A view of a slot is the caller's to write from `staged` until its bytes are sent, and to read
    while the lease is held: the mapping cannot enforce that.
    """

    def __init__(self, handle: HostBuffer, *, writable: bool) -> None:
        """Maps `/proc/<pid>/fd/<fd>` after checking that it still is the file that the daemon meant.

        Raises `MappingError` when it cannot be opened, is another file, or is shorter than announced.
        """
        self.len_bytes = handle.len_bytes
        self.writable = writable
        self._present_bytes = handle.present_bytes
        self._bytes: np.ndarray | None = _map(handle, writable)

    def view(self, chunk: StagedSlot | ReadyChunk) -> np.ndarray:
        """The bytes of a staged slot or a ready chunk, without copying; those of a ready chunk are read-only.

        Raises `MappingError` when it lies outside of the buffer.
        """
        view = self.range(chunk.offset_bytes, chunk.len_bytes)
        if isinstance(chunk, ReadyChunk):
            view.flags.writeable = False
        return view

    def range(self, offset_bytes: int, len_bytes: int) -> np.ndarray:
        """Bytes of the buffer, without copying. Raises `MappingError` when they lie outside of it, or after `close`."""
        if self._bytes is None:
            raise MappingError("the buffer was closed")
        if offset_bytes < 0 or len_bytes < 0 or offset_bytes + len_bytes > self.len_bytes:
            raise MappingError(
                f"{len_bytes} bytes at {offset_bytes} lie outside of the buffer of {self.len_bytes} bytes"
            )
        return self._bytes[offset_bytes : offset_bytes + len_bytes]

    def populate(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Maps every page that is there already, so that the first copy of each slot takes no page faults, for as long as
        it is `wanted`. Others of this process run meanwhile, and it may be called from another thread than the client's.
        """
        # No other pages: a buffer that grows does not have them yet.
        array = self._bytes
        advice = _MADV_POPULATE_WRITE if self.writable else _MADV_POPULATE_READ
        for start in range(0, self._present_bytes, _POPULATED_LEN_BYTES):
            if array is None or not wanted():
                return
            len_bytes = min(_POPULATED_LEN_BYTES, self._present_bytes - start)
            # Unlike `mmap.madvise`, a foreign function runs without Python's lock.
            if _libc.madvise(array.ctypes.data + start, len_bytes, advice) != 0:
                return  # Linux before 5.14: the pages come when they are touched.

    def close(self) -> None:
        """Gives the mapping up; the memory goes when the last view of it does. Closing twice does nothing."""
        self._bytes = None


def _map(handle: HostBuffer, writable: bool) -> np.ndarray:
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise MappingError(
            f"cannot open {path}: {error.strerror}; the daemon must run on this host, in the same pid namespace, "
            "as the same user"
        ) from error
    try:
        seen = os.fstat(fd)
        if seen.st_ino != handle.inode:
            raise MappingError(f"{path} has inode {seen.st_ino}, expected {handle.inode}: the daemon has gone")
        if seen.st_size < handle.len_bytes:
            raise MappingError(f"{path} has {seen.st_size} bytes, expected {handle.len_bytes}")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            mapping = mmap.mmap(fd, handle.len_bytes, mmap.MAP_SHARED, access)
        except (OSError, ValueError) as error:
            raise MappingError(f"cannot map {handle.len_bytes} bytes of {path}: {error}") from error
    finally:
        os.close(fd)
    return np.frombuffer(mapping, dtype=np.uint8)
