//! What a network is told beside `x_t` and the timestep.

use ddil_libtorch::ensure_dense;
use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// What a network is told beside the noisy sample and its timestep; every part is optional and has the batch
/// first.
///
/// Travels with each state: what was said in a rollout is said again at the loss.
#[derive(Debug, Default)]
pub struct Conditioning {
    /// Class labels, `[batch]`, `Int64`.
    pub class_labels: Option<Tensor>,
    /// Text or other embeddings for cross attention, `[batch, length, width]`.
    pub encoder_hidden_states: Option<Tensor>,
    /// Pooled text embeddings (SDXL), `[batch, width]`.
    pub text_embeds: Option<Tensor>,
    /// Size and crop numbers (SDXL), `[batch, 6]`.
    pub time_ids: Option<Tensor>,
    /// Guidance weight `w` told to a network that has guidance embedded, `[batch]`; `w = guidance_scale - 1`.
    pub guidance_weight: Option<Tensor>,
}

/// Names of the parts, in the order of [`Conditioning::parts`].
const FIELDS: [&str; 5] =
    ["class_labels", "encoder_hidden_states", "text_embeds", "time_ids", "guidance_weight"];

impl Conditioning {
    /// Nothing is said.
    pub fn none() -> Self {
        Self::default()
    }

    /// Class labels, `[batch]`, `Int64`, and nothing else.
    pub fn class_labels(labels: Tensor) -> Self {
        Self { class_labels: Some(labels), ..Self::default() }
    }

    /// The same with a guidance weight a sample, `[batch]`.
    #[must_use]
    pub fn with_guidance_weight(self, weight: Tensor) -> Self {
        Self { guidance_weight: Some(weight), ..self }
    }

    /// The parts that are there, with their names.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let tensors = [
            &self.class_labels,
            &self.encoder_hidden_states,
            &self.text_embeds,
            &self.time_ids,
            &self.guidance_weight,
        ];
        FIELDS.into_iter().zip(tensors).filter_map(|(name, part)| Some((name, part.as_ref()?)))
    }

    /// Rebuilds from named parts, as [`parts`](Self::parts) gives them.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] for a name that is no part.
    pub fn from_parts(parts: impl IntoIterator<Item = (String, Tensor)>) -> Result<Self> {
        let mut conditioning = Self::none();
        for (name, tensor) in parts {
            let part = match name.as_str() {
                "class_labels" => &mut conditioning.class_labels,
                "encoder_hidden_states" => &mut conditioning.encoder_hidden_states,
                "text_embeds" => &mut conditioning.text_embeds,
                "time_ids" => &mut conditioning.time_ids,
                "guidance_weight" => &mut conditioning.guidance_weight,
                _ => {
                    let problem = format!("no part is called `{name}`; parts are {FIELDS:?}");
                    return Err(Error::Restore { what: "conditioning", problem });
                }
            };
            *part = Some(tensor);
        }
        Ok(conditioning)
    }

    /// Whether nothing is said.
    pub fn is_none(&self) -> bool {
        self.parts().next().is_none()
    }

    /// The same tensors, shared.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        self.map(|_, part| Ok(part.shallow_clone())).unwrap_or_default()
    }

    /// Rows `indices` (`[n]`, `Int64`) of every part.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if an index is beyond the batch, [`Error::Scheduler`] for a part that is no dense tensor.
    pub fn index_select(&self, indices: &Tensor) -> Result<Self> {
        const OP: &str = "Conditioning::index_select";
        ensure_dense(OP, "indices", indices)?;
        self.map(|name, part| {
            ensure_dense(OP, name, part)?;
            let indices = indices.f_to_device(part.device()).map_err(Error::torch(OP))?;
            part.f_index_select(0, &indices).map_err(Error::torch(OP))
        })
    }

    /// Every part on `device`.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the device is not there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        self.map(|_, part| {
            part.f_to_device(device).map_err(Error::torch("Conditioning::to_device"))
        })
    }

    /// One batch after another. All must say the same kinds of things.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] if a part is there in one and missing in another, or its rows differ in shape.
    pub fn cat(batches: &[&Self]) -> Result<Self> {
        const OP: &str = "Conditioning::cat";
        let Some((first, rest)) = batches.split_first() else { return Ok(Self::none()) };
        let names = |c: &Self| c.parts().map(|(name, _)| name).collect::<Vec<_>>();
        for other in rest {
            if names(first) != names(other) {
                return Err(Error::Conditioning {
                    op: OP,
                    field: "parts",
                    problem: format!(
                        "are {:?} in one batch and {:?} in another",
                        names(first),
                        names(other)
                    ),
                });
            }
        }
        first.map(|name, _| {
            let parts: Vec<&Tensor> = batches
                .iter()
                .filter_map(|c| c.parts().find(|(n, _)| *n == name).map(|(_, part)| part))
                .collect();
            Tensor::f_cat(&parts, 0).map_err(Error::torch(OP))
        })
    }

    /// Checks that every part has `batch` rows.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] that names the part, [`Error::Scheduler`] for one that is no dense tensor.
    pub fn ensure_batch(&self, op: &'static str, batch: i64) -> Result<()> {
        for (field, part) in self.parts() {
            ensure_dense(op, field, part)?;
            if part.size().first() != Some(&batch) {
                let problem = format!("has shape {:?}; expected {batch} rows", part.size());
                return Err(Error::Conditioning { op, field, problem });
            }
        }
        Ok(())
    }

    /// Each part through `f`.
    fn map(&self, f: impl Fn(&'static str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let parts: Result<Vec<_>> =
            self.parts().map(|(name, part)| Ok((name.to_owned(), f(name, part)?))).collect();
        Self::from_parts(parts?)
    }
}
