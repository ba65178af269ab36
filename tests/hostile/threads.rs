//! The libraries from several threads: what may be sent and shared, and that threads change no result.

use std::thread;

use ddil_core::{
    AggregationBuffer, ClipMeter, Clock, Conditioning, Data, Denoiser, Feedback, GaussianMixture,
    Guided, LossMeter, MixBatch, Mixer, MixerConfig, MixtureDenoiser, RandomStreams, Rollout,
    RolloutNetworks, SavedState, States, StudentSource, TeacherSource, TrajectorySource,
};
use ddil_libtorch::{Generator, MappedFile, TensorList};
use ddil_losses::{LossRequest, Networks, ObjectiveConfig, Phase, Progressive, TimestepWeights};
use ddil_metrics::{FashionClassifier, Statistics, frechet_distance};
use ddil_models::{
    AutoencoderKL, ClipScore, ClipTextModel, ClipTokenizer, ClipVisionModel, DiscriminatorHead,
    Lora, Mlp, Model, ModelConfig, Parameters, Placement, UNet2DConditionModel, UNet2DModel,
    UnknownKeys,
};
use ddil_schedulers::{
    Ddim, Estimate, Lcm, NoiseSchedule, NoiseScheduleConfig, Prediction, PredictionType, Sampler,
    SchedulerConfig, Thresholding, TimestepSpacing, Timesteps,
};
use tch::{Device, Kind, Tensor, kind};

use crate::inputs::repository;

/// Types that can be sent to another thread. A tensor is a handle with an atomic count, and tch declares it `Send`.
#[test]
fn everything_may_be_sent() {
    fn is_send<T: Send>() {}
    is_send::<Generator>();
    is_send::<TensorList>();
    is_send::<MappedFile>();
    is_send::<Prediction>();
    is_send::<Box<dyn Sampler>>();
    is_send::<Conditioning>();
    is_send::<States>();
    is_send::<Data>();
    is_send::<SavedState>();
    is_send::<AggregationBuffer>();
    is_send::<StudentSource>();
    is_send::<TeacherSource>();
    is_send::<Box<dyn TrajectorySource>>();
    is_send::<Mixer>();
    is_send::<ClipMeter>();
    is_send::<LossMeter>();
    is_send::<Guided<MixtureDenoiser>>();
    is_send::<Progressive>();
    is_send::<TimestepWeights>();
    is_send::<UNet2DModel>();
    is_send::<UNet2DConditionModel>();
    is_send::<Mlp>();
    is_send::<AutoencoderKL>();
    is_send::<ClipTextModel>();
    is_send::<ClipVisionModel>();
    is_send::<ClipScore>();
    is_send::<DiscriminatorHead>();
    is_send::<Parameters>();
    is_send::<Lora>();
    is_send::<FashionClassifier>();
}

/// Types that several threads can use at once: those without tensors, or with tensors behind a lock.
#[test]
fn types_without_tensors_are_sync() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<NoiseSchedule>();
    is_shared::<NoiseScheduleConfig>();
    is_shared::<SchedulerConfig>();
    is_shared::<Timesteps>();
    is_shared::<Thresholding>();
    is_shared::<Ddim>();
    is_shared::<Lcm>();
    is_shared::<Box<dyn Sampler>>();
    is_shared::<ClipMeter>();
    is_shared::<RandomStreams>();
    is_shared::<MappedFile>();
    is_shared::<ModelConfig>();
    is_shared::<ClipTokenizer>();
    is_shared::<Statistics>();
    is_shared::<ObjectiveConfig>();
    is_shared::<ddil_schedulers::Error>();
    is_shared::<ddil_core::Error>();
    is_shared::<ddil_losses::Error>();
    is_shared::<ddil_models::Error>();
    is_shared::<ddil_metrics::Error>();
    is_shared::<ddil_libtorch::Error>();
    is_shared::<ddil_trainer::Error>();
}

const THREADS: u64 = 6;

