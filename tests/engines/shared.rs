//! Several connections that name one agent: what a node has whose peer is both written to and a writer.

use super::support::sender::random_bytes;
use super::*;

/// One more connection to the receiver's agent, not connected yet.
fn load_again(sender: &mut Sender, receiver: &Receiver) -> ConnectionId {
    sender.engine.load_peer(&receiver.export.agent_name, &receiver.export.metadata).unwrap()
}

pub(super) fn two_nodes_write_both_ways_at_once(kind: EngineKind) {
    // Broken in production: of two nodes that are prefill and decode for each other, only the one that was connected last
    // can write, or a chunk is damaged where both write.
    const HALF: u64 = UNIT_COUNT / 2;
    let mut theirs = start_receiver(kind, LEN_BYTES);
    let mut ours = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    let export = ours.engine.export().unwrap();
    // The incoming half of either: it only gets to know the peer.
    theirs.load_peer(&export);
    let incoming = load_again(&mut ours, &theirs);
    theirs.start_connecting(&export);
    let outgoing = load_again(&mut ours, &theirs);
    let descriptors = theirs.export.descriptors.clone();
    ours.finish_connecting(outgoing, &descriptors).unwrap();
    theirs.finish();
    // The peer's handshake may come again at any time.
    theirs.load_peer(&export);
    let mut theirs_expected = Expected::fill(&theirs);
    let their_source = random_bytes(theirs.mapping.len_bytes(), 2);
    let mut ours_expected = Expected::new(&ours.source);
    for round in 0..9 {
        // Out of the first half of either buffer, into the second half of the other.
        let there = units((0..HALF).map(|unit| (unit, HALF + (unit * 5 + round) % HALF)));
        let back = units((0..HALF).map(|unit| ((unit + round) % HALF, HALF + unit * 7 % HALF)));
        theirs.start_writing(&back);
        ours.ship(outgoing, &there).unwrap();
        theirs.finish();
        theirs_expected.apply(&ours.source, &there);
        ours_expected.apply(&their_source, &back);
        theirs_expected.check(&theirs);
        ours_expected.check_own(&ours.memory);
        if round == 5 {
            ours.engine.disconnect(incoming);
        }
    }
}

pub(super) fn loaded_twice_and_either_forgotten(kind: EngineKind) {
    // Broken in production: a node that forgets a peer as a writer can no longer write to it, or a write that is under way
    // fails or is torn.
    const LARGE: u64 = 64 * 1024 * 1024;
    let (mut sender, receiver, mut expected, first) = pair(kind, LARGE);
    let half = LARGE / 2;
    let long = |local| vec![copy(local, half, half)];
    let scattered = units((0..100).map(|unit| (unit * 2 + 1, unit * 3)));
    let posted = [sender.next_transfer(), sender.next_transfer()];
    sender.engine.post(posted[0], first, &long(7)).unwrap();
    let second = load_again(&mut sender, &receiver);
    assert_ne!(first, second);
    sender.engine.post(posted[1], first, &scattered).unwrap();
    sender.engine.disconnect(second);
    for completion in sender.completions(2) {
        completion.result.unwrap();
    }
    expected.apply(&sender.source, &long(7));
    expected.apply(&sender.source, &scattered);
    expected.check(&receiver);
    // And the other way round.
    let second = load_again(&mut sender, &receiver);
    let error = sender.ship(second, &scattered).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    sender.finish_connecting(second, &receiver.export.descriptors).unwrap();
    let transfer = sender.next_transfer();
    sender.engine.post(transfer, second, &long(0)).unwrap();
    sender.engine.disconnect(first);
    sender.completions(1).remove(0).result.unwrap();
    let error = sender.ship(first, &scattered).unwrap_err();
    assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    sender.ship(second, &scattered).unwrap();
    expected.apply(&sender.source, &long(0));
    expected.apply(&sender.source, &scattered);
    expected.check(&receiver);
}

