//! Restores named tensors, all or none.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::{Error, Result};

/// Copies saved tensors into the tensors of the same names, in place; nothing is changed unless all fit.
///
/// `what` is the name used in the error, such as `optimizer`.
///
/// # Errors
///
/// [`Error::StateMismatch`] with every name that is missing or unexpected and every tensor of another shape or
/// kind.
pub(crate) fn restore(
    what: &'static str,
    targets: &[(String, Tensor)],
    saved: &[(String, Tensor)],
) -> Result<()> {
    let by_name: BTreeMap<&str, &Tensor> =
        saved.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let expected: BTreeMap<&str, &Tensor> =
        targets.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();

    let mut problems: Vec<String> = by_name
        .keys()
        .filter(|name| !expected.contains_key(*name))
        .map(|name| format!("{name}: not expected"))
        .collect();
    problems.extend(expected.iter().filter_map(|(name, target)| match by_name.get(name) {
        None => Some(format!("{name}: missing")),
        Some(tensor) => {
            difference(target, tensor).map(|difference| format!("{name}: {difference}"))
        }
    }));
    if !problems.is_empty() {
        return Err(Error::StateMismatch { what, problems });
    }
    let _guard = tch::no_grad_guard();
    for (name, target) in expected {
        let mut target = target.shallow_clone();
        target.f_copy_(by_name[name]).map_err(Error::torch("state::restore"))?;
    }
    Ok(())
}

fn difference(target: &Tensor, saved: &Tensor) -> Option<String> {
    let describe = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
    let (expected, found) = (describe(target), describe(saved));
    (expected != found).then(|| format!("is {found}, not {expected}"))
}

#[cfg(test)]
mod tests {
    use tch::kind::FLOAT_CPU;

    use super::*;

    #[test]
    fn all_tensors_are_restored_or_none() -> Result<()> {
        let named = |name: &str, value: f64| (name.to_owned(), Tensor::full([2], value, FLOAT_CPU));
        let weights = [named("weight", 0.0)];
        restore("student", &weights, &[named("weight", 1.0)])?;
        assert_eq!(weights[0].1, Tensor::ones([2], FLOAT_CPU));

        let error = restore("student", &weights, &[named("wait", 2.0)]).expect_err("another name");
        assert_eq!(
            error.to_string(),
            "student: the saved state does not fit:\n  wait: not expected\n  weight: missing"
        );
        assert_eq!(weights[0].1, Tensor::ones([2], FLOAT_CPU));
        Ok(())
    }
}
