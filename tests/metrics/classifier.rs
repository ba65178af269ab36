//! The Fashion-MNIST classifier.

use ddil_libtorch::ArgumentError;
use ddil_metrics::{Error, FASHION_CLASSES, FashionClassifier, FeatureExtractor, ImageInput};
use tch::{Device, IndexOp, Kind, Tensor, kind};

fn images(seed: i64, n: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::rand([n, 1, 32, 32], kind::FLOAT_CPU) * 2.0 - 1.0
}

#[test]
fn the_bundled_weights_fit() -> ddil_metrics::Result<()> {
    let classifier = FashionClassifier::pretrained(Device::Cpu)?;
    let images = images(0, 3);
    let features = classifier.features(&images)?;
    assert_eq!((features.size(), features.kind()), (vec![3, classifier.dim()], Kind::Float));
    assert!(!features.requires_grad());
    let hash = classifier.id().strip_prefix("fashion-classifier-").expect("name and hash");
    assert_eq!(hash.len(), 64);
    let count: usize = classifier.variables().variables().values().map(Tensor::numel).sum();
    assert!((150_000..350_000).contains(&count), "{count}");
    Ok(())
}

/// The features of an image do not depend on its batch: neither on the other images nor on where batches are cut.
#[test]
fn each_image_for_itself() -> ddil_metrics::Result<()> {
    let classifier = FashionClassifier::pretrained(Device::Cpu)?;
    let images = images(1, 260);
    let together = classifier.features(&images)?;
    for i in [0, 100, 255, 256, 259] {
        let alone = classifier.features(&images.narrow(0, i, 1))?;
        let gap = (alone - together.narrow(0, i, 1)).abs().max().double_value(&[]);
        assert!(gap < 1e-4, "{i}: {gap}");
    }
    Ok(())
}

#[test]
fn weights_written_and_read_back() -> ddil_metrics::Result<()> {
    tch::manual_seed(2);
    let classifier = FashionClassifier::untrained(Device::Cpu)?;
    let bytes = classifier.to_bytes()?;
    assert!(bytes.len() < 1_500_000, "{}", bytes.len());
    let read = FashionClassifier::from_bytes(&bytes, Device::Cpu)?;
    assert_eq!(read.to_bytes()?, bytes);
    assert_ne!(read.id(), classifier.id());
    let images = images(3, 2);
    assert_eq!(read.logits(&images)?, classifier.logits(&images)?.detach());
    Ok(())
}

/// Classes of features are those of the images, also of features on which metrics were computed before.
#[test]
fn a_class_follows_from_features() -> ddil_metrics::Result<()> {
    let classifier = FashionClassifier::pretrained(Device::Cpu)?;
    let images = images(5, 40);
    let predictor = classifier.class_predictor().expect("it is a classifier");
    assert_eq!(predictor.class_names(), FASHION_CLASSES);
    let predicted = predictor.predict(&classifier.features(&images)?)?;
    assert_eq!(predicted, classifier.logits(&images)?.argmax(1, false));
    let stored = classifier.features(&images)?.to_kind(Kind::Double);
    assert_eq!(predictor.predict(&stored)?, predicted);

    let error = predictor.predict(&images.narrow(1, 0, 1)).expect_err("these are images");
    let Error::Argument(ArgumentError::Shape { expected, .. }) = error else { panic!("{error}") };
    assert_eq!(expected, "[n, 64]");
    Ok(())
}

#[test]
fn accuracy_counts_hits() -> ddil_metrics::Result<()> {
    let classifier = FashionClassifier::pretrained(Device::Cpu)?;
    let images = images(4, 5);
    let labels = classifier.logits(&images)?.argmax(1, false);
    assert_eq!(classifier.accuracy(&images, &labels)?, 1.0);
    let wrong = (&labels + 1).remainder(10);
    let two_wrong = Tensor::cat(&[wrong.i(..2), labels.i(2..)], 0);
    assert_eq!(classifier.accuracy(&images, &two_wrong)?, 0.6);
    Ok(())
}

#[test]
fn only_an_untrained_one_takes_gradients() -> ddil_metrics::Result<()> {
    let images = images(5, 2);
    assert!(FashionClassifier::untrained(Device::Cpu)?.logits(&images)?.requires_grad());
    assert!(!FashionClassifier::pretrained(Device::Cpu)?.logits(&images)?.requires_grad());
    Ok(())
}

