//! The shipped configurations with every shipped model, and a table of configurations that must be refused.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pd_backend::config::{
    BufferDevice, Config, ConfigError, EngineKind, Loaded, MetricsConfig, Options, ProxyConfig, Role,
};
use pd_backend::ids::ReceiverAddress;
use proptest::prelude::*;

/// Shipped models with the bytes of their chunk of 256 tokens on one rank.
const MODELS: &[(&str, u64)] = &[
    ("llama-3-8b", 33_554_432),
    ("llama-3-70b", 83_886_080),
    ("qwen2.5-7b", 14_680_064),
    ("qwen3-8b", 37_748_736),
    ("mistral-7b", 33_554_432),
    ("deepseek-v3", 17_989_632),
];
/// The roles that a binary has by itself.
const BINARIES: [Role; 2] = [Role::Sender, Role::Receiver];

fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(path)
}

fn model(name: &str) -> PathBuf {
    shipped(&format!("models/{name}.json"))
}

/// Loads this text as `f.yaml` for Llama-3-8B; errors name the file without its folder.
fn load_text(role: Role, text: &str, change: impl FnOnce(&mut Options)) -> Result<Loaded, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("f.yaml");
    fs::write(&file, text).unwrap();
    let mut options = Options { config: Some(file), model: Some(model("llama-3-8b")), ..Options::default() };
    change(&mut options);
    Config::load(role, &options).map_err(|error| {
        let text = error.to_string();
        text.replace(&format!("{}/", folder.path().display()), "")
            .replace(&format!("{}/", shipped("models").display()), "")
    })
}

fn load(role: Role, text: &str) -> Result<Loaded, String> {
    load_text(role, text, |_| {})
}

/// Enough for a receiver, for tests of other keys.
const MINIMAL: &str = "pd_buffer_size: 1GiB\npd_peer_init_port: 0\npd_peer_alloc_port: 0\n";

/// Keys that only one half uses, besides the ports, with other values than their defaults.
const OF_ONE_HALF: &str = "pd_peer_host: 127.0.0.2\npd_peer_query_port: 7600\npd_receivers: [a:1:2]\npd_proxy_host: p\n\
    pd_proxy_port: 7500\npd_commit_timeout_sec: 1\npd_wait_timeout_sec: 2\npd_retention_sec: 3\npd_max_peer_requests: 4\n";

const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn secret_file(mode: u32, content: impl AsRef<[u8]>) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, content).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    file
}

#[test]
fn a_secret_is_read_from_a_file_that_others_cannot_read() {
    // Broken in production: everybody on the machine reads the secret, or a secret of a few letters counts as one.
    let text = |path: &Path| format!("{MINIMAL}pd_shared_secret_file: {}\n", path.display());
    let with = |mode, content: &[u8]| {
        let file = secret_file(mode, content);
        load(Role::Receiver, &text(file.path())).map_err(|error| error.replace(&file.path().display().to_string(), "F"))
    };
    let kept: Vec<_> = [0o600, 0o400, 0o440, 0o640]
        .into_iter()
        .map(|mode| with(mode, format!("{SECRET}\n").as_bytes()).unwrap().config.shared_secret.unwrap().secret)
        .collect();
    assert_eq!(kept[0].expose(), SECRET.as_bytes());
    assert!(kept.iter().all(|secret| *secret == kept[0]));
    for (mode, content, error) in [
        (
            0o644,
            SECRET,
            "f.yaml:4: pd_shared_secret_file = \"F\": its mode 0644 gives others a right to it; chmod 0600 it, and make a new secret if others may have read it",
        ),
        (
            0o620,
            SECRET,
            "f.yaml:4: pd_shared_secret_file = \"F\": its mode 0620 gives others a right to it; chmod 0600 it, and make a new secret if others may have read it",
        ),
        (
            0o600,
            " 0123456789abcdef0123456789abcde \n",
            "f.yaml:4: pd_shared_secret_file = \"F\": it holds a secret of 31 bytes; expected 32 to 4096; make one with: openssl rand -hex 32",
        ),
        (
            0o600,
            "",
            "f.yaml:4: pd_shared_secret_file = \"F\": it holds a secret of 0 bytes; expected 32 to 4096; make one with: openssl rand -hex 32",
        ),
    ] {
        assert_eq!(with(mode, content.as_bytes()).unwrap_err(), error);
    }
    assert!(with(0o600, &[b'x'; 5000]).unwrap_err().contains("a secret of 5000 bytes"));
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::from(0o600), 0).unwrap();
    for (path, error) in [
        (folder.path().join("absent"), "cannot be read: No such file or directory"),
        (folder.path().to_owned(), "it is no regular file"),
        (pipe, "it is no regular file"),
    ] {
        let seen = load(Role::Receiver, &text(&path)).unwrap_err();
        assert!(seen.contains(error), "{seen}");
    }
}

#[test]
fn a_secret_is_shown_nowhere() {
    // Broken in production: --check, or the log at start, hands the secret to whoever reads it.
    let file = secret_file(0o600, SECRET);
    let text = format!("{MINIMAL}pd_peer_host: 0.0.0.0\npd_shared_secret_file: {}\n", file.path().display());
    let Loaded { config, notes, warnings } = load(Role::Receiver, &text).unwrap();
    let path = file.path().display().to_string();
    assert!(config.to_yaml().contains(&format!("\npd_shared_secret_file: \"{path}\"\n")), "{}", config.to_yaml());
    assert!(config.to_line().contains(&path));
    assert_eq!(load(Role::Receiver, &config.to_yaml()).unwrap().config, config);
    for shown in [config.to_yaml(), config.to_line(), format!("{config:?}"), notes.join("\n"), warnings.join("\n")] {
        assert!(!shown.contains(SECRET) && !shown.contains(&format!("{:?}", SECRET.as_bytes())), "{shown}");
    }
    // With one, a port that others can reach is not worth a warning, nor which hosts a request names.
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn every_shipped_file_serves_every_model() {
    // Broken in production: a user starts a shipped file with another model and is refused, or gets wrong slots.
    for file in ["sender.yaml", "receiver.yaml", "loopback.yaml", "both.yaml"] {
        for role in BINARIES {
            for (name, chunk_bytes) in MODELS {
                let options = Options { config: Some(shipped(file)), model: Some(model(name)), ..Options::default() };
                let loaded = Config::load(role, &options);
                let other_role =
                    matches!((file, role), ("sender.yaml", Role::Receiver) | ("receiver.yaml", Role::Sender));
                if other_role {
                    assert!(loaded.unwrap_err().to_string().contains("pd_role"), "{file} {role:?}");
                    continue;
                }
                let config = loaded.unwrap().config;
                assert_eq!(config.role, if file == "both.yaml" { Role::Both } else { role }, "{file}");
                assert_eq!(config.layout.chunk_bytes(), *chunk_bytes, "{name}");
                assert!(config.buffer.slot_count >= 8, "{file} {name}");
                assert!(config.buffer_len_bytes() <= config.buffer.asked_bytes);
            }
        }
    }
}

#[test]
fn the_defaults_that_the_files_state_are_the_defaults() {
    // Broken in production: the documentation of a key states a default that it does not have.
    for (file, role) in [
        ("sender.yaml", Role::Sender),
        ("receiver.yaml", Role::Receiver),
        ("loopback.yaml", Role::Sender),
        ("loopback.yaml", Role::Receiver),
        ("both.yaml", Role::Sender),
        ("both.yaml", Role::Receiver),
    ] {
        let text = fs::read_to_string(shipped(file)).unwrap();
        let defaults: Vec<String> = text
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => rest.to_owned(),
                _ => line.to_owned(),
            })
            .collect();
        assert!(defaults.iter().filter(|line| !line.is_empty() && !line.starts_with('#')).count() > 20, "{file}");
        assert_eq!(load(role, &text).unwrap().config, load(role, &defaults.join("\n")).unwrap().config, "{file}");
    }
}

