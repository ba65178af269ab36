use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use ddil_core::SavedFile;
use ddil_trainer::{
    Error,
    checkpoint::{
        Checkpoint, CheckpointWriter, Damage, Manifest, Retention, discard_newer, find,
        find_latest, folder_of, list, remove_leftovers,
    },
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::{TestResult, child, child_on_full_disk, folder_of_child};

fn tensors(seed: i64) -> Vec<(String, Tensor)> {
    let values = Tensor::arange(12, tch::kind::FLOAT_CPU) + seed as f64;
    vec![("b.weight".into(), values.view([3, 4])), ("a.bias".into(), values.get(0))]
}

fn save(checkpoints: &Path, step: u64) -> Result<Checkpoint, Error> {
    let mut writer = CheckpointWriter::new(checkpoints, step, "distill")?;
    writer.tensors("student.safetensors", &tensors(step as i64))?;
    writer.json("state.json", &json!({ "step": step }))?;
    writer.commit()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("the folder is there")
        .map(|entry| entry.expect("it can be read").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn steps(checkpoints: &Path) -> Vec<PathBuf> {
    list(checkpoints).expect("the folder can be listed")
}

/// The result of [`find_latest`]: the step, and the defects of newer ones.
fn latest(checkpoints: &Path) -> (Option<u64>, Vec<String>) {
    let found = find_latest(checkpoints).expect("the folder can be listed");
    let damaged = found.damaged.iter().map(|damaged| damaged.reason.to_string()).collect();
    (found.checkpoint.map(|checkpoint| checkpoint.step()), damaged)
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.contiguous();
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

#[test]
fn reads_what_was_written() -> TestResult {
    let folder = tempfile::tempdir()?;
    let written = save(folder.path(), 1000)?;
    assert_eq!(written.path(), folder.path().join("step_0001000"));
    assert_eq!(names(folder.path()), ["latest", "step_0001000"]);
    assert_eq!(fs::read_to_string(folder.path().join("latest"))?, "step_0001000\n");

    let checkpoint = find_latest(folder.path())?.checkpoint.ok_or("it was written")?;
    assert_eq!((checkpoint.step(), checkpoint.manifest()), (1000, written.manifest()));
    assert_eq!(checkpoint.json::<Value>("state.json")?, json!({ "step": 1000 }));
    let read = checkpoint.tensors("student.safetensors")?;
    assert_eq!(read[0].0, "a.bias");
    assert_eq!(read[1].1, tensors(1000)[0].1);
    assert_eq!(read[0].1.size(), [0_i64; 0]);
    assert_eq!(checkpoint.obstacles_to_exact_resume()?, [""; 0]);
    Ok(())
}

#[test]
fn keeps_every_bit_of_every_kind() -> TestResult {
    let bytes: Vec<u8> = (0..=255).collect();
    let kinds = [
        (Kind::Uint8, 1),
        (Kind::Int8, 1),
        (Kind::Int16, 2),
        (Kind::Half, 2),
        (Kind::BFloat16, 2),
        (Kind::Int, 4),
        (Kind::Float, 4),
        (Kind::Int64, 8),
        (Kind::Double, 8),
    ];
    let mut written: Vec<(String, Tensor)> = kinds
        .iter()
        .map(|&(kind, size)| {
            // Every byte value once: NaNs with payloads among the floats.
            (format!("{kind:?}"), Tensor::from_data_size(&bytes, &[2, 128 / size], kind))
        })
        .collect();
    let strided = written[6].1.transpose(0, 1);
    written.push(("strided".into(), strided));
    written.push(("empty".into(), Tensor::zeros([0, 3], tch::kind::FLOAT_CPU)));

    let folder = tempfile::tempdir()?;
    let mut writer = CheckpointWriter::new(folder.path(), 1, "test")?;
    writer.tensors("all.safetensors", &written)?;
    let read = writer.commit()?.tensors("all.safetensors")?;
    assert_eq!(read.len(), written.len());
    for (name, tensor) in &written {
        let (_, found) = read.iter().find(|(found, _)| found == name).ok_or(name.as_str())?;
        assert_eq!((found.kind(), found.size()), (tensor.kind(), tensor.size()), "{name}");
        assert_eq!(bits(found), bits(tensor), "{name}");
    }
    Ok(())
}

#[test]
fn the_safetensors_crate_reads_and_writes_the_same_file() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = save(folder.path(), 1)?.path().join("student.safetensors");
    let content = fs::read(path)?;
    let read = safetensors::SafeTensors::deserialize(&content)?;
    assert_eq!(read.tensor("b.weight")?.shape(), [3, 4]);
    assert_eq!(read.tensor("b.weight")?.data(), bits(&tensors(1)[0].1));
    let about = Some(std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]));
    assert_eq!(safetensors::serialize(read.iter(), about)?, content);
    Ok(())
}

#[test]
fn no_checkpoint_is_no_error() -> TestResult {
    let folder = tempfile::tempdir()?;
    assert_eq!(latest(folder.path()), (None, vec![]));
    assert_eq!(latest(&folder.path().join("nowhere")), (None, vec![]));
    let error = Checkpoint::open(&folder.path().join("nowhere")).expect_err("there is none");
    assert!(matches!(error, Error::Files(ddil_files::Error::Io { .. })));
    Ok(())
}

#[test]
fn damage_is_reported_and_the_last_intact_checkpoint_is_found() -> TestResult {
    type Harm = fn(&Path) -> std::io::Result<()>;
    let damages: [(&str, Harm); 7] = [
        ("manifest.json cannot be read", |path| fs::remove_file(path.join("manifest.json"))),
        ("manifest.json cannot be read", |path| shorten(&path.join("manifest.json"), 5)),
        ("does not match its own checksum", |path| {
            let path = path.join("manifest.json");
            fs::write(&path, fs::read_to_string(&path)?.replace("distill", "distil1"))
        }),
        ("student.safetensors cannot be read", |path| {
            fs::remove_file(path.join("student.safetensors"))
        }),
        ("student.safetensors has", |path| shorten(&path.join("student.safetensors"), 1)),
        ("student.safetensors does not match the SHA-256", |path| {
            flip(&path.join("student.safetensors"), 100, 3)
        }),
        ("manifest.json belongs to step 1", |path| {
            fs::copy(path.with_file_name("step_0000001/manifest.json"), path.join("manifest.json"))
                .map(drop)
        }),
    ];
    for (reason, damage) in damages {
        let folder = tempfile::tempdir()?;
        save(folder.path(), 1)?;
        let newest = save(folder.path(), 2)?;
        damage(newest.path())?;
        let (step, damaged) = latest(folder.path());
        assert_eq!((step, damaged.len()), (Some(1), 1), "{reason}");
        assert!(damaged[0].contains(reason), "{damaged:?} has no {reason:?}");
        let error = Checkpoint::open(newest.path()).expect_err(reason);
        assert!(matches!(error, Error::DamagedCheckpoint { .. }), "{error}");
    }
    Ok(())
}

fn shorten(path: &Path, bytes: u64) -> std::io::Result<()> {
    let file = File::options().write(true).open(path)?;
    file.set_len(file.metadata()?.len() - bytes)
}

fn flip(path: &Path, byte: usize, bit: u32) -> std::io::Result<()> {
    let mut content = fs::read(path)?;
    let byte = byte % content.len();
    content[byte] ^= 1 << bit;
    fs::write(path, content)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Any flipped bit of any file is detected, except for white space in the manifest.
    #[test]
    fn any_flipped_bit_is_detected(member in 0_usize..3, byte in 0_usize..4096, bit in 0_u32..8) {
        let folder = tempfile::tempdir()?;
        let checkpoint = save(folder.path(), 1)?;
        let name = ["manifest.json", "student.safetensors", "state.json"][member];
        let path = checkpoint.path().join(name);
        let sound: Option<Value> = serde_json::from_slice(&fs::read(&path)?).ok();
        flip(&path, byte, bit)?;
        let found: Option<Value> = serde_json::from_slice(&fs::read(&path)?).ok();
        let only_white_space = member == 0 && sound == found;
        prop_assert_eq!(latest(folder.path()).0.is_none(), !only_white_space);
    }
}

#[test]
fn a_manifest_cannot_name_a_file_outside_the_folder() -> TestResult {
    for name in ["../secret.json", "/etc/hostname", ".hidden", "a/b", "a\\b", "", "manifest.json"] {
        let folder = tempfile::tempdir()?;
        let mut writer = CheckpointWriter::new(folder.path(), 1, "test")?;
        let error = writer.json(name, &1).expect_err(name);
        assert!(matches!(error, Error::InvalidMember { .. }), "{error}");
        drop(writer);

        // A forger can make the checksum right.
        let path = save(folder.path(), 1)?.path().join("manifest.json");
        let mut sealed: Value = serde_json::from_slice(&fs::read(&path)?)?;
        let member = sealed["manifest"]["members"]["state.json"].clone();
        sealed["manifest"]["members"] = json!({ name: member });
        fs::write(&path, reseal(&sealed)?)?;
        let found = find_latest(folder.path())?;
        assert!(
            matches!(&found.damaged[0].reason, Damage::MemberName { name: found, .. } if found == name),
            "{found:?}"
        );
    }
    Ok(())
}

fn reseal(sealed: &Value) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    use sha2::Digest;
    let manifest: Manifest = serde_json::from_value(sealed["manifest"].clone())?;
    let sha256 = format!("{:x}", sha2::Sha256::digest(serde_json::to_vec(&manifest)?));
    Ok(serde_json::to_vec(&json!({ "manifest": manifest, "sha256": sha256 }))?)
}

