//! A workshop to run the program in.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ddil_models::{
    DownBlockType, Model, NetworkConfig, NetworkDenoiser, Placement, UNet2DConfig, UpBlockType,
};
use ddil_pipelines::{Card, Pipeline, Scheduler};
use ddil_schedulers::{NoiseScheduleConfig, PredictionType, SamplerConfig, Thresholding};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) type TestResult = Result<(), Box<dyn std::error::Error>>;

/// Nothing here takes longer, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Updates of a run, in all, and between two checkpoints.
pub(crate) const UPDATES: u64 = 12;
pub(crate) const CHECKPOINT_INTERVAL: u64 = 3;

/// A temporary folder with data, a teacher and configs.
pub(crate) struct Workshop {
    folder: TempDir,
}

impl Workshop {
    /// Three classes of eight grey 8x8 images, and configs for both verbs.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("there is room for a temporary folder");
        let workshop = Self { folder };
        write_pictures(&workshop.path("data"), 3, 8);
        fs::write(workshop.path("train.toml"), workshop.train_config()).expect("it is writable");
        fs::write(workshop.path("distill.toml"), workshop.distill_config()).expect("so is this");
        workshop
    }

    /// The same with a teacher that has the data's classes and a null class.
    pub(crate) fn with_teacher() -> Self {
        let workshop = Self::new();
        workshop.write_teacher("teacher", Some(3));
        workshop
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder of the run of that name.
    pub(crate) fn run(&self, name: &str) -> PathBuf {
        self.path("runs").join(name)
    }

    /// The program, about to run in the workshop.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ddil"));
        self.prepare(command.args(arguments));
        command
    }

    fn prepare(&self, command: &mut Command) {
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command.env_remove("DDIL_DATA").env_remove("DDIL_CACHE").env_remove("RUST_LOG");
    }

    /// The same, where no file can grow beyond this many blocks of 512 bytes (or twice that, depending on the shell).
    pub(crate) fn command_with_file_limit(&self, blocks: u32, arguments: &[&str]) -> Command {
        let script = format!("trap '' XFSZ; ulimit -f {blocks} && exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_ddil")]).args(arguments);
        self.prepare(&mut command);
        command
    }

    /// Runs the program to its end.
    pub(crate) fn ddil(&self, arguments: &[&str]) -> Ended {
        Ended::of(self.command(arguments).output().expect("the program is there"))
    }

    /// Starts it in the background.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(arguments);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Running { child: Some(child.expect("the program is there")) }
    }

    /// Runs a verb's config under a name to the end, which must be a good one.
    pub(crate) fn complete(&self, verb: &str, name: &str, settings: &[&str]) -> PathBuf {
        self.ddil(&arguments(verb, name, settings)).succeeded();
        self.run(name)
    }

    /// A copy of a run in its state right after one of its checkpoints, as far as a resume depends on it.
    pub(crate) fn rewound(&self, run: &Path, name: &str, step: u64) -> PathBuf {
        let copy = self.run(name);
        copy_folder(run, &copy);
        let _ = fs::remove_dir_all(copy.join("export"));
        for (found, path) in checkpoints(&copy) {
            if found > step {
                fs::remove_dir_all(path).expect("it was just written");
            }
        }
        copy
    }

    /// Writes a model folder with fresh weights.
    pub(crate) fn write_teacher(&self, name: &str, null_class: Option<i64>) -> PathBuf {
        let config = UNet2DConfig {
            sample_size: None,
            in_channels: 1,
            out_channels: 1,
            down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
            up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
            block_out_channels: vec![8, 16],
            layers_per_block: 1,
            norm_num_groups: 4,
            num_class_embeds: Some(4),
            ..UNet2DConfig::default()
        };
        let unet = config.build(Placement::default(), 5).expect("the config is valid");
        let schedule = NoiseScheduleConfig::default().build().expect("the default is valid");
        let network =
            NetworkDenoiser::new(Model::UNet2D(unet), PredictionType::VPrediction, schedule)
                .expect("the prediction type is defined");
        let card = Card {
            method: "teacher".to_owned(),
            class_names: ["class0", "class1", "class2"].map(str::to_owned).to_vec(),
            null_class,
            image_shape: [1, 8, 8],
            ..Card::default()
        };
        let folder = self.path(name);
        let sampler = SamplerConfig::Ddim { eta: 0.0 };
        let scheduler = Scheduler::new(&network, sampler, &Thresholding::clamp_pixels(), None)
            .expect("diffusers knows it");
        Pipeline::write(&folder, &network, &scheduler, &card, None)
            .expect("the folder is writable");
        folder
    }

    fn train_config(&self) -> String {
        format!(
            "{}\n{MODEL}\n[train]\nupdates = {UPDATES}\nsample_steps = 2\n\n{OUTPUT}",
            self.common()
        )
    }

    /// One stage of 4 steps, guided, with chains.
    fn distill_config(&self) -> String {
        format!("{}\n{DISTILLATION}\n{OUTPUT}", self.common())
    }

    fn common(&self) -> String {
        let [runs, data] = ["runs", "data"].map(|name| self.path(name).display().to_string());
        format!(
            "[run]\nfolder = {runs:?}\nseed = 3\nthreads = 1\n\n[data]\nkind = \"image_folder\"\npath = {data:?}\n\
             batch_size = 4\nhorizontal_flip = true\n"
        )
    }
}

