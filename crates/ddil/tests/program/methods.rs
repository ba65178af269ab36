//! The runs that are killed, hurt and soaked: every method, with all that a run remembers from update to update.

use crate::support::Workshop;

/// A verb with the settings of a run.
pub(crate) struct Method {
    pub(crate) name: &'static str,
    pub(crate) verb: &'static str,
    settings: &'static [&'static str],
    /// Stages, each with this many of the run's updates.
    stages: u64,
}

pub(crate) const BUFFER: &str = "mixing.student.policy={ kind = \"buffer\", new_fraction = 0.25, \
                                 buffer = { capacity = 16, max_age = 4 } }";

/// `ddil train`; progressive distillation in two stages with a buffer; a latent consistency model with a buffer;
/// distribution matching with a critic, whose student is updated every third time only.
pub(crate) const METHODS: [Method; 4] = [
    Method { name: "train", verb: "train", settings: &[], stages: 1 },
    Method {
        name: "progressive",
        verb: "distill",
        settings: &["student.stages=[4, 2]", BUFFER],
        stages: 2,
    },
    Method {
        name: "lcm",
        verb: "distill",
        settings: &[
            "objective={ method = \"lcm\", num_ddim_timesteps = 10 }",
            "mixing.teacher={ pool = 8, substeps = 1 }",
            BUFFER,
        ],
        stages: 1,
    },
    Method {
        name: "dmd2",
        verb: "distill",
        settings: &[
            "objective={ method = \"dmd2\", critic_ratio = 3, critic_sees_source = true, \
             critic_sees_timestep = true, dm_timesteps = \"up_to_state\" }",
            BUFFER,
        ],
        stages: 1,
    },
];

/// The methods of a long test: all, or those named in `DDIL_SOAK_METHODS`, between commas.
pub(crate) fn soaked() -> Vec<&'static Method> {
    let named = std::env::var("DDIL_SOAK_METHODS").ok();
    match &named {
        Some(names) => names.split(',').map(Method::named).collect(),
        None => METHODS.iter().collect(),
    }
}

impl Method {
    pub(crate) fn named(name: &str) -> &'static Self {
        METHODS.iter().find(|method| method.name == name).expect("it is one of the methods")
    }

    pub(crate) fn workshop(&self) -> Workshop {
        if self.verb == "train" { Workshop::new() } else { Workshop::with_teacher() }
    }

    /// The command line of a run of this many updates, with more settings.
    pub(crate) fn arguments(&self, run: &str, updates: u64, more: &[&str]) -> Vec<String> {
        let updates = match self.verb {
            "train" => format!("train.updates={updates}"),
            _ => format!("student.updates_per_stage={}", updates / self.stages),
        };
        let config = format!("{}.toml", self.verb);
        let mut arguments = vec![self.verb.to_owned(), config];
        let settings = self.settings.iter().chain(more).map(|setting| (*setting).to_owned());
        for setting in [format!("run.name={run}"), updates].into_iter().chain(settings) {
            arguments.extend(["--set".to_owned(), setting]);
        }
        arguments
    }
}
