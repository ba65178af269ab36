//! What runs write and read again.

use std::collections::BTreeMap;
use std::path::Path;

use ddil::compare::{CellRecord, Outcome};
use ddil::results;
use ddil_core::{
    AggregationBuffer, BufferConfig, Conditioning, Mixer, MixerConfig, SavedState, Source,
    SpillConfig, States, StudentPolicy,
};
use ddil_evaluate::Measurement;
use ddil_pipelines::Card;
use ddil_schedulers::{Ddim, NoiseScheduleConfig, Thresholding, TimestepSpacing, Timesteps};
use ddil_trainer::RunEnvironment;
use ddil_trainer::checkpoint::{self, Checkpoint, CheckpointWriter, Manifest};
use ddil_trainer::record::{self, Position, Record};
use ddil_trainer::run_folder::{RunFolder, Status, is_in_use};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::harness::{Response, Target, message_of};
use super::tree::Tree;

fn grid() -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("it is on the grid")
}

/// A checkpoint with a buffer in it.
fn checkpoint_folder() -> Tree {
    let folder = tempfile::tempdir().expect("a folder");
    let saved = buffer().save().expect("it can be saved");
    let mut writer = CheckpointWriter::new(folder.path(), 7, "distill").expect("a folder");
    writer
        .tensors("buffer.safetensors", &saved.tensors)
        .and_then(|writer| writer.json("buffer.json", &saved.metadata))
        .expect("there is room");
    writer.commit().expect("there is room");
    Tree::read(folder.path())
}

/// A checkpoint with a buffer that keeps one state a ring in memory and the others in files of `segment_rows`.
fn spilled_checkpoint(segment_rows: usize) -> Tree {
    let folder = tempfile::tempdir().expect("a folder");
    let config = spilling(&folder.path().join("spill"), segment_rows);
    let mut buffer = AggregationBuffer::new(config, &grid()).expect("it is valid");
    // More than there is room for, so that files have been let go.
    (0..3).for_each(|round| fill(&mut buffer, 10 * round));
    let saved = buffer.save().expect("it can be saved");
    assert!(!saved.files.is_empty());
    let checkpoints = folder.path().join("checkpoints");
    let mut writer = CheckpointWriter::new(&checkpoints, 7, "distill").expect("a folder");
    writer
        .tensors("buffer.safetensors", &saved.tensors)
        .and_then(|writer| writer.json("buffer.json", &saved.metadata))
        .expect("there is room");
    for file in &saved.files {
        writer.link(file).expect("it can be linked");
    }
    writer.commit().expect("there is room");
    Tree::read(&checkpoints)
}

/// Room for one state a ring in memory, and for `segment_rows` in each of two files.
fn spilling(folder: &Path, segment_rows: usize) -> BufferConfig {
    // Three rings; a state is three halves and a label.
    let row_bytes = 3 * 2 + 8;
    let file_bytes = (4096 + segment_rows * row_bytes) as u64;
    let spill = SpillConfig::new(folder.to_owned(), 3 * 2 * file_bytes);
    BufferConfig::default().with(|config| {
        config.capacity = 12;
        config.byte_budget = 3 * row_bytes as u64;
        config.spill = Some(spill);
    })
}

fn buffer() -> AggregationBuffer {
    let config = BufferConfig::default().with(|config| config.capacity = 12);
    let mut buffer = AggregationBuffer::new(config, &grid()).expect("it is valid");
    fill(&mut buffer, 0);
    buffer
}

fn fill(buffer: &mut AggregationBuffer, created_at_step: u64) {
    let grid_indices = vec![1, 2, 3, 1];
    let x_t = Tensor::ones([4, 3], tch::kind::FLOAT_CPU);
    let labels = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 1, 2, 3]));
    let mut states = States::new(x_t, &grid(), grid_indices, Source::Student)
        .expect("on the grid")
        .with_conditioning(labels);
    states.created_at_step = [1, 1, 1, 2].map(|own| created_at_step + own).to_vec();
    buffer.insert(&states).expect("it fits");
}

