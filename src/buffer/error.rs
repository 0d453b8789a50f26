//! Why memory could not be had, mapped or reached.

/// Why memory could not be had, mapped or reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BufferError {
    /// The machine does not give that much memory.
    #[error("cannot allocate {len_bytes} bytes of host memory: {reason}; lower pd_buffer_size or free memory")]
    Allocate {
        /// How much was asked for.
        len_bytes: u64,
        /// How much is free, and what the system said.
        reason: String,
    },
    /// Another process's memory cannot be mapped.
    #[error("cannot map {len_bytes} bytes of descriptor {fd} of process {pid}: {reason}")]
    Map {
        /// The owner.
        pid: u32,
        /// Its descriptor.
        fd: i32,
        /// How much it announced.
        len_bytes: u64,
        /// What was seen and what was expected.
        reason: String,
    },
    /// A read or write reaches outside the memory.
    #[error("{len_bytes} bytes at {offset} leave the buffer of {buffer_len_bytes} bytes")]
    OutOfRange {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        len_bytes: u64,
        /// How long the memory is.
        buffer_len_bytes: u64,
    },
    /// There is no usable GPU.
    #[error("no usable CUDA device: {reason}; use pd_buffer_device: cpu, or run on a machine with an NVIDIA driver")]
    Cuda {
        /// What the driver, or the lack of one, said.
        reason: String,
    },
    /// The shape of a block is none.
    #[error("a block of {reason} was asked for; ask for at least 1 byte and at most the buffer")]
    Layout {
        /// What is wrong with it.
        reason: String,
    },
    /// The options of a memory manager contradict each other.
    #[error("a pd_buffer of {initial_bytes} bytes at first, in steps of {step_bytes} up to {ceiling_bytes}: {reason}")]
    Options {
        /// How long it is to be at first.
        initial_bytes: u64,
        /// How much is to be added at a time.
        step_bytes: u64,
        /// How long it may become.
        ceiling_bytes: u64,
        /// What is wrong with that.
        reason: &'static str,
    },
    /// There is no room, and the buffer is, or would be, at its ceiling.
    #[error(
        "no room for {count} blocks of {len_bytes} bytes: {free_bytes} of {buffer_len_bytes} bytes are free, the longest free range has {largest_free_bytes}, and the buffer may have {ceiling_bytes}"
    )]
    OutOfMemory {
        /// Blocks asked for.
        count: usize,
        /// Length of each.
        len_bytes: u64,
        /// Free bytes.
        free_bytes: u64,
        /// Longest free range.
        largest_free_bytes: u64,
        /// How long the buffer is.
        buffer_len_bytes: u64,
        /// How long it may become.
        ceiling_bytes: u64,
    },
    /// The buffer could have grown, and the step failed. Nothing has changed; a later attempt may succeed.
    #[error(
        "the pd_buffer of {buffer_len_bytes} bytes cannot grow by {step_bytes} ({free_bytes} bytes of it are free): {reason}"
    )]
    Step {
        /// Length of the step.
        step_bytes: u64,
        /// How long the buffer is.
        buffer_len_bytes: u64,
        /// Free bytes in it.
        free_bytes: u64,
        /// What the machine, or whoever registers, said.
        reason: String,
    },
    /// The buffer is as long as it may become.
    #[error("the pd_buffer has its {ceiling_bytes} bytes; raise pd_buffer_size for more")]
    AtCeiling {
        /// That length.
        ceiling_bytes: u64,
    },
    /// The memory manager has been closed.
    #[error("the pd_buffer is closed: the daemon is stopping")]
    Closed,
}
