//! The effect of DDIL, and where it arises: a four-step student of an exact teacher.
//!
//! The data are eight Gaussians on a ring, two neighbours to a class, so the exact denoiser is known in closed form
//! and every error of a student is the student's own. Progressive distillation trains the same small network from the
//! same start on states of different origin:
//!
//! - `forward`: noised data, which is plain progressive distillation;
//! - `mix`: half of the states from the student's own trajectories, which is DDIL;
//! - `student`, `teacher`: all states from the student's or the teacher's trajectories.
//!
//! Everything is run twice. With guidance the states visited in sampling are far from noised data, and a student
//! trained on noised data alone is sampled at states that it was never trained on. Without guidance an exact teacher
//! visits only noised data, so there is nothing to correct: that is the control. The `teacher` arm separates two
//! explanations: if it does as well as `student`, the shift of the guided trajectories matters and not the student's
//! own errors.
//!
//! Prints the progress of training, then energy distances to samples of the same teacher, with the same guidance, in 64
//! steps, over seeds; draws a plot. One thread per seed.
//!
//! Run with `cargo run --release --example toy_mixture -- [picture.png]`. Without an argument the
//! plot is `runs/toy_mixture.png`.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use ddil_core::{
    Clock, Conditioning, Data, Denoiser, GaussianMixture, Guided, MixBatch, Mixer, MixerConfig,
    MixtureDenoiser, PriorSchedule, Priors, RandomStreams, Rollout, RolloutNetworks, ShiftConfig,
    ShiftRequest, Stream, StudentPolicy, measure_shift,
};
use ddil_examples::{Result, Trainer, Training, mean_and_error};
use ddil_losses::{
    LossRequest, Networks, Objective, Phase, Progressive, ProgressiveConfig, TimestepWeights,
    Weighting,
};
use ddil_metrics::energy_distance;
use ddil_models::{MlpConfig, Model, ModelConfig, NetworkDenoiser, Placement, SkipConfig};
use ddil_schedulers::{
    BetaSchedule, Ddim, NoiseSchedule, NoiseScheduleConfig, PredictionType, TimestepSpacing,
    Timesteps, VpConfig,
};
use tch::{Device, Kind, Tensor};

const SEEDS: u64 = 3;
const GUIDANCE_SCALES: [f64; 2] = [3.0, 1.0];
/// Name, and shares of forward, student and teacher states.
const ARMS: [(&str, [f64; 3]); 4] = [
    ("forward", [1.0, 0.0, 0.0]),
    ("mix", [0.5, 0.5, 0.0]),
    ("student", [0.0, 1.0, 0.0]),
    ("teacher", [0.0, 0.0, 1.0]),
];

const STUDENT_STEPS: u32 = 4;
/// Teacher steps per student step.
const SUBSTEPS: u32 = 4;
/// Number of steps of the samples that everything is compared with.
const REFERENCE_STEPS: u32 = 64;

const BATCH_SIZE: i64 = 256;
const START_UPDATES: u64 = 500;
const UPDATES: u64 = 1000;
/// Updates of all seeds and students.
const ALL_UPDATES: u64 =
    SEEDS * (START_UPDATES + (GUIDANCE_SCALES.len() * ARMS.len()) as u64 * UPDATES);
const PEAK_LEARNING_RATE: f64 = 5e-3;
const EMA_DECAY: f64 = 0.995;

/// Samples for computing an energy distance, on each side.
const NUM_SAMPLES: i64 = 3000;
/// Samples for computing the shift, half of them on each side.
const NUM_SHIFT_SAMPLES: i64 = 2048;
/// Samples of each kind that are plotted.
const NUM_POINTS: i64 = 1500;

