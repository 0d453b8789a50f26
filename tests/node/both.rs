//! A node with both halves over one buffer: which half an event is for, and what one must learn of the other.

use std::time::Instant;

use pd_backend::ids::{
    ChunkKey, ClientId, ConnectionId, Failure, FailureKind, GrantId, PeerId, ReceiverAddress, RequestId, Seq,
    SourceAddress, StagedSlot,
};
use pd_backend::node::outgoing::{Event, OpenRequest};
use pd_backend::node::{Answer, Node, NodeSettings, OutgoingSettings, Output, Port, To};
use pd_backend::wire::message::{
    AllocExtension, AllocReplyExtension, AllocRequest, AllocResponse, CancelExtension, CancelNotif, Hello,
    InitExtension, InitReplyExtension, InitRequest, InitResponse, MemRegReplyExtension, MemRegResponse, Revoke,
};
use pd_backend::wire::{LmcacheMode, Message};

use crate::settings::{self, SLOT_BYTES, hello};

const CLIENT: ClientId = ClientId(1);

/// One node of so many slots; its receiver, and a sender of its, are the test.
struct Bench {
    node: Node<&'static str>,
    now: Instant,
    seq: u64,
    answers: Vec<(Seq, Answer)>,
    events: Vec<Event>,
    /// Allocations that it has asked its receiver for.
    asked: Vec<Seq>,
    /// What it said to its sender.
    said: Vec<Message>,
    receiver: Option<PeerId>,
    /// What its receiver has granted last.
    granted_there: GrantId,
}

fn name(text: &str) -> RequestId {
    RequestId::new(text).unwrap()
}

fn keys(of: &str, count: u32) -> Vec<ChunkKey> {
    (0..count).map(|chunk| ChunkKey::new(format!("{of}-{chunk}")).unwrap()).collect()
}

fn rendezvous() -> SourceAddress {
    SourceAddress { host: "r".into(), port: 3 }
}

