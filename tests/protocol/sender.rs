//! The sender's session alone, message by message: a receiver or a network that misbehaves once in a year.

use std::time::{Duration, Instant};

use pd_backend::address::AddressManager;
use pd_backend::ids::{
    ChunkKey, ClientId, ConnectionId, Failure, FailureKind, GrantId, IpcHandle, PeerAddress, PeerId, RequestId, Seq,
    TransferId,
};
use pd_backend::protocol::sender::{Answer, Event, OpenRequest, Output, Part, SenderSettings, Sending};
use pd_backend::protocol::{ChunkShape, Port, SenderSession};
use pd_backend::wire::Message;
use pd_backend::wire::message::{
    AllocReplyExtension, AllocResponse, CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CancelExtension, CommitAck, Hello,
    InitReplyExtension, InitResponse, MemRegReplyExtension, MemRegResponse, Pong, Revoke,
};

const CLIENT: ClientId = ClientId(1);

/// One sender of four slots, and the receiver that it talks to, played by the test.
struct Bench {
    session: SenderSession,
    now: Instant,
    /// What was said to the receiver and not looked at yet.
    said: Vec<Message>,
    /// Answers and ends that its client got.
    answers: Vec<(Seq, Answer)>,
    events: Vec<Event>,
    posts: Vec<TransferId>,
    abandoned: Vec<(TransferId, bool)>,
    opened: Vec<PeerId>,
    proxy: u32,
}

fn hello(instance: &str) -> Hello {
    Hello {
        version_min: 2,
        version_max: 2,
        instance: instance.into(),
        engine: "test".into(),
        layout: Vec::new(),
        capabilities: vec![CAPABILITY_COMMIT.into(), CAPABILITY_HEARTBEAT.into()],
        process: None,
    }
}

