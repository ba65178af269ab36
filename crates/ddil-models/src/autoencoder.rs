//! The autoencoder between images and latents, with the weight names and numbers of diffusers' `AutoencoderKL`.

mod blocks;
pub(crate) mod config;

pub use config::{AutoencoderKLConfig, DecoderBlockType, EncoderBlockType};

use std::path::Path;

use ddil_files::Invalid;
use ddil_libtorch::{Generator, ensure_real, ensure_shape};
use tch::{Kind, Tensor};

use crate::autoencoder::blocks::{Decoder, Encoder};
use crate::config::{FILE_NAME, NetworkConfig, UnknownKeys};
use crate::error::{Error, Result};
use crate::layers::{Conv2d, Output, attention};
use crate::parameters::{Builder, Parameters, Placement, Values};
use crate::weights::{self, WeightFiles};

const ENCODE: &str = "AutoencoderKL::encode";
const DECODE: &str = "AutoencoderKL::decode";
const SCALE: &str = "AutoencoderKL::scale";

/// Log-variances are clamped to this range, as in diffusers.
const LOGVAR_RANGE: [f64; 2] = [-30.0, 20.0];

/// The variational autoencoder of latent diffusion ([Rombach et al. 2021](https://arxiv.org/abs/2112.10752), section
/// 3.1); built from an [`AutoencoderKLConfig`] or by [`Self::from_folder`].
///
/// It takes no timestep and is therefore not a [`Model`](crate::Model). Images are in `[-1, 1]`. A diffusion model
/// uses latents scaled to about unit variance, `z = (latents - shift_factor) * scaling_factor`, as in
/// [`Self::encode_scaled`] and [`Self::decode_scaled`]. Parameters have the names of
/// diffusers' files, and outputs agree with diffusers' up to rounding.
///
/// # Half precision
///
/// SDXL's activations exceed the range of `Half`. With `force_upcast` a network requested in `Half` therefore keeps its
/// parameters in `Float` and computes in `Float`. It takes images and latents of any floating-point kind, and returns
/// images and scaled latents in the kind of its input. The range of `BFloat16` suffices, so it is used as requested.
///
/// # Old names
///
/// In files of 2022, such as that of Stable Diffusion 1.5, the attention layers are named `query`, `key`, `value` and
/// `proj_attn`, some with weights of shape `[channels, channels, 1, 1]`. Such names below
/// `encoder.mid_block.attentions.0` and `decoder.mid_block.attentions.0` are read as `to_q`, `to_k`, `to_v` and
/// `to_out.0`, and the weights without their last two dimensions; [`Self::renamed`] lists them. A file with both names
/// for one parameter is an error. [`Self::save_to_folder`] writes the new names.
///
/// # Example
///
/// ```
/// use ddil_libtorch::Generator;
/// use ddil_models::{AutoencoderKLConfig, NetworkConfig, Placement};
/// use tch::{Device, Tensor, kind};
///
/// let config = AutoencoderKLConfig {
///     block_out_channels: vec![4, 4, 8, 8],
///     norm_num_groups: 4,
///     layers_per_block: 1,
///     ..AutoencoderKLConfig::sd15()
/// };
/// let vae = config.build(Placement::default(), 0)?;
///
/// let images = Tensor::rand([2, 3, 16, 24], kind::FLOAT_CPU) * 2.0 - 1.0;
/// let mut generator = Generator::new(Device::Cpu, 7)?;
/// let latents = vae.encode_scaled(&images, &mut generator)?;
/// assert_eq!(latents.size(), [2, 4, 2, 3]);
/// assert_eq!(vae.decode_scaled(&latents)?.size(), images.size());
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct AutoencoderKL {
    config: AutoencoderKLConfig,
    parameters: Parameters,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    statistics: Option<Statistics>,
    /// Whether the network computes in `Float` instead of `Half`.
    upcasts: bool,
    sliced: bool,
    renamed: Vec<(String, String)>,
}

