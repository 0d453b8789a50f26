"""What scripts/gpu-check runs and measures; prints the report. A ratio is of two things measured by turns."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gpu
from pd_backend import Daemon, DaemonGone, PeerAddress, ReceiverClient, SenderClient, find_binary
from pd_backend.cuda import Device, driver

TOP = Path(__file__).resolve().parents[2]
MIB = 1 << 20
#: Targets: of a copy on the device in the same run, and in ZeroMQ round trips.
COPY_TARGET, TRIPS_TARGET, KERNEL_TARGET = 0.9, 3.0, 0.7


class Report:
    """Lines of markdown, and whether everything that must hold does."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed: list[str] = []

    def say(self, line: str = "") -> None:
        self.lines.append(line)
        print(f"gpu-check: {line}" if line else "", file=sys.stderr, flush=True)

    def must(self, what: str, holds: bool, detail: str) -> None:
        self.say(f"- {what}: {'ok' if holds else '**FAILED**'}, {detail}")
        if not holds:
            self.failed.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stand-in", action="store_true", help="without a GPU: shows that the script works, no more")
    parser.add_argument("--no-tests", action="store_true", help="restarts and measurements alone")
    options = parser.parse_args()
    report = Report()
    device = gpu.gpu()
    head(report, device, options.stand_in)
    if not options.no_tests:
        tests(report)
    restarts(report, device, rounds=2 if options.stand_in else 10)
    report.say("\n### Measured\n")
    report.say("| what | measured | yardstick | ratio | target |")
    report.say("|---|---|---|---|---|")
    engine(report)
    transfers(report, device, options.stand_in)
    latency(report, options.stand_in)
    kernels(report, device)
    print("\n".join(report.lines))
    if report.failed:
        print(f"gpu-check: FAILED: {', '.join(report.failed)}", file=sys.stderr)
    return 1 if report.failed else 0


