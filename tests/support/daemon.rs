//! The daemons as processes of a test.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest that anything here may take before the test calls it a hang.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// One that is ready.
pub struct Daemon {
    pub child: Child,
    pub ready: Value,
}

/// A command for a daemon with a chunk of 64 KiB, on free ports, with the local engine unless `sets` say otherwise.
pub fn command(role: &str, sets: &[&str]) -> Command {
    let binary = match role {
        "sender" => env!("CARGO_BIN_EXE_pd-sender"),
        _ => env!("CARGO_BIN_EXE_pd-receiver"),
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(binary);
    command
        .arg("--config")
        .arg(root.join("configs/loopback.yaml"))
        .arg("--kv-layout")
        .arg(root.join("tests/fixtures/tiny-layout.json"))
        .args(["--set", "pd_buffer_size=1MiB", "--set", "transfer_channel=local"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for set in sets {
        command.args(["--set", set]);
    }
    command
}

/// Starts one, and waits until it is ready.
pub fn start(role: &str, sets: &[&str]) -> Daemon {
    start_command(command(role, sets))
}

/// The same with this command.
pub fn start_command(mut command: Command) -> Daemon {
    let mut child = command.spawn().unwrap();
    // The reader stays open for as long as the child: a closed pipe would end it.
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let ready = serde_json::from_str(&line).unwrap_or_else(|error| {
        let mut log = String::new();
        child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        panic!("no ready line ({error}): {line:?}\n{log}");
    });
    child.stdout = Some(stdout.into_inner());
    Daemon { child, ready }
}

/// Waits for the end of a process that has to end by itself.
pub fn wait(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it did not end within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Signals a process of this test.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
