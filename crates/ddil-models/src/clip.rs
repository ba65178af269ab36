//! CLIP: text encoders for prompts, the vision tower, and the score that holds a picture against its caption.

mod config;
mod encoder;
mod files;
mod model;
mod score;
mod text;
#[cfg(feature = "tokenizer")]
mod tokenizer;
mod vision;

pub use config::{
    ClipActivation, ClipConfig, ClipTextClass, ClipTextConfig, ClipVisionClass, ClipVisionConfig,
};
pub use model::ClipModel;
pub use score::ClipScore;
pub use text::{ClipTextModel, ClipTextOutput, HiddenState};
#[cfg(feature = "tokenizer")]
pub use tokenizer::{ClipTokenizer, TokenizedPrompts};
pub use vision::{ClipVisionModel, ClipVisionOutput};
