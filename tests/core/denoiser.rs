use ddil_core::{
    ClipMeter, Conditioning, Consistent, Denoiser, Error, Guided, GuidedByWeight, Source,
    Thresholded,
};
use ddil_libtorch::ArgumentError;
use ddil_schedulers::{
    ConsistencyBoundary, DataRange, NoiseSchedule, NoiseScheduleConfig, Prediction, Thresholding,
};
use tch::{Kind, Tensor, kind};

use crate::common::{Gaussian, SHAPES, labels, max_abs_difference, normal};

/// Class 0 means "no condition".
fn null() -> Conditioning {
    Conditioning::class_labels(Tensor::from_slice(&[0_i64]))
}

#[test]
fn guidance_is_its_formula() -> ddil_core::Result<()> {
    for shape in SHAPES {
        let inner = Gaussian::new(-0.3, 0.4, 0.5);
        let x_t = normal(0, shape);
        let timesteps = Tensor::from_slice(&[999_i64, 499, 20]);
        let conditioning = labels(3);
        let unsaid = Conditioning::class_labels(Tensor::zeros([3], (Kind::Int64, x_t.device())));
        let cond = inner.predict(&x_t, &timesteps, &conditioning)?;
        let uncond = inner.predict(&x_t, &timesteps, &unsaid)?;
        for scale in [0.0, 1.0, 3.0] {
            let guided =
                Guided::new(&inner, scale, null())?.predict(&x_t, &timesteps, &conditioning)?;
            let x0 = &uncond.x0 + scale * (&cond.x0 - &uncond.x0);
            let epsilon = &uncond.epsilon + scale * (&cond.epsilon - &uncond.epsilon);
            assert!(max_abs_difference(&guided.x0, &x0) < 1e-5, "{shape:?} {scale}");
            assert!(max_abs_difference(&guided.epsilon, &epsilon) < 1e-4, "{shape:?} {scale}");
        }
    }
    Ok(())
}

/// Takes the first number of size and crop for clean data.
struct BySize(NoiseSchedule);

