//! Many readers at once: page faults without a stall is requirement number one.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;

use mcwcfs::fuse::MountOptions;
use memmap2::{Advice, MmapOptions};

use crate::common::Random;
use crate::support::{InMemory, TestMount, require_fuse};

const MODEL: &str = "model.safetensors";

/// A door that decodes wait at until it is opened.
#[derive(Default)]
pub struct Door {
    is_open: Mutex<bool>,
    moved: Condvar,
    waiting: Mutex<usize>,
}

impl Door {
    pub fn pass(&self) {
        *self.waiting.lock().unwrap() += 1;
        self.moved.notify_all();
        let is_open = self.is_open.lock().unwrap();
        drop(self.moved.wait_while(is_open, |is_open| !*is_open).unwrap());
    }

    pub fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.moved.notify_all();
    }

    pub fn until_waiting(&self, count: usize) {
        while *self.waiting.lock().unwrap() < count {
            thread::yield_now();
        }
    }
}

#[test]
fn thirty_two_threads_fault_one_mapping_at_random_while_others_read_it() {
    require_fuse!();
    let checkpoint = InMemory::new(&[MODEL], 16 << 20);
    let bytes = Arc::new(checkpoint.bytes(0));
    let mount = TestMount::of(checkpoint);
    let file = mount.open(MODEL);
    // SAFETY: nobody can change a file of a read-only mount.
    let map = unsafe { MmapOptions::new().map(&file) }.unwrap();
    let start = Barrier::new(40);
    thread::scope(|scope| {
        for seed in 0..32 {
            let (map, bytes, start) = (&map, &bytes, &start);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                start.wait();
                for _ in 0..500 {
                    let at = random.below(bytes.len());
                    assert_eq!(map[at], bytes[at], "byte {at}");
                }
            });
        }
        for seed in 100..108 {
            let (file, bytes, start) = (&file, &bytes, &start);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                let mut out = vec![0; 2 << 20];
                start.wait();
                for _ in 0..8 {
                    let at = random.below(bytes.len() - out.len());
                    file.read_exact_at(&mut out, at as u64).unwrap();
                    assert!(out == bytes[at..][..out.len()], "bytes from {at}");
                }
            });
        }
    });
}

#[test]
fn line_19_a_decode_that_takes_forever_holds_up_nothing_else() {
    require_fuse!();
    let door = Arc::new(Door::default());
    let slow = InMemory::new(&["slow.safetensors"], 1 << 20).before_decode({
        let door = Arc::clone(&door);
        move |_, _| {
            door.pass();
            Ok(())
        }
    });
    let (slow_bytes, fast) = (slow.bytes(0), InMemory::new(&[MODEL], 1 << 20));
    let fast_bytes = fast.bytes(0);
    let archives = BTreeMap::from([("slow.mcwc", slow), ("fast.mcwc", fast)]);
    let mount = TestMount::with(archives, &MountOptions::default(), |source| {
        fs::write(source.join("config.json"), "{}").unwrap();
    });
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(mount.path("slow.safetensors")).unwrap());
        door.until_waiting(1);
        assert!(fs::read(mount.path(MODEL)).unwrap() == fast_bytes);
        assert_eq!(fs::read(mount.path("config.json")).unwrap(), b"{}");
        assert_eq!(fs::read_dir(mount.path("")).unwrap().count(), 3);
        assert_eq!(fs::metadata(mount.path("slow.safetensors")).unwrap().len(), slow_bytes.len() as u64);
        assert!(!reader.is_finished());
        door.open();
        assert!(reader.join().unwrap() == slow_bytes);
    });
}

