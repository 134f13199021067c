//! What is done with each tensor: decided from the tensor, the target and the user's `--keep` rules, before any is coded.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::difference::{CountedDifferences, DifferenceChoice, DifferencePart, DifferenceSearch, Pair};
use super::entropy_model::TablePool;
use super::keep::Keep;
use super::lossless::Split;
use super::low_rank::{FoundProduct, add_product, find_product, find_product_like, paying_rank};
use super::options::PackOptions;
use super::profile::KnownPart;
use super::quantize::{PartQuantizer, QuantizerChoice, largest_magnitude, may_be_quantized, refinement, values_of};
use super::symbols::RunLayout;
use crate::codec::architecture::BlockType;
use crate::format::difference::{BaseTensor, StoredLowRank};
use crate::tensor::{Dtype, TensorInfo};

/// A tensor with no more values than this has no weights in it: trained ones hardly repeat.
const FEW_VALUES: usize = 32;

/// Elements below which a tensor that differs from the base's stands alone: its header takes more than it could save.
const LEAST_DIFFERENCES: u64 = 192;
/// Energy of a change over that of the weights above which a quantized tensor stands alone: less than half a bit is to be won.
const NEAR: f64 = 0.5;
/// Bits per element of a difference below which no product is looked for.
const LEAST_FACTORED_BITS: f64 = 0.3;

/// How one part is coded, before a step is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Treatment {
    /// Bytes as they are.
    Raw,
    /// Bit-exact by splitting.
    Split(Split),
    /// Quantized, unless bit-exact turns out to be no longer.
    Quantized(Fineness),
    /// Bit-exact, from a tensor of the base.
    Based(BasedChoice),
}

/// How a part starts from a tensor of the base.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BasedChoice {
    /// The tensor.
    pub reference: BaseTensor,
    /// How differences are coded, where there are any.
    pub difference: Option<DifferenceChoice>,
}

/// How finely a part is quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fineness {
    /// With the checkpoint's step, divided by this.
    Times(f32),
    /// At this many bits per element, whatever the target.
    Rate(f64),
}

impl Treatment {
    /// Chooses from the tensor alone. `keep` is what the user's rules say of it.
    pub fn choose(
        block_type: BlockType,
        tensor: &TensorInfo,
        bytes: &[u8],
        keep: Option<Keep>,
        options: &PackOptions,
    ) -> Self {
        let fineness = may_lose(keep, options).then(|| match keep {
            Some(Keep::Rate(bits)) => Fineness::Rate(bits),
            _ => Fineness::Times(refinement(block_type, options)),
        });
        match fineness {
            Some(fineness)
                if may_be_quantized(tensor) && !is_already_quantized(tensor) && is_of_weights(tensor, bytes) =>
            {
                Self::Quantized(fineness)
            }
            _ => Self::exact(tensor, bytes),
        }
    }

    /// The shortest bit-exact treatment.
    pub fn exact(tensor: &TensorInfo, bytes: &[u8]) -> Self {
        Split::choose(tensor, bytes).map_or(Self::Raw, Self::Split)
    }
}

/// Whether a tensor may lose anything. `keep` is what the user's rules say of it.
pub fn may_lose(keep: Option<Keep>, options: &PackOptions) -> bool {
    match keep {
        Some(Keep::Lossless) => false,
        Some(Keep::Rate(_)) => true,
        None => options.target.is_lossy(),
    }
}

/// Endings of the names that quantized checkpoints give to a tensor's integers and to what dequantizes them: GPTQ and AWQ,
/// compressed-tensors, bitsandbytes, MXFP4 and NVFP4, block-wise FP8.
const QUANTIZED_ENDINGS: [&str; 16] = [
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_shape",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".weight_g_idx",
    ".input_scale",
    ".absmax",
    ".quant_map",
    ".quant_state",
    ".SCB",
];

/// Whether a tensor is of a checkpoint that was quantized before, by its type or its name: losing more of it loses more than
/// an encoder that takes its scales for weights can know.
pub fn is_already_quantized(tensor: &TensorInfo) -> bool {
    let matrix = tensor.shape.iter().filter(|&&dimension| dimension > 1).count() >= 2;
    let by_type = matches!(
        tensor.dtype,
        Dtype::I8 | Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 | Dtype::F4 | Dtype::F6_E2M3 | Dtype::F6_E3M2
    );
    let by_mxfp4_name = tensor.name.ends_with("_blocks") || tensor.name.ends_with("_scales");
    (by_type && matrix)
        || (tensor.dtype == Dtype::U8 && by_mxfp4_name)
        || QUANTIZED_ENDINGS.iter().any(|ending| tensor.name.ends_with(ending))
}

