//! `hogwild bench`: tokens a second by workers and context, where the time goes, and how near memory it is.
//!
//! A model of random weights serves as well as a checkpoint: only the shape and the storage types matter. A
//! context is not prefilled: blocks are given lengths, and their memory is filled on the device. Every
//! number stands beside the device's own copy bandwidth, measured in the same run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use super::load::LoadArgs;
use super::scene::{Scene, Times, WARM_UP, finish, token};
use super::table::{self, Cell, Format, Table, plot};
use crate::cache::pages::PAGE;
use crate::cache::plan::Logits;
use crate::device::{DType, Device, Memory, Recording, Samples};
use crate::model::{Config, Engine, Model, ModelFiles, RandomWeights, shapes};
use crate::{Error, Result};

/// Arguments of `hogwild bench`.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub(super) struct Args {
    /// What is measured
    #[arg(value_enum, default_value_t = What::Decode)]
    what: What,

    /// A shape by name (qwq-32b, qwen3-8b, llama3.1-8b, …; `list` lists them), or a config.json
    #[arg(
        long,
        value_name = "NAME|FILE.json",
        default_value = "qwen3-0.6b",
        conflicts_with = "model"
    )]
    shape: String,

    /// Measure this checkpoint in place of a shape: a model directory, or OWNER/NAME of the hub
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,

    /// Branch, tag or commit of a model of the hub [default: main]
    #[arg(long, value_name = "REV", requires = "model")]
    revision: Option<String>,

    /// How random weights are stored: awq (4 bits, groups of 128), int8, fp8, f16, bf16 or f32
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = weights, conflicts_with = "model")]
    weights: DType,

    /// Storage type of the cache: f16, bf16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = floats)]
    kv_dtype: DType,

    /// Numbers of workers
    #[arg(short, long, value_name = "N,…", value_delimiter = ',',
        value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: Vec<u8>,

    /// Tokens that the workers see
    #[arg(short, long, value_name = "N,…", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(64..=1_048_576))]
    context: Vec<u32>,

    /// Blocks that the history is made of
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,

    /// Measured passes of each row
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    passes: Option<u32>,

    /// Tokens that the column of seconds is about
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1024)]
    tokens: u32,

    /// `auto`, `cpu`, or part of an adapter's name; several names, comma-separated, share the layers of a checkpoint
    #[arg(
        long,
        value_name = "NAME,…",
        env = "HOGWILD_DEVICE",
        default_value = "auto"
    )]
    device: String,

    /// Run shaders without runtime checks, once they have passed their cases with them
    #[arg(long)]
    unchecked: bool,

    /// Let all layers be one layer's memory: a large shape fits a small machine, and caches help it
    #[arg(long, conflicts_with = "model")]
    share_layers: bool,

    /// Where the time of a pass goes, by op
    #[arg(long)]
    per_op: bool,

    /// Few rows and passes
    #[arg(long)]
    quick: bool,

    /// How the table is written
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    format: Format,

    /// Write a plot of the times too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What `hogwild bench` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Passes in which every worker writes a token (the paper's table 1)
    Decode,
    /// Attention, merge and set-up (the paper's table 2)
    Attention,
    /// Reading a prompt
    Prefill,
    /// Nothing: the shapes are listed
    List,
}

/// A storage type of weights by the name that users type.
pub(super) fn weights(name: &str) -> Result<DType, String> {
    match name {
        "awq" | "int4" => Ok(DType::U4),
        "int8" => Ok(DType::U8),
        "fp8" => Ok(DType::F8),
        _ => floats(name)
            .map_err(|_| format!("is none of awq, int8, fp8, f16, bf16 and f32: '{name}'")),
    }
}

