//! Improved distribution matching distillation: the law of the student's samples against the teacher's.

use ddil_core::{Conditioning, Data, Denoiser, Discriminator, Generator, Source, States, Stream};
use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::{ensure_real, ensure_same_shape};
use ddil_schedulers::{NoiseSchedule, TimestepSpacing, Timesteps};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distance::{difference, mean_over_sample, squared_error};
use crate::error::{Error, Result};
use crate::grid_rows::{GridRows, per_sample};
use crate::objective::{
    Critic, LossRequest, LossTerms, Objective, Requirements, ensure_one_schedule,
};
use crate::phase::Phase;
use crate::weighting::{TimestepWeights, Weighting};

const METHOD: &str = "DMD2";
const OP: &str = "Dmd2::loss";

/// Keeps the normaliser off zero.
const MIN_SCALE: f64 = 1e-6;

/// The gradient of distribution matching with respect to the student's samples.
///
/// `(x0_fake - x0_real) / (mean |x0_student - x0_real| + 1e-6)`, the mean over each sample. At a noised sample of the
/// student, `x0_fake` is what a network trained on the student's samples sees behind it and `x0_real` what the teacher
/// sees: their difference is that of the two scores, the gradient of the Kullback-Leibler divergence between the two
/// noised laws up to a positive factor. The divisor makes it of order 1 at every noise level. Section 3.2 of
/// [Yin et al. 2023](https://arxiv.org/abs/2311.18828), kept by [DMD2](https://arxiv.org/abs/2405.14867); the 1e-6 is
/// for a student that already says what the teacher says.
///
/// # Shapes and units
///
/// - all three: `[batch, ..]`, any rank from 2, data scale
/// - returns: the same shape, `Float` or `Double`, without a graph; what is not finite stays so
///
/// # Errors
///
/// [`Error::Scheduler`] if the shapes differ, [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if there is nothing after the batch.
///
/// # Example
///
/// ```
/// use tch::Tensor;
///
/// # fn main() -> ddil_losses::Result<()> {
/// let student = Tensor::from_slice2(&[[1.0, 2.0]]);
/// let fake = Tensor::from_slice2(&[[1.1, 1.9]]);
/// let real = Tensor::from_slice2(&[[0.8, 1.6]]);
/// // Means of 0.2 and 0.4 are 0.3, as both differences are.
/// let gradient = ddil_losses::distribution_matching_gradient(&student, &fake, &real)?;
/// assert!((gradient - 1.0).abs().max().double_value(&[]) < 1e-5);
/// # Ok(())
/// # }
/// ```
pub fn distribution_matching_gradient(
    x0_student: &Tensor,
    x0_fake: &Tensor,
    x0_real: &Tensor,
) -> Result<Tensor> {
    const OP: &str = "distribution_matching_gradient";
    let _no_grad = tch::no_grad_guard();
    ensure_same_shape(OP, ("x0_fake", x0_fake), ("x0_real", x0_real))?;
    let distance = difference(OP, x0_student, x0_real)?.abs();
    let scale = mean_over_sample(&distance) + MIN_SCALE;
    let direction = difference(OP, x0_fake, x0_real)?;
    Ok(&direction / per_sample(&scale, &direction))
}

/// The student's adversarial loss: `softplus(-logit)`, high for samples that are taken for made.
///
/// The non-saturating loss of [Goodfellow et al. 2014](https://arxiv.org/abs/1406.2661), section 3: the negative log
/// of the probability that the sample is real.
///
/// # Shapes and units
///
/// - `logits`: any shape, positive for real, as [`Discriminator::logits`]; returns the same shape
///
/// # Errors
///
/// [`Error::Scheduler`] for logits that are no real numbers.
pub fn generator_loss(logits: &Tensor) -> Result<Tensor> {
    ensure_real("generator_loss", "logits", logits)?;
    Ok((-logits).softplus())
}

/// The discriminator's loss: `softplus(-logit)` of each real and `softplus(logit)` of each made sample.
///
/// The two halves of the binary cross entropy; section 4.3 of [Yin et al. 2024](https://arxiv.org/abs/2405.14867).
///
/// # Shapes and units
///
/// - `real_logits`, `fake_logits`: any shapes, positive for real; returns one of each, in this order
///
/// # Errors
///
/// [`Error::Scheduler`] for logits that are no real numbers.
pub fn discriminator_loss(real_logits: &Tensor, fake_logits: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "discriminator_loss";
    ensure_real(OP, "real_logits", real_logits)?;
    ensure_real(OP, "fake_logits", fake_logits)?;
    Ok(((-real_logits).softplus(), fake_logits.softplus()))
}

