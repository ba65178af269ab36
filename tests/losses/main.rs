//! What `ddil-losses` promises, file by file.

mod distance;
mod dmd2;
mod guidance;
mod lcm;
mod objective;
mod one_sampler;
mod progressive;
mod toy;
mod weighting;
