//! Sessions from their opening to their end: golden runs, commands, logs, limits.
//!
//! Three opinions meet here: the session, the published loop's own run, and the textbook transformer,
//! which follows a log with views of its own making and says whether every chosen token was its choice.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "common/adapter.rs"]
mod adapter;
mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::golden::{self, HogwildCase, Script};
use common::textbook::{Row as Seen, Textbook};
use common::tiny::TinyModel;
use hogwild::cache::layout::Layout;
use hogwild::cache::plan::Logits;
use hogwild::device::{DType, Device};
use hogwild::model::{Engine, Model, ModelFiles};
use hogwild::protocol::{
    HEADER_OTHERS, HEADER_OWN, JOINING_WORDS, OPENING_WORDS, Opening, Protocol, Rules,
    default_names, opening_words,
};
use hogwild::session::{
    Command, Event, FORMAT, Header, Log, ModelName, OpeningIds, Raw, Reason, Replayed, RulesName,
    Session, Settings, Words, read_log, replay,
};
use hogwild::text::Text;
use hogwild::{Error, Result, TokenId};

const LAYOUTS: [Layout; 3] = [Layout::Combined, Layout::Contiguous, Layout::Interleaved];
const PROMPT: &str = "<|bos|>user\nwhat is 5 + 7?<|eos|>\n<|bos|>assistant\n";

/// A model with its tokenizer.
struct Subject {
    dir: PathBuf,
    model: Arc<Model>,
    text: Arc<Text>,
}

impl Subject {
    fn load(device: Device, dir: &Path, n_positions: usize) -> Self {
        let files = ModelFiles::open(dir).unwrap();
        let model = Model::load(Arc::new(device), &files, n_positions, &mut |_| {}).unwrap();
        Self {
            dir: dir.to_owned(),
            model: Arc::new(model),
            text: Arc::new(Text::load(dir).unwrap()),
        }
    }

    /// The model of the golden run: two layers, 485 tokens, ends a step every few tokens.
    fn golden(device: Device) -> Self {
        Self::load(
            device,
            Path::new("tests/golden/e2e_reference_loop/model"),
            2048,
        )
    }

    fn protocol(&self, rules: Rules, n: usize) -> Result<Protocol> {
        let names = default_names(n);
        let words: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                opening_words(name, if i == 0 { OPENING_WORDS } else { JOINING_WORDS })
            })
            .collect();
        let opening = Opening::from_texts(&self.text, PROMPT, HEADER_OTHERS, HEADER_OWN, &words)?;
        Protocol::with_opening(Arc::clone(&self.text), rules, &names, opening)
    }

    fn session(&self, settings: &Settings, rules: Rules, n: usize) -> Result<Session> {
        let engine = settings.engine(Arc::clone(&self.model), false)?;
        Session::new(engine, self.protocol(rules, n)?, settings.clone())
    }

    /// A whole run under the rules `main`; commands are given before the pass of their number.
    fn run(
        &self,
        settings: &Settings,
        n: usize,
        script: &[(u64, Vec<Command>)],
    ) -> (Header, Vec<Event>) {
        let mut session = self.session(settings, rules(), n).unwrap();
        let header = session.header(name(), RulesName::new("main", &rules()));
        let events = play(&mut session, script);
        (header, events)
    }

    fn replay(&self, header: &Header, events: &[Event]) -> Result<Replayed> {
        let (model, text) = (Arc::clone(&self.model), Arc::clone(&self.text));
        replay(header, events, model, text, false, &mut |_| Ok(()))
    }
}

fn name() -> ModelName {
    ModelName {
        directory: "golden".to_owned(),
        hash: "0".to_owned(),
    }
}

fn rules() -> Rules {
    Rules {
        check_every: 40,
        ..Rules::main()
    }
}

