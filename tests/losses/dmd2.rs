use std::cell::RefCell;

use ddil_core::{
    Clock, Conditioning, Data, Denoiser, Discriminator, Feedback, MixBatch, Mixer, MixerConfig,
    PriorSchedule, Priors, RandomStreams, RolloutNetworks, Source, States, Stream,
};
use ddil_losses::{
    Critic, Dmd2, Dmd2Config, LossRequest, LossTerms, MatchingTimesteps, Networks, Objective,
    ObjectiveConfig, Phase, Requirements, TimestepWeights, Weighting, discriminator_loss,
    distribution_matching_gradient, generator_loss, squared_error,
};
use ddil_schedulers::{ConsistencyBoundary, NoiseSchedule, Prediction, PredictionType};
use tch::{Device, Kind, Tensor, kind};

use crate::toy::{
    Echo, Gaussian, Linear, Recorder, Silent, TwoPoints, gap, schedules, states, trailing, values,
};

const STREAMS: RandomStreams = RandomStreams { seed: 5, rank: 0 };

fn method(schedule: &NoiseSchedule, config: Dmd2Config) -> Dmd2 {
    Dmd2::new(config, schedule.clone(), trailing(4)).expect("valid settings")
}

fn no_gan() -> Dmd2Config {
    Dmd2Config::default().with(|config| config.gan = false)
}

/// Networks whose critic is the same in the gradient and in its own loss.
fn networks_of<'a>(
    student: &'a dyn Denoiser,
    teacher: &'a dyn Denoiser,
    fake_score: &'a dyn Denoiser,
) -> Networks<'a> {
    let critic = Critic::new(fake_score);
    Networks::new(student, teacher).with_critic(critic)
}

fn with_discriminator<'a>(
    networks: Networks<'a>,
    discriminator: &'a dyn Discriminator,
) -> Networks<'a> {
    networks.with_critic(networks.critic.expect("there is one").with_discriminator(discriminator))
}

fn request<'a>(phase: Phase, states: &'a States, networks: Networks<'a>) -> LossRequest<'a> {
    LossRequest::new(7, phase, states, networks, &STREAMS)
}

fn loss(method: &Dmd2, request: &LossRequest<'_>) -> LossTerms {
    method.loss(request).expect("a valid request")
}

fn part(terms: &LossTerms, name: &str) -> Vec<f64> {
    let found = terms.parts.iter().find(|(found, _)| *found == name);
    values(&found.unwrap_or_else(|| panic!("no {name} in {:?}", terms.parts)).1)
}

/// The first draws of a phase: timesteps from `low..=high` and noise.
fn first_draws(stream: Stream, low: i64, high: i64, shape: &[i64]) -> (Vec<i64>, Vec<f64>) {
    let mut generator = STREAMS.generator(7, stream, Device::Cpu).expect("there is a CPU");
    let timesteps = generator.randint(low, high + 1, &shape[..1]).expect("low is below high");
    let noise = generator.normal(shape, Kind::Double).expect("a valid shape");
    (Vec::try_from(timesteps).expect("a vector"), values(&noise))
}

/// The logit is `factor` times the sample's mean, plus its class label.
#[derive(Debug)]
struct FactorDiscriminator {
    factor: Tensor,
    /// Class labels of each call.
    received: RefCell<Vec<Vec<f64>>>,
}

impl FactorDiscriminator {
    fn trainable(factor: f64) -> Self {
        let factor = Tensor::from(factor).set_requires_grad(true);
        Self { factor, received: RefCell::default() }
    }
}

impl Discriminator for FactorDiscriminator {
    fn logits(
        &self,
        x_t: &Tensor,
        _: &Tensor,
        received: &Conditioning,
    ) -> ddil_core::Result<Tensor> {
        let mut logits = &self.factor * x_t.flatten(1, -1).mean_dim(1, false, x_t.kind());
        if let Some(labels) = received.get(Conditioning::CLASS_LABELS) {
            self.received.borrow_mut().push(values(labels));
            logits += labels;
        }
        Ok(logits)
    }
}

/// Worked out in fractions with the published normaliser, which has no 1e-6.
#[test]
fn the_gradient_is_the_golden_one() {
    let row = |values: [f64; 4]| Tensor::from_slice2(&[values]);
    let student = row([1.0, 2.0, -1.0, 0.5]).set_requires_grad(true);
    let (real, fake) = (row([0.8, 1.5, -1.2, 0.5]), row([1.1, 1.9, -0.9, 0.1]));
    let gradient = distribution_matching_gradient(&student, &fake, &real).expect("they fit");
    assert!(!gradient.requires_grad());
    let golden = row([4.0 / 3.0, 16.0 / 9.0, 4.0 / 3.0, -16.0 / 9.0]);
    assert!(gap(&gradient, &golden) < 1e-5);
    assert!(gap(&gradient, &(&golden * 0.225 / (0.225 + 1e-6))) < 1e-12);

    let target = student.detach() - &gradient;
    let loss = squared_error(&student, &target).expect("they fit") * 0.5;
    assert!((loss.double_value(&[0]) - 1.234_568).abs() < 2e-5);
    loss.mean(Kind::Double).backward();
    assert!(gap(&student.grad(), &(gradient / 4.0)) < 1e-12);
}

#[test]
fn each_sample_has_its_own_normaliser() {
    let x = Tensor::from_slice2(&[[1.0, 1.0], [100.0, 100.0]]);
    let zero = x.zeros_like();
    let gradient = distribution_matching_gradient(&x, &x, &zero).expect("they fit");
    assert!(gap(&gradient, &x.ones_like()) < 2e-6);
}

