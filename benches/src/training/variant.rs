//! The training variants that are compared.

use ddil_core::{
    BufferConfig, MixerConfig, PriorSchedule, Priors, StudentConfig, StudentPolicy, TeacherConfig,
};
use ddil_losses::{Dmd2Config, LatentConsistencyConfig, ObjectiveConfig, ProgressiveConfig};

/// A distillation method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// Progressive distillation.
    Pd,
    /// Latent consistency distillation.
    Lcm,
    /// Distribution matching distillation 2.
    Dmd2,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pd, Self::Lcm, Self::Dmd2];

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pd => "PD",
            Self::Lcm => "LCM",
            Self::Dmd2 => "DMD2",
        }
    }

    /// Its default settings.
    pub fn objective(self) -> ObjectiveConfig {
        match self {
            Self::Pd => ObjectiveConfig::Progressive(ProgressiveConfig::default()),
            Self::Lcm => ObjectiveConfig::Lcm(LatentConsistencyConfig::default()),
            Self::Dmd2 => ObjectiveConfig::Dmd2(Dmd2Config::default()),
        }
    }

    /// The method's own mixture, as it is after the warm-up.
    fn mixture(self) -> Priors {
        let schedule = match self {
            Self::Pd => PriorSchedule::default_for_pd(),
            Self::Lcm => PriorSchedule::default_for_lcm(),
            Self::Dmd2 => PriorSchedule::default_for_dmd2(),
        };
        schedule.at(1.0)
    }

    /// The student policies that its timesteps allow. Chains, and rollouts of which all states are used, require a
    /// student that is trained at the timesteps where it is sampled.
    fn policies(self) -> Vec<StudentPolicy> {
        let buffer = StudentPolicy::Buffer { new_fraction: 0.25, buffer: BufferConfig::default() };
        match self {
            Self::Lcm => vec![StudentPolicy::Fresh, buffer],
            Self::Pd | Self::Dmd2 => {
                let chain = StudentPolicy::default();
                vec![StudentPolicy::Fresh, StudentPolicy::FreshAll, chain, buffer]
            }
        }
    }

    /// The policy of the presets.
    fn preferred(self) -> StudentPolicy {
        let policies = self.policies();
        policies[policies.len() - if self == Self::Lcm { 1 } else { 2 }].clone()
    }
}

/// The origin of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// Only noised data.
    Forward,
    /// Only the student's trajectories: DMD2 as published.
    Student,
    /// The method's mixture.
    Mixture,
    /// The same, while the teacher's pool is still being filled.
    Filling,
}

/// A method with the origin of its training states.
#[derive(Clone, Debug)]
pub struct Variant {
    /// The method.
    pub method: Method,
    /// The origin of its states.
    pub sources: Sources,
    policy: StudentPolicy,
}

impl Variant {
    /// All variants of a method, beginning with the baseline.
    pub fn all(method: Method) -> Vec<Self> {
        let variant = |sources, policy| Self { method, sources, policy };
        let forward = Self::forward(method);
        let mixed = method.policies().into_iter().map(|policy| variant(Sources::Mixture, policy));
        let official = variant(Sources::Student, StudentPolicy::Fresh);
        match method {
            Method::Dmd2 => [official, forward].into_iter().chain(mixed).collect(),
            Method::Lcm => std::iter::once(forward).chain(mixed).collect(),
            Method::Pd => {
                let filling = variant(Sources::Filling, method.preferred());
                std::iter::once(forward).chain(mixed).chain([filling]).collect()
            }
        }
    }

    /// Only noised data: the method without DDIL.
    pub fn forward(method: Method) -> Self {
        Self { method, sources: Sources::Forward, policy: StudentPolicy::Fresh }
    }

    /// Settings of the mixer, with the given number of trajectories in the teacher's pool.
    ///
    /// # Errors
    ///
    /// None: the settings are valid.
    pub fn mixer(&self, pool: usize) -> ddil_core::Result<MixerConfig> {
        let priors = match self.sources {
            Sources::Forward => Priors::FORWARD_ONLY,
            Sources::Student => Priors::new(0.0, 1.0, 0.0)?,
            Sources::Mixture | Sources::Filling => self.method.mixture(),
        };
        let pool = if self.sources == Sources::Filling { 2048 } else { pool };
        // As in the presets: steps between 2 of 50 timesteps are short enough.
        let substeps = if self.method == Method::Lcm { 1 } else { 2 };
        Ok(MixerConfig::default().with(|mixer| {
            mixer.priors = PriorSchedule::constant(priors);
            mixer.student =
                StudentConfig::default().with(|config| config.policy = self.policy.clone());
            mixer.teacher = TeacherConfig::default().with(|config| {
                config.pool = pool;
                config.substeps = substeps;
            });
            mixer.pure_noise_at_tmax = self.sources != Sources::Forward;
        }))
    }

    /// The origin of states, for tables.
    pub fn states(&self) -> &'static str {
        match self.sources {
            Sources::Forward => "forward only",
            Sources::Student => "student only",
            Sources::Mixture => "DDIL",
            Sources::Filling => "DDIL, pool filling",
        }
    }

    /// The student policy, for tables; empty if there are no student states.
    pub fn policy(&self) -> &'static str {
        match self.policy {
            _ if self.sources == Sources::Forward => "",
            StudentPolicy::Fresh => "fresh",
            StudentPolicy::FreshAll => "fresh_all",
            StudentPolicy::Buffer { .. } => "buffer",
            StudentPolicy::Chain { .. } => "chain",
        }
    }
}
