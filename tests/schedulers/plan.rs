use ddil_schedulers::{
    BetaSchedule, Compatibility, ConsistencyBoundary, DataRange, Ddim, FinalAlphaCumprod, Lcm,
    NoiseSchedule, Plan, PredictionType, Sampler, SamplerStep, Thresholding, TimestepSpacing,
    Timesteps,
};
use tch::{Device, Kind, Tensor, kind};

use crate::support::{assert_close, families, gap, rows, stable_diffusion, values, vp};

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

/// The same step by the general path: convert, threshold, boundary, sampler.
struct General<'a> {
    sampler: &'a dyn Sampler,
    prediction_type: PredictionType,
    thresholding: &'a Thresholding,
    boundary: Option<ConsistencyBoundary>,
}

impl General<'_> {
    fn step(&self, t: i64, prev: i64, x_t: &Tensor, output: &Tensor, noise: &Tensor) -> Tensor {
        let batch = [x_t.size()[0]];
        let t = Tensor::full(batch, t, kind::INT64_CPU);
        let prev = Tensor::full(batch, prev, kind::INT64_CPU);
        let schedule = self.sampler.schedule();
        let mut said = self
            .prediction_type
            .convert(schedule, output, x_t, &t)
            .and_then(|raw| raw.thresholded(self.thresholding, schedule, x_t, &t))
            .expect("they fit");
        if let Some(boundary) = self.boundary {
            said.x0 = boundary.apply(&said.x0, x_t, &t).expect("they fit");
        }
        let step = SamplerStep::new(&said, &t, &prev).with_noise(noise);
        self.sampler.step(&step).expect("they fit")
    }
}

/// Every step of the plan, in and out of place, is the general path's to `tolerance` of its size.
fn assert_equal(plan: &Plan, general: &General<'_>, kind: Kind, tolerance: f64) {
    for (i, (t, prev)) in plan.timesteps().pairs().enumerate() {
        let [x_t, output, noise] = [0; 3].map(|_| Tensor::randn([2, 2, 3], (kind, Device::Cpu)));
        let expected = general.step(t, prev, &x_t, &output, &noise);
        let found = plan.step(i, &x_t, &output, Some(&noise)).expect("they fit");
        let size = expected.abs().max().double_value(&[]).max(1.0);
        let what = format!("{:?} {:?} step {i}", general.prediction_type, general.thresholding);
        assert!(gap(&found, &expected) < tolerance * size, "{what}: {found} {expected}");
        let mut in_place = x_t.copy();
        plan.step_inplace(i, &mut in_place, &output, Some(&noise)).expect("they fit");
        assert_eq!(gap(&in_place, &found), 0.0, "{what}");
    }
}

#[test]
fn ddim_plans_are_the_general_path() {
    let grid = trailing(4);
    for schedule in families() {
        for eta in [0.0, 0.5, 1.0] {
            let sampler = Ddim::with_eta(schedule.clone(), eta).expect("in 0..=1");
            for (prediction_type, thresholding) in
                TYPES.into_iter().flat_map(|p| thresholdings().map(|t| (p, t)))
            {
                let Ok(plan) = sampler.plan(&grid, prediction_type, &thresholding) else {
                    assert!(prediction_type.ensure_defined_on(&schedule).is_err());
                    continue;
                };
                assert_eq!(plan.needs_noise(0), eta > 0.0);
                assert!(!plan.needs_noise(3), "the last step ends on clean data");
                let general = General {
                    sampler: &sampler,
                    prediction_type,
                    thresholding: &thresholding,
                    boundary: None,
                };
                assert_equal(&plan, &general, Kind::Double, 1e-11);
                assert_equal(&plan, &general, Kind::Float, 1e-5);
            }
        }
    }
}

#[test]
fn lcm_plans_are_the_general_path() {
    let grid = Timesteps::lcm(1000, 50, 4).expect("it fits");
    for last in [FinalAlphaCumprod::One, FinalAlphaCumprod::First] {
        let sampler = Lcm::new(vp(BetaSchedule::ScaledLinear, false, last));
        for boundary in
            [None, Some(ConsistencyBoundary { sigma_data: 0.5, timestep_scaling: 1e-3 })]
        {
            for (prediction_type, thresholding) in
                TYPES.into_iter().flat_map(|p| thresholdings().map(|t| (p, t)))
            {
                let plan = sampler.plan(&grid, prediction_type, &thresholding, boundary);
                let plan = plan.expect("every output has a meaning here");
                let general = General {
                    sampler: &sampler,
                    prediction_type,
                    thresholding: &thresholding,
                    boundary,
                };
                assert_equal(&plan, &general, Kind::Double, 1e-11);
                assert_equal(&plan, &general, Kind::Float, 1e-5);
            }
        }
    }
}

