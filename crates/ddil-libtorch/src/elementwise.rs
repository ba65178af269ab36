#![allow(unsafe_code, reason = "calls C++")]

use tch::Tensor;

use crate::ffi::{self, check, new_tensor};
use crate::{Error, Result};

/// Whether only `x` refers to its memory: there is no other handle, no view and no tensor saved for a backward pass.
///
/// Then a function that owns `x` may write the result of a step into it. Memory that libtorch did not allocate, such as
/// that of a mapped file, never counts as owned by `x`.
///
/// # Example
///
/// ```
/// use tch::Tensor;
///
/// let x = Tensor::from_slice(&[1.0, 2.0]);
/// assert!(ddil_libtorch::is_sole_owner(&x));
/// let view = x.narrow(0, 0, 1);
/// assert!(!ddil_libtorch::is_sole_owner(&x));
/// drop(view);
/// let same = x.shallow_clone();
/// assert!(!ddil_libtorch::is_sole_owner(&x) && !ddil_libtorch::is_sole_owner(&same));
/// ```
pub fn is_sole_owner(x: &Tensor) -> bool {
    // SAFETY: the tensor lives through the call, which only reads counters.
    unsafe { ffi::ddil_is_sole_owner(x.as_ptr()) }
}

/// `a x + b y` as a new tensor.
///
/// One pass over memory on libtorch's own threads for `Float` and `Double` on the CPU, with any strides:
/// `channels_last` is preserved. Elsewhere, and if gradients are recorded, libtorch's operations are used, so the
/// result can be differentiated.
///
/// # Shapes and units
///
/// - `x`, `y`: one shape, one device; mixed kinds promote as in libtorch
/// - returns: that shape
///
/// # Errors
///
/// [`Error::Torch`] if shapes or devices differ.
///
/// # Example
///
/// ```
/// use tch::Tensor;
///
/// let (x, y) = (Tensor::from_slice(&[1.0, 2.0]), Tensor::from_slice(&[10.0, 20.0]));
/// let sum = ddil_libtorch::affine(&x, &y, 0.5, 2.0)?;
/// assert_eq!(Vec::<f64>::try_from(sum).expect("a vector of doubles"), [20.5, 41.0]);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub fn affine(x: &Tensor, y: &Tensor, a: f64, b: f64) -> Result<Tensor> {
    // SAFETY: both tensors live through the call.
    new_tensor("affine", |out| unsafe { ffi::ddil_affine(x.as_ptr(), y.as_ptr(), a, b, out) })
}

/// `x = a x + b y` in place; otherwise like [`affine`].
///
/// # Errors
///
/// [`Error::Torch`] if shapes or devices differ, if `x` requires a gradient while gradients are recorded, cannot hold
/// the kind of the result, or overlaps itself or a part of `y` in memory; then nothing has changed.
pub fn affine_(x: &mut Tensor, y: &Tensor, a: f64, b: f64) -> Result<()> {
    // SAFETY: both tensors live through the call.
    check("affine_", unsafe { ffi::ddil_affine_in_place(x.as_ptr(), y.as_ptr(), a, b) })
}

/// `a x + b y + c noise` as a new tensor; otherwise like [`affine`].
///
/// # Errors
///
/// As [`affine`].
#[expect(clippy::many_single_char_names, reason = "the letters of the equation")]
pub fn affine_noise(
    x: &Tensor,
    y: &Tensor,
    noise: &Tensor,
    a: f64,
    b: f64,
    c: f64,
) -> Result<Tensor> {
    let (x, y, noise) = (x.as_ptr(), y.as_ptr(), noise.as_ptr());
    // SAFETY: the tensors live through the call.
    new_tensor("affine_noise", |out| unsafe { ffi::ddil_affine_noise(x, y, noise, a, b, c, out) })
}

/// `x = a x + b y + c noise` in place; otherwise like [`affine_`].
///
/// # Errors
///
/// As [`affine_`].
#[expect(clippy::many_single_char_names, reason = "the letters of the equation")]
pub fn affine_noise_(
    x: &mut Tensor,
    y: &Tensor,
    noise: &Tensor,
    a: f64,
    b: f64,
    c: f64,
) -> Result<()> {
    let (x, y, noise) = (x.as_ptr(), y.as_ptr(), noise.as_ptr());
    // SAFETY: the tensors live through the call.
    check("affine_noise_", unsafe { ffi::ddil_affine_noise_in_place(x, y, noise, a, b, c) })
}

