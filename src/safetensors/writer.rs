//! Writes small safetensors files with the format's own crate: what tests and tools make is what others would make.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::tensor::{Dtype as CrateDtype, View};

use super::SafetensorsError;
use crate::tensor::Dtype;

/// One tensor to be written.
#[derive(Clone, Debug)]
pub struct NewTensor<'a> {
    /// Name in the header.
    pub name: &'a str,
    /// Element type; one that the safetensors crate can write.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: &'a [usize],
    /// The elements, little endian, row by row.
    pub bytes: &'a [u8],
}

/// The bytes of a safetensors file with these tensors and this `__metadata__`.
///
/// # Errors
/// When a dtype is not writable or a tensor's bytes do not match its shape.
pub fn write_file(tensors: &[NewTensor<'_>], metadata: &[(&str, &str)]) -> Result<Vec<u8>, SafetensorsError> {
    let views = tensors
        .iter()
        .map(|tensor| Ok((tensor.name, Checked { tensor, dtype: crate_dtype(&tensor.dtype)? })))
        .collect::<Result<Vec<_>, SafetensorsError>>()?;
    for (name, view) in &views {
        let expected = view.tensor.shape.iter().product::<usize>() * view.dtype.bitsize() / 8;
        if expected != view.tensor.bytes.len() {
            let problem = format!("{} bytes, expected {expected}", view.tensor.bytes.len());
            return Err(SafetensorsError::Tensor { tensor: (*name).to_owned(), field: "bytes", problem });
        }
    }
    let metadata: HashMap<String, String> = metadata.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    safetensors::serialize(views, metadata).map_err(|error| SafetensorsError::Write(error.to_string()))
}

/// The safetensors crate's name of a dtype.
fn crate_dtype(dtype: &Dtype) -> Result<CrateDtype, SafetensorsError> {
    let quoted = serde_json::Value::String(dtype.name().to_owned());
    serde_json::from_value(quoted).map_err(|source| SafetensorsError::Json { what: "dtype", source })
}

struct Checked<'a> {
    tensor: &'a NewTensor<'a>,
    dtype: CrateDtype,
}

impl View for Checked<'_> {
    fn dtype(&self) -> CrateDtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.tensor.bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::Header;

    #[test]
    fn what_the_crate_writes_is_read_back() {
        let tensors = [
            NewTensor { name: "b", dtype: Dtype::BF16, shape: &[2, 2], bytes: &[1; 8] },
            NewTensor { name: "a", dtype: Dtype::I64, shape: &[], bytes: &[2; 8] },
            NewTensor { name: "none", dtype: Dtype::F16, shape: &[0, 7], bytes: &[] },
        ];
        let file = write_file(&tensors, &[("format", "pt")]).unwrap();
        let header = Header::read_from(&file[..], file.len() as u64).unwrap();
        assert_eq!(header.metadata, [("format".to_owned(), "pt".to_owned())]);
        for tensor in tensors {
            let info = header.tensors.iter().find(|info| info.name == tensor.name).unwrap();
            assert_eq!(info.dtype, tensor.dtype);
            let begin = header.bytes.len() + info.offset_bytes as usize;
            assert_eq!(&file[begin..begin + info.length_bytes as usize], tensor.bytes);
        }
    }

    #[test]
    fn a_tensor_whose_bytes_do_not_match_is_refused() {
        let tensors = [NewTensor { name: "a", dtype: Dtype::F32, shape: &[3], bytes: &[0; 8] }];
        assert_eq!(write_file(&tensors, &[]).unwrap_err().to_string(), "tensor `a`: bytes: 8 bytes, expected 12");
    }
}
