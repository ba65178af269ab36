//! `sample`, `export`, `import`, `inspect` and dry runs of text-to-image models.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_core::{Conditioning, Denoiser};
use ddil_models::weights::{self, WeightFiles};
use ddil_models::{
    Lora, LoraConfig, LoraFormat, NetworkConfig, Placement, Precision, UNet2DConditionModel,
};
use ddil_pipelines::{
    Pipeline, PromptRequest, SamplePlan, initial_noise, sample_latents, with_published_timesteps,
};
use ddil_trainer::memory::MemoryPlan;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::support::{Ended, TestResult, Workshop, json, snapshot};
use crate::text_teacher::{Family, unet, write_text_teacher};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// Samples into a separate folder and returns the pixels of every image.
#[track_caller]
fn sample(workshop: &Workshop, model: &str, folder: &str, more: &[&str]) -> Vec<Vec<u8>> {
    let mut arguments = vec!["sample", model, "--steps", "3", "--threads", "1"];
    let grid = format!("{folder}.png");
    arguments.extend(["--folder", folder, "--output", &grid]);
    arguments.extend(more);
    workshop.ddil(&arguments).succeeded();
    snapshot(&workshop.path(folder))
        .into_keys()
        .map(|name| pixels(&workshop.path(folder).join(name)))
        .collect()
}

fn pixels(path: &Path) -> Vec<u8> {
    let file = std::io::BufReader::new(fs::File::open(path).expect("it was written"));
    let mut reader = png::Decoder::new(file).read_info().expect("it is a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("it is small")];
    reader.next_frame(&mut pixels).expect("it is whole");
    pixels
}

/// The same but for the rounding of products, which depends on how many rows there are.
#[track_caller]
fn assert_alike(left: &[Vec<u8>], right: &[Vec<u8>]) {
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter().flatten().zip(right.iter().flatten()) {
        assert!(left.abs_diff(*right) <= 1, "{left} and {right}");
    }
}

const PROMPTS: [&str; 4] = ["--prompt", "a cat", "--prompt", "a red dog"];

#[test]
fn images_depend_only_on_seed_prompt_and_number() {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let with = |folder: &str, more: &[&str]| {
        let more: Vec<&str> = PROMPTS.iter().chain(more).copied().collect();
        sample(&workshop, "teacher", folder, &more)
    };
    let first = with("a", &["-n", "3"]);
    assert_eq!(first.len(), 6);
    assert_eq!(first[0].len(), 3 * 16 * 16);
    assert_alike(&with("b", &["-n", "3", "--batch-size", "4"]), &first);
    assert_ne!(with("c", &["-n", "3", "--seed", "1"]), first);
    assert_ne!(first[0], first[1]);
    let alone = sample(&workshop, "teacher", "d", &["-n", "3", "--prompt", "a cat"]);
    assert_alike(&alone, &first[..3]);
    // A sampler that draws noise at each step.
    let noisy = ["-n", "3", "--sampler", "lcm", "--guidance-scale", "1"];
    let [one, five] = [("e", "1"), ("f", "5")]
        .map(|(folder, batch)| with(folder, &[&noisy[..], &["--batch-size", batch]].concat()));
    assert_alike(&one, &five);
}

#[test]
fn prompts_may_come_from_a_file_and_sides_from_the_command_line() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    fs::write(workshop.path("prompts.txt"), "a cat\n\n  a dog \n")?;
    let from_file = sample(&workshop, "teacher", "a", &["--prompts-file", "prompts.txt"]);
    let given = ["--prompt", "a cat", "--prompt", "a dog"];
    assert_eq!(from_file, sample(&workshop, "teacher", "b", &given));
    let wide = ["--height", "12", "--width", "20", "--prompt", "a cat"];
    assert_eq!(sample(&workshop, "teacher", "c", &wide)[0].len(), 3 * 12 * 20);
    // The empty prompt is zeros; an empty text gives another conditioning.
    let negative = [&given[..], &["--negative-prompt", ""]].concat();
    assert_ne!(sample(&workshop, "teacher", "d", &negative), from_file);
    Ok(())
}

