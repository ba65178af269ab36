//! A folder of features, so that a measurement that was stopped goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use ddil_data::{ImageFiles, cache_folder};
use ddil_files::{Error as FileError, hex, write_json};
use ddil_metrics::FeatureExtractor;
use ddil_pipelines::SamplePlan;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::feature_rows::{FeatureRows, is_complete};
use crate::prompt_drawing::PromptDrawing;
use crate::prompt_scores::PromptNetworks;
use crate::prompts::PromptSet;

const KEY: &str = "key.json";
/// The file that marks features that stay when a measurement is complete.
const KEPT: &str = "kept";
/// Another version may decode or convert images in another way.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Features of that age are removed unless they are complete and to be kept.
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Everything that the features of a set of images depend on; equal keys have equal features.
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureKey {
    parts: Value,
    total: u64,
    dim: i64,
}

impl FeatureKey {
    /// The key of image files: their paths, sizes and times of change.
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files) if a file cannot be read.
    pub fn of_files(files: &ImageFiles, extractor: &dyn FeatureExtractor) -> Result<Self> {
        let subject = json!({ "files": signature(files.paths())? });
        Ok(Self::new(&subject, files.len() as u64, extractor))
    }

    /// The key of the first `count` of `total` samples of the model in these folders; `network` describes how it is
    /// evaluated: device, precision and the like.
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files) if the folder cannot be read.
    pub fn of_model(
        folders: &[&Path],
        plan: &SamplePlan,
        [count, total]: [u32; 2],
        network: &str,
        extractor: &dyn FeatureExtractor,
    ) -> Result<Self> {
        let model = signature_of_folders(folders)?;
        let subject = json!({ "model": model, "plan": plan, "of": total, "network": network });
        Ok(Self::new(&subject, u64::from(count), extractor))
    }

    /// The key of a [`PromptMeter`](crate::PromptMeter)'s rows, for images that the model in these folders draws;
    /// `network` as for [`of_model`](Self::of_model).
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files) if a folder cannot be read.
    pub fn of_prompts(
        folders: &[&Path],
        drawing: &PromptDrawing<'_>,
        network: &str,
        networks: PromptNetworks<'_>,
    ) -> Result<Self> {
        let (total, dim) = (drawing.num_images(), networks.dim());
        let parts = json!({
            "ddil": VERSION,
            "model": signature_of_folders(folders)?,
            "plan": drawing.plan(),
            "network": network,
            "prompts": drawing.prompts(),
            "image_shape": drawing.image_shape(),
            "total": total,
            "measured by": networks.identity(),
            "dim": dim,
        });
        Ok(Self { parts, total, dim })
    }

    /// The key of a [`PromptMeter`](crate::PromptMeter)'s rows, for images in files in the order of their prompts.
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files) if a file cannot be read.
    pub fn of_prompted_files(
        files: &ImageFiles,
        prompts: &PromptSet,
        networks: PromptNetworks<'_>,
    ) -> Result<Self> {
        let (total, dim) = (files.len() as u64, networks.dim());
        let parts = json!({
            "ddil": VERSION,
            "files": signature(files.paths())?,
            "prompts": prompts,
            "total": total,
            "measured by": networks.identity(),
            "dim": dim,
        });
        Ok(Self { parts, total, dim })
    }

    fn new(subject: &Value, total: u64, extractor: &dyn FeatureExtractor) -> Self {
        let dim = extractor.dim();
        let parts = json!({
            "ddil": VERSION,
            "subject": subject,
            "total": total,
            "extractor": extractor.id(),
            "input": extractor.input(),
            "variant": extractor.variant(),
            "dim": dim,
        });
        Self { parts, total, dim }
    }

    /// The name of the key's folder.
    fn name(&self) -> String {
        // Long enough to avoid collisions.
        hex(&Sha256::digest(self.parts.to_string()))[..32].to_owned()
    }
}

/// A folder with one subfolder of features per set of images.
///
/// # Example
///
/// A measurement that was stopped continues after the features that it has:
///
/// ```
/// use ddil_data::ImageFiles;
/// use ddil_evaluate::{FeatureKey, FeatureStore};
/// use ddil_metrics::{FeatureExtractor, RawPixels};
/// use tch::Tensor;
///
/// # let folder = tempfile::tempdir()?;
/// # let mut png = png::Encoder::new(std::fs::File::create(folder.path().join("a.png"))?, 1, 1);
/// # png.set_color(png::ColorType::Grayscale);
/// # png.write_header()?.write_image_data(&[9])?;
/// let extractor = RawPixels::new([1, 1, 1]);
/// let key = FeatureKey::of_files(&ImageFiles::in_folder(folder.path())?, &extractor)?;
/// let mut store = FeatureStore::in_folder(folder.path().join("features"));
/// store.open(&key, false)?.push(&Tensor::zeros([1, 1], tch::kind::FLOAT_CPU))?;
/// # let mut rows = store.open(&key, false)?;
/// # rows.push(&Tensor::zeros([1, 1], tch::kind::FLOAT_CPU))?;
/// # rows.finish()?;
/// assert_eq!(store.open(&key, false)?.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FeatureStore {
    folder: PathBuf,
    /// The smallest number of images of a set.
    least: u64,
    /// Folders to remove once the measurement is complete.
    temporary: Vec<PathBuf>,
}

impl FeatureStore {
    /// Features of sets with fewer images are not stored in the cache: computing them again takes little time.
    pub const MIN_IMAGES: u64 = 1000;

