//! The file that defines a comparison: a base config, axes of changes to it, and seeds.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ddil_data::Captions;
use ddil_evaluate::MIN_SAMPLES;
use ddil_files::settings::{Settings, to_toml};
use ddil_files::{hex, with_causes};
use ddil_losses::TeacherGuidance;
use ddil_pipelines::{Pipeline, PromptRequest, SamplePlan};
use ddil_trainer::config::{DataKind, DataSection, DistillConfig};
use serde::{Deserialize, Serialize, Serializer};
use sha2::{Digest, Sha256};
use toml::Value;

use crate::error::{Error, Result};

/// The settings of `ddil compare`.
///
/// Paths in it, and in the base, are relative to the directory in which the program is started.
///
/// # Example
///
/// ```
/// use ddil::compare::Matrix;
/// use ddil_files::settings::Settings;
///
/// let matrix = r#"
///     name = "priors"
///     base = "student.toml"
///     seeds = [0, 1]
///
///     [[axes]]
///     name = "states"
///     baseline = "forward"
///     values = [
///         { name = "forward", set = { "mixing.priors" = { kind = "constant", priors = { forward = 1.0 } } } },
///         { name = "mixed" },
///     ]
/// "#;
/// let matrix = Matrix::from_settings(&Settings::parse("matrix.toml", matrix)?)?;
/// let base = Settings::parse("student.toml", "teacher = { path = \"teacher\" }")?;
/// let names: Vec<String> = matrix.cells(&base)?.into_iter().map(|cell| cell.name).collect();
/// assert_eq!(names, ["forward_seed0", "forward_seed1", "mixed_seed0", "mixed_seed1"]);
/// # Ok::<(), ddil::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// The comparison's folder is `<folder>/<name>`.
    pub name: String,
    /// The parent of that folder; default `runs`.
    #[serde(default = "runs")]
    pub folder: PathBuf,
    /// A preset or a file of `ddil distill`.
    pub base: String,
    /// Changes to the base in every cell, as `"key.of.the.config" = value`.
    #[serde(default)]
    pub set: Changes,
    /// One cell each; default `[0]`.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// Cells that run at the same time; default 2.
    #[serde(default = "two")]
    pub workers: u32,
    /// Threads of each cell; default 1.
    #[serde(default = "one")]
    pub threads: u32,
    /// The varied settings. Cells are all combinations of the axes' values with the seeds.
    #[serde(default)]
    pub axes: Vec<Axis>,
    /// Combinations to leave out: those with all of these values, as `{ axis = "value", .. }`.
    #[serde(default)]
    pub(crate) exclude: Vec<BTreeMap<String, String>>,
    /// Changes for some combinations only, applied after everything else: for values whose meaning depends on another
    /// axis. Default none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) exceptions: Vec<Exception>,
    /// How each cell is measured.
    #[serde(default)]
    pub evaluate: EvaluateConfig,
}

/// Values for keys of a config, such as `"mixing.priors"`.
pub type Changes = BTreeMap<String, Value>;

/// A varied setting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Axis {
    /// Its name.
    pub name: String,
    /// The value that the others are compared with, pair by pair; default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
    /// Its values, at least one.
    pub values: Vec<AxisValue>,
}

/// One value of an axis.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AxisValue {
    /// Its name, which becomes part of the names of its cells.
    pub name: String,
    /// Changes to the config, as `"key.of.the.config" = value`; default none.
    #[serde(default)]
    pub set: Changes,
}

/// Changes for a combination of values of several axes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    /// The combinations: those with all of these values, as `{ axis = "value", .. }`.
    pub(crate) at: BTreeMap<String, String>,
    /// Changes to the config, as `"key.of.the.config" = value`.
    pub set: Changes,
}

