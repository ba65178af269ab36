//! The tensors of a network: named, ordered, on one device, initialised from a seed.

mod adapter;
mod matching;

use std::collections::BTreeMap;
use std::path::Path;

use ddil_libtorch::ArgumentError;
use ddil_libtorch::Generator;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result, WeightProblems, is_float};
use crate::weights;

pub(crate) use adapter::{Adapter, Form, Layer, RestoreGuard, Slot, Switch, Switches};
pub use matching::Matched;
pub(crate) use matching::{Joined, Share};

/// Device, kind and memory format of a network.
///
/// # Example
///
/// ```
/// use ddil_models::Placement;
///
/// let placement = Placement { channels_last: true, ..Placement::default() };
/// assert_eq!(placement.device, tch::Device::Cpu);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The device of every parameter; inputs must be on it.
    pub device: Device,
    /// The kind of every parameter, whatever the kind in the file they are loaded from.
    pub kind: Kind,
    /// Whether convolutions use the channels-last memory format (NHWC), which is faster for most of them.
    pub channels_last: bool,
}

impl Placement {
    /// `sample` in the memory format of the parameters.
    pub(crate) fn arrange(self, sample: &Tensor) -> Result<Tensor> {
        Ok(if self.channels_last {
            ddil_libtorch::channels_last(sample)?
        } else {
            sample.shallow_clone()
        })
    }
}

impl Default for Placement {
    /// CPU, `Float`, channels outermost.
    fn default() -> Self {
        Self { device: Device::Cpu, kind: Kind::Float, channels_last: false }
    }
}

/// The limit of parameters of a network: ten times that of the largest published ones.
const MAX_PARAMETERS: usize = 20_000;
/// The limit of values of a network, 256 GiB in single precision: twenty-five times SDXL's.
const MAX_VALUES: i64 = 1 << 36;

/// The source of the values of new parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// The default initialisation of `torch.nn`. Each parameter has a random stream keyed by its name, so that adding a
    /// layer does not change the others. Values are drawn on the CPU and do not depend on the device.
    Seeded(u64),
    /// Uninitialised: a file fills all of them before they are read.
    Unset,
    /// None: the network is built only for the names and sizes of its parameters, which take no memory.
    Sizes,
}

/// The initial distribution of a parameter.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Init {
    Constant(f64),
    /// Uniform in `[-bound, bound)`.
    Uniform {
        bound: f64,
    },
    Normal {
        std: f64,
    },
}

#[derive(Debug)]
struct Parameter {
    name: String,
    tensor: Tensor,
    /// False for constants that are saved with the network.
    learned: bool,
    /// Axes along which features of several kinds are concatenated.
    joined: Vec<Joined>,
}

/// The parameters of one network, in the order of its layers, under the names they have in its files.
///
/// The tensors are handles: changing one changes the network.
///
/// # Example
///
/// ```
/// use ddil_models::{MlpConfig, NetworkConfig, Placement};
///
/// let mlp = MlpConfig { hidden_widths: vec![8], ..MlpConfig::default() };
/// let mlp = mlp.build(Placement::default(), 0)?;
/// let parameters = mlp.parameters();
/// assert_eq!(parameters.learned().len(), 4, "two weights and two biases");
/// assert_eq!(parameters.get("layers.1.bias").map(tch::Tensor::size), Some(vec![2]));
/// assert!(parameters.get("layers.2.bias").is_none());
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct Parameters {
    entries: Vec<Parameter>,
    /// The layers that may have an adapter.
    layers: Vec<Layer>,
    placement: Placement,
}

impl Parameters {
    /// The parameters of a network that was not built by this crate.
    pub(crate) fn of_foreign(named: Vec<(String, Tensor)>, placement: Placement) -> Self {
        let entry = |(name, tensor)| Parameter { name, tensor, learned: true, joined: Vec::new() };
        let entries = named.into_iter().map(entry).collect();
        Self { entries, layers: Vec::new(), placement }
    }

