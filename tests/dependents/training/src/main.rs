//! A custom training loop: a network and an optimizer of tch, states from `ddil-core`, the loss of progressive
//! distillation from `ddil-losses`. No trainer.

use ddil_core::tch::nn::{self, Module, OptimizerConfig};
use ddil_core::tch::{Device, Kind, Tensor, kind, manual_seed};
use ddil_core::{
    Clock, Conditioning, Data, Feedback, FnDenoiser, MixBatch, Mixer, MixerConfig, PriorSchedule,
    Priors, RandomStreams, Report, RolloutNetworks,
};
use ddil_losses::{LossRequest, Networks, ObjectiveConfig, Phase};
use ddil_schedulers::{Ddim, NoiseScheduleConfig, PredictionType, TimestepSpacing, Timesteps};

/// Standard deviation of the data, which have mean 0.
const STD: f64 = 0.5;
const BATCH: i64 = 64;
const UPDATES: u64 = 60;

fn main() -> Result<(), Report> {
    manual_seed(0);
    let schedule = NoiseScheduleConfig::default().build()?;
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;

    // The teacher is a closed form: the mean of the data, given the noisy sample.
    let of_teacher = schedule.clone();
    let teacher = FnDenoiser::new(
        schedule.clone(),
        PredictionType::Sample,
        move |x_t: &Tensor, timesteps: &Tensor, _: &Conditioning| {
            let scales = of_teacher.scales_at(timesteps, x_t)?;
            let variance = scales.alpha.square() * STD.powi(2) + scales.sigma.square();
            Ok(scales.alpha * STD.powi(2) / variance * x_t)
        },
    );

    // The student is a network of tch, which is given the sample and its timestep.
    let variables = nn::VarStore::new(Device::Cpu);
    let root = variables.root();
    let network = nn::seq()
        .add(nn::linear(&root / "in", 3, 64, nn::LinearConfig::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(&root / "out", 64, 2, nn::LinearConfig::default()));
    let student = FnDenoiser::new(
        schedule.clone(),
        PredictionType::Sample,
        |x_t: &Tensor, timesteps: &Tensor, _: &Conditioning| {
            let time = (timesteps.to_kind(Kind::Float) / 1000.0).view([-1, 1]);
            Ok(network.forward(&Tensor::cat(&[x_t, &time], 1)))
        },
    );
    let mut optimizer = nn::AdamW::default().build(&variables, 1e-2)?;

    let priors = PriorSchedule::constant(Priors::new(0.5, 0.25, 0.25)?);
    let config = MixerConfig::default().with(|config| config.priors = priors);
    let mut mixer = Mixer::new(config, grid.clone(), Box::new(Ddim::new(schedule.clone())))?;
    let objective = ObjectiveConfig::default().build(&schedule, &grid)?;

    let mut losses = Vec::new();
    for step in 0..UPDATES {
        let streams = RandomStreams::new(0, step);
        let clock = Clock::new(step, UPDATES, RandomStreams::new(0, step));
        let x0 = STD * Tensor::randn([BATCH, 2], kind::FLOAT_CPU);
        let data = Data::new(x0);
        let rollouts = RolloutNetworks::new(&student, &teacher);
        let states = mixer.next_states(&clock, &MixBatch::new(&data), &rollouts)?;

        let networks = Networks::new(&student, &teacher);
        let request = LossRequest::new(step, Phase::Student, &states, networks, &streams);
        let terms = objective.loss(&request)?;
        let loss = terms.per_sample.mean(Kind::Float);
        optimizer.backward_step(&loss);

        let feedback =
            Feedback::new(&terms.student_x0).with_teacher_next(terms.teacher_next.as_ref());
        mixer.feed_back(&clock, &states, &feedback)?;
        losses.push(loss.double_value(&[]));
    }

    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[losses.len() - 10..]));
    println!("loss: {first:.4} over the first ten updates, {last:.4} over the last ten");
    if last < 0.5 * first { Ok(()) } else { Err("the student has not learned".into()) }
}
