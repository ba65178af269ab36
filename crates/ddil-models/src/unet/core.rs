//! What both U-Nets have: embeddings of timestep, guidance weight and class, the layers, and how a pass runs.

use std::cell::Cell;

use tch::{Kind, TchError, Tensor};

use crate::error::{Error, Result, ensure_guidance_weight, ensure_timesteps};
use crate::layers::class_embedding::{ClassEmbedding, ClassOptions};
use crate::layers::embeddings::{
    GuidanceEmbedding, TimeProjection, TimestepEmbedding, one_per_sample,
};
use crate::layers::recompute::Recompute;
use crate::layers::resnet::{Pass, Text};
use crate::layers::{Activation, Output};
use crate::parameters::{Parameters, Scope};
use crate::unet::body::Body;

/// The inputs that both U-Nets have beside the sample.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs<'a> {
    pub(crate) timesteps: &'a Tensor,
    pub(crate) class_labels: Option<&'a Tensor>,
    pub(crate) guidance_weight: Option<&'a Tensor>,
}

/// The embeddings of these inputs.
#[derive(Debug)]
pub(crate) struct Embeddings {
    time_proj: TimeProjection,
    guidance: Option<GuidanceEmbedding>,
    time: TimestepEmbedding,
    class: Option<ClassEmbedding>,
}

impl Embeddings {
    /// `guidance_width` is that of the features of a guidance weight, `last` an activation after the embedding of the
    /// timestep.
    pub(crate) fn new(
        root: &mut Scope<'_>,
        time_proj: TimeProjection,
        guidance_width: Option<u32>,
        class: ClassOptions,
        last: Option<Activation>,
    ) -> Result<Self> {
        let guidance = guidance_width
            .map(|width| {
                let scope = root.at("time_embedding.cond_proj");
                GuidanceEmbedding::new(scope, width.into(), &time_proj)
            })
            .transpose()?;
        let time = TimestepEmbedding::new(root.at("time_embedding"), &time_proj, class.width)?
            .with_activations(class.activation, last);
        let class = ClassEmbedding::new(root.at("class_embedding"), class, &time_proj)?;
        Ok(Self { time_proj, guidance, time, class })
    }

    /// Names of the parts of a conditioning, and whether they are inputs.
    pub(crate) fn parts(&self) -> [(&'static str, bool); 2] {
        [("class_labels", self.class.is_some()), ("guidance_weight", self.guidance.is_some())]
    }

    pub(crate) fn ensure(&self, op: &'static str, inputs: Inputs<'_>, batch: i64) -> Result<()> {
        let Inputs { timesteps, class_labels, guidance_weight } = inputs;
        ensure_timesteps(op, timesteps, batch)?;
        ClassEmbedding::ensure(op, self.class.as_ref(), class_labels, batch)?;
        ensure_guidance_weight(op, guidance_weight, batch, self.guidance.is_some())
    }

    /// `[batch, width]`, in the kind of the parameters.
    pub(crate) fn forward(&self, inputs: Inputs<'_>, batch: i64, kind: Kind) -> Output {
        let timesteps = one_per_sample(inputs.timesteps, batch)?;
        let mut features = self.time_proj.forward(&timesteps)?.f_to_kind(kind)?;
        if let (Some(embedding), Some(weight)) = (&self.guidance, inputs.guidance_weight) {
            features = embedding.forward(&features, weight)?;
        }
        let time = self.time.forward(&features)?;
        match (&self.class, inputs.class_labels) {
            (Some(embedding), Some(labels)) => {
                time.f_add(&embedding.forward(labels, &self.time_proj, kind)?)
            }
            _ => Ok(time),
        }
    }
}

/// The embedded inputs of one pass.
pub(crate) struct Embedded {
    /// After the activation that every block would apply to it.
    pub(crate) time: Tensor,
    pub(crate) text: Option<Tensor>,
    /// Added to the scores of attention to the text.
    pub(crate) bias: Option<Tensor>,
}

#[derive(Debug)]
pub(crate) struct UNet {
    pub(crate) parameters: Parameters,
    pub(crate) embeddings: Embeddings,
    body: Body,
    pub(crate) training: Cell<bool>,
    pub(crate) recomputes: Cell<bool>,
}

impl UNet {
    pub(crate) fn new(parameters: Parameters, embeddings: Embeddings, body: Body) -> Self {
        let [training, recomputes] = [Cell::new(false), Cell::new(false)];
        Self { parameters, embeddings, body, training, recomputes }
    }

    /// Runs one pass: `embed` embeds the inputs, `layers` calls the body.
    pub(crate) fn pass<T>(
        &self,
        op: &'static str,
        sample: &Tensor,
        embed: impl FnOnce() -> Result<Embedded, TchError>,
        layers: impl FnOnce(&Body, &Tensor, Pass<'_>) -> Result<T, TchError>,
    ) -> Result<T> {
        let sample = self.parameters.placement().arrange(sample)?;
        let run = || {
            let Embedded { time, text, bias } = embed()?;
            let recompute = self.recomputes.get().then(|| Recompute::of(&self.parameters));
            let pass = Pass {
                time: Some(&time),
                text: text.as_ref().map(|states| Text { states, bias: bias.as_ref() }),
                training: self.training.get(),
                recompute: recompute.as_ref(),
            };
            layers(&self.body, &sample, pass)
        };
        run().map_err(Error::torch(op))
    }
}
