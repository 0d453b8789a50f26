//! What bytes from outside meet first, one entry for each decoder: no input may panic, hang or take memory without bound,
//! and what is accepted must mean the same when it is written and read again.
//!
//! For `fuzz/fuzz_targets`, which has a target of each entry's name, and for the test below, which plays changed seeds
//! without a fuzzer. A new decoder gets an entry and seeds here, and a target of three lines there.

mod seeds;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ids::SharedSecret;
use crate::kv_layout::{GivenDefaults, KvLayout, ModelOptions, from_layout_json, from_model_config};
use crate::wire::auth::{
    Channel, DealerHandshake, Opener, RouterHandshake, RouterStep, Sealed, Sealer, is_handshake, refusal_of,
};
use crate::wire::{Message, decode, encode, type_name, unsigned_field};
use crate::{config, connector, transfer};

/// A decoder under test.
pub struct Decoder {
    /// The fuzz target's name.
    pub name: &'static str,
    /// Gives it some bytes. Panics when it did what it must not do.
    pub play: fn(&[u8]),
    /// Inputs that get far.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const ENTRIES: &[Decoder] = &[
    Decoder { name: "wire_message", play: wire_message, seeds: seeds::wire_messages },
    Decoder { name: "connector_message", play: connector_message, seeds: seeds::connector_messages },
    #[cfg(feature = "lmcache")]
    Decoder { name: "descriptor_list", play: descriptor_list, seeds: seeds::descriptor_lists },
    Decoder { name: "layout_json", play: layout_json, seeds: seeds::layouts },
    Decoder { name: "model_config", play: model_config, seeds: seeds::models },
    Decoder { name: "config_yaml", play: config_yaml, seeds: seeds::configurations },
    Decoder {
        name: "nixl_metadata",
        play: transfer::nixl::fuzzing::metadata,
        seeds: transfer::nixl::fuzzing::metadata_seeds,
    },
    Decoder {
        name: "nixl_descriptors",
        play: transfer::nixl::fuzzing::descriptors,
        seeds: transfer::nixl::fuzzing::descriptor_seeds,
    },
    Decoder { name: "local_blob", play: transfer::local::fuzzing::blob, seeds: transfer::local::fuzzing::blob_seeds },
    Decoder { name: "auth_router", play: auth_router, seeds: seeds::to_a_router },
    Decoder { name: "auth_dealer", play: auth_dealer, seeds: seeds::to_a_dealer },
    Decoder { name: "auth_sealed", play: auth_sealed, seeds: seeds::sealed },
];

/// Plays some bytes at the entry of this name.
///
/// # Panics
/// When there is none, or the decoder did what it must not do.
pub fn play(name: &str, bytes: &[u8]) {
    let entry = ENTRIES.iter().find(|entry| entry.name == name).unwrap_or_else(|| panic!("no entry {name}"));
    (entry.play)(bytes);
}

/// What a peer says at a port.
fn wire_message(bytes: &[u8]) {
    message::<Message>(bytes);
}

/// What an engine says to its daemon, and what it hears.
fn connector_message(bytes: &[u8]) {
    message::<connector::message::Request>(bytes);
    message::<connector::message::Reply>(bytes);
}

fn message<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let name = type_name(bytes);
    let _ = unsigned_field(bytes, "id");
    if let Ok(message) = decode::<T>(bytes) {
        assert!(name.is_some(), "a message of no type is understood");
        let written = encode(&message);
        // The bytes are compared, not the values: not a number is not itself.
        let again = decode::<T>(&written).unwrap_or_else(|error| panic!("what was understood is not: {error}"));
        assert_eq!(encode(&again), written, "a message means something else when it is written again");
    }
}

/// A pickle where LMCache's peers say where their pages are.
#[cfg(feature = "lmcache")]
fn descriptor_list(bytes: &[u8]) {
    if let Ok((module, pages)) = crate::wire::descriptor_list::decode(bytes) {
        assert!(pages.address.checked_add(pages.len_bytes()).is_some());
        let written = crate::wire::descriptor_list::encode(&module, &pages);
        assert_eq!(crate::wire::descriptor_list::decode(&written), Ok((module, pages)));
    }
}

/// A file of `--kv-layout`.
fn layout_json(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for model_name in [None, Some("m".to_owned())] {
        let chunk_tokens = model_name.is_some().then_some(256);
        let defaults = GivenDefaults { model_name, chunk_tokens, chunk_tokens_default: 256, tp_rank: 0, tp_size: None };
        assert_whole(from_layout_json(text, &defaults).ok());
    }
}

/// A model's config.json.
fn model_config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for (kv_dtype, tp_size) in [(None, 1), (Some("fp8".to_owned()), 8)] {
        let options = ModelOptions { model_name: None, kv_dtype, chunk_tokens: 256, tp_rank: 0, tp_size };
        assert_whole(from_model_config(text, &options).ok());
    }
}

fn assert_whole(layout: Option<KvLayout>) {
    if let Some(layout) = layout {
        layout.check().expect("a layout that was read is one that can be");
        assert!(layout.chunk_bytes() > 0);
    }
}

/// A daemon's YAML.
fn config_yaml(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        config::fuzzing::load(text);
    }
}

