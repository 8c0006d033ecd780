//! Renders chat templates in a process of their own, which can be ended.
//!
//! A template is a program that came with a model. `template.rs` bounds what it computes, by fuel and
//! bytes; here the operating system bounds the time and the memory of whoever computes it. The process is
//! this program again with the argument [`COMMAND`]: a program that gives [`render`] to
//! [`Text::with_renderer`](super::Text::with_renderer) must call [`serve`] when it has that argument.
//!
//! Memory is bounded where there is `setrlimit`; elsewhere only by the bounds of `template.rs`.
//! Invariant: within [`PATIENCE`] the caller has a text or an error, whatever the template does.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread::Builder;
use std::time::Duration;

use serde_json::{Value, json};

use super::template::{self, Date, MAX_OUTPUT};
use crate::{Error, Result};

/// The argument that makes a program call [`serve`].
pub const COMMAND: &str = "render-template";

/// How long the caller waits, the start of the process included.
pub const PATIENCE: Duration = Duration::from_millis(1900);

/// Seconds of computation.
#[cfg(unix)]
const SECONDS: u64 = 1;
/// Bytes that a template may have written to, its stack included.
#[cfg(unix)]
const DATA: u64 = 256 << 20;
/// Bytes of addresses, the program included.
#[cfg(unix)]
const ADDRESSES: u64 = 1 << 30;

/// Longest job and longest answer, in bytes; JSON writes a byte with six at most.
const MAX_MESSAGE: u64 = 6 * MAX_OUTPUT as u64 + 1024;

/// Renders as [`template::render`] does, in another process.
///
/// # Errors
/// [`Error::Template`] as there, and when the process cannot be started, takes longer than
/// [`PATIENCE`] or needs more memory than it has.
pub fn render(what: &str, source: &str, context: &Value, today: Date) -> Result<String> {
    let job = json!({
        "what": what, "source": source, "context": context,
        "today": [today.year, today.month, today.day],
    });
    let answer = ask(&job.to_string()).unwrap_or_else(|e| {
        let problem =
            format!("no process to render it in: {e}; is the program still in its place?");
        Err(problem)
    });
    answer.map_err(|problem| Error::Template {
        what: what.to_owned(),
        problem,
    })
}

/// Starts the process and waits for its answer, but no longer than [`PATIENCE`].
fn ask(job: &str) -> std::io::Result<Result<String, String>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(COMMAND);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(Stdio::null());
    // An interrupt of the caller is the caller's.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn()?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        let writer = Builder::new().spawn_scoped(scope, move || {
            // A process that ended early does not read; its answer says why.
            stdin.map(|mut pipe| pipe.write_all(job.as_bytes()))
        });
        let reader = Builder::new().spawn_scoped(scope, move || {
            let mut bytes = Vec::new();
            if let Some(pipe) = stdout {
                let _ = pipe.take(MAX_MESSAGE).read_to_end(&mut bytes);
            }
            // Nobody waits for what comes too late.
            let _ = send.send(bytes);
        });
        let answer = receive.recv_timeout(PATIENCE);
        // This also ends the threads: nobody else holds the pipes.
        let _ = child.kill();
        let ended = child.wait();
        writer?;
        reader?;
        let Ok(bytes) = answer else {
            let seconds = PATIENCE.as_secs_f64();
            return Ok(Err(format!("it takes more than {seconds} s to render")));
        };
        Ok(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
            let how = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
            Err(format!(
                "it takes more time or memory than a chat template may ({how})"
            ))
        }))
    })
}

/// The other side: bounds this process, reads a job from standard input, writes the answer to
/// standard output.
///
/// # Errors
/// [`Error::Io`] when either of them fails or the bounds cannot be set; [`Error::Usage`] when the job
/// is none.
pub fn serve() -> Result<()> {
    bound().map_err(Error::io("the limits of the process"))?;
    let mut bytes = Vec::new();
    std::io::stdin()
        .take(MAX_MESSAGE)
        .read_to_end(&mut bytes)
        .map_err(Error::io("standard input"))?;
    let job: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::Usage(format!("{COMMAND} is not for people: {e}")))?;
    let text = |key: &str| job[key].as_str().unwrap_or_default();
    let number = |at: usize| job["today"][at].as_u64().unwrap_or_default();
    let today = Date {
        year: u16::try_from(number(0)).unwrap_or_default(),
        month: u8::try_from(number(1)).unwrap_or_default(),
        day: u8::try_from(number(2)).unwrap_or_default(),
    };
    let rendered = template::render(text("what"), text("source"), &job["context"], today);
    let answer = rendered.map_err(|error| match error {
        Error::Template { problem, .. } => problem,
        other => other.to_string(),
    });
    let answer = serde_json::to_vec(&answer).map_err(|e| Error::Usage(e.to_string()))?;
    let mut out = std::io::stdout();
    out.write_all(&answer)
        .and_then(|()| out.flush())
        .map_err(Error::io("standard output"))
}

/// Asks the system to end this process if it computes or holds too much.
#[cfg(unix)]
fn bound() -> std::io::Result<()> {
    use rlimit::Resource;
    let bounds = [
        (Resource::CPU, SECONDS),
        (Resource::DATA, DATA),
        (Resource::AS, ADDRESSES),
        (Resource::CORE, 0),
    ];
    for (resource, most) in bounds {
        let (_, hard) = resource.get()?;
        let most = most.min(hard);
        match resource.set(most, most) {
            // Some systems know a limit by name only.
            Err(e) if cfg!(target_os = "linux") => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Nothing to ask for here.
#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "other systems can refuse")]
fn bound() -> std::io::Result<()> {
    Ok(())
}
