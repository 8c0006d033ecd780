//! `hogwild kernels`: the ops and their kernels, and the judge on demand.
//!
//! `kernels check OP --wgsl FILE` needs no Rust: the file takes the place of the op's shader, with its
//! constants, element types and number of workgroups. Invariant: what was not judged is not counted as
//! a pass.
//!
//! `kernels list --json` prints one object; fields are only ever added:
//!
//! ```text
//! version  1
//! ops      [{ name, summary, params: [name], args: [{ name, access: read, write or read_write }],
//!             kernels: [{ name, runs: wgsl or rust, file: null or path }], cases: [name],
//!             tolerance: { f32, f16, bf16: { abs, rel, nmse } } }]
//! ```

use std::fmt::Write as _;
use std::io::{Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};

use super::stdout_error;
use crate::device::judge::{Verdict, judge};
use crate::device::{Access, Bound, Choice, Device, Kernel, Op, Run, Wgsl, choose};
use crate::ops::{OPS, find};
use crate::{Error, Result};

/// Largest WGSL file that is read, in bytes: ours are a hundredth of that.
const MAX_WGSL: u64 = 1 << 20;

/// Subcommands of `hogwild kernels`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List every op: what it computes, its arguments, kernels, cases and tolerance
    List {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Hold kernels to their reference on all cases of an op; exit code 1 if one disagrees
    Check(Check),
    /// Time kernels on dispatches of a model's pass, after holding them to their reference
    Bench(super::kernels_bench::Args),
}

/// Arguments of `hogwild kernels check`.
#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The op, or `all`
    op: String,
    /// Judge this file in place of the op's shader (see shaders/README.md)
    #[arg(long, value_name = "FILE")]
    wgsl: Option<PathBuf>,
    /// Judge only this kernel; with --wgsl, the kernel whose place the file takes (the op's last, unless named)
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// `auto`, `cpu`, or part of an adapter's name
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
}

pub(super) fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::List { json: true } => super::print_json(&to_json())?,
        Command::List { json: false } => super::print(&to_text())?,
        Command::Check(args) => return check(args),
        Command::Bench(args) => return super::kernels_bench::run(args),
    }
    Ok(ExitCode::SUCCESS)
}

fn access(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::Write => "write",
        Access::ReadWrite => "read_write",
    }
}

/// What a kernel runs, and the file it is in.
fn runs(kernel: &Kernel) -> (&'static str, Option<&'static str>) {
    match &kernel.run {
        Run::Wgsl(wgsl) => ("wgsl", Some(wgsl.file)),
        Run::Cpu(_) => ("rust", None),
    }
}

fn to_json() -> Value {
    let bound = |b: Bound| json!({ "abs": b.abs, "rel": b.rel, "nmse": b.nmse });
    let kernel = |k: &Kernel| {
        let (runs, file) = runs(k);
        json!({ "name": k.name, "runs": runs, "file": file })
    };
    let arg = |&(name, a): &(&str, Access)| json!({ "name": name, "access": access(a) });
    let op = |op: &&Op| {
        let tolerance = &op.tolerance;
        json!({
            "name": op.name,
            "summary": op.summary,
            "params": op.params,
            "args": op.args.iter().map(arg).collect::<Vec<_>>(),
            "kernels": op.kernels.iter().map(kernel).collect::<Vec<_>>(),
            "cases": (op.cases)().into_iter().map(|c| c.name).collect::<Vec<_>>(),
            "tolerance": {
                "f32": bound(tolerance.f32),
                "f16": bound(tolerance.f16),
                "bf16": bound(tolerance.bf16),
            },
        })
    };
    json!({ "version": 1, "ops": OPS.iter().map(op).collect::<Vec<_>>() })
}

