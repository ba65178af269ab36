use ddil_losses::{
    ConsistencyDistance, Dmd2Config, LatentConsistencyConfig, MatchingTimesteps, Networks,
    ObjectiveConfig, Phase, ProgressiveConfig, Requirements, Solver, Weighting,
};
use ddil_schedulers::PredictionType;
use tch::{Tensor, kind};

use crate::toy::{Gaussian, loss_at, schedules, states, trailing};

#[test]
fn a_method_is_named_in_its_settings() {
    let settings = r#"{"method": "progressive", "substeps": 4, "weighting": "snr_plus_one"}"#;
    let config: ObjectiveConfig = serde_json::from_str(settings).expect("valid settings");
    let expected = ProgressiveConfig::default().with(|config| {
        config.substeps = 4;
        config.weighting = Weighting::SnrPlusOne;
    });
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

/// The settings that a user gets by default, so that no default changes unnoticed.
#[test]
fn written_settings_are_the_documented_ones() {
    for (config, expected) in [
        (
            ObjectiveConfig::Lcm(LatentConsistencyConfig::default()),
            r#"method = "lcm"
num_ddim_timesteps = 50
solver = "teacher"
ema_decay = 0.95
timestep_scaling = 10.0
sigma_data = 0.5

[loss]
kind = "huber"
c = 0.001
"#,
        ),
        (
            ObjectiveConfig::Dmd2(Dmd2Config::default()),
            r#"method = "dmd2"
critic_ratio = 5
dm_weight = 1.0
dm_min_timestep = 0.02
dm_max_timestep = 0.98
critic_weight_cap = 10000.0
gan = true
gan_weight = 0.005
critic_gan_weight = 0.01
"#,
        ),
    ] {
        let written = toml::to_string(&config).expect("settings can be written");
        assert_eq!(written, expected);
        let left_out = format!("method = \"{}\"", config.as_str());
        assert_eq!(toml::from_str::<ObjectiveConfig>(&left_out).expect("valid settings"), config);
    }
}

#[test]
fn the_critics_weighting_follows_its_prediction_type_by_default() {
    let dmd2 = |critic_weighting| {
        ObjectiveConfig::Dmd2(
            Dmd2Config::default().with(|config| config.critic_weighting = critic_weighting),
        )
    };
    for (output, weighting) in [
        (PredictionType::Epsilon, Weighting::Snr),
        (PredictionType::Sample, Weighting::Constant),
        (PredictionType::VPrediction, Weighting::SnrPlusOne),
        (PredictionType::Flow, Weighting::SnrPlusOne),
    ] {
        assert_eq!(dmd2(None).trained_to_predict(output), dmd2(Some(weighting)));
        let explicit = dmd2(Some(Weighting::TruncatedSnr));
        assert_eq!(explicit.clone().trained_to_predict(output), explicit);
    }
    let lcm = ObjectiveConfig::Lcm(LatentConsistencyConfig::default());
    assert_eq!(lcm.clone().trained_to_predict(PredictionType::VPrediction), lcm);
}

#[test]
fn settings_are_read_as_they_were_written() {
    let lcm = LatentConsistencyConfig::default().with(|config| {
        config.num_ddim_timesteps = 25;
        config.solver = Solver::Target;
        config.loss = ConsistencyDistance::L2 {};
        config.ema_decay = 0.9;
        config.timestep_scaling = 5.0;
        config.sigma_data = 1.0;
    });
    let dmd2 = Dmd2Config::default().with(|config| {
        config.critic_ratio = 10;
        config.dm_weight = 0.5;
        config.dm_min_timestep = 0.0;
        config.dm_max_timestep = 1.0;
        config.dm_timesteps = MatchingTimesteps::UpToState;
        config.critic_weighting = Some(Weighting::SnrPlusOne);
        config.critic_weight_cap = 100.0;
        config.critic_sees_source = true;
        config.critic_sees_timestep = true;
        config.gan = false;
        config.gan_weight = 1e-3;
        config.critic_gan_weight = 1.0;
    });
    let huber = LatentConsistencyConfig::default()
        .with(|config| config.loss = ConsistencyDistance::Huber { c: 0.5 });
    for config in
        [ObjectiveConfig::Lcm(lcm), ObjectiveConfig::Lcm(huber), ObjectiveConfig::Dmd2(dmd2)]
    {
        let as_toml = toml::to_string(&config).expect("settings can be written");
        assert_eq!(toml::from_str::<ObjectiveConfig>(&as_toml).expect("as written"), config);
        let as_json = serde_json::to_string(&config).expect("settings can be written");
        assert_eq!(serde_json::from_str::<ObjectiveConfig>(&as_json).expect("as written"), config);
    }
    let short = r#"{"method": "lcm", "loss": {"kind": "huber"}}"#;
    let short: ObjectiveConfig = serde_json::from_str(short).expect("`c` has a default");
    assert_eq!(short, ObjectiveConfig::Lcm(LatentConsistencyConfig::default()));
}

#[test]
fn unknown_methods_and_keys_are_refused() {
    for (settings, named) in [
        (r#"{"method": "progresive"}"#, "progresive"),
        (r#"{"method": "progressive", "substep": 4}"#, "substep"),
        (r#"{"method": "lcm", "huber_c": 0.1}"#, "huber_c"),
        (r#"{"method": "lcm", "solver": "student"}"#, "student"),
        (r#"{"method": "lcm", "loss": {"kind": "l1"}}"#, "l1"),
        (r#"{"method": "lcm", "loss": {"kind": "huber", "delta": 1.0}}"#, "delta"),
        (r#"{"method": "lcm", "loss": {"kind": "l2", "c": 0.1}}"#, "`c`"),
        (r#"{"method": "dmd2", "gan_wieght": 0.1}"#, "gan_wieght"),
        (r#"{"method": "dmd2", "critic_weighting": "snr_trunc"}"#, "snr_trunc"),
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
    let terms = loss_at(&*objective, 0, Phase::Student, &batch, &networks).expect("valid states");
    // A mean of 0 and states of 0: everybody predicts 0.
    assert_eq!(f64::try_from(terms.per_sample).expect("one value"), 0.0);
}
