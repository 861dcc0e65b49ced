//! Failures as a person or a script sees them: a sentence and an exit code.

use std::fmt;

use tonic::{Code, Status};

/// The request is wrong; the message says which key and what would be right.
pub(crate) const WRONG_REQUEST: u8 = 2;
/// The job failed.
pub(crate) const JOB_FAILED: u8 = 3;
/// Data is corrupt or missing.
pub(crate) const BAD_DATA: u8 = 4;
/// Interrupted by the user.
pub(crate) const INTERRUPTED: u8 = 130;

/// A failed command.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl fmt::Display) -> Self {
        Self { code, message: message.to_string() }
    }

    pub(crate) fn request(message: impl fmt::Display) -> Self {
        Self::new(WRONG_REQUEST, message)
    }

    pub(crate) fn job(message: impl fmt::Display) -> Self {
        Self::new(JOB_FAILED, message)
    }

    /// A job that was cancelled did not get to its end, and nobody interrupted the command that waits for it.
    pub(crate) fn cancelled() -> Self {
        Self::job("the job was cancelled; submit it again with --resume or --fresh")
    }

    pub(crate) fn code(&self) -> u8 {
        self.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let code = match status.code() {
            Code::DataLoss => BAD_DATA,
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::NotFound
            | Code::AlreadyExists
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated
            | Code::PermissionDenied => WRONG_REQUEST,
            _ => JOB_FAILED,
        };
        Self::new(code, status.message())
    }
}

impl From<proto::spec::SpecError> for Failure {
    fn from(error: proto::spec::SpecError) -> Self {
        Self::request(error)
    }
}

impl From<checkpoint_store::StoreError> for Failure {
    fn from(error: checkpoint_store::StoreError) -> Self {
        use checkpoint_store::Kind;
        let code = match error.kind() {
            Kind::Corrupt => BAD_DATA,
            Kind::Input | Kind::Fenced => WRONG_REQUEST,
            Kind::Retry | Kind::Bug => JOB_FAILED,
        };
        Self::new(code, chain(&error))
    }
}

/// An error with its causes, as one sentence; a cause already told by its parent is not repeated.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
