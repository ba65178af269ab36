use ddil_core::{Conditioning, Denoiser, Thresholded};
use ddil_losses::{
    LossTerms, Networks, Phase, Progressive, ProgressiveConfig, Weighting, convex_weights,
    halving_stages, progressive_target,
};
use ddil_schedulers::{
    Ddim, FinalAlphaCumprod, NoiseSchedule, NoiseScheduleConfig, Prediction, Sampler, SamplerStep,
    Thresholding, TimestepSpacing, Timesteps, VpConfig,
};
use proptest::prelude::*;
use tch::{Kind, Tensor, kind};

use crate::toy::{Gaussian, Linear, gap, loss_at, schedules, states, trailing, values};

/// A teacher's steps over `stops` and the target as the reference code computes it: the end point, solved for the clean
/// data of a single step.
fn naive_target(schedule: &NoiseSchedule, stops: &[i64], x_t: f64, teacher_x0: &[f64]) -> f64 {
    let scale = |t| schedule.scale_at(t).expect("tests stay on the grid");
    let mut x = x_t;
    for (stop, x0) in stops.windows(2).zip(teacher_x0) {
        let (now, next) = (scale(stop[0]), scale(stop[1]));
        let epsilon = (x - now.alpha * x0) / now.sigma;
        x = next.alpha * x0 + next.sigma * epsilon;
    }
    let (first, last) = (scale(stops[0]), scale(stops[stops.len() - 1]));
    let kept = last.sigma / first.sigma;
    (x - kept * x_t) / (last.alpha - kept * first.alpha)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_convex_target_is_the_reference_target(
        entry in 0_usize..4,
        substeps in 1_u32..=8,
        x_t in -3.0..3.0,
        teacher_x0 in prop::collection::vec(-1.0..1.0, 8),
    ) {
        let pairs: Vec<_> = trailing(4).refined(substeps, 1000).expect("8 parts fit").pairs().collect();
        let steps = &pairs[entry * substeps as usize..][..substeps as usize];
        let stops: Vec<i64> = steps.iter().map(|pair| pair.0).chain(steps.last().map(|pair| pair.1)).collect();
        let teacher_x0 = &teacher_x0[..substeps as usize];
        for schedule in schedules() {
            let weights = convex_weights(&schedule, &stops).expect("the walk falls");
            let convex: f64 = weights.iter().zip(teacher_x0).map(|(w, x0)| w * x0).sum();
            let naive = naive_target(&schedule, &stops, x_t, teacher_x0);
            prop_assert!((convex - naive).abs() < 1e-12, "{convex} {naive} {stops:?}");
        }
    }

    #[test]
    fn weights_are_positive_and_sum_to_one(n in 1_u32..=125, substeps in 1_u32..=8) {
        for schedule in schedules() {
            let pairs: Vec<_> = trailing(n).refined(substeps, 1000).expect("1000 fit").pairs().collect();
            for steps in pairs.chunks(substeps as usize) {
                let stops: Vec<i64> = steps.iter().map(|pair| pair.0).chain(steps.last().map(|pair| pair.1)).collect();
                let weights = convex_weights(&schedule, &stops).expect("the walk falls");
                prop_assert!(weights.iter().all(|w| *w >= 0.0));
                prop_assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-13);
            }
        }
    }

    #[test]
    fn stages_halve_from_start_to_end(end in 1_u32..100, doublings in 1_u32..12) {
        let start = end << doublings;
        let stages = halving_stages(start, end).expect("a power of two");
        prop_assert_eq!(stages.len(), doublings as usize);
        prop_assert_eq!(stages[0] * 2, start);
        prop_assert_eq!(stages.last(), Some(&end));
        prop_assert!(stages.windows(2).all(|pair| pair[0] == 2 * pair[1]));
    }
}

