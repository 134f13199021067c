//! Predictors (section 5.1; Eq. 70): what is made of decoded reference values.
//!
//! Elementwise ones make a prediction of one value, the others of several: [`MotionVectors`] of the same element of a few
//! units, a [`NetworkPredictor`] of a whole unit. Single binary32 operations in a fixed order or integers, so that every
//! engine gives the same bits. Fitting is the encoder's business: see `pack::mode_decision` and `pack::predictor`.

pub mod network;
pub mod references;
pub mod vectors;

use std::ops::Range;

use self::network::NetworkPredictor;
use self::references::References;
use self::vectors::MotionVectors;

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
    /// What leaves values that are predictions already as they are.
    pub const COPY: Self = Self::ScaledCopy { gain: 1.0 };

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

/// A predictor that makes an element's prediction of several reference values.
#[derive(Clone, Debug)]
pub enum CompositePredictor {
    /// Some units of the reference, each times a gain.
    Vectors(MotionVectors),
    /// A network, unit by unit.
    Network(NetworkPredictor),
}

impl CompositePredictor {
    /// The predictions of consecutive `elements`, counted in the tensor's order.
    pub fn predict(&self, references: &References<'_>, elements: Range<usize>, predicted: &mut [f32]) {
        assert_eq!(elements.len(), predicted.len(), "one prediction per element");
        match self {
            Self::Vectors(vectors) => vectors.predict(references, elements, predicted),
            Self::Network(network) => network.predict(references, elements, predicted),
        }
    }
}
