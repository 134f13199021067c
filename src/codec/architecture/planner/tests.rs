use proptest::prelude::*;

use super::*;
use crate::tensor::Dtype;

fn tensors(described: &[(String, Vec<u64>)]) -> Vec<TensorInfo> {
    let mut offset_bytes = 0;
    let mut infos = Vec::new();
    for (name, shape) in described {
        let length_bytes = 4 * shape.iter().product::<u64>();
        infos.push(TensorInfo {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: shape.clone(),
            offset_bytes,
            length_bytes,
        });
        offset_bytes += length_bytes;
    }
    infos
}

/// Three layers of the given tensors, and what stands around them.
fn model(layers: &str, layer: &[(&str, &[u64])], around: &[(&str, &[u64])]) -> Vec<TensorInfo> {
    let mut described: Vec<(String, Vec<u64>)> = Vec::new();
    for number in 0..3 {
        described.extend(layer.iter().map(|(name, shape)| (format!("{layers}{number}.{name}"), shape.to_vec())));
    }
    described.extend(around.iter().map(|&(name, shape)| (name.to_owned(), shape.to_vec())));
    tensors(&described)
}

fn config(model_type: &str, heads: u32, key_value_heads: Option<u32>) -> ModelConfig {
    ModelConfig {
        model_type: Some(model_type.to_owned()),
        attention_heads: Some(heads),
        key_value_heads,
        ..ModelConfig::default()
    }
}

fn planned(tensors: &[TensorInfo], config: Option<&ModelConfig>) -> CheckpointPlan {
    plan(&[PlanFile { model: 0, tensors }], config)
}

/// Axis, repeat, unit, per member.
type Short = (u8, u32, u32, bool);

/// Placements by role.
fn placements(record: &RecordPlan) -> Vec<(&str, Option<Short>)> {
    let short = |placement: Placement| (placement.axis, placement.repeat, placement.unit, placement.per_member);
    record.parts.iter().map(|part| (part.role.as_str(), part.placement.map(short))).collect()
}

fn record(plan: &CheckpointPlan, layer: u32, block_type: BlockType) -> &RecordPlan {
    let found = plan.records.iter().find(|record| record.layer == Some(layer) && record.block_type == block_type);
    found.expect("a record of that type")
}

const LLAMA_LAYER: [(&str, &[u64]); 9] = [
    ("self_attn.q_proj.weight", &[24, 12]),
    ("self_attn.k_proj.weight", &[8, 12]),
    ("self_attn.v_proj.weight", &[8, 12]),
    ("self_attn.o_proj.weight", &[12, 24]),
    ("mlp.gate_proj.weight", &[20, 12]),
    ("mlp.up_proj.weight", &[20, 12]),
    ("mlp.down_proj.weight", &[12, 20]),
    ("input_layernorm.weight", &[12]),
    ("post_attention_layernorm.weight", &[12]),
];

#[test]
fn llama_moves_query_heads_with_their_key_value_head() {
    let tensors = model(
        "model.layers.",
        &LLAMA_LAYER,
        &[("model.embed_tokens.weight", &[9, 12]), ("model.norm.weight", &[12]), ("lm_head.weight", &[9, 12])],
    );
    let plan = planned(&tensors, Some(&config("mistral", 6, Some(2))));
    assert_eq!(plan.family, Some("llama"));
    let order: Vec<_> = plan.records.iter().map(|record| (record.layer, record.block_type.name())).collect();
    let layers = [0, 1, 2].into_iter().flat_map(|layer| ["attention", "ffn", "layer"].map(|name| (Some(layer), name)));
    let expected: Vec<_> =
        std::iter::once((None, "embedding")).chain(layers).chain([(None, "global"), (None, "head")]).collect();
    assert_eq!(order, expected);

    let attention = record(&plan, 1, BlockType::Attention);
    assert_eq!(attention.symmetry, Some(Symmetry { groups: 2, members: 3 }));
    assert_eq!(
        placements(attention),
        [
            ("query", Some((0, 1, 4, true))),
            ("key", Some((0, 1, 4, false))),
            ("value", Some((0, 1, 4, false))),
            ("output", Some((1, 1, 4, true))),
        ]
    );
    let ffn = record(&plan, 1, BlockType::Ffn);
    assert_eq!(ffn.symmetry, Some(Symmetry::free(20)));
    assert_eq!(
        placements(ffn),
        [("gate", Some((0, 1, 1, false))), ("up", Some((0, 1, 1, false))), ("down", Some((1, 1, 1, false))),]
    );
    let files = [PlanFile { model: 0, tensors: &tensors }];
    assert!(ffn.follows(record(&plan, 0, BlockType::Ffn), &files));
    assert!(!ffn.follows(record(&plan, 2, BlockType::Ffn), &files));
    assert!(!ffn.follows(record(&plan, 0, BlockType::Attention), &files));
}

