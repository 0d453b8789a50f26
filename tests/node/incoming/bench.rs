//! A receiver's session with two senders, on a bench.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use pd_backend::address::AddressManager;
use pd_backend::ids::{Checksum, ChunkKey, ClientId, ConnectionId, FailureKind, GrantId, RequestId, Seq};
use pd_backend::node::incoming::{ExpectedChunk, IncomingCounts};
use pd_backend::node::{Answer, Grown, IncomingSettings, Node, NodeSettings, Output, Port, To};
use pd_backend::wire::Message;
use pd_backend::wire::message::{
    AllocExtension, AllocRequest, AllocResponse, CAPABILITY_CHECKSUMS, CancelExtension, CancelNotif, Commit, Hello,
    InitExtension, InitReplyExtension, InitRequest, Ping, ProcessIdentity,
};

use crate::settings::{self, SLOT_BYTES, hello};

/// One receiver of `slots` slots with the senders `a` and `b` shaken hands with. A route is the sender's name.
pub struct Bench {
    pub session: Node<&'static str>,
    pub now: Instant,
    pub seq: u64,
    /// What its senders know of the buffer.
    pub known_len_bytes: u64,
    /// Which receiver its senders are connected to, as they say.
    pub addressee: String,
    pub last_tokens: u64,
    pub addresses: AddressManager,
    /// How often the session asked for a step.
    pub grow_outputs: u64,
    /// What whoever shakes hands next can do beyond committing and pinging.
    pub capabilities: Vec<String>,
    /// The process behind whoever shakes hands next.
    pub process: Option<ProcessIdentity>,
    /// What it asked to be summed.
    pub verifies: Vec<(GrantId, Vec<ExpectedChunk>)>,
    /// Of those, what it wants no more.
    pub abandoned: Vec<GrantId>,
    /// Senders whose processes are watched.
    pub watched: BTreeSet<String>,
}

impl Bench {
    pub fn new(slots: u64) -> Self {
        Self::lazy(slots, slots)
    }

    /// A buffer of `slots` slots that can grow to `slots_max`.
    pub fn lazy(slots: u64, slots_max: u64) -> Self {
        Self::with(slots, slots_max, |_| {})
    }

    /// The same with other settings.
    pub fn with(slots: u64, slots_max: u64, change: impl FnOnce(&mut NodeSettings)) -> Self {
        let mut settings = NodeSettings {
            len_max_bytes: SLOT_BYTES * slots_max,
            requests_max: 1000,
            request_chunks_max: 1000,
            incoming: Some(settings::incoming()),
            ..settings::settings("receiver", slots)
        };
        let addresses = settings.addresses.clone();
        change(&mut settings);
        let now = Instant::now();
        let mut bench = Self {
            session: Node::new(now, settings),
            now,
            seq: 0,
            known_len_bytes: 16 * slots,
            addressee: "receiver".into(),
            last_tokens: 4,
            addresses,
            grow_outputs: 0,
            process: None,
            capabilities: vec![CAPABILITY_CHECKSUMS.into()],
            verifies: Vec::new(),
            abandoned: Vec::new(),
            watched: BTreeSet::new(),
        };
        for name in ["a", "b"] {
            let answers = bench.shake_hands(name, Vec::new());
            assert!(answers.refusal.is_none(), "{:?}", answers.refusal);
        }
        bench
    }

    pub fn counts(&self) -> IncomingCounts {
        self.session.counts().incoming.unwrap()
    }

    pub fn next_seq(&mut self) -> Seq {
        self.seq += 1;
        Seq(self.seq)
    }

    pub fn say(&mut self, port: Port, from: &'static str, message: Message) -> Vec<(&'static str, Message)> {
        self.session.handle_port_message(self.now, port, from, message);
        self.drain()
    }

