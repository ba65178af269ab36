//! The settings of CLIP's towers, key for key those of transformers.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::config::{self, Config, UnknownKeys};
use crate::error::{ConfigProblem, Error, Result};
use crate::parameters::{Placement, Values};

use super::encoder::EncoderOptions;
use super::files;
use super::model::ClipModel;
use super::text::ClipTextModel;
use super::vision::ClipVisionModel;

/// The transformers release whose `config.json` is written.
const TRANSFORMERS_VERSION: &str = "5.24.0";

/// Keys that transformers writes for every network and that no CLIP tower looks at: how text is generated, what heads a
/// classifier has, where a file came from. They are accepted with any value and not written back.
const GENERIC_KEYS: [&str; 54] = [
    "add_cross_attention",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    // Of a release that had it in CLIP's settings and in none of its layers.
    "dropout",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// The nonlinearity of a CLIP tower, spelt as in transformers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipActivation {
    /// `x * sigmoid(1.702 x)`, of OpenAI's networks.
    #[default]
    QuickGelu,
    /// `x` times the normal distribution function of `x`, of `OpenCLIP`'s.
    Gelu,
}

impl ClipActivation {
    pub(super) fn forward(self, x: &Tensor) -> crate::layers::Output {
        match self {
            Self::QuickGelu => x.f_mul(&x.f_mul_scalar(1.702)?.f_sigmoid()?),
            Self::Gelu => x.f_gelu("none"),
        }
    }
}

/// The class of a text encoder, which says whether it ends with a projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClipTextClass {
    /// Hidden states alone, as Stable Diffusion wants them.
    #[default]
    #[serde(rename = "CLIPTextModel")]
    TextModel,
    /// With `text_embeds`, as Stable Diffusion XL's second encoder and the score have them.
    #[serde(rename = "CLIPTextModelWithProjection")]
    TextModelWithProjection,
}

/// The class of a vision tower, which says whether it ends with a projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClipVisionClass {
    /// Hidden states alone.
    #[default]
    #[serde(rename = "CLIPVisionModel")]
    VisionModel,
    /// With `image_embeds`.
    #[serde(rename = "CLIPVisionModelWithProjection")]
    VisionModelWithProjection,
}

/// The settings of a [`ClipTextModel`]; names, defaults and file format are those of transformers' class of that name.
///
/// Dropout is not applied: in every published encoder it is 0.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipTextConfig, Placement};
///
/// let config = ClipTextConfig {
///     vocab_size: 100,
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 2,
///     num_attention_heads: 2,
///     eos_token_id: 99,
///     ..ClipTextConfig::default()
/// };
/// let encoder = config.build(Placement::default(), 0)?;
/// assert_eq!(ClipTextConfig::stable_diffusion_2().num_hidden_layers, 23);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipTextConfig {
    /// The class; a file without it is one without projection.
    pub architectures: [ClipTextClass; 1],
    /// Number of tokens. Default 49408.
    pub vocab_size: u32,
    /// Width of a hidden state. Default 512.
    pub hidden_size: u32,
    /// Width between the two linear layers that follow attention. Default 2048.
    pub intermediate_size: u32,
    /// Width of `text_embeds`; it plays no part in a class without projection. Default 512.
    pub projection_dim: Option<u32>,
    /// Default 12.
    pub num_hidden_layers: u32,
    /// Default 8.
    pub num_attention_heads: u32,
    /// Length of the longest prompt, in tokens. Default 77.
    pub max_position_embeddings: u32,
    /// The nonlinearity. Default quick gelu.
    pub hidden_act: ClipActivation,
    /// Added to a variance before its root is taken. Default 1e-5.
    pub layer_norm_eps: f64,
    /// Written back; not applied. Default 0.
    pub attention_dropout: f64,
    /// Written back; transformers looks at it in the vision tower alone. Default 0.02.
    pub initializer_range: f64,
    /// Scale of fresh parameters. Default 1.
    pub initializer_factor: f64,
    /// Plays no part in a forward pass. Default 1.
    pub pad_token_id: Option<i64>,
    /// Plays no part in a forward pass. Default 49406.
    pub bos_token_id: Option<i64>,
    /// The token whose first position is the pooled one; 2, which older files have, stands for the largest token of a
    /// prompt. Default 49407.
    pub eos_token_id: i64,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            architectures: [ClipTextClass::TextModel],
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: Some(512),
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
            pad_token_id: Some(1),
            bos_token_id: Some(49406),
            eos_token_id: 49407,
        }
    }
}

