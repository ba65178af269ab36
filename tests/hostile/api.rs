//! Every public function with arguments, called with arguments that it cannot accept: it must return an error or a
//! value, and never panic.
//!
//! The covered functions are compared with the sources, so that a new public function without a case fails here.

mod cases;
mod core;
mod data;
mod evaluate;
mod files;
mod inventory;
mod libtorch;
mod losses;
mod metrics;
mod models;
mod pipelines;
mod schedulers;
