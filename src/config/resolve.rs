//! What was written, the options and the model, made into a [`Config`]: the one place where it is decided what counts.

use std::path::PathBuf;

use super::error::ConfigError;
use super::key::Key;
use super::keys;
use super::notes::Notes;
use super::ports::{Hosts, Ports, ports};
use super::raw::{RawConfig, RawValue};
use super::receivers::{receivers, receivers_only};
use super::size::exact_size;
use super::{
    BufferConfig, BufferDevice, ChecksumMode, Config, Deadlines, EngineConfig, EngineKind, Limits, MetricsConfig,
    ProxyConfig, Role, SLOT_COUNT_MAX, SecretFile,
};
use crate::ids::{BUFFER_PIECES_MAX, HostList, stands_for_all};
use crate::kv_layout::{GivenDefaults, KvLayout, ModelOptions, from_layout_json, from_model_config, parse_dtype};

/// A path in a Unix socket's address has 107 bytes; some are left for what ZeroMQ's peers add.
const ENDPOINT_PATH_LEN_BYTES_MAX: usize = 100;

/// Where the layout comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayoutSource<'a> {
    /// Text of a model hub's config.json.
    Model { file: &'a str, text: &'a str },
    /// Text of a layout.
    Given { file: &'a str, text: &'a str },
}

/// What the command line says beside the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Worker<'a> {
    pub rank: u32,
    pub tp_size: Option<u32>,
    pub model_name: Option<&'a str>,
}

/// The checked configuration, and what to log about how it came to be.
///
/// `binary` is the role of the program that reads it, which `pd_role: both` widens.
pub(super) fn resolve(
    binary: Role,
    raw: &RawConfig,
    source: Option<LayoutSource<'_>>,
    worker: Worker<'_>,
    shared_secret: Option<SecretFile>,
) -> Result<(Config, Notes), ConfigError> {
    let mut notes = Notes::default();
    let role = role(binary, raw)?;
    check_mode(raw)?;
    let layout = layout(raw, source, worker)?;
    let rank = layout.tp_rank;
    let hosts = Hosts {
        peer: raw.must_of(role, &keys::PD_PEER_HOST, RawConfig::host)?,
        rendezvous: raw.must_of(role, &keys::PD_RENDEZVOUS_HOST, RawConfig::host)?,
        metrics: raw.must(&keys::PD_METRICS_HOST, RawConfig::host)?,
    };
    let ports = ports(role, raw, rank, &hosts)?;
    warn_of_open_ports(&hosts, &ports, shared_secret.is_some(), &mut notes);
    // What can be sent at once, and what can be parked, have each half of the outgoing half's part.
    let parts = match (role, ports.rendezvous) {
        (Role::Both, Some(_)) => 4,
        (Role::Both, None) => 2,
        _ => 1,
    };
    let buffer = buffer(raw, &layout, (rank, parts), &mut notes)?;
    let limits = limits(role, raw)?;
    let config = Config {
        role,
        rank,
        engine: engine(raw)?,
        bind_host: hosts.peer,
        init_port: ports.init.unwrap_or(0),
        alloc_port: ports.alloc.unwrap_or(0),
        query_port: ports.query,
        advertise_host: advertise_host(role, raw)?,
        prefill_hosts: prefill_hosts(role, raw, shared_secret.is_some(), &mut notes)?,
        rendezvous_host: hosts.rendezvous,
        rendezvous_port: ports.rendezvous,
        push_ahead: raw.must_of(role, &keys::PD_PUSH_AHEAD, RawConfig::boolean)?,
        receivers: receivers(role, raw, rank, &limits)?,
        receivers_only: receivers_only(role, raw)?,
        proxy: proxy(role, raw)?,
        shared_secret,
        connector_endpoint: connector_endpoint(role, raw, &layout)?,
        metrics: ports.metrics.map(|port| MetricsConfig { host: hosts.metrics, port }),
        deadlines: deadlines(role, raw, &mut notes)?,
        limits,
        buffer,
        layout,
    };
    note_what_has_no_effect(raw, &mut notes)?;
    note_keys_of_one_half(role, raw, &mut notes);
    if config.buffer.device != BufferDevice::Cpu && config.engine.checksum != ChecksumMode::Off {
        notes.say(format!(
            "{} = {}: each chunk that is summed is copied from the GPU to the host for it, at both ends",
            keys::PD_CHECKSUM.name,
            config.engine.checksum.as_str()
        ));
    }
    Ok((config, notes))
}

