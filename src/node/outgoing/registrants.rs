//! Who has registered for chunks, which of them wait for which chunk, and how registrations have ended.

use std::collections::{BTreeMap, BTreeSet};

use super::uid::{RegistrationId, Uid};
use crate::ids::{ChunkKey, Failure, Registration, RequestId, Seq};
use crate::node::latest::Latest;
use crate::wire::message::Register;

/// How many registrations that have ended are remembered, for words of them that come late.
const ENDED_MAX: usize = 4096;
/// What a key that is waited for takes beside its text: it stands in the registration, and in the index of those that wait.
const KEY_COST_BYTES: usize = 64;

/// A receiver that asks for chunks.
#[derive(Debug)]
pub(super) struct Registrant<R> {
    /// How it is answered.
    pub(super) route: R,
    /// Of what it asked last; a question that is repeated keeps its number.
    pub(super) seq: Seq,
    pub(super) state: RegistrantState,
}

#[derive(Debug)]
pub(super) enum RegistrantState {
    /// Nothing of it is known yet.
    Waiting(Box<Register>),
    /// What it asks for is kept, by a lease of its own.
    Held(Uid),
    /// It is sent what it asks for.
    Pushing(Uid, Asked),
}

/// Which parked request somebody asks for: one that has one of these names, and ends with this chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) names: Vec<RequestId>,
    /// None: whoever asks has not said.
    pub(super) last: Option<ChunkKey>,
}

/// How many registrations hold chunks, and how many wait for some; the bytes that the keys of those take.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) held: usize,
    pub(super) waiting: usize,
    pub(super) waiting_len_bytes: usize,
}

/// The latest question of a registration that has ended, and its answer.
#[derive(Debug)]
pub(super) struct RegistrationEnd {
    pub(super) seq: Seq,
    pub(super) state: Registration,
    pub(super) failure: Option<Failure>,
}

/// Every registration that has not ended, and the latest that have. A step takes time that grows with the registration's own
/// keys, and with the logarithm of all others'.
#[derive(Debug)]
pub(super) struct Registrants<R> {
    /// With the number under which it waits, if it does.
    open: BTreeMap<RegistrationId, (u64, Registrant<R>)>,
    load: Load,
    /// Those that wait, in the order of their arrival.
    waiting: BTreeMap<u64, RegistrationId>,
    /// Which of them wait for a chunk.
    by_key: BTreeSet<(ChunkKey, u64)>,
    next: u64,
    /// How others have ended, for questions that are repeated.
    ended: Latest<RegistrationId, RegistrationEnd>,
}

impl<R> Default for Registrants<R> {
    fn default() -> Self {
        Self {
            open: BTreeMap::new(),
            load: Load::default(),
            waiting: BTreeMap::new(),
            by_key: BTreeSet::new(),
            next: 0,
            ended: Latest::new(ENDED_MAX),
        }
    }
}

