//! Finding, checking and reading checkpoints.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use ddil_core::SavedFile;
use ddil_files::{hex, read_json, read_small_json, with_causes};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::{
    MANIFEST,
    damage::Damage,
    manifest::{
        FORMAT_VERSION, Linked, Manifest, ManifestHeader, Member, Sealed, reason_not_a_member,
    },
    step_of,
    tensors::read_tensors,
};
use crate::{Error, Result};

/// A checkpoint whose bytes have all been verified.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

/// A checkpoint that was skipped.
#[derive(Debug)]
pub struct Damaged {
    /// Its folder.
    pub path: PathBuf,
    /// Why it cannot be used.
    pub reason: Damage,
}

/// The result of [`find_latest`].
#[derive(Debug)]
pub struct Found {
    /// The newest sound checkpoint, if there is one.
    pub checkpoint: Option<Checkpoint>,
    /// Newer checkpoints that are damaged, newest first; to be reported to the user.
    pub damaged: Vec<Damaged>,
}

/// The newest checkpoint without any damage, and the damaged ones that are newer.
///
/// A folder that does not exist contains no checkpoints.
///
/// # Errors
///
/// [`Error::Files`] if the folder cannot be listed.
pub fn find_latest(checkpoints: &Path) -> Result<Found> {
    let mut damaged = Vec::new();
    for path in list(checkpoints)?.into_iter().rev() {
        match check(&path) {
            Ok(manifest) => {
                return Ok(Found { checkpoint: Some(Checkpoint { path, manifest }), damaged });
            }
            Err(reason) => damaged.push(Damaged { path, reason }),
        }
    }
    Ok(Found { checkpoint: None, damaged })
}

/// The newest checkpoint without any damage; damaged ones that are newer are reported as warnings. None if there is no
/// checkpoint at all.
///
/// # Errors
///
/// [`Error::NoIntactCheckpoint`] if all are damaged, [`Error::Files`] if the folder cannot be listed.
pub fn newest_intact(checkpoints: &Path) -> Result<Option<Checkpoint>> {
    let Found { checkpoint, damaged } = find_latest(checkpoints)?;
    for Damaged { path, reason } in &damaged {
        tracing::warn!("{} is damaged and was skipped: {reason}", path.display());
    }
    let count = damaged.len();
    match (checkpoint, damaged.into_iter().next()) {
        (None, Some(newest)) => Err(Error::NoIntactCheckpoint {
            path: checkpoints.to_owned(),
            count,
            newest: newest.reason,
        }),
        (checkpoint, _) => Ok(checkpoint),
    }
}

