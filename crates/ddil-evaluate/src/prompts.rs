//! The prompts of a measurement, and the images of them in files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_data::{Captions, ImageFiles, Prompt, read_prompts};
use ddil_files::{Invalid, hex};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Result;

/// The most prompts and images per prompt: the seeds of all images are different up to there.
const MAX_PROMPTS: usize = 1 << 20;
const MAX_PER_PROMPT: u32 = 100;
/// The number of names in a message.
const SHOWN: usize = 5;

/// Which prompts images were measured with, as in `results.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptSet {
    /// The name of the file.
    pub file: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Which captions of an image are prompts.
    pub captions: Captions,
    /// The number of prompts that were used, the first ones of the file.
    pub count: u64,
    /// The number of images per prompt.
    pub images_per_prompt: u32,
    /// The text before each prompt when its images are drawn; empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prefix: String,
    /// The text after each prompt when its images are drawn; empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub suffix: String,
    /// The prompt that guidance leads away from; none for the model's empty prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
}

impl PromptSet {
    /// The text from which the images of a prompt are drawn: the prompt with the prefix and the suffix.
    pub fn text_of(&self, prompt: &Prompt) -> String {
        format!("{}{}{}", self.prefix, prompt.text, self.suffix)
    }

    /// Whether images are drawn from the prompts alone, guided by the model's own empty prompt.
    pub fn is_plain(&self) -> bool {
        self.prefix.is_empty() && self.suffix.is_empty() && self.negative_prompt.is_none()
    }
}

/// The prompts of a file, for a measurement.
///
/// # Example
///
/// ```
/// use ddil_data::Captions;
/// use ddil_evaluate::EvaluationPrompts;
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("prompts.txt");
/// std::fs::write(&path, "a cat\na dog\n")?;
/// let prompts = EvaluationPrompts::from_file(&path, Captions::First, None)?;
/// assert_eq!((prompts.prompts[1].text.as_str(), prompts.set.count), ("a dog", 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EvaluationPrompts {
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// What identifies them in a report; one image per prompt.
    pub set: PromptSet,
}

