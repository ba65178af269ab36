//! Files and settings.

mod json_settings;
mod settings;
