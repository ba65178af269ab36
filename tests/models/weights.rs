//! Safetensors files: round trips, the bytes of Python's writer, and every way a file can be wrong.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_models::{Error, weights};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::common::{GOLDEN, TestResult, golden};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn no_metadata() -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn named(tensors: impl IntoIterator<Item = (&'static str, Tensor)>) -> Vec<(String, Tensor)> {
    tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
}

fn files_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn files_are_byte_for_byte_those_of_python() -> TestResult {
    let folder = TempDir::new()?;
    for name in GOLDEN {
        let original = golden(name).join("diffusion_pytorch_model.safetensors");
        let tensors: Vec<_> = weights::read_all(&original)?.into_iter().collect();
        let copy = folder.path().join("copy.safetensors");
        weights::save(&tensors, &copy, &no_metadata())?;
        assert!(fs::read(&original)? == fs::read(&copy)?, "{name}");
    }
    assert_eq!(files_in(folder.path()), ["copy.safetensors"]);
    Ok(())
}

fn any_kind() -> impl Strategy<Value = Kind> {
    proptest::sample::select(vec![
        Kind::Double,
        Kind::Float,
        Kind::Half,
        Kind::BFloat16,
        Kind::Int64,
        Kind::Int,
        Kind::Int16,
        Kind::Int8,
        Kind::Uint8,
        Kind::Bool,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever is written is read back: kinds, shapes (scalars and empty tensors among them), metadata.
    #[test]
    fn what_is_written_is_read(
        entries in proptest::collection::btree_map("[a-z.0-9]{1,8}", (any_kind(), proptest::collection::vec(0_i64..4, 0..4)), 0..6),
        metadata in proptest::collection::btree_map("[a-z]{1,5}", "\\PC{0,9}", 0..4),
        transposed in any::<bool>(),
    ) {
        let folder = TempDir::new().expect("a temporary folder");
        let path = folder.path().join("weights.safetensors");
        let tensors: Vec<(String, Tensor)> = entries
            .into_iter()
            .map(|(name, (kind, shape))| {
                let tensor = (Tensor::rand(&shape, FLOAT) * 100.0).to_kind(kind);
                (name, if transposed && shape.len() > 1 { tensor.transpose(0, 1) } else { tensor })
            })
            .collect();
        weights::save(&tensors, &path, &metadata)?;
        let read = weights::read_all(&path)?;
        prop_assert_eq!(read.len(), tensors.len());
        for (name, tensor) in &tensors {
            prop_assert_eq!(read[name].kind(), tensor.kind());
            prop_assert_eq!(read[name].size(), tensor.size());
            prop_assert!(read[name].equal(tensor), "{}", name);
        }
        let mut expected = metadata;
        expected.insert("format".to_owned(), "pt".to_owned());
        prop_assert_eq!(weights::read_metadata(&path)?, expected);
    }
}

#[test]
fn the_same_tensors_give_the_same_bytes() -> TestResult {
    let folder = TempDir::new()?;
    let tensors = named([("b", Tensor::ones([3], FLOAT)), ("a", Tensor::zeros([2, 2], FLOAT))]);
    let reversed: Vec<_> =
        tensors.iter().rev().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    let metadata: BTreeMap<_, _> =
        (0..20).map(|i| (format!("key{i}"), format!("value {i}"))).collect();
    let mut files = Vec::new();
    for (i, tensors) in [&tensors, &reversed, &tensors].into_iter().enumerate() {
        let path = folder.path().join(format!("{i}.safetensors"));
        weights::save(tensors, &path, &metadata)?;
        files.push(fs::read(path)?);
    }
    assert!(files.iter().all(|file| *file == files[0]));
    Ok(())
}

#[test]
fn targets_keep_their_kind_and_layout() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    let values = Tensor::arange(24, FLOAT).view([2, 3, 2, 2]) / 8.0;
    for source in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
        weights::save(&named([("w", values.to_kind(source))]), &path, &no_metadata())?;
        for target in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            let zeros = Tensor::zeros([2, 3, 2, 2], (target, Device::Cpu));
            let parameter = ddil_libtorch::channels_last(&zeros)?.set_requires_grad(true);
            weights::load_into(&named([("w", parameter.shallow_clone())]), &path)?;
            assert_eq!(parameter.kind(), target);
            assert!(parameter.requires_grad() && ddil_libtorch::is_channels_last(&parameter));
            assert_eq!(parameter.to_kind(Kind::Float), values, "{source:?} to {target:?}");
        }
    }
    Ok(())
}

