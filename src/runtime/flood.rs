//! A test: a receiver that is flooded while its engine's thread is busy. What it holds stays bounded, and its peers are
//! served.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::engine_work::Work;
use super::health::health_probe;
use super::ports::Ports;
use super::{RunOptions, daemon, driver, identity, lifecycle, setup};
use crate::config::{Config, Role, fuzzing};
use crate::connector::Client;
use crate::connector::message::{CONNECTOR_API_VERSION, Reply, Request};
use crate::ids::{ChunkKey, METADATA_LEN_BYTES_MAX, ReceiverAddress, RequestId, Seq};
use crate::wire::message::{InitExtension, InitRequest};
use crate::wire::{Message, encode};

const CHILD_ROLE: &str = "PD_TEST_FLOOD_ROLE";
const SOON: Duration = Duration::from_secs(120);

/// Connections of the flood.
const FLOOD: usize = 1_000;
/// What the receiver may need at its most, in KiB: itself, what is not complete, what waits, and as much again of what its
/// allocator keeps of messages that it has let go.
const MEMORY_KIB_MAX: u64 = 512 * 1024;

/// Lets this process, and those that it starts, open so many files. False: they may not, and the test is skipped.
pub(super) fn may_open(files: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    if limit.maximum.is_some_and(|maximum| maximum < files) {
        eprintln!("SKIPPED: this process may open {:?} files; raise `ulimit -Hn` to {files} to run it", limit.maximum);
        return false;
    }
    let current = limit.current.map(|current| current.max(files));
    setrlimit(Resource::Nofile, Rlimit { current, maximum: limit.maximum }).unwrap();
    true
}

fn config(role: Role) -> Config {
    let text = "pd_buffer_size: 4MiB\ntransfer_channel: local\npd_metrics_port: none\npd_peer_init_port: 0\n\
                pd_peer_alloc_port: 0\npd_handshake_timeout_sec: 120\npd_peer_timeout_sec: 120\n";
    fuzzing::read(role, text).unwrap()
}

/// Not a test by itself: a daemon. Of a receiver, a line on stdin makes the engine's thread busy, and the next one idle.
#[test]
fn child_daemon() {
    let Ok(role) = std::env::var(CHILD_ROLE) else { return };
    let (busy, lines) = mpsc::channel::<mpsc::Sender<Work>>();
    // The parent closes stdin, or dies.
    thread::spawn(move || {
        let mut stdin = std::io::stdin().lines();
        let work = lines.recv().ok();
        while stdin.next().is_some() {
            let (idle, wait) = mpsc::channel::<()>();
            let call = Work::Call(Box::new(move || assert!(wait.recv().is_err(), "the gate is dropped")));
            work.as_ref().unwrap().send(call).unwrap();
            if stdin.next().is_none() {
                break;
            }
            drop(idle);
        }
        std::process::exit(0);
    });
    if role == "sender" {
        return super::run(config(Role::Sender), RunOptions::default()).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = config(Role::Receiver);
        let (mailbox, mut inbox) = driver::mailbox::<daemon::DaemonEvent>();
        lifecycle::watch(&mailbox.events, false).unwrap();
        let instance = identity::instance_name(&config);
        let (_probe, responder) = health_probe();
        let ports = Ports::bind(&config, &mailbox.messages).await.unwrap();
        let parts =
            setup::start_memory_and_engine(&config, &instance, &mailbox.events, &mut inbox).await.unwrap().unwrap();
        busy.send(parts.engine.work().unwrap()).unwrap();
        let queues = (mailbox.messages, mailbox.events, inbox);
        daemon::serve(config, &instance, queues, ports, parts, (None, responder)).await.unwrap();
    });
}

struct FloodedDaemon {
    child: Child,
    stdin: ChildStdin,
    connector: String,
    ports: [u16; 2],
}

impl FloodedDaemon {
    fn start(role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["runtime::flood::child_daemon", "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD_ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ready = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .find_map(|line| line.unwrap().split_once("{\"event\"").map(|(_, rest)| format!("{{\"event\"{rest}")))
            .expect("it becomes ready");
        let ready: serde_json::Value = serde_json::from_str(&ready).unwrap();
        let port = |name: &str| ready[name].as_u64().unwrap_or(0) as u16;
        Self {
            stdin: child.stdin.take().unwrap(),
            connector: ready["connector"].as_str().unwrap().to_owned(),
            ports: [port("init_port"), port("alloc_port")],
            child,
        }
    }

    /// Makes a receiver's engine busy, or idle again.
    fn toggle_engine(&mut self) {
        self.stdin.write_all(b"\n").unwrap();
    }

    fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }
}

impl Drop for FloodedDaemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// An engine beside a sender of its own.
struct Engine {
    sender: FloodedDaemon,
    client: Client,
}

impl Engine {
    async fn start() -> Self {
        let sender = FloodedDaemon::start("sender");
        let mut client = Client::connect(&sender.connector, SOON).await.unwrap();
        let attach = Request::Attach { id: Seq(1), version: CONNECTOR_API_VERSION, client: "test".into() };
        assert!(matches!(client.request(&attach).await.unwrap(), Reply::Attached { .. }));
        Self { sender, client }
    }

