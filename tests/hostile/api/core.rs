use ddil_core::{
    AdaptivePriors, AdaptiveSignal, AggregationBuffer, BufferConfig, ClipMeter, Clock,
    Conditioning, Consistent, Data, Denoiser, Discriminator, Draws, Error, Feedback, FnDenoiser,
    GaussianMixture, Generator, Grids, Guided, GuidedByWeight, LossFeedback, LossMeter, MixBatch,
    MixedRollout, MixedVariant, Mixer, MixerConfig, MixtureDenoiser, PriorSchedule, Priors,
    RandomStreams, Rollout, RolloutNetworks, RolloutSteps, SavedFile, SavedState, ShiftConfig,
    ShiftRequest, SolverRollout, Source, SourceConfig, SourceRequest, States, Stream,
    StudentConfig, StudentPolicy, StudentSource, TeacherConfig, TeacherSource, Thresholded,
    TrajectorySource, draw_grid_indices, draw_stratified, first_state, measure_shift,
    repeated_level, repeated_timestep, shift_at,
};
use ddil_models::{
    DiscriminatorHeadConfig, MlpConfig, ModelConfig, NetworkConfig, NetworkDenoiser,
    NetworkDiscriminator, Placement,
};
use ddil_schedulers::{
    ConsistencyBoundary, Ddim, Lcm, NoiseLevel, NoiseSchedule, NoiseScheduleConfig, PredictionType,
    Scale, SolverConfig, Thresholding, TimestepSpacing, Timesteps,
};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Device, Tensor, kind};

use super::cases::{Cases, ODD_NUMBERS, ODD_WHOLES, outcome};

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

fn labels_and_text() -> Conditioning {
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
    discriminator_cases(&mut cases);
    denoisers(&mut cases);
    mixtures(&mut cases);
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
        outcome(of(&t[0]).index_select(&t[1]))
    });
    cases.tensors("Conditioning::cat", &[&labels, &labels], |t| {
        outcome(Conditioning::cat(&[&of(&t[0]), &of(&t[1])]))
    });
    cases.once("Conditioning::cat", "nothing", || outcome(Conditioning::cat(&[])));
    cases.once("Conditioning::cat", "other parts", || {
        outcome(Conditioning::cat(&[&labels_and_text(), &Conditioning::none()]))
    });
    cases.tensors("Conditioning::ensure_batch", &[&labels], |t| {
        outcome(of(&t[0]).ensure_batch("test", 3))
    });
    for device in [Device::Cpu, Device::Cuda(0), Device::Mps] {
        let what = format!("{device:?}");
        cases.tensors("Conditioning::to_device", &[&labels], |t| {
            let moved = of(&t[0]).to_device(device);
            if device == Device::Cpu { outcome(moved) } else { outcome(moved).or(Ok(())) }
        });
        cases.once("Data::to_device", &what, || {
            outcome(Data::new(points()).with_conditioning(labels_and_text()).to_device(device))
        });
    }
    cases.tensors("Data::to_device", &[&points()], |t| {
        outcome(
            Data::new(t[0].shallow_clone())
                .with_conditioning(labels_and_text())
                .to_device(Device::Cpu),
        )
    });
    cases.once("Conditioning::ensure_known", "a part of another name", || {
        let conditioning = labels_and_text().with("other", points());
        outcome(conditioning.ensure_known("predict", "a network", &[Conditioning::CLASS_LABELS]))
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
    cases.tensors("States::new", &[&points()], |t| outcome(made(&t[0], 1)));
    cases.integers("States::new", |index| outcome(made(&points(), index as usize)));
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
        outcome(States::cat(&[states(&t[0], &t[1], &t[2]), states(&points(), &times(), &labels())]))
    });
    cases.once("States::cat", "nothing", || outcome(States::cat(&[])));
    cases.tensors("States::index_select", &[&points(), &times(), &labels()], |t| {
        outcome(states(&t[0], &t[1], &t[2]).index_select(&[2, 0]))
    });
    cases.once("States::index_select", "a row beyond", || {
        outcome(states(&points(), &times(), &labels()).index_select(&[3]))
    });
    for (i, torn) in torn_states().into_iter().enumerate() {
        cases.once("States::ensure", &format!("torn {i}"), || outcome(torn.ensure("test")));
        cases.once("States::index_select", &format!("torn {i}"), || {
            outcome(torn.index_select(&[0, 2]))
        });
    }
}

