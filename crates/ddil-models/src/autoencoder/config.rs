//! The settings of an [`AutoencoderKL`](crate::AutoencoderKL), with the keys of diffusers.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::count_problems;
use crate::layers::Activation;
use crate::unet::pixels_config::{SampleSize, level_problems};

/// Upper bound of the number of halvings; no image has as many.
const MAX_LEVELS: usize = 16;

/// A level of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EncoderBlockType {
    /// Residual blocks.
    DownEncoderBlock2D,
}

/// A level of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DecoderBlockType {
    /// Residual blocks.
    UpDecoderBlock2D,
}

/// The settings of an [`AutoencoderKL`](crate::AutoencoderKL); names, defaults and file format are those of diffusers'
/// class of that name.
///
/// # Example
///
/// ```
/// use ddil_models::{AutoencoderKLConfig, NetworkConfig, Placement};
///
/// let published = AutoencoderKLConfig::sd15();
/// assert_eq!(published.block_out_channels, [128, 256, 512, 512]);
///
/// let tiny = AutoencoderKLConfig {
///     block_out_channels: vec![8, 8, 8, 16],
///     layers_per_block: 1,
///     norm_num_groups: 4,
///     ..published
/// };
/// let vae = tiny.build(Placement::default(), 0)?;
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "the keys of the file")]
pub struct AutoencoderKLConfig {
    /// Channels of an image. Default 3.
    pub in_channels: u32,
    /// Channels of a decoded image. Default 3.
    pub out_channels: u32,
    /// Levels of the encoder, the finest first. Default one.
    pub down_block_types: Vec<EncoderBlockType>,
    /// Levels of the decoder, the coarsest first; as many as the encoder's.
    pub up_block_types: Vec<DecoderBlockType>,
    /// Channels of each level, the finest first; every level but the last halves height and width. Default 64.
    pub block_out_channels: Vec<u32>,
    /// Residual blocks of a level of the encoder; there is one more in the decoder. Default 1.
    pub layers_per_block: u32,
    /// The nonlinearity of the residual blocks; before the last convolutions it is always silu. Default silu.
    pub act_fn: Activation,
    /// Channels of the latents. Default 4.
    pub latent_channels: u32,
    /// Groups of every group norm. Default 32.
    pub norm_num_groups: u32,
    /// Height and width of the training images; others are accepted as well. Default 32.
    pub sample_size: SampleSize,
    /// Factor that scales the latents to unit variance for a diffusion model. Default 0.18215.
    pub scaling_factor: f64,
    /// Subtracted from the latents before they are scaled. Default none.
    pub shift_factor: Option<f64>,
    /// Mean of each latent channel, subtracted before scaling; comes with `latents_std`. Default none.
    pub latents_mean: Option<Vec<f64>>,
    /// Standard deviation of each latent channel, divided by before scaling; comes with `latents_mean`. Default none.
    pub latents_std: Option<Vec<f64>>,
    /// Whether a network requested in `Half` computes in `Float`: activations of some exceed the range of `Half`.
    /// Default true.
    pub force_upcast: bool,
    /// Whether a 1 by 1 convolution follows the encoder. Default true.
    pub use_quant_conv: bool,
    /// Whether a 1 by 1 convolution precedes the decoder. Default true.
    pub use_post_quant_conv: bool,
    /// Whether the coarsest level has attention. Default true.
    pub mid_block_add_attention: bool,
}

impl Default for AutoencoderKLConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![EncoderBlockType::DownEncoderBlock2D],
            up_block_types: vec![DecoderBlockType::UpDecoderBlock2D],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: SampleSize::Square(32),
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl AutoencoderKLConfig {
    /// The autoencoder of Stable Diffusion 1.x and 2.x: 8 pixels per latent, 4 channels.
    ///
    /// Its published file does not contain `force_upcast`, so the default applies. This network is accurate in `Half`;
    /// set `force_upcast` to false to save memory.
    pub fn sd15() -> Self {
        Self {
            down_block_types: vec![EncoderBlockType::DownEncoderBlock2D; 4],
            up_block_types: vec![DecoderBlockType::UpDecoderBlock2D; 4],
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            sample_size: SampleSize::Square(512),
            ..Self::default()
        }
    }

    /// The autoencoder of SDXL: the layers of [`Self::sd15`], retrained, with activations beyond the range of `Half`.
    pub fn sdxl() -> Self {
        Self {
            sample_size: SampleSize::Square(1024),
            scaling_factor: 0.13025,
            force_upcast: true,
            ..Self::sd15()
        }
    }

    /// Channels of every level, as tensor sizes.
    pub(crate) fn channels(&self) -> Vec<i64> {
        self.block_out_channels.iter().copied().map(i64::from).collect()
    }

    /// The number of pixels per latent along each side.
    pub(crate) fn downscaling(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    fn ensure_levels(&self, problems: &mut Vec<Invalid>) {
        let levels = self.block_out_channels.len();
        if !(1..=MAX_LEVELS).contains(&levels) {
            let found = format!("{levels} levels");
            let expected = format!("1 to {MAX_LEVELS} levels");
            problems.push(Invalid::new("block_out_channels", found, expected));
            return;
        }
        problems.extend(level_problems(
            &self.block_out_channels,
            self.norm_num_groups,
            self.down_block_types.len(),
            self.up_block_types.len(),
        ));
    }

    fn ensure_numbers(&self, problems: &mut Vec<Invalid>) {
        problems.extend(count_problems(&[
            ("in_channels", Some(self.in_channels)),
            ("out_channels", Some(self.out_channels)),
            ("layers_per_block", Some(self.layers_per_block)),
            ("latent_channels", Some(self.latent_channels)),
            ("norm_num_groups", Some(self.norm_num_groups)),
        ]));
        if !(self.scaling_factor.is_normal() && self.scaling_factor > 0.0) {
            problems.push(Invalid::new("scaling_factor", self.scaling_factor, "above 0"));
        }
        if let Some(shift) = self.shift_factor.filter(|shift| !shift.is_finite()) {
            problems.push(Invalid::new("shift_factor", shift, "finite"));
        }
    }

    fn ensure_statistics(&self, problems: &mut Vec<Invalid>) {
        let statistics = [
            ("latents_mean", &self.latents_mean, "finite"),
            ("latents_std", &self.latents_std, "above 0"),
        ];
        for (key, values, range) in statistics {
            let Some(values) = values else { continue };
            if values.len() != self.latent_channels as usize {
                let found = format!("{} values long", values.len());
                let expected = format!("one value for each of {} channels", self.latent_channels);
                problems.push(Invalid::new(key, found, expected));
            }
            let fits = |v: f64| v.is_finite() && (range == "finite" || v > 0.0);
            for (i, &value) in values.iter().enumerate().filter(|&(_, &v)| !fits(v)) {
                problems.push(Invalid::new(format!("{key}[{i}]"), value, range));
            }
        }
        let keys = "latents_mean, latents_std";
        if self.latents_mean.is_some() != self.latents_std.is_some() {
            problems.push(Invalid::new(keys, "one without the other", "both or none"));
        }
        if self.latents_mean.is_some() && self.shift_factor.is_some() {
            let expected = "only one way to centre latents; no published network has both";
            let keys = format!("shift_factor, {keys}");
            problems.push(Invalid::new(keys, "all given", expected));
        }
    }

    pub(super) fn check(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        self.ensure_levels(&mut problems);
        self.ensure_numbers(&mut problems);
        self.ensure_statistics(&mut problems);
        problems
    }
}
