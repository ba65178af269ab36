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
        "run.toml:7:14: `train.schedule.kind` is \"liner\"; \
         expected `constant` or `linear`; did you mean `linear`?"
    );
}

#[test]
fn a_value_of_the_wrong_type_names_place_key_value_and_what_is_allowed() {
    assert_eq!(
        message(&TEXT.replace("batch_size = 8", "batch_size = \"many\""), &[]),
        "run.toml:6:1: `train.batch_size` is \"many\"; expected a whole number from 0 to 4294967295"
    );
}

#[test]
fn a_missing_key_is_named() {
    assert_eq!(
        message(&TEXT.replace("batch_size = 8\n", ""), &[]),
        "run.toml:4:2: `train`: missing key `batch_size`"
    );
    assert_eq!(message("", &[]), "run.toml: missing key `name`");
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
        "--set train.batch_size=-1: `train.batch_size` is -1; \
         expected a whole number from 0 to 4294967295"
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

/// A key of every kind of value that settings have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only errors are of interest")]
struct Kinds {
    text: Option<String>,
    path: Option<std::path::PathBuf>,
    flag: Option<bool>,
    byte: Option<u8>,
    count: Option<u32>,
    long: Option<u64>,
    size: Option<usize>,
    above: Option<std::num::NonZeroU32>,
    signed: Option<i32>,
    whole: Option<i64>,
    number: Option<f64>,
    single: Option<f32>,
    list: Option<Vec<u32>>,
    pair: Option<[i64; 2]>,
    mixed: Option<(String, u32)>,
    table: Option<Warmup>,
    keys: Option<std::collections::BTreeMap<String, u32>>,
    choice: Option<Choice>,
    tagged: Option<Tagged>,
    either: Option<Either>,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Choice {
    First,
    Second,
    Third,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[expect(dead_code, reason = "only errors are of interest")]
enum Tagged {
    Plain,
    Deep {
        rate: f64,
        choice: Option<Choice>,
        warmup: Option<Warmup>,
        sizes: Option<Vec<u32>>,
        low: Option<Either>,
        high: Option<Either>,
    },
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a number, or a list with one per channel")]
#[expect(dead_code, reason = "only errors are of interest")]
enum Either {
    One(f64),
    Each(Vec<f64>),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only errors are of interest")]
enum Content {
    Empty,
    Full(u32),
    Wide { width: u32 },
}

const KEYS: [&str; 26] = [
    "text",
    "path",
    "flag",
    "byte",
    "count",
    "long",
    "size",
    "above",
    "signed",
    "whole",
    "number",
    "single",
    "list",
    "list.0",
    "pair",
    "mixed",
    "table",
    "table.num_steps",
    "keys",
    "keys.a",
    "choice",
    "tagged",
    "tagged.rate",
    "tagged.warmup",
    "either",
    "content",
];

const VALUES: [&str; 16] = [
    "'a, expected b'",
    "''",
    "-1",
    "0",
    "300",
    "5000000000",
    "1.5",
    "1e300",
    "nan",
    "true",
    "[]",
    "[1, 'a']",
    "[-1]",
    "{}",
    "{ a = -1 }",
    "2024-01-01",
];

/// Every value at every key: the message names the key and has no word of Rust.
#[test]
fn messages_are_in_the_terms_of_a_file() {
    let text = "list = [1]\ntable = { num_steps = 1 }\nkeys = { a = 1 }\n\
                tagged = { kind = 'deep', rate = 1, warmup = { num_steps = 1 } }\n";
    let mut refused = 0;
    for (key, value) in KEYS.iter().flat_map(|key| VALUES.map(|value| (key, value))) {
        let mut settings = Settings::parse("run.toml", text).expect("valid TOML");
        settings.set(&format!("{key}={value}")).expect("the key can be set");
        let Err(error) = settings.build::<Kinds>() else { continue };
        let message = error.to_string();
        // Of several values that may be meant, none is: the place is that of the table.
        let place = format!("--set {key}={value}: ");
        let said = message.strip_prefix(&place).or(message.strip_prefix("run.toml:4:1: "));
        let said = said.unwrap_or_else(|| panic!("{message}"));
        let first = key.split('.').next().expect("a key");
        assert!(said.contains(&format!("`{first}")), "{message}");
        assert_eq!(ddil_tests::words_of_rust(said), [""; 0], "{message}");
        refused += 1;
        println!("{message}");
    }
    assert!(refused > 300, "{refused}");
}

/// The names that one key takes are not stated for another key.
#[test]
fn of_two_mistakes_the_first_is_stated_with_what_it_takes() {
    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only errors are of interest")]
    struct Two {
        first: String,
        second: Choice,
        third: Option<Choice>,
    }
    let said = |text: &str| {
        let settings = Settings::parse("two.toml", text).expect("valid TOML");
        settings.build::<Two>().expect_err(text).to_string()
    };
    for second in ["'x'", "''", "3", "'first'"] {
        let text = format!("first = 3\nsecond = {second}\nthird = ''");
        assert_eq!(said(&text), "two.toml:1:1: `first` is 3; expected text", "{second}");
    }
    let names = "expected `first`, `second` or `third`";
    for third in ["'x'", "''", "3"] {
        let text = format!("first = 'a'\nsecond = 3\nthird = {third}");
        assert_eq!(said(&text), format!("two.toml:2:1: `second` is 3; {names}"), "{third}");
    }
}

#[test]
fn each_kind_of_value_has_a_term() {
    let of = |assignment: &str| {
        let mut settings = Settings::parse("a.toml", "").expect("valid TOML");
        settings.set(assignment).expect("it can be set");
        let message = settings.build::<Kinds>().expect_err(assignment).to_string();
        message.strip_prefix(&format!("--set {assignment}: ")).expect("the place").to_owned()
    };
    let names = "`first`, `second` or `third`";
    for (assignment, message) in [
        ("text=3", "`text` is 3; expected text".to_owned()),
        ("flag='yes'", "`flag` is \"yes\"; expected true or false".to_owned()),
        ("number='a'", "`number` is \"a\"; expected a number".to_owned()),
        ("above=0", "`above` is 0; expected a whole number from 1 to 4294967295".to_owned()),
        ("size=-1", "`size` is -1; expected a whole number, 0 or more".to_owned()),
        ("list=5", "`list` is 5; expected a list".to_owned()),
        ("pair=[1, 2, 3]", "`pair` is a list of 3 values; expected fewer values".to_owned()),
        ("pair=[1]", "`pair` is a list of 1 value; expected a list of 2 values".to_owned()),
        ("table=3", "`table` is 3; expected a table".to_owned()),
        ("table=[]", "`table` is a list of 0 values; expected a table".to_owned()),
        ("choice=3", format!("`choice` is 3; expected {names}")),
        (
            "choice='secnd'",
            format!("`choice` is \"secnd\"; expected {names}; did you mean `second`?"),
        ),
        ("tagged=3", "`tagged` is 3; expected a table with a `kind`".to_owned()),
        ("tagged.kind=3", "`tagged.kind` is 3; expected `plain` or `deep`".to_owned()),
        ("tagged={kind='deep', rate='x'}", "`tagged.rate` is \"x\"; expected a number".to_owned()),
        ("tagged={kind='deep', rate={}}", "`tagged.rate` is a table; expected a number".to_owned()),
        (
            "tagged={kind='deep', rate=1, choice='x', sizes=['x']}",
            "`tagged` contains \"x\"; expected `first`, `second` or `third`".to_owned(),
        ),
        ("tagged={kind='deep'}", "`tagged`: missing key `rate`".to_owned()),
        (
            "tagged={kind='deep', rate=1, low=2, high='x'}",
            "`tagged.high` is \"x\"; expected a number, or a list with one per channel".to_owned(),
        ),
        (
            "tagged={kind='deep', rate=1, low={}, high=[2]}",
            "`tagged.low` is a table; expected a number, or a list with one per channel".to_owned(),
        ),
        (
            "either='a'",
            "`either` is \"a\"; expected a number, or a list with one per channel".to_owned(),
        ),
        ("content=3", "`content` is 3; expected `empty`, `full` or `wide`".to_owned()),
    ] {
        assert_eq!(of(assignment), message);
    }
}

/// Serde reads the fields of a struct from a list too, in sequence: in a file that is a mistake.
#[test]
fn a_list_is_no_table() -> Result<(), Error> {
    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Data {
        kind: Option<String>,
        seed: u32,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Whole {
        #[serde(default)]
        data: Data,
        #[serde(default)]
        parts: Vec<Data>,
        #[serde(default)]
        content: Option<Named>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Named {
        Empty,
        Inner(Data),
    }

    let of = |text: &str, assignment: &str| {
        let mut settings = Settings::parse("a.toml", text)?;
        settings.set(assignment)?;
        settings.build::<Whole>()
    };
    let table = |key: &str, count: &str| format!("`{key}` is a list of {count}; expected a table");
    for (assignment, message) in [
        ("data=[]", table("data", "0 values")),
        ("data=['images', 3]", table("data", "2 values")),
        ("parts=[{ seed = 1 }, []]", table("parts.1", "0 values")),
        ("content={ inner = [] }", table("content.inner", "0 values")),
    ] {
        let error = of("", assignment).expect_err(assignment).to_string();
        assert_eq!(error, format!("--set {assignment}: {message}"));
    }
    let error = of("\ndata = []\n", "parts=[]").expect_err("a list").to_string();
    assert_eq!(error, format!("a.toml:2:1: {}", table("data", "0 values")));
    // Tables and lists in their own places.
    let whole = of("[data]\n", "parts=[{ seed = 1 }, {}]")?;
    let one = Data { seed: 1, ..Data::default() };
    assert_eq!((whole.data, whole.parts), (Data::default(), vec![one, Data::default()]));
    assert_eq!(of("", "parts=[]")?.parts, []);
    let inner = Named::Inner(Data { seed: 2, ..Data::default() });
    assert_eq!(of("", "content={ inner = { seed = 2 } }")?.content, Some(inner));
    assert_eq!(of("", "content=empty")?.content, Some(Named::Empty));
    Ok(())
}