fn request(name: &str) -> RequestId {
    RequestId::new(name).unwrap()
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        let session = SenderSession::new(
            now,
            SenderSettings {
                hello: hello("sender"),
                agent_name: "agent".into(),
                metadata: vec![1],
                pages: None,
                chunk: ChunkShape {
                    slot_bytes: 16,
                    token_bytes: vec![4],
                    chunk_tokens: 4,
                    wire_format: 1,
                    wire_shape: vec![2, 1, 4, 2],
                    dtype: "uint8".into(),
                },
                addresses: AddressManager::with_slots(64, 1, 16).unwrap(),
                len_max_bytes: 64,
                allocation_timeout: Duration::from_secs(10),
                handshake_timeout: Duration::from_secs(10),
                commit_timeout: Duration::from_secs(9),
                write_timeout: Duration::from_secs(20),
                checksum: pd_backend::ids::ChecksumMode::Off,
                requests_max: 10,
                request_chunks_max: 10,
                peers_max: 10,
                notify_proxy: true,
                heartbeat_interval: Duration::from_secs(1),
                peer_timeout: Duration::from_secs(5),
                safeguards: Default::default(),
            },
        );
        Self {
            session,
            now,
            said: Vec::new(),
            answers: Vec::new(),
            events: Vec::new(),
            posts: Vec::new(),
            abandoned: Vec::new(),
            opened: Vec::new(),
            proxy: 0,
        }
    }

    /// Does what the session wants; the engine and the sockets are quick and good.
    fn pump(&mut self) {
        while let Some(output) = self.session.poll_output() {
            let now = self.now;
            match output {
                Output::OpenPeer { peer, .. } => {
                    self.opened.push(peer);
                    self.session.handle_peer_opened(now, peer);
                }
                Output::LoadPeer { peer, .. } => self.session.handle_peer_loaded(now, peer, Ok(ConnectionId(peer.0))),
                Output::ConnectPeer { peer, .. } => self.session.handle_peer_connected(now, peer, Ok(())),
                Output::Send { peer, message, .. } => self.on_send(peer, message),
                Output::Post { transfer, .. } => self.posts.push(transfer),
                Output::Abandon { transfer, writer_gone } => self.abandoned.push((transfer, writer_gone)),
                Output::Answer { id, answer, .. } => self.answers.push((id, answer)),
                Output::Event { event, .. } => self.events.push(event),
                Output::NotifyProxy { .. } => self.proxy += 1,
                _ => {}
            }
        }
        self.session.check_invariants().unwrap();
    }

    /// The receiver shakes hands with everybody; the rest is for the test.
    fn on_send(&mut self, peer: PeerId, message: Message) {
        match message {
            Message::NixlInitRequest(init) => {
                let pd = InitReplyExtension {
                    seq: init.pd.unwrap().seq,
                    hello: hello("receiver"),
                    agent_name: "agent-r".into(),
                    refusal: None,
                };
                let response = InitResponse { remote_agent_name: vec![], remote_meta_bytes: vec![2], pd: Some(pd) };
                self.session.handle_message(self.now, peer, Port::Init, Message::NixlInitResponse(response));
            }
            Message::NixlMemRegRequest(register) => {
                let seq = register.pd.unwrap().seq;
                let pd = MemRegReplyExtension { seq, descriptors: vec![3], len_bytes: 1024, refusal: None };
                let response = MemRegResponse { remote_xfer_dlist_bytes: vec![], pd: Some(pd) };
                self.session.handle_message(self.now, peer, Port::Init, Message::NixlMemRegResponse(response));
            }
            other => self.said.push(other),
        }
    }

    fn hear(&mut self, message: Message) {
        let peer = *self.opened.last().unwrap();
        self.session.handle_message(self.now, peer, Port::Alloc, message);
        self.pump();
    }

    /// Opens a request of one chunk and returns the number of its allocation.
    fn open(&mut self, name: &str) -> Seq {
        let open = OpenRequest {
            id: request(name),
            keys: vec![ChunkKey::new("k").unwrap()],
            groups: Vec::new(),
            last_chunk_tokens: 4,
            receiver: PeerAddress { host: "r".into(), init_port: 1, alloc_port: 2 },
            wait: None,
        };
        self.session.handle_open(self.now, CLIENT, Seq(1), open);
        self.pump();
        self.allocation()
    }

    fn allocation(&mut self) -> Seq {
        let said = std::mem::take(&mut self.said);
        let seqs: Vec<Seq> = said
            .iter()
            .filter_map(|message| match message {
                Message::AllocRequest(alloc) => Some(alloc.pd.as_ref().unwrap().seq),
                _ => None,
            })
            .collect();
        assert_eq!(seqs.len(), 1, "{said:?}");
        seqs[0]
    }

    fn grant(&mut self, seq: Seq, grant: u64) {
        let pd = AllocReplyExtension {
            grant: Some(GrantId(grant)),
            offsets: vec![0],
            write_within_ms: 10_000,
            ..AllocReplyExtension::empty(seq)
        };
        self.hear(Message::AllocResponse(AllocResponse {
            already_sent_indexes: vec![],
            remote_indexes: vec![],
            pd: Some(pd),
        }));
    }

    /// Stages and sends the one chunk of an open request.
    fn send(&mut self, name: &str) {
        self.session.handle_stage(self.now, CLIENT, Seq(2), &request(name), vec![0], None);
        self.pump();
        let Some((_, Answer::Staged { slots })) = self.answers.last() else { panic!("{:?}", self.answers) };
        let part = Part { slot: slots[0].slot, offset_bytes: 0, len_bytes: None };
        self.session.handle_send(
            self.now,
            CLIENT,
            Seq(3),
            &request(name),
            Sending { parts: &[part], last: true, after: None },
        );
        self.pump();
    }

    /// The words among what was said: which grant or allocation is not written any more.
    fn words(&mut self) -> Vec<CancelExtension> {
        let said = std::mem::take(&mut self.said);
        let word = |message| match message {
            Message::CancelNotif(cancel) => cancel.pd.filter(|pd| pd.writer_stopped),
            _ => None,
        };
        said.into_iter().filter_map(word).collect()
    }

    /// Time passes; the receiver answers pings, or nothing.
    fn later(&mut self, seconds: u64, answers_pings: bool) {
        for _ in 0..2 * seconds {
            self.now += Duration::from_millis(500);
            self.session.handle_timeout(self.now);
            self.pump();
            let pinged = self.said.iter().any(|message| matches!(message, Message::PdPing(_)));
            self.said.retain(|message| !matches!(message, Message::PdPing(_)));
            if pinged && answers_pings {
                self.hear(Message::PdPong(Pong { seq: Seq(0), refusal: None, have_ended: Vec::new() }));
            }
        }
    }
}

fn lost() -> Failure {
    Failure::new(FailureKind::PeerLost, "gone")
}

#[test]
fn a_revoke_that_overtakes_its_grant_is_not_written_to() {
    // Broken in production: the sender says that it writes nothing, learns of the grant a moment later, and writes into
    // slots that are another's by now.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    let revoke = Revoke { req_id: request("r"), grant: GrantId(7), reason: lost(), alloc_seq: Some(seq) };
    bench.hear(Message::PdRevoke(revoke));
    assert!(matches!(bench.answers.as_slice(), [(Seq(1), Answer::Failed { .. })]), "{:?}", bench.answers);
    let words = bench.words();
    assert!(words.iter().any(|word| word.grant == Some(GrantId(7))), "{words:?}");
    bench.grant(seq, 7);
    assert_eq!(bench.answers.len(), 1, "it is not opened any more");
    assert_eq!(bench.words().iter().filter(|word| word.grant == Some(GrantId(7))).count(), 1);
}

