//! The wire: LMCache's recorded payloads, golden bytes of our own messages, and refusals.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use pd_backend::ids::{Checksum, ChunkKey, Failure, FailureKind, GrantId, GroupIndex, RequestId, Seq};
use pd_backend::wire::limits::{DEPTH_MAX, FIELDS_MAX, KEYS_MAX, MESSAGE_LEN_BYTES_MAX, VALUES_MAX};
use pd_backend::wire::message::*;
use pd_backend::wire::{DecodeError, decode, encode, type_name, unsigned_field};

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/lmcache-wire"))
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(name)).unwrap()
}

fn key(text: &str) -> ChunkKey {
    ChunkKey::new(text).unwrap()
}

fn req(text: &str) -> RequestId {
    RequestId::new(text).unwrap()
}

/// A key as the recording's model and hash make it.
fn llama(hash: &str) -> ChunkKey {
    key(&format!("meta-llama/Meta-Llama-3-8B@1@0@{hash}@bfloat16"))
}

fn alloc(keys: Vec<ChunkKey>, batch: Option<(&str, bool, u32)>) -> Message {
    Message::AllocRequest(AllocRequest {
        keys,
        fmt: 1,
        shape: vec![2, 2, 256, 1024],
        dtype: "bfloat16".into(),
        last_chunk_toks: 256,
        req_id: batch.map(|(req_id, ..)| req(req_id)),
        is_last_batch: batch.map(|(_, last, _)| last),
        total_chunks: batch.map(|(.., total)| total),
        pd: None,
    })
}

fn granted(already_sent_indexes: &[u32], remote_indexes: &[i64]) -> Message {
    Message::AllocResponse(AllocResponse {
        already_sent_indexes: already_sent_indexes.to_vec(),
        remote_indexes: remote_indexes.to_vec(),
        pd: None,
    })
}

/// What the recorded payloads say, but for the handshake's, whose content is NIXL's.
fn recorded() -> BTreeMap<&'static str, Message> {
    let two = || vec![llama("1234567890abcdef"), llama("1234567890abcdf0")];
    let three = || [two(), vec![llama("1234567890abcdf1")]].concat();
    BTreeMap::from([
        ("sync_alloc_AllocRequest.bin", alloc(two(), None)),
        ("sync_alloc_AllocRequest_1.bin", alloc(three(), None)),
        ("sync_alloc_AllocResponse.bin", granted(&[], &[0, 1])),
        ("sync_alloc_AllocResponse_1.bin", granted(&[0, 1], &[2])),
        ("sync_proxy_ProxyNotif.bin", Message::ProxyNotif(ProxyNotif { req_id: req("req-0001"), pd: None })),
        ("sync_query_CacheQueryRequest.bin", Message::CacheQueryRequest(CacheQueryRequest { keys: three() })),
        (
            "sync_query_CacheQueryResponse.bin",
            Message::CacheQueryResponse(CacheQueryResponse { cached_keys: three(), cached_indexes: vec![0, 1, 2] }),
        ),
        ("async_alloc_AllocRequest.bin", alloc(two(), Some(("req-0001", true, 2)))),
        ("async_alloc_AllocRequest_1.bin", alloc(three(), Some(("req-0002", true, 3)))),
        ("async_alloc_AllocRequest_2.bin", alloc(vec![llama("77")], Some(("req-0003", false, 3)))),
        ("async_alloc_AllocResponse.bin", granted(&[], &[0, 1])),
        ("async_alloc_AllocResponse_1.bin", granted(&[0, 1], &[2])),
        ("async_alloc_AllocResponse_2.bin", granted(&[], &[3])),
        ("async_alloc_AllocResponse_3.bin", granted(&[], &[])),
        (
            "async_alloc_CancelNotif.bin",
            Message::CancelNotif(CancelNotif { req_id: req("req-0003"), keys: vec![llama("77")], pd: None }),
        ),
    ])
}

