use ddil_schedulers::{
    CommonConfig, ConsistencyBoundary, DataRange, Ddim, DpmSolver, DpmSolverConfig, EdmConfig,
    Estimate, FlowConfig, Lcm, NoiseLevel, NoiseLevels, NoiseSchedule, NoiseScheduleConfig,
    Prediction, PredictionType, PreviousTimestep, Sampler, SamplerConfig, SamplerStep, Scale,
    SchedulerConfig, SchedulerFile, SolverConfig, SolverMethod, SolverRun, Thresholding,
    TimestepSpacing, Timesteps, UniPc, UniPcConfig, VpConfig,
};
use tch::{Tensor, kind};

use super::cases::{Cases, ODD_NUMBERS, ODD_WHOLES, outcome};

fn images() -> Tensor {
    Tensor::ones([2, 3, 4, 4], kind::FLOAT_CPU) * 0.5
}

fn times() -> Tensor {
    Tensor::from_slice(&[749_i64, 249])
}

fn schedules() -> [NoiseSchedule; 3] {
    let build = |config: NoiseScheduleConfig| config.build().expect("defaults are valid");
    [
        build(NoiseScheduleConfig::Vp(VpConfig::default())),
        build(NoiseScheduleConfig::Flow(FlowConfig::default())),
        build(NoiseScheduleConfig::Edm(EdmConfig::default())),
    ]
}

fn grid() -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("it is on the grid")
}

const TYPES: [PredictionType; 4] = [
    PredictionType::Epsilon,
    PredictionType::Sample,
    PredictionType::VPrediction,
    PredictionType::Flow,
];

/// Every kind, with numbers that are possible and such that are not.
fn thresholdings() -> Vec<Thresholding> {
    let mut all = vec![
        Thresholding::None,
        Thresholding::clamp_pixels(),
        Thresholding::Reflect(DataRange::scalar(-1.0, 1.0)),
        Thresholding::Dynamic { ratio: 0.9, max_value: 2.0 },
        Thresholding::Clamp(DataRange::per_channel(vec![-1.0; 3], vec![1.0; 3])),
        Thresholding::Clamp(DataRange::scalar(-1e30, 1e30)),
        Thresholding::Clamp(DataRange::per_channel(vec![-1e30; 3], vec![1e30; 3])),
        Thresholding::Reflect(DataRange::scalar(-1e30, 1e30)),
        Thresholding::Dynamic { ratio: 1.0, max_value: 1e30 },
        Thresholding::Reflect(DataRange::per_channel(vec![-1.0; 2], vec![1.0; 2])),
        Thresholding::Clamp(DataRange::per_channel(vec![], vec![])),
        Thresholding::Clamp(DataRange::per_channel(vec![-1.0; 3], vec![1.0; 2])),
    ];
    for number in ODD_NUMBERS {
        all.push(Thresholding::Clamp(DataRange::scalar(number, -number)));
        all.push(Thresholding::Reflect(DataRange::scalar(-1.0, number)));
        all.push(Thresholding::Dynamic { ratio: number, max_value: 1.0 });
        all.push(Thresholding::Dynamic { ratio: 0.5, max_value: number });
    }
    all
}

#[test]
fn ddil_schedulers() {
    let mut cases = Cases::default();
    schedule(&mut cases);
    predictions(&mut cases);
    thresholding(&mut cases);
    samplers(&mut cases);
    estimates(&mut cases);
    solvers(&mut cases);
    grids(&mut cases);
    configs(&mut cases);
    cases.finish("ddil-schedulers");
}

fn schedule(cases: &mut Cases) {
    let (x, times) = (images(), times());
    for schedule in schedules() {
        cases.integers("NoiseSchedule::scale_at", |t| outcome(schedule.scale_at(t)));
        cases
            .integers("NoiseSchedule::alpha_cumprod_at", |t| outcome(schedule.alpha_cumprod_at(t)));
        cases.tensors("NoiseSchedule::scales_at", &[&times, &x], |t| {
            outcome(schedule.scales_at(&t[0], &t[1]))
        });
        cases.tensors("NoiseSchedule::add_noise", &[&x, &x, &times], |t| {
            outcome(schedule.add_noise(&t[0], &t[1], &t[2]))
        });
        cases.tensors("NoiseSchedule::time_inputs_at", &[&times], |t| {
            outcome(schedule.time_inputs_at(&t[0]))
        });
    }
}

