//! Draws 16 samples from a closed-form teacher in four steps.
//!
//! Run with `cargo run --release --example few_step_sampling`.

use std::error::Error;

use ddil_core::{Conditioning, sample};
use ddil_models::GaussianMixture;
use ddil_schedulers::{Ddim, NoiseScheduleConfig, TimestepSpacing, Timesteps};
use tch::{Kind, Tensor, kind};

fn main() -> Result<(), Box<dyn Error>> {
    tch::manual_seed(0);
    let schedule = NoiseScheduleConfig::default().build()?;
    let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?; // 999, 749, 499, 249
    let teacher = GaussianMixture::ring(8)?.on(schedule.clone());
    let (sampler, noise) = (Ddim::new(schedule), Tensor::randn([16, 2], kind::FLOAT_CPU));
    let samples = sample(&teacher, &sampler, &timesteps, noise, &Conditioning::none(), None)?;

    samples.print();
    let distances = teacher.mixture().distance_to_nearest(&samples)?;
    let mean = distances.mean(Kind::Double).double_value(&[]);
    // A Gaussian of standard deviation 0.08 in the plane is 0.08 sqrt(pi / 2) from its mean on average.
    println!("mean distance to the nearest mode: {mean:.2}; that of the data is 0.10");
    Ok(())
}
