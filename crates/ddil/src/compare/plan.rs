//! The progress of a comparison, and the remaining work.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::settings::{Settings, to_toml};
use ddil_files::{Invalid, hex, write_atomic};
use ddil_trainer::DistillTask;
use ddil_trainer::config::DistillConfig;
use ddil_trainer::run_folder::{RunFolder, State, Status, lock_file};
use sha2::{Digest, Sha256};

use super::folder::ComparisonFolder;
use super::item::{PlannedCell, PlannedTeacher, WorkItem};
use super::matrix::{Matrix, Problems, sha256};
use super::record::{CellRecord, NamedRows, Outcome};
use super::setting::{Setting, TeacherSamples};
use crate::error::{Error, Result};

/// A comparison: its cells, and the teacher samples that they are compared with.
#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    /// The parsed file.
    pub(crate) matrix: Matrix,
    /// The settings common to all its work.
    pub(crate) setting: Setting,
    /// The cells.
    pub(crate) cells: Vec<PlannedCell>,
    /// Rows of teachers.
    pub(crate) teachers: Vec<PlannedTeacher>,
}

/// The progress of a cell.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum CellProgress {
    /// Not started.
    New,
    /// Partly trained: the number of updates saved.
    Started(u64),
    /// It stopped with an error and will be retried.
    Failed(String),
    /// Trained, but not measured with the current settings.
    Trained,
    /// Trained and measured.
    Done,
    /// It diverged at that step, which is also a result.
    Diverged(u64),
    /// The folder contains a run of another config; these are the differences.
    Changed(String),
}

impl std::fmt::Display for CellProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New => write!(f, "new"),
            Self::Started(step) => write!(f, "started, {step} updates"),
            Self::Failed(message) => write!(f, "failed: {message}"),
            Self::Trained => write!(f, "trained, not measured yet"),
            Self::Done => write!(f, "done"),
            Self::Diverged(step) => write!(f, "diverged at step {step}"),
            Self::Changed(differences) => write!(f, "made with other settings: {differences}"),
        }
    }
}

impl Comparison {
    /// Plans the work of a matrix. `base` is the config that it starts from.
    ///
    /// # Errors
    ///
    /// Those of [`Matrix::cells`]; an unreadable teacher folder or file of prompts.
    pub(crate) fn new(matrix: Matrix, base: &Settings) -> Result<Self> {
        let cells = matrix.cells(base)?;
        // One thresholding for every teacher, or arms would be compared with different ones.
        let thresholding = matrix.with_changes(base)?.build::<DistillConfig>()?.thresholding;
        let mut checksums = BTreeMap::new();
        let mut planned = Vec::new();
        for cell in cells {
            let path = &cell.config.teacher.path;
            let sha256 = match checksums.get(path) {
                Some(known) => String::clone(known),
                None => checksums.entry(path.clone()).or_insert(checksum(path)?).clone(),
            };
            let target = TeacherSamples {
                path: path.clone(),
                sha256,
                guidance_scale: TeacherSamples::target_scale(cell.config.teacher.guidance),
                steps: matrix.evaluate.teacher_steps,
                thresholding: thresholding.clone(),
                samples: matrix.evaluate.samples,
                total: matrix.evaluate.samples,
                seed: matrix.evaluate.seed,
                device: cell.config.run.device.clone(),
                precision: cell.config.run.precision,
            };
            planned.push(PlannedCell { config_sha256: cell.config_sha256()?, cell, target });
        }
        let prompts_sha256 = match &matrix.evaluate.prompts {
            Some(path) => Some(sha256(&fs::read(path).map_err(Error::io("read", path))?)),
            None => None,
        };
        let setting = Setting {
            folder: ComparisonFolder::new(matrix.path()),
            evaluate: matrix.evaluate.clone(),
            data: planned.first().map(|first| first.cell.config.data.clone()).unwrap_or_default(),
            threads: matrix.threads,
            prompts_sha256,
        };
        let teachers = teachers(&matrix, &planned);
        Ok(Self { matrix, setting, cells: planned, teachers })
    }

    /// The comparison's folder.
    pub(crate) fn folder(&self) -> &ComparisonFolder {
        &self.setting.folder
    }

