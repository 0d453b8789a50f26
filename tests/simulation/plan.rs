//! How unkind a world is. A seed draws its own mixture: many worlds with a few faults each find more than one with all.

use std::time::Duration;

use pd_backend::node::Safeguard;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::events::{Proc, Target};
use crate::process::{receiver_name, sender_name};

pub const ALLOCATION: Duration = Duration::from_millis(1000);
pub const HANDSHAKE: Duration = Duration::from_millis(200);
pub const COMMIT: Duration = Duration::from_millis(200);
pub const WRITE: Duration = Duration::from_millis(500);
pub const WAIT: Duration = Duration::from_millis(1500);
pub const RETENTION: Duration = Duration::from_millis(600);
pub const HEARTBEAT: Duration = Duration::from_millis(100);
pub const PEER: Duration = Duration::from_millis(350);
pub const LEASE: Duration = Duration::from_millis(500);
pub const LINGER: Duration = Duration::from_millis(60);
/// Draws apart from the others, for worlds whose daemons send and receive.
const BOTH: u64 = 0xb07b;
/// And for worlds in which chunks are parked.
const PARKED: u64 = 0x9a7c;
/// Longest that a message is held up.
pub const LATE_MS: u64 = 700;
/// Longest that a process stands still.
pub const PAUSE_MS: u64 = 900;

/// Numbers without a unit are percentages of the occasions.
#[derive(Debug, Clone)]
pub struct Plan {
    pub senders: usize,
    pub receivers: usize,
    /// So many of the first senders are the first receivers as well.
    pub both: usize,
    pub sender_slots: u64,
    pub receiver_slots: u64,
    /// Buffers begin with so many slots, and grow by one at a time.
    pub initial_slots: u64,
    pub jobs: usize,
    /// For how long jobs begin and faults happen.
    pub rough_ms: u64,
    /// How long the world then has to settle.
    pub settle_ms: u64,
    /// Whether a daemon may know one peer fewer than there are.
    pub crowded: bool,
    /// Jobs whose receiver prefill is not told of.
    pub parked: u32,
    /// Whether they are pushed to a receiver that is guessed; of some of them nobody is told.
    pub ahead: bool,
    /// Whether senders know the receivers in advance, and meet them before any request.
    pub told: bool,
    /// Keys are drawn from so many.
    pub keys: u32,
    /// Jobs that take the name of an earlier one.
    pub reuse_name: u32,
    /// Failed requests that are opened again.
    pub retry: u32,
    /// Attempts whose reader asks before their sender does.
    pub decode_first: u32,
    /// Whether messages between two ports keep their order.
    pub ordered: bool,
    pub lose: u32,
    pub repeat: u32,
    /// Messages that arrive long after the others.
    pub late: u32,
    /// Sends that break their connection.
    pub cut: u32,
    /// Connections whose end one side does not hear of.
    pub silent: u32,
    /// How many partitions.
    pub partitions: u32,
    pub transfer_fails: u32,
    pub transfer_slow: u32,
    /// Writes that go on although their connection was forgotten.
    pub forgotten_lands: u32,
    pub engine_refuses: u32,
    pub growth_fails: u32,
    pub cancel: u32,
    pub reader_cancels: u32,
    /// Requests at whose time the serving engines of both ends reset their caches.
    pub resets: u32,
    /// Requests whose connector vanishes.
    pub vanish: u32,
    /// Ready requests whose reader vanishes with its lease.
    pub reader_vanishes: u32,
    /// How many processes crash, and start again.
    pub crashes: u32,
    /// How many processes stand still for a while.
    pub pauses: u32,
    /// Whether the end of a sender's process is seen by receivers: they are on one host. Those that send as well see it in any
    /// case.
    pub same_host: bool,
    /// Whether writes of a process that has died arrive for up to [`LINGER`] yet.
    pub lingers: bool,
    /// Whether every chunk is summed and checked.
    pub checksums: bool,
    /// How long a receiver may take to check a commit, in ms: beyond [`COMMIT`], and beyond [`WRITE`].
    pub verify_ms: u64,
    /// LMCache's own peers, beside ours.
    pub lmcache_senders: usize,
    pub lmcache_receivers: usize,
    pub lmcache_jobs: usize,
    /// Whether asynchronous LMCache receivers wait for room without end.
    pub lmcache_waits: bool,
    /// What every daemon of ours is to do without.
    pub without: Option<Safeguard>,
}