    /// The result of the step that the session asked for, and what it answers then.
    pub fn grown(&mut self, result: Result<(), String>) -> Vec<(&'static str, AllocResponse)> {
        let grown = result.map(|()| {
            self.addresses.grow(16).unwrap();
            let len_bytes = self.addresses.len_bytes();
            Grown { len_bytes, metadata: vec![1], descriptors: vec![len_bytes as u8] }
        });
        self.session.handle_grown(self.now, grown);
        answers(self.drain())
    }

    pub fn drain(&mut self) -> Vec<(&'static str, Message)> {
        let mut said = Vec::new();
        while let Some(output) = self.session.poll_output() {
            match output {
                Output::Send { to: To::Route(to), message, .. } => said.push((to, message)),
                Output::Verify { grant, chunks, .. } => self.verifies.push((grant, chunks)),
                Output::AbandonVerification(grant) => self.abandoned.push(grant),
                Output::WatchProcess { instance, .. } => drop(self.watched.insert(instance)),
                Output::UnwatchProcess { instance } => drop(self.watched.remove(&instance)),
                Output::GrowBuffer => self.grow_outputs += 1,
                Output::LoadPeer { remote, .. } => {
                    self.session.handle_loaded(self.now, &remote, Ok(ConnectionId(self.seq)));
                }
                _ => {}
            }
        }
        self.session.check_invariants().unwrap();
        said
    }