fn discriminator_cases(cases: &mut Cases) {
    let mlp = ModelConfig::Mlp(MlpConfig { hidden_widths: vec![8], ..MlpConfig::default() });
    let head = DiscriminatorHeadConfig::for_model(&mlp)
        .and_then(|head| head.build(Placement::default(), 0));
    let network = mlp.build(Placement::default(), 0).expect("it is valid");
    let network =
        NetworkDenoiser::new(network, PredictionType::Epsilon, schedule()).expect("it fits");
    let judge = NetworkDiscriminator::new(&network, head.expect("it fits")).expect("it fits");
    cases.tensors("Discriminator::logits", &[&points(), &times()], |t| {
        outcome(judge.logits(&t[0], &t[1], &Conditioning::none()))
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
                outcome(buffer.insert(&states(&points(), &times(), &labels())))
            });
        }
    }
    let one = Timesteps::explicit(vec![999], 1000).expect("it falls");
    cases.once("AggregationBuffer::new", "a grid of one", || {
        let config = BufferConfig::default().with(|config| config.capacity = 4);
        let mut buffer = AggregationBuffer::new(config, &one).map_err(|e| e.to_string())?;
        outcome(buffer.insert(&states(&points(), &times(), &labels())))
    });
    cases.tensors("AggregationBuffer::insert", &[&points(), &times(), &labels()], |t| {
        let mut buffer = new_buffer();
        outcome(buffer.insert(&states(&t[0], &t[1], &t[2])))?;
        outcome(buffer.insert(&states(&points(), &times(), &labels()))).or(Ok(()))
    });
    cases.tensors("AggregationBuffer::insert", &[&points(), &labels()], |t| {
        let mut buffer = new_buffer();
        outcome(buffer.insert(&states(&points(), &times(), &labels())))?;
        outcome(buffer.insert(&states(&t[0], &times(), &t[1])))
    });
    for (i, torn) in torn_states().iter().enumerate() {
        cases.once("AggregationBuffer::insert", &format!("torn {i}"), || {
            outcome(new_buffer().insert(torn))
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
        cases.once("SavedState::from_folder", &what, || outcome(SavedState::from_folder(place)));
        cases.once("SavedState::write", &what, || {
            outcome(new_buffer().save().expect("empty").write(place.join("saved")))
        });
        for bytes in [0, 64, 65, u64::MAX] {
            let (name, what) = ("segment".to_owned(), format!("{bytes} of {}", place.display()));
            let file = SavedFile { name, path: place.clone(), bytes, crc32: 0 };
            cases.once("SavedFile::ensure_intact", &what, || outcome(file.ensure_intact()));
            cases.once("SavedFile::link_to", &what, || outcome(file.link_to(&path)));
            cases.once("SavedFile::link_to", &what, || {
                outcome(file.link_to(&folder.path().join("none/other")))
            });
            let mut buffer = new_buffer();
            let saved = new_buffer().save().expect("empty").with_files(vec![file]);
            cases.once("AggregationBuffer::restore", &what, || outcome(buffer.restore(&saved)));
        }
    }
}

fn full_buffer(cases: &mut Cases) {
    let mut full = new_buffer();
    full.insert(&states(&points(), &times(), &labels())).expect("it fits");
    cases.integers("AggregationBuffer::sample", |i| {
        let mut buffer = new_buffer();
        outcome(buffer.restore(&full.save().map_err(|e| e.to_string())?))?;
        outcome(buffer.sample(&[i as usize], 2, &mut StdRng::seed_from_u64(0)))
    });
    cases.integers("AggregationBuffer::available", |i| {
        let mut buffer = new_buffer();
        let _ = (buffer.available(i as usize, 0), buffer.available(1, i as u64));
        Ok(())
    });
    cases.integers("AggregationBuffer::statistics", |step| {
        let _ = full.statistics(step as u64);
        Ok(())
    });
    cases.integers("AggregationBuffer::ensure_batch_size", |n| {
        outcome(full.ensure_batch_size(n as usize))
    });
    cases.once("AggregationBuffer::restore", "nothing", || {
        outcome(new_buffer().restore(&SavedState::default()))
    });
    let saved = full.save().expect("it can be saved");
    let named = |at: usize| &saved.tensors[at].1;
    cases.tensors("AggregationBuffer::restore", &[named(0), named(1)], |t| {
        let tensors =
            saved.tensors.iter().zip(t).map(|((name, _), t)| (name.clone(), t.shallow_clone()));
        let saved = SavedState::new(tensors.collect(), saved.metadata.clone());
        outcome(new_buffer().restore(&saved))
    });
}

/// Checks of every denoiser.
fn denoiser_cases(
    cases: &mut Cases,
    denoiser: &dyn Denoiser,
    conditioning: fn(&Tensor) -> Conditioning,
) {
    cases.tensors("Denoiser::predict", &[&points(), &times(), &labels()], |t| {
        outcome(denoiser.predict(&t[0], &t[1], &conditioning(&t[2])))
    });
    cases.tensors("Denoiser::estimate", &[&points(), &labels()], |t| {
        let level = denoiser.schedule().level_at(749).expect("on the grid");
        outcome(denoiser.estimate(&t[0], level, &conditioning(&t[1])))
    });
    let at = |timestep: f64| NoiseLevel { timestep, scale: Scale { alpha: 0.6, sigma: 0.8 } };
    cases.integers("Denoiser::estimate", |t| {
        outcome(denoiser.estimate(&points(), at(t as f64), &conditioning(&labels())))
    });
    cases.numbers("Denoiser::estimate", |t| {
        outcome(denoiser.estimate(&points(), at(t), &conditioning(&labels())))
    });
}

fn denoisers(cases: &mut Cases) {
    let labelled = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
    denoiser_cases(cases, &teacher(), labelled);
    denoiser_cases(cases, &Guided::new(teacher(), 3.0, null()).expect("it is valid"), labelled);
    denoiser_cases(cases, &Consistent::new(teacher(), ConsistencyBoundary::default()), labelled);
    let clamped = Thresholded::new(teacher(), Thresholding::clamp_pixels()).expect("it is valid");
    let meter = ClipMeter::new(&schedule());
    denoiser_cases(cases, &clamped.metered(meter), labelled);
    let by_weight = GuidedByWeight::new(teacher(), null()).expect("it is valid");
    cases.tensors(
        "Denoiser::predict",
        &[&points(), &times(), &Tensor::ones([3], kind::FLOAT_CPU)],
        |t| {
            let labels_and_text = labels_and_text().with_guidance_weight(t[2].shallow_clone());
            outcome(by_weight.predict(&t[0], &t[1], &labels_and_text))
        },
    );
    cases.numbers("Guided::new", |scale| outcome(Guided::new(teacher(), scale, null())));
    cases.tensors("Guided::new", &[&Tensor::from_slice(&[0_i64])], |t| {
        outcome(Guided::new(teacher(), 3.0, Conditioning::class_labels(t[0].shallow_clone())))
    });
    cases.tensors("GuidedByWeight::new", &[&Tensor::from_slice(&[0_i64])], |t| {
        outcome(GuidedByWeight::new(teacher(), Conditioning::class_labels(t[0].shallow_clone())))
    });
    for number in ODD_NUMBERS {
        let thresholding = Thresholding::Dynamic { ratio: number, max_value: number };
        cases.once("Thresholded::new", &number.to_string(), || {
            outcome(Thresholded::new(teacher(), thresholding))
        });
    }
    cases.tensors("repeated_timestep", &[&points()], |t| outcome(repeated_timestep(749, &t[0])));
    cases.tensors("repeated_level", &[&points()], |t| {
        let scale = Scale { alpha: 0.6, sigma: 0.8 };
        outcome(repeated_level(NoiseLevel { timestep: 499.5, scale }, &t[0]))
    });
    cases.cannot_fail(&["SourceRequest::states"]);
    cases.cannot_fail(&["Consistent::new", "Thresholded::metered", "with_boundary"]);
}

fn mixtures(cases: &mut Cases) {
    let means = Tensor::ones([3, 2], kind::DOUBLE_CPU);
    cases.tensors("GaussianMixture::new", &[&means], |t| {
        outcome(GaussianMixture::new(&t[0], &[1.0; 3], &[1.0; 3]))
    });
    for number in ODD_NUMBERS {
        cases.once("GaussianMixture::new", &number.to_string(), || {
            outcome(GaussianMixture::new(&means, &[number; 3], &[1.0; 3]))?;
            outcome(GaussianMixture::new(&means, &[1.0; 3], &[number; 3]))
        });
    }
    cases.once("GaussianMixture::new", "too few", || {
        outcome(GaussianMixture::new(&means, &[], &[1.0]))
    });
    for n in [0, 1, 2, 5] {
        cases.once("GaussianMixture::ring", &n.to_string(), || outcome(GaussianMixture::ring(n)));
        cases.once("GaussianMixture::grid", &n.to_string(), || outcome(GaussianMixture::grid(n)));
    }
    for n in [1 << 40, usize::MAX] {
        cases.once("GaussianMixture::ring", &n.to_string(), || outcome(GaussianMixture::ring(n)));
        cases.once("GaussianMixture::grid", &n.to_string(), || outcome(GaussianMixture::grid(n)));
    }
    let ring = || GaussianMixture::ring(4).expect("four modes");
    for label in ODD_WHOLES {
        cases.once("GaussianMixture::with_classes", &label.to_string(), || {
            outcome(ring().with_classes(&[0, 1, label, 0]))
        });
        cases.once("GaussianMixture::without", &label.to_string(), || {
            outcome(ring().without(&[label]))
        });
    }
    cases.once("GaussianMixture::with_classes", "none", || outcome(ring().with_classes(&[])));
    cases.once("GaussianMixture::without", "any", || outcome(ring().without(&[0, 1, 2, 3])));
    mixture_densities(cases);
}

fn mixture_densities(cases: &mut Cases) {
    let ring = || GaussianMixture::ring(4).expect("four modes");
    let x = Tensor::ones([2, 2], kind::FLOAT_CPU);
    let (alpha, sigma) = (Tensor::ones([2], kind::FLOAT_CPU), Tensor::ones([2], kind::FLOAT_CPU));
    let labels = Tensor::from_slice(&[0_i64, 1]);
    let (alpha, sigma) = (alpha.view([2, 1]), sigma.view([2, 1]));
    cases.tensors("GaussianMixture::posterior", &[&x, &alpha, &sigma, &labels], |t| {
        outcome(ring().posterior(&t[0], &t[1], &t[2], Some(&t[3])))
    });
    cases.tensors("GaussianMixture::log_density", &[&x, &alpha, &sigma, &labels], |t| {
        outcome(ring().log_density(&t[0], &t[1], &t[2], Some(&t[3])))
    });
    cases.tensors("GaussianMixture::distance_to_nearest", &[&x], |t| {
        outcome(ring().distance_to_nearest(&t[0]))
    });
    let mut generator = Generator::new(Device::Cpu, 0).expect("there is a CPU");
    for n in [0, 1, -1, i64::MIN, i64::MAX, 1 << 50] {
        cases.once("GaussianMixture::sample", &n.to_string(), || {
            outcome(ring().sample(n, None, &mut generator))
        });
    }
    cases.tensors("GaussianMixture::sample", &[&labels], |t| {
        let mut generator = Generator::new(Device::Cpu, 0).expect("there is a CPU");
        outcome(ring().sample(2, Some(&t[0]), &mut generator))
    });
    for device in [Device::Cpu, Device::Cuda(0)] {
        cases.once("GaussianMixture::to_device", &format!("{device:?}"), || {
            outcome(ring().to_device(device))
        });
    }
    cases.cannot_fail(&["GaussianMixture::on"]);
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
        let labels_and_text = labels_and_text();
        let rollout = Rollout::new(&teacher, samplers[0].as_ref(), &far);
        outcome(rollout.conditioning(&labels_and_text).sample(points()))
    });
    for config in [SolverConfig::euler(), SolverConfig::uni_pc().with_karras_sigmas()] {
        let solver = config.build().expect("a valid order");
        let levels = config.levels(&schedule, 3).expect("they fit");
        let network = FnDenoiser::new(
            schedule.clone(),
            PredictionType::Epsilon,
            |x_t: &Tensor, _: &Tensor, _: &Conditioning| Ok(x_t.shallow_clone()),
        );
        cases.tensors("SolverRollout::sample", &[&points(), &labels()], |t| {
            let told = Conditioning::class_labels(t[1].shallow_clone());
            let rollout = SolverRollout::new(&network, &*solver, &levels).conditioning(&told);
            outcome(rollout.sample(t[0].shallow_clone()))
        });
    }
    cases.cannot_fail(&[
        "SolverRollout::new",
        "SolverRollout::conditioning",
        "Rollout::new",
        "Rollout::conditioning",
        "Rollout::generator",
        "Rollout::generators",
        "Rollout::keep",
        "FnDenoiser::new",
    ]);
    cases.tensors("first_state", &[&points()], |t| outcome(first_state(&schedule, 999, &t[0])));
    let flow = NoiseScheduleConfig::Flow(ddil_schedulers::FlowConfig::default());
    let flow = flow.build().expect("the default is valid");
    cases.tensors("first_state", &[&points()], |t| outcome(first_state(&flow, 999, &t[0])));
    cases.integers("first_state", |t| outcome(first_state(&flow, t, &points())));
}

