//! One record: its parts' treatment decided, its blocks aligned, its symbols encoded (Algorithm 1, lines 5-14).
//!
//! The local decode loop is the decoder's own: what a later record is predicted from is what an engine makes of the encoded
//! bytes.

mod decision;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::Array2;

use self::decision::{Decided, PartPrediction};
use super::calibration::feedback::ColumnFeedback;
use super::columns::{ColumnSteps, choose_columns};
use super::difference::{DifferencePart, Pair};
use super::entropy_model::TablePool;
use super::mode_decision::FittedPredictor;
use super::network::FittedNetwork;
use super::options::{ColumnScales, PackOptions};
use super::part::{EncodedPart, SelfCheckError};
use super::quantize::{PartQuantizer, QuantizerChoice, root_mean_square, rounding_at_scale};
use super::quantized_symbols::{EncoderPrediction, QuantizedSymbols, Rounding};
use super::symbols::RunLayout;
use super::treatment::Drafted;
use super::vectors;
use crate::codec::architecture::{PartPlan, RecordPlan};
use crate::codec::motion::Motion;
use crate::codec::permutation::{self, GroupedPermutation};
use crate::codec::vector_quantizer::VectorQuantizer;
use crate::decode::prepared::Motions;
use crate::decode::{DecodeError, Engine, Pools, PreparedPart, StripJob};
use crate::format::difference::{BaseTensor, BasedInfo};
use crate::format::part::{Coding, QuantizerInfo, StoredPlacement, StoredPrediction};
use crate::format::record::StoredPermutation;
use crate::tensor::TensorInfo;

/// Bytes of a header of symbols, which bytes as they are do without.
const HEADER_BYTES: usize = 20;

/// The decoded record that the next layer's record may be predicted from (Algorithm 1's context buffers).
#[derive(Debug)]
pub struct Context {
    /// The record's number in the archive.
    pub ordinal: u32,
    /// Its plan.
    pub plan: RecordPlan,
    /// Its permutation, for delta coding.
    pub permutation: Option<GroupedPermutation>,
    /// Decoded bytes of its quantized parts.
    pub decoded: Vec<Option<Vec<u8>>>,
    /// Those of the record that it is predicted from itself, where predictors look at two layers.
    pub below: Option<Vec<Option<Vec<u8>>>>,
    /// What its blocks do on calibration inputs, `[groups, summary]`, where that is known.
    pub activations: Option<Array2<f32>>,
}

impl Context {
    /// What a predictor of so many layers starts from: the decoded part, and behind it that part's own reference where there
    /// is one.
    pub fn references(&self, part: usize, contexts: usize) -> Option<Cow<'_, [u8]>> {
        let nearest = self.decoded[part].as_deref()?;
        let second = self.below.as_ref().filter(|_| contexts > 1).and_then(|below| below[part].as_deref());
        Some(second.map_or(Cow::Borrowed(nearest), |second| Cow::Owned([nearest, second].concat())))
    }

    /// What the permutation of a record above this one, and this one's own, do to a part.
    pub fn motions_of(&self, part: &PartPlan, tensor: &TensorInfo, permutation: &GroupedPermutation) -> Motions {
        let Some(nearest) = motion_of(part, tensor, permutation) else { return Motions::default() };
        let below = self.permutation.as_ref().filter(|below| below.symmetry() == permutation.symmetry());
        let second = match below.and_then(|below| motion_of(part, tensor, below)) {
            Some(below) => nearest.then(&below),
            None => nearest.clone(),
        };
        Motions { nearest: Some(nearest), second: Some(second) }
    }
}

/// What a record may be predicted from.
pub struct Below<'a> {
    /// The record one layer below.
    pub context: &'a Context,
    /// What the blocks of the record itself do on calibration inputs, `[groups, summary]`, where that is known.
    pub activations: Option<&'a Array2<f32>>,
    /// What was found of the record in earlier encodings, and then in this one.
    pub found: &'a mut FoundMotion,
}

