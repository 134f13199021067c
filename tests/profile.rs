//! Packing with a profile, an earlier variant: the same bytes come back, as short as without one, and only where it fits.

mod common;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use common::archives::decode;
use common::{Random, Tensor, mcwcfs, mcwcfs_ok, safetensors};
use mcwcfs::archive::Archive;
use mcwcfs::materialize::EngineChoice;

const ROWS: usize = 320;
const COLUMNS: usize = 416;
const RANK: usize = 4;

/// How a variant differs from its base.
#[derive(Clone, Copy)]
struct Change {
    seed: u64,
    /// Deviation of what every element of `dense` changed by: noise, or a product where it has a rank.
    dense: f32,
    rank_of_dense: usize,
    /// Deviation of the product that was added to `merged`, before its sum was rounded; it has this rank.
    merged: f32,
    rank: usize,
}

const FIRST: Change = Change { seed: 1, dense: 2e-4, rank_of_dense: 0, merged: 4e-4, rank: RANK };
const SECOND: Change = Change { seed: 2, ..FIRST };

fn base_values() -> [Vec<f32>; 3] {
    let mut random = Random::new(5);
    let rounded = |values: Vec<f32>| values.into_iter().map(|value| half::bf16::from_f32(value).to_f32()).collect();
    [0; 3].map(|_| rounded(random.normals(ROWS * COLUMNS, 0.02)))
}

fn tensors([dense, merged, same]: [Vec<f32>; 3]) -> Vec<u8> {
    let matrices = [("dense", dense), ("merged", merged), ("same", same)];
    let matrix = |(name, values): (&str, Vec<f32>)| Tensor::floats(name, "BF16", &[ROWS, COLUMNS], &values);
    safetensors(&matrices.map(matrix))
}

fn variant(change: Change) -> Vec<u8> {
    let mut random = Random::new(100 + change.seed);
    let [mut dense, mut merged, same] = base_values();
    let noise = random.normals(ROWS * COLUMNS, 1.0);
    if change.rank_of_dense == 0 {
        dense.iter_mut().zip(noise).for_each(|(value, by)| *value += change.dense * by);
    } else {
        add_product(&mut dense, change.rank_of_dense, change.dense, &mut random);
    }
    add_product(&mut merged, change.rank, change.merged, &mut random);
    tensors([dense, merged, same])
}

/// Adds a product of two random factors whose elements have this deviation.
fn add_product(values: &mut [f32], rank: usize, deviation: f32, random: &mut Random) {
    let left = random.normals(ROWS * rank, 1.0);
    let right = random.normals(rank * COLUMNS, deviation / (rank as f32).sqrt());
    for (element, value) in values.iter_mut().enumerate() {
        let (row, column) = (element / COLUMNS, element % COLUMNS);
        *value += (0..rank).map(|k| left[row * rank + k] * right[k * COLUMNS + column]).sum::<f32>();
    }
}

/// A base and variants of it, packed.
struct Family {
    scratch: tempfile::TempDir,
}

