//! Stateless random streams.

use ddil_libtorch::Generator;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::error::Result;

/// Purpose of random numbers; the streams of one step are independent.
///
/// The discriminants are part of a run's identity: a new stream takes the next free one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Stream {
    /// Order and augmentation of the data.
    Data = 0,
    /// Noise of the forward process, and of states at the noisiest timestep.
    Noise = 1,
    /// Which grid index each sample is trained at.
    Timesteps = 2,
    /// Which source each sample comes from.
    Source = 3,
    /// Rollouts of the student.
    Student = 4,
    /// Rollouts of the teacher.
    Teacher = 5,
    /// Changes to states after the loss.
    Refresh = 6,
    /// Samples for inspection and metrics.
    Sample = 7,
    /// Directions of sliced distances.
    Projection = 8,
    /// Draws of networks within a loss, such as dropout.
    Loss = 9,
    /// Dropped conditions.
    Condition = 10,
    /// Guidance weights.
    Guidance = 11,
    /// Initial weights of a network.
    Weights = 12,
    /// Draws of a loss in the student's phase of a step: noise, timesteps.
    StudentLoss = 13,
    /// The same for the critic's phase.
    CriticLoss = 14,
    /// Directions of the distances that adaptive priors follow.
    Priors = 15,
}

/// Number of bits for the stream, below those of the step.
const STREAM_BITS: u32 = 5;

/// Seeds for every step, stream and rank of a run, from one seed.
///
/// A seed depends only on (seed, rank, step, stream), not on earlier draws, so a run resumed at step `k` draws the same
/// numbers as one that was never interrupted.
///
/// # Example
///
/// ```
/// use ddil_core::{RandomStreams, Stream};
/// use tch::{Device, Kind};
///
/// let streams = RandomStreams::new(7, 0);
/// let noise = streams.generator(41, Stream::Noise, Device::Cpu)?.normal([2, 3], Kind::Float)?;
/// let again = streams.generator(41, Stream::Noise, Device::Cpu)?.normal([2, 3], Kind::Float)?;
/// assert_eq!(noise, again);
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomStreams {
    /// The run's seed.
    pub seed: u64,
    /// Rank of this process in the run; 0 if there is only one.
    pub rank: u64,
}

impl RandomStreams {
    /// Streams of the process `rank` of a run with this seed.
    pub fn new(seed: u64, rank: u64) -> Self {
        Self { seed, rank }
    }

    /// The seed of one stream at one step.
    ///
    /// The high half is a [splitmix64](https://doi.org/10.1145/2660193.2660195) chain over all four. libtorch's CPU
    /// generator reads only the low half, and random 32-bit values would collide within a long run. The low half is
    /// therefore a permutation of (step, stream), selected by seed and rank: no two of the first 2²⁷ steps share one.
    pub fn seed_of(&self, step: u64, stream: Stream) -> u64 {
        let key = splitmix64(splitmix64(self.seed) ^ self.rank);
        let counter = (step << STREAM_BITS) | stream as u64;
        let high = splitmix64(key ^ splitmix64(counter)) & !u64::from(u32::MAX);
        high | u64::from(permute(counter as u32, key))
    }

    /// A generator of tensors for one stream at one step.
    ///
    /// # Errors
    ///
    /// [`Error::Libtorch`](crate::Error::Libtorch) if the device does not exist.
    pub fn generator(&self, step: u64, stream: Stream, device: Device) -> Result<Generator> {
        Ok(Generator::new(device, self.seed_of(step, stream))?)
    }

    /// Both kinds of generator for one stream at one step.
    ///
    /// # Errors
    ///
    /// As [`generator`](Self::generator).
    pub fn draws(&self, step: u64, stream: Stream, device: Device) -> Result<Draws> {
        let generator = self.generator(step, stream, device)?;
        Ok(Draws { rng: self.rng(step, stream), generator })
    }

    /// A generator of host numbers for one stream at one step.
    pub fn rng(&self, step: u64, stream: Stream) -> StdRng {
        StdRng::seed_from_u64(self.seed_of(step, stream))
    }
}

/// The random generators of a rollout.
#[derive(Debug)]
#[non_exhaustive]
pub struct Draws {
    /// For choices on the host.
    pub rng: StdRng,
    /// For noise.
    pub generator: Generator,
}

/// One output of Steele, Lea and Flood's generator, from the state `x`; a bijection.
fn splitmix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A bijection of 32 bits selected by `key`: odd multipliers and xor-shifts, each of which is invertible.
fn permute(x: u32, key: u64) -> u32 {
    let mut z = x ^ key as u32;
    z = (z ^ (z >> 16)).wrapping_mul(0x7feb_352d);
    z = (z ^ (z >> 15)).wrapping_mul(0x846c_a68b);
    z = (z ^ (z >> 16)).wrapping_add((key >> 32) as u32);
    z = (z ^ (z >> 16)).wrapping_mul(0x7feb_352d);
    z = (z ^ (z >> 15)).wrapping_mul(0x846c_a68b);
    z ^ (z >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of the published generator from state 0.
    #[test]
    fn splitmix64_is_the_published_one() {
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(splitmix64(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
        assert_eq!(splitmix64(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(2)), 0x06c4_5d18_8009_454f);
    }

    #[test]
    fn permute_gives_each_value_once() {
        for key in [0, 1, splitmix64(3)] {
            let mut seen: Vec<u32> =
                (0..1 << 16).map(|x| permute(x << 7 | x & 0x7f, key)).collect();
            let n = seen.len();
            seen.sort_unstable();
            seen.dedup();
            // x << 7 | low bits is injective for x below 2^16, so all images differ.
            assert_eq!(seen.len(), n);
        }
    }
}