impl Denoiser for BySize {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let sizes =
            conditioning.get(Conditioning::TIME_IDS).expect("sizes are given").narrow(1, 0, 1);
        Ok(Prediction::from_x0(&self.0, sizes.expand_as(x_t), x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.0
    }
}

#[test]
fn guidance_is_not_away_from_the_size() -> ddil_core::Result<()> {
    let inner = BySize(NoiseScheduleConfig::default().build()?);
    let sizes = Tensor::from_slice2(&[[512.0_f32, 0.0], [64.0, 0.0]]);
    let conditioning = |sizes: Option<Tensor>, n: i64| {
        Conditioning::none()
            .with(Conditioning::TEXT_EMBEDS, Tensor::zeros([n, 1], kind::FLOAT_CPU))
            .with_some(Conditioning::TIME_IDS, sizes)
    };
    let (x_t, timesteps) = (normal(0, &[2, 3]), Tensor::from_slice(&[999_i64, 499]));
    let x0 = |null: Conditioning| -> ddil_core::Result<Tensor> {
        let said = conditioning(Some(sizes.shallow_clone()), 2);
        Ok(Guided::new(&inner, 3.0, null)?.predict(&x_t, &timesteps, &said)?.x0)
    };
    let own = sizes.narrow(1, 0, 1).expand([2, 3], false);
    assert!(max_abs_difference(&x0(conditioning(None, 1))?, &own) < 1e-3);
    // Explicit sizes are used like any other condition.
    let other = conditioning(Some(Tensor::zeros([1, 2], kind::FLOAT_CPU)), 1);
    assert!(max_abs_difference(&x0(other)?, &(own * 3.0)) < 1e-3);
    Ok(())
}

#[test]
fn guidance_of_one_evaluates_once() -> ddil_core::Result<()> {
    let inner = Gaussian::new(0.0, 0.4, 0.5);
    let (x_t, timesteps) = (normal(0, &[3, 2]), Tensor::from_slice(&[5_i64, 5, 5]));
    let _ = Guided::new(&inner, 1.0, null())?.predict(&x_t, &timesteps, &labels(3))?;
    assert_eq!(inner.num_evaluated.get(), 3);
    let _ = Guided::new(&inner, 2.0, null())?.predict(&x_t, &timesteps, &labels(3))?;
    assert_eq!(inner.num_evaluated.get(), 9);
    assert!(matches!(Guided::new(&inner, f64::NAN, null()), Err(Error::Invalid(_))));
    assert!(matches!(Guided::new(&inner, 2.0, labels(2)), Err(Error::Conditioning { .. })));
    Ok(())
}

#[test]
fn thresholding_keeps_the_pair_consistent() -> ddil_core::Result<()> {
    let inner = Gaussian::new(2.0, 0.0, 0.5);
    let x_t = normal(0, &[3, 2, 4, 4]);
    let timesteps = Tensor::from_slice(&[999_i64, 499, 20]);
    let clamp = Thresholding::Clamp(DataRange::scalar(-1.0, 1.0));
    let prediction = Thresholded::new(&inner, clamp)?.predict(&x_t, &timesteps, &labels(3))?;
    assert!(prediction.x0.abs().max().double_value(&[]) <= 1.0);
    let scales = inner.schedule.scales_at(&timesteps, &x_t)?;
    let rebuilt = scales.alpha * prediction.x0 + scales.sigma * prediction.epsilon;
    assert!(max_abs_difference(&rebuilt, &x_t) < 1e-5);
    Ok(())
}

#[test]
fn consistency_is_the_identity_at_timestep_0() -> ddil_core::Result<()> {
    let inner = Gaussian::new(2.0, 0.0, 0.5);
    let x_t = normal(0, &[3, 2]);
    let timesteps = Tensor::from_slice(&[0_i64, 0, 999]);
    let boundary = ConsistencyBoundary::default();
    let prediction = Consistent::new(&inner, boundary).predict(&x_t, &timesteps, &labels(3))?;
    let raw = inner.predict(&x_t, &timesteps, &labels(3))?;
    assert_eq!(prediction.x0.narrow(0, 0, 2), x_t.narrow(0, 0, 2));
    assert!(max_abs_difference(&prediction.x0.get(2), &raw.x0.get(2)) < 1e-5);
    Ok(())
}

#[test]
fn conditioning_of_other_kinds_cannot_be_joined() {
    let weighted = labels(2).with_guidance_weight(Tensor::from_slice(&[7.5_f32, 7.5]));
    let joined = Conditioning::cat(&[&labels(2), &weighted]);
    assert!(matches!(joined, Err(Error::Conditioning { .. })));
}

/// The conditioning that an inner network received.
#[derive(Default)]
struct Recorder(std::cell::RefCell<Vec<Conditioning>>);

impl Recorder {
    fn network<'a>(&'a self, inner: &'a Gaussian) -> impl Denoiser + 'a {
        struct Listening<'a>(&'a Recorder, &'a Gaussian);
        impl Denoiser for Listening<'_> {
            fn predict(
                &self,
                x_t: &Tensor,
                timesteps: &Tensor,
                conditioning: &Conditioning,
            ) -> ddil_core::Result<Prediction> {
                self.0.0.borrow_mut().push(conditioning.shallow_clone());
                self.1.predict(x_t, timesteps, conditioning)
            }

            fn schedule(&self) -> &NoiseSchedule {
                self.1.schedule()
            }
        }
        Listening(self, inner)
    }
}

