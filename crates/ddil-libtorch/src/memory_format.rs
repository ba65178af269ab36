#![allow(unsafe_code, reason = "calls C++")]

use tch::Tensor;

use crate::Result;
use crate::ffi::{self, check, new_tensor};

/// The order of a tensor's dimensions in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryFormat {
    /// Row-major: the last dimension is contiguous.
    Contiguous,
    /// Images `[batch, channels, height, width]` with the channels of a pixel adjacent.
    ChannelsLast,
    /// The same for `[batch, channels, frames, height, width]`.
    ChannelsLast3d,
}

impl MemoryFormat {
    /// c10's number.
    fn number(self) -> i32 {
        match self {
            Self::Contiguous => 0,
            Self::ChannelsLast => 2,
            Self::ChannelsLast3d => 3,
        }
    }
}

/// The tensor with its elements in the order of `format`: the tensor itself if it has that order, otherwise a copy.
///
/// The shape does not change. Gradients flow through.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) if the format is for another number of dimensions.
pub fn to_memory_format(tensor: &Tensor, format: MemoryFormat) -> Result<Tensor> {
    // SAFETY: the tensor lives through the call.
    new_tensor("to_memory_format", |out| unsafe {
        ffi::ddil_to_memory_format(tensor.as_ptr(), format.number(), out)
    })
}

/// The images with the channels of a pixel adjacent, the fastest order for convolutions on the CPU and on tensor cores.
///
/// Shorthand for [`to_memory_format`] with [`MemoryFormat::ChannelsLast`], or
/// [`ChannelsLast3d`](MemoryFormat::ChannelsLast3d) if there are five dimensions.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) unless there are four or five dimensions.
///
/// # Example
///
/// ```
/// use tch::{Tensor, kind::FLOAT_CPU};
///
/// let images = Tensor::zeros([2, 3, 4, 4], FLOAT_CPU);
/// let images = ddil_libtorch::channels_last(&images)?;
/// assert_eq!(images.size(), [2, 3, 4, 4]);
/// assert_eq!(images.stride(), [48, 1, 12, 3]);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub fn channels_last(images: &Tensor) -> Result<Tensor> {
    to_memory_format(images, channels_last_for(images))
}

/// Whether the channels of a pixel are adjacent; always false unless there are four or five dimensions.
///
/// Also true of a tensor that has both orders at once, such as one with a single channel.
pub fn is_channels_last(images: &Tensor) -> bool {
    let mut answer = false;
    let format = channels_last_for(images).number();
    // SAFETY: the tensor lives through the call, and the output pointer is valid.
    let code = unsafe { ffi::ddil_has_memory_format(images.as_ptr(), format, &raw mut answer) };
    check("is_channels_last", code).is_ok() && answer
}

fn channels_last_for(images: &Tensor) -> MemoryFormat {
    let is_video = images.defined() && images.dim() == 5;
    if is_video { MemoryFormat::ChannelsLast3d } else { MemoryFormat::ChannelsLast }
}
