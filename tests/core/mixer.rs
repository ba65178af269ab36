use ddil_core::{
    BufferConfig, Clock, Conditioning, Data, Denoiser, Error, Feedback, MixBatch, MixedVariant,
    Mixer, MixerConfig, PriorSchedule, Priors, RandomStreams, RolloutNetworks, Source, SourceName,
    SourceRequest, States, Stream, StudentConfig, StudentPolicy, TeacherConfig, Thresholded,
    TrajectorySource, draw_grid_indices,
};
use ddil_libtorch::ArgumentError;
use ddil_schedulers::{DataRange, Ddim, Lcm, Thresholding, Timesteps};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Device, Kind, Tensor};

use crate::common::{Gaussian, SHAPES, labels, max_abs_difference, normal, schedule, trailing};

/// A mixer with its networks, called as the trainer calls it.
struct Run {
    device: Device,
    mixer: Mixer,
    student: Gaussian,
    teacher: Gaussian,
    /// Of the student's estimates and of the teacher's.
    thresholding: [Thresholding; 2],
    streams: RandomStreams,
    shape: Vec<i64>,
    prompted_noise: bool,
}

impl Run {
    fn new(config: MixerConfig, shape: &[i64]) -> Self {
        let mixer = Mixer::new(config, trailing(4), Box::new(Ddim::new(schedule())));
        Self {
            device: Device::Cpu,
            mixer: mixer.expect("it is valid"),
            student: Gaussian::new(-0.2, 0.0, 0.5),
            teacher: Gaussian::new(0.2, 0.0, 0.5),
            thresholding: [Thresholding::None, Thresholding::None],
            streams: RandomStreams::new(11, 0),
            shape: shape.to_vec(),
            prompted_noise: false,
        }
    }

    /// Labels of data are even, of prompts odd.
    fn data(&self, step: u64) -> Data {
        let n = self.shape[0] as usize;
        let labels = labels(n).get(Conditioning::CLASS_LABELS).expect("there are labels") * 2;
        let x0 = normal(500 + step, &self.shape) * 0.5 + 3.0;
        Data::new(x0).with_conditioning(Conditioning::class_labels(labels))
    }

    fn next(&mut self, step: u64) -> ddil_core::Result<States> {
        let data = self.data(step).to_device(self.device)?;
        let labels = labels(self.shape[0] as usize);
        let odd = labels.get(Conditioning::CLASS_LABELS).expect("there are labels") * 2 + 1;
        let odd = odd.to_device(self.device);
        let prompts = Conditioning::class_labels(odd);
        let [of_student, of_teacher] = self.thresholding.clone();
        let student = Thresholded::new(&self.student, of_student)?;
        let teacher = Thresholded::new(&self.teacher, of_teacher)?;
        let batch = MixBatch::new(&data).with_prompts(&prompts);
        let batch = batch.with_prompted_noise(self.prompted_noise);
        let networks = RolloutNetworks::new(&student, &teacher);
        self.mixer.next_states(&self.clock(step), &batch, &networks)
    }

    fn clock(&self, step: u64) -> Clock {
        Clock::new(step, 100, self.streams)
    }

    /// A step with its loss: batch, then the student's estimates of it.
    fn step(&mut self, step: u64) -> ddil_core::Result<States> {
        let states = self.next(step)?;
        let conditioning = &states.conditioning;
        let x0 = self.student.predict(&states.x_t, &states.timesteps, conditioning)?.x0;
        let x0 = self.thresholding[0].apply(&x0)?;
        self.mixer.feed_back(&self.clock(step), &states, &Feedback::new(&x0))?;
        Ok(states)
    }
}

fn mix(forward: f64, student: f64, teacher: f64) -> MixerConfig {
    let priors = Priors::new(forward, student, teacher).expect("they sum to 1");
    MixerConfig::default().with(|config| config.priors = PriorSchedule::constant(priors))
}

fn policies() -> Vec<StudentPolicy> {
    vec![
        StudentPolicy::Fresh,
        StudentPolicy::FreshAll,
        StudentPolicy::Buffer { new_fraction: 0.25, buffer: BufferConfig::default() },
        StudentPolicy::Chain { refresh_fraction: 0.1 },
    ]
}

fn label_list(states: &States) -> Vec<i64> {
    let labels = states.conditioning.get(Conditioning::CLASS_LABELS).expect("all have labels");
    Vec::try_from(labels).expect("they are Int64")
}