#[test]
fn guidance_by_weight_is_its_formula() -> ddil_core::Result<()> {
    for shape in SHAPES {
        let inner = Gaussian::new(-0.3, 0.4, 0.5);
        let x_t = normal(0, shape);
        let timesteps = Tensor::from_slice(&[999_i64, 499, 20]);
        let weights = [-1.0, 0.0, 6.5];
        let conditioning = labels(3).with_guidance_weight(Tensor::from_slice(&weights));
        let heard = Recorder::default();
        let network = GuidedByWeight::new(heard.network(&inner), null())?;
        let guided = network.predict(&x_t, &timesteps, &conditioning)?;

        let cond = inner.predict(&x_t, &timesteps, &labels(3))?;
        let zeros = Tensor::zeros([3], (Kind::Int64, x_t.device()));
        let uncond = inner.predict(&x_t, &timesteps, &Conditioning::class_labels(zeros))?;
        for (row, w) in weights.into_iter().enumerate() {
            let row = row as i64;
            let expected = |cond: &Tensor, uncond: &Tensor| {
                let (cond, uncond) = (cond.get(row), uncond.get(row));
                &cond + w * (&cond - uncond)
            };
            let x0 = expected(&cond.x0, &uncond.x0);
            let epsilon = expected(&cond.epsilon, &uncond.epsilon);
            assert!(max_abs_difference(&guided.x0.get(row), &x0) < 1e-5, "{shape:?} {w}");
            assert!(max_abs_difference(&guided.epsilon.get(row), &epsilon) < 1e-4, "{shape:?} {w}");
        }
        // One call of twice the size, which does not receive the weight.
        let heard = heard.0.take();
        assert_eq!(heard.len(), 1);
        assert!(heard[0].get(Conditioning::GUIDANCE_WEIGHT).is_none());
        let conditioning = Tensor::from_slice(&[0_i64, 1, 2, 0, 0, 0]);
        assert_eq!(heard[0].get(Conditioning::CLASS_LABELS), Some(&conditioning));
    }
    Ok(())
}

#[test]
fn equal_weights_are_a_guidance_scale() -> ddil_core::Result<()> {
    let inner = Gaussian::new(-0.3, 0.4, 0.5);
    let (x_t, timesteps) = (normal(0, &[3, 2, 4, 4]), Tensor::from_slice(&[999_i64, 499, 20]));
    for scale in [0.0, 2.0, 7.5] {
        let weight = Tensor::full([3], scale - 1.0, tch::kind::DOUBLE_CPU);
        let conditioning = labels(3).with_guidance_weight(weight);
        let by_weight =
            GuidedByWeight::new(&inner, null())?.predict(&x_t, &timesteps, &conditioning)?;
        let guided = Guided::new(&inner, scale, null())?.predict(&x_t, &timesteps, &labels(3))?;
        assert_eq!(by_weight.x0, guided.x0);
        assert_eq!(by_weight.epsilon, guided.epsilon);
    }
    Ok(())
}

#[test]
fn a_guidance_weight_is_required_once_per_sample() -> ddil_core::Result<()> {
    let inner = Gaussian::new(0.0, 0.4, 0.5);
    let network = GuidedByWeight::new(&inner, null())?;
    let (x_t, timesteps) = (normal(0, &[3, 2]), Tensor::from_slice(&[5_i64, 5, 5]));
    let unsaid = network.predict(&x_t, &timesteps, &labels(3));
    assert!(matches!(unsaid, Err(Error::ConditioningMissing { field: "guidance_weight", .. })));
    for shape in [&[2_i64][..], &[3, 1], &[]] {
        let conditioning =
            labels(3).with_guidance_weight(Tensor::ones(shape, tch::kind::FLOAT_CPU));
        let output = network.predict(&x_t, &timesteps, &conditioning);
        assert!(
            matches!(output, Err(Error::Conditioning { field, .. }) if field == "guidance_weight")
        );
    }
    assert_eq!(inner.num_evaluated.get(), 0);
    let weighted = null().with_guidance_weight(Tensor::from_slice(&[0_f32]));
    assert!(matches!(GuidedByWeight::new(&inner, weighted), Err(Error::Conditioning { .. })));
    assert!(matches!(GuidedByWeight::new(&inner, labels(2)), Err(Error::Conditioning { .. })));
    Ok(())
}

/// Returns the same for any input.
struct Says(Gaussian, Tensor);