fn rollouts_of(cases: &mut Cases, sampler: &dyn ddil_schedulers::Sampler) {
    let (teacher, grid) = (teacher(), grid());
    let of = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
    cases.tensors("Rollout::run", &[&points(), &labels()], |t| {
        let (labels_and_text, mut generator) = (of(&t[1]), generator());
        let rollout = Rollout::new(&teacher, sampler, &grid).conditioning(&labels_and_text);
        outcome(rollout.generator(&mut generator).run(t[0].shallow_clone()))
    });
    cases.tensors("Rollout::run", &[&points(), &labels()], |t| {
        let (labels_and_text, fine, mut generator) = (of(&t[1]), fine(), generator());
        let rollout =
            Rollout::new(&teacher, sampler, &fine).conditioning(&labels_and_text).keep(&grid);
        outcome(rollout.generator(&mut generator).run(t[0].shallow_clone()))
    });
    cases.once("Rollout::run", "timesteps that are not visited", || {
        let (labels_and_text, fine, mut generator) = (labels_and_text(), fine(), generator());
        let rollout =
            Rollout::new(&teacher, sampler, &grid).conditioning(&labels_and_text).keep(&fine);
        outcome(rollout.generator(&mut generator).run(points()))
    });
    cases.tensors("Rollout::sample", &[&points(), &labels()], |t| {
        let (labels_and_text, mut generators) =
            (of(&t[1]), [generator(), generator(), generator()]);
        let rollout = Rollout::new(&teacher, sampler, &grid).conditioning(&labels_and_text);
        outcome(rollout.generators(&mut generators).sample(t[0].shallow_clone()))
    });
    cases.once("Rollout::run", "no generator", || {
        let labels_and_text = labels_and_text();
        outcome(Rollout::new(&teacher, sampler, &grid).conditioning(&labels_and_text).run(points()))
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
            cases.once("MixedVariant::ensure", &format!("{variant:?}"), || {
                outcome(variant.ensure())
            });
        }
    }
    for variant in [None].into_iter().chain(variants(0.5).map(Some)) {
        let rollout =
            MixedRollout::new((&student, &ddim, &grid), (&teacher, &ddim, &fine), variant);
        let of = |labels: &Tensor| Conditioning::class_labels(labels.shallow_clone());
        cases.tensors("MixedRollout::visit", &[&points(), &labels()], |t| {
            outcome(rollout.visit(&t[0], &of(&t[1]), &[749, 249, 499], &mut draws()))
        });
        cases.tensors("MixedRollout::visit_from", &[&points(), &labels()], |t| {
            outcome(rollout.visit_from(1, &t[0], &of(&t[1]), &[499, 249, 249], &mut draws()))
        });
        cases.integers("MixedRollout::visit_from", |start| {
            outcome(rollout.visit_from(
                start as usize,
                &points(),
                &labels_and_text(),
                &[249; 3],
                &mut draws(),
            ))
        });
        cases.integers("MixedRollout::visit", |target| {
            outcome(rollout.visit(&points(), &labels_and_text(), &[target, 249, 499], &mut draws()))
        });
        cases.once("MixedRollout::visit", "too few targets", || {
            outcome(rollout.visit(&points(), &labels_and_text(), &[249], &mut draws()))
        });
    }
    let rollout = MixedRollout::new((&student, &ddim, &grid), (&teacher, &ddim, &fine), None);
    let mut visited = rollout
        .visit(&points(), &labels_and_text(), &[749, 249, 499], &mut draws())
        .expect("on the grid");
    (visited.rows, visited.timesteps) = (vec![0], vec![3, 4]);
    cases.integers("Visited::position", |row| {
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
        outcome(StudentSource::new(StudentConfig::default(), &grids))
    });
    cases.once("TeacherSource::new", "defaults", || {
        outcome(TeacherSource::new(TeacherConfig::default(), &grids))
    });
    let other = grids.clone().with_teacher(Timesteps::explicit(vec![7], 1000).expect("it falls"));
    cases.once("StudentSource::new", "other grids", || {
        outcome(StudentSource::new(StudentConfig::default(), &other))
    });
    cases.once("TeacherSource::new", "other grids", || {
        outcome(TeacherSource::new(TeacherConfig::default(), &other))
    });
    cases.once("Grids::ensure", "other grids", || outcome(other.ensure()));
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
        outcome(source.ensure_batch_size(usize::MAX)).or(Ok::<_, String>(()))?;
        use_source(source.as_mut(), &points(), &[1, 2, 3])?;
        outcome(source.restore(&SavedState::default())).or(Ok(()))
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
    cases.integers("TrajectorySource::ensure_batch_size", |n| {
        outcome(built.ensure_batch_size(n as usize))
    });
    cases.once("TrajectorySource::restore", &what, || {
        let metadata = serde_json::json!([1, {"a": null}]);
        let saved = SavedState::new(vec![("x_t".to_owned(), points())], metadata);
        let mut source = config.build(grids).map_err(|error| error.to_string())?;
        outcome(source.restore(&saved))
    });
}

