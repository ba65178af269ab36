//! Invalid input is refused with a message: what was found, where, and what is allowed. Nothing is written.

use std::fs;
use std::path::Path;

use ddil_models::{Model, NetworkConfig, Placement};

use crate::support::{TestResult, Workshop, arguments, snapshot, write_pictures};

/// Each setting is refused with these words, and no run folder is created.
#[track_caller]
pub(crate) fn each_is_refused(workshop: &Workshop, verb: &str, cases: &[(&[&str], &[&str])]) {
    for (settings, words) in cases {
        let ended = workshop.ddil(&arguments(verb, "refused", settings));
        assert_ne!(ended.code, Some(0), "{settings:?} was taken");
        ended.refused(words);
        assert!(!workshop.path("runs").exists(), "{settings:?} left a run folder");
    }
}

#[test]
fn unknown_keys() -> TestResult {
    let workshop = Workshop::new();
    each_is_refused(
        &workshop,
        "train",
        &[
            (&["train.update=3"], &["--set train.update=3", "did you mean `updates`?"]),
            (&["optimiser.beta1=0.9"], &["unknown key `optimiser`", "`optimizer`"]),
            (&["student.stages=[4]"], &["unknown key `student`"]),
        ],
    );
    let config = fs::read_to_string(workshop.path("train.toml"))?;
    fs::write(workshop.path("train.toml"), config.replace("warmup_steps", "warmup_step"))?;
    let ended = workshop.ddil(&["train", "train.toml"]);
    ended.refused(&["train.toml:", "`learning_rate.warmup_step`", "`warmup_steps`"]);
    Ok(())
}

#[test]
fn overrides_that_cannot_be_read() {
    each_is_refused(
        &Workshop::new(),
        "train",
        &[
            (&["train.updates"], &["--set train.updates", "key=value"]),
            (&["=3"], &["--set =3", "empty"]),
            (&["train.updates.x=1"], &["--set train.updates.x=1"]),
            (
                &["train.updates=many"],
                &["--set train.updates=many", "train.updates", "a whole number"],
            ),
            (&["train.updates=-4"], &["train.updates", "-4"]),
            (&["data.kind=image_folders"], &["data.kind", "did you mean `image_folder`?"]),
        ],
    );
}

#[test]
fn invalid_values() {
    each_is_refused(
        &Workshop::new(),
        "train",
        &[
            (&["data.batch_size=0"], &["data.batch_size", "at least 1"]),
            (&["data.batch_size=25"], &["data.batch_size", "at most 24"]),
            (&["learning_rate.peak=-1.0"], &["learning_rate.peak", "-1", "not negative"]),
            (&["learning_rate.peak=nan"], &["learning_rate.peak", "NaN"]),
            (&["optimizer.beta1=1.0"], &["optimizer.beta1", "below 1"]),
            (&["optimizer.max_grad_norm=0.0"], &["optimizer.max_grad_norm", "above 0"]),
            (&["ema.decay=1.5"], &["ema.decay", "from 0 to 1"]),
            (&["train.updates=0"], &["train.updates", "at least 1"]),
            (&["train.label_dropout=1.5"], &["train.label_dropout", "1.5"]),
            (&["train.sample_steps=1001"], &["train.sample_steps", "1..=1000"]),
            (&["train.sample_guidance_scale=nan"], &["train.sample_guidance_scale", "NaN"]),
            (&["output.checkpoint_interval=0"], &["output.checkpoint_interval", "at least 1"]),
            (&["output.checkpoints.keep_last=0"], &["output.checkpoints.keep_last"]),
            (&["schedule={ family = \"vp\", beta_end = 2.0 }"], &["beta_end", "2"]),
            (&["run.name=../elsewhere"], &["run.name", "without a path"]),
            (&["run.precision=float16"], &["run.precision", "float32"]),
            (&["run.device=tpu"], &["run.device", "tpu", "`cpu`"]),
            (&["run.device=cuda:x"], &["run.device", "cuda:x"]),
        ],
    );
}