/// The halves that the daemon has: the binary's own, unless the file says both.
fn role(binary: Role, raw: &RawConfig) -> Result<Role, ConfigError> {
    let key = &keys::PD_ROLE;
    match raw.word(key)? {
        None => Ok(binary),
        Some("both") => Ok(Role::Both),
        Some(own) if own == binary.as_str() => Ok(binary),
        Some(other) => Err(raw.written(key)?.refused(
            format!("this is {}, which accepts {} or both", binary.daemon(), binary.as_str()),
            format!("start pd-{other}, or leave it out, or write both for a daemon that sends and receives"),
        )),
    }
}

/// The keys that say what kind of LMCache instance the file is for.
fn check_mode(raw: &RawConfig) -> Result<(), ConfigError> {
    let refuse = |key: &Key, reason: &str, advice: &str| match raw.entry(key) {
        Some(entry) => Err(entry.refused(reason, advice)),
        None => Ok(()),
    };
    if raw.boolean(&keys::ENABLE_PD)? == Some(false) {
        refuse(&keys::ENABLE_PD, "this daemon does nothing but PD", "write true, or leave it out")?;
    }
    if raw.boolean(&keys::PD_BIDIRECTIONAL)? == Some(true) {
        refuse(
            &keys::PD_BIDIRECTIONAL,
            "LMCache's way of reading KV back from a decode worker is not served",
            "write false; for KV in both directions write pd_role: both at each end",
        )?;
    }
    Ok(())
}

fn layout(raw: &RawConfig, source: Option<LayoutSource<'_>>, worker: Worker<'_>) -> Result<KvLayout, ConfigError> {
    let model_name = match worker.model_name {
        Some(name) => Some(name.to_owned()),
        None => raw.text(&keys::MODEL_NAME)?,
    };
    let chunk_tokens = raw.must(&keys::CHUNK_SIZE, RawConfig::whole)?;
    let kv_dtype = raw.text(&keys::KV_CACHE_DTYPE)?.filter(|dtype| dtype != "auto");
    if let (Some(dtype), Some(entry)) = (&kv_dtype, raw.entry(&keys::KV_CACHE_DTYPE))
        && parse_dtype(dtype).is_none()
    {
        return Err(entry.bad(&keys::KV_CACHE_DTYPE));
    }
    let given = matches!(source, Some(LayoutSource::Given { .. }));
    let (file, layout) = match source.ok_or(ConfigError::NoLayout)? {
        LayoutSource::Model { file, text } => {
            let options = ModelOptions {
                model_name,
                kv_dtype: kv_dtype.clone(),
                chunk_tokens,
                tp_rank: worker.rank,
                tp_size: worker.tp_size.unwrap_or(1),
            };
            (file, from_model_config(text, &options))
        }
        LayoutSource::Given { file, text } => {
            let defaults = GivenDefaults {
                model_name,
                chunk_tokens: raw.entry(&keys::CHUNK_SIZE).map(|_| chunk_tokens),
                chunk_tokens_default: chunk_tokens,
                tp_rank: worker.rank,
                tp_size: worker.tp_size,
            };
            (file, from_layout_json(text, &defaults))
        }
    };
    let layout = layout.map_err(|source| ConfigError::Layout { file: file.to_owned(), source })?;
    // A model's dtype is overridden by this key; a layout that the connector gave is not.
    if let (true, Some(dtype), Some(entry)) = (given, kv_dtype, raw.entry(&keys::KV_CACHE_DTYPE))
        && let Some((name, _)) = parse_dtype(&dtype)
        && let Some(other) = layout.groups.iter().find(|group| group.dtype != name)
    {
        return Err(
            entry.refused(format!("{file} says {}", other.dtype), "leave it out where the connector gives the layout")
        );
    }
    Ok(layout)
}

