//! The command line of `ddil`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ddil_data::Captions;

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
#[expect(clippy::large_enum_variant, reason = "a process has one")]
pub(crate) enum Command {
    /// Write a commented config file to start from.
    Init(InitArgs),
    /// Train a teacher on data.
    Train(RunArgs),
    /// Distil a teacher into a few-step student.
    Distill(DistillArgs),
    /// Draw samples from a model folder or a run.
    Sample(SampleArgs),
    /// Measure the quality of a model's samples, or of a folder of images, against real images.
    Evaluate(EvaluateArgs),
    /// Export a run's student, or a model, in a format that other programs read.
    Export(ExportArgs),
    /// Check a diffusers model, tensor by tensor, and copy it into a folder to train or distil from.
    Import(ImportArgs),
    /// Show information about a model folder, a checkpoint or a run.
    Inspect(InspectArgs),
    /// Write a page to look at: a run or a comparison, with curves, samples, tables and settings.
    Report(ReportArgs),
    /// List the runs of a folder: state, updates, last figures, age, size.
    Runs(RunsArgs),
    /// Print each channel's value range in a dataset as a `[thresholding]` table.
    Range(RangeArgs),
    /// Distil the Fashion-MNIST teacher with and without DDIL, on all data and on poor data, and compare the students.
    Demo(DemoArgs),
    /// Run many distillations (all combinations of settings and seeds) and compare the students.
    Compare(CompareArgs),
    /// Check this machine: libtorch, CUDA, threads, data sets, disk space.
    Doctor(DoctorArgs),
}

/// Arguments of `ddil init`.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The preset to write; without it, the presets are listed.
    pub(crate) preset: Option<String>,
    /// The file to write; the default is `<preset>.toml`. An existing file is not overwritten.
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
    /// Change the preset to the plain, published method: every training state is a noised dataset sample.
    #[arg(long, requires = "preset")]
    pub(crate) plain: bool,
}

/// Arguments of `ddil distill`.
#[derive(Debug, Args)]
pub(crate) struct DistillArgs {
    /// The arguments shared with `ddil train`.
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Use the plain, published method without DDIL: sets `mixing.priors` to the dataset alone and
    /// `mixing.pure_noise_at_tmax` to false.
    #[arg(long)]
    pub(crate) plain: bool,
}

/// Arguments of `ddil train` and `ddil distill`.
#[derive(Debug, Args)]
#[command(after_long_help = RUN_HELP)]
pub(crate) struct RunArgs {
    /// The config file; with --resume, the default is the run folder's own.
    #[arg(required_unless_present = "resume")]
    pub(crate) config: Option<PathBuf>,
    /// Override a setting, as in `--set run.seed=3`; can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Resume the run in this folder from its last valid checkpoint.
    #[arg(long, value_name = "RUN_FOLDER")]
    pub(crate) resume: Option<PathBuf>,
    /// Resume the config's run if its folder exists, otherwise start it: for jobs that may be restarted.
    #[arg(long = "continue", conflicts_with = "resume")]
    pub(crate) continues: bool,
    /// Check the config, the data and the teacher, print the plan, and exit.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Options for parent processes.
    #[command(flatten)]
    pub(crate) parent: ParentArgs,
}

/// Options for parent processes.
#[derive(Debug, Args)]
pub(crate) struct ParentArgs {
    /// Stop as on Ctrl-C when standard input closes: for parent processes that this one must not outlive.
    #[arg(long, hide_short_help = true)]
    pub(crate) stop_with_stdin: bool,
}

const RUN_HELP: &str = "\
Ctrl-C, SIGTERM or SIGHUP (a closed terminal) finishes the current step, saves, and exits with code 0; a second one exits at once without saving. \
Exit codes: 0 done, or stopped and saved (status.json in the run folder tells which); 1 failed; 3 a loss, a gradient \
or samples are NaN or infinite.";

