//! The two daemons as child processes: command line, ready line, watch, end.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::config::Role;
use crate::connector::{ReadyLine, StdoutLine};

use super::error::BenchError;
use super::options::DaemonOptions;

/// A ready line is a few hundred bytes.
const READY_LINE_LEN_BYTES_MAX: u64 = 64 * 1024;
/// From SIGTERM to SIGKILL: longer than a daemon's own drain.
const STOP_AFTER: Duration = Duration::from_secs(15);

/// What a measurement adds to the daemons' command line; the user's own `--set` come later and win.
#[derive(Debug, Clone, Default)]
pub(super) struct Extra {
    /// `key=value`.
    pub set: Vec<String>,
    /// A layout for when the user names none.
    pub kv_layout: Option<PathBuf>,
    /// Each daemon sends and receives.
    pub both_ways: bool,
}

/// Both daemons, running. Dropped, they are killed.
#[derive(Debug)]
pub(super) struct Daemons {
    sender: Child,
    receiver: Child,
    /// The sender's.
    pub sender_ready: ReadyLine,
    /// The receiver's.
    pub receiver_ready: ReadyLine,
}

impl Daemons {
    /// Starts both and waits for their ready lines.
    ///
    /// # Errors
    /// When one cannot be started, ends, or is not ready in time; the other is killed then.
    pub(super) async fn start(options: &DaemonOptions, extra: &Extra) -> Result<Self, BenchError> {
        let ready_after = Duration::from_secs(options.timeout_s);
        // Both at once: preparing a large buffer takes a while.
        let mut receiver = spawn(Role::Receiver, options, extra)?;
        let mut sender = spawn(Role::Sender, options, extra)?;
        let receiver_ready = ready_line(Role::Receiver, &mut receiver, ready_after).await?;
        let sender_ready = ready_line(Role::Sender, &mut sender, ready_after).await?;
        Ok(Self { sender, receiver, sender_ready, receiver_ready })
    }

    /// Runs `work` until it ends, a daemon ends, or somebody presses Ctrl-C.
    ///
    /// # Errors
    /// Those of `work`; [`BenchError::DaemonEnded`]; [`BenchError::Interrupted`].
    pub(super) async fn watch<T>(
        &mut self,
        work: impl Future<Output = Result<T, BenchError>>,
    ) -> Result<T, BenchError> {
        tokio::select! {
            biased;
            outcome = work => outcome,
            status = self.sender.wait() => Err(ended(Role::Sender, status)),
            status = self.receiver.wait() => Err(ended(Role::Receiver, status)),
            _ = tokio::signal::ctrl_c() => Err(BenchError::Interrupted),
        }
    }

    /// Ends both with SIGTERM, and with SIGKILL where that does not help.
    ///
    /// # Errors
    /// [`BenchError::DaemonEnded`] when one did not end well, [`BenchError::NotStopped`] when it had to be killed.
    pub(super) async fn stop(mut self) -> Result<(), BenchError> {
        for child in [&self.sender, &self.receiver] {
            terminate(child);
        }
        let sender = stopped(Role::Sender, &mut self.sender).await;
        let receiver = stopped(Role::Receiver, &mut self.receiver).await;
        sender.and(receiver)
    }
}

fn spawn(role: Role, options: &DaemonOptions, extra: &Extra) -> Result<Child, BenchError> {
    let beside = own_folder()?;
    let program = options.bin_dir.as_deref().unwrap_or(&beside).join(format!("pd-{}", role.as_str()));
    let config = match &options.config {
        Some(config) => config.clone(),
        None => find_config(&beside)?,
    };
    let mut command = Command::new(&program);
    command
        .args(arguments(role, options, extra, &config))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    if !options.verbose && std::env::var_os("PD_LOG").is_none() {
        command.env("PD_LOG", "warn");
    }
    command.spawn().map_err(|source| BenchError::Spawn { program, source })
}

/// The folder of the running program.
fn own_folder() -> Result<PathBuf, BenchError> {
    let program = std::env::current_exe()
        .map_err(|source| BenchError::Machine { what: "finding the running program", source })?;
    Ok(program.parent().unwrap_or(Path::new("/")).to_owned())
}

/// `configs/loopback.yaml` here, or in the folder of the program or one above it: a build's is `target/release`.
fn find_config(beside: &Path) -> Result<PathBuf, BenchError> {
    let here = Path::new("configs/loopback.yaml").to_owned();
    std::iter::once(here)
        .chain(beside.ancestors().map(|folder| folder.join("configs/loopback.yaml")))
        .find(|path| path.is_file())
        .ok_or_else(|| BenchError::NoConfig { looked_beside: beside.to_owned() })
}

fn arguments(role: Role, options: &DaemonOptions, extra: &Extra, config: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["--config".into(), config.into(), "--exit-with-parent".into()];
    let default_model = config.with_file_name("models").join("llama-3-8b.json");
    if let Some(model) = &options.model {
        arguments.extend(["--model".into(), model.into()]);
    } else if let Some(layout) = options.kv_layout.as_ref().or(extra.kv_layout.as_ref()) {
        arguments.extend(["--kv-layout".into(), layout.into()]);
    } else if default_model.is_file() {
        arguments.extend(["--model".into(), default_model.into()]);
    }
    if let Some(tp_size) = options.tp_size {
        arguments.extend(["--tp-size".into(), tp_size.to_string().into()]);
    }
    // Free ones: two runs on one machine do not meet.
    let listens = role.receives() || extra.both_ways;
    let ports: &[&str] = if listens { &["pd_peer_init_port=0", "pd_peer_alloc_port=0"] } else { &[] };
    let both = extra.both_ways.then(|| "pd_role=both".to_owned());
    let engine = options.engine.map(|engine| format!("transfer_channel={}", engine.as_str()));
    let ports = ports.iter().map(|port| (*port).to_owned());
    for set in ports.chain(both).chain(extra.set.iter().cloned()).chain(engine).chain(options.set.iter().cloned()) {
        arguments.extend(["--set".into(), set.into()]);
    }
    arguments
}