#[test]
fn weights_of_the_second_teacher_step_are_the_golden_ones() {
    let [schedule, ..] = schedules();
    // The formula in 40 decimal digits.
    let golden: [(u32, &[f64]); 2] = [
        (4, &[0.611_419_790_686_592_1, 0.583_468_405_744_635_6, 0.616_457_784_004_163_2, 1.0]),
        (
            8,
            &[
                0.567_722_588_628_512_2,
                0.546_451_123_182_266_9,
                0.546_797_239_762_753_9,
                0.538_231_680_444_120_4,
                0.553_752_221_700_988_8,
                0.565_127_211_983_950_7,
                0.621_162_064_758_421_4,
                1.0,
            ],
        ),
    ];
    for (n, expected) in golden {
        let pairs: Vec<_> = trailing(n).refined(2, 1000).expect("it fits").pairs().collect();
        for (steps, expected) in pairs.chunks(2).zip(expected) {
            let stops = [steps[0].0, steps[1].0, steps[1].1];
            let weights = convex_weights(&schedule, &stops).expect("the walk falls");
            assert!((weights[1] - expected).abs() < 1e-12, "{stops:?}: {weights:?}");
        }
    }
}

#[test]
fn a_finite_log_snr_at_the_clean_end_keeps_the_first_weight_positive() {
    let vp = VpConfig { final_alpha_cumprod: FinalAlphaCumprod::First, ..VpConfig::default() };
    let schedule = NoiseScheduleConfig::Vp(vp).build().expect("a valid schedule");
    let weights = convex_weights(&schedule, &[249, 124, -1]).expect("the walk falls");
    assert!(weights[0] > 0.0 && weights[1] < 1.0);
    let naive = naive_target(&schedule, &[249, 124, -1], 0.7, &[0.3, -0.4]);
    assert!((weights[0] * 0.3 - weights[1] * 0.4 - naive).abs() < 1e-12);
}

fn objective(schedule: &NoiseSchedule, grid: &Timesteps, config: ProgressiveConfig) -> Progressive {
    Progressive::new(config, schedule.clone(), grid.clone()).expect("valid settings")
}

fn loss(objective: &Progressive, batch: &ddil_core::States, networks: &Networks<'_>) -> LossTerms {
    loss_at(objective, 0, Phase::Student, batch, networks).expect("valid states")
}

#[test]
fn a_student_step_with_the_target_lands_where_the_teacher_does() {
    let grid = trailing(4);
    let indices = [3, 0, 2, 1, 0];
    for schedule in schedules() {
        for substeps in [1, 2, 3, 8] {
            let config = ProgressiveConfig::default().with(|config| config.substeps = substeps);
            let progressive = objective(&schedule, &grid, config);
            let network = Gaussian { schedule: schedule.clone(), mean: 0.3, std: 0.6 };
            let batch = states(Tensor::randn([5, 2, 3], kind::DOUBLE_CPU), &grid, &indices);
            let networks = Networks::new(&network, &network);
            let terms = loss(&progressive, &batch, &networks);

            let prev: Vec<i64> =
                indices.iter().map(|i| grid.as_slice().get(i + 1).copied().unwrap_or(-1)).collect();
            let said = Prediction::from_x0(&schedule, terms.target, &batch.x_t, &batch.timesteps)
                .expect("the shapes agree");
            let timesteps = Vec::try_from(&batch.timesteps).expect("one timestep per sample");
            let step = SamplerStep::new(&said, &timesteps, &prev);
            let landed = Ddim::new(schedule.clone()).step(&step).expect("the shapes agree");
            let teacher_next = terms.teacher_next.expect("the teacher gets there");
            assert!(gap(&landed, &teacher_next) < 1e-12);
        }
    }
}

