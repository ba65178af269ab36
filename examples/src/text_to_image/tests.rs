use std::path::{Path, PathBuf};

use ddil_data::ImageDataset;
use ddil_models::{Placement, Precision, weights};
use ddil_pipelines::Pipeline;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::*;
use crate::captions::NAMES;
use crate::{Result, Trainer, Training};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn model() -> PathBuf {
    Path::new(ROOT).join("assets/fashion-mnist-text-to-image")
}

fn golden(file: &str) -> PathBuf {
    Path::new(ROOT).join("tests/golden/text_to_image").join(file)
}

/// One bar per image, at a position that depends on its class.
fn bars() -> Result<ImageDataset> {
    let pixels = Tensor::zeros([60, 1, 32, 32], (Kind::Uint8, Device::Cpu));
    let labels: Vec<i64> = (0..60).map(|i| i % NAMES.len() as i64).collect();
    for (i, label) in (0..).zip(&labels) {
        let _ = pixels.get(i).narrow(1, 3 * label, 4).fill_(200 + i % 50);
    }
    Ok(ImageDataset::new(&pixels, Some(&Tensor::from_slice(&labels)))?)
}

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

#[test]
fn training_lowers_the_losses_and_its_folder_is_read_back() -> Result<()> {
    tch::set_num_threads(1);
    let (folder, vocabulary, data) = (tempfile::tempdir()?, vocabulary()?, bars()?);
    let (folder, settings) = (folder.path(), Settings::quick(&vocabulary));
    let tokenizer = write_tokenizer(folder, &vocabulary, &settings)?;
    let progress = Progress::default();
    let (vae, losses) = train_autoencoder(&settings, &data, &progress)?;
    assert!(mean(&losses[25..]) < 0.5 * mean(&losses[..5]), "{losses:?}");

    let latents = Latents::of(&vae, &data, None)?;
    let indices: Vec<i64> = (0..60).collect();
    let mut generator = ddil_libtorch::Generator::new(Device::Cpu, 0)?;
    let (drawn, labels) = latents.draw(&indices, &mut generator)?;
    let std = drawn.std(true).double_value(&[]);
    assert!((std - 1.0).abs() < 0.05, "{std}");
    assert_eq!(labels[13], 3);

    let networks = Networks::new(&settings)?;
    let prompts = Prompts::new(&tokenizer)?;
    let losses = train_networks(&networks, &settings, &latents, &prompts, &progress)?;
    assert!(mean(&losses[20..]) < mean(&losses[..10]), "{losses:?}");

    write_folder(folder, &settings, &Parts { vae: &vae, networks: &networks, seconds: 1.0 })?;
    let pipeline = Pipeline::open(folder, Placement::default(), Precision::Float32)?;
    let parts = pipeline.parts.text_to_image(Placement::default())?;
    let sampling = Sampling { steps: Some(2), guidance_scale: Some(2.0), seed: 1 };
    let images = draw(&pipeline, &parts, &["a coat", "a bag"], sampling)?.images;
    assert_eq!(images.size(), [2, 3, 32, 32]);
    assert_eq!(images.isfinite().all().int64_value(&[]), 1);
    let too_long = "coat ".repeat(30);
    let refused = draw(&pipeline, &parts, &[&too_long], sampling).expect_err("24 tokens at most");
    assert!(refused.to_string().contains("too long"), "{refused}");
    Ok(())
}

#[test]
fn a_run_resumes_from_its_checkpoint() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("checkpoint.safetensors");
    let weight = || Tensor::from_slice(&[1.0_f32, -2.0]).set_requires_grad(true);
    let trainer = |weight: &Tensor| {
        let training = Training { updates: 6, learning_rate: 0.1, ema_decay: 0.5 };
        Trainer::new(vec![("weight".into(), weight.shallow_clone())], training)
    };
    let update = |trainer: &mut Trainer, weight: &Tensor| trainer.update(&weight.square());

    let (whole, broken, resumed) = (weight(), weight(), weight());
    let mut straight = trainer(&whole)?;
    let mut first = trainer(&broken)?;
    for _ in 0..3 {
        assert!(update(&mut straight, &whole)? && update(&mut first, &broken)?);
    }
    first.save(&path)?;
    let mut second = trainer(&resumed)?;
    second.resume(&path)?;
    assert_eq!(second.num_updates(), 3);
    assert_eq!(resumed, whole);
    for _ in 3..6 {
        assert!(update(&mut straight, &whole)? && update(&mut second, &resumed)?);
    }
    assert_eq!(resumed, whole);
    straight.finish()?;
    second.finish()?;
    assert_eq!(resumed, whole);
    Ok(())
}

#[derive(Deserialize)]
struct Tokens {
    prompt: String,
    input_ids: Vec<i64>,
}

#[test]
fn prompts_become_the_tokens_that_transformers_makes_of_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vocabulary = vocabulary()?;
    let settings = Settings::new(&vocabulary);
    let tokenizer = write_tokenizer(folder.path(), &vocabulary, &settings)?;
    let expected: Vec<Tokens> = serde_json::from_slice(&std::fs::read(golden("tokens.json"))?)?;
    assert!(expected.len() >= 10);
    for Tokens { prompt, input_ids } in expected {
        let found = tokenizer.encode(&[&prompt])?.input_ids.view([-1]);
        assert_eq!(Vec::<i64>::try_from(&found)?, input_ids, "{prompt}");
    }
    // Every word of every caption is one token: a mark at either end, and a word.
    let encoded = tokenizer.encode(&["sneaker"])?;
    assert_eq!(encoded.attention_mask.sum(Kind::Int64).int64_value(&[]), 3);
    for file in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        let own = std::fs::read(folder.path().join("tokenizer").join(file))?;
        assert_eq!(own, std::fs::read(model().join("tokenizer").join(file))?, "{file}");
    }
    Ok(())
}

#[test]
fn images_match_diffusers() -> Result<()> {
    tch::set_num_threads(1);
    let (path, pipeline) = (
        golden("drawn.safetensors"),
        Pipeline::open(&model(), Placement::default(), Precision::Float32)?,
    );
    let (expected, how) = (weights::read_all(&path)?, weights::read_metadata(&path)?);
    let parts = pipeline.parts.text_to_image(Placement::default())?;
    let prompts: Vec<String> = serde_json::from_str(&how["prompts"])?;
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let sampling = Sampling {
        steps: Some(how["steps"].parse()?),
        guidance_scale: Some(how["guidance_scale"].parse()?),
        seed: 0,
    };
    let drawn = draw(&pipeline, &parts, &prompts, sampling)?;
    assert_eq!(drawn.noise, expected["noise"]);
    let error = (drawn.images - &expected["images"]).abs().max().double_value(&[]);
    assert!(error < 1e-4, "{error}");
    Ok(())
}
