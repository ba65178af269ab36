//! The parts that all runs on one mixture and seed share.

use std::cell::Cell;
use std::rc::Rc;

use ddil_core::{
    Conditioning, Data, Denoiser, GaussianMixture, Guided, MixtureDenoiser, RandomStreams, Rollout,
    Stream, Thresholded,
};
use ddil_examples::{Result, Trainer, Training};
use ddil_losses::{TimestepWeights, Weighting};
use ddil_models::{MlpConfig, Model, ModelConfig, NetworkDenoiser, Placement, SkipConfig};
use ddil_schedulers::{
    BetaSchedule, Ddim, NoiseSchedule, NoiseScheduleConfig, Prediction, PredictionType, Sampler,
    Thresholding, TimestepSpacing, Timesteps, VpConfig,
};
use tch::{Device, Kind, Tensor};

use crate::cell::Setting;

/// Number of steps of the samples that guided students are compared with.
const REFERENCE_STEPS: u32 = 64;

pub(crate) struct Lab {
    pub(crate) setting: Setting,
    pub(crate) schedule: NoiseSchedule,
    pub(crate) streams: RandomStreams,
    exact: MixtureDenoiser,
    /// The distribution of the dataset, which may have fewer modes than the teacher's.
    dataset: GaussianMixture,
}

impl Lab {
    pub(crate) fn new(setting: Setting, seed: u64) -> Result<Self> {
        let schedule = NoiseScheduleConfig::Vp(VpConfig {
            beta_schedule: BetaSchedule::SquaredcosCapV2,
            ..VpConfig::default()
        });
        let schedule = schedule.build()?;
        let mixture = setting.mixture()?;
        Ok(Self {
            setting,
            dataset: mixture.without(setting.missing())?,
            exact: mixture.on(schedule.clone()),
            schedule,
            streams: RandomStreams::new(seed, 0),
        })
    }

    /// The whole distribution of the teacher.
    pub(crate) fn mixture(&self) -> &GaussianMixture {
        self.exact.mixture()
    }

    /// Samples of the dataset, with uniform classes.
    pub(crate) fn data(&self, step: u64, stream: Stream, n: i64) -> Result<Data> {
        self.draw(&self.dataset, step, stream, n)
    }

    fn draw(&self, mixture: &GaussianMixture, step: u64, stream: Stream, n: i64) -> Result<Data> {
        let mut generator = self.streams.generator(step, stream, Device::Cpu)?;
        let labels = generator.randint(0, mixture.num_classes(), [n])?;
        let x0 = mixture.sample(n, Some(&labels), &mut generator)?;
        Ok(Data::new(x0).with_conditioning(Conditioning::class_labels(labels)))
    }

    /// A network of about 10 000 parameters.
    pub(crate) fn network(&self) -> Result<Rc<Model>> {
        self.built(self.network_config())
    }

    fn built(&self, config: MlpConfig) -> Result<Rc<Model>> {
        Ok(Rc::new(ModelConfig::Mlp(config).build(Placement::default(), self.streams.seed)?))
    }

    fn network_config(&self) -> MlpConfig {
        MlpConfig {
            time_features: 16,
            num_class_embeds: Some(self.mixture().num_classes() as u32),
            class_features: 8,
            skip: Some(SkipConfig {
                sigma_data: self.setting.sigma_data(),
                schedule: self.schedule.config().clone(),
            }),
            ..MlpConfig::default()
        }
    }

    /// A network with the weights of another.
    pub(crate) fn copy(&self, of: &Model) -> Result<Rc<Model>> {
        let model = self.network()?;
        model.parameters().copy_from(of.parameters())?;
        Ok(model)
    }

    /// A copy of a network with a further input, a number for each sample's state, that has no effect at first.
    pub(crate) fn critic_that_sees_states(&self, of: &Model) -> Result<Rc<Model>> {
        let critic = self.built(MlpConfig { embed_guidance: true, ..self.network_config() })?;
        critic.parameters().copy_matching(of.parameters())?;
        Ok(critic)
    }

    pub(crate) fn denoiser(&self, model: &Rc<Model>) -> Result<NetworkDenoiser> {
        Ok(NetworkDenoiser::new(Rc::clone(model), PredictionType::Sample, self.schedule.clone())?)
    }

