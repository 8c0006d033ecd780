//! `hogwild kernels bench`: kernels side by side on what a model's pass dispatches, caches swept in between.
//!
//! The dispatches are those of one layer of some models: with norms on queries and keys, without, with experts
//! and with a latent (these two on a GPU), for workers that write and for a prefill. Invariant: a kernel that
//! disagrees with its reference is not timed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::kernels::{in_place_of, kernels_for, most_general, open, ops_named, read_wgsl};
use super::scene::Scene;
use super::table::{self, Cell, Format, Table};
use crate::device::judge::{Verdict, judge};
use crate::device::{Access, DType, Device, Dispatch, Kernel, Memory, Op, Recording, Samples};
use crate::model::{Model, RandomWeights, shapes};
use crate::ops::fill::{Contents, fill};
use crate::{Error, Result};

/// Arguments of `hogwild kernels bench`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The op, or `all`
    op: String,
    /// Time this file beside the op's shader (see shaders/README.md)
    #[arg(long, value_name = "FILE")]
    wgsl: Option<PathBuf>,
    /// Time against this kernel only; with --wgsl, the kernel whose place the file takes
    #[arg(long, value_name = "NAME")]
    vs: Option<String>,
    /// `auto`, `cpu`, or part of an adapter's name
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// Shapes whose layers are dispatched [default: qwen3-8b,llama3.1-8b,qwen3-30b-a3b,deepseek-r1; without a
    /// GPU, smaller ones]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    shape: Vec<String>,
    /// Storage types of the weights
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',', default_value = "bf16,awq",
        value_parser = super::bench::weights)]
    weights: Vec<DType>,
    /// Numbers of workers
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "1,4",
        value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: Vec<u8>,
    /// Tokens that the workers see
    #[arg(short, long, value_name = "N", default_value_t = 4096,
        value_parser = clap::value_parser!(u32).range(64..=1_048_576))]
    context: u32,
    /// Measurements of each dispatch
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How the table is written
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Time again whenever the file changes
    #[arg(long, requires = "wgsl")]
    watch: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let ops = ops_named(&args.op)?;
    if ops.len() > 1 && (args.wgsl.is_some() || args.vs.is_some()) {
        let problem = "--wgsl and --vs are about one op; name it in place of 'all'";
        return Err(Error::Usage(problem.into()));
    }
    let device = Arc::new(open(&args.device, args.wgsl.is_some())?);
    let memory = Memory::new(&device)?;
    let bench = Bench {
        args,
        device: &device,
        bandwidth: memory.bandwidth()?,
        memory,
        dispatches: dispatches(args, &device, &ops)?,
    };
    loop {
        let seen = args.wgsl.as_deref().map(changed);
        let all_agree = bench.once(&ops)?;
        let Some(path) = args.wgsl.as_deref().filter(|_| args.watch) else {
            return Ok(if all_agree {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        };
        super::note(&format!("waiting for {} to change", path.display()));
        while Some(changed(path)) == seen {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// When a file was last changed; a file that is away has no time.
fn changed(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

/// A dispatch that is timed, and the names that people know it by.
struct Timed {
    dispatch: Dispatch,
    rows: usize,
}

struct Bench<'a> {
    args: &'a Args,
    device: &'a Device,
    bandwidth: Samples,
    memory: Memory<'a>,
    dispatches: Vec<Timed>,
}

impl Bench<'_> {
    /// Times everything once; says whether all kernels agree with their references.
    fn once(&self, ops: &[&'static Op]) -> Result<bool> {
        let mut table = Table {
            facts: vec![
                ("device", Cell::text(self.device.name())),
                ("copy_gb_per_s", Cell::giga(self.bandwidth.median())),
                ("copy_spread", Cell::share(self.bandwidth.spread())),
            ],
            columns: vec![
                ("op", "op"),
                ("kernel", "kernel"),
                ("case", "case"),
                ("time_s", "us"),
                ("spread", "spread"),
                ("bytes_per_s", "GB/s"),
                ("of_copy", "of copy"),
                ("flop_per_s", "GFLOP/s"),
                ("speed", "vs first"),
            ],
            rows: Vec::new(),
        };
        let mut all_agree = true;
        for &op in ops {
            let on_cpu = matches!(self.device, Device::Cpu(_));
            let listed = kernels_for(op, on_cpu, self.args.vs.as_deref())?;
            let own = match &self.args.wgsl {
                // With a file, the first problem of its text is the answer.
                Some(path) => Some(in_place_of(most_general(&listed), path, &read_wgsl(path)?)),
                None => None,
            };
            let mut kernels = Vec::new();
            for kernel in listed.into_iter().chain(&own) {
                match self.judged(op, kernel) {
                    Ok(0) => super::note(&format!(
                        "{} / {}: no case fits it; not timed",
                        op.name, kernel.name
                    )),
                    Ok(_) => kernels.push(kernel),
                    Err(problem) => {
                        all_agree = false;
                        super::note(&problem.to_string());
                    }
                }
            }
            let mine = self
                .dispatches
                .iter()
                .filter(|t| t.dispatch.op.name == op.name);
            for timed in mine {
                self.side_by_side(timed, &kernels, &mut table)?;
            }
        }
        table::print(&table, self.args.format)?;
        Ok(all_agree)
    }

    /// Holds a kernel to its reference; how many cases agree.
    fn judged(&self, op: &'static Op, kernel: &Kernel) -> Result<usize> {
        let mut passed = 0;
        for case in (op.cases)() {
            match judge(self.device, op, kernel, &case)? {
                Verdict::Pass(_) => passed += 1,
                Verdict::Unsupported => {}
                Verdict::Fail(problem) => {
                    return Err(Error::Disagree {
                        op: op.name.into(),
                        kernel: kernel.name.into(),
                        dispatch: 0,
                        problem: format!("case '{}': {problem}; it is not timed", case.name),
                    });
                }
            }
        }
        Ok(passed)
    }

    /// Times the kernels that fit a dispatch, in turns.
    fn side_by_side(&self, timed: &Timed, kernels: &[&Kernel], table: &mut Table) -> Result<()> {
        let dispatch = &timed.dispatch;
        let caps = self.device.caps();
        let fitting: Vec<_> = kernels
            .iter()
            .filter(|kernel| (kernel.fits)(dispatch, &caps))
            .collect();
        let mut times = vec![Vec::new(); fitting.len()];
        for round in 0..=self.args.rounds {
            for (kernel, times) in fitting.iter().zip(&mut times) {
                self.memory.scrub()?;
                let time = self.device.run_timed(dispatch, kernel)?;
                // The first round compiles.
                if round > 0 {
                    times.push(time);
                }
            }
        }
        let (bytes, flops) = (must_move(timed) as f64, flops(timed));
        let mut first = None;
        for (kernel, times) in fitting.iter().zip(times) {
            let times = Samples::new(times);
            let time = times.median();
            let first = *first.get_or_insert(time);
            table.rows.push(vec![
                Cell::text(dispatch.op.name),
                Cell::text(kernel.name),
                Cell::text(described(timed)),
                Cell::microseconds(time),
                Cell::share(times.spread()),
                Cell::giga(bytes / time),
                Cell::share(bytes / time / self.bandwidth.median()),
                if flops > 0.0 {
                    Cell::giga(flops / time)
                } else {
                    Cell::Nothing
                },
                Cell::number(first / time, 2),
            ]);
        }
        Ok(())
    }
}

/// What a pass of one layer dispatches, each kind once, with everything it reads in place.
fn dispatches(args: &Args, device: &Arc<Device>, ops: &[&'static Op]) -> Result<Vec<Timed>> {
    let own: Vec<&str> = args.shape.iter().map(String::as_str).collect();
    let names: &[&str] = match own.as_slice() {
        [] if is_gpu(device) => &["qwen3-8b", "llama3.1-8b", "qwen3-30b-a3b", "deepseek-r1"],
        [] => &["qwen3-0.6b", "qwen2.5-0.5b"],
        own => own,
    };
    let mut out = Vec::new();
    let mut seen = BTreeSet::new();
    let mut take = |recording: Recording| -> Result<()> {
        device.play(&recording)?;
        for dispatch in recording.dispatches {
            let wanted = ops.iter().any(|op| op.name == dispatch.op.name);
            let shapes = dispatch.args.iter().map(|t| (t.shape(), t.dtype().name()));
            let kind = format!(
                "{} {:?} {:?}",
                dispatch.op.name,
                dispatch.params,
                shapes.collect::<Vec<_>>()
            );
            if wanted && seen.insert(kind) {
                let rows = rows(&dispatch);
                out.push(Timed { dispatch, rows });
            }
        }
        Ok(())
    };
    for name in names {
        for &dtype in &args.weights {
            let mut config = shapes::find(name)?;
            config.n_layers = 1;
            config.vocab_size = config.vocab_size.min(1 << 14);
            let how = RandomWeights {
                dtype,
                shared: false,
            };
            let context = args.context as usize;
            let model = Arc::new(Model::random(
                device.clone(),
                &config,
                how,
                context.max(256) + 64,
            )?);
            for &workers in &args.workers {
                let mut scene = Scene::new(&model, DType::F16, [context, 1], workers.into())?;
                let plan = scene.planned();
                take(scene.forward(&plan)?)?;
            }
            let mut scene = Scene::new(&model, DType::F16, [context, 1], 4)?;
            take(scene.prefill(256)?)?;
        }
    }
    for dtype in [DType::BF16, DType::U4] {
        let tensor = device.tensor(&[(64 << 20) * 8 / dtype.bits()], dtype)?;
        let mut r = Recording::default();
        let contents = Contents::Numbers {
            mean: 0.0,
            scale: 1.0,
        };
        fill(&mut r, &tensor, contents, 1);
        take(r)?;
    }
    Ok(out)
}

fn is_gpu(device: &Device) -> bool {
    let kinds = ["discrete", "integrated", "virtual"];
    let name = device.name();
    crate::device::adapters()
        .iter()
        .any(|adapter| adapter.name == name && kinds.contains(&adapter.kind))
}

/// The value of a parameter.
fn param(dispatch: &Dispatch, name: &str) -> Option<u32> {
    let at = dispatch.op.params.iter().position(|p| *p == name)?;
    let words: Vec<u32> = bytemuck::pod_collect_to_vec(dispatch.params.as_bytes());
    words.get(at).copied()
}

fn rows(dispatch: &Dispatch) -> usize {
    param(dispatch, "n_rows").unwrap_or(1) as usize
}

/// Bytes that a dispatch must move: every argument once, but of tables only the rows that are looked up.
fn must_move(timed: &Timed) -> u64 {
    let Timed { dispatch, rows } = timed;
    let args = dispatch.op.args.iter().zip(&dispatch.args);
    args.map(|((name, access), tensor)| {
        let row = tensor.bytes() / tensor.shape()[0];
        let bytes = match (*name, access) {
            // Of the cache, a few rows are written.
            ("table" | "angles", _) | ("keys" | "values", Access::Write) => rows * row,
            (_, Access::ReadWrite) => 2 * tensor.bytes(),
            _ => tensor.bytes(),
        };
        bytes as u64
    })
    .sum()
}

/// Multiplications and additions: of every row with every weight, of every query with every key and value.
fn flops(timed: &Timed) -> f64 {
    let Timed { dispatch, rows } = timed;
    let args = dispatch.op.args.iter().zip(&dispatch.args);
    let heads = |name| f64::from(param(dispatch, name).unwrap_or(1));
    let gqa = heads("n_heads") / heads("n_kv_heads");
    args.map(|((name, access), tensor)| match (*name, access) {
        ("weight", _) if tensor.shape().len() == 2 => tensor.len() as f64,
        ("keys" | "values", Access::Read) => tensor.len() as f64 * gqa,
        _ => 0.0,
    })
    .sum::<f64>()
        * 2.0
        * *rows as f64
}

/// A dispatch in words: its rows, and the largest thing that it reads or writes.
fn described(timed: &Timed) -> String {
    let largest = timed
        .dispatch
        .args
        .iter()
        .max_by_key(|tensor| tensor.bytes());
    let largest = largest.map_or_else(String::new, |t| format!("{:?} {}", t.shape(), t.dtype()));
    format!("{} x {largest}", timed.rows)
}