/// A file that a run continues to write: the checkpoint has its first bytes, whatever follows them.
#[test]
fn a_linked_file_is_the_part_that_was_saved() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("growing");
    fs::write(&path, "saved")?;
    let file = SavedFile {
        name: "student.rows".to_owned(),
        path: path.clone(),
        bytes: 5,
        // As `python3 -c 'import zlib; print(hex(zlib.crc32(b"saved")))'` has it.
        crc32: 0xf9e3_d325,
    };
    let checkpoints = folder.path().join("checkpoints");
    let mut writer = CheckpointWriter::new(&checkpoints, 1, "test")?;
    writer.link(&file)?;
    assert!(matches!(writer.link(&file), Err(Error::InvalidMember { .. })));
    let outside = SavedFile { name: "../student.rows".to_owned(), ..file.clone() };
    assert!(matches!(writer.link(&outside), Err(Error::InvalidMember { .. })));
    writer.commit()?;
    fs::OpenOptions::new().append(true).open(&path)?.write_all(b" and more")?;
    fs::remove_file(&path)?;

    let checkpoint = find_latest(&checkpoints)?.checkpoint.ok_or("it is sound")?;
    let [linked] = &checkpoint.linked()[..] else { panic!("there is one") };
    assert_eq!(fs::read_to_string(&linked.path)?, "saved and more");
    assert_eq!(SavedFile { path, ..linked.clone() }, file);
    for (damage, words) in [("sawed and more", "CRC-32"), ("save", "4 bytes of the 5")] {
        fs::write(&linked.path, damage)?;
        let problem = latest(&checkpoints).1.join(" ");
        assert!(problem.contains("student.rows") && problem.contains(words), "{problem}");
    }
    fs::remove_file(&linked.path)?;
    assert!(matches!(find_latest(&checkpoints)?.damaged[0].reason, Damage::Linked { .. }));
    // A forger can make the checksum right.
    let manifest = checkpoint.path().join("manifest.json");
    let mut sealed: Value = serde_json::from_slice(&fs::read(&manifest)?)?;
    let member = sealed["manifest"]["linked"]["student.rows"].clone();
    sealed["manifest"]["linked"] = json!({ "../growing": member });
    fs::write(&manifest, reseal(&sealed)?)?;
    assert!(matches!(find_latest(&checkpoints)?.damaged[0].reason, Damage::MemberName { .. }));
    Ok(())
}

