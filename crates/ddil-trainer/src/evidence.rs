//! The data saved of a batch with NaN or infinite values.
//!
//! ```text
//! <run>/not_finite/step_0000120/
//!   batch.json          what was found where, and the timestep and source of each row of the batch
//!   batch.safetensors   the rows: data, states, conditioning
//!   manifest.json       as in a checkpoint
//! ```
//!
//! Only the newest such folder is kept, of at most 64 MiB or one row: first the rows with findings, then others for
//! comparison.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use ddil_core::{Conditioning, States};
use serde::Serialize;
use tch::Tensor;

use crate::checkpoint::{CheckpointWriter, Retention, discard_newer};
use crate::error::{Error, Result};
use crate::watch::{Outputs, is_float, rows_not_finite};

/// Its name in the run folder.
pub(crate) const NOT_FINITE: &str = "not_finite";
const MAX_BYTES: usize = 64 << 20;

/// The findings of a batch, in causal order.
#[derive(Debug, Default)]
pub struct Evidence {
    rows: Vec<Row>,
    findings: Vec<Finding>,
    tensors: Vec<(String, Tensor)>,
}

/// The properties of a row of the batch.
#[derive(Clone, Debug, Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    timestep: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// The student's update at which the state was created.
    #[serde(rename = "birth", skip_serializing_if = "Option::is_none")]
    created_at_step: Option<u64>,
}

/// A tensor with values that are not finite.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    /// Affected rows of the batch; none if the tensor has no rows.
    rows: Vec<usize>,
    timesteps: BTreeSet<i64>,
    sources: BTreeSet<String>,
}

/// The content of `batch.json`.
#[derive(Serialize)]
struct About<'a> {
    error: &'a str,
    findings: &'a [Finding],
    num_rows: usize,
    /// For each row of the file, its row in the batch.
    rows: &'a [usize],
    of_rows: Vec<&'a Row>,
}

impl Evidence {
    /// For a batch of which only one timestep per row is known.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the timesteps cannot be read.
    pub fn of_timesteps(timesteps: &Tensor) -> Result<Self> {
        let timesteps: Vec<i64> =
            Vec::try_from(timesteps).map_err(Error::torch("Evidence::of_timesteps"))?;
        let row = |timestep| Row { timestep: Some(timestep), source: None, created_at_step: None };
        Ok(Self { rows: timesteps.into_iter().map(row).collect(), ..Self::default() })
    }

    /// For training states.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if their timesteps cannot be read.
    pub(crate) fn of_states(states: &States) -> Result<Self> {
        let mut evidence = Self::of_timesteps(&states.timesteps)?;
        let origins = states.sources.iter().zip(&states.created_at_step);
        for (row, (source, created_at_step)) in evidence.rows.iter_mut().zip(origins) {
            (row.source, row.created_at_step) =
                (Some(source.as_str().to_owned()), Some(*created_at_step));
        }
        Ok(evidence)
    }

    /// Checks a tensor with one row per sample, and keeps it to be saved.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if it cannot be checked.
    pub fn check(&mut self, what: &str, name: &str, tensor: &Tensor) -> Result<()> {
        let rows = rows_not_finite(tensor)?;
        self.found(what, &rows, None);
        self.tensors.push((name.to_owned(), tensor.shallow_clone()));
        Ok(())
    }