pub(super) fn forgotten_and_loaded_again_while_another_stays(kind: EngineKind) {
    // Broken in production: a node whose outgoing half reconnects to a peer loses that peer as a writer.
    let mut receiver = start_receiver(kind, LEN_BYTES);
    let mut sender = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    let staying = load_again(&mut sender, &receiver);
    let mut expected = Expected::fill(&receiver);
    let mut ship = |sender: &mut Sender, receiver: &Receiver, connection, unit| {
        let copies = units([(unit, unit + 1), (unit + 9, unit + 20)]);
        sender.ship(connection, &copies).unwrap();
        expected.apply(&sender.source, &copies);
        expected.check(receiver);
    };
    for round in 0..3 {
        let posting = sender.connect(&mut receiver);
        ship(&mut sender, &receiver, posting, round);
        sender.engine.disconnect(posting);
        let error = sender.ship(posting, &units([(0, 0)])).unwrap_err();
        assert!(matches!(error, TransferError::NotConnected { .. }), "{error}");
    }
    sender.finish_connecting(staying, &receiver.export.descriptors).unwrap();
    ship(&mut sender, &receiver, staying, 30);
}

pub(super) fn a_way_that_has_broken_is_made_anew_for_all(kind: EngineKind) {
    // Broken in production: a node that was written to by a peer before the network failed never reaches that peer again,
    // since what had connected them before is kept for the other half.
    let (mut sender, mut receiver, mut expected, posting) = pair(kind, LEN_BYTES);
    let staying = load_again(&mut sender, &receiver);
    sender.finish_connecting(staying, &receiver.export.descriptors).unwrap();
    let mut ship = |sender: &mut Sender, receiver: &Receiver, connection, unit| {
        let copies = units([(unit, unit + 1), (unit + 9, unit + 20)]);
        sender.ship(connection, &copies).unwrap();
        expected.apply(&sender.source, &copies);
        expected.check(receiver);
    };
    ship(&mut sender, &receiver, posting, 0);
    ship(&mut sender, &receiver, staying, 1);
    let broken = break_connections();
    assert_eq!(broken > 0, kind == EngineKind::Nixl, "{broken}");
    // Over a transport that needs no socket for it this may succeed.
    let found_out = sender.ship(posting, &units([(0, 1), (9, 20)]));
    assert!(matches!(found_out, Ok(()) | Err(TransferError::Peer { .. })), "{found_out:?}");
    sender.engine.disconnect(posting);
    let mut failures = Vec::new();
    let again = loop {
        receiver.load_peer(&sender.engine.export().unwrap());
        let again = load_again(&mut sender, &receiver);
        match sender.finish_connecting(again, &receiver.export.descriptors) {
            Ok(()) => break again,
            Err(error) => failures.push(error.to_string()),
        }
        sender.engine.disconnect(again);
        assert!(failures.len() < 2, "{failures:?}");
    };
    ship(&mut sender, &receiver, again, 2);
    ship(&mut sender, &receiver, staying, 3);
    sender.engine.disconnect(again);
    ship(&mut sender, &receiver, staying, 4);
}

pub(super) fn a_way_made_anew_leaves_the_other_direction_alone(kind: EngineKind) {
    // Broken in production: a node that connects anew to a peer ends what that peer is writing to it.
    const LARGE: u64 = 64 * 1024 * 1024;
    const HALF: u64 = LARGE / 2;
    let mut theirs = Receiver::start_lazy(&HIDDEN, kind, LARGE, HALF, UNIT_BYTES);
    let mut ours = Sender::start(kind, LARGE, UNIT_BYTES);
    let short = theirs.export.clone();
    let outgoing = ours.connect(&mut theirs);
    theirs.start_connecting(&ours.engine.export().unwrap());
    theirs.finish();
    ours.engine.disconnect(outgoing);
    theirs.grow(LARGE);
    let grown = load_again(&mut ours, &theirs);
    ours.engine.disconnect(grown);
    let mut theirs_expected = Expected::fill(&theirs);
    let their_source = random_bytes(LARGE, 2);
    let mut ours_expected = Expected::new(&ours.source);
    for round in 0..3 {
        // Out of what we do not write to.
        let back = [copy(HALF + round, HALF, HALF - 3)];
        theirs.start_writing(&back);
        if round == 1 {
            // Less than before, and no connection: NIXL forgets the agent and loads it.
            let again = ours.engine.load_peer(&short.agent_name, &short.metadata).unwrap();
            ours.finish_connecting(again, &short.descriptors).unwrap();
            let copies = units([(3, 5), (9, 8)]);
            ours.ship(again, &copies).unwrap();
            theirs_expected.apply(&ours.source, &copies);
        }
        theirs.finish();
        ours_expected.apply(&their_source, &back);
        ours_expected.check_own(&ours.memory);
    }
    theirs_expected.check(&theirs);
}

