//! One sender of four slots with a receiver of LMCache's, which is played in both of its modes.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use pd_backend::ids::{
    ByteCopy, ChecksumMode, ChunkKey, ClientId, ConnectionId, Failure, FailureKind, Pages, PeerId, ReceiverAddress,
    RequestId, Seq, SlotPart, TransferId,
};
use pd_backend::node::outgoing::{Event, OpenRequest, Sending};
use pd_backend::node::{Answer, ChunkShape, Node, NodeSettings, Output, PeerMemory, Port, Remote, To};
use pd_backend::wire::message::{AllocRequest, AllocResponse, CancelNotif, Hello, InitResponse, MemRegResponse};
use pd_backend::wire::{LmcacheMode, Message, descriptor_list};

use super::bench;
pub use super::bench::request;

pub const CLIENT: ClientId = ClientId(1);
pub const PAGE_BYTES: u64 = 16;

/// An LMCache receiver, as its code behaves: it enters keys with the grant, and pins what it holds already.
pub struct Lmcache {
    pub mode: LmcacheMode,
    pub metadata: Vec<u8>,
    pub pages: Pages,
    pub free: VecDeque<u32>,
    /// key -> page and references.
    pub keys: BTreeMap<String, (u32, u32)>,
    /// What it was asked and has not answered.
    pub asked: VecDeque<Message>,
}

/// One sender of four slots and what it has said and done.
pub struct Bench {
    pub session: Node<()>,
    pub now: Instant,
    pub lmcache: Lmcache,
    pub answers: Vec<(Seq, Answer)>,
    pub events: Vec<Event>,
    pub posts: Vec<(TransferId, Vec<ByteCopy>)>,
    pub opened: Vec<PeerId>,
    pub memory: Vec<PeerMemory>,
    pub proxy: Vec<RequestId>,
    pub next_id: u64,
}

pub fn pages(address: u64, page_bytes: u64, count: u64) -> Pages {
    Pages { memory_type: 0, device: 0, address, page_bytes, count }
}

/// A key that LMCache can read.
pub fn key(number: u32) -> ChunkKey {
    ChunkKey::new(format!("m@1@0@{number:x}@half")).unwrap()
}

pub fn hello(engine: &str) -> Hello {
    Hello { engine: engine.into(), capabilities: Vec::new(), ..crate::settings::hello("sender") }
}

pub fn settings() -> NodeSettings {
    NodeSettings {
        hello: hello("nixl"),
        pages: Some(pages(1 << 20, PAGE_BYTES, 4)),
        write_timeout: Duration::from_secs(30),
        chunk: ChunkShape {
            slot_bytes: PAGE_BYTES,
            token_bytes: vec![4],
            whole: vec![false],
            chunk_tokens: 4,
            wire_format: 1,
            wire_shape: vec![2, 1, 4, 1],
            dtype: "float16".into(),
        },
        checksum: ChecksumMode::Full,
        ..bench::settings()
    }
}

impl Lmcache {
    pub fn new(mode: LmcacheMode, page_count: u64) -> Self {
        Self {
            mode,
            metadata: vec![2],
            pages: pages(1 << 30, PAGE_BYTES, page_count),
            free: (0..page_count as u32).collect(),
            keys: BTreeMap::new(),
            asked: VecDeque::new(),
        }
    }

    /// What it does with its oldest question. A synchronous one waits for room.
    pub fn answer(&mut self) -> Option<AllocResponse> {
        match self.asked.front().expect("a question") {
            Message::AllocRequest(alloc) => {
                let wanted = alloc.keys.iter().filter(|key| !self.keys.contains_key(key.as_str())).count();
                if wanted > self.free.len() && self.mode == LmcacheMode::Sync {
                    return None;
                }
            }
            Message::CancelNotif(_) => {}
            other => panic!("{other:?}"),
        }
        let mut response = AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd: None };
        match self.asked.pop_front().unwrap() {
            Message::AllocRequest(alloc) => {
                let wanted = alloc.keys.iter().filter(|key| !self.keys.contains_key(key.as_str())).count();
                if wanted > self.free.len() {
                    response.remote_indexes = vec![-1; alloc.keys.len()];
                    return Some(response);
                }
                for (index, key) in (0u32..).zip(&alloc.keys) {
                    if let Some((_, references)) = self.keys.get_mut(key.as_str()) {
                        *references += 1;
                        response.already_sent_indexes.push(index);
                    } else {
                        let page = self.free.pop_front().unwrap();
                        self.keys.insert(key.as_str().to_owned(), (page, 1));
                        response.remote_indexes.push(page.into());
                    }
                }
            }
            Message::CancelNotif(cancel) => cancel.keys.iter().for_each(|key| self.release(key)),
            _ => unreachable!(),
        }
        Some(response)
    }

    pub fn release(&mut self, key: &ChunkKey) {
        let Some((page, references)) = self.keys.get_mut(key.as_str()) else { return };
        *references -= 1;
        if *references == 0 {
            self.free.push_back(*page);
            self.keys.remove(key.as_str());
        }
    }
}

