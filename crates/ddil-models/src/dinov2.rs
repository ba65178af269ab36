//! `DINOv2`: a vision transformer trained without labels, whose class token represents an image.

mod config;
mod model;

pub use config::Dinov2Config;
pub use model::{Dinov2Model, Dinov2Output};