#[test]
fn a_long_prompt_is_cut_and_the_rest_is_shown() {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let arguments = ["sample", "teacher", "--steps", "1", "--prompt", "a red cat, 2 dogs"];
    let ended = workshop.ddil(&arguments).succeeded();
    let words = ["longer than the text encoder's input", "a red cat, 2 dogs", "cut off: gs"];
    for words in words {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
    let negative = ["sample", "teacher", "--steps", "1", "--prompt", "a cat", "--negative-prompt"];
    let ended = workshop.ddil(&[&negative[..], &["a red cat, 2 dogs"]].concat()).succeeded();
    for words in words {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
}

#[test]
fn options_that_a_model_lacks_are_refused() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    workshop.write_teacher("classes", Some(3));
    fs::write(workshop.path("empty.txt"), "\n \n")?;
    let refused = |more: &[&str], words: &[&str]| {
        workshop.ddil(&[&["sample"], more].concat()).refused(words);
        assert!(!workshop.path("samples.png").exists(), "{more:?}");
    };
    refused(&["classes", "--prompt", "a cat"], &["--prompt", "--class"]);
    refused(&["classes", "--height", "8"], &["--height", "no prompts"]);
    refused(&["teacher"], &["--prompt is missing"]);
    refused(&["teacher", "--class", "1", "--prompt", "a"], &["--class", "no classes"]);
    refused(&["teacher", "--prompts-file", "empty.txt"], &["empty.txt", "no prompts"]);
    refused(&["teacher", "--prompts-file", "none.txt"], &["none.txt"]);
    refused(&["teacher", "--prompt", "a", "--height", "15"], &["15", "multiples of 2"]);
    refused(&["teacher", "--prompt", "a", "--sampler", "heun"], &["--sampler", "heun", "uni-pc"]);
    refused(&["teacher", "--prompt", "a", "--batch-size", "0"], &["--batch-size"]);
    let unguided = ["teacher", "--prompt", "a", "--negative-prompt", "b", "--guidance-scale", "1"];
    refused(&unguided, &["negative_prompt", "without guidance"]);
    fs::remove_file(workshop.path("teacher/tokenizer/merges.txt"))?;
    refused(&["teacher", "--prompt", "a"], &["merges.txt"]);
    Ok(())
}

/// DDIM (equation 12 of arXiv:2010.02502 without noise) and guidance, written out.
#[test]
fn latents_are_those_of_a_loop_written_by_hand() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let file = workshop.path("teacher/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&file)?;
    assert!(text.contains("\"trailing\""), "{text}");
    fs::write(&file, text.replace("\"trailing\"", "\"leading\""))?;
    let pipeline =
        Pipeline::open(&workshop.path("teacher"), Placement::default(), Precision::Float32)?;
    let plan = SamplePlan { seed: 7, guidance_scale: 4.0, ..SamplePlan::of(&pipeline, Some(4)) };
    let plan = with_published_timesteps(&pipeline, plan)?;
    // Leading, as the file has it: multiples of 250.
    assert_eq!(plan.timesteps.as_deref(), Some(&[750, 500, 250, 0][..]));
    let text = pipeline.parts.text_to_image(Placement::default())?;
    let request = PromptRequest {
        prompts: vec!["a cat".to_owned(), "a dog".to_owned()],
        negative_prompt: None,
        size: [None, None],
        per_prompt: 1,
    };
    let encoded = request.encode(&pipeline, &text, &plan)?;
    let latents = sample_latents(&pipeline, &plan, &encoded, &|| {})?;

    let _no_grad = tch::no_grad_guard();
    let schedule = pipeline.network.schedule();
    let rows = Tensor::from_slice(&[0_i64, 0]);
    let null = encoded.guidance.null()?.index_select(&rows)?;
    let zeros = null.get(Conditioning::ENCODER_HIDDEN_STATES).ok_or("the states of no prompt")?;
    assert_eq!(zeros.abs().max().double_value(&[]), 0.0);
    let sizes = encoded.conditioning.get(Conditioning::TIME_IDS).ok_or("sizes")?;
    assert_eq!(
        Vec::<f64>::try_from(sizes.get(0).to_kind(Kind::Double))?,
        [16.0, 16.0, 0.0, 0.0, 16.0, 16.0]
    );
    let mut x = initial_noise(7, 2, encoded.latent_shape, Device::Cpu)?;
    for (t, prev) in [(750, 500), (500, 250), (250, 0), (0, -1)] {
        let at = Tensor::from_slice(&[t, t]);
        let with = pipeline.network.output(&x, &at, &encoded.conditioning)?;
        let without = pipeline.network.output(&x, &at, &null)?;
        let epsilon = &without + (with - &without) * 4.0;
        let [now, then] = [schedule.scale_at(t)?, schedule.scale_at(prev)?];
        let x0 = (&x - &epsilon * now.sigma) / now.alpha;
        x = x0 * then.alpha + epsilon * then.sigma;
    }
    let error = (&latents - &x).abs().max().double_value(&[]) / x.abs().max().double_value(&[]);
    assert!(error < 1e-5, "{error}");
    Ok(())
}

/// A network of the teacher's form with adapters that do something, and the file of these.
fn write_adapters(path: &Path, format: LoraFormat) -> UNet2DConditionModel {
    let network = unet(Family::StableDiffusion).build(Placement::default(), 5).expect("valid");
    let config = LoraConfig { rank: 2, alpha: 4.0, targets: vec!["to_q".into(), "conv1".into()] };
    let lora = Lora::attach(network.parameters(), &config, 3).expect("they fit");
    let _no_grad = tch::no_grad_guard();
    for (name, mut tensor) in lora.parameters().named() {
        if name.contains("lora_B") {
            let _ = tensor.fill_(0.3);
        }
    }
    lora.save(path, format).expect("it is writable");
    network
}

#[test]
fn adapters_are_scaled_and_renamed() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    write_adapters(&workshop.path("lora.safetensors"), LoraFormat::Diffusers);
    let plain = sample(&workshop, "teacher", "a", &["--prompt", "a cat"]);
    let with = |folder: &str, file: &str, scale: &str| {
        let more = ["--prompt", "a cat", "--lora", file, "--lora-scale", scale];
        sample(&workshop, "teacher", folder, &more)
    };
    assert_eq!(with("b", "lora.safetensors", "0"), plain);
    let whole = with("c", "lora.safetensors", "1");
    assert_ne!(whole, plain);

    let convert = |from: &str, to: &str, names: &str, more: &[&str]| {
        workshop.ddil(&[&["export", from, to, "--lora", names], more].concat())
    };
    let base = ["--base", "teacher"];
    convert("lora.safetensors", "kohya.safetensors", "kohya", &base).succeeded();
    assert_eq!(with("d", "kohya.safetensors", "1"), whole);
    let names = weights::read_all(workshop.path("kohya.safetensors"))?;
    assert!(names.keys().all(|name| name.starts_with("lora_unet_")), "{names:?}");
    convert("kohya.safetensors", "back.safetensors", "diffusers", &base).succeeded();
    let [there, back] = ["lora.safetensors", "back.safetensors"]
        .map(|file| weights::read_all(workshop.path(file)).expect("it was written"));
    assert_eq!(there, back);

    let mut with_text: Vec<_> = there.into_iter().collect();
    for part in ["lora_A", "lora_B"] {
        let name =
            format!("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.{part}.weight");
        with_text.push((name, Tensor::zeros([8, 8], (Kind::Float, Device::Cpu))));
    }
    weights::save(&with_text, workshop.path("with_text.safetensors"), &BTreeMap::new())?;
    let ended = convert("with_text.safetensors", "x.safetensors", "kohya", &base).succeeded();
    assert!(ended.stderr.contains("2 tensors are adapters of text encoders"), "{}", ended.stderr);
    fs::remove_file(workshop.path("x.safetensors"))?;

    convert("lora.safetensors", "back.safetensors", "kohya", &base).refused(&["--force"]);
    convert("lora.safetensors", "x.safetensors", "peft", &base).refused(&["--lora", "peft"]);
    convert("lora.safetensors", "x.safetensors", "kohya", &[]).refused(&["--base"]);
    workshop.ddil(&["export", "lora.safetensors", "x.safetensors"]).refused(&["--lora"]);

    // Adapters of layers that this network does not have.
    let tensors = [(
        "unet.other.lora_A.weight".to_owned(),
        Tensor::zeros([2, 8], (Kind::Float, Device::Cpu)),
    )];
    weights::save(&tensors, workshop.path("other.safetensors"), &BTreeMap::new())?;
    let arguments = ["sample", "teacher", "--prompt", "a", "--lora", "other.safetensors"];
    workshop.ddil(&arguments).refused(&["other.safetensors", "unet.other.lora_A.weight"]);
    Ok(())
}

