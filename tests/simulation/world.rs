//! The world: processes, the order of events, and what each of them may break.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use pd_backend::address::AddressManager;
use pd_backend::ids::{ClientId, PeerId, RequestId, Seq};
use pd_backend::node::Grown;
use pd_backend::wire::LmcacheMode;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::decode::{End, Reading};
use crate::engine::{Asked, Write};
use crate::events::{Proc, Target, WorldEvent};
use crate::jobs::{Job, TURN_MS};
use crate::lmcache::Lmcache;
use crate::lmcache_receiver::LmcacheReceiver;
use crate::lmcache_sender::LmcacheSender;
use crate::network::{Link, Route};
use crate::parked::SourceLink;
use crate::plan::{self, Plan};
use crate::prefill::{Attempt, Call};
use crate::process::{CHUNK_BYTES, Daemon, Daemons};
use crate::tally::Tally;

/// LMCache senders ask afresh so long after ours: each wants most of a buffer.
const AFTER_OURS_MS: u64 = 1500;
/// No world is so busy.
const EVENTS_MAX: u64 = 4_000_000;

pub struct World {
    pub rng: StdRng,
    pub plan: Plan,
    start: Instant,
    pub now: Instant,
    queue: BTreeMap<(Instant, u64), WorldEvent>,
    order: u64,
    /// How many news processes have handled: one that stood still handles many in one event.
    pub handled: u64,
    /// No more faults: the world settles.
    pub settling: bool,
    pub daemons: Daemons,
    pub links: BTreeMap<(Proc, PeerId), Link>,
    pub link_busy: BTreeMap<(bool, Route), Instant>,
    pub parted: BTreeSet<(usize, usize)>,
    pub writes: BTreeMap<u64, Write>,
    pub jobs: Vec<Job>,
    pub attempts: Vec<Attempt>,
    pub open: BTreeMap<(Proc, RequestId), usize>,
    pub calls: BTreeMap<(Proc, ClientId, Seq), Call>,
    pub readings: BTreeMap<(Proc, ClientId, Seq), Reading>,
    /// How the latest attempt under each name ended at a receiver.
    pub ends: BTreeMap<(Proc, RequestId), End>,
    /// Commits that a receiver has announced, and the proxy has not heard of.
    pub committed: BTreeMap<(String, RequestId), u64>,
    /// What allocations ask for, by who asks and the number of the question.
    pub asked: BTreeMap<(String, Seq), Asked>,
    /// What receivers ask senders for, by their own names for it: of which job.
    pub asked_parked: BTreeMap<RequestId, usize>,
    pub source_links: BTreeMap<(Proc, PeerId), SourceLink>,
    pub lmcache: Lmcache,
    pub fresh_fetched: BTreeSet<RequestId>,
    pub next_id: u64,
    pub tally: Tally,
    wrong: Option<String>,
    log: Option<String>,
}

impl World {
    pub fn new(seed: u64, logged: bool) -> Self {
        let (rng, plan) = Plan::of_seed(seed);
        Self::with_plan(rng, plan, logged)
    }

    pub fn with_plan(rng: StdRng, plan: Plan, logged: bool) -> Self {
        let now = Instant::now();
        let mut world = Self {
            rng,
            start: now,
            now,
            queue: BTreeMap::new(),
            order: 0,
            handled: 0,
            settling: false,
            daemons: Daemons::new(&plan, now),
            links: BTreeMap::new(),
            link_busy: BTreeMap::new(),
            parted: BTreeSet::new(),
            writes: BTreeMap::new(),
            jobs: Vec::new(),
            attempts: Vec::new(),
            open: BTreeMap::new(),
            calls: BTreeMap::new(),
            readings: BTreeMap::new(),
            ends: BTreeMap::new(),
            committed: BTreeMap::new(),
            asked: BTreeMap::new(),
            asked_parked: BTreeMap::new(),
            source_links: BTreeMap::new(),
            lmcache: Lmcache::default(),
            fresh_fetched: BTreeSet::new(),
            next_id: 1,
            tally: Tally::default(),
            wrong: None,
            log: logged.then(String::new),
            plan,
        };
        if logged {
            let plan = format!("{:?}", world.plan);
            world.say(|| plan);
        }
        if world.plan.has_lmcache() {
            world.add_lmcache();
        }
        world.draw_jobs();
        world.draw_faults();
        let rough_ms = world.plan.rough_ms;
        world.schedule(rough_ms, WorldEvent::Settle);
        if world.has_lmcache() {
            world.schedule(rough_ms + world.plan.settle_ms / 2, WorldEvent::Tend);
        }
        world.schedule(rough_ms + world.plan.settle_ms, WorldEvent::Fresh);
        world
    }

