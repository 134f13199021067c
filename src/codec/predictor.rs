//! Elementwise predictors (section 5.1; Eq. 70): what is done with one decoded reference value.
//!
//! Single binary32 operations in a fixed order, so that every engine gives the same bits. Fitting the coefficients is the
//! encoder's business: see `pack::mode_decision`.

/// A predictor's coefficients for one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RunPredictor {
    /// `gain * reference`.
    ScaledCopy {
        /// Gain of the part.
        gain: f32,
    },
    /// `gain * reference + offset`: two roundings.
    RowAffine {
        /// Gain of the run.
        gain: f32,
        /// Offset of the run, in weight units.
        offset: f32,
    },
}

impl RunPredictor {
    /// The predicted value.
    ///
    /// ```
    /// # use mcwcfs::codec::predictor::RunPredictor;
    /// assert_eq!(RunPredictor::RowAffine { gain: 0.5, offset: 1.0 }.predict(4.0), 3.0);
    /// ```
    #[inline]
    pub fn predict(self, reference: f32) -> f32 {
        match self {
            Self::ScaledCopy { gain } => gain * reference,
            Self::RowAffine { gain, offset } => gain * reference + offset,
        }
    }
}
