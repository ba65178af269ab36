use ddil_core::{Conditioning, Denoiser, Thresholded};
use ddil_losses::{
    ConsistencyDistance, LatentConsistency, LatentConsistencyConfig, LossTerms, Networks,
    Objective, ObjectiveConfig, Phase, Solver, TeacherGuidance,
};
use ddil_schedulers::{
    ConsistencyBoundary, Ddim, NoiseSchedule, Prediction, Sampler, SamplerStep, Thresholding,
    Timesteps,
};
use tch::{Kind, Tensor, kind};

use crate::toy::{
    Echo, Gaussian, Linear, Recorder, Silent, TwoPoints, gap, loss_at, schedules, states, values,
};

fn solver_grid() -> Timesteps {
    Timesteps::lcm(1000, 50, 50).expect("50 divides 1000")
}

fn method(schedule: &NoiseSchedule, config: LatentConsistencyConfig) -> LatentConsistency {
    LatentConsistency::new(config, schedule.clone(), solver_grid()).expect("valid settings")
}

fn l2() -> LatentConsistencyConfig {
    LatentConsistencyConfig::default().with(|config| config.loss = ConsistencyDistance::L2 {})
}

fn networks_of<'a>(
    student: &'a dyn Denoiser,
    teacher: &'a dyn Denoiser,
    target: &'a dyn Denoiser,
) -> Networks<'a> {
    Networks::new(student, teacher).with_target(target)
}

fn loss(
    method: &LatentConsistency,
    batch: &ddil_core::States,
    networks: &Networks<'_>,
) -> LossTerms {
    loss_at(method, 0, Phase::Student, batch, networks).expect("valid states")
}

/// From all along the grid; the last one's step ends at timestep 0.
const ENTRIES: [usize; 6] = [0, 12, 25, 37, 48, 49];

/// Where the solver's step from an entry ends.
fn end_of(entry: usize) -> i64 {
    solver_grid().as_slice().get(entry + 1).copied().unwrap_or(0)
}

/// The target of the student at `x`, where the solver's clean data are `x0` and the average returns `factor` times its
/// input; with the solver's state.
fn expected(schedule: &NoiseSchedule, entry: usize, x: f64, x0: f64, factor: f64) -> (f64, f64) {
    let (t, s) = (solver_grid().as_slice()[entry], end_of(entry));
    let [now, next] = [t, s].map(|t| schedule.scale_at(t).expect("on the grid"));
    let epsilon = (x - now.alpha * x0) / now.sigma;
    let x_s = next.alpha * x0 + next.sigma * epsilon;
    let (c_skip, c_out) = ConsistencyBoundary::default().scalings(s);
    (c_skip * x_s + c_out * factor * x_s, x_s)
}

/// Loss and its derivative by the student's factor, of one value.
fn by_hand(distance: ConsistencyDistance, t: i64, x: f64, factor: f64, target: f64) -> (f64, f64) {
    let (c_skip, c_out) = ConsistencyBoundary::default().scalings(t);
    let error = c_skip * x + c_out * factor * x - target;
    match distance {
        ConsistencyDistance::L2 {} => (error.powi(2), 2.0 * error * c_out * x),
        ConsistencyDistance::Huber { c } => {
            let root = error.hypot(c);
            (root - c, error / root * c_out * x)
        }
    }
}

/// One state per entry, in separate batches, so that each has its own derivative.
fn is_closed_form(
    schedule: &NoiseSchedule,
    teacher: &dyn Denoiser,
    teacher_x0: impl Fn(i64, f64) -> f64,
) {
    for distance in [ConsistencyDistance::L2 {}, ConsistencyDistance::Huber { c: 0.05 }] {
        let lcm = method(
            schedule,
            LatentConsistencyConfig::default().with(|config| config.loss = distance),
        );
        for entry in ENTRIES {
            let student = Linear::trainable(schedule.clone(), 0.8);
            let target = Linear { schedule: schedule.clone(), factor: Tensor::from(0.7) };
            let x = [0.4, -1.3];
            let batch = states(Tensor::from_slice(&x).view([1, 2]), &solver_grid(), &[entry]);
            let terms = loss(&lcm, &batch, &networks_of(&student, teacher, &target));
            terms.per_sample.sum(Kind::Double).backward();

            let t = solver_grid().as_slice()[entry];
            let [first, second] = x.map(|x| {
                let (y, _) = expected(schedule, entry, x, teacher_x0(t, x), 0.7);
                by_hand(distance, t, x, 0.8, y)
            });
            let means = [f64::midpoint(first.0, second.0), f64::midpoint(first.1, second.1)];
            let found = [values(&terms.per_sample)[0], student.factor.grad().double_value(&[])];
            for (found, mean) in found.into_iter().zip(means) {
                assert!((found - mean).abs() < 1e-10 * mean.abs().max(1e-3), "{found} {mean} {t}");
            }
        }
    }
}

