//! Senders and receivers as processes that live, stand still, die and begin again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use pd_backend::address::AddressManager;
use pd_backend::ids::{Checksum, ChecksumMode, ConnectionId, TransferId};
use pd_backend::node::{ChunkShape, IncomingSettings, Node, NodeSettings, OutgoingSettings};
use pd_backend::wire::message::{
    CAPABILITY_CHECKSUMS, CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CAPABILITY_VERIFYING, Hello, ProcessIdentity,
};

use crate::engine::Connection;
use crate::events::{Proc, WorldEvent};
use crate::lmcache::pages;
use crate::network::Route;
use crate::plan::{self, Plan};
use crate::sender_io::address;
use crate::truth::Truth;

pub const CHUNK_BYTES: u64 = 16;
pub const TOKENS: u32 = 4;
pub const TOKEN_BYTES: [u64; 2] = [CHUNK_BYTES / TOKENS as u64, 3];

/// What senders and receivers have in common as processes.
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

pub struct Sender {
    pub process: Process,
    pub session: Node<Route>,
    pub memory: Vec<u8>,
    pub addresses: AddressManager,
    pub connections: BTreeMap<ConnectionId, Connection>,
    /// Checksums of what is being written.
    pub sums: BTreeMap<TransferId, Vec<Checksum>>,
    pub next_connection: u64,
}

pub struct Receiver {
    pub process: Process,
    pub session: Node<Route>,
    pub addresses: AddressManager,
    pub truth: Truth,
    pub watched: BTreeSet<String>,
    pub next_connection: u64,
}

fn chunk_shape(plan: &Plan) -> ChunkShape {
    // LMCache's wire has one group of layers.
    let groups = if plan.has_lmcache() { 1 } else { TOKEN_BYTES.len() };
    ChunkShape {
        slot_bytes: CHUNK_BYTES,
        token_bytes: TOKEN_BYTES[..groups].to_vec(),
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
        capabilities: [CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CAPABILITY_CHECKSUMS, CAPABILITY_VERIFYING]
            .map(String::from)
            .to_vec(),
        process: Some(process),
    }
}

pub fn sender_name(at: Proc) -> String {
    format!("s{}.{}", at.index, at.life)
}

pub fn receiver_name(at: Proc) -> String {
    format!("r{}.{}", at.index, at.life)
}

fn addresses(plan: &Plan, slots: u64) -> AddressManager {
    AddressManager::with_slots(CHUNK_BYTES * plan.initial_slots.min(slots), 1, CHUNK_BYTES).unwrap()
}

fn peers_max(plan: &Plan, peers: usize) -> usize {
    if plan.crowded { (peers - 1).max(1) } else { peers + 2 }
}

pub fn new_sender(plan: &Plan, at: Proc, now: Instant) -> Sender {
    let addresses = addresses(plan, plan.sender_slots);
    let session = Node::new(
        now,
        NodeSettings {
            hello: hello(sender_name(at), at, plan.same_host, "the senders' host"),
            agent_name: sender_name(at),
            metadata: vec![1],
            descriptors: Vec::new(),
            pages: plan.has_lmcache().then(|| pages(1 << 20, plan.sender_slots)),
            chunk: chunk_shape(plan),
            addresses: addresses.clone(),
            len_max_bytes: CHUNK_BYTES * plan.sender_slots,
            allocation_timeout: plan::ALLOCATION,
            write_timeout: plan::WRITE,
            checksum: if plan.checksums { ChecksumMode::Full } else { ChecksumMode::Off },
            requests_max: 64,
            request_chunks_max: 64,
            peers_max: peers_max(plan, plan.all_receivers()),
            heartbeat_interval: plan::HEARTBEAT,
            peer_timeout: plan::PEER,
            outgoing: Some(OutgoingSettings {
                handshake_timeout: plan::HANDSHAKE,
                commit_timeout: plan::COMMIT,
                receivers: if plan.told { (0..plan.all_receivers()).map(address).collect() } else { Vec::new() },
                notify_proxy: true,
            }),
            incoming: None,
            safeguards: plan.safeguards,
        },
    );
    Sender {
        process: Process { life: at.life, alive: true, ..Process::default() },
        session,
        memory: vec![0; (CHUNK_BYTES * plan.sender_slots) as usize],
        addresses,
        connections: BTreeMap::new(),
        sums: BTreeMap::new(),
        next_connection: 1,
    }
}

pub fn new_receiver(plan: &Plan, at: Proc, now: Instant) -> Receiver {
    let addresses = addresses(plan, plan.receiver_slots);
    let session = Node::new(
        now,
        NodeSettings {
            hello: hello(receiver_name(at), at, plan.same_host, "the receivers' host"),
            agent_name: receiver_name(at),
            metadata: vec![2],
            descriptors: addresses.len_bytes().to_le_bytes().to_vec(),
            chunk: chunk_shape(plan),
            addresses: addresses.clone(),
            len_max_bytes: CHUNK_BYTES * plan.receiver_slots,
            allocation_timeout: plan::ALLOCATION,
            write_timeout: plan::WRITE,
            checksum: if plan.checksums { ChecksumMode::Full } else { ChecksumMode::Off },
            requests_max: 64,
            request_chunks_max: 64,
            // Whoever is told of a receiver takes a place there, whether it has requests or not.
            peers_max: if plan.told { plan.senders + 2 } else { peers_max(plan, plan.senders) },
            heartbeat_interval: plan::HEARTBEAT,
            peer_timeout: plan::PEER,
            pages: plan.has_lmcache().then(|| pages(1 << 21, 0)),
            outgoing: None,
            incoming: Some(IncomingSettings {
                wait_timeout: plan::WAIT,
                retention: plan::RETENTION,
                peer_requests_max: 64,
                linger: if plan.lingers { plan::LINGER } else { Duration::ZERO },
            }),
            safeguards: plan.safeguards,
        },
    );
    let memory = vec![0; (CHUNK_BYTES * plan.receiver_slots) as usize];
    Receiver {
        process: Process { life: at.life, alive: true, ..Process::default() },
        session,
        addresses,
        truth: Truth { memory, ..Truth::default() },
        watched: BTreeSet::new(),
        next_connection: 1,
    }
}
