//! Runs of Euler, DPM-Solver++ and UniPC against those recorded from diffusers by
//! `tools/record/record_schedulers.py`: timesteps, noise levels, the first state and the state after every step.
//!
//! diffusers computes in `Float`, this test in `Double`. The tolerances are those of `Float`:
//!
//! - Sigmas agree to 1e-5 of their size and 2e-6, the error of `sqrt(1 - alpha_cumprod)` at timestep 0. So do the timesteps
//!   that are interpolated from them, to 2e-3.
//! - States agree to 2e-5 of the largest. `x0` from a noise estimate is divided by `alpha`, 0.068 at the first level of
//!   Stable Diffusion's schedule: 1e-6 of the largest quotient. diffusers' Euler subtracts states of the size of sigma.
//! - diffusers' table of the cosine schedule is 4e-5 off at its noisy end (`noise_schedule.rs`), where sigma changes a
//!   thousandfold within five timesteps, and the smallest sigma 3e-4: 1e-4 for states, 3e-4 for sigmas, 0.05 for
//!   timesteps. With Karras' levels it rounds timesteps down there, whole ones to either side: the network then gets
//!   another timestep, and its output differs by 0.1 %.

use std::collections::BTreeMap;

use ddil_schedulers::{
    CommonConfig, Estimate, NoiseLevels, PredictionType, SchedulerConfig, SolverConfig,
    SolverMethod, SolverRun, TimestepSpacing, UniPcConfig,
};
use safetensors::SafeTensors;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::support::{recorded, values};

const SPACINGS: [TimestepSpacing; 3] =
    [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing];
const STEPS: [u32; 6] = [1, 2, 3, 6, 10, 20];
/// `Float` keeps one part in so many.
const ROUNDING: f64 = 1.2e-7;
const SAMPLE: [f64; 4] = [1.0, -0.5, 0.25, 2.0];

struct Recorded {
    tensors: BTreeMap<String, Vec<f64>>,
    settings: BTreeMap<String, Value>,
}

fn read() -> Recorded {
    let path = recorded("solvers.safetensors");
    let bytes = std::fs::read(&path).expect("the file is checked in");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
    let settings = &header.metadata().as_ref().expect("it has metadata")["settings"];
    let tensors = Tensor::read_safetensors(path).expect("the file is checked in");
    Recorded {
        tensors: tensors.into_iter().map(|(name, tensor)| (name, values(&tensor))).collect(),
        settings: serde_json::from_str(settings).expect("a map of settings"),
    }
}

/// The states of a run, the first one included, with the network of the recording.
fn states(scheduler: &SchedulerConfig, config: &SolverConfig, levels: &NoiseLevels) -> Vec<f64> {
    let schedule = scheduler.schedule().expect("valid");
    let solver = config.build().expect("valid");
    let mut run = SolverRun::new(&*solver, levels);
    let noise = Tensor::from_slice(&SAMPLE).view([1, 1, 2, 2]).to_kind(Kind::Double);
    let mut x = levels.first_state(&noise).expect("numbers");
    let mut states = values(&x);
    while let Some(level) = run.level() {
        let output = 0.5 * &x * (1.0 + level.timestep / 1000.0);
        let estimate = Estimate::at_level(&schedule, scheduler.prediction_type(), output, level)
            .and_then(|raw| raw.thresholded(&scheduler.thresholding(), &x))
            .expect("it has a meaning");
        x = run.step(x, &estimate).expect("it fits");
        states.extend(values(&x));
    }
    states
}

/// The largest difference in units of its tolerance.
fn excess(found: &[f64], recorded: &[f64], tolerance: impl Fn(f64) -> f64) -> f64 {
    if found.len() != recorded.len() {
        return f64::INFINITY;
    }
    let pairs = found.iter().zip(recorded);
    pairs.map(|(a, b)| (a - b).abs() / tolerance(*b)).fold(0.0, f64::max)
}

