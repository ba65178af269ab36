use ddil_core::{
    BufferConfig, Clock, Conditioning, Data, Denoiser, Error, Feedback, Grids, LossFeedback,
    MixedVariant, RandomStreams, Rollout, RolloutNetworks, RolloutSteps, Source, SourceConfig,
    SourceRequest, States, StorageKind, StudentConfig, StudentPolicy, StudentSource, TeacherConfig,
    TeacherSource, TeacherStates, TrajectorySource,
};
use ddil_schedulers::{Ddim, Lcm, Sampler, Timesteps};
use tch::{Kind, Tensor};

use crate::common::{Gaussian, SHAPES, max_abs_difference, normal, schedule, trailing};

/// Everything that a request to a source needs.
struct Bench {
    student: Gaussian,
    teacher: Gaussian,
    sampler: Box<dyn Sampler>,
    ddim: Ddim,
    grids: Grids,
    streams: RandomStreams,
}

impl Bench {
    fn new() -> Self {
        let grid = trailing(4);
        Self {
            student: Gaussian::new(-0.5, 0.0, 0.4),
            teacher: Gaussian::new(0.5, 0.0, 0.4),
            sampler: Box::new(Ddim::new(schedule())),
            ddim: Ddim::new(schedule()),
            grids: Grids::new(grid.clone())
                .with_teacher(grid.refined(2, 1000).expect("there is room")),
            streams: RandomStreams::new(3, 0),
        }
    }

    /// A latent consistency model's grids: trained at 50 timesteps, sampled at 4.
    fn lcm() -> Self {
        let grid = Timesteps::lcm(1000, 50, 50).expect("it is valid");
        let grids =
            Grids::new(grid).with_rollout(Timesteps::lcm(1000, 50, 4).expect("it is valid"));
        Self { grids, sampler: Box::new(Lcm::new(schedule())), ..Self::new() }
    }

    /// Requests states with labels `first_label, first_label + 1, ..` as prompts.
    fn states(
        &self,
        source: &mut dyn TrajectorySource,
        step: u64,
        grid_indices: &[usize],
        shape: &[i64],
        first_label: i64,
    ) -> ddil_core::Result<States> {
        let n = grid_indices.len() as i64;
        let mut whole = vec![n];
        whole.extend(shape);
        let prompts = |first: i64| {
            let labels = Tensor::arange_start(first, first + n, (Kind::Int64, tch::Device::Cpu));
            Conditioning::class_labels(labels)
        };
        let data =
            Data::new(Tensor::zeros(&whole, tch::kind::FLOAT_CPU)).with_conditioning(prompts(0));
        let noise = normal(step, &whole);
        let request = SourceRequest::new(
            &Clock::new(step, 100, self.streams),
            grid_indices,
            (&data, &noise),
            &self.grids,
            &*self.sampler,
            RolloutNetworks::new(&self.student, &self.teacher),
        );
        let prompts = prompts(first_label);
        source.states(&request.with_prompts(&prompts).with_teacher_sampler(&self.ddim))
    }

    fn student(&self, policy: StudentPolicy) -> StudentSource {
        let config = StudentConfig::default().with(|config| config.policy = policy);
        StudentSource::new(config, &self.grids).expect("it is valid")
    }
}

fn label_list(states: &States) -> Vec<i64> {
    let labels = states.conditioning.get(Conditioning::CLASS_LABELS).expect("prompts have labels");
    Vec::try_from(labels).expect("they are Int64")
}

/// With a Gaussian student and DDIM, a state is an affine map of its first noise. At index `i` over many samples it
/// must have the mean and spread that the map gives to unit noise.
fn assert_distribution(bench: &Bench, denoiser: &dyn Denoiser, grid: &Timesteps, states: &States) {
    let ends = Tensor::from_slice(&[0_f32, 1.0]).view([2, 1]);
    let none = Conditioning::class_labels(Tensor::zeros([2], tch::kind::INT64_CPU));
    let rollout = Rollout::new(denoiser, &bench.ddim, grid).conditioning(&none);
    let map = rollout.keep(&bench.grids.student).run(ends).expect("it runs");
    for index in 1..bench.grids.student.len() {
        let rows: Vec<i64> = (0..states.len())
            .filter(|&i| states.grid_indices[i] == index)
            .map(|i| i as i64)
            .collect();
        let values = states.x_t.index_select(0, &Tensor::from_slice(&rows)).flatten(0, -1);
        let (offset, one) =
            (map.states[index].double_value(&[0, 0]), map.states[index].double_value(&[1, 0]));
        let unit = (values - offset) / (one - offset);
        let n = unit.numel() as f64;
        let (mean, std) =
            (unit.mean(Kind::Double).double_value(&[]), unit.std(true).double_value(&[]));
        assert!(mean.abs() < 4.0 / n.sqrt(), "index {index}: mean {mean} of {n}");
        assert!((std - 1.0).abs() < 4.0 / (2.0 * n).sqrt(), "index {index}: std {std} of {n}");
    }
}

