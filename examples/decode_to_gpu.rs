//! Decodes archives into the memory of a CUDA device, says how fast, and compares what lies there with the digests of the
//! index.
//!
//! ```sh
//! cargo run --release --example decode_to_gpu -- ARCHIVE...
//! ```
//!
//! One line of JSON per archive. `decode_gigabytes_per_second` is decoded bytes over the time of all launches of a model whose
//! stored bytes are on the device already, the fastest of five; `load` is reading, checking and copying those.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mcwcfs::archive::{Bases, Place};
use mcwcfs::decode::cuda::device::Device;
use mcwcfs::decode::cuda::{DeviceMemory, PinnedMemory, Stream};
use mcwcfs::gpu::{Gpu, Loaded};
use serde_json::json;
use sha2::{Digest, Sha256};

/// Copied for comparison.
const COPIED_BYTES: usize = 1 << 28;

fn main() -> Result<(), Box<dyn Error>> {
    let gpu = Gpu::open(0)?;
    let (to_device, to_host) = copy_rates(gpu.device())?;
    let mut differs = false;
    for path in std::env::args().skip(1) {
        let path = Path::new(&path);
        let archive = Bases::new(vec![Place::tree(path.parent().unwrap_or(Path::new(".")))]).open(path)?;
        let start = Instant::now();
        let loaded = gpu.load(&archive)?;
        let load_seconds = start.elapsed().as_secs_f64();
        let decode = || {
            let start = Instant::now();
            loaded.decode().map(|()| start.elapsed().as_secs_f64())
        };
        let seconds = (0..5).map(|_| decode()).collect::<Result<Vec<f64>, _>>()?;
        let decode_seconds = seconds.into_iter().fold(f64::INFINITY, f64::min);
        let is_equal = (0..archive.files().len())
            .map(|file| {
                Ok(digest(&loaded, &archive.files()[file].header, file)? == archive.files()[file].decoded_sha256)
            })
            .collect::<Result<Vec<bool>, Box<dyn Error>>>()?
            .into_iter()
            .all(|is_equal| is_equal);
        differs |= !is_equal;
        let report = json!({
            "archive": path.display().to_string(),
            "device": gpu.device().name(),
            "parameters": archive.parameters(),
            "stored_bytes": archive.stored_bytes(),
            "decoded_bytes": loaded.decoded_bytes(),
            "is_equal": is_equal,
            "load_seconds": load_seconds,
            "decode_seconds": decode_seconds,
            "decode_gigabytes_per_second": loaded.decoded_bytes() as f64 / decode_seconds / 1e9,
            "copy_to_device_gigabytes_per_second": to_device,
            "copy_to_host_gigabytes_per_second": to_host,
        });
        println!("{report}");
    }
    if differs { Err("the device has other weights than the archive".into()) } else { Ok(()) }
}

/// SHA-256 of a file as it lies on the device, with its header.
fn digest(loaded: &Loaded, header: &[u8], file: usize) -> Result<[u8; 32], Box<dyn Error>> {
    let mut digest = Sha256::new();
    digest.update(header);
    for tensor in 0..loaded.tensors(file) {
        let length = loaded.tensor(file, tensor).length_bytes as usize;
        digest.update(&loaded.read_back(file, tensor)?[..length]);
    }
    Ok(digest.finalize().into())
}

/// GB/s of copies from page-locked memory and to it, the fastest of five.
fn copy_rates(device: &Arc<dyn Device>) -> Result<(f64, f64), Box<dyn Error>> {
    let (stream, memory) = (Stream::new(device)?, DeviceMemory::new(device, COPIED_BYTES)?);
    let mut host = PinnedMemory::new(device, COPIED_BYTES)?;
    let (mut up, mut down) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..5 {
        let start = Instant::now();
        // SAFETY: both are as long, and nobody touches them before the stream is done.
        unsafe { device.upload(stream.number(), memory.address(), &host)? };
        stream.synchronize()?;
        up = up.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        // SAFETY: alike.
        unsafe { device.download(stream.number(), &mut host, memory.address())? };
        stream.synchronize()?;
        down = down.min(start.elapsed().as_secs_f64());
    }
    let rate = |seconds: f64| COPIED_BYTES as f64 / seconds / 1e9;
    Ok((rate(up), rate(down)))
}