#[test]
fn multi_query_attention_is_one_group() {
    let mut layer = LLAMA_LAYER;
    layer[1].1 = &[4, 12];
    layer[2].1 = &[4, 12];
    let tensors = model("model.layers.", &layer, &[]);
    let plan = planned(&tensors, Some(&config("llama", 6, Some(1))));
    assert_eq!(record(&plan, 0, BlockType::Attention).symmetry, Some(Symmetry { groups: 1, members: 6 }));
}

#[test]
fn a_doubtful_block_type_loses_its_symmetry_and_nothing_else() {
    let symmetric = |layer: &[(&str, &[u64])], config: &ModelConfig| {
        let tensors = model("model.layers.", layer, &[]);
        let plan = planned(&tensors, Some(config));
        let parts: usize = plan.records.iter().map(|record| record.parts.len()).sum();
        assert_eq!(parts, tensors.len());
        [BlockType::Attention, BlockType::Ffn].map(|block_type| record(&plan, 0, block_type).symmetry.is_some())
    };
    let good = config("llama", 6, Some(2));
    assert_eq!(symmetric(&LLAMA_LAYER, &good), [true, true]);
    assert_eq!(symmetric(&LLAMA_LAYER, &config("llama", 5, Some(2))), [false, true], "heads in no groups");
    assert_eq!(symmetric(&LLAMA_LAYER, &config("llama", 6, Some(0))), [false, true], "no heads");
    assert_eq!(symmetric(&LLAMA_LAYER, &config("llama", 6, None)), [false, true], "keys too narrow for six heads");
    let wide = ModelConfig { head_width: Some(8), ..good.clone() };
    assert_eq!(symmetric(&LLAMA_LAYER, &wide), [false, true], "another head width");
    let without_heads = ModelConfig { attention_heads: None, ..good.clone() };
    assert_eq!(symmetric(&LLAMA_LAYER, &without_heads), [false, true]);
    assert_eq!(symmetric(&LLAMA_LAYER[1..], &good), [false, true], "no query");
    let mut stranger = LLAMA_LAYER.to_vec();
    stranger.push(("mlp.router.weight", &[4, 12]));
    assert_eq!(symmetric(&stranger, &good), [true, false]);
    let mut misshapen = LLAMA_LAYER.to_vec();
    misshapen[6].1 = &[12, 21];
    assert_eq!(symmetric(&misshapen, &good), [true, false]);
    misshapen[6].1 = &[12, 20, 1];
    assert_eq!(symmetric(&misshapen, &good), [true, false]);
    misshapen[0].1 = &[0, 12];
    assert_eq!(symmetric(&misshapen, &good), [false, false]);
}

