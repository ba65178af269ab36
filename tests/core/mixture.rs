//! `GaussianMixture` against integrals, closed forms and its own density.

use ddil_core::{Conditioning, Denoiser, Error, GaussianMixture, Guided};
use ddil_libtorch::{ArgumentError, Generator};
use ddil_schedulers::NoiseScheduleConfig;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, kind};

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// Largest difference, relative to the largest expected value.
fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    max_difference(found, expected) / expected.abs().max().double_value(&[])
}

fn scalar(value: f64) -> Tensor {
    Tensor::from_slice(&[value])
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn one_gaussian_is_the_textbook_formula() -> TestResult {
    let (mean, std, alpha, sigma) = (Tensor::from_slice(&[0.3, -1.0, 2.0]), 0.7_f64, 0.6, 0.8);
    let mixture = GaussianMixture::new(&mean.unsqueeze(0), &[std], &[3.0])?;
    let x_t = Tensor::randn([16, 3], kind::DOUBLE_CPU);
    let found = mixture.posterior(&x_t, &scalar(alpha), &scalar(sigma), None)?;
    let gain = alpha * std * std / (alpha * alpha * std * std + sigma * sigma);
    let x0 = &mean + gain * (&x_t - alpha * &mean);
    assert!(max_difference(&found.x0, &x0) < 1e-12);
    assert!(max_difference(&found.epsilon, &((&x_t - alpha * x0) / sigma)) < 1e-12);
    Ok(())
}

/// Bayes by brute force: sums over a fine grid of clean values in one dimension.
#[test]
fn three_components_agree_with_numerical_integration() -> TestResult {
    let (means, stds, weights) = ([-1.0, 0.2, 1.5], [0.3, 0.1, 0.5], [1.0, 0.5, 2.5]);
    let mixture = GaussianMixture::new(&Tensor::from_slice(&means).unsqueeze(1), &stds, &weights)?;
    let grid: Vec<f64> = (-40_000..=40_000).map(|i| f64::from(i) * 2e-4).collect();
    let normal = |x: f64, std: f64| (-0.5 * (x / std).powi(2)).exp() / std;
    let density = |x0: f64| -> f64 {
        (0..3).map(|k| weights[k] / 4.0 * normal(x0 - means[k], stds[k])).sum()
    };
    let prior: Vec<f64> = grid.iter().map(|&x0| density(x0)).collect();
    let root_two_pi = (2.0 * std::f64::consts::PI).sqrt();
    for (alpha, sigma) in [(0.99_f64, 0.14), (0.7, 0.71), (0.2, 0.98), (1.0, 2.0)] {
        for x_t in [-1.3, 0.0, 0.4, 1.1] {
            let joint = grid.iter().zip(&prior).map(|(x0, p)| p * normal(x_t - alpha * x0, sigma));
            let joint: Vec<f64> = joint.collect();
            let mass: f64 = joint.iter().sum();
            let x0 = grid.iter().zip(&joint).map(|(x0, p)| x0 * p).sum::<f64>() / mass;
            let epsilon = (x_t - alpha * x0) / sigma;
            let log_density = (mass * 2e-4 / root_two_pi.powi(2)).ln();

            let sample = Tensor::from_slice(&[x_t]).unsqueeze(0);
            let (alpha, sigma) = (scalar(alpha), scalar(sigma));
            let found = mixture.posterior(&sample, &alpha, &sigma, None)?;
            assert!((found.x0.double_value(&[0, 0]) - x0).abs() < 1e-7);
            assert!((found.epsilon.double_value(&[0, 0]) - epsilon).abs() < 1e-7);
            let found = mixture.log_density(&sample, &alpha, &sigma, None)?;
            assert!((found.double_value(&[0]) - log_density).abs() < 1e-7);
        }
    }
    Ok(())
}

/// The score is the gradient of the log density, by finite differences and by autograd.
#[test]
fn noise_is_the_slope_of_the_density() -> TestResult {
    let mixture = GaussianMixture::ring(8)?;
    let labels = Tensor::from_slice(&[0_i64, 1, 2, 3, 4, 4]);
    let (alpha, sigma) = (scalar(0.8), scalar(0.35));
    let x_t = Tensor::randn([6, 2], kind::DOUBLE_CPU);
    let log_density =
        |x: &Tensor| mixture.log_density(x, &alpha, &sigma, Some(&labels)).expect("it fits");
    let score = -mixture.posterior(&x_t, &alpha, &sigma, Some(&labels))?.epsilon / &sigma;
    let step = 1e-5;
    for axis in 0..2 {
        let offset = Tensor::zeros([2], kind::DOUBLE_CPU);
        let _ = offset.get(axis).fill_(step);
        let slope =
            (log_density(&(&x_t + &offset)) - log_density(&(&x_t - &offset))) / (2.0 * step);
        assert!(max_difference(&slope, &score.select(1, axis)) < 1e-6);
    }
    let leaf = x_t.copy().set_requires_grad(true);
    log_density(&leaf).sum(Kind::Double).backward();
    assert!(max_difference(&leaf.grad(), &score) < 1e-10);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Clean data and noise reproduce the input, at any input.
    #[test]
    fn parts_make_up_the_whole(
        angle in 0.0_f64..1.57, x in -50.0_f64..50.0, y in -50.0_f64..50.0, label in 0_i64..=4,
    ) {
        let mixture = GaussianMixture::ring(8)?;
        let (alpha, sigma) = (scalar(angle.cos()), scalar(angle.sin()));
        let x_t = Tensor::from_slice(&[x, y]).unsqueeze(0);
        let label = Tensor::from_slice(&[label]);
        let found = mixture.posterior(&x_t, &alpha, &sigma, Some(&label))?;
        let whole = alpha * &found.x0 + sigma * &found.epsilon;
        prop_assert!(max_difference(&whole, &x_t) < 1e-9);
        prop_assert!(found.x0.isfinite().all().int64_value(&[]) == 1);
    }
}

#[test]
fn a_class_is_the_mixture_of_its_components() -> TestResult {
    let means = Tensor::from_slice(&[-1.0, 0.0, 0.5, 2.0]).view([4, 1]);
    let (stds, weights) = ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]);
    let mixture = GaussianMixture::new(&means, &stds, &weights)?.with_classes(&[0, 1, 0, 1])?;
    assert_eq!((mixture.num_classes(), mixture.num_components(), mixture.dim()), (2, 4, 1));
    let x_t = Tensor::randn([5, 1], kind::DOUBLE_CPU);
    let (alpha, sigma) = (scalar(0.7), scalar(0.6));
    for class in 0..2_usize {
        let rows = Tensor::from_slice(&[class as i64, class as i64 + 2]);
        let (s, w) = ([stds[class], stds[class + 2]], [weights[class], weights[class + 2]]);
        let part = GaussianMixture::new(&means.index_select(0, &rows), &s, &w)?;
        let labels = Tensor::full([5], class as i64, kind::INT64_CPU);
        let found = mixture.posterior(&x_t, &alpha, &sigma, Some(&labels))?;
        let expected = part.posterior(&x_t, &alpha, &sigma, None)?;
        assert!(max_difference(&found.x0, &expected.x0) < 1e-12);
        let found = mixture.log_density(&x_t, &alpha, &sigma, Some(&labels))?;
        assert!(max_difference(&found, &part.log_density(&x_t, &alpha, &sigma, None)?) < 1e-12);
    }
    let null = Tensor::full([5], 2, kind::INT64_CPU);
    let found = mixture.posterior(&x_t, &alpha, &sigma, Some(&null))?;
    assert_eq!(found.x0, mixture.posterior(&x_t, &alpha, &sigma, None)?.x0);
    Ok(())
}

