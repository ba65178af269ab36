use std::num::NonZeroU32;

use ddil_core::Denoiser;
use ddil_models::Placement;
use ddil_pipelines::{
    Card, ClassToImage, Guidance, Image, Layout, ModelFiles, Pipeline, Precision, PromptRequest,
    SampleGrid, SamplePlan, TextToImage, WeightForm, class_conditioning, decode, generate,
    generate_from, initial_noise, layout, sample_latents, sample_latents_seeded, sampling_denoiser,
    save_each, with_published_solver, with_published_timesteps,
};
use ddil_schedulers::{SolverConfig, TimestepSpacing};
use tch::{Device, Tensor, kind};

use super::cases::{Cases, ODD_NUMBERS, ODD_WHOLES, outcome};
use crate::inputs::repository;

/// More steps, or samples, than these are time and memory, and no mistake.
const MANY: i64 = 40;

#[test]
fn ddil_pipelines() {
    let mut cases = Cases::default();
    image_cases(&mut cases);
    folders(&mut cases);
    let assets = repository().join("assets");
    let placement = Placement::default();
    let pixels = ClassToImage::open(assets.join("fashion-mnist-teacher"), placement);
    let pixels = pixels.expect("a model of pixels");
    of_classes(&mut cases, &pixels);
    sampling(&mut cases, pixels.pipeline());
    let text = TextToImage::open(assets.join("fashion-mnist-text-to-image"), placement);
    let text = text.expect("a text-to-image model");
    of_prompts(&mut cases, &text);
    components(&mut cases, &text);
    // Files of a model are corrupted in `inputs`; these functions write or copy what was read.
    cases.corrupted_in_inputs(&[
        "Card::from_file",
        "Pipeline::write",
        "Pipeline::write_adapter",
        "PipelineParts::text_to_image",
        "PipelineParts::autoencoder",
        "PipelineParts::autoencoder_config",
        "ModelFiles::write",
        "ModelFiles::write_network",
        "Scheduler::new",
        "grid_of_classes",
        "grid_of_prompts",
        "model_card",
        "write_model_card",
    ]);
    cases.cannot_fail(&[
        "Layout::columns",
        "Pipeline::with_scheduler",
        "WithCallback::new",
        "Guidance::of_classes",
        "batch_size",
        "num_samples_of_grid",
    ]);
    cases.finish("ddil-pipelines");
}

fn image_cases(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let images = Tensor::zeros([3, 3, 4, 2], kind::FLOAT_CPU);
    let two = Layout::columns(NonZeroU32::MIN.saturating_add(1));
    cases.tensors("Image::grid", &[&images], |t| outcome(Image::grid(&t[0], two)));
    cases.tensors("Image::each", &[&images], |t| outcome(Image::each(&t[0])));
    cases.tensors("save_each", &[&images], |t| {
        outcome(save_each(&t[0], &folder.path().join("images"), 0))
    });
    let square = SampleGrid::of(3, 0);
    cases.tensors("SampleGrid::draw", &[&images], |t| outcome(square.draw(&t[0], &[])));
    let missing = SampleGrid { cells: vec![Some(9)], ..square.clone() };
    cases.once("SampleGrid::draw", "a cell without a sample", || {
        outcome(missing.draw(&images, &[]))
    });
    // More cells than these are memory, and no mistake.
    let few = |value: &&i64| (0..1000).contains(*value);
    for n in ODD_WHOLES.iter().filter(few) {
        cases.integers("SampleGrid::of", |classes| {
            let _ = SampleGrid::of(*n as u32, classes as u32);
            Ok(())
        });
    }
    let picture = Image::grid(&images, layout(0)).expect("a picture");
    let names = ["a".to_owned(), String::new(), "\u{0}".to_owned()];
    cases.integers("Image::with_row_names", |height| {
        outcome(picture.with_row_names(&names, height as u32, two))
    });
    for place in [folder.path().to_owned(), "nul\0byte".into(), folder.path().join("no/folder")] {
        let what = place.display().to_string();
        cases.once("Image::save", &what, || outcome(picture.save(&place)));
        cases.once("Image::description_of", &what, || {
            assert_eq!(Image::description_of(what.as_bytes()), None);
            Ok(())
        });
        cases.once("Image::save_described", &what, || {
            outcome(picture.save_described(&place, "\u{0}\u{fffd}, a text"))
        });
    }
    cases.integers("layout", |columns| {
        let _ = layout(columns as u32);
        Ok(())
    });
}

