//! The training loop: mix states, evaluate the objective, update.

use std::cell::Cell;
use std::fs;
use std::rc::Rc;
use std::time::Instant;

use ddil_core::{
    Clock, Denoiser, Feedback, MixBatch, Mixer, MixerConfig, PriorSchedule, Priors,
    RolloutNetworks, States, Stream, StudentConfig, Thresholded, with_boundary,
};
use ddil_examples::{Result, Trainer, Training};
use ddil_losses::{Critic, LossRequest, LossTerms, Networks, Objective, Phase};
use ddil_models::Model;
use ddil_schedulers::{Sampler, Thresholding, Timesteps};
use ddil_trainer::{Ema, EmaConfig};

use crate::cell::Budget;
use crate::lab::{Counting, Lab};

/// Steps that students are made for.
pub(crate) const STUDENT_STEPS: u32 = 4;

/// A trained student, and the cost of its training.
pub(crate) struct Student {
    pub(crate) model: Rc<Model>,
    pub(crate) diverged: bool,
    /// Evaluations of student, teacher and critic, per sample of the batch and update of the student.
    pub(crate) evaluations: [f64; 3],
    pub(crate) seconds_per_update: f64,
}

/// Evaluations so far.
#[derive(Default)]
struct Counts {
    student: Cell<u64>,
    teacher: Cell<u64>,
    critic: Cell<u64>,
}

/// A student in training, with everything that trains it.
pub(crate) struct Distillation<'a> {
    lab: &'a Lab,
    budget: &'a Budget,
    thresholding: Thresholding,
    objective: Box<dyn Objective>,
    mixer: Mixer,
}

impl<'a> Distillation<'a> {
    pub(crate) fn new(
        lab: &'a Lab,
        budget: &'a Budget,
        thresholding: Thresholding,
        priors: Priors,
    ) -> Result<Self> {
        let grid = budget.objective.training_grid(&lab.schedule, STUDENT_STEPS)?;
        let objective = budget.objective.build(&lab.schedule, &grid)?;
        let config = MixerConfig::default().with(|config| {
            config.priors = PriorSchedule::constant(priors);
            config.student =
                StudentConfig::default().with(|config| config.policy = budget.policy.clone());
            config.teacher = budget.teacher.clone();
        });
        let (rollout, sampler) = sampled_with(lab, budget, STUDENT_STEPS)?;
        let mixer = Mixer::with_rollout(config, grid, rollout, sampler)?;
        Ok(Self { lab, budget, thresholding, objective, mixer })
    }

    /// Trains a copy of `start`.
    pub(crate) fn run(mut self, start: &Model) -> Result<Student> {
        let (lab, budget) = (self.lab, self.budget);
        let needs = self.objective.requirements();
        let counts = Counts::default();
        let [model, target] = [lab.copy(start)?, lab.copy(start)?];
        let critic = if needs.critic_sees_states {
            lab.critic_that_sees_states(start)?
        } else {
            lab.copy(start)?
        };
        let student = Counting::new(lab.denoiser(&model)?, &counts.student);
        let teacher = lab.teacher(self.thresholding.clone(), &counts.teacher)?;
        let averaged = Counting::new(lab.denoiser(&target)?, &counts.student);
        let averaged = Thresholded::new(averaged, self.thresholding.clone())?;
        let fake_score = Counting::new(lab.denoiser(&critic)?, &counts.critic);
        let thresholded = Thresholded::new(&fake_score, self.thresholding.clone())?;
        let mut networks = Networks::new(&student, &teacher);
        networks.target = needs.target_decay.map(|_| &averaged as &dyn Denoiser);
        networks.critic =
            needs.critic.then_some(Critic::new(&fake_score).with_thresholded(&thresholded));
        let mut weights = Weights::new(&model, &target, &critic, budget, &*self.objective)?;

        let (begun, mut updates, mut step, mut diverged) = (cpu_seconds(), 0, 0, false);
        while updates < budget.updates && !diverged {
            let states = self.mix(step, updates, networks)?;
            let mut terms: Option<LossTerms> = None;
            for &phase in self.objective.phases(step) {
                let student_x0 = terms.as_ref().map(|terms| &terms.student_x0);
                let request = LossRequest::new(step, phase, &states, networks, &lab.streams)
                    .with_student_x0(student_x0);
                weights.train(phase);
                let of_phase = self.objective.loss(&request)?;
                diverged |= !weights.update(phase, &of_phase)?;
                updates += u64::from(phase == Phase::Student);
                terms = Some(of_phase);
            }
            if let Some(terms) = terms {
                let next = terms.teacher_next.as_ref();
                let student_x0 = self.thresholding.apply(&terms.student_x0)?;
                let feedback = Feedback::new(&student_x0).with_teacher_next(next);
                let clock = Clock::new(step, updates, lab.streams);
                self.mixer.feed_back(&clock, &states, &feedback)?;
            }
            step += 1;
        }
        let seconds = cpu_seconds() - begun;
        weights.finish()?;
        let per_update = 1.0 / updates.max(1) as f64;
        let per_sample = per_update / budget.batch_size as f64;
        let evaluations = [&counts.student, &counts.teacher, &counts.critic]
            .map(|count| count.get() as f64 * per_sample);
        let seconds_per_update = seconds * per_update;
        drop((student, fake_score, averaged));
        Ok(Student { model, diverged, evaluations, seconds_per_update })
    }

