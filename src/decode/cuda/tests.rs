//! The kernels give the reference decoder's bytes and errors, and the host copes with every device.

#[path = "../../../tests/common/emulated_gpu.rs"]
mod emulated_gpu;

use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;

use self::emulated_gpu::{EmulatedDevice, Fault, kernel_source, shared, source_digest};
use super::batch::supports;
use super::device::{DeviceError, Kernel};
use super::{CudaDevice, CudaEngine, PTX};
use crate::decode::cpu::CpuEngine;
use crate::decode::random_parts::{ConcatAll, Kind, Predicted, Recipe, decode_each, decode_together, recipes};
use crate::decode::reference::ReferenceEngine;
use crate::decode::{DecodeError, Engine, PreparedPart, StripJob};
use crate::format::part::{Carrier, StoredTrellis, TrellisTables};
use crate::tensor::Dtype;

const PLENTY: u64 = 1 << 28;

/// Decodes nothing: what comes here should have been decoded by the device.
#[derive(Debug)]
struct NoCpu;

impl Engine for NoCpu {
    fn name(&self) -> &'static str {
        "none"
    }

    fn decode_strips(&self, _: &PreparedPart, _: Option<&[u8]>, _: &mut [StripJob<'_>]) -> Result<(), DecodeError> {
        panic!("the device decodes this")
    }
}

fn portable() -> Arc<dyn Engine> {
    Arc::new(CpuEngine::portable())
}

fn emulated(memory_bytes: u64) -> CudaEngine {
    let (_, device) = shared(EmulatedDevice::new(memory_bytes));
    CudaEngine::new(device, memory_bytes, Arc::new(NoCpu)).expect("enough memory")
}

/// A predicted part with motion along its columns, several strips long.
fn predicted() -> Recipe {
    let trellis = Some(StoredTrellis { tables: TrellisTables::Pairs, state_bits: 3 });
    Recipe {
        dtype: Dtype::BF16,
        coding: Kind::Quantized {
            raw_bits: 0,
            trellis,
            prediction: Some(Predicted::Affine),
            motion_axis: Some(1),
            sides: true,
            has_column_scales: true,
        },
        rows: 39,
        columns: 256,
        run_elements: None,
        runs_per_strip: 4,
        lanes: 32,
        exceptions: true,
        seed: 7,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_kernels_return_the_bytes_of_the_reference(recipe in recipes()) {
        let random = recipe.make();
        prop_assume!(supports(&random.prepared()));
        let engine = emulated(PLENTY);
        let expected = decode_together(&ReferenceEngine, &random).expect("sound strips");
        let together = decode_together(&engine, &random);
        prop_assert_eq!(together.as_ref(), Ok(&expected), "together");
        prop_assert_eq!(&decode_each(&engine, &random).concat_all(), &expected, "strip by strip");
    }

    #[test]
    fn damaged_strips_give_the_kernels_the_reference_s_error_or_its_bytes(
        recipe in recipes(),
        places in prop::collection::vec((any::<Index>(), 1_u8..), 1..4),
    ) {
        let random = recipe.make().damaged(&places);
        prop_assume!(supports(&random.prepared()));
        let expected = decode_each(&ReferenceEngine, &random);
        prop_assert_eq!(&decode_each(&emulated(PLENTY), &random), &expected);
    }
}

#[test]
fn a_wrong_checksum_is_an_error_before_anything_is_launched() {
    let mut random = predicted().make();
    random.body[5] ^= 1;
    let (device, of_engine) = shared(EmulatedDevice::new(PLENTY));
    let engine = CudaEngine::new(of_engine, PLENTY, Arc::new(NoCpu)).expect("enough memory");
    let error = decode_together(&engine, &random).expect_err("a damaged strip");
    assert!(matches!(error, DecodeError::StripChecksum { strip: 0, .. }), "{error}");
    assert_eq!(device.launches(), 0);
}

#[test]
fn a_call_that_does_not_fit_is_decoded_in_several_and_a_strip_that_does_not_fit_by_the_cpu() {
    // Four slots of 4 MiB: a tensor of more takes several launches, and its reference is sent in parts too.
    let recipe = Recipe { dtype: Dtype::F32, rows: 17, columns: 65_536, runs_per_strip: 1, ..predicted() };
    let random = recipe.make();
    let expected = decode_together(&CpuEngine::portable(), &random).expect("sound strips");
    let (device, of_engine) = shared(EmulatedDevice::new(PLENTY));
    let engine = CudaEngine::new(of_engine, 16 << 20, Arc::new(NoCpu)).expect("enough memory");
    assert!(decode_together(&engine, &random).as_ref() == Ok(&expected));
    assert!(device.launches() > 2, "{} launches", device.launches());
    // With motion along the rows every strip may need all of the reference.
    let Kind::Quantized { raw_bits, trellis, prediction, sides, has_column_scales, .. } = recipe.coding else {
        unreachable!()
    };
    let coding = Kind::Quantized { raw_bits, trellis, prediction, motion_axis: Some(0), sides, has_column_scales };
    let random = Recipe { coding, ..recipe }.make();
    let expected = decode_together(&CpuEngine::portable(), &random).expect("sound strips");
    let (device, of_engine) = shared(EmulatedDevice::new(PLENTY));
    let engine = CudaEngine::new(of_engine, 16 << 20, portable()).expect("enough memory");
    assert!(decode_together(&engine, &random).as_ref() == Ok(&expected));
    assert_eq!(device.launches(), 0);
}

#[test]
fn a_device_with_too_little_memory_makes_no_engine() {
    let (_, device) = shared(EmulatedDevice::new(1 << 20));
    let error = CudaEngine::new(device, PLENTY, portable()).expect_err("a mebibyte");
    assert!(matches!(error, DeviceError::Memory { .. }), "{error}");
    let (_, device) = shared(EmulatedDevice::new(PLENTY));
    CudaEngine::new(device, 1 << 20, portable()).expect_err("it may take a mebibyte only");
}

#[test]
fn a_device_that_fails_at_any_call_loses_no_read_and_gives_everything_back() {
    let random = predicted().make();
    let expected = decode_together(&ReferenceEngine, &random).expect("sound strips");
    let (device, of_engine) = shared(EmulatedDevice::new(PLENTY));
    let engine = CudaEngine::new(of_engine, PLENTY, Arc::new(NoCpu)).expect("enough memory");
    decode_together(&engine, &random).expect("sound strips");
    let calls = device.calls();
    assert!(calls > 8, "memory, streams, copies, a launch, and waiting: {calls}");
    for fault in [Fault::Lost, Fault::Memory] {
        let mut made = 0;
        for call in 0..calls {
            let (_, device) = shared(EmulatedDevice::failing_at(call, fault));
            let Ok(engine) = CudaEngine::new(device, PLENTY, portable()) else { continue };
            made += 1;
            for _ in 0..2 {
                assert_eq!(decode_together(&engine, &random).as_ref(), Ok(&expected), "{fault:?} at {call}");
            }
            assert_eq!(engine.is_lost(), fault == Fault::Lost, "at {call}");
        }
        assert!(made > 4, "{made} engines were made before the device failed");
    }
}

#[test]
fn calls_of_many_threads_share_the_slots() {
    let random = predicted().make();
    let expected = decode_together(&ReferenceEngine, &random).expect("sound strips");
    let engine = emulated(PLENTY);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(decode_together(&engine, &random).as_ref(), Ok(&expected)));
        }
    });
}

