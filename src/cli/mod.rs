//! The command line: one file for each command, and here what they share.
//!
//! Standard output carries what was asked for and nothing else; progress, logs and errors go to
//! standard error. Text that we did not write (a model's, a driver's, a path) passes
//! [`output::neutralise`] before a terminal sees it. Invariant: commands decide what to do and how it
//! reads, never what a number is.

mod bench;
mod devices;
mod generate;
mod kernels;
mod kernels_bench;
mod load;
mod models;
pub mod output;
mod quantize;
mod replay;
mod scene;
mod table;

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};

use crate::text::child;
use crate::{Error, Result};

/// Several workers of one language model, writing at once over one shared cache.
///
/// Exit codes: 0 success, 1 failure, 2 usage, 3 bad model file, 4 device, 5 hub, 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "hogwild", version)]
pub struct Cli {
    /// Log more on standard error: -v what happens, -vv how, -vvv everything; `RUST_LOG` refines it
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// What `-v` asks to be logged of this crate.
    pub fn log_level(&self) -> log::LevelFilter {
        match self.verbose {
            0 => log::LevelFilter::Warn,
            1 => log::LevelFilter::Info,
            2 => log::LevelFilter::Debug,
            _ => log::LevelFilter::Trace,
        }
    }
}

/// The commands, in the order in which a newcomer meets them.
#[derive(Debug, Subcommand)]
enum Command {
    /// Solve a problem with several workers that write at the same time
    Generate(Box<generate::Args>),
    /// Run a log again and report the first difference
    Replay(replay::Args),
    /// Measure a model's speed: its shape is enough, no checkpoint is needed
    Bench(bench::Args),
    /// List devices, what they can do, and which one would be used
    Devices(devices::Args),
    /// List the models in the Hugging Face cache
    Models(models::Args),
    /// Make a model directory with weights of 4 or 8 bits of one in float
    Quantize(quantize::Args),
    /// List the ops and their kernels, and hold kernels to their reference
    #[command(subcommand)]
    Kernels(kernels::Command),
    /// Render a chat template for a process of this program
    #[command(hide = true, name = child::COMMAND)]
    RenderTemplate,
}

/// Runs a command.
///
/// # Errors
/// Those of the command; a closed standard output is one too, see [`is_closed_pipe`].
pub fn run(cli: &Cli) -> Result<ExitCode> {
    match &cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Replay(args) => replay::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Models(args) => models::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Kernels(command) => kernels::run(command),
        Command::RenderTemplate => child::serve().map(|()| ExitCode::SUCCESS),
    }
}

/// Whether an error only says that nobody reads standard output any more.
pub fn is_closed_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::BrokenPipe)
}

/// Prints an error and its causes on one line of standard error.
pub fn complain(error: &Error) {
    let line = one_line(error);
    // Nobody is left to be told if standard error is closed, too.
    let _ = writeln!(std::io::stderr(), "hogwild: error: {line}");
}

/// An error and its causes on one line, without what a terminal would obey.
fn one_line(error: &Error) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let text = inner.to_string();
        // Some messages already quote their cause.
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = inner.source();
    }
    let words: Vec<_> = line.split_whitespace().collect();
    output::neutralise(&words.join(" ")).into_owned()
}

/// Says something on standard error, on one line.
fn note(text: &str) {
    let line = output::neutralise(text);
    // Nobody is left to be told if standard error is closed.
    let _ = writeln!(std::io::stderr(), "hogwild: {line}");
}

/// The error of a failed write to standard output, ready for `map_err`.
fn stdout_error(source: std::io::Error) -> Error {
    Error::io("standard output")(source)
}

/// Writes a whole answer to standard output.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(stdout_error)
}

/// Writes one JSON value to standard output, indented.
fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn an_error_is_one_line_and_says_its_cause_once() {
        let error = Error::io("model\u{1b}[31m.json")(std::io::Error::other("no\nsuch disk"));
        assert_eq!(one_line(&error), "model␛[31m.json: no such disk");
    }

    #[test]
    fn only_a_broken_pipe_is_a_closed_pipe() {
        let error = |kind: ErrorKind| stdout_error(kind.into());
        assert!(
            is_closed_pipe(&error(ErrorKind::BrokenPipe)),
            "the reader left"
        );
        assert!(
            !is_closed_pipe(&error(ErrorKind::StorageFull)),
            "a full disk is a failure"
        );
    }
}
