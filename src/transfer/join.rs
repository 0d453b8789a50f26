//! Checking and joining copies, and checking pieces of memory, before an engine sees them.

use std::ops::Range;

use super::{ByteCopy, TransferError};
use crate::buffer::Memory;

/// Refuses copies that leave either buffer.
///
/// # Errors
/// [`TransferError::OutOfRange`] for the first one.
pub fn check_ranges(copies: &[ByteCopy], local_len_bytes: u64, remote_len_bytes: u64) -> Result<(), TransferError> {
    for copy in copies {
        check_range("local", copy.local_offset, copy.len_bytes, local_len_bytes)?;
        check_range("remote", copy.remote_offset, copy.len_bytes, remote_len_bytes)?;
    }
    Ok(())
}

fn check_range(side: &'static str, offset: u64, len_bytes: u64, buffer_len_bytes: u64) -> Result<(), TransferError> {
    match offset.checked_add(len_bytes) {
        Some(end) if end <= buffer_len_bytes => Ok(()),
        _ => Err(TransferError::OutOfRange { side, offset, len_bytes, buffer_len_bytes }),
    }
}

/// Refuses a piece of `memory` that does not begin where the registered part ends, or that leaves the memory.
pub(super) fn check_next_piece(
    engine: &'static str,
    memory: &Memory,
    registered_bytes: u64,
    piece: &Range<u64>,
) -> Result<(), TransferError> {
    if piece.start == registered_bytes && piece.start < piece.end && piece.end <= memory.len_bytes() {
        return Ok(());
    }
    Err(TransferError::Memory {
        engine,
        kind: memory.kind(),
        len_bytes: piece.end.saturating_sub(piece.start),
        reason: format!(
            "bytes {}..{} are not the next piece: {registered_bytes} of {} bytes are registered already",
            piece.start,
            piece.end,
            memory.len_bytes()
        ),
    })
}

/// The same bytes in as few copies as possible: sorted by destination, those joined that touch on both sides, empty
/// ones left out. The ranges have passed [`check_ranges`]. Where destinations overlap, which copy wins is not said.
pub fn join(copies: &[ByteCopy]) -> Vec<ByteCopy> {
    let mut sorted: Vec<ByteCopy> = copies.iter().copied().filter(|copy| copy.len_bytes > 0).collect();
    sorted.sort_unstable_by_key(|copy| (copy.remote_offset, copy.local_offset));
    let mut joined: Vec<ByteCopy> = Vec::with_capacity(sorted.len());
    for copy in sorted {
        match joined.last_mut() {
            Some(last) if touches(last, &copy) => last.len_bytes += copy.len_bytes,
            _ => joined.push(copy),
        }
    }
    joined
}

const fn touches(left: &ByteCopy, right: &ByteCopy) -> bool {
    left.local_offset + left.len_bytes == right.local_offset
        && left.remote_offset + left.len_bytes == right.remote_offset
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn copy(local_offset: u64, remote_offset: u64, len_bytes: u64) -> ByteCopy {
        ByteCopy { local_offset, remote_offset, len_bytes }
    }

    /// Which local byte ends up in which remote byte.
    fn bytes(copies: &[ByteCopy]) -> BTreeMap<u64, u64> {
        let mut map = BTreeMap::new();
        for copy in copies {
            for i in 0..copy.len_bytes {
                map.insert(copy.remote_offset + i, copy.local_offset + i);
            }
        }
        map
    }

    /// Copies whose destinations do not overlap, in any order: neighbours on none, one or both sides.
    fn copies() -> impl Strategy<Value = Vec<ByteCopy>> {
        let piece = (0_u64..4, 0_u64..3, prop_oneof![Just(None), (0_u64..64).prop_map(Some)]);
        prop::collection::vec(piece, 0..24)
            .prop_map(|pieces| {
                let (mut remote, mut local) = (0, 0);
                let mut list = Vec::new();
                for (len_bytes, gap, jump) in pieces {
                    remote += gap;
                    local = jump.unwrap_or(local);
                    list.push(copy(local, remote, len_bytes));
                    remote += len_bytes;
                    local += len_bytes;
                }
                list
            })
            .prop_shuffle()
    }

    proptest! {
        #[test]
        fn joining_moves_the_same_bytes_in_the_fewest_copies(copies in copies()) {
            // Broken in production: a chunk of a prompt lands in another chunk's slot, or is not sent at all.
            let joined = join(&copies);
            prop_assert_eq!(bytes(&joined), bytes(&copies));
            prop_assert_eq!(joined.iter().map(|c| c.len_bytes).sum::<u64>(), copies.iter().map(|c| c.len_bytes).sum::<u64>());
            // Fewest: every break between two remote bytes is a real one.
            let map = bytes(&copies);
            let runs = map.iter().filter(|&(&remote, &local)| {
                remote.checked_sub(1).and_then(|before| map.get(&before)).copied() != local.checked_sub(1)
                    || local == 0
            }).count();
            prop_assert_eq!(joined.len(), runs);
        }
    }

    #[test]
    fn only_copies_that_touch_on_both_sides_become_one() {
        // Broken in production: two chunks that are neighbours at the receiver only are sent as one wrong range.
        assert_eq!(join(&[copy(8, 108, 8), copy(0, 100, 8)]), [copy(0, 100, 16)]);
        assert_eq!(join(&[copy(0, 100, 8), copy(16, 108, 8)]).len(), 2);
        assert_eq!(join(&[copy(0, 100, 8), copy(8, 116, 8)]).len(), 2);
        assert_eq!(join(&[copy(0, 0, 0)]), []);
    }

    #[test]
    fn a_copy_that_leaves_a_buffer_names_the_side() {
        // Broken in production: a stale slot index writes past the end of the receiver's buffer.
        let side = |copies: &[ByteCopy]| match check_ranges(copies, 100, 50) {
            Err(TransferError::OutOfRange { side, .. }) => Some(side),
            _ => None,
        };
        assert_eq!(side(&[copy(0, 0, 50), copy(50, 0, 50)]), None);
        assert_eq!(side(&[copy(0, 1, 50)]), Some("remote"));
        assert_eq!(side(&[copy(51, 0, 50)]), Some("local"));
        assert_eq!(side(&[copy(u64::MAX, 0, 2)]), Some("local"));
        assert_eq!(side(&[copy(0, u64::MAX, 1)]), Some("remote"));
    }
}
