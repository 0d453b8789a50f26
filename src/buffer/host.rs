//! Host memory that other processes of the same user can map.

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;

use crate::ids::Summing;

use super::available::available_memory_bytes;
use super::region::{Content, Region};
use super::slices::{for_slices, thread_count};
use super::{BufferError, HostHandle, HostMapping};

/// A sealed memfd, mapped in one piece. Its pages are there from the start, or come in ranges.
///
/// It can neither shrink nor grow, so a mapping of it, here or in another process, is never cut short: whoever maps
/// it can go on reading and writing even when its owner is gone.
#[derive(Debug)]
pub struct HostMemory {
    // Dropped in this order: the mapping before the descriptor.
    region: Region,
    fd: OwnedFd,
    inode: u64,
}

impl HostMemory {
    /// Allocates `len_bytes`, all zero, with every page present.
    ///
    /// # Errors
    /// [`BufferError::Allocate`] when the machine, or this process's control group, has less memory free.
    pub fn allocate(len_bytes: u64) -> Result<Self, BufferError> {
        let memory = Self::reserve(len_bytes)?;
        memory.populate(0..len_bytes)?;
        Ok(memory)
    }

    /// Maps `len_bytes` without a page behind them. Pages come with [`populate`](Self::populate); whoever touches a byte
    /// before takes a page fault, and what the machine's memory is short of is found out by the kernel then.
    ///
    /// # Errors
    /// [`BufferError::Allocate`] when the length is 0 or passes the process's address space.
    pub fn reserve(len_bytes: u64) -> Result<Self, BufferError> {
        let refuse = |reason: String| BufferError::Allocate { len_bytes, reason };
        if len_bytes == 0 {
            return Err(refuse("the length is 0".to_owned()));
        }
        let failed = |operation: &str, error: &dyn std::fmt::Display| {
            refuse(format!("{operation}: {error}; {}", describe_free(available_memory_bytes())))
        };
        let fd = create().map_err(|error| failed("memfd_create", &error))?;
        // Other users cannot reach it through /proc anyway; this keeps a descriptor that is passed on from doing more.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(|error| failed("fchmod", &error))?;
        rustix::fs::ftruncate(&fd, len_bytes).map_err(|error| failed("ftruncate", &error))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| failed("sealing", &error))?;
        let region = Region::map(&fd, len_bytes).map_err(|error| failed("mapping", &error))?;
        let inode = rustix::fs::fstat(&fd).map_err(|error| failed("fstat", &error))?.st_ino;
        Ok(Self { region, fd, inode })
    }

    /// Makes every page of `range` present, with as many threads as the machine has room for. The range has not been
    /// populated before.
    ///
    /// # Errors
    /// [`BufferError::Allocate`] when the machine, or this process's control group, has less memory free: asked first,
    /// because a kernel that runs out half-way ends a process. [`BufferError::OutOfRange`]. The range has no pages then.
    pub fn populate(&self, range: Range<u64>) -> Result<(), BufferError> {
        let len_bytes = self.check(&range)?;
        let refuse = |reason: String| BufferError::Allocate { len_bytes, reason };
        let available = available_memory_bytes();
        if available.is_some_and(|available| len_bytes > available) {
            return Err(refuse(describe_free(available)));
        }
        let populate = |slice: Range<u64>| {
            // Pages that are there need no page fault each to be mapped, so both together take less time than the second.
            let len_bytes = slice.end - slice.start;
            rustix::io::retry_on_intr(|| {
                rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), slice.start, len_bytes)
            })?;
            self.region.populate(slice, Content::Fresh)
        };
        for_slices(range.clone(), thread_count(), populate).map_err(|error| {
            self.release(range);
            refuse(format!("populating it: {error}; {}", describe_free(available)))
        })
    }

    /// Gives the pages of `range` back to the system; its bytes are zero afterwards, and nobody may be using them. A page
    /// that begins before the range stays. Nothing happens to a range outside the memory.
    pub fn release(&self, range: Range<u64>) {
        let Ok(len_bytes) = self.check(&range) else { return };
        if len_bytes == 0 {
            return;
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = rustix::fs::fallocate(&self.fd, mode, range.start, len_bytes) {
            tracing::warn!(?range, %error, "pages of the pd_buffer cannot be given back");
        }
    }

    fn check(&self, range: &Range<u64>) -> Result<u64, BufferError> {
        let buffer_len_bytes = self.region.len_bytes();
        let len_bytes = range.end.saturating_sub(range.start);
        if range.start > range.end || range.end > buffer_len_bytes {
            return Err(BufferError::OutOfRange { offset: range.start, len_bytes, buffer_len_bytes });
        }
        Ok(len_bytes)
    }

    /// Bytes of it that have pages behind them.
    pub fn present_bytes(&self) -> u64 {
        // What the system counts, in blocks of 512 bytes.
        rustix::fs::fstat(&self.fd).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
    }

    /// Its length.
    pub const fn len_bytes(&self) -> u64 {
        self.region.len_bytes()
    }

    /// Where it is in this process.
    pub fn address(&self) -> u64 {
        self.region.address()
    }

    /// How another process of the same user maps it, for as long as this one lives.
    pub fn handle(&self) -> HostHandle {
        HostHandle {
            pid: std::process::id(),
            fd: self.fd.as_raw_fd(),
            len_bytes: self.region.len_bytes(),
            inode: self.inode,
        }
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BufferError> {
        self.region.read(offset, out)
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`]; nothing is written then.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BufferError> {
        self.region.write(offset, bytes)
    }

    /// Adds bytes to a sum.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`]; nothing is added then.
    pub fn sum(&self, offset: u64, len_bytes: u64, sum: &mut Summing) -> Result<(), BufferError> {
        self.region.sum(offset, len_bytes, sum)
    }

    /// Copies bytes into another process's memory.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] for either side; nothing is written then.
    pub fn copy_to(
        &self,
        offset: u64,
        target: &HostMapping,
        target_offset: u64,
        len_bytes: u64,
    ) -> Result<(), BufferError> {
        self.region.copy_to(offset, target.region(), target_offset, len_bytes)
    }
}

fn create() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create("pd_buffer", flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know NOEXEC_SEAL.
        Err(Errno::INVAL) => rustix::fs::memfd_create("pd_buffer", flags),
        other => other,
    }
}

