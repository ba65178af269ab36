//! Evaluation during a run: when it happens, what it records, which checkpoint it keeps, and how it is stopped.

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;

use ddil_evaluate::{Metric, Scores};
use ddil_losses::Phase;
use ddil_metrics::{RawPixels, Reference};
use ddil_pipelines::{Image, Layout};
use ddil_trainer::checkpoint::{Checkpoint, CheckpointWriter, best_of, list};
use ddil_trainer::config::TrainConfig;
use ddil_trainer::record::read_lines;
use ddil_trainer::run_folder::RunFolder;
use ddil_trainer::{
    Error, Interrupt, Outcome, Result, Session, SessionConfig, Spent, Task, UpdateLoss,
};
use serde_json::Value;
use tch::{Kind, Tensor, kind::FLOAT_CPU};

use crate::TestResult;

/// A task whose distance is known in advance: 5, 2, 3, 2 after updates 2, 4, 6, 7.
#[derive(Debug)]
struct Known {
    weight: Tensor,
    updates: u64,
    /// The update during whose evaluation a stop is requested.
    stop_at: Option<u64>,
}

const DISTANCES: [(u64, f64); 4] = [(2, 5.0), (4, 2.0), (6, 3.0), (7, 2.0)];

impl Known {
    fn new(stop_at: Option<u64>) -> Self {
        let weight = Tensor::ones([1], FLOAT_CPU).set_requires_grad(true);
        Self { weight, updates: 0, stop_at }
    }
}

/// Scores against features whose mean is `distance.sqrt()` away: the Fréchet distance of equal covariances.
fn scores(distance: f64) -> Scores {
    let features = Tensor::linspace(0.0, 1.0, 12, (Kind::Double, tch::Device::Cpu)).view([12, 1]);
    let extractor = RawPixels::new([1, 1, 1]);
    let reference = Reference::new("known", &features, &extractor).expect("twelve samples");
    ddil_evaluate::score(&reference, &(features + distance.sqrt())).expect("as many")
}

impl Task for Known {
    fn kind(&self) -> &'static str {
        "known"
    }

    fn total_updates(&self) -> u64 {
        7
    }

    fn updates_per_stage(&self) -> u64 {
        7
    }

    fn parameters(&self, _phase: Phase) -> Vec<(String, Tensor)> {
        vec![("weight".to_owned(), self.weight.shallow_clone())]
    }

    fn loss(&mut self, _step: u64, _phase: Phase) -> Result<UpdateLoss> {
        let per_sample = Tensor::ones([4], FLOAT_CPU) * &self.weight;
        Ok(UpdateLoss { per_sample, figures: Vec::new(), outputs_sum: None })
    }

    fn after_update(&mut self, step: u64) -> Result<()> {
        self.updates = step + 1;
        Ok(())
    }

    fn start_stage(&mut self, _step: u64, _average: &[(String, Tensor)]) -> Result<()> {
        Ok(())
    }

    fn samples(&mut self, _average: &[(String, Tensor)]) -> Result<Image> {
        let image = Tensor::zeros([1, 1, 2, 2], FLOAT_CPU);
        Ok(Image::grid(&image, Layout::columns(NonZeroU32::MIN))?)
    }

    fn evaluate(
        &mut self,
        _average: &[(String, Tensor)],
        interrupt: &Interrupt,
    ) -> Result<Option<Scores>> {
        if self.stop_at == Some(self.updates) {
            interrupt.request();
            return Ok(None);
        }
        let known = DISTANCES.iter().find(|(step, _)| *step == self.updates);
        Ok(known.map(|(_, distance)| scores(*distance)))
    }

    fn save(&self, _writer: &mut CheckpointWriter) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, _checkpoint: &Checkpoint, step: u64) -> Result<()> {
        self.updates = step;
        Ok(())
    }

    fn export(&self, folder: &Path, _average: &[(String, Tensor)], spent: Spent) -> Result<()> {
        fs::create_dir(folder).expect("the run's folder is there");
        fs::write(folder.join("updates"), spent.updates.to_string()).expect("so is this");
        Ok(())
    }
}

fn config(metric: Option<Metric>) -> TrainConfig {
    let mut config = TrainConfig::default();
    config.evaluate.interval = 2;
    config.output.log_interval = 3;
    config.output.checkpoint_interval = 3;
    config.output.checkpoints.keep_last = NonZeroU32::MIN;
    config.output.checkpoints.keep_best = metric;
    config
}

/// Runs to the end, in as many sessions as that takes, and returns their number.
fn run(path: &Path, config: &TrainConfig, stop_at: Option<u64>) -> Result<u32> {
    let folder = RunFolder::create(path, config)?;
    let mut session = Session::start(Known::new(stop_at), SessionConfig::from(config), folder)?;
    let mut sessions = 1;
    while let Outcome::Interrupted { .. } = session.run(&Interrupt::default())? {
        drop(session);
        let folder = RunFolder::resume(path)?;
        session = Session::resume(Known::new(None), SessionConfig::from(config), folder)?;
        sessions += 1;
    }
    Ok(sessions)
}

fn steps_of(path: &Path) -> Vec<String> {
    let folders = list(&path.join("checkpoints")).expect("a folder");
    folders.iter().map(|path| path.file_name().expect("named").display().to_string()).collect()
}

