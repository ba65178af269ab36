//! How a model is sampled, in diffusers' words.

use ddil_core::Denoiser;
use ddil_schedulers::{CommonConfig, SamplerConfig, SchedulerConfig, Thresholding, Timesteps};

use crate::error::Result;
use ddil_models::NetworkDenoiser;

/// How a model is sampled, in diffusers' words as far as they go.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheduler {
    /// `scheduler_config.json`.
    pub(super) config: SchedulerConfig,
    /// A treatment of clean data that the file has no words for, which the card keeps.
    pub(super) unspoken: Option<Thresholding>,
}

impl Scheduler {
    /// Puts a model's way of sampling into diffusers' words. Asked before a run begins, so that none ends without its
    /// model.
    ///
    /// A treatment of clean data that diffusers does not know (a range that is not symmetric or differs by channel,
    /// reflection) goes to the card, where only this program looks for it.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`](crate::Error::Scheduler) for what diffusers' schedulers do not know: other families of schedules, flow prediction.
    pub fn new(
        network: &NetworkDenoiser,
        sampler: SamplerConfig,
        thresholding: &Thresholding,
        timesteps: Option<&Timesteps>,
    ) -> Result<Self> {
        let (schedule, output) = (network.schedule().config(), network.prediction_type());
        let spoken = CommonConfig::new(schedule, output, thresholding);
        let (config, unspoken) = match spoken {
            Err(ddil_schedulers::Error::NotRepresentable { field: "thresholding", .. }) => {
                let config = CommonConfig::new(schedule, output, &Thresholding::None)?;
                (config, Some(thresholding.clone()))
            }
            spoken => (spoken?, None),
        };
        let common = match timesteps {
            Some(timesteps) => config.with_trained_timesteps(timesteps),
            None => config,
        };
        let config = sampler.scheduler_config(common);
        Ok(Self { config, unspoken })
    }
}