#[test]
fn the_examples_in_the_files_are_accepted() {
    // Broken in production: a user takes the # from an example and is refused.
    for (file, binary) in [
        ("sender.yaml", Role::Sender),
        ("receiver.yaml", Role::Receiver),
        ("both.yaml", Role::Sender),
        ("both.yaml", Role::Receiver),
    ] {
        let secret = secret_file(0o600, SECRET);
        let text = fs::read_to_string(shipped(file)).unwrap().replace("#? ", "");
        assert!(text.contains("\npd_shared_secret_file: /etc/pd-backend/secret\n"), "{file}");
        let text = text.replace("/etc/pd-backend/secret", &secret.path().display().to_string());
        let config = load(binary, &text).unwrap().config;
        let role = config.role;
        assert_eq!(config.engine.kind, Some(EngineKind::Nixl));
        assert_eq!(config.connector_endpoint, Some(format!("ipc:///tmp/pd-{}-0.sock", role.as_str())));
        let proxy = ProxyConfig { host: "127.0.0.1".to_owned(), port: 7500 };
        assert_eq!(config.proxy, role.sends().then_some(proxy));
        assert_eq!(config.query_port, role.receives().then_some(7600));
    }
}

#[test]
fn a_daemon_has_what_its_halves_use() {
    // Broken in production: a daemon with both halves lacks a port or a receiver, or one half changes the other's daemon.
    let of = |binary, text: &str| load(binary, text).unwrap().config;
    let sending = |config: &Config| {
        let to = config.receivers.first().map(|address| address.host.clone());
        (to, config.proxy.as_ref().map(|proxy| proxy.port), config.deadlines.commit.as_secs())
    };
    let receiving = |config: &Config| {
        let times = (config.deadlines.wait.as_secs(), config.deadlines.retention.as_secs());
        let ports = (config.init_port, config.alloc_port, config.query_port);
        (config.bind_host.clone(), ports, times, config.limits.peer_requests_max)
    };
    let sends = (Some("a".to_owned()), Some(7500), 1);
    let sends_nothing = (None, None, 10);
    let receives = ("127.0.0.2".to_owned(), (7300, 7400, Some(7600)), (2, 3), 4);
    let by_default = |ports| ("127.0.0.1".to_owned(), ports, (120, 300), 512);

    let text = format!("pd_buffer_size: 1GiB\npd_peer_init_port: 7300\npd_peer_alloc_port: 7400\n{OF_ONE_HALF}");
    let sender = of(Role::Sender, &text);
    assert_eq!((sender.role, sending(&sender)), (Role::Sender, sends.clone()));
    assert_eq!(receiving(&sender), by_default((0, 0, None)));
    let receiver = of(Role::Receiver, &text);
    assert_eq!((receiver.role, sending(&receiver)), (Role::Receiver, sends_nothing.clone()));
    assert_eq!(receiving(&receiver), receives);
    // Whichever binary runs it, under today's key and the older one, in a file and over one.
    for line in ["pd_role: both\n", "nixl_role: both\n"] {
        let [one, other] = BINARIES.map(|binary| of(binary, &format!("{text}{line}")));
        assert_eq!((one.role, sending(&one), receiving(&one)), (Role::Both, sends.clone(), receives.clone()));
        assert_eq!(one, other);
    }
    for (binary, written) in [(Role::Sender, "sender"), (Role::Receiver, "receiver")] {
        let set = |options: &mut Options| options.set.push("pd_role=both".to_owned());
        let over = load_text(binary, &format!("{text}pd_role: {written}\n"), set).unwrap().config;
        assert_eq!(over.role, Role::Both);
        // What a file says can be taken back.
        let unset = |options: &mut Options| options.set.push("pd_role=".to_owned());
        let back = load_text(binary, &format!("{text}pd_role: both\n"), unset).unwrap().config;
        assert_eq!(back, of(binary, &text));
    }
    // With nothing said.
    let both = of(Role::Sender, &format!("{MINIMAL}pd_role: both\n"));
    assert_eq!((sending(&both), receiving(&both)), (sends_nothing, by_default((0, 0, None))));
}

#[test]
fn a_file_without_a_role_serves_either_binary() {
    // Broken in production: a file that a pd-sender and a pd-receiver share starts two daemons with both halves.
    for (binary, written) in [(Role::Sender, "sender"), (Role::Receiver, "receiver")] {
        for line in ["", "pd_role:\n", "nixl_role: null\n"] {
            let config = load(binary, &format!("{MINIMAL}{line}")).unwrap().config;
            assert_eq!(config, load(binary, &format!("{MINIMAL}pd_role: {written}\n")).unwrap().config);
            assert_eq!(config.role, binary);
        }
    }
}

