//! Servers of several tensor-parallel ranks. Each rank has a sender or a receiver of its own, and each receiver decides alone whom
//! it grants slots. Decode reads a request once the receivers of all ranks have it. So the ranks of a prefill server take their
//! slots in one order: a rank asks when the rank before it has its own. This plays that rule, and what comes without it.
//!
//! Nothing here fails: what can be seen is whether requests wait for each other.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pd_backend::address::AddressManager;
use pd_backend::ids::{
    ChecksumMode, ChunkKey, ClientId, ConnectionId, LeaseId, PeerId, ReceiverAddress, RequestId, Seq, SlotPart,
    StagedSlot, TransferId,
};
use pd_backend::node::outgoing::{Event, OpenRequest, Sending};
use pd_backend::node::{Answer, ChunkShape, IncomingSettings, Node, NodeSettings, OutgoingSettings, Output, Port, To};
use pd_backend::wire::message::{CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, Hello};
use pd_backend::wire::{LmcacheMode, Message};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const CLIENT: ClientId = ClientId(1);
const CHUNK_BYTES: u64 = 16;
const RECEIVER_SLOTS: u64 = 5;
const SERVERS: usize = 3;
const JOBS: usize = 9;
/// What is not through by then waits for something that does not come.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// A sender, its name for the receiver, and the port.
type Route = (usize, PeerId, Port);

enum News {
    Start(usize),
    Open(usize, usize),
    Send(usize, usize, Vec<StagedSlot>),
    Cancel(usize),
    Done(usize, TransferId),
    Wait(usize, usize),
    Release(usize, usize, LeaseId),
    ToReceiver(usize, Route, Box<Message>),
    ToSender(Route, Box<Message>),
}

#[derive(Default)]
struct Job {
    server: usize,
    chunks: usize,
    /// By rank: the number with which it was opened, what was sent, and decode's leases.
    opened: Vec<bool>,
    sent: Vec<bool>,
    leases: Vec<Option<LeaseId>>,
    released: usize,
    cancelled: bool,
}

/// One decode server, and the prefill servers that send to it.
pub struct Ranks {
    rng: StdRng,
    start: Instant,
    now: Instant,
    queue: BTreeMap<(Instant, u64), News>,
    number: u64,
    ranks: usize,
    /// Whether a rank asks for slots only after the rank before it has its own.
    in_order: bool,
    /// Whether decode is asked together with prefill.
    at_once: bool,
    senders: Vec<Node<Route>>,
    receivers: Vec<Node<Route>>,
    links: BTreeMap<(usize, PeerId), usize>,
    /// When the latest message arrives, for each way that messages go: none overtakes another.
    latest: BTreeMap<(bool, usize, usize), Instant>,
    jobs: Vec<Job>,
}

fn settings(name: &str, slots: u64) -> NodeSettings {
    let addresses = AddressManager::with_slots(CHUNK_BYTES * slots, 1, CHUNK_BYTES).unwrap();
    let capabilities = vec![CAPABILITY_COMMIT.into(), CAPABILITY_HEARTBEAT.into()];
    let (engine, layout) = ("test".into(), Vec::new());
    let (version_min, version_max, process, rendezvous) = (2, 2, None, None);
    NodeSettings {
        hello: Hello {
            version_min,
            version_max,
            instance: name.into(),
            engine,
            layout,
            capabilities,
            process,
            rendezvous,
        },
        agent_name: name.into(),
        metadata: vec![1],
        descriptors: vec![2],
        pages: None,
        chunk: ChunkShape {
            slot_bytes: CHUNK_BYTES,
            token_bytes: vec![4],
            whole: vec![false],
            chunk_tokens: 4,
            wire_format: 1,
            wire_shape: vec![2, 1, 4, 2],
            dtype: "uint8".into(),
        },
        len_max_bytes: addresses.len_bytes(),
        addresses,
        // As it is shipped: for ever.
        allocation_timeout: Duration::from_secs(86_400),
        write_timeout: Duration::from_secs(3600),
        checksum: ChecksumMode::Off,
        requests_max: 64,
        request_chunks_max: 64,
        peers_max: 64,
        heartbeat_interval: Duration::from_secs(1),
        peer_timeout: Duration::from_secs(5),
        outgoing: None,
        incoming: None,
        without: None,
    }
}

