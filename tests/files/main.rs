//! Files and settings.

mod atomic;
mod json_settings;
mod report;
mod settings;
