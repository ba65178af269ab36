use ddil_core::{
    AdaptivePriors, AdaptiveSignal, AggregationBuffer, BufferConfig, ClipMeter, Clock,
    Conditioning, Consistent, Data, Denoiser, Discriminator, Draws, Error, Feedback, Generator,
    Grids, Guided, GuidedByWeight, LossFeedback, LossMeter, MixBatch, MixedRollout, MixedVariant,
    Mixer, MixerConfig, PriorSchedule, Priors, RandomStreams, Rollout, RolloutNetworks,
    RolloutSteps, SavedFile, SavedState, ShiftConfig, ShiftRequest, Source, SourceConfig,
    SourceRequest, States, Stream, StudentConfig, StudentPolicy, StudentSource, TeacherConfig,
    TeacherSource, Thresholded, TrajectorySource, draw_grid_indices, first_state, measure_shift,
    repeated_timestep, shift_at,
};
use ddil_models::{
    DiscriminatorHeadConfig, GaussianMixture, MixtureDenoiser, MlpConfig, ModelConfig,
    NetworkConfig, NetworkDenoiser, NetworkDiscriminator, Placement,
};
use ddil_schedulers::{
    ConsistencyBoundary, Ddim, Lcm, NoiseSchedule, NoiseScheduleConfig, PredictionType,
    Thresholding, TimestepSpacing, Timesteps,
};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Device, Tensor, kind};

use super::cases::{Cases, ODD_NUMBERS, said};

fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the default is valid")
}

fn grid() -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("it is on the grid")
}

fn fine() -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, 8, 0).expect("it is on the grid")
}

fn grids() -> Grids {
    Grids::new(grid()).with_teacher(fine())
}

fn teacher() -> MixtureDenoiser {
    GaussianMixture::ring(4).expect("four modes").on(schedule())
}

fn points() -> Tensor {
    Tensor::ones([3, 2], kind::FLOAT_CPU) * 0.5
}

fn labels() -> Tensor {
    Tensor::from_slice(&[0_i64, 1, 1])
}

fn told() -> Conditioning {
    Conditioning::class_labels(labels())
}

fn null() -> Conditioning {
    Conditioning::class_labels(Tensor::from_slice(&[0_i64]))
}

fn generator() -> Generator {
    Generator::new(Device::Cpu, 0).expect("there is a CPU")
}

fn draws() -> Draws {
    RandomStreams::new(0, 0).draws(0, Stream::Sample, Device::Cpu).expect("there is a CPU")
}

fn states(x_t: &Tensor, timesteps: &Tensor, labels: &Tensor) -> States {
    let mut states = States::new(points(), &grid(), vec![1, 2, 3], Source::Student)
        .expect("on the grid")
        .with_conditioning(Conditioning::class_labels(labels.shallow_clone()))
        .made_at(1);
    // Tensors of any kind and shape, without a check.
    (states.x_t, states.timesteps) = (x_t.shallow_clone(), timesteps.shallow_clone());
    states
}

fn times() -> Tensor {
    Tensor::from_slice(&[749_i64, 499, 249])
}

/// States whose lists are not of one length.
fn torn_states() -> Vec<States> {
    let changes: [fn(&mut States); 7] = [
        |states| states.created_at_step = vec![],
        |states| states.sources = vec![Source::Noise],
        |states| states.grid_indices = vec![9, usize::MAX, 0],
        |states| states.grid_indices = vec![1],
        |states| states.conditioning = Conditioning::none(),
        |states| {
            (states.sources, states.created_at_step, states.grid_indices) =
                (vec![], vec![], vec![]);
        },
        |states| {
            (states.sources, states.created_at_step) =
                (vec![Source::Forward; 5], vec![u64::MAX; 5]);
        },
    ];
    let torn = |change: fn(&mut States)| {
        let mut states = states(&points(), &times(), &labels());
        change(&mut states);
        states
    };
    changes.map(torn).into()
}

#[test]
fn ddil_core() {
    let mut cases = Cases::default();
    conditioning(&mut cases);
    batches(&mut cases);
    buffer(&mut cases);
    judges(&mut cases);
    denoisers(&mut cases);
    rollouts(&mut cases);
    mixed(&mut cases);
    sources(&mut cases);
    mixer(&mut cases);
    meters(&mut cases);
    shift(&mut cases);
    priors(&mut cases);
    random(&mut cases);
    cases.finish("ddil-core");
}

