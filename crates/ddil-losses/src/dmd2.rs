//! Improved distribution matching distillation: the law of the student's samples against the teacher's.

use ddil_core::{Conditioning, Discriminator, Generator, RandomStreams, Stream};
use ddil_schedulers::{NoiseSchedule, TimestepSpacing, Timesteps, ensure_same_shape};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::distance::{difference, mean_over_sample, squared_error};
use crate::error::{Error, Result};
use crate::grid_rows::{GridRows, per_sample};
use crate::objective::{
    Critic, LossRequest, LossTerms, Objective, Phase, Requirements, ensure_one_schedule,
};
use crate::weighting::{TimestepWeights, Weighting};

const METHOD: &str = "DMD2";
const OP: &str = "Dmd2::loss";

/// Keeps the normaliser off zero.
const MIN_SCALE: f64 = 1e-6;

/// The gradient of distribution matching with respect to the student's samples.
///
/// `(x0_fake - x0_real) / (mean |x0_student - x0_real| + 1e-6)`, the mean over each sample.
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

/// What the student pays for samples that are taken for made: `softplus(-logit)`, one a sample.
pub fn generator_loss(logits: &Tensor) -> Tensor {
    (-logits).softplus()
}

/// What a discriminator pays for each real and each made sample: `softplus(-logit)` and `softplus(logit)`.
pub fn discriminator_loss(real_logits: &Tensor, fake_logits: &Tensor) -> (Tensor, Tensor) {
    ((-real_logits).softplus(), fake_logits.softplus())
}