fn greedy(max_passes: u64) -> Settings {
    Settings {
        layout: Layout::Combined,
        max_passes,
        context: 1024,
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

fn sampled(max_passes: u64) -> Settings {
    Settings {
        temperature: 0.8,
        top_p: 0.95,
        ..greedy(max_passes)
    }
}

/// Runs a session to its end, or until nothing happens any more.
fn play(session: &mut Session, script: &[(u64, Vec<Command>)]) -> Vec<Event> {
    let mut script = script.iter().peekable();
    let mut events = Vec::new();
    while !session.is_over() {
        let now = script.next_if(|(pass, _)| *pass == session.passes());
        let new = session
            .step(now.map_or(&[], |(_, commands)| commands))
            .unwrap();
        if new.is_empty() {
            break;
        }
        events.extend(new);
    }
    assert!(script.next().is_none(), "every command was given");
    events
}

fn feed(worker: usize, text: &str) -> Command {
    let text = text.to_owned();
    Command::Feed { worker, text }
}

fn join(name: &str) -> Command {
    let name = name.to_owned();
    Command::Join { name }
}

/// What each worker chose, in order.
fn tokens_of(events: &[Event], me: usize) -> Vec<(u64, TokenId)> {
    let chosen = |event: &Event| match *event {
        Event::Token {
            pass, worker, id, ..
        } if worker == me => Some((pass, id)),
        _ => None,
    };
    events.iter().filter_map(chosen).collect()
}

/// Rows of a worker: pass, block, first, ids.
fn rows_of(events: &[Event], me: usize) -> Vec<(u64, u32, usize, Vec<TokenId>)> {
    let mut rows = Vec::new();
    for event in events {
        if let Event::Pass { pass, rows: all } = event {
            let mine = all.iter().filter(|row| row.worker == me);
            rows.extend(mine.map(|row| (*pass, row.block, row.first, row.ids.clone())));
        }
    }
    rows
}

fn ending(events: &[Event]) -> (Reason, Option<&str>) {
    match events.last() {
        Some(Event::Finish { reason, answer, .. }) => (*reason, answer.as_deref()),
        other => panic!("the last event is {other:?}"),
    }
}

fn has_finisher(events: &[Event]) -> bool {
    events.iter().any(|e| matches!(e, Event::Finisher { .. }))
}

/// How the textbook is to see a run.
#[derive(Clone, Copy, Debug)]
struct Eyes {
    layout: Layout,
    /// A worker whose unfinished step the others are not shown, from which pass on.
    blind: Option<(usize, u64)>,
}

impl From<Layout> for Eyes {
    fn from(layout: Layout) -> Self {
        Self {
            layout,
            blind: None,
        }
    }
}

/// The first token that the textbook would not have chosen.
#[derive(Debug)]
#[expect(dead_code, reason = "it is printed")]
struct Disagrees {
    pass: u64,
    worker: usize,
    chose: TokenId,
    textbook: TokenId,
    /// How much better the textbook's choice is.
    gap: f32,
}

/// Follows a log with the textbook: every chosen token must be what the layout's views make of it.
///
/// Returns how many tokens were checked.
fn textbook_agrees(
    subject: &Subject,
    header: &Header,
    events: &[Event],
    eyes: Eyes,
) -> Result<usize, Disagrees> {
    let mut book = Textbook::load(&subject.dir).unwrap();
    let sampling = header.settings.sampling();
    let suppressed = subject.protocol(rules(), 1).unwrap().suppressed().to_vec();
    let mut blocks: HashMap<u32, Vec<usize>> = HashMap::new();
    let (mut history, mut headers) = (Vec::new(), Vec::new());
    let mut own: BTreeMap<usize, u32> = BTreeMap::new();
    let mut logits: HashMap<usize, Vec<f32>> = HashMap::new();
    let mut checked = 0;
    let o = &header.opening;
    let mut parts = [&o.prompt, &o.header_others, &o.header_own].into_iter();
    for event in events {
        match event {
            Event::Prefill { block, tokens } => {
                let ids = parts.next().unwrap().clone();
                assert_eq!(*tokens, ids.len(), "tokens of a prefill");
                let numbers: Vec<_> = (book.len()..book.len() + ids.len()).collect();
                book.forward(&[Seen::new(ids, numbers.clone())]);
                blocks.insert(*block, numbers);
                if history.is_empty() {
                    history.push(*block);
                } else {
                    headers.push(*block);
                }
            }
            Event::Pass { pass, rows } => {
                let mut next = book.len();
                for row in rows {
                    let block = blocks.entry(row.block).or_default();
                    // A resumed worker's last token may be fed once more.
                    assert!(block.len() - row.first <= 1, "tokens stay where they are");
                    block.truncate(row.first);
                    block.extend(next..next + row.ids.len());
                    next += row.ids.len();
                    own.insert(row.worker, row.block);
                }
                let seen = rows.iter().map(|row| {
                    let mut view = history.clone();
                    let unseen = eyes.blind.filter(|(_, from)| pass >= from).map(|(w, _)| w);
                    let others = own
                        .iter()
                        .filter(|(w, _)| **w != row.worker && unseen != Some(**w))
                        .map(|(_, b)| *b);
                    match eyes.layout {
                        Layout::Combined => {
                            view.push(headers[0]);
                            view.extend(others);
                        }
                        Layout::Contiguous => view.extend(others),
                        Layout::Interleaved => {}
                    }
                    view.extend([headers[1], row.block]);
                    let view = view.iter().flat_map(|b| blocks[b].iter().copied());
                    Seen::new(row.ids.clone(), view)
                });
                let seen: Vec<_> = seen.collect();
                let all = book.forward(&seen);
                logits.clear();
                for (row, all) in rows.iter().zip(all) {
                    #[expect(clippy::cast_possible_truncation, reason = "the sampler takes f32")]
                    let last = all.last().unwrap().iter().map(|&l| l as f32).collect();
                    logits.insert(row.worker, last);
                }
            }
            Event::Token {
                pass, worker, id, ..
            } => {
                let logits = &logits[worker];
                let want = sampling
                    .sample(logits, &suppressed, *worker, *pass)
                    .unwrap();
                let gap = logits[want as usize] - logits[*id as usize];
                if want != *id && (sampling.temperature > 0.0 || gap.abs() > 1e-4) {
                    return Err(Disagrees {
                        pass: *pass,
                        worker: *worker,
                        chose: *id,
                        textbook: want,
                        gap,
                    });
                }
                checked += 1;
            }
            Event::StepClosed {
                worker,
                block: Some(block),
                ..
            } => {
                assert_eq!(own.remove(worker), Some(*block), "the worker's own block");
                history.push(*block);
            }
            _ => {}
        }
    }
    Ok(checked)
}

/// The textbook agrees, and would not if a worker's words were hidden from pass `from` on; returns the
/// pass in which it notices.
fn check_visible(
    subject: &Subject,
    header: &Header,
    events: &[Event],
    (of, from): (usize, u64),
) -> u64 {
    let mut eyes = Eyes::from(header.settings.layout);
    let n = textbook_agrees(subject, header, events, eyes).unwrap();
    assert!(n > 20, "enough to mean something: {n}");
    eyes.blind = Some((of, from));
    let disagrees = textbook_agrees(subject, header, events, eyes).unwrap_err();
    eprintln!("{n} tokens agree; blind to {of} from {from} on: {disagrees:?}");
    disagrees.pass
}

// The golden run.

fn golden_runs() -> Vec<(PathBuf, String, HogwildCase)> {
    let cases = golden::cases(&golden::dir()).into_iter();
    let runs = cases.filter_map(|case| match &case.script {
        Script::Hogwild(run) if run.extra.contains_key("states") => {
            Some((case.model_dir(), case.name.clone(), run.clone()))
        }
        _ => None,
    });
    runs.collect()
}

fn ids(value: &serde_json::Value) -> Vec<TokenId> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A session of this budget says what the published loop's run said up to there.
#[allow(
    clippy::too_many_lines,
    reason = "one run, told from its opening to its end"
)]
fn agrees_with_run(subject: &Subject, run: &HogwildCase, budget: u64) {
    let (settings, texts) = (&run.extra["settings"], &run.extra["texts"]);
    let number = |key: &str| usize::try_from(settings[key].as_u64().unwrap()).unwrap();
    let rules = Rules {
        check_every: number("insert_s1_collab_message_every_tokens"),
        finisher_tokens: number("finisher_max_new_tokens"),
        ..Rules::main()
    };
    let words: Vec<String> = serde_json::from_value(texts["worker_prompts"].clone()).unwrap();
    let string = |key: &str| texts[key].as_str().unwrap();
    let opening = Opening::from_texts(
        &subject.text,
        string("full_prompt"),
        string("current_step_header"),
        string("current_worker_header"),
        &words,
    )
    .unwrap();
    let names = default_names(words.len());
    let text = Arc::clone(&subject.text);
    let protocol = Protocol::with_opening(text, rules, &names, opening).unwrap();
    let settings = Settings {
        context: 2048,
        ..greedy(budget)
    };
    let engine = settings.engine(Arc::clone(&subject.model), false).unwrap();
    let mut session = Session::new(engine, protocol, settings).unwrap();
    let events = play(&mut session, &[]);

    let mut events = events
        .iter()
        .filter(|e| !matches!(e, Event::Inserted { .. }));
    let mut block_len = vec![0; words.len()];
    let mut pass = 0;
    for want in &run.events {
        match want {
            golden::Event::Note {} | golden::Event::Move(_) => {}
            golden::Event::Forward(forward) if forward.kind == "prefill" => {
                let Some(Event::Prefill { tokens, .. }) = events.next() else {
                    panic!("forward {} is a prefill", forward.index)
                };
                assert_eq!(*tokens, forward.rows[0].tokens.len(), "prefilled tokens");
            }
            golden::Event::Forward(forward) => {
                if pass == budget {
                    break;
                }
                let Some(Event::Pass { pass: at, rows }) = events.next() else {
                    panic!("forward {} is a pass", forward.index)
                };
                assert_eq!(*at, pass, "passes are counted from 0");
                assert_eq!(rows.len(), forward.rows.len(), "everybody writes");
                for (row, want) in rows.iter().zip(&forward.rows) {
                    assert_eq!(Some(row.worker), want.worker, "pass {pass}");
                    assert_eq!(row.ids, want.tokens, "pass {pass}, worker {}", row.worker);
                    assert_eq!(row.first, block_len[row.worker], "pass {pass}");
                    block_len[row.worker] += row.ids.len();
                }
                let mut closed = Vec::new();
                for (me, &chosen) in forward.chosen_tokens.as_ref().unwrap().iter().enumerate() {
                    let Some(Event::Token { worker, id, .. }) = events.next() else {
                        panic!("worker {me} chooses in pass {pass}")
                    };
                    assert_eq!((*worker, *id), (me, chosen), "pass {pass}");
                    let mut ahead = events.clone();
                    if let Some(Event::StepClosed { worker, .. }) = ahead.next() {
                        closed.push((*worker, block_len[me]));
                        block_len[me] = 0;
                        events = ahead;
                    }
                }
                let moves = run.events.iter().skip_while(
                    |e| !matches!(e, golden::Event::Forward(f) if f.index == forward.index),
                );
                let moves = moves.skip(1).map_while(|e| match e {
                    golden::Event::Move(step) => Some((step.worker.unwrap(), step.n_tokens)),
                    _ => None,
                });
                assert_eq!(
                    closed,
                    moves.collect::<Vec<_>>(),
                    "steps closed in pass {pass}"
                );
                pass += 1;
            }
        }
    }
    assert_eq!(
        (pass, session.passes()),
        (budget, budget),
        "the whole budget"
    );

    let key = budget.to_string();
    let state = &run.extra["states"][&key];
    let snapshot = session.protocol().snapshot();
    assert_eq!(
        snapshot.history,
        ids(&state["history"]),
        "history at {budget}"
    );
    for (me, current) in snapshot.current.iter().enumerate() {
        let want = ids(&state["current_step_tokens_by_worker"][me]);
        assert_eq!(*current, want, "step of {me} at {budget}");
    }
    assert_eq!(
        Some(snapshot.finished),
        state["finished"].as_bool(),
        "{budget}"
    );
    let want = &run.extra["finisher_responses"][&key];
    let mut whole = session.protocol().flat_text();
    if want["used_finisher"] == true {
        let Some(Event::Finisher { text, .. }) = events.next() else {
            panic!("the early answer at {budget}")
        };
        whole.push_str(&session.protocol().rules().finisher);
        whole.push_str(text);
    }
    assert_eq!(
        Some(whole.as_str()),
        want["text"].as_str(),
        "text at {budget}"
    );
    let Some(Event::Finish { reason, answer, .. }) = events.next() else {
        panic!("the end at {budget}")
    };
    assert_eq!(*reason, Reason::Budget, "the end at {budget}");
    let answer = answer.as_ref().and_then(|a| a.trim().parse::<f64>().ok());
    assert_eq!(
        answer,
        want["final_answer"].as_f64(),
        "the answer at {budget}"
    );
    assert!(events.next().is_none(), "nothing after the end");
}

