use ddil_core::{Error, LossMeter, Source, States};
use ddil_libtorch::ArgumentError;
use proptest::prelude::*;
use tch::{Tensor, kind};

use crate::common::trailing;

fn states(sources: &[Source], grid_indices: &[usize]) -> States {
    let x_t = Tensor::zeros([sources.len() as i64, 1], kind::FLOAT_CPU);
    let grid = trailing(20);
    let mut states =
        States::new(x_t, &grid, grid_indices.to_vec(), Source::Forward).expect("on the grid");
    states.sources = sources.to_vec();
    states
}

proptest! {
    /// Against plain loops, over several batches.
    #[test]
    fn means_are_their_formula(
        rows in prop::collection::vec((0_usize..5, 0_usize..4, 0.0..10.0_f32), 1..60),
        batch in 1_usize..20,
    ) {
        let mut meter = LossMeter::new(4);
        for rows in rows.chunks(batch) {
            let sources: Vec<Source> = rows.iter().map(|row| Source::ALL[row.0]).collect();
            let grid_indices: Vec<usize> = rows.iter().map(|row| row.1).collect();
            let losses: Vec<f32> = rows.iter().map(|row| row.2).collect();
            meter.add(&Tensor::from_slice(&losses), &states(&sources, &grid_indices))?;
        }
        let table = meter.take()?;
        let mean = |place: usize, index: usize| {
            let of: Vec<f64> = rows
                .iter()
                .filter(|row| (row.0, row.1) == (place, index))
                .map(|row| f64::from(row.2))
                .collect();
            (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64)
        };
        let close = |found: Option<f64>, expected: Option<f64>| match (found, expected) {
            (Some(found), Some(expected)) => (found - expected).abs() < 1e-9,
            (found, expected) => found == expected,
        };
        for index in 0..4 {
            for (place, source) in Source::ALL.into_iter().enumerate() {
                prop_assert!(close(table.mean(&[source], index), mean(place, index)));
                let gap = mean(place, index).zip(mean(0, index)).map(|(own, data)| own - data);
                prop_assert!(close(table.gap(source, index), gap));
            }
            let all = rows.iter().filter(|row| row.1 == index).count() as u64;
            prop_assert_eq!(table.samples(&Source::ALL, index), all);
        }
        prop_assert_eq!(table.mean(&Source::ALL, 4), None);
        // Started over.
        prop_assert_eq!(meter.take()?.samples(&Source::ALL, rows[0].1), 0);
    }
}

#[test]
fn refuses_losses_that_do_not_fit() {
    let mut meter = LossMeter::new(2);
    let batch = states(&[Source::Forward, Source::Student], &[0, 1]);
    for shape in [&[3_i64][..], &[2, 1], &[]] {
        let added = meter.add(&Tensor::ones(shape, kind::FLOAT_CPU), &batch);
        assert!(
            matches!(added, Err(Error::Argument(ArgumentError::Shape { name: "per_sample", .. }))),
            "{shape:?}"
        );
    }
    let beyond = states(&[Source::Forward, Source::Student], &[0, 2]);
    let added = meter.add(&Tensor::ones([2], kind::FLOAT_CPU), &beyond);
    assert!(matches!(added, Err(Error::Invalid(invalid)) if invalid.field == "grid_indices"));
}

/// Losses have a graph; the stored values have none.
#[test]
fn keeps_no_graph() -> ddil_core::Result<()> {
    let weight = Tensor::ones([2], kind::FLOAT_CPU).set_requires_grad(true);
    let mut meter = LossMeter::new(2);
    meter.add(&(&weight * 2.0), &states(&[Source::Forward; 2], &[1, 1]))?;
    let losses = meter.take()?;
    assert_eq!(losses.mean(&[Source::Forward], 1), Some(2.0));
    assert!(!weight.grad().defined());
    Ok(())
}
