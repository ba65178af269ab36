//! The record of what training states were conditioned on.

use ddil_core::{Conditioning, States};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::config::PromptSource;
use crate::error::{Error, Result};

/// A teacher with more classes is recorded without a count for each.
const MAX_CLASSES: usize = 100;

/// Number of states since the first update whose conditioning is that of the data and that of `[prompts]`, and the
/// number of states of each class.
#[derive(Debug)]
pub(super) struct Conditioned {
    source: PromptSource,
    data: u64,
    prompts: u64,
    /// One count per label, on the device: reading labels in an update would wait for it.
    classes: Option<Tensor>,
    /// The label that is no class and needs no count.
    null_class: Option<i64>,
}

/// The counts in a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedCounts {
    data: u64,
    prompts: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    classes: Vec<i64>,
}

impl Conditioned {
    /// None yet, for a teacher with that many labels. Without prompts apart from the data there is nothing to tell.
    pub(super) fn new(
        source: PromptSource,
        (num_labels, null_class): (usize, Option<i64>),
        device: Device,
    ) -> Option<Self> {
        let has_counts = source == PromptSource::Classes && num_labels <= MAX_CLASSES;
        let classes = has_counts.then(|| Tensor::zeros([num_labels as i64], (Kind::Int64, device)));
        let is_apart = source != PromptSource::Data;
        is_apart.then_some(Self { source, data: 0, prompts: 0, classes, null_class })
    }

    /// Counts the states of an update, of which `prompted` have the conditioning of `[prompts]`.
    pub(super) fn count(&mut self, states: &States, prompted: u64) -> Result<()> {
        self.prompts += prompted;
        self.data += (states.len() as u64).saturating_sub(prompted);
        let labels = states.conditioning.get(Conditioning::CLASS_LABELS);
        if let Some((counts, labels)) = self.classes.as_mut().zip(labels) {
            let one = labels.ones_like();
            let _ = counts.f_index_add_(0, labels, &one).map_err(Error::torch("conditioned"))?;
        }
        Ok(())
    }

    /// The counts, for the record. Waits for the device.
    pub(super) fn figures(&self) -> Result<Vec<(String, f64)>> {
        let SavedCounts { data, prompts, classes } = self.saved()?;
        let of_prompts = format!("conditioned_{}", self.source.as_str());
        let totals = [("conditioned_data".to_owned(), data as f64), (of_prompts, prompts as f64)];
        let classes = (0_i64..).zip(&classes).filter(|(label, _)| Some(*label) != self.null_class);
        let of_class =
            |(label, count): (i64, &i64)| (format!("conditioned_class_{label}"), *count as f64);
        Ok(totals.into_iter().chain(classes.map(of_class)).collect())
    }

    /// The counts, for a checkpoint.
    pub(super) fn saved(&self) -> Result<SavedCounts> {
        let classes =
            self.classes.as_ref().map(|counts| Vec::try_from(counts.to_device(Device::Cpu)));
        let classes = classes.transpose().map_err(Error::torch("conditioned"))?;
        Ok(SavedCounts {
            data: self.data,
            prompts: self.prompts,
            classes: classes.unwrap_or_default(),
        })
    }

    /// Continues from a checkpoint.
    pub(super) fn restore(&mut self, saved: &SavedCounts) -> Result<()> {
        (self.data, self.prompts) = (saved.data, saved.prompts);
        let Some(counts) = &mut self.classes else { return Ok(()) };
        let found = Tensor::from_slice(&saved.classes);
        if found.size() != counts.size() {
            let problem =
                format!("counts of {} classes; expected {}", saved.classes.len(), counts.size()[0]);
            return Err(Error::StateMismatch { what: "conditioned", problems: vec![problem] });
        }
        counts.copy_(&found);
        Ok(())
    }
}
