//! Adapter files with the names of diffusers or of kohya.

use std::collections::BTreeMap;
use std::path::Path;

use ddil_libtorch::ArgumentError;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::names::{KOHYA_UNET, Names, Part, UNET, is_of_text, underscored};
use super::{Layer, Lora, LoraLayer, matches};
use crate::config::read_file;
use crate::error::{Error, Result, WeightProblems, is_float};
use crate::weights;

/// The metadata key of PEFT's adapter settings in diffusers' files.
const METADATA: &str = "lora_adapter_metadata";
/// The naming scheme of an adapter file.
///
/// # Example
///
/// ```
/// use ddil_models::{Lora, LoraConfig, LoraFormat, MlpConfig, NetworkConfig, Placement};
///
/// # let path = std::env::temp_dir().join(format!("ddil-lora-{}.safetensors", std::process::id()));
/// let network = MlpConfig::default().build(Placement::default(), 0)?;
/// let config = LoraConfig { rank: 2, alpha: 4.0, targets: vec!["layers.0".into()] };
/// let lora = Lora::attach(network.parameters(), &config, 0)?;
/// lora.save(&path, LoraFormat::Kohya)?;
/// let names = ddil_models::weights::read_all(&path)?.into_keys().collect::<Vec<_>>();
/// assert_eq!(names[1], "lora_unet_layers_0.lora_down.weight");
/// # std::fs::remove_file(&path)?;
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraFormat {
    /// `unet.LAYER.lora_A.weight`, ranks and alphas in the file's metadata: the format that diffusers'
    /// `save_lora_weights` writes to `pytorch_lora_weights.safetensors`.
    #[default]
    Diffusers,
    /// `lora_unet_LAYER.lora_down.weight` and a tensor `lora_unet_LAYER.alpha`, with `_` for the dots in a layer's
    /// name: the format that kohya's programs and many interfaces read. diffusers 0.42 reads it correctly if all layers
    /// have the same alpha; it only warns about a separate alpha of attention.
    Kohya,
}

/// An adapter in a file.
pub(super) struct Found<'a> {
    pub(super) layer: &'a Layer,
    pub(super) rank: i64,
    pub(super) alpha: f64,
    pub(super) down: Tensor,
    pub(super) up: Tensor,
}

pub(super) struct Contents<'a> {
    /// In the order of the network.
    pub(super) adapters: Vec<Found<'a>>,
    pub(super) ignored: Vec<String>,
}

/// The entries of a file for one layer, each with its name.
#[derive(Default)]
struct Parts {
    down: Option<(String, Tensor)>,
    up: Option<(String, Tensor)>,
    alpha: Option<(String, Tensor)>,
}

impl Lora {
    /// Writes the adapters in their kind, from any device; [`Self::scale`] is not part of the file.
    ///
    /// # Errors
    ///
    /// As [`weights::save`].
    pub fn save(&self, path: impl AsRef<Path>, format: LoraFormat) -> Result<()> {
        let layers = self.layers();
        let tensors = self.parameters().named();
        match format {
            LoraFormat::Diffusers => {
                let rename = |(name, tensor)| (format!("{UNET}{name}"), tensor);
                let tensors: Vec<_> = tensors.into_iter().map(rename).collect();
                let settings = settings(&layers).to_string();
                weights::save(&tensors, path, &BTreeMap::from([(METADATA.to_owned(), settings)]))
            }
            LoraFormat::Kohya => weights::save(&kohya(&layers, tensors), path, &BTreeMap::new()),
        }
    }
}

/// PEFT's settings of these adapters, in diffusers' format for a U-Net.
fn settings(layers: &[LoraLayer]) -> Value {
    let (rank, alpha) = layers.first().map_or((1, 1.0), |layer| (layer.rank, layer.alpha));
    let mut ranks = Map::new();
    let mut alphas = Map::new();
    for layer in layers {
        if layer.rank != rank {
            ranks.insert(layer.name.clone(), layer.rank.into());
        }
        if layer.alpha != alpha {
            alphas.insert(layer.name.clone(), layer.alpha.into());
        }
    }
    let targets: Vec<_> = layers.iter().map(|layer| layer.name.as_str()).collect();
    json!({
        "unet.peft_type": "LORA",
        "unet.r": rank,
        "unet.lora_alpha": alpha,
        "unet.target_modules": targets,
        "unet.rank_pattern": ranks,
        "unet.alpha_pattern": alphas,
    })
}

