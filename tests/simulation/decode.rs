//! The decode workers' connectors: they wait, look up, copy, release, cancel, and vanish with leases.

use std::ops::Range;
use std::time::{Duration, Instant};

use pd_backend::ids::{ChunkKey, ClientId, LeaseId, ReadyChunk, RequestId, Seq};
use pd_backend::node::Answer;
use pd_backend::node::incoming::Lookup;
use rand::RngExt;

use crate::events::{Proc, WorldEvent};
use crate::plan;
use crate::prefill::SLACK;
use crate::process::receiver_name;
use crate::truth::Leased;
use crate::world::World;

/// A question to a receiver that has not been answered.
#[derive(Debug)]
pub struct Reading {
    request: Option<RequestId>,
    due: Instant,
    paused_before: Duration,
    /// The number of the news with which it was asked.
    asked_with: u64,
    /// Whether the latest attempt under the name had ended, and that was told.
    again: bool,
    /// The attempt of an LMCache sender that its reader says is written.
    uncommitted: Option<usize>,
}

/// The end of an attempt at a receiver.
#[derive(Debug)]
pub struct End {
    /// The number of the news that it came with.
    came_with: u64,
    handed_out: bool,
    /// Whether a reader was told, or has given the attempt up.
    told: bool,
    /// Whether another attempt under the name was granted since.
    past: bool,
}

/// The numbers of readers are beyond those of prefill connectors.
const READERS: u64 = 1 << 32;

pub fn is_reader(client: ClientId) -> bool {
    client.0 > READERS
}

fn ranges(chunks: &[ReadyChunk]) -> Vec<(Range<u64>, ChunkKey)> {
    chunks.iter().map(|chunk| (chunk.offset_bytes..chunk.offset_bytes + chunk.len_bytes, chunk.key.clone())).collect()
}

impl World {
    pub fn reading(&mut self, at: Proc, request: Option<RequestId>, within: Duration) -> (ClientId, Seq) {
        let client = ClientId(READERS + self.rng.random_range(1..=2));
        let id = Seq(self.fresh_id());
        let paused_before = self.daemons.receiver(at.index).process.paused_for;
        let due = self.now + within + SLACK;
        let end = request.as_ref().and_then(|request| self.ends.get(&(at, request.clone())));
        let again = end.is_some_and(|end| end.told && !end.past);
        let asked_with = self.handled;
        self.readings
            .insert((at, client, id), Reading { request, due, paused_before, asked_with, again, uncommitted: None });
        (client, id)
    }

    pub fn wait(&mut self, at: Proc, request: RequestId) {
        let (client, id) = self.reading(at, Some(request.clone()), plan::WAIT);
        self.daemons.receiver(at.index).node.handle_wait(self.now, client, id, request, None, false);
    }

    pub fn lookup(&mut self, at: Proc) {
        let keys: Vec<ChunkKey> =
            (0..self.plan.keys.min(20)).map(|n| ChunkKey::new(format!("k{n}")).unwrap()).collect();
        let (client, id) = self.reading(at, None, Duration::ZERO);
        let lookup = Lookup { keys, uncommitted: false, fetches: false };
        self.daemons.receiver(at.index).node.handle_lookup(self.now, client, id, &lookup);
    }

    /// The proxy was told of an LMCache sender's request: a reader says that it is written. By its keys it does so once, and
    /// not when the receiver has given up what it means: they may be another's by then (docs/lmcache.md).
    pub fn read_uncommitted(&mut self, at: Proc, attempt: usize, named: bool) {
        let open = self.lmcache_open_chunks(at, attempt);
        let (name, keys) = (self.lmcache_job(attempt).name.clone(), self.lmcache_job(attempt).keys());
        let request = named.then(|| name.clone());
        let (client, id) = self.reading(at, request, if named { plan::WAIT } else { Duration::ZERO });
        let uncommitted = named || keys.iter().all(|key| open.contains(key));
        self.tally.lmcache_late += u64::from(!uncommitted);
        if let Some(reading) = self.readings.get_mut(&(at, client, id)).filter(|_| uncommitted) {
            reading.uncommitted = Some(attempt);
        }
        let node = &mut self.daemons.receiver(at.index).node;
        if named {
            node.handle_wait(self.now, client, id, name, None, true);
        } else {
            let fetches = self.rng.random_bool(0.5);
            node.handle_lookup(self.now, client, id, &Lookup { keys, uncommitted, fetches });
        }
    }