fn sender(name: &str) -> Node<Route> {
    let outgoing = OutgoingSettings {
        handshake_timeout: Duration::from_secs(10),
        commit_timeout: Duration::from_secs(10),
        receivers: Vec::new(),
        receivers_only: false,
        notify_proxy: false,
        parks: false,
        lease: Duration::from_secs(30),
        push_ahead: false,
    };
    Node::new(Instant::now(), NodeSettings { outgoing: Some(outgoing), ..settings(name, 64) })
}

fn receiver(name: &str) -> Node<Route> {
    let incoming = IncomingSettings {
        wait_timeout: Duration::from_secs(3600),
        retention: Duration::from_secs(3600),
        peer_requests_max: 64,
        linger: Duration::ZERO,
        prefill_hosts: None,
        advertised: None,
    };
    Node::new(Instant::now(), NodeSettings { incoming: Some(incoming), ..settings(name, RECEIVER_SLOTS) })
}

fn name_of(job: usize) -> RequestId {
    RequestId::new(format!("q{job}")).unwrap()
}

fn job_of(name: &RequestId) -> usize {
    name.to_string()[1..].parse().unwrap()
}

impl Ranks {
    pub fn new(seed: u64, ranks: usize, in_order: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let job = |rng: &mut StdRng| Job {
            server: rng.random_range(0..SERVERS),
            chunks: rng.random_range(2..=RECEIVER_SLOTS as usize),
            opened: vec![false; ranks],
            sent: vec![false; ranks],
            leases: vec![None; ranks],
            ..Job::default()
        };
        let jobs = (0..JOBS).map(|_| job(&mut rng)).collect();
        let at_once = rng.random_bool(0.5);
        let names = (0..SERVERS).flat_map(|server| (0..ranks).map(move |rank| format!("s{server}-{rank}")));
        let senders = names.map(|name| sender(&name)).collect();
        let receivers = (0..ranks).map(|rank| receiver(&format!("r{rank}"))).collect();
        let start = Instant::now();
        let (queue, links, latest) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut world = Self {
            rng,
            start,
            now: start,
            queue,
            number: 0,
            ranks,
            in_order,
            at_once,
            senders,
            receivers,
            links,
            latest,
            jobs,
        };
        for job in 0..JOBS {
            world.after(0..60, News::Start(job));
            if world.rng.random_bool(0.15) {
                world.after(0..200, News::Cancel(job));
            }
        }
        world
    }

    /// Plays until every request is through, or none gets on. How many are not through.
    ///
    /// # Errors
    /// What must not be.
    pub fn run(&mut self) -> Result<usize, String> {
        while self.left() > 0 {
            let due = self.queue.first_key_value().map(|((at, _), _)| *at);
            let nodes = self.senders.iter().chain(&self.receivers);
            let timer = nodes.filter_map(Node::poll_timeout).min();
            let Some(next) = due.into_iter().chain(timer).min() else { break };
            if next > self.start + STUCK_AFTER {
                break;
            }
            self.now = self.now.max(next);
            match self.queue.first_entry() {
                Some(entry) if entry.key().0 <= self.now => {
                    let news = entry.remove();
                    self.deliver(news);
                }
                _ => {
                    let now = self.now;
                    let nodes = self.senders.iter_mut().chain(&mut self.receivers);
                    nodes
                        .filter(|node| node.poll_timeout().is_some_and(|due| due <= now))
                        .for_each(|node| node.handle_timeout(now));
                }
            }
            self.pump()?;
        }
        Ok(self.left())
    }

    fn left(&self) -> usize {
        self.jobs.iter().filter(|job| !job.cancelled && job.released < self.ranks).count()
    }

