//! Passes that are recorded ahead: nothing of a run depends on whether they are.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "common/adapter.rs"]
mod adapter;

use std::path::Path;
use std::sync::Arc;

use hogwild::cache::layout::{Layout, View};
use hogwild::cache::pages::BlockId;
use hogwild::cache::plan::{Batch, Logits, Turn};
use hogwild::demo::{self, Problem};
use hogwild::device::{DType, Device};
use hogwild::model::{Engine, Model, ModelFiles, Wanted};
use hogwild::protocol::{
    HEADER_OTHERS, HEADER_OWN, JOINING_WORDS, OPENING_WORDS, Opening, Problem as Asked, Protocol,
    Rules, default_names, opening_words,
};
use hogwild::sampler::Sampling;
use hogwild::session::{
    Command, Event, Log, ModelName, Raw, Reason, RulesName, Session, Settings, replay,
};
use hogwild::text::Date;
use hogwild::text::Text;

const LAYOUTS: [Layout; 3] = [Layout::Combined, Layout::Contiguous, Layout::Interleaved];
const PROMPT: &str = "<|bos|>user\nwhat is 5 + 7?<|eos|>\n<|bos|>assistant\n";

/// A model of two layers that ends a step every few tokens.
struct Tiny {
    model: Arc<Model>,
    text: Arc<Text>,
}

impl Tiny {
    fn load(device: Device) -> Self {
        let dir = Path::new("tests/golden/e2e_reference_loop/model");
        let files = ModelFiles::open(dir).unwrap();
        let model = Model::load(Arc::new(device), &files, 1024, &mut |_| {}).unwrap();
        Self {
            model: Arc::new(model),
            text: Arc::new(Text::load(dir).unwrap()),
        }
    }

    fn protocol(&self, n: usize) -> Protocol {
        let names = default_names(n);
        let first = |i| if i == 0 { OPENING_WORDS } else { JOINING_WORDS };
        let words: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, name)| opening_words(name, first(i)))
            .collect();
        let opening =
            Opening::from_texts(&self.text, PROMPT, HEADER_OTHERS, HEADER_OWN, &words).unwrap();
        Protocol::with_opening(self.text.clone(), rules(), &names, opening).unwrap()
    }

    /// The log of a whole run as bytes, its reason to end, and how many passes were recorded ahead.
    fn log(&self, case: &Case, is_ahead: bool) -> (Vec<u8>, Reason, u64) {
        let mut engine = case.settings.engine(self.model.clone(), false).unwrap();
        engine.set_ahead(is_ahead);
        let protocol = self.protocol(case.n_workers);
        let mut session = Session::new(engine, protocol, case.settings.clone()).unwrap();
        play(&mut session, &case.script)
    }
}

struct Case {
    settings: Settings,
    n_workers: usize,
    script: Vec<(u64, Vec<Command>)>,
}

fn rules() -> Rules {
    Rules {
        check_every: 40,
        ..Rules::main()
    }
}

fn settings(layout: Layout, max_passes: u64, context: usize) -> Settings {
    Settings {
        layout,
        max_passes,
        context,
        kv_dtype: "f32".to_owned(),
        early_answer: true,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 7,
        vocab_limit: None,
    }
}

fn sampled(settings: Settings) -> Settings {
    Settings {
        temperature: 0.8,
        top_k: 30,
        top_p: 0.95,
        min_p: 0.02,
        ..settings
    }
}

/// Plays a session to its end; commands are given before the pass of their number.
fn play(session: &mut Session, script: &[(u64, Vec<Command>)]) -> (Vec<u8>, Reason, u64) {
    let name = ModelName {
        directory: "a model".to_owned(),
        hash: "0".to_owned(),
    };
    let header = session.header(name, RulesName::new("main", &rules()));
    let mut bytes = Vec::new();
    let mut log = Log::new(&mut bytes, &header).unwrap();
    let mut script = script.iter().peekable();
    let mut last = None;
    while !session.is_over() {
        let now = script.next_if(|(pass, _)| *pass == session.passes());
        let before = session.usage();
        let events = session
            .step(now.map_or(&[], |(_, commands)| commands))
            .unwrap();
        assert!(!events.is_empty(), "something happens");
        assert!(
            session.is_over() || session.usage().tokens >= before.tokens,
            "tokens stay"
        );
        log.append(&events).unwrap();
        last = events.last().cloned();
    }
    assert!(script.next().is_none(), "every command was given");
    let Some(Event::Finish { reason, .. }) = last else {
        panic!("the last event is {last:?}")
    };
    (bytes, reason, session.engine().n_ahead())
}