    /// A stand-in for a teacher's weights: a network that denoises the whole distribution of the teacher, without
    /// few-step sampling or guidance. All arms start from it.
    pub(crate) fn start(&self, training: Training, batch_size: i64) -> Result<Rc<Model>> {
        let model = self.network()?;
        let student = self.denoiser(&model)?;
        let weights = TimestepWeights::new(Weighting::SnrPlusOne, None, &self.schedule)?;
        let mut trainer = Trainer::new(model.parameters().learned(), training)?;
        for step in 0..training.updates {
            let data = self.draw(self.mixture(), step, Stream::Data, batch_size)?;
            let mut generator = self.streams.generator(step, Stream::Noise, Device::Cpu)?;
            let noise = generator.normal(data.x0.size(), Kind::Float)?;
            let t = generator.randint(0, self.schedule.num_train_timesteps(), [batch_size])?;
            let x_t = self.schedule.add_noise(&data.x0, &noise, &t)?;

            let target = self.exact.predict(&x_t, &t, &data.conditioning)?.x0;
            let x0 = student.predict(&x_t, &t, &data.conditioning)?.x0;
            let errors = ddil_losses::squared_error(&x0, &target)?;
            if !trainer.update(&(errors * weights.gather(&t, Kind::Float)?))? {
                return Err("the initial network diverged".into());
            }
        }
        trainer.finish()?;
        Ok(model)
    }

    /// The teacher as used in training: guided, then clipped to the data's range.
    pub(crate) fn teacher<'a>(
        &'a self,
        thresholding: Thresholding,
        evaluations: &'a Cell<u64>,
    ) -> Result<impl Denoiser + 'a> {
        let null = Tensor::from_slice(&[self.mixture().num_classes()]);
        let null = Conditioning::class_labels(null);
        let guided = Guided::new(
            Counting::new(&self.exact, evaluations),
            self.setting.guidance_scale(),
            null,
        )?;
        Ok(Thresholded::new(guided, thresholding)?)
    }

    /// The samples of a perfect student: data, or samples of the guided teacher in many steps.
    pub(crate) fn reference(&self, teacher: &dyn Denoiser, n: i64) -> Result<Data> {
        if self.setting.guidance_scale() == 1.0 {
            return self.draw(self.mixture(), 0, Stream::Sample, n);
        }
        let ddim = Ddim::new(self.schedule.clone());
        self.samples(teacher, &ddim, &trailing(REFERENCE_STEPS)?, 0, n)
    }

    /// Samples for measurements, with uniform classes; `draw` selects independent sets.
    pub(crate) fn samples(
        &self,
        denoiser: &dyn Denoiser,
        sampler: &dyn Sampler,
        timesteps: &Timesteps,
        draw: u64,
        n: i64,
    ) -> Result<Data> {
        let mut generator = self.streams.generator(draw, Stream::Sample, Device::Cpu)?;
        let labels = generator.randint(0, self.mixture().num_classes(), [n])?;
        let noise = generator.normal([n, 2], Kind::Float)?;
        let conditioning = Conditioning::class_labels(labels);
        let rollout = Rollout::new(denoiser, sampler, timesteps).conditioning(&conditioning);
        let x0 = rollout.generator(&mut generator).sample(noise)?;
        Ok(Data::new(x0).with_conditioning(conditioning))
    }
}

pub(crate) fn trailing(num_steps: u32) -> Result<Timesteps> {
    Ok(Timesteps::spaced(TimestepSpacing::Trailing, 1000, num_steps, 0)?)
}

/// A denoiser that counts the samples it processes.
pub(crate) struct Counting<'a, D> {
    inner: D,
    evaluations: &'a Cell<u64>,
}

impl<'a, D> Counting<'a, D> {
    pub(crate) fn new(inner: D, evaluations: &'a Cell<u64>) -> Self {
        Self { inner, evaluations }
    }
}

impl<D: Denoiser> Denoiser for Counting<'_, D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        self.evaluations.set(self.evaluations.get() + x_t.size()[0] as u64);
        self.inner.predict(x_t, timesteps, conditioning)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
