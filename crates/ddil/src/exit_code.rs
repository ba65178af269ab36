//! Exit codes of the program `ddil` that other programs act on; 0 is success, 1 any other failure, 2 a wrong command line.

/// A loss, a gradient or samples are NaN or infinite: the training has diverged.
pub(crate) const NOT_FINITE: u8 = 3;

/// Not finished, but not failed: stopped and saved, or in use by another process. Run it again.
pub(crate) const TRY_AGAIN: u8 = 75;
