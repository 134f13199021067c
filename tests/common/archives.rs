//! Small archives that between them use every mode of the format, made by the program from seeded checkpoints.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mcwcfs::archive::{Archive, ArchiveError, Bases, Place};
use mcwcfs::materialize::{EngineChoice, MaterializeError, MaterializeOptions, Materializer};

use crate::arguments;
use crate::common::{Bert, Random, Tensor, mcwcfs_ok, safetensors};

/// A checkpoint and how it is packed.
pub struct Recipe {
    pub name: &'static str,
    /// What `inspect --json` must show somewhere, or the archive is not what its tests are for.
    pub must_contain: &'static [&'static str],
    pub options: &'static [&'static str],
    pub tensors: fn() -> Vec<Tensor>,
}

/// Every kind of archive, each a few kilobytes.
pub const RECIPES: &[Recipe] = &[
    Recipe {
        name: "lossless-bf16",
        must_contain: &["\"split\""],
        options: &["--lossless"],
        tensors: || Bert { layers: 2, hidden: 32, ffn_units: 48, dtype: "BF16", ..Bert::default() }.tensors(),
    },
    Recipe {
        name: "tree-digests", // the first archives had none; all since have
        must_contain: &["\"split\""],
        options: &["--lossless"],
        tensors: || Bert { layers: 1, hidden: 32, ffn_units: 32, dtype: "BF16", ..Bert::default() }.tensors(),
    },
    Recipe {
        name: "lossless-mixed-types",
        must_contain: &["\"raw\"", "\"split\""],
        options: &["--lossless"],
        tensors: mixed_types,
    },
    Recipe {
        name: "lossy-predicted",
        must_contain: &["\"keyframe", "\"predicted", "\"permuted_records\": 1"],
        options: &["--max-rel-mse", "0.02"],
        tensors: || {
            Bert { layers: 2, hidden: 64, ffn_units: 64, drift: 0.1, dtype: "BF16", seed: 3, ..Bert::default() }
                .tensors()
        },
    },
    Recipe {
        name: "lossy-scalar-steps-per-run",
        must_contain: &["\"keyframe"],
        options: &["--max-rel-mse", "0.01", "--quantization", "scalar", "--steps", "per-run"],
        tensors: || Bert { layers: 2, hidden: 64, ffn_units: 64, dtype: "F32", seed: 5, ..Bert::default() }.tensors(),
    },
    Recipe {
        name: "lossy-trellis-shared",
        must_contain: &["trellis"],
        options: &["--max-rel-mse", "0.005", "--quantization", "trellis-shared"],
        tensors: || Bert { layers: 1, hidden: 64, ffn_units: 64, dtype: "BF16", seed: 6, ..Bert::default() }.tensors(),
    },
    Recipe {
        name: "lossy-fine-steps",
        must_contain: &["\"keyframe"],
        options: &["--max-rel-mse", "0.000003"],
        tensors: || Bert { layers: 1, hidden: 64, ffn_units: 64, dtype: "F16", seed: 9, ..Bert::default() }.tensors(),
    },
    Recipe {
        name: "lossy-vectors",
        must_contain: &["keyframe, vectors", "predicted, vectors"],
        options: &["--bpp", "3.5", "--quantization", "residual-vector"],
        tensors: || {
            Bert { layers: 2, hidden: 64, ffn_units: 64, drift: 0.1, dtype: "BF16", seed: 14, ..Bert::default() }
                .tensors()
        },
    },
    Recipe {
        name: "lossy-column-scales",
        must_contain: &["column scales"],
        options: &["--bpp", "4", "--column-scales", "energy"],
        tensors: || {
            Bert { layers: 2, hidden: 64, ffn_units: 64, drift: 0.1, dtype: "F16", seed: 15, ..Bert::default() }
                .tensors()
        },
    },
    Recipe {
        name: "lossy-motion-vectors",
        must_contain: &["predicted, motion vectors"],
        options: &["--max-rel-mse", "0.02", "--predictor", "motion-vectors"],
        tensors: || {
            Bert { layers: 2, hidden: 64, ffn_units: 64, drift: 0.1, dtype: "F16", seed: 17, ..Bert::default() }
                .tensors()
        },
    },
    Recipe {
        name: "lossless-units",
        must_contain: &["\"few values\"", "\"units of 4 bits\"", "\"integers\""],
        options: &["--lossless"],
        tensors: units,
    },
];