fn golden_budgets(run: &HogwildCase) -> Vec<u64> {
    let budgets = run.extra["settings"]["save_on_steps"].clone();
    serde_json::from_value(budgets).unwrap()
}

#[test]
fn a_session_says_what_the_published_loop_said() {
    let runs = golden_runs();
    for (dir, name, run) in &runs {
        let subject = Subject::load(Device::cpu(), dir, 2048);
        for budget in golden_budgets(run) {
            agrees_with_run(&subject, run, budget);
        }
        eprintln!("{name}: all budgets agree");
    }
    assert!(!runs.is_empty(), "a golden run");
}

#[test]
fn a_session_on_the_adapter_says_what_the_published_loop_said() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let device = Arc::new(device);
    for (dir, _, run) in golden_runs() {
        let files = ModelFiles::open(&dir).unwrap();
        let model = Model::load(device.clone(), &files, 2048, &mut |_| {}).unwrap();
        let text = Arc::new(Text::load(&dir).unwrap());
        let model = Arc::new(model);
        let subject = Subject { dir, model, text };
        agrees_with_run(&subject, &run, *golden_budgets(&run).last().unwrap());
    }
}

// Commands.

#[test]
fn a_newcomer_is_seen_by_everybody() {
    for device in adapter::devices() {
        let subject = Subject::golden(device);
        let script = [(4, vec![join("Carol")])];
        let (header, events) = subject.run(&greedy(16), 2, &script);
        let rows = rows_of(&events, 2);
        let words = subject
            .text
            .encode(&opening_words("Carol", JOINING_WORDS))
            .unwrap();
        assert_eq!((rows[0].0, &rows[0].3), (4, &words), "its words come first");
        assert_eq!(tokens_of(&events, 2).len(), 12, "it has every turn after");
        check_visible(&subject, &header, &events, (2, 4));
        let (_, alone) = subject.run(&greedy(16), 2, &[]);
        assert_eq!(
            tokens_of(&events, 0)[..4],
            tokens_of(&alone, 0)[..4],
            "before"
        );
        assert_ne!(
            tokens_of(&events, 0),
            tokens_of(&alone, 0),
            "it changes what is said"
        );
    }
}

#[test]
fn a_held_worker_stays_visible_and_goes_on_where_it_was() {
    let subject = Subject::golden(Device::cpu());
    for layout in LAYOUTS {
        let settings = Settings {
            layout,
            ..greedy(16)
        };
        let script = [
            (3, vec![Command::Hold { worker: 1 }]),
            (9, vec![Command::Resume { worker: 1 }]),
        ];
        let (header, events) = subject.run(&settings, 3, &script);
        let passes: Vec<_> = rows_of(&events, 1).iter().map(|row| row.0).collect();
        assert_eq!(
            passes,
            [0, 1, 2, 9, 10, 11, 12, 13, 14, 15],
            "no row while held"
        );
        let resumed = &rows_of(&events, 1)[3];
        let (_, chosen) = tokens_of(&events, 1)[2];
        assert_eq!(resumed.3[0], chosen, "what it chose last is fed at last");
        if layout == Layout::Interleaved {
            let eyes = Eyes::from(layout);
            textbook_agrees(&subject, &header, &events, eyes).unwrap();
        } else {
            let noticed = check_visible(&subject, &header, &events, (1, 3));
            assert!(noticed < 9, "while it is held: {noticed}");
        }
    }
}

#[test]
fn to_the_others_a_silent_worker_is_silent_for_whatever_reason() {
    let subject = Subject::golden(Device::cpu());
    // Feeding nothing flushes the token that waits, as retiring does.
    let held = [(5, vec![Command::Hold { worker: 1 }, feed(1, "")])];
    let retired = [(5, vec![Command::Retire { worker: 1 }])];
    let settings = Settings {
        temperature: 1.5,
        ..greedy(40)
    };
    let (_, held) = subject.run(&settings, 3, &held);
    let (_, retired) = subject.run(&settings, 3, &retired);
    for me in [0, 2] {
        let tokens = tokens_of(&held, me);
        assert_eq!(tokens.len(), 40, "every pass");
        assert_eq!(tokens, tokens_of(&retired, me), "worker {me}, draw by draw");
    }
}

#[test]
fn the_last_token_of_a_retired_worker_enters_the_cache() {
    let subject = Subject::golden(Device::cpu());
    let script = [(4, vec![Command::Retire { worker: 0 }])];
    let (header, events) = subject.run(&greedy(24), 2, &script);
    let (rows, tokens) = (rows_of(&events, 0), tokens_of(&events, 0));
    assert_eq!(
        (rows.len(), tokens.len()),
        (5, 4),
        "fed once more, without a choice"
    );
    assert_eq!(rows[4].3[0], tokens[3].1, "the token that was not fed yet");
    check_visible(&subject, &header, &events, (0, 5));
}

#[test]
fn a_session_without_workers_ends() {
    let subject = Subject::golden(Device::cpu());
    let all = vec![Command::Retire { worker: 0 }, Command::Retire { worker: 1 }];
    let (header, events) = subject.run(&greedy(16), 2, &[(3, all)]);
    assert_eq!(ending(&events).0, Reason::NobodyLeft, "the end");
    assert!(has_finisher(&events), "it is asked for its answer");
    assert_eq!(rows_of(&events, 1).len(), 4, "the last tokens are flushed");
    assert_eq!(
        subject.replay(&header, &events).unwrap().difference,
        None,
        "replay"
    );
}

