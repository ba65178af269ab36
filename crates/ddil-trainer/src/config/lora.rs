//! A student that is an adapter.

use std::fmt;

use ddil_models::{LoraConfig, Parameters};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ensure;
use crate::error::Result;

/// An adapter of low rank on the teacher's own weights, which stay as they are: the defaults are those of LCM-LoRA
/// ([Luo et al. 2023](https://arxiv.org/abs/2311.05556)).
///
/// Teacher, student and their moving averages share one copy of the base. The network is never in training mode, so that
/// a dropout of its own plays no part. Where the guidance weight is drawn for each sample (`cfg_range`), the student is
/// told none and learns the average over the range: an embedding of it would be a weight of the base, for which a file of
/// adapters has no place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSection {
    /// How many numbers lie between the two factors of an adapter; default 64.
    pub rank: u32,
    /// What an adapter adds is multiplied by `alpha / rank`; default 64.
    pub alpha: f64,
    /// Which layers have one: `"default"`, or a list of names or ends of names.
    pub targets: LoraTargets,
    /// What the run comes to; default `adapter`.
    pub export: LoraExport,
}

/// Which layers have an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum LoraTargets {
    /// `"default"`: those of LCM-LoRA that the teacher has. Attention, feed-forward layers, convolutions and the time's
    /// projections of all blocks.
    #[default]
    Default,
    /// Those whose names are in a list, or end with a dot and one that is.
    Named(Vec<String>),
}

/// What a run with an adapter comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraExport {
    /// A folder with `pytorch_lora_weights.safetensors`, for which diffusers has `load_lora_weights`, and the scheduler to
    /// use it with. `ddil` reads it as a model, from the base's own folder.
    #[default]
    Adapter,
    /// A whole pipeline with the adapter added to the weights.
    Merged,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self { rank: 64, alpha: 64.0, targets: LoraTargets::Default, export: LoraExport::Adapter }
    }
}

/// No layer of a published network has more inputs.
const MAX_RANK: u32 = 16_384;

impl LoraSection {
    pub(super) fn ensure(&self) -> Result<()> {
        let expected = format!("in 1..={MAX_RANK}: beyond, it would be no adapter of low rank");
        ensure("student.lora.rank", self.rank, (1..=MAX_RANK).contains(&self.rank), &expected)?;
        let alpha = self.alpha.is_finite() && self.alpha > 0.0;
        ensure("student.lora.alpha", self.alpha, alpha, "a finite number above 0")
    }

    /// The adapters for a network.
    pub fn on(&self, network: &Parameters) -> LoraConfig {
        let targets = match &self.targets {
            LoraTargets::Default => LoraConfig::default_for(network).targets,
            LoraTargets::Named(names) => names.clone(),
        };
        LoraConfig { rank: self.rank.into(), alpha: self.alpha, targets }
    }
}

const DEFAULT: &str = "default";

impl Serialize for LoraTargets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_str(DEFAULT),
            Self::Named(names) => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for LoraTargets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StringOrList)
    }
}

struct StringOrList;

impl<'de> Visitor<'de> for StringOrList {
    type Value = LoraTargets;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{DEFAULT}\" or a list of names of layers")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<LoraTargets, E> {
        if text == DEFAULT {
            return Ok(LoraTargets::Default);
        }
        Err(E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, names: A) -> Result<LoraTargets, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(names)).map(LoraTargets::Named)
    }
}
