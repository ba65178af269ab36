//! Trains the Fashion-MNIST classifier whose features the metrics use, and writes its weights.
//!
//! Run with `cargo run --release --example train_classifier -- [weights.safetensors]`; without an
//! argument it overwrites the weights in `ddil-metrics`. Takes minutes on one core.

use std::{env, fs, time::Instant};

use ddil_data::{BatchIndices, FashionMnist, ImageDataset, Report};
use ddil_metrics::FashionClassifier;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{
    Device, Tensor,
    nn::{self, OptimizerConfig},
};

const WEIGHTS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../crates/ddil-metrics/assets/fashion_classifier.safetensors"
);

const NUM_EPOCHS: u64 = 10;
const BATCH_SIZE: usize = 128;
const PEAK_LEARNING_RATE: f64 = 3e-3;
const WEIGHT_DECAY: f64 = 2e-2;
/// Largest shift of a training image, in pixels, in each direction.
const MAX_SHIFT: i64 = 2;
const SEED: i64 = 0;

fn main() -> Result<(), Report> {
    let start = Instant::now();
    tch::set_num_threads(1);
    tch::manual_seed(SEED);
    let path = env::args().nth(1).unwrap_or_else(|| WEIGHTS.to_owned());
    let data = FashionMnist::from_folder(None)?;

    let classifier = FashionClassifier::untrained(Device::Cpu)?;
    train(&classifier, &data.train)?;

    let accuracy = accuracy(&classifier, &data.test)?;
    fs::write(&path, classifier.to_bytes()?)?;
    println!(
        "test accuracy {:.2} %, {:.0} s, {path}",
        100.0 * accuracy,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn train(classifier: &FashionClassifier, data: &ImageDataset) -> Result<(), Report> {
    let mut indices = BatchIndices::new(data.len(), BATCH_SIZE, SEED as u64)?;
    let mut shifts = StdRng::seed_from_u64(SEED as u64);
    let mut optimizer = nn::AdamW { wd: WEIGHT_DECAY, ..Default::default() }
        .build(classifier.variables(), PEAK_LEARNING_RATE)?;
    let num_steps = NUM_EPOCHS * indices.steps_per_epoch();

    let mut mean_loss = 0.0;
    for step in 0..num_steps {
        let batch = data.batch(&indices.at(step))?;
        let labels = batch.labels.ok_or("the training set has no labels")?;
        let logits = classifier.logits(&shifted(&batch.x0, &mut shifts))?;
        let loss = logits.cross_entropy_for_logits(&labels);
        optimizer.set_lr(learning_rate(step, num_steps));
        optimizer.backward_step(&loss);

        mean_loss += (loss.double_value(&[]) - mean_loss) / 100.0_f64.min(step as f64 + 1.0);
        if (step + 1) % 200 == 0 {
            println!("step {} of {num_steps}: loss {mean_loss:.4}", step + 1);
        }
    }
    Ok(())
}

/// One cycle: up over the first twentieth, then down along a half cosine.
fn learning_rate(step: u64, num_steps: u64) -> f64 {
    let progress = step as f64 / num_steps as f64;
    let factor = if progress < 0.05 {
        (progress / 0.05).max(0.01)
    } else {
        0.5 * (1.0 + ((progress - 0.05) / 0.95 * std::f64::consts::PI).cos())
    };
    PEAK_LEARNING_RATE * factor
}

/// Shifts the batch by a few pixels: one shift per batch is enough augmentation, and needs only one copy.
fn shifted(images: &Tensor, rng: &mut StdRng) -> Tensor {
    let [down, right] = [(); 2].map(|()| rng.random_range(-MAX_SHIFT..=MAX_SHIFT));
    // The border of two pixels is background, so what is rolled in on the opposite side is also background.
    images.roll([down, right], [2, 3])
}

fn accuracy(classifier: &FashionClassifier, data: &ImageDataset) -> Result<f64, Report> {
    let all = data.range(0, data.len())?;
    let labels = all.labels.ok_or("the test set has no labels")?;
    Ok(classifier.accuracy(&all.x0, &labels)?)
}