    fn after(&mut self, ms: std::ops::Range<u64>, news: News) {
        let at = self.now + Duration::from_micros(self.rng.random_range(ms.start * 1000..ms.end * 1000));
        self.number += 1;
        self.queue.insert((at, self.number), news);
    }

    /// A message takes its time, and overtakes none on the same way.
    fn transmit(&mut self, way: (bool, usize, usize), news: News) {
        let soon = self.now + Duration::from_micros(self.rng.random_range(100..15_000));
        let at = self.latest.get(&way).map_or(soon, |&latest| soon.max(latest));
        self.latest.insert(way, at);
        self.number += 1;
        self.queue.insert((at, self.number), news);
    }

    fn sender_of(&self, job: usize, rank: usize) -> usize {
        self.jobs[job].server * self.ranks + rank
    }

    fn fresh(&mut self) -> Seq {
        self.number += 1;
        Seq(self.number)
    }

    fn deliver(&mut self, news: News) {
        let now = self.now;
        match news {
            News::Start(job) => {
                for rank in 0..self.ranks {
                    if rank == 0 || !self.in_order {
                        self.after(0..10, News::Open(job, rank));
                    }
                    if self.at_once {
                        self.after(0..10, News::Wait(job, rank));
                    }
                }
            }
            News::Open(job, _) | News::Send(job, ..) | News::Wait(job, _) if self.jobs[job].cancelled => {}
            News::Open(job, rank) => {
                let (at, id) = (self.sender_of(job, rank), self.fresh());
                let key = |chunk: usize| ChunkKey::new(format!("q{job}-{chunk}")).unwrap();
                let open = OpenRequest {
                    id: name_of(job),
                    keys: (0..self.jobs[job].chunks).map(key).collect(),
                    groups: Vec::new(),
                    last_chunk_tokens: 4,
                    receiver: ReceiverAddress { host: format!("r{rank}"), init_port: 1, alloc_port: 2 },
                    wait: None,
                    stage: true,
                };
                self.jobs[job].opened[rank] = true;
                self.senders[at].handle_open(now, CLIENT, id, open);
            }
            News::Send(job, rank, slots) => {
                let (at, id) = (self.sender_of(job, rank), self.fresh());
                let part = |slot: &StagedSlot| SlotPart { slot: slot.slot, offset_bytes: 0, len_bytes: None };
                let parts: Vec<SlotPart> = slots.iter().map(part).collect();
                let sending = Sending { parts: &parts, last: true, after: None };
                self.senders[at].handle_send(now, CLIENT, id, &name_of(job), sending);
            }
            News::Cancel(job) => self.cancel(job),
            News::Done(at, transfer) => self.senders[at].handle_transfer_done(now, transfer, Ok(Vec::new())),
            News::Wait(job, rank) => {
                let id = self.fresh();
                self.receivers[rank].handle_wait(now, CLIENT, id, name_of(job), None, false);
            }
            News::Release(job, rank, lease) => {
                let id = self.fresh();
                self.receivers[rank].handle_release(now, CLIENT, id, lease);
                self.jobs[job].released += 1;
            }
            News::ToReceiver(rank, route, message) => {
                self.receivers[rank].handle_port_message(now, route.2, route, *message);
            }
            News::ToSender((at, peer, port), message) => {
                self.senders[at].handle_connection_message(now, peer, port, *message);
            }
        }
    }

    /// The client has left: both servers give the request up, unless decode reads it already.
    fn cancel(&mut self, job: usize) {
        if self.jobs[job].leases.iter().all(Option::is_some) {
            return;
        }
        self.jobs[job].cancelled = true;
        for rank in 0..self.ranks {
            let (at, id) = (self.sender_of(job, rank), self.fresh());
            if self.jobs[job].opened[rank] && !self.jobs[job].sent[rank] {
                self.senders[at].handle_cancel(self.now, CLIENT, id, &name_of(job));
            }
            let id = self.fresh();
            match self.jobs[job].leases[rank] {
                Some(lease) => self.receivers[rank].handle_release(self.now, CLIENT, id, lease),
                None => self.receivers[rank].handle_cancel(self.now, CLIENT, id, &name_of(job)),
            }
        }
    }

