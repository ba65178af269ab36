//! `model_index.json`: the class of a pipeline and the parts of its folder.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use ddil_files::{Invalid, read_small_json, write_json};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// The name of the file.
pub(super) const FILE_NAME: &str = "model_index.json";

/// The diffusers release whose format is written.
const DIFFUSERS_VERSION: &str = "0.42.1";

/// The diffusers pipelines that can be read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipelineClass {
    /// A pixel-space U-Net with DDIM.
    Ddim,
    /// A pixel-space U-Net with any scheduler.
    Ddpm,
    /// Text-to-image with one text encoder.
    StableDiffusion,
    /// Text-to-image with two text encoders, and sizes and crop coordinates as network input.
    StableDiffusionXl,
    /// Few-step text-to-image with a guidance embedding in the U-Net.
    LatentConsistency,
}

impl PipelineClass {
    const ALL: [Self; 5] = [
        Self::Ddim,
        Self::Ddpm,
        Self::StableDiffusion,
        Self::StableDiffusionXl,
        Self::LatentConsistency,
    ];

    /// The name of the class in diffusers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ddim => "DDIMPipeline",
            Self::Ddpm => "DDPMPipeline",
            Self::StableDiffusion => "StableDiffusionPipeline",
            Self::StableDiffusionXl => "StableDiffusionXLPipeline",
            Self::LatentConsistency => "LatentConsistencyModelPipeline",
        }
    }

    /// Whether the pipeline generates images from prompts.
    pub fn is_text_to_image(self) -> bool {
        !matches!(self, Self::Ddim | Self::Ddpm)
    }
}

/// The library and class of a part.
pub(super) type Class = [String; 2];

/// The content of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Index {
    pub(super) class: PipelineClass,
    /// The parts by folder; `None` for an optional part that is absent.
    pub(super) parts: BTreeMap<String, Option<Class>>,
    /// All other keys, such as `force_zeros_for_empty_prompt`.
    pub(super) settings: BTreeMap<String, Value>,
}

impl Index {
    /// A pipeline of a U-Net and a scheduler.
    pub(super) fn of_unet(class: PipelineClass, unet: &str, scheduler: &str) -> Self {
        let part = |class: &str| Some(["diffusers".to_owned(), class.to_owned()]);
        let parts = [("unet", part(unet)), ("scheduler", part(scheduler))];
        let parts = parts.into_iter().map(|(name, part)| (name.to_owned(), part)).collect();
        Self { class, parts, settings: BTreeMap::new() }
    }

