//! The core of the method, not the floor of the workspace: which states a student is trained on.
//!
//! A student that samples in a few steps meets, at inference, states that its training never showed it. This crate
//! *collects* training states from three sources ([`Source`]): dataset samples noised forward, the student's own
//! backward trajectory, the teacher's backward trajectory. [`Mixer`] draws a batch from all three;
//! [`AggregationBuffer`] keeps visited states for a while; [`measure_shift`] says how far the states at inference lie
//! from those of training.
//! Rollouts run without gradients and labels are made elsewhere, at the loss.
//!
//! | for | there is |
//! | --- | --- |
//! | what a network can be asked | [`Denoiser`], [`Conditioning`], [`Guided`], [`GuidedByWeight`], [`Consistent`], [`Thresholded`] |
//! | running it | [`Rollout`], [`MixedRollout`] |
//! | where states come from | [`TrajectorySource`], [`ForwardSource`], [`StudentSource`], [`TeacherSource`] |
//! | how often | [`Priors`], [`PriorSchedule`], [`AdaptivePriors`] |
//! | what is measured meanwhile | [`ClipMeter`], [`LossMeter`], [`measure_shift`] |
//! | random numbers that resume exactly | [`RandomStreams`], [`Stream`] |
//!
//! Works for tensors of any rank with the batch first: vectors, audio, images, video.

#![forbid(unsafe_code)]

mod buffer;
mod conditioning;
mod denoiser;
mod error;
mod loss_meter;
mod mixer;
mod priors;
mod random;
mod rollout;
mod rows;
mod saved;
mod shift;
mod source;
mod source_name;
mod states;
mod tally;

pub use buffer::{AggregationBuffer, BufferConfig, BufferStatistics, SpillConfig, StorageKind};
pub use conditioning::Conditioning;
pub use ddil_libtorch::Generator;
pub use denoiser::{
    ClipMeter, ClippedFraction, Consistent, Denoiser, Discriminator, FnDenoiser, Guided,
    GuidedByWeight, Thresholded, repeated_timestep, with_boundary,
};
pub use error::{Error, Result};
pub use loss_meter::{LossMeter, LossTable};
pub use mixer::{
    Clock, Feedback, MixBatch, Mixer, MixerConfig, MixerCounters, RolloutNetworks,
    draw_grid_indices,
};
pub use priors::{AdaptivePriors, AdaptiveSignal, PriorSchedule, PriorStep, Priors};
pub use random::{Draws, RandomStreams, Stream};
pub use rollout::{MixedRollout, MixedVariant, Rollout, Trajectory, Visited, first_state};
pub use saved::{SavedFile, SavedState};
pub use shift::{
    Distances, ShiftAt, ShiftConfig, ShiftReport, ShiftRequest, ShiftSummary, measure_shift,
    shift_at,
};
pub use source::{
    ForwardSource, Grids, LossFeedback, RolloutSteps, SourceConfig, SourceRequest, StudentConfig,
    StudentPolicy, StudentSource, TeacherConfig, TeacherSource, TeacherStates, TrajectorySource,
};
pub use source_name::SourceName;
pub use states::{Data, Source, States};

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
