//! The transfer engine of every sender: slow, failing, and writing on after it was told to forget.

use std::ops::Range;
use std::time::{Duration, Instant};

use pd_backend::ids::{ByteCopy, Checksum, ChunkKey, ConnectionId, Failure, FailureKind, RequestId, TransferId};
use pd_backend::wire::message::AllocRequest;
use rand::RngExt;

use crate::events::{Proc, Target, WorldEvent};
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
    /// Of a sender of ours.
    transfer: Option<(TransferId, ConnectionId)>,
    copies: Vec<ByteCopy>,
    landed: Vec<bool>,
    /// Of each copy, where the writer's memory is not looked at: it has died, or is LMCache's.
    bytes: Option<Vec<Vec<u8>>>,
    /// Its writer has died; what the network still holds of it arrives until then.
    until: Option<Instant>,
}

impl Write {
    fn arrives(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now <= until)
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

    /// Bytes of a daemon that are in use, and by whom: a write from elsewhere, a transfer from here, or a connector.
    pub fn in_use(&self, target: Target) -> Vec<(Range<u64>, String)> {
        let at = target.at();
        let mut used = if self.plan.receives(target) { self.under_way(at) } else { Vec::new() };
        if self.plan.sends(target) {
            for write in self.writes.values().filter(|write| write.sender == at && write.bytes.is_none()) {
                let left = write.copies.iter().zip(&write.landed).filter(|(_, landed)| !**landed);
                let start = |copy: &ByteCopy| copy.local_offset..copy.local_offset + copy.len_bytes;
                used.extend(left.map(|(copy, _)| (start(copy), format!("transfer {:?}", write.transfer))));
            }
            let filling = self.daemons[target].truth.filling.iter();
            let filling = filling.filter(|(attempt, _)| !self.attempts[*attempt].knows);
            used.extend(filling.map(|(attempt, range)| (range.clone(), format!("the connector of attempt {attempt}"))));
        }
        used
    }

    /// An engine refuses a peer for what its metadata says, or cannot load it now.
    pub fn load_failure(&self) -> Failure {
        let refuses = self.handled.is_multiple_of(2);
        let kind = if refuses { FailureKind::HandshakeRefused } else { FailureKind::PeerUnreachable };
        Failure::new(kind, "no such agent")
    }

    /// Sums what the receiver will check, as the bytes are now.
    pub fn sum(&mut self, at: Proc, transfer: TransferId, copies: &[ByteCopy], summed: &[u32]) {
        let sender = self.daemons.sender(at.index);
        let sum = |&index: &u32| Checksum::of(&sender.truth.memory[local(&copies[index as usize])]);
        let sums = summed.iter().map(sum).collect();
        sender.sums.insert(transfer, sums);
    }

    pub fn post(&mut self, at: Proc, transfer: TransferId, connection: ConnectionId, copies: Vec<ByteCopy>) {
        let soon = self.ms(1, 20);
        let Some(known) = self.daemons.sender(at.index).connections.get(&connection).filter(|known| !known.forgotten)
        else {
            return self.schedule(soon, WorldEvent::Done(at, transfer, false));
        };
        let (receiver, told) = (known.receiver, known.told_len_bytes);
        for copy in &copies {
            if copy.remote_offset + copy.len_bytes > told {
                self.wrong(format!("{copy:?} is beyond the {told} bytes that were described"));
            }
            self.check_post(at, receiver, copy);
        }
        let write = Write {
            sender: at,
            receiver,
            transfer: Some((transfer, connection)),
            landed: vec![false; copies.len()],
            copies,
            bytes: None,
            until: None,
        };
        self.put_under_way(write, soon);
    }

    /// An LMCache sender writes pages, whole ones.
    pub fn post_pages(&mut self, at: Proc, receiver: Proc, pages: Vec<(u64, Vec<u8>)>) -> u64 {
        let soon = self.ms(1, 20);
        let (starts, bytes): (Vec<u64>, Vec<Vec<u8>>) = pages.into_iter().unzip();
        let copy = |(&remote_offset, bytes): (&u64, &Vec<u8>)| ByteCopy {
            local_offset: 0,
            remote_offset,
            len_bytes: bytes.len() as u64,
        };
        let copies: Vec<ByteCopy> = starts.iter().zip(&bytes).map(copy).collect();
        copies.iter().for_each(|copy| self.check_post(at, receiver, copy));
        let landed = vec![false; copies.len()];
        let write = Write { sender: at, receiver, transfer: None, landed, copies, bytes: Some(bytes), until: None };
        self.put_under_way(write, soon)
    }