fn use_source(
    source: &mut dyn TrajectorySource,
    x0: &Tensor,
    indices: &[usize],
) -> Result<(), String> {
    let (student, teacher, ddim, grids) = (teacher(), teacher(), Ddim::new(schedule()), grids());
    let (streams, data) = (
        RandomStreams::new(0, 0),
        Data::new(x0.shallow_clone()).with_conditioning(labels_and_text()),
    );
    let clock = Clock::new(1, 10, streams);
    let networks = RolloutNetworks::new(&student, &teacher);
    let request = SourceRequest::new(&clock, indices, (&data, x0), &grids, &ddim, networks);
    outcome(source.states(&request))
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
    outcome(source.after_loss(&LossFeedback::new(&clock, states, &feedback, &grids, &ddim)))
}

fn new_mixer(config: MixerConfig) -> Result<Mixer, Error> {
    Mixer::new(config, grid(), Box::new(Ddim::new(schedule())))
}

fn mixer(cases: &mut Cases) {
    cases.once("Mixer::new", "defaults", || outcome(new_mixer(MixerConfig::default())));
    let far = Timesteps::explicit(vec![5000, 3], 10_000).expect("it falls");
    cases.once("Mixer::new", "a grid off the schedule", || {
        outcome(Mixer::new(MixerConfig::default(), far.clone(), Box::new(Ddim::new(schedule()))))
    });
    cases.once("Mixer::with_rollout", "other timesteps", || {
        outcome(Mixer::with_rollout(
            MixerConfig::default(),
            grid(),
            far.clone(),
            Box::new(Ddim::new(schedule())),
        ))
    });
    for place in Source::ALL {
        cases.once("Mixer::replace_source", place.as_str(), || {
            let mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
            outcome(mixer.replace_source(place, Box::new(ddil_core::ForwardSource)))
        });
    }
    for name in ["own", "", "noise", "adaptation", "Own states", "a_name_that_is_much_too_long"] {
        cases.once("SourceName::new", name, || outcome(ddil_core::SourceName::new(name)));
        for share in ODD_NUMBERS {
            cases.once("Mixer::with_source", &format!("{name}, {share}"), || {
                let mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
                outcome(mixer.with_source(name, share, Box::new(ddil_core::ForwardSource)))
            });
        }
    }
    cases.tensors("Mixer::next_states", &[&points(), &labels()], |t| {
        mix(&t[0], Conditioning::class_labels(t[1].shallow_clone()), &labels_and_text())
    });
    cases.tensors("Mixer::next_states", &[&labels()], |t| {
        mix(&points(), labels_and_text(), &Conditioning::class_labels(t[0].shallow_clone()))
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
        outcome(mixer.feed_back(&clock, &states, &feedback))
    });
    let priors = AdaptivePriors::default().with(|config| config.signal = AdaptiveSignal::LossRatio);
    let config =
        MixerConfig::default().with(|config| config.priors = PriorSchedule::Adaptive(priors));
    cases.tensors("Mixer::feed_back", &[&Tensor::ones([3], kind::FLOAT_CPU)], |t| {
        let states = states(&points(), &times(), &labels());
        let mut mixer = new_mixer(config.clone()).map_err(|error| error.to_string())?;
        let x0 = points();
        outcome(mixer.feed_back(&clock, &states, &Feedback::new(&x0).with_losses(Some(&t[0]))))
    });
    for (i, torn) in torn_states().iter().enumerate() {
        let what = format!("torn {i}");
        cases.once("Mixer::feed_back", &what, || {
            outcome(mixer.feed_back(&clock, torn, &Feedback::new(&points())))
        });
    }
    cases.integers("Mixer::ensure_batch_size", |n| outcome(mixer.ensure_batch_size(n as usize)));
    cases.integers("Mixer::priors_at", |step| {
        let _ = (mixer.priors_at(step as u64, 10), mixer.priors_at(3, step as u64));
        Ok(())
    });
    cases.integers("Mixer::priors_by_index", |step| {
        let _ = mixer.priors_by_index(step as u64, step as u64);
        Ok(())
    });
    cases.once("Mixer::restore", "nothing", || {
        let mut mixer = new_mixer(MixerConfig::default()).map_err(|error| error.to_string())?;
        outcome(mixer.restore(&SavedState::default()))
    });
    for share in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300] {
        cases.once("draw_stratified", &share.to_string(), || {
            let drawn = draw_stratified(&[share, 0.5], 3, &mut StdRng::seed_from_u64(0));
            assert_eq!(drawn.len(), 3);
            let drawn = draw_stratified(&[share; 2], 0, &mut StdRng::seed_from_u64(0));
            assert!(drawn.is_empty());
            Ok(())
        });
    }
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
        "MixBatch::with_prompted_noise",
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
        outcome(mixer.next_states(&clock, &batch, &networks))?;
    }
    Ok(())
}

