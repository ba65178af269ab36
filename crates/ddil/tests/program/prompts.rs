//! Prompts and classes apart from the data, and parts of the data.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::bad_input::each_is_refused;
use crate::support::{
    TestResult, Workshop, arguments, assert_same_end, checkpoints, copy_folder, json, snapshot,
    write_pictures,
};
use crate::text_teacher::Family;

const CLASSES: &str = "prompts.source=classes";
/// The second of the three classes alone.
const SECOND: &str = "prompts={ source = \"classes\", classes = [\"class1\"] }";
const UNEVEN: &str =
    "prompts={ source = \"classes\", classes = [\"class2\", \"class0\"], weights = [3.0, 1.0] }";
/// Only the first of the three classes is in the data.
const FIRST_DATA: &str = "data.exclude_classes=[\"class1\", \"class2\"]";
const BUFFER: &str = "mixing.student.policy={ kind = \"buffer\", new_fraction = 0.25, buffer = \
                      { capacity = 16, max_age = 4 } }";
const MIXED: &str = "mixing.student.mixed={ kind = \"teacher_then_student\", switch = 2 }";
const LCM: &str = "objective={ method = \"lcm\", num_ddim_timesteps = 10 }";
const ONE_SUBSTEP: &str = "mixing.teacher={ pool = 8, substeps = 1 }";
const DMD2: &str = "objective={ method = \"dmd2\", critic_ratio = 3 }";
const TWO_STAGES: [&str; 2] = ["student.stages=[4, 2]", "student.updates_per_stage=6"];

/// The last line of a run's metrics.
fn last_figures(run: &Path) -> Value {
    let text = fs::read_to_string(run.join("metrics.jsonl")).expect("it was written");
    serde_json::from_str(text.lines().last().expect("it has lines")).expect("it is JSON")
}

fn count(figures: &Value, name: &str) -> u64 {
    let count = figures[name].as_f64().unwrap_or_else(|| panic!("no {name} in {figures}"));
    count as u64
}

/// The weights of the exported student.
fn student(run: &Path) -> Vec<u8> {
    fs::read(run.join("export/unet/diffusion_pytorch_model.safetensors")).expect("it was written")
}

/// The data and the prompts have different labels, which are counted for every method and memory of states.
#[test]
fn students_see_the_classes_of_the_prompts_and_no_others() {
    let workshop = Workshop::with_teacher();
    let cases: [(&str, &[&str]); 6] = [
        ("chain", &[]),
        ("buffer", &[BUFFER, TWO_STAGES[0], TWO_STAGES[1]]),
        ("mixed", &["mixing.student.policy={ kind = \"fresh\" }", MIXED]),
        ("lcm", &[LCM, ONE_SUBSTEP, BUFFER]),
        (
            "lcm_range",
            &[
                LCM,
                ONE_SUBSTEP,
                BUFFER,
                "teacher.guidance={ kind = \"cfg_range\", min = 1.0, max = 3.0 }",
            ],
        ),
        ("dmd2", &[DMD2, BUFFER]),
    ];
    for (name, settings) in cases {
        let settings = [settings, &[FIRST_DATA, SECOND]].concat();
        let ended = workshop.ddil(&arguments("distill", name, &settings)).succeeded();
        let figures = last_figures(&workshop.run(name));
        let [data, classes] =
            ["conditioned_data", "conditioned_classes"].map(|name| count(&figures, name));
        // Batches of four; the student of DMD2 is trained, and recorded, in every third update.
        assert_eq!(data + classes, if name == "dmd2" { 40 } else { 48 }, "{name}");
        assert!(data > 0 && classes > 0, "{name}: {figures}");
        let by_class = [0, 1, 2].map(|i| count(&figures, &format!("conditioned_class_{i}")));
        assert_eq!(by_class, [data, classes, 0], "{name}");
        assert!(figures["conditioned_class_3"].is_null(), "the null class is no class");
        let warns = ended.stderr.contains("no samples of class1");
        assert_eq!(warns, name == "dmd2", "{}", ended.stderr);
    }
}