/// What quantized checkpoints and tokenizers' tables are made of.
fn units() -> Vec<Tensor> {
    let mut random = Random::new(15);
    let integers = |random: &mut Random, count: usize, deviation: f32| -> Vec<i32> {
        random.normals(count, deviation).into_iter().map(|value| value.round() as i32).collect()
    };
    let nibbles = integers(&mut random, 4096, 2.2).into_iter().map(|value| value.clamp(-8, 7) as u8 & 15);
    let nibbles: Vec<u8> = nibbles.collect();
    let packed = nibbles.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect();
    let bytes = integers(&mut random, 3000, 30.0).into_iter().map(|value| value.clamp(-127, 127) as u8).collect();
    let mask = (0..32 * 32).flat_map(|at: u32| if at % 32 > at / 32 { f32::MIN } else { 0.0 }.to_le_bytes()).collect();
    let places = (0..300_u64).flat_map(u64::to_le_bytes).collect();
    let groups = (0..512_u32).flat_map(|at| (at / 64).to_le_bytes()).collect();
    vec![
        Tensor::raw("mlp.qweight", "I32", &[16, 32], packed),
        Tensor::raw("mlp.weight", "I8", &[30, 100], bytes),
        Tensor::raw("mask", "F32", &[1, 1, 32, 32], mask),
        Tensor::raw("position_ids", "I64", &[1, 300], places),
        Tensor::raw("mlp.g_idx", "I32", &[512], groups),
        Tensor::raw("zeros", "U8", &[700], vec![0x77; 700]),
        Tensor::raw("unknown", "NF7", &[60], vec![3; 240]),
    ]
}

/// Archives whose strips have all 32 lanes, which only tensors of some size have: too large to try every byte of.
pub const LARGE_RECIPES: &[Recipe] = &[
    Recipe {
        name: "large-network",
        must_contain: &["predicted, network"],
        options: &["--max-rel-mse", "0.02", "--predictor", "network-narrow", "--force-prediction", "--effort", "fast"],
        tensors: || {
            Bert { layers: 3, hidden: 64, ffn_units: 64, drift: 0.1, dtype: "BF16", seed: 18, ..Bert::default() }
                .tensors()
        },
    },
    Recipe {
        name: "large-lossless",
        must_contain: &["\"split\""],
        options: &["--lossless"],
        tensors: || {
            let mut tensors = matrices(&[("bf16", "BF16", 256)]);
            tensors.push(partly_narrow());
            tensors
        },
    },
    Recipe {
        name: "large-lossy-trellis",
        must_contain: &["trellis"],
        options: &["--bpp", "3.5", "--keep", "coarse=1.5", "--keep", "fine=8"],
        tensors: || matrices(&[("coarse", "BF16", 256), ("medium", "F16", 256), ("fine", "F32", 256)]),
    },
    Recipe {
        name: "large-lossy-scalar",
        must_contain: &["\"keyframe"],
        options: &["--bpp", "3", "--quantization", "scalar", "--effort", "fast"],
        tensors: || matrices(&[("bf16", "BF16", 300)]),
    },
    Recipe {
        name: "large-units",
        must_contain: &["\"units of 4 bits\"", "\"integers\""],
        options: &["--lossless"],
        tensors: || {
            let mut random = Random::new(16);
            let values = random.normals(2 * 98_304, 1.0);
            let (nibbles, bytes) = values.split_at(98_304);
            let nibble = |value: f32| (8.0 + 2.2 * value).round().clamp(0.0, 15.0) as u8;
            let packed = nibbles.chunks(2).map(|pair| nibble(pair[0]) | nibble(pair[1]) << 4).collect();
            let bytes = bytes.iter().map(|value| (30.0 * value).round().clamp(-127.0, 127.0) as i8 as u8).collect();
            vec![Tensor::raw("packed", "U8", &[256, 192], packed), Tensor::raw("bytes", "I8", &[512, 192], bytes)]
        },
    },
];