/// The sanity setting: plain distillation, bit for bit, from the streams that plain distillation would use.
#[test]
fn forward_only_is_plain_noising() -> ddil_core::Result<()> {
    for shape in SHAPES {
        let mut run = Run::new(MixerConfig::forward_only(), shape);
        for step in 0..5 {
            let states = run.next(step)?;
            let Data { x0, conditioning, .. } = run.data(step);
            let indices = draw_grid_indices(3, 4, &mut run.streams.rng(step, Stream::Timesteps));
            let grid = trailing(4);
            let timesteps: Vec<i64> = indices.iter().map(|&i| grid.as_slice()[i]).collect();
            let timesteps = Tensor::from_slice(&timesteps);
            let mut generator = run.streams.generator(step, Stream::Noise, Device::Cpu)?;
            let noise = generator.normal(shape, Kind::Float)?;
            assert_eq!(states.x_t, schedule().add_noise(&x0, &noise, &timesteps)?);
            assert_eq!(states.timesteps, timesteps);
            let [label, expected] =
                [&states.conditioning, &conditioning].map(|c| c.get(Conditioning::CLASS_LABELS));
            assert_eq!(label, expected);
            assert_eq!(states.sources, [Source::Forward; 3]);
        }
        assert_eq!((run.student.num_evaluated.get(), run.teacher.num_evaluated.get()), (0, 0));
    }
    Ok(())
}

/// Runs that differ only in their priors use the same data at the same timesteps with the same noise.
#[test]
fn priors_change_nothing_but_the_source() -> ddil_core::Result<()> {
    for policy in policies() {
        let student = StudentConfig::default().with(|config| config.policy = policy);
        let mut plain =
            Run::new(mix(1.0, 0.0, 0.0).with(|config| config.student = student.clone()), &[16, 2]);
        let mut mixed =
            Run::new(mix(0.4, 0.3, 0.3).with(|config| config.student = student), &[16, 2]);
        for step in 0..8 {
            let (plain, mixed) = (plain.step(step)?, mixed.step(step)?);
            assert_eq!(plain.grid_indices, mixed.grid_indices);
            for row in 0..16 {
                if matches!(mixed.sources[row], Source::Forward | Source::Noise) {
                    assert_eq!(plain.x_t.get(row as i64), mixed.x_t.get(row as i64));
                }
            }
        }
    }
    Ok(())
}

/// The acceptance test of mixing: frequencies within three standard deviations, and each timestep as often from
/// every source.
#[test]
fn sources_come_as_often_as_their_priors() -> ddil_core::Result<()> {
    let (f, s, t) = (0.5, 0.3, 0.2);
    let mut run = Run::new(
        mix(f, s, t).with(|config| {
            config.teacher.pool = 50;
        }),
        &[10, 1],
    );
    let steps = 1200;
    let mut counts = [[0_u32; 4]; 5];
    for step in 0..steps {
        let states = run.step(step)?;
        for (source, index) in states.sources.iter().zip(&states.grid_indices) {
            let place = Source::ALL.iter().position(|s| s == source).expect("it is one of them");
            counts[place][*index] += 1;
        }
    }
    let n = f64::from(steps as u32) * 10.0 / 4.0;
    for (place, share) in [(0, f), (1, s), (2, t)] {
        let deviation = (share * (1.0 - share) * n).sqrt();
        for (index, found) in counts[place].iter().enumerate().skip(1) {
            let gap = f64::from(*found) - share * n;
            assert!(gap.abs() < 3.0 * deviation, "source {place} at {index}: {found}");
        }
    }
    // The noisiest index is always noise: a quarter of all states.
    assert!((f64::from(counts[4][0]) - n).abs() < 3.0 * (0.25 * n).sqrt());
    assert_eq!(counts.iter().take(4).map(|at| at[0]).sum::<u32>(), 0);
    let counters = run.mixer.counters();
    assert!((counters.fraction(Source::Student) - 0.75 * s).abs() < 0.02);
    assert_eq!(counters.states.iter().sum::<u64>(), steps * 10);
    Ok(())
}

