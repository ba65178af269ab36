use std::fmt::Write;

/// Bytes in hexadecimal, two small letters or digits each: how checksums are written.
///
/// # Example
///
/// ```
/// assert_eq!(ddil_files::hex(&[0, 171]), "00ab");
/// ```
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
