//! The workload of an update.

use std::path::PathBuf;

use ddil_models::{
    DownBlockType, Model, NetworkConfig, NetworkDenoiser, Placement, Precision, SampleSize,
    UNet2DConfig, UpBlockType,
};
use ddil_schedulers::{BetaSchedule, NoiseSchedule, NoiseScheduleConfig, PredictionType, VpConfig};
use tch::Device;

use super::Result;

/// A network, a batch, and the number of rounds.
pub struct Workload {
    /// Samples per update.
    pub batch: i64,
    /// Height and width of a sample in pixels.
    pub side: i64,
    /// The network of teacher, student and critic.
    pub unet: UNet2DConfig,
    /// The teacher's weights, a safetensors file; random weights without it.
    pub weights: Option<PathBuf>,
    /// The device of networks and data.
    pub device: Device,
    /// The kind in which networks compute.
    pub precision: Precision,
    /// The settings of every optimizer.
    pub learning_rate: f64,
    /// Updates of the mixer alone, before any timing; a multiple of 5.
    pub filling: u64,
    /// Trajectories in the teacher's pool, few enough to be complete after the filling.
    pub pool: usize,
    /// Number of rounds that count.
    pub rounds: u64,
    /// Updates per round: a whole cycle of DMD2, which trains its student in one of five.
    pub updates: u64,
}

impl Workload {
    /// The network of `assets/fashion-mnist-teacher` on batches of 32.
    pub fn fashion_mnist(precision: Precision, rounds: u64) -> Self {
        Self {
            batch: 32,
            side: 32,
            unet: fashion_mnist(),
            weights: None,
            device: Device::Cpu,
            precision,
            learning_rate: 1e-4,
            filling: 300,
            pool: 32,
            rounds,
            updates: 5,
        }
    }

    /// One round of a tiny network, as a smoke test.
    pub fn tiny() -> Self {
        let unet = UNet2DConfig {
            sample_size: Some(SampleSize::Square(8)),
            block_out_channels: vec![8],
            attention_head_dim: Some(8),
            down_block_types: vec![DownBlockType::DownBlock2D],
            up_block_types: vec![UpBlockType::UpBlock2D],
            ..fashion_mnist()
        };
        let whole = Self::fashion_mnist(Precision::Float32, 1);
        Self { batch: 4, side: 8, unet, filling: 5, pool: 2, updates: 1, ..whole }
    }

    /// The schedule of every network.
    ///
    /// # Errors
    ///
    /// None: the settings are valid.
    pub fn schedule() -> Result<NoiseSchedule> {
        let config = VpConfig {
            beta_schedule: BetaSchedule::Linear,
            beta_start: 1e-4,
            beta_end: 0.02,
            ..VpConfig::default()
        };
        Ok(NoiseScheduleConfig::Vp(config).build()?)
    }

    /// A frozen network, channels last.
    ///
    /// # Errors
    ///
    /// If the settings of the network are invalid, or the weights do not fit it.
    pub fn teacher(&self) -> Result<NetworkDenoiser> {
        let placement =
            Placement { device: self.device, channels_last: true, ..Placement::default() };
        let unet = match &self.weights {
            Some(weights) => self.unet.build_from(placement, weights)?,
            None => self.unet.build(placement, 0)?,
        };
        unet.parameters().set_trainable(false);
        let output = PredictionType::VPrediction;
        let network = NetworkDenoiser::new(Model::UNet2D(unet), output, Self::schedule()?)?;
        Ok(network.with_precision(self.precision))
    }
}

/// The network of `assets/fashion-mnist-teacher`.
fn fashion_mnist() -> UNet2DConfig {
    use DownBlockType::{AttnDownBlock2D, DownBlock2D};
    use UpBlockType::{AttnUpBlock2D, UpBlock2D};
    UNet2DConfig {
        sample_size: Some(SampleSize::Square(32)),
        in_channels: 1,
        out_channels: 1,
        block_out_channels: vec![16, 32, 64, 96],
        layers_per_block: 1,
        norm_num_groups: 8,
        attention_head_dim: Some(32),
        down_block_types: vec![DownBlock2D, DownBlock2D, AttnDownBlock2D, DownBlock2D],
        up_block_types: vec![UpBlock2D, AttnUpBlock2D, UpBlock2D, UpBlock2D],
        num_class_embeds: Some(11),
        ..UNet2DConfig::default()
    }
}

/// `float32` or `bfloat16`, as typed.
///
/// # Errors
///
/// Lists the two valid names.
pub fn precision(name: &str) -> std::result::Result<Precision, String> {
    match name {
        "float32" => Ok(Precision::Float32),
        "bfloat16" => Ok(Precision::Bfloat16),
        _ => Err("expected float32 or bfloat16".to_owned()),
    }
}
