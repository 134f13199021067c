//! AdamW with a warm-up and a cosine, on gradients that are clipped together (G.3).

use std::collections::BTreeMap;

use super::student::Student;
use crate::forward::recorded::Gradients;
use crate::pack::quantize::root_mean_square;

/// Greatest step of a latent weight, in root mean squares of its tensor.
const RATE: f32 = 3e-3;
/// Where the cosine ends, as a share of that.
const LAST_RATE: f32 = 0.1;
/// What is left of the moments after a step.
const DECAYS: [f32; 2] = [0.9, 0.99];
const EPSILON: f32 = 1e-12;
/// Decoupled weight decay: towards the checkpoint's weights, for these are latent weights of that and no new model.
const WEIGHT_DECAY: f32 = 1e-2;
/// Greatest norm of all gradients together.
const MOST_NORM: f64 = 1.0;
/// Steps until the rate is whole, and at most this share of all.
const WARM_UP: usize = 500;
const WARM_UP_SHARE: usize = 10;

/// The state of the optimizer.
pub struct Optimizer {
    steps: usize,
    /// Steps taken.
    step: usize,
    moments: BTreeMap<String, Moments>,
}

/// Running means of a tensor's gradients and of their squares.
pub struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
    /// Steps that they have seen.
    seen: usize,
}

impl Optimizer {
    /// For so many steps.
    pub fn new(steps: usize) -> Self {
        Self { steps, step: 0, moments: BTreeMap::new() }
    }

    /// What the rate is multiplied with at the next step.
    fn rate(&self) -> f32 {
        let warm_up = WARM_UP.min(self.steps / WARM_UP_SHARE);
        if self.step < warm_up {
            return (self.step + 1) as f32 / (warm_up + 1) as f32;
        }
        let done = (self.step - warm_up) as f32 / (self.steps - warm_up).max(1) as f32;
        LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + (std::f32::consts::PI * done).cos())
    }

    /// Moves the student's latent weights down the gradients.
    pub fn step(&mut self, student: &mut Student<'_>, gradients: &Gradients) {
        let norm =
            gradients.values().flat_map(|gradient| gradient.iter()).map(|&value| f64::from(value).powi(2)).sum::<f64>();
        let clipped = (MOST_NORM / norm.sqrt().max(MOST_NORM)) as f32;
        let rate = self.rate();
        self.step += 1;
        // A batch that overflows teaches nothing.
        let clipped = if norm.is_finite() { clipped } else { 0.0 };
        for (name, gradient) in gradients {
            student.change(name, |latents, original| {
                let moments = self.moments.entry(name.clone()).or_insert_with(|| Moments::new(original.len()));
                let gradient = gradient.as_slice().expect("gradients lie as they are made");
                moments.step(latents, original, gradient, clipped, rate);
            });
        }
    }

    /// Drops what is known of a tensor.
    pub fn forget(&mut self, tensor: &str) {
        self.moments.remove(tensor);
    }

    /// What is known of tensors.
    pub fn moments(&self) -> &BTreeMap<String, Moments> {
        &self.moments
    }

    /// Goes on from after so many steps.
    pub fn restore(&mut self, step: usize, moments: BTreeMap<String, Moments>) {
        (self.step, self.moments) = (step, moments);
    }
}

impl Moments {
    fn new(elements: usize) -> Self {
        Self { first: vec![0.0; elements], second: vec![0.0; elements], seen: 0 }
    }

    /// As [`Moments::means`] gave them, after so many steps.
    pub fn restored(first: Vec<f32>, second: Vec<f32>, seen: usize) -> Self {
        Self { first, second, seen }
    }

    /// Of gradients, and of their squares.
    pub fn means(&self) -> [&[f32]; 2] {
        [&self.first, &self.second]
    }

    /// Moves latent weights by a step; `rate` is a share of the whole.
    fn step(&mut self, latents: &mut [f32], original: &[f32], gradient: &[f32], clipped: f32, rate: f32) {
        self.seen += 1;
        let whole = RATE * root_mean_square(original) as f32;
        let [decay, decay_of_squares] = DECAYS;
        let (unbiased, unbiased_square) =
            (1.0 - decay.powi(self.seen as i32), 1.0 - decay_of_squares.powi(self.seen as i32));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for (((latent, original), gradient), (first, second)) in
            latents.iter_mut().zip(original).zip(gradient).zip(moments)
        {
            let gradient = if clipped > 0.0 { gradient * clipped } else { 0.0 };
            *first += (1.0 - decay) * (gradient - *first);
            *second += (1.0 - decay_of_squares) * (gradient * gradient - *second);
            let direction = *first / unbiased / ((*second / unbiased_square).sqrt() + EPSILON);
            *latent -= rate * (whole * direction + RATE * WEIGHT_DECAY * (*latent - original));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::Weights;

    /// Two tensors of four weights.
    struct Two;

    impl Weights for Two {
        fn shape(&self, _: &str) -> Option<Vec<usize>> {
            Some(vec![2, 2])
        }

        fn values(&self, _: &str) -> Option<Vec<f32>> {
            Some(vec![1.0, -1.0, 1.0, -1.0])
        }

        fn names(&self) -> Vec<String> {
            vec!["a".into(), "b".into()]
        }
    }

    fn gradients(value: f32) -> Gradients {
        ["a", "b"].map(|name| (name.to_owned(), ndarray::Array2::from_elem((2, 2), value))).into()
    }

    #[test]
    fn the_first_steps_go_down_the_gradient_by_the_rate_and_settled_tensors_stay() {
        let mut student = Student::new(&Two, &["a", "b"]);
        student.settle("b", Some(vec![5.0; 4]));
        let mut optimizer = Optimizer::new(1);
        optimizer.step(&mut student, &gradients(0.01));
        let moved = student.latents("a").expect("it is latent")[0] - 1.0;
        assert!((moved + RATE).abs() < 1e-3 * RATE, "{moved}");
        assert_eq!(student.values("b"), Some(vec![5.0; 4]));
    }

    #[test]
    fn a_gradient_that_is_no_number_moves_nothing() {
        let mut student = Student::new(&Two, &["a", "b"]);
        let mut optimizer = Optimizer::new(10);
        optimizer.step(&mut student, &gradients(f32::NAN));
        assert_eq!(student.latents("a"), Two.values("a").as_deref());
    }

    #[test]
    fn the_rate_warms_up_and_falls() {
        let mut optimizer = Optimizer::new(100);
        let rates: Vec<f32> = (0..100)
            .map(|step| {
                optimizer.step = step;
                optimizer.rate()
            })
            .collect();
        assert!(rates[..11].windows(2).all(|pair| pair[0] < pair[1]) && rates[10] == 1.0, "{rates:?}");
        assert!(rates[10..].windows(2).all(|pair| pair[0] > pair[1]), "{rates:?}");
        assert!((rates[99] - LAST_RATE).abs() < 0.01);
    }
}