#[test]
fn a_missing_gpu() {
    if tch::Cuda::device_count() > 0 {
        eprintln!("skipped: there is a GPU here");
        return;
    }
    let cases: &[(&[&str], &[&str])] = &[(&["run.device=cuda"], &["run.device", "is cuda"])];
    each_is_refused(&Workshop::new(), "train", cases);
}

#[test]
fn a_model_that_does_not_fit_the_data() {
    let levels = "model.block_out_channels=[8, 8, 8, 8, 8]";
    let down = "model.down_block_types=[\"DownBlock2D\", \"DownBlock2D\", \"DownBlock2D\", \
                \"DownBlock2D\", \"DownBlock2D\"]";
    let up = "model.up_block_types=[\"UpBlock2D\", \"UpBlock2D\", \"UpBlock2D\", \"UpBlock2D\", \
              \"UpBlock2D\"]";
    each_is_refused(
        &Workshop::new(),
        "train",
        &[
            (&["model.in_channels=3"], &["model.in_channels", "3, 1", "the channels of the data"]),
            (&["model.num_class_embeds=7"], &["model.num_class_embeds", "7", "expected 4"]),
            (&["model.sample_size=32"], &["model.sample_size", "[32, 32]", "[8, 8]"]),
            (&["model.norm_num_groups=5"], &["norm_num_groups"]),
            (&["model.class_embed_type=identity"], &["model.class_embed_type", "no value"]),
            (&[levels, down, up], &["model.block_out_channels", "5 levels", "8x8"]),
        ],
    );
}

#[test]
fn invalid_adapters() {
    let progressive = "objective={ method = \"progressive\", substeps = 2 }";
    let lora = "student.lora={ rank = 2 }";
    let model = "student.model={ in_channels = 1, out_channels = 1 }";
    each_is_refused(
        &Workshop::with_teacher(),
        "distill",
        &[
            (&["student.lora={ rank = 0 }"], &["student.lora.rank", "1..=16384"]),
            (&["student.lora={ alpha = 0.0 }"], &["student.lora.alpha", "above 0"]),
            (&["student.lora={ alpha = inf }"], &["student.lora.alpha", "inf", "finite"]),
            (&["student.lora={ ranks = 2 }"], &["did you mean `rank`?"]),
            (
                &["student.lora={ targets = \"all\" }"],
                &["targets", "all", "\"default\" or a list of names"],
            ),
            (&["student.lora={ targets = [] }"], &["student.lora", "targets", "empty", "to_q"]),
            (
                &["student.lora={ targets = [\"to_q\", \"ff.net.2\"] }"],
                &["student.lora", "ff.net.2, which matches no layer", "conv_shortcut"],
            ),
            (&["student.lora={ export = \"both\" }"], &["export", "both", "`adapter`", "`merged`"]),
            (&[lora, model], &["student.lora", "student.model", "the teacher's own network"]),
            (
                &[progressive, lora, "student.stages=[4, 2]"],
                &["student.stages", "[4, 2]", "with student.lora", "base"],
            ),
        ],
    );
}

#[test]
fn missing_data() -> TestResult {
    let workshop = Workshop::new();
    fs::create_dir(workshop.path("empty"))?;
    fs::create_dir(workshop.path("mixed"))?;
    fs::write(workshop.path("mixed/one.png"), "no picture")?;
    write_pictures(&workshop.path("sizes"), 1, 8);
    write_pictures(&workshop.path("sizes16"), 1, 16);
    fs::copy(workshop.path("sizes16/class0/03.png"), workshop.path("sizes/class0/03.png"))?;
    each_is_refused(
        &workshop,
        "train",
        &[
            (&["data.path=nowhere"], &["nowhere", "No such file"]),
            (&["data.path=empty"], &["empty", "no file ending in .png"]),
            (&["data.path=mixed"], &["one.png", "PNG"]),
            (
                &["data.path=sizes"],
                &[
                    "03.png",
                    "16x16",
                    "all grey, 8x8 pixels, or a height and width to scale them to",
                ],
            ),
        ],
    );
    Ok(())
}

