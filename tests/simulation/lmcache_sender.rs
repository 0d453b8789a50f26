//! A sender of LMCache's: it shakes hands once, asks for pages one question at a time, writes whole pages, and tells its
//! proxy alone. Its synchronous backend does one thing after the other; the asynchronous one has a line for each receiver.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pd_backend::ids::{ChunkKey, LeaseId, PeerId};
use pd_backend::node::Port;
use pd_backend::wire::message::{
    AllocRequest, AllocResponse, CacheQueryRequest, CancelNotif, InitRequest, MemRegRequest,
};
use pd_backend::wire::{LmcacheMode, Message};
use rand::RngExt;

use crate::events::{Proc, WorldEvent};
use crate::lmcache::descriptor_list;
use crate::lmcache::{Question, len_of, pages};
use crate::network::{Link, Route};
use crate::process::{CHUNK_BYTES, Process, TOKENS, sender_name};
use crate::truth::content;
use crate::world::World;

/// ZeroMQ tries again so often to connect.
const RECONNECT_MS: u64 = 50;

/// One life of an LMCache sender.
pub struct LmcacheSender {
    pub process: Process,
    pub mode: LmcacheMode,
    /// By receiver.
    channels: BTreeMap<usize, Channel>,
    /// What the worker of a synchronous one has to write, in order.
    writes: VecDeque<Writing>,
    /// What is being written.
    writing: BTreeMap<u64, Put>,
}

#[derive(Default)]
struct Channel {
    met: Met,
    /// The connection for allocations.
    alloc: Option<(PeerId, Proc)>,
    asked: Option<Asked>,
    waiting: VecDeque<Asked>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Met {
    #[default]
    Not,
    Shaking(PeerId),
    /// Whom, and how many pages it said it has. That is never asked again.
    Yes(Proc, u64),
}

/// A batch of an attempt, and whether it is the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Put {
    pub attempt: usize,
    pub batch: usize,
}

#[derive(Clone)]
enum Asked {
    Put(Put),
    Cancel(usize, Vec<ChunkKey>),
}

struct Writing {
    put: Put,
    to: Proc,
    chunks: Vec<(u64, ChunkKey)>,
}

impl LmcacheSender {
    pub fn new(at: Proc, mode: LmcacheMode) -> Self {
        Self {
            process: Process { life: at.life, alive: true, ..Process::default() },
            mode,
            channels: BTreeMap::new(),
            writes: VecDeque::new(),
            writing: BTreeMap::new(),
        }
    }

    fn is_sync(&self) -> bool {
        self.mode == LmcacheMode::Sync
    }

    fn channel(&mut self, receiver: usize) -> &mut Channel {
        self.channels.entry(receiver).or_default()
    }
}

/// What is written to a page: the chunk, and what was in the rest of the sender's page.
fn page_content(key: &ChunkKey) -> Vec<u8> {
    let mut bytes = content(key, len_of(key));
    bytes.resize(CHUNK_BYTES as usize, 0xEE);
    bytes
}

impl World {
    pub fn on_lmcache_sender_news(&mut self, at: Proc, news: WorldEvent) {
        match news {
            WorldEvent::Put(_, put) if self.lmcache.attempts[put.attempt].cancelled => {}
            WorldEvent::Put(_, put) => {
                let receiver = self.lmcache_job(put.attempt).receiver;
                self.lmcache_sender(at.index).channel(receiver).waiting.push_back(Asked::Put(put));
            }
            WorldEvent::ToSender(route, message) => self.on_lmcache_answer(at, route, *message),
            WorldEvent::Written(_, write, good) => self.on_lmcache_written(at, write, good),
            WorldEvent::LmcacheCancels(_, attempt) => self.lmcache_cancels(at, attempt),
            WorldEvent::Query(_, receiver) => return self.query(at, receiver),
            WorldEvent::QueryRead(_, receiver, lease) => return self.read_queried(receiver, lease),
            _ => {}
        }
        self.go_on(at);
    }

    /// Asks whatever can be asked now.
    fn go_on(&mut self, at: Proc) {
        let receivers: Vec<usize> = self.lmcache_sender(at.index).channels.keys().copied().collect();
        for receiver in receivers {
            let sender = self.lmcache_sender(at.index);
            let busy = |channel: &Channel| channel.asked.is_some() || matches!(channel.met, Met::Shaking(_));
            let blocked = sender.is_sync() && sender.channels.values().any(busy);
            let channel = sender.channel(receiver);
            if blocked || busy(channel) || channel.waiting.is_empty() {
                continue;
            }
            let (met, alloc) = (channel.met, channel.alloc);
            let to = self.receiver_at(receiver);
            let connected = alloc.filter(|(_, connected)| self.receiver_lives(*connected));
            if !self.receiver_lives(to) {
                self.schedule(RECONNECT_MS, WorldEvent::GoOn(at));
                continue;
            }
            match (met, connected) {
                (Met::Yes(..), Some((peer, _))) => {
                    self.ask(at, Route { sender: at, receiver: to, peer, port: Port::Alloc })
                }
                (Met::Yes(..), None) => {
                    let peer = self.lmcache_connects(at, to);
                    self.lmcache_sender(at.index).channel(receiver).alloc = Some((peer, to));
                    self.ask(at, Route { sender: at, receiver: to, peer, port: Port::Alloc });
                }
                _ => {
                    let peer = self.lmcache_connects(at, to);
                    self.lmcache_sender(at.index).channel(receiver).met = Met::Shaking(peer);
                    let route = Route { sender: at, receiver: to, peer, port: Port::Init };
                    let init = InitRequest { local_meta_bytes: sender_name(at).into_bytes(), pd: None };
                    self.lmcache_says(route, Message::NixlInitRequest(init), None);
                }
            }
        }
    }