async fn ready_line(role: Role, child: &mut Child, within: Duration) -> Result<ReadyLine, BenchError> {
    let not_ready = |reason: String| BenchError::NotReady { role: role.as_str(), reason };
    let stdout = child.stdout.as_mut().ok_or_else(|| not_ready("it has no standard output".to_owned()))?;
    let mut line = String::new();
    let mut reader = BufReader::new(stdout.take(READY_LINE_LEN_BYTES_MAX));
    let read = tokio::select! {
        read = tokio::time::timeout(within, reader.read_line(&mut line)) => read,
        _ = tokio::signal::ctrl_c() => return Err(BenchError::Interrupted),
    };
    match read {
        Err(_) => Err(not_ready(format!("no ready line within {} s (--timeout-s)", within.as_secs()))),
        Ok(Err(error)) => Err(not_ready(format!("reading its standard output: {error}"))),
        // Nothing more will come: it is ending, and its exit code says more than its silence.
        Ok(Ok(0)) => match tokio::time::timeout(STOP_AFTER, child.wait()).await {
            Ok(status) => Err(ended(role, status)),
            Err(_) => Err(not_ready("it closed its standard output without a ready line".to_owned())),
        },
        Ok(Ok(_)) => parse_ready_line(&line).map_err(not_ready),
    }
}

fn parse_ready_line(line: &str) -> Result<ReadyLine, String> {
    match serde_json::from_str(line) {
        Ok(StdoutLine::Ready(ready)) => Ok(ready),
        Err(error) => Err(format!("it printed {:?}, expected its ready line: {error}", line.trim_end())),
    }
}

fn ended(role: Role, status: std::io::Result<std::process::ExitStatus>) -> BenchError {
    match status {
        Ok(status) => BenchError::DaemonEnded { role: role.as_str(), code: status.code() },
        Err(source) => BenchError::Machine { what: "waiting for a daemon", source },
    }
}

/// By its own pid, which cannot be another process's: it is not reaped before `wait`.
fn terminate(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended by itself, which `wait` will say.
        let _ = kill_process(pid, Signal::TERM);
    }
}

async fn stopped(role: Role, child: &mut Child) -> Result<(), BenchError> {
    match tokio::time::timeout(STOP_AFTER, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(status) => Err(ended(role, status)),
        Err(_) => {
            let killed = child.kill().await;
            Err(match killed {
                Ok(()) => BenchError::NotStopped { role: role.as_str(), waited: STOP_AFTER },
                Err(source) => BenchError::Machine { what: "killing a daemon that did not stop", source },
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::options::{BenchOptions, Command};
    use super::*;

    fn options(arguments: &[&str]) -> DaemonOptions {
        let all = ["pd-bench", "idle"].iter().chain(arguments);
        match BenchOptions::parse_from(all).command {
            Command::Idle(options) => options.daemons,
            _ => unreachable!("idle was asked for"),
        }
    }

    fn words(role: Role, arguments_given: &[&str], extra: &Extra) -> Vec<String> {
        arguments(role, &options(arguments_given), extra, Path::new("/none/loopback.yaml"))
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect()
    }

    #[test]
    fn the_users_settings_come_last_and_win() {
        // Broken in production: --set is silently overridden by the bench, and something else is measured.
        let set = vec!["pd_buffer_size=64MiB".to_owned()];
        let extra = Extra { set, kv_layout: Some("/l.json".into()), both_ways: false };
        let given = ["--engine", "local", "--set", "pd_buffer_size=1GiB", "--tp-size", "2"];
        assert_eq!(
            words(Role::Sender, &given, &extra),
            [
                "--config",
                "/none/loopback.yaml",
                "--exit-with-parent",
                "--kv-layout",
                "/l.json",
                "--tp-size",
                "2",
                "--set",
                "pd_buffer_size=64MiB",
                "--set",
                "transfer_channel=local",
                "--set",
                "pd_buffer_size=1GiB",
            ]
        );
        let receiver = words(Role::Receiver, &["--model", "m.json"], &Extra::default());
        assert_eq!(receiver[3..5], ["--model", "m.json"]);
        assert_eq!(receiver[6], "pd_peer_init_port=0");
        let sender = words(Role::Sender, &["--model", "m.json"], &Extra { both_ways: true, ..Extra::default() });
        assert_eq!([&sender[6], &sender[10]], ["pd_peer_init_port=0", "pd_role=both"]);
    }

    #[test]
    fn a_ready_line_is_taken_and_anything_else_is_named() {
        // Broken in production: a daemon that prints something else first is waited for until the deadline.
        let line = r#"{"event":"ready","role":"receiver","pid":7,"connector":"ipc://@x","init_port":1,"alloc_port":2,
            "metrics":null,"engine":"local","chunk_bytes":65536,"slot_count":4}"#;
        let ready = parse_ready_line(line).unwrap();
        assert_eq!((ready.connector.as_str(), ready.init_port, ready.alloc_port), ("ipc://@x", Some(1), Some(2)));
        assert!(parse_ready_line("hello\n").unwrap_err().contains("\"hello\""));
        assert!(parse_ready_line(&line.replace("\"ready\"", "\"other\"")).unwrap_err().contains("other"));
    }
}