fn alloc(message: &Message) -> Option<&AllocRequest> {
    if let Message::AllocRequest(alloc) = message { Some(alloc) } else { None }
}

pub fn cancel(message: &Message) -> Option<&CancelNotif> {
    if let Message::CancelNotif(cancel) = message { Some(cancel) } else { None }
}

impl Bench {
    pub fn new(mode: LmcacheMode) -> Self {
        Self::with(settings(), Lmcache::new(mode, 6))
    }

    pub fn with(settings: NodeSettings, lmcache: Lmcache) -> Self {
        let now = Instant::now();
        Self {
            session: Node::new(now, settings),
            now,
            lmcache,
            answers: Vec::new(),
            events: Vec::new(),
            posts: Vec::new(),
            opened: Vec::new(),
            memory: Vec::new(),
            proxy: Vec::new(),
            next_id: 100,
        }
    }

    pub fn pump(&mut self) {
        while let Some(output) = self.session.poll_output() {
            let now = self.now;
            match output {
                Output::OpenPeer { peer, .. } => {
                    self.opened.push(peer);
                    self.session.handle_peer_opened(now, peer, self.lmcache.mode);
                }
                Output::LoadPeer { remote: Remote::Receiver(peer), agent_name, metadata } => {
                    let remote = Remote::Receiver(peer);
                    assert_eq!((agent_name, &metadata), (None, &self.lmcache.metadata));
                    self.session.handle_loaded(now, &remote, Ok(ConnectionId(peer.0)));
                }
                Output::ConnectPeer { peer, memory, .. } => {
                    self.memory.push(memory);
                    self.session.handle_peer_connected(now, peer, Ok(()));
                }
                Output::Send { to: To::Peer(peer), port, message } => self.on_send(peer, port, message),
                Output::Post { transfer, copies, .. } => self.posts.push((transfer, copies)),
                Output::Answer { id, answer, .. } => self.answers.push((id, answer)),
                Output::Event { event, .. } => self.events.push(event),
                Output::NotifyProxy { request, .. } => self.proxy.push(request),
                _ => {}
            }
        }
        self.session.check_invariants().unwrap();
    }

    /// Everything that is said to the receiver comes by here. What would disable one is never said.
    pub fn on_send(&mut self, peer: PeerId, port: Port, message: Message) {
        match message {
            Message::NixlInitRequest(init) => {
                assert!(init.pd.is_some(), "by which one of ours knows us");
                let response = InitResponse {
                    remote_agent_name: b"agent".to_vec(),
                    remote_meta_bytes: self.lmcache.metadata.clone(),
                    pd: None,
                };
                self.session.handle_connection_message(self.now, peer, Port::Init, Message::NixlInitResponse(response));
            }
            Message::NixlMemRegRequest(register) => {
                assert_eq!((register.remote_agent_name.as_slice(), register.pd), (&b"agent"[..], None));
                let (_, ours) = descriptor_list::decode(&register.local_xfer_dlist_bytes).unwrap();
                assert_eq!(Some(ours), settings().pages);
                let list = descriptor_list::encode("nixl_cu12._bindings", &self.lmcache.pages);
                let response = MemRegResponse { remote_xfer_dlist_bytes: list, pd: None };
                self.session.handle_connection_message(
                    self.now,
                    peer,
                    Port::Init,
                    Message::NixlMemRegResponse(response),
                );
            }
            Message::AllocRequest(AllocRequest { pd: None, .. }) => self.lmcache.asked.push_back(message),
            Message::CancelNotif(ref cancel) => {
                assert_eq!(
                    (self.lmcache.mode, &cancel.pd),
                    (LmcacheMode::Async, &None),
                    "a synchronous one is disabled"
                );
                self.lmcache.asked.push_back(message);
            }
            other => panic!("{other:?} on {port:?}"),
        }
        let allocs: Vec<&AllocRequest> = self.lmcache.asked.iter().filter_map(alloc).collect();
        let cancels: Vec<&CancelNotif> = self.lmcache.asked.iter().filter_map(cancel).collect();
        assert!(
            allocs.len() <= 1 && cancels.len() <= 1,
            "answers do not say what they answer: {:?}",
            self.lmcache.asked
        );
    }

    pub fn hear(&mut self, response: AllocResponse) {
        let peer = *self.opened.last().unwrap();
        self.session.handle_connection_message(self.now, peer, Port::Alloc, Message::AllocResponse(response));
        self.pump();
    }