#[test]
fn a_word_is_said_until_it_is_answered() {
    // Broken in production: one lost message, and its slots are in quarantine until the sender is restarted.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.session.handle_cancel(bench.now, CLIENT, Seq(9), &request("r"));
    bench.pump();
    let first = bench.words();
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].alloc_seq, Some(seq));
    for _ in 0..3 {
        bench.later(3, true);
        assert_eq!(bench.words(), first);
    }
    let pd = Some(AllocReplyExtension::empty(first[0].seq));
    bench.hear(Message::AllocResponse(AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd }));
    bench.later(10, true);
    assert!(bench.words().is_empty());
}

#[test]
fn a_grant_that_nobody_takes_is_given_back_and_one_that_was_taken_is_not() {
    // Broken in production: a late grant holds slots until its deadline, or the echo of a good one cancels its request.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.grant(seq, 7);
    assert!(bench.words().is_empty(), "an echo");
    bench.grant(seq, 8);
    let words = bench.words();
    assert_eq!(words.iter().map(|word| word.grant).collect::<Vec<_>>(), [Some(GrantId(8))]);
    assert_eq!(bench.answers.len(), 1, "opened once");
}

#[test]
fn a_commit_is_said_again_within_its_timeout() {
    // Broken in production: one lost acknowledgement fails a request whose bytes are all there.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.send("r");
    let transfer = bench.posts[0];
    bench.session.handle_transfer_done(bench.now, transfer, Ok(Vec::new()));
    bench.pump();
    bench.later(7, true);
    let commits: Vec<Message> = std::mem::take(&mut bench.said);
    assert_eq!(commits.len(), 3, "{commits:?}");
    assert!(commits.windows(2).all(|pair| pair[0] == pair[1]));
    let Message::PdCommit(commit) = &commits[0] else { panic!("{commits:?}") };
    for _ in 0..2 {
        bench.hear(Message::PdCommitAck(CommitAck { seq: commit.seq, req_id: request("r"), refusal: None }));
    }
    assert!(matches!(bench.events.as_slice(), [Event::Sent { .. }]), "{:?}", bench.events);
    assert_eq!(bench.proxy, 1);
}

