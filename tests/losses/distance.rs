use ddil_losses::{pseudo_huber, squared_error};
use tch::{Kind, Tensor, kind};

use crate::toy::values;

#[test]
fn squared_error_is_the_mean_over_each_sample_at_any_rank() {
    for shape in [vec![2, 6], vec![2, 3, 2], vec![2, 1, 3, 2], vec![2, 1, 1, 3, 2]] {
        let x = Tensor::arange(12, kind::DOUBLE_CPU).reshape(shape.as_slice());
        let error = squared_error(&x, &x.zeros_like()).expect("the shapes agree");
        // Means of 0, 1, 4, .., 25 and of 36, 49, .., 121.
        assert_eq!(values(&error), [55.0 / 6.0, 451.0 / 6.0]);
    }
}

#[test]
fn pseudo_huber_keeps_small_differences_in_float() {
    // The form with a subtraction gives 0 here: 1e-14 is lost next to 1e-6 in Float.
    let small = Tensor::full([1, 1], 1e-7, kind::FLOAT_CPU);
    let distance = pseudo_huber(&small, &small.zeros_like(), 1e-3).expect("the shapes agree");
    let exact = 1e-14 / 2e-3;
    assert!((values(&distance)[0] / exact - 1.0).abs() < 1e-5);
}

#[test]
fn pseudo_huber_is_the_textbook_form_in_double() {
    let (x, y) = (Tensor::randn([4, 5], kind::DOUBLE_CPU), Tensor::randn([4, 5], kind::DOUBLE_CPU));
    let c = 0.3;
    let textbook = ((&x - &y).square() + c * c).sqrt() - c;
    let distance = pseudo_huber(&x, &y, c).expect("the shapes agree");
    let expected = textbook.mean_dim(1, false, Kind::Double);
    assert!((distance - expected).abs().max().double_value(&[]) < 1e-14);
}

#[test]
fn half_kinds_are_compared_in_float() {
    let x = Tensor::full([1, 4], 300.0, (Kind::Half, tch::Device::Cpu));
    let error = squared_error(&x, &x.zeros_like()).expect("the shapes agree");
    assert_eq!(error.kind(), Kind::Float);
    // 90 000 is infinite in Half.
    assert_eq!(values(&error), [90_000.0]);
}

#[test]
fn a_gradient_flows_to_the_prediction() {
    let x = Tensor::from_slice2(&[[1.0, -2.0]]).set_requires_grad(true);
    squared_error(&x, &x.zeros_like()).expect("the shapes agree").sum(Kind::Double).backward();
    assert_eq!(values(&x.grad()), [1.0, -2.0]);
}

#[test]
fn mismatches_are_refused_by_name() {
    let (x, y) = (Tensor::zeros([2, 3], kind::FLOAT_CPU), Tensor::zeros([3, 2], kind::FLOAT_CPU));
    let message = squared_error(&x, &y).expect_err("the shapes differ").to_string();
    assert!(message.contains("[2, 3]") && message.contains("[3, 2]"), "{message}");
    let flat = Tensor::zeros([3], kind::FLOAT_CPU);
    let message = squared_error(&flat, &flat).expect_err("no sample dimension").to_string();
    assert!(message.contains("`prediction` has shape [3]"), "{message}");
    for c in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let message = pseudo_huber(&x, &x, c).expect_err("c must be positive").to_string();
        assert!(message.contains("huber_c"), "{message}");
    }
}
