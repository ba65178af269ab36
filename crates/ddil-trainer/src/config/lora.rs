//! A student that is a LoRA adapter.

use std::fmt;

use ddil_models::{LoraConfig, Parameters};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ensure;
use crate::error::Result;

/// A low-rank adapter of the teacher's weights, which stay frozen. The defaults are those of LCM-LoRA ([Luo et al.
/// 2023](https://arxiv.org/abs/2311.05556)).
///
/// Teacher, student and their moving averages share one copy of the base weights. The network is never in training
/// mode, so its own dropout has no effect. If the guidance weight is drawn per sample (`cfg_range`), the student does
/// not receive it and learns the average over the range: an embedding of the weight would belong to the base, and
/// adapter files cannot store it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSection {
    /// Rank of an adapter's two factors; default 64.
    pub rank: u32,
    /// The adapter's output is scaled by `alpha / rank`; default 64.
    pub alpha: f64,
    /// Layers with an adapter: `"default"`, or a list of names or name suffixes.
    pub targets: LoraTargets,
    /// What is exported; default `adapter`.
    pub export: LoraExport,
}

/// Layers with an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum LoraTargets {
    /// `"default"`: the layers of LCM-LoRA that the teacher has. Attention, feed-forward layers, convolutions and the
    /// time projections of all blocks.
    #[default]
    Default,
    /// Layers whose name is in the list, or ends with a dot and an entry of the list.
    Named(Vec<String>),
}

/// What a run with an adapter exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraExport {
    /// A folder with `pytorch_lora_weights.safetensors`, for diffusers' `load_lora_weights`, and with the scheduler for
    /// it. `ddil` reads it as a model that refers to the folder of the base.
    #[default]
    Adapter,
    /// A whole pipeline with the adapter merged into the weights.
    Merged,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self { rank: 64, alpha: 64.0, targets: LoraTargets::Default, export: LoraExport::Adapter }
    }
}

/// Above the input size of any layer of a published network.
const MAX_RANK: u32 = 16_384;

impl LoraSection {
    pub(super) fn ensure(&self) -> Result<()> {
        let expected = format!("in 1..={MAX_RANK}: no layer is wide enough for a higher rank");
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
