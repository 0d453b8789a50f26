//! The lives of processes, ours and LMCache's: they crash and begin again, and stand still.

use std::collections::VecDeque;
use std::time::Duration;

use rand::RngExt;

use crate::events::{Proc, Target, WorldEvent};
use crate::lmcache_receiver::LmcacheReceiver;
use crate::lmcache_sender::LmcacheSender;
use crate::process::{Process, new_receiver, new_sender, sender_name};
use crate::world::World;

impl World {
    fn sender_process(&self, index: usize) -> &Process {
        let ours = self.senders.get(index).map(|sender| &sender.process);
        ours.unwrap_or_else(|| &self.lmcache.senders[index - self.senders.len()].process)
    }

    fn receiver_process(&self, index: usize) -> &Process {
        let ours = self.receivers.get(index).map(|receiver| &receiver.process);
        ours.unwrap_or_else(|| &self.lmcache.receivers[index - self.receivers.len()].process)
    }

    /// A process of ours or of LMCache's, whichever life it is in.
    pub fn process(&mut self, sender: bool, index: usize) -> &mut Process {
        match (sender, self.senders.len(), self.receivers.len()) {
            (true, ours, _) if index < ours => &mut self.senders[index].process,
            (true, ours, _) => &mut self.lmcache.senders[index - ours].process,
            (false, _, ours) if index < ours => &mut self.receivers[index].process,
            (false, _, ours) => &mut self.lmcache.receivers[index - ours].process,
        }
    }

    pub fn sender_at(&self, index: usize) -> Proc {
        Proc { index, life: self.sender_process(index).life }
    }

    pub fn receiver_at(&self, index: usize) -> Proc {
        Proc { index, life: self.receiver_process(index).life }
    }

    pub fn sender_lives(&self, at: Proc) -> bool {
        let process = self.sender_process(at.index);
        process.alive && process.life == at.life
    }

    pub fn receiver_lives(&self, at: Proc) -> bool {
        let process = self.receiver_process(at.index);
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
        let at = if sender { self.sender_at(index) } else { self.receiver_at(index) };
        if !self.process(sender, index).alive {
            return false;
        }
        self.process(sender, index).alive = false;
        if sender {
            self.writes_die(at);
            self.attempts_die(at);
            self.lmcache_attempts_die(at);
            self.links_of_sender_die(at);
            if self.plan.same_host {
                for receiver in 0..self.receivers.len() {
                    if self.receivers[receiver].watched.contains(&sender_name(at)) {
                        let (after, to) = (self.ms(1, 250), self.receiver_at(receiver));
                        self.schedule(after, WorldEvent::ProcessEnded(to, sender_name(at)));
                    }
                }
            }
        } else {
            self.readings_die(at);
            self.lmcache_questions_die(at);
            self.links_of_receiver_die(at);
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
            true => self.senders[index] = new_sender(&self.plan, at, self.now),
            false if self.is_lmcache_receiver(index) => {
                let mode = self.lmcache_receiver(index).mode;
                *self.lmcache_receiver(index) = LmcacheReceiver::new(at, mode);
            }
            false => self.receivers[index] = new_receiver(&self.plan, at, self.now),
        }
    }

    pub fn pause(&mut self, sender: bool, index: usize, length_ms: u64) {
        let target =
            if sender { Target::Sender(self.sender_at(index)) } else { Target::Receiver(self.receiver_at(index)) };
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
        let timer = match target {
            Target::Sender(at) => WorldEvent::SenderTimer(at),
            Target::Receiver(at) => WorldEvent::ReceiverTimer(at),
            Target::World => return,
        };
        if self.rng.random_bool(0.5) {
            self.handle(target, timer.clone());
        }
        for news in unread {
            self.handle(target, news);
        }
        self.handle(target, timer);
    }
}
