//! Residual blocks and the layers that halve or double a feature map.

use tch::{TchError, Tensor};

use crate::error::Result;
use crate::layers::attention::rescale;
use crate::layers::recompute::{Part, Recompute};
use crate::layers::{Activation, Conv2d, GroupNorm, Linear, Output};
use crate::parameters::{Joined, Scope, Share};
use crate::unet::pixels_config::TimeScaleShift;

/// Sizes and settings shared by the residual blocks of a network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResnetOptions {
    /// Width of the time embedding; `None` in networks without a timestep.
    pub(crate) time_width: Option<i64>,
    pub(crate) groups: i64,
    pub(crate) eps: f64,
    pub(crate) activation: Activation,
    pub(crate) time_scale_shift: TimeScaleShift,
    pub(crate) dropout: f64,
    pub(crate) output_scale: f64,
}

/// The context of levels with cross attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a> {
    /// `[batch, tokens, width]`.
    pub(crate) states: &'a Tensor,
    /// Added to the scores of attention; broadcasts to `[batch, heads, pixels, tokens]`.
    pub(crate) bias: Option<&'a Tensor>,
}

/// The inputs of every block in one forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    /// The embedding of timestep and class after the activation, shared by all blocks. `None` in networks without a
    /// timestep.
    pub(crate) time: Option<&'a Tensor>,
    /// `None` in networks without cross attention.
    pub(crate) text: Option<Text<'a>>,
    /// Whether dropout is active.
    pub(crate) training: bool,
    /// Present if blocks are recomputed in the backward pass.
    pub(crate) recompute: Option<&'a Recompute>,
}

/// Norm, activation, convolution, twice, with the timestep in between and the input added at the end.
#[derive(Debug)]
pub(crate) struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    options: ResnetOptions,
}

impl ResnetBlock2D {
    pub(crate) fn new(
        mut scope: Scope<'_>,
        inputs: i64,
        outputs: i64,
        options: ResnetOptions,
    ) -> Result<Self> {
        let ResnetOptions { time_width, groups, eps, .. } = options;
        let time_outputs = match options.time_scale_shift {
            TimeScaleShift::Default => outputs,
            TimeScaleShift::ScaleShift => 2 * outputs,
        };
        let norm1 = GroupNorm::new(scope.at("norm1"), groups, inputs, eps)?;
        let conv1 = Conv2d::new(scope.at("conv1"), inputs, outputs, 3)?;
        let time_emb_proj = time_width
            .map(|width| Linear::new(scope.at("time_emb_proj"), width, time_outputs))
            .transpose()?;
        if options.time_scale_shift == TimeScaleShift::ScaleShift {
            for name in ["time_emb_proj.weight", "time_emb_proj.bias"] {
                let parts = vec![outputs; 2];
                scope.mark(name, Joined { axis: 0, parts, share: Share::First });
            }
        }
        let norm2 = GroupNorm::new(scope.at("norm2"), groups, outputs, eps)?;
        let conv2 = Conv2d::new(scope.at("conv2"), outputs, outputs, 3)?;
        let conv_shortcut = (inputs != outputs)
            .then(|| Conv2d::new(scope.at("conv_shortcut"), inputs, outputs, 1))
            .transpose()?;
        Ok(Self { norm1, conv1, time_emb_proj, norm2, conv2, conv_shortcut, options })
    }

    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Output {
        let activation = self.options.activation;
        let hidden = self.conv1.forward(&self.norm1.forward_with(x, None, activation)?)?;
        let mut hidden = self.inject_time(&hidden, pass.time)?;
        if pass.training && self.options.dropout > 0.0 {
            hidden = hidden.f_dropout(self.options.dropout, true)?;
        }
        let hidden = self.conv2.forward(&hidden)?;
        let sum = match &self.conv_shortcut {
            Some(conv) => conv.forward(x)?.f_add(&hidden)?,
            None => x.f_add(&hidden)?,
        };
        rescale(sum, self.options.output_scale)
    }

    /// The second norm and activation. The timestep is added before, or scales and shifts the output of the norm.
    fn inject_time(&self, hidden: &Tensor, time: Option<&Tensor>) -> Output {
        let activation = self.options.activation;
        let Some(projection) = &self.time_emb_proj else {
            return self.norm2.forward_with(hidden, None, activation);
        };
        let time = time.ok_or_else(|| TchError::Shape("the blocks take no timestep".into()))?;
        let time = projection.forward(time)?;
        match self.options.time_scale_shift {
            TimeScaleShift::Default => self.norm2.forward_with(hidden, Some(&time), activation),
            TimeScaleShift::ScaleShift => {
                let scale_and_shift = time.f_unsqueeze(-1)?.f_unsqueeze(-1)?.f_chunk(2, 1)?;
                let normed = self.norm2.forward(hidden)?;
                let scaled = normed.f_mul(&scale_and_shift[0].f_add_scalar(1.0)?)?;
                activation.forward(&scaled.f_add(&scale_and_shift[1])?)
            }
        }
    }
}

impl Part<ResnetBlock2D> {
    /// Runs the block on maps concatenated along the channels.
    pub(crate) fn forward_joined(&self, maps: &[&Tensor], pass: Pass<'_>) -> Output {
        let (num_maps, training) = (maps.len(), pass.training);
        let inputs: Vec<&Tensor> = maps.iter().copied().chain(pass.time).collect();
        self.forward(&inputs, pass.recompute, move |block, inputs| {
            let (maps, time) = inputs.split_at(num_maps);
            let pass = Pass { time: time.first().copied(), text: None, training, recompute: None };
            match maps {
                [x] => block.forward(x, pass),
                maps => block.forward(&Tensor::f_cat(maps, 1)?, pass),
            }
        })
    }
}

/// Halves height and width with a strided convolution.
#[derive(Debug)]
pub(crate) struct Downsample2D {
    conv: Conv2d,
    pads_itself: bool,
}

impl Downsample2D {
    pub(crate) fn new(mut scope: Scope<'_>, channels: i64, padding: i64) -> Result<Self> {
        let conv = Conv2d::strided(scope.at("conv"), [channels; 2], 3, 2, padding)?;
        Ok(Self { conv, pads_itself: padding == 0 })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        if self.pads_itself {
            // Pads one column at the right and one row at the bottom, as the first DDPM networks.
            return self.conv.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?);
        }
        self.conv.forward(x)
    }
}

/// Doubles height and width by repeating pixels, then smooths with a convolution.
#[derive(Debug)]
pub(crate) struct Upsample2D {
    conv: Conv2d,
}

impl Upsample2D {
    pub(crate) fn new(mut scope: Scope<'_>, channels: i64) -> Result<Self> {
        Ok(Self { conv: Conv2d::new(scope.at("conv"), channels, channels, 3)? })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        let size = x.size();
        self.forward_to(x, [2 * size[2], 2 * size[3]])
    }

    /// To this height and width, which is one less than double if an odd size was halved.
    pub(crate) fn forward_to(&self, x: &Tensor, size: [i64; 2]) -> Output {
        self.conv.forward(&x.f_upsample_nearest2d(size, None, None)?)
    }
}
