use std::collections::BTreeMap;

use ddil::compare::matrix::{Axis, AxisValue};
use ddil::compare::metric::Metric;
use ddil::compare::statistics::Estimate;
use ddil::compare::{ComparisonReport, Entry, EntryKind, EntryState, Matrix, plot, table};
use ddil_evaluate::{Measurement, ShiftRow};
use ddil_files::settings::Settings;
use ddil_schedulers::Thresholding;
use proptest::prelude::*;

use crate::TestResult;

const BASE: &str = "teacher = { path = \"teacher\" }\n[student]\nupdates_per_stage = 7\n";

const MATRIX: &str = r#"name = "all"
base = "student.toml"
seeds = [3, 4]
exclude = [{ steps = "2", clip = "off" }]

[set]
"data.batch_size" = 8

[[axes]]
name = "clip"
baseline = "off"
values = [{ name = "off" }, { name = "on", set = { thresholding = { kind = "clamp", low = -1.0, high = 1.0 } } }]

[[axes]]
name = "steps"
values = [{ name = "4" }, { name = "2", set = { "student.stages" = [2] } }]
"#;

fn matrix(text: &str) -> ddil::Result<Matrix> {
    Matrix::from_settings(&Settings::parse("matrix.toml", text)?)
}

fn cells(text: &str) -> ddil::Result<Vec<ddil::compare::Cell>> {
    matrix(text)?.cells(&Settings::parse("student.toml", BASE)?)
}

#[track_caller]
fn refused(text: &str, words: &[&str]) {
    let error = cells(text).expect_err("it is refused").to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not said in: {error}");
    }
}

#[test]
fn cells_are_all_combinations_except_the_excluded_ones() -> TestResult {
    let cells = cells(MATRIX)?;
    let names: Vec<&str> = cells.iter().map(|cell| cell.name.as_str()).collect();
    let expected =
        ["off_4_seed3", "off_4_seed4", "on_4_seed3", "on_4_seed4", "on_2_seed3", "on_2_seed4"];
    assert_eq!(names, expected);
    let last = &cells[5];
    assert_eq!((last.arm.as_str(), last.seed, last.own_steps()), ("on_2", 4, 2));
    assert_eq!(last.values, ["on", "2"]);
    let config = &last.config;
    // From the base, from `set`, from either axis, and from the comparison itself.
    assert_eq!((config.student.updates_per_stage, config.data.batch_size), (7, 8));
    assert_eq!(config.thresholding, Thresholding::clamp_pixels());
    assert_eq!(config.student.stages, [2]);
    assert_eq!((config.run.seed, config.run.threads), (4, 1));
    assert_eq!(config.run.path(), std::path::Path::new("runs/all/cells/on_2_seed4"));
    Ok(())
}

#[test]
fn an_exception_applies_to_its_combination_and_comes_last() -> TestResult {
    let exceptions = "exceptions = [{ at = { clip = \"on\", steps = \"2\" }, set = { \"student.stages\" = [1] } }]\n\n[set]";
    let text = MATRIX.replace("[set]", exceptions);
    let found = cells(&text)?;
    let stages: Vec<_> = found.iter().map(|cell| cell.config.student.stages[0]).collect();
    assert_eq!(stages, [4, 4, 4, 4, 1, 1]);
    refused(
        &text.replace("clip = \"on\", steps", "clop = \"on\", steps"),
        &["`exceptions`", "`clop`"],
    );
    refused(&text.replace("{ clip = \"on\", steps = \"2\" }", "{}"), &["`exceptions`", "empty"]);
    let reserved = text.replace("{ \"student.stages\" = [1] }", "{ \"run.name\" = \"mine\" }");
    refused(&reserved, &["`run.name` cannot be set"]);
    Ok(())
}

#[test]
fn defaults_are_those_that_are_documented() -> TestResult {
    let matrix = matrix("name = \"plain\"\nbase = \"b.toml\"")?;
    assert_eq!((matrix.seeds.as_slice(), matrix.workers, matrix.threads), (&[0][..], 2, 1));
    assert_eq!((matrix.evaluate.samples, matrix.evaluate.teacher_steps), (10_000, 50));
    assert_eq!(matrix.evaluate.samples_at(false), 10_000);
    assert_eq!(matrix.evaluate.step_counts(4).into_iter().collect::<Vec<_>>(), [4]);
    let cells = matrix.cells(&Settings::parse("student.toml", BASE)?)?;
    assert_eq!(cells.iter().map(|cell| cell.name.as_str()).collect::<Vec<_>>(), ["base_seed0"]);
    Ok(())
}

