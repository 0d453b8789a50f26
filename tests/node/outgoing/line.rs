//! Requests that a receiver has no place for, because its limits are reached.

use std::time::Duration;

use pd_backend::ids::{ChunkKey, Failure, FailureKind, ReceiverAddress, Seq};
use pd_backend::node::outgoing::OpenRequest;
use pd_backend::node::{Answer, NodeSettings};
use pd_backend::wire::Message;
use pd_backend::wire::message::{AllocReplyExtension, AllocResponse, CommitAck};

use super::bench::*;

/// Opens a request of one chunk as question `id`.
fn open(bench: &mut Bench, id: u64, name: &str) {
    let open = OpenRequest {
        id: request(name),
        keys: vec![ChunkKey::new(name).unwrap()],
        groups: Vec::new(),
        last_chunk_tokens: 4,
        receiver: ReceiverAddress { host: "r".into(), init_port: 1, alloc_port: 2 },
        wait: None,
        stage: false,
    };
    bench.session.handle_open(bench.now, CLIENT, Seq(id), open);
    bench.pump();
}

/// What the receiver has been asked for since: which request, with which number, and how long it is to wait.
fn asked(bench: &mut Bench) -> Vec<(String, Seq, u64)> {
    let said = std::mem::take(&mut bench.said);
    let alloc = |message| match message {
        Message::AllocRequest(alloc) => {
            let pd = alloc.pd.unwrap();
            Some((alloc.req_id.unwrap().to_string(), pd.seq, pd.wait_ms))
        }
        _ => None,
    };
    said.into_iter().filter_map(alloc).collect()
}

/// The receiver is asked for this request alone. The number of the question.
fn only(bench: &mut Bench, name: &str) -> Seq {
    let asked = asked(bench);
    let [(other, seq, _)] = &asked[..] else { panic!("{asked:?}, and not {name} alone") };
    assert_eq!(other, name);
    *seq
}

/// The receiver has no place for what it was asked with this number.
fn refuse(bench: &mut Bench, seq: Seq) {
    let refusal = Some(Failure::new(FailureKind::Busy, "2 requests of this sender are open, the limit"));
    let pd = Some(AllocReplyExtension { refusal, ..AllocReplyExtension::empty(seq) });
    bench.hear(Message::AllocResponse(AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd }));
}

/// A granted request is written and committed.
fn send(bench: &mut Bench, name: &str) {
    bench.send(name);
    let transfer = bench.posts.pop().unwrap();
    bench.session.handle_transfer_done(bench.now, transfer, Ok(Vec::new()));
    bench.pump();
    let commit = bench.said.iter().rev().find_map(|message| match message {
        Message::PdCommit(commit) => Some(commit.clone()),
        _ => None,
    });
    let commit = commit.expect("it is committed");
    bench.hear(Message::PdCommitAck(CommitAck { seq: commit.seq, req_id: commit.req_id, refusal: None }));
}

fn failure_of(bench: &Bench, id: u64) -> Option<Failure> {
    bench.answers.iter().find_map(|(answered, answer)| match answer {
        Answer::Failed { failure, .. } if *answered == Seq(id) => Some(failure.clone()),
        _ => None,
    })
}

fn patient() -> Bench {
    Bench::with(NodeSettings { allocation_timeout: Duration::from_secs(600), ..settings() })
}

#[test]
fn a_request_that_a_receiver_has_no_place_for_waits_its_turn() {
    // Broken in production: the 513th request of a prefill server fails at once, where one server would have queued it.
    let mut bench = patient();
    open(&mut bench, 1, "a");
    let a = only(&mut bench, "a");
    bench.grant(a, 7);
    for (id, name) in [(11, "b"), (12, "c"), (13, "d")] {
        open(&mut bench, id, name);
    }
    let seqs: Vec<Seq> = asked(&mut bench).into_iter().map(|(_, seq, _)| seq).collect();
    assert_eq!(seqs.len(), 3, "nothing is known of a limit yet");
    seqs.iter().for_each(|&seq| refuse(&mut bench, seq));
    assert_eq!(asked(&mut bench), [], "there is no place for them");
    open(&mut bench, 14, "e");
    assert_eq!(asked(&mut bench), [], "others stand in line before it");
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_waiting, 4);
    // One has ended: it is the turn of the first. It gets its place, and the next one is asked for.
    send(&mut bench, "a");
    let b = only(&mut bench, "b");
    bench.grant(b, 8);
    let c = only(&mut bench, "c");
    refuse(&mut bench, c);
    assert_eq!(asked(&mut bench), [], "not yet, and none behind it");
    // Who is refused again keeps its place.
    bench.session.handle_cancel(bench.now, CLIENT, Seq(20), &request("b"));
    bench.pump();
    let c = only(&mut bench, "c");
    bench.grant(c, 9);
    let d = only(&mut bench, "d");
    bench.grant(d, 10);
    let e = only(&mut bench, "e");
    bench.grant(e, 11);
    assert_eq!([11, 12, 13, 14].map(|id| failure_of(&bench, id)), [None, None, None, None]);
}

#[test]
fn a_place_that_another_sender_has_left_is_taken() {
    // Broken in production: all places were others' when a prefill server asked. It waits for an end of its own that never comes.
    let mut bench = patient();
    open(&mut bench, 1, "a");
    let a = only(&mut bench, "a");
    refuse(&mut bench, a);
    bench.later(2, true);
    let again = asked(&mut bench);
    let [(name, seq, wait_ms)] = &again[..] else { panic!("{again:?}") };
    assert!(name == "a" && (598_000..600_000).contains(wait_ms), "what it has waited counts: {again:?}");
    let seq = *seq;
    bench.grant(seq, 7);
    assert_eq!(failure_of(&bench, 1), None);
}

#[test]
fn who_stands_in_line_can_leave_and_has_a_deadline() {
    // Broken in production: a client that has left keeps its place, or a short wait that was asked for takes for ever.
    let mut bench = Bench::new();
    open(&mut bench, 1, "a");
    let a = only(&mut bench, "a");
    refuse(&mut bench, a);
    bench.session.handle_cancel(bench.now, CLIENT, Seq(30), &request("a"));
    bench.pump();
    assert!(bench.answers.iter().any(|(id, answer)| *id == Seq(30) && matches!(answer, Answer::Cancelled { .. })));
    open(&mut bench, 2, "b");
    let b = only(&mut bench, "b");
    refuse(&mut bench, b);
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_waiting, 1);
    // It is asked again and again, and always refused.
    for _ in 0..11 {
        bench.later(1, true);
        for (_, seq, _) in asked(&mut bench) {
            refuse(&mut bench, seq);
        }
    }
    let failure = failure_of(&bench, 2).expect("its time is over");
    assert_eq!(
        (failure.kind, failure.text.as_str()),
        (
            FailureKind::Busy,
            "receiver r:1/2 had no place for 10000 ms (pd_allocation_timeout_sec): 2 requests of this sender are open, the limit"
        )
    );
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_active, 0);
}
