use ddil_schedulers::{
    BetaSchedule, Compatibility, ConsistencyBoundary, DataRange, Ddim, Estimate, FinalAlphaCumprod,
    Lcm, NoiseSchedule, Prediction, PredictionType, Result, Sampler, SamplerStep, Thresholding,
    TimestepSpacing, Timesteps,
};
use tch::{Device, Kind, Tensor, kind};

use crate::support::{assert_close, families, gap, rows, stable_diffusion, timesteps, values, vp};

const TYPES: [PredictionType; 4] = [
    PredictionType::Epsilon,
    PredictionType::Sample,
    PredictionType::VPrediction,
    PredictionType::Flow,
];

fn thresholdings() -> [Thresholding; 5] {
    [
        Thresholding::None,
        Thresholding::Clamp(DataRange::scalar(-0.8, 1.1)),
        Thresholding::Clamp(DataRange::per_channel(vec![-1.0, -0.5], vec![1.0, 0.7])),
        Thresholding::Dynamic { ratio: 0.9, max_value: 5.0 },
        Thresholding::Reflect(DataRange::default()),
    ]
}

fn trailing(n: u32) -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, n, 0).expect("n is in 1..=1000")
}

/// One step of a batch at one timestep, two ways.
struct Step<'a> {
    sampler: &'a dyn Sampler,
    prediction_type: PredictionType,
    thresholding: &'a Thresholding,
    boundary: Option<ConsistencyBoundary>,
    t: i64,
    prev: i64,
}

impl Step<'_> {
    /// Convert, threshold, boundary, sampler, each by itself and with a timestep for each sample.
    fn general(&self, x_t: &Tensor, output: &Tensor) -> Prediction {
        let (schedule, t) = (self.sampler.schedule(), timesteps(&[self.t, self.t]));
        let mut said = self
            .prediction_type
            .convert(schedule, output, x_t, &t)
            .and_then(|raw| raw.thresholded(self.thresholding, schedule, x_t, &t))
            .expect("they fit");
        if let Some(boundary) = self.boundary {
            said.x0 = boundary.apply(&said.x0, x_t, &t).expect("they fit");
        }
        said
    }

    /// The same as one estimate.
    fn estimate(&self, x_t: &Tensor, output: &Tensor) -> Result<Estimate> {
        let (schedule, output) = (self.sampler.schedule(), output.shallow_clone());
        let raw = Estimate::of_output(schedule, self.prediction_type, output, self.t)?;
        let held = raw.thresholded(self.thresholding, x_t)?;
        match self.boundary {
            Some(boundary) => held.with_boundary(boundary, x_t),
            None => Ok(held),
        }
    }

    /// Fails unless both agree to `tolerance` of their size, in new memory and in the state's own.
    fn assert_equal(&self, kind: Kind, tolerance: f64) {
        let [x_t, output, noise] = [0; 3].map(|_| Tensor::randn([2, 2, 3], (kind, Device::Cpu)));
        let what = format!("{:?} {:?} {}", self.prediction_type, self.thresholding, self.t);
        let close = |found: &Tensor, expected: &Tensor| {
            let size = expected.abs().max().double_value(&[]).max(1.0);
            assert!(gap(found, expected) < tolerance * size, "{what}: {found} {expected}");
        };
        let (said, estimate) = (self.general(&x_t, &output), self.estimate(&x_t, &output));
        let estimate = estimate.expect("they fit");
        let found = estimate.prediction(&x_t).expect("they fit");
        close(&found.x0, &said.x0);
        close(&found.epsilon, &said.epsilon);
        close(&estimate.x0(&x_t).expect("they fit"), &said.x0);

        let (t, prev) = ([self.t; 2], [self.prev; 2]);
        let step = SamplerStep::new(&said, &t, &prev).with_noise(&noise);
        let expected = self.sampler.step(&step).expect("they fit");
        let step_at = |x_t: Tensor, estimate: &Estimate| {
            self.sampler.step_at(x_t, estimate, self.prev, Some(&noise)).expect("they fit")
        };
        let before = x_t.copy();
        let landed = step_at(x_t.shallow_clone(), &estimate);
        close(&landed, &expected);
        assert_eq!(gap(&x_t, &before), 0.0, "somebody else holds the state");
        assert_eq!(gap(&step_at(before, &estimate), &landed), 0.0, "{what}");
        // A prediction that is known in full, as a closed form gives it.
        let schedule = self.sampler.schedule();
        let known = Estimate::of_prediction(schedule, said, self.t).expect("they fit");
        close(&step_at(x_t.shallow_clone(), &known), &expected);
    }
}

