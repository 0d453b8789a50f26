//! What strangers can do to a bound socket: everything short of a valid message, thrown at a process of its own. After
//! each kind a well-behaved peer is answered, and the process has not grown.

#![allow(clippy::unwrap_used)]

#[path = "support/skip.rs"]
mod skip;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pd_backend::side_channel::{Dealer, RouterEvent, RouterSocket};
use pd_backend::wire::{self, Message, limits::MESSAGE_LEN_BYTES_MAX};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use rustix::process::{Resource, Rlimit, setrlimit};
use skip::skip;

const SOON: Duration = Duration::from_secs(60);
const CHILD_FILES_MAX: &str = "PD_TEST_GARBAGE_FILES_MAX";

/// What one process may need at its most, in KiB: itself, and a few of the largest messages under way at a time.
const MEMORY_KIB_MAX: u64 = 256 * 1024;

/// Not a test by itself: the process under attack. It answers every message with what it made of it.
#[test]
fn child_router() {
    let Ok(files_max) = std::env::var(CHILD_FILES_MAX) else {
        return;
    };
    let limit = Some(files_max.parse().unwrap());
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let serving = runtime.spawn(async {
        let mut router = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
        println!("\nport={}", router.port);
        while let Some(event) = router.receiver.recv().await {
            if let RouterEvent::Message { peer, payload } = event {
                let answer = match wire::decode::<Message>(&payload) {
                    Ok(message) => message.type_name().to_owned(),
                    Err(error) => error.to_string(),
                };
                // A peer that does not read loses its answers, which is its own business.
                let _ = router.sender.try_send(&peer, Bytes::from(answer));
            }
        }
    });
    // The parent closes stdin, or dies.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    runtime.block_on(serving).unwrap();
}

struct Target {
    child: Child,
    _stdin: ChildStdin,
    port: u16,
}

