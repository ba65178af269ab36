//! The task of `ddil train`: trains a diffusion model on data.

use std::path::Path;

use ddil_core::{Conditioning, Denoiser, RandomStreams, Stream};
use ddil_evaluate::{Drawing, Scores};
use ddil_files::Invalid;
use ddil_losses::Phase;
use ddil_models::{Model, NetworkConfig, NetworkDenoiser, Placement, SampleSize};
use ddil_pipelines::{
    Card, Image, Pipeline, SamplePlan, Scheduler, grid_of_classes, write_model_card,
};
use ddil_schedulers::{NoiseSchedule, PreviousTimestep, SamplerConfig, Thresholding};
use rand::Rng;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::config::TrainConfig;
use crate::data::TrainingData;
use crate::error::{Error, Result};
use crate::evaluation::{EvaluationConfig, Evaluator, not_evaluated};
use crate::evidence::Evidence;
use crate::interrupt::Interrupt;
use crate::session::{Spent, Task, UpdateLoss};
use crate::state;
use crate::watch::Watches;

/// A training in progress, of a diffusion model: the squared error of its output at random timesteps of noised data.
///
/// [Ho et al. 2020](https://arxiv.org/abs/2006.11239); labels are dropped at random for guidance,
/// [Ho and Salimans 2022](https://arxiv.org/abs/2207.12598).
#[derive(Debug)]
pub struct TrainTask {
    config: TrainConfig,
    schedule: NoiseSchedule,
    network: NetworkDenoiser,
    /// A second network of the same configuration, which holds the moving average for sampling.
    averaged: NetworkDenoiser,
    watches: Watches,
    data: TrainingData,
    streams: RandomStreams,
    /// None unless the run is evaluated.
    evaluator: Option<Evaluator>,
}

impl TrainTask {
    /// The task at its first update.
    ///
    /// # Errors
    ///
    /// Errors of the config, the data and the network; [`Error::Invalid`] if the network does not fit the data.
    pub fn new(config: &TrainConfig) -> Result<Self> {
        Self::interruptible(config, &Interrupt::default())
    }

    /// The same, with a stop request that is checked while features of a reference are computed.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`Error::Evaluate`] for the stop.
    pub fn interruptible(config: &TrainConfig, interrupt: &Interrupt) -> Result<Self> {
        let task = Self::without_reference(config)?;
        let shape = Some(task.data.image_shape());
        let evaluator = evaluation_of(config).open(shape, task.device(), interrupt)?;
        Ok(Self { evaluator, ..task })
    }

    /// Checks that such a task can be built, without writing anything or computing features of a reference.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn check(config: &TrainConfig) -> Result<()> {
        let task = Self::without_reference(config)?;
        evaluation_of(config).check(Some(task.data.image_shape()), task.device())
    }

    fn without_reference(config: &TrainConfig) -> Result<Self> {
        config.ensure()?;
        let device = config.run.device()?;
        let data = TrainingData::open(&config.data, config.run.seed, device)?;
        ensure_fits(config, &data)?;
        let data = match config.model.num_class_embeds {
            Some(_) => data,
            None => data.ignore_labels(),
        };
        let schedule = config.schedule.build()?;
        let placement =
            Placement { device, kind: Kind::Float, channels_last: config.run.channels_last };
        let network = |trainable: bool| -> Result<NetworkDenoiser> {
            let unet = config.model.build(placement, config.run.seed)?;
            unet.parameters().set_trainable(trainable);
            unet.set_training(trainable);
            unet.set_activation_checkpointing(config.run.activation_checkpointing);
            let (output, unet) = (config.train.prediction_type, Model::UNet2D(unet));
            let network = NetworkDenoiser::new(unet, output, schedule.clone())?;
            Ok(network.with_precision(config.run.precision))
        };
        let mut watches = Watches::default();
        let (network, averaged) = (watches.on("network", network(true)?), network(false)?);
        scheduler(&network)?;
        let streams = RandomStreams::new(config.run.seed, 0);
        let config = config.clone();
        Ok(Self { config, schedule, network, averaged, watches, data, streams, evaluator: None })
    }

    fn device(&self) -> Device {
        self.network.placement().device
    }

    /// Random timesteps, one per sample.
    fn timesteps(&self, step: u64, batch: i64) -> Result<Tensor> {
        let mut generator = self.streams.generator(step, Stream::Timesteps, self.device())?;
        Ok(generator.randint(0, self.schedule.num_train_timesteps(), [batch])?)
    }

    /// The labels with some of them replaced by the null class.
    fn dropped(&self, step: u64, conditioning: &Conditioning) -> Conditioning {
        let Some((labels, null)) =
            conditioning.get(Conditioning::CLASS_LABELS).zip(self.data.null_class())
        else {
            return conditioning.shallow_clone();
        };
        let mut rng = self.streams.rng(step, Stream::Condition);
        let dropout = self.config.train.label_dropout;
        let drop: Vec<bool> =
            (0..labels.size()[0]).map(|_| rng.random::<f64>() < dropout).collect();
        let drop = Tensor::from_slice(&drop).to_device(labels.device());
        Conditioning::class_labels(labels.where_self(&drop.logical_not(), &labels.full_like(null)))
    }

    /// The null class; none if the network is never trained on it.
    fn null_class(&self) -> Option<i64> {
        self.data.null_class().filter(|_| self.config.train.label_dropout > 0.0)
    }

    fn sample_plan(&self) -> SamplePlan {
        SamplePlan {
            steps: self.config.train.sample_steps,
            guidance_scale: match self.null_class() {
                Some(_) => self.config.train.sample_guidance_scale,
                None => 1.0,
            },
            sampler: SamplerConfig::Ddim { eta: 0.0 },
            solver: None,
            thresholding: Thresholding::clamp_pixels(),
            timesteps: None,
            previous: PreviousTimestep::default(),
            batch_size: 100,
            seed: self.config.run.seed,
        }
    }
}

