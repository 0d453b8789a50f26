//! Chunks that a sender has parked: this half asks for them, has them kept while decode waits its turn, or gives them up.
//!
//! A question is said again once in a heartbeat until it is over, which is also how either side knows that the other is there.
//! What is asked for comes as any request: the sender asks for room, under the name that was given here.

use std::time::Duration;

use super::{Incoming, IncomingNote, IncomingTimer, Port};
use crate::ids::{
    ChunkKey, ClientId, Failure, FailureKind, PeerId, REQUEST_IDS_MAX, Registration, RequestId, Seq, SourceAddress,
    truncate,
};
use crate::node::Answer;
use crate::node::core::Core;
use crate::node::output::To;
use crate::wire::Message;
use crate::wire::message::{Register, Registered, ReleaseParked};

/// How often a sender is told that its chunks are not wanted, if it does not answer. Its lease ends by itself.
const RELEASES_MAX: u32 = 3;

/// What a reader wants of a sender's parked chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchRequest {
    /// What it is called here; the sender uses this name when it sends.
    pub id: RequestId,
    /// Where the chunks are: the sender's rendezvous port.
    pub source: SourceAddress,
    /// What the prefill server calls the request, as far as is known.
    pub ids: Vec<RequestId>,
    /// The chunks that the reader lacks, in the order of the prompt.
    pub keys: Vec<ChunkKey>,
    /// How long the sender may wait for a request that it does not know yet; 0 if prefill has ended already.
    pub register_wait: Duration,
}

/// A question to a sender.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) source: PeerId,
    seq: Seq,
    ids: Vec<RequestId>,
    keys: Vec<ChunkKey>,
    purpose: Purpose,
    /// Whether the sender has said that it knows the question.
    answered: bool,
    /// Whether it is asked by a connection that was there before: that one may have ended without a word.
    by_kept: bool,
}

/// What a question is for.
#[derive(Debug)]
enum Purpose {
    /// The chunks are to come now. Whoever wants them waits for the request.
    Now { wait: Duration },
    /// They are to be kept. Its client is answered once.
    Hold { client: ClientId, question: Option<Seq>, wait: Duration },
    /// They are not wanted any more; said so often.
    Release(u32),
}

impl Fetch {
    /// Whether the connection that it was asked by may have ended before that.
    pub(super) const fn may_be_asked_anew(&self) -> bool {
        self.by_kept && !self.answered
    }
}

impl<R: Clone + PartialEq> Incoming<R> {
    /// A reader wants parked chunks, and room is here. Answered as a wait for the request is: by what has come of it.
    pub(in crate::node) fn handle_fetch(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        fetch: FetchRequest,
        wait: Option<Duration>,
    ) {
        let name = fetch.id.clone();
        // Another sample of the same request may have asked: what comes is for both.
        let asked = |asked: &Fetch| matches!(asked.purpose, Purpose::Now { .. });
        let is_new = !self.requests.contains_key(&name) && !self.fetches.get(&name).is_some_and(asked);
        if is_new && let Err(failure) = self.check_fetch(core, &fetch) {
            return core.refuse(client, id, failure, Some(fetch.source.to_string()));
        }
        if is_new {
            // How an earlier attempt under this name ended is nothing to this one.
            self.ended.forget(&name);
        }
        let source = fetch.source.clone();
        // First, so that whatever ends it ends the wait as well.
        self.handle_wait(core, client, id, name.clone(), wait, false);
        if is_new && self.waiters.contains(client, id) {
            let wait = fetch.register_wait;
            if let Err(failure) = self.begin_fetch(core, fetch, Purpose::Now { wait }) {
                self.tell_end(core, name, failure, source.to_string(), None);
            }
        }
    }