fn meters(cases: &mut Cases) {
    let x = points();
    let meter = ClipMeter::new(&schedule());
    cases.tensors("ClipMeter::measure", &[&x, &times()], |t| {
        outcome(meter.measure(&Thresholding::clamp_pixels(), &t[0], &t[1]))
    });
    meter.rows_are(&[Source::Student; 3]);
    cases.tensors("ClipMeter::measure", &[&x, &times()], |t| {
        outcome(meter.measure(&Thresholding::clamp_pixels(), &t[0], &t[1]))?;
        outcome(meter.take())
    });
    cases.cannot_fail(&["ClipMeter::new", "ClipMeter::rows_are", "ClippedFraction::figure"]);
    for indices in [0, 1, 4, 1000] {
        cases.tensors("LossMeter::add", &[&Tensor::ones([3], kind::FLOAT_CPU)], |t| {
            let mut meter = LossMeter::new(4);
            outcome(meter.add(&t[0], &states(&points(), &times(), &labels())))?;
            outcome(meter.take())
        });
        for (i, torn) in torn_states().iter().enumerate() {
            cases.once("LossMeter::add", &format!("torn {i} of {indices}"), || {
                let mut meter = LossMeter::new(indices);
                outcome(meter.add(&Tensor::ones([3], kind::FLOAT_CPU), torn))?;
                outcome(meter.take())
            });
        }
    }
    cases.cannot_fail(&["LossMeter::new"]);
    let table = LossMeter::new(4).take().expect("there is nothing");
    cases.integers("LossTable::mean", |i| {
        let _ = table.mean(&Source::ALL, i as usize);
        Ok(())
    });
    cases.integers("LossTable::samples", |i| {
        let _ = table.samples(&Source::ALL, i as usize);
        Ok(())
    });
    cases.integers("LossTable::gap", |i| {
        let _ = table.gap(Source::Noise, i as usize);
        Ok(())
    });
}

