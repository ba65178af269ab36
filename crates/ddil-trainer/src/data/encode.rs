//! Encodes images and prompts with the teacher's own encoders, once, into a folder.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use ddil_core::Conditioning;
use ddil_data::encoded::{FORMAT_VERSION, INFO, LATENTS, PROMPTS, SAMPLES, TEXTS};
use ddil_data::{
    CaptionedImage, CroppedImage, EncodedDataset, EncodedInfo, EncodedShape, TruncatedPrompts,
    read_cropped,
};
use ddil_files::{Invalid, TEMPORARY, hex, open_regular_file, parent, sync_folder, write_json};
use ddil_pipelines::{EncodedPrompts, PipelineParts, TextToImageComponents};
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::row_file::RowFile;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::run_folder;

/// Prompts per call of a text encoder.
const PROMPTS_AT_ONCE: usize = 32;
/// Pixels per call of the autoencoder, four images of 512x512; its layers need the most memory.
const PIXELS_AT_ONCE: i64 = 1 << 20;
/// Maximum number of images per call, however small.
const MAX_IMAGES_PER_CALL: i64 = 64;

/// Data to be encoded, unless a cache contains them already.
#[derive(Debug)]
pub(super) struct Encoding {
    /// Images below `images`, or no images and one prompt per sample.
    pub(super) samples: Vec<CaptionedImage>,
    /// The folder of the images; none for prompts alone.
    pub(super) images: Option<PathBuf>,
    /// Height and width to which images are resized.
    pub(super) size: [i64; 2],
    /// The conditioning that the teacher takes.
    pub(super) shape: EncodedShape,
    /// The cache folder, which may exist already.
    pub(super) folder: PathBuf,
    /// The setting that names that folder.
    pub(super) setting: &'static str,
    /// The key of the cache: what the encoded data depend on.
    pub(super) key: String,
}

/// State of a cache.
enum Cache {
    Absent,
    Fits,
    /// Made from other data.
    Other,
}

impl Encoding {
    /// The encoded data, from the cache if it matches.
    pub(super) fn open(
        &self,
        parts: impl Fn() -> Result<TextToImageComponents>,
        interrupt: &Interrupt,
    ) -> Result<EncodedDataset> {
        match self.cache()? {
            Cache::Fits => tracing::info!("using the encoded data in {}", self.folder.display()),
            Cache::Absent | Cache::Other => self.make(parts, interrupt)?,
        }
        EncodedDataset::open(&self.folder, Some(&self.shape)).map_err(|error| self.damaged(error))
    }

    /// Reads the state of the cache, and checks that it may be written.
    pub(super) fn ensure_cache(&self) -> Result<()> {
        self.cache().map(drop)
    }

    fn damaged(&self, source: ddil_data::Error) -> Error {
        Error::DamagedCache { path: self.folder.clone(), source: source.into() }
    }

    fn cache(&self) -> Result<Cache> {
        let folder = &self.folder;
        if !folder.join(INFO).exists() {
            let mut entries = match fs::read_dir(folder) {
                Ok(entries) => entries,
                Err(_) if !folder.exists() => return Ok(Cache::Absent),
                Err(error) => return Err(Error::io("list", folder)(error)),
            };
            return match entries.next() {
                None => Ok(Cache::Absent),
                Some(_) => Err(self.foreign("other files")),
            };
        }
        match EncodedInfo::from_folder(folder).map_err(|error| self.damaged(error))?.key {
            None => Err(self.foreign(
                "encoded data that are not a cache; to read them, set data.kind = \"latents\"",
            )),
            Some(key) if key == self.key => Ok(Cache::Fits),
            Some(_) => Ok(Cache::Other),
        }
    }

    /// A folder that is not a cache is never overwritten.
    fn foreign(&self, found: &str) -> Error {
        Error::Invalid(Invalid::new(
            self.setting,
            format!("{}, a folder that contains {found}", self.folder.display()),
            "a cache, an empty folder, or a new one",
        ))
    }