    /// The progress of a cell, from the files in the folder.
    ///
    /// # Errors
    ///
    /// Invalid files.
    pub(crate) fn progress_of(&self, planned: &PlannedCell) -> Result<CellProgress> {
        let PlannedCell { cell, target, .. } = planned;
        let run = self.folder().run_of(&cell.name);
        let has_run = run.join("config.toml").is_file();
        if has_run {
            match RunFolder::ensure_config_at(&run, &cell.config) {
                Err(ddil_trainer::Error::OtherConfig { differences, .. }) => {
                    let shown: Vec<String> = differences.iter().map(ToString::to_string).collect();
                    return Ok(CellProgress::Changed(shown.join("; ")));
                }
                other => other?,
            }
        }
        if let Some(CellRecord { measured_as, outcome, .. }) = self.record_of(planned)? {
            match outcome {
                Outcome::Diverged { step, .. } => return Ok(CellProgress::Diverged(step)),
                Outcome::Failed { message } => return Ok(CellProgress::Failed(message)),
                Outcome::Done { .. } if measured_as == self.setting.measured_as(Some(target)) => {
                    return Ok(CellProgress::Done);
                }
                Outcome::Done { .. } => {}
            }
        }
        if !has_run {
            return Ok(CellProgress::New);
        }
        Ok(match Status::from_folder(&run) {
            Ok(Status { state: State::Completed, .. }) => CellProgress::Trained,
            Ok(Status { step, .. }) => CellProgress::Started(step),
            Err(_) => CellProgress::Started(0),
        })
    }

    /// Every cell with its progress.
    ///
    /// # Errors
    ///
    /// As [`progress_of`](Self::standing).
    pub(crate) fn progress(&self) -> Result<Vec<(&PlannedCell, CellProgress)>> {
        self.cells.iter().map(|planned| Ok((planned, self.progress_of(planned)?))).collect()
    }

