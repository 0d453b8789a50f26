//! Another process's host memory, mapped here.

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, SealFlags};

use super::region::{Content, Region};
use super::{BufferError, HostHandle};

/// A mapping of the memfd that a [`HostHandle`] names. It stays valid, and its bytes stay what they are, when the
/// owner is gone.
#[derive(Debug)]
pub struct HostMapping {
    region: Region,
    handle: HostHandle,
}

impl HostMapping {
    /// Maps it for reading and writing, which takes no longer for a large one: pages are mapped when they are first
    /// touched, one by one, or before with [`populate`](Self::populate).
    ///
    /// # Errors
    /// [`BufferError::Map`] when the process or its descriptor is gone, belongs to another user, or is not the sealed
    /// memory that the handle describes.
    pub fn open(handle: &HostHandle) -> Result<Self, BufferError> {
        let refuse =
            |reason: String| BufferError::Map { pid: handle.pid, fd: handle.fd, len_bytes: handle.len_bytes, reason };
        let fd = open_file(handle).map_err(refuse)?;
        let region = Region::map(&fd, handle.len_bytes).map_err(|error| refuse(format!("mapping it: {error}")))?;
        Ok(Self { region, handle: *handle })
    }

    /// Maps the pages of a range, which its owner has populated: what is not there takes memory. It takes a fraction of
    /// what copying the range takes.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], or [`BufferError::Map`] when the system refuses.
    pub fn populate(&self, range: Range<u64>) -> Result<(), BufferError> {
        let buffer_len_bytes = self.len_bytes();
        let len_bytes = range.end.saturating_sub(range.start);
        if range.start > range.end || range.end > buffer_len_bytes {
            return Err(BufferError::OutOfRange { offset: range.start, len_bytes, buffer_len_bytes });
        }
        self.region.populate(range, Content::Shared).map_err(|error| {
            let HostHandle { pid, fd, .. } = self.handle;
            BufferError::Map { pid, fd, len_bytes, reason: format!("populating it: {error}") }
        })
    }

    /// What it was opened with.
    pub const fn handle(&self) -> &HostHandle {
        &self.handle
    }

    /// Its length.
    pub const fn len_bytes(&self) -> u64 {
        self.region.len_bytes()
    }

