//! Applies a family's rules to the tensors of a checkpoint.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use super::rules::{BlockRule, Family, PartRule};
use super::{BlockType, CheckpointPlan, PartPlan, PlanFile, RecordPlan};
use super::{
    bert, cait, convnext, gpt_neox, gpt2, llama, mixtral, mlp_mixer, opt, phi, swin, switch_transformers, t5, vit,
};
use crate::codec::blocks::{Placement, Symmetry};
use crate::safetensors::ModelConfig;
use crate::tensor::TensorInfo;

/// Every family, the first of equally good matches first.
const FAMILIES: [Family; 20] = [
    bert::BERT,
    vit::HUGGING_FACE,
    vit::TIMM,
    gpt2::GPT2,
    gpt_neox::GPT_NEOX,
    opt::OPT,
    llama::LLAMA,
    mixtral::MIXTRAL,
    mixtral::QWEN_MOE,
    phi::PHI,
    phi::PHI3,
    t5::T5,
    t5::GATED,
    switch_transformers::SWITCH_TRANSFORMERS,
    swin::HUGGING_FACE,
    swin::TIMM,
    convnext::HUGGING_FACE,
    convnext::TIMM,
    mlp_mixer::MLP_MIXER,
    cait::CAIT,
];

/// Outside the layers, a tensor with one of these in its path is an embedding.
const EMBEDDINGS: [&str; 13] = [
    "embeddings",
    "word_embeddings",
    "embed_tokens",
    "embed_positions",
    "embed_in",
    "embedding",
    "wte",
    "wpe",
    "shared",
    "pos_embed",
    "patch_embed",
    "cls_token",
    "tok_embeddings",
];

/// Outside the layers, a tensor with one of these in its path is an output head.
const HEADS: [&str; 7] = ["lm_head", "embed_out", "classifier", "head", "cls", "qa_outputs", "score"];

/// A tensor by its place in the checkpoint.
#[derive(Clone, Copy)]
struct Located<'a> {
    file: usize,
    tensor: usize,
    info: &'a TensorInfo,
}

/// Layers that follow one another: by number, the tensors of each by their name after the number.
type Stack<'a> = BTreeMap<u32, BTreeMap<&'a str, Located<'a>>>;