#[test]
fn when_everybody_is_held_nothing_runs_until_someone_goes_on() {
    let subject = Subject::golden(Device::cpu());
    let mut session = subject.session(&greedy(8), rules(), 2).unwrap();
    session.step(&[]).unwrap();
    let hold = [Command::Hold { worker: 0 }, Command::Hold { worker: 1 }];
    assert_eq!(session.step(&hold).unwrap().len(), 2, "only the commands");
    for _ in 0..5 {
        assert_eq!(session.step(&[]).unwrap(), [], "nothing happens");
    }
    let rest = session.step(&[Command::Resume { worker: 1 }]).unwrap();
    assert_eq!(
        tokens_of(&rest, 1),
        [(1, tokens_of(&rest, 1)[0].1)],
        "it goes on"
    );
    assert!(tokens_of(&rest, 0).is_empty(), "the other does not");
}

#[test]
fn a_person_writes_as_a_worker() {
    for device in adapter::devices() {
        let subject = Subject::golden(device);
        let script = [
            (2, vec![feed(0, " The answer is not 5.\n\n")]),
            (
                3,
                vec![
                    join("Eve"),
                    Command::Hold { worker: 2 },
                    feed(2, " Try 12."),
                ],
            ),
            (6, vec![feed(2, " Or <|eos|>"), feed(2, "</think>7")]),
            (9, vec![Command::Resume { worker: 2 }]),
        ];
        let (header, events) = subject.run(&greedy(20), 2, &script);

        let plain = |words: &str| subject.text.encode_plain(words).unwrap();
        let row = &rows_of(&events, 0)[2];
        let fed = plain(" The answer is not 5.\n\n");
        assert_eq!(
            row.3[1..],
            fed,
            "after the token that waited, and it ends no step"
        );
        let words = subject
            .text
            .encode(&opening_words("Eve", JOINING_WORDS))
            .unwrap();
        let rows = rows_of(&events, 2);
        assert_eq!(
            rows[0].3,
            [words, plain(" Try 12.")].concat(),
            "joined, held, fed"
        );
        assert_eq!(
            (rows[1].0, rows[2].0),
            (6, 9),
            "rows only where there are words"
        );
        assert_eq!(
            rows[1].3,
            [plain(" Or <|eos|>"), plain("</think>7")].concat(),
            "in order"
        );
        assert_eq!(
            subject.text.decode(&rows[1].3),
            " Or <|eos|></think>7",
            "as text"
        );
        let control = |id: &TokenId| subject.text.is_control(*id);
        assert!(
            !rows[1].3.iter().any(control),
            "no control token: {:?}",
            rows[1].3
        );
        let last = *rows[1].3.last().unwrap();
        assert_eq!(
            (rows[2].3[0], rows[2].2),
            (last, rows[1].2 + rows[1].3.len() - 1),
            "again"
        );
        assert_eq!(tokens_of(&events, 2)[0].0, 9, "it chooses once resumed");
        let noticed = check_visible(&subject, &header, &events, (2, 3));
        assert!(noticed < 9, "before it has a turn: {noticed}");
        let again = subject.replay(&header, &events).unwrap();
        assert_eq!((again.difference, again.passes), (None, 20), "replay");
    }
}

#[test]
fn a_session_answers_or_stops_when_it_is_told() {
    let subject = Subject::golden(Device::cpu());
    for at in [0, 3] {
        let (_, events) = subject.run(&greedy(50), 2, &[(at, vec![Command::Finish])]);
        assert_eq!(ending(&events).0, Reason::Asked, "before pass {at}");
        assert!(has_finisher(&events), "it answers");
        assert_eq!(
            tokens_of(&events, 0).len() as u64,
            at,
            "no pass after it was told"
        );
        let (_, events) = subject.run(&greedy(50), 2, &[(at, vec![Command::Stop])]);
        assert_eq!(ending(&events), (Reason::Stopped, None), "before pass {at}");
        assert!(!has_finisher(&events), "it does not answer");
        let both = vec![Command::Stop, Command::Finish];
        let (_, events) = subject.run(&greedy(50), 2, &[(at, both)]);
        assert_eq!(
            ending(&events).0,
            Reason::Stopped,
            "what is stopped stays stopped"
        );
    }
}

#[test]
fn nothing_happens_after_the_end() {
    let subject = Subject::golden(Device::cpu());
    let mut session = subject.session(&greedy(2), rules(), 2).unwrap();
    let events = play(&mut session, &[]);
    assert!(has_finisher(&events) && session.is_over(), "a whole run");
    let more = session.step(&[join("Carol"), Command::Hold { worker: 77 }]);
    assert_eq!(more.unwrap(), [], "commands are too late");
    assert!(
        session.usage().tokens <= session.usage().context,
        "usage can be asked"
    );
}

#[test]
fn a_command_that_makes_no_sense_changes_nothing() {
    let subject = Subject::golden(Device::cpu());
    let wrong = |session: &mut Session| {
        let before = (
            session.usage(),
            session.protocol().snapshot(),
            session.passes(),
        );
        let commands = [
            Command::Hold { worker: 40 },
            Command::Resume { worker: 99 },
            Command::Retire { worker: usize::MAX },
            feed(40, "x"),
            join("Alice"),
            join(""),
            join("a\nb"),
            join("<|eos|>"),
            join(&"x".repeat(65)),
        ];
        for command in commands {
            // Alone, and after one that makes sense.
            for good in [vec![], vec![join("Zed"), feed(0, "y"), Command::Finish]] {
                let all = [good, vec![command.clone()]].concat();
                let error = session.step(&all).unwrap_err();
                assert!(matches!(error, Error::Usage(_)), "{command:?}: {error}");
            }
        }
        for good in [
            vec![Command::Retire { worker: 0 }; 2],
            vec![Command::Retire { worker: 0 }, Command::Hold { worker: 0 }],
            vec![Command::Retire { worker: 0 }, Command::Resume { worker: 0 }],
            vec![Command::Retire { worker: 0 }, feed(0, "x")],
            (0..14).map(|i| join(&format!("W{i}"))).collect(),
        ] {
            assert!(session.step(&good).is_err(), "{good:?}");
        }
        let after = (
            session.usage(),
            session.protocol().snapshot(),
            session.passes(),
        );
        assert_eq!(before, after, "nothing changed");
    };
    let mut plain = subject.session(&greedy(6), rules(), 3).unwrap();
    let mut teased = subject.session(&greedy(6), rules(), 3).unwrap();
    while !plain.is_over() {
        wrong(&mut teased);
        assert_eq!(
            teased.step(&[]).unwrap(),
            plain.step(&[]).unwrap(),
            "the same run"
        );
    }
    assert!(teased.is_over(), "to its end");
}

#[test]
fn words_that_do_not_fit_are_refused_and_change_nothing() {
    let subject = Subject::golden(Device::cpu());
    for early_answer in [false, true] {
        let settings = Settings {
            context: 400,
            early_answer,
            ..greedy(6)
        };
        let mut plain = subject.session(&settings, rules(), 2).unwrap();
        let mut teased = subject.session(&settings, rules(), 2).unwrap();
        let long = feed(1, &"a b ".repeat(400));
        while !plain.is_over() {
            let error = teased.step(&[long.clone(), Command::Finish]).unwrap_err();
            assert!(matches!(error, Error::Limit { .. }), "{error}");
            assert!(error.to_string().contains("context of 400"), "{error}");
            let (want, got) = (plain.step(&[]).unwrap(), teased.step(&[]).unwrap());
            assert_eq!(want, got, "the same run");
        }
    }
}

// Logs and replay.

/// Writes a log as a run does and reads it back.
fn through_a_file(header: &Header, events: &[Event]) -> (Header, Vec<Event>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.jsonl");
    let mut bytes = Vec::new();
    let mut log = Log::new(&mut bytes, header).unwrap();
    for part in events.chunks(7) {
        log.append(part).unwrap();
    }
    std::fs::write(&path, &bytes).unwrap();
    let (read, events) = read_log(&path).unwrap();
    assert_eq!(read, *header, "the header survives");
    (read, events)
}

