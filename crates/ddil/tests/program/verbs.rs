//! `init`, `sample`, `inspect`, `evaluate`, and the way from data to a student.

use std::fs;
use std::path::Path;

use ddil::sample_file;
use ddil_data::{FashionMnist, read_image_folder};
use serde_json::Value;
use tch::Tensor;

use crate::support::{
    TestResult, Workshop, arguments, checkpoints, json, num_lines, snapshot, status,
};

/// Names and verbs of the presets that `ddil init` lists.
fn presets(workshop: &Workshop) -> Vec<(String, String)> {
    let listed = workshop.ddil(&["init"]).succeeded().stdout;
    let rows = listed.lines().filter(|line| line.contains("for `ddil ") && line.contains("`: "));
    rows.map(|row| {
        let name = row.split_whitespace().next().expect("it starts with the name").to_owned();
        let verb = row.split("`ddil ").nth(1).and_then(|rest| rest.split('`').next());
        (name, verb.expect("the verb follows").to_owned())
    })
    .collect()
}

#[test]
fn init_writes_presets_that_their_verbs_read() {
    let workshop = Workshop::new();
    let presets = presets(&workshop);
    assert!(presets.len() >= 2, "{presets:?}");
    for (name, verb) in presets {
        let file = format!("{name}.toml");
        let wrote = workshop.ddil(&["init", &name]).succeeded();
        assert!(wrote.stdout.contains(&format!("ddil {verb} {file}")), "{}", wrote.stdout);
        let mut arguments = vec![verb.as_str(), &file, "--dry-run"];
        if verb != "compare" {
            // Some are for a GPU, which need not be here either.
            arguments.extend(["--set", "run.device=cpu"]);
        }
        let checked = workshop.ddil(&arguments);
        // Read without an objection; data and teacher need not be here.
        let elsewhere = [
            "no Fashion-MNIST in",
            "contains no model",
            "No such file",
            "does not exist: it is in ddil",
        ];
        assert!(
            checked.code == Some(0) || elsewhere.iter().any(|words| checked.stderr.contains(words)),
            "{name}: {}",
            checked.stderr
        );
        assert!(!checked.stderr.contains("unknown key"), "{}", checked.stderr);
        assert!(!workshop.path("runs").exists(), "a dry run writes nothing");
    }
}

#[test]
fn init_overwrites_nothing() -> TestResult {
    let workshop = Workshop::new();
    let (name, _) = presets(&workshop).remove(0);
    let file = workshop.path(&format!("{name}.toml"));
    fs::write(&file, "mine")?;
    workshop.ddil(&["init", &name]).refused(&[&format!("{name}.toml"), "overwritten"]);
    assert_eq!(fs::read_to_string(&file)?, "mine");
    workshop.ddil(&["init", &name, "--output", "other.toml"]).succeeded();
    assert!(workshop.path("other.toml").is_file());
    let almost = &name[..name.len() - 1];
    workshop.ddil(&["init", almost]).refused(&[almost, &format!("did you mean `{name}`?")]);
    workshop.ddil(&["init", "zzz"]).refused(&["zzz", "lists all presets"]);
    Ok(())
}

#[test]
fn a_dry_run_checks_and_writes_nothing() {
    let workshop = Workshop::with_teacher();
    for verb in ["train", "distill"] {
        let mut arguments = arguments(verb, "dry", &[]);
        arguments.push("--dry-run");
        let ended = workshop.ddil(&arguments).succeeded();
        assert!(ended.stdout.contains("12 updates; nothing was written"), "{}", ended.stdout);
        assert!(!workshop.path("runs").exists());
    }
}

