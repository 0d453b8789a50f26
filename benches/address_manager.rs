//! The address manager beside two allocators of ranges, in one run: how much of the space can be used, and what an
//! operation costs. `cargo bench --bench address_manager`; the last line is one JSON object.
//!
//! Ours is the public, locked `AddressManager`; `offset-allocator` and `range-alloc` are under a `std::sync::Mutex`,
//! which a batch takes once, as ours does. Workloads alternate between the allocators, and medians are printed.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Instant;

use pd_backend::address::{AddressManager, AddressRange};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The allocation unit of the workloads, and their chunk.
const UNIT: u64 = 4 * KIB;
const CHUNK: u64 = 256 * KIB;

/// An allocator of ranges, whichever it is.
trait Pool {
    type Token: Clone;
    fn allocate(&self, len_bytes: u64) -> Option<Self::Token>;
    fn free(&self, token: Self::Token);
    /// All or nothing.
    fn allocate_each(&self, lens_bytes: &[u64], out: &mut Vec<Self::Token>) -> bool;
    fn allocate_batch(&self, len_bytes: u64, count: usize, out: &mut Vec<Self::Token>) -> bool;
    fn free_batch(&self, tokens: &mut Vec<Self::Token>);
}

impl Pool for AddressManager {
    type Token = AddressRange;

    fn allocate(&self, len_bytes: u64) -> Option<AddressRange> {
        Self::allocate(self, len_bytes).ok()
    }

    fn free(&self, token: AddressRange) {
        Self::free(self, token).unwrap();
    }

    fn allocate_each(&self, lens_bytes: &[u64], out: &mut Vec<AddressRange>) -> bool {
        Self::allocate_each(self, lens_bytes).map(|ranges| out.extend(ranges)).is_ok()
    }

    fn allocate_batch(&self, len_bytes: u64, count: usize, out: &mut Vec<AddressRange>) -> bool {
        Pool::allocate_each(self, &vec![len_bytes; count], out)
    }

    fn free_batch(&self, tokens: &mut Vec<AddressRange>) {
        Self::free_batch(self, tokens).unwrap();
        tokens.clear();
    }
}

/// What the other two have in common: one range at a time.
trait OneByOne {
    type Token: Clone;
    fn take(&mut self, len_bytes: u64) -> Option<Self::Token>;
    fn give(&mut self, token: Self::Token);
}

struct Locked<A>(Mutex<A>);

impl<A: OneByOne> Locked<A> {
    fn take_all(&self, lens_bytes: impl Iterator<Item = u64>, out: &mut Vec<A::Token>) -> bool {
        let mut pool = self.0.lock().unwrap();
        let first = out.len();
        for len_bytes in lens_bytes {
            match pool.take(len_bytes) {
                Some(token) => out.push(token),
                None => {
                    out.drain(first..).for_each(|token| pool.give(token));
                    return false;
                }
            }
        }
        true
    }
}

impl<A: OneByOne> Pool for Locked<A> {
    type Token = A::Token;

    fn allocate(&self, len_bytes: u64) -> Option<A::Token> {
        self.0.lock().unwrap().take(len_bytes)
    }

    fn free(&self, token: A::Token) {
        self.0.lock().unwrap().give(token);
    }

    fn allocate_each(&self, lens_bytes: &[u64], out: &mut Vec<A::Token>) -> bool {
        self.take_all(lens_bytes.iter().copied(), out)
    }

    fn allocate_batch(&self, len_bytes: u64, count: usize, out: &mut Vec<A::Token>) -> bool {
        self.take_all(std::iter::repeat_n(len_bytes, count), out)
    }

    fn free_batch(&self, tokens: &mut Vec<A::Token>) {
        let mut pool = self.0.lock().unwrap();
        tokens.drain(..).for_each(|token| pool.give(token));
    }
}

/// `offset-allocator` counts in 32 bits: in units.
struct Offset {
    allocator: offset_allocator::Allocator<u32>,
    unit: u64,
}

impl OneByOne for Offset {
    type Token = offset_allocator::Allocation<u32>;

    #[inline]
    fn take(&mut self, len_bytes: u64) -> Option<Self::Token> {
        self.allocator.allocate((len_bytes / self.unit) as u32)
    }