/// The settings of [`Dmd2`]; the defaults are those published for SDXL in four steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dmd2Config {
    /// The critic is trained in each step, the student in every so many-th; default 5. Two time scales: the critic
    /// has to keep up with the student.
    pub critic_ratio: u64,
    /// Factor of the distribution matching loss; default 1.
    pub dm_weight: f64,
    /// The least noisy timestep at which student and teacher are compared, as a share of all; default 0.02.
    pub dm_min_timestep: f64,
    /// The noisiest one; default 0.98.
    pub dm_max_timestep: f64,
    /// How much the critic's error in the clean data counts at each noise level; left out, the default, it is
    /// [`Weighting::of`] what the network puts out, as far as that is known
    /// ([`ObjectiveConfig::trained_to_predict`](crate::ObjectiveConfig::trained_to_predict)), and else `snr`, that of
    /// `epsilon`. Another weight than the network was trained with leaves the critic behind where it counts little.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic_weighting: Option<Weighting>,
    /// No such weight is above this; default 10 000. Reached on no usual variance-preserving schedule before timestep
    /// 0; flow matching and EDM go on to less noise than single precision can tell from none.
    pub critic_weight_cap: f64,
    /// Whether the critic is told where a sample's state came from, so that it follows the law of what the student makes
    /// of each source by itself; default false, one law for all. Told nothing, the student is compared with the teacher
    /// over all sources together: what it makes of dataset samples can make up for what it does not make of its own.
    /// The critic has to take a guidance weight, in whose place it is told the source.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub critic_sees_source: bool,
    /// Whether a discriminator is trained beside the critic, on dataset samples; default true.
    pub gan: bool,
    /// Factor of the student's adversarial loss; default 0.005.
    pub gan_weight: f64,
    /// Factor of the discriminator's loss beside the critic's; default 0.01.
    pub critic_gan_weight: f64,
}

impl Default for Dmd2Config {
    fn default() -> Self {
        Self {
            critic_ratio: 5,
            dm_weight: 1.0,
            dm_min_timestep: 0.02,
            dm_max_timestep: 0.98,
            critic_weighting: None,
            critic_weight_cap: 1e4,
            critic_sees_source: false,
            gan: true,
            gan_weight: 5e-3,
            critic_gan_weight: 1e-2,
        }
    }
}

impl Dmd2Config {
    /// The timesteps of a student of `steps` steps.
    pub(crate) fn grid(schedule: &NoiseSchedule, steps: u32) -> Result<Timesteps> {
        let total = schedule.num_train_timesteps() as u32;
        if steps == 0 || !total.is_multiple_of(steps) {
            return Err(Error::Invalid(Invalid::new(
                "steps",
                steps,
                format!("a divisor of the {total} training timesteps"),
            )));
        }
        Ok(Timesteps::spaced(TimestepSpacing::Trailing, total, steps, 0)?)
    }

    fn ensure(&self) -> Result<()> {
        let refuse = |field, value: String, expected: &str| {
            Err(Error::Invalid(Invalid::new(field, value, expected)))
        };
        if self.critic_ratio == 0 {
            return refuse("critic_ratio", "0".to_owned(), "at least 1");
        }
        for (field, weight) in [
            ("dm_weight", self.dm_weight),
            ("gan_weight", self.gan_weight),
            ("critic_gan_weight", self.critic_gan_weight),
        ] {
            if !(weight >= 0.0 && weight.is_finite()) {
                return refuse(field, weight.to_string(), "at least 0 and finite");
            }
        }
        let (min, max) = (self.dm_min_timestep, self.dm_max_timestep);
        if !(0.0 <= min && min <= max && max <= 1.0) {
            let fields = "dm_min_timestep, dm_max_timestep";
            return refuse(fields, format!("{min}, {max}"), "in order and in 0..=1");
        }
        let cap = self.critic_weight_cap;
        if !(cap > 0.0 && cap.is_finite()) {
            return refuse("critic_weight_cap", cap.to_string(), "positive and finite");
        }
        Ok(())
    }
}

