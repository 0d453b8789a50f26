//! Daemons as processes that live, stand still, die and begin again: senders, receivers, and those that are both.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Index, IndexMut};
use std::time::{Duration, Instant};

use pd_backend::address::AddressManager;
use pd_backend::ids::{Checksum, ChecksumMode, ConnectionId, TransferId};
use pd_backend::node::{ChunkShape, IncomingSettings, Node, NodeSettings, OutgoingSettings};
use pd_backend::slot::SlotCounts;
use pd_backend::wire::message::{
    CAPABILITY_AHEAD, CAPABILITY_CHECKSUMS, CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CAPABILITY_VERIFYING, Hello,
    ProcessIdentity,
};

use crate::engine::Connection;
use crate::events::{Proc, Target, WorldEvent};
use crate::lmcache::pages;
use crate::network::Route;
use crate::plan::{self, Plan};
use crate::sender_io::address;
use crate::truth::Truth;

pub const CHUNK_BYTES: u64 = 16;
pub const TOKENS: u32 = 4;
pub const TOKEN_BYTES: [u64; 2] = [CHUNK_BYTES / TOKENS as u64, 3];

/// What our daemons and LMCache's have in common as processes.
#[derive(Debug, Default)]
pub struct Process {
    pub life: u32,
    pub alive: bool,
    /// WorldEvent that a paused process has not read.
    pub paused: Option<VecDeque<WorldEvent>>,
    /// How long it has stood still in all.
    pub paused_for: Duration,
    pub armed: Option<Instant>,
}

/// A daemon of ours: it sends, or receives, or both.
pub struct Daemon {
    pub name: String,
    pub process: Process,
    pub node: Node<Route>,
    pub addresses: AddressManager,
    /// Its memory, and what is really so there.
    pub truth: Truth,
    pub next_connection: u64,
    /// Receivers that its engine was introduced to.
    pub connections: BTreeMap<ConnectionId, Connection>,
    /// Checksums of what is being written.
    pub sums: BTreeMap<TransferId, Vec<Checksum>>,
    /// Senders whose processes it watches.
    pub watched: BTreeSet<String>,
}

impl Daemon {
    pub fn fresh_connection(&mut self) -> ConnectionId {
        self.next_connection += 1;
        ConnectionId(self.next_connection)
    }

    /// What is left of requests that have all ended.
    pub fn left(&self) -> Option<String> {
        let counts = self.node.counts();
        let half = counts.outgoing.unwrap_or_default();
        // The end of a writer is seen on its host: by the receiver, or by the sender that came after it.
        let is_clean =
            counts.slots == SlotCounts::default() && (half.transfers_in_flight, half.requests_active) == (0, 0);
        (!is_clean).then(|| format!("{} has {counts:?} left", self.name))
    }
}

/// All daemons of ours: first those that send, then those that only receive.
pub struct Daemons {
    pub list: Vec<Daemon>,
    senders: usize,
    both: usize,
}

impl Daemons {
    pub fn new(plan: &Plan, now: Instant) -> Self {
        let list = plan.targets().map(|target| new_daemon(plan, target, now)).collect();
        Self { list, senders: plan.senders, both: plan.both }
    }

    pub fn sender(&mut self, index: usize) -> &mut Daemon {
        &mut self[Target::Sender(Proc { index, life: 0 })]
    }

    pub fn receiver(&mut self, index: usize) -> &mut Daemon {
        &mut self[Target::Receiver(Proc { index, life: 0 })]
    }

    fn number(&self, target: Target) -> usize {
        match (target, target.at().index) {
            (Target::Receiver(_), index) if index >= self.both => self.senders + index - self.both,
            (_, index) => index,
        }
    }
}

impl Index<Target> for Daemons {
    type Output = Daemon;

    fn index(&self, target: Target) -> &Daemon {
        &self.list[self.number(target)]
    }
}

impl IndexMut<Target> for Daemons {
    fn index_mut(&mut self, target: Target) -> &mut Daemon {
        let number = self.number(target);
        &mut self.list[number]
    }
}

fn chunk_shape(plan: &Plan) -> ChunkShape {
    // LMCache's wire has one group of layers.
    let groups = if plan.has_lmcache() { 1 } else { TOKEN_BYTES.len() };
    ChunkShape {
        slot_bytes: CHUNK_BYTES,
        token_bytes: TOKEN_BYTES[..groups].to_vec(),
        whole: vec![false; groups],
        chunk_tokens: TOKENS,
        wire_format: 1,
        wire_shape: vec![2, 1, u64::from(TOKENS), 2],
        dtype: "uint8".into(),
    }
}

