use ddil_metrics::{
    ClassPredictor, FashionClassifier, FeatureExtractor, ImageInput, MeasureOptions, Moments,
    Neighbours, RawPixels, Reference, Statistics, Subsets, TorchScriptDistance,
    TorchScriptExtractor, TorchScriptOptions, density_coverage, diversity_per_group,
    energy_distance, frechet_distance, kid, kid_of_subsets, mean_cosine_distance,
    mean_pairwise_distance, measure, prdc, precision_recall, quantize, sliced_wasserstein,
    sliced_wasserstein_along, standard_errors,
};
use tch::{Device, Tensor, kind};

use super::cases::{Cases, outcome};
use crate::inputs::repository;

#[test]
fn ddil_metrics() {
    let mut cases = Cases::default();
    distances(&mut cases);
    features(&mut cases);
    references(&mut cases);
    subsets(&mut cases);
    cases.corrupted_in_inputs(&["Reference::from_file"]);
    cases.cannot_fail(&["Reference::from_statistics"]);
    cases.finish("ddil-metrics");
}

fn distances(cases: &mut Cases) {
    let x = Tensor::randn([12, 3], kind::FLOAT_CPU);
    let two = [&x, &x];
    cases.tensors("precision_recall", &two, |t| outcome(precision_recall(&t[0], &t[1], 3)));
    cases.tensors("density_coverage", &two, |t| outcome(density_coverage(&t[0], &t[1], 3)));
    cases.tensors("prdc", &two, |t| outcome(prdc(&t[0], &t[1], Neighbours::default())));
    for k in [0, 1, 11, 12, 13, u32::MAX] {
        let what = k.to_string();
        cases.once("precision_recall", &what, || outcome(precision_recall(&x, &x, k)));
        cases.once("density_coverage", &what, || outcome(density_coverage(&x, &x, k)));
        let neighbours = Neighbours { precision_recall: k, density_coverage: k };
        cases.once("prdc", &what, || outcome(prdc(&x, &x, neighbours)));
        if k < 100 {
            cases.once("sliced_wasserstein", &what, || outcome(sliced_wasserstein(&x, &x, k, 0)));
        }
        let options = MeasureOptions { neighbours, num_projections: 3, ..Default::default() };
        cases.once("measure", &what, || outcome(measure(&x, &x, options)));
    }
    // Directions are drawn all at once: four billion of them are too many, and are refused with a message.
    cases.once("sliced_wasserstein", "most directions", || {
        outcome(sliced_wasserstein(&x, &x, u32::MAX, 0))
    });
    cases.tensors("mean_cosine_distance", &[&x], |t| outcome(mean_cosine_distance(&t[0])));
    cases.tensors("mean_pairwise_distance", &[&x], |t| outcome(mean_pairwise_distance(&t[0])));
    cases.tensors("energy_distance", &two, |t| outcome(energy_distance(&t[0], &t[1])));
    cases.tensors("kid", &two, |t| outcome(kid(&t[0], &t[1])));
    cases.tensors("sliced_wasserstein", &two, |t| outcome(sliced_wasserstein(&t[0], &t[1], 4, 0)));
    let directions = Tensor::randn([4, 3], kind::FLOAT_CPU);
    cases.tensors("sliced_wasserstein_along", &[&x, &x, &directions], |t| {
        outcome(sliced_wasserstein_along(&t[0], &t[1], &t[2]))
    });
    cases.tensors("measure", &two, |t| outcome(measure(&t[0], &t[1], MeasureOptions::default())));
    cases.tensors("Moments::extend", &[&x], |t| {
        let mut moments = Moments::new();
        outcome(moments.extend(&t[0]))?;
        outcome(moments.build())
    });
    cases.tensors("Moments::extend", &[&x], |t| {
        let mut moments = Moments::new();
        outcome(moments.extend(&x))?;
        outcome(moments.extend(&t[0]))
    });
    cases
        .tensors("Statistics::from_features", &[&x], |t| outcome(Statistics::from_features(&t[0])));
    let wide = Tensor::randn([12, 5], kind::FLOAT_CPU);
    let of = |x: &Tensor| Statistics::from_features(x).map_err(|error| error.to_string());
    cases.once("frechet_distance", "other widths", || {
        outcome(frechet_distance(&of(&x)?, &of(&wide)?))
    });
    for value in [f64::NAN, f64::INFINITY, 1e30] {
        cases.once("frechet_distance", &value.to_string(), || {
            outcome(frechet_distance(&of(&x)?, &of(&x.full_like(value))?))
        });
    }
    cases.cannot_fail(&["Report::is_comparable"]);
}

