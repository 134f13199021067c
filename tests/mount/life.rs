//! The source changes under a mount, and the mount tells how it is.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Bert, Random};
use crate::place::{GENEROUS, Place, assert_fails, kill};
use crate::support::{names, require_fuse};

const MODEL: &str = "bert/model.safetensors";

/// Waits until something is so that is about to be.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < GENEROUS, "not yet: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn bert(seed: u64) -> Bert {
    Bert { seed, ..Bert::default() }
}

#[test]
fn archives_that_come_change_and_go_are_seen_without_a_remount_and_without_a_signal() {
    require_fuse!();
    let place = Place::new();
    let first = place.pack("bert", &bert(1));
    assert!(place.mount(&["--rescan", "1"]).status.success());
    // All of this the kernel remembers for a day, unless it is told otherwise.
    assert_eq!(names(&place.mounted("")), ["bert", "weights.bin"]);
    assert!(!place.mounted("new").exists() && !place.mounted("new/model.safetensors").exists());
    assert!(fs::read(place.mounted(MODEL)).unwrap() == first);
    let open = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(place.mounted(MODEL)).unwrap();

    let new = place.pack("new", &bert(2));
    until("a new archive appears", || fs::read(place.mounted("new/model.safetensors")).is_ok_and(|bytes| bytes == new));
    assert_eq!(names(&place.mounted("")), ["bert", "new", "weights.bin"]);

    let second = place.pack("bert", &bert(3));
    assert!(first != second && first.len() == second.len());
    until("a changed archive changes", || fs::read(place.mounted(MODEL)).unwrap() == second);
    let mut out = vec![0; first.len()];
    open.read_exact_at(&mut out, 0).unwrap();
    assert!(out == first, "who has it open keeps its bytes");

    fs::remove_dir_all(place.source().join("new")).unwrap();
    until("a removed archive vanishes", || !place.mounted("new").exists());
    assert_eq!(names(&place.mounted("")), ["bert", "weights.bin"]);
}

#[test]
fn a_replaced_archive_is_closed_when_nobody_has_its_file_open() {
    require_fuse!();
    let place = Place::new();
    place.pack("bert", &bert(1));
    assert!(place.mount(&["--rescan", "1"]).status.success());
    let holds_deleted = || {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", place.status().worker_pid)).unwrap();
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        targets.filter(|target| target.to_string_lossy().ends_with("model.mcwc (deleted)")).count()
    };
    let open = File::open(place.mounted(MODEL)).unwrap();
    place.pack("bert", &bert(2));
    until("the old archive is held for its reader", || holds_deleted() == 1);
    drop(open);
    until("the old archive is let go of", || {
        // The kernel keeps what nobody has open until it wants the memory.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap_or(());
        holds_deleted() == 0
    });
}

#[test]
fn a_signal_lists_the_source_at_once() {
    require_fuse!();
    let place = Place::new();
    assert!(place.mount(&["--rescan", "0"]).status.success());
    kill(place.daemon(), libc::SIGHUP);
    place.until_logged("source listed again: nothing changed");
    let bytes = place.pack("bert", &bert(1));
    assert!(!place.mounted(MODEL).exists());
    kill(place.daemon(), libc::SIGHUP);
    until("the new archive appears", || fs::read(place.mounted(MODEL)).is_ok_and(|shown| shown == bytes));
    place.until_logged("source changed: ");
}

#[test]
fn a_broken_archive_never_touches_another_and_mends_when_it_is_replaced() {
    require_fuse!();
    let place = Place::new();
    let sound = place.pack("sound", &bert(1));
    assert!(place.mount(&["--rescan", "1"]).status.success());
    fs::write(place.source().join("bert/model.mcwc"), Random::new(1).bytes(100_000)).unwrap();
    place.until_logged("archive refused: bert/model.mcwc");
    assert!(fs::read(place.mounted("sound/model.safetensors")).unwrap() == sound);
    assert_eq!(fs::read(place.mounted("bert/config.json")).unwrap(), b"{}");
    assert_eq!(place.status().metrics["mcwcfs_refused_archives"], 1);
    let mended = place.pack("bert", &bert(2));
    until("the archive is shown", || fs::read(place.mounted(MODEL)).is_ok_and(|bytes| bytes == mended));
    let log = fs::read_to_string(place.log()).unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("archive refused")).count(), 1, "{log}");
}

