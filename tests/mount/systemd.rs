//! The unit and the helper of mount(8) in `systemd/`, as they are installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::Bert;
use crate::place::Place;
use crate::support::require_fuse;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

#[test]
fn the_unit_is_one_that_systemd_accepts() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("not tested: systemd-analyze is missing here, tests/setup installs it");
        return;
    }
    // systemd looks whether the program is there.
    let program = env!("CARGO_BIN_EXE_mcwcfs");
    let unit = fs::read_to_string(file("mcwcfs@.service")).unwrap().replace("/usr/local/bin/mcwcfs", program);
    let directory = tempfile::tempdir().unwrap();
    let verify = |unit: &str| {
        let path = directory.path().join("mcwcfs@models.service");
        fs::write(&path, unit).unwrap();
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().unwrap()
    };
    let output = verify(&unit);
    let said = String::from_utf8_lossy(&output.stderr);
    let about_ours: Vec<&str> = said.lines().filter(|line| line.contains("mcwcfs")).collect();
    assert!(output.status.success() && about_ours.is_empty(), "{said}");
    let broken = verify(&unit.replace("Type=notify", "Type=notfy"));
    assert!(String::from_utf8_lossy(&broken.stderr).contains("notfy"), "it would have said so");
}

#[test]
fn the_units_command_line_and_environment_fit_the_program() {
    require_fuse!();
    let place = Place::new();
    let unit = fs::read_to_string(file("mcwcfs@.service")).unwrap();
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/mcwcfs ")).unwrap();
    let example = fs::read_to_string(file("mcwcfs.conf")).unwrap();
    let variable = |name: &str| {
        let value = example.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("{name} is not in the example")).to_owned()
    };
    assert!(variable("SOURCE").starts_with('/') && variable("MOUNTPOINT").starts_with('/'));
    let mut arguments = Vec::new();
    for word in command.split(' ') {
        match word {
            "$OPTIONS" => arguments.extend(variable("OPTIONS").split(' ').map(|word| word.replace("9464", "0"))),
            "${SOURCE}" => arguments.push(place.source().display().to_string()),
            "${MOUNTPOINT}" => arguments.push(place.mountpoint().display().to_string()),
            "--foreground" => {} // the test wants to know when it is mounted
            word => arguments.push(word.to_owned()),
        }
    }
    let output = Command::new(env!("CARGO_BIN_EXE_mcwcfs")).args(arguments).arg("--log-file").arg(place.log()).output();
    assert!(output.unwrap().status.success());
    assert!(place.mounted("weights.bin").exists());
}

/// Run by root in a mount namespace of its own, where the helper lies in the place in which mount(8) looks for it, and the
/// program where the helper does.
const BY_MOUNT: &str = r#"
mount -t tmpfs tmpfs /usr/sbin
cp "$HELPER" /usr/sbin/mount.mcwcfs
mount -t tmpfs tmpfs /usr/local/bin
cp "$PROGRAM" /usr/local/bin/mcwcfs
trap 'umount -l "$PLACE/mnt" 2>/dev/null || true' EXIT
check() {
    cmp "$PLACE/original/bert/model.safetensors" "$PLACE/mnt/bert/model.safetensors"
    grep -q " $PLACE/mnt fuse.mcwcfs ro," /proc/mounts
    umount "$PLACE/mnt"
}
mount -t mcwcfs "$PLACE/source" "$PLACE/mnt" -o "file_mode=0400,cache_size=64M,log_file=$PLACE/log"
test "$(stat -c %a "$PLACE/mnt/weights.bin")" = 400
check
echo "$PLACE/source $PLACE/mnt mcwcfs nofail,x-systemd.automount,log_file=$PLACE/log 0 0" >"$PLACE/fstab"
mount -T "$PLACE/fstab" "$PLACE/mnt"
check
mount --fake -t mcwcfs "$PLACE/source" "$PLACE/mnt"
test -z "$(ls "$PLACE/mnt")"
if mount -t mcwcfs "$PLACE/source" "$PLACE/mnt" -o frobnicate; then exit 1; fi
"#;

#[test]
fn mount_and_fstab_know_the_type_by_its_helper() {
    require_fuse!();
    // SAFETY: the call has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("not tested: needs root to install the helper where nobody else sees it");
        return;
    }
    let place = Place::new();
    place.pack("bert", &Bert::default());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-eu", "-c", BY_MOUNT]).env("PLACE", place.path().canonicalize().unwrap());
    let output =
        command.env("PROGRAM", env!("CARGO_BIN_EXE_mcwcfs")).env("HELPER", file("mount.mcwcfs")).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("-o frobnicate"), "{message}");
}
