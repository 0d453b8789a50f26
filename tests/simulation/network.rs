//! Links between senders and receivers, of any quality.

use std::time::Duration;

use pd_backend::ids::{Failure, FailureKind, PeerId};
use pd_backend::protocol::Port;
use pd_backend::wire::Message;
use rand::RngExt;

use crate::news::{News, Proc};
use crate::plan::LATE_MS;
use crate::world::World;

/// How a message's sender is answered: which connection, and which of its two sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub sender: Proc,
    pub receiver: Proc,
    pub peer: PeerId,
    pub port: Port,
}

/// A connection from a sender to a receiver.
#[derive(Debug)]
pub struct Link {
    pub receiver: Proc,
    /// Whether the sender still reads it.
    pub open: bool,
}

impl World {
    /// A sender wants to connect to the receiver that listens as `receiver`.
    pub fn connect(&mut self, at: Proc, peer: PeerId, receiver: usize) {
        let to = self.receiver_at(receiver);
        let reachable = self.receiver_lives(to) && !self.parted.contains(&(at.index, receiver));
        let after = self.ms(1, 15);
        if reachable {
            self.links.insert((at, peer), Link { receiver: to, open: true });
            self.schedule(after, News::Opened(at, peer));
        } else if self.rng.random_bool(0.5) {
            self.schedule(after, News::Closed(at, peer));
        }
    }

    pub fn transmit(&mut self, to_sender: bool, route: Route, message: Message) {
        if !to_sender && self.links.get(&(route.sender, route.peer)).is_none_or(|link| !link.open) {
            return;
        }
        let (lose, repeat, late) = (self.plan.lose, self.plan.repeat, self.plan.late);
        if self.parted.contains(&(route.sender.index, route.receiver.index)) || self.fault(lose) {
            self.tally.lost_messages += 1;
            return self.say(|| format!("lost: {message:?}"));
        }
        let copies = 1 + usize::from(self.fault(repeat));
        self.tally.repeated_messages += copies as u64 - 1;
        for _ in 0..copies {
            let mut delay = self.ms(0, 12);
            if self.fault(late) {
                delay += self.ms(0, LATE_MS);
            }
            let mut arrival = self.now + Duration::from_millis(delay);
            if self.plan.ordered {
                let busy = self.link_busy.entry((to_sender, route)).or_insert(arrival);
                *busy = arrival.max(*busy);
                arrival = *busy;
            }
            let message = Box::new(message.clone());
            let news = if to_sender { News::ToSender(route, message) } else { News::ToReceiver(route, message) };
            self.schedule_at(arrival, news);
        }
    }

    /// The sender's end is closed. What it sent before still arrives; the receiver hears of it later, or never.
    pub fn close(&mut self, at: Proc, peer: PeerId) {
        let Some(link) = self.links.get_mut(&(at, peer)) else { return };
        if !std::mem::replace(&mut link.open, false) {
            return;
        }
        let receiver = link.receiver;
        let silent = self.plan.silent;
        if !self.parted.contains(&(at.index, receiver.index)) && !self.fault(silent) {
            let after = self.ms(0, 60);
            self.schedule(after, News::RouteGone(Route { sender: at, receiver, peer, port: Port::Alloc }));
        }
    }

    /// A connection breaks in between: both sides hear of it, sooner or later.
    pub fn cut(&mut self, at: Proc, peer: PeerId) {
        self.close(at, peer);
        let after = self.ms(0, 60);
        self.schedule(after, News::Closed(at, peer));
    }

    pub fn links_of_sender_die(&mut self, at: Proc) {
        let peers: Vec<PeerId> =
            self.links.range((at, PeerId(0))..=(at, PeerId(u64::MAX))).map(|(key, _)| key.1).collect();
        for peer in peers {
            self.close(at, peer);
        }
    }

    pub fn links_of_receiver_die(&mut self, receiver: Proc) {
        let broken: Vec<(Proc, PeerId)> =
            self.links.iter().filter(|(_, link)| link.receiver == receiver && link.open).map(|(&key, _)| key).collect();
        for (at, peer) in broken {
            if let Some(link) = self.links.get_mut(&(at, peer)) {
                link.open = false;
            }
            let silent = self.plan.silent;
            if !self.fault(silent) {
                let after = self.ms(0, 60);
                self.schedule(after, News::Closed(at, peer));
            }
        }
    }

    pub fn link_failure() -> Failure {
        Failure::new(FailureKind::PeerLost, "the connection broke")
    }
}
