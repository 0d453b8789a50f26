//! What this process uses, as the system counts it.

use std::fs;

use crate::metrics::ProcessUsage;

/// None where /proc does not say.
pub(super) fn process_usage() -> Option<ProcessUsage> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let system = fs::read_to_string("/proc/stat").ok()?;
    let Stat { cpu_ticks, start_ticks, resident_pages } = Stat::parse(&stat)?;
    let boot_time_s: u64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    let ticks_per_s = rustix::param::clock_ticks_per_second() as f64;
    Some(ProcessUsage {
        cpu_s: cpu_ticks as f64 / ticks_per_s,
        resident_bytes: resident_pages * rustix::param::page_size() as u64,
        // One of them reads the folder.
        open_fds: (fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1),
        start_time_s: boot_time_s as f64 + start_ticks as f64 / ticks_per_s,
    })
}

/// Of proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    start_ticks: u64,
    resident_pages: u64,
}

impl Stat {
    /// The name may hold blanks and parentheses, so fields are counted from behind it: the first there is field 3.
    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self { cpu_ticks: field(14)? + field(15)?, start_ticks: field(22)?, resident_pages: field(24)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_the_ones_that_the_manual_names() {
        // Broken in production: memory, processor time or start of a daemon are some other number.
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 1 0 17 5 0 0 20 0 3 0 777 1000 200 18446744073709551615";
        assert_eq!(Stat::parse(stat), Some(Stat { cpu_ticks: 22, start_ticks: 777, resident_pages: 200 }));
        assert_eq!(Stat::parse("42 (x) S 1"), None);
        let usage = process_usage().unwrap();
        assert!(usage.resident_bytes > 1 << 20 && usage.open_fds >= 3, "{usage:?}");
        assert!(usage.start_time_s > 1_600_000_000.0, "{usage:?}");
    }
}
