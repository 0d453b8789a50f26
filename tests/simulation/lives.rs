//! The lives of processes, ours and LMCache's: they crash and begin again, and stand still.

use std::collections::VecDeque;
use std::time::Duration;

use rand::RngExt;

use crate::events::{Proc, Target, WorldEvent};
use crate::lmcache_receiver::LmcacheReceiver;
use crate::lmcache_sender::LmcacheSender;
use crate::process::{Process, new_daemon, sender_name};
use crate::world::World;

impl World {
    fn process_of(&self, sender: bool, index: usize) -> &Process {
        let at = Proc { index, life: 0 };
        match (sender, self.plan.senders, self.plan.receivers) {
            (true, ours, _) if index < ours => &self.daemons[Target::Sender(at)].process,
            (true, ours, _) => &self.lmcache.senders[index - ours].process,
            (false, _, ours) if index < ours => &self.daemons[Target::Receiver(at)].process,
            (false, _, ours) => &self.lmcache.receivers[index - ours].process,
        }
    }

    /// A process of ours or of LMCache's, whichever life it is in.
    pub fn process(&mut self, sender: bool, index: usize) -> &mut Process {
        match (sender, self.plan.senders, self.plan.receivers) {
            (true, ours, _) if index < ours => &mut self.daemons.sender(index).process,
            (true, ours, _) => &mut self.lmcache.senders[index - ours].process,
            (false, _, ours) if index < ours => &mut self.daemons.receiver(index).process,
            (false, _, ours) => &mut self.lmcache.receivers[index - ours].process,
        }
    }

    pub fn sender_at(&self, index: usize) -> Proc {
        Proc { index, life: self.process_of(true, index).life }
    }

    pub fn receiver_at(&self, index: usize) -> Proc {
        Proc { index, life: self.process_of(false, index).life }
    }

    fn target(&self, sender: bool, index: usize) -> Target {
        if sender { Target::Sender(self.sender_at(index)) } else { Target::Receiver(self.receiver_at(index)) }
    }

    pub fn sender_lives(&self, at: Proc) -> bool {
        let process = self.process_of(true, at.index);
        process.alive && process.life == at.life
    }

    pub fn receiver_lives(&self, at: Proc) -> bool {
        let process = self.process_of(false, at.index);
        process.alive && process.life == at.life
    }

    pub fn crash(&mut self, sender: bool, index: usize) {
        if self.settling {
            return;
        }
        let restart = self.ms(1, 400);
        if !self.stop(sender, index) {
            return;
        }
        self.tally.crashes += 1;
        self.schedule(restart, WorldEvent::Restart(sender, index));
    }

    /// A process ends. False: it had ended before.
    pub fn stop(&mut self, sender: bool, index: usize) -> bool {
        let target = self.target(sender, index);
        let at = target.at();
        if !self.process(sender, index).alive {
            return false;
        }
        self.process(sender, index).alive = false;
        if self.plan.sends(target) {
            self.writes_die(at);
            self.attempts_die(at);
            self.lmcache_attempts_die(at);
            self.links_of_sender_die(at);
            self.source_links_of_sender_die(at);
            for receiver in 0..self.plan.receivers {
                if self.daemons.receiver(receiver).watched.contains(&sender_name(at)) {
                    let (after, to) = (self.ms(1, 250), self.receiver_at(receiver));
                    self.schedule(after, WorldEvent::ProcessEnded(to, sender_name(at)));
                }
            }
        }
        if self.plan.receives(target) {
            self.readings_die(at);
            self.lmcache_questions_die(at);
            self.links_of_receiver_die(at);
            self.source_links_of_receiver_die(at);
        }
        true
    }

    pub fn restart(&mut self, sender: bool, index: usize) {
        let at = Proc { index, life: self.process(sender, index).life + 1 };
        match sender {
            true if self.is_lmcache_sender(index) => {
                let mode = self.lmcache_sender(index).mode;
                *self.lmcache_sender(index) = LmcacheSender::new(at, mode);
            }
            true => *self.daemons.sender(index) = new_daemon(&self.plan, Target::Sender(at), self.now),
            false if self.is_lmcache_receiver(index) => {
                let mode = self.lmcache_receiver(index).mode;
                *self.lmcache_receiver(index) = LmcacheReceiver::new(at, mode);
            }
            false => *self.daemons.receiver(index) = new_daemon(&self.plan, Target::Receiver(at), self.now),
        }
    }

    pub fn pause(&mut self, sender: bool, index: usize, length_ms: u64) {
        let target = self.target(sender, index);
        let settling = self.settling;
        let process = self.process(sender, index);
        if settling || !process.alive || process.paused.is_some() {
            return;
        }
        process.paused = Some(VecDeque::new());
        process.paused_for += Duration::from_millis(length_ms);
        self.tally.pauses += 1;
        self.schedule(length_ms, WorldEvent::Resume(target));
    }

    /// Everything that has come meanwhile is handled now, deadlines before it or after its first.
    pub fn resume(&mut self, target: Target) {
        let process = match target {
            Target::Sender(at) if self.sender_lives(at) => self.process(true, at.index),
            Target::Receiver(at) if self.receiver_lives(at) => self.process(false, at.index),
            _ => return,
        };
        let unread = process.paused.take().unwrap_or_default();
        process.armed = None;
        let timer = WorldEvent::Timer(target);
        if self.rng.random_bool(0.5) {
            self.handle(target, timer.clone());
        }
        for news in unread {
            self.handle(news.target(), news);
        }
        self.handle(target, timer);
    }
}
