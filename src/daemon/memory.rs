//! How much memory the cache takes when nobody says.

use std::fs;

/// Less than this is no cache.
const LEAST: u64 = 64 << 20;
/// What is assumed where the system does not say.
const UNKNOWN: u64 = 4 << 30;

/// A quarter of the memory that this process may use, and at least 64 MiB: the machine's, or the control group's limit
/// where that is lower.
pub fn default_cache_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_bytes(&text));
    let limit = group_limit();
    let usable = [machine, limit].into_iter().flatten().min().unwrap_or(UNKNOWN);
    (usable / 4).max(LEAST)
}

/// `MemTotal:       24000000 kB`
fn total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest `memory.max` from this process's control group (version 2) up to the root.
fn group_limit() -> Option<u64> {
    let membership = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = membership.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = std::path::Path::new("/sys/fs/cgroup");
    let groups = root.join(path);
    let limits = groups.ancestors().take_while(|group| group.starts_with(root)).filter_map(|group| {
        fs::read_to_string(group.join("memory.max")).ok()?.trim().parse::<u64>().ok() // `max` is no limit
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read_in_bytes() {
        assert_eq!(total_bytes("Foo: 1 kB\nMemTotal:       24 kB\nMemFree: 3 kB\n"), Some(24 * 1024));
        for text in ["", "MemTotal:", "MemTotal: x kB", "MemTotal: 18446744073709551615 kB"] {
            assert_eq!(total_bytes(text), None, "{text}");
        }
    }

    #[test]
    fn there_is_always_a_cache() {
        assert!(default_cache_bytes() >= LEAST);
    }
}
