//! Draws with counts as even as their shares allow.

use rand::Rng;
use rand::seq::SliceRandom;

/// `n` indices of `shares`, each drawn in proportion to its share, in random order.
///
/// Systematic sampling: evenly spaced points on a line that is divided by the shares. Each count is the expected count
/// `n * share`, rounded down or up at random so that its mean is exact. One draw shifts all points, so that counts
/// cannot exceed `n`, as they could if each were rounded separately. An index with a share of 0 is never drawn.
///
/// Shares are at least 0 with sum 1; the last positive one has what rounding leaves. Without a positive share nothing
/// is drawn.
///
/// # Example
///
/// ```
/// use ddil_core::draw_stratified;
/// use rand::SeedableRng;
/// use rand::rngs::StdRng;
///
/// let drawn = draw_stratified(&[0.5, 0.0, 0.25, 0.25], 8, &mut StdRng::seed_from_u64(0));
/// let count = |index: usize| drawn.iter().filter(|drawn| **drawn == index).count();
/// assert_eq!([count(0), count(1), count(2), count(3)], [4, 0, 2, 2]);
/// ```
pub fn draw_stratified(shares: &[f64], n: usize, rng: &mut impl Rng) -> Vec<usize> {
    let drawn: Vec<usize> = (0..shares.len()).filter(|&index| shares[index] > 0.0).collect();
    let offset: f64 = rng.random();
    let (mut end, mut at) = (0.0, 0);
    let mut indices = Vec::new();
    for (i, &index) in drawn.iter().enumerate() {
        end += shares[index] * n as f64;
        let last = i + 1 == drawn.len();
        while at < n && (last || at as f64 + offset < end) {
            indices.push(index);
            at += 1;
        }
    }
    indices.shuffle(rng);
    indices
}
