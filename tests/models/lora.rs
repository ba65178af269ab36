//! `Lora` against what diffusers and PEFT made of the same adapters, and its refusals.

use std::collections::BTreeMap;
use std::path::Path;

use ddil_libtorch::ArgumentError;
use ddil_libtorch::Autocast;
use ddil_models::{
    Error, Lora, LoraConfig, LoraFormat, MlpConfig, NetworkConfig, Placement,
    UNet2DConditionConfig, UNet2DConditionModel, UNet2DConfig, UnknownKeys, WeightProblems,
    weights,
};
use tch::{Device, Kind, Tensor};

use crate::common::{TestResult, golden, relative_error};
use crate::unet_condition::{Recorded, expected, forward, load, summary};

/// Relative to the largest value, in `Float`.
const TOLERANCE: f64 = 1e-5;
const NAMES: [&str; 2] = ["sd15", "sdxl"];
const DIFFUSERS: &str = "pytorch_lora_weights.safetensors";
const FILES: [&str; 2] = [DIFFUSERS, "kohya.safetensors"];

fn network(
    name: &str,
    placement: Placement,
) -> ddil_models::Result<(UNet2DConditionModel, Recorded)> {
    let name = format!("unet_condition_{name}");
    Ok((load(&name, placement)?, expected(&name)?))
}

fn recorded(name: &str) -> ddil_models::Result<Recorded> {
    expected(&format!("lora_{name}"))
}

fn small() -> LoraConfig {
    LoraConfig { rank: 2, alpha: 3.0, ..LoraConfig::default() }
}

/// Values for B, which starts at 0.
fn fill(lora: &Lora) {
    let _no_grad = tch::no_grad_guard();
    for (i, (name, mut tensor)) in lora.parameters().named().into_iter().enumerate() {
        if name.ends_with("lora_B.weight") {
            let n = tensor.numel() as i64;
            let waves = Tensor::arange(n, (Kind::Float, Device::Cpu)) + i as f64;
            tensor.copy_(&(waves.sin() * 0.2).view(&tensor.size()[..]));
        }
    }
}

