//! Sending: parts of staged slots become copies, copies become written chunks.

use std::collections::BTreeMap;

use super::coverage::Coverage;
use super::receivers::Receiver;
use super::requests::{OutgoingStage, WRITE_DEADLINE_PASSED};
use super::uid::Uid;
use super::{Outgoing, Sending};
use crate::ids::{
    ByteCopy, Checksum, ClientId, Failure, FailureKind, IpcHandle, PeerId, ReceiverAddress, RequestId, Seq, SlotPart,
    TransferId, truncate,
};
use crate::node::Answer;
use crate::node::Output;
use crate::node::core::Core;

/// Copies that the engine has not finished.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) uid: Uid,
    pub(super) peer: PeerId,
    /// None of what is parked.
    pub(super) address: Option<ReceiverAddress>,
    /// The receiver's name for itself.
    pub(super) instance: String,
    parts: Vec<PostedPart>,
    /// It is not posted at once: not before an event of its client's process has been passed, or not before it is summed.
    delayed: bool,
}

/// What an engine writes of a chunk.
#[derive(Debug, Clone, Copy)]
struct PostedPart {
    chunk: u32,
    /// From the start of the chunk.
    offset_bytes: u64,
    len_bytes: u64,
    summed: bool,
}

/// A part that was checked.
pub(super) struct Checked {
    pub(super) chunk: u32,
    pub(super) offset_bytes: u64,
    pub(super) copy: ByteCopy,
}

fn posted_parts(checked: &[Checked], is_summed: impl Fn(u32) -> bool) -> Vec<PostedPart> {
    let posted = |part: &Checked| PostedPart {
        chunk: part.chunk,
        offset_bytes: part.offset_bytes,
        len_bytes: part.copy.len_bytes,
        summed: is_summed(part.chunk),
    };
    checked.iter().map(posted).collect()
}

impl<R: Clone> Outgoing<R> {
    /// A client says that these parts of its staged slots are final, and perhaps that they are the last.
    pub(in crate::node) fn handle_send(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        request: &RequestId,
        sending: Sending<'_>,
    ) {
        let Sending { parts, last, after } = sending;
        let checked = self.find_request(client, request).and_then(|uid| {
            let (copies, coverage) = self.check_send(core, uid, request, parts, last)?;
            Ok((uid, copies, coverage))
        });
        let (uid, checked, coverage) = match checked {
            Ok(checked) => checked,
            Err(failure) => return core.refuse(client, id, failure, None),
        };
        let Some(record) = self.requests.get_mut(&uid) else { return };
        // A process that was paused may learn of its deadline here first: nothing is posted after it.
        if matches!(record.stage, OutgoingStage::Open { write_until, .. } if core.now >= write_until) {
            let failure = Failure::new(FailureKind::Deadline, WRITE_DEADLINE_PASSED);
            let peer = record.receiver();
            core.refuse(client, id, failure.clone(), Some(peer));
            return self.fail(core, uid, failure);
        }
        for (chunk, queued) in coverage {
            record.chunks[chunk as usize].queued = queued;
        }
        if last {
            record.since = core.now;
            if let OutgoingStage::Open { last, .. } | OutgoingStage::Parking { last, .. } = &mut record.stage {
                *last = true;
            }
        }
        if checked.is_empty() {
            core.answer(client, id, Answer::Accepted);
            return self.commit_if_written(core, uid);
        }
        if record.is_parking() {
            core.answer(client, id, Answer::Accepted);
            return self.park(core, uid, checked, after);
        }
        let posted = self.post(core, uid, checked, after);
        // After the post, so that the engine is at work before the client wakes up.
        match posted {
            Ok(()) => core.answer(client, id, Answer::Accepted),
            Err(failure) => {
                core.refuse(client, id, failure.clone(), None);
                self.fail(core, uid, failure);
            }
        }
    }

