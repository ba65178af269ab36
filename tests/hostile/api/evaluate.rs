use ddil_data::{FashionMnist, ImageDataset, ImageFiles};
use ddil_evaluate::{
    Drawing, ExtractorChoice, FeatureKey, FeatureRows, FeatureStore, Measurement, Metric,
    ReferenceChoice, Unmonitored, all_images, draw, draw_observed, features_as_stored,
    features_of_drawing, features_of_files, few_images, reference_of_images, score, shift,
    warnings_of,
};
use ddil_metrics::{FeatureExtractor, RawPixels};
use ddil_models::Placement;
use ddil_pipelines::{Pipeline, Precision, SamplePlan};
use tch::{Device, Kind, Tensor, kind};

use super::cases::{Cases, ODD_WHOLES, outcome};
use crate::inputs::repository;

#[test]
fn ddil_evaluate() {
    let mut cases = Cases::default();
    choices(&mut cases);
    features(&mut cases);
    models(&mut cases);
    // They take any value; the formats of measurements are in `formats` and `inputs`.
    cases.cannot_fail(&[
        "ExtractorChoice::new",
        "ExtractorChoice::with_input",
        "ExtractorChoice::with_return_features",
        "Error::with_settings_named",
        "Monitor::note",
        "Measurement::of",
        "Measurement::of_model",
        "Measurement::write_all",
        "Metric::as_str",
        "Metric::of",
        "Drawing::of_pipeline",
        "Drawing::of_network",
        "Drawing::with_conditioning",
        "Drawing::with_decoder",
        "Drawing::with_callback",
        "Drawing::up_to",
        "FeatureStore::in_folder",
        "FeatureStore::in_cache",
        "FeatureStore::keeps",
    ]);
    cases.corrupted_in_inputs(&["Measurement::read_all", "Measurement::append_to"]);
    cases.finish("ddil-evaluate");
}

fn choices(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let text = folder.path().join("text");
    std::fs::write(&text, "neither a network nor statistics").expect("it is writable");
    let text = text.display().to_string();
    let place = folder.path().display().to_string();
    for name in ["", "fashion_classifier", "raw_pixels", "no such file", "nul\0byte", &text, &place]
    {
        for shape in [None, Some([0; 3]), Some([-1, 2, 2]), Some([3, 1 << 20, 1 << 20])] {
            for input in [None, Some("clean-fid"), Some("{")] {
                let choice = ExtractorChoice::new(name).with_input(input.map(str::to_owned));
                cases.once("ExtractorChoice::open", name, || {
                    outcome(choice.open(shape, Device::Cpu))
                });
            }
        }
    }
    let extractor = RawPixels::new([1, 2, 2]);
    for name in ["", "no/such/folder", "nul\0byte", "/dev/null", &text, &place] {
        cases.once("ReferenceChoice::named", name, || outcome(ReferenceChoice::named(name)));
        for choice in [ReferenceChoice::Folder(name.into()), ReferenceChoice::File(name.into())] {
            cases.once("ReferenceChoice::open", name, || {
                outcome(choice.open(&extractor, 0, None, &mut Unmonitored))
            });
            cases.once("ReferenceChoice::check", name, || outcome(choice.check(&extractor)));
        }
    }
    for images in ODD_WHOLES {
        cases.integers("few_images", |dim| {
            let _ = few_images("images", images, dim);
            Ok(())
        });
    }
}