    fn add_lmcache(&mut self) {
        let mut mode = || if self.rng.random_bool(0.5) { LmcacheMode::Sync } else { LmcacheMode::Async };
        let modes: Vec<LmcacheMode> =
            (0..self.plan.lmcache_senders + self.plan.lmcache_receivers).map(|_| mode()).collect();
        let (senders, receivers) = modes.split_at(self.plan.lmcache_senders);
        let first = |index| Proc { index, life: 1 };
        self.lmcache.senders =
            (self.plan.senders..).zip(senders).map(|(index, &mode)| LmcacheSender::new(first(index), mode)).collect();
        self.lmcache.receivers = (self.plan.receivers..)
            .zip(receivers)
            .map(|(index, &mode)| LmcacheReceiver::new(first(index), mode))
            .collect();
        self.draw_lmcache_jobs();
        let (rough_ms, crashes, pauses) = (self.plan.rough_ms, self.plan.crashes, self.plan.pauses);
        for pause in (0..crashes + pauses).map(|fault| fault >= crashes) {
            let which = self.rng.random_range(0..modes.len());
            let sender = which < self.plan.lmcache_senders;
            let index = if sender {
                self.plan.senders + which
            } else {
                self.plan.receivers + which - self.plan.lmcache_senders
            };
            let at = self.rng.random_range(0..rough_ms);
            let news = match pause {
                true => WorldEvent::Pause(sender, index, self.rng.random_range(20..plan::PAUSE_MS)),
                false => WorldEvent::Crash(sender, index),
            };
            self.schedule(at, news);
        }
    }

    fn draw_faults(&mut self) {
        let rough_ms = self.plan.rough_ms;
        for _ in 0..self.plan.crashes {
            let (sender, index) = self.some_process();
            let at = self.rng.random_range(0..rough_ms);
            self.schedule(at, WorldEvent::Crash(sender, index));
        }
        for _ in 0..self.plan.pauses {
            let (sender, index) = self.some_process();
            let (at, length) = (self.rng.random_range(0..rough_ms), self.rng.random_range(20..plan::PAUSE_MS));
            self.schedule(at, WorldEvent::Pause(sender, index, length));
        }
        for _ in 0..self.plan.partitions {
            let (sender, receiver) =
                (self.rng.random_range(0..self.plan.senders), self.rng.random_range(0..self.plan.receivers));
            let (at, length) = (self.rng.random_range(0..rough_ms), self.rng.random_range(20..1200));
            self.schedule(at, WorldEvent::Part(sender, receiver, true));
            self.schedule(at + length, WorldEvent::Part(sender, receiver, false));
        }
    }

    fn some_process(&mut self) -> (bool, usize) {
        let pick = self.rng.random_range(0..self.plan.senders + self.plan.receivers);
        if pick < self.plan.senders { (true, pick) } else { (false, pick - self.plan.senders) }
    }

    pub fn schedule(&mut self, in_ms: u64, news: WorldEvent) {
        self.schedule_at(self.now + Duration::from_millis(in_ms), news);
    }

    pub fn schedule_at(&mut self, at: Instant, news: WorldEvent) {
        self.order += 1;
        self.queue.insert((at, self.order), news);
    }

    /// Whether a fault of this likelihood happens now. None does once the world settles.
    pub fn fault(&mut self, percent: u32) -> bool {
        !self.settling && percent > 0 && self.rng.random_range(0..100) < percent
    }

    pub fn ms(&mut self, from: u64, to: u64) -> u64 {
        self.rng.random_range(from..to)
    }

    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub fn say(&mut self, text: impl FnOnce() -> String) {
        let at = self.now - self.start;
        if let Some(log) = &mut self.log {
            writeln!(log, "{:>9.3} {}", at.as_secs_f64() * 1e3, text()).unwrap();
        }
    }

    /// The first thing that must not be.
    pub fn wrong(&mut self, text: impl Into<String>) {
        if self.wrong.is_none() {
            let text = text.into();
            self.say(|| format!("WRONG: {text}"));
            self.wrong = Some(text);
        }
    }

    pub fn check(&mut self, result: Result<(), String>) {
        if let Err(text) = result {
            self.wrong(text);
        }
    }

