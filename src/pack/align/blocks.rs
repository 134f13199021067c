//! The blocks of a record as vectors (vec in Eq. 1), made from its tensors a few at a time.
//!
//! A record of a large model does not fit in memory as f32, so the tensors stay as they are, mapped, and blocks become
//! vectors when they are asked for. The order of a vector's elements is arbitrary but the same in every layer.

use half::{bf16, f16};
use ndarray::{Array2, ArrayViewMut1, s};

use crate::codec::blocks::{AxisLayout, BlocksError, Placement, Symmetry};
use crate::codec::permutation::PermutationError;
use crate::tensor::{Dtype, TensorInfo};

/// Why tensors have no blocks to be compared.
#[derive(Debug, thiserror::Error)]
pub enum VectorsError {
    /// Not floating-point numbers that this crate reads.
    #[error("tensor `{tensor}`: dtype {dtype}: expected F32, F16, BF16 or F64")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// The bytes are not those of the shape.
    #[error("tensor `{tensor}`: {found} bytes, expected {expected}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Bytes given.
        found: usize,
        /// Bytes of its shape.
        expected: u64,
    },
    /// The placement does not fit the tensor.
    #[error("tensor `{tensor}`: {source}")]
    Blocks {
        /// The tensor.
        tensor: String,
        /// What does not fit.
        source: BlocksError,
    },
    /// The symmetry is out of bounds.
    #[error(transparent)]
    Symmetry(#[from] PermutationError),
    /// No matrix has blocks.
    #[error("no tensor of two or more dimensions has blocks")]
    Empty,
}

/// The blocks of one record: groups, and the members of groups where a group has more than one.
#[derive(Clone, Debug)]
pub struct BlockVectors<'a> {
    symmetry: Symmetry,
    /// Tensors whose blocks are the groups.
    group_parts: Vec<Part<'a>>,
    /// Tensors whose blocks are the members.
    member_parts: Vec<Part<'a>>,
    /// Seed of the Gaussian numbers that stand in for the weights.
    control: Option<u64>,
    /// Whether products and not cosines are compared.
    compares_energies: bool,
    /// What blocks do on calibration inputs, `[groups, summary]`, and what weights count beside it.
    activations: Option<(f32, &'a Array2<f32>)>,
    /// Which elements of each vector are left.
    half: Option<Half>,
}

/// Every second element of a vector, so that one half can be judged by what was found on the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Those that something is fitted to: the first, the third and so on.
    Fitted,
    /// The others.
    HeldOut,
}

/// Which blocks: groups, or members one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Groups,
    Members,
}

#[derive(Clone, Debug)]
struct Part<'a> {
    bytes: &'a [u8],
    dtype: FloatType,
    layout: AxisLayout,
    placement: Placement,
    blocks: u32,
}

#[derive(Clone, Copy, Debug)]
enum FloatType {
    F32,
    F16,
    Bf16,
    F64,
}

impl<'a> BlockVectors<'a> {
    /// The blocks of the tensors that have a placement; biases (one dimension) are left out.
    ///
    /// # Errors
    /// When a tensor is not of floating-point numbers or does not fit its placement, or nothing is left.
    pub fn new(
        symmetry: Symmetry,
        parts: impl IntoIterator<Item = (&'a TensorInfo, Placement, &'a [u8])>,
    ) -> Result<Self, VectorsError> {
        symmetry.blocks()?;
        let mut vectors = Self {
            symmetry,
            group_parts: Vec::new(),
            member_parts: Vec::new(),
            control: None,
            half: None,
            compares_energies: false,
            activations: None,
        };
        for (info, placement, bytes) in parts {
            if info.shape.len() < 2 {
                continue;
            }
            let part = Part::new(symmetry, info, placement, bytes)?;
            let parts = if part.placement.per_member { &mut vectors.member_parts } else { &mut vectors.group_parts };
            parts.push(part);
        }
        if vectors.group_parts.is_empty() && vectors.member_parts.is_empty() {
            return Err(VectorsError::Empty);
        }
        Ok(vectors)
    }

    /// The same shapes with Gaussian numbers, as large in each block and tensor as the weights there: what similarity
    /// looks like where there is none.
    #[must_use]
    pub fn gaussian_control(self, seed: u64) -> Self {
        Self { control: Some(seed), ..self }
    }

    /// The same, compared by products in place of cosines. Of all permutations the one with the greatest sum of products
    /// leaves the least energy after a scaled copy, whatever its gain: that is residual-energy alignment (section 4.3), and
    /// fitting the gain again does not change it.
    #[must_use]
    pub fn by_energy(self) -> Self {
        Self { compares_energies: true, ..self }
    }

    /// The same with what the groups do on calibration inputs, `[groups, summary]`; weights count `weight` of 1.
    #[must_use]
    pub fn with_activations(self, weight: f32, activations: &'a Array2<f32>) -> Self {
        Self { activations: Some((weight, activations)), ..self }
    }

    pub(super) fn compares_energies(&self) -> bool {
        self.compares_energies
    }

    pub(super) fn activations(&self) -> Option<(f32, &Array2<f32>)> {
        self.activations
    }

    /// The same blocks with half of their elements.
    #[must_use]
    pub fn half(self, half: Half) -> Self {
        Self { half: Some(half), ..self }
    }

    /// Which permutations are allowed.
    pub fn symmetry(&self) -> Symmetry {
        self.symmetry
    }

    /// Weights in all blocks together.
    pub fn weights(&self) -> u64 {
        let of_group = self.width(Level::Groups) + self.symmetry.members as usize * self.width(Level::Members);
        u64::from(self.symmetry.groups) * of_group as u64
    }

