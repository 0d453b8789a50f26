//! A range of the pd_buffer that somebody owns.

use std::sync::Arc;

use super::{BufferError, Memory};
use crate::address::{AddressManager, AddressRange};

/// A range of the pd_buffer, given back when it is dropped. The memory behind it stays as long as the block does, also
/// when the manager has been closed, or is gone.
#[derive(Debug)]
#[must_use = "dropping a block gives its bytes to somebody else"]
pub struct Block {
    range: AddressRange,
    addresses: AddressManager,
    memory: Arc<Memory>,
}

impl Block {
    pub(super) const fn new(range: AddressRange, addresses: AddressManager, memory: Arc<Memory>) -> Self {
        Self { range, addresses, memory }
    }

    /// Where it starts, in bytes from the start of the pd_buffer.
    pub const fn offset_bytes(&self) -> u64 {
        self.range.start
    }

    /// How long it is.
    pub const fn len_bytes(&self) -> u64 {
        self.range.len_bytes
    }

    /// The memory that it is part of.
    pub const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Copies bytes in, at `offset` from the start of the block.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`]; nothing is written then.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BufferError> {
        let at = self.check(offset, bytes.len() as u64)?;
        self.memory.write(at, bytes)
    }

    /// Copies bytes out, from `offset` of the block on.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BufferError> {
        let at = self.check(offset, out.len() as u64)?;
        self.memory.read(at, out)
    }

    fn check(&self, offset: u64, len_bytes: u64) -> Result<u64, BufferError> {
        match offset.checked_add(len_bytes) {
            Some(end) if end <= self.range.len_bytes => Ok(self.range.start + offset),
            _ => Err(BufferError::OutOfRange { offset, len_bytes, buffer_len_bytes: self.range.len_bytes }),
        }
    }

    /// The range, whose giving back is the caller's from here on.
    pub(super) fn into_range(mut self) -> AddressRange {
        // An empty range is what `drop` passes over: the two handles are given up as in any drop.
        std::mem::replace(&mut self.range, AddressRange { start: 0, len_bytes: 0 })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.range.len_bytes == 0 {
            return;
        }
        if let Err(error) = self.addresses.free(self.range) {
            debug_assert!(false, "a block is freed once, by its owner: {error}");
            tracing::error!(%error, "a block of the pd_buffer cannot be given back");
        }
    }
}
