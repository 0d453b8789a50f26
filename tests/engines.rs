//! Every engine through the trait, in two processes: one that writes and one that is written to.
//!
//! Each case runs in a process of its own, so that a library that aborts or hangs fails one test, within a bound.
#![allow(clippy::unwrap_used)]

// The bench uses the rest of it.
#[allow(dead_code)]
mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pd_backend::buffer::{CopyBatch, CopyEnd, CopyStream, Memory};
use pd_backend::ids::{ConnectionId, TransferId};
use pd_backend::transfer::{ByteCopy, Ended, EngineKind, TransferError};
use rustix::net::{AddressFamily, Shutdown};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Resource, Rlimit, getrlimit, setrlimit};
use support::memory::MemoryKind;
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
    // Host memory alone grows.
    (any memory: $($case:ident)*; host memory: $($growing:ident)*; measured: $($measured:ident)*) => {
        fn run_case(name: &str, kind: EngineKind) {
            match name {
                $(stringify!($case) => $case(kind),)*
                $(stringify!($growing) => $growing(kind),)*
                $(stringify!($measured) => $measured(kind),)*
                other => panic!("no case {other}"),
            }
        }

        mod local {
            use super::*;
            $(#[test] fn $case() { start_case(stringify!($case), EngineKind::Local, &[]); })*
            $(#[test] fn $growing() { start_case(stringify!($growing), EngineKind::Local, &[]); })*
        }

        mod local_gpu_to_gpu {
            use super::*;
            $(#[test] fn $case() { start_gpu_case(stringify!($case), EngineKind::Local, &[SENDER, RECEIVER]); })*
        }

        mod local_gpu_to_host {
            use super::*;
            $(#[test] fn $case() { start_gpu_case(stringify!($case), EngineKind::Local, &[SENDER]); })*
        }

        mod local_host_to_gpu {
            use super::*;
            $(#[test] fn $case() { start_gpu_case(stringify!($case), EngineKind::Local, &[RECEIVER]); })*
        }

        mod measured {
            use super::*;
            $(#[test] #[ignore = "it measures, into the file PD_TEST_REPORT: scripts/gpu-check runs it"] fn $measured() {
                start_gpu_case(stringify!($measured), EngineKind::Local, &[SENDER, RECEIVER]);
            })*
        }

        mod nixl_gpu_to_gpu {
            use super::*;
            $(#[test] fn $case() {
                if nixl_is_here() && gpu_is_here("nixl with GPU memory") {
                    start_gpu_case(stringify!($case), EngineKind::Nixl, &[SENDER, RECEIVER]);
                }
            })*
        }

        mod nixl {
            use super::*;
            $(#[test] fn $case() { if nixl_is_here() { start_case(stringify!($case), EngineKind::Nixl, &[]); } })*
            $(#[test] fn $growing() { if nixl_is_here() { start_case(stringify!($growing), EngineKind::Nixl, &[]); } })*
        }

        /// Between hosts a post returns before the copies have ended: TCP does likewise, on one host as well.
        mod nixl_over_tcp {
            use super::*;
            const TCP: [(&str, &str); 1] = [("UCX_TLS", "tcp,self")];
            $(#[test] fn $case() { if nixl_is_here() { start_case(stringify!($case), EngineKind::Nixl, &TCP); } })*
            $(#[test] fn $growing() { if nixl_is_here() { start_case(stringify!($growing), EngineKind::Nixl, &TCP); } })*
        }
    };
}

cases! {
    any memory:
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
    lost_and_met_again_leaves_nothing_open
    a_kept_connection_that_has_broken_is_made_anew
    no_more_files_is_said_with_the_limit
    shaken_hands_with_twice
    a_stalled_peer_holds_nobody_up
    a_stalled_peer_is_given_up_and_had_again
    disconnected_while_connecting;
    host memory:
    an_agent_that_says_something_else_is_met_anew
    the_receiver_grows
    the_sender_grows
    grown_with_writes_in_flight
    bad_growth_is_refused
    grown_while_connecting;
    measured:
    gpu_writes_against_copies
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

const SENDER: (&str, &str) = (support::sender::MEMORY_VARIABLE, "gpu");
const RECEIVER: (&str, &str) = (support::receiver::MEMORY_VARIABLE, "gpu");

/// A case with the named ends on a GPU: the stand-in's, unless the machine's own is asked for.
fn start_gpu_case(case: &str, kind: EngineKind, ends: &[(&str, &str)]) {
    let state = tempfile::tempdir().unwrap();
    let gpu = support::gpu::environment(state.path());
    let mut environment: Vec<(&str, &str)> = gpu.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    environment.extend(ends);
    start_case(case, kind, &environment);
}

/// Whether this is to run on the machine's own GPU; says how when it is not.
fn gpu_is_here(what: &str) -> bool {
    let is_real = support::gpu::is_real();
    if !is_real {
        eprintln!(
            "SKIPPED, {what} needs a GPU: scripts/gpu-check, or PD_TEST_GPU=1 before the test command, on a machine with one"
        );
    }
    is_real
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
    let mut more = Ended::default();
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
    let mut ended = Ended::default();
    sender.engine.poll(&mut ended);
    assert!(ended.is_empty());
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
    sender.finish_connecting(half_way, &theirs.descriptors).unwrap();
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

/// Files that a process has open.
fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn lost_and_met_again_leaves_nothing_open(kind: EngineKind) {
    // Broken in production: every loss of a peer that both processes survive leaves a socket open on either side, until
    // each of them has as many files open as it may and refuses every peer.
    const LOSSES: u64 = 20;
    let (mut sender, mut receiver, mut expected, mut connection) = pair(kind, LEN_BYTES);
    let mut ship = |sender: &mut Sender, receiver: &Receiver, connection, unit| {
        let copies = units([(unit, unit + 1)]);
        sender.ship(connection, &copies).unwrap();
        expected.apply(&sender.source, &copies);
        expected.check(receiver);
    };
    ship(&mut sender, &receiver, connection, 0);
    let before = (open_files(std::process::id()), open_files(receiver.pid()));
    for loss in 1..=LOSSES {
        sender.engine.disconnect(connection);
        // The receiver gives it up and gets to know it anew, as after any handshake.
        connection = sender.connect(&mut receiver);
        ship(&mut sender, &receiver, connection, loss);
    }
    let after = (open_files(std::process::id()), open_files(receiver.pid()));
    let more = 4;
    assert!(after.0 <= before.0 + more && after.1 <= before.1 + more, "{before:?} open before, {after:?} after");
}

/// Shuts every TCP connection of this process down, as a network does that forgets them. How many there were.
fn break_connections() -> usize {
    let ours = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
    let numbers: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str().and_then(|name| name.parse().ok()))
        .collect();
    let is_broken = |&number: &i32| {
        let Ok(file) = rustix::process::pidfd_getfd(&ours, number, PidfdGetfdFlags::empty()) else { return false };
        let is_tcp = rustix::net::getpeername(&file)
            .is_ok_and(|peer| peer.is_some_and(|peer| peer.address_family() == AddressFamily::INET));
        is_tcp && rustix::net::shutdown(&file, Shutdown::Both).is_ok()
    };
    numbers.into_iter().filter(is_broken).count()
}

fn a_kept_connection_that_has_broken_is_made_anew(kind: EngineKind) {
    // Broken in production: after the network between two hosts was gone for a while, their connection is used again for
    // ever, and every handshake fails on it.
    let (mut sender, mut receiver, mut expected, connection) = pair(kind, LEN_BYTES);
    sender.ship(connection, &units([(0, 1)])).unwrap();
    expected.apply(&sender.source, &units([(0, 1)]));
    sender.engine.disconnect(connection);
    let broken = break_connections();
    assert_eq!(broken > 0, kind == EngineKind::Nixl, "{broken}");
    // At the second handshake, where the first is what finds out.
    let mut failures = Vec::new();
    let again = loop {
        receiver.load_peer(&sender.engine.export().unwrap());
        let theirs = &receiver.export;
        let met = sender.engine.load_peer(&theirs.agent_name, &theirs.metadata).unwrap();
        let descriptors = theirs.descriptors.clone();
        match sender.finish_connecting(met, &descriptors) {
            Ok(()) => break met,
            Err(error) => failures.push(error.to_string()),
        }
        sender.engine.disconnect(met);
        assert!(failures.len() < 2, "{failures:?}");
    };
    let copies = units([(4, 4), (9, 1)]);
    sender.ship(again, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

fn no_more_files_is_said_with_the_limit(kind: EngineKind) {
    // Broken in production: every peer is refused with "backend error", and nobody learns that a limit is too low.
    let (mut sender, receiver, mut expected, connection) = pair(kind, LEN_BYTES);
    let mut other = start_receiver(kind, LEN_BYTES);
    let before = getrlimit(Resource::Nofile);
    // No number above those of the standard streams can be had, whatever is open already.
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), maximum: before.maximum }).unwrap();
    // Only now: over TCP the receiver connects to us, and what we accept is enough for both ways.
    other.load_peer(&sender.engine.export().unwrap());
    let met = sender.engine.load_peer(&other.export.agent_name, &other.export.metadata);
    let met = met.and_then(|met| sender.finish_connecting(met, &other.export.descriptors));
    setrlimit(Resource::Nofile, before).unwrap();
    let error = met.unwrap_err().to_string();
    match kind {
        EngineKind::Nixl => assert!(error.contains("its limit is 3; raise it (ulimit -n"), "{error}"),
        // The system says it in its own words.
        _ => assert!(error.contains("Too many open files"), "{error}"),
    }
    let again = sender.connect(&mut other);
    let mut other_expected = Expected::fill(&other);
    let copies = units([(7, 2)]);
    for (connection, receiver, expected) in
        [(again, &other, &mut other_expected), (connection, &receiver, &mut expected)]
    {
        sender.ship(connection, &copies).unwrap();
        expected.apply(&sender.source, &copies);
        expected.check(receiver);
    }
}

fn an_agent_that_says_something_else_is_met_anew(kind: EngineKind) {
    // Broken in production: a connection that was kept for a lost peer is used with what the peer said before it changed.
    let (mut sender, mut receiver, mut expected, connection) = lazy_pair(kind, 10);
    sender.ship(connection, &units([(0, 0)])).unwrap();
    expected.apply(&sender.source, &units([(0, 0)]));
    sender.engine.disconnect(connection);
    let before = receiver.export.clone();
    receiver.grow(LEN_BYTES);
    let grown = sender.connect(&mut receiver);
    let copies = units([(3, 10), (4, 63)]);
    sender.ship(grown, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
    // Less than before is not more of the same: nothing that was known is kept.
    sender.engine.disconnect(grown);
    let shorter = sender.engine.load_peer(&before.agent_name, &before.metadata).unwrap();
    sender.finish_connecting(shorter, &before.descriptors).unwrap();
    is_out_of_range(sender.ship(shorter, &units([(3, 10)])), "remote");
    let copies = units([(5, 3)]);
    sender.ship(shorter, &copies).unwrap();
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
    // So that a copy has begun, whoever makes it.
    let mut ended = Ended::default();
    sender.engine.poll(&mut ended);
    sender.engine.disconnect(connection);
    let mut completions = ended.transfers;
    completions.extend(sender.completions(2 - completions.len()));
    completions.sort_by_key(|completion| completion.transfer);
    assert_eq!(completions.iter().map(|completion| completion.transfer).collect::<Vec<_>>(), transfers);
    // A transport that copies inside `post` had finished; any other ends with an error.
    for completion in completions {
        assert!(matches!(completion.result, Ok(()) | Err(TransferError::Peer { .. })), "{completion:?}");
    }
    // From here on nothing is written: other bytes put there stay.
    let refilled = Expected::fill(&receiver);
    let mut ended = Ended::default();
    for _ in 0..1000 {
        sender.engine.poll(&mut ended);
    }
    assert!(ended.is_empty());
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

fn is_out_of_range(result: Result<(), TransferError>, on: &str) {
    match result {
        Err(TransferError::OutOfRange { side, .. }) => assert_eq!(side, on),
        other => panic!("{other:?}"),
    }
}

/// A sender with all of its buffer and a receiver with the first `unit_count` units of its own.
fn lazy_pair(kind: EngineKind, unit_count: u64) -> (Sender, Receiver, Expected, ConnectionId) {
    let len_bytes = unit_count * UNIT_BYTES;
    let mut receiver = Receiver::start_lazy(&HIDDEN, kind, LEN_BYTES, len_bytes, UNIT_BYTES);
    let mut sender = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    let connection = sender.connect(&mut receiver);
    let expected = Expected::fill(&receiver);
    (sender, receiver, expected, connection)
}

fn the_receiver_grows(kind: EngineKind) {
    // Broken in production: after a decode worker's buffer has grown, nobody can write into the new part, or somebody
    // writes into memory that is not there yet.
    let (mut sender, mut receiver, mut expected, connection) = lazy_pair(kind, 10);
    let mut ship = |sender: &mut Sender, receiver: &Receiver, copies: &[ByteCopy]| {
        sender.ship(connection, copies).unwrap();
        expected.apply(&sender.source, copies);
        expected.check(receiver);
    };
    ship(&mut sender, &receiver, &units([(3, 9), (4, 0)]));
    is_out_of_range(sender.ship(connection, &units([(0, 0), (3, 10)])), "remote");
    is_out_of_range(sender.ship(connection, &[copy(0, 10 * UNIT_BYTES - 1, 2)]), "remote");
    receiver.grow(20 * UNIT_BYTES);
    is_out_of_range(sender.ship(connection, &units([(3, 10)])), "remote");
    sender.update(connection, &receiver).unwrap();
    ship(&mut sender, &receiver, &units([(3, 10), (60, 19), (5, 2)]));
    // Across the end of the first piece: neighbours that are joined, and a copy of any offset and length.
    ship(&mut sender, &receiver, &units((0..8).map(|unit| (unit + 30, unit + 6))));
    ship(&mut sender, &receiver, &[copy(77, 10 * UNIT_BYTES - 1001, 5003)]);
    is_out_of_range(sender.ship(connection, &units([(3, 20)])), "remote");
    // Pieces need not be whole units for the engine, and several may be told of at once.
    receiver.grow(20 * UNIT_BYTES + 7);
    receiver.grow(LEN_BYTES);
    sender.update(connection, &receiver).unwrap();
    sender.update(connection, &receiver).unwrap();
    ship(&mut sender, &receiver, &units([(9, 20), (11, 63), (12, 5)]));
    ship(&mut sender, &receiver, &[copy(0, 0, LEN_BYTES)]);
    is_out_of_range(sender.ship(connection, &[copy(0, LEN_BYTES - 1, 2)]), "remote");
}

fn the_sender_grows(kind: EngineKind) {
    // Broken in production: chunks that a prefill worker stages in the new part of its buffer cannot be sent.
    let mut receiver = Receiver::start_lazy(&HIDDEN, kind, LEN_BYTES, 30 * UNIT_BYTES, UNIT_BYTES);
    let mut sender = Sender::start_lazy(kind, LEN_BYTES, 10 * UNIT_BYTES, UNIT_BYTES);
    let connection = sender.connect(&mut receiver);
    let mut expected = Expected::fill(&receiver);
    is_out_of_range(sender.ship(connection, &units([(10, 0)])), "local");
    sender.engine.extend(10 * UNIT_BYTES..25 * UNIT_BYTES).unwrap();
    receiver.grow(LEN_BYTES);
    sender.update(connection, &receiver).unwrap();
    let lists = [
        units([(10, 0), (24, 1), (3, 40)]),
        // Across the ends of both sides, which are at different places of the copy.
        vec![copy(8 * UNIT_BYTES + 5, 27 * UNIT_BYTES + 100, 6 * UNIT_BYTES + 3)],
        units((5..15).map(|unit| (unit, unit + 20))),
    ];
    for copies in lists {
        sender.ship(connection, &copies).unwrap();
        expected.apply(&sender.source, &copies);
        expected.check(&receiver);
    }
    is_out_of_range(sender.ship(connection, &[copy(25 * UNIT_BYTES - 1, 0, 2)]), "local");
    // And another one that gets to know it only now.
    let mut late = start_receiver(kind, LEN_BYTES);
    let mut late_expected = Expected::fill(&late);
    let to_late = sender.connect(&mut late);
    let copies = units([(24, 0), (9, 63)]);
    sender.ship(to_late, &copies).unwrap();
    late_expected.apply(&sender.source, &copies);
    late_expected.check(&late);
}

fn grown_with_writes_in_flight(kind: EngineKind) {
    // Broken in production: growing a buffer breaks the requests that are just being written.
    const LARGE: u64 = 96 * 1024 * 1024;
    const FIRST: u64 = 64 * 1024 * 1024;
    let mut receiver = Receiver::start_lazy(&HIDDEN, kind, LARGE, FIRST, UNIT_BYTES);
    let mut sender = Sender::start_lazy(kind, LARGE, FIRST, UNIT_BYTES);
    let connection = sender.connect(&mut receiver);
    let mut expected = Expected::fill(&receiver);
    // Whole units that cannot be joined, so that prepared ones are in use, and one long copy.
    let before = [units((0..1000).map(|unit| (2 * unit, 2 * unit + 1))), vec![copy(0, FIRST / 2, FIRST / 2 - 9)]];
    for copies in &before {
        let transfer = sender.next_transfer();
        sender.engine.post(transfer, connection, copies).unwrap();
    }
    receiver.grow(LARGE);
    sender.engine.extend(FIRST..LARGE).unwrap();
    sender.update(connection, &receiver).unwrap();
    let unit_count = LARGE / UNIT_BYTES;
    let after = units((0..100).map(|unit| (unit_count - 1 - 2 * unit, FIRST / UNIT_BYTES + 2 * unit)));
    let transfer = sender.next_transfer();
    sender.engine.post(transfer, connection, &after).unwrap();
    for completion in sender.completions(3) {
        completion.result.unwrap();
    }
    for copies in before.iter().chain([&after]) {
        expected.apply(&sender.source, copies);
    }
    expected.check(&receiver);
}

fn bad_growth_is_refused(kind: EngineKind) {
    // Broken in production: one odd message about a grown buffer ends the requests of a healthy connection.
    let (mut sender, mut receiver, mut expected, connection) = lazy_pair(kind, 10);
    let before = receiver.export.clone();
    let other = start_receiver(kind, LEN_BYTES);
    receiver.grow(20 * UNIT_BYTES);
    let good = receiver.export.clone();
    let refused = |result: Result<(), TransferError>| match result {
        Err(TransferError::BadExport { agent, reason, .. }) => {
            assert_eq!(agent, good.agent_name);
            assert!(!reason.contains("given up"), "{reason}");
        }
        other => panic!("{other:?}"),
    };
    let mut update = |metadata: &[u8], descriptors: &[u8]| {
        refused(sender.engine.update_peer(connection, metadata, descriptors));
    };
    update(&other.export.metadata, &good.descriptors);
    update(&good.metadata, &other.export.descriptors);
    update(&[], &good.descriptors);
    for len in (0..good.descriptors.len()).step_by(3) {
        update(&good.metadata, &good.descriptors[..len]);
        update(&good.metadata[..len], &good.descriptors);
    }
    if kind == EngineKind::Nixl {
        // Another way to reach it, and the same range under another key: what makes NIXL forget a peer as a whole.
        for at in [good.metadata.len() / 4, good.metadata.len() - 2] {
            let mut changed = good.metadata.clone();
            changed[at] ^= 1;
            update(&changed, &good.descriptors);
        }
    }
    let unknown = ConnectionId(connection.0 + 7);
    let error = sender.engine.update_peer(unknown, &good.metadata, &good.descriptors).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    is_out_of_range(sender.ship(connection, &units([(3, 10)])), "remote");
    sender.update(connection, &receiver).unwrap();
    let copies = units([(3, 10), (4, 3)]);
    sender.ship(connection, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
    // A buffer never becomes shorter.
    refused(sender.engine.update_peer(connection, &good.metadata, &before.descriptors));
    // Our own: pieces follow each other, inside the memory.
    for piece in [0..UNIT_BYTES, LEN_BYTES..LEN_BYTES + 1, LEN_BYTES..LEN_BYTES] {
        let error = sender.engine.extend(piece).unwrap_err();
        assert!(matches!(error, TransferError::Memory { .. }), "{error}");
    }
    let memory = std::sync::Arc::clone(&sender.memory);
    let error = sender.engine.register(memory, UNIT_BYTES, LEN_BYTES).unwrap_err();
    assert!(matches!(error, TransferError::Memory { .. }), "{error}");
    sender.ship(connection, &copies).unwrap();
    expected.check(&receiver);
}

fn grown_while_connecting(kind: EngineKind) {
    // Broken in production: a decode worker that grows during a handshake is written to within its first length only.
    let mut receiver = Receiver::start_lazy(&HIDDEN, kind, LEN_BYTES, 10 * UNIT_BYTES, UNIT_BYTES);
    let mut sender = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    receiver.load_peer(&sender.engine.export().unwrap());
    let before = receiver.export.clone();
    let connection = sender.engine.load_peer(&before.agent_name, &before.metadata).unwrap();
    receiver.grow(LEN_BYTES);
    let error = sender.update(connection, &receiver).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "before step two: {error}");
    receiver.stop();
    sender.engine.connect(connection, &before.descriptors).unwrap();
    sender.update(connection, &receiver).unwrap();
    receiver.go_on();
    let ended = sender.poll_until(|ended| !ended.connections.is_empty());
    assert!(ended.connections[0].result.is_ok(), "{ended:?}");
    let mut expected = Expected::fill(&receiver);
    let copies = units([(0, 9), (2, 10), (3, 63)]);
    sender.ship(connection, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

/// A receiver that has been introduced, was stopped, and is being connected.
fn connecting_to_stopped(sender: &mut Sender, kind: EngineKind) -> (Receiver, ConnectionId) {
    let mut receiver = start_receiver(kind, LEN_BYTES);
    receiver.load_peer(&sender.engine.export().unwrap());
    let connection = sender.engine.load_peer(&receiver.export.agent_name, &receiver.export.metadata).unwrap();
    receiver.stop();
    sender.engine.connect(connection, &receiver.export.descriptors).unwrap();
    (receiver, connection)
}

/// Polls until nothing is in flight. What had not been reported before.
fn poll_to_the_end(sender: &mut Sender) -> Ended {
    let started = Instant::now();
    let mut ended = Ended::default();
    while sender.engine.in_flight() > 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "the first write never ends");
        sender.engine.poll(&mut ended);
        std::thread::sleep(Duration::from_micros(100));
    }
    ended
}

fn a_stalled_peer_holds_nobody_up(kind: EngineKind) {
    // Broken in production: one decode worker that hangs in its handshake stops the transfers to all others.
    let (mut sender, first, mut expected, to_first) = pair(kind, LEN_BYTES);
    let (stalled, to_stalled) = connecting_to_stopped(&mut sender, kind);
    assert!(sender.engine.in_flight() > 0);
    if kind == EngineKind::Nixl {
        let again = sender.engine.connect(to_stalled, &stalled.export.descriptors).unwrap_err();
        assert!(again.to_string().contains("already"), "{again}");
        let early = sender.engine.post(TransferId(99), to_stalled, &units([(0, 0)])).unwrap_err();
        assert!(matches!(early, TransferError::NotConnected { .. }), "{early}");
    }
    let copies = units([(2, 3), (9, 1)]);
    let transfer = sender.next_transfer();
    sender.engine.post(transfer, to_first, &copies).unwrap();
    let mut ended = sender.poll_until(|ended| !ended.transfers.is_empty());
    assert_eq!(ended.transfers[0].transfer, transfer);
    expected.apply(&sender.source, &copies);
    expected.check(&first);
    // NIXL needs the peer to answer; mapping its memory does not.
    assert_eq!(ended.connections.is_empty(), kind == EngineKind::Nixl, "{ended:?}");
    stalled.go_on();
    if ended.connections.is_empty() {
        ended = sender.poll_until(|ended| !ended.connections.is_empty());
    }
    assert_eq!(ended.connections[0].connection, to_stalled);
    assert!(ended.connections[0].result.is_ok(), "{ended:?}");
    let mut stalled_expected = Expected::fill(&stalled);
    sender.ship(to_stalled, &copies).unwrap();
    stalled_expected.apply(&sender.source, &copies);
    stalled_expected.check(&stalled);
}

fn a_stalled_peer_is_given_up_and_had_again(kind: EngineKind) {
    // Broken in production: a decode worker that hung for some seconds is refused until its prefill worker restarts.
    let mut sender = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    let (mut receiver, connection) = connecting_to_stopped(&mut sender, kind);
    let ended = sender.poll_until(|ended| !ended.connections.is_empty());
    match &ended.connections[0].result {
        Ok(()) => assert_eq!(kind, EngineKind::Local),
        Err(error) => {
            assert!(matches!(error, TransferError::Peer { operation: "first write", .. }), "{error}");
            assert!(sender.engine.in_flight() > 0, "somebody must go on polling");
        }
    }
    sender.engine.disconnect(connection);
    receiver.go_on();
    let after = poll_to_the_end(&mut sender);
    assert!(after.is_empty(), "it has been reported: {after:?}");
    let again = sender.connect(&mut receiver);
    let mut expected = Expected::fill(&receiver);
    let copies = units([(7, 7)]);
    sender.ship(again, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

fn disconnected_while_connecting(kind: EngineKind) {
    // Broken in production: a handshake that timed out leaves the engine connecting, and the next one is refused.
    let mut sender = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    let (mut receiver, connection) = connecting_to_stopped(&mut sender, kind);
    sender.engine.disconnect(connection);
    let mut ended = Ended::default();
    sender.engine.poll(&mut ended);
    assert_eq!(ended.connections.len(), 1, "{ended:?}");
    assert_eq!(ended.connections[0].result.is_ok(), kind == EngineKind::Local, "{ended:?}");
    receiver.go_on();
    let after = poll_to_the_end(&mut sender);
    assert!(after.is_empty(), "it is reported once: {after:?}");
    let again = sender.connect(&mut receiver);
    let mut expected = Expected::fill(&receiver);
    let copies = units([(1, 60)]);
    sender.ship(again, &copies).unwrap();
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

/// One line of JSON for each length of a chunk: writes by the engine into another process's buffer, and the same copies
/// between two buffers of this process, by turns.
fn gpu_writes_against_copies(kind: EngineKind) {
    const KIB: u64 = 1024;
    let (rounds, shapes) = if support::gpu::is_real() {
        (20, vec![(256 * KIB, 2048), (2048 * KIB, 1024), (8192 * KIB, 512), (32768 * KIB, 128)])
    } else {
        (3, vec![(64 * KIB, 8), (256 * KIB, 4)])
    };
    let mut lines = String::new();
    for (chunk_bytes, chunk_count) in shapes {
        let len_bytes = chunk_bytes * chunk_count;
        let mut receiver = Receiver::start(&HIDDEN, kind, len_bytes, chunk_bytes);
        let mut sender = Sender::start(kind, len_bytes, chunk_bytes);
        let connection = sender.connect(&mut receiver);
        let own = MemoryKind::Gpu.allocate(len_bytes, len_bytes);
        let Memory::Cuda(cuda) = &*own else { panic!("it is on a GPU") };
        let stream = CopyStream::new(cuda.device().clone()).unwrap();
        // Backwards, so that no two chunks are one copy.
        let chunk = |at: u64| copy(at * chunk_bytes, (chunk_count - 1 - at) * chunk_bytes, chunk_bytes);
        let copies: Vec<ByteCopy> = (0..chunk_count).map(chunk).collect();
        let mut pairs = Vec::new();
        for round in 0..rounds + 2 {
            let started = Instant::now();
            let (from, to) = (CopyEnd::Memory(sender.memory.clone()), CopyEnd::Memory(own.clone()));
            let mut batch = CopyBatch::new(stream.clone(), from, to);
            for copy in &copies {
                batch.push(copy.local_offset, copy.remote_offset, copy.len_bytes).unwrap();
            }
            batch.seal().unwrap();
            while !batch.is_done().unwrap() {
                std::hint::spin_loop();
            }
            let copied = started.elapsed();
            let started = Instant::now();
            sender.ship(connection, &copies).unwrap();
            if round >= 2 {
                pairs.push((copied, started.elapsed()));
            }
        }
        let mut ratios: Vec<f64> =
            pairs.iter().map(|(copied, wrote)| copied.as_secs_f64() / wrote.as_secs_f64()).collect();
        ratios.sort_by(f64::total_cmp);
        let mut wrote: Vec<f64> = pairs.iter().map(|(_, wrote)| wrote.as_secs_f64()).collect();
        wrote.sort_by(f64::total_cmp);
        let (ratio, seconds) = (ratios[ratios.len() / 2], wrote[wrote.len() / 2]);
        lines += &format!(
            "{}\n",
            serde_json::json!({
                "chunk_bytes": chunk_bytes, "chunks": chunk_count, "rounds": rounds, "gb_per_s": len_bytes as f64 / seconds / 1e9,
                "of_copy": ratio, "least_of_copy": ratios[0]
            })
        );
    }
    match std::env::var("PD_TEST_REPORT") {
        Ok(path) => std::fs::write(path, lines).unwrap(),
        Err(_) => eprint!("{lines}"),
    }
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
    assert!(support::memory::Mapping::open(&receiver.handle).is_err());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    // NIXL's transports may come and go beside this test.
    let left: Vec<_> = names()
        .into_iter()
        .filter(|name| !before.contains(name) && !name.to_string_lossy().starts_with("ucx"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
