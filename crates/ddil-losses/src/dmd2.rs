//! Improved distribution matching distillation: matches the distribution of the student's samples to the teacher's.

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

/// Keeps the normaliser away from zero.
const MIN_SCALE: f64 = 1e-6;

/// The gradient of distribution matching with respect to the student's samples.
///
/// `(x0_fake - x0_real) / (mean |x0_student - x0_real| + 1e-6)`, with the mean over each sample. For a noised sample of
/// the student, `x0_fake` is the prediction of a network trained on the student's samples and `x0_real` that of the
/// teacher. Up to a positive factor their difference is the difference of the two scores, which is the gradient of the
/// Kullback-Leibler divergence between the two noised distributions. The divisor brings it to order 1 at every noise
/// level. Section 3.2 of [Yin et al. 2023](https://arxiv.org/abs/2311.18828), unchanged in
/// [DMD2](https://arxiv.org/abs/2405.14867). The 1e-6 avoids a division by zero if student and teacher agree.
///
/// # Shapes and units
///
/// - all three: `[batch, ..]`, any rank from 2, data scale
/// - returns: the same shape, `Float` or `Double`, detached; NaN and infinite values are propagated
///
/// # Errors
///
/// [`Error::Argument`] if the shapes differ or `batch` is the only dimension.
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
/// // The mean of 0.2 and 0.4 is 0.3, and so are both differences.
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

/// The student's adversarial loss: `softplus(-logit)`, high for samples that are classified as fake.
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
/// [`Error::Argument`] for logits that are not a dense floating-point tensor.
pub fn generator_loss(logits: &Tensor) -> Result<Tensor> {
    ensure_real("generator_loss", "logits", logits)?;
    Ok((-logits).softplus())
}

/// The discriminator's loss: `softplus(-logit)` of each real and `softplus(logit)` of each fake sample.
///
/// The two halves of the binary cross entropy; section 4.3 of [Yin et al. 2024](https://arxiv.org/abs/2405.14867).
///
/// # Shapes and units
///
/// - `real_logits`, `fake_logits`: any shapes, positive for real; returns one of each, in this order
///
/// # Errors
///
/// [`Error::Argument`] for logits that are not a dense floating-point tensor.
pub fn discriminator_loss(real_logits: &Tensor, fake_logits: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "discriminator_loss";
    ensure_real(OP, "real_logits", real_logits)?;
    ensure_real(OP, "fake_logits", fake_logits)?;
    Ok(((-real_logits).softplus(), fake_logits.softplus()))
}

/// The noise levels at which the samples of a state are compared with the teacher, of those from
/// [`Dmd2Config::dm_min_timestep`] to [`Dmd2Config::dm_max_timestep`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MatchingTimesteps {
    /// All, whatever the state: the default, as published.
    #[default]
    All,
    /// Those at most as noisy as the state itself. What is decided at noisier levels is in the state already. A
    /// guided teacher, which exaggerates at noisy levels, then does so once and not again at each step of the student.
    UpToState,
}

impl MatchingTimesteps {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_all(&self) -> bool {
        *self == Self::All
    }
}

/// The settings of [`Dmd2`]; the defaults are those published for SDXL in four steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Dmd2Config {
    /// The student is trained in every `critic_ratio`-th step, the critic in each; default 5. The two time scales let
    /// the critic follow the student.
    pub critic_ratio: u64,
    /// Factor of the distribution matching loss; default 1.
    pub dm_weight: f64,
    /// The least noisy timestep at which student and teacher are compared, as a fraction of all; default 0.02.
    pub dm_min_timestep: f64,
    /// The noisiest of these timesteps, as a fraction of all; default 0.98.
    pub dm_max_timestep: f64,
    /// Which of these timesteps are for a state; default [`MatchingTimesteps::All`].
    #[serde(skip_serializing_if = "MatchingTimesteps::is_all")]
    pub dm_timesteps: MatchingTimesteps,
    /// The weight of the critic's error in the clean data at each noise level. The default, none, is
    /// [`Weighting::of`] the network's output if that is known
    /// ([`ObjectiveConfig::trained_to_predict`](crate::ObjectiveConfig::trained_to_predict)), otherwise `snr`, the
    /// weight of `epsilon`. With a weight other than the one of its training, the critic lags behind the student at
    /// noise levels of low weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic_weighting: Option<Weighting>,
    /// Upper bound of that weight; default 10 000. The usual variance-preserving schedules do not reach it before
    /// timestep 0; flow matching and EDM continue to noise levels that single precision cannot distinguish from 0.
    pub critic_weight_cap: f64,
    /// Whether the critic is conditioned on the source of each sample's state, and so models one distribution per
    /// source; default false, one distribution for all. Without it, student and teacher are compared over all sources
    /// together, and samples from dataset states can compensate for modes missing from the student's own states. The
    /// critic must accept a guidance weight, whose input then carries the source.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub critic_sees_source: bool,
    /// Whether the critic is conditioned on the timestep of each sample's state, and so models one distribution per
    /// step of the student; default false, as published: one distribution for all steps. Without it, samples of one
    /// step can compensate for the errors of another, for instance those of the last step for the blurred ones of the
    /// first. The critic must accept a guidance weight, as for the source.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub critic_sees_timestep: bool,
    /// Whether a discriminator is trained along with the critic, on dataset samples; default true.
    pub gan: bool,
    /// Factor of the student's adversarial loss; default 0.005.
    pub gan_weight: f64,
    /// Factor of the discriminator's loss relative to the critic's; default 0.01.
    pub critic_gan_weight: f64,
}