/// The results of a thread from its own seed, as numbers that can be compared bit for bit.
fn in_parallel(work: impl Fn(u64) -> Vec<f64> + Sync) {
    let alone: Vec<Vec<f64>> = (0..THREADS).map(&work).collect();
    assert!(alone.windows(2).all(|pair| pair[0] != pair[1]), "the seeds make no difference");
    assert!(alone.iter().flatten().all(|value| value.is_finite()));
    for _ in 0..3 {
        let together: Vec<Vec<f64>> = thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> =
                (0..THREADS).map(|seed| scope.spawn(move || work(seed))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(alone, together);
    }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).flatten(0, -1)).expect("numbers")
}

fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the default is valid")
}

fn grid() -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("on the grid")
}

/// One schedule and one sampler for all threads.
#[test]
fn samplers_are_shared_between_threads() {
    let schedule = schedule();
    let samplers: [Box<dyn Sampler>; 2] =
        [Box::new(Ddim::new(schedule.clone())), Box::new(Lcm::new(schedule.clone()))];
    in_parallel(|seed| {
        let teacher = GaussianMixture::ring(4).expect("four modes").on(schedule.clone());
        let mut generator = Generator::new(Device::Cpu, seed).expect("there is a CPU");
        let mut all = Vec::new();
        for sampler in &samplers {
            let noise = generator.normal([16, 2], Kind::Float).expect("memory");
            let grid = grid();
            let rollout = Rollout::new(&teacher, sampler.as_ref(), &grid);
            let x0 = rollout.generator(&mut generator).sample(noise);
            all.extend(values(&x0.expect("it is valid")));
        }
        let x_t = generator.normal([3, 2, 8, 8], Kind::Float).expect("memory");
        let output = &x_t * 0.5;
        let estimate = Estimate::of_output(&schedule, PredictionType::Epsilon, output, 749)
            .and_then(|raw| raw.thresholded(&Thresholding::clamp_pixels(), &x_t))
            .expect("it is defined");
        let stepped = samplers[0].step_at(x_t, &estimate, 499, None);
        all.extend(values(&stepped.expect("it is valid")));
        all
    });
}

#[test]
fn states_and_losses_are_made_in_threads() {
    in_parallel(|seed| {
        let (schedule, streams) = (schedule(), RandomStreams::new(seed, 0));
        let network = || GaussianMixture::ring(4).expect("four modes").on(schedule.clone());
        let (student, teacher) = (network(), network());
        let sampler = Box::new(Ddim::new(schedule.clone()));
        let mut mixer = Mixer::new(MixerConfig::default(), grid(), sampler).expect("it is valid");
        let objective = ObjectiveConfig::default().build(&schedule, &grid()).expect("it is valid");
        let mut all = Vec::new();
        for step in 0..3 {
            let x0 = streams
                .generator(step, ddil_core::Stream::Data, Device::Cpu)
                .and_then(|mut generator| Ok(generator.normal([8, 2], Kind::Float)?))
                .expect("memory");
            let data = Data::new(x0);
            let clock = Clock::new(step, 3, streams);
            let networks = RolloutNetworks::new(&student, &teacher);
            let states =
                mixer.next_states(&clock, &MixBatch::new(&data), &networks).expect("states");
            let networks = Networks::new(&student, &teacher);
            let request = LossRequest::new(step, Phase::Student, &states, networks, &streams);
            let terms = objective.loss(&request).expect("a loss");
            let feedback = Feedback::new(&terms.student_x0);
            let feedback = feedback.with_teacher_next(terms.teacher_next.as_ref());
            mixer.feed_back(&clock, &states, &feedback).expect("it fits");
            all.extend(values(&states.x_t));
            all.extend(values(&terms.target));
        }
        all
    });
}

