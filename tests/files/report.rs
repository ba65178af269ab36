//! `Report`: an error with its causes.

use ddil_files::{Error, Report, read_json, with_causes};

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