fn conditioning(cases: &mut Cases) {
    let (labels, rows) = (labels(), Tensor::from_slice(&[2_i64, 0]));
    let of = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
    cases.tensors("Conditioning::index_select", &[&labels, &rows], |t| {
        said(of(&t[0]).index_select(&t[1]))
    });
    cases.tensors("Conditioning::cat", &[&labels, &labels], |t| {
        said(Conditioning::cat(&[&of(&t[0]), &of(&t[1])]))
    });
    cases.once("Conditioning::cat", "nothing", || said(Conditioning::cat(&[])));
    cases.once("Conditioning::cat", "other parts", || {
        said(Conditioning::cat(&[&told(), &Conditioning::none()]))
    });
    cases.tensors("Conditioning::ensure_batch", &[&labels], |t| {
        said(of(&t[0]).ensure_batch("test", 3))
    });
    for device in [Device::Cpu, Device::Cuda(0), Device::Mps] {
        let what = format!("{device:?}");
        cases.tensors("Conditioning::to_device", &[&labels], |t| {
            let moved = of(&t[0]).to_device(device);
            if device == Device::Cpu { said(moved) } else { said(moved).or(Ok(())) }
        });
        cases.once("Data::to_device", &what, || {
            said(Data::new(points()).with_conditioning(told()).to_device(device))
        });
    }
    cases.tensors("Data::to_device", &[&points()], |t| {
        said(Data::new(t[0].shallow_clone()).with_conditioning(told()).to_device(Device::Cpu))
    });
    cases.once("Conditioning::ensure_known", "a part of another name", || {
        let conditioning = told().with("other", points());
        said(conditioning.ensure_known("predict", "a network", &[Conditioning::CLASS_LABELS]))
    });
    cases.cannot_fail(&[
        "Conditioning::class_labels",
        "Conditioning::with",
        "Conditioning::with_guidance_weight",
        "Conditioning::with_some",
        "Conditioning::without",
        "Conditioning::get",
    ]);
    cases.cannot_fail(&["Error::torch", "Error::network"]);
}

fn batches(cases: &mut Cases) {
    let made = |x_t: &Tensor, index: usize| {
        States::new(x_t.shallow_clone(), &grid(), vec![index; 3], Source::Forward)
    };
    cases.tensors("States::new", &[&points()], |t| said(made(&t[0], 1)));
    cases.wholes("States::new", |index| said(made(&points(), index as usize)));
    cases.cannot_fail(&[
        "Data::new",
        "Data::with_conditioning",
        "States::made_at",
        "States::with_conditioning",
        "SavedState::new",
        "SavedState::with_files",
        "SpillConfig::new",
        "BufferConfig::with",
    ]);
    cases.tensors("States::cat", &[&points(), &times(), &labels()], |t| {
        said(States::cat(&[states(&t[0], &t[1], &t[2]), states(&points(), &times(), &labels())]))
    });
    cases.once("States::cat", "nothing", || said(States::cat(&[])));
    cases.tensors("States::index_select", &[&points(), &times(), &labels()], |t| {
        said(states(&t[0], &t[1], &t[2]).index_select(&[2, 0]))
    });
    cases.once("States::index_select", "a row beyond", || {
        said(states(&points(), &times(), &labels()).index_select(&[3]))
    });
    for (i, torn) in torn_states().into_iter().enumerate() {
        cases.once("States::ensure", &format!("torn {i}"), || said(torn.ensure("test")));
        cases.once("States::index_select", &format!("torn {i}"), || {
            said(torn.index_select(&[0, 2]))
        });
    }
}

fn judges(cases: &mut Cases) {
    let mlp = MlpConfig { hidden_widths: vec![8], ..MlpConfig::default() };
    let head =
        DiscriminatorHeadConfig::for_mlp(&mlp).and_then(|head| head.build(Placement::default(), 0));
    let network = ModelConfig::Mlp(mlp).build(Placement::default(), 0).expect("it is valid");
    let network =
        NetworkDenoiser::new(network, PredictionType::Epsilon, schedule()).expect("it fits");
    let judge = NetworkDiscriminator::new(&network, head.expect("it fits")).expect("it fits");
    cases.tensors("Discriminator::logits", &[&points(), &times()], |t| {
        said(judge.logits(&t[0], &t[1], &Conditioning::none()))
    });
}

fn new_buffer() -> AggregationBuffer {
    let config = BufferConfig::default().with(|config| config.capacity = 12);
    AggregationBuffer::new(config, &grid()).expect("it is valid")
}

