//! Matrices by rows, in vectors, and the sweeps over a tall one that subspace iteration consists of: the coordinates of its
//! rows along some directions, and the directions that rows with such coordinates add up to.
//!
//! All sums are single binary32 operations in an order that depends on no instruction set and no number of threads.

use rayon::prelude::*;

use super::levels::{Work, run};

/// Numbers of a vector.
pub const LANES: usize = 16;
/// Rows that go through a sweep together: directions are loaded once for all of them.
const GROUP: usize = 4;
/// Groups are shared out in so many pieces at most: each has sums of its own.
const PIECES: usize = 8;
/// Groups of a piece at least.
const LEAST_GROUPS: usize = 8;

/// A vector.
pub type Vector = [f32; LANES];

/// The coordinates of a group of rows, by direction.
type Coordinates = Vec<[f32; GROUP]>;

/// A matrix by rows. Zeros lie behind the columns of a row, and as rows behind the last.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    vectors: Vec<Vector>,
}

/// A change of vectors on their way through [`Matrix::approach`], by where they lie in the matrix.
pub trait Approach: Sync {
    /// Gives a vector its new value: `product` is what the directions make of it.
    fn approach(&self, place: usize, product: &Vector, vector: &mut Vector);
}

impl Matrix {
    /// Zeros.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, vectors: vec![[0.0; LANES]; rows.next_multiple_of(GROUP) * vectors_of_row(columns)] }
    }

    /// Of numbers by row and column.
    pub fn of(rows: usize, columns: usize, mut value: impl FnMut(usize, usize) -> f32) -> Self {
        let mut matrix = Self::zeros(rows, columns);
        for row in 0..rows {
            let numbers = &mut matrix.row_mut(row).as_flattened_mut()[..columns];
            numbers.iter_mut().enumerate().for_each(|(column, number)| *number = value(row, column));
        }
        matrix
    }

    /// Of its numbers, row by row.
    pub fn of_numbers(rows: usize, columns: usize, numbers: &[f32]) -> Self {
        let mut matrix = Self::zeros(rows, columns);
        for (row, numbers) in numbers.chunks_exact(columns).take(rows).enumerate() {
            matrix.row_mut(row).as_flattened_mut()[..columns].copy_from_slice(numbers);
        }
        matrix
    }

    /// The numbers of a row, to be written.
    pub fn numbers_mut(&mut self, row: usize) -> &mut [f32] {
        let columns = self.columns;
        &mut self.row_mut(row).as_flattened_mut()[..columns]
    }

    /// The numbers of a row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.row_vectors(row).as_flattened()[..self.columns]
    }

    fn row_vectors(&self, row: usize) -> &[Vector] {
        let length = vectors_of_row(self.columns);
        &self.vectors[row * length..][..length]
    }

    fn row_mut(&mut self, row: usize) -> &mut [Vector] {
        let length = vectors_of_row(self.columns);
        &mut self.vectors[row * length..][..length]
    }

    /// Vectors by their places.
    pub fn vectors(&self) -> &[Vector] {
        &self.vectors
    }

    /// Sum of squares.
    pub fn energy(&self) -> f64 {
        self.vectors.as_flattened().iter().map(|&value| f64::from(value).powi(2)).sum()
    }

    /// Vectors of whole groups of rows that make a piece.
    fn vectors_of_piece(&self) -> usize {
        self.rows.div_ceil(GROUP).div_ceil(PIECES).max(LEAST_GROUPS) * GROUP * vectors_of_row(self.columns)
    }

    /// The coordinates of the rows along directions that are orthonormal, `[rows, directions]`.
    pub fn coordinates(&self, directions: &Self) -> Self {
        let length = GROUP * vectors_of_row(self.columns);
        let groups: Vec<Coordinates> =
            self.vectors.par_chunks(length).map(|group| measured(group, directions)).collect();
        Self::of(self.rows, directions.rows, |row, direction| groups[row / GROUP][direction][row % GROUP])
    }

    /// The sum of the rows, each times its coordinates along `directions`: what spans nearly all that rows along these have.
    pub fn gathered(&self, directions: &Self) -> Self {
        let length = GROUP * vectors_of_row(self.columns);
        let pieces = self.vectors.par_chunks(self.vectors_of_piece()).map(|piece| {
            let mut sums = Self::zeros(directions.rows, self.columns);
            for group in piece.chunks(length) {
                let coordinates = &measured(group, directions);
                run(Gather { group, coordinates, sums: &mut sums });
            }
            sums
        });
        sum(pieces.collect())
    }

    /// The same with rows that are changed first, by what the directions make of them.
    pub fn approach(&mut self, directions: &Self, approach: &impl Approach) -> Self {
        let length = GROUP * vectors_of_row(self.columns);
        let (piece_vectors, columns) = (self.vectors_of_piece(), self.columns);
        let pieces = self.vectors.par_chunks_mut(piece_vectors).enumerate().map(|(number, piece)| {
            let mut sums = Self::zeros(directions.rows, columns);
            for (group_number, group) in piece.chunks_mut(length).enumerate() {
                let coordinates = &measured(group, directions);
                let first = number * piece_vectors + group_number * length;
                run(Change { group, first, coordinates, directions, approach });
                run(Gather { group, coordinates, sums: &mut sums });
            }
            sums
        });
        sum(pieces.collect())
    }

    /// Sums of products of every two columns.
    pub fn gram(&self) -> Vec<Vec<f64>> {
        let mut sums = vec![vec![0.0; self.columns]; self.columns];
        for row in (0..self.rows).map(|row| self.row(row)) {
            for (sums, &a) in sums.iter_mut().zip(row) {
                for (sum, &b) in sums.iter_mut().zip(row) {
                    *sum += f64::from(a) * f64::from(b);
                }
            }
        }
        sums
    }

    /// Orthonormal rows with the same span, zeros where there are not as many (Gram-Schmidt, twice: once is not enough in 32
    /// bits).
    #[must_use]
    pub fn orthonormal(mut self) -> Self {
        let length = vectors_of_row(self.columns);
        for row in 0..self.rows {
            let (before, rest) = self.vectors.split_at_mut(row * length);
            run(Orthogonal { before, row: &mut rest[..length] });
        }
        self
    }

    /// The first rows.
    pub fn first_rows(&self, rows: usize) -> Self {
        Self::of(rows, self.columns, |row, column| self.row(row)[column])
    }

    /// The product with another matrix, for small ones.
    pub fn times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.rows, other.columns);
        for row in 0..self.rows {
            for (inner, &value) in self.row(row).iter().enumerate() {
                for (sums, others) in product.row_mut(row).iter_mut().zip(other.row_vectors(inner)) {
                    for lane in 0..LANES {
                        sums[lane] += value * others[lane];
                    }
                }
            }
        }
        product
    }

    /// The numbers by column and row.
    pub fn transposed(&self) -> Self {
        Self::of(self.columns, self.rows, |row, column| self.row(column)[row])
    }

    /// All numbers, row by row.
    pub fn numbers(&self) -> impl Iterator<Item = f32> {
        (0..self.rows).flat_map(|row| self.row(row).iter().copied())
    }
}

