use ddil_core::{
    Data, Error, Generator, RandomStreams, ShiftAt, ShiftConfig, ShiftReport, ShiftRequest,
    measure_shift, shift_at,
};
use ddil_libtorch::ArgumentError;
use ddil_schedulers::{Ddim, Lcm, Timesteps};
use tch::{Device, Kind, Tensor};

use crate::common::{Gaussian, labels, normal, schedule, trailing};

fn compare(train: &Tensor, inference: &Tensor, config: &ShiftConfig) -> ddil_core::Result<ShiftAt> {
    let null = (normal(90, &train.size()), normal(91, &train.size()));
    let mut generator = Generator::new(Device::Cpu, 0)?;
    shift_at(499, train, inference, (&null.0, &null.1), config, &mut generator)
}

/// Eight comparisons of `inference` with unit noise, and as many of unit noise with itself.
fn report(shape: &[i64], inference: impl Fn(Tensor) -> Tensor) -> ddil_core::Result<ShiftReport> {
    let config = ShiftConfig::default().with(|config| config.projections = 64);
    let mut generator = Generator::new(Device::Cpu, 0)?;
    let timesteps = (0..8).map(|round| {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| normal(4 * round + i, shape));
        shift_at(499, &a, &inference(b), (&c, &d), &config, &mut generator)
    });
    timesteps.collect()
}

/// Forward against forward is the null; a shifted set is far beyond it.
#[test]
fn null_is_its_own_measure() -> ddil_core::Result<()> {
    for shape in [&[300, 6][..], &[300, 2, 4], &[300, 2, 2, 2], &[300, 1, 2, 2, 2]] {
        let same = report(shape, |states| states)?.summary();
        assert!(same.relative_sliced_w2.abs() < 0.5, "{shape:?}: {same:?}");
        assert!(same.excess_energy.abs() < 0.05, "{shape:?}: {same:?}");
        let moved = report(shape, |states| states + 0.3)?.summary();
        assert!(moved.relative_sliced_w2 > 5.0, "{shape:?}: {moved:?}");
        assert!(moved.excess_energy > 0.5, "{shape:?}: {moved:?}");
    }
    Ok(())
}

/// Against plain loops over pairs.
#[test]
fn energy_distance_is_its_formula() -> ddil_core::Result<()> {
    let (n, x, y) = (7, normal(1, &[7, 3]), normal(2, &[7, 3]) * 1.5);
    let mean = |a: &Tensor, b: &Tensor, skip_same: bool| {
        let (mut total, mut pairs) = (0.0, 0.0);
        for i in 0..n {
            for j in (0..n).filter(|j| !(skip_same && *j == i)) {
                total += (a.get(i) - b.get(j)).square().sum(Kind::Double).double_value(&[]).sqrt();
                pairs += 1.0;
            }
        }
        total / pairs
    };
    let expected = 2.0 * mean(&x, &y, false) - mean(&x, &x, true) - mean(&y, &y, true);
    for batch_size in [1, 3, 100] {
        let config = ShiftConfig::default().with(|config| config.batch_size = batch_size);
        let found = compare(&x, &y, &config)?.shift.energy;
        assert!((found - expected).abs() < 1e-5, "{found} for {expected}");
    }
    Ok(())
}

/// In one dimension there is one direction and the distance is that of sorted values; a moved set is moved.
#[test]
fn sliced_distance_is_its_formula() -> ddil_core::Result<()> {
    let x = Tensor::from_slice(&[3_f32, 1.0, 2.0]).view([3, 1]);
    let y = Tensor::from_slice(&[1.0_f32, 5.0, 2.0]).view([3, 1]);
    let at = compare(&x, &y, &ShiftConfig::default())?;
    assert!((at.shift.sliced_w2 - 4.0 / 3.0).abs() < 1e-5, "{}", at.shift.sliced_w2);

    // Shifted by `d`, each direction `u` measures `(d·u)²`, on average `|d|² / dimension`.
    let x = normal(1, &[50, 8]);
    let config = ShiftConfig::default().with(|config| config.projections = 20_000);
    let at = compare(&x, &(&x + 0.5), &config)?;
    assert!((at.shift.sliced_w2 - 0.25).abs() < 0.01, "{}", at.shift.sliced_w2);
    assert!((at.shift.mean_gap - 0.5).abs() < 1e-5);
    assert!(at.shift.std_gap.abs() < 1e-5);
    let wider = compare(&x, &(&x * 2.0), &config)?.shift.std_gap;
    assert!((wider - 1.0).abs() < 0.15, "{wider}");
    Ok(())
}

#[test]
fn pooling_averages_places() -> ddil_core::Result<()> {
    // A chequerboard of +1 and -1 is nothing once averaged.
    let board = Tensor::from_slice(&[1_f32, -1.0, -1.0, 1.0]).view([1, 1, 2, 2]);
    let x = normal(1, &[20, 1, 2, 2]);
    let pooled = ShiftConfig::default().with(|config| config.pool = Some(1));
    let at = compare(&x, &(&x + &board), &pooled)?;
    assert!(at.shift.sliced_w2 < 1e-9);
    let at = compare(&x, &(&x + &board), &ShiftConfig::default())?;
    assert!(at.shift.sliced_w2 > 0.5);
    Ok(())
}

