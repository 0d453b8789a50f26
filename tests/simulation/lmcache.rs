//! LMCache's own peers, as the code of 0.5.6 behaves (docs/lmcache-interop.md), and what the world knows of them. Their
//! processes are counted after ours: sender number `plan.senders` is the first of LMCache's, and so with receivers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use pd_backend::ids::{ChunkKey, LeaseId, Pages, PeerId, RequestId};
use pd_backend::node::Port;
use pd_backend::node::incoming::IncomingNote;
#[cfg(feature = "lmcache")]
pub use pd_backend::wire::descriptor_list;
use pd_backend::wire::message::AllocResponse;
use pd_backend::wire::{LmcacheMode, Message};

use crate::events::{Proc, Target, WorldEvent};
use crate::lmcache_prefill::{Attempt, Job};
use crate::lmcache_receiver::LmcacheReceiver;
use crate::lmcache_sender::LmcacheSender;
use crate::network::Route;
use crate::plan;
use crate::prefill::SLACK;
use crate::process::{CHUNK_BYTES, TOKEN_BYTES, receiver_name, sender_name};
use crate::truth::{Grant, Leased};
use crate::world::World;

/// Leases of those who only ask, beside the receiver's own numbers.
const QUERY_LEASES: u64 = 1 << 40;

/// LMCache's peers, and what they and their engines are about.
#[derive(Default)]
pub struct Lmcache {
    pub senders: Vec<LmcacheSender>,
    pub receivers: Vec<LmcacheReceiver>,
    pub jobs: Vec<Job>,
    pub attempts: Vec<Attempt>,
    /// What LMCache senders have asked our receivers: one question on each connection.
    pub questions: BTreeMap<Route, Question>,
    /// Requests of LMCache senders that our receivers have open, and their chunks.
    open: BTreeMap<(Proc, RequestId), (usize, BTreeSet<ChunkKey>)>,
    /// The request that a receiver has just granted: its answer comes next.
    granted: Option<RequestId>,
    /// What our senders have asked of LMCache receivers, by request.
    pub asked_by_ours: BTreeMap<(Proc, RequestId), (Proc, Vec<ChunkKey>)>,
}

/// A question of an LMCache sender.
#[derive(Debug)]
pub struct Question {
    /// An allocation's.
    pub attempt: Option<usize>,
    pub request: Option<RequestId>,
    pub keys: Vec<ChunkKey>,
    /// Since it has arrived: when it must be answered, and how long the receiver had stood still before.
    arrived: Option<(Instant, Duration)>,
}

impl Question {
    pub fn of(message: &Message, attempt: Option<usize>) -> Self {
        let (request, keys) = match message {
            Message::AllocRequest(alloc) => (alloc.req_id.clone(), alloc.keys.clone()),
            Message::CancelNotif(cancel) => (Some(cancel.req_id.clone()), Vec::new()),
            _ => (None, Vec::new()),
        };
        Self { attempt, request, keys, arrived: None }
    }
}

/// A chunk's length: a short one is named after it.
pub fn len_of(key: &ChunkKey) -> u64 {
    let tokens = key.as_str().rsplit_once('-').and_then(|(_, tokens)| tokens.parse::<u64>().ok());
    tokens.map_or(CHUNK_BYTES, |tokens| tokens * TOKEN_BYTES[0])
}

/// A buffer as LMCache describes it.
pub fn pages(address: u64, count: u64) -> Pages {
    Pages { memory_type: 0, device: 0, address, page_bytes: CHUNK_BYTES, count }
}

/// Without LMCache no world has its peers.
#[cfg(not(feature = "lmcache"))]
pub mod descriptor_list {
    use pd_backend::ids::Pages;

    pub fn encode(_: &str, _: &Pages) -> Vec<u8> {
        unreachable!("no world has LMCache's peers")
    }

    pub fn decode(_: &[u8]) -> Result<(String, Pages), String> {
        unreachable!("no world has LMCache's peers")
    }
}

impl World {
    pub fn is_lmcache_sender(&self, index: usize) -> bool {
        index >= self.plan.senders
    }

    pub fn is_lmcache_receiver(&self, index: usize) -> bool {
        index >= self.plan.receivers
    }

    pub fn has_lmcache(&self) -> bool {
        !self.lmcache.senders.is_empty() || !self.lmcache.receivers.is_empty()
    }