    /// Writes the cache under a temporary name and moves it into place once it is complete.
    fn make(
        &self,
        parts: impl Fn() -> Result<TextToImageComponents>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let name = self.folder.file_name().unwrap_or_default().to_string_lossy();
        let aside = self.folder.with_file_name(format!("{TEMPORARY}{name}"));
        fs::create_dir_all(&aside).map_err(Error::io("create", &aside))?;
        let _lock = run_folder::lock(&aside)?;
        // Another process may have been faster.
        match self.cache()? {
            Cache::Fits => {}
            cache => {
                let path = self.folder.display();
                if matches!(cache, Cache::Other) {
                    tracing::info!(
                        "the cache in {path} was made from other files or settings and will be rebuilt"
                    );
                }
                tracing::info!("encodes {} samples into {path}", self.samples.len());
                let encoded = self.encode(&parts()?, &aside, interrupt);
                let placed = encoded.and_then(|()| self.put_in_place(&aside));
                if placed.is_err() {
                    // An incomplete cache is useless.
                    let _ = fs::remove_dir_all(&aside);
                }
                return placed;
            }
        }
        match fs::remove_dir_all(&aside) {
            // The other process has just moved it into place.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(Error::io("remove", &aside)),
        }
    }

    fn put_in_place(&self, aside: &Path) -> Result<()> {
        let lock = aside.join(run_folder::LOCK);
        fs::remove_file(&lock).map_err(Error::io("remove", &lock))?;
        sync_folder(aside)?;
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder).map_err(Error::io("remove", &self.folder))?;
        }
        fs::rename(aside, &self.folder).map_err(Error::io("rename", aside))?;
        Ok(sync_folder(parent(&self.folder))?)
    }

    fn encode(
        &self,
        parts: &TextToImageComponents,
        aside: &Path,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let (texts, rows) = self.distinct();
        let truncated = encode_prompts(parts, &texts, aside, interrupt)?;
        let time_ids = if let Some(images) = &self.images {
            self.encode_images(parts, images, aside, interrupt)?
        } else {
            let [height, width] = self.size.map(|side| side as f32);
            vec![[height, width, 0.0, 0.0, height, width]; self.samples.len()]
        };
        let mut samples = vec![("prompts".to_owned(), rows)];
        if self.shape.pooled_width.is_some() {
            let time_ids = Tensor::f_from_slice(&time_ids.concat())
                .and_then(|ids| ids.f_view([-1, 6]))
                .map_err(Error::torch("encode"))?;
            samples.push(("time_ids".to_owned(), time_ids));
        }
        ddil_models::weights::save(&samples, aside.join(SAMPLES), &BTreeMap::new())?;
        write_json(&aside.join(TEXTS), &texts)?;
        let info = EncodedInfo {
            format_version: FORMAT_VERSION,
            image_size: self.size,
            scaling: self.shape.scaling.clone(),
            num_samples: self.samples.len() as i64,
            num_prompts: texts.len() as i64,
            empty_prompt: Some(0),
            key: Some(self.key.clone()),
            truncated,
        };
        // Written last: a folder that contains this file is complete.
        Ok(write_json(&aside.join(INFO), &info)?)
    }

    /// The distinct texts, the empty prompt first, and the rows of each sample's captions.
    fn distinct(&self) -> (Vec<&str>, Tensor) {
        let mut texts = vec![""];
        let mut known = BTreeMap::new();
        let most = self.samples.iter().map(|sample| sample.texts.len()).max().unwrap_or(1);
        let mut rows = Vec::with_capacity(self.samples.len() * most);
        for sample in &self.samples {
            for text in &sample.texts {
                let row = *known.entry(text.as_str()).or_insert_with(|| {
                    texts.push(text);
                    texts.len() as i64 - 1
                });
                rows.push(row);
            }
            rows.extend(std::iter::repeat_n(-1, most - sample.texts.len()));
        }
        (texts, Tensor::from_slice(&rows).view([-1, most as i64]))
    }

    /// Returns the size and crop conditioning of each image.
    fn encode_images(
        &self,
        parts: &TextToImageComponents,
        images: &Path,
        aside: &Path,
        interrupt: &Interrupt,
    ) -> Result<Vec<[f32; 6]>> {
        let n = self.samples.len();
        let [height, width] = self.size;
        let [channels, latent_height, latent_width] = parts.latent_shape(self.size)?;
        let shape = vec![n as i64, channels, latent_height, latent_width];
        let names = [("mean", shape.clone()), ("std", shape)];
        let mut file = RowFile::create(&aside.join(LATENTS), &names)?;
        let mut progress = Progress::new("encode images", 0, n as u64);
        let at_once = (PIXELS_AT_ONCE / (height * width)).clamp(1, MAX_IMAGES_PER_CALL) as usize;
        let (mut time_ids, mut enlarged) = (Vec::with_capacity(n), 0);
        for chunk in self.samples.chunks(at_once) {
            let first = time_ids.len();
            ensure_not_interrupted(interrupt, "encoding images", first, n)?;
            let read = |sample: &CaptionedImage| {
                read_cropped(&images.join(&sample.file_name), self.shape.image_channels, self.size)
            };
            let cropped: Vec<CroppedImage> = chunk.iter().map(read).collect::<Result<_, _>>()?;
            let pixels: Vec<&Tensor> = cropped.iter().map(|image| &image.pixels).collect();
            let pixels = Tensor::f_stack(&pixels, 0).map_err(Error::torch("encode"))?;
            let [mean, std] = parts.latent_distribution(&pixels)?;
            file.write("mean", first as i64, &mean)?;
            file.write("std", first as i64, &std)?;
            for CroppedImage { original_size, crop_offset, .. } in cropped {
                let is_small = original_size[0] < height || original_size[1] < width;
                enlarged += usize::from(is_small);
                let numbers = [original_size, crop_offset, self.size].concat();
                time_ids.push(std::array::from_fn(|i| numbers[i] as f32));
            }
            progress.update(time_ids.len() as u64, &[]);
        }
        progress.finish();
        if enlarged > 0 {
            tracing::warn!(
                "{enlarged} of {n} images are smaller than {width}x{height} and were enlarged"
            );
        }
        file.finish()?;
        Ok(time_ids)
    }
}

