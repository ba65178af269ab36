use ddil_libtorch::{
    Error, TensorList, clip_grad_norm_, drop_grads, foreach_lerp_, foreach_zero_, grad_norm, grads,
};
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, max_difference, refusal};

fn random(shapes: &[&[i64]]) -> Vec<Tensor> {
    shapes.iter().map(|shape| Tensor::randn(*shape, kind::FLOAT_CPU)).collect()
}

fn copies(tensors: &[Tensor]) -> Vec<Tensor> {
    tensors.iter().map(Tensor::copy).collect()
}

const SHAPES: [&[i64]; 4] = [&[3], &[2, 5], &[], &[4, 3, 3, 3]];

#[test]
fn lerp_moves_a_part_of_the_way() -> TestResult {
    let (from, to) = (random(&SHAPES), random(&SHAPES));
    let moved = copies(&from);
    foreach_lerp_(&TensorList::new(&moved)?, &TensorList::new(&to)?, 0.25)?;
    for ((from, to), moved) in from.iter().zip(&to).zip(&moved) {
        assert!(max_difference(moved, &(from + 0.25 * (to - from))) < 1e-6);
    }
    Ok(())
}

#[test]
fn lerp_reaches_leaves_that_require_a_gradient() -> TestResult {
    let leaf = Tensor::zeros([2], kind::FLOAT_CPU).set_requires_grad(true);
    let target = Tensor::ones([2], kind::FLOAT_CPU);
    foreach_lerp_(&TensorList::new([&leaf])?, &TensorList::new([&target])?, 1.0)?;
    assert_eq!(leaf.double_value(&[1]), 1.0);
    assert!(leaf.requires_grad() && leaf.is_leaf());
    Ok(())
}

#[test]
fn lerp_refuses_lists_that_do_not_fit_and_changes_nothing() -> TestResult {
    let tensors = [Tensor::zeros([2], kind::FLOAT_CPU), Tensor::zeros([2], kind::FLOAT_CPU)];
    let list = TensorList::new(&tensors)?;
    let one = || Tensor::ones([2], kind::FLOAT_CPU);
    for (second, reason) in [
        (None, "has 1 tensors; expected 2"),
        (Some(Tensor::ones([1], kind::FLOAT_CPU)), "`targets` [1] has shape [1]; expected [2]"),
        (Some(Tensor::ones([2], kind::DOUBLE_CPU)), "`targets` [1] is Double; expected Float"),
    ] {
        let targets = TensorList::new(std::iter::once(one()).chain(second))?;
        let said = refusal(foreach_lerp_(&list, &targets, 0.5));
        assert!(said.starts_with("foreach_lerp_: ") && said.contains(reason), "{said}");
        assert_eq!(tensors[0].abs().sum(Kind::Float).double_value(&[]), 0.0);
    }
    Ok(())
}

#[test]
fn zero_fills_everything() -> TestResult {
    let tensors = random(&SHAPES);
    foreach_zero_(&TensorList::new(&tensors)?)?;
    assert!(tensors.iter().all(|t| t.abs().sum(Kind::Float).double_value(&[]) == 0.0));
    foreach_zero_(&TensorList::new::<Tensor>([])?)?;
    Ok(())
}

#[test]
fn grads_come_in_order_and_the_missing_one_is_named() -> TestResult {
    let [a, b] = [2.0, 5.0].map(|v| Tensor::full([2], v, kind::FLOAT_CPU).set_requires_grad(true));
    a.square().sum(Kind::Float).backward();
    let params = TensorList::new([&a, &b])?;
    assert!(matches!(grads(&params), Err(Error::MissingGradient { index: 1 })));

    b.sum(Kind::Float).backward();
    let list = grads(&params)?;
    assert_eq!(list.get(0)?.double_value(&[0]), 4.0);
    assert_eq!(list.get(1)?.double_value(&[0]), 1.0);
    Ok(())
}

