//! Where a state is stored, in memory or on disk.

use super::segment::HEAD_BYTES;

/// How the places of each ring are split between memory and disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Places {
    /// States per ring.
    pub(super) ring_len: usize,
    /// Of these, states in memory.
    pub(super) kept: usize,
    /// Rows of a file on disk; 0 where everything is in memory.
    pub(super) segment_rows: usize,
}

/// Where a state is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// This row of the block in memory.
    Kept(usize),
    /// On disk, this row of all that the ring ever spilled.
    Spilled(u64),
}

impl Places {
    /// Everything in memory.
    pub(super) fn in_memory(ring_len: usize) -> Self {
        Self { ring_len, kept: ring_len, segment_rows: 0 }
    }

    /// The same with up to `wanted` more places per ring on disk, within `budget` bytes per ring; none if that is too
    /// little for one.
    ///
    /// A file is removed with its last state and never overwritten, so that saved states can refer to it. There is
    /// therefore one file more than the states of a ring fill.
    pub(super) fn and_on_disk(self, wanted: usize, budget: u64, row_bytes: u64) -> Option<Self> {
        let most = budget.div_ceil(SEGMENT_BYTES).clamp(MIN_SEGMENTS, MAX_SEGMENTS);
        let rows = |files: u64| (budget / files).saturating_sub(HEAD_BYTES as u64) / row_bytes;
        let (files, rows) =
            (2..=most).map(|n| (n, rows(n))).max_by_key(|(n, rows)| (n - 1) * rows)?;
        let spilled = ((files - 1) * rows).min(wanted as u64);
        if spilled == 0 {
            return None;
        }
        let segment_rows = spilled.div_ceil(files - 1) as usize;
        Some(Self { ring_len: self.kept + spilled as usize, segment_rows, ..self })
    }

    /// States per ring on disk.
    pub(super) fn spilled(self) -> usize {
        self.ring_len - self.kept
    }

    /// Where the state with this sequence number is stored, in the ring at this index.
    pub(super) fn place(self, ring: usize, sequence: u64) -> Place {
        let in_ring = (sequence % self.ring_len as u64) as usize;
        if in_ring < self.kept {
            Place::Kept(ring * self.kept + in_ring)
        } else {
            Place::Spilled(self.spilled_before(sequence))
        }
    }

    /// Number of states of a ring that were spilled before this one.
    pub(super) fn spilled_before(self, sequence: u64) -> u64 {
        let (laps, in_ring) = (sequence / self.ring_len as u64, sequence % self.ring_len as u64);
        laps * self.spilled() as u64 + in_ring.saturating_sub(self.kept as u64)
    }

    /// Maximum bytes of a ring on disk, heads of files included; none on overflow.
    pub(super) fn bytes_on_disk(self, row_bytes: u64) -> Option<u64> {
        let files = (self.spilled() as u64).div_ceil(self.segment_rows.max(1) as u64) + 1;
        let file =
            row_bytes.checked_mul(self.segment_rows as u64)?.checked_add(HEAD_BYTES as u64)?;
        file.checked_mul(files)
    }
}

/// Target size of a file, unless that makes too few or too many files.
const SEGMENT_BYTES: u64 = 64 << 20;
/// With fewer files, the extra one would take too much of the budget.
const MIN_SEGMENTS: u64 = 8;
/// Each file is a mapping, and the system limits their number.
const MAX_SEGMENTS: u64 = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_a_place_of_its_own() {
        let places = Places { ring_len: 7, kept: 3, segment_rows: 2 };
        for first in 0..40 {
            let of_ring: Vec<Place> = (first..first + 7).map(|n| places.place(2, n)).collect();
            let kept = of_ring.iter().filter(|place| matches!(place, Place::Kept(6..9)));
            assert_eq!(kept.count(), 3);
            let mut spilled = of_ring.iter().filter_map(|place| match place {
                Place::Spilled(row) => Some(*row),
                Place::Kept(_) => None,
            });
            let oldest = places.spilled_before(first);
            assert!((oldest..oldest + 4).all(|row| spilled.next() == Some(row)));
            assert_eq!(places.spilled_before(first + 7), oldest + 4);
        }
    }

    #[test]
    fn files_stay_within_their_budget() {
        for (budget, row_bytes) in [(1 << 20, 10), (9000, 100), (10_u64 << 30, 32_768), (8200, 2)] {
            for wanted in [1, 5, 1000, 1_000_000] {
                let places = Places::in_memory(4).and_on_disk(wanted, budget, row_bytes);
                let places = places.expect("there is room for some");
                assert!(places.spilled() <= wanted);
                let bytes = places.bytes_on_disk(row_bytes).expect("a small number");
                assert!(bytes <= budget, "{bytes} of {budget}: {places:?}");
                // The remainder is the share of one file, and less than a row in each.
                let wasted = budget - bytes;
                assert!(
                    places.spilled() == wanted || wasted <= budget / 4 + 128 * row_bytes,
                    "{places:?} wastes {wasted} of {budget}"
                );
            }
        }
        // The minimum is two heads and a row each.
        let least = 2 * (HEAD_BYTES as u64 + 100);
        assert!(Places::in_memory(0).and_on_disk(9, least, 100).is_some());
        assert_eq!(Places::in_memory(0).and_on_disk(9, least - 1, 100), None);
    }
}