    fn check_post(&mut self, at: Proc, receiver: Proc, copy: &ByteCopy) {
        if self.receiver_lives(receiver) && !self.is_lmcache_receiver(receiver.index) {
            let checked = self.daemons.receiver(receiver.index).truth.check_write(&sender_name(at), &remote(copy));
            self.check(checked);
        }
    }

    fn put_under_way(&mut self, write: Write, soon: u64) -> u64 {
        let count = write.copies.len();
        let (fails, slow) = (self.plan.transfer_fails, self.plan.transfer_slow);
        let fails = self.fault(fails);
        let pause = if self.fault(slow) { self.ms(0, 1200) } else { 0 };
        let id = self.fresh_id();
        // In any order, and when it fails only some of it.
        let landing = if fails { self.rng.random_range(0..=count) } else { count };
        for copy in 0..landing {
            let at_ms = self.ms(0, soon + pause + 1);
            self.schedule(at_ms, WorldEvent::Land(id, copy));
        }
        self.schedule(soon + pause + 1, WorldEvent::Land(id, if fails { usize::MAX } else { count }));
        self.writes.insert(id, write);
        id
    }

    /// One copy of a write lands; one beyond the last is its end.
    pub fn land(&mut self, id: u64, copy: usize) {
        let now = self.now;
        let Some(write) = self.writes.get_mut(&id) else { return };
        if !write.arrives(now) {
            self.writes.remove(&id);
            return;
        }
        let (at, receiver, transfer) = (write.sender, write.receiver, write.transfer);
        let Some(bytes) = write.copies.get(copy).copied() else {
            self.writes.remove(&id);
            // A write to a process that is gone is an error, if anybody notices. LMCache's senders do: their next writes go to
            // the one that is gone as well.
            let unnoticed = transfer.is_some() && !self.receiver_lives(receiver) && self.rng.random_bool(0.3);
            let good = copy != usize::MAX && (self.receiver_lives(receiver) || unnoticed);
            let after = self.ms(0, 3);
            return self.schedule(
                after,
                match transfer {
                    Some((transfer, _)) => WorldEvent::Done(at, transfer, good),
                    None => WorldEvent::Written(at, id, good),
                },
            );
        };
        write.landed[copy] = true;
        if !self.receiver_lives(receiver) {
            return;
        }
        if let Some((_, connection)) = transfer
            && self.daemons.sender(at.index).connections.get(&connection).is_some_and(|known| known.forgotten)
        {
            self.tally.landed_late += 1;
        }
        let range = remote(&bytes);
        let source = match &self.writes[&id].bytes {
            Some(bytes) => bytes[copy].clone(),
            None => self.daemons.sender(at.index).truth.memory[local(&bytes)].to_vec(),
        };
        if self.is_lmcache_receiver(receiver.index) {
            return self.lmcache_takes(receiver, at, &range, &source);
        }
        let checked = self.daemons.receiver(receiver.index).truth.check_write(&sender_name(at), &range);
        self.check(checked);
        let to = range.start as usize..range.end as usize;
        self.daemons.receiver(receiver.index).truth.memory[to].copy_from_slice(&source);
    }

    /// A writer dies. With sockets between it and the receiver, some of what it had posted arrives all the same.
    pub fn writes_die(&mut self, at: Proc) {
        let until = self.now + Duration::from_millis(self.ms(0, LINGER.as_millis() as u64));
        let lingers = self.plan.lingers;
        self.writes.retain(|_, write| write.sender != at || lingers);
        for write in self.writes.values_mut().filter(|write| write.sender == at) {
            write.until = Some(until);
            if write.bytes.is_none() {
                let memory = &self.daemons.sender(at.index).truth.memory;
                write.bytes = Some(write.copies.iter().map(|copy| memory[local(copy)].to_vec()).collect());
            }
        }
    }

    /// The engine is told to forget a receiver: it stops what it writes there, or does not.
    pub fn forget(&mut self, at: Proc, connection: ConnectionId) {
        if let Some(known) = self.daemons.sender(at.index).connections.get_mut(&connection) {
            known.forgotten = true;
        }
        let lands = self.plan.forgotten_lands;
        if self.fault(lands) {
            return;
        }
        let of_connection = |write: &Write| match write.transfer {
            Some((transfer, other)) if (write.sender, other) == (at, connection) => Some(transfer),
            _ => None,
        };
        let stopped: Vec<(u64, TransferId)> =
            self.writes.iter().filter_map(|(&id, write)| Some((id, of_connection(write)?))).collect();
        for (id, transfer) in stopped {
            self.writes.remove(&id);
            let after = self.ms(0, 10);
            self.schedule(after, WorldEvent::Done(at, transfer, false));
        }
    }
}
