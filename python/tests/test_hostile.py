"""Messages that a daemon cannot read or does not take: LMCache's senders are answered, and no log is forged or filled."""

import json
import re
import subprocess
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
import zmq

from conftest import CHUNK_TOKENS, LAYOUT, TOP, binary
from pd_backend import PeerAddress, ReceiverClient, RequestRefused, SenderClient
from test_metrics import Scrape
from waiting import PATIENCE_S, eventually

#: How every line of a log begins. Colours are for terminals.
LINE = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+Z +(ERROR|WARN|INFO|DEBUG) ")
FORGED = "x\n2026-01-01T00:00:00.000000Z ERROR forged\x1b[2K\u2028\u202e"


class Ready:
    """A running daemon, its ready line and all of its log."""

    def __init__(self, line, log):
        self.ready = json.loads(line, object_hook=lambda fields: type("Ready", (), fields)())
        self._log = log

    def log(self):
        return self._log.read_text()

    def lines_with(self, text):
        return [line for line in self.log().splitlines() if text in line]

    def check_log(self):
        """That nobody has written into the log but the daemon."""
        # A thread of the daemon writes it, some time after what it says has happened.
        log = eventually(lambda: self.log().endswith("\n") and self.log())
        for line in log.removesuffix("\n").split("\n"):
            assert LINE.match(line), f"{line!r} in {log}"
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", line), repr(line)


@contextmanager
def daemon(role, tmp_path, *sets, layout=None, options=(), env=None):
    path, log = tmp_path / f"{role}.json", tmp_path / f"{role}.log"
    path.write_text(json.dumps(LAYOUT | (layout or {})))
    command = [binary(f"pd-{role}"), "--config", TOP / "configs" / "loopback.yaml", "--kv-layout", path, *options]
    defaults = ["transfer_channel=local", "pd_buffer_size=64KiB", "pd_metrics_port=0", "pd_metrics_host=127.0.0.1"]
    ports = [f"pd_peer_{port}_port=0" for port in ("init", "alloc", "query")] if role == "receiver" else []
    for key in (*defaults, *ports, *sets):
        command += ["--set", key]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Ready(line, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def socket(kind, port):
    with zmq.Context() as context, context.socket(kind) as one:
        one.linger = 0
        one.sndhwm = one.rcvhwm = 0
        one.rcvtimeo = int(PATIENCE_S * 1000)
        one.connect(f"tcp://127.0.0.1:{port}")
        yield one


def ask(kind, port, message):
    """The answer to a message that is sent as LMCache's sender of this kind sends it."""
    with socket(kind, port) as one:
        payload = msgspec.msgpack.encode(message)
        one.send(payload) if kind == zmq.REQ else one.send_multipart([b"", payload])
        return msgspec.msgpack.decode(one.recv_multipart()[-1])


def alloc(keys=("k1", "k2", "k3"), **fields):
    known = {"fmt": 1, "shape": [2, 2, 16, 8], "dtype": "bfloat16", "last_chunk_toks": 16}
    return {"type": "AllocRequest", "keys": list(keys), **known, **fields}


REQUESTS = {
    "alloc": alloc(req_id="r", is_last_batch=True, total_chunks=3),
    "cancel": {"type": "CancelNotif", "req_id": "r", "keys": []},
    "query": {"type": "CacheQueryRequest", "keys": ["k1"]},
    "init": {"type": "NixlInitRequest", "local_meta_bytes": b"m"},
    "register": {
        "type": "NixlMemRegRequest", "remote_agent_name": b"a", "local_id": "", "local_xfer_dlist_bytes": b"",
    },
}  # fmt: skip
ANSWERS = {
    "alloc": {"type": "AllocResponse", "already_sent_indexes": [], "remote_indexes": [-1, -1, -1]},
    "cancel": {"type": "AllocResponse", "already_sent_indexes": [], "remote_indexes": []},
    "query": {"type": "CacheQueryResponse", "cached_keys": [], "cached_indexes": []},
    "init": {"type": "NixlInitResponse", "remote_agent_name": b"", "remote_meta_bytes": b""},
    "register": {"type": "NixlMemRegResponse", "remote_xfer_dlist_bytes": b""},
}


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER], ids=["sync", "async"])
def test_lmcaches_senders_are_answered_whatever_they_send_and_wherever(kind, tmp_path):
    # Broken in production: an LMCache sender waits for ever, and with it every request of its worker.
    with daemon("receiver", tmp_path) as receiver:
        ports = {name: getattr(receiver.ready, f"{name}_port") for name in ("init", "alloc", "query")}
        for request, answer in ANSWERS.items():
            for port in ports.values():
                assert ask(kind, port, REQUESTS[request]) == answer, (request, port)
            # Without any of its fields.
            bare = ask(kind, ports["alloc"], {"type": REQUESTS[request]["type"]})
            assert bare == answer | ({"remote_indexes": [-1]} if request == "alloc" else {})
        for message in (
            alloc(req_id="r" * 305),
            alloc(["k" * 1025, "k2", "k3"]),
            alloc(req_id=FORGED),
            alloc(req_id=7),
            alloc(["k1", "k2", ""]),
        ):
            assert ask(kind, ports["alloc"], message) == ANSWERS["alloc"], message
        many = ask(kind, ports["alloc"], alloc(f"k{number}" for number in range(16_385)))
        assert many["remote_indexes"] == [-1] * 16_385
        assert ask(kind, ports["query"], {"type": "CacheQueryRequest", "keys": ["k" * 1025]}) == ANSWERS["query"]
        expected = len(ANSWERS) + 7 + 2 * len(ANSWERS)
        eventually(lambda: Scrape(receiver)("pd_unexpected_messages_total") >= expected)
        # Who it was, what was seen, and what to do. A line a second is written, and the rest is counted.
        for text in ("cannot be read", "at the port for"):
            lines = eventually(lambda text=text: receiver.lines_with(text))
            for line in lines:
                assert "127.0.0.1:" in line and "correct" in line, line
            assert any(re.search(r"AllocRequest[:\" ]", line) for line in lines), lines
        receiver.check_log()


