//! What backward trajectories are conditioned on.

use std::collections::BTreeSet;

use ddil_core::{Conditioning, RandomStreams, Stream, draw_stratified};
use ddil_data::{BatchIndices, EncodedDataset};
use ddil_files::{Invalid, listed};
use ddil_losses::Requirements;
use ddil_models::Placement;
use ddil_pipelines::{Pipeline, PipelineParts};
use rand::Rng;
use rand::seq::SliceRandom;
use tch::{Device, Tensor};

use crate::config::{DistillConfig, PromptSource, PromptsSection};
use crate::data::{DataSource, PromptFile, TrainingData};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::teacher_classes::TeacherClasses;

/// Random stream of the order of a file's prompts, separate from that of the data.
const PROMPTS: u64 = 0x7072_6f6d;

/// The conditioning of trajectories, checked against teacher and data, before anything is encoded.
#[derive(Debug)]
pub(super) enum PromptPlan {
    Data,
    Classes(ClassShares),
    File(PromptFile),
}

/// The classes that are drawn, each with its share; the shares sum to 1.
#[derive(Debug)]
pub(super) struct ClassShares {
    labels: Vec<i64>,
    shares: Vec<f64>,
}

impl PromptPlan {
    /// Checks the settings and reads the file, if there is one.
    pub(super) fn new(
        config: &DistillConfig,
        teacher: &Pipeline,
        data: &DataSource,
        requirements: Requirements,
    ) -> Result<Self> {
        let section = &config.prompts;
        Ok(match section.source {
            PromptSource::Data => Self::Data,
            PromptSource::File => Self::File(data.prompt_file(section, &config.data, teacher)?),
            PromptSource::Classes => {
                let Some(classes) = TeacherClasses::of(teacher) else {
                    let expected = "data or file: the teacher has no classes";
                    let invalid = Invalid::new("prompts.source", "classes", expected);
                    return Err(Error::Invalid(invalid));
                };
                let shares = ClassShares::new(section, &classes)?;
                if requirements.discriminator {
                    shares.warn_of_absent(&classes, data)?;
                }
                Self::Classes(shares)
            }
        })
    }

    /// Opens the prompts of a file, which are encoded first if necessary.
    pub(super) fn open(
        self,
        config: &DistillConfig,
        data: &TrainingData,
        encoders: (&PipelineParts, Placement),
        interrupt: &Interrupt,
    ) -> Result<TrajectoryPrompts> {
        Ok(match self {
            Self::Data => TrajectoryPrompts::Data,
            Self::Classes(shares) => TrajectoryPrompts::Classes(shares),
            Self::File(file) => {
                let prompts = file.open(encoders, interrupt)?;
                ensure_alike(&prompts, data)?;
                let batch = config.data.batch_size as usize;
                let order = BatchIndices::new(prompts.len(), batch, config.run.seed ^ PROMPTS)?;
                TrajectoryPrompts::File { prompts: Box::new(prompts), order }
            }
        })
    }
}

impl ClassShares {
    fn new(section: &PromptsSection, classes: &TeacherClasses) -> Result<Self> {
        let labels = match &section.classes[..] {
            [] => classes.labels(),
            names => classes.labels_of("prompts.classes", names)?,
        };
        let n = labels.len();
        let weights =
            if section.weights.is_empty() { vec![1.0; n] } else { section.weights.clone() };
        if weights.len() != n {
            let expected = format!("{n}, one for each of the {}", classes.expected());
            let found = format!("{} weights", weights.len());
            return Err(Error::Invalid(Invalid::new("prompts.weights", found, expected)));
        }
        let sum: f64 = weights.iter().sum();
        Ok(Self { labels, shares: weights.iter().map(|weight| weight / sum).collect() })
    }

    /// The labels that are ever drawn.
    fn drawn(&self) -> impl Iterator<Item = i64> {
        self.labels
            .iter()
            .zip(&self.shares)
            .filter(|(_, share)| **share > 0.0)
            .map(|(label, _)| *label)
    }

    /// A discriminator that sees no real sample of a class learns that the class is fake.
    fn warn_of_absent(&self, classes: &TeacherClasses, data: &DataSource) -> Result<()> {
        let Some(labels) = data.labels() else { return Ok(()) };
        let labels: Vec<i64> = Vec::try_from(labels).map_err(Error::torch("prompts"))?;
        let present: BTreeSet<i64> = labels.into_iter().collect();
        let names = classes.all_names();
        let absent: Vec<&String> = self
            .drawn()
            .filter(|label| !present.contains(label))
            .map(|label| &names[label as usize])
            .collect();
        if !absent.is_empty() {
            tracing::warn!(
                "the data have no samples of {}: the discriminator has no real samples of these classes and learns to \
                 call all of them fake; objective.gan = false trains without it",
                listed(absent)
            );
        }
        Ok(())
    }

