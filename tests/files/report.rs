//! `Report`: an error with its causes.

use ddil_files::{Error, Report, causes, read_json, with_causes};

const EXPECTED: &str = "could not read nowhere/config.json: No such file or directory (os error 2)";

fn missing() -> Result<f64, Report> {
    Ok(read_json("nowhere/config.json".as_ref())?)
}

#[test]
fn a_report_names_the_cause() {
    let error = read_json::<f64>("nowhere/config.json".as_ref()).expect_err("no file");
    assert!(!error.to_string().contains("No such file"), "{error}");
    assert_eq!(with_causes(&error), EXPECTED);

    let report = missing().expect_err("no file");
    assert_eq!(report.to_string(), EXPECTED);
    // Rust prints the error of a `main` in this form.
    assert_eq!(format!("{report:?}"), EXPECTED);
    assert!(matches!(report.downcast_ref(), Some(Error::Io { .. })));
}

#[test]
fn an_error_of_another_crate_is_printed_with_its_file() {
    let error = ddil_schedulers::SchedulerConfig::from_file("nowhere/config.json");
    let report = Report::from(error.expect_err("no file"));
    assert!(report.to_string().contains("nowhere/config.json: No such file"), "{report}");
    assert_eq!(Report::from("a text").to_string(), "a text");
}

/// An error whose message repeats its cause, as those of the safetensors crate.
#[derive(Debug)]
struct Repeats(serde_json::Error);

impl std::fmt::Display for Repeats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "invalid header: {}", self.0)
    }
}

impl std::error::Error for Repeats {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

#[test]
fn a_cause_is_printed_once_and_in_the_terms_of_a_file() {
    let json = serde_json::from_str::<Vec<u8>>("[1, 300]").expect_err("too large");
    let place = "found 300; expected a whole number from 0 to 255 at line 1 column 7";
    assert_eq!(causes(&Repeats(json)), ["invalid header", place]);

    // A message that is the cause's alone.
    let io = || std::io::Error::other("no power");
    assert_eq!(causes(&std::io::Error::other(io())), ["no power"]);
    let file = Error::io("read", "power".as_ref())(io());
    assert_eq!(causes(&file), ["could not read power", "no power"]);
}

#[test]
fn a_damaged_header_of_weights_is_described_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    let header = br#"{"a": [1, 2]}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header].concat();
    std::fs::write(&path, bytes).expect("there is room");
    let error = ddil_models::weights::read_all(&path).expect_err("a damaged header");
    let message = with_causes(&error);
    assert_eq!(message.matches("expected").count(), 1, "{message}");
    assert_eq!(ddil_tests::words_of_rust(&message), [""; 0], "{message}");
}
