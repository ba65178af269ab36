//! Closed forms and properties of solvers; `solver_golden.rs` compares with diffusers.

use ddil_schedulers::{
    BetaSchedule, Ddim, DpmSolver, DpmSolverConfig, DpmSolverType, Estimate, Euler,
    FinalAlphaCumprod, FinalSigma, LevelsConfig, NoiseLevel, NoiseLevels, NoiseSchedule,
    PredictionType, Sampler, Scale, Solver, SolverCoefficients, SolverConfig, SolverMethod,
    SolverRun, Thresholding, TimestepSpacing, Timesteps, UniPc, UniPcConfig, UniPcType,
};
use proptest::prelude::*;
use tch::{Kind, Tensor, kind};

use crate::support::{families, gap, rows, stable_diffusion, values, vp};

fn trailing(schedule: &NoiseSchedule, n: u32) -> NoiseLevels {
    let timesteps =
        Timesteps::spaced(TimestepSpacing::Trailing, 1000, n, 0).expect("n is in 1..=1000");
    NoiseLevels::of_timesteps(schedule, &timesteps).expect("on the grid")
}

fn dpm(config: DpmSolverConfig) -> DpmSolver {
    DpmSolver::new(config).expect("a valid order")
}

fn uni(config: UniPcConfig) -> UniPc {
    UniPc::new(config).expect("a valid order")
}

/// Every solver in every variant.
fn solvers() -> Vec<Box<dyn Solver>> {
    let mut all: Vec<Box<dyn Solver>> = vec![Box::new(Euler)];
    for solver_order in 1..=3 {
        for lower_order_final in [true, false] {
            for solver_type in [DpmSolverType::Midpoint, DpmSolverType::Heun] {
                let defaults = DpmSolverConfig::default();
                let config =
                    DpmSolverConfig { solver_order, solver_type, lower_order_final, ..defaults };
                all.push(Box::new(dpm(config)));
            }
            for solver_type in [UniPcType::Bh1, UniPcType::Bh2] {
                let defaults = UniPcConfig::default();
                let config =
                    UniPcConfig { solver_order, solver_type, lower_order_final, ..defaults };
                all.push(Box::new(uni(config)));
            }
        }
    }
    all
}

/// Solvers of first order: all of them are DDIM.
fn of_first_order() -> [Box<dyn Solver>; 3] {
    let order_1 = DpmSolverConfig { solver_order: 1, ..DpmSolverConfig::default() };
    let uncorrected = UniPcConfig {
        solver_order: 1,
        disable_corrector: (0..1000).collect(),
        ..UniPcConfig::default()
    };
    [Box::new(Euler), Box::new(dpm(order_1)), Box::new(uni(uncorrected))]
}

