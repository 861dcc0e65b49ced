//! Child processes of `cairn train`: started, restarted when they die, and stopped with it.
//!
//! A child holds a pipe from its parent on standard input and stops when that closes, so none outlives a parent that
//! was killed. It has a process group of its own, so that a terminal's Ctrl-C reaches only the parent, which saves
//! first.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::failure::{BAD_DATA, Failure, WRONG_REQUEST};

/// A part that keeps dying is started again at most this often.
const RESTART_EVERY: Duration = Duration::from_millis(500);
/// Asked to stop, a part gets this long before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// A part that ended in a way that starting it again cannot mend.
#[derive(Debug)]
pub(crate) struct Refused {
    /// The part's name.
    pub(crate) part: &'static str,
    /// Its exit code.
    pub(crate) code: u8,
}

/// One supervised part.
pub(crate) struct Part {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Part {
    /// Starts `cairn <arguments> <first>` and keeps `cairn <arguments>` running until [`Part::stop`]: what is in
    /// `first` holds for the first start only.
    ///
    /// An end that another start cannot mend ([`is_final`]) is final and told to `refused`; any other is met with a
    /// restart.
    pub(crate) fn start(
        name: &'static str,
        arguments: Vec<String>,
        first: &[&str],
        refused: mpsc::Sender<Refused>,
    ) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::job(format!("cannot find this program's own file: {error}")))?;
        let once: Vec<String> = arguments.iter().cloned().chain(first.iter().map(ToString::to_string)).collect();
        let first = spawn(&program, &once)
            .map_err(|error| Failure::job(format!("cannot start the {name} process: {error}")))?;
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(keep(name, program, arguments, first, stopped, refused));
        Ok(Self { stop, task })
    }

    /// Asks the part to stop, and kills it if it does not.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.task.await;
    }
}

/// Whether starting a part again cannot mend what ended it: a wrong request or damaged data stay what they are. A part
/// that ended well was asked to by somebody else, with SIGTERM, and the job still needs it.
fn is_final(code: i32) -> bool {
    [WRONG_REQUEST, BAD_DATA].map(i32::from).contains(&code)
}

/// Completes when the part shall stop, or nobody is left to say so.
async fn asked(stopped: &mut watch::Receiver<bool>) {
    drop(stopped.wait_for(|stop| *stop).await);
}

/// A child and its lifeline. Waiting for a child closes the standard input it still holds, so that is kept apart.
struct Running {
    child: Child,
    lifeline: Option<ChildStdin>,
}

fn spawn(program: &PathBuf, arguments: &[String]) -> std::io::Result<Running> {
    let mut child = Command::new(program)
        .args(arguments)
        // The parts of one machine meet on loopback, whatever this shell uses for a cluster.
        .env_remove("CAIRN_TLS")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let lifeline = child.stdin.take();
    Ok(Running { child, lifeline })
}

async fn keep(
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
    mut running: Running,
    mut stopped: watch::Receiver<bool>,
    refused: mpsc::Sender<Refused>,
) {
    loop {
        let status = tokio::select! {
            status = running.child.wait() => status,
            () = asked(&mut stopped) => {
                drop(running.lifeline.take());
                if timeout(STOP_WITHIN, running.child.wait()).await.is_err() {
                    tracing::warn!("the {name} process did not stop within {STOP_WITHIN:?} and is killed");
                    let _ = running.child.kill().await;
                }
                return;
            }
        };
        let code = status.as_ref().ok().and_then(std::process::ExitStatus::code);
        if let Some(code) = code.filter(|code| is_final(*code)) {
            let _ = refused.send(Refused { part: name, code: u8::try_from(code).unwrap_or(3) }).await;
            return;
        }
        tracing::warn!("the {name} process ended ({status:?}); starting it again");
        loop {
            tokio::select! {
                () = tokio::time::sleep(RESTART_EVERY) => {}
                () = asked(&mut stopped) => return,
            }
            match spawn(&program, &arguments) {
                Ok(new) => {
                    running = new;
                    break;
                }
                Err(error) => tracing::error!("cannot start the {name} process again: {error}"),
            }
        }
    }
}