impl Plan {
    /// What a seed draws, LMCache's peers included, and what it has left for the world. Worlds without them are drawn as if
    /// there were none.
    pub fn of_seed(seed: u64) -> (StdRng, Self) {
        let mut rng = StdRng::seed_from_u64(seed);
        let plan = Self::draw(&mut rng);
        let plan = plan.with_both(&mut StdRng::seed_from_u64(seed ^ BOTH));
        let plan = plan.with_lmcache(&mut StdRng::seed_from_u64(!seed));
        (rng, plan.with_parked(&mut StdRng::seed_from_u64(seed ^ PARKED)))
    }

    /// In a quarter of the worlds some daemons send and receive, most of them with buffers that are full of one direction at
    /// times.
    fn with_both(self, rng: &mut StdRng) -> Self {
        if !rng.random_bool(0.25) {
            return self;
        }
        let (senders, receivers) = (rng.random_range(2..=3), rng.random_range(2..=3));
        Self {
            senders,
            receivers,
            both: rng.random_range(1..=senders.min(receivers)),
            receiver_slots: if rng.random_bool(0.6) { 4 } else { rng.random_range(5..=12) },
            crowded: false,
            ..self
        }
    }

    /// In a quarter of the worlds some or all requests are parked, most of them in buffers that have room for few.
    fn with_parked(self, rng: &mut StdRng) -> Self {
        // What goes wrong with LMCache's senders is rare, and they are to have enough worlds of their own.
        if !rng.random_bool(0.25) || self.crowded || self.lmcache_senders > 0 {
            return self;
        }
        let parked = if rng.random_bool(0.5) { 100 } else { rng.random_range(20..=80) };
        Self { parked, sender_slots: rng.random_range(8..=12), ahead: rng.random_bool(0.6), ..self }
    }

    /// A fifth of the worlds has some of LMCache's peers, in a build that has LMCache.
    fn with_lmcache(self, rng: &mut StdRng) -> Self {
        if !cfg!(feature = "lmcache") || !rng.random_bool(0.2) {
            return self;
        }
        let lmcache_senders = rng.random_range(0..=2);
        let lmcache_receivers = if lmcache_senders == 0 { 1 } else { rng.random_range(0..=1) };
        Self {
            lmcache_senders,
            lmcache_receivers,
            lmcache_jobs: if lmcache_senders == 0 { 0 } else { rng.random_range(6..=14) },
            lmcache_waits: rng.random_bool(0.5),
            jobs: rng.random_range(8..=16),
            // Buffers are described to LMCache's senders once, so most are eager.
            initial_slots: if rng.random_bool(0.7) { self.receiver_slots } else { self.initial_slots },
            // LMCache's senders sum nothing, and take their places for as long as they live.
            checksums: self.checksums && lmcache_senders == 0,
            crowded: false,
            keys: self.keys.min(6),
            lingers: rng.random_bool(0.7),
            cancel: self.cancel.max(20),
            transfer_slow: self.transfer_slow.max(40),
            ..self
        }
    }

    pub fn has_lmcache(&self) -> bool {
        self.lmcache_senders + self.lmcache_receivers > 0
    }

    pub fn all_receivers(&self) -> usize {
        self.receivers + self.lmcache_receivers
    }

    /// A daemon of the first [`both`](Self::both) sends and receives.
    pub fn sends(&self, target: Target) -> bool {
        matches!(target, Target::Sender(_)) || target.at().index < self.both
    }

    pub fn receives(&self, target: Target) -> bool {
        matches!(target, Target::Receiver(_)) || target.at().index < self.both
    }

    /// Whether a sender and a receiver are the same daemon. None sends to itself.
    pub fn is_one(&self, sender: usize, receiver: usize) -> bool {
        sender == receiver && sender < self.both
    }

    /// Every daemon of ours, in its first life.
    pub fn targets(&self) -> impl Iterator<Item = Target> {
        let first = |index| Proc { index, life: 1 };
        let senders = (0..self.senders).map(move |index| Target::Sender(first(index)));
        senders.chain((self.both..self.receivers).map(move |index| Target::Receiver(first(index))))
    }

    /// What a daemon is called.
    pub fn name(&self, target: Target) -> String {
        if self.sends(target) { sender_name(target.at()) } else { receiver_name(target.at()) }
    }

