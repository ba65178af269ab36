//! Images for a page.

use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::read_bounded;
use ddil_pipelines::{Image, layout};
use serde::Serialize;
use tch::{Kind, Tensor};

use super::page::png_address;
use crate::error::{Error, Result};

/// The sample grids of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Samples {
    /// In order of their steps.
    frames: Vec<Frame>,
    /// A grid of the teacher, if the folder has one.
    teacher: Option<TeacherGrid>,
    /// Number of grids that were left out.
    num_left_out: usize,
}

/// A sample grid.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Frame {
    step: u64,
    /// The image itself, as an address.
    src: String,
}

/// A grid of the teacher's samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct TeacherGrid {
    src: String,
    /// How it was drawn, if the file states it.
    caption: Option<String>,
}

impl TeacherGrid {
    fn read(path: &Path) -> Result<Self> {
        let png = content(path)?;
        Ok(Self { src: png_address(&png), caption: Image::description_of(&png) })
    }
}

/// A grid of the teacher's samples among those of a run.
const TEACHER: &str = "teacher.png";
/// The maximum number of grids in a page, and their size in all.
const MAX_FRAMES: usize = 24;
const MAX_BYTES: u64 = 12_000_000;

impl Samples {
    /// Reads the grids of a run, and leaves out some if they are many: the rest are evenly spaced, with the first and the
    /// last. A single one that is too large is left out too, also that of the teacher.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let found = grids(folder);
        let len = |path: &Path| fs::metadata(path).map_or(0, |found| found.len());
        let fits = |path: &Path| len(path) <= MAX_BYTES;
        let grids: Vec<_> = found.iter().filter(|(_, path)| fits(path)).collect();
        let bytes: u64 = grids.iter().map(|(_, path)| len(path)).sum();
        let mean = bytes / grids.len().max(1) as u64;
        let most = MAX_FRAMES.min((MAX_BYTES / mean.max(1)) as usize).max(1);
        let kept = evenly(grids.len(), most);
        let frame = |index: &usize| {
            let (step, path) = grids[*index];
            Ok(Frame { step: *step, src: address(path)? })
        };
        let frames = kept.iter().map(frame).collect::<Result<Vec<_>>>()?;
        let teacher = Some(folder.join(TEACHER)).filter(|path| path.is_file());
        let shown = teacher.as_deref().filter(|path| fits(path));
        let num_left_out =
            found.len() - frames.len() + usize::from(teacher.is_some() && shown.is_none());
        let teacher = shown.map(TeacherGrid::read).transpose()?;
        Ok(Self { frames, teacher, num_left_out })
    }
}

/// The grids of a folder with their steps, in order.
fn grids(folder: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut grids: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let step = name.to_str()?.strip_prefix("step_")?.strip_suffix(".png")?;
            Some((step.parse().ok()?, entry.path()))
        })
        .collect();
    grids.sort();
    grids
}

/// At most `most` of `count` indices, evenly spaced, with the first and the last.
fn evenly(count: usize, most: usize) -> Vec<usize> {
    if count <= most {
        return (0..count).collect();
    }
    if most < 2 {
        return vec![count - 1];
    }
    (0..most).map(|index| index * (count - 1) / (most - 1)).collect()
}

fn address(path: &Path) -> Result<String> {
    Ok(png_address(&content(path)?))
}

fn content(path: &Path) -> Result<Vec<u8>> {
    read_bounded(path, MAX_BYTES).map_err(Error::io("read", path))
}

/// The maximum side of an image in a strip, in pixels.
const MAX_SIDE: i64 = 128;

/// Some images in one row, as an address; large ones are reduced.
///
/// # Errors
///
/// Images of another shape; errors of libtorch.
pub(super) fn strip(images: &Tensor) -> Result<String> {
    let size = images.size();
    let side = size.iter().skip(2).copied().max().unwrap_or(1);
    let factor = (side as u64).div_ceil(MAX_SIDE as u64) as i64;
    let reduced = if factor > 1 && size.len() == 4 {
        let pooled = images.f_to_kind(Kind::Float).and_then(|images| {
            images.f_avg_pool2d([factor; 2], [factor; 2], [0; 2], true, false, None)
        });
        pooled.map_err(Error::torch("strip"))?
    } else {
        images.shallow_clone()
    };
    let columns = size.first().copied().unwrap_or(1).max(1) as u32;
    Ok(png_address(&Image::grid(&reduced, layout(columns))?.to_png()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_of_many_are_evenly_spaced() {
        assert_eq!(evenly(3, 24), [0, 1, 2]);
        assert_eq!(evenly(9, 5), [0, 2, 4, 6, 8]);
        assert_eq!(evenly(100, 4), [0, 33, 66, 99]);
        assert_eq!((evenly(100, 1), evenly(0, 4)), (vec![99], vec![]));
    }

    #[test]
    fn a_grid_that_is_too_large_is_counted_whoever_drew_it() -> Result<()> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        let large = |name: &str| {
            let file = fs::File::create(at(name)).expect("the folder can be written");
            file.set_len(MAX_BYTES + 1).expect("a sparse file");
        };
        let found = |samples: &Samples| {
            (samples.frames.len(), samples.teacher.is_some(), samples.num_left_out)
        };
        fs::write(at("step_0000001.png"), "small").expect("the folder can be written");
        assert_eq!(found(&Samples::read(folder.path())?), (1, false, 0));
        fs::write(at(TEACHER), "small").expect("the folder can be written");
        assert_eq!(found(&Samples::read(folder.path())?), (1, true, 0));
        large(TEACHER);
        assert_eq!(found(&Samples::read(folder.path())?), (1, false, 1));
        large("step_0000002.png");
        assert_eq!(found(&Samples::read(folder.path())?), (1, false, 2));
        Ok(())
    }

    #[test]
    fn large_images_are_reduced() -> Result<()> {
        let small = strip(&Tensor::zeros([3, 1, 8, 8], tch::kind::FLOAT_CPU))?;
        let large = strip(&Tensor::zeros([3, 3, 1024, 1024], tch::kind::FLOAT_CPU))?;
        assert!(small.starts_with("data:image/png;base64,iVBOR") && large.len() < 100_000);
        Ok(())
    }
}
