//! How far a comparison is, and what is left to do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::Invalid;
use sha2::{Digest, Sha256};

use super::folder::ComparisonFolder;
use super::job::{Job, Task};
use super::matrix::{Cell, Matrix, Problems, hex};
use super::record::{CellRecord, Outcome};
use super::setting::{Setting, TeacherSamples};
use crate::config::DistillConfig;
use crate::distill::DistillTask;
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::run_folder::{RunFolder, State, Status};
use crate::settings::{Settings, to_toml};

/// A comparison: its cells, and the samples of teachers that they are compared with.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The file.
    pub matrix: Matrix,
    /// What all jobs have in common.
    pub setting: Setting,
    /// The cells.
    pub cells: Vec<PlannedCell>,
    /// Rows of teachers.
    pub teachers: Vec<PlannedTeacher>,
}

/// A cell with what it is to learn.
#[derive(Clone, Debug)]
pub struct PlannedCell {
    /// The cell.
    pub cell: Cell,
    /// Checksum of its config.
    pub config_sha256: String,
    /// The samples of its teacher.
    pub taught: TeacherSamples,
}

/// A row of a teacher.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedTeacher {
    /// Its samples.
    pub samples: TeacherSamples,
    /// The samples that students learn, which it is compared with.
    pub taught: TeacherSamples,
    /// Whether some student is made for so many steps.
    pub own_steps: bool,
}

/// How far a cell is.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    /// Nothing is there.
    New,
    /// So many updates are saved.
    Started(u64),
    /// It stopped with an error, and is tried again.
    Failed(String),
    /// Trained; what it is measured on has changed, or it was never measured.
    Trained,
    /// Trained and measured.
    Done,
    /// It diverged at that step, which is a result too.
    Diverged(u64),
    /// What lies there is of another config; these are the differences.
    Changed(String),
}

impl std::fmt::Display for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New => write!(f, "new"),
            Self::Started(step) => write!(f, "begun, {step} updates"),
            Self::Failed(message) => write!(f, "failed: {message}"),
            Self::Trained => write!(f, "trained, to be measured"),
            Self::Done => write!(f, "done"),
            Self::Diverged(step) => write!(f, "diverged at step {step}"),
            Self::Changed(differences) => write!(f, "of another config: {differences}"),
        }
    }
}

impl Plan {
    /// Works out what there is to do for a matrix. `base` is the config that it starts from.
    ///
    /// # Errors
    ///
    /// Those of [`Matrix::cells`]; a teacher's folder that cannot be read.
    pub fn new(matrix: Matrix, base: &Settings) -> Result<Self> {
        let cells = matrix.cells(base)?;
        // One treatment of what lies beyond the range for every teacher, or arms would be held against different ones.
        let thresholding = matrix.with_changes(base)?.build::<DistillConfig>()?.thresholding;
        let mut checksums = BTreeMap::new();
        let mut planned = Vec::new();
        for cell in cells {
            let path = &cell.config.teacher.path;
            let sha256 = match checksums.get(path) {
                Some(known) => String::clone(known),
                None => checksums.entry(path.clone()).or_insert(checksum(path)?).clone(),
            };
            let taught = TeacherSamples {
                path: path.clone(),
                sha256,
                guidance_scale: TeacherSamples::taught_scale(cell.config.teacher.guidance),
                steps: matrix.evaluate.teacher_steps,
                thresholding: thresholding.clone(),
                samples: matrix.evaluate.samples,
                total: matrix.evaluate.samples,
                seed: matrix.evaluate.seed,
                device: cell.config.run.device.clone(),
                precision: cell.config.run.precision,
            };
            planned.push(PlannedCell { config_sha256: cell.config_sha256()?, cell, taught });
        }
        let setting = Setting {
            folder: ComparisonFolder::new(matrix.path()),
            evaluate: matrix.evaluate.clone(),
            data: planned.first().map(|first| first.cell.config.data.clone()).unwrap_or_default(),
            threads: matrix.threads,
        };
        let teachers = teachers(&matrix, &planned);
        Ok(Self { matrix, setting, cells: planned, teachers })
    }

