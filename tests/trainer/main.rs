//! What a run leaves on disk, and what happens when the disk, the user or a crash gets in its way.

mod checkpoint;
mod dataset;
mod doctor;
mod ema;
mod interrupt;
mod lr_schedule;
mod optimizer;
mod picture;
mod record;
mod run_folder;
mod settings;
mod tensorboard;