/// Corrects the checksums, so that the checks behind them are reached.
fn seal(tree: &mut Tree) {
    let files = tree.files.clone();
    let Some(content) = tree.files.get_mut("step_0000007/manifest.json") else { return };
    let Ok(mut sealed) = serde_json::from_slice::<Value>(content) else { return };
    for (name, content) in &files {
        let name = name.rsplit('/').next().unwrap_or_default();
        // Only files that still have their names; others stay corrupted.
        if let Some(member) = sealed.pointer_mut(&format!("/manifest/members/{name}"))
            && member.get("sha256").is_some_and(Value::is_string)
        {
            *member = json!({ "bytes": content.len(), "sha256": sha256(content) });
        }
        if let Some(linked) = sealed.pointer_mut(&format!("/manifest/linked/{name}"))
            && let Some(bytes) = linked.get("bytes").and_then(Value::as_u64)
            && let Some(content) = usize::try_from(bytes).ok().and_then(|n| content.get(..n))
        {
            *linked = json!({ "bytes": bytes, "crc32": crc32(content) });
        }
    }
    let parsed = serde_json::from_value::<Manifest>(sealed["manifest"].clone());
    if let Ok(manifest) = parsed {
        let compact = serde_json::to_vec(&manifest).expect("it is plain");
        sealed = json!({ "manifest": manifest, "sha256": sha256(&compact) });
    }
    *content = sealed.to_string().into_bytes();
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from_digit(digit.into(), 16))
        .collect::<Option<_>>()
        .expect("digits are below sixteen")
}

#[test]
fn checkpoint_as_it_is() {
    Target::new("checkpoint_as_it_is", vec![checkpoint_folder()], read_checkpoint).run();
}

/// The same with correct checksums: files made by hand.
#[test]
fn checkpoint_made_by_hand() {
    let seeds = vec![checkpoint_folder()];
    let mut target = Target::new("checkpoint_made_by_hand", seeds, read_checkpoint);
    target.repair = seal;
    target.run();
}

#[test]
fn spilled_buffer() {
    Target::new("spilled_buffer", spilled_seeds(), read_spilled).run();
}

/// The same with checksums that are right.
#[test]
fn spilled_buffer_made_by_hand() {
    let mut target = Target::new("spilled_buffer_made_by_hand", spilled_seeds(), read_spilled);
    target.repair = seal;
    target.run();
}

fn spilled_seeds() -> Vec<Tree> {
    [1, 2].map(spilled_checkpoint).into()
}

fn read_spilled(folder: &Path) -> Response {
    let checkpoint = intact_checkpoint(folder)?;
    // Of either seed there is room for the larger one.
    restore_into(spilling(&folder.join("spill"), 2), &checkpoint)
}

fn read_checkpoint(folder: &Path) -> Response {
    let checkpoint = intact_checkpoint(folder)?;
    let _ = checkpoint.obstacles_to_exact_resume().map_err(message_of)?;
    restore(&checkpoint)
}

fn intact_checkpoint(folder: &Path) -> Result<Checkpoint, String> {
    let found = checkpoint::find_latest(folder).map_err(message_of)?;
    let names = |damaged: &checkpoint::Damaged| message_about(&damaged.path, &damaged.reason);
    let Some(checkpoint) = found.checkpoint else {
        let first = found.damaged.first().map(names);
        return Err(first.unwrap_or_else(|| format!("nothing in {}", folder.display())));
    };
    let manifest = checkpoint.manifest();
    for name in manifest.members.keys().chain(manifest.linked.keys()) {
        let path = checkpoint.path().join(name);
        let inside = path.parent() == Some(checkpoint.path());
        assert!(inside, "{} is not in the checkpoint", path.display());
    }
    Ok(checkpoint)
}

fn message_about(path: &Path, reason: &checkpoint::Damage) -> String {
    format!("{}: {}", path.display(), reason)
}

fn restore(checkpoint: &Checkpoint) -> Response {
    restore_into(BufferConfig::default().with(|config| config.capacity = 12), checkpoint)
}

fn restore_into(config: BufferConfig, checkpoint: &Checkpoint) -> Response {
    let saved = SavedState::new(
        checkpoint.tensors("buffer.safetensors").map_err(message_of)?,
        checkpoint.json("buffer.json").map_err(message_of)?,
    )
    .with_files(checkpoint.linked());
    let mut buffer = AggregationBuffer::new(config, &grid()).map_err(message_of)?;
    buffer.restore(&saved).map_err(|error| format!("`buffer`: {}", message_of(error)))?;
    use_buffer(&mut buffer)
}

