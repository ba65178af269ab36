use std::collections::HashSet;

use ddil_core::{RandomStreams, Stream};
use tch::{Device, Kind};

const STREAMS: [Stream; 15] = [
    Stream::Data,
    Stream::Noise,
    Stream::Timesteps,
    Stream::Source,
    Stream::Student,
    Stream::Teacher,
    Stream::Refresh,
    Stream::Sample,
    Stream::Projection,
    Stream::Loss,
    Stream::Condition,
    Stream::Guidance,
    Stream::Weights,
    Stream::StudentLoss,
    Stream::CriticLoss,
];

/// Seeds are part of a run's identity: a run that is resumed by a later version must find its own.
#[test]
fn seeds_are_stable() {
    let streams = RandomStreams::new(0, 0);
    assert_eq!(streams.seed_of(0, Stream::Data), GOLDEN[0]);
    assert_eq!(streams.seed_of(1, Stream::Noise), GOLDEN[1]);
    assert_eq!(RandomStreams::new(7, 3).seed_of(123_456, Stream::Teacher), GOLDEN[2]);
}

/// Computed apart from this code, in Python.
const GOLDEN: [u64; 3] = [0xa7f7_2697_1fe3_85e6, 0xb729_eb90_e0f1_45f4, 0x597c_cbe6_63f4_9bcb];

#[test]
fn no_two_streams_share_a_seed() {
    let mut seen = HashSet::new();
    for (seed, rank) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (u64::MAX, 0)] {
        let streams = RandomStreams::new(seed, rank);
        for step in 0..2000 {
            for stream in STREAMS {
                assert!(seen.insert(streams.seed_of(step, stream)), "{seed} {rank} {step}");
            }
        }
    }
}

/// libtorch's CPU generator reads only the low half of a seed.
#[test]
fn low_halves_differ_within_a_run() {
    let streams = RandomStreams::new(5, 0);
    let mut seen = HashSet::new();
    for step in (0..4000).chain(1 << 20..(1 << 20) + 4000) {
        for stream in STREAMS {
            assert!(seen.insert(streams.seed_of(step, stream) as u32));
        }
    }
}

/// Half of the bits differ, on the whole, between neighbours in any of the four.
#[test]
fn neighbours_have_nothing_in_common() {
    let base = RandomStreams::new(9, 2);
    let flipped = |other: u64, step: u64| {
        let (high, low) = (0xffff_ffff_0000_0000_u64, 0xffff_ffff_u64);
        let differ = base.seed_of(step, Stream::Noise) ^ other;
        [(differ & high).count_ones(), (differ & low).count_ones()]
    };
    let mut total = [[0; 2]; 4];
    for step in 0..1000 {
        let others = [
            base.seed_of(step + 1, Stream::Noise),
            base.seed_of(step, Stream::Timesteps),
            RandomStreams::new(10, 2).seed_of(step, Stream::Noise),
            RandomStreams::new(9, 3).seed_of(step, Stream::Noise),
        ];
        for (total, other) in total.iter_mut().zip(others) {
            for (total, flipped) in total.iter_mut().zip(flipped(other, step)) {
                *total += flipped;
            }
        }
    }
    for total in total.iter().flatten() {
        // 32 000 bits: half of them, within 6 standard deviations.
        assert!(total.abs_diff(16_000) < 540, "{total}");
    }
}

#[test]
fn a_step_draws_the_same_whatever_was_drawn_before() -> ddil_core::Result<()> {
    let streams = RandomStreams::new(1, 0);
    let draw = |step, stream| -> ddil_core::Result<tch::Tensor> {
        Ok(streams.generator(step, stream, Device::Cpu)?.normal([4], Kind::Float)?)
    };
    let first = draw(5, Stream::Noise)?;
    let _ = (draw(4, Stream::Noise)?, draw(5, Stream::Student)?);
    assert_eq!(first, draw(5, Stream::Noise)?);
    assert_ne!(first, draw(6, Stream::Noise)?);
    assert_ne!(first, draw(5, Stream::Student)?);
    Ok(())
}