#[test]
fn lmcache_payloads_decode_to_what_they_say() {
    // Broken in production: an LMCache peer asks for one thing and gets another.
    for (name, expected) in recorded() {
        let payload = fixture(name);
        assert_eq!(decode::<Message>(&payload).unwrap_or_else(|error| panic!("{name}: {error}")), expected, "{name}");
    }
}

#[test]
fn lmcache_payloads_are_what_we_send_byte_for_byte() {
    // Broken in production: an LMCache peer, which reads by name and type, does not understand our messages.
    let mut seen_count = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.ends_with(".bin") {
            continue;
        }
        let payload = fixture(&name);
        let message: Message = decode(&payload).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(name.contains(message.type_name()), "{name}: {}", message.type_name());
        assert_eq!(type_name(&payload), Some(message.type_name()));
        let encoded = encode(&message);
        // LMCache's two modes send the fields of AllocResponse in different orders. We send the synchronous one; a map
        // has no order, so what the asynchronous peer reads is the same.
        if name.starts_with("async_alloc_AllocResponse") {
            assert_eq!(encoded.len(), payload.len(), "{name}");
            assert_eq!(decode::<Message>(&encoded).unwrap(), message, "{name}");
        } else {
            assert_eq!(encoded, payload, "{name}");
        }
        seen_count += 1;
    }
    assert_eq!(seen_count, 23, "the recording is complete");
}

#[test]
fn lmcache_handshakes_carry_their_bytes_unchanged() {
    // Broken in production: NIXL refuses the peer's metadata, or its pages are read from the wrong place.
    for mode in ["sync", "async"] {
        let message = |name: &str| decode(&fixture(&format!("{mode}_init_{name}.bin"))).unwrap();
        let Message::NixlInitRequest(init) = message("NixlInitRequest") else { panic!() };
        assert!(init.local_meta_bytes.starts_with(b"nixlSerDes|Agent"), "{mode}");
        let Message::NixlInitResponse(answer) = message("NixlInitResponse") else { panic!() };
        assert!(answer.remote_meta_bytes.starts_with(b"nixlSerDes|Agent"), "{mode}");
        // The asking agent's own name comes back: it is in its metadata, behind an eight-byte length.
        assert_eq!(answer.remote_agent_name, init.local_meta_bytes[24..60], "{mode}");
        let Message::NixlMemRegRequest(register) = message("NixlMemRegRequest") else { panic!() };
        assert_eq!(register.remote_agent_name, answer.remote_agent_name, "{mode}");
        assert_eq!(register.local_id.is_empty(), mode == "sync");
        let Message::NixlMemRegResponse(registered) = message("NixlMemRegResponse") else { panic!() };
        if mode == "sync" {
            let pickle = |name: &str| fixture(&format!("sync_init_{name}.pickle"));
            assert_eq!(register.local_xfer_dlist_bytes, pickle("NixlMemRegRequest.local_xfer_dlist_bytes"));
            assert_eq!(registered.remote_xfer_dlist_bytes, pickle("NixlMemRegResponse.remote_xfer_dlist_bytes"));
        }
    }
}

fn hello() -> Hello {
    Hello {
        version_min: 2,
        version_max: 2,
        instance: "i1".into(),
        engine: "nixl".into(),
        layout: vec![("dtype".into(), "bfloat16".into())],
        capabilities: vec!["commit".into()],
        process: None,
        rendezvous: None,
    }
}

/// `hello()`, on the wire.
const HELLO: &[&[u8]] = &[
    b"\xa5hello\x86",                  // map of 6
    b"\xabversion_min\x02",            //   2
    b"\xabversion_max\x02",            //   2
    b"\xa8instance\xa2i1",             //   "i1"
    b"\xa6engine\xa4nixl",             //   "nixl"
    b"\xa6layout\x91\x92\xa5dtype",    //   array of 1: array of 2: "dtype",
    b"\xa8bfloat16",                   //     "bfloat16"
    b"\xaccapabilities\x91\xa6commit", //  array of 1: "commit"
];

