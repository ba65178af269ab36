//! `ClipTextModel` against recorded outputs of transformers, and its errors.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_libtorch::ArgumentError;
use ddil_models::{
    ClipTextClass, ClipTextConfig, ClipTextModel, Error, HiddenState, NetworkConfig, Placement,
    UnknownKeys, weights,
};
use tch::{Kind, Tensor, kind};
use tempfile::TempDir;

use super::{TOLERANCE, expected};
use crate::common::{TestResult, golden, relative_error};

/// Without and with projection; with the two rules for the end of a prompt and both nonlinearities.
const ENCODERS: [&str; 2] = ["clip_text", "clip_text_with_projection"];

fn load(name: &str, placement: Placement) -> ddil_models::Result<ClipTextModel> {
    ClipTextModel::from_folder(golden(name), placement, UnknownKeys::Refuse)
}

fn close(what: &str, found: &Tensor, expected: &Tensor) {
    let error = relative_error(found, expected);
    println!("{what}: {error:.1e}");
    assert!(error <= TOLERANCE, "{what}: {error}");
}

#[test]
fn outputs_are_those_of_transformers() -> TestResult {
    for name in ENCODERS {
        let (encoder, recorded) = (load(name, Placement::default())?, expected(name)?);
        for (prefix, mask) in [("", None), ("masked.", Some(&recorded["attention_mask"]))] {
            let output = encoder.forward(&recorded["input_ids"], mask)?;
            let what = |part: &str| format!("{prefix}{part}");
            let recorded = |part: &str| &recorded[&what(part)];
            let last = recorded("last_hidden_state");
            close(&what("last_hidden_state"), &output.last_hidden_state, last);
            assert_eq!(output.hidden_states.len(), 4);
            for (i, state) in output.hidden_states.iter().enumerate() {
                let part = format!("hidden_states.{i}");
                close(&what(&part), state, recorded(&part));
            }
            match output.text_embeds {
                Some(embeds) => close(&what("text_embeds"), &embeds, recorded("text_embeds")),
                None => close(&what("pooled"), &output.pooled, recorded("pooled")),
            }
        }
    }
    Ok(())
}

#[test]
fn a_mask_of_ones_has_no_effect_in_any_kind() -> TestResult {
    let (encoder, recorded) = (load(ENCODERS[0], Placement::default())?, expected(ENCODERS[0])?);
    let (ids, mask) = (&recorded["input_ids"], &recorded["attention_mask"]);
    let none = encoder.forward(ids, None)?.last_hidden_state;
    let ones = encoder.forward(ids, Some(&mask.ones_like()))?.last_hidden_state;
    assert!(relative_error(&ones, &none) <= TOLERANCE);
    let masked = encoder.forward(ids, Some(mask))?.last_hidden_state;
    assert!(relative_error(&masked, &none) > 0.01);
    for kind in [Kind::Int, Kind::Bool] {
        let other = encoder.forward(ids, Some(&mask.to_kind(kind)))?.last_hidden_state;
        assert_eq!(other, masked);
    }
    Ok(())
}

