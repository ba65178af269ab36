//! Basic layers, named and initialised as in `torch.nn`.

pub(crate) mod addition_embedding;
pub(crate) mod attention;
pub(crate) mod class_embedding;
pub(crate) mod embeddings;
pub(crate) mod recompute;
pub(crate) mod resnet;
pub(crate) mod transformer;

use serde::{Deserialize, Serialize};
use tch::{TchError, Tensor};

use crate::error::Result;
use crate::parameters::{Form, Slot};
use crate::parameters::{Init, Scope};

/// The result of a layer: shapes were checked by the network, but memory may run out.
pub(crate) type Output = std::result::Result<Tensor, TchError>;

/// The nonlinearity between layers, spelt as in diffusers.
///
/// # Example
///
/// ```
/// use ddil_models::{Activation, NetworkConfig, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"act_fn": "swish"}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.act_fn, Activation::Silu);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x * sigmoid(x)`; `swish` is another name for it.
    #[default]
    #[serde(alias = "swish")]
    Silu,
    /// `x * tanh(ln(1 + exp(x)))`.
    Mish,
    /// `x` times the cumulative normal distribution function of `x`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    pub(crate) fn forward(self, x: &Tensor) -> Output {
        match self {
            Self::Silu => x.f_silu(),
            Self::Mish => x.f_mish(),
            Self::Gelu => x.f_gelu("none"),
            Self::Relu => x.f_relu(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Slot,
}

impl Linear {
    pub(crate) fn new(mut scope: Scope<'_>, inputs: i64, outputs: i64) -> Result<Self> {
        // Kaiming-uniform with a = sqrt(5) has this bound for weight and bias.
        let init = Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() };
        let weight = scope.parameter("weight", &[outputs, inputs], init)?;
        let bias = Some(scope.parameter("bias", &[outputs], init)?);
        let adapter = scope.adaptable(&weight, Form::Linear);
        Ok(Self { weight, bias, adapter })
    }

    pub(crate) fn without_bias(mut scope: Scope<'_>, inputs: i64, outputs: i64) -> Result<Self> {
        let init = Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() };
        let weight = scope.parameter("weight", &[outputs, inputs], init)?;
        let adapter = scope.adaptable(&weight, Form::Linear);
        Ok(Self { weight, bias: None, adapter })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        self.adapter.adapt(x, x.f_linear(&self.weight, self.bias.as_ref())?)
    }
}

#[derive(Debug)]
pub(crate) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
    adapter: Slot,
}

impl Conv2d {
    /// A convolution that keeps height and width; `kernel` is odd.
    pub(crate) fn new(scope: Scope<'_>, inputs: i64, outputs: i64, kernel: i64) -> Result<Self> {
        Self::strided(scope, [inputs, outputs], kernel, 1, kernel / 2)
    }

    pub(crate) fn strided(
        mut scope: Scope<'_>,
        [inputs, outputs]: [i64; 2],
        kernel: i64,
        stride: i64,
        padding: i64,
    ) -> Result<Self> {
        let init = Init::Uniform { bound: 1.0 / ((inputs * kernel * kernel) as f64).sqrt() };
        let weight = scope.parameter("weight", &[outputs, inputs, kernel, kernel], init)?;
        let bias = scope.parameter("bias", &[outputs], init)?;
        let adapter = scope.adaptable(&weight, Form::Conv { stride, padding });
        Ok(Self { weight, bias, stride, padding, adapter })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        let y = x.f_conv2d(&self.weight, Some(&self.bias), stride, padding, [1, 1], 1)?;
        self.adapter.adapt(x, y)
    }
}

#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    pub(crate) fn new(mut scope: Scope<'_>, groups: i64, channels: i64, eps: f64) -> Result<Self> {
        let weight = scope.parameter("weight", &[channels], Init::Constant(1.0))?;
        let bias = scope.parameter("bias", &[channels], Init::Constant(0.0))?;
        Ok(Self { weight, bias, groups, eps })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        self.run(x, None, false)
    }

    /// With the activation that follows, and a number per sample and channel that is added before, `[batch, channels]`.
    pub(crate) fn forward_with(
        &self,
        x: &Tensor,
        offset: Option<&Tensor>,
        activation: Activation,
    ) -> Output {
        if activation == Activation::Silu {
            return self.run(x, offset, true);
        }
        activation.forward(&self.run(x, offset, false)?)
    }

    /// All maps are normalised here: with a fused operation for channels last on the CPU, with libtorch's otherwise.
    /// Both compute the same function with different rounding: see [`ddil_libtorch::group_norm`].
    fn run(&self, x: &Tensor, offset: Option<&Tensor>, silu: bool) -> Output {
        let Self { weight, bias, groups, eps } = self;
        let settings = ddil_libtorch::GroupNorm {
            num_groups: *groups,
            eps: *eps,
            weight: Some(weight),
            bias: Some(bias),
            offset,
            silu,
        };
        ddil_libtorch::group_norm(x, &settings).map_err(|error| TchError::Torch(error.to_string()))
    }
}

/// Over the last axis.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn new(mut scope: Scope<'_>, width: i64, eps: f64) -> Result<Self> {
        let weight = scope.parameter("weight", &[width], Init::Constant(1.0))?;
        let bias = scope.parameter("bias", &[width], Init::Constant(0.0))?;
        Ok(Self { weight, bias, eps })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        x.f_layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

#[derive(Debug)]
pub(crate) struct Embedding {
    weight: Tensor,
}

impl Embedding {
    pub(crate) fn new(mut scope: Scope<'_>, entries: i64, width: i64) -> Result<Self> {
        let weight = scope.parameter("weight", &[entries, width], Init::Normal { std: 1.0 })?;
        Ok(Self { weight })
    }

    pub(crate) fn forward(&self, indices: &Tensor) -> Output {
        Tensor::f_embedding(&self.weight, indices, -1, false, false)
    }
}

/// Transformers start from normal weights and no bias.
impl Linear {
    pub(crate) fn normal(
        mut scope: Scope<'_>,
        inputs: i64,
        outputs: i64,
        std: f64,
    ) -> Result<Self> {
        let mut linear = Self::normal_without_bias(scope.reborrow(), inputs, outputs, std)?;
        linear.bias = Some(scope.parameter("bias", &[outputs], Init::Constant(0.0))?);
        Ok(linear)
    }

    pub(crate) fn normal_without_bias(
        mut scope: Scope<'_>,
        inputs: i64,
        outputs: i64,
        std: f64,
    ) -> Result<Self> {
        let weight = scope.parameter("weight", &[outputs, inputs], Init::Normal { std })?;
        let adapter = scope.adaptable(&weight, Form::Linear);
        Ok(Self { weight, bias: None, adapter })
    }
}

impl Embedding {
    pub(crate) fn normal(mut scope: Scope<'_>, entries: i64, width: i64, std: f64) -> Result<Self> {
        let weight = scope.parameter("weight", &[entries, width], Init::Normal { std })?;
        Ok(Self { weight })
    }
}