fn buffer(
    raw: &RawConfig,
    layout: &KvLayout,
    (rank, parts): (u32, u32),
    notes: &mut Notes,
) -> Result<BufferConfig, ConfigError> {
    let key = &keys::PD_BUFFER_SIZE;
    let entry = raw.written(key)?;
    let asked_bytes = raw.must(key, RawConfig::size)?;
    let chunk_bytes = layout.chunk_bytes();
    let chunk = format!("chunk of {chunk_bytes} bytes ({} tokens of {})", layout.chunk_tokens, layout.model);
    let slots = asked_bytes / chunk_bytes;
    if slots == 0 {
        return Err(entry.refused(
            format!("smaller than one {chunk}"),
            format!("raise it to at least {}", exact_size(chunk_bytes)),
        ));
    }
    let slot_count = u32::try_from(slots).ok().filter(|count| *count <= SLOT_COUNT_MAX).ok_or_else(|| {
        let most_bytes = chunk_bytes.saturating_mul(SLOT_COUNT_MAX.into());
        entry.refused(
            format!("that is {slots} slots of one {chunk}, and a buffer has at most {SLOT_COUNT_MAX}"),
            format!("lower it to at most {}, or raise chunk_size", exact_size(most_bytes)),
        )
    })?;
    let used_bytes = slots * chunk_bytes;
    notes.say(format!(
        "pd_buffer: {asked_bytes} bytes asked, {used_bytes} used: {slot_count} slots of one {chunk}, {} bytes left over",
        asked_bytes - used_bytes
    ));
    if slot_count < parts {
        let parked = if parts == 4 { ", and with pd_rendezvous_port two for what is parked and sent" } else { "" };
        return Err(entry.refused(
            format!("that is {slot_count} slots of one {chunk}, and with pd_role: both there must be one for each direction{parked}"),
            format!("raise it to at least {}", exact_size(chunk_bytes.saturating_mul(parts.into()))),
        ));
    }
    let capacity_tokens = u64::from(slot_count / parts) * u64::from(layout.chunk_tokens);
    let tokens = raw.must(&keys::PD_MAX_PREFILL_LEN, RawConfig::whole)?;
    if u64::from(tokens) > capacity_tokens {
        let chunks = u64::from(tokens).div_ceil(layout.chunk_tokens.into());
        let needed = exact_size(chunks.saturating_mul(parts.into()).saturating_mul(chunk_bytes));
        return Err(raw.written(&keys::PD_MAX_PREFILL_LEN)?.refused(
            format!("the pd_buffer holds {capacity_tokens} tokens{}", if parts > 1 { " for each use" } else { "" }),
            format!("raise pd_buffer_size to at least {needed}, or lower it"),
        ));
    }
    let (initial_slot_count, step_slot_count) = growth(raw, slot_count, asked_bytes, chunk_bytes, notes)?;
    let device = buffer_device(raw, rank)?;
    if device != BufferDevice::Cpu && initial_slot_count < slot_count {
        return Err(raw.written(&keys::PD_BUFFER_INITIAL_SIZE)?.refused(
            format!(
                "with pd_buffer_device: {device} the pd_buffer cannot grow, since GPU memory that other processes can open \
                 is allocated in one piece"
            ),
            format!("leave it out, and lower pd_buffer_size if {} is too much", exact_size(used_bytes)),
        ));
    }
    Ok(BufferConfig { device, asked_bytes, slot_count, initial_slot_count, step_slot_count })
}

/// Slots at the start, and in a step.
fn growth(
    raw: &RawConfig,
    slot_count: u32,
    asked_bytes: u64,
    chunk_bytes: u64,
    notes: &mut Notes,
) -> Result<(u32, u32), ConfigError> {
    // Steps behind the first piece.
    const STEPS_MAX: u32 = (BUFFER_PIECES_MAX - 1) as u32;
    let whole_slots = |bytes: u64| u32::try_from(bytes / chunk_bytes).unwrap_or(u32::MAX).clamp(1, slot_count);
    let step_key = &keys::PD_BUFFER_GROWTH_STEP;
    let step = raw.size(step_key)?.map(whole_slots);
    let Some(initial_bytes) = raw.size(&keys::PD_BUFFER_INITIAL_SIZE)? else {
        if step.is_some() {
            notes.say(format!(
                "{} has no effect here: the pd_buffer does not grow without {}",
                step_key.name,
                keys::PD_BUFFER_INITIAL_SIZE.name
            ));
        }
        return Ok((slot_count, slot_count));
    };
    if initial_bytes > asked_bytes {
        return Err(raw.written(&keys::PD_BUFFER_INITIAL_SIZE)?.refused(
            format!("above pd_buffer_size, which is {}", exact_size(asked_bytes)),
            "lower it, or leave it out for a buffer that has its whole size from the start",
        ));
    }
    let initial = whole_slots(initial_bytes);
    if initial == slot_count {
        return Ok((slot_count, slot_count));
    }
    let least = (slot_count - initial).div_ceil(STEPS_MAX);
    let step = match step {
        None => initial.max(least),
        Some(step) if step >= least => step,
        Some(_) => {
            return Err(raw.written(step_key)?.refused(
                format!("the pd_buffer would take more than {STEPS_MAX} steps, each of which every peer is told of"),
                format!("raise it to at least {}", exact_size(u64::from(least) * chunk_bytes)),
            ));
        }
    };
    notes.say(format!(
        "pd_buffer: lazy, {initial} of {slot_count} slots ({} bytes) at the start, {step} slots ({} bytes) in a step",
        u64::from(initial) * chunk_bytes,
        u64::from(step) * chunk_bytes
    ));
    Ok((initial, step))
}

