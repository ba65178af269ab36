use ddil_files::Invalid;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};

use crate::Result;

/// Purpose of the random stream of shuffles, so that it differs from all other streams of the run's seed.
const SHUFFLE: &[u8; 16] = b"dataset shuffle\0";
/// Purpose of the random stream of flips.
const FLIP: &[u8; 16] = b"dataset flip\0\0\0\0";

/// Purpose of the random stream of an order.
const ORDER: &[u8; 16] = b"dataset order\0\0\0";

/// The indices of `len` samples in random order.
pub(crate) fn random_order(len: i64, seed: u64) -> Vec<i64> {
    shuffled(len, &mut stream(seed, 0, ORDER))
}

/// Purpose of the random stream of a choice of samples.
const CHOICE: &[u8; 16] = b"dataset choice\0\0";

/// Which samples of a data set are used, if not all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SampleChoice {
    /// The first; those of a folder of classes are sorted by class.
    First,
    /// At random, each with the same probability.
    #[default]
    Random,
}

/// Indices of `count` of `len` samples, in increasing order.
///
/// The random choice depends on `seed` alone, and a smaller count chooses some of the samples of a larger one.
///
/// # Errors
///
/// [`Error::Invalid`](crate::Error::Invalid) unless `count` is in `1..=len`.
///
/// # Example
///
/// ```
/// use ddil_data::{SampleChoice, choose_samples};
///
/// assert_eq!(choose_samples(10, 3, SampleChoice::First, 0)?, [0, 1, 2]);
/// let few = choose_samples(10, 3, SampleChoice::Random, 0)?;
/// let more = choose_samples(10, 5, SampleChoice::Random, 0)?;
/// assert!(few.iter().all(|index| more.contains(index)));
/// # Ok::<(), ddil_data::Error>(())
/// ```
pub fn choose_samples(len: i64, count: i64, choice: SampleChoice, seed: u64) -> Result<Vec<i64>> {
    if !(1..=len).contains(&count) {
        let expected = format!("in 1..={len}, the number of samples");
        return Err(Invalid::new("max_samples", count, expected).into());
    }
    Ok(match choice {
        SampleChoice::First => (0..count).collect(),
        SampleChoice::Random => {
            let mut chosen = shuffled(len, &mut stream(seed, 0, CHOICE));
            chosen.truncate(count as usize);
            chosen.sort_unstable();
            chosen
        }
    })
}

/// The sample indices of each training step: the data set in a new random order every epoch.
///
/// Batches continue across epochs: a batch that begins at the end of one epoch ends in the next. [`at`](Self::at)
/// depends only on the seed, the step and the sizes, not on earlier calls. The order of the current epoch is cached, so
/// consecutive steps are cheap.
///
/// # Example
///
/// ```
/// use ddil_data::BatchIndices;
///
/// let mut indices = BatchIndices::new(10, 5, 42)?;
/// let mut epoch = [indices.at(0), indices.at(1)].concat();
/// epoch.sort();
/// assert_eq!(epoch, (0..10).collect::<Vec<_>>());
///
/// let mut resumed = BatchIndices::new(10, 5, 42)?;
/// assert_eq!(resumed.at(1000), indices.at(1000));
/// # Ok::<(), ddil_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct BatchIndices {
    len: u64,
    batch_size: u64,
    seed: u64,
    rank: u64,
    num_ranks: u64,
    epoch: Option<Epoch>,
}

#[derive(Clone, Debug)]
struct Epoch {
    number: u64,
    order: Vec<i64>,
}

impl BatchIndices {
    /// Batches of `batch_size` indices in `0..len`, in a random order drawn from `seed`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) unless `len` and `batch_size` are 1 or more.
    pub fn new(len: i64, batch_size: usize, seed: u64) -> Result<Self> {
        if len < 1 {
            return Err(Invalid::new("len", len, "1 or more").into());
        }
        if batch_size < 1 {
            return Err(Invalid::new("batch_size", batch_size, "1 or more").into());
        }
        let (len, batch_size) = (len as u64, batch_size as u64);
        Ok(Self { len, batch_size, seed, rank: 0, num_ranks: 1, epoch: None })
    }

    /// The batches of process `rank` of `num_ranks`: the processes see different samples of the same order.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) unless `rank < num_ranks`.
    pub fn for_rank(mut self, rank: usize, num_ranks: usize) -> Result<Self> {
        if rank >= num_ranks {
            let value = format!("{rank} of {num_ranks}");
            return Err(Invalid::new("rank", value, "below the number of ranks").into());
        }
        (self.rank, self.num_ranks) = (rank as u64, num_ranks as u64);
        Ok(self)
    }

    /// The indices of the batch of `step`, counted from 0.
    pub fn at(&mut self, step: u64) -> Vec<i64> {
        let first = self.first_position(step);
        (0..self.batch_size)
            .map(|offset| {
                let position = first + u128::from(offset);
                let len = u128::from(self.len);
                self.order((position / len) as u64)[(position % len) as usize]
            })
            .collect()
    }

    /// Whether to mirror each sample of the batch of `step`: true with probability one half, drawn from seed, step and
    /// rank.
    pub fn flips_at(&self, step: u64) -> Vec<bool> {
        let mut rng = stream(self.seed, step, FLIP);
        let skipped = self.rank * self.batch_size;
        let mut draws = (0..skipped + self.batch_size).map(|_| rng.random());
        draws.by_ref().skip(skipped as usize).collect()
    }

    /// The epoch in which the batch of `step` begins, counted from 0.
    pub fn epoch_of(&self, step: u64) -> u64 {
        (self.first_position(step) / u128::from(self.len)) as u64
    }

    /// The number of steps per epoch, rounded up; after that many steps every sample was seen at least once.
    pub fn steps_per_epoch(&self) -> u64 {
        self.len.div_ceil(self.batch_size * self.num_ranks)
    }

    /// Position of the first sample of a step in the sequence of all epochs.
    fn first_position(&self, step: u64) -> u128 {
        let batches_before = u128::from(step) * u128::from(self.num_ranks) + u128::from(self.rank);
        batches_before * u128::from(self.batch_size)
    }

    /// The order of an epoch; cached for the last one.
    fn order(&mut self, number: u64) -> &[i64] {
        let cached = self.epoch.take().filter(|epoch| epoch.number == number);
        let epoch = cached.unwrap_or_else(|| {
            let order = shuffled(self.len as i64, &mut stream(self.seed, number, SHUFFLE));
            Epoch { number, order }
        });
        &self.epoch.insert(epoch).order
    }
}

/// All indices below `len` in random order.
fn shuffled(len: i64, rng: &mut StdRng) -> Vec<i64> {
    let mut order: Vec<i64> = (0..len).collect();
    order.shuffle(rng);
    order
}

/// A separate generator for each seed, number and purpose.
fn stream(seed: u64, number: u64, purpose: &[u8; 16]) -> StdRng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&number.to_le_bytes());
    key[16..].copy_from_slice(purpose);
    StdRng::from_seed(key)
}