/// How cells are measured. Every cell and the teacher use the same noise and the same classes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateConfig {
    /// Samples per row; default 10000.
    pub samples: u32,
    /// Numbers of steps at which each student is sampled, in addition to its own; default none.
    pub steps: Vec<u32>,
    /// Samples at numbers of steps other than the student's own; default the same number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) samples_off_steps: Option<u32>,
    /// States on each side of the shift at each timestep; 0 turns the measurement off. Default 1000.
    pub(crate) shift_samples: u32,
    /// Steps for the teacher's own samples; default 50.
    pub teacher_steps: u32,
    /// Samples per network call; default 100, and 1 with `prompts`.
    #[serde(serialize_with = "or_default")]
    pub(crate) batch_size: Option<u32>,
    /// Seed of the noise; default 0.
    pub seed: u64,
    /// The features to compare: `fashion_classifier` (the default), `raw_pixels`, or a TorchScript file.
    pub(crate) extractor: String,
    /// How images are converted for a TorchScript file, as for `ddil evaluate --extractor-input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) extractor_input: Option<String>,
    /// Whether `true` is passed to a TorchScript file as a second argument.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) return_features: bool,
    /// The images to compare with, as for `ddil evaluate --reference`: a folder of images, `fashion_mnist`, or a file of
    /// statistics. The default is the data's held-out images, or its training images if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reference: Option<PathBuf>,
    /// For text-to-image models: a file of prompts, as for `ddil evaluate --prompts`, in place of `samples`. Each student
    /// and the teacher draw `images_per_prompt` images of each; the shift and the distance to the teacher are not
    /// measured, and features only with `reference` or another extractor than the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompts: Option<PathBuf>,
    /// Which captions of an image are prompts: `first` (the default) or `all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) captions: Option<Captions>,
    /// Use only this many prompts, the first ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_prompts: Option<u32>,
    /// Images of each prompt; default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) images_per_prompt: Option<u32>,
    /// Text before each prompt when its images are drawn, as for `ddil evaluate --prompt-prefix`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_prefix: Option<String>,
    /// Text after each prompt when its images are drawn, as for `ddil evaluate --prompt-suffix`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_suffix: Option<String>,
    /// The prompt to guide away from, as for `ddil evaluate --negative-prompt`, for the teacher's rows with guidance.
    /// Students are sampled without guidance, and have learned that of the teacher's empty prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) negative_prompt: Option<String>,
    /// CLIP, as for `ddil evaluate --clip`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) clip: Option<PathBuf>,
    /// LPIPS, as for `ddil evaluate --lpips`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lpips: Option<PathBuf>,
}

/// The default of `batch_size`.
const BATCH_SIZE: u32 = 100;
/// The default of `extractor`.
const EXTRACTOR: &str = "fashion_classifier";

#[expect(
    clippy::ref_option,
    clippy::trivially_copy_pass_by_ref,
    reason = "the form that serde calls"
)]
fn or_default<S: Serializer>(
    batch_size: &Option<u32>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_u32(batch_size.unwrap_or(BATCH_SIZE))
}

/// One distillation of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Its name, made of its values and its seed; also the name of its run.
    pub name: String,
    /// The name without the seed.
    pub arm: String,
    /// Its value on each axis, in the order of the axes.
    pub values: Vec<String>,
    /// Its seed.
    pub seed: u64,
    /// Its whole config.
    pub config: DistillConfig,
}

/// The maximum number of cells of a comparison.
const MAX_CELLS: usize = 10_000;

/// The settings that a comparison sets itself.
const RESERVED: [(&str, &str); 4] = [
    ("run.name", "the name of the cell"),
    ("run.folder", "`folder` and `name`"),
    ("run.seed", "`seeds`"),
    ("run.threads", "`threads`"),
];

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            samples: 10_000,
            steps: Vec::new(),
            samples_off_steps: None,
            shift_samples: 1000,
            teacher_steps: 50,
            batch_size: None,
            seed: 0,
            extractor: EXTRACTOR.to_owned(),
            extractor_input: None,
            return_features: false,
            reference: None,
            prompts: None,
            captions: None,
            max_prompts: None,
            images_per_prompt: None,
            prompt_prefix: None,
            prompt_suffix: None,
            negative_prompt: None,
            clip: None,
            lpips: None,
        }
    }
}

