//! What a receiver asks of senders that have parked chunks, where a client of the decode server says whom and how often.

use std::time::Duration;

use pd_backend::ids::{ChunkKey, ClientId, Failure, FailureKind, PeerId, Registration, RequestId, SourceAddress};
use pd_backend::node::incoming::FetchRequest;
use pd_backend::node::{Answer, Output, Port, To};
use pd_backend::wire::message::Registered;
use pd_backend::wire::{LmcacheMode, Message};

use super::bench::Bench;

const CLIENT: ClientId = ClientId(1);

fn at(host: &str, port: u16) -> SourceAddress {
    SourceAddress { host: host.into(), port }
}

fn fetch(name: &str, source: SourceAddress) -> FetchRequest {
    FetchRequest {
        id: RequestId::new(name).unwrap(),
        source,
        ids: Vec::new(),
        keys: vec![ChunkKey::new("k").unwrap()],
        register_wait: Duration::ZERO,
    }
}

/// What a receiver did at once.
#[derive(Debug, Default)]
struct Done {
    /// Where it began to connect.
    opened: Vec<(PeerId, SourceAddress)>,
    /// How its client was answered; none if it waits.
    failure: Option<Failure>,
    /// What it said to senders.
    said: Vec<Message>,
}

fn pump(bench: &mut Bench) -> Done {
    let mut done = Done::default();
    while let Some(output) = bench.session.poll_output() {
        match output {
            Output::OpenSource { peer, address } => done.opened.push((peer, address)),
            Output::Answer { answer: Answer::Failed { failure, .. }, .. } => done.failure = Some(failure),
            Output::Send { to: To::Peer(_), message, .. } => done.said.push(message),
            _ => {}
        }
    }
    bench.session.check_invariants().unwrap();
    done
}

/// Asks for chunks, and waits.
fn ask(bench: &mut Bench, request: FetchRequest) -> Done {
    let id = bench.next_seq();
    bench.session.handle_fetch(bench.now, CLIENT, id, request, None);
    pump(bench)
}

fn hold(bench: &mut Bench, request: FetchRequest) -> Done {
    let id = bench.next_seq();
    bench.session.handle_hold(bench.now, CLIENT, id, request);
    pump(bench)
}

fn release(bench: &mut Bench, request: FetchRequest) -> Done {
    let id = bench.next_seq();
    bench.session.handle_release_parked(bench.now, CLIENT, id, request);
    pump(bench)
}

/// The only place that it began to connect to.
fn opened(done: &Done) -> PeerId {
    let [(peer, _)] = done.opened[..] else { panic!("{done:?}") };
    peer
}

/// Nobody is there.
fn close(bench: &mut Bench, peer: PeerId) -> Done {
    bench.session.handle_peer_closed(bench.now, peer, Failure::new(FailureKind::PeerUnreachable, "nobody"));
    pump(bench)
}

fn later(bench: &mut Bench, ms: u64) {
    for _ in 0..ms.div_ceil(50) {
        bench.now += Duration::from_millis(50);
        bench.session.handle_timeout(bench.now);
        pump(bench);
    }
}

fn kind(done: &Done) -> Option<FailureKind> {
    done.failure.as_ref().map(|failure| failure.kind)
}

#[test]
fn a_place_that_cannot_be_connected_to_is_refused_by_what_was_seen() {
    // Broken in production: a router leaves out a host or a port, and decode says that nobody answers there.
    let mut bench = Bench::new(4);
    let long = "h".repeat(256);
    for (source, expected) in [
        (at("", 5600), "f is asked of \":5600\"; expected a host and a port that is not 0"),
        (at("h", 0), "f is asked of \"h:0\"; expected a host and a port that is not 0"),
        (at(&long, 1), "f is asked of a host whose name has 256 bytes; expected at most 255"),
    ] {
        for say in [ask, hold, release] {
            let done = say(&mut bench, fetch("f", source.clone()));
            let failure = done.failure.as_ref().unwrap();
            assert_eq!((failure.kind, failure.text.as_str()), (FailureKind::BadRequest, expected));
            assert!(done.opened.is_empty(), "{done:?}");
        }
    }
}