#[test]
fn the_gradient_is_zero_where_the_scores_agree() {
    let x = Tensor::randn([3, 4], kind::FLOAT_CPU);
    let other = Tensor::randn([3, 4], kind::FLOAT_CPU);
    let gradient = distribution_matching_gradient(&x, &other, &other).expect("they fit");
    assert_eq!(gap(&gradient, &x.zeros_like()), 0.0);
    // Nor where the student returns the same as both, which is 0 / 0 without the 1e-6.
    let gradient = distribution_matching_gradient(&x, &x, &x).expect("they fit");
    assert_eq!(gap(&gradient, &x.zeros_like()), 0.0);
}

#[test]
fn half_kinds_are_compared_in_float_and_misfits_refused() {
    let half = |value: f64| Tensor::full([1, 4], value, (Kind::Half, Device::Cpu));
    let gradient =
        distribution_matching_gradient(&half(1.0), &half(0.5), &half(0.25)).expect("they fit");
    assert_eq!(gradient.kind(), Kind::Float);
    assert!((gradient.double_value(&[0, 0]) - 1.0 / 3.0).abs() < 1e-6);
    let x = Tensor::zeros([2, 3], kind::FLOAT_CPU);
    let y = Tensor::zeros([2, 4], kind::FLOAT_CPU);
    for (student, fake, real) in [(&y, &x, &x), (&x, &y, &x), (&x, &x, &y)] {
        assert!(distribution_matching_gradient(student, fake, real).is_err());
    }
    let flat = Tensor::zeros([2], kind::FLOAT_CPU);
    assert!(distribution_matching_gradient(&flat, &flat, &flat).is_err());
}

#[test]
fn adversarial_losses_are_cross_entropies_without_overflow() {
    let logits = Tensor::from_slice(&[-1000.0, -1.0, 0.0, 2.0, 1000.0]);
    let probability = logits.sigmoid();
    let (of_real, of_fake) = discriminator_loss(&logits, &logits).expect("they are real numbers");
    let generator = values(&generator_loss(&logits).expect("they are real numbers"));
    assert_eq!(generator, values(&of_real));
    for (i, p) in values(&probability).into_iter().enumerate().skip(1).take(3) {
        assert!((generator[i] + p.ln()).abs() < 1e-12);
        assert!((values(&of_fake)[i] + (1.0 - p).ln()).abs() < 1e-12);
    }
    assert_eq!((generator[0], generator[4]), (1000.0, 0.0));
}

/// Loss and its derivative by the student's factor, value by value.
fn is_closed_form(
    schedule: &NoiseSchedule,
    teacher: &dyn Denoiser,
    teacher_x0: impl Fn(i64, f64) -> f64,
) {
    const FACTOR: f64 = 0.8;
    let dmd2 = method(schedule, no_gan().with(|config| config.dm_weight = 3.0));
    let student = Linear::trainable(schedule.clone(), FACTOR);
    let fake = Gaussian { schedule: schedule.clone(), mean: -0.4, std: 0.3 };
    let x = [0.4, -1.3, 0.9, 2.0, -0.2, 0.1, 1.1, -0.6];
    let batch = states(Tensor::from_slice(&x).view([4, 2]), &trailing(4), &[0, 1, 2, 3]);
    let terms =
        loss(&dmd2, &request(Phase::Student, &batch, networks_of(&student, teacher, &fake)));
    terms.per_sample.sum(Kind::Double).backward();

    let (timesteps, noise) = first_draws(Stream::StudentLoss, 20, 980, &[4, 2]);
    let mut derivative = 0.0;
    for (i, t) in timesteps.into_iter().enumerate() {
        let scale = schedule.scale_at(t).expect("on the grid");
        let (slope, offset) = fake.line(t);
        let seen = [2 * i, 2 * i + 1].map(|j| {
            let x0 = FACTOR * x[j];
            let x_t = scale.alpha * x0 + scale.sigma * noise[j];
            (x[j], x0, slope * x_t + offset, teacher_x0(t, x_t))
        });
        let scale = seen.iter().map(|(_, x0, _, real)| (x0 - real).abs()).sum::<f64>() / 2.0 + 1e-6;
        let gradient = seen.map(|(x, _, fake, real)| (x, (fake - real) / scale));
        let expected = 3.0 * gradient.iter().map(|(_, g)| 0.5 * g * g).sum::<f64>() / 2.0;
        let found = values(&terms.per_sample)[i];
        assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected} {t}");
        let size = gradient.iter().map(|(_, g)| g.abs()).sum::<f64>() / 2.0;
        assert!((part(&terms, "distribution_matching")[i] / size - 1.0).abs() < 1e-9);
        derivative += 3.0 * gradient.iter().map(|(x, g)| g * x).sum::<f64>() / 2.0;
    }
    let found = student.factor.grad().double_value(&[]);
    assert!((found / derivative - 1.0).abs() < 1e-9, "{found} {derivative}");
    assert_eq!(gap(&terms.student_x0, &(FACTOR * &batch.x_t)), 0.0);
}

#[test]
fn the_students_loss_and_its_derivative_are_closed_forms() {
    for schedule in schedules() {
        let teacher = Gaussian { schedule: schedule.clone(), mean: 0.2, std: 0.7 };
        is_closed_form(&schedule, &teacher, |t, x| {
            let (slope, offset) = teacher.line(t);
            slope * x + offset
        });
        let teacher = TwoPoints { schedule: schedule.clone(), at: 0.9 };
        is_closed_form(&schedule, &teacher, |t, x| teacher.x0(t, x));
    }
}

