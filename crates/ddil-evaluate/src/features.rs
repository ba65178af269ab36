//! Features of image files and of samples, batch by batch.

use ddil_data::{ImageDataset, ImageFiles};
use ddil_metrics::{FeatureExtractor, quantize};
use tch::{Device, Kind, Tensor};

use crate::drawing::Drawing;
use crate::error::{Error, Result};
use crate::feature_rows::FeatureRows;
use crate::monitor::Monitor;

/// Images per call of an extractor.
const BATCH: i64 = 250;

/// Features of image files, `[n, dim]`, `Float`, on the CPU; images are decoded in `threads` threads.
///
/// Only the files after those whose features are in `rows` are read. `what` names the images for the monitor.
///
/// # Errors
///
/// Errors of the files and of the extractor; [`Error::Stopped`].
pub fn features_of_files(
    files: &ImageFiles,
    what: &str,
    extractor: &dyn FeatureExtractor,
    threads: usize,
    mut rows: FeatureRows,
    monitor: &mut dyn Monitor,
) -> Result<Tensor> {
    let total = files.len() as u64;
    if let Some(files) = files.skip(rows.len() as usize) {
        files.features(extractor, threads.max(1), |features| {
            rows.push(features)?;
            let done = rows.len();
            note(what, done, &mut rows, total, monitor)
        })?;
    }
    rows.finish()
}

/// Features of the images of a data set, `[n, dim]`, `Float`, on the CPU. `what` names the images for the monitor.
///
/// # Errors
///
/// Errors of the extractor; [`Error::Stopped`].
pub(crate) fn features_of_dataset(
    images: &ImageDataset,
    what: &str,
    extractor: &dyn FeatureExtractor,
    monitor: &mut dyn Monitor,
) -> Result<Tensor> {
    let (len, mut rows) = (images.len(), FeatureRows::in_memory());
    for start in (0..len).step_by(BATCH as usize) {
        let batch = images.range(start, BATCH.min(len - start))?.x0;
        rows.push(&features_of_images(&batch, extractor)?)?;
        let done = rows.len();
        note(what, done, &mut rows, len.unsigned_abs(), monitor)?;
    }
    rows.finish()
}

/// Features of a drawing's samples as stored in a PNG, `[n, dim]`, `Float`, on the CPU.
///
/// Only the samples after those whose features are in `rows` are drawn. `drawn` is called with the index of the first
/// sample of each batch and with the batch.
///
/// # Errors
///
/// [`Error::NotFinite`] for samples with NaN or infinite values; errors of the network and of the extractor;
/// [`Error::Stopped`].
pub fn features_of_drawing(
    drawing: &Drawing<'_>,
    what: &str,
    extractor: &dyn FeatureExtractor,
    mut rows: FeatureRows,
    monitor: &mut dyn Monitor,
    mut drawn: impl FnMut(u64, &Tensor),
) -> Result<Tensor> {
    let total = u64::from(drawing.end());
    let (mut waiting, mut next): (Vec<Tensor>, u64) = (Vec::new(), rows.len());
    drawing.for_each(next as u32, |images| {
        drawn(next, &images);
        ensure_finite(what, &images)?;
        next += images.size()[0].unsigned_abs();
        waiting.push(images);
        let count: i64 = waiting.iter().map(|images| images.size()[0]).sum();
        if count < BATCH && next < total {
            return note(what, next, &mut rows, total, monitor);
        }
        let images = Tensor::f_cat(&waiting, 0).map_err(Error::torch("features_of_drawing"))?;
        // Always the same batches, so that rounding does not depend on where a measurement was stopped.
        let whole = if next < total { count / BATCH * BATCH } else { count };
        rows.push(&features_as_stored(&images.narrow(0, 0, whole), extractor)?)?;
        waiting = if whole < count { vec![images.narrow(0, whole, count - whole)] } else { vec![] };
        note(what, next, &mut rows, total, monitor)
    })?;
    rows.finish()
}

/// Features of images as stored in a PNG, in batches: `[n, channels, height, width]` in `[-1, 1]`, rounded to 8 bits.
///
/// # Errors
///
/// Errors of the extractor.
pub fn features_as_stored(images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Tensor> {
    features_of_images(&quantize(images)?, extractor)
}

/// Features in batches, so that memory does not grow with the number of images.
pub(crate) fn features_of_images(
    images: &Tensor,
    extractor: &dyn FeatureExtractor,
) -> Result<Tensor> {
    ddil_libtorch::ensure_dense("features_of_images", "images", images)?;
    if images.dim() == 0 {
        // An error with the shape.
        return Ok(extractor.features(images)?);
    }
    let _no_grad = tch::no_grad_guard();
    let batches: Result<Vec<Tensor>> = images
        .split(BATCH, 0)
        .iter()
        .map(|batch| Ok(extractor.features(batch)?.to_kind(Kind::Float).to_device(Device::Cpu)))
        .collect();
    Ok(Tensor::cat(&batches?, 0))
}

/// Shows the progress; saves the rows and ends with an error if a stop was requested.
fn note(
    what: &str,
    shown: u64,
    rows: &mut FeatureRows,
    total: u64,
    monitor: &mut dyn Monitor,
) -> Result<()> {
    monitor.note(what, shown, total);
    let done = rows.len();
    if done >= total || !monitor.should_stop() {
        return Ok(());
    }
    rows.save()?;
    Err(Error::Stopped { what: what.to_owned(), done, total, is_kept: rows.are_kept() })
}

fn ensure_finite(what: &str, images: &Tensor) -> Result<()> {
    if is_finite(images)? {
        return Ok(());
    }
    Err(Error::NotFinite { what: what.to_owned() })
}

/// Whether every value is finite.
///
/// # Errors
///
/// [`Error::Argument`] for a tensor that is not dense.
pub fn is_finite(images: &Tensor) -> Result<bool> {
    ddil_libtorch::ensure_dense("is_finite", "images", images)?;
    let finite = || images.f_isfinite()?.f_all()?.f_int64_value(&[]);
    Ok(finite().map_err(Error::torch("is_finite"))? != 0)
}
