//! Another process's host memory that a device copies to.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;

use super::CudaDevice;
use crate::buffer::{DroppedElsewhere, HostMapping};

/// What is pinned at a time: the driver may do little else meanwhile. Copies end where a slice does, because the driver
/// copies inside one pinned range.
const SLICE_LEN_BYTES: u64 = 64 * 1024 * 1024;

/// What a copy to memory that is not pinned takes at a time: such a copy holds up the thread that starts it.
const UNPINNED_LEN_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Another process's host memory. Where the driver can do that, it becomes pinned on a thread of its own, slice by slice,
/// which takes seconds for a large one: copies by a device then go on by themselves.
#[derive(Debug)]
pub struct PinnedHost {
    slices: DroppedElsewhere<Slices>,
}

/// The memory, with its first slices pinned.
#[derive(Debug)]
struct Slices {
    mapping: HostMapping,
    device: Arc<CudaDevice>,
    /// How much is to be pinned.
    wanted_bytes: u64,
    /// How much is, from the start on. Written by the thread that pins, and by nobody else.
    pinned_bytes: AtomicU64,
}

impl PinnedHost {
    /// Begins to pin the first `len_bytes`. The memory can be copied to at once.
    pub fn new(mapping: HostMapping, device: Arc<CudaDevice>, len_bytes: u64) -> Arc<Self> {
        let wanted_bytes = len_bytes.min(mapping.len_bytes());
        let slices = DroppedElsewhere::new(Slices { mapping, device, wanted_bytes, pinned_bytes: AtomicU64::new(0) });
        let host = Arc::new(Self { slices });
        let weak = Arc::downgrade(&host);
        if let Err(error) = thread::Builder::new().name("pin".into()).spawn(move || pin(&weak)) {
            tracing::info!(%error, "a peer's host memory is not pinned: copies to it are slower");
        }
        host
    }

    /// Its length.
    pub(super) fn len_bytes(&self) -> u64 {
        self.slices.mapping.len_bytes()
    }

    /// Where it is in this process.
    pub(super) fn address(&self) -> u64 {
        self.slices.mapping.address()
    }

    /// How long a copy to `offset` may be, and whether it goes on by itself.
    pub(super) fn reach_at(&self, offset: u64) -> (u64, bool) {
        let Slices { wanted_bytes, pinned_bytes, .. } = &*self.slices;
        // Also where nothing is pinned yet: it may be when the copy begins.
        let slice_len_bytes = slice_at(offset, *wanted_bytes).end - offset;
        if offset < pinned_bytes.load(Ordering::Acquire) {
            (slice_len_bytes, true)
        } else {
            (slice_len_bytes.min(UNPINNED_LEN_BYTES_MAX), false)
        }
    }
}

/// Pins slice after slice until all are pinned, the driver refuses, or nobody holds the memory any more.
fn pin(host: &Weak<PinnedHost>) {
    let mut start = 0;
    while let Some(host) = host.upgrade() {
        let Slices { mapping, device, wanted_bytes, pinned_bytes } = &*host.slices;
        if start >= *wanted_bytes {
            return;
        }
        let end = slice_at(start, *wanted_bytes).end;
        // SAFETY: the mapping is dropped after `drop` has unpinned it.
        let pinned = unsafe { device.context().register_host(mapping.address() + start, end - start) };
        if let Err(error) = pinned {
            tracing::info!(%device, %error, pinned_bytes = start, "a peer's host memory is not pinned: copies are slower");
            return;
        }
        start = end;
        pinned_bytes.store(start, Ordering::Release);
    }
}

/// The slice that an offset is in. The last one that is to be pinned ends where that does.
fn slice_at(offset: u64, wanted_bytes: u64) -> Range<u64> {
    let start = offset - offset % SLICE_LEN_BYTES;
    let end = start.saturating_add(SLICE_LEN_BYTES);
    if offset < wanted_bytes { start..end.min(wanted_bytes) } else { start.max(wanted_bytes)..end }
}

impl Drop for Slices {
    fn drop(&mut self) {
        let pinned_bytes = self.pinned_bytes.load(Ordering::Acquire);
        for start in (0..pinned_bytes).step_by(SLICE_LEN_BYTES as usize) {
            // SAFETY: pinned by `pin`, which has ended with its last slice; batches that copy to it hold it.
            let unpinned = unsafe { self.device.context().unregister_host(self.mapping.address() + start) };
            if let Err(error) = unpinned {
                tracing::debug!(device = %self.device, %error, "a peer's host memory stays pinned");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_never_leaves_its_slice() {
        // Broken in production: a prefill worker on a GPU cannot write a chunk that begins in pinned memory and ends behind it.
        const SLICE: u64 = SLICE_LEN_BYTES;
        let wanted_bytes = SLICE + 5;
        assert_eq!(slice_at(0, wanted_bytes), 0..SLICE);
        assert_eq!(slice_at(SLICE - 1, wanted_bytes), 0..SLICE);
        assert_eq!(slice_at(SLICE, wanted_bytes), SLICE..wanted_bytes);
        assert_eq!(slice_at(SLICE + 4, wanted_bytes), SLICE..wanted_bytes);
        assert_eq!(slice_at(SLICE + 5, wanted_bytes), wanted_bytes..2 * SLICE, "what came later is not pinned");
        assert_eq!(slice_at(3 * SLICE + 9, wanted_bytes), 3 * SLICE..4 * SLICE);
    }
}
