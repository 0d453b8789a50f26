//! What makes room for a request, and what does not.

use pd_backend::ids::{ChunkKey, ClientId, Seq};
use pd_backend::node::Answer;
use pd_backend::node::incoming::Lookup;

use super::bench::*;

/// A request of these chunks is sent and fetched: they stay as long as there is room.
pub(super) fn cache(bench: &mut Bench, request: &str, names: &[&str]) {
    let grant = grant_of(&bench.alloc("a", request, names).1);
    bench.commit("a", request, grant);
    let Some(Answer::Ready { lease, .. }) = wait(bench, 1, request, None) else { panic!("{request} is not ready") };
    bench.session.handle_release(bench.now, ClientId(1), Seq(2), lease);
    bench.drain();
}

/// Which of these chunks are there; with a lease on them if it is to be kept.
pub(super) fn there(bench: &mut Bench, names: &[&str], keep: bool) -> Vec<bool> {
    let keys = names.iter().map(|name| ChunkKey::new(*name).unwrap()).collect();
    bench.session.handle_lookup(bench.now, ClientId(1), Seq(3), &Lookup { keys, uncommitted: false, fetches: false });
    let Some(Answer::Found { lease, chunks, .. }) = answer_of(bench, 3) else { panic!("not found") };
    if let Some(lease) = lease.filter(|_| !keep) {
        bench.session.handle_release(bench.now, ClientId(1), Seq(4), lease);
    }
    bench.drain();
    chunks.iter().map(Option::is_some).collect()
}

/// Two slots, each with a short chunk that is held and a longer one that is not.
fn fragmented(bench: &mut Bench) {
    for (request, name, tokens) in [("r0", "k0", 3), ("r1", "k1", 1), ("r2", "k2", 3), ("r3", "k3", 1)] {
        bench.last_tokens = tokens;
        cache(bench, request, &[name]);
    }
    bench.last_tokens = 4;
    assert_eq!(there(bench, &["k1", "k3"], true), [true, true]);
}

#[test]
fn a_request_that_no_eviction_helps_waits_and_leaves_the_cache_alone() {
    // Broken in production: one prompt that has to wait for a decode worker to let go empties the prefix cache at once.
    let mut bench = Bench::new(2);
    fragmented(&mut bench);
    let (_, granted) = bench.alloc("b", "long", &["l"]);
    assert!(granted.is_empty(), "24 bytes could be free, and no 16 of them in one piece");
    assert_eq!(there(&mut bench, &["k0", "k2"], false), [true, true]);
    // The lease ends: one slot is enough.
    bench.session.handle_client_gone(bench.now, ClientId(1));
    assert_eq!(answers(bench.drain()).len(), 1);
    assert_eq!(there(&mut bench, &["k0", "k1", "k2", "k3"], false).iter().filter(|there| **there).count(), 2);
}

#[test]
fn a_buffer_that_can_grow_does_so_before_its_cache_is_emptied_in_vain() {
    // Broken in production: a lazy buffer loses its cache with each step that it grows by.
    let mut bench = Bench::lazy(2, 4);
    fragmented(&mut bench);
    assert!(bench.alloc("b", "long", &["l"]).1.is_empty());
    assert_eq!(bench.grow_outputs, 1);
    assert_eq!(bench.grown(Ok(())).len(), 1);
    assert_eq!(there(&mut bench, &["k0", "k1", "k2", "k3"], false), [true; 4]);
}

#[test]
fn room_that_senders_are_not_told_of_yet_costs_the_cache_nothing() {
    // Broken in production: a request that comes while the buffer grows empties the cache and is not served.
    let mut bench = Bench::lazy(2, 3);
    cache(&mut bench, "r", &["k0", "k1"]);
    bench.addresses.grow(16).unwrap();
    assert!(bench.alloc("b", "long", &["l0", "l1", "l2"]).1.is_empty(), "a part of it would lie in the new slot");
    assert_eq!(there(&mut bench, &["k0", "k1"], false), [true, true]);
}