def test_nobody_writes_into_a_log_but_the_daemon(tmp_path):
    # Broken in production: a request id, a host or a model's name with a line break forges an alarm, or hides one.
    with daemon("receiver", tmp_path) as receiver, daemon("sender", tmp_path) as sender:
        with SenderClient(sender.ready.connector, name=FORGED) as prefill:
            here = PeerAddress(host="127.0.0.1", init_port=receiver.ready.init_port, alloc_port=receiver.ready.alloc_port)
            there = PeerAddress(host=FORGED, init_port=1, alloc_port=2)
            for req_id, key, address in ((FORGED, "k", here), ("r", FORGED, here), ("r", "k", there)):
                with pytest.raises(RequestRefused) as caught:
                    prefill.open(req_id, [key], last_chunk_tokens=CHUNK_TOKENS, receiver=address)
                assert "\n" not in caught.value.text and "\\n" in caught.value.text, caught.value.text
                assert "expected" in caught.value.text
        with ReceiverClient(receiver.ready.connector, name=FORGED) as decode:
            for ask_for in (lambda: decode.wait(FORGED, wait_s=0), lambda: decode.lookup([FORGED])):
                with pytest.raises(RequestRefused):
                    ask_for()
        hello = {
            "version_min": 2, "version_max": 2, "instance": FORGED, "engine": FORGED, "layout": [[FORGED, FORGED]],
            "capabilities": [FORGED],
        }  # fmt: skip
        for instance in ("named", FORGED):
            for seq, engine in enumerate((FORGED, "local")):
                pd = {"seq": seq, "hello": hello | {"instance": instance, "engine": engine}, "agent_name": FORGED}
                answer = ask(zmq.DEALER, receiver.ready.init_port, REQUESTS["init"] | {"pd": pd})
                assert answer["pd"]["refusal"]
            pd = {"seq": 1, "instance": instance, "wait_ms": 0, "receiver": FORGED}
            assert ask(zmq.DEALER, receiver.ready.alloc_port, alloc(req_id="r") | {"pd": pd})["pd"]["refusal"]
        ask(zmq.REQ, receiver.ready.init_port, REQUESTS["register"] | {"remote_agent_name": FORGED.encode()})
        ask(zmq.REQ, receiver.ready.alloc_port, alloc(dtype=FORGED))
        with socket(zmq.DEALER, receiver.ready.alloc_port) as one:
            one.send(msgspec.msgpack.encode({"type": FORGED}))
            eventually(lambda: receiver.lines_with("a message that cannot be read"))
        eventually(lambda: sender.lines_with("connector refused"))
        sender.check_log()
        receiver.check_log()


@pytest.mark.parametrize(
    "options",
    [
        ["--model-name", FORGED],
        ["--set", f"model_name={json.dumps(FORGED)}"],
        ["--set", FORGED],
        ["--set", f"{FORGED}=1"],
        ["--set", f"pd_peer_host={json.dumps(FORGED)}"],
        ["--set", f"pd_receivers=[{json.dumps(FORGED + ':1:2')}]"],
        ["--config", f"/nowhere/{FORGED}"],
        ["--kv-layout", f"/nowhere/{FORGED}"],
    ],
    ids=lambda options: f"{options[0]} {options[1].split('=')[0]!a}",
)
def test_a_configuration_cannot_forge_a_log_either(options, tmp_path):
    # Broken in production: as above, from a YAML that a tenant may write.
    layout, log = tmp_path / "layout.json", tmp_path / "log"
    layout.write_text(json.dumps({name: value for name, value in LAYOUT.items() if name != "model"}))
    command = [binary("pd-sender"), "--check"]
    for option, value in (("--config", TOP / "configs" / "loopback.yaml"), ("--kv-layout", layout), ("--model-name", "m")):
        if option not in options and not (option == "--model-name" and any("model_name" in text for text in options)):
            command += [option, value]
    with log.open("w") as stderr:
        code = subprocess.run([*command, *options], stdout=subprocess.DEVNULL, stderr=stderr).returncode
    assert code == 2
    Ready("{}", log).check_log()
    assert "\\n" in log.read_text()