    /// A request to this receiver gets its slots.
    async fn open(&mut self, id: u64, receiver: &FloodedDaemon) {
        let [init_port, alloc_port] = receiver.ports;
        let open = Request::Open {
            id: Seq(id),
            req_id: RequestId::new(format!("{}-{id}", self.sender.child.id())).unwrap(),
            keys: vec![ChunkKey::new(format!("{}-{id}", self.sender.child.id())).unwrap()],
            last_chunk_tokens: 1,
            receiver: ReceiverAddress { host: "127.0.0.1".into(), init_port, alloc_port },
            wait_ms: None,
            groups: Vec::new(),
            stage: false,
        };
        match tokio::time::timeout(SOON, self.client.request(&open)).await.expect("an answer").unwrap() {
            Reply::Opened { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Connections that each send one handshake, as much of it as the receiver takes.
struct Flood {
    streams: Vec<(TcpStream, usize)>,
    message: Vec<u8>,
    /// Where in the message the number of its connection is, of [`Self::NUMBER_LEN`] digits.
    number_at: usize,
}

impl Flood {
    const NUMBER_LEN: usize = 8;

    /// A handshake that nothing is wrong with, but for what its metadata says.
    fn new(port: u16, count: usize, metadata_len_bytes: usize) -> Self {
        let number = "n".repeat(Self::NUMBER_LEN);
        let request = InitRequest {
            local_meta_bytes: vec![7; metadata_len_bytes],
            pd: Some(InitExtension {
                seq: Seq(1),
                hello: identity::hello(&config(Role::Sender), &format!("flood-{number}"), "local"),
                agent_name: "flood".into(),
                connected: Vec::new(),
            }),
        };
        let payload = encode(&Message::NixlInitRequest(request));
        let mut message = vec![0; 64];
        (message[0], message[9], message[10]) = (0xff, 0x7f, 3);
        message[12..16].copy_from_slice(b"NULL");
        message.extend(b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x01\x00\x02");
        message.extend((payload.len() as u64).to_be_bytes());
        message.extend(payload);
        let number_at = message.windows(number.len()).rposition(|window| window == number.as_bytes()).unwrap();
        let connect = |_| {
            let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            // The kernel is to hold little of it.
            rustix::net::sockopt::set_socket_send_buffer_size(&stream, 64 * 1024).unwrap();
            stream.set_nonblocking(true).unwrap();
            (stream, 0)
        };
        Self { streams: (0..count).map(connect).collect(), message, number_at }
    }

    /// Writes what can be written, and counts the bytes: one message after the other for as long as they are taken, so that
    /// they are complete.
    fn push(&mut self, pushed: &AtomicU64) {
        const PATIENCE: u32 = 100;
        let (before, after) = (self.number_at, self.number_at + Self::NUMBER_LEN);
        let mut patience = PATIENCE;
        for (number, (stream, at)) in self.streams.iter_mut().enumerate() {
            let number = format!("{number:0width$}", width = Self::NUMBER_LEN);
            while *at < self.message.len() {
                let rest = match *at {
                    at if at < before => &self.message[at..before],
                    at if at < after => &number.as_bytes()[at - before..],
                    at => &self.message[at..],
                };
                match stream.write(rest) {
                    Ok(count) => {
                        *at += count;
                        if patience > 0 {
                            patience = PATIENCE;
                        }
                        pushed.fetch_add(count as u64, Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock && patience > 0 => {
                        patience -= 1;
                        thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // The receiver has hung up.
                    Err(_) => *at = self.message.len(),
                }
            }
        }
    }
}

/// Pushes a flood until told to stop.
struct Pump {
    pushed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Pump {
    fn start(mut flood: Flood) -> Self {
        let (pushed, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (count, stopped) = (Arc::clone(&pushed), Arc::clone(&stop));
        let body = move || {
            while !stopped.load(Ordering::Relaxed) {
                flood.push(&count);
                thread::sleep(Duration::from_millis(1));
            }
        };
        Self { pushed, stop, thread: Some(thread::spawn(body)) }
    }

    /// Returns when the receiver takes no more, or all has been taken.
    fn settle(&self) {
        const QUIET: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + SOON;
        let mut seen = (self.pushed.load(Ordering::Relaxed), Instant::now());
        while seen.1.elapsed() < QUIET && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
            let pushed = self.pushed.load(Ordering::Relaxed);
            if pushed != seen.0 {
                seen = (pushed, Instant::now());
            }
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

#[tokio::test]
async fn a_flood_of_handshakes_waits_in_the_kernel_while_the_engine_is_busy() {
    // Broken in production: whoever reaches the port ends the host with its memory, while the engine's thread is busy.
    if !may_open(2 * FLOOD as u64 + 500) {
        return;
    }
    for (what, metadata_len_bytes) in [
        ("handshakes of 19 MiB", 19 << 20),
        ("handshakes as long as a message may be there", (4 << 20) - 4096),
        ("handshakes with as much metadata as is read", METADATA_LEN_BYTES_MAX),
        ("handshakes of 64 KiB", 64 << 10),
    ] {
        let mut receiver = FloodedDaemon::start("receiver");
        let mut known = Engine::start().await;
        known.open(2, &receiver).await;
        receiver.toggle_engine();
        let pump = Pump::start(Flood::new(receiver.ports[0], FLOOD, metadata_len_bytes));
        pump.settle();
        let pushed_mib = pump.pushed.load(Ordering::Relaxed) >> 20;
        let peak_kib = receiver.peak_kib();
        println!("{peak_kib:>8} KiB at most, after {FLOOD} {what}, of which {pushed_mib} MiB were taken");
        assert!(peak_kib <= MEMORY_KIB_MAX, "{FLOOD} {what}: the receiver has needed {peak_kib} KiB");
        // Who is connected is served during the flood, and who is not when the engine is idle.
        known.open(3, &receiver).await;
        receiver.toggle_engine();
        let mut new = Engine::start().await;
        new.open(2, &receiver).await;
        let peak_kib = receiver.peak_kib();
        println!("{peak_kib:>8} KiB at most, once the engine was idle again");
        assert!(peak_kib <= MEMORY_KIB_MAX, "{FLOOD} {what}, then idle: the receiver has needed {peak_kib} KiB");
    }
}