#[test]
fn refuses_incomparable_sets() {
    let x = normal(1, &[4, 3]);
    let config = ShiftConfig::default();
    assert!(matches!(
        compare(&x, &normal(2, &[5, 3]), &config),
        Err(Error::Argument(ArgumentError::Shape { .. }))
    ));
    let one = normal(1, &[1, 3]);
    assert!(matches!(
        compare(&one, &one, &config),
        Err(Error::Argument(ArgumentError::Shape { .. }))
    ));
    let none = config.with(|shift| shift.projections = 0);
    assert!(matches!(compare(&x, &x, &none), Err(Error::Invalid(_))));
}

fn measure(student: &Gaussian, n: i64, config: &ShiftConfig) -> ddil_core::Result<ShiftReport> {
    let data = Data::new(normal(5, &[n, 6]) * 0.5).with_conditioning(labels(n as usize));
    measure_shift(
        &ShiftRequest::new(
            &data,
            student,
            &Ddim::new(schedule()),
            &trailing(20),
            RandomStreams::new(0, 0),
        ),
        config,
    )
}

/// The exact denoiser's own states are those of the forward process; a student that is wrong about the data leaves
/// them, ever more as noise falls.
#[test]
fn a_wrong_student_shifts() -> ddil_core::Result<()> {
    let config = ShiftConfig::default().with(|config| config.batch_size = 300);
    let exact = measure(&Gaussian::new(0.0, 0.0, 0.5), 800, &config)?;
    let wrong = measure(&Gaussian::new(0.4, 0.0, 0.5), 800, &config)?;
    assert_eq!(exact.timesteps.len(), 20);
    assert!(exact.summary().relative_sliced_w2 < 1.5, "{:?}", exact.summary());
    assert!(wrong.summary().relative_sliced_w2 > 3.0, "{:?}", wrong.summary());
    assert!(wrong.summary().excess_energy > 10.0 * exact.summary().excess_energy.abs());
    let energy = |at: usize| wrong.timesteps[at].shift.energy;
    assert!(energy(0) < energy(10) && energy(10) < energy(19));
    assert!((wrong.timesteps[19].shift.mean_gap - 0.4).abs() < 0.08);
    // Repeated, it gives exactly the same; a report can be stored.
    let again = measure(&Gaussian::new(0.4, 0.0, 0.5), 800, &config)?;
    let text = serde_json::to_string(&again).expect("it can be written");
    assert_eq!(serde_json::from_str::<ShiftReport>(&text).expect("it can be read"), wrong);
    Ok(())
}

#[test]
fn measuring_needs_some_data() {
    let measured = measure(&Gaussian::new(0.0, 0.0, 0.5), 3, &ShiftConfig::default());
    assert!(matches!(measured, Err(Error::Argument(ArgumentError::Shape { name: "data.x0", .. }))));
}

/// A student that is sure of `believed`, sampled with fresh noise at four of the fifty timesteps it was trained at.
fn measure_renoised(
    believed: f64,
    step: u64,
    streams: &RandomStreams,
) -> ddil_core::Result<ShiftReport> {
    let n = 800;
    let data = Data::new(Tensor::full([n, 6], 0.5, tch::kind::FLOAT_CPU))
        .with_conditioning(labels(n as usize));
    let config = ShiftConfig::default().with(|config| config.batch_size = 300);
    measure_shift(
        &ShiftRequest::new(
            &data,
            &Gaussian::new(believed, 0.0, 1e-6),
            &Lcm::new(schedule()),
            &Timesteps::lcm(1000, 50, 4)?,
            *streams,
        )
        .at_step(step),
        &config,
    )
}

/// A sampler that noises its estimates afresh enters each timestep in `alpha x0 + sigma noise`: the forward marginal
/// if the estimate is right, and moved by `alpha` times its error if not.
#[test]
fn stochastic_samplers_are_measured_where_they_are_evaluated() -> ddil_core::Result<()> {
    let streams = RandomStreams::new(0, 0);
    let right = measure_renoised(0.5, 0, &streams)?;
    let found: Vec<i64> = right.timesteps.iter().map(|at| at.timestep).collect();
    assert_eq!(found, Timesteps::lcm(1000, 50, 4)?.as_slice());
    assert!(right.summary().relative_sliced_w2.abs() < 0.7, "{:?}", right.summary());
    assert!(right.summary().excess_energy.abs() < 0.05, "{:?}", right.summary());
    let wrong = measure_renoised(1.5, 0, &streams)?;
    for at in wrong.timesteps.iter().skip(1) {
        let alpha = schedule().scale_at(at.timestep)?.alpha;
        assert!((at.shift.mean_gap - alpha).abs() < 0.12, "{at:?} for {alpha}");
        assert!(at.shift.std_gap.abs() < 0.1, "{at:?}");
        // Each direction measures its part of the shift, on average a sixth of `6 alpha²`.
        assert!((at.shift.sliced_w2 - alpha * alpha).abs() < 0.15, "{at:?} for {alpha}");
    }
    // All start in noise, whatever they predict.
    assert!(wrong.timesteps[0].shift.mean_gap < 0.15);
    Ok(())
}

/// Draws depend only on seed and step.
#[test]
fn measuring_has_draws_of_its_own() -> ddil_core::Result<()> {
    let streams = RandomStreams::new(0, 0);
    let first = measure_renoised(0.5, 3, &streams)?;
    tch::manual_seed(1);
    let _ = Tensor::randn([5], tch::kind::FLOAT_CPU);
    assert_eq!(measure_renoised(0.5, 3, &streams)?, first);
    assert_ne!(measure_renoised(0.5, 4, &streams)?, first);
    assert_ne!(measure_renoised(0.5, 3, &RandomStreams::new(1, 0))?, first);
    Ok(())
}