fn values(path: &Path) -> Vec<(String, Vec<f64>)> {
    let all = weights::read_all(path).expect("it was written").into_iter();
    let flat = |t: Tensor| Vec::try_from(t.to_kind(Kind::Double).flatten(0, -1)).expect("numbers");
    all.map(|(name, tensor)| (name, flat(tensor))).collect()
}

const PROMPT: [&str; 2] = ["--prompt", "a cat"];

/// `ddil export teacher OUT ..`.
fn export(workshop: &Workshop, out: &str, more: &[&str]) -> Ended {
    workshop.ddil(&[&["export", "teacher", out], more].concat())
}

#[test]
fn a_model_is_exported_unchanged() {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let out = export(&workshop, "same", &[]).succeeded();
    assert!(out.stdout.contains("UNet2DConditionModel"), "{}", out.stdout);
    let [same, teacher] = ["same", "teacher"].map(|folder| workshop.path(folder).join(UNET));
    assert_eq!(values(&same), values(&teacher));
    let picture = sample(&workshop, "teacher", "a", &PROMPT);
    assert_eq!(sample(&workshop, "same", "b", &PROMPT), picture);

    // Shards become one file again, and no list of them is left.
    export(&workshop, "shards", &["--max-shard-size", "20KB"]).succeeded();
    let index = "unet/diffusion_pytorch_model.safetensors.index.json";
    assert!(workshop.path("shards").join(index).is_file());
    workshop.ddil(&["import", "shards", "joined"]).succeeded();
    assert!(!workshop.path("joined").join(index).exists());
    assert_eq!(sample(&workshop, "joined", "c", &PROMPT), picture);
}