/// 1, 2, 3, 1, 2, 3, ..
fn cycle(n: usize) -> Vec<usize> {
    (0..n).map(|i| 1 + i % 3).collect()
}

#[test]
fn every_policy_yields_the_students_distribution() -> ddil_core::Result<()> {
    for policy in [
        StudentPolicy::Fresh,
        StudentPolicy::FreshAll,
        StudentPolicy::Buffer {
            new_fraction: 0.5,
            buffer: BufferConfig::default().with(|config| config.storage = StorageKind::F32),
        },
        StudentPolicy::Chain { refresh_fraction: 0.0 },
    ] {
        let bench = Bench::new();
        let mut source = bench.student(policy.clone());
        let states = bench.states(&mut source, 0, &cycle(900), &[4], 0)?;
        assert_eq!(states.grid_indices, cycle(900));
        assert!(states.sources.iter().all(|source| *source == Source::Student));
        if !matches!(policy, StudentPolicy::Buffer { .. }) {
            assert_distribution(&bench, &bench.student, &bench.grids.student, &states);
        }
        let again = bench.states(&mut source, 1, &cycle(900), &[4], 0)?;
        assert_ne!(states.x_t, again.x_t);
    }
    Ok(())
}

#[test]
fn policies_cost_what_they_say() -> ddil_core::Result<()> {
    let indices = [1, 2, 3, 3, 2, 1, 1, 3];
    let bench = Bench::new();
    let mut fresh = bench.student(StudentPolicy::Fresh);
    let _ = bench.states(&mut fresh, 0, &indices, &[2], 0)?;
    assert_eq!(bench.student.num_evaluated.take(), indices.iter().sum::<usize>() as u64);

    // Three trajectories serve all eight.
    let mut shared = bench.student(StudentPolicy::FreshAll);
    let states = bench.states(&mut shared, 0, &indices, &[2], 100)?;
    assert_eq!(bench.student.num_evaluated.take(), 9);
    assert_eq!(label_list(&states), [100, 100, 100, 103, 103, 103, 106, 106]);

    // All is rolled out while there is nothing, and nothing with a fraction of 0 once there is.
    let buffer = BufferConfig::default();
    let mut source = bench.student(StudentPolicy::Buffer { new_fraction: 0.0, buffer });
    let _ = bench.states(&mut source, 0, &indices, &[2], 0)?;
    assert_eq!(bench.student.num_evaluated.take(), 3 * 8);
    assert_eq!(source.buffer().expect("it has one").len(), 3 * 8);
    let states = bench.states(&mut source, 1, &indices, &[2], 50)?;
    assert_eq!(bench.student.num_evaluated.take(), 0);
    assert!(states.created_at_step.iter().all(|birth| *birth == 0));
    // Beyond the age limit all is rolled out again.
    let states = bench.states(&mut source, 1001, &indices, &[2], 50)?;
    assert_eq!(bench.student.num_evaluated.take(), 3 * 8);
    assert_eq!(label_list(&states), [50, 51, 52, 53, 54, 55, 56, 57]);
    Ok(())
}

/// States of one trajectory are consistent with each other and have its prompt.
#[test]
fn shared_trajectories_are_trajectories() -> ddil_core::Result<()> {
    let mut bench = Bench::new();
    bench.student = Gaussian::new(0.0, 0.5, 0.4);
    let mut source = bench.student(StudentPolicy::FreshAll);
    let states = bench.states(&mut source, 0, &[1, 2, 3], &[5], 2)?;
    assert_eq!(label_list(&states), [2, 2, 2]);
    let prompts = states.conditioning.index_select(&Tensor::from_slice(&[0_i64]))?;
    for index in 1..3_usize {
        let grid = Timesteps::explicit(bench.grids.student.as_slice()[index..].to_vec(), 1000)?;
        let now = states.x_t.narrow(0, index as i64 - 1, 1);
        let rollout = Rollout::new(&bench.student, &bench.ddim, &grid).conditioning(&prompts);
        let on = rollout.run(now)?;
        let next = states.x_t.narrow(0, index as i64, 1);
        assert!(max_abs_difference(&on.states[1], &next) < 1e-5);
    }
    Ok(())
}

