"""What tests of buffers in GPU memory run on: the stand-in for libcuda, or with PD_TEST_GPU=1 the machine's own GPU."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pd_backend.cuda import Device, driver

TOP = Path(__file__).resolve().parents[2]
REAL = os.environ.get("PD_TEST_GPU") == "1"

stand_in_only = pytest.mark.skipif(
    REAL, reason="injects faults, or counts, in the stand-in for libcuda: run without PD_TEST_GPU to see it"
)


@dataclass(frozen=True)
class Counts:
    """What all processes on the stand-in have done."""

    host_to_device: int
    host_to_device_bytes: int
    device_to_host: int
    device_to_host_bytes: int
    device_to_device: int
    device_to_device_bytes: int
    peer_to_peer: int
    peer_to_peer_bytes: int
    #: Uses of the driver that corrupt memory on a GPU.
    violations: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))


@cache
def stand_in() -> Path:
    """Loads the stand-in into this process and returns the folder of its state, the same for the whole run."""
    library = TOP / "target" / "fake_cuda"
    subprocess.run([TOP / "tests" / "fake_cuda" / "build", library], check=True)
    # A process that a test starts shares the test's GPU.
    given = os.environ.get("PD_FAKE_CUDA_DIR")
    state = Path(given or tempfile.mkdtemp(prefix="pd-fake-cuda-"))
    if not given:
        atexit.register(shutil.rmtree, state, ignore_errors=True)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ.update(PD_FAKE_CUDA_DIR=str(state), PD_FAKE_CUDA_DEVICES="2")
    # Later a look for libcuda.so.1 finds the one that is loaded already.
    ctypes.CDLL(str(library / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    return state


def environment(**more: str) -> dict[str, str]:
    """What makes a daemon see the same GPU as this process."""
    if REAL:
        return more
    library = str(TOP / "target" / "fake_cuda")
    return {"LD_LIBRARY_PATH": library, "PD_FAKE_CUDA_DIR": str(stand_in()), "PD_FAKE_CUDA_DEVICES": "2"} | more


def gpu(ordinal: int = 0) -> Device:
    """The GPU that tests run on."""
    if not REAL:
        stand_in()
    uuids = driver().uuids()
    if ordinal >= len(uuids):
        pytest.skip(f"needs {ordinal + 1} GPUs, here are {len(uuids)}: run without PD_TEST_GPU for the stand-in's")
    return Device.of_uuid(uuids[ordinal])


def counts() -> Counts:
    """Since the run began."""
    numbers = (ctypes.c_uint64 * 9)()
    driver().call("fakeCudaCounts", numbers)
    return Counts(*numbers)


class Engine:
    """Fills and reads slots as an engine does: on a stream that is busy, without ever waiting for it."""

    #: Some milliseconds of work, on either kind of GPU.
    BUSY_COUNT, BUSY_BYTES = (40, 1 << 28) if REAL else (40, 1024)

    def __init__(self, device: Device, len_bytes: int) -> None:
        self._device = device
        self._len_bytes = len_bytes
        self._addresses: list[int] = []
        self.stream = device.stream()
        self.memory = self._allocate(len_bytes)
        self._busy = self._allocate(self.BUSY_BYTES)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        with self._device.current() as cuda:
            cuda.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
            for address in self._addresses:
                cuda.call("cuMemFree_v2", ctypes.c_uint64(address))

    def put(self, data: np.ndarray) -> None:
        """Places bytes in the engine's own memory, and waits."""
        assert len(data) <= self._len_bytes
        source = np.ascontiguousarray(data)
        self._device.write(self.memory, source.ctypes.data, len(source))

    def take(self, len_bytes: int) -> np.ndarray:
        """Bytes of the engine's own memory, once its stream has done everything."""
        with self._device.current() as cuda:
            cuda.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
        out = np.empty(len_bytes, dtype=np.uint8)
        self._device.read(self.memory, out.ctypes.data, len_bytes)
        return out

    def be_busy(self) -> None:
        """Gives the stream some milliseconds of work."""
        with self._device.current() as cuda:
            for _ in range(self.BUSY_COUNT):
                cuda.call(
                    "cuMemsetD8Async",
                    ctypes.c_uint64(self._busy),
                    ctypes.c_ubyte(0),
                    ctypes.c_size_t(self.BUSY_BYTES),
                    ctypes.c_void_p(self.stream),
                )

    def gather(self, view) -> None:
        """Puts a copy of the engine's memory into a slot on the stream."""
        self._copy(view.address, self.memory, len(view))

    def scatter(self, view) -> None:
        """Puts a copy of a slot into the engine's memory on the stream."""
        self._copy(self.memory, view.address, len(view))

    def _copy(self, to: int, source: int, len_bytes: int) -> None:
        with self._device.current() as cuda:
            cuda.call(
                "cuMemcpyDtoDAsync_v2",
                ctypes.c_uint64(to),
                ctypes.c_uint64(source),
                ctypes.c_size_t(len_bytes),
                ctypes.c_void_p(self.stream),
            )

    def _allocate(self, len_bytes: int) -> int:
        address = ctypes.c_uint64()
        with self._device.current() as cuda:
            cuda.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(len_bytes))
        self._addresses.append(address.value)
        return address.value
