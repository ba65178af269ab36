//! Reference sets in files, ours and those of pytorch-fid and clean-fid.

use std::path::{Path, PathBuf};

use ddil_metrics::{
    Error, FeatureExtractor, ImageInput, RawPixels, Reference, Statistics, frechet_distance,
};
use safetensors::SafeTensors;
use tch::{Tensor, kind};

use crate::{assert_close, normal};

type TestResult = Result<(), Box<dyn std::error::Error>>;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/metrics/pytorch_fid.npz")
}

#[test]
fn a_reference_comes_back() -> TestResult {
    let folder = tempfile::tempdir()?;
    let extractor = RawPixels::new([1, 1, 3]);
    let features = normal(2, 40, 3);
    let whole = Reference::new("set/train", &features, &extractor)?;
    let statistics = whole.statistics().clone();
    let small = Reference::from_statistics("set/train", statistics, &extractor);
    for (reference, has_features) in [(&whole, true), (&small, false)] {
        let path = folder.path().join("reference.safetensors");
        reference.write(&path)?;
        let read = Reference::from_file(&path)?;
        assert_eq!((read.name(), read.extractor()), ("set/train", Some(extractor.id())));
        // To the bit: a distance does not depend on whether the statistics were stored.
        assert_eq!(read.statistics(), reference.statistics());
        assert_eq!(read.statistics().num_samples(), Some(40));
        assert_eq!(read.features(), reference.features());
        assert_eq!(read.features().is_some(), has_features);
        read.ensure_extractor(&extractor)?;
    }
    Ok(())
}

/// Recorded with numpy: `np.savez_compressed(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False))`, 50 rows of three.
#[test]
fn statistics_of_pytorch_fid_are_read() -> TestResult {
    let reference = Reference::from_file(golden())?;
    let statistics = reference.statistics();
    assert_eq!((statistics.dim(), statistics.num_samples()), (3, None));
    assert_eq!((reference.name(), reference.extractor()), ("pytorch_fid.npz", None));
    assert_close(statistics.mean()[0], 0.087_543_424_327_151_01, 1e-14);
    assert_close(statistics.covariance()[1], -0.004_901_263_388_330_107, 1e-14);
    assert_eq!(statistics.covariance()[1], statistics.covariance()[3]);
    assert_close(frechet_distance(statistics, statistics)?, 0.0, 1e-12);
    // It can be written as our own.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("own.safetensors");
    reference.write(&path)?;
    assert_eq!(Reference::from_file(&path)?.statistics(), statistics);
    Ok(())
}

#[test]
fn another_extractor_is_refused() -> TestResult {
    let reference = Reference::new("set", &normal(0, 9, 3), &RawPixels::new([1, 1, 3]))?;
    let error = reference.ensure_extractor(&RawPixels::new([1, 3, 1])).expect_err("another shape");
    let text = error.to_string();
    for part in ["`set`", "network", "raw-pixels-1x1x3", "raw-pixels-1x3x1"] {
        assert!(text.contains(part), "{text}");
    }
    // A file without a network's name is compared by its number of features alone.
    let file = Reference::from_file(golden())?;
    file.ensure_extractor(&RawPixels::new([1, 3, 1]))?;
    let error = file.ensure_extractor(&RawPixels::new([1, 2, 2])).expect_err("four features");
    assert!(error.to_string().contains("number of features"), "{error}");
    Ok(())
}

