//! A daemon's node, whichever halves it has: what it is told, what it asks of the world, and its timer.

use pd_backend::node::{self, Output, Port, Remote, To};

use crate::decode::is_reader;
use crate::events::{Target, WorldEvent};
use crate::network::Route;
use crate::process::receiver_name;
use crate::world::World;

/// Whether the half that receives says this.
fn is_incoming(output: &Output<Route>) -> bool {
    matches!(
        output,
        Output::Send { to: To::Route(_), .. }
            | Output::LoadPeer { remote: Remote::Sender(_), .. }
            | Output::WatchProcess { .. }
            | Output::UnwatchProcess { .. }
            | Output::Verify { .. }
            | Output::AbandonVerification(_)
            | Output::Note(node::Note::Incoming(_))
    )
}

impl World {
    pub fn on_daemon_news(&mut self, target: Target, news: WorldEvent) {
        match (target, news) {
            (_, WorldEvent::Timer(_)) => {}
            (_, WorldEvent::Grows(_)) => {
                let addresses = self.daemons[target].addresses.clone();
                let (now, result) = (self.now, self.grow(&addresses));
                self.daemons[target].node.handle_grown(now, result);
            }
            (Target::Sender(at), news) => self.on_sender_news(at, news),
            (_, news) => self.on_receiver_news(target.at(), news),
        }
        let now = self.now;
        let node = &mut self.daemons[target].node;
        if node.poll_timeout().is_some_and(|due| due <= now) {
            node.handle_timeout(now);
        }
        let name = self.daemons[target].name.clone();
        while let Some(output) = self.daemons[target].node.poll_output() {
            self.say(|| format!("  {name}: {output:?}"));
            self.on_output(target, output);
        }
        self.arm(target, &name);
    }

    fn on_output(&mut self, target: Target, output: Output<Route>) {
        let at = target.at();
        match output {
            Output::GrowBuffer => {
                let soon = self.ms(0, 20);
                self.schedule(soon, WorldEvent::Grows(target));
            }
            Output::Answer { client, id, answer } if is_reader(client) => {
                self.on_reader_answer(at, client, id, answer);
            }
            Output::Answer { client, id, answer } => self.on_prefill_answer(at, client, id, answer),
            // Of those that it receives from its engine only reads what they are.
            Output::ForgetPeer(connection) if !self.daemons[target].connections.contains_key(&connection) => {}
            Output::ForgetPeer(connection) => self.forget(at, connection),
            Output::OpenSource { peer, address } => self.connect_source(at, peer, &address),
            Output::Send { to: To::Peer(peer), port: Port::Rendezvous, message } => {
                self.say_to_source(at, peer, message)
            }
            Output::Send { to: To::Route(route), port: Port::Rendezvous, message } => self.source_says(route, message),
            Output::ClosePeer(peer) if self.plan.receives(target) && self.close_source(at, peer) => {}
            output if is_incoming(&output) && self.plan.receives(target) => self.on_receiver_output(at, output),
            Output::Note(node::Note::Outgoing(note)) => self.on_guess(&note),
            Output::Note(_) => {}
            output if self.plan.sends(target) => self.on_sender_output(at, output),
            output => self.wrong(format!("{} does not send: {output:?}", receiver_name(at))),
        }
    }

    fn arm(&mut self, target: Target, name: &str) {
        let now = self.now;
        let daemon = &mut self.daemons[target];
        let checked = daemon.node.check_invariants();
        let (due, counts) = (daemon.node.poll_timeout(), daemon.node.counts());
        if let Some(due) = due
            && daemon.process.armed.is_none_or(|armed| armed <= now || due < armed)
        {
            daemon.process.armed = Some(due);
            self.schedule_at(due.max(now), WorldEvent::Timer(target));
        }
        let outgoing_waits = counts.outgoing.is_some_and(|half| half.stages_waiting > 0);
        let incoming_waits = counts.incoming.is_some_and(|half| half.requests_waiting > 0);
        self.tally.both_wait += u64::from(outgoing_waits && incoming_waits);
        self.check(checked.map_err(|text| format!("{name}: {text}")));
    }
}