#[test]
fn noisiest_states_are_noise() -> ddil_core::Result<()> {
    for (pure, expected) in [(true, Source::Noise), (false, Source::Forward)] {
        let config = mix(1.0, 0.0, 0.0).with(|config| config.pure_noise_at_tmax = pure);
        let mut run = Run::new(config, &[400, 8]);
        let states = run.next(0)?;
        let rows: Vec<i64> = (0..400).filter(|i| states.grid_indices[*i as usize] == 0).collect();
        assert_eq!(rows.len(), 100);
        assert!(rows.iter().all(|row| states.sources[*row as usize] == expected));
        // Data around 3 leak through an alpha of 0.068.
        let mean = states.x_t.index_select(0, &Tensor::from_slice(&rows)).mean(Kind::Double);
        let leak = if pure { 0.0 } else { 3.0 * 0.068_264_9 };
        assert!((mean.double_value(&[]) - leak).abs() < 4.0 / 800_f64.sqrt());
        // With the conditioning of the data.
        assert!(label_list(&states).iter().all(|label| label % 2 == 0));
    }
    let mut run = Run::new(mix(0.0, 0.5, 0.5), &[16, 8]);
    let states = run.next(0)?;
    for row in 0..16 {
        assert_eq!(states.sources[row] == Source::Noise, states.grid_indices[row] == 0);
    }
    // In place of a backward source, with the conditioning that such a source receives.
    assert!(label_list(&states).iter().all(|label| label % 2 == 1));
    Ok(())
}

/// With prompts that the data do not have, only noised samples have the conditioning of the data, whatever a source
/// remembers.
#[test]
fn trajectories_have_the_prompts_alone() -> ddil_core::Result<()> {
    for policy in policies() {
        for pool in [0, 16] {
            let config = mix(0.5, 0.25, 0.25).with(|config| {
                config.student.policy = policy.clone();
                config.teacher.pool = pool;
            });
            let mut run = Run { prompted_noise: true, ..Run::new(config.clone(), &[16, 8]) };
            let mut prompted = 0;
            for step in 0..12 {
                let states = run.step(step)?;
                for (label, source) in label_list(&states).into_iter().zip(&states.sources) {
                    assert_eq!(label % 2 == 0, *source == Source::Forward, "{policy:?}");
                    prompted += u64::from(label % 2 == 1);
                }
            }
            assert_eq!(run.mixer.counters().prompted, prompted);
            assert!((1..12 * 16).contains(&prompted));
            // The default: noise in the place of a sample has its conditioning.
            let mut run = Run::new(config, &[16, 8]);
            let states = run.next(0)?;
            let odd = label_list(&states).iter().filter(|label| *label % 2 == 1).count() as u64;
            assert_eq!(run.mixer.counters().prompted, odd);
            let is_even_noise =
                |(label, source): (&i64, &Source)| label % 2 == 0 && *source == Source::Noise;
            assert!(label_list(&states).iter().zip(&states.sources).any(is_even_noise));
        }
    }
    Ok(())
}

#[test]
fn works_for_any_rank_policy_and_source() -> ddil_core::Result<()> {
    for shape in SHAPES {
        let shape: Vec<i64> = [&[12], &shape[1..]].concat();
        for policy in policies() {
            let student = StudentConfig::default().with(|config| {
                config.policy = policy;
                config.mixed = Some(MixedVariant::StudentThenTeacher { switch: 9 });
            });
            let mut run =
                Run::new(mix(0.4, 0.3, 0.3).with(|config| config.student = student), &shape);
            for step in 0..6 {
                let states = run.step(step)?;
                assert_eq!(states.x_t.size(), shape);
                assert_eq!(states.x_t.kind(), Kind::Float);
                let grid = trailing(4);
                let timesteps: Vec<i64> =
                    states.grid_indices.iter().map(|&i| grid.as_slice()[i]).collect();
                assert_eq!(states.timesteps, Tensor::from_slice(&timesteps));
                assert!(!states.x_t.requires_grad());
                assert!(states.x_t.isfinite().all().double_value(&[]) > 0.0);
            }
        }
    }
    Ok(())
}

