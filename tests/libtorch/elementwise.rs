use ddil_libtorch::ArgumentError;
use ddil_libtorch::{
    Clamped, Error, affine, affine_, affine_clamped, affine_clamped_, affine_four, affine_four_,
    affine_noise, affine_noise_, channels_last, is_channels_last,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, max_difference, refusal};

/// The memory layout of a tensor.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Contiguous,
    ChannelsLast,
    Transposed,
    EverySecond,
    Expanded,
}

/// Random numbers of a given shape, laid out in a given way.
fn tensor(shape: [i64; 4], kind: Kind, layout: Layout) -> Tensor {
    let randn = |shape: [i64; 4]| Tensor::randn(shape, kind::FLOAT_CPU).to_kind(kind);
    let [n, c, h, w] = shape;
    match layout {
        Layout::Contiguous => randn(shape),
        Layout::ChannelsLast => channels_last(&randn(shape)).expect("four dimensions"),
        Layout::Transposed => randn([n, c, w, h]).transpose(2, 3),
        Layout::EverySecond => randn([n, c, h, 2 * w]).slice(3, None, None, 2),
        Layout::Expanded => randn([1, c, 1, w]).expand(shape, false),
    }
}

fn any_layout() -> impl Strategy<Value = Layout> {
    use Layout::{ChannelsLast, Contiguous, EverySecond, Expanded, Transposed};
    prop::sample::select(vec![Contiguous, ChannelsLast, Transposed, EverySecond, Expanded])
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16])
}

/// How far two roundings may be apart, for values of size 10 or so.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-13,
        Kind::Float => 1e-5,
        Kind::Half => 5e-2,
        _ => 4e-1,
    }
}

fn doubles(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double)
}

const NUMBERS: Clamped = Clamped { a: 1.25, b: -0.75, lo: -0.5, hi: 0.625, c: 0.375, d: -1.5 };

/// The four results in doubles, by plain operations; the fourth tensor of the last is `y`.
fn plainly(x: &Tensor, y: &Tensor, noise: &Tensor) -> [Tensor; 4] {
    let [x, y, noise] = [x, y, noise].map(doubles);
    let Clamped { a, b, lo, hi, c, d } = NUMBERS;
    let sum = a * &x + b * &y;
    let clamped = c * &x + d * sum.clamp(lo, hi);
    let noised = &sum + c * noise;
    let four = &noised + d * y;
    [sum, clamped, noised, four]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// For any shapes, strides and kinds, in place or not: the same as plain operations.
    #[test]
    fn sums_are_those_of_plain_operations(
        shape in [1_i64..4, 1_i64..5, 0_i64..6, 1_i64..9],
        kinds in [any_kind(), any_kind()],
        layouts in [any_layout(), any_layout(), any_layout()],
    ) {
        let [x, y, noise] = [(0, kinds[0]), (1, kinds[1]), (2, kinds[0])]
            .map(|(i, kind)| tensor(shape, kind, layouts[i]));
        let Clamped { a, b, c, d, .. } = NUMBERS;
        let expected = plainly(&x, &y, &noise);
        let near = kinds.map(tolerance).into_iter().fold(0.0, f64::max);

        let fresh = [
            affine(&x, &y, a, b)?,
            affine_clamped(&x, &y, &NUMBERS)?,
            affine_noise(&x, &y, &noise, a, b, c)?,
            affine_four([&x, &y, &noise, &y], [a, b, c, d])?,
        ];
        for (result, expected) in fresh.iter().zip(&expected) {
            prop_assert!(max_difference(result, expected) < near);
            if kinds[0] == kinds[1] {
                prop_assert_eq!(result.kind(), kinds[0]);
            }
        }

        if matches!(layouts[0], Layout::Expanded) {
            return Ok(());
        }
        // A copy with the memory layout of `x`.
        let mut changed = [(); 4].map(|()| x.empty_like());
        for changed in &mut changed {
            changed.copy_(&x);
        }
        let [sum, clamped, noised, four] = &mut changed;
        affine_(sum, &y, a, b)?;
        affine_clamped_(clamped, &y, &NUMBERS)?;
        affine_noise_(noised, &y, &noise, a, b, c)?;
        affine_four_(four, [&y, &noise, &y], [a, b, c, d])?;
        for (result, expected) in changed.iter().zip(&expected) {
            prop_assert!(max_difference(result, expected) < near);
            prop_assert_eq!(result.kind(), kinds[0]);
        }
    }
}