/// `Failure::new(FailureKind::NoSlots, "full")`, on the wire.
const NO_SLOTS: &[&[u8]] = &[b"\x82\xa4kind\xa8no_slots", b"\xa4text\xa4full"]; // map of 2

fn no_slots() -> Failure {
    Failure::new(FailureKind::NoSlots, "full")
}

#[track_caller]
fn assert_golden(message: Message, parts: &[&[&[u8]]]) {
    let golden = parts.concat().concat();
    let encoded = encode(&message);
    assert_eq!(
        encoded.escape_ascii().to_string(),
        golden.escape_ascii().to_string(),
        "{}: a changed byte is a new protocol version, not a fix",
        message.type_name()
    );
    assert_eq!(decode::<Message>(&golden).unwrap(), message);
}

#[test]
fn our_handshake_has_these_bytes() {
    // Broken in production: two releases that claim the same version do not understand each other's handshake.
    assert_golden(
        Message::NixlInitRequest(InitRequest {
            local_meta_bytes: b"meta".to_vec(),
            pd: Some(InitExtension { seq: Seq(7), hello: hello(), agent_name: "a".into(), connected: Vec::new() }),
        }),
        &[
            &[b"\x83\xa4type\xafNixlInitRequest"],  // map of 3
            &[b"\xb0local_meta_bytes\xc4\x04meta"], // bytes, 4 of them
            &[b"\xa2pd\x83", b"\xa3seq\x07"],       // map of 3: 7
            HELLO,
            &[b"\xaaagent_name\xa1a"],
        ],
    );
    assert_golden(
        Message::NixlInitResponse(InitResponse {
            remote_agent_name: b"a".to_vec(),
            remote_meta_bytes: Vec::new(),
            pd: Some(InitReplyExtension {
                seq: Seq(7),
                hello: hello(),
                agent_name: "b".into(),
                refusal: Some(no_slots()),
            }),
        }),
        &[
            &[b"\x84\xa4type\xb0NixlInitResponse"], // map of 4
            &[b"\xb1remote_agent_name\xc4\x01a"],   // bytes, 1 of them
            &[b"\xb1remote_meta_bytes\xc4\x00"],    // bytes, none
            &[b"\xa2pd\x84", b"\xa3seq\x07"],       // map of 4: 7
            HELLO,
            &[b"\xaaagent_name\xa1b", b"\xa7refusal"],
            NO_SLOTS,
        ],
    );
    assert_golden(
        Message::NixlMemRegRequest(MemRegRequest {
            remote_agent_name: b"a".to_vec(),
            local_id: String::new(),
            local_xfer_dlist_bytes: Vec::new(),
            pd: Some(MemRegExtension { seq: Seq(8), instance: "i1".into() }),
        }),
        &[&[
            b"\x85\xa4type\xb1NixlMemRegRequest",  // map of 5
            b"\xb1remote_agent_name\xc4\x01a",     // bytes, 1 of them
            b"\xa8local_id\xa0",                   // ""
            b"\xb6local_xfer_dlist_bytes\xc4\x00", // bytes, none
            b"\xa2pd\x82",                         // map of 2
            b"\xa3seq\x08",                        //   8
            b"\xa8instance\xa2i1",                 //   "i1"
        ]],
    );
    assert_golden(
        Message::NixlMemRegResponse(MemRegResponse {
            remote_xfer_dlist_bytes: Vec::new(),
            pd: Some(MemRegReplyExtension {
                seq: Seq(8),
                descriptors: vec![0xde, 0xad],
                len_bytes: 300,
                refusal: None,
            }),
        }),
        &[&[
            b"\x83\xa4type\xb2NixlMemRegResponse",  // map of 3
            b"\xb7remote_xfer_dlist_bytes\xc4\x00", // bytes, none
            b"\xa2pd\x83",                          // map of 3
            b"\xa3seq\x08",                         //   8
            b"\xabdescriptors\xc4\x02\xde\xad",     //   bytes, 2 of them
            b"\xa9len_bytes\xcd\x01\x2c",           //   300
        ]],
    );
}

