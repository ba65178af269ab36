use ddil_schedulers::{Bound, DataRange, Thresholding};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, kind};

use crate::support::{assert_close, gap, rows, values};

fn apply(thresholding: &Thresholding, x0: &[f64]) -> Vec<f64> {
    values(&thresholding.apply(&rows(1, x0)).expect("valid settings"))
}

fn dynamic(ratio: f64, max_value: f64) -> Thresholding {
    Thresholding::Dynamic { ratio, max_value }
}

#[test]
fn dynamic_thresholds_are_the_golden_ones() {
    let x0 = [0.0, 1.0, -2.0, 3.0, -4.0, 0.5, 0.25, 0.1, -0.2];
    // The 0.9 quantile of the absolute values is 3.2.
    let divided = [0.0, 0.3125, -0.625, 0.9375, -1.0, 0.15625, 0.078_125, 0.031_25, -0.0625];
    assert_close(&apply(&dynamic(0.9, 10.0), &x0), &divided, 1e-15);
    let clipped = [0.0, 1.0, -1.0, 1.0, -1.0, 0.5, 0.25, 0.1, -0.2];
    assert_eq!(apply(&dynamic(0.9, 1.0), &x0), clipped);
    assert_eq!(apply(&Thresholding::clamp_pixels(), &x0), clipped);
}

#[test]
fn each_sample_has_its_own_dynamic_threshold() {
    let x0 = Tensor::from_slice(&[0.5, -0.5, 4.0, -2.0]).view([2, 2]);
    let found = dynamic(1.0, 100.0).apply(&x0).expect("valid settings");
    assert_eq!(values(&found), [0.5, -0.5, 1.0, -0.5]);
}

#[test]
fn reflections_are_the_golden_ones() {
    let reflect = Thresholding::Reflect(DataRange::default());
    let found = apply(&reflect, &[1.3, 2.9, 3.0, 5.25, -3.2, 0.4, -1.0, 1.0]);
    assert_close(&found, &[0.7, -0.9, -1.0, 0.75, 0.8, 0.4, -1.0, 1.0], 1e-14);
}

#[test]
fn channels_may_have_bounds_of_their_own() {
    let range = DataRange::per_channel(vec![-1.0, -2.0], vec![1.0, 3.0]);
    let x0 = Tensor::from_slice(&[-5.0, 5.0, -5.0, 5.0]).view([1, 2, 2]);
    let clamped = Thresholding::Clamp(range.clone()).apply(&x0).expect("two channels");
    assert_eq!(values(&clamped), [-1.0, 1.0, -2.0, 3.0]);
    let folded = Thresholding::Reflect(range.clone()).apply(&x0).expect("two channels");
    assert_close(&values(&folded), &[-1.0, 1.0, 1.0, 1.0], 1e-14);
    let three = Tensor::zeros([1, 3, 2], kind::DOUBLE_CPU);
    let message = Thresholding::Clamp(range).apply(&three).expect_err("three channels").to_string();
    assert!(message.contains("2 channels in dimension 1"), "{message}");
}