#[test]
fn a_model_is_exported_in_half_precision_and_imported_again() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let half = ["--dtype", "float16", "--variant", "fp16", "--max-shard-size", "20KB"];
    export(&workshop, "half", &half).succeeded();
    let index = workshop.path("half/unet/diffusion_pytorch_model.safetensors.index.fp16.json");
    let tensors = weights::read_all(&index)?;
    assert!(tensors.values().all(|tensor| tensor.kind() == Kind::Half));
    let files = WeightFiles { variant: Some("fp16"), ..WeightFiles::TRANSFORMERS };
    assert!(files.find(workshop.path("half/text_encoder_2")).is_ok());
    // The only variant is read without being named.
    assert_eq!(sample(&workshop, "half", "of_half", &["--prompt", "a"]).len(), 1);

    workshop.ddil(&["import", "half", "back"]).succeeded();
    let rounded = |values: Vec<(String, Vec<f64>)>| -> Vec<Vec<f32>> {
        let half = |v: &f64| half_of(*v);
        values.iter().map(|(_, values)| values.iter().map(half).collect()).collect()
    };
    let back = values(&workshop.path("back").join(UNET));
    let exact: Vec<Vec<f32>> =
        back.iter().map(|(_, values)| values.iter().map(|v| *v as f32).collect()).collect();
    assert_eq!(exact, rounded(values(&workshop.path("teacher").join(UNET))));
    assert_eq!(sample(&workshop, "back", "a", &PROMPT).len(), 1);

    // Without a requested kind, it keeps its own.
    workshop.ddil(&["export", "half", "kept"]).succeeded();
    for file in [UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    {
        let kept = weights::read_all(workshop.path("kept").join(file))?;
        assert!(kept.values().all(|tensor| tensor.kind() == Kind::Half), "{file}");
    }
    Ok(())
}

#[test]
fn a_network_is_exported_as_one_file() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let one = ["--format", "single-file-unet", "--dtype", "bfloat16"];
    export(&workshop, "unet.safetensors", &one).succeeded();
    let kinds = weights::read_all(workshop.path("unet.safetensors"))?;
    assert!(kinds.values().all(|tensor| tensor.kind() == Kind::BFloat16));
    Ok(())
}

#[test]
fn invalid_exports_are_refused() {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let export = |out: &str, more: &[&str]| export(&workshop, out, more);
    export("same", &[]).succeeded();
    export("same", &[]).refused(&["same", "not empty"]);
    export("same", &["--force"]).succeeded();
    export("teacher", &["--force"]).refused(&["another folder than the source"]);
    export("captions", &["--force"]).refused(&["captions", "model_index.json"]);
    export("x", &["--dtype", "int8"]).refused(&["--dtype", "int8", "bfloat16"]);
    export("x", &["--format", "onnx"]).refused(&["--format", "onnx"]);
    export("x", &["--max-shard-size", "big"]).refused(&["--max-shard-size", "5GB"]);
    assert!(!workshop.path("x").exists());
}

