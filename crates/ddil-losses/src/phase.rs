//! The phases of a training step.

use serde::{Deserialize, Serialize};

/// Which networks are trained in a part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The student is trained.
    Student,
    /// The critic and the discriminator are trained, for methods that have them.
    Critic,
}