#[test]
fn mistakes_are_reported_with_their_place() {
    let changed = |from: &str, to: &str| MATRIX.replace(from, to);
    refused(&changed("seeds", "sedes"), &["matrix.toml:3:1", "`sedes`", "did you mean `seeds`?"]);
    refused(&changed("[3, 4]", "[3, -4]"), &["matrix.toml:3:13", "seeds.1", "-4"]);
    refused(
        &changed("name = \"on\", set", "name = \"on\", sets"),
        &["matrix.toml:12:", "axes.0.values.1.sets", "did you mean `set`?"],
    );
    refused(&changed("baseline = \"off\"", "baseline = \"of\""), &["axis `clip`", "`of`"]);
    refused(&changed("name = \"all\"", "name = \"../all\""), &["`name` is `../all`"]);
    refused(
        &changed("{ name = \"4\" }", "{ name = \"2\" }"),
        &["`steps` has two values named `2`"],
    );
    refused(&changed("{ name = \"4\" }", "{ name = \"a b\" }"), &["`a b` is not a valid name"]);
    refused(&changed("name = \"steps\"", "name = \"clip\""), &["two axes are named `clip`"]);
    refused(&changed("clip = \"off\" }]", "clop = \"off\" }]"), &["no axis `clop`"]);
    refused(&changed("clip = \"off\" }]", "clip = \"no\" }]"), &["`clip` has no value `no`"]);
    refused(&changed("[3, 4]", "[3, 3]"), &["`seeds` is [3, 3]"]);
    refused(&changed("[3, 4]", "[]"), &["`seeds` is []"]);
    refused(&changed("data.batch_size", "run.seed"), &["`run.seed` cannot be set"]);
    let all_out = "exclude = [{ clip = \"on\" }, { clip = \"off\" }]";
    refused(
        &changed("exclude = [{ steps = \"2\", clip = \"off\" }]", all_out),
        &["excludes every cell"],
    );
}

#[test]
fn all_problems_are_reported_at_once() {
    let text = MATRIX
        .replace("[3, 4]", "[]")
        .replace("baseline = \"off\"", "baseline = \"of\"")
        .replace("[set]", "[evaluate]\nsamples = 2\nbatch_size = 0\n\n[set]");
    refused(&text, &["`seeds`", "`of`", "`evaluate.samples` is 2", "`evaluate.batch_size` is 0"]);
    let text = MATRIX.replace("\"data.batch_size\" = 8", "\"data.batch_size\" = 0");
    refused(&text, &["off_4_seed3 and 5 more", "`data.batch_size` is 0"]);
}

/// Of a teacher without unconditional predictions, or whose guidance is left as it is, a negative prompt changes nothing.
#[test]
fn a_negative_prompt_without_guidance_is_refused() -> TestResult {
    let prompts = tempfile::NamedTempFile::new()?;
    let path = prompts.path().display().to_string();
    let with = |guidance: &str| {
        let evaluate = format!(
            "[evaluate]\nprompts = {path:?}\nclip = {path:?}\nnegative_prompt = \"blurred\"\n\n[set]\n\
             \"teacher.guidance\" = {guidance}\n\"data.kind\" = \"captions\"\n\"data.path\" = \"captions\""
        );
        MATRIX.replace("[set]", &evaluate)
    };
    for guidance in ["{ kind = \"baked_in\" }", "{ kind = \"cfg\", scale = 1.0 }"] {
        refused(&with(guidance), &["`evaluate.negative_prompt`", "no effect"]);
    }
    for guidance in
        ["{ kind = \"cfg\", scale = 3.0 }", "{ kind = \"cfg_range\", min = 1.0, max = 3.0 }"]
    {
        assert_eq!(cells(&with(guidance))?.len(), 6, "{guidance}");
    }
    Ok(())
}

#[test]
fn an_arm_is_not_compared_with_itself() {
    let text = MATRIX.replace("\"student.stages\" = [2]", "\"student.stages\" = [4]");
    refused(&text, &["`on_4` and `on_2` have the same config"]);
    let text = MATRIX.replace("\"student.stages\" = [2]", "\"data.path\" = \"elsewhere\"");
    refused(&text, &["other data"]);
}

