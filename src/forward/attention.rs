//! Attention of every head of every sequence.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

use super::operations::Rotary;

/// What attention needs beside its projections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub heads: usize,
    /// Keys and values that several queries share.
    pub key_value_heads: usize,
    /// Width of a head.
    pub width: usize,
    pub rotary: Option<Rotary>,
    pub is_causal: bool,
    /// Positions that a token sees back, itself counted.
    pub window: Option<usize>,
}

/// Queries, keys and values as they were projected.
pub(super) enum Projected {
    /// `[tokens, heads * width]` each.
    Split([Array2<f32>; 3]),
    /// `[tokens, heads * 3 * width]`: of each head its query, key and value.
    PerHead(Array2<f32>),
}

impl Projected {
    /// The rows of one head: 0 queries, 1 keys, 2 values.
    fn head(&self, which: usize, head: usize, width: usize, tokens: &Range<usize>) -> ArrayView2<'_, f32> {
        let (rows, first) = match self {
            Self::Split(projected) => (&projected[which], head * width),
            Self::PerHead(projected) => (projected, (3 * head + which) * width),
        };
        rows.slice(s![tokens.clone(), first..first + width])
    }
}

impl Attention {
    /// What every token gathers: `[tokens, heads * width]`. Sequences do not see one another.
    pub(super) fn apply(&self, projected: &Projected, sequences: &[Range<usize>]) -> Array2<f32> {
        let tokens = sequences.last().map_or(0, |sequence| sequence.end);
        let of_sequences: Vec<Array2<f32>> =
            sequences.par_iter().map(|sequence| self.of_sequence(projected, sequence)).collect();
        let mut gathered = Array2::zeros((tokens, self.heads * self.width));
        for (sequence, rows) in sequences.iter().zip(of_sequences) {
            gathered.slice_mut(s![sequence.clone(), ..]).assign(&rows);
        }
        gathered
    }

    fn of_sequence(&self, projected: &Projected, sequence: &Range<usize>) -> Array2<f32> {
        let width = self.width;
        let mut gathered = Array2::zeros((sequence.len(), self.heads * width));
        let rotated = |which, head| {
            let mut rows = projected.head(which, head, width, sequence).to_owned();
            if let Some(rotary) = self.rotary {
                rotary.rotate(rows.view_mut());
            }
            rows
        };
        let keys: Vec<Array2<f32>> = (0..self.key_value_heads).map(|head| rotated(1, head)).collect();
        for head in 0..self.heads {
            let shared = head / (self.heads / self.key_value_heads);
            let mut scores = rotated(0, head).dot(&keys[shared].t());
            scores *= 1.0 / (width as f32).sqrt();
            for (position, mut row) in scores.rows_mut().into_iter().enumerate() {
                let last = if self.is_causal { position + 1 } else { sequence.len() };
                let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let seen = || first..last;
                let greatest = seen().map(|key| row[key]).fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for (key, score) in row.iter_mut().enumerate() {
                    *score = if seen().contains(&key) { (*score - greatest).exp() } else { 0.0 };
                    sum += *score;
                }
                row /= sum;
            }
            let values = projected.head(2, shared, width, sequence);
            gathered.slice_mut(s![.., head * width..(head + 1) * width]).assign(&scores.dot(&values));
        }
        gathered
    }
}
