//! Peers that are met, lost and met again.

use super::*;

pub(super) fn garbage_is_refused(kind: EngineKind) {
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

pub(super) fn killed_before_a_post(kind: EngineKind) {
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

pub(super) fn killed_during_writes(kind: EngineKind) {
    // Broken in production: a decode worker that crashes in the middle of a request takes its prefill worker along.
    const LARGE: u64 = 128 * 1024 * 1024;
    let (mut sender, mut receiver, _, connection) = pair(kind, LARGE);
    let agent_name = receiver.export.agent_name.clone();
    // When two writes have ended, in the middle of the third.
    let (wrote, written) = std::sync::mpsc::channel();
    let killer = std::thread::spawn(move || {
        written.iter().take(2).for_each(drop);
        receiver.kill();
        receiver
    });
    let started = Instant::now();
    let error = loop {
        assert!(started.elapsed() < Duration::from_secs(240), "writes to a dead peer go on succeeding");
        if let Err(error) = sender.ship(connection, &[copy(0, 0, LARGE)]) {
            break error;
        }
        // The killer stops listening once it has heard enough.
        let _ = wrote.send(());
    };
    assert!(matches!(&error, TransferError::Peer { agent, .. } if *agent == agent_name), "{error}");
    drop(wrote);
    killer.join().unwrap();
    sender.engine.disconnect(connection);
}

pub(super) fn restarted_under_a_new_name(kind: EngineKind) {
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

pub(super) fn disconnected_and_connected_again(kind: EngineKind) {
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

pub(super) fn lost_and_met_again_leaves_nothing_open(kind: EngineKind) {
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
pub(super) fn break_connections() -> usize {
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

pub(super) fn a_kept_connection_that_has_broken_is_made_anew(kind: EngineKind) {
    // Broken in production: after the network between two hosts was gone for a while, their connection is used again for
    // ever, and every handshake fails on it.
    let (mut sender, mut receiver, mut expected, connection) = pair(kind, LEN_BYTES);
    sender.ship(connection, &units([(0, 1)])).unwrap();
    expected.apply(&sender.source, &units([(0, 1)]));
    sender.engine.disconnect(connection);
    let broken = break_connections();
    assert_eq!(broken > 0, kind == EngineKind::Nixl, "{broken}");
    let copies = units([(4, 4), (9, 1)]);
    // The first handshake finds out, or what is written after it, where UCX is slow to see that its connection is gone.
    let mut failures = Vec::new();
    loop {
        receiver.load_peer(&sender.engine.export().unwrap());
        let theirs = &receiver.export;
        let met = sender.engine.load_peer(&theirs.agent_name, &theirs.metadata).unwrap();
        let descriptors = theirs.descriptors.clone();
        match sender.finish_connecting(met, &descriptors).and_then(|()| sender.ship(met, &copies)) {
            Ok(()) => break,
            Err(error) => failures.push(error.to_string()),
        }
        sender.engine.disconnect(met);
        assert!(failures.len() < 2, "{failures:?}");
    }
    expected.apply(&sender.source, &copies);
    expected.check(&receiver);
}

pub(super) fn no_more_files_is_said_with_the_limit(kind: EngineKind) {
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

pub(super) fn an_agent_that_says_something_else_is_met_anew(kind: EngineKind) {
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

pub(super) fn disconnected_in_flight(kind: EngineKind) {
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
