//! The machine and the versions with which a run was computed.

use std::{
    fs,
    path::{Path, PathBuf},
    thread::available_parallelism,
};

use ddil_files::{read_versioned, write_json};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::Device;

use crate::{Error, Result};

/// File name in a run folder.
const FILE: &str = "environment.json";
/// The only version of the file so far.
const FORMAT_VERSION: u32 = 1;

/// The version of tch of this build.
const TCH: &str = "0.26";

/// Machine and versions, as `ddil doctor` prints them and [`RunEnvironment`] stores them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The version of this program.
    pub ddil: String,
    /// The version of tch.
    pub tch: String,
    /// The version of libtorch for which this program was built.
    pub libtorch: String,
    /// The libtorch that is loaded.
    pub loaded: LoadedLibtorch,
    /// Operating system and processor family, such as `linux x86_64`.
    pub platform: String,
    /// The processor's model name; empty if the system does not report it.
    pub cpu: String,
    /// Number of processors available to this process.
    pub num_cpus: usize,
    /// Number of libtorch's threads within an operation.
    pub num_threads: usize,
    /// Number of libtorch operations that run in parallel.
    pub num_interop_threads: usize,
    /// Number of usable CUDA devices.
    pub num_cuda_devices: usize,
    /// Why no CUDA device can be used; none if one can.
    pub why_no_cuda: Option<String>,
    /// Result of [`keep_freed_pages`](ddil_libtorch::keep_freed_pages) at the start; false if it was not called.
    pub keeps_freed_pages: bool,
}

/// Path and version of the loaded libtorch, as far as the system reports them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedLibtorch {
    /// Its `libtorch_cpu.so`.
    pub path: Option<PathBuf>,
    /// The version in the files next to it.
    pub version: Option<String>,
}

impl Environment {
    /// Reads the properties of the machine.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`] if libtorch fails.
    pub fn here() -> Result<Self> {
        Ok(Self {
            ddil: env!("CARGO_PKG_VERSION").to_owned(),
            tch: TCH.to_owned(),
            libtorch: ddil_libtorch::version().to_owned(),
            loaded: LoadedLibtorch::find(),
            platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            num_cpus: available_parallelism().map_or(0, usize::from),
            num_threads: ddil_libtorch::num_threads()?,
            num_interop_threads: ddil_libtorch::num_interop_threads()?,
            num_cuda_devices: ddil_libtorch::cuda_device_count().unwrap_or(0),
            why_no_cuda: ddil_libtorch::why_no_cuda().map(|reason| reason.to_string()),
            keeps_freed_pages: ddil_libtorch::keeps_freed_pages(),
        })
    }
}

/// Where a run was computed, in `environment.json` of its folder: the first session, and later ones that differ.
///
/// # Example
///
/// ```
/// use ddil_trainer::RunEnvironment;
/// use tch::Device;
///
/// let folder = tempfile::tempdir()?;
/// RunEnvironment::note(folder.path(), 0, Device::Cpu)?;
/// // Resumed in the same environment: nothing is added.
/// RunEnvironment::note(folder.path(), 100, Device::Cpu)?;
/// let run = RunEnvironment::from_folder(folder.path())?;
/// assert_eq!((run.first.step, run.first.facts["device"].as_str()), (0, Some("cpu")));
/// assert_eq!(run.first.facts["libtorch"], ddil_libtorch::version());
/// assert!(run.later.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunEnvironment {
    format_version: u32,
    /// The first session: the `device` and all of [`Environment`].
    pub first: SessionEnvironment,
    /// Every session that differs from the one before it: its differences from the first one, none if it equals that
    /// again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub later: Vec<SessionEnvironment>,
}

/// The facts of a session of a run. Another version of this program may store other facts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionEnvironment {
    /// Updates done when it began.
    pub step: u64,
    /// Facts by name.
    #[serde(flatten)]
    pub facts: Map<String, Value>,
}

impl RunEnvironment {
    /// Reads the environments of the run in a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the file is missing or unreadable, and if another version of the program wrote it.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        Ok(read_versioned(&folder.join(FILE), FORMAT_VERSION)?)
    }

    /// Records that a session begins at `step` on a device. Writes the file atomically, and only if something differs.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`] if libtorch fails, [`Error::Files`] if the file cannot be written; those of
    /// [`from_folder`](Self::from_folder) for an existing file that is not valid, which is left unchanged.
    pub fn note(folder: &Path, step: u64, device: Device) -> Result<()> {
        let path = folder.join(FILE);
        let now = facts(&path, device)?;
        let run = if path.exists() {
            let mut run = Self::from_folder(folder)?;
            if !run.add(step, &now) {
                return Ok(());
            }
            run
        } else {
            let first = SessionEnvironment { step, facts: now };
            Self { format_version: FORMAT_VERSION, first, later: Vec::new() }
        };
        Ok(write_json(&path, &run)?)
    }

    /// Adds a session; false if it equals the last one.
    fn add(&mut self, step: u64, now: &Map<String, Value>) -> bool {
        let facts = differences(&self.first.facts, now);
        let is_new = self.later.last().map_or(!facts.is_empty(), |last| last.facts != facts);
        if is_new {
            self.later.push(SessionEnvironment { step, facts });
        }
        is_new
    }
}

