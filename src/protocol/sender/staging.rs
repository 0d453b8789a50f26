//! Local slots for connectors to fill: all or nothing, in the order of asking, with a deadline.

use std::time::{Duration, Instant};

use super::requests::{Stage, Uid};
use super::{Answer, SenderSession, StagedSlot, Timer};
use crate::ids::{ClientId, Failure, FailureKind, RequestId, Seq};

/// A client that waits for local slots.
#[derive(Debug)]
pub(super) struct Staging {
    client: ClientId,
    id: Seq,
    uid: Uid,
    chunks: Vec<u32>,
    wait: Duration,
}

impl SenderSession {
    /// A client wants slots for these chunks of an opened request.
    pub fn handle_stage(
        &mut self,
        now: Instant,
        client: ClientId,
        id: Seq,
        request: &RequestId,
        chunks: Vec<u32>,
        wait: Option<Duration>,
    ) {
        let checked =
            self.find_request(client, request).and_then(|uid| self.check_stage(uid, request, &chunks).map(|()| uid));
        let uid = match checked {
            Ok(uid) => uid,
            Err(failure) => return self.refuse(client, id, failure, None),
        };
        if self.staging.iter().any(|staging| (staging.client, staging.id) == (client, id)) {
            let failure = Failure::new(FailureKind::BadRequest, format!("id {id} waits already; use each id once"));
            return self.refuse(client, id, failure, None);
        }
        let wait = wait.unwrap_or(self.settings.allocation_timeout);
        self.timers.set(Timer::Stage(client, id), now + wait);
        self.staging.push_back(Staging { client, id, uid, chunks, wait });
        self.serve_staging();
    }

    /// Gives slots to whoever waits for them, the first first.
    pub(super) fn serve_staging(&mut self) {
        while let Some(first) = self.staging.front() {
            let Ok(slots) = self.slots.take(first.chunks.len() as u32) else { return };
            let Some(staging) = self.staging.pop_front() else { return };
            self.timers.cancel(&Timer::Stage(staging.client, staging.id));
            let offsets: Vec<u64> = slots.iter().map(|&slot| self.slots.offset_bytes(slot)).collect();
            let Some(request) = self.requests.get_mut(&staging.uid) else {
                slots.into_iter().for_each(|slot| self.slots.give_back(slot));
                continue;
            };
            let mut staged = Vec::with_capacity(slots.len());
            for ((&chunk, slot), offset_bytes) in staging.chunks.iter().zip(slots).zip(offsets) {
                let record = &mut request.chunks[chunk as usize];
                record.local = Some(slot);
                request.staged.insert(slot, chunk);
                staged.push(StagedSlot { chunk, slot, offset_bytes, len_bytes: record.len_bytes });
            }
            self.answer(staging.client, staging.id, Answer::Staged { slots: staged });
        }
    }

    pub(super) fn staging_timed_out(&mut self, client: ClientId, id: Seq) {
        let Some(at) = self.staging.iter().position(|staging| (staging.client, staging.id) == (client, id)) else {
            return;
        };
        let Some(staging) = self.staging.remove(at) else { return };
        let text = format!(
            "sender has {} of {} slots free, {} are wanted; waited {} ms (pd_allocation_timeout_sec)",
            self.slots.free_count(),
            self.slots.slot_count(),
            staging.chunks.len(),
            staging.wait.as_millis()
        );
        self.refuse(client, id, Failure::new(FailureKind::NoSlots, text), None);
        self.serve_staging();
    }

    pub(super) fn staging_client_gone(&mut self, client: ClientId) {
        let Self { staging, timers, .. } = self;
        staging.retain(|waiting| {
            let keep = waiting.client != client;
            if !keep {
                timers.cancel(&Timer::Stage(waiting.client, waiting.id));
            }
            keep
        });
        self.serve_staging();
    }

    pub(super) fn staging_request_ended(&mut self, uid: Uid, failure: &Failure) {
        let ended: Vec<(ClientId, Seq)> = self
            .staging
            .iter()
            .filter(|staging| staging.uid == uid)
            .map(|staging| (staging.client, staging.id))
            .collect();
        self.staging.retain(|staging| staging.uid != uid);
        for (client, id) in ended {
            self.timers.cancel(&Timer::Stage(client, id));
            self.refuse(client, id, failure.clone(), None);
        }
    }

    fn check_stage(&self, uid: Uid, name: &RequestId, chunks: &[u32]) -> Result<(), Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        let Some(request) = self.requests.get(&uid) else {
            return bad(format!("{name} has ended"));
        };
        if !matches!(request.stage, Stage::Open { last: false, .. }) {
            return bad(format!("{name} is not open for staging: wait for `opened`, and stage before the last `send`"));
        }
        if chunks.is_empty() {
            return bad(format!("no chunks of {name} are named; name at least one"));
        }
        if chunks.len() > self.slots.slot_count() as usize {
            let text = format!(
                "{} slots are wanted at once, the sender's buffer has {}; stage and send in parts, or raise pd_buffer_size",
                chunks.len(),
                self.slots.slot_count()
            );
            return Err(Failure::new(FailureKind::TooLarge, text));
        }
        let mut seen = std::collections::BTreeSet::new();
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
        }
        Ok(())
    }
}
