//! The machine and the versions that a run was computed with.

use std::{
    fs,
    path::{Path, PathBuf},
    thread::available_parallelism,
};

use serde::{Deserialize, Serialize};

use crate::Result;

/// The version of tch that this was built with.
const TCH: &str = "0.26";

/// Machine and versions, in `environment.json` of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The version of this program.
    pub ddil: String,
    /// The version of tch.
    pub tch: String,
    /// The version of libtorch that this program was built against.
    pub libtorch: String,
    /// The libtorch that is loaded.
    pub loaded: LoadedLibtorch,
    /// Operating system and processor family, such as `linux x86_64`.
    pub platform: String,
    /// What the processor calls itself; empty where the system does not say.
    pub cpu: String,
    /// How many processors this process may use.
    pub num_cpus: usize,
    /// How many threads one operation of libtorch uses.
    pub num_threads: usize,
    /// How many operations libtorch runs side by side.
    pub num_interop_threads: usize,
    /// How many CUDA devices can be used.
    pub num_cuda_devices: usize,
    /// Why none can be used; nothing if some can.
    pub why_no_cuda: Option<String>,
}

/// Where the loaded libtorch lies and what it says of itself, as far as the system tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedLibtorch {
    /// Its `libtorch_cpu.so`.
    pub path: Option<PathBuf>,
    /// The version that the files beside it give.
    pub version: Option<String>,
}

impl Environment {
    /// Looks at the machine.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`](crate::Error::Libtorch) if libtorch fails to answer.
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
        })
    }
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

/// The zip has `build-version`, the Python package `version.py`.
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
    fn the_version_stands_in_either_of_two_files() -> std::io::Result<()> {
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
    fn the_processor_says_its_name() {
        assert_eq!(cpu("processor\t: 0\nmodel name\t: A Fast One\n"), "A Fast One");
        assert_eq!(cpu("processor\t: 0\n"), "");
    }

    #[test]
    fn the_version_of_tch_is_that_of_the_workspace() {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml");
        let text = fs::read_to_string(manifest).expect("the workspace has a manifest");
        assert!(text.contains(&format!("tch = {{ version = \"{TCH}\"")));
    }
}
