//! `hogwild generate`: a problem, solved by several workers together.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use super::load::{Devices, LoadArgs, check_ids, name_tokenizer};
use super::output::{Colour, Output, Status, neutralise};
use super::stdout_error;
use crate::cache::layout::Layout;
use crate::demo;
use crate::model::{GenerationConfig, Model, ModelFiles};
use crate::protocol::{MAX_STYLE, Problem, PromptStyle, Protocol, default_names, step_prefix};
use crate::session::{
    Command, Event, FORMAT, Header, Log, ModelName, OpeningIds, Raw, Reason, RulesName, Session,
    Settings, Words,
};
use crate::text::{Date, Text, child};
use crate::{Error, Result, TokenId};

/// Longest problem, in bytes.
const MAX_PROBLEM: u64 = 1 << 20;

/// Arguments of `hogwild generate`.
#[derive(Clone, Debug, clap::Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag that people type"
)]
pub(super) struct Args {
    /// The problem; `-` reads it from standard input
    problem: Option<String>,

    /// Read the problem from a file
    #[arg(short, long, value_name = "FILE", conflicts_with = "problem")]
    file: Option<PathBuf>,

    #[command(flatten)]
    load: LoadArgs,

    /// Number of workers, 1 to 16 [default: 2, or as many as --names]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: Option<u8>,

    /// Names of the workers, comma-separated [default: Alice, Bob, Carol, Dave, …]
    #[arg(long, value_name = "A,B,…", value_delimiter = ',')]
    names: Vec<String>,

    /// Continue the text as it is: one worker, no prompts
    #[arg(long, conflicts_with_all = ["workers", "names", "rules", "prompt", "layout"])]
    raw: bool,

    /// Passes after which the workers are made to answer; with --raw, tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1024,
        value_parser = clap::value_parser!(u64).range(1..))]
    max_passes: u64,

    /// Temperature; 0 always takes the likeliest token [default: the model's]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temp: Option<f32>,

    /// Choose among the K likeliest tokens; 0 among all [default: the model's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,

    /// Choose within this probability mass [default: the model's]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,

    /// Drop tokens less likely than this, relative to the likeliest [default: the model's]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,

    /// Seed of the random numbers [default: a fresh one, reported]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Who sees what: combined, contiguous or interleaved
    #[arg(long, value_name = "LAYOUT", default_value = "combined")]
    layout: Layout,

    /// The authors' rules: main (their accuracy results) or fast (their fast version)
    #[arg(long, value_name = "RULES", default_value = "main")]
    rules: String,

    /// Tokens of all workers between two questions whether work is redundant [default: the rules']
    #[arg(long, value_name = "N")]
    check_every: Option<usize>,

    /// What counts as an answer: number, digits, text or code
    #[arg(long, value_name = "KIND", default_value = "number")]
    answer: String,

    /// Make the workers answer when the budget is spent (the default)
    #[arg(long, overrides_with = "no_early_answer")]
    early_answer: bool,

    /// End without an answer when the budget is spent
    #[arg(long)]
    no_early_answer: bool,

    /// Give the prompt to the model as it is, without its chat template
    #[arg(long)]
    no_chat_template: bool,

    /// Prompt style: a text file with {names}, {problem} and other placeholders
    #[arg(long, value_name = "FILE")]
    prompt: Option<PathBuf>,

    /// Tokens that the cache holds [default: what the prompt and the passes need]
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,

    /// Storage of the cache: f16, bf16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv_dtype: String,

    /// Write the log of the session to a file
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// Write the log to standard output instead of the workers' text
    #[arg(long)]
    jsonl: bool,

    /// Colours: auto, always or never
    #[arg(long, value_enum, default_value_t)]
    color: Colour,
}

/// Whether workers write; before that there is nothing to answer from, and Ctrl-C ends the process.
static RUNNING: AtomicBool = AtomicBool::new(false);

/// Set by the first Ctrl-C while they do; the second ends the process.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Sums of a problem that nobody posed.
const FRESH_SUMS: usize = 6;

/// Exit code after an interrupt.
const EXIT_INTERRUPTED: u8 = 130;

