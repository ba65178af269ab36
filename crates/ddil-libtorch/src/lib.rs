//! The floor under ddil: what tch does not bind of libtorch, behind a safe face.

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {}
