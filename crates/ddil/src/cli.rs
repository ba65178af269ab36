//! The command line of `ddil`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Turns slow diffusion models into few-step students.
#[derive(Debug, Parser)]
#[command(name = "ddil", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a commented config file to start from.
    Init(InitArgs),
    /// Train a teacher on data.
    Train(RunArgs),
    /// Distil a teacher into a few-step student.
    Distill(DistillArgs),
    /// Draw samples from a model folder or a run.
    Sample(SampleArgs),
    /// Compare samples of a model, or a folder of images, with real data.
    Evaluate(EvaluateArgs),
    /// Write a run's student or a model elsewhere, in a form that other programs read.
    Export(ExportArgs),
    /// Check a model of diffusers, tensor by tensor, and write it as a folder to train and distil from.
    Import(ImportArgs),
    /// Say what a model folder, a checkpoint or a run is.
    Inspect(InspectArgs),
    /// Find the range of a dataset, channel by channel, to hold predictions in.
    Range(RangeArgs),
    /// Distil the Fashion-MNIST teacher with and without DDIL and compare the students.
    Demo(DemoArgs),
    /// Distil in many ways, with several seeds, and compare what comes of it.
    Compare(CompareArgs),
    /// Say what of this machine ddil can use, and what is wrong with it.
    Doctor(DoctorArgs),
}

/// Arguments of `ddil init`.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Which one; without it the presets are listed.
    pub(crate) preset: Option<String>,
    /// Where to write it; the default is the preset's name with `.toml`. Nothing is overwritten.
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
    /// Change the preset to the plain method, as published: every training state is noised data of the dataset.
    #[arg(long, requires = "preset")]
    pub(crate) plain: bool,
}

/// Arguments of `ddil distill`.
#[derive(Debug, Args)]
pub(crate) struct DistillArgs {
    /// Those that `ddil train` has too.
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// The plain method, as published, without DDIL: sets `mixing.priors` to the dataset alone and
    /// `mixing.pure_noise_at_tmax` to false.
    #[arg(long)]
    pub(crate) plain: bool,
}

/// Arguments of `ddil train` and `ddil distill`.
#[derive(Debug, Args)]
#[command(after_long_help = RUN_HELP)]
pub(crate) struct RunArgs {
    /// The config file; with --resume the run folder's own is taken.
    #[arg(required_unless_present = "resume")]
    pub(crate) config: Option<PathBuf>,
    /// Override a value, as in `--set run.seed=3`; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Go on with the run in this folder, from its last good checkpoint.
    #[arg(long, value_name = "RUN_FOLDER")]
    pub(crate) resume: Option<PathBuf>,
    /// Go on with the config's own run if its folder is there, or else start it: for jobs that are started again.
    #[arg(long = "continue", conflicts_with = "resume")]
    pub(crate) continues: bool,
    /// Check the config, the data and the teacher, say what would be done, and stop.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// For programs that start this one.
    #[command(flatten)]
    pub(crate) parent: ParentArgs,
}

/// For programs that start this one.
#[derive(Debug, Args)]
pub(crate) struct ParentArgs {
    /// Stop when the standard input closes, as at Ctrl-C: for programs that start this one and that it should not outlive.
    #[arg(long, hide_short_help = true)]
    pub(crate) stop_with_stdin: bool,
}

const RUN_HELP: &str = "\
Ctrl-C, or SIGTERM, finishes the step in progress, saves and ends with exit code 0; a second one ends at once. Exit \
codes: 0 done, or stopped and saved (the file status.json in the run folder has which); 1 failed; 3 a loss, a gradient \
or samples are NaN or infinite.";

/// Which samples, and how.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// Number of steps; the default is the model's own timesteps, or 50 for a teacher.
    #[arg(long)]
    pub(crate) steps: Option<u32>,
    /// Guidance scale; the default is the model's own, none for a student.
    #[arg(long)]
    pub(crate) guidance_scale: Option<f64>,
    /// Share of the noise that a DDIM step renews; the default is none.
    #[arg(long)]
    pub(crate) eta: Option<f64>,
    /// Seed of noise and classes.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// How the model steps, `ddim` or `lcm`, where not as its folder says: `lcm` for a teacher with an LCM-LoRA.
    #[arg(long)]
    pub(crate) sampler: Option<String>,
    /// What is done with predictions beyond the data's range, as TOML: `none`, or `{ kind = "clamp", low = -1, high = 1 }`;
    /// the default is the model's own.
    #[arg(long, value_name = "TOML")]
    pub(crate) thresholding: Option<String>,
    /// Samples in one call of the network; the default is 100, or 1 for text to image.
    #[arg(long)]
    pub(crate) batch_size: Option<u32>,
    /// `cpu`, `cuda` or `cuda:1`.
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// What convolutions and products are computed in: `float32` or `bfloat16`.
    #[arg(long, default_value = "float32")]
    pub(crate) precision: String,
    /// How images lie in memory: `channels_last`, which is faster, or `contiguous`.
    #[arg(long, default_value = "channels_last", hide_short_help = true)]
    pub(crate) memory_format: String,
    /// Threads of libtorch; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: u32,
    /// For programs that start this one.
    #[command(flatten)]
    pub(crate) parent: ParentArgs,
}

