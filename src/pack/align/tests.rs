use half::{bf16, f16};

use super::*;
use crate::codec::blocks::{AxisLayout, Placement, Symmetry, gather};
use crate::tensor::{Dtype, TensorInfo};

/// A tensor with its numbers and where the blocks lie in it.
struct Part {
    info: TensorInfo,
    placement: Placement,
    values: Vec<f32>,
    bytes: Vec<u8>,
}

fn part(shape: [u64; 2], placement: Placement, chance: &mut fastrand::Rng) -> Part {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| chance.f32() - 0.5).collect();
    with_values(shape, placement, values)
}

fn with_values(shape: [u64; 2], placement: Placement, values: Vec<f32>) -> Part {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let info = TensorInfo {
        name: "w".to_owned(),
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        offset_bytes: 0,
        length_bytes: bytes.len() as u64,
    };
    Part { info, placement, values, bytes }
}

/// The part with its blocks permuted, and a little noise.
fn moved(part: &Part, permutation: &GroupedPermutation, noise: f32, chance: &mut fastrand::Rng) -> Part {
    let layout = AxisLayout::new(&part.info.shape, part.placement.axis).unwrap();
    let mut values = vec![0.0; part.values.len()];
    gather(&part.values, &mut values, layout, &part.placement.index_map(permutation));
    for value in &mut values {
        *value += noise * (chance.f32() - 0.5);
    }
    with_values([part.info.shape[0], part.info.shape[1]], part.placement, values)
}

fn vectors(symmetry: Symmetry, parts: &[Part]) -> BlockVectors<'_> {
    let parts = parts.iter().map(|part| (&part.info, part.placement, part.bytes.as_slice()));
    BlockVectors::new(symmetry, parts).unwrap()
}

fn shuffled(len: u32, chance: &mut fastrand::Rng) -> Permutation {
    let mut entries: Vec<u32> = (0..len).collect();
    chance.shuffle(&mut entries);
    Permutation::new(entries).unwrap()
}

/// Two unrelated layers look alike after alignment, but only where the permutation was chosen.
#[test]
fn chance_is_found_where_it_was_fitted_and_not_in_the_half_held_out() {
    let mut chance = fastrand::Rng::with_seed(3);
    let symmetry = Symmetry { groups: 64, members: 1 };
    let (lower, upper) = (part([64, 64], ROWS, &mut chance), part([64, 64], ROWS, &mut chance));
    let (lower, upper) =
        (vectors(symmetry, std::slice::from_ref(&lower)), vectors(symmetry, std::slice::from_ref(&upper)));
    let of = |half: Half| (lower.clone().half(half), upper.clone().half(half));
    let ((fitted_lower, fitted_upper), (other_lower, other_upper)) = (of(Half::Fitted), of(Half::HeldOut));
    assert_eq!(fitted_upper.weights() + other_upper.weights(), upper.weights());
    let permutation = align(Alignment::Similarity, BlockType::Ffn, 1, &fitted_lower, &fitted_upper);
    let fitted = compare(&fitted_lower, &fitted_upper, &permutation);
    let held_out = compare(&other_lower, &other_upper, &permutation);
    assert!(fitted.explained_variance() > 0.05, "{}", fitted.explained_variance());
    let elsewhere = held_out.explained_variance_with_gain_of(&fitted);
    assert!(elsewhere < 0.02, "{elsewhere}");
    let own = fitted.explained_variance_with_gain_of(&fitted);
    assert!((own - fitted.explained_variance()).abs() < 1e-9, "{own}");
}

#[test]
fn residual_magnitudes_are_counted_in_eighths_of_a_deviation() {
    let symmetry = Symmetry { groups: 2, members: 1 };
    let (lower, upper) =
        (with_values([2, 2], ROWS, vec![0.0, 8.0, 0.0, 1.0]), with_values([2, 2], ROWS, vec![1.0, 1.5, 0.0, -9.0]));
    let (lower, upper) =
        (vectors(symmetry, std::slice::from_ref(&lower)), vectors(symmetry, std::slice::from_ref(&upper)));
    let swapped = GroupedPermutation::free(Permutation::new(vec![1, 0]).unwrap()).unwrap();
    // 1 - 0, 1.5 - 1/2, 0 - 0, -9 - 8/2; a deviation of 8 makes bins of 1, and 13 is in the 13th.
    let counts = residual_magnitudes(&lower, &upper, &swapped, 0.5, 8.0);
    let filled: Vec<(usize, u64)> = counts.iter().copied().enumerate().filter(|(_, count)| *count > 0).collect();
    assert_eq!(filled, [(0, 1), (1, 2), (13, 1)]);
    let beyond = residual_magnitudes(&lower, &upper, &swapped, 0.5, 1.0);
    assert_eq!(beyond[MAGNITUDE_BINS - 1], 1, "what is above the last bin is in it");
    assert_eq!(MAGNITUDES_PER_DEVIATION, 8);
}