#[test]
fn runs_are_the_recorded_ones() {
    let Recorded { tensors, settings } = read();
    let (mut compared, mut apart) = (0, Vec::new());
    for (name, keys) in &settings {
        let text = keys.to_string();
        let config = SolverConfig::from_json(&text).expect("valid").expect("one of the three");
        let (scheduler, _) = SchedulerConfig::from_json_any(&text).expect("valid");
        let schedule = scheduler.schedule().expect("valid");
        let is_cosine = text.contains("squaredcos_cap_v2");
        let rounds_down = name == "DPMSolverMultistepScheduler/cosine_v_karras";
        let (of_timestep, rounded) = match (rounds_down, is_cosine) {
            (true, _) => (1.0, 2e-3),
            (_, is_cosine) => (if is_cosine { 5e-2 } else { 2e-3 }, 0.0),
        };
        for n in STEPS {
            let what = format!("{name}/{n}");
            let recorded = |part| tensors.get(&format!("{what}/{part}"));
            let Some(timesteps) = recorded("timesteps") else { continue };
            if n == 1 && timesteps[0] < 1.0 {
                // Euler's linspace of one entry is its start, where there is almost no noise to remove.
                continue;
            }
            let levels = config.levels(&schedule, n).expect("they fit");
            let found: Vec<f64> = levels.as_slice().iter().map(|level| level.timestep).collect();
            let sigmas = (0..=levels.len()).map(|i| levels.scale(i)).map(|s| s.sigma / s.alpha);
            let sigmas: Vec<f64> = sigmas.collect();

            let states_recorded = recorded("states").expect("it was recorded");
            let largest = states_recorded.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
            let is_epsilon = scheduler.prediction_type() == PredictionType::Epsilon;
            let divided = if is_epsilon { 2.0 / levels.scale(0).alpha } else { 0.0 };
            let summed = if config.method == SolverMethod::Euler { 2.0 * sigmas[0] } else { 0.0 };
            let table = if is_cosine { 1e-4 } else { 2e-5 };
            let of_state = |_| table * largest + 1e-6 * divided + ROUNDING * summed + rounded;
            let of_sigma = |sigma: f64| if is_cosine { 3e-4 } else { 1e-5 } * sigma + 2e-6;
            let found_states = states(&scheduler, &config, &levels);
            for (part, excess) in [
                ("timesteps", excess(&found, timesteps, |_| of_timestep)),
                ("sigmas", excess(&sigmas, recorded("sigmas").expect("it was recorded"), of_sigma)),
                ("states", excess(&found_states, states_recorded, of_state)),
            ] {
                compared += 1;
                if excess.is_nan() || excess > 1.0 {
                    apart.push(format!("{what}/{part}: {excess:.2} times the tolerance"));
                }
            }
        }
    }
    assert!(apart.is_empty(), "{} of {compared}: {apart:#?}", apart.len());
    assert!(compared > 900, "{compared}");
}

/// Length, sum and weighted sum of every list up to 500 steps. Entries at one half are rounded to either side in
/// diffusers, which computes them in floating point: those lists have one sum that differs by the number of such entries
/// at most.
#[test]
fn lists_of_timesteps_are_the_recorded_ones() {
    let Recorded { tensors, .. } = read();
    let schedule = crate::support::stable_diffusion();
    for (class, config) in [
        ("EulerDiscreteScheduler", SolverConfig::euler()),
        ("DPMSolverMultistepScheduler", SolverConfig::dpm_solver()),
    ] {
        let recorded = &tensors[&format!("{class}/grids")];
        for (spacing, recorded) in SPACINGS.into_iter().zip(recorded.chunks(3 * 500)) {
            if config.method == SolverMethod::Euler && spacing == TimestepSpacing::Linspace {
                // Fractions, which the recorded runs compare.
                continue;
            }
            let mut differ = 0;
            for (n, sums) in (1_u32..).zip(recorded.chunks(3)) {
                let mut config = config.clone();
                config.levels.timestep_spacing = spacing;
                let levels = config.levels(&schedule, n).expect("they fit");
                let list: Vec<f64> =
                    levels.as_slice().iter().map(|level| level.timestep.trunc()).collect();
                let sum: f64 = list.iter().sum();
                let weighted: f64 = (1..).zip(&list).map(|(i, t)| f64::from(i) * t).sum();
                differ += usize::from([f64::from(n), sum, weighted] != *sums);
                if sums[0] == f64::from(n) && n > 1 {
                    assert!((sum - sums[1]).abs() <= f64::from(n) / 2.0, "{class} {spacing:?} {n}");
                }
            }
            println!("{class} {spacing:?}: {differ} lists differ");
            let most = if spacing == TimestepSpacing::Leading { 0 } else { 60 };
            assert!(differ <= most, "{class} {spacing:?}: {differ}");
        }
    }
}

