//! Initialising a network with matching parameters of another one.

use std::collections::BTreeMap;
use std::fmt;

use tch::Tensor;

use super::{Parameter, Parameters};
use crate::error::{Error, Result};

/// Number of names shown of a list, so that it fits one log line.
const NAMES_SHOWN: usize = 8;

/// Features of several kinds, concatenated along an axis of a parameter: a narrower network takes a share of each kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    pub(crate) axis: usize,
    /// Number of features of each kind.
    pub(crate) parts: Vec<i64>,
    pub(crate) share: Share,
}

/// Which features of a kind a narrower network takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// The first ones.
    First,
    /// Evenly spaced ones: frequencies that span the same range.
    Spaced,
}

/// What [`Parameters::copy_matching`] did, for the log: names with how many values each has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matched {
    /// Parameters of the same shape in both networks, copied completely.
    pub copied: Vec<(String, usize)>,
    /// Parameters that are larger in the other network, or with other kinds of features: copied in part.
    pub sliced: Vec<(String, usize)>,
    /// Parameters without a match, which keep their values.
    pub fresh: Vec<(String, usize)>,
    /// Parameters of the other network whose name does not exist here.
    pub unused: Vec<(String, usize)>,
}

impl fmt::Display for Matched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = [
            ("copied", &self.copied, false),
            ("sliced", &self.sliced, false),
            ("fresh", &self.fresh, true),
            ("unused", &self.unused, true),
        ];
        for (i, (what, list, named)) in lists.into_iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            let values: usize = list.iter().map(|(_, values)| values).sum();
            write!(f, "{separator}{what} {} ({values} values)", list.len())?;
            if named && !list.is_empty() {
                let shown: Vec<_> =
                    list.iter().take(NAMES_SHOWN).map(|(name, _)| name.as_str()).collect();
                let more = if list.len() > NAMES_SHOWN { ", .." } else { "" };
                write!(f, " [{}{more}]", shown.join(", "))?;
            }
        }
        Ok(())
    }
}

impl Parameters {
    /// Copies another network's values where names match, for a student with fewer channels or layers than its teacher,
    /// or with an additional input. Returns the outcome for each parameter.
    ///
    /// - same name and shape: copied;
    /// - same name, no side longer than the other's: the leading part along each side. If features of several kinds are
    ///   concatenated, the leading part of each kind is taken: the two halves of the input of a level on the up path
    ///   (from below, and from the skip), scale and shift, and the inputs of the first layer of an [`Mlp`](crate::Mlp).
    ///   Sines and cosines of a timestep are subsampled evenly, which gives the frequencies of the narrower network if
    ///   its width divides the wider one's. A kind that the other network lacks gets zeros, and so no effect at first;
    /// - otherwise, and if the number of kinds differs: unchanged, which in a new network is its fresh initialisation,
    ///   zero for a guidance embedding.
    ///
    /// This is a simple heuristic, and a better start than a random one. Channels are not selected by importance, the
    /// remaining ones are not rescaled, and the groups of a norm contain other channels than before. Matching is by
    /// name only. With fewer layers per block the first ones are kept. With fewer levels the finest are kept on the
    /// down path and the coarsest on the up path, since diffusers counts them in that order: there a level starts from
    /// weights of another resolution. In an [`Mlp`](crate::Mlp) with fewer layers the last one starts from a hidden
    /// one.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if a copy fails.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_models::{MlpConfig, NetworkConfig, Placement};
    ///
    /// let teacher = MlpConfig::default().build(Placement::default(), 0)?;
    /// let config = MlpConfig { hidden_widths: vec![32, 32, 32], ..MlpConfig::default() };
    /// let student = config.build(Placement::default(), 1)?;
    /// let matched = student.parameters().copy_matching(teacher.parameters())?;
    /// // Only the bias of the last layer has the same shape.
    /// assert_eq!(matched.copied, [("layers.3.bias".to_owned(), 2)]);
    /// assert!(matched.fresh.is_empty());
    /// # Ok::<_, ddil_models::Error>(())
    /// ```
    pub fn copy_matching(&self, other: &Self) -> Result<Matched> {
        let mut theirs: BTreeMap<&str, &Parameter> =
            other.entries.iter().map(|p| (p.name.as_str(), p)).collect();
        let mut matched = Matched::default();
        let _no_grad = tch::no_grad_guard();
        for target in &self.entries {
            let source = theirs.remove(target.name.as_str());
            let kept = source.and_then(|source| Some((source, target.kept_of(source)?)));
            let list = match kept {
                None => &mut matched.fresh,
                Some((source, kept)) => {
                    target
                        .take(source, &kept)
                        .map_err(Error::torch("Parameters::copy_matching"))?;
                    let is_whole = kept.iter().zip(source.tensor.size()).all(|(k, n)| is_all(k, n));
                    if is_whole { &mut matched.copied } else { &mut matched.sliced }
                }
            };
            list.push((target.name.clone(), target.tensor.numel()));
        }
        let unused = theirs.into_values().map(|p| (p.name.clone(), p.tensor.numel()));
        matched.unused = unused.collect();
        Ok(matched)
    }
}