fn predictions(cases: &mut Cases) {
    let (x, times) = (images(), times());
    for schedule in schedules() {
        for output in TYPES {
            cases.tensors("PredictionType::convert", &[&x, &x, &times], |t| {
                outcome(output.convert(&schedule, &t[0], &t[1], &t[2]))
            });
            cases.tensors("PredictionType::target", &[&x, &x, &times], |t| {
                outcome(output.target(&schedule, &t[0], &t[1], &t[2]))
            });
            cases.once("PredictionType::ensure_defined_on", output.as_str(), || {
                outcome(output.ensure_defined_on(&schedule))
            });
        }
        cases.tensors("Prediction::from_x0", &[&x, &x, &times], |t| {
            outcome(Prediction::from_x0(&schedule, t[0].shallow_clone(), &t[1], &t[2]))
        });
        cases.tensors("Prediction::thresholded", &[&x, &x, &x, &times], |t| {
            let pair = Prediction { x0: t[0].shallow_clone(), epsilon: t[1].shallow_clone() };
            outcome(pair.thresholded(&Thresholding::clamp_pixels(), &schedule, &t[2], &t[3]))
        });
    }
    cases.tensors("Prediction::thresholded_keeping_epsilon", &[&x, &x], |t| {
        let pair = Prediction { x0: t[0].shallow_clone(), epsilon: t[1].shallow_clone() };
        outcome(pair.thresholded_keeping_epsilon(&Thresholding::clamp_pixels()))
    });
    let boundary = ConsistencyBoundary::default();
    cases.tensors("ConsistencyBoundary::apply", &[&x, &x, &times], |t| {
        outcome(boundary.apply(&t[0], &t[1], &t[2]))
    });
    cases.numbers("ConsistencyBoundary::apply", |number| {
        let boundary = ConsistencyBoundary { sigma_data: number, timestep_scaling: number };
        outcome(boundary.apply(&x, &x, &times))
    });
    cases.integers("ConsistencyBoundary::scalings", |t| {
        let _ = boundary.scalings(t);
        Ok(())
    });
}

fn thresholding(cases: &mut Cases) {
    let x = images();
    for thresholding in thresholdings() {
        let what = format!("{thresholding:?}");
        cases.once("Thresholding::apply", &what, || outcome(thresholding.apply(&x)));
        cases.once("Thresholding::changed_fraction", &what, || {
            outcome(thresholding.changed_fraction(&x))
        });
    }
    for thresholding in &thresholdings()[..9] {
        cases.tensors("Thresholding::apply", &[&x], |t| outcome(thresholding.apply(&t[0])));
        cases.tensors("Thresholding::changed_fraction", &[&x], |t| {
            outcome(thresholding.changed_fraction(&t[0]))
        });
    }
    let data = Tensor::randn([5, 3, 2], kind::FLOAT_CPU);
    cases.tensors("DataRange::of_samples", &[&data], |t| {
        outcome(DataRange::of_samples(&t[0], 0.1, 0.1))
    });
    cases.numbers("DataRange::of_samples", |q| outcome(DataRange::of_samples(&data, q, 0.0)));
    cases.numbers("DataRange::of_samples", |margin| {
        outcome(DataRange::of_samples(&data, 0.1, margin))
    });
    // Looked at when they are used, as above.
    cases.cannot_fail(&["DataRange::scalar", "DataRange::per_channel"]);
}

fn samplers(cases: &mut Cases) {
    let x = images();
    for schedule in schedules() {
        let eta = Ddim::with_eta(schedule.clone(), 0.5).expect("it is in range");
        let all: [Box<dyn Sampler>; 3] = [
            Box::new(Ddim::new(schedule.clone())),
            Box::new(eta),
            Box::new(Lcm::new(schedule.clone())),
        ];
        for sampler in all {
            cases.tensors("Sampler::step", &[&x, &x, &x], |t| {
                let pair = Prediction { x0: t[0].shallow_clone(), epsilon: t[1].shallow_clone() };
                let step = SamplerStep::new(&pair, &[749, 249], &[499, -1]);
                outcome(sampler.step(&step.with_noise(&t[2])))
            });
            cases.integers("Sampler::step", |at| {
                let pair = Prediction { x0: x.shallow_clone(), epsilon: x.shallow_clone() };
                let (now, prev) = ([at, 3], [2, at]);
                let step = SamplerStep::new(&pair, &now, &prev);
                outcome(sampler.step(&step.with_noise(&x)))
            });
            cases.integers("Sampler::coefficients_at", |at| {
                outcome(sampler.coefficients_at(at, at))
            });
        }
        cases.numbers("Ddim::with_eta", |eta| outcome(Ddim::with_eta(schedule.clone(), eta)));
    }
    // Their arguments are looked at in the step.
    cases.cannot_fail(&["Ddim::new", "Lcm::new", "SamplerStep::new", "SamplerStep::with_noise"]);
}