const MODEL: &str = r#"[model]
in_channels = 1
out_channels = 1
block_out_channels = [8, 16]
layers_per_block = 1
norm_num_groups = 4
down_block_types = ["DownBlock2D", "AttnDownBlock2D"]
up_block_types = ["AttnUpBlock2D", "UpBlock2D"]
num_class_embeds = 4
dropout = 0.1
"#;

const DISTILLATION: &str = r#"[teacher]
path = "teacher"
guidance = { kind = "cfg", scale = 2.0 }

[student]
stages = [4]
updates_per_stage = 12

[objective]
method = "progressive"
substeps = 2

[thresholding]
kind = "clamp"
low = -1.0
high = 1.0

[mixing.priors]
kind = "linear"
from = { forward = 1.0 }
to = { forward = 0.25, student = 0.5, teacher = 0.25 }
start = 0.0
end = 0.5

[mixing.student]
policy = { kind = "chain", refresh_fraction = 0.25 }

[mixing.teacher]
pool = 8
"#;

const OUTPUT: &str = r#"[learning_rate]
peak = 0.001
warmup_steps = 2
decay = "cosine"

[ema]
decay = 0.9

[output]
log_interval = 1
sample_interval = 0
checkpoint_interval = 3
samples_per_class = 1
checkpoints = { keep_last = 100 }
"#;

/// `<verb> <verb>.toml --set run.name=<name> --set ..`.
pub(crate) fn arguments<'a>(verb: &'a str, name: &'a str, settings: &[&'a str]) -> Vec<&'a str> {
    let config = if verb == "train" { "train.toml" } else { "distill.toml" };
    // The names of tests' runs are few, and the command line needs each as one word.
    let name: &'static str = format!("run.name={name}").leak();
    let mut arguments = vec![verb, config, "--set", name];
    for setting in settings {
        arguments.extend(["--set", *setting]);
    }
    arguments
}

/// The seed of a test: `DDIL_SEED`, or a fixed number; printed, because a failing test shows its output.
pub(crate) fn seed(own: u64) -> u64 {
    let given = std::env::var("DDIL_SEED").ok();
    let seed = given.map_or(own, |seed| seed.parse().expect("DDIL_SEED is a number"));
    println!("DDIL_SEED={seed}");
    seed
}

/// The program's exit code and output.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// It was refused with a message, without a panic or a C++ backtrace, and the message contains these words.
    #[track_caller]
    pub(crate) fn refused(self, words: &[&str]) -> Self {
        assert!(self.code.is_some_and(|code| code != 0), "it did not refuse: {self:?}");
        let (_, error) = self.stderr.split_once("error: ").unwrap_or_default();
        for word in words {
            assert!(error.contains(word), "`{word}` is not said in: {}", self.stderr);
        }
        for noise in ["panicked", "Exception raised from", "RUST_BACKTRACE"] {
            assert!(!self.stderr.contains(noise), "{}", self.stderr);
        }
        self
    }
}

/// The program at work; killed if the test ends first.
pub(crate) struct Running {
    child: Option<Child>,
}

impl Running {
    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Waits until a condition holds; false if the program ended before.
    pub(crate) fn wait_until(&mut self, holds: impl Fn() -> bool) -> bool {
        let started = Instant::now();
        while !holds() {
            assert!(started.elapsed() < PATIENCE, "the program does not get on");
            let child = self.child.as_mut().expect("it has not been waited for");
            if child.try_wait().expect("it is our child").is_some() {
                return holds();
            }
            sleep(Duration::from_millis(1));
        }
        true
    }

