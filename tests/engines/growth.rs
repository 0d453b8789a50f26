//! Buffers that grow while peers are connected.

use super::*;

pub(super) fn the_receiver_grows(kind: EngineKind) {
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

pub(super) fn the_sender_grows(kind: EngineKind) {
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

pub(super) fn grown_with_writes_in_flight(kind: EngineKind) {
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

pub(super) fn bad_growth_is_refused(kind: EngineKind) {
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

pub(super) fn grown_while_connecting(kind: EngineKind) {
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
