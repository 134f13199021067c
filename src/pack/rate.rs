//! Rate control: the step that meets a target, found on estimates and settled on serialized sizes (section 6.2).

/// Searches a step in the logarithmic domain for a quantity that falls or rises steadily with it.
///
/// Starts from a guess and a slope (change of the quantity per octave of step), then takes secants. It is deterministic.
#[derive(Clone, Debug)]
pub struct StepSearch {
    target: f64,
    slope: f64,
    last: Option<(f64, f64)>,
}

impl StepSearch {
    /// Searches for `target`; near the guess the quantity changes by `slope` when the step doubles.
    pub fn new(target: f64, slope: f64) -> Self {
        Self { target, slope, last: None }
    }

    /// Change of the quantity per octave of step, as far as it is known.
    pub fn slope(&self) -> f64 {
        self.slope
    }

    /// The next step to try, having measured `value` at `step`.
    pub fn next(&mut self, step: f64, value: f64) -> f64 {
        let octaves = step.log2();
        if let Some((before, value_before)) = self.last {
            let secant = (value - value_before) / (octaves - before);
            // Keep the sign and the order of magnitude: noise on a short secant must not throw the search away.
            if secant.is_finite() && secant * self.slope > 0.0 && secant.abs() > 0.1 * self.slope.abs() {
                self.slope = secant;
            }
        }
        self.last = Some((octaves, value));
        let move_by = ((self.target - value) / self.slope).clamp(-6.0, 6.0);
        (octaves + move_by).exp2()
    }
}

/// The step at which Gaussian weights of this root mean square take about this many bits each: the high-rate entropy of a
/// uniform quantizer, `log2(rms * sqrt(2 pi e) / step)`.
pub fn gaussian_step(root_mean_square: f64, bits: f64) -> f64 {
    let entropy_scale = (2.0 * std::f64::consts::PI * std::f64::consts::E).sqrt();
    root_mean_square * entropy_scale / bits.max(0.3).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_finds_the_step_of_a_bent_curve() {
        let bits = |step: f64| (1.0 + 1.0 / (step * step)).log2() * 0.5 + 0.3;
        let mut search = StepSearch::new(2.0, -1.0);
        let mut step = 5.0;
        for _ in 0..8 {
            step = search.next(step, bits(step));
        }
        assert!((bits(step) - 2.0).abs() < 1e-3, "{}", bits(step));
    }

    #[test]
    fn a_gaussian_at_four_bits_has_a_quarter_sigma_step() {
        assert!((gaussian_step(1.0, 4.047) - 0.25).abs() < 1e-3);
    }
}
