//! Requests whose prefill server does not know who will decode them: their chunks are parked, and the decode server asks.

use std::time::Duration;

use pd_backend::ids::{PeerId, RequestId, SourceAddress};
use pd_backend::node::Port;
use pd_backend::node::incoming::{FetchRequest, Lookup};
use pd_backend::node::outgoing::{self, ParkRequest};
use pd_backend::wire::Message;
use rand::RngExt;

use crate::events::{Proc, WorldEvent};
use crate::network::Route;
use crate::plan;
use crate::prefill::{Kind, State};
use crate::world::World;

/// Where a sender is asked for what it has parked, whichever life it is in.
fn rendezvous(sender: usize) -> SourceAddress {
    SourceAddress { host: format!("s{sender}"), port: 3 }
}

/// A connection from a receiver to a sender.
#[derive(Debug)]
pub struct SourceLink {
    sender: Proc,
    open: bool,
}

/// A question of a reader for what is parked.
#[derive(Debug, Clone)]
pub struct Ask {
    pub job: usize,
    /// What the receiver calls it.
    pub name: RequestId,
    pub hold: bool,
}

impl World {
    /// A connector has the chunks of an attempt parked.
    pub fn park(&mut self, at: Proc, attempt: usize) {
        let spec = self.jobs[self.attempts[attempt].job].clone();
        self.attempts[attempt].state = State::Opening;
        let (client, id) = self.call(at, attempt, Kind::Open, plan::ALLOCATION);
        let park = ParkRequest {
            ids: if spec.unsolicited { Vec::new() } else { vec![spec.name.clone()] },
            id: spec.name,
            keys: spec.keys,
            groups: spec.groups,
            last_chunk_tokens: spec.last_tokens,
            wait: None,
            unsolicited: spec.unsolicited,
            stays: false,
        };
        self.daemons.sender(at.index).node.handle_park(self.now, client, id, park);
    }

    /// The router has told decode where the chunks are, sooner or later.
    pub fn schedule_fetch(&mut self, job: usize, after_ms: u64) {
        let spec = self.jobs[job].clone();
        let to = self.receiver_at(spec.receiver);
        if spec.unsolicited {
            // Too early, at times, and again.
            for _ in 0..3 {
                let after = after_ms + self.ms(0, 120);
                self.schedule(after, WorldEvent::LookAhead(to, job));
            }
            return;
        }
        // Two samples of a prompt, at times.
        let samples = if spec.fresh { 1 } else { self.ms(1, 3) };
        for _ in 0..samples {
            let name = RequestId::new(format!("f{}", self.fresh_id())).unwrap();
            self.asked_parked.insert(name.clone(), job);
            let late = if self.rng.random_bool(0.2) && !spec.fresh { self.ms(0, 600) } else { 0 };
            if self.rng.random_bool(0.4) {
                let ask = Ask { job, name: name.clone(), hold: true };
                self.schedule(after_ms, WorldEvent::AskParked(to, ask));
            }
            let ask = Ask { job, name: name.clone(), hold: false };
            let (after, cancels) = (after_ms + late + self.ms(0, 30), self.plan.reader_cancels);
            self.schedule(after, WorldEvent::AskParked(to, ask));
            if self.fault(cancels) {
                let after = after + self.ms(0, 150);
                let news = if self.rng.random_bool(0.5) {
                    WorldEvent::ReaderCancels(to, name)
                } else {
                    WorldEvent::ReleaseParked(to, job, name)
                };
                self.schedule(after, news);
            }
        }
    }

    /// A reader looks for what may have been pushed ahead.
    pub fn look_ahead(&mut self, at: Proc, job: usize) {
        let keys = self.jobs[job].keys.clone();
        let (client, id) = self.reading(at, None, Duration::ZERO);
        let lookup = Lookup { keys, uncommitted: false, fetches: true };
        self.daemons.receiver(at.index).node.handle_lookup(self.now, client, id, &lookup);
    }

    /// What a sender says of its guesses.
    pub fn on_guess(&mut self, note: &outgoing::OutgoingNote) {
        match note {
            outgoing::OutgoingNote::PushedAhead { .. } => self.tally.pushed_ahead += 1,
            outgoing::OutgoingNote::AheadDropped { .. } => self.tally.ahead_dropped += 1,
            outgoing::OutgoingNote::WrongGuess { .. } => self.tally.wrong_guesses += 1,
            _ => {}
        }
    }