#[test]
fn the_loss_of_a_gaussian_teacher_and_its_derivative_are_closed_forms() {
    for schedule in schedules() {
        let teacher = Gaussian { schedule: schedule.clone(), mean: 0.2, std: 0.7 };
        is_closed_form(&schedule, &teacher, |t, x| {
            let (slope, offset) = teacher.line(t);
            slope * x + offset
        });
    }
}

#[test]
fn so_are_those_of_a_two_mode_teacher() {
    let [schedule, flow, _] = schedules();
    for schedule in [schedule, flow] {
        let teacher = TwoPoints { schedule: schedule.clone(), at: 0.9 };
        is_closed_form(&schedule, &teacher, |t, x| teacher.x0(t, x));
    }
}

#[test]
fn the_last_target_is_the_state_of_the_solver_whatever_the_average_returns() {
    for schedule in schedules() {
        let teacher = Gaussian { schedule: schedule.clone(), mean: 0.1, std: 0.5 };
        let [student, wild] =
            [0.5, 1e6].map(|f| Linear { schedule: schedule.clone(), factor: Tensor::from(f) });
        let x_t = Tensor::randn([2, 5], kind::DOUBLE_CPU);
        let batch = states(x_t, &solver_grid(), &[49, 48]);
        let lcm = method(&schedule, LatentConsistencyConfig::default());
        let terms = loss(&lcm, &batch, &networks_of(&student, &teacher, &wild));
        let next = terms.teacher_next.expect("the teacher took the step");
        let row = |tensor: &Tensor, i| tensor.narrow(0, i, 1);
        assert_eq!(gap(&row(&terms.target, 0), &row(&next, 0)), 0.0);
        // One entry earlier the target is the average's output alone.
        assert!(gap(&row(&terms.target, 1), &row(&next, 1)) > 1e3);
    }
}

#[test]
fn the_solver_takes_a_ddim_step_to_the_next_timestep() {
    for schedule in schedules() {
        let teacher = Gaussian { schedule: schedule.clone(), mean: 0.3, std: 0.6 };
        let batch = states(Tensor::randn([6, 2, 3], kind::DOUBLE_CPU), &solver_grid(), &ENTRIES);
        let lcm = method(&schedule, LatentConsistencyConfig::default());
        let terms = loss(&lcm, &batch, &networks_of(&teacher, &teacher, &teacher));
        let said = teacher
            .predict(&batch.x_t, &batch.timesteps, &batch.conditioning)
            .expect("it can answer");
        let ends = ENTRIES.map(end_of);
        let timesteps = Vec::try_from(&batch.timesteps).expect("one timestep per sample");
        let step = SamplerStep::new(&said, &timesteps, &ends);
        let landed = Ddim::new(schedule).step(&step).expect("the shapes agree");
        assert!(gap(&landed, &terms.teacher_next.expect("the teacher took the step")) < 1e-12);
    }
}

/// The scalings at timesteps 19 and 259, from the formula in 40 decimal digits.
#[test]
fn the_boundary_is_around_the_student() {
    let [schedule, ..] = schedules();
    let lcm = method(&schedule, l2());
    let network = Linear { schedule, factor: Tensor::from(0.0) };
    let batch = states(Tensor::ones([2, 1], kind::DOUBLE_CPU), &solver_grid(), &[49, 37]);
    let found = values(&loss(&lcm, &batch, &networks_of(&network, &network, &network)).student_x0);
    for (found, c_skip) in
        found.into_iter().zip([6.925_159_797_062_383e-6, 3.726_837_564_778_493e-8])
    {
        assert!((found / c_skip - 1.0).abs() < 1e-9, "{found} {c_skip}");
    }
}