/// A variant and the base that it is packed with.
pub struct VariantRecipe {
    /// The variant. Its archive lies beside that of the base.
    pub variant: Recipe,
    pub base: Recipe,
}

/// Variants that between them use every way to start from a base.
pub const VARIANTS: &[VariantRecipe] = &[VariantRecipe {
    variant: Recipe {
        name: "variant",
        must_contain: &["\"the base's\"", "\"difference\"", "\"split\"", "\"raw\""],
        options: &["--lossless"],
        tensors: variant_tensors,
    },
    base: Recipe {
        name: "base-of-variant",
        must_contain: &["\"split\""],
        options: &["--lossless"],
        tensors: base_tensors,
    },
}];

fn base_tensors() -> Vec<Tensor> {
    let mut random = Random::new(31);
    let mut tensors = vec![
        Tensor::floats("unchanged", "BF16", &[40, 32], &random.normals(1280, 0.02)),
        Tensor::floats("vocabulary", "BF16", &[50, 24], &random.normals(1200, 0.02)),
    ];
    for (name, dtype) in [("tuned bf16", "BF16"), ("tuned f16", "F16"), ("tuned f32", "F32")] {
        tensors.push(Tensor::floats(name, dtype, &[60, 30], &random.normals(1800, 0.02)));
    }
    tensors.push(Tensor::raw("tuned fp8", "F8_E4M3", &[30, 30], random.bytes(900)));
    tensors.push(Tensor::floats("renamed", "BF16", &[36, 30], &random.normals(1080, 0.02)));
    tensors
}

/// What became of them: little changes, rows more, another name, and tensors of its own.
fn variant_tensors() -> Vec<Tensor> {
    let mut random = Random::new(32);
    let mut tensors = base_tensors();
    for tensor in &mut tensors {
        let bytes = tensor.data.len() / tensor.shape.iter().product::<usize>();
        match tensor.name.as_str() {
            "unchanged" => {}
            "renamed" => tensor.name = "under.another name".into(),
            "vocabulary" => {
                tensor.shape[0] = 53;
                tensor.data.extend(Tensor::floats("", "BF16", &[3, 24], &random.normals(72, 0.02)).data);
            }
            _ => {}
        }
        if tensor.name == "unchanged" {
            continue;
        }
        for element in tensor.data.chunks_mut(bytes) {
            if random.below(3) == 0 {
                element[0] = element[0].wrapping_add(random.below(5) as u8).wrapping_sub(2);
            }
        }
        if bytes == 2 {
            tensor.data[..2].copy_from_slice(&[0x00, 0x80]); // far from its reference: an exception
        }
    }
    tensors.push(Tensor::floats("its own", "F32", &[20, 20], &random.normals(400, 0.02)));
    tensors.push(Tensor::floats("bias", "F32", &[7], &random.normals(7, 0.02)));
    tensors
}

impl VariantRecipe {
    /// Packs both in `directory` and gives the path of the variant.
    pub fn pack(&self, directory: &Path) -> PathBuf {
        let base = self.base.pack(directory);
        self.variant.pack_with(directory, &arguments!["--base", &base])
    }
}