    /// Returns an error for cells whose folder has another config, or removes these folders if `fresh`.
    ///
    /// # Errors
    ///
    /// [`Error::Comparison`] with each cell and the differences; [`Error::Trainer`] for a folder to remove
    /// while another process works on it.
    pub(crate) fn resolve_changes(&self, cells: &[PlannedCell], fresh: bool) -> Result<()> {
        let mut problems = Vec::new();
        for planned in cells {
            let CellProgress::Changed(differences) = self.progress_of(planned)? else { continue };
            let name = &planned.cell.name;
            if fresh {
                let _lock = lock_file(&self.folder().lock_of(name), &self.folder().run_of(name))?;
                self.folder().remove_cell(name)?;
            } else {
                problems.push(format!("{name} was started with other settings: {differences}"));
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        problems.push("use --fresh to start these cells over, or choose another `name`".into());
        Err(Error::Comparison { place: self.folder().path().display().to_string(), problems })
    }

    /// Checks that every cell that is not trained yet can start: data, teacher and config fit each other.
    ///
    /// # Errors
    ///
    /// [`Error::Comparison`] with all cells that cannot start.
    pub(crate) fn ensure_possible(&self) -> Result<()> {
        let mut problems = Problems::default();
        let mut checked: Vec<&str> = Vec::new();
        for (planned, progress) in self.progress()? {
            let arm = planned.cell.arm.as_str();
            let is_new = matches!(progress, CellProgress::New | CellProgress::Failed(_));
            // The seed makes no difference here.
            if !is_new || checked.contains(&arm) {
                continue;
            }
            checked.push(arm);
            let has_prompts = self.setting.evaluate.prompts.is_some();
            if let Err(error) = ensure_comparable(&planned.cell.config, has_prompts) {
                problems.add(arm.to_owned(), &error);
            }
        }
        let problems = problems.into_lines();
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Comparison { place: format!("`{}`", self.matrix.name), problems })
    }

    /// Creates the folder and writes the configs of some cells, and of the first, whose data all are compared with.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(crate) fn write_configs(&self, cells: &[PlannedCell]) -> Result<()> {
        self.folder().create()?;
        for PlannedCell { cell, .. } in self.cells.iter().take(1).chain(cells) {
            let (path, text) = (self.folder().config_of(&cell.name), to_toml(&cell.config)?);
            if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
                write_atomic(&path, text.as_bytes())?;
            }
        }
        Ok(())
    }

    /// The cell with a given name.
    ///
    /// # Errors
    ///
    /// [`Error::Comparison`] with the most similar name.
    pub(crate) fn cell(&self, name: &str) -> Result<&PlannedCell> {
        let named = |planned: &&PlannedCell| planned.cell.name == name;
        self.cells.iter().find(named).ok_or_else(|| {
            let similarity =
                |planned: &&PlannedCell| strsim::jaro_winkler(name, &planned.cell.name);
            let nearest = self.cells.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
            let nearest = nearest.map_or("", |planned| planned.cell.name.as_str());
            let problem = format!(
                "there is no cell `{name}`; did you mean `{nearest}`? `--list` prints all {} cells",
                self.cells.len()
            );
            let place = format!("`{}`", self.matrix.name);
            Error::Comparison { place, problems: vec![problem] }
        })
    }

    /// The remaining work in stages: each needs the results of the stages before it.
    ///
    /// First samples of teachers, in parts, and real images; then rows of teachers; then the cells.
    ///
    /// # Errors
    ///
    /// Invalid files.
    pub(crate) fn stages(&self) -> Result<[Vec<WorkItem>; 3]> {
        if self.setting.evaluate.prompts.is_some() {
            // Images of prompts are drawn where they are measured, and their data are not images alone.
            let rows = self.teachers.iter().cloned().map(WorkItem::TeacherRow);
            let cells = self.cells.iter().cloned().map(|planned| WorkItem::Cell(Box::new(planned)));
            return Ok([Vec::new(), self.left(rows)?, self.left(cells)?]);
        }
        let draws = self.teachers.iter().flat_map(|planned| parts(&planned.samples));
        let rows = self.teachers.iter().cloned().map(WorkItem::TeacherRow);
        let cells = self.cells.iter().cloned().map(|planned| WorkItem::Cell(Box::new(planned)));
        Ok([
            self.left(std::iter::once(WorkItem::RealImages).chain(draws))?,
            self.left(rows)?,
            self.left(cells)?,
        ])
    }

    /// The work that one cell depends on: its teacher's samples.
    ///
    /// # Errors
    ///
    /// As [`stages`](Self::stages).
    pub(crate) fn needed_by(&self, planned: &PlannedCell) -> Result<Vec<WorkItem>> {
        if self.setting.evaluate.prompts.is_some() {
            return Ok(Vec::new());
        }
        self.left(parts(&planned.target))
    }

    /// Whether the result of a work item exists.
    ///
    /// # Errors
    ///
    /// An invalid file in its place.
    pub(crate) fn is_done(&self, item: &WorkItem) -> Result<bool> {
        let (folder, setting) = (self.folder(), &self.setting);
        Ok(match item {
            WorkItem::RealImages => {
                NamedRows::read(&folder.real(), &setting.measured_as(None))?.is_some()
            }
            WorkItem::TeacherSamples { teacher, start } => teacher.part(folder, *start).is_file(),
            WorkItem::TeacherRow(PlannedTeacher { samples, target, .. }) => {
                let measured_as = setting.measured_as(Some(target));
                NamedRows::read(&samples.row(folder, target), &measured_as)?.is_some()
            }
            WorkItem::Cell(planned) => match self.record_of(planned)? {
                Some(CellRecord { outcome: Outcome::Done { .. }, measured_as, .. }) => {
                    measured_as == setting.measured_as(Some(&planned.target))
                }
                Some(CellRecord { outcome: Outcome::Diverged { .. }, .. }) => true,
                Some(CellRecord { outcome: Outcome::Failed { .. }, .. }) | None => false,
            },
        })
    }

    /// How a cell ended; none if it has not ended, or if the record is of another config.
    ///
    /// # Errors
    ///
    /// An invalid file in its place.
    pub(crate) fn record_of(&self, planned: &PlannedCell) -> Result<Option<CellRecord>> {
        let record = CellRecord::from_file(&self.folder().record_of(&planned.cell.name))?;
        Ok(record.filter(|record| record.config_sha256 == planned.config_sha256))
    }

    /// Whether every cell has ended, successfully or not.
    ///
    /// # Errors
    ///
    /// As [`record_of`](Self::record_of).
    pub(crate) fn is_recorded(&self) -> Result<bool> {
        for planned in &self.cells {
            if self.record_of(planned)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes the record of how a cell ended.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(super) fn record(&self, planned: &PlannedCell, outcome: Outcome) -> Result<()> {
        let PlannedCell { cell, config_sha256, target } = planned;
        let measured_as = self.setting.measured_as(Some(target));
        CellRecord::new(&cell.name, config_sha256, &measured_as, outcome)
            .write(&self.folder().record_of(&cell.name))
    }

    /// Removes the record of a failure before a retry.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(super) fn remove_failure(&self, planned: &PlannedCell) -> Result<()> {
        let path = self.folder().record_of(&planned.cell.name);
        match CellRecord::from_file(&path)? {
            Some(CellRecord { outcome: Outcome::Failed { .. }, .. }) => {
                fs::remove_file(&path).map_err(Error::io("remove", &path))
            }
            _ => Ok(()),
        }
    }

    fn left(&self, items: impl Iterator<Item = WorkItem>) -> Result<Vec<WorkItem>> {
        let mut left: Vec<WorkItem> = Vec::new();
        for item in items {
            if !self.is_done(&item)? && !left.contains(&item) {
                left.push(item);
            }
        }
        Ok(left)
    }
}