/// The loss of a state depends on its label: other prompts make another student, the data's own prompts the old one.
#[test]
fn the_default_is_the_data_and_is_not_recorded() {
    let workshop = Workshop::with_teacher();
    let default = workshop.complete("distill", "default", &[]);
    let named = workshop.complete("distill", "named", &["prompts.source=data"]);
    assert_same_end(&default, &named);
    let figures = last_figures(&default);
    let recorded = figures.as_object().expect("an object").keys();
    assert!(recorded.clone().all(|name| !name.starts_with("conditioned")), "{figures}");
    let last = checkpoints(&default).into_values().next_back().expect("it was saved");
    assert!(!last.join("conditioned.json").exists());
    let classes = workshop.complete("distill", "classes", &[CLASSES]);
    assert_ne!(student(&default), student(&classes));
    let figures = last_figures(&classes);
    let counts = (0..3).map(|class| count(&figures, &format!("conditioned_class_{class}")));
    assert_eq!(counts.sum::<u64>(), 48, "the null class is never drawn: {figures}");
}

#[test]
fn classes_resume_on_the_same_bits() {
    let cases: [&[&str]; 4] = [
        &[UNEVEN],
        &[CLASSES, BUFFER, TWO_STAGES[0], TWO_STAGES[1]],
        &[UNEVEN, LCM, ONE_SUBSTEP, BUFFER],
        &[UNEVEN, DMD2, FIRST_DATA, "objective.gan=false"],
    ];
    for settings in cases {
        resumes(&Workshop::with_teacher(), settings, &[0, 6]);
    }
}

/// From checkpoints of a run, the same end is reached.
fn resumes(workshop: &Workshop, settings: &[&str], steps: &[u64]) {
    let whole = workshop.complete("distill", "whole", settings);
    for &step in steps {
        let run = workshop.rewound(&whole, &format!("from_{step}"), step);
        let path = run.display().to_string();
        workshop.ddil(&["distill", "--resume", &path]).succeeded();
        assert_same_end(&whole, &run);
    }
}

/// Gives the classes of a teacher's card other names.
fn name_classes(teacher: &Path, names: &[&str]) -> TestResult {
    let path = teacher.join("ddil.json");
    let mut card = json(&path);
    card["class_names"] = names.into();
    Ok(fs::write(path, card.to_string())?)
}

#[test]
fn a_class_of_the_data_is_the_teachers_of_the_same_name() -> TestResult {
    let workshop = Workshop::with_teacher();
    let reversed = ["class2", "class1", "class0"];
    name_classes(&workshop.write_teacher("reversed", Some(3)), &reversed)?;
    let own = workshop.complete("distill", "own", &[]);
    let by_name = workshop.complete("distill", "by_name", &["teacher.path=reversed"]);
    assert_ne!(student(&own), student(&by_name));
    // The same labels, given by hand.
    let given = format!("data.classes={reversed:?}");
    let given = workshop.complete("distill", "given", &[&given]);
    assert_eq!(student(&by_name), student(&given));
    assert_eq!(json(&by_name.join("export/ddil.json"))["class_names"], Value::from(&reversed[..]));

    // The covariate shift is measured on these labels too.
    let [by_name_shift, given_shift, own_shift] = [&by_name, &given, &own].map(|run| {
        let (json, path) = (run.join("shift.json"), run.display().to_string());
        let options = ["--num-samples", "6", "--shift-samples", "12", "--extractor", "raw_pixels"];
        let json_path = json.display().to_string();
        let call = [&["evaluate", &path, "--json", &json_path][..], &options].concat();
        workshop.ddil(&call).succeeded();
        crate::support::json(&json)[0]["shift"].clone()
    });
    assert!(by_name_shift.as_array().is_some_and(|rows| !rows.is_empty()), "{by_name_shift}");
    assert_eq!(by_name_shift, given_shift);
    assert_ne!(by_name_shift, own_shift);
    Ok(())
}