fn hello(instance: String, at: Proc, same_host: bool, host: &str) -> Hello {
    let process = ProcessIdentity {
        boot_id: if same_host { "one host" } else { host }.into(),
        pid_namespace: 1,
        pid: at.index as u32,
        start_ticks: u64::from(at.life),
    };
    Hello {
        version_min: 2,
        version_max: 2,
        instance,
        engine: "test".into(),
        layout: vec![("chunk_bytes".into(), CHUNK_BYTES.to_string())],
        capabilities: [
            CAPABILITY_AHEAD,
            CAPABILITY_COMMIT,
            CAPABILITY_HEARTBEAT,
            CAPABILITY_CHECKSUMS,
            CAPABILITY_VERIFYING,
        ]
        .map(String::from)
        .to_vec(),
        process: Some(process),
        rendezvous: None,
    }
}

pub fn sender_name(at: Proc) -> String {
    format!("s{}.{}", at.index, at.life)
}

pub fn receiver_name(at: Proc) -> String {
    format!("r{}.{}", at.index, at.life)
}

fn peers_max(plan: &Plan, peers: usize) -> usize {
    if plan.crowded { (peers - 1).max(1) } else { peers + 2 }
}

fn outgoing(plan: &Plan, target: Target, index: usize) -> OutgoingSettings {
    let others = (0..plan.all_receivers()).filter(|&receiver| !plan.receives(target) || receiver != index);
    OutgoingSettings {
        handshake_timeout: plan::HANDSHAKE,
        commit_timeout: plan::COMMIT,
        receivers: if plan.told { others.map(address).collect() } else { Vec::new() },
        receivers_only: false,
        notify_proxy: true,
        parks: plan.parked > 0,
        lease: plan::LEASE,
        push_ahead: plan.ahead,
    }
}

fn incoming(plan: &Plan, index: usize) -> IncomingSettings {
    IncomingSettings {
        wait_timeout: plan::WAIT,
        retention: plan::RETENTION,
        peer_requests_max: 64,
        linger: if plan.lingers { plan::LINGER } else { Duration::ZERO },
        prefill_hosts: None,
        advertised: Some(address(index)),
    }
}

/// A daemon's first life, or another one.
pub fn new_daemon(plan: &Plan, target: Target, now: Instant) -> Daemon {
    let at = target.at();
    let (sends, receives) = (plan.sends(target), plan.receives(target));
    let slots = if receives { plan.receiver_slots } else { plan.sender_slots };
    let addresses = AddressManager::with_slots(CHUNK_BYTES * plan.initial_slots.min(slots), 1, CHUNK_BYTES).unwrap();
    let name = plan.name(target);
    let host = if sends { "the senders' host" } else { "the receivers' host" };
    let receivers_known = if sends { peers_max(plan, plan.all_receivers()) } else { 0 };
    // Whoever is told of a receiver takes a place there, whether it has requests or not.
    let senders_known = if plan.told { plan.senders + 2 } else { peers_max(plan, plan.senders) };
    let settings = NodeSettings {
        hello: hello(name.clone(), at, plan.same_host, host),
        agent_name: name,
        metadata: vec![if sends { 1 } else { 2 }],
        // How long the buffer is: what a sender writes to must have been described to it.
        descriptors: addresses.len_bytes().to_le_bytes().to_vec(),
        pages: plan.has_lmcache().then(|| pages(1 << 20, slots)),
        chunk: chunk_shape(plan),
        addresses: addresses.clone(),
        len_max_bytes: CHUNK_BYTES * slots,
        allocation_timeout: plan::ALLOCATION,
        write_timeout: plan::WRITE,
        checksum: if plan.checksums { ChecksumMode::Full } else { ChecksumMode::Off },
        requests_max: 64,
        request_chunks_max: 64,
        peers_max: receivers_known.max(if receives { senders_known } else { 0 }),
        heartbeat_interval: plan::HEARTBEAT,
        peer_timeout: plan::PEER,
        outgoing: sends.then(|| outgoing(plan, target, at.index)),
        incoming: receives.then(|| incoming(plan, at.index)),
        without: plan.without,
    };
    Daemon {
        name: plan.name(target),
        process: Process { life: at.life, alive: true, ..Process::default() },
        node: Node::new(now, settings),
        addresses,
        truth: Truth { memory: vec![0; (CHUNK_BYTES * slots) as usize], ..Truth::default() },
        next_connection: 1,
        connections: BTreeMap::new(),
        sums: BTreeMap::new(),
        watched: BTreeSet::new(),
    }
}