#[test]
fn gpt2_has_inputs_first_and_three_rows_of_heads() {
    let layer: [(&str, &[u64]); 9] = [
        ("attn.c_attn.weight", &[8, 24]),
        ("attn.c_attn.bias", &[24]),
        ("attn.bias", &[1, 1, 16, 16]),
        ("attn.c_proj.weight", &[8, 8]),
        ("attn.c_proj.bias", &[8]),
        ("mlp.c_fc.weight", &[8, 32]),
        ("mlp.c_fc.bias", &[32]),
        ("mlp.c_proj.weight", &[32, 8]),
        ("ln_1.weight", &[8]),
    ];
    let tensors = model("h.", &layer, &[("wte.weight", &[50, 8])]);
    let plan = planned(&tensors, Some(&config("gpt2", 4, None)));
    assert_eq!(
        placements(record(&plan, 2, BlockType::Attention)),
        [
            ("query_key_value", Some((1, 3, 2, false))),
            ("output", Some((0, 1, 2, false))),
            ("query_key_value_bias", Some((0, 3, 2, false))),
        ]
    );
    assert_eq!(
        placements(record(&plan, 2, BlockType::Ffn)),
        [("up", Some((1, 1, 1, false))), ("down", Some((0, 1, 1, false))), ("up_bias", Some((0, 1, 1, false))),]
    );
    assert_eq!(
        placements(record(&plan, 2, BlockType::Layer)),
        [("attn.bias", None), ("attn.c_proj.bias", None), ("ln_1.weight", None),]
    );
    assert_eq!(plan.records[0].block_type, BlockType::Embedding);
}

#[test]
fn gpt_neox_has_query_key_and_value_of_a_head_together() {
    let layer: [(&str, &[u64]); 6] = [
        ("attention.query_key_value.weight", &[24, 8]),
        ("attention.query_key_value.bias", &[24]),
        ("attention.dense.weight", &[8, 8]),
        ("attention.dense.bias", &[8]),
        ("mlp.dense_h_to_4h.weight", &[32, 8]),
        ("mlp.dense_4h_to_h.weight", &[8, 32]),
    ];
    let tensors = model("gpt_neox.layers.", &layer, &[("embed_out.weight", &[50, 8])]);
    let plan = planned(&tensors, Some(&config("gpt_neox", 4, None)));
    assert_eq!(
        placements(record(&plan, 0, BlockType::Attention)),
        [
            ("query_key_value", Some((0, 1, 6, false))),
            ("output", Some((1, 1, 2, false))),
            ("query_key_value_bias", Some((0, 1, 6, false))),
        ]
    );
    assert_eq!(plan.records.last().map(|record| record.block_type), Some(BlockType::Head));
}

#[test]
fn encoders_are_told_apart_by_their_tensors_where_nothing_else_says_it() {
    let ffn: [(&str, &[u64]); 2] = [("intermediate.dense.weight", &[16, 8]), ("output.dense.weight", &[8, 16])];
    let attention =
        |prefix: &str| ["query", "key", "value"].map(|name| (format!("{prefix}.{name}.weight"), vec![8u64, 8]));
    for (prefix, family) in [("attention.self", "bert"), ("attention.attention", "vit")] {
        let mut described = Vec::new();
        for number in 0..2 {
            let layer = format!("x.encoder.layer.{number}");
            described.extend(attention(&format!("{layer}.{prefix}")));
            described.push((format!("{layer}.attention.output.dense.weight"), vec![8, 8]));
            described.extend(ffn.map(|(name, shape)| (format!("{layer}.{name}"), shape.to_vec())));
        }
        let tensors = tensors(&described);
        let plan = planned(&tensors, None);
        assert_eq!(plan.family, Some(family));
        assert_eq!(record(&plan, 1, BlockType::Attention).symmetry, None, "nothing counts the heads");
        assert_eq!(record(&plan, 1, BlockType::Ffn).symmetry, Some(Symmetry::free(16)));
        let counted = ModelConfig { attention_heads: Some(2), ..ModelConfig::default() };
        let plan = planned(&tensors, Some(&counted));
        assert_eq!(record(&plan, 1, BlockType::Attention).symmetry, Some(Symmetry::free(2)));
    }
}

