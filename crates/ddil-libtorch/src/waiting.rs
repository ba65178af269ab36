#![allow(
    unsafe_code,
    reason = "looks up and calls functions of the OpenMP library, and asks the system"
)]

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::num_threads;

/// How often the watcher looks.
const INTERVAL: Duration = Duration::from_millis(50);
/// So many times in one interval threads of this process lose their processor where others want it. On a free machine it
/// is once or twice a second.
const CONTENDED: i64 = 4;
/// Others are taken to be gone after so many intervals without: a second.
const CALM_INTERVALS: u32 = 20;
/// More threads than this are not created for the purpose.
const MAX_EXTRA_THREADS: usize = 64;

/// How the threads that share an operation of libtorch wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ThreadWaiting {
    /// As the OpenMP library does by itself. libgomp's threads spin for several milliseconds before they sleep.
    Default,
    /// As `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` in the environment say.
    Environment,
    /// As by default while the processors are free; for microseconds while other work competes for them.
    Adaptive,
}

/// Has libtorch's threads give way while other work competes for the processors.
///
/// libgomp, the OpenMP library of libtorch on Linux, lets threads spin for milliseconds at the end of each part of an
/// operation. On free processors that is the fastest way to wait. Beside other work it is the slowest: a thread spins
/// away its time slice while the one that it waits for has no processor.
///
/// This starts a thread that counts, twenty times a second, how often threads of this process lost their processor.
/// Where that is often, it creates idle threads of libgomp until there are more than processors, for which libgomp
/// [documents](https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html) a spin of 1000 turns, some microseconds,
/// instead of 300000. After a second without competition the idle threads end, and the long spin is back. Results do not
/// depend on it.
///
/// Call it once at the start of a program, after [`set_num_threads`](crate::set_num_threads); later calls change nothing.
/// Nothing is done, and the return value says so, where the environment sets `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT`, where
/// libtorch uses another OpenMP library, and where more than 64 idle threads would be required.
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
        let watcher = thread::Builder::new().name("ddil-waiting".to_owned());
        match watcher.spawn(move || watch(libgomp, size)) {
            Ok(_) => ThreadWaiting::Adaptive,
            // A process that may have no more threads keeps what it has.
            Err(_) => ThreadWaiting::Default,
        }
    })
}

/// How libtorch's threads wait in this process now.
pub fn thread_waiting() -> ThreadWaiting {
    let unasked =
        if is_set_by_environment() { ThreadWaiting::Environment } else { ThreadWaiting::Default };
    ADAPTED.get().copied().unwrap_or(unasked)
}

static ADAPTED: OnceLock<ThreadWaiting> = OnceLock::new();

fn is_set_by_environment() -> bool {
    ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"].iter().any(|name| std::env::var_os(name).is_some())
}

/// What is called of libgomp.
#[derive(Clone, Copy)]
struct Libgomp {
    parallel: unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint),
    num_procs: unsafe extern "C" fn() -> c_int,
}

impl Libgomp {
    /// The library, if it is the one that is loaded: LLVM's answers to the same names, and to names of its own.
    fn find() -> Option<Self> {
        if symbol(c"__kmpc_fork_call").is_some() {
            return None;
        }
        let (parallel, num_procs) = (symbol(c"GOMP_parallel")?, symbol(c"omp_get_num_procs")?);
        // SAFETY: the declarations of both in libgomp, which have been these since GCC 4.9.
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

    /// Creates a team of so many threads. They do nothing, and stay until the calling thread ends.
    fn create_team(self, size: usize) {
        extern "C" fn nothing(_: *mut c_void) {}
        // SAFETY: `nothing` takes any pointer, and does not unwind.
        unsafe { (self.parallel)(nothing, std::ptr::null_mut(), size as c_uint, 0) };
    }
}

/// Counts the threads that operations use, of which one may be the only one so far, and the first of the team itself.
fn crowd_size(processors: usize, num_threads: usize) -> Option<usize> {
    let size = processors.saturating_sub(num_threads) + 2;
    (size <= MAX_EXTRA_THREADS).then_some(size)
}

#[cfg(unix)]
fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a C string; the default scope is always there.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

#[cfg(not(unix))]
fn symbol(_: &CStr) -> Option<*mut c_void> {
    None
}

/// How often threads of this process have lost their processor to others so far.
#[cfg(unix)]
fn involuntary_switches() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the place is valid, and zeros are a value of it if the call fails.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init().ru_nivcsw as i64
    }
}

#[cfg(not(unix))]
fn involuntary_switches() -> i64 {
    0
}

fn watch(libgomp: Libgomp, size: usize) -> ! {
    let (mut competition, mut seen) = (Competition::default(), involuntary_switches());
    let mut crowd = None;
    loop {
        thread::sleep(INTERVAL);
        let now = involuntary_switches();
        let competes = competition.observe(now - seen);
        seen = now;
        if competes && crowd.is_none() {
            crowd = Crowd::gather(libgomp, size);
        } else if !competes && let Some(crowd) = crowd.take() {
            crowd.dismiss();
        }
    }
}

/// Whether others want the processors too, from how often they were taken away in the intervals so far.
#[derive(Debug, Default)]
struct Competition {
    /// Intervals until it is taken to be over.
    remaining: u32,
}

impl Competition {
    fn observe(&mut self, switches: i64) -> bool {
        self.remaining =
            if switches >= CONTENDED { CALM_INTERVALS } else { self.remaining.saturating_sub(1) };
        self.remaining > 0
    }
}

/// Idle threads of libgomp, kept by a thread of their own: they end with the thread that created them.
struct Crowd {
    keeper: JoinHandle<()>,
    end: Sender<()>,
}

impl Crowd {
    fn gather(libgomp: Libgomp, size: usize) -> Option<Self> {
        let (end, ended) = channel();
        let keeper = thread::Builder::new().name("ddil-crowd".to_owned()).spawn(move || {
            libgomp.create_team(size);
            // An error means that the sender is gone, which ends the team as well.
            let _ = ended.recv();
        });
        Some(Self { keeper: keeper.ok()?, end })
    }

    fn dismiss(self) {
        drop(self.end);
        // It cannot panic: it waits, and nothing else.
        let _ = self.keeper.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn competition_lasts_until_a_second_is_calm() {
        let mut competition = Competition::default();
        assert!(!competition.observe(CONTENDED - 1));
        assert!(competition.observe(CONTENDED));
        for _ in 1..CALM_INTERVALS {
            assert!(competition.observe(0));
        }
        assert!(!competition.observe(0));
        // One contended interval begins the second anew.
        competition.observe(CONTENDED);
        competition.observe(0);
        competition.observe(CONTENDED + 100);
        assert_eq!(competition.remaining, CALM_INTERVALS);
    }

    #[test]
    fn there_are_more_threads_than_processors_with_the_crowd() {
        for processors in 1..200 {
            for num_threads in 1..=2 * processors {
                if let Some(size) = crowd_size(processors, num_threads) {
                    // The first thread of a team is counted only for the program's own.
                    assert!(num_threads + size - 1 > processors);
                    assert!((2..=MAX_EXTRA_THREADS).contains(&size));
                }
            }
        }
        assert_eq!(crowd_size(128, 128), Some(2));
        assert_eq!(crowd_size(128, 1), None);
    }
}
