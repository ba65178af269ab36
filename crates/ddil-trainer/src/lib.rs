//! Training runs for diffusion models: a teacher from data, few-step students from a teacher, one loop for both.
//!
//! A [`Task`] returns losses; a [`Session`] updates the parameters, records, saves checkpoints and exports the model. A run
//! that was interrupted or killed is resumed on the same bits. A [`RunFolder`](run_folder::RunFolder) contains everything of a run: its settings,
//! records, checkpoints, sample grids and the exported model.
//!
//! | for | there is |
//! | --- | --- |
//! | a run | [`Session`], [`SessionConfig`], [`Task`], [`UpdateLoss`], [`Outcome`], [`Interrupt`] |
//! | training a teacher, distilling a student | [`TrainTask`], [`DistillTask`] |
//! | their settings, as TOML | [`config`] |
//! | the folder of a run | [`run_folder`], [`checkpoint`], [`RunCheckpoint`], [`record`], [`EventWriter`], [`RunEnvironment`], [`Evidence`] |
//! | updates by hand | [`AdamW`], [`Ema`], [`LrSchedule`] |
//! | memory before a run; the images of a run, or their labels alone | [`memory`]; [`images_for`], [`labels_for`] |
//! | screen and log | [`Progress`], [`Logging`] |
//!
//! # Example
//!
//! Trains a tiny network on two 8x8 images for two updates. The exported folder is one that diffusers reads.
//!
//! ```
//! use ddil_files::settings::Settings;
//! use ddil_trainer::config::TrainConfig;
//! use ddil_trainer::run_folder::RunFolder;
//! use ddil_trainer::{Interrupt, Outcome, Session, SessionConfig, TrainTask};
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

mod averaged;
pub mod checkpoint;
pub mod config;
mod crc32c;
mod data;
mod distill;
mod ema;
mod environment;
mod error;
mod evaluation;
mod evidence;
mod holder;
mod interrupt;
mod logging;
mod lr_schedule;
pub mod memory;
mod optimizer;
mod progress;
pub mod record;
mod roster;
pub mod run_folder;
mod session;
mod state;
mod teacher_classes;
mod tensorboard;
mod train;
mod watch;

pub use averaged::RunCheckpoint;
pub use data::{images_for, labels_for, read_fashion_mnist, read_images};
pub use ddil_files::Report;
pub use distill::DistillTask;
pub use ema::{Ema, EmaConfig};
pub use environment::{Environment, LoadedLibtorch, RunEnvironment, SessionEnvironment};
pub use error::{Error, Result};
pub use evidence::Evidence;
pub use interrupt::{Interrupt, when_stdin_closes};
pub use logging::Logging;
pub use lr_schedule::{Decay, LrSchedule};
pub use optimizer::{AdamW, AdamWConfig, ensure_finite};
pub use progress::Progress;
pub use session::{Outcome, Session, SessionConfig, Spent, Task, UpdateConfig, UpdateLoss};
pub use tensorboard::EventWriter;
pub use train::TrainTask;

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
