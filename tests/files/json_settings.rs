//! Settings in JSON files: defaults, unknown keys, and messages in the terms of the file.

use ddil_files::{Error, JsonSettings};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Spacing {
    Leading,
    Linspace,
    Trailing,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Common {
    beta_start: f64,
    steps: u32,
    offset: i64,
    clip: bool,
    spacing: Vec<Spacing>,
    #[serde(rename = "_version")]
    version: Option<String>,
}

/// A class with further keys and other defaults of the common ones.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Derived {
    #[serde(flatten)]
    common: Common,
    scaling: f64,
}

fn derived() -> Derived {
    let common = Common {
        beta_start: 0.000_85,
        steps: 50,
        offset: 0,
        clip: false,
        spacing: vec![Spacing::Leading],
        version: None,
    };
    Derived { common, scaling: 10.0 }
}

fn parse(value: &serde_json::Value) -> JsonSettings {
    JsonSettings::parse(&value.to_string()).expect("an object")
}

#[test]
fn missing_keys_have_the_given_defaults() {
    assert_eq!(parse(&json!({})).over(&derived()), Ok(derived()));
    let file = parse(&json!({"scaling": 5, "spacing": ["trailing"], "_version": "1"}));
    let read = file.over(&derived()).expect("valid settings");
    assert_eq!((read.scaling, read.common.spacing), (5.0, vec![Spacing::Trailing]));
    assert_eq!((read.common.beta_start, read.common.version), (0.000_85, Some("1".to_owned())));
}

#[test]
fn settings_are_read_as_they_were_written() {
    let file = JsonSettings::of(&derived()).without_unset(&["_version"]).with_class("Derived");
    let text = file.to_string();
    let first = "{\n  \"_class_name\": \"Derived\",\n  \"beta_start\": 0.00085,\n";
    assert!(text.starts_with(first) && text.ends_with("\n}\n"), "{text}");
    assert!(!text.contains("_version"), "{text}");
    assert_eq!(JsonSettings::parse(&text).expect("as written").over(&derived()), Ok(derived()));
}

#[test]
fn keys_of_the_origin_are_never_unknown() {
    let file = parse(&json!({"_name_or_path": "x", "shift": 3, "steps": 4, "_class_name": "X"}));
    assert_eq!(file.unknown(&derived()), ["shift"]);
    assert_eq!(file.over(&derived()).expect("shift is ignored").common.steps, 4);
}

#[test]
fn every_problem_is_named_in_the_terms_of_the_file() {
    let file = parse(&json!({
        "beta_start": "small", "clip": 1, "offset": 0.5, "scaling": null,
        "spacing": ["leading", "even"], "steps": -5, "_version": 3,
    }));
    let messages: Vec<_> = file.problems(&derived()).iter().map(ToString::to_string).collect();
    let expected = [
        "`_version` is 3; expected text",
        r#"`beta_start` is "small"; expected a number"#,
        "`clip` is 1; expected true or false",
        "`offset` is 0.5; expected a whole number",
        "`scaling` is null; expected a number",
        r#"`spacing` is ["leading","even"]; expected `leading`, `linspace` or `trailing`, not "even""#,
        "`steps` is -5; expected a whole number from 0 to 4294967295",
    ];
    assert_eq!(messages, expected);
    assert_eq!(file.over(&derived()).expect_err("seven").to_string(), expected[0]);
    let one = parse(&json!({"spacing": "leading"}));
    let message = one.over(&derived()).expect_err("no list").to_string();
    assert_eq!(message, r#"`spacing` is "leading"; expected a list"#);
}

#[test]
fn a_choice_lists_its_names_whatever_the_value() {
    #[derive(Debug, Serialize, Deserialize)]
    struct Choice {
        only: Spacing,
    }
    let defaults = Choice { only: Spacing::Leading };
    for value in [json!(3), json!(null), json!("even"), json!(true)] {
        let message = parse(&json!({"only": value})).over(&defaults).expect_err("no choice");
        let expected = "expected `leading`, `linspace` or `trailing`";
        assert_eq!(message.to_string(), format!("`only` is {value}; {expected}"));
    }
}

#[test]
fn a_class_is_one_of_those_known() {
    let class = |value| parse(&value).class(&["A", "B", "C"]).map_err(|error| error.to_string());
    assert_eq!(class(json!({"_class_name": "B"})), Ok("B"));
    let refused = |found: &str| Err(format!("`_class_name` is {found}; expected A, B or C"));
    assert_eq!(class(json!({"_class_name": "D"})), refused("`D`"));
    assert_eq!(class(json!({"_class_name": 3})), refused("3"));
    assert_eq!(class(json!({})), refused("``"));
}

#[test]
fn files_without_a_json_object_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("config.json");
    assert!(matches!(JsonSettings::from_file(&path), Err(Error::Io { .. })));
    for text in ["", "[]", "null", "{\"a\": ", "{\"a\": 1} x"] {
        std::fs::write(&path, text).expect("a file");
        let error = JsonSettings::from_file(&path).expect_err(text);
        assert!(matches!(error, Error::Json { .. }), "{text}");
        assert!(error.to_string().contains("config.json"), "{error}");
    }
    let file = std::fs::File::create(&path).expect("a file");
    file.set_len(1 << 40).expect("a sparse file");
    assert!(matches!(JsonSettings::from_file(&path), Err(Error::Io { .. })));
}

