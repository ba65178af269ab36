//! The command line.

use std::fmt::Display;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;

use ddil_examples::Result;
use ddil_losses::{MatchingTimesteps, ObjectiveConfig};

use crate::cell::{Arm, Budget, Cell, Method, Setting};

/// How DMD2 follows the steps of the student.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follow {
    /// The critic models the samples of each step separately.
    Timestep,
    /// Student and teacher are compared at most as noisy as the state.
    UpToState,
}

impl Follow {
    const ALL: [Self; 2] = [Self::Timestep, Self::UpToState];

    fn name(self) -> &'static str {
        match self {
            Self::Timestep => "timestep",
            Self::UpToState => "up-to-state",
        }
    }
}

/// The selected runs and the output folder.
pub(crate) struct Options {
    settings: Vec<Setting>,
    methods: Vec<Method>,
    arms: Vec<Arm>,
    thresholds: Vec<bool>,
    seeds: Range<u64>,
    updates: Option<u64>,
    learning_rate: Option<f64>,
    critic_learning_rate: Option<f64>,
    start_updates: Option<u64>,
    start_learning_rate: Option<f64>,
    dmd2: Vec<Follow>,
    pub(crate) workers: usize,
    pub(crate) out: PathBuf,
    pub(crate) report: bool,
    smoke: bool,
}

impl Options {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            settings: Setting::ALL.to_vec(),
            methods: Method::ALL.to_vec(),
            arms: Arm::ALL.to_vec(),
            thresholds: vec![false, true],
            seeds: 0..5,
            updates: None,
            learning_rate: None,
            critic_learning_rate: None,
            start_updates: None,
            start_learning_rate: None,
            dmd2: Vec::new(),
            workers: thread::available_parallelism()?.get(),
            out: "runs/toy_matrix".into(),
            report: false,
            smoke: false,
        };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--report" => options.report = true,
                "--smoke" => options.smoke = true,
                name => {
                    let value =
                        arguments.next().ok_or_else(|| format!("{name} requires a value"))?;
                    options.set(name, &value)?;
                }
            }
        }
        if options.smoke {
            options.seeds = 0..1;
            options.thresholds = vec![true];
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "--setting" => self.settings = some_of(value, &Setting::ALL, Setting::name)?,
            "--method" => self.methods = some_of(value, &Method::ALL, Method::name)?,
            "--source" => self.arms = some_of(value, &Arm::ALL, Arm::name)?,
            "--threshold" => {
                let name = |on| if on { "on" } else { "off" };
                self.thresholds = some_of(value, &[false, true], name)?;
            }
            "--seeds" => {
                self.seeds = match value.split_once("..") {
                    Some((first, end)) => number(name, first)?..number(name, end)?,
                    None => 0..number(name, value)?,
                }
            }
            "--workers" => self.workers = number(name, value)?,
            "--out" => self.out = value.into(),
            "--updates" => self.updates = Some(number(name, value)?),
            "--lr" => self.learning_rate = Some(number(name, value)?),
            "--start-updates" => self.start_updates = Some(number(name, value)?),
            "--start-lr" => self.start_learning_rate = Some(number(name, value)?),
            "--dmd2" => self.dmd2 = some_of(value, &Follow::ALL, Follow::name)?,
            "--critic-lr" => self.critic_learning_rate = Some(number(name, value)?),
            _ => {
                return Err(format!(
                    "unknown option {name}; the options are listed at the top of the example"
                )
                .into());
            }
        }
        Ok(())
    }

    /// Cells grouped with those that differ only in their states; in the order in which they are run.
    pub(crate) fn groups(&self) -> Vec<Vec<Cell>> {
        let mut groups = Vec::new();
        for &thresholded in &self.thresholds {
            for &setting in &self.settings {
                for &method in &self.methods {
                    for seed in self.seeds.clone() {
                        let cell = |&arm| Cell { setting, method, thresholded, seed, arm };
                        groups.push(self.arms.iter().map(cell).collect());
                    }
                }
            }
        }
        groups
    }

    /// The seed whose samples are plotted.
    pub(crate) fn first_seed(&self) -> u64 {
        self.seeds.start
    }

    pub(crate) fn budget(&self, method: Method) -> Budget {
        let mut budget = Budget::of(method);
        if let ObjectiveConfig::Dmd2(config) = &mut budget.objective {
            config.critic_sees_timestep = self.dmd2.contains(&Follow::Timestep);
            if self.dmd2.contains(&Follow::UpToState) {
                config.dm_timesteps = MatchingTimesteps::UpToState;
            }
        }
        let budget = Budget {
            updates: self.updates.unwrap_or(budget.updates),
            learning_rate: self.learning_rate.unwrap_or(budget.learning_rate),
            critic_learning_rate: budget
                .critic_learning_rate
                .map(|rate| self.critic_learning_rate.unwrap_or(rate)),
            start_updates: self.start_updates.unwrap_or(budget.start_updates),
            start_learning_rate: self.start_learning_rate.unwrap_or(budget.start_learning_rate),
            ..budget
        };
        if self.smoke {
            return Budget { updates: 3, start_updates: 3, num_samples: 200, ..budget };
        }
        budget
    }
}

/// The elements of `all` whose names are listed, in the order of the list.
fn some_of<T: Copy>(list: &str, all: &[T], name: impl Fn(T) -> &'static str) -> Result<Vec<T>> {
    let find = |wanted: &str| {
        all.iter().copied().find(|t| name(*t) == wanted).ok_or_else(|| {
            let names: Vec<_> = all.iter().copied().map(&name).collect();
            format!("{wanted} is not one of {}", names.join(", ")).into()
        })
    };
    list.split(',').map(find).collect()
}

fn number<T: FromStr<Err: Display>>(name: &str, text: &str) -> Result<T> {
    text.parse().map_err(|error| format!("{name} {text}: {error}").into())
}