/// What half precision makes of a number, by way of libtorch.
fn half_of(value: f64) -> f32 {
    Tensor::from(value)
        .to_kind(Kind::Float)
        .to_kind(Kind::Half)
        .to_kind(Kind::Float)
        .double_value(&[]) as f32
}

#[test]
fn a_run_exports_its_averaged_student() {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let run = workshop.complete("distill", "run", &[]);
    workshop.ddil(&["export", "runs/run", "student"]).succeeded();
    let [there, here] = [run.join("export").join(UNET), workshop.path("student").join(UNET)];
    assert_eq!(values(&there), values(&here));
    let scheduler = json(&workshop.path("student/scheduler/scheduler_config.json"));
    assert!(scheduler["ddil_timesteps"].is_array(), "{scheduler}");
    let [of_run, of_copy] = [("runs/run", "a"), ("student", "b")].map(|(model, folder)| {
        let more = ["--steps", "2", "--prompt", "a cat", "--threads", "1", "--folder", folder];
        workshop.ddil(&[&["sample", model], &more[..]].concat()).succeeded();
        pixels(&workshop.path(folder).join("000000.png"))
    });
    assert_eq!(of_run, of_copy);
    fs::create_dir_all(workshop.path("young/checkpoints")).expect("it is writable");
    fs::write(workshop.path("young/status.json"), "{}").expect("it is writable");
    workshop.ddil(&["export", "young", "x"]).refused(&["young", "no checkpoint yet"]);
}

/// From the same noise, with the same conditioning, including sizes.
#[test]
fn a_grid_shows_what_the_exported_student_draws() {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let run = workshop.complete("distill", "run", &["output.prompts=[\"a cat\"]"]);
    let grids = snapshot(&run.join("samples")).into_keys();
    let grids: Vec<Vec<u8>> = grids.map(|name| pixels(&run.join("samples").join(name))).collect();
    assert_eq!(grids.len(), 1);
    let drawn = ["sample", "runs/run", "--seed", "3", "--threads", "1", "--prompt", "a cat"];
    workshop.ddil(&[&drawn[..], &["--output", "drawn.png"]].concat()).succeeded();
    assert_alike(&grids, &[pixels(&workshop.path("drawn.png"))]);
}

#[test]
fn a_student_of_another_size_records_it_and_is_sampled_at_it() {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let smaller = "data.resolution=12";
    let run = workshop.complete("distill", "whole", &[smaller]);
    // A number and no list: diffusers' pipeline of XL multiplies it.
    assert_eq!(json(&run.join("export/unet/config.json"))["sample_size"], 6);
    let drawn = sample(&workshop, "runs/whole", "a", &["--prompt", "a cat"]);
    assert_eq!(drawn[0].len(), 3 * 12 * 12);
    let lora = "student.lora={ rank = 2 }";
    workshop.complete("distill", "thin", &[smaller, lora]);
    // The base was made for another size.
    assert_eq!(json(&workshop.path("teacher/unet/config.json"))["sample_size"], 8);
    let drawn = sample(&workshop, "runs/thin", "b", &["--prompt", "a cat"]);
    assert_eq!(drawn[0].len(), 3 * 12 * 12);
}

#[test]
fn an_adapter_is_exported_under_either_naming() {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    workshop.complete("distill", "thin", &["student.lora={ rank = 2, alpha = 2.0 }"]);
    workshop
        .ddil(&["export", "runs/thin", "x.safetensors"])
        .refused(&["contains adapters", "--lora"]);
    let convert = ["export", "runs/thin", "kohya.safetensors", "--lora", "kohya"];
    workshop.ddil(&convert).succeeded();
    let names = weights::read_all(workshop.path("kohya.safetensors")).expect("it was written");
    assert!(names.keys().all(|name| name.starts_with("lora_unet_")), "{names:?}");
    let found = workshop.ddil(&["inspect", "runs/thin/export"]).succeeded().stdout;
    assert!(found.contains("class: StableDiffusionPipeline"), "{found}");
}

