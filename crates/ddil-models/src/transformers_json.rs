//! The files of transformers' settings.

use ddil_files::{Invalid, JsonSettings};
use serde_json::{Value, json};

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

/// Removes the keys of a file that are not settings of a network, and returns their problems.
pub(crate) fn prepare(file: &mut JsonSettings, model_type: &str) -> Vec<Invalid> {
    let mut problems = Vec::new();
    let keys = file.object_mut();
    match keys.remove("model_type") {
        Some(found) if found != model_type => {
            let expected = format!("\"{model_type}\"");
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
    keys.retain(|key, _| !GENERIC_KEYS.contains(&key.as_str()));
    keys.retain(|key, value| key != "architectures" || !is_unset(value));
    problems
}

/// Adds the keys that are not settings of a network.
pub(crate) fn complete(mut file: JsonSettings, model_type: &str) -> JsonSettings {
    let keys = file.object_mut();
    keys.insert("model_type".into(), model_type.into());
    keys.insert("transformers_version".into(), TRANSFORMERS_VERSION.into());
    file
}
