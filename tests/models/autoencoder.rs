//! `AutoencoderKL` against recorded outputs of diffusers, its old weight names, and its errors.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_libtorch::ArgumentError;
use ddil_libtorch::Generator;
use ddil_models::weights::{self, WeightFiles};
use ddil_models::{
    AutoencoderKL, AutoencoderKLConfig, DecoderBlockType, DiagonalGaussian, EncoderBlockType,
    Error, NetworkConfig, Placement, UnknownKeys,
};
use tch::{Device, Kind, Tensor, kind};
use tempfile::TempDir;

use crate::common::{TestResult, alone, golden, peak_memory, relative_error};

/// Folders that `tools/record/record_autoencoder.py` wrote.
const GOLDEN: [&str; 3] = ["autoencoder_sd", "autoencoder_shift", "autoencoder_statistics"];

/// Relative to the largest value, in `Float`.
const TOLERANCE: f64 = 1e-5;

fn load(folder: impl AsRef<Path>, placement: Placement) -> ddil_models::Result<AutoencoderKL> {
    AutoencoderKL::from_folder(folder, placement, UnknownKeys::Refuse, None)
}

fn expected(name: &str) -> ddil_models::Result<BTreeMap<String, Tensor>> {
    weights::read_all(golden(name).join("expected.safetensors"))
}

fn tiny() -> AutoencoderKLConfig {
    AutoencoderKLConfig {
        in_channels: 1,
        out_channels: 1,
        down_block_types: vec![EncoderBlockType::DownEncoderBlock2D; 2],
        up_block_types: vec![DecoderBlockType::UpDecoderBlock2D; 2],
        block_out_channels: vec![4, 8],
        latent_channels: 2,
        norm_num_groups: 2,
        ..AutoencoderKLConfig::default()
    }
}

#[test]
fn outputs_are_those_of_diffusers() -> TestResult {
    for channels_last in [false, true] {
        for name in GOLDEN {
            let vae = load(golden(name), Placement { channels_last, ..Placement::default() })?;
            assert_eq!(vae.renamed(), []);
            let recorded = expected(name)?;
            let latents = vae.encode(&recorded["images"])?;
            let mut generator = Generator::new(Device::Cpu, 7)?;
            let scaled = vae.scale(latents.mode())?;
            let outputs = [
                ("sample", latents.sample(&mut generator)?),
                ("kl", latents.kl()?),
                ("decoded", vae.decode(&recorded["mean"])?),
                ("decoded", vae.decode_scaled(&recorded["scaled"])?),
                ("mean", vae.unscale(&scaled)?),
                ("scaled", scaled),
                ("mean", latents.mean),
                ("logvar", latents.logvar),
            ];
            for (part, found) in &outputs {
                let error = relative_error(found, &recorded[*part]);
                println!("{name} {part}, channels last {channels_last}: {error:.1e}");
                assert!(error <= TOLERANCE, "{name} {part}: {error}");
            }
        }
    }
    Ok(())
}

/// Norm, and product with a fixed vector, of every parameter's gradient.
#[test]
fn gradients_are_those_of_diffusers() -> TestResult {
    for name in GOLDEN {
        let vae = load(golden(name), Placement::default())?;
        let recorded = expected(name)?;
        let mean = vae.encode(&recorded["images"])?.mean;
        vae.decode(&mean)?.square().sum(Kind::Float).backward();
        let norm_of = |summary: &Tensor| summary.double_value(&[0]);
        let summaries = recorded.iter().filter(|(key, _)| key.starts_with("grad."));
        let steepest = summaries.map(|(_, summary)| norm_of(summary)).fold(0.0, f64::max);
        let mut largest: f64 = 0.0;
        for (parameter, tensor) in vae.parameters().named() {
            let [norm, product] =
                Vec::<f64>::try_from(&recorded[&format!("grad.{parameter}")])?[..]
            else {
                panic!("two numbers")
            };
            let gradient = tensor.grad().to_kind(Kind::Double).flatten(0, -1);
            let vector = Tensor::arange(gradient.size()[0], kind::DOUBLE_CPU).cos();
            let found = [gradient.norm(), gradient.dot(&vector)].map(|x| x.double_value(&[]));
            // A bias of keys has no gradient, because softmax depends only on differences.
            let scale = norm.max(1e-4 * steepest);
            let error = (found[0] - norm).abs().max((found[1] - product).abs()) / scale;
            assert!(error <= 1e-3, "{name} {parameter}: {error}");
            largest = largest.max(error);
        }
        println!("{name}: largest error of a gradient {largest:.1e}");
    }
    Ok(())
}

