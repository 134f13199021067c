//! Archives of every format version decode to the digests that they had when they were made, on every engine.
//!
//! `tests/golden` holds them; `tests/golden/SHA256SUMS` has one line per decoded file, as sha256sum prints it. They are
//! never rewritten: a change that makes this test fail breaks the archives that people have. A new version, or a feature
//! no archive uses yet, adds files:
//!
//! ```sh
//! MCWCFS_ADD_GOLDEN=v1 cargo test --test golden
//! ```
//!
//! packs every recipe of `tests/common/archives.rs` whose `v1-NAME.mcwc` is missing, and appends its digests.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use clap::ValueEnum;
use common::archives::{LARGE_RECIPES, RECIPES, VARIANTS, decode};
use mcwcfs::materialize::EngineChoice;
use sha2::{Digest, Sha256};

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn hex_sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Adds what is missing, where the environment asks for it.
fn add_missing() {
    let Ok(version) = std::env::var("MCWCFS_ADD_GOLDEN") else { return };
    fs::create_dir_all(golden()).expect("tests/golden");
    let scratch = tempfile::tempdir().expect("a directory");
    let alone = RECIPES.iter().chain(LARGE_RECIPES).map(|recipe| (recipe.name, None));
    // A base before its variant.
    let variants =
        VARIANTS.iter().flat_map(|recipe| [recipe.base.name, recipe.variant.name].map(|n| (n, Some(recipe))));
    for (recipe_name, variant) in alone.chain(variants) {
        let name = format!("{version}-{recipe_name}.mcwc");
        let path = golden().join(&name);
        if path.exists() {
            continue;
        }
        let packed = scratch.path().join(format!("{recipe_name}.mcwc"));
        match variant {
            Some(_) if packed.exists() => {}
            Some(variant) => drop(variant.pack(scratch.path())),
            None => {
                let mut recipes = RECIPES.iter().chain(LARGE_RECIPES);
                recipes.find(|recipe| recipe.name == recipe_name).expect("listed").pack(scratch.path());
            }
        }
        fs::copy(packed, &path).expect("a golden archive");
        let sums = OpenOptions::new().append(true).create(true).open(golden().join("SHA256SUMS"));
        let mut sums = sums.expect("tests/golden/SHA256SUMS");
        for (file, bytes) in decode(&path, EngineChoice::Reference) {
            writeln!(sums, "{}  {name}/{file}", hex_sha256(&bytes)).expect("a line");
        }
    }
}

#[test]
fn golden_archives_decode_to_their_digests_on_every_engine() {
    add_missing();
    let sums = fs::read_to_string(golden().join("SHA256SUMS")).expect("tests/golden/SHA256SUMS");
    let expected: BTreeMap<&str, &str> = sums
        .lines()
        .map(|line| line.split_once("  ").expect("a digest, two spaces, a name"))
        .map(|(d, n)| (n, d))
        .collect();
    for engine in EngineChoice::value_variants() {
        let engine = *engine;
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(golden()).expect("tests/golden") {
            let path = entry.expect("a directory entry").path();
            if path.extension().is_none_or(|extension| extension != "mcwc") {
                continue;
            }
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            for (file, bytes) in decode(&path, engine) {
                found.insert(format!("{name}/{file}"), hex_sha256(&bytes));
            }
        }
        let found: BTreeMap<&str, &str> = found.iter().map(|(name, digest)| (name.as_str(), digest.as_str())).collect();
        assert!(
            found.len() >= RECIPES.len() + LARGE_RECIPES.len() + 2 * VARIANTS.len(),
            "an archive of every kind: {found:#?}"
        );
        assert_eq!(found, expected, "{engine:?}");
    }
}
