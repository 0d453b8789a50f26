//! LMCache's PD messages, and ours.
//!
//! A payload is a msgpack map; the key `type` carries the name, then come the fields. LMCache's messages keep its
//! names, fields and types (observed on LMCache 0.5.6). What its wire lacks travels in one optional field, `pd`, which
//! LMCache's peers ignore. The messages named `Pd...` are ours and go only to peers whose [`Hello`] announced them.

use serde::{Deserialize, Serialize};

use crate::ids::{
    Checksum, ChunkKey, Failure, GrantId, GroupIndex, ReceiverAddress, Registration, RequestId, Seq, SourceAddress,
};

/// The protocol version that this build speaks, and the oldest that it still understands.
pub const PROTOCOL_VERSION: u16 = 2;
/// See [`PROTOCOL_VERSION`].
pub const PROTOCOL_VERSION_MIN: u16 = 2;

/// Capability: commits chunks with [`Commit`] and understands [`Revoke`].
pub const CAPABILITY_COMMIT: &str = "commit";
/// Capability: asks and answers with [`Ping`] and [`Pong`], and takes silence for an end.
pub const CAPABILITY_HEARTBEAT: &str = "heartbeat";
/// Capability: understands [`Verifying`], and waits for a commit for as long as its receiver says so.
pub const CAPABILITY_VERIFYING: &str = "verifying";
/// Capability: keeps chunks for whoever registers for them, and takes [`Register`] at its rendezvous port.
pub const CAPABILITY_PARK: &str = "park";
/// Capability: takes chunks that a sender pushes ahead ([`AllocExtension::ahead`]).
pub const CAPABILITY_AHEAD: &str = "ahead";
/// Capability: sums every chunk that it sends (`pd_checksum: full`).
pub const CAPABILITY_CHECKSUMS: &str = "checksums";

/// Everything that can arrive on a side-channel port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum Message {
    /// init port, sender to receiver: who I am.
    NixlInitRequest(InitRequest),
    /// init port, the answer.
    NixlInitResponse(InitResponse),
    /// init port, sender to receiver, second step: where is your memory? LMCache also says where its own is.
    NixlMemRegRequest(MemRegRequest),
    /// init port, the answer: where the receiver's memory is.
    NixlMemRegResponse(MemRegResponse),
    /// alloc port, sender to receiver: room for these chunks.
    AllocRequest(AllocRequest),
    /// alloc port, the answer; also the answer to a cancel.
    AllocResponse(AllocResponse),
    /// alloc port, sender to receiver: given up; with `writer_stopped` nothing of it is written any more. Also the answer to a
    /// `PdRevoke`.
    CancelNotif(CancelNotif),
    /// query port: which of these do you hold?
    CacheQueryRequest(CacheQueryRequest),
    /// query port, the answer.
    CacheQueryResponse(CacheQueryResponse),
    /// proxy port: this request can be decoded now.
    ProxyNotif(ProxyNotif),
    /// alloc port, sender to receiver: every granted chunk is written.
    PdCommit(Commit),
    /// alloc port, the answer.
    PdCommitAck(CommitAck),
    /// alloc port, for now the answer to a commit that is said again: its chunks are still being summed.
    PdVerifying(Verifying),
    /// alloc port, receiver to sender, unasked: the grant is withdrawn, say when you have stopped writing.
    PdRevoke(Revoke),
    /// alloc port, sender to receiver: are you there, and do you know me?
    PdPing(Ping),
    /// alloc port, the answer.
    PdPong(Pong),
    /// rendezvous port, receiver to sender: these chunks are wanted, now or later.
    PdRegister(Register),
    /// rendezvous port, the answer; again when there is news.
    PdRegistered(Registered),
    /// rendezvous port, receiver to sender: these are not wanted any more. Answered by a `PdRegistered`.
    PdRelease(ReleaseParked),
}