#[test]
fn double_and_bfloat16_follow_the_placement() -> TestResult {
    for name in GOLDEN {
        let recorded = expected(name)?;
        for (kind, tolerance) in [(Kind::Double, TOLERANCE), (Kind::BFloat16, 2e-2)] {
            let vae = load(golden(name), Placement { kind, ..Placement::default() })?;
            assert_eq!(vae.parameters().placement().kind, kind);
            let latents = vae.encode(&recorded["images"].to_kind(kind))?;
            let decoded = vae.decode(&recorded["mean"].to_kind(kind))?;
            let outputs =
                [("mean", latents.mean), ("logvar", latents.logvar), ("decoded", decoded)];
            for (part, found) in &outputs {
                assert_eq!(found.kind(), kind);
                let found = found.to_kind(Kind::Float);
                let prefix = if kind == Kind::BFloat16 { "bfloat16." } else { "" };
                let same_kind = recorded[&format!("{prefix}{part}")].to_kind(Kind::Float);
                let error = relative_error(&found, &same_kind);
                let rounding = relative_error(&found, &recorded[*part]);
                println!("{name} {part} {kind:?}: {error:.1e}, to Float {rounding:.1e}");
                // diffusers itself in bfloat16 is 2.05e-2 from its output in Float.
                assert!(rounding <= 1.25 * tolerance, "{name} {part} {kind:?}: {rounding}");
                assert!(error <= tolerance, "{name} {part} {kind:?}: {error}");
            }
        }
    }
    Ok(())
}

/// Activations of 1e6 and more, which only `Float` can represent.
#[test]
fn half_is_computed_in_float_if_the_settings_request_it() -> TestResult {
    let half = Placement { kind: Kind::Half, ..Placement::default() };
    for (force_upcast, kind) in [(true, Kind::Float), (false, Kind::Half)] {
        let vae = AutoencoderKLConfig { force_upcast, ..tiny() }.build(half, 0)?;
        assert_eq!(vae.parameters().placement().kind, kind);
        assert_eq!(vae.parameters().get("quant_conv.bias").expect("it has one").kind(), kind);
        {
            let _no_grad = tch::no_grad_guard();
            for name in ["encoder.conv_in.weight", "decoder.conv_in.weight"] {
                let weight = vae.parameters().get(name).expect("it has one");
                let _ = weight.shallow_clone().fill_(3e4);
            }
        }
        let images = Tensor::ones([1, 1, 4, 4], (Kind::Half, Device::Cpu));
        let latents = Tensor::ones([1, 2, 2, 2], (Kind::Half, Device::Cpu));
        let mut generator = Generator::new(Device::Cpu, 0)?;
        let encoded = vae.encode_scaled(&images, &mut generator)?;
        for output in [encoded, vae.decode(&latents)?, vae.decode_scaled(&latents)?] {
            assert_eq!(output.kind(), Kind::Half);
            let finite = output.isfinite().all().int64_value(&[]) == 1;
            assert_eq!(finite, force_upcast);
        }
        assert_eq!(vae.encode(&images)?.mean.kind(), kind);
    }
    let placement = Placement { kind: Kind::BFloat16, ..Placement::default() };
    assert_eq!(tiny().build(placement, 0)?.parameters().placement().kind, Kind::BFloat16);
    Ok(())
}

#[test]
fn slices_give_what_the_batch_gives() -> TestResult {
    for channels_last in [false, true] {
        let name = "autoencoder_sd";
        let mut vae = load(golden(name), Placement { channels_last, ..Placement::default() })?;
        let recorded = expected(name)?;
        vae.set_sliced(true);
        let error = relative_error(&vae.encode(&recorded["images"])?.mean, &recorded["mean"]);
        assert!(error <= TOLERANCE, "{error}");
        let error = relative_error(&vae.decode(&recorded["mean"])?, &recorded["decoded"]);
        assert!(error <= TOLERANCE, "{error}");
    }
    Ok(())
}

/// Eight samples need 4 MiB a feature map, one needs half a MiB.
#[test]
#[cfg(target_os = "linux")]
fn slices_need_the_memory_of_one_sample() -> TestResult {
    alone("autoencoder::slices_need_the_memory_of_one_sample", || {
        let config = AutoencoderKLConfig {
            down_block_types: vec![EncoderBlockType::DownEncoderBlock2D],
            up_block_types: vec![DecoderBlockType::UpDecoderBlock2D],
            block_out_channels: vec![32],
            mid_block_add_attention: false,
            ..tiny()
        };
        let mut vae = config.build(Placement::default(), 0)?;
        let latents = Tensor::ones([8, 2, 64, 64], kind::FLOAT_CPU);
        let _no_grad = tch::no_grad_guard();
        vae.set_sliced(true);
        let _ = vae.decode(&latents.narrow(0, 0, 1))?;
        let start = peak_memory()?;
        let _ = vae.decode(&latents)?;
        let sliced = peak_memory()? - start;
        vae.set_sliced(false);
        let _ = vae.decode(&latents)?;
        let whole = peak_memory()? - start;
        println!("{} MiB and {} MiB", sliced >> 20, whole >> 20);
        assert!(sliced < 6 << 20 && whole > 16 << 20, "{sliced} {whole}");
        Ok(())
    })
}

