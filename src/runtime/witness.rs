//! Looks for the processes that receivers ask about. Looking is several system calls a process and up to 64 processes a
//! question, so it happens on a thread for what blocks, and the driver hears of it later.

use std::collections::BTreeSet;

use tokio::task::spawn_blocking;

use super::process;
use crate::ids::PeerId;
use crate::wire::message::ProcessIdentity;

/// Of the processes that a receiver asked about, these have ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HaveEnded {
    pub(super) peer: PeerId,
    pub(super) processes: Vec<ProcessIdentity>,
}

/// The receivers whose questions are being looked into: one question of each at a time, so as many as `pd_max_peers`.
#[derive(Debug, Default)]
pub(super) struct Witness(BTreeSet<PeerId>);

impl Witness {
    /// Has these processes looked for, unless the receiver's last question is still being looked into: it asks again with
    /// its next answer to a ping.
    pub(super) fn look(
        &mut self,
        peer: PeerId,
        processes: Vec<ProcessIdentity>,
        tell: impl FnOnce(HaveEnded) + Send + 'static,
    ) {
        self.look_with(process::has_ended, peer, processes, tell);
    }

    fn look_with(
        &mut self,
        has_ended: impl FnMut(&ProcessIdentity) -> bool + Send + 'static,
        peer: PeerId,
        mut processes: Vec<ProcessIdentity>,
        tell: impl FnOnce(HaveEnded) + Send + 'static,
    ) {
        processes.retain(process::is_seen_from_here);
        if processes.is_empty() || !self.0.insert(peer) {
            return;
        }
        spawn_blocking(move || {
            processes.retain(has_ended);
            tell(HaveEnded { peer, processes });
        });
    }

    /// The receiver's question has been looked into.
    pub(super) fn forget(&mut self, peer: PeerId) {
        self.0.remove(&peer);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::sync::mpsc::unbounded_channel;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn the_driver_does_not_wait_for_a_look_and_looks_do_not_pile_up() {
        // Broken in production: receivers that ask about many processes hold up every request of this sender, or fill it
        // with threads.
        let own = process::own_identity().unwrap();
        let other = |start_ticks| ProcessIdentity { start_ticks, ..own.clone() };
        let (told, mut looks) = unbounded_channel();
        let (gate, gated) = mpsc::channel::<()>();
        let mut witness = Witness::default();
        let slow = move |process: &ProcessIdentity| {
            gated.recv().unwrap();
            process.start_ticks == 1
        };
        let tell = || {
            let told = told.clone();
            move |ended| told.send(ended).unwrap()
        };
        // It returns while nothing has been looked at.
        witness.look_with(slow, PeerId(1), vec![other(1), other(2)], tell());
        for _ in 0..1000 {
            witness.look_with(|_| panic!("one at a time"), PeerId(1), vec![other(3)], tell());
        }
        // Another receiver's question does not wait, and what cannot be seen is not looked for.
        let elsewhere = ProcessIdentity { boot_id: "another host".into(), ..other(1) };
        witness.look_with(|_| panic!("it is elsewhere"), PeerId(2), vec![elsewhere], tell());
        witness.look_with(|_| true, PeerId(2), vec![other(5)], tell());
        let mut next = async || timeout(Duration::from_secs(20), looks.recv()).await.unwrap().unwrap();
        assert_eq!(next().await, HaveEnded { peer: PeerId(2), processes: vec![other(5)] });
        gate.send(()).unwrap();
        gate.send(()).unwrap();
        assert_eq!(next().await, HaveEnded { peer: PeerId(1), processes: vec![other(1)] });
        witness.forget(PeerId(1));
        witness.look(PeerId(1), vec![other(1), own.clone()], tell());
        assert_eq!(next().await, HaveEnded { peer: PeerId(1), processes: vec![other(1)] });
    }
}
