//! What `ddil-losses` promises, file by file.

mod distance;
mod guidance;
mod objective;
mod progressive;
mod toy;
mod weighting;