fn buffer_device(raw: &RawConfig, rank: u32) -> Result<BufferDevice, ConfigError> {
    const DEVICE_MAX: u32 = 1023;
    let key = &keys::PD_BUFFER_DEVICE;
    let text = raw.must(key, RawConfig::text)?;
    let number = |digits: &str| {
        let all_digits = digits.bytes().all(|b| b.is_ascii_digit());
        digits.parse().ok().filter(|device| all_digits && *device <= DEVICE_MAX)
    };
    match text.as_str() {
        "cpu" => Ok(BufferDevice::Cpu),
        "cuda" => Ok(BufferDevice::Cuda(rank)),
        other => match other.strip_prefix("cuda:").and_then(number) {
            Some(device) => Ok(BufferDevice::Cuda(device)),
            None => Err(raw.written(key)?.bad(key)),
        },
    }
}

fn engine(raw: &RawConfig) -> Result<EngineConfig, ConfigError> {
    const BACKENDS_MAX: usize = 16;
    /// The plugin that is used where none is named.
    const NIXL_BACKEND: &str = "UCX";
    let checksum = raw.must(&keys::PD_CHECKSUM, RawConfig::word)?;
    let checksums = [ChecksumMode::Off, ChecksumMode::Sampled, ChecksumMode::Full];
    let nixl_backends = raw.must(&keys::NIXL_BACKENDS, |raw, key| raw.names(key, BACKENDS_MAX))?;
    let nixl_lib_dir = raw.text(&keys::PD_NIXL_LIB_DIR)?.map(PathBuf::from);
    // Who says where NIXL is, or which of its plugins to use, means NIXL: without it there is nothing that this says.
    let means_nixl = nixl_lib_dir.is_some() || nixl_backends != [NIXL_BACKEND];
    let named = raw.word(&keys::TRANSFER_CHANNEL)?.and_then(|name| name.parse().ok());
    Ok(EngineConfig {
        kind: named.or(means_nixl.then_some(EngineKind::Nixl)),
        nixl_backends,
        nixl_lib_dir,
        checksum: checksums.into_iter().find(|mode| mode.as_str() == checksum).unwrap_or_default(),
        nixl_progress_delay_us: raw.must(&keys::PD_NIXL_PROGRESS_DELAY_US, RawConfig::whole)?.into(),
    })
}

/// Says which ports can be reached from elsewhere, and who may talk there.
fn warn_of_open_ports(hosts: &Hosts, ports: &Ports, has_secret: bool, notes: &mut Notes) {
    let cure = "keep it inside a trusted network, or give all daemons a pd_shared_secret_file";
    if !has_secret && ports.init.is_some() && !is_loopback(&hosts.peer) {
        let host = &hosts.peer;
        notes.warn(format!("pd_peer_host = {host}: whoever reaches these ports can fill the pd_buffer; {cure}"));
    }
    if !has_secret && ports.rendezvous.is_some() && !is_loopback(&hosts.rendezvous) {
        let host = &hosts.rendezvous;
        notes.warn(format!(
            "pd_rendezvous_host = {host}: whoever reaches this port can have parked chunks sent to any receiver; {cure}"
        ));
    }
    if ports.metrics.is_some() && !is_loopback(&hosts.metrics) {
        let host = &hosts.metrics;
        notes.say(format!(
            "pd_metrics_host = {host}: whoever reaches this port can read the metrics; keep it inside a trusted network"
        ));
    }
}

