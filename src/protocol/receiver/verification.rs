//! Commits whose chunks are summed before they are taken.

use std::time::Instant;

use super::requests::Stage;
use super::{ExpectedChunk, Note, Output, Port, ReceiverSession};
use crate::ids::{Checksum, ChecksumMode, Failure, FailureKind, GrantId, RequestId, Seq};
use crate::wire::Message;
use crate::wire::message::CommitAck;

impl<R: Clone + PartialEq> ReceiverSession<R> {
    /// Has the chunks of a commit summed, if its sender did. False: there is nothing to wait for.
    ///
    /// # Errors
    /// Why the commit cannot be taken as it is.
    pub(super) fn begin_verification(
        &mut self,
        from: &R,
        seq: Seq,
        id: &RequestId,
        checksums: &[Option<Checksum>],
    ) -> Result<bool, Failure> {
        let Some(request) = self.requests.get_mut(id) else { return Ok(false) };
        let Stage::Granted { grant, own, .. } = &request.stage else { return Ok(false) };
        // Said again while it is looked into: the answer goes to the latest.
        if request.verifying.is_some() {
            request.verifying = Some((from.clone(), seq));
            return Ok(true);
        }
        let summed = checksums.iter().flatten().count();
        if self.settings.checksum == ChecksumMode::Full && summed < own.len() {
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
        let expected = |(&(index, slot), checksum): (&(u32, _), &Option<Checksum>)| {
            let range = self.slots.range(slot)?;
            let (offset_bytes, len_bytes) = (range.start, range.len_bytes);
            Some(ExpectedChunk { index, offset_bytes, len_bytes, checksum: (*checksum)? })
        };
        let chunks = own.iter().zip(checksums).filter_map(expected).collect();
        let grant = *grant;
        request.verifying = Some((from.clone(), seq));
        self.outputs.push_back(Output::Verify { request: id.clone(), grant, chunks });
        Ok(true)
    }

    /// The chunks of a commit were summed; those at `corrupted` are not as they were sent.
    pub fn handle_verified(&mut self, now: Instant, id: &RequestId, grant: GrantId, corrupted: &[u32]) {
        let Some(request) = self.requests.get_mut(id) else { return };
        // It may have ended meanwhile, and may have been sent again.
        if !matches!(request.stage, Stage::Granted { grant: current, .. } if current == grant) {
            return;
        }
        let Some((to, seq)) = request.verifying.take() else { return };
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
            None => self.make_ready(now, id),
            Some(failure) => {
                let instance = request.instance.clone();
                self.counts.chunks_corrupted += corrupted.len() as u64;
                self.note(Note::Corrupted { request: id.clone(), instance, chunks: corrupted.len() });
                // Its sender learns it from the answer to its commit.
                self.end(now, id, failure.clone(), false);
            }
        }
        let ack = CommitAck { seq, req_id: id.clone(), refusal };
        self.send(to, Port::Alloc, Message::PdCommitAck(ack));
        self.admit(now);
    }
}
