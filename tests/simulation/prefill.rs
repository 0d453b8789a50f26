//! The prefill workers' connectors: they open, stage, fill and send, cancel, try again, and vanish.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use pd_backend::ids::{ClientId, FailureKind, RequestId, Seq, SlotPart, StagedSlot};
use pd_backend::node::Answer;
use pd_backend::node::outgoing::{Event, OpenRequest, Sending};
use rand::RngExt;

use crate::events::{Proc, Target, WorldEvent};
use crate::plan;
use crate::process::sender_name;
use crate::sender_io::address;
use crate::truth::content;
use crate::world::World;

/// How much later than its deadline something may happen: what came before it in the same inbox.
pub const SLACK: Duration = Duration::from_millis(60);
/// Longest that a connector takes to fill slots.
const THINK_MS: u64 = 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Opening,
    Open,
    Ended,
}

/// One attempt at a job.
#[derive(Debug)]
pub struct Attempt {
    pub job: usize,
    pub at: Proc,
    pub client: ClientId,
    pub state: State,
    to_stage: VecDeque<u32>,
    /// Its connector has said that it knows of the failure, or was told otherwise: it fills nothing any more.
    pub knows: bool,
    /// What the daemon calls its failure.
    failure: Option<u64>,
    notified: bool,
    due: Instant,
    paused_before: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Open,
    Stage,
    Send,
    Cancel,
    Acknowledge,
    Reset,
}

/// A question to a sender that has not been answered.
#[derive(Debug)]
pub struct Call {
    attempt: usize,
    kind: Kind,
    due: Instant,
    paused_before: Duration,
}

fn bytes_of(slot: &StagedSlot) -> Range<u64> {
    slot.offset_bytes..slot.offset_bytes + slot.len_bytes
}

impl World {
    pub fn start(&mut self, job: usize) {
        let spec = self.jobs[job].clone();
        let (at, to) = (self.sender_at(spec.sender), self.receiver_at(spec.receiver));
        if !self.sender_lives(at) {
            return;
        }
        let attempt = Attempt {
            job,
            at,
            client: spec.client,
            state: State::Ended,
            to_stage: VecDeque::new(),
            knows: false,
            failure: None,
            notified: false,
            due: self.now,
            paused_before: Duration::ZERO,
        };
        self.attempts.push(attempt);
        let index = self.attempts.len() - 1;
        let apart = self.ms(0, if spec.fresh { 2 } else { 120 });
        let decode_first = self.plan.decode_first;
        let (open_after, wait_after) = if self.fault(decode_first) { (apart, 0) } else { (0, apart) };
        self.schedule(open_after, WorldEvent::Open(at, index));
        if spec.parked {
            self.schedule_fetch(job, wait_after);
        } else {
            self.schedule(wait_after, WorldEvent::Wait(to, spec.name.clone()));
        }
        let (cancel, vanish, reader_cancels) = (self.plan.cancel, self.plan.vanish, self.plan.reader_cancels);
        if self.fault(cancel) {
            let after = self.ms(0, 200);
            self.schedule(after, WorldEvent::Cancel(at, index));
        }
        if self.fault(vanish) {
            let after = self.ms(0, 200);
            self.vanish(at, spec.client, after);
        }
        if !spec.parked && self.fault(reader_cancels) {
            let after = self.ms(0, 200);
            self.schedule(after, WorldEvent::ReaderCancels(to, spec.name));
        }
        let resets = self.plan.resets;
        if self.fault(resets) {
            let (one, other) = (self.ms(0, 200), self.ms(0, 200));
            self.schedule(one, WorldEvent::SenderReset(at, index));
            self.schedule(other, WorldEvent::ReceiverReset(to));
        }
        if self.fault(20) {
            self.schedule(wait_after, WorldEvent::Lookup(to));
        }
    }

    /// A connector is gone at once; its daemon hears of it after a while.
    fn vanish(&mut self, at: Proc, client: ClientId, after_ms: u64) {
        self.tally.vanished += 1;
        self.schedule(after_ms, WorldEvent::ConnectorGone(at, client));
        let successor = ClientId(1000 + self.fresh_id());
        for job in &mut self.jobs {
            if job.sender == at.index && job.client == client {
                job.client = successor;
            }
        }
        for attempt in &mut self.attempts {
            if attempt.at == at && attempt.client == client {
                attempt.state = State::Ended;
                attempt.knows = true;
            }
        }
        self.calls.retain(|(owner, other, _), _| (*owner, *other) != (at, client));
        let attempts = &self.attempts;
        self.open.retain(|_, attempt| !(attempts[*attempt].at == at && attempts[*attempt].client == client));
    }

