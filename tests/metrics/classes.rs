//! Samples of classes: whether they show their class, and those of classes that the data lack.

use ddil_evaluate::{Result, SamplesOfClasses};
use ddil_metrics::{
    ClassPredictor, FeatureExtractor, ImageInput, RawPixels, Reference, Statistics,
    frechet_distance,
};
use tch::{Tensor, kind::FLOAT_CPU};

/// Predicts the class of the largest feature.
struct Largest(ImageInput);

impl FeatureExtractor for Largest {
    fn input(&self) -> &ImageInput {
        &self.0
    }

    fn extract(&self, prepared: &Tensor) -> ddil_metrics::Result<Tensor> {
        Ok(prepared.flatten(1, -1))
    }

    fn id(&self) -> &'static str {
        "largest"
    }

    fn dim(&self) -> i64 {
        3
    }

    fn class_predictor(&self) -> Option<&dyn ClassPredictor> {
        Some(self)
    }
}

impl ClassPredictor for Largest {
    fn class_names(&self) -> Vec<&str> {
        vec!["hat", "cap", "shoe"]
    }

    fn predict(&self, features: &Tensor) -> ddil_metrics::Result<Tensor> {
        Ok(features.argmax(1, false))
    }
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// Features that are predicted as these classes.
fn predicted_as(labels: &[i64]) -> Tensor {
    Tensor::from_slice(labels).one_hot(3).to_kind(tch::Kind::Float)
}

/// Classes are matched by name: the model's order is another than the classifier's.
#[test]
fn agreement_counts_samples_that_show_their_class() -> Result<()> {
    let extractor = Largest(ImageInput::unchanged(1));
    let model = names(&["shoe", "hat", "cap"]);
    let features = predicted_as(&[2, 0, 1, 2, 1, 1, 0, 0]);
    let samples = SamplesOfClasses::new(&features, &model)?;
    // Samples 4 and 6 show another class: a cap for a hat, a hat for a shoe.
    assert_eq!(samples.agreement(&extractor)?, Some(6.0 / 8.0));
    let missing = samples.of_missing(&[2, 0], None, &extractor)?;
    // Shoes 0, 3 and 6, caps 2 and 5.
    assert_eq!((missing.classes, missing.samples), (names(&["shoe", "cap"]), 5));
    assert_eq!((missing.class_agreement, missing.frechet_to_teacher), (Some(4.0 / 5.0), None));
    Ok(())
}

#[test]
fn other_classes_and_other_networks_have_no_agreement() -> Result<()> {
    let extractor = Largest(ImageInput::unchanged(1));
    let features = predicted_as(&[0, 1, 2, 0]);
    let (two, other) = (names(&["hat", "cap"]), names(&["hat", "glove"]));
    // A part of the classifier's classes suffices.
    assert_eq!(SamplesOfClasses::new(&features, &two)?.agreement(&extractor)?, Some(0.5));
    let samples = SamplesOfClasses::new(&features, &other)?;
    assert_eq!(samples.agreement(&extractor)?, None);
    assert_eq!(samples.of_missing(&[0], None, &extractor)?.class_agreement, Some(0.5));
    assert_eq!(samples.agreement(&RawPixels::new([1, 1, 3]))?, None);
    Ok(())
}

/// Samples are compared with the teacher's samples of the same classes, whatever the others are.
#[test]
fn missing_classes_are_compared_with_the_same_classes_of_the_teacher() -> Result<()> {
    tch::manual_seed(0);
    let extractor = RawPixels::new([1, 1, 3]);
    let (student, teacher) = (Tensor::randn([40, 3], FLOAT_CPU), Tensor::randn([60, 3], FLOAT_CPU));
    let model = names(&["a", "b"]);
    let of = |teacher: &Tensor| {
        let reference = Reference::new("teacher", teacher, &extractor)?;
        SamplesOfClasses::new(&student, &model)?.of_missing(&[1], Some(&reference), &extractor)
    };
    let odd = |all: &Tensor| Statistics::from_features(&all.slice(0, 1, None, 2));
    let expected = frechet_distance(&odd(&teacher)?, &odd(&student)?)?;
    let found = of(&teacher)?;
    assert_eq!((found.samples, found.frechet_to_teacher), (20, Some(expected)));
    let _ = teacher.slice(0, 0, None, 2).fill_(9.0);
    assert_eq!(of(&teacher)?.frechet_to_teacher, Some(expected));
    Ok(())
}

/// Of three samples one is of the second class, and none of the fourth.
#[test]
fn too_few_samples_have_no_distance_to_the_teacher() -> Result<()> {
    let extractor = Largest(ImageInput::unchanged(1));
    let features = predicted_as(&[0, 1, 2]);
    let model = names(&["hat", "cap", "shoe", "hat"]);
    let many = Reference::new("teacher", &Tensor::randn([40, 3], FLOAT_CPU), &extractor)?;
    let few = Reference::new("teacher", &features, &extractor)?;
    let samples = SamplesOfClasses::new(&features, &model)?;
    let one = samples.of_missing(&[1], Some(&many), &extractor)?;
    assert_eq!((one.samples, one.class_agreement, one.frechet_to_teacher), (1, Some(1.0), None));
    let none = samples.of_missing(&[3], Some(&many), &extractor)?;
    assert_eq!((none.samples, none.class_agreement, none.frechet_to_teacher), (0, None, None));
    // As many samples as needed, but one of the teacher's.
    let features = predicted_as(&[0, 1, 2, 0, 0, 1, 1, 0]);
    let samples = SamplesOfClasses::new(&features, &model)?;
    let two = samples.of_missing(&[1], Some(&few), &extractor)?;
    assert_eq!((two.samples, two.frechet_to_teacher), (2, None));
    assert!(samples.of_missing(&[1], Some(&many), &extractor)?.frechet_to_teacher.is_some());
    Ok(())
}

/// Without samples there is no share.
#[test]
fn no_samples_have_no_agreement() -> Result<()> {
    let extractor = Largest(ImageInput::unchanged(1));
    let (features, model) = (predicted_as(&[0]).narrow(0, 0, 0), names(&["hat", "cap"]));
    assert_eq!(SamplesOfClasses::new(&features, &model)?.agreement(&extractor)?, None);
    Ok(())
}

#[test]
fn labels_beyond_the_classes_are_refused() -> Result<()> {
    let (features, model) = (predicted_as(&[0, 1]), names(&["hat", "cap"]));
    let extractor = Largest(ImageInput::unchanged(1));
    let samples = SamplesOfClasses::new(&features, &model)?;
    let error = samples.of_missing(&[2], None, &extractor).expect_err("there are two classes");
    assert_eq!(error.to_string(), "`labels` is 2; expected less than 2");
    let error = SamplesOfClasses::new(&features, &[]).expect_err("there are no classes");
    assert!(error.to_string().contains("class_names"), "{error}");
    Ok(())
}