#[test]
fn the_critics_loss_is_the_error_that_its_weighting_names() {
    let [schedule, ..] = schedules();
    let batch = states(Tensor::randn([4, 3], kind::DOUBLE_CPU), &trailing(4), &[0, 1, 2, 3]);
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(0.8) };
    let fake = Gaussian { schedule: schedule.clone(), mean: -0.4, std: 0.3 };
    let x0 = 0.8 * &batch.x_t;
    let (timesteps, noise) = first_draws(Stream::CriticLoss, 0, 999, &[4, 3]);
    let (timesteps, noise) =
        (Tensor::from_slice(&timesteps), Tensor::from_slice(&noise).view([4, 3]));
    let x_t = schedule.add_noise(&x0, &noise, &timesteps).expect("they fit");
    let said = fake.predict(&x_t, &timesteps, &Conditioning::none()).expect("it can answer");
    let v = |p: &Prediction| {
        PredictionType::VPrediction
            .target(&schedule, &p.x0, &p.epsilon, &timesteps)
            .expect("they fit")
    };
    let truth = Prediction { x0: x0.shallow_clone(), epsilon: noise.shallow_clone() };
    for (output, expected) in [
        (PredictionType::Sample, squared_error(&said.x0, &x0)),
        (PredictionType::Epsilon, squared_error(&said.epsilon, &noise)),
        (PredictionType::VPrediction, squared_error(&v(&said), &v(&truth))),
    ] {
        let expected = expected.expect("they fit");
        let dmd2 = method(
            &schedule,
            no_gan().with(|config| config.critic_weighting = Some(Weighting::of(output))),
        );
        let silent = Silent(schedule.clone());
        let terms =
            loss(&dmd2, &request(Phase::Critic, &batch, networks_of(&student, &silent, &fake)));
        assert!(gap(&(&terms.per_sample / expected), &x0.ones_like().select(1, 0)) < 1e-9);
        assert_eq!(part(&terms, "fake_score"), values(&terms.per_sample));
        assert_eq!(gap(&terms.target, &x0), 0.0);
    }
}

#[test]
fn the_default_cap_does_not_affect_usual_schedules() {
    let [schedule, flow, edm] = schedules();
    let config = Dmd2Config::default();
    let capped = |schedule: &NoiseSchedule| {
        let weights =
            TimestepWeights::new(Weighting::Snr, Some(config.critic_weight_cap), schedule);
        let weights = weights.expect("a good cap");
        (0..1000)
            .filter(|&t| {
                let raw = schedule.scale_at(t).expect("on the grid").snr();
                weights.at(t).expect("on the grid") < raw
            })
            .count()
    };
    assert_eq!(capped(&schedule), 0);
    // Noise below a hundredth of the signal.
    assert!(capped(&flow) < 20, "{}", capped(&flow));
    assert!(capped(&edm) < 400, "{}", capped(&edm));
}

#[test]
fn a_discriminator_adds_its_terms_with_their_factors() {
    let [schedule, ..] = schedules();
    let config = Dmd2Config::default().with(|config| {
        config.gan_weight = 0.25;
        config.critic_gan_weight = 0.125;
    });
    let (with, without) = (method(&schedule, config), method(&schedule, no_gan()));
    let discriminator = FactorDiscriminator::trainable(0.7);
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(0.8) };
    let teacher = Gaussian { schedule: schedule.clone(), mean: 0.2, std: 0.7 };
    let fake = Gaussian { schedule, mean: -0.4, std: 0.3 };
    let networks = with_discriminator(networks_of(&student, &teacher, &fake), &discriminator);
    let mut batch = states(Tensor::randn([3, 5], kind::DOUBLE_CPU), &trailing(4), &[0, 1, 3]);
    batch.conditioning = Conditioning::class_labels(Tensor::from_slice(&[1_i64, 2, 3]));
    let real = Data::new(Tensor::randn([3, 5], kind::DOUBLE_CPU))
        .with_conditioning(Conditioning::class_labels(Tensor::from_slice(&[4_i64, 5, 6])));

    for phase in [Phase::Student, Phase::Critic] {
        let request = request(phase, &batch, networks).with_real(&real);
        let (terms, plain) = (loss(&with, &request), loss(&without, &request));
        let added = values(&(&terms.per_sample - &plain.per_sample));
        let expected: Vec<f64> = match phase {
            Phase::Student => part(&terms, "gan_student").iter().map(|x| 0.25 * x).collect(),
            Phase::Critic => part(&terms, "gan_fake")
                .iter()
                .zip(part(&terms, "gan_real"))
                .map(|(fake, real)| 0.125 * (fake + real))
                .collect(),
        };
        for (added, expected) in added.into_iter().zip(expected) {
            assert!((added - expected).abs() < 1e-12, "{added} {expected}");
        }
        // The figures are the parts without factors, whatever other terms the loss has.
        for (name, values) in &plain.parts {
            assert_eq!(part(&terms, name), self::values(values));
        }
    }
    // The student's samples are classified with the states' labels, dataset samples with their own.
    let made = vec![1.0, 2.0, 3.0];
    assert_eq!(*discriminator.received.borrow(), [made.clone(), made, vec![4.0, 5.0, 6.0]]);
}

