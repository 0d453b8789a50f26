//! Why memory could not be had, mapped or reached.

use crate::ids::DeviceId;

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
    /// There are GPUs, but not the one that was asked for.
    #[error(
        "pd_buffer_device = cuda:{ordinal}, but this process sees {present}; name one of them, or let \
         CUDA_VISIBLE_DEVICES show it more"
    )]
    NoSuchDevice {
        /// Which was asked for.
        ordinal: u32,
        /// Those that there are.
        present: String,
    },
    /// A GPU does not have that much memory free.
    #[error(
        "cannot allocate {len_bytes} bytes on {device}: {free_bytes} of its {total_bytes} bytes are free; lower \
         pd_buffer_size, or free memory there (an engine's own share: its gpu_memory_utilization)"
    )]
    DeviceMemory {
        /// How much was asked for.
        len_bytes: u64,
        /// Of which GPU.
        device: String,
        /// What it has left.
        free_bytes: u64,
        /// What it has.
        total_bytes: u64,
    },
    /// Other processes could not open it.
    #[error(
        "{len_bytes} bytes on {device} cannot be exported to other processes: {reason}; legacy IPC takes plain allocations \
         alone, not those of the virtual memory management API (expandable segments, an engine's sleep mode), and no \
         GPU under WSL; use pd_buffer_device: cpu there"
    )]
    NotExportable {
        /// How much.
        len_bytes: u64,
        /// Of which GPU.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// Memory is on a GPU that cannot be reached from here.
    #[error("the memory is on another GPU, {device}: {reason}")]
    OtherDevice {
        /// The GPU that it is on.
        device: DeviceId,
        /// What is in the way.
        reason: String,
    },
    /// Another process's GPU memory cannot be opened.
    #[error("cannot open {len_bytes} bytes of process {pid} on {device}: {reason}")]
    OpenDevice {
        /// The owner.
        pid: u32,
        /// The GPU that it is on.
        device: DeviceId,
        /// How much it announced.
        len_bytes: u64,
        /// What was seen and what was expected.
        reason: String,
    },
    /// An engine named an event that cannot be opened, so that what it stands for cannot be waited for.
    #[error(
        "the event that `after` names cannot be opened on {device}: {reason}; it has to be one of another process on that \
         GPU, made for other processes and without timing"
    )]
    Fence {
        /// The GPU.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// A GPU is not there any more.
    #[error(
        "{device} has disappeared or can be used no more: {reason}; nothing on it is to be trusted: look at nvidia-smi and \
         the kernel's log (Xid), and start this daemon and its engine anew"
    )]
    DeviceLost {
        /// The GPU.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// A GPU did not do what it was told.
    #[error("{device}: {reason}")]
    Device {
        /// The GPU.
        device: String,
        /// What the driver said.
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
}
