//! Content that is not what a file's name promises, by its first bytes.

/// The start of the first line of a Git LFS pointer.
const LFS: &[u8] = b"version https://git-lfs";
/// An HTML page begins within this many bytes; white space and comments may precede it.
const HTML_START: usize = 512;

/// The actual content of a file that a reader could not read, as text for a message: what was found, and what to do.
///
/// Recognised are Git LFS pointers, pages that a server sent instead of a file, archives of `torch.save`, and images.
/// Call it where a reader has failed: a valid file may begin with the same bytes.
///
/// # Example
///
/// ```
/// use ddil_files::mistaken_content;
///
/// let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
/// assert!(mistaken_content(pointer).is_some_and(|text| text.contains("git lfs pull")));
/// assert!(mistaken_content(b"\n<!DOCTYPE html><html>").is_some_and(|text| text.contains("HTML")));
/// assert_eq!(mistaken_content(b"{}"), None);
/// ```
pub fn mistaken_content(start: &[u8]) -> Option<&'static str> {
    if start.starts_with(LFS) {
        return Some(
            "it is a Git LFS pointer, and the file itself was not downloaded: run `git lfs pull` in its repository, or \
             download the file again",
        );
    }
    if is_page(start) {
        return Some(
            "it is an HTML or XML page, which a server sent instead of the file (an error or a log-in page): download \
             the file again",
        );
    }
    if start.starts_with(b"PK\x03\x04") {
        return Some(
            "it is a ZIP archive, as `torch.save` writes: convert it with Python, or unpack it",
        );
    }
    image_kind(start)
}

fn is_page(start: &[u8]) -> bool {
    let start = &start[..start.len().min(HTML_START)];
    let text = String::from_utf8_lossy(start).trim_start_matches('\u{feff}').trim().to_lowercase();
    text.starts_with('<')
        && ["<!doctype html", "<html", "<head", "<?xml"].iter().any(|tag| text.contains(tag))
}

fn image_kind(start: &[u8]) -> Option<&'static str> {
    let at =
        |place: usize, bytes: &[u8]| start.get(place..).is_some_and(|rest| rest.starts_with(bytes));
    Some(match () {
        () if at(0, b"\x89PNG\r\n") => "it is a PNG image",
        () if at(0, b"\xff\xd8\xff") => "it is a JPEG image",
        () if at(0, b"RIFF") && at(8, b"WEBP") => "it is a WebP image",
        () if at(0, b"GIF8") => "it is a GIF image",
        () if at(0, b"II*\0") || at(0, b"MM\0*") => "it is a TIFF image",
        () if at(4, b"ftypavif") => "it is an AVIF image",
        () if at(4, b"ftyphei") || at(4, b"ftypmif1") => "it is a HEIC image",
        () => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_recognised_by_its_first_bytes() {
        let found = |bytes: &[u8]| mistaken_content(bytes).unwrap_or_default();
        assert!(found(b"<html><body>404</body></html>").contains("HTML"));
        assert!(found(b"\xef\xbb\xbf <!-- cached --><!DOCTYPE HTML>").contains("HTML"));
        assert!(
            found(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>").contains("XML")
        );
        assert!(found(b"PK\x03\x04archive/data.pkl").contains("torch.save"));
        assert!(found(b"RIFF\x10\0\0\0WEBPVP8 ").contains("WebP"));
        assert!(found(b"\0\0\0\x20ftypavif").contains("AVIF"));
    }

    #[test]
    fn other_content_is_left_to_its_reader() {
        for bytes in
            [&b""[..], b"<", b"<a photo of a bag>", b"a <html> page", b"RIFF", b"\x10\0\0\0{"]
        {
            assert_eq!(mistaken_content(bytes), None, "{bytes:?}");
        }
    }
}
