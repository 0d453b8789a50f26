//! What a block of the pd_buffer holds: tensors, in bytes.

use std::ops::Range;

use super::BufferError;

/// One tensor of a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorShape {
    /// Its extents.
    pub dimensions: Vec<u64>,
    /// Length of one element, in bytes.
    pub element_bytes: u64,
}

impl TensorShape {
    /// Its length; none past 2^64.
    pub fn len_bytes(&self) -> Option<u64> {
        self.dimensions.iter().try_fold(self.element_bytes, |len_bytes, extent| len_bytes.checked_mul(*extent))
    }
}

/// Tensors that lie one behind the other in a block. Never 0 bytes, never past 2^64.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BlockLayout {
    tensors: Vec<TensorShape>,
    len_bytes: u64,
}

impl BlockLayout {
    /// A block of these tensors, in this order.
    ///
    /// # Errors
    /// [`BufferError::Layout`] when they have 0 bytes together, or pass 2^64.
    pub fn new(tensors: Vec<TensorShape>) -> Result<Self, BufferError> {
        let len_bytes = tensors.iter().try_fold(0_u64, |sum, tensor| sum.checked_add(tensor.len_bytes()?));
        match len_bytes {
            Some(0) => Err(BufferError::Layout { reason: format!("{} tensors of 0 bytes together", tensors.len()) }),
            Some(len_bytes) => Ok(Self { tensors, len_bytes }),
            None => Err(BufferError::Layout { reason: "tensors of more than 2^64 bytes".to_owned() }),
        }
    }

    /// A block of plain bytes.
    ///
    /// # Errors
    /// [`BufferError::Layout`] for 0 bytes.
    pub fn of_bytes(len_bytes: u64) -> Result<Self, BufferError> {
        Self::new(vec![TensorShape { dimensions: vec![len_bytes], element_bytes: 1 }])
    }

    /// What is in a block.
    pub fn tensors(&self) -> &[TensorShape] {
        &self.tensors
    }

    /// How long a block is.
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Where a tensor is, in bytes from the start of the block.
    pub fn tensor_range(&self, index: usize) -> Option<Range<u64>> {
        let tensor = self.tensors.get(index)?;
        let len_of = |tensor: &TensorShape| tensor.len_bytes().unwrap_or(0);
        let start = self.tensors[..index].iter().map(len_of).sum::<u64>();
        Some(start..start + len_of(tensor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dimensions: &[u64], element_bytes: u64) -> TensorShape {
        TensorShape { dimensions: dimensions.to_vec(), element_bytes }
    }

    #[test]
    fn a_block_is_as_long_as_its_tensors() {
        // Broken in production: the keys of one layer lie over the values of another.
        let layout = BlockLayout::new(vec![tensor(&[2, 3, 4], 2), tensor(&[], 8), tensor(&[5], 1)]).unwrap();
        assert_eq!(layout.len_bytes(), 48 + 8 + 5);
        assert_eq!(layout.tensor_range(0), Some(0..48));
        assert_eq!(layout.tensor_range(2), Some(56..61));
        assert_eq!(layout.tensor_range(3), None);
        assert_eq!(BlockLayout::of_bytes(7).unwrap().len_bytes(), 7);
    }

    #[test]
    fn nothing_and_too_much_are_mistakes_and_not_a_shortage() {
        // Broken in production: a caller with a broken shape evicts other requests' chunks to make room for it.
        for tensors in [
            vec![],
            vec![tensor(&[4, 0], 2)],
            vec![tensor(&[1 << 32, 1 << 32], 1)],
            vec![tensor(&[u64::MAX], 1), tensor(&[1], 1)],
        ] {
            assert!(matches!(BlockLayout::new(tensors), Err(BufferError::Layout { .. })));
        }
    }
}