    /// Device, kind and memory format of the parameters.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// The layers of the network that may have an adapter, in their order.
    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Every parameter with its name, including constants: the contents of a file.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.entries.iter().map(|p| (p.name.clone(), p.tensor.shallow_clone())).collect()
    }

    /// The parameters an optimizer may change, with their names.
    pub fn learned(&self) -> Vec<(String, Tensor)> {
        let learned = self.entries.iter().filter(|p| p.learned);
        learned.map(|p| (p.name.clone(), p.tensor.shallow_clone())).collect()
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.entries.iter().find(|p| p.name == name).map(|p| &p.tensor)
    }

    /// Name and shape of every parameter, including constants.
    pub fn shapes(&self) -> Vec<(String, Vec<i64>)> {
        self.entries.iter().map(|p| (p.name.clone(), p.tensor.size())).collect()
    }

    /// The total number of values.
    pub fn num_values(&self) -> usize {
        self.entries.iter().map(|p| p.tensor.numel()).sum()
    }

    /// Switches gradients on or off for every learned parameter.
    pub fn set_trainable(&self, trainable: bool) {
        for parameter in self.entries.iter().filter(|p| p.learned) {
            // The flag is stored in the tensor behind the handle.
            let _ = parameter.tensor.set_requires_grad(trainable);
        }
    }

    /// Copies the values of a network with the same parameters, cast to the kind and device of this one.
    ///
    /// # Errors
    ///
    /// [`Error::ParametersDiffer`] if a name or shape differs, with nothing copied.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        let mut theirs: BTreeMap<&str, &Tensor> =
            other.entries.iter().map(|p| (p.name.as_str(), &p.tensor)).collect();
        let mut problems = WeightProblems::default();
        let mut pairs = Vec::with_capacity(self.entries.len());
        for Parameter { name, tensor, .. } in &self.entries {
            match theirs.remove(name.as_str()) {
                None => problems.missing.push(name.clone()),
                Some(source) if source.size() != tensor.size() => {
                    problems.misshapen.push((name.clone(), source.size(), tensor.size()));
                }
                Some(source) => pairs.push((tensor, source)),
            }
        }
        problems.unexpected.extend(theirs.into_keys().map(str::to_owned));
        if !problems.is_empty() {
            return Err(Error::ParametersDiffer { problems: Box::new(problems) });
        }
        let _no_grad = tch::no_grad_guard();
        for (target, source) in pairs {
            let copy = target.shallow_clone().f_copy_(source);
            copy.map_err(Error::torch("Parameters::copy_from"))?;
        }
        Ok(())
    }

    /// Fills every parameter from a safetensors file or an index of shards.
    ///
    /// # Errors
    ///
    /// As [`weights::load_into`]: on an error no parameter is changed.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        weights::load_into(&self.named(), path)
    }

    /// Writes every parameter to a safetensors file, as diffusers.
    ///
    /// # Errors
    ///
    /// As [`weights::save`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        weights::save(&self.named(), path, &BTreeMap::new())
    }
}

/// Collects the parameters of a network while its layers are built.
#[derive(Debug)]
pub(crate) struct Builder {
    entries: Vec<Parameter>,
    layers: Vec<Layer>,
    placement: Placement,
    values: Values,
    num_values: i64,
}

impl Builder {
    pub(crate) fn new(placement: Placement, values: Values) -> Self {
        Self { entries: Vec::new(), layers: Vec::new(), placement, values, num_values: 0 }
    }

    /// Counts a parameter, or fails if the network becomes too large.
    fn count(&mut self, name: &str, shape: &[i64]) -> Result<()> {
        if !is_float(self.placement.kind) {
            return Err(Error::Argument(ArgumentError::Kind {
                op: "building a network",
                name: "placement.kind",
                kind: self.placement.kind,
                expected: "floating point",
            }));
        }
        let values = shape.iter().try_fold(1_i64, |product, &side| product.checked_mul(side));
        let total = values.and_then(|values| values.checked_add(self.num_values));
        match total.filter(|total| *total <= MAX_VALUES) {
            Some(total) if self.entries.len() < MAX_PARAMETERS => self.num_values = total,
            _ => {
                return Err(Error::TooLarge {
                    at: name.to_owned(),
                    parameters: self.entries.len() + 1,
                    values: total,
                    max_parameters: MAX_PARAMETERS,
                    max_values: MAX_VALUES,
                });
            }
        }
        Ok(())
    }

    pub(crate) fn root(&mut self) -> Scope<'_> {
        Scope { builder: self, prefix: String::new() }
    }

    pub(crate) fn finish(self) -> Parameters {
        Parameters { entries: self.entries, layers: self.layers, placement: self.placement }
    }
}