/// How to sample.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// Number of sampling steps; the default is the model's own timesteps, or 50 for a teacher.
    #[arg(long)]
    pub(crate) steps: Option<u32>,
    /// Guidance scale; the default is the model's own, which is none for a student.
    #[arg(long)]
    pub(crate) guidance_scale: Option<f64>,
    /// Eta of DDIM, from 0 (deterministic, the default) to 1: the share of the noise that is drawn anew in each step.
    #[arg(long)]
    pub(crate) eta: Option<f64>,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// The sampler: `ddim`, `lcm`, or for teachers `euler`, `dpm-solver` (DPM-Solver++ 2M) or `uni-pc`; the default is the
    /// model's own. Use `lcm` for a teacher with an LCM-LoRA.
    #[arg(long)]
    pub(crate) sampler: Option<String>,
    /// Use Karras' noise levels with `euler`, `dpm-solver` or `uni-pc`.
    #[arg(long)]
    pub(crate) karras_sigmas: bool,
    /// Treatment of predictions beyond the data's range, as TOML: `none`, or `{ kind = "clamp", low = -1, high = 1 }`;
    /// the default is the model's own.
    #[arg(long, value_name = "TOML")]
    pub(crate) thresholding: Option<String>,
    /// Samples per network call; the default is 100, or 1 for text to image.
    #[arg(long)]
    pub(crate) batch_size: Option<u32>,
    /// The device: `cpu`, `cuda` or `cuda:1`.
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// The precision of convolutions and matrix products: `float32` or `bfloat16`.
    #[arg(long, default_value = "float32")]
    pub(crate) precision: String,
    /// The memory layout of images: `channels_last`, which is faster, or `contiguous`.
    #[arg(long, default_value = "channels_last", hide_short_help = true)]
    pub(crate) memory_format: String,
    /// Number of libtorch threads; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: u32,
    /// Options for parent processes.
    #[command(flatten)]
    pub(crate) parent: ParentArgs,
}

/// Arguments of `ddil sample`.
#[derive(Debug, Args)]
pub(crate) struct SampleArgs {
    /// A model folder, a run folder with a model, or a checkpoint of a run: its folder, `checkpoints/latest` or
    /// `checkpoints/best`.
    pub(crate) model: PathBuf,
    /// Number of samples, in total or per prompt; the default is 64, or 1 per prompt.
    #[arg(long, short)]
    pub(crate) num_samples: Option<u32>,
    /// Draw only this class, given by name or number; the default cycles through all classes.
    #[arg(long)]
    pub(crate) class: Option<String>,
    /// Draw only a part of a seed's samples: the index of the first one, counted from 0.
    #[arg(long, value_name = "N", default_value_t = 0, hide_short_help = true)]
    pub(crate) first: u32,
    /// The total number of samples of the seed, of which a part is drawn; the default ends with that part.
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) of: Option<u32>,
    /// Options of text-to-image models.
    #[command(flatten)]
    pub(crate) prompting: PromptArgs,
    /// Add the adapters in this file to the network's weights.
    #[arg(long, value_name = "FILE")]
    pub(crate) lora: Option<PathBuf>,
    /// The strength of the adapters.
    #[arg(long, default_value_t = 1.0, requires = "lora")]
    pub(crate) lora_scale: f64,
    /// The output file: a grid as PNG, or the samples as bytes in a `.safetensors` file. A file of that name is
    /// replaced. The default is the first of `samples.png`, `samples-2.png`, `samples-3.png` and so on that does not
    /// exist.
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
    /// Also write each sample as a separate PNG into this folder.
    #[arg(long)]
    pub(crate) folder: Option<PathBuf>,
    /// How to sample.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Options of text-to-image models.
#[derive(Debug, Args)]
pub(crate) struct PromptArgs {
    /// A prompt: what the image should show; can be repeated.
    #[arg(long = "prompt", value_name = "PROMPT")]
    pub(crate) prompts: Vec<String>,
    /// A file of more prompts: one per line, or `.jsonl`, `.csv`, or COCO's `captions_*.json`, of which the first
    /// caption of each image is used.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts_file: Option<PathBuf>,
    /// The prompt to guide away from; the default is the model's encoding of an empty prompt.
    #[arg(long)]
    pub(crate) negative_prompt: Option<String>,
    /// Height in pixels; the default is the network's own.
    #[arg(long)]
    pub(crate) height: Option<u32>,
    /// Width in pixels; the default is the network's own.
    #[arg(long)]
    pub(crate) width: Option<u32>,
}

