use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::python_json::without_mark;

/// Opens a regular file for reading.
///
/// Anything else is refused: opening or reading a pipe or a device can block forever.
///
/// # Errors
///
/// The system's error; [`io::ErrorKind::InvalidInput`] for a folder, a pipe or a device, also behind a link.
pub fn open_regular_file(path: impl AsRef<Path>) -> io::Result<File> {
    let path = path.as_ref();
    // Checked first: opening a pipe waits for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    File::open(path)
}

/// The content of a regular file of at most `max_bytes`.
///
/// For untrusted files that are usually small, such as settings and indices. An endless device, a pipe without a writer
/// or a huge file is refused before memory is allocated for it.
///
/// # Errors
///
/// The system's error; [`io::ErrorKind::InvalidInput`] if it is not a regular file, [`io::ErrorKind::FileTooLarge`] if
/// it is too large.
///
/// # Example
///
/// ```
/// use ddil_files::read_bounded;
///
/// # let path = std::env::temp_dir().join(format!("ddil-bounded-{}", std::process::id()));
/// std::fs::write(&path, "four")?;
/// assert_eq!(read_bounded(&path, 4)?, b"four");
/// assert!(read_bounded(&path, 3).is_err());
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn read_bounded(path: impl AsRef<Path>, max_bytes: u64) -> io::Result<Vec<u8>> {
    let file = open_regular_file(path)?;
    let len = file.metadata()?.len();
    ensure_at_most(len, max_bytes)?;
    let mut bytes = Vec::with_capacity(len as usize);
    // The reported length can be wrong: special files report 0, and a file can grow.
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    ensure_at_most(bytes.len() as u64, max_bytes)?;
    Ok(bytes)
}

/// The content of a text file without a byte order mark; see [`read_bounded`].
///
/// # Errors
///
/// As [`read_bounded`], and [`io::ErrorKind::InvalidData`] if it is not UTF-8.
pub fn read_text_bounded(path: impl AsRef<Path>, max_bytes: u64) -> io::Result<String> {
    let mut bytes = read_bounded(path, max_bytes)?;
    let mark = bytes.len() - without_mark(&bytes).len();
    bytes.drain(..mark);
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn ensure_at_most(bytes: u64, max_bytes: u64) -> io::Result<()> {
    if bytes <= max_bytes {
        return Ok(());
    }
    let message = format!("it has {bytes} bytes or more; the limit is {max_bytes}");
    Err(io::Error::new(io::ErrorKind::FileTooLarge, message))
}
