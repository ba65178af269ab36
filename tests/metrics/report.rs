//! Reports.

use ddil_metrics::{Error, MeasureOptions, Neighbours, Report, measure};

use crate::normal;

fn report() -> ddil_metrics::Result<Report> {
    Ok(Report {
        reference: "fashion-mnist test".to_owned(),
        num_reference: 40,
        num_samples: 30,
        extractor: "raw-pixels-1x2x2".to_owned(),
        resize: "none".to_owned(),
        options: MeasureOptions::default(),
        values: measure(&normal(0, 40, 4), &normal(1, 30, 4), MeasureOptions::default())?,
    })
}

#[test]
fn stored_and_read_back() -> Result<(), Box<dyn std::error::Error>> {
    let report = report()?;
    let json = serde_json::to_value(&report)?;
    for name in ["frechet", "precision", "recall", "density", "coverage", "kid"] {
        assert!(json[name].is_f64(), "{name} stands beside the reference");
    }
    assert_eq!(serde_json::from_value::<Report>(json)?, report);
    Ok(())
}

#[test]
fn compares_only_states_of_the_same_timestep() -> ddil_metrics::Result<()> {
    let (one, mut other) = (report()?, report()?);
    other.values.frechet += 1.0;
    assert!(one.is_comparable(&other));
    let changes: [fn(&mut Report); 6] = [
        |report| report.reference.push('!'),
        |report| report.num_reference += 1,
        |report| report.num_samples += 1,
        |report| report.extractor.push('!'),
        |report| report.resize.push('!'),
        |report| report.options.neighbours.density_coverage += 1,
    ];
    for change in changes {
        let mut other = report()?;
        change(&mut other);
        assert!(!one.is_comparable(&other), "{other:?}");
    }
    Ok(())
}

/// Sliced Wasserstein needs equal counts; every other metric is there without.
#[test]
fn unequal_counts() -> ddil_metrics::Result<()> {
    let (real, fake) = (normal(0, 40, 4), normal(1, 30, 4));
    let options = MeasureOptions::default();
    assert_eq!(measure(&real, &fake, options)?.sliced_wasserstein, None);
    assert!(measure(&real, &real, options)?.sliced_wasserstein.is_some());
    Ok(())
}

#[test]
fn impossible_options() {
    let real = normal(0, 40, 4);
    let no_directions = MeasureOptions { num_projections: 0, ..MeasureOptions::default() };
    assert!(matches!(measure(&real, &real, no_directions), Err(Error::Invalid(_))));
    let neighbours = Neighbours { precision_recall: 40, density_coverage: 5 };
    let too_many = MeasureOptions { neighbours, ..MeasureOptions::default() };
    assert!(matches!(measure(&real, &real, too_many), Err(Error::TooFewSamples { .. })));
    let unknown = serde_json::from_str::<MeasureOptions>(r#"{"projections": 3}"#);
    assert!(unknown.is_err());
}
