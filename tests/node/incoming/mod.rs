//! The receiver's session alone, message by message: what a well-behaved sender never does, or does once in a year.

mod addressee;
mod ahead;
mod bench;
mod ended;
mod eviction;
mod fetches;
mod limits;
#[cfg(feature = "lmcache")]
mod lmcache;
mod readers;
mod reset;
mod verification;

use std::time::Duration;

use pd_backend::buffer::BufferError;
use pd_backend::ids::{Checksum, ChecksumMode, ChunkKey, ClientId, FailureKind, GrantId, RequestId, Seq, truncate};
use pd_backend::node::Answer;
use pd_backend::node::Port;
use pd_backend::node::incoming::Lookup;
use pd_backend::wire::Message;
use pd_backend::wire::message::AllocResponse;

use self::bench::*;

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
    assert_eq!(bench.session.counts().available_bytes, 64);
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
    assert_eq!(bench.session.counts().available_bytes, 64);
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
    assert_eq!(bench.session.counts().slots.ready_pinned, 1);
}

#[test]
fn a_request_grows_the_buffer_step_by_step_and_its_sender_learns_of_it() {
    // Broken in production: a lazy buffer stays at its initial size, or a sender is told to write where it cannot.
    let mut bench = Bench::lazy(1, 4);
    let (_, answers) = bench.alloc("a", "r", &["k0", "k1", "k2"]);
    assert!(answers.is_empty(), "it waits for the buffer");
    for slots in [2, 3] {
        assert_eq!(bench.grow_outputs, slots - 1, "one step at a time");
        let answers = bench.grown(Ok(()));
        assert_eq!(answers.len(), usize::from(slots == 3));
        if let Some((to, answer)) = answers.first() {
            let extension = answer.pd.as_ref().unwrap();
            let memory = extension.memory.as_ref().expect("the sender knew of one slot");
            assert_eq!((*to, memory.len_bytes, memory.descriptors.as_slice()), ("a", 48, &[48][..]));
            assert_eq!(extension.offsets, [0, 16, 32]);
        }
    }
    bench.known_len_bytes = 48;
    let (_, answers) = bench.alloc("b", "s", &["l"]);
    assert!(answers.is_empty());
    assert_eq!(bench.grow_outputs, 3);
    let answers = bench.grown(Ok(()));
    assert_eq!(answers[0].1.pd.as_ref().unwrap().memory.as_ref().unwrap().len_bytes, 64);
    let (_, full) = bench.alloc("b", "t", &["m"]);
    assert!(full.is_empty() && bench.grow_outputs == 3, "the ceiling is the ceiling");
}

#[test]
fn a_step_that_fails_ends_only_the_requests_that_cannot_do_without_it() {
    // Broken in production: a machine short of memory takes the daemon down, or every request with it.
    let mut bench = Bench::lazy(1, 4);
    grant_of(&bench.alloc("a", "first", &["k0"]).1);
    let (_, small) = bench.alloc("a", "small", &["k1"]);
    let (_, large) = bench.alloc("b", "large", &["l0", "l1"]);
    assert!(small.is_empty() && large.is_empty());
    let answers = bench.grown(Err("0 bytes are free".into()));
    let refusals: Vec<_> = answers.iter().map(|(to, answer)| (*to, answer.pd.clone().unwrap().refusal)).collect();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    let (to, Some(refusal)) = &refusals[0] else { panic!("{refusals:?}") };
    assert_eq!((*to, refusal.kind), ("b", FailureKind::NoSlots));
    assert!(refusal.text.contains("could not grow: 0 bytes are free"), "{refusal}");
    assert_eq!(bench.grow_outputs, 1, "not again at once");
    bench.now += Duration::from_secs(2);
    bench.session.handle_timeout(bench.now);
    bench.drain();
    assert_eq!(bench.grow_outputs, 2, "again after a pause, for the one that still waits");
    assert_eq!(bench.grown(Ok(())).len(), 1);
}

