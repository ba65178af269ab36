//! Whether this machine is ready, and if not, how to fix it.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use ddil_data::FashionMnist;
use ddil_libtorch::ThreadWaiting;
use ddil_trainer::Environment;
use serde::Serialize;
use tch::Tensor;

use crate::error::{Error, Result};

/// With less free space than this a run may fill the disk.
const LOW_DISK_BYTES: u64 = 2 << 30;

/// The findings about a machine.
///
/// # Example
///
/// ```
/// use ddil::doctor::{Doctor, Health};
///
/// let doctor = Doctor { folders: vec![std::env::temp_dir()], ..Doctor::default() };
/// let report = doctor.examine()?;
/// assert!(!report.is_broken(), "{report}");
/// println!("{report}");
/// # Ok::<(), ddil::Error>(())
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Machine and versions.
    pub(crate) environment: Environment,
    /// One entry per question.
    pub findings: Vec<Finding>,
}

/// What to check in addition to the machine itself.
#[derive(Clone, Debug, Default)]
pub struct Doctor {
    /// Folders that runs and downloads are written to; they need not exist.
    pub folders: Vec<PathBuf>,
    /// Whether to read the data sets and compare their checksums, which takes a moment.
    pub verify_datasets: bool,
}

/// The answer to one question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was checked.
    pub subject: String,
    /// The result.
    pub health: Health,
    /// The finding, and a remedy if something is wrong.
    pub(crate) detail: String,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Everything works.
    Good,
    /// Some features do not work.
    Limited,
    /// Nothing works.
    Broken,
}

impl Report {
    /// Whether the program cannot work here; then its exit code is 1.
    pub fn is_broken(&self) -> bool {
        self.findings.iter().any(|finding| finding.health == Health::Broken)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|finding| finding.subject.len()).max().unwrap_or(0);
        for Finding { subject, health, detail } in &self.findings {
            let mark = match health {
                Health::Good => "ok",
                Health::Limited => "note",
                Health::Broken => "BROKEN",
            };
            writeln!(f, "{mark:6}  {subject:width$}  {detail}")?;
        }
        Ok(())
    }
}

impl Doctor {
    /// Runs all checks. A broken part is a finding, not an error.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`] if libtorch does not answer at all.
    pub fn examine(&self) -> Result<Report> {
        let environment = Environment::here()?;
        let mut findings = vec![
            finding(
                "ddil",
                Health::Good,
                format!("{} on {}", environment.ddil, environment.platform),
            ),
            libtorch(&environment),
            arithmetic(),
            noise(),
            processors(&environment),
            waiting(),
            cuda(&environment),
            allocator(&environment),
        ];
        if self.verify_datasets {
            findings.push(fashion_mnist());
        }
        findings.extend(self.folders.iter().map(|folder| disk(folder)));
        Ok(Report { environment, findings })
    }
}

fn finding(subject: impl Into<String>, health: Health, detail: impl Into<String>) -> Finding {
    Finding { subject: subject.into(), health, detail: detail.into() }
}

fn libtorch(environment: &Environment) -> Finding {
    let Environment { libtorch: built, tch, loaded, .. } = environment;
    let place =
        loaded.path.as_ref().map_or("an unknown place".into(), |path| path.display().to_string());
    let found = loaded.version.as_deref().unwrap_or("of unknown version");
    let number = |version: &str| version.split('+').next().map(str::to_owned);
    if loaded.version.as_deref().is_some_and(|loaded| number(loaded) != number(built)) {
        let cure = "set LIBTORCH to the version it was built with, or rebuild";
        return finding(
            "libtorch",
            Health::Broken,
            format!("built with {built}, but {found} is loaded from {place}: {cure}"),
        );
    }
    finding("libtorch", Health::Good, format!("{built} (tch {tch}), loaded {found} from {place}"))
}

/// A product and its gradient, with known results.
fn arithmetic() -> Finding {
    let compute = || {
        let x = Tensor::f_ones([4, 4], tch::kind::FLOAT_CPU)?.f_set_requires_grad(true)?;
        let product = x.f_matmul(&x)?;
        product.f_sum(tch::Kind::Float)?.f_backward()?;
        Ok((product.f_double_value(&[0, 0])?, x.f_grad()?.f_double_value(&[0, 0])?))
    };
    match compute() {
        Ok((4.0, 8.0)) => {
            finding("arithmetic", Health::Good, "a matrix product and its gradient are correct")
        }
        Ok(wrong) => finding(
            "arithmetic",
            Health::Broken,
            format!(
                "a matrix product and its gradient are {wrong:?}, not (4, 8): reinstall libtorch"
            ),
        ),
        Err(error) => {
            let error = Error::torch("a small product")(error);
            finding("arithmetic", Health::Broken, error.to_string())
        }
    }
}