/// Whether the values look like weights: finite, and not a few values over and over. Those are masks, constants and one-hot
/// tables; GPT-2 keeps its causal masks between the weights. They cost little bit-exact, and a mask that is almost right is
/// wrong.
fn is_of_weights(tensor: &TensorInfo, bytes: &[u8]) -> bool {
    let values = values_of(&tensor.dtype, bytes);
    let mut distinct = BTreeSet::new();
    let has_many = values.iter().any(|value| {
        distinct.insert(value.to_bits());
        distinct.len() > FEW_VALUES
    });
    has_many && largest_magnitude(&values).is_finite()
}

/// What the elements of a part start from.
#[derive(Debug)]
pub struct Start {
    /// The tensor of the base.
    pub reference: BaseTensor,
    /// The bytes of the base's elements with the product added.
    pub predicted: Vec<u8>,
    /// The product.
    pub low_rank: Option<StoredLowRank>,
    /// How an earlier variant was coded, where the part is coded alike.
    pub known: Option<Box<KnownPart>>,
}

/// Elements less what they start from, as binary32 has them.
pub fn changes(tensor: &TensorInfo, bytes: &[u8], predicted: &[u8]) -> Vec<f32> {
    let before = values_of(&tensor.dtype, predicted);
    values_of(&tensor.dtype, bytes).into_iter().zip(before).map(|(value, before)| value - before).collect()
}

/// How one part is coded, everything but tables known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Bytes as they are.
    Raw,
    /// Bit-exact by splitting.
    Split(Split),
    /// Quantized.
    Quantized(QuantizerChoice),
    /// Bit-exact, from a tensor of the base.
    Based(BasedChoice),
}

impl Decision {
    /// The name in plans and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Split(split) => split.name(),
            Self::Quantized(_) => "quantized",
            Self::Based(BasedChoice { difference: None, .. }) => "the base's",
            Self::Based(_) => "difference",
        }
    }

    /// Whether the part loses anything.
    pub fn is_quantized(&self) -> bool {
        matches!(self, Self::Quantized(_))
    }
}

/// A part ready for coding.
pub enum Drafted<'a> {
    /// Bytes as they are.
    Raw(&'a [u8]),
    /// Bit-exact by splitting.
    Split(Split, &'a TensorInfo, &'a [u8]),
    /// Bit-exact, from a tensor of the base.
    Based {
        /// How.
        choice: BasedChoice,
        /// The tensor.
        tensor: &'a TensorInfo,
        /// Its bytes.
        bytes: &'a [u8],
        /// What its elements start from.
        start: Start,
    },
    /// Quantized.
    Quantized {
        /// The weights.
        values: Vec<f32>,
        /// Layout of the runs.
        layout: RunLayout,
        /// Steps.
        quantizer: PartQuantizer,
        /// The tensor of the base that `values` are the difference to, where they are one.
        base: Option<BaseTensor>,
    },
}

impl<'a> Drafted<'a> {
    /// Drafts a tensor as decided, with the step multiplied by `step_factor`. `start` is what it starts from, where that was
    /// decided.
    pub fn new(
        decision: Decision,
        tensor: &'a TensorInfo,
        bytes: &'a [u8],
        start: Option<Start>,
        step_factor: f32,
        options: &PackOptions,
    ) -> Self {
        match decision {
            Decision::Based(choice) => {
                let start = start.expect("decided with what it starts from at hand");
                Self::Based { choice, tensor, bytes, start }
            }
            Decision::Raw => Self::Raw(bytes),
            Decision::Split(split) => Self::Split(split, tensor, bytes),
            Decision::Quantized(choice) => {
                let base = start.as_ref().map(|start| start.reference);
                let values = match &start {
                    Some(start) => changes(tensor, bytes, &start.predicted),
                    None => values_of(&tensor.dtype, bytes),
                };
                let layout = RunLayout::of_shape(&tensor.shape, options.steps.group());
                let choice = QuantizerChoice { step: choice.step * step_factor, ..choice };
                let quantizer = PartQuantizer::new(choice, &values, layout, options);
                if quantizer.holds(&values, layout) {
                    return Self::Quantized { values, layout, quantizer, base };
                }
                // An outlier that no sample showed.
                match Treatment::exact(tensor, bytes) {
                    Treatment::Split(split) => Self::Split(split, tensor, bytes),
                    _ => Self::Raw(bytes),
                }
            }
        }
    }
}