#[test]
fn a_paired_difference_cancels_the_common_part() -> TestResult {
    // Seeds differ by far more than the arms do.
    let pairs = [(11.0, 10.0), (103.0, 100.0), (1002.0, 1000.0)];
    let difference = Estimate::of_differences(&pairs).ok_or("there are pairs")?;
    assert_eq!((difference.n, difference.mean), (3, 2.0));
    // Of 1, 3, 2: s = 1.
    let error = difference.standard_error.ok_or("there are three")?;
    assert!((error - 1.0 / 3.0_f64.sqrt()).abs() < 1e-15, "{error}");
    let errors = difference.standard_errors().ok_or("the error is not 0")?;
    assert!((errors - 2.0 * 3.0_f64.sqrt()).abs() < 1e-12, "{errors}");
    assert_eq!(difference.shown(2), "2.00 ± 0.58");

    let one = Estimate::of_differences(&pairs[..1]).ok_or("there is a pair")?;
    assert_eq!((one.mean, one.standard_error, one.standard_errors()), (1.0, None, None));
    assert_eq!(one.shown(1), "1.0");
    let equal = Estimate::of(&[4.0, 4.0]).ok_or("there are values")?;
    assert_eq!((equal.standard_error, equal.standard_errors()), (Some(0.0), None));
    // The same but for rounding: 0.3 is not what 0.1 and 0.2 make.
    let rounded = Estimate::of(&[0.3, 0.1 + 0.2]).ok_or("there are values")?;
    assert!(rounded.standard_error > Some(0.0) && rounded.standard_errors().is_none());
    assert_eq!(Estimate::of(&[]), None);
    Ok(())
}

proptest! {
    #[test]
    fn estimates_move_and_scale_with_their_values(
        values in prop::collection::vec(-100.0_f64..100.0, 2..12),
        scale in 0.1_f64..10.0,
        offset in -50.0_f64..50.0,
    ) {
        let of = |values: &[f64]| {
            let estimate = Estimate::of(values).expect("there are values");
            (estimate.mean, estimate.standard_error.expect("there are two"))
        };
        let moved: Vec<f64> = values.iter().map(|value| scale * value + offset).collect();
        let ((mean, error), (moved_mean, moved_error)) = (of(&values), of(&moved));
        prop_assert!((moved_mean - (scale * mean + offset)).abs() < 1e-9);
        prop_assert!((moved_error - scale * error).abs() < 1e-9);
        // Every value twice: the same spread of more values.
        let (n, twice) = (values.len() as f64, of(&[values.as_slice(), &values].concat()).1);
        prop_assert!((twice * (2.0 * n - 1.0).sqrt() - error * (n - 1.0).sqrt()).abs() < 1e-9);
    }
}

fn axis(name: &str, baseline: Option<&str>, values: &[&str]) -> Axis {
    let value = |name: &&str| AxisValue { name: (*name).to_owned(), set: toml_table() };
    Axis {
        name: name.to_owned(),
        baseline: baseline.map(str::to_owned),
        values: values.iter().map(value).collect(),
    }
}

fn toml_table() -> ddil::compare::matrix::Changes {
    ddil::compare::matrix::Changes::default()
}

fn measurement(frechet: f64) -> Measurement {
    Measurement {
        format_version: 1,
        dataset: "test".to_owned(),
        method: "progressive".to_owned(),
        priors: None,
        thresholding: Thresholding::None,
        guidance_scale: None,
        steps: 4,
        seed: 0,
        updates: 1,
        seconds: 1.0,
        samples: 100,
        extractor: "none".to_owned(),
        frechet: Some(frechet),
        frechet_to_teacher: Some(frechet / 2.0),
        class_agreement: None,
        missing_classes: None,
        kid: None,
        reference_samples: None,
        solver: None,
        input: None,
        standard_errors: None,
        protocol: None,
        prompts: None,
        image_size: None,
        sampling_seed: None,
        clip_score: None,
        diversity: None,
        precision: Some(0.5),
        recall: Some(0.25),
        density: Some(0.75),
        coverage: Some(0.5),
        shift: Vec::new(),
    }
}

