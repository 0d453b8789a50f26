//! A stranger, or a receiver that asks for very much, at the rendezvous port.

use pd_backend::ids::{ChunkKey, FailureKind, ReceiverAddress, Registration, RequestId, Seq, SlotPart};
use pd_backend::node::outgoing::{OutgoingNote, ParkRequest, Sending};
use pd_backend::node::{Answer, Port};
use pd_backend::wire::Message;
use pd_backend::wire::message::{InitExtension, InitRequest, Register, Registered, ReleaseParked};

use super::bench::{Bench, CLIENT, request, settings};
use crate::settings::hello;

const REQUESTS_MAX: usize = 4;

fn bench(requests_max: usize) -> Bench {
    let mut settings = settings();
    settings.outgoing.as_mut().unwrap().parks = true;
    settings.requests_max = requests_max;
    settings.request_chunks_max = 16_384;
    Bench::with(settings)
}

/// Asks for slots for a request of one chunk, which has its name.
fn begin_park(bench: &mut Bench, name: &str) {
    begin_park_as(bench, name, name);
}

/// The same of one that others call so.
fn begin_park_as(bench: &mut Bench, name: &str, known_as: &str) {
    let park = ParkRequest {
        id: request(name),
        ids: vec![request(known_as)],
        keys: vec![key(name)],
        groups: Vec::new(),
        last_chunk_tokens: 4,
        wait: None,
        unsolicited: false,
        stays: false,
    };
    bench.session.handle_park(bench.now, CLIENT, Seq(1), park);
    bench.pump();
}

fn park(bench: &mut Bench, name: &str) {
    begin_park(bench, name);
    let Some((_, Answer::Opened { slots, .. })) = bench.answers.pop() else { panic!("{:?}", bench.answers) };
    let part = SlotPart { slot: slots[0].slot, offset_bytes: 0, len_bytes: None };
    let sending = Sending { parts: &[part], last: true, after: None };
    bench.session.handle_send(bench.now, CLIENT, Seq(2), &request(name), sending);
    bench.pump();
}

fn key(name: &str) -> ChunkKey {
    ChunkKey::new(name).unwrap()
}

fn hear(bench: &mut Bench, message: Message) -> Option<Message> {
    bench.session.handle_port_message(bench.now, Port::Rendezvous, (), message);
    bench.pump();
    bench.answered.pop()
}

/// What becomes of a registration, and why.
fn ask(bench: &mut Bench, register: Register) -> (Registration, Option<FailureKind>) {
    told(hear(bench, Message::PdRegister(register)))
}

fn release(bench: &mut Bench, instance: &str, name: &str, ids: Vec<RequestId>) -> (Registration, Option<FailureKind>) {
    let release = ReleaseParked { seq: Seq(3), instance: instance.into(), req_id: request(name), ids };
    told(hear(bench, Message::PdRelease(release)))
}

fn told(answer: Option<Message>) -> (Registration, Option<FailureKind>) {
    let Some(Message::PdRegistered(Registered { state, failure, .. })) = answer else { panic!("{answer:?}") };
    (state, failure.map(|failure| failure.kind))
}

/// Of a receiver that wants this chunk kept.
fn hold(name: &str, chunk: &str) -> Register {
    Register {
        seq: Seq(2),
        hello: hello("receiver"),
        req_id: request(name),
        ids: Vec::new(),
        keys: vec![key(chunk)],
        receiver: None,
        wait_ms: 0,
    }
}

/// Of one that wants it sent.
fn fetch(name: &str, chunk: &str) -> Register {
    let receiver = Some(ReceiverAddress { host: "r".into(), init_port: 1, alloc_port: 2 });
    Register { receiver, ..hold(name, chunk) }
}

/// Of one that waits for a chunk that nobody computes.
fn wait(name: &str) -> Register {
    Register { wait_ms: 60_000, ..fetch(name, "nobody's") }
}

#[test]
fn a_release_holds_no_more_than_a_registration_may() {
    // Broken in production: 4096 releases by names of 16 MiB each are remembered, and the host is out of memory.
    let mut bench = bench(REQUESTS_MAX);
    park(&mut bench, "a");
    let refused = (Registration::Failed, Some(FailureKind::Limit));
    for instance in ["z".repeat(257), "z\n".to_owned()] {
        assert_eq!(release(&mut bench, &instance, "a", vec![request("a")]), refused);
    }
    let ids = (0..17).map(|id| request(&format!("id-{id}"))).collect();
    assert_eq!(release(&mut bench, "receiver", "a", ids), refused);
    assert_eq!(bench.session.counts().slots.parked, 1, "it is still there");
    let released = (Registration::Released, None);
    assert_eq!(release(&mut bench, &"z".repeat(256), "a", vec![request("a")]), released);
    assert_eq!(bench.session.counts().slots.parked, 0);
}