    /// Where it is in this process.
    pub fn address(&self) -> u64 {
        self.region.address()
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

    pub(super) const fn region(&self) -> &Region {
        &self.region
    }
}

/// Looks before it opens: opening a pipe or a device for writing can block or do something.
fn open_file(handle: &HostHandle) -> Result<OwnedFd, String> {
    if handle.len_bytes == 0 {
        return Err("its length is 0".to_owned());
    }
    let path = format!("/proc/{}/fd/{}", handle.pid, handle.fd);
    let looked_at = rustix::fs::open(&*path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
        format!("{path}: {error}; is the process alive, of the same user, and in the same pid namespace?")
    })?;
    let stat = rustix::fs::fstat(&looked_at).map_err(|error| format!("{path}: {error}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_ino != handle.inode {
        return Err(format!("{path} is inode {}, expected a memfd with inode {}", stat.st_ino, handle.inode));
    }
    let again = format!("/proc/self/fd/{}", looked_at.as_raw_fd());
    let fd = rustix::fs::open(&*again, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
        .map_err(|error| format!("{path}: {error}"))?;
    // A file that is no memfd has no seals; one without this seal could shrink under the mapping.
    match rustix::fs::fcntl_get_seals(&fd) {
        Ok(seals) if seals.contains(SealFlags::SHRINK) => {}
        Ok(seals) => {
            return Err(format!("{path} has the seals {seals:?}, expected one against shrinking"));
        }
        Err(error) => return Err(format!("{path} is not a memfd: {error}")),
    }
    // Looked at after the seal: from here on it can only grow.
    let stat = rustix::fs::fstat(&fd).map_err(|error| format!("{path}: {error}"))?;
    match u64::try_from(stat.st_size) {
        Ok(len_bytes) if len_bytes == handle.len_bytes => Ok(fd),
        _ => Err(format!("{path} has {} bytes, expected {}", stat.st_size, handle.len_bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::HostMemory;

    const LEN_BYTES: u64 = 40_000;

    #[test]
    fn both_sides_see_the_same_bytes_and_outlive_the_owner() {
        // Broken in production: a connector fills other memory than the daemon sends, or crashes when it exits.
        let memory = HostMemory::allocate(LEN_BYTES).unwrap();
        let mapping = HostMapping::open(&memory.handle()).unwrap();
        mapping.write(7, b"from outside").unwrap();
        let mut seen = [0; 12];
        memory.read(7, &mut seen).unwrap();
        assert_eq!(&seen, b"from outside");
        drop(memory);
        mapping.read(7, &mut seen).unwrap();
        assert_eq!(&seen, b"from outside");
        assert!(mapping.write(LEN_BYTES - 1, b"xx").is_err());
    }

    #[test]
    fn mapping_a_lazy_buffer_takes_no_memory_for_what_is_not_there() {
        // Broken in production: the first connector or peer that maps a lazy buffer makes it as large as its ceiling.
        let page = rustix::param::page_size() as u64;
        let memory = HostMemory::reserve(64 * page).unwrap();
        memory.populate(0..3 * page).unwrap();
        let mapping = HostMapping::open(&memory.handle()).unwrap();
        assert_eq!(memory.present_bytes(), 3 * page);
        memory.populate(3 * page..5 * page).unwrap();
        mapping.populate(3 * page..5 * page).unwrap();
        assert_eq!(memory.present_bytes(), 5 * page);
        mapping.write(4 * page, b"late").unwrap();
        let mut seen = [0; 4];
        memory.read(4 * page, &mut seen).unwrap();
        assert_eq!(&seen, b"late");
        assert!(matches!(mapping.populate(63 * page..65 * page), Err(BufferError::OutOfRange { .. })));
    }

    /// How many bytes of it have their pages mapped in this process.
    fn mapped_bytes(mapping: &HostMapping) -> u64 {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let own = format!("{:x}-", mapping.address());
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&own));
        let line = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }

    #[test]
    fn opening_maps_no_page_however_large_the_buffer_is() {
        // Broken in production: the first request to a decode worker of 40 GiB stops the transfers to all others for
        // seconds, or its handshake never ends in time.
        const MIB: u64 = 1024 * 1024;
        let memory = HostMemory::reserve(64 * 1024 * MIB).unwrap();
        memory.populate(0..32 * MIB).unwrap();
        let mapping = HostMapping::open(&memory.handle()).unwrap();
        assert_eq!(mapped_bytes(&mapping), 0);
        mapping.populate(5 * MIB..6 * MIB).unwrap();
        let mapped = mapped_bytes(&mapping);
        assert!((MIB..2 * MIB).contains(&mapped), "{mapped}");
        mapping.write(5 * MIB, &[7; MIB as usize]).unwrap();
        assert_eq!(mapped_bytes(&mapping), mapped, "what was populated takes no page faults");
        assert_eq!(memory.present_bytes(), 32 * MIB);
    }

    #[test]
    fn a_handle_that_does_not_describe_its_file_is_refused() {
        // Broken in production: after a restart a reused descriptor is taken for the buffer and overwritten.
        let memory = HostMemory::allocate(LEN_BYTES).unwrap();
        let good = memory.handle();
        let reason = |handle: HostHandle| HostMapping::open(&handle).unwrap_err().to_string();
        assert!(reason(HostHandle { inode: good.inode + 1, ..good }).contains("expected a memfd with inode"));
        assert!(reason(HostHandle { len_bytes: LEN_BYTES * 2, ..good }).contains("expected 80000"));
        assert!(reason(HostHandle { len_bytes: LEN_BYTES - 1, ..good }).contains("expected 39999"));
        assert!(reason(HostHandle { len_bytes: 0, ..good }).contains("length is 0"));
        assert!(reason(HostHandle { fd: 1_000_000, ..good }).contains("is the process alive"));
        assert!(reason(HostHandle { pid: u32::MAX, ..good }).contains("is the process alive"));
    }

    #[test]
    fn a_file_without_seals_is_refused() {
        // Broken in production: a peer hands out a file that it can truncate, and this daemon dies of SIGBUS.
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN_BYTES).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        let handle =
            HostHandle { pid: std::process::id(), fd: file.as_raw_fd(), len_bytes: LEN_BYTES, inode: stat.st_ino };
        let error = HostMapping::open(&handle).unwrap_err().to_string();
        assert!(error.contains("not a memfd") || error.contains("expected one against shrinking"), "{error}");
        let memfd = rustix::fs::memfd_create("unsealed", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&memfd, LEN_BYTES).unwrap();
        let inode = rustix::fs::fstat(&memfd).unwrap().st_ino;
        let error = HostMapping::open(&HostHandle { fd: memfd.as_raw_fd(), inode, ..handle }).unwrap_err().to_string();
        assert!(error.contains("expected one against shrinking"), "{error}");
    }
}
