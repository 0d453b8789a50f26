//! Parked chunks that are pushed to a receiver before it asks: to whom, when not, and who comes first.

use pd_backend::ids::{
    ChunkKey, Failure, FailureKind, GrantId, PeerId, ReceiverAddress, Registration, Seq, SlotPart, StagedSlot,
};
use pd_backend::node::outgoing::{Event, OutgoingNote, ParkRequest, Sending};
use pd_backend::node::{Answer, Port};
use pd_backend::wire::Message;
use pd_backend::wire::message::{
    AllocReplyExtension, AllocRequest, AllocResponse, Commit, CommitAck, Register, Registered,
};

use super::bench::{Bench, CLIENT, request, settings};
use crate::settings::hello;

fn address(host: &str) -> ReceiverAddress {
    ReceiverAddress { host: host.into(), init_port: 1, alloc_port: 2 }
}

fn keys(names: &[&str]) -> Vec<ChunkKey> {
    names.iter().map(|name| ChunkKey::new(*name).unwrap()).collect()
}

/// A sender of four slots that is connected to these receivers, by its configuration.
fn bench(receivers: &[&str]) -> Bench {
    let mut settings = settings();
    let outgoing = settings.outgoing.as_mut().unwrap();
    (outgoing.parks, outgoing.push_ahead) = (true, true);
    outgoing.receivers = receivers.iter().map(|host| address(host)).collect();
    let mut bench = Bench::with(settings);
    bench.session.handle_timeout(bench.now);
    bench.pump();
    bench
}

fn try_park(bench: &mut Bench, name: &str, names: &[&str], unsolicited: bool) -> Answer {
    let park = ParkRequest {
        id: request(name),
        ids: if unsolicited { Vec::new() } else { vec![request(name)] },
        keys: keys(names),
        groups: Vec::new(),
        last_chunk_tokens: 4,
        wait: None,
        unsolicited,
        stays: false,
    };
    bench.session.handle_park(bench.now, CLIENT, Seq(1), park);
    bench.pump();
    bench.answers.pop().unwrap().1
}

fn park(bench: &mut Bench, name: &str, names: &[&str]) -> Vec<StagedSlot> {
    match try_park(bench, name, names, false) {
        Answer::Opened { slots, .. } => slots,
        answer => panic!("{answer:?}"),
    }
}

/// These chunks of a parked request are computed.
fn fill(bench: &mut Bench, name: &str, slots: &[StagedSlot], last: bool) {
    let parts: Vec<SlotPart> =
        slots.iter().map(|slot| SlotPart { slot: slot.slot, offset_bytes: 0, len_bytes: None }).collect();
    let sending = Sending { parts: &parts, last, after: None };
    bench.session.handle_send(bench.now, CLIENT, Seq(2), &request(name), sending);
    bench.pump();
}

/// What receivers were asked room for since the last look.
fn allocations(bench: &mut Bench) -> Vec<AllocRequest> {
    let said = std::mem::take(&mut bench.said);
    let allocation = |message| match message {
        Message::AllocRequest(alloc) => Some(alloc),
        _ => None,
    };
    said.into_iter().filter_map(allocation).collect()
}

/// The only one.
fn allocation(bench: &mut Bench) -> AllocRequest {
    let mut asked = allocations(bench);
    assert_eq!(asked.len(), 1, "{asked:?}");
    asked.remove(0)
}

fn seq(alloc: &AllocRequest) -> Seq {
    alloc.pd.as_ref().unwrap().seq
}

fn is_ahead(alloc: &AllocRequest) -> bool {
    alloc.pd.as_ref().unwrap().ahead
}

fn hear(bench: &mut Bench, peer: PeerId, message: Message) {
    bench.session.handle_connection_message(bench.now, peer, Port::Alloc, message);
    bench.pump();
}

/// Of the receiver that was connected first.
fn answer(bench: &mut Bench, alloc: &AllocRequest, there: &[u32]) {
    let granted = alloc.keys.len() - there.len();
    let pd = AllocReplyExtension {
        grant: Some(GrantId(seq(alloc).0)),
        offsets: (0..granted as u64).map(|at| at * 16).collect(),
        write_within_ms: 10_000,
        ..AllocReplyExtension::empty(seq(alloc))
    };
    let response = AllocResponse { already_sent_indexes: there.to_vec(), remote_indexes: vec![], pd: Some(pd) };
    let first = bench.opened[0];
    hear(bench, first, Message::AllocResponse(response));
}

fn refuse(bench: &mut Bench, alloc: &AllocRequest) {
    let refusal = Some(Failure::new(FailureKind::NoSlots, "full"));
    let pd = AllocReplyExtension { refusal, ..AllocReplyExtension::empty(seq(alloc)) };
    let response = AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![], pd: Some(pd) };
    let first = bench.opened[0];
    hear(bench, first, Message::AllocResponse(response));
}

