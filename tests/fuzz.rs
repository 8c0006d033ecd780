//! Every parser of a foreign file against files that no program wrote.
//!
//! The seeds of `tests/corpus/` and the small golden files are changed at random: bytes flipped, cut,
//! moved, repeated, tokens of the format put in their place, numbers made extreme. Whatever comes out of
//! a parser, it comes without a panic, within [`PATIENCE`], and without more than [`MEMORY`] at once.
//! `HOGWILD_FUZZ=seconds` gives every parser that long instead of a number of inputs, from a new seed;
//! the input of a failure is kept, so that it can be added to the corpus.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use hogwild::model::{Checkpoint, Config, GenerationConfig, Header};
use hogwild::session::read_log;
use hogwild::text::{Date, Text, template};
use serde_json::json;

/// No input may keep a parser busy for longer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes that a parser may hold at once.
const MEMORY: usize = 256 << 20;

/// The system's allocator, which counts what is held.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn took(bytes: usize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(held, Ordering::Relaxed);
}

#[expect(unsafe_code, reason = "an allocator is nothing else")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        took(size);
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What is measured is measured alone.
static ALONE: Mutex<()> = Mutex::new(());

/// The input that a parser has, where to keep it, and since when.
static AT_WORK: Mutex<Option<(PathBuf, Vec<u8>, Instant)>> = Mutex::new(None);

/// A parser that does not come back would hold up every test after it: ends this process, with the
/// input kept, when one input has taken ten times [`PATIENCE`].
fn watch() {
    static ONCE: Once = Once::new();
    let end_what_hangs = || loop {
        std::thread::sleep(PATIENCE);
        let at_work = AT_WORK.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((path, input, since)) = &*at_work
            && since.elapsed() > 10 * PATIENCE
        {
            let _ = fs::write(path, input);
            eprintln!("no answer after {:?}: {}", since.elapsed(), path.display());
            std::process::abort();
        }
    };
    ONCE.call_once(|| drop(std::thread::spawn(end_what_hangs)));
}

/// What a call cost.
struct Cost {
    time: Duration,
    bytes: usize,
}

/// Makes a call, which must be the only one of this process; `Err` if it panicked.
fn measured<T>(call: impl FnOnce() -> T) -> (Result<T, ()>, Cost) {
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let started = Instant::now();
    let out = catch_unwind(AssertUnwindSafe(call)).map_err(drop);
    let cost = Cost {
        time: started.elapsed(),
        bytes: PEAK.load(Ordering::Relaxed).saturating_sub(before),
    };
    (out, cost)
}

/// Random numbers: `SplitMix64`.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, or 0.
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).expect("below a usize")
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// What numbers become.
const NUMBERS: &[&str] = &[
    "0",
    "-1",
    "1",
    "7",
    "1024",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e999",
    "1e-320",
    "-0.0",
    "0.5",
    "340282350000000000000000000000000000000",
];

/// What JSON is made of.
const JSON_WORDS: &[&str] = &[
    "{", "}", "[", "]", ",", ":", "\"", "null", "true", "false", "[]", "{}", "\"\"", "[[[[[[[[",
    "\\u0000", "\\ud800", "\"a\": ", "[1,", "{\"a\":", "\u{feff}", "\0", "\u{2028}",
];

/// What templates are made of.
const TEMPLATE_WORDS: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "-%}",
    "{%-",
    "{% for i in range(9999) %}",
    "{% endfor %}",
    "{% if true %}",
    "{% endif %}",
    "{% else %}",
    "{% macro m(a) %}",
    "{% endmacro %}",
    "{{ m(a) }}",
    "{% set x = x ~ x %}",
    "{% raw %}",
    "{% endraw %}",
    "{% break %}",
    "{% generation %}",
    "|tojson",
    "|join",
    "|list",
    "|length",
    "[::-1]",
    "[1:]",
    "[0]",
    ".split('')",
    ".items()",
    "loop(",
    " ~ ",
    " * ",
    " + ",
    " ** ",
    " in ",
    " is ",
    " not ",
    "messages",
    "'",
    "\"",
    "\\",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "range(9999)",
    "none",
    "raise_exception('x')",
    "strftime_now('%A')",
    "namespace(x=1)",
    "loop.previtem",
    "é",
    "\u{f0000}",
];