#[test]
fn from_data_to_a_student() -> TestResult {
    let workshop = Workshop::new();
    let teacher = workshop.complete("train", "teacher", &[]);
    let path = format!("teacher.path={}", teacher.display());
    let settings = [path.as_str(), "student.stages=[4, 2]", "student.updates_per_stage=6"];
    let student = workshop.complete("distill", "student", &settings);

    let card = json(&student.join("export/ddil.json"));
    assert_eq!((&card["method"], &card["guidance_scale"]), (&"progressive".into(), &2.0.into()));
    assert_eq!((&card["null_class"], &card["updates"]), (&3.into(), &12.into()));
    assert_eq!(card["class_names"], serde_json::json!(["class0", "class1", "class2"]));
    let scheduler = json(&student.join("export/scheduler/scheduler_config.json"));
    assert!(scheduler.to_string().contains("499"), "the student's own timesteps: {scheduler}");

    // Every line has all figures; in each stage the priors start with the data alone.
    assert_eq!(num_lines(&student), 12);
    let metrics = fs::read_to_string(student.join("metrics.jsonl"))?;
    for (i, line) in metrics.lines().enumerate() {
        let line: Value = serde_json::from_str(line)?;
        assert_eq!(line["step"], 1 + i as u64);
        assert!(line["loss"].is_f64() && line["grad_norm"].is_f64(), "{line}");
        if i % 6 == 0 {
            assert!(line["share_student"].is_null() && line["share_teacher"].is_null(), "{line}");
        }
    }
    assert!(metrics.contains("share_student") && metrics.contains("share_teacher"));
    assert_eq!(num_lines(&teacher), 12);
    for run in [&teacher, &student] {
        assert!(run.join("samples/step_0000012.png").is_file());
        assert!(run.join("config.toml").is_file() && run.join("run.log").is_file());
    }
    Ok(())
}

const BUFFER: &str = "mixing.student.policy={ kind = \"buffer\" }";

/// The values of a name in the lines of a run's metrics.
fn figures(run: &Path, name: &str) -> Result<Vec<f64>, Box<dyn std::error::Error>> {
    let mut found = Vec::new();
    for line in fs::read_to_string(run.join("metrics.jsonl"))?.lines() {
        found.extend(serde_json::from_str::<Value>(line)?[name].as_f64());
    }
    Ok(found)
}

#[test]
fn a_latent_consistency_model_carries_its_sampler() {
    let workshop = Workshop::with_teacher();
    let settings = ["objective={ method = \"lcm\", num_ddim_timesteps = 10 }", BUFFER];
    let student = workshop.complete("distill", "student", &settings);
    let scheduler = json(&student.join("export/scheduler/scheduler_config.json"));
    assert_eq!(scheduler["_class_name"], "LCMScheduler");
    assert_eq!(scheduler["original_inference_steps"], 10);
    assert_eq!(scheduler["ddil_timesteps"], serde_json::json!([999, 799, 499, 299]));
    let path = student.display().to_string();
    for steps in ["1", "4", "10"] {
        workshop.ddil(&["sample", &path, "--steps", steps, "-n", "3"]).succeeded();
    }
    workshop.ddil(&["sample", &path, "--steps", "11"]).refused(&["11", "10"]);
    workshop.ddil(&["sample", &path, "--eta", "0.5"]).refused(&["--eta", "DDIM"]);
}