/// What somebody who connects says, piece by piece.
fn auth_router(bytes: &[u8]) {
    let mut handshake = seeds::router();
    for piece in pieces(bytes) {
        let _ = is_handshake(piece);
        match handshake.handle(piece) {
            Ok(RouterStep::Answer(next, answer)) => {
                assert!(is_handshake(&answer));
                handshake = next;
            }
            Ok(RouterStep::Done(_, _)) => {
                assert_eq!(piece, seeds::proof(), "somebody has proved to know what it does not know");
                return;
            }
            Err(_) => return,
        }
    }
}

/// What somebody whom we connected to answers.
fn auth_dealer(bytes: &[u8]) {
    let _ = refusal_of(bytes);
    if seeds::dealer().handle_answer(bytes).is_ok() {
        assert_eq!(bytes, seeds::answer(), "somebody has proved to know what it does not know");
    }
}

/// What comes through a connection that is authenticated, piece by piece.
fn auth_sealed(bytes: &[u8]) {
    let (mut sealer, mut opener) = seeds::ends();
    for piece in pieces(bytes) {
        let Ok(len_bytes) = opener.open(piece) else { return };
        let Sealed(genuine) = sealer.seal(piece[..len_bytes].to_vec());
        sealer.sent();
        assert_eq!(piece, genuine, "a seal that nobody made is believed");
    }
}

/// Bytes as messages: two bytes of length before each, little-endian; the last one ends where they end.
fn pieces(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (len_bytes, rest) = bytes.split_first_chunk::<2>()?;
        let len_bytes = usize::from(u16::from_le_bytes(*len_bytes)).min(rest.len());
        let (piece, rest) = rest.split_at(len_bytes);
        bytes = rest;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Changed inputs for each entry.
    const CHANGED_COUNT: usize = 3_000;

    /// One to four changes of those that break decoders: bytes, lengths, cuts, and parts of another input.
    fn change(random: &mut StdRng, input: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..random.random_range(1..=4) {
            let at = random.random_range(0..=input.len());
            match random.random_range(0..7) {
                0 => input.truncate(at),
                1 => input.insert(at, random.random()),
                2 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
                3 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xc1, 0xff][random.random_range(0..6)],
                4 if at < input.len() => drop(input.drain(at..(at + random.random_range(1..9)).min(input.len()))),
                5 if !other.is_empty() => {
                    let from = random.random_range(0..other.len());
                    let part = &other[from..(from + random.random_range(1..64)).min(other.len())];
                    input.splice(at..at, part.iter().copied());
                }
                _ => {
                    let word =
                        [u64::MAX, 1 << 63, u64::from(u32::MAX), 1 << 31][random.random_range(0..4)].to_le_bytes();
                    let end = (at + word.len()).min(input.len());
                    input.splice(at..end, word[..random.random_range(1..=8)].iter().copied());
                }
            }
        }
    }

    #[test]
    fn changed_inputs_break_no_decoder() {
        // Broken in production: a few bytes from a peer, an engine or a file end the daemon.
        let mut random = StdRng::seed_from_u64(1);
        for Decoder { name, play, seeds } in ENTRIES {
            let seeds = seeds();
            assert!(!seeds.is_empty(), "{name} has no seeds");
            seeds.iter().for_each(|seed| play(seed));
            // The same number of them, however long a seed is.
            for _ in 0..CHANGED_COUNT {
                let mut input = seeds[random.random_range(0..seeds.len())].clone();
                let other = &seeds[random.random_range(0..seeds.len())];
                change(&mut random, &mut input, other);
                play(&input);
            }
        }
    }

    #[test]
    fn every_seed_gets_as_far_as_it_is_meant_to() {
        // Broken in production: nothing yet; but the decoders' insides are no longer played, and nobody notices.
        let accepted = |name: &str, accepts: fn(&[u8]) -> bool| {
            let entry = ENTRIES.iter().find(|entry| entry.name == name).unwrap();
            let refused = (entry.seeds)().into_iter().filter(|seed| !accepts(seed)).count();
            assert_eq!(refused, 0, "{name}");
        };
        accepted("wire_message", |seed| decode::<Message>(seed).is_ok());
        accepted("connector_message", |seed| {
            decode::<connector::message::Request>(seed).is_ok() || decode::<connector::message::Reply>(seed).is_ok()
        });
        accepted("config_yaml", |seed| config::fuzzing::accepts(std::str::from_utf8(seed).unwrap()));
        accepted("nixl_metadata", transfer::nixl::fuzzing::accepts_metadata);
        accepted("nixl_descriptors", transfer::nixl::fuzzing::accepts_descriptors);
        accepted("local_blob", transfer::local::fuzzing::accepts);
    }

    #[test]
    fn every_entry_has_a_fuzz_target() {
        // Broken in production: nothing yet; but a decoder is believed to be fuzzed that is not.
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
        for Decoder { name, .. } in ENTRIES {
            let target = fs::read_to_string(root.join(format!("fuzz_targets/{name}.rs"))).unwrap_or_default();
            assert!(target.contains(&format!("play(\"{name}\"")), "fuzz/fuzz_targets/{name}.rs plays {name}");
            assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml has a target {name}");
        }
    }

    #[test]
    #[ignore = "make fuzz runs it: it writes the seeds where the fuzzer finds them"]
    fn write_seeds() {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for Decoder { name, seeds, .. } in ENTRIES {
            fs::create_dir_all(root.join(name)).unwrap();
            for (number, seed) in seeds().iter().enumerate() {
                fs::write(root.join(format!("{name}/seed-{number}")), seed).unwrap();
            }
        }
    }
}
