//! The inputs of a network in addition to `x_t` and the timestep.

use std::borrow::Cow;

use ddil_libtorch::{ArgumentError, ensure_dense};
use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// Named inputs of a network in addition to the noisy sample and its timestep, each with the batch first.
///
/// The standard parts have constants for names; a part of any other name is allowed, so that a network for audio,
/// video or tokens can define its own. A network refuses the parts that it does not take
/// ([`ensure_known`](Self::ensure_known)), so that a misspelt name is an error and not an input that is ignored.
///
/// Conditioning is stored with each state: the loss passes the same inputs to the networks as the rollout did.
///
/// Parts are kept in one order, whatever the order in which they were added: the standard parts first, in the order of
/// [`STANDARD`](Self::STANDARD), then all others by name.
///
/// # Example
///
/// ```
/// use ddil_core::Conditioning;
/// use tch::{Kind, Tensor, kind};
///
/// let text = Tensor::zeros([2, 77, 768], kind::FLOAT_CPU);
/// let conditioning = Conditioning::none()
///     .with("frame_rate", Tensor::from_slice(&[24_f32, 30.0]))
///     .with(Conditioning::ENCODER_HIDDEN_STATES, text);
///
/// let names: Vec<&str> = conditioning.parts().map(|(name, _)| name).collect();
/// assert_eq!(names, ["encoder_hidden_states", "frame_rate"]);
/// assert!(conditioning.get(Conditioning::CLASS_LABELS).is_none());
///
/// let known = [Conditioning::ENCODER_HIDDEN_STATES];
/// let refused = conditioning.ensure_known("predict", "a UNet for images", &known);
/// assert!(refused.unwrap_err().to_string().contains("`frame_rate`"));
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Conditioning {
    /// In the order of [`place`].
    parts: Vec<(Cow<'static, str>, Tensor)>,
}

impl Conditioning {
    /// Class labels, `[batch]`, `Int64`.
    pub const CLASS_LABELS: &'static str = "class_labels";
    /// Text or other embeddings for cross attention, `[batch, length, width]`.
    pub const ENCODER_HIDDEN_STATES: &'static str = "encoder_hidden_states";
    /// Pooled text embeddings (SDXL), `[batch, width]`.
    pub const TEXT_EMBEDS: &'static str = "text_embeds";
    /// Sizes and crop coordinates (SDXL), `[batch, 6]`.
    pub const TIME_IDS: &'static str = "time_ids";
    /// Guidance weight `w = guidance_scale - 1` for a network with a guidance embedding, `[batch]`.
    pub const GUIDANCE_WEIGHT: &'static str = "guidance_weight";

    /// Names of the standard parts, in their order.
    pub const STANDARD: [&'static str; 5] = [
        Self::CLASS_LABELS,
        Self::ENCODER_HIDDEN_STATES,
        Self::TEXT_EMBEDS,
        Self::TIME_IDS,
        Self::GUIDANCE_WEIGHT,
    ];

    /// No parts.
    pub fn none() -> Self {
        Self::default()
    }

    /// Class labels alone, `[batch]`, `Int64`.
    pub fn class_labels(labels: Tensor) -> Self {
        Self::none().with(Self::CLASS_LABELS, labels)
    }

    /// The same with a guidance weight per sample, `[batch]`.
    #[must_use]
    pub fn with_guidance_weight(self, weight: Tensor) -> Self {
        self.with(Self::GUIDANCE_WEIGHT, weight)
    }

    /// The same with a part, which replaces one of the same name.
    #[must_use]
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, tensor: Tensor) -> Self {
        let name = name.into();
        match self.parts.binary_search_by(|(other, _)| place(other).cmp(&place(&name))) {
            Ok(at) => self.parts[at].1 = tensor,
            Err(at) => self.parts.insert(at, (name, tensor)),
        }
        self
    }

    /// The same with a part if there is a tensor, unchanged if there is none.
    #[must_use]
    pub fn with_some(self, name: impl Into<Cow<'static, str>>, tensor: Option<Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.with(name, tensor),
            None => self,
        }
    }

    /// The same without a part.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.parts.retain(|(other, _)| other != name);
        self
    }

    /// The part of a name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.parts().find_map(|(other, tensor)| (other == name).then_some(tensor))
    }

    /// All parts with their names, in their order.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.parts.iter().map(|(name, tensor)| (&**name, tensor))
    }

    /// Whether there are no parts.
    pub fn is_none(&self) -> bool {
        self.parts.is_empty()
    }

    /// The same tensors, shared.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let parts = self.parts.iter();
        Self { parts: parts.map(|(name, part)| (name.clone(), part.shallow_clone())).collect() }
    }

    /// Rows `indices` (`[n]`, `Int64`) of every part.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if an index is beyond the batch, [`Error::Argument`] or [`Error::Conditioning`] for a tensor
    /// that is not dense.
    pub fn index_select(&self, indices: &Tensor) -> Result<Self> {
        const OP: &str = "Conditioning::index_select";
        ensure_dense(OP, "indices", indices)?;
        self.map(|name, part| {
            ensure_dense_part(OP, name, part)?;
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

    /// One batch after another. All must have the same parts.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] if a part is missing in one of them; [`Error::Torch`] if its rows differ in shape.
    pub fn cat(batches: &[&Self]) -> Result<Self> {
        const OP: &str = "Conditioning::cat";
        let Some((first, rest)) = batches.split_first() else { return Ok(Self::none()) };
        let names = |c: &Self| c.parts().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
        for other in rest {
            let (here, there) = (names(first), names(other));
            if here != there {
                let problem = format!("are {here:?} in one batch and {there:?} in another");
                return Err(Error::Conditioning { op: OP, field: "parts".into(), problem });
            }
        }
        first.map(|name, _| {
            let parts: Vec<&Tensor> = batches.iter().filter_map(|c| c.get(name)).collect();
            Tensor::f_cat(&parts, 0).map_err(Error::torch(OP))
        })
    }

    /// Checks that every part has `batch` rows.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] that names the part.
    pub fn ensure_batch(&self, op: &'static str, batch: i64) -> Result<()> {
        for (name, part) in self.parts() {
            ensure_dense_part(op, name, part)?;
            if part.size().first() != Some(&batch) {
                let problem = format!("has shape {:?}; expected {batch} rows", part.size());
                return Err(Error::Conditioning { op, field: name.to_owned(), problem });
            }
        }
        Ok(())
    }

    /// Checks that `network` takes all parts; `known` are the names of the parts that it takes.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] that names the first unknown part, the network and the parts that it takes.
    pub fn ensure_known(&self, op: &'static str, network: &str, known: &[&str]) -> Result<()> {
        let Some((name, _)) = self.parts().find(|(name, _)| !known.contains(name)) else {
            return Ok(());
        };
        let inputs = match known {
            [] => "none".to_owned(),
            known => format!("`{}`", known.join("`, `")),
        };
        let problem = format!("is not an input of {network}; its conditioning inputs: {inputs}");
        Err(Error::Conditioning { op, field: name.to_owned(), problem })
    }

    /// Each part through `f`.
    fn map(&self, f: impl Fn(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let parts = self.parts.iter().map(|(name, part)| Ok((name.clone(), f(name, part)?)));
        Ok(Self { parts: parts.collect::<Result<_>>()? })
    }
}

/// Parts by name, as [`Conditioning::parts`] returns them; of two with one name the later.
impl<N: Into<Cow<'static, str>>> FromIterator<(N, Tensor)> for Conditioning {
    fn from_iter<I: IntoIterator<Item = (N, Tensor)>>(parts: I) -> Self {
        parts.into_iter().fold(Self::none(), |all, (name, tensor)| all.with(name, tensor))
    }
}

/// The sort key of a part.
fn place(name: &str) -> (usize, &str) {
    let standard = Conditioning::STANDARD.iter().position(|standard| *standard == name);
    (standard.unwrap_or(Conditioning::STANDARD.len()), name)
}

fn ensure_dense_part(op: &'static str, name: &str, part: &Tensor) -> Result<()> {
    match ensure_dense(op, "part", part) {
        Err(ArgumentError::NotDense { found, .. }) => {
            let problem = format!("is {found}; expected a dense tensor");
            Err(Error::Conditioning { op, field: name.to_owned(), problem })
        }
        checked => Ok(checked?),
    }
}
