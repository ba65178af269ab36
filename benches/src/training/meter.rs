//! How often networks are asked, and how long they take.

use std::cell::Cell;
use std::time::{Duration, Instant};

use ddil_core::{Conditioning, Denoiser, Discriminator, Result};
use ddil_schedulers::{NoiseSchedule, Prediction};
use tch::Tensor;

/// Who is asked, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// In the loss.
    Student,
    /// In the loss.
    Teacher,
    /// The moving average of the student that makes labels.
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

/// What one role was asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Samples that went through the network: two for a guided one.
    pub passes: u64,
    /// Those of them that a gradient comes back through.
    pub backward: u64,
    /// In passes; that of gradients is not known apart.
    pub time: Duration,
}

/// One tally a role.
#[derive(Debug, Default)]
pub struct Meters([Cell<Tally>; 7]);

impl Meters {
    /// What a role was asked so far.
    pub fn of(&self, role: Role) -> Tally {
        self.0[role as usize].get()
    }

    /// A network that counts for a role.
    pub fn put_on<N>(&self, role: Role, network: N) -> Metered<'_, N> {
        Metered { network, tally: &self.0[role as usize] }
    }
}

/// A network that keeps a tally. Goes inside of guidance, whose two passes are two.
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
