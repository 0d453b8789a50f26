//! What a chunk is, as far as a node needs to know.

use crate::ids::{Failure, FailureKind, GroupIndex, RequestId};

/// What the chunks of a layout are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkShape {
    /// Bytes of a slot: of a whole chunk of the group that has the largest.
    pub slot_bytes: u64,
    /// Tokens in a whole chunk.
    pub chunk_tokens: u32,
    /// Bytes of one token, for each group of layers.
    pub token_bytes: Vec<u64>,
    /// For each group, whether its chunks are whole, the last one as well.
    pub whole: Vec<bool>,
    /// LMCache's number of the memory format, of the first group.
    pub wire_format: i64,
    /// Shape of a whole chunk of the first group on LMCache's wire.
    pub wire_shape: Vec<u64>,
    /// Element type of the first group as torch calls it.
    pub dtype: String,
}

/// What one chunk of a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkSize {
    pub(super) group: GroupIndex,
    pub(super) len_bytes: u64,
}

impl ChunkShape {
    /// The chunks of a request: whole ones, but for the last of each group that has short ones, which has `last_tokens` tokens.
    /// Without `groups` all are of the first.
    ///
    /// # Errors
    /// Numbers that do not go together, as a failure that names them.
    pub(super) fn sizes(
        &self,
        id: &RequestId,
        count: usize,
        groups: &[GroupIndex],
        last_tokens: u64,
    ) -> Result<Vec<ChunkSize>, Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        if count == 0 {
            return bad(format!("{id} has no chunks; send at least one key"));
        }
        if last_tokens == 0 || last_tokens > u64::from(self.chunk_tokens) {
            let expected = format!("expected 1 to {}", self.chunk_tokens);
            return bad(format!("{id} has {last_tokens} tokens in its last chunk; {expected}"));
        }
        if !groups.is_empty() && groups.len() != count {
            return bad(format!("{id} has {count} chunks and {} groups; name the group of each chunk", groups.len()));
        }
        if let Some(unknown) = groups.iter().find(|group| usize::from(group.0) >= self.token_bytes.len()) {
            let known = self.token_bytes.len();
            return bad(format!("{id} has a chunk of group {unknown}; the layout has {known}, counted from 0"));
        }
        let group_of = |index: usize| groups.get(index).copied().unwrap_or_default();
        let mut last_seen = vec![false; self.token_bytes.len()];
        let mut sizes: Vec<ChunkSize> = (0..count)
            .rev()
            .map(|index| {
                let group = group_of(index);
                let is_last = !std::mem::replace(&mut last_seen[usize::from(group.0)], true);
                let tokens = if is_last && !self.is_whole(group) { last_tokens } else { u64::from(self.chunk_tokens) };
                ChunkSize { group, len_bytes: self.token_bytes[usize::from(group.0)] * tokens }
            })
            .collect();
        sizes.reverse();
        Ok(sizes)
    }

    /// Whether this group has no short chunks.
    pub(super) fn is_whole(&self, group: GroupIndex) -> bool {
        self.whole.get(usize::from(group.0)).copied().unwrap_or(false)
    }

    /// Why LMCache's wire cannot describe these chunks: it knows one group, whose last chunk may be short. None where it can.
    #[cfg(feature = "lmcache")]
    pub(super) fn beyond_lmcache(&self) -> Option<&'static str> {
        match (self.token_bytes.len(), self.is_whole(GroupIndex::default())) {
            (1, false) => None,
            (1, true) => {
                Some("the layout's chunks are blocks inside a window or states, and LMCache's are ranges of tokens")
            }
            _ => Some("the layout has several groups of layers, and LMCache's wire has one"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(count: usize, groups: &[u8], last_tokens: u64) -> Result<Vec<u64>, String> {
        let shape = ChunkShape {
            slot_bytes: 80,
            chunk_tokens: 8,
            token_bytes: vec![10, 3, 2],
            whole: vec![false, false, true],
            wire_format: 1,
            wire_shape: vec![],
            dtype: "bfloat16".into(),
        };
        let groups: Vec<GroupIndex> = groups.iter().copied().map(GroupIndex).collect();
        let sizes = shape.sizes(&RequestId::new("r").unwrap(), count, &groups, last_tokens);
        sizes.map(|sizes| sizes.iter().map(|size| size.len_bytes).collect()).map_err(|failure| failure.text)
    }

    #[test]
    fn the_last_chunk_of_every_group_is_short() {
        // Broken in production: a hybrid model's last chunk is cut, or reads over its end into the next one.
        assert_eq!(sizes(3, &[], 2).unwrap(), [80, 80, 20]);
        assert_eq!(sizes(1, &[1], 8).unwrap(), [24]);
        assert_eq!(sizes(4, &[0, 1, 0, 1], 1).unwrap(), [80, 24, 10, 3]);
        assert_eq!(sizes(3, &[1, 0, 0], 5).unwrap(), [15, 80, 50]);
        // But for groups of which every chunk is whole.
        assert_eq!(sizes(4, &[2, 0, 2, 0], 5).unwrap(), [16, 80, 16, 50]);
    }

    #[test]
    fn numbers_that_do_not_go_together_are_refused() {
        // Broken in production: a peer's numbers index past the end of a table.
        assert_eq!(sizes(0, &[], 1).unwrap_err(), "r has no chunks; send at least one key");
        assert_eq!(sizes(1, &[], 9).unwrap_err(), "r has 9 tokens in its last chunk; expected 1 to 8");
        assert_eq!(sizes(1, &[], 0).unwrap_err(), "r has 0 tokens in its last chunk; expected 1 to 8");
        assert_eq!(sizes(2, &[0], 1).unwrap_err(), "r has 2 chunks and 1 groups; name the group of each chunk");
        assert_eq!(sizes(1, &[3], 1).unwrap_err(), "r has a chunk of group 3; the layout has 3, counted from 0");
    }
}
