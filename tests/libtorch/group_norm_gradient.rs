use ddil_libtorch::{
    GroupNorm, channels_last, group_norm, is_channels_last, num_threads, set_num_threads,
};
use proptest::prelude::*;
use tch::{Kind, Tensor, kind};

use crate::TestResult;
use crate::group_norm::{
    KINDS, LAYOUTS, Learned, PLAIN, SHAPES, any_case, is_ours, laid_out, plainly, rounding,
};

/// `x`, weight, bias and offset.
type Leaves = [Tensor; 4];

fn leaves(x: &Tensor, learned: &Learned, requires: [bool; 4]) -> Leaves {
    let given = [x, &learned.weight, &learned.bias, &learned.offset];
    // A view has the memory layout of its base, which a copy may lack.
    std::array::from_fn(|i| given[i].detach().set_requires_grad(requires[i]))
}

fn with_leaves(of: &Leaves, settings: GroupNorm<'_>) -> ddil_libtorch::Result<Tensor> {
    let part = |i: usize, there: Option<&Tensor>| there.map(|_| &of[i]);
    let (weight, bias) = (part(1, settings.weight), part(2, settings.bias));
    group_norm(&of[0], &GroupNorm { weight, bias, offset: part(3, settings.offset), ..settings })
}

/// Of those that require a gradient.
fn gradients_of(y: &Tensor, leaves: &Leaves, upstream: &Tensor) -> Vec<Tensor> {
    let with_gradient: Vec<&Tensor> = leaves.iter().filter(|t| t.requires_grad()).collect();
    let product = y.to_kind(Kind::Double) * upstream;
    Tensor::run_backward(&[product.sum(Kind::Double)], &with_gradient, false, false)
}

/// The formula's own, in doubles, by libtorch.
fn expected_gradients(of: &Leaves, settings: &GroupNorm<'_>, upstream: &Tensor) -> Vec<Tensor> {
    let doubles: Leaves = std::array::from_fn(|i| {
        of[i].detach().to_kind(Kind::Double).set_requires_grad(of[i].requires_grad())
    });
    let part = |i: usize, there: Option<&Tensor>| there.map(|_| &doubles[i]);
    let (weight, bias) = (part(1, settings.weight), part(2, settings.bias));
    let offset = part(3, settings.offset);
    let y = plainly(&doubles[0], &GroupNorm { weight, bias, offset, ..*settings });
    gradients_of(&y, &doubles, upstream)
}

/// Values that every kind can represent.
fn upstream_of(x: &Tensor) -> Tensor {
    Tensor::randn(x.size(), kind::FLOAT_CPU)
        .to_kind(Kind::BFloat16)
        .to_kind(Kind::Half)
        .to_kind(Kind::Double)
}

/// Everywhere within one rounding, except for `share` of the largest, or of `least`: adding a constant to a whole group
/// does not change its output, so gradients of offsets may consist of rounding errors.
fn assert_gradients_near([found, expected]: [&[Tensor]; 2], share: f64, least: f64, what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let largest = expected.abs().max().clamp_min(least);
        let allowed = expected.abs() * rounding(found.kind()) + largest * share;
        let excess = ((found.to_kind(Kind::Double) - expected).abs() - allowed).max();
        assert!(excess.double_value(&[]) <= 0.0, "{what}, {i}: {excess} more than allowed");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// For any rank, memory layout, kinds, present parts and parts that require a gradient.
    #[test]
    fn gradients_are_the_formulas(case in any_case(2..4, 2..10), requires in any::<[bool; 4]>()) {
        let (x, settings, parts) = (&case.x, case.settings(), case.parts);
        let there = [true, parts[0], parts[1], parts[2]];
        let leaves = leaves(x, &case.learned, std::array::from_fn(|i| requires[i] && there[i]));
        let y = with_leaves(&leaves, settings)?;
        let recorded = leaves.iter().any(Tensor::requires_grad);
        prop_assert_eq!(y.requires_grad(), recorded);
        if recorded && is_ours(x) {
            let upstream = upstream_of(x);
            let found = gradients_of(&y, &leaves, &upstream);
            for (leaf, gradient) in leaves.iter().filter(|t| t.requires_grad()).zip(&found) {
                prop_assert_eq!((gradient.kind(), gradient.size()), (leaf.kind(), leaf.size()));
            }
            let expected = expected_gradients(&leaves, &settings, &upstream);
            assert_gradients_near([&found, &expected], 5e-5, 1.0, &format!("{:?} {settings:?}", x.size()));
        }
    }
}