/// Arguments of `ddil sample`.
#[derive(Debug, Args)]
pub(crate) struct SampleArgs {
    /// A model folder, or a run folder, whose export is taken.
    pub(crate) model: PathBuf,
    /// Number of samples, per prompt where there are prompts; the default is 64, or 1 per prompt.
    #[arg(long, short)]
    pub(crate) num_samples: Option<u32>,
    /// Only this class, by name or number; the default goes through all of them.
    #[arg(long)]
    pub(crate) class: Option<String>,
    /// Draw a part of the samples of a seed: the first of them is this one, counted from 0.
    #[arg(long, value_name = "N", default_value_t = 0, hide_short_help = true)]
    pub(crate) first: u32,
    /// How many samples of the seed there are in all, of which a part is drawn; the default is no more than that part.
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) of: Option<u32>,
    /// What images of a text-to-image model are to show.
    #[command(flatten)]
    pub(crate) prompting: PromptArgs,
    /// Add the adapters in this file to the network's weights.
    #[arg(long, value_name = "FILE")]
    pub(crate) lora: Option<PathBuf>,
    /// How strongly the adapters act.
    #[arg(long, default_value_t = 1.0, requires = "lora")]
    pub(crate) lora_scale: f64,
    /// The file that is written: a grid as PNG, or the samples as bytes in a `.safetensors` file. The default is
    /// `samples.png`, or the next free of `samples-2.png`, `samples-3.png` and so on.
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
    /// Replace the file that --output names.
    #[arg(long)]
    pub(crate) force: bool,
    /// Also write every sample as a PNG of its own into this folder.
    #[arg(long)]
    pub(crate) folder: Option<PathBuf>,
    /// How.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// What the pictures of a text-to-image model are to show, and how large they are.
#[derive(Debug, Args)]
pub(crate) struct PromptArgs {
    /// What a picture is to show; may be given again.
    #[arg(long = "prompt", value_name = "PROMPT")]
    pub(crate) prompts: Vec<String>,
    /// More prompts, one a line; empty lines are passed over.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts_file: Option<PathBuf>,
    /// What the pictures are to be guided away from; the default is what the model is told of no prompt.
    #[arg(long)]
    pub(crate) negative_prompt: Option<String>,
    /// Height in pixels; the default is what the network was made for.
    #[arg(long)]
    pub(crate) height: Option<u32>,
    /// Width in pixels; the default is what the network was made for.
    #[arg(long)]
    pub(crate) width: Option<u32>,
}

