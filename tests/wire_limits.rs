//! What a configuration allows at its most, as messages: whoever is sent one can read it.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use pd_backend::config::{Config, Limits, Options, Role};
use pd_backend::connector::message::{ReceiverState, ReceiverStatus, Reply, Request, Status};
use pd_backend::ids::{
    CHUNK_KEY_LEN_BYTES_MAX, Checksum, ChunkKey, Failure, FailureKind, GrantId, GroupIndex, IpcHandle, LeaseId,
    METADATA_LEN_BYTES_MAX, REQUEST_ID_LEN_BYTES_MAX, ReadyChunk, ReceiverAddress, RequestId, Seq, SlotIndex, SlotPart,
    SourceAddress, StagedSlot,
};
use pd_backend::wire::limits::{INIT_MESSAGE_LEN_BYTES_MAX, MESSAGE_LEN_BYTES_MAX};
use pd_backend::wire::message::*;
use pd_backend::wire::{decode, decoded_len_bytes, encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

const SEQ: Seq = Seq(u64::MAX);
/// Longest name in a handshake, in bytes.
const NAME_LEN_BYTES_MAX: usize = 256;

/// The limits of a configuration with this line; none when it is refused.
fn limits(line: &str) -> Option<Limits> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("f.yaml");
    fs::write(&file, format!("pd_buffer_size: 1GiB\n{line}\n")).unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models/llama-3-8b.json");
    let options = Options { config: Some(file), model: Some(model), ..Options::default() };
    Config::load(Role::Sender, &options).ok().map(|loaded| loaded.config.limits)
}

/// The largest of these that are accepted.
fn most(key: &str, read: impl Fn(&Limits) -> u32) -> usize {
    let written = (0..=20).flat_map(|power| [(1_u32 << power) - 1, 1 << power, (1 << power) + 1, 3 << power]);
    let accepted = written.filter_map(|number| limits(&format!("{key}: {number}")));
    accepted.map(|limits| read(&limits)).max().unwrap() as usize
}

#[track_caller]
fn travels<T: Serialize + DeserializeOwned + PartialEq>(what: &str, len_bytes_max: usize, message: &T) {
    let payload = encode(message);
    let decoded = decode::<T>(&payload).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(decoded == *message, "{what}: another came back");
    assert!(payload.len() <= len_bytes_max, "{what}: {} bytes, of {len_bytes_max}", payload.len());
    assert!(decoded_len_bytes(&payload).unwrap() > payload.len(), "{what}: it costs what it is long, and more");
}

fn request_id() -> RequestId {
    RequestId::new("r".repeat(REQUEST_ID_LEN_BYTES_MAX)).unwrap()
}

fn failure() -> Failure {
    Failure::new(FailureKind::LayoutMismatch, "é".repeat(600))
}

fn source() -> SourceAddress {
    SourceAddress { host: "h".repeat(253), port: u16::MAX }
}

fn hello() -> Hello {
    let name = || "n".repeat(NAME_LEN_BYTES_MAX);
    Hello {
        version_min: u16::MAX,
        version_max: u16::MAX,
        instance: name(),
        engine: name(),
        layout: vec![("f".repeat(300), "v".repeat(1024)); 128],
        capabilities: vec![name(); 8],
        process: Some(ProcessIdentity {
            boot_id: name(),
            pid_namespace: u64::MAX,
            pid: u32::MAX,
            start_ticks: u64::MAX,
        }),
        rendezvous: Some(source()),
    }
}

