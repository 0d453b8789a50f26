//! One sender of four slots with a receiver of ours, whose grants the test gives by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use pd_backend::ids::{
    ChunkKey, ClientId, ConnectionId, Failure, FailureKind, GrantId, PeerId, ReceiverAddress, RequestId, Seq, SlotPart,
    StagedSlot, TransferId,
};
use pd_backend::node::outgoing::{Event, OpenRequest, OutgoingNote, Sending};
use pd_backend::node::{Answer, Node, NodeSettings, Output, Port, Remote, To};
use pd_backend::wire::message::{
    AllocReplyExtension, AllocResponse, CAPABILITY_AHEAD, CancelExtension, Hello, InitReplyExtension, InitResponse,
    MemRegReplyExtension, MemRegResponse, Pong,
};
use pd_backend::wire::{LmcacheMode, Message};

use crate::settings::{self, hello};

pub const CLIENT: ClientId = ClientId(1);

/// One sender of four slots, and the receiver that it talks to, played by the test.
pub struct Bench {
    pub session: Node<()>,
    pub now: Instant,
    /// What was said to the receiver and not looked at yet.
    pub said: Vec<Message>,
    /// What those were answered that spoke at the rendezvous port.
    pub answered: Vec<Message>,
    /// Answers and ends that its client got.
    pub answers: Vec<(Seq, Answer)>,
    pub events: Vec<Event>,
    pub posts: Vec<TransferId>,
    pub abandoned: Vec<(TransferId, bool)>,
    pub opened: Vec<PeerId>,
    /// Hosts where nobody listens.
    pub absent: BTreeSet<String>,
    /// Hosts whose receiver is of this model.
    pub models: BTreeMap<String, &'static str>,
    /// Whether the next receiver forgets the sender in the middle of the handshake.
    pub forgets: bool,
    hosts: BTreeMap<PeerId, String>,
    /// Who was pinged and has not answered.
    pinged: Vec<PeerId>,
    /// What was noted of receivers.
    pub notes: Vec<OutgoingNote>,
    pub proxy: u32,
}

pub fn request(name: &str) -> RequestId {
    RequestId::new(name).unwrap()
}

/// Of a sender with four slots, whose chunks are of four tokens.
pub fn settings() -> NodeSettings {
    NodeSettings {
        write_timeout: Duration::from_secs(20),
        outgoing: Some(settings::outgoing()),
        ..settings::settings("sender", 4)
    }
}

impl Bench {
    pub fn new() -> Self {
        Self::with(settings())
    }

    pub fn with(settings: NodeSettings) -> Self {
        let now = Instant::now();
        let session = Node::new(now, settings);
        Self {
            session,
            now,
            said: Vec::new(),
            answered: Vec::new(),
            answers: Vec::new(),
            events: Vec::new(),
            posts: Vec::new(),
            abandoned: Vec::new(),
            opened: Vec::new(),
            absent: BTreeSet::new(),
            models: BTreeMap::new(),
            forgets: false,
            hosts: BTreeMap::new(),
            pinged: Vec::new(),
            notes: Vec::new(),
            proxy: 0,
        }
    }

