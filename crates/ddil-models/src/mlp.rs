//! A small network for vectors.

use std::f64::consts::PI;

use ddil_files::Invalid;
use ddil_libtorch::{ensure_real, ensure_shape};
use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Scales};
use serde::{Deserialize, Serialize};
use tch::{Kind, TchError, Tensor};

use crate::config::NetworkConfig;
use crate::error::{
    Error, Result, ensure_guidance_weight, ensure_labels, ensure_part, ensure_timesteps,
};
use crate::layers::embeddings::{GUIDANCE_SCALE, SinusoidalProjection, one_per_sample};
use crate::layers::{Activation, Embedding, Linear};
use crate::network_output::NetworkOutput;
use crate::parameters::{Builder, Joined, Parameters, Placement, Share, Values};

const FORWARD: &str = "Mlp::forward";

/// A skip connection around the network. Its output is clean data, and reasonable before any training.
///
/// `x0 = c_skip x_t + c_out F(c_in x_t)` with `s² = alpha² sigma_data² + sigma²`, `c_skip = alpha sigma_data² / s²`,
/// `c_out = sigma sigma_data / s`, `c_in = 1 / s`: equation 7 and table 1 of
/// [Karras et al. 2022](https://arxiv.org/abs/2206.00364), written for any alpha. With F = 0 it is the exact denoiser
/// of Gaussian data.
///
/// # Example
///
/// ```
/// use ddil_models::{MlpConfig, NetworkConfig, SkipConfig};
///
/// let skip = SkipConfig { sigma_data: 1.0, ..SkipConfig::default() };
/// let config = MlpConfig { skip: Some(skip), ..MlpConfig::default() };
/// config.ensure_valid()?;
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SkipConfig {
    /// Standard deviation of the data. Default 0.5.
    pub sigma_data: f64,
    /// The schedule of alpha and sigma. Default Stable Diffusion's.
    pub schedule: NoiseScheduleConfig,
}

impl Default for SkipConfig {
    fn default() -> Self {
        Self { sigma_data: 0.5, schedule: NoiseScheduleConfig::default() }
    }
}

/// The settings of an [`Mlp`].
///
/// # Example
///
/// ```
/// use ddil_models::{MlpConfig, NetworkConfig, Placement};
/// use tch::{Tensor, kind};
///
/// let mlp = MlpConfig { num_class_embeds: Some(5), ..MlpConfig::default() }.build(Placement::default(), 0)?;
/// let (x_t, timesteps) = (Tensor::randn([4, 2], kind::FLOAT_CPU), Tensor::full([4], 500, kind::INT64_CPU));
/// let labels = Tensor::from_slice(&[0_i64, 1, 2, 4]);
/// assert_eq!(mlp.forward(&x_t, &timesteps, Some(&labels), None)?.size(), [4, 2]);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MlpConfig {
    /// Length of a sample. Default 2.
    pub dim: u32,
    /// Width of each hidden layer. Default three of 64.
    pub hidden_widths: Vec<u32>,
    /// Sines and cosines of the input at frequencies pi, 2 pi, 4 pi, .. in addition to the input. Without them a small
    /// network cannot represent narrow modes. Default 2.
    pub fourier_octaves: u32,
    /// Sines and cosines of the timestep, and of the guidance weight. Default 32.
    pub time_features: u32,
    /// Number of class labels, a null class for guidance included; none for no classes, the default.
    pub num_class_embeds: Option<u32>,
    /// Length of the embedding of a class. Default 16.
    pub class_features: u32,
    /// Whether the network takes a guidance weight. Default false.
    pub embed_guidance: bool,
    /// The nonlinearity. Default silu.
    pub act_fn: Activation,
    /// A skip connection that makes the output clean data; none, the default, for a plain network.
    pub skip: Option<SkipConfig>,
}

impl Default for MlpConfig {
    fn default() -> Self {
        Self {
            dim: 2,
            hidden_widths: vec![64; 3],
            fourier_octaves: 2,
            time_features: 32,
            num_class_embeds: None,
            class_features: 16,
            embed_guidance: false,
            act_fn: Activation::Silu,
            skip: None,
        }
    }
}

impl MlpConfig {
    /// Input width of the last layer.
    pub(crate) fn num_features(&self) -> u32 {
        let inputs = || self.inputs().iter().sum::<i64>() as u32;
        self.hidden_widths.last().copied().unwrap_or_else(inputs)
    }

    /// The number of inputs of the first layer by kind: sample, timestep, guidance weight, class.
    fn inputs(&self) -> Vec<i64> {
        let weight = if self.embed_guidance { self.time_features } else { 0 };
        let class = if self.num_class_embeds.is_some() { self.class_features } else { 0 };
        let sample = self.dim * (1 + 2 * self.fourier_octaves);
        [sample, self.time_features, weight, class].map(i64::from).to_vec()
    }
}