    /// A store in a folder, which is created if necessary.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), least: 0, temporary: Vec::new() }
    }

    /// The folder `features` in the user's cache; features in it that are older than 30 days are removed, except complete
    /// ones that are to be kept.
    pub fn in_cache() -> Self {
        let folder = cache_folder().join("features");
        let store = Self { least: Self::MIN_IMAGES, ..Self::in_folder(folder) };
        store.remove_old();
        store
    }

    /// Whether features of that many images are worth storing in the user's cache; a folder of one's own stores all.
    pub fn keeps(&self, images: u64) -> bool {
        images >= self.least
    }

    /// The rows of a key: those of an earlier process, or none yet. Those that are not to `keep` are removed by
    /// [`clear`](Self::clear), unless they were to be kept before.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`](crate::Error::InUse) if another process computes the same features,
    /// [`Error::Files`](crate::Error::Files) if the folder cannot be written.
    pub fn open(&mut self, key: &FeatureKey, keep: bool) -> Result<FeatureRows> {
        let folder = self.folder.join(key.name());
        let rows = FeatureRows::in_folder(&folder, key.total, key.dim)?;
        write_json(&folder.join(KEY), &key.parts)?;
        let kept = folder.join(KEPT);
        if keep {
            fs::write(&kept, "").map_err(FileError::io("write", &kept))?;
        } else if !kept.exists() {
            self.temporary.push(folder);
        }
        Ok(rows)
    }

    /// Removes the features that are of no use once a measurement is complete.
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files) if a folder cannot be removed.
    pub fn clear(&mut self) -> Result<()> {
        for folder in std::mem::take(&mut self.temporary) {
            if folder.exists() {
                fs::remove_dir_all(&folder).map_err(FileError::io("remove", &folder))?;
            }
        }
        Ok(())
    }

    fn remove_old(&self) {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for folder in entries.map(|entry| entry.path()).filter(|path| path.join(KEY).is_file()) {
            let modified = fs::metadata(&folder).and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            let stays = folder.join(KEPT).exists() && is_complete(&folder);
            if age > MAX_AGE && !stays {
                // A folder that cannot be removed is in nobody's way.
                let _ = fs::remove_dir_all(&folder);
            }
        }
    }
}

/// As [`signature`], of all files in the folders and their subfolders.
fn signature_of_folders(folders: &[&Path]) -> Result<String> {
    let mut files = Vec::new();
    folders.iter().try_for_each(|folder| collect(folder, &mut files))?;
    files.sort();
    signature(&files)
}

/// A checksum of the paths, sizes and times of files.
fn signature(paths: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for path in paths {
        let read = || FileError::io("read the metadata of", path);
        let metadata = fs::metadata(path).map_err(read())?;
        let modified = metadata.modified().map_err(read())?;
        let age = modified.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        // The same folder under another path, or from another working directory.
        let path = fs::canonicalize(path).map_err(read())?;
        hash.update(format!("{} {} {age}\n", path.display(), metadata.len()));
    }
    Ok(hex(&hash.finalize()))
}

/// Files below a folder. Linked folders are skipped: they may form a cycle.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(FileError::io("list", folder))? {
        let entry = entry.map_err(FileError::io("list", folder))?;
        let path = entry.path();
        if entry.file_type().map_err(FileError::io("read the type of", &path))?.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ddil_data::Captions;
    use ddil_metrics::{ImageInput, TorchScriptExtractor, TorchScriptOptions};
    use tch::{CModule, Device, Kind, Tensor};

    use super::*;
    use crate::prompts::EvaluationPrompts;

    type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

    /// A key has everything that features depend on.
    #[test]
    fn other_settings_have_other_keys() -> TestResult {
        let folder = tempfile::tempdir()?;
        let place = |name: &str| folder.path().join(name);
        fs::write(place("a.png"), "not decoded here")?;
        fs::write(place("prompts.txt"), "a cat")?;
        let images = [Tensor::ones([1, 3, 4, 4], (Kind::Float, Device::Cpu))];
        let mut means =
            |images: &[Tensor]| vec![images[0].mean_dim([2_i64, 3].as_slice(), false, Kind::Float)];
        CModule::create_by_tracing("network", "forward", &images, &mut means)?
            .save(place("network.pt"))?;
        let extractor = |return_features| {
            let mut options = TorchScriptOptions::default();
            (options.dim, options.return_features) = (Some(3), return_features);
            options.input = ImageInput::pytorch_fid();
            TorchScriptExtractor::from_file(place("network.pt"), options, Device::Cpu)
        };
        let (one, two) = (extractor(false)?, extractor(true)?);
        let files = ImageFiles::in_folder(folder.path())?;
        let prompts = EvaluationPrompts::from_file(&place("prompts.txt"), Captions::First, None)?;
        let keys = |extractor: &dyn FeatureExtractor, prompts: &EvaluationPrompts| -> Result<_> {
            let networks = PromptNetworks::new(Some(extractor), None, None);
            Ok([
                FeatureKey::of_files(&files, extractor)?,
                FeatureKey::of_prompted_files(&files, &prompts.set, networks)?,
            ])
        };
        let own = keys(&one, &prompts)?;
        assert_eq!(own, keys(&extractor(false)?, &prompts)?);
        let other = keys(&two, &prompts)?;
        assert!(own[0] != other[0] && own[1] != other[1]);
        for changed in [
            prompts.clone().with_text_around("A photo of", ""),
            prompts.clone().with_text_around("", "in red"),
            prompts.clone().with_negative_prompt(Some("")),
        ] {
            assert_ne!(own[1], keys(&one, &changed)?[1], "{:?}", changed.set);
        }
        Ok(())
    }
}
