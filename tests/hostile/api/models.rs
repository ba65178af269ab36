use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use ddil_core::{Conditioning, Denoiser, Discriminator, Generator};
use ddil_models::weights::{self, WeightFiles};
use ddil_models::{
    AutoencoderKLConfig, ClipConfig, ClipModel, ClipScore, ClipTextConfig, ClipTextModel,
    ClipTokenizer, ClipVisionConfig, ClipVisionModel, Dinov2Config, Dinov2Model,
    DiscriminatorHeadConfig, HiddenState, Lora, LoraConfig, LoraFormat, MlpConfig, Model,
    ModelConfig, NetworkConfig, NetworkDenoiser, NetworkDiscriminator, PerLevel, Placement,
    SampleSize, SkipConfig, TorchScript, TorchScriptConfig, UNet2DConditionConfig,
    UNet2DConditionInputs, UNet2DConfig, UnknownKeys,
};
use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, PredictionType};
use tch::{Device, Kind, Tensor, kind};

use super::cases::{Cases, ODD_NUMBERS, ODD_WHOLES, outcome};
use crate::inputs::repository;

fn golden(name: &str) -> std::path::PathBuf {
    repository().join("tests/golden/models").join(name)
}

fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the default is valid")
}

fn placement() -> Placement {
    Placement::default()
}

fn network(name: &str) -> Model {
    Model::from_folder(golden(name), placement(), UnknownKeys::Refuse).expect("a golden")
}

fn images(channels: i64) -> Tensor {
    Tensor::ones([2, channels, 8, 8], kind::FLOAT_CPU) * 0.5
}

fn times() -> Tensor {
    Tensor::from_slice(&[749_i64, 249])
}

#[test]
fn ddil_models() {
    let mut cases = Cases::default();
    pixel_unets(&mut cases);
    text_unets(&mut cases);
    mlps(&mut cases);
    any_class(&mut cases);
    autoencoders(&mut cases);
    clip(&mut cases);
    clip_score(&mut cases);
    dinov2(&mut cases);
    tokenizer(&mut cases);
    discriminators(&mut cases);
    adapters(&mut cases);
    parameters(&mut cases);
    weight_files(&mut cases);
    programs(&mut cases);
    placements(&mut cases);
    folders(&mut cases);
    cases.finish("ddil-models");
}

fn pixel_unets(cases: &mut Cases) {
    let Model::UNet2D(plain) = network("unet_unconditional") else { panic!("a UNet2DModel") };
    let x = images(plain.config().in_channels.into());
    cases.tensors("UNet2DModel::forward", &[&x, &times()], |t| {
        outcome(plain.forward(&t[0], &t[1], None, None))
    });
    let Model::UNet2D(classes) = network("unet_class_labels") else { panic!("a UNet2DModel") };
    let x = images(classes.config().in_channels.into());
    let labels = Tensor::from_slice(&[0_i64, 1]);
    cases.tensors("UNet2DModel::forward", &[&x, &times(), &labels], |t| {
        outcome(classes.forward(&t[0], &t[1], Some(&t[2]), None))
    });
    cases.tensors("UNet2DModel::forward_with_features", &[&x, &times(), &labels], |t| {
        outcome(classes.forward_with_features(&t[0], &t[1], Some(&t[2]), None))
    });
    cases.tensors("UNet2DModel::features", &[&x, &times(), &labels], |t| {
        outcome(classes.features(&t[0], &t[1], Some(&t[2]), None))
    });
    let Model::UNet2D(guided) = network("unet_guidance") else { panic!("a UNet2DModel") };
    let x = images(guided.config().in_channels.into());
    let weight = Tensor::from_slice(&[1.0_f32, 2.0]);
    let conditioning = guided.config().num_class_embeds.is_some().then_some(&labels);
    cases.tensors("UNet2DModel::forward", &[&x, &times(), &weight], |t| {
        outcome(guided.forward(&t[0], &t[1], conditioning, Some(&t[2])))
    });
    cases.cannot_fail(&[
        "UNet2DModel::set_training",
        "UNet2DModel::set_activation_checkpointing",
        "UNet2DConditionModel::set_training",
        "UNet2DConditionModel::set_activation_checkpointing",
    ]);
}