/// Where the blocks and units of a record were found in the layer below, by the first encoding that looked. Steps differ little
/// from one encoding to the next, and what was found once is near enough for all of them: looking again takes longer than
/// everything else. What it costs and saves is measured anew each time.
#[derive(Debug, Default)]
pub struct FoundMotion {
    /// How blocks are aligned; absent inside where they are not.
    permutation: Option<Option<GroupedPermutation>>,
    /// Motion vectors of each part looked at; absent inside where none pays.
    vectors: BTreeMap<usize, Option<FittedPredictor>>,
}

/// What mode decision measured for a record, in bits of the quantized parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct StageBits {
    /// All parts as keyframes.
    pub keyframe: f64,
    /// Each part the cheaper of keyframe and prediction from what is in the same place.
    pub same_place: f64,
    /// The same with motion vectors tried as well, nothing permuted; absent where nothing could be predicted.
    pub unaligned: Option<f64>,
    /// The same with aligned blocks, without the permutation.
    pub aligned: Option<f64>,
    /// The permutation.
    pub permutation: Option<f64>,
    /// The same permutation as entries of fixed width.
    pub permutation_raw: Option<f64>,
    /// What was chosen of all that, permutation included.
    pub chosen: f64,
    /// Whether the permutation was.
    pub is_aligned: bool,
}

/// A record ready to be written.
pub struct EncodedRecord {
    /// The permutation, as stored.
    pub permutation: Option<StoredPermutation>,
    /// The permutation.
    pub grouped: Option<GroupedPermutation>,
    /// Whether any part is predicted.
    pub predicted: bool,
    /// The parts.
    pub parts: Vec<EncodedPart>,
    /// What mode decision measured.
    pub stages: StageBits,
}

/// Encodes records with one pool of tables.
pub struct RecordEncoder<'a> {
    /// The tables.
    pub pool: &'a TablePool,
    /// The user's choices.
    pub options: &'a PackOptions,
    /// The network that parts may be predicted with.
    pub network: Option<&'a FittedNetwork>,
}