fn all() -> impl Iterator<Item = (PredictionType, Thresholding)> {
    TYPES.into_iter().flat_map(|p| thresholdings().map(|t| (p, t)))
}

#[test]
fn a_step_of_ddim_is_the_general_one() {
    for schedule in families() {
        for eta in [0.0, 0.5, 1.0] {
            let sampler = Ddim::with_eta(schedule.clone(), eta).expect("in 0..=1");
            for (prediction_type, thresholding) in all() {
                for (t, prev) in trailing(4).pairs() {
                    let thresholding = &thresholding;
                    let (sampler, boundary) = (&sampler, None);
                    let step = Step { sampler, prediction_type, thresholding, boundary, t, prev };
                    let x = Tensor::zeros([2, 2, 3], kind::DOUBLE_CPU);
                    if step.estimate(&x, &x).is_err() {
                        assert!(prediction_type.ensure_defined_on(&schedule).is_err());
                        continue;
                    }
                    step.assert_equal(Kind::Double, 1e-11);
                    step.assert_equal(Kind::Float, 1e-5);
                }
            }
        }
    }
}

#[test]
fn a_step_of_lcm_is_the_general_one() {
    let grid = Timesteps::lcm(1000, 50, 4).expect("it fits");
    let strong = ConsistencyBoundary { sigma_data: 0.5, timestep_scaling: 1e-3 };
    for last in [FinalAlphaCumprod::One, FinalAlphaCumprod::First] {
        let sampler = &Lcm::new(vp(BetaSchedule::ScaledLinear, false, last));
        for boundary in [None, Some(strong)] {
            for (prediction_type, thresholding) in all() {
                let thresholding = &thresholding;
                for (t, prev) in grid.pairs() {
                    let step = Step { sampler, prediction_type, thresholding, boundary, t, prev };
                    step.assert_equal(Kind::Double, 1e-11);
                    step.assert_equal(Kind::Float, 1e-5);
                }
            }
        }
    }
}

/// A boundary within a boundary, a threshold after a boundary, a threshold within a threshold: each as the general path
/// would, one after the other.
#[test]
fn estimates_that_are_not_one_formula_are_computed_in_order() {
    let schedule = stable_diffusion();
    let [x_t, output] = [0; 2].map(|_| Tensor::randn([2, 2, 3], kind::DOUBLE_CPU));
    let (t, v) = (timesteps(&[499, 499]), PredictionType::VPrediction);
    let [wide, narrow] =
        [1.0, 0.5].map(|bound| Thresholding::Clamp(DataRange::scalar(-bound, bound)));
    let boundary = ConsistencyBoundary { sigma_data: 0.5, timestep_scaling: 1e-3 };
    let general = |said: Prediction| {
        let mut said = said.thresholded(&wide, &schedule, &x_t, &t).expect("they fit");
        said.x0 = boundary.apply(&said.x0, &x_t, &t).expect("they fit");
        let mut said = said.thresholded(&narrow, &schedule, &x_t, &t).expect("they fit");
        for _ in 0..2 {
            said.x0 = boundary.apply(&said.x0, &x_t, &t).expect("they fit");
        }
        said
    };
    let expected = general(v.convert(&schedule, &output, &x_t, &t).expect("they fit"));
    let found = Estimate::of_output(&schedule, v, output, 499)
        .and_then(|raw| raw.thresholded(&wide, &x_t))
        .and_then(|held| held.with_boundary(boundary, &x_t))
        .and_then(|bounded| bounded.thresholded(&narrow, &x_t))
        .and_then(|held| held.with_boundary(boundary, &x_t))
        .and_then(|bounded| bounded.with_boundary(boundary, &x_t))
        .and_then(|estimate| estimate.prediction(&x_t))
        .expect("they fit");
    assert!(gap(&found.x0, &expected.x0) < 1e-12);
    assert!(gap(&found.epsilon, &expected.epsilon) < 1e-12);
}

