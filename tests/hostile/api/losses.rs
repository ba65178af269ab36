use ddil_core::{
    Conditioning, Data, GaussianMixture, MixtureDenoiser, RandomStreams, Source, States,
};
use ddil_losses::{
    Critic, Dmd2, Dmd2Config, LatentConsistency, LatentConsistencyConfig, LossRequest, Networks,
    Objective, ObjectiveConfig, Phase, Progressive, ProgressiveConfig, TeacherGuidance,
    TimestepWeights, Weighting, convex_weights, discriminator_loss, distribution_matching_gradient,
    generator_loss, halving_stages, progressive_target, pseudo_huber, squared_error,
};
use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Scale, TimestepSpacing, Timesteps};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Device, Kind, Tensor, kind};

use super::cases::{Cases, ODD_NUMBERS, ODD_WHOLES, outcome};

fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the default is valid")
}

fn grid(n: u32) -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, n, 0).expect("it is on the grid")
}

fn network() -> MixtureDenoiser {
    GaussianMixture::ring(4).expect("four modes").on(schedule())
}

fn points() -> Tensor {
    Tensor::ones([2, 2], kind::FLOAT_CPU) * 0.5
}

#[test]
fn ddil_losses() {
    let mut cases = Cases::default();
    formulas(&mut cases);
    weights(&mut cases);
    guidance(&mut cases);
    configs(&mut cases);
    objectives(&mut cases);
    cases.finish("ddil-losses");
}

fn formulas(cases: &mut Cases) {
    let x = points();
    cases.tensors("squared_error", &[&x, &x], |t| outcome(squared_error(&t[0], &t[1])));
    cases.tensors("pseudo_huber", &[&x, &x], |t| outcome(pseudo_huber(&t[0], &t[1], 0.1)));
    cases.numbers("pseudo_huber", |c| outcome(pseudo_huber(&x, &x, c)));
    cases.tensors("distribution_matching_gradient", &[&x, &x, &x], |t| {
        outcome(distribution_matching_gradient(&t[0], &t[1], &t[2]))
    });
    let logits = Tensor::ones([3], kind::FLOAT_CPU);
    cases.tensors("generator_loss", &[&logits], |t| outcome(generator_loss(&t[0])));
    cases.tensors("discriminator_loss", &[&logits, &logits], |t| {
        outcome(discriminator_loss(&t[0], &t[1]))
    });
    let weights = Tensor::ones([2, 2], kind::FLOAT_CPU);
    cases.tensors("progressive_target", &[&x, &x, &weights], |t| {
        let outputs = [t[0].shallow_clone(), t[1].shallow_clone()];
        outcome(progressive_target(&outputs, &t[2]))
    });
    cases.once("progressive_target", "no answers", || outcome(progressive_target(&[], &weights)));
    for timesteps in [&[][..], &[3], &[999, 499], &[499, 999], &[0, -1], &[i64::MAX, 3], &[5, 5]] {
        cases.once("convex_weights", &format!("{timesteps:?}"), || {
            outcome(convex_weights(&schedule(), timesteps))
        });
    }
    for start in [0, 1, 3, 1024, u32::MAX] {
        for end in [0, 1, 3, 1024, u32::MAX] {
            cases.once("halving_stages", &format!("{start} to {end}"), || {
                outcome(halving_stages(start, end))
            });
        }
    }
}

fn weights(cases: &mut Cases) {
    for weighting in
        [Weighting::Constant, Weighting::Snr, Weighting::TruncatedSnr, Weighting::SnrPlusOne]
    {
        cases.numbers("TimestepWeights::new", |cap| {
            outcome(TimestepWeights::new(weighting, Some(cap), &schedule()))
        });
        cases.numbers("Weighting::weight", |number| {
            let _ = weighting.weight(Scale { alpha: number, sigma: number });
            Ok(())
        });
        let weights = TimestepWeights::new(weighting, None, &schedule()).expect("there is no cap");
        cases.integers("TimestepWeights::at", |t| outcome(weights.at(t)));
        for kind in [Kind::Float, Kind::Int64, Kind::Bool, Kind::ComplexFloat, Kind::QInt8] {
            cases.tensors("TimestepWeights::gather", &[&Tensor::from_slice(&[3_i64, 999])], |t| {
                let gathered = weights.gather(&t[0], kind);
                if kind == Kind::QInt8 { outcome(gathered).or(Ok(())) } else { outcome(gathered) }
            });
        }
    }
    cases.cannot_fail(&["Weighting::of"]);
}

