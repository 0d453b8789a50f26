//! Inputs that get far: what the tests and the documentation keep as golden files, and an authentication that goes well.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Channel, DealerHandshake, Opener, RouterHandshake, RouterStep, Sealed, Sealer, SharedSecret};

/// The files of a folder of the repository whose names end so, in order.
fn files(folder: &str, ending: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).collect()
}

/// LMCache's own.
pub(super) fn wire_messages() -> Vec<Vec<u8>> {
    files("tests/fixtures/lmcache-wire", ".bin")
}

/// LMCache's own, as they stand in its messages.
#[cfg(feature = "lmcache")]
pub(super) fn descriptor_lists() -> Vec<Vec<u8>> {
    files("tests/fixtures/lmcache-wire", ".pickle")
}

/// Those that the Rust and the Python side are both tested with.
pub(super) fn connector_messages() -> Vec<Vec<u8>> {
    let text = files("python/tests", "connector_messages.json").remove(0);
    let golden: serde_json::Value = serde_json::from_slice(&text).expect("it is JSON");
    let messages = golden.as_array().into_iter().flatten().filter_map(|message| message["msgpack"].as_str());
    messages.map(unhex).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or_default());
    pairs.map(|pair| u8::from_str_radix(pair, 16).expect("hex")).collect()
}

pub(super) fn layouts() -> Vec<Vec<u8>> {
    let given = [
        r#"{"model": "m", "dtype": "bfloat16", "layers": 32, "kv_heads": 8, "head_size": 128, "kv_planes": 2}"#,
        r#"{"model": "m", "chunk_bytes": 33554432, "chunk_tokens": 256, "tp_rank": 0, "tp_size": 1}"#,
        r#"{"model": "m", "dtype": "fp8", "dtype_bytes": 1, "kv_heads": 8, "head_size": 128, "kv_planes": 2,
            "groups": [{"name": "full", "layers": 8}, {"name": "sliding", "layers": 24, "chunk_bytes": 4096}]}"#,
    ];
    let given = given.iter().map(|text| text.as_bytes().to_vec());
    files("tests/fixtures", "layout.json").into_iter().chain(given).collect()
}

pub(super) fn models() -> Vec<Vec<u8>> {
    files("configs/models", ".json")
}

pub(super) fn configurations() -> Vec<Vec<u8>> {
    // In the files it is an example, and a comment.
    let told = r#"{pd_buffer_size: 1MiB, pd_receivers: [10.0.0.2:7300+7301:7400+7401, "[fd00::3]:7300:7400"]}"#;
    let both = "{pd_role: both, pd_buffer_size: 1MiB, pd_peer_init_port: 0, pd_peer_alloc_port: 0, pd_proxy_host: p, \
        pd_proxy_port: 7500, pd_commit_timeout_sec: 1, pd_wait_timeout_sec: 2, pd_retention_sec: .inf}";
    files("configs", ".yaml").into_iter().chain([told, both].map(|text| text.as_bytes().to_vec())).collect()
}

fn secret() -> SharedSecret {
    SharedSecret::new(&[7; 32]).expect("long enough")
}

/// One that has just connected.
pub(super) fn dealer() -> DealerHandshake {
    DealerHandshake::new(&secret(), Channel::Init, [1; 32])
}

/// One that somebody has just connected to.
pub(super) fn router() -> RouterHandshake {
    RouterHandshake::new(secret(), Channel::Init, [2; 32])
}

/// What `router` answers to `dealer`.
pub(super) fn answer() -> Vec<u8> {
    answered().1
}

fn answered() -> (RouterHandshake, Vec<u8>) {
    match router().handle(dealer().hello()) {
        Ok(RouterStep::Answer(router, answer)) => (router, answer),
        other => panic!("a hello is answered, and not with {other:?}"),
    }
}

/// What `dealer` proves itself with.
pub(super) fn proof() -> Vec<u8> {
    dealer().handle_answer(&answer()).expect("both have one secret").0
}

/// The dealer's sealer and the router's opener.
pub(super) fn ends() -> (Sealer, Opener) {
    let (router, answer) = answered();
    let (proof, sealer, _) = dealer().handle_answer(&answer).expect("both have one secret");
    match router.handle(&proof) {
        Ok(RouterStep::Done(_, opener)) => (sealer, opener),
        other => panic!("a proof is believed, and not {other:?}"),
    }
}

fn piece(bytes: &[u8]) -> Vec<u8> {
    let len_bytes = u16::try_from(bytes.len()).expect("a short one");
    [&len_bytes.to_le_bytes()[..], bytes].concat()
}

pub(super) fn to_a_router() -> Vec<Vec<u8>> {
    let hello = piece(dealer().hello());
    vec![hello.clone(), [hello, piece(&proof())].concat(), piece(&answer())]
}

pub(super) fn to_a_dealer() -> Vec<Vec<u8>> {
    let refusals = [Channel::Alloc, Channel::Query].into_iter().filter_map(|channel| {
        let misled = RouterHandshake::new(secret(), channel, [2; 32]).handle(dealer().hello());
        misled.err()?.close_reason
    });
    refusals.chain([answer(), dealer().hello().to_vec(), proof()]).collect()
}

pub(super) fn sealed() -> Vec<Vec<u8>> {
    let (mut sealer, _) = ends();
    let mut seal = |text: &[u8]| {
        let Sealed(sealed) = sealer.seal(text.to_vec());
        sealer.sent();
        piece(&sealed)
    };
    let three = [seal(b"first"), seal(b""), seal(b"third")];
    vec![three[0].clone(), three.concat(), three[1..].concat()]
}
