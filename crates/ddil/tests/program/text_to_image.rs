//! Students of text-to-image models.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_core::{Conditioning, Denoiser};
use ddil_data::{CaptionedImage, read_captions, read_cropped};
use ddil_losses::TeacherGuidance;
use ddil_models::{Placement, Precision, weights};
use ddil_pipelines::{Guidance, Pipeline, PipelineClass};
use tch::{Kind, Tensor, kind};

use crate::bad_input::each_is_refused;
use crate::support::{
    TestResult, Workshop, arguments, assert_same_end, checkpoints, copy_folder, json, snapshot,
};
use crate::text_teacher::{Family, SIDE, TOKENS, WIDTHS, write_colours};

const FAMILIES: [Family; 2] = [Family::StableDiffusion, Family::StableDiffusionXl];

const LATENTS: [&str; 2] = ["data={ kind = \"latents\", path = \"cache\", batch_size = 4 }", ""];
const PROMPTS: [&str; 2] = [
    "data={ kind = \"prompts\", path = \"prompts.txt\", cache = \"said\", batch_size = 2 }",
    "mixing.priors={ kind = \"constant\", priors = { student = 0.5, teacher = 0.5 } }",
];
const CHAIN: &str = "mixing.student.policy={ kind = \"chain\", refresh_fraction = 0.25 }";
const LCM: &str = "objective={ method = \"lcm\", num_ddim_timesteps = 10 }";
const ONE_SUBSTEP: &str = "mixing.teacher={ pool = 4, substeps = 1 }";
const RANGE: &str = "teacher.guidance={ kind = \"cfg_range\", min = 1.0, max = 4.0 }";
const DMD2: &str = "objective={ method = \"dmd2\", critic_ratio = 2 }";
const DMD2_ALONE: &str = "objective={ method = \"dmd2\", critic_ratio = 2, gan = false }";

/// The settings without the empty ones.
fn set<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().copied().filter(|setting| !setting.is_empty()).collect()
}

fn workshop(family: Family) -> Workshop {
    let workshop = Workshop::of_text(family);
    fs::write(workshop.path("prompts.txt"), "a cat\n\na red dog\na cat\n").expect("it is writable");
    workshop
}

fn read(folder: &Path) -> Result<Pipeline, ddil_pipelines::Error> {
    Pipeline::open(folder, Placement::default(), Precision::Float32)
}

#[test]
fn the_teacher_is_a_model_folder_with_its_text_parts() -> TestResult {
    for family in FAMILIES {
        let workshop = Workshop::of_text(family);
        let pipeline = read(&workshop.path("teacher"))?;
        assert_eq!(pipeline.card.image_shape, [4, 8, 8]);
        let parts = pipeline.parts.text_to_image(Placement::default())?;
        let encoded = parts.encode(&["a red cat", "a red cat, 2 dogs"])?;
        let states =
            encoded.conditioning.get(Conditioning::ENCODER_HIDDEN_STATES).ok_or("states")?;
        let xl = family == Family::StableDiffusionXl;
        let width = if xl { WIDTHS[0] + WIDTHS[1] } else { WIDTHS[0] };
        assert_eq!(states.size(), [2, i64::from(TOKENS), i64::from(width)]);
        assert_eq!(encoded.conditioning.get(Conditioning::TEXT_EMBEDS).is_some(), xl);
        assert_eq!(encoded.truncated, [None, Some("gs".to_owned())]);
        let latents = Tensor::zeros([1, 4, 8, 8], kind::FLOAT_CPU);
        assert_eq!(parts.decode(&latents)?.size(), [1, 3, 16, 16]);
        assert_eq!(parts.pixels_per_latent() * 8, i64::from(SIDE));
    }
    Ok(())
}

/// A student that its own program reads, with everything around it, and that differs from its teacher.
#[track_caller]
fn is_a_model(run: &Path, teacher: &Path) -> Pipeline {
    let student = read(run).expect("the export is a model folder");
    let teacher = read(teacher).expect("so is the teacher");
    let parts = student.parts.text_to_image(Placement::default()).expect("its parts are there");
    parts.encode(&["a cat"]).expect("they work");
    let weights = |p: &Pipeline| p.network.parameters().learned();
    let differs = weights(&student).iter().zip(weights(&teacher)).any(|(a, b)| a.1 != b.1);
    assert!(differs, "nothing was learned");
    student
}