fn commands() -> Vec<(u64, Vec<Command>)> {
    let feed = |worker, text: &str| Command::Feed {
        worker,
        text: text.to_owned(),
    };
    let join = |name: &str| Command::Join {
        name: name.to_owned(),
    };
    vec![
        (2, vec![join("Carol")]),
        (5, vec![Command::Hold { worker: 0 }]),
        (9, vec![feed(1, " wait, 5 + 7 is 12.")]),
        (12, vec![Command::Resume { worker: 0 }, feed(0, " yes")]),
        (14, vec![Command::Hold { worker: 1 }]),
        (15, vec![Command::Resume { worker: 1 }]),
        (20, vec![Command::Retire { worker: 1 }, join("Dave")]),
        (26, vec![Command::Finish]),
    ]
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    for (layout, n_workers) in LAYOUTS.into_iter().cycle().zip(1..=4) {
        let roomy = settings(layout, 30, 1024);
        out.push(Case {
            settings: roomy.clone(),
            n_workers,
            script: Vec::new(),
        });
        out.push(Case {
            settings: sampled(roomy),
            n_workers,
            script: Vec::new(),
        });
        // Ends because the context is full.
        out.push(Case {
            settings: sampled(settings(layout, 1000, 420)),
            n_workers,
            script: Vec::new(),
        });
    }
    for layout in LAYOUTS {
        out.push(Case {
            settings: sampled(settings(layout, 100, 1024)),
            n_workers: 2,
            script: commands(),
        });
    }
    for max_passes in [0, 1, 2] {
        out.push(Case {
            settings: settings(Layout::Combined, max_passes, 1024),
            n_workers: 2,
            script: Vec::new(),
        });
    }
    out
}

