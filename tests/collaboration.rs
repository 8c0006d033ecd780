//! The built-in model proves, in one run, that cache, layouts, protocol and sampling carry collaboration.
//!
//! It learned to imitate workers who divide sums among themselves; if a worker did not see the others, or
//! saw them at the wrong place, nothing would be saved, or nothing would be right.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::print_stdout,
    reason = "the numbers of every run are for people"
)]

#[path = "common/adapter.rs"]
mod adapter;
#[path = "../examples/collaboration/scenes.rs"]
mod scenes;

use std::sync::Arc;

use hogwild::cache::layout::{Layout, Shared, View};
use hogwild::cache::pages::BlockId;
use hogwild::cache::plan::{Batch, Logits, Plan, Turn as Fed, plan};
use hogwild::demo::{self, Problem};
use hogwild::device::{DType, Device};
use hogwild::model::{Engine, Model, Scratch};
use hogwild::ops::linear::By;
use hogwild::protocol::{NAMES, Problem as Asked, Protocol, Turn};
use hogwild::sampler::Sampling;
use hogwild::text::Date;
use scenes::{Run, Scene, Stage, UNSEEN_NAMES, policy};

/// Problems of a setting.
const PROBLEMS: u64 = 40;

/// A problem of 3 sums, to `most` of them.
fn problem(i: u64, most: usize) -> Problem {
    Problem::random(0xc1_0000 + i, 3 + usize::try_from(i).unwrap() % (most - 2))
}

/// Most sums of a problem.
const SUMS: usize = 8;

/// Share of problems that are all right, passes over the policy's, share of sums done more than once.
fn margins(runs: &[(Run, Run)]) -> (f64, f64, f64) {
    let sum = |f: &dyn Fn(&(Run, Run)) -> u64| runs.iter().map(f).sum::<u64>() as f64;
    let right = sum(&|r| u64::from(r.0.all_right())) / runs.len() as f64;
    let passes = sum(&|r| r.0.passes) / sum(&|r| r.1.passes);
    let sums = sum(&|r| r.0.sums as u64);
    (right, passes, sum(&|r| r.0.duplicates() as u64) / sums)
}

/// One to four workers on one device, held to the margins; gives what they wrote.
fn divided(device: Device, most_sums: usize, most_passes: [f64; 4]) -> Vec<Vec<String>> {
    let name = device.name();
    let stage = Stage::new(Arc::new(device), "f32").unwrap();
    let mut texts = Vec::new();
    let mut alone = 0.0;
    for n in 1..=4 {
        let mut runs = Vec::new();
        for i in 0..PROBLEMS {
            let problem = problem(i, most_sums);
            let (run, text) = stage.run(&problem, &NAMES[..n], Scene::Plain, i).unwrap();
            runs.push((run, policy(&problem, &NAMES[..n], Scene::Plain, i)));
            texts.push(text);
        }
        let (right, ratio, duplicates) = margins(&runs);
        let passes = runs.iter().map(|r| r.0.passes).sum::<u64>() as f64;
        alone = if n == 1 { passes } else { alone };
        println!(
            "{name}, {n} workers: {:.1} % all right, {ratio:.3} of the policy's passes, {:.3} of one \
             worker's {alone}, {:.1} % duplicates",
            100.0 * right,
            passes / alone,
            100.0 * duplicates
        );
        assert!(right >= 0.9, "{name}, {n} workers: {right} all right");
        assert!(
            ratio <= 1.1,
            "{name}, {n} workers: {ratio} of the policy's passes"
        );
        assert!(
            duplicates <= 0.05,
            "{name}, {n} workers: {duplicates} duplicates"
        );
        assert!(
            passes <= most_passes[n - 1] * alone,
            "{name}, {n} workers: {passes} of {alone} passes"
        );
    }
    texts
}

#[test]
fn workers_divide_the_work() {
    divided(Device::cpu(), SUMS, [1.0, 0.7, 0.6, 0.5]);
}

/// Short problems: software Vulkan takes its time for a pass, whatever is in it.
#[test]
fn workers_write_the_same_on_every_device() {
    let divided = |device| divided(device, 4, [1.0, 0.8, 0.7, 0.65]);
    let texts: Vec<_> = adapter::devices().into_iter().map(divided).collect();
    assert!(
        texts.windows(2).all(|pair| pair[0] == pair[1]),
        "the devices write different texts"
    );
}