#[test]
fn each_method_learns_from_each_kind_of_data() {
    for family in FAMILIES {
        let workshop = workshop(family);
        let teacher = workshop.path("teacher");
        let all: [(&str, &[&str]); 7] = [
            ("pd", &[]),
            ("lcm", &[LCM, ONE_SUBSTEP, RANGE]),
            ("dmd2", &[DMD2]),
            ("pd_latents", &LATENTS),
            ("dmd2_latents", &[DMD2, LATENTS[0]]),
            ("lcm_prompts", &[LCM, ONE_SUBSTEP, PROMPTS[0], PROMPTS[1]]),
            ("dmd2_prompts", &[DMD2_ALONE, PROMPTS[0], PROMPTS[1]]),
        ];
        // What differs between families does not differ between kinds of data.
        let cases = if family == Family::StableDiffusion { &all[..] } else { &all[1..3] };
        for &(name, settings) in cases {
            let run = workshop.complete("distill", name, &set(settings));
            let student = is_a_model(&run, &teacher);
            let class = match (family, name) {
                (Family::StableDiffusionXl, _) => PipelineClass::StableDiffusionXl,
                (_, "lcm") => PipelineClass::LatentConsistency,
                _ => PipelineClass::StableDiffusion,
            };
            assert_eq!(student.parts.class(), class, "{name}");
            assert_eq!(student.card.guidance_range.is_some(), name == "lcm", "{name}");
            let grids = snapshot(&run.join("samples"));
            assert_eq!(grids.len(), 1, "{name}: {:?}", grids.keys());
        }
    }
}

#[test]
fn an_adapter_learns_from_captions() {
    let workshop = workshop(Family::StableDiffusion);
    let run = workshop.complete("distill", "adapter", &["student.lora={ rank = 2 }"]);
    let student = read(&run).expect("the adapter and its base are a model");
    assert_eq!(student.parts.class(), PipelineClass::StableDiffusion);
    assert!(student.card.adapter.is_some());
}

#[test]
fn captions_and_the_latents_of_their_cache_train_to_the_same_bits() {
    for family in FAMILIES {
        let workshop = workshop(family);
        let captions = workshop.complete("distill", "captions", &[]);
        let latents = workshop.complete("distill", "latents", &set(&LATENTS));
        assert_same_end(&captions, &latents);
    }
}

#[test]
fn every_checkpoint_leads_to_the_same_end() {
    let xl = Family::StableDiffusionXl;
    let cases: [(Family, &[&str]); 3] =
        [(xl, &[CHAIN]), (xl, &[DMD2]), (Family::StableDiffusion, &[LCM, ONE_SUBSTEP, RANGE])];
    for (family, settings) in cases {
        let workshop = workshop(family);
        let whole = workshop.complete("distill", "whole", settings);
        assert_eq!(checkpoints(&whole).into_keys().collect::<Vec<_>>(), [2, 4]);
        for step in [0, 2] {
            let run = workshop.rewound(&whole, &format!("from_{step}"), step);
            let path = run.display().to_string();
            let resumed = workshop.ddil(&["distill", "--resume", &path]).succeeded();
            assert!(!resumed.stderr.contains("WARN"), "{}", resumed.stderr);
            assert_same_end(&whole, &run);
        }
    }
}

#[test]
fn the_guided_label_combines_two_outputs() -> TestResult {
    for family in FAMILIES {
        let workshop = workshop(family);
        let teacher = read(&workshop.path("teacher"))?;
        let parts = teacher.parts.text_to_image(Placement::default())?;
        let conditioning = parts.encode(&["a red cat", "a dog"])?.conditioning;
        let conditioning =
            conditioning.with_some(Conditioning::TIME_IDS, parts.time_ids([16, 16], 2));
        let mut empty = parts.empty()?;
        let states = empty.get(Conditioning::ENCODER_HIDDEN_STATES).ok_or("states")?;
        let is_zero = states.abs().max().double_value(&[]) == 0.0;
        assert_eq!(is_zero, family == Family::StableDiffusionXl);

        let guidance = Guidance::of_prompts(&teacher.card, empty.shallow_clone());
        let guided =
            TeacherGuidance::Cfg { scale: 3.0 }.wrap(&teacher.network, guidance.null()?)?;
        let (x_t, t) =
            (Tensor::randn([2, 4, 8, 8], kind::FLOAT_CPU), Tensor::from_slice(&[999_i64, 500]));
        let found = guided.predict(&x_t, &t, &conditioning)?.epsilon;

        empty = empty.index_select(&Tensor::from_slice(&[0_i64, 0]))?;
        let sizes = conditioning.get(Conditioning::TIME_IDS).map(Tensor::shallow_clone);
        empty = empty.with_some(Conditioning::TIME_IDS, sizes);
        let [with, without] = [&conditioning, &empty]
            .map(|conditioning| teacher.network.predict(&x_t, &t, conditioning));
        let (with, without) = (with?.epsilon, without?.epsilon);
        let expected = &without + 3.0 * (&with - &without);
        assert!((&found - &expected).abs().max().double_value(&[]) < 1e-4);
        assert!((&found - &with).abs().max().double_value(&[]) > 1e-3, "the prompt says nothing");
    }
    Ok(())
}

