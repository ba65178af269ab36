//! What networks are read from: settings, weights, adapters, programs, vocabularies.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_models::weights::{self, WeightFiles};
use ddil_models::{
    AutoencoderKL, AutoencoderKLConfig, ClipConfig, ClipTextConfig, ClipTokenizer,
    ClipVisionConfig, DiscriminatorHeadConfig, Lora, MlpConfig, Model, ModelConfig, NetworkConfig,
    Placement, Precision, TorchScript, TorchScriptConfig, UnknownKeys,
};
use ddil_pipelines::{ModelFiles, Pipeline, WeightForm};
use safetensors::tensor::{Dtype, TensorView};

use super::harness::{Response, Target, message_of};
use super::tree::{Tree, repository};

const CONFIG: &str = "config.json";
/// A network of more values is not built, only sized.
const SMALL: i64 = 300_000;

fn golden(name: &str) -> std::path::PathBuf {
    repository().join("tests/golden/models").join(name)
}

/// `config.json` of the golden networks whose name starts with `prefix`.
fn configs(prefix: &str) -> Vec<Tree> {
    let mut names: Vec<_> = fs::read_dir(golden("")).expect("goldens").flatten().collect();
    names.sort_by_key(fs::DirEntry::file_name);
    let of_them = |entry: &&fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with(prefix)
            && entry.path().join(CONFIG).is_file()
    };
    let read = |entry: &fs::DirEntry| {
        Tree::file(CONFIG, fs::read(entry.path().join(CONFIG)).expect("a golden"))
    };
    names.iter().filter(of_them).map(read).collect()
}

fn is_small(shapes: &[(String, Vec<i64>)]) -> bool {
    let values: i64 = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    values <= SMALL && shapes.len() <= 500
}

#[test]
fn network_config() {
    let mut seeds = [configs("unet_"), configs("torch_script")].concat();
    let mlp = MlpConfig { hidden_widths: vec![8, 8], ..MlpConfig::default() };
    seeds.push(Tree::file(CONFIG, mlp.to_json()));
    Target::new("network_config", seeds, read_network).run();
}

fn read_network(folder: &Path) -> Response {
    let path = folder.join(CONFIG);
    let _ = ModelConfig::from_file(&path, UnknownKeys::Ignore);
    let config = ModelConfig::from_file(&path, UnknownKeys::Refuse).map_err(message_of)?;
    assert!(config.to_json().contains(config.class_name()));
    let _ = DiscriminatorHeadConfig::for_model(&config);
    if matches!(config, ModelConfig::TorchScript(_)) {
        return Ok(());
    }
    let sized = config.without_values().map_err(message_of)?;
    if is_small(&sized.parameters().shapes()) {
        config.build(Placement::default(), 0).map(drop).map_err(message_of)?;
    }
    Ok(())
}

#[test]
fn autoencoder_config() {
    Target::new("autoencoder_config", configs("autoencoder"), |folder| {
        let path = folder.join(CONFIG);
        let config =
            AutoencoderKLConfig::from_file(path, UnknownKeys::Refuse).map_err(message_of)?;
        if is_small(&config.parameter_shapes().map_err(message_of)?) {
            config.build(Placement::default(), 0).map(drop).map_err(message_of)?;
        }
        Ok(())
    })
    .run();
}

#[test]
fn clip_config() {
    let seeds = [configs("clip_text"), configs("clip_vision"), configs("clip")].concat();
    Target::new("clip_config", seeds, read_clip).run();
}

fn read_clip(folder: &Path) -> Response {
    let path = folder.join(CONFIG);
    let text = ClipTextConfig::from_file(&path, UnknownKeys::Refuse);
    if let Ok(config) = &text
        && is_small(&config.parameter_shapes().map_err(message_of)?)
    {
        config.build(Placement::default(), 0).map(drop).map_err(message_of)?;
    }
    let vision = ClipVisionConfig::from_file(&path, UnknownKeys::Refuse);
    let whole = ClipConfig::from_file(&path, UnknownKeys::Refuse);
    match (text, vision, whole) {
        (Err(_), Err(_), Err(error)) => Err(message_of(error)),
        _ => Ok(()),
    }
}

/// Two tensors of two kinds and a truth value, as the `safetensors` crate writes them.
fn small_weights(names: [&str; 3]) -> Vec<u8> {
    let view = |dtype, shape: &[usize], bytes| {
        TensorView::new(dtype, shape.to_vec(), bytes).expect("it fits")
    };
    let tensors = [
        (names[0], view(Dtype::F32, &[2, 3], &[1; 24])),
        (names[1], view(Dtype::F16, &[4], &[2; 8])),
        (names[2], view(Dtype::BOOL, &[2], &[1, 0])),
    ];
    safetensors::serialize(tensors, None).expect("it can be written")
}

#[test]
fn weights_file() {
    let golden = golden("clip_vision").join("model.safetensors");
    let seeds = vec![
        Tree::file("model.safetensors", small_weights(["a.weight", "b", "c"])),
        Tree::file("model.safetensors", fs::read(golden).expect("a golden")),
    ];
    Target::new("weights_file", seeds, |folder| {
        let path = folder.join("model.safetensors");
        let _ = weights::read_metadata(&path);
        let tensors: Vec<_> = weights::read_all(&path).map_err(message_of)?.into_iter().collect();
        // Every value is there to be looked at.
        for (_, tensor) in &tensors {
            let _ = tensor.f_contiguous().map(|t| t.numel());
        }
        weights::load_into(&tensors, &path).map_err(message_of)?;
        weights::save(&tensors, folder.join("again.safetensors"), &BTreeMap::default())
            .map_err(message_of)
    })
    .run();
}