#[test]
fn keys_of_one_half_are_accepted_and_named() {
    // Broken in production: an operator sets a key that this daemon ignores, and waits for its effect.
    const OUTGOING: &str =
        "pd_receivers, pd_proxy_host, pd_proxy_port, pd_commit_timeout_sec: used by the outgoing half, ";
    const INCOMING: &str = "pd_peer_host, pd_peer_init_port, pd_peer_alloc_port, pd_peer_query_port, pd_wait_timeout_sec, \
                            pd_retention_sec, pd_max_peer_requests: used by the incoming half, ";
    let notes = |binary, text: &str| -> Vec<String> {
        let notes = load(binary, text).unwrap().notes;
        notes.into_iter().filter(|note| note.contains(" half, ")).collect()
    };
    let all = format!("{MINIMAL}{OF_ONE_HALF}");
    assert_eq!(notes(Role::Sender, &all), [format!("{INCOMING}which this pd-sender does not have; ignored")]);
    assert_eq!(notes(Role::Receiver, &all), [format!("{OUTGOING}which this pd-receiver does not have; ignored")]);
    for binary in BINARIES {
        let expected =
            [format!("{OUTGOING}ignored by the incoming half"), format!("{INCOMING}ignored by the outgoing half")];
        assert_eq!(notes(binary, &format!("{all}pd_role: both\n")), expected);
    }
    // Named as they are written; and a key that is null, or that both halves use, is none of one half.
    let text =
        "pd_buffer_size: 1GiB\nnixl_proxy_host: p\nnixl_proxy_port: 1\npd_receivers: null\npd_write_timeout_sec: 5\n";
    assert_eq!(
        notes(Role::Receiver, &format!("{text}pd_peer_init_port: 0\npd_peer_alloc_port: 0\n")),
        ["nixl_proxy_host, nixl_proxy_port: used by the outgoing half, which this pd-receiver does not have; ignored"]
    );
    assert_eq!(notes(Role::Sender, text), Vec::<String>::new());
}

#[test]
fn metrics_are_served_on_loopback_unless_something_else_is_said() {
    // Broken in production: metrics are open to the network by default, or the ranks of one host fight for a port.
    let metrics = |line: &str| load(Role::Sender, &format!("{MINIMAL}{line}")).unwrap();
    let on = |host: &str, port| Some(MetricsConfig { host: host.to_owned(), port });
    assert_eq!(metrics("").config.metrics, on("127.0.0.1", 0));
    assert_eq!(metrics("pd_metrics_port: [9400, 9401]").config.metrics, on("127.0.0.1", 9400));
    assert_eq!(metrics("pd_metrics_port: none").config.metrics, None);
    let open = metrics("pd_metrics_host: 0.0.0.0\npd_metrics_port: 9400");
    assert_eq!(open.config.metrics, on("0.0.0.0", 9400));
    assert!(open.notes.iter().any(|note| note.contains("pd_metrics_host = 0.0.0.0")), "{:?}", open.notes);
    for (line, word) in [
        ("pd_metrics_port: off", "none"),
        ("pd_metrics_port: 65536", "65535"),
        ("pd_metrics_port: false", "none"),
        ("pd_metrics_host: http://x", "without scheme"),
    ] {
        let refusal = load(Role::Sender, &format!("{MINIMAL}{line}\n")).unwrap_err();
        assert!(refusal.contains(word), "{line}: {refusal}");
    }
    let second_rank = |options: &mut Options| (options.rank, options.tp_size) = (1, Some(2));
    let text = format!("{MINIMAL}pd_metrics_port: [9400]\n");
    let refusal = load_text(Role::Sender, &text, second_rank).unwrap_err();
    assert!(refusal.contains("pd_metrics_port") && refusal.contains("rank 1"), "{refusal}");
}

#[test]
fn a_detour_of_gpu_bytes_is_said() {
    // Broken in production: an operator turns checksums on and wonders why chunks of GPUs pass through the host.
    let notes = |lines: &str| load(Role::Sender, &format!("{MINIMAL}{lines}")).unwrap().notes.join("\n");
    assert!(notes("pd_buffer_device: cuda\npd_checksum: full\n").contains("copied from the GPU to the host"));
    assert!(!notes("pd_checksum: full\n").contains("GPU"));
    assert!(!notes("pd_buffer_device: cuda\n").contains("copied"));
}

#[test]
fn what_check_prints_means_the_same() {
    // Broken in production: --check shows an operator another configuration than the one that runs.
    let rich = "pd_buffer_size: 1000000007\npd_buffer_device: cuda:3\npd_peer_init_port: 7300\npd_peer_alloc_port: 7400\n\
        pd_peer_query_port: 7600\npd_proxy_host: proxy-0.example\npd_proxy_port: 7500\nkv_cache_dtype: fp8\nchunk_size: 16\n\
        model_name: \"a: odd #name\"\npd_retention_sec: 0.25\ntransfer_channel: local\nnixl_backends: [UCX, POSIX]\n\
        pd_nixl_lib_dir: /opt/x y\npd_connector_endpoint: ipc:///tmp/{role}.sock\npd_metrics_host: \"::1\"\npd_metrics_port: 9400\n\
        pd_receivers: [10.0.0.2:7300:7400, \"[::1]:7310:7410\"]\n";
    for role in BINARIES {
        let lazy = format!("{MINIMAL}pd_buffer_initial_size: 100MB\n");
        let unwatched = format!("{MINIMAL}pd_metrics_port: none\n");
        // Found by the fuzz target config_yaml: a sender kept what it does not use, and did not show it.
        let elsewhere = format!("{MINIMAL}pd_peer_host: 254.0.0.1\n");
        // The same of the keys that only the other half uses.
        let halves = format!("{MINIMAL}{OF_ONE_HALF}");
        let both = format!("{halves}pd_role: both\n");
        for text in [rich, MINIMAL, &lazy, &unwatched, &elsewhere, &halves, &both] {
            let config = load(role, text).unwrap().config;
            let printed = config.to_yaml();
            let read_back = load(role, &printed).unwrap();
            assert_eq!(read_back.config, config, "{printed}");
            assert!(!config.to_line().contains('\n'));
        }
    }
    let printed = load(Role::Receiver, MINIMAL).unwrap().config.to_yaml();
    assert!(printed.starts_with(
        "# pd-receiver, rank 0 of 1\n# one chunk: 256 tokens of 131072 bytes, 33554432 bytes in all (32MiB)\n"
    ));
    assert!(printed.contains("\npd_allocation_timeout_sec: 30  # seconds\n"), "{printed}");
    let both = load(Role::Receiver, &format!("{MINIMAL}pd_role: both\n")).unwrap().config;
    assert!(both.to_yaml().starts_with("# a daemon with both halves, rank 0 of 1\n"), "{}", both.to_yaml());
    assert!(both.to_yaml().contains("\npd_role: both\n") && both.to_line().starts_with("role=both rank=0/1 "));
}

