//! Solvers in `scheduler_config.json` as diffusers writes it.

use std::path::Path;

use ddil_files::{Invalid, JsonSettings};
use serde_json::Value;

use crate::config_file::{parse, read};
use crate::dpm_solver::DpmSolverConfig;
use crate::error::{Error, Result};
use crate::solver_config::{LevelsConfig, SolverConfig, SolverMethod};
use crate::uni_pc::UniPcConfig;

const EULER: &str = "EulerDiscreteScheduler";
const DPM_SOLVER: &str = "DPMSolverMultistepScheduler";
const UNI_PC: &str = "UniPCMultistepScheduler";

/// Settings with a single supported value; that of an absent or empty key.
const FIXED: [(&str, &[(&str, &str)]); 3] = [
    (EULER, &[("interpolation_type", "linear"), ("timestep_type", "discrete")]),
    (DPM_SOLVER, &[("algorithm_type", "dpmsolver++")]),
    (UNI_PC, &[]),
];

/// Settings that must not be set.
const UNSET: [(&str, &[&str]); 3] = [
    (EULER, &["sigma_min", "sigma_max"]),
    (DPM_SOLVER, &["variance_type"]),
    (UNI_PC, &["solver_p", "sigma_min", "sigma_max", "shift_terminal"]),
];

/// Settings of noise levels that are not supported.
const OTHER_LEVELS: [&str; 5] = [
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
];

impl SolverConfig {
    /// Reads the solver in a `scheduler_config.json`; `None` for a class that is not one of the three.
    ///
    /// Schedule, prediction type and thresholding are read by
    /// [`SchedulerConfig::from_file_any`](crate::SchedulerConfig::from_file_any).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read, is not a regular file or is larger than 16 MiB; [`Error::File`] with an
    /// error of [`from_json`](Self::from_json).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Option<Self>> {
        read(path.as_ref(), Self::from_json)
    }

    /// Reads the text of such a file. Settings missing from it have the defaults of its class in diffusers; keys of
    /// other classes are ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Parse`] if it is not a JSON object; [`Error::Invalid`] for an invalid value and for a setting that is not
    /// supported, such as another `algorithm_type`.
    pub fn from_json(text: &str) -> Result<Option<Self>> {
        Self::of_settings(&parse(text)?)
    }

    /// As [`from_json`](Self::from_json), of the keys of a file.
    pub(crate) fn of_settings(file: &JsonSettings) -> Result<Option<Self>> {
        let mut file = file.clone();
        let Ok(class) = file.class(&[EULER, DPM_SOLVER, UNI_PC]) else { return Ok(None) };
        // An empty key is one that is not set, and this value is the default of Python.
        let is_unset = |key: &str, value: &Value| {
            value.is_null() || (key == "lambda_min_clipped" && value == "-Infinity")
        };
        file.object_mut().retain(|key, value| !is_unset(key, value));
        ensure_supported(&file, class)?;
        let method = match class {
            DPM_SOLVER => SolverMethod::DpmSolver(file.over(&DpmSolverConfig::default())?),
            UNI_PC => SolverMethod::UniPc(file.over(&UniPcConfig::default())?),
            _ => SolverMethod::Euler,
        };
        let config = Self { method, levels: file.over(&LevelsConfig::default())? };
        config.build()?;
        Ok(Some(config))
    }
}

/// Checks the settings that this crate does not have.
fn ensure_supported(file: &JsonSettings, class: &str) -> Result<()> {
    let keys = file.object();
    let refuse = |key: &str, value: &Value, expected: &str| {
        Err(Error::Invalid(Invalid::new(key, value, expected)))
    };
    let of_class = |(name, _): &(&str, _)| *name == class;
    for (key, supported) in FIXED.into_iter().filter(of_class).flat_map(|(_, fixed)| fixed) {
        match keys.get(*key) {
            Some(value) if value != supported => return refuse(key, value, supported),
            _ => {}
        }
    }
    let unset = UNSET.iter().filter(|(name, _)| *name == class).flat_map(|(_, unset)| *unset);
    for key in unset {
        if let Some(value) = keys.get(*key) {
            return refuse(key, value, "null");
        }
    }
    for key in OTHER_LEVELS {
        match keys.get(key) {
            None | Some(Value::Bool(false)) => {}
            Some(value) => return refuse(key, value, "false; `use_karras_sigmas` is supported"),
        }
    }
    match keys.get("predict_x0") {
        Some(value) if class == UNI_PC && *value != true => refuse("predict_x0", value, "true"),
        _ => Ok(()),
    }
}
