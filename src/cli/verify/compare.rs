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
    /// Sum of squared errors over the sum of squared original values; infinite (in JSON: null) where a value that is not
    /// finite changed, absent for types without an error, such as integers.
    pub relative_squared_error: Option<f64>,
}

/// Squared error and energy of one tensor or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SquaredError {
    /// Sum of squared differences; infinite where a value that is not finite changed.
    pub error: f64,
    /// Sum of squared original values.
    pub energy: f64,
}

impl SquaredError {
    /// Error over energy; 0 where there is no error.
    pub fn relative(self) -> f64 {
        // -0.0 for 0.0 is a difference without an error.
        if self.error == 0.0 { 0.0 } else { self.error / self.energy }
    }

    /// Both sums go on.
    pub fn add(&mut self, other: Self) {
        self.error += other.error;
        self.energy += other.energy;
    }
}

/// What a comparison found.
#[derive(Debug, PartialEq)]
pub struct Compared {
    /// Whether the headers are the same bytes.
    pub header_equal: bool,
    /// Tensors that are not the same bytes.
    pub differences: Vec<TensorDifference>,
    /// Per tensor of a float type that has elements, in the order of the data: its number and its error.
    pub errors: Vec<(usize, SquaredError)>,
}

/// Follows two byte streams of one file.
pub struct Comparison<'a> {
    tensors: &'a [TensorInfo],
    cursor: TensorCursor<'a>,
    current: Option<TensorError>,
    compared: Compared,
}

impl<'a> Comparison<'a> {
    /// Starts before the first byte.
    pub fn new(header_bytes: u64, tensors: &'a [TensorInfo]) -> Self {
        let cursor = TensorCursor::new(header_bytes, tensors);
        let compared = Compared { header_equal: true, differences: Vec::new(), errors: Vec::new() };
        Self { tensors, cursor, current: None, compared }
    }

    /// Takes the next bytes of both.
    pub fn feed(&mut self, decoded: &[u8], original: &[u8]) {
        assert_eq!(decoded.len(), original.len(), "both streams advance alike");
        let mut position = 0;
        while let Some(piece) = self.cursor.next(decoded.len() - position) {
            let range = position..position + piece.length;
            position = range.end;
            let Some(tensor) = piece.tensor else {
                self.compared.header_equal &= decoded[range.clone()] == original[range];
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
        let Some(closed) = self.current.take() else { return };
        let info = &self.tensors[closed.tensor];
        let error = float_bytes(&info.dtype).map(|_| closed.sums);
        if let Some(error) = error {
            self.compared.errors.push((closed.tensor, error));
        }
        if closed.differs {
            let relative_squared_error = error.map(SquaredError::relative);
            self.compared.differences.push(TensorDifference { tensor: info.name.clone(), relative_squared_error });
        }
    }

    /// What was found.
    pub fn finish(mut self) -> Compared {
        self.close_tensor();
        self.compared
    }
}

/// The error of one tensor so far.
struct TensorError {
    tensor: usize,
    dtype: Dtype,
    differs: bool,
    sums: SquaredError,
    /// The first bytes of an element whose last bytes are yet to come, decoded and original.
    pending: (Vec<u8>, Vec<u8>),
}

impl TensorError {
    fn new(tensor: usize, dtype: &Dtype) -> Self {
        let dtype = dtype.clone();
        Self { tensor, dtype, differs: false, sums: SquaredError::default(), pending: (Vec::new(), Vec::new()) }
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
            self.sums.energy += reference * reference;
        }
        if decoded != original {
            let error = float(&self.dtype, decoded) - reference;
            self.sums.error += if error.is_finite() { error * error } else { f64::INFINITY };
        }
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
            let compared = comparison.finish();
            assert!(compared.header_equal);
            assert_eq!(compared.differences, expected, "pieces of {cut} bytes");
            let errors =
                [(0, SquaredError { error: 0.25, energy: 25.0 }), (1, SquaredError { error: 0.0, energy: 2.0 })];
            assert_eq!(compared.errors, errors, "pieces of {cut} bytes");
        }
    }

    #[test]
    fn a_value_that_is_not_finite_may_not_change() {
        let tensors = [tensor("a", Dtype::F32, 2, 0)];
        let error_of = |decoded: &[f32], original: &[f32]| {
            let mut comparison = Comparison::new(0, &tensors);
            comparison.feed(&floats(decoded), &floats(original));
            comparison.finish().differences.first().and_then(|difference| difference.relative_squared_error)
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
        assert!(!comparison.finish().header_equal);
    }
}