/// Noise aside, a logit of `k alpha mean(x0)`: values and derivatives by hand.
#[test]
fn adversarial_terms_are_closed_forms() {
    let [schedule, ..] = schedules();
    let config = Dmd2Config::default().with(|config| {
        config.dm_weight = 0.0;
        config.gan_weight = 1.0;
    });
    let dmd2 = method(&schedule, config);
    let discriminator = FactorDiscriminator::trainable(0.7);
    let student = Linear::trainable(schedule.clone(), 0.8);
    let network = Gaussian { schedule: schedule.clone(), mean: 0.2, std: 0.7 };
    let x_t = Tensor::randn([2, 3], kind::DOUBLE_CPU);
    let means = values(&x_t.mean_dim(1, false, Kind::Double));
    let batch = states(x_t, &trailing(4), &[1, 2]);
    let networks = with_discriminator(networks_of(&student, &network, &network), &discriminator);
    let terms = loss(&dmd2, &request(Phase::Student, &batch, networks));
    terms.per_sample.sum(Kind::Double).backward();

    let mut generator =
        STREAMS.generator(7, Stream::StudentLoss, Device::Cpu).expect("there is a CPU");
    let _of_matching = (
        generator.randint(20, 981, [2]).expect("20 is below 981"),
        generator.normal([2, 3], Kind::Double).expect("a valid shape"),
    );
    let timesteps = generator.randint(0, 1000, [2]).expect("a valid request");
    let noise = generator.normal([2, 3], Kind::Double).expect("a valid request");
    let noise = values(&noise.mean_dim(1, false, Kind::Double));
    let (mut by_factor, mut by_discriminator) = (0.0, 0.0);
    for i in 0..2 {
        let t = timesteps.int64_value(&[i as i64]);
        let scale = schedule.scale_at(t).expect("on the grid");
        let mean = scale.alpha * 0.8 * means[i] + scale.sigma * noise[i];
        let expected = (-0.7 * mean).exp().ln_1p();
        assert!((values(&terms.per_sample)[i] - expected).abs() < 1e-12);
        let by_logit = -1.0 / (1.0 + (0.7 * mean).exp());
        by_factor += by_logit * 0.7 * scale.alpha * means[i];
        by_discriminator += by_logit * mean;
    }
    assert!((student.factor.grad().double_value(&[]) - by_factor).abs() < 1e-12);
    // Keeping this one out is for the caller to do.
    assert!((discriminator.factor.grad().double_value(&[]) - by_discriminator).abs() < 1e-12);
}

#[test]
fn each_phase_gives_gradients_to_the_networks_it_trains() {
    let [schedule, ..] = schedules();
    let dmd2 = method(&schedule, Dmd2Config::default());
    let batch = states(Tensor::randn([3, 4], kind::DOUBLE_CPU), &trailing(4), &[0, 1, 3]);
    let real = Data::new(Tensor::randn([3, 4], kind::DOUBLE_CPU));
    for phase in [Phase::Student, Phase::Critic] {
        let [student, teacher, fake_score, thresholded] =
            [0.5, 0.9, 0.7, 0.6].map(|factor| Linear::trainable(schedule.clone(), factor));
        let trained = FactorDiscriminator::trainable(0.3);
        let frozen =
            FactorDiscriminator { factor: Tensor::from(0.3), received: RefCell::default() };
        let discriminator: &dyn Discriminator = match phase {
            // As the documentation requires of the caller.
            Phase::Student => &frozen,
            Phase::Critic => &trained,
        };
        let critic = Critic::new(&fake_score)
            .with_thresholded(&thresholded)
            .with_discriminator(discriminator);
        let networks = Networks::new(&student, &teacher).with_critic(critic);
        let terms = loss(&dmd2, &request(phase, &batch, networks).with_real(&real));
        assert!(!terms.target.requires_grad() && !terms.student_x0.requires_grad());
        assert!(terms.parts.iter().all(|(_, figures)| !figures.requires_grad()));
        assert_eq!(terms.teacher_next.map(|next| next.size()), None);
        terms.per_sample.mean(Kind::Double).backward();
        let got = [
            &student.factor,
            &teacher.factor,
            &fake_score.factor,
            &thresholded.factor,
            &trained.factor,
        ]
        .map(|factor| factor.grad().defined() && factor.grad().double_value(&[]) != 0.0);
        let expected = match phase {
            Phase::Student => [true, false, false, false, false],
            Phase::Critic => [false, false, true, false, true],
        };
        assert_eq!(got, expected, "{phase:?}");
    }
}

/// The student of a step is evaluated once, and in a critic-only step without gradients.
#[test]
fn the_critic_takes_the_samples_that_there_are() {
    let [schedule, ..] = schedules();
    let dmd2 = method(&schedule, no_gan());
    let student = Linear::trainable(schedule.clone(), 0.5);
    let fake = Linear::trainable(schedule.clone(), 0.7);
    let silent = Silent(schedule);
    let batch = states(Tensor::randn([3, 4], kind::DOUBLE_CPU), &trailing(4), &[0, 1, 3]);
    let alone = loss(&dmd2, &request(Phase::Critic, &batch, networks_of(&student, &silent, &fake)));
    assert!(!alone.student_x0.requires_grad());

    let earlier =
        loss(&dmd2, &request(Phase::Student, &batch, networks_of(&student, &fake, &fake)));
    let kept = request(Phase::Critic, &batch, networks_of(&silent, &silent, &fake))
        .with_student_x0(&earlier.student_x0);
    let after = loss(&dmd2, &kept);
    assert_eq!(gap(&after.per_sample, &alone.per_sample), 0.0);
    assert_eq!(gap(&after.student_x0, &earlier.student_x0), 0.0);
    // Even if a graph came with them.
    let with_graph = earlier.student_x0.copy().set_requires_grad(true);
    let terms = loss(&dmd2, &kept.with_student_x0(&with_graph));
    terms.per_sample.mean(Kind::Double).backward();
    assert!(!with_graph.grad().defined() && fake.factor.grad().defined());
}