#[test]
fn shard_index() {
    let index = r#"{"metadata": {"total_size": 68}, "weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors", "d": "model-00002-of-00002.safetensors",
        "e": "model-00002-of-00002.safetensors", "f": "model-00002-of-00002.safetensors"}}"#;
    let seed = Tree::file("model.safetensors.index.json", index)
        .with("model-00001-of-00002.safetensors", small_weights(["a", "b", "c"]))
        .with("model-00002-of-00002.safetensors", small_weights(["d", "e", "f"]));
    Target::new("shard_index", vec![seed], |folder| {
        let index = WeightFiles::TRANSFORMERS.find(folder).map_err(message_of)?;
        let found = weights::read_all(&index).map_err(message_of)?;
        let _ = found.values().map(tch::Tensor::numel).sum::<usize>();
        Ok(())
    })
    .run();
}

/// A model of one tiny block, in memory.
pub(super) fn tiny_pipeline() -> Tree {
    let network = golden("unet_unconditional");
    let mut tree = Tree::default();
    for (name, content) in Tree::read(&network).files {
        if name != "expected.safetensors" {
            tree.files.insert(format!("unet/{name}"), content);
        }
    }
    let index = r#"{"_class_name": "DDIMPipeline", "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}"#;
    let scheduler = r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}"#;
    tree.with("model_index.json", index).with("scheduler/scheduler_config.json", scheduler)
}

#[test]
fn model_folder() {
    let card = Tree::read(&repository().join("assets/fashion-mnist-teacher"));
    let with_card = tiny_pipeline().with("ddil.json", card.files["ddil.json"].clone());
    let mut target = Target::new("model_folder", vec![tiny_pipeline(), with_card], read_folder);
    // The large file is another target's; its content here only costs time.
    target.repair = |_| {};
    target.run();
}

fn read_folder(folder: &Path) -> Response {
    Pipeline::open_without_weights(folder).map_err(message_of)?;
    let parts = ModelFiles::of_pipeline(folder, None).map_err(message_of)?;
    parts.check().map_err(message_of)?;
    Pipeline::ensure_weights(folder).map_err(message_of)?;
    Pipeline::open(folder, Placement::default(), Precision::Float32).map_err(message_of)?;
    let written = folder.join("written");
    parts.write(&written, &WeightForm::default(), false).map_err(message_of)?;
    ensure_within(folder);
    Ok(())
}

/// Nothing was written next to the folder.
fn ensure_within(folder: &Path) {
    for name in ["outside", "outside.json", "unet", "scheduler"] {
        let beside = folder.parent().expect("it lies in one").join(name);
        assert!(!beside.exists(), "{} was written", beside.display());
    }
}

#[test]
fn network_folder() {
    let text = repository().join("tests/golden/models/unet_class_labels");
    let mut seed = Tree::read(&text);
    seed.files.remove("expected.safetensors");
    Target::new("network_folder", vec![seed], |folder| {
        Model::from_folder(folder, Placement::default(), UnknownKeys::Refuse)
            .map(drop)
            .map_err(message_of)
    })
    .run();
}

#[test]
fn autoencoder_folder() {
    let mut seed = Tree::read(&golden("autoencoder_sd"));
    seed.files.remove("expected.safetensors");
    Target::new("autoencoder_folder", vec![seed], |folder| {
        AutoencoderKL::from_folder(folder, Placement::default(), UnknownKeys::Refuse, None)
            .map(drop)
            .map_err(message_of)
    })
    .run();
}

const ADAPTER: &str = "adapter.safetensors";

#[test]
fn lora_file() {
    let read = |name: &str| fs::read(golden("lora_sd15").join(name)).expect("a golden");
    let seeds = ["pytorch_lora_weights.safetensors", "kohya.safetensors"]
        .map(|name| Tree::file(ADAPTER, read(name)))
        .into();
    Target::new("lora_file", seeds, |folder| {
        let config = golden("unet_condition_sd15").join(CONFIG);
        let network = ModelConfig::from_file(config, UnknownKeys::Refuse)
            .and_then(|config| config.without_values())
            .map_err(message_of)?;
        let lora =
            Lora::from_file(network.parameters(), folder.join(ADAPTER)).map_err(message_of)?;
        lora.detach().map_err(message_of)
    })
    .run();
}

#[test]
fn tokenizer_folder() {
    let seeds = ["clip_tokenizer", "clip_tokenizer_2", "clip_tokenizer_json"].map(|name| {
        let mut tree = Tree::read(&golden(name));
        tree.files.remove("expected.json");
        tree
    });
    Target::new("tokenizer_folder", seeds.into(), |folder| {
        let tokenizer = ClipTokenizer::from_folder(folder).map_err(message_of)?;
        let long = "a photo of a cat ".repeat(40);
        let _ = tokenizer.encode(&["", "a photo of a cat, \u{1f600} <|endoftext|>", &long]);
        Ok(())
    })
    .run();
}

/// Reading a program runs it, so only trusted ones may be read; an invalid file is refused all the same.
#[test]
fn torch_script_file() {
    let seed = Tree::file(
        "model.pt",
        fs::read(golden("torch_script").join("model.pt")).expect("a golden"),
    );
    let read = |folder: &Path| {
        let config = TorchScriptConfig::default();
        TorchScript::from_file(folder.join("model.pt"), &config, tch::Device::Cpu)
            .map(drop)
            .map_err(message_of)
    };
    Target::new("torch_script_file", vec![seed], read).run();
}
