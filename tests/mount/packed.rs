//! Checkpoints packed by the program and mounted by it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::common::{Bert, Tensor, mcwcfs_ok, safetensors};

pub const MODEL: &str = "model.safetensors";

/// A checkpoint, what it was packed into, and what is mounted of that.
pub struct Packed {
    directory: tempfile::TempDir,
}

impl Packed {
    /// A small BERT with its sidecars, packed with `options`.
    pub fn bert(options: &[&str]) -> Self {
        let packed = Self::empty();
        Bert { hidden: 64, ffn_units: 256, ..Bert::default() }.write(&packed.original());
        packed.pack(options);
        packed
    }

    /// Room for a checkpoint and what becomes of it.
    pub fn empty() -> Self {
        let packed = Self { directory: tempfile::tempdir().unwrap() };
        fs::create_dir(packed.path("mnt")).unwrap();
        fs::create_dir_all(packed.original()).unwrap();
        packed
    }

    /// One tensor per entry, packed with `options`.
    pub fn tensors(tensors: &[Tensor], options: &[&str]) -> Self {
        let packed = Self::empty();
        fs::write(packed.original().join(MODEL), safetensors(tensors)).unwrap();
        packed.pack(options);
        packed
    }

    pub fn pack(&self, options: &[&str]) {
        fs::create_dir_all(self.path("packed")).unwrap();
        let paths = [self.original(), self.path("packed/bert")];
        let options = options.iter().map(|option| (*option).into());
        mcwcfs_ok(["pack".into()].into_iter().chain(paths.map(PathBuf::into_os_string)).chain(options));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn original(&self) -> PathBuf {
        self.path("original")
    }

    pub fn archive(&self) -> PathBuf {
        self.path("packed/bert/model.mcwc")
    }

    /// The mounted checkpoint directory.
    pub fn mounted(&self) -> PathBuf {
        self.path("mnt/bert")
    }

    pub fn mount(&self, options: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
        command.arg("mount").args([self.path("packed"), self.path("mnt")]).args(options);
        let output = command.arg("--log-file").arg(self.path("log")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn umount(&self) {
        mcwcfs_ok(["umount".into(), self.path("mnt").into_os_string()]);
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// The mounted model.
    pub fn model(&self) -> PathBuf {
        self.mounted().join(MODEL)
    }

    /// What the mount must show of the model.
    pub fn expected(&self, is_lossy: bool) -> Vec<u8> {
        if !is_lossy {
            return fs::read(self.original().join(MODEL)).unwrap();
        }
        let unpacked = self.path("unpacked");
        mcwcfs_ok(["unpack".into(), self.path("packed/bert").into_os_string(), unpacked.clone().into_os_string()]);
        fs::read(unpacked.join(MODEL)).unwrap()
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        while mcwcfs::fuse::mount_at(&self.path("mnt")).is_some()
            && mcwcfs::fuse::unmount(&self.path("mnt"), true).is_ok()
        {}
    }
}
