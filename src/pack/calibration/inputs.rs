//! Inputs for a model, to calibrate on or to be judged by: text, token ids or pixels, cut to what a few minutes can be spent
//! on.

use std::fmt;
use std::path::Path;

use ndarray::{Array4, ArrayViewD, Axis};
use ndarray_npy::{ViewElement, ViewNpyError, ViewNpyExt};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use super::{CalibrationError, CalibrationSource};
use crate::forward::inputs::Inputs;
use crate::forward::model::Transformer;
use crate::hexadecimal::hex;
use crate::numerics::{f32_from_bf16, f32_from_f16};
use crate::safetensors::Header;
use crate::tensor::{Dtype, TensorInfo};

/// Patches that an image counts for.
pub(in crate::pack) const IMAGE_TOKENS: usize = 256;
/// Tokens of a sequence.
const SEQUENCE_TOKENS: usize = 512;
/// Text for models of language when nobody gives a better one.
const BUILT_IN_TEXT: &str = include_str!("sentences.txt");

/// Reads a file.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, CalibrationError> {
    std::fs::read(path).map_err(|source| CalibrationError::Io { path: path.to_owned(), source })
}

/// Inputs of a model, and where they are from.
#[derive(Clone, Debug, PartialEq)]
pub struct InputData {
    /// What the model is run on.
    pub inputs: Inputs,
    /// The class of each image, where the file says.
    pub labels: Option<Vec<u32>>,
    /// Where they are from.
    pub origin: DataOrigin,
}

/// Where inputs are from and how many there are, for reports and provenance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataOrigin {
    /// Whether they came with the program instead of in a file.
    pub built_in: bool,
    /// SHA-256 of the bytes that they were read from, hexadecimal.
    pub sha256: String,
    /// Sequences or images that were used.
    pub inputs: usize,
    /// Tokens that were used, of sequences.
    pub tokens: Option<usize>,
}

impl fmt::Display for DataOrigin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = if self.built_in { "built-in text" } else { "file" };
        write!(out, "{from}, sha256 {}, ", self.sha256)?;
        match self.tokens {
            Some(tokens) => write!(out, "{tokens} tokens in {} sequences", self.inputs),
            None => write!(out, "{} images", self.inputs),
        }
    }
}

/// The inputs for a model, `most_tokens` of them at most. Text needs the file `tokenizer`.
///
/// # Errors
/// When a file cannot be read or is not what its name says.
pub(in crate::pack) fn load(
    source: &CalibrationSource,
    most_tokens: usize,
    model: &Transformer,
    tokenizer: &Path,
) -> Result<InputData, CalibrationError> {
    let (path, bytes) = match source {
        CalibrationSource::BuiltIn => (Path::new("built-in text"), BUILT_IN_TEXT.as_bytes().to_vec()),
        CalibrationSource::File(path) => (path.as_path(), read_file(path)?),
    };
    let format = |problem: String| CalibrationError::Format { path: path.to_owned(), problem };
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
    let mut labels = None;
    let inputs = match extension {
        "safetensors" => {
            labels = labels_of(&bytes).map_err(format)?;
            from_safetensors(&bytes).map_err(format)?
        }
        "npy" => from_npy(&bytes).map_err(format)?,
        _ if model.takes_images() => {
            let problem = "text for a model of images, expected pixel_values in a .safetensors file, or .npy";
            return Err(format(problem.into()));
        }
        _ => {
            let text = std::str::from_utf8(&bytes).map_err(|error| format(format!("{error}, expected UTF-8 text")))?;
            from_text(text, most_tokens, model, tokenizer)?
        }
    };
    if let Some(labels) = &labels
        && (!model.takes_images() || labels.len() != inputs.count())
    {
        let problem = format!("labels: {} for {} inputs, expected one per image", labels.len(), inputs.count());
        return Err(CalibrationError::Format { path: path.to_owned(), problem });
    }
    let (inputs, labels) = shortened(inputs, labels, most_tokens, model);
    if inputs.count() == 0 {
        return Err(format("nothing in it, expected sequences or images".into()));
    }
    let tokens = match &inputs {
        Inputs::Tokens(sequences) => Some(sequences.iter().map(Vec::len).sum()),
        Inputs::Images(_) => None,
    };
    let origin = DataOrigin {
        built_in: *source == CalibrationSource::BuiltIn,
        sha256: hex(&Sha256::digest(&bytes)),
        inputs: inputs.count(),
        tokens,
    };
    Ok(InputData { inputs, labels, origin })
}

