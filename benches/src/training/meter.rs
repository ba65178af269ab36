//! Counts the passes of networks and the time they take.

use std::cell::Cell;
use std::time::{Duration, Instant};

use ddil_core::{Conditioning, Denoiser, Discriminator, Result};
use ddil_schedulers::{NoiseSchedule, Prediction};
use tch::Tensor;

/// The network that is evaluated, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// In the loss.
    Student,
    /// In the loss.
    Teacher,
    /// The moving average of the student that computes targets.
    Target,
    /// The fake score of DMD2.
    Critic,
    /// The critic's features and the head behind them.
    Discriminator,
    /// In the mixer.
    StudentRollout,
    /// In the mixer.
    TeacherRollout,
}

/// The passes of one role.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Samples that passed through the network: two for a guided one.
    pub passes: u64,
    /// Number of those through which a gradient flows back.
    pub backward: u64,
    /// Time of forward passes; that of backward passes is not known separately.
    pub time: Duration,
}

/// The tallies of all roles.
#[derive(Debug, Default)]
pub struct Meters([Cell<Tally>; 7]);

impl Meters {
    /// The tally of a role so far.
    pub fn of(&self, role: Role) -> Tally {
        self.0[role as usize].get()
    }

    /// A network whose passes count for a role.
    pub fn put_on<N>(&self, role: Role, network: N) -> Metered<'_, N> {
        Metered { network, tally: &self.0[role as usize] }
    }
}

/// A network with a tally. It must be inside of guidance, whose two passes count as two.
pub struct Metered<'a, N> {
    network: N,
    tally: &'a Cell<Tally>,
}

impl<N> Metered<'_, N> {
    fn count(&self, started: Instant, answer: &Tensor) {
        let samples = answer.size()[0] as u64;
        let Tally { passes, backward, time } = self.tally.get();
        self.tally.set(Tally {
            passes: passes + samples,
            backward: backward + if answer.requires_grad() { samples } else { 0 },
            time: time + started.elapsed(),
        });
    }
}

impl<N: Denoiser> Denoiser for Metered<'_, N> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        let started = Instant::now();
        let prediction = self.network.predict(x_t, timesteps, conditioning)?;
        self.count(started, &prediction.x0);
        Ok(prediction)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.network.schedule()
    }
}

impl<N: Discriminator> Discriminator for Metered<'_, N> {
    fn logits(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let started = Instant::now();
        let logits = self.network.logits(x_t, timesteps, conditioning)?;
        self.count(started, &logits);
        Ok(logits)
    }
}
