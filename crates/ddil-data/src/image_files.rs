//! Image files of any sizes, decoded in threads and delivered in order.

use std::{
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread,
};

use ddil_metrics::FeatureExtractor;
use tch::{Kind, Tensor};

use crate::files::{is_image, list, read_opaque};
use crate::indices::random_order;
use crate::layout::Layout;
use crate::{Error, Result};

/// Images that a thread decodes ahead.
const AHEAD: usize = 4;
/// Number of images per pass of an extractor.
const BATCH: usize = 32;

/// The PNG and JPEG files of a folder and of its subfolders, sorted by path; images may differ in size and colour.
///
/// # Example
///
/// ```
/// use ddil_data::ImageFiles;
/// use ddil_metrics::{ImageInput, FeatureExtractor, RawPixels};
///
/// # let folder = tempfile::tempdir()?;
/// # for (name, side) in [("a.png", 4_u32), ("b.png", 6)] {
/// #     let mut png = png::Encoder::new(std::fs::File::create(folder.path().join(name))?, side, 2);
/// #     png.set_color(png::ColorType::Grayscale);
/// #     png.write_header()?.write_image_data(&vec![255; 2 * side as usize])?;
/// # }
/// let files = ImageFiles::in_folder(folder.path())?;
/// assert_eq!(files.len(), 2);
///
/// // Each image is converted in the thread that decoded it.
/// let input = ImageInput::clean_fid();
/// let mut sizes = Vec::new();
/// files.for_each(
///     2,
///     |image| Ok::<_, ddil_data::Error>(input.prepare(&image)?),
///     |_, image| {
///         sizes.push(image.size());
///         Ok(())
///     },
/// )?;
/// assert_eq!(sizes, [[1, 3, 299, 299], [1, 3, 299, 299]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ImageFiles {
    paths: Vec<PathBuf>,
}

impl ImageFiles {
    /// The images of a folder and of all its subfolders. Names that begin with a dot are ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] if a folder cannot be read, [`Error::NoImages`] if there are none.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        let (mut paths, mut folders) = (Vec::new(), vec![folder.to_owned()]);
        while let Some(next) = folders.pop() {
            for path in list(&next)? {
                // A link to a folder may lead in a circle.
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else if is_image(&path) {
                    paths.push(path);
                }
            }
        }
        if paths.is_empty() {
            return Err(Error::NoImages { path: folder.to_owned() });
        }
        paths.sort();
        Ok(Self { paths })
    }

    /// The same files in an order that depends on their number and `seed` alone, so that the first few are a random part.
    /// Those of a folder of classes are sorted by class.
    #[must_use]
    pub fn shuffled(&self, seed: u64) -> Self {
        let order = random_order(self.len() as i64, seed);
        Self { paths: order.into_iter().map(|index| self.paths[index as usize].clone()).collect() }
    }

    /// The files, sorted by path unless they were [`shuffled`](Self::shuffled).
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The number of files; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    /// The image at an index, `[1, 1 or 3, height, width]`, `Uint8`.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for an index outside of `0..len`, and errors of the file.
    pub fn image(&self, index: usize) -> Result<Tensor> {
        let len = self.len() as i64;
        let path = self.paths.get(index).ok_or(Error::Index { index: index as i64, len })?;
        to_tensor(path, &read_opaque(path)?)
    }

    /// The files at these indices, in this order.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for an index outside of `0..len`, and if there are none.
    pub fn select(&self, indices: &[usize]) -> Result<Self> {
        let len = self.len() as i64;
        let at = |&index: &usize| {
            let path = self.paths.get(index).cloned();
            path.ok_or(Error::Index { index: index as i64, len })
        };
        let paths: Vec<PathBuf> = indices.iter().map(at).collect::<Result<_>>()?;
        if paths.is_empty() {
            return Err(Error::Index { index: 0, len: 0 });
        }
        Ok(Self { paths })
    }

    /// The files after the first `count`, for work that continues; `None` if none are left.
    pub fn skip(&self, count: usize) -> Option<Self> {
        let paths = self.paths.get(count..)?.to_vec();
        (!paths.is_empty()).then_some(Self { paths })
    }

    /// Decodes every image in `threads` threads, converts it there with `convert`, and calls `consume` with the index and
    /// the result, in the order of the files.
    ///
    /// Transparency is dropped, as by PIL's `convert("RGB")`. JPEG files are oriented by their Exif data, which PIL does
    /// not do by itself. A thread decodes at most four images ahead, so that memory does not depend on the number of
    /// images.
    ///
    /// # Shapes and units
    ///
    /// - `convert` gets `[1, 1 or 3, height, width]`, `Uint8`, 0 to 255; one channel for grey files
    ///
    /// # Errors
    ///
    /// The first error in the order of the files: of a file, of `convert` or of `consume`; nothing is consumed after it.
    pub fn for_each<T: Send, E: From<Error> + Send>(
        &self,
        threads: usize,
        convert: impl Fn(Tensor) -> std::result::Result<T, E> + Sync,
        mut consume: impl FnMut(usize, T) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let read = |path: &Path| {
            let image = read_opaque(path).and_then(|image| to_tensor(path, &image));
            image.map_err(E::from).and_then(&convert)
        };
        in_order(&self.paths, threads, read, &mut consume)
    }

    /// Features of all images, in the order of the files.
    ///
    /// Images are decoded and converted in `threads` threads, and pass through the extractor in batches. `done` is called
    /// after each batch with its features, `[batch, dim]`; an error of it ends the work. Memory does not depend on the
    /// number of images.
    ///
    /// # Errors
    ///
    /// Errors of files, of the extractor, and of `done`.
    pub fn features<E: From<Error> + Send>(
        &self,
        extractor: &dyn FeatureExtractor,
        threads: usize,
        mut done: impl FnMut(&Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let input = extractor.input();
        let mut batch: Vec<Tensor> = Vec::with_capacity(BATCH);
        let last = self.len() - 1;
        self.for_each(
            threads,
            |image| Ok(input.prepare(&image).map_err(Error::from)?),
            |index, image| {
                let differs = batch.first().is_some_and(|first| first.size() != image.size());
                if differs {
                    let path = self.paths[index].clone();
                    let [found, expected] = [&image, &batch[0]].map(|image| {
                        let size = image.size();
                        format!("{}x{} pixels", size[3], size[2])
                    });
                    let expected = format!(
                        "{expected} like the images before: this extractor does not resize"
                    );
                    return Err(Error::Image { path, found, expected }.into());
                }
                batch.push(image);
                if batch.len() < BATCH && index < last {
                    return Ok(());
                }
                let images =
                    Tensor::f_cat(&batch, 0).map_err(Error::torch("ImageFiles::features"))?;
                batch.clear();
                let features = extractor.extract(&images).map_err(Error::from)?;
                done(&features)
            },
        )
    }
}

