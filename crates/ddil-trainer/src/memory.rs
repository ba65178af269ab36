//! The memory that a distillation will need, estimated from settings alone: no weights are read or required.

mod activations;

use std::fmt;
use std::path::Path;

use ddil_core::{BufferConfig, Denoiser, StorageKind, StudentPolicy, TeacherStates};
use ddil_files::Invalid;
use ddil_losses::{ObjectiveConfig, Requirements, TeacherGuidance};
use ddil_models::{ClipTextConfig, ModelConfig, NetworkConfig, UnknownKeys};
use ddil_pipelines::Pipeline;

pub use self::activations::{Activations, PassShape};
use crate::config::{DistillConfig, LoraSection, LoraTargets, Precision};
use crate::error::{Error, Result};
use crate::roster::{CriticForm, Roster, StudentForm};

/// Bytes of a weight, which is in single precision at any run precision.
const WEIGHT: u64 = 4;
/// Bytes of a value in half precision.
const HALF: u64 = 2;

/// An estimate of the memory that a distillation will need.
///
/// Weights, gradients, the optimizer's state and moving averages are exact. Activations are estimated from the shapes
/// of the weights, see [`Activations::of`].
///
/// Compared on the CPU with the peak of resident memory, less the 170 MB of program and libtorch: the plan was 18 % too
/// low for progressive distillation of 8.6 million weights (batches of 8 latents of 32x32, where activations are three
/// quarters of the total), 16 % under autocast to bfloat16, and 6 % for a latent consistency model of 34 million
/// weights (batches of 4, 24x24). The difference is scratch memory and the allocator's overhead; leave a fifth free.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    /// The device of the run.
    pub device: String,
    /// The precision of convolutions and matrix products.
    pub precision: Precision,
    /// Samples per update.
    pub batch_size: u32,
    /// Channels, height and width of a sample.
    pub sample_shape: [i64; 3],
    /// Memory in use throughout the run.
    pub held: Vec<Row>,
    /// Memory of each phase, of which only the largest counts.
    pub phases: Vec<Row>,
    /// Memory on disk, without checkpoints.
    pub on_disk: Vec<Row>,
}

/// One line of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What the memory is for.
    pub name: String,
    /// Number of values, for weights.
    pub values: Option<u64>,
    /// Bytes.
    pub bytes: u64,
}

impl MemoryPlan {
    /// Plans a run.
    ///
    /// # Errors
    ///
    /// Errors of the config and of the teacher's settings; the teacher's weights are not read.
    ///
    /// # Example
    ///
    /// ```no_run
    /// use ddil_trainer::config::DistillConfig;
    /// use ddil_trainer::memory::MemoryPlan;
    ///
    /// let mut config = DistillConfig::default();
    /// config.teacher.path = "stable-diffusion-v1-5".into();
    /// println!("{}", MemoryPlan::of(&config)?);
    /// # Ok::<_, ddil_trainer::Error>(())
    /// ```
    pub fn of(config: &DistillConfig) -> Result<Self> {
        let teacher = Pipeline::open_without_weights(&config.teacher.path)?;
        let networks = Networks::new(config, &teacher)?;
        let sample_shape = sample_shape(config, &teacher)?;
        ensure_countable(config.data.batch_size, sample_shape)?;
        let on_cpu = config.run.device == "cpu";
        let pass = PassShape {
            batch: config.data.batch_size.into(),
            size: [sample_shape[1], sample_shape[2]].map(|side| side as u64),
            tokens: networks.text.tokens,
            computed_bytes: computed_bytes(config),
            checkpointing: config.run.activation_checkpointing,
            normed_bytes: if on_cpu { computed_bytes(config) } else { WEIGHT },
            fused_norms: on_cpu && config.run.channels_last,
        };
        let mut held = networks.held();
        let Stores { in_memory, on_disk } = Stores::of(config, &networks, sample_shape);
        held.extend(in_memory);
        let phases = networks.phases(config, pass);
        Ok(Self {
            device: config.run.device.clone(),
            precision: config.run.precision,
            batch_size: config.data.batch_size,
            sample_shape,
            held,
            phases,
            on_disk,
        })
    }

    /// The total in use throughout the run.
    pub fn held_bytes(&self) -> u64 {
        self.held.iter().fold(0, |sum, row| sum.saturating_add(row.bytes))
    }

    /// The peak.
    pub fn peak(&self) -> u64 {
        let most = self.phases.iter().map(|row| row.bytes).max().unwrap_or(0);
        self.held_bytes().saturating_add(most)
    }
}

impl Row {
    fn weights(name: impl Into<String>, values: u64) -> Self {
        Self { name: name.into(), values: Some(values), bytes: values * WEIGHT }
    }

