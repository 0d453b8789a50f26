"""What an operator sees of a running daemon: metrics, health, readiness and status, through every door the same."""

import json
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from prometheus_client import parser as text_parser
from prometheus_client.openmetrics import parser as open_metrics_parser

from conftest import CHUNK_BYTES, TOP, binary
from pd_backend.errors import DaemonStartError
from test_end_to_end import check_arrived, content, eventually, open_request, refused, ship
from waiting import PATIENCE_S

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def get(daemon, path, accept=None, method="GET"):
    """Status, content type and text of this path."""
    url = daemon.ready.metrics.removesuffix("/metrics") + path
    request = urllib.request.Request(url, headers={"Accept": accept} if accept else {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


class Scrape:
    """One scrape, read by Prometheus's own strict parser."""

    def __init__(self, daemon):
        status, content_type, text = get(daemon, "/metrics", accept=OPEN_METRICS)
        assert status == 200 and content_type.startswith("application/openmetrics-text"), text
        self.families = {family.name: family for family in open_metrics_parser.text_string_to_metric_families(text)}

    def __call__(self, name, **labels):
        """The one value with this name and these labels, `role` left aside."""
        of_name = [sample for family in self.families.values() for sample in family.samples if sample.name == name]
        found = [sample.value for sample in of_name if {k: v for k, v in sample.labels.items() if k != "role"} == labels]
        assert len(found) == 1, f"{name} {labels}: {len(found)} of {len(of_name)}"
        return found[0]


def test_requests_that_are_sent_cancelled_and_expired_are_counted_as_that(start_pair):
    # Broken in production: an operator's graphs stay flat, or show successes, while requests fail.
    pair = start_pair("local", receiver_sets=["pd_retention_sec=0.3"])
    for daemon, outcome in ((pair.prefill, "sent"), (pair.decode, "ready")):
        before = Scrape(daemon)
        # A rate needs the 0 before the 1.
        for name in (outcome, "cancelled", "expired", "peer_lost"):
            assert before("pd_requests_total", outcome=name) == 0
        assert before("pd_transferred_bytes_total") == before("pd_integrity_failures_total") == 0

    waiting = pair.receiver.start_wait("sent", wait_s=30)
    eventually(lambda: Scrape(pair.decode)("pd_waits", what="ready") == 1)
    sent = ship(pair, "sent", content(1, 3, 5))
    waiting.result(30).release()
    open_request(pair, "cancelled", 2)
    assert Scrape(pair.prefill)("pd_requests_active") == Scrape(pair.decode)("pd_requests_active") == 1
    pair.sender.cancel("cancelled")
    expired = ship(pair, "expired", content(2, 1, 7))
    eventually(lambda: Scrape(pair.decode)("pd_requests_total", outcome="expired") == 1)
    eventually(lambda: Scrape(pair.decode)("pd_requests_active") == 0)
    refused("unknown", lambda: pair.sender.cancel("nobody's"))

    sender = Scrape(pair.prefill)
    ends = {sample.labels["outcome"]: sample.value for sample in sender.families["pd_requests"].samples}
    assert {outcome: count for outcome, count in ends.items() if count} == {"sent": 2, "cancelled": 1}
    assert sender("pd_transferred_bytes_total") == sent.bytes + expired.bytes
    assert (sender("pd_chunks_total"), sender("pd_chunks_already_sent_total")) == (6, 0)
    assert (sender("pd_peers"), sender("pd_handshakes_total"), sender("pd_clients")) == (1, 1, 1)
    assert sender("pd_connector_errors_total", kind="unknown") == 1
    receiver = Scrape(pair.decode)
    ends = {sample.labels["outcome"]: sample.value for sample in receiver.families["pd_requests"].samples}
    assert {outcome: count for outcome, count in ends.items() if count} == {"ready": 2, "cancelled": 1, "expired": 1}
    assert receiver("pd_transferred_bytes_total") == sent.bytes + expired.bytes
    assert (receiver("pd_slots_quarantined_total"), receiver("pd_slots_unquarantined_total")) == (2, 2)
    # The fetched chunks go as well, once nobody has asked for them in all that time.
    empty = {"available": 8, "reserved": 0, "ready_held": 0, "ready_idle": 0, "quarantined": 0}
    eventually(lambda: all(Scrape(pair.decode)("pd_slots", state=state) == n for state, n in empty.items()))
    assert Scrape(pair.decode)("pd_chunks_expired_total") == 4

    counts = {"handshake": 1, "alloc": 3, "transfer": 2, "commit": 2}, {"wait": 3, "write": 2, "fetch": 1}
    for scrape, phases in zip((sender, receiver), counts):
        for phase, count in phases.items():
            assert scrape("pd_phase_seconds_count", phase=phase) == count, phase
            assert scrape("pd_phase_seconds_bucket", phase=phase, le="+Inf") == count, phase
    assert 0 < sender("pd_phase_seconds_sum", phase="alloc") < 60


def test_a_page_that_prometheus_reads_in_either_format(start_pair):
    # Broken in production: a scrape is refused for one bad line, and every alert goes quiet.
    pair = start_pair("local")
    ship(pair, "one", content(3, 1, 1))
    check_arrived(pair, "one", content(3, 1, 1))
    for daemon in (pair.prefill, pair.decode):
        status, content_type, text = get(daemon, "/metrics")
        assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
        samples = [sample for family in text_parser.text_string_to_metric_families(text) for sample in family.samples]
        assert len(samples) > 100
        for sample in samples:
            assert sample.labels["role"] == daemon.ready.role
            assert sample.name.startswith(("pd_", "process_"))
        families = Scrape(daemon).families.values()
        for family in families:
            assert family.documentation.endswith("."), family.name
            if "bytes" in family.name or "seconds" in family.name:
                assert family.unit in ("bytes", "seconds"), family.name
            # Labels of unbounded value would make a series of every request.
            assert {label for sample in family.samples for label in sample.labels} <= {
                "role", "outcome", "kind", "phase", "le", "state", "what", "result", "group", "version", "engine"
            }
    scrape = Scrape(pair.decode)
    assert scrape("process_resident_memory_bytes") > 1 << 20 and scrape("process_open_fds") > 3
    assert scrape("pd_buffer_bytes", state="used") + scrape("pd_buffer_bytes", state="free") == 8 * CHUNK_BYTES


def test_every_metric_is_documented_and_every_documented_one_exists(start_pair):
    # Broken in production: an alert is written against the documentation and never fires.
    pair = start_pair("local")
    shown = {
        family.name + ("_total" if family.type == "counter" else "")
        for daemon in (pair.prefill, pair.decode)
        for family in Scrape(daemon).families.values()
    }
    rows = [line for line in (TOP / "docs" / "operations.md").read_text().splitlines() if line.startswith("| `p")]
    documented = {row.split("`")[1].split("{")[0] for row in rows}
    assert shown == {name for name in documented if name.startswith(("pd_", "process_"))}


def test_readiness_ends_with_the_first_sigterm_and_health_does_not(start_pair):
    # Broken in production: a router goes on sending requests to a daemon that refuses them, or its supervisor kills a
    # daemon that is draining as it should.
    pair = start_pair("local", receiver_sets=["pd_shutdown_timeout_sec=30"])
    for daemon in (pair.prefill, pair.decode):
        assert eventually(lambda: get(daemon, "/readyz")[0] == 200)
        assert get(daemon, "/healthz") == (200, "text/plain; charset=utf-8", "ok: the driver and the engine answer\n")
        assert get(daemon, "/metrics", method="HEAD")[::2] == (200, "")
        assert get(daemon, "/metrics", method="POST")[0] == 405
        assert get(daemon, "/secrets")[0] == 404
    ship(pair, "held", content(4, 2, 2))
    lease = pair.receiver.wait("held", wait_s=30)
    pair.decode._process.send_signal(signal.SIGTERM)
    assert eventually(lambda: get(pair.decode, "/readyz")[0] == 503)
    assert "draining" in get(pair.decode, "/readyz")[2]
    assert get(pair.decode, "/healthz")[0] == 200
    assert Scrape(pair.decode)("pd_draining") == 1
    assert pair.receiver.status().draining and not pair.sender.status().draining
    assert get(pair.prefill, "/readyz")[0] == 200
    lease.release()
    assert eventually(lambda: pair.decode.exit_code() is not None) and pair.decode.exit_code() == 0


def test_garbage_and_slow_clients_at_the_port_disturb_nothing(start_pair):
    # Broken in production: a port scanner, or a browser tab that hangs, stops requests or hides a daemon from Prometheus.
    pair = start_pair("local")
    ship(pair, "before", content(5, 1, 1))
    check_arrived(pair, "before", content(5, 1, 1))
    url = urlsplit(pair.decode.ready.metrics)
    fds = Scrape(pair.decode)("process_open_fds")
    says = [
        b"",
        b"GET /metrics HTTP/1.1\r\nHost: slow",
        b"\x00\xff" * 4096,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 5000,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: never-reads\r\n\r\n" * 50,
    ]
    strangers = []
    for number in range(126):
        stranger = socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S)
        stranger.settimeout(0.2)
        try:
            stranger.sendall(says[number % len(says)])
        except OSError:
            pass  # It hung up already.
        strangers.append(stranger)
    data = content(6, 4, 9)
    ship(pair, "meanwhile", data)
    check_arrived(pair, "meanwhile", data)
    assert pair.receiver.status().requests_done == 2
    # More of them than there are places: a scrape waits until they are hung up on, which nobody had to ask for.
    assert Scrape(pair.decode)("pd_requests_total", outcome="ready") == 2
    eventually(lambda: Scrape(pair.decode)("process_open_fds") <= fds + 1)
    for stranger in strangers:
        stranger.close()
    assert get(pair.decode, "/healthz")[0] == 200


def status_of(arguments, expected_code=0):
    ran = subprocess.run(
        [binary("pd-bench"), "status", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert ran.returncode == expected_code, ran.stderr
    return ran.stdout if expected_code == 0 else ran.stderr


def test_pd_bench_status_is_the_same_through_both_doors(start_pair):
    # Broken in production: an operator is shown a daemon that is not the one that runs.
    pair = start_pair("local", sender_sets=["pd_buffer_initial_size=2048"])
    ship(pair, "one", content(7, 3, 5))
    check_arrived(pair, "one", content(7, 3, 5))
    open_request(pair, "two", 2)
    pair.sender.stage("two", [0])
    for daemon, client in ((pair.prefill, pair.sender), (pair.decode, pair.receiver)):
        expected = client.status()
        doors = [["--connector", daemon.ready.connector], ["--metrics", daemon.ready.metrics]]
        for door in doors:
            seen = json.loads(status_of([*door, "--json"]))
            for field in expected.__struct_fields__:
                if field != "buffer":
                    # Left out where there is nothing to say.
                    left_out = 0 if field == "engine_silent_ms" else []
                    assert seen.get(field, left_out) == getattr(expected, field), (door, field)
            assert all(seen["buffer"][field] == getattr(expected.buffer, field) for field in seen["buffer"])
            table = status_of(door)
            assert f"pd-{daemon.ready.role}, engine local" in table and "1, 0 of them wait for slots" in table
    pair.sender.cancel("two")
    assert "requests sent" in status_of(["--connector", pair.prefill.ready.connector])
    assert "not-there" in status_of(["--connector", "ipc://@not-there"], expected_code=1)
    root = pair.decode.ready.metrics.removesuffix("/metrics")
    assert json.loads(status_of(["--metrics", root, "--json"]))["role"] == "receiver"
    assert "404" in status_of(["--metrics", f"{root}/nothing"], expected_code=1)


def test_metrics_can_be_moved_and_turned_off_and_a_taken_port_is_said(start_pair):
    # Broken in production: two daemons on one host fight for a port, and nobody is told which key to change.
    pair = start_pair("local", sender_sets=["pd_metrics_port=none"])
    assert pair.prefill.ready.metrics is None
    ship(pair, "one", content(8, 1, 1))
    check_arrived(pair, "one", content(8, 1, 1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DaemonStartError) as caught:
            start_pair("local", sender_sets=[f"pd_metrics_port={port}"])
    assert caught.value.exit_code == 3
    assert "pd_metrics_port" in caught.value.stderr and str(port) in caught.value.stderr


def test_garbage_at_the_ports_is_counted_and_a_probe_is_not(start_pair):
    # Broken in production: somebody scans the ports, or a peer of another protocol is pointed there, and no graph shows it.
    pair = start_pair("local")
    name = "pd_unexpected_messages_total"
    ports = (pair.address.init_port, pair.address.alloc_port)

    def say(port, data):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as stranger:
            stranger.sendall(data)
            if data:
                # Whoever says garbage is hung up on.
                while stranger.recv(4096):
                    pass

    for port in ports:
        say(port, b"")
    assert Scrape(pair.decode)(name) == 0
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    ready = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    too_long = greeting + ready + b"\x02" + (1 << 62).to_bytes(8, "big")
    for count, (port, data) in enumerate(
        [(port, data) for port in ports for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, too_long)], 1
    ):
        say(port, data)
        eventually(lambda count=count: Scrape(pair.decode)(name) == count)
    ship(pair, "after", content(1, 2, 3))
    check_arrived(pair, "after", content(1, 2, 3))