    fn fetch_request(&mut self, ask: &Ask) -> FetchRequest {
        let spec = self.jobs[ask.job].clone();
        let ids = match self.rng.random_range(0..4) {
            // Ids are dropped, and anybody's, at times.
            0 if !spec.fresh => Vec::new(),
            1 if !spec.fresh => vec![self.jobs[self.rng.random_range(0..self.jobs.len())].name.clone()],
            _ => vec![spec.name],
        };
        let register_wait =
            Duration::from_millis(if spec.fresh { 500 } else { [0, 60, 500][self.rng.random_range(0..3)] });
        FetchRequest { id: ask.name.clone(), source: rendezvous(spec.sender), ids, keys: spec.keys, register_wait }
    }

    pub fn ask_parked(&mut self, at: Proc, ask: &Ask) {
        let fetch = self.fetch_request(ask);
        if ask.hold {
            let (client, id) = self.reading(at, None, plan::WAIT);
            self.daemons.receiver(at.index).node.handle_hold(self.now, client, id, fetch);
        } else {
            let (client, id) = self.reading(at, Some(ask.name.clone()), plan::WAIT);
            self.daemons.receiver(at.index).node.handle_fetch(self.now, client, id, fetch, None);
        }
    }

    pub fn release_parked(&mut self, at: Proc, job: usize, name: RequestId) {
        let fetch = self.fetch_request(&Ask { job, name, hold: false });
        let (client, id) = self.reading(at, None, Duration::ZERO);
        self.daemons.receiver(at.index).node.handle_release_parked(self.now, client, id, fetch);
    }

    /// A receiver wants to connect to a sender's rendezvous port.
    pub fn connect_source(&mut self, at: Proc, peer: PeerId, address: &SourceAddress) {
        let sender = self.sender_at(address.host[1..].parse().unwrap());
        let reachable = self.sender_lives(sender) && !self.parted.contains(&(sender.index, at.index));
        let after = self.ms(1, 15);
        self.source_links.insert((at, peer), SourceLink { sender, open: reachable });
        if reachable {
            self.schedule(after, WorldEvent::SourceOpened(at, peer));
        } else if self.rng.random_bool(0.5) {
            self.schedule(after, WorldEvent::SourceClosed(at, peer));
        }
    }

    /// What a receiver says to a source.
    pub fn say_to_source(&mut self, at: Proc, peer: PeerId, message: Message) {
        let cut = self.plan.cut;
        let Some(link) = self.source_links.get_mut(&(at, peer)).filter(|link| link.open) else { return };
        let route = Route { sender: link.sender, receiver: at, peer, port: Port::Rendezvous };
        if self.fault(cut) {
            return self.source_ends(at, peer);
        }
        self.transmit(true, route, message);
    }

    /// What a source says. It is not heard where its connection has ended.
    pub fn source_says(&mut self, route: Route, message: Message) {
        if self.source_links.get(&(route.receiver, route.peer)).is_some_and(|link| link.open) {
            self.transmit(false, route, message);
        }
    }

    /// A receiver closes its end. False: it is no source.
    pub fn close_source(&mut self, at: Proc, peer: PeerId) -> bool {
        self.source_links.remove(&(at, peer)).is_some()
    }

    fn source_ends(&mut self, at: Proc, peer: PeerId) {
        let Some(link) = self.source_links.get_mut(&(at, peer)) else { return };
        if std::mem::replace(&mut link.open, false) {
            let silent = self.plan.silent;
            if !self.fault(silent) {
                let after = self.ms(0, 60);
                self.schedule(after, WorldEvent::SourceClosed(at, peer));
            }
        }
    }

    pub fn source_links_of_sender_die(&mut self, sender: Proc) {
        let of_sender: Vec<(Proc, PeerId)> =
            self.source_links.iter().filter(|(_, link)| link.sender == sender).map(|(&key, _)| key).collect();
        for (at, peer) in of_sender {
            self.source_ends(at, peer);
        }
    }

    pub fn source_links_of_receiver_die(&mut self, receiver: Proc) {
        self.source_links.retain(|(at, _), _| *at != receiver);
    }
}
