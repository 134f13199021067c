//! Residual vector quantization (Table 15, Appendix G.5): codebooks trained on the checkpoint's own weights, each run scaled
//! to its root mean square, and every vector coded by the nearest codeword of each stage in turn.
//!
//! How long vectors are, and so the rate, is decided in `encode::vectors`.

use std::sync::Arc;

use rayon::prelude::*;

use super::symbols::RunLayout;
use crate::codec::vector_quantizer::{Codebook, VectorQuantizer};

/// Rounds of k-means: the error of later ones falls by less than a thousandth.
const ROUNDS: usize = 12;
/// Vectors that a codeword is trained on, on average.
pub const VECTORS_PER_CODEWORD: usize = 48;
/// Seed of the codewords that training starts from: the same checkpoint gives the same archive.
const SEED: u64 = 1;

/// A codebook as it is searched: element by element, so that codewords are compared side by side.
struct Search {
    codewords: usize,
    /// `[elements, codewords]`.
    transposed: Vec<f32>,
}

impl Search {
    fn new(elements: usize, codewords: &[f32]) -> Self {
        let count = codewords.len() / elements;
        let transposed =
            (0..elements).flat_map(|element| (0..count).map(move |word| codewords[word * elements + element]));
        Self { codewords: count, transposed: transposed.collect() }
    }

    /// The nearest codeword to a vector, of which the end may be missing, and the squared distance. The first of equals.
    fn nearest(&self, vector: &[f32], distances: &mut Vec<f32>) -> (u32, f32) {
        distances.clear();
        distances.resize(self.codewords, 0.0);
        for (&value, codewords) in vector.iter().zip(self.transposed.chunks_exact(self.codewords)) {
            for (distance, codeword) in distances.iter_mut().zip(codewords) {
                *distance += (value - codeword) * (value - codeword);
            }
        }
        let mut nearest = (0, f32::INFINITY);
        for (index, &distance) in distances.iter().enumerate() {
            if distance < nearest.1 {
                nearest = (index as u32, distance);
            }
        }
        nearest
    }

    /// The nearest codeword of each of many vectors.
    fn nearest_of_all(&self, vectors: &[f32], elements: usize) -> Vec<(u32, f32)> {
        vectors.par_chunks(elements).map_init(Vec::new, |distances, vector| self.nearest(vector, distances)).collect()
    }
}

/// Trained codebooks and the error they leave.
pub struct Trained {
    /// Both stages.
    pub quantizer: VectorQuantizer,
    /// Mean squared error of what they were trained on.
    pub squared_error: f64,
}

/// Trains both stages on vectors of normalised values, `[vectors, elements]`: the first on them, the second on what is left.
///
/// Panics where there are fewer vectors than codewords.
pub fn train(vectors: &[f32], elements: usize, index_bits: u32) -> Trained {
    let mut left = vectors.to_vec();
    let mut squared_error = 0.0;
    let stages = std::array::from_fn(|stage| {
        let codebook = Codebook::new(elements, &k_means(&left, elements, 1 << index_bits, SEED + stage as u64));
        let nearest = Search::new(elements, codebook.values()).nearest_of_all(&left, elements);
        for (vector, &(index, _)) in left.chunks_mut(elements).zip(&nearest) {
            for (value, codeword) in vector.iter_mut().zip(codebook.codeword(index)) {
                *value -= codeword;
            }
        }
        squared_error = nearest.iter().map(|&(_, distance)| f64::from(distance)).sum::<f64>() / left.len() as f64;
        Arc::new(codebook)
    });
    Trained { quantizer: VectorQuantizer::new(stages).expect("both were made for one length"), squared_error }
}

/// Codewords of least squared error, as near as Lloyd's algorithm comes from seeded vectors. Sums are taken in the order of
/// the vectors, so that they do not depend on the number of threads.
fn k_means(vectors: &[f32], elements: usize, count: usize, seed: u64) -> Vec<f32> {
    let start = fastrand::Rng::with_seed(seed).choose_multiple(vectors.chunks_exact(elements), count);
    assert_eq!(start.len(), count, "there are as many vectors as codewords at least");
    let mut codewords: Vec<f32> = start.concat();
    for _ in 0..ROUNDS {
        let nearest = Search::new(elements, &codewords).nearest_of_all(vectors, elements);
        let mut sums = vec![0.0_f64; codewords.len()];
        let mut members = vec![0_u32; count];
        for (vector, &(index, _)) in vectors.chunks_exact(elements).zip(&nearest) {
            members[index as usize] += 1;
            for (sum, &value) in sums[index as usize * elements..].iter_mut().zip(vector) {
                *sum += f64::from(value);
            }
        }
        // A codeword that nothing is near to stays where it is.
        let of_words = codewords.chunks_exact_mut(elements).zip(sums.chunks_exact(elements)).zip(&members);
        for ((codeword, sums), &members) in of_words.filter(|(_, members)| **members > 0) {
            for (value, sum) in codeword.iter_mut().zip(sums) {
                *value = (sum / f64::from(members)) as f32;
            }
        }
    }
    codewords
}