/// Changes a seed a few times.
fn changed(random: &mut Random, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + 1 + random.below(24)).min(bytes.len());
        match random.below(10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next().to_le_bytes()[0],
            2 => bytes.truncate(at),
            3 if at < end => drop(bytes.drain(at..end)),
            4 if at < end => {
                let again = bytes[at..end].repeat(1 + random.below(64));
                drop(bytes.splice(at..at, again));
            }
            5 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len() + 1);
                let len = random.below(200).min(other.len() - from);
                drop(bytes.splice(at..at, other[from..from + len].iter().copied()));
            }
            6 | 7 => {
                // The next number of the text, whole.
                let digit = |b: &u8| b.is_ascii_digit() || b"+-.eE".contains(b);
                let first = bytes[at..].iter().position(u8::is_ascii_digit);
                let first = first.map_or(bytes.len(), |n| at + n);
                let len = bytes[first..].iter().take_while(|b| digit(b)).count();
                let number = random.pick(NUMBERS).bytes();
                drop(bytes.splice(first..first + len, number));
            }
            _ => {
                let word = random.pick(words).bytes();
                let end = if random.below(2) == 0 {
                    at
                } else {
                    end.max(at)
                };
                drop(bytes.splice(at..end, word));
            }
        }
    }
    bytes
}

/// The files of a folder, smallest name first.
fn files_of(folder: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .expect("a folder of seeds")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_file())
        .collect();
    paths.sort();
    let read = |path: &PathBuf| fs::read(path).expect("a seed");
    paths.iter().map(read).collect()
}

/// Gives a parser its seeds and `n` changed ones; some of the seeds must be good.
fn hold(name: &str, seeds: &[Vec<u8>], words: &[&str], n: usize, parse: impl Fn(&[u8]) -> bool) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    hogwild::caught::keep_quiet();
    watch();
    let at_work = || AT_WORK.lock().unwrap_or_else(PoisonError::into_inner);
    let longer = std::env::var("HOGWILD_FUZZ").map(|s| s.parse().expect("HOGWILD_FUZZ: seconds"));
    let (time, seed) = match longer {
        Ok(seconds) => (Some(Duration::from_secs(seconds)), fresh()),
        Err(_) => (
            None,
            name.bytes()
                .fold(7_u64, |h, b| h.wrapping_mul(31) ^ u64::from(b)),
        ),
    };
    let started = Instant::now();
    let mut random = Random(seed);
    let (mut good, mut slowest, mut largest) = (0, Duration::ZERO, 0);
    let mut ran = 0;
    while ran < seeds.len() || time.map_or(ran < n, |time| started.elapsed() < time) {
        let input = match seeds.get(ran) {
            Some(seed) => seed.clone(),
            None => changed(&mut random, seeds, words),
        };
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{ran}"));
        *at_work() = Some((path.clone(), input.clone(), Instant::now()));
        let (out, cost) = measured(|| parse(&input));
        *at_work() = None;
        if out.is_err() || cost.time > PATIENCE || cost.bytes > MEMORY {
            let _ = fs::write(&path, &input);
            let how = if out.is_err() { "panicked" } else { "returned" };
            panic!(
                "{name}: input {ran} of seed {seed} {how} after {:?} with {} bytes held: {:.2000}",
                cost.time,
                cost.bytes,
                input.escape_ascii().to_string()
            );
        }
        good += usize::from(ran < seeds.len() && out == Ok(true));
        (slowest, largest) = (slowest.max(cost.time), largest.max(cost.bytes));
        ran += 1;
    }
    eprintln!("{name}: {ran} inputs, {slowest:?} and {largest} bytes at most");
    assert_eq!(good, seeds.len(), "{name}: every seed is a good file");
}

/// A seed that nobody chose.
fn fresh() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.expect("a clock").subsec_nanos().into()
}

const CONFIG: &str = "tests/golden/models/qwen3/config.json";

