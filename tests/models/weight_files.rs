//! `WeightFiles`: the files of a folder that count, and the files that are written.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_libtorch::ArgumentError;
use ddil_models::weights::{self, WeightFiles};
use ddil_models::{Error, Model, Placement, UnknownKeys};
use proptest::prelude::*;
use serde_json::{Value, json};
use tch::{Kind, Tensor, kind};
use tempfile::TempDir;

use crate::common::{TestResult, golden};

const DIFFUSION: WeightFiles<'static> = WeightFiles::DIFFUSION;
const FP16: WeightFiles<'static> = WeightFiles { variant: Some("fp16"), ..WeightFiles::DIFFUSION };

fn files_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The file that is found in a folder with empty files of these names.
fn found(files: WeightFiles<'_>, names: &[&str]) -> ddil_models::Result<String> {
    let folder = TempDir::new().expect("a temporary folder");
    for name in names {
        fs::write(folder.path().join(name), "").expect("a file in it");
    }
    let path = files.find(folder.path())?;
    Ok(path.file_name().expect("a file").to_string_lossy().into_owned())
}

fn tensors(num: usize) -> Vec<(String, Tensor)> {
    let tensor = |i| (format!("t{i}"), Tensor::full([10], i as f64, kind::FLOAT_CPU));
    (0..num).map(tensor).collect()
}

#[test]
fn each_library_has_its_order() -> TestResult {
    let whole = "diffusion_pytorch_model.safetensors";
    let index = "diffusion_pytorch_model.safetensors.index.json";
    let shard = "diffusion_pytorch_model-00001-of-00002.safetensors";
    assert_eq!(found(DIFFUSION, &[whole, shard])?, whole);
    assert_eq!(found(DIFFUSION, &[index, shard])?, index);
    assert_eq!(found(DIFFUSION, &[whole, index])?, index);
    let (whole, index) = ("model.safetensors", "model.safetensors.index.json");
    assert_eq!(found(WeightFiles::TRANSFORMERS, &[index])?, index);
    assert_eq!(found(WeightFiles::TRANSFORMERS, &[whole, index])?, whole);
    Ok(())
}

#[test]
fn variants_are_found_under_all_their_names() -> TestResult {
    let plain = "diffusion_pytorch_model.safetensors";
    let names = [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors",
    ];
    for (i, name) in names.iter().enumerate() {
        assert_eq!(&found(FP16, &[plain, name])?, name);
        // The earlier ones count first.
        assert_eq!(&found(FP16, &names[i..])?, name);
        assert_eq!(found(DIFFUSION, &[plain, name])?, plain);
    }
    let encoder = WeightFiles { variant: Some("fp16"), ..WeightFiles::TRANSFORMERS };
    assert_eq!(found(encoder, &["model.fp16.safetensors"])?, "model.fp16.safetensors");
    Ok(())
}

#[test]
fn missing_entries_are_reported_with_the_existing_ones() {
    let Err(Error::NoWeights { expected, others, .. }) = found(DIFFUSION, &["config.json"]) else {
        panic!("nothing to find")
    };
    assert_eq!(
        expected,
        ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"]
    );
    assert_eq!(others, []);

    let present = [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.non_ema.json",
        "diffusion_pytorch_model.non_ema-00001-of-00001.safetensors",
        "diffusion_pytorch_model.bin",
        "model.safetensors",
    ];
    let error = found(DIFFUSION, &present).expect_err("variants alone");
    let text = error.to_string();
    let Error::NoWeights { others, .. } = error else { panic!("{error:?}") };
    assert_eq!(
        others,
        [
            (present[0].to_owned(), Some("fp16".to_owned())),
            (present[1].to_owned(), Some("non_ema".to_owned()))
        ]
    );
    let expected = "there is diffusion_pytorch_model.fp16.safetensors (variant `fp16`), \
                    diffusion_pytorch_model.safetensors.index.non_ema.json (variant `non_ema`)";
    assert!(text.ends_with(expected), "{text}");

    let error = found(FP16, &["diffusion_pytorch_model.safetensors"]).expect_err("no variant");
    let text = error.to_string();
    assert!(text.contains("diffusion_pytorch_model.safetensors.index.fp16.json"), "{text}");
    assert!(text.ends_with("diffusion_pytorch_model.safetensors (no variant)"), "{text}");
    let nowhere = DIFFUSION.find("no/such/folder");
    assert!(matches!(nowhere, Err(Error::Read { .. })), "{nowhere:?}");
}

