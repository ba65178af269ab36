use std::cell::RefCell;

use ddil_core::{
    Conditioning, Denoiser, Draws, Error, MixedRollout, MixedVariant, RandomStreams, Rollout,
    Stream, Trajectory, first_state,
};
use ddil_libtorch::ArgumentError;
use ddil_schedulers::{
    Ddim, EdmConfig, Lcm, NoiseSchedule, NoiseScheduleConfig, Prediction, Timesteps,
};
use tch::{Device, Kind, Tensor};

use crate::common::{Gaussian, SHAPES, labels, max_abs_difference, normal, schedule, trailing};

fn draws() -> Draws {
    RandomStreams::new(0, 0).draws(0, Stream::Sample, Device::Cpu).expect("the CPU is there")
}

/// The whole trajectory of a denoiser by DDIM.
fn states_of(
    denoiser: &dyn Denoiser,
    timesteps: &Timesteps,
    noise: Tensor,
    conditioning: &Conditioning,
) -> ddil_core::Result<Trajectory> {
    let ddim = Ddim::new(schedule());
    Rollout::new(denoiser, &ddim, timesteps).conditioning(conditioning).run(noise)
}

/// The position of each sample, which stops at its own timestep.
fn stopped(
    student: &Gaussian,
    noise: &Tensor,
    conditioning: &Conditioning,
    targets: &[i64],
) -> ddil_core::Result<Tensor> {
    let (ddim, grid) = (Ddim::new(schedule()), trailing(4));
    let rollout = MixedRollout::new((student, &ddim, &grid), (student, &ddim, &grid), None);
    let visited = rollout.visit(noise, conditioning, targets, &mut draws())?;
    let state = |(row, &target)| match visited.position(row, target) {
        Some(position) => visited.x_t.get(position as i64),
        None => noise.get(row as i64),
    };
    Ok(Tensor::stack(&targets.iter().enumerate().map(state).collect::<Vec<_>>(), 0))
}

/// Returns a tensor that requires a gradient.
struct Trainable(NoiseSchedule, Tensor);
impl Denoiser for Trainable {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        _: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        Ok(Prediction::from_x0(&self.0, x_t * &self.1, x_t, timesteps)?)
    }
    fn schedule(&self) -> &NoiseSchedule {
        &self.0
    }
}

#[test]
fn runs_for_any_rank_and_without_gradients() -> ddil_core::Result<()> {
    let weight = Tensor::from(0.5_f32).set_requires_grad(true);
    let student = Trainable(schedule(), weight);
    let (sampler, grid) = (Ddim::new(schedule()), trailing(4));
    for shape in SHAPES {
        let noise = normal(1, shape);
        let first = noise.shallow_clone();
        let trajectory = Rollout::new(&student, &sampler, &grid).run(noise)?;
        assert_eq!(trajectory.states.len(), 4);
        assert_eq!(trajectory.states[0], first);
        assert!(trajectory.states.iter().all(|state| state.size() == shape));
        assert!(!trajectory.x0.requires_grad());
        let noise = normal(1, shape);
        let x0 = Rollout::new(&student, &sampler, &grid).sample(noise)?;
        assert_eq!(x0, trajectory.x0);
    }
    // Gradients are on again.
    assert!((Tensor::from(1_f32) * &student.1).requires_grad());
    Ok(())
}

/// Every step of a rollout is the sampler's formula, here written out by hand.
#[test]
fn ddim_rollout_is_the_formula() -> ddil_core::Result<()> {
    let teacher = Gaussian::new(0.3, 0.1, 0.5);
    let noise = normal(2, &[3, 4]);
    let mut x_t = noise.copy();
    let trajectory = states_of(&teacher, &trailing(4), noise, &labels(3))?;
    for (i, (timestep, prev)) in trailing(4).pairs().enumerate() {
        assert!(max_abs_difference(&trajectory.states[i], &x_t) < 1e-5);
        let timesteps = Tensor::full([3], timestep, (Kind::Int64, Device::Cpu));
        let Prediction { x0, epsilon } = teacher.predict(&x_t, &timesteps, &labels(3))?;
        let scale = schedule().scale_at(prev)?;
        x_t = x0 * scale.alpha + epsilon * scale.sigma;
    }
    assert!(max_abs_difference(&trajectory.x0, &x_t) < 1e-5);
    Ok(())
}