fn a_config() -> Config {
    let bytes = fs::read(CONFIG).expect("a golden file");
    Config::from_json(Path::new(CONFIG), &bytes).expect("a good config")
}

/// Whether a result is good; a bad one must say so on one line.
fn said<T>(result: hogwild::Result<T>) -> bool {
    match result {
        Ok(_) => true,
        Err(error) => {
            let line = error.to_string();
            assert!(!line.contains('\n') && line.len() < 2000, "said: {line}");
            false
        }
    }
}

#[test]
fn configs_of_any_bytes_are_read_or_refused() {
    let mut seeds = files_of("tests/corpus/config");
    seeds.push(fs::read(CONFIG).expect("a golden file"));
    hold("config", &seeds, JSON_WORDS, 4000, |bytes| {
        said(Config::from_json(Path::new("config.json"), bytes))
    });
}

#[test]
fn generation_configs_of_any_bytes_are_read_or_refused() {
    let seeds = files_of("tests/corpus/generation_config");
    let config = a_config();
    hold("generation_config", &seeds, JSON_WORDS, 4000, |bytes| {
        let path = Path::new("generation_config.json");
        said(GenerationConfig::from_json(path, bytes, &config))
    });
}

#[test]
fn headers_of_any_bytes_are_read_or_refused() {
    let path = Path::new("model.safetensors");
    let seeds = files_of("tests/corpus/header");
    hold("header", &seeds, JSON_WORDS, 4000, |header| {
        let header = header.trim_ascii_end();
        let file = [&(header.len() as u64).to_le_bytes(), header].concat();
        said(Header::parse(path, &file, file.len() as u64 + 32))
    });
    // And with a length of their own.
    let whole = |header: &Vec<u8>| {
        let header = header.trim_ascii_end();
        [&(header.len() as u64).to_le_bytes(), header].concat()
    };
    let seeds: Vec<_> = seeds.iter().map(whole).collect();
    let len = seeds[0].len() as u64 + 32;
    hold("header_length", &seeds, JSON_WORDS, 2000, |file| {
        said(Header::parse(path, file, len))
    });
}

/// A folder of two weight files, which the seeds of the index describe.
fn two_shards() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let shard = |name: &str, header: &str, data: usize| {
        let len = (header.len() as u64).to_le_bytes();
        let file = [&len, header.as_bytes(), &vec![0; data]].concat();
        fs::write(dir.path().join(name), file).expect("a file");
    };
    let tensor = |at: usize| {
        format!(
            r#"{{"dtype":"F32","shape":[2],"data_offsets":[{at},{}]}}"#,
            at + 8
        )
    };
    let first = format!(r#"{{"a":{},"b":{}}}"#, tensor(0), tensor(8));
    shard("model-00001-of-00002.safetensors", &first, 16);
    shard(
        "model-00002-of-00002.safetensors",
        &format!(r#"{{"c":{}}}"#, tensor(0)),
        8,
    );
    dir
}

#[test]
fn indices_of_any_bytes_are_read_or_refused() {
    let dir = two_shards();
    let path = dir.path().join("model.safetensors.index.json");
    let seeds = files_of("tests/corpus/index");
    hold("index", &seeds, JSON_WORDS, 1000, |bytes| {
        fs::write(&path, bytes).expect("a file");
        said(Checkpoint::open(dir.path()))
    });
}

#[test]
fn tokenizers_of_any_bytes_are_read_or_refused() {
    let mut seeds = files_of("tests/corpus/tokenizer");
    seeds.push(fs::read("tests/golden/models/tokenizer/tokenizer.json").expect("a golden file"));
    hold("tokenizer", &seeds, JSON_WORDS, 100, |bytes| {
        let text = match Text::embedded(Path::new("x"), bytes, b"{}") {
            Ok(text) => text,
            Err(error) => return said::<()>(Err(error)),
        };
        // What was accepted must work, or say that it does not.
        for words in [
            "",
            " a b  ab</think>x 日本 'S\r\n\u{f0000}",
            &"ab ".repeat(500),
        ] {
            let ids = [
                text.encode(words),
                text.encode_plain(words),
                text.encode_as_input(words),
            ];
            for ids in ids.into_iter().flatten() {
                let _ = text.decode(&ids);
            }
        }
        let _ = text.decode(&[0, 1, 2, 3, 4, 5, 485, u32::MAX]);
        true
    });
}

#[test]
fn tokenizer_configs_of_any_bytes_are_read_or_refused() {
    let tokenizer = fs::read("tests/corpus/tokenizer/bytes.json").expect("a seed");
    let own = "tests/golden/models/tokenizer/tokenizer_config.json";
    let seeds = [fs::read(own).expect("a golden file")];
    hold("tokenizer_config", &seeds, JSON_WORDS, 300, |bytes| {
        said(Text::embedded(Path::new("x"), &tokenizer, bytes))
    });
}

#[test]
fn templates_of_any_text_render_or_are_refused() {
    let mut seeds = files_of("tests/corpus/template");
    let hostile = seeds.len();
    let golden = files_of("tests/golden/chat");
    seeds.extend(
        golden
            .into_iter()
            .filter(|file| file.starts_with(b"{") && file.contains(&b'%')),
    );
    assert!(seeds.len() > hostile + 5, "the golden templates");
    let cases = fs::read("tests/golden/chat/cases.json").expect("a golden file");
    let cases: serde_json::Value = serde_json::from_slice(&cases).expect("JSON");
    hold("template", &seeds, TEMPLATE_WORDS, 24, |bytes| {
        let source = String::from_utf8_lossy(bytes);
        let render = |case: &str| template::render("x", &source, &cases[case], Date::default());
        for case in ["tools", "turns"] {
            if let Err(error) = render(case) {
                let _ = said::<()>(Err(error));
            }
        }
        true
    });
}

#[test]
fn logs_of_any_bytes_are_read_or_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("log.jsonl");
    let seeds = files_of("tests/corpus/log");
    hold("log", &seeds, JSON_WORDS, 2000, |bytes| {
        fs::write(&path, bytes).expect("a file");
        said(read_log(&path))
    });
}