fn main() -> Result<()> {
    let start = Instant::now();
    let picture = env::args().nth(1).map_or_else(|| "runs/toy_mixture.png".into(), PathBuf::from);
    // Tensors are so small that threads within an operation would mostly wait for each other.
    tch::set_num_threads(1);

    let progress = Progress::new();
    let run = |seed| run_seed(seed, &progress);
    let seeds = thread::scope(|scope| {
        let threads: Vec<_> = (0..SEEDS).map(|seed| scope.spawn(move || run(seed))).collect();
        let results = threads.into_iter().map(|t| t.join().map_err(|_| "a thread panicked")?);
        results.collect::<Result<Vec<[Comparison; 2]>>>()
    })?;

    for (i, guidance_scale) in GUIDANCE_SCALES.into_iter().enumerate() {
        print_comparison(guidance_scale, &seeds.iter().map(|s| &s[i]).collect::<Vec<_>>());
    }
    if let Some(folder) = picture.parent() {
        fs::create_dir_all(folder)?;
    }
    plot::draw(&picture, &seeds)?;
    println!("{}, {:.0} s", picture.display(), start.elapsed().as_secs_f64());
    Ok(())
}

/// Prints the progress of all seeds, one line every few seconds.
struct Progress {
    started: Instant,
    done: AtomicU64,
    printed: Mutex<Instant>,
}

impl Progress {
    const INTERVAL: Duration = Duration::from_secs(3);

    fn new() -> Self {
        let started = Instant::now();
        Self { started, done: AtomicU64::new(0), printed: Mutex::new(started) }
    }

    /// Counts an update of `student`, whose samples have these losses.
    fn count(&self, student: &str, losses: &Tensor) {
        let done = 1 + self.done.fetch_add(1, Ordering::Relaxed);
        // Another thread is printing.
        let Ok(mut printed) = self.printed.try_lock() else { return };
        if printed.elapsed() >= Self::INTERVAL {
            *printed = Instant::now();
            let per_update = self.started.elapsed().as_secs_f64() / done as f64;
            let left = per_update * (ALL_UPDATES - done) as f64;
            let loss = losses.mean(Kind::Float).double_value(&[]);
            eprintln!(
                "update {done} of {ALL_UPDATES}, {left:.0} s left; loss {loss:.4} ({student})"
            );
        }
    }
}

/// One seed at one guidance scale.
struct Comparison {
    /// Some of the teacher's samples, with their classes.
    reference: Points,
    /// Energy distance of the teacher at the student's number of steps, and at the number that the student learns from.
    teachers: [f64; 2],
    arms: [Outcome; ARMS.len()],
}

/// The result of one student.
struct Outcome {
    /// Energy distance to the reference.
    distance: f64,
    /// Energy distance of forward states to visited ones, minus that of two sets of forward states; one number for each
    /// timestep.
    shift: Vec<f64>,
    points: Points,
}

/// Samples and their classes.
type Points = Vec<(f64, f64, usize)>;

fn run_seed(seed: u64, progress: &Progress) -> Result<[Comparison; 2]> {
    let lab = Lab::new(seed, progress)?;
    let start = lab.start()?;
    let [guided, control] = GUIDANCE_SCALES.map(|scale| lab.compare(&start, scale));
    Ok([guided?, control?])
}

/// The parts that all runs of a seed share.
struct Lab<'a> {
    schedule: NoiseSchedule,
    grid: Timesteps,
    exact: MixtureDenoiser,
    streams: RandomStreams,
    progress: &'a Progress,
}

impl<'a> Lab<'a> {
    fn new(seed: u64, progress: &'a Progress) -> Result<Self> {
        let schedule = NoiseScheduleConfig::Vp(VpConfig {
            beta_schedule: BetaSchedule::SquaredcosCapV2,
            ..VpConfig::default()
        });
        let schedule = schedule.build()?;
        let exact = GaussianMixture::ring(8)?.on(schedule.clone());
        let streams = RandomStreams::new(seed, 0);
        Ok(Self { grid: trailing(STUDENT_STEPS)?, schedule, exact, streams, progress })
    }

    /// Random data with random classes.
    fn data(&self, step: u64, stream: Stream, n: i64) -> Result<Data> {
        let mut generator = self.streams.generator(step, stream, Device::Cpu)?;
        let mixture = self.exact.mixture();
        let labels = generator.randint(0, mixture.num_classes(), [n])?;
        let x0 = mixture.sample(n, Some(&labels), &mut generator)?;
        Ok(Data::new(x0).with_conditioning(Conditioning::class_labels(labels)))
    }

