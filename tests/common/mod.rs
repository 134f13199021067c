//! What the integration tests share: seeded checkpoints, safetensors files written by hand, the built program, a mount.
//!
//! Files are written here without the crate's own code, so that a test compares it with something else than itself.

#![allow(dead_code)] // every test binary uses a part of this

pub mod archives;
pub mod random_archives;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// SplitMix64: the same numbers on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in `0..bound`, near enough.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound as u64) as usize
    }

    /// Standard normal by the sum of twelve uniforms, which needs no function that libm may round differently.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64).sum();
        (sum - 6.0) as f32
    }

    pub fn normals(&mut self, count: usize, deviation: f32) -> Vec<f32> {
        (0..count).map(|_| self.normal() * deviation).collect()
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next_u64() as u8).collect()
    }

    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}

/// One tensor of a safetensors file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Tensor {
    /// A tensor of any type from its bytes.
    pub fn raw(name: &str, dtype: &str, shape: &[usize], data: Vec<u8>) -> Self {
        Self { name: name.into(), dtype: dtype.into(), shape: shape.to_vec(), data }
    }

    /// A float tensor of type F64, F32, F16 or BF16 whose elements are `values` rounded to it.
    pub fn floats(name: &str, dtype: &str, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}: one value per element");
        let data = values.iter().flat_map(|&value| match dtype {
            "F64" => f64::from(value).to_le_bytes().to_vec(),
            "F32" => value.to_le_bytes().to_vec(),
            "F16" => half::f16::from_f32(value).to_le_bytes().to_vec(),
            "BF16" => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            other => panic!("{name}: {other} is no float type of this helper"),
        });
        Self::raw(name, dtype, shape, data.collect())
    }
}

/// A safetensors file as the reference library writes it: tensors in the order given, header padded to 8 bytes.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let in_order: Vec<usize> = (0..tensors.len()).collect();
    safetensors_with(tensors, &in_order, &[("format", "pt")])
}

/// A safetensors file whose JSON names the tensors in another order than that of their data.
pub fn safetensors_with(tensors: &[Tensor], order_in_header: &[usize], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut begins = Vec::new();
    let mut data = Vec::new();
    for tensor in tensors {
        begins.push(data.len());
        data.extend_from_slice(&tensor.data);
    }
    let mut entries = Vec::new();
    if !metadata.is_empty() {
        let pairs: Vec<String> = metadata.iter().map(|(key, value)| format!("{key:?}:{value:?}")).collect();
        entries.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    for &index in order_in_header {
        let Tensor { name, dtype, shape, data } = &tensors[index];
        let (begin, end) = (begins[index], begins[index] + data.len());
        let mut entry = String::new();
        let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
        write!(entry, "{name:?}:{{\"dtype\":\"{dtype}\",\"shape\":[{}]", shape.join(",")).expect("a string takes it");
        write!(entry, ",\"data_offsets\":[{begin},{end}]}}").expect("a string takes it");
        entries.push(entry);
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// A small BERT whose layers resemble one another after their FFN units and heads are put back in order: alignment and
/// prediction pay, so an encoder has every mode to choose from.
#[derive(Clone, Copy, Debug)]
pub struct Bert {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub ffn_units: usize,
    pub dtype: &'static str,
    /// Standard deviation of what a layer adds to the one before it; the weights' own is 1.
    pub drift: f32,
    pub seed: u64,
}

impl Default for Bert {
    fn default() -> Self {
        Self { layers: 4, hidden: 32, heads: 4, ffn_units: 64, dtype: "F32", drift: 0.2, seed: 1 }
    }
}

impl Bert {
    /// The tensors under the names that transformers gives them.
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut random = Random::new(self.seed);
        let &Self { hidden, ffn_units, heads, dtype, .. } = self;
        let mut tensors = vec![Tensor::floats(
            "embeddings.word_embeddings.weight",
            dtype,
            &[16, hidden],
            &random.normals(16 * hidden, 0.05),
        )];
        // Rows of these are blocks: units of the FFN (up row and down column), elements of heads (query, key, value, output).
        let mut up = random.normals(ffn_units * hidden, 1.0);
        let mut down = random.normals(ffn_units * hidden, 1.0);
        let mut attention: Vec<Vec<f32>> = (0..4).map(|_| random.normals(hidden * hidden, 1.0)).collect();
        for layer in 0..self.layers {
            if layer > 0 {
                let units = random.permutation(ffn_units);
                let order = random.permutation(heads);
                for matrix in [&mut up, &mut down] {
                    *matrix = drifted(matrix, hidden, &units, self.drift, &mut random);
                }
                let head_dim = hidden / heads;
                let rows: Vec<usize> =
                    order.iter().flat_map(|head| (0..head_dim).map(move |element| head * head_dim + element)).collect();
                for matrix in &mut attention {
                    *matrix = drifted(matrix, hidden, &rows, self.drift, &mut random);
                }
            }
            let prefix = format!("encoder.layer.{layer}");
            let mut push = |name: &str, shape: &[usize], values: &[f32]| {
                tensors.push(Tensor::floats(&format!("{prefix}.{name}"), dtype, shape, values));
            };
            let scaled = |values: &[f32]| values.iter().map(|value| value * 0.05).collect::<Vec<_>>();
            for (name, matrix) in ["query", "key", "value"].iter().zip(&attention) {
                push(&format!("attention.self.{name}.weight"), &[hidden, hidden], &scaled(matrix));
                push(&format!("attention.self.{name}.bias"), &[hidden], &random.normals(hidden, 0.02));
            }
            let output = transposed(&attention[3], hidden);
            push("attention.output.dense.weight", &[hidden, hidden], &scaled(&output));
            push("attention.output.dense.bias", &[hidden], &random.normals(hidden, 0.02));
            push("attention.output.LayerNorm.weight", &[hidden], &vec![1.0; hidden]);
            push("attention.output.LayerNorm.bias", &[hidden], &random.normals(hidden, 0.02));
            push("intermediate.dense.weight", &[ffn_units, hidden], &scaled(&up));
            push("intermediate.dense.bias", &[ffn_units], &random.normals(ffn_units, 0.02));
            push("output.dense.weight", &[hidden, ffn_units], &scaled(&transposed(&down, hidden)));
            push("output.dense.bias", &[hidden], &random.normals(hidden, 0.02));
            push("output.LayerNorm.weight", &[hidden], &vec![1.0; hidden]);
            push("output.LayerNorm.bias", &[hidden], &random.normals(hidden, 0.02));
        }
        tensors
    }

    /// Writes a Hugging Face directory: `model.safetensors`, `config.json` and a sidecar.
    pub fn write(&self, directory: &Path) {
        fs::create_dir_all(directory).expect("the checkpoint's directory");
        let config = format!(
            "{{\"model_type\":\"bert\",\"architectures\":[\"BertModel\"],\"num_hidden_layers\":{},\"hidden_size\":{},\
             \"num_attention_heads\":{},\"intermediate_size\":{},\"vocab_size\":16}}",
            self.layers, self.hidden, self.heads, self.ffn_units
        );
        fs::write(directory.join("config.json"), config).expect("config.json");
        fs::write(directory.join("README.md"), "A sidecar.\n").expect("README.md");
        fs::write(directory.join("model.safetensors"), safetensors(&self.tensors())).expect("model.safetensors");
    }
}

/// The rows of `matrix` in another order, each a little changed but of the same variance.
fn drifted(matrix: &[f32], columns: usize, rows: &[usize], drift: f32, random: &mut Random) -> Vec<f32> {
    let keep = (1.0 - drift * drift).sqrt();
    let rows = rows.iter().flat_map(|row| &matrix[row * columns..][..columns]);
    rows.map(|value| keep * value + drift * random.normal()).collect()
}

fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    let rows = matrix.len() / columns;
    (0..columns).flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column])).collect()
}