#[test]
fn variances_are_kept_in_range() -> TestResult {
    let vae = tiny().build(Placement::default(), 0)?;
    let bias = vae.parameters().get("quant_conv.bias").expect("it has one").shallow_clone();
    for (value, limit) in [(1e3, 20.0), (-1e3, -30.0)] {
        {
            let _no_grad = tch::no_grad_guard();
            let _ = bias.shallow_clone().fill_(value);
        }
        let latents = vae.encode(&Tensor::zeros([1, 1, 2, 2], kind::FLOAT_CPU))?;
        assert_eq!(latents.logvar, Tensor::full([1, 2, 1, 1], limit, kind::FLOAT_CPU));
        assert!((latents.mean.mean(Kind::Float).double_value(&[]) - value).abs() < 10.0);
    }
    Ok(())
}

/// Against the closed form for mean 2 and deviation 3, and how both receive gradients.
#[test]
fn draws_follow_mean_and_variance() -> TestResult {
    let full = |value: f64| {
        Tensor::full([4, 1, 100, 100], value, kind::DOUBLE_CPU).set_requires_grad(true)
    };
    let gaussian = DiagonalGaussian { mean: full(2.0), logvar: full(9_f64.ln()) };
    let draw = gaussian.sample(&mut Generator::new(Device::Cpu, 3)?)?;
    let (std, mean) = draw.std_mean(true);
    assert!((mean.double_value(&[]) - 2.0).abs() < 0.05, "{mean:?}");
    assert!((std.double_value(&[]) - 3.0).abs() < 0.05, "{std:?}");
    let kl = gaussian.kl()?;
    let closed = 10_000.0 * 0.5 * (4.0 + 9.0 - 1.0 - 9_f64.ln());
    assert_eq!(kl.size(), [4]);
    assert!((kl.double_value(&[1]) / closed - 1.0).abs() < 1e-12);
    draw.sum(Kind::Double).backward();
    assert_eq!(gaussian.mean.grad(), Tensor::ones([4, 1, 100, 100], kind::DOUBLE_CPU));
    let expected = (draw.detach() - 2.0) / 2.0;
    assert!(relative_error(&gaussian.logvar.grad(), &expected) < 1e-12);
    Ok(())
}

/// What becomes of a tensor of a file.
type Change<'a> = &'a dyn Fn(&str, Tensor) -> Vec<(String, Tensor)>;

/// A folder with `autoencoder_sd`, every tensor of it changed.
fn write_changed(folder: &Path, change: Change<'_>) -> TestResult {
    let golden = golden("autoencoder_sd");
    fs::copy(golden.join("config.json"), folder.join("config.json"))?;
    let tensors = weights::read_all(golden.join("diffusion_pytorch_model.safetensors"))?;
    let tensors: Vec<_> =
        tensors.into_iter().flat_map(|(name, tensor)| change(&name, tensor)).collect();
    WeightFiles::DIFFUSION.save(&tensors, folder)?;
    Ok(())
}