#[test]
fn a_thresholded_teacher_keeps_the_target_in_range() {
    let [schedule, ..] = schedules();
    let grid = trailing(4);
    let config = ProgressiveConfig::default().with(|config| config.substeps = 4);
    let progressive = objective(&schedule, &grid, config);
    let wild = Linear { schedule: schedule.clone(), factor: Tensor::from(5.0) };
    let teacher = Thresholded::new(&wild, Thresholding::clamp_pixels()).expect("valid bounds");
    let x_t = Tensor::randn([64, 3], kind::FLOAT_CPU);
    let batch = states(x_t, &grid, &[0, 1, 2, 3].repeat(16));
    let networks = Networks::new(&wild, &teacher);
    let terms = loss(&progressive, &batch, &networks);
    let beyond = terms.target.abs().max().double_value(&[]);
    assert!(beyond <= 1.0 + 1e-6, "{beyond}");
    // The student's own prediction is unchanged.
    assert!(terms.student_x0.abs().max().double_value(&[]) > 1.0);
}

#[test]
fn the_student_gets_a_gradient_and_the_teacher_none() {
    let [schedule, ..] = schedules();
    let grid = trailing(2);
    let progressive = objective(&schedule, &grid, ProgressiveConfig::default());
    let student = Linear::trainable(schedule.clone(), 0.5);
    let teacher = Linear::trainable(schedule, 0.9);
    let batch = states(Tensor::randn([2, 3], kind::DOUBLE_CPU), &grid, &[0, 1]);
    let terms = loss(&progressive, &batch, &Networks::new(&student, &teacher));
    assert!(!terms.target.requires_grad() && !terms.student_x0.requires_grad());
    assert!(terms.teacher_next.is_some_and(|next| !next.requires_grad()));
    terms.per_sample.mean(Kind::Double).backward();
    assert!(student.factor.grad().double_value(&[]) != 0.0);
    assert!(!teacher.factor.grad().defined());
}

/// With a linear teacher and a linear student every number can be had by hand.
#[test]
fn the_loss_of_a_gaussian_teacher_is_its_closed_form() {
    let grid = trailing(4);
    let x = [0.4, -1.3];
    for schedule in schedules() {
        let teacher = Gaussian { schedule: schedule.clone(), mean: 0.2, std: 0.7 };
        let student = Linear { schedule: schedule.clone(), factor: Tensor::from(0.8) };
        let config = ProgressiveConfig::default().with(|config| {
            config.weighting = Weighting::SnrPlusOne;
            config.weight_cap = Some(1e3);
        });
        let progressive = objective(&schedule, &grid, config);
        let rows = [0.4, -1.3].repeat(4);
        let x_t = Tensor::from_slice(&rows).view([4, 2]);
        let batch = states(x_t, &grid, &[0, 1, 2, 3]);
        let networks = Networks::new(&student, &teacher);
        let per_sample = values(&loss(&progressive, &batch, &networks).per_sample);

        let fine: Vec<_> = grid.refined(2, 1000).expect("it fits").pairs().collect();
        for (steps, found) in fine.chunks(2).zip(per_sample) {
            let stops = [steps[0].0, steps[1].0, steps[1].1];
            let expected = expected_loss(&schedule, &teacher, &stops, x);
            assert!((found / expected - 1.0).abs() < 1e-10, "{found} {expected} {stops:?}");
        }
    }
}

fn expected_loss(
    schedule: &NoiseSchedule,
    teacher: &Gaussian,
    stops: &[i64; 3],
    x: [f64; 2],
) -> f64 {
    let [now, middle] = [stops[0], stops[1]].map(|t| schedule.scale_at(t).expect("on the grid"));
    let errors = x.map(|x| {
        let (slope, offset) = teacher.line(stops[0]);
        let first = slope * x + offset;
        let epsilon = (x - now.alpha * first) / now.sigma;
        let between = middle.alpha * first + middle.sigma * epsilon;
        let (slope, offset) = teacher.line(stops[1]);
        let second = slope * between + offset;
        (0.8 * x - naive_target(schedule, stops, x, &[first, second])).powi(2)
    });
    let weight = (now.alpha.powi(2) / now.sigma.powi(2) + 1.0).min(1e3);
    weight * (errors[0] + errors[1]) / 2.0
}