impl RecordEncoder<'_> {
    /// Encodes one record. `source` is each part's tensor and its bytes, `drafts` what is made of them; `feedback` what is
    /// known of the inputs that each is multiplied with; `below` is there where the record may be predicted.
    pub fn encode(
        &self,
        plan: &RecordPlan,
        source: &[(&TensorInfo, &[u8])],
        drafts: &[Drafted<'_>],
        feedback: &[Option<Arc<ColumnFeedback>>],
        below: Option<Below<'_>>,
    ) -> EncodedRecord {
        let context = below.as_ref().map(|below| below.context);
        let Decided { permutation, predictions, stages } = match below {
            Some(below) => self.decide(plan, source, drafts, below),
            None => Decided {
                permutation: None,
                predictions: drafts.iter().map(|_| None).collect(),
                stages: StageBits::default(),
            },
        };
        let predicted = predictions.iter().any(Option::is_some);
        let parts = (drafts.iter().zip(&plan.parts).zip(&predictions).enumerate())
            .map(|(ordinal, ((draft, part), prediction))| {
                let feedback = feedback.get(ordinal).and_then(Option::as_deref);
                self.encode_part(draft, part, ordinal as u32, prediction.as_ref(), feedback)
            })
            .collect();
        let stored = permutation.as_ref().map(|permutation| StoredPermutation {
            groups: permutation.symmetry().groups,
            members: permutation.symmetry().members,
            coded: permutation::encode(
                permutation,
                context.and_then(|context| context.permutation.as_ref()),
                self.options.permutation_coding(),
            ),
        });
        EncodedRecord { permutation: stored, grouped: permutation, predicted, parts, stages }
    }

    fn encode_part(
        &self,
        draft: &Drafted<'_>,
        plan: &PartPlan,
        ordinal: u32,
        prediction: Option<&PartPrediction>,
        feedback: Option<&ColumnFeedback>,
    ) -> EncodedPart {
        match draft {
            Drafted::Raw(bytes) => EncodedPart::raw(bytes),
            Drafted::Based { choice, tensor, bytes, start } => {
                let (reference, low_rank) = (choice.reference, start.low_rank.clone());
                match choice.difference {
                    Some(difference) => {
                        let pair = Pair { tensor, bytes, predicted: &start.predicted };
                        let known = start.known.as_ref().and_then(|known| known.differences.as_ref());
                        let part = match known {
                            Some(known) => DifferencePart::as_known(pair, known),
                            None => DifferencePart::new(pair, difference),
                        };
                        let encoded = part.encode(self.pool, reference, low_rank);
                        encoded.expect("differences were counted before tables were fitted")
                    }
                    None => {
                        EncodedPart::without_strips(Coding::Based(BasedInfo { reference, low_rank, difference: None }))
                    }
                }
            }
            Drafted::Split(split, tensor, bytes) => {
                let symbols = split.symbols(tensor, bytes);
                let encoded = EncodedPart::symbols(symbols.coding(), &*symbols, self.pool);
                encoded
                    .filter(|part| part.body.len() + HEADER_BYTES < bytes.len())
                    .unwrap_or_else(|| EncodedPart::raw(bytes))
            }
            Drafted::Quantized { values, layout, quantizer, base } => {
                let stored = prediction.map(|prediction| StoredPrediction {
                    reference_part: ordinal,
                    placement: plan.placement.filter(|_| prediction.moved).map(|placement| StoredPlacement {
                        axis: placement.axis,
                        repeat: placement.repeat,
                        per_member: placement.per_member,
                        unit: placement.unit,
                    }),
                    predictor: prediction.predictor.stored(),
                });
                match quantizer.choice.vectors {
                    Some(codebooks) => self.encode_vectors(values, *layout, quantizer, codebooks, prediction, stored),
                    None => self.encode_codes((values, *base), *layout, quantizer, feedback, prediction, stored),
                }
            }
        }
    }

    /// Codes of values, or of what they differ by from a tensor of the base.
    fn encode_codes(
        &self,
        (values, base): (&[f32], Option<BaseTensor>),
        layout: RunLayout,
        quantizer: &PartQuantizer,
        feedback: Option<&ColumnFeedback>,
        prediction: Option<&PartPrediction>,
        stored: Option<StoredPrediction>,
    ) -> EncodedPart {
        let mut rounding = match prediction {
            // By the scale of what is left of the part.
            Some(prediction) => {
                let allowed = Rounding { own_table: quantizer.choice.rounding.own_table, ..self.options.rounding() };
                let residual = prediction.residual(values, layout);
                rounding_at_scale(allowed, root_mean_square(&residual), quantizer.choice.step)
            }
            None => quantizer.choice.rounding,
        };
        if let (Some(trellis), Some(_)) = (&mut rounding.trellis, feedback) {
            trellis.state_bits = self.options.closed_loop_states().state_bits();
        }
        let of_run = |run: usize| prediction.expect("asked for in predicted parts only").predictor.of_run(run);
        let planned_step_of_run = |run: usize| quantizer.step_of_run(run);
        let mut symbols = QuantizedSymbols {
            values,
            prediction: prediction
                .map(|prediction| EncoderPrediction { reference: &prediction.reference, of_run: &of_run }),
            layout,
            step_of_run: &planned_step_of_run,
            raw_bits: quantizer.choice.raw_bits,
            rounding,
            columns: None,
            feedback,
        };
        let steps = match (feedback, self.options.column_scales) {
            (Some(feedback), ColumnScales::Auto) => {
                choose_columns(&symbols, feedback, self.pool, self.options.effort.measured_elements())
            }
            _ => None,
        };
        let quantizer = match steps {
            Some(ColumnSteps { scales, step_factor }) => {
                let step = quantizer.choice.step * step_factor;
                let columned = quantizer.clone().with_columns(step, scales);
                if columned.holds(values, layout) { Cow::Owned(columned) } else { Cow::Borrowed(quantizer) }
            }
            None => Cow::Borrowed(quantizer),
        };
        let columns = quantizer.column_multipliers();
        let feedback = match (feedback, &columns) {
            (Some(feedback), Some(columns)) => Some(Cow::Owned(feedback.scaled(columns))),
            (feedback, _) => feedback.map(Cow::Borrowed),
        };
        let step_of_run = |run: usize| quantizer.step_of_run(run);
        symbols.step_of_run = &step_of_run;
        symbols.columns = columns.as_deref();
        symbols.feedback = feedback.as_deref();
        let info = QuantizerInfo { trellis: rounding.trellis, prediction: stored, ..quantizer.info() };
        let coding = match base {
            Some(reference) => Coding::QuantizedFromBase(reference, info),
            None => Coding::Quantized(info),
        };
        EncodedPart::symbols(coding, &symbols, self.pool)
            .expect("quantized symbols were counted before tables were fitted")
    }

    fn encode_vectors(
        &self,
        values: &[f32],
        layout: RunLayout,
        quantizer: &PartQuantizer,
        codebooks: [u16; 2],
        prediction: Option<&PartPrediction>,
        stored: Option<StoredPrediction>,
    ) -> EncodedPart {
        let residual = prediction.map(|prediction| prediction.residual(values, layout));
        let values = residual.as_deref().unwrap_or(values);
        // Codebooks are for values of unit variance, so that steps are those of what is left.
        let root_mean_square = root_mean_square(values);
        let choice = QuantizerChoice { step: root_mean_square as f32, root_mean_square, ..quantizer.choice };
        let quantizer = PartQuantizer::new(choice, values, layout, self.options);
        let stages = codebooks.map(|number| Arc::clone(&self.pool.codebooks()[usize::from(number)]));
        let vectors = VectorQuantizer::new(stages).expect("codebooks were trained in pairs");
        let quantized = vectors::quantize(values, layout, &vectors, &|run| quantizer.step_of_run(run));
        let info = QuantizerInfo { prediction: stored, ..quantizer.info() };
        EncodedPart::vectors(Coding::Quantized(info), layout, &quantized)
    }

    /// Bits per element that two codebooks take.
    fn vector_bits(&self, first: u16, second: u16) -> f64 {
        let [first, second] = [first, second].map(|number| &self.pool.codebooks()[usize::from(number)]);
        f64::from(first.index_bits() + second.index_bits()) / first.elements() as f64
    }
}