    /// What a seed draws.
    fn draw(rng: &mut StdRng) -> Self {
        let mut some = |most: u32| if rng.random_bool(0.5) { rng.random_range(1..=most) } else { 0 };
        let plan = Self {
            senders: 2,
            receivers: 2,
            both: 0,
            sender_slots: 5,
            receiver_slots: 6,
            initial_slots: 6,
            jobs: 16,
            rough_ms: 900,
            settle_ms: 5000,
            crowded: false,
            parked: 0,
            ahead: false,
            told: false,
            keys: 10,
            reuse_name: some(40),
            retry: 50,
            decode_first: some(80),
            ordered: false,
            lose: some(10),
            repeat: some(15),
            late: some(15),
            cut: some(3),
            silent: some(60),
            partitions: some(2),
            transfer_fails: some(10),
            transfer_slow: some(60),
            forgotten_lands: some(100),
            engine_refuses: some(5),
            growth_fails: some(40),
            cancel: some(25),
            reader_cancels: some(15),
            resets: 0,
            vanish: some(8),
            reader_vanishes: some(15),
            verify_ms: u64::from(some(900)),
            crashes: some(3),
            pauses: some(3),
            same_host: true,
            lingers: false,
            checksums: false,
            lmcache_senders: 0,
            lmcache_receivers: 0,
            lmcache_jobs: 0,
            lmcache_waits: false,
            without: None,
        };
        Self {
            senders: rng.random_range(1..=3),
            receivers: if rng.random_bool(0.6) { 2 } else { 1 },
            initial_slots: rng.random_range(2..=5),
            ordered: rng.random_bool(0.4),
            same_host: rng.random_bool(0.75),
            lingers: rng.random_bool(0.4),
            crowded: rng.random_bool(0.2),
            keys: rng.random_range(4..=14),
            checksums: rng.random_bool(0.5),
            told: rng.random_bool(0.4),
            ..plan
        }
    }

    /// Nothing goes wrong.
    pub fn calm() -> Self {
        Self {
            senders: 2,
            receivers: 2,
            both: 0,
            sender_slots: 5,
            receiver_slots: 7,
            initial_slots: 3,
            jobs: 14,
            rough_ms: 600,
            settle_ms: 3000,
            crowded: false,
            parked: 0,
            ahead: false,
            told: false,
            keys: 10,
            reuse_name: 0,
            retry: 0,
            decode_first: 0,
            ordered: true,
            lose: 0,
            repeat: 0,
            late: 0,
            cut: 0,
            silent: 0,
            partitions: 0,
            transfer_fails: 0,
            transfer_slow: 0,
            forgotten_lands: 0,
            engine_refuses: 0,
            growth_fails: 0,
            cancel: 0,
            reader_cancels: 0,
            resets: 0,
            vanish: 0,
            reader_vanishes: 0,
            crashes: 0,
            pauses: 0,
            same_host: true,
            lingers: false,
            checksums: false,
            verify_ms: 0,
            lmcache_senders: 0,
            lmcache_receivers: 0,
            lmcache_jobs: 0,
            lmcache_waits: false,
            without: None,
        }
    }

    /// How much later than its deadline a commit may end because its receiver says that it is still checking.
    pub fn patience(&self) -> Duration {
        if self.verify_ms == 0 {
            return Duration::ZERO;
        }
        let late_ms = u64::from(self.late > 0) * LATE_MS;
        Duration::from_millis(self.verify_ms + late_ms + u64::from(self.pauses) * PAUSE_MS) + COMMIT
    }

    /// Nothing goes wrong, and every check takes longer than a commit is waited for, and than a grant may be written.
    pub fn slow_to_check() -> Self {
        Self { jobs: 8, receiver_slots: 40, checksums: true, verify_ms: 1300, keys: 30, ..Self::calm() }
    }

    /// Hundreds of processes, each with a few requests, and some of everything.
    pub fn many() -> Self {
        Self {
            senders: 200,
            receivers: 200,
            jobs: 1200,
            rough_ms: 1500,
            settle_ms: 4000,
            keys: 400,
            retry: 30,
            decode_first: 30,
            ordered: false,
            lose: 1,
            repeat: 2,
            late: 2,
            cut: 1,
            silent: 20,
            partitions: 20,
            transfer_fails: 3,
            transfer_slow: 10,
            forgotten_lands: 50,
            cancel: 5,
            vanish: 2,
            reader_vanishes: 3,
            crashes: 20,
            pauses: 20,
            ..Self::calm()
        }
    }
}
