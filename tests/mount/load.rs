//! Many readers at once on what `mcwc-pack` wrote, with little memory: nobody waits for ever, and every byte is right.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::thread;

use memmap2::{Advice, Mmap, MmapOptions};

use crate::common::{Bert, Random, Tensor, mcwcfs_ok};
use crate::packed::{MODEL, Packed};
use crate::support::require_fuse;

/// A checkpoint large enough for many strips, of tensors that are predicted and of such as are not.
fn large(options: &[&str]) -> Packed {
    let packed = Packed::empty();
    Bert { layers: 6, hidden: 128, heads: 4, ffn_units: 512, dtype: "BF16", ..Bert::default() }
        .write(&packed.original());
    packed.pack(options);
    packed
}

fn map(file: &File) -> Mmap {
    // SAFETY: nobody can change a file of a read-only mount.
    unsafe { MmapOptions::new().map(file) }.unwrap()
}

fn direct(packed: &Packed) -> File {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(packed.model()).unwrap()
}

/// A metric of the mount, by name.
fn counted(packed: &Packed, name: &str) -> u64 {
    let status = mcwcfs_ok(["status".into(), "--json".into(), packed.path("mnt").into_os_string()]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    status["metrics"][name].as_f64().unwrap_or_else(|| panic!("no {name} in: {status}")) as u64
}

#[test]
fn line_20_64_threads_fault_a_map_while_16_read_with_a_cache_of_two_records() {
    require_fuse!();
    for (options, is_lossy) in [(&[][..], false), (&["--bpp", "4"][..], true)] {
        let packed = large(options);
        let expected = packed.expected(is_lossy);
        let two_records = (2 * 2 * 128 * 512 * 2).to_string();
        packed.mount(&["--cache-size", &two_records, "--memory-limit", "32M"]);
        let (file, direct) = (File::open(packed.model()).unwrap(), direct(&packed));
        let map = map(&file);
        map.advise(Advice::Random).unwrap();
        thread::scope(|scope| {
            for seed in 0..64 {
                let (map, expected) = (&map, &expected);
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    for _ in 0..50 {
                        let at = random.below(expected.len());
                        assert_eq!(map[at], expected[at], "byte {at}");
                    }
                });
            }
            for seed in 64..80 {
                // Half of them through the kernel's cache, half past it.
                let (file, expected) = (if seed % 2 == 0 { &file } else { &direct }, &expected);
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    let mut out = vec![0; 100_000];
                    for _ in 0..20 {
                        let from = random.below(expected.len() - out.len());
                        file.read_exact_at(&mut out, from as u64).unwrap();
                        assert!(out == expected[from..][..out.len()], "bytes from {from}");
                    }
                });
            }
        });
    }
}

#[test]
fn line_21_four_processes_that_read_directly_cause_each_decode_once() {
    require_fuse!();
    for (options, is_lossy) in [(&[][..], false), (&["--bpp", "4"][..], true)] {
        let packed = large(options);
        let expected = packed.expected(is_lossy);
        packed.mount(&["--cache-size", "1G"]);
        let copies: Vec<_> = (0..4).map(|number| packed.path(&format!("copy-{number}"))).collect();
        let readers: Vec<_> = copies
            .iter()
            .map(|copy| {
                let mut dd = Command::new("dd");
                dd.arg(format!("if={}", packed.model().display())).arg(format!("of={}", copy.display()));
                dd.args(["bs=256K", "iflag=direct"]).stderr(Stdio::null()).spawn().unwrap()
            })
            .collect();
        for mut reader in readers {
            assert!(reader.wait().unwrap().success());
        }
        for copy in copies {
            assert!(fs::read(copy).unwrap() == expected);
        }
        assert_eq!(counted(&packed, "mcwcfs_duplicate_decodes"), 0);
        assert!(counted(&packed, "mcwcfs_cache_misses") > 0);
    }
}

