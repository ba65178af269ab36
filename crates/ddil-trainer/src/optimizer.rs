//! `AdamW` with a state that can be saved, gradient clipping, and a check for numbers that are not finite.

use ddil_files::Invalid;
use ddil_libtorch::{TensorList, clip_grad_norm_, drop_grads, fused_adamw_, grad_norm, grads};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::{Error, Result, state};

/// The settings of [`AdamW`] except for the learning rate, which is an argument of each step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct AdamWConfig {
    /// Decay of the running mean of gradients; 0.9 by default.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients; 0.999 by default.
    pub beta2: f64,
    /// Decoupled weight decay, times the learning rate; 0 by default.
    pub weight_decay: f64,
    /// Added to the denominator; 1e-8 by default.
    pub eps: f64,
    /// Gradients with a larger L2 norm are scaled down to it; 1 by default, infinity disables clipping.
    pub max_grad_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, weight_decay: 0.0, eps: 1e-8, max_grad_norm: 1.0 }
    }
}

impl AdamWConfig {
    /// The same settings with a change: `AdamWConfig::default().with(|config| config.weight_decay = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Checks the settings and creates an optimizer of these parameters, with a state of zeros.
    ///
    /// The parameters are shared, not copied. Their names are the keys of the saved state; the order does not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless betas lie in `[0, 1)`, `weight_decay >= 0`, `eps > 0` and
    /// `max_grad_norm > 0`; [`Error::Libtorch`] if memory runs out.
    pub fn build(self, mut params: Vec<(String, Tensor)>) -> Result<AdamW> {
        self.ensure_valid()?;
        params.sort_by(|(left, _), (right, _)| left.cmp(right));
        let (names, params): (Vec<String>, Vec<Tensor>) = params.into_iter().unzip();
        let params = TensorList::new(params)?;
        let (exp_avgs, exp_avg_sqs) = (params.zeros_like()?, params.zeros_like()?);
        let steps = params.steps()?;
        Ok(AdamW { config: self, names, params, exp_avgs, exp_avg_sqs, steps, num_steps: 0 })
    }

    pub(crate) fn ensure_valid(&self) -> Result<()> {
        let Self { beta1, beta2, weight_decay, eps, max_grad_norm } = *self;
        let unit = "at least 0 and below 1";
        let checks = [
            ("beta1", beta1, (0.0..1.0).contains(&beta1), unit),
            ("beta2", beta2, (0.0..1.0).contains(&beta2), unit),
            ("weight_decay", weight_decay, (0.0..f64::MAX).contains(&weight_decay), "0 or more"),
            ("eps", eps, eps > 0.0 && eps.is_finite(), "above 0"),
            ("max_grad_norm", max_grad_norm, max_grad_norm > 0.0, "above 0"),
        ];
        match checks.iter().find(|(_, _, valid, _)| !valid) {
            None => Ok(()),
            Some((field, value, _, expected)) => {
                Err(Error::Invalid(Invalid::new(*field, value, *expected)))
            }
        }
    }
}

/// `AdamW` over named parameters, by libtorch's fused kernel.
///
/// Algorithm 2 of [Loshchilov and Hutter 2017](https://arxiv.org/abs/1711.05101) with PyTorch's conventions; for the
/// formula see [`fused_adamw_`]. A restored optimizer continues exactly.
///
/// # Example
///
/// ```
/// use ddil_trainer::{AdamWConfig, ensure_finite};
/// use tch::{Kind, Tensor, kind::FLOAT_CPU};
///
/// let weight = Tensor::ones([4], FLOAT_CPU).set_requires_grad(true);
/// let mut optimizer = AdamWConfig::default().build(vec![("weight".into(), weight.shallow_clone())])?;
/// for step in 1..=3 {
///     optimizer.zero_grad()?;
///     let loss = weight.square().sum(Kind::Float);
///     loss.backward();
///     let norm = optimizer.clip()?;
///     ensure_finite(step, "loss", loss.double_value(&[]), || None)?;
///     ensure_finite(step, "grad_norm", norm.double_value(&[]), || optimizer.non_finite_gradient())?;
///     optimizer.step(0.1)?;
/// }
/// assert!((weight.double_value(&[0]) - 0.7).abs() < 0.01);
/// # Ok::<(), ddil_trainer::Error>(())
/// ```
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    names: Vec<String>,
    params: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    /// The fused kernel's own counters, all equal to `num_steps`.
    steps: TensorList,
    num_steps: u64,
}

impl AdamW {
    /// Drops all gradients before the next backward pass.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`] if libtorch fails.
    pub fn zero_grad(&self) -> Result<()> {
        Ok(drop_grads(&self.params)?)
    }

