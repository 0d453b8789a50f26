//! The engines beside LMCache's senders, and the router: requests in batches, cancels, tries; a reader that says that a
//! request is written comes once the proxy was told so.

use pd_backend::ids::{ChunkKey, RequestId};
use pd_backend::wire::LmcacheMode;
use rand::RngExt;

use crate::events::{Proc, WorldEvent};
use crate::lmcache_sender::Put;
use crate::process::TOKENS;
use crate::world::World;

/// A request that the router gives to an LMCache sender.
#[derive(Debug, Clone)]
pub struct Job {
    pub sender: usize,
    pub receiver: usize,
    pub name: RequestId,
    /// With chunked prefill they come in several.
    pub batches: Vec<Vec<ChunkKey>>,
    pub last_tokens: u32,
    tries_left: u32,
    pub fresh: bool,
}

/// One attempt at a job, and what an asynchronous sender keeps of it.
#[derive(Debug)]
pub struct Attempt {
    pub job: usize,
    at: Proc,
    /// Batches that have not ended.
    open: usize,
    failed: bool,
    pub cancelled: bool,
    announced: bool,
    total: Option<usize>,
    completed: usize,
    has_last: bool,
    sent: Vec<ChunkKey>,
}

impl Job {
    pub fn keys(&self) -> Vec<ChunkKey> {
        self.batches.concat()
    }
}

impl Attempt {
    pub fn batch_begins(&mut self, total: usize) {
        if self.total.is_none() {
            (self.total, self.completed, self.has_last) = (Some(total), 0, false);
            self.sent.clear();
        }
    }

    /// Keys of a batch that was granted.
    pub fn sent(&mut self, keys: Vec<ChunkKey>) {
        self.sent.extend(keys);
    }

    pub fn keys_to_cancel(&self) -> Vec<ChunkKey> {
        self.sent.clone()
    }

    /// Its sender forgets what it kept, while writes go on.
    pub fn forgotten(&mut self) {
        (self.total, self.completed, self.has_last) = (None, 0, false);
        self.sent.clear();
    }

    /// A batch is written. True: the proxy is told.
    fn completes(&mut self, chunks: usize, last: bool) -> bool {
        self.completed += chunks;
        self.has_last |= last;
        let told = self.has_last && self.total.is_none_or(|total| self.completed >= total);
        if told {
            self.forgotten();
        }
        told
    }
}

impl World {
    pub fn lmcache_job(&self, attempt: usize) -> &Job {
        &self.lmcache.jobs[self.lmcache.attempts[attempt].job]
    }

    pub fn draw_lmcache_jobs(&mut self) {
        for index in 0..self.plan.lmcache_jobs {
            let count = self.rng.random_range(1..=4usize);
            let first = self.rng.random_range(0..self.plan.keys) as usize;
            let last_tokens = self.rng.random_range(1..=TOKENS);
            let key = |index: usize| {
                let short = if index + 1 == count { format!("-{last_tokens}") } else { String::new() };
                ChunkKey::new(format!("k{}{short}", first + index)).unwrap()
            };
            let name = RequestId::new(format!("lq{index}")).unwrap();
            let keys = (0..count).map(key).collect();
            self.add_lmcache_job(name, keys, last_tokens, None);
            let at = self.ms(0, self.plan.rough_ms);
            self.schedule(at, WorldEvent::LmcacheStart(index));
            if self.rng.random_bool(0.3) {
                let (sender, receiver) = (self.lmcache.jobs[index].sender, self.lmcache.jobs[index].receiver);
                let asks = self.sender_at(sender);
                self.schedule(at + 50, WorldEvent::Query(asks, receiver));
            }
        }
    }

    fn add_lmcache_job(
        &mut self,
        name: RequestId,
        keys: Vec<ChunkKey>,
        last_tokens: u32,
        fresh: Option<(usize, usize)>,
    ) {
        let drawn = |world: &mut Self| {
            let sender = world.plan.senders + world.rng.random_range(0..world.lmcache.senders.len());
            (sender, world.rng.random_range(0..world.plan.receivers))
        };
        let (sender, receiver) = fresh.unwrap_or_else(|| drawn(self));
        let (mut batches, mut left) = (Vec::new(), keys);
        let fresh = fresh.is_some();
        while !left.is_empty() {
            // Of two requests in batches, one asynchronous sender has the second ask for room that the first holds, and the
            // first wait behind that question.
            let least = if fresh { left.len() } else { 1 };
            let rest = left.split_off(self.rng.random_range(least..=left.len()));
            batches.push(std::mem::replace(&mut left, rest));
        }
        let tries_left = if fresh { 0 } else { 2 };
        self.lmcache.jobs.push(Job { sender, receiver, name, batches, last_tokens, tries_left, fresh });
    }

    /// Two requests from each LMCache sender to each receiver of ours, once those of our own senders are served.
    pub fn ask_lmcache_afresh(&mut self, after_ms: u64) {
        let known = self.plan.initial_slots.min(self.plan.receiver_slots);
        // Where a daemon sends as well, peers may have half of its pages.
        let count = if self.plan.both > 0 { known.div_ceil(2) } else { known }.min(4);
        for sender in self.plan.senders..self.plan.senders + self.lmcache.senders.len() {
            for receiver in 0..self.plan.receivers {
                for number in 0..2 {
                    let name = RequestId::new(format!("lfresh-{sender}-{receiver}-{number}")).unwrap();
                    let keys = (0..count).map(|index| ChunkKey::new(format!("{name}@{index}")).unwrap()).collect();
                    self.add_lmcache_job(name, keys, TOKENS, Some((sender, receiver)));
                    let after = after_ms + self.ms(0, 10);
                    self.schedule(after, WorldEvent::LmcacheStart(self.lmcache.jobs.len() - 1));
                }
            }
        }
    }

