//! A closed-form teacher: the exact denoiser of a mixture of Gaussians.

use std::f64::consts::PI;

use ddil_libtorch::{
    ArgumentError, Generator, ensure_dense, ensure_kind, ensure_real, ensure_shape,
};
use ddil_schedulers::{NoiseSchedule, Prediction, Scales};
use tch::{Device, Kind, Tensor};

use crate::conditioning::Conditioning;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};

/// A mixture of isotropic Gaussians whose posterior mean is known in closed form.
///
/// A replacement for a perfectly trained network in tests and examples: it is exact, so every error of a student is the
/// student's own.
///
/// With components `(w_k, m_k, s_k)` and `x_t = alpha x0 + sigma epsilon`, component k becomes `N(alpha m_k, v_k)`,
/// `v_k = alpha² s_k² + sigma²`, and given k
///
/// - `E[x0 | x_t, k] = m_k + (alpha s_k² / v_k) (x_t - alpha m_k)`
/// - `E[epsilon | x_t, k] = (sigma / v_k) (x_t - alpha m_k)`
///
/// which are averaged with the posterior weights of the components. Everything is computed in `Double`.
///
/// Components may carry class labels. Label `num_classes` is the null class: all components, as without labels.
///
/// # Example
///
/// ```
/// use ddil_core::GaussianMixture;
/// use tch::{Tensor, kind};
///
/// let mixture = GaussianMixture::ring(8)?;
/// // Pure noise contains no information: the prediction is the mean of the mixture.
/// let (alpha, sigma) = (Tensor::zeros([5], kind::FLOAT_CPU), Tensor::ones([5], kind::FLOAT_CPU));
/// let prediction = mixture.posterior(&Tensor::randn([5, 2], kind::FLOAT_CPU), &alpha, &sigma, None)?;
/// assert!(prediction.x0.abs().max().double_value(&[]) < 1e-6);
/// # Ok::<_, ddil_core::Error>(())
/// ```
#[derive(Debug)]
pub struct GaussianMixture {
    /// `[components, dim]`, `Double`, like the others.
    means: Tensor,
    /// `[components]`.
    variances: Tensor,
    /// `[components]`, normalised.
    log_weights: Tensor,
    classes: Option<Classes>,
}

#[derive(Debug)]
struct Classes {
    /// `[components]`, `Int64`.
    of_component: Tensor,
    count: i64,
}

/// The limit of components of a generated mixture.
const MAX_COMPONENTS: usize = 1 << 20;

fn ensure_countable(op: &'static str, name: &'static str, components: Option<usize>) -> Result<()> {
    match components {
        Some(count) if count <= MAX_COMPONENTS => Ok(()),
        _ => {
            let found = components.map_or("an overflow".to_owned(), |count| count.to_string());
            let expected = format!("at most {MAX_COMPONENTS}");
            Err(ArgumentError::value(op, name, found, expected).into())
        }
    }
}

