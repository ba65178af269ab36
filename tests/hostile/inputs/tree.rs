//! A folder in memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::Rng;

/// Files by their path in the folder.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

impl Tree {
    /// One file.
    pub(crate) fn file(name: &str, content: impl Into<Vec<u8>>) -> Self {
        Self::default().with(name, content)
    }

    /// The same with one more file.
    pub(crate) fn with(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.insert(name.to_owned(), content.into());
        self
    }

    /// All files of a folder on disk.
    pub(crate) fn read(folder: &Path) -> Self {
        let mut tree = Self::default();
        tree.add(folder, folder);
        assert!(!tree.files.is_empty(), "{} is empty", folder.display());
        tree
    }

    fn add(&mut self, root: &Path, folder: &Path) {
        for entry in fs::read_dir(folder).expect("a folder of the project") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                self.add(root, &path);
            } else {
                let name = path.strip_prefix(root).expect("it lies there").display().to_string();
                self.files.insert(name, fs::read(&path).expect("a file of the project"));
            }
        }
    }

    /// Folders that once failed a target.
    pub(crate) fn corpus(target: &str) -> Vec<Self> {
        let folder = repository().join("tests/hostile/corpus").join(target);
        let Ok(entries) = fs::read_dir(&folder) else { return Vec::new() };
        let mut cases: Vec<PathBuf> =
            entries.map(|entry| entry.expect("an entry").path()).collect();
        cases.sort();
        cases.iter().map(|case| Self::read(case)).collect()
    }

    /// Writes the folder and replaces an existing one.
    pub(crate) fn write(&self, folder: &Path) {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder).expect("a folder");
        for (name, content) in &self.files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().expect("it lies in a folder")).expect("a folder");
            fs::write(&path, content).expect("a file");
        }
    }

    /// Takes over about half of the other's files.
    pub(crate) fn mix(&mut self, other: &Self, rng: &mut impl Rng) {
        for (name, content) in &other.files {
            if rng.random() {
                self.files.insert(name.clone(), content.clone());
            }
        }
    }

    /// Whether an error names a place: a file of the folder, or a key in backticks.
    pub(crate) fn names_place_in(&self, message: &str) -> bool {
        let file_name = |path: &String| path.rsplit('/').next().unwrap_or_default().to_owned();
        self.files.keys().map(file_name).any(|name| message.contains(&name))
            || message.contains('`')
    }
}

/// The root of the repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