    /// Whether it has come to an end.
    pub(crate) fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut().expect("it has not been waited for");
        child.try_wait().expect("it is our child").is_some()
    }

    /// Waits for the end, however long that takes.
    pub(crate) fn ended(mut self) -> Ended {
        let child = self.child.take().expect("it has not been waited for");
        Ended::of(child.wait_with_output().expect("it is our child"))
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) -> Ended {
        let mut child = self.child.take().expect("it has not been waited for");
        let _ = child.kill();
        Ended::of(child.wait_with_output().expect("it is our child"))
    }

    /// Sends a signal, `INT` or `TERM`, and waits for the end.
    pub(crate) fn signal(mut self, signal: &str) -> Ended {
        let child = self.child.take().expect("it has not been waited for");
        let command = format!("kill -{signal} {}", child.id());
        let sent = Command::new("sh").args(["-c", &command]).status();
        assert!(sent.expect("there is a shell").success());
        Ended::of(child.wait_with_output().expect("it is our child"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Images of stripes that differ from class to class, `<folder>/class0/00.png` and so on.
pub(crate) fn write_pictures(folder: &Path, classes: u32, side: u32) {
    for class in 0..classes {
        let class_folder = folder.join(format!("class{class}"));
        fs::create_dir_all(&class_folder).expect("it is writable");
        for number in 0..8 {
            let pixel =
                |at: u32| (at % side * (class + 1) * 29 + at / side * 7 + number * 11) as u8;
            let pixels: Vec<u8> = (0..side * side).map(pixel).collect();
            write_png(&class_folder.join(format!("{number:02}.png")), side, &pixels);
        }
    }
}

fn write_png(path: &Path, side: u32, pixels: &[u8]) {
    let file = fs::File::create(path).expect("it is writable");
    let mut encoder = png::Encoder::new(file, side, side);
    encoder.set_color(png::ColorType::Grayscale);
    let mut writer = encoder.write_header().expect("the header is valid");
    writer.write_image_data(pixels).expect("there are as many pixels");
}

/// Lines of the run's metrics so far.
pub(crate) fn num_lines(run: &Path) -> usize {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.matches('\n').count()
}

/// `status.json`.
pub(crate) fn status(run: &Path) -> Value {
    json(&run.join("status.json"))
}

pub(crate) fn json(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).expect("the program wrote it")
}

/// Steps and folders of the checkpoints, oldest first.
pub(crate) fn checkpoints(run: &Path) -> BTreeMap<u64, PathBuf> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return BTreeMap::new() };
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step_")?.parse().ok();
    entries
        .map(|entry| entry.expect("it is readable").path())
        .filter_map(|path| Some((step(&path)?, path)))
        .collect()
}

/// Every file below a folder but the lock, by its path from there.
pub(crate) fn snapshot(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    collect(folder, folder, &mut files);
    files
}

fn collect(root: &Path, folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).expect("it is readable") {
        let path = entry.expect("it is readable").path();
        if path.is_dir() {
            collect(root, &path, files);
        } else if path.file_name() != Some(OsStr::new(".lock")) {
            let name = path.strip_prefix(root).expect("it is below").to_owned();
            files.insert(name, fs::read(&path).expect("it is readable"));
        }
    }
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    for (name, bytes) in snapshot(from) {
        let path = to.join(name);
        fs::create_dir_all(path.parent().expect("it has one")).expect("it is writable");
        fs::write(path, bytes).expect("it is writable");
    }
}

/// The two runs ended on the same bits, and neither left anything half done.
#[track_caller]
pub(crate) fn assert_same_end(left: &Path, right: &Path) {
    let ends = [left, right].map(end_of);
    let names = |end: &BTreeMap<String, Vec<u8>>| end.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ends[0]), names(&ends[1]));
    for (name, bytes) in &ends[0] {
        assert!(bytes == &ends[1][name], "{name} differs in {}", right.display());
    }
}

/// The result of a run: the export, the last checkpoint, metrics and the last grid, without times.
fn end_of(run: &Path) -> BTreeMap<String, Vec<u8>> {
    assert_eq!(status(run)["state"], "completed", "{}", run.display());
    let last = checkpoints(run).into_values().next_back().expect("it was saved");
    let mut end = BTreeMap::new();
    for (part, folder) in [("export", run.join("export")), ("checkpoint", last)] {
        for (name, bytes) in snapshot(&folder) {
            let name = name.display().to_string();
            end.insert(format!("{part}/{name}"), without_times(&name, bytes));
        }
    }
    for (name, bytes) in snapshot(run) {
        let name = name.display().to_string();
        let left = [".tmp-", ".old-", ".export-"].iter().any(|part| name.contains(part));
        assert!(!left, "{name} was left behind");
        if name == "metrics.jsonl" || name.starts_with("samples/") {
            end.insert(name, bytes);
        }
    }
    end
}

fn without_times(name: &str, bytes: Vec<u8>) -> Vec<u8> {
    if !["ddil.json", "session.json", "manifest.json"].contains(&name) {
        return bytes;
    }
    let mut value: Value = serde_json::from_slice(&bytes).expect("the program wrote it");
    let fields = value.as_object_mut().expect("it is an object");
    fields.remove("seconds");
    // From the manifest, the entries of the files that contain no times.
    fields.retain(|key, _| name != "manifest.json" || ["step", "kind"].contains(&key.as_str()));
    value.to_string().into_bytes()
}
