//! The measurements, as Markdown.

use std::time::Duration;

use ddil_benches::process::peak_kib;
use ddil_benches::training::{Role, Round, Sources, TrainingLoop, Workload};

/// The conditions of the measurement, printed before it.
pub(crate) fn print_setting(workload: &Workload) {
    let Workload { batch, precision, filling, rounds, updates, .. } = workload;
    println!(
        "batch {batch}, {precision:?}, threads {}; {rounds} rounds of {updates} updates in turn, after \
         {filling} of the mixer alone and {updates} whole ones{}\n",
        tch::get_num_threads(),
        load()
    );
}

/// Both tables, and the peak memory of the process.
pub(crate) fn print(measured: &[Vec<TrainingLoop>], workload: &Workload) {
    println!(
        "| method | states | policy | ms | of base | of base, processor | student | teacher | target or critic \
         | discriminator | backward | student, rollouts | teacher, rollouts |"
    );
    println!("{}", "| --- ".repeat(13) + "|");
    for loops in measured {
        for training in loops {
            println!("{}", cost(training, &loops[0], workload));
        }
    }
    for loops in measured {
        print_pool(loops, workload);
    }
    println!("\nMilliseconds of an update by part:\n");
    println!(
        "| method | states | policy | states | teacher | student | target or critic | backward | optimizer | rest |"
    );
    println!("{}", "| --- ".repeat(10) + "|");
    for training in measured.iter().flatten() {
        println!("{}", parts(training, workload));
    }
    if let Some(peak) = peak_kib() {
        println!("\npeak memory of the process, all variants included: {peak} KiB");
    }
    println!("at the end{}", load());
}

/// The cost of filling a teacher's pool: the last variant compared with the same one with a full pool.
fn print_pool(loops: &[TrainingLoop], workload: &Workload) {
    let [base, .., filling] = loops else { return };
    let alike = |training: &&TrainingLoop| {
        training.variant.sources == Sources::Mixture
            && training.variant.policy() == filling.variant.policy()
    };
    let Some(full) =
        loops.iter().find(alike).filter(|_| filling.variant.sources == Sources::Filling)
    else {
        return;
    };
    let wall = |training: &TrainingLoop| each(training, |round| round.wall.as_secs_f64());
    let extra: Vec<f64> = wall(filling).iter().zip(wall(full)).map(|(a, b)| a - b).collect();
    let share: Vec<f64> = extra.iter().zip(wall(base)).map(|(extra, base)| extra / base).collect();
    let updates = (filling.rounds.len() as u64 * workload.updates) as f64;
    let trajectories = filling.teacher_trajectories() / updates;
    let (method, cost) = (base.variant.method.name(), median(&share) / trajectories);
    println!(
        "\n{method}: while the teacher's pool fills, {trajectories:.2} trajectories an update, which cost {cost:.3} \
         updates of the base each"
    );
}

/// The first columns of a row: method, states, policy.
fn name(training: &TrainingLoop) -> String {
    let variant = &training.variant;
    format!("| {} | {} | {} ", variant.method.name(), variant.states(), variant.policy())
}

/// The cost of an update: time, ratios, and passes per sample.
fn cost(training: &TrainingLoop, base: &TrainingLoop, workload: &Workload) -> String {
    let milliseconds =
        median(&each(training, |round| milliseconds(round.wall))) / workload.updates as f64;
    let wall = each(training, |round| round.wall.as_secs_f64());
    let base_wall = each(base, |round| round.wall.as_secs_f64());
    let processor = |round: &Round| round.processor.map_or(f64::NAN, |time| time.as_secs_f64());
    let processor = ratio(&each(training, processor), &each(base, processor));
    let samples = (training.rounds.len() as u64 * workload.updates) as f64 * workload.batch as f64;
    let all =
        |roles: &[Role]| roles.iter().map(|role| training.meters.of(*role)).collect::<Vec<_>>();
    let passes = |roles: &[Role]| {
        decimal(all(roles).iter().map(|tally| tally.passes).sum::<u64>() as f64 / samples)
    };
    let in_loss = [Role::Student, Role::Teacher, Role::Target, Role::Critic, Role::Discriminator];
    let backward = all(&in_loss).iter().map(|tally| tally.backward).sum::<u64>() as f64 / samples;
    [
        name(training),
        format!("{milliseconds:.0} "),
        format!("{} ", ratio(&wall, &base_wall)),
        format!("{processor} "),
        passes(&[Role::Student]),
        passes(&[Role::Teacher]),
        passes(&[Role::Target, Role::Critic]),
        passes(&[Role::Discriminator]),
        decimal(backward),
        passes(&[Role::StudentRollout]),
        passes(&[Role::TeacherRollout]),
    ]
    .join("| ")
        + "|"
}

/// The parts of an update's time, as means over all rounds.
fn parts(training: &TrainingLoop, workload: &Workload) -> String {
    let updates = (training.rounds.len() as u64 * workload.updates) as f64;
    let mean = |part: fn(&Round) -> Duration| {
        milliseconds(training.rounds.iter().map(part).sum::<Duration>()) / updates
    };
    let evaluations = |roles: &[Role]| {
        milliseconds(roles.iter().map(|role| training.meters.of(*role).time).sum()) / updates
    };
    let [wall, states, backward, optimizer] = [
        mean(|round| round.wall),
        mean(|round| round.states),
        mean(|round| round.backward),
        mean(|round| round.optimizer),
    ];
    let [teacher, student, critic] = [
        evaluations(&[Role::Teacher]),
        evaluations(&[Role::Student]),
        evaluations(&[Role::Target, Role::Critic, Role::Discriminator]),
    ];
    let shown = [states, teacher, student, critic, backward, optimizer];
    let rest = wall - shown.iter().sum::<f64>();
    let cells = shown.iter().chain([&rest]).map(|part| format!("| {part:.1} "));
    name(training) + &cells.collect::<String>() + "|"
}

/// Median and quartiles of the ratios per round.
fn ratio(these: &[f64], base: &[f64]) -> String {
    let ratios: Vec<f64> = these.iter().zip(base).map(|(this, base)| this / base).collect();
    if ratios.iter().any(|ratio| ratio.is_nan()) {
        return String::new();
    }
    let [low, high] = [0.25, 0.75].map(|share| quantile(&ratios, share));
    format!("{:.3} ({low:.3}-{high:.3})", median(&ratios))
}

fn each(training: &TrainingLoop, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
    training.rounds.iter().map(figure).collect()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Two decimals; empty for zero.
fn decimal(value: f64) -> String {
    if value == 0.0 { String::new() } else { format!("{value:.2} ") }
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// The load of other processes, if the system reports it.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ')
        .next()
        .filter(|load| !load.is_empty())
        .map_or_else(String::new, |load| format!("; load {load}"))
}
