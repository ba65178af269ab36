//! CLIP: text encoders for prompts, the vision tower, and the score of an image and its caption.

mod config;
mod encoder;
mod files;
mod model;
mod score;
mod settings;
mod text;
mod text_config;
#[cfg(feature = "tokenizer")]
mod tokenizer;
mod vision;
mod vision_config;

pub use config::ClipConfig;
pub use model::ClipModel;
pub use score::ClipScore;
pub use settings::ClipActivation;
pub use text::{ClipTextModel, ClipTextOutput, HiddenState};
pub use text_config::{ClipTextClass, ClipTextConfig};
#[cfg(feature = "tokenizer")]
pub use tokenizer::{ClipTokenizer, TokenizedPrompts};
pub use vision::{ClipVisionModel, ClipVisionOutput};
pub use vision_config::{ClipVisionClass, ClipVisionConfig};
