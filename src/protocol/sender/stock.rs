//! Receivers that are LMCache's own: what they are told, and what their answers mean.
//!
//! Such a receiver knows a handshake, allocations and, in its asynchronous mode, cancels. There is no commit: a request is
//! sent once its last write has ended. Answers do not say what they answer, and two may come in either order, so one
//! allocation is asked for at a time and the others wait. A question stays asked until it is answered, however late: an
//! answer that is waited for in vain is an allocation that may still be made, on pages that nobody would ever write. What
//! was granted and not written is remembered in [`Unwritten`].
//!
//! A cancel does not wait for an allocation's answer, which may wait for these very pages. Its own answer is empty, as no
//! allocation's is. Which of the two was dealt with first is not known: where they name one chunk, "already sent" leaves a doubt.
//!
//! Nothing named `Pd...` is ever sent to it: a synchronous receiver would be disabled by it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::peers::{Make, Peer};
use super::places::{NoPlaces, Places, places};
use super::requests::{Request, Stage, Uid};
use super::unwritten::{Claim, Unwritten};
use super::{Port, SenderSession, Timer};
use crate::ids::{ChunkKey, Failure, FailureKind, GrantId, Pages, PeerAddress, PeerId, RequestId, Seq};
use crate::protocol::lmcache_terms;
use crate::wire::message::{AllocResponse, CancelNotif, InitResponse, MemRegRequest, MemRegResponse};
use crate::wire::{LmcacheMode, Message, descriptor_list};

/// What such a receiver is called where others have a name of their own.
pub(super) const STOCK_INSTANCE: &str = "LMCache";

/// How long a question may go unanswered before its connection is given up. A receiver that is full answers when its
/// engine has freed pages, and giving up has a price: see [`Unwritten::went_astray`].
const ANSWER_TIME_MAX: Duration = Duration::from_secs(300);

/// Most keys that are remembered for one receiver, unless its buffer has more pages than half of this.
const UNWRITTEN_MAX: usize = 65_536;

/// For how many lost receivers what they hold is remembered.
const LEFT_MAX: usize = 4096;

/// What is known of a receiver of LMCache's.
#[derive(Debug)]
pub(super) struct Stock {
    /// What it calls us.
    our_name: Vec<u8>,
    /// Of its engine: another process has other metadata.
    metadata: Vec<u8>,
    pages: Option<Pages>,
    /// Once it has shown it.
    mode: Option<LmcacheMode>,
    /// Requests that wait for their turn to ask for room, in the order of their arrival, and until when.
    waiting: VecDeque<(Uid, Instant)>,
    asked: Option<Asked>,
    /// What is not written any more, and was not said yet.
    cancels: VecDeque<(RequestId, Vec<ChunkKey>)>,
    /// What was said so of, and not answered yet.
    cancelled: Option<Cancelled>,
    unwritten: Unwritten,
    /// It is being given up: nothing more is said.
    ending: bool,
}

/// An allocation that is not answered yet.
#[derive(Debug)]
struct Asked {
    uid: Uid,
    seq: Seq,
    request: RequestId,
    keys: Vec<ChunkKey>,
    since: Instant,
}

/// A cancel that is not answered yet.
#[derive(Debug)]
struct Cancelled {
    keys: Vec<ChunkKey>,
    since: Instant,
}

/// What a lost receiver holds of ours, for when it is met again.
#[derive(Debug)]
pub(super) struct Left {
    metadata: Vec<u8>,
    pages: Pages,
    unwritten: Unwritten,
    since: Instant,
}

impl Stock {
    fn new(our_name: Vec<u8>, metadata: Vec<u8>) -> Self {
        Self {
            our_name,
            metadata,
            pages: None,
            mode: None,
            waiting: VecDeque::new(),
            asked: None,
            cancels: VecDeque::new(),
            cancelled: None,
            unwritten: Unwritten::default(),
            ending: false,
        }
    }

    /// Whether it has been asked something, or is about to be.
    pub(super) fn is_busy(&self) -> bool {
        self.silent_since().is_some() || !self.waiting.is_empty() || !self.cancels.is_empty()
    }

