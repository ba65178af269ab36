//! Samples in a safetensors file: one tensor `images` of bytes, as in an image file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_models::weights;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// The maximum number of samples that [`write_first`] keeps.
pub(crate) const KEPT: i64 = 20;

const IMAGES: &str = "images";
const EXTENSION: &str = "safetensors";

/// Whether a path has the file name extension of a sample file.
pub(crate) fn is_named(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(EXTENSION))
}

/// The sample files of a folder, ordered by name; none if the folder does not exist.
pub(crate) fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| is_named(path) && path.is_file()).collect();
    files.sort();
    files
}

/// Writes images, `[n, channels, height, width]` in `[-1, 1]`, as bytes; NaN becomes black.
///
/// The file is complete or absent, also after a crash.
///
/// # Errors
///
/// Errors of the file system.
pub(crate) fn write(path: &Path, images: &Tensor) -> Result<()> {
    let bytes = || {
        let levels = images.f_add_scalar(1)?.f_mul_scalar(127.5)?.f_nan_to_num(0.0, 255.0, 0.0)?;
        levels.f_clamp(0, 255)?.f_round()?.f_to_kind(Kind::Uint8)
    };
    let bytes = bytes().map_err(Error::torch("sample_file::write"))?;
    Ok(weights::save(&[(IMAGES.to_owned(), bytes)], path, &BTreeMap::new())?)
}

/// Writes the first [`KEPT`] of some images.
///
/// # Errors
///
/// As [`write()`].
pub(crate) fn write_first(path: &Path, images: &Tensor) -> Result<()> {
    write(path, &images.narrow(0, 0, KEPT.min(images.size()[0])))
}

/// Reads a sample file: `[n, channels, height, width]` in `[-1, 1]`.
///
/// # Errors
///
/// [`Error::Samples`] if the file has other contents.
pub fn read(path: &Path) -> Result<Tensor> {
    let mut tensors = weights::read_all(path)?;
    let Some(bytes) = tensors.remove(IMAGES) else {
        let (path, reason) = (path.to_owned(), format!("it has no `{IMAGES}`"));
        return Err(Error::Samples { path, reason });
    };
    let images = || bytes.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1);
    images().map_err(Error::torch("sample_file::read"))
}

/// Reads every sample file of a folder, ordered by name.
///
/// # Errors
///
/// As [`read`]; [`Error::Samples`] for a folder without sample files.
pub(crate) fn read_folder(folder: &Path) -> Result<Tensor> {
    let files = list(folder);
    if files.is_empty() {
        let (path, reason) = (folder.to_owned(), "it has no .safetensors file".to_owned());
        return Err(Error::Samples { path, reason });
    }
    let parts: Result<Vec<Tensor>> = files.iter().map(|file| read(file)).collect();
    Tensor::f_cat(&parts?, 0).map_err(Error::torch("sample_file::read_folder"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_come_back_to_within_half_a_level() -> Result<()> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let images = Tensor::linspace(-1.2, 1.2, 50, tch::kind::FLOAT_CPU).reshape([25, 1, 1, 2]);
        write(&folder.path().join("b.safetensors"), &images)?;
        write_first(&folder.path().join("a.safetensors"), &images)?;
        let found = read_folder(folder.path())?;
        let expected = Tensor::cat(&[images.narrow(0, 0, KEPT), images.shallow_clone()], 0);
        let largest = (found - expected.clamp(-1, 1)).abs().max().double_value(&[]);
        assert!(largest <= 0.5 / 127.5 + 1e-6, "{largest}");
        Ok(())
    }
}
