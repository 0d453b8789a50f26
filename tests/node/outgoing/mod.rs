//! The sender's session alone, message by message: a receiver or a network that misbehaves once in a year.

use std::time::Duration;

use pd_backend::ids::{ChecksumMode, Failure, FailureKind, GrantId, IpcHandle, Seq, SlotPart};
use pd_backend::node::outgoing::{Event, Sending};
use pd_backend::node::{Answer, NodeSettings};
use pd_backend::wire::Message;
use pd_backend::wire::message::{AllocReplyExtension, AllocResponse, CommitAck, Pong, Revoke, Verifying};

mod ahead;
mod bench;
mod configured;
#[cfg(feature = "lmcache")]
mod lmcache;
#[cfg(feature = "lmcache")]
mod lmcache_bench;
mod registrations;

use bench::*;

#[test]
fn a_request_is_opened_with_slots_for_what_it_has_to_send() {
    // Broken in production: a request that opens and stages at once fills a slot that nobody sends, or sends too little.
    let mut bench = Bench::new();
    let slots = bench.opened("r", 3, &[1], true);
    assert_eq!(slots.iter().map(|slot| slot.chunk).collect::<Vec<_>>(), [0, 2]);
    bench.session.handle_stage(bench.now, CLIENT, Seq(2), &request("r"), vec![0], None);
    bench.pump();
    assert!(matches!(bench.answers.pop(), Some((Seq(2), Answer::Failed { .. }))), "it is staged already");
    let parts: Vec<SlotPart> =
        slots.iter().map(|slot| SlotPart { slot: slot.slot, offset_bytes: 0, len_bytes: None }).collect();
    let sending = Sending { parts: &parts, last: true, after: None };
    bench.session.handle_send(bench.now, CLIENT, Seq(3), &request("r"), sending);
    bench.pump();
    assert_eq!(bench.answers.pop(), Some((Seq(3), Answer::Accepted)));
    assert_eq!(bench.posts.len(), 1);
    assert_eq!(bench.opened("all there", 2, &[0, 1], true), [], "nothing to send needs no slot");
}

