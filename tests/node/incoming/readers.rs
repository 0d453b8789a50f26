//! Who is told what of an attempt, where a name is used again; and very many readers at once.

use pd_backend::ids::{ChunkKey, ClientId, FailureKind, GrantId, RequestId, Seq};
use pd_backend::node::Port;
use pd_backend::node::incoming::Lookup;
use pd_backend::node::{Answer, Output};
use pd_backend::wire::Message;
use pd_backend::wire::message::{CancelExtension, CancelNotif, Commit};

use super::bench::*;

/// The sender `a` gives an attempt up. What readers are told is left for the test to look at, here and below.
fn give_up(bench: &mut Bench, request: &str, grant: GrantId) {
    let (seq, grant) = (bench.next_seq(), Some(grant));
    let pd = Some(CancelExtension { seq, instance: "a".into(), grant, alloc_seq: None, writer_stopped: true });
    let cancel = CancelNotif { req_id: RequestId::new(request).unwrap(), keys: Vec::new(), pd };
    bench.session.handle_port_message(bench.now, Port::Alloc, "a", Message::CancelNotif(cancel));
}

fn attempt_that_fails(bench: &mut Bench, request: &str) {
    let grant = grant_of(&bench.alloc("a", request, &["k0"]).1);
    give_up(bench, request, grant);
}

/// The sender `b` sends a request of one chunk.
fn send(bench: &mut Bench, request: &str, key: &str) {
    let grant = grant_of(&bench.alloc("b", request, &[key]).1);
    let (seq, req_id) = (bench.next_seq(), RequestId::new(request).unwrap());
    let commit = Commit { seq, instance: "b".into(), req_id, grant, checksums: Vec::new() };
    bench.session.handle_port_message(bench.now, Port::Alloc, "b", Message::PdCommit(commit));
}

/// An attempt that succeeds, and what the reader that asked as `id` is told then.
fn attempt_for(bench: &mut Bench, request: &str, id: u64) -> Option<Answer> {
    send(bench, request, "k0");
    answer_of(bench, id)
}

fn is_ready(answer: Option<Answer>) -> bool {
    matches!(answer, Some(Answer::Ready { .. }))
}

fn cancel(bench: &mut Bench, request: &str) {
    bench.session.handle_cancel(bench.now, ClientId(1), Seq(1000), &RequestId::new(request).unwrap());
}

#[test]
fn a_reader_that_asks_before_the_next_attempt_begins_gets_it() {
    // Broken in production: a router tries again under the same name and asks decode first, which is told for up to 300 s
    // how the attempt before ended.
    let mut bench = Bench::new(4);
    for id in 1..4 {
        assert_eq!(wait(&mut bench, id, "r", None), None, "whoever asks after others were told means the next attempt");
        attempt_that_fails(&mut bench, "r");
        assert_eq!(kind_of(answer_of(&mut bench, id)), Some(FailureKind::Cancelled), "at once");
    }
    assert_eq!(wait(&mut bench, 4, "r", None), None);
    assert!(is_ready(attempt_for(&mut bench, "r", 4)));
}

#[test]
fn a_failure_that_nobody_waited_for_is_told_once() {
    // Broken in production: decode asks a moment after its attempt has failed and waits in vain; or it is told, and so is
    // every attempt after it.
    let mut bench = Bench::new(4);
    attempt_that_fails(&mut bench, "r");
    assert_eq!(kind_of(wait(&mut bench, 1, "r", None)), Some(FailureKind::Cancelled));
    assert_eq!(wait(&mut bench, 2, "r", None), None);
    assert!(is_ready(attempt_for(&mut bench, "r", 2)));
    // So is one that was refused before it began.
    let (_, refused) = bench.alloc("a", "s", &["a", "b", "c", "d", "e"]);
    assert!(refused[0].1.pd.as_ref().unwrap().grant.is_none());
    assert_eq!(kind_of(wait(&mut bench, 3, "s", None)), Some(FailureKind::TooLarge));
    assert_eq!(wait(&mut bench, 4, "s", None), None);
    // And its sender is told as often as it asks.
    let (_, answer) = bench.alloc("a", "t", &["k1"]);
    bench.session.handle_cancel(bench.now, ClientId(1), Seq(5), &RequestId::new("t").unwrap());
    bench.drain();
    for _ in 0..2 {
        let said = bench.commit("a", "t", grant_of(&answer));
        assert_eq!(ack_refusal(&said).map(|refusal| refusal.kind), Some(FailureKind::Cancelled));
    }
}