/// The folders of all checkpoints, sound or not, oldest first.
///
/// # Errors
///
/// [`Error::Files`] if the folder cannot be listed; one that does not exist is empty.
pub fn list(checkpoints: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(checkpoints) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("list", checkpoints))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("list", checkpoints))?.path();
        if let (Some(step), true) = (step_of(&path), path.is_dir()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

impl Checkpoint {
    /// Opens one checkpoint and verifies all its bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if there is no such folder, [`Error::DamagedCheckpoint`] if it differs from what was written.
    pub fn open(path: &Path) -> Result<Self> {
        fs::read_dir(path).map_err(Error::io("open", path))?;
        match check(path) {
            Ok(manifest) => Ok(Self { path: path.to_owned(), manifest }),
            Err(source) => Err(Error::DamagedCheckpoint { path: path.to_owned(), source }),
        }
    }

    /// Opens a checkpoint that has just been written.
    pub(super) fn trusted(path: PathBuf, manifest: Manifest) -> Self {
        Self { path, manifest }
    }

    /// The number of optimizer updates done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Checks that a run of this kind wrote it.
    ///
    /// # Errors
    ///
    /// [`Error::OtherCheckpoint`] otherwise.
    pub fn ensure_kind(&self, expected: &str) -> Result<()> {
        if self.manifest.kind == expected {
            return Ok(());
        }
        Err(Error::OtherCheckpoint {
            path: self.path.clone(),
            found: self.manifest.kind.clone(),
            expected: expected.to_owned(),
        })
    }

    /// Reasons why a resume from here is not bit-exact, in words; empty if it is.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`] if libtorch does not return its number of threads.
    pub fn obstacles_to_exact_resume(&self) -> Result<Vec<String>> {
        let now = Manifest::new(self.step(), &self.manifest.kind, self.manifest.members.clone())?;
        let differ = |what: &str, then: &str, now: &str| {
            (then != now).then(|| format!("{what}: {then} then, {now} now"))
        };
        let threads = |manifest: &Manifest| manifest.num_threads.to_string();
        let obstacles = [
            differ("number of threads", &threads(&self.manifest), &threads(&now)),
            differ("libtorch", &self.manifest.libtorch, &now.libtorch),
            differ("ddil", &self.manifest.ddil, &now.ddil),
        ];
        Ok(obstacles.into_iter().flatten().collect())
    }

    /// Whether it contains a file of this name.
    pub fn has(&self, name: &str) -> bool {
        self.manifest.members.contains_key(name)
    }

    /// Reads a safetensors file onto the CPU, in the stored kinds, sorted by name.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchMember`] if there is no such file, [`Error::Tensors`] if it is not safetensors.
    pub fn tensors(&self, name: &str) -> Result<Vec<(String, Tensor)>> {
        read_tensors(&self.member(name)?)
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchMember`] if there is no such file, [`Error::Files`] if it does not contain a `T`.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        Ok(read_json(&self.member(name)?)?)
    }

    /// The files that were [linked](super::CheckpointWriter::link), sorted by name.
    pub fn linked(&self) -> Vec<SavedFile> {
        let linked = self.manifest.linked.iter();
        linked.map(|(name, linked)| saved_file(&self.path, name, linked)).collect()
    }

    fn member(&self, name: &str) -> Result<PathBuf> {
        if self.has(name) {
            return Ok(self.path.join(name));
        }
        Err(Error::NoSuchMember {
            path: self.path.clone(),
            name: name.to_owned(),
            known: self.manifest.members.keys().cloned().collect(),
        })
    }
}

fn check(path: &Path) -> Result<Manifest, Damage> {
    let unreadable = |error: ddil_files::Error| Damage::Manifest { reason: cause_of(&error) };
    // The format version is read first: unknown fields of a newer version would give a misleading error.
    let header: ManifestHeader = read_small_json(&path.join(MANIFEST)).map_err(unreadable)?;
    let found = header.manifest.format_version;
    if found != FORMAT_VERSION {
        return Err(Damage::Format { found });
    }
    let sealed: Sealed = read_small_json(&path.join(MANIFEST)).map_err(unreadable)?;
    if !sealed.is_intact() {
        return Err(Damage::ManifestChecksum);
    }
    let manifest = sealed.manifest;
    if step_of(path).is_some_and(|step| step != manifest.step) {
        return Err(Damage::OtherStep { found: manifest.step });
    }
    for (name, member) in &manifest.members {
        check_member(path, name, member)?;
    }
    for (name, linked) in &manifest.linked {
        ensure_name(name)?;
        let intact = saved_file(path, name, linked).ensure_intact();
        intact.map_err(|e| Damage::Linked { name: name.clone(), reason: with_causes(&e) })?;
    }
    Ok(manifest)
}

fn saved_file(folder: &Path, name: &str, linked: &Linked) -> SavedFile {
    let Linked { bytes, crc32 } = *linked;
    SavedFile { name: name.to_owned(), path: folder.join(name), bytes, crc32 }
}

fn ensure_name(name: &str) -> Result<(), Damage> {
    match reason_not_a_member(name) {
        Some(reason) => Err(Damage::MemberName { name: name.to_owned(), reason }),
        None => Ok(()),
    }
}

fn check_member(folder: &Path, name: &str, expected: &Member) -> Result<(), Damage> {
    ensure_name(name)?;
    let unreadable = |reason| Damage::Member { name: name.to_owned(), reason };
    let mut file = ddil_files::open_regular_file(folder.join(name)).map_err(unreadable)?;
    let found = file.metadata().map_err(unreadable)?.len();
    if found != expected.bytes {
        return Err(Damage::Size { name: name.to_owned(), found, expected: expected.bytes });
    }
    if sha256_of(&mut file).map_err(unreadable)? != expected.sha256 {
        return Err(Damage::Checksum { name: name.to_owned() });
    }
    Ok(())
}

fn sha256_of(file: &mut impl Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex(&hasher.finalize())),
            length => hasher.update(&chunk[..length]),
        }
    }
}

fn cause_of(error: &ddil_files::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