#[test]
fn dropped_gradients_are_undefined_until_the_next_backward_pass() -> TestResult {
    let leaf = Tensor::ones([3], kind::FLOAT_CPU).set_requires_grad(true);
    let list = TensorList::new([&leaf])?;
    drop_grads(&list)?;
    for _ in 0..2 {
        leaf.square().sum(Kind::Float).backward();
        assert_eq!(leaf.grad(), Tensor::full([3], 2.0, kind::FLOAT_CPU));
        drop_grads(&list)?;
        assert!(!leaf.grad().defined());
        assert!(matches!(grads(&list), Err(Error::MissingGradient { index: 0 })));
    }
    Ok(())
}

fn norm_by_hand(tensors: &[Tensor]) -> f64 {
    let squares = tensors.iter().map(|t| t.square().sum(Kind::Double).double_value(&[]));
    squares.sum::<f64>().sqrt()
}

#[test]
fn clipping_scales_to_the_requested_norm() -> TestResult {
    for max_norm in [0.0, 0.5, 3.0, 1e3] {
        let (before, after) = {
            let tensors = random(&SHAPES);
            (copies(&tensors), tensors)
        };
        let norm = norm_by_hand(&before);
        let list = TensorList::new(&after)?;
        assert!((grad_norm(&list)?.double_value(&[]) - norm).abs() < 1e-4);
        assert!((clip_grad_norm_(&list, max_norm)?.double_value(&[]) - norm).abs() < 1e-4);

        let scale = (max_norm / (norm + 1e-6)).min(1.0);
        for (before, after) in before.iter().zip(&after) {
            assert!(max_difference(after, &(before * scale)) < 1e-6, "max_norm {max_norm}");
        }
    }
    Ok(())
}

#[test]
fn clipping_leaves_small_gradients_unchanged_to_the_bit() -> TestResult {
    let tensors = random(&SHAPES);
    let before = copies(&tensors);
    drop(clip_grad_norm_(&TensorList::new(&tensors)?, 1e9)?);
    assert_eq!(tensors, before);
    Ok(())
}

#[test]
fn a_nan_gradient_is_not_hidden() -> TestResult {
    let tensors = [Tensor::from_slice(&[1.0_f32, f32::NAN]), Tensor::from_slice(&[1.0_f32])];
    let norm = clip_grad_norm_(&TensorList::new(&tensors)?, 1.0)?;
    assert!(norm.double_value(&[]).is_nan());
    assert!(tensors[1].double_value(&[0]).is_nan());
    Ok(())
}

#[test]
fn invalid_norms_are_refused() -> TestResult {
    let list = TensorList::new::<Tensor>([])?;
    assert_eq!(grad_norm(&list)?.double_value(&[]), 0.0);
    assert_eq!(clip_grad_norm_(&list, 1.0)?.double_value(&[]), 0.0);
    for max_norm in [-1.0, f64::NAN] {
        assert!(refusal(clip_grad_norm_(&list, max_norm)).contains("`max_norm` is"));
    }
    let whole = TensorList::new([Tensor::ones([2], (Kind::Int64, Device::Cpu))])?;
    assert!(!refusal(grad_norm(&whole)).contains("frame #"));
    Ok(())
}

/// Lists on a device: moved, clipped and zeroed as those on the CPU.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_matches_the_cpu_on_lists() -> TestResult {
    let on = |tensors: &[Tensor], device| -> Vec<Tensor> {
        tensors.iter().map(|tensor| tensor.copy().to_device(device)).collect()
    };
    let (from, to) = (random(&SHAPES), random(&SHAPES));
    let outcome = |device| -> Result<_, Box<dyn std::error::Error>> {
        let (from, to) = (on(&from, device), on(&to, device));
        let (list, targets) = (TensorList::new(&from)?, TensorList::new(&to)?);
        foreach_lerp_(&list, &targets, 0.25)?;
        let norm = clip_grad_norm_(&list, 0.5)?;
        assert_eq!(norm.device(), device);
        let values = on(&from, Device::Cpu);
        foreach_zero_(&list)?;
        assert_eq!(norm_by_hand(&from), 0.0);
        Ok((norm.double_value(&[]), values))
    };
    let (expected, found) = (outcome(Device::Cpu)?, outcome(Device::Cuda(0))?);
    assert!((expected.0 - found.0).abs() < 1e-5, "{} {}", expected.0, found.0);
    for (expected, found) in expected.1.iter().zip(&found.1) {
        assert!(max_difference(found, expected) < 1e-6);
    }
    Ok(())
}
