//! The connector API over a real socket: who may ask what, and who hears what.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use pd_backend::connector::message::{BufferHandle, CONNECTOR_API_VERSION, Group, Reply, Request};
use pd_backend::connector::{Client, ConnectorEvent, ConnectorServer};
use pd_backend::ids::{ChunkKey, ClientId, FailureKind, GroupIndex, RequestId, Seq};
use pd_backend::side_channel::{Dealer, IpcName};
use pd_backend::wire::{decode, encode};

/// Clients that the server under test takes.
const CLIENTS_MAX: usize = 8;

const SOON: Duration = Duration::from_secs(60);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("in time")
}

async fn server() -> ConnectorServer {
    ConnectorServer::bind(&IpcName::new_abstract("test"), CLIENTS_MAX).await.unwrap()
}

fn attach(id: u64) -> Request {
    Request::Attach { id: Seq(id), version: CONNECTOR_API_VERSION, client: "test".into() }
}

fn attached(id: Seq) -> Reply {
    Reply::Attached {
        id,
        version: CONNECTOR_API_VERSION,
        role: "sender".into(),
        buffer: BufferHandle::Host { pid: 1, fd: 3, len_bytes: 4096, inode: 9, present_bytes: 4096 },
        chunk_bytes: 1024,
        slot_count: 4,
        chunk_tokens: 256,
        groups: vec![Group { name: String::new(), token_bytes: 4 }],
        layout: vec![("dtype".into(), "bfloat16".into())],
    }
}

/// Answers `attach` and `detach`, and every other request with `accepted`, until the client is gone.
async fn serve(mut server: ConnectorServer) -> Vec<ConnectorEvent> {
    let mut events = Vec::new();
    while let Some(event) = server.recv().await {
        events.push(event.clone());
        match event {
            ConnectorEvent::Request { client, request } => {
                let id = request.id();
                let reply = match request {
                    Request::Attach { .. } => attached(id),
                    Request::Detach { .. } => Reply::Detached { id },
                    _ => Reply::Accepted { id },
                };
                server.send(client, &reply).unwrap();
            }
            ConnectorEvent::Refused { .. } => {}
            ConnectorEvent::Gone { .. } => break,
        }
    }
    events
}