#[test]
fn pickles_are_refused_where_there_is_nothing_else() {
    let stem = "diffusion_pytorch_model";
    for name in [
        format!("{stem}.bin"),
        format!("{stem}.fp16.bin"),
        format!("{stem}-00001-of-00002.bin"),
        format!("{stem}.ckpt"),
        format!("{stem}.pt"),
        "pytorch_model.bin".to_owned(),
    ] {
        let error = found(DIFFUSION, &[&name]).expect_err("a pickle");
        assert!(error.to_string().contains(&name), "{error}");
        assert!(matches!(error, Error::Pickle { .. }), "{error:?}");
        assert!(found(DIFFUSION, &[&name, "diffusion_pytorch_model.safetensors"]).is_ok());
    }
    let unrelated = found(DIFFUSION, &["optimizer.bin"]);
    assert!(matches!(unrelated, Err(Error::NoWeights { .. })));
}

#[test]
fn names_with_a_path_are_refused() {
    for bad in ["", "../x", "a/b", "a.b", "fp 16", "é"] {
        let variant = WeightFiles { variant: Some(bad), ..DIFFUSION };
        let stem = WeightFiles { stem: bad, variant: None };
        for (files, name) in [(variant, "variant"), (stem, "stem")] {
            for result in [
                files.find("."),
                files.save(&tensors(1), "no/such"),
                files.save_sharded(&tensors(2), "no/such", 0),
            ] {
                match result {
                    Err(Error::Argument(ArgumentError::Value { name: found, .. })) => {
                        assert_eq!(found, name);
                    }
                    other => panic!("{bad:?}: {other:?}"),
                }
            }
        }
    }
    assert!(!Path::new("no").exists());
}

#[test]
fn shards_are_those_of_diffusers() -> TestResult {
    let folder = TempDir::new()?;
    let index = DIFFUSION.save_sharded(&tensors(5), folder.path(), 80)?;
    let names = |n: usize| format!("diffusion_pytorch_model-{n:05}-of-00003.safetensors");
    assert_eq!(
        files_in(folder.path()),
        [names(1), names(2), names(3), "diffusion_pytorch_model.safetensors.index.json".into()]
    );
    let text = fs::read_to_string(&index)?;
    let written: Value = serde_json::from_str(&text)?;
    let (one, two, three) = (names(1), names(2), names(3));
    let map = json!({"t0": one, "t1": one, "t2": two, "t3": two, "t4": three});
    assert_eq!(written, json!({"metadata": {"total_size": 200}, "weight_map": map}));
    assert!(
        text.starts_with("{\n  \"metadata\": {\n    \"total_size\": 200") && text.ends_with("}\n")
    );
    assert_eq!(weights::read_all(folder.path().join(names(2)))?.len(), 2);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// For any sizes and limit: everything is read back, and no shard is larger than necessary.
    #[test]
    fn shards_come_back(
        sizes in proptest::collection::vec(0_i64..40, 1..12),
        max_shard_bytes in 0_u64..200,
        variant in proptest::option::of("[a-z0-9_]{1,6}"),
    ) {
        let folder = TempDir::new().expect("a temporary folder");
        let tensors: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(i, &n)| (format!("t{i:02}"), Tensor::randn([n], kind::FLOAT_CPU)))
            .collect();
        let files = WeightFiles { variant: variant.as_deref(), ..DIFFUSION };
        let path = files.save_sharded(&tensors, folder.path(), max_shard_bytes)?;
        prop_assert_eq!(files.find(folder.path())?, path.clone());
        let read = weights::read_all(&path)?;
        prop_assert_eq!(read.len(), tensors.len());
        for (name, tensor) in &tensors {
            prop_assert_eq!(&read[name], tensor);
        }
        for name in files_in(folder.path()).iter().filter(|name| name.ends_with("safetensors")) {
            let shard = weights::read_all(folder.path().join(name))?;
            let bytes: usize = shard.values().map(|tensor| 4 * tensor.numel()).sum();
            let alone = shard.values().filter(|tensor| tensor.numel() > 0).count() <= 1;
            prop_assert!(bytes as u64 <= max_shard_bytes || alone, "{} {}", name, bytes);
        }
    }
}