/// The messages of a run about its cache.
fn messages(workshop: &Workshop, name: &str, settings: &[&str]) -> String {
    workshop.ddil(&arguments("distill", name, settings)).succeeded().stderr
}

#[test]
fn a_cache_is_reused_and_rebuilt_for_other_data() -> TestResult {
    let workshop = workshop(Family::StableDiffusion);
    let first = messages(&workshop, "first", &[]);
    assert!(first.contains("encodes 6 samples into cache"), "{first}");
    assert!(!first.contains("are smaller than"), "{first}");
    let before = snapshot(&workshop.path("cache"));
    let again = messages(&workshop, "again", &[]);
    assert!(again.contains("using the encoded data in cache"), "{again}");
    assert!(snapshot(&workshop.path("cache")) == before, "the cache was written to");

    // Another image, another caption, other encoders: each causes the cache to be rebuilt.
    let rebuilt = |name: &str| {
        let messages = messages(&workshop, name, &[]);
        assert!(messages.contains("will be rebuilt"), "{name}: {messages}");
        assert!(!workshop.path(".tmp-cache").exists());
    };
    write_colours(&workshop.path("captions/00.png"), SIDE, SIDE + 1, 77);
    rebuilt("image");
    let lines = fs::read_to_string(workshop.path("captions/metadata.jsonl"))?;
    fs::write(
        workshop.path("captions/metadata.jsonl"),
        lines.replace("2 dogs", "3 dogs, red cat"),
    )?;
    rebuilt("caption");
    for part in ["text_encoder", "vae"] {
        let folder = workshop.path("teacher").join(part);
        let config = folder.join("config.json");
        fs::write(&config, [&fs::read(&config)?[..], b"\n"].concat())?;
        rebuilt(part);
        // Weights of the same size and time, as archives leave them: one bit of the last value.
        let mut files = snapshot(&folder).into_iter();
        let weights =
            files.find(|(name, _)| name.extension().is_some_and(|end| end == "safetensors"));
        let (name, mut bytes) = weights.ok_or("weights")?;
        let time = fs::metadata(folder.join(&name))?.modified()?;
        let last = bytes.len() - 4;
        bytes[last] ^= 1;
        fs::write(folder.join(&name), bytes)?;
        fs::File::options().write(true).open(folder.join(&name))?.set_modified(time)?;
        rebuilt(&format!("{part}-weights"));
        // The same content at another time.
        fs::write(&config, fs::read(&config)?)?;
        let kept = messages(&workshop, &format!("{part}-kept"), &[]);
        assert!(kept.contains("using the encoded data in cache"), "{kept}");
    }
    // The index may define the conditioning of the empty prompt.
    let index = workshop.path("teacher/model_index.json");
    let text = fs::read_to_string(&index)?;
    fs::write(&index, text.replacen('{', "{\"force_zeros_for_empty_prompt\": true,", 1))?;
    rebuilt("index");
    let messages = messages(&workshop, "resolution", &["data.resolution=20"]);
    // Two are too low, three too narrow, one of them both.
    for words in
        ["will be rebuilt", "[4, 10, 10]", "[4, 8, 8]", "4 of 6 images are smaller than 20x20"]
    {
        assert!(messages.contains(words), "{words}: {messages}");
    }
    Ok(())
}

fn near(found: &Tensor, expected: &Tensor) -> bool {
    found.size() == expected.size() && (found - expected).abs().max().double_value(&[]) < 1e-5
}

