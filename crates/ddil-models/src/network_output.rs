//! The output of a pass that keeps its features.

use tch::Tensor;

/// Output and features of one forward pass.
#[derive(Debug)]
pub struct NetworkOutput {
    /// The output, as `forward` returns it.
    pub sample: Tensor,
    /// The input of a discriminator: the bottom level of a U-Net, the last hidden layer of an [`Mlp`](crate::Mlp).
    pub features: Tensor,
}