    /// Elements of one vector.
    pub(super) fn width(&self, level: Level) -> usize {
        let whole = self.whole_width(level);
        match self.half {
            None => whole,
            Some(Half::Fitted) => whole.div_ceil(2),
            Some(Half::HeldOut) => whole / 2,
        }
    }

    fn whole_width(&self, level: Level) -> usize {
        self.parts(level).iter().map(Part::width).sum()
    }

    /// The vectors of these blocks: `[indices, width]`. Weights that are not finite count as 0.
    pub(super) fn rows(&self, level: Level, indices: &[u32]) -> Array2<f32> {
        let whole = self.whole_width(level);
        let mut rows = Array2::zeros((indices.len(), whole));
        let mut start = 0;
        for (number, part) in self.parts(level).iter().enumerate() {
            let end = start + part.width();
            let elements = rows.as_slice_mut().expect("in rows");
            part.fill(indices, |row, offset, values| {
                let target = &mut elements[row * whole + start + offset..][..values.len()];
                for (element, value) in target.iter_mut().zip(values) {
                    *element = if value.is_finite() { *value } else { 0.0 };
                }
            });
            if let Some(seed) = self.control {
                let mut columns = rows.slice_mut(s![.., start..end]);
                for (row, &index) in columns.rows_mut().into_iter().zip(indices) {
                    let stream = (number as u64) << 32 | u64::from(index);
                    replace_by_gaussian(row, fastrand::Rng::with_seed(mix(seed ^ mix(stream))));
                }
            }
            start = end;
        }
        match self.half {
            None => rows,
            Some(half) => rows.slice(s![.., if half == Half::Fitted { 0 } else { 1 }..;2]).to_owned(),
        }
    }

    fn parts(&self, level: Level) -> &[Part<'a>] {
        match level {
            Level::Groups => &self.group_parts,
            Level::Members => &self.member_parts,
        }
    }
}

impl<'a> Part<'a> {
    fn new(symmetry: Symmetry, info: &TensorInfo, placement: Placement, bytes: &'a [u8]) -> Result<Self, VectorsError> {
        let tensor = || info.name.clone();
        let dtype = match info.dtype {
            Dtype::F32 => FloatType::F32,
            Dtype::F16 => FloatType::F16,
            Dtype::BF16 => FloatType::Bf16,
            Dtype::F64 => FloatType::F64,
            ref dtype => return Err(VectorsError::Dtype { tensor: tensor(), dtype: dtype.clone() }),
        };
        if bytes.len() as u64 != info.length_bytes {
            return Err(VectorsError::Length { tensor: tensor(), found: bytes.len(), expected: info.length_bytes });
        }
        let layout = placement
            .check(symmetry, &info.shape)
            .and_then(|()| AxisLayout::new(&info.shape, placement.axis))
            .map_err(|source| VectorsError::Blocks { tensor: tensor(), source })?;
        let blocks = placement.blocks(symmetry);
        // Groups of one are their members: one kind of block is enough.
        let placement = Placement { per_member: placement.per_member && symmetry.members > 1, ..placement };
        Ok(Self { bytes, dtype, layout, placement, blocks })
    }

    /// Elements of one block.
    fn width(&self) -> usize {
        let AxisLayout { outer, inner, .. } = self.layout;
        outer * inner * self.placement.repeat as usize * self.placement.unit as usize
    }

    /// Calls `place(row, offset in the vector, values)` with consecutive elements until all blocks of `indices` are
    /// complete; walks through the tensor once from front to back.
    fn fill(&self, indices: &[u32], mut place: impl FnMut(usize, usize, &[f32])) {
        let (repeat, blocks) = (self.placement.repeat as usize, self.blocks as usize);
        let run = self.placement.unit as usize * self.layout.inner;
        let mut values = vec![0.0; run];
        for outer in 0..self.layout.outer * repeat {
            for (row, &index) in indices.iter().enumerate() {
                let first = (outer * blocks + index as usize) * run;
                self.read(first, &mut values);
                place(row, outer * run, &values);
            }
        }
    }

    /// The elements from `first` on.
    fn read(&self, first: usize, values: &mut [f32]) {
        match self.dtype {
            FloatType::F32 => convert(self.bytes, first, values, f32::from_le_bytes),
            FloatType::F16 => convert(self.bytes, first, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
            FloatType::Bf16 => convert(self.bytes, first, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            FloatType::F64 => convert(self.bytes, first, values, |bytes| f64::from_le_bytes(bytes) as f32),
        }
    }
}

fn convert<const N: usize>(bytes: &[u8], first: usize, values: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes[first * N..(first + values.len()) * N].as_chunks();
    for (value, &element) in values.iter_mut().zip(elements) {
        *value = read(element);
    }
}

/// Gaussian numbers with the energy of the row.
fn replace_by_gaussian(mut row: ArrayViewMut1<'_, f32>, mut chance: fastrand::Rng) {
    let energy: f64 = row.iter().map(|&value| f64::from(value).powi(2)).sum();
    let deviation = (energy / row.len().max(1) as f64).sqrt();
    for value in &mut row {
        // Box and Muller; 1 - f64() is never 0.
        let radius = (-2.0 * (1.0 - chance.f64()).ln()).sqrt();
        *value = (deviation * radius * (std::f64::consts::TAU * chance.f64()).cos()) as f32;
    }
}

/// Spreads neighbouring seeds apart (the finalizer of SplitMix64).
fn mix(seed: u64) -> u64 {
    let mut bits = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}