#[test]
fn our_allocation_and_cancel_have_these_bytes() {
    // Broken in production: two releases that claim the same version do not understand each other's allocations.
    assert_golden(
        Message::AllocRequest(AllocRequest {
            keys: vec![key("k0"), key("k1")],
            fmt: 1,
            shape: vec![2, 32, 256, 1024],
            dtype: "bfloat16".into(),
            last_chunk_toks: 17,
            req_id: Some(req("r")),
            is_last_batch: Some(true),
            total_chunks: Some(2),
            pd: Some(AllocExtension {
                seq: Seq(9),
                instance: "i1".into(),
                wait_ms: 5_000,
                groups: vec![GroupIndex(0), GroupIndex(1)],
                known_len_bytes: 300,
                receiver: "r1".into(),
                ahead: false,
            }),
        }),
        &[&[
            b"\x8a\xa4type\xacAllocRequest", // map of 10
            b"\xa4keys\x92\xa2k0\xa2k1",     // array of 2
            b"\xa3fmt\x01",                  // 1
            b"\xa5shape\x94\x02\x20",        // array of 4: 2, 32,
            b"\xcd\x01\x00\xcd\x04\x00",     //   256, 1024
            b"\xa5dtype\xa8bfloat16",        // "bfloat16"
            b"\xaflast_chunk_toks\x11",      // 17
            b"\xa6req_id\xa1r",              // "r"
            b"\xadis_last_batch\xc3",        // true
            b"\xactotal_chunks\x02",         // 2
            b"\xa2pd\x86",                   // map of 6
            b"\xa3seq\x09",                  //   9
            b"\xa8instance\xa2i1",           //   "i1"
            b"\xa7wait_ms\xcd\x13\x88",      //   5000
            b"\xa6groups\x92\x00\x01",       //   array of 2: 0, 1
            b"\xafknown_len_bytes",          //
            b"\xcd\x01\x2c",                 //   300
            b"\xa8receiver\xa2r1",           //   "r1"
        ]],
    );
    assert_golden(
        Message::AllocResponse(AllocResponse {
            already_sent_indexes: vec![1],
            remote_indexes: vec![],
            pd: Some(AllocReplyExtension {
                seq: Seq(9),
                grant: Some(GrantId(3)),
                offsets: vec![5],
                write_within_ms: 60_000,
                memory: Some(MemoryUpdate { len_bytes: 300, metadata: vec![0xde], descriptors: vec![0xad] }),
                refusal: None,
            }),
        }),
        &[&[
            b"\x84\xa4type\xadAllocResponse",    // map of 4
            b"\xb4already_sent_indexes\x91\x01", // array of 1: 1
            b"\xaeremote_indexes\x90",           // array of 0
            b"\xa2pd\x85",                       // map of 5
            b"\xa3seq\x09",                      //   9
            b"\xa5grant\x03",                    //   3
            b"\xa7offsets\x91\x05",              //   array of 1: 5
            b"\xafwrite_within_ms\xcd\xea\x60",  //   60000
            b"\xa6memory\x83",                   //   map of 3
            b"\xa9len_bytes\xcd\x01\x2c",        //     300
            b"\xa8metadata\xc4\x01\xde",         //     bytes, 1 of them
            b"\xabdescriptors\xc4\x01\xad",      //     bytes, 1 of them
        ]],
    );
    assert_golden(
        Message::AllocResponse(AllocResponse {
            already_sent_indexes: vec![],
            remote_indexes: vec![-1],
            pd: Some(AllocReplyExtension { refusal: Some(no_slots()), ..AllocReplyExtension::empty(Seq(9)) }),
        }),
        &[
            &[
                b"\x84\xa4type\xadAllocResponse", // map of 4
                b"\xb4already_sent_indexes\x90",  // array of 0
                b"\xaeremote_indexes\x91\xff",    // array of 1: -1
                b"\xa2pd\x83",                    // map of 3
                b"\xa3seq\x09",                   //   9
                b"\xafwrite_within_ms\x00",       //   0
                b"\xa7refusal",
            ],
            NO_SLOTS,
        ],
    );
    assert_golden(
        Message::CancelNotif(CancelNotif {
            req_id: req("r"),
            keys: vec![key("k0")],
            pd: Some(CancelExtension {
                alloc_seq: None,
                seq: Seq(10),
                instance: "i1".into(),
                grant: Some(GrantId(3)),
                writer_stopped: true,
            }),
        }),
        &[&[
            b"\x84\xa4type\xabCancelNotif", // map of 4
            b"\xa6req_id\xa1r",             // "r"
            b"\xa4keys\x91\xa2k0",          // array of 1
            b"\xa2pd\x84",                  // map of 4
            b"\xa3seq\x0a",                 //   10
            b"\xa8instance\xa2i1",          //   "i1"
            b"\xa5grant\x03",               //   3
            b"\xaewriter_stopped\xc3",      //   true
        ]],
    );
}