/// Sequences no longer than the model takes, and no more inputs than time allows, taken evenly.
fn shortened(
    inputs: Inputs,
    labels: Option<Vec<u32>>,
    most_tokens: usize,
    model: &Transformer,
) -> (Inputs, Option<Vec<u32>>) {
    let longest = model.positions.unwrap_or(SEQUENCE_TOKENS).clamp(1, SEQUENCE_TOKENS);
    match inputs {
        Inputs::Tokens(sequences) => {
            let pieces: Vec<Vec<u32>> = match model.is_causal() {
                true => sequences.iter().flat_map(|sequence| sequence.chunks(longest)).map(<[u32]>::to_vec).collect(),
                // The rest of a sentence means nothing without its beginning.
                false => sequences
                    .into_iter()
                    .map(|mut sequence| {
                        sequence.truncate(longest);
                        sequence
                    })
                    .collect(),
            };
            let pieces: Vec<Vec<u32>> = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
            let tokens: usize = pieces.iter().map(Vec::len).sum();
            let kept = (pieces.len() * most_tokens).div_ceil(tokens.max(most_tokens));
            (Inputs::Tokens((0..kept).map(|index| pieces[index * pieces.len() / kept].clone()).collect()), labels)
        }
        Inputs::Images(images) => {
            let count = images.dim().0;
            let kept = count.min(most_tokens / IMAGE_TOKENS);
            let chosen: Vec<usize> = (0..kept).map(|index| index * count / kept).collect();
            let labels = labels.map(|labels| chosen.iter().map(|&image| labels[image]).collect());
            (Inputs::Images(images.select(Axis(0), &chosen)), labels)
        }
    }
}

/// Bytes of text for each token that is kept, at most: what follows is not looked at.
const TOKEN_BYTES: usize = 64;

/// For causal models the whole text, for others a sequence per line, with the special tokens that the tokenizer adds.
fn from_text(
    text: &str,
    most_tokens: usize,
    model: &Transformer,
    tokenizer: &Path,
) -> Result<Inputs, CalibrationError> {
    let failed = |problem: String| CalibrationError::Format { path: tokenizer.to_owned(), problem };
    let mut tokenizer = Tokenizer::from_bytes(read_file(tokenizer)?).map_err(|error| failed(error.to_string()))?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| failed(error.to_string()))?;
    let text = &text[..text.floor_char_boundary(TOKEN_BYTES * most_tokens)];
    let encode = |text: &str| {
        let encoded = tokenizer.encode(text, true).map_err(|error| failed(error.to_string()))?;
        Ok(encoded.get_ids().to_vec())
    };
    let sequences: Result<Vec<Vec<u32>>, CalibrationError> = match model.is_causal() {
        true => std::iter::once(text).map(encode).collect(),
        false => text.lines().filter(|line| !line.trim().is_empty()).map(encode).collect(),
    };
    sequences.map(Inputs::Tokens)
}

/// The class of each image: `labels`, where the file has them.
fn labels_of(bytes: &[u8]) -> Result<Option<Vec<u32>>, String> {
    let header = Header::read_from(bytes, bytes.len() as u64).map_err(|error| error.to_string())?;
    let Some(labels) = header.tensors.iter().find(|tensor| tensor.name == "labels") else { return Ok(None) };
    integers("labels", &labels.dtype, data_of(&header, labels, bytes)?).map(Some)
}

/// The bytes of one tensor.
fn data_of<'a>(header: &Header, tensor: &TensorInfo, bytes: &'a [u8]) -> Result<&'a [u8], String> {
    let start = header.bytes.len() + tensor.offset_bytes as usize;
    bytes.get(start..start + tensor.length_bytes as usize).ok_or_else(|| "shorter than its header says".into())
}

/// `input_ids` of one or two dimensions, with `attention_mask` where sequences are padded; or `pixel_values` of four.
fn from_safetensors(bytes: &[u8]) -> Result<Inputs, String> {
    let header = Header::read_from(bytes, bytes.len() as u64).map_err(|error| error.to_string())?;
    let find = |name: &str| header.tensors.iter().find(|tensor| tensor.name == name);
    let data = |tensor: &TensorInfo| data_of(&header, tensor, bytes);
    if let Some(pixels) = find("pixel_values") {
        let values = floats(&pixels.dtype, data(pixels)?)?;
        return images(&pixels.shape.iter().map(|&dimension| dimension as usize).collect::<Vec<_>>(), values);
    }
    let ids = find("input_ids").ok_or("neither input_ids nor pixel_values in it, expected one of them")?;
    let mut tokens = integers("input_ids", &ids.dtype, data(ids)?)?.into_iter();
    let mask = match find("attention_mask") {
        Some(mask) if mask.shape == ids.shape => integers("attention_mask", &mask.dtype, data(mask)?)?,
        Some(mask) => return Err(format!("attention_mask: shape {:?}, expected {:?}", mask.shape, ids.shape)),
        None => vec![1; tokens.len()],
    };
    let length = ids.shape.last().map_or(0, |&length| length as usize).max(1);
    let sequences = mask.chunks(length).map(|mask| {
        let row: Vec<u32> = tokens.by_ref().take(mask.len()).collect();
        row.into_iter().zip(mask).filter(|(_, seen)| **seen != 0).map(|(token, _)| token).collect()
    });
    Ok(Inputs::Tokens(sequences.collect()))
}