#[test]
fn a_request_learns_which_receiver_has_gone() {
    // Broken in production: a failed request names the port of a socket, and nobody knows which decode worker that was.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    let peer = *bench.opened.last().unwrap();
    let reason = Failure::new(FailureKind::PeerLost, "tcp://r:2 is gone: the connection is closed");
    bench.session.handle_peer_closed(bench.now, peer, reason);
    bench.pump();
    let [Event::Failed { failure, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
    assert_eq!(failure.text, "receiver r:1/2: tcp://r:2 is gone: the connection is closed");
}

#[test]
fn opening_with_slots_takes_none_from_those_who_wait() {
    // Broken in production: a long request waits for slots until its deadline while short ones take each that comes free.
    let mut bench = Bench::new();
    assert_eq!(bench.opened("first", 3, &[], true).len(), 3);
    assert_eq!(bench.opened("waits", 2, &[], false), []);
    bench.session.handle_stage(bench.now, CLIENT, Seq(2), &request("waits"), vec![0, 1], None);
    bench.pump();
    assert_eq!(bench.opened("short", 1, &[], true), [], "one is free, and somebody waits");
    bench.session.handle_cancel(bench.now, CLIENT, Seq(3), &request("first"));
    bench.pump();
    let staged: Vec<Seq> = bench
        .answers
        .iter()
        .filter_map(|(id, answer)| matches!(answer, Answer::Staged { .. }).then_some(*id))
        .collect();
    assert_eq!(staged, [Seq(2)]);
    assert_eq!(bench.opened("large", 3, &[], true), [], "two of three slots are no slots");
    assert_eq!(bench.opened("small", 1, &[], true).len(), 1, "and none of them was kept");
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
fn a_commit_is_waited_for_as_long_as_its_receiver_is_checking() {
    // Broken in production: right requests fail because their receiver has much to sum; or a receiver that lives but never
    // answers holds a request for ever.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.send("r");
    let transfer = bench.posts[0];
    bench.session.handle_transfer_done(bench.now, transfer, Ok(Vec::new()));
    bench.pump();
    let Some(Message::PdCommit(commit)) = bench.said.last().cloned() else { panic!("{:?}", bench.said) };
    let verifying = Verifying { seq: commit.seq, req_id: request("r") };
    for _ in 0..10 {
        bench.later(8, true);
        bench.hear(Message::PdVerifying(verifying.clone()));
    }
    assert!(bench.events.is_empty(), "{:?}", bench.events);
    // What answers another question is no sign of this one.
    let other = Verifying { seq: Seq(commit.seq.0 + 1000), req_id: request("r") };
    for _ in 0..2 {
        bench.later(5, true);
        bench.hear(Message::PdVerifying(other.clone()));
    }
    let [Event::Failed { failure, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
    assert_eq!(failure.kind, FailureKind::Deadline);
    assert_eq!(failure.text, "nothing was heard of the commit for 9000 ms (pd_commit_timeout_sec)");
    // And after the end nothing of it moves a deadline.
    bench.hear(Message::PdVerifying(verifying));
    bench.later(20, true);
    assert_eq!(bench.events.len(), 1);
}

#[test]
fn a_transfer_that_may_not_be_summed_yet_is_called_back() {
    // Broken in production: a cancelled request of gigabytes is summed and written to the end, while others wait.
    let mut bench = Bench::with(NodeSettings { checksum: ChecksumMode::Full, ..settings() });
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.send("r");
    let transfer = bench.posts[0];
    bench.session.handle_cancel(bench.now, CLIENT, Seq(9), &request("r"));
    bench.pump();
    assert_eq!(bench.abandoned, [(transfer, false)]);
    assert!(bench.words().is_empty(), "it may be posted already");
    let given_up = Failure::new(FailureKind::Cancelled, "it was given up");
    bench.session.handle_transfer_done(bench.now, transfer, Err(given_up));
    bench.pump();
    assert_eq!(bench.words().len(), 1);
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
    let half = SlotPart { slot: slots[0].slot, offset_bytes: 0, len_bytes: Some(8) };
    let sending = Sending { parts: &[half], last: false, after: None };
    bench.session.handle_send(bench.now, CLIENT, Seq(3), &request("r"), sending);
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
fn a_failure_that_is_acknowledged_late_leaves_the_next_attempt() {
    // Broken in production: a request that is sent again is cancelled by what its client says about the first attempt.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    let revoke = Revoke { req_id: request("r"), grant: GrantId(7), reason: lost(), alloc_seq: Some(seq) };
    bench.hear(Message::PdRevoke(revoke));
    assert!(matches!(bench.events.as_slice(), [Event::Failed { .. }]), "{:?}", bench.events);
    let seq = bench.open("r");
    bench.grant(seq, 8);
    bench.session.handle_acknowledge(bench.now, CLIENT, Seq(4), &request("r"));
    bench.pump();
    assert_eq!(bench.answers.pop(), Some((Seq(4), Answer::Cancelled { request: request("r") })));
    bench.send("r");
    assert_eq!((bench.events.len(), bench.posts.len()), (1, 1), "it goes on");
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
    let [half, rest] = [0, 8].map(|offset_bytes| SlotPart { slot: slots[0].slot, offset_bytes, len_bytes: Some(8) });
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
    assert_eq!(bench.session.counts().slots.staged, 1, "its writer may still be at work");
    bench.session.handle_client_gone(bench.now, CLIENT);
    bench.pump();
    assert_eq!(bench.abandoned.last(), Some(&(fenced, true)), "whoever would end the waiting has gone");
    let failure = Failure::new(FailureKind::Cancelled, "given up");
    bench.session.handle_transfer_done(bench.now, fenced, Err(failure));
    bench.pump();
    assert_eq!(bench.session.counts().slots.staged, 0);
    assert!(bench.session.is_drained());
}

#[test]
fn a_reset_ends_what_is_not_sent() {
    // Broken in production: chunks that were computed with the former weights are committed after these were changed.
    let mut bench = Bench::new();
    let seq = bench.open("r");
    bench.grant(seq, 7);
    bench.send("r");
    bench.open("not granted yet");
    bench.pump();
    bench.session.handle_reset(bench.now, CLIENT, Seq(90));
    bench.pump();
    assert!(bench.answers.iter().any(|(id, answer)| *id == Seq(90) && *answer == Answer::Reset), "{:?}", bench.answers);
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_failed, 2);
    for transfer in bench.posts.clone() {
        bench.session.handle_transfer_done(bench.now, transfer, Ok(Vec::new()));
    }
    bench.pump();
    assert!(bench.session.is_drained(), "nothing of it is committed");
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_sent, 0);
    // What is opened from now on is sent.
    let seq = bench.open("later");
    bench.grant(seq, 8);
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_active, 1);
}