#[test]
fn a_future_format_is_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = save(folder.path(), 1)?.path().join("manifest.json");
    let mut sealed: Value = serde_json::from_slice(&fs::read(&path)?)?;
    sealed["manifest"]["format_version"] = json!(2);
    fs::write(&path, reseal(&sealed)?)?;
    assert_eq!(
        latest(folder.path()).1,
        ["its format version is 2, which this version of ddil cannot read"]
    );
    Ok(())
}

#[test]
fn names_and_kinds_that_are_wrong_are_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let checkpoint = save(folder.path(), 1)?;
    checkpoint.ensure_kind("distill")?;
    assert_eq!(
        checkpoint.ensure_kind("train").expect_err("another kind").to_string(),
        format!("{} is a checkpoint of `distill`, not of `train`", checkpoint.path().display())
    );
    let error = checkpoint.tensors("teacher.safetensors").expect_err("no such file");
    assert!(error.to_string().ends_with("only state.json, student.safetensors"), "{error}");
    assert!(matches!(checkpoint.tensors("state.json"), Err(Error::Tensors { .. })));

    let mut writer = CheckpointWriter::new(folder.path(), 2, "test")?;
    writer.json("state.json", &1)?;
    assert!(matches!(writer.json("state.json", &1), Err(Error::InvalidMember { .. })));
    let twice = [tensors(0), tensors(0)].concat_tensors();
    let error = writer.tensors("x.safetensors", &twice).expect_err("a name is there twice");
    assert!(error.to_string().contains("occurs twice"), "{error}");
    Ok(())
}