fn old_name(name: &str) -> String {
    [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
        .iter()
        .fold(name.to_owned(), |name, (new, old)| name.replace(new, old))
}

#[test]
fn old_names_of_the_attention_are_read() -> TestResult {
    let recorded = expected("autoencoder_sd")?;
    for convolutions in [false, true] {
        let folder = TempDir::new()?;
        write_changed(folder.path(), &|name, tensor| {
            let old = old_name(name);
            let is_weight = old != name && name.ends_with("weight");
            let tensor =
                if is_weight && convolutions { tensor.unsqueeze(-1).unsqueeze(-1) } else { tensor };
            vec![(old, tensor)]
        })?;
        let vae = load(folder.path(), Placement::default())?;
        assert_eq!(vae.renamed().len(), 16);
        assert!(vae.renamed().contains(&(
            "decoder.mid_block.attentions.0.proj_attn.bias".to_owned(),
            "decoder.mid_block.attentions.0.to_out.0.bias".to_owned()
        )));
        assert_eq!(vae.encode(&recorded["images"])?.mean.size(), recorded["mean"].size());
        let error = relative_error(&vae.decode(&recorded["mean"])?, &recorded["decoded"]);
        assert!(error <= TOLERANCE, "{error}");
        // Wherever they are in the file, they also have the present names and shapes.
        let file = folder.path().join("diffusion_pytorch_model.safetensors");
        let read: BTreeMap<_, _> = vae.config().read_weights(file)?.into_iter().collect();
        assert_eq!(read, vae.parameters().named().into_iter().collect());

        vae.save_to_folder(folder.path())?;
        let again = load(folder.path(), Placement::default())?;
        assert_eq!(again.renamed(), []);
        assert_eq!(again.decode(&recorded["mean"])?, vae.decode(&recorded["mean"])?);
    }
    Ok(())
}

#[test]
fn other_names_and_shapes_are_not_guessed_at() {
    let problems = |change: Change<'_>| {
        let folder = TempDir::new().expect("a temporary folder");
        write_changed(folder.path(), change).expect("a folder to write to");
        match load(folder.path(), Placement::default()) {
            Err(Error::WeightsMismatch { problems, .. }) => problems,
            other => panic!("{other:?}"),
        }
    };
    // Both names for one parameter.
    let both = problems(&|name, tensor| {
        let old = old_name(name);
        let mut tensors = vec![(name.to_owned(), tensor.shallow_clone())];
        if old != name {
            tensors.push((old, tensor));
        }
        tensors
    });
    assert_eq!(both.unexpected.len(), 16);
    assert!(both.unexpected[0].contains("decoder.mid_block.attentions.0.key"));
    assert!(both.missing.is_empty() && both.misshapen.is_empty());
    // The shape of a convolution under the name of a linear layer, and a side that is not 1.
    let convolution = problems(&|name, tensor| {
        let tensor =
            if name.ends_with("to_q.weight") { tensor.view([12, 12, 1, 1]) } else { tensor };
        vec![(name.to_owned(), tensor)]
    });
    assert_eq!(convolution.misshapen.len(), 2);
    let wide = problems(&|name, tensor| {
        let old = old_name(name);
        let weight = old != name && name.ends_with("weight");
        vec![(old, if weight { tensor.view([12, 6, 2, 1]) } else { tensor })]
    });
    assert_eq!(wide.misshapen.len(), 8);
    assert_eq!(wide.misshapen[0].1, [12, 6, 2, 1]);
}

#[test]
fn folders_are_written_back_whole_in_shards_and_in_half() -> TestResult {
    let folder = TempDir::new()?;
    for name in GOLDEN {
        let vae = load(golden(name), Placement::default())?;
        let recorded = expected(name)?;
        let decoded = vae.decode(&recorded["mean"])?;
        let folder = folder.path().join(name);
        vae.save_to_folder(&folder)?;
        assert_eq!(load(&folder, Placement::default())?.config(), vae.config());
        let files = WeightFiles::DIFFUSION;
        let index = files.save_sharded(&vae.parameters().named(), &folder, 30_000)?;
        assert!(index.ends_with("diffusion_pytorch_model.safetensors.index.json"));
        let again = load(&folder, Placement::default())?;
        assert_eq!(again.decode(&recorded["mean"])?, decoded);

        let halves: Vec<_> = vae.parameters().named();
        let halves: Vec<_> =
            halves.into_iter().map(|(name, t)| (name, t.to_kind(Kind::Half))).collect();
        let files = WeightFiles { variant: Some("fp16"), ..files };
        files.save(&halves, &folder)?;
        let variant = Some("fp16");
        let half = AutoencoderKL::from_folder(
            &folder,
            Placement::default(),
            UnknownKeys::Refuse,
            variant,
        )?;
        let error = relative_error(&half.decode(&recorded["mean"])?, &decoded);
        assert!(error > 0.0 && error < 1e-2, "{name}: {error}");
    }
    Ok(())
}