fn guidance(cases: &mut Cases) {
    let null = || Conditioning::class_labels(Tensor::from_slice(&[0_i64]));
    for min in ODD_NUMBERS {
        for max in ODD_NUMBERS {
            for guidance in [
                TeacherGuidance::Cfg { scale: min },
                TeacherGuidance::CfgRange { min, max },
                TeacherGuidance::Embedded { min, max },
                TeacherGuidance::BakedIn,
            ] {
                let what = format!("{guidance:?}");
                cases.once("TeacherGuidance::ensure", &what, || outcome(guidance.ensure()));
                cases.once("TeacherGuidance::wrap", &what, || {
                    outcome(guidance.wrap(network(), null()).map(|_| ()))
                });
                for device in [Device::Cpu, Device::Cuda(0)] {
                    cases.once(
                        "TeacherGuidance::condition",
                        &format!("{what} on {device:?}"),
                        || {
                            let mut rng = StdRng::seed_from_u64(0);
                            outcome(guidance.condition(null(), 3, device, &mut rng))
                        },
                    );
                }
            }
        }
    }
}

fn all_configs() -> Vec<ObjectiveConfig> {
    let mut all = Vec::new();
    for number in ODD_NUMBERS {
        all.push(ObjectiveConfig::Lcm(LatentConsistencyConfig::default().with(|config| {
            config.ema_decay = number;
            config.sigma_data = number;
            config.timestep_scaling = number;
        })));
        all.push(ObjectiveConfig::Lcm(
            LatentConsistencyConfig::default().with(|config| config.sigma_data = number),
        ));
        all.push(ObjectiveConfig::Dmd2(Dmd2Config::default().with(|config| {
            config.dm_min_timestep = number;
            config.dm_max_timestep = number;
        })));
        all.push(ObjectiveConfig::Dmd2(Dmd2Config::default().with(|config| {
            config.critic_weight_cap = number;
            config.gan_weight = number;
        })));
        all.push(ObjectiveConfig::Progressive(
            ProgressiveConfig::default().with(|config| config.weight_cap = Some(number)),
        ));
    }
    for whole in ODD_WHOLES {
        let n = whole as u32;
        all.push(ObjectiveConfig::Progressive(
            ProgressiveConfig::default().with(|config| config.substeps = n),
        ));
        all.push(ObjectiveConfig::Lcm(
            LatentConsistencyConfig::default().with(|config| config.num_ddim_timesteps = n),
        ));
        all.push(ObjectiveConfig::Dmd2(
            Dmd2Config::default().with(|config| config.critic_ratio = whole as u64),
        ));
    }
    all
}

fn configs(cases: &mut Cases) {
    let far = Timesteps::explicit(vec![5000, 3], 10_000).expect("it falls");
    for config in all_configs() {
        let what = format!("{config:?}");
        for steps in [0, 1, 4, 1000, u32::MAX] {
            cases.once("ObjectiveConfig::training_grid", &what, || {
                outcome(config.training_grid(&schedule(), steps))
            });
            cases.once("ObjectiveConfig::sampling_grid", &what, || {
                outcome(config.sampling_grid(&schedule(), steps))
            });
        }
        for grid in [&grid(1), &grid(4), &grid(1000), &far] {
            cases.once("ObjectiveConfig::build", &what, || {
                let objective =
                    config.build(&schedule(), grid).map_err(|error| error.to_string())?;
                let _ = (objective.phases(0), objective.phases(u64::MAX), objective.requirements());
                Ok(())
            });
        }
    }
    cases.cannot_fail(&["ObjectiveConfig::trained_to_predict", "ObjectiveConfig::sampler_config"]);
    let schedule = schedule();
    cases.once("Progressive::new", "another grid", || {
        outcome(Progressive::new(ProgressiveConfig::default(), schedule.clone(), far.clone()))
    });
    cases.once("LatentConsistency::new", "another grid", || {
        outcome(LatentConsistency::new(
            LatentConsistencyConfig::default(),
            schedule.clone(),
            far.clone(),
        ))
    });
    cases.once("Dmd2::new", "another grid", || {
        outcome(Dmd2::new(Dmd2Config::default(), schedule.clone(), far.clone()))
    });
}

