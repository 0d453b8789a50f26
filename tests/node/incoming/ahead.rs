//! Chunks that nobody has asked for: they come where there is room, and go where it is needed.

use pd_backend::ids::{ChunkKey, ClientId, FailureKind, LeaseId, Seq};
use pd_backend::node::Answer;
use pd_backend::node::incoming::Lookup;
use pd_backend::wire::Message;
use pd_backend::wire::message::AllocResponse;

use super::bench::*;

fn refusal(said: &[(&'static str, AllocResponse)]) -> Option<FailureKind> {
    let [(_, response)] = said else { panic!("{said:?}") };
    response.pd.as_ref().unwrap().refusal.as_ref().map(|failure| failure.kind)
}

/// Which of these chunks are here, and which are coming.
fn look_up(bench: &mut Bench, names: &[&str]) -> (Option<LeaseId>, Vec<bool>, Vec<u32>) {
    let id = bench.next_seq();
    let keys = names.iter().map(|name| ChunkKey::new(*name).unwrap()).collect();
    let lookup = Lookup { keys, uncommitted: false, fetches: true };
    bench.session.handle_lookup(bench.now, ClientId(1), id, &lookup);
    let Some(Answer::Found { lease, chunks, coming, .. }) = answer_of(bench, id.0) else { panic!("no answer") };
    (lease, chunks.iter().map(Option::is_some).collect(), coming)
}

#[test]
fn who_looks_finds_what_has_come_and_is_told_what_comes() {
    // Broken in production: decode computes what is being sent to it, because it asks a moment too early.
    let mut bench = Bench::new(8);
    let grant = grant_of(&bench.alloc_ahead("a", "x", &["k0", "k1"]));
    assert_eq!(look_up(&mut bench, &["k0", "k1", "k2"]), (None, vec![false; 3], vec![0, 1]));
    assert_eq!(ack_refusal(&bench.commit("a", "x", grant)), None);
    let (lease, here, coming) = look_up(&mut bench, &["k0", "k1", "k2"]);
    assert_eq!((here, coming), (vec![true, true, false], vec![]));
    bench.session.handle_release(bench.now, ClientId(1), Seq(900), lease.unwrap());
    bench.drain();
    assert_eq!(bench.session.counts().slots.ready_idle, 2, "nobody holds it");
    let counts = bench.counts();
    assert_eq!((counts.requests_active, counts.requests_ready, counts.bytes), (0, 0, 32));
    // Said again, it is as true as before.
    assert_eq!(ack_refusal(&bench.commit("a", "x", grant)), None);
    // What is asked for by its sender under another name is there.
    let (_, said) = bench.alloc("a", "f", &["k0", "k1"]);
    assert_eq!(said[0].1.already_sent_indexes, [0, 1]);
}

#[test]
fn it_gives_way_to_what_was_asked_for() {
    // Broken in production: a request waits for room that a guess has.
    let mut bench = Bench::new(4);
    let grant = grant_of(&bench.alloc_ahead("a", "x", &["k0", "k1"]));
    let said = bench.tell("b", "r", &["b0", "b1", "b2", "b3"], false).1;
    let revoked = said.iter().any(|(to, message)| *to == "a" && matches!(message, Message::PdRevoke(_)));
    assert!(revoked, "{said:?}");
    assert!(look_up(&mut bench, &["k0"]).2.is_empty(), "it comes no more");
    assert_eq!(bench.session.counts().slots.quarantined, 2);
    // Its sender has stopped.
    bench.cancel("a", "x", Some(grant), None, true);
    assert_eq!(bench.session.counts().slots.reserved, 4);
    let counts = bench.counts();
    assert_eq!((counts.requests_failed, counts.requests_waiting), (0, 0));
}

#[test]
fn it_is_granted_at_once_or_not_at_all() {
    // Broken in production: guesses wait in the line of requests, or take all of the buffer.
    let mut bench = Bench::new(4);
    assert_eq!(
        refusal(&bench.alloc_ahead("a", "large", &["k0", "k1", "k2"])),
        Some(FailureKind::NoSlots),
        "half may be"
    );
    let (_, said) = bench.alloc("b", "r", &["b0", "b1", "b2"]);
    grant_of(&said);
    assert_eq!(refusal(&bench.alloc_ahead("a", "x", &["k0", "k1"])), Some(FailureKind::NoSlots), "one is free");
    let (_, said) = bench.alloc("b", "s", &["c0", "c1"]);
    assert!(said.is_empty(), "it waits");
    assert_eq!(refusal(&bench.alloc_ahead("a", "y", &["k0"])), Some(FailureKind::NoSlots), "somebody waits");
    let counts = bench.counts();
    assert_eq!((counts.requests_active, counts.requests_waiting, counts.requests_failed), (2, 1, 0));
}

#[test]
fn it_takes_no_place_of_requests() {
    // Broken in production: a sender's guesses count as its requests, and these are refused.
    let mut bench = Bench::with(8, 8, |settings| {
        incoming(settings).peer_requests_max = 1;
        settings.requests_max = 2;
    });
    grant_of(&bench.alloc_ahead("a", "x", &["k0"]));
    assert_eq!(refusal(&bench.alloc_ahead("a", "y", &["k1"])), Some(FailureKind::NoSlots), "half of the places");
    grant_of(&bench.alloc("a", "r", &["r0"]).1);
    grant_of(&bench.alloc("b", "s", &["s0"]).1);
    assert_eq!(refusal(&bench.alloc("b", "t", &["t0"]).1), Some(FailureKind::Busy));
}

#[test]
fn it_ends_with_its_sender_and_with_a_shutdown() {
    // Broken in production: decode waits for what a sender that is gone was sending, or a daemon does not stop.
    let mut bench = Bench::new(8);
    grant_of(&bench.alloc_ahead("a", "x", &["k0"]));
    grant_of(&bench.alloc_ahead("b", "y", &["k1"]));
    bench.session.handle_route_gone(bench.now, &"a");
    bench.drain();
    assert_eq!(look_up(&mut bench, &["k0", "k1"]).2, [1]);
    bench.session.handle_shutdown(bench.now);
    bench.drain();
    assert!(look_up(&mut bench, &["k0", "k1"]).2.is_empty());
    assert!(bench.session.is_drained());
}
