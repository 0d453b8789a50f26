//! The daemons as a launcher sees them: the ready line, exit codes, signals, and what is left behind.

#![allow(clippy::unwrap_used)]

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/skip.rs"]
mod skip;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use daemon::{PATIENCE, command, signal, start, start_command, wait};
use skip::skip;

/// Runs a command that has to end by itself. Its exit code, and what it said on stderr.
fn run_to_end(mut command: Command) -> (Option<i32>, String) {
    let mut child = command.spawn().unwrap();
    let status = wait(&mut child);
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    (status.code(), log)
}

fn ends(pid: u32) -> bool {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        // A zombie has ended too: its parent has not asked yet.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// How much shared memory a process has touched, in KiB.
fn shared_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

/// Whether any socket or shared memory of this process is still there.
fn left_behind(pid: u32) -> Vec<String> {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let mut found: Vec<String> =
        sockets.lines().filter(|line| line.contains(&format!("-{pid}-"))).map(str::to_owned).collect();
    for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains("pd-") || name.contains("pd_") {
            found.push(name);
        }
    }
    found
}

#[test]
fn the_ready_line_is_one_json_object_and_sigterm_ends_with_0() {
    // Broken in production: a launcher waits for ever for a line, or reads a log line as JSON.
    for role in ["sender", "receiver"] {
        let mut daemon = start(role, &[]);
        assert_eq!(daemon.ready["event"], "ready");
        assert_eq!(daemon.ready["role"], role);
        assert_eq!(daemon.ready["pid"], daemon.child.id());
        assert_eq!(daemon.ready["chunk_bytes"], 65_536);
        assert_eq!(daemon.ready["slot_count"], 16);
        assert!(daemon.ready["connector"].as_str().unwrap().starts_with("ipc://@pd-backend/"), "{}", daemon.ready);
        assert_eq!(daemon.ready["init_port"].is_u64(), role == "receiver");
        signal(daemon.child.id(), rustix::process::Signal::TERM);
        assert_eq!(wait(&mut daemon.child).code(), Some(0));
        let mut more = String::new();
        daemon.child.stdout.take().unwrap().read_to_string(&mut more).unwrap();
        assert_eq!(more, "", "nothing follows the ready line");
    }
}

#[test]
fn a_hangup_and_an_interrupt_end_it_as_sigterm_does() {
    // Broken in production: a terminal is closed, and the daemon ends without giving back what its peers and engine have of it.
    for kind in [rustix::process::Signal::HUP, rustix::process::Signal::INT] {
        let mut daemon = start("receiver", &[]);
        signal(daemon.child.id(), kind);
        assert_eq!(wait(&mut daemon.child).code(), Some(0), "{kind:?}");
    }
}

#[test]
fn sigterm_before_it_is_ready_ends_it_too() {
    // Broken in production: a worker gives up while 100 GiB are being filled with pages, and the sidecar stays.
    let mut child = command("receiver", &["pd_buffer_size=2GiB"]).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    // The buffer is allocated after this line.
    while !line.contains("configuration: ") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended before it began");
    }
    // Some pages are there, and most are not.
    let started = Instant::now();
    while shared_kib(child.id()) < 64 * 1024 {
        assert!(child.try_wait().unwrap().is_none() && started.elapsed() < PATIENCE, "it fills no buffer");
        std::thread::sleep(Duration::from_millis(1));
    }
    signal(child.id(), rustix::process::Signal::TERM);
    let status = wait(&mut child);
    // On a slow machine the signal may even come before anybody watches for it.
    assert!(status.code() == Some(0) || status.signal().is_some(), "{status}");
}

