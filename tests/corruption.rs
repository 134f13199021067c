//! A damaged archive gives a clear error or the original bytes: never a panic, never other bytes.

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use common::archives::{RECIPES, ReadError, Recipe, VARIANTS, decode, read_in_windows};
use mcwcfs::materialize::EngineChoice;

/// Not a multiple of anything: windows start and end inside strips and tensors.
const WINDOW: usize = 1021;

/// A sound archive and what it decodes to.
struct Sound {
    archive: Vec<u8>,
    files: Vec<Vec<u8>>,
    scratch: tempfile::TempDir,
}

impl Sound {
    fn new(recipe: &Recipe) -> Self {
        Self::packed_by(|directory| recipe.pack(directory))
    }

    fn packed_by(pack: impl FnOnce(&Path) -> PathBuf) -> Self {
        let scratch = tempfile::tempdir().expect("a directory");
        let path = pack(scratch.path());
        let files = decode(&path, EngineChoice::Reference).into_iter().map(|(_, bytes)| bytes).collect();
        Self { archive: fs::read(path).expect("the archive"), files, scratch }
    }

    /// Reads `damaged` as an archive. Every window is an error or has the original's bytes; returns whether all are.
    fn check(&self, path: &Path, damaged: &[u8], what: &str) -> bool {
        fs::write(path, damaged).expect("a scratch file");
        let read = catch_unwind(AssertUnwindSafe(|| read_in_windows(path, EngineChoice::Auto, WINDOW)));
        // A new file each time: ext4 writes a truncated and rewritten one to the disk at once.
        fs::remove_file(path).expect("a scratch file");
        let files = match read.unwrap_or_else(|_| panic!("{what}: a panic")) {
            Ok(files) => files,
            Err(error) => {
                assert_clear(&error, what);
                return false;
            }
        };
        assert_eq!(files.len(), self.files.len(), "{what}");
        let mut intact = true;
        for (windows, original) in files.iter().zip(&self.files) {
            assert_eq!(windows.len(), original.len().div_ceil(WINDOW), "{what}");
            for (window, original) in windows.iter().zip(original.chunks(WINDOW)) {
                match window {
                    Ok(bytes) => assert!(bytes == original, "{what}: other bytes than the original's"),
                    Err(error) => {
                        assert_clear(error, what);
                        intact = false;
                    }
                }
            }
        }
        intact
    }

    /// Runs `check` on many damaged copies, on all cores, and returns how many were read without any error.
    fn check_all(&self, count: usize, damage: impl Fn(usize) -> (Vec<u8>, String) + Sync) -> usize {
        let (next, intact) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for worker in 0..thread::available_parallelism().map_or(1, usize::from) {
                let path = self.scratch.path().join(format!("damaged-{worker}"));
                let (next, intact, damage) = (&next, &intact, &damage);
                scope.spawn(move || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            return;
                        }
                        let (bytes, what) = damage(number);
                        intact.fetch_add(usize::from(self.check(&path, &bytes, &what)), Ordering::Relaxed);
                    }
                });
            }
        });
        intact.into_inner()
    }
}

/// An error names the archive and is one line.
fn assert_clear(error: &ReadError, what: &str) {
    let message = match error {
        ReadError::Open(error) => error.to_string(),
        ReadError::Decode(error) => error.to_string(),
    };
    assert!(message.contains("damaged-") && message.lines().count() == 1, "{what}: {message}");
}

fn assert_every_changed_byte_is_noticed(name: &str, sound: &Sound) {
    assert!(sound.check(&sound.scratch.path().join("damaged-not"), &sound.archive, "the sound archive"));
    // One bit, another bit, all bits: the masks go round, so that each field meets each of them.
    let masks = [0x01, 0x80, 0xff, 0x10];
    let intact = sound.check_all(sound.archive.len(), |position| {
        let mask = masks[position % masks.len()];
        let mut damaged = sound.archive.clone();
        damaged[position] ^= mask;
        (damaged, format!("{name}: byte {position} xor {mask:#04x}"))
    });
    assert_eq!(intact, 0, "every byte of the file is covered by a checksum");
}

fn assert_every_truncation_is_refused(name: &str, sound: &Sound) {
    let count = sound.archive.len();
    let intact =
        sound.check_all(count, |length| (sound.archive[..length].to_vec(), format!("{name}: cut to {length} bytes")));
    assert_eq!(intact, 0, "the preamble states the length");
    let longer = [&sound.archive[..], &[0]].concat();
    assert!(!sound.check(&sound.scratch.path().join("damaged-longer"), &longer, "one byte more"));
}

fn recipe(name: &str) -> &'static Recipe {
    RECIPES.iter().find(|recipe| recipe.name == name).unwrap_or_else(|| panic!("no recipe {name}"))
}

macro_rules! for_each_recipe {
    ($($module:ident: $name:literal),* $(,)?) => { $(
        mod $module {
            use super::*;

            #[test]
            fn every_changed_byte_is_noticed() {
                assert_every_changed_byte_is_noticed($name, &Sound::new(recipe($name)));
            }

            #[test]
            fn every_truncation_is_refused() {
                assert_every_truncation_is_refused($name, &Sound::new(recipe($name)));
            }
        }
    )* };
}

for_each_recipe! {
    lossless_bf16: "lossless-bf16",
    tree_digests: "tree-digests",
    lossless_mixed_types: "lossless-mixed-types",
    lossy_predicted: "lossy-predicted",
    lossy_scalar_steps_per_run: "lossy-scalar-steps-per-run",
    lossy_trellis_shared: "lossy-trellis-shared",
    lossy_fine_steps: "lossy-fine-steps",
    lossy_vectors: "lossy-vectors",
    lossy_column_scales: "lossy-column-scales",
    lossy_motion_vectors: "lossy-motion-vectors",
    lossless_units: "lossless-units",
}

mod variant {
    use super::*;

    #[test]
    fn every_changed_byte_is_noticed() {
        for recipe in VARIANTS {
            let sound = Sound::packed_by(|directory| recipe.pack(directory));
            assert_every_changed_byte_is_noticed(recipe.variant.name, &sound);
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        for recipe in VARIANTS {
            let sound = Sound::packed_by(|directory| recipe.pack(directory));
            assert_every_truncation_is_refused(recipe.variant.name, &sound);
        }
    }
}

/// Bytes exchanged between sound archives are no mixture of both.
#[test]
fn a_splice_of_two_archives_is_refused() {
    let (one, other) = (Sound::new(&RECIPES[0]), Sound::new(&RECIPES[2]));
    let length = one.archive.len().min(other.archive.len());
    let intact = one.check_all(length / 16, |number| {
        let at = 1 + 16 * number;
        let mut spliced = one.archive.clone();
        spliced[at..length].copy_from_slice(&other.archive[at..length]);
        (spliced, format!("the other archive's bytes from {at} to {length}"))
    });
    assert_eq!(intact, 0, "no splice is sound");
}
