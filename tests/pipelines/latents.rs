//! The encoding of images by a text-to-image model's autoencoder.

use std::path::Path;

use ddil_libtorch::Generator;
use ddil_models::{Placement, weights};
use ddil_pipelines::{Pipeline, Precision};
use ddil_tests::copy_folder;
use tch::{Device, Kind};

use crate::TestResult;

/// With a factor alone, with a shift, and with a mean and spread per channel.
#[test]
fn mean_and_spread_are_those_of_the_latents_that_are_drawn() -> TestResult {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    for name in ["autoencoder_sd", "autoencoder_shift", "autoencoder_statistics"] {
        let folder = tempfile::tempdir()?;
        copy_folder(&golden.join("pipelines/lcm"), folder.path())?;
        let vae = golden.join("models").join(name);
        copy_folder(&vae, &folder.path().join("vae"))?;
        let images = &weights::read_all(vae.join("expected.safetensors"))?["images"];
        let pipeline = Pipeline::open(folder.path(), Placement::default(), Precision::Float32)?;
        let parts = pipeline.parts.text_to_image(Placement::default())?;
        let [mean, std] = parts.latent_distribution(images)?;
        let noise = Generator::new(Device::Cpu, 7)?.normal(mean.size(), Kind::Float)?;
        let drawn = parts.encode_images(images, &mut Generator::new(Device::Cpu, 7)?)?;
        let error = (mean + std * noise - &drawn).abs().max() / drawn.abs().max();
        let error = error.double_value(&[]);
        assert!(error < 1e-6, "{name}: {error:e}");
    }
    Ok(())
}