    /// Since when it has been asked something.
    fn silent_since(&self) -> Option<Instant> {
        let since = [self.asked.as_ref().map(|asked| asked.since), self.cancelled.as_ref().map(|cancel| cancel.since)];
        since.into_iter().flatten().min()
    }

    fn page_count(&self) -> u64 {
        self.pages.map_or(0, |pages| pages.count)
    }

    fn unwritten_max(&self) -> usize {
        UNWRITTEN_MAX.max((2 * self.page_count()) as usize)
    }
}

impl SenderSession {
    pub(super) fn is_stock(&self, peer: PeerId) -> bool {
        self.peers.get(&peer).is_some_and(|record| record.stock().is_some())
    }

    fn stock_mut(&mut self, peer: PeerId) -> Option<&mut Stock> {
        self.peers.get_mut(&peer).and_then(Peer::stock_mut)
    }

    /// A receiver of LMCache's has shown in which mode it runs, by an answer that is about to be handled.
    pub fn handle_lmcache_mode(&mut self, peer: PeerId, mode: LmcacheMode) {
        if let Some(stock) = self.stock_mut(peer) {
            stock.mode = Some(mode);
        }
    }

    /// Whether we can talk to a receiver that has answered as LMCache does.
    pub(super) fn meet_stock(&self, address: &PeerAddress, response: &InitResponse) -> Result<Make, Failure> {
        let refuse = |text: String| Err(Failure::new(FailureKind::HandshakeRefused, text));
        if self.settings.pages.is_none() {
            return refuse(format!(
                "receiver {address} is an LMCache receiver (no `pd` field in its handshake), which only nixl reaches, and \
                 this sender moves bytes with {}; set transfer_channel: nixl, or start pd-receiver there",
                self.settings.hello.engine
            ));
        }
        let groups = self.settings.chunk.token_bytes.len();
        if groups > 1 {
            let text = format!(
                "receiver {address} is an LMCache receiver, whose chunks are all of one shape, and this layout has {groups} \
                 groups of layers; start pd-receiver there"
            );
            return Err(Failure::new(FailureKind::LayoutMismatch, text));
        }
        lmcache_terms::dtype(&self.settings.chunk.dtype)?;
        let our_name = response.remote_agent_name.clone();
        if our_name != self.settings.agent_name.as_bytes() {
            return refuse(format!(
                "receiver {address} (LMCache) has met an agent whose name has {} bytes, and this sender's is {}; is it the \
                 answer to another sender",
                our_name.len(),
                self.settings.agent_name
            ));
        }
        Ok(Make::Stock(Box::new(Stock::new(our_name, response.remote_meta_bytes.clone()))))
    }

    /// What a receiver of LMCache's is told of our memory. Its handler has to be able to read it.
    pub(super) fn stock_registration(&self, peer: PeerId) -> Option<MemRegRequest> {
        let stock = self.peers.get(&peer)?.stock()?;
        let pages = self.settings.pages?;
        Some(MemRegRequest {
            remote_agent_name: stock.our_name.clone(),
            local_id: self.settings.hello.instance.clone(),
            local_xfer_dlist_bytes: descriptor_list::encode(descriptor_list::ANY_FLAVOUR, &pages),
            pd: None,
        })
    }

