//! The training thread: one OS thread that owns the model, the device and the ring.
//!
//! It takes one order at a time and answers each with exactly one event that says it is idle again. A panic inside is
//! caught and reported as the job's failure with its message: a defect must not look like a vanished worker.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use proto::wire::{self, FailureKind};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::Control;
use crate::capture::Capturer;
use crate::machine::session::Input;
use crate::run::Options;
use crate::slots::Slots;
use crate::trainer::{Ended, Failure, Ready, prepare as prepare_on};

/// What the session tells the training thread.
pub enum Order {
    /// Read the spec and the data, build the model, open the ring's port.
    Prepare(wire::Prepare),
    /// Train in a generation until it ends.
    Run(wire::WorkerRun, Arc<Control>),
}

/// What the training thread tells the session.
#[derive(Debug)]
pub enum News {
    /// For the session machine.
    Event(Input),
    /// For the agent, and droppable.
    Step(wire::StepReport),
    /// For the agent: a slot to upload.
    Captured(wire::Captured),
    /// For the agent: a capture that did not happen.
    Skipped(wire::SaveSkipped),
    /// For the agent: fill the live slot.
    Restore(wire::Restore),
    /// For the agent: what became of snapshots in all parity groups.
    Kept(wire::StepsKept),
    /// The device is gone, and this process of no more use; why.
    Lost(String),
}

/// Starts the thread; it ends when the sender of its orders is dropped.
pub(super) fn start(
    options: &Options,
    news: mpsc::Sender<News>,
    slots: Arc<Slots>,
    handle: Handle,
) -> std::io::Result<std::sync::mpsc::Sender<Order>> {
    let (sender, orders) = std::sync::mpsc::channel();
    let capturer = Capturer::start(slots, news.clone())?;
    let job = options.job.clone();
    std::thread::Builder::new().name("cairn-trainer".into()).spawn(move || {
        let mut prepared: Option<Box<dyn Ready>> = None;
        let mut lost = None;
        while let Ok(order) = orders.recv() {
            let event = match order {
                Order::Prepare(prepare) => match guarded(|| prepare_on(&job, &prepare, &capturer)) {
                    Ok(ready) => {
                        let identity = ready.identity();
                        prepared = Some(ready);
                        Input::Prepared(identity)
                    }
                    Err(failure) => failed(None, failure, &mut lost),
                },
                Order::Run(run, control) => {
                    let generation = run.announcement.as_ref().map_or(0, |announcement| announcement.generation);
                    let tell = |item: News| drop(news.blocking_send(item));
                    let ended = match &mut prepared {
                        Some(prepared) => guarded(|| prepared.run(&run, &control, &capturer, &handle, &tell)),
                        None => Err(Failure::new(FailureKind::Fatal, "the worker was not prepared")),
                    };
                    match ended {
                        Ok(Ended { step, loss }) => Input::Stopped { generation, step, loss },
                        Err(_) if control.is_aborted() => Input::Left { generation },
                        Err(failure) => failed(Some(generation), failure, &mut lost),
                    }
                }
            };
            if news.blocking_send(News::Event(event)).is_err() {
                return;
            }
            if let Some(reason) = lost.take() {
                drop(news.blocking_send(News::Lost(reason)));
                return;
            }
        }
    })?;
    Ok(sender)
}

fn failed(generation: Option<u64>, failure: Failure, lost: &mut Option<String>) -> Input {
    if failure.lost {
        *lost = Some(failure.reason.clone());
    }
    tracing::error!(generation, kind = failure.kind.as_str_name(), reason = failure.reason, "cannot go on");
    let Failure { kind, reason, moved, .. } = failure;
    Input::Failed { generation, kind, reason, moved }
}

/// Runs `work`; a panic in it becomes a failure of the job.
fn guarded<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let reason = format!("a defect in the worker: {}", message(panic.as_ref()));
        Err(Failure::new(FailureKind::Fatal, reason))
    })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a message")
}