trait ConcatTensors {
    fn concat_tensors(self) -> Vec<(String, Tensor)>;
}

impl<const N: usize> ConcatTensors for [Vec<(String, Tensor)>; N] {
    fn concat_tensors(self) -> Vec<(String, Tensor)> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn a_dropped_writer_leaves_no_files() -> TestResult {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 1)?;
    let mut writer = CheckpointWriter::new(folder.path(), 2, "test")?;
    writer.json("state.json", &1)?;
    assert_eq!(names(folder.path()).len(), 3);
    drop(writer);
    assert_eq!(names(folder.path()), ["latest", "step_0000001"]);
    Ok(())
}

#[test]
fn leftovers_of_a_killed_process_are_not_checkpoints_and_are_removed() -> TestResult {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 1)?;
    let half = folder.path().join(".tmp-step_0000002-4711");
    fs::create_dir(&half)?;
    fs::write(half.join("student.safetensors"), b"half")?;
    fs::write(folder.path().join(".tmp-latest-4711"), b"step")?;
    assert_eq!(latest(folder.path()), (Some(1), vec![]));
    remove_leftovers(folder.path())?;
    assert_eq!(names(folder.path()), ["latest", "step_0000001"]);
    Ok(())
}

#[test]
fn a_checkpoint_of_the_same_step_is_replaced_and_never_lost() -> TestResult {
    let folder = tempfile::tempdir()?;
    let first = save(folder.path(), 1)?;
    flip(&first.path().join("state.json"), 0, 0)?;
    assert_eq!(latest(folder.path()).0, None);
    save(folder.path(), 1)?;
    assert_eq!(latest(folder.path()), (Some(1), vec![]));
    assert_eq!(names(folder.path()), ["latest", "step_0000001"]);

    // Killed between the two renames.
    fs::rename(first.path(), folder.path().join(".old-step_0000001"))?;
    fs::create_dir(folder.path().join(".tmp-step_0000001-4711"))?;
    remove_leftovers(folder.path())?;
    assert_eq!(latest(folder.path()), (Some(1), vec![]));
    // Killed after them.
    fs::create_dir(folder.path().join(".old-step_0000001"))?;
    remove_leftovers(folder.path())?;
    assert_eq!(names(folder.path()), ["latest", "step_0000001"]);
    Ok(())
}