impl Target {
    fn start(files_max: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_router", "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD_FILES_MAX, files_max.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let port = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .find_map(|line| line.unwrap().strip_prefix("port=").map(|port| port.parse().unwrap()))
            .expect("the child binds a port");
        Self { _stdin: child.stdin.take().unwrap(), child, port }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        stream
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Sends these bytes on a connection of their own and returns it. That the other end closes meanwhile is fine.
    fn throw(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        stream
    }

    /// As `throw`, and expects to be hung up on.
    #[track_caller]
    fn throw_and_be_closed(&self, bytes: &[u8]) {
        let mut stream = self.throw(bytes);
        if let Err(error) = stream.read_to_end(&mut Vec::new()) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "closed, not left open");
        }
    }

    /// A message of an ordinary large request is answered, whatever others are about to say.
    #[track_caller]
    fn assert_long_message_is_answered(&self) {
        let padding = vec![7; 2 << 20];
        let notice =
            [&b"\x83\xa4type\xaaProxyNotif\xa6req_id\xa1r\xa3pad\xc6"[..], &(2_u32 << 20).to_be_bytes(), &padding];
        let mut stream = self.throw(&message(&notice.concat()));
        let mut heard = vec![0; 64 + 8];
        stream.read_exact(&mut heard).unwrap();
        let mut answer = vec![0; 300];
        let len_bytes = stream.read(&mut answer).unwrap();
        assert!(len_bytes > 2, "a long message is answered");
    }

    /// A well-behaved peer is answered, and memory has not grown out of bounds, ever.
    #[track_caller]
    fn assert_well(&mut self, after: &str) {
        assert!(self.child.try_wait().unwrap().is_none(), "after {after} the process is gone");
        let endpoint = format!("tcp://127.0.0.1:{}", self.port);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = runtime.block_on(async {
            tokio::time::timeout(SOON, async {
                let (sender, mut receiver) = Dealer::connect(&endpoint, SOON).await.unwrap();
                sender.try_send(Bytes::from_static(b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa1r")).unwrap();
                receiver.recv().await.unwrap()
            })
            .await
        });
        assert_eq!(answer.unwrap_or_else(|_| panic!("after {after} nobody answers")), "ProxyNotif", "after {after}");
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let peak_kib: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|line| line.trim().strip_suffix(" kB"))
            .unwrap()
            .parse()
            .unwrap();
        assert!(peak_kib <= MEMORY_KIB_MAX, "after {after} the process has needed {peak_kib} KiB");
        println!("{peak_kib:>8} KiB at most, after {after}");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn greeting() -> Vec<u8> {
    let mut greeting = vec![0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn property(name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[name.len() as u8][..], name, &(value.len() as u32).to_be_bytes(), value].concat()
}

fn long_frame(flags: u8, len_bytes: u64, content: &[u8]) -> Vec<u8> {
    [&[flags | 2][..], &len_bytes.to_be_bytes(), content].concat()
}

/// A greeting and a READY with these properties.
fn hello(properties: &[Vec<u8>]) -> Vec<u8> {
    let ready = [b"\x05READY".to_vec(), properties.concat()].concat();
    [greeting(), long_frame(4, ready.len() as u64, &ready)].concat()
}

fn dealer() -> Vec<u8> {
    hello(&[property(b"Socket-Type", b"DEALER")])
}

/// A DEALER that sends this payload.
fn message(payload: &[u8]) -> Vec<u8> {
    [dealer(), vec![1, 0], long_frame(0, payload.len() as u64, payload)].concat()
}

#[test]
fn frames_that_lie_about_their_length_are_hung_up_on() {
    // Broken in production: nine bytes from anybody who can reach a port end the daemon.
    let mut target = Target::start(1024);
    for len_bytes in [MESSAGE_LEN_BYTES_MAX as u64 + 4096, 1 << 36, 1 << 62, (1 << 63) - 1, u64::MAX] {
        for flags in [0, 1, 4, 5] {
            target.throw_and_be_closed(&[greeting(), long_frame(flags, len_bytes, b"x")].concat());
            target.throw_and_be_closed(&[dealer(), long_frame(flags, len_bytes, b"x")].concat());
            // Behind a first frame, so that only the sum is too much.
            target.throw_and_be_closed(&[dealer(), vec![1, 0], long_frame(flags, len_bytes, b"x")].concat());
        }
        target.assert_well(&format!("a frame of {len_bytes} bytes"));
    }
}

#[test]
fn messages_without_end_are_hung_up_on() {
    // Broken in production: one peer fills the memory of a daemon with a message that never ends.
    let mut target = Target::start(1024);
    for (what, frame) in [
        ("empty frames", vec![1, 0]),
        ("frames of a byte", vec![1, 1, 7]),
        ("frames of 255 bytes", [&[1, 255][..], &[7; 255]].concat()),
        ("frames of 1 MiB", long_frame(1, 1 << 20, &[7; 1 << 20])),
    ] {
        let frames = frame.repeat((1 << 20) / frame.len() + 1);
        let mut stream = target.throw(&dealer());
        let mut sent_count = 0;
        while stream.write_all(&frames).is_ok() {
            sent_count += 1;
            assert!(sent_count < 128, "{what}: 128 MiB of one message are still welcome");
        }
        target.assert_well(&format!("{what} without end"));
    }
}

#[test]
fn noise_is_hung_up_on() {
    // Broken in production: a port scanner or an HTTP client ends the daemon.
    let mut target = Target::start(1024);
    let mut random = StdRng::seed_from_u64(7);
    for round in 0..300 {
        let mut noise = vec![0; random.random_range(1..4096)];
        random.fill_bytes(&mut noise);
        let prefix = match round % 3 {
            0 => Vec::new(),
            1 => greeting(),
            _ => dealer(),
        };
        drop(target.throw(&[prefix, noise].concat()));
    }
    target.assert_well("random bytes");
    target.throw_and_be_closed(&[&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[b' '; 64]].concat());
    target.assert_well("an HTTP request");
}

#[test]
fn handshakes_that_go_wrong_are_hung_up_on() {
    // Broken in production: a peer of another kind or version, or a hostile one, stops the daemon.
    let mut target = Target::start(1024);
    let mut old = greeting();
    old[10] = 1;
    let mut plain = greeting();
    plain[12..17].copy_from_slice(b"PLAIN");
    let mut unknown = greeting();
    unknown[12..16].copy_from_slice(b"NUKE");
    target.throw_and_be_closed(&old);
    target.throw_and_be_closed(&unknown);
    target.throw_and_be_closed(&[plain, b"\x04\x08\x05HELLO\x00\x00".to_vec()].concat());
    for socket_type in [&b"PUB"[..], b"SUB", b"ROUTE", b"PUSH", b"PULL", b"STREAM", b"PAIR", b"REP", b"", b"\xff"] {
        target.throw_and_be_closed(&hello(&[property(b"Socket-Type", socket_type)]));
    }
    target.throw_and_be_closed(&hello(&[]));
    target.throw_and_be_closed(&hello(&[property(b"\xff\xfe", b"")]));
    target.throw_and_be_closed(&hello(&[property(b"Socket-Type", b"DEALER"), property(b"Identity", &[7; 256])]));
    target.throw_and_be_closed(&[greeting(), b"\x00\x05hello".to_vec()].concat());
    target.throw_and_be_closed(&[greeting(), b"\x04\x00".to_vec()].concat());
    target.throw_and_be_closed(&[greeting(), b"\x04\x01\x05".to_vec()].concat());
    target.throw_and_be_closed(&[greeting(), b"\x04\x07\x05READY\xff".to_vec()].concat());
    target.throw_and_be_closed(&[greeting(), b"\x04\x0b\x05READY\x00\xff\xff\xff\xff".to_vec()].concat());
    target.assert_well("failed handshakes");

    // Each property is a few bytes here and many times that in the table that it is read into.
    let properties: Vec<_> = (0..1_000_000u32).map(|number| property(&number.to_be_bytes()[1..], b"")).collect();
    target.throw_and_be_closed(&hello(&properties));
    target.assert_well("a READY of a million properties");

    for len in 0..dealer().len() {
        drop(target.throw(&dealer()[..len]));
    }
    target.assert_well("handshakes cut off everywhere");
}

#[test]
fn silence_and_half_messages_hold_up_nobody() {
    // Broken in production: a few stuck peers, or a scan, and nobody else is served.
    let mut target = Target::start(1024);
    let silent: Vec<_> = (0..200).map(|number| target.throw(&dealer()[..number % dealer().len()])).collect();
    target.assert_well("200 connections that say nothing more");
    let big = long_frame(0, MESSAGE_LEN_BYTES_MAX as u64, &[7; 1 << 20]);
    let halves: Vec<_> = (0..32).map(|_| target.throw(&[dealer(), vec![1, 0], big.clone()].concat())).collect();
    target.assert_well("32 messages of the largest size, a twentieth of each sent");
    drop((silent, halves));
    for _ in 0..2_000 {
        drop(target.throw(&dealer()));
    }
    target.assert_well("2000 connections that come and go");
}

#[test]
fn unfinished_messages_share_one_budget_whatever_their_number() {
    // Broken in production: sixty connections from anybody, each a megabyte short of a message, and the host is out of memory.
    let mut target = Target::start(1024);
    let all_but_one_mib = vec![7; MESSAGE_LEN_BYTES_MAX - (1 << 20)];
    let first_bytes = [dealer(), vec![1, 0], long_frame(0, MESSAGE_LEN_BYTES_MAX as u64, &all_but_one_mib)].concat();
    let halves: Vec<_> = (0..60)
        .map(|number| {
            let half = target.throw(&first_bytes);
            if number % 20 == 0 {
                target.assert_long_message_is_answered();
            }
            half
        })
        .collect();
    target.assert_long_message_is_answered();
    target.assert_well("60 messages of the largest size, each a MiB short");
    drop(halves);

    // Headers alone, so that nothing but what they announce could be taken.
    let header = [dealer(), vec![1, 0], long_frame(0, MESSAGE_LEN_BYTES_MAX as u64, b"")].concat();
    let announced: Vec<_> = (0..500).map(|_| target.throw(&header)).collect();
    target.assert_long_message_is_answered();
    target.assert_well("500 announcements");
    drop(announced);

    // A READY is a message as well.
    let long_ready = [greeting(), long_frame(4, 60 << 10, &[7; 50 << 10])].concat();
    let long_data = [greeting(), long_frame(0, MESSAGE_LEN_BYTES_MAX as u64, b"x")].concat();
    let shaking: Vec<_> = (0..500).map(|_| target.throw(&long_ready)).collect();
    target.throw_and_be_closed(&long_data);
    target.assert_well("500 handshakes that are not complete");
    drop(shaking);
}

#[test]
fn frames_that_come_one_by_one_cost_what_they_are_long() {
    // Broken in production: a message of single bytes, each sent by itself, keeps a whole read buffer for each of them.
    let mut target = Target::start(1024);
    let mut streams: Vec<_> = (0..64).map(|_| target.throw(&[dealer(), vec![1, 0]].concat())).collect();
    for stream in &mut streams {
        stream.set_nodelay(true).unwrap();
        // It has been accepted and is read from here on.
        stream.read_exact(&mut [0; 64 + 8]).unwrap();
    }
    let mut frames_sent = 0;
    for _ in 0..10_000 {
        // A message that takes longer than it may, which on a full machine is this test's own doing, is hung up on.
        streams.retain_mut(|stream| stream.write_all(&[1, 1, 7]).is_ok());
        frames_sent += streams.len();
    }
    target.assert_well("64 messages of 10,000 frames of a byte");
    assert!(frames_sent >= 64 * 1_000, "only {frames_sent} frames were taken");
}

#[test]
fn a_long_message_leaves_nothing_behind_at_its_connection() {
    // Broken in production: every peer that has ever sent a long message keeps its length in memory until it leaves.
    let mut target = Target::start(1024);
    let payload = vec![0x91; MESSAGE_LEN_BYTES_MAX];
    let long = message(&payload);
    let peers: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = target.throw(&long);
            stream.read_exact(&mut [0; 64 + 8 + 3]).unwrap();
            stream
        })
        .collect();
    target.assert_well("40 messages of the largest size, whose connections stay");
    drop(peers);
}

#[test]
fn a_peer_that_asks_and_never_reads_holds_up_nobody() {
    // Broken in production: the answers to one hostile peer fill the daemon's memory, or its queue stops everybody.
    let mut target = Target::start(1024);
    let mut stream = target.throw(&dealer());
    let payload = b"\x81\xa4type\xd9\x40".iter().copied().chain([b'x'; 64]).collect::<Vec<_>>();
    let ask = [vec![1, 0, 0, payload.len() as u8], payload].concat().repeat(1_000);
    for _ in 0..400 {
        // The daemon goes on reading: its answers are dropped, not its ears.
        stream.write_all(&ask).unwrap();
    }
    target.assert_well("400,000 messages whose answers nobody reads");
}

#[test]
fn garbage_in_good_frames_is_answered_as_garbage() {
    // Broken in production: one malformed message, and the socket is dead for every peer, as LMCache's is.
    let mut target = Target::start(1024);
    let mut random = StdRng::seed_from_u64(8);
    for _ in 0..200 {
        let mut garbage = vec![0; random.random_range(1..512)];
        random.fill_bytes(&mut garbage);
        drop(target.throw(&message(&garbage)));
    }
    for payload in [
        b"\xdf\xff\xff\xff\xff".to_vec(),
        b"\x81\xa4type\xdd\xff\xff\xff\xff".to_vec(),
        b"\x81\xa4type\xc6\xff\xff\xff\xff".to_vec(),
        vec![0x91; MESSAGE_LEN_BYTES_MAX],
        vec![0x81; MESSAGE_LEN_BYTES_MAX],
        [
            b"\x82\xa4type\xb1CacheQueryRequest\xa4keys\xdc\x40\x00".to_vec(),
            b"\x9e\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80".repeat(16_384),
        ]
        .concat(),
    ] {
        let mut stream = target.throw(&message(&payload));
        let mut answer = vec![0; 64 + 2];
        stream.read_exact(&mut answer).unwrap();
        assert!(stream.read(&mut answer).unwrap() > 0, "it hears why");
        target.assert_well("garbage in good frames");
    }
}

#[test]
fn running_out_of_descriptors_is_survived() {
    // Broken in production: a connection storm turns the daemon into a busy loop, or ends it, for good.
    const FILES_MAX: u64 = 64;
    let mut target = Target::start(FILES_MAX);
    let crowd: Vec<_> = (0..150).map(|_| target.connect()).collect();
    // Some of them are accepted before descriptors run out; the others wait in the kernel, which has room for 128.
    let started = Instant::now();
    while target.open_files() < FILES_MAX as usize {
        assert!(started.elapsed() < SOON, "descriptors do not run out");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(crowd);
    target.assert_well("more connections than descriptors");
}

#[test]
fn connections_beyond_the_limit_are_closed_and_places_come_back() {
    // Broken in production: every stranger costs a descriptor and two buffers, until there are none left for peers.
    const CONNECTIONS_MAX: usize = 4096;
    let files_max = CONNECTIONS_MAX as u64 + 512;
    let ours = rustix::process::getrlimit(Resource::Nofile);
    if ours.maximum.is_some_and(|maximum| maximum < files_max) {
        skip(&format!("this process may open {:?} files; raise `ulimit -Hn` to {files_max} to run it", ours.maximum));
        return;
    }
    let limit = ours.current.map(|current| current.max(files_max));
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: ours.maximum }).unwrap();
    let mut target = Target::start(files_max);
    let heard_ready = |stream: &mut TcpStream| stream.read_exact(&mut [0; 64 + 8]).is_ok();
    // One after the other, so that none waits in the kernel.
    let mut crowd = Vec::new();
    for number in 0..CONNECTIONS_MAX {
        let mut stream = target.throw(&dealer());
        assert!(heard_ready(&mut stream), "there is a place for number {number}");
        crowd.push(stream);
    }
    for _ in 0..50 {
        assert!(!heard_ready(&mut target.throw(&dealer())), "there is no place for this one");
    }
    drop(crowd);
    // They are noticed one by one.
    let mut attempts = 0;
    while !heard_ready(&mut target.throw(&dealer())) {
        attempts += 1;
        assert!(attempts < 1_000, "no place has come back");
        std::thread::sleep(Duration::from_millis(20));
    }
    target.assert_well("more connections than places");
}