def test_a_layout_with_odd_names_is_refused(tmp_path):
    # Broken in production: as above, from a model's name in a layout.
    for layout in ({"model": FORGED}, {"engine": {"name": FORGED}}, {"engine": {FORGED: "x"}}, {"dtype": FORGED, "dtype_bytes": 2}):
        path, log = tmp_path / "layout.json", tmp_path / "log"
        path.write_text(json.dumps(LAYOUT | layout))
        command = [binary("pd-sender"), "--check", "--config", TOP / "configs" / "loopback.yaml", "--kv-layout", path]
        with log.open("w") as stderr:
            assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr).returncode == 2, layout
        Ready("{}", log).check_log()
        assert "expected text without line breaks" in log.read_text()


#: Bad messages of a flood, and what its log may have.
FLOOD = 20_000
LOG_LEN_BYTES_MAX = 256 * 1024


@pytest.mark.parametrize(
    ("port", "message", "counter", "labels"),
    [
        ("alloc", {"type": "Nonsense"}, "pd_unexpected_messages_total", {}),
        ("alloc", {"type": "ProxyNotif", "req_id": "r"}, "pd_unexpected_messages_total", {}),
        ("alloc", REQUESTS["init"], "pd_unexpected_messages_total", {}),
        ("alloc", REQUESTS["alloc"], "pd_allocations_refused_total", {"kind": "handshake_refused"}),
        ("init", REQUESTS["init"], "pd_peer_failures_total", {"kind": "handshake_refused"}),
        ("init", REQUESTS["register"], "pd_peer_failures_total", {"kind": "handshake_refused"}),
    ],
    ids=["unreadable", "unexpected", "misdirected", "refused", "handshake", "register"],
)
def test_a_flood_of_bad_messages_is_counted_and_does_not_fill_the_log(port, message, counter, labels, tmp_path):
    # Broken in production: whoever reaches a port fills the disk with log lines.
    with daemon("receiver", tmp_path) as receiver:
        before = Scrape(receiver)(counter, **labels)
        payload = msgspec.msgpack.encode(message)
        with socket(zmq.DEALER, getattr(receiver.ready, f"{port}_port")) as one:
            for _ in range(FLOOD):
                one.send(payload)
                # Answers are read, so that none is dropped.
                while one.poll(0):
                    one.recv()
            eventually(lambda: Scrape(receiver)(counter, **labels) >= before + FLOOD, pause_s=0.1)
        log = receiver.log()
        assert len(log) < LOG_LEN_BYTES_MAX, f"{len(log)} bytes:\n{log[:3000]}"
        receiver.check_log()
        # The next line after a pause says how many were left unsaid.
        with socket(zmq.DEALER, getattr(receiver.ready, f"{port}_port")) as one:

            def unsaid():
                one.send(payload)
                return sum(int(count) for count in re.findall(r"\bunsaid=(\d+)", receiver.log())) >= FLOOD * 0.9

            eventually(unsaid, pause_s=0.2)


def test_a_receiver_says_that_its_senders_evict_one_another(tmp_path):
    # Broken in production: senders disconnect one another for ever, requests are slow or fail, and nothing says why.
    with ExitStack() as stack:
        receiver = stack.enter_context(daemon("receiver", tmp_path, "pd_max_peers=2"))
        named = f"pd_receivers=[127.0.0.1:{receiver.ready.init_port}:{receiver.ready.alloc_port}]"
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            stack.enter_context(daemon("sender", tmp_path / str(number), named, "pd_heartbeat_interval_sec=0.1"))
        eventually(lambda: Scrape(receiver)("pd_peer_failures_total", kind="peer_lost") >= 4)
        lines = eventually(lambda: receiver.lines_with("pd_max_peers to"))
        assert len(lines) == 1 and "WARN" in lines[0] and "2 senders are connected, the limit" in lines[0], receiver.log()


def test_a_receiver_that_comes_and_goes_is_one_line_a_minute(tmp_path):
    # Broken in production: the port for allocations is that of another service, and the log is full of reconnects.
    with ExitStack() as stack:
        receiver = stack.enter_context(daemon("receiver", tmp_path))
        other = stack.enter_context(zmq.Context()).socket(zmq.ROUTER)
        stack.enter_context(other)
        port = other.bind_to_random_port("tcp://127.0.0.1")
        named = f"pd_receivers=[127.0.0.1:{receiver.ready.init_port}:{port}]"
        sets = (named, "pd_heartbeat_interval_sec=0.1", "pd_peer_timeout_sec=0.5")
        sender = stack.enter_context(daemon("sender", tmp_path, *sets))
        eventually(lambda: Scrape(sender)("pd_peer_failures_total", kind="peer_lost") >= 4)
        # The first connection, its end, and the next try. From there on the same again is not written for a minute.
        eventually(lambda: len(sender.lines_with("connected receiver=")) >= 2)
        counts = [len(sender.lines_with(text)) for text in ("receiver given up", "connected receiver=")]
        assert counts == [1, 2], sender.log()
