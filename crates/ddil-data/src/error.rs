use std::path::PathBuf;

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

use crate::layout::EXTENSIONS;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](crate::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// An argument is undefined or sparse.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// A data set was not found.
    #[error(
        "no {dataset} in {}; run `make setup` to download it, or set DDIL_DATA to the folder that contains it",
        list(looked_in)
    )]
    Missing {
        /// Name of the data set.
        dataset: &'static str,
        /// The folders searched, in order.
        looked_in: Vec<PathBuf>,
    },
    /// A file or folder could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// The content of a file is not that of the published data set.
    #[error("{} is damaged or not the published file: its SHA-256 is {found}, expected {expected}", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The SHA-256 of its decompressed content.
        found: String,
        /// The expected SHA-256.
        expected: &'static str,
    },
    /// A file does not begin with the expected IDX header.
    #[error("{} is not an IDX file of {expected}: it begins with the bytes {found:02x?}", path.display())]
    IdxHeader {
        /// The file.
        path: PathBuf,
        /// Its first bytes, up to four.
        found: Vec<u8>,
        /// The expected content and first bytes.
        expected: &'static str,
    },
    /// The length of an IDX file does not match its header.
    #[error("{} has {found} bytes; expected {expected} for the dimensions {dims:?} in its header", path.display())]
    IdxLength {
        /// The file.
        path: PathBuf,
        /// The dimensions in its header; fewer than expected if the file ends within the header.
        dims: Vec<u32>,
        /// Bytes in the file. Decompression stops once there are too many.
        found: u64,
        /// Bytes expected for the header.
        expected: u64,
    },
    /// The numbers of labels and images differ.
    #[error("{images} images but {labels} labels")]
    LabelCount {
        /// Number of images.
        images: i64,
        /// Number of labels.
        labels: i64,
    },
    /// A label is out of range.
    #[error(
        "label {found} is out of range; expected at least 0 and below {num_classes}, the number of classes"
    )]
    Label {
        /// The label.
        found: i64,
        /// Number of classes.
        num_classes: i64,
    },
    /// A tensor has the wrong shape or kind.
    #[error("`{name}` is {found}; expected {expected}")]
    Tensor {
        /// The argument.
        name: &'static str,
        /// Its kind and shape.
        found: String,
        /// The expected kind and shape.
        expected: &'static str,
    },
    /// The index of a sample is out of range.
    #[error("sample index {index} is out of range: the data set has {len} samples")]
    Index {
        /// The index.
        index: i64,
        /// Number of samples.
        len: i64,
    },
    /// A PNG file cannot be decoded.
    #[error("could not read {} as a PNG", path.display())]
    Png {
        /// The file.
        path: PathBuf,
        /// The error of the decoder.
        source: png::DecodingError,
    },
    /// A JPEG file cannot be decoded.
    #[error("could not read {} as a JPEG", path.display())]
    Jpeg {
        /// The file.
        path: PathBuf,
        /// The error of the decoder.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The size or the colours of an image differ from those of the first image of a folder.
    #[error("{} is {found}; expected {expected} like the first", path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// Its size and colour type.
        found: String,
        /// Those of the first image.
        expected: String,
    },
    /// An image has an unsupported colour type, or is too narrow or large.
    #[error("{} is {found}; expected {expected}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Its size and colour type.
        found: String,
        /// The expected size and colour type.
        expected: String,
    },
    /// A folder contains no images.
    #[error("no file ending in {EXTENSIONS} in {} or its subfolders", path.display())]
    NoImages {
        /// The folder.
        path: PathBuf,
    },
    /// A folder contains images as well as subfolders of images, so only some images would have labels.
    #[error(
        "{} contains images ({}) as well as subfolders of images ({}): use one or the other, because only images in \
         subfolders have labels",
        path.display(),
        image.display(),
        folder.display()
    )]
    MixedFolder {
        /// The folder.
        path: PathBuf,
        /// An image in it.
        image: PathBuf,
        /// A subfolder of images in it.
        folder: PathBuf,
    },
    /// Captions cannot be read.
    #[error("{} cannot be read as captions:{}", path.display(), lines(problems))]
    Captions {
        /// The folder or file.
        path: PathBuf,
        /// All problems found.
        problems: Vec<String>,
    },
    /// A file cannot be read as prompts.
    #[error("{} cannot be read as prompts:{}", path.display(), lines(problems))]
    Prompts {
        /// The file.
        path: PathBuf,
        /// All problems found.
        problems: Vec<String>,
    },
    /// A folder of encoded data is damaged, inconsistent, or does not match the teacher.
    #[error("{} cannot be used as encoded data:{}", path.display(), lines(problems))]
    Encoded {
        /// The folder.
        path: PathBuf,
        /// All problems found.
        problems: Vec<String>,
    },
    /// Images do not fit an extractor of features.
    #[error(transparent)]
    Metrics(#[from] ddil_metrics::Error),
    /// A random number generator failed.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// A libtorch operation failed.
    #[error("{op}: libtorch failed: {reason}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The first line of libtorch's message.
        reason: String,
    },
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The invalid setting, if this error is about one.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Metrics(error) => error.invalid(),
            _ => None,
        }
    }

    /// Adds the name of the function to an error of libtorch; for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
        // A C++ backtrace follows the first line.
        move |error| {
            let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
            Self::Torch { op, reason }
        }
    }
}

/// The first 20 problems, one per line: a thousand images without captions are one mistake.
fn lines(problems: &[String]) -> String {
    const SHOWN: usize = 20;
    let shown = problems.iter().take(SHOWN).fold(String::new(), |text, line| text + "\n  " + line);
    match problems.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown}\n  and {more} more"),
    }
}

fn list(folders: &[PathBuf]) -> String {
    folders.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" or ")
}