impl NetworkConfig for MlpConfig {
    type Network = Mlp;

    const CLASS_NAME: &'static str = "Mlp";

    fn problems(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        let mut at_least = |key: &str, value: u32, min: u32| {
            if value < min {
                problems.push(Invalid::new(key, value, format!("at least {min}")));
            }
        };
        at_least("dim", self.dim, 1);
        at_least("time_features", self.time_features, 2);
        at_least("class_features", self.class_features, 1);
        at_least("num_class_embeds", self.num_class_embeds.unwrap_or(1), 1);
        for (i, &width) in self.hidden_widths.iter().enumerate() {
            at_least(&format!("hidden_widths[{i}]"), width, 1);
        }
        // Beyond this, neighbouring floats are further apart than a period.
        if self.fourier_octaves > 16 {
            problems.push(Invalid::new("fourier_octaves", self.fourier_octaves, "at most 16"));
        }
        if let Some(SkipConfig { sigma_data, .. }) = self.skip
            && !(sigma_data > 0.0 && sigma_data.is_finite())
        {
            problems.push(Invalid::new("skip.sigma_data", sigma_data, "finite and above 0"));
        }
        problems
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<Mlp> {
        Mlp::new(self, placement, values)
    }

    fn parameters_of(network: &Mlp) -> &Parameters {
        network.parameters()
    }
}

/// A network of linear layers for vectors, conditioned on timestep, class and guidance weight.
///
/// Parameters are named `layers.0.weight`, `layers.0.bias`, .. and `class_embedding.weight`.
///
/// # Example
///
/// ```
/// use ddil_models::{MlpConfig, NetworkConfig, Placement, SkipConfig};
/// use tch::{Tensor, kind};
///
/// // With a skip connection the output is clean data, and already close to it at the last timestep.
/// let config = MlpConfig { skip: Some(SkipConfig::default()), ..MlpConfig::default() };
/// let mlp = config.build(Placement::default(), 0)?;
/// let (x_t, timesteps) = (Tensor::ones([4, 2], kind::FLOAT_CPU), Tensor::zeros([4], kind::INT64_CPU));
/// let x0 = mlp.forward(&x_t, &timesteps, None, None)?;
/// assert!((x0 - &x_t).abs().max().double_value(&[]) < 0.1);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct Mlp {
    config: MlpConfig,
    parameters: Parameters,
    hidden: Vec<Linear>,
    last: Linear,
    class_embedding: Option<Embedding>,
    schedule: Option<NoiseSchedule>,
}