fn replays(subject: &Subject, header: &Header, events: &[Event]) {
    let (header, read) = through_a_file(header, events);
    assert_eq!(read, events, "the events survive");
    let again = subject.replay(&header, &read).unwrap();
    assert_eq!(again.difference, None, "the same run again");
    let count = events.iter().filter(|e| matches!(e, Event::Token { .. }));
    assert_eq!(again.tokens, count.count(), "every token was compared");
}

#[test]
fn a_log_replays_for_any_number_of_workers_in_every_layout() {
    let subject = Subject::golden(Device::cpu());
    for layout in LAYOUTS {
        for n in [1, 2, 3, 5, 16] {
            for settings in [greedy(8), sampled(8)] {
                let settings = Settings {
                    layout,
                    context: 2048,
                    ..settings
                };
                let (header, events) = subject.run(&settings, n, &[]);
                let rows: usize = (0..n).map(|w| rows_of(&events, w).len()).sum();
                assert_eq!(rows, 8 * n, "every worker in every pass");
                replays(&subject, &header, &events);
            }
        }
    }
}

#[test]
fn a_log_with_commands_replays_on_every_device() {
    for device in adapter::devices() {
        let subject = Subject::golden(device);
        let script = [
            (0, vec![join("Carol"), feed(1, " Hm.")]),
            (2, vec![Command::Hold { worker: 0 }]),
            (
                3,
                vec![Command::Hold { worker: 1 }, Command::Retire { worker: 2 }],
            ),
            (4, vec![Command::Resume { worker: 1 }, feed(0, " 12?\n\n")]),
            (6, vec![Command::Resume { worker: 0 }, join("Dave")]),
            (9, vec![Command::Finish]),
        ];
        for (layout, kv_dtype) in LAYOUTS.into_iter().zip(["f32", "f16", "bf16"]) {
            let settings = Settings {
                layout,
                kv_dtype: kv_dtype.to_owned(),
                ..sampled(40)
            };
            let (header, events) = subject.run(&settings, 2, &script);
            assert_eq!(ending(&events).0, Reason::Asked, "the last command");
            replays(&subject, &header, &events);
        }
    }
}

#[test]
fn the_fast_rules_replay_and_end_at_an_end_token() {
    let subject = Subject::golden(Device::cpu());
    let rules = Rules {
        check_every: 30,
        ..Rules::fast()
    };
    let mut ended = 0;
    for seed in 0..12 {
        let settings = Settings {
            temperature: 1.5,
            seed,
            ..greedy(60)
        };
        let mut session = subject.session(&settings, rules.clone(), 3).unwrap();
        let header = session.header(name(), RulesName::new("fast", &rules));
        let events = play(&mut session, &[]);
        let eos = |e: &Event| matches!(e, Event::Token { id: 482, .. });
        assert_eq!(
            events.iter().any(eos),
            ending(&events).0 == Reason::EndToken,
            "an end token ends the run"
        );
        ended += usize::from(events.iter().any(eos));
        replays(&subject, &header, &events);
    }
    assert!(ended > 0, "some run met an end token");
}

#[test]
fn an_answer_ends_the_session() {
    let subject = Subject::golden(Device::cpu());
    let script = [(2, vec![feed(1, " It is \\boxed{12}")])];
    let (header, events) = subject.run(&greedy(200), 2, &script);
    assert_eq!(
        ending(&events),
        (Reason::Answer, Some("12")),
        "in a finished step"
    );
    assert!(!has_finisher(&events), "it was there already");
    let closed = |e: &Event| matches!(e, Event::StepClosed { worker: 1, .. });
    assert!(
        events.iter().rev().take(6).any(closed),
        "its step is closed"
    );
    replays(&subject, &header, &events);
    let (_, events) = subject.run(&greedy(3), 2, &script);
    assert_eq!(
        ending(&events),
        (Reason::Budget, Some("12")),
        "in an open step"
    );
}

#[test]
fn the_first_difference_is_reported() {
    let subject = Subject::golden(Device::cpu());
    let (header, events) = subject.run(&sampled(12), 2, &[]);
    let at = events
        .iter()
        .position(|e| {
            matches!(
                e,
                Event::Token {
                    pass: 5,
                    worker: 1,
                    ..
                }
            )
        })
        .unwrap();
    let mut changed = events.clone();
    let Event::Token { id, .. } = &mut changed[at] else {
        unreachable!("it was found")
    };
    let real = *id;
    *id = (real + 1) % 480;
    let other = *id;
    let difference = subject
        .replay(&header, &changed)
        .unwrap()
        .difference
        .unwrap();
    assert_eq!(difference.event, at, "the index of the event");
    let id = |event: Option<Event>| match event {
        Some(Event::Token { id, .. }) => id,
        other => panic!("{other:?}"),
    };
    assert_eq!(id(difference.logged), other, "as logged");
    assert_eq!(id(difference.ran), real, "as it ran");
    // A longer log than the run, a shorter one, another seed, another prompt.
    let mut long = events.clone();
    long.push(events[at].clone());
    let difference = subject.replay(&header, &long).unwrap().difference.unwrap();
    assert_eq!(
        (difference.event, difference.ran),
        (events.len(), None),
        "no more events"
    );
    for n in 0..events.len() {
        let again = subject.replay(&header, &events[..n]).unwrap();
        assert_eq!(
            again.difference, None,
            "a log of {n} events is followed that far"
        );
    }
    let mut seed = header.clone();
    seed.settings.seed += 1;
    assert!(
        subject.replay(&seed, &events).unwrap().difference.is_some(),
        "seed"
    );
    let mut prompt = header.clone();
    prompt.opening.prompt[3] = 5;
    assert!(
        subject
            .replay(&prompt, &events)
            .unwrap()
            .difference
            .is_some(),
        "prompt"
    );
}

