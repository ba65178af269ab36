use std::path::Path;

use ddil_data::{Captions, FashionMnist, ImageDataset, ImageFiles};
use ddil_evaluate::{
    CaptionScorer, Drawing, EvaluationPrompts, ExtractorChoice, FeatureKey, FeatureRows,
    FeatureStore, FolderExtractor, Measurement, Metric, PromptDrawing, PromptMeter, PromptNetworks,
    ReferenceChoice, SamplesOfClasses, Unmonitored, all_images, draw, draw_observed,
    features_as_stored, features_of_drawing, features_of_files, few_images, is_finite,
    reference_of_dataset, reference_of_images, score, shift, warnings_of,
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
    prompts(&mut cases);
    networks(&mut cases);
    // They take any value; the formats of measurements are in `formats` and `inputs`.
    cases.cannot_fail(&[
        "ExtractorChoice::new",
        "ExtractorChoice::with_input",
        "ExtractorChoice::with_return_features",
        "ExtractorChoice::at_size",
        "ReferenceChoice::at_size",
        "Error::with_settings_named",
        "Monitor::note",
        "Measurement::of",
        "Measurement::of_model",
        "Measurement::unscored",
        "PromptMeter::new",
        "PromptNetworks::new",
        "PromptDrawing::num_calls",
        "PromptSet::text_of",
        "EvaluationPrompts::with_text_around",
        "EvaluationPrompts::with_negative_prompt",
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
    cases.tensors("is_finite", &[&images], |t| outcome(is_finite(&t[0])));
    cases.tensors("features_as_stored", &[&images], |t| {
        outcome(features_as_stored(&t[0], &extractor))
    });
    cases.tensors("reference_of_images", &[&images], |t| {
        outcome(reference_of_images("images", &t[0], &extractor))
    });
    for shape in [[1_i64, 1, 2, 2], [8, 1, 2, 2], [8, 3, 4, 4]] {
        let pixels = Tensor::zeros(shape, (Kind::Uint8, Device::Cpu));
        let images = ImageDataset::new(&pixels, None).expect("it takes them");
        cases.once("reference_of_dataset", &format!("{shape:?}"), || {
            outcome(reference_of_dataset("images", &images, &extractor, &mut Unmonitored))
        });
    }
    let reference = reference_of_images("images", &images, &extractor).expect("it takes them");
    let rows = extractor.features(&images).expect("it takes them");
    cases.tensors("score", &[&rows], |t| outcome(score(&reference, &t[0])));
    cases.once("warnings_of", "sixteen images", || {
        let _ = warnings_of(&reference, &extractor);
        Ok(())
    });
    let names = ["hat".to_owned(), "cap".to_owned()];
    cases.tensors("SamplesOfClasses::new", &[&rows], |t| {
        outcome(SamplesOfClasses::new(&t[0], &names).and_then(|own| own.agreement(&extractor)))
    });
    cases
        .once("SamplesOfClasses::new", "no classes", || outcome(SamplesOfClasses::new(&rows, &[])));
    let samples = SamplesOfClasses::new(&rows, &names).expect("it takes them");
    for labels in [&[][..], &[0], &[1, 0], &[usize::MAX]] {
        cases.once("SamplesOfClasses::of_missing", &format!("{labels:?}"), || {
            outcome(samples.of_missing(labels, Some(&reference), &extractor))
        });
    }
    cases.once("SamplesOfClasses::agreement", "no classifier", || {
        outcome(samples.agreement(&extractor))
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
    cases.once("FeatureKey::of_prompted_files", "a file", || {
        let prompts = folder.path().join("prompts.txt");
        std::fs::write(&prompts, "a cat").expect("it is writable");
        let set = EvaluationPrompts::from_file(&prompts, Captions::All, None).expect("one").set;
        outcome(FeatureKey::of_prompted_files(&files, &set, PromptNetworks::new(None, None, None)))
    });
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

fn prompts(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("prompts.txt");
    std::fs::write(&path, "a cat\na dog\n").expect("it is writable");
    for max in [None, Some(0), Some(u32::MAX)] {
        for place in [path.as_path(), folder.path(), Path::new("nul\0byte"), Path::new("")] {
            cases.once(
                "EvaluationPrompts::from_file",
                &format!("{}, {max:?}", place.display()),
                || outcome(EvaluationPrompts::from_file(place, Captions::All, max)),
            );
        }
    }
    let prompts = EvaluationPrompts::from_file(&path, Captions::All, None).expect("two prompts");
    for images in [0, 1, 101, u32::MAX] {
        cases.once("EvaluationPrompts::with_images_per_prompt", &images.to_string(), || {
            outcome(prompts.clone().with_images_per_prompt(images))
        });
    }
    let picture = repository().join("tests/golden/pictures");
    let files = ImageFiles::in_folder(&picture).expect("pictures");
    cases.once("EvaluationPrompts::matched", "other names", || {
        outcome(prompts.clone().matched(&files))
    });
    let asset = repository().join("assets/fashion-mnist-text-to-image");
    let model = Pipeline::open(&asset, Placement::default(), Precision::Float32).expect("an asset");
    let text = model.parts.text_to_image(Placement::default()).expect("an asset");
    let plan = SamplePlan::of(&model, Some(1));
    for side in [0, 1, 3, u32::MAX] {
        cases.once("PromptDrawing::new", &side.to_string(), || {
            outcome(
                PromptDrawing::new(&model, &text, &plan, [Some(side), None], &prompts).map(drop),
            )
        });
    }
    let few = prompts.clone();
    let drawing = PromptDrawing::new(&model, &text, &plan, [None; 2], &few).expect("it fits");
    let folders = [repository().join("no/such/folder"), asset.clone()];
    for folder in &folders {
        cases.once("FeatureKey::of_prompts", "a folder", || {
            let networks = PromptNetworks::new(None, None, None);
            outcome(FeatureKey::of_prompts(&[folder], &drawing, "", networks))
        });
    }
    cases.once("PromptDrawing::for_each", "an error", || {
        let refuse = || ddil_files::Invalid::new("nothing", 0, "more").into();
        outcome(drawing.for_each(u64::MAX - 1, &|| (), |_, _| Ok::<(), ddil_evaluate::Error>(())))?;
        outcome(drawing.for_each(0, &|| (), |_, _| Err::<(), ddil_evaluate::Error>(refuse())))
    });
}

fn networks(cases: &mut Cases) {
    let golden = |name: &str| repository().join("tests/golden/models").join(name);
    for place in ["", "no/such/folder", "nul\0byte", "/dev/null", "/"] {
        cases.once("FolderExtractor::from_folder", place, || {
            outcome(FolderExtractor::from_folder(place, None, Device::Cpu).map(drop))
        });
        cases.once("CaptionScorer::from_folder", place, || {
            outcome(CaptionScorer::from_folder(place, Device::Cpu).map(drop))
        });
    }
    let network =
        FolderExtractor::from_folder(golden("dinov2"), None, Device::Cpu).expect("a golden");
    let pixels = Tensor::zeros([2, 3, 28, 28], kind::FLOAT_CPU);
    let folder = tempfile::tempdir().expect("a folder");
    for (from, names) in [
        ("clip", &["config.json", "model.safetensors"][..]),
        ("clip_tokenizer", &["vocab.json", "merges.txt", "tokenizer_config.json"][..]),
    ] {
        for name in names {
            std::fs::copy(golden(from).join(name), folder.path().join(name)).expect("a golden");
        }
    }
    let clip = CaptionScorer::from_folder(folder.path(), Device::Cpu).expect("a golden");
    cases.tensors("CaptionScorer::image_embeds", &[&pixels], |t| outcome(clip.image_embeds(&t[0])));
    for texts in [&[][..], &[""], &["a", "\0"]] {
        cases.once("CaptionScorer::text_embeds", &format!("{texts:?}"), || {
            outcome(clip.text_embeds(texts))
        });
    }
    let path = folder.path().join("prompts.txt");
    std::fs::write(&path, "a cat\na dog\n").expect("it is writable");
    let prompts = EvaluationPrompts::from_file(&path, Captions::All, None).expect("two").prompts;
    let image = Tensor::zeros([1, 3, 9, 9], kind::FLOAT_CPU);
    let networks = PromptNetworks::new(Some(&network), Some(&clip), None);
    let meter = || PromptMeter::new(networks, 1, FeatureRows::in_memory());
    cases.once("PromptMeter::save", "nothing", || outcome(meter().save()));
    cases.tensors("PromptMeter::add", &[&image, &image], |t| {
        let mut meter = meter();
        outcome(meter.add(&prompts, t))?;
        outcome(meter.finish())
    });
    cases.once("PromptMeter::add", "no images", || outcome(meter().add(&prompts, &[])));
    cases.once("PromptMeter::finish", "nothing", || outcome(meter().finish()));
}
