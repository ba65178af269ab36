use ddil_schedulers::{
    BetaSchedule, CommonConfig, DataRange, FinalAlphaCumprod, FlowConfig, LcmConfig,
    NoiseScheduleConfig, PredictionType, SchedulerConfig, SchedulerFile, Thresholding,
    TimestepSpacing, Timesteps, VpConfig,
};

use crate::support::{assert_close, recorded};

#[test]
fn files_of_diffusers_are_read_and_written_back_to_the_byte() {
    for (file, class) in [("ddim", "DDIMScheduler"), ("lcm", "LCMScheduler")] {
        let path = recorded(&format!("{file}_scheduler_config.json"));
        let config = SchedulerConfig::from_file(&path).expect("a file of diffusers");
        assert_eq!(config.class(), class);
        let text = std::fs::read_to_string(&path).expect("the file is checked in");
        assert_eq!(config.to_json().trim_end(), text.trim_end());
    }
}

#[test]
fn networks_are_built_as_their_files_describe() {
    let text = r#"{
        "_class_name": "LCMScheduler", "beta_schedule": "squaredcos_cap_v2", "thresholding": true,
        "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.5, "set_alpha_to_one": false,
        "prediction_type": "v_prediction", "original_inference_steps": 25, "timestep_scaling": 5
    }"#;
    let config = SchedulerConfig::from_json(text).expect("valid settings");
    let dynamic = Thresholding::Dynamic { ratio: 0.9, max_value: 2.5 };
    assert_eq!(config.thresholding(), dynamic);
    assert_eq!(config.prediction_type(), PredictionType::VPrediction);
    assert_eq!(config.boundary().map(|b| b.timestep_scaling), Some(5.0));
    let expected = Timesteps::lcm(1000, 25, 4).expect("it fits");
    assert_eq!(config.timesteps(Some(4)).expect("it fits"), expected);
    assert_eq!(config.compatible_timesteps(4).expect("it fits"), expected);
    let sampler = config.sampler().expect("valid settings");
    assert!(sampler.needs_noise());
    let ends = [-1, 0].map(|t| sampler.schedule().alpha_cumprod_at(t).expect("on the grid"));
    assert_close(&ends[..1], &ends[1..], 0.0);
    assert_close(&ends[..1], &[0.999_958_716], 1e-9);
}