impl GaussianMixture {
    /// A mixture without classes.
    ///
    /// # Shapes and units
    ///
    /// - `means`: `[components, dim]`, data scale
    /// - `stds`: one standard deviation per component, data scale
    /// - `weights`: one per component, above 0; they need not sum to 1
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), or
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) for a number that is not finite and above 0.
    pub fn new(means: &Tensor, stds: &[f64], weights: &[f64]) -> Result<Self> {
        const OP: &str = "GaussianMixture::new";
        ensure_dense(OP, "means", means)?;
        let size = means.size();
        let fits = size.len() == 2 && !size.contains(&0) && means.is_floating_point();
        let expected = || "[components, dim], floating point".to_owned();
        ensure_shape(OP, "means", means, fits, expected)?;
        for (name, values) in [("stds", stds), ("weights", weights)] {
            if values.len() as i64 != size[0] {
                let (shape, expected) = (vec![values.len() as i64], format!("[{}]", size[0]));
                return Err(ArgumentError::Shape { op: OP, name, shape, expected }.into());
            }
            if let Some(value) = values.iter().find(|v| !(**v > 0.0 && v.is_finite())) {
                return Err(ArgumentError::value(OP, name, value, "finite and above 0").into());
            }
        }
        let total: f64 = weights.iter().sum();
        let log_weights: Vec<f64> = weights.iter().map(|w| (w / total).ln()).collect();
        let device = means.device();
        Ok(Self {
            means: means.detach().to_kind(Kind::Double),
            variances: Tensor::from_slice(stds).square().to_device(device),
            log_weights: Tensor::from_slice(&log_weights).to_device(device),
            classes: None,
        })
    }

    /// The same mixture with a class for each component.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) unless there is one label per component and the
    /// labels are 0, 1, .. without a gap.
    pub fn with_classes(mut self, labels: &[i64]) -> Result<Self> {
        let components = self.num_components();
        // A larger label certainly leaves a gap; counting up to it could take very long.
        let count = labels.iter().max().map_or(0, |max| max.saturating_add(1));
        let all_there = count <= components && (0..count).all(|class| labels.contains(&class));
        if labels.len() as i64 != components || !all_there || labels.iter().any(|&l| l < 0) {
            let (found, op) = (format!("{labels:?}"), "GaussianMixture::with_classes");
            let expected = format!("{components} labels, starting at 0 and without gaps");
            return Err(ArgumentError::value(op, "labels", found, expected).into());
        }
        let of_component = Tensor::from_slice(labels).to_device(self.means.device());
        self.classes = Some(Classes { of_component, count });
        Ok(self)
    }

    /// `modes` equal Gaussians of standard deviation 0.08 on a circle of radius 0.8, two neighbours per class.
    ///
    /// With one or two modes there is one class.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) for no modes,
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) for more than a million.
    pub fn ring(modes: usize) -> Result<Self> {
        ensure_countable("GaussianMixture::ring", "modes", Some(modes))?;
        let angle = |i: usize| 2.0 * PI * i as f64 / modes as f64;
        let means: Vec<f64> =
            (0..modes).flat_map(|i| [0.8 * angle(i).cos(), 0.8 * angle(i).sin()]).collect();
        let labels: Vec<i64> = (0..modes as i64).map(|i| i / 2).collect();
        Self::equal(&means, 0.08, &labels)
    }

    /// `side * side` equal Gaussians of standard deviation 0.05, evenly spaced over `[-0.8, 0.8]²`, one class per row.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if `side` is 0,
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) for more than a million components.
    pub fn grid(side: usize) -> Result<Self> {
        ensure_countable("GaussianMixture::grid", "side * side", side.checked_mul(side))?;
        let spacing = 1.6 / (side.max(2) - 1) as f64;
        let place = |i: usize| if side > 1 { spacing * i as f64 - 0.8 } else { 0.0 };
        let cells = || (0..side * side).map(|i| (i % side, i / side));
        let means: Vec<f64> = cells().flat_map(|(x, y)| [place(x), place(y)]).collect();
        let labels: Vec<i64> = cells().map(|(_, y)| y as i64).collect();
        Self::equal(&means, 0.05, &labels)
    }

    fn equal(means: &[f64], std: f64, labels: &[i64]) -> Result<Self> {
        let means = Tensor::from_slice(means).view([-1, 2]);
        let ones = vec![1.0; labels.len()];
        Self::new(&means, &vec![std; labels.len()], &ones)?.with_classes(labels)
    }

    /// The same mixture without some of its components, for data without some modes of a teacher.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) for a component that does not exist, or if the
    /// mixture or one of its classes would have none left.
    pub fn without(&self, components: &[i64]) -> Result<Self> {
        let all = 0..self.num_components();
        let kept: Vec<i64> = all.clone().filter(|k| !components.contains(k)).collect();
        let index = Tensor::from_slice(&kept).to_device(self.means.device());
        let select = |values: &Tensor| values.index_select(0, &index);
        let classes = self.classes.as_ref().map(|classes| Classes {
            of_component: select(&classes.of_component),
            count: classes.count,
        });
        let has = |class| {
            classes
                .as_ref()
                .is_none_or(|c| bool::try_from(c.of_component.eq(class).any()).unwrap_or(false))
        };
        if kept.is_empty()
            || components.iter().any(|k| !all.contains(k))
            || !(0..self.num_classes()).all(has)
        {
            let (found, op) = (format!("{components:?}"), "GaussianMixture::without");
            let expected = format!("some of {} components, not all of a class", all.end);
            return Err(ArgumentError::value(op, "components", found, expected).into());
        }
        let log_weights = select(&self.log_weights);
        Ok(Self {
            means: select(&self.means),
            variances: select(&self.variances),
            log_weights: &log_weights - log_weights.logsumexp([0].as_slice(), true),
            classes,
        })
    }

    /// The same mixture with its tensors on `device`, which saves a copy in every call.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the device is not available.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let moved = |values: &Tensor| {
            values.f_to_device(device).map_err(Error::torch("GaussianMixture::to_device"))
        };
        let of_class = |classes: &Classes| -> Result<Classes> {
            Ok(Classes { of_component: moved(&classes.of_component)?, count: classes.count })
        };
        Ok(Self {
            means: moved(&self.means)?,
            variances: moved(&self.variances)?,
            log_weights: moved(&self.log_weights)?,
            classes: self.classes.as_ref().map(of_class).transpose()?,
        })
    }

    /// The means of the Gaussians, `[components, dim]`, `Double`.
    pub fn means(&self) -> &Tensor {
        &self.means
    }

    /// Length of a sample.
    pub fn dim(&self) -> i64 {
        self.means.size()[1]
    }

    /// Number of Gaussians.
    pub fn num_components(&self) -> i64 {
        self.means.size()[0]
    }

    /// Number of classes, or 0; also the label of the null class.
    pub fn num_classes(&self) -> i64 {
        self.classes.as_ref().map_or(0, |classes| classes.count)
    }

    /// The exact posterior means of clean data and noise, given noisy samples.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, dim]` or `[batch, ..]` with `dim` values per sample, floating point
    /// - `alpha`, `sigma`: `[batch]`, `[batch, 1, ..]` or one value for all; not both 0
    /// - `labels`: `[batch]`, `Int64`, 0 to `num_classes`, the last for all components
    /// - returns: shape and kind of `x_t`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind); [`Error::Conditioning`] for labels of a mixture without
    /// classes, or out of range (only on the CPU).
    pub fn posterior(
        &self,
        x_t: &Tensor,
        alpha: &Tensor,
        sigma: &Tensor,
        labels: Option<&Tensor>,
    ) -> Result<Prediction> {
        const OP: &str = "GaussianMixture::posterior";
        let seen = self.seen(OP, x_t, alpha, sigma, labels)?;
        let weights = seen.log_joint.softmax(1, Kind::Double).unsqueeze(-1);
        let pulled = &seen.residuals / seen.variances.unsqueeze(-1);
        let shrink = (&seen.alpha * self.variances.to_device(x_t.device())).unsqueeze(-1);
        let x0 = self.means.to_device(x_t.device()) + shrink * &pulled;
        let average = |of_component: Tensor| {
            let mean = (&weights * of_component).sum_dim_intlist(1, false, Kind::Double);
            mean.view(x_t.size().as_slice()).to_kind(x_t.kind())
        };
        Ok(Prediction { x0: average(x0), epsilon: average(pulled * seen.sigma.unsqueeze(-1)) })
    }

    /// The logarithm of the density of noisy samples; its gradient is `-epsilon / sigma` of [`Self::posterior`].
    ///
    /// With alpha 1 and sigma 0 it is the density of the data.
    ///
    /// # Shapes and units
    ///
    /// - arguments as in [`Self::posterior`]
    /// - returns: `[batch]`, `Double`, nats
    ///
    /// # Errors
    ///
    /// As [`Self::posterior`].
    pub fn log_density(
        &self,
        x_t: &Tensor,
        alpha: &Tensor,
        sigma: &Tensor,
        labels: Option<&Tensor>,
    ) -> Result<Tensor> {
        let seen = self.seen("GaussianMixture::log_density", x_t, alpha, sigma, labels)?;
        let normaliser = seen.log_prior.logsumexp([1].as_slice(), false);
        let constant = 0.5 * self.dim() as f64 * (2.0 * PI).ln();
        Ok(seen.log_joint.logsumexp([1].as_slice(), false) - normaliser - constant)
    }

    /// Draws clean samples.
    ///
    /// # Shapes and units
    ///
    /// - `labels`: `[n]`, `Int64`, 0 to `num_classes`
    /// - returns: `[n, dim]`, `Float`, on the device of `generator`
    ///
    /// # Errors
    ///
    /// As [`Self::posterior`] for the labels; [`Error::Libtorch`] if drawing fails.
    pub fn sample(
        &self,
        n: i64,
        labels: Option<&Tensor>,
        generator: &mut Generator,
    ) -> Result<Tensor> {
        const OP: &str = "GaussianMixture::sample";
        if n < 0 {
            return Err(ArgumentError::value(OP, "n", n, "at least 0").into());
        }
        let device = generator.device();
        // Allocate first: the following operations cannot return an error.
        let uniform = generator.uniform([n, self.num_components()], Kind::Double)?;
        let log_prior = self.log_prior(OP, labels, n, device)?;
        // The largest of log weight plus Gumbel noise is a sample from the weights.
        let gumbel = -(-(uniform + f64::MIN_POSITIVE).log()).log();
        let component = (log_prior + gumbel).argmax(1, false);
        let normal = generator.normal([n, self.dim()], Kind::Double)?;
        let means = self.means.to_device(device).index_select(0, &component);
        let stds = self.variances.to_device(device).sqrt().index_select(0, &component);
        Ok((means + normal * stds.unsqueeze(-1)).to_kind(Kind::Float))
    }

    /// Distance of each sample to the nearest mean.
    ///
    /// # Shapes and units
    ///
    /// - `samples`: `[batch, dim]` or `[batch, ..]`; returns `[batch]`, `Double`, data scale
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind).
    pub fn distance_to_nearest(&self, samples: &Tensor) -> Result<Tensor> {
        let x = self.flat("GaussianMixture::distance_to_nearest", "samples", samples)?;
        let offsets = x.unsqueeze(1) - self.means.to_device(x.device());
        let squared = offsets.square().sum_dim_intlist(-1, false, Kind::Double);
        Ok(squared.amin([1].as_slice(), false).sqrt())
    }

    /// The mixture as a denoiser on `schedule`.
    pub fn on(self, schedule: NoiseSchedule) -> MixtureDenoiser {
        MixtureDenoiser { mixture: self, schedule }
    }

    fn seen(
        &self,
        op: &'static str,
        x_t: &Tensor,
        alpha: &Tensor,
        sigma: &Tensor,
        labels: Option<&Tensor>,
    ) -> Result<Seen> {
        let x = self.flat(op, "x_t", x_t)?;
        let (batch, device) = (x.size()[0], x.device());
        let alpha = column(op, "alpha", alpha, batch, device)?;
        let sigma = column(op, "sigma", sigma, batch, device)?;
        let log_prior = self.log_prior(op, labels, batch, device)?;
        let variances = alpha.square() * self.variances.to_device(device) + sigma.square();
        let residuals = x.unsqueeze(1) - alpha.unsqueeze(-1) * self.means.to_device(device);
        let squared = residuals.square().sum_dim_intlist(-1, false, Kind::Double);
        let log_likelihood = (squared / &variances + self.dim() as f64 * variances.log()) * -0.5;
        let log_joint = &log_prior + log_likelihood;
        Ok(Seen { alpha, sigma, variances, residuals, log_prior, log_joint })
    }

    /// `[batch, dim]`, `Double`.
    fn flat(&self, op: &'static str, name: &'static str, x: &Tensor) -> Result<Tensor> {
        ensure_real(op, name, x)?;
        let size = x.size();
        let fits = size.len() >= 2 && size.iter().skip(1).product::<i64>() == self.dim();
        let expected = || format!("[batch, {}], or as many values per sample", self.dim());
        ensure_shape(op, name, x, fits, expected)?;
        Ok(x.reshape([size[0], self.dim()]).to_kind(Kind::Double))
    }

    /// Names of the parts of a [`Conditioning`] that the mixture takes: class labels, if its components have classes.
    fn conditioning_fields(&self) -> &'static [&'static str] {
        if self.classes.is_some() { &[Conditioning::CLASS_LABELS] } else { &[] }
    }

    /// `[batch, components]`: the log weights, minus infinity for components of other classes.
    fn log_prior(
        &self,
        op: &'static str,
        labels: Option<&Tensor>,
        batch: i64,
        device: Device,
    ) -> Result<Tensor> {
        let weights = self.log_weights.to_device(device).unsqueeze(0).expand([batch, -1], false);
        let Some(labels) = labels else { return Ok(weights) };
        let Some(classes) = &self.classes else {
            let given = Conditioning::class_labels(labels.shallow_clone());
            given.ensure_known(op, "GaussianMixture", self.conditioning_fields())?;
            return Ok(weights);
        };
        ensure_labels(op, labels, batch, classes.count)?;
        let labels = labels.to_device(device).unsqueeze(1);
        let others = labels
            .ne_tensor(&classes.of_component.to_device(device).unsqueeze(0))
            .logical_and(&labels.ne(classes.count));
        Ok(weights.masked_fill(&others, f64::NEG_INFINITY))
    }
}

