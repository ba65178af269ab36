//! Networks in folders.

use std::collections::BTreeMap;
use std::fs;

use ddil_core::Conditioning;
use ddil_models::{
    Error, MlpConfig, Model, ModelConfig, Placement, SampleSize, SkipConfig, UNet2DConditionConfig,
    UNet2DConfig, UnknownKeys, weights,
};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::common::{CONDITION_GOLDEN, GOLDEN, TestResult, conditioning, golden, relative_error};

fn output_of(model: &Model, name: &str) -> TestResult {
    let recorded = weights::read_all(golden(name).join("expected.safetensors"))?;
    let input = recorded.get("sample").unwrap_or_else(|| &recorded["x_t"]);
    let output = model.forward(input, &recorded["timesteps"], &conditioning(&recorded))?;
    assert!(relative_error(&output, &recorded["output"]) < 1e-5, "{name}");
    Ok(())
}

fn load(folder: impl AsRef<std::path::Path>) -> ddil_models::Result<Model> {
    Model::from_folder(folder, Placement::default(), UnknownKeys::Refuse)
}

#[test]
fn folders_are_written_back_unchanged() -> TestResult {
    // A conditioning has no mask.
    let unmasked = CONDITION_GOLDEN.into_iter().filter(|name| *name != "unet_condition_lcm");
    for name in GOLDEN.into_iter().chain(unmasked).chain(["torch_script"]) {
        let model = load(golden(name))?;
        output_of(&model, name)?;
        let folder = TempDir::new()?;
        model.save_to_folder(folder.path().join("new/folder"))?;
        let again = load(folder.path().join("new/folder"))?;
        assert_eq!(again.config(), model.config());
        output_of(&again, name)?;
        assert_eq!(fs::read_dir(folder.path().join("new/folder"))?.count(), 2);
    }
    Ok(())
}

#[test]
fn an_mlp_keeps_its_schedule_in_its_folder() -> TestResult {
    let config = MlpConfig { skip: Some(SkipConfig::default()), ..MlpConfig::default() };
    let config = ModelConfig::Mlp(config);
    let model = config.build(Placement::default(), 5)?;
    let folder = TempDir::new()?;
    model.save_to_folder(folder.path())?;
    let again = load(folder.path())?;
    assert_eq!(again.config(), config);
    let (x, t) =
        (Tensor::randn([3, 2], (Kind::Float, Device::Cpu)), Tensor::from_slice(&[1_i64, 2, 999]));
    let none = Conditioning::none();
    assert_eq!(again.forward(&x, &t, &none)?, model.forward(&x, &t, &none)?);
    Ok(())
}

#[test]
fn settings_are_tagged_with_their_class() -> TestResult {
    let json = serde_json::to_value(ModelConfig::Mlp(MlpConfig::default()))?;
    assert_eq!(json["_class_name"], "Mlp");
    assert_eq!(
        serde_json::from_value::<ModelConfig>(json)?,
        ModelConfig::Mlp(MlpConfig::default())
    );
    let wrong = serde_json::json!({"_class_name": "Mlp", "width": 3});
    assert!(serde_json::from_value::<ModelConfig>(wrong).is_err());
    Ok(())
}