#[test]
fn timesteps_are_drawn_from_the_whole_of_their_range() {
    let [schedule, ..] = schedules();
    let recorder = || Recorder::new(schedule.clone());
    let (teacher, thresholded, fake_score) = (recorder(), recorder(), recorder());
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(1.0) };
    let dmd2 = method(&schedule, no_gan());
    assert_eq!(dmd2.matching_timesteps(), (20, 980));
    let mut batch =
        states(Tensor::zeros([20_000, 1], kind::FLOAT_CPU), &trailing(4), &vec![2; 20_000]);
    batch.conditioning = Conditioning::class_labels(Tensor::full([20_000], 7, kind::INT64_CPU));
    let critic = Critic::new(&fake_score).with_thresholded(&thresholded);
    let networks = Networks::new(&student, &teacher).with_critic(critic);
    for phase in [Phase::Student, Phase::Critic] {
        loss(&dmd2, &request(phase, &batch, networks));
    }
    let of = |recorder: &Recorder| recorder.calls.borrow().clone();
    let (of_teacher, of_thresholded, of_fake) = (of(&teacher), of(&thresholded), of(&fake_score));
    assert_eq!([of_teacher.len(), of_thresholded.len(), of_fake.len()], [1, 1, 1]);
    // Teacher and critic are compared at the same noised samples.
    assert_eq!(of_teacher, of_thresholded);
    for ((timesteps, labels), (low, high)) in [(&of_teacher[0], (20, 980)), (&of_fake[0], (0, 999))]
    {
        assert!(labels.iter().all(|label| *label == 7));
        assert_eq!((timesteps.iter().min(), timesteps.iter().max()), (Some(&low), Some(&high)));
        let mean = timesteps.iter().sum::<i64>() as f64 / 20_000.0;
        // Three standard errors of the mean of a uniform distribution.
        let error = (high - low) as f64 / 12_f64.sqrt() / 20_000_f64.sqrt();
        assert!((mean - f64::midpoint(low as f64, high as f64)).abs() < 3.0 * error, "{mean}");
    }
}

#[test]
fn a_state_is_compared_at_most_as_noisy_as_itself_if_set() {
    let [schedule, ..] = schedules();
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(1.0) };
    let grid = trailing(4);
    let indices: Vec<usize> = (0..20_000).map(|row| row / 5000).collect();
    let batch = states(Tensor::zeros([20_000, 1], kind::FLOAT_CPU), &grid, &indices);
    // The last state, at timestep 249, is below the least noisy timestep of the second setting.
    for (min, low) in [(0.02, 20), (0.3, 300)] {
        let teacher = Recorder::new(schedule.clone());
        let dmd2 = method(
            &schedule,
            no_gan().with(|config| {
                config.dm_min_timestep = min;
                config.dm_timesteps = MatchingTimesteps::UpToState;
            }),
        );
        loss(&dmd2, &request(Phase::Student, &batch, networks_of(&student, &teacher, &student)));
        let drawn = teacher.calls.borrow()[0].0.clone();
        for (index, &own) in grid.as_slice().iter().enumerate() {
            let of_state = &drawn[index * 5000..(index + 1) * 5000];
            let high = own.min(980).max(low);
            let range = (of_state.iter().min(), of_state.iter().max());
            assert_eq!(range, (Some(&low), Some(&high)), "{own}");
            let mean = of_state.iter().sum::<i64>() as f64 / 5000.0;
            let count = (high - low + 1) as f64;
            let error = ((count * count - 1.0) / 12.0 / 5000.0).sqrt();
            let gap = (mean - f64::midpoint(low as f64, high as f64)).abs();
            assert!(gap <= 4.0 * error, "{own}: {mean}");
        }
    }
}

#[test]
fn draws_differ_by_step_and_phase_and_by_nothing_else() {
    let [schedule, ..] = schedules();
    let dmd2 = method(&schedule, no_gan());
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(1.0) };
    let batch = states(Tensor::randn([16, 1], kind::DOUBLE_CPU), &trailing(4), &[1; 16]);
    let drawn = |step, phase, dmd2: &Dmd2| {
        let recorder = Recorder::new(schedule.clone());
        let networks = networks_of(&student, &recorder, &recorder);
        loss(dmd2, &LossRequest::new(step, phase, &batch, networks, &STREAMS));
        let calls = recorder.calls.borrow();
        calls[0].0.clone()
    };
    let first = drawn(7, Phase::Student, &dmd2);
    assert_eq!(first, drawn(7, Phase::Student, &dmd2));
    assert_ne!(first, drawn(8, Phase::Student, &dmd2));
    let whole = no_gan().with(|config| {
        config.dm_min_timestep = 0.0;
        config.dm_max_timestep = 1.0;
    });
    let whole = method(&schedule, whole);
    assert_eq!(whole.matching_timesteps(), (0, 999));
    assert_ne!(drawn(7, Phase::Student, &whole), drawn(7, Phase::Critic, &whole));
}