    /// `n` labels in proportion to their shares; each count is the expected one, rounded.
    fn draw(&self, n: usize, rng: &mut impl Rng) -> Vec<i64> {
        // The order of the classes is drawn too: in a fixed order, neighbours would exclude each other from a batch
        // with fewer samples than classes.
        let mut order: Vec<usize> = (0..self.labels.len()).collect();
        order.shuffle(rng);
        let shares: Vec<f64> = order.iter().map(|&class| self.shares[class]).collect();
        let drawn = draw_stratified(&shares, n, rng);
        drawn.into_iter().map(|place| self.labels[order[place]]).collect()
    }
}

/// The source of the conditioning of trajectories. Its draws depend on seed and step alone.
#[derive(Debug)]
pub(super) enum TrajectoryPrompts {
    Data,
    Classes(ClassShares),
    File { prompts: Box<EncodedDataset>, order: BatchIndices },
}

impl TrajectoryPrompts {
    /// The conditioning of `batch` trajectories of an update, whose data have the conditioning `of_data`.
    pub(super) fn at(
        &mut self,
        step: u64,
        streams: &RandomStreams,
        (of_data, batch): (&Conditioning, i64),
        device: Device,
    ) -> Result<Conditioning> {
        match self {
            // In another order, so that each is as frequent as in the data and no trajectory is tied to a sample.
            Self::Data => {
                let mut generator = streams.generator(step, Stream::Condition, Device::Cpu)?;
                Ok(of_data.index_select(&generator.randperm(batch)?)?)
            }
            Self::Classes(shares) => {
                let mut rng = streams.rng(step, Stream::Condition);
                let labels = shares.draw(batch as usize, &mut rng);
                Ok(Conditioning::class_labels(Tensor::from_slice(&labels)).to_device(device)?)
            }
            Self::File { prompts, order } => {
                let mut draws = streams.draws(step, Stream::Condition, Device::Cpu)?;
                // Prompts without images: the shape of the latents, which are zeros, does not matter.
                let drawn = prompts.batch(&order.at(step), [1; 3], &mut draws, Device::Cpu)?;
                Ok(drawn.conditioning.to_device(device)?)
            }
        }
    }
}

/// Prompts of a file must be encoded as those of the data are: both are in one batch.
fn ensure_alike(prompts: &EncodedDataset, data: &TrainingData) -> Result<()> {
    let Some(data) = data.encoded() else { return Ok(()) };
    let shapes = |data: &EncodedDataset| -> Result<String> {
        let first = data.prompt_conditioning(&[0])?;
        let shapes: Vec<String> =
            first.parts().map(|(name, part)| format!("{name} {:?}", &part.size()[1..])).collect();
        Ok(shapes.join(", "))
    };
    let (found, expected) = (shapes(prompts)?, shapes(data)?);
    if found == expected {
        return Ok(());
    }
    let expected = format!("{expected}, as in {}", data.path().display());
    Err(Error::Invalid(Invalid::new("prompts.path", format!("encoded to {found}"), expected)))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    /// Each count of a batch is the expected count rounded down or up, and their mean over many batches is exact.
    #[test]
    fn classes_are_drawn_by_their_weights() {
        let weights = [4.0, 0.0, 1.0, 2.5, 2.5];
        let shares = ClassShares {
            labels: vec![7, 3, 0, 9, 1],
            shares: weights.iter().map(|weight| weight / 10.0).collect(),
        };
        let (n, batches) = (7, 4000);
        let mut rng = StdRng::seed_from_u64(3);
        let mut totals = [0_u64; 5];
        for _ in 0..batches {
            let drawn = shares.draw(n, &mut rng);
            assert_eq!(drawn.len(), n);
            for (place, label) in shares.labels.iter().enumerate() {
                let count = drawn.iter().filter(|drawn| *drawn == label).count();
                let expected = shares.shares[place] * n as f64;
                assert!((count as f64 - expected).abs() < 1.0, "{count} of {expected}");
                totals[place] += count as u64;
            }
        }
        for (total, share) in totals.iter().zip(&shares.shares) {
            let mean = *total as f64 / f64::from(batches);
            let expected = share * n as f64;
            // A count is the expected one rounded: a Bernoulli variable with variance p (1 - p).
            let p = expected.fract();
            let deviation = (p * (1.0 - p) / f64::from(batches)).sqrt();
            assert!((mean - expected).abs() <= 5.0 * deviation + 1e-12, "{mean}, {expected}");
        }
    }

    /// With fewer samples than classes, any two classes are in one batch sometimes.
    #[test]
    fn no_class_excludes_another() {
        let shares = ClassShares { labels: (0..4).collect(), shares: vec![0.25; 4] };
        let mut rng = StdRng::seed_from_u64(0);
        let mut pairs = BTreeSet::new();
        for _ in 0..200 {
            let mut drawn = shares.draw(2, &mut rng);
            drawn.sort_unstable();
            assert_ne!(drawn[0], drawn[1]);
            pairs.insert(drawn);
        }
        assert_eq!(pairs.len(), 6);
    }
}
