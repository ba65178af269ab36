use ddil_losses::{Networks, ObjectiveConfig, Phase, ProgressiveConfig, Requirements, Weighting};
use tch::{Tensor, kind};

use crate::toy::{Gaussian, ask, schedules, states, trailing};

#[test]
fn a_method_is_named_in_its_settings() {
    let settings = r#"{"method": "progressive", "substeps": 4, "weighting": "snr_plus_one"}"#;
    let config: ObjectiveConfig = serde_json::from_str(settings).expect("valid settings");
    let expected = ProgressiveConfig {
        substeps: 4,
        weighting: Weighting::SnrPlusOne,
        ..ProgressiveConfig::default()
    };
    assert_eq!(config, ObjectiveConfig::Progressive(expected));
    let written = serde_json::to_string(&config).expect("settings can be written");
    assert_eq!(serde_json::from_str::<ObjectiveConfig>(&written).expect("as written"), config);
}

#[test]
fn defaults_are_the_documented_ones() {
    let config: ObjectiveConfig =
        serde_json::from_str(r#"{"method": "progressive"}"#).expect("valid settings");
    assert_eq!((&config, config.as_str()), (&ObjectiveConfig::default(), "progressive"));
    let ObjectiveConfig::Progressive(config) = config else { panic!("{config:?}") };
    assert_eq!((config.substeps, config.weighting), (2, Weighting::TruncatedSnr));
    assert_eq!((config.weight_cap, config.snr_loss_start_step), (None, 0));
}

#[test]
fn unknown_methods_and_keys_are_refused() {
    for (settings, named) in [
        (r#"{"method": "progresive"}"#, "progresive"),
        (r#"{"method": "progressive", "substep": 4}"#, "substep"),
    ] {
        let refused = serde_json::from_str::<ObjectiveConfig>(settings);
        let message = refused.expect_err("the key is unknown").to_string();
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn a_built_method_is_an_object_that_trains_its_student() {
    let [schedule, ..] = schedules();
    let grid = trailing(4);
    let objective = ObjectiveConfig::default().build(&schedule, &grid).expect("valid settings");
    assert_eq!(objective.phases(17), [Phase::Student]);
    assert_eq!(objective.requirements(), Requirements::default());
    let network = Gaussian { schedule, mean: 0.0, std: 1.0 };
    let batch = states(Tensor::zeros([1, 2], kind::DOUBLE_CPU), &grid, &[0]);
    let networks = Networks::new(&network, &network);
    let terms = ask(&*objective, 0, Phase::Student, &batch, &networks).expect("valid states");
    // A mean of 0 and states of 0: everybody predicts 0.
    assert_eq!(f64::try_from(terms.per_sample).expect("one value"), 0.0);
}
