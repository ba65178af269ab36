//! A custom distillation method: the student predicts the end of the teacher's trajectory.
//!
//! That is knowledge distillation ([Luhman and Luhman 2021](https://arxiv.org/abs/2101.02388)), the simplest method
//! there is: the teacher follows its trajectory from a state to a sample, and the student is trained to get there in
//! one step. Here it is an [`Objective`] outside of `ddil-losses`; mixing, sources and optimizer do not depend on it.
//!
//! Run with `cargo run --release --example custom_objective`.

use ddil_core::{GaussianMixture, RandomStreams, Report, Rollout, Source, States};
use ddil_losses::{LossRequest, LossTerms, Networks, Objective, Phase, pseudo_huber};
use ddil_models::{MlpConfig, ModelConfig, NetworkDenoiser, Placement};
use ddil_schedulers::{Ddim, NoiseScheduleConfig, PredictionType, TimestepSpacing, Timesteps};
use tch::{COptimizer, Kind, Tensor, kind};

/// The noisiest timestep, where the student takes its one step.
const NOISIEST: i64 = 999;
const TEACHER_STEPS: u32 = 50;
/// Standard deviation of the data.
const STD: f64 = 0.5;
const BATCH_SIZE: i64 = 256;
const UPDATES: u64 = 100;

/// Distance of the student's prediction to the sample at the end of the teacher's DDIM trajectory.
#[derive(Debug)]
struct KnowledgeDistillation {
    sampler: Ddim,
    teacher_timesteps: Timesteps,
}

impl Objective for KnowledgeDistillation {
    /// There are no critics: the student is trained in every step.
    fn phases(&self, _step: u64) -> &'static [Phase] {
        &[Phase::Student]
    }

    fn loss(&self, request: &LossRequest<'_>) -> ddil_losses::Result<LossTerms> {
        let LossRequest { states, networks, .. } = *request;
        let (x_t, conditioning) = (&states.x_t, &states.conditioning);
        // Without gradients, like every rollout of `ddil-core`.
        let start = x_t.shallow_clone();
        let rollout = Rollout::new(networks.teacher, &self.sampler, &self.teacher_timesteps);
        let target = rollout.conditioning(conditioning).sample(start)?;

        let x0 = networks.student.predict(x_t, &states.timesteps, conditioning)?.x0;
        let per_sample = pseudo_huber(&x0, &target, 0.01)?;
        Ok(LossTerms::new(per_sample, x0.detach(), target))
    }
}

/// States at which every one-step trajectory starts.
fn noise() -> Result<States, Report> {
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 1, 0)?;
    let x_t = Tensor::randn([BATCH_SIZE, 2], kind::FLOAT_CPU);
    Ok(States::new(x_t, &grid, vec![0; BATCH_SIZE as usize], Source::Noise)?)
}

fn main() -> Result<(), Report> {
    tch::set_num_threads(1);
    tch::manual_seed(0);
    let schedule = NoiseScheduleConfig::default().build()?;
    let mean = Tensor::from_slice(&[0.0, 0.0]).view([1, 2]);
    let teacher = GaussianMixture::new(&mean, &[STD], &[1.0])?.on(schedule.clone());
    let model = ModelConfig::Mlp(MlpConfig::default()).build(Placement::default(), 0)?;
    let student = NetworkDenoiser::new(model, PredictionType::Sample, schedule.clone())?;
    let objective = KnowledgeDistillation {
        sampler: Ddim::new(schedule.clone()),
        teacher_timesteps: Timesteps::spaced(TimestepSpacing::Trailing, 1000, TEACHER_STEPS, 0)?,
    };
    let mut optimizer = COptimizer::adamw(2e-3, 0.9, 0.999, 1e-2, 1e-8, false)?;
    for (_name, parameter) in student.parameters().learned() {
        optimizer.add_parameters(&parameter, 0)?;
    }

    let networks = Networks::new(&student, &teacher);
    let streams = RandomStreams::new(0, 0);
    let mut losses = Vec::new();
    for step in 0..UPDATES {
        let states = noise()?;
        let request = LossRequest::new(step, Phase::Student, &states, networks, &streams);
        let terms = objective.loss(&request)?;
        let loss = terms.per_sample.mean(Kind::Float);
        optimizer.zero_grad()?;
        loss.backward();
        optimizer.step()?;
        losses.push(loss.double_value(&[]));
    }

    // Gaussian data have trajectories in closed form: x_t shrinks in proportion to its standard deviation.
    let states = noise()?;
    let request = LossRequest::new(UPDATES, Phase::Student, &states, networks, &streams);
    let terms = objective.loss(&request)?;
    let scale = schedule.scale_at(NOISIEST)?;
    let end = &states.x_t * (STD / (scale.alpha * STD).hypot(scale.sigma));
    let error = |x0: &Tensor| (x0 - &end).square().mean(Kind::Float).sqrt().double_value(&[]);
    let (teacher_error, student_error) = (error(&terms.target), error(&terms.student_x0));
    println!("loss of the first and the last update: {:.4}, {:.4}", losses[0], losses[99]);
    println!("error of the teacher's {TEACHER_STEPS} steps: {teacher_error:.4}, root mean square");
    println!("error of the student's one step: {student_error:.4}, where the data have {STD}");
    assert!(teacher_error < 0.1 * STD && student_error < 0.15 * STD);
    Ok(())
}