    /// A reader will want parked chunks, when it has room: they are to be kept until then.
    pub(in crate::node) fn handle_hold(&mut self, core: &mut Core<R>, client: ClientId, id: Seq, fetch: FetchRequest) {
        let (source, wait) = (fetch.source.to_string(), fetch.register_wait);
        match self.fetches.get(&fetch.id).map(|fetch| &fetch.purpose) {
            // They are on their way already, or asked for: that keeps them as well.
            Some(Purpose::Now { .. }) => return core.answer(client, id, Answer::Held),
            Some(Purpose::Hold { client: holder, .. }) if *holder != client => {
                let text = format!("{} is held by another client; use another name", fetch.id);
                return core.refuse(client, id, Failure::new(FailureKind::BadRequest, text), Some(source));
            }
            None if self.requests.contains_key(&fetch.id) => return core.answer(client, id, Answer::Held),
            Some(Purpose::Hold { .. } | Purpose::Release(_)) | None => {}
        }
        let purpose = Purpose::Hold { client, question: Some(id), wait };
        let begun = self.check_fetch(core, &fetch).and_then(|()| self.begin_fetch(core, fetch, purpose));
        if let Err(failure) = begun {
            core.refuse(client, id, failure, Some(source));
        }
    }

    /// A reader does not want what a sender has parked under these names. Answered at once.
    pub(in crate::node) fn handle_release_parked(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        fetch: FetchRequest,
    ) {
        let (source, name) = (fetch.source.to_string(), fetch.id.clone());
        // First: what cannot be said leaves everything as it is.
        let begun = self.check_release(core, &fetch).and_then(|()| self.begin_fetch(core, fetch, Purpose::Release(0)));
        if let Err(failure) = begun {
            return core.refuse(client, id, failure, Some(source));
        }
        let failure = Failure::new(FailureKind::Cancelled, "the decode worker does not want it");
        self.fail_waiters(core, &name, &failure, "");
        core.answer(client, id, Answer::Released);
    }

