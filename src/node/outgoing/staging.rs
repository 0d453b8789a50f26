//! Local slots for connectors to fill: all or nothing, in the order of asking, with a deadline.

use std::collections::VecDeque;
use std::time::Duration;

use super::requests::OutgoingRequest;
use super::uid::Uid;
use super::{Outgoing, OutgoingTimer};
use crate::ids::{ClientId, Failure, FailureKind, RequestId, Seq, SlotIndex, StagedSlot};
use crate::node::Answer;
use crate::node::core::Core;

/// A client that waits for local slots.
#[derive(Debug)]
pub(super) struct Staging {
    client: ClientId,
    id: Seq,
    uid: Uid,
    chunks: Vec<u32>,
    /// Length of each chunk.
    lens_bytes: Vec<u64>,
    wait: Duration,
}

impl<R: Clone> Outgoing<R> {
    /// A client wants slots for these chunks of an opened request.
    pub(in crate::node) fn handle_stage(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        request: &RequestId,
        chunks: Vec<u32>,
        wait: Option<Duration>,
    ) {
        let checked = self
            .find_request(client, request)
            .and_then(|uid| Ok((uid, self.check_stage(core, uid, request, &chunks)?)));
        let (uid, lens_bytes) = match checked {
            Ok(checked) => checked,
            Err(failure) => return core.refuse(client, id, failure, None),
        };
        if self.staging.iter().any(|staging| (staging.client, staging.id) == (client, id)) {
            let failure = Failure::new(FailureKind::BadRequest, format!("id {id} waits already; use each id once"));
            return core.refuse(client, id, failure, None);
        }
        self.wait_for_slots(
            core,
            Staging { client, id, uid, chunks, lens_bytes, wait: self.allocation_wait(core, wait) },
        );
    }

    /// A request that is to be parked waits for slots for these chunks.
    pub(super) fn queue_for_staging(
        &mut self,
        core: &mut Core<R>,
        (client, id): (ClientId, Seq),
        uid: Uid,
        chunks: Vec<u32>,
        wait: Option<Duration>,
    ) {
        let Some(request) = self.requests.get(&uid) else { return };
        let lens_bytes = chunks.iter().map(|&chunk| request.chunks[chunk as usize].len_bytes).collect();
        self.wait_for_slots(
            core,
            Staging { client, id, uid, chunks, lens_bytes, wait: self.allocation_wait(core, wait) },
        );
    }

    fn wait_for_slots(&mut self, core: &mut Core<R>, staging: Staging) {
        core.timers.set(OutgoingTimer::Stage(staging.client, staging.id), core.now + staging.wait);
        self.staging.push_back(staging);
        self.serve_staging(core);
    }

    /// Whether this is the wait of a request that is to be parked: it ends with it.
    fn parks(&self, uid: Uid) -> bool {
        self.requests.get(&uid).is_some_and(OutgoingRequest::is_parking)
    }

    /// Gives slots to whoever waits for them, in the order of asking. In a buffer that serves both halves, what is to be parked and
    /// what is to be sent have each a part of it, and a line.
    pub(in crate::node) fn serve_staging(&mut self, core: &mut Core<R>) {
        let mut lines = if core.slots.is_shared() { vec![Some(false), Some(true)] } else { vec![None] };
        while let Some(line) = lines.pop() {
            while let Some(at) =
                self.staging.iter().position(|staging| line.is_none_or(|line| line == self.parks(staging.uid)))
            {
                if !self.serve_waiting(core, at) {
                    core.ask_to_grow();
                    break;
                }
            }
        }
    }

    /// Gives slots to who waits at this place. False: there are too few.
    fn serve_waiting(&mut self, core: &mut Core<R>, at: usize) -> bool {
        let Some(Staging { uid, lens_bytes, .. }) = self.staging.get(at) else { return false };
        let to_park = self.parks(*uid);
        let staged = if to_park { core.slots.stage_to_park(lens_bytes) } else { core.slots.stage(lens_bytes) };
        let Ok(slots) = staged else { return false };
        let Some(staging) = self.staging.remove(at) else { return false };
        core.timers.unset(OutgoingTimer::Stage(staging.client, staging.id));
        if let Some(slots) = self.fill(core, staging.uid, &staging.chunks, slots) {
            if to_park {
                self.parking_opened(core, staging.uid, slots);
            } else {
                core.answer(staging.client, staging.id, Answer::Staged { slots });
            }
        }
        true
    }

    /// Slots for every chunk that the receiver granted, or none: whoever waits has the first right to what is free, and a
    /// client that is told of none waits its turn with `stage`.
    pub(super) fn stage_granted(&mut self, core: &mut Core<R>, uid: Uid) -> Vec<StagedSlot> {
        let Some(request) = self.requests.get(&uid).filter(|_| self.staging.is_empty()) else { return Vec::new() };
        let granted = (0u32..).zip(&request.chunks).filter(|(_, chunk)| chunk.remote.is_some());
        let (chunks, lens_bytes): (Vec<u32>, Vec<u64>) = granted.map(|(at, chunk)| (at, chunk.len_bytes)).unzip();
        if chunks.is_empty() {
            return Vec::new();
        }
        let taken = core.slots.stage(&lens_bytes).ok();
        taken.and_then(|slots| self.fill(core, uid, &chunks, slots)).unwrap_or_default()
    }