    /// Does what the session wants; the engine and the sockets are quick and good.
    pub fn pump(&mut self) {
        while let Some(output) = self.session.poll_output() {
            let now = self.now;
            match output {
                Output::OpenPeer { peer, address } => {
                    self.opened.push(peer);
                    self.hosts.insert(peer, address.host.clone());
                    if self.absent.contains(&address.host) {
                        let nobody = Failure::new(FailureKind::PeerUnreachable, format!("receiver {address}: nobody"));
                        self.session.handle_peer_closed(now, peer, nobody);
                    } else {
                        self.session.handle_peer_opened(now, peer, LmcacheMode::Async);
                    }
                }
                Output::LoadPeer { remote: remote @ Remote::Receiver(PeerId(peer)), .. } => {
                    self.session.handle_loaded(now, &remote, Ok(ConnectionId(peer)));
                }
                Output::ConnectPeer { peer, .. } => self.session.handle_peer_connected(now, peer, Ok(())),
                Output::Send { to: To::Peer(peer), message, .. } => self.on_send(peer, message),
                Output::Send { to: To::Route(()), message, .. } => self.answered.push(message),
                Output::Post { transfer, .. } => self.posts.push(transfer),
                Output::Abandon { transfer, client_gone } => self.abandoned.push((transfer, client_gone)),
                Output::Answer { id, answer, .. } => self.answers.push((id, answer)),
                Output::Event { event, .. } => self.events.push(event),
                Output::NotifyProxy { .. } => self.proxy += 1,
                Output::Note(pd_backend::node::Note::Outgoing(
                    note @ (OutgoingNote::PeerUp { .. }
                    | OutgoingNote::PeerDown { .. }
                    | OutgoingNote::Refused { .. }
                    | OutgoingNote::PushedAhead { .. }
                    | OutgoingNote::AheadDropped { .. }
                    | OutgoingNote::WrongGuess { .. }
                    | OutgoingNote::Misdirected { .. }),
                )) => self.notes.push(note),
                _ => {}
            }
        }
        self.session.check_invariants().unwrap();
    }

    /// The receiver shakes hands with everybody; the rest is for the test.
    pub fn on_send(&mut self, peer: PeerId, message: Message) {
        match message {
            Message::NixlInitRequest(init) => {
                let pd = InitReplyExtension {
                    seq: init.pd.unwrap().seq,
                    hello: self.hello_of(peer),
                    agent_name: "agent-r".into(),
                    refusal: None,
                };
                let response = InitResponse { remote_agent_name: vec![], remote_meta_bytes: vec![2], pd: Some(pd) };
                self.session.handle_connection_message(self.now, peer, Port::Init, Message::NixlInitResponse(response));
            }
            Message::NixlMemRegRequest(register) => {
                let seq = register.pd.unwrap().seq;
                let refusal = std::mem::take(&mut self.forgets)
                    .then(|| Failure::new(FailureKind::HandshakeRefused, "it has not shaken hands"));
                let pd = MemRegReplyExtension { seq, descriptors: vec![3], len_bytes: 1024, refusal };
                let response = MemRegResponse { remote_xfer_dlist_bytes: vec![], pd: Some(pd) };
                self.session.handle_connection_message(
                    self.now,
                    peer,
                    Port::Init,
                    Message::NixlMemRegResponse(response),
                );
            }
            other => {
                if matches!(other, Message::PdPing(_)) {
                    self.pinged.push(peer);
                }
                self.said.push(other);
            }
        }
    }

    pub fn host(&self, peer: PeerId) -> &str {
        &self.hosts[&peer]
    }

    fn hello_of(&self, peer: PeerId) -> Hello {
        let model = self.models.get(&self.hosts[&peer]).map(|model| ("model".to_owned(), (*model).to_owned()));
        let mut hello = Hello { layout: model.into_iter().collect(), ..hello("receiver") };
        hello.capabilities.push(CAPABILITY_AHEAD.into());
        hello
    }

    pub fn hear(&mut self, message: Message) {
        let peer = *self.opened.last().unwrap();
        self.session.handle_connection_message(self.now, peer, Port::Alloc, message);
        self.pump();
    }

    /// Opens a request of one chunk and returns the number of its allocation.
    pub fn open(&mut self, name: &str) -> Seq {
        self.ask(name, 1, false)
    }

    pub fn ask(&mut self, name: &str, chunks: u32, stage: bool) -> Seq {
        self.ask_at("r", name, chunks, stage)
    }

