use std::fs;

use ddil_trainer::{
    Error,
    record::{Position, Record, read_lines},
};
use serde_json::{Value, json};

use crate::{TestResult, child_on_full_disk, folder_of_child};

fn write(record: &mut Record, steps: std::ops::RangeInclusive<u64>) -> Result<(), Error> {
    for step in steps {
        record.write(step, &json!({ "loss": 1.0 / step as f64, "source": "student" }))?;
    }
    Ok(())
}

#[test]
fn a_resumed_record_equals_an_uninterrupted_one_to_the_byte() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (whole, resumed) = (folder.path().join("whole"), folder.path().join("resumed"));
    write(&mut Record::create(&whole)?, 1..=20)?;

    let mut record = Record::create(&resumed)?;
    write(&mut record, 1..=7)?;
    let position = record.position()?;
    write(&mut record, 8..=12)?;
    drop(record);
    fs::write(&resumed, [fs::read(&resumed)?, b"{\"step\":13,\"lo".to_vec()].concat())?;
    write(&mut Record::resume(&resumed, position)?, 8..=20)?;

    assert_eq!(fs::read(&whole)?, fs::read(&resumed)?);
    assert_eq!(
        read_lines::<Value>(&whole)?[19],
        json!({ "step": 20, "loss": 0.05, "source": "student" })
    );
    Ok(())
}

#[test]
fn positions_continue_after_a_resume() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (whole, resumed) = (folder.path().join("whole"), folder.path().join("resumed"));
    let mut record = Record::create(&whole)?;
    write(&mut record, 1..=9)?;
    let expected = record.position()?;

    let mut record = Record::create(&resumed)?;
    write(&mut record, 1..=4)?;
    let mut record = Record::resume(&resumed, record.position()?)?;
    write(&mut record, 5..=9)?;
    assert_eq!(record.position()?, expected);
    let json = serde_json::to_string(&expected)?;
    assert_eq!(serde_json::from_str::<Position>(&json)?, expected);
    Ok(())
}

#[test]
fn a_record_that_differs_from_the_checkpoint_is_refused_and_left_unchanged() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metrics.jsonl");
    let mut record = Record::create(&path)?;
    write(&mut record, 1..=5)?;
    let position = record.position()?;
    let sound = fs::read(&path)?;

    let mut flipped = sound.clone();
    flipped[10] ^= 1;
    for (content, reason) in [(&sound[..sound.len() - 1], "it now has"), (&flipped[..], "checksum")]
    {
        fs::write(&path, content)?;
        let error = Record::resume(&path, position).expect_err("it is damaged");
        assert!(matches!(error, Error::DamagedRecord { .. }));
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(fs::read(&path)?, content);
    }
    Ok(())
}

#[test]
fn a_run_killed_before_its_first_checkpoint_starts_its_record_over() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metrics.jsonl");
    write(&mut Record::resume(&path, Position::default())?, 1..=3)?;
    write(&mut Record::resume(&path, Position::default())?, 1..=1)?;
    assert_eq!(read_lines::<Value>(&path)?.len(), 1);
    fs::remove_file(&path)?;
    let later = Position { bytes: 5, crc32c: 0 };
    assert!(matches!(
        Record::resume(&path, later),
        Err(Error::Files(ddil_files::Error::Io { .. }))
    ));
    Ok(())
}

#[test]
fn a_record_is_not_started_over_another() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metrics.jsonl");
    write(&mut Record::create(&path)?, 1..=1)?;
    assert!(matches!(Record::create(&path), Err(Error::Files(ddil_files::Error::Io { .. }))));
    Ok(())
}

#[test]
fn timings_are_cut_by_step() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("timings.jsonl");
    write(&mut Record::resume_after(&path, 0)?, 1..=6)?;
    fs::write(&path, [fs::read(&path)?, b"{\"step\":4".to_vec()].concat())?;
    write(&mut Record::resume_after(&path, 4)?, 5..=5)?;
    let steps: Vec<Value> = read_lines(&path)?;
    assert_eq!(
        steps.iter().filter_map(|line| line["step"].as_u64()).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );

    fs::write(&path, b"{\"step\":1}\n{\"step\":2}")?;
    Record::resume_after(&path, 4)?;
    assert_eq!(fs::read(&path)?, b"{\"step\":1}\n");
    Ok(())
}

#[test]
fn json_without_an_object_is_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metrics.jsonl");
    let mut record = Record::create(&path)?;
    assert!(matches!(record.write(1, &3), Err(Error::Files(ddil_files::Error::Json { .. }))));
    assert_eq!(record.position()?, Position::default());
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_half_line() -> TestResult {
    if let Some(folder) = folder_of_child() {
        let mut record = Record::create(&folder.join("metrics.jsonl"))?;
        let long = json!({ "text": "x".repeat(7_000) });
        let error =
            (1..100).find_map(|step| record.write(step, &long).err()).ok_or("it is full")?;
        assert!(
            matches!(error, Error::Files(ddil_files::Error::Io { action: "write", .. })),
            "{error:?}"
        );
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let test = "record::a_full_disk_leaves_no_half_line";
    assert!(child_on_full_disk(test, folder.path())?.status()?.success());
    let lines = read_lines::<Value>(&folder.path().join("metrics.jsonl"))?;
    assert!((1..99).contains(&lines.len()), "{}", lines.len());
    Ok(())
}
