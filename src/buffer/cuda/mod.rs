//! GPU memory, through the CUDA driver's library, which is loaded at run time: a machine without it gets an error.
//!
//! | file | what is in it |
//! |---|---|
//! | `driver` | the calls: the only file that names `cudarc` |
//! | `device` | which GPU, and its primary context |
//! | `handle` | what travels to another process |
//! | `memory`, `mapping` | memory of ours, and memory of another process, opened here |
//! | `pinned` | host memory of another process, which copies go to |
//! | `stream` | copies that go on after the call, and how their end is noticed |
//! | `fence` | events of another process: what its streams have yet to do |
//!
//! Plain allocations (`cuMemAlloc`), since those alone can be exported by the handles that UCX and every engine know.

mod device;
mod driver;
mod fence;
mod handle;
mod mapping;
mod memory;
mod pinned;
mod stream;

pub use device::{CudaDevice, check_cuda_device};
pub use fence::Fences;
pub use handle::CudaHandle;
pub use mapping::CudaMapping;
pub use memory::CudaMemory;
pub use pinned::PinnedHost;
pub use stream::{CopyBatch, CopyEnd, CopyStream};
