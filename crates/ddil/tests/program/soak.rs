//! Long runs: `make soak`.
//!
//! `DDIL_SOAK_KILLS` and `DDIL_SOAK_UPDATES` set the duration, `DDIL_SOAK_METHODS` the methods, `DDIL_SEED` the seed.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::methods::{Method, soaked};
use crate::support::{Workshop, assert_same_end, checkpoints, seed, status};

const KILLS: u64 = 200;
const UPDATES: u64 = 10_000;

/// Growth of memory from the second tenth of a run to its last that is noise.
const MAX_GROWTH_KIB: f64 = 4096.0;
/// Processor time of an update at the end of a run over that at its beginning; other processes of the machine do not
/// count in it.
const MAX_SLOWDOWN: f64 = 1.25;
/// Between two looks at the process.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

fn given(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(default, |number| number.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// `kill -9` at random instants, 200 of them over all methods; every run ends as the one that was spared.
#[test]
#[ignore = "needs minutes: make soak"]
fn soak_kills_at_random_instants() {
    let (mut rng, kills) = (StdRng::seed_from_u64(seed(4)), given("DDIL_SOAK_KILLS", KILLS));
    let methods = soaked();
    let share = kills.div_ceil(methods.len() as u64);
    for method in methods {
        let workshop = method.workshop();
        let (landed, runs) = kills_of(&workshop, method, share, &mut rng);
        println!("{}: {landed} kills, {runs} runs ended on the same bits", method.name);
    }
}

/// Kills runs of a method until this many kills came in time; returns how many did, and how many runs ended.
fn kills_of(workshop: &Workshop, method: &Method, kills: u64, rng: &mut StdRng) -> (u64, u64) {
    const UPDATES: u64 = 120;
    let settings = ["output.checkpoints={ keep_last = 2 }", "output.sample_interval=10"];
    let first = |name: &str| method.arguments(name, UPDATES, &settings);
    let started = Instant::now();
    complete(workshop, &first("whole"));
    // Long enough that some kills come late, and short enough that most come in time.
    let longest = started.elapsed() / 2;
    let (mut landed, mut runs) = (0, 0);
    while landed < kills {
        let name = format!("killed_{runs}");
        let run = workshop.run(&name);
        let again = [method.verb, "--resume", &run.display().to_string()].map(str::to_owned);
        while landed < kills {
            let arguments =
                if run.join("config.toml").exists() { again.to_vec() } else { first(&name) };
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut running = workshop.start(&arguments);
            let until = Instant::now() + longest.mul_f64(rng.random());
            running.wait_until(|| Instant::now() >= until);
            let ended = running.kill();
            if ended.code == Some(0) {
                break;
            }
            assert_eq!(ended.code, None, "{}: {}", method.name, ended.stderr);
            landed += 1;
        }
        if run.join("config.toml").exists() {
            complete(workshop, &again);
        } else {
            complete(workshop, &first(&name));
        }
        assert_same_end(&workshop.run("whole"), &run);
        fs::remove_dir_all(&run).expect("it is ours");
        runs += 1;
    }
    (landed, runs)
}

fn complete(workshop: &Workshop, arguments: &[String]) {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    workshop.ddil(&arguments).succeeded();
}

/// A measurement of a process at one moment.
struct Look {
    resident_kib: f64,
    files: usize,
    step: u64,
    /// Of the processor, so far.
    seconds: f64,
}

impl Look {
    /// None once the process is gone.
    fn at(process: u32, run: &Path) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let resident_kib = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
        let files = fs::read_dir(format!("/proc/{process}/fd")).ok()?.count();
        let status = fs::read(run.join("status.json")).ok();
        let status = status.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        let step = status.and_then(|status| status["step"].as_u64()).unwrap_or(0);
        Some(Self { resident_kib, files, step, seconds: processor_seconds(process)? })
    }
}

/// User's and system's time, fields 14 and 15 of a process's `stat`, in hundredths of a second.
fn processor_seconds(process: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is a name in parentheses, with arbitrary characters.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let hundredths = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    Some((hundredths(14)? + hundredths(15)?) / 100.0)
}

/// Long runs stay as they are: memory, speed, files, and the buffer within its budget.
#[test]
#[ignore = "needs half an hour: make soak"]
fn soak_long_runs() {
    let updates = given("DDIL_SOAK_UPDATES", UPDATES);
    println!(
        "| method | updates | resident, MiB | growth, KiB | processor's ms an update, early and late | files | buffer, bytes of budget |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let problems: Vec<String> =
        soaked().into_iter().flat_map(|method| soak(method, updates)).collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

/// One long run; returns the limits that it exceeded.
fn soak(method: &Method, updates: u64) -> Vec<String> {
    let workshop = method.workshop();
    let interval = (updates / 20).max(1);
    let more = [
        format!("output.checkpoint_interval={interval}"),
        format!("output.sample_interval={interval}"),
        "output.log_interval=10".to_owned(),
        "output.checkpoints={ keep_last = 2 }".to_owned(),
        format!(
            "mixing.student.policy={{ kind = \"buffer\", new_fraction = 0.25, buffer = {{ byte_budget = {BUDGET} }} }}"
        ),
    ];
    let more: Vec<&str> =
        more[..if method.verb == "train" { 4 } else { 5 }].iter().map(String::as_str).collect();
    let arguments = method.arguments("soak", updates, &more);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let run = workshop.run("soak");
    let mut looks = Vec::new();
    let mut running = workshop.start(&arguments);
    while let Some(look) = Look::at(running.id(), &run).filter(|_| !running.has_ended()) {
        looks.push(look);
        sleep(LOOK_INTERVAL);
    }
    running.ended().succeeded();
    assert_eq!(status(&run)["state"], "completed");
    Report::new(&run, &looks, updates).exceeded_limits(method)
}

/// Odd, so that a whole number of states does not fill it.
const BUDGET: u64 = 4001;

/// What came of a long run.
struct Report {
    updates: u64,
    resident_kib: f64,
    growth_kib: f64,
    /// Of the processor, an update, after a tenth of the run and before its end.
    milliseconds: [f64; 2],
    files: [usize; 2],
    buffer_bytes: Option<u64>,
}

impl Report {
    fn new(run: &Path, looks: &[Look], updates: u64) -> Self {
        // The first tenth is warming up: caches, the allocator's pools, a buffer that fills. At the end files are closed.
        let is_steady = |look: &&Look| look.step * 10 >= updates && look.step < updates;
        let steady: Vec<&Look> = looks.iter().filter(is_steady).collect();
        assert!(steady.len() >= 20, "{} looks are too few; ask for more updates", steady.len());
        let fifth = steady.len() / 5;
        let (first, last) = (&steady[..fifth], &steady[steady.len() - fifth..]);
        let resident = |looks: &[&Look]| median(looks.iter().map(|look| look.resident_kib));
        // Files that are open for the moment of a checkpoint do not count.
        let files = |looks: &[&Look]| looks.iter().map(|look| look.files).min().unwrap_or(0);
        Self {
            updates,
            resident_kib: resident(last),
            growth_kib: resident(last) - resident(first),
            milliseconds: [(10, 30), (75, 95)].map(|part| pace(looks, updates, part)),
            files: [files(first), files(last)],
            buffer_bytes: buffer_bytes(run),
        }
    }

    fn exceeded_limits(&self, method: &Method) -> Vec<String> {
        let Self { updates, resident_kib, growth_kib, milliseconds: [early, late], .. } = *self;
        let buffer =
            self.buffer_bytes.map_or("-".to_owned(), |bytes| format!("{bytes} of {BUDGET}"));
        println!(
            "| {} | {updates} | {:.1} | {growth_kib:+.0} | {early:.2}, {late:.2} | {}, {} | {buffer} |",
            method.name,
            resident_kib / 1024.0,
            self.files[0],
            self.files[1],
        );
        let mut problems = Vec::new();
        let mut expect = |holds: bool, problem: String| {
            if !holds {
                problems.push(format!("{}: {problem}", method.name));
            }
        };
        expect(growth_kib <= MAX_GROWTH_KIB, format!("memory grew by {growth_kib} KiB"));
        expect(late <= MAX_SLOWDOWN * early, format!("from {early} to {late} ms an update"));
        expect(self.files[0] == self.files[1], format!("open files {:?}", self.files));
        let within = self.buffer_bytes.is_none_or(|bytes| bytes <= BUDGET);
        expect(within, format!("the buffer holds {buffer} bytes"));
        expect(
            self.buffer_bytes.is_some() == (method.verb == "distill"),
            "no buffer was found in the checkpoint".to_owned(),
        );
        problems
    }
}

/// The processor's milliseconds an update between two hundredths of a run.
fn pace(looks: &[Look], updates: u64, (from, to): (u64, u64)) -> f64 {
    let at = |hundredths: u64| looks.iter().find(|look| look.step * 100 >= updates * hundredths);
    let (from, to) = at(from).zip(at(to)).expect("the run got that far");
    1000.0 * (to.seconds - from.seconds) / (to.step - from.step) as f64
}

/// Bytes of all that the student's buffer keeps, in the last checkpoint.
fn buffer_bytes(run: &Path) -> Option<u64> {
    let last = checkpoints(run).into_values().next_back().expect("it was saved");
    let bytes = fs::read(last.join("mixer.safetensors")).ok()?;
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("the program wrote it");
    let of_student = |name: &&str| name.starts_with("student.");
    let kept = tensors.names().into_iter().filter(of_student);
    let total: usize =
        kept.map(|name| tensors.tensor(name).map_or(0, |tensor| tensor.data().len())).sum();
    (total > 0).then_some(total as u64)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
