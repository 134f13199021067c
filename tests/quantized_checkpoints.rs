//! Checkpoints that were quantized before: made of Gaussian weights with the arithmetic and the layouts of the real formats,
//! they come back bit-exact and take no more than their entropy asks for.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Random, Tensor, mcwcfs, mcwcfs_ok, safetensors};
use serde_json::Value;

const OUTPUTS: usize = 512;
const INPUTS: usize = 2048;
const GROUP: usize = 128;

/// Gaussian weights, `[OUTPUTS, INPUTS]`, with the tails that scales are made for (Box and Muller).
fn weights() -> Vec<f32> {
    let mut random = Random::new(31);
    let mut uniform = || ((random.next_u64() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..OUTPUTS * INPUTS).map(|_| (0.02 * normal()) as f32).collect()
}

fn f16(value: f32) -> f32 {
    half::f16::from_f32(value).to_f32()
}

/// Four-bit integers, their scales and zero points by group, all `[OUTPUTS, ...]`.
struct FourBits {
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

fn four_bits(is_symmetric: bool) -> FourBits {
    let mut quantized = FourBits { codes: Vec::new(), scales: Vec::new(), zeros: Vec::new() };
    for group in weights().chunks(GROUP) {
        let (low, high) =
            group.iter().fold((0.0_f32, 0.0_f32), |(low, high), &value| (low.min(value), high.max(value)));
        let (scale, zero) = match is_symmetric {
            true => (f16(2.0 * high.max(-low) / 15.0), 8.0),
            false => (f16((high - low) / 15.0), (-low / f16((high - low) / 15.0)).round()),
        };
        let code = |value: &f32| ((value / scale).round_ties_even() + zero).clamp(0.0, 15.0) as u8;
        quantized.codes.extend(group.iter().map(code));
        quantized.scales.push(scale);
        quantized.zeros.push(zero as u8);
    }
    quantized
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

/// Eight neighbours of a row in an integer, in this order from the lowest bits on.
fn packed(codes: &[u8], order: [usize; 8]) -> Vec<u8> {
    let word = |eight: &[u8]| (0..8).fold(0_u32, |word, place| word | u32::from(eight[order[place]]) << (4 * place));
    codes.chunks(8).flat_map(|eight| word(eight).to_le_bytes()).collect()
}

const IN_ORDER: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

fn gptq(is_symmetric: bool) -> Vec<Tensor> {
    let quantized = four_bits(is_symmetric);
    let groups = INPUTS / GROUP;
    // [in / 8, out]: eight inputs of one output are an integer.
    let words: Vec<[u8; 4]> = packed(&quantized.codes, IN_ORDER).as_chunks().0.to_vec();
    let less_one: Vec<u8> = quantized.zeros.iter().map(|zero| zero.wrapping_sub(1) & 15).collect();
    let places = (0..INPUTS).flat_map(|input| ((input / GROUP) as i32).to_le_bytes()).collect();
    vec![
        Tensor::raw("l.qweight", "I32", &[INPUTS / 8, OUTPUTS], transposed(&words, INPUTS / 8).concat()),
        Tensor::raw("l.qzeros", "I32", &[groups, OUTPUTS / 8], packed(&transposed(&less_one, groups), IN_ORDER)),
        Tensor::floats("l.scales", "F16", &[groups, OUTPUTS], &transposed(&quantized.scales, groups)),
        Tensor::raw("l.g_idx", "I32", &[INPUTS], places),
    ]
}

fn awq() -> Vec<Tensor> {
    let quantized = four_bits(false);
    let groups = INPUTS / GROUP;
    // [in, out / 8]: eight outputs of one input are an integer.
    let codes = transposed(&quantized.codes, INPUTS);
    vec![
        Tensor::raw("l.qweight", "I32", &[INPUTS, OUTPUTS / 8], packed(&codes, AWQ_ORDER)),
        Tensor::raw(
            "l.qzeros",
            "I32",
            &[groups, OUTPUTS / 8],
            packed(&transposed(&quantized.zeros, groups), AWQ_ORDER),
        ),
        Tensor::floats("l.scales", "F16", &[groups, OUTPUTS], &transposed(&quantized.scales, groups)),
    ]
}

fn compressed_tensors() -> Vec<Tensor> {
    let quantized = four_bits(true);
    let shape = [OUTPUTS as i64, INPUTS as i64].map(i64::to_le_bytes).concat();
    vec![
        Tensor::raw("l.weight_packed", "I32", &[OUTPUTS, INPUTS / 8], packed(&quantized.codes, IN_ORDER)),
        Tensor::floats("l.weight_scale", "BF16", &[OUTPUTS, INPUTS / GROUP], &quantized.scales),
        Tensor::raw("l.weight_shape", "I64", &[2], shape),
    ]
}

fn int8() -> Vec<Tensor> {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in weights().chunks(INPUTS) {
        let scale = row.iter().fold(0.0_f32, |most, value| most.max(value.abs())) / 127.0;
        codes.extend(row.iter().map(|value| (value / scale).round_ties_even() as i8 as u8));
        scales.push(scale);
    }
    vec![
        Tensor::raw("l.weight", "I8", &[OUTPUTS, INPUTS], codes),
        Tensor::floats("l.weight_scale", "F32", &[OUTPUTS, 1], &scales),
    ]
}

/// The magnitudes of a small float type in ascending order: what its bits without the sign stand for.
fn magnitudes(exponent_bits: u32, mantissa_bits: u32, count: u32) -> Vec<f32> {
    let bias = (1 << (exponent_bits - 1)) - 1;
    let value = |bits: u32| {
        let (exponent, mantissa) = ((bits >> mantissa_bits) as i32, (bits & ((1 << mantissa_bits) - 1)) as f32);
        let unit = 2.0_f32.powi(-(mantissa_bits as i32));
        match exponent {
            0 => mantissa * unit * 2.0_f32.powi(1 - bias),
            _ => (1.0 + mantissa * unit) * 2.0_f32.powi(exponent - bias),
        }
    };
    (0..count).map(value).collect()
}

/// The bits of the nearest number of a small float type, its sign above its `bits`; the even one of two.
fn nearest(value: f32, magnitudes: &[f32], bits: u32) -> u8 {
    let above = magnitudes.partition_point(|&magnitude| magnitude < value.abs()).min(magnitudes.len() - 1);
    let below = above.saturating_sub(1);
    let (over, under) = (magnitudes[above] - value.abs(), value.abs() - magnitudes[below]);
    let chosen = if over < under || over == under && above % 2 == 0 { above } else { below };
    chosen as u8 | u8::from(value < 0.0) << bits
}

fn fp8(dtype: &'static str) -> Vec<Tensor> {
    // Up to 448 and 57,344, the largest finite numbers.
    let magnitudes = if dtype == "F8_E4M3" { magnitudes(4, 3, 127) } else { magnitudes(5, 2, 124) };
    let weights = weights();
    let most = weights.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let scale = most / magnitudes[magnitudes.len() - 1];
    let codes = weights.iter().map(|value| nearest(value / scale, &magnitudes, 7)).collect();
    vec![
        Tensor::raw("l.weight", dtype, &[OUTPUTS, INPUTS], codes),
        Tensor::floats("l.weight_scale", "F32", &[1], &[scale]),
    ]
}

fn halves(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect()
}

fn mxfp4() -> Vec<Tensor> {
    let magnitudes = magnitudes(2, 1, 8);
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in weights().chunks(32) {
        let most = block.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let exponent = most.log2().floor() - 2.0;
        codes.extend(block.iter().map(|value| nearest(value / exponent.exp2(), &magnitudes, 3)));
        scales.push((exponent + 127.0) as u8);
    }
    vec![
        Tensor::raw("l.weight_blocks", "U8", &[OUTPUTS, INPUTS / 32, 16], halves(&codes)),
        Tensor::raw("l.weight_scales", "U8", &[OUTPUTS, INPUTS / 32], scales),
    ]
}

fn nvfp4() -> Vec<Tensor> {
    let (e2m1, e4m3) = (magnitudes(2, 1, 8), magnitudes(4, 3, 127));
    let weights = weights();
    let most = weights.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let scale_of_all = most / (6.0 * 448.0);
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in weights.chunks(16) {
        let most = block.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let scale = nearest(most / 6.0 / scale_of_all, &e4m3, 7);
        let step = e4m3[usize::from(scale)] * scale_of_all;
        codes.extend(block.iter().map(|value| nearest(value / step, &e2m1, 3)));
        scales.push(scale);
    }
    vec![
        Tensor::raw("l.weight_packed", "U8", &[OUTPUTS, INPUTS / 2], halves(&codes)),
        Tensor::raw("l.weight_scale", "F8_E4M3", &[OUTPUTS, INPUTS / 16], scales),
        Tensor::floats("l.weight_scale_2", "F32", &[1], &[scale_of_all]),
    ]
}

struct Work {
    directory: tempfile::TempDir,
}

impl Work {
    fn new(tensors: &[Tensor]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("model.safetensors"), safetensors(tensors)).expect("a checkpoint");
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn pack(&self, options: &[&str]) -> Value {
        let mut arguments =
            arguments!["pack", "--json", "--force", self.path("model.safetensors"), self.path("packed.mcwc")].to_vec();
        arguments.extend(options.iter().map(Into::into));
        serde_json::from_str(&mcwcfs_ok(arguments)).expect("JSON")
    }
}

/// Packs, unpacks, compares, and gives the bits per weight of the whole archive and of its first tensor alone.
fn bits_per_weight(tensors: &[Tensor]) -> (f64, f64) {
    let work = Work::new(tensors);
    let report = work.pack(&[]);
    mcwcfs_ok(arguments!["unpack", work.path("packed.mcwc"), work.path("unpacked")]);
    let unpacked = fs::read(work.path("unpacked/model.safetensors")).expect("unpacked");
    assert!(unpacked == fs::read(work.path("model.safetensors")).expect("the checkpoint"), "other bytes");
    let count = (OUTPUTS * INPUTS) as f64;
    let whole = 8.0 * report["archive_bytes"].as_f64().expect("a number") / count;
    let first = &tensors[0];
    let reports = report["tensors"].as_array().expect("tensors");
    let of_first = reports.iter().find(|tensor| tensor["name"] == first.name.as_str()).expect("the first");
    let elements = first.shape.iter().product::<usize>() as f64;
    (whole, of_first["bits_per_element"].as_f64().expect("a number") * elements / count)
}

#[test]
fn quantized_checkpoints_take_no_more_than_their_entropy_asks_for() {
    // Bits per weight of the archive, and of the weights' own tensor. Gaussian weights with a scale of 16 bits for each 128
    // have 3.48 bits in symmetric codes, 3.63 in asymmetric ones, and 0.08 in the scales.
    for (name, tensors, most, most_of_first) in [
        ("GPTQ, symmetric", gptq(true), 3.60, 3.5),
        ("GPTQ, asymmetric", gptq(false), 3.8, 3.66),
        ("AWQ", awq(), 3.8, 3.66),
        ("compressed-tensors, symmetric", compressed_tensors(), 3.60, 3.5),
        ("INT8", int8(), 7.3, 7.28),
        ("FP8 E4M3", fp8("F8_E4M3"), 6.6, 6.6),
        ("FP8 E5M2", fp8("F8_E5M2"), 5.6, 5.6),
        ("MXFP4", mxfp4(), 4.0, 3.96),
        ("NVFP4", nvfp4(), 4.25, 4.0),
    ] {
        let (whole, first) = bits_per_weight(&tensors);
        println!("{name}: {whole:.3} bits per weight, {first:.3} of them codes");
        assert!(whole <= most && first <= most_of_first, "{name}: {whole} bits per weight, {first} of them codes");
    }
}

#[test]
fn a_quantized_checkpoint_loses_nothing_unless_forced_and_then_only_what_was_not_quantized() {
    let mut tensors = gptq(true);
    tensors.push(Tensor::floats("embedding.weight", "F16", &[512, 256], &Random::new(32).normals(512 * 256, 0.02)));
    let work = Work::new(&tensors);
    let output = mcwcfs(arguments!["pack", work.path("model.safetensors"), work.path("no.mcwc"), "--bpp", "6"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("l.qweight is quantized already"), "{said}");
    assert!(!work.path("no.mcwc").exists());
    let report = work.pack(&["--max-rel-mse", "0.01", "--force-requantize"]);
    for tensor in report["tensors"].as_array().expect("tensors") {
        let error = tensor["relative_squared_error"].as_f64().expect("a number");
        assert_eq!(error > 0.0, tensor["name"] == "embedding.weight", "{tensor}");
    }
}
