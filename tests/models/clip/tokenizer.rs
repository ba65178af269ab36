//! `ClipTokenizer` token for token against transformers', and its refusals.

use std::fs;
use std::path::Path;

use ddil_models::{ClipTokenizer, Error};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use tch::Tensor;
use tempfile::TempDir;

use crate::common::{TestResult, golden};

/// Padded with the mark of the end, padded with "!", and in one file.
const TOKENIZERS: [&str; 3] = ["clip_tokenizer", "clip_tokenizer_2", "clip_tokenizer_json"];

#[derive(Deserialize)]
struct Expected {
    prompt: String,
    input_ids: Vec<i64>,
    attention_mask: Vec<i64>,
    num_cut: i64,
}

fn expected(name: &str) -> Result<Vec<Expected>, Box<dyn std::error::Error>> {
    Ok(serde_json::from_str(&fs::read_to_string(golden(name).join("expected.json"))?)?)
}

fn rows(tensor: &Tensor) -> Vec<Vec<i64>> {
    Vec::try_from(tensor).expect("a table of numbers")
}

#[test]
fn tokens_are_those_of_transformers() -> TestResult {
    for name in TOKENIZERS {
        let tokenizer = ClipTokenizer::from_folder(golden(name))?;
        let recorded = expected(name)?;
        let prompts: Vec<_> = recorded.iter().map(|e| e.prompt.as_str()).collect();
        let found = tokenizer.encode(&prompts)?;
        let (ids, masks) = (rows(&found.input_ids), rows(&found.attention_mask));
        assert_eq!(ids.len(), recorded.len());
        for (i, recorded) in recorded.iter().enumerate() {
            assert_eq!(ids[i], recorded.input_ids, "{name}: {:?}", recorded.prompt);
            assert_eq!(masks[i], recorded.attention_mask, "{name}: {:?}", recorded.prompt);
            let cut = found.truncated[i].is_some();
            assert_eq!(cut, recorded.num_cut > 0, "{name}: {:?}", recorded.prompt);
        }
    }
    Ok(())
}

#[test]
fn special_tokens_are_those_of_the_folder() -> TestResult {
    for (name, padding) in [(TOKENIZERS[0], 573), (TOKENIZERS[1], 0), (TOKENIZERS[2], 0)] {
        let tokenizer = ClipTokenizer::from_folder(golden(name))?;
        assert_eq!((tokenizer.start_token(), tokenizer.end_token()), (572, 573));
        assert_eq!((tokenizer.padding_token(), tokenizer.vocab_size()), (padding, 574));
        assert_eq!(tokenizer.max_length(), 77);
    }
    Ok(())
}

#[test]
fn the_reported_cut_is_the_end_of_the_prompt_as_typed() -> TestResult {
    let tokenizer = ClipTokenizer::from_folder(golden(TOKENIZERS[0]))?;
    let room = "Cat ".repeat(75);
    let long = format!("{room} A red Caf\u{e9}");
    let letters = "\u{732b}".repeat(40);
    let found = tokenizer.encode(&[&room, &long, &letters])?.truncated;
    assert_eq!(found[..2], [None, Some("A red Caf\u{e9}".to_owned())]);
    // Three bytes and three tokens a letter: 25 of them fit.
    assert_eq!(found[2].as_deref(), Some("\u{732b}".repeat(15).as_str()));
    Ok(())
}

#[test]
fn no_prompts_are_no_rows() -> TestResult {
    let found = ClipTokenizer::from_folder(golden(TOKENIZERS[0]))?.encode(&[])?;
    assert_eq!((found.input_ids.size(), found.truncated.len()), (vec![0, 77], 0));
    Ok(())
}

/// The first recorded tokenizer, to be corrupted.
fn copy() -> Result<TempDir, Box<dyn std::error::Error>> {
    let folder = TempDir::new()?;
    for file in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::copy(golden(TOKENIZERS[0]).join(file), folder.path().join(file))?;
    }
    Ok(folder)
}