/// Mean and standard deviation of each latent channel, `[1, channels, 1, 1]`.
#[derive(Debug)]
struct Statistics {
    mean: Tensor,
    std: Tensor,
}

impl NetworkConfig for AutoencoderKLConfig {
    type Network = AutoencoderKL;

    const CLASS_NAME: &'static str = "AutoencoderKL";

    fn problems(&self) -> Vec<Invalid> {
        self.check()
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<AutoencoderKL> {
        AutoencoderKL::new(self, placement, values)
    }

    fn parameters_of(network: &AutoencoderKL) -> &Parameters {
        network.parameters()
    }

    fn new_name(old: &str) -> Option<String> {
        new_name(old)
    }

    fn load(network: &mut AutoencoderKL, path: &Path) -> Result<()> {
        network.renamed = weights::load_renamed(&network.parameters.named(), path, new_name)?;
        Ok(())
    }
}

impl AutoencoderKL {
    fn new(config: &AutoencoderKLConfig, mut placement: Placement, values: Values) -> Result<Self> {
        let upcasts = config.force_upcast && placement.kind == Kind::Half;
        if upcasts {
            placement.kind = Kind::Float;
        }
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();
        let latent_channels = i64::from(config.latent_channels);
        let encoder = Encoder::new(root.at("encoder"), config)?;
        let decoder = Decoder::new(root.at("decoder"), config)?;
        let mut pointwise = |name, channels| Conv2d::new(root.at(name), channels, channels, 1);
        let quant_conv = config
            .use_quant_conv
            .then(|| pointwise("quant_conv", 2 * latent_channels))
            .transpose()?;
        let post_quant_conv = config
            .use_post_quant_conv
            .then(|| pointwise("post_quant_conv", latent_channels))
            .transpose()?;
        let statistics = statistics(config, placement)?;
        Ok(Self {
            config: config.clone(),
            parameters: builder.finish(),
            encoder,
            decoder,
            quant_conv,
            post_quant_conv,
            statistics,
            upcasts,
            sliced: false,
            renamed: Vec::new(),
        })
    }

    /// Loads a network from a diffusers folder: `config.json` and the weights found by [`WeightFiles::DIFFUSION`], of
    /// `variant` (such as `fp16`) if one is given.
    ///
    /// # Errors
    ///
    /// As [`NetworkConfig::from_file`], [`WeightFiles::find`] and [`NetworkConfig::build_from`].
    pub fn from_folder(
        folder: impl AsRef<Path>,
        placement: Placement,
        unknown_keys: UnknownKeys,
        variant: Option<&str>,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(FILE_NAME);
        let config = AutoencoderKLConfig::from_file(path, unknown_keys)?;
        let files = WeightFiles { variant, ..WeightFiles::DIFFUSION };
        config.build_from(placement, files.find(folder)?)
    }

    /// Writes the network to a folder in diffusers' layout, creating it if needed: `config.json` and
    /// `diffusion_pytorch_model.safetensors`.
    ///
    /// # Errors
    ///
    /// As [`WeightFiles::save`].
    pub fn save_to_folder(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        WeightFiles::DIFFUSION.save(&self.parameters.named(), folder)?;
        weights::write_text(&folder.join(FILE_NAME), &self.config.to_json())
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> &AutoencoderKLConfig {
        &self.config
    }

    /// The parameters, under their names in files.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The [old names](#old-names) in the file of the parameters, each with the current name it was read as.
    pub fn renamed(&self) -> &[(String, String)] {
        &self.renamed
    }

    /// Whether a batch is processed one sample at a time, which needs the memory of one; off in a new network.
    ///
    /// The numbers are the same up to rounding.
    pub fn set_sliced(&mut self, sliced: bool) {
        self.sliced = sliced;
    }

    /// The distribution of the latents of images, not scaled for a diffusion model.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[batch, in_channels, height, width]` in `[-1, 1]`, height and width multiples of the downsampling
    ///   factor (8 in Stable Diffusion), of the parameters' kind unless the network
    ///   [computes in `Float`](#half-precision)
    /// - returns: mean and logarithm of the variance, `[batch, latent_channels, height / 8, width / 8]`, of the
    ///   parameters' kind
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) and
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind) if `images` does not match, [`Error::Torch`] for
    /// errors of libtorch.
    pub fn encode(&self, images: &Tensor) -> Result<DiagonalGaussian> {
        self.ensure_images(images)?;
        let images = self.prepare(images)?;
        let run = || {
            let moments = self.by_sample(&images, |images| {
                let moments = self.encoder.forward(images)?;
                match &self.quant_conv {
                    Some(conv) => conv.forward(&moments),
                    None => Ok(moments),
                }
            })?;
            let channels = i64::from(self.config.latent_channels);
            let [low, high] = LOGVAR_RANGE;
            Ok(DiagonalGaussian {
                mean: moments.f_narrow(1, 0, channels)?,
                logvar: moments.f_narrow(1, channels, channels)?.f_clamp(low, high)?,
            })
        };
        run().map_err(Error::torch(ENCODE))
    }