#[test]
fn the_longest_reason_why_a_buffer_did_not_grow_reaches_whoever_waited() {
    // Broken in production: the text stops in the middle of a word, before it says what to do.
    let name = "n".repeat(60);
    let mut bench = Bench::lazy(1, 4);
    grant_of(&bench.alloc("a", "first", &["k0"]).1);
    bench.alloc("b", &name, &["k1"]);
    let large = u64::MAX / 1000;
    let reason = format!("populating it: Cannot allocate memory (os error 12); {large} bytes are free");
    let reason = BufferError::Allocate { len_bytes: large, reason }.to_string();
    let step = BufferError::Step { step_bytes: large, buffer_len_bytes: large, free_bytes: large, reason };
    assert!(bench.grown(Err(step.to_string())).is_empty(), "it waits for its deadline");
    bench.now += Duration::from_secs(11);
    bench.session.handle_timeout(bench.now);
    let said = answers(bench.drain());
    let [(_, answer)] = said.as_slice() else { panic!("{said:?}") };
    let refusal = answer.pd.clone().unwrap().refusal.unwrap();
    assert_eq!(truncate(&refusal.text), refusal.text);
    assert!(refusal.text.ends_with("lower pd_buffer_size or free memory"), "{refusal}");
}

#[test]
fn short_chunks_and_small_groups_share_slots() {
    // Broken in production: a prompt of one token costs a whole slot, and a buffer for thousands holds hundreds.
    let mut bench = Bench::new(2);
    bench.last_tokens = 1;
    for index in 0..8 {
        let name = format!("r{index}");
        let (_, answers) = bench.alloc("a", &name, &[&name]);
        assert_eq!(answers.len(), 1, "request {index} of 4 bytes in a buffer of 32");
        grant_of(&answers);
    }
    assert_eq!(bench.session.counts().available_bytes, 0);
}

#[test]
fn summed_chunks_are_ready_once_they_are_checked_and_a_wrong_one_is_named() {
    // Broken in production: a decode worker reads a chunk before its check is over, or after it has failed.
    let mut bench = Bench::new(4);
    let (_, answers) = bench.alloc("a", "r", &["k0", "k1"]);
    let grant = grant_of(&answers);
    let sums = vec![None, Some(Checksum(7))];
    assert!(bench.commit_summed("a", "r", grant, sums.clone()).is_empty(), "not before they are summed");
    assert!(bench.commit_summed("a", "r", grant, sums.clone()).is_empty(), "said twice");
    let [(asked, chunks)] = &bench.verifies[..] else { panic!("{:?}", bench.verifies) };
    assert_eq!((*asked, chunks.len(), chunks[0].index, chunks[0].checksum), (grant, 1, 1, Checksum(7)));
    assert_eq!((chunks[0].offset_bytes, chunks[0].len_bytes), (answers[0].1.pd.as_ref().unwrap().offsets[1], 16));
    let id = RequestId::new("r").unwrap();
    bench.session.handle_verified(bench.now, &id, GrantId(999), &[]);
    assert!(bench.drain().is_empty(), "another attempt's result is not this one's");
    bench.session.handle_verified(bench.now, &id, grant, &[1]);
    let refusal = ack_refusal(&bench.drain()).expect("refused");
    assert_eq!(refusal.kind, FailureKind::Corrupted);
    assert!(refusal.text.starts_with("chunk 1 of r (k1) is not as it was sent"), "{refusal}");
    assert_eq!(bench.counts().chunks_corrupted, 1);
    assert_eq!(bench.session.counts().slots.quarantined, 2, "until its writer says that it has stopped");
    bench.cancel("a", "r", Some(grant), None, true);
    let grant = grant_of(&bench.alloc("a", "r", &["k0", "k1"]).1);
    bench.commit_summed("a", "r", grant, sums);
    bench.session.handle_verified(bench.now, &id, grant, &[]);
    assert_eq!(ack_refusal(&bench.drain()), None);
    assert_eq!(bench.session.counts().slots.ready_pinned, 2);
}

#[test]
fn a_commit_that_is_said_again_learns_how_its_request_ended() {
    // Broken in production: the answer that named the damaged chunk is lost, and the sender is told `unknown`.
    let mut bench = Bench::new(4);
    let (_, answers) = bench.alloc("a", "r", &["k0"]);
    let grant = grant_of(&answers);
    let sums = vec![Some(Checksum(7))];
    bench.commit_summed("a", "r", grant, sums.clone());
    bench.session.handle_verified(bench.now, &RequestId::new("r").unwrap(), grant, &[0]);
    let first = ack_refusal(&bench.drain()).unwrap();
    assert_eq!(first.kind, FailureKind::Corrupted);
    assert_eq!(ack_refusal(&bench.commit_summed("a", "r", grant, sums.clone())), Some(first));
    // Another sender's guess, and another attempt, learn nothing of it.
    let kind = |said: &[_]| ack_refusal(said).unwrap().kind;
    assert_eq!(kind(&bench.commit_summed("b", "r", grant, sums.clone())), FailureKind::Unknown);
    assert_eq!(kind(&bench.commit_summed("a", "r", GrantId(grant.0 + 1), sums)), FailureKind::Unknown);
}