/// Every source and policy, and their state between updates, on a device; saved, restored and continued.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_creates_its_states_on_the_device() -> ddil_core::Result<()> {
    let gpu = Device::Cuda(0);
    for policy in policies() {
        let student = StudentConfig::default().with(|config| config.policy = policy);
        let teacher = TeacherConfig::default().with(|config| config.pool = 9);
        let config = mix(0.3, 0.4, 0.3).with(|config| {
            config.student = student;
            config.teacher = teacher;
        });
        let run = || Run { device: gpu, ..Run::new(config.clone(), &[16, 3]) };
        let mut original = run();
        for step in 0..6 {
            let states = original.step(step)?;
            assert_eq!([states.x_t.device(), states.timesteps.device()], [gpu; 2]);
            assert!(states.x_t.isfinite().all().double_value(&[]) > 0.0);
            let labels = states.conditioning.get(Conditioning::CLASS_LABELS);
            assert_eq!(labels.expect("there are labels").device(), gpu);
        }
        let mut restored = run();
        restored.mixer.restore(&original.mixer.save()?)?;
        for step in 6..12 {
            let (a, b) = (original.step(step)?, restored.step(step)?);
            assert_eq!((a.x_t, a.sources), (b.x_t, b.sources));
        }
    }
    Ok(())
}

/// A saved mixer and the original give the same batches and the same saved state, bit for bit.
#[test]
fn a_restored_one_continues_exactly() -> ddil_core::Result<()> {
    for policy in policies() {
        let config = mix(0.3, 0.4, 0.3).with(|config| {
            config.student.policy = policy.clone();
            config.teacher.pool = 9;
        });
        let mut original = Run::new(config.clone(), &[16, 3]);
        for step in 0..5 {
            let _ = original.step(step)?;
        }
        let mut saved = original.mixer.save()?;
        let text = serde_json::to_string(&saved.metadata).expect("it can be written");
        saved.metadata = serde_json::from_str(&text).expect("it can be read");
        let mut restored = Run::new(config, &[16, 3]);
        restored.mixer.restore(&saved)?;
        for step in 5..12 {
            let (a, b) = (original.step(step)?, restored.step(step)?);
            assert_eq!(a.x_t, b.x_t, "{policy:?} at {step}");
            assert_eq!(label_list(&a), label_list(&b));
            assert_eq!((a.sources, a.created_at_step), (b.sources, b.created_at_step));
        }
        let (a, b) = (original.mixer.save()?, restored.mixer.save()?);
        assert_eq!(a.metadata, b.metadata);
        assert_eq!(a.tensors, b.tensors);
        assert_eq!(original.mixer.counters(), restored.mixer.counters());
    }
    Ok(())
}

#[test]
fn refuses_anothers_state() -> ddil_core::Result<()> {
    let mut run = Run::new(mix(0.4, 0.3, 0.3), &[16, 3]);
    for step in 0..3 {
        let _ = run.step(step)?;
    }
    let saved = run.mixer.save()?;
    let mixer = |config: MixerConfig, grid: Timesteps| {
        Mixer::new(config, grid, Box::new(Ddim::new(schedule()))).expect("it is valid")
    };
    let other_grid = mixer(mix(0.4, 0.3, 0.3), trailing(8)).restore(&saved);
    assert!(matches!(other_grid, Err(Error::Restore { what: "mixer", .. })), "{other_grid:?}");
    for policy in policies().into_iter().take(3) {
        let student = StudentConfig::default().with(|config| config.policy = policy.clone());
        let other = mix(0.4, 0.3, 0.3).with(|config| config.student = student);
        let restored = mixer(other, trailing(4)).restore(&saved);
        assert!(matches!(restored, Err(Error::Restore { .. })), "{policy:?}: {restored:?}");
    }
    Ok(())
}

