//! Writes Fashion-MNIST as a data set of captioned images, in the layout that Hugging Face calls an image folder: PNG
//! files and a `metadata.jsonl` with a line `{"file_name": .., "text": [..]}` for each.
//!
//! Run with `cargo run --release --example caption_fashion_mnist -- [folder] [pictures]`; the folder is
//! `runs/fashion-mnist-captions` by default, with 5000 images. Takes seconds.

use std::fmt::Write;
use std::path::PathBuf;
use std::{env, fs};

use ddil_data::FashionMnist;
use ddil_examples::{Result, captions};
use ddil_pipelines::save_each;
use serde_json::json;

/// Captions per image.
const NUM_CAPTIONS: usize = 4;
/// Number of images in memory as floats at a time.
const BATCH_SIZE: i64 = 500;

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let folder = arguments.next().unwrap_or_else(|| "runs/fashion-mnist-captions".to_owned());
    let (folder, count) = (PathBuf::from(folder), arguments.next());
    let count = count.map_or(Ok(5000), |count| count.parse::<i64>())?;
    let data = FashionMnist::from_folder(None)?.train;
    if !(1..=data.len()).contains(&count) {
        return Err(format!("{count} images were requested, but there are {}", data.len()).into());
    }

    let mut metadata = String::new();
    for start in (0..count).step_by(BATCH_SIZE as usize) {
        let batch = data.range(start, BATCH_SIZE.min(count - start))?;
        let paths = save_each(&batch.x0, &folder, start as u64)?;
        let labels = Vec::<i64>::try_from(batch.labels.ok_or("images without labels")?)?;
        for ((path, label), index) in paths.iter().zip(labels).zip(start as u64..) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let text = captions::of_image(label as usize, index, NUM_CAPTIONS);
            writeln!(metadata, "{}", json!({ "file_name": name, "text": text }))?;
        }
    }
    // Written last: a folder that contains it is complete.
    fs::write(folder.join("metadata.jsonl"), metadata)?;
    println!("{count} images with {NUM_CAPTIONS} captions each in {}", folder.display());
    Ok(())
}
