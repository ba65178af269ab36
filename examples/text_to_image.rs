//! Draws images of prompts with a text-to-image model of Stable Diffusion's classes, teacher or student.
//!
//! Run with `cargo run --release --example text_to_image -- [options] [prompt ..]`:
//!
//! - `--model folder`: in the layout of diffusers' `StableDiffusionPipeline`; by default the small model of this
//!   repository
//! - `--steps n`, `--guidance scale`, `--seed n`: 50, 3 and 0 by default; a student has its own steps
//! - `--out picture.png`: `runs/text_to_image.png` by default
//! - `--record file.safetensors`: noise, images as tensors, and how they were drawn, to compare with diffusers by
//!   `tools/record/record_text_to_image.py`

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::{env, fs};

use ddil_examples::Result;
use ddil_examples::text_to_image::{Drawn, Sampling, draw};
use ddil_models::{Placement, Precision, weights};
use ddil_pipelines::{Image, Layout, Pipeline};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/fashion-mnist-text-to-image");
const PROMPTS: [&str; 4] =
    ["a small grey picture of an ankle boot", "sneaker", "a dress", "a photo of a handbag"];
/// Guidance scale of a teacher; a student has its own.
const GUIDANCE_SCALE: f64 = 3.0;
const MAX_COLUMNS: u32 = 8;

struct Options {
    model: PathBuf,
    steps: Option<u32>,
    guidance_scale: Option<f64>,
    seed: u64,
    out: PathBuf,
    record: Option<PathBuf>,
    prompts: Vec<String>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            model: MODEL.into(),
            steps: None,
            guidance_scale: None,
            seed: 0,
            out: "runs/text_to_image.png".into(),
            record: None,
            prompts: Vec::new(),
        };
        while let Some(argument) = arguments.next() {
            if !argument.starts_with("--") {
                options.prompts.push(argument);
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("{argument} requires a value"))?;
            match argument.as_str() {
                "--model" => options.model = value.into(),
                "--steps" => options.steps = Some(value.parse()?),
                "--guidance" => options.guidance_scale = Some(value.parse()?),
                "--seed" => options.seed = value.parse()?,
                "--out" => options.out = value.into(),
                "--record" => options.record = Some(value.into()),
                other => return Err(format!("unknown option {other}").into()),
            }
        }
        if options.prompts.is_empty() {
            options.prompts = PROMPTS.map(str::to_owned).to_vec();
        }
        Ok(options)
    }
}

fn main() -> Result<()> {
    let options = Options::parse(env::args().skip(1))?;
    if options.model == Path::new(MODEL) {
        // The tensors are so small that threads within an operation would mostly wait for each other.
        tch::set_num_threads(1);
    }
    let pipeline = Pipeline::open(&options.model, Placement::default(), Precision::Float32)?;
    let parts = pipeline.parts.text_to_image(Placement::default())?;
    // A student's folder contains its timesteps, and its guidance is distilled into it.
    let of_teacher = pipeline.timesteps.is_none().then_some(GUIDANCE_SCALE);
    let sampling = Sampling {
        steps: options.steps,
        guidance_scale: options.guidance_scale.or(of_teacher),
        seed: options.seed,
    };
    let prompts: Vec<&str> = options.prompts.iter().map(String::as_str).collect();
    let Drawn { noise, images, plan } = draw(&pipeline, &parts, &prompts, sampling)?;

    if let Some(path) = &options.record {
        let tensors = [("noise".to_owned(), noise), ("images".to_owned(), images.shallow_clone())];
        let how = [
            ("prompts", serde_json::to_string(&prompts)?),
            ("steps", plan.steps.to_string()),
            ("guidance_scale", plan.guidance_scale.to_string()),
        ];
        let how = how.map(|(key, value)| (key.to_owned(), value));
        weights::save(&tensors, path, &BTreeMap::from(how))?;
    }
    let [columns, scale] = [MAX_COLUMNS, 4].map(|n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN));
    if let Some(folder) = options.out.parent() {
        fs::create_dir_all(folder)?;
    }
    Image::grid(&images, Layout { scale, ..Layout::columns(columns) })?.save(&options.out)?;
    println!("{}", options.out.display());
    Ok(())
}
