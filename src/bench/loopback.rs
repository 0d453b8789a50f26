//! `pd-bench loopback`: the main job, verified and measured.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::baseline::Baseline;
use super::cpu;
use super::daemon::Extra;
use super::error::BenchError;
use super::options::LoopbackOptions;
use super::pair::{DaemonsReady, Pair};
use super::plan::{self, Round, Shape};
use super::pool::Pool;
use super::report::{CpuPerGib, LoopbackReport, gib};
use super::round;
use super::session;
use super::summary::Durations;

/// Starts both daemons, ships the requests, prints the result.
pub(super) async fn run(options: &LoopbackOptions) -> Result<(), BenchError> {
    let measure = async |ready: &[DaemonsReady]| measure(options, ready).await;
    let extra = Extra { both_ways: options.both_ways, ..Extra::default() };
    session::run(&options.daemons, &extra, options.json, measure, |report| {
        format!("{}\n{}", report.table(), report.sentence())
    })
    .await
}

async fn measure(options: &LoopbackOptions, ready: &[DaemonsReady]) -> Result<LoopbackReport, BenchError> {
    let mut pairs = Vec::with_capacity(ready.len());
    for ready in ready {
        pairs.push(Pair::attach(ready, Duration::from_secs(options.daemons.timeout_s)).await?);
    }
    check_slots(options, &pairs)?;
    let directions = pairs.len() as u64;
    let (chunk_tokens, chunk_bytes) = (pairs[0].chunk_tokens, pairs[0].chunk_bytes);
    let shape = Shape { seed: options.seed, chunk_count: options.chunks, chunk_tokens, chunk_bytes };
    let pool = Pool::new(options.seed, chunk_bytes);
    let side_by_side = u64::from(options.in_flight.min(options.requests)) * directions;
    let mut baseline = Baseline::new(side_by_side * u64::from(options.chunks), chunk_bytes);
    let progress = progress_bar(options, &shape, directions as u32);
    let mut totals = Totals::new();
    let mut number = 0;
    for Round { requests, counted } in plan::rounds(options.requests, options.in_flight, options.warm_up) {
        let mut plan = || {
            number += u64::from(requests);
            (number - u64::from(requests)..number).map(|number| shape.request(number)).collect()
        };
        let requests: Vec<Vec<_>> = pairs.iter().map(|_| plan()).collect();
        let cpu_before = Cpu::of(&pairs[0])?;
        let outcome = round::ship(&mut pairs, &requests, &pool, |bytes| progress.inc(bytes)).await?;
        let cpu = Cpu::of(&pairs[0])?.since(cpu_before);
        let copied_in = baseline.copy(&requests.concat(), chunk_bytes);
        if counted {
            totals.add(&outcome, copied_in, cpu);
        }
    }
    progress.finish_and_clear();
    for pair in &mut pairs {
        pair.detach().await?;
    }
    Ok(totals.report(options, pairs.swap_remove(0)))
}

fn check_slots(options: &LoopbackOptions, pairs: &[Pair]) -> Result<(), BenchError> {
    let requests = u64::from(options.in_flight.min(options.requests)) * pairs.len() as u64;
    let needed = requests * u64::from(options.chunks);
    let pair = &pairs[0];
    for (role, slot_count) in [("sender", pair.sender.slot_count), ("receiver", pair.receiver.slot_count)] {
        if needed > u64::from(slot_count) {
            return Err(BenchError::TooFewSlots { role, needed, slot_count, chunk_bytes: pair.chunk_bytes });
        }
    }
    Ok(())
}

/// On standard error, of the bytes verified so far; nothing where no person looks.
fn progress_bar(options: &LoopbackOptions, shape: &Shape, directions: u32) -> ProgressBar {
    let bytes = plan::rounds(options.requests, options.in_flight, options.warm_up)
        .iter()
        .scan(0, |number, round| {
            let numbers = *number..*number + u64::from(round.requests * directions);
            *number = numbers.end;
            Some(numbers.map(|number| shape.request(number).len_bytes()).sum::<u64>())
        })
        .sum();
    let shown = !options.json && std::io::stderr().is_terminal();
    let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} moved and verified, {eta} left")
        .expect("the template is a constant");
    ProgressBar::with_draw_target(Some(bytes), target).with_style(style)
}

/// Processor time of both daemons.
#[derive(Debug, Clone, Copy, Default)]
struct Cpu {
    sender: Duration,
    receiver: Duration,
}

impl Cpu {
    fn of(pair: &Pair) -> Result<Self, BenchError> {
        Ok(Self { sender: cpu::used(pair.sender.pid)?, receiver: cpu::used(pair.receiver.pid)? })
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            sender: self.sender.saturating_sub(earlier.sender),
            receiver: self.receiver.saturating_sub(earlier.receiver),
        }
    }
}

/// Sums over the rounds that count.
#[derive(Debug)]
struct Totals {
    requests: u64,
    bytes: u64,
    busy: Duration,
    copied_in: Duration,
    cpu: Cpu,
    latency: Durations,
    alloc: Durations,
    transfer: Durations,
    commit: Durations,
}

impl Totals {
    fn new() -> Self {
        Self {
            requests: 0,
            bytes: 0,
            busy: Duration::ZERO,
            copied_in: Duration::ZERO,
            cpu: Cpu::default(),
            latency: Durations::new(),
            alloc: Durations::new(),
            transfer: Durations::new(),
            commit: Durations::new(),
        }
    }

    fn add(&mut self, outcome: &round::RoundOutcome, copied_in: Duration, cpu: Cpu) {
        self.busy += outcome.busy;
        self.copied_in += copied_in;
        self.cpu.sender += cpu.sender;
        self.cpu.receiver += cpu.receiver;
        for request in &outcome.requests {
            self.requests += 1;
            self.bytes += request.bytes;
            self.latency.add(request.latency);
            self.alloc.add_us(request.timings.alloc_us);
            self.transfer.add_us(request.timings.transfer_us);
            self.commit.add_us(request.timings.commit_us);
        }
    }

    fn report(&self, options: &LoopbackOptions, pair: Pair) -> LoopbackReport {
        let (gib, memory) = (gib(self.bytes), pair.memory());
        LoopbackReport {
            engine: pair.engine,
            memory,
            chunk_bytes: pair.chunk_bytes,
            requests: self.requests,
            bytes: self.bytes,
            // A byte that differs ends the run before there is a report.
            verified: true,
            gib_per_s: gib / self.busy.as_secs_f64(),
            memcpy_gib_per_s: gib / self.copied_in.as_secs_f64(),
            latency_ms: self.latency.summary_ms(),
            alloc_ms: self.alloc.summary_ms(),
            transfer_ms: self.transfer.summary_ms(),
            commit_ms: self.commit.summary_ms(),
            cpu_s_per_gib: CpuPerGib {
                sender: self.cpu.sender.as_secs_f64() / gib,
                receiver: self.cpu.receiver.as_secs_f64() / gib,
            },
            model: pair.model,
            chunks: options.chunks,
            in_flight: options.in_flight,
        }
    }
}
