//! `hogwild quantize`: a model directory in float becomes one in 4 or 8 bits.
//!
//! `--format json` prints one object; fields are only ever added:
//!
//! ```text
//! version     1
//! bits        4 or 8
//! group_size  channels under one scale, or -1 for whole rows
//! bytes       { from, to }: of all weight tensors
//! tensors     [{ tensor, shape: [out, in], relative, worst }]
//! ```
//!
//! `relative` is the root of the squared error over that of the squared weights, `worst` the largest
//! difference of a weight.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::load::bar;
use super::models::locate;
use super::output::neutralise;
use crate::device::DType;
use crate::model::ModelFiles;
use crate::model::quantize::{Loss, Options, quantize};
use crate::{Error, Result};

/// Arguments of `hogwild quantize`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model directory in Hugging Face's format, or OWNER/NAME of the hub, in F32, F16 or BF16
    #[arg(value_name = "SRC")]
    from: PathBuf,

    /// Directory to make; it must not be there
    #[arg(value_name = "DST")]
    to: PathBuf,

    /// Branch, tag or commit of a model of the hub [default: main]
    #[arg(long, value_name = "REV")]
    revision: Option<String>,

    /// Bits of a weight: 4 or 8
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(4..=8))]
    bits: u8,

    /// Input channels under one scale: a multiple of 32, or -1 for a whole row
    #[arg(
        long,
        value_name = "N",
        default_value_t = 128,
        allow_negative_numbers = true
    )]
    group_size: i32,

    /// What standard output says of each matrix
    #[arg(long, value_enum, default_value_t)]
    format: Format,

    /// Say nothing on standard error but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Forms of the report.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Format {
    /// Columns for people
    #[default]
    Table,
    /// One JSON object
    Json,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let dtype = match args.bits {
        4 => DType::U4,
        8 => DType::U8,
        other => {
            return Err(Error::Usage(format!(
                "weights have 4 or 8 bits, not {other}"
            )));
        }
    };
    let group = match usize::try_from(args.group_size) {
        Ok(group) if group > 0 && group.is_multiple_of(32) => Some(group),
        Err(_) if args.group_size == -1 => None,
        _ => {
            return Err(Error::Usage(format!(
                "--group-size {} is no multiple of 32, nor -1 for whole rows",
                args.group_size
            )));
        }
    };
    let files = ModelFiles::open(locate(&args.from, args.revision.as_deref(), args.quiet)?)?;
    if let Some(group) = group {
        let c = &files.config;
        let widths = [c.hidden_size, c.q_size(), c.intermediate_size];
        if !args.quiet && widths.iter().any(|width| !width.is_multiple_of(group)) {
            super::note(&format!(
                "groups of {group} do not divide the widths {widths:?}: not every program reads that"
            ));
        }
    }
    let bar = bar("quantising", files.weight_bytes(), args.quiet);
    let options = Options {
        dtype,
        group,
        ..Options::default()
    };
    let losses = quantize(&files, &args.to, options, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let losses = losses?;
    let [from, to] = [
        files.weight_bytes(),
        ModelFiles::open(&args.to)?.weight_bytes(),
    ];
    match args.format {
        Format::Table => super::print(&table(&losses, from, to))?,
        Format::Json => super::print_json(&json!({
            "version": 1,
            "bits": args.bits,
            "group_size": args.group_size,
            "bytes": { "from": from, "to": to },
            "tensors": losses,
        }))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn table(losses: &[Loss], from: u64, to: u64) -> String {
    let width = losses
        .iter()
        .map(|loss| loss.tensor.len())
        .max()
        .unwrap_or(0)
        .max(6);
    let mut out = format!(
        "{:<width$}  {:>13}  {:>14}  {:>10}\n",
        "tensor", "shape", "relative error", "worst"
    );
    for loss in losses {
        let shape = format!("{} x {}", loss.shape[0], loss.shape[1]);
        let name = neutralise(&loss.tensor);
        let _ = writeln!(
            out,
            "{name:<width$}  {shape:>13}  {:>14.5}  {:>10.3e}",
            loss.relative, loss.worst
        );
    }
    let [from, to] = [from, to].map(|bytes| bytes as f64 / 1e6);
    let _ = writeln!(out, "{from:.1} MB became {to:.1} MB");
    out
}