#[test]
fn fashion_mnist_that_is_missing_or_changed() -> TestResult {
    let workshop = Workshop::new();
    fs::create_dir(workshop.path("datasets"))?;
    let settings = ["data.kind=fashion_mnist", "data.path=datasets"];
    each_is_refused(
        &workshop,
        "train",
        &[(&settings, &["no Fashion-MNIST in datasets", "make setup", "DDIL_DATA"])],
    );
    fs::write(workshop.path("datasets/train-images-idx3-ubyte"), [0, 0, 8, 3, 0, 0, 0, 0])?;
    let words: &[&str] = &["train-images-idx3-ubyte", "SHA-256", "expected c59f468a"];
    each_is_refused(&workshop, "train", &[(&settings, words)]);

    // Found by the environment instead of the config.
    let config = fs::read_to_string(workshop.path("train.toml"))?;
    let lines: Vec<&str> = config.lines().filter(|line| !line.starts_with("path =")).collect();
    let config = lines.join("\n");
    fs::write(workshop.path("train.toml"), config)?;
    let mut command = workshop.command(&arguments("train", "refused", &[settings[0]]));
    let stderr = command.env("DDIL_DATA", workshop.path("runs_not")).output()?.stderr;
    let stderr = String::from_utf8(stderr)?;
    assert!(stderr.contains("no Fashion-MNIST in") && stderr.contains("runs_not"), "{stderr}");
    Ok(())
}

#[test]
fn invalid_distillations() {
    let priors = "mixing.priors={ kind = \"constant\", priors = { forward = 0.5, student = 0.4 } }";
    let embedded = "teacher.guidance={ kind = \"embedded\", min = 0.0, max = 3.0 }";
    each_is_refused(
        &Workshop::with_teacher(),
        "distill",
        &[
            (&["student.stages=[8, 3]"], &["student.stages", "[8, 3]", "substeps = 2"]),
            (&["student.stages=[]"], &["student.stages", "at least one"]),
            (&["student.stages=[0]"], &["student.stages", "at least 1"]),
            (&["student.stages=[2000]"], &["2000", "1000"]),
            (&["student.updates_per_stage=0"], &["student.updates_per_stage", "at least 1"]),
            (&["objective.substeps=0"], &["substeps", "0"]),
            (&["objective.method=progresive"], &["objective", "did you mean `progressive`?"]),
            (&["teacher.guidance.scale=-1.0"], &["guidance.scale", "-1"]),
            (&[embedded], &["teacher.guidance", "embedded", "no guidance weight"]),
            (&[priors], &["mixing.priors", "with sum 1"]),
            (&["mixing.student.policy.refresh_fraction=1.5"], &["refresh_fraction", "1.5"]),
            (&["thresholding.low=2.0"], &["low", "2"]),
            (&["teacher.path="], &["teacher.path", "the teacher's folder"]),
            (&["learning_rate.end=1.0"], &["learning_rate.end", "not above the peak"]),
        ],
    );
}