/// The engine has written what it was given.
fn written(bench: &mut Bench) {
    for transfer in std::mem::take(&mut bench.posts) {
        bench.session.handle_transfer_done(bench.now, transfer, Ok(Vec::new()));
    }
    bench.pump();
}

/// The receiver takes the only commit. Whose it is.
fn committed_by(bench: &mut Bench, peer: PeerId) -> String {
    let commits: Vec<Commit> = bench
        .said
        .iter()
        .filter_map(|message| match message {
            Message::PdCommit(commit) => Some(commit.clone()),
            _ => None,
        })
        .collect();
    let [Commit { seq, req_id, .. }] = &commits[..] else { panic!("{commits:?}") };
    bench.said.retain(|message| !matches!(message, Message::PdCommit(_)));
    hear(bench, peer, Message::PdCommitAck(CommitAck { seq: *seq, req_id: req_id.clone(), refusal: None }));
    req_id.to_string()
}

fn committed(bench: &mut Bench) -> String {
    let first = bench.opened[0];
    committed_by(bench, first)
}

/// A receiver asks for these chunks.
fn register(bench: &mut Bench, host: &str, name: &str, names: &[&str]) -> Registration {
    let register = Register {
        seq: Seq(2),
        hello: hello(host),
        req_id: request(name),
        ids: names.iter().map(|name| request(name)).collect(),
        keys: keys(names),
        receiver: Some(address(host)),
        wait_ms: 0,
    };
    bench.session.handle_port_message(bench.now, Port::Rendezvous, (), Message::PdRegister(register));
    bench.pump();
    let answer = bench.answered.pop();
    let Some(Message::PdRegistered(Registered { state, .. })) = answer else { panic!("{answer:?}") };
    state
}

/// A whole request that a receiver asks for and gets, with a chunk of its own.
fn serve(bench: &mut Bench, host: &str, name: &str) {
    let slots = park(bench, name, &[name]);
    fill(bench, name, &slots, true);
    for ahead in allocations(bench) {
        refuse(bench, &ahead);
    }
    assert_eq!(register(bench, host, &format!("f{name}"), &[name]), Registration::Accepted);
    let peer = *bench.opened.iter().find(|&&peer| bench.host(peer) == host).unwrap();
    let alloc = allocation(bench);
    let pd = AllocReplyExtension {
        grant: Some(GrantId(seq(&alloc).0)),
        write_within_ms: 10_000,
        ..AllocReplyExtension::empty(seq(&alloc))
    };
    let response = AllocResponse { already_sent_indexes: vec![0], remote_indexes: vec![], pd: Some(pd) };
    hear(bench, peer, Message::AllocResponse(response));
    committed_by(bench, peer);
}

fn guesses(bench: &Bench) -> Vec<&'static str> {
    let said = |note: &OutgoingNote| match note {
        OutgoingNote::PushedAhead { .. } => Some("pushed"),
        OutgoingNote::AheadDropped { .. } => Some("dropped"),
        OutgoingNote::WrongGuess { .. } => Some("wrong"),
        _ => None,
    };
    bench.notes.iter().filter_map(said).collect()
}

fn parked(bench: &Bench) -> u32 {
    bench.session.counts().slots.parked
}

#[test]
fn chunks_go_to_the_only_receiver_as_they_are_computed() {
    // Broken in production: behind a router that asks decode after prefill, nothing moves before prefill has ended.
    let mut bench = bench(&["r"]);
    let slots = park(&mut bench, "a", &["k0", "k1"]);
    let ahead = allocation(&mut bench);
    assert!(is_ahead(&ahead) && ahead.pd.as_ref().unwrap().wait_ms == 0, "{ahead:?}");
    answer(&mut bench, &ahead, &[]);
    assert_eq!(bench.posts.len(), 0);
    fill(&mut bench, "a", &slots[..1], false);
    assert_eq!(bench.posts.len(), 1, "the first goes while the second is computed");
    written(&mut bench);
    fill(&mut bench, "a", &slots[1..], true);
    written(&mut bench);
    assert!(committed(&mut bench).starts_with("ahead "));
    assert_eq!(guesses(&bench), ["pushed"]);
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_sent, 0, "nobody has asked for it");
    assert_eq!(parked(&bench), 2, "decode may come for it");
    // It comes, and has everything.
    assert_eq!(register(&mut bench, "r", "f", &["k0", "k1"]), Registration::Accepted);
    let asked = allocation(&mut bench);
    assert!(!is_ahead(&asked));
    answer(&mut bench, &asked, &[0, 1]);
    assert_eq!(bench.posts.len(), 0, "no byte goes twice");
    assert_eq!(committed(&mut bench), "f");
}

