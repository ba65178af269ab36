//! The same config on the same machine comes to the same bits.

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
        let metrics = |run| snapshot(run)[std::path::Path::new("metrics.jsonl")].clone();
        assert!(metrics(&one) != metrics(&other), "{}: the seed plays no part", method.name);
    }
}

/// Two threads add in another order than one, but the same order each time.
#[test]
fn two_threads_are_the_same_each_time() {
    for method in &METHODS[..2] {
        let workshop = method.workshop();
        for name in ["one", "same"] {
            complete(&workshop, &method.arguments(name, 12, &["run.threads=2"]));
        }
        assert_same_end(&workshop.run("one"), &workshop.run("same"));
    }
}
