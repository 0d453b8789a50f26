//! The wire under arbitrary messages and arbitrary bytes: what comes back, and what it may cost.

#![allow(clippy::unwrap_used)]

use pd_backend::ids::{Checksum, ChunkKey, Failure, FailureKind, GrantId, GroupIndex, RequestId, Seq, SourceAddress};
use pd_backend::wire::limits::{KEYS_MAX, VALUES_MAX};
use pd_backend::wire::message::*;
use pd_backend::wire::{decode, encode, type_name};
use proptest::prelude::*;

fn key(text: &str) -> ChunkKey {
    ChunkKey::new(text).unwrap()
}

fn req(text: &str) -> RequestId {
    RequestId::new(text).unwrap()
}

fn text() -> impl Strategy<Value = String> {
    "[a-z0-9é/@.]{0,40}"
}

fn keys() -> impl Strategy<Value = Vec<ChunkKey>> {
    proptest::collection::vec("[a-z0-9@]{1,80}".prop_map(|text| key(&text)), 0..20)
}

fn request_id() -> impl Strategy<Value = RequestId> {
    "[ -~]{1,64}".prop_map(|text| req(&text))
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..400)
}

fn failure() -> impl Strategy<Value = Failure> {
    (prop_oneof![Just(FailureKind::NoSlots), Just(FailureKind::PeerLost), Just(FailureKind::Other)], text())
        .prop_map(|(kind, text)| Failure::new(kind, text))
}

fn processes() -> impl Strategy<Value = ProcessIdentity> {
    (text(), any::<u64>(), any::<u32>(), any::<u64>()).prop_map(|(boot_id, pid_namespace, pid, start_ticks)| {
        ProcessIdentity { boot_id, pid_namespace, pid, start_ticks }
    })
}

fn some_processes() -> impl Strategy<Value = Vec<ProcessIdentity>> {
    proptest::collection::vec(processes(), 0..4)
}

fn hellos() -> impl Strategy<Value = Hello> {
    let layout = proptest::collection::vec((text(), text()), 0..12);
    let process = proptest::option::of(processes());
    let rendezvous =
        proptest::option::of(("[ -~]{1,64}", any::<u16>()).prop_map(|(host, port)| SourceAddress { host, port }));
    let versions = (any::<u16>(), any::<u16>());
    (versions, text(), text(), layout, proptest::collection::vec(text(), 0..4), process, rendezvous).prop_map(
        |((version_min, version_max), instance, engine, layout, capabilities, process, rendezvous)| Hello {
            version_min,
            version_max,
            instance,
            engine,
            layout,
            capabilities,
            process,
            rendezvous,
        },
    )
}

fn handshakes() -> impl Strategy<Value = Message> {
    let seq = || any::<u64>().prop_map(Seq);
    let maybe_failure = || proptest::option::of(failure());
    let connected = proptest::collection::vec(text(), 0..3);
    let init = (seq(), hellos(), text(), connected).prop_map(|(seq, hello, agent_name, connected)| InitExtension {
        seq,
        hello,
        agent_name,
        connected,
    });
    let init_reply = (seq(), hellos(), text(), maybe_failure())
        .prop_map(|(seq, hello, agent_name, refusal)| InitReplyExtension { seq, hello, agent_name, refusal });
    let register = (seq(), text()).prop_map(|(seq, instance)| MemRegExtension { seq, instance });
    let registered =
        (seq(), bytes(), any::<u64>(), maybe_failure()).prop_map(|(seq, descriptors, len_bytes, refusal)| {
            MemRegReplyExtension { seq, descriptors, len_bytes, refusal }
        });
    prop_oneof![
        (bytes(), proptest::option::of(init))
            .prop_map(|(local_meta_bytes, pd)| { Message::NixlInitRequest(InitRequest { local_meta_bytes, pd }) }),
        (bytes(), bytes(), proptest::option::of(init_reply)).prop_map(|(remote_agent_name, remote_meta_bytes, pd)| {
            Message::NixlInitResponse(InitResponse { remote_agent_name, remote_meta_bytes, pd })
        }),
        (bytes(), text(), bytes(), proptest::option::of(register)).prop_map(
            |(remote_agent_name, local_id, local_xfer_dlist_bytes, pd)| {
                Message::NixlMemRegRequest(MemRegRequest { remote_agent_name, local_id, local_xfer_dlist_bytes, pd })
            }
        ),
        (bytes(), proptest::option::of(registered)).prop_map(|(remote_xfer_dlist_bytes, pd)| {
            Message::NixlMemRegResponse(MemRegResponse { remote_xfer_dlist_bytes, pd })
        }),
    ]
}

