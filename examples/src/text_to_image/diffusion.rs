use std::ops::Range;

use ddil_core::{RandomStreams, Stream};
use ddil_data::BatchIndices;
use ddil_models::{
    ClipTextModel, ClipTokenizer, HiddenState, NetworkConfig, Placement, UNet2DConditionInputs,
    UNet2DConditionModel,
};
use rand::Rng;
use rand::rngs::StdRng;
use tch::{Device, Kind, Tensor};

use super::{Latents, Progress, Settings};
use crate::captions::{NAMES, PHRASINGS, captions};
use crate::{Result, Trainer};

/// The networks that are trained together.
#[derive(Debug)]
pub struct Networks {
    /// The text encoder, which conditions the U-Net.
    pub text_encoder: ClipTextModel,
    /// The U-Net, which denoises latents.
    pub unet: UNet2DConditionModel,
}

impl Networks {
    /// Networks with random weights.
    ///
    /// # Errors
    ///
    /// Invalid settings.
    pub fn new(settings: &Settings) -> Result<Self> {
        let (placement, seed) = (Placement::default(), settings.seed);
        let text_encoder = settings.text_encoder.build(placement, seed)?;
        let unet = settings.unet.build(placement, seed)?;
        unet.set_training(true);
        Ok(Self { text_encoder, unet })
    }

    fn learned(&self) -> Vec<(String, Tensor)> {
        let groups =
            [("text_encoder", self.text_encoder.parameters()), ("unet", self.unet.parameters())];
        let named = |(group, parameters): (&str, &ddil_models::Parameters)| {
            let learned = parameters.learned().into_iter();
            learned.map(|(name, tensor)| (format!("{group}.{name}"), tensor)).collect::<Vec<_>>()
        };
        groups.into_iter().flat_map(named).collect()
    }
}

/// The tokens of all training captions.
#[derive(Debug)]
pub struct Prompts {
    /// `[1 + captions, tokens]`, `Int64`; the first row is the empty prompt.
    tokens: Tensor,
    /// The rows of each class.
    of_class: Vec<Range<usize>>,
}

impl Prompts {
    /// Tokenizes all captions.
    ///
    /// # Errors
    ///
    /// A caption that is too long for the tokenizer.
    pub fn new(tokenizer: &ClipTokenizer) -> Result<Self> {
        let mut texts = vec![String::new()];
        let mut of_class = Vec::new();
        for label in 0..NAMES.len() {
            let start = texts.len();
            texts.extend(captions(&PHRASINGS, label));
            of_class.push(start..texts.len());
        }
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let encoded = tokenizer.encode(&texts)?;
        match encoded.truncated.iter().zip(texts).find(|(cut, _)| cut.is_some()) {
            Some((_, text)) => Err(format!("{text:?} is too long for the tokenizer").into()),
            None => Ok(Self { tokens: encoded.input_ids, of_class }),
        }
    }

    /// A caption for each label, sometimes replaced by the empty one.
    fn draw(&self, labels: &[usize], dropout: f64, rng: &mut StdRng) -> Tensor {
        let row = |&label: &usize| {
            let caption = rng.random_range(self.of_class[label].clone());
            if rng.random::<f64>() < dropout { 0 } else { caption as i64 }
        };
        let rows: Vec<i64> = labels.iter().map(row).collect();
        self.tokens.index_select(0, &Tensor::from_slice(&rows))
    }
}

/// Trains text encoder and U-Net, and returns the mean loss of every update.
///
/// The squared error of the output at random timesteps of noised latents
/// ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)), conditioned on a caption or, for guidance
/// ([Ho and Salimans 2022](https://arxiv.org/abs/2207.12598)), on the empty one.
///
/// # Errors
///
/// Errors of the networks and the data; a loss or gradient that is NaN or infinite.
pub fn train_networks(
    networks: &Networks,
    settings: &Settings,
    latents: &Latents,
    prompts: &Prompts,
    progress: &Progress,
) -> Result<Vec<f64>> {
    let (stage, streams) = (settings.diffusion, RandomStreams::new(settings.seed, 2));
    let (schedule, output) = (settings.schedule.build()?, settings.prediction_type);
    let mut indices = BatchIndices::new(latents.num_images(), stage.batch_size, streams.seed)?;
    let trainer = Trainer::new(networks.learned(), stage.training)?;
    let losses = progress.run("text to image", trainer, stage.training.updates, |step| {
        let generator = |stream| streams.generator(step, stream, Device::Cpu);
        let (x0, labels) = latents.draw(&indices.at(step), &mut generator(Stream::Data)?)?;
        let mut rng = streams.rng(step, Stream::Condition);
        let tokens = prompts.draw(&labels, settings.prompt_dropout, &mut rng);
        let timesteps = generator(Stream::Timesteps)?.randint(
            0,
            schedule.num_train_timesteps(),
            [x0.size()[0]],
        )?;
        let noise = generator(Stream::Noise)?.normal(x0.size(), Kind::Float)?;
        let x_t = schedule.add_noise(&x0, &noise, &timesteps)?;
        let target = output.target(&schedule, &x0, &noise, &timesteps)?;

        let which = HiddenState::stable_diffusion(0);
        let text = networks.text_encoder.hidden_state(&tokens, None, which)?;
        let time = schedule.time_inputs_at(&timesteps)?;
        let said = networks.unet.forward(&x_t, &time, UNet2DConditionInputs::text(&text))?;
        Ok((said - target).square().flatten(1, -1).mean_dim(1, false, Kind::Float))
    })?;
    networks.unet.set_training(false);
    Ok(losses)
}