impl EvaluateConfig {
    /// The number of samples at a number of steps.
    pub fn samples_at(&self, own_steps: bool) -> u32 {
        if own_steps { self.samples } else { self.samples_off_steps.unwrap_or(self.samples) }
    }

    /// The numbers of steps at which a student is measured: its own and the others, each once, in order.
    pub fn step_counts(&self, own: u32) -> BTreeSet<u32> {
        self.steps.iter().copied().chain([own]).collect()
    }

    /// Options of `ddil evaluate` for all measurements.
    pub(super) fn common_options(&self) -> Vec<OsString> {
        let mut options: Vec<OsString> = vec![format!("--seed={}", self.seed).into()];
        match &self.prompts {
            Some(prompts) => options.extend(self.prompt_options(prompts)),
            None => options.push(format!("--num-samples={}", self.samples).into()),
        }
        if let Some(size) = self.batch_size() {
            options.push(format!("--batch-size={size}").into());
        }
        if self.compares_features() {
            options.push(format!("--extractor={}", self.extractor).into());
        }
        if let Some(input) = &self.extractor_input {
            options.push(format!("--extractor-input={input}").into());
        }
        if self.return_features {
            options.push("--return-features".into());
        }
        if let Some(reference) = &self.reference {
            options.extend(["--reference".into(), reference.into()]);
        }
        options
    }

    /// Samples per network call; none for the model's own number.
    pub(super) fn batch_size(&self) -> Option<u32> {
        self.batch_size.or(self.prompts.is_none().then_some(BATCH_SIZE))
    }

    /// Whether features are compared: always, unless images of prompts are measured with CLIP or LPIPS alone.
    fn compares_features(&self) -> bool {
        self.prompts.is_none() || self.reference.is_some() || self.extractor != EXTRACTOR
    }

    /// Options for images of prompts.
    fn prompt_options(&self, prompts: &Path) -> Vec<OsString> {
        let mut options: Vec<OsString> = vec!["--prompts".into(), prompts.into()];
        match self.captions {
            Some(Captions::All) => options.push("--captions=all".into()),
            Some(Captions::First) | None => options.push("--captions=first".into()),
        }
        let numbers =
            [("max-prompts", self.max_prompts), ("images-per-prompt", self.images_per_prompt)];
        options.extend(numbers.iter().filter_map(|(name, number)| {
            number.map(|number| OsString::from(format!("--{name}={number}")))
        }));
        let texts =
            [("prompt-prefix", &self.prompt_prefix), ("prompt-suffix", &self.prompt_suffix)];
        for (name, text) in texts {
            options.extend(text.iter().map(|text| format!("--{name}={text}").into()));
        }
        for (name, path) in [("--clip", &self.clip), ("--lpips", &self.lpips)] {
            options.extend(path.iter().flat_map(|path| [name.into(), path.into()]));
        }
        options
    }

    /// The option of the negative prompt for a teacher, if it takes one at this guidance scale.
    pub(super) fn negative_prompt_option(
        &self,
        teacher: &Pipeline,
        guidance_scale: f64,
    ) -> Option<OsString> {
        let negative = self.negative_prompt.as_ref()?;
        let request = PromptRequest {
            prompts: vec![String::new()],
            negative_prompt: Some(negative.clone()),
            size: [None; 2],
            per_prompt: 1,
        };
        let plan = SamplePlan { guidance_scale, ..SamplePlan::of(teacher, None) };
        let is_taken = request.ensure(teacher, &plan).is_ok();
        is_taken.then(|| format!("--negative-prompt={negative}").into())
    }

    /// Additional options for students.
    pub(super) fn student_options(&self) -> Vec<OsString> {
        let mut options = Vec::new();
        if self.prompts.is_none() {
            options.push(format!("--shift-samples={}", self.shift_samples).into());
        }
        if !self.steps.is_empty() {
            let steps: Vec<String> = self.steps.iter().map(u32::to_string).collect();
            options.push(format!("--also-steps={}", steps.join(",")).into());
            if self.prompts.is_none() {
                options.push(format!("--also-samples={}", self.samples_at(false)).into());
            }
        }
        options
    }

