//! Commits whose chunks are being summed.

use std::time::Duration;

use pd_backend::ids::{Checksum, FailureKind, GrantId, RequestId};
use pd_backend::wire::Message;
use pd_backend::wire::message::CAPABILITY_VERIFYING;

use super::bench::*;

/// A receiver whose senders can be told to wait, and a commit of `a` that is being checked.
fn checking() -> (Bench, GrantId) {
    let mut bench = Bench::new(4);
    bench.capabilities.push(CAPABILITY_VERIFYING.into());
    assert!(bench.shake_hands("a", Vec::new()).refusal.is_none());
    let grant = grant_of(&bench.alloc("a", "r", &["k0"]).1);
    assert!(bench.commit_summed("a", "r", grant, vec![Some(Checksum(7))]).is_empty(), "nobody has asked yet");
    (bench, grant)
}

/// Whether `a` is told to wait when it says its commit again.
fn is_asked_to_wait(bench: &mut Bench, grant: GrantId) -> bool {
    let said = bench.commit_summed("a", "r", grant, vec![Some(Checksum(7))]);
    match said.as_slice() {
        [] => false,
        [("a", Message::PdVerifying(verifying))] => {
            assert_eq!((verifying.seq.0, verifying.req_id.as_str()), (bench.seq, "r"));
            true
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_check_takes_as_long_as_it_takes_while_it_gets_on() {
    // Broken in production: a receiver with much to sum fails right requests, by its own deadline or its sender's; or one
    // that hangs keeps its senders waiting for ever.
    let (mut bench, grant) = checking();
    for second in 0..60 {
        assert!(is_asked_to_wait(&mut bench, grant), "after {second} s");
        bench.session.handle_verifying(bench.now);
        later(&mut bench, 1);
        ping(&mut bench, "a");
    }
    assert_eq!(bench.counts().requests_active, 1, "its deadline of 10 s is for the writing");
    for _ in 0..3 {
        later(&mut bench, 1);
        ping(&mut bench, "a");
        assert!(is_asked_to_wait(&mut bench, grant));
    }
    later(&mut bench, 1);
    ping(&mut bench, "a");
    assert!(!is_asked_to_wait(&mut bench, grant), "nothing was summed for five seconds");
    bench.session.handle_verified(bench.now, &RequestId::new("r").unwrap(), grant, &[]);
    assert_eq!(ack_refusal(&bench.drain()), None);
    assert!(bench.abandoned.is_empty());
}

#[test]
fn who_cannot_wait_is_not_asked_to_and_what_nobody_waits_for_is_not_checked() {
    // Broken in production: an older sender is sent what it cannot read; or the engine sums gigabytes of requests that
    // have ended, while others wait.
    let (mut bench, _) = checking();
    let grant = grant_of(&bench.alloc("b", "s", &["k1"]).1);
    for _ in 0..2 {
        assert!(bench.commit_summed("b", "s", grant, vec![Some(Checksum(7))]).is_empty());
    }
    bench.cancel("b", "s", Some(grant), None, true);
    assert_eq!(bench.abandoned, [grant]);
    let other = grant_of(&bench.alloc("b", "t", &["k2"]).1);
    bench.cancel("b", "t", Some(other), None, true);
    assert_eq!(bench.abandoned, [grant], "it was not being checked");
    bench.session.handle_route_gone(bench.now, &"a");
    bench.drain();
    assert_eq!(bench.abandoned.len(), 2, "its sender is lost, and the request with it");
    let failed = kind_of(wait(&mut bench, 1, "r", Some(Duration::ZERO)));
    assert_eq!(failed, Some(FailureKind::PeerLost));
}