#[test]
fn files_of_diffusers_are_read() {
    let read = |name: &str| {
        let path = recorded(&format!("{name}_scheduler_config.json"));
        let config = SolverConfig::from_file(&path).expect("a file of diffusers");
        SchedulerConfig::from_file_any(&path).expect("a file of diffusers");
        config
    };
    assert_eq!(read("dpm_solver"), Some(SolverConfig::dpm_solver().with_karras_sigmas()));
    let config =
        UniPcConfig { solver_order: 3, disable_corrector: [0].into(), ..UniPcConfig::default() };
    let uni_pc = SolverConfig { method: SolverMethod::UniPc(config), ..SolverConfig::uni_pc() };
    assert_eq!(read("uni_pc"), Some(uni_pc));
    let leading = CommonConfig {
        timestep_spacing: TimestepSpacing::Leading,
        steps_offset: 1,
        ..CommonConfig::default()
    };
    assert_eq!(read("euler"), Some(SolverConfig::euler().spaced_as(&leading)));
    assert_eq!(read("ddim"), None);
    assert_eq!(read("lcm"), None);
}

#[test]
fn settings_of_files_that_are_not_supported_are_named() {
    const DPM: &str = "DPMSolverMultistepScheduler";
    const UNI: &str = "UniPCMultistepScheduler";
    const EULER: &str = "EulerDiscreteScheduler";
    for (class, setting, expected) in [
        (
            DPM,
            r#""algorithm_type": "sde-dpmsolver++""#,
            r#""sde-dpmsolver++"; expected dpmsolver++"#,
        ),
        (DPM, r#""solver_type": "bh2""#, "expected `midpoint` or `heun`"),
        (DPM, r#""solver_order": 4"#, "is 4; expected 1, 2 or 3"),
        (DPM, r#""solver_order": -1"#, "expected a whole number"),
        (DPM, r#""use_lu_lambdas": true"#, "`use_lu_lambdas` is true; expected false"),
        (DPM, r#""variance_type": "learned""#, "expected null"),
        (DPM, r#""lambda_min_clipped": Infinity"#, "expected a number"),
        (DPM, r#""final_sigmas_type": "one""#, "expected `zero` or `sigma_min`"),
        (DPM, r#""use_karras_sigmas": "yes""#, "expected true or false"),
        (UNI, r#""predict_x0": false"#, "`predict_x0` is false; expected true"),
        (UNI, r#""solver_p": {}"#, "`solver_p` is {}; expected null"),
        (UNI, r#""solver_type": "midpoint""#, "expected `bh1` or `bh2`"),
        (UNI, r#""disable_corrector": [-1]"#, "a whole number, 0 or more"),
        (UNI, r#""use_flow_sigmas": true"#, "`use_flow_sigmas` is true"),
        (EULER, r#""interpolation_type": "log_linear""#, r#""log_linear"; expected linear"#),
        (EULER, r#""timestep_type": "continuous""#, r#""continuous"; expected discrete"#),
        (EULER, r#""sigma_max": 80"#, "`sigma_max` is 80; expected null"),
        (EULER, r#""use_exponential_sigmas": true"#, "`use_exponential_sigmas` is true"),
        (EULER, r#""timestep_spacing": "even""#, "expected `leading`, `linspace` or `trailing`"),
        (EULER, r#""steps_offset": NaN"#, "`steps_offset` is \"NaN\""),
    ] {
        let text = format!(r#"{{"_class_name": "{class}", {setting}}}"#);
        let message = SolverConfig::from_json(&text).expect_err(setting).to_string();
        let key = setting.split('"').nth(1).expect("a key");
        assert!(message.contains(key) && message.contains(expected), "{setting}: {message}");
    }
    let other = r#"{"_class_name": "PNDMScheduler", "skip_prk_steps": true}"#;
    assert_eq!(SolverConfig::from_json(other).expect("another class"), None);
    assert!(SolverConfig::from_json("{").is_err());
    let word = r#"{"_class_name": "EulerDiscreteScheduler", "a": Nan}"#;
    assert!(SolverConfig::from_json(word).is_err());
    // A word in a string stays as it is.
    let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "note": "-Infinity, NaN", "lambda_min_clipped": -Infinity}"#;
    assert_eq!(SolverConfig::from_json(text).expect("valid"), Some(SolverConfig::dpm_solver()));
}

/// As in the `solver` of a sampling plan.
#[test]
fn settings_survive_json() {
    for config in [
        SolverConfig::euler(),
        SolverConfig::dpm_solver().with_karras_sigmas(),
        SolverConfig::uni_pc(),
    ] {
        let text = serde_json::to_string(&config).expect("plain values");
        assert_eq!(serde_json::from_str::<SolverConfig>(&text).expect("as written"), config);
    }
    let short = r#"{"method": {"kind": "dpm_solver", "solver_order": 3}}"#;
    let config: SolverConfig = serde_json::from_str(short).expect("the rest are defaults");
    assert_eq!(config.levels, SolverConfig::euler().levels);
}