/// Divides a checkpoint into records, in the order of the archive (Eq. 49): embeddings, layer by layer attention, FFN
/// and the rest, then what is global, then heads.
///
/// The family is the one of `config`'s `model_type` where it says one, else the one whose tensors are there. Files of
/// different models are planned one after another.
pub fn plan(files: &[PlanFile<'_>], config: Option<&ModelConfig>) -> CheckpointPlan {
    let default = ModelConfig::default();
    let config = config.unwrap_or(&default);
    let mut checkpoint = CheckpointPlan { family: None, records: Vec::new() };
    let mut counts = Counts::default();
    let models: BTreeSet<usize> = files.iter().map(|file| file.model).collect();
    for model in models {
        let tensors: Vec<Located<'_>> = files
            .iter()
            .enumerate()
            .filter(|(_, file)| file.model == model)
            .flat_map(|(file, plan_file)| {
                plan_file.tensors.iter().enumerate().map(move |(tensor, info)| Located { file, tensor, info })
            })
            .collect();
        let family = detect(&tensors, config);
        checkpoint.family = checkpoint.family.or(family.map(|family| family.name));
        plan_model(&tensors, family, config, &mut counts, &mut checkpoint.records);
    }
    checkpoint
}

/// Stacks and layers so far.
#[derive(Default)]
struct Counts {
    stacks: u32,
    layers: u32,
}

/// The family of these tensors, if its rules fit them.
fn detect(tensors: &[Located<'_>], config: &ModelConfig) -> Option<&'static Family> {
    let admitted = |family: &&Family| match &config.model_type {
        Some(model_type) => family.model_types.contains(&model_type.as_str()),
        None => true,
    };
    // By the tensors that its rules need, and where those are as many, by those that they know.
    let fits = |family: &Family| {
        let parts = family.blocks.iter().flat_map(|rule| rule.parts).filter(|part| !part.optional);
        let needed: BTreeSet<Cow<'_, str>> = parts.map(|part| part.name(0)).collect();
        let known = |name: &str| family.blocks.iter().any(|rule| rule.unmoved.contains(&name));
        let names = || tensors.iter().filter_map(|located| split_at_layer(&located.info.name, family.layers));
        let count = |found: &dyn Fn(&str) -> bool| names().filter(|(_, _, name)| found(name)).count();
        (count(&|name| needed.contains(name)), count(&known))
    };
    let mut best = ((0, usize::MAX), None);
    for family in FAMILIES.iter().filter(admitted) {
        let fits = fits(family);
        if fits > best.0 {
            best = (fits, Some(family));
        }
    }
    best.1
}

fn plan_model(
    tensors: &[Located<'_>],
    family: Option<&'static Family>,
    config: &ModelConfig,
    counts: &mut Counts,
    records: &mut Vec<RecordPlan>,
) {
    let split = |name| match family {
        Some(family) => split_at_layer(name, family.layers),
        None => split_at_first_number(name),
    };
    let mut stacks: BTreeMap<&str, Stack<'_>> = BTreeMap::new();
    let mut outside = Vec::new();
    for located in tensors {
        match split(&located.info.name) {
            Some((prefix, number, name)) => {
                let layer = stacks.entry(prefix).or_default().entry(number).or_default();
                // Two shards may hold one name, whatever the index says: both tensors must be carried.
                outside.extend(layer.insert(name, *located));
            }
            None => outside.push(*located),
        }
    }
    if family.is_none() {
        stacks.retain(|_, stack| {
            let repeats = repeats(stack);
            if !repeats {
                outside.extend(stack.values().flat_map(BTreeMap::values));
            }
            repeats
        });
    }
    outside.sort_by_key(|located| (located.file, located.tensor));
    let place = |block_type| {
        let parts: Vec<PartPlan> = outside
            .iter()
            .filter(|located| block_type_outside_layers(&located.info.name) == block_type)
            .map(|located| located.unmoved(&located.info.name))
            .collect();
        let record = RecordPlan { stack: counts.stacks, layer: None, block_type, symmetry: None, parts };
        (!record.parts.is_empty()).then_some(record)
    };
    let (embedding, global, head) = (place(BlockType::Embedding), place(BlockType::Global), place(BlockType::Head));
    records.extend(embedding);
    for stack in stacks.into_values() {
        for layer in stack.into_values() {
            plan_layer(layer, family, config, counts, records);
            counts.layers += 1;
        }
        counts.stacks += 1;
    }
    records.extend(global);
    records.extend(head);
}

/// The records of one layer: each block type that the family knows, then the rest.
fn plan_layer(
    mut layer: BTreeMap<&str, Located<'_>>,
    family: Option<&'static Family>,
    config: &ModelConfig,
    counts: &Counts,
    records: &mut Vec<RecordPlan>,
) {
    let mut add = |block_type, symmetry, parts: Vec<PartPlan>| {
        if !parts.is_empty() {
            records.push(RecordPlan { stack: counts.stacks, layer: Some(counts.layers), block_type, symmetry, parts });
        }
    };
    let rules = family.iter().flat_map(|family| family.blocks.iter().map(move |rule| (*family, rule)));
    for (family, rule) in rules {
        for expert in 0..rule.instances(&layer) {
            let symmetry = symmetry(family, rule, expert, &layer, config);
            let mut parts = Vec::new();
            for part in rule.parts {
                let Some(located) = layer.remove(&*part.name(expert)) else { continue };
                let unmoved = located.unmoved(part.role);
                let placement = symmetry.map(|(symmetry, width)| part.placement(symmetry, width));
                parts.push(match placement {
                    Some(rows) if part.conjugated => {
                        PartPlan { conjugated: Some([rows, Placement { axis: 1, ..rows }]), ..unmoved }
                    }
                    placement => PartPlan { placement, ..unmoved },
                });
            }
            let block_type = match rule.block_type {
                BlockType::Expert(_) => BlockType::Expert(expert),
                block_type => block_type,
            };
            add(block_type, symmetry.map(|(symmetry, _)| symmetry), parts);
        }
    }
    add(BlockType::Layer, None, layer.iter().map(|(name, located)| located.unmoved(name)).collect());
}

impl Located<'_> {
    /// The tensor as a part that no permutation moves.
    fn unmoved(&self, role: &str) -> PartPlan {
        PartPlan { file: self.file, tensor: self.tensor, role: role.to_owned(), placement: None, conjugated: None }
    }
}

impl BlockRule {
    /// How often the rule applies to a layer: once, or once for each expert, which are numbered from 0.
    fn instances(&self, layer: &BTreeMap<&str, Located<'_>>) -> u16 {
        match self.block_type {
            BlockType::Expert(_) => {
                let is_there = |expert: &u16| layer.contains_key(&*self.parts[0].name(*expert));
                (0..u16::MAX).take_while(is_there).count() as u16
            }
            _ => 1,
        }
    }
}

/// The name that a rule writes with `{}` for the number of an expert.
fn numbered(name: &'static str, expert: u16) -> Cow<'static, str> {
    match name.split_once("{}") {
        Some((before, after)) => Cow::Owned(format!("{before}{expert}{after}")),
        None => Cow::Borrowed(name),
    }
}

impl PartRule {
    /// Name after the layer's number, of this expert where it is one's.
    fn name(&self, expert: u16) -> Cow<'static, str> {
        numbered(self.tensor, expert)
    }

    fn placement(&self, symmetry: Symmetry, width: u32) -> Placement {
        let mut placement = Placement {
            axis: self.axis,
            repeat: self.repeat,
            per_member: self.per_member,
            unit: if self.single { 1 } else { self.fused.saturating_mul(width) },
        };
        placement.per_member &= symmetry.members > 1; // groups of one are their members
        placement
    }

    /// Elements along the axis, if the tensor has the dimensions that the rule expects.
    fn extent(&self, info: &TensorInfo) -> Option<u64> {
        (info.shape.len() == self.dimensions).then(|| info.shape[usize::from(self.axis)])
    }
}

/// The symmetry of a block type in this layer and the width of a block, or `None` where anything is in doubt. `expert` is
/// the number of one, where the rule is for experts.
fn symmetry(
    family: &Family,
    rule: &BlockRule,
    expert: u16,
    layer: &BTreeMap<&str, Located<'_>>,
    config: &ModelConfig,
) -> Option<(Symmetry, u32)> {
    let known = |name: &str| rule.unmoved.contains(&name) || rule.parts.iter().any(|part| part.name(expert) == name);
    let of_module = |name: &str| rule.modules.iter().any(|module| name.starts_with(&*numbered(module, expert)));
    let stranger = layer.keys().any(|name| of_module(name) && !known(name));
    let found = |part: &PartRule| layer.get(&*part.name(expert));
    let missing = rule.parts.iter().any(|part| !part.optional && found(part).is_none());
    if stranger || missing || family.fixed.contains(&rule.block_type) {
        return None;
    }
    let first = &rule.parts[0];
    let first_extent = first.extent(found(first)?.info)?;
    let symmetry = if rule.block_type.is_attention() {
        let single = rule.parts.iter().find(|part| part.single);
        let counted = single.and_then(|part| u32::try_from(part.extent(found(part)?.info)?).ok());
        heads(family, config, counted, first_extent / u64::from(first.repeat))?
    } else {
        Symmetry::free(u32::try_from(first_extent / u64::from(first.repeat)).ok()?)
    };
    let blocks_of_first = if first.per_member { symmetry.blocks().ok()? } else { symmetry.groups };
    let width = first_extent / u64::from(first.repeat) / u64::from(first.fused) / u64::from(blocks_of_first.max(1));
    let width = u32::try_from(width).ok()?;
    if symmetry.blocks().ok()? < 2 || config_disagrees(rule, config, width) {
        return None;
    }
    for part in rule.parts {
        let Some(located) = found(part) else { continue };
        part.extent(located.info)?;
        let placement = part.placement(symmetry, width);
        placement.check(symmetry, &located.info.shape).ok()?;
        if part.conjugated {
            Placement { axis: 1, ..placement }.check(symmetry, &located.info.shape).ok()?;
        }
    }
    Some((symmetry, width))
}

/// Attention heads by groups, as the configuration counts them; `counted` is how many a tensor has an element for, which
/// differs by stage, and `rows` is the first projection's extent without repeats.
fn heads(family: &Family, config: &ModelConfig, counted: Option<u32>, rows: u64) -> Option<Symmetry> {
    let by_width = || {
        let architecture = config.timm_architecture.as_deref()?;
        let &(_, width) = family.head_widths.iter().find(|(prefix, _)| architecture.starts_with(prefix))?;
        u32::try_from(rows / u64::from(width)).ok()
    };
    let heads = counted.or(config.attention_heads).or_else(by_width)?;
    let groups = if family.grouped_queries { config.key_value_heads.unwrap_or(heads) } else { heads };
    if groups == 0 || heads == 0 || !heads.is_multiple_of(groups) {
        return None;
    }
    Some(Symmetry { groups, members: heads / groups })
}

/// Whether the configuration names a head width other than the one the shapes give.
fn config_disagrees(rule: &BlockRule, config: &ModelConfig, width: u32) -> bool {
    rule.block_type.is_attention() && config.head_width.is_some_and(|expected| expected != width)
}

/// Splits `bert.encoder.layer.3.output.dense.weight` at `encoder.layer.` into `bert.`, 3 and `output.dense.weight`.
fn split_at_layer<'a>(name: &'a str, layers: &str) -> Option<(&'a str, u32, &'a str)> {
    name.match_indices(layers).find_map(|(start, _)| {
        let (prefix, rest) = name.split_at(start);
        if !prefix.is_empty() && !prefix.ends_with('.') {
            return None;
        }
        let (number, tensor) = rest[layers.len()..].split_once('.')?;
        Some((prefix, layer_number(number)?, tensor))
    })
}

/// Splits a name at its first path component that is a number.
fn split_at_first_number(name: &str) -> Option<(&str, u32, &str)> {
    let mut start = 0;
    for component in name.split('.') {
        let end = start + component.len();
        if let Some(number) = layer_number(component) {
            return Some((&name[..start], number, name.get(end + 1..)?));
        }
        start = end + 1;
    }
    None
}

/// A number as layers have it: decimal without leading zeros.
fn layer_number(component: &str) -> Option<u32> {
    let number: u32 = component.parse().ok()?;
    (number.to_string() == component).then_some(number)
}

/// Whether numbered modules are layers: two neighbours hold tensors of the same names.
fn repeats(stack: &Stack<'_>) -> bool {
    let layers: Vec<_> = stack.values().collect();
    layers.windows(2).any(|pair| pair[0].keys().eq(pair[1].keys()))
}

fn block_type_outside_layers(name: &str) -> BlockType {
    let has = |components: &[&str]| name.split('.').any(|component| components.contains(&component));
    if has(&EMBEDDINGS) {
        BlockType::Embedding
    } else if has(&HEADS) {
        BlockType::Head
    } else {
        BlockType::Global
    }
}

#[cfg(test)]
mod tests;
