//! What data are read from.

use std::io::Write as _;
use std::path::{Component, Path};

use ddil_data::{
    Captions, EncodedDataset, Error, ImageFiles, read_captions, read_cropped, read_idx_images,
    read_idx_labels, read_image_folder, read_prompts,
};
use ddil_metrics::{FashionClassifier, RawPixels, Reference};
use tch::Tensor;

use super::harness::{Response, Target, message_of};
use super::tree::{Tree, repository};

/// Four images of three rows and two columns.
pub(super) fn idx_images() -> Vec<u8> {
    let header = [0x803_u32, 4, 3, 2].map(u32::to_be_bytes).concat();
    [header, (0..24).collect()].concat()
}

pub(super) fn idx_labels() -> Vec<u8> {
    let header = [0x801_u32, 4].map(u32::to_be_bytes).concat();
    [header, vec![0, 1, 2, 1]].concat()
}

pub(super) fn packed(content: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(content).expect("memory");
    packed.finish().expect("memory")
}

#[test]
fn idx_file() {
    let seeds = vec![
        Tree::file("images.idx", idx_images()).with("labels.idx", idx_labels()),
        Tree::file("images.gz", packed(&idx_images())).with("labels.gz", packed(&idx_labels())),
    ];
    Target::new("idx_file", seeds, |folder| {
        let ending = if folder.join("images.gz").exists() { "gz" } else { "idx" };
        let images = read_idx_images(&folder.join("images").with_extension(ending));
        let labels = read_idx_labels(&folder.join("labels").with_extension(ending));
        images.and(labels).map(drop).map_err(message_of)
    })
    .run();
}

/// An image of 4 by 4 pixels.
pub(crate) fn image_bytes(colour: png::ColorType, depth: png::BitDepth, shade: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 4, 4);
    encoder.set_color(colour);
    encoder.set_depth(depth);
    let mut writer = encoder.write_header().expect("memory");
    let samples = colour.samples() * if depth == png::BitDepth::Sixteen { 2 } else { 1 };
    writer.write_image_data(&vec![shade; 16 * samples]).expect("it fits");
    writer.finish().expect("memory");
    bytes
}

#[test]
fn picture_folder() {
    use png::BitDepth::{Eight, Sixteen};
    use png::ColorType::{Grayscale, Rgb};
    let flat =
        Tree::file("a.png", image_bytes(Rgb, Eight, 3)).with("b.png", image_bytes(Rgb, Eight, 9));
    let classes = Tree::file("cat/a.png", image_bytes(Grayscale, Eight, 3))
        .with("dog/b.png", image_bytes(Grayscale, Sixteen, 9));
    Target::new("picture_folder", vec![flat, classes], |folder| {
        read_image_folder(folder).map(drop).map_err(message_of)
    })
    .run();
}

/// Grey, in colour, in several scans, and to be turned.
#[test]
fn jpeg_folder() {
    let golden = |name: &str| {
        let path = repository().join("tests/golden/pictures").join(name);
        std::fs::read(path).expect("a golden")
    };
    let mut seeds: Vec<Tree> = ["grey.jpg", "turned_1.jpg", "turned_6.jpg", "progressive.jpg"]
        .map(|name| Tree::file("a.jpg", golden(name)))
        .into();
    seeds.push(
        Tree::file("cat/a.jpg", golden("turned_1.jpg")).with("dog/b.jpg", golden("turned_3.jpg")),
    );
    Target::new("jpeg_folder", seeds, |folder| {
        let _ = read_cropped(&folder.join("a.jpg"), 3, [8, 8]);
        read_image_folder(folder).map(drop).map_err(message_of)
    })
    .run();
}

/// Saved references: ours, and pytorch-fid's.
#[test]
fn reference_statistics() {
    let npz = std::fs::read(repository().join("tests/golden/metrics/pytorch_fid.npz"));
    let folder = tempfile::tempdir().expect("a folder");
    let own = folder.path().join("reference.safetensors");
    let features = Tensor::arange(24, tch::kind::FLOAT_CPU).view([8, 3]);
    Reference::new("set", &features, &RawPixels::new([1, 1, 3]))
        .and_then(|reference| reference.write(&own))
        .expect("a reference");
    let seeds = vec![
        Tree::file("reference.npz", npz.expect("a golden")),
        Tree::file("reference.safetensors", std::fs::read(&own).expect("it was written")),
    ];
    Target::new("reference_statistics", seeds, |folder| {
        let npz = folder.join("reference.npz");
        let path = if npz.exists() { npz } else { folder.join("reference.safetensors") };
        Reference::from_file(path).map(drop).map_err(message_of)
    })
    .run();
}

/// Images of a folder, decoded in threads.
#[test]
fn image_files() {
    use png::BitDepth::Eight;
    use png::ColorType::{Grayscale, Rgba};
    let tree = Tree::file("a.png", image_bytes(Rgba, Eight, 3))
        .with("sub/b.png", image_bytes(Grayscale, Eight, 9));
    Target::new("image_files", vec![tree], |folder| {
        let pixels = ImageFiles::in_folder(folder).map_err(message_of)?;
        pixels.for_each(2, Ok::<_, Error>, |_, _| Ok(())).map_err(message_of)
    })
    .run();
}

#[test]
fn captions() {
    use png::{BitDepth::Eight, ColorType::Rgb};
    let pictures = || {
        Tree::file("a.png", image_bytes(Rgb, Eight, 3))
            .with("sub/b.png", image_bytes(Rgb, Eight, 9))
    };
    let lines = "{\"file_name\": \"a.png\", \"text\": \"a cat\"}\n\
                 {\"file_name\": \"sub/b.png\", \"text\": [\"a dog\", \"one dog\"]}\n";
    let mut beside = pictures().with("a.txt", "a cat\nthe cat\n");
    beside.files.remove("sub/b.png");
    let seeds = vec![pictures().with("metadata.jsonl", lines), beside];
    Target::new("captions", seeds, read_captioned).run();
}

