//! File extensions and pixel layout of images.

/// The extensions of image files, for messages.
pub(crate) const EXTENSIONS: &str = ".png, .jpg or .jpeg";

/// Channels, height and width of an image whose bytes are rows of pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Layout {
    pub(crate) channels: usize,
    pub(crate) height: u32,
    pub(crate) width: u32,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let colour = if self.channels == 1 { "grey" } else { "RGB" };
        write!(f, "{colour}, {}x{} pixels", self.width, self.height)
    }
}
