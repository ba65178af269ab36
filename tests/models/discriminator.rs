//! `DiscriminatorHead` and `NetworkDiscriminator`.

use std::rc::Rc;

use ddil_core::{Conditioning, Denoiser, Discriminator};
use ddil_libtorch::ArgumentError;
use ddil_models::{
    DiscriminatorHead, DiscriminatorHeadConfig, Error, MlpConfig, Model, ModelConfig,
    NetworkConfig, NetworkDenoiser, NetworkDiscriminator, Parameters, Placement, SampleSize,
    UNet2DConditionConfig, UNet2DConfig, UnknownKeys, weights,
};
use ddil_schedulers::{NoiseScheduleConfig, PredictionType};
use tch::{Kind, Tensor, kind};
use tempfile::TempDir;

use crate::common::{TestResult, golden, relative_error};

fn config(in_channels: u32, side: u32) -> DiscriminatorHeadConfig {
    DiscriminatorHeadConfig { in_channels, side, ..DiscriminatorHeadConfig::default() }
}

fn build(config: &DiscriminatorHeadConfig) -> ddil_models::Result<DiscriminatorHead> {
    config.build(Placement::default(), 0)
}

fn load(name: &str) -> ddil_models::Result<Model> {
    Model::from_folder(golden(name), Placement::default(), UnknownKeys::Refuse)
}

fn names(parameters: &Parameters) -> Vec<(String, Vec<i64>)> {
    parameters.named().into_iter().map(|(name, tensor)| (name, tensor.size())).collect()
}

fn has_gradient(tensor: &Tensor) -> bool {
    tensor.grad().defined() && tensor.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0
}

/// Stable Diffusion 1.5 in small: conv s2, conv over the whole map, conv 1x1.
#[test]
fn a_head_is_its_formula() -> TestResult {
    let settings =
        DiscriminatorHeadConfig { width: Some(16), norm_num_groups: Some(2), ..config(12, 8) };
    let head = settings.build(Placement { kind: Kind::Double, ..Placement::default() }, 0)?;
    let get = |name: &str| head.parameters().get(name).expect("it is there");
    {
        let _no_grad = tch::no_grad_guard();
        for name in ["blocks.0.norm.weight", "blocks.1.norm.bias"] {
            let _ = get(name).shallow_clone().normal_(0.0, 1.0);
        }
    }
    let block = |x: &Tensor, i: usize, stride: i64, padding: i64| {
        let get = |name: &str| get(&format!("blocks.{i}.{name}"));
        x.conv2d(get("conv.weight"), Some(get("conv.bias")), stride, padding, 1, 1)
            .group_norm(2, Some(get("norm.weight")), Some(get("norm.bias")), 1e-5, false)
            .silu()
    };
    let features = Tensor::randn([3, 12, 8, 8], kind::DOUBLE_CPU);
    let hidden = block(&block(&features, 0, 2, 1), 1, 4, 0);
    assert_eq!(hidden.size(), [3, 16, 1, 1]);
    let expected = hidden
        .view([3, 16])
        .linear(&get("conv_out.weight").view([1, 16]), Some(get("conv_out.bias")));
    let found = head.forward(&features)?;
    assert_eq!(found.size(), [3]);
    assert!(relative_error(&found, &expected.view([3])) < 1e-9);
    // Samples do not affect each other.
    assert!(
        relative_error(&head.forward(&features.narrow(0, 1, 1))?, &found.narrow(0, 1, 1)) < 1e-9
    );
    Ok(())
}

#[test]
fn names_and_sizes_match_the_files() -> TestResult {
    let kernels = |side| -> ddil_models::Result<Vec<Vec<i64>>> {
        let named = names(build(&config(8, side))?.parameters());
        Ok(named.into_iter().filter(|(n, _)| n.ends_with("conv.weight")).map(|(_, s)| s).collect())
    };
    assert_eq!(kernels(4)?, [[8, 8, 4, 4]]);
    assert_eq!(kernels(8)?, [[8, 8, 4, 4]; 2]);
    assert_eq!(kernels(32)?, [[8, 8, 4, 4]; 4]);
    assert_eq!(kernels(7)?, [[8, 8, 4, 4], [8, 8, 3, 3]]);
    assert_eq!(kernels(2)?, [[8, 8, 2, 2]]);
    assert_eq!(kernels(1)?, [[8, 8, 1, 1]]);
    let found: Vec<_> = names(build(&config(8, 4))?.parameters());
    let found: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
    let expected = ["conv.weight", "conv.bias", "norm.weight", "norm.bias"];
    assert_eq!(found[..4], expected.map(|name| format!("blocks.0.{name}")));
    assert_eq!(found[4..], ["conv_out.weight", "conv_out.bias"]);
    Ok(())
}