#[test]
fn every_number_of_raw_bits_is_joined() {
    for (dtype, most) in [(Dtype::BF16, 16), (Dtype::F32, 32)] {
        for (raw_bits, columns) in (1..=most).flat_map(|raw_bits| [(raw_bits, 96), (raw_bits, 101)]) {
            let (coding, seed) = (Kind::Split(Carrier::Own, raw_bits), raw_bits.into());
            let recipe = Recipe { dtype: dtype.clone(), coding, rows: 7, columns, seed, ..predicted() };
            let random = recipe.make();
            let expected = decode_together(&ReferenceEngine, &random).expect("sound strips");
            assert_eq!(decode_together(&emulated(PLENTY), &random).as_ref(), Ok(&expected), "{recipe:?}");
        }
    }
}

#[test]
fn a_machine_without_a_device_is_told_so() {
    match CudaDevice::new(1000) {
        Err(DeviceError::Absent(_)) => {}
        other => panic!("there is no device 1000: {other:?}"),
    }
}

#[test]
fn the_ptx_is_that_of_the_source_beside_it() {
    let stated = PTX.lines().nth(1).expect("a second line");
    assert_eq!(stated, format!("// from sources of SHA-256 {}", source_digest()), "run src/decode/cuda/kernel/build");
    let check = Command::new(kernel_source().join("build")).arg("check").status().expect("bash is there");
    // Where that clang is not installed the digest is all that there is to compare.
    assert!(check.success() || check.code() == Some(3), "clang makes other PTX of this source");
}

#[test]
fn the_ptx_is_for_any_device_from_sm_70_on_and_fuses_and_flushes_nothing() {
    assert!(PTX.contains("\n.target sm_70\n") && PTX.contains("\n.version 6.3\n"), "what drivers since CUDA 10 read");
    for kernel in Kernel::ALL {
        assert!(PTX.contains(&format!(".visible .entry {}(", kernel.name())), "{}", kernel.name());
    }
    let operations: Vec<&str> = PTX.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let of_floats = |operation: &&&str| operation.ends_with(".f32") && !operation.starts_with("cvt");
    for operation in operations.iter().filter(of_floats) {
        let is_exact =
            ["mov.", "ld.", "st.", "selp.", "setp.", "neg.", "abs."].iter().any(|exact| operation.starts_with(exact));
        let is_rounded = ["add.rn.f32", "mul.rn.f32"].contains(operation);
        assert!(is_exact || is_rounded || operation.contains(".b32"), "{operation} is no single rounded operation");
    }
    assert!(operations.contains(&"mul.rn.f32") && operations.contains(&"add.rn.f32"));
    assert!(!operations.iter().any(|operation| operation.contains("ftz") || operation.starts_with("fma")));
}