/// As diffusers saves DPM-Solver, with a number that is not JSON.
#[test]
fn a_teacher_with_a_solver_is_sampled_with_it_and_distilled_without() -> TestResult {
    let workshop = Workshop::with_teacher();
    let file = workshop.path("teacher/scheduler/scheduler_config.json");
    let ddim = fs::read_to_string(&file)?;
    let with = |more: &str| {
        let text = ddim.replace("DDIMScheduler", "DPMSolverMultistepScheduler");
        let more = format!("{{\n  \"lambda_min_clipped\": -Infinity,\n  {more},");
        fs::write(&file, text.replacen('{', &more, 1))
    };
    let sampled = |name: &str, more: &[&str]| -> Result<Vec<u8>, std::io::Error> {
        let mut arguments = vec!["sample", "teacher", "-n", "3", "--steps", "6", "--output", name];
        arguments.extend(more);
        workshop.ddil(&arguments).succeeded();
        fs::read(workshop.path(name))
    };
    with("\"use_karras_sigmas\": true")?;
    let own = sampled("own.png", &[])?;
    assert!(own == sampled("named.png", &["--sampler", "dpm-solver", "--karras-sigmas"])?);
    assert!(own != sampled("evenly.png", &["--sampler", "dpm-solver"])?);
    assert!(own != sampled("uni-pc.png", &["--sampler", "uni-pc", "--karras-sigmas"])?);
    let by_ddim = sampled("ddim.png", &["--sampler", "ddim"])?;
    assert!(by_ddim != sampled("euler.png", &["--sampler", "euler"])?);

    with("\"algorithm_type\": \"sde-dpmsolver++\"")?;
    let refused = workshop.ddil(&["sample", "teacher", "--steps", "6"]);
    refused.refused(&["algorithm_type", "\"sde-dpmsolver++\"; expected dpmsolver++", "`ddim`"]);
    assert!(by_ddim == sampled("again.png", &["--sampler", "ddim"])?);
    let student = workshop.complete("distill", "student", &[]);
    let exported = json(&student.join("export/scheduler/scheduler_config.json"));
    assert_eq!(exported["_class_name"], "DDIMScheduler");
    assert!(exported["lambda_min_clipped"].is_null() && exported["algorithm_type"].is_null());

    let path = student.display().to_string();
    let refused = workshop.ddil(&["sample", &path, "--sampler", "euler"]);
    refused.refused(&["--sampler euler is for teachers"]);
    let refused = workshop.ddil(&["sample", &path, "--karras-sigmas"]);
    refused.refused(&["--karras-sigmas", "`dpm-solver`"]);
    let refused = workshop.ddil(&["sample", "teacher", "--sampler", "euler", "--eta", "0.5"]);
    refused.refused(&["--eta", "DDIM"]);
    Ok(())
}

#[test]
fn a_student_can_take_the_guidance_weight() -> TestResult {
    let workshop = Workshop::with_teacher();
    let settings = [
        "objective={ method = \"lcm\", num_ddim_timesteps = 10 }",
        BUFFER,
        "teacher.guidance={ kind = \"cfg_range\", min = 1.0, max = 3.0 }",
        "student.time_cond_proj_dim=16",
    ];
    let student = workshop.complete("distill", "student", &settings);
    assert_eq!(json(&student.join("export/unet/config.json"))["time_cond_proj_dim"], 16);
    assert_eq!(
        json(&student.join("export/ddil.json"))["guidance_range"],
        serde_json::json!([2.0, 4.0])
    );
    let path = student.display().to_string();
    let sampled = |name: &str, more: &[&str]| -> Result<Vec<u8>, std::io::Error> {
        let mut arguments = vec!["sample", &path, "-n", "6", "--output", name];
        arguments.extend(more);
        workshop.ddil(&arguments).succeeded();
        fs::read(workshop.path(name))
    };
    // The default guidance is the middle of the range.
    let unsaid = sampled("unsaid.png", &[])?;
    assert!(unsaid == sampled("three.png", &["--guidance-scale", "3"])?);
    assert!(unsaid != sampled("four.png", &["--guidance-scale", "4"])?);
    workshop.ddil(&["sample", &path, "--guidance-scale", "5"]).refused(&[
        "guidance_scale",
        "5",
        "2..=4",
    ]);
    Ok(())
}

#[test]
fn distribution_matching_trains_student_and_critic() -> TestResult {
    let workshop = Workshop::with_teacher();
    let settings = ["objective={ method = \"dmd2\", critic_ratio = 3 }"];
    let student = workshop.complete("distill", "student", &settings);
    let scheduler = json(&student.join("export/scheduler/scheduler_config.json"));
    assert_eq!(scheduler["_class_name"], "LCMScheduler");
    assert_eq!(scheduler["ddil_timesteps"], serde_json::json!([999, 749, 499, 249]));
    for name in ["loss", "critic_loss", "fake_score", "gan_real", "distribution_matching"] {
        assert_eq!(figures(&student, name)?.len(), 12, "every line has `{name}`");
    }
    // The student's own figures change with its updates, every third time.
    let losses = figures(&student, "loss")?;
    let changes = losses.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert_eq!(changes, 3, "{losses:?}");
    let critics = figures(&student, "critic_loss")?;
    assert!(critics.windows(2).all(|pair| pair[0] != pair[1]), "{critics:?}");
    let path = student.display().to_string();
    for steps in ["1", "2", "4", "8"] {
        workshop.ddil(&["sample", &path, "--steps", steps, "-n", "3"]).succeeded();
    }
    Ok(())
}

