use std::path::Path;

use ddil_files::{
    Error,
    settings::{Settings, differences, to_toml},
};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    name: String,
    seed: u32,
    train: Train,
    #[serde(default)]
    stages: Vec<Stage>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Train {
    learning_rate: f64,
    batch_size: u32,
    schedule: Schedule,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Schedule {
    Constant,
    Linear { start: f64, end: f64, warmup: Option<Warmup> },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Warmup {
    num_steps: u32,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stage {
    num_steps: u32,
}

const TEXT: &str = r#"name = "demo"
seed = 1

[train]
learning_rate = 1e-4
batch_size = 8
schedule = { kind = "linear", start = 1.0, end = 0.0, warmup = { num_steps = 5 } }

[[stages]]
num_steps = 8
"#;

fn build(text: &str, overrides: &[&str]) -> Result<Config, Error> {
    let mut settings = Settings::parse("run.toml", text)?;
    overrides.iter().try_for_each(|assignment| settings.set(assignment))?;
    settings.build()
}

fn message(text: &str, overrides: &[&str]) -> String {
    build(text, overrides).expect_err("the settings are wrong").to_string()
}

#[test]
fn reads_a_valid_file() -> Result<(), Error> {
    let config = build(TEXT, &[])?;
    assert_eq!(config.seed, 1);
    assert_eq!(config.stages, [Stage { num_steps: 8 }]);
    Ok(())
}

#[test]
fn written_configs_read_back_equal() -> Result<(), Error> {
    let config =
        build(TEXT, &["train.learning_rate=0.1", "train.schedule.end=0.30000000000000004"])?;
    assert_eq!(build(&to_toml(&config)?, &[])?, config);
    Ok(())
}

#[test]
fn an_unknown_key_names_place_and_nearest() {
    assert_eq!(
        message(&TEXT.replace("batch_size", "bach_size"), &[]),
        "run.toml:6:1: unknown key `train.bach_size`; did you mean `batch_size`?"
    );
    assert_eq!(
        message(&TEXT.replace("seed", "sede"), &[]),
        "run.toml:2:1: unknown key `sede`; did you mean `seed`?"
    );
    assert_eq!(
        message(&TEXT.replacen("num_steps = 8", "num_steps = 8\nsteps = 8", 1), &[]),
        "run.toml:11:1: unknown key `stages.0.steps`; did you mean `num_steps`?"
    );
}

#[test]
fn a_key_without_a_similar_one_lists_all_keys() {
    assert_eq!(
        message(&format!("xyzzy = 3\n{TEXT}"), &[]),
        "run.toml:1:1: unknown key `xyzzy`; known keys: name, seed, train, stages"
    );
}

#[test]
fn unknown_keys_inside_a_tagged_enum_are_found_too() {
    let in_variant = TEXT.replace("end = 0.0", "edn = 0.0");
    assert_eq!(
        message(&in_variant, &[]),
        "run.toml:7:44: unknown key `train.schedule.edn`; did you mean `end`?"
    );
    let below_variant = TEXT.replace("{ num_steps = 5 }", "{ num_step = 5 }");
    assert_eq!(
        message(&below_variant, &[]),
        "run.toml:7:66: unknown key `train.schedule.warmup.num_step`; did you mean `num_steps`?"
    );
}

#[test]
fn an_unknown_variant_names_the_nearest() {
    let text = message(&TEXT.replace("\"linear\"", "\"liner\""), &[]);
    assert_eq!(
        text,
        "run.toml:7:14: `train.schedule.kind`: unknown variant `liner`, \
         expected `constant` or `linear`; did you mean `linear`?"
    );
}

#[test]
fn a_value_of_the_wrong_type_names_place_key_and_both_types() {
    assert_eq!(
        message(&TEXT.replace("batch_size = 8", "batch_size = \"many\""), &[]),
        "run.toml:6:1: `train.batch_size`: invalid type: string \"many\", expected u32"
    );
}

#[test]
fn a_missing_key_is_named() {
    assert_eq!(
        message(&TEXT.replace("batch_size = 8\n", ""), &[]),
        "run.toml:4:2: `train`: missing key `batch_size`"
    );
    assert_eq!(message("", &[]), "run.toml: `(top level)`: missing key `name`");
}

#[test]
fn invalid_toml_names_line_and_column() {
    let text = message("name = \"demo\"\nseed = = 1\n", &[]);
    assert!(text.starts_with("run.toml:2:8: "), "{text}");
}

#[test]
fn columns_count_characters() {
    assert!(message("name = \"ä\" x\n", &[]).starts_with("run.toml:1:12: "));
}

#[test]
fn overrides_are_toml_or_else_strings() -> Result<(), Error> {
    let overrides =
        ["name=a run", "train.batch_size = 16", "stages.0.num_steps=2", "stages.0={num_steps=3}"];
    let config = build(TEXT, &overrides)?;
    assert_eq!((config.name.as_str(), config.train.batch_size), ("a run", 16));
    assert_eq!(config.stages[0].num_steps, 3);
    assert_eq!(build(TEXT, &["name=2024-01-01"])?.name, "2024-01-01");
    assert_eq!(build(TEXT, &["name='5'"])?.name, "5");
    assert_eq!(build(TEXT, &["name=a=b"])?.name, "a=b");
    Ok(())
}

#[test]
fn an_invalid_override_is_named() {
    assert_eq!(
        message(TEXT, &["train.batch_size=-1"]),
        "--set train.batch_size=-1: `train.batch_size`: invalid value: integer `-1`, expected u32"
    );
    assert_eq!(
        message(TEXT, &["train.batchsize=4"]),
        "--set train.batchsize=4: unknown key `train.batchsize`; did you mean `batch_size`?"
    );
    assert_eq!(
        message(TEXT, &["train={learning_rate=1.0, bach_size=1}"]),
        "--set train={learning_rate=1.0, bach_size=1}: unknown key `train.bach_size`; \
         did you mean `batch_size`?"
    );
}

#[test]
fn an_override_of_an_unknown_key_is_refused_and_changes_nothing() -> Result<(), Error> {
    let mut settings = Settings::parse("run.toml", TEXT)?;
    for (assignment, reason) in [
        ("seed", "expected key=value"),
        ("=1", "the key has an empty part"),
        ("train..x=1", "the key has an empty part"),
        ("seed.x=1", "`x` cannot be set below a value of type integer"),
        ("stages.7.num_steps=1", "`7` is not one of its 1 entries"),
    ] {
        let error = settings.set(assignment).expect_err(assignment);
        assert_eq!(error.to_string(), format!("--set {assignment}: {reason}"));
    }
    assert_eq!(settings.build::<Config>()?, build(TEXT, &[])?);
    Ok(())
}

#[test]
fn a_missing_file_is_named() {
    let error = Settings::from_file(Path::new("no/such/run.toml")).expect_err("no such file");
    assert_eq!(error.to_string(), "could not read no/such/run.toml");
}

#[test]
fn differences_name_key_and_both_values() -> Result<(), Error> {
    let left = build(TEXT, &[])?;
    let right = build(TEXT, &["seed=2", "train.schedule={kind=\"constant\"}"])?;
    let lines: Vec<String> = differences(&left, &right)?.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "seed: 1 there, 2 here",
            "train.schedule.end: 0.0 there, not set here",
            "train.schedule.kind: \"linear\" there, \"constant\" here",
            "train.schedule.start: 1.0 there, not set here",
            "train.schedule.warmup: { num_steps = 5 } there, not set here",
        ]
    );
    assert_eq!(differences(&left, &left)?, []);
    Ok(())
}
