//! Every metric against numbers that `tools/record/record_metrics.py` recorded.

use ddil_metrics::{
    Neighbours, Statistics, energy_distance, frechet_distance, kid, mean_pairwise_distance, prdc,
    sliced_wasserstein_along,
};
use serde_json::Value;
use tch::Tensor;

use crate::assert_close;

const RECORDED: &str = include_str!("../golden/metrics/features.json");

fn rows(rows: &Value) -> Tensor {
    let rows: Vec<Vec<f64>> = serde_json::from_value(rows.clone()).expect("rows of numbers");
    Tensor::from_slice2(&rows)
}

fn for_each_case(check: impl Fn(&Value, &Tensor, &Tensor, &Value)) {
    let recorded: Value = serde_json::from_str(RECORDED).expect("the file is JSON");
    let cases = recorded["cases"].as_array().expect("a list of cases");
    assert_eq!(cases.len(), 6);
    for case in cases {
        println!("case {}", case["name"]);
        check(case, &rows(&case["real"]), &rows(&case["fake"]), &case["values"]);
    }
}

fn number(values: &Value, name: &str) -> f64 {
    values[name].as_f64().expect("a number")
}

#[test]
fn frechet() {
    for_each_case(|_, real, fake, values| {
        let [real, fake] =
            [real, fake].map(|set| Statistics::from_features(set).expect("good features"));
        let found = frechet_distance(&real, &fake).expect("good statistics");
        assert_close(found, number(values, "frechet"), 1e-10);
    });
}

#[test]
fn precision_recall_density_coverage() {
    for_each_case(|case, real, fake, values| {
        let k = |name: &str| case[name].as_u64().expect("a number") as u32;
        let neighbours = Neighbours {
            precision_recall: k("precision_recall_k"),
            density_coverage: k("density_coverage_k"),
        };
        let found = prdc(real, fake, neighbours).expect("good features");
        assert_close(found.precision, number(values, "precision"), 1e-12);
        assert_close(found.recall, number(values, "recall"), 1e-12);
        assert_close(found.density, number(values, "density"), 1e-12);
        assert_close(found.coverage, number(values, "coverage"), 1e-12);
    });
}

#[test]
fn distances_between_distributions() {
    for_each_case(|case, real, fake, values| {
        let found = kid(real, fake).expect("good features");
        assert_close(found, number(values, "kid"), 1e-11);
        let found = energy_distance(real, fake).expect("good features");
        assert_close(found, number(values, "energy_distance"), 1e-12);
        let found = mean_pairwise_distance(fake).expect("good features");
        assert_close(found, number(values, "mean_pairwise_distance"), 1e-12);
        if !values["sliced_wasserstein"].is_null() {
            let directions = rows(&case["directions"]);
            let found = sliced_wasserstein_along(real, fake, &directions).expect("good features");
            assert_close(found, number(values, "sliced_wasserstein"), 1e-12);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_measures_what_was_recorded() {
    for_each_case(|case, real, fake, values| {
        let [real, fake] = [real, fake].map(|set| set.to_device(tch::Device::Cuda(0)));
        let found =
            [&real, &fake].map(|set| Statistics::from_features(set).expect("good features"));
        let found = frechet_distance(&found[0], &found[1]).expect("good statistics");
        assert_close(found, number(values, "frechet"), 1e-9);
        let k = |name: &str| case[name].as_u64().expect("a number") as u32;
        let neighbours = Neighbours {
            precision_recall: k("precision_recall_k"),
            density_coverage: k("density_coverage_k"),
        };
        let found = prdc(&real, &fake, neighbours).expect("good features");
        let [precision, coverage] = ["precision", "coverage"].map(|name| number(values, name));
        assert_close(found.precision, precision, 1e-12);
        assert_close(found.coverage, coverage, 1e-12);
        assert_close(kid(&real, &fake).expect("good features"), number(values, "kid"), 1e-10);
        let found = energy_distance(&real, &fake).expect("good features");
        assert_close(found, number(values, "energy_distance"), 1e-10);
    });
}