fn requests() -> impl Strategy<Value = Message> {
    let seq = || any::<u64>().prop_map(Seq);
    let grant = || any::<u64>().prop_map(GrantId);
    let groups = proptest::collection::vec(any::<u8>().prop_map(GroupIndex), 0..5);
    let alloc_pd = (seq(), text(), any::<u64>(), groups, any::<u64>(), text(), any::<bool>()).prop_map(
        |(seq, instance, wait_ms, groups, known_len_bytes, receiver, ahead)| AllocExtension {
            seq,
            instance,
            wait_ms,
            groups,
            known_len_bytes,
            receiver,
            ahead,
        },
    );
    let batch = (
        proptest::option::of(request_id()),
        proptest::option::of(any::<bool>()),
        proptest::option::of(any::<u32>()),
        proptest::option::of(alloc_pd),
    );
    let shape = proptest::collection::vec(any::<u64>(), 0..6);
    let offsets = proptest::collection::vec(any::<u64>(), 0..5);
    let memory = (any::<u64>(), bytes(), bytes()).prop_map(|(len_bytes, metadata, descriptors)| MemoryUpdate {
        len_bytes,
        metadata,
        descriptors,
    });
    let reply_pd = (
        seq(),
        proptest::option::of(grant()),
        offsets,
        any::<u64>(),
        proptest::option::of(memory),
        proptest::option::of(failure()),
    )
        .prop_map(|(seq, grant, offsets, write_within_ms, memory, refusal)| AllocReplyExtension {
            seq,
            grant,
            offsets,
            write_within_ms,
            memory,
            refusal,
        });
    let cancel_pd = (seq(), text(), proptest::option::of(grant()), proptest::option::of(any::<u64>()), any::<bool>())
        .prop_map(|(seq, instance, grant, alloc_seq, writer_stopped)| CancelExtension {
            seq,
            instance,
            grant,
            alloc_seq: alloc_seq.map(Seq),
            writer_stopped,
        });
    let indexes = || proptest::collection::vec(any::<u32>(), 0..40);
    prop_oneof![
        (keys(), any::<i64>(), shape, text(), any::<u64>(), batch).prop_map(
            |(keys, fmt, shape, dtype, last_chunk_toks, (req_id, is_last_batch, total_chunks, pd))| {
                Message::AllocRequest(AllocRequest {
                    keys,
                    fmt,
                    shape,
                    dtype,
                    last_chunk_toks,
                    req_id,
                    is_last_batch,
                    total_chunks,
                    pd,
                })
            }
        ),
        (indexes(), proptest::collection::vec(any::<i64>(), 0..40), proptest::option::of(reply_pd)).prop_map(
            |(already_sent_indexes, remote_indexes, pd)| {
                Message::AllocResponse(AllocResponse { already_sent_indexes, remote_indexes, pd })
            }
        ),
        (request_id(), keys(), proptest::option::of(cancel_pd))
            .prop_map(|(req_id, keys, pd)| Message::CancelNotif(CancelNotif { req_id, keys, pd })),
        keys().prop_map(|keys| Message::CacheQueryRequest(CacheQueryRequest { keys })),
        (keys(), indexes()).prop_map(|(cached_keys, cached_indexes)| {
            Message::CacheQueryResponse(CacheQueryResponse { cached_keys, cached_indexes })
        }),
        (request_id(), proptest::option::of(failure())).prop_map(|(req_id, failure)| {
            let pd = failure.map(|failure| NotifExtension { failure });
            Message::ProxyNotif(ProxyNotif { req_id, pd })
        }),
        (seq(), text(), request_id(), grant(), proptest::collection::vec(proptest::option::of(any::<u64>()), 0..5))
            .prop_map(|(seq, instance, req_id, grant, sums)| {
                let checksums = sums.into_iter().map(|sum| sum.map(Checksum)).collect();
                Message::PdCommit(Commit { seq, instance, req_id, grant, checksums })
            }),
        (seq(), request_id(), proptest::option::of(failure()))
            .prop_map(|(seq, req_id, refusal)| Message::PdCommitAck(CommitAck { seq, req_id, refusal })),
        (seq(), request_id()).prop_map(|(seq, req_id)| Message::PdVerifying(Verifying { seq, req_id })),
        (request_id(), grant(), failure(), proptest::option::of(seq())).prop_map(
            |(req_id, grant, reason, alloc_seq)| { Message::PdRevoke(Revoke { req_id, grant, reason, alloc_seq }) }
        ),
        (seq(), text(), some_processes(), text()).prop_map(|(seq, instance, ended, receiver)| Message::PdPing(Ping {
            seq,
            instance,
            receiver,
            ended
        })),
        (seq(), proptest::option::of(failure()), some_processes())
            .prop_map(|(seq, refusal, have_ended)| Message::PdPong(Pong { seq, refusal, have_ended })),
    ]
}

