//! The transfer engine of every sender: slow, failing, and writing on after it was told to forget.

use std::ops::Range;
use std::time::{Duration, Instant};

use pd_backend::ids::{ByteCopy, Checksum, ChunkKey, ConnectionId, RequestId, TransferId};
use pd_backend::wire::message::AllocRequest;
use rand::RngExt;

use crate::news::{News, Proc};
use crate::plan::LINGER;
use crate::process::{TOKEN_BYTES, TOKENS, sender_name};
use crate::world::World;

/// A receiver that a sender's engine was introduced to.
#[derive(Debug)]
pub struct Connection {
    pub receiver: Proc,
    /// How much of its buffer the engine was told of.
    pub told_len_bytes: u64,
    pub forgotten: bool,
}

/// A transfer that has not ended.
#[derive(Debug)]
pub struct Write {
    pub sender: Proc,
    pub receiver: Proc,
    transfer: TransferId,
    connection: ConnectionId,
    copies: Vec<ByteCopy>,
    landed: Vec<bool>,
    /// Its writer has died; what the network still holds of it arrives until then.
    last_words: Option<LastWords>,
}

#[derive(Debug)]
struct LastWords {
    until: Instant,
    /// Of each copy.
    bytes: Vec<Vec<u8>>,
}

impl Write {
    fn arrives(&self, now: Instant) -> bool {
        self.last_words.as_ref().is_none_or(|words| now <= words.until)
    }
}

/// What an allocation asked for: its chunks' keys and lengths.
#[derive(Debug, Clone)]
pub struct Asked {
    pub request: RequestId,
    pub chunks: Vec<(ChunkKey, u64)>,
}

impl Asked {
    pub fn of(request: &AllocRequest) -> Self {
        let groups = request.pd.as_ref().map(|pd| pd.groups.clone()).unwrap_or_default();
        let group = |index: usize| groups.get(index).map_or(0, |group| usize::from(group.0));
        let mut last_seen = [false; TOKEN_BYTES.len()];
        let mut chunks: Vec<(ChunkKey, u64)> = (0..request.keys.len())
            .rev()
            .map(|index| {
                let last = !std::mem::replace(&mut last_seen[group(index)], true);
                let tokens = if last { request.last_chunk_toks } else { u64::from(TOKENS) };
                (request.keys[index].clone(), TOKEN_BYTES[group(index)] * tokens)
            })
            .collect();
        chunks.reverse();
        let request = request.req_id.clone().unwrap();
        Self { request, chunks }
    }
}

fn remote(copy: &ByteCopy) -> Range<u64> {
    copy.remote_offset..copy.remote_offset + copy.len_bytes
}

fn local(copy: &ByteCopy) -> Range<usize> {
    copy.local_offset as usize..(copy.local_offset + copy.len_bytes) as usize
}

impl World {
    /// Writes to one receiver that have not landed yet, and whose they are.
    pub fn under_way(&self, receiver: Proc) -> Vec<(Range<u64>, String)> {
        let mut ranges = Vec::new();
        for write in self.writes.values().filter(|write| write.receiver == receiver && write.arrives(self.now)) {
            let left = write.copies.iter().zip(&write.landed).filter(|(_, landed)| !**landed);
            ranges.extend(left.map(|(copy, _)| (remote(copy), sender_name(write.sender))));
        }
        ranges
    }

    /// Sums what the receiver will check, as the bytes are now.
    pub fn sum(&mut self, at: Proc, transfer: TransferId, copies: &[ByteCopy], summed: &[u32]) {
        let sender = &mut self.senders[at.index];
        let sum = |&index: &u32| Checksum::of(&sender.memory[local(&copies[index as usize])]);
        let sums = summed.iter().map(sum).collect();
        sender.sums.insert(transfer, sums);
    }