    pub fn lmcache_sender(&mut self, index: usize) -> &mut LmcacheSender {
        &mut self.lmcache.senders[index - self.plan.senders]
    }

    /// In which mode LMCache runs behind a connection, as its socket says.
    pub fn lmcache_mode_behind(&mut self, at: Proc, peer: PeerId) -> LmcacheMode {
        match self.links.get(&(at, peer)).map(|link| link.receiver.index) {
            Some(index) if self.is_lmcache_receiver(index) => self.lmcache_receiver(index).mode,
            _ => LmcacheMode::Async,
        }
    }

    pub fn lmcache_receiver(&mut self, index: usize) -> &mut LmcacheReceiver {
        &mut self.lmcache.receivers[index - self.plan.receivers]
    }

    /// A question of an LMCache sender arrives at a receiver of ours.
    pub fn lmcache_question_arrives(&mut self, route: Route) {
        let within = if route.port == Port::Alloc { plan::ALLOCATION } else { plan::HANDSHAKE };
        let paused = self.daemons.receiver(route.receiver.index).process.paused_for;
        let arrived = Some((self.now + within + SLACK, paused));
        if let Some(question) = self.lmcache.questions.get_mut(&route) {
            question.arrived = arrived;
        }
    }

    /// A receiver of ours says something to an LMCache sender, whose code can read answers to its questions alone.
    pub fn lmcache_sender_is_told(&mut self, at: Proc, route: Route, message: &Message) {
        let Some(question) = self.lmcache.questions.remove(&route) else {
            return self.wrong(format!("{} is told {message:?}, and has asked nothing", sender_name(route.sender)));
        };
        let paused = self.daemons.receiver(at.index).process.paused_for;
        if question.arrived.is_none_or(|(due, before)| self.now > due + paused.saturating_sub(before)) {
            self.wrong(format!("{question:?} was answered too late, or before it arrived: {message:?}"));
        }
        match (route.port, message) {
            (Port::Alloc, Message::AllocResponse(response)) if response.pd.is_none() => match question.attempt {
                Some(attempt) => self.note_pages(at, route, attempt, question, response),
                None if response.remote_indexes.is_empty() && response.already_sent_indexes.is_empty() => {}
                None => self.wrong(format!("a cancel is answered by {response:?}")),
            },
            (Port::Init, Message::NixlInitResponse(response)) if response.pd.is_none() => {}
            (Port::Init, Message::NixlMemRegResponse(response)) if response.pd.is_none() => {}
            (Port::Query, Message::CacheQueryResponse(response)) => {
                let found = response.cached_keys.iter().zip(&response.cached_indexes);
                let chunks: Vec<_> = found
                    .map(|(key, &page)| {
                        let start = u64::from(page) * CHUNK_BYTES;
                        (start..start + len_of(key), key.clone())
                    })
                    .collect();
                let lease = LeaseId(QUERY_LEASES + self.fresh_id());
                let truth = &mut self.daemons.receiver(at.index).truth;
                let checked = truth.verify(&chunks);
                truth.leases.insert(lease, Leased { client: u64::MAX, chunks });
                self.check(checked.map_err(|text| format!("a query is answered with wrong bytes: {text}")));
                // For as long as a write may take, whatever else happens.
                let over = self.now + plan::WRITE - Duration::from_millis(1);
                self.schedule_at(over, WorldEvent::QueryOver(at, lease));
            }
            _ => self.wrong(format!("{} cannot read {message:?}", sender_name(route.sender))),
        }
    }

