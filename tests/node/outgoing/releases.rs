//! What is parked makes room as soon as nobody asks for it any more, and stays for everybody else.

use pd_backend::ids::{Registration, Seq};
use pd_backend::wire::Message;
use pd_backend::wire::message::{
    AllocReplyExtension, AllocResponse, Commit, CommitAck, Register, Registered, ReleaseParked,
};

use super::bench::{Bench, request};
use super::registrations::{ask, bench, fetch, hear, hold, key, park_as};

/// Slots that are kept for somebody.
fn parked(bench: &Bench) -> u32 {
    bench.session.counts().slots.parked
}

/// A receiver that has these chunks already asks for the request of that name, and is served.
fn serve(bench: &mut Bench, name: &str, chunks: &[&str], known_as: &str) {
    let keys = chunks.iter().copied().map(key).collect();
    let register = Register { keys, ids: vec![request(known_as)], ..fetch(name, chunks[0]) };
    assert_eq!(ask(bench, register), (Registration::Accepted, None));
    let alloc = bench.allocation();
    let pd = AllocReplyExtension {
        grant: Some(pd_backend::ids::GrantId(alloc.0)),
        write_within_ms: 10_000,
        ..AllocReplyExtension::empty(alloc)
    };
    let already_sent_indexes = (0..chunks.len() as u32).collect();
    bench.hear(Message::AllocResponse(AllocResponse { already_sent_indexes, remote_indexes: vec![], pd: Some(pd) }));
    let Some(Message::PdCommit(Commit { seq, req_id, .. })) = bench.said.pop() else { panic!("{:?}", bench.said) };
    bench.hear(Message::PdCommitAck(CommitAck { seq, req_id, refusal: None }));
}

/// A receiver does not want the request that has this name, and ends with this chunk if it says so.
fn release(bench: &mut Bench, seq: u64, name: &str, known_as: &str, last: Option<&str>) {
    let release = ReleaseParked {
        seq: Seq(seq),
        instance: "receiver".into(),
        req_id: request(name),
        ids: vec![request(known_as)],
        last_key: last.map(key),
    };
    let answer = hear(bench, Message::PdRelease(release));
    assert!(
        matches!(answer, Some(Message::PdRegistered(Registered { state: Registration::Released, .. }))),
        "{answer:?}"
    );
}

#[test]
fn a_list_of_which_one_name_is_known_makes_room_as_it_is_served() {
    // Broken in production: prefill answers for a list with the name of one of its prompts; the chunks of the others stay until their
    // leases end, and prefill waits for room though everything was sent.
    let mut bench = bench(10);
    park_as(&mut bench, "p0", "cmpl-0", &["a"]);
    park_as(&mut bench, "p1", "cmpl-1", &["b"]);
    serve(&mut bench, "f0", &["a"], "cmpl-1");
    assert_eq!(parked(&bench), 1, "the other is still to be asked for");
    serve(&mut bench, "f1", &["b"], "cmpl-1");
    assert_eq!(parked(&bench), 0);
}

#[test]
fn a_prompt_that_is_served_leaves_others_of_its_name_that_begin_alike() {
    // Broken in production: prompts of a list begin with the same instructions; once the first is sent, the others may be evicted before
    // they are asked for.
    let mut bench = bench(10);
    park_as(&mut bench, "p0", "list", &["s", "a"]);
    park_as(&mut bench, "p1", "list", &["s", "b"]);
    assert_eq!(parked(&bench), 3);
    serve(&mut bench, "f0", &["s", "a"], "list");
    assert_eq!(parked(&bench), 2, "the beginning is the other's as well");
    serve(&mut bench, "f1", &["s", "b"], "list");
    assert_eq!(parked(&bench), 0);
}

#[test]
fn a_sample_that_decode_has_itself_makes_room_by_word() {
    // Broken in production: decode finds the second sample of a prompt in its own cache and says so by the name of the first; prefill
    // keeps it until its lease ends.
    let mut bench = bench(10);
    for sample in ["s0", "s1", "s2"] {
        park_as(&mut bench, sample, sample, &["a"]);
    }
    serve(&mut bench, "f0", &["a"], "s0");
    // Said again where the answer was lost: one word is one sample.
    for _ in 0..2 {
        release(&mut bench, 3, "f1", "s0", Some("a"));
    }
    assert_eq!(parked(&bench), 1);
    release(&mut bench, 4, "f2", "s0", Some("a"));
    assert_eq!(parked(&bench), 0);
}

#[test]
fn a_word_releases_the_prompt_that_it_is_about() {
    // Broken in production: a client that leaves takes the other prompts of its name along; or what an older receiver says of all of
    // them is not heard.
    let mut bench = bench(10);
    park_as(&mut bench, "p0", "list", &["a"]);
    park_as(&mut bench, "p1", "list", &["b"]);
    park_as(&mut bench, "other", "other", &["c"]);
    release(&mut bench, 3, "f0", "list", Some("nobody's"));
    assert_eq!(parked(&bench), 3);
    release(&mut bench, 4, "f0", "list", Some("a"));
    assert_eq!(parked(&bench), 2);
    park_as(&mut bench, "p2", "list", &["d"]);
    release(&mut bench, 5, "f0", "list", None);
    assert_eq!(parked(&bench), 1);
}

#[test]
fn what_somebody_has_kept_stays_for_it() {
    // Broken in production: two decode servers want a prompt; one is served, and the other, which waits its turn, finds it evicted.
    let mut bench = bench(10);
    park_as(&mut bench, "p0", "p0", &["a"]);
    let held = Register { ids: vec![request("p0")], ..hold("h", "a") };
    assert_eq!(ask(&mut bench, held), (Registration::Accepted, None));
    serve(&mut bench, "f0", &["a"], "p0");
    assert_eq!(parked(&bench), 1);
    release(&mut bench, 9, "f0", "p0", Some("a"));
    assert_eq!(parked(&bench), 1);
    release(&mut bench, 10, "h", "p0", Some("a"));
    assert_eq!(parked(&bench), 0);
}
