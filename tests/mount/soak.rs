//! Mixed readers for minutes: nothing grows.
//!
//! ```sh
//! cargo test --release --test mount -- --ignored soak          # ten minutes
//! MCWCFS_SOAK_SECONDS=60 cargo test --release --test mount -- --ignored soak
//! ```

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapOptions};

use crate::common::{Bert, Random, mcwcfs_ok};
use crate::packed::Packed;
use crate::support::{extended_attribute, require_fuse};

/// Kinds of readers; several of each run at a time.
const KINDS: usize = 5;
const READERS: u64 = 15;

fn seconds() -> u64 {
    std::env::var("MCWCFS_SOAK_SECONDS").map_or(600, |text| text.parse().expect("a number of seconds"))
}

/// One turn of a reader.
fn read(kind: usize, packed: &Packed, expected: &[u8], random: &mut Random) {
    let from = random.below(expected.len());
    let length = random.below((expected.len() - from).min(4 << 20)) + 1;
    let wanted = &expected[from..from + length.min(expected.len() - from)];
    match kind {
        0 => assert!(fs::read(packed.model()).unwrap() == expected),
        1 | 2 => {
            let flags = if kind == 2 { libc::O_DIRECT } else { 0 };
            let file = OpenOptions::new().read(true).custom_flags(flags).open(packed.model()).unwrap();
            let mut out = vec![0; wanted.len()];
            file.read_exact_at(&mut out, from as u64).unwrap();
            assert!(out == wanted, "bytes from {from}");
        }
        3 => {
            let file = File::open(packed.model()).unwrap();
            // SAFETY: nobody can change a file of a read-only mount.
            let map = unsafe { MmapOptions::new().map(&file) }.unwrap();
            map.advise(Advice::Random).unwrap();
            assert!(map[from..from + wanted.len()] == *wanted, "bytes from {from}");
        }
        _ => {
            // The kernel's pages go, so that there is something to do.
            let file = File::open(packed.model()).unwrap();
            // SAFETY: the descriptor is open.
            unsafe { libc::posix_fadvise(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 0, libc::POSIX_FADV_DONTNEED) };
            for name in ["config.json", "README.md"] {
                fs::read(packed.mounted().join(name)).unwrap();
            }
        }
    }
}

/// Memory in bytes and open descriptors of the process that serves.
fn size(packed: &Packed) -> (u64, u64) {
    let status = mcwcfs_ok(["status".into(), "--json".into(), packed.path("mnt").into_os_string()]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let metric = |name: &str| status["metrics"][name].as_f64().expect("a metric") as u64;
    (metric("mcwcfs_resident_bytes"), metric("mcwcfs_open_descriptors"))
}

#[test]
#[ignore = "runs for ten minutes; the head of tests/mount/soak.rs says how"]
fn soak_of_mixed_readers_leaves_no_growth_in_memory_or_descriptors() {
    require_fuse!();
    let packed = Packed::empty();
    Bert { layers: 6, hidden: 256, heads: 4, ffn_units: 1024, dtype: "BF16", ..Bert::default() }
        .write(&packed.original());
    packed.pack(&["--bpp", "5"]);
    let expected = packed.expected(true);
    packed.mount(&["--memory-limit", "64M", "--cache-size", "8M"]);
    extended_attribute(&packed.path("mnt"), "user.mcwc.daemon_pid").unwrap();
    let run_for = |duration: Duration| {
        let end = Instant::now() + duration;
        thread::scope(|scope| {
            for reader in 0..READERS {
                let (packed, expected) = (&packed, &expected);
                scope.spawn(move || {
                    let mut random = Random::new(reader);
                    while Instant::now() < end {
                        read(reader as usize % KINDS, packed, expected, &mut random);
                    }
                });
            }
        });
        // Threads and buffers that were added for the load go after some seconds without it.
        thread::sleep(Duration::from_secs(12));
        size(&packed)
    };
    let total = Duration::from_secs(seconds());
    let (memory, descriptors) = run_for(total / 5);
    let (memory_after, descriptors_after) = run_for(total - total / 5);
    println!(
        "{memory} bytes and {descriptors} descriptors after a fifth, {memory_after} and {descriptors_after} after all"
    );
    assert!(memory_after < memory + (16 << 20), "{memory} bytes grew to {memory_after}");
    assert!(descriptors_after <= descriptors + 2, "{descriptors} descriptors grew to {descriptors_after}");
}
