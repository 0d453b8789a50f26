"""Buffers in GPU memory, in the processes that they are for. Without a GPU on the stand-in for libcuda; PD_TEST_GPU=1
runs them on the machine's own (scripts/gpu-check does)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import CHUNK_BYTES, CHUNK_TOKENS, LAYOUT, TOP, binary
from gpu import REAL, Engine, counts, environment, gpu, stand_in, stand_in_only
from pd_backend import (
    CudaBuffer,
    DaemonGone,
    DaemonStartError,
    MappingError,
    RequestFailed,
    RequestRefused,
    SenderClient,
    SendPart,
)
from pd_backend import messages as m
from test_end_to_end import content, eventually, keys_of, open_request
from waiting import PATIENCE_S

GPU = ("pd_buffer_device=cuda:0",)
HOST = ("pd_buffer_device=cpu",)


@pytest.fixture(autouse=True)
def nothing_is_closed_under_a_copy():
    """Broken in production: a peer's memory is closed while the GPU writes it, and every context on it dies."""
    gpu()
    before = None if REAL else counts().violations
    yield
    assert REAL or counts().violations == before


@pytest.fixture
def start_gpu_pair(start_pair):
    """Pairs whose buffers are in GPU memory, unless said otherwise."""

    def start(sender_sets=GPU, receiver_sets=GPU, **more):
        gpu()
        more.setdefault("env", environment())
        return start_pair("local", sender_sets=sender_sets, receiver_sets=receiver_sets, **more)

    return start


def write_chunk(view, data):
    if isinstance(view, np.ndarray):
        view[:] = data
    else:
        view.write(data)


def read_chunk(view):
    return view.copy() if isinstance(view, np.ndarray) else view.read()


