//! LoRA: low-rank adapters on frozen weights.

mod files;
mod ldm;
mod names;

use std::path::Path;
use std::sync::Arc;

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::parameters::{Adapter, Builder, Init, Layer, Parameters, Placement, Switch, Values};

use files::Found;
pub use files::LoraFormat;

/// The layers that get an adapter, and its size.
///
/// # Example
///
/// ```
/// use ddil_models::LoraConfig;
///
/// let attention = ["to_q", "to_k", "to_v", "to_out.0"].map(str::to_owned);
/// let config = LoraConfig { rank: 4, alpha: 4.0, targets: attention.into() };
/// assert_eq!(LoraConfig::default().rank, 64);
/// # let _ = config;
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// The rank of the adapter, at least 1.
    pub rank: i64,
    /// The output of an adapter is multiplied by `alpha / rank`; above 0.
    pub alpha: f64,
    /// A layer gets an adapter if its name is one of these, or ends with a dot and one of these.
    pub targets: Vec<String>,
}

impl Default for LoraConfig {
    /// Rank and alpha 64 on every layer of the blocks of a [`UNet2DConditionModel`](crate::UNet2DConditionModel), as
    /// LCM-LoRA ([Luo et al. 2023](https://arxiv.org/abs/2311.05556)) was trained.
    fn default() -> Self {
        let targets = [
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "proj_in",
            "proj_out",
            "ff.net.0.proj",
            "ff.net.2",
            "conv1",
            "conv2",
            "conv_shortcut",
            "downsamplers.0.conv",
            "upsamplers.0.conv",
            "time_emb_proj",
        ];
        Self { rank: 64, alpha: 64.0, targets: targets.map(str::to_owned).into() }
    }
}

impl LoraConfig {
    /// The default for a network of any class: rank and alpha 64 on the default targets that match its layers.
    ///
    /// A [`UNet2DModel`](crate::UNet2DModel), for example, has attention without feed-forward layers.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_models::{LoraConfig, NetworkConfig, Placement, UNet2DConfig};
    ///
    /// let unet = UNet2DConfig::default().build(Placement::default(), 0)?;
    /// let config = LoraConfig::default_for(unet.parameters());
    /// assert!(config.targets.contains(&"to_q".to_owned()));
    /// assert!(!config.targets.contains(&"ff.net.2".to_owned()));
    /// # Ok::<_, ddil_models::Error>(())
    /// ```
    pub fn default_for(network: &Parameters) -> Self {
        let Self { rank, alpha, mut targets } = Self::default();
        targets.retain(|target| network.layers().iter().any(|layer| matches(&layer.name, target)));
        Self { rank, alpha, targets }
    }

    /// The layers with an adapter, in the order of the network.
    fn select<'a>(&self, layers: &'a [Layer]) -> Result<Vec<&'a Layer>> {
        let mut problems = Vec::new();
        if self.rank < 1 {
            problems.push(Invalid::new("rank", self.rank, "at least 1"));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            problems.push(Invalid::new("alpha", self.alpha, "a finite number above 0"));
        }
        if self.targets.is_empty() {
            problems.push(Invalid::new("targets", "empty", one_of(layers)));
        }
        let unmatched = |target: &&String| !layers.iter().any(|layer| matches(&layer.name, target));
        let unmatched: Vec<_> = self.targets.iter().filter(unmatched).cloned().collect();
        if !unmatched.is_empty() {
            let found = format!("{}, which matches no layer", unmatched.join(", "));
            problems.push(Invalid::new("targets", found, one_of(layers)));
        }
        if !problems.is_empty() {
            return Err(Error::InvalidConfig { what: "LoraConfig".into(), problems });
        }
        let selected = |layer: &&Layer| self.targets.iter().any(|t| matches(&layer.name, t));
        Ok(layers.iter().filter(selected).collect())
    }
}

