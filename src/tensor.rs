//! Tensors as safetensors files describe them: an element type, a shape, and where the bytes lie.
//!
//! No arithmetic on elements here: that is `numerics`.

use std::fmt;

/// Element type of a tensor, as named by the safetensors format.
///
/// A name this crate does not know is kept as [`Dtype::Other`]: such tensors are carried byte for byte.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)] // the variants are the format's own names
pub enum Dtype {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
    Other(String),
}

impl Dtype {
    /// Reads the name used in a safetensors header; every name is accepted.
    pub fn from_name(name: &str) -> Self {
        match name {
            "BOOL" => Self::BOOL,
            "F4" => Self::F4,
            "F6_E2M3" => Self::F6_E2M3,
            "F6_E3M2" => Self::F6_E3M2,
            "U8" => Self::U8,
            "I8" => Self::I8,
            "F8_E5M2" => Self::F8_E5M2,
            "F8_E4M3" => Self::F8_E4M3,
            "F8_E8M0" => Self::F8_E8M0,
            "I16" => Self::I16,
            "U16" => Self::U16,
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            "I32" => Self::I32,
            "U32" => Self::U32,
            "F32" => Self::F32,
            "C64" => Self::C64,
            "F64" => Self::F64,
            "I64" => Self::I64,
            "U64" => Self::U64,
            other => Self::Other(other.to_owned()),
        }
    }

    /// The name used in a safetensors header.
    pub fn name(&self) -> &str {
        match self {
            Self::BOOL => "BOOL",
            Self::F4 => "F4",
            Self::F6_E2M3 => "F6_E2M3",
            Self::F6_E3M2 => "F6_E3M2",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8_E5M2 => "F8_E5M2",
            Self::F8_E4M3 => "F8_E4M3",
            Self::F8_E8M0 => "F8_E8M0",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::C64 => "C64",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
            Self::Other(name) => name,
        }
    }

    /// Bits of one element, or `None` for a type this crate does not know.
    pub fn bits(&self) -> Option<u64> {
        Some(match self {
            Self::F4 => 4,
            Self::F6_E2M3 | Self::F6_E3M2 => 6,
            Self::BOOL | Self::U8 | Self::I8 | Self::F8_E5M2 | Self::F8_E4M3 | Self::F8_E8M0 => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 64,
            Self::Other(_) => return None,
        })
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Elements over all tensors; a sum that no memory could hold saturates.
pub fn total_elements<'a>(tensors: impl IntoIterator<Item = &'a TensorInfo>) -> u64 {
    tensors.into_iter().fold(0, |sum, tensor| sum.saturating_add(tensor.elements()))
}

/// One tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the header, for example `encoder.layer.0.attention.self.query.weight`.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first; empty for a scalar.
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the file's data section.
    pub offset_bytes: u64,
    /// Length in bytes.
    pub length_bytes: u64,
}

impl TensorInfo {
    /// Number of elements: the product of the dimensions, 1 for a scalar, 0 if any dimension is 0.
    ///
    /// The header parser has checked that the product fits.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}