    pub fn start_lmcache(&mut self, job: usize) {
        let spec = self.lmcache.jobs[job].clone();
        let (at, to) = (self.sender_at(spec.sender), self.receiver_at(spec.receiver));
        if !self.sender_lives(at) {
            return;
        }
        let attempt = Attempt {
            job,
            at,
            open: spec.batches.len(),
            failed: false,
            cancelled: false,
            announced: false,
            total: None,
            completed: 0,
            has_last: false,
            sent: Vec::new(),
        };
        self.lmcache.attempts.push(attempt);
        let attempt = self.lmcache.attempts.len() - 1;
        let mut after = 0;
        for batch in 0..spec.batches.len() {
            self.schedule(after, WorldEvent::Put(at, Put { attempt, batch }));
            after += self.ms(0, if spec.fresh { 3 } else { 60 });
        }
        if self.lmcache_sender(spec.sender).mode == LmcacheMode::Sync {
            return;
        }
        let (cancel, reader_cancels, decode_first) =
            (self.plan.cancel, self.plan.reader_cancels, self.plan.decode_first);
        if self.fault(cancel) {
            let after = self.ms(20, 200);
            self.schedule(after, WorldEvent::LmcacheCancels(at, attempt));
        }
        if self.fault(decode_first) {
            let after = self.ms(0, 100);
            self.schedule(after, WorldEvent::Wait(to, spec.name.clone()));
        }
        if self.fault(reader_cancels) {
            let after = self.ms(0, 200);
            self.schedule(after, WorldEvent::ReaderCancels(to, spec.name));
        }
    }

    /// Its engine gives a request up.
    pub fn lmcache_cancels(&mut self, at: Proc, attempt: usize) {
        let record = &mut self.lmcache.attempts[attempt];
        if record.announced || record.cancelled {
            return;
        }
        record.cancelled = true;
        self.lmcache_aborts(at, attempt);
        // An engine that is ended gives its requests up first.
        if self.fault(50) {
            let after = self.ms(5, 60);
            self.schedule(after, WorldEvent::Crash(true, at.index));
        }
    }

    pub fn put_is_written(&mut self, at: Proc, put: Put) {
        let job = self.lmcache_job(put.attempt);
        let (chunks, last) = (job.batches[put.batch].len(), put.batch + 1 == job.batches.len());
        let sync = self.lmcache_sender(at.index).mode == LmcacheMode::Sync;
        let record = &mut self.lmcache.attempts[put.attempt];
        record.open -= 1;
        if if sync { last } else { record.completes(chunks, last) } {
            self.lmcache_announces(put.attempt);
        }
        self.try_lmcache_again(put.attempt);
    }

    pub fn put_fails(&mut self, at: Proc, put: Put) {
        let record = &mut self.lmcache.attempts[put.attempt];
        record.open -= 1;
        record.failed = true;
        if self.lmcache.jobs[record.job].fresh {
            let name = self.lmcache_job(put.attempt).name.clone();
            self.wrong(format!("{name} failed in a world without faults"));
        }
        if self.lmcache_sender(at.index).mode == LmcacheMode::Async {
            self.lmcache_aborts(at, put.attempt);
        }
        self.try_lmcache_again(put.attempt);
    }

    /// The proxy is told that a request is written. Of one that was cancelled, or of which an earlier batch has failed, it
    /// is told so as well: LMCache's own fault, which no receiver can see. No reader comes for these.
    fn lmcache_announces(&mut self, attempt: usize) {
        let record = &mut self.lmcache.attempts[attempt];
        if record.failed || record.cancelled || std::mem::replace(&mut record.announced, true) {
            return;
        }
        self.tally.lmcache_announced += 1;
        let (receiver, at) = (self.lmcache_job(attempt).receiver, self.lmcache.attempts[attempt].at);
        let to = self.receiver_at(receiver);
        let named = self.lmcache_sender(at.index).mode == LmcacheMode::Async && self.rng.random_bool(0.5);
        let after = self.ms(0, 80);
        self.schedule(after, WorldEvent::ReadUncommitted(to, attempt, named));
        // Another sample of the same prompt.
        if self.rng.random_bool(0.2) {
            let after = self.ms(0, 300);
            self.schedule(after, WorldEvent::ReadUncommitted(to, attempt, false));
        }
    }

    /// A router tries again, under the same name, once nothing of the attempt is under way at its sender.
    fn try_lmcache_again(&mut self, attempt: usize) {
        let Attempt { job, open, failed, cancelled, announced, .. } = self.lmcache.attempts[attempt];
        let retry = self.plan.retry;
        let ended = failed && open == 0 && !cancelled && !announced;
        if ended && self.lmcache.jobs[job].tries_left > 0 && self.fault(retry) {
            self.lmcache.jobs[job].tries_left -= 1;
            if self.rng.random_bool(0.3) {
                let sender = self.rng.random_range(0..self.lmcache.senders.len());
                self.lmcache.jobs[job].sender = self.plan.senders + sender;
            }
            let after = self.ms(0, 200);
            self.schedule(after, WorldEvent::LmcacheStart(job));
        }
    }

    /// Requests end with their sender's process, and are tried again.
    pub fn lmcache_attempts_die(&mut self, at: Proc) {
        let dead: Vec<usize> = (0..self.lmcache.attempts.len())
            .filter(|&attempt| self.lmcache.attempts[attempt].at == at && self.lmcache.attempts[attempt].open > 0)
            .collect();
        for attempt in dead {
            let record = &mut self.lmcache.attempts[attempt];
            (record.failed, record.open) = (true, 0);
            self.try_lmcache_again(attempt);
        }
    }
}