#[test]
fn a_student_may_be_its_own_teacher_and_smaller_than_its_teacher() {
    let workshop = Workshop::with_teacher();
    let itself = [
        "objective={ method = \"lcm\", num_ddim_timesteps = 10, solver = \"target\" }",
        BUFFER,
        "teacher.guidance={ kind = \"baked_in\" }",
    ];
    workshop.complete("distill", "itself", &itself);
    let smaller = "student.model={ in_channels = 1, out_channels = 1, layers_per_block = 1, \
                   block_out_channels = [4, 8], norm_num_groups = 4, num_class_embeds = 4, \
                   down_block_types = [\"DownBlock2D\", \"AttnDownBlock2D\"], \
                   up_block_types = [\"AttnUpBlock2D\", \"UpBlock2D\"] }";
    let settings = [smaller, "student.stages=[4, 2]", "student.updates_per_stage=6"];
    let said = workshop.ddil(&arguments("distill", "smaller", &settings)).succeeded().stderr;
    assert!(said.contains("the student starts from the teacher's weights"), "{said}");
    let config = json(&workshop.run("smaller").join("export/unet/config.json"));
    assert_eq!(config["block_out_channels"], serde_json::json!([4, 8]));
}

#[test]
fn thresholds_that_diffusers_lacks_stay_in_the_model_folder() -> TestResult {
    let workshop = Workshop::with_teacher();
    let settings = ["thresholding={ kind = \"clamp\", low = [-0.5], high = 0.25 }"];
    let student = workshop.complete("distill", "student", &settings);
    let scheduler = json(&student.join("export/scheduler/scheduler_config.json"));
    assert_eq!(scheduler["clip_sample"], false);
    let card = json(&student.join("export/ddil.json"));
    assert_eq!(card["thresholding"]["high"], 0.25);
    let path = student.display().to_string();
    workshop.ddil(&["sample", &path, "-n", "5", "--folder", "samples"]).succeeded();
    let images = read_image_folder(&workshop.path("samples"))?;
    let x0 = images.range(0, images.len())?.x0;
    assert!(x0.max().double_value(&[]) <= 0.26 && x0.min().double_value(&[]) >= -0.51);
    Ok(())
}

#[test]
fn the_range_of_a_folder_is_a_table_for_a_config() {
    let workshop = Workshop::new();
    let found = workshop.ddil(&["range", "data", "--margin", "0"]).succeeded().stdout;
    assert!(found.contains("[thresholding]\nkind = \"clamp\"\n"), "{found}");
    assert!(found.starts_with("# 24 samples of data, 1 channels"), "{found}");
    // Stripes of all grey levels but white: the ends of the data, and nothing beyond black and white.
    let found = workshop.ddil(&["range", "data"]).succeeded().stdout;
    let ends: Vec<f64> = found
        .lines()
        .filter_map(|line| line.split_once(" = [")?.1.trim_end_matches(']').parse().ok())
        .collect();
    assert!(
        matches!(ends[..], [low, high] if low >= -1.0 && high <= 1.0 && high - low > 1.5),
        "{found}"
    );
    workshop.ddil(&["range", "nowhere"]).refused(&["nowhere", "is not a folder"]);
    workshop.ddil(&["range", "data", "--quantile", "0.5"]).refused(&["quantile", "below 0.5"]);
}

#[test]
fn a_model_without_classes_is_trained_and_distilled() -> TestResult {
    let workshop = Workshop::new();
    let config = fs::read_to_string(workshop.path("train.toml"))?;
    fs::write(workshop.path("train.toml"), config.replace("num_class_embeds = 4\n", ""))?;
    // The labels that the folder's classes make are not used.
    let teacher = workshop.complete("train", "teacher", &[]);
    assert_eq!(json(&teacher.join("export/ddil.json"))["null_class"], Value::Null);
    let path = format!("teacher.path={}", teacher.display());
    let guided = workshop.ddil(&arguments("distill", "guided", &[&path]));
    guided.refused(&["teacher.guidance", "cannot be guided"]);
    let plain = "teacher.guidance={ kind = \"baked_in\" }";
    let student = workshop.complete("distill", "student", &[&path, plain]);
    workshop.ddil(&["sample", &student.display().to_string(), "-n", "3"]).succeeded();
    Ok(())
}