    fn lmcache_connects(&mut self, at: Proc, to: Proc) -> PeerId {
        let peer = PeerId(self.fresh_id());
        self.links.insert((at, peer), Link { receiver: to, open: true });
        peer
    }

    fn lmcache_says(&mut self, route: Route, message: Message, attempt: Option<usize>) {
        self.lmcache.questions.insert(route, Question::of(&message, attempt));
        self.transmit(false, route, message);
    }

    fn ask(&mut self, at: Proc, route: Route) {
        let channel = self.lmcache_sender(at.index).channel(route.receiver.index);
        let Some(asked) = channel.waiting.pop_front() else { return };
        channel.asked = Some(asked.clone());
        let (message, attempt) = match asked {
            Asked::Put(put) => (Message::AllocRequest(self.alloc_of(at, put)), Some(put.attempt)),
            Asked::Cancel(attempt, keys) => {
                self.tally.lmcache_cancelled += 1;
                let req_id = self.lmcache_job(attempt).name.clone();
                (Message::CancelNotif(CancelNotif { req_id, keys, pd: None }), None)
            }
        };
        self.lmcache_says(route, message, attempt);
    }

    fn alloc_of(&mut self, at: Proc, put: Put) -> AllocRequest {
        let named = !self.lmcache_sender(at.index).is_sync();
        let job = self.lmcache_job(put.attempt);
        let (keys, last) = (job.batches[put.batch].clone(), put.batch + 1 == job.batches.len());
        let total = job.batches.iter().map(Vec::len).sum::<usize>() as u32;
        let name = job.name.clone();
        let last_chunk_toks = if last { u64::from(job.last_tokens) } else { u64::from(TOKENS) };
        if named {
            self.lmcache.attempts[put.attempt].batch_begins(total as usize);
        }
        self.tally.lmcache_batches += u64::from(put.batch > 0);
        let tokens = if keys.len() == 1 { last_chunk_toks } else { u64::from(TOKENS) };
        AllocRequest {
            keys,
            fmt: 1,
            shape: vec![2, 1, tokens, 2],
            dtype: "uint8".into(),
            last_chunk_toks,
            req_id: named.then_some(name),
            is_last_batch: named.then_some(last),
            total_chunks: named.then_some(total),
            pd: None,
        }
    }

    fn on_lmcache_answer(&mut self, at: Proc, route: Route, message: Message) {
        if self.links.get(&(at, route.peer)).is_none_or(|link| !link.open) {
            return;
        }
        let receiver = route.receiver.index;
        match message {
            Message::NixlInitResponse(response) => {
                if response.remote_meta_bytes.is_empty() {
                    return self.shaking_fails(at, receiver);
                }
                let request = MemRegRequest {
                    remote_agent_name: response.remote_agent_name,
                    local_id: String::new(),
                    local_xfer_dlist_bytes: descriptor_list::encode("nixl_cu12._bindings", &pages(1 << 20, 4)),
                    pd: None,
                };
                self.lmcache_says(route, Message::NixlMemRegRequest(request), None);
            }
            Message::NixlMemRegResponse(response) => {
                // Its socket for handshakes has served its purpose.
                self.links.remove(&(at, route.peer));
                match descriptor_list::decode(&response.remote_xfer_dlist_bytes) {
                    Ok((_, pages)) if pages.page_bytes == CHUNK_BYTES => {
                        self.lmcache_sender(at.index).channel(receiver).met = Met::Yes(route.receiver, pages.count);
                    }
                    _ => self.shaking_fails(at, receiver),
                }
            }
            Message::AllocResponse(response) => {
                let channel = self.lmcache_sender(at.index).channel(receiver);
                let met = channel.met;
                match (channel.asked.take(), met) {
                    (Some(Asked::Put(put)), Met::Yes(to, count)) => self.on_pages(at, put, to, count, &response),
                    (Some(Asked::Cancel(attempt, _)), _) => self.lmcache.attempts[attempt].forgotten(),
                    _ => self.wrong(format!("{} is answered unasked: {response:?}", sender_name(at))),
                }
            }
            Message::CacheQueryResponse(response) => {
                self.tally.lmcache_queried += response.cached_indexes.len() as u64;
                let leases = self.daemons.receiver(receiver).truth.leases.last_key_value();
                if let Some(lease) = leases.map(|(lease, _)| *lease).filter(|_| !response.cached_keys.is_empty()) {
                    let after = self.ms(0, 300);
                    self.schedule(after, WorldEvent::QueryRead(at, route.receiver, lease));
                }
            }
            other => self.wrong(format!("{} cannot read {other:?}", sender_name(at))),
        }
    }