fn advertise_host(role: Role, raw: &RawConfig) -> Result<Option<String>, ConfigError> {
    let key = &keys::PD_ADVERTISE_HOST;
    match (raw.host(key)?, raw.entry(key)) {
        (Some(host), Some(entry)) if stands_for_all(&host) => Err(entry.refused(
            format!("{host} stands for every address, and senders are told to connect to it"),
            "write one address or name of this host that senders reach",
        )),
        (host, _) => Ok(host.filter(|_| role.receives())),
    }
}

/// The hosts that are asked for parked chunks. A file may have them for a daemon without an incoming half: then there are none.
fn prefill_hosts(
    role: Role,
    raw: &RawConfig,
    has_secret: bool,
    notes: &mut Notes,
) -> Result<Option<HostList>, ConfigError> {
    let key = &keys::PD_PREFILL_HOSTS;
    let Some(entry) = raw.entry(key) else {
        if role.receives() && !has_secret {
            notes.warn(format!(
                "{} is not set, and there is no pd_shared_secret_file: any host is asked for parked chunks that a request's \
                 kv_transfer_params name, and any client of the decode server can send those; list the prefill servers, or \
                 give all daemons a pd_shared_secret_file",
                key.name
            ));
        }
        return Ok(None);
    };
    let items = match &entry.value {
        RawValue::List(items) => items.as_slice(),
        one => std::slice::from_ref(one),
    };
    let mut hosts = HostList::default();
    for item in items {
        match item {
            RawValue::Text(text) if hosts.insert(text) => {}
            _ => return Err(entry.bad(key)),
        }
    }
    Ok(Some(hosts).filter(|_| role.receives()))
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.starts_with("127.") || host == "::1"
}

fn proxy(role: Role, raw: &RawConfig) -> Result<Option<ProxyConfig>, ConfigError> {
    let skip = raw.must(&keys::PD_SKIP_PROXY_NOTIFICATION, RawConfig::boolean)?;
    let host = raw.host(&keys::PD_PROXY_HOST)?;
    let port = match raw.ports(&keys::PD_PROXY_PORT)?.as_deref() {
        None => None,
        Some([port]) if *port != 0 => Some(*port),
        Some(_) => return Err(raw.written(&keys::PD_PROXY_PORT)?.bad(&keys::PD_PROXY_PORT)),
    };
    if !role.sends() || skip {
        return Ok(None);
    }
    let alone = |present: &'static Key, absent: &Key| -> Result<Option<ProxyConfig>, ConfigError> {
        Err(raw.written(present)?.refused(
            format!("`{}` is missing", absent.name),
            "give both, or neither, or pd_skip_proxy_notification: true",
        ))
    };
    match (host, port) {
        (Some(host), Some(port)) => Ok(Some(ProxyConfig { host, port })),
        (None, None) => Ok(None),
        (Some(_), None) => alone(&keys::PD_PROXY_HOST, &keys::PD_PROXY_PORT),
        (None, Some(_)) => alone(&keys::PD_PROXY_PORT, &keys::PD_PROXY_HOST),
    }
}

fn connector_endpoint(role: Role, raw: &RawConfig, layout: &KvLayout) -> Result<Option<String>, ConfigError> {
    let key = &keys::PD_CONNECTOR_ENDPOINT;
    let Some(written) = raw.text(key)? else {
        return Ok(None);
    };
    let entry = raw.written(key)?;
    if layout.tp_size > 1 && !written.contains("{rank}") {
        return Err(entry.refused(
            format!("the daemons of {} ranks cannot share one endpoint", layout.tp_size),
            "put {rank} into it, or leave it out",
        ));
    }
    let endpoint = written.replace("{role}", role.as_str()).replace("{rank}", &layout.tp_rank.to_string());
    match endpoint.strip_prefix("ipc://") {
        Some(path) if path.starts_with('/') && path.len() <= ENDPOINT_PATH_LEN_BYTES_MAX => Ok(Some(endpoint)),
        _ => Err(entry.bad(key)),
    }
}