/// Long enough for several threads, with a remainder for every width of vector.
#[test]
fn many_elements_on_many_threads() -> TestResult {
    let [x, y, noise] = [0; 3].map(|_| Tensor::randn([3, 100_003], kind::FLOAT_CPU));
    let Clamped { a, b, c, d, .. } = NUMBERS;
    let [sum, clamped, noised, four] = plainly(&x, &y, &noise);
    assert!(max_difference(&affine_four([&x, &y, &noise, &y], [a, b, c, d])?, &four) < 1e-5);
    assert!(max_difference(&affine(&x, &y, a, b)?, &sum) < 1e-5);
    assert!(max_difference(&affine_clamped(&x, &y, &NUMBERS)?, &clamped) < 1e-5);
    assert!(max_difference(&affine_noise(&x, &y, &noise, a, b, c)?, &noised) < 1e-5);
    Ok(())
}

/// libtorch's own operations do it there.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_adds_as_the_cpu_does() -> TestResult {
    let Clamped { a, b, c, d, .. } = NUMBERS;
    for kind in [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16] {
        for layout in [Layout::Contiguous, Layout::ChannelsLast, Layout::Transposed] {
            let [x, y, noise] = [0; 3].map(|_| tensor([3, 4, 8, 8], kind, layout));
            let [sum, clamped, noised, four] = plainly(&x, &y, &noise);
            let [x, y, noise] = [x, y, noise].map(|tensor| tensor.to_device(Device::Cuda(0)));
            let near = |found: &Tensor, expected: &Tensor| {
                assert_eq!((found.device(), found.kind()), (Device::Cuda(0), kind));
                let apart = max_difference(&found.to_device(Device::Cpu), expected);
                assert!(apart < tolerance(kind), "{kind:?} {layout:?}: {apart}");
            };
            near(&affine(&x, &y, a, b)?, &sum);
            near(&affine_clamped(&x, &y, &NUMBERS)?, &clamped);
            near(&affine_noise(&x, &y, &noise, a, b, c)?, &noised);
            near(&affine_four([&x, &y, &noise, &y], [a, b, c, d])?, &four);
            let mut changed = x.copy();
            affine_noise_(&mut changed, &y, &noise, a, b, c)?;
            near(&changed, &noised);
        }
    }
    Ok(())
}

#[test]
fn strided_views_are_changed_where_they_are() -> TestResult {
    let whole = Tensor::zeros([2, 6], kind::FLOAT_CPU);
    let mut columns = whole.slice(1, 1, None, 3);
    affine_(&mut columns, &Tensor::ones([2, 2], kind::FLOAT_CPU), 1.0, 2.0)?;
    let row = Vec::<f32>::try_from(whole.get(1))?;
    assert_eq!(row, [0.0, 2.0, 0.0, 0.0, 2.0, 0.0]);
    Ok(())
}

#[test]
fn channels_last_stays_so() -> TestResult {
    let [x, y] = [0; 2].map(|_| tensor([2, 3, 4, 5], Kind::Float, Layout::ChannelsLast));
    assert!(is_channels_last(&affine(&x, &y, 1.0, 2.0)?));
    Ok(())
}

#[test]
fn a_tensor_can_be_added_to_itself() -> TestResult {
    for kind in [Kind::Float, Kind::Half] {
        let mut x = Tensor::ones([4], (kind, Device::Cpu));
        let alias = x.shallow_clone();
        affine_(&mut x, &alias, 2.0, 3.0)?;
        assert_eq!(x.double_value(&[3]), 5.0, "{kind:?}");
        affine_noise_(&mut x, &alias, &alias, 1.0, 1.0, 1.0)?;
        assert_eq!(x.double_value(&[3]), 15.0, "{kind:?}");
    }
    Ok(())
}