#[test]
fn folders_without_a_class_are_the_data_that_exclude_it() {
    let workshop = Workshop::with_teacher();
    copy_folder(&workshop.path("data/class1"), &workshop.path("two/class1"));
    copy_folder(&workshop.path("data/class2"), &workshop.path("two/class2"));
    let two = workshop.complete("distill", "two", &["data.path=two", CLASSES]);
    let excluded = "data.exclude_classes=[\"class0\"]";
    let excluded = workshop.complete("distill", "excluded", &[excluded, CLASSES]);
    assert_eq!(student(&two), student(&excluded));
    let figures = last_figures(&two);
    assert_eq!(figures, last_figures(&excluded));
    assert!(count(&figures, "conditioned_class_0") > 0, "{figures}");
}

#[test]
fn folders_of_other_names_are_classes_by_the_config() {
    let workshop = Workshop::with_teacher();
    copy_folder(&workshop.path("data/class0"), &workshop.path("odd/hat"));
    copy_folder(&workshop.path("data/class1"), &workshop.path("odd/cap"));
    each_is_refused_beside(
        &workshop,
        &[
            (
                &["data.path=odd"],
                &["cap, hat", "class0, class1, class2", "data.classes", "data.exclude_classes"],
            ),
            (
                &["data.path=odd", "data.classes=[\"class0\", \"class3\"]"],
                &["data.classes", "class3", "class0, class1"],
            ),
            (&["data.path=odd", "data.classes=[\"class0\"]"], &["1 names", "2 names", "cap, hat"]),
        ],
    );
    let both = "data.classes=[\"class2\", \"class2\"]";
    let both = workshop.complete("distill", "both", &["data.path=odd", both, SECOND]);
    let figures = last_figures(&both);
    assert_eq!(count(&figures, "conditioned_class_2"), count(&figures, "conditioned_data"));
    // A class that is left out needs no counterpart.
    let left =
        ["data.path=odd", "data.exclude_classes=[\"hat\"]", "data.classes=[\"class1\", \"-\"]"];
    workshop.complete("distill", "left", &left);
}

/// As [`each_is_refused`], in a workshop with runs.
#[track_caller]
fn each_is_refused_beside(workshop: &Workshop, cases: &[(&[&str], &[&str])]) {
    for (settings, words) in cases {
        workshop.ddil(&arguments("distill", "refused", settings)).refused(words);
        assert!(!workshop.run("refused").exists(), "{settings:?}");
    }
}

#[test]
fn a_teacher_without_names_takes_as_many_classes_in_order_or_numbers() -> TestResult {
    let workshop = Workshop::with_teacher();
    name_classes(&workshop.write_teacher("unnamed", Some(3)), &[])?;
    write_pictures(&workshop.path("two"), 2, 8);
    let unnamed = "teacher.path=unnamed";
    let own = workshop.complete("distill", "own", &[]);
    let ended = workshop.ddil(&arguments("distill", "in_order", &[unnamed])).succeeded();
    assert!(
        ended.stderr.contains("alphabetical order: class0, class1, class2"),
        "{}",
        ended.stderr
    );
    assert_eq!(student(&own), student(&workshop.run("in_order")));
    // 10 comes before 9.
    for (from, to) in [("class0", "10"), ("class1", "8"), ("class2", "9")] {
        copy_folder(&workshop.path("data").join(from), &workshop.path("numbers").join(to));
    }
    let numbers = ["data.path=numbers", unnamed];
    let ended = workshop.ddil(&arguments("distill", "numbers", &numbers)).succeeded();
    assert!(ended.stderr.contains("\"10\" is label 0; data.classes sets"), "{}", ended.stderr);
    each_is_refused_beside(
        &workshop,
        &[
            (
                &[unnamed, "data.path=two"],
                &["class0, class1", "have no names: 0 to 2", "data.classes"],
            ),
            (
                &[unnamed, "data.path=two", "data.classes=[\"0\", \"3\"]"],
                &["data.classes", "is 3", "0 to 2"],
            ),
            (
                &[unnamed, "prompts={ source = \"classes\", classes = [\"class0\"] }"],
                &["prompts.classes", "0 to 2"],
            ),
        ],
    );
    let settings = [unnamed, "data.path=two", "data.classes=[\"0\", \"2\"]", CLASSES];
    let figures = last_figures(&workshop.complete("distill", "given", &settings));
    assert!((0..3).all(|class| count(&figures, &format!("conditioned_class_{class}")) > 0));
    assert_eq!(
        json(&workshop.run("given").join("export/ddil.json"))["class_names"],
        serde_json::json!(["0", "1", "2"])
    );
    Ok(())
}

