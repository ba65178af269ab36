//! `Mlp`: its skip connection, its inputs, its names.

use ddil_core::GaussianMixture;
use ddil_libtorch::ArgumentError;
use ddil_models::{Error, Mlp, MlpConfig, NetworkConfig, Placement, SkipConfig};
use ddil_schedulers::NoiseScheduleConfig;
use tch::{Kind, Tensor, kind};

use crate::common::{TestResult, relative_error};

fn build(config: &MlpConfig) -> ddil_models::Result<Mlp> {
    config.build(Placement { kind: Kind::Double, ..Placement::default() }, 0)
}

fn with_skip(sigma_data: f64) -> MlpConfig {
    let skip = SkipConfig { sigma_data, schedule: NoiseScheduleConfig::default() };
    MlpConfig { skip: Some(skip), ..MlpConfig::default() }
}

/// With a network that returns zero, the skip connection alone is the exact denoiser of one centred Gaussian.
#[test]
fn the_skip_connection_is_the_denoiser_of_a_gaussian() -> TestResult {
    let mlp = build(&with_skip(0.7))?;
    {
        let _no_grad = tch::no_grad_guard();
        for (_, parameter) in mlp.parameters().named() {
            let _ = parameter.shallow_clone().zero_();
        }
    }
    let gaussian = GaussianMixture::new(&Tensor::zeros([1, 2], kind::DOUBLE_CPU), &[0.7], &[1.0])?;
    let x_t = Tensor::randn([4, 2], kind::DOUBLE_CPU);
    let timesteps = Tensor::from_slice(&[999_i64, 500, 10, 0]);
    let scales = NoiseScheduleConfig::default().build()?.scales_at(&timesteps, &x_t)?;
    let expected = gaussian.posterior(&x_t, &scales.alpha, &scales.sigma, None)?.x0;
    assert!(relative_error(&mlp.forward(&x_t, &timesteps, None, None)?, &expected) < 1e-12);
    Ok(())
}

/// The network's own share vanishes with the noise and is of the size of the data in pure noise.
#[test]
fn the_networks_share_grows_with_the_noise() -> TestResult {
    let mlp = build(&with_skip(0.5))?;
    let x_t = Tensor::from_slice(&[0.8, -1.1]).view([1, 2]);
    let first = mlp.forward(&x_t, &Tensor::from_slice(&[0_i64]), None, None)?;
    assert!(relative_error(&first, &x_t) < 0.1);
    let last = mlp.forward(&x_t, &Tensor::from_slice(&[999_i64]), None, None)?;
    assert!(last.abs().max().double_value(&[]) < 1.0);
    Ok(())
}

#[test]
fn the_output_depends_on_every_input() -> TestResult {
    let config =
        MlpConfig { num_class_embeds: Some(3), embed_guidance: true, ..MlpConfig::default() };
    let mlp = build(&config)?;
    let x_t = Tensor::randn([1, 2], kind::DOUBLE_CPU);
    let evaluate = |t: i64, label: i64, weight: f64| {
        let [t, label] = [t, label].map(|v| Tensor::from_slice(&[v]));
        mlp.forward(&x_t, &t, Some(&label), Some(&Tensor::from_slice(&[weight]))).expect("it fits")
    };
    let base = evaluate(500, 1, 2.0);
    assert_eq!(base, evaluate(500, 1, 2.0));
    for other in [evaluate(501, 1, 2.0), evaluate(500, 2, 2.0), evaluate(500, 1, 2.5)] {
        assert_ne!(base, other);
    }
    let image = mlp.forward(
        &x_t.view([1, 2, 1, 1]),
        &Tensor::from(500_i64),
        Some(&Tensor::from_slice(&[1_i64])),
        Some(&Tensor::from_slice(&[2.0])),
    )?;
    assert_eq!(image.size(), [1, 2, 1, 1]);
    assert_eq!(image.view([1, 2]), base);
    Ok(())
}

#[test]
fn names_and_sizes_match_the_files() -> TestResult {
    let config =
        MlpConfig { hidden_widths: vec![8, 6], num_class_embeds: Some(3), ..MlpConfig::default() };
    let named = build(&config)?.parameters().named();
    let found: Vec<_> = named.iter().map(|(name, t)| (name.as_str(), t.size())).collect();
    // Input, its sines and cosines at two octaves, timestep, class.
    let inputs = 2 * 5 + 32 + 16;
    let expected = [
        ("class_embedding.weight", vec![3, 16]),
        ("layers.0.weight", vec![8, inputs]),
        ("layers.0.bias", vec![8]),
        ("layers.1.weight", vec![6, 8]),
        ("layers.1.bias", vec![6]),
        ("layers.2.weight", vec![2, 6]),
        ("layers.2.bias", vec![2]),
    ];
    assert_eq!(found, expected);
    Ok(())
}