    pub fn attempts_die(&mut self, at: Proc) {
        for attempt in self.attempts.iter_mut().filter(|attempt| attempt.at == at) {
            attempt.state = State::Ended;
            attempt.knows = true;
        }
        self.calls.retain(|(owner, ..), _| *owner != at);
        self.open.retain(|(owner, _), _| *owner != at);
    }

    pub fn call(&mut self, at: Proc, attempt: usize, kind: Kind, within: Duration) -> (ClientId, Seq) {
        let (client, id) = (self.attempts[attempt].client, Seq(self.fresh_id()));
        let paused_before = self.daemons.sender(at.index).process.paused_for;
        let due = self.now + within + SLACK;
        self.calls.insert((at, client, id), Call { attempt, kind, due, paused_before });
        (client, id)
    }

    pub fn open(&mut self, at: Proc, attempt: usize) {
        let spec = self.jobs[self.attempts[attempt].job].clone();
        if self.attempts[attempt].knows {
            return;
        }
        // A connector does not open a name that it has open itself.
        let has_open = self.attempts[..attempt].iter().any(|record| {
            (record.at, record.client) == (at, spec.client)
                && record.state != State::Ended
                && self.jobs[record.job].name == spec.name
        });
        if has_open {
            return;
        }
        // What it was told of the same name's failure, it acknowledges before it opens the name again.
        let earlier: Vec<usize> = (0..attempt)
            .filter(|&earlier| {
                let record = &self.attempts[earlier];
                (record.at, record.client, record.state) == (at, spec.client, State::Ended)
                    && self.jobs[record.job].name == spec.name
            })
            .collect();
        earlier.into_iter().for_each(|earlier| self.acknowledge(at, earlier));
        if spec.parked {
            return self.park(at, attempt);
        }
        self.attempts[attempt].state = State::Opening;
        let within = 2 * plan::HANDSHAKE + plan::ALLOCATION + 2 * plan::COMMIT;
        let (client, id) = self.call(at, attempt, Kind::Open, within);
        let stage = self.rng.random_bool(0.5);
        let open = OpenRequest {
            id: spec.name,
            keys: spec.keys,
            groups: spec.groups,
            last_chunk_tokens: spec.last_tokens,
            receiver: address(spec.receiver),
            wait: None,
            stage,
        };
        self.daemons.sender(at.index).node.handle_open(self.now, client, id, open);
    }

    pub fn cancel(&mut self, at: Proc, attempt: usize) {
        // One that is being cancelled is not cancelled again.
        let cancels = |call: &Call| call.attempt == attempt && call.kind == Kind::Cancel;
        if self.attempts[attempt].state == State::Ended || self.calls.values().any(cancels) {
            return;
        }
        let (client, id) = self.call(at, attempt, Kind::Cancel, plan::COMMIT);
        let name = self.jobs[self.attempts[attempt].job].name.clone();
        self.daemons.sender(at.index).node.handle_cancel(self.now, client, id, &name);
    }

    pub fn sender_resets(&mut self, at: Proc, attempt: usize) {
        let (client, id) = self.call(at, attempt, Kind::Reset, Duration::ZERO);
        self.daemons.sender(at.index).truth.reset();
        self.daemons.sender(at.index).node.handle_reset(self.now, client, id);
    }

    pub fn acknowledge(&mut self, at: Proc, attempt: usize) {
        if self.attempts[attempt].knows {
            return;
        }
        self.attempts[attempt].knows = true;
        let (client, id) = self.call(at, attempt, Kind::Acknowledge, Duration::ZERO);
        let name = self.jobs[self.attempts[attempt].job].name.clone();
        self.daemons.sender(at.index).node.handle_acknowledge(
            self.now,
            client,
            id,
            &name,
            self.attempts[attempt].failure,
        );
    }