/// v-prediction, clip to 1, leading offset 1, final alpha that of timestep 0, four steps, at timestep 1; in 40 digits.
#[test]
fn both_rules_for_clipped_steps_are_the_golden_ones() {
    let sampler = Ddim::new(vp(BetaSchedule::ScaledLinear, false, FinalAlphaCumprod::First));
    let grid = Timesteps::diffusers(TimestepSpacing::Leading, 1000, 4, 1).expect("it fits");
    let clip = Thresholding::clamp_pixels();
    let (x, out) = (rows(1, &[1.0, -0.5, 0.25, 2.0]), rows(1, &[0.1, 0.2, -0.3, 0.4]));
    let last = |compatibility| {
        let plan = sampler.plan_with(&grid, PredictionType::VPrediction, &clip, compatibility);
        let plan = plan.expect("valid settings");
        values(&plan.step(3, &x, &out, None).expect("they fit"))
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

fn one_plan(schedule: &NoiseSchedule, eta: f64) -> Plan {
    Ddim::with_eta(schedule.clone(), eta)
        .and_then(|sampler| {
            sampler.plan(&trailing(2), PredictionType::Epsilon, &Thresholding::None)
        })
        .expect("valid settings")
}

#[test]
fn half_kinds_are_computed_in_float() {
    let plan = one_plan(&stable_diffusion(), 0.5);
    let half = |x: &Tensor| x.to_kind(Kind::BFloat16);
    let [x, output, noise] = [0; 3].map(|_| half(&Tensor::randn([2, 3], kind::FLOAT_CPU)));
    let found = plan.step(0, &x, &output, Some(&noise)).expect("they fit");
    let float = |x: &Tensor| x.to_kind(Kind::Float);
    let expected =
        plan.step(0, &float(&x), &float(&output), Some(&float(&noise))).expect("they fit");
    assert_eq!(found.kind(), Kind::Float);
    assert_eq!(gap(&found, &expected), 0.0);
    let mut in_place = x.copy();
    plan.step_inplace(0, &mut in_place, &output, Some(&noise)).expect("they fit");
    assert_eq!(in_place.kind(), Kind::BFloat16);
    assert_eq!(gap(&in_place, &half(&found)), 0.0);
}

#[test]
fn gradients_flow_through_every_kind_of_step() {
    let schedule = stable_diffusion();
    for compatibility in [Compatibility::Off, Compatibility::Diffusers] {
        for thresholding in thresholdings() {
            let sampler = Ddim::with_eta(schedule.clone(), 0.5).expect("in 0..=1");
            let plan = sampler
                .plan_with(&trailing(2), PredictionType::Epsilon, &thresholding, compatibility)
                .expect("valid settings");
            let [x, noise] = [0; 2].map(|_| Tensor::randn([1, 2, 3], kind::DOUBLE_CPU));
            let output = Tensor::zeros([1, 2, 3], kind::DOUBLE_CPU).set_requires_grad(true);
            let landed = plan.step(0, &x, &output, Some(&noise)).expect("they fit");
            landed.sum(Kind::Double).backward();
            assert!(output.grad().defined(), "{thresholding:?}");
        }
    }
}

#[test]
fn memory_layout_and_other_memory_are_left_alone() {
    let plan = one_plan(&stable_diffusion(), 0.0);
    let last = |x: Tensor| x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
    let x = last(Tensor::randn([2, 3, 4, 4], kind::FLOAT_CPU));
    let output = last(Tensor::randn([2, 3, 4, 4], kind::FLOAT_CPU));
    let (before, said) = (x.copy(), output.copy());
    let found = plan.step(0, &x, &output, None).expect("they fit");
    assert_eq!(found.stride(), x.stride());
    assert_eq!((gap(&x, &before), gap(&output, &said)), (0.0, 0.0));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let plan = one_plan(&stable_diffusion(), 1.0);
    let (x, other) = (rows(1, &[0.0]), rows(1, &[0.0, 0.0]));
    let say = |i, output: &Tensor, noise| {
        plan.step(i, &x, output, noise).expect_err("a misfit").to_string()
    };
    assert!(say(2, &x, Some(&x)).contains("no step 2 in a plan of 2"));
    assert!(say(0, &other, Some(&x)).contains("`model_output` has shape [1, 2]"));
    assert!(say(0, &x, None).contains("needs `noise`"));
    assert!(say(0, &x, Some(&other)).contains("`noise` has shape [1, 2]"));
    assert!(!plan.needs_noise(7));

    let [_, zero_snr, flow, _] = families();
    let sampler = Ddim::new(zero_snr);
    let refused = sampler.plan(&trailing(2), PredictionType::Epsilon, &Thresholding::None);
    assert!(refused.expect_err("no signal at 999").to_string().contains("no signal"));
    // A grid that does not go there has no difficulty.
    let leading = Timesteps::spaced(TimestepSpacing::Leading, 1000, 4, 0).expect("it fits");
    assert!(sampler.plan(&leading, PredictionType::Epsilon, &Thresholding::None).is_ok());
    let sampler = Ddim::new(flow);
    assert!(sampler.plan(&leading, PredictionType::VPrediction, &Thresholding::None).is_err());
    let off = Timesteps::explicit(vec![1500], 2000).expect("on another schedule");
    assert!(sampler.plan(&off, PredictionType::Flow, &Thresholding::None).is_err());
    let bad = Thresholding::Clamp(DataRange::scalar(1.0, -1.0));
    assert!(sampler.plan(&leading, PredictionType::Flow, &bad).is_err());
}

const GPU: Device = Device::Cuda(0);

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_steps_as_the_cpu_does() {
    let lcm = Timesteps::lcm(1000, 50, 4).expect("it fits");
    for thresholding in thresholdings() {
        let v = PredictionType::VPrediction;
        let ddim = Ddim::with_eta(stable_diffusion(), 0.5).expect("in 0..=1");
        let plans = [
            ddim.plan(&trailing(4), v, &thresholding),
            Lcm::new(stable_diffusion()).plan(&lcm, v, &thresholding, None),
        ];
        for plan in plans {
            let plan = plan.expect("valid settings");
            for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
                for i in 0..4 {
                    let random = |_| Tensor::randn([3, 2, 16, 16], (kind, Device::Cpu));
                    let [x_t, output, noise] = [0; 3].map(random);
                    let expected = plan.step(i, &x_t, &output, Some(&noise)).expect("they fit");
                    let [mut x_t, output, noise] = [x_t, output, noise].map(|x| x.to_device(GPU));
                    let found = plan.step(i, &x_t, &output, Some(&noise)).expect("they fit");
                    assert_eq!(found.device(), GPU);
                    let apart = gap(&found.to_device(Device::Cpu), &expected);
                    assert!(apart < tolerance, "{thresholding:?} {kind:?} step {i}: {apart}");
                    plan.step_inplace(i, &mut x_t, &output, Some(&noise)).expect("they fit");
                    assert_eq!(gap(&x_t, &found), 0.0);
                }
            }
        }
    }
}

/// While the device multiplies matrices for a while, steps are asked for and not waited for.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_is_not_waited_for() {
    for thresholding in [Thresholding::None, Thresholding::clamp_pixels()] {
        let plan = Ddim::new(stable_diffusion())
            .plan(&trailing(4), PredictionType::Epsilon, &thresholding)
            .expect("valid settings");
        let [mut x_t, output] = [0; 2].map(|_| Tensor::randn([4, 4, 64, 64], (Kind::Float, GPU)));
        let matrix = Tensor::randn([8192, 8192], (Kind::Double, GPU));
        let multiplied = |times| (0..times).for_each(|_| drop(matrix.matmul(&matrix)));
        let steps = |x_t: &mut Tensor| {
            for i in 0..4 {
                plan.step_inplace(i, x_t, &output, None).expect("they fit");
                let _ = plan.step(i, x_t, &output, None).expect("they fit");
            }
        };
        multiplied(1);
        steps(&mut x_t);
        tch::Cuda::synchronize(0);
        let started = std::time::Instant::now();
        multiplied(10);
        steps(&mut x_t);
        let asked = started.elapsed();
        tch::Cuda::synchronize(0);
        let done = started.elapsed();
        println!("{thresholding:?}: asked in {asked:?}, done in {done:?}");
        assert!(asked < done / 4, "{thresholding:?}: asked in {asked:?}, done in {done:?}");
    }
}
