//! What is written from the table of keys: the files in configs/ and docs/configuration.md. The tests hold that they are
//! current.

use std::fs;
use std::path::{Path, PathBuf};

use super::Role;
use super::key::{Absence, Key, Kind};
use super::keys::KEYS;

/// Writes them anew.
const WRITE: &str = "make configs";

/// A shipped file: its name, what it is, how it is used, and what it sets.
type Shipped = (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const SHIPPED: &[Shipped] = &[
    (
        "sender",
        "pd-sender: beside a prefill worker.",
        "pd-sender --config configs/sender.yaml --model configs/models/llama-3-8b.json",
        &[("enable_pd", "true"), ("pd_role", "sender"), ("pd_buffer_size", "4GiB")],
    ),
    (
        "receiver",
        "pd-receiver: beside a decode worker.",
        "pd-receiver --config configs/receiver.yaml --model configs/models/llama-3-8b.json",
        &[
            ("enable_pd", "true"),
            ("pd_role", "receiver"),
            ("pd_buffer_size", "4GiB"),
            ("pd_peer_host", "127.0.0.1"),
            ("pd_peer_init_port", "7300"),
            ("pd_peer_alloc_port", "7400"),
        ],
    ),
    (
        "loopback",
        "A pd-sender and a pd-receiver on one host, for pd-bench and for trying things out: the same file starts either.",
        "pd-bench loopback --config configs/loopback.yaml --model configs/models/llama-3-8b.json",
        &[
            ("enable_pd", "true"),
            ("pd_buffer_size", "1GiB"),
            ("pd_peer_host", "127.0.0.1"),
            ("pd_peer_init_port", "0"),
            ("pd_peer_alloc_port", "0"),
        ],
    ),
    (
        "both",
        "A daemon with both halves over one buffer: it sends chunks and receives them. Either program runs it.",
        "pd-receiver --config configs/both.yaml --model configs/models/llama-3-8b.json",
        &[
            ("enable_pd", "true"),
            ("pd_role", "both"),
            ("pd_buffer_size", "4GiB"),
            ("pd_peer_host", "127.0.0.1"),
            ("pd_peer_init_port", "7300"),
            ("pd_peer_alloc_port", "7400"),
        ],
    ),
];

const YAML_HEAD: &str = "\
# LMCache's pd_* keys and their older nixl_* names mean here what they mean there, so an lmcache.yaml can be given
# as it is; LMCache's other keys are ignored, with one log line that lists them. The same file serves every model:
# the size of a chunk comes from --model or --kv-layout. `--check` prints what the file comes to.
#
# `#key: value` is a key that is left out, with its default: taking the # away changes nothing.
# `#? key: value` is an example of a key that has no default.
";

const DOCS_HEAD: &str = "\
# Configuration

Every key of the YAML that `--config` names, and of `--set KEY=VALUE`. [configs/](../configs) has the same as files to start
from, and `--check` prints what a daemon would run with. LMCache's other keys are accepted and ignored; a misspelt key is
refused with the nearest known name. This page is written from the table in `src/config/keys.rs` (`make configs`).
";

/// A comment's lines, as long as a line may be.
fn comment(text: &str) -> String {
    const LINE_LEN: usize = 118;
    let mut lines = vec![String::from("#")];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= LINE_LEN => *line += &format!(" {word}"),
            _ => lines.push(format!("# {word}")),
        }
    }
    lines.join("\n")
}

fn help(key: &Key) -> String {
    key.help.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

fn yaml(&(_, title, usage, set): &Shipped) -> String {
    let mut text = format!("# {title}\n#\n#   {usage}\n#\n{YAML_HEAD}");
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            text += &format!("\n{:-<118}\n", format!("# --- {section} "));
        }
        text += &format!("\n{}\n", comment(&help(key)));
        if !matches!(key.kind, Kind::Boolean) {
            text += &format!("{}\n", comment(&format!("Takes {}.", key.accepted())));
        }
        if let Absence::Without(_, then) = key.absence
            && !then.is_empty()
        {
            text += &format!("{}\n", comment(&format!("Left out: {then}.")));
        }
        let name = key.name;
        text += &match (set.iter().find(|(set, _)| *set == name), key.absence) {
            (Some((_, value)), _) => format!("{name}: {value}\n"),
            (None, Absence::Is(value)) => format!("#{name}: {value}\n"),
            (None, _) => format!("#? {name}: {}\n", key.example()),
        };
    }
    text
}

