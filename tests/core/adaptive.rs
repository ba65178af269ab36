use ddil_core::{
    AdaptivePriors, AdaptiveSignal, Clock, Data, Error, Feedback, MixBatch, Mixer, MixerConfig,
    PriorSchedule, Priors, RandomStreams, RolloutNetworks, Source, States, StudentPolicy,
};
use ddil_libtorch::ArgumentError;
use ddil_schedulers::{Ddim, Lcm, Sampler};
use tch::{Kind, Tensor};

use crate::common::{Gaussian, labels, normal, schedule, trailing};

const BATCH: usize = 64;

/// Data that are all 3, and a student that is sure of `student`.
struct Run {
    mixer: Mixer,
    student: Gaussian,
    streams: RandomStreams,
}

impl Run {
    fn with_sampler(priors: AdaptivePriors, student: f64, sampler: Box<dyn Sampler>) -> Self {
        let config = MixerConfig::default().with(|config| {
            config.priors = PriorSchedule::Adaptive(priors);
            config.student.policy = StudentPolicy::FreshAll;
        });
        Self {
            mixer: Mixer::new(config, trailing(4), sampler).expect("it is valid"),
            student: Gaussian::new(student, 0.0, 1e-6),
            streams: RandomStreams::new(5, 0),
        }
    }

    fn new(priors: AdaptivePriors) -> Self {
        Self::with_sampler(priors, -3.0, Box::new(Ddim::new(schedule())))
    }

    fn next(&mut self, step: u64) -> ddil_core::Result<States> {
        let data = Data::new(Tensor::full([BATCH as i64, 6], 3.0, tch::kind::FLOAT_CPU))
            .with_conditioning(labels(BATCH));
        let networks = RolloutNetworks::new(&self.student, &self.student);
        let clock = Clock::new(step, 100, self.streams);
        self.mixer.next_states(&clock, &MixBatch::new(&data), &networks)
    }

    /// A step whose losses are these on states of data and of the student.
    fn step(&mut self, step: u64, forward: f32, student: f32) -> ddil_core::Result<States> {
        let states = self.next(step)?;
        let loss = |source: &Source| match source {
            Source::Forward => forward,
            Source::Student => student,
            _ => 100.0,
        };
        let losses: Vec<f32> = states.sources.iter().map(loss).collect();
        let (clock, losses) = (Clock::new(step, 100, self.streams), Tensor::from_slice(&losses));
        let feedback = Feedback::new(&states.x_t).with_losses(Some(&losses));
        self.mixer.feed_back(&clock, &states, &feedback)?;
        Ok(states)
    }

    fn student_shares(&self, step: u64) -> Vec<f64> {
        self.mixer.priors_by_index(step, 100).into_iter().map(Priors::student).collect()
    }
}

fn adaptive(signal: AdaptiveSignal) -> AdaptivePriors {
    AdaptivePriors::default().with(|config| {
        config.signal = signal;
        config.min = 0.2;
        config.max = 0.7;
        config.interval = 5;
    })
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "{found} for {expected}");
}

#[test]
fn starts_with_data_then_the_smallest_share() -> ddil_core::Result<()> {
    for signal in [AdaptiveSignal::Shift, AdaptiveSignal::LossRatio] {
        let mut run = Run::new(adaptive(signal));
        for step in 0..5 {
            let states = run.next(step)?;
            let of_data = |source: &Source| matches!(source, Source::Forward | Source::Noise);
            assert!(states.sources.iter().all(of_data));
            assert_eq!(run.mixer.priors_at(step, 100), Priors::FORWARD_ONLY);
        }
        let priors = run.mixer.priors_at(5, 100);
        close(priors.student(), 0.2);
        close(priors.teacher(), 0.8 * 0.25);
        close(priors.forward(), 0.8 * 0.75);
        assert_eq!(run.mixer.config().priors.at(0.05), priors);
    }
    Ok(())
}

/// Where the student's states are those of data but for chance its share stays small; where they are nothing like
/// them it gets all that it may.
#[test]
fn follows_the_shift() -> ddil_core::Result<()> {
    let config = adaptive(AdaptiveSignal::Shift);
    // Estimates with fresh noise: alpha times the student's x0, plus noise, as data are noised.
    for (believed, far) in [(3.0, false), (-3.0, true)] {
        let mut run = Run::with_sampler(config.clone(), believed, Box::new(Lcm::new(schedule())));
        for step in 0..60 {
            let _ = run.next(step)?;
        }
        let shares = run.student_shares(60);
        close(shares[0], 0.2);
        for (index, share) in shares.into_iter().enumerate().skip(1) {
            assert_eq!(share > 0.55, far, "{share} at {index}");
            assert_eq!(share < 0.4, !far, "{share} at {index}");
        }
        let mean = run.mixer.priors_at(60, 100);
        assert_eq!(mean.student() > 0.55, far);
        // Networks are evaluated at states only.
        assert_eq!(run.student.num_evaluated.get(), {
            let counters = run.mixer.counters();
            counters.student_evaluations + counters.teacher_evaluations
        });
    }
    Ok(())
}