/// An odd number, so that rows do not crowd in a few lines of the cache.
fn vectors_of_row(columns: usize) -> usize {
    columns.div_ceil(LANES) | 1
}

fn sum(pieces: Vec<Matrix>) -> Matrix {
    let sums = pieces.into_iter().reduce(|mut sums, piece| {
        for (sum, other) in sums.vectors.as_flattened_mut().iter_mut().zip(piece.vectors.as_flattened()) {
            *sum += other;
        }
        sums
    });
    sums.expect("a matrix has rows")
}

fn measured(group: &[Vector], directions: &Matrix) -> Coordinates {
    let mut coordinates = vec![[0.0; GROUP]; directions.rows];
    run(Measure { group, directions, coordinates: &mut coordinates });
    coordinates
}

/// The four rows of a group.
fn rows_of(group: &[Vector]) -> [&[Vector]; GROUP] {
    let length = group.len() / GROUP;
    std::array::from_fn(|row| &group[row * length..][..length])
}

/// The coordinates of a group of rows.
struct Measure<'a> {
    group: &'a [Vector],
    directions: &'a Matrix,
    coordinates: &'a mut Coordinates,
}

impl Work for Measure<'_> {
    #[inline(always)]
    fn run(self) {
        let [a, b, c, d] = rows_of(self.group);
        for (direction, coordinates) in self.coordinates.iter_mut().enumerate() {
            // Each of its own, or compilers keep them in memory.
            let [mut of_a, mut of_b, mut of_c, mut of_d] = [[0.0; LANES]; GROUP];
            let direction = self.directions.row_vectors(direction);
            for ((((direction, a), b), c), d) in direction.iter().zip(a).zip(b).zip(c).zip(d) {
                for lane in 0..LANES {
                    of_a[lane] += direction[lane] * a[lane];
                    of_b[lane] += direction[lane] * b[lane];
                    of_c[lane] += direction[lane] * c[lane];
                    of_d[lane] += direction[lane] * d[lane];
                }
            }
            *coordinates = [of_a, of_b, of_c, of_d].map(|sums| sums.into_iter().sum());
        }
    }
}

