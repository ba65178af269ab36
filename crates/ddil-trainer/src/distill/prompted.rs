//! The text conditioning of a distillation besides its data: the empty prompt, and the prompts of the grids.

use std::collections::BTreeMap;

use ddil_core::Conditioning;
use ddil_data::EncodedDataset;
use ddil_models::Placement;
use ddil_pipelines::{EncodedPrompts, PipelineParts};
use tch::Device;

use crate::data::{TrainingData, sampled_time_ids};
use crate::error::Result;

/// Number of prompts of a grid if the config has none.
pub(super) const SHOWN: usize = 4;

/// The conditioning for guidance and for grids, on the networks' device.
#[derive(Debug)]
pub(super) struct Prompted {
    /// Conditioning of the empty prompt, one row, if the data define it.
    empty: Option<Conditioning>,
    /// The prompts of the grids.
    pub(super) shown: Conditioning,
}

impl Prompted {
    /// Read from the data, and from the text encoders for prompts that the data lack; none for pixel data.
    ///
    /// The encoders are released at once, and the autoencoder is loaded again for each grid: training does not use
    /// them, and their memory is enough for a batch (those of Stable Diffusion XL take 3.5 GB).
    pub(super) fn new(
        data: &TrainingData,
        prompts: &[String],
        pipeline_parts: &PipelineParts,
        placement: Placement,
    ) -> Result<Option<Self>> {
        let Some(encoded) = data.encoded() else { return Ok(None) };
        let shown = shown(data, encoded, prompts, pipeline_parts, placement)?;
        let device = placement.device;
        let empty = encoded.empty_prompt()?.map(|empty| empty.to_device(device)).transpose()?;
        Ok(Some(Self { empty, shown: shown.to_device(device)? }))
    }

    /// A copy of the empty prompt's conditioning.
    pub(super) fn empty(&self) -> Option<Conditioning> {
        self.empty.as_ref().map(Conditioning::shallow_clone)
    }
}

fn shown(
    data: &TrainingData,
    encoded: &EncodedDataset,
    prompts: &[String],
    pipeline_parts: &PipelineParts,
    placement: Placement,
) -> Result<Conditioning> {
    // The row of the empty prompt may be zeros instead of the encoders' output for an empty text.
    let is_text = |row: &i64| encoded.info().empty_prompt != Some(*row);
    let rows: BTreeMap<&str, i64> = encoded
        .texts()
        .iter()
        .map(String::as_str)
        .zip(0..)
        .filter(|(_, row)| is_text(row))
        .collect();
    let known = |text: &String| rows.get(text.as_str()).copied();
    let conditioning = if prompts.is_empty() {
        encoded.prompt_conditioning(&data.first_prompts(SHOWN))?
    } else if let Some(rows) = prompts.iter().map(known).collect::<Option<Vec<i64>>>() {
        encoded.prompt_conditioning(&rows)?
    } else {
        let parts = pipeline_parts.text_to_image(placement)?;
        let texts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let EncodedPrompts { conditioning, truncated } = parts.encode(&texts)?;
        for (text, cut) in prompts.iter().zip(truncated) {
            let Some(cut) = cut else { continue };
            tracing::warn!(
                "output.prompts: {text:?} is longer than the text encoder's input; {cut:?} was cut off"
            );
        }
        conditioning.to_device(Device::Cpu)?
    };
    Ok(with_sizes(conditioning, encoded))
}

/// The conditioning of rows of the data's prompts, on the CPU.
pub(super) fn of_rows(encoded: &EncodedDataset, rows: &[i64]) -> ddil_data::Result<Conditioning> {
    Ok(with_sizes(encoded.prompt_conditioning(rows)?, encoded))
}

/// With the sizes of the sampled images, for a network that takes them.
fn with_sizes(conditioning: Conditioning, encoded: &EncodedDataset) -> Conditioning {
    let takes_sizes = conditioning.get(Conditioning::TEXT_EMBEDS).is_some();
    let n =
        conditioning.get(Conditioning::ENCODER_HIDDEN_STATES).map_or(0, |states| states.size()[0]);
    let time_ids = takes_sizes.then(|| sampled_time_ids(encoded.info().image_size, n));
    conditioning.with_some(Conditioning::TIME_IDS, time_ids)
}