#[test]
fn each_sample_of_a_mixed_batch_is_treated_as_it_would_be_alone() {
    let [schedule, ..] = schedules();
    let grid = trailing(8);
    let progressive = objective(&schedule, &grid, ProgressiveConfig::default());
    let teacher = Gaussian { schedule: schedule.clone(), mean: -0.1, std: 0.5 };
    let student = Linear { schedule, factor: Tensor::from(0.3) };
    let networks = Networks::new(&student, &teacher);
    let x_t = Tensor::randn([8, 5], kind::DOUBLE_CPU);
    let indices = [4, 7, 0, 3, 3, 1, 6, 2];
    let together = loss(&progressive, &states(x_t.shallow_clone(), &grid, &indices), &networks);
    for (i, index) in indices.into_iter().enumerate() {
        let alone = states(x_t.narrow(0, i as i64, 1), &grid, &[index]);
        let alone = loss(&progressive, &alone, &networks);
        let row = |tensor: &Tensor| tensor.narrow(0, i as i64, 1);
        assert_eq!(gap(&row(&together.per_sample), &alone.per_sample), 0.0);
        assert_eq!(gap(&row(&together.target), &alone.target), 0.0);
    }
}

#[test]
fn weights_set_in_at_their_step() {
    let [schedule, ..] = schedules();
    let grid = trailing(4);
    let config = ProgressiveConfig::default().with(|config| {
        config.weighting = Weighting::Snr;
        config.snr_loss_start_step = 10;
    });
    let progressive = objective(&schedule, &grid, config);
    let teacher = Gaussian { schedule: schedule.clone(), mean: 0.0, std: 0.5 };
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(0.3) };
    let networks = Networks::new(&student, &teacher);
    let batch = states(Tensor::randn([1, 5], kind::DOUBLE_CPU), &grid, &[2]);
    let at = |step| {
        let terms = loss_at(&progressive, step, Phase::Student, &batch, &networks);
        values(&terms.expect("valid states").per_sample)[0]
    };
    let snr = schedule.scale_at(499).expect("on the grid").snr();
    assert!((at(10) / at(9) / snr - 1.0).abs() < 1e-12);
}

#[test]
fn a_network_receives_the_same_conditioning_at_every_teacher_step() {
    /// Expects the label 7.
    struct WantsSeven(NoiseSchedule);
    impl Denoiser for WantsSeven {
        fn predict(
            &self,
            x_t: &Tensor,
            t: &Tensor,
            conditioning: &Conditioning,
        ) -> ddil_core::Result<Prediction> {
            let label =
                conditioning.get(Conditioning::CLASS_LABELS).map(|labels| labels.int64_value(&[0]));
            assert_eq!(label, Some(7));
            Ok(Prediction::from_x0(&self.0, x_t.zeros_like(), x_t, t)?)
        }
        fn schedule(&self) -> &NoiseSchedule {
            &self.0
        }
    }
    let [schedule, ..] = schedules();
    let grid = trailing(1);
    let progressive = objective(&schedule, &grid, ProgressiveConfig::default());
    let mut batch = states(Tensor::randn([1, 5], kind::DOUBLE_CPU), &grid, &[0]);
    batch.conditioning = Conditioning::class_labels(Tensor::from_slice(&[7_i64]));
    let network = WantsSeven(schedule);
    loss(&progressive, &batch, &Networks::new(&network, &network));
}

