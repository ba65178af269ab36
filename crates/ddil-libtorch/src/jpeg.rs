//! JPEG files, by the code of libjpeg-turbo.

#![allow(unsafe_code, reason = "handles the errors of libjpeg")]

use std::ffi::c_int;
use std::panic::{UnwindSafe, catch_unwind, resume_unwind};

use mozjpeg::decompress::{DecompressBuilder, DecompressStarted};
use mozjpeg::{ColorSpace, Decompress, Marker};
use mozjpeg_sys as sys;

/// The content of a JPEG file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Jpeg {
    /// Rows from the top, pixels from the left, channels last: `height · width · channels` values.
    pub pixels: Vec<u8>,
    /// 1 for grey, 3 for RGB.
    pub channels: usize,
    /// In pixels.
    pub height: u32,
    /// In pixels.
    pub width: u32,
    /// The Exif data, a TIFF header and what follows.
    pub exif: Option<Vec<u8>>,
}

/// A JPEG file that is not decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JpegError {
    /// The file is damaged, truncated, or of a kind that libjpeg does not decode.
    #[error("{0}")]
    Damaged(String),
    /// The header states more pixels than allowed.
    #[error("{width}x{height} pixels; expected at most {max_pixels}")]
    TooManyPixels {
        /// In pixels.
        width: usize,
        /// In pixels.
        height: usize,
        /// The bound that the caller set.
        max_pixels: usize,
    },
    /// Neither grey nor RGB.
    #[error("{found}; expected grey or RGB")]
    Colours {
        /// The colour space.
        found: &'static str,
    },
}

/// Decodes a grey or RGB JPEG of at most `max_pixels` pixels.
///
/// The pixels are those of Pillow, bit by bit: accurate integer transform, interpolated colours. Orientation is left to
/// the caller. A program that is compiled with `panic = "abort"` ends at a damaged file, because errors of libjpeg unwind.
///
/// # Errors
///
/// [`JpegError`]: also for a file whose end is missing or whose damage libjpeg notices, of which it would fill the rest with
/// grey.
///
/// # Example
///
/// ```
/// use ddil_libtorch::{JpegError, decode_jpeg};
///
/// let error = decode_jpeg(b"not a picture", 1_000_000).unwrap_err();
/// assert!(matches!(error, JpegError::Damaged(_)));
/// ```
pub fn decode_jpeg(bytes: &[u8], max_pixels: usize) -> Result<Jpeg, JpegError> {
    caught(|| decode(bytes, max_pixels)).unwrap_or_else(|message| Err(JpegError::Damaged(message)))
}

/// As [`decode_jpeg`]; errors of libjpeg unwind.
fn decode(bytes: &[u8], max_pixels: usize) -> Result<Jpeg, JpegError> {
    let failed = |error: std::io::Error| JpegError::Damaged(error.to_string());
    let decoder = strict().with_markers(&[Marker::APP(1)]).from_mem(bytes).map_err(failed)?;
    let (width, height) = decoder.size();
    if width.saturating_mul(height) > max_pixels {
        return Err(JpegError::TooManyPixels { width, height, max_pixels });
    }
    let exif = decoder.markers().find_map(|marker| marker.data.strip_prefix(b"Exif\0\0"));
    let exif = exif.map(<[u8]>::to_vec);
    let (channels, pixels) = match decoder.color_space() {
        ColorSpace::JCS_GRAYSCALE => {
            let mut rows = decoder.grayscale().map_err(failed)?;
            (1, finished(rows.read_scanlines::<u8>(), rows).map_err(failed)?)
        }
        ColorSpace::JCS_YCbCr | ColorSpace::JCS_RGB => {
            let mut rows = decoder.rgb().map_err(failed)?;
            let pixels = finished(rows.read_scanlines::<[u8; 3]>(), rows).map_err(failed)?;
            (3, pixels.into_flattened())
        }
        ColorSpace::JCS_CMYK => return Err(JpegError::Colours { found: "CMYK" }),
        ColorSpace::JCS_YCCK => return Err(JpegError::Colours { found: "YCCK" }),
        _ => return Err(JpegError::Colours { found: "an unknown colour space" }),
    };
    Ok(Jpeg { pixels, channels, height: height as u32, width: width as u32, exif })
}

/// The rows, after the file has been read to its end.
fn finished<T>(
    pixels: std::io::Result<Vec<T>>,
    rows: DecompressStarted<&[u8]>,
) -> std::io::Result<Vec<T>> {
    let pixels = pixels?;
    rows.finish()?;
    Ok(pixels)
}

/// Warnings after which no pixel is missing: bytes before a marker, as some cameras write between segments (damage after
/// which a scan ends early looks the same), and a version, a colour transform or a colour profile that is not used.
const HARMLESS: [sys::J_MESSAGE_CODE; 4] =
    [sys::JWRN_EXTRANEOUS_DATA, sys::JWRN_JFIF_MAJOR, sys::JWRN_ADOBE_XFORM, sys::JWRN_BOGUS_ICC];

/// A decoder that refuses damaged and truncated files, whose missing pixels libjpeg would fill with grey after a warning.
///
/// Its errors unwind: use it within [`caught`].
fn strict() -> DecompressBuilder<'static> {
    Decompress::builder().with_err(errors())
}

/// The value of `decode`, or the message of the decoder if it unwinds.
fn caught<T>(decode: impl FnOnce() -> T + UnwindSafe) -> Result<T, String> {
    catch_unwind(decode).map_err(|unwound| match unwound.downcast::<Message>() {
        Ok(message) => message.0,
        Err(panic) => resume_unwind(panic),
    })
}

/// A message of the decoder, while it unwinds.
struct Message(String);

/// How the decoder reports errors and warnings.
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
fn code(decoder: &sys::jpeg_common_struct) -> sys::J_MESSAGE_CODE {
    // SAFETY: libjpeg calls with the decoder whose `err` points to the struct of `errors`, alive as long as the decoder.
    unsafe { (*decoder.err).msg_code as sys::J_MESSAGE_CODE }
}

/// The text of the message that libjpeg reports.
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