impl Default for Dmd2Config {
    fn default() -> Self {
        Self {
            critic_ratio: 5,
            dm_weight: 1.0,
            dm_min_timestep: 0.02,
            dm_max_timestep: 0.98,
            dm_timesteps: MatchingTimesteps::All,
            critic_weighting: None,
            critic_weight_cap: 1e4,
            critic_sees_source: false,
            critic_sees_timestep: false,
            gan: true,
            gan_weight: 5e-3,
            critic_gan_weight: 1e-2,
        }
    }
}

impl Dmd2Config {
    /// The same settings with a change: `Dmd2Config::default().with(|config| config.gan = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

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

/// Improved distribution matching distillation (DMD2) of [Yin et al. 2024](https://arxiv.org/abs/2405.14867): matches
/// the distribution of the student's samples to that of the teacher's.
///
/// States have no labels. From each the student predicts clean data `x0`, and their distribution is compared with the
/// teacher's by means of a critic, a denoiser that is trained on the student's samples throughout. Timesteps and noise
/// below are drawn independently for each term, from the streams of the request.
///
/// | phase | loss | noised to |
/// |---|---|---|
/// | student | half the squared distance of `x0` and `x0 - gradient`, times `dm_weight`: its gradient is [`distribution_matching_gradient`] | 2 % to 98 % of the timesteps, or up to the state's own (`dm_timesteps`) |
/// | | plus [`generator_loss`] of the noised `x0`, times `gan_weight` | any timestep |
/// | critic | squared error of the critic's prediction from the noised `x0`, weighted by `critic_weighting` | any timestep |
/// | | plus [`discriminator_loss`] of noised `x0` and of noised dataset samples, times `critic_gan_weight` | any timestep, drawn separately |
///
/// The student is trained in every `critic_ratio`-th step, the critic in every step: on the student's samples of the
/// same step if the request has them ([`LossRequest::student_x0`]), otherwise on samples computed without
/// gradients.
///
/// The critic is trained on the same mixture of states as the student. Published recipes therefore differ only in the
/// source of the states: the student's own trajectories, noised dataset samples, or a mixture of both.
///
/// # Gradients
///
/// In the student's phase only the student receives a gradient, through its own prediction; teacher and critic are
/// evaluated without gradients. The adversarial term reaches `x0` *through* the discriminator, which must therefore be
/// evaluated with gradients enabled. The caller excludes its parameters (and those of the critic whose features it
/// reads) by freezing them for the phase. In the critic's phase critic and discriminator receive a gradient, the
/// student none.
///
/// # Wrapped and bare critic
///
/// The gradient uses [`Critic::thresholded`], which is thresholded to the data's range as the teacher is.
/// [`Critic::fake_score`] is trained bare, because it has to follow the student's samples even outside of that range.
/// Only the teacher is guided.
///
/// # Logged parts
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
/// let config = Dmd2Config::default().with(|config| config.critic_ratio = 2);
/// let method = ObjectiveConfig::Dmd2(config);
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
    /// [`Error::Invalid`] with the name of the setting; [`Error::Scheduler`] if the grid is outside of the schedule.
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

    /// The timesteps at which samples of `states` are compared with the teacher, `[batch]`.
    fn draw_matching_timesteps(
        &self,
        states: &States,
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let (low, high) = self.matching_timesteps();
        let shape = &states.x_t.size()[..1];
        if self.config.dm_timesteps.is_all() {
            return uniform_timesteps((low, high), shape, generator);
        }
        // A sample has its own number of timesteps; the least noisy one is left to a state below it.
        let share = generator.uniform(shape, Kind::Double).map_err(ddil_core::Error::from)?;
        let drawn = || {
            let count = states.timesteps.f_clamp(low, high)?.f_sub_scalar(low - 1)?;
            let above = (share * &count).f_floor()?.f_to_kind(Kind::Int64)?;
            above.f_minimum(&count.f_sub_scalar(1)?)?.f_add_scalar(low)
        };
        drawn().map_err(Error::torch(OP))
    }