    /// Gives these slots to these chunks of a request; back, if there is no such request any more.
    fn fill(&mut self, core: &mut Core<R>, uid: Uid, chunks: &[u32], slots: Vec<SlotIndex>) -> Option<Vec<StagedSlot>> {
        let offsets: Vec<u64> =
            slots.iter().filter_map(|&slot| core.slots.range(slot)).map(|range| range.start).collect();
        let Some(request) = self.requests.get_mut(&uid) else {
            slots.into_iter().for_each(|slot| core.slots.unstage(slot));
            return None;
        };
        let mut staged = Vec::with_capacity(slots.len());
        for ((&chunk, slot), offset_bytes) in chunks.iter().zip(slots).zip(offsets) {
            let record = &mut request.chunks[chunk as usize];
            record.local = Some(slot);
            request.staged.insert(slot, chunk);
            staged.push(StagedSlot { chunk, slot, offset_bytes, len_bytes: record.len_bytes });
        }
        Some(staged)
    }

    pub(super) fn staging_timed_out(&mut self, core: &mut Core<R>, client: ClientId, id: Seq) {
        let Some(at) = self.staging.iter().position(|staging| (staging.client, staging.id) == (client, id)) else {
            return;
        };
        let Some(staging) = self.staging.remove(at) else { return };
        let slot_bytes = core.settings.chunk.slot_bytes;
        let free_bytes = core.slots.addresses().free_bytes();
        let text = format!(
            "sender has {} of {} slots free ({free_bytes} bytes), {} are wanted ({} bytes); waited {} ms (pd_allocation_timeout_sec){}",
            free_bytes / slot_bytes,
            core.slots.addresses().len_bytes() / slot_bytes,
            staging.chunks.len(),
            core.slots.asked_bytes(&staging.lens_bytes),
            staging.wait.as_millis(),
            core.no_room_note(),
        );
        let failure = Failure::new(FailureKind::NoSlots, text);
        if self.parks(staging.uid) {
            self.fail(core, staging.uid, failure);
        } else {
            core.refuse(client, id, failure, None);
        }
        self.serve_staging(core);
    }

    /// A step of the buffer's growth has failed: those who want more than there is now are told why.
    pub(super) fn refuse_staging_that_needs_growth(&mut self, core: &mut Core<R>) {
        let (most_bytes, share) = (core.slots.most_staged_bytes(core.slots.addresses().len_bytes()), core.share_note());
        let (refused, kept): (VecDeque<Staging>, _) =
            self.staging.drain(..).partition(|staging| core.slots.asked_bytes(&staging.lens_bytes) > most_bytes);
        self.staging = kept;
        for Staging { client, id, uid, lens_bytes, .. } in refused {
            core.timers.unset(OutgoingTimer::Stage(client, id));
            let (asked_bytes, note) = (core.slots.asked_bytes(&lens_bytes), core.growth.failure_note());
            let text = format!("{asked_bytes} bytes are wanted, the sender's buffer has {most_bytes}{share}{note}");
            let failure = Failure::new(FailureKind::NoSlots, text);
            if self.parks(uid) {
                self.fail(core, uid, failure);
            } else {
                core.refuse(client, id, failure, None);
            }
        }
    }

    pub(super) fn staging_client_gone(&mut self, core: &mut Core<R>, client: ClientId) {
        self.staging.retain(|waiting| {
            let keep = waiting.client != client;
            if !keep {
                core.timers.unset(OutgoingTimer::Stage(waiting.client, waiting.id));
            }
            keep
        });
        self.serve_staging(core);
    }

    /// `parks`: the request is answered by itself.
    pub(super) fn staging_request_ended(&mut self, core: &mut Core<R>, uid: Uid, failure: &Failure, parks: bool) {
        let ended: Vec<(ClientId, Seq)> = self
            .staging
            .iter()
            .filter(|staging| staging.uid == uid)
            .map(|staging| (staging.client, staging.id))
            .collect();
        self.staging.retain(|staging| staging.uid != uid);
        for (client, id) in ended {
            core.timers.unset(OutgoingTimer::Stage(client, id));
            if !parks {
                core.refuse(client, id, failure.clone(), None);
            }
        }
    }

    /// The lengths of the chunks to stage.
    fn check_stage(&self, core: &Core<R>, uid: Uid, name: &RequestId, chunks: &[u32]) -> Result<Vec<u64>, Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        let Some(request) = self.requests.get(&uid) else {
            return bad(format!("{name} has ended"));
        };
        if !request.takes_sends() {
            return bad(format!("{name} is not open for staging: wait for `opened`, and stage before the last `send`"));
        }
        if chunks.is_empty() {
            return bad(format!("no chunks of {name} are named; name at least one"));
        }
        let mut seen = std::collections::BTreeSet::new();
        let mut lens_bytes = Vec::with_capacity(chunks.len());
        for &chunk in chunks {
            let Some(record) = request.chunks.get(chunk as usize) else {
                return bad(format!("{name} has no chunk {chunk}; it has {}", request.chunks.len()));
            };
            if record.remote.is_none() {
                return bad(format!(
                    "chunk {chunk} of {name} is at the receiver already (`already_sent`); leave it out"
                ));
            }
            let waits = self.staging.iter().any(|staging| staging.uid == uid && staging.chunks.contains(&chunk));
            if record.local.is_some() || record.queued.len_bytes() > 0 || waits || !seen.insert(chunk) {
                return bad(format!("chunk {chunk} of {name} is staged already, or was sent"));
            }
            lens_bytes.push(record.len_bytes);
        }
        let (asked_bytes, most_bytes) =
            (core.slots.asked_bytes(&lens_bytes), core.slots.most_staged_bytes(core.growth.len_max_bytes()));
        if asked_bytes > most_bytes {
            let text = format!(
                "{} slots are wanted at once, {asked_bytes} bytes; the sender's buffer has {} slots, {most_bytes} bytes{}; stage and send in parts, or raise pd_buffer_size",
                chunks.len(),
                most_bytes / core.settings.chunk.slot_bytes,
                core.share_note(),
            );
            return Err(Failure::new(FailureKind::TooLarge, text));
        }
        Ok(lens_bytes)
    }
}