    pub fn reader_cancels(&mut self, at: Proc, request: &RequestId) {
        let (client, id) = self.reading(at, None, Duration::ZERO);
        self.daemons.receiver(at.index).node.handle_cancel(self.now, client, id, request);
    }

    pub fn receiver_resets(&mut self, at: Proc) {
        let (client, id) = self.reading(at, None, Duration::ZERO);
        self.daemons.receiver(at.index).truth.reset();
        self.daemons.receiver(at.index).node.handle_reset(self.now, client, id);
    }

    /// The reader is done: what it copied must still be what it was given.
    pub fn release(&mut self, at: Proc, client: ClientId, lease: LeaseId) {
        let Some(leased) = self.daemons.receiver(at.index).truth.leases.remove(&lease) else { return };
        let checked = self.daemons.receiver(at.index).truth.verify(&leased.chunks);
        self.check(checked.map_err(|text| format!("under a lease: {text}")));
        let id = Seq(self.fresh_id());
        let (paused_before, asked_with) = (self.daemons.receiver(at.index).process.paused_for, self.handled);
        let due = self.now + SLACK;
        let reading = Reading { request: None, due, paused_before, asked_with, again: false, uncommitted: None };
        self.readings.insert((at, client, id), reading);
        self.daemons.receiver(at.index).node.handle_release(self.now, client, id, lease);
    }

    pub fn reader_gone(&mut self, at: Proc, client: ClientId) {
        self.daemons.receiver(at.index).truth.leases.retain(|_, leased| leased.client != client.0);
        self.readings.retain(|(owner, other, _), _| (*owner, *other) != (at, client));
        self.daemons.receiver(at.index).node.handle_client_gone(self.now, client);
    }

    pub fn readings_die(&mut self, at: Proc) {
        self.readings.retain(|(owner, ..), _| *owner != at);
    }

    pub fn on_reader_answer(&mut self, at: Proc, client: ClientId, id: Seq, answer: Answer) {
        let Some(reading) = self.readings.remove(&(at, client, id)) else {
            return self.wrong(format!("{} answers {id} of reader {client} twice: {answer:?}", receiver_name(at)));
        };
        let paused = self.daemons.receiver(at.index).process.paused_for.saturating_sub(reading.paused_before);
        if self.now > reading.due + paused {
            self.wrong(format!("{reading:?} was answered too late: {answer:?}"));
        }
        match answer {
            Answer::Ready { request, lease, chunks } => {
                if reading.request.as_ref() != Some(&request) {
                    self.wrong(format!("{:?} was waited for, and {request} is given", reading.request));
                }
                let keys: Vec<&ChunkKey> = chunks.iter().map(|chunk| &chunk.key).collect();
                let parked = self.asked_parked.get(&request).map(|&job| self.jobs[job].clone());
                let asked = parked.as_ref().is_some_and(|job| keys.iter().all(|key| job.keys.contains(key)));
                self.tally.fetched_parked += u64::from(asked);
                let asked = asked
                    || self.jobs.iter().any(|job| job.name == request && job.keys.iter().eq(keys.iter().copied()))
                    || self
                        .lmcache
                        .jobs
                        .iter()
                        .any(|job| job.name == request && job.keys().iter().eq(keys.iter().copied()));
                self.tally.lmcache_waited_for += u64::from(reading.uncommitted.is_some());
                if !asked {
                    self.wrong(format!("{request} is ready with chunks that nobody sent under that name: {keys:?}"));
                }
                self.tally.fetched += 1;
                self.tally.fetched_again += u64::from(reading.again);
                let fetched = parked.map_or(request, |job| job.name.clone());
                self.fresh_fetched.insert(fetched);
                self.lease(at, client, lease, &chunks);
            }
            Answer::Found { lease, chunks, granted, coming } => {
                self.tally.seen_coming += u64::from(!coming.is_empty());
                if let Some(attempt) = reading.uncommitted {
                    self.check_found(attempt, &chunks, &granted);
                }
                let found: Vec<ReadyChunk> = chunks.into_iter().flatten().collect();
                if let Some(lease) = lease {
                    self.lease(at, client, lease, &found);
                }
            }
            Answer::Failed { .. } => {
                // How an attempt at what is parked ends is told by its sender, or by its connection.
                if let Some(request) = reading.request.filter(|request| !self.asked_parked.contains_key(request)) {
                    self.reader_is_told(at, request, reading.asked_with == self.handled);
                }
            }
            Answer::Cancelled { request } => {
                if let Some(end) = self.ends.get_mut(&(at, request)) {
                    end.told = true;
                }
            }
            Answer::Held => self.tally.held += 1,
            Answer::Released | Answer::Reset => {}
            answer => self.wrong(format!("a reader is answered {answer:?}")),
        }
    }