/// The student is sampled at 4 timesteps and trained at 50: a state is the last estimate, noised to the requested
/// timestep.
#[test]
fn rollouts_reach_timesteps_between_their_own() -> ddil_core::Result<()> {
    let bench = Bench::lcm();
    // Data without spread: every estimate is the mean, every state `alpha mean + sigma noise`.
    let bench = Bench { student: Gaussian::new(0.7, 0.0, 1e-6), ..bench };
    let indices: Vec<usize> = (0..49 * 20).map(|i| 1 + i % 49).collect();
    for policy in [
        StudentPolicy::Fresh,
        StudentPolicy::Buffer { new_fraction: 0.25, buffer: BufferConfig::default() },
    ] {
        let mut source = bench.student(policy);
        let states = bench.states(&mut source, 0, &indices, &[8], 0)?;
        let scales = bench.student.schedule.scales_at(&states.timesteps, &states.x_t)?;
        let noise = (&states.x_t - scales.alpha * 0.7) / scales.sigma;
        let n = noise.numel() as f64;
        assert!(noise.mean(Kind::Double).double_value(&[]).abs() < 4.0 / n.sqrt());
        assert!((noise.std(true).double_value(&[]) - 1.0).abs() < 4.0 / (2.0 * n).sqrt());
    }
    // One call for each timestep of the rollout that is noisier: 2.44 a state on average.
    let mut fresh = bench.student(StudentPolicy::Fresh);
    bench.student.num_evaluated.set(0);
    let _ = bench.states(&mut fresh, 0, &(1..50).collect::<Vec<_>>(), &[8], 0)?;
    assert_eq!(bench.student.num_evaluated.get(), 12 + 2 * 13 + 3 * 12 + 4 * 12);

    for policy in [StudentPolicy::FreshAll, StudentPolicy::Chain { refresh_fraction: 0.0 }] {
        let config = StudentConfig::default().with(|config| config.policy = policy);
        assert!(matches!(
            StudentSource::new(config, &bench.grids),
            Err(Error::Invalid(invalid)) if invalid.field == "policy.kind"
        ));
    }
    Ok(())
}

/// Each trajectory is on a grid with its own number of steps; for any number, a state is an estimate of its prompt's
/// data, noised to the requested timestep.
#[test]
fn rollouts_may_differ_in_their_steps() -> ddil_core::Result<()> {
    let bench = Bench { student: Gaussian::new(0.0, 0.5, 1e-6), ..Bench::lcm() };
    let indices: Vec<usize> = (0..49 * 20).map(|i| 1 + i % 49).collect();
    let steps = Some(RolloutSteps { min: 2, max: 8 });
    for policy in [
        StudentPolicy::Fresh,
        StudentPolicy::Buffer { new_fraction: 0.25, buffer: BufferConfig::default() },
    ] {
        let config = StudentConfig::default().with(|config| {
            config.policy = policy;
            config.rollout_steps = steps;
        });
        let mut source = StudentSource::new(config.clone(), &bench.grids)?;
        let states = bench.states(&mut source, 0, &indices, &[8], 3)?;
        assert_eq!(label_list(&states), (3..3 + 49 * 20).collect::<Vec<i64>>());
        let scales = bench.student.schedule.scales_at(&states.timesteps, &states.x_t)?;
        let means =
            Tensor::from_slice(&label_list(&states)).to_kind(Kind::Float).view([-1, 1]) * 0.5;
        let noise = (&states.x_t - scales.alpha * means) / scales.sigma;
        let n = noise.numel() as f64;
        assert!(noise.mean(Kind::Double).double_value(&[]).abs() < 5e-3 + 4.0 / n.sqrt());
        assert!((noise.std(true).double_value(&[]) - 1.0).abs() < 5e-3 + 4.0 / (2.0 * n).sqrt());
        let mut again = StudentSource::new(config, &bench.grids)?;
        assert_eq!(states.x_t, bench.states(&mut again, 0, &indices, &[8], 3)?.x_t);
    }
    // At the last index a trajectory of n steps has n evaluations: 5 on average, each of 2 to 8 equally often.
    let config = |min, max| {
        StudentConfig::default().with(|config| {
            config.policy = StudentPolicy::Fresh;
            config.rollout_steps = Some(RolloutSteps { min, max });
        })
    };
    bench.student.num_evaluated.set(0);
    let mut source = StudentSource::new(config(2, 8), &bench.grids)?;
    let _ = bench.states(&mut source, 0, &[49; 700], &[1], 0)?;
    let mean = bench.student.num_evaluated.take() as f64 / 700.0;
    assert!((mean - 5.0).abs() < 4.0 * 2.0 / 700_f64.sqrt(), "{mean}");
    // With four steps only, it costs as much as the four-step grid.
    let mut source = StudentSource::new(config(4, 4), &bench.grids)?;
    let _ = bench.states(&mut source, 0, &(1..50).collect::<Vec<_>>(), &[8], 0)?;
    assert_eq!(bench.student.num_evaluated.take(), 12 + 2 * 13 + 3 * 12 + 4 * 12);
    Ok(())
}