#[test]
fn outputs_are_those_of_peft() -> TestResult {
    for name in NAMES {
        let outputs = recorded(name)?;
        for (channels_last, file) in [(false, FILES[0]), (true, FILES[0]), (false, FILES[1])] {
            let placement = Placement { channels_last, ..Placement::default() };
            let (unet, inputs) = network(name, placement)?;
            let plain = forward(&unet, &inputs)?;
            let path = golden(&format!("lora_{name}")).join(file);
            let mut lora = Lora::from_file(unet.parameters(), path)?;
            let apart = forward(&unet, &inputs)?;
            let before = unet.parameters().named().into_iter().map(|(_, t)| t.copy());
            let before: Vec<_> = before.collect();

            lora.merge()?;
            let merged = forward(&unet, &inputs)?;
            for (what, found, expected) in [
                ("output", &apart, &outputs["output"]),
                ("fused", &merged, &outputs["fused"]),
                ("merged", &merged, &apart),
            ] {
                let error = relative_error(found, expected);
                println!("{name}/{file} {what}, channels last {channels_last}: {error:.1e}");
                assert!(error <= TOLERANCE, "{name}/{file} {what}: {error}");
            }
            assert!(relative_error(&apart, &plain) > 0.5);

            lora.unmerge()?;
            for ((name, now), before) in unet.parameters().named().iter().zip(&before) {
                assert!(now.equal(before), "{name}");
            }
            assert_eq!(forward(&unet, &inputs)?, apart);
            lora.set_enabled(false)?;
            assert_eq!(forward(&unet, &inputs)?, plain);
        }
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_peft_and_the_base_has_none() -> TestResult {
    for (kind, tolerance) in [(Kind::Float, 1e-3), (Kind::Double, 1e-10)] {
        for name in NAMES {
            let (unet, mut inputs) = network(name, Placement { kind, ..Placement::default() })?;
            let path = golden(&format!("lora_{name}")).join(DIFFUSERS);
            let lora = Lora::from_file(unet.parameters(), path)?;
            let sample = inputs["sample"].to_kind(kind);
            inputs.insert("sample".into(), sample);
            forward(&unet, &inputs)?.square().sum(kind).backward();

            let mut named = lora.parameters().learned();
            named.sort_by(|(a, _), (b, _)| a.cmp(b));
            let rows = &recorded(name)?["gradients"];
            assert_eq!(rows.size(), [named.len() as i64, 2]);
            let mut worst = 0.0_f64;
            for (i, (parameter, tensor)) in named.iter().enumerate() {
                let row = [0, 1].map(|j| rows.double_value(&[i as i64, j]));
                assert!(row[0] > 0.0, "{parameter}");
                for (found, expected) in summary(&tensor.grad()).into_iter().zip(row) {
                    worst = worst.max((found - expected).abs() / row[0]);
                }
            }
            println!("{name} gradients, {kind:?}: {worst:.1e}");
            assert!(worst <= tolerance, "{name} {kind:?}: {worst}");
            for (parameter, tensor) in unet.parameters().named() {
                assert!(!tensor.requires_grad() && !tensor.grad().defined(), "{parameter}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_fresh_adapter_changes_nothing_and_learns_b_first() -> TestResult {
    let (unet, inputs) = network("sd15", Placement::default())?;
    let plain = forward(&unet, &inputs)?;
    let lora = Lora::attach(unet.parameters(), &small(), 7)?;
    let output = forward(&unet, &inputs)?;
    assert_eq!(output, plain);

    output.square().sum(Kind::Float).backward();
    for (name, tensor) in lora.parameters().learned() {
        let moved = tensor.grad().abs().max().double_value(&[]) > 0.0;
        assert_eq!(moved, name.ends_with("lora_B.weight"), "{name}");
    }
    fill(&lora);
    lora.parameters().learned().iter_mut().for_each(|(_, tensor)| tensor.zero_grad());
    forward(&unet, &inputs)?.square().sum(Kind::Float).backward();
    for (name, tensor) in lora.parameters().learned() {
        assert!(tensor.grad().abs().max().double_value(&[]) > 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn values_follow_seed_and_name() -> TestResult {
    let build = |seed| {
        let (unet, _) = network("sd15", Placement::default())?;
        Ok::<_, Error>(Lora::attach(unet.parameters(), &small(), seed)?.parameters().named())
    };
    let (one, same, other) = (build(1)?, build(1)?, build(2)?);
    for (((name, one), (_, same)), (_, other)) in one.iter().zip(&same).zip(&other) {
        assert!(one.equal(same), "{name}");
        let is_down = name.ends_with("lora_A.weight");
        assert_ne!(one.equal(other), is_down, "{name}");
        assert_eq!(one.kind(), Kind::Float);
        let bound = 1.0 / ((one.numel() / 2) as f64).sqrt();
        let largest = one.abs().max().double_value(&[]);
        // Of 16 values or more, the largest is seldom in the lower half.
        let range = if is_down { bound / 2.0..=bound } else { 0.0..=0.0 };
        assert!(range.contains(&largest), "{name}: {largest} of {bound}");
    }
    // The same layer draws the same values, whichever other layers have an adapter.
    let (unet, _) = network("sd15", Placement::default())?;
    let config = LoraConfig { targets: vec!["conv2".into()], ..small() };
    let few = Lora::attach(unet.parameters(), &config, 1)?;
    let all: BTreeMap<_, _> = one.into_iter().collect();
    assert!(few.parameters().named().iter().all(|(name, tensor)| tensor.equal(&all[name])));
    Ok(())
}

#[test]
fn targets_are_whole_parts_of_names() -> TestResult {
    let (unet, _) = network("sd15", Placement::default())?;
    let config = LoraConfig { targets: vec!["to_out.0".into(), "conv_in".into()], ..small() };
    let lora = Lora::attach(unet.parameters(), &config, 0)?;
    let names: Vec<_> = lora.layers().into_iter().map(|layer| layer.name).collect();
    assert!(names.contains(&"conv_in".to_owned()));
    let out = names.iter().filter(|name| name.ends_with(".to_out.0")).count();
    let expected =
        unet.parameters().shapes().iter().filter(|(n, _)| n.ends_with("to_out.0.weight")).count();
    assert_eq!((out, names.len()), (expected, expected + 1));
    lora.detach()?;

    // "n_out.0" ends "attn.to_out.0" nowhere.
    let targets = ["to_q", "out.0", "to_x", ""].map(str::to_owned).into();
    let config = LoraConfig { rank: 0, alpha: f64::NAN, targets };
    match Lora::attach(unet.parameters(), &config, 0) {
        Err(Error::InvalidConfig { problems, .. }) => {
            let keys: Vec<_> = problems.iter().map(|p| p.field.as_str()).collect();
            assert_eq!(keys, ["rank", "alpha", "targets"]);
            assert!(problems[2].value.starts_with("out.0, to_x, ,"), "{}", problems[2].value);
            for name in ["to_q", "to_out.0", "conv_shortcut", "net.2"] {
                assert!(problems[2].expected.contains(name), "{}", problems[2].expected);
            }
        }
        other => panic!("{other:?}"),
    }
    let config = LoraConfig { targets: Vec::new(), ..small() };
    assert!(matches!(
        Lora::attach(unet.parameters(), &config, 0),
        Err(Error::InvalidConfig { problems, .. }) if problems.len() == 1 && problems[0].value == "empty"
    ));
    Ok(())
}

#[test]
fn an_adapter_is_attached_once_and_detached_without_a_trace() -> TestResult {
    let (unet, inputs) = network("sd15", Placement::default())?;
    let plain = forward(&unet, &inputs)?;
    let mut lora = Lora::attach(unet.parameters(), &small(), 0)?;
    fill(&lora);
    assert!(matches!(
        Lora::attach(unet.parameters(), &small(), 0),
        Err(Error::AdapterAttached { layer, .. }) if !layer.is_empty()
    ));
    let whole = forward(&unet, &inputs)? - &plain;

    lora.set_scale(0.0)?;
    assert_eq!(forward(&unet, &inputs)?, plain);
    lora.set_scale(1e-3)?;
    let part = forward(&unet, &inputs)? - &plain;
    let ratio = (part.norm() / whole.norm()).double_value(&[]);
    assert!((1e-4..1e-2).contains(&ratio), "{ratio}");
    assert!(lora.set_scale(f64::INFINITY).is_err());

    lora.merge()?;
    assert!(lora.is_merged());
    assert!(matches!(lora.merge(), Err(Error::AdapterMerged { .. })));
    assert!(matches!(lora.set_enabled(false), Err(Error::AdapterMerged { .. })));
    assert!(matches!(lora.set_scale(1.0), Err(Error::AdapterMerged { .. })));
    lora.detach()?;
    assert_eq!(forward(&unet, &inputs)?, plain);
    assert!(unet.parameters().learned().iter().all(|(_, tensor)| tensor.requires_grad()));
    Lora::attach(unet.parameters(), &small(), 0)?;
    Ok(())
}

#[test]
fn half_precision_and_autocast_stay_close() -> TestResult {
    for name in NAMES {
        let path = golden(&format!("lora_{name}")).join(DIFFUSERS);
        let expected = &recorded(name)?["output"];
        for channels_last in [false, true] {
            let kind = Kind::BFloat16;
            let placement = Placement { channels_last, ..Placement::default() };
            let (half, mut inputs) = network(name, Placement { kind, ..placement })?;
            let lora = Lora::from_file(half.parameters(), &path)?;
            assert!(lora.parameters().named().iter().all(|(_, t)| t.kind() == Kind::Float));
            let (whole, floats) = network(name, placement)?;
            let sample = inputs["sample"].to_kind(kind);
            inputs.insert("sample".into(), sample);
            let output = forward(&half, &inputs)?;
            assert_eq!(output.kind(), kind);
            output.square().sum(Kind::Float).backward();
            let (_, tensor) = &lora.parameters().learned()[0];
            assert_eq!(tensor.grad().kind(), Kind::Float);

            let lora = Lora::from_file(whole.parameters(), &path)?;
            let cast = {
                let _autocast = Autocast::new(Device::Cpu, kind)?;
                forward(&whole, &floats)?
            };
            cast.to_kind(Kind::Float).square().sum(Kind::Float).backward();
            assert!(lora.parameters().learned().iter().all(|(_, t)| t.grad().defined()));
            for (what, found) in [("bf16", output), ("autocast", cast)] {
                let error = relative_error(&found.to_kind(Kind::Float), expected);
                println!("{name} {what}, channels last {channels_last}: {error:.1e}");
                assert!(error <= 3e-2, "{name} {what}: {error}");
            }
        }
    }
    Ok(())
}

#[test]
fn files_come_back_with_ranks_and_alphas() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (unet, inputs) = network("sd15", Placement::default())?;
    let path = golden("lora_sd15").join(DIFFUSERS);
    let lora = Lora::from_file(unet.parameters(), path)?;
    let output = forward(&unet, &inputs)?;
    let layers = lora.layers();
    let by_name = |name: &str| layers.iter().find(|l| l.name == name).map(|l| (l.rank, l.alpha));
    assert_eq!(by_name("mid_block.resnets.0.conv1"), Some((5, 3.0)));
    let value = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v";
    assert_eq!(by_name(value), Some((2, 7.0)));
    for format in [LoraFormat::Diffusers, LoraFormat::Kohya] {
        let path = folder.path().join("lora.safetensors");
        lora.save(&path, format)?;
        assert_eq!(weights::read_metadata(&path)?["format"], "pt");
        let (other, _) = network("sd15", Placement::default())?;
        let read = Lora::from_file(other.parameters(), &path)?;
        assert_eq!(read.layers(), layers, "{format:?}");
        assert_eq!(forward(&other, &inputs)?, output, "{format:?}");
    }
    // Names are those of the recorded files.
    for (format, file) in [(LoraFormat::Diffusers, FILES[0]), (LoraFormat::Kohya, FILES[1])] {
        let path = folder.path().join("lora.safetensors");
        lora.save(&path, format)?;
        let (ours, theirs) =
            (weights::read_all(&path)?, weights::read_all(golden("lora_sd15").join(file))?);
        assert!(ours.keys().eq(theirs.keys()), "{format:?}");
        assert!(ours.values().zip(theirs.values()).all(|(a, b)| a.equal(b)), "{format:?}");
    }
    Ok(())
}

type Named = BTreeMap<String, Tensor>;

/// Loads the recorded file after a change to it.
fn changed(
    folder: &Path,
    change: impl FnOnce(&mut Named),
) -> Result<(UNet2DConditionModel, Result<Lora, Error>), Error> {
    let mut tensors = weights::read_all(golden("lora_sdxl").join(DIFFUSERS))?;
    change(&mut tensors);
    let path = folder.join("changed.safetensors");
    weights::save(&tensors.into_iter().collect::<Vec<_>>(), &path, &BTreeMap::new())?;
    let (unet, _) = network("sdxl", Placement::default())?;
    let lora = Lora::from_file(unet.parameters(), path);
    Ok((unet, lora))
}

fn problems(result: Result<Lora, Error>) -> WeightProblems {
    match result {
        Err(Error::WeightsMismatch { problems, .. }) => *problems,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_may_cover_fewer_layers_and_have_older_names() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (_, lora) = changed(folder.path(), |tensors| {
        tensors.retain(|name, _| name.contains("attn1.to_q"));
        let old = std::mem::take(tensors).into_iter().map(|(name, tensor)| {
            let name = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up");
            (name, tensor)
        });
        tensors.extend(old);
        for text in ["text_encoder.a.lora_A.weight", "lora_te1_a.lora_down.weight"] {
            tensors.insert(text.into(), Tensor::from(1.0));
        }
    })?;
    let lora = lora?;
    assert!(!lora.layers().is_empty());
    assert!(lora.layers().iter().all(|l| l.name.ends_with("attn1.to_q") && l.alpha == 2.0));
    assert_eq!(lora.ignored(), ["lora_te1_a.lora_down.weight", "text_encoder.a.lora_A.weight"]);
    Ok(())
}

/// The layers of Stable Diffusion 1.5 and XL under the names of the original code, as diffusers reads them, and those of
/// `ComfyUI`, which have dots.
#[test]
fn names_of_the_original_code_are_those_of_diffusers() -> TestResult {
    let text = std::fs::read(golden("lora_names.json"))?;
    let recorded: BTreeMap<String, BTreeMap<String, String>> = serde_json::from_slice(&text)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("lora.safetensors");
    for (name, config) in
        [("sd15", UNet2DConditionConfig::sd15()), ("sdxl", UNet2DConditionConfig::sdxl())]
    {
        let unet = config.without_values()?;
        let weights: BTreeMap<_, _> = unet.parameters().shapes().into_iter().collect();
        let mut tensors = Vec::new();
        for (original, layer) in &recorded[name] {
            let shape = &weights[&format!("{layer}.weight")];
            let down = [&[1], &shape[1..]].concat();
            let up = if shape.len() == 4 { vec![shape[0], 1, 1, 1] } else { vec![shape[0], 1] };
            for (end, size) in [("down", down), ("up", up)] {
                let zeros = Tensor::zeros(size, (Kind::Half, Device::Cpu));
                tensors.push((format!("lora_unet_{original}.lora_{end}.weight"), zeros));
            }
        }
        weights::save(&tensors, &path, &BTreeMap::new())?;
        let found = Lora::from_file(unet.parameters(), &path)?;
        let mut found: Vec<_> = found.layers().into_iter().map(|layer| layer.name).collect();
        found.sort();
        let mut expected: Vec<_> = recorded[name].values().cloned().collect();
        expected.sort();
        assert_eq!(found, expected, "{name}");
    }
    Ok(())
}

/// Every spelling of the same adapter is the same adapter.
#[test]
fn names_of_many_programs_are_read() -> TestResult {
    let folder = tempfile::tempdir()?;
    let attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1";
    let original = "input_blocks.3.1.transformer_blocks.0.attn1";
    let underscored = |name: &str| name.replace('.', "_");
    let spellings: [(&str, [String; 2]); 8] = [
        (
            "2023",
            ["down", "up"].map(|end| format!("unet.{attention}.processor.to_q_lora.{end}.weight")),
        ),
        (
            "2023, bare",
            ["down", "up"].map(|end| format!("{attention}.processor.to_q_lora.{end}.weight")),
        ),
        (
            "PEFT",
            ["A", "B"].map(|end| format!("base_model.model.{attention}.to_q.lora_{end}.weight")),
        ),
        (
            "adapter",
            ["A", "B"].map(|end| format!("unet.{attention}.to_q.lora_{end}.my_style.weight")),
        ),
        (
            "kohya",
            ["down", "up"]
                .map(|end| format!("lora_unet_{}_to_q.lora_{end}.weight", underscored(original))),
        ),
        (
            "LyCORIS",
            ["down", "up"]
                .map(|end| format!("lycoris_{}_to_q.lora_{end}.weight", underscored(attention))),
        ),
        (
            "ComfyUI",
            ["A", "B"].map(|end| format!("diffusion_model.{original}.to_q.lora_{end}.weight")),
        ),
        (
            "a wrapper",
            ["down", "up"].map(|end| format!("module.unet.{attention}.to_q.lora.{end}.weight")),
        ),
    ];
    for (what, names) in spellings {
        let (_, lora) = changed(folder.path(), |tensors| {
            let parts = ["A", "B"].map(|end| {
                let name = format!("unet.{attention}.to_q.lora_{end}.weight");
                tensors.remove(&name).unwrap_or_else(|| panic!("{name}"))
            });
            *tensors = names.into_iter().zip(parts).collect();
        })?;
        let layers = lora.map_err(|error| format!("{what}: {error}"))?.layers();
        assert_eq!(layers.len(), 1, "{what}");
        assert_eq!(layers[0].name, format!("{attention}.to_q"), "{what}");
    }
    Ok(())
}

/// PEFT's own file has no alpha: it is in the settings beside it.
#[test]
fn settings_of_peft_are_read_beside_its_file() -> TestResult {
    let folder = tempfile::tempdir()?;
    let tensors: Vec<_> =
        weights::read_all(golden("lora_sdxl").join(DIFFUSERS))?.into_iter().collect();
    let path = folder.path().join("adapter_model.safetensors");
    weights::save(&tensors, &path, &BTreeMap::new())?;
    let (unet, _) = network("sdxl", Placement::default())?;
    let read = |settings: &str| {
        std::fs::write(folder.path().join("adapter_config.json"), settings)?;
        let lora = Lora::from_file(unet.parameters(), &path)?;
        let alphas: Vec<f64> = lora.layers().iter().map(|layer| layer.alpha).collect();
        lora.detach()?;
        Ok::<_, Box<dyn std::error::Error>>(alphas)
    };
    assert!(
        read(r#"{"lora_alpha": 8, "alpha_pattern": {"^conv_in": 1}}"#)?.iter().all(|a| *a == 8.0)
    );
    let refused = read(r#"{"use_dora": true}"#).expect_err("no magnitudes").to_string();
    assert!(refused.contains("use_dora") && refused.contains("DoRA"), "{refused}");
    Ok(())
}

#[test]
fn weight_decomposition_without_magnitudes_is_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("lora.safetensors");
    let tensors: Vec<_> =
        weights::read_all(golden("lora_sdxl").join(DIFFUSERS))?.into_iter().collect();
    let (unet, _) = network("sdxl", Placement::default())?;
    for (key, settings) in [
        ("lora_adapter_metadata", r#"{"unet.use_dora": true}"#),
        ("ss_network_args", r#"{"dora_wd": "True"}"#),
        ("ss_network_args", r#"{"conv_dim": "4", "dora_wd": true}"#),
    ] {
        let metadata = BTreeMap::from([(key.to_owned(), settings.to_owned())]);
        weights::save(&tensors, &path, &metadata)?;
        let refused = Lora::from_file(unet.parameters(), &path).expect_err(settings).to_string();
        assert!(refused.contains("DoRA"), "{refused}");
    }
    let metadata =
        BTreeMap::from([("ss_network_args".to_owned(), r#"{"dora_wd": "False"}"#.to_owned())]);
    weights::save(&tensors, &path, &metadata)?;
    Lora::from_file(unet.parameters(), &path)?;
    Ok(())
}

#[test]
fn mismatches_are_refused_by_name() -> TestResult {
    let folder = tempfile::tempdir()?;
    let layer = "mid_block.resnets.0.conv1";
    let (down, up) = (format!("unet.{layer}.lora_A.weight"), format!("unet.{layer}.lora_B.weight"));
    let (unet, result) = changed(folder.path(), |tensors| {
        tensors.remove(&up);
        tensors.insert("unet.nowhere.lora_A.weight".into(), Tensor::from(1.0));
        tensors.insert(format!("unet.{layer}.lora_magnitude_vector"), Tensor::from(1.0));
        tensors.insert("unet.conv_in.alpha".into(), Tensor::from(1.0));
    })?;
    let found = problems(result);
    let missing: Vec<_> = ["conv_in.lora_A", "conv_in.lora_B", &format!("{layer}.lora_B")]
        .map(|name| format!("{name}.weight"))
        .into();
    assert_eq!(found.missing, missing);
    let unexpected = [&format!("unet.{layer}.lora_magnitude_vector"), "unet.nowhere.lora_A.weight"];
    assert_eq!(found.unexpected, unexpected);
    // Nothing was attached.
    Lora::attach(unet.parameters(), &small(), 0)?;

    let (_, result) = changed(folder.path(), |tensors| {
        let rank_3 = tensors[&up].repeat([1, 2, 1, 1]);
        tensors.insert(up.clone(), rank_3);
    })?;
    assert_eq!(problems(result).misshapen.len(), 1);
    let (_, result) = changed(folder.path(), |tensors| {
        let whole = tensors[&down].to_kind(Kind::Int64);
        tensors.insert(down.clone(), whole);
    })?;
    assert_eq!(problems(result).wrong_kind, [(down, "Int64".to_owned(), Kind::Float)]);

    let (_, result) = changed(folder.path(), |tensors| {
        tensors.insert(format!("unet.{layer}.alpha"), Tensor::from(f64::NAN));
    })?;
    assert!(matches!(result, Err(Error::Argument(ArgumentError::Value { name: "alpha", .. }))));

    let text = "text_encoder.a.lora_A.weight";
    let (_, result) = changed(folder.path(), |tensors| {
        *tensors = BTreeMap::from([(text.to_owned(), Tensor::from(1.0))]);
    })?;
    assert!(matches!(result, Err(Error::NoAdapter { ignored, .. }) if ignored == [text]));
    Ok(())
}

#[test]
fn one_layer_gives_what_the_equation_says() -> TestResult {
    let network = MlpConfig::default().build(Placement::default(), 0)?;
    let config = LoraConfig { rank: 2, alpha: 6.0, targets: vec!["layers.0".into()] };
    let mut lora = Lora::attach(network.parameters(), &config, 0)?;
    fill(&lora);
    let name = "layers.0.weight";
    let get = |name: &str| network.parameters().get(name).map(Tensor::copy).ok_or("absent");
    let before = get(name)?;
    lora.merge()?;
    let named: BTreeMap<_, _> = lora.parameters().named().into_iter().collect();
    let (a, b) = (&named["layers.0.lora_A.weight"], &named["layers.0.lora_B.weight"]);
    assert!(relative_error(&(get(name)? - before), &(b.matmul(a) * 3.0)) < 1e-5);
    Ok(())
}

#[test]
fn metadata_say_what_alpha_is() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("lora.safetensors");
    let tensors: Vec<_> =
        weights::read_all(golden("lora_sdxl").join(DIFFUSERS))?.into_iter().collect();
    let read = |settings: &str| {
        let metadata = BTreeMap::from([("lora_adapter_metadata".to_owned(), settings.to_owned())]);
        weights::save(&tensors, &path, &metadata)?;
        let (unet, _) = network("sdxl", Placement::default())?;
        Lora::from_file(unet.parameters(), &path)
    };
    for (settings, query, other) in [
        (r#"{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 0.5}}"#, 0.5, 4.0),
        (r#"{"lora_alpha": 8.5}"#, 8.5, 8.5),
        (r#"{"text_encoder.lora_alpha": 9}"#, 2.0, 2.0),
        (r#"{"unet.lora_alpha": 4, "unet.use_rslora": true}"#, 32.0_f64.sqrt(), 32.0_f64.sqrt()),
    ] {
        for layer in read(settings)?.layers() {
            let expected = if layer.name.ends_with(".to_q") { query } else { other };
            assert!((layer.alpha - expected).abs() < 1e-12, "{settings} {layer:?}");
        }
    }
    let pattern = read(r#"{"unet.alpha_pattern": {"to_[qk]": 1}}"#);
    assert!(matches!(
        pattern,
        Err(Error::Argument(ArgumentError::Value { name: "alpha_pattern", .. }))
    ));
    assert!(matches!(read("{"), Err(Error::InvalidJson { .. })));
    Ok(())
}

#[test]
fn pixel_networks_have_adapters_too() -> TestResult {
    let folder = golden("unet_class_labels");
    let recorded = expected("unet_class_labels")?;
    let unet = UNet2DConfig::from_file(folder.join("config.json"), UnknownKeys::Refuse)?
        .build_from(Placement::default(), folder.join("diffusion_pytorch_model.safetensors"))?;
    let (sample, t) = (&recorded["sample"], &recorded["timesteps"]);
    let forward = || unet.forward(sample, t, recorded.get("class_labels"), None);
    let plain = forward()?;
    let targets = ["to_q", "conv1", "downsamplers.0.conv", "time_emb_proj"].map(str::to_owned);
    let config = LoraConfig { targets: targets.into(), ..small() };
    let mut lora = Lora::attach(unet.parameters(), &config, 0)?;
    assert_eq!(forward()?, plain);
    fill(&lora);
    let apart = forward()?;
    assert!(relative_error(&apart, &plain) > 0.01);
    lora.merge()?;
    assert!(relative_error(&forward()?, &apart) <= TOLERANCE);
    Ok(())
}

/// Then `tools/record/record_lora.py --check` loads every folder in diffusers.
#[test]
#[ignore = "needs DDIL_WRITE_MODELS, a folder to write adapters to"]
fn write_folders_for_diffusers() -> TestResult {
    let root = std::path::PathBuf::from(std::env::var("DDIL_WRITE_MODELS")?);
    // Equal on all layers, then with several ranks and alphas.
    for (name, file) in [("sd15", None), ("sdxl", None), ("sd15", Some("mixed"))] {
        let (unet, inputs) = network(name, Placement::default())?;
        let lora = match file {
            None => Lora::attach(unet.parameters(), &small(), 0)?,
            Some(_) => Lora::from_file(unet.parameters(), golden("lora_sd15").join(DIFFUSERS))?,
        };
        fill(&lora);
        let folder = root.join(file.unwrap_or("alike")).join(format!("lora_{name}"));
        std::fs::create_dir_all(&folder)?;
        // diffusers reads no differing alphas under kohya's names.
        let formats = [LoraFormat::Diffusers, LoraFormat::Kohya].into_iter();
        let formats = formats.take(if file.is_none() { 2 } else { 1 });
        for (file, format) in FILES.into_iter().zip(formats) {
            lora.save(folder.join(file), format)?;
        }
        let output = ("output".to_owned(), forward(&unet, &inputs)?);
        weights::save(&[output], folder.join("expected.safetensors"), &BTreeMap::new())?;
    }
    Ok(())
}

/// Gradients of A and B, cleared afterwards.
fn gradients(lora: &Lora) -> Vec<Tensor> {
    let take = |(_, mut tensor): (String, Tensor)| {
        let gradient = tensor.grad().copy();
        tensor.zero_grad();
        gradient
    };
    lora.parameters().learned().into_iter().map(take).collect()
}

#[test]
fn teacher_and_averages_are_evaluated_while_the_student_has_a_graph() -> TestResult {
    let (unet, inputs) = network("sd15", Placement::default())?;
    let plain = forward(&unet, &inputs)?;
    let student = Lora::attach(unet.parameters(), &small(), 0)?;
    fill(&student);
    let average = student.duplicate()?;
    average.parameters().set_trainable(false);
    for (_, mut tensor) in average.parameters().named() {
        let _no_grad = tch::no_grad_guard();
        let _ = tensor.g_mul_scalar_(0.5);
    }
    let alone = forward(&unet, &inputs)?;
    alone.square().sum(Kind::Float).backward();
    let expected = gradients(&student);

    let first = forward(&unet, &inputs)?;
    let [of_teacher, of_average] = {
        let _no_grad = tch::no_grad_guard();
        let of_teacher = {
            let _teacher = student.switched(false)?;
            forward(&unet, &inputs)?
        };
        let _average = average.switched(true)?;
        assert!(average.is_enabled() && !student.is_enabled());
        [of_teacher, forward(&unet, &inputs)?]
    };
    assert!(student.is_enabled());
    assert_eq!((&of_teacher, &first), (&plain, &alone));
    assert!(relative_error(&of_average, &plain) > 0.01);
    assert!(relative_error(&of_average, &first) > 0.01);
    // Whichever adapter is active meanwhile: the graph is that of the evaluated one.
    student.set_enabled(false)?;
    first.square().sum(Kind::Float).backward();
    assert_eq!(gradients(&student), expected);
    for (name, tensor) in unet.parameters().named().into_iter().chain(average.parameters().named())
    {
        assert!(!tensor.requires_grad() && !tensor.grad().defined(), "{name}");
    }
    Ok(())
}

#[test]
fn a_duplicate_has_the_values_and_scale_and_goes_its_own_way() -> TestResult {
    let (unet, inputs) = network("sd15", Placement::default())?;
    let plain = forward(&unet, &inputs)?;
    let mut one = Lora::attach(unet.parameters(), &small(), 0)?;
    fill(&one);
    one.set_scale(0.5)?;
    let of_one = forward(&unet, &inputs)?;
    let mut two = one.duplicate()?;
    assert!(one.is_enabled() && !two.is_enabled());
    assert_eq!(two.layers(), one.layers());
    assert!(two.parameters().learned().iter().all(|(_, tensor)| tensor.requires_grad()));
    two.set_enabled(true)?;
    assert_eq!(forward(&unet, &inputs)?, of_one);
    one.set_scale(0.0)?;
    assert_eq!(forward(&unet, &inputs)?, of_one);
    one.set_enabled(true)?;
    assert_eq!(forward(&unet, &inputs)?, plain);

    two.merge()?;
    let merged = |result| matches!(result, Err(Error::AdapterMerged { .. }));
    assert!(
        merged(one.set_enabled(false))
            && merged(one.merge())
            && merged(one.unmerge().and(one.set_scale(1.0)))
    );
    assert!(merged(one.switched(true).map(drop)) && merged(one.duplicate().map(drop)));
    assert!(relative_error(&forward(&unet, &inputs)?, &of_one) <= TOLERANCE);
    two.unmerge()?;
    assert_eq!(forward(&unet, &inputs)?, plain);

    let trainable = || unet.parameters().learned().iter().all(|(_, tensor)| tensor.requires_grad());
    assert!(matches!(two.fuse(), Err(Error::AdapterAttached { op: "Lora::fuse", .. })));
    one.detach()?;
    assert!(!trainable());
    Ok(())
}

#[test]
fn dropping_the_last_adapter_unfreezes_the_base() -> TestResult {
    let (unet, _) = network("sd15", Placement::default())?;
    let one = Lora::attach(unet.parameters(), &small(), 0)?;
    let two = one.duplicate()?;
    let trainable = || unet.parameters().learned().iter().all(|(_, tensor)| tensor.requires_grad());
    one.detach()?;
    assert!(!trainable());
    two.detach()?;
    assert!(trainable());
    Ok(())
}

#[test]
fn fused_weights_are_the_merged_ones() -> TestResult {
    for channels_last in [false, true] {
        let placement = Placement { channels_last, ..Placement::default() };
        let (unet, inputs) = network("sd15", placement)?;
        let mut lora = Lora::attach(unet.parameters(), &small(), 0)?;
        fill(&lora);
        let apart = forward(&unet, &inputs)?;
        let before: BTreeMap<_, _> =
            unet.parameters().named().into_iter().map(|(n, t)| (n, t.copy())).collect();
        let merged = lora.merged()?;
        assert_eq!(merged.len(), lora.layers().len());
        let current = |name: &str| unet.parameters().get(name).ok_or("absent");
        for (name, before) in &before {
            assert_eq!(current(name)?, before, "{name}");
        }
        lora.merge()?;
        for (name, weight) in &merged {
            assert_eq!(current(name)?, weight, "{name}");
            assert_ne!(weight, &before[name], "{name}");
        }
        lora.unmerge()?;
        lora.fuse()?;
        for (name, weight) in &merged {
            assert_eq!(current(name)?, weight, "{name}");
        }
        assert!(relative_error(&forward(&unet, &inputs)?, &apart) <= TOLERANCE);
        // Nothing is left that a further adapter could conflict with.
        Lora::attach(unet.parameters(), &small(), 0)?;
    }
    Ok(())
}

#[test]
fn default_targets_are_those_that_a_network_has() -> TestResult {
    let (unet, _) = network("sd15", Placement::default())?;
    assert_eq!(LoraConfig::default_for(unet.parameters()), LoraConfig::default());
    let mlp = MlpConfig::default().build(Placement::default(), 0)?;
    let none = LoraConfig::default_for(mlp.parameters());
    assert!(none.targets.is_empty());
    assert!(matches!(
        Lora::attach(mlp.parameters(), &none, 0),
        Err(Error::InvalidConfig { problems, .. }) if problems[0].field == "targets"
    ));
    Ok(())
}

/// The switch is one number, so its cost does not grow with the network: printed, to be read.
#[test]
#[ignore = "a measurement"]
fn cost_of_the_switch() -> TestResult {
    let (unet, _) = network("sd15", Placement::default())?;
    let lora = Lora::attach(unet.parameters(), &small(), 0)?;
    let started = std::time::Instant::now();
    for _ in 0..1_000_000 {
        let _teacher = std::hint::black_box(&lora).switched(false)?;
    }
    println!("{} layers: {:?} a million", lora.layers().len(), started.elapsed());
    Ok(())
}