#[test]
fn folders_without_a_network_are_refused() -> TestResult {
    let folder = TempDir::new()?;
    assert!(matches!(load(folder.path()), Err(Error::Read { .. })));
    let config = folder.path().join("config.json");
    fs::write(&config, r#"{"_class_name": "AutoencoderKL"}"#)?;
    let error = load(folder.path()).expect_err("another class").to_string();
    assert!(error.contains("AutoencoderKL") && error.contains("UNet2DModel"), "{error}");
    fs::write(&config, "{}")?;
    assert!(load(folder.path()).expect_err("no class").to_string().contains("_class_name"));
    fs::copy(golden("unet_unconditional").join("config.json"), &config)?;
    assert!(matches!(load(folder.path()), Err(Error::NoWeights { .. })));
    fs::write(folder.path().join("diffusion_pytorch_model.bin"), "PK")?;
    assert!(matches!(load(folder.path()), Err(Error::Pickle { .. })));
    let other = golden("unet_class_labels").join("diffusion_pytorch_model.safetensors");
    fs::copy(other, folder.path().join("diffusion_pytorch_model.safetensors"))?;
    let Err(Error::WeightsMismatch { problems, .. }) = load(folder.path()) else {
        panic!("the weights of another network")
    };
    assert!(!problems.missing.is_empty() && !problems.unexpected.is_empty());
    assert!(problems.misshapen.iter().any(|(name, ..)| name == "conv_in.weight"));

    fs::write(&config, r#"{"_class_name": "TorchScript", "file": "../model.pt"}"#)?;
    assert!(matches!(load(folder.path()), Err(Error::InvalidConfig { .. })));
    Ok(())
}

/// Then `tools/record/record_unet.py --check` loads every folder in diffusers.
#[test]
#[ignore = "needs DDIL_WRITE_MODELS, a folder to write networks to"]
fn write_folders_for_diffusers() -> TestResult {
    let root = std::path::PathBuf::from(std::env::var("DDIL_WRITE_MODELS")?);
    // `unet_guidance` is nothing that diffusers has.
    for name in GOLDEN.into_iter().filter(|name| *name != "unet_guidance").chain(CONDITION_GOLDEN) {
        // Fresh parameters: nothing that diffusers wrote is left in the folder.
        let model = load(golden(name))?.config().build(Placement::default(), 1)?;
        model.save_to_folder(root.join(name))?;
        let mut recorded = weights::read_all(golden(name).join("expected.safetensors"))?;
        let fields = model.conditioning_fields();
        let kept = |key: &str| ["sample", "timesteps"].contains(&key) || fields.contains(&key);
        recorded.retain(|key, _| kept(key));
        let told = conditioning(&recorded);
        let output = model.forward(&recorded["sample"], &recorded["timesteps"], &told)?;
        recorded.insert("output".to_owned(), output);
        let recorded: Vec<_> = recorded.into_iter().collect();
        weights::save(
            &recorded,
            root.join(name).join("expected.safetensors"),
            &BTreeMap::default(),
        )?;
    }
    Ok(())
}

#[test]
fn u_nets_share_the_settings_they_report() {
    let pixels = UNet2DConfig {
        in_channels: 3,
        out_channels: 6,
        sample_size: Some(SampleSize::Square(8)),
        num_class_embeds: Some(11),
        ..UNet2DConfig::default()
    };
    let latents = UNet2DConditionConfig::sd15();
    for (config, channels, size, classes) in [
        (ModelConfig::UNet2D(pixels), [3, 6], Some([8; 2]), Some(11)),
        (ModelConfig::UNet2DCondition(latents), [4, 4], Some([64; 2]), None),
    ] {
        assert_eq!(config.channels(), Some(channels));
        assert_eq!(config.sample_size(), size);
        assert_eq!(config.num_class_embeds(), classes);
        assert_eq!(config.time_cond_proj_dim(), None);
        let told = config.clone().with_time_cond_proj_dim(16).expect("a U-Net");
        assert_eq!(told.time_cond_proj_dim(), Some(16));
        let sized = config.clone().with_sample_size([4, 12]).expect("a U-Net");
        assert_eq!((sized.sample_size(), sized.class_name()), (Some([4, 12]), config.class_name()));
    }
    let mlp = ModelConfig::Mlp(MlpConfig::default());
    assert_eq!((mlp.channels(), mlp.sample_size(), mlp.time_cond_proj_dim()), (None, None, None));
    let refused = mlp.clone().with_sample_size([4, 4]).expect_err("no U-Net").to_string();
    assert!(refused.contains("`_class_name` is Mlp"), "{refused}");
    assert!(mlp.with_time_cond_proj_dim(16).is_err());
}