/// Whether `name` is `target`, or ends with a dot and `target`.
fn matches(name: &str, target: &str) -> bool {
    name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The distinct last parts of the layers' names.
fn one_of(layers: &[Layer]) -> String {
    let mut endings: Vec<&str> = layers.iter().map(|layer| ending(&layer.name)).collect();
    endings.sort_unstable();
    endings.dedup();
    format!("whole names or ends of names such as {}", endings.join(", "))
}

/// The last part of a name, with the preceding one if the last is a number.
fn ending(name: &str) -> &str {
    let mut dots = name.rmatch_indices('.').map(|(at, _)| at);
    let Some(dot) = dots.next() else { return name };
    if name[dot + 1..].bytes().all(|b| b.is_ascii_digit()) {
        return dots.next().map_or(name, |before| &name[before + 1..]);
    }
    &name[dot + 1..]
}

/// The adapter of a [`Lora`] on one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLayer {
    /// The layer.
    pub name: String,
    /// The rank of the adapter.
    pub rank: i64,
    /// The output of the adapter is multiplied by `alpha / rank`.
    pub alpha: f64,
}

/// A layer with an adapter.
#[derive(Debug)]
struct Adapted {
    layer: Layer,
    rank: i64,
    alpha: f64,
    /// The weight before the adapter was merged into it.
    base: Option<Tensor>,
}

/// Low-rank adapters on layers of a network ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)).
///
/// A layer `W x + b` becomes `W x + b + scale (alpha / rank) B A x`. A has `rank` outputs and is initialised like a new
/// layer; B is initialised to 0, so that the output of the network does not change at first. For a convolution, A has
/// the same kernel, stride and padding, and B is 1 by 1.
///
/// The base parameters are frozen while adapters are attached, so that the network with its adapters switched off can
/// serve as the teacher. A and B are `Float` (`Double` in a network of that kind), also if the network is in half
/// precision: the input of a layer is cast to the kind of the adapter, and the sum is rounded to the kind of the layer.
/// Under autocast both run in the lower kind.
///
/// # One network, several roles
///
/// Adapters are applied in the forward pass: a layer adds the product of A and B if its adapter is on. Switching
/// therefore stores one number, independent of the size of the network ([`Self::set_enabled`], or [`Self::switched`]
/// for the length of a scope), and writes to no tensor: tensors saved by the graph of an earlier pass are unchanged,
/// and passes of teacher and student may alternate before one backward pass. [`Self::duplicate`] puts a second adapter
/// on the same layers, such as a moving average of the first; at most one of them is on at a time.
///
/// The switch is part of the network, not of a thread. A network can be sent to another thread but not shared between
/// threads, so that no switch can happen during a pass.
///
/// [`Self::merge`] is the exception: it writes to the base weights, so the backward pass of an earlier graph fails with
/// an error of libtorch, and no adapter of the network can be switched until [`Self::unmerge`].
///
/// Dropping a `Lora` leaves its adapters in the network; [`Self::detach`] removes them.
///
/// # Example
///
/// ```
/// use ddil_models::{Lora, LoraConfig, MlpConfig, NetworkConfig, Placement};
/// use tch::{Tensor, kind};
///
/// let network = MlpConfig::default().build(Placement::default(), 0)?;
/// let config = LoraConfig { rank: 2, alpha: 4.0, targets: vec!["layers.0".into()] };
/// let student = Lora::attach(network.parameters(), &config, 0)?;
/// let average = student.duplicate()?;
///
/// // The parameters for an optimizer:
/// let learned = student.parameters().learned();
/// assert_eq!(learned[0].0, "layers.0.lora_A.weight");
/// {
///     let _teacher = student.switched(false)?;
///     assert!(!student.is_enabled());
/// }
/// {
///     let _average = average.switched(true)?;
///     assert!(average.is_enabled() && !student.is_enabled());
/// }
/// assert!(student.is_enabled());
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct Lora {
    adapted: Vec<Adapted>,
    parameters: Parameters,
    /// Base parameters that were trainable before.
    trainable: Vec<Tensor>,
    scale: f64,
    number: u32,
    switch: Arc<Switch>,
    ignored: Vec<String>,
}

/// Keeps one adapter, or none, switched on until it is dropped; see [`Lora::switched`].
#[derive(Debug)]
#[must_use = "the previous setting is restored when this is dropped"]
pub struct Switched<'a> {
    switch: &'a Switch,
    before: u32,
}

impl Drop for Switched<'_> {
    fn drop(&mut self) {
        self.switch.activate(self.before);
    }
}

impl Lora {
    /// Attaches fresh adapters to layers of the network with the parameters `network`, and freezes these.
    ///
    /// The values of A are drawn from one random stream per name, like those of a network.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] with all problems of the settings, including targets that match no layer;
    /// [`Error::AdapterAttached`]; [`Error::Torch`] if memory runs out.
    pub fn attach(network: &Parameters, config: &LoraConfig, seed: u64) -> Result<Self> {
        let selected = config.select(network.layers())?;
        let plan: Vec<_> =
            selected.into_iter().map(|layer| (layer, config.rank, config.alpha)).collect();
        Self::build(network, &plan, Values::Seeded(seed), "Lora::attach")
    }