fn deadlines(role: Role, raw: &RawConfig, notes: &mut Notes) -> Result<Deadlines, ConfigError> {
    let mut seconds = |key: &Key| raw.must_of(role, key, |raw, key| raw.seconds(key, notes));
    let heartbeat = seconds(&keys::PD_HEARTBEAT_INTERVAL_SEC)?;
    let peer = seconds(&keys::PD_PEER_TIMEOUT_SEC)?;
    if peer <= heartbeat {
        let key = if raw.entry(&keys::PD_PEER_TIMEOUT_SEC).is_some() {
            &keys::PD_PEER_TIMEOUT_SEC
        } else {
            &keys::PD_HEARTBEAT_INTERVAL_SEC
        };
        return Err(raw.written(key)?.refused(
            format!(
                "pings are {} s apart, and a peer would be given up after {} s without any",
                heartbeat.as_secs_f64(),
                peer.as_secs_f64()
            ),
            "make pd_peer_timeout_sec some times pd_heartbeat_interval_sec",
        ));
    }
    Ok(Deadlines {
        heartbeat,
        peer,
        allocation: seconds(&keys::PD_ALLOCATION_TIMEOUT_SEC)?,
        handshake: seconds(&keys::PD_HANDSHAKE_TIMEOUT_SEC)?,
        write: seconds(&keys::PD_WRITE_TIMEOUT_SEC)?,
        commit: seconds(&keys::PD_COMMIT_TIMEOUT_SEC)?,
        wait: seconds(&keys::PD_WAIT_TIMEOUT_SEC)?,
        retention: seconds(&keys::PD_RETENTION_SEC)?,
        lease: seconds(&keys::PD_LEASE_SEC)?,
        shutdown: seconds(&keys::PD_SHUTDOWN_TIMEOUT_SEC)?,
    })
}

fn limits(role: Role, raw: &RawConfig) -> Result<Limits, ConfigError> {
    let limit = |key| raw.must_of(role, key, RawConfig::whole);
    Ok(Limits {
        requests_max: limit(&keys::PD_MAX_REQUESTS)?,
        peer_requests_max: limit(&keys::PD_MAX_PEER_REQUESTS)?,
        request_chunks_max: limit(&keys::PD_MAX_REQUEST_CHUNKS)?,
        peers_max: limit(&keys::PD_MAX_PEERS)?,
        clients_max: limit(&keys::PD_MAX_CLIENTS)?,
    })
}

/// Keys of LMCache's that change nothing here: still checked, so that a file that LMCache refuses is refused here.
fn note_what_has_no_effect(raw: &RawConfig, notes: &mut Notes) -> Result<(), ConfigError> {
    raw.word(&keys::PD_BACKEND_MODE)?;
    raw.seconds(&keys::PD_CONDITION_POLL_INTERVAL_SEC, &mut Notes::default())?;
    let why = [
        (&keys::PD_BACKEND_MODE, "both kinds of peer are served"),
        (&keys::PD_CONDITION_POLL_INTERVAL_SEC, "nothing here waits by polling a condition"),
    ];
    for (key, reason) in why {
        if raw.entry(key).is_some() {
            notes.say(format!("{} has no effect here: {reason}", key.name));
        }
    }
    if !raw.older_names.is_empty() {
        notes.say(format!("older names of keys, understood: {}", raw.older_names.join(", ")));
    }
    if !raw.lmcache_keys.is_empty() {
        notes.say(format!("LMCache's keys that do not concern this daemon: {}", raw.lmcache_keys.join(", ")));
    }
    Ok(())
}

/// Names the written keys that only one half uses: all of them where the daemon has both, or else those of the half that
/// it lacks, so that nobody waits for an effect that does not come.
fn note_keys_of_one_half(role: Role, raw: &RawConfig, notes: &mut Notes) {
    for (half, using, other) in [(Role::Sender, "outgoing", "incoming"), (Role::Receiver, "incoming", "outgoing")] {
        let entries = keys::KEYS.iter().filter(|key| key.of == half).filter_map(|key| raw.entry(key));
        let written: Vec<&str> = entries.map(|entry| entry.written.as_str()).collect();
        if written.is_empty() || role == half {
            continue;
        }
        let names = written.join(", ");
        notes.say(match role {
            Role::Both => format!("{names}: used by the {using} half, ignored by the {other} half"),
            _ => format!("{names}: used by the {using} half, which this {} does not have; ignored", role.daemon()),
        });
    }
}
