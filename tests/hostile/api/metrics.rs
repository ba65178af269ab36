use ddil_metrics::{
    FashionClassifier, FeatureExtractor, MeasureOptions, Moments, Neighbours, RawPixels,
    Statistics, TorchScriptExtractor, TorchScriptOptions, density_coverage, energy_distance,
    frechet_distance, kid, mean_pairwise_distance, measure, prdc, precision_recall, quantize,
    sliced_wasserstein, sliced_wasserstein_along,
};
use tch::{Device, Tensor, kind};

use super::cases::{Cases, outcome};
use crate::inputs::repository;

#[test]
fn ddil_metrics() {
    let mut cases = Cases::default();
    distances(&mut cases);
    features(&mut cases);
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
    cases.tensors("FashionClassifier::logits", &[&images], |t| outcome(classifier.logits(&t[0])));
    cases.tensors("FashionClassifier::accuracy", &[&images, &labels], |t| {
        outcome(classifier.accuracy(&t[0], &t[1]))
    });
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
    cases.once("TorchScriptExtractor::from_file", "another network", || {
        outcome(TorchScriptExtractor::from_file(&path, options.clone(), Device::Cpu))
    });
}
