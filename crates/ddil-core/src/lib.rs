//! The core of the method, not the floor of the workspace: which states a student is trained on.
//!
//! A student that samples in a few steps meets, at inference, states that its training never showed it. This crate
//! *collects* training states from three sources ([`Source`]): dataset samples noised forward, the student's own
//! backward trajectory, the teacher's backward trajectory.
//! Rollouts run without gradients and labels are made elsewhere, at the loss.
//!
//! Works for tensors of any rank with the batch first: vectors, audio, images, video.

mod conditioning;
mod denoiser;
mod error;
mod priors;
mod random;
mod rollout;
mod states;

pub use conditioning::Conditioning;
pub use denoiser::{Consistent, Denoiser, Guided, Thresholded};
pub use error::{Error, Result};
pub use priors::{PriorSchedule, PriorStep, Priors};
pub use random::{RandomStreams, Stream};
pub use rollout::{Trajectory, first_state, rollout, sample};
pub use states::{Data, Source, States};

/// temporary
pub type MixerConfig = PriorSchedule;
