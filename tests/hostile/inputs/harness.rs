//! Runs a target in a separate process, with a limit on its memory, and checks the effect of each input.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::mutate::corrupt;
use super::tree::Tree;

/// Marks the process that runs the inputs.
const CHILD: &str = "DDIL_FUZZ_CHILD";
/// Address space of the process, in KiB: an input that requests terabytes must produce an error message.
const ADDRESS_SPACE_KIB: u64 = 6 << 20;
/// Memory that one input may take, in KiB. Inputs have a few hundred KiB at most.
const MEMORY_KIB: u64 = 256 << 10;
/// Time on a processor that one input may take: some build a small network, in a debug build.
const CPU_TIME: Duration = Duration::from_secs(5);
/// After this time an input counts as one that never ends.
const HANGS: Duration = Duration::from_secs(120);
/// Number of inputs if no time is set: the same ones on every machine.
const INPUTS: u64 = 60;

/// The outcome of reading a folder: nothing, or an error message with its causes.
pub(crate) type Response = Result<(), String>;

/// A reader and the folders it is tried on.
pub(crate) struct Target {
    /// The name, as a test is called.
    pub(crate) name: &'static str,
    /// Folders that it reads without an error; they are corrupted.
    pub(crate) seeds: Vec<Tree>,
    /// Reads a folder.
    pub(crate) read: fn(&Path) -> Response,
    /// Makes a corrupted folder pass a check that comes before everything else, such as a checksum.
    pub(crate) repair: fn(&mut Tree),
    /// Memory that one input may take, in KiB.
    pub(crate) memory_kib: u64,
}

/// An error with its causes, in one line.
pub(crate) fn message_of(error: impl Error) -> String {
    ddil_files::with_causes(&error)
}

impl Target {
    pub(crate) fn new(name: &'static str, seeds: Vec<Tree>, read: fn(&Path) -> Response) -> Self {
        Self { name, seeds, read, repair: |_| {}, memory_kib: MEMORY_KIB }
    }

    /// Runs the target; the test fails with the first harmful input.
    pub(crate) fn run(&self) {
        if std::env::var_os(CHILD).is_some() {
            return self.run_here();
        }
        let program = std::env::current_exe().expect("a test has a program");
        let thread = std::thread::current();
        let test = thread.name().expect("a test has a name").to_owned();
        let output = Command::new("sh")
            .args(["-c", "ulimit -v \"$1\" && shift && exec \"$@\"", "sh"])
            .arg(ADDRESS_SPACE_KIB.to_string())
            .arg(program)
            .args(["--exact", &test, "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            // The message of a panic is needed, not libtorch's whole stack.
            .env("RUST_BACKTRACE", "0")
            .output()
            .expect("a shell");
        let outcome = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{}: {}\n{outcome}", self.name, output.status);
        let tried = outcome
            .lines()
            .find_map(|line| line.split_once("tried "))
            .map_or("", |(_, tried)| tried);
        println!("{}: tried {tried}", self.name);
        assert!(!tried.is_empty(), "{outcome}");
    }

    fn run_here(&self) {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("hostile").join(self.name);
        let (seed, from) = (number("DDIL_FUZZ_SEED", 0), number("DDIL_FUZZ_FROM", 0));
        let time = Duration::from_secs(number("DDIL_FUZZ_SECONDS", 0));
        for tree in &self.seeds {
            let outcome = self.checked(tree, &folder);
            assert_eq!(outcome, Ok(()), "a seed is refused; it lies in {}", folder.display());
        }
        for tree in Tree::corpus(self.name) {
            // An error or not, but harmless.
            let _ = self.checked(&tree, &folder);
        }
        let (started, mut index, mut refused) = (Instant::now(), from, 0);
        while index < from + INPUTS || started.elapsed() < time {
            let tree = self.corrupted(seed, index);
            set_current(index);
            refused += u64::from(self.checked(&tree, &folder).is_err());
            index += 1;
        }
        let inputs = index - from;
        println!("tried {inputs} inputs from {from} of seed {seed}; {refused} refused");
        fs::remove_dir_all(&folder).expect("it was made");
    }

    /// Input number `index`: a seed, in one of eight cases mixed with files of another, corrupted in a few places.
    fn corrupted(&self, seed: u64, index: u64) -> Tree {
        let mut rng = StdRng::seed_from_u64(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut tree = self.seeds[rng.random_range(0..self.seeds.len())].clone();
        if rng.random_range(0..8) == 0 {
            tree.mix(&self.seeds[rng.random_range(0..self.seeds.len())], &mut rng);
        }
        for _ in 0..rng.random_range(1..4) {
            corrupt(&mut tree, &mut rng);
        }
        (self.repair)(&mut tree);
        tree
    }

    /// Writes a folder, reads it, and fails unless that ended in time, within memory and, in an error, with a place.
    fn checked(&self, tree: &Tree, folder: &Path) -> Response {
        tree.write(folder);
        watch(self.name, folder);
        let before = fresh_peak_kib();
        let started = cpu_time();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.read)(folder)));
        let taken = cpu_time().saturating_sub(started);
        let grown = peak_kib().saturating_sub(before);
        let place = format!("input {} of {} in {}", current(), self.name, folder.display());
        let Ok(outcome) = outcome else { panic!("a panic: {place}") };
        assert!(taken < CPU_TIME, "{taken:?} of time: {place}");
        assert!(grown < self.memory_kib, "{grown} KiB of memory: {place}");
        if let Err(message) = &outcome {
            crate::messages::collect(self.name, message);
            // The error may name a file that was removed.
            let named = |tree: &Tree| tree.names_place_in(message);
            let says_where = message.contains(&folder.display().to_string())
                || named(tree)
                || self.seeds.iter().any(named);
            assert!(says_where, "no place in {message:?}: {place}");
            let words = ddil_tests::words_of_rust(message);
            assert!(words.is_empty(), "{words:?} in {message:?}: {place}");
            assert!(message.len() < 100_000, "{} bytes of error: {place}", message.len());
        }
        outcome
    }
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, no number")),
        Err(_) => default,
    }
}

static CURRENT: AtomicU64 = AtomicU64::new(0);
/// Seconds after the start of the process at which the current input started.
static STARTED: AtomicU64 = AtomicU64::new(0);

fn set_current(index: u64) {
    CURRENT.store(index, Ordering::SeqCst);
}

fn current() -> u64 {
    CURRENT.load(Ordering::SeqCst)
}

/// Ends the process if the input now at work does not end by itself.
fn watch(name: &'static str, folder: &Path) {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let folder = folder.to_owned();
    let start = START.get_or_init(|| {
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let started = Duration::from_secs(STARTED.load(Ordering::SeqCst));
                let start = START.get().copied().unwrap_or_else(Instant::now);
                if start.elapsed() > started + HANGS {
                    let place = folder.display();
                    let _ = writeln!(
                        std::io::stderr(),
                        "input {} of {name} in {place} runs for ever",
                        current()
                    );
                    std::process::abort();
                }
            }
        });
        Instant::now()
    });
    STARTED.store(start.elapsed().as_secs(), Ordering::SeqCst);
}

/// Time this thread has had on a processor; a busy machine does not count.
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split_whitespace().next().and_then(|word| word.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

/// The most memory this process has had since [`fresh_peak_kib`], in KiB.
fn peak_kib() -> u64 {
    status("VmHWM:")
}

/// Resets the peak and returns the present value.
fn fresh_peak_kib() -> u64 {
    // Where the system has no such file the peak of earlier inputs counts as well, which only hides.
    let _ = fs::write("/proc/self/clear_refs", "5");
    status("VmHWM:")
}

fn status(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}