#[test]
fn line_21_a_direct_reader_and_one_through_the_page_cache_share_each_decode() {
    require_fuse!();
    for (options, is_lossy) in [(&[][..], false), (&["--bpp", "4"][..], true)] {
        let packed = large(options);
        let expected = packed.expected(is_lossy);
        packed.mount(&["--cache-size", "1G"]);
        let (direct, paged) = (direct(&packed), File::open(packed.model()).unwrap());
        let read = |file: &File| {
            let mut out = vec![0; 256 << 10];
            for (number, wanted) in expected.chunks(out.len()).enumerate() {
                let out = &mut out[..wanted.len()];
                file.read_exact_at(out, (number * (256 << 10)) as u64).unwrap();
                assert!(out == wanted, "piece {number}");
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| read(&direct));
            read(&paged);
        });
        // The kernel lets its pages go and asks again.
        // SAFETY: the descriptor is open.
        assert_eq!(unsafe { libc::posix_fadvise(paged.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
        read(&paged);
        read(&direct);
        assert_eq!(counted(&packed, "mcwcfs_duplicate_decodes"), 0);
        let decoded = counted(&packed, "mcwcfs_decoded_bytes_total");
        assert!(decoded > 0 && decoded <= expected.len() as u64, "{decoded} bytes decoded of {}", expected.len());
    }
}

#[test]
fn sixteen_threads_read_two_mebibytes_each_in_turns() {
    require_fuse!();
    let noise = Random::new(3).bytes(40 << 20);
    let tensors = [Tensor::raw("bytes", "U8", &[noise.len()], noise)];
    let packed = Packed::tensors(&tensors, &[]);
    let expected = packed.expected(false);
    packed.mount(&["--memory-limit", "32M"]);
    const PIECE: usize = 2 << 20;
    for file in [File::open(packed.model()).unwrap(), direct(&packed)] {
        thread::scope(|scope| {
            for first in 0..16 {
                let (file, expected) = (&file, &expected);
                scope.spawn(move || {
                    let mut out = vec![0; PIECE];
                    for from in (first * PIECE..expected.len()).step_by(16 * PIECE) {
                        let length = PIECE.min(expected.len() - from);
                        file.read_exact_at(&mut out[..length], from as u64).unwrap();
                        assert!(out[..length] == expected[from..][..length], "bytes from {from}");
                    }
                });
            }
        });
    }
}

#[test]
fn line_22_a_checkpoint_larger_than_the_memory_limit_loads_within_it() {
    require_fuse!();
    let mut random = Random::new(5);
    let tensors: Vec<Tensor> = (0..12)
        .map(|number| {
            let values = random.normals(1024 * 2048, 0.02);
            Tensor::floats(&format!("layer.{number}.weight"), "BF16", &[1024, 2048], &values)
        })
        .collect();
    let packed = Packed::tensors(&tensors, &[]);
    let expected = packed.expected(false);
    packed.mount(&["--memory-limit", "32M"]);
    let daemon = crate::support::extended_attribute(&packed.path("mnt"), "user.mcwc.daemon_pid").unwrap();
    let most_bytes = || {
        let status = fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    };
    let before = most_bytes();
    assert!(expected.len() > 48 << 20);
    thread::scope(|scope| {
        for seed in 0..24 {
            let (packed, expected) = (&packed, &expected);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                let file = if seed % 3 == 0 { File::open(packed.model()).unwrap() } else { direct(packed) };
                let mut out = vec![0; 1 << 20];
                for _ in 0..12 {
                    let from = random.below(expected.len() - out.len());
                    file.read_exact_at(&mut out, from as u64).unwrap();
                    assert!(out == expected[from..][..out.len()], "bytes from {from}");
                }
            });
        }
    });
    assert!(fs::read(packed.model()).unwrap() == expected);
    // Beside what is limited: stacks of threads, and what the allocator keeps of small things.
    let grown = most_bytes() - before;
    assert!(grown < (32 + 24) << 20, "grown by {} MiB", grown >> 20);
}

#[test]
fn a_map_is_populated_with_less_memory_than_it_has() {
    require_fuse!();
    let packed = large(&["--bpp", "4"]);
    let expected = packed.expected(true);
    packed.mount(&["--cache-size", "0", "--memory-limit", "32M"]);
    let map = map(&File::open(packed.model()).unwrap());
    map.advise(Advice::PopulateRead).unwrap();
    assert!(map[..] == expected);
}