#[test]
fn our_own_messages_have_these_bytes() {
    // Broken in production: two releases that claim the same version do not understand each other's commits.
    assert_golden(
        Message::PdCommit(Commit {
            seq: Seq(11),
            instance: "i1".into(),
            req_id: req("r"),
            grant: GrantId(3),
            checksums: vec![Some(Checksum(0xae8b_1486_0a79_9888)), None],
        }),
        &[&[
            b"\x86\xa4type\xa8PdCommit",                 // map of 6
            b"\xa3seq\x0b",                              // 11
            b"\xa8instance\xa2i1",                       // "i1"
            b"\xa6req_id\xa1r",                          // "r"
            b"\xa5grant\x03",                            // 3
            b"\xa9checksums\x92",                        // array of 2
            b"\xcf\xae\x8b\x14\x86\x0a\x79\x98\x88\xc0", //   0xae8b14860a799888, nil
        ]],
    );
    assert_golden(
        Message::PdCommit(Commit {
            seq: Seq(11),
            instance: "i1".into(),
            req_id: req("r"),
            grant: GrantId(3),
            checksums: Vec::new(),
        }),
        &[&[
            b"\x85\xa4type\xa8PdCommit", // map of 5
            b"\xa3seq\x0b",              // 11
            b"\xa8instance\xa2i1",       // "i1"
            b"\xa6req_id\xa1r",          // "r"
            b"\xa5grant\x03",            // 3
        ]],
    );
    assert_golden(
        Message::PdCommitAck(CommitAck { seq: Seq(11), req_id: req("r"), refusal: None }),
        &[&[
            b"\x83\xa4type\xabPdCommitAck", // map of 3
            b"\xa3seq\x0b",                 // 11
            b"\xa6req_id\xa1r",             // "r"
        ]],
    );
    assert_golden(
        Message::PdVerifying(Verifying { seq: Seq(11), req_id: req("r") }),
        &[&[
            b"\x83\xa4type\xabPdVerifying", // map of 3
            b"\xa3seq\x0b",                 // 11
            b"\xa6req_id\xa1r",             // "r"
        ]],
    );
    assert_golden(
        Message::PdRevoke(Revoke { req_id: req("r"), grant: GrantId(3), reason: no_slots(), alloc_seq: Some(Seq(9)) }),
        &[
            &[
                b"\x85\xa4type\xa8PdRevoke", // map of 5
                b"\xa6req_id\xa1r",          // "r"
                b"\xa5grant\x03",            // 3
                b"\xa6reason",
            ],
            NO_SLOTS,
            &[
                b"\xa9alloc_seq\x09", // 9
            ],
        ],
    );
    assert_golden(
        Message::PdPing(Ping { seq: Seq(12), instance: "i1".into(), ended: Vec::new(), receiver: String::new() }),
        &[&[
            b"\x83\xa4type\xa6PdPing", // map of 3
            b"\xa3seq\x0c",            // 12
            b"\xa8instance\xa2i1",     // "i1"
        ]],
    );
    assert_golden(
        Message::PdPong(Pong { seq: Seq(12), refusal: None, have_ended: Vec::new() }),
        &[&[
            b"\x82\xa4type\xa6PdPong", // map of 2
            b"\xa3seq\x0c",            // 12
        ]],
    );
    const PROCESS: &[u8] = b"\x91\x84\xa7boot_id\xa1b\xadpid_namespace\x05\xa3pid\x06\xabstart_ticks\x07";
    let process = ProcessIdentity { boot_id: "b".into(), pid_namespace: 5, pid: 6, start_ticks: 7 };
    assert_golden(
        Message::PdPing(Ping {
            seq: Seq(12),
            instance: "i1".into(),
            ended: vec![process.clone()],
            receiver: "r1".into(),
        }),
        &[
            &[
                b"\x85\xa4type\xa6PdPing", // map of 5
                b"\xa3seq\x0c",            // 12
                b"\xa8instance\xa2i1",     // "i1"
                b"\xa5ended",
            ],
            &[PROCESS],
            &[b"\xa8receiver\xa2r1"], // "r1"
        ],
    );
    assert_golden(
        Message::PdPong(Pong { seq: Seq(12), refusal: None, have_ended: vec![process] }),
        &[
            &[
                b"\x83\xa4type\xa6PdPong", // map of 3
                b"\xa3seq\x0c",            // 12
                b"\xaahave_ended",
            ],
            &[PROCESS],
        ],
    );
}

