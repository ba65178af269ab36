//! A part of the samples, as the `data` table of a config describes it.

use ddil_data::{ImageDataset, ImageFolder, choose_samples};

use crate::config::DataSection;
use crate::error::{Error, Result};

/// Samples of which a part can be taken: read ones, and files that are not read yet.
pub(super) trait Divisible: Sized {
    fn num_samples(&self) -> i64;
    fn without_classes(&self, names: &[String]) -> ddil_data::Result<Self>;
    fn select(&self, indices: &[i64]) -> ddil_data::Result<Self>;
}

macro_rules! divisible {
    ($type:ty) => {
        impl Divisible for $type {
            fn num_samples(&self) -> i64 {
                self.len()
            }

            fn without_classes(&self, names: &[String]) -> ddil_data::Result<Self> {
                self.without_classes(names)
            }

            fn select(&self, indices: &[i64]) -> ddil_data::Result<Self> {
                self.select(indices)
            }
        }
    };
}

divisible!(ImageDataset);
divisible!(ImageFolder);

/// The samples that a config leaves: without its excluded classes, and no more than its number of samples.
pub(super) fn part_of<S: Divisible>(samples: S, section: &DataSection) -> Result<S> {
    let samples = match &section.exclude_classes[..] {
        [] => samples,
        excluded => samples.without_classes(excluded).map_err(under_data)?,
    };
    match chosen(samples.num_samples(), section)? {
        Some(chosen) => Ok(samples.select(&chosen)?),
        None => Ok(samples),
    }
}

/// Indices of the samples that a config uses of `len`; none if it uses all.
pub(super) fn chosen(len: i64, section: &DataSection) -> Result<Option<Vec<i64>>> {
    let Some(count) = section.max_samples else { return Ok(None) };
    let choice = section.max_samples_choice.unwrap_or_default();
    let seed = section.max_samples_seed.unwrap_or(0);
    choose_samples(len, count.into(), choice, seed).map(Some).map_err(under_data)
}

/// Errors of settings name them as in the config.
fn under_data(error: ddil_data::Error) -> Error {
    match error {
        ddil_data::Error::Invalid(invalid) => Error::Invalid(invalid.under("data")),
        error => error.into(),
    }
}
