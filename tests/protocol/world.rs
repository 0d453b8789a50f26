//! The world around the sessions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use pd_backend::ids::{
    ByteCopy, ChunkKey, ClientId, ConnectionId, Failure, FailureKind, PeerAddress, PeerId, RequestId, Seq, TransferId,
};
use pd_backend::protocol::receiver::{Answer as ReaderAnswer, Output as ReceiverOutput, ReadyChunk, ReceiverSettings};
use pd_backend::protocol::sender::{
    Answer, Event as SenderEvent, OpenRequest, Output as SenderOutput, Part, SenderSettings, StagedSlot,
};
use pd_backend::protocol::{ChunkShape, Port, ReceiverSession, SenderSession};
use pd_backend::wire::Message;
use pd_backend::wire::message::{CAPABILITY_COMMIT, Hello};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const CHUNK_BYTES: u64 = 16;
const TOKENS: u32 = 4;
const SENDERS: usize = 2;
const SENDER_SLOTS: u32 = 5;
const RECEIVER_SLOTS: u32 = 6;
const REQUESTS: usize = 14;
const OPEN: Seq = Seq(1);
const CANCEL: Seq = Seq(77);
const GIVE_UP: Seq = Seq(78);
const ACKNOWLEDGE: Seq = Seq(79);
const READER: ClientId = ClientId(900);

/// How unkind the world is, in percent.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    cancel: u32,
    transfer_fails: u32,
    /// Transfers of a paused process: they end long after the others.
    transfer_slow: u32,
    link_lost: u32,
    reader_cancels: u32,
}

impl Plan {
    pub fn calm() -> Self {
        Self { cancel: 0, transfer_fails: 0, transfer_slow: 0, link_lost: 0, reader_cancels: 0 }
    }

    pub fn rough() -> Self {
        Self { cancel: 15, transfer_fails: 5, transfer_slow: 20, link_lost: 2, reader_cancels: 5 }
    }
}

/// How a message's sender is answered: which sender, over which of its links.
type Route = (usize, PeerId, Port);

#[derive(Debug, Clone)]
enum News {
    ToReceiver(Route, Message),
    ToSender(Route, Message),
    RouteGone(Route),
    PeerOpened(usize, PeerId),
    PeerLoaded(usize, PeerId),
    PeerConnected(usize, PeerId),
    ReceiverLoaded(String),
    Written { sender: usize, transfer: TransferId, copies: Vec<ByteCopy>, fails: bool },
    Begin(usize),
    Cancel(usize),
    Acknowledge(usize),
    ReaderCancel(usize),
    Release(pd_backend::ids::LeaseId, Vec<ReadyChunk>),
    Deadline,
}

/// One request as its connector sees it.
#[derive(Debug, Default)]
struct Client {
    sender: usize,
    keys: Vec<ChunkKey>,
    last_tokens: u32,
    opened: bool,
    open_failed: bool,
    already_sent: BTreeSet<u32>,
    to_stage: VecDeque<u32>,
    ends: u32,
}

pub struct World {
    rng: StdRng,
    plan: Plan,
    now: Instant,
    start: Instant,
    queue: BTreeMap<(Instant, u64), News>,
    order: u64,
    /// Links deliver in order: when the last message of each arrives.
    link_busy: BTreeMap<(bool, Route), Instant>,
    dead_links: BTreeSet<(usize, PeerId)>,
    senders: Vec<SenderSession>,
    receiver: ReceiverSession<Route>,
    sender_memory: Vec<Vec<u8>>,
    receiver_memory: Vec<u8>,
    connections: BTreeMap<(usize, ConnectionId), PeerId>,
    next_connection: u64,
    clients: Vec<Client>,
    pub sent: u64,
    pub failed: u64,
    pub cancelled: u64,
    pub links_lost: u64,
    pub log: Vec<String>,
}

/// What a chunk must hold: a function of its key alone, so that equal keys mean equal bytes.
fn content(key: &ChunkKey, len_bytes: u64) -> Vec<u8> {
    let seed = key
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len_bytes).map(|_| rng.random()).collect()
}

fn hello(instance: String) -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        instance,
        engine: "test".into(),
        layout: vec![("chunk_bytes".into(), CHUNK_BYTES.to_string())],
        capabilities: vec![CAPABILITY_COMMIT.into()],
        process: None,
    }
}

fn request_id(index: usize) -> RequestId {
    RequestId::new(format!("r{index}")).unwrap()
}