/// For an empty file every parameter is reported as missing.
#[test]
fn the_published_networks_have_their_parameters() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("empty.safetensors");
    weights::save(&[], &path, &BTreeMap::new())?;
    for config in [AutoencoderKLConfig::sd15(), AutoencoderKLConfig::sdxl()] {
        let Err(Error::WeightsMismatch { problems, .. }) =
            config.build_from(Placement::default(), &path)
        else {
            panic!("nothing in the file")
        };
        assert_eq!(problems.missing.len(), 248);
        for name in [
            "encoder.conv_in.weight",
            "encoder.down_blocks.0.resnets.0.norm1.weight",
            "encoder.down_blocks.0.downsamplers.0.conv.weight",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            "encoder.mid_block.attentions.0.to_out.0.weight",
            "encoder.mid_block.attentions.0.group_norm.bias",
            "encoder.mid_block.resnets.1.conv2.bias",
            "encoder.conv_norm_out.weight",
            "quant_conv.weight",
            "post_quant_conv.bias",
            "decoder.up_blocks.2.resnets.2.conv1.weight",
            "decoder.up_blocks.2.upsamplers.0.conv.weight",
            "decoder.conv_out.bias",
        ] {
            assert!(problems.missing.iter().any(|missing| missing == name), "{name}");
        }
    }
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused() -> TestResult {
    let vae = tiny().build(Placement::default(), 0)?;
    let zeros = |shape: &[i64]| Tensor::zeros(shape, kind::FLOAT_CPU);
    for shape in
        [&[1, 1, 4][..], &[1, 2, 4, 4], &[1, 1, 5, 4], &[1, 1, 4, 3], &[1, 1, 0, 4], &[0, 1, 4, 4]]
    {
        let error = vae.encode(&zeros(shape)).expect_err("it does not fit").to_string();
        assert!(error.contains("`images`") && error.contains("multiples of 2"), "{error}");
    }
    for shape in [&[1, 2, 4][..], &[1, 3, 4, 4], &[1, 2, 0, 4], &[0, 2, 4, 4]] {
        for result in [
            vae.decode(&zeros(shape)),
            vae.decode_scaled(&zeros(shape)),
            vae.scale(&zeros(shape)),
            vae.unscale(&zeros(shape)),
        ] {
            let error = result.expect_err("it does not fit").to_string();
            assert!(error.contains("`latents`") && error.contains("[batch, 2,"), "{error}");
        }
    }
    let integers = Tensor::zeros([1, 2, 4, 4], kind::INT64_CPU);
    assert!(matches!(
        vae.decode(&integers),
        Err(Error::Argument(ArgumentError::Kind { name: "latents", .. }))
    ));
    let error = vae.encode(&integers.narrow(1, 0, 1));
    assert!(matches!(error, Err(Error::Argument(ArgumentError::Kind { name: "images", .. }))));
    // Another kind than the parameters: libtorch's reason, not its stack trace.
    let doubles = zeros(&[1, 2, 4, 4]).to_kind(Kind::Double);
    let error = vae.decode(&doubles).expect_err("another kind").to_string();
    assert!(error.starts_with("AutoencoderKL::decode: ") && !error.contains('\n'), "{error}");
    let gaussian = DiagonalGaussian { mean: zeros(&[2, 3]), logvar: zeros(&[2, 4]) };
    assert!(matches!(gaussian.kl(), Err(Error::Torch { .. })));
    let drawn = gaussian.sample(&mut Generator::new(Device::Cpu, 0)?);
    assert!(matches!(drawn, Err(Error::Torch { .. })));
    Ok(())
}

/// Then `tools/record/record_autoencoder.py --check` loads every folder in diffusers.
#[test]
#[ignore = "needs DDIL_WRITE_MODELS, a folder to write networks to"]
fn write_folders_for_diffusers() -> TestResult {
    let root = std::path::PathBuf::from(std::env::var("DDIL_WRITE_MODELS")?);
    for name in GOLDEN {
        // Fresh parameters: nothing that diffusers wrote is left in the folder.
        let vae = load(golden(name), Placement::default())?;
        let vae = vae.config().build(Placement::default(), 1)?;
        let images = expected(name)?.remove("images").expect("it was recorded");
        let DiagonalGaussian { mean, logvar } = vae.encode(&images)?;
        let recorded = [
            ("scaled".to_owned(), vae.scale(&mean)?),
            ("decoded".to_owned(), vae.decode(&mean)?),
            ("images".to_owned(), images),
            ("mean".to_owned(), mean),
            ("logvar".to_owned(), logvar),
        ];
        for (folder, variant, max_shard_bytes) in [
            ("whole", None, u64::MAX),
            ("sharded", None, 30_000),
            ("variant", Some("fp16"), u64::MAX),
            ("sharded_variant", Some("fp16"), 30_000),
        ] {
            let folder = root.join(format!("{name}_{folder}"));
            vae.save_to_folder(&folder)?;
            fs::remove_file(folder.join("diffusion_pytorch_model.safetensors"))?;
            let files = WeightFiles { variant, ..WeightFiles::DIFFUSION };
            files.save_sharded(&vae.parameters().named(), &folder, max_shard_bytes)?;
            let path = folder.join("expected.safetensors");
            weights::save(&recorded, path, &BTreeMap::default())?;
        }
    }
    Ok(())
}