fn to_text() -> String {
    let mut out = String::new();
    for (i, op) in OPS.iter().enumerate() {
        let gap = if i == 0 { "" } else { "\n" };
        let arg = |&(name, a): &(&str, Access)| match a {
            Access::Read => name.to_owned(),
            Access::Write => format!("{name} (written)"),
            Access::ReadWrite => format!("{name} (read and written)"),
        };
        let kernel = |k: &Kernel| match runs(k) {
            (_, Some(file)) => format!("{} ({file})", k.name),
            (runs, None) => format!("{} ({runs})", k.name),
        };
        let args: Vec<_> = op.args.iter().map(arg).collect();
        let kernels: Vec<_> = op.kernels.iter().map(kernel).collect();
        let bound = |b: Bound| {
            // Ops that copy allow nothing beside the rounding.
            let abs = if b.abs > 0.0 {
                format!("{:.0e} + ", b.abs)
            } else {
                String::new()
            };
            format!("{abs}{:.0e} * |want|, NMSE {:.0e}", b.rel, b.nmse)
        };
        let _ = writeln!(
            out,
            "{gap}{}: {}\n  params    {}\n  args      {}\n  kernels   {}\n  cases     {}\n  tolerance {}",
            op.name,
            op.summary,
            op.params.join(", "),
            args.join(", "),
            kernels.join(", "),
            (op.cases)().len(),
            bound(op.tolerance.f32),
        );
    }
    out
}

/// How many cases came to which verdict.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    unsupported: usize,
}

fn check(args: &Check) -> Result<ExitCode> {
    let ops = ops_named(&args.op)?;
    if ops.len() > 1 && (args.wgsl.is_some() || args.kernel.is_some()) {
        let problem = "--wgsl and --kernel are about one op; name it in place of 'all'";
        return Err(Error::Usage(problem.into()));
    }
    let source = args.wgsl.as_deref().map(read_wgsl).transpose()?;
    let device = open(&args.device, source.is_some())?;
    let on_cpu = matches!(device, Device::Cpu(_));
    let mut out = std::io::stdout().lock();
    let mut tally = Tally::default();
    for op in ops {
        let listed = kernels_for(op, on_cpu, args.kernel.as_deref())?;
        let own = match (&args.wgsl, &source) {
            (Some(file), Some(source)) => Some(in_place_of(most_general(&listed), file, source)),
            _ => None,
        };
        for kernel in own.as_ref().map_or(listed, |own| vec![own]) {
            check_kernel(&mut out, &device, op, kernel, &mut tally)?;
        }
    }
    let Tally {
        passed,
        failed,
        unsupported,
    } = tally;
    let name = device.name();
    writeln!(
        out,
        "{passed} passed, {failed} failed, {unsupported} unsupported on {name}"
    )
    .and_then(|()| out.flush())
    .map_err(stdout_error)?;
    Ok(if failed == 0 && passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Judges one kernel on all cases, one line each.
fn check_kernel(
    out: &mut impl Write,
    device: &Device,
    op: &'static Op,
    kernel: &Kernel,
    tally: &mut Tally,
) -> Result<()> {
    for case in (op.cases)() {
        let name = format!("{} / {} / {}", op.name, kernel.name, case.name);
        let line = match judge(device, op, kernel, &case)? {
            Verdict::Pass(agreement) => {
                tally.passed += 1;
                let (worst, nmse) = (agreement.worst, agreement.nmse);
                format!("pass         {name}: worst {worst:.1e}, NMSE {nmse:.1e}")
            }
            Verdict::Fail(problem) => {
                tally.failed += 1;
                format!("FAIL         {name}: {problem}")
            }
            Verdict::Unsupported => {
                tally.unsupported += 1;
                format!("unsupported  {name}")
            }
        };
        writeln!(out, "{}", super::output::neutralise(&line))
            .and_then(|()| out.flush())
            .map_err(stdout_error)?;
    }
    Ok(())
}

pub(super) fn ops_named(name: &str) -> Result<Vec<&'static Op>> {
    if name == "all" {
        return Ok(OPS.to_vec());
    }
    let unknown = || {
        let known: Vec<_> = OPS.iter().map(|op| op.name).collect();
        Error::Usage(format!(
            "no op is called '{name}'; there are {}, and 'all'",
            known.join(", ")
        ))
    };
    Ok(vec![find(name).ok_or_else(unknown)?])
}

/// Opens the device; a file of WGSL cannot run on the CPU.
pub(super) fn open(wanted: &str, for_wgsl: bool) -> Result<Device> {
    if for_wgsl && let Choice::Cpu { why } = choose(wanted)? {
        if wanted == "cpu" {
            let problem = "--wgsl runs on a Vulkan adapter, not on --device cpu";
            return Err(Error::Usage(problem.into()));
        }
        return Err(Error::Device {
            device: wanted.to_owned(),
            problem: format!(
                "--wgsl runs on a Vulkan adapter, and {why}; `--device llvmpipe` would use the \
                 software driver (Debian: mesa-vulkan-drivers)"
            ),
        });
    }
    Device::open(wanted)
}

/// The kernel whose place a file takes: the last, for the special ones come first.
pub(super) fn most_general<'a>(listed: &[&'a Kernel]) -> &'a Kernel {
    listed.last().expect("an op has a kernel of each kind")
}