    pub fn post(&mut self, at: Proc, transfer: TransferId, connection: ConnectionId, copies: Vec<ByteCopy>) {
        let soon = self.ms(1, 20);
        let Some(known) = self.senders[at.index].connections.get(&connection).filter(|known| !known.forgotten) else {
            return self.schedule(soon, News::Done(at, transfer, false));
        };
        let (receiver, told) = (known.receiver, known.told_len_bytes);
        for copy in &copies {
            if copy.remote_offset + copy.len_bytes > told {
                self.wrong(format!("{copy:?} is beyond the {told} bytes that were described"));
            }
            if self.receiver_lives(receiver) {
                let checked = self.receivers[receiver.index].truth.check_write(&sender_name(at), &remote(copy));
                self.check(checked);
            }
        }
        let (fails, slow) = (self.plan.transfer_fails, self.plan.transfer_slow);
        let fails = self.fault(fails);
        let pause = if self.fault(slow) { self.ms(0, 1200) } else { 0 };
        let id = self.fresh_id();
        // In any order, and when it fails only some of it.
        let landing = if fails { self.rng.random_range(0..=copies.len()) } else { copies.len() };
        for copy in 0..landing {
            let at_ms = self.ms(0, soon + pause + 1);
            self.schedule(at_ms, News::Land(id, copy));
        }
        self.schedule(soon + pause + 1, News::Land(id, if fails { usize::MAX } else { copies.len() }));
        let landed = vec![false; copies.len()];
        self.writes.insert(id, Write { sender: at, receiver, transfer, connection, copies, landed, last_words: None });
    }

    /// One copy of a write lands; one beyond the last is its end.
    pub fn land(&mut self, id: u64, copy: usize) {
        let now = self.now;
        let Some(write) = self.writes.get_mut(&id) else { return };
        if !write.arrives(now) {
            self.writes.remove(&id);
            return;
        }
        let (at, receiver) = (write.sender, write.receiver);
        let Some(bytes) = write.copies.get(copy).copied() else {
            let transfer = write.transfer;
            self.writes.remove(&id);
            // A write to a process that is gone is an error, if anybody notices.
            let good = copy != usize::MAX && (self.receiver_lives(receiver) || self.rng.random_bool(0.3));
            let after = self.ms(0, 3);
            return self.schedule(after, News::Done(at, transfer, good));
        };
        write.landed[copy] = true;
        if !self.receiver_lives(receiver) {
            return;
        }
        if self.senders[at.index].connections.get(&self.writes[&id].connection).is_some_and(|known| known.forgotten) {
            self.tally.landed_late += 1;
        }
        let range = remote(&bytes);
        let checked = self.receivers[receiver.index].truth.check_write(&sender_name(at), &range);
        self.check(checked);
        let to = range.start as usize..range.end as usize;
        let source = match &self.writes[&id].last_words {
            Some(words) => &words.bytes[copy],
            None => &self.senders[at.index].memory[local(&bytes)],
        };
        self.receivers[receiver.index].truth.memory[to].copy_from_slice(source);
    }

    /// A writer dies. With sockets between it and the receiver, some of what it had posted arrives all the same.
    pub fn writes_die(&mut self, at: Proc) {
        let until = self.now + Duration::from_millis(self.ms(0, LINGER.as_millis() as u64));
        let lingers = self.plan.lingers;
        self.writes.retain(|_, write| write.sender != at || lingers);
        let memory = &self.senders[at.index].memory;
        for write in self.writes.values_mut().filter(|write| write.sender == at) {
            let bytes = write.copies.iter().map(|copy| memory[local(copy)].to_vec()).collect();
            write.last_words = Some(LastWords { until, bytes });
        }
    }

    /// The engine is told to forget a receiver: it stops what it writes there, or does not.
    pub fn forget(&mut self, at: Proc, connection: ConnectionId) {
        if let Some(known) = self.senders[at.index].connections.get_mut(&connection) {
            known.forgotten = true;
        }
        let lands = self.plan.forgotten_lands;
        if self.fault(lands) {
            return;
        }
        let stopped: Vec<u64> = self
            .writes
            .iter()
            .filter(|(_, write)| write.sender == at && write.connection == connection)
            .map(|(&id, _)| id)
            .collect();
        for id in stopped {
            let Some(write) = self.writes.remove(&id) else { continue };
            let after = self.ms(0, 10);
            self.schedule(after, News::Done(at, write.transfer, false));
        }
    }
}