impl Task for TrainTask {
    fn kind(&self) -> &'static str {
        "train"
    }

    fn total_updates(&self) -> u64 {
        self.config.train.updates
    }

    fn updates_per_stage(&self) -> u64 {
        self.config.train.updates
    }

    fn parameters(&self, _phase: Phase) -> Vec<(String, Tensor)> {
        self.network.parameters().learned()
    }

    fn loss(&mut self, step: u64, _phase: Phase) -> Result<UpdateLoss> {
        // The network's dropout draws from the global generator.
        tch::manual_seed(self.streams.seed_of(step, Stream::Loss) as i64);
        self.watches.reset();
        let data = self.data.batch_at(step)?;
        let batch = data.x0.size()[0];
        let conditioning = self.dropped(step, &data.conditioning);
        let timesteps = self.timesteps(step, batch)?;
        let noise = self
            .streams
            .generator(step, Stream::Noise, self.device())?
            .normal(data.x0.size(), Kind::Float)?;
        let x_t = self.schedule.add_noise(&data.x0, &noise, &timesteps)?;
        let target =
            self.network.prediction_type().target(&self.schedule, &data.x0, &noise, &timesteps)?;
        let output = self.network.output(&x_t, &timesteps, &conditioning)?;
        let error = (output - target).square();
        let per_sample = error.flatten(1, -1).mean_dim(1, false, Kind::Float);
        Ok(UpdateLoss { per_sample, figures: Vec::new(), outputs_sum: self.watches.sum()? })
    }

    fn inspect(&mut self, step: u64, phase: Phase) -> Result<Option<Evidence>> {
        self.watches.inspect_values();
        self.loss(step, phase)?;
        let data = self.data.batch_at(step)?;
        let mut evidence = Evidence::of_timesteps(&self.timesteps(step, data.x0.size()[0])?)?;
        evidence.check("data", "data.x0", &data.x0)?;
        evidence.check_conditioning("data", &data.conditioning)?;
        evidence.check_weights("network", &self.parameters(phase))?;
        self.watches.take().iter().for_each(|outputs| evidence.add_outputs(outputs));
        Ok(Some(evidence))
    }

    fn after_update(&mut self, _step: u64) -> Result<()> {
        Ok(())
    }

    fn start_stage(&mut self, _step: u64, _average: &[(String, Tensor)]) -> Result<()> {
        Ok(())
    }

    fn samples(&mut self, average: &[(String, Tensor)]) -> Result<Image> {
        state::restore("moving average", &self.averaged.parameters().learned(), average)?;
        let per_class = self.config.output.samples_per_class;
        let device = self.device();
        let shape = self.data.image_shape();
        let denoiser: &dyn Denoiser = &self.averaged;
        let card = self.card();
        Ok(grid_of_classes(denoiser, &self.sample_plan(), &card, shape, per_class, device)?)
    }

    fn evaluate(
        &mut self,
        average: &[(String, Tensor)],
        interrupt: &Interrupt,
    ) -> Result<Option<Scores>> {
        state::restore("moving average", &self.averaged.parameters().learned(), average)?;
        let Some(evaluator) = &self.evaluator else { return Err(not_evaluated()) };
        let (own, section) = (self.sample_plan(), &self.config.evaluate);
        let plan = SamplePlan {
            steps: section.steps.unwrap_or(own.steps),
            batch_size: section.batch_size,
            seed: section.seed,
            ..own
        };
        let (card, device) = (self.card(), self.device());
        let drawing = Drawing::of_network(&self.averaged, &card, &plan, device, section.samples);
        evaluator.scores(&drawing, interrupt)
    }

    fn save(&self, _writer: &mut CheckpointWriter) -> Result<()> {
        // Data, noise and labels of an update are functions of its number.
        Ok(())
    }

    fn restore(&mut self, _checkpoint: &Checkpoint, _step: u64) -> Result<()> {
        Ok(())
    }

    fn export(&self, folder: &Path, average: &[(String, Tensor)], spent: Spent) -> Result<()> {
        let Spent { updates, seconds } = spent;
        state::restore("moving average", &self.averaged.parameters().learned(), average)?;
        let (scheduler, card) =
            (scheduler(&self.averaged)?, Card { updates, seconds, ..self.card() });
        Pipeline::write(folder, &self.averaged, &scheduler, &card, None)?;
        Ok(write_model_card(folder).map(drop)?)
    }
}

