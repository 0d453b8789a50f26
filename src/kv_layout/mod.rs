//! What a chunk is, in bytes: the KV cache of `chunk_tokens` tokens over all layers of one tensor-parallel rank.
//!
//! A layout comes from a model hub's `config.json` ([`from_model_config`]) or from the connector, which knows its
//! engine's tensors ([`from_layout_json`]). Both take text: reading files is the caller's business.

mod dtype;
mod error;
mod fingerprint;
mod given;
mod model;

pub use dtype::{DTYPES_ACCEPTED, OPAQUE_DTYPE, parse_dtype};
pub use error::LayoutError;
pub(crate) use error::suggestion;
pub use fingerprint::{FieldDifference, first_difference};
pub use given::{GivenDefaults, from_layout_json};
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

/// Shape and meaning of a chunk.
///
/// Where only the connector knows what the bytes mean, `dtype` is [`OPAQUE_DTYPE`] and a token is one head of
/// `head_size` bytes in one plane of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    /// The model's name, as both sides must give it.
    pub model: String,
    /// Element type as torch calls it: `bfloat16`.
    pub dtype: String,
    /// Bytes of one element.
    pub dtype_bytes: u32,
    /// Layers with a KV cache.
    pub layers: u32,
    /// KV heads of this rank (1 for MLA).
    pub kv_heads: u32,
    /// Elements of one head.
    pub head_size: u32,
    /// 2 where keys and values are kept apart, 1 for MLA's compressed KV.
    pub kv_planes: u32,
    /// Tokens in a whole chunk.
    pub chunk_tokens: u32,
    /// Tensor-parallel rank.
    pub tp_rank: u32,
    /// Number of ranks.
    pub tp_size: u32,
}

impl KvLayout {
    /// Bytes of one token: `kv_planes * layers * kv_heads * head_size * dtype_bytes`.
    pub fn token_bytes(&self) -> u64 {
        [self.layers, self.kv_heads, self.head_size, self.dtype_bytes]
            .iter()
            .fold(u64::from(self.kv_planes), |bytes, factor| bytes.saturating_mul(u64::from(*factor)))
    }

    /// Bytes of a whole chunk.
    pub fn chunk_bytes(&self) -> u64 {
        self.partial_bytes(self.chunk_tokens)
    }

    /// Bytes of a chunk of `tokens` tokens.
    pub fn partial_bytes(&self, tokens: u32) -> u64 {
        self.token_bytes().saturating_mul(u64::from(tokens))
    }

    /// Whether only the connector knows what the bytes mean.
    pub fn is_opaque(&self) -> bool {
        self.dtype == OPAQUE_DTYPE
    }

    /// Shape of a whole chunk as LMCache's `AllocRequest` gives it: `[planes, layers, tokens, kv_heads * head_size]`.
    pub fn wire_shape(&self) -> Vec<u64> {
        vec![
            u64::from(self.kv_planes),
            u64::from(self.layers),
            u64::from(self.chunk_tokens),
            u64::from(self.kv_heads) * u64::from(self.head_size),
        ]
    }

    /// LMCache's number for the memory format: [`WIRE_FORMAT_KV_2LTD`], or [`WIRE_FORMAT_KV_MLA`] where there is a
    /// single plane.
    pub const fn wire_format(&self) -> i64 {
        if self.kv_planes == 1 { WIRE_FORMAT_KV_MLA } else { WIRE_FORMAT_KV_2LTD }
    }

    /// Element type as LMCache's `AllocRequest` gives it. Engines keep 8-bit floats in tensors of `uint8`, and
    /// bytes without a known meaning are `uint8` as well.
    pub fn wire_dtype(&self) -> &str {
        if self.is_opaque() || self.dtype.starts_with("float8") { "uint8" } else { &self.dtype }
    }

    /// Checks every number, so that all the sizes above are exact and none is 0.
    ///
    /// # Errors
    /// The first number that is out of range, by name.
    pub fn check(&self) -> Result<(), LayoutError> {
        let name_len_bytes = self.model.len() as u64;
        range("length of the model's name", name_len_bytes, 1, MODEL_LEN_BYTES_MAX as u64)?;
        range("layers", self.layers.into(), 1, LAYERS_MAX.into())?;
        range("kv_heads", self.kv_heads.into(), 1, KV_HEADS_MAX.into())?;
        range("head_size", self.head_size.into(), 1, HEAD_SIZE_MAX.into())?;
        range("kv_planes", self.kv_planes.into(), 1, 2)?;
        range("dtype_bytes", self.dtype_bytes.into(), 1, 16)?;
        range("chunk_tokens", self.chunk_tokens.into(), 1, CHUNK_TOKENS_MAX.into())?;
        range("tp_size", self.tp_size.into(), 1, TP_SIZE_MAX.into())?;
        if self.tp_rank >= self.tp_size {
            return Err(LayoutError::Rank { tp_rank: self.tp_rank, tp_size: self.tp_size });
        }
        // The products saturate, so one that does not fit 64 bits is refused here as well.
        range("bytes of a chunk", self.chunk_bytes(), 1, CHUNK_BYTES_MAX)
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
            dtype: "bfloat16".to_owned(),
            dtype_bytes: 2,
            layers: 32,
            kv_heads: 8,
            head_size: 128,
            kv_planes: 2,
            chunk_tokens: 256,
            tp_rank: 0,
            tp_size: 1,
        }
    }

    #[test]
    fn sizes_and_shape_of_llama3_8b() {
        // Broken in production: slots of the wrong length, and an LMCache peer that reads another shape.
        let layout = llama3_8b();
        assert_eq!(layout.check(), Ok(()));
        assert_eq!(layout.token_bytes(), 131_072);
        assert_eq!(layout.chunk_bytes(), 33_554_432);
        assert_eq!(layout.partial_bytes(1), 131_072);
        assert_eq!(layout.wire_shape(), [2, 32, 256, 1024]);
        assert_eq!(layout.wire_format(), 1);
        assert_eq!(layout.wire_dtype(), "bfloat16");
    }

    #[test]
    fn numbers_out_of_range_are_refused_and_never_overflow() {
        // Broken in production: a chunk of 0 bytes divides by zero, or a product wraps and slots overlap.
        for (change, text) in [
            ((|l| l.layers = 0) as fn(&mut KvLayout), "layers = 0; expected 1 to 4096"),
            (|l| l.kv_planes = 3, "kv_planes = 3; expected 1 to 2"),
            (|l| l.tp_rank = 1, "rank 1 of 1; expected 0 to 0; give --tp-size as well as --rank"),
            (|l| l.model.clear(), "length of the model's name = 0; expected 1 to 256"),
            (|l| l.head_size = 1 << 30, "bytes of a chunk = 281474976710656; expected 1 to 68719476736"),
        ] {
            let mut layout = llama3_8b();
            change(&mut layout);
            assert_eq!(layout.check().unwrap_err().to_string(), text);
        }
        let all_max = KvLayout {
            layers: u32::MAX,
            kv_heads: u32::MAX,
            head_size: u32::MAX,
            dtype_bytes: u32::MAX,
            kv_planes: u32::MAX,
            chunk_tokens: u32::MAX,
            ..llama3_8b()
        };
        assert_eq!(all_max.chunk_bytes(), u64::MAX);
        assert!(all_max.check().is_err());
    }
}
