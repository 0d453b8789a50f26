//! A range of addresses.

/// A range of the address space, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    /// First byte.
    pub start: u64,
    /// Length, never 0.
    pub len_bytes: u64,
}

impl AddressRange {
    /// First byte after the range.
    pub const fn end(&self) -> u64 {
        self.start + self.len_bytes
    }
}