fn buffer(cases: &mut Cases) {
    for capacity in [0, 1, 2, 3, usize::MAX] {
        for byte_budget in [0, 1, u64::MAX] {
            let what = format!("{capacity} states, {byte_budget} bytes");
            let config = BufferConfig::default().with(|config| {
                config.capacity = capacity;
                config.byte_budget = byte_budget;
            });
            cases.once("AggregationBuffer::new", &what, || {
                let mut buffer =
                    AggregationBuffer::new(config, &grid()).map_err(|e| e.to_string())?;
                // A count of states that fits an integer, but no memory.
                said(buffer.insert(&states(&points(), &times(), &labels())))
            });
        }
    }
    let one = Timesteps::explicit(vec![999], 1000).expect("it falls");
    cases.once("AggregationBuffer::new", "a grid of one", || {
        let config = BufferConfig::default().with(|config| config.capacity = 4);
        let mut buffer = AggregationBuffer::new(config, &one).map_err(|e| e.to_string())?;
        said(buffer.insert(&states(&points(), &times(), &labels())))
    });
    cases.tensors("AggregationBuffer::insert", &[&points(), &times(), &labels()], |t| {
        let mut buffer = new_buffer();
        said(buffer.insert(&states(&t[0], &t[1], &t[2])))?;
        said(buffer.insert(&states(&points(), &times(), &labels()))).or(Ok(()))
    });
    cases.tensors("AggregationBuffer::insert", &[&points(), &labels()], |t| {
        let mut buffer = new_buffer();
        said(buffer.insert(&states(&points(), &times(), &labels())))?;
        said(buffer.insert(&states(&t[0], &times(), &t[1])))
    });
    for (i, torn) in torn_states().iter().enumerate() {
        cases.once("AggregationBuffer::insert", &format!("torn {i}"), || {
            said(new_buffer().insert(torn))
        });
    }
    full_buffer(cases);
    spilled_files(cases);
}

fn spilled_files(cases: &mut Cases) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("segment");
    std::fs::write(&path, [1; 64]).expect("there is room");
    let places = [&path, &folder.path().to_owned(), &folder.path().join("none")];
    for place in places.into_iter().chain([&"nul\0byte".into()]) {
        let what = place.display().to_string();
        cases.once("SavedState::from_folder", &what, || said(SavedState::from_folder(place)));
        cases.once("SavedState::write", &what, || {
            said(new_buffer().save().expect("empty").write(place.join("saved")))
        });
        for bytes in [0, 64, 65, u64::MAX] {
            let (name, what) = ("segment".to_owned(), format!("{bytes} of {}", place.display()));
            let file = SavedFile { name, path: place.clone(), bytes, crc32: 0 };
            cases.once("SavedFile::ensure_intact", &what, || said(file.ensure_intact()));
            cases.once("SavedFile::link_to", &what, || said(file.link_to(&path)));
            cases.once("SavedFile::link_to", &what, || {
                said(file.link_to(&folder.path().join("none/other")))
            });
            let mut buffer = new_buffer();
            let saved = new_buffer().save().expect("empty").with_files(vec![file]);
            cases.once("AggregationBuffer::restore", &what, || said(buffer.restore(&saved)));
        }
    }
}

fn full_buffer(cases: &mut Cases) {
    let mut full = new_buffer();
    full.insert(&states(&points(), &times(), &labels())).expect("it fits");
    cases.wholes("AggregationBuffer::sample", |i| {
        let mut buffer = new_buffer();
        said(buffer.restore(&full.save().map_err(|e| e.to_string())?))?;
        said(buffer.sample(&[i as usize], 2, &mut StdRng::seed_from_u64(0)))
    });
    cases.wholes("AggregationBuffer::available", |i| {
        let mut buffer = new_buffer();
        let _ = (buffer.available(i as usize, 0), buffer.available(1, i as u64));
        Ok(())
    });
    cases.wholes("AggregationBuffer::statistics", |step| {
        let _ = full.statistics(step as u64);
        Ok(())
    });
    cases.wholes("AggregationBuffer::ensure_batch_size", |n| {
        said(full.ensure_batch_size(n as usize))
    });
    cases.once("AggregationBuffer::restore", "nothing", || {
        said(new_buffer().restore(&SavedState::default()))
    });
    let saved = full.save().expect("it can be saved");
    let named = |at: usize| &saved.tensors[at].1;
    cases.tensors("AggregationBuffer::restore", &[named(0), named(1)], |t| {
        let tensors =
            saved.tensors.iter().zip(t).map(|((name, _), t)| (name.clone(), t.shallow_clone()));
        let saved = SavedState::new(tensors.collect(), saved.metadata.clone());
        said(new_buffer().restore(&saved))
    });
}

/// Checks of every denoiser.
fn ask(cases: &mut Cases, denoiser: &dyn Denoiser, conditioning: fn(&Tensor) -> Conditioning) {
    cases.tensors("Denoiser::predict", &[&points(), &times(), &labels()], |t| {
        said(denoiser.predict(&t[0], &t[1], &conditioning(&t[2])))
    });
    cases.tensors("Denoiser::estimate", &[&points(), &labels()], |t| {
        said(denoiser.estimate(&t[0], 749, &conditioning(&t[1])))
    });
    cases.wholes("Denoiser::estimate", |at| {
        said(denoiser.estimate(&points(), at, &conditioning(&labels())))
    });
}

