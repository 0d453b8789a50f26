//! A shared mapping of a sealed memfd: the one place that touches the bytes of a pd_buffer.
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::BufferError;
use crate::ids::Summing;

/// Below this length huge pages would waste more than they save.
const HUGE_PAGE_LEN_BYTES: u64 = 2 * 1024 * 1024;

/// Bytes that are copied out before they are summed.
const PIECE_LEN_BYTES: usize = 64 * 1024;

/// A mapping that other processes (and transfer engines) read and write as well.
///
/// No reference to its bytes is ever made: bytes are copied in and out through raw pointers, so nothing here relies
/// on them staying as they are between two looks. Who may write which slot at which time is the slot table's
/// business; a writer that breaks that rule makes bytes wrong, not memory unsafe.
#[derive(Debug)]
pub(super) struct Region {
    map: MmapRaw,
    len_bytes: u64,
}

/// What populating must not do to the bytes that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// All zero and ours alone.
    Fresh,
    /// Another process's.
    Shared,
}

impl Region {
    /// Maps `len_bytes` of `file` for reading and writing. Pages come with [`populate`](Self::populate), or when they
    /// are first touched.
    ///
    /// The caller has made sure that `file` is `len_bytes` long and sealed against shrinking.
    pub(super) fn map(file: impl AsFd, len_bytes: u64) -> std::io::Result<Self> {
        let len = usize::try_from(len_bytes).map_err(std::io::Error::other)?;
        let map = MmapOptions::new().len(len).map_raw(file.as_fd().as_raw_fd())?;
        let region = Self { map, len_bytes };
        if len_bytes >= HUGE_PAGE_LEN_BYTES {
            // Only a hint: systems without huge pages for shared memory refuse or ignore it.
            let _ = region.map.advise(Advice::HugePage);
        }
        Ok(region)
    }

    /// Makes every page of `range` present, and maps it, so that no copy takes page faults. The range is inside the mapping; an
    /// empty one needs nothing. After an error some of the pages may be present.
    pub(super) fn populate(&self, range: Range<u64>, content: Content) -> std::io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let advice = match content {
            Content::Fresh => Advice::PopulateWrite,
            // A page fault that only looks maps the pages around it as well, and they can be written from then on.
            Content::Shared => Advice::PopulateRead,
        };
        let start = usize::try_from(range.start).map_err(std::io::Error::other)?;
        let end = usize::try_from(range.end.min(self.len_bytes)).map_err(std::io::Error::other)?;
        match self.map.advise_range(advice, start, end - start) {
            // Linux before 5.14 does not know it.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                self.touch(start, end, content);
                Ok(())
            }
            result => result,
        }
    }

    fn touch(&self, start: usize, end: usize, content: Content) {
        let page_len = rustix::param::page_size();
        // From the start of its page, or the last bytes of the range could be on a page that no step lands on.
        for offset in (start - start % page_len..end).step_by(page_len) {
            // The first page may begin with bytes of an earlier range, which are in use.
            let offset = offset.max(start);
            let byte = self.map.as_mut_ptr().wrapping_add(offset);
            match content {
                // SAFETY: `offset` is below the mapping's length, and the mapping lives as long as `self`.
                Content::Fresh => unsafe { byte.write_volatile(0) },
                Content::Shared => {
                    // SAFETY: as above.
                    let _ = unsafe { byte.read_volatile() };
                }
            }
        }
    }

    pub(super) const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    pub(super) fn address(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// The offset as an index, if `len_bytes` from there are inside.
    fn check(&self, offset: u64, len_bytes: u64) -> Result<usize, BufferError> {
        let error = BufferError::OutOfRange { offset, len_bytes, buffer_len_bytes: self.len_bytes };
        match offset.checked_add(len_bytes) {
            // The whole mapping's length fits usize, so a smaller offset does.
            Some(end) if end <= self.len_bytes => usize::try_from(offset).map_err(|_| error),
            _ => Err(error),
        }
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BufferError> {
        let start = self.check(offset, out.len() as u64)?;
        let source = self.map.as_ptr().wrapping_add(start);
        // SAFETY: `check` found the source inside the mapping, which is populated, sealed against shrinking and
        // alive as long as `self`; `out` is borrowed mutably, so it is no part of a mapping that nobody borrows.
        unsafe { std::ptr::copy_nonoverlapping(source, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BufferError> {
        let start = self.check(offset, bytes.len() as u64)?;
        let target = self.map.as_mut_ptr().wrapping_add(start);
        // SAFETY: as in `read`, with the mapping as the target: it is mapped writable, and no reference to its bytes
        // exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
        Ok(())
    }

    /// Adds bytes to a sum, in pieces that stay in a core's cache.
    pub(super) fn sum(&self, offset: u64, len_bytes: u64, sum: &mut Summing) -> Result<(), BufferError> {
        self.check(offset, len_bytes)?;
        let mut piece = vec![0; PIECE_LEN_BYTES.min(len_bytes as usize)];
        let mut at = offset;
        let end = offset + len_bytes;
        while at < end {
            let len = (end - at).min(PIECE_LEN_BYTES as u64) as usize;
            self.read(at, &mut piece[..len])?;
            sum.add(&piece[..len]);
            at += len as u64;
        }
        Ok(())
    }

    /// Copies between two mappings, or inside one.
    pub(super) fn copy_to(
        &self,
        offset: u64,
        target: &Self,
        target_offset: u64,
        len_bytes: u64,
    ) -> Result<(), BufferError> {
        let start = self.check(offset, len_bytes)?;
        let target_start = target.check(target_offset, len_bytes)?;
        let source = self.map.as_ptr().wrapping_add(start);
        let target = target.map.as_mut_ptr().wrapping_add(target_start);
        // SAFETY: `check` found both ranges inside their mappings, which are populated, sealed against shrinking and
        // alive as long as the two borrows; `copy` allows the ranges to overlap.
        unsafe { std::ptr::copy(source, target, len_bytes as usize) };
        Ok(())
    }
}
