//! Commits whose chunks are summed before they are taken.

use std::time::Instant;

use super::request::{IncomingStage, Verification};
use super::{ExpectedChunk, Incoming, IncomingNote, IncomingTimer, Port};
use crate::ids::{ChecksumMode, Failure, FailureKind, GrantId, RequestId};
use crate::node::Output;
use crate::node::core::Core;
use crate::node::output::To;
use crate::wire::Message;
use crate::wire::message::{Commit, CommitAck, Verifying};

impl<R: Clone + PartialEq> Incoming<R> {
    /// Has the chunks of a commit summed, if its sender did. False: there is nothing to wait for.
    ///
    /// # Errors
    /// Why the commit cannot be taken as it is.
    pub(super) fn begin_verification(
        &mut self,
        core: &mut Core<R>,
        from: &R,
        commit: &Commit,
    ) -> Result<bool, Failure> {
        let Commit { seq, req_id: id, checksums, .. } = commit;
        let Some(request) = self.requests.get_mut(id) else { return Ok(false) };
        let IncomingStage::Granted { grant, own, .. } = &request.stage else { return Ok(false) };
        // Said again while it is looked into: the answer goes to the latest.
        if let Some(verification) = &mut request.verifying {
            (verification.to, verification.seq) = (from.clone(), *seq);
            let since = verification.since;
            self.tell_verifying(core, from, commit, since);
            return Ok(true);
        }
        let summed = checksums.iter().flatten().count();
        if core.settings.checksum == ChecksumMode::Full && summed < own.len() {
            let text = format!(
                "{id} comes with checksums of {summed} of its {} chunks, and this receiver wants all (pd_checksum: full); set \
                 the same at the sender",
                own.len()
            );
            return Err(Failure::new(FailureKind::HandshakeRefused, text));
        }
        if summed == 0 {
            return Ok(false);
        }
        if checksums.len() != own.len() {
            let text = format!("{id} comes with {} checksums for {} chunks", checksums.len(), own.len());
            return Err(Failure::new(FailureKind::BadRequest, text));
        }
        let expected = |(&(index, slot), checksum): (&(u32, _), &Option<_>)| {
            let range = core.slots.range(slot)?;
            let (offset_bytes, len_bytes) = (range.start, range.len_bytes);
            Some(ExpectedChunk { index, offset_bytes, len_bytes, checksum: (*checksum)? })
        };
        let chunks = own.iter().zip(checksums).filter_map(expected).collect();
        let grant = *grant;
        request.verifying = Some(Verification { to: from.clone(), seq: *seq, since: core.now });
        // Everything is written: what it takes from here on is our time, and not its sender's.
        core.timers.unset(IncomingTimer::Write(id.clone()));
        core.outputs.push_back(Output::Verify { request: id.clone(), grant, chunks });
        Ok(true)
    }

    /// Asks a sender for patience, if it is worth it: a commit is waited for as long as checksums get on.
    fn tell_verifying(&mut self, core: &mut Core<R>, to: &R, commit: &Commit, since: Instant) {
        let got_on_at = self.summed_at.map_or(since, |at| at.max(since));
        let gets_on = core.now.saturating_duration_since(got_on_at) < core.settings.peer_timeout;
        if gets_on && self.senders.get(&commit.instance).is_some_and(|peer| peer.waits_for_verifying) {
            let verifying = Verifying { seq: commit.seq, req_id: commit.req_id.clone() };
            core.send(To::Route(to.clone()), Port::Alloc, Message::PdVerifying(verifying));
        }
    }

    /// Checksums are being summed.
    pub(in crate::node) fn handle_verifying(&mut self, now: Instant) {
        self.summed_at = Some(now);
    }

    /// The chunks of a commit were summed; those at `corrupted` are not as they were sent.
    pub(in crate::node) fn handle_verified(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        grant: GrantId,
        corrupted: &[u32],
    ) {
        self.handle_verifying(core.now);
        let Some(request) = self.requests.get_mut(id) else { return };
        // It may have ended meanwhile, and may have been sent again.
        if !matches!(request.stage, IncomingStage::Granted { grant: current, .. } if current == grant) {
            return;
        }
        let Some(Verification { to, seq, .. }) = request.verifying.take() else { return };
        let bad = corrupted.first().and_then(|&index| Some((index, request.keys.get(index as usize)?.clone())));
        let refusal = bad.map(|(index, key)| {
            let others = corrupted.len() - 1;
            let more = if others > 0 { format!(" and {others} others") } else { String::new() };
            let text = format!(
                "chunk {index} of {id} ({key}){more} is not as it was sent: its checksum differs; send the request again"
            );
            Failure::new(FailureKind::Corrupted, text)
        });
        match &refusal {
            None => self.make_ready(core, id),
            Some(failure) => {
                let instance = request.instance.clone();
                self.counts.chunks_corrupted += corrupted.len() as u64;
                core.note(IncomingNote::Corrupted { request: id.clone(), instance, chunks: corrupted.len() });
                // Its sender learns it from the answer to its commit.
                self.end(core, id, failure.clone(), false);
            }
        }
        let ack = CommitAck { seq, req_id: id.clone(), refusal };
        core.send(To::Route(to), Port::Alloc, Message::PdCommitAck(ack));
        self.admit(core);
    }
}
