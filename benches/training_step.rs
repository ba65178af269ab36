//! One update of progressive distillation, plain and with DDIL: how long, and where the time goes.
//!
//! `cargo bench --workspace --bench training_step`. Not criterion's: an update is taken apart into its parts, and the two
//! ways are alternated, update by update, so that both meet the same machine.

use std::cell::Cell;
use std::error::Error;
use std::time::{Duration, Instant};

use ddil_core::{
    Conditioning, Data, Denoiser, Guided, MixRequest, Mixer, MixerConfig, PriorSchedule, Priors,
    RandomStreams, Stream, Thresholded,
};
use ddil_losses::{LossRequest, Networks, Objective, Phase, Progressive, ProgressiveConfig};
use ddil_models::{DownBlockType, Placement, UNet2DConfig, UpBlockType};
use ddil_schedulers::{
    BetaSchedule, Ddim, NoiseSchedule, NoiseScheduleConfig, Prediction, PredictionType,
    Thresholding, TimestepSpacing, Timesteps, VpConfig,
};
use ddil_trainer::config::Precision;
use ddil_trainer::ema::EmaConfig;
use ddil_trainer::network::Network;
use ddil_trainer::optimizer::AdamWConfig;
use tch::{Device, Kind, Tensor};

const BATCH: i64 = 32;
const WARM_UP: u64 = 3;
const UPDATES: u64 = 12;

/// The parts of an update, in the order in which they are printed.
const PARTS: [&str; 6] = ["teacher", "student", "rollout", "backward", "optimizer", "rest"];

/// A network that keeps count of the time it takes.
struct Timed<'a> {
    inner: &'a dyn Denoiser,
    spent: &'a Cell<Duration>,
}

impl Denoiser for Timed<'_> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let started = Instant::now();
        let prediction = self.inner.predict(x_t, timesteps, conditioning);
        self.spent.set(self.spent.get() + started.elapsed());
        prediction
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}

/// One of the two ways, with everything of its own.
struct Arm {
    name: &'static str,
    student: Network,
    mixer: Mixer,
    optimizer: ddil_trainer::optimizer::AdamW,
    ema: ddil_trainer::ema::Ema,
    updates: Vec<[Duration; PARTS.len()]>,
}

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    ddil_libtorch::keep_freed_pages();
    let schedule = schedule()?;
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
    let objective = Progressive::new(ProgressiveConfig::default(), schedule.clone(), grid.clone())?;
    let teacher = network(&schedule)?;
    teacher.parameters().set_trainable(false);
    let null = Conditioning::class_labels(Tensor::from_slice(&[10_i64]));
    let guided = Guided::new(&teacher, 3.0, null)?;
    let teacher = Thresholded::new(guided, Thresholding::clamp_pixels())?;

    let mut arms = [
        arm("PD", PriorSchedule::constant(Priors::FORWARD_ONLY), &schedule, &grid)?,
        arm("PD + DDIL", PriorSchedule::constant(Priors::new(0.5, 0.25, 0.25)?), &schedule, &grid)?,
    ];
    for step in 0..WARM_UP + UPDATES {
        for arm in &mut arms {
            let parts = update(arm, step, &objective, &teacher)?;
            if step >= WARM_UP {
                arm.updates.push(parts);
            }
        }
    }
    print(&arms)
}

fn schedule() -> Result<NoiseSchedule, Box<dyn Error>> {
    let config = VpConfig {
        beta_schedule: BetaSchedule::Linear,
        beta_start: 1e-4,
        beta_end: 0.02,
        ..VpConfig::default()
    };
    Ok(NoiseScheduleConfig::Vp(config).build()?)
}

/// The UNet of the Fashion-MNIST teacher, with random weights.
fn network(schedule: &NoiseSchedule) -> Result<Network, Box<dyn Error>> {
    use DownBlockType::{AttnDownBlock2D, DownBlock2D};
    use UpBlockType::{AttnUpBlock2D, UpBlock2D};
    let config = UNet2DConfig {
        in_channels: 1,
        out_channels: 1,
        block_out_channels: vec![16, 32, 64, 96],
        layers_per_block: 1,
        norm_num_groups: 8,
        attention_head_dim: Some(32),
        down_block_types: vec![DownBlock2D, DownBlock2D, AttnDownBlock2D, DownBlock2D],
        up_block_types: vec![UpBlock2D, AttnUpBlock2D, UpBlock2D, UpBlock2D],
        num_class_embeds: Some(11),
        ..UNet2DConfig::default()
    };
    let placement = Placement { channels_last: true, ..Placement::default() };
    let unet = config.build(placement, 0)?;
    unet.parameters().set_trainable(true);
    Ok(Network::new(unet, PredictionType::VPrediction, schedule.clone(), Precision::Float32))
}