#[test]
fn all_differences_are_listed_and_nothing_is_loaded() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    let file = named([
        ("fits", Tensor::ones([2], FLOAT)),
        ("misshapen", Tensor::ones([2, 3], FLOAT)),
        ("integers", Tensor::ones([2], (Kind::Int64, Device::Cpu))),
        ("unexpected", Tensor::ones([1], FLOAT)),
    ]);
    weights::save(&file, &path, &no_metadata())?;
    let fits = Tensor::zeros([2], FLOAT);
    let targets = named([
        ("fits", fits.shallow_clone()),
        ("misshapen", Tensor::zeros([3, 2], FLOAT)),
        ("integers", Tensor::zeros([2], FLOAT)),
        ("missing", Tensor::zeros([1], FLOAT)),
    ]);
    let error = weights::load_into(&targets, &path).expect_err("four differences");
    let text = error.to_string();
    let Error::WeightsMismatch { problems, .. } = error else { panic!("{error:?}") };
    assert_eq!(problems.missing, ["missing"]);
    assert_eq!(problems.unexpected, ["unexpected"]);
    assert_eq!(problems.misshapen, [("misshapen".to_owned(), vec![2, 3], vec![3, 2])]);
    assert_eq!(problems.wrong_kind, [("integers".to_owned(), "I64".to_owned(), Kind::Float)]);
    for part in
        ["weights.safetensors", "missing: missing", "unexpected: unexpected", "[3, 2]", "I64"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert_eq!(fits, Tensor::zeros([2], FLOAT));
    Ok(())
}

