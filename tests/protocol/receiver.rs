//! The receiver's session alone, message by message: what a well-behaved sender never does, or does once in a year.

use std::time::{Duration, Instant};

use pd_backend::ids::{ChunkKey, ConnectionId, FailureKind, GrantId, RequestId, Seq};
use pd_backend::protocol::receiver::{Output, ReceiverSettings};
use pd_backend::protocol::{ChunkShape, Port, ReceiverSession};
use pd_backend::wire::Message;
use pd_backend::wire::message::{
    AllocExtension, AllocRequest, AllocResponse, CAPABILITY_COMMIT, CancelExtension, CancelNotif, Commit, Hello,
    InitExtension, InitReplyExtension, InitRequest,
};

/// One receiver of `slots` slots with the senders `a` and `b` shaken hands with. A route is the sender's name.
struct Bench {
    session: ReceiverSession<&'static str>,
    now: Instant,
    seq: u64,
}

fn hello(instance: &str) -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        instance: instance.into(),
        engine: "test".into(),
        layout: Vec::new(),
        capabilities: vec![CAPABILITY_COMMIT.into()],
        process: None,
    }
}

impl Bench {
    fn new(slots: u32) -> Self {
        let session = ReceiverSession::new(ReceiverSettings {
            hello: hello("receiver"),
            agent_name: "agent".into(),
            metadata: vec![1],
            descriptors: vec![2],
            chunk: ChunkShape {
                chunk_bytes: 16,
                token_bytes: 4,
                chunk_tokens: 4,
                wire_format: 1,
                wire_shape: vec![2, 1, 4, 2],
                dtype: "uint8".into(),
            },
            slot_count: slots,
            allocation_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            wait_timeout: Duration::from_secs(10),
            retention: Duration::from_secs(100),
            requests_max: 1000,
            request_chunks_max: 1000,
            peers_max: 10,
        });
        let mut bench = Self { session, now: Instant::now(), seq: 0 };
        for name in ["a", "b"] {
            let answers = bench.shake_hands(name, Vec::new());
            assert!(answers.refusal.is_none(), "{:?}", answers.refusal);
        }
        bench
    }

    fn next_seq(&mut self) -> Seq {
        self.seq += 1;
        Seq(self.seq)
    }

    fn say(&mut self, port: Port, from: &'static str, message: Message) -> Vec<(&'static str, Message)> {
        self.session.handle_message(self.now, port, from, message);
        let mut said = Vec::new();
        while let Some(output) = self.session.poll_output() {
            match output {
                Output::Send { to, message, .. } => said.push((to, message)),
                Output::LoadPeer { instance, .. } => {
                    self.session.handle_peer_loaded(self.now, &instance, Ok(ConnectionId(self.seq)));
                }
                _ => {}
            }
        }
        self.session.check_invariants().unwrap();
        said
    }

    fn shake_hands(&mut self, name: &'static str, connected: Vec<String>) -> InitReplyExtension {
        let seq = self.next_seq();
        let pd = Some(InitExtension { seq, hello: hello(name), agent_name: name.into(), connected });
        let request = Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![3], pd });
        match self.say(Port::Init, name, request).pop() {
            Some((_, Message::NixlInitResponse(response))) => response.pd.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Asks for slots. The number of the question, and whatever is answered at once.
    fn alloc(&mut self, from: &'static str, id: &str, keys: &[&str]) -> (Seq, Vec<(&'static str, AllocResponse)>) {
        let seq = self.next_seq();
        let request = AllocRequest {
            keys: keys.iter().map(|key| ChunkKey::new(key).unwrap()).collect(),
            fmt: 1,
            shape: vec![2, 1, 4, 2],
            dtype: "uint8".into(),
            last_chunk_toks: 4,
            req_id: Some(RequestId::new(id).unwrap()),
            is_last_batch: Some(true),
            total_chunks: Some(keys.len() as u32),
            pd: Some(AllocExtension { seq, instance: from.into(), wait_ms: 5000 }),
        };
        let said = self.say(Port::Alloc, from, Message::AllocRequest(request));
        (seq, answers(said))
    }

    fn cancel(&mut self, from: &'static str, id: &str, grant: Option<GrantId>, alloc_seq: Option<Seq>, stopped: bool) {
        let seq = self.next_seq();
        let pd = Some(CancelExtension { seq, instance: from.into(), grant, alloc_seq, writer_stopped: stopped });
        let cancel = CancelNotif { req_id: RequestId::new(id).unwrap(), keys: Vec::new(), pd };
        self.say(Port::Alloc, from, Message::CancelNotif(cancel));
    }

    fn commit(&mut self, from: &'static str, id: &str, grant: GrantId) -> Vec<(&'static str, Message)> {
        let seq = self.next_seq();
        let commit = Commit { seq, instance: from.into(), req_id: RequestId::new(id).unwrap(), grant };
        self.say(Port::Alloc, from, Message::PdCommit(commit))
    }
}