/// What a permutation does to one part, as the decoder will see it.
pub fn motion_of(part: &PartPlan, tensor: &TensorInfo, permutation: &GroupedPermutation) -> Option<Motion> {
    let placement = part.placement?;
    Motion::new(&tensor.shape, placement.axis.into(), placement.index_map(permutation))
}

/// Decodes an encoded part.
pub fn decode_part(
    engine: &dyn Engine,
    tensor: &TensorInfo,
    part: &EncodedPart,
    pools: Pools<'_>,
    motions: impl Into<Motions>,
    reference: Option<&[u8]>,
) -> Result<Vec<u8>, SelfCheckError> {
    use rayon::prelude::*;
    let failed = |error: DecodeError| SelfCheckError { tensor: tensor.name.clone(), error };
    let header = part.header(|table| table as u16);
    let prepared = PreparedPart::new(tensor, &header, pools, motions).map_err(failed)?;
    let mut decoded = vec![0; tensor.length_bytes as usize];
    let strip_bytes = prepared.full_strip_output_bytes() as usize;
    let at_once = engine.strips_at_once();
    decoded.par_chunks_mut(strip_bytes * at_once).enumerate().try_for_each(|(group, out)| {
        let mut jobs: Vec<StripJob<'_>> = (out.chunks_mut(strip_bytes).enumerate())
            .map(|(strip, out)| {
                let strip = group * at_once + strip;
                StripJob { strip, stored: &part.body[prepared.strip_range(strip).start as usize..], out }
            })
            .collect();
        engine.decode_strips(&prepared, reference, &mut jobs).map_err(failed)
    })?;
    Ok(decoded)
}