#[test]
fn captions_in_a_table() {
    use png::{BitDepth::Eight, ColorType::Rgb};
    let table = "file_name,text,licence\na.png,a cat,free\nsub/b.png,\"a dog \"\"Rex\"\"\",free\n";
    let seed = Tree::file("metadata.csv", table)
        .with("a.png", image_bytes(Rgb, Eight, 3))
        .with("sub/b.png", image_bytes(Rgb, Eight, 9));
    Target::new("captions_in_a_table", vec![seed], read_captioned).run();
}

fn read_captioned(folder: &Path) -> Response {
    for sample in read_captions(folder).map_err(message_of)? {
        let path = folder.join(&sample.file_name);
        let stays = sample.file_name.components().all(|part| part != Component::ParentDir);
        assert!(stays && path.starts_with(folder) && !sample.texts.is_empty());
        read_cropped(&path, 3, [8, 8]).map_err(message_of)?;
    }
    Ok(())
}

#[test]
fn prompts_file() {
    prompts("prompts_file", PROMPTS[0], "a cat\n\na dog\n");
}

#[test]
fn prompts_in_lines_of_json() {
    let lines = "{\"text\": \"a cat\", \"image_id\": 3}\n{\"caption\": [\"a dog\", \"one dog\"]}\n";
    prompts("prompts_in_lines_of_json", PROMPTS[1], lines);
}

#[test]
fn prompts_in_a_table() {
    let table = "file_name,prompt\na.png,a cat\nb.png,\"a dog \"\"Rex\"\"\"\n";
    prompts("prompts_in_a_table", PROMPTS[2], table);
}

#[test]
fn captions_of_coco() {
    let coco = r#"{"images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [{"id": 1, "image_id": 3, "caption": "A cat."},
                        {"id": 2, "image_id": 7, "caption": "A dog."}]}"#;
    prompts("captions_of_coco", PROMPTS[3], coco);
}

/// A file of each form.
const PROMPTS: [&str; 4] = ["prompts.txt", "prompts.jsonl", "prompts.csv", "captions.json"];

fn prompts(target: &'static str, name: &str, text: &str) {
    let read = |folder: &Path| {
        let file = PROMPTS.iter().map(|name| folder.join(name)).find(|file| file.exists());
        let file = file.unwrap_or_else(|| folder.join(PROMPTS[0]));
        let prompts = read_prompts(&file, Captions::All).map_err(message_of)?;
        assert!(!prompts.is_empty());
        assert!(prompts.iter().all(|p| !p.text.is_empty() && p.text.trim() == p.text));
        read_prompts(&file, Captions::First).map(drop).map_err(message_of)
    };
    Target::new(target, vec![Tree::file(name, text)], read).run();
}

fn tensors(named: &[(&str, Tensor)]) -> Vec<u8> {
    let named: Vec<(&str, &Tensor)> = named.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tensors");
    Tensor::write_safetensors(&named, &path).expect("they can be written");
    std::fs::read(path).expect("it was written")
}

/// Two samples with three prompts.
pub(super) fn encoded() -> Tree {
    let (floats, whole) = (tch::kind::FLOAT_CPU, tch::kind::INT64_CPU);
    let mean = Tensor::ones([2, 2, 4, 4], floats);
    let rows = Tensor::from_slice(&[1_i64, 2, 2, -1]).view([2, 2]);
    assert_eq!(rows.kind(), whole.0);
    Tree::file(
        "dataset.json",
        r#"{"format_version": 1, "image_size": [8, 8], "scaling": {"factor": 0.5},
            "num_samples": 2, "num_prompts": 3, "empty_prompt": 0}"#,
    )
    .with("latents.safetensors", tensors(&[("std", mean.shallow_clone() * 0.5), ("mean", mean)]))
    .with(
        "prompts.safetensors",
        tensors(&[("encoder_hidden_states", Tensor::zeros([3, 2, 4], floats))]),
    )
    .with("samples.safetensors", tensors(&[("prompts", rows)]))
    .with("prompts.json", r#"["", "a cat", "a dog"]"#)
}

#[test]
fn encoded_data() {
    Target::new("encoded_data", vec![encoded()], read_encoded).run();
}

fn read_encoded(folder: &Path) -> Response {
    use ddil_core::{RandomStreams, Stream};
    let data = EncodedDataset::open(folder, None).map_err(message_of)?;
    let shape = data.latent_shape().unwrap_or([1, 1, 1]);
    let device = tch::Device::Cpu;
    let mut draws = RandomStreams::new(0, 0).draws(0, Stream::Data, device).map_err(message_of)?;
    for index in [0, data.len() - 1] {
        data.batch(&[index], shape, &mut draws, device).map_err(message_of)?;
    }
    data.empty_prompt().map(drop).map_err(message_of)
}

#[test]
fn classifier_file() {
    let classifier = FashionClassifier::untrained(tch::Device::Cpu).expect("there is a CPU");
    let seed = Tree::file("classifier.safetensors", classifier.to_bytes().expect("weights"));
    Target::new("classifier_file", vec![seed], |folder| {
        let bytes = std::fs::read(folder.join("classifier.safetensors")).map_err(|_| "`file`")?;
        let read = FashionClassifier::from_bytes(&bytes, tch::Device::Cpu);
        // It receives bytes and cannot name the file.
        read.map(drop).map_err(|error| format!("`bytes`: {}", message_of(error)))
    })
    .run();
}