#[test]
fn a_damaged_log_is_followed_as_far_as_it_is_sound() {
    let subject = Subject::golden(Device::cpu());
    let (header, events) = subject.run(&greedy(3), 2, &[]);
    let mut bytes = Vec::new();
    Log::new(&mut bytes, &header)
        .unwrap()
        .append(&events)
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.jsonl");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        read_log(&path)
    };
    let (_, torn) = read(&bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(
        torn,
        events[..events.len() - 1],
        "the torn last line is dropped"
    );
    let text = String::from_utf8(bytes.clone()).unwrap();
    let newer = text.replacen(&format!("\"format\":{FORMAT}"), "\"format\":99", 1);
    let lines: Vec<&str> = text.lines().collect();
    let garbage = [lines[0], lines[1], "{\"event\":\"dance\"}", lines[2], ""].join("\n");
    let half = [lines[0], &lines[1][..9], lines[2], ""].join("\n");
    let binary = [&bytes[..], &[0xFF, 0, b'\n']].concat();
    for (bytes, line, why) in [
        (newer.as_bytes(), 1, "format 99 is not understood"),
        (b"".as_slice(), 1, "empty"),
        (&bytes[..20], 1, "empty"),
        (b"\n", 1, "no header"),
        (b"[]\n", 1, "no header"),
        (b"{\"format\":1}\n", 1, "no header"),
        (b"{\"format\":-1}\n", 1, "no header"),
        (b"{\"format\":1e99}\n", 1, "no header"),
        (garbage.as_bytes(), 3, "no event"),
        (half.as_bytes(), 2, "no event"),
        (&binary, lines.len() + 1, "no event"),
    ] {
        let error = read(bytes).unwrap_err();
        let Error::Log { line: at, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(*at, line, "{error}");
        assert!(
            error.to_string().contains(why),
            "{error} should say '{why}'"
        );
    }
    assert!(
        matches!(read_log(dir.path()), Err(Error::Io { .. })),
        "a directory"
    );
    // Wherever it is cut, it reads or is empty, and replays.
    for n in (0..bytes.len()).step_by(97) {
        if let Ok((header, events)) = read(&bytes[..n]) {
            let again = subject.replay(&header, &events).unwrap();
            assert_eq!(again.difference, None, "cut after {n} bytes");
        }
    }
}

#[test]
fn an_absurd_header_is_an_error() {
    let subject = Subject::golden(Device::cpu());
    let (header, events) = subject.run(&greedy(2), 2, &[]);
    let sound = serde_json::to_value(&header).unwrap();
    let changes = [
        (
            "/settings/context",
            vec!["0", "1", "1000000000000", "18446744073709551615", "-5"],
        ),
        ("/settings/max_passes", vec!["-1", "1.5"]),
        ("/settings/temperature", vec!["-1.0", "1e60", "null"]),
        ("/settings/top_p", vec!["-0.5", "7"]),
        ("/settings/min_p", vec!["2"]),
        ("/settings/top_k", vec!["-1"]),
        ("/settings/seed", vec!["-1"]),
        ("/settings/vocab_limit", vec!["0", "-1"]),
        ("/settings/kv_dtype", vec!["\"f64\"", "\"\""]),
        ("/settings/layout", vec!["\"spiral\""]),
        ("/rules/version", vec!["\"none\""]),
        ("/rules/answer", vec!["\"poem\""]),
        (
            "/rules/finisher_tokens",
            vec!["18446744073709551615", "1000000", "-3"],
        ),
        (
            "/names",
            vec!["[]", "[\"Alice\"]", "[\"Alice\",\"Alice\"]", "[\"\",\"*\"]"],
        ),
        (
            "/opening/words",
            vec!["[]", "[[1],[]]", "[[],[]]", "[[1],[1],[1]]"],
        ),
        (
            "/opening/prompt",
            vec!["[485]", "[4294967295]", "[4294967296]", "[-1]"],
        ),
        ("/opening/header_own", vec!["[485]"]),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.jsonl");
    let run = |header: &serde_json::Value| {
        let mut text = format!("{header}\n");
        for event in &events {
            text.push_str(&serde_json::to_string(event).unwrap());
            text.push('\n');
        }
        std::fs::write(&path, text).unwrap();
        let (header, events) = read_log(&path)?;
        subject.replay(&header, &events)
    };
    assert_eq!(
        run(&sound).unwrap().difference,
        None,
        "the header as it was"
    );
    for (at, values) in changes {
        for value in values {
            let mut header = sound.clone();
            *header.pointer_mut(at).unwrap() = serde_json::from_str(value).unwrap();
            let error = run(&header).expect_err(&format!("{at} = {value}"));
            eprintln!("{at} = {value}: {error}");
        }
    }
    let n = 17;
    let mut many = sound.clone();
    many["names"] = (0..n).map(|i| format!("W{i}")).collect();
    many["opening"]["words"] = (0..n).map(|_| vec![5]).collect();
    assert!(
        run(&many).unwrap_err().to_string().contains("17 workers"),
        "17 workers"
    );
    // Numbers that are merely large are none of the replay's business.
    for (at, value) in [
        ("/rules/check_every", u64::MAX),
        ("/settings/top_k", u64::MAX),
    ] {
        let mut header = sound.clone();
        *header.pointer_mut(at).unwrap() = value.into();
        run(&header).unwrap();
    }
}

#[test]
fn a_log_of_another_vocabulary_is_an_error() {
    let subject = Subject::golden(Device::cpu());
    let (header, events) = subject.run(&greedy(3), 2, &[(1, vec![feed(0, "a")])]);
    let mut n = 0;
    for at in 0..events.len() {
        let mut changed = events.clone();
        match &mut changed[at] {
            Event::Token { id, .. } => *id = 485,
            Event::Inserted { ids, .. } | Event::Finisher { ids, .. } => ids[0] = u32::MAX,
            Event::Pass { rows, .. } => rows[0].ids[0] = 485,
            _ => continue,
        }
        let error = subject.replay(&header, &changed).unwrap_err();
        assert!(error.to_string().contains("has 485 tokens"), "{error}");
        n += 1;
    }
    assert!(n > 8, "every kind of event: {n}");
}

#[test]
fn a_log_that_commands_nonsense_is_an_error() {
    let subject = Subject::golden(Device::cpu());
    let (header, events) = subject.run(&greedy(3), 2, &[(1, vec![feed(0, "a")])]);
    let at = events
        .iter()
        .position(|e| matches!(e, Event::Command { .. }))
        .unwrap();
    for command in [feed(2, "a"), Command::Resume { worker: 9 }, join("Bob")] {
        let mut changed = events.clone();
        changed[at] = Event::Command { pass: 1, command };
        let error = subject.replay(&header, &changed).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
    }
}

// Seeds.

#[test]
fn a_seed_is_a_text() {
    let subject = Subject::golden(Device::cpu());
    let run = |seed| {
        let settings = Settings {
            seed,
            ..sampled(20)
        };
        subject.run(&settings, 2, &[]).1
    };
    assert_eq!(run(1), run(1), "the same seed, the same text");
    assert_ne!(
        tokens_of(&run(1), 0),
        tokens_of(&run(2), 0),
        "another seed, another text"
    );
}

#[test]
fn a_draw_is_keyed_by_seed_and_worker_and_pass() {
    let subject = Subject::golden(Device::cpu());
    let script = [(4, vec![join("Dave"), Command::Hold { worker: 0 }])];
    let (mut header, events) = subject.run(&sampled(20), 3, &script);
    // The textbook gives the logits, and draws with the numbers of this worker in this pass.
    let eyes = Eyes::from(Layout::Combined);
    textbook_agrees(&subject, &header, &events, eyes).unwrap();
    header.settings.seed += 1;
    textbook_agrees(&subject, &header, &events, eyes).unwrap_err();
}

#[test]
fn who_joins_does_not_change_the_others_random_numbers() {
    let subject = Subject::golden(Device::cpu());
    let mut spoken = 0;
    for seed in 0..8 {
        // In this layout nobody sees an unfinished step.
        let settings = Settings {
            layout: Layout::Interleaved,
            temperature: 1.5,
            seed,
            ..greedy(24)
        };
        // The question comes after so many tokens of all: without it, all that could leak is chance.
        let unasked = Rules {
            check_every: usize::MAX,
            ..Rules::main()
        };
        let run = |script: &[(u64, Vec<Command>)]| {
            let mut session = subject.session(&settings, unasked.clone(), 2).unwrap();
            play(&mut session, script)
        };
        let (alone, joined) = (run(&[]), run(&[(3, vec![join("Carol")])]));
        let closed = joined.iter().find_map(|e| match e {
            Event::StepClosed {
                pass, worker: 2, ..
            } => Some(*pass),
            _ => None,
        });
        let until = closed.unwrap_or(u64::MAX);
        let before = |events: &[Event], me| -> Vec<_> {
            let tokens = tokens_of(events, me).into_iter();
            tokens.filter(|(pass, _)| *pass <= until).collect()
        };
        for me in [0, 1] {
            assert_eq!(before(&alone, me), before(&joined, me), "worker {me}");
        }
        spoken += before(&joined, 2).len();
    }
    assert!(spoken > 40, "the newcomer spoke meanwhile: {spoken}");
}

// Limits.

/// The golden tokenizer with a model so small that thousands of passes take a moment.
fn tiny(n_positions: usize) -> (tempfile::TempDir, Subject) {
    let dir = tempfile::tempdir().unwrap();
    let shape = TinyModel {
        hidden: 16,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        ff: 16,
        layers: 1,
        vocab: 485,
        ..TinyModel::default()
    };
    shape.write(dir.path(), "limits");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let from = Path::new("tests/golden/models/tokenizer").join(file);
        std::fs::copy(from, dir.path().join(file)).unwrap();
    }
    let subject = Subject::load(Device::cpu(), dir.path(), n_positions);
    (dir, subject)
}

#[test]
fn a_prompt_that_does_not_fit_is_refused_with_the_numbers() {
    let (_dir, subject) = tiny(400);
    let protocol = subject.protocol(rules(), 2).unwrap();
    let prompt = protocol.opening().prompt.len();
    let small = Settings {
        context: 60,
        ..greedy(5)
    };
    let error = subject.session(&small, rules(), 2).unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&format!("prompt of {prompt} tokens")),
        "{text}"
    );
    assert!(text.contains("context of 60"), "{text}");
    let engine = small.engine(Arc::clone(&subject.model), false).unwrap();
    let error = Raw::new(engine, small, vec![5; 60], vec![]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("61 tokens") && text.contains("context of 60"),
        "{text}"
    );
}

