//! A receiver's session and what it asks of the world.

use std::ops::Range;

use pd_backend::ids::{Checksum, ChunkKey, FailureKind};
use pd_backend::node::incoming::{ExpectedChunk, IncomingNote};
use pd_backend::node::{self, Output, Port, Remote, To};
use pd_backend::wire::message::AllocResponse;
use pd_backend::wire::{LmcacheMode, Message};

use crate::events::{Proc, Target, WorldEvent};
use crate::network::Route;
use crate::process::{receiver_name, sender_name};
use crate::truth::Grant;
use crate::world::World;

/// Whether a receiver gave an LMCache sender this name.
fn is_lmcaches(instance: &str) -> bool {
    instance.starts_with("lmcache-")
}

/// How far apart an engine that sums says so.
const VERIFYING_EVERY_MS: u64 = 50;

impl World {
    pub fn on_receiver_news(&mut self, at: Proc, news: WorldEvent) {
        let now = self.now;
        match news {
            WorldEvent::Wait(_, request) => return self.wait(at, request),
            WorldEvent::AskParked(_, ask) => return self.ask_parked(at, &ask),
            WorldEvent::ReleaseParked(_, job, name) => return self.release_parked(at, job, name),
            WorldEvent::ReadUncommitted(_, attempt, named) => return self.read_uncommitted(at, attempt, named),
            WorldEvent::Lookup(_) => return self.lookup(at),
            WorldEvent::LookAhead(_, job) => return self.look_ahead(at, job),
            WorldEvent::ReaderCancels(_, request) => return self.reader_cancels(at, &request),
            WorldEvent::ReceiverReset(_) => return self.receiver_resets(at),
            WorldEvent::Release(_, client, lease) => return self.release(at, client, lease),
            WorldEvent::ReaderGone(_, client) => return self.reader_gone(at, client),
            WorldEvent::ReceiverLoads(_, instance) => {
                let refuses = self.plan.engine_refuses;
                let result = if self.fault(refuses) {
                    Err(self.load_failure())
                } else {
                    Ok(self.daemons.receiver(at.index).fresh_connection())
                };
                return self.daemons.receiver(at.index).node.handle_loaded(now, &Remote::Sender(instance), result);
            }
            WorldEvent::Verified(_, request, grant, chunks) => {
                let corrupted = self.corrupted(at, &chunks);
                return self.daemons.receiver(at.index).node.handle_verified(now, &request, grant, &corrupted);
            }
            _ => {}
        }
        if let WorldEvent::ToReceiver(route, _) = &news
            && self.is_lmcache_sender(route.sender.index)
        {
            self.lmcache_question_arrives(*route);
        }
        let node = &mut self.daemons.receiver(at.index).node;
        match news {
            WorldEvent::ToReceiver(route, message) if route.port == Port::Rendezvous => {
                node.handle_connection_message(now, route.peer, route.port, *message);
            }
            WorldEvent::SourceOpened(_, peer) => node.handle_peer_opened(now, peer, LmcacheMode::Async),
            WorldEvent::SourceClosed(_, peer) => node.handle_peer_closed(now, peer, Self::link_failure()),
            WorldEvent::ToReceiver(route, message) => node.handle_port_message(now, route.port, route, *message),
            WorldEvent::Verifying(_) => node.handle_verifying(now),
            WorldEvent::RouteGone(route) => node.handle_route_gone(now, &route),
            WorldEvent::ProcessEnded(_, instance) => {
                self.daemons.receiver(at.index).watched.remove(&instance);
                self.daemons.receiver(at.index).node.handle_process_ended(now, &instance);
            }
            _ => {}
        }
    }