/// Guidance of the output is guidance of both parts, also of an estimate that was clamped before.
#[test]
fn combining_rows_is_combining_both_parts() {
    let schedule = stable_diffusion();
    let x = Tensor::randn([1, 2, 3], kind::DOUBLE_CPU);
    let (x_t, output) = (x.repeat([2, 1, 1]), Tensor::randn([2, 2, 3], kind::DOUBLE_CPU));
    let guide = |both: &Tensor| both.narrow(0, 1, 1).lerp(&both.narrow(0, 0, 1), 3.0);
    for thresholding in thresholdings() {
        let held = |output: &Tensor| {
            let output = output.shallow_clone();
            Estimate::of_output(&schedule, PredictionType::Epsilon, output, 749)
                .and_then(|raw| raw.thresholded(&thresholding, &x_t))
                .expect("they fit")
        };
        let each = held(&output).prediction(&x_t).expect("they fit");
        let guided = held(&output).combined(&x_t, guide).expect("they fit");
        let found = guided.prediction(&x).expect("they fit");
        assert!(gap(&found.x0, &guide(&each.x0)) < 1e-11, "{thresholding:?}");
        assert!(gap(&found.epsilon, &guide(&each.epsilon)) < 1e-11, "{thresholding:?}");
    }
}

/// v-prediction, clip to 1, leading offset 1, final alpha that of timestep 0, four steps, at timestep 1; in 40 digits.
#[test]
fn both_rules_for_clipped_steps_match_the_recorded_ones() {
    let sampler = Ddim::new(vp(BetaSchedule::ScaledLinear, false, FinalAlphaCumprod::First));
    let grid = Timesteps::diffusers(TimestepSpacing::Leading, 1000, 4, 1).expect("it fits");
    let clip = Thresholding::clamp_pixels();
    let (x, out) = (rows(1, &[1.0, -0.5, 0.25, 2.0]), rows(1, &[0.1, 0.2, -0.3, 0.4]));
    let (t, prev) = grid.pairs().nth(3).expect("four steps");
    let last = |compatibility| {
        let v = PredictionType::VPrediction;
        let raw = Estimate::of_output(sampler.schedule(), v, out.shallow_clone(), t);
        let held = raw.and_then(|raw| match compatibility {
            Compatibility::Diffusers => raw.thresholded_keeping_epsilon(&clip, &x),
            Compatibility::Off => raw.thresholded(&clip, &x),
        });
        let step = held.and_then(|held| sampler.step_at(x.shallow_clone(), &held, prev, None));
        values(&step.expect("they fit"))
    };
    let kept = last(Compatibility::Diffusers);
    let golden = [0.998_713_233_637_69, -0.502_389_552_034_405, 0.253_621_124_189_651];
    assert_close(&kept[..3], &golden, 1e-12);
    assert_close(&kept[3..], &[1.013_633_843_582_513], 1e-12);
    // Nothing was clipped in the first three.
    let recomputed = last(Compatibility::Off);
    assert_close(&recomputed[..3], &golden, 1e-12);
    assert_close(&recomputed[3..], &[1.706_459_034_101_923], 1e-12);
}

/// An estimate of Stable Diffusion's schedule at 999.
fn noise_estimate(output: &Tensor) -> Estimate {
    let output = output.shallow_clone();
    Estimate::of_output(&stable_diffusion(), PredictionType::Epsilon, output, 999)
        .expect("it has a meaning")
}

fn half_renewed() -> Ddim {
    Ddim::with_eta(stable_diffusion(), 0.5).expect("in 0..=1")
}