/// `weights[0] tensors[0] + .. + weights[3] tensors[3]` as a new tensor; otherwise like [`affine`].
///
/// # Errors
///
/// As [`affine`]; the tensors are named `x`, `y`, `z` and `w`.
#[expect(clippy::many_single_char_names, reason = "the letters of the equation")]
pub fn affine_four(tensors: [&Tensor; 4], weights: [f64; 4]) -> Result<Tensor> {
    let [x, y, z, w] = tensors.map(Tensor::as_ptr);
    let [a, b, c, d] = weights;
    // SAFETY: the tensors live through the call.
    new_tensor("affine_four", |out| unsafe { ffi::ddil_affine_four(x, y, z, w, a, b, c, d, out) })
}

/// `x = weights[0] x + weights[1] rest[0] + ..` in place; otherwise like [`affine_`].
///
/// # Errors
///
/// As [`affine_`] and [`affine_four`].
#[expect(clippy::many_single_char_names, reason = "the letters of the equation")]
pub fn affine_four_(x: &mut Tensor, rest: [&Tensor; 3], weights: [f64; 4]) -> Result<()> {
    let (x, [y, z, w]) = (x.as_ptr(), rest.map(Tensor::as_ptr));
    let [a, b, c, d] = weights;
    // SAFETY: the tensors live through the call.
    let code = unsafe { ffi::ddil_affine_four_in_place(x, y, z, w, a, b, c, d) };
    check("affine_four_", code)
}

/// The coefficients of [`affine_clamped`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clamped {
    /// Weight of `x` in the clamped sum.
    pub a: f64,
    /// Weight of `y` in the clamped sum.
    pub b: f64,
    /// Lower limit of the clamped sum.
    pub lo: f64,
    /// Upper limit of the clamped sum.
    pub hi: f64,
    /// Weight of `x` in the result.
    pub c: f64,
    /// Weight of the clamped sum in the result.
    pub d: f64,
}

impl Clamped {
    fn ensure_ordered(&self, op: &'static str) -> Result<()> {
        let Self { lo, hi, .. } = *self;
        // Written so that NaN also fails.
        if lo <= hi {
            return Ok(());
        }
        Err(Error::value(op, "lo, hi", format!("{lo}, {hi}"), "in order"))
    }
}

/// `c x + d clamp(a x + b y, lo, hi)` as a new tensor: a sampler's step with the clean-data estimate clipped to a
/// range.
///
/// NaN stays NaN. Otherwise like [`affine`].
///
/// # Errors
///
/// [`Error::Argument`] unless `lo <= hi`, and as [`affine`].
pub fn affine_clamped(x: &Tensor, y: &Tensor, numbers: &Clamped) -> Result<Tensor> {
    numbers.ensure_ordered("affine_clamped")?;
    let Clamped { a, b, lo, hi, c, d } = *numbers;
    let (x, y) = (x.as_ptr(), y.as_ptr());
    // SAFETY: both tensors live through the call.
    new_tensor("affine_clamped", |out| unsafe {
        ffi::ddil_affine_clamped(x, y, a, b, lo, hi, c, d, out)
    })
}

/// `x = c x + d clamp(a x + b y, lo, hi)` in place; otherwise like [`affine_clamped`].
///
/// # Errors
///
/// [`Error::Argument`] unless `lo <= hi`, and as [`affine_`].
pub fn affine_clamped_(x: &mut Tensor, y: &Tensor, numbers: &Clamped) -> Result<()> {
    numbers.ensure_ordered("affine_clamped_")?;
    let Clamped { a, b, lo, hi, c, d } = *numbers;
    let (x, y) = (x.as_ptr(), y.as_ptr());
    // SAFETY: both tensors live through the call.
    let code = unsafe { ffi::ddil_affine_clamped_in_place(x, y, a, b, lo, hi, c, d) };
    check("affine_clamped_", code)
}