fn noise() -> Finding {
    match ddil_libtorch::normal_is_vectorised() {
        Ok(true) => {
            finding("noise", Health::Good, "drawn on all threads, with the values of torch.randn")
        }
        Ok(false) => finding(
            "noise",
            Health::Limited,
            "drawn by libtorch on one thread: the processor lacks AVX2 or FMA, or ATEN_CPU_CAPABILITY selects other values",
        ),
        Err(error) => finding("noise", Health::Broken, error.to_string()),
    }
}

fn processors(environment: &Environment) -> Finding {
    let Environment { cpu, num_cpus, num_threads, num_interop_threads, .. } = environment;
    let detail = format!(
        "{num_cpus} for this process ({cpu}); libtorch runs {num_threads} threads per operation, \
         {num_interop_threads} operations at a time"
    );
    let fits = num_threads <= num_cpus || *num_cpus == 0;
    finding("processors", if fits { Health::Good } else { Health::Limited }, detail)
}

/// How libtorch's threads wait for each other.
fn waiting() -> Finding {
    let detail = match ddil_libtorch::thread_waiting() {
        ThreadWaiting::Environment => {
            let set = |name| std::env::var(name).map(|value| format!("{name}={value}")).ok();
            let all: Vec<_> =
                ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"].into_iter().filter_map(set).collect();
            format!("{}, set in the environment", all.join(" "))
        }
        ThreadWaiting::Adaptive => {
            "threads spin for milliseconds, and for microseconds while other work competes"
                .to_owned()
        }
        _ => "threads spin for the OpenMP library's default time, also while other work competes"
            .to_owned(),
    };
    finding("waiting", Health::Good, detail)
}

fn cuda(environment: &Environment) -> Finding {
    match &environment.why_no_cuda {
        None => {
            let count = environment.num_cuda_devices;
            finding(
                "CUDA",
                Health::Good,
                format!("{count} device(s): cuda:0 to cuda:{}", count - 1),
            )
        }
        Some(reason) => finding("CUDA", Health::Limited, format!("not usable: {reason}")),
    }
}

fn allocator(environment: &Environment) -> Finding {
    if environment.keeps_freed_pages {
        return finding("allocator", Health::Good, "freed memory is kept and reused");
    }
    finding(
        "allocator",
        Health::Limited,
        "freed memory is returned to the system at once, which is slower on the CPU",
    )
}

fn fashion_mnist() -> Finding {
    let subject = "Fashion-MNIST";
    match FashionMnist::from_folder(None) {
        Ok(data) => {
            let count = data.train.len() + data.test.len();
            finding(subject, Health::Good, format!("{count} images, checksums match"))
        }
        Err(error @ ddil_data::Error::Missing { .. }) => {
            finding(subject, Health::Limited, error.to_string())
        }
        Err(error) => finding(subject, Health::Broken, error.to_string()),
    }
}

fn disk(folder: &Path) -> Finding {
    let subject = format!("disk {}", folder.display());
    let Some(existing) = folder.ancestors().find(|folder| {
        folder.is_dir() || (folder.as_os_str().is_empty() && Path::new(".").is_dir())
    }) else {
        return finding(subject, Health::Broken, "no parent folder exists");
    };
    let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
    if let Err(error) = tempfile::tempfile_in(existing) {
        return finding(subject, Health::Broken, format!("cannot be written to: {error}"));
    }
    match fs4::available_space(existing) {
        Ok(bytes) => {
            let health = if bytes < LOW_DISK_BYTES { Health::Limited } else { Health::Good };
            finding(subject, health, format!("{:.1} GiB free", bytes as f64 / f64::from(1 << 30)))
        }
        Err(error) => finding(subject, Health::Limited, format!("free space unknown: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_libtorch_than_the_one_built_against_is_broken() -> Result<()> {
        let mut environment = Environment::here()?;
        assert_eq!(libtorch(&environment).health, Health::Good);
        environment.loaded.version = Some("2.12.0+cpu".into());
        let finding = libtorch(&environment);
        assert_eq!(finding.health, Health::Broken);
        assert!(finding.detail.contains("2.12.0"), "{finding:?}");
        Ok(())
    }

    #[test]
    fn a_folder_need_not_exist_yet_but_must_be_possible() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        assert_ne!(disk(&folder.path().join("a/b/c")).health, Health::Broken);
        assert_ne!(disk(Path::new("runs-to-come")).health, Health::Broken);
        assert_eq!(disk(Path::new("/proc/no")).health, Health::Broken);
        Ok(())
    }
}
