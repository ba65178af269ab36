//! Networks that tell what a student made from real data.

mod head;

pub use head::{DiscriminatorHead, DiscriminatorHeadConfig};

use std::borrow::Borrow;

use ddil_core::{Conditioning, Discriminator};
use ddil_libtorch::ArgumentError;
use ddil_schedulers::NoiseSchedule;
use tch::Tensor;

use crate::denoiser::ask;
use crate::error::{Error, Result};
use crate::model::Model;

/// A head on the features of a network, which is usually the fake score of DMD2 and learns beside it.
///
/// Section 4.3 of [Yin et al. 2024](https://arxiv.org/abs/2405.14867). The network is the very one that a
/// [`NetworkDenoiser`](crate::NetworkDenoiser) asks: share a reference or an `Rc`, and the gradient of an adversarial
/// loss reaches the head, those layers of the network that the features come from, and `x_t`. Freeze the parameters of
/// both, and it reaches `x_t` alone, which is what a student needs.
///
/// # Example
///
/// ```
/// use ddil_core::{Conditioning, Discriminator};
/// use ddil_models::{
///     DiscriminatorHeadConfig, MlpConfig, ModelConfig, NetworkDenoiser, NetworkDiscriminator, Placement,
/// };
/// use ddil_schedulers::{NoiseScheduleConfig, PredictionType};
/// use tch::{Tensor, kind};
///
/// let config = ModelConfig::Mlp(MlpConfig::default());
/// let model = config.build(Placement::default(), 0)?;
/// let head = DiscriminatorHeadConfig::for_model(&config)?.build(Placement::default(), 0)?;
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let fake_score = NetworkDenoiser::new(&model, PredictionType::Epsilon, schedule.clone())?;
/// let discriminator = NetworkDiscriminator::new(&model, &head, schedule)?;
///
/// let (x_t, t) = (Tensor::randn([4, 2], kind::FLOAT_CPU), Tensor::full([4], 500, kind::INT64_CPU));
/// assert_eq!(discriminator.logits(&x_t, &t, &Conditioning::none())?.size(), [4]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NetworkDiscriminator<N, H> {
    network: N,
    head: H,
    schedule: NoiseSchedule,
}

impl<N: Borrow<Model>, H: Borrow<DiscriminatorHead>> NetworkDiscriminator<N, H> {
    /// Puts the parts together; the schedule is the one the network is trained on.
    ///
    /// # Errors
    ///
    /// [`Error::NoFeatures`] for a `TorchScript` program; [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) if the head is made for
    /// features with another number of channels.
    pub fn new(network: N, head: H, schedule: NoiseSchedule) -> Result<Self> {
        let there = head::num_features(&network.borrow().config())?;
        let wanted = head.borrow().config().in_channels;
        if wanted != there {
            return Err(Error::Argument(ArgumentError::Value {
                op: "NetworkDiscriminator::new",
                name: "head",
                value: format!("made for {wanted} channels"),
                expected: format!("{there} channels, the features of the network"),
            }));
        }
        Ok(Self { network, head, schedule })
    }

    /// The network that the features come from.
    pub fn network(&self) -> &Model {
        self.network.borrow()
    }

    /// The head.
    pub fn head(&self) -> &DiscriminatorHead {
        self.head.borrow()
    }
}

impl<N: Borrow<Model>, H: Borrow<DiscriminatorHead>> Discriminator for NetworkDiscriminator<N, H> {
    fn logits(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Tensor> {
        let (network, schedule) = (self.network(), &self.schedule);
        let op = "Discriminator::logits";
        let logits = ask(op, (network, schedule), (x_t, timesteps), conditioning, |x_t, time| {
            self.head().forward(&network.features(x_t, time, conditioning)?)
        })?;
        Ok(logits.to_kind(x_t.kind()))
    }
}
