//! A network as the trainer holds it: its parameters, and how it is asked.

use std::collections::BTreeMap;
use std::rc::Rc;

use ddil_core::{Conditioning, Denoiser};
use ddil_libtorch::Autocast;
use ddil_models::{
    DiscriminatorHead, Lora, LoraConfig, Matched, Model, ModelConfig, Parameters, Placement,
};
use ddil_schedulers::{NoiseSchedule, Prediction, PredictionType};
use tch::{Kind, Tensor};

use crate::config::Precision;
use crate::error::Result;
use crate::watch::Watch;

/// A U-Net with what it was trained to output, on which schedule, and in what precision it computes.
///
/// Several may share one U-Net: the base of adapters ([`with_adapter`](Self::with_adapter)), and each of the adapters on
/// it, which is then all that such a network has of its own.
#[derive(Debug)]
pub struct Network {
    model: Rc<Model>,
    /// How a U-Net with adapters is to be asked; none for one without.
    adapter: Option<Adapter>,
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    autocast: Option<Kind>,
    /// What it answered.
    watch: Watch,
}

/// Some adapters of a U-Net, and whether they take part.
#[derive(Debug)]
struct Adapter {
    lora: Rc<Lora>,
    on: bool,
}

impl Network {
    /// Puts the parts together.
    pub fn new(
        model: Model,
        prediction_type: PredictionType,
        schedule: NoiseSchedule,
        precision: Precision,
    ) -> Self {
        let (model, autocast) = (Rc::new(model), precision.autocast());
        Self { model, adapter: None, prediction_type, schedule, autocast, watch: Watch::default() }
    }

    /// The network without and with a fresh adapter, which at first adds nothing: a teacher and its student on one base.
    ///
    /// The base is frozen, and its values are never written to.
    ///
    /// # Errors
    ///
    /// [`Error::Models`](crate::Error::Models) for settings that cannot be, such as targets that match no layer, and for
    /// a U-Net that has adapters.
    pub fn with_adapter(self, config: &LoraConfig, seed: u64) -> Result<(Self, Self)> {
        let lora = Rc::new(Lora::attach(self.model.parameters(), config, seed)?);
        self.model.set_training(false)?;
        let student = self.sharing(Adapter { lora: Rc::clone(&lora), on: true });
        Ok((self.sharing(Adapter { lora, on: false }), student))
    }

    fn sharing(&self, adapter: Adapter) -> Self {
        let (model, schedule) = (Rc::clone(&self.model), self.schedule.clone());
        let adapter = Some(adapter);
        Self { model, adapter, schedule, watch: Watch::default(), ..*self }
    }

    /// What the network adds to its base, if that is all it has of its own.
    pub fn adapter(&self) -> Option<&Lora> {
        self.adapter.as_ref().filter(|adapter| adapter.on).map(|adapter| &*adapter.lora)
    }

    /// A network of the same form and values with parameters of its own; for one with an adapter, another adapter on the
    /// same base.
    ///
    /// # Errors
    ///
    /// What libtorch refuses, such as memory.
    pub fn duplicate(&self, trainable: bool) -> Result<Self> {
        if let Some(lora) = self.adapter() {
            let lora = Rc::new(lora.duplicate()?);
            lora.parameters().set_trainable(trainable);
            return Ok(self.sharing(Adapter { lora, on: true }));
        }
        let model = self.build_as(&self.model.config(), 0)?;
        model.parameters().copy_from(self.model.parameters())?;
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
        let model = self.build_as(config, seed)?;
        let matched = model.parameters().copy_matching(self.model.parameters())?;
        model.set_training(true)?;
        Ok((self.with_model(model), matched))
    }

    /// A fresh U-Net where this one is and that goes through its backward pass as this one does.
    fn build_as(&self, config: &ModelConfig, seed: u64) -> Result<Model> {
        let model = config.build(self.placement(), seed)?;
        model.set_activation_checkpointing(self.model.activation_checkpointing())?;
        Ok(model)
    }

    /// Switches activation checkpointing on or off, for this network and for all that are made of it from then on; see
    /// [`Model::set_activation_checkpointing`].
    ///
    /// # Errors
    ///
    /// [`Error::Models`](crate::Error::Models) to switch it on for what is no U-Net.
    pub fn set_activation_checkpointing(&self, on: bool) -> Result<()> {
        Ok(self.model.set_activation_checkpointing(on)?)
    }

    /// Whether the backward pass computes inner results once more.
    pub fn activation_checkpointing(&self) -> bool {
        self.model.activation_checkpointing()
    }

    fn with_model(&self, model: Model) -> Self {
        let (model, schedule) = (Rc::new(model), self.schedule.clone());
        Self { model, adapter: None, schedule, watch: Watch::default(), ..*self }
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

    /// The parameters; those of the adapter alone for a network that has one.
    pub fn parameters(&self) -> &Parameters {
        self.adapter().map_or_else(|| self.model.parameters(), Lora::parameters)
    }

    /// Every weight of the U-Net by its name, an adapter's share added to it: what a file of the whole network holds.
    ///
    /// # Errors
    ///
    /// What libtorch refuses, such as memory.
    pub fn weights(&self) -> Result<Vec<(String, Tensor)>> {
        let mut named = self.model.parameters().named();
        if let Some(lora) = self.adapter() {
            let mut merged: BTreeMap<String, Tensor> = lora.merged()?.into_iter().collect();
            for (name, weight) in &mut named {
                if let Some(sum) = merged.remove(name) {
                    *weight = sum;
                }
            }
        }
        Ok(named)
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
        self.pass(x_t, timesteps, |model, time| match self.unheard(conditioning) {
            Some(rest) => model.forward(x_t, time, &rest),
            None => model.forward(x_t, time, conditioning),
        })
    }

    /// What is left of a guidance weight's conditioning for an adapter on a base that can be told none: the student of a
    /// teacher whose guidance is drawn learns the average over it.
    fn unheard(&self, conditioning: &Conditioning) -> Option<Conditioning> {
        conditioning.get(Conditioning::GUIDANCE_WEIGHT)?;
        self.adapter()?;
        if self.model.conditioning_fields().contains(&"guidance_weight") {
            return None;
        }
        Some(conditioning.shallow_clone().without(Conditioning::GUIDANCE_WEIGHT))
    }

    /// One pass in the precision of the network, told the time as it knows it.
    fn pass(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        ask: impl FnOnce(&Model, &Tensor) -> ddil_models::Result<Tensor>,
    ) -> Result<Tensor> {
        let time = self.schedule.time_inputs_at(timesteps)?;
        let adapter = self.adapter.as_ref();
        let _asked = adapter.map(|adapter| adapter.lora.switched(adapter.on)).transpose()?;
        // One guard a call: the cache of cast weights must not outlive a pass, or a pass with gradients would find
        // what one without has left there.
        let _autocast = self.autocast.map(|kind| Autocast::new(x_t.device(), kind)).transpose()?;
        let answer = ask(&self.model, &time)?.to_kind(Kind::Float);
        self.watch.see(x_t, timesteps, &answer)?;
        Ok(answer)
    }

    /// What it answered.
    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
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