/// Matrices of 192 columns and some rows, with rows of different scales.
fn matrices(of: &[(&str, &'static str, usize)]) -> Vec<Tensor> {
    let mut random = Random::new(12);
    let matrix = |&(name, dtype, rows): &(&str, &'static str, usize)| {
        let scaled = |row: usize, value: f32| value * 0.02 * (1.0 + (row % 7) as f32);
        let values = random.normals(192 * rows, 1.0);
        let values: Vec<f32> = values.iter().enumerate().map(|(at, &value)| scaled(at / 192, value)).collect();
        Tensor::floats(name, dtype, &[rows, 192], &values)
    };
    of.iter().map(matrix).collect()
}

/// An F32 matrix, every third row of which would fit F16.
fn partly_narrow() -> Tensor {
    let mut values = Random::new(13).normals(96 * 64, 0.02);
    for row in values.chunks_mut(64).step_by(3) {
        for value in row {
            *value = half::f16::from_f32(*value).to_f32();
        }
    }
    Tensor::floats("partly narrow", "F32", &[96, 64], &values)
}

fn mixed_types() -> Vec<Tensor> {
    let mut random = Random::new(11);
    let mut tensors = vec![
        Tensor::floats("f64", "F64", &[10, 8], &random.normals(80, 1.0)),
        Tensor::floats("f32", "F32", &[40, 20], &random.normals(800, 0.02)),
        Tensor::floats("f16", "F16", &[40, 20], &random.normals(800, 0.02)),
        Tensor::floats("scalar", "F32", &[], &[0.5]),
        Tensor::raw("empty", "F32", &[0, 4], vec![]),
        Tensor::raw("bool", "BOOL", &[30], vec![1; 30]),
    ];
    tensors.push(Tensor::raw("i64", "I64", &[20], random.bytes(160)));
    tensors.push(Tensor::raw("fp8", "F8_E4M3", &[50, 3], random.bytes(150)));
    tensors
}

impl Recipe {
    /// The safetensors file.
    pub fn checkpoint(&self) -> Vec<u8> {
        safetensors(&(self.tensors)())
    }

    /// Packs it in `directory` and gives the archive's path.
    pub fn pack(&self, directory: &Path) -> PathBuf {
        self.pack_with(directory, &[])
    }

    /// The same with more options.
    pub fn pack_with(&self, directory: &Path, more: &[OsString]) -> PathBuf {
        let (checkpoint, archive) =
            (directory.join("model.safetensors"), directory.join(format!("{}.mcwc", self.name)));
        std::fs::write(&checkpoint, self.checkpoint()).expect("the checkpoint");
        let mut arguments = arguments!["pack", &checkpoint, &archive].to_vec();
        arguments.extend(self.options.iter().map(Into::into));
        arguments.extend_from_slice(more);
        mcwcfs_ok(arguments);
        let report = mcwcfs_ok(arguments!["inspect", "--json", &archive]);
        for part in self.must_contain {
            assert!(
                report.contains(part),
                "{}: {part} is missing, so this archive tests nothing:\n{report}",
                self.name
            );
        }
        archive
    }
}

/// Why an archive, or a range of one of its files, could not be read.
#[derive(Debug)]
pub enum ReadError {
    Open(ArchiveError),
    Decode(MaterializeError),
}

/// Some consecutive bytes of a decoded file, or why there are none.
pub type Window = Result<Vec<u8>, ReadError>;

/// The files of an archive in windows of `window` bytes, each decoded or an error: what a reader of a mount would get.
pub fn read_in_windows(path: &Path, engine: EngineChoice, window: usize) -> Result<Vec<Vec<Window>>, ReadError> {
    let archive = open_with_bases(path).map_err(ReadError::Open)?;
    let materializer =
        Materializer::new(MaterializeOptions { cache_bytes: 1 << 22, engine, ..MaterializeOptions::default() });
    let read = |file: usize, offset: u64| {
        let mut bytes = vec![0; window];
        let length = materializer.read(&archive, file, offset, &mut bytes).map_err(ReadError::Decode)?;
        bytes.truncate(length);
        Ok(bytes)
    };
    let files = archive
        .files()
        .iter()
        .enumerate()
        .map(|(number, file)| (0..file.length_bytes).step_by(window).map(|offset| read(number, offset)).collect());
    Ok(files.collect())
}

/// An archive, and what it starts from, which lies beside it.
pub fn open_with_bases(path: &Path) -> Result<Arc<Archive>, ArchiveError> {
    Bases::new(vec![Place { path: path.parent().expect("a directory").to_owned(), levels: 0 }]).open(path)
}

/// The decoded files of an archive that must be sound.
pub fn decode(path: &Path, engine: EngineChoice) -> Vec<(String, Vec<u8>)> {
    let names = Archive::open(path).unwrap_or_else(|error| panic!("{error}"));
    let files = read_in_windows(path, engine, 1 << 20).unwrap_or_else(|error| panic!("{error:?}"));
    let whole = |windows: Vec<Window>| -> Vec<u8> {
        windows.into_iter().flat_map(|bytes| bytes.unwrap_or_else(|error| panic!("{error:?}"))).collect()
    };
    names.files().iter().map(|file| file.name.clone()).zip(files.into_iter().map(whole)).collect()
}
