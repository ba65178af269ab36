//! Small files that request large resources, and names that leave the folder: each was found once, each is refused with
//! a message.

use std::fs;
use std::path::Path;
use std::time::Instant;

use ddil::compare::Matrix;
use ddil_core::SavedFile;
use ddil_data::{ImageDataset, read_captions, read_cropped, read_idx_images, read_image_folder};
use ddil_files::settings::Settings;
use ddil_models::{
    AutoencoderKLConfig, ClipTextConfig, Error, ModelConfig, NetworkConfig, Placement,
    UNet2DConfig, UnknownKeys, weights,
};
use ddil_pipelines::{ModelFiles, WeightForm};
use ddil_schedulers::{MAX_TRAIN_TIMESTEPS, SchedulerConfig, TimestepSpacing, Timesteps};
use ddil_trainer::checkpoint::{Checkpoint, CheckpointWriter};
use tch::{Kind, Tensor};

use super::data::{image_bytes, packed};
use super::models::tiny_pipeline;
use super::tree::{Tree, repository};

#[track_caller]
fn assert_message(outcome: &str, words: &[&str]) {
    for word in words {
        assert!(outcome.contains(word), "`{word}` is not said in: {outcome}");
    }
}

fn written(name: &str, content: impl Into<Vec<u8>>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    Tree::file(name, content).write(folder.path());
    folder
}

