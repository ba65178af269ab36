//! Progress of a measurement.

/// Shows the progress of a measurement, and may stop it.
pub trait Monitor {
    /// `done` of `total` images of `what` are done.
    fn note(&mut self, what: &str, done: u64, total: u64);

    /// Whether to stop before the next batch, with [`Error::Stopped`](crate::Error::Stopped). The default is never.
    fn should_stop(&self) -> bool {
        false
    }
}

/// A [`Monitor`] that shows nothing and stops nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unmonitored;

impl Monitor for Unmonitored {
    fn note(&mut self, _what: &str, _done: u64, _total: u64) {}
}
