//! Who is trained.

use serde::{Deserialize, Serialize};

/// Who is trained in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The student.
    Student,
    /// The critics of a method that has some.
    Critic,
}