/// How a part starts from a tensor of the base bit-exact, and what is known of it before tables are fitted.
#[derive(Clone, Debug)]
pub struct ExactStart {
    /// How.
    pub choice: BasedChoice,
    /// What is added to the reference.
    pub product: Option<FoundProduct>,
    /// Differences, where there are any and they are not coded as an earlier variant's.
    pub counted: CountedDifferences,
    /// Bytes of the differences where they are coded as an earlier variant's, about.
    pub bytes_as_known: Option<f64>,
}

impl ExactStart {
    /// That a tensor equals one of the base.
    pub fn equal(reference: BaseTensor) -> Self {
        let choice = BasedChoice { reference, difference: None };
        Self { choice, product: None, counted: CountedDifferences::default(), bytes_as_known: None }
    }

    /// How a tensor starts from one of the base as in an earlier variant, whose tables are `tables`. `None` where it did not
    /// change alike.
    pub fn as_known(
        known: &KnownPart,
        tables: &TablePool,
        reference: BaseTensor,
        (tensor, bytes): (&TensorInfo, &[u8]),
        decoded: &[u8],
    ) -> Option<Self> {
        let product = match &known.product {
            Some(before) => Some(find_product_like(before, tensor, bytes, decoded)?),
            // The strips of differences that are as large as those before say nothing of a product that they are.
            None if paying_rank(Pair { tensor, bytes, predicted: decoded }).is_some() => return None,
            None => None,
        };
        let mut predicted = Cow::Borrowed(decoded);
        if let Some((_, product)) = &product {
            add_product(product, &tensor.dtype, predicted.to_mut());
        }
        let found = |difference| {
            let choice = BasedChoice { reference, difference };
            let counted = CountedDifferences::default;
            let product = product.map(|(stored, product)| {
                let bits = stored.bits();
                FoundProduct { stored, product, difference, counted: counted(), bits }
            });
            Self { choice, product, counted: counted(), bytes_as_known: None }
        };
        let Some(differences) = &known.differences else {
            return (predicted == bytes).then(|| found(None));
        };
        let pair = Pair { tensor, bytes, predicted: &predicted };
        let part_bytes = DifferencePart::as_known(pair, differences).bytes_as_known(tables)?;
        Some(Self { bytes_as_known: Some(part_bytes), ..found(Some(differences.choice())) })
    }

    /// How a tensor starts from one of the base where that is shorter than `alone`, its treatment without a base. `decoded` is
    /// the base's tensor, as many bytes; `is_whole` whether it has the same shape.
    pub fn choose(
        alone: Treatment,
        reference: BaseTensor,
        is_whole: bool,
        tensor: &TensorInfo,
        bytes: &[u8],
        decoded: &[u8],
    ) -> Option<Self> {
        if is_whole && bytes == decoded {
            return Some(Self::equal(reference));
        }
        let alone_bits = match alone {
            Treatment::Raw => 8.0 * bytes.len() as f64,
            Treatment::Split(split) => split.estimated_bits(tensor, bytes),
            Treatment::Quantized(_) | Treatment::Based(_) => return None,
        };
        let plain = DifferenceSearch::new(Pair { tensor, bytes, predicted: decoded })?;
        let product = (is_whole && plain.bits() > LEAST_FACTORED_BITS * tensor.elements() as f64)
            .then(|| find_product(tensor, bytes, decoded))
            .flatten()
            .filter(|found| found.bits < alone_bits);
        let of_product = |mut found: FoundProduct| {
            let (difference, counted) = (found.difference, std::mem::take(&mut found.counted));
            Self { choice: BasedChoice { reference, difference }, product: Some(found), counted, bytes_as_known: None }
        };
        let product = match product {
            // Refinement does not halve.
            Some(found) if found.bits < 0.5 * plain.bits() => return Some(of_product(found)),
            product => product,
        };
        let search = plain.refined();
        if let Some(found) = product
            && found.bits < search.bits()
        {
            return Some(of_product(found));
        }
        let is_shorter = tensor.elements() >= LEAST_DIFFERENCES && search.bits() < alone_bits;
        is_shorter.then(|| {
            let (difference, counted) = search.found();
            let choice = BasedChoice { reference, difference: Some(difference) };
            Self { choice, product: None, counted, bytes_as_known: None }
        })
    }
}

/// Whether a tensor that is to be quantized is so near to the base's that what changed takes fewer bits at the same error.
pub fn is_near(treatment: Treatment, tensor: &TensorInfo, bytes: &[u8], decoded: &[u8]) -> bool {
    let energy = |values: &[f32]| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    matches!(treatment, Treatment::Quantized(_))
        && energy(&changes(tensor, bytes, decoded)) < NEAR * energy(&values_of(&tensor.dtype, bytes))
}