#[test]
fn the_models_range_of_positions_is_respected() {
    let (_dir, subject) = tiny(320);
    let beyond = Settings {
        context: 321,
        ..greedy(5000)
    };
    let error = subject.session(&beyond, rules(), 2).unwrap_err();
    assert!(error.to_string().contains("not for 320"), "{error}");
    for early_answer in [false, true] {
        let all = Settings {
            context: 320,
            early_answer,
            ..sampled(5000)
        };
        let (_, events) = subject.run(&all, 2, &[]);
        assert_eq!(
            ending(&events).0,
            Reason::Context,
            "up to the last position"
        );
    }
}

#[test]
fn no_context_however_small_makes_a_panic() {
    let (_dir, subject) = tiny(400);
    let mut outcomes: BTreeMap<(bool, String), usize> = BTreeMap::new();
    for context in 1..=400 {
        for early_answer in [false, true] {
            let settings = Settings {
                context,
                early_answer,
                layout: LAYOUTS[context % 3],
                temperature: 1.0,
                seed: context as u64,
                ..greedy(10_000)
            };
            let outcome = match subject.session(&settings, rules(), 2) {
                Err(error @ Error::Limit { .. }) => {
                    assert!(
                        error.to_string().contains(&format!("of {context};")),
                        "{error}"
                    );
                    "refused".to_owned()
                }
                Err(error) => panic!("context {context}: {error}"),
                Ok(mut session) => {
                    let mut events = Vec::new();
                    while !session.is_over() {
                        events.extend(session.step(&[]).unwrap_or_else(|error| {
                            panic!("context {context}, early answer {early_answer}: {error}")
                        }));
                        let usage = session.usage();
                        assert!(usage.tokens <= context, "{usage:?}");
                    }
                    assert_eq!(has_finisher(&events), early_answer, "context {context}");
                    format!("{:?}", ending(&events).0)
                }
            };
            *outcomes.entry((early_answer, outcome)).or_default() += 1;
        }
    }
    eprintln!("{outcomes:?}");
    for early_answer in [false, true] {
        let n = outcomes[&(early_answer, "Context".to_owned())];
        assert!(n > 100, "most contexts are filled: {outcomes:?}");
        assert_eq!(
            n + outcomes[&(early_answer, "refused".to_owned())],
            400,
            "{outcomes:?}"
        );
    }
}

#[test]
fn the_session_gives_its_pages_back_before_it_answers() {
    let subject = Subject::golden(Device::cpu());
    let settings = Settings {
        context: 400,
        ..greedy(5000)
    };
    let mut session = subject.session(&settings, rules(), 2).unwrap();
    let events = play(&mut session, &[]);
    assert_eq!(ending(&events).0, Reason::Context, "the cache is full");
    let finisher = events.iter().find_map(|e| match e {
        Event::Finisher {
            prompt_tokens, ids, ..
        } => Some(prompt_tokens + ids.len()),
        _ => None,
    });
    // The last token of the early answer is chosen and never fed.
    let fed = finisher.unwrap() - 1;
    let pages = &session.engine().cache.pages;
    assert_eq!(
        pages.n_pages() - pages.n_free(),
        fed.div_ceil(16),
        "only its own"
    );
}

#[test]
fn many_short_steps_run_out_of_pages_before_they_run_out_of_tokens() {
    let subject = Subject::golden(Device::cpu());
    for early_answer in [false, true] {
        let settings = Settings {
            early_answer,
            ..greedy(5000)
        };
        // Room for the tokens alone, where a session of its own would get more.
        let engine = Engine::new(Arc::clone(&subject.model), DType::F32, 24, false).unwrap();
        let settings = Settings {
            context: 24 * 16,
            ..settings
        };
        let protocol = subject.protocol(rules(), 3).unwrap();
        let mut session = Session::new(engine, protocol, settings).unwrap();
        let mut most = 0;
        let mut events = Vec::new();
        while !session.is_over() {
            events.extend(session.step(&[]).unwrap());
            most = most.max(session.usage().tokens);
        }
        assert_eq!(ending(&events).0, Reason::Context, "the end");
        assert!(
            most < 24 * 16 - 20,
            "pages are partly filled: {most} tokens"
        );
        assert_eq!(has_finisher(&events), early_answer, "it still answers");
    }
}

#[test]
fn a_budget_of_no_pass_runs_none() {
    let subject = Subject::golden(Device::cpu());
    for early_answer in [false, true] {
        let settings = Settings {
            early_answer,
            ..greedy(0)
        };
        let (header, events) = subject.run(&settings, 2, &[]);
        assert_eq!(ending(&events).0, Reason::Budget, "the end");
        assert!(tokens_of(&events, 0).is_empty(), "no token");
        assert_eq!(has_finisher(&events), early_answer, "the early answer");
        replays(&subject, &header, &events);
    }
}

#[test]
fn a_token_that_the_model_does_not_know_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let shape = TinyModel {
        vocab: 300,
        ..TinyModel::default()
    };
    shape.write(dir.path(), "vocabulary");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let from = Path::new("tests/golden/models/tokenizer").join(file);
        std::fs::copy(from, dir.path().join(file)).unwrap();
    }
    for device in adapter::devices() {
        let subject = Subject::load(device, dir.path(), 400);
        let settings = Settings {
            context: 400,
            ..greedy(5)
        };
        let mut session = subject.session(&settings, rules(), 2).unwrap();
        let error = session.step(&[]).unwrap_err();
        assert!(error.to_string().contains("token"), "{error}");
        let engine = settings.engine(Arc::clone(&subject.model), false).unwrap();
        let mut raw = Raw::new(engine, settings, vec![5, 300], vec![]).unwrap();
        let error = raw.step(&subject.text).unwrap_err();
        assert!(error.to_string().contains("300"), "{error}");
    }
}

// Layouts.

#[test]
fn a_layout_is_what_the_textbook_makes_of_its_name() {
    let subject = Subject::golden(Device::cpu());
    for layout in LAYOUTS {
        let settings = Settings {
            layout,
            ..greedy(24)
        };
        let (header, events) = subject.run(&settings, 3, &[]);
        for seen in LAYOUTS {
            let eyes = Eyes::from(seen);
            // The views differ in more than blocks' order, so that no layout passes for another.
            let agrees = textbook_agrees(&subject, &header, &events, eyes);
            assert_eq!(
                agrees.is_ok(),
                seen == layout,
                "{layout:?} as {seen:?}: {agrees:?}"
            );
        }
    }
}

