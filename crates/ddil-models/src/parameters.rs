//! The tensors a network owns: named, ordered, on one device, initialised from a seed.

use std::collections::BTreeMap;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result, WeightProblems};
use crate::weights;

/// Where a network lives and how its numbers are laid out.
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
    /// Whether convolutions keep channels innermost in memory (NHWC), the faster order for most of them.
    pub channels_last: bool,
}

impl Default for Placement {
    /// CPU, `Float`, channels outermost.
    fn default() -> Self {
        Self { device: Device::Cpu, kind: Kind::Float, channels_last: false }
    }
}

/// Where the values of new parameters come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    /// PyTorch's default initialisation. Each parameter has its own stream, keyed by its name, so that adding a layer
    /// leaves the others as they were, and drawn on the CPU, so that the device makes no difference.
    Seeded(u64),
    /// Nothing yet: a file fills all of them before anyone looks.
    Unset,
}

/// The distribution a parameter is drawn from.
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
}

/// The parameters of one network, in the order of its layers, under the names they have in its files.
///
/// The tensors are handles: what changes one changes the network.
#[derive(Debug)]
pub struct Parameters {
    entries: Vec<Parameter>,
    placement: Placement,
}

impl Parameters {
    /// Where the parameters are, and their kind.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Every parameter with its name, constants among them: what a file holds.
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

    /// How many numbers there are in all.
    pub fn num_values(&self) -> usize {
        self.entries.iter().map(|p| p.tensor.numel()).sum()
    }

    /// Switches gradients on or off for every learned parameter.
    pub fn set_trainable(&self, trainable: bool) {
        for parameter in self.entries.iter().filter(|p| p.learned) {
            // The flag lives in the tensor behind the handle.
            let _ = parameter.tensor.set_requires_grad(trainable);
        }
    }

    /// Takes over the values of a network with the same parameters, cast to this one's kind and device.
    ///
    /// # Errors
    ///
    /// [`Error::ParametersDiffer`] if a name or shape differs; nothing is copied then.
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
            copy.map_err(Error::libtorch("Parameters::copy_from"))?;
        }
        Ok(())
    }

    /// Fills every parameter from a safetensors file or an index of shards.
    ///
    /// # Errors
    ///
    /// As [`weights::load_into`]: whatever is wrong with the file, no parameter has changed.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        weights::load_into(&self.named(), path)
    }

    /// Writes every parameter to a safetensors file, as diffusers would.
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
    placement: Placement,
    values: Values,
}

impl Builder {
    pub(crate) fn new(placement: Placement, values: Values) -> Self {
        Self { entries: Vec::new(), placement, values }
    }

    pub(crate) fn root(&mut self) -> Scope<'_> {
        Scope { builder: self, prefix: String::new() }
    }

    pub(crate) fn finish(self) -> Parameters {
        Parameters { entries: self.entries, placement: self.placement }
    }
}

/// A place in the tree of names, such as `down_blocks.0.resnets.1`.
#[derive(Debug)]
pub(crate) struct Scope<'a> {
    builder: &'a mut Builder,
    prefix: String,
}

impl Scope<'_> {
    /// The place `name` below this one.
    pub(crate) fn at(&mut self, name: &str) -> Scope<'_> {
        let prefix = self.name(name);
        Scope { builder: self.builder, prefix }
    }

    /// A learned parameter.
    pub(crate) fn parameter(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        self.add(name, shape, init, true)
    }

    /// A constant that is saved with the network.
    pub(crate) fn constant(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        self.add(name, shape, init, false)
    }

    fn name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn add(&mut self, name: &str, shape: &[i64], init: Init, learned: bool) -> Result<Tensor> {
        let name = self.name(name);
        let _no_grad = tch::no_grad_guard();
        let mut tensor = empty(shape, self.builder.placement)?;
        if let Values::Seeded(seed) = self.builder.values {
            let values = draw(init, tensor.numel(), seed, &name);
            let values = Tensor::from_slice(&values).view(shape);
            tensor.f_copy_(&values).map_err(Error::libtorch("initialising parameters"))?;
        }
        let tensor = tensor.set_requires_grad(learned);
        let handle = tensor.shallow_clone();
        self.builder.entries.push(Parameter { name, tensor, learned });
        Ok(handle)
    }
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
    tensor.map_err(Error::libtorch("allocating parameters"))
}

fn draw(init: Init, len: usize, seed: u64, name: &str) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed ^ fnv1a(name));
    match init {
        Init::Constant(value) => vec![value as f32; len],
        Init::Uniform { bound } => {
            let bound = bound as f32;
            (0..len).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0)).collect()
        }
        Init::Normal { std } => {
            let std = std as f32;
            (0..len).map(|_| std * rng.sample::<f32, _>(StandardNormal)).collect()
        }
    }
}

/// The 64-bit FNV-1a hash, which unlike the standard library's is the same in every release.
fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// `tensor` with channels innermost in memory if `channels_last`, as it is otherwise.
pub(crate) fn to_memory_format(
    tensor: &Tensor,
    channels_last: bool,
) -> std::result::Result<Tensor, tch::TchError> {
    if !channels_last || tensor.dim() != 4 {
        return Ok(tensor.shallow_clone());
    }
    tensor.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])
}
