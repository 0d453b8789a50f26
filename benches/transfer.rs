//! How fast the engines move host memory between two processes, each against its yardstick in the same run:
//!
//! - `local` against a single-threaded `memcpy` of the same copies between two private buffers;
//! - `nixl` against a bare loop over the same descriptors: create a request, post it, poll until it has ended.
//!
//! The two sides of a pair alternate, and the ratio is that of one round; medians are printed, as a table and as one
//! line of JSON. `cargo bench --bench transfer`; `PD_BENCH_ROUNDS` sets the number of rounds.
#![allow(missing_docs)]

// The tests use the rest of it.
#[allow(dead_code)]
#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nixl_sys::{
    Agent, AgentConfig, MemType, MemoryRegion, NixlDescriptor, OptArgs, RegistrationHandle, XferDescList,
    XferDlistHandle, XferOp, XferRequest,
};
use pd_backend::buffer::{HostMemory, Memory};
use pd_backend::ids::ConnectionId;
use pd_backend::transfer::nixl::prepare_environment;
use pd_backend::transfer::{ByteCopy, EngineKind, Export};
use serde_json::json;
use support::nixl_is_here;
use support::receiver::{Receiver, serve_if_asked};
use support::sender::Sender;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// Chunk length and count.
const SHAPES: [(u64, u64); 6] =
    [(64 * KIB, 1), (64 * KIB, 256), (2 * MIB, 1), (2 * MIB, 64), (32 * MIB, 1), (32 * MIB, 8)];