#[test]
fn methods_with_unsuitable_settings() {
    let lcm = "objective={ method = \"lcm\", num_ddim_timesteps = 10 }";
    let self_distillation =
        "objective={ method = \"lcm\", num_ddim_timesteps = 10, solver = \"target\" }";
    let dmd2 = "objective={ method = \"dmd2\" }";
    let range = "teacher.guidance={ kind = \"cfg_range\", min = 0.0, max = 3.0 }";
    let buffer = "mixing.student.policy={ kind = \"buffer\", buffer = { capacity = 40 } }";
    let small = "mixing.student.policy={ kind = \"buffer\", buffer = { capacity = 3 } }";
    let mixing = "mixing.thresholding={ kind = \"clamp\", low = -1.0, high = 1.0 }";
    each_is_refused(
        &Workshop::with_teacher(),
        "distill",
        &[
            (&[lcm], &["policy.kind", "fresh or buffer"]),
            (&[lcm, buffer, "student.stages=[11]"], &["11", "10"]),
            (&[lcm, buffer, "student.stages=[4, 2]"], &["student.stages", "only progressive"]),
            (&[self_distillation, buffer], &["teacher.guidance", "cfg", "solver"]),
            (&[dmd2, "student.stages=[3]"], &["3", "1000"]),
            (&[dmd2, "student.stages=[4, 2]"], &["student.stages", "only progressive"]),
            (&[dmd2, range], &["teacher.guidance", "cfg_range", "critic"]),
            (&[dmd2, "critic.learning_rate.peak=-1.0"], &["critic.learning_rate.peak", "-1"]),
            (&["critic.learning_rate.peak=0.1"], &["critic", "progressive trains no critic"]),
            (&[small], &["capacity", "3", "4"]),
            (&[mixing], &["mixing.thresholding", "[thresholding]"]),
            (&["thresholding_places.taecher=true"], &["did you mean `teacher`?"]),
        ],
    );
}

#[test]
fn students_that_do_not_fit_their_teacher() {
    let model = |changes: &str| {
        let text = format!(
            "student.model={{ in_channels = 1, out_channels = 1, block_out_channels = [8, 8], \
             layers_per_block = 1, norm_num_groups = 4, num_class_embeds = 4, \
             down_block_types = [\"DownBlock2D\", \"AttnDownBlock2D\"], \
             up_block_types = [\"AttnUpBlock2D\", \"UpBlock2D\"], {changes} }}"
        );
        let text: &'static str = text.leak();
        text
    };
    each_is_refused(
        &Workshop::with_teacher(),
        "distill",
        &[
            (&[model("num_class_embeds = 5")], &["num_class_embeds"]),
            (&[model("flip_sin_to_cos = true, norm_eps = -1.0")], &["norm_eps"]),
        ],
    );
}

#[test]
fn teachers_that_do_not_fit() {
    let workshop = Workshop::with_teacher();
    workshop.write_teacher("unguided", None);
    write_pictures(&workshop.path("large"), 3, 16);
    write_pictures(&workshop.path("four"), 4, 8);
    each_is_refused(
        &workshop,
        "distill",
        &[
            (&["teacher.path=unguided"], &["teacher.guidance", "cfg", "without a null class"]),
            (&["data.path=large"], &["[1, 16, 16]", "[1, 8, 8]", "the teacher was trained on"]),
            (&["data.path=four"], &["class3", "classes of the teacher: class0, class1, class2"]),
        ],
    );
}

/// Writes over a part of a file.
fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> TestResult {
    let mut bytes = fs::read(path)?;
    change(&mut bytes);
    Ok(fs::write(path, bytes)?)
}

#[test]
fn teachers_that_are_missing_or_damaged() -> TestResult {
    let workshop = Workshop::with_teacher();
    let teacher = |name: &str| workshop.write_teacher(name, Some(3));
    let weights = "unet/diffusion_pytorch_model.safetensors";
    damage(&teacher("truncated").join(weights), |bytes| bytes.truncate(bytes.len() / 2))?;
    damage(&teacher("flipped").join(weights), |bytes| bytes[5] ^= 0x40)?;
    damage(&teacher("garbled").join(weights), |bytes| bytes[20] = b'}')?;
    damage(&teacher("other").join("unet/config.json"), |bytes| {
        let text = String::from_utf8_lossy(bytes).replace("\"norm_eps\"", "\"norm_epsilon\"");
        *bytes = text.into_bytes();
    })?;
    damage(&teacher("wider").join("unet/config.json"), |bytes| {
        let text: String = String::from_utf8_lossy(bytes).split_whitespace().collect();
        *bytes = text.replace("[8,16]", "[8,24]").into_bytes();
    })?;
    fs::remove_file(teacher("weightless").join(weights))?;
    fs::remove_file(teacher("cardless").join("scheduler/scheduler_config.json"))?;
    fs::create_dir(workshop.path("hollow"))?;
    each_is_refused(
        &workshop,
        "distill",
        &[
            (&["teacher.path=nowhere"], &["nowhere", "no model", "model_index.json"]),
            (&["teacher.path=hollow"], &["hollow", "no model", "model_index.json"]),
            (&["teacher.path=truncated"], &["truncated", "diffusion_pytorch_model.safetensors"]),
            (&["teacher.path=flipped"], &["flipped", "diffusion_pytorch_model.safetensors"]),
            (&["teacher.path=garbled"], &["garbled", "diffusion_pytorch_model.safetensors"]),
            (&["teacher.path=other"], &["other", "config.json", "norm_epsilon"]),
            (&["teacher.path=wider"], &["wider", "[24"]),
            (&["teacher.path=weightless"], &["weightless", "diffusion_pytorch_model"]),
            (&["teacher.path=cardless"], &["cardless", "scheduler_config.json"]),
        ],
    );
    Ok(())
}

