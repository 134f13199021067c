//! How much memory a daemon takes, and for what.
//!
//! The limit is for everything that grows with use: decoded bytes kept, decodes going on, replies being made. What the
//! program itself takes, and the tree it shows, some ten MiB and about a kilobyte per file, comes on top.

use std::fs;
use std::path::Path;

/// Less than this decodes nothing in parallel and keeps nothing.
pub const LEAST_LIMIT_BYTES: u64 = 32 << 20;
/// What is assumed where the system does not say.
const UNKNOWN: u64 = 4 << 30;

/// How the limit is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Decoded bytes that are kept.
    pub cache_bytes: u64,
    /// What is being decoded, what it is decoded from, and what is known about how it is coded.
    pub working_bytes: u64,
    /// Replies being made.
    pub reply_bytes: u64,
}

impl MemoryPlan {
    /// Divides `limit_bytes`, by default [`default_limit_bytes`], and never less than [`LEAST_LIMIT_BYTES`]. The cache gets
    /// `cache_bytes`, by default a half, and leaves a quarter to the others in any case.
    pub fn new(limit_bytes: Option<u64>, cache_bytes: Option<u64>) -> Self {
        // A cache that was asked for is not cut by a limit that was not.
        let limit = match (limit_bytes, cache_bytes) {
            (None, Some(cache)) => default_limit_bytes().max(cache.saturating_add(cache / 2)),
            (limit, _) => limit.unwrap_or_else(default_limit_bytes),
        };
        let limit = limit.max(LEAST_LIMIT_BYTES);
        let cache_bytes = cache_bytes.unwrap_or(limit / 2).min(limit - limit / 4);
        let rest = limit - cache_bytes;
        let reply_bytes = (rest / 4).min(MOST_REPLY_BYTES);
        Self { cache_bytes, working_bytes: rest - reply_bytes, reply_bytes }
    }
}

/// More replies than this at a time are no faster.
const MOST_REPLY_BYTES: u64 = 256 << 20;

/// Half of the machine's memory, or three quarters of what the control group allows, if that is less.
pub fn default_limit_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_bytes(&text)).unwrap_or(UNKNOWN);
    let group =
        fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_limit(&text, Path::new("/sys/fs/cgroup")));
    (machine / 2).min(group.map_or(u64::MAX, |limit| limit / 4 * 3))
}

/// Has the allocator give decoded bytes back where they came from. By default each thread that decodes gets a heap of its
/// own, which keeps what its neighbours could use, and the limit would be passed by a multiple.
pub(super) fn share_heaps(cache_bytes: u64) {
    #[cfg(target_env = "gnu")]
    {
        const HEAPS: libc::c_int = 2;
        /// Larger pieces come from the system and go back there.
        const FROM_SYSTEM_BYTES: libc::c_int = 4 << 20;
        // What is kept at the end of a heap: a window that is decoded ahead fits, so that its memory is used again.
        let kept_bytes = (cache_bytes / 8).clamp(4 << 20, 64 << 20);
        let kept_bytes = libc::c_int::try_from(kept_bytes).expect("64 MiB fit");
        // SAFETY: the calls set numbers of the allocator and may be made at any time.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, HEAPS);
            libc::mallopt(libc::M_TRIM_THRESHOLD, kept_bytes);
            libc::mallopt(libc::M_MMAP_THRESHOLD, FROM_SYSTEM_BYTES);
        }
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = cache_bytes; // other allocators have no such heaps
}

/// `MemTotal:       24000000 kB`
fn total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest limit from this process's control groups, as `/proc/self/cgroup` lists them, up to the root of their
/// hierarchy: `memory.max` in version 2, `memory.limit_in_bytes` of the memory controller in version 1.
fn group_limit(membership: &str, root: &Path) -> Option<u64> {
    let limits = membership.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        let (hierarchy, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            controllers if controllers.split(',').any(|controller| controller == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let group = hierarchy.join(path);
        // `max`, and what version 1 says for it, are no limits: the machine's memory is less.
        let limit_of = |group: &Path| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
        group.ancestors().take_while(|group| group.starts_with(&hierarchy)).filter_map(limit_of).min()
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
    fn a_control_group_is_bound_by_its_parents() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for (file, limit) in [
            ("outer/memory.max", "1000"),
            ("outer/inner/memory.max", "max"),
            ("memory/memory.limit_in_bytes", "9223372036854771712"),
            ("memory/docker/abc/memory.limit_in_bytes", "700\n"),
        ] {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
            fs::write(root.join(file), limit).unwrap();
        }
        for (membership, limit) in [
            ("0::/outer/inner\n", Some(1000)),
            ("0::/\n", None),
            ("5:cpu:/docker/abc\n4:memory:/docker/abc\n", Some(700)),
            ("4:cpu,memory:/docker/abc\n0::/outer\n", Some(700)),
            ("", None),
            ("nonsense\n0:\n", None),
        ] {
            assert_eq!(group_limit(membership, root), limit, "{membership:?}");
        }
    }

    #[test]
    fn the_parts_of_a_plan_add_up_to_the_limit() {
        for limit in [LEAST_LIMIT_BYTES, 100 << 20, 10 << 30] {
            for cache in [None, Some(0), Some(1 << 20), Some(u64::MAX)] {
                let plan = MemoryPlan::new(Some(limit), cache);
                assert!(
                    plan.cache_bytes + plan.working_bytes + plan.reply_bytes <= limit,
                    "{limit} {cache:?} {plan:?}"
                );
                assert!(plan.working_bytes >= limit / 8, "{limit} {cache:?} {plan:?}");
            }
        }
        assert_eq!(MemoryPlan::new(Some(0), None), MemoryPlan::new(Some(LEAST_LIMIT_BYTES), None));
        assert_eq!(MemoryPlan::new(None, Some(1 << 40)).cache_bytes, 1 << 40, "a cache asked for is not cut");
    }
}
