//! How much memory this process can still get.
//!
//! Asked before populating, since a kernel that runs out while it populates shared memory kills a process instead of
//! returning an error.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that can still be had: the machine's available memory or what the tightest control group leaves. `None`
/// where the system does not say.
pub(super) fn available_memory_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| parse_available(&text));
    let group = group_folder().and_then(|folder| group_headroom(&folder));
    match (machine, group) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (one, other) => one.or(other),
    }
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The folder of this process's control group, version 2.
fn group_folder() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/')))
}

/// What the group and those above it leave, in bytes. Memory that the kernel can take back counts as used, but for
/// the page cache of files, which it takes back first.
fn group_headroom(folder: &Path) -> Option<u64> {
    folder.ancestors().take_while(|folder| folder.starts_with("/sys/fs/cgroup")).filter_map(headroom_of).min()
}

fn headroom_of(folder: &Path) -> Option<u64> {
    let max: u64 = fs::read_to_string(folder.join("memory.max")).ok()?.trim().parse().ok()?;
    let current: u64 = fs::read_to_string(folder.join("memory.current")).ok()?.trim().parse().ok()?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    Some(max.saturating_sub(current.saturating_sub(reclaimable_file_bytes(&stat))))
}

/// The page cache in `memory.stat`, without the shared memory that is counted among it.
fn reclaimable_file_bytes(stat: &str) -> u64 {
    ["inactive_file ", "active_file "]
        .iter()
        .filter_map(|name| stat.lines().find_map(|line| line.strip_prefix(name)))
        .filter_map(|value| value.trim().parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        // Broken in production: a buffer is refused on a machine with room for it, or the kernel kills a process.
        assert_eq!(parse_available("MemTotal: 9 kB\nMemAvailable:   1024 kB\n"), Some(1024 * 1024));
        assert_eq!(parse_available("MemTotal: 9 kB\n"), None);
        assert_eq!(parse_available("MemAvailable: many kB\n"), None);
        assert_eq!(reclaimable_file_bytes("anon 5\ninactive_file 7\nactive_file 8\nshmem 9\n"), 15);
    }
}