#[test]
fn a_sender_that_sums_too_little_is_refused_before_it_has_sent_anything() {
    // Broken in production: every request between two daemons fails after its bytes have moved, or never gets an answer.
    let mut bench = Bench::with(4, 4, |settings| settings.checksum = ChecksumMode::Full);
    bench.capabilities.clear();
    let refusal = bench.shake_hands("a", Vec::new()).refusal.unwrap();
    assert_eq!(
        refusal.text,
        "pd_checksum is full at receiver and not at a; set it to full there, or to sampled or off here"
    );
    let seq = bench.next_seq();
    let said = init_message(&mut bench, Port::Alloc, "b", seq.0);
    let [(_, Message::NixlInitResponse(response))] = said.as_slice() else { panic!("{said:?}") };
    let refusal = response.pd.as_ref().unwrap().refusal.as_ref().unwrap();
    assert!(refusal.text.contains("pd_peer_init_port"), "{refusal}");
}

#[test]
fn a_request_that_ends_while_it_is_checked_stays_ended() {
    // Broken in production: a cancelled request becomes ready after all, and its slots are never freed.
    let mut bench = Bench::new(4);
    let grant = grant_of(&bench.alloc("a", "r", &["k0"]).1);
    bench.commit_summed("a", "r", grant, vec![Some(Checksum(7))]);
    bench.cancel("a", "r", Some(grant), None, true);
    bench.session.handle_verified(bench.now, &RequestId::new("r").unwrap(), grant, &[]);
    assert!(bench.drain().is_empty());
    assert_eq!(bench.session.counts().available_bytes, 64);
    let grant = grant_of(&bench.alloc("a", "r", &["k0"]).1);
    let said = bench.commit_summed("a", "r", grant, vec![None, Some(Checksum(7))]);
    assert_eq!(ack_refusal(&said).unwrap().kind, FailureKind::BadRequest, "two checksums for one chunk");
}

