//! A network as a [`Denoiser`]: with its schedule, its precision, an optional adapter and an optional observer.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use ddil_core::{Conditioning, Denoiser, repeated_level};
use ddil_libtorch::{ArgumentError, Autocast, ensure_dense, ensure_real};
use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction, PredictionType};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{BoxedError, Error, Result};
use crate::lora::{Lora, LoraConfig};
use crate::model::{Model, ModelConfig};
use crate::parameters::{Matched, Parameters, Placement};

/// The precision of matrix products and convolutions; parameters stay as they are.
///
/// # Example
///
/// ```
/// use ddil_models::Precision;
///
/// let precision: Precision = serde_json::from_str("\"bfloat16\"")?;
/// assert_eq!(precision, Precision::Bfloat16);
/// # Ok::<_, serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits throughout.
    #[default]
    Float32,
    /// bfloat16 by autocast, the rest in 32 bits.
    Bfloat16,
}

impl Precision {
    /// The kind of autocast; `None` if it is off.
    pub fn autocast(self) -> Option<Kind> {
        match self {
            Self::Float32 => None,
            Self::Bfloat16 => Some(Kind::BFloat16),
        }
    }
}

/// Receives every output of a [`NetworkDenoiser`], for example to find values that are NaN or infinite before
/// thresholding hides them.
///
/// # Example
///
/// ```
/// use std::cell::Cell;
/// use std::rc::Rc;
///
/// use ddil_core::Conditioning;
/// use ddil_models::{BoxedError, MlpConfig, ModelConfig, NetworkDenoiser, OutputObserver, Placement};
/// use ddil_schedulers::{NoiseScheduleConfig, PredictionType};
/// use tch::{Tensor, kind};
///
/// /// Counts the samples that a network was evaluated on.
/// #[derive(Debug, Default)]
/// struct Evaluations(Cell<i64>);
///
/// impl OutputObserver for Evaluations {
///     fn observe(&self, x_t: &Tensor, _: &Tensor, _: &Tensor) -> Result<(), BoxedError> {
///         self.0.set(self.0.get() + x_t.size()[0]);
///         Ok(())
///     }
/// }
///
/// let model = ModelConfig::Mlp(MlpConfig::default()).build(Placement::default(), 0)?;
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let evaluations = Rc::new(Evaluations::default());
/// let network = NetworkDenoiser::new(model, PredictionType::Epsilon, schedule)?
///     .with_observer(Rc::clone(&evaluations));
///
/// let (x_t, t) = (Tensor::randn([4, 2], kind::FLOAT_CPU), Tensor::full([4], 500, kind::INT64_CPU));
/// network.output(&x_t, &t, &Conditioning::none())?;
/// assert_eq!(evaluations.0.get(), 4);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub trait OutputObserver: fmt::Debug {
    /// Called after each pass; of a discriminator, `output` is its logits.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, ..]`; `timesteps`: `[batch]`, in training timesteps
    /// - `output`: `[batch, ..]`, `Float` (`Double` for samples of that kind)
    ///
    /// # Errors
    ///
    /// Any error ends the pass as [`Error::Observer`].
    fn observe(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        output: &Tensor,
    ) -> std::result::Result<(), BoxedError>;
}

/// A network with what it was trained to output and the schedule it was trained on.
///
/// Optional parts are a [`Precision`], an adapter ([`with_adapter`](Self::with_adapter)) and an [`OutputObserver`].
/// Clones share one network; [`duplicate`](Self::duplicate) makes a network with separate parameters. Several denoisers
/// may share a network as the base of their adapters.
///
/// # Time
///
/// A network receives [`NoiseSchedule::time_inputs_at`] of the timesteps, `Float`, whatever its schedule; an
/// [`Mlp`](crate::Mlp) receives the timesteps themselves, which it looks up in its own schedule.
///
/// # Example
///
/// ```
/// use ddil_core::{Conditioning, Denoiser};
/// use ddil_models::{MlpConfig, ModelConfig, NetworkDenoiser, Placement};
/// use ddil_schedulers::{NoiseScheduleConfig, PredictionType};
/// use tch::{Tensor, kind};
///
/// let model = ModelConfig::Mlp(MlpConfig::default()).build(Placement::default(), 0)?;
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let denoiser = NetworkDenoiser::new(model, PredictionType::Epsilon, schedule)?;
///
/// let (x_t, t) = (Tensor::randn([4, 2], kind::FLOAT_CPU), Tensor::full([4], 500, kind::INT64_CPU));
/// let prediction = denoiser.predict(&x_t, &t, &Conditioning::none())?;
/// assert_eq!(prediction.x0.size(), [4, 2]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct NetworkDenoiser {
    model: Rc<Model>,
    /// None for a network without adapters.
    adapter: Option<Adapter>,
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    precision: Precision,
    ignored_parts: Vec<&'static str>,
    observer: Option<Rc<dyn OutputObserver>>,
}

