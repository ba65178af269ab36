//! The layers between embeddings and output, common to all U-Nets.

use tch::{TchError, Tensor};

use crate::layers::resnet::Pass;
use crate::layers::{Activation, Conv2d, GroupNorm, Output};
use crate::unet::blocks::{DownBlock, MidBlock, UpBlock};

#[derive(Debug)]
pub(crate) struct Body {
    /// Whether samples are in `[0, 1]` and have to be mapped to `[-1, 1]`.
    pub(crate) centers_input: bool,
    pub(crate) conv_in: Conv2d,
    pub(crate) down_blocks: Vec<DownBlock>,
    pub(crate) mid_block: Option<MidBlock>,
    pub(crate) up_blocks: Vec<UpBlock>,
    pub(crate) conv_norm_out: GroupNorm,
    /// The activation between the last norm and the last convolution.
    pub(crate) last_activation: Activation,
    pub(crate) conv_out: Conv2d,
}

impl Body {
    /// The down path and the bottom level; returns the skips for the up path.
    pub(crate) fn down(
        &self,
        sample: &Tensor,
        pass: Pass<'_>,
    ) -> Result<(Tensor, Vec<Tensor>), TchError> {
        let mut sample = sample.shallow_clone();
        if self.centers_input {
            sample = sample.f_mul_scalar(2.0)?.f_add_scalar(-1.0)?;
        }
        let mut hidden = self.conv_in.forward(&sample)?;
        let mut skips = vec![hidden.shallow_clone()];
        for block in &self.down_blocks {
            hidden = block.forward(hidden, pass, &mut skips)?;
        }
        if let Some(mid_block) = &self.mid_block {
            hidden = mid_block.forward(&hidden, pass)?;
        }
        Ok((hidden, skips))
    }

    pub(crate) fn up(&self, features: &Tensor, mut skips: Vec<Tensor>, pass: Pass<'_>) -> Output {
        let mut hidden = features.shallow_clone();
        for block in &self.up_blocks {
            hidden = block.forward(hidden, pass, &mut skips)?;
        }
        let hidden = self.conv_norm_out.forward_with(&hidden, None, self.last_activation)?;
        self.conv_out.forward(&hidden)
    }
}