impl Bench {
    fn new(slots: u64) -> Self {
        let now = Instant::now();
        let settings = NodeSettings {
            outgoing: Some(OutgoingSettings { notify_proxy: false, ..settings::outgoing() }),
            incoming: Some(settings::incoming()),
            ..settings::settings("node", slots)
        };
        let (answers, events, asked, said) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let node = Node::new(now, settings);
        let mut bench =
            Self { node, now, seq: 100, answers, events, asked, said, receiver: None, granted_there: GrantId(0) };
        let pd = Some(InitExtension { seq: Seq(1), hello: hello("s"), agent_name: "s".into(), connected: Vec::new() });
        bench.hear(Port::Init, Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![3], pd }));
        assert!(matches!(bench.said.pop(), Some(Message::NixlInitResponse(_))));
        bench
    }

    /// The sender says something.
    fn hear(&mut self, port: Port, message: Message) {
        self.node.handle_port_message(self.now, port, "s", message);
        self.pump();
    }

    fn pump(&mut self) {
        while let Some(output) = self.node.poll_output() {
            match output {
                Output::OpenPeer { peer, .. } => {
                    self.receiver = Some(peer);
                    self.node.handle_peer_opened(self.now, peer, LmcacheMode::Async);
                }
                Output::LoadPeer { remote, .. } => self.node.handle_loaded(self.now, &remote, Ok(ConnectionId(1))),
                Output::ConnectPeer { peer, .. } => self.node.handle_peer_connected(self.now, peer, Ok(())),
                Output::Send { to: To::Route(_), message, .. } => self.said.push(message),
                Output::Send { to: To::Peer(_), message, .. } => self.on_said_to_receiver(message),
                Output::Answer { id, answer, .. } => self.answers.push((id, answer)),
                Output::Event { event, .. } => self.events.push(event),
                _ => {}
            }
        }
        self.node.check_invariants().unwrap();
    }

    fn on_said_to_receiver(&mut self, message: Message) {
        let answer = match message {
            Message::NixlInitRequest(init) => Message::NixlInitResponse(InitResponse {
                remote_agent_name: vec![],
                remote_meta_bytes: vec![2],
                pd: Some(InitReplyExtension {
                    seq: init.pd.unwrap().seq,
                    hello: Hello { rendezvous: Some(rendezvous()), ..hello("r") },
                    agent_name: "r".into(),
                    refusal: None,
                }),
            }),
            Message::NixlMemRegRequest(register) => Message::NixlMemRegResponse(MemRegResponse {
                remote_xfer_dlist_bytes: vec![],
                pd: Some(MemRegReplyExtension {
                    seq: register.pd.unwrap().seq,
                    descriptors: vec![3],
                    len_bytes: 1024,
                    refusal: None,
                }),
            }),
            Message::AllocRequest(alloc) => return self.asked.push(alloc.pd.unwrap().seq),
            _ => return,
        };
        self.node.handle_connection_message(self.now, self.receiver.unwrap(), Port::Init, answer);
    }

    /// A request is opened, and its receiver has room.
    fn open(&mut self, request: &str, chunks: u32) {
        let receiver = ReceiverAddress { host: "r".into(), init_port: 1, alloc_port: 2 };
        let (id, keys) = (name(request), keys(request, chunks));
        let open = OpenRequest { id, keys, groups: vec![], last_chunk_tokens: 4, receiver, wait: None, stage: false };
        self.node.handle_open(self.now, CLIENT, Seq(1), open);
        self.pump();
        let seq = self.asked.pop().unwrap();
        self.granted_there = GrantId(seq.0);
        let pd = AllocReplyExtension {
            grant: Some(self.granted_there),
            offsets: (0..u64::from(chunks)).map(|chunk| chunk * SLOT_BYTES).collect(),
            write_within_ms: 10_000,
            ..AllocReplyExtension::empty(seq)
        };
        let response = AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd: Some(pd) };
        self.hear_of_receiver(Message::AllocResponse(response));
        assert!(matches!(self.answers.pop(), Some((Seq(1), Answer::Opened { .. }))));
    }

    fn hear_of_receiver(&mut self, message: Message) {
        self.node.handle_connection_message(self.now, self.receiver.unwrap(), Port::Alloc, message);
        self.pump();
    }

    /// Asks for local slots; whatever is answered at once.
    fn stage(&mut self, request: &str, chunks: u32) -> Option<Answer> {
        self.node.handle_stage(self.now, CLIENT, Seq(2), &name(request), (0..chunks).collect(), None);
        self.pump();
        self.answers.pop().map(|(_, answer)| answer)
    }

    /// The sender asks for slots; its grant, if it gets them at once.
    fn alloc(&mut self, request: &str, chunks: u32) -> Option<GrantId> {
        self.seq += 1;
        let pd = AllocExtension {
            seq: Seq(self.seq),
            instance: "s".into(),
            wait_ms: 5000,
            groups: vec![],
            known_len_bytes: 1024,
            receiver: "node".into(),
            ahead: false,
        };
        let alloc = AllocRequest {
            keys: keys(request, chunks),
            fmt: 1,
            shape: vec![2, 1, 4, 2],
            dtype: "uint8".into(),
            last_chunk_toks: 4,
            req_id: Some(name(request)),
            is_last_batch: Some(true),
            total_chunks: Some(chunks),
            pd: Some(pd),
        };
        self.hear(Port::Alloc, Message::AllocRequest(alloc));
        self.granted()
    }

    fn granted(&mut self) -> Option<GrantId> {
        match self.said.pop() {
            Some(Message::AllocResponse(response)) => response.pd.unwrap().grant,
            other => {
                assert_eq!(other, None);
                None
            }
        }
    }

    /// The sender gives its request up, and writes nothing of it.
    fn give_up(&mut self, request: &str, grant: GrantId) {
        self.seq += 1;
        let pd = CancelExtension {
            seq: Seq(self.seq),
            instance: "s".into(),
            grant: Some(grant),
            alloc_seq: None,
            writer_stopped: true,
        };
        let cancel = CancelNotif { req_id: name(request), keys: vec![], pd: Some(pd) };
        self.hear(Port::Alloc, Message::CancelNotif(cancel));
    }

    fn cancel(&mut self, request: &str) {
        self.node.handle_cancel(self.now, CLIENT, Seq(9), &name(request));
        self.pump();
    }
}