#[test]
fn the_two_ends_are_the_data_and_its_mean() -> TestResult {
    let mixture = GaussianMixture::grid(5)?;
    let x = Tensor::randn([4, 2], kind::FLOAT_CPU);
    let clean = mixture.posterior(&x, &scalar(1.0), &scalar(0.0), None)?;
    assert!(max_difference(&clean.x0, &x) < 1e-6);
    assert_eq!(clean.epsilon, x.zeros_like());
    let noise = mixture.posterior(&x, &scalar(0.0), &scalar(1.0), None)?;
    assert!(noise.x0.abs().max().double_value(&[]) < 1e-7);
    assert!(max_difference(&noise.epsilon, &x) < 1e-6);
    Ok(())
}

#[test]
fn shapes_kinds_and_scales_follow_the_input() -> TestResult {
    let mixture = GaussianMixture::ring(8)?;
    let (alpha, sigma) = (Tensor::from_slice(&[0.9_f32, 0.5]), Tensor::from_slice(&[0.4_f32, 0.8]));
    let flat = Tensor::randn([2, 2], kind::FLOAT_CPU);
    let vectors = mixture.posterior(&flat, &alpha, &sigma, None)?;
    let column = [2, 1, 1, 1];
    let images = mixture.posterior(
        &flat.view([2, 2, 1, 1]),
        &alpha.view(column),
        &sigma.view(column),
        None,
    )?;
    assert_eq!(images.x0.size(), [2, 2, 1, 1]);
    assert_eq!(images.x0.kind(), Kind::Float);
    assert_eq!(images.x0.view([2, 2]), vectors.x0);
    // Each sample alone has the same output.
    let second = mixture.posterior(&flat.narrow(0, 1, 1), &alpha.get(1), &sigma.get(1), None)?;
    assert!(max_difference(&second.x0, &vectors.x0.narrow(0, 1, 1)) < 1e-7);
    Ok(())
}

