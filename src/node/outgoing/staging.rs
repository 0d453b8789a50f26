//! Local slots for connectors to fill: all or nothing, in the order of asking, with a deadline.

use std::collections::VecDeque;
use std::time::Duration;

use super::requests::OutgoingStage;
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

impl<R> Outgoing<R> {
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
        let wait = self.allocation_wait(core, wait);
        core.timers.set(OutgoingTimer::Stage(client, id), core.now + wait);
        self.staging.push_back(Staging { client, id, uid, chunks, lens_bytes, wait });
        self.serve_staging(core);
    }

    /// Gives slots to whoever waits for them, in the order of asking.
    pub(in crate::node) fn serve_staging(&mut self, core: &mut Core<R>) {
        while let Some(first) = self.staging.front() {
            let Ok(slots) = core.slots.stage(&first.lens_bytes) else {
                core.ask_to_grow();
                return;
            };
            let Some(staging) = self.staging.pop_front() else { return };
            core.timers.cancel(OutgoingTimer::Stage(staging.client, staging.id));
            if let Some(slots) = self.fill(core, staging.uid, &staging.chunks, slots) {
                core.answer(staging.client, staging.id, Answer::Staged { slots });
            }
        }
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
        core.refuse(client, id, Failure::new(FailureKind::NoSlots, text), None);
        self.serve_staging(core);
    }

    /// A step of the buffer's growth has failed: those who want more than there is now are told why.
    pub(super) fn refuse_staging_that_needs_growth(&mut self, core: &mut Core<R>) {
        let (most_bytes, share) = (core.slots.most_staged_bytes(core.slots.addresses().len_bytes()), core.share_note());
        let (refused, kept): (VecDeque<Staging>, _) =
            self.staging.drain(..).partition(|staging| core.slots.asked_bytes(&staging.lens_bytes) > most_bytes);
        self.staging = kept;
        for Staging { client, id, lens_bytes, .. } in refused {
            core.timers.cancel(OutgoingTimer::Stage(client, id));
            let (asked_bytes, note) = (core.slots.asked_bytes(&lens_bytes), core.growth.failure_note());
            let text = format!("{asked_bytes} bytes are wanted, the sender's buffer has {most_bytes}{share}{note}");
            core.refuse(client, id, Failure::new(FailureKind::NoSlots, text), None);
        }
    }

    pub(super) fn staging_client_gone(&mut self, core: &mut Core<R>, client: ClientId) {
        self.staging.retain(|waiting| {
            let keep = waiting.client != client;
            if !keep {
                core.timers.cancel(OutgoingTimer::Stage(waiting.client, waiting.id));
            }
            keep
        });
        self.serve_staging(core);
    }

    pub(super) fn staging_request_ended(&mut self, core: &mut Core<R>, uid: Uid, failure: &Failure) {
        let ended: Vec<(ClientId, Seq)> = self
            .staging
            .iter()
            .filter(|staging| staging.uid == uid)
            .map(|staging| (staging.client, staging.id))
            .collect();
        self.staging.retain(|staging| staging.uid != uid);
        for (client, id) in ended {
            core.timers.cancel(OutgoingTimer::Stage(client, id));
            core.refuse(client, id, failure.clone(), None);
        }
    }

    /// The lengths of the chunks to stage.
    fn check_stage(&self, core: &Core<R>, uid: Uid, name: &RequestId, chunks: &[u32]) -> Result<Vec<u64>, Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        let Some(request) = self.requests.get(&uid) else {
            return bad(format!("{name} has ended"));
        };
        if !matches!(request.stage, OutgoingStage::Open { last: false, .. }) {
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