/// The same settings type as a file and as an object.
#[test]
fn json_of_another_type_is_refused_in_the_terms_of_the_file() {
    fn said<T: serde::de::DeserializeOwned>(json: &str) -> String {
        ddil_files::parse_json::<T>(json.as_bytes()).err().expect(json).to_string()
    }
    assert_eq!(said::<Common>("3"), "found 3; expected an object at line 1 column 1");
    assert_eq!(
        said::<Common>("[]"),
        "found a list of 0 values; expected an object at line 1 column 2"
    );
    assert_eq!(said::<Common>("{}"), "missing key `beta_start` at line 1 column 2");
    assert_eq!(said::<Vec<f64>>("{}"), "found an object; expected a list at line 1 column 0");
    assert_eq!(
        said::<Vec<bool>>("[null]"),
        "found null; expected true or false at line 1 column 5"
    );
    assert_eq!(said::<Spacing>("{}"), "expected value at line 1 column 2");
    assert_eq!(
        said::<Vec<Spacing>>(r#"["even"]"#),
        r#"found "even"; expected `leading`, `linspace` or `trailing` at line 1 column 7"#
    );
    let twice = r#"{"clip": true, "clip": true}"#;
    assert_eq!(said::<Common>(twice), "the key `clip` occurs twice at line 1 column 21");
    assert_eq!(said::<Vec<f64>>("["), "EOF while parsing a list at line 1 column 1");
    let values = ["3", "-1", "1.5", "true", "null", "\"a\"", "[]", "[{}]", "{}", "{\"a\": []}"];
    for value in values {
        let of_each = [
            said::<std::num::NonZeroU8>(&format!("[{value}]")),
            said::<[String; 2]>(value),
            said::<(u64, String)>(value),
            said::<Derived>(value),
            said::<std::collections::BTreeMap<String, usize>>(&format!("[{value}]")),
        ];
        for message in of_each {
            assert_eq!(ddil_tests::words_of_rust(&message), [""; 0], "{message}");
        }
    }
}

/// What Python's `json.dumps` and editors of Windows write.
#[test]
fn numbers_that_are_not_finite_and_byte_order_marks_are_read() {
    #[derive(serde::Deserialize)]
    struct Row {
        text: String,
        score: Value,
    }
    let text =
        "\u{feff}{\"text\": \"a \\\"NaN\\\"\", \"score\": -Infinity, \"rest\": [NaN, Infinity]}";
    let row: Row = ddil_files::parse_json(text.as_bytes()).expect("as Python writes it");
    assert_eq!((row.text.as_str(), row.score), ("a \"NaN\"", Value::from("-Infinity")));
    let file = JsonSettings::parse(text).expect("the same");
    assert_eq!(file.object()["rest"], serde_json::json!(["NaN", "Infinity"]));

    let refused = |text: &str| {
        ddil_files::parse_json::<f64>(text.as_bytes()).expect_err("not a number").to_string()
    };
    assert!(refused("NaN").starts_with("found \"NaN\"; expected a number"), "{}", refused("NaN"));
    for text in ["nan", "[NaN", "{NaN}", "\u{feff}\u{feff}1", "+Infinity"] {
        ddil_files::parse_json::<Value>(text.as_bytes()).expect_err(text);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.txt");
    std::fs::write(&path, "\u{feff}text").expect("written");
    assert_eq!(ddil_files::read_text_bounded(&path, 100).expect("text"), "text");
}
