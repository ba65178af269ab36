//! Draws 300 PNG files of three classes, of sizes from 40x40 to 88x88: discs, rings and squares of random colours on dark
//! backgrounds. They take the place of images of your own in `docs/YOUR_OWN_MODEL.md`.
//!
//! Run with `cargo run --release --example draw_images -- [folder] [images]`; the folder is `my-images` by default. Takes
//! a second.

use std::fs;
use std::path::PathBuf;

use ddil_examples::Result;
use ddil_pipelines::Image;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

const CLASSES: [&str; 3] = ["disc", "ring", "square"];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().unwrap_or_else(|| "my-images".to_owned()));
    let count = arguments.next().map_or(Ok(300), |count| count.parse::<usize>())?;
    if folder.exists() {
        return Err(format!("{} exists already; choose another folder", folder.display()).into());
    }
    let mut rng = StdRng::seed_from_u64(0);
    for index in 0..count {
        let class = CLASSES[index % CLASSES.len()];
        let path = folder.join(class).join(format!("{index:04}.png"));
        fs::create_dir_all(folder.join(class))?;
        Image::each(&draw(class, &mut rng))?[0].save(&path)?;
    }
    println!("{count} images of {} classes in {}", CLASSES.len(), folder.display());
    Ok(())
}

/// One image, `[1, 3, side, side]` in `[-1, 1]`.
fn draw(class: &str, rng: &mut StdRng) -> Tensor {
    let side: i64 = rng.random_range(40..=88);
    let mut between = |low: f64, high: f64| rng.random_range(low..high);
    let mut colour = |low: f64, high: f64| {
        let values: Vec<f32> = (0..3).map(|_| between(low, high) as f32).collect();
        Tensor::from_slice(&values).view([1, 3, 1, 1])
    };
    let (shape, background) = (colour(-0.2, 1.0), colour(-1.0, -0.5));
    let (radius, x, y) = (between(0.35, 0.7), between(-0.25, 0.25), between(-0.25, 0.25));
    let axis = Tensor::linspace(-1.0, 1.0, side, FLOAT_CPU);
    let (dx, dy) = (axis.view([1, 1, 1, side]) - x, axis.view([1, 1, side, 1]) - y);
    let distance = if class == "square" {
        dx.abs().maximum(&dy.abs())
    } else {
        (dx.square() + dy.square()).sqrt()
    };
    let distance =
        if class == "ring" { (distance - 0.8 * radius).abs() + 0.8 * radius } else { distance };
    // An edge one pixel wide.
    let inside = ((radius - distance) * (side as f64 / 2.0) + 0.5).clamp(0.0, 1.0);
    (&background + inside.to_kind(Kind::Float) * (&shape - &background)).clamp(-1.0, 1.0)
}