#[test]
fn on_the_adapter_too_a_layout_is_what_its_name_says() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let subject = Subject::golden(device);
    for layout in LAYOUTS {
        let settings = Settings {
            layout,
            ..greedy(12)
        };
        let (header, events) = subject.run(&settings, 3, &[]);
        let eyes = Eyes::from(layout);
        textbook_agrees(&subject, &header, &events, eyes).unwrap();
    }
}

#[test]
fn contiguous_texts_stay_in_one_block() {
    let subject = Subject::golden(Device::cpu());
    for layout in LAYOUTS {
        let settings = Settings {
            layout,
            ..greedy(40)
        };
        let (_, events) = subject.run(&settings, 2, &[]);
        let mut moved = 0;
        for event in &events {
            if let Event::StepClosed { block, .. } = event {
                assert_eq!(block.is_some(), layout != Layout::Contiguous, "{layout:?}");
                moved += 1;
            }
        }
        assert!(moved > 0, "{layout:?}: steps ended");
        if layout == Layout::Contiguous {
            for me in [0, 1] {
                let rows = rows_of(&events, me);
                assert!(rows.iter().all(|row| row.1 == rows[0].1), "one block");
            }
        }
    }
}

// A text continued as it is.

fn continue_raw(
    subject: &Subject,
    settings: &Settings,
    prompt: &[TokenId],
    ends: &[TokenId],
) -> Vec<Event> {
    let engine = settings.engine(Arc::clone(&subject.model), false).unwrap();
    let mut raw = Raw::new(engine, settings.clone(), prompt.to_vec(), ends.to_vec()).unwrap();
    let mut events = Vec::new();
    while !raw.is_over() {
        events.extend(raw.step(&subject.text).unwrap());
    }
    assert_eq!(
        raw.step(&subject.text).unwrap(),
        [],
        "nothing after the end"
    );
    events
}

fn raw_header(settings: &Settings, prompt: &[TokenId], ends: &[TokenId]) -> Header {
    Header {
        format: FORMAT,
        hogwild: "test".to_owned(),
        model: name(),
        device: "test".to_owned(),
        layers: Vec::new(),
        settings: settings.clone(),
        rules: None,
        names: Vec::new(),
        opening: OpeningIds {
            prompt: prompt.to_vec(),
            ends: ends.to_vec(),
            ..OpeningIds::default()
        },
    }
}

fn ids_of(events: &[Event]) -> Vec<TokenId> {
    tokens_of(events, 0).into_iter().map(|(_, id)| id).collect()
}

#[test]
fn a_continued_text_is_plain_decoding() {
    for device in adapter::devices() {
        let subject = Subject::golden(device);
        let prompt = subject.text.encode_as_input("Hi, I'm Alice.").unwrap();
        for settings in [greedy(30), sampled(30)] {
            let mut engine = settings.engine(Arc::clone(&subject.model), false).unwrap();
            let block = engine.cache.pages.open();
            let (mut next, mut want) = (prompt.clone(), Vec::new());
            for pass in 0..30 {
                let logits = engine.prefill(block, &next, Logits::Last).unwrap();
                let sampling = settings.sampling();
                let id = sampling.sample(&logits[0], &[], 0, pass).unwrap();
                next = vec![id];
                want.push(id);
            }
            let events = continue_raw(&subject, &settings, &prompt, &[]);
            assert_eq!(ids_of(&events), want, "token by token");
            assert_eq!(ending(&events), (Reason::Budget, None), "the budget");
            let text = events.iter().filter_map(|e| match e {
                Event::Token { text, .. } => Some(text.as_str()),
                _ => None,
            });
            assert_eq!(
                text.collect::<String>(),
                subject.text.decode(&want),
                "its text"
            );
            let header = raw_header(&settings, &prompt, &[]);
            replays(&subject, &header, &events);

            // It ends where one of the ends comes first.
            let end = want[7];
            let until = want.iter().position(|&id| id == end).unwrap();
            let events = continue_raw(&subject, &settings, &prompt, &[9999, end]);
            assert_eq!(ids_of(&events), want[..=until], "up to the end token");
            assert_eq!(ending(&events).0, Reason::EndToken, "the end");
            replays(
                &subject,
                &raw_header(&settings, &prompt, &[9999, end]),
                &events,
            );
        }
    }
}

#[test]
fn a_continued_text_ends_with_its_context() {
    let (_dir, subject) = tiny(400);
    for context in 1..=100 {
        let settings = Settings {
            context,
            ..sampled(10_000)
        };
        let engine = settings.engine(Arc::clone(&subject.model), false).unwrap();
        if let Err(error) = Raw::new(engine, settings.clone(), vec![5; 20], vec![]) {
            assert!(context <= 20, "context {context}: {error}");
        } else {
            let events = continue_raw(&subject, &settings, &[5; 20], &[]);
            assert_eq!(ending(&events).0, Reason::Context, "context {context}");
            assert_eq!(ids_of(&events).len(), context - 20, "all of it is used");
        }
    }
    let settings = greedy(0);
    let settings = Settings {
        context: 400,
        ..settings
    };
    let events = continue_raw(&subject, &settings, &[5; 20], &[]);
    assert!(ids_of(&events).is_empty(), "a budget of no pass runs none");
    let engine = settings.engine(Arc::clone(&subject.model), false).unwrap();
    let error = Raw::new(engine, settings, vec![], vec![]).unwrap_err();
    assert!(matches!(error, Error::Usage(_)), "{error}");
}

/// Greedy ids by transformers; `make_stories260K.py` says how they were made.
#[test]
fn a_story_is_continued_as_transformers_does() {
    let dir = Path::new("../shared/models/stories260K");
    if !dir.exists() {
        eprintln!("skipped: {} is absent", dir.display());
        return;
    }
    let file = std::fs::read("tests/golden/stories260K_greedy_200.json").unwrap();
    let want: serde_json::Value = serde_json::from_slice(&file).unwrap();
    for device in adapter::devices() {
        let subject = Subject::load(device, dir, 512);
        let prompt = want["prompt"].as_str().unwrap();
        let prompt = subject.text.encode_as_input(prompt).unwrap();
        assert_eq!(
            prompt,
            ids(&want["prompt_ids"]),
            "the beginning token comes first"
        );
        let settings = Settings {
            context: 512,
            ..greedy(200)
        };
        let events = continue_raw(&subject, &settings, &prompt, &[]);
        assert_eq!(ids_of(&events), ids(&want["greedy_tokens"]), "200 tokens");
    }
}

#[test]
fn inserted_words_are_told_as_what_they_are() {
    let subject = Subject::golden(Device::cpu());
    let (_, events) = subject.run(&greedy(60), 2, &[(5, vec![feed(0, " Hm.")])]);
    let mut counts: HashMap<String, usize> = HashMap::new();
    for event in &events {
        if let Event::Inserted {
            what, ids, text, ..
        } = event
        {
            assert_eq!(subject.text.decode(ids), *text, "ids and text agree");
            assert_eq!(
                text.contains("Quick check"),
                *what == Words::Check,
                "{text}"
            );
            *counts.entry(format!("{what:?}")).or_default() += 1;
        }
    }
    eprintln!("{counts:?}");
    assert_eq!((counts["Opening"], counts["Fed"]), (2, 1), "{counts:?}");
    assert!(counts["Prefix"] > 2 && counts["Check"] > 1, "{counts:?}");
}
