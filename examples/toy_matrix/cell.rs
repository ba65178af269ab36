//! The definition of a run of the matrix: data, method, states and budget.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use ddil_core::{GaussianMixture, Priors, StudentPolicy, TeacherConfig};
use ddil_examples::Result;
use ddil_losses::{
    Dmd2Config, LatentConsistencyConfig, ObjectiveConfig, ProgressiveConfig, Weighting,
};
use ddil_schedulers::{DataRange, Thresholding};
use serde::{Deserialize, Serialize};

/// Data, and the teacher's guidance scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Setting {
    /// A ring of 8 modes, guidance 3.
    Guided3,
    /// The same without guidance: the control.
    Unguided,
    /// The same, unguided, and two modes of the teacher are missing from the data.
    Missing,
    /// The ring under guidance 7.
    Guided7,
    /// A grid of 25 modes under guidance 3.
    Grid,
}

impl Setting {
    /// In the order in which they are run.
    pub(crate) const ALL: [Self; 5] =
        [Self::Guided3, Self::Unguided, Self::Missing, Self::Guided7, Self::Grid];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Guided3 => "guided-3",
            Self::Unguided => "unguided",
            Self::Missing => "missing",
            Self::Guided7 => "guided-7",
            Self::Grid => "grid",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Guided3 => "ring of 8, guidance 3",
            Self::Unguided => "ring of 8, no guidance",
            Self::Missing => "ring of 8, two modes missing from the data, no guidance",
            Self::Guided7 => "ring of 8, guidance 7",
            Self::Grid => "grid of 25, guidance 3",
        }
    }

    pub(crate) fn guidance_scale(self) -> f64 {
        match self {
            Self::Guided3 | Self::Grid => 3.0,
            Self::Guided7 => 7.0,
            Self::Unguided | Self::Missing => 1.0,
        }
    }

    /// The teacher's distribution.
    pub(crate) fn mixture(self) -> Result<GaussianMixture> {
        Ok(if self == Self::Grid { GaussianMixture::grid(5)? } else { GaussianMixture::ring(8)? })
    }

    /// Components that are not in the data: one each of two classes, each of which keeps its other one.
    pub(crate) fn missing(self) -> &'static [i64] {
        if self == Self::Missing { &[1, 5] } else { &[] }
    }

    /// Standard deviation of a mode.
    pub(crate) fn mode_std(self) -> f64 {
        if self == Self::Grid { 0.05 } else { 0.08 }
    }

    /// Standard deviation of the data in each dimension.
    pub(crate) fn sigma_data(self) -> f64 {
        // 0.8² / 2 + 0.08² for the ring, 0.4² · 2 + 0.05² for the grid.
        if self == Self::Grid { 0.568 } else { 0.571 }
    }

    /// A box just around the data: three standard deviations beyond the outermost modes.
    pub(crate) fn thresholding(self) -> Thresholding {
        let reach = 0.8 + 3.0 * self.mode_std();
        Thresholding::Clamp(DataRange::scalar(-reach, reach))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Method {
    Progressive,
    Lcm,
    Dmd2,
}

impl Method {
    pub(crate) const ALL: [Self; 3] = [Self::Progressive, Self::Lcm, Self::Dmd2];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Progressive => "progressive",
            Self::Lcm => "lcm",
            Self::Dmd2 => "dmd2",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Progressive => "PD",
            Self::Lcm => "LCM",
            Self::Dmd2 => "DMD2",
        }
    }
}

/// The origin of training states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Arm {
    /// Noised data: the method without imitation learning.
    Forward,
    /// Half noised data, half the student's own states: DDIL.
    Mix,
    /// Only the student's own states.
    Student,
    /// Only the teacher's states.
    Teacher,
}

impl Arm {
    pub(crate) const ALL: [Self; 4] = [Self::Forward, Self::Mix, Self::Student, Self::Teacher];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Mix => "mix",
            Self::Student => "student",
            Self::Teacher => "teacher",
        }
    }

    pub(crate) fn priors(self) -> Result<Priors> {
        let [forward, student, teacher] = match self {
            Self::Forward => [1.0, 0.0, 0.0],
            Self::Mix => [0.5, 0.5, 0.0],
            Self::Student => [0.0, 1.0, 0.0],
            Self::Teacher => [0.0, 0.0, 1.0],
        };
        Ok(Priors::new(forward, student, teacher)?)
    }
}

