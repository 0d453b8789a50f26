//! Receivers that are LMCache's own: what they are told, and what their answers mean.
//!
//! Such a receiver knows a handshake, allocations and, in its asynchronous mode, cancels. There is no commit: a request is
//! sent once its last write has ended. Answers do not say what they answer, and two may come in either order, so one
//! allocation is asked for at a time and the others wait. A question stays asked until it is answered, however late: an
//! answer that is waited for in vain is an allocation that may still be made, on pages that nobody would ever write. What
//! was granted and not written is remembered in [`Unwritten`].
//!
//! A cancel does not wait for an allocation's answer, which may wait for these very pages. Its own answer is empty, as no
//! allocation's is. Which of the two was dealt with first is not known: where they name one chunk, "already sent" leaves a
//! doubt.
//!
//! Nothing named `Pd...` is ever sent to it: a synchronous receiver would be disabled by it.

mod places;
pub(super) mod receiver;
mod unwritten;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use self::places::{NoPlaces, Places, places};
use self::receiver::{Asked, Cancelled, LmcacheReceiver};
use self::unwritten::{Claim, Unwritten};
use super::link::Link;
use super::receivers::Receiver;
use super::requests::{OutgoingRequest, OutgoingStage};
use super::uid::Uid;
use super::{Outgoing, OutgoingTimer, Port};
use crate::ids::{ChunkKey, Failure, FailureKind, GrantId, Pages, PeerId, ReceiverAddress, RequestId, Seq};
use crate::node::core::Core;
use crate::node::output::To;
use crate::node::safeguards::Safeguard;
use crate::node::{handshake, lmcache_terms};
use crate::wire::message::{AllocResponse, CancelNotif, InitResponse, MemRegRequest, MemRegResponse};
use crate::wire::{LmcacheMode, Message, descriptor_list};

/// How long a question may go unanswered before its connection is given up. A receiver that is full answers when its
/// engine has freed pages, and giving up has a price: see [`Unwritten::orphaned`].
const ANSWER_TIME_MAX: Duration = Duration::from_secs(300);

/// For how many lost receivers what they hold is remembered.
const REMEMBERED_MAX: usize = 4096;

/// What a lost receiver holds of ours, for when it is met again.
#[derive(Debug)]
struct Remembered {
    metadata: Vec<u8>,
    pages: Pages,
    unwritten: Unwritten,
    since: Instant,
}

/// What LMCache receivers that were lost hold of ours, by their addresses.
#[derive(Debug, Default)]
pub(super) struct RememberedReceivers(BTreeMap<ReceiverAddress, Remembered>);

impl<R: Clone> Outgoing<R> {
    fn lmcache_mut(&mut self, peer: PeerId) -> Option<&mut LmcacheReceiver> {
        self.receivers.get_mut(&peer)?.link.lmcache_mut()
    }

    /// A message from an LMCache receiver at its port for allocations.
    pub(super) fn on_lmcache_message(&mut self, core: &mut Core<R>, peer: PeerId, message: Message) {
        match message {
            Message::AllocResponse(response) => self.on_lmcache_answer(core, peer, &response),
            message => self.note_unexpected(core, peer, message.type_name()),
        }
    }

    /// A receiver has answered a handshake without `pd`: it is LMCache's.
    pub(super) fn on_lmcache_init_response(&mut self, core: &mut Core<R>, peer: PeerId, response: InitResponse) {
        let Some(record) = self.receivers.get(&peer) else { return };
        let (address, mode) = (record.address.clone(), record.lmcache_mode);
        let checked = handshake::check_metadata(&response.remote_meta_bytes);
        match checked.and_then(|()| self.check_lmcache(core, &address, &response)) {
            Ok(our_name) => {
                let receiver = LmcacheReceiver::new(mode, our_name, response.remote_meta_bytes.clone());
                self.load(core, peer, Link::Lmcache(Box::new(receiver)), None, response.remote_meta_bytes);
            }
            Err(failure) => self.peer_failed(core, peer, failure),
        }
    }