fn text_unets(cases: &mut Cases) {
    for name in ["unet_condition_sd15", "unet_condition_sdxl", "unet_condition_text"] {
        let Model::UNet2DCondition(unet) = network(name) else { panic!("a UNet2DConditionModel") };
        let config = unet.config();
        let width = config.cross_attention_dim.at(0).unwrap_or(8);
        let states = Tensor::ones([2, 3, width.into()], kind::FLOAT_CPU);
        let x = images(config.in_channels.into());
        let embeds = config.addition_time_embed_dim.map(|features| {
            let width = config.projection_class_embeddings_input_dim.unwrap_or(0);
            Tensor::ones([2, i64::from(width) - 6 * i64::from(features)], kind::FLOAT_CPU)
        });
        let time_ids = embeds.as_ref().map(|_| Tensor::ones([2, 6], kind::FLOAT_CPU));
        let mask = Tensor::ones([2, 3], kind::INT64_CPU);
        let label_width = config.projection_class_embeddings_input_dim.unwrap_or(1);
        let labels = Tensor::ones([2, label_width.into()], kind::FLOAT_CPU);
        let conditioning = UNet2DConditionInputs {
            text_embeds: embeds.as_ref(),
            time_ids: time_ids.as_ref(),
            class_labels: config.class_embed_type.is_some().then_some(&labels),
            ..Default::default()
        };
        cases.tensors("UNet2DConditionModel::forward", &[&x, &times(), &states, &mask], |t| {
            let inputs = UNet2DConditionInputs {
                encoder_hidden_states: Some(&t[2]),
                encoder_attention_mask: Some(&t[3]),
                ..conditioning
            };
            outcome(unet.forward(&t[0], &t[1], inputs))
        });
        cases.tensors(
            "UNet2DConditionModel::forward_with_features",
            &[&x, &times(), &states],
            |t| {
                let inputs =
                    UNet2DConditionInputs { encoder_hidden_states: Some(&t[2]), ..conditioning };
                outcome(unet.forward_with_features(&t[0], &t[1], inputs))
            },
        );
        cases.tensors("UNet2DConditionModel::features", &[&x, &times(), &states], |t| {
            let inputs =
                UNet2DConditionInputs { encoder_hidden_states: Some(&t[2]), ..conditioning };
            outcome(unet.features(&t[0], &t[1], inputs))
        });
        if let (Some(embeds), Some(time_ids)) = (&embeds, &time_ids) {
            cases.tensors("UNet2DConditionModel::forward", &[embeds, time_ids], |t| {
                let inputs = UNet2DConditionInputs {
                    encoder_hidden_states: Some(&states),
                    text_embeds: Some(&t[0]),
                    time_ids: Some(&t[1]),
                    ..Default::default()
                };
                outcome(unet.forward(&x, &times(), inputs))
            });
        }
    }
    cases.cannot_fail(&["UNet2DConditionInputs::text"]);
    cases.integers("PerLevel::at", |level| {
        let _ = PerLevel::Each(vec![1, 2]).at(level as usize);
        Ok(())
    });
}

fn mlps(cases: &mut Cases) {
    let config = MlpConfig {
        hidden_widths: vec![8],
        num_class_embeds: Some(3),
        embed_guidance: true,
        ..MlpConfig::default()
    };
    let mlp = config.build(placement(), 0).expect("it is valid");
    let x = Tensor::ones([2, 2], kind::FLOAT_CPU);
    let (labels, weight) = (Tensor::from_slice(&[0_i64, 2]), Tensor::from_slice(&[1.0_f32, 2.0]));
    cases.tensors("Mlp::forward", &[&x, &times(), &labels, &weight], |t| {
        outcome(mlp.forward(&t[0], &t[1], Some(&t[2]), Some(&t[3])))
    });
    cases.tensors("Mlp::forward_with_features", &[&x, &times(), &labels, &weight], |t| {
        outcome(mlp.forward_with_features(&t[0], &t[1], Some(&t[2]), Some(&t[3])))
    });
    let skip = MlpConfig {
        skip: Some(SkipConfig::default()),
        hidden_widths: vec![8],
        ..MlpConfig::default()
    };
    let skip = skip.build(placement(), 0).expect("it is valid");
    cases.tensors("Mlp::forward", &[&x, &times()], |t| {
        outcome(skip.forward(&t[0], &t[1], None, None))
    });
    for whole in ODD_WHOLES {
        let n = whole as u32;
        for config in [
            MlpConfig { dim: n, ..MlpConfig::default() },
            MlpConfig { hidden_widths: vec![n, n], ..MlpConfig::default() },
            MlpConfig { fourier_octaves: n, time_features: n, ..MlpConfig::default() },
            MlpConfig { num_class_embeds: Some(n), class_features: n, ..MlpConfig::default() },
            MlpConfig { hidden_widths: vec![], ..MlpConfig::default() },
        ] {
            cases.once("NetworkConfig::build", &format!("{config:?}"), || {
                outcome(config.build(placement(), 0))
            });
            cases.once("DiscriminatorHeadConfig::for_model", &format!("{config:?}"), || {
                outcome(DiscriminatorHeadConfig::for_model(&ModelConfig::Mlp(config)))
            });
        }
    }
}

