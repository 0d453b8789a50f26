//! Why the address manager refuses.

/// Why the address manager refused. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// The caller asked for nothing, which is a mistake and not a shortage.
    #[error("an allocation of 0 bytes was asked for; ask for at least 1")]
    ZeroSize,
    /// An alignment of 0.
    #[error("an alignment of 0 bytes was asked for; ask for at least 1")]
    ZeroAlignment,
    /// Slots that would start off the alignment, or have no length.
    #[error("slots of {slot_bytes} bytes were asked for; ask for a multiple of the alignment of {alignment} bytes")]
    UnalignedSlots {
        /// Length of a slot, in bytes.
        slot_bytes: u64,
        /// Alignment, in bytes.
        alignment: u64,
    },
    /// There is no room for all of it. How the free bytes are scattered takes longer to tell: ask for a snapshot.
    #[error(
        "no room for {count} ranges of {len_bytes} bytes in all: {free_bytes} bytes are free, in ranges too few or too short; free some or grow"
    )]
    OutOfMemory {
        /// Ranges asked for.
        count: usize,
        /// Length of all of them together, in bytes.
        len_bytes: u64,
        /// Free bytes.
        free_bytes: u64,
    },
    /// The range to free was not handed out, or was freed before, or only overlaps one that was.
    #[error("bytes {start}..{end} are not an allocated range; free exactly what was allocated, once")]
    NotAllocated {
        /// First byte.
        start: u64,
        /// First byte after it.
        end: u64,
    },
    /// The address space would pass 2^64 bytes.
    #[error("growing {len_bytes} bytes by {grow_bytes} passes the end of a 64-bit address space")]
    TooLong {
        /// Bytes now.
        len_bytes: u64,
        /// Bytes asked for.
        grow_bytes: u64,
    },
    /// The manager was closed: what is out can be freed, and nothing more is handed out.
    #[error("the address manager is closed; nothing more is handed out")]
    Closed,
}
