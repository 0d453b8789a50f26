//! A buffer as LMCache describes it.

/// Equal pages side by side, one for each chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// 0 is host memory, 1 that of a GPU: NIXL's numbering.
    pub memory_type: u32,
    /// Which GPU; 0 for host memory.
    pub device: u64,
    /// Of the first page, in its owner's address space.
    pub address: u64,
    /// Length of each page.
    pub page_bytes: u64,
    /// How many.
    pub count: u64,
}

impl Pages {
    /// Length of all together, in bytes.
    pub const fn len_bytes(&self) -> u64 {
        self.page_bytes * self.count
    }
}