fn any_class(cases: &mut Cases) {
    let model = Rc::new(network("unet_class_labels"));
    let x = images(model.config().channels().map_or(1, |[inputs, _]| inputs.into()));
    let labels = Tensor::from_slice(&[0_i64, 1]);
    let of = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
    cases.tensors("Model::forward", &[&x, &times(), &labels], |t| {
        outcome(model.forward(&t[0], &t[1], &of(&t[2])))
    });
    cases.tensors("Model::forward_with_features", &[&x, &times(), &labels], |t| {
        outcome(model.forward_with_features(&t[0], &t[1], &of(&t[2])))
    });
    cases.tensors("Model::features", &[&x, &times(), &labels], |t| {
        outcome(model.features(&t[0], &t[1], &of(&t[2])))
    });
    cases.once("Model::set_training", "on and off", || {
        outcome(model.set_training(true))?;
        outcome(model.set_training(false))
    });
    for output in [PredictionType::Epsilon, PredictionType::VPrediction] {
        let denoiser = NetworkDenoiser::new(Rc::clone(&model), output, schedule());
        cases.once("NetworkDenoiser::new", output.as_str(), || {
            outcome(denoiser.as_ref().map(|_| ()).map_err(|e| std::io::Error::other(e.to_string())))
        });
        let Ok(denoiser) = denoiser else { continue };
        cases.tensors("Model::forward", &[&x, &times(), &labels], |t| {
            outcome(denoiser.predict(&t[0], &t[1], &of(&t[2])))
        });
        cases.tensors("NetworkDenoiser::output", &[&x, &times(), &labels], |t| {
            outcome(denoiser.output(&t[0], &t[1], &of(&t[2])))
        });
        for trainable in [false, true] {
            cases.once("NetworkDenoiser::duplicate", &trainable.to_string(), || {
                outcome(denoiser.duplicate(trainable))
            });
        }
        for (what, config) in odd_unets() {
            cases.once("NetworkDenoiser::derive", &what, || {
                outcome(denoiser.derive(&ModelConfig::UNet2D(config), 0))
            });
        }
        for rank in [0, 1, i64::MAX] {
            let targets = vec!["default".to_owned()];
            let lora = LoraConfig { rank, alpha: f64::NAN, targets };
            cases.once("NetworkDenoiser::with_adapter", &rank.to_string(), || {
                let model = Rc::new(network("unet_class_labels"));
                let alone = NetworkDenoiser::new(model, output, schedule()).expect("it fits");
                outcome(alone.with_adapter(&lora, 0))
            });
        }
    }
    cases.cannot_fail(&[
        "NetworkDenoiser::with_precision",
        "NetworkDenoiser::with_observer",
        "NetworkDenoiser::ignoring",
        "OutputObserver::observe",
    ]);
    for whole in ODD_WHOLES {
        let n = whole as u32;
        let config = || ModelConfig::UNet2D(UNet2DConfig::default());
        cases.once("ModelConfig::with_time_cond_proj_dim", &n.to_string(), || {
            outcome(config().with_time_cond_proj_dim(n))
        });
        cases.once("ModelConfig::with_sample_size", &n.to_string(), || {
            outcome(config().with_sample_size([n, n]))
        });
    }
    for (what, config) in odd_unets() {
        cases.once("NetworkConfig::build", &what, || outcome(config.build(placement(), 0)));
        cases.once("ModelConfig::build", &what, || {
            outcome(ModelConfig::UNet2D(config.clone()).build(placement(), 0))
        });
        cases.once("DiscriminatorHeadConfig::for_model", &what, || {
            outcome(DiscriminatorHeadConfig::for_model(&ModelConfig::UNet2D(config.clone())))
        });
    }
    for (what, config) in odd_text_unets() {
        cases.once("NetworkConfig::build", &what, || outcome(config.build(placement(), 0)));
        cases.once("DiscriminatorHeadConfig::for_model", &what, || {
            outcome(DiscriminatorHeadConfig::for_model(&ModelConfig::UNet2DCondition(config)))
        });
    }
}