#[test]
fn a_teacher_without_a_null_class_cannot_be_guided() {
    let workshop = Workshop::new();
    let teacher = workshop.complete("train", "teacher", &["train.label_dropout=0.0"]);
    let path = format!("teacher.path={}", teacher.display());
    let guided = workshop.ddil(&arguments("distill", "guided", &[&path]));
    guided.refused(&["teacher.guidance", "without a null class"]);
    let path = teacher.display().to_string();
    workshop
        .ddil(&["sample", &path, "--guidance-scale", "3", "--steps", "2"])
        .refused(&["without a null class"]);
}

fn sample(workshop: &Workshop, output: &str, more: &[&str]) -> Vec<u8> {
    let mut arguments = vec!["sample", "teacher", "-n", "6", "--steps", "3", "--threads", "1"];
    arguments.extend(["--output", output]);
    arguments.extend(more);
    workshop.ddil(&arguments).succeeded();
    fs::read(workshop.path(output)).expect("it was written")
}

#[test]
fn samples_follow_from_the_seed() -> TestResult {
    let workshop = Workshop::with_teacher();
    let first = sample(&workshop, "a.png", &["--folder", "each"]);
    assert!(first.starts_with(b"\x89PNG"));
    assert_eq!(sample(&workshop, "b.png", &[]), first);
    assert_ne!(sample(&workshop, "c.png", &["--seed", "1"]), first);
    assert_ne!(sample(&workshop, "d.png", &["--guidance-scale", "3"]), first);
    let noisy = ["--eta", "1.0"];
    assert_eq!(sample(&workshop, "e.png", &noisy), sample(&workshop, "f.png", &noisy));
    assert_eq!(snapshot(&workshop.path("each")).len(), 6);
    assert_eq!(read_image_folder(&workshop.path("each"))?.image_shape(), [1, 8, 8]);
    Ok(())
}

#[test]
fn invalid_samples() {
    let workshop = Workshop::with_teacher();
    let refused = |more: &[&str], words: &[&str]| {
        let mut arguments = vec!["sample"];
        arguments.extend(more);
        workshop.ddil(&arguments).refused(words);
        assert!(!workshop.path("samples.png").exists(), "{more:?}");
    };
    refused(&["nowhere"], &["nowhere", "no model"]);
    refused(&["data"], &["data", "no model"]);
    refused(&["teacher", "-n", "0"], &["--num-samples", "at least 1"]);
    refused(&["teacher", "--steps", "0"], &["0"]);
    refused(&["teacher", "--steps", "1001"], &["1001", "1000"]);
    refused(
        &["teacher", "--class", "3"],
        &["--class", "3 classes", "0 class0, 1 class1, 2 class2"],
    );
    refused(&["teacher", "--class", "circles"], &["--class is `circles`", "2 class2"]);
    refused(&["teacher", "--thresholding", "clip"], &["--thresholding", "clip", "{ kind = "]);
    refused(
        &["teacher", "--first", "2", "-n", "3", "--of", "4"],
        &["is 5; expected", "--of, which is 4"],
    );
    refused(&["teacher", "--memory-format", "nchw"], &["--memory-format", "channels_last"]);
    refused(&["teacher", "--precision", "half"], &["--precision", "half", "bfloat16"]);
    refused(&["teacher", "--device", "tpu"], &["tpu"]);
    refused(&["teacher", "--eta", "2", "--steps", "2"], &["eta", "2"]);
    refused(&["teacher", "--eta", "x"], &["--eta"]);
    refused(&["teacher", "--guidance-scale", "nan", "--steps", "2"], &["NaN"]);
    refused(&["teacher", "--steps", "2", "--output", "no/such/a.png"], &["no/such/a.png"]);
}