impl ClipTextConfig {
    /// The encoder of Stable Diffusion 1 and the first one of Stable Diffusion XL: CLIP's `ViT-L/14`.
    pub fn stable_diffusion() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: Some(768),
            num_attention_heads: 12,
            bos_token_id: Some(0),
            eos_token_id: 2,
            ..Self::default()
        }
    }

    /// The encoder of Stable Diffusion 2: `OpenCLIP`'s `ViT-H/14` without its last layer.
    pub fn stable_diffusion_2() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            projection_dim: Some(512),
            num_hidden_layers: 23,
            num_attention_heads: 16,
            hidden_act: ClipActivation::Gelu,
            ..Self::stable_diffusion()
        }
    }

    /// The second encoder of Stable Diffusion XL: `OpenCLIP`'s `ViT-bigG/14`, with projection.
    pub fn stable_diffusion_xl_second() -> Self {
        Self {
            architectures: [ClipTextClass::TextModelWithProjection],
            hidden_size: 1280,
            intermediate_size: 5120,
            projection_dim: Some(1280),
            num_hidden_layers: 32,
            num_attention_heads: 20,
            ..Self::stable_diffusion_2()
        }
    }

    /// Settings from a `config.json` that transformers or [`Self::to_json`] wrote; keys that are absent have their
    /// default.
    ///
    /// Keys that transformers writes for every kind of network, such as those of text generation, change nothing here:
    /// they are passed over.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::InvalidJson`], and [`Error::InvalidConfig`] with every key that is unknown or has an
    /// impossible value.
    pub fn from_file(path: impl AsRef<Path>, unknown_keys: UnknownKeys) -> Result<Self> {
        let path = path.as_ref();
        read(&path.display().to_string(), &config::read_object(path)?, unknown_keys)
    }

    /// The settings as a `config.json` that transformers reads.
    pub fn to_json(&self) -> String {
        write(self)
    }

    /// Checks the settings and builds an encoder with fresh parameters, drawn as transformers would; a projection as
    /// `torch.nn` would.
    ///
    /// The same seed gives the same parameters on every device.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] with every impossible value; [`Error::Torch`] if the device is not there or its memory
    /// does not suffice.
    pub fn build(&self, placement: Placement, seed: u64) -> Result<ClipTextModel> {
        ClipTextModel::new(self, placement, Values::Seeded(seed))
    }

    /// Checks the settings and builds an encoder with the parameters in a safetensors file or index of shards.
    ///
    /// The names may be those of published files (`text_model.encoder...`) or those that transformers 5 writes for a
    /// `CLIPTextModel` (`encoder...`). Older files hold `text_model.embeddings.position_ids`, which is no parameter; it
    /// is passed over.
    ///
    /// # Errors
    ///
    /// As [`Self::build`], and as [`weights::load_into`](crate::weights::load_into).
    pub fn build_from(
        &self,
        placement: Placement,
        weights: impl AsRef<Path>,
    ) -> Result<ClipTextModel> {
        let encoder = ClipTextModel::new(self, placement, Values::Unset)?;
        files::load(encoder.parameters().named(), weights.as_ref())?;
        Ok(encoder)
    }

    /// Whether there is a projection.
    pub(super) fn projects(&self) -> bool {
        self.architectures == [ClipTextClass::TextModelWithProjection]
    }

    pub(super) fn encoder_options(&self) -> EncoderOptions {
        EncoderOptions {
            width: self.hidden_size.into(),
            inner: self.intermediate_size.into(),
            num_layers: self.num_hidden_layers.into(),
            heads: self.num_attention_heads.into(),
            activation: self.hidden_act,
            eps: self.layer_norm_eps,
            initializer_factor: self.initializer_factor,
        }
    }
}

impl Config for ClipTextConfig {
    const CLASS_NAME: &'static str = "CLIPTextModel";

    fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let counts = [
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        ensure_counts(&counts, &mut problems);
        ensure_heads(self.hidden_size, self.num_attention_heads, &mut problems);
        match self.projection_dim {
            Some(0) => problems.push(ConfigProblem::new("projection_dim", 0, "at least 1")),
            None if self.projects() => {
                problems.push(ConfigProblem::new("projection_dim", "null", "a width"));
            }
            _ => {}
        }
        let eos = self.eos_token_id;
        if eos != LARGEST_TOKEN && !(0..self.vocab_size.into()).contains(&eos) {
            let expected = format!("{LARGEST_TOKEN}, or less than vocab_size, {}", self.vocab_size);
            problems.push(ConfigProblem::new("eos_token_id", eos, expected));
        }
        ensure_numbers(
            self.layer_norm_eps,
            self.attention_dropout,
            [
                ("initializer_range", self.initializer_range),
                ("initializer_factor", self.initializer_factor),
            ],
            &mut problems,
        );
        problems
    }
}

