"""The mapping of a daemon's buffer."""

import os
import threading
import time

import numpy as np
import pytest

from fake_daemon import CHUNK_BYTES, SLOT_COUNT
from pd_backend import MappingError, PdBuffer, ReadyChunk, StagedSlot
from pd_backend.messages import HostBuffer


def mapped(daemon, writable=True):
    return PdBuffer(daemon.handle, writable=writable)


def test_views_share_the_daemons_memory(fake):
    # Broken in production: the engine fills a copy, and the daemon sends zeros.
    daemon = fake("sender")
    buffer = mapped(daemon)
    slot = StagedSlot(chunk=0, slot=2, offset_bytes=2 * CHUNK_BYTES, len_bytes=100)
    view = buffer.view(slot)
    view[:] = np.arange(100, dtype=np.uint8)
    assert os.pread(daemon.fd, 101, 2 * CHUNK_BYTES) == bytes(range(100)) + b"\0"
    os.pwrite(daemon.fd, b"back", 2 * CHUNK_BYTES)
    assert view[:4].tobytes() == b"back"


def test_a_receivers_views_cannot_be_written(fake):
    # Broken in production: a decode worker overwrites a chunk that another request is about to read.
    buffer = mapped(fake("receiver"), writable=False)
    view = buffer.view(ReadyChunk(key="k", group=0, slot=0, offset_bytes=0, len_bytes=8))
    with pytest.raises(ValueError):
        view[0] = 1
    with pytest.raises(ValueError):
        view.flags.writeable = True


def test_ranges_outside_of_the_buffer_are_refused(fake):
    # Broken in production: numpy cuts a range short without a word, and half a chunk is filled.
    buffer = mapped(fake("sender"))
    for offset, length in [(CHUNK_BYTES * SLOT_COUNT - 1, 2), (-1, 1), (0, -1), (2**63, 1)]:
        with pytest.raises(MappingError):
            buffer.range(offset, length)


def test_a_handle_that_does_not_describe_its_file_is_refused(fake):
    # Broken in production: a descriptor reused by a restarted daemon is taken for the buffer and overwritten.
    good = fake("sender").handle

    def refused(text, **changes):
        values = {name: getattr(good, name) for name in good.__struct_fields__} | changes
        with pytest.raises(MappingError, match=text):
            PdBuffer(HostBuffer(**values), writable=True)

    refused("expected 7", inode=7)
    refused("cannot open", fd=100_000)
    refused("cannot open", pid=2**22 + 1)
    refused("expected", len_bytes=good.len_bytes * 2)


def test_a_view_outlives_the_mapping_and_the_daemon(fake):
    # Broken in production: an engine that still holds a view when its client closes dies of SIGSEGV.
    daemon = fake("sender")
    buffer = mapped(daemon)
    view = buffer.range(0, CHUNK_BYTES)
    view[0] = 9
    buffer.close()
    buffer.close()
    os.ftruncate(daemon.fd, CHUNK_BYTES * SLOT_COUNT)
    assert view[0] == 9
    with pytest.raises(MappingError, match="closed"):
        buffer.range(0, 1)


def test_others_run_while_pages_are_mapped():
    # Broken in production: an engine stands still for a second while it maps a large buffer, because Python's lock is held.
    len_bytes = 512 << 20
    fd = os.memfd_create("pd-backend-test")
    try:
        os.posix_fallocate(fd, 0, len_bytes)
        handle = HostBuffer(
            pid=os.getpid(), fd=fd, len_bytes=len_bytes, inode=os.fstat(fd).st_ino, present_bytes=len_bytes
        )
        buffer = PdBuffer(handle, writable=True)
    finally:
        os.close(fd)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    other = threading.Thread(target=tick)
    other.start()
    try:
        before = ticks[0]
        buffer.populate()
        # More than fit in the moments before and after it.
        assert ticks[0] > before + 10
    finally:
        stop.set()
        other.join()
    # And it stops where nobody wants it any more.
    asked = []
    buffer.populate(lambda: len(asked) < 2 and not asked.append(None))
    assert len(asked) == 2