fn numbers(row: &Tensor) -> Result<Vec<i64>, tch::TchError> {
    Vec::try_from(row.to_kind(Kind::Int64))
}

#[test]
fn a_cache_contains_the_output_of_the_teachers_encoders() -> TestResult {
    let workshop = workshop(Family::StableDiffusionXl);
    workshop.complete("distill", "captions", &[]);
    let file = |name: &str| weights::read_all(workshop.path("cache").join(name));
    let (latents, prompts) = (file("latents.safetensors")?, file("prompts.safetensors")?);
    let samples = file("samples.safetensors")?;
    let texts: Vec<String> =
        serde_json::from_slice(&fs::read(workshop.path("cache/prompts.json"))?)?;
    let parts = read(&workshop.path("teacher"))?.parts.text_to_image(Placement::default())?;
    let captions = read_captions(&workshop.path("captions"))?;
    assert_eq!((captions.len(), latents["mean"].size()[0]), (6, 6));
    let size = [i64::from(SIDE); 2];
    for (i, CaptionedImage { file_name, texts: own }) in (0..).zip(captions) {
        let picture = read_cropped(&workshop.path("captions").join(file_name), 3, size)?;
        let [mean, std] = parts.latent_distribution(&picture.pixels.unsqueeze(0))?;
        assert!(near(&latents["mean"].get(i), &mean.get(0)), "mean of {i}");
        assert!(near(&latents["std"].get(i), &std.get(0)), "std of {i}");
        let sizes = [picture.original_size, picture.crop_offset, size].concat();
        assert_eq!(numbers(&samples["time_ids"].get(i))?, sizes, "{i}");
        let rows = numbers(&samples["prompts"].get(i))?;
        let found = rows.iter().filter(|row| **row >= 0).map(|row| &texts[*row as usize]);
        assert!(found.eq(&own), "{rows:?} for {own:?}");
    }

    // Every text once, after the empty prompt.
    let captions: Vec<&str> = texts.iter().skip(1).map(String::as_str).collect();
    let encoded = parts.encode(&captions)?.conditioning;
    let n = texts.len() as i64 - 1;
    for (name, part) in encoded.parts() {
        assert!(near(&prompts[name].narrow(0, 1, n), part), "{name}");
        assert_eq!(prompts[name].get(0).abs().max().double_value(&[]), 0.0, "{name}");
    }
    assert_eq!(json(&workshop.path("cache/dataset.json"))["empty_prompt"], 0);

    workshop.complete("distill", "prompts", &[DMD2_ALONE, PROMPTS[0], PROMPTS[1]]);
    let samples = weights::read_all(workshop.path("said/samples.safetensors"))?;
    for row in 0..3 {
        assert_eq!(numbers(&samples["time_ids"].get(row))?, [16, 16, 0, 0, 16, 16]);
    }
    Ok(())
}

#[test]
fn without_a_setting_the_cache_is_the_users() -> TestResult {
    let workshop = workshop(Family::StableDiffusion);
    let data = "data={ kind = \"captions\", path = \"captions\", batch_size = 4 }";
    let mut command = workshop.command(&arguments("distill", "default", &[data]));
    let ended = command.env("DDIL_CACHE", workshop.path("home")).output()?;
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let entries: Vec<_> = fs::read_dir(workshop.path("home/encoded"))?.collect::<Result<_, _>>()?;
    assert_eq!(entries.len(), 1);
    assert!(entries[0].path().join("dataset.json").is_file());
    Ok(())
}

#[test]
fn long_prompts_are_cut_with_a_warning_and_dry_runs_encode_nothing() -> TestResult {
    let workshop = workshop(Family::StableDiffusionXl);
    fs::write(workshop.path("prompts.txt"), "a cat\na red cat, 2 dogs\n")?;
    let mut dry = arguments("distill", "dry", &[DMD2_ALONE, PROMPTS[0], PROMPTS[1]]);
    dry.push("--dry-run");
    let dry = workshop.ddil(&dry).succeeded();
    assert!(dry.stdout.contains("4 updates; nothing was written"), "{}", dry.stdout);
    assert!(!workshop.path("said").exists() && !workshop.path("runs").exists());
    // Reported again when the cache is reused.
    for (name, words) in
        [("long", "encodes 2 samples"), ("again", "using the encoded data in said")]
    {
        let ended = messages(&workshop, name, &[DMD2_ALONE, PROMPTS[0], PROMPTS[1]]);
        for words in [words, "1 of 2 prompts are longer", "\"a red cat, 2 dogs\"", "\"gs\""] {
            assert!(ended.contains(words), "{words}: {ended}");
        }
    }
    Ok(())
}

