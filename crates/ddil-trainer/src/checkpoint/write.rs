//! Writes a checkpoint atomically.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use ddil_core::SavedFile;
use ddil_files::{
    fault::{self, Point},
    hex, sync_folder, temporary_sibling, write_atomic,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::{
    Checkpoint, LATEST, MANIFEST, REPLACED, folder_of,
    manifest::{Linked, Manifest, Member, reason_not_a_member},
    tensors::write_tensors,
};
use crate::{Error, Result};

/// Writes one checkpoint, which does not exist until [`commit`](Self::commit).
///
/// Dropping the writer without a commit, for instance after an error such as a full disk, removes what was written and
/// leaves earlier checkpoints unchanged.
///
/// # Example
///
/// ```
/// use ddil_trainer::checkpoint::{CheckpointWriter, find_latest};
/// use tch::Tensor;
///
/// let folder = tempfile::tempdir()?;
/// let weights = [("weight".to_owned(), Tensor::from_slice(&[1.0_f32, 2.0]))];
/// let mut writer = CheckpointWriter::new(folder.path(), 1000, "distill")?;
/// writer.tensors("student.safetensors", &weights)?.json("state.json", &"anything serde can write")?;
/// writer.commit()?;
///
/// let checkpoint = find_latest(folder.path())?.checkpoint.ok_or("just written")?;
/// assert_eq!(checkpoint.step(), 1000);
/// assert_eq!(checkpoint.tensors("student.safetensors")?[0].1, weights[0].1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CheckpointWriter {
    checkpoints: PathBuf,
    aside: PathBuf,
    step: u64,
    kind: String,
    members: BTreeMap<String, Member>,
    linked: BTreeMap<String, Linked>,
}

impl CheckpointWriter {
    /// Starts the checkpoint of a step in the folder of all checkpoints, which is created if necessary.
    ///
    /// `kind` is the kind of run; a resume checks it.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if a folder cannot be created.
    pub fn new(checkpoints: &Path, step: u64, kind: &str) -> Result<Self> {
        let aside = temporary_sibling(&folder_of(checkpoints, step));
        fs::create_dir_all(checkpoints).map_err(Error::io("create", checkpoints))?;
        fault::reach(Point::CheckpointCreate, &folder_of(checkpoints, step))
            .and_then(|()| fs::create_dir(&aside))
            .map_err(Error::io("create", &aside))?;
        let (checkpoints, kind) = (checkpoints.to_owned(), kind.to_owned());
        let (members, linked) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { checkpoints, aside, step, kind, members, linked })
    }

    /// Adds a safetensors file. Tensors of any device and kind are written bit-exactly.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidMember`] for a name that is already used or is not a plain file name, [`Error::Tensors`] for a
    /// name given twice or a kind that safetensors lacks, [`Error::Files`] if the disk is full.
    pub fn tensors(&mut self, name: &str, tensors: &[(String, Tensor)]) -> Result<&mut Self> {
        self.member(name, |path, file| write_tensors(path, file, tensors))
    }

    /// Adds a JSON file.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidMember`] for a name that is already used or is not a plain file name, [`Error::Files`] for a
    /// value that JSON cannot represent or if the disk is full.
    pub fn json(&mut self, name: &str, value: &impl Serialize) -> Result<&mut Self> {
        self.member(name, |path, file| {
            serde_json::to_writer_pretty(file, value).map_err(Error::json("write", path))
        })
    }

    /// Adds an existing file as a hard link and flushes it to disk. Only its present content belongs to the checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidMember`] for a name that is already used or is not a plain file name; [`Error::Core`] or
    /// [`Error::Files`] if the file can be neither linked nor copied, or cannot be flushed.
    pub fn link(&mut self, file: &SavedFile) -> Result<&mut Self> {
        let SavedFile { name, bytes, crc32, .. } = file;
        self.ensure_free(name)?;
        let path = self.aside.join(name);
        file.link_to(&path)?;
        let flushed = File::open(&path).and_then(|file| file.sync_all());
        flushed.map_err(Error::io("flush", &path))?;
        self.linked.insert(name.clone(), Linked { bytes: *bytes, crc32: *crc32 });
        Ok(self)
    }

    fn ensure_free(&self, name: &str) -> Result<()> {
        let taken = self.members.contains_key(name) || self.linked.contains_key(name);
        match reason_not_a_member(name)
            .or(taken.then_some("the checkpoint already has a file of that name"))
        {
            Some(reason) => Err(Error::InvalidMember { name: name.to_owned(), reason }),
            None => Ok(()),
        }
    }

    fn member(
        &mut self,
        name: &str,
        write: impl FnOnce(&Path, &mut Hashed) -> Result<()>,
    ) -> Result<&mut Self> {
        self.ensure_free(name)?;
        let path = self.aside.join(name);
        let mut file = Hashed::create(&path).map_err(Error::io("create", &path))?;
        write(&path, &mut file)?;
        let member = file.finish().map_err(Error::io("write", &path))?;
        self.members.insert(name.to_owned(), member);
        Ok(self)
    }

    /// Moves the checkpoint into place and writes its name to `latest`; one of the same step is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the disk is full or a rename fails; earlier checkpoints are then unchanged.
    pub fn commit(self) -> Result<Checkpoint> {
        let manifest = Manifest::new(self.step, &self.kind, self.members.clone())?;
        let manifest = Manifest { linked: self.linked.clone(), ..manifest };
        let path = self.aside.join(MANIFEST);
        let sealed = manifest.clone().seal().and_then(|sealed| serde_json::to_vec_pretty(&sealed));
        let text = sealed.map_err(Error::json("write", &path))?;
        write_atomic(&path, &text)?;
        sync_folder(&self.aside)?;

        let place = folder_of(&self.checkpoints, self.step);
        self.move_into(&place)?;
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        write_atomic(&self.checkpoints.join(LATEST), format!("{name}\n").as_bytes())?;
        Ok(Checkpoint::trusted(place, manifest))
    }

    fn move_into(&self, place: &Path) -> Result<()> {
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let old = place.with_file_name(format!("{REPLACED}{name}"));
        let replaces = place.exists();
        if replaces {
            fault::rename(Point::CheckpointMakeRoom, place, &old)
                .map_err(Error::io("move aside", place))?;
        }
        if let Err(error) = fault::rename(Point::CheckpointRename, &self.aside, place) {
            if replaces {
                // Put the previous checkpoint back; the first error is the one to report.
                let _ = fs::rename(&old, place);
            }
            return Err(Error::io("move the checkpoint to", place)(error));
        }
        sync_folder(&self.checkpoints)?;
        if replaces {
            fault::reach(Point::CheckpointClear, place)
                .and_then(|()| fs::remove_dir_all(&old))
                .map_err(Error::io("remove", &old))?;
        }
        Ok(())
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        // After a commit the folder is already gone; after an error, that error is the one to report.
        let _ = fs::remove_dir_all(&self.aside);
    }
}

/// A file with a running checksum of the bytes passed to it, not of the bytes on disk.
pub(super) struct Hashed {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    bytes: u64,
}

impl Hashed {
    fn create(path: &Path) -> io::Result<Self> {
        fault::reach(Point::MemberCreate, path)?;
        let file = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
        Ok(Self { path: path.to_owned(), file, hasher: Sha256::new(), bytes: 0 })
    }

    fn finish(self) -> io::Result<Member> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        fault::reach(Point::MemberFlush, &self.path)?;
        file.sync_all()?;
        Ok(Member { bytes: self.bytes, sha256: hex(&self.hasher.finalize()) })
    }
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        fault::write_all(Point::MemberWrite, &self.path, &mut self.file, bytes)?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