/// A number beyond all counting, a row that is named twice or not at all, more states at an index than may wait.
#[test]
fn refuses_invalid_chains() -> ddil_core::Result<()> {
    use serde_json::{Value, json};
    type Change<'a> = &'a dyn Fn(&mut Value);
    let chains = || StudentConfig::default();
    let config = || mix(0.2, 0.8, 0.0).with(|config| config.student = chains());
    let mut run = Run::new(config(), &[16, 3]);
    for step in 0..3 {
        let _ = run.step(step)?;
    }
    let mut saved = run.mixer.save()?;
    let place = "/sources/1";
    let sound = saved.metadata.clone();
    let waiting = |value: &Value| value["waiting"].to_string();
    assert!(waiting(sound.pointer(place).expect("chains")).contains("row"), "{sound}");
    let mut restored = |change: Change| {
        saved.metadata = sound.clone();
        change(saved.metadata.pointer_mut(place).expect("chains"));
        let mut mixer = Mixer::new(config(), trailing(4), Box::new(Ddim::new(schedule())))?;
        mixer.restore(&saved)
    };
    restored(&|_| {})?;
    let changes: [(&str, Change); 6] = [
        ("beyond counting", &|chains| chains["most"] = json!(u64::MAX)),
        ("terabytes", &|chains| chains["most"] = json!(1_u64 << 40)),
        ("a row less", &|chains| drop(chains["free"].as_array_mut().expect("rows").pop())),
        ("a row more", &|chains| chains["free"].as_array_mut().expect("rows").push(json!(0))),
        ("a row twice", &|chains| {
            let rows = chains["free"].as_array_mut().expect("rows");
            rows[0] = rows[1].clone();
        }),
        ("all at one index", &|chains| {
            let queues = chains["waiting"].as_array().expect("queues").len() as u64;
            let rows = 0..chains["most"].as_u64().expect("a number") * queues;
            let wait = |row| json!({ "row": row, "birth": 0, "teacher_acted": false });
            chains["free"] = json!([]);
            chains["waiting"] = json!(vec![json!([]); queues as usize]);
            chains["waiting"][0] = rows.map(wait).collect();
        }),
    ];
    for (what, change) in changes {
        let refused = restored(change);
        assert!(matches!(refused, Err(Error::Restore { .. })), "{what}: {refused:?}");
    }
    Ok(())
}

#[test]
fn flush_drops_states() -> ddil_core::Result<()> {
    for policy in policies() {
        let student = StudentConfig::default().with(|config| config.policy = policy);
        let mut run =
            Run::new(mix(0.2, 0.4, 0.4).with(|config| config.student = student), &[16, 3]);
        for step in 0..4 {
            let _ = run.step(step)?;
        }
        run.mixer.flush();
        assert!(run.mixer.save()?.tensors.is_empty());
        // A new stage counts its steps from 0, and its networks may take another shape.
        run.shape = vec![16, 2, 2];
        let states = run.step(0)?;
        assert!(states.created_at_step.iter().all(|birth| *birth == 0));
    }
    Ok(())
}

/// Rollouts clip estimates to the range; the states that follow stay within what range and noise allow. No test data
/// stay within this range.
fn tight() -> Thresholding {
    Thresholding::Clamp(DataRange::scalar(-0.1, 0.1))
}

#[test]
fn rollouts_are_thresholded() -> ddil_core::Result<()> {
    for policy in policies() {
        let config = mix(0.0, 0.5, 0.5).with(|config| {
            config.student.policy = policy;
        });
        let mut run = Run::new(config, &[64, 4]);
        run.thresholding = [tight(), tight()];
        // Both believe in data far outside of the range.
        (run.student.center, run.teacher.center) = (5.0, -5.0);
        for step in 0..6 {
            let states = run.step(step)?;
            for row in 0..64 {
                if states.grid_indices[row] == 3 {
                    let largest = states.x_t.get(row as i64).abs().max().double_value(&[]);
                    assert!(largest < 4.0, "{largest} from {:?}", states.sources[row]);
                }
            }
        }
    }
    Ok(())
}

/// Largest value of the states at the last index, of student and of teacher.
fn largest(run: &mut Run, steps: u64) -> ddil_core::Result<[f64; 2]> {
    let mut largest = [0.0_f64; 2];
    for step in 0..steps {
        let states = run.step(step)?;
        for row in (0..states.len()).filter(|&row| states.grid_indices[row] == 3) {
            let of = match states.sources[row] {
                Source::Student => 0,
                Source::Teacher => 1,
                _ => continue,
            };
            let found = states.x_t.get(row as i64).abs().max().double_value(&[]);
            largest[of] = largest[of].max(found);
        }
    }
    Ok(largest)
}

#[test]
fn student_and_teacher_are_thresholded_each_as_they_come() -> ddil_core::Result<()> {
    for policy in policies() {
        for (threshold_student, threshold_teacher) in [(true, false), (false, true)] {
            let config = mix(0.0, 0.5, 0.5).with(|config| {
                config.student.policy = policy.clone();
            });
            let mut run = Run::new(config, &[64, 4]);
            (run.student.center, run.teacher.center) = (9.0, -9.0);
            let held = |on: bool| if on { tight() } else { Thresholding::None };
            run.thresholding = [held(threshold_student), held(threshold_teacher)];
            let [student, teacher] = largest(&mut run, 6)?;
            assert_eq!(student < 5.0, threshold_student, "{policy:?}: {student}");
            assert_eq!(teacher < 5.0, threshold_teacher, "{policy:?}: {teacher}");
        }
    }
    Ok(())
}