fn features(cases: &mut Cases) {
    let images = Tensor::zeros([2, 1, 32, 32], kind::FLOAT_CPU);
    cases.tensors("quantize", &[&images], |t| outcome(quantize(&t[0])));
    let raw = RawPixels::new([1, 32, 32]);
    cases.tensors("FeatureExtractor::extract", &[&images], |t| outcome(raw.extract(&t[0])));
    cases.integers("ImageInput::unchanged", |channels| {
        outcome(ImageInput::unchanged(channels).prepare(&images))
    });
    cases.integers("ImageInput::clip", |side| outcome(ImageInput::clip(side).prepare(&images)));
    let inputs = [ImageInput::unchanged(1), ImageInput::clean_fid(), ImageInput::imagenet()];
    for input in inputs {
        cases.tensors("ImageInput::prepare", &[&images], |t| outcome(input.prepare(&t[0])));
        cases.integers("ImageInput::ensure_valid", |channels| {
            let mut input = input.clone();
            input.channels = channels;
            outcome(input.ensure_valid())?;
            outcome(input.prepare(&images))
        });
    }
    cases.tensors("FeatureExtractor::features", &[&images], |t| outcome(raw.features(&t[0])));
    for shape in [[0, 0, 0], [-1, 4, 4], [i64::MAX; 3]] {
        cases.once("RawPixels::new", &format!("{shape:?}"), || {
            let extractor = RawPixels::new(shape);
            let _ = (extractor.dim(), extractor.id().len());
            outcome(extractor.features(&images))
        });
    }
    let classifier = FashionClassifier::untrained(Device::Cpu).expect("there is a CPU");
    let labels = Tensor::from_slice(&[0_i64, 9]);
    cases
        .tensors("FeatureExtractor::features", &[&images], |t| outcome(classifier.features(&t[0])));
    let features = classifier.features(&images).expect("it takes them");
    cases.tensors("ClassPredictor::predict", &[&features], |t| outcome(classifier.predict(&t[0])));
    cases.tensors("FashionClassifier::logits", &[&images], |t| outcome(classifier.logits(&t[0])));
    cases.tensors("FashionClassifier::accuracy", &[&images, &labels], |t| {
        outcome(classifier.accuracy(&t[0], &t[1]))
    });
    for channels in [i64::MIN, 0, 1, 3] {
        let input = ImageInput::unchanged(channels);
        cases.once("FashionClassifier::with_input", &channels.to_string(), || {
            let classifier = FashionClassifier::untrained(Device::Cpu).expect("there is a CPU");
            outcome(classifier.with_input(input.clone()))
        });
    }
    for device in [Device::Cpu, Device::Cuda(0)] {
        let what = format!("{device:?}");
        cases.once("FashionClassifier::pretrained", &what, || {
            outcome(FashionClassifier::pretrained(device))
        });
        cases.once("FashionClassifier::untrained", &what, || {
            outcome(FashionClassifier::untrained(device))
        });
        let bytes = classifier.to_bytes().expect("weights");
        cases.once("FashionClassifier::from_bytes", &what, || {
            outcome(FashionClassifier::from_bytes(&bytes, device))
        });
    }
    let path = repository().join("tests/golden/models/torch_script/model.pt");
    let options = TorchScriptOptions::inception_2015();
    for place in ["none.pt", "/", "/dev/null"] {
        cases.once("TorchScriptExtractor::from_file", place, || {
            outcome(TorchScriptExtractor::from_file(place, options.clone(), Device::Cpu))
        });
    }
    for place in ["none.pt", "/", "/dev/null"] {
        cases.once("TorchScriptDistance::from_file", place, || {
            outcome(TorchScriptDistance::from_file(place, Device::Cpu))
        });
    }
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("distance.pt");
    let pair = Tensor::zeros([2, 3, 4, 4], kind::FLOAT_CPU);
    let mut gaps = |x: &[Tensor]| {
        vec![(&x[0] - &x[1]).abs().mean_dim([1_i64, 2, 3].as_slice(), true, tch::Kind::Float)]
    };
    tch::CModule::create_by_tracing("distance", "forward", &[pair.copy(), pair.copy()], &mut gaps)
        .and_then(|module| module.save(&place))
        .expect("it is writable");
    let other = TorchScriptDistance::from_file(&place, Device::Cpu).expect("a network");
    cases.tensors("TorchScriptDistance::between", &[&pair, &pair], |t| {
        outcome(other.between(&t[0], &t[1]))
    });
    cases.tensors("TorchScriptDistance::mean_pairwise", &[&pair], |t| {
        outcome(other.mean_pairwise(&t[0]))
    });
    cases.once("TorchScriptExtractor::from_file", "another network", || {
        outcome(TorchScriptExtractor::from_file(&path, options.clone(), Device::Cpu))
    });
}