#[test]
fn without_a_teacher_the_average_takes_its_place() {
    let [schedule, ..] = schedules();
    let average = Gaussian { schedule: schedule.clone(), mean: 0.2, std: 0.7 };
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(0.4) };
    let silent = Silent(schedule.clone());
    let batch = states(Tensor::randn([6, 3], kind::DOUBLE_CPU), &solver_grid(), &ENTRIES);
    let own = method(&schedule, l2().with(|config| config.solver = Solver::Target));
    let taught = method(&schedule, l2());

    let alone = loss(&own, &batch, &networks_of(&student, &silent, &average));
    let with = loss(&taught, &batch, &networks_of(&student, &average, &average));
    assert_eq!(gap(&alone.per_sample, &with.per_sample), 0.0);
    assert!(alone.teacher_next.is_none() && with.teacher_next.is_some());
    assert!(!own.requirements().teacher && taught.requirements().teacher);
    assert!(
        loss_at(&taught, 0, Phase::Student, &batch, &networks_of(&student, &silent, &average))
            .is_err()
    );
}

#[test]
fn the_student_alone_gets_a_gradient() {
    let [schedule, ..] = schedules();
    let [student, teacher, target] =
        [0.5, 0.9, 0.7].map(|factor| Linear::trainable(schedule.clone(), factor));
    let lcm = method(&schedule, LatentConsistencyConfig::default());
    let batch = states(Tensor::randn([3, 4], kind::DOUBLE_CPU), &solver_grid(), &[0, 20, 49]);
    let terms = loss(&lcm, &batch, &networks_of(&student, &teacher, &target));
    assert!(!terms.target.requires_grad() && !terms.student_x0.requires_grad());
    assert!(terms.teacher_next.is_some_and(|next| !next.requires_grad()));
    terms.per_sample.mean(Kind::Double).backward();
    assert!(student.factor.grad().double_value(&[]) != 0.0);
    assert!(!teacher.factor.grad().defined() && !target.factor.grad().defined());
}

#[test]
fn each_sample_of_a_mixed_batch_is_treated_as_it_would_be_alone() {
    let [schedule, ..] = schedules();
    let lcm = method(&schedule, LatentConsistencyConfig::default());
    let teacher = TwoPoints { schedule: schedule.clone(), at: 0.5 };
    let [student, target] =
        [0.3, 0.4].map(|f| Linear { schedule: schedule.clone(), factor: Tensor::from(f) });
    let networks = networks_of(&student, &teacher, &target);
    let x_t = Tensor::randn([7, 5], kind::DOUBLE_CPU);
    let indices = [4, 49, 0, 33, 33, 1, 48];
    let together = loss(&lcm, &states(x_t.shallow_clone(), &solver_grid(), &indices), &networks);
    for (i, index) in (0..).zip(indices) {
        let alone = loss(&lcm, &states(x_t.narrow(0, i, 1), &solver_grid(), &[index]), &networks);
        assert_eq!(gap(&together.per_sample.narrow(0, i, 1), &alone.per_sample), 0.0);
        assert_eq!(gap(&together.target.narrow(0, i, 1), &alone.target), 0.0);
    }
}

#[test]
fn the_average_is_evaluated_where_the_solver_ends_and_the_others_at_the_state() {
    let [schedule, ..] = schedules();
    let lcm = method(&schedule, LatentConsistencyConfig::default());
    let [student, teacher, target] = [(); 3].map(|()| Recorder::new(schedule.clone()));
    let mut batch = states(Tensor::randn([3, 2], kind::DOUBLE_CPU), &solver_grid(), &[0, 30, 49]);
    batch.conditioning = Conditioning::class_labels(Tensor::from_slice(&[7_i64, 8, 9]));
    loss(&lcm, &batch, &networks_of(&student, &teacher, &target));
    let labels = vec![7, 8, 9];
    let here = [(vec![999, 399, 19], labels.clone())];
    assert_eq!(*student.calls.borrow(), here);
    assert_eq!(*teacher.calls.borrow(), here);
    assert_eq!(*target.calls.borrow(), [(vec![979, 379, 0], labels)]);
}

