//! Declarations of the C++ side in `cpp/`, and helpers that every call to it needs.
#![allow(unsafe_code, reason = "the door to C++")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::{Error, Result};

/// `std::vector<at::Tensor>`.
#[repr(C)]
pub(crate) struct List {
    _opaque: [u8; 0],
}

/// `at::Generator`.
#[repr(C)]
pub(crate) struct Generator {
    _opaque: [u8; 0],
}

/// A tensor that C++ reads, or changes only through the storage behind it.
pub(crate) type In = *const C_tensor;
/// An output pointer, through which C++ returns a tensor that Rust then owns.
pub(crate) type Out = *mut *mut C_tensor;

#[rustfmt::skip]
unsafe extern "C" {
    fn ddil_last_error() -> *const c_char;
    pub(crate) fn ddil_set_last_error(message: *const c_char);

    pub(crate) fn ddil_list_new(out: *mut *mut List) -> c_int;
    pub(crate) fn ddil_list_free(list: *mut List);
    pub(crate) fn ddil_list_len(list: *const List) -> usize;
    pub(crate) fn ddil_list_push(list: *mut List, tensor: In) -> c_int;
    pub(crate) fn ddil_list_get(list: *const List, index: usize, out: Out) -> c_int;
    pub(crate) fn ddil_list_zeros_like(list: *const List, out: *mut *mut List) -> c_int;
    pub(crate) fn ddil_list_steps(list: *const List, out: *mut *mut List) -> c_int;
    pub(crate) fn ddil_list_grads(list: *const List, missing: *mut i64, out: *mut *mut List) -> c_int;

    pub(crate) fn ddil_drop_grads(list: *const List) -> c_int;
    pub(crate) fn ddil_foreach_lerp(list: *const List, targets: *const List, weight: f64) -> c_int;
    pub(crate) fn ddil_foreach_zero(list: *const List) -> c_int;
    pub(crate) fn ddil_grad_norm(list: *const List, out: Out) -> c_int;
    pub(crate) fn ddil_clip_grad_norm(list: *const List, max_norm: f64, out: Out) -> c_int;
    pub(crate) fn ddil_fused_adamw(
        params: *const List, grads: *const List, exp_avgs: *const List, exp_avg_sqs: *const List, steps: *const List,
        lr: f64, beta1: f64, beta2: f64, weight_decay: f64, eps: f64,
    ) -> c_int;

    pub(crate) fn ddil_autocast_push(cuda: bool, enable: bool, kind: c_int, was_enabled: *mut bool, previous_kind: *mut c_int) -> c_int;
    pub(crate) fn ddil_autocast_pop(cuda: bool, was_enabled: bool, previous_kind: c_int) -> c_int;

    pub(crate) fn ddil_recomputed(
        inputs: *const List, function: *mut c_void,
        call: extern "C" fn(*mut c_void, *const List, *mut List) -> c_int, release: extern "C" fn(*mut c_void), out: Out,
    ) -> c_int;

    pub(crate) fn ddil_generator_new(device: c_int, seed: u64, out: *mut *mut Generator) -> c_int;
    pub(crate) fn ddil_generator_free(generator: *mut Generator);
    pub(crate) fn ddil_generator_state(generator: *const Generator, out: Out) -> c_int;
    pub(crate) fn ddil_generator_set_state(generator: *mut Generator, state: In) -> c_int;
    pub(crate) fn ddil_generator_normal(generator: *mut Generator, shape: *const i64, rank: usize, kind: c_int, out: Out) -> c_int;
    pub(crate) fn ddil_generator_fill_normal(generator: *mut Generator, tensor: In) -> c_int;
    pub(crate) fn ddil_fills_normal_itself(out: *mut bool) -> c_int;
    pub(crate) fn ddil_generator_uniform(generator: *mut Generator, shape: *const i64, rank: usize, kind: c_int, out: Out) -> c_int;
    pub(crate) fn ddil_generator_randint(generator: *mut Generator, low: i64, high: i64, shape: *const i64, rank: usize, out: Out) -> c_int;
    pub(crate) fn ddil_generator_randperm(generator: *mut Generator, n: i64, out: Out) -> c_int;
    pub(crate) fn ddil_default_generator_state(device: c_int, out: Out) -> c_int;
    pub(crate) fn ddil_default_generator_set_state(device: c_int, state: In) -> c_int;

    pub(crate) fn ddil_is_sole_owner(x: In) -> bool;
    pub(crate) fn ddil_affine(x: In, y: In, a: f64, b: f64, out: Out) -> c_int;
    pub(crate) fn ddil_affine_in_place(x: In, y: In, a: f64, b: f64) -> c_int;
    pub(crate) fn ddil_affine_noise(x: In, y: In, noise: In, a: f64, b: f64, c: f64, out: Out) -> c_int;
    pub(crate) fn ddil_affine_noise_in_place(x: In, y: In, noise: In, a: f64, b: f64, c: f64) -> c_int;
    pub(crate) fn ddil_affine_four(x: In, y: In, z: In, w: In, a: f64, b: f64, c: f64, d: f64, out: Out) -> c_int;
    pub(crate) fn ddil_affine_four_in_place(x: In, y: In, z: In, w: In, a: f64, b: f64, c: f64, d: f64) -> c_int;
    pub(crate) fn ddil_affine_clamped(x: In, y: In, a: f64, b: f64, lo: f64, hi: f64, c: f64, d: f64, out: Out) -> c_int;
    pub(crate) fn ddil_affine_clamped_in_place(x: In, y: In, a: f64, b: f64, lo: f64, hi: f64, c: f64, d: f64) -> c_int;

    pub(crate) fn ddil_group_norm(x: In, num_groups: i64, weight: In, bias: In, offset: In, eps: f64, silu: bool, out: Out) -> c_int;

    pub(crate) fn ddil_to_memory_format(tensor: In, format: c_int, out: Out) -> c_int;
    pub(crate) fn ddil_has_memory_format(tensor: In, format: c_int, out: *mut bool) -> c_int;
    pub(crate) fn ddil_from_blob(
        data: *mut c_void, shape: *const i64, rank: usize, kind: c_int,
        owner: *mut c_void, release: extern "C" fn(*mut c_void), out: Out,
    ) -> c_int;

    pub(crate) fn ddil_keep_freed_pages() -> bool;
    pub(crate) fn ddil_num_threads(out: *mut c_int) -> c_int;
    pub(crate) fn ddil_set_num_threads(n: c_int) -> c_int;
    pub(crate) fn ddil_num_interop_threads(out: *mut c_int) -> c_int;
    pub(crate) fn ddil_set_num_interop_threads(n: c_int) -> c_int;
    pub(crate) fn ddil_set_deterministic(on: bool) -> c_int;
    pub(crate) fn ddil_version() -> *const c_char;
    pub(crate) fn ddil_has_cuda() -> bool;
    pub(crate) fn ddil_cuda_device_count(out: *mut i64) -> c_int;
    pub(crate) fn ddil_cuda_library_installed() -> bool;
    pub(crate) fn ddil_cuda_driver_installed() -> bool;
}

