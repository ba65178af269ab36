//! What a run leaves on disk, and what happens when the disk, the user or a crash gets in its way.

mod checkpoint;
mod record;
mod settings;