impl Family {
    /// With the base and the first variant.
    fn new() -> Self {
        let family = Self { scratch: tempfile::tempdir().expect("a directory") };
        fs::write(family.path("base.safetensors"), tensors(base_values())).expect("a file");
        mcwcfs_ok(arguments!["pack", family.path("base.safetensors"), family.path("base.mcwc")]);
        family.pack(FIRST, "first.mcwc", &[]);
        family
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn arguments(&self, input: &Path, output: &str, options: &[&str]) -> Vec<OsString> {
        let options = options.iter().map(OsString::from);
        let files = arguments!["pack", "--base", self.path("base.mcwc"), input, self.path(output)];
        files.into_iter().chain(options).collect()
    }

    /// Packs a variant and gives the archive.
    fn pack(&self, change: Change, output: &str, options: &[&str]) -> PathBuf {
        let input = self.path(&output.replace(".mcwc", ".safetensors"));
        fs::write(&input, variant(change)).expect("a file");
        mcwcfs_ok(self.arguments(&input, output, options));
        self.path(output)
    }

    fn pack_with_profile(&self, change: Change, output: &str, options: &[&str]) -> PathBuf {
        let profile = self.path("first.mcwc");
        let profile = ["--profile", profile.to_str().expect("text")];
        self.pack(change, output, &[options, &profile].concat())
    }

    /// What is said of a profile that is refused.
    fn refusal(&self, profile: &Path, options: &[&str]) -> String {
        let input = self.path("first.safetensors");
        let profile = ["--profile", profile.to_str().expect("text")];
        let output = mcwcfs(self.arguments(&input, "refused.mcwc", &[&profile, options].concat()));
        let said = String::from_utf8([output.stderr, output.stdout].concat()).expect("text");
        assert!(!output.status.success() && !self.path("refused.mcwc").exists(), "{profile:?}: {said}");
        said
    }
}

fn bytes(archive: &Path) -> f64 {
    fs::metadata(archive).expect("an archive").len() as f64
}

#[test]
fn a_variant_of_the_same_kind_is_coded_as_the_profile_was_and_decodes_to_its_own_bytes_on_every_engine() {
    let family = Family::new();
    let alone = family.pack(SECOND, "alone.mcwc", &[]);
    let packed = family.pack_with_profile(SECOND, "second.mcwc", &[]);
    for engine in EngineChoice::value_variants() {
        assert!(decode(&packed, *engine)[0].1 == variant(SECOND), "{engine:?}");
    }
    let (with, without) = (bytes(&packed), bytes(&alone));
    assert!(with < 1.02 * without, "{with} bytes, {without} without a profile");
    let [profile, packed] = [family.path("first.mcwc"), packed].map(|path| Archive::open(&path).expect("an archive"));
    let [known, used] = [&profile, &packed].map(|archive| &archive.index().tables);
    assert!(!used.is_empty() && used.iter().all(|table| known.contains(table)), "no table was fitted");
    let options = packed.index().provenance.iter().find(|(key, _)| key == "options").expect("options");
    assert!(options.1.contains("--profile 'first.mcwc'"), "{options:?}");
    let modes = mcwcfs_ok(arguments!["inspect", "--json", "--parts", packed.path()]);
    for mode in ["\"low rank", "\"difference", "\"the base's"] {
        assert!(modes.contains(mode), "{mode}: {modes}");
    }
}

#[test]
fn the_profile_is_not_needed_to_read_what_was_packed_with_it() {
    let family = Family::new();
    let packed = family.pack_with_profile(SECOND, "second.mcwc", &[]);
    fs::remove_file(family.path("first.mcwc")).expect("the profile");
    mcwcfs_ok(arguments!["verify", packed]);
}

#[test]
fn a_profile_is_itself_made_with_one() {
    let family = Family::new();
    let second = family.pack_with_profile(SECOND, "second.mcwc", &[]);
    let third = Change { seed: 3, ..FIRST };
    let packed = family.pack(third, "third.mcwc", &["--profile", second.to_str().expect("text")]);
    assert!(decode(&packed, EngineChoice::Auto)[0].1 == variant(third));
    assert!(bytes(&packed) < 1.02 * bytes(&second));
}

#[test]
fn tensors_that_changed_in_another_way_are_decided_as_without_a_profile() {
    let family = Family::new();
    let others = [
        ("more", Change { dense: 2e-3, ..SECOND }),
        ("less", Change { dense: 2e-5, ..SECOND }),
        ("a larger product", Change { rank: 3 * RANK, ..SECOND }),
        ("a smaller product", Change { rank: 1, ..SECOND }),
        ("no product", Change { merged: 0.0, ..SECOND }),
        ("a product as large as noise was", Change { rank_of_dense: RANK, ..SECOND }),
        ("no change", Change { dense: 0.0, ..SECOND }),
    ];
    for (number, (name, change)) in others.into_iter().enumerate() {
        let without = family.pack(change, &format!("without-{number}.mcwc"), &[]);
        let with = family.pack_with_profile(change, &format!("with-{number}.mcwc"), &[]);
        assert!(decode(&with, EngineChoice::Auto)[0].1 == variant(change), "{name}");
        let (with, without) = (bytes(&with), bytes(&without));
        assert!(with < 1.03 * without, "{name}: {with} bytes, {without} without a profile");
    }
}

#[test]
fn the_archive_is_the_same_for_any_number_of_threads() {
    let family = Family::new();
    let archives = ["1", "2", "5"].map(|threads| {
        let archive = family.pack_with_profile(SECOND, "second.mcwc", &["--threads", threads, "--force"]);
        fs::read(archive).expect("an archive")
    });
    assert!(archives.iter().all(|archive| archive == &archives[0]));
}

#[test]
fn what_is_no_earlier_variant_of_the_base_is_refused() {
    let family = Family::new();
    let says = |profile: &str, options: &[&str], expected: &str| {
        let said = family.refusal(&family.path(profile), options);
        assert!(said.contains(expected), "{profile}: {said}");
    };
    says("base.mcwc", &[], "starts from no base, expected an earlier variant of base.mcwc");
    says("missing.mcwc", &[], "missing.mcwc: ");
    says("first.safetensors", &[], "expected one of an earlier variant");
    says("first.mcwc", &["--bpp", "4"], "cannot be used with");
    fs::write(family.path("cut.mcwc"), &fs::read(family.path("first.mcwc")).expect("an archive")[..5000])
        .expect("a file");
    says("cut.mcwc", &[], "cut.mcwc: ");
    // The side information of the first record begins behind the preamble.
    let mut damaged = fs::read(family.path("first.mcwc")).expect("an archive");
    damaged[mcwcfs::format::preamble::PREAMBLE_BYTES as usize + 3] ^= 1;
    fs::write(family.path("damaged.mcwc"), damaged).expect("a file");
    says("damaged.mcwc", &[], "damaged.mcwc: ");
    family.pack(FIRST, "lossy.mcwc", &["--bpp", "1"]);
    says("lossy.mcwc", &[], "packed with losses");
    // The same variant, but of a base that differs in one bit.
    let mut other = tensors(base_values());
    *other.last_mut().expect("weights") ^= 1;
    fs::write(family.path("other.safetensors"), other).expect("a file");
    let arguments = arguments![
        "pack",
        "--base",
        family.path("other.safetensors"),
        family.path("first.safetensors"),
        family.path("x.mcwc")
    ];
    mcwcfs_ok(arguments);
    says("x.mcwc", &[], "starts from other.safetensors, expected an earlier variant of base.mcwc");
}