#[test]
fn a_source_that_vanishes_is_shown_as_it_was() {
    require_fuse!();
    let place = Place::new();
    let bytes = place.pack("bert", &bert(1));
    assert!(place.mount(&["--rescan", "0"]).status.success());
    let away = place.path().join("away");
    fs::rename(place.source(), &away).unwrap();
    kill(place.daemon(), libc::SIGHUP);
    place.until_logged("source not listed again");
    assert!(fs::read(place.mounted(MODEL)).unwrap() == bytes);
    fs::rename(&away, place.source()).unwrap();
}

#[test]
fn the_service_manager_hears_of_readiness_and_of_the_end() {
    require_fuse!();
    let place = Place::new();
    let address = place.path().join("notify");
    let socket = UnixDatagram::bind(&address).unwrap();
    socket.set_read_timeout(Some(GENEROUS)).unwrap();
    let hear = || {
        let mut text = [0; 4096];
        let length = socket.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    let mut command = place.command(&["--foreground"]);
    let mut child = command.env("NOTIFY_SOCKET", &address).stderr(Stdio::null()).spawn().unwrap();
    let ready = hear();
    assert!(
        ready.contains("READY=1") && ready.contains("STATUS=serving /") && ready.contains(": archives 0, refused 0"),
        "{ready}"
    );
    assert!(place.mounted("weights.bin").exists(), "it was ready when it said so");
    kill(place.status().worker_pid as i32, libc::SIGKILL);
    let restarted = hear();
    assert!(restarted.contains("1 restarts"), "{restarted}");
    kill(child.id() as i32, libc::SIGTERM);
    assert!(hear().contains("STOPPING=1"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn status_tells_what_was_read() {
    require_fuse!();
    let place = Place::new();
    let bytes = place.pack("bert", &bert(1));
    place.pack("other", &bert(2));
    assert!(place.mount(&[]).status.success());
    assert!(fs::read(place.mounted(MODEL)).unwrap() == bytes);
    let status = place.status();
    assert_eq!((status.archive_count, status.archives.len()), (2, 2));
    let read = &status.archives[0];
    assert_eq!((read.path.as_str(), read.opens, read.length_bytes), ("bert/model.mcwc", 1, bytes.len() as u64));
    assert_eq!(read.read_share, 1.0);
    assert_eq!(status.archives[1].read_bytes, 0);
    assert_eq!(Path::new(&status.source), place.source().canonicalize().unwrap());
    let output = place.mcwcfs("status");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("bert/model.mcwc"), "{said}");
    let json = place.mcwcfs_with("status", &["--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["archives"][0]["path"], "bert/model.mcwc");
    assert!(place.umount(&[]).status.success());
    assert_fails(&place.mcwcfs("status"), 32, &["not a mount of mcwcfs"]);
}

#[test]
fn a_load_has_three_lines_in_the_log_however_many_requests_it_takes() {
    require_fuse!();
    let place = Place::new();
    let bytes = place.pack("bert", &bert(1));
    assert!(place.mount(&[]).status.success());
    let lines = |text: &str| {
        let log = fs::read_to_string(place.log()).unwrap();
        log.lines().filter(|line| line.contains(text)).count()
    };
    let file = File::open(place.mounted(MODEL)).unwrap();
    drop(file);
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(place.mounted(MODEL)).unwrap();
    assert_eq!((lines("open: bert"), lines("first byte")), (0, 0), "nobody has asked for anything");
    let mut page = vec![0; 4096];
    for from in (0..bytes.len()).step_by(page.len()) {
        assert!(direct.read_at(&mut page, from as u64).unwrap() > 0);
    }
    let open = place.until_logged("open: bert/model.safetensors");
    assert!(open.ends_with(&format!(", {} bytes", bytes.len())), "{open}");
    let first = place.until_logged("first byte: bert/model.safetensors");
    assert!(first.contains(" ms after open, of "), "{first}");
    let loaded = place.until_logged("loaded: bert/model.safetensors");
    assert!(loaded.contains(&format!(", {} bytes in ", bytes.len())) && loaded.contains("GB/s"), "{loaded}");
    assert!(loaded.ends_with("% decoded") && !loaded.contains(", 0 %"), "{loaded}");
    drop(direct);
    assert_eq!((lines("open: bert"), lines("first byte"), lines("loaded: "), lines("closed")), (1, 1, 1, 0));

    let other = place.pack("other", &Bert { layers: 8, hidden: 128, ffn_units: 512, ..bert(2) });
    assert!(other.len() > 2 << 20);
    kill(place.daemon(), libc::SIGHUP);
    until("the new archive appears", || place.mounted("other/model.safetensors").exists());
    let path = place.mounted("other/model.safetensors");
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
    assert!(direct.read_at(&mut page, 100_000).unwrap() > 0);
    drop(direct);
    let closed = place.until_logged("closed before all was read: other/model.safetensors");
    assert!(closed.contains(", 4096 bytes in "), "{closed}");
}

/// The port on which a mount serves its metrics.
fn metrics_port(place: &Place) -> u16 {
    let line = place.until_logged("metrics: http://127.0.0.1:");
    line.rsplit_once(':').unwrap().1.trim_end_matches('/').parse().unwrap()
}

#[test]
fn the_status_page_draws_a_mount_in_a_browser() {
    require_fuse!();
    let place = Place::new();
    let bytes = place.pack("bert", &bert(1));
    // What a browser would take for markup must stay a name.
    let hostile = "<img src=x onerror=document.title='taken'>";
    place.pack(hostile, &bert(2));
    assert!(place.mount(&["--metrics", "0"]).status.success());
    assert!(fs::read(place.mounted(MODEL)).unwrap() == bytes);
    assert!(!fs::read(place.mounted(hostile).join("model.safetensors")).unwrap().is_empty());
    let mut browser = Command::new("chromium");
    browser.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]);
    browser.arg(format!("--user-data-dir={}", place.path().join("browser").display()));
    let Ok(output) = browser.arg(format!("http://127.0.0.1:{}/", metrics_port(&place))).output() else {
        eprintln!("not tested: no chromium here");
        return;
    };
    let page = String::from_utf8_lossy(&output.stdout);
    assert!(page.contains("<td>bert/model.mcwc</td>") && page.contains("<td>100 %</td>"), "{page}");
    assert!(page.contains("points=\"") && page.contains("<title>mcwcfs</title>"), "{page}");
    assert!(page.contains("&lt;img src=x onerror"), "{page}");
}

#[test]
fn metrics_are_served_and_survive_the_worker() {
    require_fuse!();
    let place = Place::new();
    let bytes = place.pack("bert", &bert(1));
    assert!(place.mount(&["--metrics", "0"]).status.success());
    let port = metrics_port(&place);
    let get = |path: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    };
    assert!(fs::read(place.mounted(MODEL)).unwrap() == bytes);
    let metrics = get("/metrics").unwrap();
    assert!(metrics.contains("\nmcwcfs_archives 1\n") && metrics.contains("\nmcwcfs_worker_restarts 0\n"), "{metrics}");
    assert!(metrics.contains("\nmcwcfs_opens_total 1\n"), "{metrics}");
    kill(place.status().worker_pid as i32, libc::SIGKILL);
    // A connection that the dying worker had accepted is reset; the address itself stays.
    until("the next worker answers", || {
        get("/metrics").is_ok_and(|text| text.contains("\nmcwcfs_worker_restarts 1\n"))
    });
    let page = get("/").unwrap();
    assert!(page.contains("<title>mcwcfs"), "{page}");
}
