//! Networks from a `TorchScript` program.

use std::cell::RefCell;
use std::path::{Component, Path};

use ddil_files::Invalid;
use ddil_libtorch::{ensure_dense, ensure_shape};
use serde::{Deserialize, Serialize};
use tch::{CModule, Kind, Tensor};

use crate::config::NetworkConfig;
use crate::error::{Error, Result, ensure_part, ensure_timesteps};
use crate::parameters::{Parameters, Placement, Values};

const FORWARD: &str = "TorchScript::forward";

/// The settings of a [`TorchScript`] network.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, TorchScriptConfig, UnknownKeys};
///
/// let config = TorchScriptConfig { class_labels: true, ..TorchScriptConfig::default() };
/// assert_eq!(config.file, "model.pt");
/// assert_eq!(TorchScriptConfig::from_json(&config.to_json(), UnknownKeys::Refuse)?, config);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TorchScriptConfig {
    /// Name of the program in the network's folder. Default `model.pt`.
    pub file: String,
    /// Whether the program takes class labels as its third argument. Default false.
    pub class_labels: bool,
}

impl Default for TorchScriptConfig {
    fn default() -> Self {
        Self { file: "model.pt".to_owned(), class_labels: false }
    }
}

impl NetworkConfig for TorchScriptConfig {
    type Network = TorchScript;

    const CLASS_NAME: &'static str = "TorchScript";

    fn problems(&self) -> Vec<Invalid> {
        let mut components = Path::new(&self.file).components();
        match (components.next(), components.next()) {
            (Some(Component::Normal(_)), None) => Vec::new(),
            _ => vec![Invalid::new("file", &self.file, "the name of a file in the folder")],
        }
    }

    /// There are no parameters without the program.
    fn assemble(&self, _placement: Placement, _values: Values) -> Result<TorchScript> {
        let expected =
            "a class whose parameters can be initialised; load a program from its folder";
        let problems = vec![Invalid::new("_class_name", Self::CLASS_NAME, expected)];
        Err(Error::InvalidConfig { what: self.file.clone(), problems })
    }

    fn parameters_of(network: &TorchScript) -> &Parameters {
        network.parameters()
    }

    /// Loads the program, as [`TorchScript::from_file`].
    fn build_from(&self, placement: Placement, weights: impl AsRef<Path>) -> Result<TorchScript> {
        TorchScript::from_file(weights, self, placement.device)
    }
}

/// A network saved by `torch.jit.save`, whose `forward(x_t, timesteps)` or `forward(x_t, timesteps, class_labels)`
/// returns one tensor.
///
/// Gradients flow through it, and its parameters can be trained. It runs the program in the file: load only trusted
/// files.
#[derive(Debug)]
pub struct TorchScript {
    // tch requires exclusive access to switch between training and evaluation.
    module: RefCell<CModule>,
    config: TorchScriptConfig,
    parameters: Parameters,
}

impl TorchScript {
    /// Loads a program onto a device. Its parameters keep their kind and memory format, and require no gradients until
    /// [`Parameters::set_trainable`] is called.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] if the file is missing, not a `TorchScript` program or rejected by
    /// [`ensure_script_archive`](ddil_libtorch::ensure_script_archive), as one whose headers exceed its contents.
    pub fn from_file(
        path: impl AsRef<Path>,
        config: &TorchScriptConfig,
        device: tch::Device,
    ) -> Result<Self> {
        let path = path.as_ref();
        let read = |source: tch::TchError| {
            let first_line = source.to_string().lines().next().unwrap_or_default().to_owned();
            Error::Read { path: path.into(), source: first_line.into() }
        };
        ddil_libtorch::ensure_script_archive(path)
            .map_err(|source| Error::Read { path: path.into(), source: source.into() })?;
        let mut module = CModule::load_on_device(path, device).map_err(read)?;
        module.f_set_eval().map_err(read)?;
        let named = module.named_parameters().map_err(read)?;
        let kind = named.first().map_or(Kind::Float, |(_, tensor)| tensor.kind());
        let placement = Placement { device, kind, channels_last: false };
        let parameters = Parameters::of_foreign(named, placement);
        parameters.set_trainable(false);
        Ok(Self { module: RefCell::new(module), config: config.clone(), parameters })
    }

    /// The settings of the network.
    pub fn config(&self) -> &TorchScriptConfig {
        &self.config
    }

    /// The parameters, under their names in the program.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Switches the program between training and evaluation; it starts in evaluation.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the program fails.
    pub fn set_training(&self, training: bool) -> Result<()> {
        let mut module = self.module.borrow_mut();
        if training { module.f_set_train() } else { module.f_set_eval() }
            .map_err(Error::torch("TorchScript::set_training"))
    }

    /// Names of the parts of a [`Conditioning`](ddil_core::Conditioning) that the network requires.
    pub(crate) fn conditioning_fields(&self) -> Vec<&'static str> {
        if self.config.class_labels { vec!["class_labels"] } else { Vec::new() }
    }

    /// The output of the program for noisy samples.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, ..]`; `timesteps`: `[batch]`; `class_labels`: `[batch]`; and further requirements of the
    ///   program
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind), [`Error::MissingPart`], [`Error::UnexpectedPart`];
    /// [`Error::Torch`] for errors of the program.
    pub fn forward(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
    ) -> Result<Tensor> {
        let op = FORWARD;
        ensure_dense(op, "x_t", x_t)?;
        let size = x_t.size();
        ensure_shape(op, "x_t", x_t, !size.is_empty(), || "[batch, ..]".to_owned())?;
        let batch = size.first().copied().unwrap_or(0);
        ensure_timesteps(op, timesteps, batch)?;
        let mut inputs = vec![x_t, timesteps];
        ensure_part(op, "class_labels", class_labels, self.config.class_labels)?;
        inputs.extend(class_labels);
        self.module.borrow().forward_ts(&inputs).map_err(Error::torch(op))
    }

    /// Writes the program with the current parameters.
    ///
    /// # Errors
    ///
    /// [`Error::Write`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let aside = ddil_files::temporary_sibling(path);
        let written = self.module.borrow().save(&aside);
        let written = written.map_err(|e| crate::weights::write_error(path, first_line(&e)));
        written.and_then(|()| crate::weights::put_in_place(&aside, path)).inspect_err(|_| {
            // The first error is the one to report.
            let _ = std::fs::remove_file(&aside);
        })
    }
}

fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
