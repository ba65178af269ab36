//! Features of image files.

use ddil_data::ImageFiles;
use ddil_metrics::FeatureExtractor;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Features of image files, `[n, dim]`, `Float`, on the CPU; images are decoded in `threads` threads.
///
/// `what` names the images for the monitor.
///
/// # Errors
///
/// Errors of the files and of the extractor; [`Error::Stopped`].
pub fn features_of_files(
    files: &ImageFiles,
    what: &str,
    extractor: &dyn FeatureExtractor,
    threads: usize,
    monitor: &mut dyn Monitor,
) -> Result<Tensor> {
    let (mut batches, mut done, total) = (Vec::new(), 0, files.len() as u64);
    // The number of images is counted here: nothing of the monitor may cross into the decoding threads.
    files.features(extractor, threads.max(1), |features| {
        done += features.size()[0].unsigned_abs();
        batches.push(features.to_device(Device::Cpu).to_kind(Kind::Float));
        monitor.note(what, done, total);
        if monitor.should_stop() && done < total {
            return Err(Error::Stopped { what: what.to_owned(), done, total });
        }
        Ok(())
    })?;
    Tensor::f_cat(&batches, 0).map_err(Error::torch("features_of_files"))
}