/// Also where the run's own rollouts are on the whole grid, which drawn ones are not.
#[test]
fn rollouts_with_drawn_steps_stop_at_the_requested_state() -> ddil_core::Result<()> {
    let bench = Bench { sampler: Box::new(Lcm::new(schedule())), ..Bench::new() };
    let config = StudentConfig::default().with(|config| {
        config.policy =
            StudentPolicy::Buffer { new_fraction: 1.0, buffer: BufferConfig::default() };
        config.rollout_steps = Some(RolloutSteps { min: 1, max: 3 });
    });
    let mut source = StudentSource::new(config, &bench.grids)?;
    let states = bench.states(&mut source, 0, &cycle(60), &[2], 0)?;
    assert_eq!(states.grid_indices, cycle(60));
    assert_eq!(label_list(&states), (0..60).collect::<Vec<i64>>());
    Ok(())
}

#[test]
fn rollout_steps_are_checked() {
    let grids = Bench::lcm().grids;
    let build = |policy: StudentPolicy, min, max| {
        let rollout_steps = Some(RolloutSteps { min, max });
        let config = StudentConfig::default().with(|config| {
            config.policy = policy;
            config.rollout_steps = rollout_steps;
        });
        StudentSource::new(config, &grids)
    };
    assert!(build(StudentPolicy::Fresh, 1, 50).is_ok());
    for (min, max) in [(0, 4), (5, 4), (4, 51)] {
        let refused = build(StudentPolicy::Fresh, min, max);
        assert!(matches!(
            refused,
            Err(Error::Invalid(invalid)) if invalid.field == "student.rollout_steps"
        ));
    }
    let grid = Bench::new().grids;
    for policy in [StudentPolicy::FreshAll, StudentPolicy::Chain { refresh_fraction: 0.0 }] {
        let rollout_steps = Some(RolloutSteps { min: 2, max: 4 });
        let config = StudentConfig::default().with(|config| {
            config.policy = policy;
            config.rollout_steps = rollout_steps;
        });
        let refused = StudentSource::new(config, &grid);
        assert!(matches!(refused, Err(Error::Invalid(invalid)) if invalid.field == "policy.kind"));
    }
}

#[test]
fn teacher_gives_its_own_trajectory_on_its_finer_grid() -> ddil_core::Result<()> {
    for pool in [0, 5000] {
        let bench = Bench::new();
        let config = TeacherConfig::default().with(|config| {
            config.pool = pool;
            config.storage = StorageKind::F32;
        });
        let mut source = TeacherSource::new(config, &bench.grids)?;
        let states = bench.states(&mut source, 0, &cycle(900), &[4], 0)?;
        assert!(states.sources.iter().all(|source| *source == Source::Teacher));
        assert_eq!(bench.student.num_evaluated.get(), 0);
        assert_distribution(&bench, &bench.teacher, &bench.grids.teacher, &states);
        for shape in SHAPES {
            let mut source = TeacherSource::new(TeacherConfig::default(), &bench.grids)?;
            let states = bench.states(&mut source, 0, &cycle(5), &shape[1..], 0)?;
            assert_eq!(states.x_t.size()[1..], shape[1..]);
        }
    }
    Ok(())
}

