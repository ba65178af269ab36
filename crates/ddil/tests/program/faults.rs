//! The process dies, or the disk fails, wherever a run writes; resumed, the run ends on the bits of one that was spared.
//!
//! The points are those of `ddil_files::fault`, in debug builds only. A trace of a run shows the points and files that
//! it passes, so that a new file is covered without being listed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::fault::POINTS;
use ddil_trainer::checkpoint::{find_latest, folder_of};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::methods::{Method, soaked};
use crate::support::{Ended, Workshop, assert_same_end, seed, snapshot, status};

/// Updates of a run: more than the faults of one pass can interrupt.
const UPDATES: u64 = 60;
const SETTINGS: [&str; 2] = ["output.checkpoints={ keep_last = 2 }", "output.sample_interval=6"];

/// A point that a run passes, with the file that it is about.
#[derive(Clone, Debug)]
struct Place {
    point: String,
    file: String,
    /// How often two sessions of a run passed it.
    times: usize,
}

impl Place {
    /// Whether a run fails if the disk fails there. It does not depend on its report, which has a test of its own.
    fn is_needed(&self) -> bool {
        self.file != "report.html"
    }

    /// A place that is passed often is passed twice in every session.
    fn nth(&self, rng: &mut StdRng) -> u32 {
        if self.times >= 8 { rng.random_range(1..=2) } else { 1 }
    }
}

/// A fault, as given to the program.
#[derive(Clone, Debug)]
struct Fault {
    point: String,
    file: String,
    effect: &'static str,
    /// At which time; a run writes its status when it starts and again when it saves.
    nth: u32,
    /// Whether the run is stopped at its first checkpoint, so that it writes the same one again.
    stops: bool,
}

impl Fault {
    fn new(place: &Place, effect: &'static str, rng: &mut StdRng) -> Self {
        let Place { point, file, .. } = place.clone();
        let stops = ["checkpoint.make_room", "checkpoint.clear"].contains(&point.as_str());
        Self { point, file, effect, nth: place.nth(rng), stops }
    }

    /// The new checkpoint of the same step does not get its name.
    fn while_replacing(effect: &'static str) -> Self {
        let (point, file) = ("checkpoint.rename".to_owned(), "step_#".to_owned());
        Self { point, file, effect, nth: 2, stops: true }
    }

    fn is_kill(&self) -> bool {
        ["kill", "torn"].contains(&self.effect)
    }

    fn variable(&self) -> String {
        let Self { point, file, effect, nth, stops } = self;
        let stop = if *stops { "file.rename@latest:term:1," } else { "" };
        format!("{stop}{point}@{file}:{effect}:{nth}")
    }
}

/// One run after another under fire, each resumed until it gets through.
struct Walk<'a> {
    workshop: &'a Workshop,
    method: &'a Method,
    whole: PathBuf,
    /// Runs so far.
    runs: usize,
    resumes: usize,
}

impl<'a> Walk<'a> {
    fn new(workshop: &'a Workshop, method: &'a Method) -> Self {
        let mut pass = Self { workshop, method, whole: workshop.run("whole"), runs: 0, resumes: 0 };
        pass.ddil(&method.arguments("whole", UPDATES, &SETTINGS), &[]).succeeded();
        pass
    }

    fn ddil(&mut self, arguments: &[String], environment: &[(&str, &str)]) -> Ended {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = self.workshop.command(&arguments);
        self.resumes += usize::from(arguments.contains(&"--resume"));
        command.envs(environment.iter().copied());
        Ended::of(command.output().expect("the program is there"))
    }

    fn run(&self) -> PathBuf {
        self.workshop.run(&format!("hurt_{}", self.runs))
    }

    /// The run from its start, or from where it stopped.
    fn go(&mut self, environment: &[(&str, &str)]) -> Ended {
        let run = self.run();
        let arguments = if run.join("config.toml").exists() {
            [self.method.verb, "--resume", &run.display().to_string()].map(str::to_owned).to_vec()
        } else {
            self.method.arguments(&format!("hurt_{}", self.runs), UPDATES, &SETTINGS)
        };
        self.ddil(&arguments, environment)
    }