    #[inline]
    fn give(&mut self, token: Self::Token) {
        self.allocator.free(token);
    }
}

impl OneByOne for range_alloc::RangeAllocator<u64> {
    type Token = Range<u64>;

    #[inline]
    fn take(&mut self, len_bytes: u64) -> Option<Range<u64>> {
        self.allocate_range(len_bytes).ok()
    }

    #[inline]
    fn give(&mut self, token: Range<u64>) {
        self.free_range(token);
    }
}

fn offset(pool_bytes: u64, unit: u64, count_max: u64) -> Locked<Offset> {
    let size = u32::try_from(pool_bytes / unit).unwrap();
    Locked(Mutex::new(Offset {
        allocator: offset_allocator::Allocator::with_max_allocs(size, count_max as u32 + 16),
        unit,
    }))
}

fn range(pool_bytes: u64) -> Locked<range_alloc::RangeAllocator<u64>> {
    Locked(Mutex::new(range_alloc::RangeAllocator::new(0..pool_bytes)))
}

/// Small, fast and the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// Each octave as likely as any other, in units of `UNIT`.
    fn log_uniform(&mut self, low: u64, high: u64) -> u64 {
        let fraction = self.next() as f64 / u64::MAX as f64;
        let len = low as f64 * (high as f64 / low as f64).powf(fraction);
        (len as u64).div_ceil(UNIT) * UNIT
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn ns_per(started: Instant, operations: usize) -> f64 {
    started.elapsed().as_nanos() as f64 / operations as f64
}

/// U: fill, then free everything in the order it was taken.
fn fill_and_free<P: Pool>(pool: &P, slots: usize) -> f64 {
    let mut tokens = Vec::with_capacity(slots);
    let started = Instant::now();
    while let Some(token) = pool.allocate(CHUNK) {
        tokens.push(token);
    }
    let count = tokens.len();
    for token in tokens {
        pool.free(token);
    }
    let ns = ns_per(started, 2 * count);
    assert_eq!(count, slots, "every slot was handed out");
    ns
}

/// C: at 90 % full, free one at random and take one.
fn churn<P: Pool>(pool: &P, slots: usize, operations: usize) -> f64 {
    let mut random = Random(1);
    let mut tokens: Vec<P::Token> = (0..slots * 9 / 10).map(|_| pool.allocate(CHUNK).unwrap()).collect();
    // Twice through what is live, untimed: the space looks as it does after hours.
    let warm_up = 2 * tokens.len();
    let picks: Vec<usize> = (0..warm_up + operations).map(|_| random.below(tokens.len() as u64) as usize).collect();
    let mut started = Instant::now();
    for (index, pick) in picks.into_iter().enumerate() {
        if index == warm_up {
            started = Instant::now();
        }
        pool.free(tokens[pick].clone());
        tokens[pick] = pool.allocate(CHUNK).unwrap();
    }
    let ns = ns_per(started, 2 * operations);
    tokens.into_iter().for_each(|token| pool.free(token));
    ns
}

/// B: fill in batches of 64, then free all in batches of 64 that were shuffled together.
fn batches<P: Pool>(pool: &P, slots: usize) -> f64 {
    let mut random = Random(2);
    let mut tokens = Vec::with_capacity(slots);
    let started = Instant::now();
    while pool.allocate_batch(CHUNK, 64, &mut tokens) {}
    let taking = started.elapsed();
    assert_eq!(tokens.len(), slots / 64 * 64);
    random.shuffle(&mut tokens);
    let mut parts: Vec<Vec<P::Token>> = tokens.chunks(64).map(<[P::Token]>::to_vec).collect();
    let started = Instant::now();
    parts.iter_mut().for_each(|part| pool.free_batch(part));
    (taking + started.elapsed()).as_nanos() as f64 / (2 * tokens.len()) as f64
}

/// How full a space was, and what it cost.
struct Fullness {
    ns: f64,
    avg: f64,
    min: f64,
}

/// P and R: requests, each taken whole or not at all; when there is no room, requests are evicted at random until
/// there is; only the first `victims` places of the list are ever evicted from. Fullness is what is allocated after each
/// request, over the space, as Mooncake's benchmark has it.
fn requests<P: Pool>(
    pool: &P,
    pool_bytes: u64,
    operations: usize,
    victims: usize,
    mut request: impl FnMut(&mut Random, &mut Vec<u64>),
) -> Fullness {
    let mut random = Random(3);
    let mut live: Vec<(Vec<P::Token>, u64)> = Vec::new();
    let (mut lens, mut used) = (Vec::new(), 0u64);
    let (mut sum, mut min, mut calls) = (0.0, 1.0f64, 0usize);
    let mut done = 0;
    let mut started = Instant::now();
    // The first time through fills the space, and is not counted.
    let mut handed_out = 0u64;
    let mut counting = false;
    while done < operations {
        if !counting && handed_out >= 2 * pool_bytes {
            counting = true;
            started = Instant::now();
        }
        lens.clear();
        request(&mut random, &mut lens);
        let mut tokens = Vec::with_capacity(lens.len());
        while !pool.allocate_each(&lens, &mut tokens) {
            let (mut tokens, len) = live.swap_remove(random.below(live.len().min(victims) as u64) as usize);
            used -= len;
            calls += usize::from(counting) * tokens.len();
            pool.free_batch(&mut tokens);
        }
        let len: u64 = lens.iter().sum();
        used += len;
        handed_out += len;
        if counting {
            calls += tokens.len();
            done += 1;
            let full = used as f64 / pool_bytes as f64;
            sum += full;
            min = min.min(full);
        }
        live.push((tokens, len));
    }
    let ns = ns_per(started, calls);
    black_box(live);
    Fullness { ns, avg: sum / operations as f64, min }
}

/// P: up to 16 full chunks and one partial chunk.
fn partial_request(random: &mut Random, lens: &mut Vec<u64>) {
    lens.extend(std::iter::repeat_n(CHUNK, random.between(0, 16) as usize));
    lens.push(random.between(1, CHUNK / UNIT - 1) * UNIT);
}

/// One uniform row: fill, then free one at random and take as many as fit. Answers the fewest there ever were when
/// the space was full, and ns an operation.
fn uniform<P: Pool>(pool: &P, len_bytes: u64, operations: usize) -> (u64, f64) {
    let mut random = Random(4);
    let mut tokens = Vec::new();
    let started = Instant::now();
    let mut calls = 0usize;
    let mut fewest = u64::MAX;
    for _ in 0..operations {
        while let Some(token) = pool.allocate(len_bytes) {
            tokens.push(token);
            calls += 1;
        }
        fewest = fewest.min(tokens.len() as u64);
        pool.free(tokens.swap_remove(random.below(tokens.len() as u64) as usize));
        calls += 2;
    }
    (fewest, ns_per(started, calls))
}

fn uniform_table() -> f64 {
    println!("Uniform sizes: free one at random, take as many as fit; allocated / pool when fullest, at worst | ns");
    println!(
        "{:>10} {:>9} {:>11} | {:>15} {:>15} {:>15} | {:>15} {:>15}",
        "size", "pool", "floor", "ours, own slots", "256 KiB slots", "no slots", "offset-alloc", "range-alloc"
    );
    let mut worst = 1.0f64;
    let base = (5..=25).step_by(2).map(|power| 1u64 << power).collect::<Vec<_>>();
    type Row = (&'static str, fn(u64) -> u64);
    let kinds: [Row; 5] = [
        ("2^n", |len| len),
        ("2^n - 17", |len| len - 17),
        ("2^n + 17", |len| len + 17),
        ("2^n x 0.9", |len| len * 9 / 10),
        ("2^n x 1.1", |len| len * 11 / 10),
    ];
    for (name, size) in kinds {
        println!("  {name}");
        for &power in &base {
            let len = size(power);
            // 4,096 objects, or Mooncake's 2 GiB where that is less.
            let pool_bytes = (power * 4096).min(2 * GIB);
            let floor = pool_bytes / len;
            let operations = 6_000;
            let mut cells = Vec::new();
            for slot_bytes in [len, CHUNK, 0] {
                let ours = match slot_bytes {
                    0 => AddressManager::new(pool_bytes, 1).unwrap(),
                    _ => AddressManager::with_slots(pool_bytes, 1, slot_bytes).unwrap(),
                };
                let (fewest, ns) = uniform(&ours, len, operations);
                ours.check().unwrap();
                worst = worst.min(fewest as f64 / floor as f64);
                cells.push((fewest, ns));
            }
            cells.push(uniform(&offset(pool_bytes, 1, floor), len, operations));
            cells.push(uniform(&range(pool_bytes), len, operations));
            let cells: Vec<String> = cells
                .iter()
                .map(|(fewest, ns)| format!("{:.4} {ns:>6.0} ns", (fewest * len) as f64 / pool_bytes as f64))
                .collect();
            println!(
                "{len:>10} {:>5} MiB {:>11.4} | {:>15} {:>15} {:>15} | {:>15} {:>15}",
                pool_bytes as f64 / MIB as f64,
                (floor * len) as f64 / pool_bytes as f64,
                cells[0],
                cells[1],
                cells[2],
                cells[3],
                cells[4]
            );
        }
    }
    worst
}

/// U, C and B in turns; medians of ours, offset-allocator, range-alloc.
fn whole_chunks() -> [[f64; 3]; 3] {
    let pool_bytes = 16 * GIB;
    let slots = (pool_bytes / CHUNK) as usize;
    let mut times: [[Vec<f64>; 3]; 3] = Default::default();
    fn each<P: Pool>(pool: &P, slots: usize) -> [f64; 3] {
        [fill_and_free(pool, slots), churn(pool, slots, 60_000), batches(pool, slots)]
    }
    for _ in 0..41 {
        let rounds = [
            each(&AddressManager::with_slots(pool_bytes, UNIT, CHUNK).unwrap(), slots),
            each(&offset(pool_bytes, UNIT, slots as u64), slots),
            each(&range(pool_bytes), slots),
        ];
        for (allocator, round) in rounds.into_iter().enumerate() {
            for (workload, ns) in round.into_iter().enumerate() {
                times[workload][allocator].push(ns);
            }
        }
    }
    times.map(|row| row.map(median))
}

/// Takes all of a space but `slots_max` slots, the last ones taken or some at random, so that the work is the same in any
/// space; answers how many.
fn leave<P: Pool>(pool: &P, pool_bytes: u64, slots_max: usize, scattered: bool) -> usize {
    let mut all = Vec::new();
    assert!(pool.allocate_batch(CHUNK, (pool_bytes / CHUNK) as usize, &mut all));
    if scattered {
        Random(5).shuffle(&mut all);
    }
    let mut left = all.split_off(all.len().saturating_sub(slots_max));
    let count = left.len();
    pool.free_batch(&mut left);
    count
}

/// U, C and B, several times: medians.
fn whole_chunks_in<P: Pool>(pool: &P, slots: usize) -> [f64; 3] {
    [
        median((0..15).map(|_| fill_and_free(pool, slots)).collect()),
        median((0..15).map(|_| churn(pool, slots, 60_000)).collect()),
        median((0..15).map(|_| batches(pool, slots)).collect()),
    ]
}

fn by_size() {
    println!("\nBy the size of the space, 256 KiB slots, ns an operation");
    println!("  U, C, B: all of it is taken but up to 65,536 slots, at its end or scattered at random");
    println!("  P: evicts among 4,096 requests, the others stay");
    println!("  {:>8} {:>34} {:>8} {:>8} {:>8} {:>8}", "space", "", "U", "C", "B", "P");
    for pool_bytes in [GIB, 64 * GIB, 1024 * GIB] {
        let gib = pool_bytes / GIB;
        for (place, scattered) in [("at the end", false), ("scattered", true)] {
            let ours = AddressManager::with_slots(pool_bytes, UNIT, CHUNK).unwrap();
            let slots = leave(&ours, pool_bytes, 65_536, scattered);
            let [u, c, b] = whole_chunks_in(&ours, slots);
            let ours = AddressManager::with_slots(pool_bytes, UNIT, CHUNK).unwrap();
            let p = requests(&ours, pool_bytes, 50_000, 4096, partial_request).ns;
            println!("  {gib:>4} GiB {:>34} {u:>8.1} {c:>8.1} {b:>8.1} {p:>8.1}", format!("ours, {place}"));
            let other = offset(pool_bytes, UNIT, pool_bytes / CHUNK);
            let slots = leave(&other, pool_bytes, 65_536, scattered);
            let [u, c, b] = whole_chunks_in(&other, slots);
            println!("  {gib:>4} GiB {:>34} {u:>8.1} {c:>8.1} {b:>8.1}", format!("offset-allocator, {place}"));
        }
    }
}

fn main() {
    let begun = Instant::now();
    let uniform_min_util = uniform_table();

    println!("\nWhole chunks, {} slots of 256 KiB, ns an operation (median)", 16 * GIB / CHUNK);
    let [u, c, b] = whole_chunks();
    for (name, [ours, offset, range]) in [("U fill, free all", u), ("C churn at 90 %", c), ("B batches of 64", b)] {
        println!(
            "  {name:<18} ours {ours:>6.1}   offset-allocator {offset:>6.1}   range-alloc {range:>8.1}   ours / offset-allocator {:.2}",
            ours / offset
        );
    }

    let row = |name: &str, fullness: &Fullness| {
        println!("  {name:<34} util avg {:.4} min {:.4}  {:>8.0} ns", fullness.avg, fullness.min, fullness.ns);
    };
    println!("\nP: 0-16 full chunks and one partial, all or nothing, in 16 GiB");
    let p = requests(
        &AddressManager::with_slots(16 * GIB, UNIT, CHUNK).unwrap(),
        16 * GIB,
        100_000,
        usize::MAX,
        partial_request,
    );
    row("ours", &p);
    row(
        "offset-allocator",
        &requests(&offset(16 * GIB, UNIT, 200_000), 16 * GIB, 100_000, usize::MAX, partial_request),
    );
    row("range-alloc", &requests(&range(16 * GIB), 16 * GIB, 20_000, usize::MAX, partial_request));

    println!("\nR: log-uniform 4 KiB to 16 MiB in 16 GiB");
    let log_uniform = |random: &mut Random, lens: &mut Vec<u64>| lens.push(random.log_uniform(UNIT, 16 * MIB));
    let r = requests(&AddressManager::new(16 * GIB, UNIT).unwrap(), 16 * GIB, 200_000, usize::MAX, log_uniform);
    row("ours", &r);
    let slotted = AddressManager::with_slots(16 * GIB, UNIT, CHUNK).unwrap();
    row("ours, 256 KiB slots", &requests(&slotted, 16 * GIB, 200_000, usize::MAX, log_uniform));
    row("offset-allocator", &requests(&offset(16 * GIB, UNIT, 1 << 20), 16 * GIB, 200_000, usize::MAX, log_uniform));
    row("range-alloc", &requests(&range(16 * GIB), 16 * GIB, 100_000, usize::MAX, log_uniform));

    println!("\nMooncake's random row: uniform 1 KiB to 64 MiB in 2 GiB");
    let seeds = |random: &mut Random, lens: &mut Vec<u64>| lens.push(random.between(KIB, 64 * MIB));
    let s = requests(&AddressManager::new(2 * GIB, 1).unwrap(), 2 * GIB, 300_000, usize::MAX, seeds);
    row("ours", &s);
    row("offset-allocator", &requests(&offset(2 * GIB, 1, 1 << 16), 2 * GIB, 300_000, usize::MAX, seeds));
    row("range-alloc", &requests(&range(2 * GIB), 2 * GIB, 300_000, usize::MAX, seeds));

    by_size();

    println!("\n{:.0} s in all", begun.elapsed().as_secs_f64());
    println!(
        "{{\"uniform_min_util\":{uniform_min_util:.4},\"random_avg_util\":{:.4},\"random_min_util\":{:.4},\"p_util\":{:.4},\
         \"u_vs_offset_allocator\":{:.3},\"c_vs_offset_allocator\":{:.3},\"b_vs_offset_allocator\":{:.3}}}",
        r.avg,
        r.min,
        p.avg,
        u[0] / u[1],
        c[0] / c[1],
        b[0] / b[1]
    );
}