fn arm(
    name: &'static str,
    priors: PriorSchedule,
    schedule: &NoiseSchedule,
    grid: &Timesteps,
) -> Result<Arm, Box<dyn Error>> {
    let mut config = MixerConfig {
        priors,
        thresholding: Thresholding::clamp_pixels(),
        ..MixerConfig::default()
    };
    config.teacher.pool = 16;
    let mixer = Mixer::new(config, grid.clone(), Box::new(Ddim::new(schedule.clone())))?;
    let student = network(schedule)?;
    let optimizer = AdamWConfig::default().build(student.parameters().learned())?;
    let ema = EmaConfig::default().build(student.parameters().learned())?;
    Ok(Arm { name, student, mixer, optimizer, ema, updates: Vec::new() })
}

/// One update, taken apart.
fn update(
    arm: &mut Arm,
    step: u64,
    objective: &Progressive,
    teacher: &dyn Denoiser,
) -> Result<[Duration; PARTS.len()], Box<dyn Error>> {
    let [of_teacher, of_student, in_rollouts] = [(); 3].map(|()| Cell::new(Duration::ZERO));
    let streams = RandomStreams::new(0, 0);
    let mut generator = streams.generator(step, Stream::Data, Device::Cpu)?;
    let labels = generator.randint(0, 10, [BATCH])?;
    let data = Data {
        x0: generator.normal([BATCH, 1, 32, 32], Kind::Float)?.clamp(-1.0, 1.0),
        conditioning: Conditioning::class_labels(labels),
    };

    let started = Instant::now();
    let states = arm.mixer.next_states(&MixRequest {
        step,
        total_steps: WARM_UP + UPDATES,
        data: &data,
        prompts: &data.conditioning,
        student: &Timed { inner: &arm.student, spent: &in_rollouts },
        teacher: &Timed { inner: teacher, spent: &in_rollouts },
        streams: &streams,
    })?;
    let timed_teacher = Timed { inner: teacher, spent: &of_teacher };
    let timed_student = Timed { inner: &arm.student, spent: &of_student };
    let networks = Networks::new(&timed_student, &timed_teacher);
    let request = LossRequest::new(step, Phase::Student, &states, networks, &streams);
    let terms = objective.loss(&request)?;

    let before = Instant::now();
    arm.optimizer.zero_grad()?;
    terms.per_sample.mean(Kind::Float).f_backward()?;
    let backward = before.elapsed();

    let before = Instant::now();
    let _norm = arm.optimizer.clip()?;
    arm.optimizer.step(2e-4)?;
    arm.ema.update()?;
    let optimizer = before.elapsed();
    arm.mixer.after_loss(
        step,
        &states,
        &terms.student_x0,
        terms.teacher_next.as_ref(),
        &streams,
    )?;

    let total = started.elapsed();
    let parts = [of_teacher.get(), of_student.get(), in_rollouts.get(), backward, optimizer];
    let rest = total.saturating_sub(parts.iter().sum());
    Ok([parts[0], parts[1], parts[2], backward, optimizer, rest])
}

/// Medians in milliseconds, shares, and the most memory the process ever held.
fn print(arms: &[Arm; 2]) -> Result<(), Box<dyn Error>> {
    println!("one update, batch {BATCH}, {} threads, median of {UPDATES}:", tch::get_num_threads());
    println!("{:<12}{:>10}  {}", "", "ms", PARTS.map(|part| format!("{part:>10}")).concat());
    let total = |parts: &[Duration; PARTS.len()]| parts.iter().sum::<Duration>().as_secs_f64();
    for arm in arms {
        let milliseconds = median(arm.updates.iter().map(total).collect()) * 1e3;
        let shares = (0..PARTS.len()).map(|i| {
            let share = arm.updates.iter().map(|u| u[i].as_secs_f64() / total(u)).collect();
            format!("{:>9.1}%", 100.0 * median(share))
        });
        println!("{:<12}{milliseconds:>10.1}  {}", arm.name, shares.collect::<String>());
    }
    let pairs = arms[0].updates.iter().zip(&arms[1].updates);
    let ratio = median(pairs.map(|(base, ddil)| total(ddil) / total(base)).collect());
    println!("PD + DDIL over PD, pair by pair: {ratio:.3}");
    let status = std::fs::read_to_string("/proc/self/status")?;
    if let Some(peak) = status.lines().find_map(|line| line.strip_prefix("VmHWM:")) {
        println!("peak memory of the process, both ways in it: {}", peak.trim());
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