    /// Whether we can talk to a receiver that has answered as LMCache does.
    /// What it calls us.
    fn check_lmcache(
        &self,
        core: &Core<R>,
        address: &ReceiverAddress,
        response: &InitResponse,
    ) -> Result<Vec<u8>, Failure> {
        let refuse = |text: String| Err(Failure::new(FailureKind::HandshakeRefused, text));
        if core.settings.pages.is_none() {
            return refuse(format!(
                "receiver {address} is an LMCache receiver (no `pd` field in its handshake), which only nixl reaches, and \
                 this sender moves bytes with {}; set transfer_channel: nixl, or start pd-receiver there",
                core.settings.hello.engine
            ));
        }
        if let Some(why) = core.settings.chunk.beyond_lmcache() {
            let text = format!("receiver {address} is an LMCache receiver: {why}; start pd-receiver there");
            return Err(Failure::new(FailureKind::LayoutMismatch, text));
        }
        lmcache_terms::dtype(&core.settings.chunk.dtype)?;
        let our_name = response.remote_agent_name.clone();
        if our_name != core.settings.agent_name.as_bytes() {
            return refuse(format!(
                "receiver {address} (LMCache) has met an agent whose name has {} bytes, and this sender's is {}; is it the \
                 answer to another sender",
                our_name.len(),
                core.settings.agent_name
            ));
        }
        Ok(our_name)
    }

    /// What an LMCache receiver is told of our memory. Its handler has to be able to read it.
    pub(super) fn lmcache_registration(&self, core: &Core<R>, receiver: &LmcacheReceiver) -> MemRegRequest {
        let list = |pages| descriptor_list::encode(descriptor_list::ANY_FLAVOUR, &pages);
        MemRegRequest {
            remote_agent_name: receiver.our_name.clone(),
            local_id: core.settings.hello.instance.clone(),
            local_xfer_dlist_bytes: core.settings.pages.map(list).unwrap_or_default(),
            pd: None,
        }
    }

    /// Where the memory of an LMCache receiver is.
    pub(super) fn lmcache_pages(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        response: &MemRegResponse,
    ) -> Result<Pages, Failure> {
        let slot_bytes = core.settings.chunk.slot_bytes;
        let Some(record) = self.receivers.get_mut(&peer) else {
            return Err(Failure::new(FailureKind::Internal, "pages of a peer that is not there"));
        };
        let address = record.address.clone();
        let (_, pages) = descriptor_list::decode(&response.remote_xfer_dlist_bytes).map_err(|error| {
            Failure::new(FailureKind::HandshakeRefused, format!("receiver {address} (LMCache): {error}"))
        })?;
        if pages.page_bytes != slot_bytes {
            let text = format!(
                "a page of receiver {address} (LMCache) has {} bytes and a chunk of this sender has {slot_bytes}; start both \
                 for the same model, dtype, chunk_size and tensor-parallel size",
                pages.page_bytes
            );
            return Err(Failure::new(FailureKind::LayoutMismatch, text));
        }
        let remembered = self.lmcache.0.remove(&address);
        if let Some(receiver) = record.link.lmcache_mut() {
            receiver.pages = Some(pages);
            // Another process at the same address knows no key of ours.
            if let Some(before) =
                remembered.filter(|before| before.pages == pages && before.metadata == receiver.metadata)
            {
                receiver.unwritten = before.unwritten;
            }
        }
        Ok(pages)
    }

    /// A request wants slots of an LMCache receiver.
    pub(super) fn queue_allocation(&mut self, core: &mut Core<R>, peer: PeerId, uid: Uid) {
        let Some(request) = self.requests.get(&uid) else { return };
        let OutgoingStage::Connecting { wait, .. } = request.stage else { return };
        if let Some(failure) = request.keys.iter().find_map(|key| lmcache_terms::check_key(key).err()) {
            return self.fail(core, uid, failure);
        }
        let until = core.now + wait;
        core.timers.set(OutgoingTimer::Allocation(uid), until);
        if let Some(receiver) = self.lmcache_mut(peer) {
            receiver.waiting.push_back((uid, until));
        }
        self.ask_next(core, peer);
    }