/// Options of `ddil evaluate` for images of prompts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Text to image")]
pub(crate) struct EvaluatePromptArgs {
    /// The prompts that a text-to-image model draws, or of the images in a folder: a text file with one prompt per line,
    /// .jsonl, .csv, or COCO's captions_*.json. Images in a folder are matched by their names.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["num_samples", "also_samples", "shift_samples", "teacher_samples", "halves", "data"]
    )]
    pub(crate) prompts: Option<PathBuf>,
    /// Which captions of an image are prompts.
    #[arg(long, requires = "prompts", value_enum, default_value_t = CaptionChoice::First)]
    pub(crate) captions: CaptionChoice,
    /// Use only this many prompts, the first ones.
    #[arg(long, value_name = "N", requires = "prompts")]
    pub(crate) max_prompts: Option<u32>,
    /// Images to draw for each prompt; from 2 on, their diversity is measured. For images in files the number is found.
    #[arg(long, value_name = "N", requires = "prompts", default_value_t = 1)]
    pub(crate) images_per_prompt: u32,
    /// The prompt to guide away from; the default is the model's encoding of an empty prompt.
    #[arg(long, value_name = "TEXT", requires = "prompts")]
    pub(crate) negative_prompt: Option<String>,
    /// Draw with this text before each prompt, as in "A photo of"; a space is added. The CLIP score compares with the
    /// prompt alone.
    #[arg(long, value_name = "TEXT", requires = "prompts")]
    pub(crate) prompt_prefix: Option<String>,
    /// Draw with this text after each prompt, as in ", highly detailed". The CLIP score compares with the prompt alone.
    #[arg(long, value_name = "TEXT", requires = "prompts")]
    pub(crate) prompt_suffix: Option<String>,
    /// CLIP, for the CLIP score: a transformers folder with config.json, model.safetensors and the tokenizer.
    #[arg(long, value_name = "FOLDER", requires = "prompts")]
    pub(crate) clip: Option<PathBuf>,
    /// LPIPS, for the diversity of the images of a prompt: a TorchScript file that compares two batches of images in
    /// [-1, 1].
    #[arg(long, value_name = "FILE", requires = "prompts")]
    pub(crate) lpips: Option<PathBuf>,
    /// Height of the images in pixels; the default is the size that the model was trained on.
    #[arg(long, requires = "prompts")]
    pub(crate) height: Option<u32>,
    /// Width of the images in pixels; the default is the size that the model was trained on.
    #[arg(long, requires = "prompts")]
    pub(crate) width: Option<u32>,
    /// A documented setting of prompts, reference and sizes, checked and named in the results: docs/EVALUATE.md.
    #[arg(long, requires = "prompts", value_enum)]
    pub(crate) protocol: Option<Protocol>,
}

/// Which captions of an image are prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CaptionChoice {
    /// The first one.
    First,
    /// Each of them.
    All,
}

impl From<CaptionChoice> for Captions {
    fn from(choice: CaptionChoice) -> Self {
        match choice {
            CaptionChoice::First => Self::First,
            CaptionChoice::All => Self::All,
        }
    }
}

/// A documented protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// The 5000 validation images of COCO 2017, the first caption of each, one image per caption, 512x512 pixels.
    #[value(name = "coco2017-5k")]
    Coco2017,
}

impl Protocol {
    /// Its name.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Coco2017 => "coco2017-5k",
        }
    }
}

