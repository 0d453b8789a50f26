//! What a reader is told about an address space.

/// One consistent view of the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in the address space.
    pub len_bytes: u64,
    /// Bytes taken, rounding up to the alignment included.
    pub used_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Longest free range, in bytes.
    pub largest_free_bytes: u64,
    /// Number of free ranges; neighbours count as one.
    pub free_range_count: usize,
}

/// Counters of one moment, and how many more ranges of some lengths would fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageSnapshot {
    /// The counters.
    pub usage: Usage,
    /// For each length asked after, how many ranges of it would fit now, if nothing else were taken.
    pub fits: Vec<u64>,
}