/// A text for every number below `n`.
fn each(n: usize, text: impl Fn(usize) -> String) -> String {
    (0..n).map(text).collect::<Vec<_>>().concat()
}

/// Values that take the most memory or time for their length.
fn long_values(len: usize) -> Vec<(&'static str, String)> {
    let list = |item: &str| format!("[{}0]", format!("{item},").repeat(len / (item.len() + 1)));
    let keys = each(len / 12, |i| format!("\"{i:07}\":0,"));
    vec![
        ("numbers", list("0")),
        ("lists", list("[]")),
        ("objects", list("{}")),
        ("texts", list("\"\"")),
        (
            "lists in lists",
            format!("{}{}", "[".repeat(len / 2), "]".repeat(len / 2)),
        ),
        ("keys", format!("{{{keys}\"a\":0}}")),
        ("a long text", format!("\"{}\"", "x".repeat(len))),
        ("a long number", "9".repeat(len)),
        ("escapes", format!("\"{}\"", "\\u00e9".repeat(len / 6))),
        ("blanks", " ".repeat(len)),
    ]
}

/// A file as long as its reader takes, of every kind of value, in place of any value of an object.
fn hold_long(name: &str, len: usize, holders: &[&str], parse: impl Fn(&[u8])) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    hogwild::caught::keep_quiet();
    let mut bad = Vec::new();
    for (what, value) in long_values(len - 200) {
        for holder in holders {
            let file = holder.replace('@', &value);
            let (out, cost) = measured(|| parse(file.as_bytes()));
            let story = format!(
                "{what} in {holder}: {:?}, {} MiB",
                cost.time,
                cost.bytes >> 20
            );
            eprintln!("{name}: {story}");
            if out.is_err() || cost.time > PATIENCE || cost.bytes > MEMORY {
                bad.push(story);
            }
        }
    }
    assert!(bad.is_empty(), "{name}: beyond the bounds: {bad:#?}");
}