#[test]
fn everybody_who_waits_is_told_at_once() {
    // Broken in production: a request with n = 2 fails, and its second sample waits for its deadline.
    let mut bench = Bench::new(4);
    let grant = grant_of(&bench.alloc("a", "r", &["k0"]).1);
    let id = RequestId::new("r").unwrap();
    for (client, seq) in [(1, 1), (1, 2), (2, 3)] {
        bench.session.handle_wait(bench.now, ClientId(client), Seq(seq), id.clone(), None, false);
    }
    give_up(&mut bench, "r", grant);
    let mut told = Vec::new();
    while let Some(output) = bench.session.poll_output() {
        if let Output::Answer { id, answer, .. } = output {
            told.push((id.0, kind_of(Some(answer))));
        }
    }
    assert_eq!(told, [1, 2, 3].map(|id| (id, Some(FailureKind::Cancelled))));
}

#[test]
fn a_reader_that_cancels_has_been_told() {
    // Broken in production: a client hangs up and asks again under its own id, and is told that it was cancelled.
    let mut bench = Bench::new(4);
    bench.alloc("a", "r", &["k0"]);
    cancel(&mut bench, "r");
    assert_eq!(wait(&mut bench, 1, "r", None), None);
    assert!(is_ready(attempt_for(&mut bench, "r", 1)));
}

#[test]
fn what_was_handed_out_is_said_to_each_other_sample_until_it_is_given_up() {
    // Broken in production: the second sample of a request waits for its deadline, and does not look its chunks up by key.
    let mut bench = Bench::new(4);
    assert_eq!(wait(&mut bench, 1, "r", None), None);
    assert!(is_ready(attempt_for(&mut bench, "r", 1)));
    for id in 2..5 {
        assert_eq!(kind_of(wait(&mut bench, id, "r", None)), Some(FailureKind::Unknown));
    }
    cancel(&mut bench, "r");
    assert_eq!(wait(&mut bench, 5, "r", None), None, "nobody wants that one any more");
    assert!(is_ready(attempt_for(&mut bench, "r", 5)));
}

#[test]
fn as_many_readers_as_may_wait_are_all_answered() {
    // Broken in production: a client at its limit of leases has its waits answered each from within the answer before, and
    // the daemon's stack overflows; or a stop takes minutes, since each wait is looked for among all.
    const WAITS_MAX: u64 = 65_536;
    let mut bench = Bench::new(4);
    let grant = grant_of(&bench.alloc("a", "held", &["k0"]).1);
    bench.commit("a", "held", grant);
    let lookup = Lookup { keys: vec![ChunkKey::new("k0").unwrap()], uncommitted: false, fetches: false };
    for id in 0..WAITS_MAX {
        bench.session.handle_lookup(bench.now, ClientId(1), Seq(id), &lookup);
    }
    let request = RequestId::new("r").unwrap();
    for id in 0..WAITS_MAX {
        bench.session.handle_wait(bench.now, ClientId(1), Seq(id), request.clone(), None, false);
    }
    bench.drain();
    assert_eq!(kind_of(wait(&mut bench, WAITS_MAX, "r", None)), Some(FailureKind::Limit), "no more than that");
    bench.session.handle_wait(bench.now, ClientId(2), Seq(1), request, None, false);
    send(&mut bench, "r", "k1");
    let (mut limited, mut ready) = (0, 0);
    while let Some(output) = bench.session.poll_output() {
        match output {
            Output::Answer { answer: Answer::Ready { .. }, client: ClientId(2), .. } => ready += 1,
            Output::Answer { answer, .. } if kind_of(Some(answer.clone())) == Some(FailureKind::Limit) => limited += 1,
            _ => {}
        }
    }
    assert_eq!((limited, ready), (WAITS_MAX, 1));
    // Each for a request of its own.
    for id in 0..WAITS_MAX {
        let request = RequestId::new(format!("n{id}")).unwrap();
        bench.session.handle_wait(bench.now, ClientId(1), Seq(id), request, None, false);
    }
    assert_eq!(bench.counts().readers_waiting, WAITS_MAX as usize);
    bench.session.handle_shutdown(bench.now);
    assert_eq!(bench.counts().readers_waiting, 0);
}
