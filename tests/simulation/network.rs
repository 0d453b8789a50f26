//! Links between senders and receivers, of any quality.

use std::time::{Duration, Instant};

use pd_backend::ids::{Failure, FailureKind, PeerId};
use pd_backend::node::Port;
use pd_backend::wire::Message;
use rand::RngExt;

use crate::events::{Proc, WorldEvent};
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
    /// Whether LMCache's code is at one end.
    fn is_lmcaches(&self, sender: Proc, receiver: Proc) -> bool {
        self.is_lmcache_sender(sender.index) || self.is_lmcache_receiver(receiver.index)
    }

    /// A sender wants to connect to the receiver that listens as `receiver`.
    pub fn connect(&mut self, at: Proc, peer: PeerId, receiver: usize) {
        let to = self.receiver_at(receiver);
        let reachable = self.receiver_lives(to) && !self.parted.contains(&(at.index, receiver));
        let after = self.ms(1, 15);
        if reachable {
            self.links.insert((at, peer), Link { receiver: to, open: true });
            self.schedule(after, WorldEvent::Opened(at, peer));
        } else if self.rng.random_bool(0.5) {
            self.schedule(after, WorldEvent::Closed(at, peer));
        }
    }

    pub fn transmit(&mut self, to_sender: bool, route: Route, message: Message) {
        let rendezvous = route.port == Port::Rendezvous;
        if !to_sender && !rendezvous && self.links.get(&(route.sender, route.peer)).is_none_or(|link| !link.open) {
            return;
        }
        if self.is_lmcaches(route.sender, route.receiver) {
            return self.stream(to_sender, route, message);
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
                arrival = self.in_order(to_sender, route, arrival);
            }
            let message = Box::new(message.clone());
            let news =
                if to_sender { WorldEvent::ToSender(route, message) } else { WorldEvent::ToReceiver(route, message) };
            self.schedule_at(arrival, news);
        }
    }

    /// Over ZeroMQ and TCP, for nothing else makes up for what is lost: in order, once, however late. A message is lost with
    /// its connection alone, and an LMCache sender keeps its own for as long as it lives.
    fn stream(&mut self, to_sender: bool, route: Route, message: Message) {
        let (lose, late) = (self.plan.lose, self.plan.late);
        if !self.is_lmcache_sender(route.sender.index) {
            let open = self.links.get(&(route.sender, route.peer)).is_some_and(|link| link.open);
            if open && self.fault(lose.div_ceil(2)) {
                self.tally.lmcache_cut += 1;
                self.say(|| format!("lost with its connection: {message:?}"));
                return self.cut(route.sender, route.peer);
            }
            if !to_sender && !self.receiver_lives(route.receiver) {
                return self.cut(route.sender, route.peer);
            }
        }
        let mut delay = self.ms(0, 12);
        if self.fault(late) {
            delay += self.ms(0, LATE_MS);
        }
        let arrival = self.in_order(to_sender, route, self.now + Duration::from_millis(delay));
        let message = Box::new(message);
        let news =
            if to_sender { WorldEvent::ToSender(route, message) } else { WorldEvent::ToReceiver(route, message) };
        self.schedule_at(arrival, news);
    }

    /// When something arrives that is not overtaken on its way.
    fn in_order(&mut self, to_sender: bool, route: Route, arrival: Instant) -> Instant {
        let busy = self.link_busy.entry((to_sender, route)).or_insert(arrival);
        *busy = arrival.max(*busy);
        *busy
    }

    /// The sender's end is closed. What it sent before still arrives; the receiver hears of it later, or never.
    pub fn close(&mut self, at: Proc, peer: PeerId) {
        let Some(link) = self.links.get_mut(&(at, peer)) else { return };
        if !std::mem::replace(&mut link.open, false) {
            return;
        }
        let receiver = link.receiver;
        let silent = self.plan.silent;
        if self.is_lmcaches(at, receiver) {
            return self.stream_ends(at, receiver, peer);
        }
        if !self.parted.contains(&(at.index, receiver.index)) && !self.fault(silent) {
            let after = self.ms(0, 60);
            self.schedule(after, WorldEvent::RouteGone(Route { sender: at, receiver, peer, port: Port::Alloc }));
        }
    }

    /// The end of a connection is heard of after all that was said, by those who listen for it: sooner or later.
    fn stream_ends(&mut self, at: Proc, receiver: Proc, peer: PeerId) {
        if self.is_lmcache_receiver(receiver.index) {
            if self.receiver_lives(receiver) {
                self.lmcache_receiver(receiver.index).abandoned = true;
            }
            return;
        }
        let after = self.end_of_stream_ms();
        let route = Route { sender: at, receiver, peer, port: Port::Alloc };
        let arrival = self.in_order(false, route, self.now + Duration::from_millis(after));
        self.schedule_at(arrival, WorldEvent::RouteGone(route));
    }

    fn end_of_stream_ms(&mut self) -> u64 {
        let silent = self.plan.silent;
        if self.fault(silent) { self.ms(100, 1500) } else { self.ms(0, 60) }
    }

    /// A connection breaks in between: both sides hear of it, sooner or later.
    pub fn cut(&mut self, at: Proc, peer: PeerId) {
        self.close(at, peer);
        let after = self.ms(0, 60);
        self.schedule(after, WorldEvent::Closed(at, peer));
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
            if self.is_lmcaches(at, receiver) {
                let after = self.end_of_stream_ms();
                self.schedule(after, WorldEvent::Closed(at, peer));
            } else if !self.fault(silent) {
                let after = self.ms(0, 60);
                self.schedule(after, WorldEvent::Closed(at, peer));
            }
        }
    }

    pub fn link_failure() -> Failure {
        Failure::new(FailureKind::PeerLost, "the connection broke")
    }
}