    pub fn log(&self) -> &str {
        self.log.as_deref().unwrap_or_default()
    }

    /// Plays to the end, or to the first thing that must not be.
    pub fn run(&mut self) -> Result<Tally, String> {
        let end = Duration::from_millis(self.plan.rough_ms + self.plan.settle_ms)
            + Duration::from_millis(if self.plan.crowded { TURN_MS * 6 } else { 0 })
            + 2 * plan::ALLOCATION
            + 3 * plan::RETENTION;
        let end = self.start + end;
        while let Some(((at, _), news)) = self.queue.pop_first() {
            if at > end || self.wrong.is_some() {
                break;
            }
            self.now = self.now.max(at);
            self.tally.events += 1;
            if self.tally.events > EVENTS_MAX {
                self.wrong("it does not come to an end");
            }
            self.deliver(news);
        }
        if self.wrong.is_none() {
            self.check_end();
        }
        match self.wrong.take() {
            None => Ok(self.tally),
            Some(text) => Err(text),
        }
    }

    fn deliver(&mut self, news: WorldEvent) {
        let target = news.target();
        let process = match target {
            Target::Sender(at) if self.sender_lives(at) => self.process(true, at.index),
            Target::Receiver(at) if self.receiver_lives(at) => self.process(false, at.index),
            Target::World => return self.on_world(news),
            _ => return,
        };
        if let Some(unread) = &mut process.paused {
            unread.push_back(news);
            return;
        }
        self.handle(target, news);
    }

    pub fn handle(&mut self, target: Target, news: WorldEvent) {
        self.handled += 1;
        let is_timer = matches!(news, WorldEvent::Timer(_));
        if !is_timer && self.log.is_some() {
            self.say(|| format!("{news:?}"));
        }
        match target {
            Target::Sender(at) if self.is_lmcache_sender(at.index) => self.on_lmcache_sender_news(at, news),
            Target::Receiver(at) if self.is_lmcache_receiver(at.index) => self.on_lmcache_receiver_news(at, news),
            Target::World => {}
            target => self.on_daemon_news(target, news),
        }
    }

    fn on_world(&mut self, news: WorldEvent) {
        if !matches!(news, WorldEvent::Start(_) | WorldEvent::LmcacheStart(_)) && self.log.is_some() {
            self.say(|| format!("{news:?}"));
        }
        match news {
            WorldEvent::Start(job) => self.start(job),
            WorldEvent::LmcacheStart(job) => self.start_lmcache(job),
            WorldEvent::QueryOver(receiver, lease) => {
                if self.receiver_lives(receiver) {
                    self.daemons.receiver(receiver.index).truth.leases.remove(&lease);
                }
            }
            WorldEvent::Land(write, copy) => self.land(write, copy),
            WorldEvent::Crash(sender, index) => self.crash(sender, index),
            WorldEvent::Restart(sender, index) => self.restart(sender, index),
            WorldEvent::Pause(sender, index, length_ms) => self.pause(sender, index, length_ms),
            WorldEvent::Resume(target) => self.resume(target),
            WorldEvent::Part(sender, receiver, apart) => {
                if apart && !self.settling {
                    self.parted.insert((sender, receiver));
                } else {
                    self.parted.remove(&(sender, receiver));
                }
            }
            WorldEvent::Settle => {
                self.settling = true;
                self.parted.clear();
            }
            WorldEvent::Tend => self.tend(),
            WorldEvent::Fresh => {
                self.ask_afresh();
                self.ask_lmcache_afresh(AFTER_OURS_MS);
            }
            _ => unreachable!("it has a process"),
        }
    }

    /// One more slot, or none this time.
    pub fn grow(&mut self, addresses: &AddressManager) -> Result<Grown, String> {
        let fails = self.plan.growth_fails;
        if self.fault(fails) {
            return Err("no memory".to_owned());
        }
        addresses.grow(CHUNK_BYTES).unwrap();
        self.tally.growths += 1;
        let len_bytes = addresses.len_bytes();
        // The engine's descriptors are how long the buffer is: what a sender writes to must have been described to it.
        Ok(Grown { len_bytes, metadata: vec![2], descriptors: len_bytes.to_le_bytes().to_vec() })
    }

    fn check_end(&mut self) {
        let ends: Vec<String> = self.daemons.list.iter().filter_map(Daemon::left).collect();
        for left in ends {
            self.wrong(format!("{left} after everything ended"));
        }
        self.check_calls_ended();
        self.check_lmcache_end();
    }
}
