//! Students of text-to-image models.

use ddil_models::Placement;
use ddil_trainer::config::Precision;
use ddil_trainer::pipeline::Pipeline;
use tch::{Tensor, kind};

use crate::support::{TestResult, Workshop};
use crate::text_teacher::{Family, SIDE, TOKENS, WIDTHS};

const FAMILIES: [Family; 2] = [Family::StableDiffusion, Family::StableDiffusionXl];

#[test]
fn the_teacher_is_a_model_folder_with_its_text_parts() -> TestResult {
    for family in FAMILIES {
        let workshop = Workshop::of_text(family);
        let placement = Placement::default();
        let pipeline = Pipeline::read(&workshop.path("teacher"), placement, Precision::Float32)?;
        assert_eq!(pipeline.card.image_shape, [4, 8, 8]);
        let parts = pipeline.frame.text_to_image(placement)?;
        let said = parts.encode(&["a red cat", "a red cat, 2 dogs"])?;
        let states = said.conditioning.encoder_hidden_states.ok_or("states")?;
        let xl = family == Family::StableDiffusionXl;
        let width = if xl { WIDTHS[0] + WIDTHS[1] } else { WIDTHS[0] };
        assert_eq!(states.size(), [2, i64::from(TOKENS), i64::from(width)]);
        assert_eq!(said.conditioning.text_embeds.is_some(), xl);
        assert_eq!(said.truncated, [None, Some("gs".to_owned())]);
        let latents = Tensor::zeros([1, 4, 8, 8], kind::FLOAT_CPU);
        assert_eq!(parts.decode(&latents)?.size(), [1, 3, 16, 16]);
        assert_eq!(parts.pixels_per_latent() * 8, i64::from(SIDE));
    }
    Ok(())
}
