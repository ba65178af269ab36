//! Kernel distance.

use tch::{Kind, Tensor};

use crate::{
    distances::{blocks, columns},
    error::{Result, ensure_pair_of_rows, rows_of, torch},
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
/// Memory does not grow with the number of samples: they are converted to `f64` in parts, and may be in a mapped file.
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
    let (a, b) = ensure_pair_of_rows(OP, ("a", a), ("b", b), 2)?;
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
    for (first, width) in columns(b.size()[0]) {
        let b = rows_of(b, first, width);
        for (start, len) in blocks(a.size()[0], width) {
            let products = rows_of(a, start, len).f_matmul(&b.tr()).map_err(torch(op))?;
            sum += cubic(products, dim).sum(None).double_value(&[]);
        }
    }
    Ok(sum)
}

/// Sum of the kernel of every row with itself.
fn sum_of_own_kernel(a: &Tensor) -> f64 {
    let (n, dim) = (a.size()[0], a.size()[1]);
    let of_rows = |(start, len)| {
        let squares = rows_of(a, start, len).square();
        squares.sum_dim_intlist([1_i64].as_slice(), false, Kind::Double)
    };
    let products: Vec<Tensor> = columns(n).map(of_rows).collect();
    cubic(Tensor::cat(&products, 0), dim as f64).sum(None).double_value(&[])
}

/// `(products / dim + 1)^3`, reusing the memory of `products`.
fn cubic(mut products: Tensor, dim: f64) -> Tensor {
    products /= dim;
    products += 1.0;
    products.pow_(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_change_nothing() -> Result<()> {
        tch::manual_seed(5);
        let [a, b] = [23, 31].map(|n| Tensor::randn([n, 4], tch::kind::FLOAT_CPU));
        let kernels = |a: &Tensor, b: &Tensor| {
            let [a, b] = [a, b].map(|rows| rows.to_kind(Kind::Double));
            (a.matmul(&b.tr()) / 4.0 + 1.0).pow_tensor_scalar(3)
        };
        let within = |a: &Tensor| {
            let (own, n) = (kernels(a, a), a.size()[0] as f64);
            let others = own.sum(Kind::Double) - own.diagonal(0, 0, 1).sum(Kind::Double);
            others.double_value(&[]) / (n * (n - 1.0))
        };
        let between = kernels(&a, &b).mean(Kind::Double).double_value(&[]);
        let expected = within(&a) + within(&b) - 2.0 * between;
        let found = kid(&a, &b)?;
        assert!((found - expected).abs() < 1e-12, "{found}, {expected}");
        Ok(())
    }
}