/// The strips of a part's indices, and the squared error in weight units.
pub struct VectorStrips {
    /// One after another.
    pub strips: Vec<Vec<u8>>,
    /// Sum over all elements.
    pub squared_error: f64,
}

/// Quantizes values, each run in units of its step.
pub fn quantize(
    values: &[f32],
    layout: RunLayout,
    quantizer: &VectorQuantizer,
    step_of_run: &(dyn Fn(usize) -> f32 + Sync),
) -> VectorStrips {
    let elements = quantizer.elements();
    let searches = quantizer.stages().each_ref().map(|codebook| Search::new(elements, codebook.values()));
    let quantize_run = |run: usize| {
        let step = step_of_run(run);
        let mut left: Vec<f32> = values[layout.run_range(run)].iter().map(|value| value / step).collect();
        let mut distances = Vec::new();
        let mut squared_error = 0.0;
        let indices: Vec<[u32; 2]> = (left.chunks_mut(elements))
            .map(|vector| {
                let mut last = 0.0;
                let indices = std::array::from_fn(|stage| {
                    let (index, distance) = searches[stage].nearest(vector, &mut distances);
                    for (value, codeword) in vector.iter_mut().zip(quantizer.stages()[stage].codeword(index)) {
                        *value -= codeword;
                    }
                    last = distance;
                    index
                });
                squared_error += f64::from(last);
                indices
            })
            .collect();
        let mut stored = Vec::with_capacity(quantizer.bytes_of_run(left.len()));
        quantizer.write_run(&indices, &mut stored);
        (stored, squared_error * f64::from(step).powi(2))
    };
    let strips: Vec<(Vec<u8>, f64)> = (0..layout.strips())
        .into_par_iter()
        .map(|strip| {
            let (runs, errors): (Vec<Vec<u8>>, Vec<f64>) = layout.strip_runs(strip).map(quantize_run).unzip();
            (runs.concat(), errors.iter().sum())
        })
        .collect();
    let squared_error = strips.iter().map(|(_, error)| error).sum();
    VectorStrips { strips: strips.into_iter().map(|(strip, _)| strip).collect(), squared_error }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gaussian numbers of unit variance.
    fn noise(count: usize) -> Vec<f32> {
        let mut random = fastrand::Rng::with_seed(5);
        (0..count).map(|_| (0..12).map(|_| random.f32()).sum::<f32>() - 6.0).collect()
    }

    #[test]
    fn two_stages_leave_less_than_one_and_no_less_than_the_bound() {
        let values = noise(4 * 8192);
        let layout = RunLayout::of_shape(&[32, 1024], None);
        let trained = train(&values[..4 * 4096], 4, 6);
        let quantized = quantize(&values, layout, &trained.quantizer, &|_| 1.0);
        let error = quantized.squared_error / values.len() as f64;
        let bound = 2.0_f64.powi(-2 * 12 / 4); // Gaussian, three bits an element
        assert!(error > bound && error < 3.0 * bound, "{error}, the bound is {bound}");
        assert!((error / trained.squared_error - 1.0).abs() < 0.3, "{error} and {}", trained.squared_error);
    }

    #[test]
    fn the_error_said_is_that_of_the_points_written() {
        let values = noise(1000);
        let layout = RunLayout { elements: 1000, run_elements: 90, runs_per_strip: 3, lanes: 1 };
        let trained = train(&values[..999], 3, 4);
        let steps = |run: usize| 1.0 + run as f32;
        let scaled: Vec<f32> = values.iter().enumerate().map(|(at, value)| value * steps(at / 90)).collect();
        let quantized = quantize(&scaled, layout, &trained.quantizer, &steps);
        let mut rest = &*quantized.strips.concat();
        let mut error = 0.0;
        for run in 0..layout.runs() {
            let values = &scaled[layout.run_range(run)];
            let mut points = vec![0.0; values.len()];
            let (stored, later) = rest.split_at(trained.quantizer.bytes_of_run(values.len()));
            trained.quantizer.points_of_run(stored, &mut points);
            rest = later;
            error += values
                .iter()
                .zip(&points)
                .map(|(value, point)| f64::from(value - point * steps(run)).powi(2))
                .sum::<f64>();
        }
        assert!(rest.is_empty() && (error / quantized.squared_error - 1.0).abs() < 1e-4, "{error}");
    }
}
