use ddil::doctor::{Doctor, Health};

use crate::TestResult;

#[test]
fn a_working_machine_is_not_broken_and_both_formats_agree() -> TestResult {
    let folder = tempfile::tempdir()?;
    let doctor = Doctor { folders: vec![folder.path().join("runs")], ..Doctor::default() };
    let report = doctor.examine()?;
    assert!(!report.is_broken(), "{report}");

    let (text, json) = (report.to_string(), serde_json::to_value(&report)?);
    let findings = json["findings"].as_array().ok_or("an array")?;
    assert_eq!(text.lines().count(), findings.len());
    for (line, finding) in text.lines().zip(findings) {
        assert!(line.contains(finding["detail"].as_str().ok_or("a string")?));
    }
    assert_eq!(json["environment"]["libtorch"], ddil_libtorch::version());
    assert!(json["environment"]["num_threads"].as_u64() >= Some(1));
    Ok(())
}

#[test]
fn an_impossible_folder_is_broken() -> TestResult {
    let folder = tempfile::tempdir()?;
    let report = Doctor::default().examine()?;
    assert!(report.findings.iter().all(|finding| !finding.subject.starts_with("disk")));
    let file = folder.path().join("file");
    std::fs::write(&file, "")?;
    if cfg!(target_os = "linux") {
        let report =
            Doctor { folders: vec!["/proc/runs".into()], ..Doctor::default() }.examine()?;
        assert!(report.is_broken());
        let worst = report.findings.iter().find(|finding| finding.health == Health::Broken);
        assert_eq!(worst.ok_or("one is broken")?.subject, "disk /proc/runs");
    }
    Ok(())
}
