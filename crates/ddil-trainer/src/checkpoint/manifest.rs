//! What a checkpoint says of itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::MANIFEST;
use crate::Result;

/// The layout described here; a reader refuses any other.
pub(super) const FORMAT_VERSION: u32 = 1;

/// What a checkpoint says of itself, in `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the folder's layout.
    pub format_version: u32,
    /// What kind of run wrote it, such as `distill`.
    pub kind: String,
    /// How many optimizer updates lie behind it.
    pub step: u64,
    /// Threads libtorch used: another number gives other bits from here on.
    pub num_threads: usize,
    /// The version of the program that wrote it.
    pub ddil: String,
    /// The version of libtorch that computed it.
    pub libtorch: String,
    /// The other files of the folder.
    pub members: BTreeMap<String, Member>,
    /// Those of them that a run goes on to write behind what belongs to the checkpoint.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub linked: BTreeMap<String, Linked>,
}

/// Which part of a file that may have grown belongs to a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linked {
    /// Its first so many bytes.
    pub bytes: u64,
    /// Their CRC-32: states of a buffer are too many for anything slower.
    pub crc32: u32,
}

/// Size and checksum of a file in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// The manifest as it stands in the file, with its own checksum beside it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sealed {
    pub(super) manifest: Manifest,
    sha256: String,
}

/// What a manifest says of its format, whatever else stands there.
#[derive(Deserialize)]
pub(super) struct Said {
    pub(super) manifest: SaidVersion,
}

#[derive(Deserialize)]
pub(super) struct SaidVersion {
    pub(super) format_version: u32,
}

impl Manifest {
    pub(super) fn new(step: u64, kind: &str, members: BTreeMap<String, Member>) -> Result<Self> {
        Ok(Self {
            format_version: FORMAT_VERSION,
            kind: kind.to_owned(),
            step,
            num_threads: ddil_libtorch::num_threads()?,
            ddil: env!("CARGO_PKG_VERSION").to_owned(),
            libtorch: ddil_libtorch::version().to_owned(),
            members,
            linked: BTreeMap::new(),
        })
    }

    pub(super) fn seal(self) -> serde_json::Result<Sealed> {
        Ok(Sealed { sha256: checksum(&self)?, manifest: self })
    }
}

impl Sealed {
    pub(super) fn is_intact(&self) -> bool {
        checksum(&self.manifest).is_ok_and(|sha256| sha256 == self.sha256)
    }
}

/// Of the compact form, so that white space in the file does not count.
fn checksum(manifest: &Manifest) -> serde_json::Result<String> {
    Ok(hex(&Sha256::digest(serde_json::to_vec(manifest)?)))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // Writing to a string cannot fail.
        text
    })
}

/// Why a name cannot be that of a member, if so: it must stay a plain file of its own in the folder.
pub(super) fn objection(name: &str) -> Option<&'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 200 {
        Some("its length is not from 1 to 200")
    } else if name.starts_with('.') {
        Some("it starts with a dot")
    } else if !name.chars().all(plain) {
        Some("only letters, digits, dot, underscore and hyphen may stand in it")
    } else if name == MANIFEST {
        Some("it is that of the manifest")
    } else {
        None
    }
}