/// An array of token ids of one or two dimensions, or of float pixels of four.
fn from_npy(bytes: &[u8]) -> Result<Inputs, String> {
    /// The array as token ids; `None` where it has another element type.
    fn tokens<T: ViewElement + Copy + TryInto<u32>>(bytes: &[u8]) -> Result<Option<Inputs>, String> {
        let array = match ArrayViewD::<T>::view_npy(bytes) {
            Ok(array) => array,
            Err(ViewNpyError::WrongDescriptor(_)) => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let length = array.shape().last().copied().unwrap_or(0).max(1);
        let tokens: Vec<u32> = (array.iter())
            .map(|&token| token.try_into().map_err(|_| "a token id that is negative or beyond 32 bits".to_owned()))
            .collect::<Result<_, String>>()?;
        Ok(Some(Inputs::Tokens(tokens.chunks(length).map(<[u32]>::to_vec).collect())))
    }
    for read in [tokens::<u16>, tokens::<i32>, tokens::<i64>, tokens::<u32>] {
        if let Some(inputs) = read(bytes)? {
            return Ok(inputs);
        }
    }
    match ArrayViewD::<f32>::view_npy(bytes) {
        Ok(array) => images(array.shape(), array.iter().copied().collect()),
        Err(error) => Err(format!("{error}; expected integers (token ids) or 32-bit floats (pixels)")),
    }
}

fn images(shape: &[usize], values: Vec<f32>) -> Result<Inputs, String> {
    let wrong = || format!("pixels of shape {shape:?}, expected [images, channels, height, width]");
    let &[count, channels, height, width] = shape else { return Err(wrong()) };
    let images = Array4::from_shape_vec((count, channels, height, width), values).map_err(|_| wrong())?;
    Ok(Inputs::Images(images))
}

fn floats(dtype: &Dtype, bytes: &[u8]) -> Result<Vec<f32>, String> {
    match dtype {
        Dtype::F32 => Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
        Dtype::F16 => Ok(bytes.as_chunks().0.iter().map(|&bytes| f32_from_f16(u16::from_le_bytes(bytes))).collect()),
        Dtype::BF16 => Ok(bytes.as_chunks().0.iter().map(|&bytes| f32_from_bf16(u16::from_le_bytes(bytes))).collect()),
        other => Err(format!("pixel_values: {other}, expected F32, F16 or BF16")),
    }
}

fn integers(name: &str, dtype: &Dtype, bytes: &[u8]) -> Result<Vec<u32>, String> {
    let wide: Vec<i64> = match dtype {
        Dtype::BOOL | Dtype::U8 => bytes.iter().map(|&byte| byte.into()).collect(),
        Dtype::U16 => bytes.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes).into()).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect(),
        Dtype::U32 => bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes).into()).collect(),
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
        other => return Err(format!("{name}: {other}, expected U16, I32, U32 or I64")),
    };
    let narrow = wide.into_iter().map(u32::try_from).collect::<Result<_, _>>();
    narrow.map_err(|_| format!("{name}: a number that is negative or beyond 32 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn safetensors(json: &str, data: &[u8]) -> Vec<u8> {
        [&(json.len() as u64).to_le_bytes(), json.as_bytes(), data].concat()
    }

    #[test]
    fn padding_is_left_out() {
        let json = r#"{"attention_mask":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]},"input_ids":{"dtype":"U16","shape":[2,3],"data_offsets":[6,18]}}"#;
        let bytes = safetensors(json, &[1, 1, 0, 1, 0, 0, 7, 0, 8, 0, 0, 0, 9, 1, 0, 0, 0, 0]);
        assert_eq!(from_safetensors(&bytes), Ok(Inputs::Tokens(vec![vec![7, 8], vec![265]])));
    }

    #[test]
    fn pixels_keep_their_shape() {
        let json = r#"{"pixel_values":{"dtype":"F16","shape":[1,1,1,2],"data_offsets":[0,4]}}"#;
        let expected = Array4::from_shape_vec((1, 1, 1, 2), vec![1.0, -2.0]).expect("two pixels");
        let bytes = safetensors(json, &[0, 0x3c, 0, 0xc0]);
        assert_eq!(from_safetensors(&bytes), Ok(Inputs::Images(expected)));
        let flat = json.replace("[1,1,1,2]", "[2]");
        assert!(from_safetensors(&safetensors(&flat, &[0; 4])).is_err());
    }

    #[test]
    fn arrays_of_numpy_are_read_by_their_element_type() {
        let npy = |descriptor: &str, shape: &str, data: &[u8]| {
            let text = format!("{{'descr': '{descriptor}', 'fortran_order': False, 'shape': {shape}, }}");
            let header = format!("{text:<117}\n");
            let length = (header.len() as u16).to_le_bytes();
            [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
        };
        let ids = Ok(Inputs::Tokens(vec![vec![3, 4]]));
        assert_eq!(from_npy(&npy("<u2", "(2,)", &[3, 0, 4, 0])), ids);
        assert_eq!(from_npy(&npy("<i4", "(1, 2)", &[3, 0, 0, 0, 4, 0, 0, 0])), ids);
        assert!(from_npy(&npy("<i4", "(1,)", &[255; 4])).is_err(), "a negative token");
        assert!(from_npy(&npy("<f4", "(1,)", &[0; 4])).is_err(), "one pixel of no shape");
        assert!(from_npy(&npy("<u2", "(9,)", &[0; 4])).is_err(), "too short");
        assert!(from_npy(b"no array").is_err());
    }
}