    pub fn attempt_begins(&mut self, at: Proc, request: &RequestId) {
        if let Some(end) = self.ends.get_mut(&(at, request.clone())) {
            end.past = true;
        }
    }

    pub fn attempt_ends(&mut self, at: Proc, request: RequestId, handed_out: bool) {
        let end = End { came_with: self.handled, handed_out, told: false, past: false };
        self.ends.insert((at, request), end);
    }

    /// A reader is told of an end that comes now. One that asks later is told of it only if nobody was.
    fn reader_is_told(&mut self, at: Proc, request: RequestId, at_once: bool) {
        let Some(end) = self.ends.get_mut(&(at, request.clone())) else {
            if at_once {
                self.wrong(format!("a reader that asks for {request} is told of an end that there never was"));
            }
            return;
        };
        let comes_now = end.came_with == self.handled;
        if comes_now || (at_once && !end.told) {
            end.told = !end.handed_out;
        } else if at_once {
            self.wrong(format!("a reader of the next attempt at {request} is told how the one before ended"));
        }
    }

    /// What the proxy was told of is there, unless the receiver cannot tell it from another's.
    fn check_found(&mut self, attempt: usize, chunks: &[Option<ReadyChunk>], granted: &[u32]) {
        let (name, keys) = (self.lmcache_job(attempt).name.clone(), self.lmcache_job(attempt).keys());
        self.tally.lmcache_ambiguous += granted.len() as u64;
        for ((index, key), chunk) in (0u32..).zip(&keys).zip(chunks) {
            if chunk.is_none() && !granted.contains(&index) {
                self.wrong(format!("{key} of {name} is not found, and its reader knows that it is written"));
            }
        }
        if chunks.iter().all(Option::is_some) {
            self.tally.lmcache_looked_up += 1;
            self.fresh_fetched.insert(name);
        }
    }

    fn lease(&mut self, at: Proc, client: ClientId, lease: LeaseId, chunks: &[ReadyChunk]) {
        let chunks = ranges(chunks);
        let under_way = if self.has_lmcache() { self.under_way(at) } else { Vec::new() };
        let handed = self.daemons.receiver(at.index).truth.hand_out(&chunks, &under_way);
        self.check(handed.map_err(|text| format!("a reader was given wrong bytes: {text}")));
        let vanishes = self.plan.reader_vanishes;
        let vanishes = self.fault(vanishes);
        self.daemons.receiver(at.index).truth.leases.insert(lease, Leased { client: client.0, chunks });
        let after = self.ms(0, if self.settling { 10 } else { 80 });
        let news = if vanishes { WorldEvent::ReaderGone(at, client) } else { WorldEvent::Release(at, client, lease) };
        self.schedule(after, news);
    }
}