/// Arguments of `ddil evaluate`.
#[derive(Debug, Args)]
pub(crate) struct EvaluateArgs {
    /// What to measure: a model folder, a run folder, a checkpoint of a run, or a folder of images (PNG, JPEG, or `.safetensors` written by
    /// `ddil sample`); `data` compares the data's training images with its held-out images.
    pub(crate) subject: PathBuf,
    /// Number of samples to draw.
    #[arg(long, short, default_value_t = 5000)]
    pub(crate) num_samples: u32,
    /// The training data: `fashion_mnist`, a folder of images, or a config file with a `[data]` table. The default is the
    /// data of a run, and Fashion-MNIST for `data` and for models of its classes.
    #[arg(long)]
    pub(crate) data: Option<PathBuf>,
    /// The images to compare with: a folder of images of any sizes, `fashion_mnist`, or a file of statistics
    /// (.safetensors of --save-statistics, .npz of pytorch-fid or clean-fid). The default is the data's held-out images,
    /// or its training images if there are none.
    #[arg(long, value_name = "PATH")]
    pub(crate) reference: Option<PathBuf>,
    /// The features to compare: a TorchScript file such as inception-2015-12-05.pt, a transformers folder (`clip`,
    /// `clip_vision_model`, `dinov2`), `raw_pixels` for tiny images, or `fashion_classifier` for 32x32 greyscale images of
    /// clothing, the default for Fashion-MNIST.
    #[arg(long, value_name = "NAME|FILE|FOLDER")]
    pub(crate) extractor: Option<String>,
    /// How images are converted: `clean-fid` (the default for inception-2015-12-05.pt), `pytorch-fid`, `torch-fidelity`,
    /// `imagenet`, `clip`, or JSON. Other TorchScript files require it; a transformers folder has its own.
    #[arg(long, value_name = "INPUT", requires = "extractor")]
    pub(crate) extractor_input: Option<String>,
    /// Pass `true` to a TorchScript file as a second argument, to get features instead of class scores; implied for
    /// inception-2015-12-05.pt.
    #[arg(long, requires = "extractor")]
    pub(crate) return_features: bool,
    /// Write the features and statistics of SUBJECT (of the reference, if it is `data`) to this new .safetensors file,
    /// for --reference. Without anything to compare with, only this is done.
    #[arg(long, value_name = "FILE")]
    pub(crate) save_statistics: Option<PathBuf>,
    /// Also estimate the standard error of each metric, from this many random halves of the images; 20 is usual, 0 is off.
    #[arg(long, value_name = "HALVES", default_value_t = 0)]
    pub(crate) standard_errors: u32,
    /// Also measure the Fréchet distance to the samples in this folder (`.safetensors` files written by `ddil sample`).
    #[arg(long, value_name = "FOLDER")]
    pub(crate) teacher_samples: Option<PathBuf>,
    /// For SUBJECT a folder of `.safetensors` files of `ddil sample`: the model that drew them. Measures whether samples
    /// show their class: sample `i` is of class `i` modulo the number of classes, so the files must be all samples of one
    /// seed from the first on, drawn without `--class`.
    #[arg(long, value_name = "MODEL", conflicts_with = "prompts")]
    pub(crate) classes_of: Option<PathBuf>,
    /// Also measure at these numbers of steps, as in `1,2,8`, with one row each.
    #[arg(long, value_name = "STEPS", value_delimiter = ',')]
    pub(crate) also_steps: Vec<u32>,
    /// Number of samples at those numbers of steps; the default is --num-samples.
    #[arg(long, value_name = "N", requires = "also_steps")]
    pub(crate) also_samples: Option<u32>,
    /// Also measure the covariate shift at the model's own number of steps, on this many states per side; 0 is off.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) shift_samples: u32,
    /// Save the first 20 samples at the model's own number of steps to this `.safetensors` file.
    #[arg(long, value_name = "FILE")]
    pub(crate) keep: Option<PathBuf>,
    /// Keep features in this folder while they are computed, so that the same command continues after Ctrl-C; those of a
    /// reference stay there. The default is the user's cache, for 1000 images or more.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) features: Option<PathBuf>,
    /// With `data`: also compare one half of the reference with the other, to show the distance due to chance.
    #[arg(long)]
    pub(crate) halves: bool,
    /// Append the measurements to the array in this JSON file.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// How to sample.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Options for images of prompts.
    #[command(flatten)]
    pub(crate) prompting: EvaluatePromptArgs,
}

/// Arguments of `ddil export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// A run folder (its averaged student is exported), a model folder, or a file of adapters.
    pub(crate) source: PathBuf,
    /// The folder or file to write; nothing is overwritten without --force.
    pub(crate) output: PathBuf,
    /// The format: `diffusers`, a folder for `DiffusionPipeline.from_pretrained`, or `single-file-unet`, the network's
    /// weights alone.
    #[arg(long, default_value = "diffusers")]
    pub(crate) format: String,
    /// The type to cast weights to: `float32`, `float16` or `bfloat16`; the default leaves them unchanged.
    #[arg(long)]
    pub(crate) dtype: Option<String>,
    /// The variant in the names of the files, such as `fp16`, which readers must then request; the default is none.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// The maximum size of one file of weights.
    #[arg(long, default_value = "10GB")]
    pub(crate) max_shard_size: String,
    /// For adapters: the naming scheme of the output, `diffusers` or `kohya`; or `merged`, the whole model with the
    /// adapter of a run in its weights.
    #[arg(long, value_name = "NAMES")]
    pub(crate) lora: Option<String>,
    /// For adapters: the model they belong to, if it is not one of the known models.
    #[arg(long, value_name = "MODEL")]
    pub(crate) base: Option<PathBuf>,
    /// Overwrite an existing model or file.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `ddil import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The folder of a pipeline as diffusers writes it, or of a network alone.
    pub(crate) source: PathBuf,
    /// The folder to write; nothing is overwritten without --force.
    pub(crate) output: PathBuf,
    /// The type to cast weights to: `float32`, `float16` or `bfloat16`.
    #[arg(long, default_value = "float32")]
    pub(crate) dtype: String,
    /// The variant to read, such as `fp16`; the default is the files without a variant, or the only variant there is.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// The scheduler for a network alone: a `scheduler_config.json`, or a folder or pipeline that contains one.
    #[arg(long, value_name = "PATH")]
    pub(crate) scheduler_from: Option<PathBuf>,
    /// The pipeline that provides all other parts for a network alone.
    #[arg(long, value_name = "PIPELINE")]
    pub(crate) parts_from: Option<PathBuf>,
    /// The maximum size of one file of weights.
    #[arg(long, default_value = "10GB")]
    pub(crate) max_shard_size: String,
    /// Overwrite an existing model.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `ddil inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A model folder, a run folder or a checkpoint (its folder, or `checkpoints/latest` of a run).
    pub(crate) path: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `ddil report`.