#[test]
fn half_precision_stays_close_and_double_is_exact() -> TestResult {
    for name in ENCODERS {
        let recorded = expected(name)?;
        for (kind, tolerance) in [(Kind::Double, TOLERANCE), (Kind::BFloat16, 2e-2)] {
            let encoder = load(name, Placement { kind, ..Placement::default() })?;
            let output = encoder.forward(&recorded["input_ids"], None)?.last_hidden_state;
            assert_eq!(output.kind(), kind);
            let error =
                relative_error(&output.to_kind(Kind::Float), &recorded["last_hidden_state"]);
            println!("{name} {kind:?}: {error:.1e}");
            assert!(error <= tolerance, "{name} {kind:?}: {error}");
        }
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_transformers() -> TestResult {
    for name in ENCODERS {
        let (encoder, recorded) = (load(name, Placement::default())?, expected(name)?);
        let output = encoder.hidden_state(&recorded["input_ids"], None, HiddenState::default())?;
        output.square().sum(Kind::Float).backward();
        let gradients = recorded.iter().filter_map(|(k, g)| Some((k.strip_prefix("grad.")?, g)));
        let mut compared = 0;
        for (key, gradient) in gradients {
            let parameter = encoder.parameters().get(key).expect("a recorded parameter");
            close(key, &parameter.grad(), gradient);
            compared += 1;
        }
        assert_eq!(compared, 4);
    }
    Ok(())
}

/// As diffusers' pipelines count: layers left out, with the norm in Stable Diffusion and without in Stable Diffusion XL.
#[test]
fn one_hidden_state_is_the_one_of_a_whole_pass() -> TestResult {
    for name in ENCODERS {
        let (encoder, recorded) = (load(name, Placement::default())?, expected(name)?);
        let ids = &recorded["input_ids"];
        let norm = |state: &Tensor| {
            let get = |part: &str| {
                let name = format!("text_model.final_layer_norm.{part}");
                encoder.parameters().get(&name).expect("it has one").shallow_clone()
            };
            let eps = encoder.config().layer_norm_eps;
            state.layer_norm([32], Some(get("weight")), Some(get("bias")), eps, true)
        };
        for skip in 0..3_u32 {
            let at = |i: u32| &recorded[&format!("hidden_states.{i}")];
            let first = HiddenState::stable_diffusion(skip);
            let last = at(3 - skip);
            close("sd", &encoder.hidden_state(ids, None, first)?, &norm(last));
            let xl = HiddenState::stable_diffusion_xl(skip);
            close("xl", &encoder.hidden_state(ids, None, xl)?, at(2 - skip));
            let Some(embeds) = recorded.get("text_embeds") else { continue };
            for which in [first, xl] {
                let (state, found) = encoder.hidden_state_and_text_embeds(ids, None, which)?;
                assert_eq!(state, encoder.hidden_state(ids, None, which)?, "{which:?}");
                close("text_embeds", &found, embeds);
            }
        }
    }
    Ok(())
}

/// A token that is not there is read as the first position, one that is there twice as the first of them.
#[test]
fn the_end_of_a_prompt_follows_both_rules() -> TestResult {
    let small = ClipTextConfig {
        vocab_size: 10,
        hidden_size: 4,
        intermediate_size: 4,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        ..ClipTextConfig::default()
    };
    let ids = Tensor::from_slice(&[1_i64, 5, 9, 5, 9, 1, 4, 4, 3, 0]).view([2, 5]);
    for (eos_token_id, ends) in [(2, [2, 1]), (5, [1, 0]), (4, [0, 1]), (9, [2, 0])] {
        let encoder =
            ClipTextConfig { eos_token_id, ..small.clone() }.build(Placement::default(), 0)?;
        let output = encoder.forward(&ids, None)?;
        for (row, end) in ends.into_iter().enumerate() {
            let row = row as i64;
            let state = output.last_hidden_state.get(row).get(end);
            assert_eq!(output.pooled.get(row), state, "eos {eos_token_id}, row {row}");
        }
    }
    Ok(())
}

#[test]
fn no_token_sees_a_later_one() -> TestResult {
    let (encoder, recorded) = (load(ENCODERS[0], Placement::default())?, expected(ENCODERS[0])?);
    let ids = &recorded["input_ids"];
    let changed = ids.copy();
    let _ = changed.narrow(1, 5, 1).fill_(7);
    let state = |ids: &Tensor| encoder.hidden_state(ids, None, HiddenState::default());
    let (before, after) = (state(ids)?, state(&changed)?);
    assert_eq!(before.narrow(1, 0, 5), after.narrow(1, 0, 5));
    assert_ne!(before.narrow(1, 5, 1), after.narrow(1, 5, 1));
    Ok(())
}

fn write(tensors: BTreeMap<String, Tensor>, path: &Path) -> ddil_models::Result<()> {
    weights::save(&tensors.into_iter().collect::<Vec<_>>(), path, &BTreeMap::new())
}

/// Published files have the prefix `text_model.`, transformers 5 omits it, and older files contain position ids.
#[test]
fn every_form_of_the_names_loads() -> TestResult {
    let recorded = expected(ENCODERS[0])?;
    let file = golden(ENCODERS[0]).join("model.safetensors");
    let written = weights::read_all(&file)?;
    assert!(written.contains_key("final_layer_norm.weight"), "transformers writes the short form");
    let positions = Tensor::arange(77, kind::INT64_CPU).view([1, 77]);
    for (prefix, old) in [("", false), ("", true), ("text_model.", false), ("text_model.", true)] {
        let folder = TempDir::new()?;
        fs::copy(golden(ENCODERS[0]).join("config.json"), folder.path().join("config.json"))?;
        let mut tensors: BTreeMap<_, _> =
            written.iter().map(|(k, t)| (format!("{prefix}{k}"), t.shallow_clone())).collect();
        if old {
            let name = format!("{prefix}embeddings.position_ids");
            tensors.insert(name, positions.shallow_clone());
        }
        write(tensors, &folder.path().join("model.safetensors"))?;
        let encoder =
            ClipTextModel::from_folder(folder.path(), Placement::default(), UnknownKeys::Refuse)?;
        let output = encoder.hidden_state(&recorded["input_ids"], None, HiddenState::default())?;
        close("last_hidden_state", &output, &recorded["last_hidden_state"]);
        let read = encoder.config().read_weights(folder.path().join("model.safetensors"))?;
        let read: BTreeMap<_, _> = read.into_iter().collect();
        assert_eq!(read, encoder.parameters().named().into_iter().collect(), "{prefix}, {old}");
    }
    Ok(())
}

#[test]
fn any_other_surplus_or_missing_tensor_is_an_error() -> TestResult {
    let config =
        ClipTextConfig::from_file(golden(ENCODERS[1]).join("config.json"), UnknownKeys::Refuse)?;
    let folder = TempDir::new()?;
    let path = folder.path().join("model.safetensors");
    let mut tensors = weights::read_all(golden(ENCODERS[1]).join("model.safetensors"))?;
    tensors.insert("text_model.embeddings.position_id".into(), Tensor::from(1_i64));
    tensors.remove("text_projection.weight");
    write(tensors, &path)?;
    let error = config.build_from(Placement::default(), &path).expect_err("two problems");
    let Error::WeightsMismatch { problems, .. } = error else { panic!("{error}") };
    assert_eq!(problems.missing, ["text_projection.weight"]);
    assert_eq!(problems.unexpected, ["text_model.embeddings.position_id"]);
    let error = config.read_weights(&path).expect_err("the same").to_string();
    assert!(error.contains("text_projection.weight") && error.contains("position_id"), "{error}");
    Ok(())
}

#[test]
fn half_precision_files_are_found_and_pickles_refused() -> TestResult {
    let folder = TempDir::new()?;
    let from = |folder: &Path| {
        ClipTextModel::from_folder(folder, Placement::default(), UnknownKeys::Refuse)
    };
    fs::copy(golden(ENCODERS[1]).join("config.json"), folder.path().join("config.json"))?;
    assert!(matches!(from(folder.path()), Err(Error::NoWeights { .. })));
    fs::write(folder.path().join("pytorch_model.bin"), "pickle")?;
    assert!(matches!(from(folder.path()), Err(Error::Pickle { .. })));

    let tensors = weights::read_all(golden(ENCODERS[1]).join("model.safetensors"))?;
    let half = tensors.into_iter().map(|(name, t)| (name, t.to_kind(Kind::Half))).collect();
    write(half, &folder.path().join("model.fp16.safetensors"))?;
    let encoder = from(folder.path())?;
    assert_eq!(encoder.parameters().placement().kind, Kind::Float);
    let recorded = expected(ENCODERS[1])?;
    let embeds = encoder.text_embeds(&recorded["input_ids"], None)?;
    assert!(relative_error(&embeds, &recorded["text_embeds"]) < 1e-2);
    Ok(())
}

#[test]
fn saved_weights_load_again_under_published_names() -> TestResult {
    for name in ENCODERS {
        let (encoder, folder) = (load(name, Placement::default())?, TempDir::new()?);
        encoder.save_to_folder(folder.path())?;
        let held = weights::read_all(folder.path().join("model.safetensors"))?;
        assert!(held.contains_key("text_model.encoder.layers.0.self_attn.q_proj.weight"));
        assert!(held.keys().all(|k| k.starts_with("text_model.") || k == "text_projection.weight"));
        let again =
            ClipTextModel::from_folder(folder.path(), Placement::default(), UnknownKeys::Refuse)?;
        assert_eq!(again.config(), encoder.config());
        for ((name, left), (_, right)) in
            again.parameters().named().iter().zip(encoder.parameters().named())
        {
            assert_eq!(*left, right, "{name}");
        }
    }
    Ok(())
}

#[test]
fn fresh_parameters_have_the_spread_of_transformers() -> TestResult {
    let config = ClipTextConfig {
        vocab_size: 500,
        hidden_size: 64,
        intermediate_size: 256,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        initializer_factor: 2.0,
        eos_token_id: 2,
        ..ClipTextConfig::default()
    };
    let encoder = config.build(Placement::default(), 5)?;
    let layer = "text_model.encoder.layers.1";
    for (name, std) in [
        ("text_model.embeddings.token_embedding.weight".to_owned(), 0.04),
        (format!("{layer}.self_attn.q_proj.weight"), 2.0 / 8.0 / 2.0),
        (format!("{layer}.self_attn.out_proj.weight"), 2.0 / 8.0),
        (format!("{layer}.mlp.fc1.weight"), 2.0 / 128_f64.sqrt()),
        (format!("{layer}.mlp.fc2.weight"), 2.0 / 8.0 / 2.0),
        (format!("{layer}.mlp.fc2.bias"), 0.0),
    ] {
        let found = encoder.parameters().get(&name).expect("it has one").std(false);
        let found = found.double_value(&[]);
        assert!((found - std).abs() <= 0.05 * std, "{name}: {found}, not {std}");
    }
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() -> TestResult {
    let encoder = load(ENCODERS[0], Placement::default())?;
    let ids = |size: &[i64]| Tensor::zeros(size, kind::INT64_CPU);
    let refusal = |ids: &Tensor, mask: Option<&Tensor>| {
        encoder.forward(ids, mask).expect_err("it does not fit").to_string()
    };
    let good = ids(&[2, 77]);
    assert!(encoder.forward(&good, None).is_ok());
    for size in [vec![77], vec![1, 78], vec![1, 0], vec![1, 1, 7]] {
        let text = refusal(&ids(&size), None);
        assert!(text.contains("`input_ids`") && text.contains("1 to 77"), "{text}");
    }
    let text = refusal(&good.to_kind(Kind::Int), None);
    assert!(text.contains("Int64"), "{text}");
    for token in [-1, 574] {
        let text = refusal(&(&good + token), None);
        assert!(text.contains(&token.to_string()) && text.contains("0 to 573"), "{text}");
    }
    let text = refusal(&good, Some(&ids(&[2, 76])));
    assert!(text.contains("`attention_mask`") && text.contains("[2, 77]"), "{text}");
    let text = refusal(&good, Some(&Tensor::ones([2, 77], kind::FLOAT_CPU)));
    assert!(text.contains("`attention_mask`") && text.contains("Bool"), "{text}");
    assert_eq!(encoder.forward(&ids(&[0, 5]), None)?.pooled.size(), [0, 32]);
    Ok(())
}

#[test]
fn missing_states_and_projections_are_refused() -> TestResult {
    let encoder = load(ENCODERS[0], Placement::default())?;
    let ids = Tensor::zeros([1, 3], kind::INT64_CPU);
    assert!(encoder.hidden_state(&ids, None, HiddenState::stable_diffusion(3)).is_ok());
    let four = encoder.hidden_state(&ids, None, HiddenState::stable_diffusion(4));
    assert!(matches!(
        four,
        Err(Error::Argument(ArgumentError::Value { name: "skipped_layers", .. }))
    ));
    let most = encoder.hidden_state(&ids, None, HiddenState::stable_diffusion_xl(u32::MAX));
    assert!(matches!(
        most,
        Err(Error::Argument(ArgumentError::Value { name: "skipped_layers", .. }))
    ));
    assert!(matches!(encoder.text_embeds(&ids, None), Err(Error::NoProjection { .. })));
    let config = ClipTextConfig {
        architectures: [ClipTextClass::TextModelWithProjection],
        ..encoder.config().clone()
    };
    assert!(config.build(Placement::default(), 0)?.text_embeds(&ids, None).is_ok());
    Ok(())
}