fn entry(arm: [&str; 2], seed: u64, steps: u32, frechet: f64) -> Entry {
    let shift = |timestep| ShiftRow { timestep, energy: frechet / 100.0, null: 0.001 };
    let mut measurement = measurement(frechet);
    if steps == 4 {
        measurement.shift = [999, 749, 499, 249].map(shift).to_vec();
    }
    let axes = ["priors", "clip"].iter().zip(arm);
    Entry {
        kind: EntryKind::Cell,
        name: format!("{}_{}_seed{seed}", arm[0], arm[1]),
        axes: axes.map(|(axis, value)| ((*axis).to_owned(), value.to_owned())).collect(),
        seed: Some(seed),
        state: EntryState::Done,
        message: None,
        steps,
        own_steps: steps == 4,
        measurement: Some(measurement),
    }
}

fn reference(kind: EntryKind, name: &str, steps: u32, frechet: f64) -> Entry {
    let (axes, measurement) = (BTreeMap::new(), Some(measurement(frechet)));
    let (name, state) = (name.to_owned(), EntryState::Done);
    Entry {
        kind,
        name,
        axes,
        seed: None,
        state,
        message: None,
        steps,
        own_steps: true,
        measurement,
    }
}

/// Two axes; one arm has lost a seed to divergence, one has a single seed.
fn report() -> ComparisonReport {
    let mut entries = vec![
        reference(EntryKind::Data, "two halves", 0, 0.42),
        reference(EntryKind::Teacher, "teacher, guidance 3", 50, 7.0),
    ];
    for seed in 0..3 {
        for (steps, times) in [(4, 1.0), (8, 0.5), (1, 10.0)] {
            let luck = seed as f64 * 3.0;
            entries.push(entry(["forward", "off"], seed, steps, times * (10.0 + luck)));
            if seed != 1 {
                entries.push(entry(
                    ["mixed", "off"],
                    seed,
                    steps,
                    times * (8.0 + luck + seed as f64),
                ));
            }
            if seed == 0 {
                entries.push(entry(["mixed", "on"], seed, steps, times * 7.0));
            }
        }
    }
    let lost = entry(["mixed", "off"], 1, 4, 0.0);
    let message = Some("step 9: loss is NaN".to_owned());
    entries.push(Entry { state: EntryState::Diverged, measurement: None, message, ..lost });
    let axes = vec![
        axis("priors", Some("forward"), &["forward", "mixed"]),
        axis("clip", Some("off"), &["off", "on"]),
    ];
    ComparisonReport::new("small", axes, entries)
}

#[test]
fn arms_are_grouped_over_seeds() -> TestResult {
    let report = report();
    let arms = report.arms();
    let summaries: Vec<_> = arms
        .iter()
        .map(|arm| (arm.name(), arm.steps, arm.measured.len(), arm.num_diverged))
        .collect();
    let expected = [("forward, off", 3, 0), ("mixed, off", 2, 1), ("mixed, on", 1, 0)]
        .into_iter()
        .flat_map(|(name, n, lost)| [1, 4, 8].map(|steps| (name.to_owned(), steps, n, lost)));
    assert_eq!(summaries, expected.collect::<Vec<_>>());
    let frechet = arms[1].estimate(Metric::Frechet).ok_or("it was measured")?;
    // 10, 13, 16.
    assert_eq!((frechet.mean, frechet.standard_error), (13.0, Some(3.0_f64.sqrt())));
    Ok(())
}

#[test]
fn differences_are_between_cells_that_share_all_else() {
    let report = report();
    let differences = report.differences();
    let summaries: Vec<_> =
        differences.iter().map(|d| (d.axis, d.value, d.others.join(","), d.steps)).collect();
    // Nothing has `forward` with `on`.
    let expected: Vec<_> = [("priors", "mixed", "off"), ("clip", "on", "mixed")]
        .into_iter()
        .flat_map(|(axis, value, other)| [1, 4, 8].map(|n| (axis, value, other.to_owned(), n)))
        .collect();
    assert_eq!(summaries, expected);
    let at_four = &differences[1];
    let (metric, frechet) = at_four.of[0];
    // Of seeds 0 and 2: 8 - 10 and 16 - 16.
    assert_eq!((metric, frechet.n, frechet.mean), (Metric::Frechet, 2, -1.0));
    assert_eq!(frechet.standard_error, Some(1.0));
    let single = differences[4].of[0].1;
    assert_eq!((single.n, single.mean, single.standard_error), (1, -1.0, None));
}