#[test]
fn a_head_fits_the_unet_it_is_made_for() -> TestResult {
    let for_unet = |sample_size| {
        let channels = vec![32, 32, 64, 96];
        let unet =
            UNet2DConfig { sample_size, block_out_channels: channels, ..UNet2DConfig::default() };
        DiscriminatorHeadConfig::for_model(&ModelConfig::UNet2D(unet))
    };
    let square = for_unet(Some(SampleSize::Square(32)))?;
    assert_eq!(square, config(96, 4));
    let same = for_unet(Some(SampleSize::Rectangle([32, 32])))?;
    assert_eq!(same, square);
    for sample_size in [
        None,
        Some(SampleSize::Square(28)),
        Some(SampleSize::Rectangle([32, 64])),
        Some(SampleSize::Square(0)),
    ] {
        let error = for_unet(sample_size);
        assert!(matches!(error, Err(Error::InvalidConfig { .. })), "{sample_size:?}: {error:?}");
    }
    let mlp = ModelConfig::Mlp(MlpConfig { hidden_widths: vec![24, 40], ..MlpConfig::default() });
    assert_eq!(DiscriminatorHeadConfig::for_model(&mlp)?, config(40, 1));
    let script = load("torch_script")?.config();
    let error = DiscriminatorHeadConfig::for_model(&script);
    assert!(matches!(error, Err(Error::NoFeatures { .. })));
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_head_within_the_bounds_of_torch() -> TestResult {
    let settings = config(16, 8);
    let (one, same) = (build(&settings)?, build(&settings)?);
    let other = settings.build(Placement::default(), 1)?;
    let name = "blocks.0.conv.weight";
    let weight = one.parameters().get(name).expect("it is there");
    assert_eq!(weight, same.parameters().get(name).expect("it is there"));
    assert_ne!(weight, other.parameters().get(name).expect("it is there"));
    let bound = 1.0 / f64::from(16 * 4 * 4).sqrt();
    let largest = weight.abs().max().double_value(&[]);
    assert!(largest <= bound && largest > 0.99 * bound, "{largest} and {bound}");
    Ok(())
}

#[test]
fn a_head_is_saved_and_read() -> TestResult {
    let head = build(&config(8, 4))?;
    let folder = TempDir::new()?;
    let [settings, weights] = ["config.json", "head.safetensors"].map(|f| folder.path().join(f));
    std::fs::write(&settings, head.config().to_json())?;
    head.parameters().save(&weights)?;
    let read = DiscriminatorHeadConfig::from_file(&settings, UnknownKeys::Refuse)?;
    let again = read.build_from(Placement::default(), &weights)?;
    let features = Tensor::randn([2, 8, 4, 4], kind::FLOAT_CPU);
    assert_eq!(again.forward(&features)?, head.forward(&features)?);
    Ok(())
}

#[test]
fn invalid_heads_and_features_are_refused() -> TestResult {
    let keys = |config: &DiscriminatorHeadConfig| match build(config) {
        Err(Error::InvalidConfig { problems, .. }) => {
            problems.into_iter().map(|p| p.field).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(keys(&config(0, 0)), ["in_channels", "side", "in_channels"]);
    assert_eq!(keys(&config(7, 4)), ["in_channels"]);
    assert_eq!(keys(&DiscriminatorHeadConfig { width: Some(4), ..config(64, 4) }), ["width"]);
    for groups in [0, 3, 16, 64] {
        let settings = DiscriminatorHeadConfig { norm_num_groups: Some(groups), ..config(64, 4) };
        assert_eq!(keys(&settings), ["norm_num_groups"], "{groups}");
    }

    let head = build(&config(8, 4))?;
    let features = Tensor::zeros([2, 8, 4, 4], kind::FLOAT_CPU);
    for wrong in [features.narrow(1, 0, 4), features.narrow(2, 0, 2), features.flatten(2, -1)] {
        let error = head.forward(&wrong);
        assert!(matches!(
            error,
            Err(Error::Argument(ArgumentError::Shape { name: "features", .. }))
        ));
    }
    let integers = head.forward(&features.to_kind(Kind::Int64));
    assert!(matches!(integers, Err(Error::Argument(ArgumentError::Kind { name: "features", .. }))));
    assert_eq!(head.forward(&features.narrow(0, 0, 0))?.size(), [0]);
    Ok(())
}

/// The last norm has a single pixel; its output must still depend on the features.
#[test]
fn a_norm_of_one_pixel_depends_on_its_input() -> TestResult {
    for channels in [8, 96] {
        let head = build(&config(channels, 1))?;
        let features = Tensor::randn([64, i64::from(channels)], kind::FLOAT_CPU);
        let features = features.set_requires_grad(true);
        let logits = head.forward(&features)?;
        assert!(logits.std(true).double_value(&[]) > 0.05, "{channels}");
        logits.sum(Kind::Float).backward();
        assert!(has_gradient(&features));
    }
    Ok(())
}

/// Who receives a gradient of the adversarial loss: head, the way down, the input; not the way up.
#[test]
fn a_discriminator_trains_head_and_trunk_and_a_frozen_one_its_input_alone() -> TestResult {
    let network = Rc::new(load("unet_class_labels")?);
    let settings = DiscriminatorHeadConfig { in_channels: 16, side: 4, ..Default::default() };
    let head = Rc::new(build(&settings)?);
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = NetworkDenoiser::new(Rc::clone(&network), PredictionType::Sample, schedule)?;
    let discriminator = NetworkDiscriminator::new(&denoiser, Rc::clone(&head))?;
    let x_t = Tensor::randn([3, 3, 8, 8], kind::FLOAT_CPU).set_requires_grad(true);
    let t = Tensor::from_slice(&[999_i64, 10, 500]);
    let conditioning = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 10, 4]));

    let logits = discriminator.logits(&x_t, &t, &conditioning)?;
    let features = network.features(&x_t, &t, &conditioning)?;
    assert_eq!(logits, head.forward(&features)?);
    logits.softplus().sum(Kind::Float).backward();
    assert!(has_gradient(&x_t));
    assert!(head.parameters().learned().iter().all(|(_, parameter)| has_gradient(parameter)));
    for (name, parameter) in network.parameters().learned() {
        let on_the_way_up = name.starts_with("up_blocks") || name.starts_with("conv_");
        let expected = !on_the_way_up || name.starts_with("conv_in");
        assert_eq!(parameter.grad().defined(), expected, "{name}");
    }
    assert!(has_gradient(network.parameters().get("conv_in.weight").expect("it has one")));

    let frozen = Rc::new(load("unet_class_labels")?);
    frozen.parameters().set_trainable(false);
    let head = Rc::new(build(&settings)?);
    head.parameters().set_trainable(false);
    let schedule = NoiseScheduleConfig::default().build()?;
    let x_t = x_t.copy().detach().set_requires_grad(true);
    let denoiser = NetworkDenoiser::new(Rc::clone(&frozen), PredictionType::Sample, schedule)?;
    let discriminator = NetworkDiscriminator::new(&denoiser, Rc::clone(&head))?;
    discriminator.logits(&x_t, &t, &conditioning)?.sum(Kind::Float).backward();
    assert!(has_gradient(&x_t));
    let parameters =
        [frozen.parameters(), head.parameters()].into_iter().flat_map(Parameters::named);
    assert!(parameters.into_iter().all(|(_, parameter)| !parameter.grad().defined()));
    Ok(())
}

