//! The `hogwild` command: parse, log, run, print the error chain, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use hogwild::cli::{self, Cli};

fn main() -> ExitCode {
    hogwild::caught::keep_quiet();
    let cli = Cli::parse();
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Error)
        .filter_module("hogwild", cli.log_level())
        .parse_default_env()
        .init();
    match cli::run(&cli) {
        Ok(code) => code,
        // Whoever reads us has read enough: `hogwild kernels list | head -1`.
        Err(error) if cli::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            cli::complain(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