/// An adapter of the network, and whether it takes part in a pass.
#[derive(Clone, Debug)]
struct Adapter {
    lora: Rc<Lora>,
    enabled: bool,
}

impl NetworkDenoiser {
    /// `model` in [`Precision::Float32`].
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] if `prediction_type` is not defined on `schedule`; [`ArgumentError::Value`] if an
    /// [`Mlp`](crate::Mlp) with a skip connection, whose output is clean data, has another prediction type or schedule.
    pub fn new(
        model: impl Into<Rc<Model>>,
        prediction_type: PredictionType,
        schedule: NoiseSchedule,
    ) -> Result<Self> {
        let model = model.into();
        prediction_type.ensure_defined_on(&schedule)?;
        ensure_matches_skip(&model, prediction_type, &schedule)?;
        Ok(Self {
            model,
            adapter: None,
            prediction_type,
            schedule,
            precision: Precision::default(),
            ignored_parts: Vec::new(),
            observer: None,
        })
    }

    /// The same network in another precision.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The same network with `observer` instead of any earlier one.
    #[must_use]
    pub fn with_observer(self, observer: Rc<impl OutputObserver + 'static>) -> Self {
        Self { observer: Some(observer), ..self }
    }

    /// The same network, which drops the part `name` of each conditioning instead of refusing it.
    ///
    /// For a network that learns an average over that part, such as an adapter on a base without an input for the
    /// guidance weight.
    #[must_use]
    pub fn ignoring(mut self, name: &'static str) -> Self {
        self.ignored_parts.push(name);
        self
    }

    /// The network without and with a fresh adapter, whose contribution is 0 at first: a teacher and its student on one
    /// base, which is frozen.
    ///
    /// # Errors
    ///
    /// As [`Lora::attach`].
    pub fn with_adapter(self, config: &LoraConfig, seed: u64) -> Result<(Self, Self)> {
        let lora = Rc::new(Lora::attach(self.model.parameters(), config, seed)?);
        self.model.set_training(false)?;
        let student = self.sharing_base(Adapter { lora: Rc::clone(&lora), enabled: true });
        Ok((self.sharing_base(Adapter { lora, enabled: false }), student))
    }

    /// Another denoiser on the same base, without an observer.
    fn sharing_base(&self, adapter: Adapter) -> Self {
        Self { adapter: Some(adapter), observer: None, ..self.clone() }
    }

    /// A copy of the network with separate parameters of the same values; for one with an adapter, another adapter on
    /// the same base. It has no observer.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out.
    pub fn duplicate(&self, trainable: bool) -> Result<Self> {
        if let Some(lora) = self.adapter() {
            let lora = Rc::new(lora.duplicate()?);
            lora.parameters().set_trainable(trainable);
            return Ok(self.sharing_base(Adapter { lora, enabled: true }));
        }
        let model = self.build_as(&self.model.config(), 0)?;
        model.parameters().copy_from(self.model.parameters())?;
        model.parameters().set_trainable(trainable);
        model.set_training(trainable)?;
        Ok(self.with_model(model))
    }

    /// A network of another architecture, initialised with the weights that match, and the list of these weights. It
    /// has no observer.
    ///
    /// # Errors
    ///
    /// As [`ModelConfig::build`].
    pub fn derive(&self, config: &ModelConfig, seed: u64) -> Result<(Self, Matched)> {
        let model = self.build_as(config, seed)?;
        let matched = model.parameters().copy_matching(self.model.parameters())?;
        model.set_training(true)?;
        Ok((self.with_model(model), matched))
    }

    /// A fresh network with this one's placement and activation checkpointing.
    fn build_as(&self, config: &ModelConfig, seed: u64) -> Result<Model> {
        let model = config.build(self.placement(), seed)?;
        model.set_activation_checkpointing(self.model.activation_checkpointing())?;
        Ok(model)
    }

    fn with_model(&self, model: Model) -> Self {
        Self { model: Rc::new(model), adapter: None, observer: None, ..self.clone() }
    }

    /// The network; the base of one with an adapter.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The adapter, if the network computes with one.
    pub fn adapter(&self) -> Option<&Lora> {
        self.adapter.as_ref().filter(|adapter| adapter.enabled).map(|adapter| &*adapter.lora)
    }

    /// The settings of the network.
    pub fn config(&self) -> ModelConfig {
        self.model.config()
    }

    /// The parameters; those of the adapter alone for a network that has one.
    pub fn parameters(&self) -> &Parameters {
        self.adapter().map_or_else(|| self.model.parameters(), Lora::parameters)
    }

    /// Every weight of the network by its name, with the adapter merged: the contents of a file of the whole network.
    ///
    /// # Errors
    ///
    /// As [`Lora::merged`].
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

    /// Device, kind and memory format of the parameters.
    pub fn placement(&self) -> Placement {
        self.model.parameters().placement()
    }

    /// What the network was trained to output.
    pub fn prediction_type(&self) -> PredictionType {
        self.prediction_type
    }

    /// Whether the network has a table of classes.
    pub fn is_class_conditional(&self) -> bool {
        self.model.config().num_class_embeds().is_some()
    }

    /// The raw output.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: as the network requires; `timesteps`: `[batch]`, `Int64`, in training timesteps
    /// - returns: the shape of `x_t`, `Float` (`Double` for samples of that kind)
    ///
    /// # Errors
    ///
    /// As [`Model::forward`]; [`Error::Observer`].
    pub fn output(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        self.pass("NetworkDenoiser::output", x_t, timesteps, conditioning, Model::forward)
    }

    /// One pass: `run` receives the network, samples in its kind, its time inputs and its conditioning.
    pub(crate) fn pass(
        &self,
        op: &'static str,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
        run: impl FnOnce(&Model, &Tensor, &Tensor, &Conditioning) -> Result<Tensor>,
    ) -> Result<Tensor> {
        ensure_real(op, "x_t", x_t).map_err(ddil_core::Error::from)?;
        ensure_dense(op, "timesteps", timesteps).map_err(ddil_core::Error::from)?;
        let time = self.time_inputs(timesteps)?;
        let conditioning = self.without_ignored(conditioning);
        let takes = self.model.conditioning_fields();
        conditioning.ensure_known(op, self.model.class_name(), &takes)?;
        let input = x_t.to_kind(self.placement().kind);
        let output = self.computing(x_t, || run(&self.model, &input, &time, &conditioning))?;
        let kind = if x_t.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let output = output.to_kind(kind);
        if let Some(observer) = &self.observer {
            observer
                .observe(x_t, timesteps, &output)
                .map_err(|source| Error::Observer { source })?;
        }
        Ok(output)
    }

    /// `compute` with the adapter switched and in the precision of the network.
    fn computing(&self, x_t: &Tensor, compute: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let adapter = self.adapter.as_ref();
        let _switched =
            adapter.map(|adapter| adapter.lora.switched(adapter.enabled)).transpose()?;
        // One guard per pass: the cache of cast weights must not outlive it, or a pass with gradients would reuse
        // weights cast by one without.
        let autocast = self.precision.autocast();
        let _autocast = autocast.map(|kind| Autocast::new(x_t.device(), kind)).transpose()?;
        compute()
    }

    fn time_inputs(&self, timesteps: &Tensor) -> Result<Tensor> {
        Ok(match *self.model {
            Model::Mlp(_) => timesteps.shallow_clone(),
            _ => self.schedule.time_inputs_at(timesteps)?,
        })
    }

    /// The conditioning without the parts that are [ignored](Self::ignoring).
    fn without_ignored(&self, conditioning: &Conditioning) -> Conditioning {
        let ignored = self.ignored_parts.iter();
        ignored.fold(conditioning.shallow_clone(), |rest, name| rest.without(name))
    }

    /// `error` as an error of [`Denoiser`] and [`Discriminator`](ddil_core::Discriminator).
    pub(crate) fn to_core(&self, error: Error) -> ddil_core::Error {
        let network = self.model.class_name();
        match error {
            Error::MissingPart { part: field, .. } => {
                ddil_core::Error::ConditioningMissing { network: network.to_owned(), field }
            }
            Error::Core(error) => error,
            error => ddil_core::Error::network(network, error),
        }
    }
}

