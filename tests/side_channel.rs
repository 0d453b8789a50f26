//! The side channel over real sockets: our own ends against each other, and against libzmq through pyzmq.

#![allow(clippy::unwrap_used)]

#[path = "support/skip.rs"]
mod skip;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use pd_backend::side_channel::{Access, Dealer, IpcName, PushSender, RouterEvent, RouterSocket, SideChannelError};
use pd_backend::wire::auth::Channel;
use skip::skip;

const SOON: Duration = Duration::from_secs(60);

/// Fails instead of hanging. Twice as long as anything that a blocking thread may wait for.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(2 * SOON, future).await.expect("in time")
}

async fn echo(mut router: RouterSocket) {
    while let Some(event) = router.receiver.recv().await {
        if let RouterEvent::Message { peer, payload } = event {
            router.sender.try_send(&peer, payload).unwrap();
        }
    }
}

async fn assert_echoes(endpoint: &str) {
    let (sender, mut receiver) = Dealer::connect(endpoint, SOON).await.unwrap();
    for text in ["first", "second"] {
        sender.try_send(Bytes::from(text)).unwrap();
        assert_eq!(soon(receiver.recv()).await.unwrap(), text);
    }
}

#[tokio::test]
async fn a_dealer_is_answered_over_tcp_and_both_kinds_of_ipc() {
    // Broken in production: a sender and its receiver, or an engine and its daemon, cannot talk.
    let directory = tempfile::tempdir().unwrap();
    let tcp = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    assert_eq!(tcp.endpoint, format!("tcp://127.0.0.1:{}", tcp.port));
    let by_name = RouterSocket::bind_ipc(&IpcName::new_abstract("test")).await.unwrap();
    let by_path = RouterSocket::bind_ipc(&IpcName::Path(directory.path().join("socket"))).await.unwrap();
    for router in [tcp, by_name, by_path] {
        let endpoint = router.endpoint.clone();
        let server = tokio::spawn(echo(router));
        assert_echoes(&endpoint).await;
        server.abort();
    }
}

