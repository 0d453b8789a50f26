//! Peers that do not answer while they are connected to.

use super::*;

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
pub(super) fn poll_to_the_end(sender: &mut Sender) -> Ended {
    let started = Instant::now();
    let mut ended = Ended::default();
    while sender.engine.in_flight() > 0 {
        assert!(started.elapsed() < Duration::from_secs(240), "the first write never ends");
        sender.engine.poll(&mut ended);
        std::thread::sleep(Duration::from_micros(100));
    }
    ended
}

pub(super) fn a_stalled_peer_holds_nobody_up(kind: EngineKind) {
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

pub(super) fn a_stalled_peer_is_given_up_and_had_again(kind: EngineKind) {
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

pub(super) fn disconnected_while_connecting(kind: EngineKind) {
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