fn denoisers(cases: &mut Cases) {
    let labelled = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
    ask(cases, &teacher(), labelled);
    ask(cases, &Guided::new(teacher(), 3.0, null()).expect("it is valid"), labelled);
    ask(cases, &Consistent::new(teacher(), ConsistencyBoundary::default()), labelled);
    let clamped = Thresholded::new(teacher(), Thresholding::clamp_pixels()).expect("it is valid");
    let meter = ClipMeter::new(&schedule());
    ask(cases, &clamped.metered(meter), labelled);
    let by_weight = GuidedByWeight::new(teacher(), null()).expect("it is valid");
    cases.tensors(
        "Denoiser::predict",
        &[&points(), &times(), &Tensor::ones([3], kind::FLOAT_CPU)],
        |t| {
            let told = told().with_guidance_weight(t[2].shallow_clone());
            said(by_weight.predict(&t[0], &t[1], &told))
        },
    );
    cases.numbers("Guided::new", |scale| said(Guided::new(teacher(), scale, null())));
    cases.tensors("Guided::new", &[&Tensor::from_slice(&[0_i64])], |t| {
        said(Guided::new(teacher(), 3.0, Conditioning::class_labels(t[0].shallow_clone())))
    });
    cases.tensors("GuidedByWeight::new", &[&Tensor::from_slice(&[0_i64])], |t| {
        said(GuidedByWeight::new(teacher(), Conditioning::class_labels(t[0].shallow_clone())))
    });
    for number in ODD_NUMBERS {
        let thresholding = Thresholding::Dynamic { ratio: number, max_value: number };
        cases.once("Thresholded::new", &number.to_string(), || {
            said(Thresholded::new(teacher(), thresholding))
        });
    }
    cases.tensors("repeated_timestep", &[&points()], |t| said(repeated_timestep(749, &t[0])));
    cases.cannot_fail(&["SourceRequest::states"]);
    cases.cannot_fail(&["Consistent::new", "Thresholded::metered", "with_boundary"]);
}

fn rollouts(cases: &mut Cases) {
    let (teacher, schedule) = (teacher(), schedule());
    let samplers: [Box<dyn ddil_schedulers::Sampler>; 2] =
        [Box::new(Ddim::new(schedule.clone())), Box::new(Lcm::new(schedule.clone()))];
    for sampler in &samplers {
        rollouts_of(cases, sampler.as_ref());
    }
    let far = Timesteps::explicit(vec![5000, 3], 10_000).expect("it falls");
    cases.once("Rollout::sample", "a grid off the schedule", || {
        let told = told();
        let rollout = Rollout::new(&teacher, samplers[0].as_ref(), &far);
        said(rollout.conditioning(&told).sample(points()))
    });
    cases.cannot_fail(&[
        "Rollout::new",
        "Rollout::conditioning",
        "Rollout::generator",
        "Rollout::generators",
        "Rollout::keep",
        "FnDenoiser::new",
    ]);
    cases.tensors("first_state", &[&points()], |t| said(first_state(&schedule, 999, &t[0])));
    let flow = NoiseScheduleConfig::Flow(ddil_schedulers::FlowConfig::default());
    let flow = flow.build().expect("the default is valid");
    cases.tensors("first_state", &[&points()], |t| said(first_state(&flow, 999, &t[0])));
    cases.wholes("first_state", |t| said(first_state(&flow, t, &points())));
}

fn rollouts_of(cases: &mut Cases, sampler: &dyn ddil_schedulers::Sampler) {
    let (teacher, grid) = (teacher(), grid());
    let of = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
    cases.tensors("Rollout::run", &[&points(), &labels()], |t| {
        let (told, mut generator) = (of(&t[1]), generator());
        let rollout = Rollout::new(&teacher, sampler, &grid).conditioning(&told);
        said(rollout.generator(&mut generator).run(t[0].shallow_clone()))
    });
    cases.tensors("Rollout::run", &[&points(), &labels()], |t| {
        let (told, fine, mut generator) = (of(&t[1]), fine(), generator());
        let rollout = Rollout::new(&teacher, sampler, &fine).conditioning(&told).keep(&grid);
        said(rollout.generator(&mut generator).run(t[0].shallow_clone()))
    });
    cases.once("Rollout::run", "timesteps that are not visited", || {
        let (told, fine, mut generator) = (told(), fine(), generator());
        let rollout = Rollout::new(&teacher, sampler, &grid).conditioning(&told).keep(&fine);
        said(rollout.generator(&mut generator).run(points()))
    });
    cases.tensors("Rollout::sample", &[&points(), &labels()], |t| {
        let (told, mut generators) = (of(&t[1]), [generator(), generator(), generator()]);
        let rollout = Rollout::new(&teacher, sampler, &grid).conditioning(&told);
        said(rollout.generators(&mut generators).sample(t[0].shallow_clone()))
    });
    cases.once("Rollout::run", "no generator", || {
        let told = told();
        said(Rollout::new(&teacher, sampler, &grid).conditioning(&told).run(points()))
    });
}

