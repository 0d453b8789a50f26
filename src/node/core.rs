//! What the halves of a node share: the slots, the buffer's growth, the deadlines, and the outputs.

use std::collections::VecDeque;
use std::time::Instant;

use super::Port;
use super::answer::Answer;
use super::chunks::ChunkSize;
use super::growth::{GROW_AGAIN_AFTER, Grown, Growth};
use super::incoming::timer as incoming;
use super::outgoing::timer as outgoing;
use super::output::{Note, Output, To};
use super::safeguards::Safeguard;
use super::settings::NodeSettings;
use super::timers::Timers;
use crate::ids::{ChunkKey, ClientId, Failure, Seq, SlotIndex};
use crate::slot::{SlotState, SlotTable};
use crate::wire::Message;

/// A deadline of one of the halves, or of what they share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Outgoing(outgoing::OutgoingTimer),
    Incoming(incoming::IncomingTimer),
    /// The buffer may grow again after a step that failed.
    Grow,
}

impl From<outgoing::OutgoingTimer> for Timer {
    fn from(timer: outgoing::OutgoingTimer) -> Self {
        Self::Outgoing(timer)
    }
}

impl From<incoming::IncomingTimer> for Timer {
    fn from(timer: incoming::IncomingTimer) -> Self {
        Self::Incoming(timer)
    }
}

/// What both halves work with. `R` is how a message's sender is answered.
#[derive(Debug)]
pub(super) struct Core<R> {
    pub(super) settings: NodeSettings,
    pub(super) slots: SlotTable,
    pub(super) growth: Growth,
    /// How much of the buffer peers can be told of, in bytes. The addresses may be ahead of it for a moment.
    pub(super) described_len_bytes: u64,
    pub(super) timers: Timers<Timer>,
    pub(super) outputs: VecDeque<Output<R>>,
    /// Takes no new requests any more.
    pub(super) draining: bool,
    /// The latest time that was heard of.
    pub(super) now: Instant,
    next_id: u64,
}

impl<R> Core<R> {
    pub(super) fn new(now: Instant, settings: NodeSettings, is_shared: bool, parks: bool) -> Self {
        let is_shared = is_shared && settings.keeps(Safeguard::SurePart);
        Self {
            slots: SlotTable::new(settings.addresses.clone(), is_shared, parks),
            growth: Growth::new(settings.len_max_bytes),
            described_len_bytes: settings.addresses.len_bytes(),
            timers: Timers::new(),
            outputs: VecDeque::new(),
            draining: false,
            now,
            next_id: 1,
            settings,
        }
    }

    /// A number that was not given before.
    pub(super) fn fresh(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// For an error text: why there is not more room.
    pub(super) fn no_room_note(&self) -> String {
        let shared = if self.slots.is_shared() { "; pd_role: both keeps some for the other direction" } else { "" };
        format!("{shared}{}", self.growth.failure_note())
    }

    /// For an error text: why that is less than the buffer.
    pub(super) fn share_note(&self) -> &'static str {
        if self.slots.is_shared() { " for one direction (pd_role: both keeps the rest for the other)" } else { "" }
    }

    /// Asks for the buffer's next step, if it can grow and none is under way.
    pub(super) fn ask_to_grow(&mut self) {
        if self.growth.try_begin(self.slots.addresses().len_bytes()) {
            self.outputs.push_back(Output::GrowBuffer);
        }
    }

    /// The buffer has another step, or could not get it.
    pub(super) fn grown(&mut self, result: Result<Grown, String>) {
        self.note(Note::Grown { result: result.as_ref().map(|grown| grown.len_bytes).map_err(Clone::clone) });
        match result {
            Ok(grown) => {
                self.growth.end(None);
                self.described_len_bytes = grown.len_bytes;
                self.settings.metadata = grown.metadata;
                self.settings.descriptors = grown.descriptors;
            }
            Err(text) => {
                self.growth.end(Some(text));
                self.timers.set(Timer::Grow, self.now + GROW_AGAIN_AFTER);
            }
        }
    }

    /// A ready chunk is to be sent from where it is. False: as much as may be is parked.
    pub(super) fn hold_sent(&mut self, slot: SlotIndex) -> bool {
        !self.settings.keeps(Safeguard::SentChunksHeld) || self.slots.park(slot)
    }

    /// It is sent, or will not be.
    pub(super) fn let_go_sent(&mut self, slot: SlotIndex) {
        if self.settings.keeps(Safeguard::SentChunksHeld) {
            self.slots.unpark(self.now, slot);
        }
    }

    /// Those of these chunks that are ready, by position. A ready chunk of another length or group under the same key is
    /// not this chunk: it is written again.
    pub(super) fn ready_of(&self, keys: &[ChunkKey], sizes: &[ChunkSize]) -> Vec<(u32, SlotIndex)> {
        let ready = |((index, key), size): ((u32, &ChunkKey), &ChunkSize)| {
            let slot = self.slots.find(key)?;
            let same = matches!(self.slots.state(slot), Some(SlotState::Ready { group, .. }) if *group == size.group)
                && self.slots.range(slot).is_some_and(|range| range.len_bytes == size.len_bytes);
            same.then_some((index, slot))
        };
        (0u32..).zip(keys).zip(sizes).filter_map(ready).collect()
    }

    pub(super) fn send(&mut self, to: To<R>, port: Port, message: Message) {
        self.outputs.push_back(Output::Send { to, port, message });
    }

    pub(super) fn answer(&mut self, client: ClientId, id: Seq, answer: Answer) {
        self.outputs.push_back(Output::Answer { client, id, answer });
    }

    pub(super) fn refuse(&mut self, client: ClientId, id: Seq, failure: Failure, peer: Option<String>) {
        self.answer(client, id, Answer::Failed { failure, peer });
    }

    pub(super) fn note(&mut self, note: impl Into<Note<R>>) {
        self.outputs.push_back(Output::Note(note.into()));
    }
}