fn parts(samples: &TeacherSamples) -> impl Iterator<Item = WorkItem> {
    samples.parts().map(|start| WorkItem::TeacherSamples { teacher: samples.clone(), start })
}

/// For each teacher and guidance: full steps, each number of steps that students use, and full steps without guidance.
fn teachers(matrix: &Matrix, cells: &[PlannedCell]) -> Vec<PlannedTeacher> {
    let evaluate = &matrix.evaluate;
    let mut all: Vec<PlannedTeacher> = Vec::new();
    let mut add = |samples: TeacherSamples, target: &TeacherSamples, own_steps: bool| {
        let planned = PlannedTeacher { samples, target: target.clone(), own_steps };
        if !all.contains(&planned) {
            all.push(planned);
        }
    };
    let mut seen: Vec<&TeacherSamples> = Vec::new();
    for PlannedCell { target, .. } in cells {
        if seen.contains(&target) {
            continue;
        }
        seen.push(target);
        add(target.clone(), target, true);
        if target.guidance_scale != 1.0 {
            add(TeacherSamples { guidance_scale: 1.0, ..target.clone() }, target, true);
        }
        let own: Vec<u32> = cells
            .iter()
            .filter(|planned| planned.target == *target)
            .map(|planned| planned.cell.own_steps())
            .collect();
        for steps in own.iter().flat_map(|own| evaluate.step_counts(*own)) {
            let own_steps = own.contains(&steps);
            let samples = evaluate.samples_at(own_steps);
            if steps != target.steps {
                add(TeacherSamples { steps, samples, ..target.clone() }, target, own_steps);
            }
        }
    }
    all
}

/// A checksum of every file of a model folder, or of the export of a run.
fn checksum(path: &Path) -> Result<String> {
    const INDEX: &str = "model_index.json";
    let found =
        [path.to_owned(), path.join("export")].into_iter().find(|f| f.join(INDEX).is_file());
    let Some(folder) = found else {
        let path = path.to_owned();
        return Err(ddil_pipelines::Error::NotAModel { path, missing: INDEX }.into());
    };
    let mut files = Vec::new();
    list(&folder, &mut files)?;
    files.sort();
    let mut sum = Sha256::new();
    for file in files {
        let name = file.strip_prefix(&folder).unwrap_or(&file).to_string_lossy().into_owned();
        let content = fs::read(&file).map_err(Error::io("read", &file))?;
        sum.update(format!("{name}\0{}\0", content.len()));
        sum.update(content);
    }
    Ok(hex(&sum.finalize()))
}

/// All files below a folder. Symbolic links to folders are not followed: they may form a cycle.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let path = entry.path();
        if entry.file_type().map_err(Error::io("read the type of", &path))?.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Checks that a student can be trained and that there are real images to measure it against.
fn ensure_comparable(config: &DistillConfig, has_prompts: bool) -> Result<()> {
    let kind = config.data.kind;
    let invalid = |expected: &str| {
        Err(Error::Invalid(Invalid::new("data.kind", kind.as_str().to_owned(), expected)))
    };
    if kind.is_text() && !has_prompts {
        return invalid(
            "fashion_mnist or image_folder: generated images are compared with those of the data; for a text-to-image \
             student set `evaluate.prompts`",
        );
    }
    if has_prompts && !kind.is_text() {
        return invalid(
            "captions, prompts or latents: `evaluate.prompts` is for text-to-image students",
        );
    }
    Ok(DistillTask::new(config).map(drop)?)
}
