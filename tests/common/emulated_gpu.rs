//! A device that is this CPU: the kernels' own source, compiled as C++, with every lane of a warp a fiber.
//!
//! It is as unhelpful as a device may be: fresh memory holds rubbish, nothing is copied or launched before somebody waits for
//! the stream, and memory is looked at for writes behind its end when it is given back. It can be told to fail.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use mcwcfs::decode::cuda::device::{Device, DeviceError, Kernel, Launch};
use sha2::{Digest, Sha256};

/// What lies behind every allocation.
const GUARD: [u8; 64] = [0xa5; 64];

type DecodeStrips = unsafe extern "C" fn(*const c_void, u32, *mut c_void);

/// How a device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// From some call on it does nothing any more.
    Lost,
    /// It has no memory for anybody new.
    Memory,
}

#[derive(Debug)]
enum Work {
    Copy { from: usize, to: usize, bytes: usize },
    Launch(Launch),
}

/// The device.
#[derive(Debug)]
pub struct EmulatedDevice {
    kernels: [DecodeStrips; Kernel::ALL.len()],
    total_bytes: u64,
    fault: Option<(usize, Fault)>,
    calls: AtomicUsize,
    allocated: Mutex<HashMap<u64, usize>>,
    /// What streams have been given.
    streams: Mutex<HashMap<usize, Vec<Work>>>,
    next_stream: AtomicUsize,
    launches: AtomicUsize,
}

impl EmulatedDevice {
    /// A device with so much memory.
    pub fn new(total_bytes: u64) -> Self {
        Self {
            kernels: *kernels(),
            total_bytes,
            fault: None,
            calls: AtomicUsize::new(0),
            allocated: Mutex::default(),
            streams: Mutex::default(),
            next_stream: AtomicUsize::new(1),
            launches: AtomicUsize::new(0),
        }
    }

    /// One that fails at call number `call` of those that may fail, and at all after it.
    pub fn failing_at(call: usize, fault: Fault) -> Self {
        let mut device = Self::new(1 << 30);
        device.fault = Some((call, fault));
        device
    }

    /// Allocations that nobody has given back, and streams that nobody has ended.
    pub fn held(&self) -> usize {
        self.allocated.lock().unwrap().len() + self.streams.lock().unwrap().len()
    }

    /// How often kernels were launched.
    pub fn launches(&self) -> usize {
        self.launches.load(Ordering::Relaxed)
    }

    /// How many calls there were that may fail.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    fn call(&self, operation: &'static str, allocates: Option<usize>) -> Result<(), DeviceError> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Some((first, Fault::Lost)) if call >= first => {
                Err(DeviceError::Failed { device: "emulated".into(), operation, reason: "made to fail".into() })
            }
            Some((first, Fault::Memory)) if call >= first && allocates.is_some() => {
                Err(DeviceError::Memory { device: "emulated".into(), bytes: allocates.unwrap_or(0) })
            }
            _ => Ok(()),
        }
    }

    fn give_memory(&self, bytes: usize, filling: u8) -> Result<NonNull<u8>, DeviceError> {
        self.call("allocating", Some(bytes))?;
        let memory = vec![filling; bytes + GUARD.len() + 256].leak();
        let start = memory.as_ptr().align_offset(256);
        memory[start + bytes..start + bytes + GUARD.len()].copy_from_slice(&GUARD);
        let pointer = NonNull::from(&mut memory[start]);
        // The boxed slice is found again by where it begins.
        self.allocated.lock().unwrap().insert(pointer.as_ptr() as u64, start);
        Ok(pointer)
    }

    /// # Safety
    /// It was given so, for as many bytes.
    unsafe fn take_memory_back(&self, pointer: *mut u8, bytes: usize) {
        let start = self.allocated.lock().unwrap().remove(&(pointer as u64)).expect("allocated here");
        // SAFETY: `give_memory` leaked exactly this.
        let memory =
            unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(pointer.sub(start), bytes + GUARD.len() + 256)) };
        assert_eq!(memory[start + bytes..][..GUARD.len()], GUARD, "nobody writes behind memory");
    }

    fn give(&self, stream: usize, work: Work) {
        self.streams.lock().unwrap().get_mut(&stream).expect("a stream of this device").push(work);
    }
}

impl Drop for EmulatedDevice {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.held(), 0, "everything has been given back");
        }
    }
}

impl Device for EmulatedDevice {
    fn name(&self) -> &str {
        "emulated"
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        self.call("free memory", None)?;
        Ok(self.total_bytes)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.give_memory(bytes, 0xcd).map(|pointer| pointer.as_ptr() as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.take_memory_back(address as *mut u8, bytes) };
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError> {
        self.give_memory(bytes, 0)
    }

    unsafe fn free_pinned(&self, pointer: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.take_memory_back(pointer.as_ptr(), bytes) };
    }

