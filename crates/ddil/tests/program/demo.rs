//! `ddil demo`: the comparison that it runs, in small.

use std::fs;

use serde_json::Value;

use crate::support::{TestResult, Workshop, json};

const TEACHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher");

/// One update of each student. All six are measured beside the teacher, with the classes that their data lack.
#[test]
fn six_students_are_compared_on_all_data_and_on_poor_data() -> TestResult {
    let workshop = Workshop::new();
    let small = ["student.updates_per_stage=1", "data.batch_size=2", "mixing.teacher.pool=2"];
    let mut demo = vec!["demo", "--teacher", TEACHER, "--num-samples", "20", "--folder", "shown"];
    demo.extend(small.iter().flat_map(|change| ["--set", change]));
    let said = workshop.ddil(&demo).succeeded();
    let page = workshop.path("shown").join("report.html");
    assert!(page.is_file() && said.stdout.contains("shown/report.html"), "{}", said.stdout);
    let entries = json(&workshop.path("shown/results.json"));
    let students: Vec<&Value> =
        entries.as_array().into_iter().flatten().filter(|entry| entry["kind"] == "cell").collect();
    let arms: Vec<&str> = students.iter().filter_map(|entry| entry["name"].as_str()).collect();
    assert_eq!(arms.len(), 6, "{entries}");
    for student in &students {
        let measurement = &student["measurement"];
        let agreement = measurement["class_agreement"].as_f64().expect("the classifier's classes");
        assert!((0.0..=1.0).contains(&agreement), "{agreement}");
        let missing = &measurement["missing_classes"];
        if student["name"].as_str().is_some_and(|name| name.starts_with("trousers")) {
            assert_eq!(missing["classes"].as_array().map(Vec::len), Some(9), "{missing}");
            assert_eq!(missing["samples"], 18);
            assert!(missing["frechet_to_teacher"].as_f64().is_some_and(|distance| distance > 0.0));
        } else {
            assert!(missing.is_null(), "{missing}");
        }
    }
    let next = said.stdout.lines().find(|line| line.contains("ddil sample")).expect("a next step");
    let model = next.split_whitespace().nth(2).expect("a run");
    assert!(workshop.path(model).join("export/model_index.json").is_file(), "{model}");

    // The same command runs nothing again.
    let table = fs::read(workshop.path("shown/table.md"))?;
    workshop.ddil(&demo).succeeded();
    assert_eq!(fs::read(workshop.path("shown/table.md"))?, table);
    workshop.ddil(&[&demo[..], &["--set", "run.seed=1"]].concat()).refused(&["run.seed", "seeds"]);
    for folder in ["two words", ".hidden"] {
        let named = ["demo", "--teacher", TEACHER, "--folder", folder];
        workshop.ddil(&named).refused(&["--folder", folder, "letters, digits"]);
    }
    let other = [&demo[..], &["--set", "data.batch_size=3"]].concat();
    workshop.ddil(&other).refused(&["batch_size", "--fresh"]);
    Ok(())
}