/// What is solved, by which model, and how it is asked.
struct Subject {
    files: ModelFiles,
    text: Arc<Text>,
    model: ModelName,
    problem: String,
    style: PromptStyle,
    rules: RulesName,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    // Before the handler: a download is not a run, and ends at once.
    let directory = args.load.directory()?;
    // A handler is set once in a process; a second call only keeps the first.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(EXIT_INTERRUPTED));
        }
    });
    let Some(directory) = &directory else {
        return run_built_in(args);
    };
    let problem = problem(args)?;
    let files = ModelFiles::open(directory)?;
    let mut text = Text::load(directory)?.with_renderer(child::render);
    if args.no_chat_template {
        text = text.without_chat_template();
    } else if !args.raw && !text.has_chat_template() {
        args.load
            .note("the model has no chat template: the prompt is given as it is");
    }
    let text = Arc::new(text);
    if args.raw {
        return run_raw(args, &problem, directory, &files, &text)
            .map_err(name_tokenizer(directory));
    }
    let published = RulesName::published(&args.rules, &args.answer)?;
    let rules = RulesName {
        check_every: args.check_every.unwrap_or(published.check_every),
        more_ends: files.eos(),
        ..RulesName::new(&args.rules, &published)
    };
    let model = model_name(directory, &files);
    let style = style(args)?;
    let subject = Subject {
        files,
        text,
        model,
        problem,
        style,
        rules,
    };
    solve(args, &subject, &names(args)?, &open_devices(args)?)
        .map_err(name_tokenizer(directory))?;
    Ok(exit_code())
}

/// The built-in model: a fresh problem or the user's, whether it was solved, and what one worker needs.
fn run_built_in(args: &Args) -> Result<ExitCode> {
    if args.raw {
        let what = "--raw continues a text, which the built-in model cannot; name a model with -m";
        return Err(Error::Usage(what.into()));
    }
    let names = names(args)?;
    if names.len() > demo::MAX_WORKERS {
        let n = names.len();
        let most = demo::MAX_WORKERS;
        return Err(Error::Usage(format!(
            "the built-in model was trained for 1 to {most} workers, not {n}; name another model with -m"
        )));
    }
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let problem = if args.problem.is_none() && args.file.is_none() {
        let problem = demo::Problem::random(seed, FRESH_SUMS);
        args.load.note(&format!(
            "a fresh problem (seed {seed}) for the built-in model: {problem}"
        ));
        problem
    } else {
        demo::Problem::parse(&problem(args)?)?
    };
    // One seed for the problem and for what little is left to chance.
    let args = &Args {
        seed: Some(seed),
        ..args.clone()
    };
    let files = demo::files()?;
    let model = ModelName {
        directory: demo::NAME.to_owned(),
        hash: files.hash(),
    };
    let (text, problem_text) = (Arc::new(demo::text()?), problem.to_string());
    let rules = RulesName::new("main", &demo::rules());
    let style = if args.prompt.is_some() {
        style(args)?
    } else {
        demo::style()?
    };
    let subject = Subject {
        files,
        text,
        model,
        problem: problem_text,
        style,
        rules,
    };
    let devices = open_devices(args)?;
    let outcome = solve(args, &subject, &names, &devices)?;
    let sums = problem.sums().len();
    let verdict = match outcome
        .answer
        .as_deref()
        .and_then(|answer| problem.right(answer))
    {
        Some(right) if right == sums => format!("all {right} results are right"),
        Some(right) => format!("{right} of {sums} results are right"),
        None => "the answer does not have a result for each sum".to_owned(),
    };
    let (n, plural) = (names.len(), if names.len() == 1 { "" } else { "s" });
    args.load.note(&format!(
        "{verdict}, after {} passes with {n} worker{plural}",
        outcome.passes
    ));
    if n > 1 && !args.load.quiet && !INTERRUPTED.load(Ordering::SeqCst) {
        let mut alone = prepare(args, &subject, &names[..1], &devices)?;
        while !alone.is_over() {
            alone.step(&[])?;
        }
        args.load.note(&format!(
            "one worker alone needs {} passes, {:.2} times as many",
            alone.passes(),
            alone.passes() as f64 / outcome.passes.max(1) as f64
        ));
    }
    Ok(exit_code())
}

