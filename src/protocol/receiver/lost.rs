//! Peers that were lost, as far as their late messages must be recognised.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::Seq;

/// How many are remembered.
const LOST_MAX: usize = 4096;

/// The last number that each lost peer had used: a handshake with a lower one was sent before, and says nothing about
/// what the peer has done since.
#[derive(Debug, Default)]
pub(super) struct LostPeers {
    last_seqs: BTreeMap<String, Seq>,
    order: VecDeque<String>,
}

impl LostPeers {
    pub(super) fn last_seq(&self, instance: &str) -> Option<Seq> {
        self.last_seqs.get(instance).copied()
    }

    pub(super) fn remember(&mut self, instance: &str, last_seq: Seq) {
        match self.last_seqs.get_mut(instance) {
            Some(known) => *known = last_seq.max(*known),
            None => {
                self.last_seqs.insert(instance.to_owned(), last_seq);
                self.order.push_back(instance.to_owned());
            }
        }
        while self.order.len() > LOST_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.last_seqs.remove(&oldest);
            }
        }
    }
}
