//! The sampling settings of a model in diffusers' format.

use ddil_core::Denoiser;
use ddil_models::NetworkDenoiser;
use ddil_schedulers::{CommonConfig, SamplerConfig, SchedulerConfig, Thresholding, Timesteps};

use crate::error::Result;

/// The sampling settings of a model as `scheduler_config.json`, and the thresholding that this file cannot represent.
///
/// # Example
///
/// ```
/// use ddil_models::Placement;
/// use ddil_pipelines::{Pipeline, Precision, Scheduler};
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher"));
/// # let folder = tempfile::tempdir()?;
/// let model = Pipeline::open(path, Placement::default(), Precision::Float32)?;
/// let scheduler = Scheduler::new(&model.network, model.sampler, &model.thresholding, None)?;
///
/// let copy = folder.path().join("copy");
/// Pipeline::write(&copy, &model.network, &scheduler, &model.card, None)?;
/// assert!(Pipeline::is_at(&copy));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Scheduler {
    /// `scheduler_config.json`.
    pub(super) config: SchedulerConfig,
    /// Thresholding that the file cannot represent, to be stored in the card.
    pub(super) card_thresholding: Option<Thresholding>,
}

impl Scheduler {
    /// Converts sampling settings to diffusers' format. A run calls this before it trains, so that it cannot fail when
    /// the model is written.
    ///
    /// Thresholding that diffusers does not support (a range that is asymmetric or differs per channel, reflection) is
    /// stored in the card, which only this program reads.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`](crate::Error::Scheduler) for settings that diffusers' schedulers do not support: other
    /// families of schedules, flow prediction.
    pub fn new(
        network: &NetworkDenoiser,
        sampler: SamplerConfig,
        thresholding: &Thresholding,
        timesteps: Option<&Timesteps>,
    ) -> Result<Self> {
        let (schedule, output) = (network.schedule().config(), network.prediction_type());
        let converted = CommonConfig::new(schedule, output, thresholding);
        let (config, card_thresholding) = match converted {
            Err(ddil_schedulers::Error::NotRepresentable { field: "thresholding", .. }) => {
                let config = CommonConfig::new(schedule, output, &Thresholding::None)?;
                (config, Some(thresholding.clone()))
            }
            converted => (converted?, None),
        };
        let common = match timesteps {
            Some(timesteps) => config.with_trained_timesteps(timesteps),
            None => config,
        };
        let config = sampler.scheduler_config(common);
        Ok(Self { config, card_thresholding })
    }
}
