//! What Python readers, as they come from PyPI, see in a mount; and that permutations leave a model's function alone.
//!
//! The checks themselves are in `tests/python`. They run in the virtual environment that `tests/setup` makes, and on the
//! real checkpoint that it fetches; without them these tests fail, for a test that is skipped proves nothing.

mod common;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Mount, mcwcfs_ok};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a script of `tests/python`, which must succeed, and gives what it said.
fn python(script: &str, arguments: &[&OsStr]) -> String {
    let python = repository().join(".venv/bin/python");
    assert!(python.exists(), "{} is missing: run tests/setup first", python.display());
    let output = Command::new(python)
        .arg(repository().join("tests/python").join(script))
        .args(arguments)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("Python starts");
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}: {}\n{said}\n{errors}", output.status);
    said.into_owned()
}

/// The real checkpoint, in the user's cache directory.
fn all_minilm() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache"))).expect("a home directory");
    let checkpoint = cache.join("mcwcfs/all-MiniLM-L6-v2");
    assert!(checkpoint.exists(), "{} is missing: run tests/setup first", checkpoint.display());
    checkpoint
}

/// Packs, mounts, and has every reader compare the mount with `checkpoint`; for a lossy archive with what `unpack` wrote.
fn assert_readers_agree(checkpoint: &Path, options: &[&str]) {
    let work = tempfile::tempdir().expect("a directory");
    let (packed, unpacked) = (work.path().join("packed"), work.path().join("unpacked"));
    let mut pack = arguments!["pack", checkpoint, &packed].to_vec();
    pack.extend(options.iter().map(Into::into));
    mcwcfs_ok(pack);
    let expected = if options.is_empty() {
        checkpoint
    } else {
        mcwcfs_ok(arguments!["unpack", &packed, &unpacked]);
        &unpacked
    };
    let mount = Mount::new(&packed, &[]);
    let said = python("readers.py", &[expected.as_os_str(), mount.path.as_os_str()]);
    for check in ["listing", "slices", "mmap", "pread", "threads", "transformers", "digests"] {
        assert!(said.contains(&format!("{check}: ")), "{check} did not run:\n{said}");
    }
}

#[test]
fn readers_see_a_real_lossless_checkpoint_as_it_was() {
    assert_readers_agree(&all_minilm(), &[]);
}

#[test]
fn readers_see_a_real_lossy_checkpoint_as_it_unpacks() {
    assert_readers_agree(&all_minilm(), &["--bpp", "4.2"]);
}

#[test]
fn readers_see_checkpoints_of_every_architecture_as_they_were() {
    let made = tempfile::tempdir().expect("a directory");
    python("checkpoints.py", &[made.path().as_os_str()]);
    let work = tempfile::tempdir().expect("a directory");
    let mut families = 0;
    for family in std::fs::read_dir(made.path()).expect("checkpoints") {
        let name = family.expect("a directory entry").file_name();
        mcwcfs_ok(arguments!["pack", made.path().join(&name), work.path().join(&name)]);
        families += 1;
    }
    assert!(families >= 8, "checkpoints.py made {families} checkpoints");
    let mount = Mount::new(work.path(), &[]);
    let mut directories: Vec<PathBuf> = Vec::new();
    for family in std::fs::read_dir(&mount.path).expect("the mount") {
        let name = family.expect("a directory entry").file_name();
        directories.extend([made.path().join(&name), mount.path.join(&name)]);
    }
    assert_eq!(directories.len(), 2 * families);
    python("readers.py", &directories.iter().map(|path| path.as_os_str()).collect::<Vec<_>>());
}

#[test]
fn the_chosen_permutations_preserve_the_function_of_every_architecture() {
    let work = tempfile::tempdir().expect("a directory");
    let program = OsStr::new(env!("CARGO_BIN_EXE_mcwcfs"));
    let said = python("function_preserved.py", &[program, work.path().as_os_str()]);
    for family in ["bert", "gpt2", "gpt-neox", "opt", "llama-gqa", "llama-mqa", "mistral-gqa", "vit"] {
        assert!(said.contains(&format!("{family}: ")), "{family} did not run:\n{said}");
    }
}