/// Checks an `Mlp` with a skip connection, which has its own prediction type and schedule.
fn ensure_matches_skip(
    model: &Model,
    prediction_type: PredictionType,
    schedule: &NoiseSchedule,
) -> Result<()> {
    let Model::Mlp(mlp) = model else { return Ok(()) };
    let Some(skip) = &mlp.config().skip else { return Ok(()) };
    let refuse = |name, value, expected| {
        let op = "NetworkDenoiser::new";
        Err(ArgumentError::Value { op, name, value, expected }.into())
    };
    if prediction_type != PredictionType::Sample {
        let expected = "sample".to_owned();
        return refuse("prediction_type", prediction_type.as_str().to_owned(), expected);
    }
    if skip.schedule != *schedule.config() {
        let expected = format!("the network's, {:?}", skip.schedule);
        return refuse("schedule", format!("{:?}", schedule.config()), expected);
    }
    Ok(())
}

impl Denoiser for NetworkDenoiser {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let output = self
            .pass("Denoiser::predict", x_t, timesteps, conditioning, Model::forward)
            .map_err(|error| self.to_core(error))?;
        Ok(self.prediction_type.convert(&self.schedule, &output, x_t, timesteps)?)
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Estimate> {
        let timesteps = repeated_level(level, x_t)?;
        let output = self
            .pass("Denoiser::estimate", x_t, &timesteps, conditioning, Model::forward)
            .map_err(|error| self.to_core(error))?;
        Ok(Estimate::at_level(&self.schedule, self.prediction_type, output, level)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}
