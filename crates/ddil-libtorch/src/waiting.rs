#![allow(unsafe_code, reason = "looks up and calls functions of the OpenMP library")]

use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_int, c_uint, c_void};
use std::fs;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::num_threads;

/// The interval between two measurements.
const INTERVAL: Duration = Duration::from_millis(200);
/// Other work competes if a thread of this process is ready to run and has no processor for this share of an interval.
/// On free processors a thread waits for about a hundredth; at a third, both ways of waiting take equally long.
const CONTENDED: f64 = 0.25;
/// Competition counts as over after this many intervals without it: a second.
const CALM_INTERVALS: u32 = 5;
/// The maximum number of extra threads.
const MAX_EXTRA_THREADS: usize = 64;

/// How the threads that share an operation of libtorch wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ThreadWaiting {
    /// The default of the OpenMP library. libgomp's threads spin for several milliseconds before they sleep.
    Default,
    /// As set by `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` in the environment.
    Environment,
    /// The default while the processors are free; spinning for microseconds while other work competes for them.
    Adaptive,
}

/// Makes libtorch's threads yield while other work competes for the processors.
///
/// libgomp, the OpenMP library of libtorch on Linux, lets threads spin for milliseconds at the end of each part of an
/// operation. On free processors that is the fastest way to wait. Under competition it is the slowest: a thread spins
/// for its whole time slice while the thread that it waits for has no processor.
///
/// This starts a thread that measures, five times a second, how long threads of this process waited for a processor.
/// If one waits for more than a quarter of the time, it creates idle threads of libgomp until there are more than
/// processors, for which libgomp [documents](https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html) a spin of 1000 turns, some microseconds,
/// instead of 300000. After a second without competition the idle threads end, and the long spin returns. Results do
/// not depend on it.
///
/// Call it once at the start of a program, after [`set_num_threads`](crate::set_num_threads); later calls change nothing.
/// Nothing is done, as the return value shows, if the environment sets `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT`, if
/// libtorch uses another OpenMP library, if the system does not report how long threads wait
/// (`/proc/self/task/*/schedstat`), or if more than 64 idle threads would be required.
///
/// # Example
///
/// ```
/// use ddil_libtorch::{adapt_thread_waiting, thread_waiting};
///
/// let waiting = adapt_thread_waiting();
/// assert_eq!(thread_waiting(), waiting);
/// ```
pub fn adapt_thread_waiting() -> ThreadWaiting {
    *ADAPTED.get_or_init(|| {
        if is_set_by_environment() {
            return ThreadWaiting::Environment;
        }
        let Some(libgomp) = Libgomp::find() else { return ThreadWaiting::Default };
        let Some(size) = libgomp.crowd_size() else { return ThreadWaiting::Default };
        if delays().is_none() {
            return ThreadWaiting::Default;
        }
        let watcher = thread::Builder::new().name("ddil-waiting".to_owned());
        match watcher.spawn(move || watch(libgomp, size)) {
            Ok(_) => ThreadWaiting::Adaptive,
            // If the process may not create more threads, waiting does not change.
            Err(_) => ThreadWaiting::Default,
        }
    })
}

/// How libtorch's threads currently wait in this process.
pub fn thread_waiting() -> ThreadWaiting {
    let unasked =
        if is_set_by_environment() { ThreadWaiting::Environment } else { ThreadWaiting::Default };
    ADAPTED.get().copied().unwrap_or(unasked)
}

static ADAPTED: OnceLock<ThreadWaiting> = OnceLock::new();

fn is_set_by_environment() -> bool {
    ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"].iter().any(|name| std::env::var_os(name).is_some())
}

/// The functions of libgomp that are used.
#[derive(Clone, Copy)]
struct Libgomp {
    parallel: unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint),
    num_procs: unsafe extern "C" fn() -> c_int,
}

impl Libgomp {
    /// The library, if it is the one that is loaded: LLVM's has the same symbols, and additional ones.
    fn find() -> Option<Self> {
        if symbol(c"__kmpc_fork_call").is_some() {
            return None;
        }
        let (parallel, num_procs) = (symbol(c"GOMP_parallel")?, symbol(c"omp_get_num_procs")?);
        // SAFETY: both have had these declarations in libgomp since GCC 4.9.
        unsafe {
            Some(Self {
                parallel: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint),
                >(parallel),
                num_procs: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(
                    num_procs,
                ),
            })
        }
    }

    /// Number of threads of a team that brings libgomp's total above the number of processors.
    fn crowd_size(self) -> Option<usize> {
        // SAFETY: it has no arguments and no preconditions.
        let processors = usize::try_from(unsafe { (self.num_procs)() }).ok()?;
        crowd_size(processors, num_threads().ok()?)
    }

    /// Creates a team of this many threads. They do nothing, and stay until the calling thread ends.
    fn create_team(self, size: usize) {
        extern "C" fn nothing(_: *mut c_void) {}
        // SAFETY: `nothing` takes any pointer, and does not unwind.
        unsafe { (self.parallel)(nothing, std::ptr::null_mut(), size as c_uint, 0) };
    }
}