    fn mix(&mut self, step: u64, updates: u64, networks: Networks<'_>) -> Result<States> {
        let data = self.lab.data(step, Stream::Data, self.budget.batch_size)?;
        let student = deployed(self.budget, networks.student);
        let clock = Clock::new(step, self.budget.updates.max(updates), self.lab.streams);
        let student = Thresholded::new(student, self.thresholding.clone())?;
        let networks = RolloutNetworks::new(&student, networks.teacher);
        Ok(self.mixer.next_states(&clock, &MixBatch::new(&data), &networks)?)
    }
}

/// The student with the boundary condition of its method, as in sampling but without thresholding.
pub(crate) fn deployed<'a>(budget: &Budget, student: impl Denoiser + 'a) -> Box<dyn Denoiser + 'a> {
    let sampler = budget.objective.sampler_config(student.schedule());
    with_boundary(student, &sampler)
}

/// The timesteps and the sampler of a student.
pub(crate) fn sampled_with(
    lab: &Lab,
    budget: &Budget,
    steps: u32,
) -> Result<(Timesteps, Box<dyn Sampler>)> {
    let objective = &budget.objective;
    let sampler = objective.sampler_config(&lab.schedule).build(&lab.schedule)?;
    Ok((objective.sampling_grid(&lab.schedule, steps)?, sampler))
}

/// The updated networks: the student, its average that methods use as a target, the critic.
struct Weights<'a> {
    student: Trainer,
    target: Option<(Ema, &'a Model)>,
    critic: Option<(Trainer, &'a Model)>,
}

impl<'a> Weights<'a> {
    fn new(
        student: &'a Model,
        target: &'a Model,
        critic: &'a Model,
        budget: &Budget,
        objective: &dyn Objective,
    ) -> Result<Self> {
        let needs = objective.requirements();
        let Budget { updates, learning_rate, critic_learning_rate, ema_decay, .. } = *budget;
        let trainer = Trainer::new(
            student.parameters().learned(),
            Training { updates, learning_rate, ema_decay },
        )?;
        let ema = needs.target_decay.map(|decay| {
            EmaConfig::default()
                .with(|config| {
                    config.decay = decay;
                    config.warmup = false;
                })
                .build(student.parameters().learned())
        });
        // A critic is updated more often than the student; its learning rate decays in step with the student's.
        let per_update = |phase| {
            let steps = 0..100;
            let phases = steps.flat_map(|step| objective.phases(step));
            phases.filter(|p| **p == phase).count() as f64
        };
        let critic_updates =
            updates as f64 * per_update(Phase::Critic) / per_update(Phase::Student).max(1.0);
        let training = Training {
            updates: critic_updates as u64,
            learning_rate: critic_learning_rate.unwrap_or(learning_rate),
            ema_decay,
        };
        let critic_trainer =
            needs.critic.then(|| Trainer::new(critic.parameters().learned(), training));
        target.parameters().set_trainable(false);
        Ok(Self {
            student: trainer,
            target: ema.transpose()?.map(|ema| (ema, target)),
            critic: critic_trainer.transpose()?.map(|trainer| (trainer, critic)),
        })
    }

    /// Freezes the critic while the student is trained: the student's gradient passes through it without updating it.
    fn train(&self, phase: Phase) {
        if let Some((_, critic)) = &self.critic {
            critic.parameters().set_trainable(phase == Phase::Critic);
        }
    }

    /// Returns false if loss or gradient are NaN or infinite.
    fn update(&mut self, phase: Phase, terms: &LossTerms) -> Result<bool> {
        match (phase, &mut self.critic) {
            (Phase::Critic, Some((critic, _))) => critic.update(&terms.per_sample),
            (Phase::Critic, None) => Err("the critic is to be trained, but there is none".into()),
            (Phase::Student, _) => {
                let finite = self.student.update(&terms.per_sample)?;
                if let Some((ema, target)) = &mut self.target {
                    ema.update()?;
                    ema.copy_to(&target.parameters().learned())?;
                }
                Ok(finite)
            }
        }
    }

    fn finish(self) -> Result<()> {
        self.student.finish()
    }
}

/// Processor time of this thread in seconds, which other work on the machine does not affect; wall time if the
/// system does not report it.
fn cpu_seconds() -> f64 {
    let nanoseconds = || -> Option<f64> {
        let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    thread_local!(static START: Instant = Instant::now());
    nanoseconds().map_or_else(|| START.with(Instant::elapsed).as_secs_f64(), |ns| ns * 1e-9)
}
