//! The files of transformers' settings, and the settings that both towers share.

use ddil_files::{Invalid, JsonSettings};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::Tensor;

use crate::config::{self, Config, UnknownKeys};
use crate::error::{Error, Result};

/// The transformers release whose `config.json` is written.
const TRANSFORMERS_VERSION: &str = "5.24.0";

/// Keys that transformers writes for every network and that no CLIP tower uses: text generation, classifier heads, the
/// origin of a file. They are accepted with any value and not written back.
const GENERIC_KEYS: [&str; 54] = [
    "add_cross_attention",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    // From a release with this key in CLIP's settings that none of its layers used.
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
    /// `x * sigmoid(1.702 x)`, of `OpenAI`'s networks.
    #[default]
    QuickGelu,
    /// `x` times the cumulative normal distribution function of `x`, of `OpenCLIP`'s networks.
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

/// The value of `model_type` in a transformers file.
pub(super) trait ModelType: Config {
    const MODEL_TYPE: &'static str;
}

/// Reads settings from a transformers file and reports all problems in one error.
pub(super) fn read<C: ModelType>(
    what: &str,
    mut file: JsonSettings,
    unknown_keys: UnknownKeys,
) -> Result<C> {
    let mut problems = Vec::new();
    let keys = file.object_mut();
    match keys.remove("model_type") {
        Some(found) if found != C::MODEL_TYPE => {
            let expected = format!("\"{}\"", C::MODEL_TYPE);
            problems.push(Invalid::new("model_type", found, expected));
        }
        _ => {}
    }
    match keys.remove("pruned_heads") {
        Some(found) if found != json!({}) && !found.is_null() => {
            problems.push(Invalid::new("pruned_heads", found, "{}: all heads are kept"));
        }
        _ => {}
    }
    // Both mean that the value is not set.
    let is_unset = |value: &Value| value.is_null() || *value == json!([]);
    keys.retain(|key, value| {
        !GENERIC_KEYS.contains(&key.as_str()) && !(key == "architectures" && is_unset(value))
    });
    let config = keep_problems(config::from_file(what, &file, unknown_keys), &mut problems)?;
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(Error::InvalidConfig { what: what.to_owned(), problems }),
    }
}

/// Collects the problems of settings, so that they can be reported together with others.
pub(super) fn keep_problems<C>(
    result: Result<C>,
    problems: &mut Vec<Invalid>,
) -> Result<Option<C>> {
    match result {
        Ok(config) => Ok(Some(config)),
        Err(Error::InvalidConfig { problems: more, .. }) => {
            problems.extend(more);
            Ok(None)
        }
        Err(other) => Err(other),
    }
}

/// The settings in transformers' format: class, type, version, sorted keys.
pub(super) fn write<C: ModelType>(config: &C) -> String {
    let mut file = JsonSettings::of(config);
    file.object_mut().insert("model_type".into(), C::MODEL_TYPE.into());
    file.object_mut().insert("transformers_version".into(), TRANSFORMERS_VERSION.into());
    file.to_string()
}

pub(super) fn ensure_counts(counts: &[(&str, u32)], problems: &mut Vec<Invalid>) {
    for &(key, _) in counts.iter().filter(|&&(_, count)| count == 0) {
        problems.push(Invalid::new(key, 0, "at least 1"));
    }
}

pub(super) fn ensure_heads(width: u32, heads: u32, problems: &mut Vec<Invalid>) {
    if width == 0 {
        problems.push(Invalid::new("hidden_size", 0, "at least 1"));
    }
    if heads == 0 || !width.is_multiple_of(heads) {
        let expected = format!("a divisor of hidden_size, {width}");
        problems.push(Invalid::new("num_attention_heads", heads, expected));
    }
}

pub(super) fn ensure_numbers(
    eps: f64,
    dropout: f64,
    scales: [(&str, f64); 2],
    problems: &mut Vec<Invalid>,
) {
    if !(eps > 0.0 && eps.is_finite()) {
        problems.push(Invalid::new("layer_norm_eps", eps, "above 0"));
    }
    if !(0.0..1.0).contains(&dropout) {
        let expected = "at least 0 and less than 1";
        problems.push(Invalid::new("attention_dropout", dropout, expected));
    }
    for (key, scale) in scales {
        if !(scale >= 0.0 && scale.is_finite()) {
            problems.push(Invalid::new(key, scale, "at least 0"));
        }
    }
}
