//! Samples of an exact teacher in few and in many steps: a table, and a plot in the terminal.
//!
//! The data are eight Gaussians on a ring, whose denoiser is known in closed form, so that every error in the table is
//! due to the sampler.
//!
//! Run with `cargo run --release --example few_step_sampling`.

use ddil_core::{GaussianMixture, RandomStreams, Report, Rollout, Stream};
use ddil_metrics::energy_distance;
use ddil_schedulers::{Ddim, NoiseScheduleConfig, TimestepSpacing, Timesteps};
use tch::{Device, Kind, Tensor};

const NUM_SAMPLES: i64 = 2000;
/// Rows and columns of a plot.
const PICTURE: (usize, usize) = (19, 38);

fn main() -> Result<(), Report> {
    let schedule = NoiseScheduleConfig::default().build()?;
    let teacher = GaussianMixture::ring(8)?.on(schedule.clone());
    let sampler = Ddim::new(schedule);
    let streams = RandomStreams::new(0, 0);
    let mut generator = streams.generator(0, Stream::Sample, Device::Cpu)?;
    let noise = generator.normal([NUM_SAMPLES, 2], Kind::Float)?;
    let data = teacher.mixture().sample(NUM_SAMPLES, None, &mut generator)?;

    println!("          distance to the nearest mode   energy distance to the data");
    let report = |name: &str, samples: &Tensor| -> Result<(), Report> {
        let to_mode = teacher.mixture().distance_to_nearest(samples)?.mean(Kind::Double);
        let to_data = energy_distance(samples, &data)?;
        println!("{name:>8}  {:28.3}   {to_data:27.4}", to_mode.double_value(&[]));
        Ok(())
    };
    let mut pictures = vec![picture(&data)];
    for steps in [1, 2, 4, 8, 50] {
        let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, steps, 0)?;
        let rollout = Rollout::new(&teacher, &sampler, &timesteps);
        let samples = rollout.sample(noise.shallow_clone())?;
        report(&format!("{steps} steps"), &samples)?;
        if [2, 4].contains(&steps) {
            pictures.push(picture(&samples));
        }
    }
    // Other samples of the data: the distance due to chance alone.
    report("data", &teacher.mixture().sample(NUM_SAMPLES, None, &mut generator)?)?;

    let width = PICTURE.1;
    println!("\n{:<width$}  {:<width$}  {:<width$}", "data", "2 steps", "4 steps");
    for row in 0..PICTURE.0 {
        let rows: Vec<&str> = pictures.iter().map(|picture| &*picture[row]).collect();
        println!("{}", rows.join("  "));
    }
    Ok(())
}

/// A histogram of the samples in -1.4..1.4 on both axes: darker characters are higher counts.
fn picture(samples: &Tensor) -> Vec<String> {
    const SHADES: &[u8] = b" .:+*#@";
    let (rows, columns) = PICTURE;
    let mut counts = vec![vec![0_usize; columns]; rows];
    let place = |value: f64, places: usize| ((value + 1.4) / 2.8 * places as f64) as usize;
    for i in 0..samples.size()[0] {
        let (x, y) = (samples.double_value(&[i, 0]), samples.double_value(&[i, 1]));
        let row = counts.get_mut(place(-y, rows));
        if let Some(count) = row.and_then(|row| row.get_mut(place(x, columns))) {
            *count += 1;
        }
    }
    let shade = |&count: &usize| char::from(SHADES[count.div_ceil(3).min(SHADES.len() - 1)]);
    counts.iter().map(|row| row.iter().map(shade).collect()).collect()
}