    fn new_stream(&self) -> Result<usize, DeviceError> {
        self.call("new stream", None)?;
        let number = self.next_stream.fetch_add(1, Ordering::Relaxed);
        self.streams.lock().unwrap().insert(number, Vec::new());
        Ok(number)
    }

    unsafe fn end_stream(&self, stream: usize) {
        self.streams.lock().unwrap().remove(&stream).expect("a stream of this device");
    }

    unsafe fn upload(&self, stream: usize, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        self.call("copying to the device", None)?;
        self.give(stream, Work::Copy { from: from.as_ptr() as usize, to: to as usize, bytes: from.len() });
        Ok(())
    }

    unsafe fn download(&self, stream: usize, to: &mut [u8], from: u64) -> Result<(), DeviceError> {
        self.call("copying from the device", None)?;
        self.give(stream, Work::Copy { from: from as usize, to: to.as_mut_ptr() as usize, bytes: to.len() });
        Ok(())
    }

    unsafe fn launch(&self, stream: usize, launch: Launch) -> Result<(), DeviceError> {
        self.call("launching", None)?;
        self.launches.fetch_add(1, Ordering::Relaxed);
        self.give(stream, Work::Launch(launch));
        Ok(())
    }

    fn synchronize(&self, stream: usize) -> Result<(), DeviceError> {
        let work = std::mem::take(self.streams.lock().unwrap().get_mut(&stream).expect("a stream of this device"));
        self.call("decoding", None)?; // what a lost device was given it never does
        for work in work {
            match work {
                // SAFETY: whoever gave it has promised that both are there until now.
                Work::Copy { from, to, bytes } => unsafe {
                    std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes);
                },
                // SAFETY: alike.
                Work::Launch(Launch { kernel, strips, count, statuses }) => unsafe {
                    self.kernels[kernel as usize](strips as *const c_void, count, statuses as *mut c_void);
                },
            }
        }
        Ok(())
    }
}

/// The kernels, compiled once per change of their source.
fn kernels() -> &'static [DecodeStrips; Kernel::ALL.len()] {
    static KERNELS: OnceLock<[DecodeStrips; Kernel::ALL.len()]> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let library = CString::new(compiled().to_str().expect("a path of text")).expect("no NUL");
        // SAFETY: a library without initializers.
        let library = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null(), "the compiled kernels load");
        Kernel::ALL.map(|kernel| {
            let name = CString::new(kernel.name()).expect("no NUL");
            // SAFETY: the library is open, and stays so.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            assert!(!symbol.is_null(), "{} is there", kernel.name());
            // SAFETY: `decode.cu` says that it is such a function.
            unsafe { std::mem::transmute::<*mut c_void, DecodeStrips>(symbol) }
        })
    })
}

/// Where the kernels' source is.
pub fn kernel_source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/decode/cuda/kernel")
}

/// SHA-256 of the kernels' source: of every file's name and content, in the order of names.
pub fn source_digest() -> String {
    let entries = std::fs::read_dir(kernel_source()).expect("the kernels' source");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "h" || extension == "cu"));
    files.sort();
    let mut digest = Sha256::new();
    for file in files {
        digest.update(file.file_name().expect("a file").as_encoded_bytes());
        digest.update(b"\n");
        digest.update(std::fs::read(&file).expect("a file of the source"));
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A library of the kernels for this CPU, beside the test that needs it.
fn compiled() -> PathBuf {
    let program = std::env::current_exe().expect("this test's path");
    let directory = program.parent().expect("in a directory");
    let library = directory.join(format!("emulated-{}.so", &source_digest()[..16]));
    if !library.exists() {
        let scratch = tempfile::tempdir_in(directory).expect("a directory");
        let made = scratch.path().join("emulated.so");
        let compiler = Command::new("c++")
            .args(["-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"])
            .args(["-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-x", "c++"]) // it minds jumps between stacks
            .arg(kernel_source().join("decode.cu"))
            .arg("-o")
            .arg(&made)
            .status()
            .expect("c++, which links Rust programs, is there");
        assert!(compiler.success(), "the kernels compile as C++");
        std::fs::rename(&made, &library).expect("the same file system");
    }
    library
}

/// A device as engines take it, and to ask afterwards.
pub fn shared(device: EmulatedDevice) -> (Arc<EmulatedDevice>, Arc<dyn Device>) {
    let device = Arc::new(device);
    (Arc::clone(&device), device)
}