def stage(pair, name, data):
    open_request(pair, name, len(data), len(data[-1]) * CHUNK_TOKENS // CHUNK_BYTES)
    slots = pair.sender.stage(name, range(len(data)))
    for slot in slots:
        write_chunk(pair.sender.view(slot), data[slot.chunk])
    return slots


def check_chunks(pair, name, data):
    with pair.receiver.wait(name, wait_s=30) as lease:
        for index, expected in enumerate(data):
            seen = read_chunk(lease.view(index))
            assert np.array_equal(seen, expected), f"chunk {index} differs at {np.flatnonzero(seen != expected)[:1]}"


def ship(pair, name, data):
    """A whole request, every byte checked."""
    pair.sender.send(name, stage(pair, name, data), last=True)
    assert pair.sender.wait_sent(name, 30).bytes == sum(map(len, data))
    check_chunks(pair, name, data)


@pytest.mark.parametrize("receiver_sets", [GPU, HOST], ids=["to gpu", "to host"])
@pytest.mark.parametrize("sender_sets", [GPU, HOST], ids=["gpu", "host"])
def test_chunks_arrive_whatever_memory_either_end_has(start_gpu_pair, sender_sets, receiver_sets):
    # Broken in production: a prefill worker with its buffer on a GPU cannot serve a decode worker with one in host
    # memory.
    pair = start_gpu_pair(sender_sets, receiver_sets)
    for round in range(3):
        ship(pair, f"r{round}", content(round, 5, 7))


@stand_in_only
def test_the_bytes_never_touch_the_host(start_gpu_pair):
    # Broken in production: the KV cache takes a detour through host memory that nobody sees but in the latency.
    pair = start_gpu_pair()
    data = content(1, 4, CHUNK_TOKENS)
    slots = stage(pair, "r", data)
    before = counts()
    pair.sender.send("r", slots, last=True)
    pair.sender.wait_sent("r", 30)
    done = counts() - before
    assert (done.host_to_device, done.device_to_host) == (0, 0)
    assert done.device_to_device_bytes == 4 * CHUNK_BYTES
    check_chunks(pair, "r", data)


def test_a_slot_is_not_read_while_the_engine_still_writes_it(start_gpu_pair):
    # Broken in production: the decode worker gets what was in the slot before, and success is reported.
    pair = start_gpu_pair()
    with Engine(gpu(), CHUNK_BYTES) as engine:
        pair.sender.order_by(engine.stream)
        for round in range(5):
            data = content(round, 1, CHUNK_TOKENS)
            name = f"r{round}"
            slot = stage(pair, name, [np.zeros(CHUNK_BYTES, dtype=np.uint8)])[0]
            engine.put(data[0])
            engine.be_busy()
            engine.gather(pair.sender.view(slot))
            pair.sender.send(name, [slot], last=True)
            pair.sender.wait_sent(name, 30)
            check_chunks(pair, name, data)


def test_many_sends_wait_for_one_stream(start_gpu_pair):
    # Broken in production: pushing layer by layer, what waits behind the first some dozen sends is never written.
    pair = start_gpu_pair()
    part_bytes = CHUNK_BYTES // 128
    with Engine(gpu(), CHUNK_BYTES) as engine:
        pair.sender.order_by(engine.stream)
        data = content(1, 2, CHUNK_TOKENS)
        slots = stage(pair, "r", [np.zeros(CHUNK_BYTES, dtype=np.uint8)] * 2)
        engine.put(data[0])
        engine.be_busy()
        engine.gather(pair.sender.view(slots[0]))
        sends = []
        for part in range(128):
            parts = [SendPart(slot=slots[0].slot, offset_bytes=part * part_bytes, len_bytes=part_bytes)]
            sends.append(pair.sender.start_send("r", parts, last=False))
        write_chunk(pair.sender.view(slots[1]), data[1])
        pair.sender.send("r", [slots[1]], last=True)
        for send in sends:
            send.result()
        pair.sender.wait_sent("r", 30)
        check_chunks(pair, "r", data)


def test_a_chunk_stays_until_the_engine_has_read_it(start_gpu_pair):
    # Broken in production: the next request's chunk is written over one that a decode worker's stream is about to read.
    pair = start_gpu_pair(receiver_slots=1)
    with Engine(gpu(), CHUNK_BYTES) as engine:
        pair.receiver.order_by(engine.stream)
        for round in range(3):
            first, second = content(2 * round, 1, CHUNK_TOKENS), content(2 * round + 1, 1, CHUNK_TOKENS)
            pair.sender.send(f"a{round}", stage(pair, f"a{round}", first), last=True)
            pair.sender.wait_sent(f"a{round}", 30)
            lease = pair.receiver.wait(f"a{round}", wait_s=30)
            engine.be_busy()
            engine.scatter(lease.view(0))
            lease.release()
            opening = pair.sender.start_open(
                f"b{round}", keys_of(f"b{round}", 1), last_chunk_tokens=CHUNK_TOKENS, receiver=pair.address, wait_s=20
            )
            eventually(lambda: pair.receiver.poll_events() or opening.done())
            opening.result()
            slots = pair.sender.stage(f"b{round}", [0])
            write_chunk(pair.sender.view(slots[0]), second[0])
            pair.sender.send(f"b{round}", slots, last=True)
            pair.sender.wait_sent(f"b{round}", 30)
            assert np.array_equal(engine.take(CHUNK_BYTES), first[0])
            check_chunks(pair, f"b{round}", second)


def test_a_slot_that_is_given_up_is_nobodys_until_the_engine_has_written_it(start_gpu_pair):
    # Broken in production: after a cancelled prefill its last kernel writes into the slot of the next request.
    pair = start_gpu_pair(sender_slots=1)
    with Engine(gpu(), CHUNK_BYTES) as engine:
        pair.sender.order_by(engine.stream)
        engine.put(np.full(CHUNK_BYTES, 0xEE, dtype=np.uint8))
        for round in range(3):
            slot = stage(pair, f"a{round}", content(1, 1, CHUNK_TOKENS))[0]
            engine.be_busy()
            engine.gather(pair.sender.view(slot))
            if round % 2:
                pair.sender.send(f"a{round}", [slot], last=True)
            pair.sender.cancel(f"a{round}")
            data = content(round + 7, 1, CHUNK_TOKENS)
            pair.sender.send(f"b{round}", stage(pair, f"b{round}", data), last=True)
            pair.sender.wait_sent(f"b{round}", 30)
            check_chunks(pair, f"b{round}", data)


def test_requests_in_any_order_keep_their_bytes(start_gpu_pair):
    # Broken in production: somewhere between cancelled prefills, late kernels and reused slots a prompt gets another's
    # bytes.
    pair = start_gpu_pair(sender_slots=3, receiver_slots=3)
    rng = np.random.default_rng(int(os.environ.get("PD_TEST_SEED", "1")))
    with Engine(gpu(), CHUNK_BYTES) as prefill, Engine(gpu(), CHUNK_BYTES) as decode:
        pair.sender.order_by(prefill.stream)
        pair.receiver.order_by(decode.stream)
        for number in range(int(os.environ.get("PD_TEST_ROUNDS", "40"))):
            name, data = f"r{number}", content(number, 1, CHUNK_TOKENS)[0]
            open_request(pair, name, 1)
            slot = pair.sender.stage(name, [0])[0]
            # The engine's own memory is written by the host: not while its stream may still read it.
            prefill.take(1)
            prefill.put(data)
            if rng.random() < 0.6:
                prefill.be_busy()
            prefill.gather(pair.sender.view(slot))
            if rng.random() < 0.2:
                pair.sender.start_cancel(name)
                continue
            cut = int(rng.integers(1, CHUNK_BYTES))
            parts = [SendPart(slot.slot, 0, cut), SendPart(slot.slot, cut, CHUNK_BYTES - cut)]
            for index in rng.permutation(2):
                pair.sender.start_send(name, [parts[index]], last=False)
            pair.sender.send(name, [], last=True)
            if rng.random() < 0.2:
                try:
                    pair.sender.cancel(name)
                except RequestRefused as refused:
                    assert refused.kind == "unknown", "it was sent before"
                continue
            pair.sender.wait_sent(name, 30)
            lease = pair.receiver.wait(name, wait_s=30)
            if rng.random() < 0.5:
                decode.be_busy()
            decode.scatter(lease.view(0))
            lease.release()
            if rng.random() < 0.5:
                assert np.array_equal(decode.take(CHUNK_BYTES), data), f"request {number}"
        prefill.take(1)
        decode.take(1)
    status = eventually(lambda: (seen := pair.sender.status()).slots_free == 3 and seen)
    assert status.requests_active == 0
    assert eventually(lambda: pair.receiver.status().leases == 0)


def test_views_say_what_they_are_and_end_with_the_buffer(start_gpu_pair):
    # Broken in production: a tensor is made of freed GPU memory, and the engine's context dies of it.
    pair = start_gpu_pair()
    view = pair.sender.view(stage(pair, "r", content(1, 2, 3))[1])
    interface = view.__cuda_array_interface__
    assert interface["version"] == 3 and interface["shape"] == (len(view),) and interface["typestr"] == "|u1"
    assert interface["data"] == (view.address, False) and interface["strides"] is None
    assert view.part(3, 5).address == view.address + 3 and len(view.part(3, 5)) == 5
    with pytest.raises(MappingError):
        view.part(3, len(view))
    for offset, length in [(8 * CHUNK_BYTES - 1, 2), (-1, 1), (0, -1)]:
        with pytest.raises(MappingError):
            pair.sender.buffer.range(offset, length)
    receiver_view = pair.receiver.buffer.range(0, 8)
    assert receiver_view.__cuda_array_interface__["data"][1], "a decode worker only reads"
    pair.sender.close()
    with pytest.raises(MappingError, match="closed"):
        view.__cuda_array_interface__


def test_torch_fills_and_reads_slots_without_copying(start_gpu_pair):
    # Broken in production: the engine fills a copy of the slot, or is not waited for because it is on torch's own
    # stream.
    how = "needs torch for CUDA, and a GPU: scripts/gpu-check with a PYTHON that has it"
    torch = pytest.importorskip("torch", reason=how)
    if not REAL or not torch.cuda.is_available():
        pytest.skip(how)
    pair = start_gpu_pair()
    stream = torch.cuda.Stream()
    for round in range(3):
        name, data = f"r{round}", torch.randint(0, 256, (CHUNK_BYTES,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        slot = stage(pair, name, [np.zeros(CHUNK_BYTES, dtype=np.uint8)])[0]
        view = pair.sender.view(slot)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            tensor = view.torch()
            assert tensor.data_ptr() == view.address and tensor.dtype == torch.uint8
            tensor.copy_(data)
            pair.sender.send(name, [slot], last=True)
        pair.sender.wait_sent(name, 30)
        with torch.cuda.stream(stream), pair.receiver.wait(name, wait_s=30) as lease:
            seen = lease.view(0).torch(torch.int32).clone()
        stream.synchronize()
        assert torch.equal(seen.view(torch.uint8), data)


def test_two_clients_of_a_process_share_one_mapping(start_gpu_pair):
    # Broken in production: the first client that closes takes the other's memory along.
    pair = start_gpu_pair()
    with SenderClient(pair.prefill.ready.connector) as other:
        assert other.buffer.address() == pair.sender.buffer.address()
    ship(pair, "r", content(5, 2, 3))


def test_killed_and_restarted_daemons_leave_no_memory_taken(start_gpu_pair):
    # Broken in production: whoever still has a dead daemon's memory open keeps it from the next daemon.
    device = gpu()
    free = device.memory_info()[0]
    len_bytes = 64 << 20
    large = (*GPU, f"pd_buffer_size={len_bytes}")
    pair = start_gpu_pair(large, large)
    data = content(3, 3, 3)
    ship(pair, "a", data)
    both = device.memory_info()[0]
    assert free - both >= 2 * len_bytes
    pair.decode.kill()
    with pytest.raises(DaemonGone):
        while True:
            pair.receiver.poll_events()
    with pytest.raises(MappingError):
        pair.receiver.buffer.range(0, 1)
    # Its sender lets go of it as well, long before anybody needs it again.
    eventually(lambda: device.memory_info()[0] >= both + len_bytes)
    pair.restart_receiver()
    ship(pair, "b", data)
    pair.prefill.kill()
    with pytest.raises(DaemonGone):
        while True:
            pair.sender.poll_events()
    eventually(lambda: device.memory_info()[0] >= both + len_bytes)
    pair.restart_sender()
    ship(pair, "c", data)
    pair.sender.close()
    pair.receiver.close()
    pair.prefill.close()
    pair.decode.close()
    eventually(lambda: device.memory_info()[0] >= free)


def test_a_client_that_dies_with_work_in_flight_costs_nobody_anything(start_gpu_pair):
    # Broken in production: a prefill worker that crashes leaves a transfer waiting for an event that never comes, and
    # its daemon a slot short.
    pair = start_gpu_pair(sender_slots=2)
    code = """
import os, sys
from gpu import Engine, gpu
from pd_backend import PeerAddress, SenderClient
device = gpu()
client = SenderClient(sys.argv[1])
engine = Engine(device, 1024)
client.order_by(engine.stream)
client.open("dies", ["k"], last_chunk_tokens=16, receiver=PeerAddress("127.0.0.1", int(sys.argv[2]), int(sys.argv[3])))
slot = client.stage("dies", [0])[0]
for _ in range(50):
    engine.be_busy()
engine.gather(client.view(slot))
client.send("dies", [slot], last=True)
os.kill(os.getpid(), 9)
"""
    arguments = [pair.prefill.ready.connector, str(pair.address.init_port), str(pair.address.alloc_port)]
    ended = in_another_process(code, *arguments)
    assert ended.returncode == -9, ended.stderr
    status = eventually(lambda: (seen := pair.sender.status()).requests_active == 0 and seen)
    assert status.transfers_in_flight == 0 and status.slots_free == 2, status
    ship(pair, "b", content(3, 2, CHUNK_TOKENS))


def in_another_process(code, *arguments, **environment_more):
    """Runs Python that sees the same GPUs; what it printed."""
    paths = os.pathsep.join([str(TOP / "python"), str(TOP / "python" / "tests"), *sys.path])
    command = [sys.executable, "-c", code, *arguments]
    environment_there = {**os.environ, **environment(), "PYTHONPATH": paths, **environment_more}
    return subprocess.run(command, env=environment_there, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def refused_start(role, sets, env, tmp_path):
    """Exit code and log of a daemon that does not start; `--check` has to say the same."""
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps(LAYOUT))
    command = [binary(f"pd-{role}"), "--config", TOP / "configs" / "loopback.yaml", "--kv-layout", layout]
    for key in ["transfer_channel=local", f"pd_buffer_size={8 * CHUNK_BYTES}", *sets]:
        command += ["--set", key]
    said = []
    for more in ([], ["--check"]):
        ended = subprocess.run(
            [*command, *more], env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert "panicked" not in ended.stderr, ended.stderr
        errors = [line.split("ERROR", 1)[1] for line in ended.stderr.splitlines() if "ERROR" in line]
        said.append((ended.returncode, errors))
    return said


@stand_in_only
@pytest.mark.parametrize(
    ("sets", "faults", "named"),
    [
        (["pd_buffer_device=cuda:7"], {}, ["cuda:7", "this process sees cuda:0", "GPU-a0a0"]),
        (GPU, {"PD_FAKE_CUDA_FAULTS": "no_device"}, ["no usable CUDA device", "CUDA_ERROR_NO_DEVICE"]),
        (GPU, {"PD_FAKE_CUDA_INIT": "803"}, ["no usable CUDA device", "cuInit"]),
        (GPU, {"PD_FAKE_CUDA_TOTAL_BYTES": "4096"}, ["cannot allocate 8192 bytes", "4096 of its 4096 bytes are free"]),
    ],
)
def test_a_gpu_that_cannot_be_had_is_said_at_start_as_by_check(tmp_path, sets, faults, named):
    # Broken in production: a daemon ends in a panic, or --check promises a start that fails.
    stand_in()
    (code, said), checked = refused_start("receiver", sets, environment(**faults), tmp_path)
    assert code == 3 and all(word in said[-1] for word in named), said
    assert checked == (code, said)


@stand_in_only
def test_a_library_that_is_no_driver_is_said(tmp_path):
    # Broken in production: a container with an old or a stub libcuda ends every daemon in a panic.
    (tmp_path / "none.c").write_text("")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-o", library, tmp_path / "none.c"], check=True)
    (code, said), checked = refused_start("sender", GPU, {"LD_LIBRARY_PATH": str(tmp_path)}, tmp_path)
    assert code == 3 and "has no cuInit" in said[-1], said
    assert checked == (code, said)


@stand_in_only
def test_memory_that_cannot_be_exported_is_said_with_what_is_in_the_way(start_gpu_pair):
    # Broken in production: the daemon starts, and no engine can open its buffer.
    with pytest.raises(DaemonStartError) as caught:
        start_gpu_pair(env=environment(PD_FAKE_CUDA_FAULTS="not_exportable"))
    assert caught.value.exit_code == 3
    for word in ("cannot be exported", "expandable segments", "8192 bytes"):
        assert word in str(caught.value), str(caught.value)


@stand_in_only
def test_a_gpu_that_is_lost_is_named_by_what_fails(start_gpu_pair):
    # Broken in production: "transfer failed", and nobody looks at the machine whose GPU has fallen off the bus.
    pair = start_gpu_pair()
    slots = stage(pair, "r", content(1, 1, 3))
    lost = stand_in() / "lost"
    sender = pair.sender
    # The engine lost it as well: it can record nothing any more, so the daemon hears of no event.
    order, sender._order = sender._order, None
    lost.touch()
    try:
        sender.send("r", slots, last=True)
        with pytest.raises(RequestFailed) as caught:
            sender.wait_sent("r", 30)
    finally:
        lost.unlink()
        sender._order = order
    assert caught.value.kind == "transfer_failed"
    for word in ("cuda:0", "has disappeared", "CUDA_ERROR_DEVICE_UNAVAILABLE", "Xid"):
        assert word in caught.value.text, caught.value.text


def test_two_gpus_of_a_host_are_one_copy_apart(start_gpu_pair):
    # Broken in production: a sender on one GPU and a receiver on another do not find each other, or go through the
    # host.
    gpu(1)
    pair = start_gpu_pair(receiver_sets=("pd_buffer_device=cuda:1",))
    data = content(9, 3, 5)
    slots = stage(pair, "r", data)
    before = None if REAL else counts()
    pair.sender.send("r", slots, last=True)
    pair.sender.wait_sent("r", 30)
    if before is not None:
        done = counts() - before
        assert (done.host_to_device, done.device_to_host, done.device_to_device) == (0, 0, 0)
        assert done.peer_to_peer_bytes == sum(map(len, data))
    check_chunks(pair, "r", data)


@stand_in_only
def test_numbers_of_gpus_may_differ_between_processes(start_gpu_pair):
    # Broken in production: an engine with CUDA_VISIBLE_DEVICES opens its daemon's buffer on another GPU.
    hidden = environment(CUDA_VISIBLE_DEVICES="1")
    pair = start_gpu_pair(env=hidden)
    buffer = pair.sender.attached.buffer
    assert buffer.ordinal == 0 and buffer.device.endswith("01"), buffer
    assert isinstance(pair.sender.buffer, CudaBuffer) and pair.sender.buffer.device.ordinal == 1
    ship(pair, "r", content(2, 2, 2))


@stand_in_only
@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"PD_FAKE_CUDA_FAULTS": "no_peer_access"}, ["another GPU", "no peer access", "cuda:0"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["another GPU", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_a_gpu_that_cannot_be_reached_is_refused_at_the_handshake(start_gpu_pair, env, named):
    # Broken in production: a handle of another GPU is written to wherever it happens to be mapped.
    pair = start_gpu_pair(
        receiver_sets=("pd_buffer_device=cuda:1",), env=environment(**env), receiver_env=environment()
    )
    with pytest.raises(RequestRefused) as caught:
        open_request(pair, "r", 1)
    assert all(word in caught.value.text for word in named), caught.value.text


@stand_in_only
def test_host_memory_meets_a_gpu_without_a_driver_by_name(start_gpu_pair):
    # Broken in production: a prefill worker without a GPU is told that a handle is bad, and nobody knows what to
    # change.
    pair = start_gpu_pair(HOST, GPU, env={"CUDA_VISIBLE_DEVICES": "-1"}, receiver_env=environment())
    with pytest.raises(RequestRefused) as caught:
        open_request(pair, "r", 1)
    for word in ("its buffer is memory of GPU-", "ours is host memory", "no usable CUDA device"):
        assert word in caught.value.text, caught.value.text


@stand_in_only
def test_a_buffer_may_begin_inside_its_allocation(start_gpu_pair):
    # Broken in production: small buffers are read and written at the start of somebody else's.
    pair = start_gpu_pair(env=environment(PD_FAKE_CUDA_OFFSET_BYTES="512"))
    buffer = pair.sender.attached.buffer
    assert (buffer.offset_bytes, buffer.allocation_bytes) == (512, (2 << 20) + 512)
    ship(pair, "r", content(4, 8, 5))


def test_an_event_that_cannot_be_opened_fails_what_waits_for_it(start_gpu_pair):
    # Broken in production: an engine that makes its events otherwise has its slots read at any time, or waits for ever.
    pair = start_gpu_pair()
    slots = stage(pair, "r", content(1, 1, 3))
    parts = [m.SendPart(slot=slots[0].slot)]
    send = lambda id: m.Send(id=id, req_id="r", parts=parts, last=True, after="00" * 64)  # noqa: E731
    pair.sender._start(send, m.Accepted, lambda reply: reply).result()
    with pytest.raises(RequestFailed, match="cannot be opened") as caught:
        pair.sender.wait_sent("r", 30)
    assert caught.value.kind == "transfer_failed" and "without timing" in caught.value.text
    cancel = lambda id: m.Cancel(id=id, req_id="r", after="00" * 64)  # noqa: E731
    with pytest.raises(RequestRefused, match="cannot be opened"):
        pair.sender._start(cancel, m.Cancelled, lambda reply: reply).result()
    ship(pair, "b", content(3, 2, CHUNK_TOKENS))


@stand_in_only
@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["pd_buffer is on GPU-a0a0", "CUDA_VISIBLE_DEVICES"]),
        ({"LD_LIBRARY_PATH": "", "CUDA_VISIBLE_DEVICES": "-1"}, ["cannot open", "CUDA"]),
    ],
)
def test_a_client_that_cannot_reach_the_gpu_is_told_why(start_gpu_pair, env, named):
    # Broken in production: an engine on another GPU than its daemon's opens nothing, and says "invalid value".
    pair = start_gpu_pair(("pd_buffer_device=cuda:1",), ("pd_buffer_device=cuda:1",))
    code = "import sys; from pd_backend import SenderClient; SenderClient(sys.argv[1])"
    ended = in_another_process(code, pair.prefill.ready.connector, **env)
    assert ended.returncode == 1 and "MappingError" in ended.stderr, ended.stderr
    assert all(word in ended.stderr for word in named), ended.stderr


def test_checksums_are_of_what_the_engine_has_written(start_gpu_pair):
    # Broken in production: with pd_checksum every chunk of a GPU is corrupted, or sums of unfinished slots agree.
    sets = (*GPU, "pd_checksum=full")
    pair = start_gpu_pair(sets, sets)
    with Engine(gpu(), CHUNK_BYTES) as engine:
        pair.sender.order_by(engine.stream)
        data = content(3, 1, CHUNK_TOKENS)
        slot = stage(pair, "r", [np.zeros(CHUNK_BYTES, dtype=np.uint8)])[0]
        engine.put(data[0])
        engine.be_busy()
        engine.gather(pair.sender.view(slot))
        pair.sender.send("r", [slot], last=True)
        pair.sender.wait_sent("r", 30)
        check_chunks(pair, "r", data)


def test_a_lazy_buffer_on_a_gpu_is_refused(start_gpu_pair):
    # Broken in production: a buffer that was to begin small takes all of its GPU memory, or fails when it grows.
    with pytest.raises(DaemonStartError) as caught:
        start_gpu_pair((*GPU, f"pd_buffer_initial_size={CHUNK_BYTES}"), (*GPU, f"pd_buffer_initial_size={CHUNK_BYTES}"))
    assert caught.value.exit_code == 2 and "in one piece" in str(caught.value), str(caught.value)


@stand_in_only
@pytest.mark.nixl
def test_a_nixl_without_cuda_is_said(start_pair):
    # Broken in production: chunks of a GPU are sent from addresses that UCX takes for the host's, and the daemon dies.
    gpu()
    with pytest.raises(DaemonStartError) as caught:
        start_pair("nixl", sender_sets=GPU, receiver_sets=GPU, env=environment())
    assert caught.value.exit_code == 3
    for word in ("nixl cannot register 8192 bytes of GPU memory", "built with CUDA", "transfer_channel: local"):
        assert word in str(caught.value), str(caught.value)


def test_an_event_for_host_memory_is_refused(start_pair):
    # Broken in production: a sender without a GPU waits for one.
    pair = start_pair("local")
    open_request(pair, "r", 1)
    slots = pair.sender.stage("r", [0])
    parts = [m.SendPart(slot=slots[0].slot)]
    send = lambda id: m.Send(id=id, req_id="r", parts=parts, last=True, after="ab" * 64)  # noqa: E731
    with pytest.raises(RequestRefused, match="host memory"):
        pair.sender._start(send, m.Accepted, lambda reply: reply).result()