    /// A network of about 10 000 parameters.
    fn network(&self) -> Result<Rc<Model>> {
        let config = MlpConfig {
            time_features: 16,
            num_class_embeds: Some(self.exact.mixture().num_classes() as u32),
            class_features: 8,
            skip: Some(SkipConfig {
                // 0.8² / 2 + 0.08² is the variance of the ring in each dimension.
                sigma_data: 0.57,
                schedule: self.schedule.config().clone(),
            }),
            ..MlpConfig::default()
        };
        Ok(Rc::new(ModelConfig::Mlp(config).build(Placement::default(), self.streams.seed)?))
    }

    fn denoiser(&self, model: &Rc<Model>) -> Result<NetworkDenoiser> {
        Ok(NetworkDenoiser::new(Rc::clone(model), PredictionType::Sample, self.schedule.clone())?)
    }

    /// A stand-in for a teacher's weights: a network that denoises, without few-step sampling or
    /// guidance. All arms start from it.
    fn start(&self) -> Result<Rc<Model>> {
        let model = self.network()?;
        let student = self.denoiser(&model)?;
        let weights = TimestepWeights::new(Weighting::SnrPlusOne, None, &self.schedule)?;
        let mut trainer = Trainer::new(model.parameters().learned(), training(START_UPDATES))?;
        for step in 0..START_UPDATES {
            let data = self.data(step, Stream::Data, BATCH_SIZE)?;
            let mut generator = self.streams.generator(step, Stream::Noise, Device::Cpu)?;
            let noise = generator.normal(data.x0.size(), Kind::Float)?;
            let t = generator.randint(0, self.schedule.num_train_timesteps(), [BATCH_SIZE])?;
            let x_t = self.schedule.add_noise(&data.x0, &noise, &t)?;

            let target = self.exact.predict(&x_t, &t, &data.conditioning)?.x0;
            let x0 = student.predict(&x_t, &t, &data.conditioning)?.x0;
            let errors = ddil_losses::squared_error(&x0, &target)?;
            let losses = errors * weights.gather(&t, Kind::Float)?;
            ensure_finite(trainer.update(&losses)?)?;
            self.progress.count(&format!("seed {}, start", self.streams.seed), &losses);
        }
        trainer.finish()?;
        Ok(model)
    }

    /// All arms with one teacher.
    fn compare(&self, start: &Model, guidance_scale: f64) -> Result<Comparison> {
        let null = Tensor::from_slice(&[self.exact.mixture().num_classes()]);
        let null = Conditioning::class_labels(null);
        let teacher = Guided::new(&self.exact, guidance_scale, null)?;
        let reference = self.samples(&teacher, &trailing(REFERENCE_STEPS)?, 0)?;

        let distance_of_teacher = |timesteps: &Timesteps| {
            let samples = self.samples(&teacher, timesteps, 1)?;
            Result::Ok(energy_distance(&samples.x0, &reference.x0)?)
        };
        let fine = self.grid.refined(SUBSTEPS, self.schedule.num_train_timesteps() as u32)?;
        let teachers = [distance_of_teacher(&self.grid)?, distance_of_teacher(&fine)?];
        let arms = ARMS.map(|(name, [forward, student, teacher_share])| {
            let priors = Priors::new(forward, student, teacher_share)?;
            let seed = self.streams.seed;
            let student = format!("seed {seed}, guidance {guidance_scale}, {name} states");
            let model = self.distil(start, &teacher, priors, &student)?;
            self.evaluate(&self.denoiser(&model)?, &reference)
        });
        let [forward, mix, student, teacher] = arms;
        Ok(Comparison {
            reference: points(&reference),
            teachers,
            arms: [forward?, mix?, student?, teacher?],
        })
    }