    pub fn shake_hands(&mut self, name: &'static str, connected: Vec<String>) -> InitReplyExtension {
        let seq = self.next_seq();
        let mut hello = Hello { process: self.process.clone(), ..hello(name) };
        hello.capabilities.extend(self.capabilities.clone());
        let pd = Some(InitExtension { seq, hello, agent_name: name.into(), connected });
        let request = Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![3], pd });
        match self.say(Port::Init, name, request).pop() {
            Some((_, Message::NixlInitResponse(response))) => response.pd.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Asks for slots. The number of the question, and whatever is answered at once.
    pub fn alloc(&mut self, from: &'static str, id: &str, keys: &[&str]) -> (Seq, Vec<(&'static str, AllocResponse)>) {
        self.ask(from, id, keys, false)
    }

    /// The same for what nobody has asked for.
    pub fn alloc_ahead(&mut self, from: &'static str, id: &str, keys: &[&str]) -> Vec<(&'static str, AllocResponse)> {
        self.ask(from, id, keys, true).1
    }

    fn ask(
        &mut self,
        from: &'static str,
        id: &str,
        keys: &[&str],
        ahead: bool,
    ) -> (Seq, Vec<(&'static str, AllocResponse)>) {
        let (seq, said) = self.tell(from, id, keys, ahead);
        (seq, answers(said))
    }

    /// The same, and everything that is said then.
    pub fn tell(
        &mut self,
        from: &'static str,
        id: &str,
        keys: &[&str],
        ahead: bool,
    ) -> (Seq, Vec<(&'static str, Message)>) {
        let seq = self.next_seq();
        let request = AllocRequest {
            keys: keys.iter().map(|key| ChunkKey::new(key).unwrap()).collect(),
            fmt: 1,
            shape: vec![2, 1, 4, 2],
            dtype: "uint8".into(),
            last_chunk_toks: self.last_tokens,
            req_id: Some(RequestId::new(id).unwrap()),
            is_last_batch: Some(true),
            total_chunks: Some(keys.len() as u32),
            pd: Some(AllocExtension {
                seq,
                instance: from.into(),
                wait_ms: if ahead { 0 } else { 5000 },
                groups: Vec::new(),
                known_len_bytes: self.known_len_bytes,
                receiver: self.addressee.clone(),
                ahead,
            }),
        };
        (seq, self.say(Port::Alloc, from, Message::AllocRequest(request)))
    }

    pub fn cancel(
        &mut self,
        from: &'static str,
        id: &str,
        grant: Option<GrantId>,
        alloc_seq: Option<Seq>,
        stopped: bool,
    ) {
        let seq = self.next_seq();
        let pd = Some(CancelExtension { seq, instance: from.into(), grant, alloc_seq, writer_stopped: stopped });
        let cancel = CancelNotif { req_id: RequestId::new(id).unwrap(), keys: Vec::new(), pd };
        self.say(Port::Alloc, from, Message::CancelNotif(cancel));
    }

    pub fn commit(&mut self, from: &'static str, id: &str, grant: GrantId) -> Vec<(&'static str, Message)> {
        self.commit_summed(from, id, grant, Vec::new())
    }

    pub fn commit_summed(
        &mut self,
        from: &'static str,
        id: &str,
        grant: GrantId,
        checksums: Vec<Option<Checksum>>,
    ) -> Vec<(&'static str, Message)> {
        let seq = self.next_seq();
        let commit = Commit { seq, instance: from.into(), req_id: RequestId::new(id).unwrap(), grant, checksums };
        self.say(Port::Alloc, from, Message::PdCommit(commit))
    }
}

pub fn incoming(settings: &mut NodeSettings) -> &mut IncomingSettings {
    settings.incoming.as_mut().unwrap()
}

pub fn answers(said: Vec<(&'static str, Message)>) -> Vec<(&'static str, AllocResponse)> {
    let answer = |(to, message)| match message {
        Message::AllocResponse(response) => Some((to, response)),
        _ => None,
    };
    said.into_iter().filter_map(answer).collect()
}

pub fn grant_of(answers: &[(&'static str, AllocResponse)]) -> GrantId {
    answers[0].1.pd.as_ref().unwrap().grant.expect("granted at once")
}

/// The refusal in the only answer, which is to a commit.
pub fn ack_refusal(said: &[(&'static str, Message)]) -> Option<pd_backend::ids::Failure> {
    match said {
        [(_, Message::PdCommitAck(ack))] => ack.refusal.clone(),
        other => panic!("{other:?}"),
    }
}

pub fn hello_message(bench: &mut Bench, name: &'static str, seq: u64) -> Vec<(&'static str, Message)> {
    init_message(bench, Port::Init, name, seq)
}

pub fn init_message(bench: &mut Bench, port: Port, name: &'static str, seq: u64) -> Vec<(&'static str, Message)> {
    let pd = Some(InitExtension { seq: Seq(seq), hello: hello(name), agent_name: name.into(), connected: Vec::new() });
    bench.say(port, name, Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![3], pd }))
}

pub fn ping(bench: &mut Bench, name: &'static str) -> Option<FailureKind> {
    let seq = bench.next_seq();
    let said = bench.say(
        Port::Alloc,
        name,
        Message::PdPing(Ping { seq, instance: name.into(), ended: Vec::new(), receiver: bench.addressee.clone() }),
    );
    match said.as_slice() {
        [(_, Message::PdPong(pong))] => pong.refusal.as_ref().map(|refusal| refusal.kind),
        other => panic!("{other:?}"),
    }
}

/// Time passes, and nothing is said.
pub fn later(bench: &mut Bench, seconds: u64) -> Vec<(&'static str, Message)> {
    for _ in 0..2 * seconds {
        bench.now += Duration::from_millis(500);
        bench.session.handle_timeout(bench.now);
    }
    bench.drain()
}

/// Asks for a request and returns what it is told at once.
pub fn wait(bench: &mut Bench, id: u64, request: &str, time: Option<Duration>) -> Option<Answer> {
    let request = RequestId::new(request).unwrap();
    bench.session.handle_wait(bench.now, ClientId(1), Seq(id), request, time, false);
    answer_of(bench, id)
}

pub fn answer_of(bench: &mut Bench, id: u64) -> Option<Answer> {
    let mut found = None;
    while let Some(output) = bench.session.poll_output() {
        if let Output::Answer { id: answered, answer, .. } = output
            && answered == Seq(id)
        {
            found = Some(answer);
        }
    }
    found
}

pub fn kind_of(answer: Option<Answer>) -> Option<FailureKind> {
    match answer {
        Some(Answer::Failed { failure, .. }) => Some(failure.kind),
        _ => None,
    }
}