#[test]
fn fio_verifies_what_it_wrote_before_it_was_packed() {
    require_fuse!();
    if Command::new("fio").arg("--version").output().is_err() {
        eprintln!("not tested: fio is missing here");
        return;
    }
    const PAGE: usize = 4096;
    const DATA: usize = 8 << 20;
    // The header fills a page, so that blocks lie in the file as fio will ask for them.
    let mut header = format!(r#"{{"bytes":{{"dtype":"U8","shape":[{DATA}],"data_offsets":[0,{DATA}]}}}}"#);
    header.extend(std::iter::repeat_n(' ', PAGE - 8 - header.len()));
    let packed = Packed::empty();
    let model = packed.original().join(MODEL);
    let fio = |file: &std::path::Path, arguments: &[&str]| {
        let mut fio = Command::new("fio");
        fio.args(["--name=model", "--verify=crc32c", "--verify_fatal=1", "--ioengine=psync", "--minimal"]);
        fio.args([format!("--offset={PAGE}"), format!("--size={DATA}"), format!("--filename={}", file.display())]);
        let output = fio.args(arguments).current_dir(packed.path("")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    fio(&model, &["--rw=write", "--bs=4k", "--do_verify=0"]);
    let header = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    OpenOptions::new().write(true).open(&model).unwrap().write_all_at(&header, 0).unwrap();
    packed.pack(&[]);
    packed.mount(&[]);
    // Not with fio's map engine: it is a page off on plain files too where an offset is given.
    for (order, threads) in [("read", "1"), ("randread", "8")] {
        let jobs = format!("--numjobs={threads}");
        fio(&packed.model(), &[&format!("--rw={order}"), "--bs=4k", "--readonly", "--thread", &jobs]);
    }
    mcwcfs_ok(["verify".into(), packed.path("packed/bert").into_os_string()]);
}

#[test]
fn the_names_of_all_tensors_are_there_after_the_same_little_work_whatever_the_size_of_the_model() {
    require_fuse!();
    let decoded_for_names = |megabytes: usize| {
        let tensors: Vec<_> = (0..megabytes)
            .map(|number| Tensor::raw(&format!("{number:03}"), "U8", &[1 << 20], Random::new(1).bytes(1 << 20)))
            .collect();
        let packed = Packed::tensors(&tensors, &[]);
        packed.mount(&[]);
        let map = map(&File::open(packed.model()).unwrap());
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&map).unwrap();
        assert_eq!(metadata.tensors().len(), megabytes);
        counted(&packed, "mcwcfs_read_requests_total")
    };
    // What the kernel reads around the page that was asked for, and nothing more.
    let [small, large] = [8, 64].map(decoded_for_names);
    assert!(small == large && small <= 2, "{small} and {large} requests");
}

/// Runs a command of the shell on the mounted model, as `$1`, and the bytes it must have, as `$2`.
const PLAIN_PROGRAMS: &str = r#"
cp "$1" copy && cmp copy "$2"
cat "$1" | cmp - "$2"
test "$(sha256sum <"$1")" = "$(sha256sum <"$2")"
dd if="$1" bs=1000003 2>/dev/null | cmp - "$2"
dd if="$1" bs=64k iflag=direct 2>/dev/null | cmp - "$2"
tail -c 100001 "$1" | cmp - "$3"
tar -C "$(dirname "$1")" -cf - "$(basename "$1")" | tar -xOf - | cmp - "$2"
"#;

#[test]
fn plain_programs_read_the_right_bytes() {
    require_fuse!();
    for (options, is_lossy) in [(&[][..], false), (&["--bpp", "4"][..], true)] {
        let packed = large(options);
        let expected = packed.expected(is_lossy);
        fs::write(packed.path("expected"), &expected).unwrap();
        fs::write(packed.path("expected-end"), &expected[expected.len() - 100_001..]).unwrap();
        packed.mount(&[]);
        let mut shell = Command::new("sh");
        shell.args(["-euc", PLAIN_PROGRAMS, "sh"]).arg(packed.model()).current_dir(packed.path(""));
        let output = shell.args([packed.path("expected"), packed.path("expected-end")]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