/// The x0 of the loss advances chains, either unchanged or clipped as in rollouts.
#[test]
fn chains_continue_from_raw_estimates() -> ddil_core::Result<()> {
    for threshold_student in [true, false] {
        let policy = StudentPolicy::Chain { refresh_fraction: 0.0 };
        let config = mix(0.0, 1.0, 0.0).with(|config| {
            config.student.policy = policy;
        });
        let mut run = Run::new(config, &[64, 4]);
        run.student.center = 100.0;
        if threshold_student {
            run.thresholding[0] = tight();
        }
        let _ = run.step(0)?;
        let states = run.step(1)?;
        let waited: Vec<i64> =
            (0..64).filter(|&row| states.created_at_step[row as usize] == 0).collect();
        assert!(waited.len() > 10);
        let x_t = states.x_t.index_select(0, &Tensor::from_slice(&waited));
        assert_eq!(x_t.min().double_value(&[]) > 3.0, !threshold_student);
    }
    Ok(())
}

#[test]
fn warm_up_gives_forward_states_only() -> ddil_core::Result<()> {
    let mut run = Run::new(MixerConfig::default(), &[16, 2]);
    for step in 0..=5 {
        let _ = run.step(step)?;
    }
    assert_eq!((run.teacher.num_evaluated.get(), run.mixer.counters().teacher_evaluations), (0, 0));
    for step in 6..40 {
        let _ = run.step(step)?;
    }
    let counters = run.mixer.counters().clone();
    assert!(counters.fraction(Source::Student) > 0.1 && counters.fraction(Source::Teacher) > 0.1);
    assert_eq!(run.teacher.num_evaluated.get(), counters.teacher_evaluations);
    // The rest of the student's calls were those of the loss.
    assert_eq!(run.student.num_evaluated.get(), counters.student_evaluations + 40 * 16);
    // Chains advance in the loss; the remaining calls are refreshes and chance.
    let wanted = counters.states[1] as f64;
    assert!((counters.student_evaluations as f64) < 0.8 * wanted, "{counters:?}");
    Ok(())
}

#[test]
fn latent_consistency_grids_mix() -> ddil_core::Result<()> {
    let config = mix(0.4, 0.3, 0.3).with(|mixer| {
        mixer.student = StudentConfig::default().with(|config| {
            config.policy =
                StudentPolicy::Buffer { new_fraction: 0.25, buffer: BufferConfig::default() };
            config.mixed = Some(MixedVariant::Bernoulli { kappa: 0.5 });
        });
        mixer.teacher = TeacherConfig::default().with(|config| {
            config.pool = 20;
            config.states_per_trajectory = Some(2);
            config.substeps = 1;
        });
    });
    let mut run = Run::new(MixerConfig::default(), &[20, 2]);
    run.mixer = Mixer::with_rollout(
        config,
        Timesteps::lcm(1000, 50, 50)?,
        Timesteps::lcm(1000, 50, 4)?,
        Box::new(Lcm::new(schedule())),
    )?;
    let mut seen = std::collections::HashSet::new();
    for step in 0..20 {
        let states = run.step(step)?;
        seen.extend(states.sources);
    }
    assert!(Source::ALL.iter().all(|source| seen.contains(source)), "{seen:?}");
    Ok(())
}

/// A custom source replaces one of the three.
#[test]
fn a_custom_source() -> ddil_core::Result<()> {
    #[derive(Debug)]
    struct Sevens;
    impl TrajectorySource for Sevens {
        fn states(&mut self, request: &SourceRequest<'_>) -> ddil_core::Result<States> {
            let x_t = request.data.x0.full_like(7.0);
            Ok(request.states(x_t, request.prompts.shallow_clone(), Source::Teacher))
        }
    }
    let mut run = Run::new(mix(0.5, 0.0, 0.5), &[16, 2]);
    run.mixer = run.mixer.replace_source(Source::Teacher, Box::new(Sevens))?;
    let states = run.step(0)?;
    for row in 0..16 {
        let seven = states.x_t.double_value(&[row as i64, 0]) == 7.0;
        assert_eq!(seven, states.sources[row] == Source::Teacher);
    }
    assert!(run.mixer.replace_source(Source::Noise, Box::new(Sevens)).is_err());
    Ok(())
}

