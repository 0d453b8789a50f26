//! The serving engine resets its cache: what was granted before is never read again.

use pd_backend::ids::{ClientId, FailureKind, Seq};
use pd_backend::node::Answer;
use pd_backend::node::incoming::Lookup;

use super::bench::*;
use pd_backend::ids::ChunkKey;

fn reset(bench: &mut Bench, id: u64) {
    bench.session.handle_reset(bench.now, ClientId(1), Seq(id));
    assert_eq!(answer_of(bench, id), Some(Answer::Reset));
    bench.drain();
}

/// Which of these chunks are ready, and the lease on them.
fn find(bench: &mut Bench, id: u64, keys: &[&str]) -> (Vec<bool>, Option<pd_backend::ids::LeaseId>) {
    let keys = keys.iter().map(|key| ChunkKey::new(key).unwrap()).collect();
    let lookup = Lookup { keys, uncommitted: false, fetches: false };
    bench.session.handle_lookup(bench.now, ClientId(1), Seq(id), &lookup);
    match answer_of(bench, id) {
        Some(Answer::Found { lease, chunks, .. }) => (chunks.iter().map(Option::is_some).collect(), lease),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_being_written_is_dropped_when_it_would_be_ready() {
    // Broken in production: chunks that were on their way when the weights were changed are read after it.
    let mut bench = Bench::new(4);
    let (_, answer) = bench.alloc("a", "r", &["k0", "k1"]);
    let grant = grant_of(&answer);
    assert_eq!(wait(&mut bench, 1, "r", None), None);
    bench.session.handle_reset(bench.now, ClientId(1), Seq(2));
    assert_eq!(kind_of(answer_of(&mut bench, 1)), Some(FailureKind::Cancelled), "whoever waits is told at once");
    let said = bench.commit("a", "r", grant);
    assert_eq!(ack_refusal(&said).map(|refusal| refusal.kind), Some(FailureKind::Cancelled));
    assert_eq!(find(&mut bench, 3, &["k0", "k1"]), (vec![false, false], None));
    assert_eq!(bench.session.counts().slots.quarantined, 2, "its writer has not stopped");
    bench.cancel("a", "r", Some(grant), None, true);
    assert_eq!(bench.session.counts().available_bytes, 64);
}

#[test]
fn ready_chunks_are_found_no_more_and_leased_ones_last_as_long_as_their_lease() {
    // Broken in production: a reset leaves chunks behind, or takes them from a reader that is copying them.
    let mut bench = Bench::new(6);
    for (id, keys) in [("idle", ["k0", "k1"]), ("leased", ["k2", "k3"]), ("not fetched", ["k4", "k5"])] {
        let (_, answer) = bench.alloc("a", id, &keys);
        bench.commit("a", id, grant_of(&answer));
    }
    let fetched = |answer: Option<Answer>| match answer {
        Some(Answer::Ready { lease, .. }) => lease,
        other => panic!("{other:?}"),
    };
    let idle = fetched(wait(&mut bench, 1, "idle", None));
    bench.session.handle_release(bench.now, ClientId(1), Seq(2), idle);
    let leased = fetched(wait(&mut bench, 3, "leased", None));
    reset(&mut bench, 4);
    let counts = bench.session.counts().slots;
    assert_eq!((counts.ready_idle, counts.ready_pinned, counts.reserved), (0, 2, 0));
    let keys = ["k0", "k1", "k2", "k3", "k4", "k5"];
    assert_eq!(find(&mut bench, 5, &keys), (vec![false; 6], None));
    assert_eq!(kind_of(wait(&mut bench, 6, "not fetched", None)), Some(FailureKind::Cancelled));
    // The same chunks, computed anew, are sent again and found, also while the former ones are still read.
    let (_, answer) = bench.alloc("a", "anew", &["k2", "k3"]);
    assert_eq!(answer[0].1.already_sent_indexes, [] as [u32; 0]);
    bench.commit("a", "anew", grant_of(&answer));
    assert_eq!(find(&mut bench, 7, &["k2", "k3"]).0, [true, true]);
    bench.session.handle_release(bench.now, ClientId(1), Seq(8), leased);
    bench.drain();
    assert_eq!(bench.session.counts().slots.ready_pinned, 2, "freed with the last lease");
    assert_eq!(find(&mut bench, 9, &["k2", "k3"]).0, [true, true]);
}

#[test]
fn requests_that_wait_for_slots_are_refused() {
    // Broken in production: a request whose keys are of the former weights is granted slots after the reset.
    let mut bench = Bench::new(2);
    bench.alloc("a", "first", &["k0", "k1"]);
    let (_, none) = bench.alloc("b", "second", &["k2", "k3"]);
    assert!(none.is_empty());
    bench.session.handle_reset(bench.now, ClientId(1), Seq(1));
    let said = answers(bench.drain());
    assert_eq!(said.len(), 1);
    let refusal = said[0].1.pd.as_ref().and_then(|pd| pd.refusal.clone()).expect("refused");
    assert_eq!((said[0].0, refusal.kind), ("b", FailureKind::Cancelled));
    assert_eq!(bench.counts().requests_active, 0);
}