#[test]
fn timm_counts_heads_by_the_name_of_the_architecture() {
    let layer: [(&str, &[u64]); 4] = [
        ("attn.qkv.weight", &[576, 192]),
        ("attn.proj.weight", &[192, 192]),
        ("mlp.fc1.weight", &[768, 192]),
        ("mlp.fc2.weight", &[192, 768]),
    ];
    let tensors = model("blocks.", &layer, &[("pos_embed", &[1, 197, 192]), ("head.weight", &[10, 192])]);
    let timm = ModelConfig { timm_architecture: Some("vit_tiny_patch16_224".to_owned()), ..ModelConfig::default() };
    let plan = planned(&tensors, Some(&timm));
    assert_eq!(
        placements(record(&plan, 0, BlockType::Attention)),
        [("query_key_value", Some((0, 3, 64, false))), ("output", Some((1, 1, 64, false))),]
    );
    assert_eq!(record(&plan, 0, BlockType::Attention).symmetry, Some(Symmetry::free(3)));
}

#[test]
fn opt_is_not_taken_for_llama() {
    let layer: [(&str, &[u64]); 7] = [
        ("self_attn.q_proj.weight", &[8, 8]),
        ("self_attn.k_proj.weight", &[8, 8]),
        ("self_attn.v_proj.weight", &[8, 8]),
        ("self_attn.out_proj.weight", &[8, 8]),
        ("fc1.weight", &[32, 8]),
        ("fc1.bias", &[32]),
        ("fc2.weight", &[8, 32]),
    ];
    let tensors = model("model.decoder.layers.", &layer, &[]);
    assert_eq!(planned(&tensors, None).family, Some("opt"));
    let plan = planned(&tensors, Some(&config("opt", 2, None)));
    assert_eq!(record(&plan, 0, BlockType::Attention).symmetry, Some(Symmetry::free(2)));
    assert_eq!(record(&plan, 0, BlockType::Ffn).symmetry, Some(Symmetry::free(32)));
}

#[test]
fn an_unknown_architecture_has_layers_without_symmetry() {
    let tensors =
        model("net.", &[("conv.weight", &[3, 3]), ("norm.weight", &[3])], &[("stem.0.weight", &[3]), ("top", &[])]);
    let plan = planned(&tensors, Some(&config("mystery", 4, None)));
    assert_eq!(plan.family, None);
    let kinds: Vec<_> =
        plan.records.iter().map(|record| (record.layer, record.block_type, record.parts.len())).collect();
    assert_eq!(
        kinds,
        [
            (Some(0), BlockType::Layer, 2),
            (Some(1), BlockType::Layer, 2),
            (Some(2), BlockType::Layer, 2),
            (None, BlockType::Global, 2),
        ]
    );
    let files = [PlanFile { model: 0, tensors: &tensors }];
    assert!(plan.records[1].follows(&plan.records[0], &files));
}

#[test]
fn two_stacks_are_counted_on_and_do_not_follow_one_another() {
    let shape: &[u64] = &[4, 4];
    let mut both = model("decoder.", &[("a.weight", shape)], &[]);
    both.extend(model("encoder.", &[("a.weight", shape)], &[]));
    let plan = planned(&both, None);
    let places: Vec<_> = plan.records.iter().map(|record| (record.stack, record.layer)).collect();
    assert_eq!(places, [0, 1, 2, 3, 4, 5].map(|layer| (layer / 3, Some(layer))));
    let files = [PlanFile { model: 0, tensors: &both }];
    assert!(!plan.records[3].follows(&plan.records[2], &files));
}

#[test]
fn a_layer_may_lie_in_two_shards_and_equal_names_in_two_models() {
    let tensors = model("model.layers.", &LLAMA_LAYER, &[]);
    let (front, back) = tensors.split_at(5);
    let shards = [PlanFile { model: 0, tensors: front }, PlanFile { model: 0, tensors: back }];
    let llama = config("llama", 6, Some(2));
    let plan_of_shards = plan(&shards, Some(&llama));
    assert!(record(&plan_of_shards, 0, BlockType::Ffn).symmetry.is_some());
    let twice = [PlanFile { model: 0, tensors: &tensors }, PlanFile { model: 1, tensors: &tensors }];
    let plan_of_models = plan(&twice, Some(&llama));
    assert_eq!(plan_of_models.records.len(), 2 * plan_of_shards.records.len());
    assert_eq!(plan_of_models.records.last().and_then(|record| record.layer), Some(5));
}