fn estimates(cases: &mut Cases) {
    let x = images();
    for schedule in schedules() {
        for output in TYPES {
            cases.integers("Estimate::of_output", |at| {
                outcome(Estimate::of_output(&schedule, output, x.shallow_clone(), at))
            });
        }
        cases.tensors("Estimate::of_prediction", &[&x, &x], |t| {
            let pair = Prediction { x0: t[0].shallow_clone(), epsilon: t[1].shallow_clone() };
            outcome(Estimate::of_prediction(&schedule, pair, 749))
        });
    }
    let schedule = schedules()[0].clone();
    for thresholding in thresholdings() {
        let what = format!("{thresholding:?}");
        let raw = |output: &Tensor| {
            let output = output.shallow_clone();
            Estimate::of_output(&schedule, PredictionType::Epsilon, output, 749)
        };
        cases.once("Estimate::thresholded", &what, || {
            outcome(raw(&x).and_then(|raw| raw.thresholded(&thresholding, &x)))
        });
        cases.once("Estimate::thresholded_keeping_epsilon", &what, || {
            outcome(raw(&x).and_then(|raw| raw.thresholded_keeping_epsilon(&thresholding, &x)))
        });
    }
    for thresholding in &thresholdings()[..9] {
        let held = |output: &Tensor| {
            let output = output.shallow_clone();
            Estimate::of_output(&schedule, PredictionType::Epsilon, output, 749)
                .and_then(|raw| raw.thresholded(thresholding, &x))
        };
        let boundary = ConsistencyBoundary::default();
        cases.tensors("Estimate::with_boundary", &[&x, &x], |t| {
            let once = held(&t[0]).and_then(|held| held.with_boundary(boundary, &t[1]));
            outcome(once.and_then(|once| once.with_boundary(boundary, &t[1])))
        });
        cases.tensors("Estimate::combined", &[&x, &x], |t| {
            outcome(held(&t[0]).and_then(|held| held.combined(&t[1], Tensor::shallow_clone)))
        });
        cases.tensors("Estimate::prediction", &[&x, &x], |t| {
            outcome(held(&t[0]).and_then(|held| held.prediction(&t[1])))
        });
        cases.tensors("Estimate::x0", &[&x, &x], |t| {
            outcome(held(&t[0]).and_then(|held| held.x0(&t[1])))
        });
        let samplers: [Box<dyn Sampler>; 2] =
            [Box::new(Ddim::new(schedule.clone())), Box::new(Lcm::new(schedule.clone()))];
        for sampler in samplers {
            cases.tensors("Sampler::step_at", &[&x, &x, &x], |t| {
                let x_t = t[0].shallow_clone();
                outcome(held(&t[1]).and_then(|held| sampler.step_at(x_t, &held, 499, Some(&t[2]))))
            });
            cases.integers("Sampler::step_at", |at| {
                outcome(held(&x).and_then(|held| sampler.step_at(x.copy(), &held, at, Some(&x))))
            });
        }
    }
    // Called with every step above.
    cases.cannot_fail(&["StepCoefficients::without_epsilon", "Sampler::coefficients"]);
}

fn odd_level(number: f64) -> NoiseLevel {
    NoiseLevel { timestep: number, scale: Scale { alpha: number, sigma: -number } }
}

fn solver_configs() -> Vec<SolverConfig> {
    let mut all = vec![SolverConfig::euler(), SolverConfig::dpm_solver(), SolverConfig::uni_pc()];
    for solver_order in [1, 3] {
        let dpm = DpmSolverConfig { solver_order, ..DpmSolverConfig::default() };
        let uni = UniPcConfig { solver_order, ..UniPcConfig::default() };
        let levels = SolverConfig::euler().levels;
        for method in [SolverMethod::DpmSolver(dpm), SolverMethod::UniPc(uni)] {
            all.push(SolverConfig { method, levels: levels.clone() });
        }
    }
    let karras = all.iter().cloned().map(SolverConfig::with_karras_sigmas);
    karras.collect::<Vec<_>>().into_iter().chain(all).collect()
}

