//! A batch whose samples stop at individual timesteps.

use ddil_files::Invalid;
use ddil_libtorch::{ArgumentError, Generator, ensure_real};
use ddil_schedulers::{Sampler, Timesteps};
use tch::{Kind, Tensor};

use super::step::{Actor, step};
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::rows::{index, inverse};

/// The part of a batch that has not reached its targets, at one level of a path.
pub(super) struct Leg<'a> {
    pub(super) level: usize,
    pub(super) x_t: &'a Tensor,
    pub(super) conditioning: &'a Conditioning,
    /// The timestep that each sample goes to in this step.
    pub(super) next: &'a [i64],
    /// The rows of these samples in the whole batch.
    pub(super) rows: &'a [usize],
}

/// Moves a batch, all at `path[0]`, until each sample is at its target; `advance` makes one step with the unfinished
/// samples.
pub(super) fn for_unfinished(
    path: &[i64],
    x_t: &Tensor,
    conditioning: &Conditioning,
    targets: &[i64],
    mut advance: impl FnMut(&Leg<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    // Samples with the longest path come first, so that the unfinished ones are always the front of the batch.
    let mut rows: Vec<usize> = (0..targets.len()).collect();
    rows.sort_by_key(|&row| targets[row]);
    let order = index(&rows, x_t.device());
    let mut x_t = x_t.index_select(0, &order);
    let conditioning = conditioning.index_select(&order)?;
    for (level, &timestep) in path.iter().enumerate() {
        let active = rows.partition_point(|&row| targets[row] < timestep);
        if active == 0 {
            break;
        }
        let after = path.get(level + 1).copied().unwrap_or(-1);
        let next: Vec<i64> = rows[..active].iter().map(|&row| targets[row].max(after)).collect();
        let (n, batch) = (active as i64, rows.len() as i64);
        let front = Tensor::arange(n, (Kind::Int64, x_t.device()));
        let leg = Leg {
            level,
            x_t: &x_t.narrow(0, 0, n),
            conditioning: &conditioning.index_select(&front)?,
            next: &next,
            rows: &rows[..active],
        };
        let stepped = advance(&leg)?;
        x_t = if n == batch {
            stepped
        } else {
            Tensor::f_cat(&[stepped, x_t.narrow(0, n, batch - n)], 0)
                .map_err(Error::torch("rollout"))?
        };
    }
    Ok(x_t.index_select(0, &index(&inverse(&rows), x_t.device())))
}

/// Moves a batch, all at `path[0]`, along `path` until each sample is at its target.
pub(super) fn run_steps(
    actor: Actor<'_>,
    path: &[i64],
    x_t: &Tensor,
    conditioning: &Conditioning,
    targets: &[i64],
    mut generator: Option<&mut Generator>,
) -> Result<Tensor> {
    for_unfinished(path, x_t, conditioning, targets, |leg| {
        let generator = generator.as_deref_mut();
        step(actor, leg.x_t, path[leg.level], leg.next, leg.conditioning, generator)
    })
}

/// Checks a first state and its conditioning, and that a sampler that adds noise has a generator.
pub(super) fn ensure_ready(
    op: &'static str,
    sampler: &dyn Sampler,
    noise: &Tensor,
    conditioning: &Conditioning,
    has_generator: bool,
) -> Result<()> {
    ensure_real(op, "noise", noise)?;
    let Some(&batch) = noise.size().first() else {
        let (shape, expected) = (vec![], "[batch, ..]".to_owned());
        return Err(ArgumentError::Shape { op, name: "noise", shape, expected }.into());
    };
    conditioning.ensure_batch(op, batch)?;
    if sampler.needs_noise() && !has_generator {
        return Err(ddil_schedulers::Error::NoiseMissing { op, argument: "generator" }.into());
    }
    Ok(())
}

/// Checks that there is one target per sample, and none noisier than `first`.
pub(super) fn ensure_targets(
    op: &'static str,
    noise: &Tensor,
    first: i64,
    targets: &[i64],
) -> Result<()> {
    if noise.size().first() != Some(&(targets.len() as i64)) {
        let expected = format!("{} rows, one per target", targets.len());
        return Err(
            ArgumentError::Shape { op, name: "noise", shape: noise.size(), expected }.into()
        );
    }
    match targets.iter().find(|target| !(-1..=first).contains(*target)) {
        Some(target) => {
            let expected = format!("in -1..={first}; the trajectory starts at {first}");
            Err(Invalid::new("targets", target, expected).into())
        }
        None => Ok(()),
    }
}

/// Checks that a finer grid visits every timestep of a coarser one.
pub(crate) fn ensure_part_of(
    field: &'static str,
    coarse: &Timesteps,
    fine: &Timesteps,
) -> Result<()> {
    match coarse.as_slice().iter().find(|timestep| !fine.as_slice().contains(timestep)) {
        Some(timestep) => {
            let value = format!("{timestep} among {:?}", coarse.as_slice());
            let expected = format!("one of the timesteps that are visited, {:?}", fine.as_slice());
            Err(Invalid::new(field, value, expected).into())
        }
        None => Ok(()),
    }
}
