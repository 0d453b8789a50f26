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
}