    /// Checks all parts of a conditioning, and keeps them to be saved.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn check_conditioning(&mut self, owner: &str, conditioning: &Conditioning) -> Result<()> {
        conditioning.parts().try_for_each(|(part, tensor)| {
            self.check(&format!("{part} of the {owner}"), &format!("{owner}.{part}"), tensor)
        })
    }

    /// Checks the weights of a network.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn check_weights(&mut self, owner: &str, weights: &[(String, Tensor)]) -> Result<()> {
        let found = not_finite_among(weights)?;
        if let Some(first) = found.first() {
            let (first, of) = (&weights[*first].0, weights.len());
            let what =
                format!("{} of {of} weights of the {owner} (the first: `{first}`)", found.len());
            self.findings.push(Finding::of(what));
        }
        Ok(())
    }

    /// Records the outputs of a network, and those of the same pass computed again.
    pub(crate) fn add_outputs(&mut self, outputs: &Outputs) {
        let Outputs { network, sum, faulty } = outputs;
        for output in faulty {
            self.found(&format!("output of the {network}"), &output.rows, Some(&output.timesteps));
        }
        let is_finite =
            sum.as_ref().is_none_or(|sum| sum.f_double_value(&[]).is_ok_and(f64::is_finite));
        if faulty.is_empty() && !is_finite {
            self.findings.push(Finding::of(format!(
                "an output of the {network} in this update, outside of the loss or at inputs that were not finite"
            )));
        }
    }

    /// The first finding, in words.
    pub fn first(&self) -> Option<String> {
        self.findings.first().map(|finding| finding.to_string_of(self.rows.len()))
    }

    fn found(&mut self, what: &str, rows: &[usize], timesteps: Option<&[i64]>) {
        if rows.is_empty() {
            return;
        }
        let num_rows = self.rows.len().max(1);
        let timestep = |row: &usize| match timesteps {
            Some(timesteps) => timesteps.get(*row).copied(),
            None => self.rows.get(*row).and_then(|row| row.timestep),
        };
        let of_batch: BTreeSet<usize> = rows.iter().map(|row| row % num_rows).collect();
        let source = |row: &usize| self.rows.get(*row).and_then(|row| row.source.clone());
        self.findings.push(Finding {
            what: what.to_owned(),
            timesteps: rows.iter().filter_map(timestep).collect(),
            sources: of_batch.iter().filter_map(source).collect(),
            rows: of_batch.into_iter().collect(),
        });
    }

    /// Writes the batch below a run's folder, replaces an older one and returns the path.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(crate) fn write(&self, run: &Path, step: u64, error: &str) -> Result<PathBuf> {
        let folder = run.join(NOT_FINITE);
        let rows = self.rows_to_keep();
        let report = About {
            error,
            findings: &self.findings,
            num_rows: self.rows.len(),
            of_rows: rows.iter().map(|row| &self.rows[*row]).collect(),
            rows: &rows,
        };
        let mut writer = CheckpointWriter::new(&folder, step, NOT_FINITE)?;
        writer.json("batch.json", &report)?;
        writer.tensors("batch.safetensors", &self.kept(&rows)?)?;
        let written = writer.commit()?;
        discard_newer(&folder, step)?;
        Retention { keep_last: NonZeroU32::MIN, ..Retention::default() }.apply(&written)?;
        Ok(written.path().to_owned())
    }

    /// The rows with findings, then the others, as many as fit.
    fn rows_to_keep(&self) -> Vec<usize> {
        let found: BTreeSet<usize> =
            self.findings.iter().flat_map(|finding| finding.rows.iter().copied()).collect();
        let others = (0..self.rows.len()).filter(|row| !found.contains(row));
        let mut rows: Vec<usize> = found.iter().copied().chain(others).collect();
        let row_bytes: usize = self.of_rows().map(|(_, tensor)| bytes_of_row(tensor)).sum();
        rows.truncate((MAX_BYTES / row_bytes.max(1)).max(1));
        rows
    }

    fn of_rows(&self) -> impl Iterator<Item = &(String, Tensor)> {
        let rows = self.rows.len() as i64;
        self.tensors.iter().filter(move |(_, tensor)| tensor.size().first() == Some(&rows))
    }

    fn kept(&self, rows: &[usize]) -> Result<Vec<(String, Tensor)>> {
        let order: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        let order = Tensor::from_slice(&order);
        let rows_of = |tensor: &Tensor| {
            tensor.f_detach()?.f_index_select(0, &order.f_to_device(tensor.device())?)
        };
        self.of_rows()
            .map(|(name, tensor)| {
                Ok((name.clone(), rows_of(tensor).map_err(Error::torch("Evidence::write"))?))
            })
            .collect()
    }
}

impl Finding {
    /// A finding without rows.
    fn of(what: String) -> Self {
        Self { what, rows: Vec::new(), timesteps: BTreeSet::new(), sources: BTreeSet::new() }
    }

    fn to_string_of(&self, num_rows: usize) -> String {
        let timesteps: Vec<String> = self.timesteps.iter().map(i64::to_string).collect();
        let sources: Vec<&str> = self.sources.iter().map(String::as_str).collect();
        let rows = format!("in {} of {num_rows} rows", self.rows.len());
        let parts = [
            Some(format!("not finite: {}", self.what)),
            (!timesteps.is_empty()).then(|| format!("timestep {}", timesteps.join(", "))),
            (!sources.is_empty()).then(|| format!("source {}", sources.join(", "))),
            Some(rows).filter(|_| !self.rows.is_empty()),
        ];
        parts.into_iter().flatten().collect::<Vec<String>>().join(", ")
    }
}

fn bytes_of_row(tensor: &Tensor) -> usize {
    let values: i64 = tensor.size().iter().skip(1).product();
    values as usize * tensor.kind().elt_size_in_bytes()
}

/// Indices of the tensors, all on one device, that have values that are not finite. Waits for the device once.
pub(crate) fn not_finite_among(tensors: &[(String, Tensor)]) -> Result<Vec<usize>> {
    let of_floats: Vec<usize> = (0..tensors.len()).filter(|at| is_float(&tensors[*at].1)).collect();
    let look = || {
        let all_finite = |at: &usize| tensors[*at].1.f_detach()?.f_isfinite()?.f_all();
        let flags: Vec<Tensor> =
            of_floats.iter().map(all_finite).collect::<std::result::Result<_, _>>()?;
        match flags.as_slice() {
            [] => Ok(Vec::new()),
            flags => Vec::<bool>::try_from(Tensor::f_stack(flags, 0)?),
        }
    };
    let finite = look().map_err(Error::torch("not_finite_among"))?;
    Ok(of_floats.iter().zip(finite).filter(|(_, finite)| !finite).map(|(at, _)| *at).collect())
}