    /// The comparison's folder.
    pub fn folder(&self) -> &ComparisonFolder {
        &self.setting.folder
    }

    /// How far a cell is, by what lies in the folder.
    ///
    /// # Errors
    ///
    /// Files that are not what they should be.
    pub fn standing(&self, planned: &PlannedCell) -> Result<Standing> {
        let PlannedCell { cell, config_sha256, taught } = planned;
        let run = self.folder().run_of(&cell.name);
        let has_run = run.join("config.toml").is_file();
        if has_run {
            match RunFolder::ensure_config_at(&run, &cell.config) {
                Err(Error::OtherConfig { differences, .. }) => {
                    let shown: Vec<String> = differences.iter().map(ToString::to_string).collect();
                    return Ok(Standing::Changed(shown.join("; ")));
                }
                other => other?,
            }
        }
        let record = CellRecord::read(&self.folder().record_of(&cell.name))?;
        let record = record.filter(|record| record.config_sha256 == *config_sha256);
        if let Some(CellRecord { measured_as, outcome, .. }) = record {
            match outcome {
                Outcome::Diverged { step, .. } => return Ok(Standing::Diverged(step)),
                Outcome::Failed { message } => return Ok(Standing::Failed(message)),
                Outcome::Done { .. } if measured_as == self.setting.measured_as(Some(taught)) => {
                    return Ok(Standing::Done);
                }
                Outcome::Done { .. } => {}
            }
        }
        if !has_run {
            return Ok(Standing::New);
        }
        Ok(match Status::read(&run) {
            Ok(Status { state: State::Completed, .. }) => Standing::Trained,
            Ok(Status { step, .. }) => Standing::Started(step),
            Err(_) => Standing::Started(0),
        })
    }

    /// Every cell with how far it is.
    ///
    /// # Errors
    ///
    /// As [`standing`](Self::standing).
    pub fn standings(&self) -> Result<Vec<(&PlannedCell, Standing)>> {
        self.cells.iter().map(|planned| Ok((planned, self.standing(planned)?))).collect()
    }

    /// Refuses cells that lie there with another config, or forgets them if `fresh`.
    ///
    /// # Errors
    ///
    /// [`Error::Comparison`] that names each with what differs.
    pub fn settle_changes(&self, fresh: bool) -> Result<()> {
        let mut problems = Vec::new();
        for (planned, standing) in self.standings()? {
            let Standing::Changed(differences) = standing else { continue };
            let name = &planned.cell.name;
            if fresh {
                self.folder().remove_cell(name)?;
            } else {
                problems.push(format!("{name} was begun with other settings: {differences}"));
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        problems
            .push("give --fresh to start these cells anew, or the comparison another name".into());
        Err(Error::Comparison { place: self.folder().path().display().to_string(), problems })
    }

    /// Makes sure that every cell which is not trained yet could begin: data, teacher and config fit each other.
    ///
    /// # Errors
    ///
    /// [`Error::Comparison`] with all that do not.
    pub fn ensure_possible(&self) -> Result<()> {
        let mut problems = Problems::default();
        let mut checked: Vec<&str> = Vec::new();
        for (planned, standing) in self.standings()? {
            let arm = planned.cell.arm.as_str();
            let is_new = matches!(standing, Standing::New | Standing::Failed(_));
            // Seeds make no difference.
            if !is_new || checked.contains(&arm) {
                continue;
            }
            checked.push(arm);
            if let Err(error) = ensure_comparable(&planned.cell.config) {
                problems.add(arm.to_owned(), &error);
            }
        }
        let problems = problems.into_lines();
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Comparison { place: format!("`{}`", self.matrix.name), problems })
    }

    /// Makes the folder and writes the config of each cell that is not done.
    ///
    /// # Errors
    ///
    /// What the file system refuses.
    pub fn write_configs(&self) -> Result<()> {
        self.folder().create()?;
        for PlannedCell { cell, .. } in &self.cells {
            let (path, text) = (self.folder().config_of(&cell.name), to_toml(&cell.config)?);
            if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
                write_atomic(&path, text.as_bytes())?;
            }
        }
        Ok(())
    }