/// Ninety bytes that would be terabytes of weights, or layers without end.
#[test]
fn a_small_config_cannot_request_terabytes() {
    let networks = [
        (r#""block_out_channels": [1048576, 1048576, 1048576, 1048576]"#, "up to `"),
        (r#""block_out_channels": [4294967295, 4294967295, 4294967295, 4294967295]"#, "1048576"),
        (r#""layers_per_block": 4294967295"#, "at most 1048576"),
        (r#""layers_per_block": 1000000"#, "at most 20000 parameters"),
        (r#""time_embedding_dim": 4000000000"#, "time_embedding_dim"),
    ];
    for (setting, word) in networks {
        let text = format!(r#"{{"_class_name": "UNet2DModel", {setting}}}"#);
        let folder = written("config.json", text);
        let begun = Instant::now();
        let config = ModelConfig::from_file(folder.path().join("config.json"), UnknownKeys::Refuse);
        let built = config.and_then(|config| config.build(Placement::default(), 0));
        assert_message(&built.map(drop).expect_err("too large").to_string(), &[word]);
        assert!(begun.elapsed().as_secs() < 60, "{setting}");
    }
    let vae = AutoencoderKLConfig { layers_per_block: 500_000, ..AutoencoderKLConfig::default() };
    assert!(matches!(vae.parameter_shapes(), Err(Error::TooLarge { .. })));
    let text =
        ClipTextConfig { vocab_size: 1 << 20, hidden_size: 1 << 20, ..ClipTextConfig::default() };
    assert!(matches!(text.parameter_shapes(), Err(Error::TooLarge { .. })));
    // Below the limits, and above the memory of any present machine: libtorch reports it before a value is drawn.
    let large = UNet2DConfig {
        block_out_channels: vec![18_432],
        down_block_types: vec![ddil_models::DownBlockType::DownBlock2D],
        up_block_types: vec![ddil_models::UpBlockType::UpBlock2D],
        layers_per_block: 1,
        add_attention: false,
        ..UNet2DConfig::default()
    };
    let values: i64 = large
        .parameter_shapes()
        .map_or(0, |shapes| shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum());
    assert!(values > 1 << 35, "{values}");
    let double = Placement { kind: Kind::Double, ..Placement::default() };
    let outcome = large.build(double, 0).expect_err("no such memory").to_string();
    assert_message(&outcome, &["memory"]);
}

#[test]
fn a_schedule_has_a_limited_number_of_timesteps() {
    let text = r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 4294967295}"#;
    let folder = written("scheduler_config.json", text);
    let path = folder.path().join("scheduler_config.json");
    let error = SchedulerConfig::from_file(&path).expect_err("too many");
    let cause = std::error::Error::source(&error).expect("a cause").to_string();
    assert_message(&error.to_string(), &["scheduler_config.json"]);
    assert_message(
        &cause,
        &["num_train_timesteps", "4294967295", &MAX_TRAIN_TIMESTEPS.to_string()],
    );
    let grid =
        Timesteps::spaced(TimestepSpacing::Trailing, MAX_TRAIN_TIMESTEPS, 4, 0).expect("four");
    assert!(grid.refined(u32::MAX, MAX_TRAIN_TIMESTEPS).is_err());
}

/// A header of a hundred bytes, and one that would be longer than the file.
#[test]
fn a_weights_file_cannot_claim_more_than_its_length() {
    let headers = [
        r#"{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[0,9223372036854775807,9],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
    ];
    for header in headers {
        let content =
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
        let folder = written("model.safetensors", content);
        let outcome = weights::read_all(folder.path().join("model.safetensors"));
        assert!(outcome.is_err(), "{header}");
    }
    for length in [u64::MAX, 1 << 40, 100_000_001, 9] {
        let folder = written("model.safetensors", [&length.to_le_bytes()[..], b"{}"].concat());
        let outcome =
            weights::read_all(folder.path().join("model.safetensors")).expect_err("too long");
        assert_message(
            &outcome.to_string(),
            &["model.safetensors", "not a complete safetensors file"],
        );
    }
}

#[test]
fn a_compressed_file_unpacks_to_the_size_in_its_header() {
    // Sixteen bytes that promise 2^31 images, and 64 MiB after a header that promises two pixels.
    let promise = [0x803_u32, 1 << 31, 28, 28].map(u32::to_be_bytes).concat();
    let mut bomb = [0x803_u32, 1, 1, 2].map(u32::to_be_bytes).concat();
    bomb.resize(64 << 20, 0);
    for (content, word) in [(promise, "1073741824"), (bomb, "expected 18")] {
        let folder = written("images.gz", packed(&content));
        let error = read_idx_images(&folder.path().join("images.gz")).expect_err("too much");
        // Only the beginning of the bomb was unpacked.
        let found = if let ddil_data::Error::IdxLength { found, .. } = error { found } else { 0 };
        assert!(found < 10_000, "{found} bytes were unpacked");
        assert_message(&crate::inputs::message_of(error), &["images.gz", word]);
    }
}

/// A PNG whose header claims 4 GB of pixels, with data for sixteen.
#[test]
fn an_image_has_the_pixels_it_claims() {
    let mut content = image_bytes(png::ColorType::Grayscale, png::BitDepth::Eight, 7);
    content[16..24].copy_from_slice(&[65_536_u32, 65_536].map(u32::to_be_bytes).concat());
    let mut crc = flate2::Crc::new();
    crc.update(&content[12..29]);
    content[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    let folder = written("a.png", content);
    let error = read_image_folder(folder.path()).map(drop).expect_err("too large");
    assert_message(&crate::inputs::message_of(error), &["a.png"]);
}

/// 777 bytes that claim 268 million pixels: all of them used to be made up, in 4.8 GB and a minute and a half.
#[test]
fn a_jpeg_has_the_pixels_it_claims() {
    let pictures = repository().join("tests/golden/pictures");
    for name in ["turned_1.jpg", "grey.jpg", "progressive.jpg"] {
        let mut content = fs::read(pictures.join(name)).expect("a golden");
        let frame =
            content.windows(2).position(|two| two[0] == 0xff && (0xc0..=0xc2).contains(&two[1]));
        let frame = frame.expect("it has a frame");
        content[frame + 5..frame + 9]
            .copy_from_slice(&[1 << 14, 1 << 14].map(u16::to_be_bytes).concat());
        let most = format!("at most {} pixels", content.len() * 512);
        let folder = written("a.jpg", content);
        let error = read_image_folder(folder.path()).map(drop).expect_err("too large");
        assert_message(&crate::inputs::message_of(error), &["a.jpg", "16384x16384", &most]);
    }
}

/// A message must not list all the names of a table with three thousand columns.
#[test]
fn many_columns_are_summarised() {
    let folder = written("metadata.csv", format!("{}\n", vec!["column"; 3000].join(",")));
    let outcome = read_captions(folder.path()).expect_err("no captions").to_string();
    assert_message(&outcome, &["metadata.csv:1", "`file_name`", "column, column", "and 2980 more"]);
    assert!(outcome.len() < 1000, "{} bytes", outcome.len());
}

/// A strip that would be 4 TB once its height is 1024.
#[test]
fn a_strip_is_not_scaled() {
    let mut content = Vec::new();
    let mut encoder = png::Encoder::new(&mut content, 1_000_000, 1);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().expect("memory");
    writer.write_image_data(&vec![0; 1_000_000]).expect("it fits");
    writer.finish().expect("memory");
    let folder = written("strip.png", content);
    let error = read_cropped(&folder.path().join("strip.png"), 3, [1024, 1024]).map(drop);
    assert_message(&error.expect_err("too long").to_string(), &["strip.png", "1000000x1"]);
}

#[test]
fn one_wild_label_makes_no_billion_classes() {
    let pixels = Tensor::zeros([2, 1, 4, 4], (Kind::Uint8, tch::Device::Cpu));
    for label in [i64::MAX, 1 << 40, 1_000_000] {
        let labels = Tensor::from_slice(&[0, label]);
        assert!(ImageDataset::new(&pixels, Some(&labels)).is_err(), "{label}");
    }
}

/// Twenty axes of ten values are 10^20 cells.
#[test]
fn a_comparison_has_a_countable_number_of_cells() {
    let value = |i: usize| format!("{{ name = \"v{i}\" }}");
    let values: Vec<String> = (0..10).map(value).collect();
    let axis = |i: usize| format!("[[axes]]\nname = \"a{i}\"\nvalues = [{}]\n", values.join(", "));
    let axes: Vec<String> = (0..20).map(axis).collect();
    let text = format!("name = \"x\"\nbase = \"b\"\n{}", axes.concat());
    let settings = Settings::parse("matrix.toml", text).expect("TOML");
    let outcome = Matrix::from_settings(&settings).expect_err("too many").to_string();
    assert_message(&outcome, &["axes", "10000"]);
}

/// Exports must not copy from, or write to, places outside the folder.
#[test]
fn parts_of_a_model_stay_in_its_folder() {
    let outer = tempfile::tempdir().expect("a folder");
    let (model, secret) = (outer.path().join("model"), outer.path().join("secret"));
    Tree::file("config.json", "{}").write(&secret);
    let index = r#"{"_class_name": "DDIMPipeline", "../secret": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}"#;
    tiny_pipeline().with("model_index.json", index).write(&model);
    let outcome =
        ModelFiles::of_pipeline(&model, None).expect_err("it leads elsewhere").to_string();
    assert_message(&outcome, &["model_index.json", "../secret"]);
    let valid = outer.path().join("honest");
    tiny_pipeline().write(&valid);
    let to = outer.path().join("out/copy");
    let parts = ModelFiles::of_pipeline(&valid, None).expect("a model");
    parts.write(&to, &WeightForm::default(), false).expect("it is whole");
    assert!(to.join("unet/config.json").is_file());
}

#[test]
fn shards_and_captions_stay_in_their_folder() {
    for outside in ["../other.safetensors", "/etc/other.safetensors", "a/b.safetensors", "..", ""] {
        let index = format!(r#"{{"weight_map": {{"a": "{outside}"}}}}"#);
        let folder = written("model.safetensors.index.json", index);
        let outcome = weights::read_all(folder.path().join("model.safetensors.index.json"));
        assert_message(&outcome.expect_err("elsewhere").to_string(), &[outside, "same folder"]);
    }
    for outside in ["../a.png", "/etc/a.png", "a/../../a.png"] {
        let line = format!(r#"{{"file_name": "{outside}", "text": "a"}}"#);
        let folder = written("metadata.jsonl", line);
        let outcome = read_captions(folder.path()).expect_err("elsewhere").to_string();
        assert_message(&outcome, &[outside, "metadata.jsonl:1"]);
    }
}

/// A pipe without a writer would block, and an endless device would never end.
#[cfg(unix)]
#[test]
fn only_regular_files_are_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    for target in ["/dev/zero", "/dev/null", "/"] {
        std::os::unix::fs::symlink(target, &path).expect("a link");
        let error = ModelConfig::from_file(&path, UnknownKeys::Refuse).expect_err(target);
        assert_message(&crate::inputs::message_of(error), &["config.json", "regular file"]);
        fs::remove_file(&path).expect("it is ours");
    }
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    if made.is_ok_and(|status| status.success()) {
        let error = ModelConfig::from_file(&path, UnknownKeys::Refuse).expect_err("a pipe");
        assert_message(&crate::inputs::message_of(error), &["regular file"]);
    }
    not_as_members_of_a_checkpoint();
    let large = folder.path().join("large.json");
    fs::File::create(&large).and_then(|file| file.set_len(1 << 40)).expect("a sparse file");
    let error = UNet2DConfig::from_file(&large, UnknownKeys::Refuse).expect_err("too large");
    assert_message(&crate::inputs::message_of(error), &["large.json", "16777216"]);
}

/// An empty member could be replaced by a device of size 0, whose checksum would never end.
#[cfg(unix)]
fn not_as_members_of_a_checkpoint() {
    let folder = tempfile::tempdir().expect("a folder");
    let outside = folder.path().join("outside");
    fs::write(&outside, "").expect("there is room");
    let states = SavedFile { name: "a.rows".into(), path: outside, bytes: 0, crc32: 0 };
    let checkpoints = folder.path().join("checkpoints");
    let mut writer = CheckpointWriter::new(&checkpoints, 1, "distill").expect("a folder");
    writer.json("a.json", &"").and_then(|writer| writer.link(&states)).expect("there is room");
    let path = writer.commit().expect("there is room").path().to_owned();
    for name in ["a.json", "a.rows"] {
        let (member, whole) = (path.join(name), fs::read(path.join(name)).expect("it is there"));
        for put in [
            |member: &Path| std::os::unix::fs::symlink("/dev/zero", member).is_ok(),
            |member: &Path| {
                let made = std::process::Command::new("mkfifo").arg(member).status();
                made.is_ok_and(|status| status.success())
            },
        ] {
            fs::remove_file(&member).expect("it is ours");
            if !put(&member) {
                continue;
            }
            let error = Checkpoint::open(&path).expect_err("not a regular file");
            assert_message(
                &crate::inputs::message_of(error),
                &["step_0000001", name, "regular file"],
            );
        }
        fs::remove_file(&member).and_then(|()| fs::write(&member, whole)).expect("there is room");
        Checkpoint::open(&path).expect("it is as it was");
    }
}

/// Each folder behind a link leads back, twice: all ways through them are more than can be gone.
#[cfg(unix)]
#[test]
fn cyclic_links_are_not_followed() {
    let outer = tempfile::tempdir().expect("a folder");
    let model = outer.path().join("model");
    tiny_pipeline().write(&model);
    for name in ["loop", "again"] {
        std::os::unix::fs::symlink(&model, model.join("unet").join(name)).expect("a link");
    }
    let parts = ModelFiles::of_pipeline(&model, None).expect("a model");
    let to = outer.path().join("copy");
    parts.write(&to, &WeightForm::default(), false).expect("it is whole");
    assert!(!Path::new(&to).join("unet/loop").exists());
}
