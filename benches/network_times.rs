//! Times passes, training steps and loading of text-to-image U-Nets on demand, for `benches/peers/compare_networks.py`.
//!
//! `network_times THREADS CASE [FOLDER]` initialises and reads lines from standard input. Each is a round: the case is
//! timed once, and a line with the seconds is printed. So the caller can alternate rounds with another program's.

use std::hint::black_box;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ddil_libtorch::Autocast;
use ddil_models::{
    ConditionDownBlockType as Down, ConditionUpBlockType as Up, Model, NetworkConfig, PerLevel,
    Placement, UNet2DConditionConfig, UNet2DConditionInputs, UNet2DConditionModel, UnknownKeys,
    weights::{self, WeightFiles},
};
use ddil_trainer::{AdamW, AdamWConfig};
use tch::{Device, Kind, Tensor, kind};

type Failure = ddil_core::Report;

/// The inputs of a network.
struct Batch {
    sample: Tensor,
    timesteps: Tensor,
    states: Tensor,
}

impl Batch {
    fn new(shape: [i64; 4], width: i64, kind: Kind) -> Self {
        let random = |shape: &[i64]| Tensor::randn(shape, kind::FLOAT_CPU).to_kind(kind);
        Self {
            sample: random(&shape),
            timesteps: Tensor::full([shape[0]], 501, kind::INT64_CPU),
            states: random(&[shape[0], 77, width]),
        }
    }

    fn pass(&self, network: &UNet2DConditionModel) -> ddil_models::Result<Tensor> {
        let inputs = UNet2DConditionInputs::text(&self.states);
        network.forward(&self.sample, &self.timesteps, inputs)
    }
}

fn placement(kind: Kind, channels_last: bool) -> Placement {
    Placement { device: Device::Cpu, kind, channels_last }
}

/// A pass of Stable Diffusion 1.5's network.
struct Forward {
    network: UNet2DConditionModel,
    batch: Batch,
}

impl Forward {
    fn new(kind: Kind, channels_last: bool) -> Result<Self, Failure> {
        let network = UNet2DConditionConfig::sd15().build(placement(kind, channels_last), 0)?;
        network.parameters().set_trainable(false);
        Ok(Self { network, batch: Batch::new([1, 4, 64, 64], 768, kind) })
    }

    fn run(&self) -> Result<(), Failure> {
        let _no_grad = tch::no_grad_guard();
        drop(black_box(self.batch.pass(&self.network)?));
        Ok(())
    }
}

/// An update of a small network: noise prediction, with fused `AdamW`.
struct Training {
    network: UNet2DConditionModel,
    optimizer: AdamW,
    batch: Batch,
    noise: Tensor,
    autocast: Option<Kind>,
}

impl Training {
    fn new(autocast: Option<Kind>, channels_last: bool) -> Result<Self, Failure> {
        let config = UNet2DConditionConfig {
            block_out_channels: vec![64, 128, 128],
            down_block_types: vec![
                Down::CrossAttnDownBlock2D,
                Down::CrossAttnDownBlock2D,
                Down::DownBlock2D,
            ],
            up_block_types: vec![Up::UpBlock2D, Up::CrossAttnUpBlock2D, Up::CrossAttnUpBlock2D],
            layers_per_block: PerLevel::All(1),
            attention_head_dim: PerLevel::All(4),
            cross_attention_dim: PerLevel::All(256),
            ..UNet2DConditionConfig::default()
        };
        let network = config.build(placement(Kind::Float, channels_last), 0)?;
        network.set_training(true);
        let optimizer = AdamWConfig::default().build(network.parameters().learned())?;
        let batch = Batch::new([8, 4, 32, 32], 256, Kind::Float);
        let noise = batch.sample.randn_like();
        Ok(Self { network, optimizer, batch, noise, autocast })
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.optimizer.zero_grad()?;
        let output = {
            let _autocast =
                self.autocast.map(|kind| Autocast::new(Device::Cpu, kind)).transpose()?;
            self.batch.pass(&self.network)?
        };
        let loss = (output.to_kind(Kind::Float) - &self.noise).square().mean(Kind::Float);
        loss.backward();
        self.optimizer.step(1e-4)?;
        black_box(loss.double_value(&[]));
        Ok(())
    }
}

/// Reads every tensor of the file in place.
fn open(folder: &Path) -> Result<(), Failure> {
    drop(black_box(weights::read_all(WeightFiles::DIFFUSION.find(folder)?)?));
    Ok(())
}

/// Loads files into parameters.
fn load(folder: &Path) -> Result<(), Failure> {
    drop(black_box(Model::from_folder(
        folder,
        placement(Kind::Float, false),
        UnknownKeys::Refuse,
    )?));
    Ok(())
}

fn case(
    name: &str,
    folder: Option<PathBuf>,
) -> Result<Box<dyn FnMut() -> Result<(), Failure>>, Failure> {
    let channels_last = name.ends_with("channels last");
    let bfloat16 = name.contains("bfloat16");
    Ok(match name.split(',').next() {
        Some("forward") => {
            let kind = if bfloat16 { Kind::BFloat16 } else { Kind::Float };
            let forward = Forward::new(kind, channels_last)?;
            Box::new(move || forward.run())
        }
        Some("training step") => {
            let mut training = Training::new(bfloat16.then_some(Kind::BFloat16), channels_last)?;
            Box::new(move || training.run())
        }
        Some("open") => {
            let folder = folder.ok_or("open FOLDER")?;
            Box::new(move || open(&folder))
        }
        Some("load") => {
            let folder = folder.ok_or("load FOLDER")?;
            Box::new(move || load(&folder))
        }
        _ => return Err(format!("no case `{name}`").into()),
    })
}

fn main() -> Result<(), Failure> {
    const USAGE: &str = "network_times THREADS CASE [FOLDER]";
    let mut arguments = std::env::args().skip(1);
    tch::set_num_threads(arguments.next().ok_or(USAGE)?.parse()?);
    ddil_libtorch::keep_freed_pages();
    let mut run = case(&arguments.next().ok_or(USAGE)?, arguments.next().map(PathBuf::from))?;
    for line in std::io::stdin().lines() {
        line?;
        let started = Instant::now();
        run()?;
        println!("{}", started.elapsed().as_secs_f64());
        std::io::stdout().flush()?;
    }
    Ok(())
}
