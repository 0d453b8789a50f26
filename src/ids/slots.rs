//! What a client and its daemon say of slots: the same value in the connector API's messages and in the node.

use serde::{Deserialize, Deserializer, Serialize};

use super::{ChunkKey, GroupIndex, SlotIndex};

/// Part of a staged slot; the whole of its chunk when `len_bytes` is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotPart {
    /// A slot from `staged`.
    pub slot: SlotIndex,
    /// Where the part starts, in bytes from the start of the slot.
    #[serde(default, deserialize_with = "nil_is_left_out")]
    pub offset_bytes: u64,
    /// How long it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub len_bytes: Option<u64>,
}

/// A local slot to fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedSlot {
    /// Position in `keys`.
    pub chunk: u32,
    /// The slot.
    pub slot: SlotIndex,
    /// Where it starts in the buffer, in bytes.
    pub offset_bytes: u64,
    /// Length of the chunk: that of a whole one but for a short last chunk.
    pub len_bytes: u64,
}

/// A chunk that can be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyChunk {
    /// Its key.
    pub key: ChunkKey,
    /// Of which group of layers it is.
    pub group: GroupIndex,
    /// The slot.
    pub slot: SlotIndex,
    /// Where it starts in the buffer, in bytes.
    pub offset_bytes: u64,
    /// Its length.
    pub len_bytes: u64,
}

/// A field that may be left out may be nil as well.
pub(crate) fn nil_is_left_out<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