/// Calls `read` with every path in `threads` threads, and `consume` with the index and the result, in order.
///
/// # Errors
///
/// The first error in the order of the paths; nothing is consumed after it.
pub(crate) fn in_order<T: Send, E: From<Error> + Send>(
    paths: &[PathBuf],
    threads: usize,
    read: impl Fn(&Path) -> std::result::Result<T, E> + Sync,
    mut consume: impl FnMut(usize, T) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let threads = threads.clamp(1, paths.len().max(1));
    let before = ddil_libtorch::num_threads().map_err(Error::from)?;
    let (started, all_started) = channel();
    let read = &read;
    thread::scope(|scope| {
        let receivers: Vec<Receiver<_>> = (0..threads)
            .map(|first| {
                let (sender, receiver) = sync_channel(AHEAD);
                let own = paths.iter().skip(first).step_by(threads);
                let started = started.clone();
                scope.spawn(move || read_all(own, &started, read, &sender));
                receiver
            })
            .collect();
        // Part of the setting belongs to the process: it is restored once every thread has its own.
        all_started.iter().take(threads).for_each(drop);
        ddil_libtorch::set_num_threads(before).map_err(Error::from)?;
        // Returning drops the receivers, which ends the threads.
        (0..paths.len()).try_for_each(|index| {
            // A thread that ended without a result has panicked, and the scope passes that on.
            let Ok(item) = receivers[index % threads].recv() else { return Ok(()) };
            consume(index, item?)
        })
    })
}

/// Sends the results of one thread's paths, up to the first error.
fn read_all<'a, T, E: From<Error>>(
    paths: impl Iterator<Item = &'a PathBuf>,
    started: &Sender<()>,
    read: &impl Fn(&Path) -> std::result::Result<T, E>,
    sender: &SyncSender<std::result::Result<T, E>>,
) {
    // The images are what runs in parallel here, and not the operations on one of them.
    // Asking for the number makes libtorch adopt it in this thread, before the process's is restored.
    let single = ddil_libtorch::set_num_threads(1).and_then(|()| ddil_libtorch::num_threads());
    let _ = started.send(());
    if let Err(error) = single {
        let _ = sender.send(Err(Error::from(error).into()));
        return;
    }
    for path in paths {
        let item = read(path);
        let failed = item.is_err();
        if sender.send(item).is_err() || failed {
            return;
        }
    }
}

/// Rows of pixels as `[1, channels, height, width]`.
fn to_tensor(path: &Path, (layout, bytes): &(Layout, Vec<u8>)) -> Result<Tensor> {
    let size = [1, layout.height.into(), layout.width.into(), layout.channels as i64];
    Tensor::f_from_data_size(bytes, &size, Kind::Uint8)
        .and_then(|image| image.f_permute([0, 3, 1, 2])?.f_contiguous())
        .map_err(|_| Error::Image {
            path: path.to_owned(),
            found: layout.to_string(),
            expected: "an image that fits into memory".to_owned(),
        })
}