/// Changes one of its JSON files.
fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) -> TestResult {
    let path = folder.join(file);
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    change(&mut value);
    Ok(fs::write(path, value.to_string())?)
}

#[test]
fn all_missing_files_are_named_in_one_error() -> TestResult {
    let missing = |folder: &Path| match ClipTokenizer::from_folder(folder) {
        Err(Error::NoTokenizer { missing, .. }) => missing,
        other => panic!("no refusal: {other:?}"),
    };
    let folder = TempDir::new()?;
    let all = ["vocab.json", "merges.txt", "tokenizer_config.json"];
    assert_eq!(missing(folder.path()), all);
    assert_eq!(missing(&folder.path().join("nowhere")), all);
    fs::copy(golden(TOKENIZERS[2]).join("tokenizer.json"), folder.path().join("tokenizer.json"))?;
    assert_eq!(missing(folder.path()), ["tokenizer_config.json"]);
    let folder = copy()?;
    fs::remove_file(folder.path().join("merges.txt"))?;
    assert_eq!(missing(folder.path()), ["merges.txt"]);
    let text = ClipTokenizer::from_folder(folder.path()).expect_err("no merges").to_string();
    assert!(text.contains("merges.txt"), "{text}");
    Ok(())
}

#[test]
fn special_tokens_outside_the_vocabulary_are_listed() -> TestResult {
    let folder = copy()?;
    fs::remove_file(folder.path().join("special_tokens_map.json"))?;
    edit(folder.path(), "tokenizer_config.json", |config| {
        config["bos_token"] = json!("<s>");
        config["pad_token"] = json!({"content": "<pad>"});
        config["model_max_length"] = json!(2);
    })?;
    let error = ClipTokenizer::from_folder(folder.path()).expect_err("three problems");
    let Error::InvalidConfig { problems, .. } = error else { panic!("{error}") };
    let keys: Vec<_> = problems.iter().map(|p| p.field.as_str()).collect();
    assert_eq!(keys, ["bos_token", "pad_token", "model_max_length"]);
    Ok(())
}

#[test]
fn the_length_and_the_padding_follow_the_files() -> TestResult {
    let folder = copy()?;
    edit(folder.path(), "tokenizer_config.json", |c| c["model_max_length"] = json!(5))?;
    // Older files: the map counts.
    edit(folder.path(), "special_tokens_map.json", |map| map["pad_token"] = json!("!"))?;
    let tokenizer = ClipTokenizer::from_folder(folder.path())?;
    let found = tokenizer.encode(&["cat", "a cat on a chair"])?;
    assert_eq!(rows(&found.input_ids)[0][3..], [0, 0]);
    assert_eq!(found.truncated, [None, Some("a chair".to_owned())]);
    // No limit at all is the usual one.
    edit(folder.path(), "tokenizer_config.json", |c| c["model_max_length"] = json!(1e30))?;
    assert_eq!(ClipTokenizer::from_folder(folder.path())?.max_length(), 77);
    Ok(())
}

/// As textual inversion leaves them.
#[test]
fn added_tokens_have_the_ids_of_the_files() -> TestResult {
    let added = |folder: &Path| -> Result<i64, Error> {
        let tokenizer = ClipTokenizer::from_folder(folder)?;
        assert_eq!(tokenizer.vocab_size(), 575);
        Ok(rows(&tokenizer.encode(&["a <cat-toy>"])?.input_ids)[0][2])
    };
    let folder = copy()?;
    fs::write(folder.path().join("added_tokens.json"), json!({"<cat-toy>": 574}).to_string())?;
    assert_eq!(added(folder.path())?, 574);
    let folder = copy()?;
    edit(folder.path(), "tokenizer_config.json", |config| {
        config["added_tokens_decoder"] = json!({"574": {"content": "<cat-toy>"}});
    })?;
    assert_eq!(added(folder.path())?, 574);
    edit(folder.path(), "tokenizer_config.json", |config| {
        config["added_tokens_decoder"] = json!({"580": {"content": "<cat-toy>"}});
    })?;
    let error = ClipTokenizer::from_folder(folder.path());
    assert!(matches!(error, Err(Error::InvalidConfig { .. })));
    Ok(())
}