/// The operations of a run on a buffer: its length, draws, inserts, saves.
fn use_buffer(buffer: &mut AggregationBuffer) -> Response {
    let place = |error| format!("`buffer`: {}", message_of(error));
    let _ = buffer.statistics(3);
    let mut rng = StdRng::seed_from_u64(0);
    for grid_index in 0..5 {
        let available = buffer.available(grid_index, 3);
        if available > 0 {
            buffer.sample(&[grid_index; 3], 3, &mut rng).map_err(place)?;
        }
    }
    let x_t = Tensor::ones([2, 3], tch::kind::FLOAT_CPU);
    let labels = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 1]));
    let states = States::new(x_t, &grid(), vec![1, 3], Source::Student)
        .expect("on the grid")
        .with_conditioning(labels)
        .made_at(u64::MAX);
    // States of another shape may have been restored.
    let _ = buffer.insert(&states);
    buffer.save().map(drop).map_err(place)
}

/// A buffer's saved state without the checkpoint around it.
#[test]
fn saved_buffer() {
    let saved = buffer().save().expect("it can be saved");
    let seed = saved_tree(&saved);
    Target::new("saved_buffer", vec![seed], |folder| {
        let saved = read_saved(folder)?;
        let config = BufferConfig::default().with(|config| config.capacity = 12);
        let mut buffer = AggregationBuffer::new(config, &grid()).map_err(message_of)?;
        buffer.restore(&saved).map_err(|error| format!("`buffer`: {}", message_of(error)))?;
        use_buffer(&mut buffer)
    })
    .run();
}

fn mixer() -> Mixer {
    let schedule = NoiseScheduleConfig::default().build().expect("the default is valid");
    let policy = StudentPolicy::default();
    let config = MixerConfig::default().with(|config| {
        config.student.policy = policy;
    });
    Mixer::new(config, grid(), Box::new(Ddim::new(schedule))).expect("it is valid")
}

#[test]
fn saved_mixer() {
    let saved = mixer().save().expect("it can be saved");
    Target::new("saved_mixer", vec![saved_tree(&saved)], |folder| {
        let saved = read_saved(folder)?;
        let mut mixer = mixer();
        mixer.restore(&saved).map_err(|error| format!("`mixer`: {}", message_of(error)))?;
        mixer.save().map(drop).map_err(|error| format!("`mixer`: {}", message_of(error)))
    })
    .run();
}

fn saved_tree(saved: &SavedState) -> Tree {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("state.safetensors");
    ddil_models::weights::save(&saved.tensors, &path, &BTreeMap::default()).expect("there is room");
    Tree::read(folder.path()).with("state.json", saved.metadata.to_string())
}

fn read_saved(folder: &Path) -> Result<SavedState, String> {
    let tensors =
        ddil_models::weights::read_all(folder.join("state.safetensors")).map_err(message_of)?;
    let text = std::fs::read(folder.join("state.json")).map_err(|e| format!("state.json: {e}"))?;
    let metadata = serde_json::from_slice(&text).map_err(|e| format!("state.json: {e}"))?;
    Ok(SavedState::new(tensors.into_iter().collect(), metadata))
}

/// A run that started on one thread and continued with two.
const ENVIRONMENT: &str = r#"{
  "format_version": 1,
  "first": { "step": 0, "ddil": "0.1.0", "device": "cpu", "libtorch": "2.13.0", "num_threads": 1 },
  "later": [{ "step": 2, "num_threads": 2 }]
}
"#;

/// A complete run, with the position of its record in a separate file.
fn finished_run() -> Tree {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("run");
    let mut run = RunFolder::create(&path, &toml::toml! { steps = 10 }).expect("a folder");
    let mut metrics = Record::create(&run.file("metrics.jsonl")).expect("a file");
    for step in 1..4 {
        metrics.write(step, &json!({ "loss": 0.5 })).expect("there is room");
    }
    let position = metrics.position().expect("it is on disk");
    run.complete(3).expect("there is room");
    drop(run);
    let mut tree = Tree::read(&path)
        .with("position.json", serde_json::to_vec(&position).expect("it is plain"))
        .with("timings.jsonl", "{\"step\":1,\"seconds\":2}\n{\"step\":2,\"seconds\":3}\n")
        .with("environment.json", ENVIRONMENT);
    tree.files.remove(".lock");
    tree
}