#[test]
fn an_older_lmcache_file_is_understood_and_says_so_once() {
    // Broken in production: users of LMCache must keep two files in step.
    let text = "local_cpu: false\nmax_local_cpu_size: 0\nremote_serde: NULL\nenable_nixl: true\nenable_xpyd: true\n\
        nixl_role: \"receiver\"\nnixl_peer_host: \"localhost\"\nnixl_peer_init_port: 7300\nnixl_peer_alloc_port: 7400\n\
        nixl_buffer_size: 4294967296\nnixl_buffer_device: \"cuda\"\npd_backend_mode: sync\nextra_config: {a: 1}\n";
    let loaded = load(Role::Receiver, text).unwrap();
    assert_eq!(loaded.config.bind_host, "localhost");
    assert_eq!((loaded.config.init_port, loaded.config.alloc_port, loaded.config.query_port), (7300, 7400, None));
    assert_eq!(loaded.config.buffer.device, BufferDevice::Cuda(0));
    assert_eq!(
        loaded.notes,
        [
            "pd_buffer: 4294967296 bytes asked, 4294967296 used: 128 slots of one chunk of 33554432 bytes (256 tokens of meta-llama/Meta-Llama-3-8B), 0 bytes left over",
            "pd_backend_mode has no effect here: both kinds of peer are served",
            "older names of keys, understood: enable_xpyd (now enable_pd), nixl_buffer_device (now pd_buffer_device), nixl_buffer_size (now pd_buffer_size), nixl_peer_alloc_port (now pd_peer_alloc_port), nixl_peer_host (now pd_peer_host), nixl_peer_init_port (now pd_peer_init_port), nixl_role (now pd_role)",
            "LMCache's keys that do not concern this daemon: local_cpu, max_local_cpu_size, remote_serde, enable_nixl, extra_config",
        ]
    );
}

#[test]
fn ranks_take_their_own_ports_and_devices() {
    // Broken in production: the second worker of a host binds the first one's ports or allocates on its GPU.
    let text = "pd_buffer_size: 1GiB\npd_buffer_device: cuda\npd_peer_init_port: [7300, 7301]\npd_peer_alloc_port: 7400,7401\n\
        pd_peer_query_port: 0\npd_connector_endpoint: ipc:///tmp/{role}-{rank}\n";
    let rank_one = |options: &mut Options| {
        options.rank = 1;
        options.tp_size = Some(2);
    };
    let config = load_text(Role::Receiver, text, rank_one).unwrap().config;
    assert_eq!((config.init_port, config.alloc_port, config.query_port), (7301, 7401, Some(0)));
    assert_eq!(config.buffer.device, BufferDevice::Cuda(1));
    assert_eq!((config.layout.tp_rank, config.layout.tp_size, config.layout.first_group().kv_heads), (1, 2, 4));
    assert_eq!(config.connector_endpoint.as_deref(), Some("ipc:///tmp/receiver-1"));
}

#[test]
fn a_sender_knows_the_receivers_of_its_rank() {
    // Broken in production: the second worker of a host meets the first one's receiver, or a receiver meets others.
    let text = format!("{MINIMAL}pd_receivers: [10.0.0.2:7300+7301:7400+7401, \"[fd00::3]:7310+7311:7410+7411\"]\n");
    let of = |role, rank: u32| {
        let change = |options: &mut Options| (options.rank, options.tp_size) = (rank, Some(4));
        load_text(role, &text, change).map(|loaded| loaded.config.receivers)
    };
    let at = |host: &str, init_port, alloc_port| ReceiverAddress { host: host.to_owned(), init_port, alloc_port };
    assert_eq!(of(Role::Sender, 0).unwrap(), [at("10.0.0.2", 7300, 7400), at("fd00::3", 7310, 7410)]);
    assert_eq!(of(Role::Sender, 1).unwrap(), [at("10.0.0.2", 7301, 7401), at("fd00::3", 7311, 7411)]);
    let refusal = of(Role::Sender, 2).unwrap_err();
    let expected = ": this is rank 2, and \"10.0.0.2:7300+7301:7400+7401\" has ports for 2 ranks; join one port per rank \
                    with +, as in 10.0.0.2:7300+7301:7400+7401";
    assert!(refusal.ends_with(expected), "{refusal}");
    assert_eq!(of(Role::Receiver, 2).unwrap(), []);
    let one = |line: &str| load(Role::Sender, &format!("{MINIMAL}{line}\n")).unwrap().config.receivers;
    assert_eq!(one("pd_receivers: decode-0.example:1:2"), [at("decode-0.example", 1, 2)]);
    assert_eq!(one("pd_receivers: []"), []);
    assert_eq!(one("pd_receivers: null"), []);
}

#[test]
fn infinite_waits_are_capped_and_noted() {
    // Broken in production: LMCache's own default, written out, is refused, or a request waits for ever.
    for value in [".inf", "inf", "\"inf\""] {
        let loaded = load(Role::Receiver, &format!("{MINIMAL}pd_allocation_timeout_sec: {value}\n")).unwrap();
        assert_eq!(loaded.config.deadlines.allocation, Duration::from_secs(86_400));
        assert!(loaded.notes.iter().any(|note| note.contains("is taken as 86400 seconds")), "{:?}", loaded.notes);
    }
}

#[test]
fn what_lets_anybody_in_is_a_warning() {
    // Broken in production: nobody is warned that unauthenticated peers can write into the buffer, or that a client of the decode
    // server chooses which hosts its daemon connects to.
    let warnings = |role, lines: &str| load(role, &format!("{MINIMAL}{lines}")).unwrap().warnings;
    let begin = |warnings: &[String], expected: &[&str]| {
        assert_eq!(warnings.len(), expected.len(), "{warnings:?}");
        for (warning, expected) in warnings.iter().zip(expected) {
            assert!(warning.starts_with(expected) && warning.contains("pd_shared_secret_file"), "{warning}");
        }
    };
    let (any, peer, rendezvous) =
        ("pd_prefill_hosts is not set", "pd_peer_host = 0.0.0.0: ", "pd_rendezvous_host = 0.0.0.0: ");
    let open = "pd_peer_host: 0.0.0.0\npd_rendezvous_host: 0.0.0.0\npd_rendezvous_port: 5600\n";
    begin(&warnings(Role::Receiver, open), &[peer, any]);
    begin(&warnings(Role::Sender, open), &[rendezvous]);
    begin(&warnings(Role::Sender, &format!("{open}pd_role: both\n")), &[peer, rendezvous, any]);
    begin(&warnings(Role::Receiver, "pd_prefill_hosts: [10.0.0.1]\n"), &[]);
    // Where nobody listens, nobody is let in.
    begin(&warnings(Role::Sender, "pd_rendezvous_host: 0.0.0.0\n"), &[]);
    for local in ["localhost", "127.0.0.1", "\"::1\""] {
        begin(&warnings(Role::Receiver, &format!("pd_peer_host: {local}\n")), &[any]);
    }
    let secret = secret_file(0o600, SECRET);
    begin(&warnings(Role::Receiver, &format!("{open}pd_shared_secret_file: {}\n", secret.path().display())), &[]);
}