/// Folders that do not exist, or are of another kind.
fn folders(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let assets = repository().join("assets");
    let (placement, precision) = (Placement::default(), Precision::Float32);
    let places = [folder.path().to_owned(), "nul\0byte".into(), "/dev/null".into(), assets];
    for place in &places {
        let what = place.display().to_string();
        cases.once("TextToImage::open", &what, || outcome(TextToImage::open(place, placement)));
        cases.once("TextToImage::open_in", &what, || {
            outcome(TextToImage::open_in(place, placement, precision))
        });
        cases.once("ClassToImage::open", &what, || outcome(ClassToImage::open(place, placement)));
        cases.once("ClassToImage::open_in", &what, || {
            outcome(ClassToImage::open_in(place, placement, precision))
        });
        cases
            .once("Pipeline::open", &what, || outcome(Pipeline::open(place, placement, precision)));
        cases.once("Pipeline::open_without_weights", &what, || {
            outcome(Pipeline::open_without_weights(place))
        });
        cases.once("Pipeline::ensure_weights", &what, || outcome(Pipeline::ensure_weights(place)));
        cases.once("Pipeline::class_at", &what, || outcome(Pipeline::class_at(place)));
        cases.once("Pipeline::adapter_at", &what, || outcome(Pipeline::adapter_at(place)));
        cases.once("Pipeline::is_at", &what, || {
            assert!(!Pipeline::is_at(place));
            Ok(())
        });
        cases.once("ModelFiles::of_pipeline", &what, || {
            outcome(ModelFiles::of_pipeline(place, Some("fp16")))
        });
        cases.once("ModelFiles::of_network", &what, || {
            outcome(ModelFiles::of_network(place, Some(place), Some(place), None))
        });
        cases.once("ModelFiles::is_network_at", &what, || {
            let _ = ModelFiles::is_network_at(place);
            Ok(())
        });
    }
    let _ = WeightForm::default();
}

fn of_classes(cases: &mut Cases, model: &ClassToImage) {
    for n in ODD_WHOLES.into_iter().filter(|n| (0..MANY).contains(n)) {
        let what = n.to_string();
        let request = || model.samples(n as u32).batch_size(0);
        cases.once("ClassToImage::samples", &what, || outcome(request().steps(1).images()));
        cases.once("steps", &what, || outcome(model.samples(1).steps(n as u32).images()));
    }
    cases.once("steps", "more than timesteps", || {
        outcome(model.samples(1).steps(u32::MAX).images())
    });
    for scale in ODD_NUMBERS {
        cases.once("guidance_scale", &scale.to_string(), || {
            outcome(model.samples(1).steps(1).guidance_scale(scale).images())
        });
    }
    for class in ["", "-1", "10", "Bag", "bag", "\u{0}", "999999999999999999999"] {
        cases.once("ClassImages::class", class, || {
            outcome(model.samples(1).steps(1).class(class).images())
        });
    }
    for mut solver in [SolverConfig::dpm_solver(), SolverConfig::euler()] {
        solver.levels.steps_offset = u32::MAX;
        solver.levels.timestep_spacing = TimestepSpacing::Leading;
        cases.once("solver", "an offset beyond the grid", || {
            outcome(model.samples(1).steps(1).solver(solver).images())
        });
    }
    cases
        .once("seed", "the largest", || outcome(model.samples(1).steps(1).seed(u64::MAX).images()));
}

fn sampling(cases: &mut Cases, pipeline: &Pipeline) {
    let plan = || SamplePlan::of(pipeline, Some(1));
    let guidance = Guidance::of_classes(&pipeline.card);
    let noise = Tensor::randn([2, 1, 32, 32], kind::FLOAT_CPU);
    let conditioning = class_conditioning(&pipeline.card, 2, None, Device::Cpu);
    cases.tensors("generate", &[&noise], |t| {
        outcome(generate(&pipeline.network, &plan(), &guidance, &t[0], &conditioning))
    });
    cases.integers("generate_from", |first| {
        let network = &pipeline.network;
        outcome(generate_from(network, &plan(), &guidance, &noise, &conditioning, first as u64))
    });
    cases.integers("SamplePlan::of", |steps| {
        let plan = SamplePlan::of(pipeline, Some(steps as u32));
        outcome(plan.timesteps(1000))
    });
    cases
        .integers("SamplePlan::timesteps", |timesteps| outcome(plan().timesteps(timesteps as u32)));
    cases.integers("SamplePlan::num_calls", |n| {
        let _ = plan().num_calls(n as u32);
        Ok(())
    });
    cases.integers("with_published_timesteps", |steps| {
        outcome(with_published_timesteps(pipeline, SamplePlan { steps: steps as u32, ..plan() }))
    });
    for mut solver in [SolverConfig::euler(), SolverConfig::uni_pc()] {
        let schedule = pipeline.network.schedule().clone();
        cases.integers("SamplePlan::levels", |steps| {
            outcome(SamplePlan { steps: steps as u32, ..plan() }.levels(&solver, &schedule))
        });
        solver.levels.steps_offset = u32::MAX;
        solver.levels.timestep_spacing = TimestepSpacing::Leading;
        cases.once("with_published_solver", "another solver", || {
            let plan = SamplePlan { solver: Some(solver.clone()), ..plan() };
            outcome(with_published_solver(pipeline, plan))
        });
    }
    cases.numbers("sampling_denoiser", |guidance_scale| {
        let plan = SamplePlan { guidance_scale, ..plan() };
        outcome(sampling_denoiser(&pipeline.network, &plan, &guidance))
    });
    cases.numbers("Guidance::guided", |scale| outcome(guidance.guided(&pipeline.network, scale)));
    cases.once("Guidance::of_prompts", "nothing", || {
        let guidance = Guidance::of_prompts(&Card::default(), ddil_core::Conditioning::none());
        outcome(guidance.null())
    });
    for side in ODD_WHOLES.into_iter().filter(|side| *side < MANY) {
        let what = side.to_string();
        cases.once("initial_noise", &what, || {
            outcome(initial_noise(0, 2, [1, side, 2], Device::Cpu))
        });
        cases.once("class_conditioning", &what, || {
            let conditioning = class_conditioning(&pipeline.card, 1, Some(side), Device::Cpu);
            outcome(generate(
                &pipeline.network,
                &plan(),
                &guidance,
                &noise.narrow(0, 0, 1),
                &conditioning,
            ))
        });
    }
}