#[test]
fn files_as_long_as_may_be_are_read_soon_and_small() {
    let small = [
        "@",
        "{\"eos_token_id\":@}",
        "{\"rope_scaling\":@}",
        "{\"quantization_config\":@}",
    ];
    let config = a_config();
    hold_long("config", 1 << 20, &small, |bytes| {
        let _ = Config::from_json(Path::new("x"), bytes);
        let _ = GenerationConfig::from_json(Path::new("x"), bytes, &config);
    });
    let tokenizer = fs::read("tests/corpus/tokenizer/bytes.json").expect("a seed");
    let holders = ["@", "{\"added_tokens_decoder\":@}", "{\"chat_template\":@}"];
    hold_long("tokenizer_config", 1 << 20, &holders, |bytes| {
        let _ = Text::embedded(Path::new("x"), &tokenizer, bytes);
    });
    let holders = ["{\"a\":@}"];
    hold_long("header", 16 << 20, &holders, |header| {
        let file = [&(header.len() as u64).to_le_bytes(), header].concat();
        let _ = Header::parse(Path::new("x"), &file, file.len() as u64 + 32);
    });
    let dir = two_shards();
    let path = dir.path().join("model.safetensors.index.json");
    hold_long(
        "index",
        16 << 20,
        &["{\"weight_map\":@}", "{\"metadata\":@}"],
        |bytes| {
            fs::write(&path, bytes).expect("a file");
            let _ = Checkpoint::open(dir.path());
        },
    );
    let holders = ["{\"model\":@}"];
    hold_long("tokenizer", 64 << 20, &holders, |bytes| {
        let _ = Text::embedded(Path::new("x"), bytes, b"{}");
    });
    let path = dir.path().join("log.jsonl");
    let seed = fs::read_to_string("tests/corpus/log/session.jsonl").expect("a seed");
    let first = seed.lines().next().expect("a header");
    let event = format!("{first}\n{{\"event\":\"pass\",\"pass\":0,\"rows\":@}}\n");
    hold_long(
        "log",
        4 << 20,
        &["{\"format\":1,\"names\":@}\n", &event],
        |bytes| {
            fs::write(&path, bytes).expect("a file");
            let _ = read_log(&path);
        },
    );
}

