//! The walls between the modules, and what the pure ones must not touch. docs/architecture.md shows them as a picture.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Which modules a module may name, beside itself.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("ids", &[]),
    ("address", &[]),
    ("slot", &["address", "ids"]),
    ("kv_layout", &["ids"]),
    ("config", &["kv_layout", "ids"]),
    ("buffer", &["address", "ids"]),
    ("transfer", &["buffer", "ids"]),
    ("wire", &["ids"]),
    ("node", &["address", "slot", "wire", "ids"]),
    ("metrics", &["connector", "node", "ids"]),
    ("side_channel", &["wire", "ids"]),
    ("connector", &["side_channel", "wire", "ids"]),
    (
        "runtime",
        &[
            "address",
            "buffer",
            "config",
            "connector",
            "ids",
            "kv_layout",
            "metrics",
            "node",
            "side_channel",
            "slot",
            "transfer",
            "wire",
        ],
    ),
    ("bench", &["buffer", "config", "connector", "ids", "kv_layout", "side_channel", "transfer", "wire"]),
    ("cli", &["bench", "config", "ids", "runtime", "transfer"]),
    // For tests and fuzz targets alone.
    ("fuzzing", &["config", "connector", "ids", "kv_layout", "transfer", "wire"]),
];

/// Files and folders that hold values and decisions alone.
const PURE: &[&str] = &[
    "ids",
    "address",
    "slot",
    "wire",
    "node",
    "kv_layout",
    "metrics",
    "config/mod.rs",
    "config/raw.rs",
    "config/resolve.rs",
    "config/size.rs",
    "config/key.rs",
    "config/keys.rs",
    "config/names.rs",
    "config/values.rs",
    "config/show.rs",
];

/// What a pure module must not mention.
const IMPURE: &[&str] = &[
    "tokio",
    "zeromq",
    "nixl_sys",
    "cudarc",
    "Instant::now",
    "SystemTime",
    "std::thread",
    "std::env",
    "std::fs",
    "std::net",
    "std::process",
    "rand::",
    "Uuid",
];

/// Libraries that one place alone may name.
const ONE_PLACE: &[(&str, &[&str])] = &[
    ("nixl_sys", &["src/transfer/nixl"]),
    ("cudarc", &["src/buffer/cuda/driver.rs"]),
    ("zeromq::", &["src/side_channel"]),
    ("prometheus_client", &["src/metrics"]),
    ("hyper::", &["src/runtime/http.rs", "src/bench/scrape.rs"]),
];

fn rust_files(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(root).unwrap_or_else(|error| panic!("{}: {error}", root.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The code of a file: no comments, and nothing from its test module on.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn module_of(path: &Path) -> String {
    let relative = path.strip_prefix(source()).unwrap();
    let first = relative.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The modules named by `crate::name` and `use crate::{a, b}`.
fn named_modules(code: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                names.extend(list.split(',').map(|item| word(item.trim())));
            }
            None => names.push(word(rest)),
        }
    }
    names
}

#[test]
fn modules_name_only_what_is_below_them() {
    // Broken in production: sockets creep into the sessions, and nothing can be simulated or reasoned about any more.
    let allowed: BTreeMap<&str, &[&str]> = MAY_NAME.iter().copied().collect();
    let mut checked = 0;
    for path in rust_files(&source()) {
        let module = module_of(&path);
        if module == "lib" {
            continue;
        }
        let may = allowed.get(module.as_str()).unwrap_or_else(|| panic!("{module}: a new module needs its layer here"));
        for name in named_modules(&code(&path)) {
            checked += 1;
            let known = allowed.contains_key(name.as_str());
            assert!(
                !known || name == module || may.contains(&name.as_str()),
                "{} names {name}; {module} may name {may:?}",
                path.display()
            );
        }
    }
    assert!(checked > 50, "only {checked} imports were seen: the test reads the wrong place");
}

#[test]
fn pure_modules_touch_no_world() {
    // Broken in production: a session reads a clock, and a failing seed no longer replays.
    for pure in PURE {
        let path = source().join(pure);
        let files = if path.is_dir() { rust_files(&path) } else { vec![path] };
        for file in files {
            let code = code(&file);
            for word in IMPURE {
                assert!(!code.contains(word), "{} mentions {word}", file.display());
            }
        }
    }
}

#[test]
fn bindings_are_named_in_one_place() {
    // Broken in production: a library's odd contract is honoured in one file and forgotten in another.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (library, places) in ONE_PLACE {
        let mut seen = 0;
        for path in rust_files(&source()) {
            let relative = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            if code(&path).contains(library) {
                assert!(places.iter().any(|place| relative.starts_with(place)), "{relative} names {library}");
                seen += 1;
            }
        }
        assert!(seen > 0, "nobody names {library}: is the list stale?");
    }
}