#[test]
fn gradients_are_the_formulas_at_many_sizes() -> TestResult {
    for (shape, groups) in SHAPES {
        // Each group is a single value, whose gradient is only rounding error.
        if shape == [3, 6, 1, 1] {
            continue;
        }
        for kind in KINDS {
            let x = (Tensor::randn(shape, kind::FLOAT_CPU) * 3.0 - 1.0).to_kind(kind);
            let learned = Learned::new(shape[0], shape[1], [kind, Kind::Float]);
            for layout in LAYOUTS {
                let (settings, x) = (learned.settings(groups), laid_out(&x, layout));
                let (leaves, upstream) = (leaves(&x, &learned, [true; 4]), upstream_of(&x));
                let found = gradients_of(&with_leaves(&leaves, settings)?, &leaves, &upstream);
                let expected = expected_gradients(&leaves, &settings, &upstream);
                let what = format!("{shape:?} {kind:?} {layout:?}");
                assert_gradients_near([&found, &expected], 2e-5, 1.0, &what);
                assert_eq!(is_channels_last(&found[0]), is_channels_last(&channels_last(&x)?));
            }
        }
    }
    Ok(())
}

/// What training computes is what sampling computes.
#[test]
fn recording_changes_no_bit() -> TestResult {
    for (shape, groups) in SHAPES {
        for kind in KINDS {
            let x = Tensor::randn(shape, kind::FLOAT_CPU).to_kind(kind);
            let learned = Learned::new(shape[0], shape[1], [kind, Kind::Float]);
            for layout in LAYOUTS {
                let (settings, x) = (learned.settings(groups), laid_out(&x, layout));
                let recorded = with_leaves(&leaves(&x, &learned, [true; 4]), settings)?;
                assert!(recorded.requires_grad());
                let y = group_norm(&x, &settings)?;
                assert_eq!((&recorded, recorded.stride()), (&y, y.stride()), "{shape:?} {kind:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_number_of_threads_changes_no_bit_of_gradients() -> TestResult {
    let before = num_threads()?;
    for (shape, groups) in SHAPES {
        let x = channels_last(&Tensor::randn(shape, kind::FLOAT_CPU))?;
        let learned = Learned::new(shape[0], shape[1], [Kind::Float; 2]);
        let upstream = upstream_of(&x);
        let mut answers = Vec::new();
        for threads in [1, 2, 3] {
            set_num_threads(threads)?;
            let leaves = leaves(&x, &learned, [true; 4]);
            let y = with_leaves(&leaves, learned.settings(groups))?;
            answers.push(gradients_of(&y, &leaves, &upstream));
        }
        set_num_threads(before)?;
        assert_eq!(answers[0], answers[1], "{shape:?}");
        assert_eq!(answers[0], answers[2], "{shape:?}");
    }
    Ok(())
}

/// 1000 +- 0.01, and numbers whose squares are beyond the range of floats.
#[test]
fn gradients_survive_large_means_and_huge_numbers() -> TestResult {
    for (mean, deviation) in [(1000.0, 0.01), (0.0, 1e30), (0.0, 1e-12)] {
        let x = Tensor::randn([2, 8, 20, 20], kind::FLOAT_CPU) * deviation + mean;
        let x = channels_last(&x)?;
        let mut learned = Learned::new(2, 8, [Kind::Float; 2]);
        learned.offset = learned.offset.zeros_like();
        let settings = GroupNorm { eps: 0.0, ..learned.settings(4) };
        let (leaves, upstream) = (leaves(&x, &learned, [true; 4]), upstream_of(&x));
        let found = gradients_of(&with_leaves(&leaves, settings)?, &leaves, &upstream);
        let expected = expected_gradients(&leaves, &settings, &upstream);
        assert_gradients_near([&found, &expected], 1e-5, 0.0, &format!("{mean} +- {deviation:e}"));
    }
    Ok(())
}

/// Each number its own group, so that the gradient of the bias is the slope of `SiLU` there.
#[test]
fn the_slope_of_silu_is_right_to_a_few_bits_everywhere() -> TestResult {
    let values: Vec<f32> = (-120_000..120_000).map(|i| i as f32 * 1e-3).collect();
    let channels = values.len() as i64;
    let bias = Tensor::from_slice(&values).set_requires_grad(true);
    let x = Tensor::zeros([1, channels], kind::FLOAT_CPU);
    let settings = GroupNorm { num_groups: channels, bias: Some(&bias), silu: true, ..PLAIN };
    let sum = group_norm(&x, &settings)?.sum(Kind::Double);
    let slopes = Tensor::run_backward(&[sum], &[&bias], false, false);
    for (&y, found) in values.iter().zip(Vec::<f32>::try_from(&slopes[0]).expect("floats")) {
        let sigmoid = 1.0 / (1.0 + (-f64::from(y)).exp());
        let expected = sigmoid * (1.0 + f64::from(y) * (1.0 - sigmoid));
        let apart = (f64::from(found) - expected).abs();
        // Where the slope crosses 0, near -1.28, digits cancel.
        assert!(
            apart <= 4e-7 * expected.abs() + 2e-7 * sigmoid + 6e-37,
            "{y}: {found:e}, not {expected:e}"
        );
    }
    Ok(())
}

/// `x` may itself be computed from the norm's other inputs.
#[test]
fn gradients_have_gradients() {
    let x = Tensor::randn([2, 4, 3, 3], kind::FLOAT_CPU);
    let learned = Learned::new(2, 4, [Kind::Float; 2]);
    let penalty = |run: &dyn Fn(&Tensor, &Leaves) -> Tensor, of: &Leaves| {
        let scaled = channels_last(&(&of[0] * of[1].view([1, 4, 1, 1]))).expect("images");
        let sum = run(&scaled, of).square().sum(Kind::Double);
        let first = Tensor::run_backward(&[sum], &[&of[0], &of[1]], true, true);
        let penalty = first[0].square().sum(Kind::Double) + first[1].square().sum(Kind::Double);
        Tensor::run_backward(&[penalty], of, false, false)
    };
    let ours = penalty(
        &|x, of| {
            let (weight, bias, offset) = (Some(&of[1]), Some(&of[2]), Some(&of[3]));
            let settings = GroupNorm { num_groups: 2, weight, bias, offset, silu: true, ..PLAIN };
            group_norm(x, &settings).expect("they fit")
        },
        &leaves(&x, &learned, [true; 4]),
    );
    let doubles = learned.doubles();
    let expected = penalty(
        &|x, of| {
            let (weight, bias, offset) = (Some(&of[1]), Some(&of[2]), Some(&of[3]));
            let settings = GroupNorm { num_groups: 2, weight, bias, offset, silu: true, ..PLAIN };
            plainly(x, &settings)
        },
        &leaves(&x.to_kind(Kind::Double), &doubles, [true; 4]),
    );
    assert_gradients_near([&ours, &expected], 1e-4, 0.0, "second derivatives");
}

#[test]
fn gradients_are_computed_once_and_only_of_unchanged_tensors() -> TestResult {
    let x = channels_last(&Tensor::randn([2, 4, 3, 3], kind::FLOAT_CPU))?;
    let learned = Learned::new(2, 4, [Kind::Float; 2]);
    let of = leaves(&x, &learned, [true; 4]);
    let sum = with_leaves(&of, learned.settings(2))?.sum(Kind::Float);
    let gradients = || Tensor::f_run_backward(&[&sum], &[&of[0]], false, false);
    assert!(gradients().is_ok());
    assert!(gradients().is_err());

    let sum = with_leaves(&of, learned.settings(2))?.sum(Kind::Float);
    let _ = tch::no_grad(|| of[1].shallow_clone().g_add_scalar_(1.0));
    let said = Tensor::f_run_backward(&[&sum], &[&of[0]], false, false);
    let said = said.expect_err("the weight is another").to_string();
    assert!(said.contains("modified by an inplace operation"), "{said}");
    Ok(())
}

/// A sum's gradient is one number for all, an average's needs no order either.
#[test]
fn gradients_come_in_any_order_of_memory() -> TestResult {
    let x = channels_last(&Tensor::randn([2, 4, 3, 5], kind::FLOAT_CPU))?;
    let learned = Learned::new(2, 4, [Kind::Float; 2]);
    let upstreams = [
        Tensor::ones([1], kind::DOUBLE_CPU).expand_as(&x),
        upstream_of(&x),
        upstream_of(&x.transpose(2, 3)).transpose(2, 3),
        channels_last(&upstream_of(&x))?,
    ];
    for upstream in upstreams {
        let of = leaves(&x, &learned, [true; 4]);
        let settings = learned.settings(2);
        let found = gradients_of(&with_leaves(&of, settings)?, &of, &upstream);
        let expected = expected_gradients(&of, &settings, &upstream);
        assert_gradients_near([&found, &expected], 2e-5, 1.0, &format!("{:?}", upstream.stride()));
    }
    Ok(())
}

#[test]
fn nothing_is_recorded_without_gradients() -> TestResult {
    let x = channels_last(&Tensor::randn([2, 4, 3, 3], kind::FLOAT_CPU))?;
    let learned = Tensor::ones([4], kind::FLOAT_CPU).set_requires_grad(true);
    let settings = GroupNorm { num_groups: 2, weight: Some(&learned), ..PLAIN };
    assert!(group_norm(&x, &settings)?.requires_grad());
    let _no_grad = tch::no_grad_guard();
    assert!(!group_norm(&x, &settings)?.requires_grad());
    Ok(())
}