#[test]
fn no_port_is_given_twice() {
    // Broken in production: a daemon ends after its start because a port of its own is in use, and names no key; or two workers of
    // a host fight for one, and the message says nothing of the list that both have it from.
    let refused = |role, lines: &str| load(role, &format!("pd_buffer_size: 1GiB\n{lines}")).err();
    let ports = "pd_peer_init_port: 7300\npd_peer_alloc_port: 7400\n";
    let advice = "give each its own port, or 0 for a free port";
    let both = format!("pd_role: both\n{ports}");
    for (lines, expected) in [
        (
            format!("{both}pd_metrics_port: 7300\n"),
            "f.yaml:5: pd_metrics_port = 7300: pd_peer_init_port of rank 0 is 7300 as well",
        ),
        (
            format!("{both}pd_rendezvous_port: 9400\npd_metrics_port: 9400\n"),
            "f.yaml:6: pd_metrics_port = 9400: pd_rendezvous_port of rank 0 is 9400 as well",
        ),
        (
            format!("{both}pd_rendezvous_port: 7400\n"),
            "f.yaml:5: pd_rendezvous_port = 7400: pd_peer_alloc_port of rank 0 is 7400 as well",
        ),
        (
            format!("{both}pd_peer_host: 10.0.0.1\npd_metrics_host: 0.0.0.0\npd_metrics_port: 7400\n"),
            "f.yaml:7: pd_metrics_port = 7400: pd_peer_alloc_port of rank 0 is 7400 as well",
        ),
        (
            format!("{both}pd_peer_host: localhost\npd_metrics_port: 7400\n"),
            "f.yaml:6: pd_metrics_port = 7400: pd_peer_alloc_port of rank 0 is 7400 as well",
        ),
        (
            format!("{both}pd_rendezvous_port: [5600, 5601, 5600]\n"),
            "f.yaml:5: pd_rendezvous_port = [5600, 5601, 5600]: ranks 0 and 2 have 5600 both",
        ),
        (
            format!("{both}pd_metrics_port: [9400, 7300]\n"),
            "f.yaml:5: pd_metrics_port = [9400, 7300]: pd_peer_init_port of rank 0 is 7300 as well",
        ),
    ] {
        assert_eq!(refused(Role::Sender, &lines), Some(format!("{expected}; {advice}")), "{lines}");
    }
    for fine in [
        // Any free port, as often as it is written.
        format!("{both}pd_rendezvous_port: 0\npd_metrics_port: 0\npd_peer_query_port: [0, 0]\n"),
        format!("{both}pd_peer_host: 10.0.0.1\npd_metrics_port: 7400\n"),
        format!("{both}pd_metrics_port: none\n"),
    ] {
        assert_eq!(refused(Role::Sender, &fine), None, "{fine}");
    }
    // The ports of the half that a daemon lacks are not bound.
    assert_eq!(refused(Role::Sender, &format!("{ports}pd_metrics_port: 7300\n")), None);
    assert_eq!(refused(Role::Receiver, &format!("{ports}pd_rendezvous_port: 7300\n")), None);
}

