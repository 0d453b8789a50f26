//! Connections that end by the thousand while nobody listens: each end is heard once somebody does.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread::JoinHandle;
use std::time::Duration;

use pd_backend::connector::message::{CONNECTOR_API_VERSION, Reply, Request};
use pd_backend::connector::{ConnectorEvent, ConnectorServer};
use pd_backend::ids::{Seq, SharedSecret};
use pd_backend::side_channel::{
    Access, Dealer, IpcName, PeerTag, Route, RouterEvent, RouterReceiver, RouterSender, RouterSocket,
};
use pd_backend::wire::auth::Channel;
use pd_backend::wire::encode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const SOON: Duration = Duration::from_secs(60);

/// More than the library's monitor has room for.
const CONNECTIONS: usize = 1_500;

/// Lets this process open as many files as it needs for both ends of them. False: it may not.
fn raise_file_limit() -> bool {
    const FILES: u64 = 3 * 2 * CONNECTIONS as u64 + 500;
    let files = getrlimit(Resource::Nofile);
    if files.maximum.is_some_and(|maximum| maximum < FILES) {
        eprintln!("SKIPPED: this process may open {:?} files; raise `ulimit -Hn` to {FILES} to run it", files.maximum);
        return false;
    }
    let current = files.current.map(|current| current.max(FILES));
    setrlimit(Resource::Nofile, Rlimit { current, maximum: files.maximum }).unwrap();
    true
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("within a minute")
}

/// Lets what was queued be written, while nobody listens to the socket.
async fn be_behind() {
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Answers peers that have gone, so that it is seen that they have although nobody listens: the first answer is still
/// taken by the kernel.
async fn answer(sender: &RouterSender, routes: &[Route]) {
    for _ in 0..2 {
        for route in routes {
            // One that is seen to have gone already is not answered any more.
            drop(sender.try_send(route, "x".into()));
        }
        be_behind().await;
    }
}

/// Hears one message from each connection.
async fn hear(receiver: &mut RouterReceiver) -> Vec<Route> {
    let mut routes = Vec::new();
    while routes.len() < CONNECTIONS {
        match soon(receiver.recv()).await.unwrap() {
            RouterEvent::Message { peer, .. } => routes.push(peer),
            RouterEvent::Gone { peer } => panic!("{peer} is gone"),
            RouterEvent::Garbage => panic!("each says a message"),
        }
    }
    routes
}

async fn hear_ends(receiver: &mut RouterReceiver, routes: &[Route]) {
    let mut peers: BTreeSet<&PeerTag> = routes.iter().map(Route::peer).collect();
    assert_eq!(peers.len(), CONNECTIONS);
    while !peers.is_empty() {
        let left = peers.len();
        match tokio::time::timeout(SOON, receiver.recv()).await {
            Ok(Some(RouterEvent::Gone { peer })) => {
                assert!(peers.remove(&peer), "{peer} was never heard, or is gone twice");
            }
            other => panic!("{left} of {CONNECTIONS} ends were not told: {other:?}"),
        }
    }
}

/// What a DEALER says at first.
fn hello() -> Vec<u8> {
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    [&greeting[..], b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"].concat()
}

/// Connections that each say this, made by a thread, so that the kernel's queue of them never fills.
fn connect(port: u16, said: Vec<u8>) -> JoinHandle<Vec<TcpStream>> {
    let connect = move |_| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(&said).unwrap();
        // It has been accepted.
        stream.read_exact(&mut [0; 64 + 8]).unwrap();
        stream
    };
    std::thread::spawn(|| (0..CONNECTIONS).map(connect).collect())
}

#[tokio::test]
async fn a_port_hears_the_end_of_every_connection() {
    // Broken in production: leases and routes of peers that left together stay for ever.
    if !raise_file_limit() {
        return;
    }
    let mut router = RouterSocket::bind_tcp("127.0.0.1", 0).await.unwrap();
    let clients = connect(router.port, [hello(), b"\x00\x01x".to_vec()].concat());
    let routes = hear(&mut router.receiver).await;
    drop(clients.join().unwrap());
    answer(&router.sender, &routes).await;
    hear_ends(&mut router.receiver, &routes).await;
}

#[tokio::test]
async fn a_port_that_wants_proof_hears_the_end_of_every_connection() {
    // Broken in production: as above, and what is known of those who left stays as well.
    if !raise_file_limit() {
        return;
    }
    let access = Access { channel: Channel::Alloc, secret: Some(SharedSecret::new(&[7; 32]).unwrap()), timeout: SOON };
    let mut router = RouterSocket::bind_port("127.0.0.1", 0, access.clone()).await.unwrap();
    let endpoint = router.endpoint.clone();
    let connecting = tokio::spawn(async move {
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let (sender, receiver) = Dealer::connect_port(&endpoint, &access).await.unwrap();
            sender.try_send("x".into()).unwrap();
            clients.push((sender, receiver));
        }
        clients
    });
    let routes = hear(&mut router.receiver).await;
    drop(soon(connecting).await.unwrap());
    be_behind().await;
    answer(&router.sender, &routes).await;
    hear_ends(&mut router.receiver, &routes).await;
}