    /// Lets an LMCache sender write pages.
    fn note_pages(&mut self, at: Proc, route: Route, attempt: usize, question: Question, response: &AllocResponse) {
        let granted = self.lmcache.granted.take();
        let count = question.keys.len();
        if response.remote_indexes.contains(&-1) {
            self.tally.lmcache_refused += 1;
            if response.remote_indexes != vec![-1; count] {
                self.wrong(format!("{question:?} is refused by {response:?}"));
            }
            return;
        }
        let skip: BTreeSet<u32> = response.already_sent_indexes.iter().copied().collect();
        let own: Vec<&ChunkKey> =
            (0u32..).zip(&question.keys).filter(|(index, _)| !skip.contains(index)).map(|(_, key)| key).collect();
        if own.len() != response.remote_indexes.len() {
            return self.wrong(format!("{question:?} is answered by {response:?}"));
        }
        self.tally.lmcache_granted += own.len() as u64;
        self.tally.lmcache_shared += skip.len() as u64;
        let Some(id) = question.request.clone().or(granted) else {
            return self.wrong(format!("{question:?} is granted under no name"));
        };
        let in_use = self.in_use(Target::Receiver(at));
        let instance = sender_name(route.sender);
        for (key, &page) in own.into_iter().zip(&response.remote_indexes) {
            let start = page as u64 * CHUNK_BYTES;
            let grant = Grant {
                instance: instance.clone(),
                request: id.clone(),
                chunks: vec![(start..start + CHUNK_BYTES, key.clone())],
                committed: false,
                page: true,
            };
            let checked = self.daemons.receiver(at.index).truth.grant(None, grant, &in_use);
            self.check(checked);
        }
        let (owner, keys) = self.lmcache.open.entry((at, id)).or_insert_with(|| (attempt, BTreeSet::new()));
        if *owner != attempt {
            keys.clear();
            *owner = attempt;
        }
        keys.extend(question.keys);
    }

    /// What a receiver of ours notes of a request that may be an LMCache sender's.
    pub fn lmcache_request_noted(&mut self, at: Proc, note: &IncomingNote<Route>) {
        match note {
            IncomingNote::Granted { request, .. } => self.lmcache.granted = Some(request.clone()),
            IncomingNote::Committed { request, .. } | IncomingNote::Failed { request, .. } => {
                self.lmcache.open.remove(&(at, request.clone()));
            }
            _ => {}
        }
    }

    /// Chunks of an attempt that a receiver has granted it and neither given up nor handed out.
    pub fn lmcache_open_chunks(&self, at: Proc, attempt: usize) -> BTreeSet<ChunkKey> {
        let of_attempt = self.lmcache.open.iter().filter(|((owner, _), (other, _))| (*owner, *other) == (at, attempt));
        of_attempt.flat_map(|(_, (_, keys))| keys.iter().cloned()).collect()
    }

    /// A receiver of ours has died: nothing that it was asked is answered.
    pub fn lmcache_questions_die(&mut self, at: Proc) {
        self.lmcache.questions.retain(|route, _| route.receiver != at);
        self.lmcache.open.retain(|(owner, _), _| *owner != at);
    }

    /// An operator looks after LMCache's peers once everything has settled: restarts senders, which never shake hands
    /// again, and receivers that hold pages which nobody will read. One that need not hold any has lost them.
    pub fn tend(&mut self) {
        for index in self.plan.senders..self.plan.senders + self.lmcache.senders.len() {
            self.stop(true, index);
            self.restart(true, index);
        }
        for index in self.plan.receivers..self.plan.receivers + self.lmcache.receivers.len() {
            let at = self.receiver_at(index);
            let lives = self.receiver_lives(at);
            let receiver = self.lmcache_receiver(index);
            let left = receiver.left();
            if let Some(left) = &left
                && !receiver.may_keep_pages()
            {
                self.wrong(format!("{} holds {left} that it should have been told of", receiver_name(at)));
            }
            if left.is_some() && lives {
                self.stop(false, index);
                self.restart(false, index);
            }
        }
    }

    pub fn check_lmcache_end(&mut self) {
        for (route, question) in &self.lmcache.questions {
            if question.arrived.is_some() && self.receiver_lives(route.receiver) {
                let text = format!("{} never answers {question:?}", receiver_name(route.receiver));
                return self.wrong(text);
            }
        }
        for index in self.plan.receivers..self.plan.receivers + self.lmcache.receivers.len() {
            let name = receiver_name(self.receiver_at(index));
            let receiver = self.lmcache_receiver(index);
            if let Some(left) = receiver.left().filter(|_| !receiver.may_keep_pages()) {
                self.wrong(format!("{name} holds {left} after everything ended"));
            }
        }
        let jobs = self.lmcache.jobs.iter().filter(|job| job.fresh);
        let unread: Vec<RequestId> = jobs.map(|job| job.name.clone()).collect();
        for name in unread {
            if !self.fresh_fetched.contains(&name) {
                self.wrong(format!("{name} was never fetched"));
            }
        }
    }
}