    fn pump(&mut self) -> Result<(), String> {
        for at in 0..self.senders.len() {
            while let Some(output) = self.senders[at].poll_output() {
                self.on_sender_output(at, output)?;
            }
            self.senders[at].check_invariants()?;
        }
        for rank in 0..self.ranks {
            while let Some(output) = self.receivers[rank].poll_output() {
                self.on_receiver_output(rank, output)?;
            }
            self.receivers[rank].check_invariants()?;
        }
        Ok(())
    }

    fn on_sender_output(&mut self, at: usize, output: Output<Route>) -> Result<(), String> {
        let now = self.now;
        match output {
            Output::OpenPeer { peer, address } => {
                self.links.insert((at, peer), address.host[1..].parse().unwrap());
                self.senders[at].handle_peer_opened(now, peer, LmcacheMode::Async);
            }
            Output::LoadPeer { remote, .. } => {
                let connection = ConnectionId(self.fresh().0);
                self.senders[at].handle_loaded(now, &remote, Ok(connection));
            }
            Output::ConnectPeer { peer, .. } => self.senders[at].handle_peer_connected(now, peer, Ok(())),
            Output::Send { to: To::Peer(peer), port, message } => {
                let receiver = self.links[&(at, peer)];
                let news = News::ToReceiver(receiver, (at, peer, port), Box::new(message));
                self.transmit((true, at, receiver), news);
            }
            Output::Post { transfer, .. } => self.after(1..10, News::Done(at, transfer)),
            Output::Answer { answer: Answer::Opened { request, slots, .. }, .. } => {
                let (job, rank) = (job_of(&request), at % self.ranks);
                if self.in_order && rank + 1 < self.ranks {
                    // The news goes by way of the scheduler, with its steps.
                    self.after(1..30, News::Open(job, rank + 1));
                }
                self.after(0..50, News::Send(job, rank, slots));
            }
            Output::Answer { answer: Answer::Failed { failure, .. }, .. } => {
                return self.unless_cancelled(&failure.text);
            }
            Output::Event { event: Event::Sent { request, .. }, .. } => {
                let (job, rank) = (job_of(&request), at % self.ranks);
                self.jobs[job].sent[rank] = true;
                if !self.at_once && self.jobs[job].sent.iter().all(|sent| *sent) {
                    (0..self.ranks).for_each(|rank| self.after(0..10, News::Wait(job, rank)));
                }
            }
            Output::Event { event: Event::Failed { failure, .. }, .. } => return self.unless_cancelled(&failure.text),
            _ => {}
        }
        Ok(())
    }

    fn on_receiver_output(&mut self, rank: usize, output: Output<Route>) -> Result<(), String> {
        match output {
            Output::LoadPeer { remote, .. } => {
                let connection = ConnectionId(self.fresh().0);
                self.receivers[rank].handle_loaded(self.now, &remote, Ok(connection));
            }
            Output::Send { to: To::Route(route), message, .. } => {
                self.transmit((false, route.0, rank), News::ToSender(route, Box::new(message)));
            }
            Output::Answer { answer: Answer::Ready { request, lease, .. }, .. } => {
                let job = job_of(&request);
                self.jobs[job].leases[rank] = Some(lease);
                let leases: Option<Vec<LeaseId>> = self.jobs[job].leases.iter().copied().collect();
                for (rank, lease) in leases.into_iter().flatten().enumerate() {
                    self.after(1..40, News::Release(job, rank, lease));
                }
            }
            Output::Answer { answer: Answer::Failed { failure, .. }, .. } => {
                return self.unless_cancelled(&failure.text);
            }
            _ => {}
        }
        Ok(())
    }

    /// Where some were given up, others of these may be told so.
    fn unless_cancelled(&self, text: &str) -> Result<(), String> {
        let cancelled = self.jobs.iter().any(|job| job.cancelled);
        if cancelled { Ok(()) } else { Err(format!("nothing fails here, and a request has: {text}")) }
    }
}
