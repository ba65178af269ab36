#![expect(clippy::float_cmp, reason = "these numbers are exact in binary")]

use ddil_trainer::{Decay, LrSchedule};
use proptest::prelude::*;

fn near(left: f64, right: f64) -> bool {
    (left - right).abs() < 1e-12
}

#[test]
fn takes_the_values_of_the_formula() {
    let schedule = |decay| {
        LrSchedule::default().with(|config| {
            config.peak = 2.0;
            config.warmup_steps = 4;
            config.decay = decay;
            config.end = 1.0;
        })
    };
    for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
        let warmup: Vec<f64> = (0..5).map(|step| schedule(decay).lr_at(step, 12)).collect();
        assert_eq!(warmup, [0.5, 1.0, 1.5, 2.0, 2.0]);
    }
    assert_eq!(schedule(Decay::Constant).lr_at(11, 12), 2.0);
    assert_eq!(schedule(Decay::Linear).lr_at(8, 12), 1.5);
    assert_eq!(schedule(Decay::Linear).lr_at(11, 12), 1.125);
    assert!(near(schedule(Decay::Cosine).lr_at(6, 12), 1.5 + 0.5 * 0.5_f64.sqrt()));
    assert!(near(schedule(Decay::Cosine).lr_at(8, 12), 1.5));
}

#[test]
fn past_the_end_it_stays() {
    let schedule = LrSchedule::default().with(|config| config.decay = Decay::Linear);
    assert_eq!(schedule.lr_at(10, 10), 0.0);
    assert_eq!(schedule.lr_at(u64::MAX, 10), 0.0);
    assert_eq!(schedule.with(|config| config.warmup_steps = 20).lr_at(19, 10), schedule.peak);
}

#[test]
fn impossible_settings_are_refused() {
    let default = LrSchedule::default();
    default.ensure_valid().expect("the default is valid");
    for wrong in [
        default.with(|config| config.peak = -1.0),
        default.with(|config| config.end = 1.0),
        default.with(|config| config.peak = f64::NAN),
        default.with(|config| config.peak = f64::INFINITY),
        default.with(|config| config.end = -1e-9),
    ] {
        assert!(wrong.ensure_valid().is_err(), "{wrong:?}");
    }
}

proptest! {
    /// Up to the peak and never above it, then down and never below the end.
    #[test]
    fn rises_to_the_peak_and_falls_to_the_end(
        warmup_steps in 0_u64..50,
        rest in 1_u64..50,
        end in 0.0_f64..1.0,
        decay in prop::sample::select(vec![Decay::Constant, Decay::Linear, Decay::Cosine]),
    ) {
        let schedule = LrSchedule::default().with(|config| { config.peak = 1.0; config.warmup_steps = warmup_steps; config.decay = decay; config.end = end; });
        let num_steps = warmup_steps + rest;
        let rates: Vec<f64> = (0..num_steps).map(|step| schedule.lr_at(step, num_steps)).collect();
        let (rising, falling) = rates.split_at(warmup_steps as usize);
        prop_assert!(rising.is_sorted() && rising.iter().all(|&lr| lr > 0.0));
        prop_assert!(falling.is_sorted_by(|left, right| left >= right));
        prop_assert_eq!(falling[0], 1.0);
        prop_assert!(falling.iter().all(|&lr| lr >= end));
    }
}
