//! A network as the trainer holds it: its parameters, and how it is asked.

use ddil_core::{Conditioning, Denoiser};
use ddil_libtorch::Autocast;
use ddil_models::{DiscriminatorHead, Matched, Model, ModelConfig, Parameters, Placement};
use ddil_schedulers::{NoiseSchedule, Prediction, PredictionType};
use tch::{Kind, Tensor};

use crate::config::Precision;
use crate::error::Result;

/// A U-Net with what it was trained to output, on which schedule, and in what precision it computes.
#[derive(Debug)]
pub struct Network {
    model: Model,
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    autocast: Option<Kind>,
}

impl Network {
    /// Puts the parts together.
    pub fn new(
        model: Model,
        prediction_type: PredictionType,
        schedule: NoiseSchedule,
        precision: Precision,
    ) -> Self {
        Self { model, prediction_type, schedule, autocast: precision.autocast() }
    }

    /// A network of the same form and values with parameters of its own.
    ///
    /// # Errors
    ///
    /// What libtorch refuses, such as memory.
    pub fn duplicate(&self, trainable: bool) -> Result<Self> {
        let model = self.model.config().build(self.placement(), 0)?;
        model.parameters().copy_from(self.parameters())?;
        model.parameters().set_trainable(trainable);
        model.set_training(trainable)?;
        Ok(self.with_model(model))
    }

    /// A network of another form that starts from those of these weights that match it.
    ///
    /// # Errors
    ///
    /// [`Error::Models`](crate::Error::Models) for a form that cannot be.
    pub fn derive(&self, config: &ModelConfig, seed: u64) -> Result<(Self, Matched)> {
        let model = config.build(self.placement(), seed)?;
        let matched = model.parameters().copy_matching(self.parameters())?;
        model.set_training(true)?;
        Ok((self.with_model(model), matched))
    }

    fn with_model(&self, model: Model) -> Self {
        let schedule = self.schedule.clone();
        Self { model, prediction_type: self.prediction_type, schedule, autocast: self.autocast }
    }

    /// What a head says of the features of the network's bottleneck, `[batch]`, `Float`.
    ///
    /// # Errors
    ///
    /// What network and head refuse.
    pub fn judged_by(
        &self,
        head: &DiscriminatorHead,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        self.pass(x_t, timesteps, |model, time| {
            let features = model.features(x_t, time, conditioning)?.to_kind(Kind::Float);
            head.forward(&features)
        })
    }

    /// The settings of the U-Net.
    pub fn config(&self) -> ModelConfig {
        self.model.config()
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        self.model.parameters()
    }

    /// Where the parameters are.
    pub fn placement(&self) -> Placement {
        self.model.parameters().placement()
    }

    /// What the network was trained to output.
    pub fn prediction_type(&self) -> PredictionType {
        self.prediction_type
    }

    /// Whether the network takes class labels.
    pub fn is_class_conditional(&self) -> bool {
        self.model.config().num_class_embeds().is_some()
    }

    /// The raw output, `Float`, in the shape of `x_t`.
    ///
    /// # Errors
    ///
    /// What the network refuses.
    pub fn output(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        self.pass(x_t, timesteps, |model, time| model.forward(x_t, time, conditioning))
    }

    /// One pass in the precision of the network, told the time as it knows it.
    fn pass(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        ask: impl FnOnce(&Model, &Tensor) -> ddil_models::Result<Tensor>,
    ) -> Result<Tensor> {
        let time = self.schedule.time_inputs_at(timesteps)?;
        // One guard a call: the cache of cast weights must not outlive a pass, or a pass with gradients would find
        // what one without has left there.
        let _autocast = self.autocast.map(|kind| Autocast::new(x_t.device(), kind)).transpose()?;
        Ok(ask(&self.model, &time)?.to_kind(Kind::Float))
    }
}

impl Denoiser for Network {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let output = self
            .output(x_t, timesteps, conditioning)
            .map_err(|error| ddil_core::Error::network(self.model.class_name(), error))?;
        Ok(self.prediction_type.convert(&self.schedule, &output, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}