/// The problem's text, from wherever it is.
fn problem(args: &Args) -> Result<String> {
    let limited = |what: &Path, reader: &mut dyn std::io::Read| -> Result<String> {
        let mut bytes = Vec::new();
        reader
            .take(MAX_PROBLEM + 1)
            .read_to_end(&mut bytes)
            .map_err(Error::io(what))?;
        if bytes.len() as u64 > MAX_PROBLEM {
            return Err(Error::Usage(format!(
                "{}: is longer than {MAX_PROBLEM} bytes",
                what.display()
            )));
        }
        String::from_utf8(bytes)
            .map_err(|e| Error::Usage(format!("{}: is not UTF-8: {e}", what.display())))
    };
    let problem = match (&args.problem, &args.file) {
        (None, None) => {
            return Err(Error::Usage(
                "no problem was given; write it as an argument, -f FILE, or -".into(),
            ));
        }
        (Some(text), None) if text != "-" => text.clone(),
        (_, Some(file)) => limited(file, &mut File::open(file).map_err(Error::io(file))?)?,
        _ => limited(Path::new("standard input"), &mut std::io::stdin().lock())?,
    };
    // A file ends in a line break that nobody meant.
    let problem = if args.raw {
        problem
    } else {
        problem.trim().to_owned()
    };
    if problem.is_empty() && !args.raw {
        return Err(Error::Usage("the problem is empty".into()));
    }
    Ok(problem)
}

/// Settings that do not depend on the prompt; `context` is filled in later.
fn settings(
    args: &Args,
    generation: &GenerationConfig,
    files: &ModelFiles,
    text: &Text,
) -> Settings {
    let temperature = if generation.is_greedy() {
        0.0
    } else {
        generation.temperature
    };
    Settings {
        layout: args.layout,
        max_passes: args.max_passes,
        context: 0,
        kv_dtype: args.kv_dtype.clone(),
        early_answer: !args.no_early_answer,
        temperature: args.temp.unwrap_or(temperature),
        top_k: args.top_k.unwrap_or(generation.top_k),
        top_p: args.top_p.unwrap_or(generation.top_p),
        min_p: args.min_p.unwrap_or(generation.min_p),
        seed: args.seed.unwrap_or_else(fresh_seed),
        vocab_limit: (text.vocab_size() < files.config.vocab_size).then(|| text.vocab_size()),
    }
}

/// A seed that nobody chose; short enough to be typed again.
fn fresh_seed() -> u64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::from(now.subsec_nanos() ^ u32::try_from(now.as_secs() & 0xffff_ffff).unwrap_or(0))
}

/// The context: as asked for, or what prompt, passes and early answer need, within the model's range
/// of positions.
fn context(
    args: &Args,
    files: &ModelFiles,
    prompt: usize,
    workers: usize,
    finisher: usize,
) -> Result<usize> {
    let most = files.config.max_positions;
    if let Some(context) = args.context {
        if context > most {
            return Err(Error::Limit {
                what: "--context".into(),
                need: format!("{context} positions"),
                have: format!("{most} that the model was made for"),
                advice: "give a smaller one".into(),
            });
        }
        return Ok(context.max(1));
    }
    // A step costs its prefix beside its tokens; the early answer has some reserve for its text.
    let passes = usize::try_from(args.max_passes).unwrap_or(usize::MAX);
    let written = passes.saturating_mul(workers).saturating_mul(5) / 4;
    Ok(prompt
        .saturating_add(written)
        .saturating_add(prompt / 8 + 1024 + finisher)
        .min(most))
}

/// How a session went.
struct Outcome {
    passes: u64,
    answer: Option<String>,
}

/// A session that is ready to begin, and the name of its rules.
fn prepare(args: &Args, subject: &Subject, names: &[String], devices: &Devices) -> Result<Session> {
    let (files, text) = (&subject.files, &subject.text);
    let rules = subject.rules.rules()?;
    let settings = settings(args, &files.generation, files, text);
    settings.sampling().check()?;
    settings.kv_type()?;
    let problem = Problem {
        text: &subject.problem,
        style: &subject.style,
        thinking: None,
        today: today(),
    };
    let protocol = Protocol::open(text.clone(), rules, names, &problem)?;
    let o = protocol.opening();
    let words = o.words.iter().flatten();
    let headers = o.header_others.iter().chain(&o.header_own);
    check_ids(files, o.prompt.iter().chain(headers).chain(words))?;
    let finisher = protocol.rules().finisher_tokens;
    let context = context(args, files, o.prompt.len(), names.len(), finisher)?;
    let settings = Settings {
        context,
        ..settings
    };
    let model = load(args, devices, files, &settings)?;
    let mut engine = settings.engine(model, args.load.check)?;
    engine.set_ahead(!args.load.no_ahead);
    Session::new(engine, protocol, settings)
}