fn references(cases: &mut Cases) {
    let extractor = RawPixels::new([1, 1, 3]);
    let x = Tensor::randn([12, 3], kind::FLOAT_CPU);
    let folder = tempfile::tempdir().expect("a folder");
    cases.tensors("Reference::new", &[&x], |t| outcome(Reference::new("x", &t[0], &extractor)));
    let reference = Reference::new("x", &x, &extractor).expect("good features");
    for shape in [[1, 1, 3], [1, 3, 1], [1, 1, 4], [0, 0, 0]] {
        cases.once("Reference::ensure_extractor", &format!("{shape:?}"), || {
            outcome(reference.ensure_extractor(&RawPixels::new(shape)))
        });
    }
    for place in [folder.path(), "nul\0byte".as_ref(), "none/here".as_ref()] {
        cases.once("Reference::write", &place.display().to_string(), || {
            outcome(reference.write(place))
        });
    }
    for values in [vec![], vec![f64::NAN; 4], vec![1.0, 2.0, 3.0, 4.0], vec![1.0; 3]] {
        cases.integers("Statistics::from_parts", |n| {
            outcome(Statistics::from_parts(Some(n as u64), vec![0.0, 1.0], values.clone()))
        });
    }
}

fn subsets(cases: &mut Cases) {
    let x = Tensor::randn([12, 3], kind::FLOAT_CPU);
    let small = Subsets { count: 2, size: 4, seed: 0 };
    cases.tensors("kid_of_subsets", &[&x, &x], |t| outcome(kid_of_subsets(&t[0], &t[1], small)));
    let halves = |half: &Tensor| Ok(vec![mean_pairwise_distance(half)?]);
    cases.tensors("standard_errors", &[&x], |t| outcome(standard_errors(&t[0], 3, 0, halves)));
    cases.tensors("diversity_per_group", &[&x], |t| outcome(diversity_per_group(&t[0], 3)));
    for count in [0, 1, 2, 12, 13, u32::MAX] {
        let what = count.to_string();
        let sized = Subsets { size: count, ..small };
        cases.once("kid_of_subsets", &what, || outcome(kid_of_subsets(&x, &x, sized)));
        cases.once("diversity_per_group", &what, || outcome(diversity_per_group(&x, count)));
        if count < 100 {
            cases.once("standard_errors", &what, || outcome(standard_errors(&x, count, 0, halves)));
        }
    }
}
