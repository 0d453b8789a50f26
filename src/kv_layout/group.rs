//! The layers that keep the same shape of KV cache.

use super::error::LayoutError;
use super::{CHUNK_BYTES_MAX, HEAD_SIZE_MAX, KV_HEADS_MAX, LAYERS_MAX, OPAQUE_DTYPE, range};
use super::{WIRE_FORMAT_KV_2LTD, WIRE_FORMAT_KV_MLA};

/// Longest name of a group, in bytes.
pub const GROUP_NAME_LEN_BYTES_MAX: usize = 64;

/// The layers of a model that keep KV cache of one shape: all of them in most models; in hybrid models the full
/// attention layers are one group and the sliding-window ones another, as a draft head is beside MLA.
///
/// Where only the connector knows what the bytes mean, `dtype` is [`OPAQUE_DTYPE`] and a token is one head of
/// `head_size` bytes in one plane of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvGroup {
    /// What it is called; empty for the only group of a layout.
    pub name: String,
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
    /// Whether every chunk of the group has its whole length, the last one as well: blocks inside a window and states
    /// are such chunks, whose number does not follow from the prompt's length alone.
    pub whole: bool,
}

impl KvGroup {
    /// Bytes of one token: `kv_planes * layers * kv_heads * head_size * dtype_bytes`.
    pub fn token_bytes(&self) -> u64 {
        [self.layers, self.kv_heads, self.head_size, self.dtype_bytes]
            .iter()
            .fold(u64::from(self.kv_planes), |bytes, factor| bytes.saturating_mul(u64::from(*factor)))
    }

    /// Bytes of a chunk of `tokens` tokens.
    pub fn partial_bytes(&self, tokens: u32) -> u64 {
        self.token_bytes().saturating_mul(u64::from(tokens))
    }

    /// Whether only the connector knows what the bytes mean.
    pub fn is_opaque(&self) -> bool {
        self.dtype == OPAQUE_DTYPE
    }

    /// Shape of a chunk of `tokens` tokens as LMCache's `AllocRequest` gives it:
    /// `[planes, layers, tokens, kv_heads * head_size]`.
    pub fn wire_shape(&self, tokens: u32) -> Vec<u64> {
        vec![
            u64::from(self.kv_planes),
            u64::from(self.layers),
            u64::from(tokens),
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

    /// Its fields by name, as the handshake compares them.
    pub(super) fn fingerprint(&self) -> Vec<(&'static str, String)> {
        let format = match (self.is_opaque(), self.kv_planes) {
            (true, _) => "opaque",
            (false, 1) => "KV_MLA_FMT",
            (false, _) => "KV_2LTD",
        };
        let mut fields = vec![
            ("dtype", self.dtype.clone()),
            ("layers", self.layers.to_string()),
            ("kv_heads", self.kv_heads.to_string()),
            ("head_size", self.head_size.to_string()),
            ("planes", self.kv_planes.to_string()),
            ("format", format.to_owned()),
        ];
        // Daemons that know no such groups agree on all the others.
        if self.whole {
            fields.push(("chunks", "whole".to_owned()));
        }
        fields
    }

    /// Checks every number, so that all the sizes above are exact and none is 0.
    pub(super) fn check(&self, chunk_tokens: u32) -> Result<(), LayoutError> {
        range("length of a group's name", self.name.len() as u64, 0, GROUP_NAME_LEN_BYTES_MAX as u64)?;
        range("layers", self.layers.into(), 1, LAYERS_MAX.into())?;
        range("kv_heads", self.kv_heads.into(), 1, KV_HEADS_MAX.into())?;
        range("head_size", self.head_size.into(), 1, HEAD_SIZE_MAX.into())?;
        range("kv_planes", self.kv_planes.into(), 1, 2)?;
        range("dtype_bytes", self.dtype_bytes.into(), 1, 16)?;
        // The products saturate, so one that does not fit 64 bits is refused here as well.
        range("bytes of a chunk", self.partial_bytes(chunk_tokens), 1, CHUNK_BYTES_MAX)
    }
}