/// Runs a session on a subject and shows it.
fn solve(args: &Args, subject: &Subject, names: &[String], devices: &Devices) -> Result<Outcome> {
    let mut sinks = Sinks::open(args)?;
    let mut session = prepare(args, subject, names, devices)?;
    args.load.note(&format!("seed {}", session.settings().seed));
    sinks.begin(&session.header(subject.model.clone(), subject.rules.clone()))?;
    let mut show = Show::new(args, names.to_vec());
    let started = Instant::now();
    let (reason, answer) = match drive(&mut session, &mut sinks, &mut show, started) {
        Ok(outcome) => outcome,
        Err(error) => {
            // What was written is not lost with the error.
            let _ = show.output.finish();
            return Err(error);
        }
    };
    show.finish(reason, answer.as_deref())?;
    let seconds = started.elapsed().as_secs_f64();
    let passes = session.passes();
    args.load.note(&format!(
        "{passes} passes in {seconds:.1} s, {:.2} passes/s, {:.2} tokens/s",
        passes as f64 / seconds,
        show.tokens() as f64 / seconds
    ));
    Ok(Outcome { passes, answer })
}

fn open_devices(args: &Args) -> Result<Devices> {
    args.load
        .open_devices(args.load.device.as_deref().unwrap_or("auto"))
}

fn load(
    args: &Args,
    devices: &Devices,
    files: &ModelFiles,
    settings: &Settings,
) -> Result<Arc<Model>> {
    let (load, kv_dtype) = (&args.load, settings.kv_type()?);
    load.load(devices, &load.layers, files, settings.context, kv_dtype)
}

/// Runs a session to its end; tells why it ended and the answer.
fn drive(
    session: &mut Session,
    sinks: &mut Sinks<'_>,
    show: &mut Show,
    started: Instant,
) -> Result<(Reason, Option<String>)> {
    RUNNING.store(true, Ordering::SeqCst);
    let mut asked = false;
    let mut outcome = (Reason::Stopped, None);
    while !session.is_over() {
        let mut commands = Vec::new();
        if !asked && INTERRUPTED.load(Ordering::SeqCst) {
            asked = true;
            show.note("interrupted: asking for the answer; Ctrl-C again stops at once");
            commands.push(Command::Finish);
        }
        let events = session.step(&commands)?;
        sinks.append(&events)?;
        for event in &events {
            show.event(event)?;
            if let Event::Finish { reason, answer, .. } = event {
                outcome = (*reason, answer.clone());
            }
        }
        let usage = session.usage();
        if !session.is_over() {
            show.status(session.passes(), started, usage.tokens, usage.context);
        }
    }
    Ok(outcome)
}

