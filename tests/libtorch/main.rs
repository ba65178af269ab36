//! Tests of `ddil-libtorch`, a module for each of its files.

#![expect(clippy::float_cmp, reason = "small whole numbers come out exact")]

mod autocast;
mod elementwise;
mod foreach;
mod generator;
mod group_norm;
mod group_norm_gradient;
mod list;
mod mapped;
mod memory_format;
mod normal;
mod optim;
mod process;
mod recompute;
mod row_file;
mod script_archive;
mod waiting;

use tch::{Kind, Tensor};

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// Largest absolute difference of two tensors.
fn max_difference(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    if left.numel() == 0 {
        return 0.0;
    }
    let [left, right] = [left, right].map(|t| t.to_kind(Kind::Double));
    (left - right).abs().max().double_value(&[])
}

/// The message of an error; the test fails if there is none.
fn refusal<T>(result: ddil_libtorch::Result<T>) -> String {
    match result {
        Ok(_) => panic!("this should have been refused"),
        Err(error) => error.to_string(),
    }
}

/// Runs `test` alone in another process, with `variables` set and `removed` unset. False in that process.
fn in_own_process(
    test: &str,
    variables: &[(&str, &str)],
    removed: &[&str],
) -> Result<bool, Box<dyn std::error::Error>> {
    const CHILD: &str = "DDIL_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return Ok(false);
    }
    let mut child = std::process::Command::new(std::env::current_exe()?);
    for name in removed {
        child.env_remove(name);
    }
    let status =
        child.args([test, "--exact"]).env(CHILD, "1").envs(variables.iter().copied()).status()?;
    assert!(status.success());
    Ok(true)
}