/// Once the pool is full the teacher is never evaluated again, and the states are those of its rollouts.
#[test]
fn pool_is_filled_once() -> ddil_core::Result<()> {
    let bench = Bench::new();
    let config = TeacherConfig::default().with(|config| {
        config.pool = 10;
        config.storage = StorageKind::F32;
    });
    let mut source = TeacherSource::new(config, &bench.grids)?;
    let mut made = std::collections::HashMap::new();
    for step in 0..4 {
        let states = bench.states(&mut source, step, &cycle(9), &[2], 100 * step as i64)?;
        for (i, label) in label_list(&states).into_iter().enumerate() {
            let value = states.x_t.double_value(&[i as i64, 0]);
            made.insert((label, states.grid_indices[i]), value);
        }
    }
    // Three trajectories a step, each in 2 substeps for each of 3 intervals; the last step had room for one.
    assert_eq!((source.pooled(), bench.teacher.num_evaluated.take()), (10, 4 * 3 * 6));
    let mut seen = std::collections::HashSet::new();
    for step in 4..40 {
        let states = bench.states(&mut source, step, &cycle(9), &[2], -1)?;
        for (i, label) in label_list(&states).into_iter().enumerate() {
            let value = states.x_t.double_value(&[i as i64, 0]);
            assert_eq!(made.get(&(label, states.grid_indices[i])), Some(&value));
            assert_eq!(states.created_at_step[i] as i64, label / 100);
            seen.insert(label);
        }
    }
    assert_eq!((seen.len(), bench.teacher.num_evaluated.get()), (10, 0));
    source.flush();
    assert_eq!(source.pooled(), 0);
    Ok(())
}

#[test]
fn pool_may_keep_few_states_a_trajectory() -> ddil_core::Result<()> {
    let bench = Bench::lcm();
    let config = TeacherConfig::default().with(|config| {
        config.pool = 60;
        config.states_per_trajectory = Some(2);
    });
    let mut source = TeacherSource::new(config, &bench.grids)?;
    for step in 0..10 {
        let indices: Vec<usize> = (0..12).map(|_| 1 + (step as usize * 5) % 49).collect();
        let states = bench.states(&mut source, step, &indices, &[2], 0)?;
        assert_eq!(states.grid_indices, indices);
    }
    assert_eq!(source.pooled(), 60);
    let (_, x_t) = &source.save()?.tensors[0];
    assert_eq!(x_t.size(), [120, 2]);
    Ok(())
}

/// The states minus the noise of the request.
fn cleaned(bench: &Bench, step: u64, states: &States) -> ddil_core::Result<Tensor> {
    let scales = bench.student.schedule.scales_at(&states.timesteps, &states.x_t)?;
    Ok((&states.x_t - scales.sigma * normal(step, &states.x_t.size())) / scales.alpha)
}

/// The end point of the teacher, for a label, is an affine map of its initial noise; here for noise 0 and 1.
fn teacher_ends(bench: &Bench) -> ddil_core::Result<[f64; 2]> {
    let noise = Tensor::from_slice(&[0_f32, 1.0]).view([2, 1]);
    let none = Conditioning::class_labels(Tensor::zeros([2], tch::kind::INT64_CPU));
    let rollout = Rollout::new(&bench.teacher, &bench.ddim, &bench.grids.teacher);
    let x0 = rollout.conditioning(&none).sample(noise)?;
    Ok([x0.double_value(&[0, 0]), x0.double_value(&[1, 0])])
}

