//! Performs several work items at a time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use ddil_trainer::Interrupt;

use super::item::WorkItem;
use super::plan::Comparison;
use super::verbs::Program;
use super::work::{End, Worker};
use crate::error::Result;

/// An event of a work item.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// It started.
    Started,
    /// It ended, after this many seconds.
    Ended(End, f64),
}

/// Performs work items, as many at a time as the matrix has workers.
///
/// The failure of a cell does not affect the others; the failure of any other item ends all, since later items need it.
/// After `interrupt` no item is started, and running ones are asked to stop. Returns how each started item ended.
///
/// # Errors
///
/// Errors of the file system, or of starting a process.
pub(crate) fn run(
    items: Vec<WorkItem>,
    comparison: &Comparison,
    program: &Program,
    interrupt: &Interrupt,
    on_event: &(dyn Fn(&WorkItem, Event) + Sync),
) -> Result<Vec<(WorkItem, End)>> {
    let queue = Mutex::new(VecDeque::from(items));
    let (ended, given_up) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let should_stop = || interrupt.is_requested() || given_up.load(Ordering::SeqCst);
    let work = || -> Result<()> {
        let worker = Worker { comparison, program, should_stop: &should_stop };
        while !should_stop() {
            let Some(item) = next() else { break };
            on_event(&item, Event::Started);
            let started = Instant::now();
            let end = worker.perform(&item).inspect_err(|_| {
                given_up.store(true, Ordering::SeqCst);
            })?;
            if matches!(end, End::Failed(_)) && !item.is_cell() {
                given_up.store(true, Ordering::SeqCst);
            }
            on_event(&item, Event::Ended(end.clone(), started.elapsed().as_secs_f64()));
            ended.lock().unwrap_or_else(PoisonError::into_inner).push((item, end));
        }
        Ok(())
    };
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let workers = 0..comparison.matrix.workers.max(1);
        let threads: Vec<_> = workers.map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(ended.into_inner().unwrap_or_else(PoisonError::into_inner))
}