fn mixed(cases: &mut Cases) {
    let (student, teacher) = (teacher(), teacher());
    let (ddim, grid, fine) = (Ddim::new(schedule()), grid(), fine());
    let variants = |number: f64| {
        [
            MixedVariant::Bernoulli { kappa: number },
            MixedVariant::Conditional { threshold: number },
            MixedVariant::TeacherThenStudent { switch: number as usize },
            MixedVariant::StudentThenTeacher { switch: number as usize },
        ]
    };
    for number in ODD_NUMBERS {
        for variant in variants(number) {
            cases.once("MixedVariant::ensure", &format!("{variant:?}"), || said(variant.ensure()));
        }
    }
    for variant in [None].into_iter().chain(variants(0.5).map(Some)) {
        let rollout =
            MixedRollout::new((&student, &ddim, &grid), (&teacher, &ddim, &fine), variant);
        let of = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
        cases.tensors("MixedRollout::visit", &[&points(), &labels()], |t| {
            said(rollout.visit(&t[0], &of(&t[1]), &[749, 249, 499], &mut draws()))
        });
        cases.tensors("MixedRollout::visit_from", &[&points(), &labels()], |t| {
            said(rollout.visit_from(1, &t[0], &of(&t[1]), &[499, 249, 249], &mut draws()))
        });
        cases.wholes("MixedRollout::visit_from", |start| {
            said(rollout.visit_from(start as usize, &points(), &told(), &[249; 3], &mut draws()))
        });
        cases.wholes("MixedRollout::visit", |target| {
            said(rollout.visit(&points(), &told(), &[target, 249, 499], &mut draws()))
        });
        cases.once("MixedRollout::visit", "too few targets", || {
            said(rollout.visit(&points(), &told(), &[249], &mut draws()))
        });
    }
    let rollout = MixedRollout::new((&student, &ddim, &grid), (&teacher, &ddim, &fine), None);
    let mut visited =
        rollout.visit(&points(), &told(), &[749, 249, 499], &mut draws()).expect("on the grid");
    (visited.rows, visited.timesteps) = (vec![0], vec![3, 4]);
    cases.wholes("Visited::position", |row| {
        let _ = visited.position(row as usize, 3);
        Ok(())
    });
}

fn sources(cases: &mut Cases) {
    let grids = grids();
    for config in source_configs() {
        source(cases, &config, &grids);
    }
    cases.once("StudentSource::new", "defaults", || {
        said(StudentSource::new(StudentConfig::default(), &grids))
    });
    cases.once("TeacherSource::new", "defaults", || {
        said(TeacherSource::new(TeacherConfig::default(), &grids))
    });
    let other = grids.clone().with_teacher(Timesteps::explicit(vec![7], 1000).expect("it falls"));
    cases.once("StudentSource::new", "other grids", || {
        said(StudentSource::new(StudentConfig::default(), &other))
    });
    cases.once("TeacherSource::new", "other grids", || {
        said(TeacherSource::new(TeacherConfig::default(), &other))
    });
    cases.once("Grids::ensure", "other grids", || said(other.ensure()));
}

fn source_configs() -> Vec<SourceConfig> {
    let numbers = [0, 1, 3, usize::MAX];
    let mut configs = vec![SourceConfig::Forward];
    for n in numbers {
        let steps = Some(RolloutSteps { min: n, max: n });
        let buffer = BufferConfig::default().with(|config| config.capacity = n);
        let policy = StudentPolicy::Buffer { buffer, new_fraction: n as f64 };
        configs.push(SourceConfig::Student(
            StudentConfig::default().with(|config| config.rollout_steps = steps),
        ));
        configs.push(SourceConfig::Student(StudentConfig::default().with(|config| {
            config.rollout_steps = steps;
            config.policy = StudentPolicy::Fresh;
        })));
        configs.push(SourceConfig::Student(
            StudentConfig::default().with(|config| config.policy = StudentPolicy::FreshAll),
        ));
        configs
            .push(SourceConfig::Student(StudentConfig::default().with(|config| {
                config.policy = StudentPolicy::Chain { refresh_fraction: n as f64 }
            })));
        configs.push(SourceConfig::Student(
            StudentConfig::default().with(|config| config.policy = policy),
        ));
        configs.push(SourceConfig::Teacher(TeacherConfig::default().with(|config| {
            config.pool = n;
            config.substeps = n as u32;
            config.states_per_trajectory = Some(n);
        })));
        configs
            .push(SourceConfig::Teacher(TeacherConfig::default().with(|config| config.pool = n)));
    }
    configs
}