#[test]
fn evaluations_are_recorded_and_the_best_checkpoint_is_kept() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    run(&path, &config(Some(Metric::Frechet)), None)?;
    let lines: Vec<Value> = read_lines(&path.join("metrics.jsonl"))?;
    let of = |step: u64| lines.iter().find(|line| line["step"] == step).expect("a line");
    for (step, distance) in DISTANCES {
        let line = of(step);
        let found = line["eval_frechet"].as_f64().ok_or("a number")?;
        assert!((found - distance).abs() < 1e-9, "{line}");
        for name in ["kid", "precision", "recall", "density", "coverage"] {
            assert!(line[format!("eval_{name}")].is_f64(), "{name}: {line}");
        }
        // A step that is logged too has one line with both.
        assert_eq!(line.get("loss").is_some(), step == 6 || step == 7, "{line}");
    }
    assert_eq!(lines.iter().map(|line| &line["step"]).collect::<Vec<_>>(), [2, 3, 4, 6, 7]);
    // The best is that of update 4, the first of two equal ones: a checkpoint though none was due, and its model.
    assert_eq!(steps_of(&path), ["step_0000004", "step_0000007"]);
    assert_eq!(best_of(&path.join("checkpoints")), Some(4));
    assert_eq!(fs::read_to_string(path.join("best/updates"))?, "4");
    assert_eq!(fs::read_to_string(path.join("export/updates"))?, "7");
    Ok(())
}

#[test]
fn the_largest_recall_is_the_best() -> TestResult {
    assert!(Metric::Recall.is_better(0.4, 0.3) && !Metric::Recall.is_better(0.3, 0.3));
    assert!(Metric::Kid.is_better(-0.1, 0.0) && !Metric::Kid.is_better(f64::NAN, 0.0));
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    run(&path, &config(Some(Metric::Coverage)), None)?;
    let lines: Vec<Value> = read_lines(&path.join("metrics.jsonl"))?;
    let coverage = |line: &Value| line["eval_coverage"].as_f64();
    let best = lines.iter().filter_map(coverage).fold(0.0, f64::max);
    let step = lines.iter().find(|line| coverage(line) == Some(best)).ok_or("one is the best")?;
    assert_eq!(best_of(&path.join("checkpoints")), step["step"].as_u64());
    Ok(())
}

#[test]
fn without_keep_best_nothing_more_is_kept() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    run(&path, &config(None), None)?;
    assert_eq!(steps_of(&path), ["step_0000007"]);
    assert!(!path.join("best").exists() && !path.join("checkpoints/best").exists());
    Ok(())
}

/// A stop during an evaluation saves the update; the next session begins with that evaluation.
#[test]
fn an_evaluation_that_was_stopped_is_repeated_first() -> TestResult {
    let folder = tempfile::tempdir()?;
    let config = config(Some(Metric::Frechet));
    let whole = folder.path().join("whole");
    assert_eq!(run(&whole, &config, None)?, 1);
    for step in [2, 4, 6, 7] {
        let path = folder.path().join(format!("stopped_at_{step}"));
        assert_eq!(run(&path, &config, Some(step))?, 2, "{step}");
        let read = |path: &Path| fs::read_to_string(path.join("metrics.jsonl"));
        assert_eq!(read(&path)?, read(&whole)?, "{step}");
        assert_eq!(best_of(&path.join("checkpoints")), Some(4));
        assert_eq!(steps_of(&path), steps_of(&whole), "{step}");
        assert_eq!(fs::read_to_string(path.join("best/updates"))?, "4");
    }
    Ok(())
}

/// Killed between the checkpoint of the best evaluation and its model.
#[test]
fn a_best_model_that_is_missing_is_written_when_the_run_resumes() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    let config = config(Some(Metric::Frechet));
    run(&path, &config, None)?;
    fs::remove_dir_all(path.join("checkpoints/step_0000007"))?;
    fs::write(path.join("checkpoints/best"), "step_0000002\n")?;
    fs::rename(path.join("best"), path.join(".best-new"))?;
    let resumed = RunFolder::resume(&path)?;
    let session = Session::resume(Known::new(None), SessionConfig::from(&config), resumed)?;
    assert_eq!(session.step(), 4);
    assert_eq!(best_of(&path.join("checkpoints")), Some(4));
    assert_eq!(fs::read_to_string(path.join("best/updates"))?, "4");
    assert!(!path.join(".best-new").exists());
    Ok(())
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let refused = |change: fn(&mut TrainConfig), words: &[&str]| {
        let mut config = TrainConfig::default();
        change(&mut config);
        let error = config.ensure().expect_err("it is refused");
        assert!(matches!(&error, Error::Invalid(_)), "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "`{word}`: {error}");
        }
    };
    refused(
        |config| config.output.checkpoints.keep_best = Some(Metric::Kid),
        &["output.checkpoints.keep_best", "evaluate.interval = 0"],
    );
    refused(
        |config| (config.evaluate.interval, config.evaluate.samples) = (1, 9),
        &["evaluate.samples", "9", "at least 10"],
    );
    refused(
        |config| (config.evaluate.interval, config.evaluate.steps) = (1, Some(0)),
        &["evaluate.steps", "at least 1"],
    );
    refused(
        |config| {
            config.evaluate.interval = 1;
            config.data.kind = ddil_trainer::config::DataKind::ImageFolder;
            config.data.path = Some("data".into());
        },
        &["evaluate.extractor", "fashion_classifier", "not Fashion-MNIST"],
    );
}