    pub fn on_receiver_output(&mut self, at: Proc, output: Output<Route>) {
        if let Output::Note(node::Note::Incoming(note)) = &output
            && self.has_lmcache()
        {
            self.lmcache_request_noted(at, note);
        }
        match output {
            Output::Send { to: To::Route(to), port, message } if self.is_lmcache_sender(to.sender.index) => {
                let route = Route { port, ..to };
                self.lmcache_sender_is_told(at, route, &message);
                self.transmit(true, route, message);
            }
            Output::Send { to: To::Route(to), port, message } => {
                match &message {
                    Message::AllocResponse(response) => self.note_grant(at, to, response),
                    Message::PdVerifying(_) => self.tally.verifying += 1,
                    _ => {}
                }
                self.transmit(true, Route { port, ..to }, message);
            }
            Output::LoadPeer { remote: Remote::Sender(instance), .. } => {
                let soon = self.ms(0, 20);
                self.schedule(soon, WorldEvent::ReceiverLoads(at, instance));
            }
            Output::WatchProcess { .. } if !self.plan.same_host && !self.plan.sends(Target::Receiver(at)) => {}
            Output::UnwatchProcess { instance } => drop(self.daemons.receiver(at.index).watched.remove(&instance)),
            Output::WatchProcess { instance, process } => {
                if !self.daemons.receiver(at.index).watched.insert(instance.clone()) {
                    return;
                }
                let watched = Proc { index: process.pid as usize, life: process.start_ticks as u32 };
                if !self.sender_lives(watched) {
                    let after = self.ms(1, 50);
                    self.schedule(after, WorldEvent::ProcessEnded(at, instance));
                }
            }
            Output::Verify { request, grant, chunks } => {
                let takes_ms = self.verification_ms();
                for told_ms in (VERIFYING_EVERY_MS..takes_ms).step_by(VERIFYING_EVERY_MS as usize) {
                    self.schedule(told_ms, WorldEvent::Verifying(at));
                }
                self.schedule(takes_ms, WorldEvent::Verified(at, request, grant, chunks));
            }
            // The session takes no notice of a result that comes all the same.
            Output::AbandonVerification(_) => {}
            Output::Note(node::Note::Incoming(note)) => self.on_receiver_note(at, note),
            output => self.wrong(format!("{} only receives: {output:?}", receiver_name(at))),
        }
    }

    fn on_receiver_note(&mut self, at: Proc, note: IncomingNote<Route>) {
        match note {
            // Of an LMCache sender's, which a reader takes uncommitted.
            IncomingNote::Committed { instance, .. } if is_lmcaches(&instance) => {}
            IncomingNote::Committed { request, instance, .. } => {
                let under_way = self.under_way(at);
                let checked = self.daemons.receiver(at.index).truth.commit(&instance, &request, &under_way);
                self.check(checked);
                *self.committed.entry((instance, request)).or_default() += 1;
            }
            IncomingNote::ArrivedAhead { request, instance, .. } => {
                let under_way = self.under_way(at);
                let checked = self.daemons.receiver(at.index).truth.commit(&instance, &request, &under_way);
                self.check(checked);
            }
            IncomingNote::Granted { request, .. } => self.attempt_begins(at, &request),
            // A sender that is not known shakes hands anew, and asks again.
            IncomingNote::Refused { failure, instance, .. }
                if failure.kind == FailureKind::HandshakeRefused && !is_lmcaches(&instance) => {}
            IncomingNote::Failed { request, .. } | IncomingNote::Refused { request: Some(request), .. } => {
                self.attempt_ends(at, request, false)
            }
            IncomingNote::Fetched { request, .. } => self.attempt_ends(at, request, true),
            _ => {}
        }
    }

    /// How long a receiver's engine sums the chunks of a commit.
    fn verification_ms(&mut self) -> u64 {
        let most_ms = self.plan.verify_ms;
        // The last requests are to be served while their readers wait, whatever came before.
        if self.settling && self.plan.retry > 0 { self.ms(0, 20) } else { self.ms(most_ms / 3, most_ms + 1) }
    }

    /// The chunks that are not as they were sent.
    fn corrupted(&self, at: Proc, chunks: &[ExpectedChunk]) -> Vec<u32> {
        let memory = &self.daemons[Target::Receiver(at)].truth.memory;
        let bytes = |start: u64, len_bytes: u64| &memory[start as usize..(start + len_bytes) as usize];
        let differs =
            |chunk: &&ExpectedChunk| Checksum::of(bytes(chunk.offset_bytes, chunk.len_bytes)) != chunk.checksum;
        chunks.iter().filter(differs).map(|chunk| chunk.index).collect()
    }

    /// The receiver lets somebody write.
    fn note_grant(&mut self, at: Proc, to: Route, response: &AllocResponse) {
        let Some(pd) = &response.pd else { return };
        let Some(grant) = pd.grant else { return };
        let instance = sender_name(to.sender);
        let Some(asked) = self.asked.get(&(instance.clone(), pd.seq)).cloned() else {
            return self.wrong(format!("{grant} answers an allocation that {instance} never made"));
        };
        let skip = &response.already_sent_indexes;
        let own = asked.chunks.iter().enumerate().filter(|(index, _)| !skip.contains(&(*index as u32)));
        let chunks: Vec<(Range<u64>, ChunkKey)> = own
            .zip(&pd.offsets)
            .map(|((_, (key, len_bytes)), &offset)| (offset..offset + len_bytes, key.clone()))
            .collect();
        let record = Grant { instance, request: asked.request, chunks, committed: false, page: false };
        let in_use = self.in_use(Target::Receiver(at));
        let checked = self.daemons.receiver(at.index).truth.grant(Some(grant), record, &in_use);
        self.check(checked);
    }
}