#[derive(Debug, Args)]
#[command(after_long_help = REPORT_HELP)]
pub(crate) struct ReportArgs {
    /// A run folder or the folder of a comparison.
    pub(crate) folder: PathBuf,
    /// The file to write; the default is `report.html` in the folder. A file that is not a report is not replaced.
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
    /// Renew the report whenever files of the folder change, until the run has ended or Ctrl-C.
    #[arg(long)]
    pub(crate) watch: bool,
}

const REPORT_HELP: &str = "\
The report is one HTML file that needs no network and no server: open it in a browser. `ddil train`, `ddil distill` and \
`ddil compare` write it at their end. While a run is in progress, the page reloads itself every 10 seconds, and --watch \
renews it. The teacher's grid beside the student's is samples/teacher.png of the run folder. A distillation with \
output.sample_interval above 0 draws it; for another run, or to draw it again:

  ddil sample TEACHER --output RUN/samples/teacher.png";

/// Arguments of `ddil runs`.
#[derive(Debug, Args)]
pub(crate) struct RunsArgs {
    /// The folder that contains run folders, directly or below; `ddil compare` puts its runs into `cells/`.
    #[arg(default_value = "runs")]
    pub(crate) folder: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `ddil range`.
#[derive(Debug, Args)]
pub(crate) struct RangeArgs {
    /// A folder of PNG or JPEG files, a folder of encoded data, or `fashion_mnist`.
    pub(crate) data: PathBuf,
    /// The share of values that may lie outside the range at each end; the default is 0 for images, whose values end at
    /// black and white, and 0.0005 for latents.
    #[arg(long)]
    pub(crate) quantile: Option<f64>,
    /// How far the range is extended at each end, as a share of its width; the default is 0 for images and 0.1 for
    /// latents.
    #[arg(long)]
    pub(crate) margin: Option<f64>,
}

/// Arguments of `ddil demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The folder of the demo; an earlier demo in it is continued.
    #[arg(long, default_value = "runs/demo")]
    pub(crate) folder: PathBuf,
    /// The teacher's model folder.
    #[arg(long, default_value = "assets/fashion-mnist-teacher")]
    pub(crate) teacher: PathBuf,
    /// Override a setting of all students; can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Number of samples on which each model is measured.
    #[arg(long, short, default_value_t = 500)]
    pub(crate) num_samples: u32,
    /// Delete the results of an earlier demo and start over.
    #[arg(long)]
    pub(crate) fresh: bool,
}

/// Arguments of `ddil compare`.
#[derive(Debug, Args)]
#[command(after_long_help = COMPARE_HELP)]
pub(crate) struct CompareArgs {
    /// The file that lists what to compare; `ddil init` has examples. A comparison that was stopped continues.
    pub(crate) matrix: PathBuf,
    /// Start over the cells whose folder was made with other settings; the others stay.
    #[arg(long)]
    pub(crate) fresh: bool,
    /// List the cells and the progress of each, and exit.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the name of every cell, one per line, and exit.
    #[arg(long, conflicts_with_all = ["fresh", "dry_run"])]
    pub(crate) list: bool,
    /// Train and measure only this cell.
    #[arg(long, value_name = "NAME", allow_hyphen_values = true, conflicts_with_all = ["list", "dry_run"])]
    pub(crate) cell: Option<String>,
}

const COMPARE_HELP: &str = "\
Each cell is trained by `ddil distill` and measured by `ddil evaluate`, in separate processes; the teacher's samples are \
drawn once, by `ddil sample`. Any number of processes can work on one comparison, on one machine or on many that share \
its folder: every cell has a lock, and a cell that another process works on is skipped.

On a cluster, run one cell per task, then write the tables:

  ddil compare matrix.toml --list > cells.txt
  sbatch --array=1-$(wc -l < cells.txt) --signal=B:TERM@120 \\
    --wrap 'exec ddil compare matrix.toml --cell \"$(sed -n ${SLURM_ARRAY_TASK_ID}p cells.txt)\"'
  ddil compare matrix.toml

Exit codes of --cell: 0 the cell is done, was done before, or diverged, which is recorded as a result; 1 it failed, and \
the next call tries again; 75 it was stopped and saved, or another process works on it: run it again.";

/// Arguments of `ddil doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