/// The same draws, another neighbour.
#[test]
fn the_loss_of_a_sample_depends_on_no_other() {
    let [schedule, ..] = schedules();
    let dmd2 = method(&schedule, Dmd2Config::default());
    let student = Linear { schedule: schedule.clone(), factor: Tensor::from(0.6) };
    let teacher = TwoPoints { schedule: schedule.clone(), at: 0.8 };
    let fake = Gaussian { schedule, mean: 0.1, std: 0.5 };
    let discriminator = FactorDiscriminator::trainable(0.4);
    let networks = with_discriminator(networks_of(&student, &teacher, &fake), &discriminator);
    let mut neighbours =
        [Tensor::zeros([1, 4], kind::DOUBLE_CPU), Tensor::ones([1, 4], kind::DOUBLE_CPU)];
    let same = Tensor::randn([1, 4], kind::DOUBLE_CPU);
    for phase in [Phase::Student, Phase::Critic] {
        let of_first = neighbours.each_mut().map(|other| {
            let batch = states(Tensor::cat(&[&same, &*other], 0), &trailing(4), &[2, 1]);
            let real = Data::new(batch.x_t.copy());
            let request = request(phase, &batch, networks).with_real(&real);
            values(&loss(&dmd2, &request).per_sample)
        });
        assert_eq!(of_first[0][0], of_first[1][0]);
        assert_ne!(of_first[0][1], of_first[1][1]);
    }
}

/// A student that shifts unit noise, and the exact score of its samples: gradient descent moves its mean to the
/// teacher's.
#[test]
fn the_mean_of_the_student_goes_to_that_of_the_teacher() {
    struct Shift {
        schedule: NoiseSchedule,
        by: Tensor,
    }
    impl Denoiser for Shift {
        fn predict(
            &self,
            x_t: &Tensor,
            t: &Tensor,
            _: &Conditioning,
        ) -> ddil_core::Result<Prediction> {
            Ok(Prediction::from_x0(&self.schedule, x_t + &self.by, x_t, t)?)
        }
        fn schedule(&self) -> &NoiseSchedule {
            &self.schedule
        }
    }
    let [schedule, ..] = schedules();
    let dmd2 = Dmd2::new(no_gan(), schedule.clone(), trailing(1)).expect("valid settings");
    let teacher = Gaussian { schedule: schedule.clone(), mean: 1.0, std: 1.0 };
    for start in [-2.0, 3.0] {
        let mut mean = start;
        for step in 0..60 {
            let by = Tensor::from(mean).set_requires_grad(true);
            let student = Shift { schedule: schedule.clone(), by };
            let fake = Gaussian { schedule: schedule.clone(), mean, std: 1.0 };
            let batch = states(Tensor::randn([64, 2], kind::DOUBLE_CPU), &trailing(1), &[0; 64]);
            let networks = networks_of(&student, &teacher, &fake);
            let request = LossRequest::new(step, Phase::Student, &batch, networks, &STREAMS);
            let terms = loss(&dmd2, &request);
            terms.per_sample.mean(Kind::Double).backward();
            let gradient = student.by.grad().double_value(&[]);
            // Downhill in the Kullback-Leibler divergence (mean - 1)² / 2.
            assert!(gradient * (mean - 1.0) > 0.0, "{gradient} at {mean}");
            mean -= 0.2 * gradient;
        }
        assert!((mean - 1.0).abs() < 0.1, "from {start} to {mean}");
    }
}

/// Published recipes train on the student's states alone or on noised data alone: a matter of the priors only.
#[test]
fn states_of_every_source_are_trained_on() {
    let [schedule, ..] = schedules();
    let config = ObjectiveConfig::Dmd2(Dmd2Config::default().with(|config| config.gan = true));
    let grid = config.training_grid(&schedule, 4).expect("4 divides 1000");
    let objective = config.build(&schedule, &grid).expect("valid settings");
    let teacher = TwoPoints { schedule: schedule.clone(), at: 0.8 };
    let student = Gaussian { schedule: schedule.clone(), mean: 0.1, std: 0.5 };
    let discriminator = FactorDiscriminator::trainable(0.4);
    let networks = with_discriminator(networks_of(&student, &teacher, &student), &discriminator);
    let data = Data::new(Tensor::ones([32, 3], kind::FLOAT_CPU));
    for (priors, expected) in [
        ((0.0, 1.0, 0.0), vec![Source::Student, Source::Noise]),
        ((1.0, 0.0, 0.0), vec![Source::Forward, Source::Noise]),
        ((0.4, 0.4, 0.2), vec![Source::Forward, Source::Student, Source::Teacher, Source::Noise]),
    ] {
        let priors = Priors::new(priors.0, priors.1, priors.2).expect("they sum to 1");
        let mixing =
            MixerConfig::default().with(|config| config.priors = PriorSchedule::constant(priors));
        let sampler = config.sampler_config(&schedule).build(&schedule).expect("valid settings");
        let mut mixer = Mixer::new(mixing, grid.clone(), sampler).expect("valid settings");
        let mut seen = Vec::new();
        for step in 0..6 {
            let clock = Clock::new(step, 6, STREAMS);
            let networks_of_rollouts = RolloutNetworks::new(&student, &teacher);
            let states = mixer.next_states(&clock, &MixBatch::new(&data), &networks_of_rollouts);
            let states = states.expect("valid settings");
            seen.extend(states.sources.iter().copied());
            let mut student_x0 = None;
            for phase in objective.phases(step) {
                let terms = objective.loss(
                    &LossRequest::new(step, *phase, &states, networks, &STREAMS)
                        .with_student_x0(student_x0.as_ref())
                        .with_real(&data),
                );
                let terms = terms.expect("valid states");
                assert_eq!(terms.per_sample.size(), [32]);
                assert!(terms.per_sample.isfinite().all().int64_value(&[]) == 1);
                student_x0 = Some(terms.student_x0);
            }
            let student_x0 = student_x0.expect("there is a phase in each step");
            mixer.feed_back(&clock, &states, &Feedback::new(&student_x0)).expect("they fit");
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, expected);
    }
}

