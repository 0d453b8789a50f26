"""Launching and ending a daemon, with scripts in its place."""

import os
import stat
import sys

import pytest

from pd_backend import Daemon, DaemonStartError, find_binary

READY = (
    '{"event":"ready","role":"sender","pid":1,"connector":"ipc://@x","init_port":null,"alloc_port":null,'
    '"metrics":null,"chunk_bytes":1024,"slot_count":4,"something_new":true}'
)


@pytest.fixture
def script(tmp_path):
    def write(body):
        path = tmp_path / "pd-fake"
        path.write_text(f"#!{sys.executable}\nimport sys, time, signal, os\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return write


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_ready_daemon_is_described_and_ended_by_sigterm(script):
    # Broken in production: the engine never learns where its daemon listens, or leaves it behind.
    path = script(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"print(sys.argv[1:], file=sys.stderr, flush=True)\nprint({READY!r}, flush=True)\ntime.sleep(60)"
    )
    with Daemon(path, ["--config", "x"]) as daemon:
        assert daemon.ready.connector == "ipc://@x"
        assert daemon.ready.slot_count == 4
        assert daemon.ready.init_port is None
        assert daemon.exit_code() is None
    assert daemon.exit_code() == 0
    assert gone(daemon.pid)
    assert "--exit-with-parent" in daemon.stderr()
    daemon.close()


def test_a_daemon_that_ends_gives_its_exit_code_and_its_last_words(script):
    # Broken in production: the cure is in the daemon's error text, and nobody gets to see it.
    path = script("print('pd_buffer_size is too small', file=sys.stderr)\nsys.exit(2)")
    with pytest.raises(DaemonStartError) as caught:
        Daemon(path)
    assert caught.value.exit_code == 2
    assert "pd_buffer_size is too small" in str(caught.value)


def test_a_daemon_that_is_never_ready_is_killed_in_time(script):
    # Broken in production: the engine's start hangs for as long as the daemon does.
    path = script("print(os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(60)")
    with pytest.raises(DaemonStartError, match="not ready within") as caught:
        Daemon(path, ready_timeout_s=5)
    assert gone(int(caught.value.stderr))


def test_another_first_line_is_refused(script):
    # Broken in production: a wrapper's greeting is taken for the endpoint.
    for line in ("hello", '{"event":"starting"}', '{"event":"ready"}', "[]"):
        with pytest.raises(DaemonStartError, match="expected its ready line"):
            Daemon(script(f"print({line!r}, flush=True)\ntime.sleep(60)"))


def test_a_deaf_daemon_is_killed_and_a_talkative_one_does_not_block(script):
    # Broken in production: a daemon whose log nobody reads stops when the pipe is full, or never ends.
    path = script(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('x' * 1_000_000, file=sys.stderr)\n"
        f"print({READY!r}, flush=True)\ntime.sleep(60)"
    )
    daemon = Daemon(path, stop_timeout_s=0.2)
    assert daemon.terminate() == -9
    assert gone(daemon.pid)


def test_a_binary_that_is_nowhere_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    # Broken in production: "file not found", without which file or where it should be.
    with pytest.raises(DaemonStartError, match=f"pd-sender was not found in {tmp_path}"):
        find_binary("pd-sender", tmp_path)
    monkeypatch.setenv("PD_BIN_DIR", str(tmp_path))
    with pytest.raises(DaemonStartError, match="make build"):
        find_binary("pd-sender")
    monkeypatch.delenv("PD_BIN_DIR")
    assert find_binary("sh").is_file()
    with pytest.raises(DaemonStartError, match="cannot start"):
        Daemon(tmp_path / "absent")
