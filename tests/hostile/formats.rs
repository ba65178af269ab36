//! Every file format of the project: files of version 1 stay readable, and those of other versions are refused with a
//! message.

use std::path::{Path, PathBuf};

use ddil::compare::{CellRecord, Outcome};
use ddil_core::{AggregationBuffer, BufferConfig, SavedState, Source};
use ddil_data::{EncodedDataset, EncodedInfo};
use ddil_evaluate::Measurement;
use ddil_pipelines::Card;
use ddil_schedulers::{TimestepSpacing, Timesteps};
use ddil_trainer::RunEnvironment;
use ddil_trainer::checkpoint::{Damage, find_latest};
use ddil_trainer::record::{Position, Record, read_lines};
use ddil_trainer::run_folder::{RunFolder, State, Status};
use serde_json::{Value, json};

use crate::inputs::{Tree, golden_formats, message_of, repository};

fn golden() -> PathBuf {
    repository().join("tests/golden/formats/v1")
}

/// A copy of the golden files in a folder that may be written to.
fn copied() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    Tree::read(&golden()).write(folder.path());
    folder
}

/// Rewrites the golden files: only for a new version, next to those of the old one.
#[test]
#[ignore = "writes tests/golden/formats/v1"]
fn record_version_1() {
    golden_formats().write(&golden());
}

#[test]
fn a_checkpoint_of_version_1_is_read() {
    let found = find_latest(&golden().join("checkpoints")).expect("a folder");
    let checkpoint = found.checkpoint.expect("it is sound");
    assert_eq!((checkpoint.step(), checkpoint.manifest().kind.as_str()), (7, "distill"));
    let saved = SavedState::new(
        checkpoint.tensors("buffer.safetensors").expect("tensors"),
        checkpoint.json("buffer.json").expect("JSON"),
    );
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("on the grid");
    let config = BufferConfig::default().with(|config| config.capacity = 12);
    let mut buffer = AggregationBuffer::new(config, &grid).expect("it is valid");
    buffer.restore(&saved).expect("a buffer");
    assert_eq!(buffer.statistics(2).per_index, [0, 2, 1, 1]);
    let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(0);
    let drawn = buffer.sample(&[3], 2, &mut rng).expect("it is there");
    assert_eq!((drawn.sources[0], drawn.created_at_step[0]), (Source::Student, 1));
}

#[test]
fn a_run_of_version_1_resumes() {
    let folder = copied();
    let path = folder.path().join("run");
    let status = Status::from_folder(&path).expect("a status");
    assert_eq!((status.state, status.step), (State::Completed, 3));
    let lines: Vec<Value> = read_lines(&path.join("metrics.jsonl")).expect("lines");
    assert_eq!(lines[2], json!({ "step": 3, "loss": 0.5 }));
    let text = std::fs::read(path.join("position.json")).expect("a position");
    let position: Position = serde_json::from_slice(&text).expect("a position");
    Record::resume(&path.join("metrics.jsonl"), position).expect("it is as it was");
    let environment = RunEnvironment::from_folder(&path).expect("an environment");
    assert_eq!((environment.first.step, environment.later[0].step), (0, 2));
    assert_eq!(environment.later[0].facts["num_threads"], 2);
    let run = RunFolder::resume(&path).expect("a run");
    run.ensure_config(&toml::toml! { steps = 10 }).expect("the same settings");
}

/// Before it contained a version, a status had the present form.
#[test]
fn a_status_without_a_version_is_of_the_first() {
    let folder = copied();
    let path = folder.path().join("run/status.json");
    change(&path, |object| {
        drop(object.as_object_mut().expect("an object").remove("format_version"));
    });
    assert_eq!(Status::from_folder(&folder.path().join("run")).expect("a status").step, 3);
}

#[test]
fn measurements_of_version_1_are_read() {
    let rows = Measurement::read_all(&golden().join("results.json")).expect("rows");
    assert_eq!((rows[0].method.as_str(), rows[0].frechet), ("progressive", Some(2.5)));
    let record = CellRecord::from_file(&golden().join("cell.json")).expect("a record");
    let outcome = record.expect("it is there").outcome;
    assert!(matches!(outcome, Outcome::Diverged { step: 5, .. }), "{outcome:?}");
}

#[test]
fn encoded_data_and_a_card_of_version_1_are_read() {
    let data = EncodedDataset::open(&golden().join("encoded"), None).expect("encoded data");
    assert_eq!((data.len(), data.texts()[2].as_str()), (2, "a dog"));
    let card = Card::from_file(&golden().join("ddil.json")).expect("a card");
    assert_eq!((card.method.as_str(), card.updates), ("lcm", 300));
}

/// Changes a JSON file.
fn change(path: &Path, how: impl FnOnce(&mut Value)) {
    let mut value: Value =
        serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON");
    how(&mut value);
    std::fs::write(path, value.to_string()).expect("there is room");
}

/// Gives a file another version, with a key that only that version has, and returns its reader's error.
fn of_version(
    version: u64,
    file: &str,
    pointer: &str,
    read: fn(&Path) -> Option<String>,
) -> String {
    let folder = copied();
    change(&folder.path().join(file), |value| {
        let place =
            if pointer.is_empty() { value } else { value.pointer_mut(pointer).expect("there") };
        place["format_version"] = json!(version);
        place["of_another_version"] = json!(true);
    });
    read(folder.path()).unwrap_or_else(|| panic!("{file} of version {version} is read"))
}

#[test]
fn other_versions_are_refused_with_a_message() {
    type Reader = fn(&Path) -> Option<String>;
    let readers: [(&str, &str, Reader); 7] = [
        ("checkpoints/step_0000007/manifest.json", "/manifest", |folder| {
            let found = find_latest(&folder.join("checkpoints")).expect("a folder");
            let damage = &found.damaged.first()?.reason;
            assert!(matches!(damage, Damage::Format { .. }), "{damage}");
            Some(format!("manifest.json: {damage}"))
        }),
        ("run/status.json", "", |folder| {
            Status::from_folder(&folder.join("run")).err().map(message_of)
        }),
        ("run/environment.json", "", |folder| {
            RunEnvironment::from_folder(&folder.join("run")).err().map(message_of)
        }),
        ("results.json", "/0", |folder| {
            Measurement::read_all(&folder.join("results.json")).err().map(message_of)
        }),
        ("cell.json", "", |folder| {
            CellRecord::from_file(&folder.join("cell.json")).err().map(message_of)
        }),
        ("encoded/dataset.json", "", |folder| {
            EncodedInfo::from_folder(&folder.join("encoded")).err().map(message_of)
        }),
        ("ddil.json", "", |folder| {
            Card::from_file(&folder.join("ddil.json")).err().map(message_of)
        }),
    ];
    for (file, pointer, read) in readers {
        for version in [0, 2, 4_000_000_000] {
            let outcome = of_version(version, file, pointer, read);
            let name = file.rsplit('/').next().expect("a name");
            for word in [name, "version", &version.to_string()] {
                assert!(outcome.contains(word), "`{word}` is not said of {file}: {outcome}");
            }
            assert!(!outcome.contains("of_another_version"), "{outcome}");
        }
    }
}