/// What `eos_token_id` is where the pooled position is that of the largest token.
pub(super) const LARGEST_TOKEN: i64 = 2;

/// The settings of a [`ClipVisionModel`]; names, defaults and file format are those of transformers' class of that name.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipVisionConfig, Placement};
///
/// let config = ClipVisionConfig {
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 2,
///     num_attention_heads: 2,
///     image_size: 16,
///     patch_size: 8,
///     ..ClipVisionConfig::default()
/// };
/// let tower = config.build(Placement::default(), 0)?;
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipVisionConfig {
    /// The class; a file without it is one without projection.
    pub architectures: [ClipVisionClass; 1],
    /// Width of a hidden state. Default 768.
    pub hidden_size: u32,
    /// Width between the two linear layers that follow attention. Default 3072.
    pub intermediate_size: u32,
    /// Width of `image_embeds`; it plays no part in a class without projection. Default 512.
    pub projection_dim: u32,
    /// Default 12.
    pub num_hidden_layers: u32,
    /// Default 12.
    pub num_attention_heads: u32,
    /// Channels of a picture. Default 3.
    pub num_channels: u32,
    /// Height and width of a picture. Default 224.
    pub image_size: u32,
    /// Height and width of the patches it is cut into. Default 32.
    pub patch_size: u32,
    /// The nonlinearity. Default quick gelu.
    pub hidden_act: ClipActivation,
    /// Added to a variance before its root is taken. Default 1e-5.
    pub layer_norm_eps: f64,
    /// Written back; not applied. Default 0.
    pub attention_dropout: f64,
    /// Standard deviation of fresh embeddings. Default 0.02.
    pub initializer_range: f64,
    /// Scale of fresh parameters. Default 1.
    pub initializer_factor: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            architectures: [ClipVisionClass::VisionModel],
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
        }
    }
}

impl ClipVisionConfig {
    /// Settings from a `config.json`, as [`ClipTextConfig::from_file`].
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::from_file`].
    pub fn from_file(path: impl AsRef<Path>, unknown_keys: UnknownKeys) -> Result<Self> {
        let path = path.as_ref();
        read(&path.display().to_string(), &config::read_object(path)?, unknown_keys)
    }

    /// The settings as a `config.json` that transformers reads.
    pub fn to_json(&self) -> String {
        write(self)
    }

    /// Checks the settings and builds a tower with fresh parameters, drawn as transformers would; a projection as
    /// `torch.nn` would.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::build`].
    pub fn build(&self, placement: Placement, seed: u64) -> Result<ClipVisionModel> {
        ClipVisionModel::new(self, placement, Values::Seeded(seed))
    }

    /// Checks the settings and builds a tower with the parameters in a safetensors file or index of shards, under any of
    /// the names that [`ClipTextConfig::build_from`] speaks of.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::build_from`].
    pub fn build_from(
        &self,
        placement: Placement,
        weights: impl AsRef<Path>,
    ) -> Result<ClipVisionModel> {
        let tower = ClipVisionModel::new(self, placement, Values::Unset)?;
        files::load(tower.parameters().named(), weights.as_ref())?;
        Ok(tower)
    }

    /// Whether there is a projection.
    pub(super) fn projects(&self) -> bool {
        self.architectures == [ClipVisionClass::VisionModelWithProjection]
    }

    pub(super) fn encoder_options(&self) -> EncoderOptions {
        EncoderOptions {
            width: self.hidden_size.into(),
            inner: self.intermediate_size.into(),
            num_layers: self.num_hidden_layers.into(),
            heads: self.num_attention_heads.into(),
            activation: self.hidden_act,
            eps: self.layer_norm_eps,
            initializer_factor: self.initializer_factor,
        }
    }
}

impl Config for ClipVisionConfig {
    const CLASS_NAME: &'static str = "CLIPVisionModel";

    fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let counts = [
            ("intermediate_size", self.intermediate_size),
            ("projection_dim", self.projection_dim),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_channels", self.num_channels),
            ("patch_size", self.patch_size),
        ];
        ensure_counts(&counts, &mut problems);
        ensure_heads(self.hidden_size, self.num_attention_heads, &mut problems);
        if self.image_size < self.patch_size.max(1) {
            let expected = format!("at least patch_size, {}", self.patch_size);
            problems.push(ConfigProblem::new("image_size", self.image_size, expected));
        }
        ensure_numbers(
            self.layer_norm_eps,
            self.attention_dropout,
            [
                ("initializer_range", self.initializer_range),
                ("initializer_factor", self.initializer_factor),
            ],
            &mut problems,
        );
        problems
    }
}