    /// Attaches the adapters of a file to the layers it names, each with its rank in the file.
    ///
    /// | program | names |
    /// | --- | --- |
    /// | diffusers | `unet.LAYER.lora_A.weight`; `.lora.down.weight` and, in 2023, `.processor.to_q_lora.down.weight`; with or without `unet.` |
    /// | PEFT | `base_model.model.LAYER.lora_A.weight`, with or without the name of the adapter before `weight`; its `adapter_config.json` is read |
    /// | kohya's, `LyCORIS` | `lora_unet_LAYER.lora_down.weight`, dots of the layer's name written `_` |
    /// | `ComfyUI` | `diffusion_model.LAYER.lora_A.weight` or `.lora_down.weight` |
    ///
    /// Layers have the names of diffusers or those of the original Stable Diffusion: `input_blocks.4.1` for
    /// `down_blocks.1.attentions.0`. Alpha is that of the file, or the rank if it has none. Entries for text encoders are
    /// skipped and listed in [`Self::ignored`].
    ///
    /// # Errors
    ///
    /// [`Error::WeightsMismatch`] with every name that is not an adapter of a layer of this network, every A without B
    /// or the reverse, and every shape that does not fit; [`Error::NoAdapter`] if it contains nothing for this network;
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) for an alpha that is not finite, or that the
    /// metadata specify by a regular expression, and for weight decomposition (`DoRA`), also if its magnitudes are missing;
    /// [`Error::AdapterAttached`]; otherwise as
    /// [`weights::read_all`](crate::weights::read_all).
    pub fn from_file(network: &Parameters, path: impl AsRef<Path>) -> Result<Self> {
        let found = files::read(network.layers(), path.as_ref())?;
        let plan: Vec<_> = found.adapters.iter().map(|a| (a.layer, a.rank, a.alpha)).collect();
        let mut lora = Self::build(network, &plan, Values::Unset, "Lora::from_file")?;
        if let Err(error) = lora.fill(&found.adapters) {
            lora.detach()?;
            return Err(error);
        }
        lora.ignored = found.ignored;
        Ok(lora)
    }

    /// Copies the values of a file, in the order of the layers.
    fn fill(&self, found: &[Found<'_>]) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (adapted, found) in self.adapted.iter().zip(found) {
            let copied = adapted.layer.slot.with(self.number, |adapter| {
                for (to, from) in [(&mut adapter.down, &found.down), (&mut adapter.up, &found.up)] {
                    to.f_copy_(&from.f_view(&to.size()[..])?)?;
                }
                Ok(())
            });
            copied.unwrap_or(Ok(())).map_err(Error::torch("Lora::from_file"))?;
        }
        Ok(())
    }

    fn build(
        network: &Parameters,
        plan: &[(&Layer, i64, f64)],
        values: Values,
        op: &'static str,
    ) -> Result<Self> {
        if let Some((layer, ..)) = plan.iter().find(|(layer, ..)| !layer.slot.lock().is_empty()) {
            return Err(Error::AdapterAttached { op, layer: layer.name.clone() });
        }
        let switch = Arc::new(Switch::default());
        let mut lora = Self::additional(network.placement(), plan, values, switch)?;
        let learned = network.learned().into_iter().map(|(_, tensor)| tensor);
        lora.trainable = learned.filter(Tensor::requires_grad).collect();
        network.set_trainable(false);
        lora.switch.activate(lora.number);
        Ok(lora)
    }

    /// A further adapter of a switch, initially off.
    fn additional(
        base: Placement,
        plan: &[(&Layer, i64, f64)],
        values: Values,
        switch: Arc<Switch>,
    ) -> Result<Self> {
        let number = switch.next();
        let (adapters, parameters) = adapters(base, plan, values, &switch, number)?;
        let mut adapted = Vec::with_capacity(plan.len());
        for ((layer, rank, alpha), adapter) in plan.iter().zip(adapters) {
            layer.slot.lock().push(adapter);
            adapted.push(Adapted { layer: layer.handle(), rank: *rank, alpha: *alpha, base: None });
        }
        let (trainable, ignored) = (Vec::new(), Vec::new());
        Ok(Self { adapted, parameters, trainable, scale: 1.0, number, switch, ignored })
    }

    /// Another adapter on the same layers, with the same values and scale, initially off; its A and B are trainable.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterMerged`]; [`Error::Torch`] if memory runs out.
    pub fn duplicate(&self) -> Result<Self> {
        self.ensure_apart("Lora::duplicate")?;
        let plan: Vec<_> = self.adapted.iter().map(|a| (&a.layer, a.rank, a.alpha)).collect();
        let switch = Arc::clone(&self.switch);
        let mut other =
            Self::additional(self.parameters.placement(), &plan, Values::Unset, switch)?;
        other.trainable = self.trainable.iter().map(Tensor::shallow_clone).collect();
        other.scale = self.scale;
        other.rescale();
        if let Err(error) = other.parameters.copy_from(&self.parameters) {
            other.detach()?;
            return Err(error);
        }
        Ok(other)
    }

    /// A and B of every layer, named `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The layers with an adapter, in the order of the network.
    pub fn layers(&self) -> Vec<LoraLayer> {
        let layer =
            |a: &Adapted| LoraLayer { name: a.layer.name.clone(), rank: a.rank, alpha: a.alpha };
        self.adapted.iter().map(layer).collect()
    }

    /// The entries of its file for text encoders.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }
}