    /// Where the memory of a receiver of LMCache's is.
    pub(super) fn stock_pages(&mut self, peer: PeerId, response: &MemRegResponse) -> Result<Pages, Failure> {
        let slot_bytes = self.settings.chunk.slot_bytes;
        let Some(record) = self.peers.get_mut(&peer) else {
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
        let left = self.left.remove(&address);
        if let Some(stock) = record.stock_mut() {
            stock.pages = Some(pages);
            // Another process at the same address knows no key of ours.
            if let Some(left) = left.filter(|left| left.pages == pages && left.metadata == stock.metadata) {
                stock.unwritten = left.unwritten;
            }
        }
        Ok(pages)
    }

    /// A request wants slots of a receiver of LMCache's.
    pub(super) fn queue_allocation(&mut self, now: Instant, peer: PeerId, uid: Uid) {
        let Some(request) = self.requests.get(&uid) else { return };
        let Stage::Peer { wait, .. } = request.stage else { return };
        if let Some(failure) = request.keys.iter().find_map(|key| lmcache_terms::check_key(key).err()) {
            return self.fail(uid, failure);
        }
        let until = now + wait;
        self.timers.set(Timer::Allocation(uid), until);
        if let Some(stock) = self.stock_mut(peer) {
            stock.waiting.push_back((uid, until));
        }
        self.ask_next(now, peer);
    }

    /// Says what can be said, and asks for the room that has been waited for longest, if none is asked for already.
    fn ask_next(&mut self, now: Instant, peer: PeerId) {
        let Some(stock) = self.stock_mut(peer).filter(|stock| !stock.ending) else { return };
        if stock.cancelled.is_none()
            && let Some((req_id, keys)) = stock.cancels.pop_front()
        {
            keys.iter().for_each(|key| stock.unwritten.give_back(key));
            stock.cancelled = Some(Cancelled { keys: keys.clone(), since: now });
            self.timers.set(Timer::Answer(peer), now + ANSWER_TIME_MAX);
            let cancel = CancelNotif { req_id, keys, pd: None };
            self.send(peer, Port::Alloc, Message::CancelNotif(cancel));
        }
        while let Some(stock) = self.stock_mut(peer).filter(|stock| !stock.ending && stock.asked.is_none()) {
            let Some(&(uid, until)) = stock.waiting.front() else { return };
            // What is being given back is not asked for before that has been heard.
            let cancelled = self.peers.get(&peer).and_then(Peer::stock).and_then(|stock| stock.cancelled.as_ref());
            let names = |key: &ChunkKey| cancelled.is_some_and(|cancel| cancel.keys.contains(key));
            if self.requests.get(&uid).is_some_and(|request| request.peer == peer && request.keys.iter().any(names)) {
                return;
            }
            if let Some(stock) = self.stock_mut(peer) {
                stock.waiting.pop_front();
            }
            self.ask_for_room(now, peer, uid, until);
        }
    }

    fn ask_for_room(&mut self, now: Instant, peer: PeerId, uid: Uid, until: Instant) {
        let seq = Seq(self.fresh());
        let Ok(dtype) = lmcache_terms::dtype(&self.settings.chunk.dtype) else { return };
        // It may have ended while it waited.
        let Some(request) = self.requests.get_mut(&uid).filter(|request| request.peer == peer) else { return };
        let Stage::Peer { open_id, wait } = request.stage else { return };
        let (id, keys) = (request.id.clone(), request.keys.clone());
        let Some(stock) = self.peers.get_mut(&peer).and_then(Peer::stock_mut) else { return };
        if stock.unwritten.len() + keys.len() > stock.unwritten_max() {
            let text = format!(
                "receiver {} (LMCache) holds {} chunks of this sender that were never written, and takes no word that they \
                 are not needed; restart it",
                request.address,
                stock.unwritten.len()
            );
            return self.fail(uid, Failure::new(FailureKind::Limit, text));
        }
        request.stage = Stage::Allocating { open_id, seq, wait };
        stock.asked = Some(Asked { uid, seq, request: id, keys, since: now });
        let mut message = request.alloc_message(&self.settings.chunk);
        message.dtype = dtype;
        // Its turn came late, perhaps, but the receiver is not slower for that.
        let until = until + self.settings.commit_timeout;
        self.timers.set(Timer::Allocation(uid), until);
        self.timers.set(Timer::Answer(peer), until.max(now + ANSWER_TIME_MAX));
        self.send(peer, Port::Alloc, Message::AllocRequest(message));
    }

    /// Why a request has waited for its slots in vain, or none when its receiver is ours.
    pub(super) fn stock_allocation_timed_out(&self, uid: Uid) -> Option<Failure> {
        let request = self.requests.get(&uid)?;
        let stock = self.peers.get(&request.peer)?.stock()?;
        let address = &request.address;
        let since = stock.silent_since()?;
        let silent_ms = self.now.saturating_duration_since(since).as_millis();
        let text = match request.stage {
            Stage::Allocating { .. } => format!(
                "receiver {address} (LMCache) has not answered the allocation within {silent_ms} ms; one that is full \
                 answers when its engine has freed pages (pd_allocation_timeout_sec, pd_commit_timeout_sec)"
            ),
            Stage::Peer { .. } => format!(
                "receiver {address} (LMCache) is asked one thing at a time, and has not answered another request for \
                 {silent_ms} ms; one that is full answers when its engine has freed pages (pd_allocation_timeout_sec)"
            ),
            _ => return None,
        };
        Some(Failure::new(FailureKind::Deadline, text))
    }

    /// An answer, to whatever was asked.
    pub(super) fn on_stock_answer(&mut self, now: Instant, peer: PeerId, response: &AllocResponse) {
        let empty = response.remote_indexes.is_empty() && response.already_sent_indexes.is_empty();
        let Some(stock) = self.stock_mut(peer) else { return };
        // An empty one answers the cancel. Another does so only where nothing else is asked, and says that it could not be
        // read: then what the receiver holds stays in doubt.
        let cancelled = stock.cancelled.take_if(|_| empty || stock.asked.is_none());
        let asked = if cancelled.is_none() { stock.asked.take() } else { None };
        if let Some(Cancelled { keys, .. }) = cancelled.as_ref().filter(|_| empty) {
            let asked = stock.asked.as_ref().map_or(&[][..], |asked| &asked.keys);
            keys.iter().filter(|key| !asked.contains(key)).for_each(|key| stock.unwritten.given_back(key));
        }
        if stock.silent_since().is_none() {
            self.timers.cancel(&Timer::Answer(peer));
        }
        match asked {
            Some(Asked { uid, seq, request, keys, .. }) => {
                self.on_stock_grant(now, peer, uid, seq, request, &keys, response);
            }
            None if cancelled.is_none() => self.note_unexpected(peer, "AllocResponse that answers nothing"),
            None => {}
        }
        self.ask_next(now, peer);
    }

    #[expect(clippy::too_many_arguments, reason = "a question and its answer")]
    fn on_stock_grant(
        &mut self,
        now: Instant,
        peer: PeerId,
        uid: Uid,
        seq: Seq,
        id: RequestId,
        keys: &[ChunkKey],
        response: &AllocResponse,
    ) {
        let waits = |request: &&Request| matches!(request.stage, Stage::Allocating { seq: asked, .. } if asked == seq);
        let waits = self.requests.get(&uid).filter(waits).is_some();
        let Some(record) = self.peers.get_mut(&peer) else { return };
        let address = record.address.clone();
        let Some(stock) = record.stock_mut() else { return };
        let Some(pages) = stock.pages else { return };
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
                return self.fail_if(waits, uid, Failure::new(FailureKind::NoSlots, text));
            }
            Err(NoPlaces::Malformed) => {
                stock.unwritten.went_astray(keys);
                let text = format!(
                    "receiver {address} (LMCache) answered {} chunks with {} pages and {} already sent; expected different \
                     pages below {}, one for each chunk that is not already sent",
                    keys.len(),
                    response.remote_indexes.len(),
                    response.already_sent_indexes.len(),
                    pages.count
                );
                return self.fail_if(waits, uid, Failure::new(FailureKind::Other, text));
            }
        };
        for (key, place) in keys.iter().zip(&places) {
            if let Some(page) = place {
                stock.unwritten.granted(key, *page);
            }
        }
        let remembered = self.settings.safeguards.unwritten_remembered;
        let mut doubtful = 0;
        let mut claim = |(key, place): (&ChunkKey, Option<u32>)| {
            place.or_else(|| match stock.unwritten.claimed(key) {
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
            self.fail_if(waits, uid, Failure::new(FailureKind::Other, text));
            return self.give_back(peer, id, keys.to_vec());
        }
        if !waits {
            return self.give_back(peer, id, keys.to_vec());
        }
        self.open_stock(now, uid, seq, &pages, &places);
    }

    fn fail_if(&mut self, waits: bool, uid: Uid, failure: Failure) {
        if waits {
            self.fail(uid, failure);
        }
    }

    /// A request has its pages: chunks can be staged and sent.
    fn open_stock(&mut self, now: Instant, uid: Uid, seq: Seq, pages: &Pages, places: &Places) {
        // Its receiver sets no time, so ours counts: pages that are never written are lost to a synchronous one.
        let write_until = now + self.settings.write_timeout;
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let Stage::Allocating { open_id, .. } = request.stage else { return };
        for (chunk, place) in request.chunks.iter_mut().zip(places) {
            chunk.remote = place.map(|page| u64::from(page) * pages.page_bytes);
        }
        let already_sent: Vec<u32> =
            (0u32..).zip(places).filter(|(_, place)| place.is_none()).map(|(index, _)| index).collect();
        // A name that nobody else hears.
        request.stage = Stage::Open { grant: GrantId(seq.0), write_until, last: false };
        self.opened(now, uid, open_id, write_until, already_sent);
    }

    /// Nothing of a request is written any more. Only an asynchronous receiver can be told; of a synchronous one the pages
    /// are remembered, for whoever sends the same chunks.
    pub(super) fn give_back(&mut self, peer: PeerId, request: RequestId, keys: Vec<ChunkKey>) {
        if let Some(stock) = self.stock_mut(peer).filter(|stock| stock.mode == Some(LmcacheMode::Async)) {
            stock.cancels.push_back((request, keys));
            self.ask_next(self.now, peer);
        }
    }

    /// Chunks are on their pages.
    pub(super) fn stock_written(&mut self, peer: PeerId, keys: &[ChunkKey]) {
        if let Some(stock) = self.stock_mut(peer) {
            keys.iter().for_each(|key| stock.unwritten.written(key));
        }
    }

    /// A question has gone unanswered for too long. Who waits behind it is asked about anew, over another connection.
    pub(super) fn answer_timed_out(&mut self, now: Instant, peer: PeerId) {
        let Some(record) = self.peers.get(&peer) else { return };
        let address = record.address.clone();
        let Some(since) = record.stock().and_then(Stock::silent_since) else { return };
        let text = format!(
            "receiver {address} (LMCache) has not answered for {} ms; it is met anew",
            now.saturating_duration_since(since).as_millis()
        );
        let mut again = Vec::new();
        for uid in self.requests_of(peer) {
            let Some(request) = self.requests.get_mut(&uid) else { continue };
            let Stage::Peer { open_id, wait } = request.stage else { continue };
            request.set_aside(now, open_id, wait);
            self.timers.cancel(&Timer::Allocation(uid));
            again.push(uid);
        }
        self.peer_failed(peer, Failure::new(FailureKind::PeerLost, text));
        self.take_up(now, &address, again);
    }

    /// A receiver of LMCache's is being given up: nothing more is said to it.
    pub(super) fn end_stock(&mut self, peer: PeerId) {
        if let Some(stock) = self.stock_mut(peer) {
            stock.ending = true;
            if let Some(Asked { keys, .. }) = stock.asked.take() {
                stock.unwritten.went_astray(&keys);
            }
            self.timers.cancel(&Timer::Answer(peer));
        }
    }

    /// A receiver of LMCache's is gone: remembers what it holds of ours.
    pub(super) fn leave_stock(&mut self, record: Peer) {
        let Make::Stock(stock) = record.make else { return };
        let Stock { metadata, pages: Some(pages), unwritten, .. } = *stock else { return };
        if unwritten.is_empty() {
            return;
        }
        if self.left.len() >= LEFT_MAX {
            // Most likely it is not there any more.
            let oldest = self.left.iter().min_by_key(|(_, left)| left.since).map(|(address, _)| address.clone());
            oldest.map(|address| self.left.remove(&address));
        }
        self.left.insert(record.address, Left { metadata, pages, unwritten, since: self.now });
    }
}