/// Settings with one number beyond anything; none of them describes a small network that can be built at length.
fn odd_unets() -> Vec<(String, UNet2DConfig)> {
    let mut all = Vec::new();
    for n in [0, u32::MAX, 1 << 20, 1 << 31] {
        let base = UNet2DConfig::default;
        for (key, config) in [
            ("in_channels", UNet2DConfig { in_channels: n, ..base() }),
            ("block_out_channels", UNet2DConfig { block_out_channels: vec![n; 4], ..base() }),
            ("layers_per_block", UNet2DConfig { layers_per_block: n, ..base() }),
            ("norm_num_groups", UNet2DConfig { norm_num_groups: n, ..base() }),
            ("time_embedding_dim", UNet2DConfig { time_embedding_dim: Some(n), ..base() }),
            ("attention_head_dim", UNet2DConfig { attention_head_dim: Some(n), ..base() }),
            ("time_cond_proj_dim", UNet2DConfig { time_cond_proj_dim: Some(n), ..base() }),
            (
                "sample_size",
                UNet2DConfig {
                    sample_size: Some(SampleSize::Square(n)),
                    norm_num_groups: 0,
                    ..base()
                },
            ),
            (
                "levels",
                UNet2DConfig { block_out_channels: vec![32; n.min(1 << 20) as usize], ..base() },
            ),
        ] {
            // Such a network is large and can be built.
            let is_possible = config.parameter_shapes().is_ok();
            if !is_possible || key == "in_channels" && n == 0 {
                all.push((format!("{key} = {n}"), config));
            }
        }
    }
    all
}

fn odd_text_unets() -> Vec<(String, UNet2DConditionConfig)> {
    let mut all = Vec::new();
    for n in [0, u32::MAX, 1 << 31] {
        let base = UNet2DConditionConfig::sd15;
        for (key, config) in [
            ("in_channels", UNet2DConditionConfig { in_channels: n, ..base() }),
            ("conv_in_kernel", UNet2DConditionConfig { conv_in_kernel: n, ..base() }),
            (
                "cross_attention_dim",
                UNet2DConditionConfig { cross_attention_dim: PerLevel::All(n), ..base() },
            ),
            (
                "layers_per_block",
                UNet2DConditionConfig { layers_per_block: PerLevel::All(n), ..base() },
            ),
            (
                "attention_head_dim",
                UNet2DConditionConfig { attention_head_dim: PerLevel::Each(vec![n]), ..base() },
            ),
            ("block_out_channels", UNet2DConditionConfig { block_out_channels: vec![], ..base() }),
        ] {
            all.push((format!("{key} = {n}"), config));
        }
    }
    all
}

fn autoencoders(cases: &mut Cases) {
    let folder = golden("autoencoder_sd");
    let mut vae =
        ddil_models::AutoencoderKL::from_folder(folder, placement(), UnknownKeys::Refuse, None)
            .expect("a golden");
    let pictures = Tensor::zeros([2, vae.config().in_channels.into(), 16, 16], kind::FLOAT_CPU);
    let latents = Tensor::zeros([2, vae.config().latent_channels.into(), 4, 4], kind::FLOAT_CPU);
    let generator = || Generator::new(Device::Cpu, 0).expect("there is a CPU");
    for sliced in [false, true] {
        vae.set_sliced(sliced);
        cases.tensors("AutoencoderKL::encode", &[&pictures], |t| outcome(vae.encode(&t[0])));
        cases.tensors("AutoencoderKL::decode", &[&latents], |t| outcome(vae.decode(&t[0])));
    }
    cases.tensors("AutoencoderKL::encode_scaled", &[&pictures], |t| {
        outcome(vae.encode_scaled(&t[0], &mut generator()))
    });
    cases.tensors("AutoencoderKL::decode_scaled", &[&latents], |t| {
        outcome(vae.decode_scaled(&t[0]))
    });
    cases.tensors("AutoencoderKL::scale", &[&latents], |t| outcome(vae.scale(&t[0])));
    cases.tensors("AutoencoderKL::unscale", &[&latents], |t| outcome(vae.unscale(&t[0])));
    let gaussian = vae.encode(&pictures).expect("pictures");
    cases.once("DiagonalGaussian::sample", "a generator", || {
        outcome(gaussian.sample(&mut generator()))
    });
    cases.cannot_fail(&["AutoencoderKL::set_sliced"]);
    for n in [0, u32::MAX, 1 << 20] {
        for config in [
            AutoencoderKLConfig { in_channels: n, ..Default::default() },
            AutoencoderKLConfig { layers_per_block: n, ..Default::default() },
            AutoencoderKLConfig {
                latent_channels: n,
                block_out_channels: vec![n],
                ..Default::default()
            },
            AutoencoderKLConfig {
                scaling_factor: f64::NAN,
                norm_num_groups: n,
                ..Default::default()
            },
        ] {
            if config.parameter_shapes().is_err() {
                cases.once("NetworkConfig::build", &n.to_string(), || {
                    outcome(config.build(placement(), 0))
                });
            }
        }
    }
}

