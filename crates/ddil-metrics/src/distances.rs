//! Distances of every row of one set to every row of another, in blocks of bounded size.
//!
//! A matrix product computes squared distances many times faster than differences, but with rounding errors: the
//! distance of a sample to itself is not exactly 0, and equal distances compare in arbitrary order. Products are
//! therefore used where their error cannot change the result, and differences elsewhere: for ties and for coinciding
//! samples.

use tch::{Kind, Tensor};

use crate::error::{Result, rows_of, torch};

/// Maximum number of elements of a block: 8 MiB of `f64`. The allocator reuses blocks of this size; larger ones are
/// requested from the system, page by page, every time.
const BLOCK_ELEMENTS: i64 = 1 << 20;

/// Maximum number of rows of the second set that are in memory as `f64`: 268 MB with 2048 columns. In the tests of this
/// crate, few enough for several parts.
const COLUMNS: i64 = if cfg!(test) { 7 } else { 1 << 14 };

/// For sums, squared distances up to this multiple of a product's rounding error are recomputed from differences; the
/// others then have at least ten correct digits.
const SUM_MARGIN: f64 = 1e10;

/// All pairs of a row of `a` and a row of `b`, matrices with equally many columns. They are converted to `f64` in parts,
/// so that they may be larger than the memory.
pub(crate) struct Pairs<'a> {
    op: &'static str,
    a: &'a Tensor,
    b: &'a Tensor,
    centre: Tensor,
    /// Squared lengths of the centred rows.
    lengths: [Tensor; 2],
    /// Bound of the rounding error of a squared distance.
    rounding: f64,
}

/// The pairs of all rows of `a` with some rows of `b`, which are in memory.
pub(crate) struct Tile<'a, 'p> {
    pairs: &'p Pairs<'a>,
    columns: Block,
    /// The centred rows of `b`.
    centred: Tensor,
}

/// First row and number of rows of a block.
pub(crate) type Block = (i64, i64);

impl<'a> Pairs<'a> {
    pub(crate) fn new(op: &'static str, a: &'a Tensor, b: &'a Tensor) -> Self {
        // Centring: products lose less precision near the origin.
        // In parts: a mean in `f64` would convert all rows at once.
        let sum_of = |rows: &Tensor| rows.sum_dim_intlist([0_i64].as_slice(), true, Kind::Double);
        let sums = columns(a.size()[0]).map(|(start, len)| sum_of(&rows_of(a, start, len)));
        let centre = sum_of(&Tensor::cat(&sums.collect::<Vec<_>>(), 0)) / a.size()[0] as f64;
        let lengths = [a, b].map(|rows| {
            let of_part = |(start, len)| row_sums(&(rows_of(rows, start, len) - &centre).square());
            Tensor::cat(&columns(rows.size()[0]).map(of_part).collect::<Vec<_>>(), 0)
        });
        let longest: f64 = lengths.iter().map(|lengths| lengths.max().double_value(&[])).sum();
        // The error of a sum of d products is at most d roundings; the rest is for the centring and the three terms.
        let rounding = 2.0 * (a.size()[1] as f64 + 4.0) * f64::EPSILON * longest;
        Self { op, a, b, centre, lengths, rounding }
    }

    /// The pairs in parts, each with some rows of `b`.
    pub(crate) fn tiles(&self) -> impl Iterator<Item = Tile<'a, '_>> {
        columns(self.b.size()[0]).map(|(start, len)| Tile {
            pairs: self,
            columns: (start, len),
            centred: rows_of(self.b, start, len) - &self.centre,
        })
    }

    /// Distances of single pairs, from differences; the distance of equal rows is exactly 0.
    pub(crate) fn exact(&self, rows: &Tensor, columns: &Tensor) -> Tensor {
        let of = |all: &Tensor, index: &Tensor| all.index_select(0, index).to_kind(Kind::Double);
        let gaps = of(self.a, rows) - of(self.b, columns);
        row_sums(&gaps.square()).sqrt()
    }

    /// Sum of all distances.
    pub(crate) fn sum_of_distances(&self) -> Result<f64> {
        let mut sum = 0.0;
        for tile in self.tiles() {
            for block in tile.blocks() {
                let squares = tile.squares(block)?;
                let near = squares.le(self.rounding * SUM_MARGIN);
                sum += squares.masked_fill(&near, 0.0).sqrt().sum(Kind::Double).double_value(&[]);
                for (rows, columns) in pairs_at(&near.nonzero(), self.a.size()[1]) {
                    let exact = self.exact(&(rows + block.0), &(columns + tile.columns.0));
                    sum += exact.sum(Kind::Double).double_value(&[]);
                }
            }
        }
        Ok(sum)
    }
}

impl Tile<'_, '_> {
    /// First row of `b` and number of rows.
    pub(crate) fn columns(&self) -> Block {
        self.columns
    }