/// Looking for a token of five thousand bytes took the library twenty seconds.
#[test]
fn long_special_tokens_are_refused() -> TestResult {
    let long = "x".repeat(513);
    let refusal = |file: &str,
                   change: &dyn Fn(&mut Value)|
     -> Result<String, Box<dyn std::error::Error>> {
        let folder = copy()?;
        edit(folder.path(), file, change)?;
        let error = ClipTokenizer::from_folder(folder.path()).expect_err("it is long").to_string();
        assert!(error.contains("513 bytes") && error.contains("at most 512"), "{error}");
        Ok(error)
    };
    refusal("special_tokens_map.json", &|value| value["eos_token"] = json!({"content": long}))?;
    let said = refusal("tokenizer_config.json", &|value| {
        value["added_tokens_decoder"] = json!({"7": {"content": long}});
    })?;
    assert!(said.contains("tokenizer_config.json"), "{said}");
    let folder = copy()?;
    let whole = json!({"added_tokens": [{"id": 0, "content": long}]});
    fs::write(folder.path().join("tokenizer.json"), whole.to_string())?;
    let said = ClipTokenizer::from_folder(folder.path()).expect_err("it is long").to_string();
    assert!(said.contains("tokenizer.json") && said.contains("513 bytes"), "{said}");
    Ok(())
}

#[test]
fn damaged_files_are_named() -> TestResult {
    let refusal = |file: &str, text: &str| -> Result<String, Box<dyn std::error::Error>> {
        let folder = copy()?;
        fs::write(folder.path().join(file), text)?;
        let error = ClipTokenizer::from_folder(folder.path()).expect_err(file);
        let mut message = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            message = format!("{message}: {source}");
        }
        assert!(message.contains(file), "{message}");
        Ok(message)
    };
    refusal("vocab.json", "{\"a\": ")?;
    refusal("vocab.json", "{\"a\": -1}")?;
    refusal("vocab.json", "{\"a\": 1}")?;
    refusal("tokenizer_config.json", "[]")?;
    refusal("tokenizer_config.json", "{\"bos_token\": 3}")?;
    refusal("special_tokens_map.json", "{\"bos_token\": 3}")?;
    let text = refusal("merges.txt", "#version: 0.2\na b c\n")?;
    assert!(text.contains("line 2"), "{text}");
    let text = refusal("merges.txt", "a nowhere\n")?;
    assert!(text.contains("nowhere"), "{text}");
    refusal("tokenizer.json", "{}")?;
    let text = refusal("tokenizer.json", r#"{"decoder": {"type": "ByteLevel", 1: 2}}"#)?;
    assert!(text.contains("key must be a string"), "{text}");
    let word_level = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    });
    let text = refusal("tokenizer.json", &word_level.to_string())?;
    assert!(text.contains("byte-pair"), "{text}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any text has a start, an end, and tokens of the vocabulary; the part that is cut off is its end.
    #[test]
    fn any_text_is_a_row(prompt in "\\PC{0,120}|.{0,40}|[a-z!' ]{60,200}") {
        let tokenizer = ClipTokenizer::from_folder(golden(TOKENIZERS[0])).expect("it is recorded");
        let found = tokenizer.encode(&[&prompt]).expect("there is a token for each byte");
        let (ids, mask) = (rows(&found.input_ids).remove(0), rows(&found.attention_mask).remove(0));
        prop_assert_eq!((ids.len(), ids[0]), (77, 572));
        prop_assert!(ids.iter().all(|id| (0..574).contains(id)));
        let kept = mask.iter().filter(|&&kept| kept == 1).count();
        prop_assert!(ids[kept - 1..].iter().all(|&id| id == 573));
        if let Some(cut) = &found.truncated[0] {
            prop_assert!(kept == 77 && prompt.ends_with(cut.as_str()));
        }
    }
}