#[test]
fn a_named_file_is_replaced_with_a_word_and_no_other() -> TestResult {
    let workshop = Workshop::with_teacher();
    let first = sample(&workshop, "a.png", &[]);
    let again =
        ["sample", "teacher", "-n", "6", "--steps", "3", "--seed", "1", "--output", "a.png"];
    let said = workshop.ddil(&again).succeeded();
    assert!(said.stderr.contains("a.png exists and will be replaced"), "{}", said.stderr);
    assert_ne!(fs::read(workshop.path("a.png"))?, first);
    // Without a name every grid gets a new file.
    for name in ["samples.png", "samples-2.png", "samples-3.png"] {
        let said = workshop.ddil(&["sample", "teacher", "-n", "3", "--steps", "2"]).succeeded();
        assert!(said.stdout.contains(&format!(": {name}\n")), "{}", said.stdout);
    }
    Ok(())
}

#[test]
fn parts_of_a_seeds_samples_are_those_of_the_whole() -> TestResult {
    let workshop = Workshop::with_teacher();
    let drawn = |name: &str, more: &[&str]| -> Result<Tensor, ddil::Error> {
        let name = format!("{name}.safetensors");
        let mut arguments =
            vec!["sample", "teacher", "--steps", "2", "--batch-size", "1", "--output", &name];
        arguments.extend(more);
        workshop.ddil(&arguments).succeeded();
        sample_file::read(&workshop.path(&name))
    };
    let whole = drawn("whole", &["-n", "5"])?;
    let parts = [
        drawn("begin", &["-n", "2", "--of", "5"])?,
        drawn("end", &["-n", "3", "--first", "2", "--of", "5"])?,
    ];
    assert_eq!(Tensor::cat(&parts, 0), whole);
    // Sample 4 is of class 1 like sample 1, by name and by number.
    let of_class = drawn("class", &["-n", "5", "--class", "class1"])?;
    assert_eq!(of_class, drawn("number", &["-n", "5", "--class", "1"])?);
    assert_eq!(of_class.get(4), whole.get(4));
    assert_ne!(of_class.get(3), whole.get(3));
    Ok(())
}

#[test]
fn a_config_for_another_verb_names_that_verb() {
    let workshop = Workshop::with_teacher();
    workshop.ddil(&["train", "distill.toml"]).refused(&[
        "a config for `ddil distill`",
        "`teacher`",
        "ddil distill distill.toml",
    ]);
    workshop
        .ddil(&["distill", "train.toml"])
        .refused(&["a config for `ddil train`", "ddil train train.toml"]);
    let guided = arguments("distill", "guided", &["teacher.guidance=2"]);
    workshop
        .ddil(&guided)
        .refused(&["`teacher.guidance` is 2; expected a table", "{ kind = \"cfg\", scale = 2.0 }"]);
    workshop.ddil(&["inspect", "nowhere"]).refused(&["nowhere does not exist", "run folder"]);
    let missing = arguments("distill", "away", &["teacher.path=assets/fashion-mnist-teacher"]);
    workshop.ddil(&missing).refused(&[
        "assets/fashion-mnist-teacher does not exist",
        "ddil init fashion-mnist-teacher",
    ]);
    workshop.ddil(&["demo"]).refused(&["assets/fashion-mnist-teacher", "--teacher"]);
}

#[test]
fn the_plain_method_is_an_option() -> TestResult {
    let workshop = Workshop::with_teacher();
    let mut plain = arguments("distill", "plain", &[]);
    plain.push("--plain");
    workshop.ddil(&plain).succeeded();
    let config = fs::read_to_string(workshop.run("plain").join("config.toml"))?;
    let config: toml::Table = config.parse()?;
    assert_eq!(config["mixing"]["priors"]["kind"].as_str(), Some("constant"));
    assert_eq!(config["mixing"]["priors"]["priors"]["forward"].as_float(), Some(1.0));
    assert_eq!(config["mixing"]["pure_noise_at_tmax"].as_bool(), Some(false));
    // A preset too, with its comments.
    let said = workshop.ddil(&["init", "fashion-mnist-pd-ddil", "--plain"]).succeeded();
    assert!(said.stdout.contains("does not exist"), "{}", said.stdout);
    let text = fs::read_to_string(workshop.path("fashion-mnist-pd-ddil.toml"))?;
    assert!(
        text.contains("the plain method")
            && text.contains("# none, clamp")
            && !text.contains("refresh_fraction")
    );
    workshop
        .ddil(&["init", "fashion-mnist-teacher", "--plain"])
        .refused(&["--plain", "ddil train"]);
    Ok(())
}