#[test]
fn a_part_of_the_samples() {
    let workshop = Workshop::with_teacher();
    let all = workshop.complete("train", "all", &[]);
    let as_many = workshop.complete("train", "as_many", &["data.max_samples=24"]);
    assert_same_end(&all, &as_many);
    let settings = |more: &'static str| ["data.max_samples=5", more];
    let first = workshop.complete("train", "first", &settings("data.max_samples_choice=first"));
    let drawn = workshop.complete("train", "drawn", &settings("data.max_samples_seed=1"));
    let other = workshop.complete("train", "other", &settings("data.max_samples_seed=2"));
    let students = [&all, &first, &drawn, &other].map(|run| student(run));
    assert!((0..4).all(|i| (0..i).all(|j| students[i] != students[j])));
    // The first five are of the first class.
    let one = ["data.max_samples=5", "data.max_samples_choice=first", FIRST_DATA];
    let one =
        workshop.complete("train", "one", &[&one[..], &["model.num_class_embeds=2"]].concat());
    let card = json(&one.join("export/ddil.json"));
    assert_eq!(
        (&card["class_names"], &card["null_class"]),
        (&serde_json::json!(["class0"]), &1.into())
    );
    // Of a distillation, the labels stay the teacher's.
    let run = workshop.complete(
        "distill",
        "few",
        &[SECOND, "data.exclude_classes=[\"class0\"]", "data.max_samples=4"],
    );
    let figures = last_figures(&run);
    assert_eq!(count(&figures, "conditioned_class_0"), 0, "{figures}");
}

#[test]
fn settings_that_do_not_fit() {
    let workshop = Workshop::with_teacher();
    fs::write(workshop.path("prompts.txt"), "a cat\n").expect("it is writable");
    let with = |more: &str| -> &'static str {
        format!("prompts={{ source = \"classes\", {more} }}").leak()
    };
    each_is_refused(
        &workshop,
        "distill",
        &[
            (&["prompts.source=classs"], &["did you mean `classes`?"]),
            (&["prompts.sources=data"], &["did you mean `source`?"]),
            (&["prompts.source=file"], &["prompts.path", "not set", "a file of prompts"]),
            (
                &["prompts={ source = \"file\", path = \"prompts.txt\" }"],
                &["prompts.source", "file", "takes no text"],
            ),
            (
                &["prompts.classes=[\"class0\"]"],
                &["prompts.classes", "prompts.source = \"data\"", "\"classes\""],
            ),
            (&["prompts.weights=[1.0]"], &["prompts.weights", "\"classes\""]),
            (&[with("path = \"prompts.txt\"")], &["prompts.path", "\"classes\"", "\"file\""]),
            (&[with("captions = \"first\"")], &["prompts.captions", "\"file\""]),
            (&[with("cache = \"here\"")], &["prompts.cache", "\"file\""]),
            (
                &[with("classes = [\"class7\", \"hat\"]")],
                &["prompts.classes", "class7, hat", "class0, class1, class2"],
            ),
            (
                &[with("classes = [\"class1\", \"class1\"]")],
                &["prompts.classes", "\"class1\" twice"],
            ),
            (
                &[with("weights = [1.0, 2.0]")],
                &["prompts.weights", "2 weights", "3", "class0, class1, class2"],
            ),
            (
                &[with("classes = [\"class1\"], weights = [1.0, 2.0]")],
                &["prompts.weights", "1 weights"],
            ),
            (&[with("weights = [0.0, 0.0, 0.0]")], &["prompts.weights", "not all 0"]),
            (&[with("weights = [1.0, -1.0, 1.0]")], &["prompts.weights", "at least 0"]),
            (&[with("weights = [1.0, nan, 1.0]")], &["prompts.weights", "at least 0"]),
            (&[with("weights = [1.0, inf, 1.0]")], &["prompts.weights", "finite"]),
        ],
    );
    // Known before the run: a dry run tells too.
    let dry =
        [arguments("distill", "dry", &[with("classes = [\"hat\"]")]), vec!["--dry-run"]].concat();
    workshop.ddil(&dry).refused(&["prompts.classes", "hat"]);
}

