use ddil_losses::{TimestepWeights, Weighting, squared_error};
use ddil_schedulers::{NoiseScheduleConfig, PredictionType, VpConfig};
use tch::{Kind, Tensor, kind};

use crate::toy::{gap, schedules, values};

const ALL: [Weighting; 4] =
    [Weighting::Constant, Weighting::Snr, Weighting::TruncatedSnr, Weighting::SnrPlusOne];

/// One error in `x0`, read as the errors in `epsilon` and `v` at the same noisy sample.
#[test]
fn weights_turn_one_mean_squared_error_into_another() {
    let [schedule, ..] = schedules();
    let timesteps = Tensor::from_slice(&[0_i64, 19, 249, 499, 999]);
    let [x_t, truth, guess] = [0; 3].map(|_| Tensor::randn([5, 7], kind::DOUBLE_CPU));
    let convert = |x0: &Tensor| {
        PredictionType::Sample.convert(&schedule, x0, &x_t, &timesteps).expect("the shapes agree")
    };
    let (truth, guess) = (convert(&truth), convert(&guess));
    let v = |p: &ddil_schedulers::Prediction| {
        PredictionType::VPrediction
            .target(&schedule, &p.x0, &p.epsilon, &timesteps)
            .expect("the shapes agree")
    };
    let x_error = squared_error(&guess.x0, &truth.x0).expect("the shapes agree");
    let epsilon_error = squared_error(&guess.epsilon, &truth.epsilon).expect("the shapes agree");
    let v_error = squared_error(&v(&guess), &v(&truth)).expect("the shapes agree");
    let expected = [
        x_error.shallow_clone(),
        epsilon_error.shallow_clone(),
        x_error.maximum(&epsilon_error),
        v_error,
    ];
    for (weighting, expected) in ALL.into_iter().zip(expected) {
        let weights = TimestepWeights::new(weighting, None, &schedule).expect("no cap");
        let weight = weights.gather(&timesteps, Kind::Double).expect("on the grid");
        assert!(gap(&(weight * &x_error / &expected), &expected.ones_like()) < 1e-10);
    }
}

#[test]
fn no_weight_is_above_the_cap_and_none_is_infinite() {
    let all = Tensor::arange_start(-1, 1000, kind::INT64_CPU);
    for schedule in schedules() {
        for (weighting, cap) in ALL.into_iter().flat_map(|w| [(w, None), (w, Some(5.0))]) {
            let weights = TimestepWeights::new(weighting, cap, &schedule).expect("a good cap");
            let gathered = values(&weights.gather(&all, Kind::Double).expect("on the grid"));
            assert!(gathered.iter().all(|w| w.is_finite() && *w <= cap.unwrap_or(f64::MAX)));
            assert_eq!(gathered[1], weights.at(0).expect("on the grid"));
            assert_eq!(gathered[0], weights.at(-1).expect("the clean end"));
            let clean = match weighting {
                Weighting::Constant => 1.0,
                _ => cap.unwrap_or(0.0),
            };
            assert_eq!(gathered[0], clean);
        }
    }
}

#[test]
fn no_signal_is_no_snr_weight() {
    let vp = VpConfig { rescale_betas_zero_snr: true, ..VpConfig::default() };
    let schedule = NoiseScheduleConfig::Vp(vp).build().expect("a valid schedule");
    let at_last = ALL.map(|weighting| {
        TimestepWeights::new(weighting, None, &schedule)
            .and_then(|weights| weights.at(999))
            .expect("999 is on the grid")
    });
    assert_eq!(at_last, [1.0, 0.0, 1.0, 1.0]);
}

#[test]
fn invalid_values_are_refused() {
    let [schedule, ..] = schedules();
    for cap in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let refused = TimestepWeights::new(Weighting::Snr, Some(cap), &schedule);
        let message = refused.expect_err("a cap must be positive").to_string();
        assert!(message.contains("weight_cap"), "{message}");
    }
    let weights = TimestepWeights::new(Weighting::Snr, None, &schedule).expect("no cap");
    assert!(weights.at(1000).is_err() && weights.at(-2).is_err());
    let off = Tensor::from_slice(&[1001_i64]);
    let message = weights.gather(&off, Kind::Float).expect_err("off the grid").to_string();
    assert!(message.starts_with("TimestepWeights::gather") && message.lines().count() == 1);
}