#[test]
fn tables_contain_everything() {
    let report = report();
    let text = report.text();
    for words in [
        "priors",
        "two halves",
        "teacher, guidance 3",
        "13.00 ± 1.73",
        "2, 1 diverged",
        "priors: mixed - forward",
        "-1.00 ± 1.00 (-1.0)",
        "chance",
    ] {
        assert!(text.contains(words), "{words}:\n{text}");
    }
    assert!(text.contains("\nAlso in table.md: precision, density, shift.\n"), "{text}");
    assert_eq!(text.matches("density").count(), 1, "{text}");
    let markdown = report.markdown();
    assert!(markdown.contains("density") && !markdown.contains("table.md"));
    let rows: Vec<&str> = markdown.lines().filter(|line| line.starts_with('|')).collect();
    // Heads and rules of three tables, then rows.
    assert_eq!(rows.len(), 3 * 2 + (2 + 9) + 6 + (3 + 1));
    let columns = |row: &&str| row.matches(" |").count();
    assert!(rows[..13].iter().all(|row| columns(row) == columns(&rows[0])), "{markdown}");
    assert_eq!(table::markdown(&[vec!["a|b".to_owned()]]), "| a\\|b |\n| --- |\n");
}

/// Every element that is opened is closed, in order, and no text is left bare.
fn assert_well_formed(svg: &str) {
    let mut open = Vec::new();
    let mut rest = svg;
    while let Some((text, after)) = rest.split_once('<') {
        assert!(!text.contains('>') && !text.contains('&') || text.contains(';'), "{text}");
        let (tag, after) = after.split_once('>').expect("a tag ends");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name.trim()), "{tag}");
        } else if !tag.ends_with('/') && !tag.starts_with(['?', '!']) {
            open.push(tag.split_whitespace().next().expect("a tag has a name"));
        }
        rest = after;
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
}

#[test]
fn plots_have_a_bar_for_every_mean_of_more_than_one_seed() -> TestResult {
    let report = report();
    let quality = plot::quality(&report)?;
    assert_well_formed(&quality);
    // Two arms of more than one seed, three numbers of steps, three panels; each bar has its mean in its middle.
    assert_eq!(quality.matches("<circle").count(), 2 * 3 * 3);
    for words in
        ["forward, off", "mixed, on", "two halves", "teacher, guidance 3, 50 steps", "steps"]
    {
        assert!(quality.contains(words), "{words}");
    }
    let shift = plot::shift(&report.shifts())?;
    assert_well_formed(&shift);
    assert_eq!(shift.matches("<circle").count(), 2 * 4);
    for words in ["999", "249", "chance", "mixed, off"] {
        assert!(shift.contains(words), "{words}");
    }
    if let Some(folder) = std::env::var_os("DDIL_SHOW_PLOTS").map(std::path::PathBuf::from) {
        std::fs::write(folder.join("quality.svg"), quality)?;
        std::fs::write(folder.join("shift.svg"), shift)?;
        std::fs::write(folder.join("table.txt"), report.text())?;
        std::fs::write(folder.join("table.md"), report.markdown())?;
    }
    Ok(())
}

/// Coverage grows with the number of samples, so that points of different ones make no line.
#[test]
fn coverage_is_plotted_of_one_number_of_samples_alone() -> TestResult {
    let plotted =
        |report: &ComparisonReport| Ok::<_, String>(plot::quality(report)?.contains("Coverage"));
    let mut report = report();
    assert!(plotted(&report)?);
    let own = report.entries.iter_mut().filter(|entry| entry.own_steps);
    own.filter_map(|entry| entry.measurement.as_mut()).for_each(|measured| measured.samples = 500);
    assert!(!plotted(&report)?);
    Ok(())
}

#[test]
fn plots_of_nothing_are_plots() -> TestResult {
    let nothing = ComparisonReport::new("nothing", Vec::new(), Vec::new());
    assert_well_formed(&plot::quality(&nothing)?);
    assert_well_formed(&plot::shift(&nothing.shifts())?);
    assert_eq!(table::summary(&nothing, &[Metric::Frechet]).len(), 1);
    // A metric that is 0 or less has no place on a logarithmic axis, and takes nothing else with it.
    let entries = vec![entry(["a", "b"], 0, 4, 0.0), entry(["a", "b"], 1, 4, -0.1)];
    let report = ComparisonReport::new("zero", vec![axis("priors", None, &["a"])], entries);
    assert_well_formed(&plot::quality(&report)?);
    Ok(())
}
