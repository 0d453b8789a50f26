//! What a chunk is, in bytes: the KV cache of `chunk_tokens` tokens over all layers of one tensor-parallel rank.
//!
//! Most models keep the same shape of cache in every layer. Those that do not have several *groups* of layers, and a
//! chunk of `chunk_tokens` tokens of each group; the largest of these is the length of a slot.
//!
//! A layout comes from a model hub's `config.json` ([`from_model_config`]) or from the connector, which knows its
//! engine's tensors ([`from_layout_json`]). Both take text: reading files is the caller's business.

mod dtype;
mod error;
mod fingerprint;
mod given;
mod group;
mod model;

use std::collections::BTreeMap;

use crate::ids::is_printable;

pub use dtype::{DTYPES_ACCEPTED, OPAQUE_DTYPE, parse_dtype};
pub use error::LayoutError;
pub(crate) use error::suggestion;
pub use given::{GivenDefaults, from_layout_json};
pub use group::{GROUP_NAME_LEN_BYTES_MAX, KvGroup};
pub use model::{ModelOptions, from_model_config};

/// LMCache's `MemoryFormat.KV_2LTD`: `[2, layers, tokens, kv_heads * head_size]`.
pub const WIRE_FORMAT_KV_2LTD: i64 = 1;
/// LMCache's `MemoryFormat.KV_MLA_FMT`: `[1, layers, tokens, head_size]`. The enum in LMCache's
/// `lmcache/v1/memory_management.py` counts UNDEFINED 0, KV_2LTD 1, KV_T2D 2, KV_2TD 3, BINARY 4, BINARY_BUFFER 5,
/// KV_MLA_FMT 6; the token dimension of 1 and 6 is the third.
pub const WIRE_FORMAT_KV_MLA: i64 = 6;

/// Most layers of a layout.
pub const LAYERS_MAX: u32 = 4096;
/// Most KV heads of one rank.
pub const KV_HEADS_MAX: u32 = 65_536;
/// Most elements of one head; of an opaque layout, most bytes of one token.
pub const HEAD_SIZE_MAX: u32 = 1 << 30;
/// Most tokens of a chunk.
pub const CHUNK_TOKENS_MAX: u32 = 1 << 20;
/// Most tensor-parallel ranks.
pub const TP_SIZE_MAX: u32 = 4096;
/// Largest chunk, in bytes: 64 GiB.
pub const CHUNK_BYTES_MAX: u64 = 64 << 30;
/// Longest name of a model, in bytes.
pub const MODEL_LEN_BYTES_MAX: usize = 256;

/// Most facts about the engine.
pub const ENGINE_FACTS_MAX: usize = 32;
/// Longest name, and longest value, of a fact about the engine, in bytes.
pub const ENGINE_FACT_LEN_BYTES_MAX: usize = 256;

/// Most groups of a layout.
pub const GROUPS_MAX: usize = 8;

/// Shape and meaning of a model's chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    /// The model's name, as both sides must give it.
    pub model: String,
    /// Tokens in a whole chunk.
    pub chunk_tokens: u32,
    /// Tensor-parallel rank.
    pub tp_rank: u32,
    /// Number of ranks.
    pub tp_size: u32,
    /// Groups of layers that keep the same shape of cache, at least one.
    pub groups: Vec<KvGroup>,
    /// What else the connector wants both sides to have the same, by name: its engine's version, its attention backend.
    /// Compared by the handshake, and never looked into.
    pub engine: BTreeMap<String, String>,
}

impl KvLayout {
    /// Bytes of a slot: of a whole chunk of the group that has the largest.
    pub fn chunk_bytes(&self) -> u64 {
        self.groups.iter().map(|group| group.partial_bytes(self.chunk_tokens)).max().unwrap_or(0)
    }

    /// The group that LMCache's wire describes, which knows one only.
    pub fn first_group(&self) -> &KvGroup {
        self.groups.first().expect("a checked layout has a group")
    }

