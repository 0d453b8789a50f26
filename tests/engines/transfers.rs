//! What arrives, and what is refused before it is posted.

use super::*;

fn ship_and_check(kind: EngineKind, lists: &[Vec<ByteCopy>]) {
    let (mut sender, receiver, mut expected, connection) = pair(kind, LEN_BYTES);
    for copies in lists {
        sender.ship(connection, copies).unwrap();
        expected.apply(&sender.source, copies);
        expected.check(&receiver);
    }
}

pub(super) fn one_chunk(kind: EngineKind) {
    // Broken in production: the simplest request does not arrive, or lands elsewhere.
    ship_and_check(kind, &[units([(3, 5)]), units([(UNIT_COUNT - 1, 0)])]);
}

pub(super) fn many_scattered_chunks(kind: EngineKind) {
    // Broken in production: chunks of one prompt are swapped in the receiver's slots.
    let scattered = |step: u64| units((0..UNIT_COUNT).map(|unit| (unit * step % UNIT_COUNT, unit)));
    ship_and_check(kind, &[scattered(29), scattered(63), units((0..UNIT_COUNT / 2).map(|unit| (unit, unit * 2)))]);
}

pub(super) fn neighbours_in_any_order(kind: EngineKind) {
    // Broken in production: joining neighbouring chunks moves bytes that were not asked for.
    let mut neighbours = units((0..20).map(|unit| (unit + 7, unit + 30)));
    neighbours.reverse();
    neighbours.swap(3, 11);
    let all = units((0..UNIT_COUNT).map(|unit| (unit, unit)));
    ship_and_check(kind, &[neighbours, all]);
}

pub(super) fn parts_of_chunks(kind: EngineKind) {
    // Broken in production: pushing layer by layer, or a short last chunk, overwrites its neighbours.
    let odd: Vec<ByteCopy> = (0..50).map(|i| copy(i * 977 + 1, i * 1999 + 3, 1 + i * 13)).collect();
    let mixed =
        [units([(1, 60)]), vec![copy(7, UNIT_BYTES * 3 + 1, UNIT_BYTES)], vec![copy(LEN_BYTES - 1, LEN_BYTES - 1, 1)]];
    ship_and_check(kind, &[odd, mixed.concat(), vec![copy(0, 0, LEN_BYTES)], vec![copy(5, 9, 0)], Vec::new()]);
}

pub(super) fn two_transfers_in_flight(kind: EngineKind) {
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

pub(super) fn two_peers_at_once(kind: EngineKind) {
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

pub(super) fn refused_posts_write_nothing(kind: EngineKind) {
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
