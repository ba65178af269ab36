//! How libtorch's threads wait for each other.

#![cfg(target_os = "linux")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ddil_libtorch::{ThreadWaiting, adapt_thread_waiting, thread_waiting};
use tch::{Kind, Tensor};

use crate::{TestResult, in_own_process};

const LIMIT: Duration = Duration::from_secs(30);

/// Whether the idle threads exist that shorten libgomp's spin: their owner has a name.
fn is_crowded() -> bool {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return false };
    tasks.flatten().any(|task| {
        std::fs::read_to_string(task.path().join("comm"))
            .is_ok_and(|name| name.trim_end() == "ddil-crowd")
    })
}

fn wait_until(crowded: bool) {
    let begin = Instant::now();
    while is_crowded() != crowded {
        assert!(begin.elapsed() < LIMIT, "the idle threads did not change to {crowded}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Values whose last bits depend on how an operation is divided among threads.
fn values(input: &Tensor) -> Vec<Tensor> {
    let images = input.reshape([8, 32, 64, -1]);
    let kernel = images.narrow(2, 0, 3).narrow(3, 0, 3).reshape([-1, 32, 3, 3]);
    vec![
        input.sum(Kind::Float),
        input.matmul(&input.transpose(0, 1)),
        images.conv2d::<&Tensor>(&kernel, None, [1, 1], [1, 1], [1, 1], 1),
        input.softmax(-1, None),
        input.logsumexp([0], false),
    ]
}

fn while_busy<T>(processors: usize, run: impl FnOnce() -> T) -> T {
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 * processors {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        // Also ends the threads if `run` panics: the scope would wait for them.
        let guard = EndOnDrop(&end);
        let result = run();
        drop(guard);
        result
    })
}

struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn results_do_not_depend_on_how_threads_wait() -> TestResult {
    let name = "waiting::results_do_not_depend_on_how_threads_wait";
    if in_own_process(name, &[], &["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"])? {
        return Ok(());
    }
    let processors = thread::available_parallelism()?.get();
    ddil_libtorch::set_num_threads(processors.min(4))?;
    tch::manual_seed(0);
    let input = Tensor::randn([512, 1024], tch::kind::FLOAT_CPU);
    let before = values(&input);
    assert_eq!(thread_waiting(), ThreadWaiting::Default);

    if adapt_thread_waiting() != ThreadWaiting::Adaptive {
        // Another OpenMP library, or no measure of the waiting: nothing changes.
        assert_eq!(thread_waiting(), ThreadWaiting::Default);
        return Ok(());
    }
    let while_crowded = while_busy(processors, || {
        wait_until(true);
        values(&input)
    });
    for (before, crowded) in before.iter().zip(&while_crowded) {
        assert!(before.equal(crowded));
    }
    // Competition is over.
    wait_until(false);
    for (before, after) in before.iter().zip(&values(&input)) {
        assert!(before.equal(after));
    }
    Ok(())
}

#[test]
fn a_setting_of_the_environment_is_kept() -> TestResult {
    let name = "waiting::a_setting_of_the_environment_is_kept";
    if in_own_process(name, &[("GOMP_SPINCOUNT", "1000")], &["OMP_WAIT_POLICY"])? {
        return Ok(());
    }
    assert_eq!(adapt_thread_waiting(), ThreadWaiting::Environment);
    assert_eq!(thread_waiting(), ThreadWaiting::Environment);
    Ok(())
}
