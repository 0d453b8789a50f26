//! Cutting copies where registered memory is in pieces.

use super::ByteCopy;

/// The same bytes in copies that cross no end of a piece, on either side: a buffer that has grown was registered step by
/// step, and an engine moves bytes inside one registration at a time.
///
/// `local_ends` and `remote_ends` say where each piece ends, in ascending order; the copies are inside both buffers.
pub fn cut(copies: &[ByteCopy], local_ends: &[u64], remote_ends: &[u64]) -> Vec<ByteCopy> {
    let mut pieces = Vec::with_capacity(copies.len());
    for &copy in copies {
        let mut left = copy;
        while left.len_bytes > 0 {
            let len_bytes = left
                .len_bytes
                .min(until_end(local_ends, left.local_offset))
                .min(until_end(remote_ends, left.remote_offset));
            pieces.push(ByteCopy { len_bytes, ..left });
            left = ByteCopy {
                local_offset: left.local_offset + len_bytes,
                remote_offset: left.remote_offset + len_bytes,
                len_bytes: left.len_bytes - len_bytes,
            };
        }
    }
    pieces
}

/// Bytes from `offset` to the end of its piece; behind the last end there is one more, without an end.
fn until_end(ends: &[u64], offset: u64) -> u64 {
    let piece = ends.partition_point(|&end| end <= offset);
    ends.get(piece).map_or(u64::MAX, |end| end - offset)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn copy(local_offset: u64, remote_offset: u64, len_bytes: u64) -> ByteCopy {
        ByteCopy { local_offset, remote_offset, len_bytes }
    }

    #[test]
    fn a_copy_is_cut_at_the_ends_of_both_sides() {
        // Broken in production: a chunk that lies across two steps of a grown buffer cannot be sent.
        assert_eq!(cut(&[copy(0, 0, 10)], &[10, 20], &[10]), [copy(0, 0, 10)]);
        assert_eq!(cut(&[copy(5, 100, 10)], &[10, 20], &[200]), [copy(5, 100, 5), copy(10, 105, 5)]);
        assert_eq!(
            cut(&[copy(5, 0, 20)], &[10, 20, 30], &[7, 30]),
            [copy(5, 0, 5), copy(10, 5, 2), copy(12, 7, 8), copy(20, 15, 5)]
        );
        assert_eq!(cut(&[copy(3, 3, 0)], &[10], &[10]), []);
        assert_eq!(cut(&[copy(3, 4, 5)], &[], &[]), [copy(3, 4, 5)]);
    }

    fn ends() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::btree_set(1_u64..150, 0..8).prop_map(|ends| ends.into_iter().collect())
    }

    proptest! {
        #[test]
        fn the_bytes_are_the_same_and_no_piece_crosses_an_end(
            copies in prop::collection::vec((0_u64..100, 0_u64..100, 0_u64..60), 0..8),
            local_ends in ends(),
            remote_ends in ends(),
        ) {
            // Broken in production: bytes at the end of a step are left out, or land in another chunk.
            let copies: Vec<ByteCopy> = copies.into_iter().map(|(local, remote, len)| copy(local, remote, len)).collect();
            let pieces = cut(&copies, &local_ends, &remote_ends);
            let bytes = |list: &[ByteCopy]| -> Vec<(u64, u64)> {
                list.iter().flat_map(|c| (0..c.len_bytes).map(|i| (c.local_offset + i, c.remote_offset + i))).collect()
            };
            prop_assert_eq!(bytes(&pieces), bytes(&copies));
            let crosses = |ends: &[u64], at: u64, len: u64| ends.iter().any(|&end| at < end && end < at + len);
            for piece in &pieces {
                prop_assert!(piece.len_bytes > 0);
                prop_assert!(!crosses(&local_ends, piece.local_offset, piece.len_bytes));
                prop_assert!(!crosses(&remote_ends, piece.remote_offset, piece.len_bytes));
            }
            // No more cuts than ends: a piece that could have been longer ends at one.
            let cuts = local_ends.len() + remote_ends.len();
            prop_assert!(pieces.len() <= copies.len() * (cuts + 1));
        }
    }
}