fn clip(cases: &mut Cases) {
    let text = ClipTextModel::from_folder(
        golden("clip_text_with_projection"),
        placement(),
        UnknownKeys::Refuse,
    )
    .expect("a golden");
    let ids = Tensor::from_slice(&[1_i64, 2, 3, 4]).view([2, 2]);
    let mask = Tensor::ones([2, 2], kind::INT64_CPU);
    cases.tensors("ClipTextModel::forward", &[&ids, &mask], |t| {
        outcome(text.forward(&t[0], Some(&t[1])))
    });
    cases.tensors("ClipTextModel::text_embeds", &[&ids, &mask], |t| {
        outcome(text.text_embeds(&t[0], Some(&t[1])))
    });
    for skip in [0, 1, 99, u32::MAX] {
        let which = HiddenState::stable_diffusion(skip);
        cases.once("ClipTextModel::hidden_state", &skip.to_string(), || {
            outcome(text.hidden_state(&ids, None, which))
        });
        cases.once("HiddenState::stable_diffusion", &skip.to_string(), || {
            outcome(text.hidden_state(&ids, None, HiddenState::stable_diffusion_xl(skip)))
        });
    }
    cases.cannot_fail(&["HiddenState::stable_diffusion_xl"]);
    let which = HiddenState::stable_diffusion(0);
    cases.tensors("ClipTextModel::hidden_state", &[&ids, &mask], |t| {
        outcome(text.hidden_state(&t[0], Some(&t[1]), which))
    });
    cases.tensors("ClipTextModel::hidden_state_and_text_embeds", &[&ids, &mask], |t| {
        outcome(text.hidden_state_and_text_embeds(&t[0], Some(&t[1]), which))
    });
    let vision =
        ClipVisionModel::from_folder(golden("clip_vision"), placement(), UnknownKeys::Refuse)
            .expect("a golden");
    let side = i64::from(vision.config().image_size);
    let pixels =
        Tensor::zeros([2, vision.config().num_channels.into(), side, side], kind::FLOAT_CPU);
    cases.tensors("ClipVisionModel::forward", &[&pixels], |t| outcome(vision.forward(&t[0])));
    for n in [0, u32::MAX, 1 << 21] {
        let what = n.to_string();
        let text = ClipTextConfig { vocab_size: n, num_hidden_layers: n, ..Default::default() };
        cases.once("NetworkConfig::build", &what, || outcome(text.build(placement(), 0)));
        let vision = ClipVisionConfig { image_size: n, patch_size: n, ..Default::default() };
        cases.once("NetworkConfig::build", &what, || outcome(vision.build(placement(), 0)));
        let both = ClipConfig { text: text.clone(), vision: vision.clone(), ..Default::default() };
        cases.once("NetworkConfig::build", &what, || outcome(both.build(placement(), 0)));
    }
}

fn clip_score(cases: &mut Cases) {
    let open = || ClipModel::from_folder(golden("clip"), placement(), UnknownKeys::Refuse);
    let score = ClipScore::new(open().expect("a golden"));
    let pictures = Tensor::zeros([2, 3, 28, 28], kind::FLOAT_CPU);
    let ids = Tensor::from_slice(&[1_i64, 2, 3, 4]).view([2, 2]);
    let mask = Tensor::ones([2, 2], kind::INT64_CPU);
    cases.cannot_fail(&["ClipScore::new"]);
    cases.tensors("ClipScore::image_embeds", &[&pictures], |t| outcome(score.image_embeds(&t[0])));
    cases.tensors("ClipScore::text_embeds", &[&ids, &mask], |t| {
        outcome(score.text_embeds(&t[0], Some(&t[1])))
    });
    cases.tensors("ClipScore::similarities", &[&pictures, &ids, &mask], |t| {
        outcome(score.similarities(&t[0], &t[1], Some(&t[2])))
    });
    cases.tensors("ClipScore::score", &[&pictures, &ids, &mask], |t| {
        outcome(score.score(&t[0], &t[1], Some(&t[2])))
    });
}

fn dinov2(cases: &mut Cases) {
    let network = Dinov2Model::from_folder(golden("dinov2"), placement(), UnknownKeys::Refuse)
        .expect("a golden");
    let pixels = Tensor::zeros([2, 3, 28, 28], kind::FLOAT_CPU);
    cases.tensors("Dinov2Model::forward", &[&pixels], |t| outcome(network.forward(&t[0])));
    for n in [0, u32::MAX, 1 << 21] {
        for config in [
            Dinov2Config { num_hidden_layers: n, ..Default::default() },
            Dinov2Config { image_size: n, patch_size: n, ..Default::default() },
            Dinov2Config { mlp_ratio: n, use_swiglu_ffn: true, ..Default::default() },
        ] {
            cases.once("NetworkConfig::build", &n.to_string(), || {
                outcome(config.build(placement(), 0))
            });
        }
    }
}

