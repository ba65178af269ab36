//! Time and memory of this process, as reported by the system, and synchronisation with the device.

use std::io::Write;
use std::time::Duration;

use tch::Device;

/// Waits until all work submitted to the device is done.
pub fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// Processor time of all threads so far; none if the system does not report it this way.
///
/// On a shared machine it is more reliable than wall time.
pub fn processor_time() -> Option<Duration> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let of_task = |task: std::io::Result<std::fs::DirEntry>| {
        let times = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        times.split(' ').next()?.parse().ok().map(Duration::from_nanos)
    };
    tasks.map(of_task).sum()
}

/// Current resident memory, in KiB.
pub fn resident_kib() -> Option<u64> {
    of_status("VmRSS:")
}

/// Peak resident memory since the start or since [`forget_peak`], in KiB.
pub fn peak_kib() -> Option<u64> {
    of_status("VmHWM:")
}

/// Resets [`peak_kib`] to the current value; returns whether the system did so.
pub fn forget_peak() -> bool {
    let file = std::fs::OpenOptions::new().write(true).open("/proc/self/clear_refs");
    file.and_then(|mut file| file.write_all(b"5")).is_ok()
}

fn of_status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}