#[test]
fn half_kinds_are_computed_in_float() {
    let sampler = half_renewed();
    let half = |x: &Tensor| x.to_kind(Kind::BFloat16);
    let float = |x: &Tensor| x.to_kind(Kind::Float);
    let [x, output, noise] = [0; 3].map(|_| half(&Tensor::randn([2, 3], kind::FLOAT_CPU)));
    let step = |x: &Tensor, output: &Tensor, noise: &Tensor| {
        sampler.step_at(x.copy(), &noise_estimate(output), 499, Some(noise)).expect("they fit")
    };
    let found = step(&x, &output, &noise);
    assert_eq!(found.kind(), Kind::Float);
    assert_eq!(gap(&found, &step(&float(&x), &float(&output), &float(&noise))), 0.0);
}

#[test]
fn gradients_flow_through_every_kind_of_step() {
    for keeps_epsilon in [false, true] {
        for thresholding in thresholdings() {
            let [x, noise] = [0; 2].map(|_| Tensor::randn([1, 2, 3], kind::DOUBLE_CPU));
            let output = Tensor::zeros([1, 2, 3], kind::DOUBLE_CPU).set_requires_grad(true);
            let raw = noise_estimate(&output);
            let held = if keeps_epsilon {
                raw.thresholded_keeping_epsilon(&thresholding, &x)
            } else {
                raw.thresholded(&thresholding, &x)
            };
            let held = held.expect("they fit");
            let landed = half_renewed().step_at(x, &held, 499, Some(&noise)).expect("they fit");
            landed.sum(Kind::Double).backward();
            assert!(output.grad().defined(), "{thresholding:?}");
        }
    }
}

/// The state's memory is reused if nothing else refers to it: not the output, a view or a handle.
#[test]
fn memory_is_reused_if_only_the_state_refers_to_it() {
    let sampler = Ddim::new(stable_diffusion());
    let last = |x: Tensor| x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
    let [x, output] = [0; 2].map(|_| last(Tensor::randn([2, 3, 4, 4], kind::FLOAT_CPU)));
    let (before, said, stride) = (x.copy(), output.copy(), x.stride());
    let step = |x: Tensor, output: &Tensor| {
        sampler.step_at(x, &noise_estimate(output), 499, None).expect("they fit")
    };
    let found = step(x.shallow_clone(), &output);
    assert_eq!(found.stride(), stride);
    assert_eq!((gap(&x, &before), gap(&output, &said)), (0.0, 0.0));
    let rows = x.narrow(0, 0, 1);
    let of_view = step(rows, &output.narrow(0, 0, 1));
    assert_eq!((gap(&x, &before), gap(&of_view, &found.narrow(0, 0, 1))), (0.0, 0.0));
    // A network that returns the state itself.
    let same = step(x.shallow_clone(), &x);
    assert_eq!(gap(&x, &before), 0.0);
    drop(same);
    // A view shares its base's memory; a copy does not.
    let alone = x.copy();
    let address = alone.data_ptr();
    let own = step(alone, &output);
    assert_eq!((own.data_ptr(), gap(&own, &found)), (address, 0.0));
}

#[test]
fn mismatches_are_refused_by_name() {
    let (x, other) = (rows(1, &[0.0]), rows(1, &[0.0, 0.0]));
    let say = |estimate: &Estimate, prev, noise| {
        let step = half_renewed().step_at(x.copy(), estimate, prev, noise);
        step.expect_err("a misfit").to_string()
    };
    let fits = noise_estimate(&x);
    assert!(say(&noise_estimate(&other), 499, Some(&x)).contains("has shape [1, 2]"));
    assert!(say(&fits, 499, None).contains("requires `noise`"));
    assert!(say(&fits, 499, Some(&other)).contains("`noise` has shape [1, 2]"));
    assert!(say(&fits, 1000, Some(&x)).contains("timestep 1000 is not in -1..=999"));
    // A step to clean data renews nothing.
    assert!(half_renewed().step_at(x.copy(), &fits, -1, None).is_ok());

    let [_, zero_snr, flow, _] = families();
    let read = |schedule: &NoiseSchedule, output, t| {
        Estimate::of_output(schedule, output, x.shallow_clone(), t).map_err(|e| e.to_string())
    };
    let refused = read(&zero_snr, PredictionType::Epsilon, 999).expect_err("no signal at 999");
    assert!(refused.contains("no signal"), "{refused}");
    // Elsewhere there is no difficulty.
    assert!(read(&zero_snr, PredictionType::Epsilon, 998).is_ok());
    assert!(read(&flow, PredictionType::VPrediction, 499).is_err());
    assert!(read(&flow, PredictionType::Flow, 1500).is_err());
    let bad = Thresholding::Clamp(DataRange::scalar(1.0, -1.0));
    assert!(noise_estimate(&x).thresholded(&bad, &x).is_err());
}