#[test]
fn solvers_of_first_order_are_deterministic_ddim() {
    for schedule in families() {
        let (ddim, levels) = (Ddim::new(schedule.clone()), trailing(&schedule, 10));
        for solver in of_first_order() {
            for step in 0..levels.len() {
                let (now, prev) = (levels.scale(step), levels.scale(step + 1));
                let expected = ddim.coefficients(now, prev).without_epsilon(now);
                let found = solver.coefficients(&levels, step);
                let what = format!("{solver:?} step {step}");
                assert_eq!((found.x_t, found.weight(0)), (expected.x_t, expected.x0), "{what}");
                assert_eq!(found.weight(1), 0.0, "{what}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Euler's step for `x / alpha` in `sigma / alpha`, as Karras et al. write it, is DDIM's step.
    #[test]
    fn eulers_step_between_quotients_is_ddims(x in -3.0_f64..3.0, x0 in -1.0_f64..1.0, n in 1_u32..50, at in 0_usize..50) {
        let schedule = stable_diffusion();
        let levels = trailing(&schedule, n);
        let step = at % levels.len();
        let (now, prev) = (levels.scale(step), levels.scale(step + 1));
        let [s, s_prev] = [now, prev].map(|scale| scale.sigma / scale.alpha);
        let y = x / now.alpha;
        let expected = prev.alpha * (y + (s_prev - s) * (y - x0) / s);
        let SolverCoefficients { x_t, x0: weights } = Euler.coefficients(&levels, step);
        prop_assert!((x_t * x + weights[0] * x0 - expected).abs() < 1e-12);
    }

    /// If every prediction is the same, the step is the exact one, whatever the order.
    #[test]
    fn constant_data_make_every_step_exact(n in 1_u32..40, at in 0_usize..40) {
        for schedule in families() {
            let levels = trailing(&schedule, n);
            let step = at % levels.len();
            for solver in solvers() {
                let found = solver.coefficients(&levels, step);
                let exact = Euler.coefficients(&levels, step);
                let sum: f64 = found.x0.iter().sum();
                prop_assert_eq!(found.x_t, exact.x_t);
                prop_assert!((sum - exact.x0[0]).abs() < 1e-9, "{:?}: {}", solver, sum - exact.x0[0]);
                prop_assert!(found.x0.len() <= solver.history() + 1);
                prop_assert!(found.x0.iter().skip(step + 1).all(|weight| *weight == 0.0));
            }
        }
    }

    /// The variant of algorithm 2 of Lu et al. in their own letters.
    #[test]
    fn the_second_order_step_is_the_papers(n in 15_u32..60, at in 1_usize..50) {
        let levels = trailing(&stable_diffusion(), n);
        let step = 1 + at % (levels.len() - 2);
        let lambda = |i: usize| (levels.scale(i).alpha / levels.scale(i).sigma).ln();
        let (h, h_last) = (lambda(step + 1) - lambda(step), lambda(step) - lambda(step - 1));
        let r = h_last / h;
        let total = -levels.scale(step + 1).alpha * ((-h).exp() - 1.0);
        let expected = [total * (1.0 + 1.0 / (2.0 * r)), -total / (2.0 * r)];
        let found = dpm(DpmSolverConfig::default()).coefficients(&levels, step);
        for (found, expected) in found.x0.iter().zip(expected) {
            prop_assert!((found - expected).abs() < 1e-12);
        }
    }
}

/// Levels evenly spaced in the 7th root of `sigma / alpha`, of which the last step stays, so that no step is infinite.
fn smooth(method: SolverMethod, n: u32) -> (Box<dyn Solver>, NoiseLevels) {
    let levels = LevelsConfig {
        use_karras_sigmas: true,
        final_sigmas_type: FinalSigma::SigmaMin,
        ..LevelsConfig::default()
    };
    let config = SolverConfig { method, levels };
    let levels = config.levels(&stable_diffusion(), n).expect("they fit");
    (config.build().expect("valid"), levels)
}

/// The error of a run on data of one mean and spread, whose denoiser and whose path are known: the state stays as many
/// standard deviations from the mean.
fn error_of_a_run(method: &SolverMethod, n: u32) -> f64 {
    let (solver, levels) = smooth(method.clone(), n + 1);
    let (mean, std) = (0.3, 0.5_f64);
    let spread = |scale: Scale| (scale.alpha.powi(2) * std.powi(2) + scale.sigma.powi(2)).sqrt();
    let exact = |scale: Scale| scale.alpha * mean + 2.0 * spread(scale);
    let mut x = rows(1, &[exact(levels.scale(0))]);
    let mut run = SolverRun::new(&*solver, &levels);
    while let Some(level) = run.level() {
        let NoiseLevel { scale, .. } = level;
        let slope = scale.alpha * std.powi(2) / spread(scale).powi(2);
        let x0 = slope * (&x - scale.alpha * mean) + mean;
        let estimate = Estimate::at_level(&stable_diffusion(), PredictionType::Sample, x0, level);
        x = run.step(x, &estimate.expect("it has a meaning")).expect("it fits");
    }
    (values(&x)[0] - exact(levels.scale(levels.len()))).abs()
}

#[test]
fn errors_fall_with_the_order_of_the_method() {
    let dpm = |solver_order, solver_type| {
        let lower_order_final = false;
        let defaults = DpmSolverConfig::default();
        let config = DpmSolverConfig { solver_order, solver_type, lower_order_final, ..defaults };
        SolverMethod::DpmSolver(config)
    };
    let uni = |solver_order, solver_type| {
        let lower_order_final = false;
        let defaults = UniPcConfig::default();
        SolverMethod::UniPc(UniPcConfig {
            solver_order,
            solver_type,
            lower_order_final,
            ..defaults
        })
    };
    // The corrector adds one to the order. DPM-Solver++ of third order, as it is published, converges with the second.
    let cases = [
        (SolverMethod::Euler, 1.7..2.4),
        (dpm(1, DpmSolverType::Midpoint), 1.7..2.4),
        (dpm(2, DpmSolverType::Midpoint), 3.3..5.0),
        (dpm(2, DpmSolverType::Heun), 3.3..5.0),
        (dpm(3, DpmSolverType::Midpoint), 3.3..5.0),
        (uni(1, UniPcType::Bh2), 3.3..5.0),
        (uni(2, UniPcType::Bh1), 6.0..10.0),
        (uni(2, UniPcType::Bh2), 6.0..10.0),
        (uni(3, UniPcType::Bh2), 10.0..20.0),
    ];
    let mut problems = Vec::new();
    for (method, range) in cases {
        let errors = [40, 80].map(|n| error_of_a_run(&method, n));
        let ratio = errors[0] / errors[1];
        println!("{method:?}: {errors:?}, {ratio}");
        if !range.contains(&ratio) {
            problems.push(format!("{method:?}: {errors:?}, {ratio}"));
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

/// A run in `Float` with memory reused where possible, beside the same sums of plain tensors.
#[test]
fn runs_are_the_sums_of_their_coefficients() {
    let thresholdings = [
        Thresholding::None,
        Thresholding::clamp_pixels(),
        Thresholding::Dynamic { ratio: 0.9, max_value: 2.0 },
    ];
    let schedule = stable_diffusion();
    let levels = trailing(&schedule, 6);
    let outputs: Vec<Tensor> =
        levels.as_slice().iter().map(|_| Tensor::randn([2, 3, 4, 4], kind::FLOAT_CPU)).collect();
    let noise = Tensor::randn([2, 3, 4, 4], kind::FLOAT_CPU);
    let solvers = solvers();
    for (solver, thresholding) in
        solvers.iter().flat_map(|s| thresholdings.clone().map(move |t| (s, t)))
    {
        let (mut run, mut x) = (SolverRun::new(&**solver, &levels), noise.copy());
        let (mut plain, mut predicted) = (noise.to_kind(Kind::Double), Vec::new());
        for (step, output) in outputs.iter().enumerate() {
            let level = run.level().expect("a level for each output");
            let estimate = |output: &Tensor, x: &Tensor| {
                let output = output.shallow_clone();
                Estimate::at_level(&schedule, PredictionType::VPrediction, output, level)
                    .and_then(|raw| raw.thresholded(&thresholding, x))
                    .expect("it has a meaning")
            };
            let x0 = estimate(&output.to_kind(Kind::Double), &plain).x0(&plain).expect("it fits");
            predicted.insert(0, x0);
            let SolverCoefficients { x_t, x0 } = solver.coefficients(&levels, step);
            plain =
                x0.iter().zip(&predicted).fold(x_t * plain, |sum, (weight, x0)| sum + x0 * *weight);

            let before = estimate(output, &x);
            x = run.step(x, &before).expect("it fits");
            assert!(gap(&x, &plain) < 1e-4, "{solver:?} {thresholding:?} {step}");
        }
        assert_eq!(run.level(), None);
    }
}

#[test]
fn a_state_that_is_shared_is_not_changed() {
    let schedule = stable_diffusion();
    let levels = trailing(&schedule, 3);
    let solver = uni(UniPcConfig::default());
    let mut run = SolverRun::new(&solver, &levels);
    let noise = Tensor::ones([2, 3], kind::FLOAT_CPU);
    let (mut x, mut states) = (noise.shallow_clone(), Vec::new());
    while let Some(level) = run.level() {
        states.push((x.shallow_clone(), values(&x)));
        let output = Tensor::ones([2, 3], kind::FLOAT_CPU) * 0.5;
        let estimate = Estimate::at_level(&schedule, PredictionType::Epsilon, output, level);
        x = run.step(x, &estimate.expect("it has a meaning")).expect("it fits");
    }
    assert!(states.iter().all(|(state, expected)| values(state) == *expected));
}

/// A solver that asks for a prediction which no step has made.
#[derive(Debug)]
struct Greedy;

impl Solver for Greedy {
    fn history(&self) -> usize {
        1
    }

    fn coefficients(&self, _: &NoiseLevels, _: usize) -> SolverCoefficients {
        SolverCoefficients { x_t: 0.5, x0: vec![0.5, 0.25] }
    }
}

#[test]
fn what_does_not_fit_a_run_is_refused() {
    let schedule = stable_diffusion();
    let levels = trailing(&schedule, 2);
    let x = || Tensor::ones([2, 3], kind::FLOAT_CPU);
    let at = |t| Estimate::of_output(&schedule, PredictionType::Epsilon, x(), t).expect("a level");
    let refusal = |run: &mut SolverRun<'_>, x, estimate: &Estimate| {
        run.step(x, estimate).expect_err("a misfit").to_string()
    };

    let message = refusal(&mut SolverRun::new(&Greedy, &levels), x(), &at(999));
    assert!(message.contains("0.25 for the prediction of 1 steps ago"), "{message}");
    assert!(message.contains("step 0 has no such prediction"), "{message}");

    let solver = dpm(DpmSolverConfig { lower_order_final: false, ..DpmSolverConfig::default() });
    let mut run = SolverRun::new(&solver, &levels);
    let message = refusal(&mut run, x(), &at(499));
    assert!(
        message.contains("timestep: 499.0") && message.contains("timestep: 999.0"),
        "{message}"
    );
    let wide = Tensor::ones([2, 4], kind::FLOAT_CPU);
    let message = refusal(&mut run, wide, &at(999));
    assert!(message.contains("`x_t` has shape [2, 4]"), "{message}");
    let _ = run.step(x(), &at(999)).expect("it fits");
    let _ = run.step(x(), &at(499)).expect("it fits");
    let message = refusal(&mut run, x(), &at(499));
    assert!(message.contains("one after 2 steps; expected none"), "{message}");

    for order in [0, 4] {
        let config = DpmSolverConfig { solver_order: order, ..DpmSolverConfig::default() };
        let message = DpmSolver::new(config).expect_err("no such order").to_string();
        assert!(message.contains(&format!("`solver_order` is {order}; expected 1, 2 or 3")));
    }
}

#[test]
fn numbers_of_steps_and_levels_that_cannot_be_are_refused() {
    use TimestepSpacing::{Leading, Linspace, Trailing};
    let schedule = stable_diffusion();
    let spaced = |mut config: SolverConfig, spacing, steps| {
        config.levels.timestep_spacing = spacing;
        config.levels(&schedule, steps)
    };
    for config in [SolverConfig::euler(), SolverConfig::dpm_solver(), SolverConfig::uni_pc()] {
        for spacing in [Leading, Linspace, Trailing] {
            for steps in [0, 1001, u32::MAX] {
                let message = spaced(config.clone(), spacing, steps).expect_err("off the grid");
                assert!(message.to_string().contains("num_inference_steps"), "{message}");
            }
            for steps in [1, 2, 999] {
                let levels = spaced(config.clone(), spacing, steps).expect("they fit");
                assert_eq!(levels.len(), steps as usize);
                let falls = (0..levels.len())
                    .all(|i| levels.scale(i).root_snr() < levels.scale(i + 1).root_snr());
                assert!(falls, "{config:?} {spacing:?} {steps}");
            }
        }
        let mut far = config.clone();
        far.levels.steps_offset = 900;
        let message = spaced(far, Leading, 4).expect_err("off the grid").to_string();
        assert!(message.contains("timesteps"), "{message}");
        let [_, _, flow, edm] = families();
        for schedule in [flow, edm] {
            assert_eq!(config.levels(&schedule, 5).expect("they fit").len(), 5);
            let karras = config.clone().with_karras_sigmas().levels(&schedule, 5);
            let message = karras.expect_err("not variance preserving").to_string();
            assert!(message.contains("`use_karras_sigmas` is true; expected false"), "{message}");
        }
    }
}

/// Where the last timestep holds no signal, the weights stay finite, and a denoiser on the grid can be asked.
#[test]
fn a_schedule_without_signal_at_its_end_has_finite_steps() {
    let schedule = vp(BetaSchedule::ScaledLinear, true, FinalAlphaCumprod::One);
    for levels in [
        trailing(&schedule, 5),
        trailing(&families()[2], 5),
        SolverConfig::dpm_solver().levels(&schedule, 5).expect("they fit"),
    ] {
        for solver in solvers() {
            for step in 0..levels.len() {
                let SolverCoefficients { x_t, x0 } = solver.coefficients(&levels, step);
                let all = x0.iter().chain([&x_t]).all(|weight| weight.is_finite());
                assert!(all, "{solver:?} {step} {x_t} {x0:?}");
            }
        }
    }
    let first = trailing(&schedule, 5).as_slice()[0];
    assert!(first.scale.alpha > 0.0);
    assert_eq!(schedule.timestep_of(first).expect("on the grid"), 999);
    let between = NoiseLevel { timestep: 998.5, ..first };
    let message = schedule.timestep_of(between).expect_err("between two").to_string();
    assert!(message.contains("998.5 lies between training timesteps"), "{message}");
    let elsewhere = NoiseLevel { timestep: 500.0, ..first };
    assert!(schedule.timestep_of(elsewhere).is_err());
}
