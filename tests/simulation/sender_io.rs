//! A sender's session and what it asks of the world.

use pd_backend::ids::{Failure, FailureKind, PeerId, ReceiverAddress};
use pd_backend::node::{Output, PeerMemory, Port, Remote, To};
use pd_backend::wire::message::ProcessIdentity;
use pd_backend::wire::{LmcacheMode, Message};

use crate::engine::{Asked, Connection};
use crate::events::{Proc, WorldEvent};
use crate::network::Route;
use crate::process::sender_name;
use crate::world::World;

fn len_in(descriptors: &[u8]) -> u64 {
    u64::from_le_bytes(descriptors.try_into().unwrap())
}

/// Where a receiver listens, whichever life it is in.
pub fn address(receiver: usize) -> ReceiverAddress {
    ReceiverAddress { host: format!("r{receiver}"), init_port: 1, alloc_port: 2 }
}

fn receiver_index(address: &ReceiverAddress) -> usize {
    address.host[1..].parse().unwrap()
}

impl World {
    pub fn on_sender_news(&mut self, at: Proc, news: WorldEvent) {
        let now = self.now;
        match news {
            WorldEvent::Open(_, attempt) => return self.open(at, attempt),
            WorldEvent::Fill(_, attempt, slots) => return self.fill_and_send(at, attempt, &slots),
            WorldEvent::Cancel(_, attempt) => return self.cancel(at, attempt),
            WorldEvent::SenderReset(_, attempt) => return self.sender_resets(at, attempt),
            WorldEvent::Acknowledge(_, attempt) => return self.acknowledge(at, attempt),
            WorldEvent::Met(_, peer) => return self.meet(at, peer),
            WorldEvent::Warm(_, peer) => {
                let refuses = self.plan.engine_refuses;
                let result = if self.fault(refuses) { Err("no memory there".to_owned()) } else { Ok(()) };
                return self.daemons.sender(at.index).node.handle_peer_connected(now, peer, result);
            }
            WorldEvent::Updated(_, peer, connection) => {
                let refuses = self.plan.engine_refuses;
                let result = if self.fault(refuses) { Err("no such memory".to_owned()) } else { Ok(()) };
                return self.daemons.sender(at.index).node.handle_peer_updated(now, peer, connection, result);
            }
            _ => {}
        }
        let open = match &news {
            WorldEvent::ToSender(route, _) => self.links.get(&(at, route.peer)).is_some_and(|link| link.open),
            _ => false,
        };
        // The socket that it listens with says so.
        let lmcache_mode = match &news {
            WorldEvent::Opened(_, peer) => self.lmcache_mode_behind(at, *peer),
            _ => LmcacheMode::Async,
        };
        let sender = self.daemons.sender(at.index);
        let sums = match &news {
            WorldEvent::Done(_, transfer, _) => sender.sums.remove(transfer),
            _ => None,
        };
        let node = &mut sender.node;
        match news {
            WorldEvent::Opened(_, peer) => node.handle_peer_opened(now, peer, lmcache_mode),
            WorldEvent::Closed(_, peer) => node.handle_peer_closed(now, peer, Self::link_failure()),
            WorldEvent::ToSender(route, message) if route.port == Port::Rendezvous => {
                node.handle_port_message(now, route.port, route, *message);
            }
            WorldEvent::ToSender(route, message) if open => {
                node.handle_connection_message(now, route.peer, route.port, *message)
            }
            WorldEvent::Done(_, transfer, good) => {
                let sums = sums.unwrap_or_default();
                // An engine says which of its failures take the connection along.
                let kind =
                    if transfer.0.is_multiple_of(2) { FailureKind::PeerLost } else { FailureKind::TransferFailed };
                let result = if good { Ok(sums) } else { Err(Failure::new(kind, "the engine broke")) };
                node.handle_transfer_done(now, transfer, result);
            }
            WorldEvent::ConnectorGone(_, client) => node.handle_client_gone(now, client),
            _ => {}
        }
    }

    fn meet(&mut self, at: Proc, peer: PeerId) {
        let receiver = self.links[&(at, peer)].receiver;
        let refuses = self.plan.engine_refuses;
        let result = if self.fault(refuses) {
            Err(self.load_failure())
        } else {
            let connection = self.daemons.sender(at.index).fresh_connection();
            let known = Connection { receiver, told_len_bytes: 0, forgotten: false };
            self.daemons.sender(at.index).connections.insert(connection, known);
            Ok(connection)
        };
        self.daemons.sender(at.index).node.handle_loaded(self.now, &Remote::Receiver(peer), result);
    }

    pub fn on_sender_output(&mut self, at: Proc, output: Output<Route>) {
        match output {
            Output::OpenPeer { peer, address } => self.connect(at, peer, receiver_index(&address)),
            Output::ClosePeer(peer) => self.close(at, peer),
            Output::Send { to: To::Peer(peer), port, message } => {
                if let Message::AllocRequest(request) = &message
                    && let Some(pd) = &request.pd
                {
                    self.asked.insert((pd.instance.clone(), pd.seq), Asked::of(request));
                }
                let cut = self.plan.cut;
                let cuts = self.fault(cut);
                if cuts && (!self.has_lmcache() || self.ms(0, 2) == 0) {
                    return self.cut(at, peer);
                }
                let Some(link) = self.links.get(&(at, peer)) else { return };
                let route = Route { sender: at, receiver: link.receiver, peer, port };
                self.note_lmcache_question(route, &message);
                if self.is_lmcache_receiver(route.receiver.index) && cuts {
                    self.transmit(false, route, message);
                    return self.cut(at, peer);
                }
                self.transmit(false, route, message);
            }
            Output::LoadPeer { remote: Remote::Receiver(peer), .. } => {
                let soon = self.ms(0, 20);
                self.schedule(soon, WorldEvent::Met(at, peer));
            }
            Output::ConnectPeer { peer, connection, memory } => {
                let len_bytes = match memory {
                    PeerMemory::Descriptors(descriptors) => len_in(&descriptors),
                    PeerMemory::Pages(pages) => pages.len_bytes(),
                };
                self.tell(at, connection, len_bytes);
                let soon = self.ms(0, 20);
                self.schedule(soon, WorldEvent::Warm(at, peer));
            }
            Output::UpdatePeer { peer, connection, descriptors, .. } => {
                self.tell(at, connection, len_in(&descriptors));
                let soon = self.ms(0, 20);
                self.schedule(soon, WorldEvent::Updated(at, peer, connection));
            }
            Output::CheckProcesses { peer, mut processes } => {
                let there =
                    |process: &ProcessIdentity| Proc { index: process.pid as usize, life: process.start_ticks as u32 };
                processes.retain(|process| !self.sender_lives(there(process)));
                self.tally.vouched += processes.len() as u64;
                self.daemons.sender(at.index).node.handle_processes_ended(self.now, peer, processes);
            }
            Output::Post { transfer, connection, copies, summed, .. } => {
                self.sum(at, transfer, &copies, &summed);
                self.post(at, transfer, connection, copies);
            }
            // No engine here has a GPU.
            Output::Abandon { .. } => {}
            Output::NotifyProxy { request } => self.proxy_hears(at, &request),
            Output::Event { client, event } => self.on_prefill_event(at, client, event),
            output => self.wrong(format!("{} only sends: {output:?}", sender_name(at))),
        }
    }

    fn tell(&mut self, at: Proc, connection: pd_backend::ids::ConnectionId, len_bytes: u64) {
        if let Some(known) = self.daemons.sender(at.index).connections.get_mut(&connection) {
            known.told_len_bytes = known.told_len_bytes.max(len_bytes);
        }
    }
}