/// One network under a denoiser and a discriminator, for vectors.
#[test]
fn a_fake_score_and_its_discriminator_are_one_network() -> TestResult {
    let config = MlpConfig { num_class_embeds: Some(2), ..MlpConfig::default() };
    let config = ModelConfig::Mlp(config);
    let network = Rc::new(config.build(Placement::default(), 0)?);
    let schedule = NoiseScheduleConfig::default().build()?;
    let score = NetworkDenoiser::new(Rc::clone(&network), PredictionType::Epsilon, schedule)?;
    let discriminator =
        NetworkDiscriminator::new(&score, build(&DiscriminatorHeadConfig::for_model(&config)?)?)?;
    let x_t = Tensor::randn([4, 2], kind::DOUBLE_CPU).set_requires_grad(true);
    let t = Tensor::from_slice(&[999_i64, 10, 500, 0]);
    let labels = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 1, 1, 0]));

    let logits = discriminator.logits(&x_t, &t, &labels)?;
    assert_eq!((logits.size(), logits.kind()), (vec![4], Kind::Double));
    let first = network.parameters().get("layers.0.weight").expect("it has one");
    let last = network.parameters().get("layers.3.weight").expect("it has one");
    logits.sum(Kind::Double).backward();
    assert!(has_gradient(&x_t) && has_gradient(first) && !last.grad().defined());
    let of_the_logits = first.grad().copy();
    score.predict(&x_t, &t, &labels)?.epsilon.square().sum(Kind::Double).backward();
    assert!(has_gradient(last));
    assert_ne!(first.grad(), of_the_logits);
    Ok(())
}

