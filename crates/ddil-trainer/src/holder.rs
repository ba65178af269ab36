//! Which process holds the lock of a folder.

use std::{
    fmt::{self, Display, Formatter},
    fs,
};

/// The process that holds the lock of a folder, according to the lock file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// Its process id, on its own machine.
    pub process: u32,
    /// The host name of that machine, if the system reports it.
    pub host: Option<String>,
}

impl Holder {
    pub(crate) fn here() -> Self {
        Self { process: std::process::id(), host: host() }
    }

    pub(crate) fn to_line(&self) -> String {
        let host = self.host.as_deref().unwrap_or_default();
        format!("{} {host}", self.process).trim_end().to_owned()
    }

    pub(crate) fn from_line(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let process = words.next()?.parse().ok()?;
        Some(Self { process, host: words.next().map(str::to_owned) })
    }
}

impl Display for Holder {
    /// The host name is included if it differs: on a shared disk, the process may run on another machine.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.host {
            Some(host) if self.host != self::host() => {
                write!(f, "process {} on the machine `{host}`", self.process)
            }
            _ => write!(f, "{}", self.process),
        }
    }
}

/// The host name of this machine.
fn host() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.split_whitespace().next()?.to_owned())
}