    pub fn fill_and_send(&mut self, at: Proc, attempt: usize, slots: &[StagedSlot]) {
        if self.attempts[attempt].knows {
            return;
        }
        let spec = self.jobs[self.attempts[attempt].job].clone();
        let mut parts = Vec::new();
        for slot in slots {
            let (bytes, range) = (content(&spec.keys[slot.chunk as usize], slot.len_bytes), bytes_of(slot));
            let truth = &mut self.daemons.sender(at.index).truth;
            truth.memory[range.start as usize..range.end as usize].copy_from_slice(&bytes);
            truth.filling.retain(|(_, other)| *other != range);
            let cut = self.rng.random_range(0..slot.len_bytes);
            if cut > 0 {
                parts.push(SlotPart { slot: slot.slot, offset_bytes: cut, len_bytes: None });
                parts.push(SlotPart { slot: slot.slot, offset_bytes: 0, len_bytes: Some(cut) });
            } else {
                parts.push(SlotPart { slot: slot.slot, offset_bytes: 0, len_bytes: None });
            }
        }
        if self.attempts[attempt].state != State::Open {
            return;
        }
        if spec.parked {
            let chunks = slots.iter().map(|slot| (bytes_of(slot), spec.keys[slot.chunk as usize].clone())).collect();
            self.daemons.sender(at.index).truth.park(sender_name(at), spec.name.clone(), chunks);
        }
        let last = self.attempts[attempt].to_stage.is_empty();
        let (client, id) = self.call(at, attempt, Kind::Send, Duration::ZERO);
        self.daemons.sender(at.index).node.handle_send(
            self.now,
            client,
            id,
            &spec.name,
            Sending { parts: &parts, last, after: None },
        );
        if !last {
            self.stage(at, attempt);
        }
    }

    fn stage(&mut self, at: Proc, attempt: usize) {
        // As much as a daemon that sends and receives is sure of.
        let half = self.plan.receiver_slots / 2;
        let sure = if self.plan.parked > 0 { half - half / 2 } else { half };
        let sure = if self.plan.both > 0 { sure.min(4) } else { 2 };
        let portion = self.rng.random_range(1..=sure);
        let record = &mut self.attempts[attempt];
        let chunks: Vec<u32> = (0..portion).filter_map(|_| record.to_stage.pop_front()).collect();
        let name = self.jobs[record.job].name.clone();
        if chunks.is_empty() {
            let (client, id) = self.call(at, attempt, Kind::Send, Duration::ZERO);
            self.daemons.sender(at.index).node.handle_send(
                self.now,
                client,
                id,
                &name,
                Sending { parts: &[], last: true, after: None },
            );
        } else {
            let (client, id) = self.call(at, attempt, Kind::Stage, plan::ALLOCATION);
            self.daemons.sender(at.index).node.handle_stage(self.now, client, id, &name, chunks, None);
        }
    }

    pub fn on_prefill_answer(&mut self, at: Proc, client: ClientId, id: Seq, answer: Answer) {
        let Some(call) = self.calls.remove(&(at, client, id)) else {
            // Whoever vanished misses its answers.
            let known =
                self.attempts.iter().any(|attempt| attempt.at == at && attempt.client == client && !attempt.knows);
            if known {
                self.wrong(format!(
                    "{} answers {id} of client {client} twice, or unasked: {answer:?}",
                    sender_name(at)
                ));
            }
            return;
        };
        let paused = self.daemons.sender(at.index).process.paused_for.saturating_sub(call.paused_before);
        if self.now > call.due + paused {
            self.wrong(format!(
                "{:?} of q{} was answered too late: {answer:?}",
                call.kind, self.attempts[call.attempt].job
            ));
        }
        let attempt = call.attempt;
        match (call.kind, answer) {
            (Kind::Open, Answer::Opened { already_sent, slots, .. }) => self.opened(at, attempt, &already_sent, slots),
            (Kind::Open, Answer::Failed { failure, .. }) => {
                self.end_attempt(attempt, Some(failure.kind));
                self.attempts[attempt].knows = true;
            }
            (Kind::Stage, Answer::Staged { slots }) => {
                self.staged(at, attempt, &slots);
                let after = self.think_ms();
                self.schedule(after, WorldEvent::Fill(at, attempt, slots));
            }
            // Staging timed out: the connector gives the request up.
            (Kind::Stage, Answer::Failed { failure, .. }) if failure.kind == FailureKind::NoSlots => {
                self.schedule(0, WorldEvent::Cancel(at, attempt));
            }
            (Kind::Stage | Kind::Send, Answer::Failed { failure, .. }) => {
                if self.attempts[attempt].state == State::Open && failure.kind == FailureKind::BadRequest {
                    self.wrong(format!("a well-behaved connector is told: {failure}"));
                }
            }
            (Kind::Send, Answer::Accepted) => {}
            (Kind::Cancel, Answer::Cancelled { .. }) => {
                self.tally.cancelled += 1;
                if self.attempts[attempt].state != State::Ended {
                    self.end_attempt(attempt, Some(FailureKind::Cancelled));
                }
                self.attempts[attempt].knows = true;
            }
            (Kind::Cancel, Answer::Failed { failure, .. }) => match failure.kind {
                FailureKind::Deadline if self.attempts[attempt].state != State::Ended => {
                    self.end_attempt(attempt, Some(FailureKind::Cancelled));
                    self.attempts[attempt].knows = true;
                }
                FailureKind::Deadline => {}
                FailureKind::Unknown if self.attempts[attempt].state == State::Ended => {}
                _ => self.wrong(format!("a cancel of an open request fails: {failure}")),
            },
            (Kind::Acknowledge, Answer::Cancelled { .. }) | (Kind::Reset, Answer::Reset) => {}
            (kind, answer) => self.wrong(format!("{kind:?} is answered by {answer:?}")),
        }
    }

