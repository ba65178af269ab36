//! Names of sources added to a mixture.

use std::fmt;

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

/// The name of a source added to a mixture: 1 to 22 characters of `a`-`z`, `0`-`9` and `_`.
///
/// # Example
///
/// ```
/// use ddil_core::SourceName;
///
/// assert_eq!(SourceName::new("perturbed")?.as_str(), "perturbed");
/// assert!(SourceName::new("Perturbed states").is_err());
/// # Ok::<(), ddil_core::Error>(())
/// ```
// Of fixed size, as millions of states carry one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SourceName {
    bytes: [u8; MAX_LEN],
    len: u8,
}

const MAX_LEN: usize = 22;

impl SourceName {
    /// Checks a name.
    ///
    /// # Errors
    ///
    /// [`Invalid`] for an empty name, one that is too long and one with other characters.
    pub fn new(name: &str) -> Result<Self, Invalid> {
        let is_allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
        if !(1..=MAX_LEN).contains(&name.len()) || !name.bytes().all(is_allowed) {
            let expected = format!("1 to {MAX_LEN} of a-z, 0-9 and _");
            return Err(Invalid::new("source", format!("{name:?}"), expected));
        }
        let mut bytes = [0; MAX_LEN];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self { bytes, len: name.len() as u8 })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        // Only ASCII is accepted.
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl From<SourceName> for String {
    fn from(name: SourceName) -> Self {
        name.as_str().to_owned()
    }
}

impl TryFrom<String> for SourceName {
    type Error = Invalid;

    fn try_from(name: String) -> Result<Self, Invalid> {
        Self::new(&name)
    }
}

impl fmt::Debug for SourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}