/// Terms of each component for noisy samples; all `Double`.
struct Seen {
    /// `[batch or 1, 1]`.
    alpha: Tensor,
    /// `[batch or 1, 1]`.
    sigma: Tensor,
    /// `[batch or 1, components]`: `v_k`.
    variances: Tensor,
    /// `[batch, components, dim]`: `x_t - alpha m_k`.
    residuals: Tensor,
    /// `[batch, components]`.
    log_prior: Tensor,
    /// `[batch, components]`: log of weight times density, without their common factor.
    log_joint: Tensor,
}

fn column(
    op: &'static str,
    name: &'static str,
    values: &Tensor,
    batch: i64,
    device: Device,
) -> Result<Tensor> {
    ensure_real(op, name, values)?;
    let fits = values.numel() == 1 || values.numel() as i64 == batch;
    ensure_shape(op, name, values, fits, || format!("[{batch}], one per sample, or one for all"))?;
    Ok(values.reshape([-1, 1]).to_device(device).to_kind(Kind::Double))
}

/// Checks `labels`: `[batch]`, `Int64`, from 0 to `max`.
fn ensure_labels(op: &'static str, labels: &Tensor, batch: i64, max: i64) -> Result<()> {
    let name = Conditioning::CLASS_LABELS;
    ensure_dense(op, name, labels)?;
    let expected = || format!("[{batch}], one per sample");
    ensure_shape(op, name, labels, labels.size() == [batch], expected)?;
    ensure_kind(op, name, labels, labels.kind() == Kind::Int64, "Int64")?;
    // On an accelerator this would synchronise with the device in every call.
    if labels.device() != Device::Cpu || batch == 0 {
        return Ok(());
    }
    let ends = [labels.min().int64_value(&[]), labels.max().int64_value(&[])];
    match ends.into_iter().find(|label| !(0..=max).contains(label)) {
        Some(found) => {
            let problem = format!("contains {found}; expected 0 to {max}");
            Err(Error::Conditioning { op, field: name.to_owned(), problem })
        }
        None => Ok(()),
    }
}