    /// A connector may fill these from now on.
    fn staged(&mut self, at: Proc, attempt: usize, slots: &[StagedSlot]) {
        for range in slots.iter().map(bytes_of) {
            let in_use = self.in_use(Target::Sender(at));
            let truth = &mut self.daemons.sender(at.index).truth;
            let taken = truth.take(&range, &in_use);
            truth.filling.push((attempt, range));
            self.check(taken.map_err(|text| format!("staged for attempt {attempt}: {text}")));
        }
    }

    /// How long a connector fills slots.
    fn think_ms(&mut self) -> u64 {
        let most = if self.settling { 3 } else { THINK_MS };
        self.ms(0, most)
    }

    fn opened(&mut self, at: Proc, attempt: usize, already_sent: &[u32], slots: Vec<StagedSlot>) {
        let spec = &self.jobs[self.attempts[attempt].job];
        let (name, spec_parked) = (spec.name.clone(), spec.parked);
        let count = spec.keys.len() as u32;
        let paused = self.daemons.sender(at.index).process.paused_for;
        let record = &mut self.attempts[attempt];
        if record.state != State::Opening {
            return self.wrong(format!("{name} is opened twice, or after its end"));
        }
        record.state = State::Open;
        let to_send: VecDeque<u32> = (0..count).filter(|chunk| !already_sent.contains(chunk)).collect();
        record.due = self.now + plan::WRITE + plan::COMMIT + SLACK + self.plan.patience();
        record.paused_before = paused;
        let staged = !slots.is_empty();
        let right = !staged || slots.iter().map(|slot| slot.chunk).eq(to_send.iter().copied());
        if !staged {
            record.to_stage = to_send;
        }
        self.open.insert((at, name.clone()), attempt);
        if !right {
            return self.wrong(format!("{name} is opened with slots for other chunks than those to send: {slots:?}"));
        }
        // Nothing is written of what is parked, and prefill has as much time as it takes.
        if spec_parked {
            self.attempts[attempt].due = self.now + Duration::from_secs(3600);
        }
        if staged {
            self.staged(at, attempt, &slots);
            let after = self.think_ms();
            self.schedule(after, WorldEvent::Fill(at, attempt, slots));
        } else {
            self.stage(at, attempt);
        }
    }

    pub fn on_prefill_event(&mut self, at: Proc, client: ClientId, event: Event) {
        let (request, failed) = match &event {
            Event::Sent { request, .. } | Event::Parked { request, .. } => (request, None),
            Event::Failed { request, failure, attempt, .. } => (request, Some((failure.kind, *attempt))),
        };
        let attempt = self.open.get(&(at, request.clone())).copied();
        let Some(attempt) = attempt.filter(|&attempt| self.attempts[attempt].client == client) else {
            let gone =
                !self.attempts.iter().any(|attempt| attempt.at == at && attempt.client == client && !attempt.knows);
            if !gone {
                self.wrong(format!("{} tells {client} of the end of {request}, which is not open", sender_name(at)));
            }
            return;
        };
        self.end_attempt(attempt, failed.map(|(kind, _)| kind));
        self.attempts[attempt].failure = failed.map(|(_, number)| number);
        if failed.is_some() {
            // The connector reads it a while later, and says so; until then it may be filling slots.
            let after = self.ms(0, 30);
            self.schedule(after, WorldEvent::Acknowledge(at, attempt));
        } else {
            self.attempts[attempt].knows = true;
        }
    }