#[test]
fn damaged_files_are_refused() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    weights::save(&named([("w", Tensor::ones([64], FLOAT))]), &path, &no_metadata())?;
    let whole = fs::read(&path)?;
    for len in [1, 7, 8, 40, whole.len() - 1] {
        fs::write(&path, &whole[..len])?;
        let error = weights::read_all(&path).expect_err("a piece of a file");
        assert!(matches!(error, Error::InvalidSafetensors { .. }), "{len}: {error:?}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    // A header that claims more than there is, and an offset beyond the end.
    let mut claims = whole.clone();
    claims[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let at = whole.windows(7).position(|w| w == b"[0,256]").expect("the offsets of `w`");
    let mut beyond = whole.clone();
    beyond[at..at + 7].copy_from_slice(b"[0,999]");
    for bytes in [longer, claims, beyond, b"not a tensor in sight".to_vec()] {
        fs::write(&path, bytes)?;
        assert!(matches!(weights::read_all(&path), Err(Error::InvalidSafetensors { .. })));
    }
    fs::write(&path, [])?;
    assert!(weights::read_all(&path).is_err());
    let missing = weights::read_all(folder.path().join("nowhere.safetensors"));
    assert!(missing.expect_err("no file").to_string().contains("nowhere.safetensors"));
    Ok(())
}

#[test]
fn types_without_a_kind_are_refused() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    let view = TensorView::new(Dtype::F8_E4M3, vec![2], &[0, 0])?;
    fs::write(&path, serialize([("w", view)], None)?)?;
    let error = weights::read_all(&path).expect_err("eight bits");
    assert!(matches!(error, Error::InvalidSafetensors { .. }), "{error:?}");
    let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
    let saved = weights::save(&named([("z", complex)]), &path, &no_metadata());
    assert!(matches!(saved, Err(Error::UnsupportedKind { .. })));
    Ok(())
}

#[test]
fn tensors_at_odd_places_are_read() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    let mut header = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#.to_vec();
    while header.len() % 4 != 3 {
        header.push(b' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend([1.5_f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
    fs::write(&path, bytes)?;
    assert_eq!(weights::read_all(&path)?["w"], Tensor::from_slice(&[1.5_f32, -2.0]));
    Ok(())
}

#[test]
fn pickles_are_refused_with_a_way_out() {
    for name in ["model.bin", "model.pt", "model.PTH", "model.ckpt"] {
        let error = weights::read_all(name).expect_err("a pickle");
        assert!(matches!(error, Error::Pickle { .. }), "{error:?}");
        assert!(error.to_string().contains("safetensors.torch.save_file"), "{error}");
    }
}

/// Two shards and an index that says `weight_map` of them.
fn sharded(folder: &Path, weight_map: &str) -> std::path::PathBuf {
    let save = |file: &str, tensors: Vec<(String, Tensor)>| {
        weights::save(&tensors, folder.join(file), &no_metadata()).expect("a shard");
    };
    save("a.safetensors", named([("x", Tensor::ones([2], FLOAT))]));
    save("b.safetensors", named([("y", Tensor::ones([3], FLOAT) * 2.0)]));
    let index = folder.join("model.safetensors.index.json");
    fs::write(&index, format!("{{\"metadata\": {{}}, \"weight_map\": {weight_map}}}"))
        .expect("an index");
    index
}

#[test]
fn shards_load_as_one() -> TestResult {
    let folder = TempDir::new()?;
    let index = sharded(folder.path(), r#"{"x": "a.safetensors", "y": "b.safetensors"}"#);
    let targets = named([("x", Tensor::zeros([2], FLOAT)), ("y", Tensor::zeros([3], FLOAT))]);
    weights::load_into(&targets, &index)?;
    assert_eq!(targets[0].1, Tensor::from_slice(&[1.0_f32; 2]));
    assert_eq!(targets[1].1, Tensor::from_slice(&[2.0_f32; 3]));

    let index = sharded(folder.path(), r#"{"x": "a.safetensors"}"#);
    let Err(Error::WeightsMismatch { problems, .. }) = weights::load_into(&targets, &index) else {
        panic!("half the shards")
    };
    assert_eq!(problems.missing, ["y"]);
    Ok(())
}

#[test]
fn an_index_does_not_reach_beyond_its_folder() -> TestResult {
    let folder = TempDir::new()?;
    for shard in ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a.bin"] {
        let index = sharded(folder.path(), &format!("{{\"x\": \"{shard}\"}}"));
        let error = weights::read_all(index).expect_err("another folder");
        assert!(matches!(error, Error::ShardOutsideFolder { .. }), "{shard}: {error:?}");
    }
    Ok(())
}

#[test]
fn an_index_that_is_wrong_is_refused() -> TestResult {
    let folder = TempDir::new()?;
    for map in ["[]", r#"{"x": 1}"#, r#"{"y": "a.safetensors"}"#] {
        let error = weights::read_all(sharded(folder.path(), map)).expect_err(map);
        assert!(matches!(error, Error::InvalidJson { .. }), "{map}: {error:?}");
    }
    assert!(weights::read_all(sharded(folder.path(), r#"{"x": "c.safetensors"}"#)).is_err());
    Ok(())
}

#[test]
fn a_failed_save_leaves_what_was_there() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    weights::save(&named([("w", Tensor::ones([2], FLOAT))]), &path, &no_metadata())?;
    let before = fs::read(&path)?;
    let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
    assert!(weights::save(&named([("z", complex)]), &path, &no_metadata()).is_err());
    assert_eq!(fs::read(&path)?, before);

    let tensors = named([("w", Tensor::ones([2], FLOAT))]);
    let nowhere = folder.path().join("no/folder.safetensors");
    assert!(matches!(weights::save(&tensors, nowhere, &no_metadata()), Err(Error::Write { .. })));
    // A folder stands where the file should go: the rename fails, and what was written aside goes away.
    let taken = folder.path().join("taken");
    fs::create_dir(&taken)?;
    assert!(matches!(weights::save(&tensors, &taken, &no_metadata()), Err(Error::Write { .. })));
    let mut files = files_in(folder.path());
    files.sort();
    assert_eq!(files, ["taken", "weights.safetensors"]);
    Ok(())
}