impl Mlp {
    fn new(config: &MlpConfig, placement: Placement, values: Values) -> Result<Self> {
        let schedule = config.skip.as_ref().map(|skip| skip.schedule.build()).transpose()?;
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();
        let class_features = config.class_features.into();
        let class_embedding = config
            .num_class_embeds
            .map(|len| Embedding::new(root.at("class_embedding"), len.into(), class_features))
            .transpose()?;
        let inputs = config.inputs();
        let mut width = inputs.iter().sum();
        let mut hidden = Vec::with_capacity(config.hidden_widths.len());
        for (i, &next) in config.hidden_widths.iter().enumerate() {
            hidden.push(Linear::new(root.at(&format!("layers.{i}")), width, next.into())?);
            width = next.into();
        }
        let name = format!("layers.{}", hidden.len());
        let last = Linear::new(root.at(&name), width, config.dim.into())?;
        let joined = Joined { axis: 1, parts: inputs, share: Share::First };
        root.mark("layers.0.weight", joined);
        let (config, parameters) = (config.clone(), builder.finish());
        Ok(Self { config, parameters, hidden, last, class_embedding, schedule })
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> &MlpConfig {
        &self.config
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Names of the parts of a [`Conditioning`](ddil_core::Conditioning) that the network requires.
    pub(crate) fn conditioning_fields(&self) -> Vec<&'static str> {
        let fields = [
            ("class_labels", self.config.num_class_embeds.is_some()),
            ("guidance_weight", self.config.embed_guidance),
        ];
        fields.into_iter().filter_map(|(name, takes)| takes.then_some(name)).collect()
    }

    /// The output for noisy samples: clean data if there is a skip connection, otherwise what the network was trained
    /// to predict.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, dim]` or `[batch, ..]` with `dim` values per sample, kind of the parameters
    /// - `timesteps`: `[batch]` or `[]`, counted from 0; `[batch]`, `Int64` with a skip connection
    /// - `class_labels`: `[batch]`, `Int64` (their range is checked only on the CPU)
    /// - `guidance_weight`: `[batch]`, floating point, scale minus one
    /// - returns: the shape of `x_t`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind), [`Error::MissingPart`], [`Error::UnexpectedPart`],
    /// [`Error::ClassLabelOutOfRange`]; [`Error::Scheduler`] for timesteps outside of the schedule; [`Error::Torch`].
    pub fn forward(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
        guidance_weight: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(self.forward_with_features(x_t, timesteps, class_labels, guidance_weight)?.sample)
    }

    /// As [`Self::forward`], with the input of the last layer as features for a discriminator.
    ///
    /// # Shapes and units
    ///
    /// - returns: as `sample` the output; as `features` `[batch, width]`, with the last of `hidden_widths`, after the
    ///   nonlinearity; both from one pass
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn forward_with_features(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
        guidance_weight: Option<&Tensor>,
    ) -> Result<NetworkOutput> {
        self.ensure_inputs(x_t, timesteps, class_labels, guidance_weight)?;
        let batch = x_t.size()[0];
        let flat = x_t.f_reshape([batch, -1]).map_err(Error::torch(FORWARD))?;
        let extras = |kind| self.extras(timesteps, class_labels, guidance_weight, batch, kind);
        let run = |x: &Tensor| self.network(x, &extras(flat.kind())?);
        let (output, features) = match (&self.config.skip, &self.schedule) {
            (Some(skip), Some(schedule)) => {
                let Scales { alpha, sigma } = schedule.scales_at(timesteps, &flat)?;
                let data = skip.sigma_data;
                let variance = alpha.square() * (data * data) + sigma.square();
                let scale = variance.rsqrt();
                let (network, features) = run(&(&flat * &scale)).map_err(Error::torch(FORWARD))?;
                let skipped = alpha * (data * data) / variance * &flat;
                (skipped + sigma * scale * data * network, features)
            }
            _ => run(&flat).map_err(Error::torch(FORWARD))?,
        };
        let sample = output.f_reshape(x_t.size()).map_err(Error::torch(FORWARD))?;
        Ok(NetworkOutput { sample, features })
    }

    /// The output and the input of the last layer.
    fn network(
        &self,
        x: &Tensor,
        extras: &[Tensor],
    ) -> std::result::Result<(Tensor, Tensor), TchError> {
        let mut features = vec![x.shallow_clone()];
        for octave in 0..self.config.fourier_octaves {
            let angles = x.f_mul_scalar(PI * f64::from(1_u32 << octave))?;
            features.extend([angles.f_sin()?, angles.f_cos()?]);
        }
        features.extend(extras.iter().map(Tensor::shallow_clone));
        let mut hidden = Tensor::f_cat(&features, 1)?;
        for layer in &self.hidden {
            hidden = self.config.act_fn.forward(&layer.forward(&hidden)?)?;
        }
        Ok((self.last.forward(&hidden)?, hidden))
    }

    /// Features of timestep, class and guidance weight.
    fn extras(
        &self,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
        guidance_weight: Option<&Tensor>,
        batch: i64,
        kind: Kind,
    ) -> std::result::Result<Vec<Tensor>, TchError> {
        let width = self.config.time_features.into();
        let projection = SinusoidalProjection { width, cosines_first: true, freq_shift: 0.0 };
        let time = projection.forward(&one_per_sample(timesteps, batch)?)?;
        let mut extras = vec![time.f_to_kind(kind)?];
        if let Some(weight) = guidance_weight {
            let weight = weight.f_to_kind(Kind::Float)?.f_mul_scalar(GUIDANCE_SCALE)?;
            extras.push(projection.forward(&weight)?.f_to_kind(kind)?);
        }
        if let (Some(embedding), Some(labels)) = (&self.class_embedding, class_labels) {
            extras.push(embedding.forward(labels)?);
        }
        Ok(extras)
    }

    fn ensure_inputs(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
        guidance_weight: Option<&Tensor>,
    ) -> Result<()> {
        let op = FORWARD;
        ensure_real(op, "x_t", x_t)?;
        let (size, dim) = (x_t.size(), i64::from(self.config.dim));
        let fits = size.len() >= 2 && size[1..].iter().product::<i64>() == dim;
        let expected = || format!("[batch, {dim}], or as many values per sample");
        ensure_shape(op, "x_t", x_t, fits, expected)?;
        let batch = size[0];
        ensure_timesteps(op, timesteps, batch)?;
        let num_classes = self.config.num_class_embeds;
        ensure_part(op, "class_labels", class_labels, num_classes.is_some())?;
        if let (Some(len), Some(labels)) = (num_classes, class_labels) {
            ensure_labels(op, labels, batch, i64::from(len) - 1)?;
        }
        ensure_guidance_weight(op, guidance_weight, batch, self.config.embed_guidance)
    }
}