    /// Every point that a run passes, with the file, in the order in which they are first passed.
    fn trace(&mut self) -> Vec<Place> {
        let path = self.workshop.path("trace");
        let name = path.display().to_string();
        // Stopped while it saves, so that the checkpoint of that step is replaced.
        let stop =
            [("DDIL_FAULT_TRACE", name.as_str()), ("DDIL_FAULT", "file.rename@latest:term:2")];
        self.go(&stop).succeeded();
        assert_eq!(status(&self.run())["state"], "interrupted");
        self.go(&stop[..1]).succeeded();
        self.compare();
        let text = fs::read_to_string(path).expect("the program wrote it");
        let mut passed: Vec<Place> = Vec::new();
        for line in text.lines() {
            let (point, file) = line.split_once(' ').expect("a point and a file");
            let known = passed.iter_mut().find(|place| place.point == point && place.file == file);
            if let Some(place) = known {
                place.times += 1;
            } else {
                let (point, file) = (point.to_owned(), file.to_owned());
                passed.push(Place { point, file, times: 1 });
            }
        }
        passed
    }

    /// The run got through: it must have ended as the one that was spared.
    fn compare(&mut self) {
        assert_same_end(&self.whole, &self.run());
        fs::remove_dir_all(self.run()).expect("it is ours");
        self.runs += 1;
    }

    /// Causes a fault, and checks the files that it leaves.
    fn strike(&mut self, fault: &Fault) {
        // On the run as it is; on a new one, because some places are passed only at the start; on a stopped one,
        // because some are passed only on resuming.
        for attempt in 0..3 {
            let run = self.run();
            if attempt == 2 {
                self.go(&[("DDIL_FAULT", "file.rename@latest:term:1")]).succeeded();
            }
            let before = Saved::of(&run);
            let ended = self.go(&[("DDIL_FAULT", &fault.variable())]);
            if ended.code == Some(0) {
                // The run got through, or was stopped, before it came to that.
                if status(&run)["state"] == "completed" {
                    self.compare();
                }
                continue;
            }
            if fault.is_kill() {
                assert_eq!(ended.code, None, "{fault:?}: {}", ended.stderr);
            } else {
                assert_refused(fault, &ended, &run);
            }
            before.assert_kept(&run, fault);
            return;
        }
        panic!("{fault:?} was never reached");
    }

    /// Lets the run under fire go to its end.
    fn finish(&mut self) {
        self.go(&[]).succeeded();
        self.compare();
    }
}

/// It reported the failed operation, and never success.
fn assert_refused(fault: &Fault, ended: &Ended, run: &Path) {
    assert_eq!(ended.code, Some(1), "{fault:?}: {ended:?}");
    ended.clone().refused(&["could not"]);
    let said = ["done: the model is in", "saved at step"];
    assert!(!said.iter().any(|words| ended.stdout.contains(words)), "{fault:?}: {}", ended.stdout);
    if run.join("status.json").exists() {
        let state = status(run)["state"].as_str().map(str::to_owned);
        assert!(
            matches!(state.as_deref(), Some("running" | "failed")),
            "{fault:?} ends with {state:?}"
        );
    }
}

/// The checkpoints of a run.
struct Saved {
    newest: Option<u64>,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Saved {
    fn of(run: &Path) -> Self {
        let checkpoints = run.join("checkpoints");
        let found = find_latest(&checkpoints).expect("the folder can be listed");
        let newest = found.checkpoint.map(|checkpoint| checkpoint.step());
        let files = newest.map(|step| snapshot(&folder_of(&checkpoints, step))).unwrap_or_default();
        Self { newest, files }
    }

    /// The newest checkpoint of before, or a newer one, exists and is intact, and no folder looks like a checkpoint
    /// without being one.
    fn assert_kept(&self, run: &Path, fault: &Fault) {
        let checkpoints = run.join("checkpoints");
        let found = find_latest(&checkpoints).expect("the folder can be listed");
        assert!(found.damaged.is_empty(), "{fault:?}: {:?}", found.damaged);
        let newest = found.checkpoint.map(|checkpoint| checkpoint.step());
        assert!(newest >= self.newest, "{fault:?}: {newest:?} after {:?}", self.newest);
        if let Some(step) = self.newest.filter(|_| newest == self.newest) {
            let same = snapshot(&folder_of(&checkpoints, step)) == self.files;
            assert!(same, "{fault:?} changed the last good checkpoint");
        }
    }
}

/// Of each point one file, chosen by the seed.
fn one_of_each(passed: &[Place], rng: &mut StdRng) -> Vec<Place> {
    let mut chosen: Vec<usize> = POINTS
        .iter()
        .map(|point| {
            let of_point = (0..passed.len()).filter(|at| passed[*at].point == *point);
            let places: Vec<usize> = of_point.collect();
            assert!(!places.is_empty(), "no run passes {point}");
            places[rng.random_range(0..places.len())]
        })
        .collect();
    // In the order of a run, whose beginning is passed but once.
    chosen.sort_unstable();
    chosen.into_iter().map(|at| passed[at].clone()).collect()
}

fn takes_bytes(point: &str) -> bool {
    ["lock.write", "file.write", "member.write", "record.write", "events.write"].contains(&point)
}

/// The effects that a disk can have at a point.
fn sicknesses(point: &str) -> Vec<&'static str> {
    let mut effects = vec!["io", "read_only"];
    if [".create", ".write", ".flush"].iter().any(|end| point.ends_with(end)) {
        effects.push("full");
    }
    if takes_bytes(point) {
        effects.push("short");
    }
    effects
}