    /// Decodes latents that are not scaled for a diffusion model to images.
    ///
    /// # Shapes and units
    ///
    /// - `latents`: `[batch, latent_channels, height, width]`, of the parameters' kind unless the network
    ///   [computes in `Float`](#half-precision)
    /// - returns: `[batch, out_channels, 8 * height, 8 * width]` (in Stable Diffusion), about `[-1, 1]` and not
    ///   clamped
    ///
    /// # Errors
    ///
    /// As [`Self::encode`], of `latents`.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        ensure_latents(DECODE, latents, self.config.latent_channels)?;
        self.decode_prepared(&self.prepare(latents)?, latents.kind())
    }

    /// Encodes images to latents for a diffusion model: a sample of [`Self::encode`], scaled.
    ///
    /// For the most probable latents instead of a sample: `vae.scale(vae.encode(&images)?.mode())`.
    ///
    /// # Shapes and units
    ///
    /// - `images`: as in [`Self::encode`]
    /// - returns: as the mean there, about unit variance, of the kind of `images`
    ///
    /// # Errors
    ///
    /// As [`Self::encode`] and [`DiagonalGaussian::sample`].
    pub fn encode_scaled(&self, images: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        let latents = self.scale(&self.encode(images)?.sample(generator)?)?;
        self.restore(latents, images.kind()).map_err(Error::torch(ENCODE))
    }

    /// Decodes latents of a diffusion model to images.
    ///
    /// # Shapes and units
    ///
    /// - as [`Self::decode`], latents of about unit variance
    ///
    /// # Errors
    ///
    /// As [`Self::decode`].
    pub fn decode_scaled(&self, latents: &Tensor) -> Result<Tensor> {
        ensure_latents(DECODE, latents, self.config.latent_channels)?;
        // In the kind of the computation: in `Half` the division would lose three digits.
        let latents_prepared = self.prepare(latents)?;
        self.decode_prepared(&self.unscale(&latents_prepared)?, latents.kind())
    }

    /// Latents scaled for a diffusion model: `(latents - shift_factor) * scaling_factor`, or
    /// `(latents - latents_mean) * scaling_factor / latents_std` where those are given.
    ///
    /// # Shapes and units
    ///
    /// - `latents`: `[batch, latent_channels, height, width]`
    /// - returns: the same shape and kind
    ///
    /// # Errors
    ///
    /// As [`Self::decode`].
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        ensure_latents(SCALE, latents, self.config.latent_channels)?;
        let factor = self.config.scaling_factor;
        let run = || {
            let Some(Statistics { mean, std }) = &self.statistics else {
                return match self.config.shift_factor {
                    Some(shift) => latents.f_sub_scalar(shift)?.f_mul_scalar(factor),
                    None => latents.f_mul_scalar(factor),
                };
            };
            let kind = latents.kind();
            let centred = latents.f_sub(&mean.f_to_kind(kind)?)?;
            centred.f_mul_scalar(factor)?.f_div(&std.f_to_kind(kind)?)
        };
        run().map_err(Error::torch(SCALE))
    }

    /// The inverse of [`Self::scale`].
    ///
    /// # Shapes and units
    ///
    /// - as [`Self::scale`]
    ///
    /// # Errors
    ///
    /// As [`Self::scale`].
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        ensure_latents(SCALE, latents, self.config.latent_channels)?;
        let factor = self.config.scaling_factor;
        let run = || {
            let Some(Statistics { mean, std }) = &self.statistics else {
                let unscaled = latents.f_div_scalar(factor)?;
                return match self.config.shift_factor {
                    Some(shift) => unscaled.f_add_scalar(shift),
                    None => Ok(unscaled),
                };
            };
            let kind = latents.kind();
            let spread = latents.f_mul(&std.f_to_kind(kind)?)?;
            spread.f_div_scalar(factor)?.f_add(&mean.f_to_kind(kind)?)
        };
        run().map_err(Error::torch(SCALE))
    }

    fn decode_prepared(&self, latents: &Tensor, kind: Kind) -> Result<Tensor> {
        let run = || {
            let images = self.by_sample(latents, |latents| match &self.post_quant_conv {
                Some(conv) => self.decoder.forward(&conv.forward(latents)?),
                None => self.decoder.forward(latents),
            })?;
            self.restore(images, kind)
        };
        run().map_err(Error::torch(DECODE))
    }

    /// Runs on the whole batch, or sample by sample.
    fn by_sample(&self, x: &Tensor, forward: impl Fn(&Tensor) -> Output) -> Output {
        let batch = x.size()[0];
        if !self.sliced || batch < 2 {
            return forward(x);
        }
        let slices = (0..batch).map(|i| forward(&x.f_narrow(0, i, 1)?));
        Tensor::f_cat(&slices.collect::<std::result::Result<Vec<_>, _>>()?, 0)
    }

    /// Casts an input to the kind and memory format of the parameters.
    fn prepare(&self, x: &Tensor) -> Result<Tensor> {
        let x = if self.upcasts {
            x.f_to_kind(Kind::Float).map_err(Error::torch("AutoencoderKL"))?
        } else {
            x.shallow_clone()
        };
        if self.parameters.placement().channels_last {
            return Ok(ddil_libtorch::channels_last(&x)?);
        }
        Ok(x)
    }

    /// Casts an output back to the kind of the input.
    fn restore(&self, x: Tensor, kind: Kind) -> Output {
        if self.upcasts { x.f_to_kind(kind) } else { Ok(x) }
    }

    fn ensure_images(&self, images: &Tensor) -> Result<()> {
        let (op, name) = (ENCODE, "images");
        let channels = i64::from(self.config.in_channels);
        let step = self.config.downscaling();
        ensure_real(op, name, images)?;
        let fits = matches!(images.size()[..], [batch, c, height, width] if batch > 0 && c == channels
            && height > 0 && width > 0 && height % step == 0 && width % step == 0);
        let expected = || {
            format!("[batch, {channels}, height, width] with height and width multiples of {step}")
        };
        Ok(ensure_shape(op, name, images, fits, expected)?)
    }
}