#[test]
fn an_import_lists_all_problems_and_writes_nothing() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let teacher = workshop.path("teacher");
    let file = teacher.join(UNET);
    let mut tensors: Vec<_> = weights::read_all(&file)?
        .into_iter()
        .map(|(name, tensor)| (name, tensor.copy()))
        .filter(|(name, _)| name != "conv_in.bias")
        .collect();
    tensors.push(("conv_extra.weight".to_owned(), Tensor::zeros([1], (Kind::Float, Device::Cpu))));
    for (name, tensor) in &mut tensors {
        if name == "conv_out.bias" {
            *tensor = Tensor::zeros([5], (Kind::Float, Device::Cpu));
        }
    }
    weights::save(&tensors, &file, &BTreeMap::new())?;
    fs::rename(
        teacher.join("text_encoder/model.safetensors"),
        teacher.join("text_encoder/pytorch_model.bin"),
    )?;
    fs::remove_file(teacher.join("tokenizer/vocab.json"))?;
    let words = [
        "conv_in.bias",
        "conv_extra.weight",
        "conv_out.bias",
        "pytorch_model.bin",
        "safe_serialization=True",
        "vocab.json",
    ];
    workshop.ddil(&["import", "teacher", "out"]).refused(&words);
    assert!(!workshop.path("out").exists());
    workshop.ddil(&["import", "nowhere", "out"]).refused(&["nowhere", "model_index.json"]);
    fs::write(workshop.path("model.ckpt"), "pickle")?;
    workshop.ddil(&["import", "model.ckpt", "out"]).refused(&["model.ckpt", "from_single_file"]);
    let left = fs::read_dir(workshop.path("."))?.filter(|entry| {
        entry.as_ref().is_ok_and(|e| e.file_name().to_string_lossy().starts_with(".tmp-"))
    });
    assert_eq!(left.count(), 0);
    Ok(())
}

#[test]
fn a_network_alone_is_given_a_scheduler_or_other_parts() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let guided = ddil_models::UNet2DConditionConfig {
        time_cond_proj_dim: Some(8),
        ..unet(Family::StableDiffusion)
    };
    let network = ddil_models::Model::UNet2DCondition(guided.build(Placement::default(), 1)?);
    network.save_to_folder(workshop.path("alone/unet"))?;
    let ended = workshop.ddil(&["import", "alone", "usual"]).succeeded();
    assert!(ended.stderr.contains("--scheduler-from"), "{}", ended.stderr);
    let scheduler = json(&workshop.path("usual/scheduler/scheduler_config.json"));
    assert_eq!(scheduler["beta_schedule"], "scaled_linear");
    workshop.ddil(&["sample", "usual", "--prompt", "a"]).refused(&["text_encoder", "vae"]);

    // The properties of the teacher's network do not apply to this one.
    fs::write(workshop.path("teacher/ddil.json"), "{}")?;
    workshop.ddil(&["import", "alone", "whole", "--parts-from", "teacher"]).succeeded();
    assert!(!workshop.path("whole/ddil.json").exists());
    let index = json(&workshop.path("whole/model_index.json"));
    // With DDIM: diffusers' LatentConsistencyModelPipeline can be called with LCMScheduler only.
    assert_eq!(index["_class_name"], "StableDiffusionPipeline");
    let lcm = r#"{"_class_name": "LCMScheduler"}"#;
    fs::write(workshop.path("scheduler_config.json"), lcm)?;
    let scheduler = ["--scheduler-from", "scheduler_config.json"];
    let parts = ["import", "alone", "consistent", "--parts-from", "teacher"];
    workshop.ddil(&[&parts[..], &scheduler].concat()).succeeded();
    let index = json(&workshop.path("consistent/model_index.json"));
    assert_eq!(index["_class_name"], "LatentConsistencyModelPipeline");
    assert_eq!(index["scheduler"][1], "LCMScheduler");
    assert_eq!(sample(&workshop, "whole", "a", &["--prompt", "a cat"]).len(), 1);
    workshop
        .ddil(&["sample", "whole", "--prompt", "a", "--guidance-scale", "40"])
        .refused(&["40", "1..=16"]);

    workshop.write_teacher("pixels", Some(3));
    let words = ["scheduler", "no default scheduler"];
    workshop.ddil(&["import", "pixels/unet", "out"]).refused(&words);
    let from = ["import", "pixels/unet", "out", "--scheduler-from", "pixels"];
    workshop.ddil(&from).succeeded();
    workshop.ddil(&["import", "teacher", "x", "--parts-from", "whole"]).refused(&["--parts-from"]);
    Ok(())
}

