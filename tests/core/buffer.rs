use std::collections::HashMap;

use ddil_core::{
    AggregationBuffer, BufferConfig, Conditioning, Error, Source, States, StorageKind,
};
use ddil_libtorch::ArgumentError;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Kind, Tensor};

use crate::common::{SHAPES, trailing};

/// States that contain their own number, as value and as label.
pub(crate) fn states(first: i64, step: u64, grid_indices: &[usize], shape: &[i64]) -> States {
    let n = grid_indices.len() as i64;
    let numbers = Tensor::arange_start(first, first + n, (Kind::Int64, tch::Device::Cpu));
    let mut whole = vec![n];
    whole.extend(shape);
    let mut column = vec![1; whole.len()];
    column[0] = n;
    let x_t = numbers.to_kind(Kind::Float).view(column.as_slice()).expand(&whole, false);
    let on_grid = grid_indices.iter().map(|&i| i % 4).collect();
    let mut states = States::new(x_t.contiguous(), &trailing(4), on_grid, Source::Student)
        .expect("on the grid")
        .with_conditioning(Conditioning::class_labels(numbers))
        .made_at(step);
    // Tests of bad input pass an index beyond the grid.
    states.grid_indices = grid_indices.to_vec();
    states
}

/// The numbers of states, after a check that value and label agree.
pub(crate) fn numbers(states: &States) -> Vec<i64> {
    let labels = states.conditioning.get(Conditioning::CLASS_LABELS).expect("labels were stored");
    let numbers: Vec<i64> = Vec::try_from(labels).expect("they are Int64");
    let n = states.len() as i64;
    let values = states.x_t.view([n, -1]);
    // State and label are of one item.
    for (row, &number) in numbers.iter().enumerate() {
        let gap = (values.get(row as i64).to_kind(Kind::Double) - number as f64).abs().max();
        assert_eq!(gap.double_value(&[]), 0.0);
    }
    numbers
}

fn buffer(config: BufferConfig) -> AggregationBuffer {
    AggregationBuffer::new(config, &trailing(4)).expect("it is valid")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Against a plain list: only inserted states come back, young enough and among the newest of their ring.
    #[test]
    fn returns_the_inserted_states(
        capacity in 3_usize..40,
        max_age in 0_u64..6,
        batches in prop::collection::vec(prop::collection::vec(1_usize..4, 1..12), 1..12),
        seed: u64,
    ) {
        let config =
            BufferConfig::default().with(|config| { config.capacity = capacity; config.max_age = max_age; config.storage = StorageKind::F32; });
        let mut buffer = buffer(config);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut kept: HashMap<usize, Vec<(i64, u64)>> = HashMap::new();
        let mut next = 0;
        for (step, indices) in batches.iter().enumerate() {
            let step = step as u64;
            buffer.insert(&states(next, step, indices, &[2])).expect("it fits");
            for &index in indices {
                let ring = kept.entry(index).or_default();
                ring.push((next, step));
                let over = ring.len().saturating_sub(capacity / 3);
                ring.drain(..over);
                next += 1;
            }
            prop_assert!(buffer.len() <= capacity);
            for (&index, ring) in &kept {
                let young: HashMap<i64, u64> =
                    ring.iter().copied().filter(|(_, created_at_step)| step - created_at_step <= max_age).collect();
                prop_assert_eq!(buffer.available(index, step), young.len());
                if young.is_empty() {
                    continue;
                }
                let drawn = buffer.sample(&[index; 8], step, &mut rng).expect("there are some");
                for (number, created_at_step) in numbers(&drawn).iter().zip(&drawn.created_at_step) {
                    prop_assert_eq!(young.get(number), Some(created_at_step));
                }
            }
        }
        // Beyond the age limit nothing is left.
        let late = batches.len() as u64 + max_age + 1;
        prop_assert!((1..4).all(|index| buffer.available(index, late) == 0));
        prop_assert!(buffer.sample(&[1], late, &mut rng).is_err());
    }

    #[test]
    fn stays_within_its_bytes(byte_budget in 100_u64..4000, capacity in 3_usize..60) {
        let mut buffer = buffer(BufferConfig::default().with(|config| { config.capacity = capacity; config.byte_budget = byte_budget; }));
        // 5 values in half precision and a label.
        let per_state = 5 * 2 + 8;
        let expected = (byte_budget / per_state).min(capacity as u64) / 3 * 3;
        let inserted = buffer.insert(&states(0, 0, &[1, 2, 3, 3, 2], &[5]));
        prop_assert_eq!(inserted.is_ok(), expected > 0);
        let statistics = buffer.statistics(0);
        prop_assert!(statistics.bytes <= byte_budget);
        prop_assert_eq!(statistics.capacity as u64, expected);
        prop_assert_eq!(statistics.bytes, expected * per_state);
    }
}