/// The training budget and learning rates: by method, and equal for all arms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Budget {
    pub(crate) objective: ObjectiveConfig,
    /// How the student's own states are produced.
    pub(crate) policy: StudentPolicy,
    /// How the teacher's trajectories are produced.
    pub(crate) teacher: TeacherConfig,
    /// Updates of the student.
    pub(crate) updates: u64,
    pub(crate) batch_size: i64,
    pub(crate) learning_rate: f64,
    /// Learning rate of the critic, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) critic_learning_rate: Option<f64>,
    pub(crate) ema_decay: f64,
    /// Updates of the network from which all students start.
    pub(crate) start_updates: u64,
    pub(crate) start_learning_rate: f64,
    /// Samples for evaluating a student, at the number of steps it is made for; the reference has three times as many.
    pub(crate) num_samples: i64,
}

impl Budget {
    pub(crate) fn of(method: Method) -> Self {
        let objective = match method {
            Method::Progressive => ObjectiveConfig::Progressive(
                ProgressiveConfig::default().with(|config| config.substeps = 4),
            ),
            Method::Lcm => ObjectiveConfig::Lcm(
                LatentConsistencyConfig::default().with(|config| config.num_ddim_timesteps = 32),
            ),
            // With the weights of the v-prediction error the critic also learns at high noise, where modes separate.
            Method::Dmd2 => ObjectiveConfig::Dmd2(Dmd2Config::default().with(|config| {
                config.gan = false;
                config.critic_weighting = Some(Weighting::SnrPlusOne);
            })),
        };
        let policy = match method {
            // Whole trajectories of the current student, of which all states are used.
            Method::Progressive | Method::Dmd2 => StudentPolicy::FreshAll,
            // It is trained at other timesteps than those it visits.
            Method::Lcm => StudentPolicy::Fresh,
        };
        let teacher = match method {
            Method::Progressive | Method::Dmd2 => {
                TeacherConfig::default().with(|config| config.substeps = 4)
            }
            // Each of the 32 timesteps is a step of the teacher. Until the pool is full, a batch consists of 8
            // trajectories with 32 states each, which have little variety; so the pool is small.
            Method::Lcm => TeacherConfig::default().with(|config| {
                config.substeps = 1;
                config.pool = 512;
            }),
        };
        let (updates, learning_rate) = match method {
            Method::Progressive => (1000, 5e-3),
            Method::Lcm => (1200, 1e-3),
            Method::Dmd2 => (1000, 1e-3),
        };
        Self {
            objective,
            policy,
            teacher,
            updates,
            batch_size: 256,
            learning_rate,
            critic_learning_rate: (method == Method::Dmd2).then_some(2e-3),
            ema_decay: 0.995,
            start_updates: 1500,
            start_learning_rate: 5e-3,
            num_samples: 6000,
        }
    }

    /// Distinguishes runs with other settings.
    pub(crate) fn hash(&self) -> Result<String> {
        let mut hasher = DefaultHasher::new();
        serde_json::to_string(self)?.hash(&mut hasher);
        Ok(format!("{:016x}", hasher.finish()))
    }
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) setting: Setting,
    pub(crate) method: Method,
    pub(crate) thresholded: bool,
    pub(crate) seed: u64,
    pub(crate) arm: Arm,
}

/// The result of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub(crate) cell: Cell,
    /// Identifies the budget.
    pub(crate) hash: String,
    /// Whether a loss, a gradient or a sample was NaN or infinite.
    pub(crate) diverged: bool,
    /// Energy distances in 1, 2 and 4 steps; none if a sample is NaN or infinite.
    pub(crate) distances: [Option<f64>; 3],
    /// In 4 steps.
    pub(crate) modes: Option<Modes>,
    /// Energy distance of forward states to visited ones, minus that of two sets of forward states; by timestep.
    pub(crate) shift: Vec<f64>,
    /// Evaluations of student, teacher and critic, per sample of the batch and update of the student.
    pub(crate) evaluations: [f64; 3],
    /// Processor time per update of the student.
    pub(crate) seconds_per_update: f64,
    /// Energy distances of the teacher: at the student's number of steps, and at the number that it learns from.
    pub(crate) teacher_distances: [f64; 2],
    pub(crate) teacher_modes: Modes,
}

/// The distribution of samples over the modes of the teacher.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Modes {
    /// Kullback-Leibler divergence of the shares of the modes, by nearest mode, from uniform shares; nats.
    pub(crate) kl: f64,
    /// Share of samples more than three standard deviations from every mode.
    pub(crate) off: f64,
    /// Share of modes with at least a fifth of their expected samples.
    pub(crate) coverage: f64,
    /// Share of samples in the modes that the data lack, relative to the expected share; 1 if the data lack none.
    pub(crate) missing: f64,
}
