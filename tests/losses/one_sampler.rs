//! Loss, rollout, sampling and export agree: the same state gives the same `x0`, for each method, with and without
//! thresholding and boundary.

use ddil_core::{Conditioning, Denoiser, RandomStreams, Rollout, Thresholded, with_boundary};
use ddil_losses::{
    Critic, Dmd2Config, LatentConsistencyConfig, LossRequest, Networks, ObjectiveConfig, Phase,
    ProgressiveConfig,
};
use ddil_schedulers::{
    CommonConfig, NoiseSchedule, NoiseScheduleConfig, PredictionType, SamplerConfig,
    SchedulerConfig, Thresholding, Timesteps,
};
use tch::{Tensor, kind};

use crate::toy::{Gaussian, states};

/// The boundary of the default settings is the identity at most timesteps; this one is not.
fn methods() -> [ObjectiveConfig; 4] {
    let strong = LatentConsistencyConfig::default().with(|config| config.timestep_scaling = 2e-3);
    [
        ObjectiveConfig::Progressive(ProgressiveConfig::default()),
        ObjectiveConfig::Lcm(LatentConsistencyConfig::default()),
        ObjectiveConfig::Lcm(strong),
        ObjectiveConfig::Dmd2(Dmd2Config::default().with(|config| config.gan = false)),
    ]
}

fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the defaults are valid")
}

/// The `x0` that a method's loss takes the student to predict.
fn of_loss(method: &ObjectiveConfig, student: &dyn Denoiser, x_t: &Tensor, t: i64) -> Tensor {
    let grid = method.training_grid(&schedule(), 4).expect("4 steps fit");
    let index = grid.as_slice().iter().position(|at| *at == t).expect("it is trained there");
    let objective = method.build(&schedule(), &grid).expect("valid settings");
    let states = states(x_t.shallow_clone(), &grid, &[index; 3]);
    let mut networks = Networks::new(student, student);
    networks.target = Some(student);
    networks.critic = Some(Critic::new(student));
    let streams = RandomStreams::new(0, 0);
    let request = LossRequest::new(0, Phase::Student, &states, networks, &streams);
    objective.loss(&request).expect("everything is there").student_x0
}

/// The `x0` of one call of the network, from a rollout of one step to clean data.
fn of_rollout(sampler: SamplerConfig, denoiser: &dyn Denoiser, x_t: &Tensor, t: i64) -> Tensor {
    let one = Timesteps::explicit(vec![t], 1000).expect("it is on the grid");
    let steps = sampler.build(&schedule()).expect("valid settings");
    let mut generator = ddil_core::Generator::new(tch::Device::Cpu, 0).expect("there is a CPU");
    let rollout = Rollout::new(denoiser, &*steps, &one).generator(&mut generator);
    rollout.sample(x_t.shallow_clone()).expect("it fits")
}

#[track_caller]
fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    let apart = (found - expected).abs().max().double_value(&[]);
    assert!(apart < 1e-6, "{what}: {apart:e}");
}

#[test]
fn the_same_state_has_the_same_x0_in_loss_rollout_samples_and_export() {
    let x_t = Tensor::randn([3, 2, 4], kind::DOUBLE_CPU) * 2.0;
    for method in methods() {
        let sampler = method.sampler_config(&schedule());
        let grid = method.sampling_grid(&schedule(), 4).expect("4 steps fit");
        for thresholding in [Thresholding::None, Thresholding::clamp_pixels()] {
            let network = || Gaussian { schedule: schedule(), mean: 0.7, std: 0.9 };
            let student = || Thresholded::new(network(), thresholding.clone()).expect("valid");
            let exported = exported(&sampler, &grid, &thresholding);
            for &t in grid.as_slice() {
                let what = format!("{} {thresholding:?} at {t}", method.as_str());
                let loss = of_loss(&method, &student(), &x_t, t);
                let denoiser = with_boundary(student(), &sampler);
                let at = Tensor::full([3], t, kind::INT64_CPU);
                let predicted =
                    denoiser.predict(&x_t, &at, &Conditioning::none()).expect("it fits");
                assert_same(&predicted.x0, &loss, &format!("{what}, prediction"));
                let rollout = of_rollout(sampler, &denoiser, &x_t, t);
                assert_same(&rollout, &loss, &format!("{what}, rollout"));

                let held = Thresholded::new(network(), exported.thresholding()).expect("valid");
                let read = exported.sampler_config();
                let denoiser = with_boundary(held, &read);
                assert_same(
                    &of_rollout(read, &denoiser, &x_t, t),
                    &loss,
                    &format!("{what}, export"),
                );
            }
            assert_eq!(exported.timesteps(None).expect("they were written"), grid);
        }
    }
}

/// The settings written to a file and read back.
fn exported(
    sampler: &SamplerConfig,
    grid: &Timesteps,
    thresholding: &Thresholding,
) -> SchedulerConfig {
    let common = CommonConfig::new(schedule().config(), PredictionType::Epsilon, thresholding)
        .expect("diffusers has words for it")
        .with_trained_timesteps(grid);
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let path = folder.path().join("scheduler_config.json");
    sampler.scheduler_config(common).write(&path).expect("the folder is there");
    SchedulerConfig::from_file(&path).expect("it was written a moment ago")
}

/// A student of a method with a strong boundary differs from its bare network, so the test above can fail.
#[test]
fn a_boundary_changes_the_x0_of_a_state() {
    let [_, _, strong, _] = methods();
    let sampler = strong.sampler_config(&schedule());
    let network = || Gaussian { schedule: schedule(), mean: 0.7, std: 0.9 };
    let x_t = Tensor::randn([3, 2, 4], kind::DOUBLE_CPU);
    let denoiser = with_boundary(network(), &sampler);
    let bare = of_rollout(sampler, &network(), &x_t, 259);
    let bounded = of_rollout(sampler, &denoiser, &x_t, 259);
    assert!((bare - bounded).abs().max().double_value(&[]) > 1e-2);
}