#[test]
fn who_waits_takes_no_place_of_those_who_can_be_served() {
    // Broken in production: one stranger asks for what nobody computes, and no decode server gets what is there.
    let mut bench = bench(REQUESTS_MAX);
    park(&mut bench, "a");
    for number in 0..REQUESTS_MAX {
        assert_eq!(ask(&mut bench, wait(&format!("w{number}"))), (Registration::Pending, None));
    }
    assert_eq!(ask(&mut bench, wait("one more")), (Registration::Failed, Some(FailureKind::Limit)));
    assert_eq!(ask(&mut bench, hold("h", "a")), (Registration::Accepted, None));
    assert_eq!(ask(&mut bench, fetch("f", "a")), (Registration::Accepted, None));
}

#[test]
fn what_is_sent_to_receivers_leaves_places_for_requests_of_this_side() {
    // Broken in production: a stranger has chunks sent to addresses where nobody answers, and prefill is refused.
    let mut bench = bench(REQUESTS_MAX);
    park(&mut bench, "a");
    for number in 0..REQUESTS_MAX / 2 {
        assert_eq!(ask(&mut bench, fetch(&format!("f{number}"), "a")), (Registration::Accepted, None));
    }
    assert_eq!(ask(&mut bench, fetch("one more", "a")), (Registration::Failed, Some(FailureKind::Limit)));
    park(&mut bench, "b");
}

#[test]
fn keys_that_are_waited_for_take_a_bounded_room() {
    // Broken in production: 1024 registrations of 4096 long keys each are 4 GiB.
    let mut bench = bench(10);
    let many = |name: &str| {
        let keys = (0..16_384).map(|number| key(&format!("{number:01000}"))).collect();
        Register { keys, ..wait(name) }
    };
    for number in 0..3 {
        assert_eq!(ask(&mut bench, many(&format!("w{number}"))), (Registration::Pending, None));
    }
    let answer = hear(&mut bench, Message::PdRegister(many("one more")));
    let Some(Message::PdRegistered(Registered { failure: Some(failure), .. })) = answer else { panic!("{answer:?}") };
    // Each takes 64 bytes beside its own 1000.
    assert_eq!(failure.text, "the keys that registrations wait for take 52297728 bytes, the limit is 67108864");
    assert_eq!(ask(&mut bench, wait("a small one")), (Registration::Pending, None));
}

#[test]
fn nobody_waits_for_longer_than_a_minute_whatever_it_says() {
    // Broken in production: registrations for what nobody computes keep their places for as long as a stranger says.
    let mut bench = bench(REQUESTS_MAX);
    assert_eq!(ask(&mut bench, Register { wait_ms: u64::MAX, ..wait("w") }), (Registration::Pending, None));
    bench.later(59, true);
    assert_eq!(bench.answered, []);
    bench.later(1, true);
    assert_eq!(told(bench.answered.pop()), (Registration::Unknown, None));
}

#[test]
fn who_waits_is_found_by_each_of_its_chunks_and_by_none_that_it_asked_for_before() {
    // Broken in production: decode is sent what it does not want any more, or waits for what is there.
    let mut bench = bench(REQUESTS_MAX);
    let of = |seq, chunks: [&str; 2]| Register { seq: Seq(seq), keys: chunks.map(key).to_vec(), ..wait("w") };
    assert_eq!(ask(&mut bench, of(2, ["x", "y"])), (Registration::Pending, None));
    assert_eq!(ask(&mut bench, of(3, ["y", "z"])), (Registration::Pending, None));
    begin_park(&mut bench, "x");
    assert_eq!(bench.answered, []);
    begin_park(&mut bench, "z");
    assert_eq!(told(bench.answered.pop()), (Registration::Accepted, None));
    begin_park(&mut bench, "y");
    assert_eq!(bench.answered, [], "it waits no more");
}

#[test]
#[ignore = "a measurement: cargo test --test node a_park_beside -- --ignored --nocapture"]
fn a_park_beside_many_that_wait() {
    const WAITING: usize = 400;
    const KEYS: usize = 2_000;
    const PARKS: u32 = 4;
    let mut bench = bench(WAITING);
    for number in 0..WAITING {
        let name = format!("w{number}");
        let keys = (0..KEYS).map(|chunk| key(&format!("{name}-{chunk}"))).collect();
        let register = Message::PdRegister(Register { keys, ..wait(&name) });
        bench.session.handle_port_message(bench.now, Port::Rendezvous, (), register);
    }
    assert_eq!(bench.session.counts().outgoing.unwrap().registrations, WAITING);
    let park = |name: &str| ParkRequest {
        id: request(name),
        ids: Vec::new(),
        keys: vec![key(name)],
        groups: Vec::new(),
        last_chunk_tokens: 4,
        wait: None,
        unsolicited: false,
        stays: false,
    };
    let began = std::time::Instant::now();
    for number in 0..PARKS {
        bench.session.handle_park(bench.now, CLIENT, Seq(1), park(&format!("p{number}")));
    }
    println!("{:?} for a park beside {WAITING} that wait for {KEYS} chunks each", began.elapsed() / PARKS);
}

/// Of one that waits for a chunk, and calls its request so.
fn wait_under(name: &str, chunk: &str, known_as: &str) -> Register {
    Register { ids: vec![request(known_as)], keys: vec![key(chunk)], ..wait(name) }
}

fn give_up(bench: &mut Bench, name: &str) {
    bench.session.handle_cancel(bench.now, CLIENT, Seq(9), &request(name));
    bench.pump();
}

