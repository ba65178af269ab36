//! Unsafe code is in one crate and nowhere else.

use std::fs;
use std::path::{Path, PathBuf};

use crate::inputs::repository;

/// The one that calls C++.
const FLOOR: &str = "ddil-libtorch";

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_other_crate_forbids_it() {
    for entry in fs::read_dir(repository().join("crates")).expect("crates") {
        let krate = entry.expect("an entry").path();
        if krate.ends_with(FLOOR) {
            continue;
        }
        let roots = ["src/lib.rs", "src/main.rs"].map(|root| krate.join(root));
        for root in roots.iter().filter(|root| root.is_file()) {
            let text = fs::read_to_string(root).expect("text");
            let forbids = text.lines().any(|line| line == "#![forbid(unsafe_code)]");
            assert!(forbids, "{} does not forbid unsafe code", root.display());
        }
    }
}

/// Tests, examples and benches do not need it either; the workspace denies it, and no package allows it again.
#[test]
fn no_module_allows_unsafe_code_again() {
    let mut files = Vec::new();
    for folder in ["crates", "examples", "benches", "tests"] {
        sources(&repository().join(folder), &mut files);
    }
    let allows = format!("allow({}", "unsafe_code");
    for file in files {
        let text = fs::read_to_string(&file).expect("text");
        let is_floor = file.to_string_lossy().contains(&format!("crates/{FLOOR}/"));
        assert!(is_floor || !text.contains(&allows), "{} allows unsafe code", file.display());
    }
}
