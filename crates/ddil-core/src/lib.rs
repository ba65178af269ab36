//! Training states for the distillation of diffusion models, for use in your own training loop.
//!
//! A student that samples in a few steps meets states at inference that plain distillation never trains on. This crate
//! makes training batches from a mixture of sources: noised dataset samples, states of the student's own backward
//! trajectories and states of the teacher's, as in DDIL ([Garrepalli et al. 2024](https://arxiv.org/abs/2410.11971)).
//! Rollouts run without gradients; the loss, the network and the optimizer are yours, or those of `ddil-losses` and
//! `ddil-models`.
//!
//! # Example
//!
//! ```
//! use ddil_core::{
//!     Clock, Data, Feedback, FnDenoiser, MixBatch, Mixer, MixerConfig, RandomStreams, Rollout, RolloutNetworks,
//! };
//! use ddil_schedulers::{Ddim, NoiseScheduleConfig, PredictionType, TimestepSpacing, Timesteps};
//! use tch::{Tensor, kind};
//!
//! let schedule = NoiseScheduleConfig::default().build()?;
//! let sampler = Ddim::new(schedule.clone());
//! let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
//! // A placeholder for a network: it estimates all data as 0.
//! let network = FnDenoiser::new(schedule, PredictionType::Sample, |x_t, _timesteps, _conditioning| Ok(x_t.zeros_like()));
//!
//! // Sampling.
//! let samples = Rollout::new(&network, &sampler, &grid).sample(Tensor::randn([8, 2], kind::FLOAT_CPU))?;
//! assert_eq!(samples.size(), [8, 2]);
//!
//! // Training states; the loss comes in between.
//! let mut mixer = Mixer::new(MixerConfig::default(), grid, Box::new(sampler))?;
//! for step in 0..3 {
//!     let clock = Clock::new(step, 3, RandomStreams::new(0, 0));
//!     let data = Data::new(Tensor::randn([8, 2], kind::FLOAT_CPU));
//!     let networks = RolloutNetworks::new(&network, &network);
//!     let states = mixer.next_states(&clock, &MixBatch::new(&data), &networks)?;
//!     let student_x0 = states.x_t.zeros_like(); // the student's estimates, from the loss
//!     mixer.feed_back(&clock, &states, &Feedback::new(&student_x0))?;
//! }
//! # Ok::<(), ddil_core::Error>(())
//! ```
//!
//! # Parts
//!
//! | for | there is |
//! | --- | --- |
//! | networks and their inputs | [`Denoiser`], [`FnDenoiser`], [`Conditioning`], [`Guided`], [`GuidedByWeight`], [`Consistent`], [`Thresholded`] |
//! | exact teachers in closed form | [`GaussianMixture`], [`MixtureDenoiser`] |
//! | from noise to samples | [`Rollout`], [`MixedRollout`]; [`SolverRollout`] with a multistep solver |
//! | a batch from a mixture | [`Mixer`], [`Clock`], [`MixBatch`], [`RolloutNetworks`], [`Feedback`] |
//! | sources | [`TrajectorySource`], [`ForwardSource`], [`StudentSource`], [`TeacherSource`], [`AggregationBuffer`] |
//! | shares of sources | [`Priors`], [`PriorSchedule`], [`AdaptivePriors`], [`Mixer::with_source`] |
//! | measurements | [`ClipMeter`], [`LossMeter`], [`measure_shift`] |
//! | exact resume | [`RandomStreams`], [`Stream`], [`SavedState`] |
//!
//! Tensors may have any rank with the batch first: vectors, audio, images, video.

#![forbid(unsafe_code)]

mod buffer;
mod conditioning;
mod denoiser;
mod error;
mod inputs;
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
mod stratified;
mod tally;

pub use buffer::{AggregationBuffer, BufferConfig, BufferStatistics, SpillConfig, StorageKind};
pub use conditioning::Conditioning;
pub use ddil_files::Report;
pub use ddil_libtorch::Generator;
pub use denoiser::{
    ClipMeter, ClippedFraction, Consistent, Denoiser, Discriminator, FnDenoiser, GaussianMixture,
    Guided, GuidedByWeight, MixtureDenoiser, Thresholded, repeated_level, repeated_timestep,
    with_boundary,
};
pub use error::{Error, Result};
pub use inputs::{Clock, Feedback, RolloutNetworks};
pub use loss_meter::{LossMeter, LossTable};
pub use mixer::{MixBatch, Mixer, MixerConfig, MixerCounters, draw_grid_indices};
pub use priors::{AdaptivePriors, AdaptiveSignal, PriorSchedule, PriorStep, Priors};
pub use random::{Draws, RandomStreams, Stream};
pub use rollout::{
    MixedRollout, MixedVariant, Rollout, SolverRollout, Trajectory, Visited, first_state,
};
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
pub use stratified::draw_stratified;

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