    /// Checks every number, so that all the sizes above are exact and none is 0.
    ///
    /// # Errors
    /// The first number that is out of range, by name.
    pub fn check(&self) -> Result<(), LayoutError> {
        let name_len_bytes = self.model.len() as u64;
        range("length of the model's name", name_len_bytes, 1, MODEL_LEN_BYTES_MAX as u64)?;
        range("chunk_tokens", self.chunk_tokens.into(), 1, CHUNK_TOKENS_MAX.into())?;
        range("tp_size", self.tp_size.into(), 1, TP_SIZE_MAX.into())?;
        if self.tp_rank >= self.tp_size {
            return Err(LayoutError::Rank { tp_rank: self.tp_rank, tp_size: self.tp_size });
        }
        range("number of facts in `engine`", self.engine.len() as u64, 0, ENGINE_FACTS_MAX as u64)?;
        for text in self.engine.iter().flat_map(|(name, value)| [name, value]) {
            range("length of a text in `engine`", text.len() as u64, 1, ENGINE_FACT_LEN_BYTES_MAX as u64)?;
        }
        range("number of groups", self.groups.len() as u64, 1, GROUPS_MAX as u64)?;
        let facts =
            self.engine.iter().flat_map(|(name, value)| [("a text in `engine`", name), ("a text in `engine`", value)]);
        let dtypes = self.groups.iter().map(|group| ("dtype", &group.dtype));
        for (what, text) in [("the model's name", &self.model)].into_iter().chain(facts).chain(dtypes) {
            if !is_printable(text) {
                return Err(LayoutError::Unprintable { what, seen: text.clone() });
            }
        }
        self.groups.iter().try_for_each(|group| group.check(self.chunk_tokens))
    }
}

fn range(what: &'static str, seen: u64, min: u64, max: u64) -> Result<(), LayoutError> {
    if (min..=max).contains(&seen) { Ok(()) } else { Err(LayoutError::OutOfRange { what, seen, min, max }) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn llama3_8b() -> KvLayout {
        KvLayout {
            model: "meta-llama/Meta-Llama-3-8B".to_owned(),
            chunk_tokens: 256,
            tp_rank: 0,
            tp_size: 1,
            groups: vec![KvGroup {
                name: String::new(),
                dtype: "bfloat16".to_owned(),
                dtype_bytes: 2,
                layers: 32,
                kv_heads: 8,
                head_size: 128,
                kv_planes: 2,
                whole: false,
            }],
            engine: BTreeMap::new(),
        }
    }

    #[test]
    fn sizes_and_shape_of_llama3_8b() {
        // Broken in production: slots of the wrong length, and an LMCache peer that reads another shape.
        let layout = llama3_8b();
        let group = layout.first_group();
        assert_eq!(layout.check(), Ok(()));
        assert_eq!(group.token_bytes(), 131_072);
        assert_eq!(layout.chunk_bytes(), 33_554_432);
        assert_eq!(group.partial_bytes(1), 131_072);
        assert_eq!(group.wire_shape(256), [2, 32, 256, 1024]);
        assert_eq!(group.wire_format(), 1);
        assert_eq!(group.wire_dtype(), "bfloat16");
    }

    #[test]
    fn a_slot_holds_the_largest_chunk_of_all_groups() {
        // Broken in production: a hybrid model's larger chunks run over into the next slot.
        let mut layout = llama3_8b();
        let mut sliding = KvGroup { name: "sliding".to_owned(), layers: 40, ..layout.groups[0].clone() };
        layout.groups.push(sliding.clone());
        assert_eq!(layout.check(), Ok(()));
        assert_eq!(layout.chunk_bytes(), 40 * 1_048_576);
        sliding.layers = 0;
        layout.groups.push(sliding);
        assert_eq!(layout.check().unwrap_err().to_string(), "layers = 0; expected 1 to 4096");
        layout.groups = vec![layout.groups[0].clone(); GROUPS_MAX + 1];
        assert_eq!(layout.check().unwrap_err().to_string(), "number of groups = 9; expected 1 to 8");
    }

    #[test]
    fn numbers_out_of_range_are_refused_and_never_overflow() {
        // Broken in production: a chunk of 0 bytes divides by zero, or a product wraps and slots overlap.
        for (change, text) in [
            ((|l| l.groups[0].layers = 0) as fn(&mut KvLayout), "layers = 0; expected 1 to 4096"),
            (|l| l.groups[0].kv_planes = 3, "kv_planes = 3; expected 1 to 2"),
            (|l| l.tp_rank = 1, "rank 1 of 1; expected 0 to 0; give --tp-size as well as --rank"),
            (|l| l.model.clear(), "length of the model's name = 0; expected 1 to 256"),
            (|l| l.groups.clear(), "number of groups = 0; expected 1 to 8"),
            (|l| l.groups[0].head_size = 1 << 30, "bytes of a chunk = 281474976710656; expected 1 to 68719476736"),
        ] {
            let mut layout = llama3_8b();
            change(&mut layout);
            assert_eq!(layout.check().unwrap_err().to_string(), text);
        }
        let mut all_max = KvLayout { chunk_tokens: u32::MAX, ..llama3_8b() };
        let group = &mut all_max.groups[0];
        for field in [&mut group.layers, &mut group.kv_heads, &mut group.head_size, &mut group.dtype_bytes] {
            *field = u32::MAX;
        }
        group.kv_planes = u32::MAX;
        assert_eq!(all_max.chunk_bytes(), u64::MAX);
        assert!(all_max.check().is_err());
    }
}