fn exit_code() -> ExitCode {
    if INTERRUPTED.load(Ordering::SeqCst) {
        ExitCode::from(EXIT_INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    }
}

fn run_raw(
    args: &Args,
    prompt: &str,
    directory: &Path,
    files: &ModelFiles,
    text: &Arc<Text>,
) -> Result<ExitCode> {
    let ids = text.encode_as_input(prompt)?;
    check_ids(files, &ids)?;
    let settings = settings(args, &files.generation, files, text);
    settings.sampling().check()?;
    settings.kv_type()?;
    let context = context(args, files, ids.len(), 1, 0)?;
    let settings = Settings {
        context,
        ..settings
    };
    let mut ends: Vec<TokenId> = files.eos();
    ends.extend(text.eos());
    ends.sort_unstable();
    ends.dedup();

    let mut sinks = Sinks::open(args)?;
    let model = load(args, &open_devices(args)?, files, &settings)?;
    let header = Header {
        format: FORMAT,
        hogwild: env!("CARGO_PKG_VERSION").to_owned(),
        model: model_name(directory, files),
        device: model.device_names(),
        layers: model.placement().split().to_vec(),
        settings: settings.clone(),
        rules: None,
        names: Vec::new(),
        opening: OpeningIds {
            prompt: ids.clone(),
            ends: ends.clone(),
            ..OpeningIds::default()
        },
    };
    let mut engine = settings.engine(model, args.load.check)?;
    engine.set_ahead(!args.load.no_ahead);
    let mut raw = Raw::new(engine, settings, ids, ends)?;
    args.load.note(&format!("seed {}", header.settings.seed));
    sinks.begin(&header)?;
    let mut show = Show {
        output: Output::numbers(),
        ..Show::new(args, vec!["text".to_owned()])
    };
    let mut out = std::io::stdout();
    let mut print = |text: &str| -> Result<()> {
        if args.jsonl {
            return Ok(());
        }
        out.write_all(neutralise(text).as_bytes())
            .and_then(|()| out.flush())
            .map_err(stdout_error)
    };
    print(prompt)?;
    let started = Instant::now();
    let mut used = 0;
    RUNNING.store(true, Ordering::SeqCst);
    while !raw.is_over() && !INTERRUPTED.load(Ordering::SeqCst) {
        let events = raw.step(text)?;
        sinks.append(&events)?;
        for event in &events {
            match event {
                Event::Pass { rows, .. } => used += rows.iter().map(|r| r.ids.len()).sum::<usize>(),
                Event::Token { text, .. } => {
                    show.tokens[0] += 1;
                    print(text)?;
                }
                _ => {}
            }
        }
        show.status(raw.passes(), started, used, context);
    }
    show.output.finish()?;
    print("\n")?;
    let seconds = started.elapsed().as_secs_f64();
    args.load.note(&format!(
        "{} tokens in {seconds:.1} s, {:.2} tokens/s",
        raw.passes(),
        raw.passes() as f64 / seconds
    ));
    Ok(exit_code())
}

fn model_name(directory: &Path, files: &ModelFiles) -> ModelName {
    ModelName {
        directory: directory.display().to_string(),
        hash: files.hash(),
    }
}

fn names(args: &Args) -> Result<Vec<String>> {
    let n = args.workers.map(usize::from);
    if args.names.is_empty() {
        return Ok(default_names(n.unwrap_or(2)));
    }
    let names: Vec<String> = args
        .names
        .iter()
        .map(|name| name.trim().to_owned())
        .collect();
    match n {
        Some(n) if n != names.len() => Err(Error::Usage(format!(
            "{n} workers were asked for, but {} names given",
            names.len()
        ))),
        _ => Ok(names),
    }
}

fn style(args: &Args) -> Result<PromptStyle> {
    let Some(path) = &args.prompt else {
        return Ok(PromptStyle::default());
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_STYLE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(path))?;
    let source = String::from_utf8(bytes)
        .map_err(|e| Error::Usage(format!("{}: is not UTF-8: {e}", path.display())))?;
    // A prompt file is the user's, not the model's.
    PromptStyle::parse(&path.display().to_string(), &source)
        .map_err(|e| Error::Usage(e.to_string()))
}

/// Today's date in UTC, for chat templates that mention it.
fn today() -> Date {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Date::from_days(now.as_secs() / 86_400)
}

/// Where the log goes.
struct Sinks<'a> {
    /// The path of the file, and the file until the log begins.
    file: Option<(&'a Path, File)>,
    logs: Vec<(&'a Path, Log<Box<dyn Write>>)>,
    jsonl: bool,
}

impl<'a> Sinks<'a> {
    /// Opens the file, before anything that takes long.
    fn open(args: &'a Args) -> Result<Self> {
        let open = |path: &'a PathBuf| -> Result<_> {
            let file = File::create(path).map_err(Error::io(path))?;
            Ok((path.as_path(), file))
        };
        Ok(Self {
            file: args.log.as_ref().map(open).transpose()?,
            logs: Vec::new(),
            jsonl: args.jsonl,
        })
    }

    fn begin(&mut self, header: &Header) -> Result<()> {
        let mut begin = |path: &'a Path, writer: Box<dyn Write>| -> Result<()> {
            let log = Log::new(writer, header).map_err(Error::io(path))?;
            self.logs.push((path, log));
            Ok(())
        };
        if let Some((path, file)) = self.file.take() {
            begin(path, Box::new(BufWriter::new(file)))?;
        }
        if self.jsonl {
            let out = BufWriter::new(std::io::stdout());
            begin(Path::new("standard output"), Box::new(out))?;
        }
        Ok(())
    }

    fn append(&mut self, events: &[Event]) -> Result<()> {
        for (path, log) in &mut self.logs {
            log.append(events).map_err(Error::io(*path))?;
        }
        Ok(())
    }
}

