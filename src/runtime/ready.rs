//! Says that the daemon can be used.

use std::io::Write;

use super::error::RuntimeError;
use crate::connector::{ReadyLine, StdoutLine};

/// Prints the ready line, which is all that ever goes to stdout.
pub(super) fn print(ready: ReadyLine) -> Result<(), RuntimeError> {
    let line = serde_json::to_string(&StdoutLine::Ready(ready))
        .map_err(|error| RuntimeError::Bug(format!("the ready line: {error}")))?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")
        .and_then(|()| stdout.flush())
        .map_err(|error| RuntimeError::Machine(format!("the ready line cannot be written to stdout: {error}")))
}