#[test]
fn renoised_states_are_the_teachers_ends_under_the_noise_of_the_request() -> ddil_core::Result<()> {
    for (pool, steps) in [(0, 1), (40, 1), (40, 30)] {
        let bench = Bench::new();
        let config = TeacherConfig::default().with(|config| {
            config.pool = pool;
            config.states = TeacherStates::Renoised;
            config.storage = StorageKind::F32;
        });
        let mut source = TeacherSource::new(config, &bench.grids)?;
        let mut ends = Vec::new();
        for step in 0..steps {
            let states = bench.states(&mut source, step, &cycle(900), &[4], 0)?;
            assert_eq!(states.grid_indices, cycle(900));
            assert!(states.sources.iter().all(|source| *source == Source::Teacher));
            ends.push(cleaned(&bench, step, &states)?);
        }
        assert_eq!((source.pooled(), bench.student.num_evaluated.get()), (pool, 0));
        let ends = Tensor::cat(&ends, 0);
        let [at_zero, at_one] = teacher_ends(&bench)?;
        let unit = (&ends - at_zero) / (at_one - at_zero);
        // A trajectory serves several states, so that fewer are independent than there are.
        let independent = if pool == 0 { 3600.0 } else { 160.0 };
        let mean = unit.mean(Kind::Double).double_value(&[]);
        let std = unit.std(true).double_value(&[]);
        assert!(mean.abs() < 4.0 / f64::sqrt(independent), "{mean}");
        assert!((std - 1.0).abs() < 4.0 / f64::sqrt(2.0 * independent), "{std}");
    }
    Ok(())
}

/// A full pool serves each timestep from each of its trajectories, with the request's own noise, without any
/// evaluation.
#[test]
fn a_renoised_trajectory_serves_every_timestep() -> ddil_core::Result<()> {
    let bench = Bench { teacher: Gaussian::new(0.5, 1.0, 0.4), ..Bench::lcm() };
    let config = TeacherConfig::default().with(|config| {
        config.pool = 3;
        config.states = TeacherStates::Renoised;
        config.storage = StorageKind::F32;
    });
    let mut source = TeacherSource::new(config.clone(), &bench.grids)?;
    bench.states(&mut source, 0, &[49, 49, 49], &[2], 0)?;
    assert_eq!((source.pooled(), bench.teacher.num_evaluated.take()), (3, 3 * 50));
    let mut seen = std::collections::HashMap::new();
    for step in 1..60 {
        let indices = vec![step as usize % 49 + 1; 4];
        let states = bench.states(&mut source, step, &indices, &[2], -1)?;
        let ends = cleaned(&bench, step, &states)?;
        for (i, label) in label_list(&states).into_iter().enumerate() {
            let end = ends.double_value(&[i as i64, 0]);
            let first = *seen.entry(label).or_insert(end);
            // Taking the noise out at the last timestep divides by an alpha of .068.
            assert!((end - first).abs() < 1e-4, "{label} at {}: {end}, {first}", indices[0]);
            assert_eq!(states.created_at_step[i], 0);
        }
    }
    assert_eq!((seen.len(), bench.teacher.num_evaluated.get()), (3, 0));

    let mut restored = TeacherSource::new(config, &bench.grids)?;
    restored.restore(&source.save()?)?;
    let [one, other] = [&mut source, &mut restored]
        .map(|source| bench.states(source, 60, &[1, 20, 49], &[2], 0).map(|states| states.x_t));
    assert_eq!(one?, other?);
    Ok(())
}

/// Four samples of pure noise, which go through a loss with the others; labels from 500 in each 1000.
fn noise(step: u64) -> States {
    let first = step as i64 * 1000 + 500;
    let labels = Tensor::arange_start(first, first + 4, tch::kind::INT64_CPU);
    States::new(normal(1000 + step, &[4, 3]), &trailing(4), vec![0; 4], Source::Noise)
        .expect("on the grid")
        .with_conditioning(Conditioning::class_labels(labels))
        .made_at(step)
}

/// What a loss would have computed from a batch.
fn show_loss(
    bench: &Bench,
    source: &mut dyn TrajectorySource,
    step: u64,
    states: &States,
    teacher_next: Option<&Tensor>,
) -> ddil_core::Result<()> {
    let x0 = bench.student.predict(&states.x_t, &states.timesteps, &states.conditioning)?.x0;
    let feedback = Feedback::new(&x0).with_teacher_next(teacher_next);
    let clock = Clock::new(step, 100, bench.streams);
    let (grids, sampler) = (&bench.grids, &*bench.sampler);
    source.after_loss(&LossFeedback::new(&clock, states, &feedback, grids, sampler))
}

