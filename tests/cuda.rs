//! The whole read path on a CUDA device that is emulated: golden archives, random ones, variants, damaged ones.
//!
//! What the kernels do to parts that no encoder would write, and what the host does when a device fails, is tested beside
//! them: `src/decode/cuda/tests.rs`.

mod common;
#[path = "common/emulated_gpu.rs"]
mod emulated_gpu;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::archives::{decode, open_with_bases};
use common::random_archives::{write_random_archive, write_random_variant};
use emulated_gpu::{EmulatedDevice, Fault, shared};
use mcwcfs::decode::cpu::CpuEngine;
use mcwcfs::decode::cuda::CudaEngine;
use mcwcfs::gpu::{Gpu, GpuError};
use mcwcfs::materialize::{EngineChoice, MaterializeOptions, Materializer};
use tempfile::TempDir;

/// Archives that every decoder must agree on: the golden ones, and random ones with every field of the format.
fn archives(scratch: &TempDir) -> Vec<PathBuf> {
    let golden = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")).expect("tests/golden");
    let golden = golden.map(|entry| entry.expect("an entry").path());
    let mut archives: Vec<PathBuf> =
        golden.filter(|path| path.extension().is_some_and(|name| name == "mcwc")).collect();
    for seed in 0..30 {
        let path = scratch.path().join(format!("random-{seed}.mcwc"));
        write_random_archive(seed, &path);
        archives.push(path);
    }
    archives.extend((0..20).map(|seed| write_random_variant(seed, scratch.path())));
    assert!(archives.len() > 60);
    archives
}

/// All files of an archive, through a materializer that decodes on a device.
fn read_on(engine: CudaEngine, path: &Path) -> Vec<Vec<u8>> {
    let archive = open_with_bases(path).expect("a sound archive");
    let options = MaterializeOptions { cache_bytes: 1 << 22, threads: 2, ..MaterializeOptions::default() };
    let materializer = Materializer::with_engine(options, Arc::new(engine));
    let read = |file: usize| {
        let mut bytes = vec![0; archive.files()[file].length_bytes as usize];
        materializer.read(&archive, file, 0, &mut bytes).expect("a sound archive");
        bytes
    };
    (0..archive.files().len()).map(read).collect()
}

fn engine_on(device: EmulatedDevice, memory_bytes: u64) -> CudaEngine {
    CudaEngine::new(Arc::new(device), memory_bytes, Arc::new(CpuEngine::portable())).expect("enough memory")
}

#[test]
fn archives_read_on_a_device_and_decoded_into_it_are_those_of_the_reference() {
    let scratch = tempfile::tempdir().expect("a directory");
    let mut launches = 0;
    for path in archives(&scratch) {
        let expected: Vec<Vec<u8>> =
            decode(&path, EngineChoice::Reference).into_iter().map(|(_, bytes)| bytes).collect();
        let (device, of_engine) = shared(EmulatedDevice::new(1 << 28));
        let engine = CudaEngine::new(of_engine, 1 << 28, Arc::new(CpuEngine::portable())).expect("enough memory");
        assert!(read_on(engine, &path) == expected, "{}: read", path.display());
        launches += device.launches();

        let archive = open_with_bases(&path).expect("a sound archive");
        let (_, device) = shared(EmulatedDevice::new(1 << 28));
        let loaded = Gpu::on(device).load(&archive).expect("a sound archive");
        for _ in 0..2 {
            loaded.decode().expect("a sound archive");
            for (file, (entry, expected)) in archive.files().iter().zip(&expected).enumerate() {
                for (tensor, info) in entry.tensors.iter().enumerate() {
                    let start = entry.header.len() + info.offset_bytes as usize;
                    let found = loaded.read_back(file, tensor).expect("decoded");
                    let length = info.length_bytes as usize;
                    let is_same = found[..length] == expected[start..start + length];
                    assert!(is_same, "{}: {} on the device", path.display(), info.name);
                }
            }
        }
    }
    assert!(launches > 300, "the device has decoded them: {launches}");
}

#[test]
fn damage_is_told_as_the_reference_tells_it_before_anything_is_decoded() {
    let scratch = tempfile::tempdir().expect("a directory");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1-lossy-predicted.mcwc");
    let sound = fs::read(golden).expect("a golden archive");
    let path = scratch.path().join("damaged.mcwc");
    let mut errors = 0;
    for place in (64..sound.len()).step_by(sound.len() / 40) {
        let mut bytes = sound.clone();
        bytes[place] ^= 1;
        fs::write(&path, &bytes).expect("a file");
        let Ok(archive) = open_with_bases(&path) else { continue };
        let read = |materializer: Materializer| {
            let mut bytes = vec![0; archive.files()[0].length_bytes as usize];
            materializer.read(&archive, 0, 0, &mut bytes).map(|_| bytes).map_err(|error| error.to_string())
        };
        let options = MaterializeOptions { engine: EngineChoice::Reference, threads: 1, ..Default::default() };
        let expected = read(Materializer::new(options)).expect_err("every bit has a checksum");
        let engine = Arc::new(engine_on(EmulatedDevice::new(1 << 28), 1 << 28));
        assert_eq!(read(Materializer::with_engine(options, engine)), Err(expected), "at {place}");
        let gpu = Gpu::on(Arc::new(EmulatedDevice::new(1 << 28)));
        assert!(matches!(gpu.load(&archive), Err(GpuError::Archive(_))), "at {place}");
        errors += 1;
    }
    assert!(errors > 20, "{errors} of 40 places are not in the index");
}

#[test]
fn a_device_lost_while_an_archive_is_read_loses_no_byte_of_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1-lossy-predicted.mcwc");
    let expected: Vec<Vec<u8>> = decode(&path, EngineChoice::Reference).into_iter().map(|(_, bytes)| bytes).collect();
    for call in [10, 20, 40] {
        let engine = engine_on(EmulatedDevice::failing_at(call, Fault::Lost), 1 << 28);
        assert!(read_on(engine, &path) == expected, "at call {call}");
    }
}

#[test]
fn a_device_that_fails_or_has_no_memory_is_an_error_of_a_program_that_decodes_into_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1-lossy-predicted.mcwc");
    let archive = open_with_bases(&path).expect("a sound archive");
    let (device, gpu) = shared(EmulatedDevice::new(1 << 28));
    Gpu::on(gpu).load(&archive).and_then(|loaded| loaded.decode()).expect("a sound archive");
    for fault in [Fault::Lost, Fault::Memory] {
        let mut failed = 0;
        for call in 0..device.calls() {
            let gpu = Gpu::on(Arc::new(EmulatedDevice::failing_at(call, fault)));
            match gpu.load(&archive).and_then(|loaded| loaded.decode()) {
                Ok(()) => {}
                Err(GpuError::Device(_)) => failed += 1,
                Err(error) => panic!("{fault:?} at {call}: {error}"),
            }
        }
        assert!(failed > 3, "{fault:?}: {failed}");
    }
}