const GPU: Device = Device::Cuda(0);

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_steps_as_the_cpu_does() {
    for thresholding in thresholdings() {
        let samplers: [&dyn Sampler; 2] = [&half_renewed(), &Lcm::new(stable_diffusion())];
        for sampler in samplers {
            for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
                for (t, prev) in trailing(4).pairs() {
                    let random = |_| Tensor::randn([3, 2, 16, 16], (kind, Device::Cpu));
                    let [x_t, output, noise] = [0; 3].map(random);
                    let v = PredictionType::VPrediction;
                    let step = |x_t: Tensor, output: Tensor, noise: &Tensor| {
                        Estimate::of_output(sampler.schedule(), v, output, t)
                            .and_then(|raw| raw.thresholded(&thresholding, &x_t))
                            .and_then(|held| sampler.step_at(x_t, &held, prev, Some(noise)))
                            .expect("they fit")
                    };
                    let expected = step(x_t.shallow_clone(), output.shallow_clone(), &noise);
                    let [x_t, output, noise] = [x_t, output, noise].map(|x| x.to_device(GPU));
                    let found = step(x_t.shallow_clone(), output.shallow_clone(), &noise);
                    assert_eq!(found.device(), GPU);
                    let apart = gap(&found.to_device(Device::Cpu), &expected);
                    assert!(apart < tolerance, "{thresholding:?} {kind:?} {t}: {apart}");
                    assert_eq!(gap(&step(x_t, output, &noise), &found), 0.0);
                }
            }
        }
    }
}

/// While the device multiplies matrices, steps are queued without waiting: of a whole batch, and of one with mixed
/// timesteps.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_is_not_waited_for() {
    let sampler = Ddim::new(stable_diffusion());
    for thresholding in [Thresholding::None, Thresholding::clamp_pixels()] {
        let [x_t, output] = [0; 2].map(|_| Tensor::randn([4, 4, 64, 64], (Kind::Float, GPU)));
        let matrix = Tensor::randn([8192, 8192], (Kind::Double, GPU));
        let multiplied = |times| (0..times).for_each(|_| drop(matrix.matmul(&matrix)));
        let steps = || {
            for (t, prev) in trailing(4).pairs() {
                let (v, output) = (PredictionType::VPrediction, output.shallow_clone());
                let held = Estimate::of_output(sampler.schedule(), v, output, t)
                    .and_then(|raw| raw.thresholded(&thresholding, &x_t))
                    .expect("they fit");
                let _ = sampler.step_at(x_t.shallow_clone(), &held, prev, None).expect("they fit");
                let said = held.prediction(&x_t).expect("they fit");
                let _ =
                    sampler.step(&SamplerStep::new(&said, &[t; 4], &[prev; 4])).expect("so too");
            }
        };
        multiplied(1);
        steps();
        tch::Cuda::synchronize(0);
        let started = std::time::Instant::now();
        multiplied(10);
        steps();
        let queued = started.elapsed();
        tch::Cuda::synchronize(0);
        let done = started.elapsed();
        println!("{thresholding:?}: asked in {queued:?}, done in {done:?}");
        assert!(queued < done / 4, "{thresholding:?}: asked in {queued:?}, done in {done:?}");
    }
}
