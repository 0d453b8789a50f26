//! A receiver of LMCache's, and the engine that reads there. A key is there from its grant on; whoever names it again adds
//! a reference; each read, and each cancel that an asynchronous one is told of, takes one.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use pd_backend::ids::{ChunkKey, RequestId};
use pd_backend::node::Port;
use pd_backend::wire::message::{
    AllocRequest, AllocResponse, CancelNotif, InitResponse, MemRegRequest, MemRegResponse,
};
use pd_backend::wire::{LmcacheMode, Message};

use crate::events::{Proc, WorldEvent};
use crate::lmcache::descriptor_list;
use crate::lmcache::pages;
use crate::network::Route;
use crate::process::{CHUNK_BYTES, Process, TOKEN_BYTES, TOKENS, receiver_name, sender_name};
use crate::truth::content;
use crate::world::World;

const PAGES: u64 = 6;
/// `pd_allocation_timeout_sec` of those asynchronous ones that have any.
const ALLOCATION_MS: u64 = 250;

/// One life of an LMCache receiver.
pub struct LmcacheReceiver {
    pub process: Process,
    pub mode: LmcacheMode,
    memory: Vec<u8>,
    /// First in, first out.
    free: VecDeque<u32>,
    data: BTreeMap<ChunkKey, Held>,
    /// A synchronous one works on the first alone.
    tasks: VecDeque<Task>,
    /// A handler has failed: nobody is answered any more.
    disabled: bool,
    /// A connection of a sender to it is gone: what that was granted, or answered, may be lost.
    pub abandoned: bool,
}

/// A chunk that somebody was granted a page for.
#[derive(Debug)]
struct Held {
    page: u32,
    references: u32,
    granted_to: Proc,
    /// Another sender was told that it is there.
    shared: bool,
}

/// An allocation that is being worked on.
struct Task {
    route: Route,
    alloc: AllocRequest,
    admitted: bool,
    /// Keys that were gone through.
    done: usize,
    response: AllocResponse,
    due: Option<Instant>,
}

impl LmcacheReceiver {
    pub fn new(at: Proc, mode: LmcacheMode) -> Self {
        Self {
            process: Process { life: at.life, alive: true, ..Process::default() },
            mode,
            memory: vec![0; (PAGES * CHUNK_BYTES) as usize],
            free: (0..PAGES as u32).collect(),
            data: BTreeMap::new(),
            tasks: VecDeque::new(),
            disabled: false,
            abandoned: false,
        }
    }

    /// What has not been read, if anything.
    pub fn left(&self) -> Option<String> {
        (!self.data.is_empty() || !self.tasks.is_empty()).then(|| format!("{:?}", self.data))
    }

    /// Whether pages may be left that nobody will read: nothing can be taken back from a synchronous one, nor from one
    /// whose sender, or connection, is gone.
    pub fn may_keep_pages(&self) -> bool {
        self.mode == LmcacheMode::Sync || self.abandoned
    }

    fn release(&mut self, key: &ChunkKey) {
        let Some(held) = self.data.get_mut(key) else { return };
        held.references -= 1;
        if held.references == 0 {
            self.free.push_back(held.page);
            self.data.remove(key);
        }
    }

    fn is_written(&self, key: &ChunkKey, held: &Held) -> bool {
        let start = (u64::from(held.page) * CHUNK_BYTES) as usize;
        let expected = content(key, len_of(key));
        self.memory[start..start + expected.len()] == expected
    }
}

/// A chunk's name as LMCache's code reads it: `text` names the bytes, `owner` whoever alone sends it.
pub fn lmcache_key(text: &str, owner: Option<usize>) -> ChunkKey {
    let (hash, tokens) = text.split_once('-').unwrap_or((text, "4"));
    let hash = hash.bytes().fold(0xcbf2_9ce4_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0193));
    let owner = owner.map_or(String::new(), |owner| format!("@sender%{owner}"));
    ChunkKey::new(format!("m@1@0@{hash:x}@uint8@tokens%{tokens}{owner}")).unwrap()
}

fn len_of(key: &ChunkKey) -> u64 {
    let tokens = key.as_str().split('@').find_map(|part| part.strip_prefix("tokens%")).unwrap();
    TOKEN_BYTES[0] * tokens.parse::<u64>().unwrap_or(u64::from(TOKENS))
}