#[test]
fn the_largest_request_that_a_configuration_allows_can_be_read_by_everybody() {
    // Broken in production: `--check` accepts a limit, and a request within it ends at its peer's decoder.
    let most = most("pd_max_request_chunks", |limits| limits.request_chunks_max);
    assert!(most >= 16_384, "a prompt of 4 Mi tokens has always been possible");
    for (count, key_len_bytes) in
        [(1, 1), (most / 2, CHUNK_KEY_LEN_BYTES_MAX), (most, 8), (most, CHUNK_KEY_LEN_BYTES_MAX)]
    {
        let key = |number: usize| ChunkKey::new(format!("{number:0key_len_bytes$}")).unwrap();
        let keys: Vec<ChunkKey> = (0..count).map(key).collect();
        let indexes: Vec<u32> = (0..count as u32).collect();
        let groups = vec![GroupIndex(u8::MAX); count];
        let between_daemons = [
            Message::AllocRequest(AllocRequest {
                keys: keys.clone(),
                fmt: i64::MIN,
                shape: vec![u64::MAX; 4],
                dtype: "d".repeat(64),
                last_chunk_toks: u64::MAX,
                req_id: Some(request_id()),
                is_last_batch: Some(true),
                total_chunks: Some(u32::MAX),
                pd: Some(AllocExtension {
                    seq: SEQ,
                    instance: "n".repeat(NAME_LEN_BYTES_MAX),
                    wait_ms: u64::MAX,
                    groups: groups.clone(),
                    known_len_bytes: u64::MAX,
                    receiver: "n".repeat(NAME_LEN_BYTES_MAX),
                    ahead: true,
                }),
            }),
            Message::AllocResponse(AllocResponse {
                already_sent_indexes: indexes.clone(),
                remote_indexes: Vec::new(),
                pd: Some(AllocReplyExtension::empty(SEQ)),
            }),
            Message::AllocResponse(AllocResponse {
                already_sent_indexes: Vec::new(),
                remote_indexes: Vec::new(),
                pd: Some(AllocReplyExtension {
                    seq: SEQ,
                    grant: Some(GrantId(u64::MAX)),
                    offsets: vec![u64::MAX; count],
                    write_within_ms: u64::MAX,
                    memory: Some(MemoryUpdate {
                        len_bytes: u64::MAX,
                        metadata: vec![7; METADATA_LEN_BYTES_MAX],
                        descriptors: vec![7; 4096],
                    }),
                    refusal: None,
                }),
            }),
            // LMCache's.
            Message::AllocResponse(AllocResponse {
                already_sent_indexes: indexes.clone(),
                remote_indexes: vec![i64::MIN; count],
                pd: None,
            }),
            Message::CancelNotif(CancelNotif {
                req_id: request_id(),
                keys: keys.clone(),
                pd: Some(CancelExtension {
                    seq: SEQ,
                    instance: "n".repeat(NAME_LEN_BYTES_MAX),
                    grant: Some(GrantId(u64::MAX)),
                    alloc_seq: Some(SEQ),
                    writer_stopped: true,
                }),
            }),
            Message::PdCommit(Commit {
                seq: SEQ,
                instance: "n".repeat(NAME_LEN_BYTES_MAX),
                req_id: request_id(),
                grant: GrantId(u64::MAX),
                checksums: vec![Some(Checksum(u64::MAX)); count],
            }),
            Message::CacheQueryRequest(CacheQueryRequest { keys: keys.clone() }),
            Message::CacheQueryResponse(CacheQueryResponse {
                cached_keys: keys.clone(),
                cached_indexes: indexes.clone(),
            }),
        ];
        for message in &between_daemons {
            travels(&format!("{} of {count} chunks", message.type_name()), MESSAGE_LEN_BYTES_MAX, message);
        }
        let receiver = ReceiverAddress { host: "h".repeat(255), init_port: u16::MAX, alloc_port: u16::MAX };
        let part = SlotPart { slot: SlotIndex(u32::MAX), offset_bytes: u64::MAX, len_bytes: Some(u64::MAX) };
        let requests = [
            Request::Open {
                id: SEQ,
                req_id: request_id(),
                keys: keys.clone(),
                last_chunk_tokens: u32::MAX,
                receiver,
                wait_ms: Some(u64::MAX),
                groups,
                stage: true,
            },
            Request::Stage { id: SEQ, req_id: request_id(), chunks: indexes.clone(), wait_ms: Some(u64::MAX) },
            Request::Send {
                id: SEQ,
                req_id: request_id(),
                parts: vec![part; count],
                last: true,
                after: Some(IpcHandle([7; 64])),
            },
            Request::Lookup { id: SEQ, keys: keys.clone(), uncommitted: true, fetch: true },
        ];
        for request in &requests {
            travels(&format!("a request of {count} chunks"), MESSAGE_LEN_BYTES_MAX, request);
        }
        let staged =
            StagedSlot { chunk: u32::MAX, slot: SlotIndex(u32::MAX), offset_bytes: u64::MAX, len_bytes: u64::MAX };
        let ready = |key| ReadyChunk {
            key,
            group: GroupIndex(u8::MAX),
            slot: SlotIndex(u32::MAX),
            offset_bytes: u64::MAX,
            len_bytes: u64::MAX,
        };
        let chunks: Vec<ReadyChunk> = keys.iter().cloned().map(ready).collect();
        let lease = LeaseId(u64::MAX);
        let replies = [
            Reply::Opened { id: SEQ, req_id: request_id(), already_sent: Vec::new(), slots: vec![staged; count] },
            Reply::Opened { id: SEQ, req_id: request_id(), already_sent: indexes.clone(), slots: Vec::new() },
            Reply::Staged { id: SEQ, slots: vec![staged; count] },
            Reply::Ready { id: SEQ, req_id: request_id(), lease, chunks: chunks.clone() },
            Reply::Found {
                id: SEQ,
                lease: Some(lease),
                chunks: chunks.into_iter().map(Some).collect(),
                granted: Vec::new(),
                coming: Vec::new(),
            },
            Reply::Found { id: SEQ, lease: None, chunks: vec![None; count], granted: indexes.clone(), coming: indexes },
        ];
        for reply in &replies {
            travels(&format!("a reply of {count} chunks"), MESSAGE_LEN_BYTES_MAX, reply);
        }
    }
}