#[test]
fn line_20_requests_that_wait_for_a_decode_occupy_no_worker_that_another_needs() {
    require_fuse!();
    const READERS: usize = 64;
    let door = Arc::new(Door::default());
    let slow = InMemory::new(&["slow.safetensors"], READERS << 20).before_decode({
        let door = Arc::clone(&door);
        move |_, _| {
            door.pass();
            Ok(())
        }
    });
    let (slow_bytes, fast) = (Arc::new(slow.bytes(0)), InMemory::new(&[MODEL], 4 << 20));
    let fast_bytes = fast.bytes(0);
    let archives = BTreeMap::from([("slow.mcwc", slow), ("fast.mcwc", fast)]);
    let mount = TestMount::with(archives, &MountOptions::default(), |_| {});
    let file = mount.open("slow.safetensors");
    let is_open = AtomicBool::new(false);
    thread::scope(|scope| {
        for reader in 0..READERS {
            let (file, slow_bytes, is_open) = (&file, &slow_bytes, &is_open);
            scope.spawn(move || {
                let mut out = [0; 100];
                let at = reader << 20;
                file.read_exact_at(&mut out, at as u64).unwrap();
                assert!(is_open.load(Ordering::SeqCst));
                assert!(out == slow_bytes[at..][..100]);
            });
        }
        door.until_waiting(READERS);
        assert!(fs::read(mount.path(MODEL)).unwrap() == fast_bytes);
        is_open.store(true, Ordering::SeqCst);
        door.open();
    });
}

/// A door for each decode, by the offset where it begins.
#[derive(Default)]
struct Doors {
    state: Mutex<DoorsState>,
    moved: Condvar,
}

#[derive(Default)]
struct DoorsState {
    open: HashSet<u64>,
    waiting: HashSet<u64>,
}

impl Doors {
    fn pass(&self, offset: u64) {
        let mut state = self.state.lock().unwrap();
        state.waiting.insert(offset);
        self.moved.notify_all();
        let mut state = self.moved.wait_while(state, |state| !state.open.contains(&offset)).unwrap();
        state.waiting.remove(&offset);
    }

    fn open(&self, offset: u64) {
        self.state.lock().unwrap().open.insert(offset);
        self.moved.notify_all();
    }

    fn until_waiting(&self, count: usize) {
        let state = self.state.lock().unwrap();
        drop(self.moved.wait_while(state, |state| state.waiting.len() < count).unwrap());
    }
}

#[test]
fn line_20_no_thread_waits_longer_than_the_decode_it_needs() {
    require_fuse!();
    const FAULTING: usize = 64;
    const READING: usize = 16;
    const APART: usize = 1 << 20;
    let doors = Arc::new(Doors::default());
    let checkpoint = InMemory::new(&[MODEL], (FAULTING + READING) * APART).before_decode({
        let doors = Arc::clone(&doors);
        move |_, offset| {
            doors.pass(offset);
            Ok(())
        }
    });
    let bytes = checkpoint.bytes(0);
    let mount = TestMount::of(checkpoint);
    let file = mount.open(MODEL);
    // Each thread needs one decode of its own: the kernel is not to read ahead.
    // SAFETY: the descriptor is open.
    assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) }, 0);
    // SAFETY: nobody can change a file of a read-only mount.
    let map = unsafe { MmapOptions::new().map(&file) }.unwrap();
    map.advise(Advice::Random).unwrap();
    thread::scope(|scope| {
        let mut threads: Vec<_> = (1..=FAULTING + READING)
            .map(|number| {
                let (map, file, at) = (&map, &file, number * APART - 8192);
                let read = move || {
                    let mut page = [0; 4096];
                    if number <= FAULTING {
                        page.copy_from_slice(&map[at..][..4096]);
                    } else {
                        file.read_exact_at(&mut page, at as u64).unwrap();
                    }
                    page
                };
                (at, Some(scope.spawn(read)))
            })
            .collect();
        doors.until_waiting(threads.len());
        let order = Random::new(4).permutation(threads.len());
        for (done, &number) in order.iter().enumerate() {
            let (at, thread) = &mut threads[number];
            doors.open(*at as u64);
            // It ends although the decodes of all that are left still wait.
            assert!(thread.take().unwrap().join().unwrap() == bytes[*at..][..4096]);
            assert!(threads.iter().flat_map(|(_, thread)| thread).all(|thread| !thread.is_finished()), "after {done}");
        }
    });
}
