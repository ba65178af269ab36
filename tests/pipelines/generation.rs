//! Images in one chain of calls are those of the steps below it.

use std::path::PathBuf;

use ddil_models::Placement;
use ddil_pipelines::{
    ClassToImage, Error, Guidance, Pipeline, Precision, PromptRequest, SamplePlan, TextToImage,
    class_conditioning, decode, generate, initial_noise, sample_latents, sample_latents_seeded,
    with_published_timesteps,
};
use ddil_schedulers::SamplerConfig;
use tch::{Device, Kind, Tensor};

use crate::TestResult;

fn asset(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets")).join(name)
}

fn text_to_image() -> ddil_pipelines::Result<TextToImage> {
    TextToImage::open(asset("fashion-mnist-text-to-image"), Placement::default())
}

fn class_to_image() -> ddil_pipelines::Result<ClassToImage> {
    ClassToImage::open(asset("fashion-mnist-teacher"), Placement::default())
}

#[test]
fn images_of_prompts_are_those_of_the_single_steps() -> TestResult {
    let model = text_to_image()?;
    let prompts = ["a sneaker", "a coat"];
    let images = model
        .prompts(prompts)
        .images_per_prompt(2)
        .steps(2)
        .seed(5)
        .guidance_scale(2.0)
        .images()?;

    let placement = Placement::default();
    let path = asset("fashion-mnist-text-to-image");
    let pipeline = Pipeline::open(&path, placement, Precision::Float32)?;
    let text = pipeline.parts.text_to_image(placement)?;
    let plan = SamplePlan { seed: 5, guidance_scale: 2.0, ..SamplePlan::of(&pipeline, Some(2)) };
    let plan = with_published_timesteps(&pipeline, plan)?;
    let request = PromptRequest {
        prompts: prompts.map(str::to_owned).to_vec(),
        negative_prompt: None,
        size: [None; 2],
        per_prompt: 2,
    };
    let encoded = request.encode(&pipeline, &text, &plan)?;
    let latents = sample_latents(&pipeline, &plan, &encoded, &|| ())?;
    assert_eq!(images, decode(&text, &latents, plan.batch_size)?);
    assert_eq!((images.size()[0], images.kind()), (4, Kind::Float));
    Ok(())
}

/// With one seed per image, an image is the one that its seed gives alone; also with a sampler that adds noise.
#[test]
fn seeded_images_do_not_depend_on_the_others() -> TestResult {
    let model = text_to_image()?;
    let pipeline = model.pipeline();
    let plan = SamplePlan { seed: 1, batch_size: 3, ..SamplePlan::of(pipeline, Some(2)) };
    let samplers = [SamplerConfig::Ddim { eta: 0.0 }, SamplerConfig::Ddim { eta: 1.0 }];
    for sampler in samplers {
        let plan = SamplePlan { sampler, ..plan.clone() };
        let draw = |prompts: &[&str], seeds: Option<&[u64]>, plan: &SamplePlan| {
            let request = PromptRequest {
                prompts: prompts.iter().map(|&prompt| prompt.to_owned()).collect(),
                negative_prompt: None,
                size: [None; 2],
                per_prompt: 1,
            };
            let encoded = request.encode(pipeline, model.components(), plan)?;
            match seeds {
                Some(seeds) => sample_latents_seeded(pipeline, plan, &encoded, seeds, &|| ()),
                None => sample_latents(pipeline, plan, &encoded, &|| ()),
            }
        };
        let all = draw(&["a coat", "a sneaker", "a bag"], Some(&[7, 8, 7]), &plan)?;
        for (i, (prompt, seed)) in
            [("a coat", 7), ("a sneaker", 8), ("a bag", 7)].into_iter().enumerate()
        {
            let alone = draw(&[prompt], None, &SamplePlan { seed, ..plan.clone() })?;
            let gap = (all.get(i as i64) - alone.get(0)).abs().max().double_value(&[]);
            assert!(gap < 1e-4, "{prompt} {sampler:?}: {gap}");
        }
        let same: Tensor = (all.get(0) - all.get(2)).abs().max();
        assert!(same.double_value(&[]) > 0.01, "two prompts from the same noise differ");
        let error = draw(&["a coat"], Some(&[1, 2]), &plan).expect_err("two seeds for one image");
        assert!(error.invalid().is_some_and(|invalid| invalid.field == "seeds"), "{error}");
    }
    Ok(())
}

#[test]
fn images_of_classes_are_those_of_the_single_steps() -> TestResult {
    let model = class_to_image()?;
    let images = model.samples(3).class("Bag").steps(2).seed(9).images()?;
    let by_label = model.samples(3).class("8").steps(2).seed(9).images()?;
    assert_eq!(images, by_label);

    let pipeline = model.pipeline();
    let plan = SamplePlan { seed: 9, ..SamplePlan::of(pipeline, Some(2)) };
    let noise = initial_noise(9, 3, pipeline.card.image_shape, Device::Cpu)?;
    let conditioning = class_conditioning(&pipeline.card, 3, Some(8), Device::Cpu);
    let guidance = Guidance::of_classes(&pipeline.card);
    assert_eq!(images, generate(&pipeline.network, &plan, &guidance, &noise, &conditioning)?);
    Ok(())
}

#[test]
fn the_batch_size_does_not_change_results() -> TestResult {
    let model = class_to_image()?;
    let draw = |batch| model.samples(5).steps(2).batch_size(batch).images();
    let difference: Tensor = (draw(5)? - draw(2)?).abs().max();
    assert!(difference.double_value(&[]) < 1e-4, "{difference}");
    Ok(())
}

#[test]
fn unsupported_model_settings_are_named() -> TestResult {
    let model = class_to_image()?;
    let field = |result: ddil_pipelines::Result<Tensor>| {
        let error = result.expect_err("it cannot be");
        error.invalid().map(|invalid| invalid.field.clone()).unwrap_or(error.to_string())
    };
    assert_eq!(field(model.samples(0).images()), "samples");
    assert_eq!(field(model.samples(1).class("hat").images()), "class");
    assert_eq!(field(model.samples(1).class("10").images()), "class");
    let model = text_to_image()?;
    assert_eq!(field(model.prompts::<String>([]).images()), "prompts");
    assert_eq!(field(model.prompt("a coat").images_per_prompt(0).images()), "per_prompt");
    let refused = model.prompt("a coat").size(33, 32).steps(1).images();
    assert_eq!(field(refused), "height, width");
    Ok(())
}

#[test]
fn each_kind_of_model_is_opened_by_its_own_type() {
    let placement = Placement::default();
    let wrong = [
        TextToImage::open(asset("fashion-mnist-teacher"), placement).map(drop),
        ClassToImage::open(asset("fashion-mnist-text-to-image"), placement).map(drop),
    ];
    for refused in wrong {
        let error = refused.expect_err("another kind");
        assert!(error.invalid().is_some(), "{error}");
    }
    let nothing = TextToImage::open(asset("nothing"), placement).expect_err("no folder");
    assert!(matches!(nothing, Error::NotAModel { .. }), "{nothing}");
}
