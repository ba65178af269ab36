//! Kernel distance.

use tch::{Kind, Tensor};

use crate::{
    distances::blocks,
    error::{Result, ensure_pair, torch},
};

/// Kernel distance (KID) between the distributions of `a` and `b`: the unbiased squared maximum mean discrepancy with
/// the kernel `k(x, y) = (x.y / d + 1)^3` over the complete sets.
///
/// `mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)`, equation 4 of
/// [Bińkowski et al. 2018](https://arxiv.org/abs/1801.01401). Published numbers are often means over random
/// subsets, which estimate the same value with more noise.
///
/// # Shapes and units
///
/// - `a`: `[n, d]`, `b`: `[m, d]`, any floating kind
/// - returns: no unit; often quoted times 1000; can be negative for close distributions
///
/// # Errors
///
/// [`Error::TooFewSamples`](crate::Error::TooFewSamples) if `n` or `m` is below 2,
/// [`FeatureMismatch`](crate::Error::FeatureMismatch) if the columns differ, and the errors of bad features:
/// [`Argument`](crate::Error::Argument), [`NonFinite`](crate::Error::NonFinite).
///
/// # Example
///
/// ```
/// let a = tch::Tensor::from_slice(&[1.0, -1.0]).view([2, 1]);
/// let b = tch::Tensor::from_slice(&[2.0, 2.0]).view([2, 1]);
/// // k(1, -1) = 0, k(2, 2) = 125, k(1, 2) = 27, k(-1, 2) = -1
/// assert_eq!(ddil_metrics::kid(&a, &b)?, 0.0 + 125.0 - 2.0 * 13.0);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn kid(a: &Tensor, b: &Tensor) -> Result<f64> {
    const OP: &str = "kid";
    let (a, b) = ensure_pair(OP, ("a", a), ("b", b), 2)?;
    let (n, m) = (a.size()[0] as f64, b.size()[0] as f64);

    let within_a = (sum_of_kernel(OP, &a, &a)? - sum_of_own_kernel(&a)) / (n * (n - 1.0));
    let within_b = (sum_of_kernel(OP, &b, &b)? - sum_of_own_kernel(&b)) / (m * (m - 1.0));
    let between = sum_of_kernel(OP, &a, &b)? / (n * m);
    Ok(within_a + within_b - 2.0 * between)
}

/// Sum of the kernel over all pairs of a row of `a` and a row of `b`.
fn sum_of_kernel(op: &'static str, a: &Tensor, b: &Tensor) -> Result<f64> {
    let dim = a.size()[1] as f64;
    let mut sum = 0.0;
    for (start, len) in blocks(a.size()[0], b.size()[0]) {
        let products = a.narrow(0, start, len).f_matmul(&b.tr()).map_err(torch(op))?;
        sum += cubic(products, dim).sum(None).double_value(&[]);
    }
    Ok(sum)
}

/// Sum of the kernel of every row with itself.
fn sum_of_own_kernel(a: &Tensor) -> f64 {
    let products = a.square().sum_dim_intlist([1_i64].as_slice(), false, Kind::Double);
    cubic(products, a.size()[1] as f64).sum(None).double_value(&[])
}

/// `(products / dim + 1)^3`, reusing the memory of `products`.
fn cubic(mut products: Tensor, dim: f64) -> Tensor {
    products /= dim;
    products += 1.0;
    products.pow_(3)
}