#[test]
fn nothing_is_left_behind_after_sigkill() {
    // Broken in production: every crash leaves gigabytes in /dev/shm, or a socket that stops the next start.
    let mut daemon = start("receiver", &[]);
    let pid = daemon.child.id();
    assert!(!left_behind(pid).is_empty(), "a running daemon has a socket: the test looks in the right place");
    daemon.child.kill().unwrap();
    wait(&mut daemon.child);
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

#[test]
fn a_daemon_ends_with_its_parent_when_told_to() {
    // Broken in production: an engine crashes, and its sidecar keeps the ports and the memory for good.
    let mut daemon_command = command("receiver", &[]);
    daemon_command.arg("--exit-with-parent");
    let mut shell = Command::new("sh");
    // The shell must not become the daemon, hence the second command after it.
    shell.arg("-c").arg("\"$@\"; exit 0").arg("sh").arg(daemon_command.get_program());
    shell.args(daemon_command.get_args()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut parent = start_command(shell);
    let pid = u32::try_from(parent.ready["pid"].as_u64().unwrap()).unwrap();
    assert_ne!(pid, parent.child.id());
    parent.child.kill().unwrap();
    parent.child.wait().unwrap();
    assert!(ends(pid), "the daemon outlives its launcher");
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

#[test]
fn a_port_that_is_taken_is_named_and_exits_with_3() {
    // Broken in production: two receivers fight for a port and nobody learns which.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (code, log) = run_to_end(command("receiver", &[&format!("pd_peer_init_port={port}")]));
    assert_eq!(code, Some(3), "{log}");
    assert!(log.contains(&format!("127.0.0.1:{port} is in use")), "{log}");
}

#[test]
fn a_missing_nixl_is_an_error_that_names_the_cure() {
    // Broken in production: the process aborts inside a library, and nobody knows what to install.
    let nowhere = tempfile::tempdir().unwrap();
    let mut without = command("sender", &["transfer_channel=nixl"]);
    without.env("NIXL_LIB_DIR", nowhere.path()).env_remove("LD_LIBRARY_PATH");
    let (code, log) = run_to_end(without);
    assert_eq!(code, Some(3), "{log}");
    assert!(log.contains("transfer_channel: local") && log.contains("NIXL_LIB_DIR"), "{log}");
}

#[test]
fn a_library_that_is_not_nixl_is_an_error_and_no_abort() {
    // Broken in production: an update of NIXL takes every daemon down at its first call.
    let fake = tempfile::tempdir().unwrap();
    let libc = [
        "/lib/x86_64-linux-gnu/libz.so.1",
        "/lib/x86_64-linux-gnu/libm.so.6",
        "/lib64/libm.so.6",
        "/lib/aarch64-linux-gnu/libm.so.6",
    ];
    let Some(library) = libc.iter().find(|path| Path::new(path).exists()) else {
        skip(&format!("none of {libc:?} is here to stand for a wrong library"));
        return;
    };
    std::fs::copy(library, fake.path().join("libnixl_capi.so")).unwrap();
    let mut wrong = command("sender", &["transfer_channel=nixl"]);
    wrong.env("NIXL_LIB_DIR", fake.path()).env_remove("LD_LIBRARY_PATH");
    let (code, log) = run_to_end(wrong);
    assert_eq!(code, Some(3), "{log}");
    assert!(log.contains("libnixl_capi.so"), "{log}");
}

#[test]
fn a_gpu_buffer_without_a_gpu_is_an_error_and_no_panic() {
    // Broken in production: a typo in pd_buffer_device ends in a stack trace.
    for check in [false, true] {
        let mut receiver = command("receiver", &["pd_buffer_device=cuda:0"]);
        // Where there is a GPU, it is hidden.
        receiver.env("CUDA_VISIBLE_DEVICES", "-1");
        if check {
            receiver.arg("--check");
        }
        let (code, log) = run_to_end(receiver);
        assert_eq!(code, Some(3), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        assert!(log.contains("no usable CUDA device") && log.contains("pd_buffer_device: cpu"), "{log}");
    }
}

#[test]
fn a_wrong_configuration_exits_with_2_and_check_prints_the_right_one() {
    // Broken in production: a misspelt key is ignored, and the default it hides is found out under load.
    let (code, log) = run_to_end(command("sender", &["pd_bufer_size=1GiB"]));
    assert_eq!(code, Some(2), "{log}");
    assert!(log.contains("pd_buffer_size"), "the nearest known name: {log}");
    let mut check = command("receiver", &[]);
    check.arg("--check");
    let output = check.output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("pd_buffer_size") && text.contains("pd_peer_init_port"), "{text}");
}

#[test]
fn help_explains_every_option() {
    // Broken in production: whoever stands before it at night has nothing to go by.
    for role in ["sender", "receiver"] {
        let mut help = command(role, &[]);
        help.arg("--help");
        let output = help.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for option in
            ["--config", "--set", "--model", "--kv-layout", "--tp-size", "--rank", "--check", "--exit-with-parent"]
        {
            assert!(text.contains(option), "{option} is not in the help of pd-{role}");
        }
        assert!(text.contains("Exit codes"), "{text}");
    }
}
