//! The yardstick of `pd-bench latency`: a ZeroMQ message there and back, between two processes, over TCP. It is one
//! byte long: our sockets take a message without any for a mistake.

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::side_channel::{Dealer, DealerReceiver, DealerSender, RouterEvent, RouterSocket};

use super::error::BenchError;

/// A DEALER here, and a ROUTER in a process of its own that returns what it gets.
pub(super) struct Echo {
    sender: DealerSender,
    receiver: DealerReceiver,
    patience: Duration,
    // Killed when dropped.
    echo: Child,
}

impl Echo {
    /// Starts the other process and connects to it.
    ///
    /// # Errors
    /// When that takes longer than `patience`, or fails.
    pub(super) async fn start(patience: Duration) -> Result<Self, BenchError> {
        let program = std::env::current_exe()
            .map_err(|source| BenchError::Machine { what: "finding the running program", source })?;
        let mut echo = Command::new(&program)
            .arg("echo")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| BenchError::Spawn { program, source })?;
        let stdout = echo.stdout.take().ok_or_else(|| failed("the echo has no standard output"))?;
        let mut port = String::new();
        match tokio::time::timeout(patience, BufReader::new(stdout).read_line(&mut port)).await {
            Ok(Ok(len)) if len > 0 => {}
            Ok(Ok(_)) => return Err(failed("the echo ended before it was ready")),
            Ok(Err(error)) => return Err(failed(error)),
            Err(_) => return Err(failed("the echo was not ready in time")),
        }
        let endpoint = format!("tcp://127.0.0.1:{}", port.trim_end());
        let (sender, receiver) = Dealer::connect(&endpoint, patience).await.map_err(failed)?;
        Ok(Self { sender, receiver, patience, echo })
    }

    /// How long one message takes there and back.
    ///
    /// # Errors
    /// When it does not come back.
    pub(super) async fn round_trip(&mut self) -> Result<Duration, BenchError> {
        let started = Instant::now();
        self.sender.try_send(Bytes::from_static(b".")).map_err(failed)?;
        tokio::time::timeout(self.patience, self.receiver.recv())
            .await
            .map_err(|_| failed("a message did not come back"))?
            .map_err(failed)?;
        Ok(started.elapsed())
    }

    /// Ends the other process.
    pub(super) async fn stop(mut self) {
        // It ends by itself when its standard input does; killing it is for when it does not.
        drop(self.echo.stdin.take());
        let _ = tokio::time::timeout(Duration::from_secs(1), self.echo.wait()).await;
    }
}

/// The other process: prints its port and returns what it gets, until its standard input ends.
///
/// # Errors
/// When it cannot listen.
pub(super) async fn serve() -> Result<(), BenchError> {
    let RouterSocket { sender, mut receiver, port, .. } =
        RouterSocket::bind_tcp("127.0.0.1", 0).await.map_err(failed)?;
    println!("{port}");
    let (ended, mut end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = ended.send(());
    });
    loop {
        let event = tokio::select! {
            event = receiver.recv() => event,
            _ = &mut end => return Ok(()),
        };
        match event {
            Some(RouterEvent::Message { peer, payload }) => sender.try_send(&peer, payload).map_err(failed)?,
            Some(RouterEvent::Gone { .. } | RouterEvent::Garbage) => {}
            None => return Err(failed("the socket was closed")),
        }
    }
}

fn failed(reason: impl ToString) -> BenchError {
    BenchError::Ping { reason: reason.to_string() }
}