/// New adapters and their parameters.
fn adapters(
    base: Placement,
    plan: &[(&Layer, i64, f64)],
    values: Values,
    switch: &Arc<Switch>,
    number: u32,
) -> Result<(Vec<Adapter>, Parameters)> {
    let kind = if base.kind == Kind::Double { Kind::Double } else { Kind::Float };
    let mut builder = Builder::new(Placement { kind, ..base }, values);
    let mut root = builder.root();
    let mut adapters = Vec::with_capacity(plan.len());
    for &(layer, rank, alpha) in plan {
        let mut scope = root.at(&layer.name);
        let [down, up] = layer.shapes(rank);
        let inputs: i64 = down[1..].iter().product();
        let init = Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() };
        adapters.push(Adapter {
            number,
            switch: Arc::clone(switch),
            form: layer.form,
            down: scope.parameter("lora_A.weight", &down, init)?,
            up: scope.parameter("lora_B.weight", &up, Init::Constant(0.0))?,
            scale: alpha / rank as f64,
        });
    }
    Ok((adapters, builder.finish()))
}

/// How the network applies its adapters.
impl Lora {
    /// Switches the adapters on, and any others of the same network off; or switches all off, which restores the base
    /// network.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterMerged`].
    pub fn set_enabled(&self, enabled: bool) -> Result<()> {
        self.ensure_apart("Lora::set_enabled")?;
        self.switch.activate(self.number_if(enabled));
        Ok(())
    }

