use ddil_schedulers::{
    BetaSchedule, FinalAlphaCumprod, NoiseSchedule, Prediction, PredictionType, Thresholding,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, kind};

use crate::support::{assert_close, families, gap, rows, stable_diffusion, timesteps, values, vp};

const ALL: [PredictionType; 4] = [
    PredictionType::Epsilon,
    PredictionType::Sample,
    PredictionType::VPrediction,
    PredictionType::Flow,
];

/// With the correct output, a network's prediction is the clean data and the noise, for every prediction type.
fn round_trip(schedule: &NoiseSchedule, prediction_type: PredictionType, t: i64) -> f64 {
    let [x0, noise] = [0; 2].map(|_| Tensor::randn([1, 8], kind::DOUBLE_CPU));
    let t = timesteps(&[t]);
    let x_t = schedule.add_noise(&x0, &noise, &t).expect("they fit");
    let output = prediction_type.target(schedule, &x0, &noise, &t).expect("they fit");
    let found = prediction_type.convert(schedule, &output, &x_t, &t).expect("they fit");
    gap(&found.x0, &x0).max(gap(&found.epsilon, &noise))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn outputs_convert_there_and_back(t in 0_i64..1000) {
        for schedule in families() {
            for prediction_type in ALL {
                if prediction_type.ensure_defined_on(&schedule).is_err() {
                    continue;
                }
                // A division by sigma or alpha multiplies the rounding of the sum it undoes.
                let scale = schedule.scale_at(t).expect("on the grid");
                let amplified = (scale.alpha / scale.sigma).max(scale.sigma / scale.alpha.max(1e-3));
                let tolerance = 1e-14 * amplified.max(1.0) * 8.0;
                let error = round_trip(&schedule, prediction_type, t);
                prop_assert!(error < tolerance.max(1e-12), "{prediction_type:?} {t} {error}");
            }
        }
    }
}

#[test]
fn each_type_is_its_formula() {
    let schedule = stable_diffusion();
    let scale = schedule.scale_at(499).expect("on the grid");
    let (alpha, sigma) = (scale.alpha, scale.sigma);
    let (z, out) = (0.7, -0.4);
    let t = timesteps(&[499]);
    let expected = [
        [(z - sigma * out) / alpha, out],
        [out, (z - alpha * out) / sigma],
        [alpha * z - sigma * out, sigma * z + alpha * out],
        [(z - sigma * out) / (alpha + sigma), (z + alpha * out) / (alpha + sigma)],
    ];
    for (prediction_type, expected) in ALL.into_iter().zip(expected) {
        let (z, out) = (rows(1, &[z]), rows(1, &[out]));
        let found = prediction_type.convert(&schedule, &out, &z, &t).expect("they fit");
        let found = [values(&found.x0)[0], values(&found.epsilon)[0]];
        assert_close(&found, &expected, 1e-14);
    }
}

#[test]
fn half_kinds_are_read_in_float() {
    let schedule = stable_diffusion();
    for half in [Kind::Half, Kind::BFloat16] {
        let x = Tensor::full([1, 2], 0.5, (half, Device::Cpu));
        let read = PredictionType::Epsilon.convert(&schedule, &x, &x, &timesteps(&[999]));
        let read = read.expect("they fit");
        assert_eq!((read.x0.kind(), read.epsilon.kind()), (Kind::Float, Kind::Float));
        // 0.5 (1 - sigma) / alpha, which neither half kind could carry to six digits.
        let scale = schedule.scale_at(999).expect("on the grid");
        assert_close(&values(&read.x0)[..1], &[0.5 * (1.0 - scale.sigma) / scale.alpha], 1e-6);
    }
}

#[test]
fn a_thresholded_prediction_still_reproduces_its_sample() {
    let schedule = stable_diffusion();
    let t = timesteps(&[749, 249]);
    let x_t = Tensor::randn([2, 16], kind::DOUBLE_CPU) * 2.0;
    let output = Tensor::randn([2, 16], kind::DOUBLE_CPU);
    let read = || PredictionType::Epsilon.convert(&schedule, &output, &x_t, &t).expect("they fit");
    let clamp = Thresholding::clamp_pixels();
    let held = read().thresholded(&clamp, &schedule, &x_t, &t).expect("they fit");
    assert!(held.x0.abs().max().double_value(&[]) <= 1.0);
    let again = schedule.add_noise(&held.x0, &held.epsilon, &t).expect("they fit");
    assert!(gap(&again, &x_t) < 1e-14);

    let kept = read().thresholded_keeping_epsilon(&clamp).expect("they fit");
    assert_eq!(gap(&kept.x0, &held.x0), 0.0);
    assert_eq!(gap(&kept.epsilon, &output), 0.0);
}

#[test]
fn a_gradient_flows_through_the_conversion() {
    let schedule = stable_diffusion();
    let output = rows(1, &[0.1, 0.2]).set_requires_grad(true);
    let x_t = rows(1, &[1.0, -1.0]);
    let read = PredictionType::VPrediction.convert(&schedule, &output, &x_t, &timesteps(&[499]));
    let read = read.expect("they fit");
    assert!(!read.detach().x0.requires_grad());
    read.x0.sum(Kind::Double).backward();
    let sigma = schedule.scale_at(499).expect("on the grid").sigma;
    assert_close(&values(&output.grad()), &[-sigma, -sigma], 1e-15);
}

#[test]
fn outputs_without_a_meaning_are_refused() {
    let [_, zero_snr, flow, edm] = families();
    let refused = |prediction_type: PredictionType, schedule: &NoiseSchedule| {
        prediction_type.ensure_defined_on(schedule).expect_err("it has no meaning").to_string()
    };
    assert!(refused(PredictionType::Epsilon, &zero_snr).contains("no signal"));
    assert!(refused(PredictionType::VPrediction, &flow).contains("`v_prediction`"));
    assert!(refused(PredictionType::VPrediction, &edm).contains("`v_prediction`"));
    assert!(PredictionType::VPrediction.ensure_defined_on(&zero_snr).is_ok());
}

#[test]
fn misfits_are_refused_by_name() {
    let schedule = vp(BetaSchedule::Linear, false, FinalAlphaCumprod::One);
    let (x, y) = (rows(1, &[0.0; 2]), rows(1, &[0.0; 3]));
    let t = timesteps(&[1]);
    for prediction_type in ALL {
        let message =
            prediction_type.convert(&schedule, &x, &y, &t).expect_err("a misfit").to_string();
        assert!(message.contains("`model_output` has shape [1, 2]"), "{message}");
        assert!(prediction_type.target(&schedule, &x, &y, &t).is_err());
    }
    assert!(Prediction::from_x0(&schedule, x, &y, &t).is_err());
}

#[test]
fn types_are_spelt_as_published() {
    for prediction_type in ALL {
        let text = format!("\"{}\"", prediction_type.as_str());
        let read: PredictionType = serde_json::from_str(&text).expect("its own name");
        assert_eq!(read, prediction_type);
    }
}