#[test]
fn parts_of_the_data_that_do_not_exist() {
    let workshop = Workshop::with_teacher();
    write_pictures(&workshop.path("four"), 4, 8);
    each_is_refused(
        &workshop,
        "distill",
        &[
            (&["data.path=four"], &["class3", "class0, class1, class2", "data.exclude_classes"]),
            (
                &["data.exclude_classes=[\"hat\"]"],
                &["data.exclude_classes", "\"hat\"", "class0, class1, class2"],
            ),
            (
                &["data.exclude_classes=[\"class0\", \"class1\", \"class2\"]"],
                &["data.exclude_classes", "to leave samples"],
            ),
            (&["data.max_samples=0"], &["data.max_samples", "at least 1"]),
            (&["data.max_samples=25"], &["data.max_samples", "25", "1..=24"]),
            (&["data.max_samples=17", FIRST_DATA], &["data.max_samples", "17", "1..=8"]),
            (&["data.max_samples=3"], &["data.batch_size", "4", "at most 3"]),
            (
                &["data.max_samples_choice=first"],
                &["data.max_samples_choice", "without data.max_samples"],
            ),
            (&["data.max_samples_seed=1"], &["data.max_samples_seed", "random choice"]),
            (
                &["data.max_samples=4", "data.max_samples_choice=first", "data.max_samples_seed=1"],
                &["data.max_samples_seed", "random choice"],
            ),
            (&["data.max_samples_choice=last"], &["last", "first", "random"]),
        ],
    );
    // The excluded class that the teacher does not know is no obstacle.
    workshop.complete("distill", "four", &["data.path=four", "data.exclude_classes=[\"class3\"]"]);

    let workshop = Workshop::new();
    each_is_refused(
        &workshop,
        "train",
        &[
            (&["prompts.source=classes"], &["unknown key `prompts`"]),
            (
                &["data.classes=[\"a\", \"b\", \"c\"]"],
                &["data.classes", "those of `ddil train` are the data's"],
            ),
            (
                &["data.exclude_classes=[\"class0\"]"],
                &["model.num_class_embeds", "3: the 2 classes of the data"],
            ),
            (&["data.exclude_classes=[\"class9\"]"], &["data.exclude_classes", "class9"]),
        ],
    );
}

const PROMPTS: &str = "prompts={ source = \"file\", path = \"prompts.jsonl\" }";
const COCO: &str = "prompts={ source = \"file\", path = \"captions_val.json\", captions = \"first\", \
                    cache = \"said\" }";
const NO_FORWARD: &str =
    "mixing.priors={ kind = \"constant\", priors = { student = 0.5, teacher = 0.5 } }";
const LATENTS: &str = "data={ kind = \"latents\", path = \"cache\", batch_size = 4 }";