fn tokenizer(cases: &mut Cases) {
    let tokenizer = ClipTokenizer::from_folder(golden("clip_tokenizer")).expect("a golden");
    let long = "\u{1f600}\u{0301}a".repeat(5000);
    for prompt in ["", " ", "\0", "<|endoftext|>", "\u{202e}\u{feff}", &long] {
        cases.once("ClipTokenizer::encode", &format!("{prompt:.10?}"), || {
            outcome(tokenizer.encode(&[prompt]))
        });
    }
    cases.once("ClipTokenizer::encode", "nothing", || outcome(tokenizer.encode(&[])));
}

fn discriminators(cases: &mut Cases) {
    let config = DiscriminatorHeadConfig { in_channels: 32, side: 4, ..Default::default() };
    let head = Rc::new(config.build(placement(), 0).expect("it is valid"));
    let features = Tensor::ones([2, 32, 4, 4], kind::FLOAT_CPU);
    cases.tensors("DiscriminatorHead::forward", &[&features], |t| outcome(head.forward(&t[0])));
    for n in [0, 1, 3, u32::MAX, 1 << 31] {
        for config in [
            DiscriminatorHeadConfig { in_channels: n, ..config.clone() },
            DiscriminatorHeadConfig { side: n, ..config.clone() },
        ] {
            cases.once("NetworkConfig::build", &format!("{config:?}"), || {
                outcome(config.build(placement(), 0))
            });
        }
    }
    let mlp = ModelConfig::Mlp(MlpConfig { hidden_widths: vec![8], ..MlpConfig::default() });
    let network = mlp.build(placement(), 0).expect("it is valid");
    let network =
        NetworkDenoiser::new(network, PredictionType::Epsilon, schedule()).expect("it fits");
    let own = DiscriminatorHeadConfig::for_model(&mlp)
        .and_then(|head| head.build(placement(), 0))
        .expect("it fits");
    let judge = NetworkDiscriminator::new(&network, own).expect("it fits");
    let x = Tensor::ones([2, 2], kind::FLOAT_CPU);
    cases.tensors("DiscriminatorHead::forward", &[&x, &times()], |t| {
        outcome(judge.logits(&t[0], &t[1], &Conditioning::none())).or(Err("a refusal".to_owned()))
    });
    cases.once("NetworkDiscriminator::new", "a head of another network", || {
        outcome(NetworkDiscriminator::new(&network, Rc::clone(&head)).map(|_| ()))
    });
}

fn adapters(cases: &mut Cases) {
    let network = || MlpConfig::default().build(placement(), 0).expect("it is valid");
    let config =
        |rank, alpha, target: &str| LoraConfig { rank, alpha, targets: vec![target.to_owned()] };
    for rank in ODD_WHOLES {
        cases.once("Lora::attach", &rank.to_string(), || {
            // A rank of billions is possible and takes the memory that it takes.
            let rank = if rank > 1000 && rank < 1 << 50 { -rank } else { rank };
            outcome(Lora::attach(network().parameters(), &config(rank, 1.0, "layers.0"), 0))
        });
    }
    for alpha in ODD_NUMBERS {
        cases.once("Lora::attach", &alpha.to_string(), || {
            outcome(Lora::attach(network().parameters(), &config(2, alpha, "layers.0"), 0))
        });
    }
    let whole = network();
    let mut lora =
        Lora::attach(whole.parameters(), &config(2, 2.0, "layers.0"), 0).expect("it fits");
    cases.once("Lora::attach", "one that is there", || {
        outcome(Lora::attach(whole.parameters(), &config(2, 2.0, "layers.0"), 0))
    });
    cases.once("Lora::set_enabled", "off and on", || {
        outcome(lora.set_enabled(false))?;
        outcome(lora.switched(true).map(drop))
    });
    cases.once("Lora::switched", "on", || outcome(lora.switched(true).map(drop)));
    for scale in ODD_NUMBERS {
        cases.once("Lora::set_scale", &scale.to_string(), || outcome(lora.set_scale(scale)));
    }
    lora.merge().expect("it is apart");
    cases.once("Lora::set_enabled", "merged", || outcome(lora.set_enabled(true)));
    cases.once("Lora::set_scale", "merged", || outcome(lora.set_scale(1.0)));
    for path in ["/", "/nowhere/at/all", "nul\0byte"] {
        cases.once("Lora::save", path, || outcome(lora.save(path, LoraFormat::Kohya)));
    }
    cases.cannot_fail(&["LoraConfig::default_for"]);
    cases.corrupted_in_inputs(&["Lora::from_file"]);
}