#[test]
fn follows_the_loss_ratio() -> ddil_core::Result<()> {
    let mut run = Run::new(adaptive(AdaptiveSignal::LossRatio));
    for step in 0..10 {
        let _ = run.step(step, 1.0, 3.0)?;
    }
    // Only once the interval is over.
    close(run.student_shares(10)[2], 0.2);
    let _ = run.step(10, 1.0, 1.0)?;
    for share in run.student_shares(10).into_iter().skip(1) {
        close(share, 0.2 + 0.5 * 0.75);
    }
    for step in 11..=15 {
        let _ = run.step(step, 1.0, 1.0)?;
    }
    // Half of 3 and half of 1 against 1.
    for share in run.student_shares(16).into_iter().skip(1) {
        close(share, 0.2 + 0.5 * (2.0 / 3.0));
    }
    // Noise belongs to no source, whatever its loss.
    close(run.student_shares(16)[0], 0.2);
    Ok(())
}

#[test]
fn states_come_as_often_as_was_measured() -> ddil_core::Result<()> {
    let mut run = Run::new(adaptive(AdaptiveSignal::LossRatio).with(|config| config.max = 0.6));
    let mut students = 0;
    for step in 0..90 {
        let states = run.step(step, 1.0, 1e6)?;
        if step > 10 {
            students += states.sources.iter().filter(|s| **s == Source::Student).count();
        }
    }
    // Three quarters of a batch are past noise.
    let expected = 0.6 * 0.75 * 64.0 * 79.0;
    assert!((students as f64 - expected).abs() < 0.02 * expected, "{students} for {expected}");
    Ok(())
}

/// Runs that differ only in their priors use the same data at the same timesteps with the same noise.
#[test]
fn changes_nothing_but_the_source() -> ddil_core::Result<()> {
    let mut run = Run::new(adaptive(AdaptiveSignal::Shift));
    let mut plain = Run::new(adaptive(AdaptiveSignal::Shift).with(|config| config.warm_up = 1.0));
    for step in 0..30 {
        let (mixed, plain) = (run.next(step)?, plain.next(step)?);
        assert_eq!(mixed.grid_indices, plain.grid_indices);
        for row in 0..BATCH {
            if mixed.sources[row] == Source::Forward {
                assert_eq!(mixed.x_t.get(row as i64), plain.x_t.get(row as i64));
            }
        }
    }
    Ok(())
}

#[test]
fn a_restored_one_continues_exactly() -> ddil_core::Result<()> {
    for signal in [AdaptiveSignal::Shift, AdaptiveSignal::LossRatio] {
        let mut original = Run::new(adaptive(signal));
        for step in 0..23 {
            let _ = original.step(step, 1.0, 1.0 + step as f32)?;
        }
        let mut saved = original.mixer.save()?;
        let text = serde_json::to_string(&saved.metadata).expect("it can be written");
        saved.metadata = serde_json::from_str(&text).expect("it can be read");
        let mut restored = Run::new(adaptive(signal));
        restored.mixer.restore(&saved)?;
        for step in 23..40 {
            let a = original.step(step, 1.0, 1.0 + step as f32)?;
            let b = restored.step(step, 1.0, 1.0 + step as f32)?;
            assert_eq!(a.x_t, b.x_t, "{signal:?} at {step}");
            assert_eq!(a.sources, b.sources);
            assert_eq!(original.student_shares(step), restored.student_shares(step));
        }
        let (a, b) = (original.mixer.save()?, restored.mixer.save()?);
        assert_eq!((a.metadata, a.tensors), (b.metadata, b.tensors));
    }
    Ok(())
}

#[test]
fn refuses_saved_state_of_another_signal() -> ddil_core::Result<()> {
    let (shift, ratio) = (AdaptiveSignal::Shift, AdaptiveSignal::LossRatio);
    let settled = MixerConfig::default().with(|config| {
        config.student.policy = StudentPolicy::FreshAll;
    });
    let settled = Mixer::new(settled, trailing(4), Box::new(Ddim::new(schedule())))?.save()?;
    let mut run = Run::new(adaptive(shift));
    let refused = run.mixer.restore(&settled);
    assert!(matches!(refused, Err(Error::Restore { what: "mixer", .. })), "{refused:?}");
    for (from, to) in [(shift, ratio), (ratio, shift)] {
        let saved = Run::new(adaptive(from)).mixer.save()?;
        let refused = Run::new(adaptive(to)).mixer.restore(&saved);
        assert!(matches!(refused, Err(Error::Restore { what: "adaptive priors", .. })));
    }
    Ok(())
}

#[test]
fn flush_drops_measurements() -> ddil_core::Result<()> {
    for signal in [AdaptiveSignal::Shift, AdaptiveSignal::LossRatio] {
        let mut run = Run::new(adaptive(signal));
        for step in 0..40 {
            let _ = run.step(step, 1.0, 9.0)?;
        }
        assert!(run.student_shares(50)[3] > 0.5);
        run.mixer.flush();
        close(run.student_shares(50)[3], 0.2);
        assert!(run.mixer.save()?.tensors.is_empty());
        let _ = run.step(0, 1.0, 9.0)?;
    }
    Ok(())
}

