//! Buffers that are too large to be mapped, pinned or unmapped within a slice of work.

use super::*;

/// How many mappings of a peer's memory this process has, and how many of their bytes have their pages mapped.
fn mappings_of(receiver: &Receiver) -> (usize, u64) {
    let support::memory::Handle::Host(handle) = &receiver.handle else { panic!("it is host memory") };
    let inode = handle.inode.to_string();
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = text.lines();
    let (mut count, mut mapped_bytes) = (0, 0);
    // A mapping's first line: addresses, permissions, offset, device, inode, name.
    while lines.any(|line| line.split_whitespace().nth(4) == Some(&inode)) {
        count += 1;
        let kib = lines.find_map(|line| line.strip_prefix("Rss:")?.split_whitespace().next()?.parse::<u64>().ok());
        mapped_bytes += kib.unwrap() * 1024;
    }
    (count, mapped_bytes)
}

pub(super) fn a_large_peer_costs_what_is_written_to_it(kind: EngineKind) {
    // Broken in production: the first request to a decode worker of 40 GiB, or the growth of one, stops the transfers to
    // all others for seconds, or its handshake never ends in time.
    const MIB: u64 = 1024 * 1024;
    const PRESENT: u64 = 64 * MIB;
    let (mut sender, first, mut expected, to_first) = pair(kind, LEN_BYTES);
    let mut large = Receiver::start_lazy(&HIDDEN, kind, 64 * 1024 * MIB, PRESENT, UNIT_BYTES);
    large.load_peer(&sender.engine.export().unwrap());
    let to_large = sender.engine.load_peer(&large.export.agent_name, &large.export.metadata).unwrap();
    let (mappings, before_bytes) = mappings_of(&large);
    let copies = units([(2, 3), (9, 1)]);
    let transfer = sender.next_transfer();
    sender.engine.post(transfer, to_first, &copies).unwrap();
    sender.engine.connect(to_large, &large.export.descriptors).unwrap();
    assert_eq!(mappings_of(&large).1, before_bytes, "connecting has mapped pages");
    let ended = sender.poll_until(|ended| ended.len() == 2);
    assert_eq!((ended.transfers[0].transfer, ended.connections[0].connection), (transfer, to_large));
    assert!(ended.transfers[0].result.is_ok() && ended.connections[0].result.is_ok(), "{ended:?}");
    expected.apply(&sender.source, &copies);
    expected.check(&first);
    large.grow(2 * PRESENT);
    sender.update(to_large, &large).unwrap();
    assert_eq!(mappings_of(&large).1, before_bytes, "growing has mapped pages");
    // The last bytes of both parts, and over where they meet.
    let copies = [
        copy(UNIT_BYTES, PRESENT - 3 * UNIT_BYTES, UNIT_BYTES),
        copy(9, PRESENT - 777, 2 * UNIT_BYTES),
        copy(0, 2 * PRESENT - UNIT_BYTES, UNIT_BYTES),
    ];
    for _ in 0..2 {
        sender.ship(to_large, &copies).unwrap();
        for copy in &copies {
            let mut seen = vec![0; copy.len_bytes as usize];
            large.mapping.read(copy.remote_offset, &mut seen).unwrap();
            let start = copy.local_offset as usize;
            assert!(seen == sender.source[start..start + seen.len()], "{copy:?}");
        }
    }
    let mapped_bytes = mappings_of(&large).1 - before_bytes;
    assert!(mapped_bytes < 4 * MIB, "{mapped_bytes} bytes are mapped for three short copies");
    sender.engine.disconnect(to_large);
    let started = Instant::now();
    while mappings_of(&large).0 > mappings {
        assert!(started.elapsed() < Duration::from_secs(60), "the memory of a peer that is gone stays mapped");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn copies_anywhere_in_a_large_buffer(kind: EngineKind) {
    // Broken in production: a chunk that a GPU copies into host memory fails where one pinned range ends and the next
    // begins, or behind what is pinned so far.
    const MIB: u64 = 1024 * 1024;
    let (mut sender, receiver, mut expected, connection) = pair(kind, 130 * MIB);
    let lists = [
        vec![copy(7, 64 * MIB - 1000, 5000), copy(MIB, 129 * MIB + 3, MIB - 3)],
        vec![copy(3 * MIB, 60 * MIB, 70 * MIB)],
        vec![copy(0, 0, 130 * MIB)],
    ];
    for copies in &lists {
        sender.ship(connection, copies).unwrap();
        expected.apply(&sender.source, copies);
    }
    expected.check(&receiver);
}