fn kohya(layers: &[LoraLayer], tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    let mut renamed = Vec::with_capacity(tensors.len() + layers.len());
    for (name, tensor) in tensors {
        let ends = [(".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")];
        let new = ends.iter().find_map(|(old, new)| {
            let layer = name.strip_suffix(old)?;
            Some(format!("{KOHYA_UNET}{}{new}", underscored(layer)))
        });
        renamed.push((new.unwrap_or(name), tensor));
    }
    for layer in layers {
        let alpha = Tensor::full([0; 0], layer.alpha, (Kind::Float, Device::Cpu));
        renamed.push((format!("{KOHYA_UNET}{}.alpha", underscored(&layer.name)), alpha));
    }
    renamed
}

/// The adapters in a file for these layers.
pub(super) fn read<'a>(layers: &'a [Layer], path: &Path) -> Result<Contents<'a>> {
    let alphas = Alphas::read(path)?;
    let names = Names::of(layers);
    let mut found: BTreeMap<usize, Parts> = BTreeMap::new();
    let mut problems = WeightProblems::default();
    let mut ignored = Vec::new();
    for (name, tensor) in weights::read_all(path)? {
        if is_of_text(&name) {
            ignored.push(name);
            continue;
        }
        let taken = names.parse(&name).is_some_and(|(layer, part)| {
            let parts = found.entry(layer).or_default();
            let place = match part {
                Part::Down => &mut parts.down,
                Part::Up => &mut parts.up,
                Part::Alpha => &mut parts.alpha,
            };
            // A second name for the same tensor is an error.
            place.is_none() && place.replace((name.clone(), tensor)).is_none()
        });
        if !taken {
            problems.unexpected.push(name);
        }
    }
    let mut adapters = Vec::with_capacity(found.len());
    for (index, parts) in found {
        adapters.extend(parts.check(&layers[index], &alphas, &mut problems));
    }
    if !problems.is_empty() {
        return Err(Error::WeightsMismatch { path: path.into(), problems: Box::new(problems) });
    }
    if adapters.is_empty() {
        return Err(Error::NoAdapter { path: path.into(), ignored });
    }
    if let Some(Found { layer, alpha, .. }) = adapters.iter().find(|a| !a.alpha.is_finite()) {
        let found = format!("{alpha} for `{}`", layer.name);
        return Err(invalid("alpha", found, "a finite number"));
    }
    Ok(Contents { adapters, ignored })
}

fn invalid(name: &'static str, found: String, expected: &str) -> Error {
    ArgumentError::value("Lora::from_file", name, found, expected).into()
}

impl Parts {
    /// The adapter, if it is valid.
    fn check<'a>(
        self,
        layer: &'a Layer,
        alphas: &Alphas,
        problems: &mut WeightProblems,
    ) -> Option<Found<'a>> {
        let mut missing = |end: &str| problems.missing.push(format!("{}.{end}", layer.name));
        let (down, up) = match (self.down, self.up) {
            (Some(down), Some(up)) => (down, up),
            (down, up) => {
                down.is_none().then(|| missing("lora_A.weight"));
                up.is_none().then(|| missing("lora_B.weight"));
                return None;
            }
        };
        let rank = down.1.size().first().copied().unwrap_or(0).max(1);
        let [down_shape, up_shape] = layer.shapes(rank);
        let fits = fits(&down, &down_shape, problems) & fits(&up, &up_shape, problems);
        let alpha = match self.alpha {
            Some(alpha) => number(&alpha, problems)?,
            None => alphas.of(&layer.name, rank),
        };
        fits.then_some(Found { layer, rank, alpha, down: down.1, up: up.1 })
    }
}

/// Whether a tensor has a floating-point kind and this shape, up to trailing dimensions of 1.
fn fits((name, tensor): &(String, Tensor), shape: &[i64], problems: &mut WeightProblems) -> bool {
    let right = trimmed(&tensor.size()) == trimmed(shape) && tensor.dim() >= 2;
    if !right {
        problems.misshapen.push((name.clone(), tensor.size(), shape.to_vec()));
    }
    let float = is_float(tensor.kind());
    if !float {
        problems.wrong_kind.push((name.clone(), format!("{:?}", tensor.kind()), Kind::Float));
    }
    right && float
}