impl Message {
    /// The name on the wire.
    pub const fn type_name(&self) -> &'static str {
        match self {
            Self::NixlInitRequest(_) => "NixlInitRequest",
            Self::NixlInitResponse(_) => "NixlInitResponse",
            Self::NixlMemRegRequest(_) => "NixlMemRegRequest",
            Self::NixlMemRegResponse(_) => "NixlMemRegResponse",
            Self::AllocRequest(_) => "AllocRequest",
            Self::AllocResponse(_) => "AllocResponse",
            Self::CancelNotif(_) => "CancelNotif",
            Self::CacheQueryRequest(_) => "CacheQueryRequest",
            Self::CacheQueryResponse(_) => "CacheQueryResponse",
            Self::ProxyNotif(_) => "ProxyNotif",
            Self::PdCommit(_) => "PdCommit",
            Self::PdCommitAck(_) => "PdCommitAck",
            Self::PdVerifying(_) => "PdVerifying",
            Self::PdRevoke(_) => "PdRevoke",
            Self::PdPing(_) => "PdPing",
            Self::PdPong(_) => "PdPong",
            Self::PdRegister(_) => "PdRegister",
            Self::PdRegistered(_) => "PdRegistered",
            Self::PdRelease(_) => "PdRelease",
        }
    }
}

/// What one of our daemons says of itself in the handshake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest protocol version understood.
    pub version_min: u16,
    /// Newest protocol version understood.
    pub version_max: u16,
    /// Name of this process, new at every start.
    pub instance: String,
    /// Transfer engine: `nixl` or `local`.
    pub engine: String,
    /// What a chunk is, field by field, so that a mismatch can be named.
    pub layout: Vec<(String, String)>,
    /// Messages beyond LMCache's that this side understands.
    pub capabilities: Vec<String>,
    /// The process itself, so that a peer on the same host can see it end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessIdentity>,
    /// Where others may ask for what is parked here, if anything is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rendezvous: Option<SourceAddress>,
}

/// A process, told apart from another with the same pid on another host, in another container, or later.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Boot id of the host's kernel.
    pub boot_id: String,
    /// Inode of the pid namespace.
    pub pid_namespace: u64,
    /// The pid in that namespace.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub start_ticks: u64,
}

impl ProcessIdentity {
    /// Whether `other` can be looked for from this process: same kernel, same pid namespace.
    pub fn sees(&self, other: &Self) -> bool {
        (&self.boot_id, self.pid_namespace) == (&other.boot_id, other.pid_namespace)
    }
}

/// `NixlInitRequest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InitRequest {
    /// The sender's engine metadata.
    #[serde(with = "serde_bytes")]
    pub local_meta_bytes: Vec<u8>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd: Option<InitExtension>,
}

/// Our part of [`InitRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InitExtension {
    /// Echoed in the answer.
    pub seq: Seq,
    /// Who asks.
    pub hello: Hello,
    /// Name of the sender's agent.
    pub agent_name: String,
    /// [`Hello::instance`] of every receiver that the sender is connected to or still writes to. A receiver that finds
    /// itself in here is known to the sender under another address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub connected: Vec<String>,
}

/// `NixlInitResponse`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InitResponse {
    /// The name of the *asking* agent, as bytes, as LMCache returns it. Empty in a refusal.
    #[serde(with = "serde_bytes")]
    pub remote_agent_name: Vec<u8>,
    /// The receiver's engine metadata. Empty in a refusal.
    #[serde(with = "serde_bytes")]
    pub remote_meta_bytes: Vec<u8>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd: Option<InitReplyExtension>,
}

/// Our part of [`InitResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InitReplyExtension {
    /// From the request.
    pub seq: Seq,
    /// Who answers.
    pub hello: Hello,
    /// Name of the receiver's agent. Empty in a refusal.
    pub agent_name: String,
    /// Why the receiver will not talk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Failure>,
}

/// `NixlMemRegRequest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemRegRequest {
    /// The name of the sender's agent, as bytes.
    #[serde(with = "serde_bytes")]
    pub remote_agent_name: Vec<u8>,
    /// What the sender calls itself; empty from LMCache's synchronous backend.
    pub local_id: String,
    /// The sender's pages as the Python binding pickles them; empty from us.
    #[serde(with = "serde_bytes")]
    pub local_xfer_dlist_bytes: Vec<u8>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd: Option<MemRegExtension>,
}

/// Our part of [`MemRegRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemRegExtension {
    /// Echoed in the answer.
    pub seq: Seq,
    /// [`Hello::instance`] of the sender.
    pub instance: String,
}

/// `NixlMemRegResponse`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemRegResponse {
    /// The receiver's pages as the Python binding pickles them; empty between our own peers.
    #[serde(with = "serde_bytes")]
    pub remote_xfer_dlist_bytes: Vec<u8>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd: Option<MemRegReplyExtension>,
}