/// A workshop of text with prompts that no caption has.
fn of_text(family: Family) -> Workshop {
    let workshop = Workshop::of_text(family);
    let lines = "{\"text\": \"2 red cats\"}\n{\"caption\": [\"red dogs\", \"dogs, 2\"]}\n";
    fs::write(workshop.path("prompts.jsonl"), lines).expect("it is writable");
    let coco = r#"{"images": [{"id": 4}, {"id": 2}], "annotations": [{"image_id": 2, "caption": "red dogs"},
        {"image_id": 2, "caption": "dogs"}, {"image_id": 4, "caption": "2 red cats"}]}"#;
    fs::write(workshop.path("captions_val.json"), coco).expect("it is writable");
    workshop
}

#[test]
fn each_method_takes_prompts_of_a_file() {
    for family in [Family::StableDiffusion, Family::StableDiffusionXl] {
        let workshop = of_text(family);
        let cases: [(&str, &[&str]); 4] = [
            ("pd", &[PROMPTS]),
            ("lcm", &[PROMPTS, LCM, "mixing.teacher={ pool = 4, substeps = 1 }"]),
            ("dmd2", &[COCO, "objective={ method = \"dmd2\", critic_ratio = 1 }"]),
            ("latents", &[PROMPTS, LATENTS]),
        ];
        for (name, settings) in cases {
            let run = workshop.complete("distill", name, settings);
            let figures = last_figures(&run);
            let [data, file] =
                ["conditioned_data", "conditioned_file"].map(|name| count(&figures, name));
            assert_eq!(data + file, 16, "{name}");
            assert!(data > 0 && file > 0, "{name}: {figures}");
        }
        // Beside the data's cache, or where the config says.
        let texts = |folder: &str| json(&workshop.path(folder).join("prompts.json"));
        assert_eq!(
            texts("cache-prompts"),
            serde_json::json!(["", "2 red cats", "red dogs", "dogs, 2"])
        );
        assert_eq!(texts("said"), serde_json::json!(["", "2 red cats", "red dogs"]));
        // Latents of the cache are the captions.
        let pd = workshop.run("pd");
        assert_eq!(student(&pd), student(&workshop.run("latents")));
        let captions = workshop.complete("distill", "captions", &[]);
        assert_ne!(student(&pd), student(&captions));
    }
}

/// Without noised data, prompts of a file are the prompts of the data: only their order differs.
#[test]
fn one_prompt_from_a_file_is_one_prompt_of_the_data() -> TestResult {
    let workshop = of_text(Family::StableDiffusionXl);
    fs::write(workshop.path("one.txt"), "2 red cats\n")?;
    let one = "data={ kind = \"prompts\", path = \"one.txt\", cache = \"one\", batch_size = 1 }";
    let other =
        "data={ kind = \"prompts\", path = \"prompts.jsonl\", cache = \"other\", batch_size = 1 }";
    let file = "prompts={ source = \"file\", path = \"one.txt\" }";
    let of_data = workshop.complete("distill", "of_data", &[one, NO_FORWARD]);
    let of_file = workshop.complete("distill", "of_file", &[other, NO_FORWARD, file]);
    assert_eq!(student(&of_data), student(&of_file));
    let without = workshop.complete("distill", "without", &[other, NO_FORWARD]);
    assert_ne!(student(&of_data), student(&without));
    Ok(())
}

#[test]
fn prompts_of_a_file_resume_on_the_same_bits() {
    let cases: [&[&str]; 3] = [
        &[PROMPTS],
        &[COCO, "mixing.student.policy={ kind = \"chain\", refresh_fraction = 0.25 }"],
        &[PROMPTS, "objective={ method = \"dmd2\", critic_ratio = 2 }"],
    ];
    for settings in cases {
        let workshop = of_text(Family::StableDiffusionXl);
        resumes(&workshop, settings, &[0, 2]);
        let run = workshop.run("from_0").display().to_string();
        let again = workshop.ddil(&["distill", "--resume", &run]).succeeded();
        assert!(again.stderr.contains("using the encoded data in"), "{}", again.stderr);
    }
}