#[test]
fn the_connector_may_give_the_layout() {
    // Broken in production: an engine whose layout no config.json describes cannot be served.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layout.json");
    fs::write(&path, r#"{"model": "m", "chunk_bytes": 65536, "chunk_tokens": 16}"#).unwrap();
    let given = |options: &mut Options| {
        options.model = None;
        options.kv_layout = Some(path.clone());
    };
    let config = load_text(Role::Sender, "pd_buffer_size: 1MiB\n", given).unwrap().config;
    assert_eq!((config.buffer.slot_count, config.layout.chunk_bytes()), (16, 65_536));
    let error = load_text(Role::Sender, "pd_buffer_size: 1MiB\nchunk_size: 256\n", given).unwrap_err();
    assert!(
        error.ends_with(
            "layout.json: chunk_tokens = 16 contradicts 256 from chunk_size; leave one of them out, or make them equal"
        ),
        "{error}"
    );
    let error = load_text(Role::Sender, "pd_buffer_size: 1MiB\nkv_cache_dtype: fp8\n", given).unwrap_err();
    assert!(error.contains("layout.json says opaque; leave it out where the connector gives the layout"), "{error}");
}

#[test]
fn a_model_may_be_named_by_its_folder() {
    // Broken in production: the path that every engine takes is refused here.
    let folder = tempfile::tempdir().unwrap();
    fs::copy(model("qwen3-8b"), folder.path().join("config.json")).unwrap();
    let named = |options: &mut Options| options.model = Some(folder.path().to_owned());
    assert_eq!(load_text(Role::Receiver, MINIMAL, named).unwrap().config.layout.first_group().layers, 36);
}

#[test]
fn files_that_cannot_be_read_are_named() {
    // Broken in production: "no such file" without a name.
    let error = load_text(Role::Sender, MINIMAL, |options| options.config = Some("no/such.yaml".into())).unwrap_err();
    assert_eq!(error, "cannot read the configuration no/such.yaml: No such file or directory (os error 2)");
    let error = load_text(Role::Sender, MINIMAL, |options| options.model = Some("no/such.json".into())).unwrap_err();
    assert_eq!(error, "cannot read the model no/such.json: No such file or directory (os error 2)");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.json");
    fs::write(&path, vec![b' '; (4 << 20) + 1]).unwrap();
    let error = load_text(Role::Sender, MINIMAL, |options| options.model = Some(path.clone())).unwrap_err();
    assert!(error.ends_with("huge.json: it has more than 4194304 bytes"), "{error}");
    fs::write(&path, [0xff, 0xfe]).unwrap();
    let error = load_text(Role::Sender, MINIMAL, |options| options.model = Some(path)).unwrap_err();
    assert!(error.contains("UTF-8"), "{error}");
    let options = Options { set: vec!["pd_buffer_size=1GiB".to_owned()], ..Options::default() };
    assert!(matches!(Config::load(Role::Sender, &options), Err(ConfigError::NoLayout)));
}

/// A line after the minimal ones, and the whole text of the refusal. Lines that set one of the minimal keys replace it.
const REFUSED: &[(&str, &str)] = &[
    (
        "pd_advertise_host: \"::0\"",
        "f.yaml:4: pd_advertise_host = \"::0\": ::0 stands for every address, and senders are told to connect to it; write one address or name of this host that senders reach",
    ),
    (
        "pd_bufer_size: 1",
        "f.yaml:4: `pd_bufer_size` is not a known key; did you mean `pd_buffer_size`?; configs/sender.yaml and configs/receiver.yaml list all keys",
    ),
    ("enable_pd: false", "f.yaml:4: enable_pd = false: this daemon does nothing but PD; write true, or leave it out"),
    ("enable_pd: 1", "f.yaml:4: enable_pd = 1; expected true or false; write for example `enable_pd: true`"),
    (
        "pd_role: sender",
        "f.yaml:4: pd_role = \"sender\": this is pd-receiver, which accepts receiver or both; start pd-sender, or leave it out, or write both for a daemon that sends and receives",
    ),
    (
        "nixl_role: sender",
        "f.yaml:4: nixl_role = \"sender\": this is pd-receiver, which accepts receiver or both; start pd-sender, or leave it out, or write both for a daemon that sends and receives",
    ),
    (
        "pd_role: decoder",
        "f.yaml:4: pd_role = \"decoder\"; expected sender, receiver or both; write for example `pd_role: both`",
    ),
    (
        "pd_bidirectional: true",
        "f.yaml:4: pd_bidirectional = true: LMCache's way of reading KV back from a decode worker is not served; write false; for KV in both directions write pd_role: both at each end",
    ),
    (
        "pd_buffer_size: 1000",
        "f.yaml:1: pd_buffer_size = 1000: smaller than one chunk of 33554432 bytes (256 tokens of meta-llama/Meta-Llama-3-8B); raise it to at least 32MiB",
    ),
    (
        "pd_buffer_size: 33554431",
        "f.yaml:1: pd_buffer_size = 33554431: smaller than one chunk of 33554432 bytes (256 tokens of meta-llama/Meta-Llama-3-8B); raise it to at least 32MiB",
    ),
    (
        "pd_buffer_size: 0",
        "f.yaml:1: pd_buffer_size = 0: smaller than one chunk of 33554432 bytes (256 tokens of meta-llama/Meta-Llama-3-8B); raise it to at least 32MiB",
    ),
    (
        "pd_buffer_size: -1",
        "f.yaml:1: pd_buffer_size = -1; expected a whole number of bytes, or a number with one of B, KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000); write for example `pd_buffer_size: 4GiB`",
    ),
    (
        "pd_buffer_size: 4G",
        "f.yaml:1: pd_buffer_size = \"4G\"; expected a whole number of bytes, or a number with one of B, KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000); write for example `pd_buffer_size: 4GiB`",
    ),
    (
        "pd_buffer_size: 18446744073709551615",
        "f.yaml:1: pd_buffer_size = 18446744073709551615: that is 549755813887 slots of one chunk of 33554432 bytes (256 tokens of meta-llama/Meta-Llama-3-8B), and a buffer has at most 16777216; lower it to at most 512TiB, or raise chunk_size",
    ),
    (
        "pd_buffer_size:",
        "`pd_buffer_size` is missing; expected a whole number of bytes, or a number with one of B, KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000); write for example `pd_buffer_size: 4GiB`",
    ),
    (
        "pd_max_prefill_len: 10000",
        "f.yaml:4: pd_max_prefill_len = 10000: the pd_buffer holds 8192 tokens; raise pd_buffer_size to at least 1280MiB, or lower it",
    ),
    (
        "pd_buffer_device: gpu",
        "f.yaml:4: pd_buffer_device = \"gpu\"; expected cpu, cuda or cuda:N (N from 0 to 1023); write for example `pd_buffer_device: cpu`",
    ),
    (
        "pd_buffer_device: cuda:+1",
        "f.yaml:4: pd_buffer_device = \"cuda:+1\"; expected cpu, cuda or cuda:N (N from 0 to 1023); write for example `pd_buffer_device: cpu`",
    ),
    (
        "pd_buffer_device: cuda:1\npd_buffer_initial_size: 512MiB",
        "f.yaml:5: pd_buffer_initial_size = \"512MiB\": with pd_buffer_device: cuda:1 the pd_buffer cannot grow, since GPU memory that other processes can open is allocated in one piece; leave it out, and lower pd_buffer_size if 1GiB is too much",
    ),
    (
        "chunk_size: 0",
        "f.yaml:4: chunk_size = 0; expected a number of tokens from 1 to 1048576; write for example `chunk_size: 256`",
    ),
    (
        "kv_cache_dtype: fp4",
        "f.yaml:4: kv_cache_dtype = \"fp4\"; expected auto, bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8; write for example `kv_cache_dtype: auto`",
    ),
    (
        "pd_peer_init_port:",
        "`pd_peer_init_port` is missing; expected a port from 0 to 65535, or a list of one such port per rank; write for example `pd_peer_init_port: 7300`",
    ),
    (
        "pd_peer_init_port: 65536",
        "f.yaml:2: pd_peer_init_port = 65536; expected a port from 0 to 65535, or a list of one such port per rank; write for example `pd_peer_init_port: 7300`",
    ),
    (
        "pd_peer_init_port: [7300, x]",
        "f.yaml:2: pd_peer_init_port = [7300, \"x\"]; expected a port from 0 to 65535, or a list of one such port per rank; write for example `pd_peer_init_port: 7300`",
    ),
    (
        "pd_peer_init_port: []",
        "f.yaml:2: pd_peer_init_port = []; expected a port from 0 to 65535, or a list of one such port per rank; write for example `pd_peer_init_port: 7300`",
    ),
    (
        "pd_peer_host: tcp://127.0.0.1",
        "f.yaml:4: pd_peer_host = \"tcp://127.0.0.1\"; expected a host name or an address, without scheme and port; write for example `pd_peer_host: 127.0.0.1`",
    ),
    (
        "pd_proxy_port: 0",
        "f.yaml:4: pd_proxy_port = 0; expected a port from 1 to 65535; write for example `pd_proxy_port: 7500`",
    ),
    (
        "pd_allocation_timeout_sec: -1",
        "f.yaml:4: pd_allocation_timeout_sec = -1; expected a number of seconds from 0 to 86400; write for example `pd_allocation_timeout_sec: 30`",
    ),
    (
        "pd_allocation_timeout_sec: 5s",
        "f.yaml:4: pd_allocation_timeout_sec = \"5s\"; expected a number of seconds from 0 to 86400; write for example `pd_allocation_timeout_sec: 30`",
    ),
    (
        "pd_handshake_timeout_sec: 0",
        "f.yaml:4: pd_handshake_timeout_sec = 0; expected a number of seconds from 0.001 to 86400; write for example `pd_handshake_timeout_sec: 10`",
    ),
    (
        "pd_retention_sec: .nan",
        "f.yaml:4: pd_retention_sec = NaN; expected a number of seconds from 0.001 to 86400; write for example `pd_retention_sec: 300`",
    ),
    (
        "pd_peer_timeout_sec: 0.5",
        "f.yaml:4: pd_peer_timeout_sec = 0.5: pings are 1 s apart, and a peer would be given up after 0.5 s without any; make pd_peer_timeout_sec some times pd_heartbeat_interval_sec",
    ),
    (
        "pd_shutdown_timeout_sec: 1e300",
        "f.yaml:4: pd_shutdown_timeout_sec = 1e300; expected a number of seconds from 0 to 86400; write for example `pd_shutdown_timeout_sec: 5`",
    ),
    (
        "pd_backend_mode: threads",
        "f.yaml:4: pd_backend_mode = \"threads\"; expected sync or async; write for example `pd_backend_mode: async`",
    ),
    (
        "transfer_channel: ucx",
        "f.yaml:4: transfer_channel = \"ucx\"; expected nixl or local; write for example `transfer_channel: nixl`",
    ),
    (
        "nixl_backends: []",
        "f.yaml:4: nixl_backends = []; expected a list of 1 to 16 names of NIXL plugins; write for example `nixl_backends: [UCX]`",
    ),
    (
        "pd_connector_endpoint: tcp://127.0.0.1:1",
        "f.yaml:4: pd_connector_endpoint = \"tcp://127.0.0.1:1\"; expected ipc:// and an absolute path of at most 100 bytes, in which {role} and {rank} are filled in; write for example `pd_connector_endpoint: ipc:///tmp/pd-{role}-{rank}.sock`",
    ),
    (
        "pd_max_requests: 0",
        "f.yaml:4: pd_max_requests = 0; expected a number from 1 to 1048576; write for example `pd_max_requests: 1024`",
    ),
    (
        "model_name: [a]",
        "f.yaml:4: model_name = [\"a\"]; expected text of 1 to 256 bytes; write for example `model_name: meta-llama/Meta-Llama-3-8B`",
    ),
    // Accepted here, and such a request could not be read by anybody.
    (
        "pd_max_request_chunks: 32768",
        "f.yaml:4: pd_max_request_chunks = 32768; expected a number from 1 to 16384; write for example `pd_max_request_chunks: 4096`",
    ),
    (
        "pd_max_peers: 4097",
        "f.yaml:4: pd_max_peers = 4097; expected a number from 1 to 4096; write for example `pd_max_peers: 1024`",
    ),
    (
        "pd_max_peers: {a: 1}",
        "f.yaml:4: pd_max_peers = a map; expected a number from 1 to 4096; write for example `pd_max_peers: 1024`",
    ),
    // A receiver has no use for them, and a file that is wrong is wrong for both.
    (
        "pd_receivers: 10.0.0.2:7300",
        "f.yaml:4: pd_receivers = \"10.0.0.2:7300\"; expected a list of texts HOST:INIT_PORT:ALLOC_PORT, with ports from 1 to 65535, or one for each rank joined with +, and an IPv6 address in brackets; write for example `pd_receivers: [10.0.0.2:7300:7400]`",
    ),
    (
        "pd_receivers: [\"::1:7300:7400\"]",
        "f.yaml:4: pd_receivers = [\"::1:7300:7400\"]; expected a list of texts HOST:INIT_PORT:ALLOC_PORT, with ports from 1 to 65535, or one for each rank joined with +, and an IPv6 address in brackets; write for example `pd_receivers: [10.0.0.2:7300:7400]`",
    ),
    (
        "pd_receivers: [a:0:7400]",
        "f.yaml:4: pd_receivers = [\"a:0:7400\"]; expected a list of texts HOST:INIT_PORT:ALLOC_PORT, with ports from 1 to 65535, or one for each rank joined with +, and an IPv6 address in brackets; write for example `pd_receivers: [10.0.0.2:7300:7400]`",
    ),
    (
        "pd_peer_query_port: 7400\npd_peer_init_port: 7400",
        "f.yaml:4: pd_peer_query_port = 7400: pd_peer_init_port of rank 0 is 7400 as well; give each its own port, or 0 for a free port",
    ),
];

#[test]
fn bad_configurations_are_refused_with_the_whole_story() {
    // Broken in production: an operator cannot tell from the message what was seen, what is accepted, what to write.
    for (lines, expected) in REFUSED {
        let mut text = MINIMAL.to_owned();
        for line in lines.lines() {
            let key = line.split(':').next().unwrap();
            match text.lines().find(|minimal| minimal.split(':').next() == Some(key)) {
                Some(minimal) => text = text.replace(minimal, line),
                None => text.push_str(&format!("{line}\n")),
            }
        }
        assert_eq!(load(Role::Receiver, &text).unwrap_err(), *expected, "{text}");
    }
}

#[test]
fn refusals_that_depend_on_role_rank_and_model() {
    // Broken in production: a worker of a larger tensor-parallel group starts with another's resources.
    let sender = |line: &str| load(Role::Sender, &format!("pd_buffer_size: 1GiB\n{line}\n")).unwrap_err();
    assert_eq!(
        sender("pd_role: receiver"),
        "f.yaml:2: pd_role = \"receiver\": this is pd-sender, which accepts sender or both; start pd-receiver, or leave it out, or write both for a daemon that sends and receives"
    );
    assert_eq!(
        sender("pd_role: both"),
        "`pd_peer_init_port` is missing; expected a port from 0 to 65535, or a list of one such port per rank; write for example `pd_peer_init_port: 7300`"
    );
    assert_eq!(
        sender("pd_role: both\npd_peer_init_port: 0\npd_peer_alloc_port: 0\npd_proxy_port: 7500"),
        "f.yaml:5: pd_proxy_port = 7500: `pd_proxy_host` is missing; give both, or neither, or pd_skip_proxy_notification: true"
    );
    assert_eq!(
        sender("pd_proxy_host: 127.0.0.1"),
        "f.yaml:2: pd_proxy_host = \"127.0.0.1\": `pd_proxy_port` is missing; give both, or neither, or pd_skip_proxy_notification: true"
    );
    assert_eq!(
        sender("pd_proxy_port: 7500"),
        "f.yaml:2: pd_proxy_port = 7500: `pd_proxy_host` is missing; give both, or neither, or pd_skip_proxy_notification: true"
    );
    assert_eq!(
        sender("pd_receivers: [a:7300:7400, b:7300:7400, a:7300:7400]"),
        "f.yaml:2: pd_receivers = [\"a:7300:7400\", \"b:7300:7400\", \"a:7300:7400\"]: \"a:7300:7400\" is there twice for rank 0; keep one of them"
    );
    assert_eq!(
        sender("pd_receivers: a:7300:7300"),
        "f.yaml:2: pd_receivers = \"a:7300:7300\": \"a:7300:7300\" has 7300 twice for rank 0; give the port of the handshake first, then that of allocations, as the receiver's ready line names them"
    );
    assert_eq!(
        sender("pd_receivers: [a:1:2, b:1:2]\npd_max_peers: 1"),
        "f.yaml:2: pd_receivers = [\"a:1:2\", \"b:1:2\"]: there are 2 of them, and pd_max_peers is 1; raise pd_max_peers, or leave some out"
    );
    let skip = "pd_buffer_size: 1GiB\npd_proxy_port: 7500\npd_skip_proxy_notification: true\n";
    assert_eq!(load(Role::Sender, skip).unwrap().config.proxy, None);

    let rank = |line: &str, rank: u32, tp_size: Option<u32>| {
        load_text(Role::Receiver, &format!("{MINIMAL}{line}\n"), |options| {
            options.rank = rank;
            options.tp_size = tp_size;
        })
        .unwrap_err()
    };
    assert_eq!(
        rank("pd_peer_query_port: [7600]", 1, Some(2)),
        "f.yaml:4: pd_peer_query_port = [7600]: this is rank 1, and there are ports for 1 rank; write a list with one port per rank, or 0 for a free port"
    );
    assert_eq!(
        rank("pd_connector_endpoint: ipc:///tmp/x", 1, Some(2)),
        "f.yaml:4: pd_connector_endpoint = \"ipc:///tmp/x\": the daemons of 2 ranks cannot share one endpoint; put {rank} into it, or leave it out"
    );
    assert_eq!(rank("", 1, None), "llama-3-8b.json: rank 1 of 1; expected 0 to 0; give --tp-size as well as --rank");
    assert_eq!(
        rank("", 0, Some(3)),
        "llama-3-8b.json: 8 KV heads cannot be split over 3 tensor-parallel ranks; expected --tp-size to divide 8, or to be a multiple of it"
    );
}

#[test]
fn a_lazy_buffer_begins_and_grows_in_whole_slots() {
    // Broken in production: a step begins inside a slot, or the buffer takes all its memory although told not to.
    let slots = |lines: &str| {
        let loaded = load(Role::Receiver, &format!("{MINIMAL}{lines}")).unwrap();
        let buffer = loaded.config.buffer;
        ((buffer.initial_slot_count, buffer.step_slot_count), buffer.is_lazy(), loaded.notes)
    };
    const CHUNK_BYTES: u64 = 33_554_432;
    let (eager, lazy, notes) = slots("");
    assert_eq!((eager, lazy, notes.len()), ((32, 32), false, 1));
    let (initial, lazy, notes) = slots("pd_buffer_initial_size: 100MB\n");
    assert_eq!((initial, lazy), ((2, 2), true));
    assert_eq!(
        notes[1],
        "pd_buffer: lazy, 2 of 32 slots (67108864 bytes) at the start, 2 slots (67108864 bytes) in a step"
    );
    assert_eq!(slots("pd_buffer_initial_size: 1\n").0, (1, 1));
    assert_eq!(slots("pd_buffer_initial_size: 256MiB\npd_buffer_growth_step: 1\n").0, (8, 1));
    assert_eq!(slots("pd_buffer_initial_size: 256MiB\npd_buffer_growth_step: 1TiB\n").0, (8, 32));
    assert_eq!(slots("pd_buffer_initial_size: 1GiB\npd_buffer_growth_step: 1\n").0, (32, 32));
    let (_, lazy, notes) = slots("pd_buffer_growth_step: 64MiB\n");
    assert!(!lazy);
    assert_eq!(
        notes[1],
        "pd_buffer_growth_step has no effect here: the pd_buffer does not grow without pd_buffer_initial_size"
    );
    // A large buffer that begins small: the step is what it takes to get there at all.
    let config = load(Role::Sender, "pd_buffer_size: 1TiB\npd_buffer_initial_size: 32MiB\n").unwrap().config;
    assert_eq!((config.buffer.slot_count, config.buffer.step_slot_count), (32_768, 129));
    assert_eq!(config.buffer_step_bytes(), 129 * CHUNK_BYTES);
    let text = "pd_buffer_size: 1TiB\npd_buffer_initial_size: 32MiB\npd_buffer_growth_step: 64MiB\n";
    assert_eq!(
        load(Role::Sender, text).unwrap_err(),
        "f.yaml:3: pd_buffer_growth_step = \"64MiB\": the pd_buffer would take more than 255 steps, each of which every peer is told of; raise it to at least 4128MiB"
    );
    assert_eq!(
        load(Role::Receiver, &format!("{MINIMAL}pd_buffer_initial_size: 1025MiB\n")).unwrap_err(),
        "f.yaml:4: pd_buffer_initial_size = \"1025MiB\": above pd_buffer_size, which is 1GiB; lower it, or leave it out for a buffer that has its whole size from the start"
    );
}

proptest! {
    #[test]
    fn the_buffer_is_the_largest_whole_number_of_chunks_under_its_ceiling(
        asked_bytes in 1_u64..1 << 44,
        (name, chunk_bytes) in prop::sample::select(MODELS),
    ) {
        // Broken in production: a buffer larger than allowed, or memory that is paid for and never used.
        let options = Options {
            set: vec![format!("pd_buffer_size={asked_bytes}")],
            model: Some(model(name)),
            ..Options::default()
        };
        match Config::load(Role::Sender, &options) {
            Ok(Loaded { config, .. }) => {
                let slot_count = u64::from(config.buffer.slot_count);
                prop_assert_eq!(config.buffer.asked_bytes, asked_bytes);
                prop_assert!(slot_count >= 1);
                prop_assert!(slot_count * chunk_bytes <= asked_bytes);
                prop_assert!(asked_bytes < (slot_count + 1) * chunk_bytes);
            }
            Err(error) => prop_assert!(asked_bytes < chunk_bytes, "{error}"),
        }
    }

    #[test]
    fn any_text_is_a_configuration_or_a_refusal(text: String, key in "[a-z_]{0,12}", value: String) {
        // Broken in production: a damaged file ends the daemon with a panic instead of exit code 2.
        for set in [format!("{key}={value}"), format!("pd_buffer_size={value}"), format!("pd_peer_init_port={value}"), text] {
            let options = Options { set: vec![set], model: Some(model("llama-3-8b")), ..Options::default() };
            if let Err(error) = Config::load(Role::Receiver, &options) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