fn solvers(cases: &mut Cases) {
    use TimestepSpacing::{Leading, Linspace, Trailing};
    let x = images();
    for schedule in schedules() {
        for mut config in solver_configs() {
            let what = format!("{config:?}");
            cases.once("SolverConfig::build", &what, || outcome(config.build()));
            for (spacing, offset) in [(Leading, u32::MAX), (Linspace, 0), (Trailing, 1)] {
                config.levels.timestep_spacing = spacing;
                config.levels.steps_offset = offset;
                for steps in [0, 1, 2, 999, 1000, 1001, u32::MAX] {
                    cases.once("SolverConfig::levels", &format!("{what} {steps}"), || {
                        outcome(config.levels(&schedule, steps))
                    });
                }
                for number in ODD_NUMBERS {
                    config.levels.lambda_min_clipped = Some(number);
                    cases.once("SolverConfig::levels", &format!("{what} {number}"), || {
                        outcome(config.levels(&schedule, 4))
                    });
                }
                config.levels.lambda_min_clipped = None;
            }
            let solver = config.build().expect("a valid order");
            let levels = NoiseLevels::of_timesteps(&schedule, &grid()).expect("on the grid");
            cases.integers("Solver::coefficients", |step| {
                let found = solver.coefficients(&levels, step as usize);
                let _ = found.weight(step as usize);
                Ok(())
            });
            cases
                .tensors("NoiseLevels::first_state", &[&x], |t| outcome(levels.first_state(&t[0])));
            cases.tensors("SolverRun::step", &[&x, &x], |t| {
                let mut run = SolverRun::new(&*solver, &levels);
                let level = run.level().expect("a first level");
                let output = t[1].shallow_clone();
                let estimate = Estimate::at_level(&schedule, PredictionType::Sample, output, level);
                outcome(estimate.and_then(|estimate| run.step(t[0].shallow_clone(), &estimate)))
            });
        }
        for output in TYPES {
            cases.numbers("Estimate::at_level", |number| {
                outcome(Estimate::at_level(&schedule, output, x.shallow_clone(), odd_level(number)))
            });
        }
        cases.numbers("NoiseSchedule::timestep_of", |number| {
            outcome(schedule.timestep_of(odd_level(number)))
        });
        cases.integers("NoiseSchedule::level_at", |t| outcome(schedule.level_at(t)));
        let far = Timesteps::explicit(vec![5000, 3], 10_000).expect("on a longer grid");
        cases.once("NoiseLevels::of_timesteps", "a longer grid", || {
            outcome(NoiseLevels::of_timesteps(&schedule, &far))
        });
    }
    for order in [0, 4, u32::MAX] {
        let dpm = DpmSolverConfig { solver_order: order, ..DpmSolverConfig::default() };
        let uni = UniPcConfig { solver_order: order, ..UniPcConfig::default() };
        cases.once("DpmSolver::new", &order.to_string(), || outcome(DpmSolver::new(dpm)));
        cases.once("UniPc::new", &order.to_string(), || outcome(UniPc::new(uni)));
    }
    // Asked with every run above, or without anything that can be wrong.
    cases.cannot_fail(&[
        "Estimate::level",
        "NoiseLevel::nearest_timestep",
        "NoiseLevel::whole_timestep",
        "NoiseLevels::scale",
        "Solver::history",
        "SolverConfig::spaced_as",
        "SolverConfig::with_karras_sigmas",
        "SolverCoefficients::weight",
        "SolverRun::level",
        "SolverRun::new",
    ]);
}

