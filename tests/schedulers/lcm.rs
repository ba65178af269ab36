use ddil_schedulers::{
    BetaSchedule, ConsistencyBoundary, FinalAlphaCumprod, Lcm, Prediction, Sampler, SamplerStep,
};
use tch::{Device, Kind, Tensor, kind};

use crate::support::{assert_close, gap, rows, stable_diffusion, timesteps, values, vp};

#[test]
fn a_step_noises_the_clean_data_for_the_next_timestep() {
    let schedule = stable_diffusion();
    let sampler = Lcm::new(schedule.clone());
    let [x0, epsilon, noise] = [0; 3].map(|_| Tensor::randn([2, 3], kind::DOUBLE_CPU));
    let said = Prediction { x0, epsilon };
    let prev = [759, -1];
    let step = SamplerStep::new(&said, &[999, 259], &prev).with_noise(&noise);
    let found = sampler.step(&step).expect("they fit");
    let expected = schedule.add_noise(&said.x0, &noise, &timesteps(&prev)).expect("they fit");
    assert_eq!(gap(&found, &expected), 0.0);
    assert_eq!(gap(&found.get(1), &said.x0.get(1)), 0.0, "the last step adds nothing");
}

/// Also if the schedule's clean end has the noise of timestep 0.
#[test]
fn the_last_step_returns_clean_data_whatever_the_final_alpha() {
    let sampler = Lcm::new(vp(BetaSchedule::ScaledLinear, false, FinalAlphaCumprod::First));
    let said = Prediction { x0: rows(2, &[0.5]), epsilon: rows(2, &[9.0]) };
    let noise = rows(2, &[1.0]);
    let step = SamplerStep::new(&said, &[259, 259], &[-1, 0]).with_noise(&noise);
    let found = values(&sampler.step(&step).expect("they fit"));
    assert_eq!(found[0], 0.5);
    assert!(found[1] != 0.5);
}

#[test]
fn scalings_are_the_golden_ones() {
    let boundary = ConsistencyBoundary::default();
    assert_eq!(boundary.scalings(0), (1.0, 0.0));
    for (t, skip, out) in [(19, 6.925e-6, 0.999_996_5), (259, 3.727e-8, 1.0), (999, 2.505e-9, 1.0)]
    {
        let (found_skip, found_out) = boundary.scalings(t);
        assert_close(&[found_skip / skip], &[1.0], 2e-4);
        assert_close(&[found_out], &[out], 5e-8);
    }
}

#[test]
fn the_boundary_returns_its_input_at_timestep_zero() {
    let boundary = ConsistencyBoundary::default();
    let [x0, x_t] = [0; 2].map(|_| Tensor::randn([3, 2, 2], kind::DOUBLE_CPU));
    let t = [0, 19, 999];
    let found = boundary.apply(&x0, &x_t, &timesteps(&t)).expect("they fit");
    for (i, t) in (0..).zip(t) {
        let (skip, out) = boundary.scalings(t);
        assert!(gap(&found.get(i), &(out * x0.get(i) + skip * x_t.get(i))) < 1e-15);
    }
    // The square of the scaled timestep is 1e8, which Half cannot represent.
    let half = Tensor::ones([1, 2], (Kind::Half, Device::Cpu));
    let found = boundary.apply(&half, &half, &timesteps(&[999])).expect("they fit");
    assert_eq!((found.kind(), values(&found)), (Kind::Half, vec![1.0, 1.0]));
}

#[test]
fn mismatches_are_refused_by_name() {
    let sampler = Lcm::new(stable_diffusion());
    let said = Prediction { x0: rows(1, &[0.0]), epsilon: rows(1, &[0.0]) };
    let message =
        sampler.step(&SamplerStep::new(&said, &[9], &[3])).expect_err("no noise").to_string();
    assert!(message.contains("Sampler::step") && message.contains("requires `noise`"), "{message}");
    let noise = rows(1, &[0.0, 0.0]);
    let step = SamplerStep::new(&said, &[9], &[3]).with_noise(&noise);
    assert!(sampler.step(&step).expect_err("a misfit").to_string().contains("[1, 2]"));
    let (boundary, t) = (ConsistencyBoundary::default(), timesteps(&[9]));
    assert!(boundary.apply(&rows(1, &[0.0]), &rows(2, &[0.0]), &t).is_err());
    assert!(boundary.apply(&rows(2, &[0.0]), &rows(2, &[0.0]), &t).is_err());
    let text = r#"{"sigma_data": 0.5, "timestep_scale": 10}"#;
    assert!(serde_json::from_str::<ConsistencyBoundary>(text).is_err());
}
