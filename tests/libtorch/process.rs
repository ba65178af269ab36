//! Settings of the process: allocator, threads, version.

use ddil_libtorch::ArgumentError;
use ddil_libtorch::{Error, NoCuda};
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, in_own_process, refusal};

#[test]
fn the_version_is_the_one_that_tch_requires() {
    assert!(ddil_libtorch::version().starts_with("2.13."));
}

#[test]
fn cuda_is_ready_or_there_is_a_reason() -> TestResult {
    let count = ddil_libtorch::cuda_device_count()?;
    assert_eq!(count, usize::try_from(tch::Cuda::device_count())?);
    let reason = ddil_libtorch::why_no_cuda();
    assert_eq!(reason.is_none(), count > 0);
    if !ddil_libtorch::cuda_built() {
        assert!(matches!(reason, Some(NoCuda::CpuOnly | NoCuda::NotLoaded)));
    }
    if let Some(reason) = reason {
        assert!(reason.to_string().len() > 20);
    }
    Ok(())
}

#[test]
fn freed_pages_can_be_kept_with_glibc() {
    assert_eq!(ddil_libtorch::keep_freed_pages(), cfg!(target_env = "gnu"));
}

/// Pages that the system had to hand out so far.
#[cfg(target_os = "linux")]
fn page_faults() -> Result<u64, Box<dyn std::error::Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The program's name may contain spaces, and ends with a parenthesis; `minflt` is the eighth field after it.
    let rest = stat.rsplit(')').next().unwrap_or_default();
    Ok(rest.split_whitespace().nth(7).ok_or("no count of faults")?.parse()?)
}

/// Beyond the 32 MiB up to which glibc may decide by itself to keep freed memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn kept_pages_are_used_again() -> TestResult {
    // One pool of memory for all threads: the test is not on the main one.
    if in_own_process(
        "process::kept_pages_are_used_again",
        &[("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")],
        &[],
    )? {
        return Ok(());
    }
    let faults = || -> Result<u64, Box<dyn std::error::Error>> {
        let before = page_faults()?;
        for _ in 0..20 {
            drop(Tensor::ones([40 << 18], kind::FLOAT_CPU));
        }
        Ok(page_faults()? - before)
    };
    let given_back = faults()?;
    ddil_libtorch::keep_freed_pages();
    // An aligned block needs a gap slightly larger than itself, which several freed blocks form; how many depends on
    // the rest of the heap.
    for _ in 0..4 {
        faults()?;
    }
    let kept = faults()?;
    assert!(5 * kept < given_back, "{kept} of {given_back}");
    Ok(())
}

#[test]
fn the_number_of_threads_is_what_was_set() -> TestResult {
    // On a separate thread, whose setting does not affect other tests.
    let seen = std::thread::spawn(|| {
        ddil_libtorch::set_num_threads(1)?;
        ddil_libtorch::num_threads()
    });
    assert_eq!(seen.join().expect("the thread returns")?, 1);
    assert!(ddil_libtorch::num_interop_threads()? >= 1);
    for n in [0, usize::MAX] {
        let result = ddil_libtorch::set_num_threads(n);
        assert!(matches!(result, Err(Error::Argument(ArgumentError::Value { name: "n", .. }))));
        assert!(ddil_libtorch::set_num_interop_threads(n).is_err());
    }
    Ok(())
}

/// `put_` adds in any order, which libtorch has no deterministic kernel for unless it accumulates.
#[test]
fn deterministic_refuses_unsupported_devices() -> TestResult {
    if in_own_process("process::deterministic_refuses_unsupported_devices", &[], &[])? {
        return Ok(());
    }
    let put = || {
        let index = Tensor::from_slice(&[0_i64, 0]);
        Tensor::zeros([2], kind::FLOAT_CPU).f_put_(
            &index,
            &Tensor::ones([2], (Kind::Float, Device::Cpu)),
            false,
        )
    };
    assert!(put().is_ok());
    ddil_libtorch::deterministic(true)?;
    assert!(put().is_err());
    ddil_libtorch::deterministic(false)?;
    assert!(put().is_ok());
    Ok(())
}

#[test]
fn a_message_has_no_backtrace() {
    let (two, three) = (Tensor::zeros([2], kind::FLOAT_CPU), Tensor::zeros([3], kind::FLOAT_CPU));
    let said = refusal(ddil_libtorch::affine(&two, &three, 1.0, 1.0));
    assert_eq!(said, "affine: `x` has shape [2], but `y` has shape [3]");
}