fn source(cases: &mut Cases, config: &SourceConfig, grids: &Grids) {
    let what = format!("{config:?}");
    cases.once("SourceConfig::build", &what, || {
        let mut source = config.build(grids).map_err(|error| error.to_string())?;
        said(source.ensure_batch_size(usize::MAX)).or(Ok::<_, String>(()))?;
        use_source(source.as_mut(), &points(), &[1, 2, 3])?;
        said(source.restore(&SavedState::default())).or(Ok(()))
    });
    let built = std::panic::catch_unwind(|| config.build(grids));
    let Ok(Ok(mut built)) = built else { return };
    cases.tensors("TrajectorySource::states", &[&points()], |t| {
        let mut source = config.build(grids).map_err(|error| error.to_string())?;
        use_source(source.as_mut(), &t[0], &[1, 2, 3])
    });
    for indices in [&[][..], &[0], &[4], &[usize::MAX], &[1, 2, 3, 1, 2]] {
        cases.once("TrajectorySource::states", &format!("{indices:?} of {what}"), || {
            use_source(built.as_mut(), &points(), indices)
        });
    }
    cases.tensors("TrajectorySource::after_loss", &[&points(), &points()], |t| {
        let mut source = config.build(grids).map_err(|error| error.to_string())?;
        let states = states(&points(), &times(), &labels());
        feed(source.as_mut(), &states, &t[0], Some(&t[1]))
    });
    for (i, torn) in torn_states().iter().enumerate() {
        cases.once("TrajectorySource::after_loss", &format!("torn {i} of {what}"), || {
            feed(built.as_mut(), torn, &points(), None)
        });
    }
    cases.wholes("TrajectorySource::ensure_batch_size", |n| {
        said(built.ensure_batch_size(n as usize))
    });
    cases.once("TrajectorySource::restore", &what, || {
        let metadata = serde_json::json!([1, {"a": null}]);
        let saved = SavedState::new(vec![("x_t".to_owned(), points())], metadata);
        let mut source = config.build(grids).map_err(|error| error.to_string())?;
        said(source.restore(&saved))
    });
}

fn use_source(
    source: &mut dyn TrajectorySource,
    x0: &Tensor,
    indices: &[usize],
) -> Result<(), String> {
    let (student, teacher, ddim, grids) = (teacher(), teacher(), Ddim::new(schedule()), grids());
    let (streams, data) =
        (RandomStreams::new(0, 0), Data::new(x0.shallow_clone()).with_conditioning(told()));
    let clock = Clock::new(1, 10, streams);
    let networks = RolloutNetworks::new(&student, &teacher);
    let request = SourceRequest::new(&clock, indices, (&data, x0), &grids, &ddim, networks);
    said(source.states(&request))
}

fn feed(
    source: &mut dyn TrajectorySource,
    states: &States,
    student_x0: &Tensor,
    teacher_next: Option<&Tensor>,
) -> Result<(), String> {
    let (ddim, grids, streams) = (Ddim::new(schedule()), grids(), RandomStreams::new(0, 0));
    let feedback = Feedback::new(student_x0).with_teacher_next(teacher_next);
    let clock = Clock::new(1, 10, streams);
    said(source.after_loss(&LossFeedback::new(&clock, states, &feedback, &grids, &ddim)))
}

fn new_mixer(config: MixerConfig) -> Result<Mixer, Error> {
    Mixer::new(config, grid(), Box::new(Ddim::new(schedule())))
}

fn mixer(cases: &mut Cases) {
    cases.once("Mixer::new", "defaults", || said(new_mixer(MixerConfig::default())));
    let far = Timesteps::explicit(vec![5000, 3], 10_000).expect("it falls");
    cases.once("Mixer::new", "a grid off the schedule", || {
        said(Mixer::new(MixerConfig::default(), far.clone(), Box::new(Ddim::new(schedule()))))
    });
    cases.once("Mixer::with_rollout", "other timesteps", || {
        said(Mixer::with_rollout(
            MixerConfig::default(),
            grid(),
            far.clone(),
            Box::new(Ddim::new(schedule())),
        ))
    });
    for place in Source::ALL {
        cases.once("Mixer::replace_source", place.as_str(), || {
            let mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
            said(mixer.replace_source(place, Box::new(ddil_core::ForwardSource)))
        });
    }
    for name in ["own", "", "noise", "adaptation", "Own states", "a_name_that_is_much_too_long"] {
        cases.once("SourceName::new", name, || said(ddil_core::SourceName::new(name)));
        for share in ODD_NUMBERS {
            cases.once("Mixer::with_source", &format!("{name}, {share}"), || {
                let mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
                said(mixer.with_source(name, share, Box::new(ddil_core::ForwardSource)))
            });
        }
    }
    cases.tensors("Mixer::next_states", &[&points(), &labels()], |t| {
        mix(&t[0], Conditioning::class_labels(t[1].shallow_clone()), &told())
    });
    cases.tensors("Mixer::next_states", &[&labels()], |t| {
        mix(&points(), told(), &Conditioning::class_labels(t[0].shallow_clone()))
    });
    fed_mixer(cases);
}

