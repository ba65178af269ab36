//! Networks as denoisers: what they say is read as clean data and noise.

use std::borrow::Borrow;

use ddil_core::{Conditioning, Denoiser};
use ddil_libtorch::ArgumentError;
use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Prediction, PredictionType};
use tch::Tensor;

use crate::error::Error;
use crate::model::Model;

/// A network together with what it was trained to say and the schedule it was trained on.
///
/// `N` is the network itself, a reference to it, or an `Rc` where a trainer keeps its own handle.
///
/// Networks on a variance-preserving schedule are told the timestep, others what
/// [`NoiseSchedule::time_inputs_at`] makes of it.
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
#[derive(Debug)]
pub struct NetworkDenoiser<N> {
    network: N,
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
}

impl<N: Borrow<Model>> NetworkDenoiser<N> {
    /// Puts the three together.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] if what the network says has no meaning on that schedule;
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) if an [`Mlp`](crate::Mlp) with a skip connection, whose output is clean data, is to
    /// be read as something else or on another schedule than its own.
    pub fn new(
        network: N,
        prediction_type: PredictionType,
        schedule: NoiseSchedule,
    ) -> crate::Result<Self> {
        prediction_type.ensure_defined_on(&schedule)?;
        if let Model::Mlp(mlp) = network.borrow()
            && let Some(skip) = &mlp.config().skip
        {
            let refuse = |name, found, expected| {
                Err(Error::Argument(ArgumentError::Value {
                    op: "NetworkDenoiser::new",
                    name,
                    value: found,
                    expected,
                }))
            };
            if prediction_type != PredictionType::Sample {
                let (found, expected) = (prediction_type.as_str().to_owned(), "sample".to_owned());
                return refuse("prediction_type", found, expected);
            }
            if skip.schedule != *schedule.config() {
                let found = format!("{:?}", schedule.config());
                return refuse(
                    "schedule",
                    found,
                    format!("that of the network, {:?}", skip.schedule),
                );
            }
        }
        Ok(Self { network, prediction_type, schedule })
    }

    /// The network.
    pub fn network(&self) -> &Model {
        self.network.borrow()
    }

    /// What the network was trained to say.
    pub fn prediction_type(&self) -> PredictionType {
        self.prediction_type
    }
}

impl<N: Borrow<Model>> Denoiser for NetworkDenoiser<N> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let (network, schedule) = (self.network.borrow(), &self.schedule);
        let op = "Denoiser::predict";
        let output = ask(op, (network, schedule), (x_t, timesteps), conditioning, |x_t, time| {
            network.forward(x_t, time, conditioning)
        })?;
        Ok(self.prediction_type.convert(&self.schedule, &output, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

/// Asks a network in the kind of its parameters and with the time it knows, and says whose fault it is if that fails.
pub(crate) fn ask(
    op: &'static str,
    (network, schedule): (&Model, &NoiseSchedule),
    (x_t, timesteps): (&Tensor, &Tensor),
    conditioning: &Conditioning,
    answer: impl FnOnce(&Tensor, &Tensor) -> crate::Result<Tensor>,
) -> ddil_core::Result<Tensor> {
    ensure_only(op, network.class_name(), conditioning, &network.conditioning_fields())?;
    ddil_libtorch::ensure_real(op, "x_t", x_t)?;
    ddil_libtorch::ensure_dense(op, "timesteps", timesteps)?;
    let time = match (schedule.config(), network) {
        // An MLP may look the timestep up in its own schedule.
        (NoiseScheduleConfig::Vp(_), _) | (_, Model::Mlp(_)) => timesteps.shallow_clone(),
        _ => schedule.time_inputs_at(timesteps)?,
    };
    let input = x_t.to_kind(network.parameters().placement().kind);
    answer(&input, &time).map_err(|source| match source {
        Error::MissingClassLabels { .. } => missing(network, "class_labels"),
        Error::ConditioningPart { name, expected: true, .. } => missing(network, name),
        Error::GuidanceWeight { expected: true, .. } => missing(network, "guidance_weight"),
        source => ddil_core::Error::network(network.class_name(), source),
    })
}

fn missing(network: &Model, field: &'static str) -> ddil_core::Error {
    ddil_core::Error::ConditioningMissing { network: network.class_name().to_owned(), field }
}

/// Refuses a conditioning that says more than the network can be told.
pub(crate) fn ensure_only(
    op: &'static str,
    network: &'static str,
    conditioning: &Conditioning,
    fields: &[&str],
) -> ddil_core::Result<()> {
    conditioning.ensure_known(op, network, fields)
}