#[test]
fn a_small_model_is_one_file() -> TestResult {
    let folder = TempDir::new()?;
    let path = FP16.save_sharded(&tensors(5), folder.path(), 200)?;
    assert_eq!(files_in(folder.path()), ["diffusion_pytorch_model.fp16.safetensors"]);
    assert_eq!(path, FP16.find(folder.path())?);
    assert_eq!(DIFFUSION.save_sharded(&[], folder.path(), 0)?, DIFFUSION.find(folder.path())?);
    Ok(())
}

/// Nothing of an older save is left that a reader could take for the weights; other variants stay.
#[test]
fn saving_again_replaces_what_was_there() -> TestResult {
    let folder = TempDir::new()?;
    let folder = folder.path();
    let others = ["config.json", "model.safetensors", "diffusion_pytorch_model.bin"];
    for name in others {
        fs::write(folder.join(name), "")?;
    }
    let fp16 = FP16.save_sharded(&tensors(3), folder, 40)?;
    let kept = files_in(folder);
    for max_shard_bytes in [40, 80, u64::MAX, 40, u64::MAX] {
        let values = tensors(4);
        let path = DIFFUSION.save_sharded(&values, folder, max_shard_bytes)?;
        assert_eq!(DIFFUSION.find(folder)?, path);
        assert_eq!(weights::read_all(path)?.len(), 4);
        let num_files = match max_shard_bytes {
            40 => 5,
            80 => 3,
            _ => 1,
        };
        assert_eq!(files_in(folder).len(), kept.len() + num_files);
        assert!(kept.iter().all(|name| folder.join(name).exists()));
    }
    assert_eq!(weights::read_all(&fp16)?.len(), 3);
    fs::write(folder.join("diffusion_pytorch_model.fp16.safetensors.index.json"), "old")?;
    FP16.save(&tensors(2), folder)?;
    assert_eq!(weights::read_all(FP16.find(folder)?)?.len(), 2);
    assert_eq!(files_in(folder).len(), others.len() + 2);
    Ok(())
}

/// A tensor that a file cannot store comes second: by then the index of the older save is gone.
#[test]
fn an_interrupted_save_mixes_no_files() -> TestResult {
    let folder = TempDir::new()?;
    DIFFUSION.save_sharded(&tensors(2), folder.path(), 40)?;
    let mut values = tensors(2);
    values[1].1 = values[1].1.to_kind(Kind::ComplexFloat);
    let error = DIFFUSION.save_sharded(&values, folder.path(), 40);
    assert!(matches!(error, Err(Error::UnsupportedKind { .. })));
    assert!(matches!(DIFFUSION.find(folder.path()), Err(Error::NoWeights { .. })));
    Ok(())
}

#[test]
fn networks_load_from_variants_and_shards() -> TestResult {
    let placement = Placement::default();
    let folder = TempDir::new()?;
    let model = Model::from_folder(golden("unet_guidance"), placement, UnknownKeys::Refuse)?;
    model.save_to_folder(folder.path())?;
    let named = model.parameters().named();
    DIFFUSION.save_sharded(&named, folder.path(), 50_000)?;
    assert!(files_in(folder.path()).len() > 3);
    let again = Model::from_folder(folder.path(), placement, UnknownKeys::Refuse)?;
    let same = |other: &Model| {
        let pairs = named.iter().zip(other.parameters().named());
        pairs.into_iter().all(|(left, right)| left.0 == right.0 && left.1 == right.1)
    };
    assert!(same(&again));

    let load = |variant| {
        Model::from_folder_variant(folder.path(), variant, placement, UnknownKeys::Refuse)
    };
    let error = load(Some("fp16")).expect_err("there is none").to_string();
    assert!(error.contains("(no variant)"), "{error}");
    let halves: Vec<_> = named.iter().map(|(n, t)| (n.clone(), t.to_kind(Kind::Half))).collect();
    FP16.save(&halves, folder.path())?;
    assert!(!same(&load(Some("fp16"))?));
    assert!(same(&load(None)?));
    // A whole file takes the place of the shards.
    model.save_to_folder(folder.path())?;
    assert_eq!(
        files_in(folder.path()),
        [
            "config.json",
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.safetensors"
        ]
    );
    let map = weights::read_metadata(folder.path().join("diffusion_pytorch_model.safetensors"))?;
    assert_eq!(map, BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
    Ok(())
}