#[test]
fn an_exported_student_of_classes_comes_with_its_python() -> TestResult {
    let workshop = Workshop::with_teacher();
    let run = workshop.complete("distill", "run", &[]).display().to_string();
    let said = workshop.ddil(&["export", &run, "out"]).succeeded();
    let card = fs::read_to_string(workshop.path("out/README.md"))?;
    for words in [
        "UNet2DModel",
        "labels = torch.arange(3)",
        "class_labels=labels",
        "scheduler.set_timesteps(4)",
    ] {
        assert!(
            card.contains(words) && said.stdout.contains(words),
            "{words}: {card}\n{}",
            said.stdout
        );
    }
    workshop.ddil(&["export", &run, "out"]).refused(&["out already exists", "--force"]);
    workshop.ddil(&["export", &run, "out", "--force"]).succeeded();
    Ok(())
}

#[track_caller]
fn inspected(workshop: &Workshop, path: &Path) -> Value {
    let path = path.display().to_string();
    let text = workshop.ddil(&["inspect", &path]).succeeded().stdout;
    let json = workshop.ddil(&["inspect", &path, "--json"]).succeeded().stdout;
    let value: Value = serde_json::from_str(&json).expect("it is JSON");
    let kind = value["kind"].as_str().expect("it says what it is");
    assert!(text.contains(&format!("kind: {kind}")), "{text}");
    value
}

#[test]
fn inspect_describes_a_folder() -> TestResult {
    let workshop = Workshop::with_teacher();
    let run = workshop.complete("distill", "run", &[]);
    let teacher = inspected(&workshop, &workshop.path("teacher"));
    assert_eq!((&teacher["kind"], &teacher["card"]["null_class"]), (&"model".into(), &3.into()));
    assert!(teacher["parameters"].as_u64() > Some(1000));
    let found = inspected(&workshop, &run);
    assert_eq!((&found["kind"], &found["checkpoints"]), (&"run".into(), &4.into()));
    let on_disk = status(&run);
    for field in ["state", "step", "error"] {
        assert_eq!(found["status"][field], on_disk[field], "{field}");
    }
    assert_eq!(found["export"]["card"]["method"], "progressive");
    let newest = checkpoints(&run).pop_last().ok_or("a checkpoint")?.1;
    let checkpoint = inspected(&workshop, &newest);
    assert_eq!(inspected(&workshop, &run.join("checkpoints/latest")), checkpoint);
    assert_eq!(inspected(&workshop, &run.join("checkpoints")), checkpoint);
    assert_eq!(checkpoint["kind"], "checkpoint");
    assert_eq!(checkpoint["manifest"]["step"], 12);

    fs::write(newest.join("ema.safetensors"), "cut short")?;
    let path = newest.display().to_string();
    workshop.ddil(&["inspect", &path]).refused(&[&path, "damaged", "ema.safetensors"]);
    let damaged = inspected(&workshop, &run)["damaged"].to_string();
    assert!(damaged.contains("step_0000012"), "{damaged}");
    workshop.ddil(&["inspect", "data"]).refused(&["data", "no model"]);
    Ok(())
}

/// Its measurements are tested in the library, because reading all of Fashion-MNIST takes long.
#[test]
fn evaluate_refuses_before_it_measures() {
    let workshop = Workshop::with_teacher();
    workshop.ddil(&["evaluate", "nowhere"]).refused(&["nowhere", "expected a model folder"]);
    workshop.ddil(&["evaluate", "teacher", "-n", "1"]).refused(&["--num-samples", "at least 2"]);
    if FashionMnist::from_folder(None).is_err() {
        workshop.ddil(&["evaluate", "teacher"]).refused(&["no Fashion-MNIST in", "make setup"]);
    }
}
