//! Runs functions with one argument after the other replaced by something odd.

use std::collections::BTreeSet;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{Kind, Tensor};

use super::inventory::{all_functions_of, functions_of};

/// The outcome of a function: nothing, or an error message with its causes.
pub(crate) type Response = Result<(), String>;

/// Drops the value and turns an error into its message.
pub(crate) fn outcome<T, E: Error>(result: Result<T, E>) -> Response {
    result.map(drop).map_err(|error| ddil_files::with_causes(&error))
}

/// The cases of one crate.
#[derive(Default)]
pub(crate) struct Cases {
    covered: BTreeSet<String>,
    problems: Vec<String>,
    calls: u64,
    errors: u64,
}

impl Cases {
    /// Calls a function once.
    pub(crate) fn once(&mut self, name: &str, what: &str, call: impl FnOnce() -> Response) {
        self.covered.insert(name.to_owned());
        self.calls += 1;
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(Ok(())) => {}
            Ok(Err(message)) => {
                self.errors += 1;
                crate::messages::collect(name, &message);
                let bad =
                    message.is_empty() || message.contains("frame #") || message.len() > 10_000;
                if bad {
                    self.problems.push(format!("{name} with {what} returns {message:?}"));
                }
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text =
                    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                let text = text.unwrap_or_default();
                let line = text.lines().next().unwrap_or_default();
                self.problems.push(format!("{name} with {what} panics: {line}"));
            }
        }
    }

    /// Calls a function with tensors that it takes, then with each of them replaced by each odd one.
    ///
    /// Each call gets new copies of the tensors, so a function may change them.
    pub(crate) fn tensors(
        &mut self,
        name: &str,
        valid: &[&Tensor],
        call: impl Fn(&mut [Tensor]) -> Response,
    ) {
        let copies = || -> Vec<Tensor> { valid.iter().map(|tensor| tensor.copy()).collect() };
        // The unchanged arguments must be accepted.
        let taken = call(&mut copies());
        if let Err(message) = taken {
            self.problems.push(format!("{name} refuses what it should take: {message}"));
        }
        for place in 0..valid.len() {
            for (what, odd) in odd_tensors(valid[place]) {
                let mut arguments = copies();
                arguments[place] = odd;
                self.once(name, &format!("{what} for tensor {place}"), || call(&mut arguments));
            }
        }
    }

    /// Calls a function with odd numbers.
    pub(crate) fn numbers(&mut self, name: &str, call: impl Fn(f64) -> Response) {
        for number in ODD_NUMBERS {
            self.once(name, &format!("{number:e}"), || call(number));
        }
    }

    /// Calls a function with odd whole numbers.
    pub(crate) fn integers(&mut self, name: &str, call: impl Fn(i64) -> Response) {
        for whole in ODD_WHOLES {
            self.once(name, &whole.to_string(), || call(whole));
        }
    }

    /// Functions that accept any argument and cannot fail.
    pub(crate) fn cannot_fail(&mut self, names: &[&str]) {
        self.covered.extend(names.iter().map(|name| (*name).to_owned()));
    }

    /// Functions whose files are corrupted by the targets of `inputs`.
    pub(crate) fn corrupted_in_inputs(&mut self, names: &[&str]) {
        self.cannot_fail(names);
    }

    /// Fails unless all went well and every function of the crate was called.
    pub(crate) fn finish(mut self, krate: &str) {
        let public = functions_of(krate);
        let without = public.difference(&self.covered).map(|name| format!("no case for {name}"));
        let all = all_functions_of(krate);
        let gone = self.covered.difference(&all).map(|name| format!("there is no {name}"));
        let differences: Vec<String> = without.chain(gone).collect();
        self.problems.extend(differences);
        println!(
            "{krate}: {} functions, {} calls, {} errors",
            public.len(),
            self.calls,
            self.errors
        );
        assert!(self.problems.is_empty(), "{}:\n{}", krate, self.problems.join("\n"));
    }
}

pub(crate) const ODD_NUMBERS: [f64; 12] = [
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    0.0,
    -0.0,
    -1.0,
    0.5,
    1.0,
    5e-324,
    1e-300,
    1e300,
    f64::MAX,
];

pub(crate) const ODD_WHOLES: [i64; 11] =
    [0, 1, 2, 3, -1, -2, 1000, 1 << 31, 1 << 40, i64::MAX, i64::MIN];

/// Tensors unlike one that is taken: in shape, kind, values, order in memory, layout.
pub(crate) fn odd_tensors(valid: &Tensor) -> Vec<(String, Tensor)> {
    use Kind::{BFloat16, Bool, ComplexFloat, Double, Float, Half, Int, Int8, Int64, Uint8};
    let mut odd = vec![("an undefined tensor".to_owned(), Tensor::new())];
    let mut add = |what: String, made: Result<Tensor, tch::TchError>| {
        odd.extend(made.ok().map(|tensor| (what, tensor)));
    };
    for kind in [Float, Double, Half, BFloat16, Int64, Int, Int8, Uint8, Bool, ComplexFloat] {
        add(format!("{kind:?}"), valid.f_to_kind(kind));
    }
    add("one number".into(), valid.f_flatten(0, -1).and_then(|flat| flat.f_get(0)));
    add("an empty batch".into(), valid.f_narrow(0, 0, 0));
    add("a row more".into(), Tensor::f_cat(&[valid, &valid.narrow(0, 0, 1)], 0));
    add("all in one dimension".into(), valid.f_flatten(0, -1));
    add("a dimension more in front".into(), valid.f_unsqueeze(0));
    add("a dimension more behind".into(), valid.f_unsqueeze(-1));
    add("transposed".into(), valid.f_transpose(0, -1));
    add("an empty last side".into(), valid.f_narrow(-1, 0, 0));
    add("twice the last side".into(), Tensor::f_cat(&[valid, valid], -1));
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e30, -1e30] {
        if matches!(valid.kind(), Float | Double) {
            add(format!("all {value}"), valid.f_full_like(value));
        }
    }
    for value in [-1, -2, 1 << 20, i64::MAX, i64::MIN] {
        if valid.kind() == Int64 {
            add(format!("all {value}"), valid.f_full_like(value));
        }
    }
    add(
        "one value seen from everywhere".into(),
        valid.f_narrow(0, 0, 1).and_then(|row| row.f_expand_as(valid)),
    );
    add(
        "every other row".into(),
        Tensor::f_cat(&[valid, valid], 0).and_then(|t| t.f_slice(0, 0, None, 2)),
    );
    add("a sparse one".into(), valid.f_to_sparse_sparse_dim(valid.dim() as i64));
    if valid.is_floating_point() {
        add("one with a gradient".into(), valid.copy().f_set_requires_grad(true));
    }
    odd
}