fn staged(answer: Option<Answer>) -> Vec<StagedSlot> {
    match answer {
        Some(Answer::Staged { slots }) => slots,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_one_half_frees_the_other_gets() {
    // Broken in production: a node is full of what it sends, that is sent, and who waits for its slots waits until a time-out.
    let mut bench = Bench::new(4);
    for request in ["one", "two", "three"] {
        bench.open(request, 1);
        staged(bench.stage(request, 1));
    }
    assert_eq!(bench.alloc("in", 2), None, "one slot is left");
    bench.cancel("one");
    bench.answers.clear();
    let grant = bench.granted().expect("a staged slot is free");
    bench.open("next", 2);
    assert_eq!(bench.stage("next", 2), None, "no slot is left");
    bench.cancel("two");
    bench.answers.clear();
    bench.give_up("in", grant);
    let waited = bench.answers.pop();
    assert_eq!(staged(waited.map(|(_, answer)| answer)).len(), 2);
}

#[test]
fn neither_half_takes_what_the_other_is_sure_of() {
    // Broken in production: two nodes whose buffers are full of what they send wait for each other's room for ever.
    let mut bench = Bench::new(4);
    bench.open("out", 4);
    let Some(Answer::Failed { failure, .. }) = bench.stage("out", 4) else { panic!("{:?}", bench.answers) };
    assert_eq!(failure.kind, FailureKind::TooLarge);
    assert!(failure.text.contains("has 2 slots") && failure.text.contains("for one direction"), "{failure}");
    for request in ["one", "two", "three"] {
        bench.open(request, 1);
        staged(bench.stage(request, 1));
    }
    bench.open("four", 1);
    assert_eq!(bench.stage("four", 1), None, "the last slot is for what comes in");
    let grant = bench.alloc("in", 1).expect("its own slot is there");
    bench.give_up("in", grant);
    for request in ["one", "two", "three", "four"] {
        bench.cancel(request);
    }
    assert_eq!(bench.alloc("large", 3), None);
    let grant = bench.alloc("two", 2).unwrap();
    // As much as may be staged at once.
    staged(bench.stage("out", 2));
    bench.give_up("two", grant);
}

#[test]
fn a_cancel_is_for_what_its_client_has_opened_and_then_for_what_it_receives() {
    // Broken in production: the acknowledgement of a failure on the way out ends the wait for what comes in under that name.
    let mut bench = Bench::new(4);
    bench.open("r", 1);
    bench.node.handle_wait(bench.now, CLIENT, Seq(7), name("r"), None, false);
    let reason = pd_backend::ids::Failure::new(FailureKind::Cancelled, "decode does not want it");
    let grant = bench.granted_there;
    bench.hear_of_receiver(Message::PdRevoke(Revoke { req_id: name("r"), grant, reason, alloc_seq: None }));
    assert!(matches!(bench.events.as_slice(), [Event::Failed { .. }]), "{:?}", bench.events);
    // What a client says when it has read that; the second time nothing is left to give back.
    for _ in 0..2 {
        bench.node.handle_acknowledge(bench.now, CLIENT, Seq(9), &name("r"));
        bench.pump();
    }
    assert!(bench.answers.iter().all(|(id, _)| *id != Seq(7)), "the wait goes on: {:?}", bench.answers);
    bench.answers.clear();
    bench.cancel("r");
    assert!(bench.answers.iter().any(|(id, _)| *id == Seq(7)), "now it is the wait that is meant: {:?}", bench.answers);
}

#[test]
fn a_node_does_not_shake_hands_with_itself() {
    // Broken in production: a router that names one worker for prefill and decode makes it wait for its own slots.
    let mut bench = Bench::new(4);
    let pd = Some(InitExtension { seq: Seq(50), hello: hello("node"), agent_name: "n".into(), connected: Vec::new() });
    bench.hear(Port::Init, Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![3], pd }));
    let Some(Message::NixlInitResponse(response)) = bench.said.pop() else { panic!("{:?}", bench.said) };
    let refusal = response.pd.unwrap().refusal.unwrap();
    assert!(refusal.kind == FailureKind::BadRequest && refusal.text.contains("does not send to itself"), "{refusal}");
}

#[test]
fn receivers_that_park_themselves_are_named_while_they_are_connected() {
    // Broken in production: prefill does not learn whom to ask for a conversation's turn before, or asks one that has gone.
    let mut bench = Bench::new(8);
    assert_eq!(bench.node.sources().count(), 0);
    bench.open("x", 1);
    assert_eq!(bench.node.sources().collect::<Vec<_>>(), [&rendezvous()]);
    let gone = Failure::new(FailureKind::PeerLost, "gone");
    bench.node.handle_peer_closed(bench.now, bench.receiver.unwrap(), gone);
    bench.pump();
    assert_eq!(bench.node.sources().count(), 0);
}
