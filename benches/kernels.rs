//! Every kernel on what a model's pass dispatches, caches swept in between: `cargo bench`.
//!
//! The same as `hogwild kernels bench all`, whose flags it takes: `cargo bench --bench kernels -- --device cpu`.

#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::process::ExitCode;

use clap::Parser as _;
use hogwild::cli::{self, Cli};

fn main() -> ExitCode {
    // Cargo says `--bench`.
    let flags = std::env::args().skip(1).filter(|flag| flag != "--bench");
    let command = ["hogwild", "kernels", "bench", "all"].map(str::to_owned);
    match cli::run(&Cli::parse_from(command.into_iter().chain(flags))) {
        Ok(code) => code,
        Err(error) => {
            cli::complain(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