#[test]
fn each_sample_stops_at_its_own_timestep() -> ddil_core::Result<()> {
    let student = Gaussian::new(0.3, 0.1, 0.5);
    for shape in [&[6, 4][..], &[6, 2, 3, 3]] {
        let noise = normal(3, shape);
        let whole = states_of(&student, &trailing(4), noise.copy(), &labels(6))?;
        student.num_evaluated.set(0);
        let indices = [2_usize, 0, 3, 1, 2, 3];
        let mut targets: Vec<i64> = indices.iter().map(|&i| trailing(4).as_slice()[i]).collect();
        targets[5] = -1;
        let stopped = stopped(&student, &noise, &labels(6), &targets)?;
        for (row, &index) in indices.iter().enumerate() {
            let expected = if row == 5 { &whole.x0 } else { &whole.states[index] };
            let row = row as i64;
            assert!(max_abs_difference(&stopped.get(row), &expected.get(row)) < 1e-5, "{row}");
        }
        // Only unfinished samples are evaluated: one call per interval.
        assert_eq!(student.num_evaluated.get(), 2 + 3 + 1 + 2 + 4);
    }
    Ok(())
}

/// A target between two timesteps is reached by one shorter step.
#[test]
fn stops_between_its_timesteps() -> ddil_core::Result<()> {
    let student = Gaussian::new(0.3, 0.0, 0.5);
    let noise = normal(3, &[2, 4]);
    let stopped = stopped(&student, &noise, &labels(2), &[600, 100])?;
    for (row, list) in [(0, vec![999, 749, 600]), (1, vec![999, 749, 499, 249, 100])] {
        let grid = Timesteps::explicit(list, 1000)?;
        let alone = states_of(&student, &grid, noise.copy(), &labels(2))?;
        let last = alone.states.last().expect("there are states").get(row);
        assert!(max_abs_difference(&stopped.get(row), &last) < 1e-5);
    }
    Ok(())
}

#[test]
fn refuses_mismatches() -> ddil_core::Result<()> {
    let student = Gaussian::new(0.3, 0.0, 0.5);
    let (ddim, lcm, grid) = (Ddim::new(schedule()), Lcm::new(schedule()), trailing(4));
    let noise = || normal(3, &[2, 4]);
    let missing = Rollout::new(&student, &lcm, &grid).conditioning(&labels(2)).sample(noise());
    assert!(matches!(missing, Err(Error::Scheduler(ddil_schedulers::Error::NoiseMissing { .. }))));
    let two = labels(2);
    let mut one = [ddil_core::Generator::new(Device::Cpu, 0)?];
    let rollout = Rollout::new(&student, &lcm, &grid).conditioning(&two).generators(&mut one);
    assert!(matches!(rollout.sample(noise()), Err(Error::Argument(_))));
    let conditioning = states_of(&student, &grid, noise(), &labels(3));
    assert!(
        matches!(conditioning, Err(Error::Conditioning { field, .. }) if field == "class_labels")
    );
    let untold = states_of(&student, &grid, noise(), &Conditioning::none());
    assert!(matches!(untold, Err(Error::ConditioningMissing { .. })));
    let scalar = states_of(&student, &grid, Tensor::from(1.0), &labels(1));
    assert!(matches!(scalar, Err(Error::Argument(ArgumentError::Shape { .. }))));
    let beyond = stopped(&student, &noise(), &labels(2), &[1000, 3]);
    assert!(matches!(beyond, Err(Error::Invalid(_))));
    let few = stopped(&student, &noise(), &labels(2), &[3]);
    assert!(matches!(few, Err(Error::Argument(ArgumentError::Shape { .. }))));
    let kept = Timesteps::explicit(vec![999, 3], 1000)?;
    let unvisited = Rollout::new(&student, &ddim, &grid).keep(&kept).run(noise());
    assert!(matches!(unvisited, Err(Error::Invalid(_))));
    Ok(())
}

#[test]
fn stochastic_rollouts_follow_their_generator() -> ddil_core::Result<()> {
    let student = Gaussian::new(0.3, 0.0, 0.5);
    let lcm = Lcm::new(schedule());
    let run = |seed| -> ddil_core::Result<Tensor> {
        let mut generator = ddil_core::Generator::new(Device::Cpu, seed)?;
        let noise = normal(3, &[2, 4]);
        let (grid, labels) = (trailing(4), labels(2));
        let rollout = Rollout::new(&student, &lcm, &grid).conditioning(&labels);
        rollout.generator(&mut generator).sample(noise)
    };
    assert_eq!(run(1)?, run(1)?);
    assert_ne!(run(1)?, run(2)?);
    Ok(())
}

#[test]
fn first_state_follows_the_family() -> ddil_core::Result<()> {
    let noise = normal(0, &[2, 3]);
    assert_eq!(first_state(&schedule(), 999, &noise)?, noise);
    let edm = NoiseScheduleConfig::Edm(EdmConfig::default()).build()?;
    assert!(max_abs_difference(&first_state(&edm, 999, &noise)?, &(&noise * 80.0)) < 1e-3);
    Ok(())
}