/// The settings of a [`ClipModel`], both towers side by side; transformers' `CLIPConfig`.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipConfig, ClipTextConfig, ClipVisionConfig, Placement};
///
/// let text = ClipTextConfig {
///     vocab_size: 100,
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 1,
///     num_attention_heads: 2,
///     eos_token_id: 99,
///     ..ClipTextConfig::default()
/// };
/// let vision = ClipVisionConfig {
///     hidden_size: 12,
///     intermediate_size: 16,
///     num_hidden_layers: 1,
///     num_attention_heads: 2,
///     image_size: 16,
///     patch_size: 8,
///     ..ClipVisionConfig::default()
/// };
/// let config = ClipConfig { text, vision, projection_dim: 4, ..ClipConfig::default() };
/// let clip = config.build(Placement::default(), 0)?;
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// The text encoder; its class and `projection_dim` are not looked at.
    pub text: ClipTextConfig,
    /// The vision tower; its class and `projection_dim` are not looked at.
    pub vision: ClipVisionConfig,
    /// Width of both towers' embeddings. Default 512.
    pub projection_dim: u32,
    /// The logarithm of a fresh temperature. Default 2.6592.
    pub logit_scale_init_value: f64,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            text: ClipTextConfig::default(),
            vision: ClipVisionConfig::default(),
            projection_dim: 512,
            logit_scale_init_value: 2.6592,
        }
    }
}

impl ClipConfig {
    /// Settings from the `config.json` of a `CLIPModel`, as [`ClipTextConfig::from_file`].
    ///
    /// Older files hold a tower's settings twice; as in transformers `text_config_dict` counts before `text_config`.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::from_file`], with the problems of both towers.
    pub fn from_file(path: impl AsRef<Path>, unknown_keys: UnknownKeys) -> Result<Self> {
        let path = path.as_ref();
        let object = config::read_object(path)?;
        let mut problems = Vec::new();
        let text = nested(&object, "text_config", unknown_keys, &mut problems);
        let vision = nested(&object, "vision_config", unknown_keys, &mut problems);
        let mut rest = object;
        for key in ["text_config", "text_config_dict", "vision_config", "vision_config_dict"] {
            rest.remove(key);
        }
        let what = path.display().to_string();
        let whole: Option<Whole> = keep_problems(read(&what, &rest, unknown_keys), &mut problems)?;
        match (text, vision, whole) {
            (Some(text), Some(vision), Some(whole)) if problems.is_empty() => Ok(Self {
                text,
                vision,
                projection_dim: whole.projection_dim,
                logit_scale_init_value: whole.logit_scale_init_value,
            }),
            _ => Err(Error::InvalidConfig { what, problems }),
        }
    }

    /// Checks the settings and builds both towers with fresh parameters.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::build`].
    pub fn build(&self, placement: Placement, seed: u64) -> Result<ClipModel> {
        ClipModel::new(self, placement, Values::Seeded(seed))
    }

    /// Checks the settings and builds both towers with the parameters in one safetensors file or index of shards.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::build_from`].
    pub fn build_from(&self, placement: Placement, weights: impl AsRef<Path>) -> Result<ClipModel> {
        let clip = ClipModel::new(self, placement, Values::Unset)?;
        files::load(clip.parameters().named(), weights.as_ref())?;
        Ok(clip)
    }
}

/// What stands beside the towers in the file of a [`ClipConfig`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Whole {
    architectures: [WholeClass; 1],
    projection_dim: u32,
    logit_scale_init_value: f64,
    initializer_factor: f64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
enum WholeClass {
    #[default]
    #[serde(rename = "CLIPModel")]
    Clip,
}

impl Default for Whole {
    fn default() -> Self {
        Self {
            architectures: [WholeClass::Clip],
            projection_dim: 512,
            logit_scale_init_value: 2.6592,
            initializer_factor: 1.0,
        }
    }
}

impl Config for Whole {
    const CLASS_NAME: &'static str = "CLIPModel";

    fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        ensure_counts(&[("projection_dim", self.projection_dim)], &mut problems);
        problems
    }
}

/// What stands under `model_type` in a transformers file.
trait ModelType: Config {
    const MODEL_TYPE: &'static str;
}

impl ModelType for ClipTextConfig {
    const MODEL_TYPE: &'static str = "clip_text_model";
}

impl ModelType for ClipVisionConfig {
    const MODEL_TYPE: &'static str = "clip_vision_model";
}

impl ModelType for Whole {
    const MODEL_TYPE: &'static str = "clip";
}