/// An added source has its own name and share; the priors divide the remainder, and the saved state contains the name.
#[test]
fn a_source_is_added_by_name() -> ddil_core::Result<()> {
    #[derive(Debug)]
    struct Eights;
    impl TrajectorySource for Eights {
        fn states(&mut self, request: &SourceRequest<'_>) -> ddil_core::Result<States> {
            let x_t = request.data.x0.full_like(8.0);
            Ok(request.states(x_t, request.prompts.shallow_clone(), Source::Student))
        }
    }
    let eights = Source::Added(SourceName::new("eights")?);
    let build = |share| -> ddil_core::Result<Run> {
        let mut run = Run::new(mix(0.5, 0.25, 0.25), &[16, 2]);
        run.mixer = run.mixer.with_source("eights", share, Box::new(Eights))?;
        Ok(run)
    };
    let mut run = build(0.5)?;
    for step in 0..400 {
        let states = run.step(step)?;
        for (row, source) in states.sources.iter().enumerate() {
            let is_eight = states.x_t.double_value(&[row as i64, 0]) == 8.0;
            assert_eq!(is_eight, *source == eights, "{source:?}");
        }
    }
    let counters = run.mixer.counters().clone();
    // A quarter of all states is noise.
    let expected = [
        (eights, 0.5 * 0.75),
        (Source::Forward, 0.25 * 0.75),
        (Source::Student, 0.125 * 0.75),
        (Source::Teacher, 0.125 * 0.75),
    ];
    for (source, share) in expected {
        assert!((counters.fraction(source) - share).abs() < 0.015, "{source:?}: {counters:?}");
    }

    let saved = run.mixer.save()?;
    let text = saved.metadata.to_string();
    assert!(text.contains("eights"), "{text}");
    let mut restored = build(0.5)?;
    restored.mixer.restore(&saved)?;
    assert_eq!(restored.mixer.counters(), &counters);
    let (a, b) = (run.step(400)?, restored.step(400)?);
    assert_eq!((a.x_t, a.sources), (b.x_t, b.sources));
    let refused = Run::new(mix(0.5, 0.25, 0.25), &[16, 2]).mixer.restore(&saved);
    assert!(refused.expect_err("it has three sources").to_string().contains("eights"));

    // With a share of 0 the draws are those of the three.
    let (mut none, mut three) = (build(0.0)?, Run::new(mix(0.5, 0.25, 0.25), &[16, 2]));
    for step in 0..5 {
        let (a, b) = (none.step(step)?, three.step(step)?);
        assert_eq!((a.x_t, a.sources), (b.x_t, b.sources));
    }
    for (name, share) in
        [("forward", 0.1), ("adaptation", 0.1), ("Own", 0.1), ("own", 1.1), ("own", f64::NAN)]
    {
        let mixer = Run::new(mix(0.5, 0.25, 0.25), &[16, 2]).mixer;
        assert!(mixer.with_source(name, share, Box::new(Eights)).is_err(), "{name} {share}");
    }
    assert!(build(0.6)?.mixer.with_source("eights", 0.1, Box::new(Eights)).is_err());
    assert!(build(0.6)?.mixer.with_source("nines", 0.5, Box::new(Eights)).is_err());
    Ok(())
}

#[test]
fn refuses_batches_that_do_not_fit() -> ddil_core::Result<()> {
    let mut run = Run::new(mix(0.5, 0.5, 0.0), &[16, 2]);
    let mut ask = |x0: Tensor, label: usize, prompts: Conditioning| {
        let data = Data::new(x0).with_conditioning(labels(label));
        let batch = MixBatch::new(&data).with_prompts(&prompts);
        let networks = RolloutNetworks::new(&run.student, &run.teacher);
        run.mixer.next_states(&Clock::new(0, 1, run.streams), &batch, &networks)
    };
    let x0 = || normal(0, &[8, 2]);
    assert!(matches!(ask(x0(), 7, labels(8)), Err(Error::Conditioning { .. })));
    assert!(matches!(ask(x0(), 8, labels(9)), Err(Error::Conditioning { .. })));
    assert!(matches!(
        ask(normal(0, &[8]), 8, labels(8)),
        Err(Error::Argument(ArgumentError::Shape { .. }))
    ));
    assert!(matches!(
        ask(normal(0, &[0, 2]), 0, labels(0)),
        Err(Error::Argument(ArgumentError::Shape { .. }))
    ));
    assert!(ask(x0(), 8, labels(8)).is_ok());

    let states = run.next(0)?;
    let (clock, x0) = (run.clock(0), normal(0, &[3, 2]));
    let short = run.mixer.feed_back(&clock, &states, &Feedback::new(&x0));
    assert!(matches!(short, Err(Error::Argument(_))));
    Ok(())
}