#[test]
fn a_sender_beyond_a_limit_is_refused_naming_it_and_others_are_served() {
    // Broken in production: one prefill worker that went wrong takes every request, chunk or peer of a decode worker.
    let mut bench = Bench::with(16, 16, |settings| {
        settings.requests_max = 4;
        incoming(settings).peer_requests_max = 2;
        settings.request_chunks_max = 3;
        settings.peers_max = 2;
    });
    let refused = |answers: &[(&'static str, AllocResponse)], kind: FailureKind, limit: &str| {
        let refusal = answers[0].1.pd.as_ref().unwrap().refusal.clone().unwrap_or_else(|| panic!("within {limit}"));
        assert_eq!(refusal.kind, kind);
        assert!(refusal.text.contains(limit), "{}", refusal.text);
    };
    refused(&bench.alloc("a", "long", &["w", "x", "y", "z"]).1, FailureKind::Limit, "pd_max_request_chunks");
    let (_, first) = bench.alloc("a", "a1", &["k1"]);
    grant_of(&bench.alloc("a", "a2", &["k2"]).1);
    // Whoever is too many now may ask again.
    refused(&bench.alloc("a", "a3", &["k3"]).1, FailureKind::Busy, "pd_max_peer_requests");
    // Others have their share, and what is committed counts no more.
    grant_of(&bench.alloc("b", "b1", &["k4"]).1);
    bench.commit("a", "a1", grant_of(&first));
    grant_of(&bench.alloc("a", "a3", &["k3"]).1);
    refused(&bench.alloc("b", "b2", &["k5"]).1, FailureKind::Busy, "pd_max_requests");
    // Both senders are busy: neither makes room for a third.
    let refusal = bench.shake_hands("c", Vec::new()).refusal.expect("no place for a third");
    assert_eq!(refusal.kind, FailureKind::Limit);
    assert!(refusal.text.contains("pd_max_peers"), "{}", refusal.text);
}

#[test]
fn a_handshake_that_was_overtaken_frees_nothing() {
    // Broken in production: a handshake that the network held up counts as the word that nothing is in flight, and
    // slots are granted under a write.
    let mut bench = Bench::new(4);
    let late = bench.next_seq().0;
    let (_, answer) = bench.alloc("a", "r", &["k0", "k1"]);
    bench.cancel("a", "r", Some(grant_of(&answer)), None, false);
    hello_message(&mut bench, "a", late);
    assert_eq!(bench.session.counts().slots.quarantined, 2, "sent before the grant was asked for");
    bench.session.handle_route_gone(bench.now, &"a");
    hello_message(&mut bench, "a", late);
    assert_eq!(bench.session.counts().slots.quarantined, 2, "nor once the peer is lost");
    assert!(bench.shake_hands("a", Vec::new()).refusal.is_none());
    assert_eq!(bench.session.counts().available_bytes, 64);
}

#[test]
fn a_handshake_that_arrives_twice_is_one() {
    // Broken in production: the network repeats a handshake, and a request that has begun since is failed.
    let mut bench = Bench::new(4);
    let seq = bench.next_seq().0;
    assert_eq!(hello_message(&mut bench, "a", seq).len(), 1);
    let (_, answer) = bench.alloc("a", "r", &["k0"]);
    assert!(hello_message(&mut bench, "a", seq).is_empty());
    let said = bench.commit("a", "r", grant_of(&answer));
    assert!(matches!(said.as_slice(), [(_, Message::PdCommitAck(ack))] if ack.refusal.is_none()), "{said:?}");
}

#[test]
fn an_allocation_that_arrives_twice_or_after_its_cancel_takes_slots_once_or_never() {
    // Broken in production: slots are granted that nobody will ever write, commit or cancel.
    let mut bench = Bench::new(4);
    let (seq, answer) = bench.alloc("a", "r", &["k0"]);
    bench.seq = seq.0 - 1;
    assert!(bench.alloc("a", "r", &["k0"]).1.is_empty(), "the first answer is on its way");
    bench.commit("a", "r", grant_of(&answer));
    bench.cancel("a", "r", Some(grant_of(&answer)), None, true);
    bench.seq = seq.0 - 1;
    assert!(bench.alloc("a", "r", &["k0"]).1.is_empty(), "not after its end either");
    bench.seq += 100;
    let next = Seq(bench.seq + 5);
    bench.cancel("a", "s", None, Some(next), true);
    bench.seq = next.0 - 1;
    assert!(bench.alloc("a", "s", &["k1"]).1.is_empty(), "taken back before it arrived");
    assert_eq!(bench.session.counts().slots.reserved, 0);
}

#[test]
fn a_commit_that_is_said_again_is_answered_as_the_first_time() {
    // Broken in production: an acknowledgement is lost, and a request that a decode worker has fetched is reported failed.
    let mut bench = Bench::new(4);
    let (_, answer) = bench.alloc("a", "r", &["k0"]);
    let grant = grant_of(&answer);
    bench.session.handle_wait(bench.now, ClientId(1), Seq(1), RequestId::new("r").unwrap(), None, false);
    for _ in 0..3 {
        let said = bench.commit("a", "r", grant);
        assert!(matches!(said.as_slice(), [(_, Message::PdCommitAck(ack))] if ack.refusal.is_none()), "{said:?}");
    }
    assert_eq!((bench.counts().leases, bench.counts().requests_ready), (1, 1));
}

#[test]
fn a_silent_sender_is_given_up_and_its_slots_wait_for_its_word() {
    // Broken in production: the requests of a sender that stands still wait for their deadlines, or its slots are
    // handed out while it may wake up and write.
    let mut bench = Bench::new(4);
    let said = bench.alloc("a", "r", &["k0", "k1"]).1;
    grant_of(&said);
    for _ in 0..4 {
        later(&mut bench, 2);
        assert_eq!((ping(&mut bench, "a"), bench.counts().requests_active), (None, 1));
    }
    later(&mut bench, 5);
    let counts = bench.session.counts();
    assert_eq!((bench.counts().requests_active, counts.slots.quarantined, bench.counts().peers), (0, 2, 0));
    assert_eq!(ping(&mut bench, "a"), Some(FailureKind::HandshakeRefused), "so that it shakes hands anew");
    later(&mut bench, 60);
    assert_eq!(bench.session.counts().slots.quarantined, 2, "time alone frees nothing");
    assert!(bench.shake_hands("a", Vec::new()).refusal.is_none());
    assert_eq!(bench.session.counts().available_bytes, 64);
}

#[test]
fn a_receiver_that_stood_still_itself_blames_nobody() {
    // Broken in production: a machine that swaps for ten seconds loses all its peers at once.
    let mut bench = Bench::new(4);
    bench.now += Duration::from_secs(20);
    bench.session.handle_timeout(bench.now);
    assert_eq!(bench.counts().peers, 2);
    assert_eq!(ping(&mut bench, "a"), None);
    later(&mut bench, 6);
    assert_eq!(bench.counts().peers, 0, "but who stays silent from then on is gone");
}

#[test]
fn a_writer_is_asked_again_until_it_has_stopped() {
    // Broken in production: a revoke is lost, and its slots stay in quarantine although the sender is alive and well.
    let mut bench = Bench::new(4);
    let (seq, _) = bench.alloc("a", "r", &["k0"]);
    let mut revokes = 0;
    for _ in 0..20 {
        let said = later(&mut bench, 1);
        let of_it = |message: &Message| matches!(message, Message::PdRevoke(revoke) if revoke.alloc_seq == Some(seq));
        revokes += said.iter().filter(|(to, message)| *to == "a" && of_it(message)).count();
        ping(&mut bench, "a");
    }
    assert_eq!(revokes, 3, "at its deadline after 10 s, and every 5 s from then on");
}

#[test]
fn expired_chunks_are_freed_and_counted_once() {
    // Broken in production: metrics show twice as many expired chunks as there were, and they stay twice as long.
    let mut bench = Bench::new(4);
    let (_, answer) = bench.alloc("a", "r", &["k0", "k1"]);
    bench.commit("a", "r", grant_of(&answer));
    bench.now += Duration::from_secs(100);
    bench.session.handle_timeout(bench.now);
    bench.drain();
    assert_eq!((bench.counts().chunks_expired, bench.session.counts().slots.ready_idle), (2, 0));
    bench.now += Duration::from_secs(1000);
    bench.session.handle_timeout(bench.now);
    assert_eq!(bench.counts().chunks_expired, 2);
}

#[test]
fn an_old_end_is_not_the_answer_to_a_new_wait() {
    // Broken in production: a router uses a name again after hours, and the decode worker is told of the first failure.
    let mut bench = Bench::new(4);
    let (_, answer) = bench.alloc("a", "r", &["k0"]);
    bench.cancel("a", "r", Some(grant_of(&answer)), None, true);
    assert_eq!(kind_of(wait(&mut bench, 1, "r", None)), Some(FailureKind::Cancelled));
    bench.now += Duration::from_secs(101);
    assert_eq!(wait(&mut bench, 2, "r", None), None, "longer ago than chunks are kept");
}

#[test]
fn a_wait_ends_by_the_configured_time_and_at_shutdown() {
    // Broken in production: a connector asks for a year, or waits for a receiver that has stopped taking requests.
    let mut bench = Bench::new(4);
    assert_eq!(wait(&mut bench, 1, "r", Some(Duration::from_secs(1 << 40))), None);
    bench.now += Duration::from_secs(10);
    bench.session.handle_timeout(bench.now);
    assert_eq!(kind_of(answer_of(&mut bench, 1)), Some(FailureKind::Deadline));
    assert_eq!(wait(&mut bench, 2, "r", None), None);
    bench.session.handle_shutdown(bench.now);
    assert_eq!(kind_of(answer_of(&mut bench, 2)), Some(FailureKind::ShuttingDown));
    assert_eq!(kind_of(wait(&mut bench, 3, "r", None)), Some(FailureKind::ShuttingDown));
}

#[test]
fn a_request_is_fetched_by_its_chunks_where_nobody_knows_its_name() {
    // Broken in production: a router names no requests to decode, and their chunks take room until they are too old, while
    // prefill waits for it.
    let mut bench = Bench::new(3);
    for (request, keys) in [("r", &["k0", "k1"][..]), ("s", &["k0", "k2"])] {
        let (_, answer) = bench.alloc("a", request, keys);
        bench.commit("a", request, grant_of(&answer));
    }
    let keys = |names: &[&str]| names.iter().map(|name| ChunkKey::new(*name).unwrap()).collect::<Vec<_>>();
    let mut look_up = |id: u64, names: &[&str], fetches: bool| {
        let lookup = Lookup { keys: keys(names), uncommitted: false, fetches };
        bench.session.handle_lookup(bench.now, ClientId(1), Seq(id), &lookup);
        let Some(Answer::Found { lease: Some(lease), .. }) = answer_of(&mut bench, id) else { panic!("not found") };
        bench.session.handle_release(bench.now, ClientId(1), Seq(id + 1), lease);
        bench.drain();
        bench.session.counts().slots.ready_pinned
    };
    assert_eq!(look_up(10, &["k0", "k1"], false), 3, "another may ask for it by its name");
    assert_eq!(look_up(20, &["k0"], true), 3, "half of it is not the request");
    assert_eq!(look_up(30, &["k0", "k1"], true), 2, "the other request needs one of them");
    assert_eq!(kind_of(wait(&mut bench, 1, "r", None)), Some(FailureKind::Unknown));
    assert!(matches!(wait(&mut bench, 2, "s", None), Some(Answer::Ready { .. })));
}

#[test]
fn leases_are_limited_and_a_request_over_the_limit_stays_ready() {
    // Broken in production: a reader that never releases fills the daemon's memory.
    let mut bench = Bench::new(4);
    for (request, key) in [("r", "k0"), ("s", "k1")] {
        let (_, answer) = bench.alloc("a", request, &[key]);
        bench.commit("a", request, grant_of(&answer));
    }
    let key = Lookup { keys: vec![ChunkKey::new("k0").unwrap()], uncommitted: false, fetches: false };
    for id in 0..65_536 {
        bench.session.handle_lookup(bench.now, ClientId(1), Seq(100 + id), &key);
    }
    bench.drain();
    bench.session.handle_lookup(bench.now, ClientId(1), Seq(1), &key);
    assert_eq!(kind_of(answer_of(&mut bench, 1)), Some(FailureKind::Limit));
    assert_eq!(kind_of(wait(&mut bench, 2, "s", None)), Some(FailureKind::Limit));
    bench.session.handle_client_gone(bench.now, ClientId(1));
    assert_eq!(bench.counts().leases, 0);
    assert!(matches!(wait(&mut bench, 3, "s", None), Some(Answer::Ready { .. })));
}

#[test]
fn a_buffer_grows_again_after_a_step_that_failed_while_nobody_waited() {
    // Broken in production: one moment without memory, and a lazy buffer stays as small as it was for good.
    // Simulation, seed 6 of its first version.
    let mut bench = Bench::lazy(1, 4);
    let (seq, _) = bench.alloc("a", "r", &["k0", "k1"]);
    assert_eq!(bench.grow_outputs, 1);
    bench.grown(Err("0 bytes are free".into()));
    bench.cancel("a", "r", None, Some(seq), true);
    bench.now += Duration::from_secs(2);
    bench.session.handle_timeout(bench.now);
    bench.alloc("a", "s", &["k0", "k1"]);
    assert_eq!(bench.grow_outputs, 2);
}

#[test]
fn a_request_for_the_whole_buffer_does_not_wait_beside_its_own_idle_chunk() {
    // Broken in production: a long prompt whose prefix is cached in the middle of the buffer fails for want of slots,
    // with all of them free.
    // Simulation, a calm world of its first version.
    let mut bench = Bench::new(4);
    let mut ready = |request, key, tokens| {
        bench.last_tokens = tokens;
        let (_, answer) = bench.alloc("a", request, &[key]);
        bench.commit("a", request, grant_of(&answer));
        grant_of(&answer)
    };
    let (first, second) = (ready("first", "pad", 2), ready("second", "short", 3));
    bench.cancel("a", "first", Some(first), None, true);
    bench.cancel("a", "second", Some(second), None, true);
    // 12 bytes from the eighth on are ready: of the 52 others, three slots of 16 are not left in one piece each.
    let (_, answers) = bench.alloc("a", "whole", &["k0", "k1", "k2", "short"]);
    assert_eq!(answers[0].1.pd.as_ref().unwrap().offsets.len(), 4, "the short one too is written again");
}