fn fed_mixer(cases: &mut Cases) {
    let mut mixer = new_mixer(MixerConfig::default()).expect("it is valid");
    let clock = Clock::new(1, 10, RandomStreams::new(0, 0));
    cases.tensors("Mixer::feed_back", &[&points(), &points()], |t| {
        let states = states(&points(), &times(), &labels());
        let mut mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
        let feedback = Feedback::new(&t[0]).with_teacher_next(Some(&t[1]));
        said(mixer.feed_back(&clock, &states, &feedback))
    });
    let priors = AdaptivePriors::default().with(|config| config.signal = AdaptiveSignal::LossRatio);
    let config =
        MixerConfig::default().with(|config| config.priors = PriorSchedule::Adaptive(priors));
    cases.tensors("Mixer::feed_back", &[&Tensor::ones([3], kind::FLOAT_CPU)], |t| {
        let states = states(&points(), &times(), &labels());
        let mut mixer = new_mixer(config.clone()).map_err(|error| error.to_string())?;
        let x0 = points();
        said(mixer.feed_back(&clock, &states, &Feedback::new(&x0).with_losses(Some(&t[0]))))
    });
    for (i, torn) in torn_states().iter().enumerate() {
        let what = format!("torn {i}");
        cases.once("Mixer::feed_back", &what, || {
            said(mixer.feed_back(&clock, torn, &Feedback::new(&points())))
        });
    }
    cases.wholes("Mixer::ensure_batch_size", |n| said(mixer.ensure_batch_size(n as usize)));
    cases.wholes("Mixer::priors_at", |step| {
        let _ = (mixer.priors_at(step as u64, 10), mixer.priors_at(3, step as u64));
        Ok(())
    });
    cases.wholes("Mixer::priors_by_index", |step| {
        let _ = mixer.priors_by_index(step as u64, step as u64);
        Ok(())
    });
    cases.once("Mixer::restore", "nothing", || {
        let mut mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
        said(mixer.restore(&SavedState::default()))
    });
    for (batch, indices) in [(0, 0), (3, 0), (3, 1), (0, 4), (3, usize::MAX)] {
        cases.once("draw_grid_indices", &format!("{batch} of {indices}"), || {
            let _ = draw_grid_indices(batch, indices, &mut StdRng::seed_from_u64(0));
            Ok(())
        });
    }
    cases.cannot_fail(&[
        "AdaptivePriors::with",
        "Clock::new",
        "Grids::new",
        "Grids::with_rollout",
        "Grids::with_teacher",
        "LossFeedback::new",
        "MixedRollout::new",
        "MixerConfig::with",
        "ShiftConfig::with",
        "ShiftRequest::at_step",
        "ShiftRequest::new",
        "SourceRequest::new",
        "SourceRequest::with_prompts",
        "SourceRequest::with_teacher_sampler",
        "StudentConfig::with",
        "TeacherConfig::with",
        "Feedback::new",
        "Feedback::with_losses",
        "Feedback::with_teacher_next",
        "MixBatch::new",
        "MixBatch::with_prompts",
        "MixerCounters::fraction",
        "RolloutNetworks::new",
        "SourceName::as_str",
    ]);
}

fn mix(x0: &Tensor, conditioning: Conditioning, prompts: &Conditioning) -> Result<(), String> {
    let (student, teacher) = (teacher(), teacher());
    let data = Data::new(x0.shallow_clone()).with_conditioning(conditioning);
    let mut mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
    let streams = RandomStreams::new(0, 0);
    for total_steps in [10, 0] {
        let clock = Clock::new(5, total_steps, streams);
        let batch = MixBatch::new(&data).with_prompts(prompts);
        let networks = RolloutNetworks::new(&student, &teacher);
        said(mixer.next_states(&clock, &batch, &networks))?;
    }
    Ok(())
}