#[test]
fn unsupported_requests_are_refused_by_name() {
    let [schedule, flow, _] = schedules();
    let grid = trailing(4);
    let progressive = objective(&schedule, &grid, ProgressiveConfig::default());
    let network = Gaussian { schedule: schedule.clone(), mean: 0.0, std: 1.0 };
    let other = Gaussian { schedule: flow, mean: 0.0, std: 1.0 };
    let networks = Networks::new(&network, &network);
    let batch = |t: i64, index| {
        let mut batch = states(Tensor::zeros([1, 2], kind::DOUBLE_CPU), &grid, &[0]);
        (batch.timesteps, batch.grid_indices) = (Tensor::from_slice(&[t]), vec![index]);
        batch
    };
    let say = |phase, batch: &ddil_core::States, networks: &Networks<'_>| {
        let refused = loss_at(&progressive, 0, phase, batch, networks);
        refused.expect_err("it cannot be done").to_string()
    };
    assert!(say(Phase::Critic, &batch(999, 0), &networks).contains("Critic"));
    for (t, index) in [(998, 0), (0, 0), (-1, 0), (1000, 0), (999, 4)] {
        let message = say(Phase::Student, &batch(t, index), &networks);
        assert!(message.contains("[999, 749, 499, 249]"), "{message}");
    }
    let mixed = Networks::new(&network, &other);
    assert!(
        say(Phase::Student, &batch(999, 0), &mixed).contains("teacher has another noise schedule")
    );
}

#[test]
fn invalid_settings_are_refused_by_name() {
    let [schedule, ..] = schedules();
    let build = |config, grid: &Timesteps| {
        let refused = Progressive::new(config, schedule.clone(), grid.clone());
        refused.expect_err("it cannot be").to_string()
    };
    let substeps =
        |substeps| ProgressiveConfig::default().with(|config| config.substeps = substeps);
    assert!(build(substeps(0), &trailing(4)).contains("`substeps` is 0"));
    assert!(build(substeps(251), &trailing(4)).contains("`substeps` is 251"));
    // Timestep 0 is one step from clean data: there is nothing between.
    let leading = Timesteps::spaced(TimestepSpacing::Leading, 1000, 4, 0).expect("a valid grid");
    assert!(build(substeps(2), &leading).contains("[750, 500, 250, 0]"));
    let cap = ProgressiveConfig::default().with(|config| config.weight_cap = Some(-1.0));
    assert!(build(cap, &trailing(4)).contains("weight_cap"));

    let vp = VpConfig { final_alpha_cumprod: FinalAlphaCumprod::First, ..VpConfig::default() };
    let first = NoiseScheduleConfig::Vp(vp).build().expect("a valid schedule");
    assert!(convex_weights(&first, &[0, -1]).is_err(), "no signal is gained");
    assert!(convex_weights(&schedule, &[999]).is_err() && convex_weights(&schedule, &[]).is_err());
    assert!(convex_weights(&schedule, &[499, 749]).is_err(), "noise is gained");
    assert!(convex_weights(&schedule, &[1000, 749]).is_err(), "off the grid");
    for (start, end) in [(30, 4), (4, 4), (4, 8), (0, 4), (4, 0), (12, 4)] {
        let message = halving_stages(start, end).expect_err("it does not halve").to_string();
        assert!(message.contains("such as"), "{message}");
    }
}

#[test]
fn a_target_with_other_rows_is_refused() {
    let x0 = [0; 2].map(|_| Tensor::zeros([3, 2], kind::DOUBLE_CPU));
    let weights = |shape: [i64; 2]| Tensor::ones(shape, kind::DOUBLE_CPU);
    assert!(progressive_target(&x0, &weights([3, 2])).is_ok());
    for shape in [[3, 1], [2, 2], [3, 3]] {
        let message = progressive_target(&x0, &weights(shape)).expect_err("a misfit").to_string();
        assert!(message.contains("expected [3, 2]"), "{message}");
    }
    assert!(progressive_target(&[], &weights([0, 0])).is_err());
    let ragged = [Tensor::zeros([3, 2], kind::DOUBLE_CPU), Tensor::zeros([3, 4], kind::DOUBLE_CPU)];
    assert!(progressive_target(&ragged, &weights([3, 2])).is_err());
}
