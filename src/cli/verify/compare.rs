//! Compares decoded bytes with the original's as they go by: bit for bit, and by relative squared error where they differ.

use serde::Serialize;

use crate::cli::decoded::TensorCursor;
use crate::numerics::{f32_from_bf16, f32_from_f16};
use crate::tensor::{Dtype, TensorInfo};

/// How one tensor differs from the original's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorDifference {
    /// Name of the tensor.
    pub tensor: String,
    /// Sum of squared errors over the sum of squared original values; infinite (in JSON:
    /// null) where a value that is not finite changed, absent for types without an error, such as integers.
    pub relative_squared_error: Option<f64>,
}

/// Follows two byte streams of one file.
pub struct Comparison<'a> {
    tensors: &'a [TensorInfo],
    cursor: TensorCursor<'a>,
    header_equal: bool,
    current: Option<TensorError>,
    differences: Vec<TensorDifference>,
}

impl<'a> Comparison<'a> {
    /// Starts before the first byte.
    pub fn new(header_bytes: u64, tensors: &'a [TensorInfo]) -> Self {
        let cursor = TensorCursor::new(header_bytes, tensors);
        Self { tensors, cursor, header_equal: true, current: None, differences: Vec::new() }
    }

    /// Takes the next bytes of both.
    pub fn feed(&mut self, decoded: &[u8], original: &[u8]) {
        assert_eq!(decoded.len(), original.len(), "both streams advance alike");
        let mut position = 0;
        while let Some(piece) = self.cursor.next(decoded.len() - position) {
            let range = position..position + piece.length;
            position = range.end;
            let Some(tensor) = piece.tensor else {
                self.header_equal &= decoded[range.clone()] == original[range];
                continue;
            };
            if self.current.as_ref().is_none_or(|current| current.tensor != tensor) {
                self.close_tensor();
                self.current = Some(TensorError::new(tensor, &self.tensors[tensor].dtype));
            }
            let current = self.current.as_mut().expect("set above");
            current.feed(&decoded[range.clone()], &original[range]);
        }
    }

    fn close_tensor(&mut self) {
        let Some(closed) = self.current.take().filter(|closed| closed.differs) else { return };
        let relative_squared_error = closed.relative();
        self.differences
            .push(TensorDifference { tensor: self.tensors[closed.tensor].name.clone(), relative_squared_error });
    }

    /// Whether the headers are equal, and the tensors that are not.
    pub fn finish(mut self) -> (bool, Vec<TensorDifference>) {
        self.close_tensor();
        (self.header_equal, self.differences)
    }
}

/// The error of one tensor so far.
struct TensorError {
    tensor: usize,
    dtype: Dtype,
    differs: bool,
    squared_error: f64,
    energy: f64,
    /// The first bytes of an element whose last bytes are yet to come, decoded and original.
    pending: (Vec<u8>, Vec<u8>),
}

impl TensorError {
    fn new(tensor: usize, dtype: &Dtype) -> Self {
        let dtype = dtype.clone();
        Self { tensor, dtype, differs: false, squared_error: 0.0, energy: 0.0, pending: (Vec::new(), Vec::new()) }
    }

    fn feed(&mut self, mut decoded: &[u8], mut original: &[u8]) {
        self.differs |= decoded != original;
        let Some(size) = float_bytes(&self.dtype) else { return };
        if !self.pending.0.is_empty() {
            let missing = (size - self.pending.0.len()).min(decoded.len());
            self.pending.0.extend_from_slice(&decoded[..missing]);
            self.pending.1.extend_from_slice(&original[..missing]);
            (decoded, original) = (&decoded[missing..], &original[missing..]);
            if self.pending.0.len() < size {
                return;
            }
            let (a, b) = std::mem::take(&mut self.pending);
            self.add(&a, &b);
        }
        let whole = decoded.len() / size * size;
        for (a, b) in decoded[..whole].chunks_exact(size).zip(original[..whole].chunks_exact(size)) {
            self.add(a, b);
        }
        self.pending = (decoded[whole..].to_vec(), original[whole..].to_vec());
    }