#[test]
fn grids_show_the_requested_prompts() {
    let workshop = workshop(Family::StableDiffusionXl);
    let of_data = workshop.complete("distill", "of_data", &[]);
    let same = ["output.prompts=[\"a cat\", \"a red cat\", \"a dog\", \"a red dog\"]"];
    let named = workshop.complete("distill", "named", &same);
    let others = ["output.prompts=[\"cat cat\", \"3 dogs\"]"];
    let other = workshop.complete("distill", "other", &others);
    let grid = |run: &Path| snapshot(&run.join("samples"));
    assert!(grid(&of_data) == grid(&named), "the data's first prompts are these");
    assert!(grid(&of_data) != grid(&other));
    // An empty text is a prompt like any other; the empty prompt is zeros here, which is not the same.
    let empty = workshop.complete("distill", "empty", &["output.prompts=[\"\"]"]);
    let blank = workshop.complete("distill", "blank", &["output.prompts=[\" \"]"]);
    assert!(grid(&empty) == grid(&blank));
}

#[test]
fn text_files_next_to_images_are_captions_too() -> TestResult {
    let workshop = workshop(Family::StableDiffusion);
    fs::remove_file(workshop.path("captions/metadata.jsonl"))?;
    let words: &[&str] = &["00.png has no caption", "05.png has no caption", "metadata.jsonl"];
    each_is_refused(&workshop, "distill", &[(&[], words)]);
    for number in 0..6 {
        fs::write(workshop.path(&format!("captions/{number:02}.txt")), "a cat\n\n cat \n")?;
    }
    workshop.complete("distill", "beside", &[]);
    let texts = fs::read_to_string(workshop.path("cache/prompts.json"))?;
    let texts: Vec<String> = serde_json::from_str(&texts)?;
    assert_eq!(texts, ["", "a cat", "cat"]);
    Ok(())
}

#[test]
fn incompatible_settings() {
    let workshop = workshop(Family::StableDiffusion);
    let forward =
        "mixing.priors={ kind = \"constant\", priors = { forward = 0.5, student = 0.5 } }";
    let later = "mixing.priors={ kind = \"linear\", from = { student = 1.0 }, to = { forward = 1.0 }, \
                 start = 0.1, end = 0.5 }";
    let adaptive = "mixing.priors={ kind = \"adaptive\" }";
    let bounds =
        "thresholding={ kind = \"clamp\", low = [-1.0, -1.0, -1.0], high = [1.0, 1.0, 1.0] }";
    let pixels = "data={ kind = \"image_folder\", path = \"data\", batch_size = 4 }";
    each_is_refused(
        &workshop,
        "distill",
        &[
            (&[pixels], &["data.kind", "image_folder", "captions", "StableDiffusionPipeline"]),
            (&["data.horizontal_flip=true"], &["data.horizontal_flip", "cannot be mirrored"]),
            (&["data.resolution=17"], &["data.resolution", "17", "a multiple of 2"]),
            (&["data.resolution=0"], &["data.resolution", "0"]),
            (&["data.batch_size=7"], &["data.batch_size", "at most 6"]),
            (&["data.cache=teacher"], &["data.cache", "teacher", "other files"]),
            (&["data.kind=latents"], &["data.cache", "latents", "encodes nothing"]),
            (&["data.path=nowhere"], &["nowhere", "No such file"]),
            (&[PROMPTS[0], forward], &["mixing.priors", "forward", "prompts"]),
            (&[PROMPTS[0], later], &["mixing.priors", "forward", "prompts"]),
            (&[PROMPTS[0], adaptive], &["mixing.priors", "forward", "prompts"]),
            (&[PROMPTS[0], PROMPTS[1], DMD2], &["objective.gan", "discriminator", "prompts"]),
            (&[bounds], &["3", "4"]),
            (&["student.model={ in_channels = 4 }"], &["student.model", "UNet2DConditionModel"]),
        ],
    );
    let kind = ["data.kind=captions", "data.horizontal_flip=false"];
    each_is_refused(&workshop, "train", &[(&kind, &["data.kind", "captions", "without text"])]);
    let prompts = ["output.prompts=[\"a cat\"]"];
    each_is_refused(&workshop, "train", &[(&prompts, &["output.prompts", "without text"])]);
    assert!(!workshop.path("cache").exists(), "something was encoded");
}