#[test]
fn a_registration_waits_for_what_is_on_its_way_and_no_longer() {
    // Broken in production: decode asks while its chunks come, and every byte goes twice.
    let mut bench = bench(&["r"]);
    let slots = park(&mut bench, "a", &["k0", "k1"]);
    let ahead = allocation(&mut bench);
    answer(&mut bench, &ahead, &[]);
    fill(&mut bench, "a", &slots, true);
    assert_eq!(register(&mut bench, "r", "f", &["k1"]), Registration::Accepted);
    assert_eq!(allocations(&mut bench).len(), 0, "it comes anyway");
    written(&mut bench);
    committed(&mut bench);
    let asked = allocation(&mut bench);
    answer(&mut bench, &asked, &[0]);
    assert_eq!(committed(&mut bench), "f");
    assert_eq!(bench.posts.len(), 0);
}

#[test]
fn a_registration_does_not_wait_for_what_it_has_not_asked_for() {
    // Broken in production: decode wants the beginning of a long prompt that is there, and waits until all of it is computed.
    let mut bench = bench(&["r"]);
    let slots = park(&mut bench, "a", &["k0", "k1"]);
    let ahead = allocation(&mut bench);
    answer(&mut bench, &ahead, &[]);
    fill(&mut bench, "a", &slots[..1], false);
    assert_eq!(register(&mut bench, "r", "f", &["k0"]), Registration::Accepted);
    assert!(!is_ahead(&allocation(&mut bench)), "the second chunk is not computed yet");
}

#[test]
fn a_registration_is_in_no_ones_line() {
    // Broken in production: a guess whose question was lost holds up what decode asks for, for ten seconds.
    let mut bench = bench(&["r"]);
    let slots = park(&mut bench, "a", &["k0"]);
    assert!(is_ahead(&allocation(&mut bench)));
    fill(&mut bench, "a", &slots, true);
    assert_eq!(register(&mut bench, "r", "f", &["k0"]), Registration::Accepted);
    assert!(!is_ahead(&allocation(&mut bench)), "it is asked for at once");
    assert_eq!(guesses(&bench), ["dropped"]);
}

#[test]
fn a_guess_that_is_refused_harms_nobody() {
    // Broken in production: a full receiver fails prefill's requests that it was not asked about.
    let mut bench = bench(&["r"]);
    let slots = park(&mut bench, "a", &["k0"]);
    let ahead = allocation(&mut bench);
    refuse(&mut bench, &ahead);
    fill(&mut bench, "a", &slots, true);
    assert_eq!(bench.events, [Event::Parked { request: request("a"), chunks: 1 }]);
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_failed, 0);
    assert_eq!((guesses(&bench), parked(&bench)), (vec!["dropped"], 1));
    assert_eq!(register(&mut bench, "r", "f", &["k0"]), Registration::Accepted);
    assert!(!is_ahead(&allocation(&mut bench)));
}

#[test]
fn a_wrong_guess_is_counted_and_ended() {
    // Broken in production: nobody knows that half of the network's traffic is for nothing.
    let mut bench = bench(&["r"]);
    let slots = park(&mut bench, "a", &["k0"]);
    let ahead = allocation(&mut bench);
    answer(&mut bench, &ahead, &[]);
    fill(&mut bench, "a", &slots, true);
    assert_eq!(register(&mut bench, "s", "f", &["k0"]), Registration::Accepted);
    assert!(!is_ahead(&allocation(&mut bench)), "the other gets it at once");
    assert_eq!(guesses(&bench), ["wrong", "dropped"]);
    // Decode may ask twice, for two samples.
    assert_eq!(register(&mut bench, "s", "g", &["k0"]), Registration::Accepted);
    assert_eq!(guesses(&bench).len(), 2);
    written(&mut bench);
}

#[test]
fn receivers_that_take_turns_are_not_guessed() {
    // Broken in production: with two decode servers in turn every byte goes to the wrong one first.
    let mut bench = bench(&["r", "s"]);
    park(&mut bench, "two are configured", &["x"]);
    assert_eq!(allocations(&mut bench).len(), 0);
    bench.session.handle_cancel(bench.now, CLIENT, Seq(9), &request("two are configured"));
    bench.pump();
    for (number, (host, guessed)) in [("s", true), ("r", false), ("s", false), ("s", true)].into_iter().enumerate() {
        serve(&mut bench, host, &format!("n{number}"));
        let name = format!("after {number}");
        park(&mut bench, &name, &[&name]);
        let asked = allocations(&mut bench);
        assert_eq!(
            asked.iter().map(is_ahead).collect::<Vec<_>>(),
            vec![true; usize::from(guessed)],
            "{number}: {host}"
        );
        bench.session.handle_cancel(bench.now, CLIENT, Seq(9), &request(&name));
        bench.pump();
        bench.said.clear();
    }
}