    fn add(&mut self, decoded: &[u8], original: &[u8]) {
        let reference = float(&self.dtype, original);
        if reference.is_finite() {
            self.energy += reference * reference;
        }
        if decoded != original {
            let error = float(&self.dtype, decoded) - reference;
            self.squared_error += if error.is_finite() { error * error } else { f64::INFINITY };
        }
    }

    fn relative(&self) -> Option<f64> {
        float_bytes(&self.dtype)?;
        // -0.0 for 0.0 is a difference without an error.
        Some(if self.squared_error == 0.0 { 0.0 } else { self.squared_error / self.energy })
    }
}

/// Bytes of an element of a type whose error means something.
fn float_bytes(dtype: &Dtype) -> Option<usize> {
    match dtype {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

fn float(dtype: &Dtype, bytes: &[u8]) -> f64 {
    match *bytes {
        [a, b] if *dtype == Dtype::BF16 => f32_from_bf16(u16::from_le_bytes([a, b])).into(),
        [a, b] => f32_from_f16(u16::from_le_bytes([a, b])).into(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).into(),
        _ => f64::from_le_bytes(bytes.try_into().expect("eight bytes: no other size is fed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: Dtype, elements: u64, offset_bytes: u64) -> TensorInfo {
        let length_bytes = elements * dtype.bits().expect("a known type") / 8;
        TensorInfo { name: name.into(), dtype, shape: vec![elements], offset_bytes, length_bytes }
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn the_error_of_a_tensor_is_the_same_however_its_bytes_are_cut() {
        let tensors = [tensor("a", Dtype::F32, 3, 0), tensor("b", Dtype::F32, 2, 12), tensor("n", Dtype::I32, 1, 20)];
        let original = [b"headhead".to_vec(), floats(&[3.0, 4.0, 0.0]), floats(&[1.0, 1.0]), vec![0; 4]].concat();
        let decoded = [b"headhead".to_vec(), floats(&[3.0, 4.5, 0.0]), floats(&[1.0, 1.0]), vec![1; 4]].concat();
        let expected = vec![
            TensorDifference { tensor: "a".into(), relative_squared_error: Some(0.25 / 25.0) },
            TensorDifference { tensor: "n".into(), relative_squared_error: None },
        ];
        for cut in 1..=decoded.len() {
            let mut comparison = Comparison::new(8, &tensors);
            for (a, b) in decoded.chunks(cut).zip(original.chunks(cut)) {
                comparison.feed(a, b);
            }
            assert_eq!(comparison.finish(), (true, expected.clone()), "pieces of {cut} bytes");
        }
    }

    #[test]
    fn a_value_that_is_not_finite_may_not_change() {
        let tensors = [tensor("a", Dtype::F32, 2, 0)];
        let error_of = |decoded: &[f32], original: &[f32]| {
            let mut comparison = Comparison::new(0, &tensors);
            comparison.feed(&floats(decoded), &floats(original));
            comparison.finish().1.first().and_then(|difference| difference.relative_squared_error)
        };
        assert_eq!(error_of(&[1.0, f32::NAN], &[1.0, f32::NAN]), None, "the same bits");
        assert_eq!(error_of(&[1.0, f32::INFINITY], &[1.0, f32::NAN]), Some(f64::INFINITY));
        assert_eq!(error_of(&[1.0, 7.0], &[1.0, f32::INFINITY]), Some(f64::INFINITY));
        assert_eq!(error_of(&[0.0, 1.0], &[-0.0, 1.0]), Some(0.0));
    }

    #[test]
    fn a_changed_header_is_seen() {
        let mut comparison = Comparison::new(2, &[]);
        comparison.feed(b"ab", b"ac");
        assert_eq!(comparison.finish(), (false, vec![]));
    }
}