/// Converts the status code of a C++ function to a result.
pub(crate) fn check(op: &'static str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the pointer is to a string of this thread, never null and valid until the next failure on this thread.
    let message = unsafe { CStr::from_ptr(ddil_last_error()) };
    let message = message.to_string_lossy();
    // The rest is a list of all backends.
    let reason = message.split(" This could be because the operator").next().unwrap_or_default();
    Err(Error::Torch { op, message: reason.trim_end().to_owned() })
}

/// Takes ownership of the tensor that a C++ function creates.
pub(crate) fn new_tensor(op: &'static str, make: impl FnOnce(Out) -> c_int) -> Result<Tensor> {
    let mut tensor = ptr::null_mut();
    check(op, make(&raw mut tensor))?;
    // SAFETY: on success C++ has stored a tensor from its `new` there, which has no other owner.
    Ok(unsafe { Tensor::from_ptr(tensor) })
}

/// The CUDA index of a device, or -1 for the CPU.
pub(crate) fn device_index(op: &'static str, device: Device) -> Result<c_int> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(index) => i8::try_from(index)
            .map(c_int::from)
            .map_err(|_| Error::UnsupportedDevice { op, device }),
        Device::Mps | Device::Vulkan => Err(Error::UnsupportedDevice { op, device }),
    }
}

/// c10's number of a kind.
pub(crate) fn kind_number(kind: Kind) -> c_int {
    match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::ComplexHalf => 8,
        Kind::ComplexFloat => 9,
        Kind::ComplexDouble => 10,
        Kind::Bool => 11,
        Kind::QInt8 => 12,
        Kind::QUInt8 => 13,
        Kind::QInt32 => 14,
        Kind::BFloat16 => 15,
        Kind::Float8e5m2 => 23,
        Kind::Float8e4m3fn => 24,
        Kind::Float8e5m2fnuz => 25,
        Kind::Float8e4m3fnuz => 26,
    }
}

/// A C++ string that lives as long as the program.
pub(crate) fn version() -> &'static str {
    // SAFETY: a string literal of the shim, which is ASCII, as are libtorch's version strings.
    unsafe { CStr::from_ptr(ddil_version()) }.to_str().unwrap_or("unknown")
}
