//! Writers that have died: who may say so, and when their slots are free.

use std::time::Duration;

use pd_backend::wire::Message;
use pd_backend::wire::message::{Ping, Pong, ProcessIdentity};

use super::bench::*;
use pd_backend::node::Port;

fn process(host: &str, pid: u32) -> ProcessIdentity {
    ProcessIdentity { boot_id: host.into(), pid_namespace: 1, pid, start_ticks: 7 }
}

/// What the receiver asks a sender about, after it has heard these processes have ended.
fn ping_with(bench: &mut Bench, name: &'static str, ended: &[ProcessIdentity]) -> Vec<ProcessIdentity> {
    let seq = bench.next_seq();
    let ping = Ping { seq, instance: name.into(), ended: ended.to_vec(), receiver: String::new() };
    match bench.say(Port::Alloc, name, Message::PdPing(ping)).as_slice() {
        [(_, Message::PdPong(Pong { refusal: None, have_ended, .. }))] => have_ended.clone(),
        other => panic!("{other:?}"),
    }
}

/// `a` and `b` of host 1 and `c` of host 2; `a` is lost with two slots granted.
fn bench_that_lost_a(linger: Duration) -> Bench {
    let mut bench = Bench::with(4, 4, |settings| incoming(settings).linger = linger);
    for (name, host, pid) in [("a", "1", 10), ("b", "1", 11), ("c", "2", 12)] {
        bench.process = Some(process(host, pid));
        assert!(bench.shake_hands(name, Vec::new()).refusal.is_none());
    }
    bench.alloc("a", "r", &["k0", "k1"]);
    bench.session.handle_route_gone(bench.now, &"a");
    bench.drain();
    assert_eq!(bench.session.counts().slots.quarantined, 2);
    bench
}

#[test]
fn a_sender_of_the_same_host_tells_of_one_that_died_there() {
    // Broken in production: slots of a sender that died on another host are lost until the receiver is restarted.
    let mut bench = bench_that_lost_a(Duration::ZERO);
    let dead = process("1", 10);
    assert_eq!(ping_with(&mut bench, "c", &[]), [], "it cannot see that process");
    let dead = [dead];
    assert_eq!(ping_with(&mut bench, "c", &dead), [], "nor is it believed");
    assert_eq!(ping_with(&mut bench, "b", &[process("1", 99)]), dead);
    assert_eq!(bench.session.counts().slots.quarantined, 2);
    assert_eq!(ping_with(&mut bench, "b", &dead), []);
    later(&mut bench, 1);
    assert_eq!(bench.session.counts().slots.quarantined, 0);
}

#[test]
fn nobody_is_asked_about_a_sender_that_is_back() {
    // Broken in production: a sender is declared dead by its neighbour while it writes.
    let mut bench = bench_that_lost_a(Duration::ZERO);
    bench.process = Some(process("1", 10));
    bench.shake_hands("a", Vec::new());
    bench.alloc("a", "again", &["k2"]);
    assert_eq!(ping_with(&mut bench, "b", &[process("1", 10)]), []);
    assert_eq!(bench.session.counts().slots.reserved, 1);
}

#[test]
fn nobody_is_believed_about_a_process_that_can_be_seen_from_here() {
    // Broken in production: a lie frees the slots of a sender that runs on the receiver's own host and writes.
    let own = process("1", 1);
    let mut bench = Bench::with(4, 4, |settings| settings.hello.process = Some(own));
    for (name, pid) in [("a", 10), ("b", 11)] {
        bench.process = Some(process("1", pid));
        bench.shake_hands(name, Vec::new());
    }
    bench.alloc("a", "r", &["k0"]);
    bench.session.handle_route_gone(bench.now, &"a");
    bench.drain();
    assert_eq!(ping_with(&mut bench, "b", &[process("1", 10)]), []);
    later(&mut bench, 3);
    assert_eq!(bench.session.counts().slots.quarantined, 1);
}

#[test]
fn what_a_dead_writer_had_posted_is_waited_for() {
    // Broken in production: bytes that a killed sender's kernel still held land in a chunk of another request.
    let mut bench = bench_that_lost_a(Duration::from_secs(2));
    bench.session.handle_process_ended(bench.now, "a");
    later(&mut bench, 1);
    assert_eq!(bench.session.counts().slots.quarantined, 2);
    // Said again, it takes no longer.
    bench.session.handle_process_ended(bench.now, "a");
    later(&mut bench, 1);
    assert_eq!(bench.session.counts().slots.quarantined, 0);
}

#[test]
fn a_process_is_watched_for_as_long_as_its_end_matters() {
    // Broken in production: what watches the process of a sender stays for good, one for every sender that ever came; or
    // goes too soon, and the slots of a killed sender are never free again.
    let mut bench = bench_that_lost_a(Duration::ZERO);
    let watched = |bench: &Bench| bench.watched.iter().cloned().collect::<Vec<_>>().join("");
    assert_eq!(watched(&bench), "abc", "it may still be writing");
    bench.session.handle_process_ended(bench.now, "a");
    bench.drain();
    assert_eq!((watched(&bench).as_str(), bench.session.counts().slots.quarantined), ("bc", 0));
    ping(&mut bench, "b");
    bench.session.handle_route_gone(bench.now, &"b");
    bench.drain();
    assert_eq!(watched(&bench), "c", "nothing was granted to it");
    // Back under the same name: watched again, until it has said that it writes no more.
    bench.process = Some(process("1", 11));
    bench.shake_hands("b", Vec::new());
    let grant = grant_of(&bench.alloc("b", "r2", &["k5"]).1);
    bench.session.handle_route_gone(bench.now, &"b");
    bench.drain();
    assert_eq!(watched(&bench), "bc");
    bench.cancel("b", "r2", Some(grant), None, true);
    assert_eq!(watched(&bench), "c");
}

#[test]
fn a_peer_that_makes_room_for_another_is_not_watched_any_more() {
    // Broken in production: senders beyond pd_max_peers that take turns leave something behind each time.
    let mut bench = Bench::with(4, 4, |settings| settings.peers_max = 2);
    for (name, pid) in [("c", 12), ("d", 13), ("e", 14), ("c", 15), ("d", 16)] {
        bench.now += Duration::from_millis(1);
        bench.process = Some(process("1", pid));
        assert!(bench.shake_hands(name, Vec::new()).refusal.is_none());
        assert!(bench.watched.len() <= 2 && bench.watched.contains(name), "{:?}", bench.watched);
    }
}