/// All facts, and the device in the config's notation.
fn facts(path: &Path, device: Device) -> Result<Map<String, Value>> {
    let device = match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    };
    let facts = SessionFacts { device, environment: Environment::here()? };
    let facts = serde_json::to_value(facts).and_then(serde_json::from_value);
    facts.map_err(Error::json("write", path))
}

#[derive(Serialize)]
struct SessionFacts {
    device: String,
    #[serde(flatten)]
    environment: Environment,
}

/// The facts that differ; null for those that are missing now.
fn differences(then: &Map<String, Value>, now: &Map<String, Value>) -> Map<String, Value> {
    let names = then.keys().chain(now.keys());
    let differing = names.filter(|name| then.get(*name) != now.get(*name));
    differing.map(|name| (name.clone(), now.get(name).cloned().unwrap_or_default())).collect()
}

impl LoadedLibtorch {
    fn find() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let path = mapped_libtorch(&maps);
        // .../lib/libtorch_cpu.so
        let version = path.as_deref().and_then(|path| version_in(path.parent()?.parent()?));
        Self { path, version }
    }
}

fn mapped_libtorch(maps: &str) -> Option<PathBuf> {
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    Some(PathBuf::from(&line[line.find('/')?..]))
}

/// The zip archive has `build-version`, the Python package `version.py`.
fn version_in(folder: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(folder.join("build-version")) {
        return Some(text.trim().to_owned());
    }
    let text = fs::read_to_string(folder.join("version.py")).ok()?;
    let line = text.lines().find(|line| line.starts_with("__version__"))?;
    Some(line.split('\'').nth(1)?.to_owned())
}

fn cpu(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(':')).map_or("", |(_, name)| name.trim()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_library_is_found_in_the_memory_map() {
        let maps = "7f00-7f01 r-xp 00000000 08:01 1  /usr/lib/libc.so.6\n\
                    7f02-7f03 r-xp 00000000 08:01 2  /opt/lib torch/lib/libtorch_cpu.so\n";
        let expected = PathBuf::from("/opt/lib torch/lib/libtorch_cpu.so");
        assert_eq!(mapped_libtorch(maps), Some(expected));
        assert_eq!(mapped_libtorch(""), None);
    }

    #[test]
    fn the_version_is_in_either_of_two_files() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        assert_eq!(version_in(folder.path()), None);
        let python = "from typing import Optional\n__version__ = '2.13.0+cpu'\ndebug = False\n";
        fs::write(folder.path().join("version.py"), python)?;
        assert_eq!(version_in(folder.path()).as_deref(), Some("2.13.0+cpu"));
        fs::write(folder.path().join("build-version"), "2.12.0+cu130\n")?;
        assert_eq!(version_in(folder.path()).as_deref(), Some("2.12.0+cu130"));
        Ok(())
    }

    #[test]
    fn the_processor_has_a_name() {
        assert_eq!(cpu("processor\t: 0\nmodel name\t: A Fast One\n"), "A Fast One");
        assert_eq!(cpu("processor\t: 0\n"), "");
    }

    fn known(facts: &[(&str, i64)]) -> Map<String, Value> {
        facts.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect()
    }

    #[test]
    fn only_what_differs_from_the_first_session_is_noted_and_only_once() {
        let begun = known(&[("threads", 1), ("cpus", 4), ("gone", 7)]);
        let first = SessionEnvironment { step: 0, facts: begun.clone() };
        let mut run = RunEnvironment { format_version: 1, first, later: Vec::new() };
        let moved = known(&[("threads", 2), ("cpus", 4), ("new", 3)]);
        let sessions = [&begun, &moved, &moved, &begun, &begun, &moved];
        let added = [1, 2, 3, 4, 5, 6].map(|step| run.add(step, sessions[step as usize - 1]));
        assert_eq!(added, [false, true, false, true, false, true]);
        let steps: Vec<u64> = run.later.iter().map(|session| session.step).collect();
        assert_eq!(steps, [2, 4, 6]);
        let mut differing = known(&[("threads", 2), ("new", 3)]);
        differing.insert("gone".to_owned(), Value::Null);
        assert_eq!(run.later[0].facts, differing);
        assert_eq!(run.later[1].facts, Map::new());
        assert_eq!(run.later[2].facts, differing);
    }

    #[test]
    fn a_damaged_environment_file_is_left_unchanged() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(FILE);
        for (text, word) in [("{", "environment.json"), (r#"{"format_version": 2}"#, "version 2")] {
            fs::write(&path, text)?;
            let error =
                RunEnvironment::note(folder.path(), 0, Device::Cpu).expect_err("it is none");
            assert!(error.to_string().contains(word), "{error}");
            assert_eq!(fs::read_to_string(&path)?, text);
        }
        Ok(())
    }

    #[test]
    fn the_version_of_tch_is_that_of_the_workspace() {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml");
        let text = fs::read_to_string(manifest).expect("the workspace has a manifest");
        assert!(text.contains(&format!("tch = {{ version = \"{TCH}\"")));
    }
}