/// Counts the threads of operations, of which there may be only one so far, and the first of the team itself.
fn crowd_size(processors: usize, num_threads: usize) -> Option<usize> {
    let size = processors.saturating_sub(num_threads) + 2;
    (size <= MAX_EXTRA_THREADS).then_some(size)
}

#[cfg(unix)]
fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a C string; the default scope always exists.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

#[cfg(not(unix))]
fn symbol(_: &CStr) -> Option<*mut c_void> {
    None
}

/// How long each thread of this process has waited for a processor while ready to run, by thread id.
fn delays() -> Option<HashMap<OsString, Duration>> {
    let mut delays = HashMap::new();
    for entry in fs::read_dir("/proc/self/task").ok()? {
        let thread = entry.ok()?;
        // A thread that has ended meanwhile has no file.
        let Ok(text) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
        delays.insert(thread.file_name(), Duration::from_nanos(delay_of(&text)?));
    }
    (!delays.is_empty()).then_some(delays)
}

/// Parses nanoseconds on a processor, nanoseconds of waiting for one, number of time slices.
fn delay_of(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

fn watch(libgomp: Libgomp, size: usize) {
    let (mut competition, mut crowd) = (Competition::default(), None);
    let (mut before, mut then) = (delays().unwrap_or_default(), Instant::now());
    loop {
        thread::sleep(INTERVAL);
        let (now, elapsed) = (delays().unwrap_or_default(), then.elapsed());
        then = Instant::now();
        let competes =
            competition.observe(longest(&before, &now).as_secs_f64() / elapsed.as_secs_f64());
        before = now;
        if competes && crowd.is_none() {
            crowd = Crowd::gather(libgomp, size);
        } else if !competes && let Some(crowd) = crowd.take() {
            crowd.dismiss();
        }
    }
}

/// The longest delay of a thread that already existed before.
fn longest(before: &HashMap<OsString, Duration>, now: &HashMap<OsString, Duration>) -> Duration {
    let since =
        |(thread, delay): (&OsString, &Duration)| Some(delay.saturating_sub(*before.get(thread)?));
    now.iter().filter_map(since).max().unwrap_or_default()
}

/// Whether other work competes for the processors, from the delays in the intervals so far.
#[derive(Debug, Default)]
struct Competition {
    /// Number of intervals until competition counts as over.
    remaining: u32,
}

impl Competition {
    /// `delay` is a share of the interval.
    fn observe(&mut self, delay: f64) -> bool {
        self.remaining =
            if delay >= CONTENDED { CALM_INTERVALS } else { self.remaining.saturating_sub(1) };
        self.remaining > 0
    }
}

/// Idle threads of libgomp, created by their own thread: they end with it.
struct Crowd {
    keeper: JoinHandle<()>,
    end: Sender<()>,
}

impl Crowd {
    fn gather(libgomp: Libgomp, size: usize) -> Option<Self> {
        let (end, ended) = channel();
        let keeper = thread::Builder::new().name("ddil-crowd".to_owned()).spawn(move || {
            libgomp.create_team(size);
            // An error means that the sender was dropped, which also ends the team.
            let _ = ended.recv();
        });
        Some(Self { keeper: keeper.ok()?, end })
    }

    fn dismiss(self) {
        drop(self.end);
        // It cannot panic: it only waits.
        let _ = self.keeper.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn competition_lasts_until_a_second_is_calm() {
        let mut competition = Competition::default();
        assert!(!competition.observe(CONTENDED / 2.0));
        assert!(competition.observe(CONTENDED));
        for _ in 1..CALM_INTERVALS {
            assert!(competition.observe(0.0));
        }
        assert!(!competition.observe(0.0));
        // One contended interval restarts the second.
        competition.observe(1.0);
        competition.observe(0.0);
        competition.observe(1.0);
        assert_eq!(competition.remaining, CALM_INTERVALS);
    }

    #[test]
    fn the_longest_delay_is_of_a_thread_that_was_there_before() {
        let delays = |all: &[(&str, u64)]| -> HashMap<_, _> {
            all.iter().map(|&(thread, ms)| (thread.into(), Duration::from_millis(ms))).collect()
        };
        let before = delays(&[("1", 500), ("2", 10), ("ended", 7)]);
        let now = delays(&[("1", 501), ("2", 60), ("new", 900)]);
        assert_eq!(longest(&before, &now), Duration::from_millis(50));
        assert_eq!(longest(&HashMap::new(), &now), Duration::ZERO);
        assert_eq!(delay_of("81 42 7\n"), Some(42));
        assert_eq!(delay_of("81"), None);
    }

    #[test]
    fn there_are_more_threads_than_processors_with_the_crowd() {
        for processors in 1..200 {
            for num_threads in 1..=2 * processors {
                if let Some(size) = crowd_size(processors, num_threads) {
                    // The first thread of a team is counted only among the program's own.
                    assert!(num_threads + size - 1 > processors);
                    assert!((2..=MAX_EXTRA_THREADS).contains(&size));
                }
            }
        }
        assert_eq!(crowd_size(128, 128), Some(2));
        assert_eq!(crowd_size(128, 1), None);
    }
}