/// Templates that would take a machine down without bounds.
#[expect(clippy::too_many_lines, reason = "a table is as long as it is")]
fn hostile_templates() -> Vec<(&'static str, String)> {
    let grow = |body: &str| {
        format!(
            "{{% set ns = namespace(x='0123456789', l=[1, 2]) %}}{{% for i in range(9999) %}}{body}\
             {{% endfor %}}{{{{ ns.x|length }}}}"
        )
    };
    let nested = |body: &str| {
        let open = each(6, |i| format!("{{% for a{i} in range(9999) %}}"));
        format!("{open}{body}{}", "{% endfor %}".repeat(6))
    };
    vec![
        ("doubling by ~", grow("{% set ns.x = ns.x ~ ns.x %}")),
        ("doubling by +", grow("{% set ns.x = ns.x + ns.x %}")),
        ("doubling a list", grow("{% set ns.l = ns.l + ns.l %}")),
        ("growing a list", grow("{% set ns.l = ns.l + [i] %}")),
        ("nesting a list", grow("{% set ns.l = [ns.l] %}")),
        (
            "nesting and printing",
            grow("{% set ns.l = [ns.l] %}{{ ns.l }}"),
        ),
        (
            "sharing a list",
            grow("{% set ns.l = [ns.l, ns.l] %}{{ ns.l|length }}"),
        ),
        (
            "sharing a dictionary",
            grow("{% set ns.l = {'a': ns.l, 'b': ns.l} %}{{ ns.l|tojson }}"),
        ),
        (
            "a captured block",
            grow("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        ),
        ("replace", grow("{% set ns.x = ns.x|replace('0', ns.x) %}")),
        (
            "replace nothing",
            grow("{% set ns.x = ns.x.replace('', ns.x) %}"),
        ),
        ("join", grow("{% set ns.x = ns.x|join(ns.x) %}")),
        ("JSON in JSON", grow("{% set ns.x = [ns.x, ns.x]|tojson %}")),
        ("upper", grow("{% set ns.x = (ns.x ~ 'ŉ')|upper %}")),
        ("split", grow("{% set ns.l = (ns.x * 1000).split('') %}")),
        (
            "split and keep",
            grow("{% set ns.l = ns.l + ['a a a a a a a a a a' .split(' ')] %}"),
        ),
        (
            "list of text",
            grow("{% set ns.l = (ns.x * 1000)|list + ns.l %}"),
        ),
        (
            "items",
            grow("{% set ns.l = ({'a': ns.l}|items|list) + ns.l %}"),
        ),
        (
            "map",
            grow("{% set ns.l = ns.l|map('string')|list + ns.l %}"),
        ),
        (
            "sort",
            grow("{% set ns.l = (ns.l + ns.l)|sort|unique|list + ns.l %}"),
        ),
        (
            "a long slice",
            grow("{% set ns.l = (ns.x * 1000)[::-1] %}{% set ns.x = ns.l ~ ns.x %}"),
        ),
        ("repetition", "{{ 'x' * 10**9 }}".into()),
        (
            "repetition of a list",
            "{{ ([0] * 1000 * 1000 * 1000)|length }}".into(),
        ),
        ("powers", "{{ 10 ** 10 ** 10 }}".into()),
        ("powers in a loop", grow("{% set ns.x = 9 ** 99 %}")),
        ("a huge range", "{{ range(10 ** 12)|list|length }}".into()),
        (
            "huge ranges",
            "{% for i in range(9999) %}{{ range(9999)|list|length }}{% endfor %}".into(),
        ),
        (
            "kept ranges",
            grow("{% set ns.l = ns.l + [range(9999)|list] %}"),
        ),
        ("nested loops", nested("")),
        ("nested loops that write", nested("x")),
        ("nested loops that write much", nested(&"x".repeat(50_000))),
        ("nested loops that compute", nested("{% set a = 1 + 1 %}")),
        ("nested loops that print", nested("{{ 'abc' * 1000 }}")),
        (
            "a macro that calls itself",
            "{% macro m(a) %}{{ m(a) }}{{ m(a) }}{% endmacro %}{{ m(1) }}".into(),
        ),
        (
            "a recursive loop",
            "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        ),
        (
            "macros that double",
            each(60, |i| {
                format!(
                    "{{% macro m{}() %}}{{{{ m{i}() }}}}{{{{ m{i}() }}}}{{% endmacro %}}",
                    i + 1
                )
            }) + "{% macro m0() %}x{% endmacro %}{{ m60() }}",
        ),
        (
            "wide indentation",
            "{{ 'x\\ny'|indent(10 ** 9, true) }}".into(),
        ),
        (
            "wide indentations",
            "{% for i in range(9999) %}{{ ('x\\n' * 1000)|indent(1000) }}{% endfor %}".into(),
        ),
        ("wide JSON", "{{ [[[[1]]]]|tojson(indent=10 ** 9) }}".into()),
        (
            "deep JSON",
            format!(
                "{{{{ {}1{}|tojson(indent=64) }}}}",
                "[".repeat(90),
                "]".repeat(90)
            ),
        ),
        ("format", "{{ '%1000000000d' % 1 }}".into()),
        (
            "format of a method",
            "{{ '{:>1000000000}'.format(1) }}".into(),
        ),
        (
            "format of many",
            "{{ ('{0}' * 1000).format('x' * 1000) }}".into(),
        ),
        ("ljust", "{{ 'x'.ljust(10 ** 9) }}".into()),
        ("center", "{{ 'x'|center(10 ** 9) }}".into()),
        ("zfill", "{{ 'x'.zfill(10 ** 9) }}".into()),
        ("expandtabs", "{{ '\\t'.expandtabs(10 ** 9) }}".into()),
        ("batch", "{{ [1]|batch(10 ** 9, 0)|list }}".into()),
        ("slice", "{{ [1]|slice(10 ** 9)|list }}".into()),
        ("wordwrap", "{{ ('x ' * 1000)|wordwrap(1) }}".into()),
        ("lipsum", "{{ lipsum(10 ** 6) }}".into()),
        (
            "cycler",
            "{% set c = cycler('a') %}{% for i in range(9999) %}{{ c.next() }}{% endfor %}".into(),
        ),
        (
            "a date",
            format!("{{{{ strftime_now('{}') }}}}", "%A".repeat(20_000)),
        ),
        (
            "many dates",
            "{% for i in range(9999) %}{{ strftime_now('%A' * 1000) }}{% endfor %}".into(),
        ),
        ("an include", "{% include '/etc/passwd' %}".into()),
        ("an import", "{% import '/etc/passwd' as p %}{{ p }}".into()),
        ("a parent", "{% extends '/etc/passwd' %}".into()),
        ("a file", "{{ open('/etc/passwd').read() }}".into()),
        (
            "dunders",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}".into(),
        ),
        (
            "brackets",
            format!("{{{{ {}1{} }}}}", "(".repeat(30_000), ")".repeat(30_000)),
        ),
        ("conditions", "{% if 1 %}".repeat(6_000)),
        ("nots", format!("{{{{ {}1 }}}}", "not ".repeat(16_000))),
        ("signs", format!("{{{{ {}1 }}}}", "-".repeat(60_000))),
        (
            "a chain of names",
            format!("{{{{ a{} }}}}", ".a".repeat(30_000)),
        ),
        (
            "a chain of calls",
            format!("{{{{ a{} }}}}", "()".repeat(30_000)),
        ),
        (
            "a chain of choices",
            format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(5_000)),
        ),
        ("tags", "{{1}}".repeat(13_000)),
        ("sets", "{%set a=1%}".repeat(5_900)),
        (
            "blocks",
            each(3000, |i| format!("{{% block b{i} %}}{{% endblock %}}")),
        ),
        (
            "a long list",
            format!(
                "{{% for i in range(9999) %}}{{% set a = [{}] %}}{{% endfor %}}",
                "1,".repeat(30_000)
            ),
        ),
        (
            "long lists kept",
            grow(&format!(
                "{{% set ns.l = ns.l + [[{}]] %}}",
                "1,".repeat(900)
            )),
        ),
        (
            "a long literal",
            format!(
                "{{% for i in range(9999) %}}{{% set a = '{}' %}}{{% endfor %}}",
                "x".repeat(60_000)
            ),
        ),
        (
            "long literals kept",
            grow(&format!(
                "{{% set ns.l = ns.l + ['{}'] %}}",
                "x".repeat(60_000)
            )),
        ),
        (
            "comparing what shares",
            format!(
                "{}{{{{ a == a }}}}{}",
                "{% with a = [a, a] %}".repeat(60),
                "{% endwith %}".repeat(60)
            ),
        ),
        (
            "searching what shares",
            format!(
                "{}{{{{ 5 in a }}}}{}",
                "{% with a = [a, a] %}".repeat(60),
                "{% endwith %}".repeat(60)
            ),
        ),
        (
            "sorting what shares",
            format!(
                "{}{{{{ [a, a, a]|sort }}}}{}",
                "{% with a = [a, a] %}".repeat(60),
                "{% endwith %}".repeat(60)
            ),
        ),
        (
            "hashing what shares",
            format!(
                "{}{{{{ [a, a]|unique|list }}}}{}",
                "{% with a = [a, a] %}".repeat(60),
                "{% endwith %}".repeat(60)
            ),
        ),
    ]
}

#[test]
fn hostile_templates_end_soon_and_small() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let context = json!({"a": 1, "messages": [{"role": "user", "content": "x"}]});
    let mut bad = Vec::new();
    for (what, source) in hostile_templates() {
        let run = || template::render(what, &source, &context, Date::default());
        let (out, cost) = measured(run);
        let said = match &out {
            Ok(Ok(text)) => format!("{} bytes", text.len()),
            Ok(Err(e)) => e.to_string(),
            Err(()) => "PANIC".to_owned(),
        };
        eprintln!(
            "{what}: {:?}, {} MiB: {said:.100}",
            cost.time,
            cost.bytes >> 20
        );
        if out.is_err() || cost.time > PATIENCE || cost.bytes > MEMORY {
            bad.push(what);
        }
    }
    assert!(bad.is_empty(), "beyond the bounds: {bad:?}");
}
