use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Opens a plain file for reading; what is none is refused, where opening it or reading from it might wait for ever.
///
/// # Errors
///
/// What the system says; [`io::ErrorKind::InvalidInput`] for a folder, a pipe or a device, also behind a link.
pub fn open_plain_file(path: impl AsRef<Path>) -> io::Result<File> {
    let path = path.as_ref();
    // Before it is opened: opening a pipe waits for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file"));
    }
    File::open(path)
}

/// The whole of a plain file, unless it has more than `max_bytes`.
///
/// For files that are small by nature, such as settings and indices: what a stranger put in their place (an endless
/// device, a pipe that nobody writes to, a huge file) is refused before memory is taken for it.
///
/// # Errors
///
/// What the system says; [`io::ErrorKind::InvalidInput`] for what is no plain file and [`io::ErrorKind::FileTooLarge`] for
/// one that is too large.
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
    let file = open_plain_file(path)?;
    let len = file.metadata()?.len();
    ensure_at_most(len, max_bytes)?;
    let mut bytes = Vec::with_capacity(len as usize);
    // A file may say that it is empty and have no end, or grow.
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    ensure_at_most(bytes.len() as u64, max_bytes)?;
    Ok(bytes)
}

/// As [`read_bounded`], for text.
///
/// # Errors
///
/// As [`read_bounded`], and [`io::ErrorKind::InvalidData`] if it is not UTF-8.
pub fn read_text_bounded(path: impl AsRef<Path>, max_bytes: u64) -> io::Result<String> {
    let bytes = read_bounded(path, max_bytes)?;
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn ensure_at_most(bytes: u64, max_bytes: u64) -> io::Result<()> {
    if bytes <= max_bytes {
        return Ok(());
    }
    let message = format!("it has {bytes} bytes or more, where at most {max_bytes} are read");
    Err(io::Error::new(io::ErrorKind::FileTooLarge, message))
}