fn meters(cases: &mut Cases) {
    let x = points();
    let meter = ClipMeter::new(&schedule());
    cases.tensors("ClipMeter::measure", &[&x, &times()], |t| {
        said(meter.measure(&Thresholding::clamp_pixels(), &t[0], &t[1]))
    });
    meter.rows_are(&[Source::Student; 3]);
    cases.tensors("ClipMeter::measure", &[&x, &times()], |t| {
        said(meter.measure(&Thresholding::clamp_pixels(), &t[0], &t[1]))?;
        said(meter.take())
    });
    cases.cannot_fail(&["ClipMeter::new", "ClipMeter::rows_are", "ClippedFraction::figure"]);
    for indices in [0, 1, 4, 1000] {
        cases.tensors("LossMeter::add", &[&Tensor::ones([3], kind::FLOAT_CPU)], |t| {
            let mut meter = LossMeter::new(4);
            said(meter.add(&t[0], &states(&points(), &times(), &labels())))?;
            said(meter.take())
        });
        for (i, torn) in torn_states().iter().enumerate() {
            cases.once("LossMeter::add", &format!("torn {i} of {indices}"), || {
                let mut meter = LossMeter::new(indices);
                said(meter.add(&Tensor::ones([3], kind::FLOAT_CPU), torn))?;
                said(meter.take())
            });
        }
    }
    cases.cannot_fail(&["LossMeter::new"]);
    let table = LossMeter::new(4).take().expect("there is nothing");
    cases.wholes("LossTable::mean", |i| {
        let _ = table.mean(&Source::ALL, i as usize);
        Ok(())
    });
    cases.wholes("LossTable::samples", |i| {
        let _ = table.samples(&Source::ALL, i as usize);
        Ok(())
    });
    cases.wholes("LossTable::gap", |i| {
        let _ = table.gap(Source::Noise, i as usize);
        Ok(())
    });
}

fn shift(cases: &mut Cases) {
    let x = Tensor::randn([6, 2], kind::FLOAT_CPU);
    let config = ShiftConfig::default().with(|config| config.projections = 4);
    cases.tensors("shift_at", &[&x, &x, &x, &x], |t| {
        said(shift_at(3, &t[0], &t[1], (&t[2], &t[3]), &config, &mut generator()))
    });
    cases.wholes("shift_at", |n| {
        let config = ShiftConfig::default().with(|config| {
            config.projections = n.min(1000);
            config.batch_size = n;
            config.pool = Some(n);
        });
        said(shift_at(3, &x, &x, (&x, &x), &config, &mut generator()))
    });
    let (student, ddim, streams) = (teacher(), Ddim::new(schedule()), RandomStreams::new(0, 0));
    let labels = Tensor::from_slice(&[0_i64, 1, 0, 1, 0, 1]);
    cases.tensors("measure_shift", &[&x, &labels], |t| {
        let conditioning = Conditioning::class_labels(t[1].shallow_clone());
        let data = Data::new(t[0].shallow_clone()).with_conditioning(conditioning);
        let grid = grid();
        let request = ShiftRequest::new(&data, &student, &ddim, &grid, streams);
        said(measure_shift(&request, &config))
    });
}

fn priors(cases: &mut Cases) {
    for a in ODD_NUMBERS {
        for b in ODD_NUMBERS {
            cases.numbers("Priors::new", |c| said(Priors::new(a, b, c)));
        }
    }
    let priors =
        Priors::new(1.0, 1.0, 1.0).or_else(|_| Priors::new(0.5, 0.25, 0.25)).expect("they add up");
    cases.once("Priors::assign", "nothing", || {
        let _ = priors.assign(0, &mut StdRng::seed_from_u64(0));
        Ok(())
    });
    for schedule in [
        PriorSchedule::default(),
        PriorSchedule::default_for_pd(),
        PriorSchedule::default_for_lcm(),
        PriorSchedule::default_for_dmd2(),
    ] {
        cases.numbers("PriorSchedule::at", |progress| {
            let _ = schedule.at(progress);
            said(schedule.ensure())
        });
    }
    cases.once("PriorSchedule::ensure", "no steps", || {
        said(PriorSchedule::Steps { steps: vec![] }.ensure())
    });
    cases.cannot_fail(&["PriorSchedule::constant"]);
    cases.once("AdaptivePriors::ensure", "defaults", || said(AdaptivePriors::default().ensure()));
}

fn random(cases: &mut Cases) {
    let streams = RandomStreams::new(u64::MAX, u64::MAX);
    for step in [0, 1, u64::MAX] {
        let what = step.to_string();
        let stream = ddil_core::Stream::Data;
        for device in [Device::Cpu, Device::Cuda(3)] {
            cases.once("RandomStreams::generator", &what, || {
                said(streams.generator(step, stream, device))
            });
            cases.once("RandomStreams::draws", &what, || said(streams.draws(step, stream, device)));
        }
        cases.once("RandomStreams::seed_of", &what, || {
            let _ = (streams.seed_of(step, stream), streams.rng(step, stream));
            Ok(())
        });
    }
    cases.cannot_fail(&["RandomStreams::new", "RandomStreams::rng"]);
}