/// Writes the text embeddings of every text to a file; the first text is the empty prompt. Returns the truncations.
fn encode_prompts(
    parts: &TextToImageComponents,
    texts: &[&str],
    aside: &Path,
    interrupt: &Interrupt,
) -> Result<Option<TruncatedPrompts>> {
    let (n, path) = (texts.len(), aside.join(PROMPTS));
    let mut progress = Progress::new("encode prompts", 0, n as u64);
    let empty = parts.empty()?;
    let shape = |part: &Tensor| [&[n as i64], &part.size()[1..]].concat();
    let rows: Vec<_> = empty.parts().map(|(name, part)| (name, shape(part))).collect();
    let mut file = RowFile::create(&path, &rows)?;
    let mut first = 0;
    let mut truncated = None;
    let mut write = |conditioning: &Conditioning, first: usize| {
        conditioning.parts().try_for_each(|(name, part)| file.write(name, first as i64, part))
    };
    write(&empty, 0)?;
    first += 1;
    for chunk in texts[1..].chunks(PROMPTS_AT_ONCE) {
        ensure_not_interrupted(interrupt, "encoding prompts", first, n)?;
        let EncodedPrompts { conditioning, truncated: cut } = parts.encode(chunk)?;
        write(&conditioning, first)?;
        note_truncated(&mut truncated, chunk, cut);
        first += chunk.len();
        progress.update(first as u64, &[]);
    }
    progress.finish();
    file.finish()?;
    Ok(truncated)
}

/// Counts truncated prompts and keeps the first.
fn note_truncated(
    truncated: &mut Option<TruncatedPrompts>,
    texts: &[&str],
    cut: Vec<Option<String>>,
) {
    for (text, cut) in texts.iter().zip(cut) {
        let Some(cut_off) = cut else { continue };
        let prompt = (*text).to_owned();
        truncated.get_or_insert_with(|| TruncatedPrompts { count: 0, prompt, cut_off }).count += 1;
    }
}