#[test]
fn what_prefill_has_given_up_is_told_to_whoever_asks_for_it_by_name() {
    // Broken in production: prefill aborts a request before decode has asked for it, and decode waits its whole time for what
    // nobody computes.
    let mut bench = bench(REQUESTS_MAX);
    let cancelled = (Registration::Failed, Some(FailureKind::Cancelled));
    begin_park(&mut bench, "a");
    assert_eq!(ask(&mut bench, wait_under("early", "other", "a")), (Registration::Pending, None));
    give_up(&mut bench, "a");
    let Some(Message::PdRegistered(answer)) = bench.answered.pop() else { panic!("{:?}", bench.answered) };
    assert_eq!((answer.req_id, answer.state), (request("early"), Registration::Failed));
    assert_eq!(answer.failure.unwrap().text, "prefill gave a up: a was cancelled by its connector");
    assert_eq!(ask(&mut bench, wait_under("late", "a", "a")), cancelled);
    assert_eq!(ask(&mut bench, wait_under("another", "b", "b")), (Registration::Pending, None));
    // What is computed under that name after all is sent.
    begin_park(&mut bench, "a");
    assert_eq!(ask(&mut bench, wait_under("again", "a", "a")), (Registration::Accepted, None));
    assert_eq!(ask(&mut bench, wait_under("third", "other", "a")), (Registration::Pending, None));
    // It is forgotten with the time that it would have been kept.
    begin_park(&mut bench, "c");
    give_up(&mut bench, "c");
    bench.later(29, true);
    assert_eq!(ask(&mut bench, wait_under("in time", "c", "c")), cancelled);
    bench.later(1, true);
    assert_eq!(ask(&mut bench, wait_under("too late", "c", "c")), (Registration::Pending, None));
}

#[test]
fn one_prompt_of_a_list_that_is_given_up_ends_no_other() {
    // Broken in production: the prompts of a list have one name, and what becomes of the first is told of all.
    let mut bench = bench(REQUESTS_MAX);
    begin_park_as(&mut bench, "first", "list");
    begin_park_as(&mut bench, "second", "list");
    give_up(&mut bench, "first");
    assert_eq!(ask(&mut bench, wait_under("third", "third", "list")), (Registration::Pending, None));
    give_up(&mut bench, "second");
    assert_eq!(told(bench.answered.pop()), (Registration::Failed, Some(FailureKind::Cancelled)));
}

#[test]
fn the_oldest_of_what_has_ended_is_forgotten_first() {
    // Broken in production: a receiver whose name sorts first has no memory at all, and a word of it that comes late is obeyed.
    let mut bench = bench(REQUESTS_MAX);
    for number in 0..4100 {
        release(&mut bench, "zzz", &format!("r{number}"), Vec::new());
    }
    park(&mut bench, "a");
    let release_of_aaa = ReleaseParked { seq: Seq(7), instance: "aaa".into(), req_id: request("x"), ids: Vec::new() };
    hear(&mut bench, Message::PdRelease(release_of_aaa));
    let late = Register { hello: hello("aaa"), ..hold("x", "a") };
    assert_eq!(hear(&mut bench, Message::PdRegister(late)), None, "a word that was overtaken is not answered");
}

#[test]
fn who_means_another_port_is_told_so() {
    // Broken in production: a port that is written in the wrong place is ten seconds of silence for each request.
    let mut bench = bench(REQUESTS_MAX);
    let extension =
        InitExtension { seq: Seq(1), hello: hello("sender"), agent_name: "agent".into(), connected: Vec::new() };
    let init = InitRequest { local_meta_bytes: vec![1], pd: Some(extension) };
    let Some(Message::NixlInitResponse(response)) = hear(&mut bench, Message::NixlInitRequest(init)) else {
        panic!("nothing is answered")
    };
    let refusal = response.pd.unwrap().refusal.unwrap();
    assert_eq!(refusal.kind, FailureKind::HandshakeRefused);
    assert!(refusal.text.contains("registrations (pd_rendezvous_port), not that for handshakes"), "{refusal:?}");
    let lmcaches = InitRequest { local_meta_bytes: vec![1], pd: None };
    let answer = hear(&mut bench, Message::NixlInitRequest(lmcaches));
    assert!(answer.is_some(), "LMCache's would wait for ever: {answer:?}");
    let misdirected = |note: &OutgoingNote| matches!(note, OutgoingNote::Misdirected { message: "NixlInitRequest" });
    assert_eq!(bench.notes.iter().filter(|note| misdirected(note)).count(), 2);
}

#[test]
fn nothing_is_parked_where_nobody_can_ask_for_it() {
    // Broken in production: chunks are kept for half a minute each for nobody, or the buffer is said to be too small.
    let mut bench = Bench::with(settings());
    begin_park(&mut bench, "a");
    let Some((_, Answer::Failed { failure, .. })) = bench.answers.pop() else { panic!("{:?}", bench.answers) };
    assert_eq!(failure.kind, FailureKind::BadRequest);
    assert!(failure.text.contains("set pd_rendezvous_port"), "{failure:?}");
}