/// Improved distribution matching distillation (DMD2) of [Yin et al. 2024](https://arxiv.org/abs/2405.14867): what the
/// student makes of its states shall have the law of what the teacher makes.
///
/// States are not labelled. From each the student predicts clean data `x0`, and these are compared with the teacher's
/// law by way of a critic, a denoiser that is trained on the student's samples all along. Timesteps and noise below
/// are fresh for each term, from the streams of the request.
///
/// | phase | loss | noised to |
/// |---|---|---|
/// | student | half the squared distance of `x0` and `x0 - gradient`, times `dm_weight`: its gradient is [`distribution_matching_gradient`] | 2 % to 98 % of the timesteps |
/// | | plus [`generator_loss`] of the noised `x0`, times `gan_weight` | any timestep |
/// | critic | squared error of what the critic sees behind the noised `x0`, weighted as `critic_weighting` says | any timestep |
/// | | plus [`discriminator_loss`] of noised `x0` and of noised dataset samples, times `critic_gan_weight` | any timestep, each its own |
///
/// In every `critic_ratio`-th step the student is trained, then the critic in any case, on the same samples where the
/// request has them ([`LossRequest::student_x0`]); otherwise the student is asked, without gradients.
///
/// The critic follows whatever mixture of states the student is trained on, so that published recipes differ in
/// nothing but where states come from: the student's own trajectories alone, noised dataset samples alone, or a
/// mixture of both.
///
/// # Who gets a gradient
///
/// In the student's phase the student alone, through its own prediction: teacher and critic are asked without
/// gradients. The adversarial part reaches `x0` *through* the discriminator, which therefore must be asked with
/// gradients on; keeping its parameters (and those of the critic whose features it reads) out of it is for the caller
/// to do, by freezing them for the phase. In the critic's phase critic and discriminator get one, the student none.
///
/// # Which network is asked
///
/// [`Critic::asked`] stands in the gradient, held inside the data's range as the teacher is; [`Critic::fake_score`] is
/// trained bare, as what it is to follow is what the student says, wherever that lies. Guidance is the teacher's alone.
///
/// # Figures
///
/// [`LossTerms::parts`], without their factors: `distribution_matching` (mean absolute gradient) and `gan_student` in
/// the student's phase, `fake_score`, `gan_fake` and `gan_real` in the critic's.
///
/// # Example
///
/// ```
/// use ddil_losses::{Dmd2Config, ObjectiveConfig, Phase};
/// use ddil_schedulers::NoiseScheduleConfig;
///
/// # fn main() -> ddil_losses::Result<()> {
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let method = ObjectiveConfig::Dmd2(Dmd2Config { critic_ratio: 2, ..Dmd2Config::default() });
/// let grid = method.training_grid(&schedule, 4)?;
/// assert_eq!(grid.as_slice(), [999, 749, 499, 249]);
/// let objective = method.build(&schedule, &grid)?;
/// assert_eq!(objective.phases(0), [Phase::Student, Phase::Critic]);
/// assert_eq!(objective.phases(1), [Phase::Critic]);
/// assert!(objective.requirements().discriminator);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Dmd2 {
    config: Dmd2Config,
    schedule: NoiseSchedule,
    entries: GridRows,
    critic_weights: TimestepWeights,
}

impl Dmd2 {
    /// The method for a student that visits `grid`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] that names the setting; [`Error::Scheduler`] if the grid leaves the schedule.
    pub fn new(config: Dmd2Config, schedule: NoiseSchedule, grid: Timesteps) -> Result<Self> {
        config.ensure()?;
        for &t in grid.as_slice() {
            schedule.scale_at(t)?;
        }
        let critic_weights = TimestepWeights::new(
            config.critic_weighting.unwrap_or(Weighting::Snr),
            Some(config.critic_weight_cap),
            &schedule,
        )?;
        let entries = GridRows::new(grid, schedule.num_train_timesteps());
        Ok(Self { config, schedule, entries, critic_weights })
    }

    /// The settings.
    pub fn config(&self) -> &Dmd2Config {
        &self.config
    }

    /// The timesteps of the student.
    pub fn grid(&self) -> &Timesteps {
        self.entries.grid()
    }

    /// The timesteps at which student and teacher are compared, both ends included.
    pub fn matching_timesteps(&self) -> (i64, i64) {
        let total = self.schedule.num_train_timesteps();
        let at = |share: f64| ((share * total as f64).round() as i64).min(total - 1);
        (at(self.config.dm_min_timestep), at(self.config.dm_max_timestep))
    }