async fn refusal(client: &mut Client, request: &Request) -> (FailureKind, String) {
    match soon(client.request(request)).await.unwrap() {
        Reply::Error { id, kind, text, peer: None } if id == request.id() => (kind, text),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_client_attaches_asks_and_vanishes() {
    // Broken in production: no engine can use the daemon, or a dead engine keeps its leases.
    let server = server().await;
    let endpoint = server.endpoint().to_owned();
    let serving = tokio::spawn(serve(server));
    let mut client = Client::connect(&endpoint, SOON).await.unwrap();
    assert_eq!(soon(client.request(&attach(1))).await.unwrap(), attached(Seq(1)));
    let wait = Request::Wait { id: Seq(2), req_id: RequestId::new("r").unwrap(), wait_ms: None, uncommitted: false };
    assert_eq!(soon(client.request(&wait)).await.unwrap(), Reply::Accepted { id: Seq(2) });
    drop(client);
    let events = soon(serving).await.unwrap();
    assert_eq!(
        events,
        [
            ConnectorEvent::Request { client: ClientId(1), request: attach(1) },
            ConnectorEvent::Request { client: ClientId(1), request: wait },
            ConnectorEvent::Gone { client: ClientId(1) },
        ]
    );
}

#[tokio::test]
async fn who_is_not_attached_is_told_to_attach() {
    // Broken in production: a client of another release, or a confused one, gets nonsense or silence.
    let server = server().await;
    let endpoint = server.endpoint().to_owned();
    let serving = tokio::spawn(serve(server));
    let mut client = Client::connect(&endpoint, SOON).await.unwrap();
    let (kind, text) = refusal(&mut client, &Request::Status { id: Seq(1) }).await;
    assert_eq!((kind, &*text), (FailureKind::BadRequest, "not attached; the first message must be attach"));
    let newer = Request::Attach { id: Seq(2), version: 99, client: "test".into() };
    let (kind, text) = refusal(&mut client, &newer).await;
    assert_eq!(kind, FailureKind::HandshakeRefused);
    assert!(text.contains("version 99") && text.contains("this daemon version 2"), "{text}");
    assert_eq!(soon(client.request(&attach(3))).await.unwrap(), attached(Seq(3)));
    let (kind, text) = refusal(&mut client, &attach(4)).await;
    assert_eq!(kind, FailureKind::BadRequest);
    assert!(text.starts_with("already attached as client 1"), "{text}");
    // After detach it may attach again, and is somebody else then.
    assert_eq!(soon(client.request(&Request::Detach { id: Seq(5) })).await.unwrap(), Reply::Detached { id: Seq(5) });
    refusal(&mut client, &Request::Status { id: Seq(6) }).await;
    assert_eq!(soon(client.request(&attach(7))).await.unwrap(), attached(Seq(7)));
    drop(client);
    assert_eq!(soon(serving).await.unwrap().last(), Some(&ConnectorEvent::Gone { client: ClientId(2) }));
}

#[tokio::test]
async fn a_malformed_request_is_answered_where_its_id_can_be_read() {
    // Broken in production: the author of a client waits for ever and learns nothing.
    let server = server().await;
    let endpoint = server.endpoint().to_owned();
    let serving = tokio::spawn(serve(server));
    let (sender, mut receiver) = Dealer::connect(&endpoint, SOON).await.unwrap();
    for (payload, expected) in [
        (&b"\x82\xa4type\xa4open\xa2id\x07"[..], "open: missing field `req_id`"),
        (b"\x82\xa2id\x07\xa4type\xa4fly!", "message of unknown type \"fly!\""),
    ] {
        // Without an id there is nobody to answer to; the next message is answered all the same.
        sender.try_send(Bytes::from_static(b"\x81\xa4type\xa4open")).unwrap();
        sender.try_send(Bytes::from_static(b"garbage")).unwrap();
        sender.try_send(Bytes::from(payload.to_vec())).unwrap();
        let Reply::Error { id, kind, text, .. } = decode(&soon(receiver.recv()).await.unwrap()).unwrap() else {
            panic!()
        };
        assert_eq!((id, kind, &*text), (Seq(7), FailureKind::BadRequest, expected));
    }
    serving.abort();
}

#[tokio::test]
async fn clients_have_a_limit_and_leave_room_behind() {
    // Broken in production: clients that are started over and over fill the daemon's tables.
    let server = server().await;
    let endpoint = server.endpoint().to_owned();
    let serving = tokio::spawn(async move {
        let mut server = server;
        while let Some(event) = server.recv().await {
            if let ConnectorEvent::Request { client, request } = event {
                server.send(client, &attached(request.id())).unwrap();
            }
            assert!(server.client_count() <= CLIENTS_MAX);
        }
    });
    let mut clients = Vec::new();
    for _ in 0..CLIENTS_MAX {
        let mut client = Client::connect(&endpoint, SOON).await.unwrap();
        assert_eq!(soon(client.request(&attach(1))).await.unwrap(), attached(Seq(1)));
        clients.push(client);
    }
    let mut late = Client::connect(&endpoint, SOON).await.unwrap();
    assert_eq!(refusal(&mut late, &attach(1)).await.0, FailureKind::Limit);
    drop(clients.pop());
    // The daemon hears of the end a moment later.
    soon(async {
        while soon(late.request(&attach(2))).await.unwrap() != attached(Seq(2)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    serving.abort();
}

#[tokio::test]
async fn events_are_kept_while_a_reply_is_awaited() {
    // Broken in production: `sent` of one request is lost while another is opened, and the engine waits for it.
    let mut server = server().await;
    let endpoint = server.endpoint().to_owned();
    let event = |name: &str| Reply::Failed {
        req_id: RequestId::new(name).unwrap(),
        kind: FailureKind::PeerLost,
        text: "gone".into(),
        peer: "10.0.0.7".into(),
    };
    let events = [event("a"), event("b")];
    let serving = {
        let events = events.clone();
        tokio::spawn(async move {
            while let Some(ConnectorEvent::Request { client, request }) = server.recv().await {
                events.iter().for_each(|event| server.send(client, event).unwrap());
                server.send(client, &attached(request.id())).unwrap();
            }
        })
    };
    let mut client = Client::connect(&endpoint, SOON).await.unwrap();
    let request = Request::Attach { id: client.next_id(), version: CONNECTOR_API_VERSION, client: "test".into() };
    assert_eq!(soon(client.request(&request)).await.unwrap(), attached(request.id()));
    for event in events {
        assert_eq!(soon(client.recv()).await.unwrap(), event);
    }
    serving.abort();
    let _ = serving.await;
    assert!(soon(client.recv()).await.is_err(), "the daemon is gone");
}

#[tokio::test]
async fn an_attach_that_the_daemon_refuses_leaves_nobody_attached() {
    // Broken in production: a client refused during shutdown is served half a protocol.
    let mut server = server().await;
    let endpoint = server.endpoint().to_owned();
    let mut client = Client::connect(&endpoint, SOON).await.unwrap();
    client.send(&attach(1)).unwrap();
    let Some(ConnectorEvent::Request { client: id, .. }) = soon(server.recv()).await else { panic!() };
    let error = Reply::Error { id: Seq(1), kind: FailureKind::ShuttingDown, text: "going down".into(), peer: None };
    server.send(id, &error).unwrap();
    assert_eq!(soon(client.recv()).await.unwrap(), error);
    assert_eq!(server.client_count(), 0);
    let late = server.send(id, &Reply::Accepted { id: Seq(1) }).unwrap_err();
    assert_eq!(late.to_string(), "client 1 is gone: it is not attached");
}

#[test]
fn requests_and_replies_have_these_bytes() {
    // Broken in production: the Python client and the daemon of one release do not understand each other.
    let open = Request::Open {
        id: Seq(2),
        req_id: RequestId::new("r").unwrap(),
        keys: vec![ChunkKey::new("k0").unwrap()],
        last_chunk_tokens: 17,
        receiver: pd_backend::ids::ReceiverAddress { host: "h".into(), init_port: 7300, alloc_port: 7400 },
        wait_ms: None,
        groups: vec![GroupIndex(0)],
        stage: false,
    };
    let golden = [
        &b"\x87\xa4type\xa4open"[..],     // map of 7
        b"\xa2id\x02",                    // 2
        b"\xa6req_id\xa1r",               // "r"
        b"\xa4keys\x91\xa2k0",            // array of 1
        b"\xb1last_chunk_tokens\x11",     // 17
        b"\xa8receiver\x83\xa4host\xa1h", // map of 3: "h"
        b"\xa9init_port\xcd\x1c\x84",     //   7300
        b"\xaaalloc_port\xcd\x1c\xe8",    //   7400
        b"\xa6groups\x91\x00",            // array of 1: 0
    ]
    .concat();
    assert_eq!(encode(&open).escape_ascii().to_string(), golden.escape_ascii().to_string());
    assert_eq!(decode::<Request>(&golden).unwrap(), open);
    let Request::Open { id, req_id, keys, last_chunk_tokens, receiver, wait_ms, .. } = open else { panic!() };
    let left_out =
        Request::Open { id, req_id, keys, last_chunk_tokens, receiver, wait_ms, groups: Vec::new(), stage: false };
    let nil = [&golden[..golden.len() - 2], b"\xc0"].concat();
    assert_eq!(decode::<Request>(&nil).unwrap(), left_out, "nil means left out");

    let golden = [
        &b"\x8a\xa4type\xa8attached"[..],  // map of 10
        b"\xa2id\x01",                     // 1
        b"\xa7version\x02",                // 2
        b"\xa4role\xa6sender",             // "sender"
        b"\xa6buffer\x86\xa4kind\xa4host", // map of 6: "host"
        b"\xa3pid\x01",                    //   1
        b"\xa2fd\x03",                     //   3
        b"\xa9len_bytes\xcd\x10\x00",      //   4096
        b"\xa5inode\x09",                  //   9
        b"\xadpresent_bytes\xcd\x10\x00",  //   4096
        b"\xabchunk_bytes\xcd\x04\x00",    // 1024
        b"\xaaslot_count\x04",             // 4
        b"\xacchunk_tokens\xcd\x01\x00",   // 256
        b"\xa6groups\x91\x82\xa4name\xa0", // array of 1: map of 2: ""
        b"\xabtoken_bytes\x04",            //   4
        b"\xa6layout\x91\x92\xa5dtype",    // array of 1: array of 2: "dtype",
        b"\xa8bfloat16",                   //   "bfloat16"
    ]
    .concat();
    assert_eq!(encode(&attached(Seq(1))).escape_ascii().to_string(), golden.escape_ascii().to_string());
    assert_eq!(decode::<Reply>(&golden).unwrap(), attached(Seq(1)));
}
