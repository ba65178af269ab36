//! A network as the trainer holds it: its parameters, and how it is asked.

use ddil_core::{Conditioning, Denoiser};
use ddil_libtorch::Autocast;
use ddil_models::{DiscriminatorHead, Matched, Parameters, Placement, UNet2DConfig, UNet2DModel};
use ddil_schedulers::{NoiseSchedule, Prediction, PredictionType};
use tch::{Kind, Tensor};

use crate::config::Precision;
use crate::error::Result;

/// A UNet with what it was trained to output, on which schedule, and in what precision it computes.
#[derive(Debug)]
pub struct Network {
    unet: UNet2DModel,
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    autocast: Option<Kind>,
}

impl Network {
    /// Puts the parts together.
    pub fn new(
        unet: UNet2DModel,
        prediction_type: PredictionType,
        schedule: NoiseSchedule,
        precision: Precision,
    ) -> Self {
        Self { unet, prediction_type, schedule, autocast: precision.autocast() }
    }

    /// A network of the same form and values with parameters of its own.
    ///
    /// # Errors
    ///
    /// What libtorch refuses, such as memory.
    pub fn duplicate(&self, trainable: bool) -> Result<Self> {
        let unet = self.unet.config().build(self.placement(), 0)?;
        unet.parameters().copy_from(self.unet.parameters())?;
        unet.parameters().set_trainable(trainable);
        unet.set_training(trainable);
        Ok(Self {
            unet,
            prediction_type: self.prediction_type,
            schedule: self.schedule.clone(),
            autocast: self.autocast,
        })
    }

    /// A network of another form that starts from those of these weights that match it.
    ///
    /// # Errors
    ///
    /// [`Error::Models`](crate::Error::Models) for a form that cannot be.
    pub fn derive(&self, config: &UNet2DConfig, seed: u64) -> Result<(Self, Matched)> {
        let unet = config.build(self.placement(), seed)?;
        let matched = unet.parameters().copy_matching(self.unet.parameters())?;
        unet.set_training(true);
        let autocast = self.autocast;
        let (prediction_type, schedule) = (self.prediction_type, self.schedule.clone());
        Ok((Self { unet, prediction_type, schedule, autocast }, matched))
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
        self.pass(x_t, timesteps, conditioning, |unet, time, labels, weight| {
            let features = unet.features(x_t, time, labels, weight)?.to_kind(Kind::Float);
            head.forward(&features)
        })
    }

    /// The settings of the UNet.
    pub fn config(&self) -> &UNet2DConfig {
        self.unet.config()
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        self.unet.parameters()
    }

    /// Where the parameters are.
    pub fn placement(&self) -> Placement {
        self.unet.parameters().placement()
    }

    /// What the network was trained to output.
    pub fn prediction_type(&self) -> PredictionType {
        self.prediction_type
    }

    /// Whether the network takes class labels.
    pub fn is_class_conditional(&self) -> bool {
        self.unet.config().num_class_embeds.is_some()
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
        self.pass(x_t, timesteps, conditioning, |unet, time, labels, weight| {
            unet.forward(x_t, time, labels, weight)
        })
    }

    /// One pass in the precision of the network, with the time, the labels and the weights as the UNet takes them.
    fn pass(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
        ask: impl FnOnce(
            &UNet2DModel,
            &Tensor,
            Option<&Tensor>,
            Option<&Tensor>,
        ) -> ddil_models::Result<Tensor>,
    ) -> Result<Tensor> {
        let time = self.schedule.time_inputs_at(timesteps)?;
        let labels = conditioning.class_labels.as_ref();
        let weight = conditioning.guidance_weight.as_ref();
        // One guard a call: the cache of cast weights must not outlive a pass, or a pass with gradients would find
        // what one without has left there.
        let _autocast = self.autocast.map(|kind| Autocast::new(x_t.device(), kind)).transpose()?;
        Ok(ask(&self.unet, &time, labels, weight)?.to_kind(Kind::Float))
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
            .map_err(|error| ddil_core::Error::network("UNet2DModel", error))?;
        Ok(self.prediction_type.convert(&self.schedule, &output, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}