fn floats(name: &str) -> Result<DType, String> {
    let types = [DType::F16, DType::BF16, DType::F32];
    let found = types.into_iter().find(|t| t.name() == name);
    found.ok_or_else(|| format!("is none of f16, bf16 and f32: '{name}'"))
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if args.what == What::List {
        let names = shapes::SHAPES
            .iter()
            .map(|shape| format!("{}\n", shape.name));
        super::print(&names.collect::<String>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let bench = Bench::new(args)?;
    let table = match args.what {
        What::Decode if args.per_op => bench.by_op()?,
        What::Decode => bench.decode()?,
        What::Attention => bench.attention()?,
        What::Prefill => bench.prefill()?,
        What::List => unreachable!("answered above"),
    };
    if let Some(path) = &args.svg {
        std::fs::write(path, bench.plotted(&table)).map_err(Error::io(path))?;
    }
    table::print(&table, args.format)?;
    Ok(ExitCode::SUCCESS)
}

/// A model on a device, and what that device can do: of several, the first.
struct Bench<'a> {
    args: &'a Args,
    device: Arc<Device>,
    model: Arc<Model>,
    name: String,
    /// Bytes in a second of a plain copy.
    bandwidth: Samples,
    workers: Vec<usize>,
    contexts: Vec<usize>,
    passes: usize,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        let load = LoadArgs {
            model: args.model.clone(),
            revision: args.revision.clone(),
            device: Some(args.device.clone()),
            layers: Vec::new(),
            check: false,
            unchecked: args.unchecked,
            no_ahead: false,
            quiet: false,
        };
        let (workers, contexts, passes): (&[usize], &[usize], _) = match (args.what, args.quick) {
            (What::Decode, false) => (&[1, 2, 4, 8], &[1024, 4096, 16_384], 20),
            (What::Decode, true) => (&[1, 4], &[1024], 5),
            (What::Attention, false) => (&[1, 2, 4], &[300, 4096, 8192, 16_384], 20),
            (What::Attention, true) => (&[1, 4], &[4096], 5),
            (_, false) => (&[1], &[512, 2048, 8192, 16_384], 3),
            (_, true) => (&[1], &[512], 1),
        };
        let given = |given: &[usize], default: &[usize]| {
            if given.is_empty() {
                default.to_vec()
            } else {
                given.to_vec()
            }
        };
        let wanted: Vec<usize> = args.workers.iter().map(|&w| w.into()).collect();
        let workers = given(&wanted, workers);
        let wanted: Vec<usize> = args.context.iter().map(|&c| c as usize).collect();
        let contexts = given(&wanted, contexts);
        let passes = args.passes.map_or(passes, |n| n as usize);
        let directory = load.directory()?;
        let devices = load.open_devices(&args.device)?;
        let whole = matches!(args.what, What::Decode | What::Prefill) && !args.per_op;
        let device = if args.model.is_some() && whole {
            devices.first()
        } else {
            devices.only()?
        };
        // Measured before the weights take their part of the memory.
        let bandwidth = Memory::new(&device)?.bandwidth()?;
        let furthest = contexts.iter().max().copied().unwrap_or(0);
        let n_positions = furthest + (passes + WARM_UP + 4) * 17;
        let (name, model) = if let Some((path, directory)) = args.model.as_ref().zip(directory) {
            let files = ModelFiles::open(directory)?;
            let model = load.load(&devices, &[], &files, n_positions, args.kv_dtype)?;
            (path.display().to_string(), model)
        } else {
            let config = shapes::find(&args.shape)?;
            let config = shortened(config, args.what);
            let how = RandomWeights {
                dtype: args.weights,
                shared: args.share_layers,
            };
            let model = Model::random(device.clone(), &config, how, n_positions)?;
            let stored = match args.weights {
                DType::U4 => "awq",
                other => other.name(),
            };
            let shared = if args.share_layers {
                ", one layer's memory for all"
            } else {
                ""
            };
            (format!("{} {stored}{shared}", args.shape), Arc::new(model))
        };
        Ok(Self {
            args,
            device,
            model,
            name,
            bandwidth,
            workers,
            contexts,
            passes,
        })
    }

    /// What holds for all rows.
    fn table(&self, columns: &[(&'static str, &'static str)]) -> Table {
        let driver = crate::device::adapters()
            .into_iter()
            .find(|adapter| adapter.name == self.device.name())
            .map_or_else(
                || crate::device::Cpu::report().instructions.to_owned(),
                |a| a.driver,
            );
        Table {
            facts: vec![
                ("model", Cell::text(&self.name)),
                ("cache", Cell::text(self.args.kv_dtype.name())),
                ("device", Cell::text(self.model.device_names())),
                ("driver", Cell::text(driver)),
                ("copy_gb_per_s", Cell::giga(self.bandwidth.median())),
                ("copy_spread", Cell::share(self.bandwidth.spread())),
            ],
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    fn scene(&self, context: usize, workers: usize) -> Result<Scene> {
        let steps = self.args.steps as usize;
        Scene::new(&self.model, self.args.kv_dtype, [context, steps], workers)
    }

    fn decode(&self) -> Result<Table> {
        let mut table = self.table(&[
            ("context", "context"),
            ("workers", "workers"),
            ("tokens_per_s", "tokens/s"),
            ("pass_s", "ms/pass"),
            ("spread", "spread"),
            ("seconds_for_tokens", "s"),
            ("of_copy", "of copy"),
            ("efficiency", "t1/tW"),
            ("host_s", "host ms"),
        ]);
        let tokens = f64::from(self.args.tokens);
        table
            .facts
            .push(("tokens_of_column_s", Cell::number(tokens, 0)));
        for &context in &self.contexts {
            let mut alone = None;
            for &workers in &self.workers {
                let mut scene = self.scene(context, workers)?;
                let Times { pass: times, host } = scene.times(self.passes)?;
                let pass = times.median();
                if workers == 1 {
                    alone = Some(pass);
                }
                let must = self.model.weight_bytes(workers)
                    + self
                        .model
                        .cache_bytes(self.model.cache_shape(self.args.kv_dtype), context);
                let rate = workers as f64 / pass;
                table.rows.push(vec![
                    Cell::count(context),
                    Cell::count(workers),
                    Cell::number(rate, if rate < 100.0 { 2 } else { 1 }),
                    Cell::milliseconds(pass),
                    Cell::share(times.spread()),
                    Cell::number(tokens / rate, 1),
                    Cell::share(must as f64 / pass / self.bandwidth.median()),
                    alone.map_or(Cell::Nothing, |alone| Cell::number(alone / pass, 3)),
                    Cell::milliseconds(host.median()),
                ]);
            }
        }
        Ok(table)
    }

    /// Times of the ops of a pass, each a sum over the pass.
    fn by_op(&self) -> Result<Table> {
        let mut table = self.table(&[
            ("context", "context"),
            ("workers", "workers"),
            ("op", "op"),
            ("dispatches", "dispatches"),
            ("time_s", "ms/pass"),
            ("spread", "spread"),
            ("share", "of the pass"),
        ]);
        let clock = if self.device.has_timestamps() {
            "the device's"
        } else {
            "the wall's"
        };
        table.facts.push(("clock", Cell::text(clock)));
        for &context in &self.contexts {
            for &workers in &self.workers {
                let mut scene = self.scene(context, workers)?;
                scene.times(1)?;
                let mut sums: BTreeMap<usize, (&str, usize, Vec<f64>)> = BTreeMap::new();
                for _ in 0..self.passes {
                    let plan = scene.planned();
                    let recording = scene.forward(&plan)?;
                    let times = self.device.play_timed(&recording)?;
                    let mut pass: BTreeMap<&str, (usize, usize, f64)> = BTreeMap::new();
                    for (at, (dispatch, time)) in recording.dispatches.iter().zip(times).enumerate()
                    {
                        let sum = pass.entry(dispatch.op.name).or_insert((at, 0, 0.0));
                        sum.1 += 1;
                        sum.2 += time;
                    }
                    for (name, (first, count, time)) in pass {
                        let sum = sums.entry(first).or_insert((name, count, Vec::new()));
                        sum.2.push(time);
                    }
                }
                let sums: Vec<_> = sums
                    .into_values()
                    .map(|(name, count, times)| (name, count, Samples::new(times)))
                    .collect();
                let all: f64 = sums.iter().map(|(.., times)| times.median()).sum();
                for (name, count, times) in sums {
                    table.rows.push(vec![
                        Cell::count(context),
                        Cell::count(workers),
                        Cell::text(name),
                        Cell::count(count),
                        Cell::milliseconds(times.median()),
                        Cell::share(times.spread()),
                        Cell::share(times.median() / all),
                    ]);
                }
            }
        }
        Ok(table)
    }

    /// The paper's table 2: attention of one layer, its merge, and what a pass prepares.
    fn attention(&self) -> Result<Table> {
        let mut table = self.table(&[
            ("context", "context"),
            ("workers", "workers"),
            ("attention_s", "attention us"),
            ("spread", "spread"),
            ("merge_s", "merge us"),
            ("setup_s", "set-up us"),
            ("of_copy", "of copy"),
        ]);
        let layers = match self.args.model {
            Some(_) => self.model.config().n_layers,
            None => shapes::find(&self.args.shape)?.n_layers,
        };
        table
            .facts
            .push(("layers_of_the_model", Cell::count(layers)));
        let memory = Memory::new(&self.device)?;
        for &context in &self.contexts {
            for &workers in &self.workers {
                let mut scene = self.scene(context, workers)?;
                scene.times(1)?;
                let (mut attention, mut merge, mut setup) = (Vec::new(), Vec::new(), Vec::new());
                for _ in 0..self.passes {
                    let started = Instant::now();
                    let plan = scene.planned();
                    setup.push(started.elapsed().as_secs_f64());
                    let recording = scene.forward(&plan)?;
                    let of = |op: &str| {
                        let found = recording.dispatches.iter().find(|d| d.op.name == op);
                        found.expect("a pass attends").clone()
                    };
                    // What a pass uploads and computes before it attends.
                    self.device.play(&recording)?;
                    for (op, times) in [("attend", &mut attention), ("merge", &mut merge)] {
                        memory.scrub()?;
                        let one = Recording {
                            uploads: Vec::new(),
                            dispatches: vec![of(op)],
                        };
                        times.extend(self.device.play_timed(&one)?);
                    }
                }
                let shape = self.model.cache_shape(self.args.kv_dtype);
                let bytes = self.model.cache_bytes(shape, context) / shape.n_layers as u64;
                let [attention, merge, setup] = [attention, merge, setup].map(Samples::new);
                table.rows.push(vec![
                    Cell::count(context),
                    Cell::count(workers),
                    Cell::microseconds(attention.median()),
                    Cell::share(attention.spread()),
                    Cell::microseconds(merge.median()),
                    Cell::microseconds(setup.median()),
                    Cell::share(bytes as f64 / attention.median() / self.bandwidth.median()),
                ]);
            }
        }
        Ok(table)
    }

    fn prefill(&self) -> Result<Table> {
        let mut table = self.table(&[
            ("tokens", "tokens"),
            ("tokens_per_s", "tokens/s"),
            ("time_s", "ms"),
            ("spread", "spread"),
            ("flop_per_s", "GFLOP/s"),
        ]);
        let vocab = self.model.config().vocab_size;
        for &tokens in &self.contexts {
            let pages = tokens.div_ceil(PAGE);
            let mut engine = Engine::new(self.model.clone(), self.args.kv_dtype, pages, false)?;
            let ids: Vec<u32> = (0..tokens).map(|i| token(i, vocab)).collect();
            let mut times = Vec::new();
            for pass in 0..=self.passes {
                let block = engine.cache.pages.open();
                let started = Instant::now();
                engine.prefill(block, &ids, Logits::Last)?;
                finish(&self.model)?;
                if pass > 0 || self.args.quick {
                    times.push(started.elapsed().as_secs_f64());
                }
                engine.cache.pages.free(block);
            }
            let times = Samples::new(times);
            table.rows.push(vec![
                Cell::count(tokens),
                Cell::number(tokens as f64 / times.median(), 1),
                Cell::milliseconds(times.median()),
                Cell::share(times.spread()),
                Cell::giga(self.model.flops(tokens) / times.median()),
            ]);
        }
        Ok(table)
    }

    /// A plot of the first column of times over the context, one line for each number of workers.
    fn plotted(&self, table: &Table) -> String {
        let at = |key: &str| table.columns.iter().position(|c| c.0 == key);
        let number = |row: &[Cell], at: Option<usize>| match at.map(|at| &row[at]) {
            Some(Cell::Number { value, times, .. }) => value * times,
            _ => 0.0,
        };
        let (time, unit) = match self.args.what {
            What::Attention => (at("attention_s"), "microseconds of one layer's attention"),
            What::Prefill => (at("time_s"), "milliseconds of a prefill"),
            _ => (at("pass_s").or(at("time_s")), "milliseconds of a pass"),
        };
        let mut lines: BTreeMap<String, Vec<[f64; 2]>> = BTreeMap::new();
        for row in &table.rows {
            let name = match (at("op"), at("workers")) {
                (Some(op), workers) => {
                    let Cell::Text(op) = &row[op] else { continue };
                    format!("{op} {}", number(row, workers))
                }
                (None, Some(_)) => format!("{} workers", number(row, at("workers"))),
                _ => "prefill".to_owned(),
            };
            let x = number(row, at("context").or(at("tokens")));
            lines.entry(name).or_default().push([x, number(row, time)]);
        }
        let lines: Vec<_> = lines.into_iter().collect();
        let title = format!("{} on {}", self.name, self.device.name());
        plot(&title, "tokens of context", unit, &lines)
    }
}

/// Only attention is measured: one layer serves.
fn shortened(mut config: Config, what: What) -> Config {
    if what == What::Attention {
        config.n_layers = 1;
        config.intermediate_size = 64;
        config.vocab_size = 64;
    }
    config
}
