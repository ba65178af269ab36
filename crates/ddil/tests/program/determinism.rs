//! The same config on the same machine comes to the same bits.

use std::fs;
use std::path::Path;

use ddil_models::weights;
use tch::Tensor;

use crate::methods::METHODS;
use crate::support::{Workshop, assert_same_end, snapshot};

fn complete(workshop: &Workshop, arguments: &[String]) {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    workshop.ddil(&arguments).succeeded();
}

#[test]
fn the_same_seed_twice_is_the_same_to_the_bit_and_another_is_not() {
    for method in &METHODS {
        let workshop = method.workshop();
        let of_seed = |name: &str, seed: &str| {
            let more = [seed, "output.sample_interval=6"];
            complete(&workshop, &method.arguments(name, 12, &more));
            workshop.run(name)
        };
        let [one, same, other] =
            [("one", "run.seed=7"), ("same", "run.seed=7"), ("other", "run.seed=8")]
                .map(|(name, seed)| of_seed(name, seed));
        assert_same_end(&one, &same);
        let metrics = |run| snapshot(run)[Path::new("metrics.jsonl")].clone();
        assert!(metrics(&one) != metrics(&other), "{}: the seed plays no part", method.name);
    }
}

/// Nothing that any method does on the CPU is refused by it, and it changes no bit.
#[test]
fn determinism_changes_nothing_on_the_cpu() {
    for method in &METHODS {
        let workshop = method.workshop();
        let run = |name: &str, more: &[&str]| {
            let settings = [&["output.sample_interval=6"], more].concat();
            complete(&workshop, &method.arguments(name, 6, &settings));
            workshop.run(name)
        };
        let (left, asked) = (run("left", &[]), run("asked", &["run.deterministic=true"]));
        let config = fs::read_to_string(asked.join("config.toml")).expect("it is there");
        assert!(config.contains("deterministic = true"), "{config}");
        let weights = |run: &Path| {
            snapshot(run)[Path::new("export/unet/diffusion_pytorch_model.safetensors")].clone()
        };
        assert!(weights(&left) == weights(&asked), "{}", method.name);
    }
}

/// Two threads add in another order than one, but the same order each time.
#[test]
fn two_threads_are_the_same_each_time_and_close_to_one() {
    for method in &METHODS {
        let workshop = method.workshop();
        let of_threads = |name: &str, threads: &str| {
            complete(&workshop, &method.arguments(name, 6, &[threads, "data.batch_size=8"]));
            workshop.run(name)
        };
        let [one, two, same] =
            [("one", "run.threads=1"), ("two", "run.threads=2"), ("same", "run.threads=2")]
                .map(|(name, threads)| of_threads(name, threads));
        assert_same_end(&two, &same);
        let (loss, weights) = (farthest_loss(&one, &two), farthest_weight(&one, &two));
        println!("{}: losses differ by {loss:.1e}, weights by {weights:.1e}", method.name);
        assert!(loss <= LOSSES && weights <= WEIGHTS, "{}: {loss:e}, {weights:e}", method.name);
    }
}

/// The differences that another number of threads may cause in a few updates; thirty times those measured in a dozen.
/// An optimizer that divides a gradient by its own magnitude amplifies rounding errors.
const LOSSES: f64 = 1e-4;
const WEIGHTS: f64 = 1e-2;

/// Largest difference of two runs' losses, of the largest loss.
fn farthest_loss(left: &Path, right: &Path) -> f64 {
    let [left, right] = [left, right].map(|run| {
        let text = fs::read_to_string(run.join("metrics.jsonl")).expect("it was written");
        let loss = |line| -> Option<f64> {
            serde_json::from_str::<serde_json::Value>(line).ok()?.get("loss")?.as_f64()
        };
        let losses: Vec<f64> = text.lines().map(|line| loss(line).expect("each has one")).collect();
        Tensor::from_slice(&losses)
    });
    farthest(&left, &right)
}

/// Largest difference of two exported models' weights, each of the largest value of its tensor.
fn farthest_weight(left: &Path, right: &Path) -> f64 {
    let [left, right] = [left, right].map(|run| {
        let file = run.join("export/unet/diffusion_pytorch_model.safetensors");
        weights::read_all(file).expect("it was exported")
    });
    assert!(left.keys().eq(right.keys()));
    left.iter().map(|(name, tensor)| farthest(tensor, &right[name])).fold(0.0, f64::max)
}

fn farthest(left: &Tensor, right: &Tensor) -> f64 {
    let largest = left.abs().max().double_value(&[]);
    (left - right).abs().max().double_value(&[]) / largest.max(f64::MIN_POSITIVE)
}