/// Our part of [`MemRegResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemRegReplyExtension {
    /// From the request.
    pub seq: Seq,
    /// The receiver's engine descriptors. Empty in a refusal.
    #[serde(with = "serde_bytes")]
    pub descriptors: Vec<u8>,
    /// Length of the receiver's buffer, as far as the descriptors go, in bytes.
    pub len_bytes: u64,
    /// Why the receiver will not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Failure>,
}

/// `AllocRequest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocRequest {
    /// The chunks' keys, in the order of the prompt.
    pub keys: Vec<ChunkKey>,
    /// LMCache's memory format: 1 is KV_2LTD.
    pub fmt: i64,
    /// Shape of a whole chunk; for KV_2LTD `[2, layers, tokens, kv_heads * head_size]`.
    pub shape: Vec<u64>,
    /// Element type as torch calls it, without the `torch.`: `bfloat16`.
    pub dtype: String,
    /// Tokens in the last chunk of each group in `keys`.
    pub last_chunk_toks: u64,
    /// Absent from LMCache's synchronous backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub req_id: Option<RequestId>,
    /// Whether no more batches follow for this request. Absent from the synchronous backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_last_batch: Option<bool>,
    /// Chunks in all batches of this request. Absent from the synchronous backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_chunks: Option<u32>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd: Option<AllocExtension>,
}

/// Our part of [`AllocRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocExtension {
    /// Echoed in the answer.
    pub seq: Seq,
    /// [`Hello::instance`] of the sender.
    pub instance: String,
    /// How long the sender will wait for slots, in milliseconds.
    pub wait_ms: u64,
    /// Of which group of layers each chunk is; empty when all are of the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupIndex>,
    /// How much of the receiver's buffer the sender knows of, in bytes.
    #[serde(default)]
    pub known_len_bytes: u64,
    /// [`Hello::instance`] of the receiver that the sender is connected to, as that receiver said in the handshake. Another one
    /// refuses: a request's two ports may be those of two receivers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub receiver: String,
    /// Nobody has asked for this: the sender guesses that it will be. It is granted at once or not at all, gives way to what was
    /// asked for, and its chunks are looked up.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ahead: bool,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// `AllocResponse`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocResponse {
    /// Positions in `keys` of the chunks that need not be sent.
    pub already_sent_indexes: Vec<u32>,
    /// One page index for every other chunk, in order. `-1` in LMCache's errors. Empty between our own peers: see
    /// [`AllocReplyExtension::offsets`].
    pub remote_indexes: Vec<i64>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd: Option<AllocReplyExtension>,
}

/// Our part of [`AllocResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocReplyExtension {
    /// From the request.
    pub seq: Seq,
    /// Names what was granted, for the commit. Absent in a refusal and in the answer to a cancel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<GrantId>,
    /// Where every chunk that is not already sent goes, in bytes from the start of the receiver's buffer, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub offsets: Vec<u64>,
    /// How long the granted slots may be written to, in milliseconds from now.
    #[serde(default)]
    pub write_within_ms: u64,
    /// What the sender must know before it writes: the buffer has grown beyond its `known_len_bytes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryUpdate>,
    /// Why nothing was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Failure>,
}

impl AllocReplyExtension {
    /// An answer that grants nothing and refuses nothing.
    pub const fn empty(seq: Seq) -> Self {
        Self { seq, grant: None, offsets: Vec::new(), write_within_ms: 0, memory: None, refusal: None }
    }
}

/// A receiver's memory after it has grown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemoryUpdate {
    /// Length of the buffer now, in bytes.
    pub len_bytes: u64,
    /// The receiver's engine metadata now.
    #[serde(with = "serde_bytes")]
    pub metadata: Vec<u8>,
    /// The receiver's engine descriptors now.
    #[serde(with = "serde_bytes")]
    pub descriptors: Vec<u8>,
}

/// The sender ends the request, for whatever reason: the reason does not travel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CancelNotif {
    /// Which request.
    pub req_id: RequestId,
    /// Its keys.
    pub keys: Vec<ChunkKey>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd: Option<CancelExtension>,
}

/// Our part of [`CancelNotif`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CancelExtension {
    /// Echoed in the answer.
    pub seq: Seq,
    /// [`Hello::instance`] of the sender.
    pub instance: String,
    /// What was granted, if the sender knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<GrantId>,
    /// `seq` of the AllocRequest that this takes back, for a sender that does not know its grant. A name alone would
    /// not do: an earlier attempt of the same request may still be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alloc_seq: Option<Seq>,
    /// The sender's word that nothing of it is or will be written: only then are the slots free again.
    pub writer_stopped: bool,
}