fn request_index(id: &RequestId) -> usize {
    id.as_str()[1..].parse().unwrap()
}

impl World {
    pub fn new(seed: u64, plan: Plan) -> Self {
        let start = Instant::now();
        let chunk = ChunkShape {
            chunk_bytes: CHUNK_BYTES,
            token_bytes: CHUNK_BYTES / u64::from(TOKENS),
            chunk_tokens: TOKENS,
            wire_format: 1,
            wire_shape: vec![2, 1, u64::from(TOKENS), 2],
            dtype: "uint8".into(),
        };
        let sender = |index: usize| {
            SenderSession::new(SenderSettings {
                hello: hello(format!("sender-{index}")),
                agent_name: format!("agent-{index}"),
                metadata: vec![1],
                chunk: chunk.clone(),
                slot_count: SENDER_SLOTS,
                allocation_timeout: Duration::from_millis(400),
                handshake_timeout: Duration::from_millis(200),
                commit_timeout: Duration::from_millis(200),
                requests_max: 64,
                request_chunks_max: 64,
                peers_max: 2,
                notify_proxy: true,
            })
        };
        let receiver = ReceiverSession::new(ReceiverSettings {
            hello: hello("receiver".into()),
            agent_name: "agent-r".into(),
            metadata: vec![2],
            descriptors: vec![3],
            chunk: chunk.clone(),
            slot_count: RECEIVER_SLOTS,
            allocation_timeout: Duration::from_millis(300),
            write_timeout: Duration::from_millis(500),
            wait_timeout: Duration::from_millis(2000),
            retention: Duration::from_millis(600),
            requests_max: 64,
            request_chunks_max: 64,
            peers_max: 4,
        });
        let mut world = Self {
            rng: StdRng::seed_from_u64(seed),
            plan,
            now: start,
            start,
            queue: BTreeMap::new(),
            order: 0,
            link_busy: BTreeMap::new(),
            dead_links: BTreeSet::new(),
            senders: (0..SENDERS).map(sender).collect(),
            receiver,
            sender_memory: vec![vec![0; (CHUNK_BYTES * u64::from(SENDER_SLOTS)) as usize]; SENDERS],
            receiver_memory: vec![0; (CHUNK_BYTES * u64::from(RECEIVER_SLOTS)) as usize],
            connections: BTreeMap::new(),
            next_connection: 1,
            clients: Vec::new(),
            sent: 0,
            failed: 0,
            cancelled: 0,
            links_lost: 0,
            log: Vec::new(),
        };
        for index in 0..REQUESTS {
            let client = world.client();
            world.clients.push(client);
            let at = world.rng.random_range(0..400);
            world.schedule(at, News::Begin(index));
        }
        world
    }

    fn client(&mut self) -> Client {
        let count = self.rng.random_range(1..=4);
        let first = self.rng.random_range(0..10);
        let last_tokens = self.rng.random_range(1..=TOKENS);
        // Neighbouring requests share prefixes; a short chunk is named after its length, as an engine's hash would.
        let key = |index: usize| {
            let short = if index + 1 == count { format!("-{last_tokens}") } else { String::new() };
            ChunkKey::new(format!("k{}{short}", first + index)).unwrap()
        };
        let keys = (0..count).map(key).collect();
        Client { sender: self.rng.random_range(0..SENDERS), keys, last_tokens, ..Client::default() }
    }

    fn schedule(&mut self, in_ms: u64, news: News) {
        self.order += 1;
        self.queue.insert((self.now + Duration::from_millis(in_ms), self.order), news);
    }