#[test]
fn what_a_newer_peer_adds_is_ignored_and_what_it_says_anew_is_named() {
    // Broken in production: an upgrade of one side stops the other.
    let newer = b"\x83\xa6req_id\xa1r\xa7shading\x92\xc0\x81\x01\xcb\0\0\0\0\0\0\0\0\xa4type\xaaProxyNotif";
    assert_eq!(decode::<Message>(newer).unwrap(), Message::ProxyNotif(ProxyNotif { req_id: req("r"), pd: None }));
    let unknown = decode::<Message>(b"\x82\xa4type\xa7PdNovel\xa3seq\x05").unwrap_err();
    assert_eq!(unknown, DecodeError::UnknownType { type_name: "PdNovel".into() });
    let failure = b"\x84\xa4type\xa8PdRevoke\xa6req_id\xa1r\xa5grant\x03\xa6reason\x82\xa4kind\xa5novel\xa4text\xa1t";
    let Message::PdRevoke(revoke) = decode(failure).unwrap() else { panic!() };
    assert_eq!(revoke.reason.kind, FailureKind::Other);
}

#[test]
fn text_where_bytes_are_expected_is_taken_as_bytes() {
    // Broken in production: a sender whose msgpack library has no bytes type cannot shake hands.
    let text = b"\x82\xa4type\xafNixlInitRequest\xb0local_meta_bytes\xa4meta";
    let Message::NixlInitRequest(init) = decode(text).unwrap() else { panic!() };
    assert_eq!(init.local_meta_bytes, b"meta");
}