/// `CacheQueryRequest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CacheQueryRequest {
    /// Which chunks.
    pub keys: Vec<ChunkKey>,
}

/// `CacheQueryResponse`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CacheQueryResponse {
    /// Those that are held.
    pub cached_keys: Vec<ChunkKey>,
    /// The page of each, by its index in the receiver's descriptor list.
    pub cached_indexes: Vec<u32>,
}

/// `ProxyNotif`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProxyNotif {
    /// Which request.
    pub req_id: RequestId,
}

/// `PdCommit`: every chunk of the grant is written and complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// Echoed in the answer.
    pub seq: Seq,
    /// [`Hello::instance`] of the sender.
    pub instance: String,
    /// Which request.
    pub req_id: RequestId,
    /// What was granted to it.
    pub grant: GrantId,
    /// One for each granted chunk, in order, nil where it was not summed; empty when none was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checksums: Vec<Option<Checksum>>,
}

/// `PdCommitAck`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommitAck {
    /// From the commit.
    pub seq: Seq,
    /// Which request.
    pub req_id: RequestId,
    /// Why the chunks are not ready after all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Failure>,
}

/// `PdVerifying`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verifying {
    /// From the commit.
    pub seq: Seq,
    /// Which request.
    pub req_id: RequestId,
}

/// `PdRevoke`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Revoke {
    /// Which request.
    pub req_id: RequestId,
    /// What was granted to it.
    pub grant: GrantId,
    /// Why.
    pub reason: Failure,
    /// `seq` of the AllocRequest that the grant answered, for a sender that this overtakes the answer to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alloc_seq: Option<Seq>,
}

/// `PdPing`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ping {
    /// Echoed in the answer.
    pub seq: Seq,
    /// [`Hello::instance`] of the sender.
    pub instance: String,
    /// Of the processes that the receiver asked after in a pong, those that have ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<ProcessIdentity>,
    /// [`Hello::instance`] of the receiver that the sender is connected to, as that receiver said in the handshake. Another one
    /// refuses: a request's two ports may be those of two receivers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub receiver: String,
}

/// `PdPong`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pong {
    /// From the ping.
    pub seq: Seq,
    /// The receiver does not know the sender: it has given it up, or was restarted. Shake hands anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Failure>,
    /// Lost senders of the asking sender's host and pid namespace whose slots are quarantined: have they ended? Who is
    /// on the same host can tell, and says so in its next ping.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub have_ended: Vec<ProcessIdentity>,
}

/// `PdRegister`: a receiver asks for chunks that a sender has parked, or will have. Whoever gets it sends what it has of `keys`
/// as any request: allocation, write, commit. Repeated until it is answered, and from then on as a sign of life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Register {
    /// Echoed in the answer.
    pub seq: Seq,
    /// Who asks, so that a pair that does not fit is refused before anything is allocated.
    pub hello: Hello,
    /// What the allocation is to be called: the receiver's own name for what it waits for.
    pub req_id: RequestId,
    /// What the prefill server calls the request, as far as is known: what is kept under these names is not, once this is sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<RequestId>,
    /// Which chunks, in the order of the prompt.
    pub keys: Vec<ChunkKey>,
    /// Where the chunks are to go, now. None: they are to be kept, for decode waits its turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receiver: Option<ReceiverAddress>,
    /// How long a request that the sender does not know yet may be awaited, in milliseconds. 0: prefill has ended already.
    #[serde(default)]
    pub wait_ms: u64,
}

/// `PdRegistered`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Registered {
    /// From the latest registration.
    pub seq: Seq,
    /// [`Hello::instance`] of the sender.
    pub instance: String,
    /// From the registration.
    pub req_id: RequestId,
    /// What became of it.
    pub state: Registration,
    /// How long what is kept is kept, in milliseconds, unless it is asked for again.
    #[serde(default)]
    pub lease_ms: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// `PdRelease`. May be said twice, and of what was never there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReleaseParked {
    /// Echoed in the answer.
    pub seq: Seq,
    /// [`Hello::instance`] of the receiver.
    pub instance: String,
    /// The receiver's registration under this name ends.
    pub req_id: RequestId,
    /// What the prefill server calls the request: its chunks make room from now on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<RequestId>,
}
