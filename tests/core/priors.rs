use ddil_core::{Error, PriorSchedule, PriorStep, Priors, Source};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

fn parts(priors: Priors) -> [f64; 3] {
    [priors.forward(), priors.student(), priors.teacher()]
}

fn close(found: Priors, expected: [f64; 3]) {
    for (found, expected) in parts(found).into_iter().zip(expected) {
        assert!((found - expected).abs() < 1e-12, "{found} for {expected}");
    }
}

#[test]
fn default_warms_up_on_forward_states() {
    let schedule = PriorSchedule::default_for_pd();
    close(schedule.at(0.0), [1.0, 0.0, 0.0]);
    close(schedule.at(0.05), [1.0, 0.0, 0.0]);
    close(schedule.at(0.15), [0.75, 0.125, 0.125]);
    close(schedule.at(0.25), [0.5, 0.25, 0.25]);
    close(schedule.at(1.0), [0.5, 0.25, 0.25]);
    close(PriorSchedule::default_for_dmd2().at(0.15), [0.75, 0.25, 0.0]);
}

#[test]
fn schedules_in_closed_form() -> ddil_core::Result<()> {
    let (from, to) = (Priors::new(1.0, 0.0, 0.0)?, Priors::new(0.2, 0.8, 0.0)?);
    let cosine = PriorSchedule::Cosine { from, to, start: 0.0, end: 1.0 };
    close(cosine.at(0.5), [0.6, 0.4, 0.0]);
    let quarter = (1.0 - std::f64::consts::FRAC_PI_4.cos()) / 2.0;
    close(cosine.at(0.25), [1.0 - 0.8 * quarter, 0.8 * quarter, 0.0]);
    close(cosine.at(-1.0), [1.0, 0.0, 0.0]);
    close(cosine.at(2.0), [0.2, 0.8, 0.0]);

    let jump = PriorSchedule::Linear { from, to, start: 0.5, end: 0.5 };
    close(jump.at(0.4999), parts(from));
    close(jump.at(0.5), parts(to));

    let steps = PriorSchedule::Steps {
        steps: vec![PriorStep { from: 0.0, priors: from }, PriorStep { from: 0.3, priors: to }],
    };
    close(steps.at(0.29), parts(from));
    close(steps.at(0.3), parts(to));
    Ok(())
}

#[test]
fn refuses_invalid_settings() -> ddil_core::Result<()> {
    for (f, s, t) in [(0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (f64::NAN, 0.5, 0.5), (0.0, 0.0, 0.0)] {
        assert!(matches!(Priors::new(f, s, t), Err(Error::Invalid(_))), "{f} {s} {t}");
    }
    let (from, to) = (Priors::FORWARD_ONLY, Priors::new(0.0, 1.0, 0.0)?);
    for (start, end) in [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (f64::NAN, 0.5)] {
        assert!(PriorSchedule::Linear { from, to, start, end }.ensure().is_err(), "{start} {end}");
    }
    for first in [vec![], vec![0.1], vec![0.0, 0.0], vec![0.0, 1.5]] {
        let steps = first.iter().map(|&from| PriorStep { from, priors: to }).collect();
        assert!(PriorSchedule::Steps { steps }.ensure().is_err(), "{first:?}");
    }
    Ok(())
}

#[test]
fn settings_are_read_strictly() {
    let read = |text: &str| serde_json::from_str::<PriorSchedule>(text);
    let linear = r#"{"kind": "linear", "start": 0.1, "end": 0.2,
        "from": {"forward": 1.0}, "to": {"forward": 0.5, "student": 0.5}}"#;
    let schedule = read(linear).expect("it is valid");
    close(schedule.at(1.0), [0.5, 0.5, 0.0]);
    let written = serde_json::to_string(&schedule).expect("it can be written");
    assert_eq!(read(&written).expect("it can be read again"), schedule);

    let message = |text: &str| read(text).expect_err("it is not valid").to_string();
    let unknown = message(r#"{"kind": "constant", "priors": {"forward": 1.0}, "stop": 1}"#);
    assert!(unknown.contains("stop"), "{unknown}");
    let unknown = message(r#"{"kind": "constant", "priors": {"forwards": 1.0}}"#);
    assert!(unknown.contains("forwards"), "{unknown}");
    let sum = message(r#"{"kind": "constant", "priors": {"forward": 0.7}}"#);
    assert!(sum.contains("with sum 1"), "{sum}");
}

fn any_priors() -> impl Strategy<Value = Priors> {
    let part = || prop_oneof![Just(0.0), 0.0..1.0_f64];
    (part(), part(), part()).prop_filter("one is above 0", |(f, s, t)| f + s + t > 0.0).prop_map(
        |(f, s, t)| {
            let sum = f + s + t;
            Priors::new(f / sum, s / sum, t / sum).expect("they sum to 1")
        },
    )
}

fn count(sources: &[Source], source: Source) -> usize {
    sources.iter().filter(|s| **s == source).count()
}

proptest! {
    /// Each count is the expected one rounded down or up, and a prior of 0 is never drawn.
    #[test]
    fn counts_are_stratified(priors in any_priors(), batch in 0_usize..70, seed: u64) {
        let sources = priors.assign(batch, &mut StdRng::seed_from_u64(seed));
        prop_assert_eq!(sources.len(), batch);
        for (source, share) in [Source::Forward, Source::Student, Source::Teacher]
            .into_iter()
            .zip(parts(priors))
        {
            let (found, expected) = (count(&sources, source) as f64, share * batch as f64);
            prop_assert!((found - expected).abs() < 1.0 + 1e-9, "{} for {}", found, expected);
            prop_assert!(share > 0.0 || found == 0.0);
        }
    }

    #[test]
    fn priors_stay_on_the_simplex(from in any_priors(), to in any_priors(), p in -0.5..1.5_f64) {
        for schedule in [
            PriorSchedule::Linear { from, to, start: 0.2, end: 0.8 },
            PriorSchedule::Cosine { from, to, start: 0.2, end: 0.8 },
        ] {
            let parts = parts(schedule.at(p));
            prop_assert!(parts.iter().all(|part| *part >= 0.0));
            prop_assert!((parts.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }
}

/// Rounding leaves the mean exact, and each place of the batch gets each source as often.
#[test]
fn frequencies_are_the_priors() -> ddil_core::Result<()> {
    let priors = Priors::new(0.55, 0.3, 0.15)?;
    let (batch, rounds) = (7, 4000);
    let mut rng = StdRng::seed_from_u64(0);
    let mut first = [0_u32; 3];
    let mut total = [0_usize; 3];
    for _ in 0..rounds {
        let sources = priors.assign(batch, &mut rng);
        for (i, source) in
            [Source::Forward, Source::Student, Source::Teacher].into_iter().enumerate()
        {
            total[i] += count(&sources, source);
            first[i] += u32::from(sources[0] == source);
        }
    }
    for ((share, total), first) in parts(priors).into_iter().zip(total).zip(first) {
        let n = f64::from(rounds);
        // A rounded count has a variance of at most 1/4.
        assert!((total as f64 / n - share * batch as f64).abs() < 3.0 * 0.5 / n.sqrt());
        let deviation = (share * (1.0 - share) / n).sqrt();
        assert!((f64::from(first) / n - share).abs() < 3.0 * deviation, "{first} for {share}");
    }
    Ok(())
}