    /// The training loop: mix states, evaluate the objective, update.
    fn distil(
        &self,
        start: &Model,
        teacher: &dyn Denoiser,
        priors: Priors,
        name: &str,
    ) -> Result<Rc<Model>> {
        let model = self.network()?;
        model.parameters().copy_from(start.parameters())?;
        let student = self.denoiser(&model)?;
        let networks = Networks::new(&student, teacher);
        let config = ProgressiveConfig::default().with(|config| config.substeps = SUBSTEPS);
        let objective = Progressive::new(config, self.schedule.clone(), self.grid.clone())?;
        let mut mixer = self.mixer(priors)?;
        let mut trainer = Trainer::new(model.parameters().learned(), training(UPDATES))?;
        for step in 0..UPDATES {
            let data = self.data(step, Stream::Data, BATCH_SIZE)?;
            let clock = Clock::new(step, UPDATES, self.streams);
            let actors = RolloutNetworks::new(&student, teacher);
            let states = mixer.next_states(&clock, &MixBatch::new(&data), &actors)?;
            let request = LossRequest::new(step, Phase::Student, &states, networks, &self.streams);
            let terms = objective.loss(&request)?;
            ensure_finite(trainer.update(&terms.per_sample)?)?;
            self.progress.count(name, &terms.per_sample);
        }
        trainer.finish()?;
        Ok(model)
    }

    fn mixer(&self, priors: Priors) -> Result<Mixer> {
        let config = MixerConfig::default().with(|config| {
            config.priors = PriorSchedule::constant(priors);
            // Whole trajectories of the current student, of which all states are used.
            config.student.policy = StudentPolicy::FreshAll;
            config.teacher.substeps = SUBSTEPS;
        });
        let sampler = Box::new(Ddim::new(self.schedule.clone()));
        Ok(Mixer::new(config, self.grid.clone(), sampler)?)
    }

    /// Samples for measurements; `draw` selects independent sets.
    fn samples(&self, denoiser: &dyn Denoiser, timesteps: &Timesteps, draw: u64) -> Result<Data> {
        let mut generator = self.streams.generator(draw, Stream::Sample, Device::Cpu)?;
        let labels = generator.randint(0, self.exact.mixture().num_classes(), [NUM_SAMPLES])?;
        let noise = generator.normal([NUM_SAMPLES, 2], Kind::Float)?;
        let (sampler, conditioning) =
            (Ddim::new(self.schedule.clone()), Conditioning::class_labels(labels));
        let rollout = Rollout::new(denoiser, &sampler, timesteps).conditioning(&conditioning);
        let x0 = rollout.sample(noise)?;
        Ok(Data::new(x0).with_conditioning(conditioning))
    }

    fn evaluate(&self, student: &dyn Denoiser, reference: &Data) -> Result<Outcome> {
        let samples = self.samples(student, &self.grid, 1)?;
        let data = self.data(0, Stream::Sample, NUM_SHIFT_SAMPLES)?;
        let sampler = Ddim::new(self.schedule.clone());
        let request = ShiftRequest::new(&data, student, &sampler, &self.grid, self.streams);
        let shift = measure_shift(&request, &ShiftConfig::default())?.timesteps;
        Ok(Outcome {
            distance: energy_distance(&samples.x0, &reference.x0)?,
            shift: shift.iter().map(|at| at.shift.energy - at.null.energy).collect(),
            points: points(&samples),
        })
    }
}

fn training(updates: u64) -> Training {
    Training { updates, learning_rate: PEAK_LEARNING_RATE, ema_decay: EMA_DECAY }
}

fn ensure_finite(is_finite: bool) -> Result<()> {
    if is_finite { Ok(()) } else { Err("a loss or a gradient is not finite".into()) }
}

fn trailing(num_steps: u32) -> Result<Timesteps> {
    Ok(Timesteps::spaced(TimestepSpacing::Trailing, 1000, num_steps, 0)?)
}

fn points(samples: &Data) -> Points {
    let labels = samples.conditioning.get(Conditioning::CLASS_LABELS);
    let class = |i| labels.map_or(0, |labels| labels.int64_value(&[i]) as usize);
    let coordinate = |i, d| samples.x0.double_value(&[i, d]);
    (0..NUM_POINTS).map(|i| (coordinate(i, 0), coordinate(i, 1), class(i))).collect()
}

