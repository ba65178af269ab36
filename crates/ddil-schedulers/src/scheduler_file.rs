//! Scheduler files of any class, read as leniently as diffusers reads them.

use std::path::{Path, PathBuf};

use ddil_files::JsonSettings;

use crate::config_file::{CommonConfig, LcmConfig, SOLVERS, SchedulerConfig, parse, read};
use crate::error::{Error, Result};
use crate::solver_config::SolverConfig;
use crate::timesteps::TimestepSpacing;

const LCM: &str = "LCMScheduler";

/// A `scheduler_config.json` as a program published it: settings of any class, with keys of other classes.
///
/// diffusers passes over keys that a class does not have. So does this type, and [`unknown_keys`](Self::unknown_keys)
/// lists them; [`SchedulerConfig::from_json`] refuses them. Absent keys have the defaults of the file's own class.
///
/// # Example
///
/// ```
/// use ddil_schedulers::SchedulerFile;
///
/// let file = SchedulerFile::parse(r#"{"_class_name": "PNDMScheduler", "skip_prk_steps": true, "shift": 3}"#)?;
/// assert_eq!(file.replaced_solver(), Some("PNDMScheduler"));
/// assert!(!file.config()?.common().set_alpha_to_one, "the default of its class");
/// assert_eq!(file.unknown_keys(), ["shift"]);
/// # Ok::<(), ddil_schedulers::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerFile {
    settings: JsonSettings,
    /// For errors.
    path: Option<PathBuf>,
}

impl SchedulerFile {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be read, is not a regular file or is larger than 16 MiB;
    /// [`Error::File`] if it is not a JSON object.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self { settings: read(path, parse)?, path: Some(path.to_owned()) })
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// [`Error::Parse`] if it is not a JSON object.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(Self { settings: parse(text)?, path: None })
    }

    /// All keys with their values.
    pub fn settings(&self) -> &JsonSettings {
        &self.settings
    }

    /// All keys with their values, to be changed.
    pub fn settings_mut(&mut self) -> &mut JsonSettings {
        &mut self.settings
    }

    /// The settings, with DDIM in place of another solver.
    ///
    /// None of the solvers clips clean data unless the file sets it, except `DDPMScheduler`, whose default it is.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an unsupported class or an invalid value; of a file within [`Error::File`].
    pub fn config(&self) -> Result<SchedulerConfig> {
        let read = || {
            let config = match self.replaced_solver() {
                Some(solver) => SchedulerConfig::Ddim(self.settings.over(&defaults_of(solver))?),
                None => match self.settings.class(&["DDIMScheduler", LCM])? {
                    LCM => SchedulerConfig::Lcm(self.settings.over(&LcmConfig::default())?),
                    _ => SchedulerConfig::Ddim(self.settings.over(&CommonConfig::default())?),
                },
            };
            config.ensure().map(|()| config)
        };
        self.named(read())
    }

    /// The class, if it is that of a solver that [`config`](Self::config) replaces by DDIM.
    pub fn replaced_solver(&self) -> Option<&'static str> {
        self.settings.class(&SOLVERS).ok()
    }

    /// The solver of the file; `None` for a class that is not one of [`SolverConfig`]'s.
    ///
    /// # Errors
    ///
    /// As [`SolverConfig::from_json`].
    pub fn solver(&self) -> Result<Option<SolverConfig>> {
        self.named(SolverConfig::of_settings(&self.settings))
    }

    /// A result with the name of the file in its error.
    fn named<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| match &self.path {
            Some(path) => Error::File { path: path.clone(), source: Box::new(error) },
            None => error,
        })
    }

    /// The keys that have no effect: those that the class does not have. Keys of diffusers' solvers are none of them in a
    /// solver's file.
    pub fn unknown_keys(&self) -> Vec<&str> {
        let unknown = match self.settings.class(&[LCM]) {
            Ok(_) => self.settings.unknown(&LcmConfig::default()),
            Err(_) => self.settings.unknown(&CommonConfig::default()),
        };
        let of_solver = |key: &&str| self.replaced_solver().is_some() && SOLVER_KEYS.contains(key);
        unknown.into_iter().filter(|key| !of_solver(key)).collect()
    }
}