#[test]
fn gradients_reach_every_parameter() -> TestResult {
    let config = MlpConfig { num_class_embeds: Some(2), ..with_skip(0.5) };
    let mlp = build(&config)?;
    let x_t = Tensor::randn([4, 2], kind::DOUBLE_CPU);
    let (t, labels) =
        (Tensor::full([4], 500, kind::INT64_CPU), Tensor::from_slice(&[0_i64, 1, 0, 1]));
    mlp.forward(&x_t, &t, Some(&labels), None)?.square().sum(Kind::Double).backward();
    for (name, parameter) in mlp.parameters().learned() {
        assert!(parameter.grad().abs().sum(Kind::Double).double_value(&[]) > 0.0, "{name}");
    }
    Ok(())
}

/// 160 GB for one layer: whether the system provides them or not, the error is about the file's sizes.
#[test]
fn settings_beyond_memory_are_compared_with_the_file() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("weights.safetensors");
    let small = MlpConfig { hidden_widths: vec![8, 6], ..MlpConfig::default() };
    build(&small)?.parameters().save(&path)?;
    let large = MlpConfig { hidden_widths: vec![200_000, 200_000], ..MlpConfig::default() };
    let error = large.build_from(Placement::default(), &path).expect_err("it is another network");
    assert!(matches!(error, Error::WeightsMismatch { .. }), "{error}");
    assert!(error.to_string().contains("layers.1.weight"), "{error}");
    Ok(())
}

#[test]
fn mismatches_are_refused() -> TestResult {
    let config =
        MlpConfig { num_class_embeds: Some(3), embed_guidance: true, ..MlpConfig::default() };
    let mlp = build(&config)?;
    let (x, t) = (Tensor::zeros([2, 2], kind::DOUBLE_CPU), Tensor::full([2], 5, kind::INT64_CPU));
    let (labels, w) = (Tensor::from_slice(&[0_i64, 2]), Tensor::ones([2], kind::DOUBLE_CPU));
    let evaluate = |x: &Tensor, t: &Tensor, labels, w| mlp.forward(x, t, labels, w);
    assert!(evaluate(&x, &t, Some(&labels), Some(&w)).is_ok());
    let wide = Tensor::zeros([2, 3], kind::DOUBLE_CPU);
    assert!(matches!(
        evaluate(&wide, &t, Some(&labels), Some(&w)),
        Err(Error::Argument(ArgumentError::Shape { name: "x_t", .. }))
    ));
    assert!(matches!(
        evaluate(&x, &w.narrow(0, 0, 1), None, Some(&w)),
        Err(Error::MissingPart { part: "class_labels", .. })
    ));
    assert!(matches!(
        evaluate(&x, &t, Some(&labels), None),
        Err(Error::MissingPart { part: "guidance_weight", .. })
    ));
    let three = Tensor::from_slice(&[0_i64, 3]);
    assert!(matches!(
        evaluate(&x, &t, Some(&three), Some(&w)),
        Err(Error::ClassLabelOutOfRange { found: 3, max: 2, .. })
    ));
    let plain = build(&MlpConfig::default())?;
    assert!(matches!(
        plain.forward(&x, &t, None, Some(&w)),
        Err(Error::UnexpectedPart { part: "guidance_weight", .. })
    ));
    assert!(matches!(
        plain.forward(&x, &t, Some(&labels), None),
        Err(Error::UnexpectedPart { part: "class_labels", .. })
    ));
    // With a skip connection the timestep is looked up, so it must be on the grid's terms.
    assert!(build(&with_skip(0.5))?.forward(&x, &w, None, None).is_err());

    let config =
        MlpConfig { dim: 0, hidden_widths: vec![4, 0], time_features: 1, ..with_skip(-1.0) };
    let Err(Error::InvalidConfig { problems, .. }) = build(&config) else {
        panic!("four problems")
    };
    let keys: Vec<_> = problems.iter().map(|p| p.field.as_str()).collect();
    assert_eq!(keys, ["dim", "time_features", "hidden_widths[1]", "skip.sigma_data"]);
    Ok(())
}

/// Features are the input of the last layer, in the same graph.
#[test]
fn features_are_what_enters_the_last_layer() -> TestResult {
    let mlp = build(&MlpConfig { hidden_widths: vec![8, 6], ..MlpConfig::default() })?;
    let (x_t, t) =
        (Tensor::randn([4, 2], kind::DOUBLE_CPU), Tensor::full([4], 500, kind::INT64_CPU));
    let x_t = x_t.set_requires_grad(true);
    let pass = mlp.forward_with_features(&x_t, &t, None, None)?;
    assert_eq!(pass.features.size(), [4, 6]);
    let get = |name: &str| mlp.parameters().get(name).expect("it is there");
    let output = pass.features.linear(get("layers.2.weight"), Some(get("layers.2.bias")));
    assert!(relative_error(&pass.sample, &output) < 1e-12);
    assert_eq!(pass.sample, mlp.forward(&x_t, &t, None, None)?);

    pass.features.square().sum(Kind::Double).backward();
    assert!(x_t.grad().abs().sum(Kind::Double).double_value(&[]) > 0.0);
    assert!(get("layers.1.weight").grad().defined() && !get("layers.2.weight").grad().defined());
    Ok(())
}