/// Settings from a transformers file, with all that is wrong in one error.
fn read<C: ModelType>(
    what: &str,
    object: &Map<String, Value>,
    unknown_keys: UnknownKeys,
) -> Result<C> {
    let mut problems = Vec::new();
    let mut settings = object.clone();
    match settings.remove("model_type") {
        Some(found) if found != C::MODEL_TYPE => {
            let expected = format!("\"{}\"", C::MODEL_TYPE);
            problems.push(ConfigProblem::new("model_type", found, expected));
        }
        _ => {}
    }
    match settings.remove("pruned_heads") {
        Some(found) if found != json!({}) && !found.is_null() => {
            problems.push(ConfigProblem::new("pruned_heads", found, "{}: all heads are kept"));
        }
        _ => {}
    }
    // Both mean that nobody said.
    settings
        .retain(|key, value| !(key == "architectures" && (value.is_null() || *value == json!([]))));
    settings.retain(|key, _| !GENERIC_KEYS.contains(&key.as_str()));
    let config = keep_problems(config::from_object(what, &settings, unknown_keys), &mut problems)?;
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(Error::InvalidConfig { what: what.to_owned(), problems }),
    }
}

/// Collects the problems of settings, so that others can be told with them.
fn keep_problems<C>(result: Result<C>, problems: &mut Vec<ConfigProblem>) -> Result<Option<C>> {
    match result {
        Ok(config) => Ok(Some(config)),
        Err(Error::InvalidConfig { problems: more, .. }) => {
            problems.extend(more);
            Ok(None)
        }
        Err(other) => Err(other),
    }
}

/// A tower's settings in the file of both.
fn nested<C: ModelType>(
    object: &Map<String, Value>,
    key: &str,
    unknown_keys: UnknownKeys,
    problems: &mut Vec<ConfigProblem>,
) -> Option<C> {
    let older = format!("{key}_dict");
    let value = object.get(&older).filter(|value| !value.is_null()).or_else(|| object.get(key));
    let Some(settings) = value.and_then(Value::as_object) else {
        let found = value.map_or("absent".to_owned(), Value::to_string);
        problems.push(ConfigProblem::new(key, found, "an object with the tower's settings"));
        return None;
    };
    let mut settings = settings.clone();
    // A tower in a file of both ends with a projection, whatever is said there.
    settings.remove("architectures");
    match read(key, &settings, unknown_keys) {
        Ok(config) => Some(config),
        Err(Error::InvalidConfig { problems: more, .. }) => {
            let named =
                more.into_iter().map(|p| ConfigProblem { key: format!("{key}.{}", p.key), ..p });
            problems.extend(named);
            None
        }
        Err(other) => {
            problems.push(ConfigProblem::new(key, other, "settings"));
            None
        }
    }
}

/// The settings as transformers writes them: class, type, version, sorted keys.
fn write<C: ModelType>(config: &C) -> String {
    let mut object = config::to_map(config);
    object.insert("model_type".into(), C::MODEL_TYPE.into());
    object.insert("transformers_version".into(), TRANSFORMERS_VERSION.into());
    let mut text = format!("{:#}", Value::Object(object));
    text.push('\n');
    text
}

fn ensure_counts(counts: &[(&str, u32)], problems: &mut Vec<ConfigProblem>) {
    for &(key, _) in counts.iter().filter(|&&(_, count)| count == 0) {
        problems.push(ConfigProblem::new(key, 0, "at least 1"));
    }
}

fn ensure_heads(width: u32, heads: u32, problems: &mut Vec<ConfigProblem>) {
    if width == 0 {
        problems.push(ConfigProblem::new("hidden_size", 0, "at least 1"));
    }
    if heads == 0 || width % heads != 0 {
        let expected = format!("a divisor of hidden_size, {width}");
        problems.push(ConfigProblem::new("num_attention_heads", heads, expected));
    }
}

fn ensure_numbers(
    eps: f64,
    dropout: f64,
    scales: [(&str, f64); 2],
    problems: &mut Vec<ConfigProblem>,
) {
    if !(eps > 0.0 && eps.is_finite()) {
        problems.push(ConfigProblem::new("layer_norm_eps", eps, "above 0"));
    }
    if !(0.0..1.0).contains(&dropout) {
        let expected = "at least 0 and less than 1";
        problems.push(ConfigProblem::new("attention_dropout", dropout, expected));
    }
    for (key, scale) in scales {
        if !(scale >= 0.0 && scale.is_finite()) {
            problems.push(ConfigProblem::new(key, scale, "at least 0"));
        }
    }
}