    /// Sends a cancel that is due, and asks for the room that has been waited for longest, if none is asked for already.
    fn ask_next(&mut self, core: &mut Core<R>, peer: PeerId) {
        let Some(receiver) = self.lmcache_mut(peer).filter(|receiver| !receiver.ending) else { return };
        if receiver.cancelled.is_none()
            && let Some((req_id, keys)) = receiver.cancels.pop_front()
        {
            keys.iter().for_each(|key| receiver.unwritten.give_back(key));
            receiver.cancelled = Some(Cancelled { keys: keys.clone(), since: core.now });
            core.timers.set(OutgoingTimer::Answer(peer), core.now + ANSWER_TIME_MAX);
            let cancel = CancelNotif { req_id, keys, pd: None };
            core.send(To::Peer(peer), Port::Alloc, Message::CancelNotif(cancel));
        }
        while let Some(receiver) =
            self.lmcache_mut(peer).filter(|receiver| !receiver.ending && receiver.asked.is_none())
        {
            let Some(&(uid, until)) = receiver.waiting.front() else { return };
            // What is being given back is not asked for before the receiver has heard so.
            let cancelled: BTreeSet<ChunkKey> =
                receiver.cancelled.iter().flat_map(|cancel| cancel.keys.iter().cloned()).collect();
            let names = |key: &ChunkKey| cancelled.contains(key);
            if self.requests.get(&uid).is_some_and(|request| request.peer == peer && request.keys.iter().any(names)) {
                return;
            }
            if let Some(receiver) = self.lmcache_mut(peer) {
                receiver.waiting.pop_front();
            }
            self.ask_for_pages(core, peer, uid, until);
        }
    }

    fn ask_for_pages(&mut self, core: &mut Core<R>, peer: PeerId, uid: Uid, until: Instant) {
        let seq = Seq(core.fresh());
        let Ok(dtype) = lmcache_terms::dtype(&core.settings.chunk.dtype) else { return };
        // It may have ended while it waited.
        let Some(request) = self.requests.get_mut(&uid).filter(|request| request.peer == peer) else { return };
        let OutgoingStage::Connecting { open_id, wait } = request.stage else { return };
        let (id, keys) = (request.id.clone(), request.keys.clone());
        let Some(receiver) = self.receivers.get_mut(&peer).and_then(|record| record.link.lmcache_mut()) else { return };
        if receiver.unwritten.len() + keys.len() > receiver.unwritten_max() {
            let text = format!(
                "receiver {} (LMCache) holds {} chunks of this sender that were never written, and takes no word that they \
                 are not needed; restart it",
                request.receiver(),
                receiver.unwritten.len()
            );
            return self.fail(core, uid, Failure::new(FailureKind::Limit, text));
        }
        request.stage = OutgoingStage::Allocating { open_id, seq, wait };
        receiver.asked = Some(Asked { uid, seq, request: id, keys, since: core.now });
        let mut message = request.alloc_message(&core.settings.chunk);
        message.dtype = dtype;
        // Its turn came late, perhaps, but the receiver is not slower for that.
        let until = until + self.settings.commit_timeout;
        core.timers.set(OutgoingTimer::Allocation(uid), until);
        core.timers.set(OutgoingTimer::Answer(peer), until.max(core.now + ANSWER_TIME_MAX));
        core.send(To::Peer(peer), Port::Alloc, Message::AllocRequest(message));
    }

    /// Why a request has waited for its slots in vain, or none when its receiver is ours.
    pub(super) fn lmcache_allocation_timed_out(&self, core: &Core<R>, uid: Uid) -> Option<Failure> {
        let request = self.requests.get(&uid)?;
        let receiver = self.receivers.get(&request.peer)?.link.lmcache()?;
        let address = request.receiver();
        let since = receiver.silent_since()?;
        let silent_ms = core.now.saturating_duration_since(since).as_millis();
        let text = match request.stage {
            OutgoingStage::Allocating { .. } => format!(
                "receiver {address} (LMCache) has not answered the allocation within {silent_ms} ms; one that is full \
                 answers when its engine has freed pages (pd_allocation_timeout_sec, pd_commit_timeout_sec)"
            ),
            OutgoingStage::Connecting { .. } => format!(
                "receiver {address} (LMCache) is asked one thing at a time, and has not answered another request for \
                 {silent_ms} ms; one that is full answers when its engine has freed pages (pd_allocation_timeout_sec)"
            ),
            _ => return None,
        };
        Some(Failure::new(FailureKind::Deadline, text))
    }