fn answers(said: Vec<(&'static str, Message)>) -> Vec<(&'static str, AllocResponse)> {
    let answer = |(to, message)| match message {
        Message::AllocResponse(response) => Some((to, response)),
        _ => None,
    };
    said.into_iter().filter_map(answer).collect()
}

fn grant_of(answers: &[(&'static str, AllocResponse)]) -> GrantId {
    answers[0].1.pd.as_ref().unwrap().grant.expect("granted at once")
}

#[test]
fn a_retry_under_the_same_name_frees_nothing_that_the_first_attempt_still_writes() {
    // Broken in production: a client cancels and opens the same request again, and the slots of the first attempt are
    // handed out under its last write.
    let mut bench = Bench::new(4);
    let (_, first) = bench.alloc("a", "r", &["k0", "k1"]);
    let first = grant_of(&first);
    let (second, refused) = bench.alloc("a", "r", &["k0", "k1"]);
    assert_eq!(refused[0].1.pd.as_ref().unwrap().refusal.as_ref().unwrap().kind, FailureKind::BadRequest);
    bench.cancel("a", "r", None, Some(second), true);
    assert_eq!(bench.session.counts().slots.reserved, 2, "the second attempt's word is not the first's");
    bench.cancel("a", "r", Some(first), None, false);
    assert_eq!(bench.session.counts().slots.quarantined, 2);
    bench.cancel("a", "r", None, Some(second), true);
    assert_eq!(bench.session.counts().slots.quarantined, 2);
    bench.cancel("b", "r", Some(first), None, true);
    assert_eq!(bench.session.counts().slots.quarantined, 2, "another sender has no say");
    bench.cancel("a", "r", Some(first), None, true);
    assert_eq!(bench.session.counts().slots.free, 4);
}

#[test]
fn a_sender_that_is_connected_under_another_address_frees_nothing() {
    // Broken in production: a router names one receiver by two host names, and its slots are freed under a write.
    let mut bench = Bench::new(4);
    bench.alloc("a", "r", &["k0"]);
    let refusal = bench.shake_hands("a", vec!["receiver".into()]).refusal.expect("refused");
    assert!(refusal.text.contains("second address"), "{refusal}");
    assert_eq!(bench.session.counts().slots.reserved, 1);
    assert!(bench.shake_hands("a", Vec::new()).refusal.is_none(), "its word that nothing is in flight");
    assert_eq!(bench.session.counts().slots.free, 4);
}

#[test]
fn a_commit_answers_whoever_waits_for_the_same_chunks() {
    // Broken in production: two requests with one prompt fill the buffer, and the second waits for slots it does not need.
    let mut bench = Bench::new(2);
    let (_, first) = bench.alloc("a", "r1", &["k0", "k1"]);
    let (_, second) = bench.alloc("b", "r2", &["k0", "k1"]);
    assert!(second.is_empty(), "there is no room for a second copy");
    let said = answers(bench.commit("a", "r1", grant_of(&first)));
    assert_eq!(said.len(), 1);
    assert_eq!((said[0].0, &said[0].1.already_sent_indexes), ("b", &vec![0, 1]));
}

#[test]
fn a_large_request_is_overtaken_a_bounded_number_of_times() {
    // Broken in production: a long prompt waits for ever behind short ones.
    let mut bench = Bench::new(20);
    let (_, first) = bench.alloc("a", "holds", &["h0", "h1", "h2", "h3", "h4", "h5", "h6", "h7", "h8", "h9"]);
    let large: Vec<String> = (0..20).map(|n| format!("l{n}")).collect();
    let large: Vec<&str> = large.iter().map(String::as_str).collect();
    assert!(bench.alloc("a", "large", &large).1.is_empty());
    let mut passed = 0;
    for n in 0..10 {
        passed += bench.alloc("b", &format!("small{n}"), &[&format!("s{n}")]).1.len();
    }
    assert_eq!(passed, 8);
    // All the room at once does not help those behind it either.
    bench.cancel("a", "holds", Some(grant_of(&first)), None, true);
    assert_eq!(bench.session.counts().slots.reserved, 8);
}

#[test]
fn a_grant_can_be_committed_by_its_sender_alone() {
    // Broken in production: a confused or hostile peer declares another's half-written chunks complete.
    let mut bench = Bench::new(4);
    let (_, answer) = bench.alloc("a", "r", &["k0"]);
    let grant = grant_of(&answer);
    for (from, id, grant) in [("b", "r", grant), ("a", "other", grant), ("a", "r", GrantId(99))] {
        let said = bench.commit(from, id, grant);
        let [(to, Message::PdCommitAck(ack))] = said.as_slice() else { panic!("{said:?}") };
        assert_eq!((*to, ack.refusal.as_ref().map(|refusal| refusal.kind)), (from, Some(FailureKind::Unknown)));
    }
    assert_eq!(bench.session.counts().slots.reserved, 1);
    bench.commit("a", "r", grant);
    assert_eq!(bench.session.counts().slots.ready_held, 1);
}