#[test]
fn non_finite_values_are_not_hidden() {
    let [schedule, ..] = schedules();
    let dmd2 = method(&schedule, no_gan());
    let lost = Linear { schedule: schedule.clone(), factor: Tensor::from(f64::NAN) };
    let student = Linear { schedule, factor: Tensor::from(0.5) };
    let batch = states(Tensor::ones([2, 3], kind::DOUBLE_CPU), &trailing(4), &[0, 1]);
    for (phase, networks) in [
        (Phase::Student, networks_of(&student, &lost, &student)),
        (Phase::Student, networks_of(&student, &student, &lost)),
        (Phase::Student, networks_of(&lost, &student, &student)),
        (Phase::Critic, networks_of(&student, &student, &lost)),
        (Phase::Critic, networks_of(&lost, &student, &student)),
    ] {
        let terms = loss(&dmd2, &request(phase, &batch, networks));
        assert!(values(&terms.per_sample).iter().all(|value| value.is_nan()), "{phase:?}");
    }
}

#[test]
fn the_student_is_trained_every_nth_step_and_the_critic_in_every_step() {
    let [schedule, ..] = schedules();
    for (critic_ratio, student_steps) in [(5, vec![0, 5, 10]), (1, (0..12).collect())] {
        let dmd2 = method(
            &schedule,
            Dmd2Config::default().with(|config| config.critic_ratio = critic_ratio),
        );
        for step in 0..12 {
            let expected: &[Phase] = if student_steps.contains(&step) {
                &[Phase::Student, Phase::Critic]
            } else {
                &[Phase::Critic]
            };
            assert_eq!(dmd2.phases(step), expected, "{step}");
        }
    }
    let needs = |gan| {
        method(&schedule, Dmd2Config::default().with(|config| config.gan = gan)).requirements()
    };
    let mut expected = Requirements::default();
    expected.critic = true;
    assert_eq!(needs(false), expected);
    expected.discriminator = true;
    assert_eq!(needs(true), expected);
}

/// Records the guidance weights of each call's rows.
#[derive(Debug, Default)]
struct WeightRecorder(RefCell<Vec<Option<Vec<f64>>>>);

impl Discriminator for WeightRecorder {
    fn logits(
        &self,
        x_t: &Tensor,
        _: &Tensor,
        received: &Conditioning,
    ) -> ddil_core::Result<Tensor> {
        self.0.borrow_mut().push(received.get(Conditioning::GUIDANCE_WEIGHT).map(values));
        Ok(x_t.flatten(1, -1).mean_dim(1, false, x_t.kind()))
    }
}

#[test]
fn a_critic_that_sees_states_models_one_distribution_per_source_and_timestep() {
    let [schedule, ..] = schedules();
    let constant =
        |factor: f64| Linear { schedule: schedule.clone(), factor: Tensor::from(factor) };
    // The student returns 2, the teacher 0, and the critic its guidance weight.
    let (student, teacher, critic) = (constant(2.0), constant(0.0), Echo(schedule.clone()));
    let recorder = WeightRecorder::default();
    let indices = [1, 0, 3, 0, 2];
    let mut batch = states(Tensor::ones([5, 3], kind::DOUBLE_CPU), &trailing(4), &indices);
    batch.sources =
        vec![Source::Forward, Source::Student, Source::Teacher, Source::Noise, Source::Mixed];
    let sources = [1.0, 0.0, 2.0, 0.0, 3.0];
    let timesteps = indices.map(|index| index as f64);
    // Four timesteps for each source.
    let both = [5.0, 0.0, 11.0, 0.0, 14.0];
    let real = Data::new(batch.x_t.zeros_like());

    for (of_source, of_timestep, numbers) in [
        (false, false, None),
        (true, false, Some(sources)),
        (false, true, Some(timesteps)),
        (true, true, Some(both)),
    ] {
        let dmd2 = method(
            &schedule,
            Dmd2Config::default().with(|config| {
                config.critic_sees_source = of_source;
                config.critic_sees_timestep = of_timestep;
            }),
        );
        assert_eq!(dmd2.requirements().critic_sees_states, numbers.is_some());
        let networks = with_discriminator(networks_of(&student, &teacher, &critic), &recorder);
        let terms = loss(&dmd2, &request(Phase::Student, &batch, networks));
        let gradient = terms.student_x0 - terms.target;
        for (row, number) in numbers.unwrap_or_default().iter().enumerate() {
            assert!((gradient.double_value(&[row as i64, 0]) - number / 2.0).abs() < 1e-5, "{row}");
        }
        let base = request(Phase::Critic, &batch, networks);
        loss(&dmd2, &base.with_real(&real));
        // The student's samples in its own phase, then fake and real ones in the critic's: all have the same conditioning.
        assert_eq!(recorder.0.take(), vec![numbers.map(Vec::from); 3]);
    }
}