fn print_comparison(guidance_scale: f64, seeds: &[&Comparison]) {
    println!(
        "guidance {guidance_scale}: energy distance to {REFERENCE_STEPS} steps of the teacher, x 1000"
    );
    let row = |name: &str, distance: &dyn Fn(&Comparison) -> f64| {
        let distances: Vec<f64> = seeds.iter().map(|s| 1e3 * distance(s)).collect();
        let (mean, error) = mean_and_error(&distances);
        print!("  {name:<28} {mean:6.2} ± {error:.2}");
    };
    row("the teacher in 4 steps", &|s| s.teachers[0]);
    println!();
    row("the teacher in 16 steps", &|s| s.teachers[1]);
    println!();
    for (arm, (name, _)) in ARMS.iter().enumerate() {
        row(&format!("student in 4, {name}"), &|s| s.arms[arm].distance);
        let ratios: Vec<f64> =
            seeds.iter().map(|s| s.arms[arm].distance / s.arms[0].distance).collect();
        let (mean, error) = mean_and_error(&ratios);
        let by_seed: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect();
        println!("   / forward: {mean:.2} ± {error:.2} ({})", by_seed.join(" "));
    }
    print_shift(seeds);
}

fn print_shift(seeds: &[&Comparison]) {
    println!("  shift of the visited states from noised data at t = 999, 749, 499, 249, x 1000");
    for (arm, (name, _)) in ARMS.iter().enumerate() {
        let at = |i: usize| {
            let shifts: Vec<f64> = seeds.iter().map(|s| 1e3 * s.arms[arm].shift[i]).collect();
            let (mean, error) = mean_and_error(&shifts);
            format!("{mean:7.1} ± {error:.1}")
        };
        let row: Vec<String> = (0..STUDENT_STEPS as usize).map(at).collect();
        println!("  {:<28} {}", format!("student in 4, {name}"), row.join("  "));
    }
    println!();
}

/// The plot.
mod plot {
    use std::path::Path;

    use plotters::coord::Shift;
    use plotters::coord::ranged1d::SegmentedCoord;
    use plotters::coord::types::{RangedCoordf64, RangedCoordusize};
    use plotters::prelude::*;
    use plotters::style::register_font;
    use plotters::style::text_anchor::{HPos, Pos, VPos};

    use super::{
        ARMS, Comparison, GUIDANCE_SCALES, Points, REFERENCE_STEPS, Result, mean_and_error,
    };

    type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
    type Bars<'a> = ChartContext<
        'a,
        BitMapBackend<'a>,
        Cartesian2d<SegmentedCoord<RangedCoordusize>, RangedCoordf64>,
    >;

    const SIZE: (u32, u32) = (1500, 1080);
    /// Colours of Okabe and Ito, which most eyes can tell apart.
    const CLASS_COLORS: [RGBColor; 4] = [
        RGBColor(0, 114, 178),
        RGBColor(230, 159, 0),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
    ];
    const BAR_COLORS: [RGBColor; 5] = [
        RGBColor(150, 150, 150),
        RGBColor(213, 94, 0),
        RGBColor(0, 114, 178),
        RGBColor(86, 180, 233),
        RGBColor(0, 158, 115),
    ];