proptest! {
    #[test]
    fn every_tensor_is_a_part_of_exactly_one_record(
        names in prop::collection::vec(
            "(model\\.layers|encoder\\.layer|h|blocks|x)\\.[0-4]\\.(self_attn\\.[qkvo]_proj\\.weight|mlp\\.(gate|up|down)_proj\\.weight|a|attn\\.c_attn\\.weight|output\\.dense\\.weight)|embed_tokens\\.weight|head|[0-9.a-c]{0,6}",
            0..40,
        ),
        shapes in prop::collection::vec(prop::collection::vec(0u64..9, 0..3), 40),
        heads in 0u32..5,
        key_value_heads in 0u32..5,
        model_type in prop::option::of(prop::sample::select(vec!["llama", "bert", "gpt2", "other"])),
        split in any::<prop::sample::Index>(),
    ) {
        let described: Vec<_> = names.into_iter().zip(shapes).collect();
        let tensors = tensors(&described); // names may come twice, as they do in independent files
        let (front, back) = tensors.split_at(if tensors.is_empty() { 0 } else { split.index(tensors.len()) });
        let config = ModelConfig {
            model_type: model_type.map(str::to_owned),
            attention_heads: Some(heads),
            key_value_heads: Some(key_value_heads),
            ..ModelConfig::default()
        };
        let files = [PlanFile { model: 0, tensors: front }, PlanFile { model: 0, tensors: back }];
        let plan = plan(&files, Some(&config));
        let mut places: Vec<_> =
            plan.records.iter().flat_map(|record| &record.parts).map(|part| (part.file, part.tensor)).collect();
        places.sort_unstable();
        let expected: Vec<_> = (0..front.len()).map(|t| (0, t)).chain((0..back.len()).map(|t| (1, t))).collect();
        prop_assert_eq!(places, expected);
        for record in &plan.records {
            for part in &record.parts {
                if let (Some(placement), Some(symmetry)) = (part.placement, record.symmetry) {
                    placement.check(symmetry, &files[part.file].tensors[part.tensor].shape).unwrap();
                } else {
                    prop_assert!(part.placement.is_none());
                }
            }
        }
    }
}

#[test]
fn heads_of_t5_stay_where_layers_share_the_position_bias() {
    let attention =
        |name: &'static str| ["q", "k", "v", "o"].map(|tensor| (format!("{name}.{tensor}.weight"), vec![12_u64, 12]));
    let mut layer: Vec<(String, Vec<u64>)> = attention("layer.0.SelfAttention").to_vec();
    layer.extend(attention("layer.1.EncDecAttention"));
    layer.push(("layer.2.DenseReluDense.wi.weight".into(), vec![20, 12]));
    layer.push(("layer.2.DenseReluDense.wo.weight".into(), vec![12, 20]));
    let layer: Vec<(&str, &[u64])> = layer.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    let plan = planned(&model("decoder.block.", &layer, &[]), Some(&config("t5", 3, None)));
    assert_eq!(plan.family, Some("t5"));
    let symmetry = |block_type| record(&plan, 1, block_type).symmetry;
    assert_eq!(symmetry(BlockType::Attention), None);
    assert_eq!(symmetry(BlockType::CrossAttention), Some(Symmetry::free(3)));
    assert_eq!(symmetry(BlockType::Ffn), Some(Symmetry::free(20)));
}

