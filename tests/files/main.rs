//! Files and settings.

mod json_settings;
mod report;
mod settings;
