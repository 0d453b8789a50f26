//! The rendezvous port of a real sender, as whoever reaches it may use it.

#![allow(clippy::unwrap_used)]

#[path = "support/daemon.rs"]
mod daemon;

use std::io::Read;
use std::time::Instant;

use daemon::{PATIENCE, signal, start, wait};
use pd_backend::connector::Client;
use pd_backend::connector::message::{CONNECTOR_API_VERSION, Reply, Request, Status};
use pd_backend::ids::{ChunkKey, ReceiverAddress, Registration, RequestId, Seq, SlotPart};
use pd_backend::side_channel::{Dealer, DealerReceiver, DealerSender, tcp_address};
use pd_backend::wire::message::{Hello, InitExtension, InitRequest, Register};
use pd_backend::wire::{Message, decode, encode};

/// Registrations of a flood.
const FLOOD: u64 = 200;

fn request(name: &str) -> RequestId {
    RequestId::new(name).unwrap()
}

fn key() -> ChunkKey {
    ChunkKey::new("k").unwrap()
}

/// Has a chunk parked.
async fn park(client: &mut Client) {
    let attach = Request::Attach { id: Seq(1), version: CONNECTOR_API_VERSION, client: "test".into() };
    assert!(matches!(client.request(&attach).await.unwrap(), Reply::Attached { .. }));
    let park = Request::Park {
        id: Seq(2),
        req_id: request("r"),
        keys: vec![key()],
        last_chunk_tokens: 1,
        ids: Vec::new(),
        groups: Vec::new(),
        wait_ms: None,
        unsolicited: false,
        stays: false,
    };
    let Reply::Opened { slots, .. } = client.request(&park).await.unwrap() else { panic!("it is not parked") };
    let parts = vec![SlotPart { slot: slots[0].slot, offset_bytes: 0, len_bytes: None }];
    let send = Request::Send { id: Seq(3), req_id: request("r"), parts, last: true, after: None };
    assert!(matches!(client.request(&send).await.unwrap(), Reply::Accepted { .. }));
    assert!(matches!(client.recv().await.unwrap(), Reply::Parked { .. }));
}

async fn status(client: &mut Client, id: u64) -> Status {
    match client.request(&Request::Status { id: Seq(id) }).await.unwrap() {
        Reply::Status { status, .. } => status,
        other => panic!("{other:?}"),
    }
}

async fn hear(receiver: &mut DealerReceiver) -> Message {
    decode(&tokio::time::timeout(PATIENCE, receiver.recv()).await.expect("an answer").unwrap()).unwrap()
}

/// What a daemon says of itself, in the refusal of a handshake that belongs elsewhere.
async fn hello_of(sender: &DealerSender, receiver: &mut DealerReceiver) -> Hello {
    let hello = Hello {
        version_min: 2,
        version_max: 2,
        instance: "flood".into(),
        engine: "local".into(),
        layout: Vec::new(),
        capabilities: Vec::new(),
        process: None,
        rendezvous: None,
    };
    let pd = Some(InitExtension { seq: Seq(1), hello, agent_name: "flood".into(), connected: Vec::new() });
    let init = InitRequest { local_meta_bytes: Vec::new(), pd };
    sender.try_send(encode(&Message::NixlInitRequest(init)).into()).unwrap();
    match hear(receiver).await {
        Message::NixlInitResponse(response) => response.pd.unwrap().hello,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_flood_of_pushes_to_closed_ports_is_a_line_a_second() {
    // Broken in production: whoever reaches the rendezvous port fills the disk, two lines for each message.
    let mut daemon = start("sender", &["pd_rendezvous_port=0"]);
    let mut stderr = daemon.child.stderr.take().unwrap();
    let log = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    let mut client = Client::connect(daemon.ready["connector"].as_str().unwrap(), PATIENCE).await.unwrap();
    park(&mut client).await;
    let port = u16::try_from(daemon.ready["rendezvous_port"].as_u64().unwrap()).unwrap();
    let (sender, mut receiver) = Dealer::connect(&tcp_address("127.0.0.1", port), PATIENCE).await.unwrap();
    let hello = Hello { instance: "flood".into(), ..hello_of(&sender, &mut receiver).await };
    let began = Instant::now();
    for number in 0..FLOOD {
        let register = Register {
            seq: Seq(number + 2),
            hello: hello.clone(),
            req_id: request(&format!("f{number}")),
            ids: Vec::new(),
            keys: vec![key()],
            // Nobody listens there, and each is another address.
            receiver: Some(ReceiverAddress { host: format!("127.1.0.{number}"), init_port: 1, alloc_port: 1 }),
            wait_ms: 0,
        };
        sender.try_send(encode(&Message::PdRegister(register)).into()).unwrap();
    }
    let mut failed = 0;
    while failed < FLOOD {
        match hear(&mut receiver).await {
            Message::PdRegistered(answer) if answer.state == Registration::Failed => failed += 1,
            Message::PdRegistered(answer) => assert_eq!(answer.state, Registration::Accepted),
            other => panic!("{other:?}"),
        }
    }
    let seconds = began.elapsed().as_secs();
    assert_eq!(status(&mut client, 4).await.requests_failed, FLOOD, "each is counted");
    signal(daemon.child.id(), rustix::process::Signal::TERM);
    assert_eq!(wait(&mut daemon.child).code(), Some(0));
    let log = log.join().unwrap();
    let warnings = log.lines().filter(|line| line.contains("WARN")).count() as u64;
    assert!((1..=2 * (seconds + 2)).contains(&warnings), "{warnings} warnings in {seconds} s:\n{log}");
}