impl EvaluationPrompts {
    /// The prompts of a file, or the first `max` of them; the forms of the file are those of [`read_prompts`].
    ///
    /// # Errors
    ///
    /// Those of [`read_prompts`]; [`Error::Invalid`](crate::Error::Invalid) for no or more than 1048576 prompts.
    pub fn from_file(path: &Path, captions: Captions, max: Option<u32>) -> Result<Self> {
        let mut prompts = read_prompts(path, captions)?;
        prompts.truncate(max.map_or(usize::MAX, |max| max as usize));
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            let found = format!("{} prompts of {}", prompts.len(), path.display());
            return Err(Invalid::new("prompts", found, format!("1 to {MAX_PROMPTS}")).into());
        }
        let bytes = fs::read(path).map_err(ddil_files::Error::io("read", path))?;
        let set = PromptSet {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            sha256: hex(&Sha256::digest(bytes)),
            captions,
            count: prompts.len() as u64,
            images_per_prompt: 1,
            prefix: String::new(),
            suffix: String::new(),
            negative_prompt: None,
        };
        Ok(Self { prompts, set })
    }

    /// With a text before and after each prompt when its images are drawn; images are compared with the prompt alone.
    ///
    /// A space is added where the texts would run together: after the prefix unless it ends with white space, and before
    /// the suffix unless it begins with white space or punctuation.
    #[must_use]
    pub fn with_text_around(mut self, prefix: &str, suffix: &str) -> Self {
        let is_apart = |c: char| c.is_whitespace() || c.is_ascii_punctuation();
        let after =
            if prefix.is_empty() || prefix.ends_with(char::is_whitespace) { "" } else { " " };
        let before = if suffix.is_empty() || suffix.starts_with(is_apart) { "" } else { " " };
        self.set.prefix = format!("{prefix}{after}");
        self.set.suffix = format!("{before}{suffix}");
        self
    }

    /// With a prompt that guidance leads away from.
    #[must_use]
    pub fn with_negative_prompt(mut self, negative: Option<&str>) -> Self {
        self.set.negative_prompt = negative.map(str::to_owned);
        self
    }

    /// With another number of images per prompt.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) with the setting `images_per_prompt` for 0 or more than 100.
    pub fn with_images_per_prompt(mut self, images: u32) -> Result<Self> {
        if !(1..=MAX_PER_PROMPT).contains(&images) {
            let expected = format!("1 to {MAX_PER_PROMPT}");
            return Err(Invalid::new("images_per_prompt", images, expected).into());
        }
        self.set.images_per_prompt = images;
        Ok(self)
    }

    /// The number of images: that of prompts times that of images per prompt.
    pub fn num_images(&self) -> u64 {
        self.set.count * u64::from(self.set.images_per_prompt)
    }

    /// Matches the images of a folder with the prompts: the files in the order of the prompts, the images of a prompt one
    /// after the other, and the prompts that have images.
    ///
    /// By name: the image of a prompt is the file whose name without ending is that of the prompt's image, leading
    /// zeros of numbers aside, or begins with it and ends with `-` or `_` and a number, for several images per prompt.
    /// Prompts without names of images match the files `000000.png`, `000001.png`, .. as `ddil sample --folder` writes
    /// them, the images of a prompt in sequence.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) with the setting `prompts` for files without a prompt, prompts with
    /// different numbers of images, several prompts for one image, and no match at all.
    pub fn matched(self, files: &ImageFiles) -> Result<(Self, ImageFiles)> {
        let named = self.prompts.iter().all(|prompt| prompt.image.is_some());
        let order = if named { self.by_name(files)? } else { self.by_number(files)? };
        let per_prompt = order.iter().map(Vec::len).find(|&count| count > 0).unwrap_or(0);
        let uneven: Vec<&str> = self
            .prompts
            .iter()
            .zip(&order)
            .filter(|(_, files)| !files.is_empty() && files.len() != per_prompt)
            .map(|(prompt, _)| prompt.text.as_str())
            .collect();
        if !uneven.is_empty() {
            let found = format!(
                "{} prompts with another number of images than {per_prompt}, that of the first one: {}",
                uneven.len(),
                some(&uneven)
            );
            return Err(Invalid::new("prompts", found, "as many images for each prompt").into());
        }
        let prompts = self.prompts.into_iter().zip(&order).filter(|(_, files)| !files.is_empty());
        let prompts: Vec<Prompt> = prompts.map(|(prompt, _)| prompt).collect();
        let set = PromptSet { count: prompts.len() as u64, ..self.set };
        let matched = Self { prompts, set }.with_images_per_prompt(per_prompt as u32)?;
        let order: Vec<usize> = order.into_iter().flatten().collect();
        Ok((matched, files.select(&order)?))
    }

    /// The indices of the files of each prompt.
    fn by_name(&self, files: &ImageFiles) -> Result<Vec<Vec<usize>>> {
        let mut prompts: BTreeMap<String, usize> = BTreeMap::new();
        for (index, prompt) in self.prompts.iter().enumerate() {
            let name = stem(Path::new(prompt.image.as_deref().unwrap_or_default()));
            if prompts.insert(name, index).is_some() {
                let image = prompt.image.as_deref().unwrap_or_default();
                let found = format!("several prompts for the image {image}");
                let expected = "one per image of a folder; --captions first takes the first";
                return Err(Invalid::new("prompts", found, expected).into());
            }
        }
        let mut of_prompts = vec![Vec::new(); self.prompts.len()];
        let mut unmatched = Vec::new();
        for (index, path) in files.paths().iter().enumerate() {
            let name = stem(path);
            let found = prompts.get(&name).or_else(|| prompts.get(&without_number(&name)?));
            match found {
                Some(&prompt) => of_prompts[prompt].push(index),
                None => unmatched.push(name),
            }
        }
        if unmatched.is_empty() {
            return Ok(of_prompts);
        }
        let found = format!(
            "a file without the names of {} of {} images: {}",
            unmatched.len(),
            files.len(),
            some(&unmatched)
        );
        let expected = "a prompt for each image, with its name in `file_name` or COCO's `images`";
        Err(Invalid::new("prompts", found, expected).into())
    }

    /// The same for files that are numbered from 0, as many for each prompt.
    fn by_number(&self, files: &ImageFiles) -> Result<Vec<Vec<usize>>> {
        let (count, prompts) = (files.len(), self.prompts.len());
        let numbers: Option<Vec<usize>> =
            files.paths().iter().map(|path| stem(path).parse().ok()).collect();
        let mut places = vec![None; count];
        for (index, number) in numbers.iter().flatten().enumerate() {
            if let Some(place) = places.get_mut(*number) {
                *place = Some(index);
            }
        }
        let places: Option<Vec<usize>> = places.into_iter().collect();
        match places {
            Some(places) if numbers.is_some() && count.is_multiple_of(prompts) => {
                Ok(places.chunks(count / prompts).map(<[usize]>::to_vec).collect())
            }
            _ => {
                let found =
                    format!("{prompts} prompts without names of images, for {count} images");
                let expected = "names of the images, in `file_name` or COCO's `images`; or images numbered from 0 in the \
                                order of the prompts, as `ddil sample --prompts-file .. --folder ..` writes them, as \
                                many for each";
                Err(Invalid::new("prompts", found, expected).into())
            }
        }
    }
}

/// The name without ending; of a number, without leading zeros.
fn stem(path: &Path) -> String {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let is_number = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number {
        return name;
    }
    let digits = name.trim_start_matches('0');
    if digits.is_empty() { "0".to_owned() } else { digits.to_owned() }
}

/// `name` of `name-3` or `name_3`.
fn without_number(name: &str) -> Option<String> {
    let (first, number) = name.rsplit_once(['-', '_'])?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| stem(Path::new(&format!("{first}.x"))))
}

/// The first few of many.
fn some(names: &[impl AsRef<str>]) -> String {
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    shown.join(", ") + if names.len() > SHOWN { ", .." } else { "" }
}
