//! What receivers must still be told. A slot that was granted to us is lost to its receiver until it has our word that
//! nothing writes it any more, so that word is given until it is answered, and a receiver that is lost before is sought.

use std::time::{Duration, Instant};

use super::{Port, SenderSession, Timer};
use crate::ids::{Failure, FailureKind, GrantId, PeerAddress, PeerId, RequestId, Seq};
use crate::wire::Message;
use crate::wire::message::{CancelExtension, CancelNotif};

/// A commit is said three times within its timeout, a word as often in the same time.
const SAID_TIMES: u32 = 3;
/// How often a word is said to a receiver that answers other things; then it is taken for lost, and met anew.
const WORD_TRIES_MAX: u32 = 20;
/// Longest pause between two attempts to find a lost receiver.
const SEEK_PAUSE_MAX: Duration = Duration::from_secs(60);
/// How often a lost receiver is sought: for some hours.
const SEEK_TRIES_MAX: u32 = 240;

/// How many lost receivers are sought at a time.
const DEBTS_MAX: usize = 4096;

/// A word that was not answered yet.
#[derive(Debug)]
pub(super) struct Word {
    pub(super) peer: PeerId,
    cancel: CancelNotif,
    tries: u32,
}

impl SenderSession {
    /// Gives a grant back; `writer_stopped` is our word that nothing of it is or will be written.
    pub(super) fn say_stopped(
        &mut self,
        peer: PeerId,
        request: RequestId,
        grant: Option<GrantId>,
        alloc_seq: Option<Seq>,
        writer_stopped: bool,
    ) {
        let seq = Seq(self.fresh());
        let instance = self.settings.hello.instance.clone();
        let pd = Some(CancelExtension { seq, instance, grant, alloc_seq, writer_stopped });
        let cancel = CancelNotif { req_id: request, keys: Vec::new(), pd };
        if writer_stopped && self.peers.contains_key(&peer) {
            self.words.insert(seq, Word { peer, cancel: cancel.clone(), tries: 1 });
            self.timers.set(Timer::Word(seq), self.now + self.repeat_after());
        }
        self.send(peer, Port::Alloc, Message::CancelNotif(cancel));
    }

    /// How long an answer is waited for before the question is repeated.
    pub(super) fn repeat_after(&self) -> Duration {
        (self.settings.commit_timeout / SAID_TIMES).max(Duration::from_millis(1))
    }

    pub(super) fn say_again(&mut self, now: Instant, seq: Seq) {
        let Some(word) = self.words.get_mut(&seq) else { return };
        word.tries += 1;
        let (peer, cancel) = (word.peer, word.cancel.clone());
        if word.tries > WORD_TRIES_MAX {
            let text = format!("the receiver did not answer a cancel that was sent {WORD_TRIES_MAX} times");
            return self.peer_failed(peer, Failure::new(FailureKind::PeerLost, text));
        }
        self.timers.set(Timer::Word(seq), now + self.repeat_after());
        self.send(peer, Port::Alloc, Message::CancelNotif(cancel));
    }

    /// Whether this was the answer to a word.
    pub(super) fn word_answered(&mut self, peer: PeerId, seq: Seq) -> bool {
        let answered = self.words.get(&seq).is_some_and(|word| word.peer == peer);
        if answered {
            self.words.remove(&seq);
            self.timers.cancel(&Timer::Word(seq));
        }
        answered
    }

    /// A grant that nobody waits for any more is given back, unless it is one that was taken.
    pub(super) fn on_unawaited_grant(&mut self, peer: PeerId, seq: Seq, grant: Option<GrantId>) {
        let Some(grant) = grant else { return };
        // Of an answer older than what is remembered nothing is said here: its receiver asks, by name.
        if let Some((request, taken)) = self.asked.get(&seq)
            && *taken != Some(grant)
        {
            self.say_stopped(peer, request.clone(), Some(grant), None, true);
        }
    }

    /// Notes that a receiver that is being lost holds grants of ours, if it may.
    pub(super) fn note_debt(&mut self, peer: PeerId) {
        let Some(record) = self.peers.get(&peer) else { return };
        if !record.link.takes_word() {
            return;
        }
        let address = record.address.clone();
        let owes = self.requests.values().any(|request| request.peer == peer && request.may_have_grant())
            || self.words.values().any(|word| word.peer == peer);
        // One more is told when the next request meets it.
        if owes && !self.debts.contains_key(&address) && self.debts.len() < DEBTS_MAX {
            self.debts.insert(address.clone(), 0);
            self.timers.set(Timer::Seek(address), self.now + self.settings.peer_timeout);
        }
    }

    pub(super) fn forget_debt(&mut self, address: &PeerAddress) {
        self.debts.remove(address);
        self.timers.cancel(&Timer::Seek(address.clone()));
    }

    /// A peer is gone, and with it what it was told: what it must still know it learns from the next handshake.
    pub(super) fn forget_words(&mut self, peer: PeerId) {
        let of_peer: Vec<Seq> = self.words.iter().filter(|(_, word)| word.peer == peer).map(|(&seq, _)| seq).collect();
        for seq in of_peer {
            self.words.remove(&seq);
            self.timers.cancel(&Timer::Word(seq));
        }
    }

    /// Shakes hands with a lost receiver, for that is the word that nothing writes any more.
    pub(super) fn seek(&mut self, now: Instant, address: &PeerAddress) {
        let Some(&tries) = self.debts.get(address) else { return };
        if self.draining || tries >= SEEK_TRIES_MAX {
            return self.forget_debt(address);
        }
        // Not counted when a request is about to meet it, or when all receivers that may be known are busy.
        let begun = !self.peer_by_address.contains_key(address) && self.peer_for(now, address).is_ok();
        let tries = tries + u32::from(begun);
        let pause = self.settings.peer_timeout.saturating_mul(1 << tries.min(8)).min(SEEK_PAUSE_MAX);
        self.debts.insert(address.clone(), tries);
        self.timers.set(Timer::Seek(address.clone()), now + pause);
    }
}