    fn problems(&self, problems: &mut Vec<String>) {
        let mut at_least = |name: &str, value: u32, least: u32| {
            if value < least {
                problems
                    .push(format!("`evaluate.{name}` is {value}, but must be at least {least}"));
            }
        };
        at_least("samples", self.samples, MIN_SAMPLES);
        at_least("samples_off_steps", self.samples_at(false), MIN_SAMPLES);
        at_least("teacher_steps", self.teacher_steps, 1);
        at_least("batch_size", self.batch_size.unwrap_or(BATCH_SIZE), 1);
        at_least("images_per_prompt", self.images_per_prompt.unwrap_or(1), 1);
        at_least("max_prompts", self.max_prompts.unwrap_or(1), 1);
        if self.shift_samples > 0 {
            at_least("shift_samples", self.shift_samples, 2);
        }
        for steps in &self.steps {
            at_least("steps", *steps, 1);
        }
        let names = ["fashion_classifier", "raw_pixels"];
        let file = Path::new(&self.extractor);
        if !names.contains(&self.extractor.as_str()) && !file.exists() {
            problems.push(format!(
                "`evaluate.extractor` is `{}`, but must be `fashion_classifier`, `raw_pixels`, or a TorchScript file or a \
                 folder of CLIP or DINOv2 that exists",
                self.extractor
            ));
        }
        self.problems_of_prompts(problems);
        if self.samples_at(false) > self.samples {
            problems.push(format!(
                "`evaluate.samples_off_steps` is {}, but must be at most `evaluate.samples`, which is {}",
                self.samples_at(false),
                self.samples
            ));
        }
    }
}

impl EvaluateConfig {
    fn problems_of_prompts(&self, problems: &mut Vec<String>) {
        let paths = [("prompts", &self.prompts), ("clip", &self.clip), ("lpips", &self.lpips)];
        for (name, path) in paths {
            if let Some(path) = path.as_ref().filter(|path| !path.exists()) {
                problems
                    .push(format!("`evaluate.{name}` is {}, which does not exist", path.display()));
            }
        }
        if self.prompts.is_some() {
            // LPIPS, and features without a reference, measure how images of one prompt differ.
            let has_several = self.images_per_prompt.is_some_and(|images| images > 1);
            let compares = self.reference.is_some() && self.compares_features();
            let of_several = self.lpips.is_some() || self.compares_features();
            if self.clip.is_none() && !compares && !(of_several && has_several) {
                problems.push(
                    "`evaluate.prompts` is set and nothing to measure: set `clip`, `reference` with an `extractor`, or \
                     `lpips` or an `extractor` with `images_per_prompt` of 2 or more"
                        .to_owned(),
                );
            }
            return;
        }
        let others = [
            ("captions", self.captions.is_some()),
            ("max_prompts", self.max_prompts.is_some()),
            ("images_per_prompt", self.images_per_prompt.is_some()),
            ("prompt_prefix", self.prompt_prefix.is_some()),
            ("prompt_suffix", self.prompt_suffix.is_some()),
            ("negative_prompt", self.negative_prompt.is_some()),
            ("clip", self.clip.is_some()),
            ("lpips", self.lpips.is_some()),
        ];
        for (name, _) in others.iter().filter(|(_, is_set)| *is_set) {
            problems.push(format!("`evaluate.{name}` is set, but requires `evaluate.prompts`"));
        }
    }
}