/// Adds the rows of a group, times their coordinates, to `sums`.
struct Gather<'a> {
    group: &'a [Vector],
    coordinates: &'a Coordinates,
    sums: &'a mut Matrix,
}

impl Work for Gather<'_> {
    #[inline(always)]
    fn run(self) {
        let [a, b, c, d] = rows_of(self.group);
        for (direction, &[of_a, of_b, of_c, of_d]) in self.coordinates.iter().enumerate() {
            // Number by number, or compilers take the same lane of many vectors for one.
            let sums = self.sums.row_mut(direction).as_flattened_mut();
            let [a, b, c, d] = [a, b, c, d].map(<[Vector]>::as_flattened);
            for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                *sum = *sum + of_a * a + of_b * b + of_c * c + of_d * d;
            }
        }
    }
}

/// Changes the rows of a group by what directions make of their coordinates. `first` is the place of its first vector.
struct Change<'a, A> {
    group: &'a mut [Vector],
    first: usize,
    coordinates: &'a Coordinates,
    directions: &'a Matrix,
    approach: &'a A,
}

impl<A: Approach> Work for Change<'_, A> {
    #[inline(always)]
    fn run(self) {
        let length = self.group.len() / GROUP;
        for column in 0..length {
            let [mut a, mut b, mut c, mut d] = [[0.0; LANES]; GROUP];
            for (direction, &[of_a, of_b, of_c, of_d]) in self.coordinates.iter().enumerate() {
                let direction = &self.directions.row_vectors(direction)[column];
                for lane in 0..LANES {
                    a[lane] += of_a * direction[lane];
                    b[lane] += of_b * direction[lane];
                    c[lane] += of_c * direction[lane];
                    d[lane] += of_d * direction[lane];
                }
            }
            for (row, product) in [a, b, c, d].iter().enumerate() {
                let place = row * length + column;
                self.approach.approach(self.first + place, product, &mut self.group[place]);
            }
        }
    }
}

/// Takes off a row what it has of orthonormal ones before it, and gives it the length 1.
struct Orthogonal<'a> {
    before: &'a [Vector],
    row: &'a mut [Vector],
}

impl Work for Orthogonal<'_> {
    #[inline(always)]
    fn run(self) {
        let row = self.row;
        for _ in 0..2 {
            for other in self.before.chunks_exact(row.len()) {
                let overlap = dot(row, other) as f32;
                for (vector, other) in row.iter_mut().zip(other) {
                    for lane in 0..LANES {
                        vector[lane] -= overlap * other[lane];
                    }
                }
            }
            let length = dot(row, row).sqrt();
            let scale = if length > 0.0 { (1.0 / length) as f32 } else { 0.0 };
            row.iter_mut().flatten().for_each(|value| *value *= scale);
        }
    }
}

