use ddil_files::Invalid;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::Result;

/// Keeps the shuffles apart from everything else that is drawn from the run's seed.
const SHUFFLE: &[u8; 16] = b"dataset shuffle\0";
/// Likewise for mirrored images.
const FLIP: &[u8; 16] = b"dataset flip\0\0\0\0";

/// Which samples each step trains on: the data set over and over, shuffled anew each time.
///
/// Batches follow one another through the epochs without a gap; one that begins at the end of an epoch goes on in the
/// next. What [`at`](Self::at) answers depends on the seed, the step and the sizes alone, never on what was asked
/// before. The order of an epoch is kept until another epoch is asked for, so steps in order cost next to nothing.
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
    /// Batches of `batch_size` indices below `len`, in an order drawn from `seed`.
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

    /// The share of process `rank` of `num_ranks`: each sees other samples of the same shuffle.
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

    /// The indices of a step's batch, counted from step 0.
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

    /// For each sample of a step's batch, whether to mirror it: heads or tails, drawn from seed, step and rank.
    pub fn flips_at(&self, step: u64) -> Vec<bool> {
        let mut rng = stream(self.seed, step, FLIP);
        let skipped = self.rank * self.batch_size;
        let mut draws = (0..skipped + self.batch_size).map(|_| rng.random());
        draws.by_ref().skip(skipped as usize).collect()
    }

    /// The epoch that a step's batch begins in, counted from 0.
    pub fn epoch_of(&self, step: u64) -> u64 {
        (self.first_position(step) / u128::from(self.len)) as u64
    }

    /// Number of steps after which every sample was seen at least once: the length of an epoch, rounded up.
    pub fn steps_per_epoch(&self) -> u64 {
        self.len.div_ceil(self.batch_size * self.num_ranks)
    }

    /// Place of the step's first sample in the endless row of epochs.
    fn first_position(&self, step: u64) -> u128 {
        let batches_before = u128::from(step) * u128::from(self.num_ranks) + u128::from(self.rank);
        batches_before * u128::from(self.batch_size)
    }

    /// The order of an epoch, shuffled unless it was the last one asked for.
    fn order(&mut self, number: u64) -> &[i64] {
        let known = self.epoch.take().filter(|epoch| epoch.number == number);
        let epoch = known.unwrap_or_else(|| {
            let mut order: Vec<i64> = (0..self.len as i64).collect();
            order.shuffle(&mut stream(self.seed, number, SHUFFLE));
            Epoch { number, order }
        });
        &self.epoch.insert(epoch).order
    }
}

/// A generator of its own for each seed, number and purpose.
fn stream(seed: u64, number: u64, purpose: &[u8; 16]) -> StdRng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&number.to_le_bytes());
    key[16..].copy_from_slice(purpose);
    StdRng::from_seed(key)
}