impl Matrix {
    /// Reads a file and checks it as far as possible without the base.
    ///
    /// # Errors
    ///
    /// Those of [`Settings::from_file`] and [`Settings::build`], with the place; [`Error::Comparison`] with all other
    /// problems.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_settings(&Settings::from_file(path)?)
    }

    /// As [`from_file`](Self::from_file), from settings that are already in memory.
    ///
    /// # Errors
    ///
    /// As [`from_file`](Self::from_file).
    pub fn from_settings(settings: &Settings) -> Result<Self> {
        settings.build::<Self>()?.checked()
    }

    /// The matrix, if it has no problems.
    ///
    /// # Errors
    ///
    /// [`Error::Comparison`] with all problems that do not depend on the base.
    pub(crate) fn checked(self) -> Result<Self> {
        let mut problems = Vec::new();
        self.problems(&mut problems);
        self.ensure_no_problems(problems).map(|()| self)
    }

    /// The comparison's folder.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Every cell with its checked config, seeds innermost.
    ///
    /// # Errors
    ///
    /// [`Error::Comparison`] with every invalid cell and the reason: unknown keys, invalid values, two cells with
    /// the same config.
    pub fn cells(&self, base: &Settings) -> Result<Vec<Cell>> {
        let mut problems = Problems::default();
        let mut cells = Vec::new();
        for values in self.combinations() {
            for seed in &self.seeds {
                match self.cell(base, &values, *seed) {
                    Ok(cell) => cells.push(cell),
                    Err(error) => problems.add(cell_name(&arm_name(&values), *seed), &error),
                }
            }
        }
        let mut problems = problems.into_lines();
        if problems.is_empty() {
            self.problems_of_cells(&cells, &mut problems);
        }
        self.ensure_no_problems(problems).map(|()| cells)
    }

    /// The base with the changes common to all cells.
    ///
    /// # Errors
    ///
    /// Those of [`Settings::set`].
    pub(crate) fn with_changes(&self, base: &Settings) -> Result<Settings> {
        let mut settings = base.clone();
        for (key, value) in &self.set {
            settings.set(&format!("{key}={value}"))?;
        }
        Ok(settings)
    }

    fn ensure_no_problems(&self, problems: Vec<String>) -> Result<()> {
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Comparison { place: format!("`{}`", self.name), problems })
    }

    fn cell(&self, base: &Settings, values: &[&AxisValue], seed: u64) -> Result<Cell> {
        let arm = arm_name(values);
        let name = cell_name(&arm, seed);
        let mut settings = self.with_changes(base)?;
        let exceptions =
            self.exceptions.iter().filter(|exception| self.includes(values, &exception.at));
        let changes = values.iter().map(|value| &value.set);
        for (key, value) in changes.chain(exceptions.map(|exception| &exception.set)).flatten() {
            settings.set(&format!("{key}={value}"))?;
        }
        let mut config: DistillConfig = settings.build()?;
        config.run.name.clone_from(&name);
        config.run.folder = self.path().join("cells");
        config.run.seed = seed;
        config.run.threads = self.threads;
        config.ensure()?;
        let values = values.iter().map(|value| value.name.clone()).collect();
        Ok(Cell { name, arm, values, seed, config })
    }

    /// All combinations of one value per axis that are not excluded; the last axis changes fastest.
    fn combinations(&self) -> Vec<Vec<&AxisValue>> {
        let all = self.axes.iter().fold(vec![Vec::new()], |combinations, axis| {
            let longer = |start: &Vec<_>, value| [start.as_slice(), &[value]].concat();
            let of = |start| axis.values.iter().map(move |value| longer(&start, value));
            combinations.into_iter().flat_map(of).collect()
        });
        all.into_iter().filter(|values| !self.is_excluded(values)).collect()
    }

    fn is_excluded(&self, values: &[&AxisValue]) -> bool {
        self.exclude.iter().any(|combination| self.includes(values, combination))
    }

    /// Whether values include all those of a combination.
    fn includes(&self, values: &[&AxisValue], combination: &BTreeMap<String, String>) -> bool {
        let has = |(axis, value): (&String, &String)| {
            self.axes.iter().zip(values).any(|(a, v)| a.name == *axis && v.name == *value)
        };
        combination.iter().all(has)
    }

    fn problems(&self, problems: &mut Vec<String>) {
        if !is_plain(&self.name) {
            problems.push(format!("`name` is `{}`, but must be {PLAIN}", self.name));
        }
        if self.seeds.is_empty() || first_duplicate(self.seeds.iter()).is_some() {
            problems.push(format!(
                "`seeds` is {:?}, but must be a list of distinct numbers",
                self.seeds
            ));
        }
        for (key, value) in [("workers", self.workers), ("threads", self.threads)] {
            if value == 0 {
                problems.push(format!("`{key}` is 0, but must be at least 1"));
            }
        }
        self.problems_of_axes(problems);
        self.problems_of_changes(problems);
        let exceptions = self.exceptions.iter().map(|exception| &exception.at);
        self.problems_of_combinations("exclude", self.exclude.iter(), problems);
        self.problems_of_combinations("exceptions", exceptions, problems);
        self.evaluate.problems(problems);
        self.problem_of_size(problems);
        if problems.is_empty() && self.combinations().is_empty() {
            problems.push("`exclude` excludes every cell".to_owned());
        }
    }

    /// Every cell's config is built before the first cell starts.
    fn problem_of_size(&self, problems: &mut Vec<String>) {
        let values = self.axes.iter().map(|axis| axis.values.len());
        let cells = values.chain([self.seeds.len()]).fold(1, usize::saturating_mul);
        if cells > MAX_CELLS {
            problems.push(format!(
                "`axes` and `seeds` make {cells} cells, counting excluded ones, but must make at most {MAX_CELLS}"
            ));
        }
    }

    fn problems_of_axes(&self, problems: &mut Vec<String>) {
        if let Some(name) = first_duplicate(self.axes.iter().map(|axis| &axis.name)) {
            problems.push(format!("two axes are named `{name}`"));
        }
        for Axis { name, baseline, values } in &self.axes {
            let names: Vec<&String> = values.iter().map(|value| &value.name).collect();
            if names.is_empty() {
                problems.push(format!("axis `{name}` has no values"));
            }
            if let Some(twice) = first_duplicate(names.iter()) {
                problems.push(format!("axis `{name}` has two values named `{twice}`"));
            }
            for value in names.iter().filter(|value| !is_plain(value)) {
                problems.push(format!(
                    "axis `{name}`: `{value}` is not a valid name, which must be {PLAIN}"
                ));
            }
            if let Some(baseline) = baseline.as_ref().filter(|name| !names.contains(name)) {
                problems.push(format!(
                    "axis `{name}`: the baseline `{baseline}` is not one of its values"
                ));
            }
        }
    }

    fn problems_of_changes(&self, problems: &mut Vec<String>) {
        let of_axes = self.axes.iter().flat_map(|axis| &axis.values).map(|value| &value.set);
        let of_exceptions = self.exceptions.iter().map(|exception| &exception.set);
        let changes = std::iter::once(&self.set).chain(of_axes).chain(of_exceptions);
        for key in changes.flat_map(Changes::keys) {
            let reserved = RESERVED.iter().find(|(name, _)| name == key || key == "run");
            if let Some((name, origin)) = reserved {
                problems.push(format!("`{name}` cannot be set: it is determined by {origin}"));
            }
        }
    }

    fn problems_of_combinations<'a>(
        &self,
        key: &str,
        combinations: impl Iterator<Item = &'a BTreeMap<String, String>>,
        problems: &mut Vec<String>,
    ) {
        for combination in combinations {
            if combination.is_empty() {
                problems.push(format!(
                    "`{key}` has an empty combination, which would match every cell"
                ));
            }
            for (axis, value) in combination {
                let Some(found) = self.axes.iter().find(|found| found.name == *axis) else {
                    problems.push(format!("`{key}`: there is no axis `{axis}`"));
                    continue;
                };
                if found.values.iter().all(|known| known.name != *value) {
                    problems.push(format!("`{key}`: axis `{axis}` has no value `{value}`"));
                }
            }
        }
    }

    fn problems_of_cells(&self, cells: &[Cell], problems: &mut Vec<String>) {
        if let Some(name) = first_duplicate(cells.iter().map(|cell| &cell.name)) {
            problems.push(format!("two cells are named `{name}`"));
        }
        // A comparison of a cell with itself is a mistake: a change without effect.
        let mut seen: BTreeMap<String, &str> = BTreeMap::new();
        for cell in cells.iter().filter(|cell| Some(&cell.seed) == self.seeds.first()) {
            let Ok(text) = without_name(&cell.config) else { continue };
            if let Some(other) = seen.insert(text, &cell.arm) {
                problems.push(format!("`{other}` and `{}` have the same config", cell.arm));
            }
        }
        let is_fashion = |data: &DataSection| data.kind == DataKind::FashionMnist;
        if self.evaluate.extractor == EXTRACTOR
            && self.evaluate.compares_features()
            && let Some(cell) = cells.iter().find(|cell| !is_fashion(&cell.config.data))
        {
            problems.push(format!(
                "`evaluate.extractor` is `fashion_classifier`, which is for Fashion-MNIST, and the data of `{}` are {}; \
                 set a TorchScript file, or `raw_pixels` for tiny images",
                cell.arm,
                cell.config.data.kind.as_str()
            ));
        }
        let is_guided = |cell: &Cell| match cell.config.teacher.guidance {
            TeacherGuidance::Cfg { scale } => scale != 1.0,
            TeacherGuidance::CfgRange { .. } => true,
            TeacherGuidance::Embedded { .. } | TeacherGuidance::BakedIn => false,
        };
        if self.evaluate.negative_prompt.is_some() && !cells.iter().any(is_guided) {
            problems.push(
                "`evaluate.negative_prompt` is set, but has no effect: no teacher makes an unconditional prediction for \
                 guidance"
                    .to_owned(),
            );
        }
        let data = |cell: &Cell| {
            let DataSection { kind, path, resolution, .. } = &cell.config.data;
            (*kind, path.clone(), *resolution)
        };
        if let Some(other) = cells.iter().find(|cell| data(cell) != data(&cells[0])) {
            problems.push(format!(
                "`{}` has other data than `{}`, but all cells must be compared with the same data",
                other.arm, cells[0].arm
            ));
        }
    }
}