#[test]
fn pure_noise_needs_no_data() {
    let workshop = workshop(Family::StableDiffusion);
    let forward = "mixing.priors={ kind = \"constant\", priors = { forward = 1.0 } }";
    let one = ["student.stages=[1]", DMD2_ALONE, PROMPTS[0], forward];
    workshop.complete("distill", "one_step", &one);
    let traced = [&one[..], &["mixing.pure_noise_at_tmax=false", "run.name=refused"]].concat();
    workshop.ddil(&arguments("distill", "refused", &traced)).refused(&["mixing.priors", "forward"]);
}

#[test]
fn captions_that_cannot_be_read() -> TestResult {
    let workshop = workshop(Family::StableDiffusion);
    let lines = [
        "{\"file_name\": \"00.png\", \"text\": \"a cat\", \"more\": 1}",
        "no JSON",
        "{\"file_name\": \"01.png\"}",
        "{\"file_name\": \"01.png\", \"text\": 3}",
        "{\"file_name\": \"01.png\", \"text\": []}",
        "{\"file_name\": \"../captions/01.png\", \"text\": \"a cat\"}",
        "{\"file_name\": \"absent.png\", \"text\": \"a cat\"}",
        "{\"file_name\": \"00.png\", \"text\": \"a dog\"}",
    ];
    fs::write(workshop.path("captions/metadata.jsonl"), lines.join("\n"))?;
    let words: &[&str] = &[
        "metadata.jsonl:2",
        "metadata.jsonl:3",
        "text",
        "metadata.jsonl:4",
        "a text or a list of texts",
        "metadata.jsonl:5",
        "empty list",
        "not inside the folder",
        "absent.png does not exist",
        "metadata.jsonl:8",
        "is listed twice",
    ];
    each_is_refused(&workshop, "distill", &[(&[], words)]);
    fs::write(workshop.path("prompts.txt"), " \n\n")?;
    let words: &[&str] = &["prompts.txt", "it contains no prompt"];
    each_is_refused(&workshop, "distill", &[(&[PROMPTS[0], PROMPTS[1]], words)]);
    Ok(())
}

/// Changes one tensor of a file, or leaves it out.
fn edit(file: &Path, name: &str, change: impl FnOnce(&Tensor) -> Option<Tensor>) -> TestResult {
    let mut tensors = weights::read_all(file)?;
    let old = tensors.remove(name).ok_or("it is there")?;
    if let Some(new) = change(&old) {
        tensors.insert(name.to_owned(), new);
    }
    // The overwritten bytes are in the mapped file.
    let copies: Vec<_> = tensors.into_iter().map(|(name, t)| (name, t.copy())).collect();
    Ok(weights::save(&copies, file, &BTreeMap::new())?)
}

/// Replaces a text in `dataset.json`.
fn reword(folder: &Path, from: &str, to: &str) -> TestResult {
    let text = fs::read_to_string(folder.join("dataset.json"))?;
    assert!(text.contains(from), "{text}");
    Ok(fs::write(folder.join("dataset.json"), text.replace(from, to))?)
}

/// Makes every file of a folder of encoded data wrong at once.
fn corrupt(folder: &Path) -> TestResult {
    reword(folder, "0.18215", "0.13025")?;
    edit(&folder.join("latents.safetensors"), "std", |std| Some(std.narrow(1, 0, 3)))?;
    edit(&folder.join("prompts.safetensors"), "text_embeds", |_| None)?;
    edit(&folder.join("prompts.safetensors"), "encoder_hidden_states", |states| {
        Some(states.narrow(2, 0, 5))
    })?;
    edit(&folder.join("samples.safetensors"), "prompts", |prompts| Some(prompts + 3))?;
    edit(&folder.join("samples.safetensors"), "time_ids", |ids| Some(ids.to_kind(Kind::Int64)))?;
    fs::write(folder.join("prompts.json"), "[\"\"]")?;
    Ok(())
}