#[test]
fn as_many_peers_as_a_configuration_allows_can_be_named() {
    // Broken in production: a sender that is connected to many receivers cannot shake hands with one more, or whoever asks
    // it for its status never gets an answer.
    let most = most("pd_max_peers", |limits| limits.peers_max);
    // Those that are connected, and as many that are lost and still written to.
    let connected = (0..2 * most).map(|number| format!("{number:0width$}", width = NAME_LEN_BYTES_MAX)).collect();
    let init = InitRequest {
        local_meta_bytes: vec![7; METADATA_LEN_BYTES_MAX],
        pd: Some(InitExtension { seq: SEQ, hello: hello(), agent_name: "n".repeat(NAME_LEN_BYTES_MAX), connected }),
    };
    travels("a handshake", INIT_MESSAGE_LEN_BYTES_MAX, &Message::NixlInitRequest(init));
    let answer = InitResponse {
        remote_agent_name: vec![b'n'; NAME_LEN_BYTES_MAX],
        remote_meta_bytes: vec![7; METADATA_LEN_BYTES_MAX],
        pd: Some(InitReplyExtension {
            seq: SEQ,
            hello: hello(),
            agent_name: "n".repeat(NAME_LEN_BYTES_MAX),
            refusal: Some(failure()),
        }),
    };
    travels("its answer", INIT_MESSAGE_LEN_BYTES_MAX, &Message::NixlInitResponse(answer));
    let address = ReceiverAddress { host: "h".repeat(253), init_port: u16::MAX, alloc_port: u16::MAX };
    let receiver = ReceiverStatus { address, state: ReceiverState::Refused, failure: Some(failure()) };
    let status = Status { receivers: vec![receiver; most], sources: vec![source(); most], ..Status::default() };
    travels("a status", MESSAGE_LEN_BYTES_MAX, &Reply::Status { id: SEQ, status });
}