#[test]
fn workers_cope_with_stalls_latecomers_and_leavers() {
    let stage = Stage::new(Arc::new(Device::cpu()), "f16").unwrap();
    for scene in [Scene::Stalls, Scene::Late, Scene::Retire, Scene::Unseen] {
        let names = if scene == Scene::Unseen {
            UNSEEN_NAMES
        } else {
            [0, 1, 2, 3].map(|i| NAMES[i])
        };
        let mut runs = Vec::new();
        for i in 0..PROBLEMS {
            let (run, _) = stage.run(&problem(i, SUMS), &names[..3], scene, i).unwrap();
            runs.push((run, policy(&problem(i, SUMS), &names[..3], scene, i)));
        }
        let (right, ratio, duplicates) = margins(&runs);
        println!(
            "{scene:?}: {right:.3} all right, {ratio:.3} of the policy's passes, {duplicates:.3} duplicates"
        );
        assert!(right >= 0.85, "{scene:?}: {right} all right");
        assert!(ratio <= 1.15, "{scene:?}: {ratio} of the policy's passes");
    }
}

/// What is done to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoiled {
    Nothing,
    /// Others' tokens, finished or not, are in nobody's view.
    OthersInvisible,
    /// A query's position does not count what the others are writing.
    PositionsNotAdvanced,
    /// The history in the wrong order.
    HistoryReversed,
}

/// How a spoiled run went.
struct Ran {
    passes: u64,
    right: usize,
    /// The first worker's logits in the pass in which somebody has first finished a step and the other is
    /// in the middle of one: what the others write, and where, is then in everybody's view.
    logits: Vec<f32>,
}

/// A session of two workers as the session runs it, with something spoiled between plan and pass. Up to
/// the pass whose logits are kept, the tokens are those of `script`, if it is given.
#[allow(
    clippy::too_many_lines,
    reason = "one loop, beside the one it must equal"
)]
fn spoiled(model: &Arc<Model>, problem: &Problem, what: Spoiled, script: &mut Vec<u32>) -> Ran {
    let following = !script.is_empty();
    let mut at = 0;
    let mut kept: Option<Vec<f32>> = None;
    let text = Arc::new(demo::text().unwrap());
    let (asked, style) = (problem.to_string(), demo::style().unwrap());
    let asked = Asked {
        text: &asked,
        style: &style,
        thinking: None,
        today: Date::default(),
    };
    let mut protocol = Protocol::open(text, demo::rules(), &NAMES[..2], &asked).unwrap();
    let mut engine = Engine::new(model.clone(), DType::F32, 400, false).unwrap();
    let mut scratch = Scratch::default();
    let mut open = || engine.cache.pages.open();
    let (history, header_others, header_own) = (vec![open()], open(), open());
    let mut shared = Shared {
        history,
        header_others,
        header_own,
        own: vec![open(), open()],
    };
    let opening = protocol.opening().clone();
    engine
        .prefill(shared.history[0], &opening.prompt, Logits::None)
        .unwrap();
    engine
        .prefill(header_others, &opening.header_others, Logits::None)
        .unwrap();
    engine
        .prefill(header_own, &opening.header_own, Logits::None)
        .unwrap();
    engine.cache.pages.close(shared.history[0]);
    let mut author: Vec<(BlockId, usize)> = Vec::new();
    let mut pending = opening.words;
    for pass in 0..500 {
        let mut batch = Batch::default();
        for (w, tokens) in pending.iter().enumerate() {
            let View(mut view) = Layout::Combined.view(w, &shared);
            if what == Spoiled::OthersInvisible {
                let others: Vec<BlockId> = author
                    .iter()
                    .filter(|a| a.1 != w)
                    .map(|a| a.0)
                    .chain([shared.own[1 - w]])
                    .collect();
                view.retain(|block| !others.contains(block));
            }
            if what == Spoiled::HistoryReversed {
                view[1..shared.history.len()].reverse();
            }
            batch.turns.push(Fed {
                view: View(view),
                tokens: tokens.clone(),
                logits: Logits::Last,
            });
        }
        for (w, tokens) in pending.iter().enumerate() {
            engine
                .cache
                .pages
                .extend(shared.own[w], tokens.len())
                .unwrap();
        }
        let mut plan = plan(
            &engine.cache.pages,
            &batch,
            model.rows_per_work(),
            model.windows(),
        );
        if what == Spoiled::PositionsNotAdvanced {
            shift(&mut plan, &engine, &shared, &pending);
        }
        let recording = model
            .forward(&plan, By::Columns, &engine.cache, &mut scratch)
            .unwrap();
        model.device().play(&recording).unwrap();
        let vocab = model.config().vocab_size;
        let logits = model
            .device()
            .read_f32(scratch.logits().unwrap(), 2 * vocab)
            .unwrap();
        if shared.history.len() > 2 && kept.is_none() {
            kept = Some(logits[..vocab].to_vec());
        }
        for (w, logits) in logits.chunks_exact(vocab).enumerate() {
            let mut token = Sampling::greedy()
                .sample(logits, protocol.suppressed(), w, pass)
                .unwrap();
            if kept.is_none() && following {
                token = script[at];
                at += 1;
            } else if kept.is_none() {
                script.push(token);
            }
            match protocol.observe(w, token).unwrap() {
                Turn::Speak(token) => pending[w] = vec![token],
                Turn::CloseStep { feed, .. } => {
                    let fresh = engine.cache.pages.open();
                    let done = Layout::Combined.close(w, fresh, &mut shared).unwrap();
                    engine.cache.pages.close(done);
                    author.push((done, w));
                    pending[w] = feed;
                }
                Turn::Finish(hogwild::protocol::Ending::Answer(answer)) => {
                    let right = problem.right(&answer.text).unwrap_or(0);
                    return Ran {
                        passes: pass + 1,
                        right,
                        logits: kept.unwrap_or_default(),
                    };
                }
                Turn::Finish(_) => unreachable!("these rules end with an answer"),
            }
        }
    }
    Ran {
        passes: 500,
        right: 0,
        logits: kept.unwrap_or_default(),
    }
}