#[test]
fn a_part_of_the_captions_is_encoded() {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let all = workshop.complete("distill", "all", &[]);
    let few = "data={ kind = \"captions\", path = \"captions\", cache = \"few\", batch_size = 4, max_samples = 4 }";
    let captions = workshop.complete("distill", "few", &[few]);
    let info = json(&workshop.path("few/dataset.json"));
    assert_eq!(info["num_samples"], 4);
    assert_ne!(student(&all), student(&captions));
    // The same samples of latents that were all encoded.
    let latents = "data={ kind = \"latents\", path = \"cache\", batch_size = 4, max_samples = 4 }";
    let latents = workshop.complete("distill", "latents", &[latents]);
    assert_eq!(student(&captions), student(&latents));
}

#[test]
fn prompts_that_cannot_be_used() {
    let workshop = of_text(Family::StableDiffusion);
    let instances =
        r#"{"images": [{"id": 4}], "annotations": [{"image_id": 4, "bbox": [0, 0, 1, 1]}]}"#;
    fs::write(workshop.path("instances_val.json"), instances).expect("it is writable");
    fs::write(workshop.path("bad.csv"), "name,n\na,1\n").expect("it is writable");
    let with =
        |more: &str| -> &'static str { format!("prompts={{ source = \"file\", {more} }}").leak() };
    each_is_refused(
        &workshop,
        "distill",
        &[
            (&[CLASSES], &["prompts.source", "classes", "the teacher has no classes"]),
            (&[with("path = \"absent.txt\"")], &["absent.txt"]),
            (
                &[with("path = \"instances_val.json\"")],
                &["instances_val.json", "object instances", "captions_*.json"],
            ),
            (&[with("path = \"bad.csv\"")], &["bad.csv", "no column `text`", "name, n"]),
            (
                &[with("path = \"prompts.jsonl\", cache = \"cache\"")],
                &["prompts.cache", "another folder than data.cache"],
            ),
            (
                &[with("path = \"prompts.jsonl\", cache = \"captions\"")],
                &["prompts.cache", "another folder than data.path"],
            ),
            (
                &[with("path = \"prompts.jsonl\", cache = \"teacher\"")],
                &["prompts.cache", "teacher", "other files"],
            ),
            (&["data.classes=[\"a\"]"], &["data.classes", "captions", "no classes"]),
            (
                &["data.exclude_classes=[\"a\"]"],
                &["data.exclude_classes", "captions", "no classes"],
            ),
            (&["data.max_samples=7"], &["data.max_samples", "7", "1..=6"]),
        ],
    );
    assert!(!workshop.path("cache").exists(), "nothing was encoded");
    let before = snapshot(&workshop.path("teacher"));
    let dry = [arguments("distill", "dry", &[PROMPTS]), vec!["--dry-run"]].concat();
    workshop.ddil(&dry).succeeded();
    assert!(!workshop.path("cache-prompts").exists() && !workshop.path("cache").exists());
    assert_eq!(before, snapshot(&workshop.path("teacher")));
    // Latents of another program, whose prompts have other lengths.
    workshop.complete("distill", "made", &[PROMPTS]);
    let folder = workshop.path("cache");
    let file = folder.join("prompts.safetensors");
    let tensors = ddil_models::weights::read_all(&file).expect("it is there");
    let cut: Vec<_> = tensors.into_iter().map(|(name, t)| (name, t.narrow(1, 0, 6))).collect();
    let none = std::collections::BTreeMap::new();
    ddil_models::weights::save(&cut, &file, &none).expect("it is writable");
    let refused = arguments("distill", "refused", &[PROMPTS, LATENTS]);
    workshop.ddil(&refused).refused(&["prompts.path", "[8, 8]", "[6, 8]", "as in cache"]);
}