def head(report: Report, device: Device, stand_in: bool) -> None:
    name = ctypes.create_string_buffer(128)
    version = ctypes.c_int()
    driver().call("cuDeviceGetName", name, ctypes.c_int(len(name)), ctypes.c_int(device.ordinal))
    driver().call("cuDriverGetVersion", ctypes.byref(version))
    commit = subprocess.run(
        ["git", "-C", TOP, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report.say(f"## {datetime.date.today().isoformat()}: {name.value.decode()}")
    report.say()
    if stand_in:
        report.say("**On the stand-in for libcuda: this shows that the script works. No figure below means anything.**")
        report.say()
    count = len(driver().uuids())
    total = device.memory_info()[1] / (1 << 30)
    report.say(
        f"`scripts/gpu-check`, commit {commit or 'unknown'}; {count} GPUs, {total:.1f} GiB on this one, driver API "
        f"{version.value // 1000}.{version.value % 1000 // 10}, {os.cpu_count()} CPUs."
    )
    report.say()


def tests(report: Report) -> None:
    """The trait suite and the connector's tests, on this GPU."""
    program = os.environ.get("PD_ENGINES_TEST")
    if program:
        ended = subprocess.run([program, "gpu", "--test-threads=2"], capture_output=True, text=True, check=False)
        counts = re.findall(r"(\d+) passed; (\d+) failed", ended.stdout)
        # nextest and libtest differ; what is missing is a failure of this script and not a pass.
        passed, failed = map(sum, zip(*[(int(a), int(b)) for a, b in counts])) if counts else (0, 1)
        what = "engines through the trait, in two processes"
        report.must(what, failed == 0 and passed > 0, f"{passed} passed, {failed} failed")
        if failed:
            print(ended.stdout[-6000:], file=sys.stderr)
    else:
        report.say("- engines through the trait: not run (PD_ENGINES_TEST names no test program)")
    files = [TOP / "python" / "tests" / name for name in ("test_cuda.py", "test_paged_cuda.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP)
    summary = ended.stdout.strip().splitlines()[-1] if ended.stdout.strip() else "no output"
    report.must("connector and kernels, in Python", ended.returncode == 0, summary)
    skipped = [line for line in ended.stdout.splitlines() if line.startswith("SKIPPED")]
    for line in skipped:
        report.say(f"  - {line}")
    if ended.returncode != 0:
        print(ended.stdout[-6000:], ended.stderr[-2000:], file=sys.stderr)


@contextmanager
def daemons(chunk_bytes: int, slots: int) -> Iterator[tuple[Daemon, Daemon]]:
    """A pd-receiver and a pd-sender with buffers on the GPU, over `local`."""
    layout = {
        "model": "gpu-check",
        "dtype": "uint8",
        "layers": 1,
        "kv_heads": 1,
        "head_size": chunk_bytes // 32,
        "kv_planes": 2,
        "chunk_tokens": 16,
        "tp_rank": 0,
        "tp_size": 1,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(layout, file)
        file.flush()
        arguments = ["--config", str(TOP / "configs" / "loopback.yaml"), "--kv-layout", file.name]
        for key in ("transfer_channel=local", "pd_buffer_device=cuda:0", f"pd_buffer_size={slots * chunk_bytes}"):
            arguments += ["--set", key]
        start = lambda role: Daemon(find_binary(f"pd-{role}"), arguments, env=gpu.environment())  # noqa: E731
        with start("receiver") as decode, start("sender") as prefill:
            yield prefill, decode


def address_of(decode: Daemon) -> PeerAddress:
    assert decode.ready.init_port and decode.ready.alloc_port
    return PeerAddress("127.0.0.1", decode.ready.init_port, decode.ready.alloc_port)


def ship(sender: SenderClient, receiver: ReceiverClient, to: PeerAddress, name: str, chunks: int) -> tuple[float, int]:
    """A request; seconds from `send` to `sent`, and the daemon's own microseconds of writing."""
    sender.open(name, [f"{name}-{index}" for index in range(chunks)], last_chunk_tokens=16, receiver=to)
    slots = sender.stage(name, range(chunks))
    started = time.perf_counter()
    sender.send(name, slots, last=True)
    sent = sender.wait_sent(name, 60)
    took = time.perf_counter() - started
    with receiver.wait(name, wait_s=60):
        pass
    return took, sent.timings.transfer_us


def restarts(report: Report, device: Device, rounds: int) -> None:
    """Kills daemons and clients' daemons in turn; the GPU has to have the memory that it had."""
    chunk_bytes = MIB if gpu.REAL else 64 * 1024
    with daemons(chunk_bytes, 4) as (prefill, decode):
        pass  # What the first use of a device costs stays.
    before = device.memory_info()[0]
    for round in range(rounds):
        with daemons(chunk_bytes, 64) as (prefill, decode):
            with SenderClient(prefill.ready.connector) as sender, ReceiverClient(decode.ready.connector) as receiver:
                ship(sender, receiver, address_of(decode), f"r{round}", 16)
                for daemon, client in [(decode, receiver), (prefill, sender)][:: 1 if round % 2 else -1]:
                    daemon.kill()
                    try:
                        while True:
                            client.poll_events()
                    except DaemonGone:
                        pass
    deadline = time.monotonic() + 20
    while (after := device.memory_info()[0]) < before and time.monotonic() < deadline:
        time.sleep(0.1)
    report.must(
        f"{rounds} pairs killed in turn leave no GPU memory taken",
        after >= before,
        f"{before} bytes free before, {after} after",
    )


def copy_seconds(device: Device, source: int, target: int, chunk_bytes: int, chunks: int, stream: int) -> float:
    """The same bytes in as many copies on the device, in this process."""
    started = time.perf_counter()
    with device.current() as cuda:
        for index in range(chunks):
            cuda.call(
                "cuMemcpyDtoDAsync_v2",
                ctypes.c_uint64(target + index * chunk_bytes),
                ctypes.c_uint64(source + index * chunk_bytes),
                ctypes.c_size_t(chunk_bytes),
                ctypes.c_void_p(stream),
            )
        cuda.call("cuStreamSynchronize", ctypes.c_void_p(stream))
    return time.perf_counter() - started


@contextmanager
def two_buffers(device: Device, len_bytes: int) -> Iterator[tuple[int, int]]:
    """Two allocations of this process."""
    addresses = []
    with device.current() as cuda:
        for _ in range(2):
            address = ctypes.c_uint64()
            cuda.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(len_bytes))
            addresses.append(address.value)
    try:
        yield addresses[0], addresses[1]
    finally:
        with device.current() as cuda:
            for one in addresses:
                cuda.call("cuMemFree_v2", ctypes.c_uint64(one))


def engine(report: Report) -> None:
    """The engine alone, through the trait: writes into another process's buffer against copies inside one process."""
    program = os.environ.get("PD_ENGINES_TEST")
    if not program:
        report.say("| engine `local` alone | not measured: PD_ENGINES_TEST names no test program | | | |")
        return
    with tempfile.NamedTemporaryFile("r") as file:
        command = [program, "--ignored", "--exact", "measured::gpu_writes_against_copies"]
        ended = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PD_TEST_REPORT": file.name}, check=False
        )
        lines = file.read().splitlines()
    if ended.returncode != 0 or not lines:
        report.must("measuring the engine", False, ended.stdout.strip()[-300:])
    for line in lines:
        seen = json.loads(line)
        counts = seen["chunk_bytes"] >= 2 * MIB
        target = verdict(seen["of_copy"] >= COPY_TARGET, f"at least {COPY_TARGET}") if counts else "none"
        report.say(
            f"| engine `local`, two processes, {seen['chunks']} chunks of {seen['chunk_bytes'] // 1024} KiB in one "
            f"transfer, {seen['rounds']} rounds | {seen['gb_per_s']:.1f} GB/s | "
            f"{seen['gb_per_s'] / seen['of_copy']:.1f} GB/s (cuMemcpyDtoDAsync, one process) | {seen['of_copy']:.2f}, least {seen['least_of_copy']:.2f} | {target} |"
        )


def transfers(report: Report, device: Device, stand_in: bool) -> None:
    """Whole requests over `local`, one at a time, against copies of the same bytes in one process."""
    shapes = [(64 * 1024, 4), (256 * 1024, 2)]
    if not stand_in:
        shapes = [(256 * 1024, 1024), (2 * MIB, 512), (8 * MIB, 256), (32 * MIB, 128)]
    rounds = 3 if stand_in else 15
    stream = device.stream()
    for chunk_bytes, chunks in shapes:
        whole_bytes = chunk_bytes * chunks
        with (
            two_buffers(device, whole_bytes) as (source, target),
            daemons(chunk_bytes, chunks) as (prefill, decode),
            SenderClient(prefill.ready.connector) as sender,
            ReceiverClient(decode.ready.connector) as receiver,
        ):
            ratios, rates, writes = [], [], []
            for round in range(rounds + 2):
                copied = copy_seconds(device, source, target, chunk_bytes, chunks, stream)
                took, write_us = ship(sender, receiver, address_of(decode), f"{chunk_bytes}-{round}", chunks)
                if round >= 2:
                    ratios.append(copied / took)
                    rates.append(whole_bytes / took / 1e9)
                    writes.append(copied / (write_us / 1e6) if write_us else 0.0)
        ratio = statistics.median(ratios)
        report.say(
            f"| one request, {chunks} chunks of {chunk_bytes // 1024} KiB, `send` to `sent` | "
            f"{statistics.median(rates):.1f} GB/s | "
            f"{statistics.median(rates) / ratio:.1f} GB/s (cuMemcpyDtoDAsync, one process) | {ratio:.2f} (writing "
            f"alone {statistics.median(writes):.2f}) | none: the messages are in it |"
        )


def latency(report: Report, stand_in: bool) -> None:
    """One small chunk, in round trips of the same run."""
    command = [find_binary("pd-bench"), "latency", "--engine", "local", "--set", "pd_buffer_device=cuda:0", "--json"]
    command += ["--bin-dir", os.fspath(find_binary("pd-bench").parent), "--samples", "20" if stand_in else "500"]
    command += ["--config", str(TOP / "configs" / "loopback.yaml")]
    environment = {**os.environ, **gpu.environment()}
    trips, sent, trip = [], [], []
    for _ in range(1 if stand_in else 5):
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if ended.returncode != 0:
            report.must("pd-bench latency with GPU buffers", False, ended.stderr.strip()[-300:])
            return
        result = json.loads(ended.stdout)
        trips.append(result["send_to_sent_round_trips"])
        sent.append(result["send_to_sent_ms"]["p50"])
        trip.append(result["round_trip_ms"]["p50"])
    ratio = statistics.median(trips)
    report.say(
        f"| one chunk of 64 KiB, `send` to `sent`, medians of {len(trips)} runs | {statistics.median(sent):.3f} ms | "
        f"{statistics.median(trip):.3f} ms (one ZeroMQ round trip) | {ratio:.2f} | "
        f"{verdict(ratio <= TRIPS_TARGET, f'at most {TRIPS_TARGET:.0f}')} |"
    )


def kernels(report: Report, device: Device) -> None:
    """Gather and scatter of a chunk of 256 tokens over 32 layers against a copy of the same bytes."""
    try:
        import torch

        from pd_backend import paged_cuda
    except ImportError as error:
        report.say(f"| gather, scatter | not measured: {error}; install torch and Triton for PYTHON | | | |")
        return
    if not torch.cuda.is_available():
        report.say("| gather, scatter | not measured: torch sees no GPU | | | |")
        return
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Shape:
        block_stride_bytes: int
        inner: tuple[tuple[int, int], ...]

    layers, blocks, block_tokens, on = 32, 16, 16, f"cuda:{device.ordinal}"
    token_bytes = 2 * 8 * 128 * 2  # Keys and values of 8 heads of 128 elements of bfloat16.
    block_bytes, pool = block_tokens * token_bytes, 4096
    packed = torch.empty((layers, pool, block_bytes), dtype=torch.uint8, device=on)
    apart = [torch.empty((2, pool, block_bytes // 2), dtype=torch.uint8, device=on) for _ in range(layers)]
    half = Shape(block_bytes // 2, ((2, pool * block_bytes // 2), (block_bytes // 2, 1)))
    whole = Shape(block_bytes, ((block_bytes, 1),))
    chunk_bytes = layers * blocks * block_bytes
    slots = torch.empty((8, chunk_bytes), dtype=torch.uint8, device=on)
    other = torch.empty_like(slots)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randperm(pool, generator=generator)[:blocks].tolist() for _ in range(len(slots))]

    def seconds(work) -> float:
        """On the GPU alone: what Python takes to launch is hidden behind a sleep of the stream."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(50_000_000)
        begin.record()
        for index in range(len(slots)):
            work(index)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def called(work) -> float:
        """As an engine's thread sees it, launches and all."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(len(slots)):
            work(index)
        return (time.perf_counter() - started) / len(slots)

    for name, tensors, shape in [("K and V packed", list(packed), whole), ("`[2, blocks, ...]`", apart, half)]:
        copies = paged_cuda.CudaCopies(tensors, [shape] * layers, pool)
        for what, work in [("gather", copies.gather), ("scatter", copies.scatter)]:
            ratios, rates, calls = [], [], []

            def move(index, work=work):
                work(ids[index], slots[index], range(layers), 0, blocks)

            for round in range(23):
                copied = seconds(lambda index: other[index].copy_(slots[index]))
                took = seconds(move)
                calls.append(called(move))
                if round >= 3:
                    ratios.append(copied / took)
                    rates.append(chunk_bytes * len(slots) / took / 1e9)
            ratio = statistics.median(ratios)
            report.say(
                f"| {what}, {chunk_bytes // MIB} MiB a chunk in one launch ({statistics.median(calls) * 1e6:.0f} us of "
                f"the caller), 32 layers, {name} | {statistics.median(rates):.1f} GB/s | "
                f"{statistics.median(rates) / ratio:.1f} GB/s (copy on the device) | {ratio:.2f} | "
                f"{verdict(ratio >= KERNEL_TARGET, f'at least {KERNEL_TARGET}')} |"
            )


def verdict(reached: bool, target: str) -> str:
    return f"{target}: {'reached' if reached else '**missed**'}"


if __name__ == "__main__":
    sys.exit(main())
