#![allow(unsafe_code, reason = "calls C++")]

use std::sync::atomic::{AtomicBool, Ordering};

use crate::ffi;

static KEEPS: AtomicBool = AtomicBool::new(false);

/// Makes the C library keep freed memory instead of returning it to the system; returns whether it accepted the
/// setting.
///
/// A network's intermediate results are large and short-lived. By default glibc maps each one anew, and the system
/// provides its pages one fault at a time; with this setting the pages are reused. The price is that the process stays
/// at its peak of memory. CUDA memory is not affected: libtorch has its own allocator there.
///
/// Sets `M_MMAP_THRESHOLD` to 1 GiB, `M_TRIM_THRESHOLD` to never and `M_TOP_PAD` to 64 MiB. Call it first thing in
/// `main`, and train on the main thread: other threads use smaller pools of the C library, from which blocks beyond
/// 64 MiB are still mapped anew. With a C library other than glibc nothing happens and the result is `false`;
/// with another allocator preloaded it is `true`, without effect.
///
/// # Example
///
/// ```
/// let kept = ddil_libtorch::keep_freed_pages();
/// assert_eq!(kept, cfg!(target_env = "gnu"));
/// assert_eq!(ddil_libtorch::keeps_freed_pages(), kept);
/// ```
pub fn keep_freed_pages() -> bool {
    // SAFETY: `mallopt` may be called at any time from any thread.
    let agreed = unsafe { ffi::ddil_keep_freed_pages() };
    KEEPS.store(agreed, Ordering::Relaxed);
    agreed
}

/// Whether [`keep_freed_pages`] was called and returned `true`.
pub fn keeps_freed_pages() -> bool {
    KEEPS.load(Ordering::Relaxed)
}
