//! Files and settings.

mod settings;