/// The expected message.
const SPOILT: &[&str] = &[
    "0.13025",
    "teacher's is factor 0.18215",
    "`mean` is [6, 4, 8, 8] and `std` [6, 3, 8, 8]",
    "no `text_embeds`",
    "`encoder_hidden_states` is",
    "any, 20]",
    "refers to row",
    "`time_ids` is Int64",
    "prompts.json: 1 texts",
];

#[test]
fn encoded_data_that_do_not_fit_are_refused_with_all_that_is_wrong() -> TestResult {
    let workshop = workshop(Family::StableDiffusionXl);
    workshop.complete("distill", "first", &[]);
    let cache = workshop.path("cache");
    fs::remove_dir_all(workshop.path("runs"))?;
    let broken = |name: &str| {
        copy_folder(&cache, &workshop.path(name));
        workshop.path(name)
    };
    let many = broken("many");
    corrupt(&many)?;
    reword(&broken("version"), "\"format_version\": 1", "\"format_version\": 2")?;
    reword(&broken("key"), "\"num_prompts\"", "\"num_promts\"")?;
    reword(&broken("guideless"), "\"empty_prompt\": 0", "\"empty_prompt\": null")?;
    fs::remove_file(broken("latentless").join("latents.safetensors"))?;
    let cut = broken("cut").join("latents.safetensors");
    fs::write(&cut, &fs::read(&cut)?[..900])?;
    let path = |name: &str| -> &'static str {
        format!("data={{ kind = \"latents\", path = {name:?}, batch_size = 4 }}").leak()
    };
    each_is_refused(
        &workshop,
        "distill",
        &[
            (&[path("many")], SPOILT),
            (&[path("version")], &["format_version", "2", "1"]),
            (&[path("key")], &["dataset.json", "num_promts"]),
            (&[path("guideless")], &["teacher.guidance", "cfg", "empty prompt"]),
            (&[path("latentless")], &["latentless", "data.kind = \"prompts\""]),
            (&[path("cut")], &["latents.safetensors"]),
            (&[path("captions")], &["captions", "dataset.json"]),
            // As a cache it is refused too, and not written over.
            (&["data.cache=cut"], &["cache", "cut", "damaged", "remove it"]),
        ],
    );
    Ok(())
}

#[test]
fn encoded_data_may_be_of_half_precision_and_without_a_spread() -> TestResult {
    let workshop = workshop(Family::StableDiffusion);
    workshop.complete("distill", "first", &[]);
    let cache = workshop.path("cache");
    let half = |t: &Tensor| Some(t.to_kind(Kind::Half));
    edit(&cache.join("prompts.safetensors"), "encoder_hidden_states", |t| {
        Some(t.to_kind(Kind::BFloat16))
    })?;
    let latents = cache.join("latents.safetensors");
    edit(&latents, "std", |_| None)?;
    let mean = weights::read_all(&latents)?.remove("mean").and_then(|t| half(&t)).ok_or("mean")?;
    weights::save(&[("latents".to_owned(), mean)], &latents, &BTreeMap::new())?;
    workshop.complete("distill", "half", &set(&LATENTS));
    let range = workshop.ddil(&["range", "cache"]).succeeded().stdout;
    assert!(range.contains("# 6 samples of cache, 4 channels"), "{range}");
    Ok(())
}

#[test]
fn a_stop_while_encoding_leaves_no_files() {
    let workshop = workshop(Family::StableDiffusion);
    let config = fs::read_to_string(workshop.path("distill.toml")).expect("it was written");
    let mut settings = ddil_files::settings::Settings::parse("distill.toml", config).expect("TOML");
    let at = |name: &str| workshop.path(name).display().to_string();
    for (key, name) in
        [("teacher.path", "teacher"), ("data.path", "captions"), ("data.cache", "cache")]
    {
        settings.set(&format!("{key}={}", at(name))).expect("there is such a key");
    }
    let config = settings.build().expect("the settings are valid");
    let interrupt = ddil_trainer::Interrupt::default();
    interrupt.request();
    let task = ddil_trainer::DistillTask::interruptible(&config, &interrupt);
    let refused = task.map(drop).expect_err("somebody asked").to_string();
    assert!(refused.contains("stopped while encoding"), "{refused}");
    assert!(!workshop.path("cache").exists() && !workshop.path(".tmp-cache").exists());
}