/// Takes the length of the other's unfinished step from every location in blocks before it.
fn shift(plan: &mut Plan, engine: &Engine, shared: &Shared, pending: &[Vec<u32>]) {
    let n_rows = plan.n_rows();
    let other = |row: usize| usize::from(row < pending[0].len());
    let before = shared.history.len() + 1;
    for (at, location) in plan.locations.iter_mut().enumerate().take(before * n_rows) {
        let len = engine.cache.pages.len(shared.own[other(at % n_rows)]);
        *location -= i32::try_from(len).unwrap();
    }
}

#[test]
fn a_spoiled_engine_is_found_out() {
    let device = Arc::new(Device::cpu());
    let model = Model::load(device.clone(), &demo::files().unwrap(), 3000, &mut |_| {}).unwrap();
    let model = Arc::new(model);
    let stage = Stage::new(device, "f32").unwrap();
    let problems: Vec<Problem> = (0..12).map(|i| Problem::random(0xbad + i, 6)).collect();
    let mut scripts = vec![Vec::new(); problems.len()];
    let mut solve = |what| -> (f64, f64, Vec<Vec<f32>>) {
        let runs: Vec<Ran> = problems
            .iter()
            .zip(&mut scripts)
            .map(|(p, s)| spoiled(&model, p, what, s))
            .collect();
        let right = runs
            .iter()
            .zip(&problems)
            .filter(|(r, p)| r.right == p.sums().len())
            .count() as f64;
        let passes: u64 = runs.iter().map(|r| r.passes).sum();
        let n = problems.len() as f64;
        (
            right / n,
            passes as f64 / n,
            runs.into_iter().map(|r| r.logits).collect(),
        )
    };
    let (right, passes, logits) = solve(Spoiled::Nothing);
    let own: u64 = problems
        .iter()
        .map(|p| stage.run(p, &NAMES[..2], Scene::Plain, 0).unwrap().0.passes)
        .sum();
    println!("nothing spoiled: {right:.2} all right in {passes:.1} passes");
    assert!(
        (passes - own as f64 / 12.0).abs() < 1e-9,
        "this loop is the session's: {own}"
    );
    assert!(right >= 0.8, "unspoiled: {right} all right");
    for what in [
        Spoiled::OthersInvisible,
        Spoiled::PositionsNotAdvanced,
        Spoiled::HistoryReversed,
    ] {
        let (spoiled_right, spoiled_passes, spoiled_logits) = solve(what);
        // On the same tokens, the least that any problem's logits are off; a trace may be off by 1e-3.
        let off = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            a.iter()
                .zip(b)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max)
        };
        let least = logits
            .iter()
            .zip(&spoiled_logits)
            .map(off)
            .fold(f32::MAX, f32::min);
        println!(
            "{what:?}: {spoiled_right:.2} all right in {spoiled_passes:.1} passes, logits off by {least:.3} or more"
        );
        assert!(
            least > 0.01,
            "{what:?}: no trace would show it, logits are off by {least}"
        );
        if what == Spoiled::OthersInvisible {
            assert!(
                spoiled_passes > 1.3 * passes,
                "unseen workers save {spoiled_passes} of {passes} passes"
            );
        }
    }
}