#[test]
fn samples_have_the_moments_of_their_class() -> TestResult {
    let mixture = GaussianMixture::new(
        &Tensor::from_slice(&[-2.0, 1.0, 4.0]).view([3, 1]),
        &[0.5, 0.1, 0.2],
        &[1.0, 3.0, 4.0],
    )?
    .with_classes(&[0, 1, 1])?;
    let mut generator = Generator::new(Device::Cpu, 0)?;
    let n = 20_000;
    let moments = |samples: &Tensor| {
        (samples.mean(Kind::Double).double_value(&[]), samples.std(true).double_value(&[]))
    };
    let all = mixture.sample(n, None, &mut generator)?;
    assert_eq!((all.size(), all.kind()), (vec![n, 1], Kind::Float));
    // Weights 1/8, 3/8, 4/8.
    let mean = -2.0 / 8.0 + 3.0 / 8.0 + 16.0 / 8.0;
    assert!((moments(&all).0 - mean).abs() < 0.06, "{:?}", moments(&all));
    let first = mixture.sample(n, Some(&Tensor::zeros([n], kind::INT64_CPU)), &mut generator)?;
    let (mean, std) = moments(&first);
    assert!((mean + 2.0).abs() < 0.015 && (std - 0.5).abs() < 0.015, "{mean} {std}");
    let second = mixture.sample(n, Some(&Tensor::ones([n], kind::INT64_CPU)), &mut generator)?;
    let share = second.gt(2.5).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    assert!((share - 4.0 / 7.0).abs() < 0.015, "{share}");

    let again = mixture.sample(n, None, &mut Generator::new(Device::Cpu, 0)?)?;
    assert_eq!(all, again);
    Ok(())
}

#[test]
fn rings_and_grids_have_their_modes_in_place() -> TestResult {
    let ring = GaussianMixture::ring(8)?;
    assert_eq!((ring.num_components(), ring.num_classes()), (8, 4));
    let half = 0.8 / 2.0_f64.sqrt();
    let modes = Tensor::from_slice(&[0.8, 0.0, half, half, -0.8, 0.0]).view([3, 2]);
    assert!(ring.distance_to_nearest(&modes)?.max().double_value(&[]) < 1e-12);
    let centre = ring.distance_to_nearest(&Tensor::zeros([1, 2], kind::FLOAT_CPU))?;
    assert!((centre.double_value(&[0]) - 0.8).abs() < 1e-12);

    let grid = GaussianMixture::grid(5)?;
    assert_eq!((grid.num_components(), grid.num_classes()), (25, 5));
    let corners = Tensor::from_slice(&[-0.8, -0.8, 0.8, 0.8, 0.4, 0.0]).view([3, 2]);
    assert!(grid.distance_to_nearest(&corners)?.max().double_value(&[]) < 1e-12);
    assert_eq!(GaussianMixture::ring(1)?.num_classes(), 1);
    Ok(())
}

#[test]
fn impossible_mixtures_and_inputs_are_refused() -> TestResult {
    let means = Tensor::zeros([2, 2], kind::FLOAT_CPU);
    let shape = |r| matches!(r, Err(Error::Argument(ArgumentError::Shape { .. })));
    let value = |r| matches!(r, Err(Error::Argument(ArgumentError::Value { .. })));
    assert!(shape(GaussianMixture::new(&Tensor::zeros([2], kind::FLOAT_CPU), &[1.0], &[1.0])));
    assert!(shape(GaussianMixture::new(&means, &[1.0], &[1.0, 1.0])));
    assert!(shape(GaussianMixture::ring(0)) && shape(GaussianMixture::grid(0)));
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(value(GaussianMixture::new(&means, &[1.0, wrong], &[1.0, 1.0])));
        assert!(value(GaussianMixture::new(&means, &[1.0, 1.0], &[wrong, 1.0])));
    }
    for labels in [&[0][..], &[0, 2], &[-1, 0], &[1, 1]] {
        let mixture = GaussianMixture::new(&means, &[1.0; 2], &[1.0; 2])?;
        assert!(value(mixture.with_classes(labels)), "{labels:?}");
    }

    let ring = GaussianMixture::ring(4)?;
    let (x, one) = (Tensor::zeros([3, 2], kind::FLOAT_CPU), scalar(1.0));
    let evaluate = |x: &Tensor, alpha: &Tensor, labels: Option<&Tensor>| {
        ring.posterior(x, alpha, &one, labels).expect_err("it does not fit").to_string()
    };
    assert!(evaluate(&x.view([2, 3]), &one, None).contains("`x_t` has shape [2, 3]"));
    assert!(evaluate(&x.to_kind(Kind::Int64), &one, None).contains("`x_t` has kind"));
    assert!(evaluate(&x, &Tensor::ones([2], kind::FLOAT_CPU), None).contains("`alpha`"));
    assert!(
        evaluate(&x, &one, Some(&Tensor::from_slice(&[0_i64, 1, 3])))
            .contains("contains 3; expected 0 to 2")
    );
    let plain = GaussianMixture::new(&means, &[1.0; 2], &[1.0; 2])?;
    let labelled = plain.posterior(&x, &one, &one, Some(&Tensor::zeros([3], kind::INT64_CPU)));
    assert!(matches!(labelled, Err(Error::Conditioning { field, .. }) if field == "class_labels"));
    Ok(())
}

