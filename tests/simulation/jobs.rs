//! What routers have in mind for our senders: requests to receivers of ours and of LMCache's.

use pd_backend::ids::{ChunkKey, ClientId, GroupIndex, RequestId};
use rand::RngExt;

use crate::events::WorldEvent;
use crate::lmcache_receiver::lmcache_key;
use crate::process::TOKENS;
use crate::world::World;

/// How long one pair has for its requests where not all can be connected at once.
pub const TURN_MS: u64 = 400;

/// A request that a router has in mind, tried once or several times.
#[derive(Debug, Clone)]
pub struct Job {
    pub sender: usize,
    pub receiver: usize,
    pub name: RequestId,
    pub keys: Vec<ChunkKey>,
    pub groups: Vec<GroupIndex>,
    pub last_tokens: u32,
    pub client: ClientId,
    pub tries_left: u32,
    /// Its chunks are parked, and its receiver asks for them.
    pub parked: bool,
    /// Nobody is told of that: it is only pushed ahead, and its receiver looks.
    pub unsolicited: bool,
    /// Asked after everything has settled: it must succeed.
    pub fresh: bool,
}

impl World {
    pub fn draw_jobs(&mut self) {
        for index in 0..self.plan.jobs {
            let job = self.draw_job(index);
            self.jobs.push(job);
            let at = self.ms(0, self.plan.rough_ms);
            self.schedule(at, WorldEvent::Start(index));
        }
    }

    fn draw_job(&mut self, index: usize) -> Job {
        let count = self.rng.random_range(1..=4usize);
        let first = self.rng.random_range(0..self.plan.keys) as usize;
        let last_tokens = self.rng.random_range(1..=TOKENS);
        // Neighbouring requests share prefixes; a short chunk is named after its length, as an engine's hash would.
        let key = |index: usize| {
            let short = if index + 1 == count { format!("-{last_tokens}") } else { String::new() };
            ChunkKey::new(format!("k{}{short}", first + index)).unwrap()
        };
        let mut keys: Vec<ChunkKey> = (0..count).map(key).collect();
        let mut groups = Vec::new();
        // A hybrid model's request has the same chunks once more, of its other group.
        if self.rng.random_bool(0.3) && !self.has_lmcache() {
            groups = (0..2 * count).map(|index| GroupIndex(u8::from(index >= count))).collect();
            keys.extend((0..count).map(|index| ChunkKey::new(format!("{}-small", key(index))).unwrap()));
        }
        let mut name = RequestId::new(format!("q{index}")).unwrap();
        let reuse = self.plan.reuse_name;
        if index > 0 && self.fault(reuse) {
            name = self.jobs[self.rng.random_range(0..index)].name.clone();
        }
        let sender = self.rng.random_range(0..self.plan.senders);
        let mut receiver = self.rng.random_range(0..self.plan.all_receivers());
        if self.plan.is_one(sender, receiver) {
            receiver = (receiver + 1) % self.plan.all_receivers();
        }
        if self.is_lmcache_receiver(receiver) {
            // Senders that share prefixes are not safe with LMCache's receivers, so most do not.
            let owner = self.rng.random_bool(0.75).then_some(sender);
            keys.iter_mut().for_each(|key| *key = lmcache_key(key.as_str(), owner));
        }
        let client = ClientId(1 + index as u64 % 3);
        let parked = self.plan.parked > 0 && !self.is_lmcache_receiver(receiver) && self.fault(self.plan.parked);
        let unsolicited = parked && self.plan.ahead && self.rng.random_bool(0.3);
        Job {
            sender,
            receiver,
            name,
            keys,
            groups,
            last_tokens,
            client,
            tries_left: 3,
            parked,
            unsolicited,
            fresh: false,
        }
    }

    /// Two requests from each sender to each receiver, all at once and each for most of the buffer. A world of hundreds
    /// asks between neighbours alone. Where daemons send and receive there are more of them, and of other lengths: what is
    /// staged and what is granted stand in each other's way.
    pub fn ask_afresh(&mut self) {
        let many = self.plan.senders * self.plan.receivers > 100;
        let both = self.plan.both > 0;
        // Peers may have half of a buffer that serves both halves.
        let count = if both { (self.plan.receiver_slots as usize).div_ceil(2).min(4) } else { 4 };
        for sender in 0..self.plan.senders {
            for receiver in 0..self.plan.all_receivers() {
                if many && sender != receiver || self.plan.is_one(sender, receiver) {
                    continue;
                }
                for number in 0..if both { 4 } else { 2 } {
                    let name = RequestId::new(format!("fresh-{sender}-{receiver}-{number}")).unwrap();
                    let key = |index: usize| match self.is_lmcache_receiver(receiver) {
                        true => lmcache_key(&format!("{name}{index}").replace('-', "/"), None),
                        false => ChunkKey::new(format!("{name}-{index}")).unwrap(),
                    };
                    // Of one chunk, for it stays for the time of a lease.
                    let parked = self.plan.parked == 100 && number == 0 && receiver < self.plan.receivers;
                    let keys = (0..if parked { 1 } else { count }).map(key).collect();
                    let whole = !both || self.has_lmcache();
                    let last_tokens = if whole { TOKENS } else { self.rng.random_range(1..=TOKENS) };
                    let job = Job {
                        sender,
                        receiver,
                        name,
                        keys,
                        groups: Vec::new(),
                        last_tokens,
                        client: ClientId(500),
                        tries_left: 0,
                        parked,
                        unsolicited: false,
                        fresh: true,
                    };
                    self.jobs.push(job);
                    // Where not all can be connected at once, one pair comes after the other.
                    let turn =
                        if self.plan.crowded { TURN_MS * (sender * self.plan.receivers + receiver) as u64 } else { 0 };
                    let after = turn + self.ms(0, 10);
                    self.schedule(after, WorldEvent::Start(self.jobs.len() - 1));
                }
            }
        }
    }
}