fn parameters(cases: &mut Cases) {
    let small = MlpConfig { hidden_widths: vec![4], ..MlpConfig::default() };
    let (small, whole) = (small.build(placement(), 0), MlpConfig::default().build(placement(), 0));
    let (small, whole) = (small.expect("valid"), whole.expect("valid"));
    cases.once("Parameters::copy_from", "another network", || {
        outcome(small.parameters().copy_from(whole.parameters()))
    });
    cases.once("Parameters::copy_matching", "another network", || {
        outcome(small.parameters().copy_matching(whole.parameters()))
    });
    let sized = MlpConfig::default();
    let sized = ModelConfig::Mlp(sized).without_values().expect("valid");
    cases.once("Parameters::copy_from", "a network without values", || {
        outcome(whole.parameters().copy_from(sized.parameters()))
    });
    cases.cannot_fail(&["Parameters::get", "Parameters::set_trainable"]);
    for path in ["/", "/nowhere/at/all", "nul\0byte", "model.bin"] {
        cases.once("Parameters::load", path, || outcome(whole.parameters().load(path)));
        cases.once("NetworkConfig::read_weights", path, || {
            outcome(AutoencoderKLConfig::default().read_weights(path))
        });
        cases.once("NetworkConfig::read_weights", path, || {
            outcome(ClipTextConfig::default().read_weights(path))
        });
    }
    let mlp = Model::Mlp(MlpConfig::default().build(placement(), 0).expect("valid"));
    for on in [false, true] {
        cases.once("Model::set_activation_checkpointing", &on.to_string(), || {
            outcome(mlp.set_activation_checkpointing(on))
        });
    }
    cases.once("Parameters::save", "a folder", || outcome(whole.parameters().save("/")));
}

fn weight_files(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    let x = Tensor::ones([2, 3], kind::FLOAT_CPU);
    let named = |tensor: &Tensor| vec![("a".to_owned(), tensor.shallow_clone())];
    let none = BTreeMap::new();
    cases.tensors("save", &[&x], |t| outcome(weights::save(&named(&t[0]), &path, &none)));
    for kind in [Kind::Half, Kind::Int64, Kind::Bool, Kind::ComplexFloat, Kind::QInt8] {
        cases.tensors("save_as", &[&x], |t| {
            let saved = weights::save_as(&named(&t[0]), &path, &none, Some(kind));
            let whole = matches!(kind, Kind::ComplexFloat | Kind::QInt8);
            if whole { outcome(saved).or(Ok(())) } else { outcome(saved) }
        });
    }
    weights::save(&named(&x), &path, &none).expect("there is room");
    cases.tensors("load_into", &[&x], |t| outcome(weights::load_into(&named(&t[0]), &path)));
    cases.tensors("ensure_fits", &[&x], |t| outcome(weights::ensure_fits(&named(&t[0]), &path)));
    let twice = vec![("a".to_owned(), x.copy()), ("a".to_owned(), x.copy())];
    cases.once("save", "one name twice", || outcome(weights::save(&twice, &path, &none)));
    cases.once("load_into", "one name twice", || outcome(weights::load_into(&twice, &path)));
    let odd_paths = ["", "/", "/nowhere/at/all", "nul\0byte", "x.bin", "x.safetensors.index.json"];
    for odd in odd_paths {
        // A file of such a name, and not in the folder that the tests run in.
        let at = if odd.starts_with('x') { folder.path().join(odd) } else { odd.into() };
        cases.once("save", odd, || outcome(weights::save(&named(&x), &at, &none)));
        cases.once("read_all", odd, || outcome(weights::read_all(&at)));
        cases.once("read_metadata", odd, || outcome(weights::read_metadata(&at)));
        let files = WeightFiles { stem: odd, variant: Some(odd) };
        cases.once("WeightFiles::find", odd, || outcome(files.find(folder.path())));
        cases.once("WeightFiles::find_any", odd, || outcome(files.find_any(folder.path())));
        cases.once("WeightFiles::save", odd, || outcome(files.save(&named(&x), folder.path())));
        cases.once("WeightFiles::save_sharded", odd, || {
            outcome(files.save_sharded(&twice, folder.path(), 0))
        });
        cases.once("WeightFiles::save_sharded_as", odd, || {
            outcome(files.save_sharded_as(&twice, folder.path(), 1, Some(Kind::QInt8)))
        });
    }
    cases.tensors("WeightFiles::save_sharded", &[&x, &x], |t| {
        let both =
            vec![("a".to_owned(), t[0].shallow_clone()), ("b".to_owned(), t[1].shallow_clone())];
        outcome(WeightFiles::DIFFUSION.save_sharded(&both, folder.path(), 10))
    });
    cases.tensors("WeightFiles::save_sharded_as", &[&x, &x], |t| {
        let both =
            vec![("a".to_owned(), t[0].shallow_clone()), ("b".to_owned(), t[1].shallow_clone())];
        outcome(WeightFiles::DIFFUSION.save_sharded_as(&both, folder.path(), 10, Some(Kind::Half)))
    });
}