#[test]
fn releases_take_a_bounded_number_of_places_and_none_of_those_who_ask() {
    // Broken in production: aborts of requests whose prefill server does not answer fill the daemon's memory, or keep others from
    // asking.
    let mut bench = Bench::with(4, 4, |settings| settings.requests_max = 4);
    for number in 0..4 {
        assert_eq!(kind(&release(&mut bench, fetch(&format!("r{number}"), at("h", 1)))), None);
    }
    let done = release(&mut bench, fetch("one more", at("h", 1)));
    assert_eq!(kind(&done), Some(FailureKind::Limit), "{done:?}");
    assert_eq!(kind(&release(&mut bench, fetch("r0", at("h", 1)))), None, "it has its place");
    assert_eq!(kind(&ask(&mut bench, fetch("f", at("h", 1)))), None);
    assert_eq!(bench.counts().fetches, 5);
    // What is given up is a release as well.
    for number in 0..10 {
        let name = format!("g{number}");
        assert_eq!(kind(&ask(&mut bench, fetch(&name, at("h", 1)))), None);
        let id = bench.next_seq();
        bench.session.handle_cancel(bench.now, CLIENT, id, &RequestId::new(&name).unwrap());
        pump(&mut bench);
    }
    assert_eq!(bench.counts().fetches, 5);
    // The sender has said nothing for too long.
    later(&mut bench, 7_000);
    assert_eq!(bench.counts().fetches, 0);
    assert_eq!(kind(&release(&mut bench, fetch("one more", at("h", 1)))), None);
}

#[test]
fn an_address_where_nobody_answers_is_not_tried_for_each_request() {
    // Broken in production: a client of the decode server has its daemon knock at any port of the network, as often as it likes;
    // and each request to a prefill server that is gone waits for the same silence.
    let mut bench = Bench::new(4);
    let peer = opened(&ask(&mut bench, fetch("f1", at("h", 1))));
    assert_eq!(kind(&close(&mut bench, peer)), Some(FailureKind::PeerUnreachable));
    later(&mut bench, 100);
    let done = ask(&mut bench, fetch("f2", at("h", 1)));
    let failure = done.failure.as_ref().unwrap();
    assert_eq!(
        (failure.kind, failure.text.as_str()),
        (FailureKind::PeerUnreachable, "h:1: nobody (100 ms ago; not tried again for 150 ms)")
    );
    assert!(done.opened.is_empty() && release(&mut bench, fetch("f2", at("h", 1))).opened.is_empty());
    let elsewhere = ask(&mut bench, fetch("f3", at("h", 2)));
    assert_eq!(elsewhere.opened.len(), 1, "another port is another daemon");
    // It doubles.
    later(&mut bench, 150);
    let peer = opened(&ask(&mut bench, fetch("f4", at("h", 1))));
    close(&mut bench, peer);
    later(&mut bench, 450);
    assert!(ask(&mut bench, fetch("f5", at("h", 1))).opened.is_empty());
    later(&mut bench, 50);
    let peer = opened(&ask(&mut bench, fetch("f6", at("h", 1))));
    // Somebody is there: that it goes is no reason not to look for it at once.
    bench.session.handle_peer_opened(bench.now, peer, LmcacheMode::Async);
    let done = pump(&mut bench);
    let [Message::PdRegister(register)] = &done.said[..] else { panic!("{done:?}") };
    let registered = Registered {
        seq: register.seq,
        instance: "sender".into(),
        req_id: register.req_id.clone(),
        state: Registration::Pending,
        lease_ms: 0,
        failure: None,
    };
    bench.session.handle_connection_message(bench.now, peer, Port::Rendezvous, Message::PdRegistered(registered));
    close(&mut bench, peer);
    assert_eq!(ask(&mut bench, fetch("f7", at("h", 1))).opened.len(), 1);
}

#[test]
fn a_connection_that_left_something_unanswered_is_not_used_again() {
    // Broken in production: the connection to a prefill server has gone without a word, and the next request is asked over it and
    // fails by silence, though the server is there.
    let mut bench = Bench::new(4);
    let peer = opened(&ask(&mut bench, fetch("f1", at("h", 1))));
    bench.session.handle_peer_opened(bench.now, peer, LmcacheMode::Async);
    let done = pump(&mut bench);
    let [Message::PdRegister(register)] = &done.said[..] else { panic!("{done:?}") };
    let unknown = Registered {
        seq: register.seq,
        instance: "sender".into(),
        req_id: register.req_id.clone(),
        state: Registration::Unknown,
        lease_ms: 0,
        failure: None,
    };
    bench.session.handle_connection_message(bench.now, peer, Port::Rendezvous, Message::PdRegistered(unknown));
    pump(&mut bench);
    // It answers, so it is used again.
    assert_eq!(release(&mut bench, fetch("r", at("h", 1))).opened, []);
    // What is said now is lost, until the receiver says it no more.
    while bench.counts().fetches > 0 {
        later(&mut bench, 50);
    }
    let done = ask(&mut bench, fetch("f2", at("h", 1)));
    assert_eq!(done.opened.len(), 1, "{done:?}");
}