#[test]
fn settings_are_read_strictly() {
    let read = serde_json::from_str::<MixerConfig>;
    assert_eq!(read("{}").ok(), Some(MixerConfig::default()));
    for unknown in [
        r#"{"prior": {}}"#,
        r#"{"teacher": {"pols": 3}}"#,
        r#"{"student": {"polity": {"kind": "fresh"}}}"#,
        r#"{"student": {"mixed": {"kind": "bernoulli", "kappa": 0.1, "lambda": 1}}}"#,
    ] {
        let refused = read(unknown).expect_err("a key is unknown").to_string();
        assert!(refused.contains("unknown field"), "{refused}");
    }
    let written = serde_json::to_string(&mix(0.5, 0.25, 0.25)).expect("it can be written");
    assert_eq!(read(&written).ok(), Some(mix(0.5, 0.25, 0.25)));
    let config = MixerConfig::default().with(|config| {
        config.teacher.substeps = 0;
    });
    assert!(Mixer::new(config, trailing(4), Box::new(Ddim::new(schedule()))).is_err());
}

proptest! {
    /// Every index is drawn as often as every other, but for a rest.
    #[test]
    fn grid_indices_are_stratified(batch in 0_usize..60, n in 1_usize..9, seed: u64) {
        let indices = draw_grid_indices(batch, n, &mut StdRng::seed_from_u64(seed));
        prop_assert_eq!(indices.len(), batch);
        for index in 0..n {
            let count = indices.iter().filter(|i| **i == index).count();
            prop_assert!(count == batch / n || count == batch / n + 1);
        }
    }
}

#[test]
fn a_batch_of_one_visits_every_index() {
    let mut counts = [0_i32; 4];
    for step in 0..4000 {
        let mut rng = RandomStreams::new(0, 0).rng(step, Stream::Timesteps);
        counts[draw_grid_indices(1, 4, &mut rng)[0]] += 1;
    }
    assert!(counts.iter().all(|count| (count - 1000).abs() < 3 * 28), "{counts:?}");
}

/// A one-step student is trained on noise only: there are no other states.
#[test]
fn one_step_is_all_noise() -> ddil_core::Result<()> {
    let mut run = Run::new(MixerConfig::default(), &[6, 2]);
    run.mixer = Mixer::new(mix(0.2, 0.4, 0.4), trailing(1), Box::new(Ddim::new(schedule())))?;
    for step in 0..3 {
        let states = run.step(step)?;
        assert_eq!(states.sources, [Source::Noise; 6]);
        let mut generator = run.streams.generator(step, Stream::Noise, Device::Cpu)?;
        assert!(max_abs_difference(&states.x_t, &generator.normal([6, 2], Kind::Float)?) == 0.0);
    }
    Ok(())
}

#[test]
fn refuses_a_buffer_smaller_than_a_batch() {
    // Three rings past noise, of 5 each.
    let buffer = BufferConfig::default().with(|config| config.capacity = 17);
    let policy = StudentPolicy::Buffer { new_fraction: 0.25, buffer };
    let student = StudentConfig::default().with(|config| config.policy = policy);
    let mixer =
        Run::new(mix(0.5, 0.5, 0.0).with(|config| config.student = student), &[16, 2]).mixer;
    assert!(mixer.ensure_batch_size(15).is_ok());
    let refused = mixer.ensure_batch_size(16).expect_err("there is room for 15");
    let message = refused.to_string();
    assert!(message.contains("17") && message.contains("16"), "{message}");
    assert!(matches!(refused, Error::Invalid(invalid) if invalid.field == "buffer.capacity"));
    assert!(mixer.ensure_batch_size(0).is_err());
    for policy in policies() {
        let student = StudentConfig::default().with(|config| config.policy = policy);
        let mixer =
            Run::new(mix(0.5, 0.5, 0.0).with(|config| config.student = student), &[16, 2]).mixer;
        assert!(mixer.ensure_batch_size(2046).is_ok());
    }
}