/// Student and teacher have different means, so that a state shows which of them made it.
struct Pair {
    student: Gaussian,
    teacher: Gaussian,
    ddim: Ddim,
    grid: Timesteps,
    fine: Timesteps,
}

impl Pair {
    fn new() -> Self {
        let grid = trailing(4);
        let fine = grid.refined(2, 1000).expect("there is room");
        Self {
            student: Gaussian::new(-0.5, 0.0, 0.5),
            teacher: Gaussian::new(0.5, 0.0, 0.5),
            ddim: Ddim::new(schedule()),
            grid,
            fine,
        }
    }

    fn rollout(&self, variant: Option<MixedVariant>) -> MixedRollout<'_> {
        MixedRollout::new(
            (&self.student, &self.ddim, &self.grid),
            (&self.teacher, &self.ddim, &self.fine),
            variant,
        )
    }

    /// States at the grid's indices 1, 2 and 3 under `variant`.
    fn states(&self, noise: &Tensor, variant: Option<MixedVariant>) -> Vec<Tensor> {
        let n = noise.size()[0] as usize;
        let visited = self
            .rollout(variant)
            .visit(noise, &labels(n), &vec![249; n], &mut draws())
            .expect("all fits");
        let at = |timestep: i64| {
            let places = (0..n).map(|row| visited.position(row, timestep).expect("it was passed"));
            let rows: Vec<Tensor> = places.map(|place| visited.x_t.get(place as i64)).collect();
            Tensor::stack(&rows, 0)
        };
        [749, 499, 249].map(at).into()
    }
}

/// The acceptance test of mixed rollouts: the teacher in every interval is the teacher's own trajectory.
#[test]
fn teacher_as_student_is_the_teachers_trajectory() -> ddil_core::Result<()> {
    let pair = Pair::new();
    let noise = normal(4, &[5, 3]);
    let labels = labels(5);
    let own = Rollout::new(&pair.teacher, &pair.ddim, &pair.fine).conditioning(&labels);
    let own = own.keep(&pair.grid).run(noise.copy())?;
    for variant in [
        MixedVariant::Bernoulli { kappa: 1.0 },
        MixedVariant::TeacherThenStudent { switch: 4 },
        MixedVariant::StudentThenTeacher { switch: 0 },
        MixedVariant::Conditional { threshold: 0.0 },
    ] {
        let states = pair.states(&noise, Some(variant));
        for (states_of, own) in states.iter().zip(&own.states[1..]) {
            assert!(max_abs_difference(states_of, own) < 1e-5, "{variant:?}");
        }
    }
    // And with the teacher as student, in steps of the teacher's grid.
    let lent =
        (&pair.teacher as &dyn Denoiser, &pair.ddim as &dyn ddil_schedulers::Sampler, &pair.fine);
    let lent = MixedRollout::new(lent, lent, None);
    let visited = lent.visit(&noise, &labels, &[249; 5], &mut draws())?;
    let place = visited.position(3, 249).expect("it was passed") as i64;
    assert!(max_abs_difference(&visited.x_t.get(place), &own.states[3].get(3)) < 1e-5);
    Ok(())
}

#[test]
fn student_alone_is_the_students_trajectory() -> ddil_core::Result<()> {
    let pair = Pair::new();
    let noise = normal(4, &[5, 3]);
    let own = states_of(&pair.student, &pair.grid, noise.copy(), &labels(5))?;
    for variant in [
        None,
        Some(MixedVariant::Bernoulli { kappa: 0.0 }),
        Some(MixedVariant::TeacherThenStudent { switch: 0 }),
        Some(MixedVariant::StudentThenTeacher { switch: 4 }),
        Some(MixedVariant::Conditional { threshold: 1e9 }),
    ] {
        for (states_of, own) in pair.states(&noise, variant).iter().zip(&own.states[1..]) {
            assert!(max_abs_difference(states_of, own) < 1e-5, "{variant:?}");
        }
    }
    Ok(())
}

#[test]
fn student_and_teacher_switch_where_they_should() -> ddil_core::Result<()> {
    let pair = Pair::new();
    let noise = normal(4, &[2, 3]);
    let student = states_of(&pair.student, &pair.grid, noise.copy(), &labels(2))?;
    let switched = pair.states(&noise, Some(MixedVariant::StudentThenTeacher { switch: 1 }));
    assert!(max_abs_difference(&switched[0], &student.states[1]) < 1e-5);
    let rest = Timesteps::explicit(vec![749, 624, 499], 1000)?;
    let on = states_of(&pair.teacher, &rest, student.states[1].copy(), &labels(2))?;
    assert!(max_abs_difference(&switched[1], &on.states[2]) < 1e-5);
    Ok(())
}