    /// What is left to do, in stages: each needs what those before it leave.
    ///
    /// First samples of teachers, in parts, and real images; then rows of teachers; then the cells.
    ///
    /// # Errors
    ///
    /// Files that are not what they should be.
    pub fn stages(&self) -> Result<[Vec<Job>; 3]> {
        let draws = self.teachers.iter().flat_map(|planned| {
            let start = |start| Task::Draw { teacher: planned.samples.clone(), start };
            planned.samples.parts().map(start)
        });
        let rows = self.teachers.iter().cloned().map(|planned| {
            let PlannedTeacher { samples: teacher, taught, own_steps } = planned;
            Task::Teacher { teacher, taught, own_steps }
        });
        let cells = self.cells.iter().map(|planned| Task::Cell {
            cell: planned.cell.name.clone(),
            config_sha256: planned.config_sha256.clone(),
            taught: planned.taught.clone(),
        });
        Ok([
            self.left(std::iter::once(Task::Real).chain(draws))?,
            self.left(rows)?,
            self.left(cells)?,
        ])
    }

    fn left(&self, tasks: impl Iterator<Item = Task>) -> Result<Vec<Job>> {
        let mut jobs: Vec<Job> = Vec::new();
        for task in tasks {
            let job = Job { setting: self.setting.clone(), task };
            if !job.is_done()? && !jobs.contains(&job) {
                jobs.push(job);
            }
        }
        Ok(jobs)
    }
}

/// For each teacher and guidance: in full, in as many steps as students are sampled in, and unguided in full.
fn teachers(matrix: &Matrix, cells: &[PlannedCell]) -> Vec<PlannedTeacher> {
    let evaluate = &matrix.evaluate;
    let mut all: Vec<PlannedTeacher> = Vec::new();
    let mut add = |samples: TeacherSamples, taught: &TeacherSamples, own_steps: bool| {
        let planned = PlannedTeacher { samples, taught: taught.clone(), own_steps };
        if !all.contains(&planned) {
            all.push(planned);
        }
    };
    let mut seen: Vec<&TeacherSamples> = Vec::new();
    for PlannedCell { taught, .. } in cells {
        if seen.contains(&taught) {
            continue;
        }
        seen.push(taught);
        add(taught.clone(), taught, true);
        if taught.guidance_scale != 1.0 {
            add(TeacherSamples { guidance_scale: 1.0, ..taught.clone() }, taught, true);
        }
        let own: Vec<u32> = cells
            .iter()
            .filter(|planned| planned.taught == *taught)
            .map(|planned| planned.cell.own_steps())
            .collect();
        for steps in own.iter().flat_map(|own| evaluate.step_counts(*own)) {
            let own_steps = own.contains(&steps);
            let samples = evaluate.samples_at(own_steps);
            if steps != taught.steps {
                add(TeacherSamples { steps, samples, ..taught.clone() }, taught, own_steps);
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
        return Err(Error::NotAModel { path: path.to_owned(), missing: INDEX });
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

/// All files below a folder. Folders behind a link are not gone into: it may lead back.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let path = entry.path();
        if entry.file_type().map_err(Error::io("look at", &path))?.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Checks that a student can be trained and that there are pixels to measure it against.
fn ensure_comparable(config: &DistillConfig) -> Result<()> {
    let kind = config.data.kind;
    if kind.is_text() {
        return Err(Error::Invalid(Invalid::new(
            "data.kind",
            kind.as_str().to_owned(),
            "fashion_mnist or image_folder: pictures are measured against those of the data",
        )));
    }
    DistillTask::new(config).map(drop)
}