#[test]
fn a_guess_ends_with_what_it_is_of() {
    // Broken in production: slots are kept for a guess when nobody may ask for them any more.
    let mut bench = bench(&["r"]);
    let slots = park(&mut bench, "a", &["k0"]);
    let ahead = allocation(&mut bench);
    fill(&mut bench, "a", &slots, true);
    bench.later(29, true);
    assert_eq!(bench.session.counts().slots.parked, 1);
    drop(ahead);
    bench.later(2, true);
    assert_eq!((guesses(&bench), parked(&bench)), (vec!["dropped"], 0));
    // And with a request that is given up while it is computed.
    park(&mut bench, "b", &["k1"]);
    bench.session.handle_cancel(bench.now, CLIENT, Seq(9), &request("b"));
    bench.pump();
    assert_eq!(guesses(&bench), ["dropped", "dropped"]);
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_active, 0);
}

#[test]
fn of_what_nobody_is_told_nothing_is_kept() {
    // Broken in production: behind a router that says nothing, each prompt holds prefill's slots for half a minute.
    let mut bench = bench(&["r"]);
    let Answer::Opened { slots, .. } = try_park(&mut bench, "a", &["k0"], true) else { panic!("refused") };
    let ahead = allocation(&mut bench);
    answer(&mut bench, &ahead, &[]);
    fill(&mut bench, "a", &slots, true);
    assert_eq!(parked(&bench), 1);
    written(&mut bench);
    committed(&mut bench);
    assert_eq!(parked(&bench), 0);
    // The receiver has the next one already, before it is computed here.
    let Answer::Opened { slots, .. } = try_park(&mut bench, "b", &["k1"], true) else { panic!("refused") };
    let ahead = allocation(&mut bench);
    answer(&mut bench, &ahead, &[0]);
    committed(&mut bench);
    fill(&mut bench, "b", &slots, true);
    assert_eq!(parked(&bench), 0);
    // What is not taken is not computed for.
    bench.events.clear();
    assert!(matches!(try_park(&mut bench, "c", &["k2"], true), Answer::Opened { .. }));
    let ahead = allocation(&mut bench);
    refuse(&mut bench, &ahead);
    let [Event::Failed { failure, .. }] = &bench.events[..] else { panic!("{:?}", bench.events) };
    assert_eq!(failure.kind, FailureKind::Cancelled);
}

#[test]
fn what_nobody_is_told_of_is_kept_for_who_asks_all_the_same() {
    // Broken in production: decode asks for the beginning that its prompt shares with another, and is told that it is given up.
    for (host, names, dropped) in [("s", &["k0", "k1"][..], 1), ("r", &["k0"], 1), ("r", &["k0", "k1"], 1)] {
        let mut bench = bench(&["r"]);
        let Answer::Opened { slots, .. } = try_park(&mut bench, "a", &["k0", "k1"], true) else { panic!("refused") };
        assert!(is_ahead(&allocation(&mut bench)));
        assert_eq!(register(&mut bench, host, "f", names), Registration::Accepted);
        assert!(!is_ahead(&allocation(&mut bench)), "the guess has no room yet");
        assert_eq!(guesses(&bench).iter().filter(|guess| **guess == "dropped").count(), dropped);
        fill(&mut bench, "a", &slots, true);
        assert_eq!(bench.events, [Event::Parked { request: request("a"), chunks: 2 }]);
        assert_eq!(parked(&bench), 2);
    }
}

#[test]
fn nothing_is_parked_for_nobody() {
    // Broken in production: a prefill server that no router uses as such fills its buffer.
    for receivers in [&[][..], &["r", "s"]] {
        let mut bench = bench(receivers);
        let Answer::Failed { failure, .. } = try_park(&mut bench, "a", &["k0"], true) else { panic!("parked") };
        assert_eq!(failure.kind, FailureKind::PeerUnreachable);
        assert_eq!(bench.session.counts().outgoing.unwrap().requests_active, 0);
    }
}

#[test]
fn guesses_take_no_place_of_requests() {
    // Broken in production: with as many guesses as requests, every second request is refused.
    let mut bench = bench(&["r"]);
    let names = ["a", "b", "c", "d"];
    for name in names {
        park(&mut bench, name, &[name]);
    }
    assert_eq!(allocations(&mut bench).len(), 3, "a quarter of ten may be guesses");
    assert_eq!(bench.session.counts().outgoing.unwrap().requests_active, 7);
    for number in 0..6 {
        bench.open(&format!("o{number}"));
        assert_eq!(bench.answers.len(), 0, "{number}: {:?}", bench.answers);
    }
}
