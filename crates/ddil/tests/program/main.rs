//! The program `ddil` from outside: the input that it refuses, and that a killed and resumed run ends with the same
//! bits.
//!
//! Tests create everything they need in a separate folder: a few tiny images, a network of a few thousand weights, runs
//! of a dozen updates.

mod activation_checkpointing;
mod bad_input;
#[cfg(debug_assertions)]
mod checkpoint_models;
mod compare;
mod demo;
mod determinism;
mod evaluate;
mod evaluate_prompts;
mod evaluating;
mod failing;
#[cfg(debug_assertions)]
mod faults;
mod lora;
mod methods;
mod numbers;
mod outputs;
mod prompts;
mod published;
mod report;
mod resume;
mod soak;
mod support;
mod text_teacher;
mod text_to_image;
mod text_verbs;
mod verbs;
