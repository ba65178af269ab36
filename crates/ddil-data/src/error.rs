use std::path::PathBuf;

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

use crate::layout::ENDINGS;

/// Everything that can go wrong between images on disk and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// An argument is undefined or sparse.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// A data set is not where it is looked for.
    #[error(
        "no {dataset} in {}; `make setup` fetches it, or let DDIL_DATA name the folder that has it",
        list(looked_in)
    )]
    Missing {
        /// Name of the data set.
        dataset: &'static str,
        /// The folders, in the order in which they were looked at.
        looked_in: Vec<PathBuf>,
    },
    /// A file or folder could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// A file has other contents than the data set's own.
    #[error("{} is damaged or another file: its SHA-256 is {found}, expected {expected}", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The SHA-256 of its contents, unpacked.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A file does not begin as an IDX file of this sort does.
    #[error("{} is no IDX file of {expected}: it begins with the bytes {found:02x?}", path.display())]
    IdxHeader {
        /// The file.
        path: PathBuf,
        /// Its first bytes, up to four.
        found: Vec<u8>,
        /// What it should hold, and the bytes that it should begin with.
        expected: &'static str,
    },
    /// An IDX file's header promises another length than the file has.
    #[error("{} has {found} bytes; its header, with dimensions {dims:?}, makes {expected}", path.display())]
    IdxLength {
        /// The file.
        path: PathBuf,
        /// The dimensions in its header; fewer than there should be if the file ends within.
        dims: Vec<u32>,
        /// Bytes in the file; of a packed one, as far as it was unpacked to see that there are too many.
        found: u64,
        /// Bytes that the header makes.
        expected: u64,
    },
    /// There are not as many labels as images.
    #[error("{images} images, but {labels} labels")]
    LabelCount {
        /// Number of images.
        images: i64,
        /// Number of labels.
        labels: i64,
    },
    /// A label is not among the classes.
    #[error("label {found} is not among the classes 0 to {}", num_classes - 1)]
    Label {
        /// The label.
        found: i64,
        /// Number of classes.
        num_classes: i64,
    },
    /// A tensor has another shape or kind than it must.
    #[error("`{name}` is {found}; expected {expected}")]
    Tensor {
        /// The argument.
        name: &'static str,
        /// Its kind and shape.
        found: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// A sample that the data set does not have was asked for.
    #[error("sample {index} was asked for, but the data set has {len}")]
    Index {
        /// The index.
        index: i64,
        /// Number of samples.
        len: i64,
    },
    /// A file is no PNG that can be read.
    #[error("could not read {} as a PNG", path.display())]
    Png {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        source: png::DecodingError,
    },
    /// A file is no JPEG that can be read.
    #[error("could not read {} as a JPEG", path.display())]
    Jpeg {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A picture has another size or colour type than the first, or one that is not taken.
    #[error("{} is {found}; expected {expected}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// Its size and colour type.
        found: String,
        /// Those that it should have.
        expected: String,
    },
    /// A folder has no picture in it.
    #[error("no file ending in {ENDINGS} in {} or its folders", path.display())]
    NoPictures {
        /// The folder.
        path: PathBuf,
    },
    /// A folder has pictures beside folders of pictures, so that some would have a label and some not.
    #[error("{} has pictures ({}) beside folders of pictures ({}); labels would be missing", path.display(), picture.display(), folder.display())]
    MixedFolder {
        /// The folder.
        path: PathBuf,
        /// A picture in it.
        picture: PathBuf,
        /// A folder of pictures in it.
        folder: PathBuf,
    },
    /// Captions cannot be read as they stand.
    #[error("{} cannot be read as captions:{}", path.display(), lines(problems))]
    Captions {
        /// The folder or file.
        path: PathBuf,
        /// Everything that is wrong with it.
        problems: Vec<String>,
    },
    /// A folder of latents and prompts is damaged, or does not fit itself or the teacher.
    #[error("{} cannot be used as encoded data:{}", path.display(), lines(problems))]
    Encoded {
        /// The folder.
        path: PathBuf,
        /// Everything that is wrong with it.
        problems: Vec<String>,
    },
    /// A generator of random numbers refused.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// libtorch refused an operation.
    #[error("{op}: libtorch refused: {reason}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// What libtorch said.
        reason: String,
    },
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The setting that is not allowed, where that is what went wrong.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            _ => None,
        }
    }

    /// Names the function in which libtorch refused; for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
        // The message continues with a C++ backtrace.
        move |error| {
            let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
            Self::Torch { op, reason }
        }
    }
}

/// The first of many lines: a thousand pictures without captions are one mistake.
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