#[test]
fn nan_stays_nan() -> TestResult {
    // Only the clamped sum depends on `y`.
    let y = Tensor::from_slice(&[f32::NAN, 0.5, f32::INFINITY, f32::NEG_INFINITY]);
    let numbers = Clamped { a: 0.0, b: 1.0, lo: -1.0, hi: 2.0, c: 0.0, d: 1.0 };
    let result = Vec::<f32>::try_from(affine_clamped(&y.zeros_like(), &y, &numbers)?)?;
    assert!(result[0].is_nan());
    assert_eq!(result[1..], [0.5, 2.0, -1.0]);
    Ok(())
}

#[test]
fn fresh_results_can_be_differentiated() -> TestResult {
    let leaf = |v: f64| Tensor::full([3], v, kind::DOUBLE_CPU).set_requires_grad(true);
    let (x, y, noise) = (leaf(0.5), leaf(0.25), leaf(1.0));
    let gradients = |result: Tensor, leaves: &[&Tensor]| -> Vec<f64> {
        let gradients = Tensor::run_backward(&[result.sum(Kind::Double)], leaves, false, false);
        gradients.iter().map(|g| g.double_value(&[0])).collect()
    };
    let Clamped { a, b, c, d, .. } = NUMBERS;
    assert_eq!(gradients(affine(&x, &y, a, b)?, &[&x, &y]), [a, b]);
    assert_eq!(gradients(affine_noise(&x, &y, &noise, a, b, c)?, &[&x, &y, &noise]), [a, b, c]);
    let four = affine_four([&x, &y, &noise, &x], [a, b, c, d])?;
    assert_eq!(gradients(four, &[&x, &y, &noise]), [a + d, b, c]);
    // 1.25 * 0.5 - 0.75 * 0.25 is within the bounds; twice as much is not.
    let inside = gradients(affine_clamped(&x, &y, &NUMBERS)?, &[&x, &y]);
    assert_eq!(inside, [c + d * a, d * b]);
    let outside = gradients(affine_clamped(&(&x * 2.0), &y, &NUMBERS)?, &[&x, &y]);
    assert_eq!(outside, [2.0 * c, 0.0]);
    Ok(())
}

#[test]
fn in_place_gradients_reach_the_other_tensor() -> TestResult {
    let y = Tensor::ones([3], kind::FLOAT_CPU).set_requires_grad(true);
    let Clamped { a, b, c, d, .. } = NUMBERS;
    let start = || Tensor::full([3], 0.5, kind::FLOAT_CPU);
    let gradient = |x: &Tensor| {
        let sum = x.sum(Kind::Float);
        Tensor::run_backward(&[sum], &[&y], false, false)[0].double_value(&[0])
    };
    let mut x = start();
    affine_(&mut x, &y, a, b)?;
    assert_eq!(gradient(&x), b);
    let mut x = start();
    affine_clamped_(&mut x, &y, &NUMBERS)?;
    assert_eq!(gradient(&x), d * b);
    let mut x = start();
    affine_noise_(&mut x, &start(), &y, a, b, c)?;
    assert_eq!(gradient(&x), c);
    let mut x = start();
    affine_four_(&mut x, [&start(), &y, &start()], [a, b, c, d])?;
    assert_eq!(gradient(&x), c);
    Ok(())
}

/// Autograd detects that a tensor it needs has been changed, as after libtorch's own operations.
#[test]
fn a_changed_saved_tensor_is_detected() -> TestResult {
    let weight = Tensor::ones([3], kind::FLOAT_CPU).set_requires_grad(true);
    let mut x = Tensor::ones([3], kind::FLOAT_CPU);
    let loss = (&weight * &x).sum(Kind::Float);
    affine_(&mut x, &Tensor::ones([3], kind::FLOAT_CPU), 2.0, 1.0)?;
    let said = loss.f_backward().expect_err("the saved tensor is gone").to_string();
    assert!(said.contains("modified by an inplace operation"), "{said}");
    Ok(())
}