/// Features of a network with two outputs.
#[derive(Debug)]
struct WithOutput(RawPixels, &'static str);

impl FeatureExtractor for WithOutput {
    fn input(&self) -> &ImageInput {
        self.0.input()
    }

    fn extract(&self, prepared: &Tensor) -> ddil_metrics::Result<Tensor> {
        self.0.extract(prepared)
    }

    fn id(&self) -> &str {
        self.0.id()
    }

    fn variant(&self) -> &str {
        self.1
    }

    fn dim(&self) -> i64 {
        self.0.dim()
    }
}

#[test]
fn another_output_of_the_same_network_is_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("reference.safetensors");
    let [first, second] =
        ["", "return_features"].map(|output| WithOutput(RawPixels::new([1, 1, 3]), output));
    for (own, other) in [(&first, &second), (&second, &first)] {
        Reference::new("set", &normal(0, 9, 3), own)?.write(&path)?;
        let read = Reference::from_file(&path)?;
        read.ensure_extractor(own)?;
        let text = read.ensure_extractor(other).expect_err("another output").to_string();
        for part in ["variant", "none", "`return_features`"] {
            assert!(text.contains(part), "{text}");
        }
    }
    // A file of an earlier version does not contain it, and is compared with both.
    let bytes = std::fs::read(&path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let mut metadata = header.metadata().clone().ok_or("it has metadata")?;
    assert_eq!(metadata.remove("variant").as_deref(), Some("return_features"));
    let tensors = SafeTensors::deserialize(&bytes)?.tensors();
    std::fs::write(&path, safetensors::serialize(tensors, Some(metadata))?)?;
    let old = Reference::from_file(&path)?;
    old.ensure_extractor(&first)?;
    old.ensure_extractor(&second)?;
    // Nothing is made up when it is written again.
    let again = folder.path().join("again.safetensors");
    old.write(&again)?;
    Reference::from_file(&again)?.ensure_extractor(&first)?;
    Ok(())
}

#[test]
fn bad_files() -> TestResult {
    let folder = tempfile::tempdir()?;
    let refused = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("the folder can be written");
        let error = Reference::from_file(&path).expect_err("a bad file");
        let text = error.to_string();
        assert!(text.contains(name) || matches!(error, Error::NonFinite { .. }), "{text}");
        text
    };
    assert!(matches!(
        Reference::from_file(folder.path().join("none.npz")),
        Err(Error::ReadFile { .. })
    ));
    for name in ["noise.npz", "noise.safetensors"] {
        refused(name, b"not an archive");
        refused(name, b"");
    }
    let whole = std::fs::read(golden())?;
    refused("cut.npz", &whole[..whole.len() / 2]);
    let renamed = b"sigma.npy";
    let mut other = whole.clone();
    while let Some(at) = other.windows(9).position(|bytes| bytes == renamed) {
        other[at..at + 9].copy_from_slice(b"sIgma.npy");
    }
    let text = refused("other.npz", &other);
    assert!(text.contains("`sigma`") && text.contains("sIgma.npy"), "{text}");
    // Every byte of a damaged file leads to an error or to the same numbers, never to a panic.
    let good = Reference::from_file(golden())?;
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        let path = folder.path().join("damaged.npz");
        std::fs::write(&path, &damaged)?;
        if let Ok(read) = Reference::from_file(&path) {
            assert_eq!(read.statistics(), good.statistics(), "byte {at}");
        }
    }
    Ok(())
}

#[test]
fn statistics_that_cannot_be() {
    let refused = |n, mean: &[f64], covariance: &[f64]| {
        Statistics::from_parts(n, mean.to_vec(), covariance.to_vec())
            .expect_err("refused")
            .to_string()
    };
    assert!(refused(None, &[], &[]).contains("covariance"));
    assert!(refused(None, &[0.0, 1.0], &[1.0, 0.0, 0.0]).contains("square"));
    assert!(refused(Some(1), &[0.0], &[1.0]).contains("at least 2"));
    assert!(refused(None, &[f64::NAN], &[1.0]).contains("mean, covariance"));
    assert!(refused(None, &[0.0, 0.0], &[1.0, 0.5, -0.5, 1.0]).contains("symmetric"));
}

#[test]
fn a_reference_needs_two_samples() {
    let one = Tensor::zeros([1, 3], kind::FLOAT_CPU);
    let made = Reference::new("one", &one, &RawPixels::new([1, 1, 3]));
    assert!(matches!(made, Err(Error::TooFewSamples { .. })));
}