impl TrainTask {
    fn card(&self) -> Card {
        Card {
            method: "teacher".to_owned(),
            class_names: self.data.class_names().to_vec(),
            null_class: self.null_class(),
            image_shape: self.data.image_shape(),
            guidance_scale: None,
            seed: self.config.run.seed,
            ..Card::default()
        }
    }
}

fn evaluation_of(config: &TrainConfig) -> EvaluationConfig<'_> {
    let TrainConfig { run, data, evaluate, output, .. } = config;
    EvaluationConfig { run, data, evaluate, output }
}

/// A teacher is sampled by DDIM, at any number of steps.
fn scheduler(network: &NetworkDenoiser) -> Result<Scheduler> {
    let sampler = SamplerConfig::Ddim { eta: 0.0 };
    Ok(Scheduler::new(network, sampler, &Thresholding::clamp_pixels(), None)?)
}

fn ensure_fits(config: &TrainConfig, data: &TrainingData) -> Result<()> {
    let [channels, height, width] = data.image_shape();
    let model = &config.model;
    let invalid = |field: &str, value: String, expected: String| {
        Err(Error::Invalid(Invalid::new(field, value, expected)))
    };
    if [model.in_channels, model.out_channels].map(i64::from) != [channels; 2] {
        return invalid(
            "model.in_channels, model.out_channels",
            format!("{}, {}", model.in_channels, model.out_channels),
            format!("{channels}, the channels of the data"),
        );
    }
    let own = match model.sample_size {
        Some(SampleSize::Square(side)) => [side; 2].map(i64::from),
        Some(SampleSize::Rectangle(sides)) => sides.map(i64::from),
        None => [height, width],
    };
    if own != [height, width] {
        return invalid(
            "model.sample_size",
            format!("{own:?}"),
            format!("{:?}, the height and width of the data, or no value", [height, width]),
        );
    }
    let halvings = model.block_out_channels.len().saturating_sub(1) as u32;
    let multiple = 2_i64.saturating_pow(halvings);
    if height % multiple != 0 || width % multiple != 0 {
        return invalid(
            "model.block_out_channels",
            format!("{} levels", model.block_out_channels.len()),
            format!(
                "fewer: the data are {height}x{width}, which cannot be halved {halvings} times"
            ),
        );
    }
    if let Some(kind) = model.class_embed_type {
        return invalid(
            "model.class_embed_type",
            format!("{kind:?}"),
            "no value: classes are learned by index; set model.num_class_embeds instead".to_owned(),
        );
    }
    match (model.num_class_embeds, data.null_class()) {
        (Some(found), Some(null)) if i64::from(found) != null + 1 => invalid(
            "model.num_class_embeds",
            found.to_string(),
            format!("{}: the {null} classes of the data plus the null class", null + 1),
        ),
        (Some(found), None) => invalid(
            "model.num_class_embeds",
            found.to_string(),
            "no value: the data have no classes".to_owned(),
        ),
        _ => Ok(()),
    }
}