/// How files are read.
impl SchedulerConfig {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be read, is not a regular file or is larger than 16 MiB; [`Error::File`] with an
    /// error of [`from_json`](Self::from_json).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        read(path.as_ref(), Self::from_json)
    }

    /// Reads the file of any scheduler of a variance-preserving model, as diffusers' `DDIMScheduler.from_config` does:
    /// any other solver is replaced by DDIM on the same noise schedule, and its class is returned.
    ///
    /// Keys specific to that class are ignored: they only affect its steps. Absent keys have the defaults of that class.
    /// [`SolverConfig::from_file`](crate::SolverConfig::from_file) reads the solver itself.
    ///
    /// # Errors
    ///
    /// As [`from_file`](Self::from_file), with an error of [`from_json_any`](Self::from_json_any).
    pub fn from_file_any(path: impl AsRef<Path>) -> Result<(Self, Option<String>)> {
        read(path.as_ref(), Self::from_json_any)
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    ///
    /// As [`from_json`](Self::from_json); [`Error::Invalid`] for an unsupported class.
    pub fn from_json_any(text: &str) -> Result<(Self, Option<String>)> {
        let file = SchedulerFile::parse(text)?;
        match file.replaced_solver() {
            Some(solver) => Ok((file.config()?, Some(solver.to_owned()))),
            None => Ok((Self::from_json(text)?, None)),
        }
    }

    /// Reads a file, ignores keys that its class does not have, and returns them.
    ///
    /// # Errors
    ///
    /// As [`from_file`](Self::from_file), except for unknown keys.
    pub fn from_file_lenient(path: impl AsRef<Path>) -> Result<(Self, Vec<String>)> {
        read(path.as_ref(), Self::from_json_lenient)
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// [`Error::Parse`] if it is not a JSON object, [`Error::UnknownKeys`] with all keys that its class does not have,
    /// [`Error::Invalid`] for another class or an invalid value.
    pub fn from_json(text: &str) -> Result<Self> {
        let (config, unknown) = Self::from_json_lenient(text)?;
        if unknown.is_empty() {
            return Ok(config);
        }
        let known = config.keys().with_class(config.class());
        let known = known.object().keys().cloned().collect();
        Err(Error::UnknownKeys { class: config.class(), unknown, known })
    }

    /// Reads the text of a file, ignores keys that its class does not have, and returns them.
    ///
    /// # Errors
    ///
    /// As [`from_json`](Self::from_json), except for unknown keys.
    pub fn from_json_lenient(text: &str) -> Result<(Self, Vec<String>)> {
        let file = SchedulerFile::parse(text)?;
        file.settings().class(&["DDIMScheduler", LCM])?;
        let unknown = file.unknown_keys().into_iter().map(str::to_owned).collect();
        Ok((file.config()?, unknown))
    }
}

/// The defaults in diffusers 0.42 of a solver that DDIM replaces.
fn defaults_of(solver: &str) -> CommonConfig {
    let mut config = CommonConfig { clip_sample: false, ..CommonConfig::default() };
    match solver {
        "DDPMScheduler" => config.clip_sample = true,
        "PNDMScheduler" => config.set_alpha_to_one = false,
        "DPMSolverSDEScheduler"
        | "HeunDiscreteScheduler"
        | "KDPM2AncestralDiscreteScheduler"
        | "KDPM2DiscreteScheduler" => {
            (config.beta_start, config.beta_end) = (0.000_85, 0.012);
        }
        _ => {}
    }
    if !["DDPMScheduler", "PNDMScheduler"].contains(&solver) {
        config.timestep_spacing = TimestepSpacing::Linspace;
    }
    config
}

/// The keys that solvers of diffusers 0.42 have in addition to DDIM's.
const SOLVER_KEYS: [&str; 28] = [
    "algorithm_type",
    "disable_corrector",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "noise_sampler_seed",
    "predict_x0",
    "shift_terminal",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "time_shift_type",
    "timestep_type",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
    // Of LCM, as diffusers keeps them when one scheduler is made from another's settings.
    "original_inference_steps",
    "timestep_scaling",
];
