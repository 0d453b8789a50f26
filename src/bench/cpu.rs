//! Processor time of another process.

use std::time::Duration;

use super::error::BenchError;

/// What the process has used so far, in user and kernel mode, all threads together; whole ticks (10 ms).
///
/// # Errors
/// When the process is gone.
pub(super) fn used(pid: u32) -> Result<Duration, BenchError> {
    let machine = |source| BenchError::Machine { what: "reading a daemon's processor time", source };
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(machine)?;
    let ticks = ticks(&stat)
        .ok_or_else(|| machine(std::io::Error::other(format!("/proc/{pid}/stat is not understood: {stat}"))))?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// utime + stime, fields 14 and 15 of proc_pid_stat(5). The name before them may hold blanks and parentheses.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_found_behind_any_name() {
        // Broken in production: the CPU figures are page faults of some process, or nothing.
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 1 0 17 5 0 0 20 0 3 0 100 1000 200 18446744073709551615";
        assert_eq!(ticks(stat), Some(22));
        assert_eq!(ticks("42 (x) S 1"), None);
        assert_eq!(ticks(""), None);
        assert!(used(std::process::id()).is_ok());
    }
}