fn docs() -> String {
    let mut text = DOCS_HEAD.to_owned();
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            text += &format!("\n## {section}\n\n| key | takes | left out | what it is for |\n|---|---|---|---|\n");
        }
        let left_out = match (key.absence, key.of) {
            (Absence::Is(value), _) => format!("`{value}`"),
            (Absence::Without(_, ""), _) => "nothing changes".to_owned(),
            (Absence::Without(_, then), _) => then.to_owned(),
            (Absence::Refused(_), Role::Receiver) => "refused by a daemon that receives".to_owned(),
            (Absence::Refused(_), _) => "refused".to_owned(),
        };
        text += &format!("| `{}` | {} | {left_out} | {} |\n", key.name, key.accepted(), help(key));
    }
    text
}

fn files() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let configs = SHIPPED.iter().map(|shipped| (root.join(format!("configs/{}.yaml", shipped.0)), yaml(shipped)));
    configs.chain([(root.join("docs/configuration.md"), docs())]).collect()
}

#[test]
fn the_files_and_the_page_say_what_the_table_says() {
    // Broken in production: an operator sets a key by a file or a page that names another default or range.
    for (path, text) in files() {
        let there = fs::read_to_string(&path).unwrap_or_default();
        let differs = there.lines().zip(text.lines()).find(|(there, text)| there != text);
        assert!(there == text, "{} is not what `{WRITE}` writes; first difference: {differs:?}", path.display());
    }
    let makefile = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Makefile")).unwrap();
    assert!(makefile.contains("config::shipped::write_the_files_and_the_page"), "`{WRITE}` writes them");
}

#[test]
#[ignore = "make configs runs it: it writes configs/ and docs/configuration.md"]
fn write_the_files_and_the_page() {
    for (path, text) in files() {
        fs::write(path, text).unwrap();
    }
}

#[test]
fn every_value_that_the_table_names_is_taken_and_shown() {
    // Broken in production: a default that is none, a word that a key names and refuses, or one that does nothing.
    use super::fuzzing::{ROLES, read};
    let base =
        "pd_buffer_size: 4GiB\npd_peer_init_port: 0\npd_peer_alloc_port: 0\npd_proxy_host: h\npd_proxy_port: 1\n";
    for (key, role) in KEYS.iter().flat_map(|key| ROLES.map(|role| (key, role))) {
        let words = match key.kind {
            Kind::Words(words) => words,
            _ => &[key.example()],
        };
        for value in words {
            let others = base.lines().filter(|line| !line.starts_with(key.name));
            let text = others.chain([format!("{}: {value}", key.name).as_str()]).collect::<Vec<_>>().join("\n");
            let Some(config) = read(role, &text) else {
                assert!(key.name == "pd_role" && *value != role.as_str(), "refused by {}:\n{text}", role.daemon());
                continue;
            };
            let line = format!("\n{}: ", key.name);
            // What depends on another key, what has no effect, and what this daemon does not use, is not shown.
            let hidden = ["pd_buffer_growth_step", "pd_shared_secret_file", "kv_cache_dtype"].contains(&key.name);
            assert_eq!(
                config.to_yaml().contains(&line),
                key.shown.is_some() && !hidden && key.used_by(role),
                "{text}\n{}",
                config.to_yaml()
            );
            if matches!(key.kind, Kind::Words(_)) && key.shown.is_some() {
                assert!(config.to_yaml().contains(&format!("{line}{value}\n")), "{text}");
            }
        }
        if let Absence::Is(value) = key.absence {
            let config = |text: &str| read(role, text).unwrap_or_else(|| panic!("refused:\n{text}"));
            assert_eq!(config(base), config(&format!("{base}{}: {value}\n", key.name)), "{}", key.name);
        }
    }
}
