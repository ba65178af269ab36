//! A run of one weight, and numbers that stop being numbers at every place where they can.

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;

use ddil_core::Conditioning;
use ddil_losses::Phase;
use ddil_pipelines::{Image, Layout};
use ddil_trainer::checkpoint::{Checkpoint, CheckpointWriter, find_latest};
use ddil_trainer::config::TrainConfig;
use ddil_trainer::run_folder::{RunFolder, State, Status};
use ddil_trainer::{
    Error, Evidence, Interrupt, Result, Session, SessionConfig, Spent, Task, UpdateLoss,
};
use serde_json::Value;
use tch::{Kind, Tensor, kind::FLOAT_CPU};

use crate::TestResult;

/// Where the numbers go wrong, at the third update.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Data,
    Loss,
    /// The loss is finite, its gradient is not.
    Gradient,
    /// Loss and gradient are finite, but a network output was not.
    Answer,
    /// All of these are finite, and the update makes a weight infinite.
    Weight,
}

#[derive(Debug)]
struct OneWeight {
    weight: Tensor,
    place: Place,
    /// Rows of the batch, and their length.
    size: [i64; 2],
}

const BAD_STEP: u64 = 2;

impl OneWeight {
    fn new(place: Place, size: [i64; 2]) -> Self {
        let weight = Tensor::ones([1], FLOAT_CPU).set_requires_grad(true);
        Self { weight, place, size }
    }

    fn goes_wrong(&self, step: u64, place: Place) -> bool {
        step == BAD_STEP && self.place == place
    }

    fn data(&self, step: u64) -> Tensor {
        let data = Tensor::ones(self.size, FLOAT_CPU);
        if self.goes_wrong(step, Place::Data) {
            let _ = data.get(1).fill_(f64::NAN);
        }
        data
    }
}

impl Task for OneWeight {
    fn kind(&self) -> &'static str {
        "one weight"
    }

    fn total_updates(&self) -> u64 {
        5
    }

    fn updates_per_stage(&self) -> u64 {
        5
    }

    fn parameters(&self, _phase: Phase) -> Vec<(String, Tensor)> {
        vec![("weight".to_owned(), self.weight.shallow_clone())]
    }

    fn loss(&mut self, step: u64, _phase: Phase) -> Result<UpdateLoss> {
        let output = self.data(step).mean_dim(1, false, Kind::Float) * &self.weight;
        let mut per_sample = output.square();
        if self.goes_wrong(step, Place::Loss) {
            per_sample /= 0.0;
        }
        if self.goes_wrong(step, Place::Gradient) {
            // The root's slope at 0 is infinite.
            per_sample = (output - self.weight.detach()).sqrt();
        }
        let mut outputs = Tensor::from(1.0_f32);
        if self.goes_wrong(step, Place::Answer) {
            outputs /= 0.0;
        }
        Ok(UpdateLoss { per_sample, figures: Vec::new(), outputs_sum: Some(outputs) })
    }

    fn inspect(&mut self, step: u64, _phase: Phase) -> Result<Option<Evidence>> {
        let timesteps = Tensor::arange(self.size[0], (Kind::Int64, tch::Device::Cpu)) * 10;
        let mut evidence = Evidence::of_timesteps(&timesteps)?;
        evidence.check("data", "data.x0", &self.data(step))?;
        evidence.check_conditioning("data", &Conditioning::class_labels(timesteps))?;
        evidence.check_weights("student", &self.parameters(Phase::Student))?;
        Ok(Some(evidence))
    }

    fn after_update(&mut self, step: u64) -> Result<()> {
        if self.goes_wrong(step, Place::Weight) {
            let _no_grad = tch::no_grad_guard();
            let _ = self.weight.fill_(f64::INFINITY);
        }
        Ok(())
    }

    fn start_stage(&mut self, _step: u64, _average: &[(String, Tensor)]) -> Result<()> {
        Ok(())
    }

    fn samples(&mut self, _average: &[(String, Tensor)]) -> Result<Image> {
        let image = Tensor::zeros([1, 1, 2, 2], FLOAT_CPU);
        Ok(Image::grid(&image, Layout::columns(NonZeroU32::MIN))?)
    }

    fn save(&self, _writer: &mut CheckpointWriter) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, _checkpoint: &Checkpoint, _step: u64) -> Result<()> {
        Ok(())
    }

    fn export(&self, folder: &Path, _average: &[(String, Tensor)], _spent: Spent) -> Result<()> {
        fs::create_dir(folder).expect("the run's folder is there");
        Ok(())
    }
}