/// Kernels of an op that run on a kind of device, at least one.
pub(super) fn kernels_for(
    op: &'static Op,
    on_cpu: bool,
    name: Option<&str>,
) -> Result<Vec<&'static Kernel>> {
    let of_kind = |k: &&Kernel| matches!(k.run, Run::Cpu(_)) == on_cpu;
    let all: Vec<_> = op.kernels.iter().filter(of_kind).collect();
    let named = |k: &&'static Kernel| name.is_none_or(|name| k.name == name);
    let found: Vec<_> = all.iter().copied().filter(named).collect();
    if found.is_empty() {
        let names: Vec<_> = all.iter().map(|k| k.name).collect();
        let kind = if on_cpu { "Rust" } else { "WGSL" };
        return Err(Error::Usage(format!(
            "op {} has no {kind} kernel '{}'; there are: {}",
            op.name,
            name.unwrap_or("any"),
            names.join(", ")
        )));
    }
    Ok(found)
}

/// Reads a WGSL file.
pub(super) fn read_wgsl(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_WGSL + 1).read_to_end(&mut bytes))
        .map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_WGSL {
        let problem = "is larger than 1 MiB; is it a WGSL file?";
        return Err(Error::bad(path, "size", problem));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::bad(
            path,
            format!("byte {at}"),
            "is not UTF-8; is it a WGSL file?",
        )
    })
}

/// A kernel that is launched like `listed`, but runs the text of a file.
pub(super) fn in_place_of(listed: &Kernel, path: &Path, source: &str) -> Kernel {
    let Run::Wgsl(like) = &listed.run else {
        panic!("a file of WGSL takes the place of a shader")
    };
    // Shaders live as long as the process; so does this one, and there is one.
    let leak = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
    let stem = path.file_stem().unwrap_or(path.as_os_str());
    Kernel {
        name: leak(stem.to_string_lossy().into_owned()),
        run: Run::Wgsl(Wgsl {
            file: leak(path.display().to_string()),
            source: leak(source.to_owned()),
            consts: like.consts,
            elements: like.elements,
            groups: like.groups,
            loads: None,
        }),
        fits: listed.fits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_text_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mine.wgsl");
        let refusal = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("it can be written");
            read_wgsl(&path).map_err(|e| e.to_string())
        };
        assert_eq!(
            refusal(b"fn main() {}").as_deref(),
            Ok("fn main() {}"),
            "text is read"
        );
        let bytes = refusal(b"fn \xff").expect_err("no UTF-8");
        assert!(bytes.contains("byte 3: is not UTF-8"), "{bytes}");
        let large = refusal(&vec![b' '; (1 << 20) + 1]).expect_err("too large");
        assert!(large.contains("1 MiB"), "{large}");
        assert!(refusal(&vec![b' '; 1 << 20]).is_ok(), "1 MiB is read");
    }

    #[test]
    fn an_unknown_kernel_is_answered_with_those_there_are() {
        let op = OPS[0];
        let error = kernels_for(op, true, Some("nothing")).expect_err("no such kernel");
        assert!(error.to_string().contains(op.kernels[1].name), "{error}");
        assert_eq!(error.exit_code(), 2, "a wrong name is a usage error");
    }

    #[test]
    fn the_list_names_every_op_as_text_and_as_json() {
        let (text, json) = (to_text(), to_json());
        for (op, json) in OPS.iter().zip(json["ops"].as_array().expect("a list")) {
            assert!(text.contains(&format!("{}: {}", op.name, op.summary)));
            assert_eq!(json["name"], op.name);
            assert_eq!(
                json["cases"].as_array().map(Vec::len),
                Some((op.cases)().len()),
                "{}",
                op.name
            );
        }
    }
}