#[test]
fn run_folder() {
    Target::new("run_folder", vec![finished_run()], read_run).run();
}

fn read_run(folder: &Path) -> Response {
    let _ = is_in_use(folder).map_err(message_of)?;
    let _ = Status::from_folder(folder).map_err(message_of)?;
    let lines: Vec<Value> =
        record::read_lines(&folder.join("metrics.jsonl")).map_err(message_of)?;
    let _ = RunEnvironment::from_folder(folder).map_err(message_of)?;
    RunEnvironment::note(folder, 3, tch::Device::Cpu).map_err(message_of)?;
    let run = RunFolder::resume(folder).map_err(message_of)?;
    run.settings().map_err(message_of)?;
    let text = std::fs::read(folder.join("position.json")).map_err(|_| "position.json")?;
    let position: Position = serde_json::from_slice(&text).map_err(|_| "position.json")?;
    let resumed = Record::resume(&folder.join("metrics.jsonl"), position);
    let _ = Record::resume_after(&folder.join("timings.jsonl"), 1).map_err(message_of)?;
    let _ = lines.len();
    resumed.map(drop).map_err(message_of)
}

fn measurement() -> Measurement {
    Measurement {
        format_version: 1,
        dataset: "test".to_owned(),
        method: "progressive".to_owned(),
        priors: None,
        thresholding: Thresholding::clamp_pixels(),
        guidance_scale: Some(3.0),
        steps: 4,
        seed: 1,
        updates: 300,
        seconds: 12.5,
        samples: 500,
        extractor: "raw-pixels".to_owned(),
        frechet: Some(2.5),
        frechet_to_teacher: Some(1.25),
        class_agreement: Some(0.875),
        missing_classes: None,
        kid: None,
        reference_samples: None,
        solver: None,
        input: None,
        standard_errors: None,
        protocol: None,
        prompts: None,
        image_size: None,
        sampling_seed: None,
        clip_score: None,
        diversity: None,
        precision: Some(0.5),
        recall: Some(0.25),
        density: Some(0.75),
        coverage: Some(0.625),
        shift: Vec::new(),
    }
}

fn cell() -> CellRecord {
    let outcome = Outcome::Diverged { step: 5, message: "the loss is NaN".to_owned() };
    CellRecord::new("on_seed0", "aa", "bb", outcome)
}

/// Files of every format of the project's own, small.
pub(crate) fn golden_formats() -> Tree {
    let mut all = Tree::default();
    let mut add = |folder: &str, tree: Tree| {
        all.files.extend(
            tree.files.into_iter().map(|(name, content)| (format!("{folder}{name}"), content)),
        );
    };
    add("checkpoints/", checkpoint_folder());
    add("run/", finished_run());
    add("encoded/", super::data::encoded());
    let card = Card { method: "lcm".to_owned(), updates: 300, ..Card::default() };
    add("", Tree::file("ddil.json", json_of(&card)).with("cell.json", json_of(&cell())));
    add("", Tree::file("results.json", json_of(&vec![measurement()])));
    all
}

fn json_of(value: &(impl serde::Serialize + ?Sized)) -> String {
    format!("{}\n", serde_json::to_string_pretty(value).expect("it is plain"))
}

#[test]
fn results_and_cells() {
    let seed = Tree::file("results.json", json_of(&vec![measurement()]))
        .with("cell.json", json_of(&cell()));
    Target::new("results_and_cells", vec![seed], |folder| {
        let cell = folder.join("cell.json");
        let record = CellRecord::from_file(&cell).map_err(message_of)?;
        if let Some(record) = record {
            record.write(&cell).map_err(message_of)?;
        }
        let path = folder.join("results.json");
        let rows = Measurement::read_all(&path).map_err(message_of)?;
        let named: Vec<_> = rows.iter().map(|row| (row.method.clone(), row.clone())).collect();
        let _ = (results::table(&named), results::shift_table(&named));
        match rows.first() {
            Some(row) => row.append_to(&path).map_err(message_of),
            None => Ok(()),
        }
    })
    .run();
}