fn any_thresholding() -> impl Strategy<Value = Thresholding> {
    let range = (-3.0..0.0, 0.1..3.0).prop_map(|(low, high)| DataRange::scalar(low, high));
    prop_oneof![
        Just(Thresholding::None),
        range.clone().prop_map(Thresholding::Clamp),
        range.prop_map(Thresholding::Reflect),
        (0.5..1.0, 1.0..5.0).prop_map(|(ratio, max)| dynamic(ratio, max)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Idempotent, in range, and values inside are unchanged.
    #[test]
    fn values_in_range_are_unchanged(
        thresholding in any_thresholding(),
        x0 in prop::collection::vec(-20.0..20.0, 1..12),
    ) {
        let once = apply(&thresholding, &x0);
        let (low, high) = match &thresholding {
            Thresholding::Clamp(range) | Thresholding::Reflect(range) => {
                let value = |bound: &ddil_schedulers::Bound| match bound {
                    ddil_schedulers::Bound::Scalar(value) => *value,
                    ddil_schedulers::Bound::PerChannel(_) => unreachable!("scalar bounds alone are drawn"),
                };
                (value(&range.low), value(&range.high))
            }
            Thresholding::Dynamic { max_value, .. } => {
                let largest = x0.iter().fold(0.0_f64, |a, b| a.max(b.abs()));
                prop_assert!(once.iter().all(|x| x.abs() <= 1.0 + 1e-15 || largest > *max_value));
                (-1.0, 1.0)
            }
            Thresholding::None => (f64::MIN, f64::MAX),
        };
        prop_assert!(once.iter().all(|x| (low..=high).contains(x)));
        prop_assert_eq!(apply(&thresholding, &once), once.clone());
        if x0.iter().all(|x| (low..=high).contains(x)) {
            prop_assert_eq!(once, x0);
        }
    }
}

#[test]
fn kind_and_any_rank_are_kept() {
    for thresholding in [
        Thresholding::clamp_pixels(),
        dynamic(0.99, 2.0),
        Thresholding::Reflect(DataRange::default()),
    ] {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            for shape in [vec![2], vec![2, 3], vec![2, 3, 4], vec![2, 1, 2, 2, 2], vec![0, 3]] {
                let x0 = Tensor::full(shape.as_slice(), 1.5, (kind, Device::Cpu));
                let found = thresholding.apply(&x0).expect("any shape with a batch");
                assert_eq!((found.size(), found.kind()), (shape, kind));
            }
        }
        let message = thresholding.apply(&Tensor::from(1.0)).expect_err("no batch").to_string();
        assert!(message.contains("[batch, ..]"), "{message}");
    }
}

#[test]
fn the_changed_share_is_counted_by_sample() {
    let x0 = Tensor::from_slice(&[0.0, 2.0, -3.0, 4.0]).view([2, 2]);
    let share = Thresholding::clamp_pixels().changed_fraction(&x0).expect("valid settings");
    assert_eq!(values(&share), [0.5, 1.0]);
    assert_eq!(
        values(&Thresholding::None.changed_fraction(&x0).expect("nothing to do")),
        [0.0, 0.0]
    );
    let flat = Tensor::from_slice(&[0.0, 2.0]);
    let share = Thresholding::clamp_pixels().changed_fraction(&flat).expect("valid settings");
    assert_eq!(values(&share), [0.0, 1.0]);
}

/// Where libtorch's own quantile gives up, rows are sorted one by one.
#[test]
fn large_samples_have_the_same_dynamic_threshold() {
    let row = Tensor::linspace(-3.0, 3.0, 1 << 20, (Kind::Float, Device::Cpu)).view([1, -1]);
    let alone = dynamic(0.9, 10.0).apply(&row).expect("valid settings");
    let many = dynamic(0.9, 10.0).apply(&row.repeat([16, 1])).expect("valid settings");
    assert_eq!(many.numel(), 1 << 24);
    assert!(gap(&many.narrow(0, 15, 1), &alone) < 1e-6);
}

#[test]
fn invalid_settings_are_refused_by_name() {
    let x0 = rows(1, &[0.0]);
    let empty = DataRange::per_channel(vec![], vec![]);
    let uneven = DataRange::per_channel(vec![0.0, 0.0], vec![1.0, 1.0, 1.0]);
    for (thresholding, named) in [
        (Thresholding::Clamp(DataRange::scalar(1.0, 1.0)), "thresholding.low"),
        (Thresholding::Clamp(DataRange::scalar(0.0, f64::NAN)), "thresholding.low"),
        (Thresholding::Reflect(DataRange::scalar(0.0, f64::INFINITY)), "thresholding.low"),
        (Thresholding::Clamp(empty), "thresholding.low"),
        (Thresholding::Clamp(uneven), "thresholding.low"),
        (dynamic(0.0, 1.0), "thresholding.ratio"),
        (dynamic(1.1, 1.0), "thresholding.ratio"),
        (dynamic(0.9, 0.5), "thresholding.max_value"),
    ] {
        let message = thresholding.apply(&x0).expect_err("it cannot be").to_string();
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn kinds_are_spelt_in_settings() {
    let read = |text| serde_json::from_str::<Thresholding>(text);
    assert_eq!(read(r#"{"kind": "none"}"#).expect("valid"), Thresholding::None);
    let clamp = read(r#"{"kind": "clamp", "low": -1, "high": [1.0, 2.0]}"#).expect("valid");
    assert!(matches!(clamp, Thresholding::Clamp(_)));
    let written = serde_json::to_string(&clamp).expect("it can be written");
    assert_eq!(read(&written).expect("as written"), clamp);
    assert!(read(r#"{"kind": "clamp", "low": -1, "hihg": 1}"#).is_err());
}

#[test]
fn the_range_of_samples_is_that_of_each_channel() {
    // 1001 values a channel: -1 .. 1 and 10 .. 20, spread over samples and pixels.
    let line = Tensor::linspace(0.0, 1.0, 1001, kind::DOUBLE_CPU);
    let shuffled = line.index_select(0, &Tensor::randperm(1001, kind::INT64_CPU));
    let channels = Tensor::stack(&[&shuffled * 2.0 - 1.0, &shuffled * 10.0 + 10.0], 0);
    let x0 = channels.view([2, 91, 11]).transpose(0, 1).contiguous();
    let range = DataRange::of_samples(&x0, 0.1, 0.25).expect("valid samples");
    // Quantiles at -0.8, 0.8 and 11, 19, widened by a quarter of 1.6 and of 8.
    let Thresholding::Clamp(DataRange {
        low: Bound::PerChannel(low),
        high: Bound::PerChannel(high),
    }) = Thresholding::Clamp(range)
    else {
        panic!("one bound a channel");
    };
    assert_close(&low, &[-1.2, 9.0], 1e-12);
    assert_close(&high, &[1.2, 21.0], 1e-12);
}

#[test]
fn samples_without_a_range_are_refused() {
    let say = |x0: &Tensor, quantile, margin| {
        DataRange::of_samples(x0, quantile, margin).expect_err("there is none").to_string()
    };
    let x0 = Tensor::from_slice(&[0.0, 1.0]).view([2, 1]);
    assert!(say(&x0.view([2]), 0.0, 0.0).contains("[samples, channels, ..]"));
    assert!(say(&x0, 0.5, 0.0).contains("below 0.5"));
    assert!(say(&x0, 0.0, -1.0).contains("at least 0"));
    assert!(say(&x0.ones_like(), 0.0, 0.1).contains("in order"));
    assert!(say(&(&x0 / 0.0), 0.0, 0.1).contains("finite"));
}