/// In each interval each sample has its own coin, and a state is the teacher's by half in half of the cases.
#[test]
fn bernoulli_choices_are_drawn_per_sample() -> ddil_core::Result<()> {
    let pair = Pair::new();
    let n = 2000;
    let rollout = pair.rollout(Some(MixedVariant::Bernoulli { kappa: 0.25 }));
    let visited = rollout.visit(
        &normal(4, &[n, 1]),
        &labels(n as usize),
        &vec![249; n as usize],
        &mut draws(),
    )?;
    for (level, timestep) in [749, 499, 249].into_iter().enumerate() {
        let acted = (0..visited.rows.len())
            .filter(|&i| visited.timesteps[i] == timestep && visited.teacher_acted[i])
            .count();
        let share = 1.0 - 0.75_f64.powi(level as i32 + 1);
        let deviation = (share * (1.0 - share) / n as f64).sqrt();
        assert!((acted as f64 / n as f64 - share).abs() < 3.0 * deviation, "{timestep}: {acted}");
    }
    Ok(())
}

/// The teacher takes over those samples that it disagrees on, and keeps them.
#[test]
fn teacher_takes_over_where_it_disagrees() -> ddil_core::Result<()> {
    // Equal for class 0, apart by 2 for class 1.
    let mut pair = Pair::new();
    (pair.student, pair.teacher) = (Gaussian::new(0.0, 0.0, 0.5), Gaussian::new(0.0, 2.0, 0.5));
    let rollout = pair.rollout(Some(MixedVariant::Conditional { threshold: 0.5 }));
    let conditioning = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 1, 0, 1]));
    let visited = rollout.visit(&normal(5, &[4, 6]), &conditioning, &[249; 4], &mut draws())?;
    for i in 0..visited.rows.len() {
        assert_eq!(visited.teacher_acted[i], visited.rows[i] % 2 == 1);
    }
    Ok(())
}

#[test]
fn continues_from_states_along_a_trajectory() -> ddil_core::Result<()> {
    let pair = Pair::new();
    let noise = normal(4, &[3, 2]);
    let whole = pair.states(&noise, None);
    let visited =
        pair.rollout(None).visit_from(1, &whole[0], &labels(3), &[499, 249, 249], &mut draws())?;
    let place = |row, t| visited.position(row, t).expect("it was passed") as i64;
    assert!(max_abs_difference(&visited.x_t.get(place(0, 499)), &whole[1].get(0)) < 1e-5);
    assert!(max_abs_difference(&visited.x_t.get(place(2, 249)), &whole[2].get(2)) < 1e-5);
    assert_eq!(visited.position(0, 249), None);
    let beyond = pair.rollout(None).visit_from(4, &whole[0], &labels(3), &[-1; 3], &mut draws());
    assert!(matches!(beyond, Err(Error::Invalid(invalid)) if invalid.field == "start"));
    Ok(())
}

#[test]
fn variants_are_checked() {
    for variant in [
        MixedVariant::Bernoulli { kappa: 1.1 },
        MixedVariant::Bernoulli { kappa: f64::NAN },
        MixedVariant::Conditional { threshold: -1.0 },
        MixedVariant::Conditional { threshold: f64::NAN },
    ] {
        assert!(matches!(variant.ensure(), Err(Error::Invalid(_))), "{variant:?}");
    }
}

/// A network that fails leaves nothing behind: gradients are on again.
#[test]
fn an_error_during_a_rollout_is_returned() {
    struct Broken(NoiseSchedule, RefCell<u32>);
    impl Denoiser for Broken {
        fn predict(
            &self,
            _: &Tensor,
            _: &Tensor,
            _: &Conditioning,
        ) -> ddil_core::Result<Prediction> {
            *self.1.borrow_mut() += 1;
            Err(Error::network("broken", "out of paint"))
        }
        fn schedule(&self) -> &NoiseSchedule {
            &self.0
        }
    }
    let broken = Broken(schedule(), RefCell::default());
    let failed = states_of(&broken, &trailing(4), normal(0, &[1, 1]), &Conditioning::none());
    assert!(matches!(failed, Err(Error::Network { .. })));
    assert_eq!(*broken.1.borrow(), 1);
    let leaf = Tensor::from(1_f32).set_requires_grad(true);
    assert!((leaf * 2.0).requires_grad());
}