#[test]
fn the_denoiser_uses_the_scales_of_its_schedule() -> TestResult {
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = GaussianMixture::ring(8)?.on(schedule.clone());
    let x_t = Tensor::randn([3, 2, 1, 1], kind::FLOAT_CPU);
    let timesteps = Tensor::from_slice(&[999_i64, 400, 0]);
    let labels = Tensor::from_slice(&[0_i64, 3, 4]);
    let conditioning = Conditioning::class_labels(labels.shallow_clone());
    let found = denoiser.predict(&x_t, &timesteps, &conditioning)?;
    let scales = schedule.scales_at(&timesteps, &x_t.to_kind(Kind::Double))?;
    let expected =
        denoiser.mixture().posterior(&x_t, &scales.alpha, &scales.sigma, Some(&labels))?;
    assert_eq!(found.x0, expected.x0);
    assert_eq!(found.x0.size(), [3, 2, 1, 1]);
    assert_eq!(denoiser.schedule().num_train_timesteps(), 1000);

    let weighted = conditioning.with_guidance_weight(Tensor::ones([3], kind::FLOAT_CPU));
    let error = denoiser.predict(&x_t, &timesteps, &weighted).expect_err("it takes no weight");
    assert!(error.to_string().contains("guidance_weight"), "{error}");
    Ok(())
}

#[test]
fn guidance_with_the_null_class_extrapolates() -> TestResult {
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = GaussianMixture::ring(8)?.on(schedule);
    let x_t = Tensor::randn([4, 2], kind::DOUBLE_CPU);
    let t = Tensor::full([4], 600, kind::INT64_CPU);
    let conditioning = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 1, 2, 3]));
    let null = Conditioning::class_labels(Tensor::from_slice(&[4_i64]));
    let cond = denoiser.predict(&x_t, &t, &conditioning)?.x0;
    let uncond = denoiser.predict(&x_t, &t, &Conditioning::none())?.x0;
    let guided = Guided::new(&denoiser, 3.0, null)?.predict(&x_t, &t, &conditioning)?.x0;
    assert!(relative_error(&guided, &(&uncond + 3.0 * (cond - &uncond))) < 1e-12);
    Ok(())
}

#[test]
fn a_mixture_can_lack_components() -> TestResult {
    let ring = GaussianMixture::ring(8)?;
    let lacking = ring.without(&[1, 5])?;
    assert_eq!((lacking.num_components(), lacking.num_classes()), (6, 4));
    let place = |k: i64| ring.means().get(k).unsqueeze(0);
    let distances = lacking.distance_to_nearest(ring.means())?;
    let far: Vec<bool> = Vec::try_from(distances.gt(0.5))?;
    assert_eq!(far, [false, true, false, false, false, true, false, false]);
    // The weights still sum to 1: at a mean of six, the density is 8 / 6 of that of eight.
    let (alpha, sigma) =
        (Tensor::ones([1], kind::DOUBLE_CPU), Tensor::zeros([1], kind::DOUBLE_CPU));
    let [with, without] = [&ring, &lacking].map(|m| m.log_density(&place(3), &alpha, &sigma, None));
    let ratio = (without? - with?).exp().double_value(&[0]);
    assert!((ratio - 8.0 / 6.0).abs() < 1e-6);

    // Neither a class nor the whole mixture can be removed, nor a component that does not exist.
    for components in [vec![0, 1], (0..8).collect(), vec![8], vec![-1]] {
        assert!(matches!(
            ring.without(&components),
            Err(Error::Argument(ArgumentError::Value { .. }))
        ));
    }
    Ok(())
}
