//! Variants in a mount: with their base they are files like others, without it they are absent and nothing else is.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::arguments;
use crate::common::{Bert, mcwcfs_ok, safetensors};
use crate::place::{GENEROUS, Place};
use crate::support::{names, require_fuse};

const MODEL: &str = "model.safetensors";

/// Packs variants of the base in `source/base`, each into `source/variant-N`; returns their bytes.
fn pack_variants(place: &Place, base: &Bert, count: usize) -> Vec<Vec<u8>> {
    place.pack("base", base);
    let checkpoint = place.path().join(MODEL);
    let variant = |number: usize| {
        let mut tensors = base.tensors();
        for (position, tensor) in tensors.iter_mut().enumerate().filter(|(position, _)| position % 3 == number % 3) {
            for byte in tensor.data.iter_mut().step_by(4 * (1 + position % 5)) {
                *byte ^= 1;
            }
        }
        let bytes = safetensors(&tensors);
        fs::write(&checkpoint, &bytes).unwrap();
        let directory = place.source().join(format!("variant-{number}"));
        fs::create_dir_all(&directory).unwrap();
        let archive = directory.join("model.mcwc");
        mcwcfs_ok(arguments!["pack", "--base", place.source().join("base"), &checkpoint, archive]);
        bytes
    };
    (0..count).map(variant).collect()
}

fn bert() -> Bert {
    Bert { hidden: 64, ffn_units: 128, dtype: "BF16", ..Bert::default() }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < GENEROUS, "not yet: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn shows(place: &Place, variant: usize, bytes: &[u8]) -> bool {
    fs::read(place.mounted(&format!("variant-{variant}/{MODEL}"))).is_ok_and(|found| found == bytes)
}

fn metric(place: &Place, name: &str) -> u64 {
    place.status().metrics[name].as_u64().expect("a number")
}

/// Reads all variants, each by a thread of its own.
fn read_all(place: &Place, variants: &[Vec<u8>]) {
    thread::scope(|scope| {
        for (number, bytes) in variants.iter().enumerate() {
            scope.spawn(move || assert!(shows(place, number, bytes), "variant {number}"));
        }
    });
}

#[test]
fn twenty_variants_share_one_decoded_base_and_without_it_nothing_else_is_missing() {
    require_fuse!();
    let place = Place::new();
    let variants = pack_variants(&place, &bert(), 20);
    let stranger = place.pack("stranger", &Bert { seed: 99, ..bert() });
    assert!(place.mount(&["--rescan", "1"]).status.success());
    read_all(&place, &variants);
    let each = variants[0].len() as u64;
    let kept = metric(&place, "mcwcfs_cache_bytes");
    assert!(kept < 2 * each, "{kept} bytes kept of a base of {each}");

    let shows_stranger = || fs::read(place.mounted(&format!("stranger/{MODEL}"))).is_ok_and(|found| found == stranger);
    let (base, aside) = (place.source().join("base/model.mcwc"), place.path().join("aside.mcwc"));
    fs::rename(&base, &aside).unwrap();
    let is_empty = |number| names(&place.mounted(&format!("variant-{number}"))).is_empty();
    until("the variants vanish", || (0..variants.len()).all(is_empty));
    assert!(shows_stranger(), "what needs no base is still there");
    assert!(place.until_logged("needs the base").contains("content id"));
    fs::rename(&aside, &base).unwrap();
    until("the variants are back", || (0..variants.len()).all(|number| shows(&place, number, &variants[number])));
}

#[test]
fn many_readers_of_many_variants_within_little_memory_get_the_right_bytes() {
    require_fuse!();
    let place = Place::new();
    let limit_bytes = 32 << 20;
    let variants = pack_variants(&place, &Bert { layers: 2, hidden: 256, ffn_units: 1024, ..bert() }, 20);
    assert!(variants.iter().map(|bytes| bytes.len() as u64).sum::<u64>() > limit_bytes, "more than fits");
    assert!(place.mount(&["--memory-limit", "32M"]).status.success());
    read_all(&place, &variants);
    assert!(metric(&place, "mcwcfs_cache_bytes") <= metric(&place, "mcwcfs_cache_budget_bytes"));
    assert!(metric(&place, "mcwcfs_cache_budget_bytes") <= limit_bytes);
}

#[test]
fn a_variant_without_its_base_is_absent_and_heals_when_the_base_comes_back() {
    require_fuse!();
    let place = Place::new();
    let variants = pack_variants(&place, &bert(), 2);
    place.pack("other", &bert());
    assert!(place.mount(&["--rescan", "1"]).status.success());
    assert!(shows(&place, 0, &variants[0]) && shows(&place, 1, &variants[1]));

    let (base, aside) = (place.source().join("base/model.mcwc"), place.path().join("aside.mcwc"));
    fs::rename(&base, &aside).unwrap();
    // Another archive of the same weights lies beside it: nothing is missing yet.
    until("the base vanishes", || !place.mounted("base").join(MODEL).exists());
    assert!(shows(&place, 0, &variants[0]), "the other archive is as good a base");

    let other = place.path().join("other.mcwc");
    fs::rename(place.source().join("other/model.mcwc"), &other).unwrap();
    for number in 0..2 {
        until("a variant vanishes", || names(&place.mounted(&format!("variant-{number}"))).is_empty());
    }
    let line = place.until_logged("needs the base");
    assert!(line.contains("variant-") && line.contains("content id"), "{line}");
    assert_eq!(place.status().archives.len(), 0);

    fs::rename(&aside, &base).unwrap();
    until("the variants are back", || shows(&place, 0, &variants[0]) && shows(&place, 1, &variants[1]));
}

#[test]
fn a_base_outside_the_source_is_found_where_the_mount_is_told_to_look() {
    require_fuse!();
    let place = Place::new();
    let variants = pack_variants(&place, &bert(), 1);
    let elsewhere = place.path().join("elsewhere/deep");
    fs::create_dir_all(&elsewhere).unwrap();
    let moved = |name: &Path| fs::rename(place.source().join("base/model.mcwc"), name).unwrap();
    moved(&elsewhere.join("model.mcwc"));
    let option = place.path().join("elsewhere").display().to_string();
    assert!(place.mount(&["--base-path", &option, "--rescan", "1"]).status.success());
    assert!(shows(&place, 0, &variants[0]));
    assert!(!place.mounted("elsewhere").exists() && !place.mounted("base").join(MODEL).exists(), "it is not shown");
    fs::remove_file(elsewhere.join("model.mcwc")).unwrap();
    until("the variant vanishes", || names(&place.mounted("variant-0")).is_empty());
}