fn ensure_latents(op: &'static str, latents: &Tensor, channels: u32) -> Result<()> {
    let name = "latents";
    ensure_real(op, name, latents)?;
    let fits = matches!(latents.size()[..], [batch, c, height, width]
        if batch > 0 && c == i64::from(channels) && height > 0 && width > 0);
    let expected = || format!("[batch, {channels}, height, width]");
    Ok(ensure_shape(op, name, latents, fits, expected)?)
}

fn statistics(config: &AutoencoderKLConfig, placement: Placement) -> Result<Option<Statistics>> {
    let (Some(mean), Some(std)) = (&config.latents_mean, &config.latents_std) else {
        return Ok(None);
    };
    let per_channel = |values: &[f64]| {
        Tensor::f_from_slice(values)?
            .f_to_device(placement.device)?
            .f_to_kind(placement.kind)?
            .f_view([1, -1, 1, 1])
    };
    let build = || Ok(Statistics { mean: per_channel(mean)?, std: per_channel(std)? });
    build().map(Some).map_err(Error::torch("AutoencoderKL"))
}

/// The current name of a parameter with an [old name](AutoencoderKL#old-names).
fn new_name(old: &str) -> Option<String> {
    let paths = ["encoder.mid_block.attentions.0.", "decoder.mid_block.attentions.0."];
    paths.iter().find_map(|path| attention::new_name(path, old.strip_prefix(path)?))
}