#[test]
fn missing_networks_are_named_before_any_evaluation() {
    let [schedule, ..] = schedules();
    let dmd2 = method(&schedule, Dmd2Config::default());
    let silent = Silent(schedule);
    let discriminator = FactorDiscriminator::trainable(0.4);
    let batch = states(Tensor::zeros([2, 3], kind::DOUBLE_CPU), &trailing(4), &[0, 1]);
    let bare = Networks::new(&silent, &silent);
    let without_discriminator = networks_of(&silent, &silent, &silent);
    let full = with_discriminator(without_discriminator, &discriminator);
    let say = |request: &LossRequest<'_>| {
        dmd2.loss(request).expect_err("something is missing").to_string()
    };
    for phase in [Phase::Student, Phase::Critic] {
        let message = say(&request(phase, &batch, bare));
        assert!(message.contains("requires a critic"), "{message}");
        let message = say(&request(phase, &batch, without_discriminator));
        assert!(message.contains("requires a discriminator"), "{message}");
    }
    let message = say(&request(Phase::Critic, &batch, full));
    assert!(message.contains("requires dataset samples"), "{message}");
    let few = Data::new(Tensor::zeros([1, 3], kind::DOUBLE_CPU));
    let message = say(&request(Phase::Critic, &batch, full).with_real(&few));
    assert!(message.contains("`real` has shape [1, 3]"), "{message}");
}

#[test]
fn mismatches_are_refused_by_name() {
    struct TwoLogits;
    impl Discriminator for TwoLogits {
        fn logits(&self, x_t: &Tensor, _: &Tensor, _: &Conditioning) -> ddil_core::Result<Tensor> {
            Ok(x_t.narrow(1, 0, 1))
        }
    }
    let [schedule, flow, _] = schedules();
    let dmd2 = method(&schedule, no_gan());
    let network = Gaussian { schedule: schedule.clone(), mean: 0.0, std: 1.0 };
    let other = Gaussian { schedule: flow, mean: 0.0, std: 1.0 };
    let networks = networks_of(&network, &network, &network);
    let batch = |t: i64, index| {
        let mut batch = states(Tensor::zeros([1, 2], kind::DOUBLE_CPU), &trailing(4), &[0]);
        (batch.timesteps, batch.grid_indices) = (Tensor::from_slice(&[t]), vec![index]);
        batch
    };
    let say =
        |request: &LossRequest<'_>| dmd2.loss(request).expect_err("it does not fit").to_string();
    let good = batch(999, 0);
    for phase in [Phase::Student, Phase::Critic] {
        for (t, index) in [(998, 0), (0, 0), (-1, 0), (1000, 0), (999, 4)] {
            let message = say(&request(phase, &batch(t, index), networks));
            assert!(message.contains("[999, 749, 499, 249]"), "{message}");
        }
        for (name, networks) in [
            ("student", networks_of(&other, &network, &network)),
            ("critic", networks_of(&network, &network, &other)),
        ] {
            let message = say(&request(phase, &good, networks));
            assert!(message.contains(&format!("{name} has another noise schedule")), "{message}");
        }
    }
    let message = say(&request(Phase::Student, &good, networks_of(&network, &other, &network)));
    assert!(message.contains("teacher has another noise schedule"), "{message}");
    let wide = Tensor::zeros([1, 3], kind::DOUBLE_CPU);
    let kept = request(Phase::Critic, &good, networks).with_student_x0(&wide);
    assert!(say(&kept).contains("student_x0"), "{}", say(&kept));

    let dmd2 = method(&schedule, Dmd2Config::default());
    let refused =
        dmd2.loss(&request(Phase::Student, &good, with_discriminator(networks, &TwoLogits)));
    let message = refused.expect_err("one logit a sample").to_string();
    assert!(message.contains("`logits` has shape [1, 1]"), "{message}");
}

#[test]
fn invalid_settings_are_refused_by_name() {
    let [schedule, ..] = schedules();
    let good = Dmd2Config::default;
    for (named, config) in [
        ("critic_ratio", good().with(|config| config.critic_ratio = 0)),
        ("dm_weight", good().with(|config| config.dm_weight = -1.0)),
        ("gan_weight", good().with(|config| config.gan_weight = f64::NAN)),
        ("critic_gan_weight", good().with(|config| config.critic_gan_weight = f64::INFINITY)),
        ("dm_min_timestep, dm_max_timestep", good().with(|config| config.dm_min_timestep = 0.99)),
        ("dm_min_timestep, dm_max_timestep", good().with(|config| config.dm_max_timestep = 1.01)),
        (
            "dm_min_timestep, dm_max_timestep",
            good().with(|config| config.dm_min_timestep = f64::NAN),
        ),
        ("critic_weight_cap", good().with(|config| config.critic_weight_cap = 0.0)),
    ] {
        let refused = Dmd2::new(config, schedule.clone(), trailing(4));
        let message = refused.expect_err("it cannot be").to_string();
        assert!(message.starts_with(&format!("`{named}`")), "{message}");
    }
    let method = ObjectiveConfig::Dmd2(good());
    for steps in [0, 3, 6, 1001] {
        for grid in [method.training_grid(&schedule, steps), method.sampling_grid(&schedule, steps)]
        {
            let message = grid.expect_err("it does not divide 1000").to_string();
            assert!(message.contains(&format!("`steps` is {steps}")), "{message}");
            assert!(message.contains("divisor of the 1000"), "{message}");
        }
    }
    assert_eq!(method.sampling_grid(&schedule, 8).expect("8 divides 1000"), trailing(8));
    let sampler = method.sampler_config(&schedule);
    assert_eq!(
        (sampler.boundary(), method.as_str()),
        (Some(ConsistencyBoundary::default()), "dmd2")
    );
    assert!(sampler.build(&schedule).expect("valid settings").needs_noise());
}