#[test]
fn a_refused_payload_is_refused_for_a_reason() {
    // Broken in production: an operator who sees a peer refused cannot tell which limit or field it was.
    let refusal = |payload: &[u8]| decode::<Message>(payload).unwrap_err().to_string();
    assert_eq!(refusal(b""), "message is cut off: at byte 0 1 bytes are announced, 0 are left");
    assert_eq!(refusal(b"\x93\x01\x02\x03"), "message starts with byte 0x93; expected a msgpack map");
    assert_eq!(refusal(b"\x80"), "message without a `type`");
    assert_eq!(refusal(b"\x81\xa4type\x01"), "message without a `type`");
    assert_eq!(refusal(b"\x81\xa4type\xc1"), "message has byte 0xc1 at 6, where a msgpack value starts");
    assert_eq!(refusal(b"\x81\xa4type\xaaProxyNotif"), "ProxyNotif: missing field `req_id`");
    assert_eq!(refusal(b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa1r!"), "message ends 1 bytes before its frame does");
    assert_eq!(
        refusal(b"\x81\xa4type\xdb\xff\xff\xff\xffAlloc"),
        "message is cut off: at byte 11 4294967295 bytes are announced, 5 are left"
    );
    assert_eq!(
        refusal(b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa0"),
        "ProxyNotif: a request id has 0 bytes; expected 1 to 256"
    );
    let with_keys = |keys: Vec<u8>| [b"\x82\xa4type\xb1CacheQueryRequest\xa4keys".to_vec(), keys].concat();
    let too_many = [vec![0xdd, 0, 0, 0x40, 0x01], b"\xa1k".repeat(KEYS_MAX + 1)].concat();
    assert_eq!(refusal(&with_keys(too_many)), "message with 16385 entries of an array; expected at most 16384");
    let too_long = [&b"\x91\xda\x04\x01"[..], &[b'k'; 1025]].concat();
    assert_eq!(refusal(&with_keys(too_long)), "CacheQueryRequest: a chunk key has 1025 bytes; expected 1 to 1024");
    let too_wide = [vec![0xde, 0, FIELDS_MAX as u8 + 1], b"\xa1a\x01".repeat(FIELDS_MAX + 1)].concat();
    assert_eq!(refusal(&with_keys(too_wide)), "message with 65 fields of a map; expected at most 64");
    let too_deep = vec![0x91; DEPTH_MAX + 1];
    assert_eq!(refusal(&with_keys(too_deep)), "message with 9 levels of nesting; expected at most 8");
    let nested = [vec![0xdc, 0x3f, 0xff], [vec![0xdc, 0, 16], vec![1; 16]].concat().repeat(0x3fff)].concat();
    assert_eq!(
        refusal(&with_keys(nested)),
        format!("message with {} values; expected at most {VALUES_MAX}", VALUES_MAX + 1)
    );
    assert_eq!(
        refusal(&vec![0; MESSAGE_LEN_BYTES_MAX + 1]),
        format!("message of {} bytes; expected at most {MESSAGE_LEN_BYTES_MAX}", MESSAGE_LEN_BYTES_MAX + 1)
    );
}

#[test]
fn the_largest_message_fits() {
    // Broken in production: a prompt within the stated limits cannot be sent.
    let keys: Vec<_> = (0..KEYS_MAX).map(|number| key(&format!("{number:01024}"))).collect();
    let message = Message::CacheQueryRequest(CacheQueryRequest { keys });
    assert_eq!(decode::<Message>(&encode(&message)).unwrap(), message);
}

#[test]
fn a_number_can_be_read_from_a_message_that_is_refused() {
    // Broken in production: whoever sends a bad request never hears so, and waits.
    let bad = b"\x83\xa4type\xa4open\xa2id\xcd\x01\x00\xa4keys\x01";
    assert_eq!(unsigned_field(bad, "id"), Some(256));
    assert_eq!(unsigned_field(bad, "keys"), Some(1));
    assert_eq!(unsigned_field(bad, "type"), None);
    assert_eq!(unsigned_field(bad, "seq"), None);
    assert_eq!(unsigned_field(b"\x81\xa2id\xff", "id"), None, "negative, and without a type");
    assert_eq!(type_name(bad), Some("open"));
}