#[test]
fn a_silent_receiver_fails_its_requests_with_its_name_and_is_sought() {
    // Broken in production: a request waits two minutes for a host that has lost its power; and slots that are granted
    // to us stay in quarantine because nobody ever talks to that receiver again.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.later(4, true);
    assert!(bench.events.is_empty());
    bench.later(6, false);
    let [Event::Failed { failure, peer, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
    assert_eq!((failure.kind, peer.as_str()), (FailureKind::PeerLost, "r:1/2"));
    assert!(failure.text.contains("(receiver) said nothing for 5"), "{failure}");
    assert_eq!(bench.opened.len(), 1);
    bench.later(5, true);
    assert_eq!(bench.opened.len(), 2, "a handshake is the word that nothing is written");
    bench.later(60, true);
    assert_eq!(bench.opened.len(), 2, "and it has been given");
}

#[test]
fn a_write_that_fails_with_its_connection_is_a_lost_receiver() {
    // Broken in production: a killed decode worker looks like a broken engine, because the write fails before the
    // heartbeat is missed; or requests go on failing one by one on a connection that does not work any more.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.send("r");
    let failure = Failure::new(FailureKind::PeerLost, "the way to it broke");
    bench.session.handle_transfer_done(bench.now, bench.posts[0], Err(failure));
    bench.pump();
    let [Event::Failed { failure, peer, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
    assert_eq!((failure.kind, peer.as_str()), (FailureKind::PeerLost, "r:1/2"));
    assert_eq!(failure.text, "receiver r:1/2 (receiver): the way to it broke");
    // What it has of the grant can go, if it is there to hear so, and whoever comes next meets it anew.
    assert!(bench.words().iter().any(|word| word.grant == Some(GrantId(7))));
    let seq = bench.open("s");
    assert_eq!(bench.opened.len(), 2);
    bench.grant(seq, 8);
    bench.send("s");
    // A failure of the engine alone leaves the connection as it is.
    let failure = Failure::new(FailureKind::TransferFailed, "no such memory");
    bench.session.handle_transfer_done(bench.now, bench.posts[1], Err(failure));
    bench.pump();
    let [_, Event::Failed { failure, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
    assert_eq!((failure.kind, failure.text.as_str()), (FailureKind::TransferFailed, "no such memory"));
    bench.open("t");
    assert_eq!(bench.opened.len(), 2);
}

#[test]
fn a_sender_that_stood_still_itself_blames_nobody() {
    // Broken in production: a sender that was stopped for ten seconds fails requests that its receivers kept alive.
    let mut bench = Bench::new();
    bench.open("r");
    bench.now += Duration::from_secs(8);
    bench.session.handle_timeout(bench.now);
    bench.pump();
    assert!(bench.answers.is_empty(), "{:?}", bench.answers);
}

#[test]
fn a_receiver_that_has_forgotten_us_is_met_anew_within_the_same_open() {
    // Broken in production: the first request after an idle hour fails, because its receiver needed room for others.
    let mut bench = Bench::new();
    let refusal = || Some(Failure::new(FailureKind::HandshakeRefused, "shake hands anew"));
    let mut seq = bench.open("r");
    for attempt in 1..=2 {
        assert_eq!((bench.opened.len(), bench.answers.len()), (attempt, 0));
        let pd = AllocReplyExtension { refusal: refusal(), ..AllocReplyExtension::empty(seq) };
        let response = AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd: Some(pd) };
        bench.hear(Message::AllocResponse(response));
        if attempt == 1 {
            seq = bench.allocation();
        }
    }
    assert!(matches!(bench.answers.as_slice(), [(Seq(1), Answer::Failed { .. })]), "once: {:?}", bench.answers);
    bench.open("s");
    bench.hear(Message::PdPong(Pong { seq: Seq(0), refusal: refusal(), have_ended: Vec::new() }));
    bench.allocation();
}

#[test]
fn a_failure_can_be_acknowledged_before_its_transfers_have_ended() {
    // Broken in production: a slot of the sender's buffer is lost with every request that fails while it is written.
    // Simulation, seed 73 of its first version.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.session.handle_stage(bench.now, CLIENT, Seq(2), &request("r"), vec![0], None);
    bench.pump();
    let Some((_, Answer::Staged { slots })) = bench.answers.last() else { panic!("{:?}", bench.answers) };
    let half = Part { slot: slots[0].slot, offset_bytes: 0, len_bytes: Some(8) };
    bench.session.handle_send(
        bench.now,
        CLIENT,
        Seq(3),
        &request("r"),
        Sending { parts: &[half], last: false, after: None },
    );
    bench.pump();
    let reason = lost();
    bench.hear(Message::PdRevoke(Revoke { req_id: request("r"), grant: GrantId(7), reason, alloc_seq: Some(seq) }));
    assert!(matches!(bench.events.as_slice(), [Event::Failed { .. }]));
    bench.session.handle_cancel(bench.now, CLIENT, Seq(4), &request("r"));
    let transfer = bench.posts[0];
    bench.session.handle_transfer_done(bench.now, transfer, Ok(Vec::new()));
    bench.pump();
    assert_eq!(bench.session.counts().available_bytes, 64);
}

#[test]
fn what_waits_for_a_gpu_is_given_up_with_its_request_and_keeps_its_slot_until_then() {
    // Broken in production: after a cancelled prefill its last kernel writes into a slot that is another request's by
    // now; or a client that died keeps its slots for ever.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.session.handle_stage(bench.now, CLIENT, Seq(2), &request("r"), vec![0], None);
    bench.pump();
    let Some((_, Answer::Staged { slots })) = bench.answers.last() else { panic!("{:?}", bench.answers) };
    let [half, rest] = [0, 8].map(|offset_bytes| Part { slot: slots[0].slot, offset_bytes, len_bytes: Some(8) });
    let after = Some(IpcHandle([7; 64]));
    for (part, after) in [(half, None), (rest, after)] {
        let sending = Sending { parts: &[part], last: after.is_some(), after };
        bench.session.handle_send(bench.now, CLIENT, Seq(3), &request("r"), sending);
    }
    bench.pump();
    let [plain, fenced] = bench.posts[..] else { panic!("{:?}", bench.posts) };
    bench.session.handle_cancel(bench.now, CLIENT, Seq(4), &request("r"));
    bench.pump();
    assert_eq!(bench.abandoned, [(fenced, false)], "what is posted already is not called back");
    bench.session.handle_transfer_done(bench.now, plain, Ok(Vec::new()));
    bench.pump();
    assert_eq!(bench.session.counts().slots_staged, 1, "its writer may still be at work");
    bench.session.handle_client_gone(bench.now, CLIENT);
    bench.pump();
    assert_eq!(bench.abandoned.last(), Some(&(fenced, true)), "whoever would end the waiting has gone");
    let failure = Failure::new(FailureKind::Cancelled, "given up");
    bench.session.handle_transfer_done(bench.now, fenced, Err(failure));
    bench.pump();
    assert_eq!(bench.session.counts().slots_staged, 0);
    assert!(bench.session.is_drained());
}