/// The settings of [`Dmd2`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dmd2Config {
    /// The student is trained in every so many-th step, the critic in each; default 5.
    pub critic_ratio: u64,
    /// Factor of the distribution matching loss; default 1.
    pub dm_weight: f64,
    /// The least noise at which student and teacher are compared, as a share of the training timesteps; default 0.02.
    pub dm_min_timestep: f64,
    /// The most noise at which they are; default 0.98.
    pub dm_max_timestep: f64,
    /// How much an error of the critic counts at each noise level; default `snr`, which is the squared error of
    /// `epsilon`. `snr_plus_one` is that of `v`, `constant` that of `x0`.
    pub critic_weighting: Weighting,
    /// No such weight is above this; default 10 000.
    pub critic_weight_cap: f64,
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
            critic_weighting: Weighting::Snr,
            critic_weight_cap: 1e4,
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
            return Err(Error::InvalidConfig {
                field: "steps",
                value: steps.to_string(),
                expected: format!("a divisor of the {total} training timesteps"),
            });
        }
        Ok(Timesteps::spaced(TimestepSpacing::Trailing, total, steps, 0)?)
    }

    fn ensure(&self) -> Result<()> {
        let refuse = |field, value: String, expected: &str| {
            Err(Error::InvalidConfig { field, value, expected: expected.to_owned() })
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

/// Improved distribution matching distillation (DMD2) of
/// [Yin et al. 2024](https://arxiv.org/abs/2405.14867).
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
    /// [`Error::InvalidConfig`] that names the setting; [`Error::Scheduler`] if the grid leaves the schedule.
    pub fn new(config: Dmd2Config, schedule: NoiseSchedule, grid: Timesteps) -> Result<Self> {
        config.ensure()?;
        for &t in grid.as_slice() {
            schedule.scale_at(t)?;
        }
        let critic_weights = TimestepWeights::new(
            config.critic_weighting,
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

    /// Clean data noised to timesteps drawn from `low..=high`, with these.
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

    /// How real `x0` looks once it is noised, `[batch]`.
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
        Err(Error::Shape { op: OP, name: "logits", shape: logits.size(), expected })
    }

    /// The critic with what the settings ask of it.
    fn critic<'a>(
        &self,
        request: &LossRequest<'a>,
    ) -> Result<(Critic<'a>, Option<&'a dyn Discriminator>)> {
        let missing = |what| Error::Missing { method: METHOD, what };
        let critic = request.networks.critic.ok_or_else(|| missing("a critic"))?;
        if !self.config.gan {
            return Ok((critic, None));
        }
        let discriminator =
            critic.discriminator.ok_or_else(|| missing("a discriminator, as `gan` is on"))?;
        if request.phase == Phase::Critic && request.real.is_none() {
            return Err(missing("dataset samples to show to its discriminator, as `gan` is on"));
        }
        Ok((critic, Some(discriminator)))
    }

    fn generator(
        streams: &RandomStreams,
        step: u64,
        phase: Phase,
        x0: &Tensor,
    ) -> Result<Generator> {
        let stream = match phase {
            Phase::Student => Stream::StudentLoss,
            Phase::Critic => Stream::CriticLoss,
        };
        Ok(streams.generator(step, stream, x0.device())?)
    }

    fn student_terms(
        &self,
        request: &LossRequest<'_>,
        critic: Critic<'_>,
        discriminator: Option<&dyn Discriminator>,
    ) -> Result<LossTerms> {
        let LossRequest { step, phase, states, networks, streams, .. } = *request;
        let told = &states.conditioning;
        let asked = [
            ("student", networks.student),
            ("teacher", networks.teacher),
            ("critic", critic.asked),
        ];
        ensure_one_schedule(&self.schedule, asked)?;
        let x0 = networks.student.predict(&states.x_t, &states.timesteps, told)?.x0;
        let mut generator = Self::generator(streams, step, phase, &x0)?;
        let (gradient, target) = {
            let _no_grad = tch::no_grad_guard();
            let Noised { x_t, timesteps } =
                self.noised(&x0, self.matching_timesteps(), &mut generator)?;
            let fake = critic.asked.predict(&x_t, &timesteps, told)?.x0;
            let real = networks.teacher.predict(&x_t, &timesteps, told)?.x0;
            let gradient = distribution_matching_gradient(&x0, &fake, &real)?;
            let target = &x0 - &gradient;
            (gradient, target)
        };
        // Half the squared distance to a target one gradient away has that gradient.
        let mut per_sample = squared_error(&x0, &target)? * (0.5 * self.config.dm_weight);
        let mut parts = vec![("distribution_matching", mean_over_sample(&gradient.abs()))];
        if let Some(discriminator) = discriminator {
            let logits = self.judged(&x0, told, discriminator, &mut generator)?;
            let loss = generator_loss(&logits).to_kind(per_sample.kind());
            parts.push(("gan_student", loss.detach()));
            per_sample = per_sample + loss * self.config.gan_weight;
        }
        Ok(LossTerms { per_sample, student_x0: x0.detach(), teacher_next: None, target, parts })
    }

    fn critic_terms(
        &self,
        request: &LossRequest<'_>,
        critic: Critic<'_>,
        discriminator: Option<&dyn Discriminator>,
    ) -> Result<LossTerms> {
        let LossRequest { step, phase, states, streams, .. } = *request;
        let told = &states.conditioning;
        ensure_one_schedule(&self.schedule, [("critic", critic.fake_score)])?;
        let x0 = self.student_x0(request)?;
        let mut generator = Self::generator(streams, step, phase, &x0)?;
        let Noised { x_t, timesteps } = self.noised_anywhere(&x0, &mut generator)?;
        let guess = critic.fake_score.predict(&x_t, &timesteps, told)?.x0;
        let error = squared_error(&guess, &x0)?;
        let mut per_sample = &error * self.critic_weights.gather(&timesteps, error.kind())?;
        let mut parts = vec![("fake_score", per_sample.detach())];
        if let (Some(discriminator), Some(real)) = (discriminator, request.real) {
            ensure_same_shape(OP, ("real", &real.x0), ("student_x0", &x0))?;
            let fake_logits = self.judged(&x0, told, discriminator, &mut generator)?;
            let real_logits =
                self.judged(&real.x0, &real.conditioning, discriminator, &mut generator)?;
            let (of_real, of_fake) = discriminator_loss(&real_logits, &fake_logits);
            parts.push(("gan_fake", of_fake.detach()));
            parts.push(("gan_real", of_real.detach()));
            let both = (of_real + of_fake).to_kind(per_sample.kind());
            per_sample = per_sample + both * self.config.critic_gan_weight;
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
        Requirements { critic: true, discriminator: self.config.gan, ..Requirements::default() }
    }

    fn loss(&self, request: &LossRequest<'_>) -> Result<LossTerms> {
        let (critic, discriminator) = self.critic(request)?;
        self.entries.ensure(OP, request.states)?;
        match request.phase {
            Phase::Student => self.student_terms(request, critic, discriminator),
            Phase::Critic => self.critic_terms(request, critic, discriminator),
        }
    }
}
