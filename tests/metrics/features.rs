//! Feature extractors other than the classifier, and quantisation.

use ddil_libtorch::ArgumentError;
use ddil_metrics::{
    Error, FeatureExtractor, ImageInput, PixelRange, RawPixels, Resize, TorchScriptExtractor,
    TorchScriptOptions, quantize,
};
use proptest::prelude::*;
use tch::{CModule, Device, Kind, Tensor, kind};

/// A TorchScript file of a function of one image batch, traced here.
fn traced(folder: &tempfile::TempDir, forward: fn(&Tensor) -> Tensor) -> std::path::PathBuf {
    let path = folder.path().join("network.pt");
    let mut closure = |inputs: &[Tensor]| vec![forward(&inputs[0])];
    let images = Tensor::ones([2, 3, 4, 4], kind::FLOAT_CPU);
    CModule::create_by_tracing("network", "forward", &[images], &mut closure)
        .and_then(|module| module.save(&path))
        .expect("the folder can be written");
    path
}

fn channel_means(images: &Tensor) -> Tensor {
    images.mean_dim([2_i64, 3].as_slice(), false, Kind::Float)
}

fn options() -> TorchScriptOptions {
    with(|options| options.dim = Some(3))
}

fn with(change: impl FnOnce(&mut TorchScriptOptions)) -> TorchScriptOptions {
    let mut options = TorchScriptOptions::default();
    change(&mut options);
    options
}

#[test]
fn raw_pixels_are_the_pixels() -> ddil_metrics::Result<()> {
    let pixels = RawPixels::new([3, 2, 2]);
    let images = Tensor::arange(24, kind::FLOAT_CPU).view([2, 3, 2, 2]);
    assert_eq!(pixels.features(&images)?, images.view([2, 12]));
    assert_eq!((pixels.dim(), pixels.id()), (12, "raw-pixels-3x2x2"));
    assert_eq!(pixels.input(), &ImageInput::unchanged(3));
    for bad in [images.view([3, 2, 2, 2]), images.view([6, 2, 2])] {
        assert!(matches!(pixels.features(&bad), Err(Error::Argument(ArgumentError::Shape { .. }))));
    }
    Ok(())
}

#[test]
fn a_torch_script_network_receives_its_pixel_range() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = traced(&folder, channel_means);
    let images = Tensor::full([300, 1, 4, 4], 0.5, kind::FLOAT_CPU);
    for (range, expected) in
        [(PixelRange::SignedUnit, 0.5), (PixelRange::Unit, 0.75), (PixelRange::Byte, 191.25)]
    {
        let options = with(|options| {
            (options.dim, options.input.range) = (Some(3), range);
        });
        let network = TorchScriptExtractor::from_file(&path, options, Device::Cpu)?;
        let features = network.features(&images)?;
        // Grey images were repeated to three channels, and 300 are more than one batch.
        assert_eq!(features.size(), [300, 3]);
        assert_eq!(features.min().double_value(&[]), expected);
        assert_eq!(features.max().double_value(&[]), expected);
        assert!(network.id().starts_with("network-") && network.id().len() == 8 + 64);
    }
    Ok(())
}

#[test]
fn resized_images_keep_flat_areas_and_range() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = traced(&folder, channel_means);
    for (resize, mode) in [
        (Resize::Bicubic([6, 5]), "bicubic-antialias-6x5"),
        (Resize::Bilinear([6, 5]), "bilinear-6x5"),
        (Resize::BilinearTf1([6, 5]), "bilinear-tf1-6x5"),
        (Resize::BicubicCrop { side: 7, crop: 5 }, "bicubic-antialias-7-crop-5"),
    ] {
        // Without a number of features: a black image is enough to find it.
        let options = with(|options| options.input.resize = resize);
        let network = TorchScriptExtractor::from_file(&path, options, Device::Cpu)?;
        let features = network.features(&Tensor::full([1, 3, 9, 9], -1.0, kind::FLOAT_CPU))?;
        assert!((features + 1.0).abs().max().double_value(&[]) < 1e-6);
        assert_eq!((network.dim(), network.input().resize.to_string().as_str()), (3, mode));
    }
    Ok(())
}

#[test]
fn bad_networks() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let open = |path: &std::path::Path, options| {
        TorchScriptExtractor::from_file(path, options, Device::Cpu)
    };
    let absent = folder.path().join("absent.pt");
    assert!(
        matches!(open(&absent, options()), Err(Error::ReadFile { path, .. }) if path == absent)
    );
    let damaged = folder.path().join("damaged.pt");
    std::fs::write(&damaged, b"not a network")?;
    assert!(matches!(open(&damaged, options()), Err(Error::LoadNetwork { .. })));

    let path = traced(&folder, channel_means);
    let mut claims = std::fs::read(&path)?;
    let entry = claims.windows(4).rposition(|bytes| bytes == b"PK\x01\x02").expect("a record");
    claims[entry + 20..entry + 28].fill(0x7f);
    std::fs::write(&damaged, claims)?;
    let said = open(&damaged, options()).expect_err("it is not there").to_string();
    assert!(said.contains("damaged.pt") && said.contains("2139062143 bytes"), "{said}");
    for bad_dim in [Some(0), None] {
        let no_features = with(|options| options.dim = bad_dim);
        let error = open(&path, no_features).expect_err("there must be a feature");
        assert!(error.invalid().is_some_and(|invalid| invalid.field == "dim"), "{error}");
    }
    let wrong_dim = open(&path, with(|options| options.dim = Some(4)))?;
    let images = Tensor::zeros([2, 3, 4, 4], kind::FLOAT_CPU);
    assert!(
        matches!(wrong_dim.features(&images), Err(Error::NotATensor { dim, .. }) if dim == "4")
    );
    let wants_more =
        open(&path, with(|options| (options.dim, options.return_features) = (Some(3), true)))?;
    let error = wants_more.features(&images).expect_err("the network takes one argument");
    assert!(!error.to_string().contains('\n'), "no backtrace: {error}");
    assert!(matches!(
        open(&path, options())?.features(&Tensor::zeros([2, 2, 4, 4], kind::FLOAT_CPU)),
        Err(Error::Argument(ArgumentError::Shape { .. }))
    ));
    Ok(())
}

proptest! {
    /// Quantised images are within half a level, have 256 levels, and stay as they are from then on.
    #[test]
    fn quantising_twice_is_quantising_once(value in -1.0_f32..1.0) {
        let image = Tensor::from_slice(&[value]);
        let stored = quantize(&image).expect("it holds numbers");
        prop_assert!((&stored - image).abs().double_value(&[0]) <= 1.0 / 255.0 + 1e-6);
        let level = (stored.double_value(&[0]) + 1.0) * 127.5;
        prop_assert!((level - level.round()).abs() < 1e-4);
        prop_assert_eq!(&quantize(&stored).expect("so does this"), &stored);
    }
}

/// Each of the 256 levels, as a data set scales them, comes back bit for bit.
#[test]
fn every_level_survives() {
    let levels = Tensor::arange(256, kind::FLOAT_CPU) / 127.5 - 1.0;
    assert_eq!(quantize(&levels).expect("it holds numbers"), levels);
    let beyond = quantize(&Tensor::from_slice(&[-7.0_f32, 7.0])).expect("it holds numbers");
    assert_eq!(beyond, Tensor::from_slice(&[-1.0_f32, 1.0]));
}