fn shift(cases: &mut Cases) {
    let x = Tensor::randn([6, 2], kind::FLOAT_CPU);
    let config = ShiftConfig::default().with(|config| config.projections = 4);
    cases.tensors("shift_at", &[&x, &x, &x, &x], |t| {
        outcome(shift_at(3, &t[0], &t[1], (&t[2], &t[3]), &config, &mut generator()))
    });
    cases.integers("shift_at", |n| {
        let config = ShiftConfig::default().with(|config| {
            config.projections = n.min(1000);
            config.batch_size = n;
            config.pool = Some(n);
        });
        outcome(shift_at(3, &x, &x, (&x, &x), &config, &mut generator()))
    });
    let (student, ddim, streams) = (teacher(), Ddim::new(schedule()), RandomStreams::new(0, 0));
    let labels = Tensor::from_slice(&[0_i64, 1, 0, 1, 0, 1]);
    cases.tensors("measure_shift", &[&x, &labels], |t| {
        let conditioning = Conditioning::class_labels(t[1].shallow_clone());
        let data = Data::new(t[0].shallow_clone()).with_conditioning(conditioning);
        let grid = grid();
        let request = ShiftRequest::new(&data, &student, &ddim, &grid, streams);
        outcome(measure_shift(&request, &config))
    });
}