    /// The one end of an attempt.
    fn end_attempt(&mut self, attempt: usize, failed: Option<FailureKind>) {
        let record = &mut self.attempts[attempt];
        let (job, at, notified) = (record.job, record.at, record.notified);
        let name = self.jobs[job].name.clone();
        let was = std::mem::replace(&mut record.state, State::Ended);
        if was == State::Ended {
            return self.wrong(format!("{name} ends twice"));
        }
        let paused = self.daemons.sender(at.index).process.paused_for.saturating_sub(record.paused_before);
        if was == State::Open && self.now > record.due + paused {
            self.wrong(format!("{name} ends {failed:?} after its deadline"));
        }
        if self.open.get(&(at, name.clone())) == Some(&attempt) {
            self.open.remove(&(at, name.clone()));
        }
        match failed {
            None if self.jobs[job].parked => self.tally.parked += 1,
            None => {
                self.tally.sent += 1;
                if !notified {
                    self.wrong(format!("{name} is sent, and the proxy never heard of it"));
                }
            }
            Some(kind) => {
                let not_taken = self.jobs[job].unsolicited;
                self.tally.failed += u64::from(!not_taken);
                self.tally.not_taken += u64::from(not_taken);
                if notified {
                    self.wrong(format!("{name} failed ({kind}), and the proxy was told that it is ready"));
                }
                if self.jobs[job].fresh {
                    self.wrong(format!("{name} failed ({kind}) in a world without faults"));
                }
                let retry = self.plan.retry;
                if self.jobs[job].tries_left > 0 && self.fault(retry) {
                    self.jobs[job].tries_left -= 1;
                    let after = self.ms(0, 200);
                    self.schedule(after, WorldEvent::Start(job));
                }
            }
        }
    }

    pub fn proxy_hears(&mut self, at: Proc, request: &RequestId) {
        let to_lmcache = self.lmcache.asked_by_ours.remove(&(at, request.clone()));
        if let Some((receiver, keys)) = to_lmcache {
            let after = self.ms(0, 80);
            self.schedule(after, WorldEvent::LmcacheRead(receiver, at, request.clone(), keys));
            return self.proxy_heard(at, request);
        }
        let announced = self.committed.get_mut(&(sender_name(at), request.clone())).filter(|left| **left > 0);
        match announced {
            Some(left) => *left -= 1,
            None => return self.wrong(format!("the proxy hears of {request} before it is ready at its receiver")),
        }
        self.proxy_heard(at, request);
    }

    /// The proxy hears that a request does not come.
    pub fn proxy_hears_of_failure(&mut self, at: Proc, request: &RequestId) {
        if let Some(&attempt) = self.open.get(&(at, request.clone()))
            && self.attempts[attempt].notified
        {
            self.wrong(format!("the proxy hears that {request} failed, and it was ready"));
        }
    }

    fn proxy_heard(&mut self, at: Proc, request: &RequestId) {
        if let Some(&attempt) = self.open.get(&(at, request.clone()))
            && std::mem::replace(&mut self.attempts[attempt].notified, true)
        {
            self.wrong(format!("the proxy hears of {request} twice"));
        }
    }

    pub fn check_calls_ended(&mut self) {
        if let Some(((at, client, id), call)) = self.calls.first_key_value() {
            let text = format!("{} never answers {id} of client {client}: {call:?}", sender_name(*at));
            self.wrong(text);
        }
        if let Some(((at, name), _)) = self.open.first_key_value() {
            let text = format!("{name} of {} never ends", sender_name(*at));
            self.wrong(text);
        }
        if let Some((key, reading)) = self.readings.first_key_value() {
            let text = format!("{key:?} waits for ever: {reading:?}");
            self.wrong(text);
        }
        let unread: Vec<RequestId> = self.jobs.iter().filter(|job| job.fresh).map(|job| job.name.clone()).collect();
        for name in unread {
            if !self.fresh_fetched.contains(&name) {
                self.wrong(format!("{name} was never fetched"));
            }
        }
    }
}
