//! Every key of ours: one row says all there is to say of it. What a row's comment says is what the shipped files and
//! docs/configuration.md say; `shipped` writes both from here, and `--check` and every refusal read the rest.

use std::time::Duration;

use super::address::text_of;
use super::key::{Absence, Key, Kind, quoted};
use super::size::exact_size;
use super::{Config, EngineKind, Role};
use crate::ids::{PEERS_MAX, REQUEST_CHUNKS_MAX};
use crate::kv_layout::{CHUNK_TOKENS_MAX, MODEL_LEN_BYTES_MAX, parse_dtype};
use Absence::{Is, Refused, Without};
use Kind::{Boolean, Form, Host, Port, Ports, PortsOrNone, Seconds, Size, Text, Whole, Words};
use Role::{Both, Receiver, Sender};

macro_rules! keys {
    ($($section:literal: $(
        $(#[doc = $help:literal])+
        $constant:ident = $name:literal, $kind:expr, $absence:expr, $of:expr $(, $shown:expr)?;
    )*)*) => {
        $($(
            $(#[doc = $help])+
            pub(super) static $constant: Key = Key {
                name: $name,
                kind: $kind,
                absence: $absence,
                of: $of,
                shown: [$(Some($shown as fn(&Config) -> Option<String>),)? None][0],
                #[cfg(test)]
                section: $section,
                #[cfg(test)]
                help: &[$($help),+],
            };
        )*)*
        /// All of them, in the order in which they are shown.
        pub(super) static KEYS: &[&Key] = &[$($(&$constant),*),*];
    };
}

/// Seconds from 0 on, and those of a time that cannot be 0.
const FROM_ZERO: Kind = Seconds { min_ms: 0 };
const ABOVE_ZERO: Kind = Seconds { min_ms: 1 };

const fn up_to(max: u32) -> Kind {
    Whole { of: "", min: 1, max }
}

keys! {
    "What this daemon is":
    /// true, or left out. LMCache needs it; false is refused.
    ENABLE_PD = "enable_pd", Boolean, Is("true"), Both;
    /// Which halves the daemon has. The outgoing half sends KV chunks, the incoming half receives them. sender: the
    /// outgoing half; refused by a pd-receiver. receiver: the incoming half; refused by a pd-sender. both: pd-sender and
    /// pd-receiver are then the same, both halves over one buffer; a request may take half of it, and so may what is staged
    /// at once; pd_peer_init_port and pd_peer_alloc_port are needed. Leave it out of a file that a pd-sender and a
    /// pd-receiver share.
    PD_ROLE = "pd_role", Words(&["sender", "receiver", "both"]),
        Without("both", "a pd-sender has the outgoing half, a pd-receiver the incoming half"), Both,
        |c| Some(c.role.as_str().to_owned());
    /// Name of the model, as the handshake compares it: peers with another name are refused.
    MODEL_NAME = "model_name", Text(MODEL_LEN_BYTES_MAX), Without(
            "meta-llama/Meta-Llama-3-8B",
            "--model-name, or what the model's config.json says (_name_or_path, or else model_type)"
        ), Both, |c| Some(quoted(&c.layout.model));
    /// Tokens in a chunk. Must be the same at both ends, and the same as in LMCache. Smaller chunks waste less of a
    /// slot on a short last chunk; larger ones cost fewer keys and descriptors per request.
    CHUNK_SIZE = "chunk_size", Whole { of: "tokens", min: 1, max: CHUNK_TOKENS_MAX }, Is("256"), Both,
        |c| number(c.layout.chunk_tokens);
    /// Element type of the KV cache where it is not that of the weights; fp8 is float8_e4m3fn. Give what the engine's
    /// own option of this name says.
    KV_CACHE_DTYPE = "kv_cache_dtype",
        Form("auto, bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8"), Is("auto"), Both,
        |c| Some(&c.layout.first_group().dtype).filter(|dtype| parse_dtype(dtype).is_some()).cloned();

    "The buffer":
    /// A ceiling: the buffer is the largest whole number of chunks below it, and the rest is not allocated. Below one
    /// chunk is refused. Too small, and at a sender, which stages chunks here until they are sent, prefill waits for
    /// slots; at a receiver, which keeps them until decode has fetched them, senders do.
    PD_BUFFER_SIZE = "pd_buffer_size", Size, Refused("4GiB"), Both, |c| Some(exact_size(c.buffer.asked_bytes));
    /// Bytes that the buffer has at the start, rounded down to whole chunks, at least one. With it, the buffer takes
    /// memory as requests need it: a step is added, registered and told to peers when a request finds no room, which
    /// costs that request the time that it takes. A step for which the machine lacks memory is refused, and may be
    /// tried again later; memory that was taken is kept.
    PD_BUFFER_INITIAL_SIZE = "pd_buffer_initial_size", Size, Without("512MiB", "all of pd_buffer_size from the start"),
        Both, |c| c.buffer.is_lazy().then(|| exact_size(c.buffer_initial_bytes()));
    /// Bytes of a step, rounded down to whole chunks, at least one; at most 255 steps.
    PD_BUFFER_GROWTH_STEP = "pd_buffer_growth_step", Size,
        Without("512MiB", "the initial size, or what it takes to get by with 255 steps"), Both,
        |c| c.buffer.is_lazy().then(|| exact_size(c.buffer_step_bytes()));
    /// cpu, or the memory of a GPU: cuda (the GPU of this rank) or cuda:N, numbered as this process sees them. One
    /// plain allocation, all of it from the start: pd_buffer_initial_size does not go with it. docs/gpu.md has the
    /// rest.
    PD_BUFFER_DEVICE = "pd_buffer_device", Form("cpu, cuda or cuda:N (N from 0 to 1023)"), Is("cpu"), Both,
        |c| Some(c.buffer.device.to_string());
    /// Tokens of the longest prompt, 0 for no check. A buffer that cannot hold that many is refused at start, instead
    /// of the request when it comes.
    PD_MAX_PREFILL_LEN = "pd_max_prefill_len", Whole { of: "tokens", min: 0, max: u32::MAX }, Is("0"), Both;

    "The transfer engine":
    /// nixl (any host) or local (this host alone, needs nothing installed). Both ends must use the same.
    TRANSFER_CHANNEL = "transfer_channel", Words(&["nixl", "local"]),
        Without("nixl", "nixl where its library is found or another key means it, else local"), Both,
        |c| c.engine.kind.map(EngineKind::as_str).map(str::to_owned);
    /// NIXL's plugins, in order of preference. Others than UCX mean nixl: where they cannot be used, the daemon does not start.
    NIXL_BACKENDS = "nixl_backends", Form("a list of 1 to 16 names of NIXL plugins"), Is("[UCX]"), Both,
        |c| Some(format!("[{}]", c.engine.nixl_backends.join(", ")));
    /// Folder in which, or below which, libnixl_capi.so is looked for, and nowhere else. It means nixl: where the library is
    /// not there, the daemon does not start.
    PD_NIXL_LIB_DIR = "pd_nixl_lib_dir", Form("the folder of libnixl_capi.so"),
        Without("/opt/nixl/lib", "where NIXL_LIB_DIR says, or the system's loader looks"), Both,
        |c| c.engine.nixl_lib_dir.as_ref().map(|dir| quoted(&dir.display().to_string()));
    /// How long NIXL's progress thread sleeps when there is nothing to do. 0 burns a core in each daemon for ever.
    PD_NIXL_PROGRESS_DELAY_US = "pd_nixl_progress_delay_us", Whole { of: "microseconds", min: 0, max: 1_000_000 },
        Is("10000"), Both, |c| number(c.engine.nixl_progress_delay_us);
    /// Checksums (CRC-64/NVME) of chunks: off, sampled (one chunk in 8) or full. A sender sums a chunk when its bytes
    /// are read for the transfer; the receiver sums it again before it is ready, and a difference fails the request
    /// with the chunk's name. A receiver with full refuses what comes without. docs/benchmarks.md has the cost.
    PD_CHECKSUM = "pd_checksum", Words(&["off", "sampled", "full"]), Is("off"), Both,
        |c| Some(c.engine.checksum.as_str().to_owned());

    "The ports that senders connect to (for the incoming half; a daemon without it ignores these)":
    /// Address that the ports below are bound to. Whoever reaches them can fill this buffer, unless there is a
    /// pd_shared_secret_file: keep them inside a trusted network.
    PD_PEER_HOST = "pd_peer_host", Host, Is("127.0.0.1"), Receiver, |c| Some(quoted(&c.bind_host));
    /// Address of this host that a sender is told when it is asked for parked chunks: it connects there to send them.
    PD_ADVERTISE_HOST = "pd_advertise_host", Host,
        Without("10.0.0.3", "pd_peer_host; if that stands for every address, asking is refused"), Receiver,
        |c| c.advertise_host.as_deref().map(quoted);
    /// Hosts that are asked for parked chunks: names, addresses, and ranges such as 10.1.0.0/16. Where to ask stands in a
    /// request's parameters, which any client of the decode server can send. A name is allowed by itself, and not by its
    /// address.
    PD_PREFILL_HOSTS = "pd_prefill_hosts", Form("a list of host names, addresses and ranges of addresses"),
        Without("[10.1.0.0/16, prefill-0]", "any host is asked that a request names"), Receiver, prefill_hosts;
    /// Port of the handshake. One port, or a list with one port per rank, which PdConnector counts over all workers of a
    /// deployment, those of all data-parallel ranks; 0 is a free port, which the ready line names.
    PD_PEER_INIT_PORT = "pd_peer_init_port", Ports, Refused("7300"), Receiver, |c| number(c.init_port);
    /// Port of allocations and commits.
    PD_PEER_ALLOC_PORT = "pd_peer_alloc_port", Ports, Refused("7400"), Receiver, |c| number(c.alloc_port);
    /// Port of cache queries as LMCache's synchronous senders make them.
    PD_PEER_QUERY_PORT = "pd_peer_query_port", Ports, Without("7600", "cache queries are not served"), Receiver,
        |c| c.query_port.and_then(number);

    "Receivers that are known in advance (outgoing half; a pd-receiver ignores these)":
    /// Receivers that are met at start, before any request names them, and met again when they are lost: one that
    /// cannot be sent to (another model, dtype, version, secret ...) is in the log and in `status` at once, and a first
    /// request finds the handshake done. HOST:INIT_PORT:ALLOC_PORT each, an IPv6 address in brackets; with tensor
    /// parallelism a port for each rank, joined with +: 10.0.0.2:7300+7301:7400+7401. They count against pd_max_peers,
    /// as each sender that is told of a receiver does there. Requests may name others all the same; one that is meant
    /// has to be written as here (not localhost for 127.0.0.1).
    PD_RECEIVERS = "pd_receivers", Form(
        "a list of texts HOST:INIT_PORT:ALLOC_PORT, with ports from 1 to 65535, or one for each rank joined with +, and \
             an IPv6 address in brackets"
        ), Without("[10.0.0.2:7300:7400]", "each is met at its first request"), Sender, receivers;

    /// Whether requests may go to the receivers in pd_receivers alone. Where a request goes stands in its parameters, which any
    /// client of the prefill server can send: with true, others are refused before they are connected to.
    PD_RECEIVERS_ONLY = "pd_receivers_only", Boolean, Is("false"), Sender, |c| Some(c.receivers_only.to_string());

    "Parked chunks (outgoing half; a pd-receiver ignores these)":
    /// Address that the port below is bound to. Whoever reaches it can have what is parked here sent to any receiver,
    /// unless there is a pd_shared_secret_file: keep it inside a trusted network.
    PD_RENDEZVOUS_HOST = "pd_rendezvous_host", Host, Is("127.0.0.1"), Sender, |c| Some(quoted(&c.rendezvous_host));
    /// Port at which receivers ask for chunks that are parked here. One port, or a list with one port per rank, counted as
    /// for pd_peer_init_port; 0 is a free port, which the ready line names.
    PD_RENDEZVOUS_PORT = "pd_rendezvous_port", Ports, Without("5600", "nobody can ask for parked chunks"), Sender,
        |c| c.rendezvous_port.and_then(number);
    /// How long, in seconds, parked chunks are kept that nobody asks for, from the end of prefill on.
    PD_LEASE_SEC = "pd_lease_sec", ABOVE_ZERO, Is("30"), Sender, |c| seconds(c.deadlines.lease);
    /// Whether parked chunks are pushed to one receiver before any asks for them: to the one that was sent some last, or
    /// the only one in pd_receivers. Right, they are there when decode looks; wrong, the network has carried them in vain.
    /// They take no room at a receiver that anything else needs.
    PD_PUSH_AHEAD = "pd_push_ahead", Boolean, Is("true"), Sender, |c| Some(c.push_ahead.to_string());

    "The proxy (outgoing half; a pd-receiver ignores these)":
    /// Who is told, by a ProxyNotif, that a request's chunks have been committed, or that they do not come and why. Host and
    /// port, or neither.
    PD_PROXY_HOST = "pd_proxy_host", Host, Without("127.0.0.1", "nobody is told"), Sender,
        |c| c.proxy.as_ref().map(|proxy| quoted(&proxy.host));
    /// Port of its PULL socket.
    PD_PROXY_PORT = "pd_proxy_port", Port, Without("7500", "nobody is told"), Sender,
        |c| c.proxy.as_ref().and_then(|proxy| number(proxy.port));
    /// true: nobody is told, whatever host and port say.
    PD_SKIP_PROXY_NOTIFICATION = "pd_skip_proxy_notification", Boolean, Is("false"), Sender;

    "Deadlines, in seconds, with fractions; at most 86400":
    /// How long a request waits for slots, at either side, before it fails (no_slots). The default is for ever, as
    /// LMCache's is: 86400 here, and so is .inf. A peer that is full makes requests wait, in line; one that says
    /// nothing is given up after pd_peer_timeout_sec. 0: a request that does not fit at once fails at once.
    PD_ALLOCATION_TIMEOUT_SEC = "pd_allocation_timeout_sec", FROM_ZERO, Is("86400"), Both, |c| seconds(c.deadlines.allocation);
    /// Connecting to a peer, its handshake and its first request included.
    PD_HANDSHAKE_TIMEOUT_SEC = "pd_handshake_timeout_sec", ABOVE_ZERO, Is("10"), Both, |c| seconds(c.deadlines.handshake);
    /// From the grant of a receiver's slots to their commit, the prefill in between included: raise it for long
    /// prompts. After it, the request fails.
    PD_WRITE_TIMEOUT_SEC = "pd_write_timeout_sec", ABOVE_ZERO, Is("120"), Both, |c| seconds(c.deadlines.write);
    /// Outgoing half: how long it waits for a sign of the receiver about a commit, and about an allocation beyond its wait;
    /// and how long a cancel waits for writes to end. A receiver that is still checking a commit (pd_checksum) gives a
    /// sign, however long the check takes.
    PD_COMMIT_TIMEOUT_SEC = "pd_commit_timeout_sec", ABOVE_ZERO, Is("10"), Sender, |c| seconds(c.deadlines.commit);
    /// Incoming half: how long `wait` waits for a request when the connector does not say. vLLM's connector counts the
    /// time until a sender announces the request, which is the time in prefill's queue; what comes after has deadlines
    /// of its own.
    PD_WAIT_TIMEOUT_SEC = "pd_wait_timeout_sec", FROM_ZERO, Is("3600"), Receiver, |c| seconds(c.deadlines.wait);
    /// Incoming half: how long ready chunks that nobody fetches are kept.
    PD_RETENTION_SEC = "pd_retention_sec", ABOVE_ZERO, Is("300"), Receiver, |c| seconds(c.deadlines.retention);
    /// How long requests in flight may take after SIGTERM. A second SIGTERM stops at once.
    PD_SHUTDOWN_TIMEOUT_SEC = "pd_shutdown_timeout_sec", FROM_ZERO, Is("5"), Both, |c| seconds(c.deadlines.shutdown);

    "Who may talk (docs/security.md)":
    /// File with a secret of 32 to 4096 bytes that all daemons of a deployment share; others must not be able to read
    /// it (mode 0600, 0400, 0440 or 0640). Make one with: openssl rand -hex 32. With it, both ends of every connection
    /// prove that they have the secret, and every message is authenticated; peers without it, or with another, are
    /// refused. It encrypts nothing, and does not cover the chunks themselves nor the messages to the proxy.
    PD_SHARED_SECRET_FILE = "pd_shared_secret_file",
        Form("the path of a file with 32 to 4096 bytes that others cannot read"),
        Without("/etc/pd-backend/secret", "whoever reaches the ports may talk"), Both,
        |c| c.shared_secret.as_ref().map(|secret| quoted(&secret.file.display().to_string()));

    "Peers that stop answering":
    /// From one ping to the next, to each connected receiver. Set the same at both ends.
    PD_HEARTBEAT_INTERVAL_SEC = "pd_heartbeat_interval_sec", ABOVE_ZERO, Is("1"), Both, |c| seconds(c.deadlines.heartbeat);
    /// A peer of which nothing was heard for so long is given up: its requests fail at once, with its name. Above
    /// pd_heartbeat_interval_sec, by as much as a network or a full machine may hold a message up. A sender that may still be
    /// writing is asked so often whether it has stopped.
    PD_PEER_TIMEOUT_SEC = "pd_peer_timeout_sec", ABOVE_ZERO, Is("5"), Both, |c| seconds(c.deadlines.peer);

    "The connector":
    /// Socket on which the engine's connector attaches; {role} and {rank} are filled in.
    PD_CONNECTOR_ENDPOINT = "pd_connector_endpoint",
        Form("ipc:// and an absolute path of at most 100 bytes, in which {role} and {rank} are filled in"),
        Without("ipc:///tmp/pd-{role}-{rank}.sock", "a new name in each process, which the ready line gives"), Both,
        |c| c.connector_endpoint.as_deref().map(quoted);

    "What an operator sees":
    /// Address of /metrics, /healthz and /readyz over HTTP. Whoever reaches it can read what docs/operations.md lists.
    PD_METRICS_HOST = "pd_metrics_host", Host, Is("127.0.0.1"), Both,
        |c| c.metrics.as_ref().map(|metrics| quoted(&metrics.host));
    /// Their port: one, or a list with one port per rank; 0 is a free port, which the ready line names; none serves
    /// nothing.
    PD_METRICS_PORT = "pd_metrics_port", PortsOrNone, Is("0"), Both,
        |c| Some(c.metrics.as_ref().map_or_else(|| "none".to_owned(), |metrics| metrics.port.to_string()));

    "Limits: what exceeds one waits in line, or is refused with an error; nothing else is disturbed":
    /// Requests that have not ended. A sender's requests beyond its receiver's limit wait at the sender.
    PD_MAX_REQUESTS = "pd_max_requests", up_to(1 << 20), Is("1024"), Both, |c| number(c.limits.requests_max);
    /// Incoming half: requests of one sender that have not ended. More of them wait at the sender, in line.
    PD_MAX_PEER_REQUESTS = "pd_max_peer_requests", up_to(1 << 20), Is("512"), Receiver,
        |c| number(c.limits.peer_requests_max);
    /// Chunks of one request; the most there can be is what one message carries.
    PD_MAX_REQUEST_CHUNKS = "pd_max_request_chunks", up_to(REQUEST_CHUNKS_MAX), Is("4096"), Both,
        |c| number(c.limits.request_chunks_max);
    /// Peers that are connected or connecting; the most there can be is what one port has places for.
    PD_MAX_PEERS = "pd_max_peers", up_to(PEERS_MAX), Is("1024"), Both, |c| number(c.limits.peers_max);
    /// Attached connectors.
    PD_MAX_CLIENTS = "pd_max_clients", up_to(1024), Is("16"), Both, |c| number(c.limits.clients_max);

    "Keys of LMCache's PD backend without effect here":
    /// Both kinds of LMCache's own peers are served alike, and told apart by what they say.
    PD_BACKEND_MODE = "pd_backend_mode", Words(&["sync", "async"]), Without("async", ""), Both;
    /// Seconds between two looks at a condition: nothing here waits that way.
    PD_CONDITION_POLL_INTERVAL_SEC = "pd_condition_poll_interval_sec", FROM_ZERO, Without("0.005", ""), Both;
    /// true is refused: LMCache's way of reading KV back from a decode worker is not served. For KV in both directions
    /// write pd_role: both at each end.
    PD_BIDIRECTIONAL = "pd_bidirectional", Boolean, Is("false"), Both;
}

fn number(value: impl ToString) -> Option<String> {
    Some(value.to_string())
}

fn seconds(duration: Duration) -> Option<String> {
    number(duration.as_secs_f64())
}

fn prefill_hosts(config: &Config) -> Option<String> {
    let texts: Vec<String> = config.prefill_hosts.as_ref()?.texts().map(|text| quoted(&text)).collect();
    Some(format!("[{}]", texts.join(", ")))
}

fn receivers(config: &Config) -> Option<String> {
    let texts: Vec<String> = config.receivers.iter().map(|address| quoted(&text_of(address))).collect();
    (!texts.is_empty()).then(|| format!("[{}]", texts.join(", ")))
}