    fn bytes(name: impl Into<String>, bytes: u64) -> Self {
        Self { name: name.into(), values: None, bytes }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let precision = match self.precision {
            Precision::Float32 => "float32",
            Precision::Bfloat16 => "bfloat16 by autocast",
        };
        let [channels, height, width] = self.sample_shape;
        writeln!(
            f,
            "memory on {}, {precision}, batches of {} samples {channels}x{height}x{width}",
            self.device, self.batch_size
        )?;
        let line = |f: &mut fmt::Formatter<'_>, row: &Row| {
            let values =
                row.values.map_or(String::new(), |n| format!("{:.1} M values", n as f64 / 1e6));
            writeln!(f, "  {:<46} {values:>18} {:>12}", row.name, human(row.bytes))
        };
        self.held.iter().try_for_each(|row| line(f, row))?;
        line(f, &Row::bytes("total held throughout", self.held_bytes()))?;
        self.phases.iter().try_for_each(|row| line(f, row))?;
        line(f, &Row::bytes("peak, about", self.peak()))?;
        self.on_disk.iter().try_for_each(|row| line(f, row))?;
        write!(
            f,
            "  (activations are estimates; libtorch itself, scratch memory of convolutions and pixel data are not included: leave a fifth free)"
        )
    }
}

/// Maximum number of pixels of a batch: beyond it the bytes would overflow, and no machine has as many.
const MAX_PIXELS: i64 = 1 << 31;

fn ensure_countable(batch_size: u32, [_, height, width]: [i64; 3]) -> Result<()> {
    let pixels = height.saturating_mul(width).saturating_mul(batch_size.into());
    if pixels <= MAX_PIXELS {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new(
        "data.batch_size",
        format!("{batch_size} samples of {height}x{width}"),
        format!("at most {MAX_PIXELS} pixels or latents in total"),
    )))
}