const ROWS: Placement = Placement { axis: 0, repeat: 1, per_member: false, unit: 1 };
const COLUMNS: Placement = Placement { axis: 1, ..ROWS };

/// `current` made from `previous` by a permutation, for each symmetry and placement, is found again.
fn assert_found_again(symmetry: Symmetry, shapes: &[([u64; 2], Placement)], truth: &GroupedPermutation) {
    let mut chance = fastrand::Rng::with_seed(7);
    let previous: Vec<Part> = shapes.iter().map(|&(shape, placement)| part(shape, placement, &mut chance)).collect();
    let current: Vec<Part> = previous.iter().map(|part| moved(part, truth, 0.3, &mut chance)).collect();
    let (previous, current) = (vectors(symmetry, &previous), vectors(symmetry, &current));
    let found = align(Alignment::Similarity, BlockType::Ffn, 1, &previous, &current);
    assert_eq!(&found, truth);
    let before = compare(&previous, &current, &GroupedPermutation::identity(symmetry).unwrap());
    let after = compare(&previous, &current, &found);
    assert!(after.normalized_residual_energy() < 0.15, "{}", after.normalized_residual_energy());
    assert!(before.normalized_residual_energy() > 0.8);
    if symmetry.groups > 1 {
        assert!(after.explained_variance() > 0.7 && after.explained_variance() < 1.0);
    }
    assert!(after.gaussian_bits_saved() > before.gaussian_bits_saved());
    assert_eq!(after.cosines.len(), symmetry.groups as usize);
}

#[test]
fn units_that_changed_places_are_found_again_exactly_and_greedily() {
    for blocks in [20u32, 600] {
        let mut chance = fastrand::Rng::with_seed(3);
        let truth = GroupedPermutation::free(shuffled(blocks, &mut chance)).unwrap();
        let wide = u64::from(blocks);
        assert_found_again(Symmetry::free(blocks), &[([wide, 30], ROWS), ([25, wide], COLUMNS)], &truth);
    }
}

#[test]
fn heads_of_fused_projections_are_found_again() {
    let truth = GroupedPermutation::free(Permutation::new(vec![2, 0, 3, 1]).unwrap()).unwrap();
    let query_key_value = Placement { axis: 1, repeat: 3, per_member: false, unit: 5 };
    let output = Placement { axis: 0, repeat: 1, per_member: false, unit: 5 };
    assert_found_again(Symmetry::free(4), &[([12, 60], query_key_value), ([20, 12], output)], &truth);
}

