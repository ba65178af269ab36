use ddil_schedulers::{
    Ddim, NoiseSchedule, Prediction, PredictionType, Sampler, SamplerStep, Scale, TimestepSpacing,
    Timesteps,
};
use proptest::prelude::*;
use tch::{Kind, Tensor, kind};

use crate::support::{assert_close, families, gap, rows, stable_diffusion, timesteps, values};

/// One deterministic step of one sample.
fn step(schedule: &NoiseSchedule, x_t: &[f64], epsilon: &[f64], t: i64, prev: i64) -> Vec<f64> {
    let (x_t, epsilon) = (rows(1, x_t), rows(1, epsilon));
    let at = timesteps(&[t]);
    let said = PredictionType::Epsilon.convert(schedule, &epsilon, &x_t, &at).expect("they fit");
    let sampler = Ddim::new(schedule.clone());
    values(&sampler.step(&SamplerStep::new(&said, &[t], &[prev])).expect("they fit"))
}

/// Every number in 40 decimal digits.
#[test]
fn steps_are_the_golden_ones() {
    let schedule = stable_diffusion();
    let (x, epsilon) = ([1.0, -0.5, 0.25, 2.0], [0.1, 0.2, -0.3, 0.4]);
    let golden = [
        (
            999,
            749,
            [
                3.235_148_506_748_508,
                -2.244_169_046_802_492,
                1.623_360_358_143_837,
                5.969_021_178_754_424,
            ],
        ),
        (
            749,
            499,
            [
                2.084_355_893_004_039,
                -1.367_413_277_777_163,
                0.943_894_903_908_697,
                3.908_523_520_987_962,
            ],
        ),
        (
            499,
            249,
            [
                1.484_064_810_941_21,
                -0.930_991_722_848_34,
                0.616_663_315_326_358,
                2.816_962_167_980_232,
            ],
        ),
        (
            249,
            -1,
            [
                1.147_451_071_539_391,
                -0.747_026_760_679_367,
                0.512_154_360_267_421,
                2.156_261_163_151_046,
            ],
        ),
    ];
    for (t, prev, expected) in golden {
        assert_close(&step(&schedule, &x, &epsilon, t, prev), &expected, 1e-12);
    }
}

/// A step of the batch, all of it from `t` to `prev`, with the true prediction.
fn step_with_true_noise(sampler: &Ddim, x0: &Tensor, noise: &Tensor, t: i64, prev: i64) -> Tensor {
    let [t, prev] = [t, prev].map(|at| vec![at; x0.size()[0] as usize]);
    let truth = Prediction { x0: x0.shallow_clone(), epsilon: noise.shallow_clone() };
    sampler.step(&SamplerStep::new(&truth, &t, &prev).with_noise(noise)).expect("they fit")
}

#[test]
fn the_renewed_noise_has_the_golden_variance() {
    let sampler = Ddim::with_eta(stable_diffusion(), 1.0).expect("1 is allowed");
    let golden = [
        (999, 749, 0.869_790_177_003_821_6),
        (749, 499, 0.609_544_425_969_458_2),
        (499, 249, 0.264_613_202_424_944),
        (249, -1, 0.0),
    ];
    for (t, prev, variance) in golden {
        let (t, prev) = ([t], [prev]);
        let zero = rows(1, &[0.0]);
        let nothing = Prediction { x0: zero.shallow_clone(), epsilon: zero };
        let one = rows(1, &[1.0]);
        let step = SamplerStep::new(&nothing, &t, &prev).with_noise(&one);
        let found = values(&sampler.step(&step).expect("they fit"))[0];
        assert_close(&[found.powi(2)], &[variance], 1e-12);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// With the true noise, DDIM arrives where `add_noise` would have put the sample, for any steps.
    #[test]
    fn the_true_prediction_reaches_the_noised_state(n in 1_u32..=1000, entry in 0_usize..1000) {
        for schedule in families() {
            let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, n, 0).expect("n is in 1..=1000");
            let (t, prev) = grid.pairs().nth(entry % n as usize).expect("on the grid");
            let [x0, noise] = [0; 2].map(|_| Tensor::randn([1, 4], kind::DOUBLE_CPU));
            let landed = step_with_true_noise(&Ddim::new(schedule.clone()), &x0, &noise, t, prev);
            let expected = schedule.add_noise(&x0, &noise, &timesteps(&[prev])).expect("they fit");
            prop_assert_eq!(gap(&landed, &expected), 0.0);
        }
    }

    /// The variances of the kept and the fresh noise add up to the new timestep's variance.
    #[test]
    fn old_and_fresh_noise_share_the_variance(eta in 0.0..=1.0, t in 1_i64..1000, back in 1_i64..1000) {
        let prev = (t - back).max(-1);
        for schedule in families() {
            let sampler = Ddim::with_eta(schedule.clone(), eta).expect("in 0..=1");
            let (t, prev_t) = ([t, t], [prev, prev]);
            // One sample with old noise alone, one with fresh noise alone.
            let old = Tensor::from_slice(&[1.0, 0.0]).view([2, 1]);
            let fresh: Tensor = 1.0 - &old;
            let said = Prediction { x0: old.zeros_like(), epsilon: old };
            let step = SamplerStep::new(&said, &t, &prev_t).with_noise(&fresh);
            let shares = values(&sampler.step(&step).expect("they fit"));
            let sigma = schedule.scale_at(prev).expect("on the grid").sigma;
            let total = shares[0].powi(2) + shares[1].powi(2);
            prop_assert!((total - sigma.powi(2)).abs() <= 1e-12 * sigma.powi(2).max(1.0));
            let now = schedule.scale_at(t[0]).expect("on the grid");
            let expected = eta * sigma * (1.0 - now.snr() / schedule.scale_at(prev).expect("on the grid").snr()).sqrt();
            prop_assert!((shares[1] - expected).abs() <= 1e-12 * sigma.max(1.0));
        }
    }
}