    /// Lets the engine write these parts of a request to its receiver.
    pub(super) fn post(
        &mut self,
        core: &mut Core<R>,
        uid: Uid,
        checked: Vec<Checked>,
        after: Option<IpcHandle>,
    ) -> Result<(), Failure> {
        let Some(record) = self.requests.get_mut(&uid) else { return Ok(()) };
        let (peer, address) = (record.peer, record.address.clone());
        let connection = self.receivers.get(&peer).and_then(Receiver::connection);
        let (Some(connection), Some(address)) = (connection, address) else {
            // A request whose peer is gone has ended, so this cannot be; if it is, it must not hang.
            let text = format!("{} is open to {}, which is not connected", record.id, record.receiver());
            return Err(Failure::new(FailureKind::Internal, text));
        };
        record.in_flight += 1;
        let checksum = core.settings.checksum;
        let parts = posted_parts(&checked, |chunk| checksum.covers(uid, chunk));
        let summed: Vec<u32> = (0u32..).zip(&parts).filter(|(_, part)| part.summed).map(|(at, _)| at).collect();
        let delayed = after.is_some() || !summed.is_empty();
        let instance = self.receivers.get(&peer).map(|peer| peer.instance.clone()).unwrap_or_default();
        let (transfer, address) = (TransferId(core.fresh()), Some(address));
        self.transfers.insert(transfer, Transfer { uid, peer, address, instance, parts, delayed });
        let copies = checked.into_iter().map(|part| part.copy).collect();
        core.outputs.push_back(Output::Post { transfer, connection, copies, summed, after });
        Ok(())
    }

    /// These parts of a request stay here. They are final now, or once an event has been passed.
    fn park(&mut self, core: &mut Core<R>, uid: Uid, checked: Vec<Checked>, after: Option<IpcHandle>) {
        let Some(record) = self.requests.get_mut(&uid) else { return };
        record.in_flight += 1;
        let (transfer, peer) = (TransferId(core.fresh()), record.peer);
        let (parts, instance) = (posted_parts(&checked, |_| false), String::new());
        let delayed = after.is_some();
        self.transfers.insert(transfer, Transfer { uid, peer, address: None, instance, parts, delayed });
        match after {
            Some(after) => core.outputs.push_back(Output::Await { transfer, after }),
            None => self.handle_transfer_done(core, transfer, Ok(Vec::new())),
        }
    }

    /// The engine has written a transfer, or has given it up. The checksums are those that were asked for, in that order.
    ///
    /// A failure of kind [`FailureKind::PeerLost`] is one of the connection: every request to that receiver fails with it,
    /// and the next one connects to the receiver again.
    pub(in crate::node) fn handle_transfer_done(
        &mut self,
        core: &mut Core<R>,
        transfer: TransferId,
        result: Result<Vec<Checksum>, Failure>,
    ) {
        let Some(Transfer { uid, peer, address, parts, .. }) = self.transfers.remove(&transfer) else {
            return;
        };
        let mut connection_lost = None;
        let (mut written, mut published) = (Vec::new(), Vec::new());
        if let Some(request) = self.requests.get_mut(&uid) {
            request.in_flight -= 1;
            let closing = matches!(request.stage, OutgoingStage::Closing { .. });
            match result {
                Ok(sums) if !closing => {
                    let mut sums = sums.into_iter();
                    for PostedPart { chunk: index, offset_bytes, len_bytes, summed } in parts {
                        let chunk = &mut request.chunks[index as usize];
                        if summed && let Some(sum) = sums.next() {
                            chunk.sums.insert(offset_bytes, (len_bytes, sum));
                        }
                        chunk.done_bytes += len_bytes;
                        request.bytes += len_bytes;
                        if chunk.done_bytes == chunk.len_bytes
                            && let Some(slot) = chunk.local.take()
                        {
                            request.staged.remove(&slot);
                            let key = request.keys[index as usize].clone();
                            if request.is_parking() {
                                let group = request.group_of(index as usize);
                                core.slots.publish(slot, key.clone(), group);
                                request.parked.push(slot);
                                published.push((key, slot));
                            } else if request.sends_parked() {
                                core.let_go_sent(slot);
                                written.push(key);
                            } else {
                                core.slots.unstage(slot);
                                written.push(key);
                            }
                        }
                    }
                    self.chunks_written(peer, &written);
                    self.on_published(core, uid, &published);
                    self.commit_if_written(core, uid);
                }
                Ok(_) => {}
                Err(failure) if failure.kind == FailureKind::PeerLost => connection_lost = Some(failure),
                Err(failure) => self.fail(core, uid, failure),
            }
        }
        if let Some(Failure { kind, text }) = connection_lost {
            let name = self.receivers.get(&peer).map(Receiver::name).unwrap_or_default();
            let address = address.as_ref().map(ReceiverAddress::to_string).unwrap_or_default();
            let text = format!("receiver {address} ({}): {text}", truncate(&name));
            self.peer_failed(core, peer, Failure::new(kind, text));
        }
        self.finish_closing(core, uid);
        if let Some(address) = &address {
            self.drained_at(core, address);
        }
        self.serve_staging(core);
    }