    /// As [`Self::set_enabled`], until the returned guard is dropped, which restores the previous state.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterMerged`].
    pub fn switched(&self, enabled: bool) -> Result<Switched<'_>> {
        self.ensure_apart("Lora::switched")?;
        let before = self.switch.activate(self.number_if(enabled));
        Ok(Switched { switch: &self.switch, before })
    }

    /// Whether the adapters are switched on.
    pub fn is_enabled(&self) -> bool {
        self.switch.on() == self.number
    }

    fn number_if(&self, enabled: bool) -> u32 {
        if enabled { self.number } else { 0 }
    }

    /// The factor of all adapters, in addition to `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Sets [`Self::scale`], which is 1 initially; files do not store it.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) if `scale` is not finite,
    /// [`Error::AdapterMerged`].
    pub fn set_scale(&mut self, scale: f64) -> Result<()> {
        let op = "Lora::set_scale";
        self.ensure_apart(op)?;
        if !scale.is_finite() {
            return Err(ArgumentError::value(op, "scale", scale, "a finite number").into());
        }
        self.scale = scale;
        self.rescale();
        Ok(())
    }

    /// Whether the adapters are part of the base weights.
    pub fn is_merged(&self) -> bool {
        self.adapted.iter().any(|adapted| adapted.base.is_some())
    }

    /// Adds the adapters to the base weights, so that the network is as fast as without adapters.
    ///
    /// A copy of each such weight is kept for [`Self::unmerge`] until the `Lora` is dropped. The sum is rounded to the
    /// kind of the weight: in half precision, outputs equal those of unmerged adapters only up to that rounding. The
    /// adapters are added whether they are on or off.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterMerged`]; [`Error::Torch`] if memory runs out, with nothing merged.
    pub fn merge(&mut self) -> Result<()> {
        self.ensure_apart("Lora::merge")?;
        let number = self.number;
        let result = self.adapted.iter_mut().try_for_each(|adapted| adapted.merge(number));
        if let Err(error) = result {
            self.unmerge()?;
            return Err(error);
        }
        self.switch.set_merged(true);
        Ok(())
    }

    /// The weights that [`Self::merge`] would compute, under their names in the network, which is not changed.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterMerged`]; [`Error::Torch`] if memory runs out.
    pub fn merged(&self) -> Result<Vec<(String, Tensor)>> {
        self.ensure_apart("Lora::merged")?;
        let _no_grad = tch::no_grad_guard();
        let merged = self.adapted.iter().map(|adapted| {
            let sum = adapted.merged(self.number).map_err(Error::torch("Lora::merged"))?;
            Ok((format!("{}.weight", adapted.layer.name), sum))
        });
        merged.collect()
    }

    /// Adds the adapters to the base weights permanently and removes them, without a copy of these weights.
    ///
    /// Frozen parameters become trainable again.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterMerged`]; [`Error::AdapterAttached`] if another adapter is attached to the same layers, whose
    /// base weights would change; [`Error::Torch`] if memory runs out, with part of the weights changed.
    pub fn fuse(mut self) -> Result<()> {
        let op = "Lora::fuse";
        self.ensure_apart(op)?;
        if let Some(shared) = self.adapted.iter().find(|a| a.layer.slot.lock().len() > 1) {
            return Err(Error::AdapterAttached { op, layer: shared.layer.name.clone() });
        }
        for adapted in &mut self.adapted {
            adapted.merge(self.number)?;
            adapted.base = None;
        }
        self.detach()
    }

    /// Restores the base weights bit for bit; a no-op if nothing is merged.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the copy fails.
    pub fn unmerge(&mut self) -> Result<()> {
        if !self.is_merged() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        for adapted in &mut self.adapted {
            if let Some(base) = &adapted.base {
                let copy = adapted.layer.weight.f_copy_(base);
                copy.map_err(Error::torch("Lora::unmerge"))?;
                adapted.base = None;
            }
        }
        self.switch.set_merged(false);
        Ok(())
    }

    /// Removes the adapters from the network. With the last ones removed, the weights are the original ones, and frozen
    /// ones become trainable again.
    ///
    /// # Errors
    ///
    /// As [`Self::unmerge`].
    pub fn detach(mut self) -> Result<()> {
        self.unmerge()?;
        let mut others = 0;
        for adapted in &self.adapted {
            let mut adapters = adapted.layer.slot.lock();
            adapters.retain(|adapter| adapter.number != self.number);
            others += adapters.len();
        }
        if others == 0 {
            for tensor in &self.trainable {
                let _ = tensor.set_requires_grad(true);
            }
        }
        Ok(())
    }

    /// Updates the factor of the adapters in the layers.
    fn rescale(&self) {
        for adapted in &self.adapted {
            let scale = self.scale * adapted.alpha / adapted.rank as f64;
            adapted.layer.slot.with(self.number, |adapter| adapter.scale = scale);
        }
    }

    fn ensure_apart(&self, op: &'static str) -> Result<()> {
        if self.switch.is_merged() { Err(Error::AdapterMerged { op }) } else { Ok(()) }
    }
}

impl Adapted {
    fn merge(&mut self, number: u32) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let mut sum = || {
            let sum = self.merged(number)?;
            let mut base = self.layer.weight.f_empty_like()?;
            base.f_copy_(&self.layer.weight)?;
            self.layer.weight.f_copy_(&sum)?;
            Ok(base)
        };
        self.base = Some(sum().map_err(Error::torch("Lora::merge"))?);
        Ok(())
    }

    /// The weight with the adapter of this number merged.
    fn merged(&self, number: u32) -> Result<Tensor, tch::TchError> {
        let weight = &self.layer.weight;
        let sum =
            |adapter: &mut Adapter| adapter.delta(weight)?.f_add(weight)?.f_to_kind(weight.kind());
        self.layer.slot.with(number, sum).unwrap_or_else(|| Ok(weight.shallow_clone()))
    }
}
