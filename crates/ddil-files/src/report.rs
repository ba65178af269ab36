use std::error::Error;
use std::fmt;

use crate::file_terms::json_text;

/// Any error, displayed with its causes: the error type of a `main` function.
///
/// The errors of this workspace follow Rust's convention: `Display` prints the error alone, [`Error::source`] returns its
/// cause. A message such as `could not read model/config.json` therefore lacks the reason. A `Report` prints both, and
/// so does a `main` that returns one. Every crate re-exports it. [`with_causes`] does the same for a reference.
///
/// # Example
///
/// ```
/// use ddil_files::{Error, Report, read_json};
///
/// fn run() -> Result<(), Report> {
///     let _config: Vec<f64> = read_json("model/config.json".as_ref())?;
///     Ok(())
/// }
///
/// let report = run().unwrap_err();
/// assert_eq!(report.to_string(), "could not read model/config.json: No such file or directory (os error 2)");
/// assert!(matches!(report.downcast_ref(), Some(Error::Io { .. })));
/// ```
pub struct Report(Box<dyn Error + Send + Sync>);

impl Report {
    /// The error, if it has the type `E`.
    pub fn downcast_ref<E: Error + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for Report {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&with_causes(&*self.0))
    }
}

/// The same as `Display`: Rust prints the error of a `main` function in this form.
impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An error and its causes, in one line.
pub fn with_causes(error: &dyn Error) -> String {
    causes(error).join(": ")
}

/// The messages of an error and its causes, without repetition: what an error of another library repeats of its cause is
/// removed from its own message. A cause that is an error of JSON is in the terms of a file, as by
/// [`in_json_terms`](crate::in_json_terms); the error itself is not.
///
/// # Example
///
/// ```
/// use std::io::{Error, ErrorKind};
///
/// #[derive(Debug, thiserror::Error)]
/// #[error("invalid header: {source}")]
/// struct InvalidHeader {
///     source: Error,
/// }
///
/// let source = Error::new(ErrorKind::InvalidData, "no name");
/// assert_eq!(ddil_files::causes(&InvalidHeader { source }), ["invalid header", "no name"]);
/// ```
pub fn causes(error: &dyn Error) -> Vec<String> {
    let sources = std::iter::successors(error.source(), |&cause| cause.source());
    let in_terms = sources.clone().map(|cause| match cause.downcast_ref::<serde_json::Error>() {
        Some(json) => json_text(json),
        None => cause.to_string(),
    });
    let mut own: Vec<String> = std::iter::once(error.to_string()).chain(in_terms).collect();
    for (text, cause) in own.iter_mut().zip(sources.map(ToString::to_string)) {
        let repeated = format!(": {cause}");
        if *text == cause {
            text.clear();
        } else if text.ends_with(&repeated) {
            text.truncate(text.len() - repeated.len());
        }
    }
    own.retain(|text| !text.is_empty());
    own
}