#[test]
fn inspect_reads_headers_and_names_the_solver_that_is_replaced() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let file = workshop.path("teacher/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&file)?.replace("DDIMScheduler", "EulerDiscreteScheduler");
    fs::write(&file, text)?;
    let text = workshop.ddil(&["inspect", "teacher", "--json"]).succeeded().stdout;
    let found: Value = serde_json::from_str(&text)?;
    assert_eq!(found["class"], "StableDiffusionXLPipeline");
    assert_eq!(found["replaces_scheduler"], "EulerDiscreteScheduler");
    assert_eq!(found["solver"]["method"]["kind"], "euler");
    assert_eq!(found["latent_shape"], serde_json::json!([4, 8, 8]));
    assert_eq!(found["prediction_type"], "epsilon");
    let parts = found["parts"].as_object().ok_or("parts")?;
    assert_eq!(parts.len(), 7);
    let own = unet(Family::StableDiffusionXl).parameter_shapes()?;
    let own: i64 = own.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    assert_eq!(parts["unet"]["parameters"], own);
    let sum: u64 = parts.values().filter_map(|part| part["parameters"].as_u64()).sum();
    assert_eq!(found["parameters"], sum);
    Ok(())
}

#[test]
fn a_dry_run_plans_memory_before_it_looks_at_weights() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let dry = ["distill", "distill.toml", "--dry-run"];
    let ended = workshop.ddil(&dry).succeeded();
    for words in ["# memory on cpu, float32", "held throughout", "# checked: ", "4 updates"] {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
    fs::remove_file(workshop.path("teacher").join(UNET))?;
    let ended = workshop.ddil(&dry);
    assert!(ended.stdout.contains("peak, about"), "{}", ended.stdout);
    assert!(!ended.stdout.contains("checked"), "{}", ended.stdout);
    ended.refused(&["teacher/unet", "diffusion_pytorch_model.safetensors"]);
    assert!(!workshop.path("runs").exists());
    Ok(())
}

/// Stable Diffusion 1.5 from its settings: every weight is counted, in negligible time.
#[test]
fn stable_diffusion_is_planned_from_its_settings() -> TestResult {
    let workshop = Workshop::new();
    write_text_teacher(&workshop.path("sd15"), Family::StableDiffusion);
    let config = ddil_models::UNet2DConditionConfig::sd15();
    fs::write(workshop.path("sd15/unet/config.json"), config.to_json())?;
    let mut plan = ddil_trainer::config::DistillConfig::default();
    plan.teacher.path = workshop.path("sd15");
    plan.data.batch_size = 4;
    let started = std::time::Instant::now();
    let planned = MemoryPlan::of(&plan)?;
    let seconds = started.elapsed().as_secs_f64();
    assert!(seconds < 5.0, "{seconds} s in a build without optimization");
    assert_eq!(planned.sample_shape, [4, 64, 64]);
    // Teacher, student, its gradients, two moments, two averages.
    let weights: u64 = planned.held.iter().filter_map(|row| row.values).sum();
    assert_eq!(weights, 7 * 859_520_964);
    plan.data.batch_size = 8;
    let twice = MemoryPlan::of(&plan)?.peak();
    assert!(twice > planned.peak());
    plan.run.activation_checkpointing = true;
    let recomputed = MemoryPlan::of(&plan)?;
    assert_eq!(recomputed.held, planned.held);
    let activations = |plan: &MemoryPlan| plan.peak() - plan.held_bytes();
    assert!(2 * activations(&recomputed) < twice - planned.held_bytes());
    assert_eq!(planned.on_disk, []);

    // Beyond its memory a buffer is on disk: latents in half precision, and a prompt in single.
    let mut buffer = ddil_core::BufferConfig::default().with(|config| config.capacity = 10_000);
    let spill = ddil_core::SpillConfig::new("", 1 << 40);
    buffer.spill = Some(spill);
    plan.mixing.student.policy = ddil_core::StudentPolicy::Buffer { new_fraction: 0.25, buffer };
    let planned = MemoryPlan::of(&plan)?;
    let state = 4 * 64 * 64 * 2 + 8 * 768 * 4;
    assert_eq!(planned.on_disk[0].bytes, 10_000 * state - (512 << 20));
    assert!(planned.held.iter().any(|row| row.bytes == 512 << 20));
    let said = planned.to_string();
    assert!(
        said.contains("on disk: spilled states of the buffer") && said.contains("36.6 MB"),
        "{said}"
    );
    Ok(())
}
