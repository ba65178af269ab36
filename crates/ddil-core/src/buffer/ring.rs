//! Metadata of the states at one grid index, oldest first.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::states::Source;

/// No run inserts this many states: half of the range of the counter.
const MAX_SEQUENCE: u64 = u64::MAX / 2;

/// The states at one grid index, oldest first, numbered in order of insertion.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Ring {
    /// Sequence number of the next item.
    pub(super) next: u64,
    pub(super) items: VecDeque<Item>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Item {
    #[serde(rename = "birth")]
    pub(super) created_at_step: u64,
    pub(super) source: Source,
}

/// Saved form of a ring.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedRing {
    next: u64,
    items: Vec<Run>,
}

/// Consecutive equal items, as those of one update mostly are: a million items fit into a few lines.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    #[serde(rename = "birth")]
    created_at_step: u64,
    source: Source,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    count: u64,
}

fn one() -> u64 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_one(count: &u64) -> bool {
    *count == 1
}

impl Ring {
    /// Drops items beyond the age limit; returns how many are left.
    pub(super) fn drop_old(&mut self, step: u64, max_age: u64) -> usize {
        // Steps never decrease from front to back, so each item is examined only once.
        while self
            .items
            .front()
            .is_some_and(|item| step.saturating_sub(item.created_at_step) > max_age)
        {
            self.items.pop_front();
        }
        self.items.len()
    }

    /// Drops the oldest items, so that `more` fit into `ring_len`.
    pub(super) fn make_room(&mut self, more: usize, ring_len: usize) {
        let over = (self.items.len() + more).saturating_sub(ring_len);
        self.items.drain(..over.min(self.items.len()));
    }

    /// Adds an item; a full ring drops its oldest.
    pub(super) fn push(&mut self, item: Item, ring_len: usize) {
        if self.items.len() == ring_len {
            self.items.pop_front();
        }
        self.items.push_back(item);
        self.next += 1;
    }

    /// Sequence number of the oldest item, or of the next if there is none.
    pub(super) fn oldest(&self) -> u64 {
        self.next - self.items.len() as u64
    }

    /// Sequence number of the item at `position`, counted from the oldest.
    pub(super) fn sequence(&self, position: usize) -> u64 {
        self.oldest() + position as u64
    }

    pub(super) fn save(&self) -> SavedRing {
        let mut runs: Vec<Run> = Vec::new();
        for &Item { created_at_step, source } in &self.items {
            match runs.last_mut() {
                Some(run) if run.created_at_step == created_at_step && run.source == source => {
                    run.count += 1;
                }
                _ => runs.push(Run { created_at_step, source, count: 1 }),
            }
        }
        SavedRing { next: self.next, items: runs }
    }

    /// None if it cannot be a ring of `ring_len` places.
    pub(super) fn restore(saved: &SavedRing, ring_len: usize) -> Option<Self> {
        let sum = |sum: u64, run: &Run| sum.checked_add(run.count);
        // Counted before anything is allocated, as a damaged count could request any amount of memory.
        let len = saved.items.iter().try_fold(0, sum)?;
        if len > ring_len as u64 || len > saved.next || saved.next > MAX_SEQUENCE {
            return None;
        }
        let items = saved.items.iter().flat_map(|&Run { created_at_step, source, count }| {
            std::iter::repeat_n(Item { created_at_step, source }, count as usize)
        });
        Some(Self { next: saved.next, items: items.collect() })
    }
}