fn messages() -> impl Strategy<Value = Message> {
    prop_oneof![handshakes(), requests()]
}

/// Bytes that this thread has allocated and not freed, and the most of it since it was last asked.
#[allow(unsafe_code)]
mod counting {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        static NOW: Cell<isize> = const { Cell::new(0) };
        static PEAK: Cell<isize> = const { Cell::new(0) };
    }

    struct Counting;

    fn add(len_bytes: isize) {
        NOW.set(NOW.get() + len_bytes);
        PEAK.set(PEAK.get().max(NOW.get()));
    }

    // SAFETY: everything is passed on to the system's allocator; counting allocates nothing.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            add(layout.size() as isize);
            // SAFETY: the caller keeps `alloc`'s contract.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            add(-(layout.size() as isize));
            // SAFETY: the caller keeps `dealloc`'s contract, and `pointer` came from the same allocator.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    #[global_allocator]
    static COUNTING: Counting = Counting;

    /// What `work` holds at its most, in bytes.
    pub fn peak_bytes<T>(work: impl FnOnce() -> T) -> usize {
        let before = NOW.get();
        PEAK.set(before);
        drop(work());
        usize::try_from(PEAK.get() - before).expect("a peak is not below where it started")
    }
}

/// What decoding may hold for a payload: a value takes a byte at least on the wire, and 32 bytes in the buffer in which
/// serde looks for `type`, or 40 as an allocated key; a growing vector may hold the old and the new at a time.
fn allowed_bytes(payload_len_bytes: usize) -> usize {
    4096 + 128 * payload_len_bytes.min(VALUES_MAX) + 2 * payload_len_bytes
}

#[track_caller]
fn assert_bounded(payload: &[u8]) {
    let peak_bytes = counting::peak_bytes(|| decode::<Message>(payload));
    assert!(
        peak_bytes <= allowed_bytes(payload.len()),
        "{} bytes made us allocate {peak_bytes}: {}",
        payload.len(),
        payload[..payload.len().min(64)].escape_ascii()
    );
}

#[test]
fn what_costs_most_is_bounded() {
    // Broken in production: a stranger's message of some megabytes takes gigabytes.
    let with_keys = |keys: Vec<u8>| [b"\x82\xa4type\xb1CacheQueryRequest\xa4keys".to_vec(), keys].concat();
    let full = |entry: &[u8]| [vec![0xdc, 0x40, 0x00], entry.repeat(KEYS_MAX)].concat();
    assert_bounded(&with_keys(full(b"\x01")));
    assert_bounded(&with_keys(full(b"\xa1k")));
    assert_bounded(&with_keys(full(b"\x90")));
    assert_bounded(&with_keys(full(b"\x80")));
    assert_bounded(&with_keys(full(b"\x81\x01\x02")));
    assert_bounded(&with_keys(full(&[&b"\x9e"[..], &[1; 14]].concat())));
    assert_bounded(&with_keys([vec![0xc6, 0x01, 0, 0, 0], vec![7; 1 << 24]].concat()));
    assert_bounded(&with_keys([vec![0xdb, 0x01, 0, 0, 0], vec![b'k'; 1 << 24]].concat()));
    for lie in [&b"\xdd\xff\xff\xff\xff"[..], b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
    {
        assert_bounded(&with_keys(lie.to_vec()));
        assert_bounded(lie);
    }
}

proptest! {
    #[test]
    fn every_message_comes_back_as_it_was_sent(message in messages()) {
        // Broken in production: a value that the tests above do not have is changed on the way.
        let payload = encode(&message);
        prop_assert_eq!(type_name(&payload), Some(message.type_name()));
        prop_assert_eq!(decode::<Message>(&payload).unwrap(), message);
    }

    #[test]
    fn bytes_that_are_no_message_are_refused_cheaply(payload in proptest::collection::vec(any::<u8>(), 0..600)) {
        // Broken in production: whoever reaches a port ends the process, by a panic or by its memory.
        assert_bounded(&payload);
    }

    #[test]
    fn damaged_messages_are_refused_or_understood_cheaply(
        message in messages(),
        cut in any::<prop::sample::Index>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        // Broken in production: whoever reaches a port ends the process, by a panic or by its memory.
        let mut payload = encode(&message);
        prop_assert!(decode::<Message>(&payload[..cut.index(payload.len())]).is_err(), "a cut message is no message");
        assert_bounded(&payload[..cut.index(payload.len())]);
        for (at, byte) in changes {
            let at = at.index(payload.len());
            payload[at] = byte;
        }
        assert_bounded(&payload);
    }
}