/// Where a run of `n` steps with the exact denoiser for data of one mean and spread ends, against where the flow would
/// take its start, two standard deviations up.
fn error_of_a_run(n: u32) -> f64 {
    let schedule = stable_diffusion();
    let sampler = Ddim::new(schedule.clone());
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, n, 0).expect("it fits");
    let (mean, std) = (0.3, 0.5_f64);
    let variance = |scale: Scale| scale.alpha.powi(2) * std.powi(2) + scale.sigma.powi(2);
    let start = schedule.scale_at(999).expect("on the grid");
    let mut x = rows(1, &[start.alpha * mean + 2.0 * variance(start).sqrt()]);
    for (t, prev) in grid.pairs() {
        let scale = schedule.scale_at(t).expect("on the grid");
        let slope = scale.alpha * std.powi(2) / variance(scale);
        let x0 = slope * (&x - scale.alpha * mean) + mean;
        let said = Prediction::from_x0(&schedule, x0, &x, &timesteps(&[t])).expect("they fit");
        x = sampler.step(&SamplerStep::new(&said, &[t], &[prev])).expect("they fit");
    }
    (values(&x)[0] - (mean + 2.0 * std)).abs()
}

#[test]
fn a_run_of_an_exact_denoiser_converges_to_the_data() {
    let errors = [50, 100, 200].map(error_of_a_run);
    assert!(errors[2] < 0.03, "{errors:?}");
    // The method is of first order: twice the steps, half the error.
    assert!(errors.windows(2).all(|pair| (0.45..0.6).contains(&(pair[1] / pair[0]))), "{errors:?}");
}

#[test]
fn each_sample_of_a_batch_steps_on_its_own() {
    let schedule = stable_diffusion();
    let sampler = Ddim::with_eta(schedule, 0.5).expect("in 0..=1");
    let [x0, epsilon, noise] = [0; 3].map(|_| Tensor::randn([3, 2, 2], kind::FLOAT_CPU));
    let (t, prev) = ([999, 20, 500], [749, -1, 0]);
    let said = Prediction { x0, epsilon };
    let together = sampler.step(&SamplerStep::new(&said, &t, &prev).with_noise(&noise));
    let together = together.expect("they fit");
    assert_eq!(together.kind(), Kind::Float);
    for i in 0..3 {
        let row = |x: &Tensor| x.narrow(0, i, 1);
        let said = Prediction { x0: row(&said.x0), epsilon: row(&said.epsilon) };
        let (noise, i) = (row(&noise), i as usize);
        let (t, prev) = ([t[i]], [prev[i]]);
        let alone = sampler.step(&SamplerStep::new(&said, &t, &prev).with_noise(&noise));
        assert_eq!(gap(&together.narrow(0, i as i64, 1), &alone.expect("they fit")), 0.0);
    }
}

#[test]
fn mismatches_are_refused_by_name() {
    let schedule = stable_diffusion();
    for eta in [-0.1, 1.1, f64::NAN] {
        let message = Ddim::with_eta(schedule.clone(), eta).expect_err("out of range").to_string();
        assert!(message.contains("sampler.eta"), "{message}");
    }
    let said = Prediction { x0: rows(2, &[0.0]), epsilon: rows(2, &[0.0, 0.0]) };
    let (t, prev) = ([9, 9], [3, 3]);
    let sampler = Ddim::new(schedule.clone());
    let message =
        sampler.step(&SamplerStep::new(&said, &t, &prev)).expect_err("a misfit").to_string();
    assert!(message.contains("`epsilon` has shape [2, 2]"), "{message}");
    let said = Prediction { x0: rows(2, &[0.0]), epsilon: rows(2, &[0.0]) };
    let noisy = Ddim::with_eta(schedule, 1.0).expect("in 0..=1");
    let message =
        noisy.step(&SamplerStep::new(&said, &t, &prev)).expect_err("no noise").to_string();
    assert!(message.contains("requires `noise`"), "{message}");
    let refused = |t, prev| {
        sampler.step(&SamplerStep::new(&said, t, prev)).expect_err("a misfit").to_string()
    };
    assert!(refused(&[9, 9], &[3]).contains("`prev_timesteps` has shape [1]; expected [2]"));
    assert!(refused(&[9, 1000], &[3, 3]).contains("timestep 1000 is not in -1..=999"));
}
