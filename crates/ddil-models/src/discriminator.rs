//! Networks that distinguish a student's samples from real data.

mod head;

pub use head::{DiscriminatorHead, DiscriminatorHeadConfig};

use std::rc::Rc;

use ddil_core::{Conditioning, Discriminator};
use ddil_libtorch::ArgumentError;
use tch::Tensor;

use crate::denoiser::NetworkDenoiser;
use crate::error::Result;

/// A head on the features of a network, which is usually the fake score of DMD2, and is trained along with it.
///
/// Section 4.3 of [Yin et al. 2024](https://arxiv.org/abs/2405.14867). It shares the network of a [`NetworkDenoiser`],
/// with its precision, adapter and observer: the gradient of an adversarial loss reaches the head, the layers of the
/// network that compute the features, and `x_t`. With the parameters of both frozen it reaches `x_t` alone, which is
/// what a student requires.
///
/// # Example
///
/// ```
/// use ddil_core::{Conditioning, Discriminator};
/// use ddil_models::{
///     DiscriminatorHeadConfig, MlpConfig, ModelConfig, NetworkConfig, NetworkDenoiser, NetworkDiscriminator,
///     Placement,
/// };
/// use ddil_schedulers::{NoiseScheduleConfig, PredictionType};
/// use tch::{Tensor, kind};
///
/// let config = ModelConfig::Mlp(MlpConfig::default());
/// let model = config.build(Placement::default(), 0)?;
/// let head = DiscriminatorHeadConfig::for_model(&config)?.build(Placement::default(), 0)?;
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let fake_score = NetworkDenoiser::new(model, PredictionType::Epsilon, schedule)?;
/// let discriminator = NetworkDiscriminator::new(&fake_score, head)?;
///
/// let (x_t, t) = (Tensor::randn([4, 2], kind::FLOAT_CPU), Tensor::full([4], 500, kind::INT64_CPU));
/// assert_eq!(discriminator.logits(&x_t, &t, &Conditioning::none())?.size(), [4]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct NetworkDiscriminator {
    network: NetworkDenoiser,
    head: Rc<DiscriminatorHead>,
}

impl NetworkDiscriminator {
    /// A discriminator that shares `network`.
    ///
    /// # Errors
    ///
    /// [`Error::NoFeatures`](crate::Error::NoFeatures) for a `TorchScript` program; [`ArgumentError::Value`] for a head
    /// of another number of channels than the features of the network.
    pub fn new(network: &NetworkDenoiser, head: impl Into<Rc<DiscriminatorHead>>) -> Result<Self> {
        let head = head.into();
        let channels = head::num_features(&network.config())?;
        if head.config().in_channels != channels {
            let found = format!("a head for {} channels", head.config().in_channels);
            let expected =
                format!("a head for {channels} channels, those of the network's features");
            let op = "NetworkDiscriminator::new";
            return Err(ArgumentError::value(op, "head", found, expected).into());
        }
        Ok(Self { network: network.clone(), head })
    }

    /// The network that computes the features.
    pub fn network(&self) -> &NetworkDenoiser {
        &self.network
    }

    /// The head.
    pub fn head(&self) -> &DiscriminatorHead {
        &self.head
    }
}

impl Discriminator for NetworkDiscriminator {
    fn logits(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Tensor> {
        let (op, kind) = ("Discriminator::logits", self.head.parameters().placement().kind);
        let logits = self.network.pass(op, x_t, timesteps, conditioning, |model, x_t, time, c| {
            self.head.forward(&model.features(x_t, time, c)?.to_kind(kind))
        });
        logits.map_err(|error| self.network.to_core(error))
    }
}