#[test]
fn invalid_config_files() -> TestResult {
    let workshop = Workshop::new();
    fs::write(workshop.path("broken.toml"), "[run]\nseed = = 3\n")?;
    workshop.ddil(&["train", "nowhere.toml"]).refused(&["nowhere.toml", "No such file"]);
    workshop.ddil(&["train", "broken.toml"]).refused(&["broken.toml:2:"]);
    workshop.ddil(&["train"]).refused(&["CONFIG"]);
    workshop
        .ddil(&["train", "distill.toml"])
        .refused(&["distill.toml", "is a config for `ddil distill`"]);
    Ok(())
}

#[test]
fn a_folder_with_a_run_is_left_unchanged() -> TestResult {
    let workshop = Workshop::with_teacher();
    let run = workshop.complete("train", "taken", &[]);
    let before = snapshot(&run);
    let path = run.display().to_string();

    let again = workshop.ddil(&arguments("train", "taken", &[]));
    again.refused(&[&path, "already exists", "resume the run in it"]);
    let other = ["train", "train.toml", "--set", "run.seed=9", "--resume", &path];
    workshop.ddil(&other).refused(&[&path, "other settings", "run.seed: 3 there, 9 here"]);
    workshop
        .ddil(&["distill", "--resume", &path])
        .refused(&["config.toml", "is a config for `ddil train`"]);
    workshop.ddil(&["train", "--resume", "data"]).refused(&[
        "data",
        "is not a run folder",
        "config.toml",
    ]);

    // Its data have gone: refused, and the run stays as it is.
    fs::rename(workshop.path("data"), workshop.path("elsewhere"))?;
    workshop.ddil(&["train", "--resume", &path]).refused(&["data", "No such file"]);
    assert!(snapshot(&run) == before, "something in the run folder has changed");

    // A folder with other contents is never written to.
    fs::rename(workshop.path("elsewhere"), workshop.path("data"))?;
    fs::create_dir_all(workshop.run("thesis"))?;
    fs::write(workshop.run("thesis").join("thesis.tex"), "years of work")?;
    workshop.ddil(&arguments("train", "thesis", &[])).refused(&["thesis", "not empty"]);
    assert_eq!(snapshot(&workshop.run("thesis")).len(), 1);
    Ok(())
}

#[test]
fn a_text_conditioned_u_net_does_not_fit_a_pixel_pipeline() {
    let workshop = Workshop::with_teacher();
    let unet = crate::text_teacher::unet(crate::text_teacher::Family::StableDiffusion);
    let unet = unet.build(Placement::default(), 0).expect("the config is valid");
    let model = Model::UNet2DCondition(unet);
    model.save_to_folder(workshop.path("teacher").join("unet")).expect("it is writable");
    let words = ["UNet2DConditionModel in a DDIMPipeline", "text-to-image pipeline"];
    each_is_refused(&workshop, "distill", &[(&[], &words)]);
}