fn states(x_t: &Tensor, timesteps: &Tensor, labels: &Tensor) -> States {
    let mut states = States::new(points(), &grid(4), vec![0, 2], Source::Student)
        .expect("on the grid")
        .with_conditioning(Conditioning::class_labels(labels.shallow_clone()));
    states.sources[0] = Source::Noise;
    // Tensors of any kind and shape, without a check.
    (states.x_t, states.timesteps) = (x_t.shallow_clone(), timesteps.shallow_clone());
    states
}

fn objectives(cases: &mut Cases) {
    let lcm = ObjectiveConfig::Lcm(LatentConsistencyConfig::default());
    let dmd2 = ObjectiveConfig::Dmd2(Dmd2Config::default().with(|config| config.gan = false));
    for config in [ObjectiveConfig::default(), lcm, dmd2] {
        let grid = config.training_grid(&schedule(), 4).expect("it is on the grid");
        let objective = config.build(&schedule(), &grid).expect("the default is valid");
        let times = Tensor::from_slice(&[grid.as_slice()[0], grid.as_slice()[2]]);
        let labels = Tensor::from_slice(&[0_i64, 1]);
        for phase in [Phase::Student, Phase::Critic] {
            if phase == Phase::Critic && !objective.requirements().critic {
                continue;
            }
            cases.tensors("Objective::loss", &[&points(), &times, &labels], |t| {
                loss_of(objective.as_ref(), phase, &states(&t[0], &t[1], &t[2]))
            });
            let changes: [fn(&mut States); 5] = [
                |states| states.created_at_step = vec![],
                |states| states.sources = vec![],
                |states| states.grid_indices = vec![],
                |states| states.grid_indices = vec![99, usize::MAX],
                |states| states.conditioning = Conditioning::none(),
            ];
            for (i, change) in changes.iter().enumerate() {
                let mut torn = states(&points(), &times, &labels);
                change(&mut torn);
                cases.once("Objective::loss", &format!("torn {i}"), || {
                    loss_of(objective.as_ref(), phase, &torn)
                });
            }
        }
        cases.integers("Objective::phases", |step| {
            let _ = objective.phases(step as u64);
            Ok(())
        });
        bare(cases, objective.as_ref(), &states(&points(), &times, &labels));
    }
    cases.cannot_fail(&["Networks::new", "LossRequest::new", "LossTerms::new"]);
    cases.cannot_fail(&["Networks::with_critic", "Networks::with_target"]);
    cases.cannot_fail(&["Critic::new", "Critic::with_discriminator", "Critic::with_thresholded"]);
    cases.cannot_fail(&["LossRequest::with_real", "LossRequest::with_student_x0"]);
    cases.cannot_fail(&[
        "Dmd2Config::with",
        "LatentConsistencyConfig::with",
        "ProgressiveConfig::with",
    ]);
}

/// Without the networks that a method needs.
fn bare(cases: &mut Cases, objective: &dyn Objective, states: &States) {
    let (student, teacher) = (network(), network());
    let streams = RandomStreams::new(0, 0);
    for phase in [Phase::Student, Phase::Critic] {
        cases.once("Objective::loss", "learner and expert alone", || {
            let networks = Networks::new(&student, &teacher);
            outcome(objective.loss(&LossRequest::new(0, phase, states, networks, &streams)))
        });
    }
}

fn loss_of(objective: &dyn Objective, phase: Phase, states: &States) -> Result<(), String> {
    let (student, teacher, other) = (network(), network(), network());
    let critic = Critic::new(&other);
    let networks = Networks::new(&student, &teacher).with_target(&other).with_critic(critic);
    let (streams, data) = (RandomStreams::new(0, 0), Data::new(points()));
    let request = LossRequest::new(0, phase, states, networks, &streams).with_real(&data);
    outcome(objective.loss(&request))
}
