//! Training runs for diffusion models: a teacher from data, few-step students from a teacher, one loop for both.
//!
//! A [`Task`] returns losses; a [`Session`] updates the parameters, records, saves checkpoints and exports the model. A run
//! that was interrupted or killed is resumed on the same bits. A [`RunFolder`] contains everything of a run: its settings,
//! records, checkpoints, sample grids and the exported model.
//!
//! | for | there is |
//! | --- | --- |
//! | a run | [`Session`], [`SessionConfig`], [`Task`], [`Outcome`], [`Interrupt`] |
//! | training a teacher, distilling a student | [`TrainTask`], [`DistillTask`] |
//! | their settings, as TOML | [`TrainConfig`], [`DistillConfig`] |
//! | the folder of a run | [`RunFolder`], [`Checkpoint`], [`record`], [`tensorboard`], [`environment`], [`evidence`] |
//! | updates by hand | [`AdamW`], [`Ema`], [`lr_schedule`] |
//! | memory before a run | [`MemoryPlan`] |
//! | data of a config | [`data`] |
//! | screen and log | [`progress`], [`logging`] |
//!
//! # Example
//!
//! Trains a tiny network on two 8x8 images for two updates. The exported folder is one that diffusers reads.
//!
//! ```
//! use ddil_files::settings::Settings;
//! use ddil_trainer::{
//!     Interrupt, Outcome, RunFolder, Session, SessionConfig, TrainConfig, TrainTask,
//! };
//!
//! let folder = tempfile::tempdir()?;
//! # for (name, value) in [("a.png", 0_u8), ("b.png", 255)] {
//! #     let mut png = png::Encoder::new(std::fs::File::create(folder.path().join(name))?, 8, 8);
//! #     png.set_color(png::ColorType::Grayscale);
//! #     png.write_header()?.write_image_data(&[value; 64])?;
//! # }
//! let mut settings = Settings::parse(
//!     "train.toml",
//!     r#"
//!     data = { kind = "image_folder", batch_size = 2 }
//!     train = { updates = 2, sample_steps = 1, label_dropout = 0.0 }
//!     [model]
//!     in_channels = 1
//!     out_channels = 1
//!     block_out_channels = [8]
//!     layers_per_block = 1
//!     norm_num_groups = 2
//!     down_block_types = ["DownBlock2D"]
//!     up_block_types = ["UpBlock2D"]
//!     "#,
//! )?;
//! settings.set(&format!("data.path={}", folder.path().display()))?;
//! settings.set(&format!("run.folder={}/runs", folder.path().display()))?;
//! let config: TrainConfig = settings.build()?;
//!
//! let task = TrainTask::new(&config)?;
//! let run = RunFolder::create(&config.run.path(), &config)?;
//! let mut session = Session::start(task, SessionConfig::from(&config), run)?;
//! let Outcome::Completed { export } = session.run(&Interrupt::default())? else { unreachable!() };
//! assert!(export.join("unet/diffusion_pytorch_model.safetensors").is_file());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod crc32c;
mod error;

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod distill;
pub mod ema;
pub mod environment;
pub mod evidence;
mod holder;
pub mod interrupt;
pub mod logging;
pub mod lr_schedule;
pub mod memory;
pub mod optimizer;
pub mod progress;
pub mod record;
mod roster;
pub mod run_folder;
pub mod session;
pub mod state;
pub mod tensorboard;
pub mod train;
mod watch;

pub use checkpoint::Checkpoint;
pub use config::{DistillConfig, TrainConfig};
pub use ddil_files::Report;
pub use distill::DistillTask;
pub use ema::Ema;
pub use error::{Error, Result};
pub use interrupt::Interrupt;
pub use memory::MemoryPlan;
pub use optimizer::AdamW;
pub use run_folder::RunFolder;
pub use session::{Outcome, Session, SessionConfig, Task};
pub use train::TrainTask;

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