fn ensure_not_interrupted(
    interrupt: &Interrupt,
    action: &'static str,
    done: usize,
    total: usize,
) -> Result<()> {
    if interrupt.is_requested() {
        return Err(Error::Interrupted { action, done, total });
    }
    Ok(())
}

/// The inputs of encoded data: captions, the images, the size to which they are resized, and the files of the encoders.
///
/// Sizes and times alone do not tell files apart: archives and containers give all files one time. Of the encoders the
/// whole content counts, of each image its time and its first and last bytes.
pub(super) fn key(
    samples: &[CaptionedImage],
    images: Option<&Path>,
    size: [i64; 2],
    pipeline_parts: &PipelineParts,
) -> Result<String> {
    let mut hash = Sha256::new();
    let mut note = |text: String| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    note(format!("{FORMAT_VERSION} {size:?} {:?}", images.is_some()));
    for sample in samples {
        if let Some(images) = images {
            note(signature(images, &sample.file_name)?);
            let extension = sample.file_name.extension();
            if !extension.is_some_and(|end| end.eq_ignore_ascii_case("png")) {
                // The pixels of a JPEG depend on the decoder; caches of an earlier one are not used.
                note("libjpeg-turbo".to_owned());
            }
        }
        note(format!("{:?}", sample.texts));
    }
    note(pipeline_parts.settings());
    for name in pipeline_parts.text_parts() {
        let mut files = Vec::new();
        collect(pipeline_parts.path(), Path::new(&name), &mut files)?;
        files.sort();
        for file in files {
            note(encoder_signature(pipeline_parts.path(), &file)?);
        }
    }
    Ok(hex(&hash.finalize()))
}

/// Bytes at each end of an image that count. The last ones contain the checksum of a PNG, and the end of a compressed
/// stream depends on what is before it.
const END_BYTES: u64 = 16 << 10;

/// Name, size, time, and first and last bytes of an image.
fn signature(folder: &Path, name: &Path) -> Result<String> {
    let path = folder.join(name);
    let read = || -> io::Result<_> {
        let mut file = open_regular_file(&path)?;
        let metadata = file.metadata()?;
        let mut hash = Sha256::new();
        io::copy(&mut (&file).take(END_BYTES), &mut hash)?;
        file.seek(SeekFrom::Start(metadata.len().saturating_sub(END_BYTES)))?;
        io::copy(&mut file.take(END_BYTES), &mut hash)?;
        Ok((metadata.len(), metadata.modified()?, hex(&hash.finalize())))
    };
    let (len, modified, ends) = read().map_err(Error::io("read", &path))?;
    let age = modified.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    Ok(format!("{} {len} {age} {ends}", name.display()))
}

/// Name and content of a file of an encoder; of a file that is not read, such as a pickle, name and size.
fn encoder_signature(folder: &Path, name: &Path) -> Result<String> {
    let path = folder.join(name);
    let is_read = ["safetensors", "json", "txt"];
    let extension = name.extension().and_then(|end| end.to_str()).unwrap_or_default();
    let read = || -> io::Result<String> {
        let mut file = open_regular_file(&path)?;
        if !is_read.contains(&extension) {
            return Ok(file.metadata()?.len().to_string());
        }
        let mut hash = Sha256::new();
        io::copy(&mut file, &mut hash)?;
        Ok(hex(&hash.finalize()))
    };
    Ok(format!("{} {}", name.display(), read().map_err(Error::io("read", &path))?))
}

/// Files below a folder, by their paths relative to `root`. Linked folders are skipped: they may form a cycle.
fn collect(root: &Path, folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let path = root.join(folder);
    for entry in fs::read_dir(&path).map_err(Error::io("list", &path))? {
        let entry = entry.map_err(Error::io("list", &path))?;
        let name = folder.join(entry.file_name());
        if entry.file_type().map_err(Error::io("read the type of", &path))?.is_dir() {
            collect(root, &name, files)?;
        } else {
            files.push(name);
        }
    }
    Ok(())
}
