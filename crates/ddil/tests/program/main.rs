//! The program `ddil` from outside: what it refuses, and that a run which is killed and resumed ends on the same bits.
//!
//! Everything a test needs it makes itself, in a folder of its own: a few tiny pictures, a network of a few thousand
//! weights, runs of a dozen updates.

mod activation_checkpointing;
mod bad_input;
mod compare;
mod determinism;
mod failing;
#[cfg(debug_assertions)]
mod faults;
mod lora;
mod methods;
mod numbers;
mod resume;
mod soak;
mod support;
mod text_teacher;
mod text_to_image;
mod text_verbs;
mod verbs;
