//! Distances between images by a network that compares two of them.

use std::path::Path;

use ddil_libtorch::ArgumentError;
use tch::{CModule, Device, Kind, Tensor};

use crate::error::{Error, Result, ensure_numbers, torch};
use crate::features::load_script;

/// Number of pairs per forward pass.
const PAIRS_AT_ONCE: i64 = 32;

/// A `TorchScript` network that compares two batches of images, such as LPIPS
/// ([Zhang et al. 2018](https://arxiv.org/abs/1801.03924)).
///
/// The network takes two tensors `[n, channels, height, width]` in `[-1, 1]` and returns `[n]`, `[n, 1]` or
/// `[n, 1, 1, 1]`. With the package `lpips`:
///
/// ```python
/// network = lpips.LPIPS(net="alex", version="0.1").eval()
/// images = torch.zeros(2, 3, 64, 64)
/// torch.jit.trace(network, (images, images)).save("lpips-alex.pt")
/// ```
///
/// # Example
///
/// ```
/// use ddil_metrics::TorchScriptDistance;
/// use tch::{CModule, Device, Tensor, kind};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("distance.pt");
/// # let mut mean_gap = |x: &[Tensor]| {
/// #     vec![(&x[0] - &x[1]).abs().mean_dim([1_i64, 2, 3].as_slice(), false, tch::Kind::Float)]
/// # };
/// # let two = [(); 2].map(|()| Tensor::zeros([2, 3, 4, 4], kind::FLOAT_CPU));
/// # CModule::create_by_tracing("distance", "forward", &two, &mut mean_gap)?.save(&path)?;
/// let distance = TorchScriptDistance::from_file(&path, Device::Cpu)?;
/// let black = Tensor::full([1, 3, 4, 4], -1.0, kind::FLOAT_CPU);
/// let images = Tensor::cat(&[&black, &black, &(-&black)], 0);
/// // Two of the three pairs are 2 apart.
/// assert!((distance.mean_pairwise(&images)? - 4.0 / 3.0).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TorchScriptDistance {
    module: CModule,
    device: Device,
    id: String,
}

impl TorchScriptDistance {
    /// Loads a network, in evaluation mode. Its id is the file's name and SHA-256.
    ///
    /// # Errors
    ///
    /// As [`TorchScriptExtractor::from_file`](crate::TorchScriptExtractor::from_file), except for options.
    pub fn from_file(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        let (module, id) = load_script(path.as_ref(), device)?;
        Ok(Self { module, device, id })
    }

    /// Name and hash of the network.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The distance of each image of one batch to the image of the same index of the other, without gradients.
    ///
    /// # Shapes and units
    ///
    /// - `a`, `b`: `[n, channels, height, width]`, floats from -1 to 1; both of one shape
    /// - returns: `[n]`, `Float`, on the network's device
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) for batches of different shapes;
    /// [`Error::NotADistance`] if the network returns another shape, [`Error::NonFinite`] for values that are not
    /// finite; [`Error::Torch`].
    pub fn between(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        const OP: &str = "TorchScriptDistance::between";
        for (name, images) in [("a", a), ("b", b)] {
            ensure_numbers(OP, name, images)?;
            let shape = images.size();
            if shape.len() != 4 || shape.contains(&0) || shape != a.size() {
                let expected = match name {
                    "a" => "[1 or more, channels, height, width]".to_owned(),
                    _ => format!("{:?}, the shape of `a`", a.size()),
                };
                return Err(ArgumentError::Shape { op: OP, name, shape, expected }.into());
            }
        }
        let n = a.size()[0];
        let _no_grad = tch::no_grad_guard();
        let run = || {
            let input = |images: &Tensor| images.f_to_device(self.device)?.f_to_kind(Kind::Float);
            self.module.forward_ts(&[input(a)?, input(b)?])
        };
        let found = run().map_err(torch(OP))?;
        if ![vec![n], vec![n, 1], vec![n, 1, 1, 1]].contains(&found.size()) {
            return Err(Error::NotADistance { id: self.id.clone(), found: found.size(), n });
        }
        let found = found.f_to_kind(Kind::Float).and_then(|found| found.f_reshape([n]));
        let found = found.map_err(torch(OP))?;
        let invalid = found.isfinite().logical_not().sum(Kind::Int64);
        match invalid.f_int64_value(&[]).map_err(torch(OP))? {
            0 => Ok(found),
            invalid => Err(Error::NonFinite { op: OP, name: "distances", found: invalid }),
        }
    }

    /// The mean distance over all pairs of different images: the diversity of the images of one prompt.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[n, channels, height, width]`, floats from -1 to 1
    ///
    /// # Errors
    ///
    /// As [`between`](Self::between); [`Error::TooFewSamples`] below two images.
    pub fn mean_pairwise(&self, images: &Tensor) -> Result<f64> {
        const OP: &str = "TorchScriptDistance::mean_pairwise";
        ensure_numbers(OP, "images", images)?;
        let n = images.size().first().copied().unwrap_or(0);
        if n < 2 {
            return Err(Error::TooFewSamples { op: OP, name: "images", found: n, needed: 2 });
        }
        let (first, second): (Vec<i64>, Vec<i64>) =
            (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))).unzip();
        let mut sum = 0.0;
        for start in (0..first.len()).step_by(PAIRS_AT_ONCE as usize) {
            let pick = |rows: &[i64]| {
                let end = rows.len().min(start + PAIRS_AT_ONCE as usize);
                let rows = Tensor::f_from_slice(&rows[start..end])?;
                images.f_index_select(0, &rows.f_to_device(images.device())?)
            };
            let [a, b] = [pick(&first).map_err(torch(OP))?, pick(&second).map_err(torch(OP))?];
            sum += self.between(&a, &b)?.sum(Kind::Double).double_value(&[]);
        }
        Ok(sum / first.len() as f64)
    }
}