pub(super) fn loaded_again_while_a_first_write_waits(kind: EngineKind) {
    // Broken in production: a peer that hangs while one half of a node connects to it is refused by the other half, or
    // NIXL forgets it under a write and ends the process.
    let mut receiver = start_receiver(kind, LEN_BYTES);
    let mut sender = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    receiver.load_peer(&sender.engine.export().unwrap());
    let connecting = load_again(&mut sender, &receiver);
    receiver.stop();
    sender.engine.connect(connecting, &receiver.export.descriptors).unwrap();
    let staying = load_again(&mut sender, &receiver);
    if kind == EngineKind::Nixl {
        // The same memory under another key: NIXL would have to forget the agent first.
        let mut changed = receiver.export.metadata.clone();
        let at = changed.len() - 2;
        changed[at] ^= 1;
        let error = sender.engine.load_peer(&receiver.export.agent_name, &changed).unwrap_err();
        assert!(error.to_string().contains("have not ended"), "{error}");
    }
    sender.engine.disconnect(connecting);
    // What one half has left still writes: a handshake would say that nothing does.
    let early = sender.engine.load_peer(&receiver.export.agent_name, &receiver.export.metadata);
    match (kind, early) {
        (EngineKind::Nixl, Err(error)) => assert!(error.to_string().contains("have not ended"), "{error}"),
        (EngineKind::Local, Ok(connection)) => sender.engine.disconnect(connection),
        (_, other) => panic!("{other:?}"),
    }
    receiver.go_on();
    let ended = poll_to_the_end(&mut sender);
    assert_eq!(ended.connections.len(), 1, "{ended:?}");
    let again = sender.connect(&mut receiver);
    sender.finish_connecting(staying, &receiver.export.descriptors).unwrap();
    let mut expected = Expected::fill(&receiver);
    for (connection, unit) in [(again, 3), (staying, 8)] {
        let copies = units([(unit, unit + 2)]);
        sender.ship(connection, &copies).unwrap();
        expected.apply(&sender.source, &copies);
        expected.check(&receiver);
    }
}

pub(super) fn one_connection_hears_of_growth_before_another(kind: EngineKind) {
    // Broken in production: two handshakes around a peer's growth, in either order, end the requests between two nodes.
    let (mut sender, mut receiver, mut expected, posting) = lazy_pair(kind, 10);
    let mut ship = |sender: &mut Sender, receiver: &Receiver, connection, pairs: &[(u64, u64)]| {
        let copies = units(pairs.iter().copied());
        sender.ship(connection, &copies).unwrap();
        expected.apply(&sender.source, &copies);
        expected.check(receiver);
    };
    let short = receiver.export.clone();
    receiver.grow(20 * UNIT_BYTES);
    let transfer = sender.next_transfer();
    sender.engine.post(transfer, posting, &units([(0, 5), (7, 2)])).unwrap();
    let other = load_again(&mut sender, &receiver);
    sender.completions(1).remove(0).result.unwrap();
    ship(&mut sender, &receiver, posting, &[(0, 5), (7, 2), (3, 9)]);
    is_out_of_range(sender.ship(posting, &units([(3, 10)])), "remote");
    sender.finish_connecting(other, &receiver.export.descriptors).unwrap();
    ship(&mut sender, &receiver, other, &[(3, 10), (60, 19)]);
    sender.update(posting, &receiver).unwrap();
    ship(&mut sender, &receiver, posting, &[(4, 11), (61, 18)]);
    // What the peer had said before it grew arrives late.
    let late = sender.engine.load_peer(&short.agent_name, &short.metadata).unwrap();
    ship(&mut sender, &receiver, posting, &[(5, 12), (62, 17)]);
    sender.finish_connecting(late, &short.descriptors).unwrap();
    ship(&mut sender, &receiver, late, &[(6, 1)]);
    sender.engine.disconnect(late);
    // It grows twice, and the first news comes after the second.
    receiver.grow(30 * UNIT_BYTES);
    let first = receiver.export.clone();
    receiver.grow(LEN_BYTES);
    let last = load_again(&mut sender, &receiver);
    sender.engine.update_peer(posting, &first.metadata, &first.descriptors).unwrap();
    ship(&mut sender, &receiver, posting, &[(7, 29), (9, 3)]);
    is_out_of_range(sender.ship(posting, &units([(3, 30)])), "remote");
    sender.update(other, &receiver).unwrap();
    sender.engine.disconnect(last);
    sender.engine.disconnect(posting);
    ship(&mut sender, &receiver, other, &[(7, 63), (9, 30), (8, 0)]);
}
