//! Archives from bytes in memory.

use std::cell::RefCell;
use std::io::{Seek, Write};
use std::path::Path;

use mcwcfs::archive::Archive;
use tempfile::NamedTempFile;

/// Opens bytes in memory: archives are opened by path.
pub fn open(bytes: &[u8]) -> Option<Archive> {
    thread_local! {
        static FILE: RefCell<NamedTempFile> = RefCell::new(scratch_file());
    }
    FILE.with_borrow_mut(|file| {
        let io = "the scratch file can be written";
        file.as_file().set_len(0).expect(io);
        file.rewind().expect(io);
        file.write_all(bytes).expect(io);
        file.flush().expect(io);
        Archive::open(file.path()).ok()
    })
}

fn scratch_file() -> NamedTempFile {
    let in_memory = Path::new("/dev/shm");
    if in_memory.is_dir() { NamedTempFile::new_in(in_memory) } else { NamedTempFile::new() }.expect("a scratch file")
}