    fn check_fetch(&self, core: &Core<R>, fetch: &FetchRequest) -> Result<(), Failure> {
        let name = &fetch.id;
        if core.draining {
            return Err(Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another"));
        }
        if self.settings.advertised.is_none() {
            let text =
                "senders cannot be told where this receiver is: it listens at every address; set pd_advertise_host";
            return Err(Failure::new(FailureKind::BadRequest, text));
        }
        if fetch.keys.is_empty() {
            return Err(Failure::new(FailureKind::BadRequest, format!("{name} has no chunks; send at least one key")));
        }
        let (count, most) = (fetch.keys.len(), core.settings.request_chunks_max);
        if count > most {
            let text = format!("{name} has {count} chunks, the limit is {most} (pd_max_request_chunks)");
            return Err(Failure::new(FailureKind::Limit, text));
        }
        let asked = self.fetches.len() - self.releases();
        if !self.fetches.contains_key(name) && asked >= core.settings.requests_max {
            let text = format!("{asked} requests are being asked for, the limit (pd_max_requests)");
            return Err(Failure::new(FailureKind::Limit, text));
        }
        Ok(())
    }

    fn check_release(&self, core: &Core<R>, fetch: &FetchRequest) -> Result<(), Failure> {
        let (name, releases) = (&fetch.id, self.releases());
        let text = if fetch.ids.len() > REQUEST_IDS_MAX {
            format!("{name} is known by {} names, the limit is {REQUEST_IDS_MAX}", fetch.ids.len())
        } else if !self.fetches.contains_key(name) && releases >= core.settings.requests_max {
            format!("{releases} releases have not been answered, the limit (pd_max_requests)")
        } else {
            return Ok(());
        };
        Err(Failure::new(FailureKind::Limit, text))
    }

    /// How many of the questions only say that something is not wanted. They take no places of those that ask.
    fn releases(&self) -> usize {
        self.fetches.values().filter(|fetch| matches!(fetch.purpose, Purpose::Release(_))).count()
    }

    /// Asks a sender, as soon as it is connected. What it was asked under the same name is over.
    fn begin_fetch(&mut self, core: &mut Core<R>, fetch: FetchRequest, purpose: Purpose) -> Result<(), Failure> {
        let hosts = self.settings.prefill_hosts.as_ref();
        if hosts.is_some_and(|hosts| !hosts.contains(&fetch.source.host)) {
            let text = format!("{} is not among pd_prefill_hosts", truncate(&fetch.source.host));
            return Err(Failure::new(FailureKind::BadRequest, text));
        }
        let named = |text| Failure::new(FailureKind::BadRequest, format!("{} is asked of {text}", fetch.id));
        fetch.source.check().map_err(named)?;
        let source = self.source_for(core, &fetch.source)?;
        let by_kept = self.is_source_open(source);
        let FetchRequest { id, ids, keys, .. } = fetch;
        let seq = Seq(core.fresh());
        let asked = Fetch { source, seq, ids, keys, purpose, answered: false, by_kept };
        if let Some(before) = self.fetches.insert(id.clone(), asked) {
            let was_asked = self.is_source_open(before.source);
            if before.source != source && was_asked {
                // That one is asked no more, and would send what nobody waits for.
                let (seq, instance) = (Seq(core.fresh()), core.settings.hello.instance.clone());
                let release = ReleaseParked { seq, instance, req_id: id.clone(), ids: Vec::new() };
                core.send(To::Peer(before.source), Port::Rendezvous, Message::PdRelease(release));
            }
            if let Purpose::Hold { client, question: Some(question), .. } = before.purpose {
                core.answer(client, question, Answer::Held);
            }
        }
        self.ask_source(core, &id);
        Ok(())
    }

    /// Says a question, if the sender is connected; and when to say it again.
    pub(super) fn ask_source(&mut self, core: &mut Core<R>, id: &RequestId) {
        let Some(source) = self.fetches.get(id).map(|fetch| fetch.source) else { return };
        core.timers.set(IncomingTimer::Ask(id.clone()), core.now + core.settings.heartbeat_interval);
        if !self.is_source_open(source) {
            return;
        }
        let Some(fetch) = self.fetches.get_mut(id) else { return };
        // Who knows the question need not be told all of it.
        let keys = if fetch.answered { Vec::new() } else { fetch.keys.clone() };
        let (seq, req_id, ids) = (fetch.seq, id.clone(), fetch.ids.clone());
        let hello = core.settings.hello.clone();
        let register = |receiver, wait: Duration| {
            let wait_ms = wait.as_millis() as u64;
            Message::PdRegister(Register {
                seq,
                hello: hello.clone(),
                req_id: req_id.clone(),
                ids: ids.clone(),
                keys,
                receiver,
                wait_ms,
            })
        };
        let message = match &mut fetch.purpose {
            Purpose::Now { wait } => register(self.settings.advertised.clone(), *wait),
            Purpose::Hold { wait, .. } => register(None, *wait),
            Purpose::Release(times) => {
                *times += 1;
                Message::PdRelease(ReleaseParked { seq, instance: hello.instance.clone(), req_id, ids })
            }
        };
        let source = fetch.source;
        core.send(To::Peer(source), Port::Rendezvous, message);
        self.source_is_asked(core.now, source);
    }

    /// It is time to say a question again, or to give its sender up.
    pub(super) fn ask_again(&mut self, core: &mut Core<R>, id: &RequestId) {
        let Some(fetch) = self.fetches.get(id) else { return };
        if matches!(fetch.purpose, Purpose::Release(times) if times >= RELEASES_MAX) {
            return self.end_fetch(core, id);
        }
        let source = fetch.source;
        if !self.source_is_silent(core, source) {
            self.ask_source(core, id);
        }
    }

    /// Asks for it by another connection.
    pub(super) fn ask_anew(&mut self, core: &mut Core<R>, id: &RequestId, source: PeerId) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            (fetch.source, fetch.by_kept) = (source, false);
            self.ask_source(core, id);
        }
    }

    pub(super) fn on_registered(&mut self, core: &mut Core<R>, source: PeerId, registered: Registered) {
        let id = registered.req_id;
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        if (fetch.source, fetch.seq) != (source, registered.seq) {
            return;
        }
        let failure = match registered.state {
            Registration::Accepted | Registration::Pending => {
                fetch.answered = true;
                if let Purpose::Hold { client, question, .. } = &mut fetch.purpose
                    && let Some(question) = question.take()
                {
                    let client = *client;
                    core.answer(client, question, Answer::Held);
                }
                return;
            }
            Registration::Released => return self.end_fetch(core, &id),
            Registration::Unknown => {
                let text =
                    format!("{id}: nothing of it is known there; it was never parked there, or its lease has ended");
                Failure::new(FailureKind::Unknown, text)
            }
            Registration::Failed => registered.failure.map_or_else(
                || Failure::new(FailureKind::Other, "the sender refused, and did not say why"),
                |failure| Failure::new(failure.kind, truncate(&failure.text)),
            ),
        };
        self.fetch_failed(core, &id, failure, &registered.instance);
    }

    /// A question comes to nothing: whoever asked is told.
    pub(super) fn fetch_failed(&mut self, core: &mut Core<R>, id: &RequestId, failure: Failure, instance: &str) {
        let Some(fetch) = self.fetches.remove(id) else { return };
        core.timers.unset(IncomingTimer::Ask(id.clone()));
        core.note(IncomingNote::FetchFailed {
            request: id.clone(),
            instance: truncate(instance),
            failure: failure.clone(),
        });
        match fetch.purpose {
            Purpose::Now { .. } => self.tell_end(core, id.clone(), failure, truncate(instance), None),
            Purpose::Hold { client, question: Some(question), .. } => {
                core.refuse(client, question, failure, Some(truncate(instance)));
            }
            // Whoever asks for it hears of it then.
            Purpose::Hold { question: None, .. } | Purpose::Release(_) => {}
        }
    }

    /// A question is over: it was answered by what was asked for, or nobody wants it.
    pub(super) fn end_fetch(&mut self, core: &mut Core<R>, id: &RequestId) {
        if self.fetches.remove(id).is_some() {
            core.timers.unset(IncomingTimer::Ask(id.clone()));
        }
    }

    /// The sender asks for room under this name: from now on it is a request as any.
    pub(super) fn fetch_arrives(&mut self, core: &mut Core<R>, id: &RequestId) {
        if self.fetches.get(id).is_some_and(|fetch| matches!(fetch.purpose, Purpose::Now { .. })) {
            self.end_fetch(core, id);
        }
    }

    /// Nobody waits for this name any more: what was asked for under it is given up.
    pub(super) fn give_up_fetch(&mut self, core: &mut Core<R>, id: &RequestId) {
        if self.waiters.first_for(id).is_some() {
            return;
        }
        let releases = self.releases();
        let Some(fetch) = self.fetches.get_mut(id) else { return };
        if matches!(fetch.purpose, Purpose::Release(_)) {
            return;
        }
        let is_full = releases >= core.settings.requests_max;
        // Only the registration ends: another sample of the same prompt may come for its chunks.
        let purpose = std::mem::replace(&mut fetch.purpose, Purpose::Release(0));
        fetch.ids.clear();
        fetch.seq = Seq(core.fresh());
        if let Purpose::Hold { client, question: Some(question), .. } = purpose {
            core.answer(client, question, Answer::Held);
        }
        self.ask_source(core, id);
        if is_full {
            // Said once; if it is lost, what the sender keeps ends with its lease.
            self.end_fetch(core, id);
        }
    }

    /// A client is gone, and with it what it had kept.
    pub(super) fn fetches_client_gone(&mut self, core: &mut Core<R>, client: ClientId) {
        let held = |purpose: &Purpose| matches!(purpose, Purpose::Hold { client: holder, .. } if *holder == client);
        let of_client: Vec<RequestId> =
            self.fetches.iter().filter(|(_, fetch)| held(&fetch.purpose)).map(|(id, _)| id.clone()).collect();
        for id in of_client {
            if let Some(Fetch { purpose: Purpose::Hold { question, .. }, .. }) = self.fetches.get_mut(&id) {
                *question = None;
            }
            self.give_up_fetch(core, &id);
        }
    }

    /// Checks that each question is asked of a sender that is known, and will be asked again.
    pub(super) fn check_fetches(&self, core: &Core<R>) -> Result<(), String> {
        for (id, fetch) in &self.fetches {
            if !self.sources.contains_key(&fetch.source) {
                return Err(format!("{id} is asked of source {}, which is not there", fetch.source));
            }
            if !core.timers.contains(IncomingTimer::Ask(id.clone())) {
                return Err(format!("{id} will not be asked for again"));
            }
            if matches!(fetch.purpose, Purpose::Now { .. }) && self.waiters.first_for(id).is_none() {
                return Err(format!("{id} is asked for, and nobody waits for it"));
            }
        }
        Ok(())
    }
}