#[tokio::test]
async fn an_occupied_port_is_an_error_that_says_which() {
    // Broken in production: two daemons share a port and steal each other's requests, or nobody knows which to move.
    let first = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    let error = RouterSocket::bind_tcp("127.0.0.1", first.port).await.unwrap_err();
    assert!(matches!(error, SideChannelError::AddressInUse { .. }));
    assert!(error.to_string().contains(&first.endpoint), "{error}");
    let error = RouterSocket::bind_tcp("no such host", 0).await.unwrap_err();
    assert!(matches!(error, SideChannelError::InvalidAddress { .. }), "{error}");
    let name = IpcName::new_abstract("test");
    let _first = RouterSocket::bind_ipc(&name).await.unwrap();
    let error = RouterSocket::bind_ipc(&name).await.unwrap_err();
    assert!(matches!(error, SideChannelError::AddressInUse { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_that_cannot_be_reached_is_an_error_with_its_address() {
    // Broken in production: a request to a dead receiver hangs, or fails without saying where.
    let closed_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("tcp://127.0.0.1:{closed_port}");
    let error = Dealer::connect(&endpoint, SOON).await.unwrap_err();
    assert!(matches!(error, SideChannelError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&endpoint) && error.to_string().contains("refused"), "{error}");
    let error = PushSender::connect("127.0.0.1", closed_port, SOON).await.unwrap_err();
    assert!(matches!(error, SideChannelError::Unreachable { .. }), "{error}");

    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("tcp://{}", silent.local_addr().unwrap());
    let error = Dealer::connect(&endpoint, Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot reach {endpoint}: no ZeroMQ handshake within 50 ms"));
    assert!(matches!(Dealer::connect("ftp://x", SOON).await, Err(SideChannelError::InvalidAddress { .. })));
    assert!(matches!(Dealer::connect("ipc://@nobody", SOON).await, Err(SideChannelError::Unreachable { .. })));
}

#[tokio::test]
async fn either_end_hears_that_the_other_is_gone() {
    // Broken in production: requests to a dead peer wait for their deadlines; leases of a dead engine stay.
    let mut router = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    let (sender, receiver) = Dealer::connect(&router.endpoint, SOON).await.unwrap();
    sender.try_send(Bytes::from("hello")).unwrap();
    let Some(RouterEvent::Message { peer, .. }) = soon(router.receiver.recv()).await else { panic!("a message") };
    drop((sender, receiver));
    assert_eq!(soon(router.receiver.recv()).await, Some(RouterEvent::Gone { peer: peer.peer().clone() }));
    let error = router.sender.try_send(&peer, Bytes::from("late")).unwrap_err();
    assert!(matches!(error, SideChannelError::PeerGone { .. }), "{error}");

    let (sender, mut receiver) = Dealer::connect(&router.endpoint, SOON).await.unwrap();
    sender.try_send(Bytes::from("hello")).unwrap();
    let Some(RouterEvent::Message { peer, .. }) = soon(router.receiver.recv()).await else { panic!("a message") };
    router.sender.try_send(&peer, Bytes::from("last words")).unwrap();
    assert_eq!(soon(receiver.recv()).await.unwrap(), "last words");
    drop(router);
    for _ in 0..2 {
        let error = soon(receiver.recv()).await.unwrap_err();
        assert!(matches!(error, SideChannelError::PeerGone { .. }), "{error}");
    }
    let error = sender.try_send(Bytes::from("hello?")).unwrap_err();
    assert!(matches!(error, SideChannelError::PeerGone { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_that_does_not_read_holds_up_nobody() {
    // Broken in production: one stopped sender (a debugger, SIGSTOP) stops a receiver for all the others.
    let mut router = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    // A raw connection, since a DEALER of ours reads into memory whether anybody receives or not.
    let stalled = raw_dealer(router.port, b"stalled");
    let Some(RouterEvent::Message { peer: stalled_peer, .. }) = soon(router.receiver.recv()).await else { panic!() };
    let big = Bytes::from(vec![7; 64 * 1024]);
    let mut sent_count = 0;
    let error = loop {
        match router.sender.try_send(&stalled_peer, big.clone()) {
            Ok(()) => sent_count += 1,
            Err(error) => break error,
        }
        assert!(sent_count < 10_000, "the queue has an end");
        tokio::task::yield_now().await;
    };
    assert!(matches!(error, SideChannelError::QueueFull { .. }), "{error}");

    let endpoint = router.endpoint.clone();
    let (gone_sender, mut gone) = tokio::sync::mpsc::unbounded_channel();
    let server = tokio::spawn(async move {
        while let Some(event) = router.receiver.recv().await {
            match event {
                RouterEvent::Message { peer, payload } => router.sender.try_send(&peer, payload).unwrap(),
                RouterEvent::Gone { peer } => gone_sender.send(peer).unwrap(),
                RouterEvent::Garbage => panic!("everybody says what can be read"),
            }
        }
    });
    assert_echoes(&endpoint).await;
    drop(stalled);
    while &soon(gone.recv()).await.unwrap() != stalled_peer.peer() {}
    assert_echoes(&endpoint).await;
    server.abort();
}

/// Greets and says one word under a name, as a DEALER, and then does nothing.
fn raw_dealer(port: u16, name: &[u8]) -> std::net::TcpStream {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    let mut ready = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0".to_vec();
    ready.push(name.len() as u8);
    ready.extend_from_slice(name);
    stream.write_all(&greeting).unwrap();
    stream.write_all(&[4, ready.len() as u8]).unwrap();
    stream.write_all(&ready).unwrap();
    stream.write_all(b"\x01\x00\x00\x02hi").unwrap();
    stream
}

/// Whether the other end closes the connection soon. A reset is as good as an end; a timeout is neither.
fn is_closed(mut stream: std::net::TcpStream) -> bool {
    stream.set_read_timeout(Some(SOON)).unwrap();
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[tokio::test]
async fn a_name_that_is_taken_stays_with_its_peer() {
    // Broken in production: whoever knows a sender's socket identity gets its answers.
    let mut router = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    let mut first = raw_dealer(router.port, b"name");
    let Some(RouterEvent::Message { peer, .. }) = soon(router.receiver.recv()).await else { panic!() };
    let second = raw_dealer(router.port, b"name");
    let closed = tokio::task::spawn_blocking(move || is_closed(second));
    assert!(soon(closed).await.unwrap(), "a second peer with a name that is taken stays connected");
    // Whatever the second said would come before what the first says now, and so would the end of the second.
    first.write_all(b"\x01\x00\x00\x05again").unwrap();
    let event = soon(router.receiver.recv()).await;
    assert_eq!(event, Some(RouterEvent::Message { peer: peer.clone(), payload: Bytes::from("again") }));
    router.sender.try_send(&peer, Bytes::from("for the first")).unwrap();
    let answer = tokio::task::spawn_blocking(move || {
        first.set_read_timeout(Some(SOON)).unwrap();
        // Greeting, READY, an empty frame, the answer.
        let mut seen = vec![0; 64 + (2 + 28) + 2 + (2 + 13)];
        first.read_exact(&mut seen).unwrap();
        seen
    });
    let answer = answer.await.unwrap();
    assert!(answer.ends_with(b"for the first"), "{answer:?}");
}

#[tokio::test]
async fn peers_take_turns_whatever_the_others_have_to_say() {
    // Broken in production: a receiver that is sent long messages by strangers reads all of them first, and its senders
    // take it for dead.
    const STRANGERS: usize = 64;
    let mut router = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    let mut peers = Vec::new();
    for number in 0..=STRANGERS {
        let stream = raw_dealer(router.port, format!("peer {number}").as_bytes());
        assert!(matches!(soon(router.receiver.recv()).await, Some(RouterEvent::Message { .. })));
        stream.set_nonblocking(true).unwrap();
        peers.push(stream);
    }
    // The runtime has one thread, which is this one: nothing is read before the next await. The honest one is in the middle.
    for (number, peer) in peers.iter_mut().enumerate() {
        if number == STRANGERS / 2 {
            peer.write_all(b"\x01\x00\x00\x04ping").unwrap();
            continue;
        }
        // A message of 16 MiB, and as much of it as finds room.
        peer.write_all(b"\x01\x00\x02\x00\x00\x00\x00\x01\x00\x00\x00").unwrap();
        while peer.write(&[0; 64 * 1024]).is_ok() {}
    }
    let said = settled_bytes(router.port);
    let event = soon(router.receiver.recv()).await;
    assert!(matches!(&event, Some(RouterEvent::Message { payload, .. }) if payload == "ping"), "{event:?}");
    let read = said.saturating_sub(unread_bytes(router.port));
    // Each of them had a turn, and some a second one.
    let turns_bytes = 2 * STRANGERS as u64 * 256 * 1024;
    assert!(read < turns_bytes, "{read} of {said} bytes of others were read before a message of four");
}

/// As [`unread_bytes`], once all of it has arrived and its senders know: until then they hold what the receiver has as well, and
/// it is counted twice.
fn settled_bytes(port: u16) -> u64 {
    let mut before = unread_bytes(port);
    loop {
        // Longer than the kernel keeps an acknowledgement back. It blocks the runtime: nothing is to be read meanwhile.
        std::thread::sleep(Duration::from_millis(200));
        let now = unread_bytes(port);
        if now == before {
            return now;
        }
        before = now;
    }
}

/// What the connections to a port hold of what was said and not read.
fn unread_bytes(port: u16) -> u64 {
    let port = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let of_connection = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (to_send, received) = fields[4].split_once(':').unwrap();
        let held = match (fields[1].ends_with(&port), fields[2].ends_with(&port)) {
            (true, _) => received,
            (_, true) => to_send,
            _ => "0",
        };
        u64::from_str_radix(held, 16).unwrap()
    };
    table.lines().skip(1).map(of_connection).sum()
}

#[tokio::test]
async fn a_message_that_does_not_end_costs_its_sender_the_connection() {
    // Broken in production: whoever begins messages and never ends them keeps places and memory for ever.
    let access = Access { channel: Channel::Init, secret: None, timeout: Duration::from_millis(100) };
    let router = RouterSocket::bind_port("127.0.0.1", 0, access).await.unwrap();
    let (port, endpoint) = (router.port, router.endpoint.clone());
    let server = tokio::spawn(echo(router));
    // One that has said all it wanted to say.
    let (sender, mut receiver) = Dealer::connect(&endpoint, SOON).await.unwrap();
    sender.try_send(Bytes::from("before")).unwrap();
    assert_eq!(soon(receiver.recv()).await.unwrap(), "before");
    // Of a frame, its header or less; of a message, a frame of two.
    for unfinished in
        [&b"\x00\x09half"[..], b"\x02\x00", b"\x01\x02hi", b"\x01\x00\x02\x00\x00\x00\x00\x01\x00\x00\x00abc"]
    {
        let closed = tokio::task::spawn_blocking(move || {
            let mut stream = raw_dealer(port, b"slow");
            stream.write_all(unfinished).unwrap();
            is_closed(stream)
        });
        assert!(soon(closed).await.unwrap(), "{unfinished:?} is waited for");
    }
    sender.try_send(Bytes::from("after")).unwrap();
    assert_eq!(soon(receiver.recv()).await.unwrap(), "after");
    server.abort();
}

#[tokio::test]
async fn nothing_is_lost_when_receiving_is_interrupted() {
    // Broken in production: a message vanishes when a timer fires in the same moment, and a request hangs.
    const COUNT: u32 = 2_000;
    let mut router = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    let (sender, _receiver) = Dealer::connect(&router.endpoint, SOON).await.unwrap();
    let sending = tokio::spawn(async move {
        for number in 0..COUNT {
            while sender.try_send(Bytes::from(number.to_string())).is_err() {
                tokio::task::yield_now().await;
            }
            if number % 7 == 0 {
                tokio::time::sleep(Duration::from_micros(50)).await;
            }
        }
        sender
    });
    let mut expected = 0;
    while expected < COUNT {
        tokio::select! {
            biased;
            () = tokio::task::yield_now() => {}
            event = router.receiver.recv() => {
                let Some(RouterEvent::Message { payload, .. }) = event else { panic!("{event:?}") };
                assert_eq!(payload, expected.to_string());
                expected += 1;
            }
        }
    }
    sending.await.unwrap();
}

#[tokio::test]
async fn a_socket_file_is_private_replaced_when_stale_and_removed_at_the_end() {
    // Broken in production: other users drive the daemon, or it does not start again after SIGKILL.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let name = IpcName::parse(&format!("ipc://{}", path.display())).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a stale file");

    let router = RouterSocket::bind_ipc(&name).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = RouterSocket::bind_ipc(&name).await.unwrap_err();
    assert!(matches!(error, SideChannelError::AddressInUse { .. }), "{error}");
    let endpoint = router.endpoint.clone();
    let server = tokio::spawn(echo(router));
    assert_echoes(&endpoint).await;
    server.abort();
    let _ = server.await;
    assert!(!path.exists(), "removed with the socket");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing else is left");

    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(RouterSocket::bind_ipc(&name).await, Err(SideChannelError::Bind { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_name_that_the_kernel_cannot_hold_is_refused() {
    // Broken in production: a long path is cut, and two daemons meet at the same name.
    assert!(IpcName::parse(&format!("ipc:///{}", "d".repeat(106))).is_ok());
    for bad in ["", "ipc://", "ipc://@", &format!("ipc:///{}", "d".repeat(107)), "ipc:///a\0b"] {
        let error = IpcName::parse(bad).unwrap_err();
        assert!(matches!(error, SideChannelError::InvalidAddress { .. }), "{bad:?}: {error}");
    }
    let name = IpcName::new_abstract("receiver");
    assert_eq!(IpcName::parse(&name.endpoint()).unwrap(), name);
    assert_ne!(IpcName::new_abstract("receiver"), name);
}

// Against libzmq.

const PYTHON_PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/.deps/python");

/// A Python process with pyzmq; `None`, said aloud, where there is none.
fn python(script: &str, arguments: &[&str]) -> Option<Child> {
    if !Path::new(PYTHON_PATH).join("zmq").exists() {
        skip(&format!("no pyzmq in {PYTHON_PATH}; run scripts/setup-deps for the tests against libzmq"));
        return None;
    }
    let child = Command::new("python3")
        .env("PYTHONPATH", PYTHON_PATH)
        .args(["-c", script])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    Some(child.unwrap())
}

/// What it prints until it ends, which it must, well.
async fn output(child: Child) -> String {
    let output = soon(tokio::task::spawn_blocking(|| child.wait_with_output().unwrap())).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn libzmq_senders_are_answered_the_way_they_asked() {
    // Broken in production: an LMCache sender, synchronous or not, or the Python client, gets no answer.
    const SCRIPT: &str = r#"
import sys, zmq
for endpoint in sys.argv[1:]:
    for kind, ask in ((zmq.REQ, [b"req"]), (zmq.DEALER, [b"", b"delimited"]), (zmq.DEALER, [b"plain"])):
        socket = zmq.Context.instance().socket(kind)
        socket.setsockopt(zmq.RCVTIMEO, 60000)
        socket.connect(endpoint)
        socket.send_multipart(ask)
        assert socket.recv_multipart() == ask, (endpoint, ask)
        # Malformed: dropped, and the next message is answered all the same.
        if kind == zmq.DEALER:
            socket.send_multipart([b"a", b"b", b"c"])
            socket.send_multipart([b""])
            socket.send_multipart(ask)
            assert socket.recv_multipart() == ask, (endpoint, ask)
        socket.close(0)
print("answered")
"#;
    let directory = tempfile::tempdir().unwrap();
    let tcp = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    let by_name = RouterSocket::bind_ipc(&IpcName::new_abstract("test")).await.unwrap();
    let by_path = RouterSocket::bind_ipc(&IpcName::Path(directory.path().join("socket"))).await.unwrap();
    let endpoints: Vec<_> = [&tcp, &by_name, &by_path].iter().map(|router| router.endpoint.clone()).collect();
    let Some(child) = python(SCRIPT, &[&endpoints[0], &endpoints[1], &endpoints[2]]) else {
        return;
    };
    let servers = [tcp, by_name, by_path].map(|router| tokio::spawn(echo(router)));
    assert_eq!(output(child).await, "answered\n");
    servers.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn libzmq_receivers_hear_a_dealer_and_are_heard() {
    // Broken in production: our sender cannot allocate at an LMCache receiver of either mode, or takes one mode for the
    // other and disables a synchronous receiver with a cancel.
    const SCRIPT: &str = r#"
import sys, zmq
rep, router = (zmq.Context.instance().socket(kind) for kind in (zmq.REP, zmq.ROUTER))
for socket in (rep, router):
    socket.setsockopt(zmq.RCVTIMEO, 60000)
    print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
rep.send(rep.recv() + b" by rep")
identity, empty, payload = router.recv_multipart()
assert empty == b""
router.send_multipart([identity, b"", payload + b" by router"])
sys.stdin.read()
"#;
    let Some(mut child) = python(SCRIPT, &[]) else {
        return;
    };
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    for expected in ["asked by rep", "asked by router"] {
        let endpoint = format!("tcp://127.0.0.1:{}", lines.next().unwrap().unwrap());
        let (sender, mut receiver) = Dealer::connect(&endpoint, SOON).await.unwrap();
        sender.try_send(Bytes::from("asked")).unwrap();
        assert_eq!(soon(receiver.recv()).await.unwrap(), expected);
        assert_eq!(receiver.peer_is_rep(), expected == "asked by rep");
    }
    drop(child.stdin.take());
    output(child).await;
}

#[tokio::test]
async fn another_kind_of_socket_is_no_port_of_a_receiver() {
    // Broken in production: a request to a DEALER's port waits until the receiver is taken for lost, and no error says what
    // listens at a wrong port.
    const SCRIPT: &str = r#"
import sys, zmq
sockets = [zmq.Context.instance().socket(getattr(zmq, kind)) for kind in sys.argv[1:]]
for socket in sockets:
    print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
sys.stdin.read()
"#;
    const KINDS: [&str; 8] = ["PULL", "PUSH", "PUB", "XPUB", "SUB", "PAIR", "REQ", "DEALER"];
    let Some(mut child) = python(SCRIPT, &KINDS) else {
        return;
    };
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    for kind in KINDS {
        let endpoint = format!("tcp://127.0.0.1:{}", lines.next().unwrap().unwrap());
        let error = Dealer::connect(&endpoint, SOON).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("{endpoint} is a {kind} socket, expected ROUTER or REP")), "{error}");
    }
    drop(child.stdin.take());
    output(child).await;
}

#[tokio::test]
async fn a_proxy_is_told_and_its_end_is_noticed() {
    // Broken in production: the notification after a proxy's restart goes to the old connection and is lost.
    const SCRIPT: &str = r#"
import zmq
pull = zmq.Context.instance().socket(zmq.PULL)
pull.setsockopt(zmq.RCVTIMEO, 60000)
print(pull.bind_to_random_port("tcp://127.0.0.1"), flush=True)
print(pull.recv_multipart(), flush=True)
pull.close(0)
input()
"#;
    let Some(mut child) = python(SCRIPT, &[]) else {
        return;
    };
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let port = lines.next().unwrap().unwrap().parse().unwrap();
    let mut push = PushSender::connect("127.0.0.1", port, SOON).await.unwrap();
    push.try_send(Bytes::from("req-1")).unwrap();
    let told = tokio::task::spawn_blocking(move || lines.next().unwrap().unwrap());
    assert_eq!(soon(told).await.unwrap(), "[b'req-1']");
    soon(push.closed()).await;
    let error = push.try_send(Bytes::from("req-2")).unwrap_err();
    assert!(matches!(error, SideChannelError::PeerGone { .. }), "{error}");
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"\n").unwrap();
    output(child).await;
}

#[tokio::test]
async fn another_user_is_not_answered_over_ipc() {
    // Broken in production: any user of the machine drives the daemon through its abstract name.
    if !rustix::process::geteuid().is_root() {
        skip("only root can become another user; run the tests as root, in a container, for this one");
        return;
    }
    const SCRIPT: &str = r#"
import os, socket, sys
os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as stranger:
    stranger.settimeout(60)
    stranger.connect(sys.argv[1].replace("ipc://@", "\0"))
    try:
        print("greeted" if stranger.recv(1) else "hung up on")
    except ConnectionResetError:
        print("hung up on")
"#;
    let router = RouterSocket::bind_ipc(&IpcName::new_abstract("test")).await.unwrap();
    let endpoint = router.endpoint.clone();
    let server = tokio::spawn(echo(router));
    for (uid, expected) in [("0", "greeted\n"), ("65534", "hung up on\n")] {
        let Some(child) = python(SCRIPT, &[&endpoint, uid]) else {
            return;
        };
        assert_eq!(output(child).await, expected);
    }
    server.abort();
}
