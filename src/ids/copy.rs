//! One contiguous copy between two pd_buffers.

/// Bytes to copy. Offsets are from the start of the pd_buffer of that side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteCopy {
    /// Where to read in our buffer.
    pub local_offset: u64,
    /// Where to write in the peer's.
    pub remote_offset: u64,
    /// How much.
    pub len_bytes: u64,
}
