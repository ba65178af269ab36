//! The sources of a mixture, each with its name and its share.

use ddil_files::Invalid;

use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::rollout::first_state;
use crate::rows::{index, inverse, on_device};
use crate::saved::SavedState;
use crate::source::{Selected, SourceRequest, TrajectorySource};
use crate::source_name::SourceName;
use crate::states::{Source, States};

/// An ordered list of sources: forward, student and teacher, whose shares are the priors, then the added ones, each
/// with a fixed share.
#[derive(Debug)]
pub(super) struct Mixture {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    /// The name in counters, meters and saved state.
    name: Source,
    /// The share of all states; 0 if set by the priors.
    share: f64,
    source: Box<dyn TrajectorySource>,
}

/// How pure noise takes the place of dataset samples.
#[derive(Clone, Copy, Debug)]
pub(super) struct PureNoise {
    /// Whether it does, at the noisiest timestep.
    pub(super) at_tmax: bool,
    /// Whether it has the conditioning of trajectories instead of the sample's.
    pub(super) is_prompted: bool,
}

impl Mixture {
    /// The sources whose shares are the priors, in the order in which they are saved.
    pub(super) const BY_PRIOR: [Source; 3] = [Source::Forward, Source::Student, Source::Teacher];

    pub(super) fn new(sources: [Box<dyn TrajectorySource>; 3]) -> Self {
        let entry = |(name, source)| Entry { name, share: 0.0, source };
        Self { entries: Self::BY_PRIOR.into_iter().zip(sources).map(entry).collect() }
    }

    /// Replaces forward, student or teacher with another source.
    pub(super) fn replace(
        &mut self,
        place: Source,
        source: Box<dyn TrajectorySource>,
    ) -> Result<()> {
        let Some(at) = Self::BY_PRIOR.iter().position(|of_prior| *of_prior == place) else {
            let expected = "forward, student or teacher";
            return Err(Invalid::new("place", place.as_str(), expected).into());
        };
        self.entries[at].source = source;
        Ok(())
    }

    /// Adds a source with a share of all states.
    pub(super) fn add(
        &mut self,
        name: &str,
        share: f64,
        source: Box<dyn TrajectorySource>,
    ) -> Result<()> {
        let added = SourceName::new(name)?;
        // Parts of the saved state have these names.
        let reserved = Source::ALL.iter().map(Source::as_str).chain([super::ADAPTATION]);
        let taken = self.entries.iter().map(|entry| entry.name.as_str()).chain(reserved);
        let is_taken = taken.into_iter().any(|other| other == name);
        let name = Source::Added(added);
        if is_taken {
            let expected = "a name that no other source has";
            return Err(Invalid::new("name", name.as_str(), expected).into());
        }
        let left = 1.0 - self.added_share();
        // Written so that NaN is rejected.
        if !(0.0..=left).contains(&share) {
            let expected = format!("in 0..={left}, the share that the other added sources leave");
            return Err(Invalid::new("share", share, expected).into());
        }
        self.entries.push(Entry { name, share, source });
        Ok(())
    }

    /// The added sources, with their shares.
    pub(super) fn added(&self) -> Vec<(Source, f64)> {
        let added = &self.entries[Self::BY_PRIOR.len()..];
        added.iter().map(|entry| (entry.name, entry.share)).collect()
    }

    fn added_share(&self) -> f64 {
        self.added().iter().map(|(_, share)| share).sum()
    }

    pub(super) fn sources(&self) -> impl Iterator<Item = &dyn TrajectorySource> {
        self.entries.iter().map(|entry| &*entry.source)
    }

    pub(super) fn sources_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn TrajectorySource>> {
        self.entries.iter_mut().map(|entry| &mut entry.source)
    }

    /// The saved state of each source, with its name.
    pub(super) fn save(&self) -> Result<Vec<(Source, SavedState)>> {
        self.entries.iter().map(|entry| Ok((entry.name, entry.source.save()?))).collect()
    }

    /// Checks that the saved state has the same sources.
    pub(super) fn ensure_same(&self, what: &'static str, saved: &[Source]) -> Result<()> {
        let here: Vec<Source> = self.entries.iter().map(|entry| entry.name).collect();
        if here == saved {
            return Ok(());
        }
        let text = |names: &[Source]| -> String {
            names.iter().map(Source::as_str).collect::<Vec<_>>().join(", ")
        };
        let problem = format!("its sources are {}, not {}", text(saved), text(&here));
        Err(Error::Restore { what, problem })
    }

    /// The source with a name.
    fn get_mut(&mut self, name: Source) -> Option<&mut Box<dyn TrajectorySource>> {
        self.entries.iter_mut().find(|entry| entry.name == name).map(|entry| &mut entry.source)
    }

    /// One state per sample, from its assigned source, in the samples' order.
    pub(super) fn collect(
        &mut self,
        full: &SourceRequest<'_>,
        assigned: &[Source],
        pure: PureNoise,
    ) -> Result<States> {
        let source_of = |row: usize| match (full.grid_indices[row], assigned[row]) {
            (0, Source::Student | Source::Teacher) => Source::Noise,
            (0, _) if pure.at_tmax => Source::Noise,
            (_, source) => source,
        };
        let added = self.entries[Self::BY_PRIOR.len()..].iter().map(|entry| entry.name);
        let names: Vec<Source> =
            Self::BY_PRIOR.into_iter().chain([Source::Noise]).chain(added).collect();
        let (mut parts, mut order) = (Vec::new(), Vec::with_capacity(full.len()));
        for name in names {
            let rows: Vec<usize> = (0..full.len()).filter(|&row| source_of(row) == name).collect();
            if rows.is_empty() {
                continue;
            }
            let part = Selected::of(full, &rows)?;
            let request = part.request(full);
            parts.push(match self.get_mut(name) {
                None => noise(&request, &rows, assigned, pure.is_prompted)?,
                Some(source) => named(source.states(&request)?, name),
            });
            order.extend(rows);
        }
        let states = States::cat(&parts)?.index_select(&inverse(&order))?;
        let x0 = &full.data.x0;
        Ok(States { x_t: states.x_t.to_device(x0.device()).to_kind(x0.kind()), ..states })
    }
}

/// Sets the name of an added source in its states, whatever the source wrote.
fn named(states: States, name: Source) -> States {
    match name {
        Source::Added(_) => States { sources: vec![name; states.len()], ..states },
        _ => states,
    }
}

/// Pure noise, with the conditioning of the source that it replaces, or with that of trajectories throughout.
fn noise(
    request: &SourceRequest<'_>,
    rows: &[usize],
    assigned: &[Source],
    is_prompted: bool,
) -> Result<States> {
    let timestep = request.grids.student.as_slice()[0];
    let x_t = first_state(request.sampler.schedule(), timestep, request.noise)?;
    let n = rows.len();
    let of_data = |i: usize| assigned[rows[i]] == Source::Forward && !is_prompted;
    let prompt_rows: Vec<usize> = (0..n).map(|i| if of_data(i) { i } else { n + i }).collect();
    let conditioning = Conditioning::cat(&[&request.data.conditioning, request.prompts])?
        .index_select(&index(&prompt_rows, request.device()))?;
    Ok(States {
        timesteps: on_device(&request.timesteps(), x_t.device()),
        x_t,
        grid_indices: request.grid_indices.to_vec(),
        conditioning,
        sources: vec![Source::Noise; n],
        created_at_step: vec![request.step; n],
    })
}
