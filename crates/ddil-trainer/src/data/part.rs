//! A part of the samples, as the `data` table of a config describes it.

use ddil_data::{ImageDataset, choose_samples};

use crate::config::DataSection;
use crate::error::{Error, Result};

/// The images that a config leaves: without its excluded classes, and no more than its number of samples.
pub(super) fn part_of(images: &ImageDataset, section: &DataSection) -> Result<ImageDataset> {
    let images = match &section.exclude_classes[..] {
        [] => images.shallow_clone(),
        excluded => images.without_classes(excluded).map_err(under_data)?,
    };
    match chosen(images.len(), section)? {
        Some(chosen) => Ok(images.select(&chosen)?),
        None => Ok(images),
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