/// Chains, run as a trainer would: batches with even grid indices, then the student's estimates of them.
fn run_chain(
    bench: &Bench,
    source: &mut dyn TrajectorySource,
    steps: std::ops::Range<u64>,
    teacher_next: impl Fn(&States) -> Option<Tensor>,
) -> ddil_core::Result<Vec<States>> {
    steps
        .map(|step| {
            let first = step as i64 * 1000;
            let states = bench.states(source, step, &cycle(12), &[3], first)?;
            let batch = States::cat(&[states, noise(step)])?;
            show_loss(bench, source, step, &batch, teacher_next(&batch).as_ref())?;
            Ok(batch)
        })
        .collect()
}

/// While the student does not change, a chain is a fresh rollout from its first noise.
#[test]
fn chains_are_rollouts() -> ddil_core::Result<()> {
    let bench = Bench { student: Gaussian::new(0.0, 1e-4, 0.4), ..Bench::new() };
    let mut source = bench.student(StudentPolicy::Chain { refresh_fraction: 0.0 });
    let batches = run_chain(&bench, &mut source, 0..12, |_| None)?;
    let mut compared = 0;
    for batch in &batches {
        for (row, label) in label_list(batch).into_iter().enumerate() {
            // Labels from 500 are those of noise in the batch of step `label / 1000`.
            let (step, place) = (label / 1000, label % 1000 - 500);
            if place < 0 || batch.grid_indices[row] == 0 {
                continue;
            }
            let noise = normal(1000 + step as u64, &[4, 3]).narrow(0, place, 1);
            let prompts = Conditioning::class_labels(Tensor::from_slice(&[label]));
            let own = Rollout::new(&bench.student, &bench.ddim, &bench.grids.student);
            let own = own.conditioning(&prompts).run(noise)?;
            let expected = own.states[batch.grid_indices[row]].get(0);
            assert!(max_abs_difference(&batch.x_t.get(row as i64), &expected) < 1e-4);
            compared += 1;
        }
    }
    assert!(compared > 60, "{compared}");
    Ok(())
}

/// In the long run the loss makes all advances: as many states arrive at an index as are requested.
#[test]
fn chains_cost_no_calls() -> ddil_core::Result<()> {
    let bench = Bench::new();
    let mut source = bench.student(StudentPolicy::Chain { refresh_fraction: 0.0 });
    let _ = run_chain(&bench, &mut source, 0..5, |_| None)?;
    bench.student.num_evaluated.set(0);
    let batches = run_chain(&bench, &mut source, 5..25, |_| None)?;
    // 16 a step by the loss of this test itself.
    assert_eq!(bench.student.num_evaluated.get(), 20 * 16);
    for (step, batch) in (5..).zip(&batches) {
        assert!(
            batch.created_at_step.iter().all(|birth| step - birth <= 1),
            "{:?}",
            batch.created_at_step
        );
    }

    let mut refreshed = bench.student(StudentPolicy::Chain { refresh_fraction: 1.0 });
    bench.student.num_evaluated.set(0);
    let _ = run_chain(&bench, &mut refreshed, 0..5, |_| None)?;
    assert_eq!(bench.student.num_evaluated.get(), 5 * (16 + 4 * (1 + 2 + 3)));
    Ok(())
}

/// If more states wait than are requested, those of the newest student are returned.
#[test]
fn chains_return_the_newest_state() -> ddil_core::Result<()> {
    let bench = Bench::new();
    let mut source = bench.student(StudentPolicy::Chain { refresh_fraction: 0.0 });
    let twice = States::cat(&[noise(0), noise(0)])?;
    show_loss(&bench, &mut source, 0, &twice, None)?;
    show_loss(&bench, &mut source, 1, &noise(1), None)?;
    bench.student.num_evaluated.set(0);
    // As many wait at an index as the first batch had: four of each step.
    let num_evaluated = [[1; 3]; 3].map(|indices| bench.states(&mut source, 2, &indices, &[3], 0));
    let created_at_step: Vec<u64> = num_evaluated
        .into_iter()
        .collect::<ddil_core::Result<Vec<_>>>()?
        .into_iter()
        .flat_map(|states| states.created_at_step)
        .collect();
    assert_eq!(created_at_step, [1, 1, 1, 1, 0, 0, 0, 0, 2]);
    assert_eq!(bench.student.num_evaluated.get(), 1);
    Ok(())
}