    /// An error in the put that wanted to shake hands. The next one tries again.
    fn shaking_fails(&mut self, at: Proc, receiver: usize) {
        let channel = self.lmcache_sender(at.index).channel(receiver);
        channel.met = Met::Not;
        if let Some(Asked::Put(put)) = channel.waiting.pop_front() {
            self.put_fails(at, put);
        }
    }

    /// Pages for a batch, or a refusal.
    fn on_pages(&mut self, at: Proc, put: Put, to: Proc, count: u64, response: &AllocResponse) {
        let keys = self.lmcache_job(put.attempt).batches[put.batch].clone();
        if response.remote_indexes.contains(&-1) {
            return self.put_fails(at, put);
        }
        let skip = &response.already_sent_indexes;
        let own = (0u32..).zip(&keys).filter(|(index, _)| !skip.contains(index)).map(|(_, key)| key.clone());
        let chunks: Vec<(u64, ChunkKey)> = response.remote_indexes.iter().map(|&page| page as u64).zip(own).collect();
        let different: BTreeSet<u64> = chunks.iter().map(|(page, _)| *page).collect();
        if different.len() != chunks.len() || chunks.len() + skip.len() != keys.len() {
            return self.wrong(format!("{} cannot make sense of {response:?}", sender_name(at)));
        }
        // Pages of a receiver that was restarted since may be more than the old one had.
        let beyond = different.last().is_some_and(|&last| last >= count);
        if beyond && self.receiver_lives(to) {
            return self.wrong(format!("{response:?} is beyond the {count} pages that {} knows", sender_name(at)));
        }
        let sync = self.lmcache_sender(at.index).is_sync();
        if !sync {
            self.lmcache.attempts[put.attempt].sent(keys);
        }
        if beyond {
            return self.put_fails(at, put);
        }
        if sync {
            self.lmcache_sender(at.index).writes.push_back(Writing { put, to, chunks });
            return self.work_on(at);
        }
        self.lmcache_writes(at, Writing { put, to, chunks });
    }

    /// The worker of a synchronous sender takes up the next, once it has written the one before.
    fn work_on(&mut self, at: Proc) {
        let sender = self.lmcache_sender(at.index);
        if sender.writing.is_empty()
            && let Some(next) = sender.writes.pop_front()
        {
            self.lmcache_writes(at, next);
        }
    }

    fn lmcache_writes(&mut self, at: Proc, Writing { put, to, chunks }: Writing) {
        let copies = chunks.iter().map(|(page, key)| (page * CHUNK_BYTES, page_content(key))).collect();
        let write = self.post_pages(at, to, copies);
        self.lmcache_sender(at.index).writing.insert(write, put);
    }

    fn on_lmcache_written(&mut self, at: Proc, write: u64, good: bool) {
        let Some(put) = self.lmcache_sender(at.index).writing.remove(&write) else { return };
        if good {
            self.put_is_written(at, put);
        } else {
            self.put_fails(at, put);
        }
        if self.lmcache_sender(at.index).is_sync() {
            self.work_on(at);
        }
    }

    /// An asynchronous sender tells the receiver that it has given a request up, without waiting for what it writes.
    pub fn lmcache_aborts(&mut self, at: Proc, attempt: usize) {
        let keys = self.lmcache.attempts[attempt].keys_to_cancel();
        if keys.is_empty() {
            return self.lmcache.attempts[attempt].forgotten();
        }
        let receiver = self.lmcache_job(attempt).receiver;
        self.lmcache_sender(at.index).channel(receiver).waiting.push_back(Asked::Cancel(attempt, keys));
    }

    /// A synchronous sender asks which chunks are held, to read them.
    fn query(&mut self, at: Proc, receiver: usize) {
        let to = self.receiver_at(receiver);
        if !self.receiver_lives(to) || !self.lmcache_sender(at.index).is_sync() {
            return;
        }
        let peer = self.lmcache_connects(at, to);
        let first = self.rng.random_range(0..self.plan.keys);
        let keys = (first..first + 3).map(|number| ChunkKey::new(format!("k{number}")).unwrap()).collect();
        let query = Message::CacheQueryRequest(CacheQueryRequest { keys });
        self.lmcache_says(Route { sender: at, receiver: to, peer, port: Port::Query }, query, None);
    }

    /// It reads, if the time is not over for which the answer holds.
    fn read_queried(&mut self, receiver: Proc, lease: LeaseId) {
        if !self.receiver_lives(receiver) {
            return;
        }
        let truth = &self.daemons.receiver(receiver.index).truth;
        let Some(leased) = truth.leases.get(&lease) else { return };
        let checked = truth.verify(&leased.chunks);
        self.check(checked.map_err(|text| format!("what was asked after is gone: {text}")));
    }
}