#[tokio::test]
async fn whoever_connects_while_nobody_listens_has_to_prove_itself_in_time() {
    // Broken in production: strangers of a busy moment keep their places for ever.
    if !raise_file_limit() {
        return;
    }
    let access = Access {
        channel: Channel::Alloc,
        secret: Some(SharedSecret::new(&[7; 32]).unwrap()),
        timeout: Duration::from_millis(200),
    };
    let mut router = RouterSocket::bind_port("127.0.0.1", 0, access).await.unwrap();
    let connecting = connect(router.port, hello());
    while !connecting.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let listening = tokio::spawn(async move { while router.receiver.recv().await.is_some() {} });
    let clients = connecting.join().unwrap();
    let closed = tokio::task::spawn_blocking(move || {
        let is_closed = |mut stream: TcpStream| {
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            !matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
        };
        clients.into_iter().all(is_closed)
    });
    assert!(soon(closed).await.unwrap(), "somebody who has said nothing is still connected");
    listening.abort();
}

#[tokio::test]
async fn every_client_that_vanishes_is_reported() {
    // Broken in production: leases of engines that died together stay for ever.
    if !raise_file_limit() {
        return;
    }
    let mut server = ConnectorServer::bind(&IpcName::new_abstract("ends"), CONNECTIONS).await.unwrap();
    let endpoint = server.endpoint().to_owned();
    let connecting = tokio::spawn(async move {
        let attach = Request::Attach { id: Seq(1), version: CONNECTOR_API_VERSION, client: "test".into() };
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let (sender, receiver) = Dealer::connect(&endpoint, SOON).await.unwrap();
            sender.try_send(encode(&attach).into()).unwrap();
            clients.push((sender, receiver));
        }
        clients
    });
    let mut attached = BTreeSet::new();
    while attached.len() < CONNECTIONS {
        match soon(server.recv()).await.unwrap() {
            ConnectorEvent::Request { client, .. } => assert!(attached.insert(client)),
            other => panic!("{other:?}"),
        }
    }
    drop(soon(connecting).await.unwrap());
    be_behind().await;
    for client in &attached {
        server.send(*client, &Reply::Accepted { id: Seq(1) }).unwrap();
    }
    be_behind().await;
    while !attached.is_empty() {
        let left = attached.len();
        match tokio::time::timeout(SOON, server.recv()).await {
            Ok(Some(ConnectorEvent::Gone { client })) => assert!(attached.remove(&client)),
            other => panic!("{left} of {CONNECTIONS} ends were not told: {other:?}"),
        }
    }
    assert_eq!(server.client_count(), 0);
}
