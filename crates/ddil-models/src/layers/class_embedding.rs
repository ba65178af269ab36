//! The class embedding that a U-Net adds to the embedding of the timestep.

use ddil_libtorch::{ensure_dense, ensure_shape};
use tch::{Kind, Tensor};

use crate::error::{Result, ensure_labels, ensure_part};
use crate::layers::embeddings::{TimeProjection, TimestepEmbedding};
use crate::layers::{Activation, Embedding, Linear, Output};
use crate::parameters::Scope;
use crate::unet::pixels_config::ClassEmbedType;

/// The settings of a [`ClassEmbedding`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClassOptions {
    pub(crate) embed_type: Option<ClassEmbedType>,
    /// Size of the table if there is no type.
    pub(crate) num_classes: Option<u32>,
    /// Width of the labels for the two projections.
    pub(crate) label_width: u32,
    /// Width of the embedding.
    pub(crate) width: i64,
    /// The activation between the layers for labels that are embedded like timesteps.
    pub(crate) activation: Activation,
}

#[derive(Debug)]
pub(crate) enum ClassEmbedding {
    Table { table: Embedding, len: i64 },
    Timestep(TimestepEmbedding),
    Identity { width: i64 },
    Projection { embedding: TimestepEmbedding, label_width: i64 },
    SimpleProjection { linear: Linear, label_width: i64 },
}

impl ClassEmbedding {
    /// `None` for a network without classes; `features` computes the features of timesteps.
    pub(crate) fn new(
        scope: Scope<'_>,
        options: ClassOptions,
        features: &TimeProjection,
    ) -> Result<Option<Self>> {
        let ClassOptions { embed_type, num_classes, width, activation, .. } = options;
        let label_width = i64::from(options.label_width);
        Ok(Some(match (embed_type, num_classes) {
            (Some(ClassEmbedType::Timestep), _) => {
                let embedding = TimestepEmbedding::new(scope, features, width)?;
                Self::Timestep(embedding.with_activations(activation, None))
            }
            (Some(ClassEmbedType::Identity), _) => Self::Identity { width },
            (Some(ClassEmbedType::Projection), _) => {
                let embedding = TimestepEmbedding::of_features(scope, label_width, width)?;
                Self::Projection { embedding, label_width }
            }
            (Some(ClassEmbedType::SimpleProjection), _) => Self::SimpleProjection {
                linear: Linear::new(scope, label_width, width)?,
                label_width,
            },
            (None, Some(len)) => {
                let len = i64::from(len);
                Self::Table { table: Embedding::new(scope, len, width)?, len }
            }
            (None, None) => return Ok(None),
        }))
    }

    /// `[batch, width]`; `time` computes the features of timesteps, `kind` is that of the parameters.
    pub(crate) fn forward(&self, labels: &Tensor, time: &TimeProjection, kind: Kind) -> Output {
        let class = match self {
            Self::Table { table, .. } => table.forward(labels)?,
            Self::Timestep(embedding) => {
                embedding.forward(&time.forward(labels)?.f_to_kind(kind)?)?
            }
            Self::Identity { .. } => labels.shallow_clone(),
            Self::Projection { embedding, .. } => embedding.forward(&labels.f_to_kind(kind)?)?,
            Self::SimpleProjection { linear, .. } => linear.forward(&labels.f_to_kind(kind)?)?,
        };
        class.f_to_kind(kind)
    }

    /// Checks that labels are present if required, and of the right shape.
    pub(crate) fn ensure(
        op: &'static str,
        embedding: Option<&Self>,
        labels: Option<&Tensor>,
        batch: i64,
    ) -> Result<()> {
        ensure_part(op, "class_labels", labels, embedding.is_some())?;
        let (Some(embedding), Some(labels)) = (embedding, labels) else { return Ok(()) };
        let (shape, expected) = match embedding {
            Self::Table { len, .. } => return ensure_labels(op, labels, batch, len - 1),
            Self::Timestep(_) => (vec![batch], format!("[{batch}], one per sample")),
            Self::Identity { width: n }
            | Self::Projection { label_width: n, .. }
            | Self::SimpleProjection { label_width: n, .. } => {
                (vec![batch, *n], format!("[{batch}, {n}]"))
            }
        };
        let name = "class_labels";
        ensure_dense(op, name, labels)?;
        Ok(ensure_shape(op, name, labels, labels.size() == shape, || expected)?)
    }
}