impl Denoiser for Says {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        _: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        Ok(Prediction::from_x0(self.schedule(), self.1.shallow_clone(), x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.0.schedule()
    }
}

/// `(timestep, source, fraction, samples)`.
type Clipped = (i64, Option<Source>, f64, u64);

/// All that was measured.
fn read(meter: &ClipMeter) -> ddil_core::Result<Vec<Clipped>> {
    let clipped = meter.take()?.into_iter();
    Ok(clipped.map(|c| (c.timestep, c.source, c.fraction, c.samples)).collect())
}

#[test]
fn clipped_values_are_counted_by_timestep_and_source() -> ddil_core::Result<()> {
    let x0 = Tensor::from_slice(&[2_f32, 0.0, 0.5, -3.0, 1.0, 1.5, -1.5, 9.0]).view([4, 1, 2]);
    let network = Says(Gaussian::new(0.0, 0.0, 1.0), x0.shallow_clone());
    let meter = ClipMeter::new(network.schedule());
    let clamp = Thresholding::clamp_pixels();
    let plain = Thresholded::new(&network, clamp.clone())?;
    let metered = Thresholded::new(&network, clamp)?.metered(meter.clone());
    let (x_t, timesteps) = (normal(0, &[4, 1, 2]), Tensor::from_slice(&[999_i64, 999, 499, 0]));
    let predict_with =
        |network: &dyn Denoiser| network.predict(&x_t, &timesteps, &Conditioning::none());

    // The origin of the rows was not set.
    assert_eq!(predict_with(&metered)?.x0, predict_with(&plain)?.x0);
    let expected = [(999, None, 0.5, 2), (499, None, 0.5, 1), (0, None, 1.0, 1)];
    assert_eq!(read(&meter)?, expected);
    assert!(read(&meter)?.is_empty());

    // Set once, it applies to every call with as many rows; calls add up.
    meter.rows_are(&[Source::Student, Source::Student, Source::Forward, Source::Noise]);
    let _ = (predict_with(&metered)?, predict_with(&metered)?);
    let narrow = |t: &Tensor| t.narrow(0, 0, 2);
    meter.measure(&Thresholding::clamp_pixels(), &narrow(&x0), &narrow(&timesteps))?;
    let expected = [
        (499, Some(Source::Forward), 0.5, 2),
        (999, Some(Source::Student), 0.5, 4),
        (0, Some(Source::Noise), 1.0, 2),
        (999, None, 0.5, 2),
    ];
    assert_eq!(read(&meter)?, expected);

    // Nothing is thresholded, so nothing is measured.
    let off = Thresholded::new(&network, Thresholding::None)?.metered(meter.clone());
    assert_eq!(predict_with(&off)?.x0, x0);
    assert!(read(&meter)?.is_empty());
    let beyond =
        meter.measure(&Thresholding::clamp_pixels(), &x0, &Tensor::from_slice(&[9_i64; 3]));
    assert!(matches!(beyond, Err(Error::Argument(ArgumentError::Shape { .. }))), "{beyond:?}");
    Ok(())
}

#[test]
fn a_meter_does_not_change_gradients() -> ddil_core::Result<()> {
    let x0 = Tensor::from_slice(&[2_f32, 0.5]).view([2, 1]).set_requires_grad(true);
    let network = Says(Gaussian::new(0.0, 0.0, 1.0), x0.shallow_clone());
    let meter = ClipMeter::new(network.schedule());
    let metered = Thresholded::new(&network, Thresholding::clamp_pixels())?.metered(meter.clone());
    let timesteps = Tensor::from_slice(&[9_i64, 9]);
    let said = metered.predict(&normal(0, &[2, 1]), &timesteps, &Conditioning::none())?;
    said.x0.sum(Kind::Float).backward();
    assert_eq!(x0.grad(), Tensor::from_slice(&[0_f32, 1.0]).view([2, 1]));
    assert_eq!(read(&meter)?, [(9, None, 0.5, 2)]);
    Ok(())
}