fn features(cases: &mut Cases) {
    let extractor = RawPixels::new([1, 2, 2]);
    let images = Tensor::rand([16, 1, 2, 2], kind::FLOAT_CPU) * 2.0 - 1.0;
    cases.tensors("features_as_stored", &[&images], |t| {
        outcome(features_as_stored(&t[0], &extractor))
    });
    cases.tensors("reference_of_images", &[&images], |t| {
        outcome(reference_of_images("images", &t[0], &extractor))
    });
    let reference = reference_of_images("images", &images, &extractor).expect("it takes them");
    let rows = extractor.features(&images).expect("it takes them");
    cases.tensors("score", &[&rows], |t| outcome(score(&reference, &t[0])));
    cases.once("warnings_of", "sixteen images", || {
        let _ = warnings_of(&reference, &extractor);
        Ok(())
    });
    let scores = score(&reference, &rows).expect("it takes them");
    let measurement = Measurement::of("images", &scores, &reference, &extractor);
    cases.tensors("Measurement::add_standard_errors", &[&rows], |t| {
        outcome(measurement.clone().add_standard_errors(&reference, &t[0], 2))
    });
    let one = (Tensor::zeros([1, 1, 2, 2], (Kind::Uint8, Device::Cpu)), None);
    let data = ImageDataset::new(&one.0, one.1).expect("an image");
    cases.once("all_images", "one image", || outcome(all_images(&data)));
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("a.png"), "no image").expect("it is writable");
    let files = ImageFiles::in_folder(folder.path()).expect("a file with such a name");
    cases.once("features_of_files", "no image", || {
        let rows = FeatureRows::in_memory();
        outcome(features_of_files(&files, "images", &extractor, 0, rows, &mut Unmonitored))
    });
    cases.tensors("FeatureRows::push", &[&rows], |t| {
        let mut rows = FeatureRows::in_memory();
        outcome(rows.push(&t[0]).and_then(|()| rows.push(&Tensor::zeros([1, 4], kind::FLOAT_CPU))))
    });
    cases.once("FeatureRows::finish", "no rows", || outcome(FeatureRows::in_memory().finish()));
    let key = FeatureKey::of_files(&files, &extractor).expect("the file exists");
    for place in [folder.path().join("a.png"), "nul\0byte".into()] {
        let mut store = FeatureStore::in_folder(&place);
        let what = place.display().to_string();
        cases.once("FeatureStore::open", &what, || outcome(store.open(&key, false)));
        cases.once("FeatureStore::clear", &what, || outcome(store.clear()));
    }
    std::fs::remove_file(folder.path().join("a.png")).expect("it was there");
    cases.once("FeatureKey::of_files", "a file that is gone", || {
        outcome(FeatureKey::of_files(&files, &extractor))
    });
    cases.numbers("Metric::is_better", |value| {
        let _ = Metric::ALL.map(|metric| metric.is_better(value, 0.0));
        Ok(())
    });
}

fn models(cases: &mut Cases) {
    let path = repository().join("assets/fashion-mnist-teacher");
    let model = Pipeline::open(&path, Placement::default(), Precision::Float32).expect("a model");
    let plan = SamplePlan::of(&model, Some(1));
    for (start, end) in [(0, 0), (0, 1), (1, 0), (2, 3), (5, 9), (u32::MAX - 1, u32::MAX)] {
        let what = format!("{start}..{end} of 3");
        cases.once("draw", &what, || outcome(draw(&model, &plan, 3, start..end)));
        cases.once("draw_observed", &what, || {
            outcome(draw_observed(&model, &plan, 3, start..end, Some(-1), &|| {}))
        });
    }
    let extractor = RawPixels::new([1, 2, 2]);
    for (first, total) in [(0, 0), (1, 0), (3, 3), (u32::MAX, 3)] {
        let what = format!("{first} of {total}");
        let drawing = Drawing::of_pipeline(&model, &plan, total);
        cases.once("Drawing::for_each", &what, || outcome(drawing.for_each(first, |_| Ok(()))));
        cases.once("features_of_drawing", &what, || {
            let rows = FeatureRows::in_memory();
            let monitor = &mut Unmonitored;
            outcome(features_of_drawing(&drawing, "", &extractor, rows, monitor, |_, _| {}))
        });
    }
    cases.once("FeatureKey::of_model", "no such folder", || {
        let folders = [std::path::Path::new("nul\0byte")];
        outcome(FeatureKey::of_model(&folders, &plan, [0, 0], "", &extractor))
    });
    if let Ok(FashionMnist { test, .. }) = FashionMnist::from_folder(None) {
        for states in [0, 1, 2] {
            cases.once("shift", &states.to_string(), || {
                outcome(shift(&model, &plan, &test, states))
            });
        }
    }
    cases.cannot_fail(&["shift"]);
}