    /// Scales gradients down to `max_grad_norm` and returns their norm before that, a scalar on their device.
    ///
    /// The scale is `min(1, max_grad_norm / (norm + 1e-6))`. Does not wait for a CUDA device; on the CPU, a norm that
    /// is not finite leaves the gradients unchanged for inspection.
    ///
    /// # Errors
    ///
    /// [`Error::MissingGradient`] if a parameter has none, [`Error::Libtorch`] if libtorch fails.
    pub fn clip(&self) -> Result<Tensor> {
        let grads = self.grads()?;
        let max_grad_norm = self.config.max_grad_norm;
        if max_grad_norm.is_finite() && !self.is_on_cpu()? {
            return Ok(clip_grad_norm_(&grads, max_grad_norm)?);
        }
        let norm = grad_norm(&grads)?;
        if max_grad_norm.is_finite() {
            let value = norm.f_double_value(&[]).map_err(Error::torch("AdamW::clip"))?;
            let scale = max_grad_norm / (value + 1e-6);
            if value.is_finite() && scale < 1.0 {
                scale_all(&grads, scale)?;
            }
        }
        Ok(norm)
    }

    /// Updates the parameters in place from their gradients.
    ///
    /// # Errors
    ///
    /// [`Error::MissingGradient`] if a parameter has none, [`Error::Libtorch`] for a learning rate that is negative or
    /// not finite; nothing has changed in that case.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        let AdamWConfig { beta1, beta2, weight_decay, eps, .. } = self.config;
        let settings = ddil_libtorch::AdamW { lr, beta1, beta2, weight_decay, eps };
        let grads = self.grads()?;
        let Self { params, exp_avgs, exp_avg_sqs, steps, .. } = self;
        fused_adamw_(params, &grads, exp_avgs, exp_avg_sqs, steps, &settings)?;
        self.num_steps += 1;
        Ok(())
    }

    /// The number of updates done.
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// The gradients with values that are not finite, in words for an error message; `None` if there are none.
    ///
    /// Waits for the device once per parameter.
    pub fn non_finite_gradient(&self) -> Option<String> {
        let params = self.params.to_vec().ok()?;
        let is_finite = |param: &Tensor| {
            let grad = param.grad();
            !grad.defined() || grad.isfinite().all().int64_value(&[]) != 0
        };
        let named = self.names.iter().zip(&params);
        let found: Vec<&String> =
            named.filter(|(_, param)| !is_finite(param)).map(|(name, _)| name).collect();
        let first = found.first()?;
        let (count, total) = (found.len(), self.names.len());
        Some(format!("in the gradients of {count} of {total} parameters, the first: `{first}`"))
    }

    /// The whole state: `exp_avg.<name>`, `exp_avg_sq.<name>` and `step`. The tensors are shared, not copied.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`] if memory runs out.
    pub fn state_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::with_capacity(2 * self.names.len() + 1);
        for (prefix, list) in [("exp_avg", &self.exp_avgs), ("exp_avg_sq", &self.exp_avg_sqs)] {
            let named = |name: &String| format!("{prefix}.{name}");
            state.extend(self.names.iter().map(named).zip(list.to_vec()?));
        }
        state.push(("step".to_owned(), Tensor::from(self.num_steps as i64)));
        Ok(state)
    }

    /// Restores a saved state.
    ///
    /// # Errors
    ///
    /// [`Error::StateMismatch`] if a name, shape or kind differs; nothing has changed in that case.
    pub fn load_state(&mut self, saved: &[(String, Tensor)]) -> Result<()> {
        let own = self.state_tensors()?;
        state::restore("optimizer", &own, saved)?;
        // `step` is the last tensor and was created for this call; the counters are set to its value.
        let num_steps = own.last().map_or(0, |(_, step)| step.int64_value(&[]));
        let _guard = tch::no_grad_guard();
        for mut step in self.steps.to_vec()? {
            let _ = step.f_fill_(num_steps as f64).map_err(Error::torch("AdamW::load_state"))?;
        }
        self.num_steps = num_steps as u64;
        Ok(())
    }

    fn is_on_cpu(&self) -> Result<bool> {
        Ok(self.params.is_empty() || self.params.get(0)?.device() == Device::Cpu)
    }

    fn grads(&self) -> Result<TensorList> {
        match grads(&self.params) {
            Err(ddil_libtorch::Error::MissingGradient { .. }) => {
                let params = self.params.to_vec()?;
                let without = |(_, param): &(&String, &Tensor)| !param.grad().defined();
                let names = self.names.iter().zip(&params).filter(without);
                Err(Error::MissingGradient {
                    names: names.map(|(name, _)| name.clone()).collect(),
                    total: self.names.len(),
                })
            }
            grads => Ok(grads?),
        }
    }
}

fn scale_all(grads: &TensorList, scale: f64) -> Result<()> {
    let _guard = tch::no_grad_guard();
    for mut grad in grads.to_vec()? {
        let _ = grad.f_mul_scalar_(scale).map_err(Error::torch("AdamW::clip"))?;
    }
    Ok(())
}

/// Stops a run at a number that is not finite before it reaches the weights.
///
/// `detail` is called only in that case, such as [`AdamW::non_finite_gradient`].
///
/// # Errors
///
/// [`Error::NonFinite`] with the step, the name and the value.
pub fn ensure_finite(
    step: u64,
    name: &str,
    value: f64,
    detail: impl FnOnce() -> Option<String>,
) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    Err(Error::NonFinite { step, name: name.to_owned(), value, detail: detail(), saved: None })
}