#[test]
fn tensors_that_cannot_be_changed_in_place_are_refused_and_unchanged() -> TestResult {
    let y = Tensor::ones([2], kind::FLOAT_CPU);
    let mut leaf = Tensor::ones([2], kind::FLOAT_CPU).set_requires_grad(true);
    assert!(refusal(affine_(&mut leaf, &y, 2.0, 1.0)).contains("requires a gradient"));
    {
        let _no_grad = tch::no_grad_guard();
        affine_(&mut leaf, &y, 2.0, 1.0)?;
        assert_eq!(leaf.double_value(&[0]), 3.0);
    }

    let mut whole = Tensor::ones([2], kind::INT64_CPU);
    for result in [
        affine_(&mut whole, &y, 0.5, 1.0),
        affine_clamped_(&mut whole.shallow_clone(), &y, &NUMBERS),
        affine_noise_(&mut whole.shallow_clone(), &y, &y, 0.5, 1.0, 1.0),
        affine_four_(&mut whole.shallow_clone(), [&y; 3], [0.5; 4]),
    ] {
        assert!(refusal(result).contains("cannot store"));
    }
    assert_eq!(whole.int64_value(&[0]), 1);

    let complex = Tensor::ones([2], (Kind::ComplexFloat, Device::Cpu));
    let mut x = Tensor::ones([2], kind::FLOAT_CPU);
    assert!(refusal(affine_(&mut x, &complex, 2.0, 1.0)).contains("cannot store"));
    assert_eq!(x.double_value(&[0]), 1.0);
    Ok(())
}

#[test]
fn tensors_that_overlap_in_part_are_refused_and_unchanged() {
    for kind in [Kind::Float, Kind::Half] {
        let line = Tensor::ones([4], (kind, Device::Cpu));
        let (mut x, y) = (line.slice(0, 0, 3, 1), line.slice(0, 1, 4, 1));
        assert!(refusal(affine_(&mut x, &y, 2.0, 1.0)).contains("single memory location"));
        let mut expanded = line.slice(0, 0, 1, 1).expand([3], false);
        let y = Tensor::ones([3], (kind, Device::Cpu));
        refusal(affine_(&mut expanded, &y, 2.0, 1.0));
        assert_eq!(line.sum(Kind::Float).double_value(&[]), 4.0);
    }
}

#[test]
fn shapes_must_agree_and_bounds_be_in_order() {
    let [two, three] = [2, 3].map(|n| Tensor::ones([n], kind::FLOAT_CPU));
    assert!(
        refusal(affine_noise(&two, &two, &three, 1.0, 1.0, 1.0)).contains("`noise` has shape [3]")
    );
    let four = affine_four([&two, &two, &two, &three], [1.0; 4]);
    assert!(refusal(four).contains("`w` has shape [3]"));
    assert!(refusal(affine_clamped(&two, &three, &NUMBERS)).contains("`y` has shape [3]"));
    assert!(refusal(affine(&two, &Tensor::new(), 1.0, 1.0)).contains("`y` is an undefined tensor"));
    for (lo, hi) in [(1.0, -1.0), (f64::NAN, 1.0)] {
        let numbers = Clamped { lo, hi, ..NUMBERS };
        let result = affine_clamped(&two, &two, &numbers);
        assert!(matches!(
            result,
            Err(Error::Argument(ArgumentError::Value { name: "lo, hi", .. }))
        ));
        let result = affine_clamped_(&mut two.copy(), &two, &numbers);
        assert!(matches!(result, Err(Error::Argument(ArgumentError::Value { .. }))));
    }
}

#[test]
fn whole_numbers_promote_in_a_fresh_result() -> TestResult {
    let (x, y) = (Tensor::from_slice(&[1_i64, 2]), Tensor::from_slice(&[10_i64, 20]));
    let result = affine(&x, &y, 0.5, 0.25)?;
    assert_eq!(Vec::<f32>::try_from(result)?, [3.0, 6.0]);
    Ok(())
}
