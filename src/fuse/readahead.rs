//! Readahead of the mount: the one setting the kernel takes from sysfs only.
//!
//! FUSE caps what a daemon may ask for at 128 KiB. Written to sysfs after the mount, 1 MiB doubles the speed of a cold
//! load; 4 MiB is best for whole models and wasteful for slices.

use std::fs;
use std::io;
use std::path::Path;

use log::{debug, info};

use super::mount_at;

/// Sets how far the kernel reads ahead below `mountpoint`, in KiB. Needs root; where it is refused the mount works on at
/// the kernel's default, and one log line says so.
pub fn set_readahead(mountpoint: &Path, kib: u32) {
    match write(mountpoint, kib) {
        Ok(()) => debug!("readahead: {kib} KiB"),
        Err(error) => info!("readahead left at the kernel's 128 KiB, cold loads will be slower: {error}"),
    }
}

fn write(mountpoint: &Path, kib: u32) -> io::Result<()> {
    let entry = mount_at(mountpoint).ok_or_else(|| io::Error::other("the mount is not in the table of mounts"))?;
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", entry.device);
    fs::write(&path, kib.to_string()).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}