#[test]
fn query_heads_are_found_again_inside_their_groups() {
    let mut chance = fastrand::Rng::with_seed(5);
    let inner = (0..4).map(|_| shuffled(3, &mut chance)).collect();
    let truth = GroupedPermutation::new(shuffled(4, &mut chance), inner).unwrap();
    let key = Placement { axis: 0, repeat: 1, per_member: false, unit: 6 };
    let query = Placement { per_member: true, ..key };
    let output = Placement { axis: 1, ..query };
    let shapes = [([72, 20], query), ([24, 20], key), ([20, 72], output)];
    assert_found_again(Symmetry { groups: 4, members: 3 }, &shapes, &truth);
    let one_group = GroupedPermutation::new(Permutation::identity(1), vec![shuffled(12, &mut chance)]).unwrap();
    let shapes = [([72, 20], query), ([6, 20], key), ([20, 72], output)];
    assert_found_again(Symmetry { groups: 1, members: 12 }, &shapes, &one_group);
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let mut chance = fastrand::Rng::with_seed(11);
    let symmetry = Symmetry::free(700);
    let previous = [part([700, 9], ROWS, &mut chance)];
    let current = [part([700, 9], ROWS, &mut chance)];
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (previous, current) = (vectors(symmetry, &previous), vectors(symmetry, &current));
            let permutation = align(Alignment::Similarity, BlockType::Ffn, 1, &previous, &current);
            let statistics = compare(&previous, &current, &permutation);
            (permutation, statistics)
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn greed_with_swaps_comes_close_to_the_exact_sum() {
    let mut chance = fastrand::Rng::with_seed(13);
    let symmetry = Symmetry::free(400);
    let (previous, current) = ([part([400, 16], ROWS, &mut chance)], [part([400, 16], ROWS, &mut chance)]);
    let (previous, current) = (vectors(symmetry, &previous), vectors(symmetry, &current));
    let sum = |outer: Vec<u32>| {
        let permutation = GroupedPermutation::free(Permutation::new(outer).unwrap()).unwrap();
        compare(&previous, &current, &permutation).cosines.iter().sum::<f64>()
    };
    let exact = sum(hungarian::assign(&similarity::cosines(&current, &previous)));
    let ranks: Vec<u32> = (0..400).collect();
    let greedy = sum(screened_greedy::assign(&current, &previous, (16, true), &ranks));
    assert!(greedy <= exact + 1e-3 && greedy > 0.95 * exact, "{greedy} of {exact}");
    let unrefined = sum(screened_greedy::assign(&current, &previous, (8, false), &ranks));
    assert!(unrefined <= greedy + 1e-3, "{unrefined} of {greedy}");
}

#[test]
fn by_energy_the_permutation_leaves_the_least_of_a_scaled_copy() {
    let mut chance = fastrand::Rng::with_seed(19);
    let symmetry = Symmetry::free(40);
    let with_lengths = |part: Part, chance: &mut fastrand::Rng| {
        let lengths: Vec<f32> = (0..40).map(|_| 0.1 + 3.0 * chance.f32()).collect();
        with_values([40, 6], ROWS, part.values.iter().enumerate().map(|(at, value)| value * lengths[at / 6]).collect())
    };
    let [previous, current] = [(); 2].map(|()| {
        let plain = part([40, 6], ROWS, &mut chance);
        [with_lengths(plain, &mut chance)]
    });
    let left = |by_energy: bool| {
        let of = |part| if by_energy { vectors(symmetry, part).by_energy() } else { vectors(symmetry, part) };
        let (previous, current) = (of(&previous), of(&current));
        let permutation = align(Alignment::Similarity, BlockType::Ffn, 1, &previous, &current);
        compare(&previous, &current, &permutation).normalized_residual_energy()
    };
    assert!(left(true) < left(false), "{} and {}", left(true), left(false));
}

#[test]
fn blocks_that_do_alike_are_found_by_activations_alone() {
    let mut chance = fastrand::Rng::with_seed(23);
    let symmetry = Symmetry::free(12);
    let (previous, current) = ([part([12, 5], ROWS, &mut chance)], [part([12, 5], ROWS, &mut chance)]);
    let truth = shuffled(12, &mut chance);
    let below = ndarray::Array2::from_shape_simple_fn((12, 8), || chance.f32());
    let own = below.select(ndarray::Axis(0), &truth.entries().iter().map(|&to| to as usize).collect::<Vec<_>>());
    let previous = vectors(symmetry, &previous).with_activations(0.0, &below);
    let current = vectors(symmetry, &current).with_activations(0.0, &own);
    let found = align(Alignment::Similarity, BlockType::Ffn, 1, &previous, &current);
    assert_eq!(found, GroupedPermutation::free(truth).unwrap());
}

#[test]
fn a_seed_decides_between_equal_blocks_and_between_no_others() {
    let symmetry = Symmetry::free(20);
    let alike = [with_values([20, 3], ROWS, vec![1.0; 60])];
    let of_seed = |parts: &[Part], tie_seed| {
        let method = Method { tie_seed, ..Method::from(Alignment::Similarity) };
        align(method, BlockType::Ffn, 1, &vectors(symmetry, parts), &vectors(symmetry, parts))
    };
    assert_eq!(of_seed(&alike, Some(1)), of_seed(&alike, Some(1)));
    let mut chance = fastrand::Rng::with_seed(29);
    let different = [part([20, 3], ROWS, &mut chance)];
    assert!((1..4).all(|seed| of_seed(&different, Some(seed)).is_identity()));
}

#[test]
fn ablations_move_what_they_say() {
    let mut chance = fastrand::Rng::with_seed(17);
    let symmetry = Symmetry::free(30);
    let (previous, current) = ([part([30, 9], ROWS, &mut chance)], [part([30, 9], ROWS, &mut chance)]);
    let (previous, current) = (vectors(symmetry, &previous), vectors(symmetry, &current));
    let moves = |alignment, block_type| !align(alignment, block_type, 1, &previous, &current).is_identity();
    let both = |alignment| [BlockType::Ffn, BlockType::Attention].map(|block_type| moves(alignment, block_type));
    assert_eq!(both(Alignment::None), [false, false]);
    assert_eq!(both(Alignment::FfnOnly), [true, false]);
    assert_eq!(both(Alignment::HeadsOnly), [false, true]);
    assert_eq!(both(Alignment::Similarity), [true, true]);
    assert_eq!(both(Alignment::Random { seed: 1 }), [true, true]);
    let random = |seed, layer| align(Alignment::Random { seed }, BlockType::Ffn, layer, &previous, &current);
    assert_eq!(random(1, 2), random(1, 2));
    assert_ne!(random(1, 2), random(1, 3));
    assert_ne!(random(1, 2), random(2, 2));
}

#[test]
fn weights_that_are_no_numbers_or_too_large_disturb_nothing() {
    let mut chance = fastrand::Rng::with_seed(19);
    for bad in [f32::NAN, f32::INFINITY, f32::MAX, 0.0] {
        let symmetry = Symmetry::free(300);
        let mut values: Vec<f32> = (0..300 * 4).map(|_| chance.f32()).collect();
        values[..40].fill(bad);
        let parts = [with_values([300, 4], ROWS, values)];
        let (previous, current) = (vectors(symmetry, &parts), vectors(symmetry, &parts));
        let found = align(Alignment::Similarity, BlockType::Ffn, 1, &previous, &current);
        compare(&previous, &current, &found);
    }
}

#[test]
fn a_control_has_the_energy_of_the_weights_and_none_of_their_likeness() {
    let mut chance = fastrand::Rng::with_seed(23);
    let symmetry = Symmetry::free(50);
    let parts = [part([50, 400], ROWS, &mut chance)];
    let identity = GroupedPermutation::identity(symmetry).unwrap();
    let same = compare(&vectors(symmetry, &parts), &vectors(symmetry, &parts), &identity);
    assert!(same.cosines.iter().all(|&cosine| cosine > 0.999));
    let control = |seed| vectors(symmetry, &parts).gaussian_control(seed);
    let apart = compare(&control(1), &control(2), &identity);
    let mean: f64 = apart.cosines.iter().sum::<f64>() / 50.0;
    assert!(mean.abs() < 0.05, "{mean}");
    assert!((apart.energy / same.energy - 1.0).abs() < 0.05);
    assert_eq!(compare(&control(1), &control(1), &identity).cosines.len(), 50);
}

#[test]
fn every_float_type_is_read_and_nothing_else() {
    let values = [1.0f32, -2.5, 0.125, 3.0];
    let bytes_of: [(Dtype, Vec<u8>); 4] = [
        (Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        (Dtype::F64, values.iter().flat_map(|&value| f64::from(value).to_le_bytes()).collect()),
        (Dtype::F16, values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()),
        (Dtype::BF16, values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()),
    ];
    for (dtype, bytes) in &bytes_of {
        let mut part = with_values([2, 2], ROWS, values.to_vec());
        part.info.dtype = dtype.clone();
        part.info.length_bytes = bytes.len() as u64;
        let vectors =
            BlockVectors::new(Symmetry { groups: 2, members: 1 }, [(&part.info, ROWS, bytes.as_slice())]).unwrap();
        assert_eq!(vectors.rows(blocks::Level::Groups, &[1, 0]), ndarray::array![[0.125, 3.0], [1.0, -2.5]]);
        let columns =
            BlockVectors::new(Symmetry { groups: 2, members: 1 }, [(&part.info, COLUMNS, bytes.as_slice())]).unwrap();
        assert_eq!(columns.rows(blocks::Level::Groups, &[1]), ndarray::array![[-2.5, 3.0]]);
        part.info.dtype = Dtype::I32;
        let error =
            BlockVectors::new(Symmetry { groups: 2, members: 1 }, [(&part.info, ROWS, bytes.as_slice())]).unwrap_err();
        assert_eq!(error.to_string(), "tensor `w`: dtype I32: expected F32, F16, BF16 or F64");
    }
    BlockVectors::new(Symmetry { groups: 2, members: 1 }, []).unwrap_err();
}