    pub(super) fn draw(path: &Path, seeds: &[[Comparison; 2]]) -> Result<()> {
        register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
            .map_err(|_| "the font cannot be read")?;
        let root = BitMapBackend::new(path, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (top, bottom) = root.split_vertically(560);

        let guided = &seeds[0][0];
        let panels = [
            (format!("teacher, {REFERENCE_STEPS} steps"), &guided.reference),
            ("student, 4 steps, forward".to_owned(), &guided.arms[0].points),
            ("student, 4 steps, mix".to_owned(), &guided.arms[1].points),
        ];
        for (area, (caption, points)) in top.split_evenly((1, 3)).iter().zip(panels) {
            let caption = format!("{caption}, guidance {}", GUIDANCE_SCALES[0]);
            scatter(area, &caption, points)?;
        }
        for (area, setting) in bottom.split_evenly((1, 2)).iter().zip(0..) {
            let comparisons: Vec<&Comparison> = seeds.iter().map(|s| &s[setting]).collect();
            bars(area, GUIDANCE_SCALES[setting], &comparisons)?;
        }
        root.present()?;
        Ok(())
    }

    fn scatter(area: &Area<'_>, caption: &str, points: &Points) -> Result<()> {
        let mut chart = ChartBuilder::on(area)
            .caption(caption, ("sans-serif", 23))
            .margin(12)
            .x_label_area_size(34)
            .y_label_area_size(48)
            .build_cartesian_2d(-1.4..1.4, -1.4..1.4)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_labels(5)
            .y_labels(5)
            .label_style(("sans-serif", 17))
            .draw()?;
        for (class, color) in CLASS_COLORS.into_iter().enumerate() {
            let of_class = points.iter().filter(|point| point.2 == class);
            chart
                .draw_series(
                    of_class.map(|&(x, y, _)| Circle::new((x, y), 2, color.mix(0.6).filled())),
                )?
                .label(format!("class {class}"))
                .legend(move |(x, y)| Circle::new((x + 8, y), 5, color.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::MiddleMiddle)
            .label_font(("sans-serif", 17))
            .border_style(TRANSPARENT)
            .draw()?;
        Ok(())
    }

    fn bars(area: &Area<'_>, guidance_scale: f64, seeds: &[&Comparison]) -> Result<()> {
        let over_seeds = |outcome: &dyn Fn(&Comparison) -> f64| {
            mean_and_error(&seeds.iter().map(|s| 1e3 * outcome(s)).collect::<Vec<_>>())
        };
        let mut rows = vec![over_seeds(&|s| s.teachers[1])];
        rows.extend((0..ARMS.len()).map(|arm| over_seeds(&|s| s.arms[arm].distance)));
        // A margin of a fifth for the numbers.
        let top = rows.iter().map(|(mean, error)| mean + error).fold(0.0, f64::max) * 1.2;

        let caption = format!(
            "guidance {guidance_scale}: distance to {REFERENCE_STEPS} steps of the teacher"
        );
        let mut chart = ChartBuilder::on(area)
            .caption(caption, ("sans-serif", 25))
            .margin(12)
            .x_label_area_size(38)
            .y_label_area_size(80)
            .build_cartesian_2d((0..rows.len() - 1).into_segmented(), 0.0..top)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .y_desc("energy distance × 1000, ± s.e.")
            .x_label_formatter(&|segment| match segment {
                SegmentValue::CenterOf(0) => "teacher, 16 steps".to_owned(),
                SegmentValue::CenterOf(i) => ARMS.get(i - 1).map_or("", |arm| arm.0).to_owned(),
                _ => String::new(),
            })
            .label_style(("sans-serif", 18))
            .draw()?;
        let forward = rows[1].0;
        for (i, (&(mean, error), color)) in rows.iter().zip(BAR_COLORS).enumerate() {
            let text = match i {
                0 | 1 => format!("{mean:.2}"),
                _ => format!("{mean:.2} (× {:.2})", mean / forward),
            };
            bar(&mut chart, i, (mean, error), color, text)?;
        }
        Ok(())
    }

    /// A bar with an error bar and a text above it.
    fn bar(
        chart: &mut Bars<'_>,
        i: usize,
        (mean, error): (f64, f64),
        color: RGBColor,
        text: String,
    ) -> Result<()> {
        let at = |y| (SegmentValue::CenterOf(i), y);
        let corners = [(SegmentValue::Exact(i), 0.0), (SegmentValue::Exact(i + 1), mean)];
        let mut bar = Rectangle::new(corners, color.filled());
        bar.set_margin(0, 0, 24, 24);
        chart.draw_series([bar])?;

        let line = BLACK.stroke_width(2);
        let (low, high) = (mean - error, mean + error);
        chart.draw_series([PathElement::new(vec![at(low), at(high)], line)])?;
        for end in [low, high] {
            let cap = PathElement::new(vec![(-8, 0), (8, 0)], line);
            chart.draw_series([EmptyElement::at(at(end)) + cap])?;
        }
        let centered = Pos::new(HPos::Center, VPos::Bottom);
        let style = ("sans-serif", 18).into_font().color(&BLACK).pos(centered);
        chart.draw_series([EmptyElement::at(at(high)) + Text::new(text, (0, -8), style)])?;
        Ok(())
    }
}
