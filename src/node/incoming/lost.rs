//! What is kept of lost senders: the last number seen, to recognise late handshakes, and the process, to learn of its end.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::Seq;
use crate::wire::message::ProcessIdentity;

/// How many are remembered.
const LOST_MAX: usize = 4096;

/// What is remembered of the peers that were lost last.
#[derive(Debug, Default)]
pub(super) struct LostPeers {
    by_instance: BTreeMap<String, LostPeer>,
    order: VecDeque<String>,
}

#[derive(Debug)]
struct LostPeer {
    /// The last number that it had used: a handshake with a lower one was sent before, and says nothing about what the
    /// peer has done since.
    last_seq: Seq,
    process: Option<ProcessIdentity>,
}

impl LostPeers {
    pub(super) fn last_seq(&self, instance: &str) -> Option<Seq> {
        self.by_instance.get(instance).map(|lost| lost.last_seq)
    }

    pub(super) fn process(&self, instance: &str) -> Option<&ProcessIdentity> {
        self.by_instance.get(instance)?.process.as_ref()
    }

    pub(super) fn remember(&mut self, instance: &str, last_seq: Seq, process: Option<ProcessIdentity>) {
        match self.by_instance.get_mut(instance) {
            Some(known) => *known = LostPeer { last_seq: last_seq.max(known.last_seq), process },
            None => {
                self.by_instance.insert(instance.to_owned(), LostPeer { last_seq, process });
                self.order.push_back(instance.to_owned());
            }
        }
        while self.order.len() > LOST_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.by_instance.remove(&oldest);
            }
        }
    }
}