fn priors(cases: &mut Cases) {
    for a in ODD_NUMBERS {
        for b in ODD_NUMBERS {
            cases.numbers("Priors::new", |c| outcome(Priors::new(a, b, c)));
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
            outcome(schedule.ensure())
        });
    }
    cases.once("PriorSchedule::ensure", "no steps", || {
        outcome(PriorSchedule::Steps { steps: vec![] }.ensure())
    });
    cases.cannot_fail(&["PriorSchedule::constant"]);
    cases
        .once("AdaptivePriors::ensure", "defaults", || outcome(AdaptivePriors::default().ensure()));
}

fn random(cases: &mut Cases) {
    let streams = RandomStreams::new(u64::MAX, u64::MAX);
    for step in [0, 1, u64::MAX] {
        let what = step.to_string();
        let stream = ddil_core::Stream::Data;
        for device in [Device::Cpu, Device::Cuda(3)] {
            cases.once("RandomStreams::generator", &what, || {
                outcome(streams.generator(step, stream, device))
            });
            cases.once("RandomStreams::draws", &what, || {
                outcome(streams.draws(step, stream, device))
            });
        }
        cases.once("RandomStreams::seed_of", &what, || {
            let _ = (streams.seed_of(step, stream), streams.rng(step, stream));
            Ok(())
        });
    }
    cases.cannot_fail(&["RandomStreams::new", "RandomStreams::rng"]);
}