    /// What of a request may not have been posted yet is not to be written any more.
    pub(super) fn abandon_delayed(&mut self, core: &mut Core<R>, uid: Uid, client_gone: bool) {
        let delayed = self.transfers.iter().filter(|(_, transfer)| transfer.uid == uid && transfer.delayed);
        let abandoned: Vec<TransferId> = delayed.map(|(&transfer, _)| transfer).collect();
        core.outputs.extend(abandoned.into_iter().map(|transfer| Output::Abandon { transfer, client_gone }));
    }

    pub(super) fn commit_if_written(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(request) = self.requests.get_mut(&uid).filter(|request| request.in_flight == 0) else { return };
        if matches!(request.stage, OutgoingStage::Parking { last: true, .. }) {
            return self.finish_parked(core, uid);
        }
        if matches!(request.stage, OutgoingStage::Open { last: true, .. }) {
            request.phases.transfer = core.now.saturating_duration_since(request.since);
            request.since = core.now;
            let peer = request.peer;
            self.all_written(core, peer, uid);
        }
    }

    /// Checks everything before anything changes: the copies to post, and what they leave covered.
    fn check_send(
        &self,
        core: &Core<R>,
        uid: Uid,
        name: &RequestId,
        parts: &[SlotPart],
        last: bool,
    ) -> Result<(Vec<Checked>, BTreeMap<u32, Coverage>), Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        let Some(request) = self.requests.get(&uid) else {
            return bad(format!("{name} has ended"));
        };
        if !request.takes_sends() {
            return bad(format!("{name} takes no more sends: it is not opened yet, or its last send was given"));
        }
        if parts.is_empty() && !last {
            return bad(format!("a send for {name} has no parts and is not the last"));
        }
        let mut checked = Vec::with_capacity(parts.len());
        let mut coverage: BTreeMap<u32, Coverage> = BTreeMap::new();
        for part in parts {
            let Some(&chunk) = request.staged.get(&part.slot) else {
                let text = format!("slot {} is not staged for {name}; send slots from its own `staged`", part.slot);
                return Err(Failure::new(FailureKind::Unknown, text));
            };
            let record = &request.chunks[chunk as usize];
            let Some(remote) = record.remote else {
                return bad(format!("chunk {chunk} of {name} is at the receiver already"));
            };
            let len_bytes = part.len_bytes.unwrap_or(record.len_bytes.saturating_sub(part.offset_bytes));
            let end = part.offset_bytes.checked_add(len_bytes);
            if len_bytes == 0 || end.is_none_or(|end| end > record.len_bytes) {
                return bad(format!(
                    "{len_bytes} bytes at {} of chunk {chunk} of {name}; the chunk has {} bytes",
                    part.offset_bytes, record.len_bytes
                ));
            }
            let queued = coverage.entry(chunk).or_insert_with(|| record.queued.clone());
            if !queued.insert(part.offset_bytes, len_bytes) {
                return bad(format!(
                    "{len_bytes} bytes at {} of chunk {chunk} of {name} overlap what was sent before",
                    part.offset_bytes
                ));
            }
            let Some(local) = core.slots.range(part.slot) else {
                return bad(format!("slot {} is free", part.slot));
            };
            let copy = ByteCopy {
                local_offset: local.start + part.offset_bytes,
                remote_offset: remote + part.offset_bytes,
                len_bytes,
            };
            checked.push(Checked { chunk, offset_bytes: part.offset_bytes, copy });
        }
        if last {
            for (index, record) in (0u32..).zip(&request.chunks) {
                let sent = coverage.get(&index).unwrap_or(&record.queued).len_bytes();
                if record.remote.is_some() && sent != record.len_bytes {
                    return bad(format!(
                        "the last send for {name} leaves {} of {} bytes of chunk {index} unsent",
                        record.len_bytes - sent,
                        record.len_bytes
                    ));
                }
            }
        }
        Ok((checked, coverage))
    }
}
