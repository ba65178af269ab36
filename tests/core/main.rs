//! Tests of `ddil-core`, a module a file of its sources.
#![expect(clippy::float_cmp, reason = "values that are stored and read back are the same bits")]

mod adaptive;
mod buffer;
mod common;
mod conditioning;
mod denoiser;
mod loss_meter;
mod mixer;
mod mixture;
mod priors;
mod random;
mod rollout;
mod saved;
mod shift;
mod source;
mod spill;