#[test]
fn the_last_few_and_every_fifteenth_are_kept() -> TestResult {
    let folder = tempfile::tempdir()?;
    let retention: Retention =
        serde_json::from_value(json!({ "keep_last": 2, "keep_interval": 15 }))?;
    for step in (5..=30).step_by(5) {
        retention.apply(&save(folder.path(), step)?)?;
    }
    let kept = [15, 25, 30].map(|step| folder_of(folder.path(), step));
    assert_eq!(steps(folder.path()), kept);

    // Going on from 15 must not count the future that is given up.
    let at_15 = Checkpoint::open(&kept[0])?;
    assert_eq!(Retention::default().apply(&at_15)?, [0_u64; 0]);
    assert_eq!(discard_newer(folder.path(), 15)?, [25, 30]);
    assert_eq!(steps(folder.path()), kept[..1]);
    assert!(serde_json::from_value::<Retention>(json!({ "keep_last": 0 })).is_err());
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_last_checkpoint_and_no_partial_files() -> TestResult {
    let large = vec![("weight".to_owned(), Tensor::ones([100_000], tch::kind::FLOAT_CPU))];
    if let Some(folder) = folder_of_child() {
        let mut writer = CheckpointWriter::new(&folder, 2, "test")?;
        let error = writer.tensors("student.safetensors", &large).expect_err("the disk is full");
        assert!(
            matches!(error, Error::Files(ddil_files::Error::Io { action: "write", .. })),
            "{error:?}"
        );
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    save(folder.path(), 1)?;
    let this_test = "checkpoint::a_full_disk_leaves_the_last_checkpoint_and_no_partial_files";
    let status = child_on_full_disk(this_test, folder.path())?.status()?;
    assert!(status.success());
    assert_eq!(names(folder.path()), ["latest", "step_0000001"]);
    assert_eq!(latest(folder.path()), (Some(1), vec![]));
    Ok(())
}

/// Killed at any moment, a run has its last checkpoint, or the one that was being written.
#[cfg(unix)]
#[test]
fn kill_9_at_any_moment_loses_no_checkpoint() -> TestResult {
    if let Some(folder) = folder_of_child() {
        let first = find_latest(&folder)?.checkpoint.map_or(0, |checkpoint| checkpoint.step());
        remove_leftovers(&folder)?;
        for step in first + 1.. {
            Retention::default().apply(&save(&folder, step)?)?;
            fs::write(folder.join("committed"), step.to_string())?;
        }
    }
    let folder = tempfile::tempdir()?;
    let committed = || {
        let text = fs::read_to_string(folder.path().join("committed")).unwrap_or_default();
        text.parse::<u64>().unwrap_or(0)
    };
    for round in 0..6 {
        let before = committed();
        let mut process =
            child("checkpoint::kill_9_at_any_moment_loses_no_checkpoint", folder.path())?
                .spawn()?;
        while committed() <= before {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(1700 * round));
        process.kill()?;
        process.wait()?;
        let (step, damaged) = latest(folder.path());
        assert_eq!(damaged, [""; 0]);
        assert!(step >= Some(committed()), "{step:?} after {}", committed());
    }
    Ok(())
}

/// A folder of images may be named as a checkpoint is.
#[test]
fn a_name_alone_makes_a_checkpoint_only_among_others() -> TestResult {
    let folder = tempfile::tempdir()?;
    let images = folder_of(&folder.path().join("images"), 500);
    fs::create_dir_all(&images)?;
    assert!(find(&images)?.is_none());

    let checkpoints = folder.path().join("checkpoints");
    let empty = folder_of(&checkpoints, 500);
    fs::create_dir_all(&empty)?;
    assert!(matches!(find(&empty), Err(Error::DamagedCheckpoint { .. })));

    // One with a manifest is one wherever it is.
    save(&checkpoints, 7)?;
    let moved = folder_of(&folder.path().join("images"), 7);
    fs::rename(folder_of(&checkpoints, 7), &moved)?;
    assert_eq!(find(&moved)?.map(|found| found.step()), Some(7));
    Ok(())
}
