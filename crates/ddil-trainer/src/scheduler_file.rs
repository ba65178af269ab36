//! `scheduler_config.json` of a model folder.
#![allow(missing_docs)]

use std::path::Path;

use ddil_schedulers::{
    BetaSchedule, FinalAlphaCumprod, NoiseSchedule, NoiseScheduleConfig, PredictionType,
    Thresholding, VpConfig,
};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::files::{read_json, write_json};
use crate::network::Network;

/// The scheduler of a model, as diffusers' `DDIMScheduler` reads and writes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SchedulerFile {
    #[serde(rename = "_class_name")]
    class_name: String,
    num_train_timesteps: u32,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: BetaSchedule,
    prediction_type: PredictionType,
    clip_sample: bool,
    set_alpha_to_one: bool,
    rescale_betas_zero_snr: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ddil_timesteps: Option<Vec<i64>>,
}

impl SchedulerFile {
    pub fn new(
        network: &Network,
        thresholding: &Thresholding,
        timesteps: Option<&[i64]>,
    ) -> Result<Self> {
        use ddil_core::Denoiser;
        let NoiseScheduleConfig::Vp(vp) = network.schedule().config().clone() else {
            unreachable!()
        };
        Ok(Self {
            class_name: "DDIMScheduler".into(),
            num_train_timesteps: vp.num_train_timesteps,
            beta_start: vp.beta_start,
            beta_end: vp.beta_end,
            beta_schedule: vp.beta_schedule,
            prediction_type: network.prediction_type(),
            clip_sample: *thresholding != Thresholding::None,
            set_alpha_to_one: vp.final_alpha_cumprod == FinalAlphaCumprod::One,
            rescale_betas_zero_snr: vp.rescale_betas_zero_snr,
            ddil_timesteps: timesteps.map(<[i64]>::to_vec),
        })
    }
    pub fn read(path: &Path) -> Result<Self> {
        read_json(path)
    }
    pub fn write(&self, path: &Path) -> Result<()> {
        write_json(path, self)
    }
    pub fn schedule(&self) -> Result<NoiseSchedule> {
        Ok(NoiseScheduleConfig::Vp(VpConfig {
            num_train_timesteps: self.num_train_timesteps,
            beta_schedule: self.beta_schedule,
            beta_start: self.beta_start,
            beta_end: self.beta_end,
            trained_betas: None,
            rescale_betas_zero_snr: self.rescale_betas_zero_snr,
            final_alpha_cumprod: if self.set_alpha_to_one {
                FinalAlphaCumprod::One
            } else {
                FinalAlphaCumprod::First
            },
        })
        .build()?)
    }
    pub fn prediction_type(&self) -> PredictionType {
        self.prediction_type
    }
    pub fn thresholding(&self) -> Thresholding {
        if self.clip_sample { Thresholding::clamp_pixels() } else { Thresholding::None }
    }
    pub fn timesteps(&self) -> Option<Vec<i64>> {
        self.ddil_timesteps.clone()
    }
}
