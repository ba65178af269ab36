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

    /// Everything written is read back: kinds, shapes (including scalars and empty tensors), metadata.
    #[test]
    fn written_files_read_back(
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

/// Two shards and an index with this `weight_map`.
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
    for shard in [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "a.safetensors/",
        "./a.safetensors",
        "..",
        "",
        "a.bin",
    ] {
        let index = sharded(folder.path(), &format!("{{\"x\": \"{shard}\"}}"));
        let Err(Error::InvalidIndex { problems, .. }) = weights::read_all(index) else {
            panic!("{shard} is in another folder")
        };
        assert_eq!(problems.outside, [shard]);
    }
    Ok(())
}

#[test]
fn an_index_that_is_wrong_is_refused() -> TestResult {
    let folder = TempDir::new()?;
    for map in ["[]", r#"{"x": 1}"#, r#"{"x": "a.safetensors", "x": "b.safetensors"}"#, r#"{"x": "#]
    {
        let error = weights::read_all(sharded(folder.path(), map)).expect_err(map);
        assert!(matches!(error, Error::InvalidJson { .. }), "{map}: {error:?}");
    }
    Ok(())
}

#[test]
fn all_problems_of_shards_are_listed_and_nothing_is_loaded() -> TestResult {
    let folder = TempDir::new()?;
    let map = r#"{
        "x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors", "u": "gone.safetensors",
        "v": "../a.safetensors", "w": "cut.safetensors"
    }"#;
    let index = sharded(folder.path(), map);
    fs::write(folder.path().join("cut.safetensors"), "piece")?;
    let both = named([("y", Tensor::ones([3], FLOAT)), ("spare", Tensor::ones([1], FLOAT))]);
    weights::save(&both, folder.path().join("b.safetensors"), &no_metadata())?;
    let y = Tensor::zeros([3], FLOAT);
    let error = weights::load_into(&named([("y", y.shallow_clone())]), &index);
    let error = error.expect_err("six things are wrong");
    let text = error.to_string();
    let Error::InvalidIndex { problems, .. } = error else { panic!("{error:?}") };
    let pair = |left: &str, right: &str| (left.to_owned(), right.to_owned());
    assert_eq!(problems.outside, ["../a.safetensors"]);
    let unreadable: Vec<_> = problems.unreadable.iter().map(|(shard, _)| shard).collect();
    assert_eq!(unreadable, ["cut.safetensors", "gone.safetensors"]);
    assert_eq!(problems.absent, [pair("z", "a.safetensors"), pair("x", "b.safetensors")]);
    assert_eq!(
        problems.surplus,
        [
            ("x".into(), "a.safetensors".into(), Some("b.safetensors".into())),
            ("spare".into(), "b.safetensors".into(), None),
        ]
    );
    for part in [
        "model.safetensors.index.json",
        "shard \"../a.safetensors\" is no",
        "No such file",
        "z: not in \"a.safetensors\"",
        "x: in \"a.safetensors\" as well as in \"b.safetensors\"",
        "spare: in \"b.safetensors\", but not in the index",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert_eq!(y, Tensor::zeros([3], FLOAT));
    Ok(())
}

/// A file with this header, followed by this many bytes.
fn with_header(path: &Path, header: &str, num_bytes: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend((0..num_bytes).map(|i| i as u8));
    fs::write(path, bytes).expect("a file");
}

#[test]
fn headers_that_contradict_themselves_are_refused() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    let info = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let a = info("F32", "[2]", "[0,8]");
    let valid = format!(r#"{{"a":{a},"b":{}}}"#, info("F32", "[2]", "[8,16]"));
    with_header(&path, &valid, 16);
    assert_eq!(weights::read_all(&path)?.len(), 2);
    let b = |dtype, shape, offsets| format!(r#"{{"a":{a},"b":{}}}"#, info(dtype, shape, offsets));
    for (why, header) in [
        ("overlap", b("F32", "[2]", "[4,12]")),
        ("the same place", b("F32", "[2]", "[0,8]")),
        ("a hole", b("F32", "[1]", "[12,16]")),
        ("backwards", b("F32", "[2]", "[16,8]")),
        ("beyond the end", b("F32", "[2000]", "[8,8008]")),
        ("short of the end", b("F32", "[1]", "[8,12]")),
        ("another size", b("F32", "[3]", "[8,16]")),
        ("negative", b("F32", "[-2]", "[8,16]")),
        ("overflow", b("F32", "[9223372036854775807,9223372036854775807]", "[8,16]")),
        ("no such type", b("F31", "[2]", "[8,16]")),
        ("a fraction", b("F32", "[2.5]", "[8,16]")),
        ("one name twice", format!(r#"{{"a":{a},"a":{a},"b":{}}}"#, info("F32", "[2]", "[8,16]"))),
        ("one name, two types", format!(r#"{{"a":{a},"a":{}}}"#, info("F32", "[4]", "[0,16]"))),
        ("no object", "[]".to_owned()),
        ("no tensor", r#"{"a":1}"#.to_owned()),
        ("not text", r#"{"a":"#.to_owned()),
    ] {
        with_header(&path, &header, 16);
        let target = Tensor::zeros([2], FLOAT);
        let error = weights::load_into(&named([("a", target.shallow_clone())]), &path);
        assert!(matches!(error, Err(Error::InvalidSafetensors { .. })), "{why}: {error:?}");
        assert_eq!(target, Tensor::zeros([2], FLOAT));
    }
    Ok(())
}

#[test]
fn tensors_in_any_order_are_read() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    let header = r#"{"z":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"__metadata__":{"k":"v"},
        "a":{"dtype":"U8","shape":[1],"data_offsets":[5,6]},
        "m":{"shape":[3],"data_offsets":[2,5],"dtype":"U8"}}"#;
    with_header(&path, header, 6);
    let zeros = |n: i64| Tensor::zeros([n], (Kind::Uint8, Device::Cpu));
    let targets = named([("a", zeros(1)), ("m", zeros(3)), ("z", zeros(2))]);
    weights::load_into(&targets, &path)?;
    let found: Vec<_> =
        targets.iter().map(|(_, t)| Vec::<u8>::try_from(t).expect("bytes")).collect();
    assert_eq!(found, [vec![5], vec![2, 3, 4], vec![0, 1]]);
    Ok(())
}

/// Only the values are invalid, and by then another tensor could have been copied.
#[test]
fn an_invalid_bool_is_refused_before_anything_is_loaded() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("weights.safetensors");
    let header = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
        "b":{"dtype":"BOOL","shape":[2],"data_offsets":[2,4]}}"#;
    with_header(&path, header, 4);
    let targets = named([
        ("a", Tensor::full([2], 9, (Kind::Uint8, Device::Cpu))),
        ("b", Tensor::zeros([2], (Kind::Bool, Device::Cpu))),
    ]);
    let error = weights::load_into(&targets, &path);
    assert!(matches!(error, Err(Error::Libtorch(_))), "{error:?}");
    assert_eq!(Vec::<u8>::try_from(&targets[0].1)?, [9, 9]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whichever byte is changed and wherever the file is cut: a value or an error, no panic.
    #[test]
    fn changed_bytes_are_refused_safely(at in 0_usize..400, to in any::<u8>(), len in 0_usize..400) {
        let folder = TempDir::new().expect("a temporary folder");
        let path = folder.path().join("weights.safetensors");
        let tensors = named([
            ("w", Tensor::ones([3, 5], FLOAT)),
            ("flags", Tensor::ones([3], (Kind::Bool, Device::Cpu))),
        ]);
        weights::save(&tensors, &path, &no_metadata())?;
        let mut bytes = fs::read(&path).expect("it was written");
        let place = at % bytes.len();
        bytes[place] = to;
        // Half of the cases keep the length.
        if len % 2 == 0 {
            bytes.truncate(len);
        }
        fs::write(&path, bytes).expect("a file");
        let target = Tensor::zeros([3, 5], FLOAT);
        let flags = Tensor::zeros([3], (Kind::Bool, Device::Cpu));
        let targets = named([("w", target.shallow_clone()), ("flags", flags)]);
        if weights::load_into(&targets, &path).is_err() {
            prop_assert_eq!(target, Tensor::zeros([3, 5], FLOAT));
        }
    }
}

/// 192 MiB in 12 tensors of 16 MiB, and fewer that are not aligned or half as wide as the targets.
#[test]
#[cfg(target_os = "linux")]
fn loading_takes_the_memory_of_one_tensor() -> TestResult {
    use crate::common::{alone, peak_memory};

    alone("weights::loading_takes_the_memory_of_one_tensor", || {
        let folder = TempDir::new()?;
        let path = folder.path().join("weights.safetensors");
        let targets: Vec<_> =
            (0..12).map(|i| (format!("t{i}"), Tensor::ones([4 << 20], FLOAT))).collect();
        for (dtype, width, padding, num) in [("F32", 4, 0, 12), ("F32", 4, 1, 4), ("F16", 2, 0, 4)]
        {
            let size = width << 22;
            let entries: Vec<_> = (0..num)
                .map(|i| {
                    let [start, end] = [i * size, (i + 1) * size];
                    format!(
                        r#""t{i}":{{"dtype":"{dtype}","shape":[4194304],"data_offsets":[{start},{end}]}}"#
                    )
                })
                .collect();
            let mut header = format!("{{{}}}", entries.join(","));
            while header.len() % 4 != padding {
                header.push(' ');
            }
            // Zeros that take no room on the disk.
            with_header(&path, &header, 0);
            let file = fs::OpenOptions::new().write(true).open(&path)?;
            file.set_len((8 + header.len() + num * size) as u64)?;
            let start = peak_memory()?;
            weights::load_into(&targets[..num], &path)?;
            let growth = peak_memory()? - start;
            println!("{dtype}, padding {padding}: {} MiB", growth >> 20);
            assert!(growth < 36 << 20, "{dtype}: {growth}");
            assert_eq!(targets[num - 1].1.abs().max().double_value(&[]), 0.0);
        }
        Ok(())
    })
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
    // There is a folder in place of the file: the rename fails, and the temporary file is removed.
    let taken = folder.path().join("taken");
    fs::create_dir(&taken)?;
    assert!(matches!(weights::save(&tensors, &taken, &no_metadata()), Err(Error::Write { .. })));
    let mut files = files_in(folder.path());
    files.sort();
    assert_eq!(files, ["taken", "weights.safetensors"]);
    Ok(())
}