#[test]
fn a_kill_at_any_point_changes_no_result() {
    let (mut rng, method) = (StdRng::seed_from_u64(seed(1)), Method::named("progressive"));
    let workshop = method.workshop();
    let mut pass = Walk::new(&workshop, method);
    let passed = pass.trace();
    for place in one_of_each(&passed, &mut rng) {
        let effect = if takes_bytes(&place.point) && rng.random() { "torn" } else { "kill" };
        pass.strike(&Fault::new(&place, effect, &mut rng));
    }
    pass.strike(&Fault::while_replacing("kill"));
    pass.finish();
}

#[test]
fn a_disk_that_fails_at_any_point_loses_nothing_that_was_saved() {
    let (mut rng, method) = (StdRng::seed_from_u64(seed(2)), Method::named("dmd2"));
    let workshop = method.workshop();
    let mut pass = Walk::new(&workshop, method);
    let mut passed = pass.trace();
    passed.retain(Place::is_needed);
    for place in one_of_each(&passed, &mut rng) {
        let effects = sicknesses(&place.point);
        let effect = effects[rng.random_range(0..effects.len())];
        pass.strike(&Fault::new(&place, effect, &mut rng));
    }
    pass.strike(&Fault::while_replacing("io"));
    pass.finish();
}

#[test]
fn a_disk_that_fails_for_the_report_fails_no_run() {
    let method = Method::named("progressive");
    let workshop = method.workshop();
    let mut pass = Walk::new(&workshop, method);
    let passed = pass.trace();
    let of_report: Vec<&Place> = passed.iter().filter(|place| !place.is_needed()).collect();
    assert!(of_report.len() >= 3, "{of_report:?}");
    for place in of_report {
        let fault = format!("{}@{}:io:1", place.point, place.file);
        let ended = pass.go(&[("DDIL_FAULT", &fault)]).succeeded();
        assert!(ended.stderr.contains("no report of"), "{fault}: {}", ended.stderr);
        assert!(ended.stdout.contains("done: the model is in"), "{fault}: {}", ended.stdout);
        let run = pass.run();
        assert_eq!(status(&run)["state"], "completed");
        assert!(!run.join("report.html").exists(), "{fault}");
        pass.compare();
    }
}

/// Every method, every file at every point, every way to fail.
#[test]
#[ignore = "needs half an hour: make soak"]
fn soak_every_fault_at_every_point() {
    let mut rng = StdRng::seed_from_u64(seed(3));
    for method in soaked() {
        let workshop = method.workshop();
        let mut pass = Walk::new(&workshop, method);
        let passed = pass.trace();
        let (mut kills, mut failures) = (0, 0);
        for place in &passed {
            let deaths: &[_] =
                if takes_bytes(&place.point) { &["kill", "torn"] } else { &["kill"] };
            let sicknesses = if place.is_needed() { sicknesses(&place.point) } else { Vec::new() };
            (kills, failures) = (kills + deaths.len(), failures + sicknesses.len());
            for effect in deaths.iter().copied().chain(sicknesses) {
                pass.strike(&Fault::new(place, effect, &mut rng));
            }
        }
        for effect in ["kill", "io", "read_only"] {
            pass.strike(&Fault::while_replacing(effect));
        }
        pass.finish();
        println!(
            "{}: {} places, {kills} kills at them, {failures} failures of the disk, {} resumes, {} runs ended on the same bits",
            method.name,
            passed.len(),
            pass.resumes,
            pass.runs,
        );
    }
}