    /// Clean data noised to timesteps drawn evenly from `low..=high`.
    fn noised(
        &self,
        x0: &Tensor,
        (low, high): (i64, i64),
        generator: &mut Generator,
    ) -> Result<Noised> {
        let timesteps = generator.randint(low, high + 1, &x0.size()[..1]);
        let timesteps = timesteps.map_err(ddil_core::Error::from)?;
        let noise = generator.normal(x0.size(), x0.kind()).map_err(ddil_core::Error::from)?;
        Ok(Noised { x_t: self.schedule.add_noise(x0, &noise, &timesteps)?, timesteps })
    }

    /// The same at any timestep.
    fn noised_anywhere(&self, x0: &Tensor, generator: &mut Generator) -> Result<Noised> {
        self.noised(x0, (0, self.schedule.last_timestep()), generator)
    }

    /// How real `x0` looks once it is noised to any timestep, `[batch]`.
    fn judged(
        &self,
        x0: &Tensor,
        conditioning: &Conditioning,
        discriminator: &dyn Discriminator,
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let Noised { x_t, timesteps } = self.noised_anywhere(x0, generator)?;
        let logits = discriminator.logits(&x_t, &timesteps, conditioning)?;
        if logits.size() == timesteps.size() {
            return Ok(logits);
        }
        let expected = format!("{:?}, one a sample", timesteps.size());
        Err(Error::Argument(ArgumentError::Shape {
            op: OP,
            name: "logits",
            shape: logits.size(),
            expected,
        }))
    }

    /// What the critic is told of samples, which came from `states` or stand beside some that did.
    fn told_critic(&self, conditioning: &Conditioning, states: &States) -> Conditioning {
        let told = conditioning.shallow_clone();
        if !self.config.critic_sees_source {
            return told;
        }
        let number = |source: &Source| match source {
            // The start of a trajectory is a part of it.
            Source::Student | Source::Noise => 0.0_f32,
            Source::Forward => 1.0,
            Source::Teacher => 2.0,
            Source::Mixed => 3.0,
            // All added sources together are one.
            Source::Added(_) => 4.0,
        };
        let numbers: Vec<f32> = states.sources.iter().map(number).collect();
        let device = states.x_t.device();
        // Queued: a plain copy would wait for all that the device has to do.
        let numbers = Tensor::from_slice(&numbers).to_device_(device, Kind::Float, true, false);
        told.with_guidance_weight(numbers)
    }