impl Cell {
    /// A checksum of its config, which identifies the cell's results.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] for values that TOML cannot represent.
    pub(crate) fn config_sha256(&self) -> Result<String> {
        Ok(sha256(to_toml(&self.config)?.as_bytes()))
    }

    /// The number of steps that its student is made for.
    pub fn own_steps(&self) -> u32 {
        self.config.student.stages.last().copied().unwrap_or(1)
    }
}

/// Groups cells with the same error message.
#[derive(Default)]
pub(super) struct Problems(Vec<(String, Vec<String>)>);

impl Problems {
    pub(super) fn add(&mut self, cell: String, error: &Error) {
        let message = with_causes(error);
        match self.0.iter_mut().find(|(known, _)| *known == message) {
            Some((_, cells)) => cells.push(cell),
            None => self.0.push((message, vec![cell])),
        }
    }

    pub(super) fn into_lines(self) -> Vec<String> {
        let line = |(message, cells): (String, Vec<String>)| match cells.as_slice() {
            [one] => format!("{one}: {message}"),
            [first, rest @ ..] => format!("{first} and {} more: {message}", rest.len()),
            [] => message,
        };
        self.0.into_iter().map(line).collect()
    }
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The config without the fields that differ between two cells of the same settings.
fn without_name(config: &DistillConfig) -> Result<String> {
    let mut config = config.clone();
    config.run.name.clear();
    Ok(to_toml(&config)?)
}

fn arm_name(values: &[&AxisValue]) -> String {
    match values {
        [] => "base".to_owned(),
        values => values.iter().map(|value| value.name.as_str()).collect::<Vec<_>>().join("_"),
    }
}

fn cell_name(arm: &str, seed: u64) -> String {
    format!("{arm}_seed{seed}")
}

const PLAIN: &str = "letters, digits, `-`, `+`, `.` and `_`, not starting with a `.`";

fn is_plain(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-+._".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(is_plain)
}

fn first_duplicate<T: Ord>(items: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = BTreeSet::new();
    for item in items {
        if seen.contains(&item) {
            return Some(item);
        }
        seen.insert(item);
    }
    None
}

fn runs() -> PathBuf {
    "runs".into()
}

fn one_seed() -> Vec<u64> {
    vec![0]
}

fn one() -> u32 {
    1
}

fn two() -> u32 {
    2
}