#[test]
fn chains_drop_states_that_wait_too_long() -> ddil_core::Result<()> {
    let bench = Bench::new();
    let mut source = bench.student(StudentPolicy::Chain { refresh_fraction: 0.0 });
    let _ = run_chain(&bench, &mut source, 0..5, |_| None)?;
    let late = run_chain(&bench, &mut source, 50..51, |_| None)?;
    assert!(late[0].created_at_step.iter().all(|birth| *birth == 50));
    source.flush();
    bench.student.num_evaluated.set(0);
    let _ = run_chain(&bench, &mut source, 51..52, |_| None)?;
    assert_eq!(bench.student.num_evaluated.get(), 16 + 4 * (1 + 2 + 3));
    Ok(())
}

/// With the teacher in every interval, the waiting states are the teacher's steps in the loss.
#[test]
fn chains_are_mixed_with_the_teacher_steps_of_the_loss() -> ddil_core::Result<()> {
    let bench = Bench::new();
    let config = StudentConfig::default().with(|config| {
        config.policy = StudentPolicy::Chain { refresh_fraction: 0.0 };
        config.mixed = Some(MixedVariant::Bernoulli { kappa: 1.0 });
    });
    let mut source = StudentSource::new(config.clone(), &bench.grids)?;
    let marked = |batch: &States| Some(batch.x_t.full_like(42.0));
    let batches = run_chain(&bench, &mut source, 0..6, marked)?;
    let last = &batches[5];
    for row in 0..12 {
        assert_eq!(last.x_t.double_value(&[row, 0]), 42.0);
        assert_eq!(last.sources[row as usize], Source::Mixed);
    }
    let mut source = StudentSource::new(config, &bench.grids)?;
    let unknown = run_chain(&bench, &mut source, 0..1, |_| None);
    assert!(matches!(unknown, Err(Error::Invalid(invalid)) if invalid.field == "mixed"));
    Ok(())
}

#[test]
fn mixed_states_have_their_own_source() -> ddil_core::Result<()> {
    let bench = Bench::new();
    let config = StudentConfig::default().with(|config| {
        config.policy = StudentPolicy::Fresh;
        config.mixed = Some(MixedVariant::TeacherThenStudent { switch: 1 });
    });
    let mut source = StudentSource::new(config, &bench.grids)?;
    let states = bench.states(&mut source, 0, &cycle(9), &[2], 0)?;
    assert!(states.sources.iter().all(|source| *source == Source::Mixed));
    assert!(bench.teacher.num_evaluated.get() > 0);
    Ok(())
}

#[test]
fn settings_are_checked() {
    let grids = Bench::new().grids;
    let student = |policy, mixed| {
        SourceConfig::Student(StudentConfig::default().with(|config| {
            config.policy = policy;
            config.mixed = mixed;
        }))
        .build(&grids)
        .map(|_| ())
    };
    let chain = |refresh_fraction| StudentPolicy::Chain { refresh_fraction };
    for refused in [
        student(chain(1.5), None),
        student(chain(f64::NAN), None),
        student(chain(0.0), Some(MixedVariant::Conditional { threshold: 1.0 })),
        student(StudentPolicy::Fresh, Some(MixedVariant::Bernoulli { kappa: 2.0 })),
        student(
            StudentPolicy::Buffer { new_fraction: -0.1, buffer: BufferConfig::default() },
            None,
        ),
        SourceConfig::Teacher(
            TeacherConfig::default().with(|config| config.states_per_trajectory = Some(0)),
        )
        .build(&grids)
        .map(|_| ()),
    ] {
        assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    }
    assert!(SourceConfig::Forward.build(&grids).is_ok());
    let read = serde_json::from_str::<StudentPolicy>;
    assert_eq!(read(r#"{"kind": "chain"}"#).ok(), Some(StudentPolicy::default()));
    assert!(read(r#"{"kind": "chain", "refresh": 0.1}"#).is_err());
    assert!(read(r#"{"kind": "buffer", "buffer": {"capacitance": 1}}"#).is_err());
}

#[test]
fn grids_are_checked() -> ddil_core::Result<()> {
    let good = Bench::lcm().grids;
    good.ensure()?;
    let other = Timesteps::explicit(vec![999, 500], 1000)?;
    let late = Timesteps::explicit(vec![979, 499], 1000)?;
    for refused in [
        good.clone().with_rollout(other.clone()),
        good.clone().with_rollout(late),
        good.with_teacher(other),
    ] {
        assert!(matches!(refused.ensure(), Err(Error::Invalid(_))), "{refused:?}");
    }
    Ok(())
}