/// A normal distribution with a diagonal covariance: the posterior of an image's latents in an [`AutoencoderKL`].
///
/// # Example
///
/// ```
/// use ddil_models::DiagonalGaussian;
/// use tch::{Tensor, kind};
///
/// let standard = DiagonalGaussian {
///     mean: Tensor::zeros([2, 4, 8, 8], kind::FLOAT_CPU),
///     logvar: Tensor::zeros([2, 4, 8, 8], kind::FLOAT_CPU),
/// };
/// assert_eq!(Vec::<f32>::try_from(standard.kl()?)?, [0.0, 0.0]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DiagonalGaussian {
    /// The mean.
    pub mean: Tensor,
    /// The logarithm of the variance; between -30 and 20 in the output of a network.
    pub logvar: Tensor,
}

impl DiagonalGaussian {
    /// The most probable value: the mean.
    pub fn mode(&self) -> &Tensor {
        &self.mean
    }

    /// A sample, `mean + exp(logvar / 2) * noise`; differentiable in mean and variance.
    ///
    /// The noise equals that of diffusers with a `torch.Generator` of the same seed and device.
    ///
    /// # Shapes and units
    ///
    /// - returns: shape, kind and device of the mean
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`] if the generator fails, [`Error::Torch`] if mean and variance do not match.
    pub fn sample(&self, generator: &mut Generator) -> Result<Tensor> {
        let Self { mean, logvar } = self;
        let noise = generator.normal(mean.size(), mean.kind())?;
        let run = || {
            let noise = noise.f_to_device(mean.device())?;
            mean.f_add(&logvar.f_mul_scalar(0.5)?.f_exp()?.f_mul(&noise)?)
        };
        run().map_err(Error::torch("DiagonalGaussian::sample"))
    }

    /// The Kullback-Leibler divergence from the standard normal distribution, one value per sample: the sum of
    /// `(mean^2 + exp(logvar) - 1 - logvar) / 2`.
    ///
    /// # Shapes and units
    ///
    /// - returns: `[batch]`, in nats, `Double` if the mean is and `Float` otherwise
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if mean and variance do not match.
    pub fn kl(&self) -> Result<Tensor> {
        let Self { mean, logvar } = self;
        let kind = if mean.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let run = || {
            let excess = mean.f_square()?.f_add(&logvar.f_exp()?)?.f_sub_scalar(1.0)?;
            let dims: Vec<i64> = (1..i64::try_from(mean.dim()).unwrap_or(1)).collect();
            excess.f_sub(logvar)?.f_sum_dim_intlist(&dims[..], false, kind)?.f_mul_scalar(0.5)
        };
        run().map_err(Error::torch("DiagonalGaussian::kl"))
    }
}

#[cfg(test)]
mod tests {
    use super::new_name;

    #[test]
    fn old_names_become_new_ones_in_the_attention_alone() {
        let new = |name| new_name(&format!("decoder.mid_block.attentions.0.{name}"));
        let path = |name| Some(format!("decoder.mid_block.attentions.0.{name}"));
        assert_eq!(new("query.weight"), path("to_q.weight"));
        assert_eq!(new("key.bias"), path("to_k.bias"));
        assert_eq!(new("value.weight"), path("to_v.weight"));
        assert_eq!(new("proj_attn.bias"), path("to_out.0.bias"));
        assert_eq!(new("to_q.weight"), None);
        assert_eq!(new("query.scale"), None);
        assert_eq!(new_name("encoder.mid_block.attentions.1.query.weight"), None);
        assert_eq!(new_name("query.weight"), None);
    }
}