#[test]
fn bad_images() -> ddil_metrics::Result<()> {
    let classifier = FashionClassifier::pretrained(Device::Cpu)?;
    for shape in [vec![1, 1, 28, 28], vec![1, 3, 32, 32], vec![1, 32, 32], vec![0, 1, 32, 32]] {
        let images = Tensor::zeros(&shape, kind::FLOAT_CPU);
        for refused in [classifier.features(&images), classifier.logits(&images)] {
            assert!(
                matches!(refused, Err(Error::Argument(ArgumentError::Shape { shape: found, .. })) if found == shape)
            );
        }
    }
    let labels = Tensor::zeros([2], kind::INT64_CPU);
    assert!(matches!(
        classifier.accuracy(&images(6, 3), &labels),
        Err(Error::Argument(ArgumentError::Shape { .. }))
    ));
    Ok(())
}

/// Smaller images are enlarged; those of 32x32 have the features that they have without it, bit for bit.
#[test]
fn images_of_another_size_are_enlarged() -> ddil_metrics::Result<()> {
    let classifier = || FashionClassifier::pretrained(Device::Cpu);
    let mut input = ImageInput::unchanged(1);
    input.resize = "bilinear-32x32".parse()?;
    let enlarging = classifier()?.with_input(input.clone())?;
    let own = images(7, 3);
    assert_eq!(enlarging.features(&own)?, classifier()?.features(&own)?);
    assert_eq!(enlarging.id(), classifier()?.id());

    let small = own.narrow(2, 0, 16).narrow(3, 0, 16);
    let large = small.upsample_bilinear2d([32, 32], false, None, None);
    assert_eq!(enlarging.features(&small)?, classifier()?.features(&large)?);

    let mut rgb = input.clone();
    rgb.channels = 3;
    input.resize = "bilinear-28x28".parse()?;
    for refused in [rgb, input] {
        assert!(matches!(classifier()?.with_input(refused), Err(Error::Invalid(_))));
    }
    Ok(())
}

/// Every difference between file and network is named, all in one message.
#[test]
fn bad_weights() -> Result<(), Box<dyn std::error::Error>> {
    let load = |bytes: &[u8]| FashionClassifier::from_bytes(bytes, Device::Cpu);
    assert!(matches!(load(b"no weights"), Err(Error::ReadWeights { .. })));
    let good = FashionClassifier::untrained(Device::Cpu)?.to_bytes()?;
    assert!(matches!(load(&good[..good.len() - 1]), Err(Error::ReadWeights { .. })));

    let weights = safetensors::SafeTensors::deserialize(&good)?;
    let bias = weights.tensor("head.bias")?;
    let half = [0_u8; 20];
    let half = safetensors::tensor::TensorView::new(safetensors::Dtype::F16, vec![10], &half)?;
    let mut tensors = weights.tensors();
    for (name, view) in &mut tensors {
        match name.as_str() {
            "head.weight" => *name = "tail.weight".to_owned(),
            "head.bias" => *view = half.clone(),
            "project.bias" => *view = bias.clone(),
            _ => {}
        }
    }
    let bytes = safetensors::serialize(tensors, None)?;
    let Err(Error::WeightsMismatch { missing, unexpected, misshapen }) = load(&bytes) else {
        return Err("the weights were taken".into());
    };
    assert_eq!((missing, unexpected), (vec!["head.weight".into()], vec!["tail.weight".into()]));
    assert_eq!(
        misshapen,
        ["head.bias: F16 [10], expected F32 [10]", "project.bias: F32 [10], expected F32 [64]"]
    );
    Ok(())
}

/// The documented accuracy, up to a few images that may be classified differently on another processor.
#[test]
#[ignore = "needs Fashion-MNIST: `make setup`"]
fn the_stated_accuracy() -> Result<(), Box<dyn std::error::Error>> {
    let test = ddil_data::FashionMnist::from_folder(None)?.test;
    let all = test.range(0, test.len())?;
    let labels = all.labels.ok_or("no labels")?;
    let accuracy = FashionClassifier::pretrained(Device::Cpu)?.accuracy(&all.x0, &labels)?;
    assert!((accuracy - 0.9196).abs() < 5e-4, "{accuracy}");

    let half = test.scaled([16, 16])?;
    let half = half.range(0, half.len())?.x0;
    let mut input = ImageInput::unchanged(1);
    input.resize = "bicubic-antialias-32x32".parse()?;
    let enlarged = input.prepare(&half)?;
    let accuracy = FashionClassifier::pretrained(Device::Cpu)?.accuracy(&enlarged, &labels)?;
    assert!((accuracy - 0.8701).abs() < 5e-4, "16x16: {accuracy}");
    Ok(())
}