/// A teacher guided by a weight per sample, and a student that takes the weight as input.
#[test]
fn teacher_student_and_average_receive_the_same_conditioning() {
    let [schedule, ..] = schedules();
    let lcm = method(&schedule, l2());
    let echo = Echo(schedule.clone());
    let null = Conditioning::class_labels(Tensor::from_slice(&[1_i64]));
    let teacher =
        TeacherGuidance::CfgRange { min: 0.0, max: 9.0 }.wrap(&echo, null).expect("valid settings");
    let mut batch = states(Tensor::zeros([2, 1], kind::DOUBLE_CPU), &solver_grid(), &[10, 10]);
    batch.conditioning = Conditioning::class_labels(Tensor::from_slice(&[3_i64, 4]))
        .with_guidance_weight(Tensor::from_slice(&[0.5_f32, 2.0]));
    let terms = loss(&lcm, &batch, &networks_of(&echo, &*teacher, &echo));

    let (t, s) = (solver_grid().as_slice()[10], end_of(10));
    let [now, next] = [t, s].map(|t| schedule.scale_at(t).expect("on the grid"));
    let gain = next.alpha - next.sigma / now.sigma * now.alpha;
    let x_s = values(&terms.teacher_next.expect("the teacher took the step"));
    let (c_skip, c_out) = ConsistencyBoundary::default().scalings(s);
    // The label plus the effect of the weight: 3 + 0.5 (3 - 1) and 4 + 2 (4 - 1); the others receive 3.5 and 6.
    for (i, (guided, told)) in [(4.0, 3.5), (10.0, 6.0)].into_iter().enumerate() {
        assert!((x_s[i] / (gain * guided) - 1.0).abs() < 1e-6, "{x_s:?}");
        let target = values(&terms.target)[i];
        assert!((target - (c_skip * x_s[i] + c_out * told)).abs() < 1e-6, "{target}");
        let (_, c_out) = ConsistencyBoundary::default().scalings(t);
        assert!((values(&terms.student_x0)[i] - c_out * told).abs() < 1e-6);
    }
}

#[test]
fn teacher_and_average_are_thresholded_and_the_student_is_not() {
    let [schedule, ..] = schedules();
    let lcm = method(&schedule, LatentConsistencyConfig::default());
    let wild = Linear { schedule, factor: Tensor::from(5.0) };
    let held = || Thresholded::new(&wild, Thresholding::clamp_pixels()).expect("valid bounds");
    let (teacher, target) = (held(), held());
    let x_t = Tensor::randn([60, 3], kind::FLOAT_CPU);
    let batch = states(x_t, &solver_grid(), &ENTRIES.repeat(10));
    let terms = loss(&lcm, &batch, &networks_of(&wild, &teacher, &target));
    // All but the states at timestep 0, which are not in the box yet.
    let inner = terms.target.view([10, 6, 3]).narrow(1, 0, 5).abs().max().double_value(&[]);
    assert!(inner <= 1.0 + 1e-4, "{inner}");
    assert!(terms.student_x0.abs().max().double_value(&[]) > 1.0);
}

#[test]
fn unsupported_requests_are_refused_by_name() {
    let [schedule, flow, _] = schedules();
    let lcm = method(&schedule, LatentConsistencyConfig::default());
    let network = Gaussian { schedule: schedule.clone(), mean: 0.0, std: 1.0 };
    let other = Gaussian { schedule: flow, mean: 0.0, std: 1.0 };
    let networks = networks_of(&network, &network, &network);
    let batch = |t: i64, index| {
        let mut batch = states(Tensor::zeros([1, 2], kind::DOUBLE_CPU), &solver_grid(), &[0]);
        (batch.timesteps, batch.grid_indices) = (Tensor::from_slice(&[t]), vec![index]);
        batch
    };
    let say = |phase, batch: &ddil_core::States, networks: &Networks<'_>| {
        loss_at(&lcm, 0, phase, batch, networks).expect_err("it cannot be done").to_string()
    };
    assert!(say(Phase::Critic, &batch(999, 0), &networks).contains("Critic"));
    let message = say(Phase::Student, &batch(999, 0), &Networks::new(&network, &network));
    assert!(message.contains("requires a moving average"), "{message}");
    for (t, index) in [(998, 0), (0, 0), (-1, 0), (1000, 0), (999, 50)] {
        let message = say(Phase::Student, &batch(t, index), &networks);
        assert!(message.contains("[999, 979, 959"), "{message}");
    }
    for (name, networks) in [
        ("student", networks_of(&other, &network, &network)),
        ("teacher", networks_of(&network, &other, &network)),
        ("target", networks_of(&network, &network, &other)),
    ] {
        let message = say(Phase::Student, &batch(999, 0), &networks);
        assert!(message.contains(&format!("{name} has another noise schedule")), "{message}");
    }
}