    /// Clean data noised to given timesteps.
    fn noised(&self, x0: &Tensor, timesteps: Tensor, generator: &mut Generator) -> Result<Noised> {
        let noise = generator.normal(x0.size(), x0.kind()).map_err(ddil_core::Error::from)?;
        Ok(Noised { x_t: self.schedule.add_noise(x0, &noise, &timesteps)?, timesteps })
    }

    /// Clean data noised to timesteps drawn uniformly from the whole grid.
    fn noised_anywhere(&self, x0: &Tensor, generator: &mut Generator) -> Result<Noised> {
        let range = (0, self.schedule.last_timestep());
        let timesteps = uniform_timesteps(range, &x0.size()[..1], generator)?;
        self.noised(x0, timesteps, generator)
    }

    /// The discriminator's logits, `[batch]`, of `x0` noised to random timesteps.
    fn discriminate(
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
        let expected = format!("{:?}, one per sample", timesteps.size());
        Err(Error::Argument(ArgumentError::Shape {
            op: OP,
            name: "logits",
            shape: logits.size(),
            expected,
        }))
    }

    /// The critic's conditioning for samples of `states`, or for real samples compared with these.
    fn critic_conditioning(&self, conditioning: &Conditioning, states: &States) -> Conditioning {
        let conditioning = conditioning.shallow_clone();
        if !self.critic_sees_states() {
            return conditioning;
        }
        let Dmd2Config { critic_sees_source, critic_sees_timestep, .. } = self.config;
        // A different number for each pair of what the critic sees.
        let per_source = if critic_sees_timestep { self.grid().len() } else { 1 };
        let number = |(source, index): (&Source, &usize)| {
            let of_source = if critic_sees_source { source_number(source) * per_source } else { 0 };
            let of_timestep = if critic_sees_timestep { *index } else { 0 };
            (of_source + of_timestep) as f32
        };
        let numbers: Vec<f32> =
            states.sources.iter().zip(&states.grid_indices).map(number).collect();
        let device = states.x_t.device();
        // Asynchronous: a blocking copy would synchronise with the device.
        let numbers = Tensor::from_slice(&numbers).to_device_(device, Kind::Float, true, false);
        conditioning.with_guidance_weight(numbers)
    }

    /// Whether the critic's input identifies the states that its samples come from.
    fn critic_sees_states(&self) -> bool {
        self.config.critic_sees_source || self.config.critic_sees_timestep
    }