    fn percent(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    /// Delivers over a link that keeps order.
    fn transmit(&mut self, to_sender: bool, route: Route, message: Message) {
        if self.dead_links.contains(&(route.0, route.1)) {
            return;
        }
        let arrival = self.now + Duration::from_millis(self.rng.random_range(0..12));
        let busy = self.link_busy.entry((to_sender, route)).or_insert(arrival);
        *busy = arrival.max(*busy);
        let arrival = *busy;
        self.order += 1;
        let news = if to_sender { News::ToSender(route, message) } else { News::ToReceiver(route, message) };
        self.queue.insert((arrival, self.order), news);
    }

    pub fn run(&mut self) {
        let mut steps = 0;
        loop {
            let deadlines = self.senders.iter().map(SenderSession::poll_timeout).chain([self.receiver.poll_timeout()]);
            let deadline = deadlines.flatten().min();
            let next = self.queue.first_key_value().map(|(&(at, _), _)| at);
            let news = match (next, deadline) {
                (Some(at), Some(deadline)) if deadline < at => (deadline, News::Deadline),
                (None, Some(deadline)) => (deadline, News::Deadline),
                (Some(_), _) => {
                    let ((at, _), news) = self.queue.pop_first().unwrap();
                    (at, news)
                }
                (None, None) => break,
            };
            self.now = self.now.max(news.0);
            self.log.push(format!("{:?} {:?}", self.now - self.start, news.1));
            self.handle(news.1);
            self.pump();
            self.receiver.check_invariants().unwrap();
            for sender in &self.senders {
                sender.check_invariants().unwrap();
            }
            steps += 1;
            assert!(steps < 20_000, "it does not come to an end");
        }
        self.check_end();
    }

    fn check_end(&self) {
        for (index, client) in self.clients.iter().enumerate() {
            assert_eq!(client.ends, 1, "r{index} ended {} times", client.ends);
        }
        for sender in &self.senders {
            let counts = sender.counts();
            assert_eq!((counts.slots_staged, counts.transfers_in_flight, counts.requests_active), (0, 0, 0));
            assert!(sender.is_drained());
        }
        let slots = self.receiver.counts().slots;
        assert_eq!((slots.reserved, slots.ready_held, slots.ready_idle), (0, 0, 0), "{slots:?}");
        // A lost link that is never used again leaves its slots in quarantine: only the writer's word or its process's
        // end can free them.
        if self.links_lost == 0 {
            assert_eq!(slots.quarantined, 0);
        }
    }

    fn handle(&mut self, news: News) {
        let now = self.now;
        match news {
            News::Deadline => {
                for sender in &mut self.senders {
                    sender.handle_timeout(now);
                }
                self.receiver.handle_timeout(now);
            }
            News::ToReceiver(route, message) => {
                if !self.dead_links.contains(&(route.0, route.1)) {
                    self.receiver.handle_message(now, route.2, route, message);
                }
            }
            News::ToSender(route, message) => {
                if !self.dead_links.contains(&(route.0, route.1)) {
                    self.senders[route.0].handle_message(now, route.1, route.2, message);
                }
            }
            News::RouteGone(route) => self.receiver.handle_route_gone(now, &route),
            News::PeerOpened(sender, peer) => self.senders[sender].handle_peer_opened(peer),
            News::PeerLoaded(sender, peer) => {
                let connection = ConnectionId(self.next_connection);
                self.next_connection += 1;
                self.connections.insert((sender, connection), peer);
                self.senders[sender].handle_peer_loaded(peer, Ok(connection));
            }
            News::PeerConnected(sender, peer) => self.senders[sender].handle_peer_connected(now, peer, Ok(())),
            News::ReceiverLoaded(instance) => {
                let connection = ConnectionId(self.next_connection);
                self.next_connection += 1;
                self.receiver.handle_peer_loaded(now, &instance, Ok(connection));
            }
            News::Written { sender, transfer, copies, fails } => {
                for copy in copies {
                    let from = copy.local_offset as usize..(copy.local_offset + copy.len_bytes) as usize;
                    let bytes = self.sender_memory[sender][from].to_vec();
                    let at = copy.remote_offset as usize;
                    self.receiver_memory[at..at + bytes.len()].copy_from_slice(&bytes);
                    if fails {
                        break;
                    }
                }
                let result = if fails { Err("the engine broke".to_owned()) } else { Ok(()) };
                self.senders[sender].handle_transfer_done(now, transfer, result);
            }
            News::Begin(index) => self.begin(index),
            News::Cancel(index) => {
                let sender = self.clients[index].sender;
                let (client, id) = (ClientId(index as u64), CANCEL);
                self.senders[sender].handle_cancel(now, client, id, &request_id(index));
            }
            News::Acknowledge(index) => {
                let sender = self.clients[index].sender;
                let client = ClientId(index as u64);
                self.senders[sender].handle_cancel(now, client, ACKNOWLEDGE, &request_id(index));
            }
            News::ReaderCancel(index) => self.receiver.handle_cancel(now, READER, Seq(5000), &request_id(index)),
            News::Release(lease, chunks) => {
                self.verify(&chunks);
                self.receiver.handle_release(now, READER, Seq(6000), lease);
            }
        }
    }

    fn begin(&mut self, index: usize) {
        let client = &self.clients[index];
        let sender = client.sender;
        let open = OpenRequest {
            id: request_id(index),
            keys: client.keys.clone(),
            last_chunk_tokens: client.last_tokens,
            receiver: PeerAddress { host: "r".into(), init_port: 1, alloc_port: 2 },
            wait: None,
        };
        self.senders[sender].handle_open(self.now, ClientId(index as u64), OPEN, open);
        self.receiver.handle_wait(self.now, READER, Seq(index as u64), request_id(index), None);
        if self.percent(self.plan.cancel) {
            let after = self.rng.random_range(0..120);
            self.schedule(after, News::Cancel(index));
        }
        if self.percent(self.plan.reader_cancels) {
            let after = self.rng.random_range(0..120);
            self.schedule(after, News::ReaderCancel(index));
        }
    }

    fn pump(&mut self) {
        loop {
            let mut quiet = true;
            for index in 0..SENDERS {
                while let Some(output) = self.senders[index].poll_output() {
                    quiet = false;
                    self.log.push(format!("sender {index}: {output:?}"));
                    self.on_sender_output(index, output);
                }
            }
            while let Some(output) = self.receiver.poll_output() {
                quiet = false;
                self.log.push(format!("receiver: {output:?}"));
                self.on_receiver_output(output);
            }
            if quiet {
                return;
            }
        }
    }

    fn on_sender_output(&mut self, sender: usize, output: SenderOutput) {
        let soon = self.rng.random_range(0..20);
        match output {
            SenderOutput::OpenPeer { peer, .. } => self.schedule(soon, News::PeerOpened(sender, peer)),
            SenderOutput::ClosePeer(peer) => self.lose_link(sender, peer),
            SenderOutput::Send { peer, port, message } => {
                let commits = matches!(message, Message::PdCommit(_) | Message::AllocRequest(_));
                if commits && self.percent(self.plan.link_lost) {
                    self.lose_link(sender, peer);
                    self.links_lost += 1;
                    let failure = Failure::new(FailureKind::PeerLost, "the link broke");
                    self.senders[sender].handle_peer_closed(peer, failure);
                } else {
                    self.transmit(false, (sender, peer, port), message);
                }
            }
            SenderOutput::LoadPeer { peer, .. } => self.schedule(soon, News::PeerLoaded(sender, peer)),
            SenderOutput::ConnectPeer { peer, .. } => self.schedule(soon, News::PeerConnected(sender, peer)),
            SenderOutput::ForgetPeer(connection) => {
                self.connections.remove(&(sender, connection));
            }
            SenderOutput::Post { transfer, connection, copies } => {
                let known = self.connections.contains_key(&(sender, connection));
                let fails = !known || self.percent(self.plan.transfer_fails);
                let pause = if self.percent(self.plan.transfer_slow) { self.rng.random_range(0..700) } else { 0 };
                self.schedule(soon + pause, News::Written { sender, transfer, copies, fails });
            }
            SenderOutput::NotifyProxy { request } => {
                assert_eq!(self.clients[request_index(&request)].ends, 0, "the proxy hears of an ended request");
            }
            SenderOutput::Answer { client, id, answer } => self.on_answer(sender, client.0 as usize, id, answer),
            SenderOutput::Event { event, .. } => match event {
                SenderEvent::Sent { request, .. } => {
                    self.clients[request_index(&request)].ends += 1;
                    self.sent += 1;
                }
                SenderEvent::Failed { request, .. } => {
                    let index = request_index(&request);
                    self.clients[index].ends += 1;
                    self.failed += 1;
                    // The client reads it a while later, and says so.
                    self.schedule(soon, News::Acknowledge(index));
                }
            },
            SenderOutput::Note(_) => {}
        }
    }

    fn lose_link(&mut self, sender: usize, peer: PeerId) {
        self.dead_links.insert((sender, peer));
        let after = self.rng.random_range(0..30);
        self.schedule(after, News::RouteGone((sender, peer, Port::Alloc)));
    }

    /// What a connector does with an answer: stage in portions, fill, send in parts.
    fn on_answer(&mut self, sender: usize, index: usize, id: Seq, answer: Answer) {
        match answer {
            Answer::Opened { already_sent, .. } => {
                let client = &mut self.clients[index];
                assert!(!client.opened, "opened twice");
                client.opened = true;
                client.already_sent = already_sent.into_iter().collect();
                let count = client.keys.len() as u32;
                client.to_stage = (0..count).filter(|chunk| !client.already_sent.contains(chunk)).collect();
                self.stage_or_finish(sender, index);
            }
            Answer::Staged { slots } => self.fill_and_send(sender, index, &slots),
            Answer::Accepted => {}
            Answer::Cancelled { .. } if id == ACKNOWLEDGE => {}
            Answer::Cancelled { .. } => {
                // A cancel that caught the `open` has ended it with that answer.
                if !self.clients[index].open_failed {
                    self.clients[index].ends += 1;
                }
                self.cancelled += 1;
            }
            Answer::Failed { failure, .. } => {
                let client = &mut self.clients[index];
                if id == ACKNOWLEDGE {
                    assert_eq!(failure.kind, FailureKind::Unknown);
                } else if [CANCEL, GIVE_UP].contains(&id) {
                    // It has ended, or its end could not be waited for; either way this is the answer.
                    if failure.kind == FailureKind::Deadline {
                        client.ends += u32::from(!client.open_failed);
                        self.cancelled += 1;
                    }
                } else if id == OPEN {
                    client.open_failed = true;
                    client.ends += 1;
                    self.failed += 1;
                } else if failure.kind == FailureKind::NoSlots {
                    // Staging timed out: the connector gives the request up.
                    let client = ClientId(index as u64);
                    self.senders[sender].handle_cancel(self.now, client, GIVE_UP, &request_id(index));
                }
            }
        }
    }

    fn stage_or_finish(&mut self, sender: usize, index: usize) {
        let portion = self.rng.random_range(1..=2);
        let client = &mut self.clients[index];
        let chunks: Vec<u32> = (0..portion).filter_map(|_| client.to_stage.pop_front()).collect();
        let (id, name) = (ClientId(index as u64), request_id(index));
        if chunks.is_empty() {
            self.senders[sender].handle_send(self.now, id, Seq(3), &name, &[], true);
        } else {
            self.senders[sender].handle_stage(self.now, id, Seq(2), &name, chunks, None);
        }
    }

    fn fill_and_send(&mut self, sender: usize, index: usize, slots: &[StagedSlot]) {
        let mut parts = Vec::new();
        for slot in slots {
            let bytes = content(&self.clients[index].keys[slot.chunk as usize], slot.len_bytes);
            let at = slot.offset_bytes as usize;
            self.sender_memory[sender][at..at + bytes.len()].copy_from_slice(&bytes);
            let cut = self.rng.random_range(0..slot.len_bytes);
            if cut > 0 {
                parts.push(Part { slot: slot.slot, offset_bytes: cut, len_bytes: None });
                parts.push(Part { slot: slot.slot, offset_bytes: 0, len_bytes: Some(cut) });
            } else {
                parts.push(Part { slot: slot.slot, offset_bytes: 0, len_bytes: None });
            }
        }
        let last = self.clients[index].to_stage.is_empty();
        let (id, name) = (ClientId(index as u64), request_id(index));
        self.senders[sender].handle_send(self.now, id, Seq(3), &name, &parts, last);
        if !last {
            self.stage_or_finish(sender, index);
        }
    }

    fn on_receiver_output(&mut self, output: ReceiverOutput<Route>) {
        let soon = self.rng.random_range(0..20);
        match output {
            ReceiverOutput::Send { to, message, .. } => self.transmit(true, to, message),
            ReceiverOutput::LoadPeer { instance, .. } => self.schedule(soon, News::ReceiverLoaded(instance)),
            ReceiverOutput::Answer { answer: ReaderAnswer::Ready { request, lease, chunks }, .. } => {
                let client = &self.clients[request_index(&request)];
                let keys: Vec<ChunkKey> = chunks.iter().map(|chunk| chunk.key.clone()).collect();
                assert_eq!(keys, client.keys, "other chunks than were asked for");
                self.verify(&chunks);
                self.schedule(soon, News::Release(lease, chunks));
            }
            _ => {}
        }
    }

    fn verify(&self, chunks: &[ReadyChunk]) {
        for chunk in chunks {
            let at = chunk.offset_bytes as usize;
            let seen = &self.receiver_memory[at..at + chunk.len_bytes as usize];
            assert_eq!(seen, content(&chunk.key, chunk.len_bytes), "{} in slot {}", chunk.key, chunk.slot);
        }
    }
}