/// A node in the tree of names, such as `down_blocks.0.resnets.1`.
#[derive(Debug)]
pub(crate) struct Scope<'a> {
    builder: &'a mut Builder,
    prefix: String,
}

impl Scope<'_> {
    /// The node `name` below this one.
    pub(crate) fn at(&mut self, name: &str) -> Scope<'_> {
        let prefix = self.name(name);
        Scope { builder: self.builder, prefix }
    }

    /// The same node.
    pub(crate) fn reborrow(&mut self) -> Scope<'_> {
        Scope { builder: self.builder, prefix: self.prefix.clone() }
    }

    /// A learned parameter.
    pub(crate) fn parameter(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        self.add(name, shape, init, true)
    }

    /// A constant that is saved with the network.
    pub(crate) fn constant(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        self.add(name, shape, init, false)
    }

    /// Sets the kinds of features along an axis of the parameter `name`, if it exists.
    pub(crate) fn mark(&mut self, name: &str, joined: Joined) {
        let name = self.name(name);
        // Searched backwards: only recently added parameters are marked.
        if let Some(parameter) = self.builder.entries.iter_mut().rev().find(|p| p.name == name) {
            parameter.joined.push(joined);
        }
    }

    /// Registers the layer at this node as one that may have an adapter on `weight`.
    pub(crate) fn adaptable(&mut self, weight: &Tensor, form: Form) -> Slot {
        let (name, weight, slot) = (self.prefix.clone(), weight.shallow_clone(), Slot::default());
        self.builder.layers.push(Layer { name, weight, form, slot: slot.clone() });
        slot
    }

    fn name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn add(&mut self, name: &str, shape: &[i64], init: Init, learned: bool) -> Result<Tensor> {
        let name = self.name(name);
        self.builder.count(&name, shape)?;
        let _no_grad = tch::no_grad_guard();
        let mut tensor = match self.builder.values {
            Values::Sizes => sized(shape)?,
            Values::Seeded(_) | Values::Unset => empty(shape, self.builder.placement)?,
        };
        if let Values::Seeded(seed) = self.builder.values {
            let values = draw(init, shape, seed, &name)?;
            tensor.f_copy_(&values).map_err(Error::torch("initialising parameters"))?;
        }
        let tensor = tensor.set_requires_grad(learned);
        let handle = tensor.shallow_clone();
        self.builder.entries.push(Parameter { name, tensor, learned, joined: Vec::new() });
        Ok(handle)
    }
}

/// One value expanded to `shape`.
fn sized(shape: &[i64]) -> Result<Tensor> {
    let number = Tensor::f_zeros([0; 0], (Kind::Float, Device::Cpu));
    number
        .and_then(|number| number.f_expand(shape, false))
        .map_err(Error::torch("sizing parameters"))
}

fn empty(shape: &[i64], placement: Placement) -> Result<Tensor> {
    let options = (placement.kind, placement.device);
    let tensor = match shape {
        &[_, inner, height, width] if placement.channels_last => {
            let strides = [inner * height * width, 1, width * inner, inner];
            Tensor::f_empty_strided(shape, strides, options)
        }
        _ => Tensor::f_empty(shape, options),
    };
    tensor.map_err(Error::torch("allocating parameters"))
}

fn draw(init: Init, shape: &[i64], seed: u64, name: &str) -> Result<Tensor> {
    let mut generator = Generator::new(Device::Cpu, stream_seed(seed, name))?;
    Ok(match init {
        // Allocate first: without memory, tch panics in an operation with a scalar.
        Init::Constant(value) => Tensor::f_empty(shape, (Kind::Float, Device::Cpu))
            .and_then(|mut empty| empty.f_fill_(value))
            .map_err(Error::torch("initialising parameters"))?,
        Init::Uniform { bound } => (generator.uniform(shape, Kind::Float)? * 2.0 - 1.0) * bound,
        Init::Normal { std } => generator.normal(shape, Kind::Float)? * std,
    })
}

/// A separate seed for every name.
fn stream_seed(seed: u64, name: &str) -> u64 {
    // FNV-1a, which unlike the standard library's hash is the same in every release; then the finalizer of SplitMix64.
    // libtorch's CPU generator uses only the lower half, which the last shift mixes with the upper.
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mixed =
        (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ hash).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