    /// The networks and data that the phase requires, or an error with what is missing.
    fn inputs<'a>(&self, request: &LossRequest<'a>) -> Result<CriticInputs<'a>> {
        let missing = |what| Error::Missing { method: METHOD, what };
        let critic = request.networks.critic.ok_or_else(|| missing("a critic"))?;
        if !self.config.gan {
            return Ok(CriticInputs { critic, discriminator: None, real: None });
        }
        let what = "a discriminator, because `gan` is true";
        let discriminator = Some(critic.discriminator.ok_or_else(|| missing(what))?);
        let what = "dataset samples for its discriminator, because `gan` is true";
        let real = match request.phase {
            Phase::Student => None,
            Phase::Critic => Some(request.real.ok_or_else(|| missing(what))?),
        };
        Ok(CriticInputs { critic, discriminator, real })
    }

    fn student_terms(
        &self,
        request: &LossRequest<'_>,
        inputs: CriticInputs<'_>,
    ) -> Result<LossTerms> {
        let LossRequest { step, states, networks, streams, .. } = *request;
        let conditioning = &states.conditioning;
        let evaluated = [
            ("student", networks.student),
            ("teacher", networks.teacher),
            ("critic", inputs.critic.thresholded),
        ];
        ensure_one_schedule(&self.schedule, evaluated)?;
        let x0 = networks.student.predict(&states.x_t, &states.timesteps, conditioning)?.x0;
        let mut generator = streams.generator(step, Stream::StudentLoss, x0.device())?;
        let critic_conditioning = &self.critic_conditioning(conditioning, states);
        let gradient = self.gradient(
            &x0,
            request,
            (inputs.critic.thresholded, critic_conditioning),
            &mut generator,
        )?;
        // The loss is half a squared distance: its gradient is the difference to the target.
        let target = x0.detach() - &gradient;
        let mut per_sample = squared_error(&x0, &target)? * (0.5 * self.config.dm_weight);
        let mut parts = vec![("distribution_matching", mean_over_sample(&gradient.abs()))];
        if let Some(discriminator) = inputs.discriminator {
            let logits =
                self.discriminate(&x0, critic_conditioning, discriminator, &mut generator)?;
            let adversarial = generator_loss(&logits)?.to_kind(per_sample.kind());
            parts.push(("gan_student", adversarial.detach()));
            per_sample += adversarial * self.config.gan_weight;
        }
        Ok(LossTerms { per_sample, student_x0: x0.detach(), teacher_next: None, target, parts })
    }

    /// The gradient of distribution matching at `x0`, with fresh noise.
    fn gradient(
        &self,
        x0: &Tensor,
        request: &LossRequest<'_>,
        (critic, critic_conditioning): (&dyn Denoiser, &Conditioning),
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (teacher, conditioning) = (request.networks.teacher, &request.states.conditioning);
        let timesteps = self.draw_matching_timesteps(request.states, generator)?;
        let Noised { x_t, timesteps } = self.noised(x0, timesteps, generator)?;
        let fake = critic.predict(&x_t, &timesteps, critic_conditioning)?.x0;
        let real = teacher.predict(&x_t, &timesteps, conditioning)?.x0;
        distribution_matching_gradient(x0, &fake, &real)
    }

    fn critic_terms(
        &self,
        request: &LossRequest<'_>,
        inputs: CriticInputs<'_>,
    ) -> Result<LossTerms> {
        let LossRequest { step, states, streams, .. } = *request;
        let conditioning = &self.critic_conditioning(&states.conditioning, states);
        ensure_one_schedule(&self.schedule, [("critic", inputs.critic.fake_score)])?;
        if let Some(Data { x0: real, .. }) = inputs.real {
            ensure_same_shape(OP, ("real", real), ("x_t", &states.x_t))?;
        }
        let x0 = self.student_x0(request)?;
        let mut generator = streams.generator(step, Stream::CriticLoss, x0.device())?;
        let Noised { x_t, timesteps } = self.noised_anywhere(&x0, &mut generator)?;
        let prediction = inputs.critic.fake_score.predict(&x_t, &timesteps, conditioning)?.x0;
        let error = squared_error(&prediction, &x0)?;
        let mut per_sample = &error * self.critic_weights.gather(&timesteps, error.kind())?;
        let mut parts = vec![("fake_score", per_sample.detach())];
        if let (Some(discriminator), Some(real)) = (inputs.discriminator, inputs.real) {
            let fake = self.discriminate(&x0, conditioning, discriminator, &mut generator)?;
            // Conditioned on the same states as the fake samples: otherwise these alone would identify the fakes.
            let real_conditioning = &self.critic_conditioning(&real.conditioning, states);
            let real =
                self.discriminate(&real.x0, real_conditioning, discriminator, &mut generator)?;
            let (real_loss, fake_loss) = discriminator_loss(&real, &fake)?;
            parts.extend([("gan_fake", fake_loss.detach()), ("gan_real", real_loss.detach())]);
            let both = (fake_loss + real_loss).to_kind(per_sample.kind());
            // Not in place: the part recorded above shares this memory.
            per_sample = &per_sample + both * self.config.critic_gan_weight;
        }
        let target = x0.shallow_clone();
        Ok(LossTerms { per_sample, student_x0: x0, teacher_next: None, target, parts })
    }

    /// The student's samples, computed once per step.
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

/// Timesteps drawn uniformly from `low..=high`.
fn uniform_timesteps(
    (low, high): (i64, i64),
    shape: &[i64],
    generator: &mut Generator,
) -> Result<Tensor> {
    Ok(generator.randint(low, high + 1, shape).map_err(ddil_core::Error::from)?)
}

/// The number of a source for a critic that sees it.
fn source_number(source: &Source) -> usize {
    match source {
        // The start of a trajectory belongs to the trajectory.
        Source::Student | Source::Noise => 0,
        Source::Forward => 1,
        Source::Teacher => 2,
        Source::Mixed => 3,
        // All added sources count as one.
        Source::Added(_) => 4,
    }
}

/// The critic, discriminator and real data of a phase.
#[derive(Clone, Copy)]
struct CriticInputs<'a> {
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
            critic_sees_states: self.critic_sees_states(),
            discriminator: self.config.gan,
            ..Requirements::default()
        }
    }

    fn loss(&self, request: &LossRequest<'_>) -> Result<LossTerms> {
        request.states.ensure(OP)?;
        let inputs = self.inputs(request)?;
        self.entries.ensure(OP, request.states)?;
        match request.phase {
            Phase::Student => self.student_terms(request, inputs),
            Phase::Critic => self.critic_terms(request, inputs),
        }
    }
}