    pub fn ask_at(&mut self, host: &str, name: &str, chunks: u32, stage: bool) -> Seq {
        let open = OpenRequest {
            id: request(name),
            keys: (0..chunks).map(|chunk| ChunkKey::new(format!("k{chunk}")).unwrap()).collect(),
            groups: Vec::new(),
            last_chunk_tokens: 4,
            receiver: ReceiverAddress { host: host.into(), init_port: 1, alloc_port: 2 },
            wait: None,
            stage,
        };
        self.session.handle_open(self.now, CLIENT, Seq(1), open);
        self.pump();
        self.allocation()
    }

    /// The receiver grants slots for all chunks but those it has: what the client is told.
    pub fn opened(&mut self, name: &str, chunks: u32, there: &[u32], stage: bool) -> Vec<StagedSlot> {
        let seq = self.ask(name, chunks, stage);
        let to_send = u64::from(chunks) - there.len() as u64;
        let pd = AllocReplyExtension {
            grant: Some(GrantId(seq.0)),
            offsets: (0..to_send).map(|at| at * 16).collect(),
            write_within_ms: 10_000,
            ..AllocReplyExtension::empty(seq)
        };
        let there = there.to_vec();
        self.hear(Message::AllocResponse(AllocResponse {
            already_sent_indexes: there.clone(),
            remote_indexes: vec![],
            pd: Some(pd),
        }));
        let Some((Seq(1), Answer::Opened { already_sent, slots, .. })) = self.answers.pop() else {
            panic!("{:?}", self.answers)
        };
        assert_eq!(already_sent, there);
        slots
    }

    pub fn allocation(&mut self) -> Seq {
        let said = std::mem::take(&mut self.said);
        let seqs: Vec<Seq> = said
            .iter()
            .filter_map(|message| match message {
                Message::AllocRequest(alloc) => Some(alloc.pd.as_ref().unwrap().seq),
                _ => None,
            })
            .collect();
        assert_eq!(seqs.len(), 1, "{said:?}");
        seqs[0]
    }

    pub fn grant(&mut self, seq: Seq, grant: u64) {
        let pd = AllocReplyExtension {
            grant: Some(GrantId(grant)),
            offsets: vec![0],
            write_within_ms: 10_000,
            ..AllocReplyExtension::empty(seq)
        };
        self.hear(Message::AllocResponse(AllocResponse {
            already_sent_indexes: vec![],
            remote_indexes: vec![],
            pd: Some(pd),
        }));
    }

    /// Stages and sends the one chunk of an open request.
    pub fn send(&mut self, name: &str) {
        self.session.handle_stage(self.now, CLIENT, Seq(2), &request(name), vec![0], None);
        self.pump();
        let Some((_, Answer::Staged { slots })) = self.answers.last() else { panic!("{:?}", self.answers) };
        let part = SlotPart { slot: slots[0].slot, offset_bytes: 0, len_bytes: None };
        let sending = Sending { parts: &[part], last: true, after: None };
        self.session.handle_send(self.now, CLIENT, Seq(3), &request(name), sending);
        self.pump();
    }

    /// The words among what was said: which grant or allocation is not written any more.
    pub fn words(&mut self) -> Vec<CancelExtension> {
        let said = std::mem::take(&mut self.said);
        let word = |message| match message {
            Message::CancelNotif(cancel) => cancel.pd.filter(|pd| pd.writer_stopped),
            _ => None,
        };
        said.into_iter().filter_map(word).collect()
    }

    /// Time passes; the receiver answers pings, or nothing.
    pub fn later(&mut self, seconds: u64, answers_pings: bool) {
        for _ in 0..2 * seconds {
            self.now += Duration::from_millis(500);
            self.session.handle_timeout(self.now);
            self.pump();
            self.said.retain(|message| !matches!(message, Message::PdPing(_)));
            for peer in std::mem::take(&mut self.pinged) {
                if answers_pings {
                    let pong = Message::PdPong(Pong { seq: Seq(0), refusal: None, have_ended: Vec::new() });
                    self.session.handle_connection_message(self.now, peer, Port::Alloc, pong);
                    self.pump();
                }
            }
        }
    }
}
