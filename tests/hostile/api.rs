//! Every public function with arguments against arguments that it cannot take: an error or an answer, and never a panic.
//!
//! What is covered is compared with the sources, so that a new public function without a case fails here.

mod cases;
mod core;
mod data;
mod files;
mod inventory;
mod libtorch;
mod losses;
mod metrics;
mod models;
mod pipelines;
mod schedulers;