/// Without losses, their ratio would never change.
#[test]
fn losses_are_required() -> ddil_core::Result<()> {
    let mut run = Run::new(adaptive(AdaptiveSignal::LossRatio));
    for step in 0..5 {
        let _ = run.next(step)?;
    }
    let unseen = run.next(5);
    assert!(matches!(unseen, Err(Error::Invalid(invalid)) if invalid.field == "priors.signal"));
    let states = Run::new(adaptive(AdaptiveSignal::LossRatio)).next(0)?;
    let (clock, losses) = (Clock::new(0, 100, run.streams), normal(0, &[3]));
    let feedback = Feedback::new(&states.x_t).with_losses(Some(&losses));
    let short = run.mixer.feed_back(&clock, &states, &feedback);
    assert!(matches!(short, Err(Error::Argument(ArgumentError::Shape { .. }))));
    Ok(())
}

#[test]
fn refuses_invalid_settings() {
    let ok = AdaptivePriors::default();
    assert!(ok.ensure().is_ok());
    let wrong = [
        ok.clone().with(|config| config.min = 0.0),
        ok.clone().with(|config| config.max = 1.0),
        ok.clone().with(|config| config.min = 0.9),
        ok.clone().with(|config| config.min = f64::NAN),
        ok.clone().with(|config| config.teacher_fraction = 1.0),
        ok.clone().with(|config| config.teacher_fraction = -0.1),
        ok.clone().with(|config| config.interval = 0),
        ok.clone().with(|config| config.warm_up = 1.1),
        ok.clone().with(|config| config.states = 15),
        ok.clone().with(|config| config.decay = 1.0),
    ];
    for wrong in wrong {
        let refused = PriorSchedule::Adaptive(wrong.clone()).ensure();
        assert!(matches!(refused, Err(Error::Invalid(_))), "{wrong:?}");
        let config =
            MixerConfig::default().with(|config| config.priors = PriorSchedule::Adaptive(wrong));
        assert!(Mixer::new(config, trailing(4), Box::new(Ddim::new(schedule()))).is_err());
    }
    // Room for states is known once a state is.
    let mut run =
        Run::new(adaptive(AdaptiveSignal::Shift).with(|config| config.byte_budget = 1500));
    let refused = run.next(0);
    assert!(
        matches!(&refused, Err(Error::Invalid(invalid)) if invalid.field == "priors.byte_budget"),
        "{refused:?}"
    );
}

#[test]
fn settings_are_read_strictly() {
    let read = |text: &str| serde_json::from_str::<PriorSchedule>(text);
    let default = PriorSchedule::Adaptive(AdaptivePriors::default());
    assert_eq!(read(r#"{"kind": "adaptive"}"#).expect("it is valid"), default);
    let ratio = read(r#"{"kind": "adaptive", "signal": "loss_ratio", "interval": 50}"#);
    let expected = AdaptivePriors::default().with(|config| {
        config.signal = AdaptiveSignal::LossRatio;
        config.interval = 50;
    });
    let ratio = ratio.expect("it is valid");
    assert_eq!(ratio, PriorSchedule::Adaptive(expected));
    let written = serde_json::to_string(&ratio).expect("it can be written");
    assert_eq!(read(&written).expect("it can be read again"), ratio);
    let unknown = read(r#"{"kind": "adaptive", "every": 50}"#).expect_err("it is not valid");
    assert!(unknown.to_string().contains("every"), "{unknown}");
}

/// Dataset samples at the noisiest timestep are not counted as measured states.
#[test]
fn noisiest_states_are_not_compared() -> ddil_core::Result<()> {
    for signal in [AdaptiveSignal::Shift, AdaptiveSignal::LossRatio] {
        let mut run = Run::new(adaptive(signal));
        let config = run.mixer.config().clone().with(|mixer| mixer.pure_noise_at_tmax = false);
        run.mixer = Mixer::new(config, trailing(4), Box::new(Ddim::new(schedule())))?;
        for step in 0..30 {
            let _ = run.step(step, 1.0, 1.0)?;
        }
        close(run.student_shares(30)[0], 0.2);
        assert!(run.student_shares(30)[3] > 0.3);
    }
    Ok(())
}

/// One timestep: all is noise, and there is nothing to measure.
#[test]
fn one_step_is_all_noise() -> ddil_core::Result<()> {
    for signal in [AdaptiveSignal::Shift, AdaptiveSignal::LossRatio] {
        let mut run = Run::new(adaptive(signal));
        let config = run.mixer.config().clone();
        run.mixer = Mixer::new(config, trailing(1), Box::new(Ddim::new(schedule())))?;
        for step in 0..12 {
            let states = run.step(step, 1.0, 1.0)?;
            assert!(states.sources.iter().all(|source| *source == Source::Noise));
            assert_eq!(states.x_t.kind(), Kind::Float);
        }
        close(run.mixer.priors_at(12, 100).student(), 0.2);
    }
    Ok(())
}