    /// An answer, to whatever was asked.
    fn on_lmcache_answer(&mut self, core: &mut Core<R>, peer: PeerId, response: &AllocResponse) {
        let empty = response.remote_indexes.is_empty() && response.already_sent_indexes.is_empty();
        let Some(receiver) = self.lmcache_mut(peer) else { return };
        // An empty one answers the cancel. Another does so only where nothing else is asked, and says that it could not be
        // read: then what the receiver holds stays in doubt.
        let cancelled = receiver.cancelled.take_if(|_| empty || receiver.asked.is_none());
        let asked = if cancelled.is_none() { receiver.asked.take() } else { None };
        if let Some(Cancelled { keys, .. }) = cancelled.as_ref().filter(|_| empty) {
            let asked: BTreeSet<&ChunkKey> = receiver.asked.iter().flat_map(|asked| &asked.keys).collect();
            keys.iter().filter(|key| !asked.contains(key)).for_each(|key| receiver.unwritten.given_back(key));
        }
        if receiver.silent_since().is_none() {
            core.timers.unset(OutgoingTimer::Answer(peer));
        }
        match asked {
            Some(Asked { uid, seq, request, keys, .. }) => {
                self.on_lmcache_grant(core, peer, uid, seq, request, &keys, response);
            }
            None if cancelled.is_none() => self.note_unexpected(core, peer, "AllocResponse that answers nothing"),
            None => {}
        }
        self.ask_next(core, peer);
    }

    #[expect(clippy::too_many_arguments, reason = "a question and its answer")]
    fn on_lmcache_grant(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        uid: Uid,
        seq: Seq,
        id: RequestId,
        keys: &[ChunkKey],
        response: &AllocResponse,
    ) {
        let waits = |request: &&OutgoingRequest| matches!(request.stage, OutgoingStage::Allocating { seq: asked, .. } if asked == seq);
        let waits = self.requests.get(&uid).filter(waits).is_some();
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        let address = record.address.clone();
        let Some(receiver) = record.link.lmcache_mut() else { return };
        let Some(pages) = receiver.pages else { return };
        let places = match places(keys.len(), pages.count, response) {
            Ok(places) => places,
            Err(NoPlaces::Refused) => {
                let text = format!(
                    "receiver {address} (LMCache) answered that it has no room, or does not accept the request: {} chunks \
                     of {} bytes, its buffer has {} pages; its log says which",
                    keys.len(),
                    pages.page_bytes,
                    pages.count
                );
                return self.fail_if(core, waits, uid, Failure::new(FailureKind::NoSlots, text));
            }
            Err(NoPlaces::Malformed) => {
                receiver.unwritten.orphaned(keys);
                let text = format!(
                    "receiver {address} (LMCache) answered {} chunks with {} pages and {} already sent; expected different \
                     pages below {}, one for each chunk that is not already sent",
                    keys.len(),
                    response.remote_indexes.len(),
                    response.already_sent_indexes.len(),
                    pages.count
                );
                return self.fail_if(core, waits, uid, Failure::new(FailureKind::Other, text));
            }
        };
        for (key, place) in keys.iter().zip(&places) {
            if let Some(page) = place {
                receiver.unwritten.granted(key, *page);
            }
        }
        let remembered = core.settings.keeps(Safeguard::UnwrittenRemembered);
        let mut doubtful = 0;
        let mut claim = |(key, place): (&ChunkKey, Option<u32>)| {
            place.or_else(|| match receiver.unwritten.claimed(key) {
                _ if !remembered => None,
                Claim::Sent => None,
                Claim::Ours(page) => Some(page),
                Claim::Doubtful => {
                    doubtful += 1;
                    None
                }
            })
        };
        let places: Places = keys.iter().zip(places).map(&mut claim).collect();
        if doubtful > 0 {
            let text = format!(
                "receiver {address} (LMCache) has {doubtful} of {} chunks already, but an earlier attempt to send them ended \
                 without a word of where they go, so nobody may have written them; they can be sent again once its engine \
                 has dropped them or it is restarted",
                keys.len()
            );
            self.fail_if(core, waits, uid, Failure::new(FailureKind::Other, text));
            return self.give_back_pages(core, peer, id, keys.to_vec());
        }
        if !waits {
            return self.give_back_pages(core, peer, id, keys.to_vec());
        }
        self.open_lmcache(core, uid, seq, &pages, &places);
    }

