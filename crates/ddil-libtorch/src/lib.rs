//! The foundation of ddil: safe functions for the parts of libtorch that tch does not bind.
//!
//! tch binds most operations of libtorch one by one. Training and sampling need a few more things: optimizer steps over
//! whole lists of tensors with a state that can be saved, random streams that can be saved, mixed precision on the CPU,
//! weights used directly from a mapped file, and one-pass arithmetic. They are in a small C++ shim, compiled against
//! the same libtorch as torch-sys, and in the functions of this crate, which are safe. Nothing in this crate is
//! specific to diffusion.
//!
//! | for | there is |
//! | --- | --- |
//! | lists of tensors | [`TensorList`], [`foreach_lerp_`], [`foreach_zero_`], [`grads`], [`drop_grads`], [`grad_norm`], [`clip_grad_norm_`] |
//! | optimizing | [`fused_adamw_`] |
//! | mixed precision | [`Autocast`] |
//! | memory | [`recomputed`] |
//! | random streams | [`Generator`], [`normal_is_vectorised`], [`default_generator_state`], [`set_default_generator_state`] |
//! | weights in a file | [`MappedFile`] |
//! | rows on disk, for more rows than fit in memory | [`RowFile`], [`gather_rows`], [`copy_rows_`] |
//! | `TorchScript` programs | [`ensure_script_archive`] |
//! | arithmetic in one pass | [`affine`], [`affine_noise`], [`affine_four`], [`affine_clamped`], and each in place |
//! | normalisation in one operation | [`group_norm`] |
//! | JPEG files, with the feature `jpeg` | `decode_jpeg`, which has unsafe code as the rest of this crate |
//! | memory format | [`channels_last`], [`to_memory_format`], [`is_channels_last`] |
//! | arguments that do not fit | [`ArgumentError`], [`ensure_real`], [`ensure_dense`], [`ensure_shape`], [`ensure_kind`], [`ensure_same_shape`], [`ensure_timesteps`] |
//! | the process | [`keep_freed_pages`], [`set_num_threads`], [`adapt_thread_waiting`], [`deterministic`], [`version`], [`why_no_cuda`] |
//!
//! A C++ exception never reaches Rust: it becomes an [`Error`] with libtorch's message and without its backtrace.
//! As in libtorch, functions whose names end in an underscore change their first argument. Views share memory: a tensor
//! that is a view of another changes with it.
//!
//! # Example
//!
//! Noise from its own random stream, and a weighted sum of two tensors in one pass:
//!
//! ```
//! use ddil_libtorch::{Generator, affine};
//! use tch::{Device, Kind};
//!
//! let mut generator = Generator::new(Device::Cpu, 0)?;
//! let x0 = generator.uniform([4, 3, 8, 8], Kind::Float)?;
//! let epsilon = generator.normal([4, 3, 8, 8], Kind::Float)?;
//! let x_t = affine(&x0, &epsilon, 0.8, 0.6)?;
//! assert_eq!(x_t.size(), [4, 3, 8, 8]);
//! # Ok::<(), ddil_libtorch::Error>(())
//! ```
//!
//! # Programs of your own
//!
//! A program finds libtorch only if its own build script locates it: `ddil_build::link()`, from the crate
//! `ddil-build` under `[build-dependencies]`. Every package with a program, test, benchmark or example requires it.

mod allocator;
mod argument;
mod autocast;
mod elementwise;
mod error;
mod ffi;
mod foreach;
mod generator;
mod group_norm;
#[cfg(feature = "jpeg")]
mod jpeg;
mod list;
mod mapped;
mod memory_format;
mod optim;
mod recompute;
mod row_file;
mod script_archive;
mod threads;
mod version;
mod waiting;

pub use allocator::{keep_freed_pages, keeps_freed_pages};
pub use argument::{
    ArgumentError, ensure_dense, ensure_kind, ensure_real, ensure_same_shape, ensure_shape,
    ensure_timesteps,
};
pub use autocast::Autocast;
pub use ddil_files::Report;
pub use elementwise::{
    Clamped, affine, affine_, affine_clamped, affine_clamped_, affine_four, affine_four_,
    affine_noise, affine_noise_, is_sole_owner,
};
pub use error::{Error, Result};
pub use foreach::{clip_grad_norm_, drop_grads, foreach_lerp_, foreach_zero_, grad_norm, grads};
pub use generator::{
    Generator, default_generator_state, normal_is_vectorised, set_default_generator_state,
};
pub use group_norm::{GroupNorm, group_norm};
#[cfg(feature = "jpeg")]
pub use jpeg::{Jpeg, JpegError, decode_jpeg};
pub use list::TensorList;
pub use mapped::MappedFile;
pub use memory_format::{MemoryFormat, channels_last, is_channels_last, to_memory_format};
pub use optim::{AdamW, fused_adamw_};
pub use recompute::recomputed;
pub use row_file::{RowFile, copy_rows_, gather_rows};
pub use script_archive::ensure_script_archive;
pub use threads::{num_interop_threads, num_threads, set_num_interop_threads, set_num_threads};
pub use version::{NoCuda, cuda_built, cuda_device_count, deterministic, version, why_no_cuda};
pub use waiting::{ThreadWaiting, adapt_thread_waiting, thread_waiting};

/// The version of tch whose tensors this crate uses. It is part of the API: a new tch is a breaking release.
pub use tch;