fn main() {
    prepare_environment().expect("main has just started");
    if serve_if_asked() {
        return;
    }
    let rounds = std::env::var("PD_BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(31);
    let mut rows = Vec::new();
    for (chunk_bytes, chunk_count) in SHAPES {
        rows.extend(bench_local(chunk_bytes, chunk_count, rounds));
    }
    if nixl_is_here() {
        for (chunk_bytes, chunk_count) in SHAPES {
            rows.extend(bench_nixl(chunk_bytes, chunk_count, rounds));
        }
    }
    let mut table = comfy_table::Table::new();
    table.set_header(["engine", "chunk", "chunks", "engine GiB/s", "yardstick", "its GiB/s", "engine / yardstick"]);
    for row in &rows {
        table.add_row([
            row.engine.to_owned(),
            format!("{} KiB", row.chunk_bytes / KIB),
            row.chunk_count.to_string(),
            format!("{:.2}", row.gib_per_s),
            row.yardstick.to_owned(),
            format!("{:.2}", row.yardstick_gib_per_s),
            format!("{:.3}", row.ratio),
        ]);
    }
    println!("{table}");
    let rows: Vec<_> = rows.iter().map(Row::json).collect();
    println!("{}", json!({ "bench": "transfer", "rounds": rounds, "rows": rows }));
}

struct Row {
    engine: &'static str,
    chunk_bytes: u64,
    chunk_count: u64,
    gib_per_s: f64,
    yardstick: &'static str,
    yardstick_gib_per_s: f64,
    /// Median over rounds of the yardstick's time by the engine's.
    ratio: f64,
}

impl Row {
    fn json(&self) -> serde_json::Value {
        json!({
            "engine": self.engine,
            "chunk_bytes": self.chunk_bytes,
            "chunks": self.chunk_count,
            "gib_per_s": round3(self.gib_per_s),
            "yardstick": self.yardstick,
            "yardstick_gib_per_s": round3(self.yardstick_gib_per_s),
            "ratio": round3(self.ratio),
        })
    }
}

fn round3(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Every other unit of the source, in reverse, into every other unit of the target: nothing can be joined.
fn copies(chunk_bytes: u64, chunk_count: u64) -> Vec<ByteCopy> {
    (0..chunk_count)
        .map(|chunk| ByteCopy {
            local_offset: (chunk_count - 1 - chunk) * 2 * chunk_bytes,
            remote_offset: chunk * 2 * chunk_bytes,
            len_bytes: chunk_bytes,
        })
        .collect()
}

fn buffer_len_bytes(chunk_bytes: u64, chunk_count: u64) -> u64 {
    chunk_bytes * chunk_count * 2
}

/// How often a shape is repeated in one measurement, so that a measurement is long enough for the clock and the
/// scheduler.
fn repeats(chunk_bytes: u64, chunk_count: u64) -> u64 {
    (64 * MIB / (chunk_bytes * chunk_count)).max(1)
}

fn bench_local(chunk_bytes: u64, chunk_count: u64, rounds: usize) -> Vec<Row> {
    let mut pair = Pair::start(EngineKind::Local, chunk_bytes, chunk_count);
    let len = buffer_len_bytes(chunk_bytes, chunk_count) as usize;
    let (source, mut target) = (vec![1_u8; len], vec![2_u8; len]);
    let list = copies(chunk_bytes, chunk_count);
    let mut memcpy = || {
        for copy in black_box(&list) {
            let range = |offset: u64| offset as usize..(offset + copy.len_bytes) as usize;
            target[range(copy.remote_offset)].copy_from_slice(&source[range(copy.local_offset)]);
        }
        black_box(&mut target);
    };
    let mut engine = || pair.ship();
    let mut sides: [Side<'_>; 2] = [("local", &mut engine), ("memcpy", &mut memcpy)];
    measure(chunk_bytes, chunk_count, rounds, &mut sides)
}

fn bench_nixl(chunk_bytes: u64, chunk_count: u64, rounds: usize) -> Vec<Row> {
    let mut pair = Pair::start(EngineKind::Nixl, chunk_bytes, chunk_count);
    let bare = Bare::start(&mut pair, chunk_bytes, chunk_count);
    let again = bare.request();
    let mut engine = || pair.ship();
    let mut create = || bare.run(&bare.request());
    let mut make = || bare.run(&bare.request_units());
    let mut repost = || bare.run(&again);
    let mut sides: [Side<'_>; 4] = [
        ("nixl", &mut engine),
        ("bare: create, post, poll", &mut create),
        ("bare: make from prepared, post, poll", &mut make),
        ("bare: post the same request again, poll", &mut repost),
    ];
    measure(chunk_bytes, chunk_count, rounds, &mut sides)
}

type Side<'a> = (&'static str, &'a mut dyn FnMut());

/// Alternates the sides, the first of which is the engine, and compares it with each of the others.
fn measure(chunk_bytes: u64, chunk_count: u64, rounds: usize, sides: &mut [Side<'_>]) -> Vec<Row> {
    let repeats = repeats(chunk_bytes, chunk_count);
    let gib = (chunk_bytes * chunk_count * repeats) as f64 / (1_u64 << 30) as f64;
    let mut times: Vec<Vec<Duration>> = vec![Vec::new(); sides.len()];
    for round in 0..=rounds {
        for at in 0..sides.len() {
            // Each side goes first in some rounds.
            let side = (at + round) % sides.len();
            let started = Instant::now();
            for _ in 0..repeats {
                (sides[side].1)();
            }
            // The first round warms up.
            if round > 0 {
                times[side].push(started.elapsed());
            }
        }
    }
    let gib_per_s = |side: &[Duration]| gib / median(side.iter().map(Duration::as_secs_f64));
    let engine = &times[0];
    (1..sides.len())
        .map(|side| Row {
            engine: sides[0].0,
            chunk_bytes,
            chunk_count,
            gib_per_s: gib_per_s(engine),
            yardstick: sides[side].0,
            yardstick_gib_per_s: gib_per_s(&times[side]),
            ratio: median(
                times[side]
                    .iter()
                    .zip(engine)
                    .map(|(yardstick, engine)| yardstick.as_secs_f64() / engine.as_secs_f64()),
            ),
        })
        .collect()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// An engine connected to a receiver in another process.
struct Pair {
    sender: Sender,
    receiver: Receiver,
    connection: ConnectionId,
    list: Vec<ByteCopy>,
}

impl Pair {
    fn start(kind: EngineKind, chunk_bytes: u64, chunk_count: u64) -> Self {
        let len_bytes = buffer_len_bytes(chunk_bytes, chunk_count);
        let mut receiver = Receiver::start(&[], kind, len_bytes, chunk_bytes);
        let mut sender = Sender::start(kind, len_bytes, chunk_bytes);
        let connection = sender.connect(&mut receiver);
        Self { sender, receiver, connection, list: copies(chunk_bytes, chunk_count) }
    }

    fn ship(&mut self) {
        self.sender.ship(self.connection, &self.list).expect("the receiver lives");
    }
}

/// NIXL without this project: what its own example does.
struct Bare {
    local_units: XferDlistHandle,
    remote_units: XferDlistHandle,
    _registration: RegistrationHandle,
    agent: Agent,
    /// The engine's own: either side finds the same bytes in the same caches.
    memory: Arc<Memory>,
    remote_address: u64,
    receiver: String,
    list: Vec<ByteCopy>,
    chunk_bytes: u64,
}

#[derive(Debug)]
struct Range<'a>(&'a HostMemory);

#[allow(unsafe_code)]
impl MemoryRegion for Range<'_> {
    unsafe fn as_ptr(&self) -> *const u8 {
        self.0.address() as *const u8
    }

    fn size(&self) -> usize {
        self.0.len_bytes() as usize
    }
}

impl NixlDescriptor for Range<'_> {
    fn mem_type(&self) -> MemType {
        MemType::Dram
    }

    fn device_id(&self) -> u64 {
        0
    }
}

const fn host(memory: &Memory) -> &HostMemory {
    match memory {
        Memory::Host(memory) => memory,
        Memory::Cuda(_) => panic!("this bench moves host memory"),
    }
}

impl Bare {
    fn start(pair: &mut Pair, chunk_bytes: u64, chunk_count: u64) -> Self {
        const DESCRIPTORS_HEAD: usize = "pdnixldesc".len() + 1;
        let Pair { receiver, sender, .. } = pair;
        let body = &receiver.export.descriptors[DESCRIPTORS_HEAD..];
        let (remote_address, ..): (u64, Vec<u64>, u64, u32, u64, Option<u64>) =
            rmp_serde::from_slice(body).expect("the engine's own encoding");
        let memory = Arc::clone(&sender.memory);
        let name = format!("bare-{}-{}", std::process::id(), uuid::Uuid::new_v4());
        let config = AgentConfig { pthr_delay_us: 10_000, ..AgentConfig::default() };
        let agent = Agent::new_configured(&name, &config).expect("an agent");
        let (_, params) = agent.get_plugin_params("UCX").expect("UCX");
        agent.create_backend("UCX", &params).expect("UCX works");
        let registration = agent.register_memory(&Range(host(&memory)), None).expect("it registers");
        let metadata = agent.get_local_md().expect("metadata");
        receiver.load_peer(&Export { agent_name: name, metadata, descriptors: Vec::new() });
        let receiver = agent.load_remote_md(&receiver.export.metadata).expect("it loads");
        let units = |agent_name: &str, address: u64| {
            let mut list = XferDescList::new(MemType::Dram).expect("a list");
            for unit in 0..chunk_count * 2 {
                list.add_desc((address + unit * chunk_bytes) as usize, chunk_bytes as usize, 0);
            }
            agent.prepare_xfer_dlist(agent_name, &list, None).expect("it is registered")
        };
        Self {
            local_units: units("", host(&memory).address()),
            remote_units: units(&receiver, remote_address),
            _registration: registration,
            agent,
            memory,
            remote_address,
            receiver,
            list: copies(chunk_bytes, chunk_count),
            chunk_bytes,
        }
    }

    fn request(&self) -> XferRequest {
        let mut local = XferDescList::new(MemType::Dram).expect("a list");
        let mut remote = XferDescList::new(MemType::Dram).expect("a list");
        for copy in &self.list {
            local.add_desc((host(&self.memory).address() + copy.local_offset) as usize, copy.len_bytes as usize, 0);
            remote.add_desc((self.remote_address + copy.remote_offset) as usize, copy.len_bytes as usize, 0);
        }
        self.agent.create_xfer_req(XferOp::Write, &local, &remote, &self.receiver, None).expect("a request")
    }

    fn request_units(&self) -> XferRequest {
        let mut options = OptArgs::new().expect("options");
        options.set_skip_descriptor_merge(true).expect("an option");
        let index = |offset: u64| (offset / self.chunk_bytes) as i32;
        let local: Vec<i32> = self.list.iter().map(|copy| index(copy.local_offset)).collect();
        let remote: Vec<i32> = self.list.iter().map(|copy| index(copy.remote_offset)).collect();
        self.agent
            .make_xfer_req(XferOp::Write, &self.local_units, &local, &self.remote_units, &remote, Some(&options))
            .expect("a request")
    }

    fn run(&self, request: &XferRequest) {
        let mut in_progress = self.agent.post_xfer_req(request, None).expect("the receiver lives");
        while in_progress {
            in_progress = !self.agent.get_xfer_status(request).expect("the receiver lives").is_success();
        }
    }
}