fn grids(cases: &mut Cases) {
    use TimestepSpacing::{Leading, Linspace, Trailing};
    let numbers: Vec<u32> = vec![0, 1, 2, 3, 7, 1000, 1 << 20, u32::MAX - 1, u32::MAX];
    let grid = grid();
    for &total in &numbers {
        for &n in &numbers {
            let what = format!("{n} of {total}");
            for spacing in [Leading, Linspace, Trailing] {
                for offset in [0, 1, u32::MAX] {
                    cases.once("Timesteps::spaced", &what, || {
                        outcome(Timesteps::spaced(spacing, total, n, offset))
                    });
                    cases.once("Timesteps::diffusers", &what, || {
                        outcome(Timesteps::diffusers(spacing, total, n, offset))
                    });
                }
            }
            for steps in [0, 1, 50, u32::MAX] {
                cases.once("Timesteps::lcm", &what, || outcome(Timesteps::lcm(total, n, steps)));
            }
            cases.once("Timesteps::refined", &what, || outcome(grid.refined(n, total)));
        }
        for rule in [PreviousTimestep::NextInGrid, PreviousTimestep::Stride] {
            cases.once("Timesteps::with_previous", &total.to_string(), || {
                let _ = grid.clone().with_previous(rule, total);
                Ok(())
            });
        }
        cases.integers("Timesteps::explicit", |t| outcome(Timesteps::explicit(vec![t], total)));
        cases.integers("Timesteps::explicit", |t| {
            outcome(Timesteps::explicit(vec![t, t.saturating_sub(1)], total))
        });
        cases
            .once("Timesteps::explicit", "nothing", || outcome(Timesteps::explicit(vec![], total)));
    }
}

fn configs(cases: &mut Cases) {
    let text = r#"{"_class_name": "DDIMScheduler"}"#;
    let config = SchedulerConfig::from_json(text).expect("it is one");
    for n in [0, 1, 4, 1000, u32::MAX] {
        let what = n.to_string();
        cases.once("SchedulerConfig::timesteps", &what, || outcome(config.timesteps(Some(n))));
        cases.once("SchedulerConfig::compatible_timesteps", &what, || {
            outcome(config.compatible_timesteps(n))
        });
    }
    for text in ["", "{", "[]", "null", "{\"_class_name\": 3}", "\u{feff}{}", &"[".repeat(100_000)]
    {
        let what = &text[..text.len().min(10)];
        cases
            .once("SchedulerConfig::from_json", what, || outcome(SchedulerConfig::from_json(text)));
        cases.once("SchedulerConfig::from_json_any", what, || {
            outcome(SchedulerConfig::from_json_any(text))
        });
        cases.once("SolverConfig::from_json", what, || outcome(SolverConfig::from_json(text)));
        cases.once("SchedulerFile::parse", what, || outcome(SchedulerFile::parse(text)));
        cases.once("SchedulerFile::config", what, || {
            outcome(SchedulerFile::parse(text).and_then(|file| file.config()))
        });
        cases.once("SchedulerFile::solver", what, || {
            outcome(SchedulerFile::parse(text).and_then(|file| file.solver()))
        });
        cases.once("SchedulerConfig::from_json_lenient", what, || {
            outcome(SchedulerConfig::from_json_lenient(text))
        });
    }
    for path in ["", "/", "/dev/null/none", "nul\0byte"] {
        cases.once("SchedulerConfig::write", path, || outcome(config.write(path)));
    }
    for thresholding in thresholdings() {
        for output in TYPES {
            for number in ODD_NUMBERS {
                let schedule = NoiseScheduleConfig::Vp(VpConfig {
                    beta_start: number,
                    beta_end: 0.5,
                    ..VpConfig::default()
                });
                cases.once("CommonConfig::new", &format!("{number}, {thresholding:?}"), || {
                    outcome(CommonConfig::new(&schedule, output, &thresholding))
                });
            }
        }
    }
    for whole in ODD_WHOLES {
        let config = NoiseScheduleConfig::Vp(VpConfig {
            num_train_timesteps: whole as u32,
            ..VpConfig::default()
        });
        let built = config.build();
        assert!(built.is_ok() || !(1..=1_000_000).contains(&(whole as u32)));
    }
    for number in ODD_NUMBERS {
        let ddim = SamplerConfig::Ddim { eta: number };
        let schedule = schedules()[0].clone();
        cases.once("SamplerConfig::build", &number.to_string(), || outcome(ddim.build(&schedule)));
    }
    let ddim = SamplerConfig::Ddim { eta: 0.0 };
    cases.integers("SamplerConfig::timesteps", |n| outcome(ddim.timesteps(n as u32, 4)));
    cases.cannot_fail(&["CommonConfig::with_trained_timesteps", "SamplerConfig::scheduler_config"]);
    cases.corrupted_in_inputs(&[
        "SchedulerConfig::from_file",
        "SchedulerConfig::from_file_any",
        "SchedulerConfig::from_file_lenient",
        "SchedulerFile::from_file",
        "SolverConfig::from_file",
    ]);
}
