//! Distances of every row of one set to every row of another, in blocks of bounded size.

use tch::Tensor;

use crate::error::{Result, torch};

/// Most elements of a block of distances: 64 MiB of `f64`.
const BLOCK_ELEMENTS: i64 = 8 << 20;

/// libtorch's `cdist` without its matrix-product path, whose rounding gives a sample a distance to itself and
/// breaks ties at random; this path takes differences first.
const EXACT_DIFFERENCES: i64 = 2;

/// First row and number of rows of each block, when every row meets `num_columns` others.
pub(crate) fn blocks(num_rows: i64, num_columns: i64) -> impl Iterator<Item = (i64, i64)> {
    let rows = (BLOCK_ELEMENTS / num_columns.max(1)).max(1);
    (0..num_rows).step_by(rows as usize).map(move |start| (start, rows.min(num_rows - start)))
}

/// Euclidean distances `[len, m]` of `len` rows of `a`, from `start` on, to all `m` rows of `b`.
pub(crate) fn block_distances(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    (start, len): (i64, i64),
) -> Result<Tensor> {
    Tensor::f_cdist(&a.narrow(0, start, len), b, 2.0, EXACT_DIFFERENCES).map_err(torch(op))
}

/// Sum of the distances over all pairs of a row of `a` and a row of `b`.
pub(crate) fn sum_of_distances(op: &'static str, a: &Tensor, b: &Tensor) -> Result<f64> {
    let mut sum = 0.0;
    for block in blocks(a.size()[0], b.size()[0]) {
        sum += block_distances(op, a, b, block)?.sum(None).double_value(&[]);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_row_once() {
        for (rows, columns) in [(0, 5), (1, 1), (10, BLOCK_ELEMENTS / 4), (7, 2 * BLOCK_ELEMENTS)] {
            let mut next = 0;
            for (start, len) in blocks(rows, columns) {
                assert_eq!(start, next);
                assert!(len >= 1);
                assert!(len * columns <= BLOCK_ELEMENTS.max(columns));
                next += len;
            }
            assert_eq!(next, rows);
        }
    }

    #[test]
    fn a_sample_is_at_no_distance_from_itself() -> Result<()> {
        tch::manual_seed(0);
        let a = Tensor::randn([40, 300], tch::kind::DOUBLE_CPU) + 100.0;
        let own = block_distances("test", &a, &a, (0, 40))?.diag(0).abs().max().double_value(&[]);
        assert!(own == 0.0, "{own}");
        Ok(())
    }
}