fn describe_free(available: Option<u64>) -> String {
    match available {
        Some(bytes) => format!("{bytes} bytes are free"),
        None => "the system does not say how much is free".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN_BYTES: u64 = 64 * 1024 + 13;

    #[test]
    fn bytes_written_are_the_bytes_read_and_the_rest_stays_zero() {
        // Broken in production: chunks are stored at other places than the slot table thinks.
        let memory = HostMemory::allocate(LEN_BYTES).unwrap();
        memory.write(4095, b"chunk").unwrap();
        let mut all = vec![1; LEN_BYTES as usize];
        memory.read(0, &mut all).unwrap();
        assert_eq!(&all[4095..4100], b"chunk");
        assert!(all[..4095].iter().chain(&all[4100..]).all(|&byte| byte == 0));
    }

    #[test]
    fn a_range_outside_is_refused_and_nothing_is_written() {
        // Broken in production: a wrong offset from a message overwrites whatever lies behind the buffer.
        let memory = HostMemory::allocate(LEN_BYTES).unwrap();
        for offset in [LEN_BYTES - 3, LEN_BYTES, u64::MAX - 1, u64::MAX] {
            assert!(matches!(memory.write(offset, b"four"), Err(BufferError::OutOfRange { .. })));
            assert!(matches!(memory.read(offset, &mut [0; 4]), Err(BufferError::OutOfRange { .. })));
        }
        memory.write(LEN_BYTES, b"").unwrap();
        let mut tail = [1; 3];
        memory.read(LEN_BYTES - 3, &mut tail).unwrap();
        assert_eq!(tail, [0; 3]);
    }

    #[test]
    fn more_than_the_machine_has_is_refused_with_both_numbers() {
        // Broken in production: a pd_buffer_size above the machine's memory gets the daemon, or a neighbour, killed.
        let error = HostMemory::allocate(1 << 60).unwrap_err().to_string();
        assert!(error.contains(&(1_u64 << 60).to_string()), "{error}");
        assert!(error.contains("bytes are free"), "{error}");
        assert!(HostMemory::allocate(0).unwrap_err().to_string().contains("length is 0"));
    }

    #[test]
    fn pages_come_and_go_in_ranges_and_the_rest_of_the_bytes_stay() {
        // Broken in production: a lazy buffer takes its whole ceiling at once, or a step that failed keeps its memory.
        let page = rustix::param::page_size() as u64;
        let memory = HostMemory::reserve(64 * page).unwrap();
        assert_eq!(memory.present_bytes(), 0);
        // Chunks are no whole pages: the second range begins on the first one's last page.
        memory.populate(0..3 * page + 100).unwrap();
        let first = memory.present_bytes();
        assert_eq!(first, 4 * page);
        memory.write(0, &vec![7; 3 * page as usize + 100]).unwrap();
        let second = 3 * page + 100..9 * page + 1;
        memory.populate(second.clone()).unwrap();
        assert_eq!(memory.present_bytes(), 10 * page);
        memory.release(second.start..10 * page);
        assert_eq!(memory.present_bytes(), first);
        let mut seen = vec![0; 3 * page as usize + 101];
        memory.read(0, &mut seen).unwrap();
        assert!(seen[..3 * page as usize + 100].iter().all(|&byte| byte == 7));
        assert_eq!(seen.last(), Some(&0));
        for bad in [0..64 * page + 1, u64::MAX - 1..u64::MAX, Range { start: 2, end: 1 }] {
            assert!(matches!(memory.populate(bad.clone()), Err(BufferError::OutOfRange { .. })));
            memory.release(bad);
        }
    }

    #[test]
    fn nobody_can_shrink_it() {
        // Broken in production: a peer truncates the memfd and this daemon dies of SIGBUS in the middle of a copy.
        let memory = HostMemory::allocate(LEN_BYTES).unwrap();
        assert_eq!(rustix::fs::ftruncate(&memory.fd, 1), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&memory.fd, LEN_BYTES + 1), Err(Errno::PERM));
        assert_eq!(rustix::fs::fcntl_add_seals(&memory.fd, SealFlags::WRITE), Err(Errno::PERM));
    }
}