    /// Blocks of rows of `a`, each compared with all rows of the tile.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        blocks(self.pairs.a.size()[0], self.columns.1)
    }

    /// Squared distances `[len, columns]` of a block, up to `rounding`.
    pub(crate) fn squares(&self, (start, len): Block) -> Result<Tensor> {
        let Pairs { op, a, centre, lengths: [of_a, of_b], .. } = self.pairs;
        // Of the two factors, the block is the small one.
        let a = (rows_of(a, start, len) - centre) * -2.0;
        let mut squares = a.f_matmul(&self.centred.tr()).map_err(torch(op))?;
        squares += of_a.narrow(0, start, len).unsqueeze(1);
        squares += of_b.narrow(0, self.columns.0, self.columns.1);
        Ok(squares)
    }

    /// Whether the distance of each pair is below its radius, `[len, columns]`, with the result of differences.
    ///
    /// `radii` is `[columns]` or `[len, 1]`.
    pub(crate) fn closer(&self, squares: &Tensor, block: Block, radii: &Tensor) -> Result<Tensor> {
        let Pairs { op, a, rounding, .. } = self.pairs;
        let mut gaps = squares - radii.square();
        let mut closer = gaps.lt(0.0);
        let ties = gaps.abs_().le(*rounding).nonzero();
        let radii = radii.expand_as(squares);
        for (rows, columns) in pairs_at(&ties, a.size()[1]) {
            let place = [Some(&rows), Some(&columns)];
            let exact = self.pairs.exact(&(&rows + block.0), &(&columns + self.columns.0));
            let decided = exact.lt_tensor(&radii.index(&place));
            let _ = closer.f_index_put_(&place, &decided, false).map_err(torch(op))?;
        }
        Ok(closer)
    }
}

/// Rows and columns of the positions `[p, 2]`, in chunks whose rows fit a block.
fn pairs_at(places: &Tensor, dim: i64) -> impl Iterator<Item = (Tensor, Tensor)> {
    blocks(places.size()[0], dim).map(move |(start, len)| {
        let places = places.narrow(0, start, len);
        (places.select(1, 0), places.select(1, 1))
    })
}

/// First row and number of rows of each part of a set that is in memory as `f64`.
pub(crate) fn columns(num_rows: i64) -> impl Iterator<Item = Block> + use<> {
    (0..num_rows).step_by(COLUMNS as usize).map(move |start| (start, COLUMNS.min(num_rows - start)))
}

/// First row and number of rows of each block, for rows of `num_columns` elements.
pub(crate) fn blocks(num_rows: i64, num_columns: i64) -> impl Iterator<Item = Block> + use<> {
    let rows = (BLOCK_ELEMENTS / num_columns.max(1)).max(1);
    (0..num_rows).step_by(rows as usize).map(move |start| (start, rows.min(num_rows - start)))
}

fn row_sums(rows: &Tensor) -> Tensor {
    rows.sum_dim_intlist([1_i64].as_slice(), false, Kind::Double)
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
    fn sums_in_parts_are_those_of_differences() -> Result<()> {
        tch::manual_seed(3);
        let [a, b] = [40, 23].map(|n| Tensor::randn([n, 5], tch::kind::FLOAT_CPU));
        let b = Tensor::cat(&[&b, &a.narrow(0, 3, 2)], 0);
        let gaps = a.to_kind(Kind::Double).unsqueeze(1) - b.to_kind(Kind::Double).unsqueeze(0);
        let distances = gaps.square().sum_dim_intlist([2_i64].as_slice(), false, Kind::Double);
        let expected = distances.sqrt().sum(Kind::Double).double_value(&[]);
        let found = Pairs::new("test", &a, &b).sum_of_distances()?;
        assert!((found / expected - 1.0).abs() < 1e-12, "{found}, {expected}");
        Ok(())
    }

    /// Rounding stays under its bound, even far from the origin.
    #[test]
    fn products_are_as_good_as_promised() -> Result<()> {
        tch::manual_seed(0);
        for (dim, centre) in [(3, 0.0), (300, 0.0), (300, 1e4)] {
            let a = Tensor::randn([40, dim], tch::kind::DOUBLE_CPU) + centre;
            let b = Tensor::cat(&[&a, &(&a * 3.0)], 0);
            let pairs = Pairs::new("test", &a, &b);
            let exact = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum_dim_intlist(
                [2_i64].as_slice(),
                false,
                Kind::Double,
            );
            let mut largest: f64 = 0.0;
            for tile in pairs.tiles() {
                let (first, width) = tile.columns();
                let error = tile.squares((0, 40))? - exact.narrow(1, first, width);
                largest = largest.max(error.abs().max().double_value(&[]));
            }
            assert!(largest <= pairs.rounding, "{largest}, bound {}", pairs.rounding);
            assert!(largest > 0.0, "nothing was tested");
        }
        Ok(())
    }

    /// Every pair ties here: each has its own distance for a radius, and is not closer than that.
    #[test]
    fn radii_are_exclusive() -> Result<()> {
        tch::manual_seed(1);
        let a = Tensor::randn([1, 30], tch::kind::DOUBLE_CPU);
        let b = Tensor::randn([500, 30], tch::kind::DOUBLE_CPU);
        let pairs = Pairs::new("test", &a, &b);
        let columns = Tensor::arange(500, tch::kind::INT64_CPU);
        let radii = pairs.exact(&columns.zeros_like(), &columns);
        let count = |radii: &Tensor| -> Result<i64> {
            let mut sum = 0;
            for tile in pairs.tiles() {
                let (first, width) = tile.columns();
                let radii = radii.narrow(0, first, width);
                let closer = tile.closer(&tile.squares((0, 1))?, (0, 1), &radii)?;
                sum += closer.sum(Kind::Int64).int64_value(&[]);
            }
            Ok(sum)
        };
        assert_eq!(count(&radii)?, 0);
        assert_eq!(count(&(radii * (1.0 + 2.0 * f64::EPSILON)))?, 500);
        Ok(())
    }
}