#[test]
fn missing_keys_have_the_default_of_their_class() {
    let ddim = SchedulerConfig::from_json(r#"{"_class_name": "DDIMScheduler"}"#).expect("valid");
    assert_eq!(ddim, SchedulerConfig::Ddim(CommonConfig::default()));
    assert_eq!(ddim.thresholding(), Thresholding::clamp_pixels());
    let lcm = SchedulerConfig::from_json(r#"{"_class_name": "LCMScheduler"}"#).expect("valid");
    assert_eq!(lcm, SchedulerConfig::Lcm(LcmConfig::default()));
    assert_eq!(lcm.thresholding(), Thresholding::None);
    assert_eq!(lcm.common().beta_schedule, BetaSchedule::ScaledLinear);
}

#[test]
fn a_student_carries_its_timesteps() {
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("it fits");
    let schedule = NoiseScheduleConfig::Vp(VpConfig {
        beta_schedule: BetaSchedule::SquaredcosCapV2,
        final_alpha_cumprod: FinalAlphaCumprod::First,
        rescale_betas_zero_snr: true,
        ..VpConfig::default()
    });
    let clamp = Thresholding::Clamp(DataRange::scalar(-2.0, 2.0));
    let common = CommonConfig::new(&schedule, PredictionType::VPrediction, &clamp)
        .expect("diffusers has words for it")
        .with_trained_timesteps(&grid);
    let lcm = LcmConfig { common: common.clone(), ..LcmConfig::default() };
    for config in [SchedulerConfig::Ddim(common), SchedulerConfig::Lcm(lcm)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("scheduler_config.json");
        config.write(&path).expect("it can be written");
        let read = SchedulerConfig::from_file(&path).expect("as written");
        assert_eq!(read, config);
        assert_eq!(read.timesteps(None).expect("trained timesteps"), grid);
        assert_eq!(read.thresholding(), clamp);
        assert_eq!(*read.schedule().expect("valid").config(), schedule);
        // Without them it needs the number of steps.
        assert_eq!(read.timesteps(Some(2)).expect("it fits").len(), 2);
    }
    let untrained = SchedulerConfig::Ddim(CommonConfig::default());
    assert!(!untrained.to_json().contains("ddil_timesteps"));
    let message = untrained.timesteps(None).expect_err("no number of steps").to_string();
    assert!(message.contains("num_inference_steps"), "{message}");
}

#[test]
fn all_unknown_keys_are_named_unless_they_are_ignored() {
    let text = r#"{"_class_name": "DDIMScheduler", "skip_prk_steps": true, "shift": 3.0, "beta_start": 0.001}"#;
    let message = SchedulerConfig::from_json(text).expect_err("unknown keys").to_string();
    let named = "DDIMScheduler has no key `shift`, `skip_prk_steps`; its keys are `_class_name`";
    assert!(message.starts_with(named) && message.contains("`ddil_timesteps`"), "{message}");
    let (config, passed_over) = SchedulerConfig::from_json_lenient(text).expect("lenient");
    assert_eq!(passed_over, ["shift", "skip_prk_steps"]);
    assert_close(&[config.common().beta_start], &[0.001], 0.0);
    // LCM's keys are unknown to DDIM.
    let text = r#"{"_class_name": "DDIMScheduler", "timestep_scaling": 10.0}"#;
    assert!(SchedulerConfig::from_json(text).is_err());
}

#[test]
fn invalid_values_are_refused_by_name() {
    let refused = [
        (r#""beta_start": "small""#, r#"`beta_start` is "small"; expected a number"#),
        (r#""num_train_timesteps": -5"#, "`num_train_timesteps` is -5"),
        (r#""beta_schedule": "sigmoid""#, "squaredcos_cap_v2"),
        (r#""prediction_type": "flow_prediction""#, "`epsilon`, `sample` or `v_prediction`"),
        (r#""prediction_type": "noise""#, "`epsilon`, `sample` or `v_prediction`"),
        (r#""timestep_spacing": "even""#, "`leading`, `linspace` or `trailing`"),
        (r#""clip_sample": 1"#, "true or false"),
        (r#""clip_sample_range": -1.0"#, "thresholding.low"),
        (r#""beta_end": 2.0"#, "beta_end"),
        (r#""trained_betas": [0.1]"#, "a list of 1"),
        (r#""ddil_timesteps": [249, 499]"#, "strictly falling"),
        (r#""ddil_timesteps": [1000]"#, "strictly falling"),
        (r#""ddil_timesteps": "all""#, "a list of whole numbers"),
    ];
    for (line, named) in refused {
        let text = format!(r#"{{"_class_name": "DDIMScheduler", {line}}}"#);
        let message = SchedulerConfig::from_json(&text).expect_err(line).to_string();
        assert!(message.contains(named), "{message}");
    }
    let lcm = r#"{"_class_name": "LCMScheduler", "original_inference_steps": 2000}"#;
    assert!(SchedulerConfig::from_json(lcm).is_err());
}

#[test]
fn texts_and_files_that_cannot_be_read_are_refused() {
    for text in ["", "[]", "{", "null"] {
        let message = SchedulerConfig::from_json(text).expect_err("no object").to_string();
        assert!(message.contains("JSON object"), "{message}");
    }
    for (text, named) in [
        ("{}", "`_class_name` is ``"),
        (r#"{"_class_name": "PNDMScheduler"}"#, "`PNDMScheduler`"),
        (r#"{"_class_name": 3}"#, "`_class_name` is 3"),
    ] {
        let message = SchedulerConfig::from_json(text).expect_err("no such class").to_string();
        assert!(message.contains(named), "{message}");
    }
    let missing = SchedulerConfig::from_file("no/such/file.json").expect_err("no such file");
    assert_eq!(missing.to_string(), "could not read no/such/file.json");
    assert!(std::error::Error::source(&missing).is_some());
    let config = SchedulerConfig::Ddim(CommonConfig::default());
    let unwritable = config.write("no/such/folder/file.json").expect_err("no such folder");
    assert!(unwritable.to_string().starts_with("could not write no/such/folder"));
}

#[test]
fn settings_that_diffusers_lacks_are_refused() {
    let (vp, none) = (NoiseScheduleConfig::default(), Thresholding::None);
    let say = |schedule: &NoiseScheduleConfig, output, thresholding: &Thresholding| {
        CommonConfig::new(schedule, output, thresholding).expect_err("no words").to_string()
    };
    let flow = NoiseScheduleConfig::Flow(FlowConfig::default());
    assert!(say(&flow, PredictionType::Sample, &none).contains("schedule.family"));
    assert!(say(&vp, PredictionType::Flow, &none).contains("prediction_type"));
    for thresholding in [
        Thresholding::Reflect(DataRange::default()),
        Thresholding::Clamp(DataRange::scalar(-1.0, 2.0)),
        Thresholding::Clamp(DataRange::per_channel(vec![-1.0], vec![1.0])),
    ] {
        assert!(say(&vp, PredictionType::Epsilon, &thresholding).contains("thresholding"));
    }
}

/// As the published folders of Stable Diffusion 1.5 and XL have them.
const PNDM: &str = r#"{
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
    "clip_sample": false
}"#;
const EULER: &str = r#"{
    "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "interpolation_type": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1,
    "use_karras_sigmas": false
}"#;

#[test]
fn solvers_that_are_not_here_leave_their_schedule_to_ddim() {
    for (text, class, end) in [
        (PNDM, "PNDMScheduler", FinalAlphaCumprod::First),
        (EULER, "EulerDiscreteScheduler", FinalAlphaCumprod::One),
    ] {
        let (config, solver) = SchedulerConfig::from_json_any(text).expect("a known solver");
        assert_eq!((config.class(), solver.as_deref()), ("DDIMScheduler", Some(class)));
        let expected = VpConfig { final_alpha_cumprod: end, ..VpConfig::default() };
        let expected = NoiseScheduleConfig::Vp(expected);
        assert_eq!(*config.schedule().expect("valid").config(), expected);
        assert_eq!(config.thresholding(), Thresholding::None);
        assert_eq!(config.common().steps_offset, 1);
    }
    let (config, solver) =
        SchedulerConfig::from_json_any(r#"{"_class_name": "DDIMScheduler"}"#).expect("its own");
    assert_eq!((solver, config.thresholding()), (None, Thresholding::clamp_pixels()));
    let flow = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#;
    let refused = SchedulerConfig::from_json_any(flow).expect_err("another family").to_string();
    assert!(refused.contains("FlowMatchEulerDiscreteScheduler"), "{refused}");
    let unknown = r#"{"_class_name": "DDIMScheduler", "use_karras_sigmas": true}"#;
    assert!(SchedulerConfig::from_json_any(unknown).is_err());
}

/// Signatures of the classes in diffusers 0.42.1.
#[test]
fn absent_keys_have_the_defaults_of_the_file_s_own_class() {
    let read = |class: &str, keys: &str| {
        let text = format!(r#"{{"_class_name": "{class}"{keys}}}"#);
        SchedulerFile::parse(&text).expect("an object").config().expect("valid").common().clone()
    };
    for (class, betas, clip_sample, to_one, spacing) in [
        ("DDIMScheduler", [1e-4, 0.02], true, true, TimestepSpacing::Leading),
        ("LCMScheduler", [0.000_85, 0.012], false, true, TimestepSpacing::Leading),
        ("DDPMScheduler", [1e-4, 0.02], true, true, TimestepSpacing::Leading),
        ("PNDMScheduler", [1e-4, 0.02], false, false, TimestepSpacing::Leading),
        ("EulerDiscreteScheduler", [1e-4, 0.02], false, true, TimestepSpacing::Linspace),
        ("UniPCMultistepScheduler", [1e-4, 0.02], false, true, TimestepSpacing::Linspace),
        ("HeunDiscreteScheduler", [0.000_85, 0.012], false, true, TimestepSpacing::Linspace),
        ("KDPM2DiscreteScheduler", [0.000_85, 0.012], false, true, TimestepSpacing::Linspace),
        ("DPMSolverSDEScheduler", [0.000_85, 0.012], false, true, TimestepSpacing::Linspace),
    ] {
        let common = read(class, "");
        let found = [common.beta_start, common.beta_end];
        assert_close(&found, &betas, 0.0);
        let flags = (common.clip_sample, common.set_alpha_to_one, common.timestep_spacing);
        assert_eq!(flags, (clip_sample, to_one, spacing), "{class}");
        let given =
            read(class, r#", "beta_end": 0.5, "clip_sample": true, "set_alpha_to_one": true"#);
        assert!(given.clip_sample && given.set_alpha_to_one && given.beta_end > 0.4, "{class}");
    }
}

#[test]
fn keys_of_other_classes_are_passed_over_as_in_diffusers() {
    let unknown = |text: &str| {
        let file = SchedulerFile::parse(text).expect("an object");
        file.config().expect("readable");
        file.unknown_keys().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let ddim =
        r#"{"_class_name": "DDIMScheduler", "skip_prk_steps": true, "use_karras_sigmas": false}"#;
    assert_eq!(unknown(ddim), ["skip_prk_steps", "use_karras_sigmas"]);
    assert_eq!(
        unknown(r#"{"_class_name": "LCMScheduler", "interpolation_type": "linear"}"#),
        ["interpolation_type"]
    );
    // What diffusers writes for a scheduler that was made from another's settings.
    let euler = r#"{"_class_name": "EulerDiscreteScheduler", "skip_prk_steps": true, "clip_sample": false, "mine": 1}"#;
    assert_eq!(unknown(euler), ["mine"]);
    let path = recorded("dpm_solver_scheduler_config.json");
    let file = SchedulerFile::from_file(&path).expect("a file of diffusers");
    assert_eq!(file.replaced_solver(), Some("DPMSolverMultistepScheduler"));
    assert!(file.solver().expect("supported").is_some() && file.unknown_keys().is_empty());
    let mut file = file;
    file.settings_mut().object_mut().insert("beta_start".to_owned(), "small".into());
    let refused = file.config().expect_err("no number");
    assert!(refused.to_string().contains("dpm_solver_scheduler_config.json"), "{refused}");
}
