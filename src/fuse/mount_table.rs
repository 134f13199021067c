//! What is mounted where, from `/proc/self/mountinfo`: asking the mount itself could wait for a daemon that hangs.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::SUBTYPE;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// `major:minor`, which names the mount's own directory in `/sys/class/bdi`.
    pub device: String,
    /// File system type, for example `fuse.mcwcfs`.
    pub kind: String,
    /// What was mounted.
    pub source: String,
}

impl MountEntry {
    /// Whether this program mounted it.
    pub fn is_ours(&self) -> bool {
        self.kind == format!("fuse.{SUBTYPE}")
    }
}

/// The topmost mount at exactly `mountpoint`, an absolute path without symbolic links; `None` if none is there.
pub fn mount_at(mountpoint: &Path) -> Option<MountEntry> {
    let table = fs::read("/proc/self/mountinfo").ok()?;
    table.split(|&byte| byte == b'\n').filter_map(parse).rfind(|entry| entry.mountpoint == mountpoint)
}

/// Whether `mountpoint` is a FUSE mount whose daemon is gone.
///
/// Asks for totals, because the kernel asks the daemon for them each time; the root's attributes it may still know.
pub fn is_dead(mountpoint: &Path) -> bool {
    let Ok(path) = CString::new(mountpoint.as_os_str().as_bytes()) else { return false };
    let mut totals = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is a C string, and `totals` has room for the answer, which is not read.
    let result = unsafe { libc::statvfs(path.as_ptr(), totals.as_mut_ptr()) };
    result != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOTCONN)
}

/// `36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw`: optional fields end at the dash.
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = text(fields.nth(2)?);
    let mountpoint = unescape(fields.nth(1)?).into();
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    Some(MountEntry { mountpoint, device, kind: text(fields.next()?), source: text(fields.next()?) })
}

fn text(field: &[u8]) -> String {
    unescape(field).to_string_lossy().into_owned()
}

/// The kernel writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read_by_its_dash() {
        for optional in ["", "shared:1 ", "shared:1 master:2 "] {
            let line = format!(r"36 35 0:52 / /mnt/a\040b\134 ro,noatime {optional}- fuse.mcwcfs my\040models ro");
            let entry = parse(line.as_bytes()).unwrap();
            assert_eq!(entry.mountpoint, Path::new(r"/mnt/a b\"));
            assert_eq!((entry.device.as_str(), entry.source.as_str()), ("0:52", "my models"));
            assert!(entry.is_ours());
        }
    }

    #[test]
    fn a_line_cut_anywhere_is_no_mount_and_no_panic() {
        let line = br"36 35 0:52 / /mnt/a\040b ro - ext4 /dev/sda ro";
        for length in 0..line.len() {
            let _ = parse(&line[..length]);
        }
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn the_root_is_mounted_and_a_missing_path_is_neither_mounted_nor_dead() {
        assert!(mount_at(Path::new("/")).is_some());
        assert!(mount_at(Path::new("/no/such/path")).is_none());
        assert!(!is_dead(Path::new("/no/such/path")));
    }
}
