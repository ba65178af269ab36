//! libjpeg's errors as errors of Rust.

use std::ffi::c_int;
use std::panic::{UnwindSafe, catch_unwind, resume_unwind};

use mozjpeg::Decompress;
use mozjpeg::decompress::DecompressBuilder;
use mozjpeg_sys as sys;

/// Warnings after which all pixels are as they were written: bytes between segments, as some cameras write, and a version or
/// a colour transform that is not known and not used.
const HARMLESS: [sys::J_MESSAGE_CODE; 4] =
    [sys::JWRN_EXTRANEOUS_DATA, sys::JWRN_JFIF_MAJOR, sys::JWRN_ADOBE_XFORM, sys::JWRN_BOGUS_ICC];

/// A decoder that refuses damaged and truncated files, whose missing pixels libjpeg would fill with grey after a warning.
///
/// Its errors unwind: use it within [`caught`].
pub(super) fn strict() -> DecompressBuilder<'static> {
    Decompress::builder().with_err(errors())
}

/// The value of `decode`, or the message of the decoder if it unwinds.
pub(super) fn caught<T>(decode: impl FnOnce() -> T + UnwindSafe) -> Result<T, String> {
    catch_unwind(decode).map_err(|unwound| match unwound.downcast::<Message>() {
        Ok(message) => message.0,
        Err(panic) => resume_unwind(panic),
    })
}

/// A message of the decoder, while it unwinds.
struct Message(String);

/// How the decoder reports errors and warnings.
#[allow(unsafe_code)]
fn errors() -> sys::jpeg_error_mgr {
    // SAFETY: all zeros are a valid value, of no functions and null pointers, and `jpeg_std_error` sets every field.
    let mut errors = unsafe { std::mem::zeroed::<sys::jpeg_error_mgr>() };
    // SAFETY: the reference is valid for the call, which keeps no copy of it.
    unsafe { sys::jpeg_std_error(&mut errors) };
    errors.error_exit = Some(unwind);
    errors.emit_message = Some(unwind_if_damaged);
    errors
}

/// Called by libjpeg for an error, instead of ending the process.
extern "C-unwind" fn unwind(decoder: &mut sys::jpeg_common_struct) {
    resume_unwind(Box::new(Message(message(decoder))))
}

/// Called by libjpeg for warnings, whose level is -1, and for its log.
extern "C-unwind" fn unwind_if_damaged(decoder: &mut sys::jpeg_common_struct, level: c_int) {
    if level < 0 && !HARMLESS.contains(&code(decoder)) {
        unwind(decoder);
    }
}

/// The number of the message that libjpeg reports.
#[allow(unsafe_code)]
fn code(decoder: &sys::jpeg_common_struct) -> sys::J_MESSAGE_CODE {
    // SAFETY: libjpeg calls with the decoder whose `err` points to the struct of `errors`, alive as long as the decoder.
    unsafe { (*decoder.err).msg_code as sys::J_MESSAGE_CODE }
}

/// The text of the message that libjpeg reports.
#[allow(unsafe_code)]
fn message(decoder: &mut sys::jpeg_common_struct) -> String {
    /// `format_message` as in the bindings, which declare a constant buffer of 80 bytes.
    type Declared = unsafe extern "C-unwind" fn(&mut sys::jpeg_common_struct, &[u8; 80]);
    /// The same as in jpeglib.h.
    type Format = unsafe extern "C-unwind" fn(&mut sys::jpeg_common_struct, *mut u8);
    // JMSG_LENGTH_MAX of jpeglib.h.
    let mut text = [0_u8; 200];
    // SAFETY: as in `code`.
    if let Some(format) = unsafe { (*decoder.err).format_message } {
        // SAFETY: both types are a function of two pointers; `Format` is the one of the C header. It writes at most
        // JMSG_LENGTH_MAX bytes, a zero included.
        unsafe { std::mem::transmute::<Declared, Format>(format)(decoder, text.as_mut_ptr()) };
    }
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    String::from_utf8_lossy(&text[..end]).into_owned()
}