#[test]
fn stages_do_not_follow_one_another_and_count_their_own_heads() {
    let stage = |number: u32, width: u64, heads: u64| -> Vec<(String, Vec<u64>)> {
        let block = |block| {
            [
                ("attn.relative_position_bias_table", vec![9, heads]),
                ("attn.qkv.weight", vec![3 * width, width]),
                ("attn.proj.weight", vec![width, width]),
                ("mlp.fc1.weight", vec![4 * width, width]),
                ("mlp.fc2.weight", vec![width, 4 * width]),
            ]
            .map(|(name, shape)| (format!("layers.{number}.blocks.{block}.{name}"), shape))
        };
        [block(0), block(1)].concat()
    };
    let tensors = tensors(&[stage(0, 8, 2), stage(1, 16, 4)].concat());
    let plan = planned(&tensors, None);
    assert_eq!(plan.family, Some("swin-timm"));
    let groups = [0, 1, 2, 3].map(|layer| record(&plan, layer, BlockType::Attention).symmetry.unwrap().groups);
    assert_eq!(groups, [2, 2, 4, 4]);
    let table =
        placements(record(&plan, 2, BlockType::Attention)).into_iter().find(|(role, _)| *role == "position_bias");
    assert_eq!(table, Some(("position_bias", Some((1, 1, 1, false)))));
    let files = [PlanFile { model: 0, tensors: &tensors }];
    let follows =
        |layer| record(&plan, layer, BlockType::Ffn).follows(record(&plan, layer - 1, BlockType::Ffn), &files);
    assert_eq!([1, 2, 3].map(follows), [true, false, true]);
}

#[test]
fn talking_heads_have_their_mixing_matrices_conjugated() {
    let layer: [(&str, &[u64]); 6] = [
        ("attn.qkv.weight", &[24, 8]),
        ("attn.proj.weight", &[8, 8]),
        ("attn.proj_l.weight", &[4, 4]),
        ("attn.proj_w.weight", &[4, 4]),
        ("mlp.fc1.weight", &[32, 8]),
        ("mlp.fc2.weight", &[8, 32]),
    ];
    let plan = planned(&model("blocks.", &layer, &[]), None);
    assert_eq!(plan.family, Some("cait"));
    let attention = record(&plan, 0, BlockType::Attention);
    assert_eq!(attention.symmetry, Some(Symmetry::free(4)));
    let mixing: Vec<_> = attention.parts.iter().filter_map(|part| part.conjugated).collect();
    let axis = |axis| Placement { axis, repeat: 1, per_member: false, unit: 1 };
    assert_eq!(mixing, [[axis(0), axis(1)]; 2]);
    let without: Vec<_> = layer.iter().filter(|(name, _)| !name.starts_with("attn.proj_")).copied().collect();
    assert_eq!(planned(&model("blocks.", &without, &[]), None).family, Some("vit-timm"));
}

#[test]
fn an_expert_follows_the_one_of_its_number() {
    let mut layer: Vec<(String, Vec<u64>)> =
        LLAMA_LAYER[..4].iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect();
    for expert in 0..3 {
        let name = |tensor| format!("block_sparse_moe.experts.{expert}.{tensor}.weight");
        layer.extend([(name("w1"), vec![20, 12]), (name("w2"), vec![12, 20]), (name("w3"), vec![20, 12])]);
    }
    layer.push(("block_sparse_moe.gate.weight".into(), vec![3, 12]));
    let layer: Vec<(&str, &[u64])> = layer.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    let tensors = model("model.layers.", &layer, &[]);
    let plan = planned(&tensors, Some(&config("mixtral", 6, Some(2))));
    assert_eq!(plan.family, Some("mixtral"));
    let expert = |layer, number| record(&plan, layer, BlockType::Expert(number));
    assert_eq!(expert(0, 2).symmetry, Some(Symmetry::free(20)));
    let files = [PlanFile { model: 0, tensors: &tensors }];
    assert!(expert(1, 2).follows(expert(0, 2), &files));
    assert!(!expert(1, 2).follows(expert(0, 1), &files));
    let router = record(&plan, 0, BlockType::Layer);
    assert_eq!(placements(router), [("block_sparse_moe.gate.weight", None)]);
}