/// Every case, or every second one, with and without.
fn logs_are_the_same(device: Device, step: usize) {
    let tiny = Tiny::load(device);
    let mut reasons = Vec::new();
    for (i, case) in cases().iter().enumerate().step_by(step) {
        let (with, reason, ahead) = tiny.log(case, true);
        let (without, _, never) = tiny.log(case, false);
        assert!(
            with == without,
            "case {i}: with\n{}\nwithout\n{}",
            String::from_utf8_lossy(&with),
            String::from_utf8_lossy(&without)
        );
        assert_eq!(never, 0, "case {i}: nothing was recorded ahead");
        let long = case.settings.max_passes > 10;
        assert!(ahead > 0 || !long, "case {i}: something was recorded ahead");
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    for reason in [Reason::Budget, Reason::Context, Reason::Asked] {
        assert!(reasons.contains(&reason), "only {reasons:?}");
    }
}

#[test]
fn logs_of_the_cpu_are_the_same_with_and_without() {
    logs_are_the_same(Device::cpu(), 1);
}

#[test]
fn logs_of_the_adapter_are_the_same_with_and_without() {
    if let Some(device) = adapter::adapter() {
        logs_are_the_same(device, 2);
    }
}

#[test]
fn a_run_that_was_recorded_ahead_is_replayed() {
    for device in adapter::devices() {
        let tiny = Tiny::load(device);
        let case = &cases()[13];
        assert!(!case.script.is_empty(), "a case with commands");
        let (log, ..) = tiny.log(case, true);
        let path = std::env::temp_dir().join(format!("hogwild-ahead-{}.jsonl", std::process::id()));
        std::fs::write(&path, log).unwrap();
        let (header, events) = hogwild::session::read_log(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (model, text) = (tiny.model.clone(), tiny.text.clone());
        let replayed = replay(&header, &events, model, text, false, &mut |_| Ok(())).unwrap();
        assert_eq!(replayed.difference, None, "the same again");
        assert!(replayed.tokens > 20, "{} tokens", replayed.tokens);
    }
}

#[test]
fn a_continued_text_is_the_same_with_and_without() {
    for device in adapter::devices() {
        let tiny = Tiny::load(device);
        for (max_passes, context) in [(25, 1024), (1000, 60), (1, 1024)] {
            let settings = sampled(settings(Layout::Combined, max_passes, context));
            let run = |is_ahead| {
                let mut engine = settings.engine(tiny.model.clone(), false).unwrap();
                engine.set_ahead(is_ahead);
                let prompt = (5..45).collect();
                let mut raw = Raw::new(engine, settings.clone(), prompt, vec![]).unwrap();
                let mut events = Vec::new();
                while !raw.is_over() {
                    events.extend(raw.step(&tiny.text).unwrap());
                }
                events
            };
            assert_eq!(
                run(true),
                run(false),
                "{max_passes} passes, {context} tokens"
            );
        }
    }
}

/// The built-in model solves a problem with one to four workers, one of whom comes late.
#[test]
fn the_built_in_model_writes_the_same_with_and_without() {
    let model = Model::load(
        Arc::new(Device::cpu()),
        &demo::files().unwrap(),
        1500,
        &mut |_| {},
    );
    let (model, text) = (Arc::new(model.unwrap()), Arc::new(demo::text().unwrap()));
    let style = demo::style().unwrap();
    let problem = Problem::random(3, 6).to_string();
    let asked = Asked {
        text: &problem,
        style: &style,
        thinking: None,
        today: Date::default(),
    };
    let names = ["Alice", "Bob", "Carol", "Dave"];
    for n_workers in 1..=4 {
        let settings = Settings {
            early_answer: false,
            ..settings(Layout::Combined, 400, 1500)
        };
        let script: Vec<_> = (n_workers < 4)
            .then(|| {
                let name = names[n_workers].to_owned();
                (11, vec![Command::Join { name }])
            })
            .into_iter()
            .collect();
        let run = |is_ahead| {
            let names = &names[..n_workers];
            let protocol = Protocol::open(text.clone(), demo::rules(), names, &asked).unwrap();
            let mut engine = settings.engine(model.clone(), false).unwrap();
            engine.set_ahead(is_ahead);
            let mut session = Session::new(engine, protocol, settings.clone()).unwrap();
            play(&mut session, &script)
        };
        let ((with, reason, ahead), (without, ..)) = (run(true), run(false));
        assert!(with == without, "{n_workers} workers");
        assert_eq!(reason, Reason::Answer, "{n_workers} workers finish");
        assert!(ahead > 20, "only {ahead} passes were recorded ahead");
    }
}

fn turn(view: &[BlockId], tokens: &[u32]) -> Turn {
    Turn {
        view: View(view.to_vec()),
        tokens: tokens.to_vec(),
        logits: Logits::Last,
    }
}

fn wanted(turns: Vec<Turn>) -> Wanted {
    let draws = vec![0; turns.len()];
    Wanted::new(Batch { turns }, draws)
}

/// Whatever was guessed or started, the next pass is as if nothing had been.
#[test]
fn a_wrong_guess_leaves_no_trace() {
    for device in adapter::devices() {
        let tiny = Tiny::load(device);
        let rule = Sampling::greedy().rule();
        let new = |is_ahead| {
            let mut engine = Engine::new(tiny.model.clone(), DType::F32, 24, false).unwrap();
            engine.set_ahead(is_ahead);
            engine.choose_by(rule, &[]).unwrap();
            let blocks = [engine.cache.pages.open(), engine.cache.pages.open()];
            for (i, block) in (0u32..).zip(blocks) {
                let tokens: Vec<u32> = (0..15 + 16 * i).map(|t| 7 + t * 3).collect();
                engine.prefill(block, &tokens, Logits::None).unwrap();
            }
            (engine, blocks)
        };
        let (mut ahead, [a, b]) = new(true);
        let (mut plain, _) = new(false);
        let guesses = |n: usize| {
            let both = wanted(vec![turn(&[b, a], &[0]), turn(&[a, b], &[0])]);
            let one = wanted(vec![turn(&[a, b], &[0])]);
            // More than the pages hold.
            let huge = wanted(vec![turn(&[a], &vec![0; 1000])]);
            [both, one, huge][n % 3].clone()
        };
        for n in 0..12u32 {
            let now = if n % 4 == 3 {
                wanted(vec![turn(&[a, b], &[20 + n, 21])])
            } else {
                let turns = vec![turn(&[b, a], &[30 + n]), turn(&[a, b], &[40 + n])];
                wanted(turns)
            };
            let want = plain.choose(&now, None).unwrap();
            let got = ahead.choose(&now, Some(guesses(n as usize))).unwrap();
            assert_eq!(got, want, "pass {n}");
            assert_eq!(ahead.cache.pages, plain.cache.pages, "pass {n}: the pages");
            // Started with tokens that are then not the ones.
            let started = ahead.start(&wanted(vec![
                turn(&[b, a], &[100 + n]),
                turn(&[a, b], &[200 + n]),
            ]));
            assert_eq!(started, n % 3 == 0, "pass {n}: it starts if it was guessed");
            assert_eq!(ahead.cache.pages, plain.cache.pages, "pass {n}: the pages");
        }
        // Each of the passes above was fed other tokens than the one started before it.
        assert_eq!(
            (ahead.n_ahead(), plain.n_ahead()),
            (0, 0),
            "no guess was right"
        );
        // A guess is of no use where the blocks have changed since.
        let one = guesses(1);
        for (engine, guess) in [(&mut ahead, Some(one.clone())), (&mut plain, None)] {
            engine.choose(&one, guess).unwrap();
            let len = engine.cache.pages.len(b);
            engine.cache.pages.truncate(b, len - 3);
        }
        let [got, want] = [&mut ahead, &mut plain].map(|e| e.choose(&one, None).unwrap());
        assert_eq!((got, ahead.n_ahead()), (want, 0), "other blocks");
        // A token that the model does not have is refused, guessed or not.
        ahead.choose(&one, Some(one.clone())).unwrap();
        let bad = wanted(vec![turn(&[a, b], &[1 << 20])]);
        assert!(!ahead.start(&bad), "not a token");
        ahead.choose(&bad, None).expect_err("not a token");
        // And a right guess is taken.
        ahead.choose(&one, Some(one.clone())).unwrap();
        let got = ahead.choose(&one, None).unwrap();
        for _ in 0..2 {
            plain.choose(&one, None).unwrap();
        }
        assert_eq!(got, plain.choose(&one, None).unwrap(), "the same token");
        assert_eq!(ahead.n_ahead(), 1, "one guess was right");
    }
}