    fn fail_if(&mut self, core: &mut Core<R>, waits: bool, uid: Uid, failure: Failure) {
        if waits {
            self.fail(core, uid, failure);
        }
    }

    /// A request has its pages: chunks can be staged and sent.
    fn open_lmcache(&mut self, core: &mut Core<R>, uid: Uid, seq: Seq, pages: &Pages, places: &Places) {
        // Its receiver sets no time, so ours counts: pages that are never written are lost to a synchronous one.
        let write_until = core.now + core.settings.write_timeout;
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let OutgoingStage::Allocating { open_id, .. } = request.stage else { return };
        for (chunk, place) in request.chunks.iter_mut().zip(places) {
            chunk.remote = place.map(|page| u64::from(page) * pages.page_bytes);
        }
        let already_sent: Vec<u32> =
            (0u32..).zip(places).filter(|(_, place)| place.is_none()).map(|(index, _)| index).collect();
        // A name that nobody else hears.
        request.stage = OutgoingStage::Open { grant: GrantId(seq.0), write_until, last: false };
        self.opened(core, uid, open_id, write_until, already_sent);
    }

    /// Nothing of a request is written any more. Only an asynchronous receiver can be told; of a synchronous one the pages
    /// are remembered, for whoever sends the same chunks.
    pub(super) fn give_back_pages(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        request: RequestId,
        keys: Vec<ChunkKey>,
    ) {
        if let Some(receiver) = self.lmcache_mut(peer).filter(|receiver| receiver.mode == LmcacheMode::Async) {
            receiver.cancels.push_back((request, keys));
            self.ask_next(core, peer);
        }
    }

    /// Chunks are on their pages.
    pub(super) fn lmcache_written(&mut self, peer: PeerId, keys: &[ChunkKey]) {
        if let Some(receiver) = self.lmcache_mut(peer) {
            keys.iter().for_each(|key| receiver.unwritten.written(key));
        }
    }

    /// A question has gone unanswered for too long. Who waits behind it is asked about anew, over another connection.
    pub(super) fn answer_timed_out(&mut self, core: &mut Core<R>, peer: PeerId) {
        let Some(record) = self.receivers.get(&peer) else { return };
        let address = record.address.clone();
        let Some(since) = record.link.lmcache().and_then(LmcacheReceiver::silent_since) else { return };
        let text = format!(
            "receiver {address} (LMCache) has not answered for {} ms; it is connected to again",
            core.now.saturating_duration_since(since).as_millis()
        );
        let mut again = Vec::new();
        for uid in self.requests_of(peer) {
            let Some(request) = self.requests.get_mut(&uid) else { continue };
            let OutgoingStage::Connecting { open_id, wait } = request.stage else { continue };
            request.set_aside(core.now, open_id, wait);
            core.timers.unset(OutgoingTimer::Allocation(uid));
            again.push(uid);
        }
        self.peer_failed(core, peer, Failure::new(FailureKind::PeerLost, text));
        self.take_up(core, &address, again);
    }

    /// An LMCache receiver is being given up: nothing more is said to it.
    pub(super) fn end_lmcache(&mut self, core: &mut Core<R>, peer: PeerId) {
        if let Some(receiver) = self.lmcache_mut(peer) {
            receiver.ending = true;
            if let Some(Asked { keys, .. }) = receiver.asked.take() {
                receiver.unwritten.orphaned(&keys);
            }
            core.timers.unset(OutgoingTimer::Answer(peer));
        }
    }

    /// An LMCache receiver is gone: remembers what it holds of ours.
    pub(super) fn remember_lmcache(&mut self, core: &mut Core<R>, record: Receiver) {
        let Link::Lmcache(receiver) = record.link else { return };
        let LmcacheReceiver { metadata, pages: Some(pages), unwritten, .. } = *receiver else { return };
        if unwritten.is_empty() {
            return;
        }
        let remembered = &mut self.lmcache.0;
        if remembered.len() >= REMEMBERED_MAX {
            // Most likely it is not there any more.
            let oldest = remembered.iter().min_by_key(|(_, before)| before.since).map(|(address, _)| address.clone());
            oldest.map(|address| remembered.remove(&address));
        }
        remembered.insert(record.address, Remembered { metadata, pages, unwritten, since: core.now });
    }
}