    /// Whom the phase needs, or what is missing.
    fn judges<'a>(&self, request: &LossRequest<'a>) -> Result<Judges<'a>> {
        let missing = |what| Error::Missing { method: METHOD, what };
        let critic = request.networks.critic.ok_or_else(|| missing("a critic"))?;
        if !self.config.gan {
            return Ok(Judges { critic, discriminator: None, real: None });
        }
        let what = "a discriminator, as `gan` is on";
        let discriminator = Some(critic.discriminator.ok_or_else(|| missing(what))?);
        let what = "dataset samples to show to its discriminator, as `gan` is on";
        let real = match request.phase {
            Phase::Student => None,
            Phase::Critic => Some(request.real.ok_or_else(|| missing(what))?),
        };
        Ok(Judges { critic, discriminator, real })
    }

    fn student_terms(&self, request: &LossRequest<'_>, judges: Judges<'_>) -> Result<LossTerms> {
        let LossRequest { step, states, networks, streams, .. } = *request;
        let told = &states.conditioning;
        let asked = [
            ("student", networks.student),
            ("teacher", networks.teacher),
            ("critic", judges.critic.asked),
        ];
        ensure_one_schedule(&self.schedule, asked)?;
        let x0 = networks.student.predict(&states.x_t, &states.timesteps, told)?.x0;
        let mut generator = streams.generator(step, Stream::StudentLoss, x0.device())?;
        let told_critic = &self.told_critic(told, states);
        let gradient =
            self.gradient(&x0, request, (judges.critic.asked, told_critic), &mut generator)?;
        // The loss is half a squared distance, whose gradient is the way to the target.
        let target = x0.detach() - &gradient;
        let mut per_sample = squared_error(&x0, &target)? * (0.5 * self.config.dm_weight);
        let mut parts = vec![("distribution_matching", mean_over_sample(&gradient.abs()))];
        if let Some(discriminator) = judges.discriminator {
            let logits = self.judged(&x0, told_critic, discriminator, &mut generator)?;
            let adversarial = generator_loss(&logits)?.to_kind(per_sample.kind());
            parts.push(("gan_student", adversarial.detach()));
            per_sample += adversarial * self.config.gan_weight;
        }
        Ok(LossTerms { per_sample, student_x0: x0.detach(), teacher_next: None, target, parts })
    }

    /// The gradient of distribution matching at `x0`, noised anew.
    fn gradient(
        &self,
        x0: &Tensor,
        request: &LossRequest<'_>,
        (critic, told_critic): (&dyn Denoiser, &Conditioning),
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (teacher, told) = (request.networks.teacher, &request.states.conditioning);
        let Noised { x_t, timesteps } = self.noised(x0, self.matching_timesteps(), generator)?;
        let fake = critic.predict(&x_t, &timesteps, told_critic)?.x0;
        let real = teacher.predict(&x_t, &timesteps, told)?.x0;
        distribution_matching_gradient(x0, &fake, &real)
    }

    fn critic_terms(&self, request: &LossRequest<'_>, judges: Judges<'_>) -> Result<LossTerms> {
        let LossRequest { step, states, streams, .. } = *request;
        let told = &self.told_critic(&states.conditioning, states);
        ensure_one_schedule(&self.schedule, [("critic", judges.critic.fake_score)])?;
        if let Some(Data { x0: real, .. }) = judges.real {
            ensure_same_shape(OP, ("real", real), ("x_t", &states.x_t))?;
        }
        let x0 = self.student_x0(request)?;
        let mut generator = streams.generator(step, Stream::CriticLoss, x0.device())?;
        let Noised { x_t, timesteps } = self.noised_anywhere(&x0, &mut generator)?;
        let guess = judges.critic.fake_score.predict(&x_t, &timesteps, told)?.x0;
        let error = squared_error(&guess, &x0)?;
        let mut per_sample = &error * self.critic_weights.gather(&timesteps, error.kind())?;
        let mut parts = vec![("fake_score", per_sample.detach())];
        if let (Some(discriminator), Some(real)) = (judges.discriminator, judges.real) {
            let made = self.judged(&x0, told, discriminator, &mut generator)?;
            // Told the same sources as the made ones, or these alone would give them away.
            let told_of_real = &self.told_critic(&real.conditioning, states);
            let real = self.judged(&real.x0, told_of_real, discriminator, &mut generator)?;
            let (of_real, of_made) = discriminator_loss(&real, &made)?;
            parts.extend([("gan_fake", of_made.detach()), ("gan_real", of_real.detach())]);
            let both = (of_made + of_real).to_kind(per_sample.kind());
            // Not in place: the figure above is the same memory.
            per_sample = &per_sample + both * self.config.critic_gan_weight;
        }
        let target = x0.shallow_clone();
        Ok(LossTerms { per_sample, student_x0: x0, teacher_next: None, target, parts })
    }

    /// The student's samples, asked for once a step.
    fn student_x0(&self, request: &LossRequest<'_>) -> Result<Tensor> {
        let LossRequest { states, networks, .. } = *request;
        if let Some(x0) = request.student_x0 {
            ensure_same_shape(OP, ("student_x0", x0), ("x_t", &states.x_t))?;
            return Ok(x0.detach());
        }
        ensure_one_schedule(&self.schedule, [("student", networks.student)])?;
        let _no_grad = tch::no_grad_guard();
        Ok(networks.student.predict(&states.x_t, &states.timesteps, &states.conditioning)?.x0)
    }
}

/// Who judges the student's samples in a phase, and on what beside them.
#[derive(Clone, Copy)]
struct Judges<'a> {
    critic: Critic<'a>,
    discriminator: Option<&'a dyn Discriminator>,
    real: Option<&'a Data>,
}

/// A noised batch.
struct Noised {
    x_t: Tensor,
    timesteps: Tensor,
}

impl Objective for Dmd2 {
    fn phases(&self, step: u64) -> &'static [Phase] {
        if step.is_multiple_of(self.config.critic_ratio) {
            &[Phase::Student, Phase::Critic]
        } else {
            &[Phase::Critic]
        }
    }

    fn requirements(&self) -> Requirements {
        Requirements {
            critic: true,
            critic_sees_source: self.config.critic_sees_source,
            discriminator: self.config.gan,
            ..Requirements::default()
        }
    }

    fn loss(&self, request: &LossRequest<'_>) -> Result<LossTerms> {
        request.states.ensure(OP)?;
        let judges = self.judges(request)?;
        self.entries.ensure(OP, request.states)?;
        match request.phase {
            Phase::Student => self.student_terms(request, judges),
            Phase::Critic => self.critic_terms(request, judges),
        }
    }
}