/// Runs `mcwcfs` and waits for it.
pub fn mcwcfs(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mcwcfs")).args(arguments).output().expect("mcwcfs starts")
}

/// Runs `mcwcfs`, which must succeed, and gives its standard output.
pub fn mcwcfs_ok(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    let arguments: Vec<_> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
    let output = mcwcfs(&arguments);
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "mcwcfs {arguments:?}: {}\n{errors}{said}", output.status);
    String::from_utf8(output.stdout).expect("standard output is text")
}

/// `[a, b, ...]` of strings and paths as arguments.
#[macro_export]
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { [$(std::ffi::OsString::from($argument)),*] };
}

/// A mount that comes down with the value, also when a test fails.
pub struct Mount {
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Mount {
    /// Mounts `source` on a new directory and returns when the mount answers.
    pub fn new(source: &Path, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory to mount on");
        let path = directory.path().join("mnt");
        fs::create_dir(&path).expect("a directory to mount on");
        let log = directory.path().join("daemon.log");
        // The daemon would keep a pipe open, and waiting for the pipe's end would wait for the daemon.
        let errors = fs::File::create(&log).expect("a log file");
        let status = Command::new(env!("CARGO_BIN_EXE_mcwcfs"))
            .arg("mount")
            .arg("--log-file")
            .arg(directory.path().join("decoding.log"))
            .args(options)
            .args([source, &path])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(errors)
            .status()
            .expect("mcwcfs starts");
        assert!(status.success(), "mcwcfs mount: {status}\n{}", fs::read_to_string(&log).unwrap_or_default());
        Self { path, _directory: directory }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let output = mcwcfs(["umount".as_ref(), self.path.as_os_str()]);
        if !output.status.success() && !std::thread::panicking() {
            panic!("mcwcfs umount: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Relative paths of all regular files below a directory, sorted.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![directory.to_path_buf()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("a directory entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path.strip_prefix(directory).expect("found below it").to_path_buf());
            }
        }
    }
    files.sort();
    files
}

/// Fails unless both directories hold the same files with the same bytes.
pub fn assert_same_directories(left: &Path, right: &Path) {
    assert_eq!(files_below(left), files_below(right), "{} and {}", left.display(), right.display());
    for file in files_below(left) {
        let bytes = |directory: &Path| fs::read(directory.join(&file)).expect("a listed file can be read");
        assert!(
            bytes(left) == bytes(right),
            "{} differs in {} and {}",
            file.display(),
            left.display(),
            right.display()
        );
    }
}