/// Bytes in a suitable unit.
fn human(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

fn computed_bytes(config: &DistillConfig) -> u64 {
    match config.run.precision {
        Precision::Float32 => WEIGHT,
        Precision::Bfloat16 => HALF,
    }
}

/// Names and shapes of a network's weights.
type Shapes = Vec<(String, Vec<i64>)>;

/// The networks of a run, by the shapes of their weights.
struct Networks {
    teacher: Shapes,
    student: Shapes,
    /// Number of trained values: the student's own, or those of an adapter.
    trained: u64,
    has_adapter: bool,
    critic: Option<Shapes>,
    head: u64,
    target: bool,
    /// Number of timesteps at which the student is trained.
    grid_len: u64,
    text: Text,
}

/// The sizes of a text-to-image model's other parts.
#[derive(Default)]
struct Text {
    tokens: u64,
    /// Bytes of the conditioning of one prompt.
    prompt_bytes: u64,
    encoders: u64,
    autoencoder: u64,
}

fn count(shapes: &Shapes) -> u64 {
    shapes.iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum()
}

impl Networks {
    fn new(config: &DistillConfig, teacher: &Pipeline) -> Result<Self> {
        let teacher_model = teacher.network.config();
        let shapes_of = |model: &ModelConfig| -> Result<Shapes> {
            Ok(model.without_values()?.parameters().shapes())
        };
        let (requirements, grid_len) = requirements(config, teacher)?;
        let shape = sample_shape(config, teacher)?;
        let roster = Roster::first(config, requirements, teacher_model.clone(), shape)?;
        let (teacher_shapes, student) =
            (shapes_of(&roster.teacher)?, shapes_of(roster.student_model())?);
        let trained = match &roster.student {
            StudentForm::Adapter(lora) => adapter_values(lora, &student),
            StudentForm::Network(_) => count(&student),
        };
        let critic = roster.critic.as_ref().map(|critic| shapes_of(&critic.model));
        let head = roster.critic.as_ref().map_or(Ok(0), CriticForm::head_values)?;
        Ok(Self {
            student,
            trained,
            has_adapter: matches!(roster.student, StudentForm::Adapter(_)),
            critic: critic.transpose()?,
            head,
            target: roster.target_decay.is_some(),
            grid_len,
            text: Text::of(teacher, &teacher_model)?,
            teacher: teacher_shapes,
        })
    }

    fn held(&self) -> Vec<Row> {
        let mut rows = vec![Row::weights("teacher", count(&self.teacher))];
        let trained = self.trained;
        let part = if self.has_adapter { "student's adapter" } else { "student" };
        let mut of_student = vec![
            (part.to_owned(), trained),
            (format!("{part}: gradients"), trained),
            (format!("{part}: optimizer"), 2 * trained),
            (format!("{part}: moving average"), trained),
            (format!("{part}: network of the moving average"), trained),
        ];
        if self.target {
            of_student.push((format!("{part}: target"), trained));
        }
        rows.extend(of_student.into_iter().map(|(name, values)| Row::weights(name, values)));
        if let Some(critic) = &self.critic {
            let values = count(critic) + self.head;
            let name = if self.head > 0 { "critic with head" } else { "critic" };
            rows.push(Row::weights(name, values));
            rows.push(Row::weights(format!("{name}: gradients"), values));
            rows.push(Row::weights(format!("{name}: optimizer"), 2 * values));
        }
        rows
    }

    fn phases(&self, config: &DistillConfig, pass: PassShape) -> Vec<Row> {
        let copies = |shapes: &Shapes| match config.run.precision {
            Precision::Float32 => 0,
            // Autocast keeps its casts of the weights as long as the pass and its graph exist.
            Precision::Bfloat16 => count(shapes) * HALF,
        };
        let student = Activations::of(&self.student, pass);
        let passes = if needs_two_passes(config.teacher.guidance) { 2 } else { 1 };
        let teacher_pass = PassShape { batch: passes * pass.batch, ..pass };
        let teacher =
            Activations::of(&self.teacher, teacher_pass).inference() + copies(&self.teacher);
        let mut updating = student.kept_down + student.kept_up + copies(&self.student);
        let mut rows = Vec::new();
        let mut evaluating = teacher.max(student.recomputed + student.largest);
        if let Some(critic) = &self.critic {
            let of_critic = Activations::of(critic, pass);
            evaluating = evaluating.max(of_critic.inference() + copies(critic));
            evaluating = evaluating.max(of_critic.recomputed + of_critic.largest);
            let adversarial = if self.head > 0 { of_critic.kept_down } else { 0 };
            // The adversarial gradient passes through the critic's down path; in its own phase the critic classifies
            // both kinds.
            updating += adversarial;
            let own = of_critic.training() + copies(critic) + 2 * adversarial;
            rows.push(Row::bytes("in an update of the critic", own));
        }
        rows.insert(0, Row::bytes("in an update of the student", updating + evaluating));
        let rollout = Activations::of(&self.student, pass).inference() + copies(&self.student);
        rows.push(Row::bytes("in rollouts", teacher.max(rollout)));
        let Text { encoders, autoencoder, .. } = self.text;
        if encoders + autoencoder > 0 {
            let parts = (encoders + autoencoder) * WEIGHT;
            rows.push(Row::bytes("in encoding the data, before the first update", parts));
        }
        rows
    }
}

/// Whether guidance evaluates the teacher twice per sample.
fn needs_two_passes(guidance: TeacherGuidance) -> bool {
    match guidance {
        TeacherGuidance::Cfg { scale } => (scale - 1.0).abs() > f64::EPSILON,
        TeacherGuidance::CfgRange { .. } => true,
        TeacherGuidance::Embedded { .. } | TeacherGuidance::BakedIn => false,
    }
}

/// The networks that the method requires, and the number of timesteps of its training grid.
fn requirements(config: &DistillConfig, teacher: &Pipeline) -> Result<(Requirements, u64)> {
    let schedule = teacher.network.schedule();
    let output = teacher.network.prediction_type();
    let objective: ObjectiveConfig = config.objective.clone().trained_to_predict(output);
    let steps = config.student.stages.first().copied().unwrap_or(1);
    let grid = objective.training_grid(schedule, steps)?;
    Ok((objective.build(schedule, &grid)?.requirements(), grid.len() as u64))
}

/// Values of adapters: for each layer, `rank` times the sum of its inputs (times the area of its kernel) and its
/// outputs.
fn adapter_values(lora: &LoraSection, shapes: &Shapes) -> u64 {
    let default = ddil_models::LoraConfig::default().targets;
    let targets = match &lora.targets {
        LoraTargets::Default => &default,
        LoraTargets::Named(names) => names,
    };
    let matches = |name: &str, target: &String| {
        name.strip_suffix(target.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let values = shapes.iter().filter_map(|(name, shape)| {
        let name = name.strip_suffix(".weight")?;
        let (&out, inputs) = shape.split_first().filter(|(_, inputs)| !inputs.is_empty())?;
        let hit = targets.iter().any(|target| matches(name, target));
        hit.then(|| (out + inputs.iter().product::<i64>()) as u64)
    });
    u64::from(lora.rank) * values.sum::<u64>()
}

/// Channels, height and width of the networks' samples.
fn sample_shape(config: &DistillConfig, teacher: &Pipeline) -> Result<[i64; 3]> {
    let own = teacher.card.image_shape;
    let Some(side) = config.data.resolution.filter(|_| teacher.parts.class().is_text_to_image())
    else {
        return Ok(own);
    };
    let vae = teacher.parts.autoencoder_config()?;
    let side = i64::from(side) >> (vae.block_out_channels.len() - 1);
    Ok([own[0], side, side])
}

impl Text {
    /// Sizes of the parts that the pipeline has.
    fn of(teacher: &Pipeline, network: &ModelConfig) -> Result<Self> {
        let mut text = Self::default();
        if !teacher.parts.class().is_text_to_image() {
            return Ok(text);
        }
        let folder = teacher.parts.path();
        for name in ["text_encoder", "text_encoder_2"] {
            let Some(file) = config_in(folder, name) else { continue };
            let config = ClipTextConfig::from_file(file, UnknownKeys::Refuse)?;
            text.tokens = config.max_position_embeddings.into();
            text.encoders += count(&config.parameter_shapes()?);
        }
        if config_in(folder, "vae").is_some() {
            let config = teacher.parts.autoencoder_config()?;
            text.autoencoder = count(&config.parameter_shapes()?);
        }
        if let ModelConfig::UNet2DCondition(unet) = network {
            let width = unet.cross_attention_dim.at(0).unwrap_or(0);
            let pooled = unet.projection_class_embeddings_input_dim.unwrap_or(0);
            text.prompt_bytes = (text.tokens * u64::from(width) + u64::from(pooled)) * WEIGHT;
        }
        Ok(text)
    }
}

fn config_in(folder: &Path, part: &str) -> Option<std::path::PathBuf> {
    Some(folder.join(part).join("config.json")).filter(|file| file.is_file())
}

fn stored_bytes(storage: StorageKind) -> u64 {
    match storage {
        StorageKind::F16 => HALF,
        StorageKind::F32 => WEIGHT,
    }
}

/// The states of `bytes` each that the memory of a buffer holds, if they are fewer than its capacity.
fn within_budget(buffer: &BufferConfig, bytes: u64) -> Option<u64> {
    let states = buffer.byte_budget / bytes.max(1);
    (states < buffer.capacity as u64 && buffer.spill.is_none()).then_some(states)
}

/// Logs a warning if the byte budget of the student's buffer is too small for its capacity.
pub(crate) fn warn_of_byte_budget(config: &DistillConfig, teacher: &Pipeline) -> Result<()> {
    let StudentPolicy::Buffer { buffer, .. } = &config.mixing.student.policy else { return Ok(()) };
    let [c, h, w] = sample_shape(config, teacher)?;
    let text = Text::of(teacher, &teacher.network.config())?;
    let bytes = (c * h * w) as u64 * stored_bytes(buffer.storage) + text.prompt_bytes;
    if let Some(states) = within_budget(buffer, bytes) {
        tracing::warn!(
            "mixing.student.policy.buffer keeps {states} of {} states: {bytes} bytes each, byte_budget is {}; set a larger \
             byte_budget or `spill`",
            buffer.capacity,
            buffer.byte_budget
        );
    }
    Ok(())
}

/// The states that are kept between updates.
struct Stores {
    in_memory: Vec<Row>,
    on_disk: Vec<Row>,
}

impl Stores {
    fn of(config: &DistillConfig, networks: &Networks, [c, h, w]: [i64; 3]) -> Self {
        let values = (c * h * w) as u64;
        // The conditioning of a state is stored unconverted.
        let prompt = networks.text.prompt_bytes;
        let (mut in_memory, mut on_disk) = (Vec::new(), Vec::new());
        if let StudentPolicy::Buffer { buffer, .. } = &config.mixing.student.policy {
            let state = values * stored_bytes(buffer.storage) + prompt;
            let needed = (buffer.capacity as u64).saturating_mul(state);
            let kept = needed.min(buffer.byte_budget);
            let within = within_budget(buffer, state)
                .map(|states| format!(" ({states} of {}: byte_budget)", buffer.capacity));
            let name = format!("buffer of the student's states{}", within.unwrap_or_default());
            in_memory.push(Row::bytes(name, kept));
            if let Some(spill) = &buffer.spill {
                let spilled = (needed - kept).min(spill.byte_budget);
                on_disk.push(Row::bytes("on disk: spilled states of the buffer", spilled));
            }
        }
        let teacher = &config.mixing.teacher;
        let is_used = [0.0, 0.5, 1.0].iter().any(|at| config.mixing.priors.at(*at).teacher() > 0.0);
        if teacher.pool > 0 && is_used {
            let states = match (teacher.states, teacher.states_per_trajectory) {
                (TeacherStates::Renoised, _) => 1,
                (TeacherStates::Visited, Some(kept)) => kept as u64,
                (TeacherStates::Visited, None) => networks.grid_len.saturating_sub(1).max(1),
            };
            let state = values * stored_bytes(teacher.storage) + prompt;
            let bytes = (teacher.pool as u64).saturating_mul(states).saturating_mul(state);
            in_memory.push(Row::bytes("pool of the teacher's states", bytes));
        }
        Self { in_memory, on_disk }
    }
}