#[test]
fn mismatched_discriminators_are_refused() -> TestResult {
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = |name| -> Result<NetworkDenoiser, Error> {
        NetworkDenoiser::new(load(name)?, PredictionType::Sample, schedule.clone())
    };
    let network = denoiser("unet_class_labels")?;
    let other = Rc::new(build(&config(8, 4))?);
    let error = NetworkDiscriminator::new(&network, Rc::clone(&other));
    assert!(matches!(error, Err(Error::Argument(ArgumentError::Value { name: "head", .. }))));
    let error = NetworkDiscriminator::new(&denoiser("torch_script")?, other);
    assert!(matches!(error, Err(Error::NoFeatures { network: "TorchScript" })));

    let discriminator = NetworkDiscriminator::new(&network, build(&config(16, 4))?)?;
    let (x_t, t) = (Tensor::zeros([1, 3, 8, 8], kind::FLOAT_CPU), Tensor::from_slice(&[5_i64]));
    let untold = discriminator.logits(&x_t, &t, &Conditioning::none());
    let is_missing = |error| {
        matches!(error, Err(ddil_core::Error::ConditioningMissing { field: "class_labels", .. }))
    };
    assert!(is_missing(untold));
    let labels = Conditioning::class_labels(t.shallow_clone());
    let weight = labels.shallow_clone().with_guidance_weight(Tensor::ones([1], kind::FLOAT_CPU));
    let error = discriminator.logits(&x_t, &t, &weight).expect_err("no guidance weight");
    assert!(error.to_string().contains("Discriminator::logits"), "{error}");
    // A smaller sample than the head is made for.
    let small = discriminator.logits(&x_t.narrow(2, 0, 4), &t, &labels);
    assert!(matches!(small, Err(ddil_core::Error::Network { .. })));
    Ok(())
}

#[test]
fn a_text_conditioned_unet_has_features_for_a_head() -> TestResult {
    for (unet, channels, side) in [
        (UNet2DConditionConfig::sd15(), 1280, 8),
        (UNet2DConditionConfig::sdxl(), 1280, 32),
        (UNet2DConditionConfig::ssd_1b(), 1280, 32),
    ] {
        let head = DiscriminatorHeadConfig::for_model(&ModelConfig::UNet2DCondition(unet))?;
        assert_eq!((head.in_channels, head.side), (channels, side));
    }
    let name = "unet_condition_ssd1b";
    let recorded = weights::read_all(golden(name).join("expected.safetensors"))?;
    let network = load(name)?;
    let fields = network.conditioning_fields();
    let head = Rc::new(build(&DiscriminatorHeadConfig::for_model(&network.config())?)?);
    let schedule = NoiseScheduleConfig::default().build()?;
    let network = NetworkDenoiser::new(network, PredictionType::Sample, schedule)?;
    let discriminator = NetworkDiscriminator::new(&network, Rc::clone(&head))?;
    let parts = fields.iter().map(|field| ((*field).to_owned(), recorded[*field].shallow_clone()));
    let conditioning: Conditioning = parts.collect();
    let x_t = recorded["sample"].copy().set_requires_grad(true);
    let logits = discriminator.logits(&x_t, &recorded["timesteps"], &conditioning)?;
    assert!(relative_error(&logits, &head.forward(&recorded["features"])?) < 1e-4);
    logits.sum(Kind::Float).backward();
    assert!(has_gradient(&x_t));
    let error = discriminator.logits(&x_t, &recorded["timesteps"], &Conditioning::none());
    let field = "encoder_hidden_states";
    assert!(matches!(error,
        Err(ddil_core::Error::ConditioningMissing { field: f, .. }) if f == field));
    Ok(())
}
