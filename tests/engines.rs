//! Every engine through the trait, in two processes: one that writes and one that is written to.
//!
//! Each case runs in a process of its own, so that a library that aborts or hangs fails one test, within a bound.
#![allow(clippy::unwrap_used)]

// The bench uses the rest of it.
#[allow(dead_code)]
mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pd_backend::buffer::HostMapping;
use pd_backend::ids::{ConnectionId, TransferId};
use pd_backend::transfer::{ByteCopy, EngineKind, TransferError};
use support::receiver::{Receiver, serve_if_asked};
use support::sender::{Expected, Sender};
use support::{ENVIRONMENT, kind_named, nixl_is_here};

const CASE_VARIABLE: &str = "PD_TEST_CASE";
const CASE_MAX: Duration = Duration::from_secs(150);
const HIDDEN: [&str; 4] = ["this_process_has_another_role", "--exact", "--nocapture", "--test-threads=1"];

const UNIT_BYTES: u64 = 16 * 1024;
const UNIT_COUNT: u64 = 64;
const LEN_BYTES: u64 = UNIT_BYTES * UNIT_COUNT + 5;

/// A test of `case` for each engine.
macro_rules! cases {
    ($($case:ident)*) => {
        fn run_case(name: &str, kind: EngineKind) {
            match name {
                $(stringify!($case) => $case(kind),)*
                other => panic!("no case {other}"),
            }
        }

        mod local {
            use super::*;
            $(#[test] fn $case() { start_case(stringify!($case), EngineKind::Local, &[]); })*
        }

        mod nixl {
            use super::*;
            $(#[test] fn $case() { if nixl_is_here() { start_case(stringify!($case), EngineKind::Nixl, &[]); } })*
        }

        /// Between hosts a post returns before the copies have ended: TCP does likewise, on one host as well.
        mod nixl_over_tcp {
            use super::*;
            const TCP: [(&str, &str); 1] = [("UCX_TLS", "tcp,self")];
            $(#[test] fn $case() { if nixl_is_here() { start_case(stringify!($case), EngineKind::Nixl, &TCP); } })*
        }
    };
}

cases! {
    one_chunk
    many_scattered_chunks
    neighbours_in_any_order
    parts_of_chunks
    two_transfers_in_flight
    two_peers_at_once
    refused_posts_write_nothing
    garbage_is_refused
    killed_before_a_post
    killed_during_writes
    restarted_under_a_new_name
    disconnected_and_connected_again
    disconnected_in_flight
    shaken_hands_with_twice
}

#[test]
fn this_process_has_another_role() {
    // Not a test of its own: the other processes of the tests enter here.
    if serve_if_asked() {
        return;
    }
    if let Ok(case) = std::env::var(CASE_VARIABLE) {
        let (case, engine) = case.split_once(' ').unwrap();
        run_case(case, kind_named(engine));
    }
}

fn start_case(case: &str, kind: EngineKind, environment: &[(&str, &str)]) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(HIDDEN)
        .envs(ENVIRONMENT)
        .envs(environment.iter().copied())
        .env(CASE_VARIABLE, format!("{case} {}", kind.as_str()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > CASE_MAX {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{case} did not end within {} s", CASE_MAX.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "{case}: {status}");
}

fn start_receiver(kind: EngineKind, len_bytes: u64) -> Receiver {
    Receiver::start(&HIDDEN, kind, len_bytes, UNIT_BYTES)
}

fn pair(kind: EngineKind, len_bytes: u64) -> (Sender, Receiver, Expected, ConnectionId) {
    let mut receiver = start_receiver(kind, len_bytes);
    let mut sender = Sender::start(kind, len_bytes, UNIT_BYTES);
    let connection = sender.connect(&mut receiver);
    let expected = Expected::fill(&receiver);
    (sender, receiver, expected, connection)
}

fn copy(local_offset: u64, remote_offset: u64, len_bytes: u64) -> ByteCopy {
    ByteCopy { local_offset, remote_offset, len_bytes }
}

/// Whole units: (local, remote).
fn units(pairs: impl IntoIterator<Item = (u64, u64)>) -> Vec<ByteCopy> {
    pairs.into_iter().map(|(local, remote)| copy(local * UNIT_BYTES, remote * UNIT_BYTES, UNIT_BYTES)).collect()
}

fn ship_and_check(kind: EngineKind, lists: &[Vec<ByteCopy>]) {
    let (mut sender, receiver, mut expected, connection) = pair(kind, LEN_BYTES);
    for copies in lists {
        sender.ship(connection, copies).unwrap();
        expected.apply(&sender.source, copies);
        expected.check(&receiver);
    }
}

fn one_chunk(kind: EngineKind) {
    // Broken in production: the simplest request does not arrive, or lands elsewhere.
    ship_and_check(kind, &[units([(3, 5)]), units([(UNIT_COUNT - 1, 0)])]);
}

fn many_scattered_chunks(kind: EngineKind) {
    // Broken in production: chunks of one prompt are swapped in the receiver's slots.
    let scattered = |step: u64| units((0..UNIT_COUNT).map(|unit| (unit * step % UNIT_COUNT, unit)));
    ship_and_check(kind, &[scattered(29), scattered(63), units((0..UNIT_COUNT / 2).map(|unit| (unit, unit * 2)))]);
}

fn neighbours_in_any_order(kind: EngineKind) {
    // Broken in production: joining neighbouring chunks moves bytes that were not asked for.
    let mut neighbours = units((0..20).map(|unit| (unit + 7, unit + 30)));
    neighbours.reverse();
    neighbours.swap(3, 11);
    let all = units((0..UNIT_COUNT).map(|unit| (unit, unit)));
    ship_and_check(kind, &[neighbours, all]);
}

fn parts_of_chunks(kind: EngineKind) {
    // Broken in production: pushing layer by layer, or a short last chunk, overwrites its neighbours.
    let odd: Vec<ByteCopy> = (0..50).map(|i| copy(i * 977 + 1, i * 1999 + 3, 1 + i * 13)).collect();
    let mixed =
        [units([(1, 60)]), vec![copy(7, UNIT_BYTES * 3 + 1, UNIT_BYTES)], vec![copy(LEN_BYTES - 1, LEN_BYTES - 1, 1)]];
    ship_and_check(kind, &[odd, mixed.concat(), vec![copy(0, 0, LEN_BYTES)], vec![copy(5, 9, 0)], Vec::new()]);
}

fn two_transfers_in_flight(kind: EngineKind) {
    // Broken in production: the end of one request is taken for that of another.
    const LARGE: u64 = 64 * 1024 * 1024;
    let (mut sender, receiver, mut expected, connection) = pair(kind, LARGE);
    let half = LARGE / 2;
    let lists = [vec![copy(0, half, half)], units((0..40).map(|unit| (unit + 1, unit))), vec![copy(3, half - 9, 9)]];
    let mut posted = Vec::new();
    for copies in &lists {
        let transfer = sender.next_transfer();
        sender.engine.post(transfer, connection, copies).unwrap();
        expected.apply(&sender.source, copies);
        posted.push(transfer);
    }
    assert_eq!(sender.engine.in_flight(), 3);
    let mut ended: Vec<TransferId> = Vec::new();
    for completion in sender.completions(3) {
        completion.result.unwrap();
        ended.push(completion.transfer);
    }
    ended.sort();
    assert_eq!(ended, posted);
    assert_eq!(sender.engine.in_flight(), 0);
    let mut more = Vec::new();
    sender.engine.poll(&mut more);
    assert!(more.is_empty(), "{more:?}");
    expected.check(&receiver);
}

fn two_peers_at_once(kind: EngineKind) {
    // Broken in production: a chunk meant for one decode worker is written into another's buffer.
    let (mut sender, first, mut first_expected, to_first) = pair(kind, LEN_BYTES);
    let mut second = start_receiver(kind, LEN_BYTES);
    let mut second_expected = Expected::fill(&second);
    let to_second = sender.connect(&mut second);
    let lists = [units((0..10).map(|unit| (unit, unit * 3))), units((0..10).map(|unit| (unit + 20, unit * 2)))];
    for (connection, copies) in [(to_first, &lists[0]), (to_second, &lists[1])] {
        let transfer = sender.next_transfer();
        sender.engine.post(transfer, connection, copies).unwrap();
    }
    for completion in sender.completions(2) {
        completion.result.unwrap();
    }
    first_expected.apply(&sender.source, &lists[0]);
    second_expected.apply(&sender.source, &lists[1]);
    first_expected.check(&first);
    second_expected.check(&second);
}

fn refused_posts_write_nothing(kind: EngineKind) {
    // Broken in production: one bad slot index corrupts the chunks of other requests.
    let (mut sender, receiver, expected, connection) = pair(kind, LEN_BYTES);
    let transfer = TransferId(77);
    for bad in [copy(0, LEN_BYTES - 1, 2), copy(LEN_BYTES, 0, 1), copy(u64::MAX, 0, 2), copy(0, u64::MAX - 1, 1)] {
        let list = [units([(0, 0)]), vec![bad]].concat();
        let error = sender.engine.post(transfer, connection, &list).unwrap_err();
        assert!(matches!(error, TransferError::OutOfRange { .. }), "{error}");
    }
    let unknown = ConnectionId(connection.0 + 1);
    let error = sender.engine.post(transfer, unknown, &units([(0, 0)])).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    let error = sender.engine.connect(unknown, &receiver.export.descriptors).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    let other = start_receiver(kind, LEN_BYTES);
    let half_way = sender.engine.load_peer(&other.export.agent_name, &other.export.metadata).unwrap();
    let error = sender.engine.post(transfer, half_way, &units([(0, 0)])).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    sender.engine.disconnect(unknown);
    assert_eq!(sender.engine.in_flight(), 0);
    let mut completions = Vec::new();
    sender.engine.poll(&mut completions);
    assert!(completions.is_empty());
    expected.check(&receiver);
}

fn garbage_is_refused(kind: EngineKind) {
    // Broken in production: a malformed handshake takes the daemon down, or its bytes become addresses.
    let (mut sender, receiver, mut expected, connection) = pair(kind, LEN_BYTES);
    let other = start_receiver(kind, LEN_BYTES);
    let theirs = &other.export;
    let refused = |result: Result<ConnectionId, TransferError>| match result {
        Err(TransferError::BadExport { agent, .. }) => assert!(!agent.is_empty()),
        other => panic!("{other:?}"),
    };
    for len in (0..theirs.metadata.len()).step_by(7) {
        refused(sender.engine.load_peer(&theirs.agent_name, &theirs.metadata[..len]));
    }
    refused(sender.engine.load_peer("another name", &theirs.metadata));
    refused(sender.engine.load_peer(&theirs.agent_name, &theirs.descriptors));
    refused(sender.engine.load_peer(&theirs.agent_name, &[0xff; 300]));
    refused(sender.engine.load_peer(&theirs.agent_name, &vec![b'n'; 10 << 20]));
    let mut longer = theirs.metadata.clone();
    longer.push(0);
    refused(sender.engine.load_peer(&theirs.agent_name, &longer));
    if kind == EngineKind::Nixl {
        // Memory of a type that NIXL does not know: it would take that for an index.
        let mut unknown = theirs.metadata.clone();
        let at = unknown.windows(4).rposition(|window| window == b"|t\x04\0").unwrap();
        unknown[at + 10] = 0x81;
        refused(sender.engine.load_peer(&theirs.agent_name, &unknown));
    }
    let half_way = sender.engine.load_peer(&theirs.agent_name, &theirs.metadata).unwrap();
    let mut garbage = vec![Vec::new(), vec![0xc1; 40], theirs.metadata.clone(), receiver.export.descriptors.clone()];
    garbage.extend((0..theirs.descriptors.len()).map(|len| theirs.descriptors[..len].to_vec()));
    for descriptors in garbage {
        let error = sender.engine.connect(half_way, &descriptors).unwrap_err();
        let is_bad = matches!(error, TransferError::BadExport { what: "descriptors", .. });
        assert!(is_bad, "{error}");
    }
    // And everybody else is served as before.
    sender.engine.connect(half_way, &theirs.descriptors).unwrap();
    let copies = units([(1, 2), (5, 9)]);
    sender.ship(connection, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

fn killed_before_a_post(kind: EngineKind) {
    // Broken in production: a request to a dead decode worker is reported as sent, or waits for ever.
    let (mut sender, mut receiver, _, connection) = pair(kind, LEN_BYTES);
    sender.ship(connection, &units([(0, 0)])).unwrap();
    receiver.kill();
    for _ in 0..3 {
        let error = sender.ship(connection, &units([(1, 1)])).unwrap_err();
        assert!(matches!(&error, TransferError::Peer { agent, .. } if *agent == receiver.export.agent_name), "{error}");
    }
    sender.engine.disconnect(connection);
    let error = sender.ship(connection, &units([(1, 1)])).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
}

fn killed_during_writes(kind: EngineKind) {
    // Broken in production: a decode worker that crashes in the middle of a request takes its prefill worker along.
    const LARGE: u64 = 128 * 1024 * 1024;
    let (mut sender, mut receiver, _, connection) = pair(kind, LARGE);
    let agent_name = receiver.export.agent_name.clone();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(25));
        receiver.kill();
        receiver
    });
    let started = Instant::now();
    let error = loop {
        assert!(started.elapsed() < Duration::from_secs(60), "writes to a dead peer go on succeeding");
        if let Err(error) = sender.ship(connection, &[copy(0, 0, LARGE)]) {
            break error;
        }
    };
    assert!(matches!(&error, TransferError::Peer { agent, .. } if *agent == agent_name), "{error}");
    killer.join().unwrap();
    sender.engine.disconnect(connection);
}

fn restarted_under_a_new_name(kind: EngineKind) {
    // Broken in production: after a decode worker's restart every sender has to be restarted too.
    let (mut sender, mut receiver, _, connection) = pair(kind, LEN_BYTES);
    sender.ship(connection, &units([(0, 0)])).unwrap();
    receiver.kill();
    assert!(sender.ship(connection, &units([(0, 0)])).is_err());
    sender.engine.disconnect(connection);
    let mut restarted = start_receiver(kind, LEN_BYTES);
    let mut expected = Expected::fill(&restarted);
    let again = sender.connect(&mut restarted);
    assert_ne!(again, connection);
    let copies = units((0..9).map(|unit| (unit, unit * 2)));
    sender.ship(again, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&restarted);
}

fn disconnected_and_connected_again(kind: EngineKind) {
    // Broken in production: a connection that was dropped for a moment can never be had again.
    let (mut sender, mut receiver, mut expected, connection) = pair(kind, LEN_BYTES);
    sender.engine.disconnect(connection);
    let error = sender.ship(connection, &units([(0, 0)])).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    expected.check(&receiver);
    let again = sender.connect(&mut receiver);
    let copies = units([(4, 4), (5, 5), (9, 1)]);
    sender.ship(again, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

fn disconnected_in_flight(kind: EngineKind) {
    // Broken in production: a slot is granted again while an engine that gave it up still writes into it.
    const LARGE: u64 = 64 * 1024 * 1024;
    let (mut sender, receiver, _, connection) = pair(kind, LARGE);
    let half = LARGE / 2;
    let transfers = [sender.next_transfer(), sender.next_transfer()];
    for transfer in transfers {
        sender.engine.post(transfer, connection, &[copy(0, 0, half)]).unwrap();
    }
    sender.engine.disconnect(connection);
    let mut completions = sender.completions(2);
    completions.sort_by_key(|completion| completion.transfer);
    assert_eq!(completions.iter().map(|completion| completion.transfer).collect::<Vec<_>>(), transfers);
    // A transport that copies inside `post` had finished; any other ends with an error.
    for completion in completions {
        assert!(matches!(completion.result, Ok(()) | Err(TransferError::Peer { .. })), "{completion:?}");
    }
    // From here on nothing is written: other bytes put there stay.
    let refilled = Expected::fill(&receiver);
    let mut completions = Vec::new();
    for _ in 0..1000 {
        sender.engine.poll(&mut completions);
    }
    assert!(completions.is_empty());
    refilled.check(&receiver);
}

fn shaken_hands_with_twice(kind: EngineKind) {
    // Broken in production: a side channel that reconnects makes the next handshake with the same peer fail.
    let (mut sender, mut receiver, mut expected, first) = pair(kind, LEN_BYTES);
    let second = sender.connect(&mut receiver);
    assert_ne!(first, second);
    let error = sender.ship(first, &units([(0, 0)])).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    let copies = units([(8, 3)]);
    sender.ship(second, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

#[test]
fn nothing_is_left_behind_after_sigkill() {
    // Broken in production: a daemon that is killed leaves its buffer's memory allocated until the next reboot.
    let names = || -> Vec<_> {
        let entries = std::fs::read_dir("/dev/shm").into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect()
    };
    let before = names();
    let mut receiver = start_receiver(EngineKind::Local, LEN_BYTES);
    let pid = receiver.pid();
    receiver.mapping.write(0, b"still here").unwrap();
    receiver.kill();
    // The mapping outlives its owner, and with it goes the memory: no name refers to it.
    let mut seen = [0; 10];
    receiver.mapping.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"still here");
    assert!(HostMapping::open(&receiver.handle).is_err());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    // NIXL's transports may come and go beside this test.
    let left: Vec<_> = names()
        .into_iter()
        .filter(|name| !before.contains(name) && !name.to_string_lossy().starts_with("ucx"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