#[inline(always)]
fn dot(a: &[Vector], b: &[Vector]) -> f64 {
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    sums.into_iter().sum()
}

/// Eigenvalues of a symmetric matrix, largest first, and its eigenvectors as rows, by Jacobi's rotations.
pub fn eigen(mut matrix: Vec<Vec<f64>>) -> (Vec<f64>, Matrix) {
    let size = matrix.len();
    let mut vectors: Vec<Vec<f64>> =
        (0..size).map(|row| (0..size).map(|column| f64::from(u8::from(row == column))).collect()).collect();
    for _ in 0..30 {
        let beside: f64 = (0..size).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| matrix[i][j].powi(2)).sum();
        let diagonal: f64 = (0..size).map(|i| matrix[i][i].powi(2)).sum();
        if beside <= 1e-20 * diagonal {
            break;
        }
        for p in 0..size {
            for q in p + 1..size {
                if matrix[p][q] == 0.0 {
                    continue;
                }
                let theta = (matrix[q][q] - matrix[p][p]) / (2.0 * matrix[p][q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for row in &mut matrix {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                rotate_rows(&mut matrix, (p, q), (c, s));
                rotate_rows(&mut vectors, (p, q), (c, s));
            }
        }
    }
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|&a, &b| matrix[b][b].total_cmp(&matrix[a][a]));
    let sorted = Matrix::of(size, size, |row, column| vectors[order[row]][column] as f32);
    (order.iter().map(|&index| matrix[index][index]).collect(), sorted)
}

fn rotate_rows(matrix: &mut [Vec<f64>], (p, q): (usize, usize), (c, s): (f64, f64)) {
    let (upper, lower) = matrix.split_at_mut(q);
    for (a, b) in upper[p].iter_mut().zip(&mut lower[0]) {
        (*a, *b) = (c * *a - s * *b, s * *a + c * *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(rows: usize, columns: usize) -> Matrix {
        Matrix::of(rows, columns, |row, column| ((row * 7 + column * 3) % 11) as f32 - 5.0)
    }

    #[test]
    fn eigenvectors_of_a_symmetric_matrix_are_stretched_by_their_eigenvalues() {
        let matrix = vec![vec![4.0, 1.0, 0.0], vec![1.0, 3.0, 1.0], vec![0.0, 1.0, 2.0]];
        let (values, vectors) = eigen(matrix.clone());
        assert!(values.is_sorted_by(|a, b| a >= b));
        for (number, value) in values.iter().enumerate() {
            let vector = vectors.row(number);
            for (row, &own) in matrix.iter().zip(vector) {
                let product: f64 = row.iter().zip(vector).map(|(a, &b)| a * f64::from(b)).sum();
                assert!((product - value * f64::from(own)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn coordinates_and_gathered_rows_are_products_whatever_the_extents() {
        for (rows, columns, directions) in [(1, 1, 1), (5, 40, 3), (70, 33, 4)] {
            let (matrix, directions) = (counted(rows, columns), counted(directions, columns));
            let coordinates = matrix.times(&directions.transposed());
            assert!(matrix.coordinates(&directions).numbers().eq(coordinates.numbers()));
            let gathered = coordinates.transposed().times(&matrix);
            assert!(matrix.gathered(&directions).numbers().eq(gathered.numbers()), "{rows} rows");
        }
    }

    #[test]
    fn orthonormal_rows_span_what_the_rows_did() {
        let rows = counted(4, 50);
        let orthonormal = rows.clone().orthonormal();
        let gram = orthonormal.transposed().gram();
        for (number, sums) in gram.iter().enumerate() {
            for (other, sum) in sums.iter().enumerate() {
                assert!((sum - f64::from(u8::from(number == other))).abs() < 1e-5, "{gram:?}");
            }
        }
        let again = rows.coordinates(&orthonormal).times(&orthonormal);
        assert!(again.numbers().zip(rows.numbers()).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}