#[test]
fn draws_evenly() -> ddil_core::Result<()> {
    let mut buffer = buffer(BufferConfig::default());
    buffer.insert(&states(0, 0, &[2; 10], &[1]))?;
    let drawn = buffer.sample(&vec![2; 5000], 0, &mut StdRng::seed_from_u64(0))?;
    let mut counts = [0_i32; 10];
    for number in numbers(&drawn) {
        counts[number as usize] += 1;
    }
    // Binomial with a standard deviation of 21.
    assert!(counts.iter().all(|count| (count - 500).abs() < 85), "{counts:?}");
    Ok(())
}

#[test]
fn takes_any_rank_and_gives_provenance() -> ddil_core::Result<()> {
    for shape in SHAPES {
        let mut buffer = buffer(BufferConfig::default());
        let mut given = states(0, 7, &[1, 3], &shape[1..]);
        given.sources[1] = Source::Mixed;
        buffer.insert(&given)?;
        let drawn = buffer.sample(&[3, 1], 9, &mut StdRng::seed_from_u64(0))?;
        assert_eq!(drawn.x_t.size()[1..], shape[1..]);
        assert_eq!(drawn.sources, [Source::Mixed, Source::Student]);
        assert_eq!(drawn.created_at_step, [7, 7]);
        assert_eq!(drawn.timesteps, Tensor::from_slice(&[249_i64, 749]));
        let statistics = buffer.statistics(9);
        assert_eq!(statistics.per_index, [0, 1, 0, 1]);
        assert_eq!((statistics.oldest_age, statistics.len), (2, 2));
    }
    Ok(())
}

#[test]
fn the_storage_kind_is_respected() -> ddil_core::Result<()> {
    for (storage, kind) in [(StorageKind::F16, Kind::Half), (StorageKind::F32, Kind::Float)] {
        let mut buffer = buffer(BufferConfig::default().with(|config| config.storage = storage));
        buffer.insert(&states(0, 0, &[1], &[3]))?;
        assert_eq!(buffer.sample(&[1], 0, &mut StdRng::seed_from_u64(0))?.x_t.kind(), kind);
    }
    Ok(())
}

