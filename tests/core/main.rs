//! Tests of `ddil-core`, a module a file of its sources.

mod buffer;
mod common;
mod denoiser;
mod mixer;
mod priors;
mod random;
mod rollout;
mod shift;
mod source;