/// What LMCache's code makes of an allocation.
fn is_readable(alloc: &AllocRequest) -> bool {
    let key = |key: &ChunkKey| {
        let parts: Vec<&str> = key.as_str().split('@').collect();
        parts.len() >= 5
            && parts[1].parse::<u64>().is_ok()
            && parts[2].parse::<u64>().is_ok()
            && u64::from_str_radix(parts[3], 16).is_ok()
            && parts[4] == "uint8"
            && parts[5..].iter().all(|tag| tag.contains('%'))
    };
    (alloc.fmt, alloc.dtype.as_str(), &alloc.pd) == (1, "uint8", &None)
        && alloc.shape == [2, 1, u64::from(TOKENS), 2]
        && (1..=u64::from(TOKENS)).contains(&alloc.last_chunk_toks)
        && alloc.keys.iter().all(key)
}

impl World {
    pub fn on_lmcache_receiver_news(&mut self, at: Proc, news: WorldEvent) {
        match news {
            WorldEvent::ToReceiver(route, message) => self.lmcache_receiver_is_told(at, route, *message),
            WorldEvent::LmcacheRead(_, sender, request, keys) => self.lmcache_reads(at, sender, &request, &keys),
            _ => {}
        }
        self.work(at);
    }

    fn lmcache_receiver_is_told(&mut self, at: Proc, route: Route, message: Message) {
        let receiver = self.lmcache_receiver(at.index);
        let mode = receiver.mode;
        if receiver.disabled {
            return;
        }
        match (route.port, message) {
            (Port::Init, Message::NixlInitRequest(_)) => {
                let response = InitResponse {
                    remote_agent_name: sender_name(route.sender).into_bytes(),
                    remote_meta_bytes: receiver_name(at).into_bytes(),
                    pd: None,
                };
                self.transmit(true, route, Message::NixlInitResponse(response));
            }
            (
                Port::Init,
                Message::NixlMemRegRequest(MemRegRequest { remote_agent_name, local_xfer_dlist_bytes, .. }),
            ) if remote_agent_name == sender_name(route.sender).as_bytes()
                && descriptor_list::decode(&local_xfer_dlist_bytes).is_ok_and(|(_, pages)| pages.count > 0) =>
            {
                let list = descriptor_list::encode("nixl_cu12._bindings", &pages(1 << 30, PAGES));
                let response = MemRegResponse { remote_xfer_dlist_bytes: list, pd: None };
                self.transmit(true, route, Message::NixlMemRegResponse(response));
            }
            (Port::Alloc, Message::AllocRequest(alloc)) if is_readable(&alloc) => {
                let patient = mode == LmcacheMode::Sync || self.plan.lmcache_waits || self.settling;
                let due = (!patient).then(|| self.now + Duration::from_millis(ALLOCATION_MS));
                if due.is_some() {
                    self.schedule(ALLOCATION_MS, WorldEvent::LmcacheWorks(at));
                }
                let response = AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd: None };
                let task = Task { route, alloc, admitted: false, done: 0, response, due };
                self.lmcache_receiver(at.index).tasks.push_back(task);
            }
            (Port::Alloc, Message::CancelNotif(CancelNotif { keys, pd: None, .. })) if mode == LmcacheMode::Async => {
                self.tally.lmcache_given_back += 1;
                keys.iter().for_each(|key| self.lmcache_receiver(at.index).release(key));
                let response = AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd: None };
                self.transmit(true, route, Message::AllocResponse(response));
            }
            (port, message) => {
                self.lmcache_receiver(at.index).disabled = true;
                let name = receiver_name(at);
                self.wrong(format!("{name} cannot read this on {port:?}, and answers nobody any more: {message:?}"));
            }
        }
    }

    /// A sender of ours asks for room: an LMCache receiver, perhaps.
    pub fn note_lmcache_question(&mut self, route: Route, message: &Message) {
        let Message::AllocRequest(AllocRequest { req_id: Some(request), keys, .. }) = message else { return };
        let name = (route.sender, request.clone());
        match self.is_lmcache_receiver(route.receiver.index) {
            true => drop(self.lmcache.asked_by_ours.insert(name, (route.receiver, keys.clone()))),
            false => drop(self.lmcache.asked_by_ours.remove(&name)),
        }
    }

    /// Goes on with every allocation as far as there are pages.
    fn work(&mut self, at: Proc) {
        let mut next = 0;
        loop {
            let sync = self.lmcache_receiver(at.index).mode == LmcacheMode::Sync;
            if sync && next > 0 || next >= self.lmcache_receiver(at.index).tasks.len() {
                return;
            }
            if self.work_on_task(at, next) {
                let Some(task) = self.lmcache_receiver(at.index).tasks.remove(next) else { return };
                self.tally.lmcache_no_room += u64::from(task.response.remote_indexes.contains(&-1));
                self.transmit(true, task.route, Message::AllocResponse(task.response));
                next = 0;
            } else {
                next += 1;
            }
        }
    }

    /// True: it is done.
    fn work_on_task(&mut self, at: Proc, which: usize) -> bool {
        let now = self.now;
        let receiver = self.lmcache_receiver(at.index);
        let reserved: usize =
            receiver.tasks.iter().filter(|task| task.admitted).map(|task| task.alloc.keys.len()).sum();
        let LmcacheReceiver { tasks, data, free, mode, .. } = receiver;
        let task = &mut tasks[which];
        let count = task.alloc.keys.len();
        if *mode == LmcacheMode::Async && !task.admitted {
            task.admitted = reserved + count <= PAGES as usize;
        }
        let too_large = *mode == LmcacheMode::Async && count > PAGES as usize;
        if too_large || (task.due.is_some_and(|due| now >= due)) {
            let taken = task.alloc.keys[..task.done].to_vec();
            task.response.already_sent_indexes.clear();
            task.response.remote_indexes = vec![-1; count];
            taken.iter().for_each(|key| receiver.release(key));
            return true;
        }
        if *mode == LmcacheMode::Async && !task.admitted {
            return false;
        }
        let sender = task.route.sender;
        let mut there = Vec::new();
        while let Some(key) = task.alloc.keys.get(task.done) {
            if let Some(held) = data.get_mut(key) {
                held.references += 1;
                held.shared |= held.granted_to != sender;
                task.response.already_sent_indexes.push(task.done as u32);
                there.push(key.clone());
            } else if let Some(page) = free.pop_front() {
                task.response.remote_indexes.push(page.into());
                data.insert(key.clone(), Held { page, references: 1, granted_to: sender, shared: false });
            } else {
                break;
            }
            task.done += 1;
        }
        let done = task.done == count;
        let receiver = &*receiver;
        let unwritten = there.iter().filter(|key| {
            receiver.data.get(key).is_some_and(|held| held.granted_to == sender && !receiver.is_written(key, held))
        });
        let unwritten = unwritten.count() as u64;
        self.tally.lmcache_unwritten += unwritten;
        done
    }

    /// Whether these bytes may be written there now: to a page that somebody was granted, and of its chunk alone.
    pub fn lmcache_takes(&mut self, receiver: Proc, writer: Proc, range: &Range<u64>, bytes: &[u8]) {
        let page = (range.start / CHUNK_BYTES) as u32;
        let place = self.lmcache_receiver(receiver.index);
        let held = place.data.iter().find(|(_, held)| held.page == page);
        let wrong = match held {
            None => Some("which nobody was granted".to_owned()),
            Some((key, _)) => {
                let from = (range.start % CHUNK_BYTES) as usize;
                let expected = content(key, CHUNK_BYTES);
                (expected[from..from + bytes.len()] != *bytes).then(|| format!("which is {key}'s: {bytes:?}"))
            }
        };
        match wrong {
            Some(wrong) => {
                self.wrong(format!("{} writes {range:?} of {}, {wrong}", sender_name(writer), receiver_name(receiver)));
            }
            None => place.memory[range.start as usize..range.end as usize].copy_from_slice(bytes),
        }
    }

    /// The proxy was told: an engine reads the request. What another sender was granted, and has not written, is "already
    /// sent" to ours, which cannot know better; and so is what another sender keeps there that was told the same
    /// (docs/lmcache.md).
    fn lmcache_reads(&mut self, at: Proc, sender: Proc, request: &RequestId, keys: &[ChunkKey]) {
        let receiver = &*self.lmcache_receiver(at.index);
        let mut wrong = None;
        for key in keys {
            match receiver.data.get(key) {
                None => wrong = Some(format!("{key} of {request} is not there")),
                Some(held) if receiver.is_written(key, held) || held.granted_to != sender || held.shared => {}
                Some(held) => wrong = Some(format!("{key} of {request} is not written to page {}", held.page)),
            }
        }
        if let Some(text) = wrong {
            self.wrong(format!("{}: {text}", receiver_name(at)));
        }
        keys.iter().for_each(|key| self.lmcache_receiver(at.index).release(key));
        self.tally.lmcache_received += 1;
        self.fresh_fetched.insert(request.clone());
    }
}