/// Shows events to a person.
struct Show {
    output: Output,
    /// Nobody reads the text: standard output carries the log.
    silent: bool,
    names: Vec<String>,
    /// Number of each worker's current step.
    steps: Vec<usize>,
    /// Tokens that each worker chose.
    tokens: Vec<u64>,
    quiet: bool,
}

impl Show {
    fn new(args: &Args, names: Vec<String>) -> Self {
        let n = names.len();
        let output = if args.jsonl {
            Output::numbers()
        } else {
            Output::new(args.color)
        };
        Self {
            output,
            silent: args.jsonl,
            names,
            steps: vec![1; n],
            tokens: vec![0; n],
            quiet: args.load.quiet,
        }
    }

    fn tokens(&self) -> u64 {
        self.tokens.iter().sum()
    }

    /// Says something on standard error, beside what is shown there.
    fn note(&mut self, text: &str) {
        if !self.quiet {
            self.output.note(&format!("hogwild: {text}"));
        }
    }

    fn event(&mut self, event: &Event) -> Result<()> {
        if let Event::Token { worker, .. } = event {
            self.tokens[*worker] += 1;
        }
        if self.silent {
            return Ok(());
        }
        let output = &mut self.output;
        match event {
            Event::Token { worker, text, .. } => {
                output.step_text(*worker, &self.names[*worker], self.steps[*worker], text)
            }
            Event::Inserted {
                worker, what, text, ..
            } if *what != Words::Prefix => {
                let prefix = step_prefix(&self.names[*worker], self.steps[*worker]);
                let text = text.strip_prefix(&prefix).unwrap_or(text);
                output.step_text(*worker, &self.names[*worker], self.steps[*worker], text)
            }
            Event::StepClosed { worker, step, .. } => {
                self.steps[*worker] = step + 1;
                output.step_closed(*worker, &self.names[*worker], *step)
            }
            _ => Ok(()),
        }
    }

    fn status(&mut self, passes: u64, started: Instant, used: usize, total: usize) {
        if self.quiet || !self.output.is_live() {
            return;
        }
        let seconds = started.elapsed().as_secs_f64().max(1e-9);
        let rate = |n: u64| n as f64 / seconds;
        self.output.status(&Status {
            pass: usize::try_from(passes).unwrap_or(usize::MAX),
            passes_per_s: rate(passes),
            tokens_per_s: rate(self.tokens.iter().sum()),
            by_worker: self.tokens.iter().map(|&n| rate(n)).collect(),
            cache_used: used,
            cache_total: total,
        });
    }

    fn finish(&mut self, reason: Reason, answer: Option<&str>) -> Result<()> {
        self.output.finish()?;
        if let (Some(answer), false) = (answer, self.silent) {
            // A worker that waits for a result fills its box with blanks.
            let words: Vec<&str> = answer.split(' ').filter(|word| !word.is_empty()).collect();
            self.output
                .answer(&format!("\nAnswer: {}", words.join(" ")))?;
        }
        if !self.quiet {
            let why = match reason {
                Reason::Answer => "a finished step holds the answer",
                Reason::EndToken => "a worker ended the text",
                Reason::Budget => "all passes are used (-n gives more)",
                Reason::Context => "the context is full (--context gives more)",
                Reason::NobodyLeft => "no worker is left",
                Reason::Asked => "the answer was asked for",
                Reason::Stopped => "it was stopped",
            };
            let missing = if answer.is_none() {
                "; there is no answer"
            } else {
                ""
            };
            super::note(&format!("over: {why}{missing}"));
        }
        Ok(())
    }
}