/// Runs into the bad update; the error, and the weight that was left.
fn run(path: &Path, place: Place, size: [i64; 2]) -> (Error, f64) {
    let mut config = TrainConfig::default();
    config.output.checkpoint_interval = 1;
    let task = OneWeight::new(place, size);
    let folder = RunFolder::create(path, &config).expect("it is new");
    let mut session =
        Session::start(task, SessionConfig::from(&config), folder).expect("it starts");
    let error = session.run(&Interrupt::default()).expect_err("it goes wrong");
    (error, session.task().weight.double_value(&[0]))
}

fn about(path: &Path) -> Value {
    let text = fs::read(path.join("not_finite/step_0000003/batch.json")).expect("it was saved");
    serde_json::from_slice(&text).expect("it is JSON")
}

#[test]
fn every_non_finite_value_stops_the_run_before_the_update() -> TestResult {
    let expected = [
        (Place::Data, "step 3: loss is NaN (not finite: data, timestep 10, in 1 of 4 rows); the"),
        (Place::Loss, "step 3: loss is inf; the batch was saved to"),
        (Place::Gradient, "step 3: gradient norm is inf (in the gradients of 1 of 1 parameters"),
        (Place::Answer, "step 3: the sum of the networks' outputs is inf; the batch"),
    ];
    for (place, words) in expected {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("run");
        let (error, weight) = run(&path, place, [4, 2]);
        assert!(error.to_string().starts_with(words), "{place:?}: {error}");
        // The weight is that of the last good update, and that is what was saved.
        let newest = find_latest(&path.join("checkpoints"))?.checkpoint.ok_or("two were made")?;
        assert_eq!(newest.step(), BAD_STEP);
        let saved = &newest.tensors("parameters.safetensors")?[0].1;
        assert_eq!(saved.double_value(&[0]), weight, "{place:?}");
        let status = Status::from_folder(&path)?;
        assert_eq!((status.state, status.step), (State::Failed, BAD_STEP));
        assert_eq!(about(&path)["num_rows"], 4);
    }
    Ok(())
}

#[test]
fn no_checkpoint_is_written_of_non_finite_weights() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    let (error, _) = run(&path, Place::Weight, [4, 2]);
    let words = "step 3: the sum of `weight`, a parameter of the student, is inf (1 of 1 are not";
    assert!(error.to_string().starts_with(words), "{error}");
    let newest = find_latest(&path.join("checkpoints"))?.checkpoint.ok_or("two were made")?;
    assert_eq!(newest.step(), BAD_STEP);
    assert!(matches!(error, Error::NonFinite { saved: None, .. }));
    Ok(())
}

#[test]
fn the_batch_is_kept_within_its_bound_with_the_bad_rows_first() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    // A MiB of data a row, and a label.
    run(&path, Place::Data, [80, 1 << 18]);
    let about = about(&path);
    assert_eq!(about["num_rows"], 80);
    assert_eq!(about["rows"].as_array().map(Vec::len), Some(63));
    assert_eq!(about["rows"][0], 1, "the row in which something was found comes first");
    assert_eq!(about["findings"][0]["rows"], serde_json::json!([1]));
    let file = path.join("not_finite/step_0000003/batch.safetensors");
    let length = fs::metadata(&file)?.len();
    assert!(length <= (64 << 20) + 4096 && length > 60 << 20, "{length}");
    let checkpoint = Checkpoint::open(file.parent().ok_or("it has one")?)?;
    let data = &checkpoint.tensors("batch.safetensors")?[1];
    assert_eq!(data.0, "data.x0");
    let [first, second] = [0, 1].map(|row| data.1.double_value(&[row, 0]));
    assert!(first.is_nan() && second == 1.0, "{first}, {second}");
    Ok(())
}

/// Only the newest is kept, also if a run resumes from before it.
#[test]
fn one_batch_is_kept() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    run(&path, Place::Loss, [4, 2]);
    let task = OneWeight::new(Place::Loss, [4, 2]);
    let config = SessionConfig::from(&TrainConfig::default());
    for step in [1, 7] {
        let old = path.join(format!("not_finite/step_{step:07}"));
        fs::create_dir(old)?;
    }
    let mut session = Session::resume(task, config, RunFolder::resume(&path)?)?;
    session.run(&Interrupt::default()).expect_err("it goes wrong again");
    let left: Vec<_> = fs::read_dir(path.join("not_finite"))?.collect::<std::io::Result<_>>()?;
    let mut left: Vec<_> = left.iter().map(std::fs::DirEntry::file_name).collect();
    left.sort();
    assert_eq!(left, ["latest", "step_0000003"]);
    Ok(())
}