/// Arguments of `ddil evaluate`.
#[derive(Debug, Args)]
pub(crate) struct EvaluateArgs {
    /// A model folder, a run folder, or a folder of images (PNG, JPEG, or `.safetensors` of `ddil sample`); `data` compares
    /// the data's training images with its held-out images.
    pub(crate) subject: PathBuf,
    /// Number of samples to draw.
    #[arg(long, short, default_value_t = 5000)]
    pub(crate) num_samples: u32,
    /// The real images: `fashion_mnist`, a folder of images, or a config file, whose `[data]` is taken.
    #[arg(long, default_value = "fashion_mnist")]
    pub(crate) data: PathBuf,
    /// A folder of held-out images to compare with, where the data is a folder; the default is its training images.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) reference: Option<PathBuf>,
    /// Which features are compared: `fashion_classifier`, for grey images of 32x32, or `raw_pixels`, for tiny images.
    #[arg(long, default_value = "fashion_classifier")]
    pub(crate) extractor: String,
    /// Also measure the Fréchet distance to the samples in this folder, `.safetensors` files of `ddil sample`.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) teacher_samples: Option<PathBuf>,
    /// Also measure at these numbers of steps, as in `1,2,8`; one row each.
    #[arg(long, value_name = "STEPS", value_delimiter = ',')]
    pub(crate) also_steps: Vec<u32>,
    /// Samples at those numbers of steps, the first of all; the default is --num-samples.
    #[arg(long, value_name = "N", requires = "also_steps")]
    pub(crate) also_samples: Option<u32>,
    /// Also measure the covariate shift at the model's own steps, on this many states per side; 0 does not.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) shift_samples: u32,
    /// Keep the first 20 samples at the model's own steps in this `.safetensors` file.
    #[arg(long, value_name = "FILE")]
    pub(crate) keep: Option<PathBuf>,
    /// Of `data`: also compare one half of the reference with the other, which is the distance of chance.
    #[arg(long)]
    pub(crate) halves: bool,
    /// Add the measurements to this file, an array.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// How.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Arguments of `ddil export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// A run folder, whose averaged student is taken, a model folder, or a file of adapters.
    pub(crate) source: PathBuf,
    /// The folder, or file, that is written; nothing is overwritten unless --force is given.
    pub(crate) output: PathBuf,
    /// `diffusers`, a folder that `DiffusionPipeline.from_pretrained` loads, or `single-file-unet`, the network's weights alone.
    #[arg(long, default_value = "diffusers")]
    pub(crate) format: String,
    /// What weights are cast to, `float32`, `float16` or `bfloat16`; the default leaves them as they are.
    #[arg(long)]
    pub(crate) dtype: Option<String>,
    /// The variant that stands in the names of the files, such as `fp16`, which readers have to ask for; the default is none.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// What one file of weights holds at most.
    #[arg(long, default_value = "10GB")]
    pub(crate) max_shard_size: String,
    /// Write adapters under the names of `diffusers` or of `kohya`.
    #[arg(long, value_name = "NAMES")]
    pub(crate) lora: Option<String>,
    /// The model that the adapters are for, where it is none of the known ones.
    #[arg(long, value_name = "MODEL")]
    pub(crate) base: Option<PathBuf>,
    /// Replace a model, or a file, that is there.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `ddil import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// A pipeline's folder as diffusers writes it, or that of a network alone.
    pub(crate) source: PathBuf,
    /// The folder that is written; nothing is overwritten unless --force is given.
    pub(crate) output: PathBuf,
    /// What weights are cast to: `float32`, `float16` or `bfloat16`.
    #[arg(long, default_value = "float32")]
    pub(crate) dtype: String,
    /// The variant that is read, such as `fp16`; the default is none, or the only one there is.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// The scheduler of a network that comes alone: a `scheduler_config.json`, or a folder or pipeline that has one.
    #[arg(long, value_name = "PATH")]
    pub(crate) scheduler_from: Option<PathBuf>,
    /// The pipeline that a network which comes alone is put into, in the place of that pipeline's own.
    #[arg(long, value_name = "PIPELINE")]
    pub(crate) parts_from: Option<PathBuf>,
    /// What one file of weights holds at most.
    #[arg(long, default_value = "10GB")]
    pub(crate) max_shard_size: String,
    /// Replace a model that is there.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `ddil inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A model folder, a run folder or a checkpoint: its folder, or `checkpoints/latest` of a run.
    pub(crate) path: PathBuf,
    /// As JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `ddil range`.
#[derive(Debug, Args)]
pub(crate) struct RangeArgs {
    /// A folder of PNG or JPEG files, or `fashion_mnist`.
    pub(crate) data: PathBuf,
    /// The share of values that may lie beyond the range at either end; the default is 0 for images, whose values end at
    /// black and white, and 0.0005 for latents.
    #[arg(long)]
    pub(crate) quantile: Option<f64>,
    /// How much the range is widened at either end, as a share of its width; the default is 0 for images and 0.1 for
    /// latents.
    #[arg(long)]
    pub(crate) margin: Option<f64>,
}

/// Arguments of `ddil demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The folder of the demonstration; nothing in it is overwritten unless --fresh is given.
    #[arg(long, default_value = "runs/demo")]
    pub(crate) folder: PathBuf,
    /// The teacher.
    #[arg(long, default_value = "assets/fashion-mnist-teacher")]
    pub(crate) teacher: PathBuf,
    /// Override a value of both students' config; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Samples that each model is measured on.
    #[arg(long, short, default_value_t = 500)]
    pub(crate) num_samples: u32,
    /// Remove what an earlier demonstration left in the folder.
    #[arg(long)]
    pub(crate) fresh: bool,
}

/// Arguments of `ddil compare`.
#[derive(Debug, Args)]
#[command(after_long_help = COMPARE_HELP)]
pub(crate) struct CompareArgs {
    /// The file that lists what is compared; `ddil init` has examples. A comparison that was stopped continues.
    pub(crate) matrix: PathBuf,
    /// Start cells over whose folder has other settings; the others stay.
    #[arg(long)]
    pub(crate) fresh: bool,
    /// List the cells and how far each is, and stop.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the name of every cell, one per line, and stop.
    #[arg(long, conflicts_with_all = ["fresh", "dry_run"])]
    pub(crate) list: bool,
    /// Train and measure this cell alone.
    #[arg(long, value_name = "NAME", allow_hyphen_values = true, conflicts_with_all = ["list", "dry_run"])]
    pub(crate) cell: Option<String>,
}

const COMPARE_HELP: &str = "\
Each cell is trained by `ddil distill` and measured by `ddil evaluate`, in processes of their own; the teacher's samples \
are drawn once, by `ddil sample`. Any number of processes can work on one comparison, on one machine or on many that \
share its folder: every cell has a lock, and a cell that another process has is left to it.

On a cluster, one cell per task, then the tables:

  ddil compare matrix.toml --list > cells.txt
  sbatch --array=1-$(wc -l < cells.txt) --signal=B:TERM@120 \\
    --wrap 'exec ddil compare matrix.toml --cell \"$(sed -n ${SLURM_ARRAY_TASK_ID}p cells.txt)\"'
  ddil compare matrix.toml

Exit codes of --cell: 0 the cell is done, was done before, or diverged, which is a result and recorded as one; 1 it \
failed, and the next call tries again; 75 it was stopped and saved, or another process is at work on it: run it again.";

/// Arguments of `ddil doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// As JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