impl<R> Registrants<R> {
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) const fn load(&self) -> Load {
        self.load
    }

    pub(super) fn state_of(&self, id: &RegistrationId) -> Option<&RegistrantState> {
        self.open.get(id).map(|(_, registrant)| &registrant.state)
    }

    /// Whether this was overtaken by a later word.
    pub(super) fn is_late(&self, id: &RegistrationId, seq: Seq) -> bool {
        let latest = self.open.get(id).map(|(_, registrant)| registrant.seq);
        latest.or_else(|| self.ended.get(id).map(|end| end.seq)).is_some_and(|latest| seq < latest)
    }

    /// How the registration ended that has asked with this number.
    pub(super) fn end_of(&self, id: &RegistrationId, seq: Seq) -> Option<&RegistrationEnd> {
        self.ended.get(id).filter(|end| end.seq == seq)
    }

    /// The registration that has asked with this number asks again, by this route.
    pub(super) fn repeat(&mut self, id: &RegistrationId, seq: Seq, route: R) -> Option<&RegistrantState> {
        let (_, registrant) = self.open.get_mut(id).filter(|(_, registrant)| registrant.seq == seq)?;
        registrant.route = route;
        Some(&registrant.state)
    }

    /// Takes in a registration that is not there.
    pub(super) fn insert(&mut self, id: RegistrationId, registrant: Registrant<R>) {
        let number = self.next;
        self.next += 1;
        match &registrant.state {
            RegistrantState::Waiting(register) => {
                self.load.waiting += 1;
                self.load.waiting_len_bytes += keys_len_bytes(&register.keys);
                self.by_key.extend(register.keys.iter().map(|key| (key.clone(), number)));
                self.waiting.insert(number, id.clone());
            }
            RegistrantState::Held(_) => self.load.held += 1,
            RegistrantState::Pushing(..) => {}
        }
        let before = self.open.insert(id, (number, registrant));
        debug_assert!(before.is_none(), "it is removed before it is replaced");
    }

    pub(super) fn remove(&mut self, id: &RegistrationId) -> Option<Registrant<R>> {
        let (number, registrant) = self.open.remove(id)?;
        match &registrant.state {
            RegistrantState::Waiting(register) => {
                self.load.waiting -= 1;
                self.load.waiting_len_bytes -= keys_len_bytes(&register.keys);
                for key in &register.keys {
                    self.by_key.remove(&(key.clone(), number));
                }
                self.waiting.remove(&number);
            }
            RegistrantState::Held(_) => self.load.held -= 1,
            RegistrantState::Pushing(..) => {}
        }
        Some(registrant)
    }

    /// Takes a registration out, and remembers how it ended.
    pub(super) fn end(
        &mut self,
        id: &RegistrationId,
        state: Registration,
        failure: Option<Failure>,
    ) -> Option<Registrant<R>> {
        let registrant = self.remove(id)?;
        self.remember(id, RegistrationEnd { seq: registrant.seq, state, failure });
        Some(registrant)
    }

    pub(super) fn remember(&mut self, id: &RegistrationId, end: RegistrationEnd) {
        self.ended.insert(id.clone(), end);
    }

    /// Those that wait for one of these chunks, in the order of their arrival.
    pub(super) fn waiting_for<'a>(&self, keys: impl IntoIterator<Item = &'a ChunkKey>) -> Vec<RegistrationId> {
        let of_key = |key: &ChunkKey| self.by_key.range((key.clone(), 0)..=(key.clone(), u64::MAX));
        let numbers: BTreeSet<u64> = keys.into_iter().flat_map(of_key).map(|(_, number)| *number).collect();
        numbers.iter().filter_map(|number| self.waiting.get(number).cloned()).collect()
    }

    /// Those that wait for a request by one of these names, which ends with this chunk where that is known.
    pub(super) fn waiting_under(&self, names: &[RequestId], last: Option<&ChunkKey>) -> Vec<RegistrationId> {
        let named = |id: &&RegistrationId| match self.state_of(id) {
            Some(RegistrantState::Waiting(register)) => {
                (last.is_none() || register.keys.last() == last) && register.ids.iter().any(|name| names.contains(name))
            }
            _ => false,
        };
        self.waiting.values().filter(named).cloned().collect()
    }

    /// The one that holds chunks by this lease.
    pub(super) fn holding(&self, lease: Uid) -> Option<RegistrationId> {
        let holds =
            |registrant: &Registrant<R>| matches!(registrant.state, RegistrantState::Held(held) if held == lease);
        self.open.iter().find(|(_, (_, registrant))| holds(registrant)).map(|(id, _)| id.clone())
    }

    /// Checks that what is counted and found by key is what is there.
    ///
    /// # Errors
    /// What is not.
    pub(super) fn check(&self) -> Result<(), String> {
        let (mut load, mut by_key) = (Load::default(), BTreeSet::new());
        for (id, (number, registrant)) in &self.open {
            match &registrant.state {
                RegistrantState::Waiting(register) => {
                    load.waiting += 1;
                    load.waiting_len_bytes += keys_len_bytes(&register.keys);
                    by_key.extend(register.keys.iter().map(|key| (key.clone(), *number)));
                    if self.waiting.get(number) != Some(id) {
                        return Err(format!("registration {id:?} waits, and is not found among those that wait"));
                    }
                }
                RegistrantState::Held(_) => load.held += 1,
                RegistrantState::Pushing(..) => {}
            }
        }
        match (load, self.waiting.len()) == (self.load, load.waiting) && by_key == self.by_key {
            true => Ok(()),
            false => Err(format!("registrations are {load:?}, and are counted as {:?}", self.load)),
        }
    }
}

/// What these keys take while they are waited for.
pub(super) fn keys_len_bytes(keys: &[ChunkKey]) -> usize {
    keys.iter().map(|key| KEY_COST_BYTES + key.as_str().len()).sum()
}