#[test]
fn invalid_settings_are_refused_by_name() {
    let [schedule, ..] = schedules();
    let good = LatentConsistencyConfig::default;
    let huber = |c| ConsistencyDistance::Huber { c };
    for (named, config) in [
        ("loss.c", good().with(|config| config.loss = huber(0.0))),
        ("loss.c", good().with(|config| config.loss = huber(f64::NAN))),
        ("ema_decay", good().with(|config| config.ema_decay = 1.0)),
        ("ema_decay", good().with(|config| config.ema_decay = -0.1)),
        ("timestep_scaling", good().with(|config| config.timestep_scaling = 0.0)),
        ("sigma_data", good().with(|config| config.sigma_data = f64::INFINITY)),
    ] {
        let refused = LatentConsistency::new(config, schedule.clone(), solver_grid());
        let message = refused.expect_err("it cannot be").to_string();
        assert!(message.starts_with(&format!("`{named}`")), "{message}");
    }
    for num_ddim_timesteps in [0, 1001] {
        let config = good().with(|config| config.num_ddim_timesteps = num_ddim_timesteps);
        let refused = ObjectiveConfig::Lcm(config).training_grid(&schedule, 4);
        let message = refused.expect_err("there is no such grid").to_string();
        assert!(message.contains("`num_ddim_timesteps`"), "{message}");
    }
    assert!(ObjectiveConfig::Lcm(good()).sampling_grid(&schedule, 51).is_err());
    let to_zero = Timesteps::explicit(vec![999, 0], 1000).expect("it falls");
    let refused = LatentConsistency::new(good(), schedule, to_zero);
    let message = refused.expect_err("nothing is left to do at 0").to_string();
    assert!(message.contains("[999, 0]"), "{message}");
}

#[test]
fn its_student_samples_at_some_of_the_timesteps_it_is_trained_at() {
    let [schedule, ..] = schedules();
    let config = LatentConsistencyConfig::default().with(|config| config.sigma_data = 0.7);
    let boundary = config.boundary();
    let method = ObjectiveConfig::Lcm(config);
    let training = method.training_grid(&schedule, 4).expect("it exists");
    assert_eq!(training, solver_grid());
    for steps in 1..=50 {
        let sampling = method.sampling_grid(&schedule, steps).expect("at most 50");
        assert_eq!(sampling.len(), steps as usize);
        assert!(sampling.as_slice().iter().all(|t| training.as_slice().contains(t)));
        assert_eq!(sampling.as_slice()[0], 999);
    }
    let sampler = method.sampler_config(&schedule);
    assert_eq!((sampler.boundary(), method.as_str()), (Some(boundary), "lcm"));
    let sampler = sampler.build(&schedule).expect("valid settings");
    assert!(sampler.needs_noise(), "it noises its estimates again");
    let objective = method.build(&schedule, &training).expect("valid settings");
    assert_eq!(objective.phases(3), [Phase::Student]);
    assert_eq!(objective.requirements().target_decay, Some(0.95));
}

/// A consistency function has one value along a trajectory: where all data are one point that is the point.
#[test]
fn a_student_that_is_consistent_has_next_to_no_loss() {
    struct Point(NoiseSchedule);
    impl Denoiser for Point {
        fn predict(
            &self,
            x_t: &Tensor,
            t: &Tensor,
            _: &Conditioning,
        ) -> ddil_core::Result<Prediction> {
            Ok(Prediction::from_x0(&self.0, x_t.full_like(0.3), x_t, t)?)
        }
        fn schedule(&self) -> &NoiseSchedule {
            &self.0
        }
    }
    let [schedule, ..] = schedules();
    let lcm = method(&schedule, l2());
    let network = Point(schedule);
    let x_t = Tensor::randn([49, 3], kind::DOUBLE_CPU);
    let batch = states(x_t, &solver_grid(), &(0..49).collect::<Vec<_>>());
    let terms = loss(&lcm, &batch, &networks_of(&network, &network, &network));
    // The remainder is the share of the noise that the boundary lets through.
    assert!(terms.per_sample.max().double_value(&[]) < 1e-8);
}