    /// Reads the index of a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Files`]; [`Error::Invalid`] for an unsupported pipeline, and for a part whose name is not that of a
    /// subfolder: copying it must not leave the folder.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let object: Map<String, Value> = read_small_json(&path)?;
        let named = object.get("_class_name").cloned().unwrap_or_default();
        let class = PipelineClass::ALL.into_iter().find(|class| named == class.as_str());
        let Some(class) = class else {
            let known = PipelineClass::ALL.map(PipelineClass::as_str).join(", ");
            return Err(Error::Invalid(Invalid::new(
                format!("_class_name in {}", path.display()),
                named,
                format!("one of {known}"),
            )));
        };
        let mut index = Self { class, parts: BTreeMap::new(), settings: BTreeMap::new() };
        for (key, value) in object.into_iter().filter(|(key, _)| !key.starts_with('_')) {
            match part(&value) {
                Some(part) if is_plain(&key) => drop(index.parts.insert(key, part)),
                Some(_) => {
                    return Err(Error::Invalid(Invalid::new(
                        format!("part in {}", path.display()),
                        format!("{key:?}"),
                        "the name of a subfolder",
                    )));
                }
                None => drop(index.settings.insert(key, value)),
            }
        }
        Ok(index)
    }

    /// Selects the pipeline of Stable Diffusion that can be called with this network and scheduler:
    /// `LatentConsistencyModelPipeline` requires both an embedding of the guidance weight and `LCMScheduler`,
    /// `StableDiffusionPipeline` supports either. That of XL stays.
    pub(super) fn select_class(&mut self, has_guidance_embedding: bool, scheduler: &str) {
        use PipelineClass::{LatentConsistency, StableDiffusion};
        if matches!(self.class, LatentConsistency | StableDiffusion) {
            let is_lcm = has_guidance_embedding && scheduler == "LCMScheduler";
            self.class = if is_lcm { LatentConsistency } else { StableDiffusion };
        }
    }

    /// The class of a part.
    pub(super) fn class_of(&self, part: &str) -> Option<&str> {
        self.parts.get(part)?.as_ref().map(|[_, class]| class.as_str())
    }

    /// Whether the pipeline contains a part of that name.
    pub(super) fn has(&self, part: &str) -> bool {
        self.parts.get(part).is_some_and(Option::is_some)
    }

    /// Whether a setting of that name is true or absent, for one that is true by default in diffusers.
    pub(super) fn is_on_by_default(&self, setting: &str) -> bool {
        self.settings.get(setting).is_none_or(|value| *value == Value::Bool(true))
    }

    /// Writes the index of a folder atomically.
    ///
    /// # Errors
    ///
    /// [`Error::Files`].
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let mut object = Map::new();
        object.insert("_class_name".to_owned(), self.class.as_str().into());
        object.insert("_diffusers_version".to_owned(), DIFFUSERS_VERSION.into());
        for (name, part) in &self.parts {
            let part = match part {
                Some([library, class]) => json!([library, class]),
                None => json!([null, null]),
            };
            object.insert(name.clone(), part);
        }
        object.extend(self.settings.clone());
        Ok(write_json(&folder.join(FILE_NAME), &object)?)
    }
}

/// Whether a name is a single path component, which stays inside the folder.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name)
}

/// A part in the file: two names, or two nulls.
#[expect(clippy::option_option, reason = "a part, an absent part, or not a part")]
fn part(value: &Value) -> Option<Option<Class>> {
    match value.as_array()?.as_slice() {
        [Value::String(library), Value::String(class)] => {
            Some(Some([library.clone(), class.clone()]))
        }
        [Value::Null, Value::Null] => Some(None),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STABLE_DIFFUSION: &str = r#"{
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": true,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]
    }"#;

    #[test]
    fn files_are_written_back_as_read() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(FILE_NAME), STABLE_DIFFUSION).expect("written");
        let index = Index::read(folder.path()).expect("a pipeline");
        assert_eq!(index.class, PipelineClass::StableDiffusion);
        assert!(index.class.is_text_to_image());
        assert!(index.has("text_encoder") && !index.has("safety_checker") && !index.has("other"));
        assert!(
            index.is_on_by_default("requires_safety_checker") && index.is_on_by_default("absent")
        );
        index.write(folder.path()).expect("written");
        assert_eq!(Index::read(folder.path()).expect("a pipeline"), index);
        let written: Map<String, Value> =
            read_small_json(&folder.path().join(FILE_NAME)).expect("an object");
        assert_eq!(written["safety_checker"], json!([null, null]));
        assert_eq!(written["unet"], json!(["diffusers", "UNet2DConditionModel"]));
    }

    #[test]
    fn parts_outside_of_the_folder_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(FILE_NAME);
        for name in ["../vae", "/etc", "vae/../..", "a/b", "..", "", "vae/"] {
            let text =
                json!({ "_class_name": "DDIMPipeline", name: ["diffusers", "AutoencoderKL"] });
            std::fs::write(&path, text.to_string()).expect("written");
            let refused = Index::read(folder.path()).expect_err("elsewhere").to_string();
            assert!(refused.contains(&format!("{name:?}")), "{refused}");
        }
    }

    #[test]
    fn other_pipelines_are_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(FILE_NAME), r#"{"_class_name": "FluxPipeline"}"#)
            .expect("written");
        let refused = Index::read(folder.path()).expect_err("another pipeline").to_string();
        assert!(refused.contains("FluxPipeline"), "{refused}");
        assert!(refused.contains("StableDiffusionXLPipeline"), "{refused}");
    }
}