fn of_prompts(cases: &mut Cases, model: &TextToImage) {
    let texts = ["", "\u{0}", "\u{1f45f}\u{200d}", "a coat"];
    for text in texts.into_iter().chain([&*"word ".repeat(500)]) {
        let what = text.chars().take(8).collect::<String>();
        cases.once("TextToImage::prompt", &what, || outcome(model.prompt(text).steps(1).images()));
        cases.once("TextToImage::prompts", &what, || {
            outcome(model.prompts([text, text]).steps(1).images())
        });
        cases.once("PromptImages::negative_prompt", &what, || {
            let request = model.prompt("a coat").negative_prompt(text).guidance_scale(2.0);
            outcome(request.steps(1).images())
        });
    }
    for side in ODD_WHOLES.into_iter().filter(|side| (0..MANY).contains(side)) {
        let what = side.to_string();
        cases.once("PromptImages::size", &what, || {
            outcome(model.prompt("a coat").size(side as u32, 32).steps(1).images())
        });
        cases.once("PromptImages::images_per_prompt", &what, || {
            outcome(model.prompt("a coat").images_per_prompt(side as u32).steps(1).images())
        });
    }
}

fn components(cases: &mut Cases, model: &TextToImage) {
    let (pipeline, components) = (model.pipeline(), model.components());
    let plan = SamplePlan::of(pipeline, Some(1));
    let mut generator = ddil_core::Generator::new(Device::Cpu, 0).expect("there is a CPU");
    let images = Tensor::zeros([2, 3, 32, 32], kind::FLOAT_CPU);
    let latents = components.encode_images(&images, &mut generator).expect("it takes them");
    cases.tensors("TextToImageComponents::decode", &[&latents], |t| {
        outcome(components.decode(&t[0]))
    });
    cases.tensors("decode", &[&latents], |t| outcome(decode(components, &t[0], 0)));
    cases.tensors("TextToImageComponents::latent_distribution", &[&images], |t| {
        outcome(components.latent_distribution(&t[0]))
    });
    cases.tensors("TextToImageComponents::encode_images", &[&images], |t| {
        let mut generator = ddil_core::Generator::new(Device::Cpu, 0).expect("there is a CPU");
        outcome(components.encode_images(&t[0], &mut generator))
    });
    cases.once("TextToImageComponents::encode", "no prompt", || outcome(components.encode(&[])));
    cases.integers("TextToImageComponents::latent_shape", |side| {
        outcome(components.latent_shape([side, 32]))
    });
    cases.once("TextToImageComponents::time_ids", "no size", || {
        let _ = components.time_ids([0, 0], 0);
        Ok(())
    });
    let request = |prompts: Vec<String>| PromptRequest {
        prompts,
        negative_prompt: None,
        size: [Some(0), None],
        per_prompt: 1,
    };
    cases.once("PromptRequest::pixels", "no height", || {
        outcome(request(Vec::new()).pixels(pipeline, components))
    });
    cases.once("PromptRequest::ensure", "no prompt", || {
        outcome(request(Vec::new()).ensure(pipeline, &plan))
    });
    cases.once("PromptRequest::encode", "no prompt", || {
        outcome(request(Vec::new()).encode(pipeline, components, &plan))
    });
    let request = PromptRequest { size: [None; 2], ..request(vec!["a coat".to_owned()]) };
    let mut encoded = request.encode(pipeline, components, &plan).expect("a request");
    for side in [0, 1, 3] {
        encoded.latent_shape[1] = side;
        cases.once("sample_latents", &side.to_string(), || {
            outcome(sample_latents(pipeline, &plan, &encoded, &|| ()))
        });
        for seeds in [&[][..], &[u64::MAX], &[1, 2]] {
            cases.once("sample_latents_seeded", &format!("{side}, {seeds:?}"), || {
                outcome(sample_latents_seeded(pipeline, &plan, &encoded, seeds, &|| ()))
            });
        }
    }
}