fn programs(cases: &mut Cases) {
    let config = TorchScriptConfig { class_labels: true, ..Default::default() };
    let path = golden("torch_script").join("model.pt");
    for config in [TorchScriptConfig::default(), config] {
        for place in [path.as_path(), Path::new("none"), Path::new("/")] {
            for device in [Device::Cpu, Device::Cuda(0)] {
                cases.once(
                    "TorchScript::from_file",
                    &format!("{} on {device:?}", place.display()),
                    || outcome(TorchScript::from_file(place, &config, device)),
                );
            }
        }
        let script = TorchScript::from_file(&path, &config, Device::Cpu).expect("a golden");
        let expected = weights::read_all(golden("torch_script").join("expected.safetensors"))
            .expect("a golden");
        let x = expected.get("x_t").map_or_else(|| images(1), Tensor::copy);
        let batch = x.size()[0];
        let times = Tensor::ones([batch], kind::INT64_CPU);
        let labels = Tensor::zeros([batch], kind::INT64_CPU);
        let conditioning = config.class_labels.then_some(&labels);
        // The program may do anything with odd tensors; its refusal is not a panic.
        for (what, odd) in super::cases::odd_tensors(&x) {
            cases.once("TorchScript::forward", &what, || {
                outcome(script.forward(&odd, &times, conditioning))
            });
        }
        for (what, odd) in super::cases::odd_tensors(&times) {
            cases.once("TorchScript::forward", &what, || {
                outcome(script.forward(&x, &odd, conditioning))
            });
        }
        cases.once("TorchScript::save", "a folder", || outcome(script.save("/")));
        cases.once("TorchScript::set_training", "on", || outcome(script.set_training(true)));
    }
}

/// Devices and kinds that are not there.
fn placements(cases: &mut Cases) {
    for device in [Device::Cuda(0), Device::Mps, Device::Vulkan] {
        let place = Placement { device, ..placement() };
        let what = format!("{device:?}");
        cases.once("NetworkConfig::build", &what, || outcome(MlpConfig::default().build(place, 0)));
        cases.once("Model::from_folder", &what, || {
            outcome(Model::from_folder(golden("unet_unconditional"), place, UnknownKeys::Refuse))
        });
    }
    for kind in [Kind::Int64, Kind::Bool, Kind::ComplexFloat, Kind::QInt8, Kind::Half] {
        let place = Placement { kind, channels_last: true, ..placement() };
        let what = format!("{kind:?}");
        cases.once("NetworkConfig::build", &what, || outcome(MlpConfig::default().build(place, 0)));
        cases.once("Model::from_folder", &what, || {
            outcome(Model::from_folder(golden("unet_unconditional"), place, UnknownKeys::Refuse))
        });
    }
}

fn folders(cases: &mut Cases) {
    for text in ["", "[]", "null", r#"{"dim": "wide", "": 1}"#, r#"{"_class_name": []}"#] {
        for keys in [UnknownKeys::Refuse, UnknownKeys::Ignore] {
            cases.once("NetworkConfig::from_json", text, || {
                outcome(MlpConfig::from_json(text, keys))
            });
            cases.once("NetworkConfig::from_json", text, || {
                outcome(ClipConfig::from_json(text, keys))
            });
        }
    }
    let (place, keys) = (placement(), UnknownKeys::Refuse);
    for path in ["", "/", "/nowhere/at/all", "nul\0byte"] {
        for variant in [None, Some("../x"), Some("")] {
            cases.once("Model::from_folder_variant", path, || {
                outcome(Model::from_folder_variant(path, variant, place, keys))
            });
        }
        cases.once("ModelConfig::from_file", path, || outcome(ModelConfig::from_file(path, keys)));
        cases
            .once("ClipTokenizer::from_folder", path, || outcome(ClipTokenizer::from_folder(path)));
        let model =
            || MlpConfig::default().build(place, 0).map(Model::Mlp).map_err(|e| e.to_string());
        cases.once("WeightFiles::of_transformers", path, || {
            outcome(weights::WeightFiles::of_transformers(path))
        });
        cases.once("Model::save_to_folder", path, || {
            // The current folder is one too.
            if path.is_empty() {
                Ok(())
            } else {
                outcome(model()?.save_to_folder(Path::new(path).join("x\0")))
            }
        });
    }
    cases.corrupted_in_inputs(&[
        "AutoencoderKL::from_folder",
        "AutoencoderKL::save_to_folder",
        "ModelConfig::foreign_keys",
        "ModelConfig::read_weights",
        "ClipModel::from_folder",
        "ClipTextModel::from_folder",
        "ClipTextModel::save_to_folder",
        "ClipVisionModel::from_folder",
        "ClipVisionModel::save_to_folder",
        "Dinov2Model::from_folder",
        "Dinov2Model::save_to_folder",
        "NetworkConfig::from_file",
        "NetworkConfig::build_from",
    ]);
}