/// The restored buffer and the original give the same batches, bit for bit.
#[test]
fn a_restored_one_continues_exactly() -> ddil_core::Result<()> {
    let config = BufferConfig::default().with(|config| {
        config.capacity = 12;
        config.max_age = 3;
    });
    let mut original = buffer(config.clone());
    for step in 0..5 {
        original.insert(&states(10 * step, step as u64, &[1, 2, 3, 1, 3], &[2, 2]))?;
    }
    let saved = original.save()?;
    let text = serde_json::to_string(&saved.metadata).expect("it can be written");
    let saved = ddil_core::SavedState::new(
        saved.tensors,
        serde_json::from_str(&text).expect("it can be read"),
    )
    .with_files(saved.files);
    let kept: Vec<Tensor> = saved.tensors.iter().map(|(_, tensor)| tensor.copy()).collect();
    let mut restored = buffer(config.clone());
    restored.restore(&saved)?;
    for step in 5..9 {
        let mut batches = Vec::new();
        for buffer in [&mut original, &mut restored] {
            buffer.insert(&states(10 * step, step as u64, &[2, 1, 3], &[2, 2]))?;
            let mut rng = StdRng::seed_from_u64(step as u64);
            batches.push(buffer.sample(&[1, 2, 3, 3, 2, 1], step as u64, &mut rng)?);
            batches.last_mut().expect("it was pushed").sources.push(Source::Noise);
        }
        let [a, b] = [&batches[0], &batches[1]];
        assert_eq!(a.x_t, b.x_t);
        assert_eq!(a.created_at_step, b.created_at_step);
        let [a_labels, b_labels] = [a, b].map(|s| s.conditioning.get(Conditioning::CLASS_LABELS));
        assert_eq!(a_labels, b_labels);
    }
    assert_eq!(original.statistics(9), restored.statistics(9));
    // The saved state did not change with either of the two.
    assert!(saved.tensors.iter().zip(&kept).all(|((_, tensor), kept)| tensor == kept));
    let mut again = buffer(config);
    again.restore(&saved)?;
    assert_eq!(again.statistics(4).len, 12);
    Ok(())
}

#[test]
fn refuses_mismatches() -> ddil_core::Result<()> {
    let small = BufferConfig::default().with(|config| config.capacity = 2);
    assert!(matches!(
        AggregationBuffer::new(small, &trailing(4)),
        Err(Error::Invalid(invalid)) if invalid.field == "buffer.capacity"
    ));
    let mut buffer = buffer(BufferConfig::default().with(|config| config.capacity = 6));
    buffer.insert(&states(0, 5, &[1, 2], &[3]))?;
    for index in [0, 4] {
        let refused = buffer.insert(&states(0, 5, &[index], &[3]));
        assert!(matches!(refused, Err(Error::Invalid(invalid)) if invalid.field == "grid_indices"));
    }
    let late = buffer.insert(&states(0, 4, &[1], &[3]));
    assert!(
        matches!(late, Err(Error::OutOfOrder { created_at_step: 4, latest: 5, .. })),
        "{late:?}"
    );
    let other = buffer.insert(&states(0, 5, &[1], &[4]));
    assert!(matches!(other, Err(Error::Argument(ArgumentError::Shape { .. }))));
    let mut untold = states(0, 5, &[1], &[3]);
    untold.conditioning = Conditioning::none();
    assert!(matches!(buffer.insert(&untold), Err(Error::Conditioning { .. })));
    // No refused state was inserted.
    assert_eq!(buffer.statistics(5).per_index, [0, 1, 1, 0]);

    let saved = buffer.save()?;
    let other_grid = AggregationBuffer::new(BufferConfig::default(), &trailing(8))?.restore(&saved);
    assert!(matches!(other_grid, Err(Error::Restore { .. })));
    let mut smaller = AggregationBuffer::new(
        BufferConfig::default().with(|config| config.capacity = 3),
        &trailing(4),
    )?;
    assert!(matches!(smaller.restore(&saved), Err(Error::Restore { .. })));
    let other_kind = BufferConfig::default().with(|config| config.storage = StorageKind::F32);
    let other_kind = AggregationBuffer::new(other_kind, &trailing(4))?.restore(&saved);
    assert!(matches!(other_kind, Err(Error::Restore { .. })));
    Ok(())
}

#[test]
fn flush_starts_over() -> ddil_core::Result<()> {
    let mut buffer = buffer(BufferConfig::default());
    buffer.insert(&states(0, 5, &[1, 2], &[3]))?;
    buffer.flush();
    assert!(buffer.is_empty());
    assert_eq!(buffer.statistics(5).bytes, 0);
    // Steps and shapes can start over, too.
    buffer.insert(&states(0, 0, &[1, 2], &[4]))
}