/// A [`GaussianMixture`] on a noise schedule: an exact teacher.
///
/// # Example
///
/// ```
/// use ddil_core::{GaussianMixture, Rollout};
/// use ddil_schedulers::{Ddim, NoiseScheduleConfig, TimestepSpacing, Timesteps};
/// use tch::{Tensor, kind};
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let sampler = Ddim::new(schedule.clone());
/// let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 50, 0)?;
/// let teacher = GaussianMixture::ring(8)?.on(schedule);
/// let noise = Tensor::randn([16, 2], kind::FLOAT_CPU);
/// let samples = Rollout::new(&teacher, &sampler, &grid).sample(noise)?;
/// // Most samples are at one of the eight modes, whose standard deviation is 0.08.
/// let distances = teacher.mixture().distance_to_nearest(&samples)?;
/// assert!(distances.mean(tch::Kind::Double).double_value(&[]) < 0.3);
/// # Ok::<_, ddil_core::Error>(())
/// ```
#[derive(Debug)]
pub struct MixtureDenoiser {
    mixture: GaussianMixture,
    schedule: NoiseSchedule,
}

impl MixtureDenoiser {
    /// The mixture.
    pub fn mixture(&self) -> &GaussianMixture {
        &self.mixture
    }
}

impl Denoiser for MixtureDenoiser {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        let op = "Denoiser::predict";
        conditioning.ensure_known(op, "GaussianMixture", self.mixture.conditioning_fields())?;
        ddil_libtorch::ensure_real(op, "x_t", x_t)?;
        let Scales { alpha, sigma } =
            self.schedule.scales_at(timesteps, &x_t.to_kind(Kind::Double))?;
        let labels = conditioning.get(Conditioning::CLASS_LABELS);
        self.mixture.posterior(x_t, &alpha, &sigma, labels)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}