impl Parameter {
    /// The part of each axis of `source` to copy; `None` if the source is smaller.
    fn kept_of(&self, source: &Self) -> Option<Vec<Kept>> {
        let rank = self.tensor.dim();
        if rank != source.tensor.dim() {
            return None;
        }
        (0..rank).map(|axis| kept(&self.along(axis), &source.along(axis))).collect()
    }

    /// The kinds of features along an axis; one by default.
    fn along(&self, axis: usize) -> Joined {
        let known = self.joined.iter().find(|joined| joined.axis == axis);
        known.cloned().unwrap_or_else(|| {
            let parts = vec![self.tensor.size()[axis]];
            Joined { axis, parts, share: Share::First }
        })
    }

    fn take(&self, source: &Self, kept: &[Kept]) -> std::result::Result<(), tch::TchError> {
        let mut values = source.tensor.shallow_clone();
        for (axis, kept) in kept.iter().enumerate() {
            if is_all(kept, values.size()[axis]) {
                continue;
            }
            let on_device = |list: Tensor| list.f_to_device(values.device());
            let indices: Vec<i64> = kept.iter().map(|index| index.unwrap_or(0)).collect();
            let is_absent: Vec<bool> = kept.iter().map(Option::is_none).collect();
            let mut shape = vec![1; values.dim()];
            shape[axis] = -1;
            let is_absent = on_device(Tensor::from_slice(&is_absent))?.f_view(shape.as_slice())?;
            values = values
                .f_index_select(axis as i64, &on_device(Tensor::from_slice(&indices))?)?
                .f_masked_fill(&is_absent, 0)?;
        }
        self.tensor.shallow_clone().f_copy_(&values)
    }
}

/// Indices into an axis of the source, ascending; none for a feature of a kind that the source lacks.
type Kept = Vec<Option<i64>>;

/// Whether the whole axis of the source, of `len` features, is kept.
fn is_all(kept: &[Option<i64>], len: i64) -> bool {
    kept.iter().copied().eq((0..len).map(Some))
}

fn kept(target: &Joined, source: &Joined) -> Option<Kept> {
    if target.parts.len() != source.parts.len() {
        return None;
    }
    let mut indices = Vec::new();
    let mut start = 0;
    for (&wanted, &there) in target.parts.iter().zip(&source.parts) {
        if there > 0 && wanted > there {
            return None;
        }
        indices.extend((0..wanted).map(|i| match target.share {
            _ if there == 0 => None,
            Share::First => Some(start + i),
            Share::Spaced => Some(start + i * there / wanted),
        }));
        start += there;
    }
    Some(indices)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(parts: &[i64], share: Share) -> Joined {
        Joined { axis: 0, parts: parts.to_vec(), share }
    }

    #[test]
    fn every_kind_gives_its_own_share() {
        let of = |target: &[i64], source: &[i64], share| {
            let kept = kept(&joined(target, share), &joined(source, share))?;
            // -1 for a feature that the source lacks.
            Some(kept.into_iter().map(|index| index.unwrap_or(-1)).collect::<Vec<i64>>())
        };
        assert_eq!(of(&[2], &[4], Share::First), Some(vec![0, 1]));
        assert_eq!(of(&[2, 1], &[3, 2], Share::First), Some(vec![0, 1, 3]));
        assert_eq!(of(&[2, 2, 0], &[4, 4, 1], Share::Spaced), Some(vec![0, 2, 4, 6]));
        assert_eq!(of(&[2, 1, 1], &[2, 0, 1], Share::First), Some(vec![0, 1, -1, 2]));
        // The same total, but different numbers per kind.
        assert_eq!(of(&[3, 1], &[2, 2], Share::First), None);
        assert_eq!(of(&[2], &[1, 1], Share::First), None);
    }
}