fn trimmed(shape: &[i64]) -> Vec<i64> {
    let mut shape = shape.to_vec();
    while shape.len() > 2 && shape.last() == Some(&1) {
        shape.pop();
    }
    shape
}

/// The value of a tensor with one element.
fn number((name, tensor): &(String, Tensor), problems: &mut WeightProblems) -> Option<f64> {
    if tensor.numel() != 1 {
        problems.misshapen.push((name.clone(), tensor.size(), Vec::new()));
        return None;
    }
    Some(tensor.to_kind(Kind::Double).view([1]).double_value(&[0]))
}

/// The values of alpha in a file's metadata.
#[derive(Default)]
struct Alphas {
    /// The default; the rank if there is none.
    general: Option<f64>,
    /// Values by the suffix of a layer's name.
    pattern: Vec<(String, f64)>,
    /// Whether the output is divided by the square root of the rank instead of the rank.
    root: bool,
}

impl Alphas {
    fn read(path: &Path) -> Result<Self> {
        let metadata = weights::read_metadata(path)?;
        ensure_no_dora(&metadata)?;
        let settings = match metadata.get(METADATA) {
            Some(text) => ddil_files::parse_json(text.as_bytes()).map_err(|source| {
                Error::InvalidJson { path: path.into(), source: source.into() }
            })?,
            None => of_peft(path)?,
        };
        Self::of_settings(&settings)
    }

    fn of_settings(settings: &Map<String, Value>) -> Result<Self> {
        let get = |key: &str| settings.get(&format!("{UNET}{key}")).or_else(|| settings.get(key));
        if get("use_dora").and_then(Value::as_bool) == Some(true) {
            return Err(dora("use_dora", "true"));
        }
        let mut pattern = Vec::new();
        for (key, value) in get("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
            // PEFT's patterns are regular expressions: `^` is the start of a name.
            let name = key.strip_prefix('^').unwrap_or(key).replace("\\.", ".");
            let is_name = name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '.');
            let Some(alpha) = value.as_f64().filter(|_| is_name) else {
                let found = format!("{key:?}: {value}");
                return Err(invalid(
                    "alpha_pattern",
                    found,
                    "names or ends of names, with numbers",
                ));
            };
            pattern.push((name, alpha));
        }
        Ok(Self {
            general: get("lora_alpha").and_then(Value::as_f64),
            pattern,
            root: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        })
    }

    fn of(&self, layer: &str, rank: i64) -> f64 {
        let rank = rank as f64;
        let own = self.pattern.iter().find(|(key, _)| matches(layer, key)).map(|(_, alpha)| *alpha);
        let alpha = own.or(self.general).unwrap_or(rank);
        if self.root { alpha * rank.sqrt() } else { alpha }
    }
}

/// The settings that PEFT writes beside its weights; none for a file of another program.
fn of_peft(path: &Path) -> Result<Map<String, Value>> {
    const WEIGHTS: &str = "adapter_model.safetensors";
    let settings = path.with_file_name("adapter_config.json");
    let is_of_peft = path.file_name().is_some_and(|name| name == WEIGHTS);
    if is_of_peft && settings.is_file() {
        Ok(read_file(&settings)?.object().clone())
    } else {
        Ok(Map::new())
    }
}

/// Checks that the metadata of kohya's programs do not name `DoRA`. The magnitudes themselves are unknown names.
fn ensure_no_dora(metadata: &BTreeMap<String, String>) -> Result<()> {
    const ARGUMENTS: &str = "ss_network_args";
    let Some(text) = metadata.get(ARGUMENTS) else { return Ok(()) };
    let arguments: Map<String, Value> = ddil_files::parse_json(text.as_bytes()).unwrap_or_default();
    for key in ["dora_wd", "use_dora", "weight_decompose"] {
        let is_on = match arguments.get(key) {
            Some(Value::Bool(on)) => *on,
            Some(Value::String(text)) => ["true", "1"].contains(&text.to_lowercase().as_str()),
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            _ => false,
        };
        if is_on {
            return Err(dora(ARGUMENTS, key));
        }
    }
    Ok(())
}

fn dora(name: &'static str, found: &str) -> Error {
    let expected = "false: the magnitudes of weight decomposition (DoRA) are not supported, and without them the \
                    adapter is another one";
    invalid(name, found.to_owned(), expected)
}