    /// The receiver answers all that it can.
    pub fn answer_all(&mut self) {
        while !self.lmcache.asked.is_empty() {
            let Some(response) = self.lmcache.answer() else { return };
            self.hear(response);
        }
    }

    /// An asynchronous receiver answers cancels whatever else it has been asked.
    pub fn answer_cancels(&mut self) -> Vec<CancelNotif> {
        let mut answered = Vec::new();
        while let Some(at) = self.lmcache.asked.iter().position(|message| cancel(message).is_some()) {
            let message = self.lmcache.asked.remove(at).unwrap();
            let cancel = cancel(&message).unwrap();
            cancel.keys.iter().for_each(|key| self.lmcache.release(key));
            answered.push(cancel.clone());
            self.hear(AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd: None });
        }
        answered
    }

    /// Opens a request of these keys, and returns the number by which it is answered.
    pub fn ask(&mut self, name: &str, keys: &[u32]) -> Seq {
        self.next_id += 1;
        let id = Seq(self.next_id);
        let open = OpenRequest {
            id: request(name),
            keys: keys.iter().copied().map(key).collect(),
            groups: Vec::new(),
            last_chunk_tokens: 4,
            receiver: ReceiverAddress { host: "r".into(), init_port: 1, alloc_port: 2 },
            wait: None,
            stage: false,
        };
        self.session.handle_open(self.now, CLIENT, id, open);
        self.pump();
        id
    }

    /// The same, with an answer that opens it: which of its chunks are there already.
    pub fn open(&mut self, name: &str, keys: &[u32]) -> Vec<u32> {
        let id = self.ask(name, keys);
        self.answer_all();
        match self.answer_to(id) {
            Answer::Opened { already_sent, .. } => already_sent,
            other => panic!("{other:?}"),
        }
    }

    pub fn answer_to(&self, id: Seq) -> Answer {
        let mut to = self.answers.iter().filter(|(other, _)| *other == id).map(|(_, answer)| answer.clone());
        let answer = to.next().expect("an answer");
        assert_eq!(to.next(), None, "one answer");
        answer
    }

    pub fn failure(&self, id: Seq) -> Failure {
        match self.answer_to(id) {
            Answer::Failed { failure, .. } => failure,
            other => panic!("{other:?}"),
        }
    }

    /// Stages and sends these chunks, which are all, and returns the transfer.
    pub fn send(&mut self, name: &str, chunks: &[u32]) -> (TransferId, Vec<u64>) {
        self.next_id += 1;
        let id = Seq(self.next_id);
        self.session.handle_stage(self.now, CLIENT, id, &request(name), chunks.to_vec(), None);
        self.pump();
        let Answer::Staged { slots } = self.answer_to(id) else { panic!("{:?}", self.answers) };
        let part = |slot| SlotPart { slot, offset_bytes: 0, len_bytes: None };
        let parts: Vec<SlotPart> = slots.iter().map(|staged| part(staged.slot)).collect();
        let sending = Sending { parts: &parts, last: true, after: None };
        self.session.handle_send(self.now, CLIENT, Seq(2), &request(name), sending);
        self.pump();
        let (transfer, copies) = self.posts.last().unwrap();
        (*transfer, copies.iter().map(|copy| copy.remote_offset / PAGE_BYTES).collect())
    }

    pub fn written(&mut self, transfer: TransferId) {
        self.session.handle_transfer_done(self.now, transfer, Ok(Vec::new()));
        self.pump();
    }

    /// Opens, sends and finishes a request, and returns its pages.
    pub fn deliver(&mut self, name: &str, keys: &[u32]) -> Vec<u64> {
        assert_eq!(self.open(name, keys), Vec::<u32>::new());
        let (transfer, pages) = self.send(name, &(0..keys.len() as u32).collect::<Vec<_>>());
        self.written(transfer);
        assert_eq!(self.proxy.last(), Some(&request(name)));
        pages
    }

    pub fn cancel(&mut self, name: &str) {
        self.session.handle_cancel(self.now, CLIENT, Seq(1), &request(name));
        self.pump();
    }

    pub fn later(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            self.session.handle_timeout(self.now);
            self.pump();
        }
    }

    /// The connection breaks; the receiver is there.
    pub fn cut(&mut self) {
        let peer = *self.opened.last().unwrap();
        self.session.handle_peer_closed(
            self.now,
            peer,
            Failure::new(FailureKind::PeerLost, "it closed the connection"),
        );
        self.pump();
        self.lmcache.asked.clear();
    }

    pub fn page_of(&self, number: u32) -> u64 {
        self.lmcache.keys[key(number).as_str()].0.into()
    }
}

pub fn both() -> [LmcacheMode; 2] {
    [LmcacheMode::Sync, LmcacheMode::Async]
}