/// Forward and backward passes: gradients of one thread are not those of another.
#[test]
fn networks_learn_in_threads() {
    let folder = repository().join("tests/golden/models/unet_class_labels");
    let config =
        ModelConfig::from_file(folder.join("config.json"), UnknownKeys::Refuse).expect("a golden");
    let channels = config.channels().map_or(1, |[inputs, _]| inputs.into());
    in_parallel(|seed| {
        let unet = config.build(Placement::default(), seed).expect("it is valid");
        unet.parameters().set_trainable(true);
        let mut generator = Generator::new(Device::Cpu, seed).expect("there is a CPU");
        let x = generator.normal([2, channels, 8, 8], Kind::Float).expect("memory");
        let expected_prediction = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 1]));
        let output = unet
            .forward(&x, &Tensor::from_slice(&[7_i64, 900]), &expected_prediction)
            .expect("it fits");
        output.square().mean(Kind::Float).backward();
        let gradients = unet.parameters().learned().into_iter().map(|(_, tensor)| tensor.grad());
        let mut all = values(&output);
        all.extend(gradients.flat_map(|gradient| values(&gradient.sum(Kind::Double))));
        all
    });
}

/// A network that was built in one thread is evaluated in another, and both map its weights file.
#[test]
fn a_network_moves_to_another_thread() {
    let folder = repository().join("tests/golden/models/unet_unconditional");
    let load = || {
        Model::from_folder(&folder, Placement::default(), UnknownKeys::Refuse).expect("a golden")
    };
    let channels = load().config().channels().map_or(1, |[inputs, _]| inputs.into());
    let x = || Tensor::ones([1, channels, 8, 8], kind::FLOAT_CPU);
    let evaluate = |network: &Model| {
        let answer = network.forward(&x(), &Tensor::from_slice(&[3_i64]), &Conditioning::none());
        values(&answer.expect("it fits"))
    };
    let network = load();
    let here = evaluate(&network);
    let there = thread::spawn(move || {
        let folder = repository().join("tests/golden/models/unet_unconditional");
        let file =
            ddil_models::weights::read_all(folder.join("diffusion_pytorch_model.safetensors"));
        (network, file.expect("a golden"))
    });
    let (network, weights) = there.join().expect("no panic");
    assert_eq!(evaluate(&network), here);
    assert!(weights.values().all(|tensor| tensor.numel() > 0));
}

#[test]
fn metrics_are_measured_in_threads() {
    in_parallel(|seed| {
        let mut generator = Generator::new(Device::Cpu, seed).expect("there is a CPU");
        let mut draw = || generator.normal([64, 4], Kind::Float).expect("memory");
        let [a, b] = [draw(), draw()].map(|x| Statistics::from_features(&x).expect("features"));
        vec![frechet_distance(&a, &b).expect("they fit")]
    });
}

/// A meter that all threads add to contains what all of them added.
#[test]
fn a_meter_is_shared() {
    let meter = ClipMeter::new(&schedule());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..50 {
                    let x0 = Tensor::full([2, 4], 3.0, kind::FLOAT_CPU);
                    let timesteps = Tensor::from_slice(&[999_i64, 499]);
                    meter.measure(&Thresholding::clamp_pixels(), &x0, &timesteps).expect("it fits");
                }
            });
        }
    });
    let clipped = meter.take().expect("the CPU can be read");
    assert_eq!(clipped.iter().map(|at| at.samples).sum::<u64>(), 2 * 50 * THREADS);
    assert!(clipped.iter().all(|at| at.fraction == 1.0));
}

/// A denoiser behind a reference that is borrowed by a thread.
#[test]
fn a_denoiser_in_a_mutex_is_used_by_one_thread_at_a_time() {
    let teacher = GaussianMixture::ring(4).expect("four modes").on(schedule());
    let x = Tensor::ones([2, 2], kind::FLOAT_CPU);
    let times = Tensor::from_slice(&[999_i64, 249]);
    let here = values(&teacher.predict(&x, &times, &Conditioning::none()).expect("it fits").x0);
    let mut held = Some((teacher, x, times));
    for _ in 0..3 {
        let (teacher, x, times) = held.take().expect("it came back");
        let back = thread::spawn(move || {
            let expected_prediction =
                teacher.predict(&x, &times, &Conditioning::none()).expect("it fits");
            (values(&expected_prediction.x0), (teacher, x, times))
        });
        let (there, lent) = back.join().expect("no panic");
        assert_eq!(there, here);
        held = Some(lent);
    }
}
