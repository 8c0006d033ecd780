//! The promises of the shared cache, on the CPU path and on the adapter.
//!
//! Closing a step moves no byte; a worker's bits depend on nothing but its own view; a hidden block is
//! never read; tokens spread over any blocks agree with the textbook, which knows none. The last tests
//! are canaries: what must not pass, does not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints what it measured")]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

#[path = "common/adapter.rs"]
mod adapter;
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::iter::zip;
use std::sync::Arc;

use adapter::devices;
use common::textbook::{Row, Textbook};
use common::tiny::{Random, TinyLatent, TinyModel, TinyRope};
use half::{bf16, f16};
use hogwild::Error;
use hogwild::cache::layout::{Layout, Shared, View};
use hogwild::cache::pages::{BlockId, PAGE};
use hogwild::cache::plan::{Batch, Logits, SPLIT, Turn};
use hogwild::device::{DType, Device, Recording};
use hogwild::model::{Engine, Model, ModelFiles};
use hogwild::ops::attend::{TILE, Work, attend, rows_per_work};
use hogwild::ops::merge::merge;
use hogwild::ops::place::Arena;
use safetensors::Dtype;

/// Tokens of every tiny model.
const VOCAB: usize = 96;

/// Heads as in QwQ-32B: a work item of attention holds nine rows, and not sixteen.
fn wide_heads() -> TinyModel {
    TinyModel {
        hidden: 60,
        heads: 5,
        kv_heads: 1,
        head_dim: 128,
        ff: 172,
        ..TinyModel::default()
    }
}

/// All layers see the last 70 tokens: less than a page fits in, and more than most blocks have.
fn windowed() -> TinyModel {
    TinyModel {
        window: Some(70),
        ..TinyModel::default()
    }
}

/// Three heads that share a latent; widths that kernels pad, pairs of channels that rotate as halves.
fn latent() -> TinyModel {
    TinyModel {
        heads: 3,
        latent: Some(TinyLatent {
            q_rank: Some(20),
            rank: 20,
            nope: 12,
            rope: 12,
            v: 10,
            interleaved: false,
        }),
        ..TinyModel::default()
    }
}

fn tokens(name: &str, n: usize) -> Vec<u32> {
    let mut random = Random::new(name);
    let next = |_| u32::try_from(random.below(VOCAB)).unwrap();
    (0..n).map(next).collect()
}

fn turn(view: &[BlockId], tokens: &[u32]) -> Turn {
    Turn {
        view: View(view.to_vec()),
        tokens: tokens.to_vec(),
        logits: Logits::All,
    }
}

fn batch(turns: impl Into<Vec<Turn>>) -> Batch {
    Batch {
        turns: turns.into(),
    }
}

/// A tiny model on a device, through its files.
fn load(device: &Arc<Device>, shape: &TinyModel, seed: &str, n_positions: usize) -> Arc<Model> {
    let dir = tempfile::tempdir().unwrap();
    shape.write(dir.path(), seed);
    let files = ModelFiles::open(dir.path()).unwrap();
    Arc::new(Model::load(device.clone(), &files, n_positions, &mut |_| {}).unwrap())
}

fn engine(model: &Arc<Model>, kv: DType, n_pages: usize) -> Engine {
    Engine::new(model.clone(), kv, n_pages, false).unwrap()
}

fn name(engine: &Engine) -> String {
    engine.model().device().name()
}

/// The bits of logits, so that equal means equal.
fn bits(logits: &[Vec<f32>]) -> Vec<Vec<u32>> {
    let row = |row: &Vec<f32>| row.iter().map(|v| v.to_bits()).collect();
    logits.iter().map(row).collect()
}

/// Largest difference; infinite if anything is missing or not a number.
fn distance(got: &[Vec<f32>], want: &[Vec<f64>]) -> f64 {
    let all = |got: &Vec<f32>, want: &Vec<f64>| {
        assert_eq!(got.len(), want.len(), "a logit for each token");
        let differences = zip(got, want).map(|(&g, w)| (f64::from(g) - w).abs());
        differences.fold(0.0, |worst: f64, d| {
            if d.is_nan() {
                f64::INFINITY
            } else {
                worst.max(d)
            }
        })
    };
    assert_eq!(got.len(), want.len(), "as many rows as wanted");
    zip(got, want).map(|(g, w)| all(g, w)).fold(0.0, f64::max)
}

/// All bytes of the cache, keys and values of each layer.
fn arena(engine: &Engine) -> Vec<Vec<u8>> {
    let n_layers = engine.model().config().n_layers;
    let tensors = (0..n_layers).flat_map(|layer| engine.cache.layer(layer));
    let read = |t: &hogwild::device::Tensor| engine.model().device().read(t, 0, t.bytes());
    tensors.map(|t| read(t).unwrap()).collect()
}

/// Bytes of one slot in one tensor of the cache.
fn slot_bytes(engine: &Engine) -> usize {
    let tensor = engine.cache.layer(0)[0];
    tensor.bytes() / tensor.shape()[0]
}

/// Slots of a block's tokens.
fn slots(engine: &Engine, block: BlockId) -> BTreeSet<usize> {
    let pages = &engine.cache.pages;
    (0..pages.len(block))
        .map(|i| pages.slot(block, i))
        .collect()
}

/// The textbook and the engines of all devices, told the same. For the textbook, a block is a list of
/// numbers of tokens and nothing more.
struct Scene {
    textbook: Textbook,
    blocks: BTreeMap<BlockId, Vec<usize>>,
    engines: Vec<Engine>,
    worst: Vec<f64>,
}

impl Scene {
    fn new(textbook: &Textbook, models: &[Arc<Model>], kv: DType, n_pages: usize) -> Self {
        Self {
            textbook: textbook.clone(),
            blocks: BTreeMap::new(),
            engines: models.iter().map(|m| engine(m, kv, n_pages)).collect(),
            worst: vec![0.0; models.len()],
        }
    }

    fn open(&mut self) -> BlockId {
        let ids: BTreeSet<BlockId> = self
            .engines
            .iter_mut()
            .map(|e| e.cache.pages.open())
            .collect();
        assert_eq!(ids.len(), 1, "all engines were told the same");
        let id = *ids.first().unwrap();
        self.blocks.insert(id, Vec::new());
        id
    }

    fn close(&mut self, block: BlockId) {
        for engine in &mut self.engines {
            engine.cache.pages.close(block);
        }
    }

    /// What the textbook says to a batch, whose rows `spoil` may change first: all turns' tokens.
    fn expect(&mut self, batch: &Batch, spoil: impl Fn(&mut [Row])) -> Vec<Vec<f64>> {
        let mut next = self.textbook.len()..;
        for turn in &batch.turns {
            let own = self.blocks.get_mut(turn.view.0.last().unwrap()).unwrap();
            own.extend(next.by_ref().take(turn.tokens.len()));
        }
        let seen = |turn: &Turn| {
            let numbers = turn.view.0.iter().flat_map(|b| &self.blocks[b]);
            Row::new(turn.tokens.clone(), numbers.copied())
        };
        let mut rows: Vec<Row> = batch.turns.iter().map(seen).collect();
        spoil(&mut rows);
        self.textbook.forward(&rows).concat()
    }

    /// One pass everywhere; notes how far each engine is from the textbook.
    fn pass(&mut self, batch: &Batch) {
        let want = self.expect(batch, |_| {});
        for (engine, worst) in zip(&mut self.engines, &mut self.worst) {
            let got = engine.pass(batch).unwrap();
            *worst = worst.max(distance(&got, &want));
        }
    }

    fn check(&self, what: &str, tolerance: f64) {
        for (engine, &worst) in zip(&self.engines, &self.worst) {
            println!("{what} on {}: worst {worst:.1e}", name(engine));
            assert!(worst <= tolerance, "{what}: off by {worst}");
            assert!(worst > 0.0, "{what}: f32 never equals f64, so nothing ran");
        }
    }
}

/// A model for the textbook and for each device.
fn models(shape: &TinyModel, seed: &str, n_positions: usize) -> (Textbook, Vec<Arc<Model>>) {
    let dir = tempfile::tempdir().unwrap();
    shape.write(dir.path(), seed);
    let textbook = Textbook::load_for(dir.path(), n_positions).unwrap();
    let load = |device| load(&Arc::new(device), shape, seed, n_positions);
    (textbook, devices().into_iter().map(load).collect())
}

#[test]
fn closing_a_step_moves_no_byte_and_a_pass_writes_only_its_own_slots() {
    for device in devices().into_iter().map(Arc::new) {
        let model = load(&device, &TinyModel::default(), "closing", 256);
        for kv in [DType::F32, DType::F16, DType::BF16] {
            let mut engine = engine(&model, kv, 16);
            let pages = &mut engine.cache.pages;
            let [prompt, a, b, fresh] = [pages.open(), pages.open(), pages.open(), pages.open()];
            let turns = [
                turn(&[prompt], &tokens("prompt", 37)),
                turn(&[a], &tokens("a", 21)),
                turn(&[b], &tokens("b", 5)),
            ];
            engine.pass(&batch(turns)).unwrap();
            let before = arena(&engine);
            assert!(
                before.iter().all(|t| t.iter().any(|&v| v != 0)),
                "every tensor holds something"
            );

            engine.cache.pages.close(prompt);
            engine.cache.pages.close(a);
            assert_eq!(arena(&engine), before, "closing changed the arena in {kv}");

            // Both go on behind the relabelled block; worker b sees it at another place than before.
            let own = &slots(&engine, b) | &slots(&engine, fresh);
            let turns = [
                turn(&[prompt, a, b, fresh], &tokens("fresh", 18)),
                turn(&[prompt, a, fresh, b], &tokens("more b", 3)),
            ];
            engine.pass(&batch(turns)).unwrap();
            let now = &slots(&engine, b) | &slots(&engine, fresh);
            let written: BTreeSet<usize> = now.difference(&own).copied().collect();
            assert_eq!(written.len(), 21, "a slot for each new token");
            let after = arena(&engine);
            let size = slot_bytes(&engine);
            for (before, after) in zip(&before, &after) {
                let both = zip(before.chunks(size), after.chunks(size));
                for (slot, (before, after)) in both.enumerate() {
                    let new = written.contains(&slot);
                    assert_eq!(before != after, new, "slot {slot} in {kv}, new: {new}");
                }
            }

            engine.cache.pages.close(fresh);
            assert_eq!(arena(&engine), after, "closing changed the arena in {kv}");
        }
    }
}

/// Worker 0's logits in five passes of 1, 3, 1, 2 and 1 tokens, with `n_others` more in each pass, of one
/// to three tokens, whom it does not see in the interleaved layout.
fn beside(model: &Arc<Model>, layout: Layout, n_others: usize) -> Vec<Vec<f32>> {
    let mut engine = engine(model, DType::F16, 128);
    let pages = &mut engine.cache.pages;
    let [prompt, others, header] = [pages.open(), pages.open(), pages.open()];
    let own: Vec<BlockId> = (0..16).map(|_| pages.open()).collect();
    let mut turns = vec![
        turn(&[prompt], &tokens("prompt", 300)),
        turn(&[others], &tokens("others", 4)),
        turn(&[header], &tokens("header", 3)),
    ];
    for (w, &block) in own.iter().enumerate() {
        turns.push(turn(&[block], &tokens(&format!("worker {w}"), 2 + 3 * w)));
    }
    engine.pass(&batch(turns)).unwrap();
    engine.cache.pages.close(prompt);
    let shared = Shared {
        history: vec![prompt],
        header_others: others,
        header_own: header,
        own,
    };
    let mut out = Vec::new();
    for (pass, n) in [1, 3, 1, 2, 1].into_iter().enumerate() {
        // Half of the others come before it.
        let mut workers: Vec<usize> = (1..=n_others).collect();
        workers.insert(n_others / 2, 0);
        let (mut turns, mut first, mut n_rows) = (Vec::new(), 0, 0);
        for w in workers {
            let view = layout.view(w, &shared);
            let n = if w == 0 { n } else { 1 + (w + pass) % 3 };
            turns.push(turn(&view.0, &tokens(&format!("pass {pass}, {w}"), n)));
            first = if w == 0 { n_rows } else { first };
            n_rows += n;
        }
        let logits = engine.pass(&batch(turns)).unwrap();
        out.extend_from_slice(&logits[first..first + n]);
    }
    out
}

#[test]
fn a_workers_bits_do_not_depend_on_who_else_is_in_the_pass() {
    for device in devices().into_iter().map(Arc::new) {
        for shape in [TinyModel::default(), wide_heads(), windowed(), latent()] {
            let model = load(&device, &shape, "beside", 1024);
            let alone = bits(&beside(&model, Layout::Interleaved, 0));
            for n_others in [1, 2, 7, 15] {
                let together = bits(&beside(&model, Layout::Interleaved, n_others));
                assert!(alone == together, "{n_others} others changed bits");
            }
        }
    }
}

/// Worker a sees the new tokens of b and c, who do not see a. It is the same to a whether they come in the
/// pass before or in its own.
#[test]
fn a_workers_bits_do_not_depend_on_when_the_tokens_it_sees_were_fed() {
    for device in devices().into_iter().map(Arc::new) {
        for shape in [TinyModel::default(), wide_heads(), windowed()] {
            let model = load(&device, &shape, "when", 512);
            let run = |joint: bool| {
                let mut engine = engine(&model, DType::F32, 64);
                let pages = &mut engine.cache.pages;
                let [prompt, a, b, c] = [pages.open(), pages.open(), pages.open(), pages.open()];
                let prompt_tokens = tokens("prompt", 270);
                engine
                    .pass(&batch([turn(&[prompt], &prompt_tokens)]))
                    .unwrap();
                engine.cache.pages.close(prompt);
                let mut out = Vec::new();
                for pass in 0..3 {
                    let [of_a, of_b, of_c] =
                        ["a", "b", "c"].map(|w| tokens(&format!("{w}{pass}"), 2 + pass));
                    let a = turn(&[prompt, b, c, a], &of_a);
                    let others = [turn(&[prompt, b], &of_b), turn(&[prompt, b, c], &of_c)];
                    let [b, c] = others;
                    if joint {
                        let logits = engine.pass(&batch([b, a, c])).unwrap();
                        out.extend_from_slice(&logits[of_b.len()..][..of_a.len()]);
                    } else {
                        // c sees the new tokens of b, which must be there.
                        engine.pass(&batch([b, c])).unwrap();
                        out.extend(engine.pass(&batch([a])).unwrap());
                    }
                }
                bits(&out)
            };
            assert!(run(true) == run(false), "the others' pass changed bits");
        }
    }
}

#[test]
fn a_workers_bits_do_not_depend_on_the_order_of_turns() {
    let orders = [
        [0, 1, 2, 3, 4, 5, 6],
        [6, 5, 4, 3, 2, 1, 0],
        [3, 4, 5, 6, 0, 1, 2],
        [5, 0, 3, 6, 1, 4, 2],
    ];
    for device in devices().into_iter().map(Arc::new) {
        for shape in [TinyModel::default(), wide_heads(), windowed()] {
            let model = load(&device, &shape, "order", 512);
            let run = |order: [usize; 7]| {
                let mut engine = engine(&model, DType::F16, 64);
                let pages = &mut engine.cache.pages;
                let [prompt, others, own] = [pages.open(), pages.open(), pages.open()];
                let shared = Shared {
                    history: vec![prompt],
                    header_others: others,
                    header_own: own,
                    own: (0..7).map(|_| pages.open()).collect(),
                };
                let turns = [
                    turn(&[prompt], &tokens("prompt", 260)),
                    turn(&[others], &tokens("others", 4)),
                    turn(&[own], &tokens("own", 2)),
                ];
                engine.pass(&batch(turns)).unwrap();
                engine.cache.pages.close(prompt);
                let mut out: Vec<Vec<Vec<u32>>> = vec![Vec::new(); 7];
                for pass in 0..3 {
                    // 7 workers with 1 to 5 tokens each: more rows than a kernel has columns.
                    let fed = |w: usize| tokens(&format!("{pass}, {w}"), 1 + (2 * w + pass) % 5);
                    let turns: Vec<Turn> = order
                        .iter()
                        .map(|&w| turn(&Layout::Combined.view(w, &shared).0, &fed(w)))
                        .collect();
                    let mut logits = engine.pass(&batch(turns)).unwrap().into_iter();
                    for w in order {
                        let mine: Vec<_> = logits.by_ref().take(fed(w).len()).collect();
                        out[w].extend(bits(&mine));
                    }
                    assert!(logits.next().is_none(), "every row has a worker");
                }
                out
            };
            let want = run(orders[0]);
            for order in &orders[1..] {
                assert!(run(*order) == want, "the order {order:?} changed bits");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_where_a_prefill_is_cut() {
    let n = 2 * SPLIT + 35;
    for device in devices().into_iter().map(Arc::new) {
        for (shape, cuts) in [
            (TinyModel::default(), &[1, 7, 16, 255][..]),
            (wide_heads(), &[16, 255][..]),
            (windowed(), &[7, 255][..]),
        ] {
            let model = load(&device, &shape, "cut", 1024);
            let text = tokens("text", n);
            let run = |cut: usize| {
                let mut engine = engine(&model, DType::F32, 64);
                let block = engine.cache.pages.open();
                let mut out = Vec::new();
                for piece in text.chunks(cut) {
                    out.extend(engine.pass(&batch([turn(&[block], piece)])).unwrap());
                }
                assert_eq!(out.len(), n, "logits of every token");
                (bits(&out), arena(&engine))
            };
            let want = run(n);
            for &cut in cuts {
                let got = run(cut);
                assert!(got.0 == want.0, "pieces of {cut} changed a logit");
                assert!(got.1 == want.1, "pieces of {cut} changed the cache");
            }
            // A prefill goes by tiles, which add up in an order of their own.
            let run = |cut: usize| {
                let mut engine = engine(&model, DType::F32, 64);
                let block = engine.cache.pages.open();
                let mut out = Vec::new();
                for piece in text.chunks(cut) {
                    out.extend(engine.prefill(block, piece, Logits::All).unwrap());
                }
                (bits(&out), arena(&engine))
            };
            let by_tiles = run(n);
            for &cut in cuts {
                let got = run(cut);
                assert!(got.0 == by_tiles.0, "prefill by {cut} changed a logit");
                assert!(got.1 == by_tiles.1, "prefill by {cut} changed the cache");
            }
            assert_near(&by_tiles.0, &want.0);
        }
    }
}

#[test]
fn bits_do_not_depend_on_which_pages_a_block_has() {
    for device in devices().into_iter().map(Arc::new) {
        let model = load(&device, &TinyModel::default(), "pages", 512);
        let run = |fragmented: bool| {
            let mut engine = engine(&model, DType::F16, 96);
            let pages = &mut engine.cache.pages;
            if fragmented {
                let mut fillers: Vec<BlockId> = (0..96).map(|_| pages.open()).collect();
                for &filler in &fillers {
                    pages.extend(filler, PAGE).unwrap();
                }
                let mut random = Random::new("fragments");
                while fillers.len() > 40 {
                    pages.free(fillers.swap_remove(random.below(fillers.len())));
                }
            }
            let [prompt, a, b] = [pages.open(), pages.open(), pages.open()];
            let prompt_tokens = tokens("prompt", 400);
            let mut out = engine
                .pass(&batch([turn(&[prompt], &prompt_tokens)]))
                .unwrap();
            engine.cache.pages.close(prompt);
            for pass in 0..4 {
                let turns = [
                    turn(&[prompt, b, a], &tokens(&format!("a{pass}"), 11)),
                    turn(&[prompt, a, b], &tokens(&format!("b{pass}"), 6)),
                ];
                out.extend(engine.pass(&batch(turns)).unwrap());
            }
            let pages = &engine.cache.pages;
            let follows = |i: &usize| pages.slot(prompt, i + 1) == pages.slot(prompt, *i) + 1;
            let gaps = (0..399).filter(|i| !follows(i)).count();
            assert_eq!(gaps > 0, fragmented, "{gaps} gaps in the prompt");
            bits(&out)
        };
        assert!(run(true) == run(false), "fragmented pages changed bits");
    }
}

#[test]
fn one_worker_is_plain_decoding() {
    for device in devices().into_iter().map(Arc::new) {
        let model = load(&device, &TinyModel::default(), "plain", 512);
        let text = tokens("text", 320);
        let mut plain = engine(&model, DType::F32, 32);
        let block = plain.cache.pages.open();
        let want = bits(&plain.pass(&batch([turn(&[block], &text)])).unwrap());

        // Prefilled with 300 tokens, then token by token; empty blocks in the view are no matter.
        let mut worker = engine(&model, DType::F32, 32);
        let pages = &mut worker.cache.pages;
        let [empty, nothing, own] = [pages.open(), pages.open(), pages.open()];
        pages.close(empty);
        let mut got = worker.prefill(own, &text[..300], Logits::Last).unwrap();
        assert_near(&bits(&got), &want[299..300]);
        // The prefill's own sums run in another order; fed by a pass, the bits are the same, too.
        worker.cache.pages.truncate(own, 0);
        got = worker
            .pass(&batch([Turn {
                logits: Logits::Last,
                ..turn(&[own], &text[..300])
            }]))
            .unwrap();
        for token in &text[300..] {
            let view = [empty, nothing, own];
            got.extend(worker.pass(&batch([turn(&view, &[*token])])).unwrap());
        }
        assert_eq!(got.len(), 21, "the last of the prompt and 20 more");
        assert!(bits(&got) == want[299..], "decoding differs from prefill");
    }
}

/// Logits that differ by the order of summation at most, and are large enough to tell.
fn assert_near(got: &[Vec<u32>], want: &[Vec<u32>]) {
    let numbers = |rows: &[Vec<u32>]| -> Vec<f32> {
        rows.iter().flatten().map(|&b| f32::from_bits(b)).collect()
    };
    let (got, want) = (numbers(got), numbers(want));
    assert_eq!(got.len(), want.len(), "as many logits");
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
    let worst = worst.fold(0.0, f32::max);
    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.1, "logits of {largest} tell nothing");
    assert!(worst <= 2e-5 * largest.max(1.0), "{worst} of {largest}");
}

/// Blocks of every kind, several workers, steps that close: all logits against the textbook.
fn play(scene: &mut Scene, layout: Layout, [n_blocks, n_workers]: [usize; 2], seed: &str) {
    let mut random = Random::new(seed);
    let history: Vec<BlockId> = (0..n_blocks).map(|_| scene.open()).collect();
    let [header_others, header_own] = [scene.open(), scene.open()];
    let own = (0..n_workers).map(|_| scene.open()).collect();
    let mut turns = Vec::new();
    for (i, &block) in history.iter().enumerate() {
        // Every fifth block is empty; the first is longer than a page.
        let n = match i {
            0 => 19,
            i if i % 5 == 2 => 0,
            _ => 1 + random.below(7),
        };
        if n > 0 {
            turns.push(turn(&[block], &tokens(&format!("{seed}, {i}"), n)));
        }
    }
    turns.push(turn(&[header_others], &tokens("others", 3)));
    turns.push(turn(&[header_own], &tokens("own", 2)));
    scene.pass(&batch(turns));
    for (i, &block) in history.iter().enumerate() {
        // Some stay open, also before closed ones.
        if i % 4 != 3 {
            scene.close(block);
        }
    }
    let mut shared = Shared {
        history,
        header_others,
        header_own,
        own,
    };
    // Few numbers of rows: each has kernels of its own.
    for (pass, n_rows) in [6, 5, 6, 4, 6].into_iter().enumerate() {
        // In the second and the fourth pass one worker is idle.
        let active: Vec<usize> = (0..n_workers)
            .filter(|&w| pass % 2 == 0 || w != pass / 2)
            .collect();
        let mut lens = vec![1; active.len()];
        for i in 0..n_rows - active.len() {
            lens[(pass + i * i) % active.len()] += 1;
        }
        let mut turns = Vec::new();
        for (w, len) in active.into_iter().zip(lens) {
            let fed = tokens(&format!("{seed}, {pass}, {w}"), len);
            turns.push(turn(&layout.view(w, &shared).0, &fed));
        }
        scene.pass(&batch(turns));
        let fresh = scene.open();
        if let Some(done) = layout.close(pass % n_workers, fresh, &mut shared) {
            scene.close(done);
        }
    }
}

#[expect(clippy::too_many_lines, reason = "most of it is a table")]
#[test]
fn every_shape_of_model_agrees_with_the_textbook() {
    let shape = |heads, kv_heads, head_dim| TinyModel {
        heads,
        kv_heads,
        head_dim,
        vocab: VOCAB,
        ..TinyModel::default()
    };
    let llama3 = TinyRope::Llama3 {
        factor: 8.0,
        original: 64,
    };
    let yarn = TinyRope::Yarn {
        factor: 4.0,
        original: 64,
    };
    let longrope = |original| TinyRope::LongRope {
        factor: 8.0,
        original,
    };
    let shapes = [
        (
            "3 x 3 heads of 8",
            TinyModel {
                tied: true,
                ..shape(3, 3, 8)
            },
        ),
        (
            "6 x 3 heads of 40, bias, odd widths",
            TinyModel {
                hidden: 60,
                ff: 172,
                bias: true,
                ..shape(6, 3, 40)
            },
        ),
        (
            "9 x 3 heads of 64, norms, bf16",
            TinyModel {
                qk_norm: true,
                tied: true,
                dtype: Dtype::BF16,
                ..shape(9, 3, 64)
            },
        ),
        (
            "5 x 1 heads of 128, f16, yarn, odd widths",
            TinyModel {
                hidden: 60,
                ff: 172,
                dtype: Dtype::F16,
                rope: yarn,
                ..shape(5, 1, 128)
            },
        ),
        (
            "14 x 2 heads of 64, bias, llama3, bf16",
            TinyModel {
                bias: true,
                tied: true,
                dtype: Dtype::BF16,
                rope: llama3,
                ..shape(14, 2, 64)
            },
        ),
        (
            "8 x 1 heads of 256, tied, f16",
            TinyModel {
                hidden: 44,
                tied: true,
                dtype: Dtype::F16,
                ..shape(8, 1, 256)
            },
        ),
        (
            "5 x 5 heads of 40, norms, llama3",
            TinyModel {
                qk_norm: true,
                rope: llama3,
                ..shape(5, 5, 40)
            },
        ),
        (
            "phi3, 4 x 2 heads of 32, a quarter rotated, long context, odd widths",
            TinyModel {
                hidden: 60,
                ff: 172,
                fused: true,
                rotary: 0.25,
                rope: longrope(64),
                new_config: true,
                ..shape(4, 2, 32)
            },
        ),
        (
            "phi3, 3 x 3 heads of 96, three quarters rotated, short context, f16",
            TinyModel {
                fused: true,
                rotary: 0.75,
                rope: longrope(512),
                window: Some(33),
                dtype: Dtype::F16,
                ..shape(3, 3, 96)
            },
        ),
        (
            "mistral, 6 x 2 heads of 24, a window shorter than most blocks",
            TinyModel {
                window: Some(3),
                ..shape(6, 2, 24)
            },
        ),
        (
            "qwen3, 4 x 1 heads of 40, fused, yarn, a window but for layer 0",
            TinyModel {
                fused: true,
                qk_norm: true,
                bias: true,
                rope: yarn,
                window: Some(20),
                dtype: Dtype::BF16,
                layers: 3,
                ..shape(4, 1, 40)
            },
        ),
        (
            "6 x 3 heads of 128, norms, yarn, bf16",
            TinyModel {
                qk_norm: true,
                dtype: Dtype::BF16,
                rope: yarn,
                ..shape(6, 3, 128)
            },
        ),
        (
            "qwen3_moe, 4 x 2 heads of 16, 7 experts, odd widths, f16",
            TinyModel {
                hidden: 60,
                ff: 44,
                qk_norm: true,
                experts: 7,
                dtype: Dtype::F16,
                vocab: VOCAB,
                ..TinyModel::default()
            },
        ),
        (
            "deepseek_v3, 3 heads, widths that nothing divides, yarn, bf16",
            TinyModel {
                bias: true,
                dtype: Dtype::BF16,
                rope: yarn,
                new_config: true,
                vocab: VOCAB,
                ..latent()
            },
        ),
    ];
    for (what, shape) in shapes {
        let (textbook, models) = models(&shape, what, 512);
        if shape.rope == yarn && shape.latent.is_none() {
            let multiplier = textbook.rope().1;
            assert!(multiplier > 1.1, "{multiplier} must be told from 1");
        }
        // Every layout with every number of blocks, over the shapes.
        for (layout, sizes) in [
            (Layout::Combined, [40, 4]),
            (Layout::Contiguous, [17, 2]),
            (Layout::Interleaved, [3, 4]),
            (Layout::Combined, [1, 2]),
        ] {
            let mut scene = Scene::new(&textbook, &models, DType::F32, 128);
            play(&mut scene, layout, sizes, what);
            scene.check(
                &format!("{what}, {layout:?}, blocks and workers {sizes:?}"),
                1e-4,
            );
        }
    }
}

#[test]
fn a_view_of_four_thousand_tokens_agrees_with_the_textbook() {
    let shape = TinyModel {
        heads: 3,
        kv_heads: 1,
        head_dim: 16,
        rope: TinyRope::Yarn {
            factor: 4.0,
            original: 1100,
        },
        ..TinyModel::default()
    };
    let (textbook, models) = models(&shape, "long", 4400);
    let mut scene = Scene::new(&textbook, &models, DType::F32, 320);
    let history: Vec<BlockId> = (0..10).map(|_| scene.open()).collect();
    for &block in &history {
        let turn = turn(&[block], &tokens(&format!("{block:?}"), 411));
        scene.pass(&batch([turn]));
        scene.close(block);
    }
    let [a, b] = [scene.open(), scene.open()];
    for pass in 0..3 {
        let view = |others, own| [&history[..], &[others, own]].concat();
        let turns = [
            turn(&view(b, a), &tokens(&format!("a{pass}"), 2)),
            turn(&view(a, b), &tokens(&format!("b{pass}"), 1)),
        ];
        scene.pass(&batch(turns));
    }
    scene.check("4110 tokens in ten blocks", 1e-4);
}

#[test]
fn five_hundred_short_steps_agree_with_the_textbook() {
    let (textbook, models) = models(&TinyModel::default(), "steps", 4096);
    for n_workers in [1, 4] {
        let mut scene = Scene::new(&textbook, &models, DType::F32, 640);
        let mut shared = Shared {
            history: (0..500).map(|_| scene.open()).collect(),
            header_others: scene.open(),
            header_own: scene.open(),
            own: (0..n_workers).map(|_| scene.open()).collect(),
        };
        // Uneven: 1 to 7 tokens, some of them 17, one token into their second page.
        let step = |i: usize| if i % 37 == 5 { 17 } else { 1 + i * i % 7 };
        for (group, blocks) in shared.history.chunks(100).enumerate() {
            let fed = |i: usize| tokens(&format!("step {i}"), step(group * 100 + i));
            let turns = blocks.iter().enumerate().map(|(i, &b)| turn(&[b], &fed(i)));
            scene.pass(&batch(turns.collect::<Vec<_>>()));
        }
        for &block in &shared.history {
            scene.close(block);
        }
        let headers = [shared.header_others, shared.header_own];
        scene.pass(&batch(headers.map(|h| turn(&[h], &[5, 6, 7]))));
        for pass in 0..3 {
            let fed = |w: usize| tokens(&format!("{pass}, {w}"), 1 + (w + pass) % 2);
            let turns = (0..n_workers).map(|w| turn(&Layout::Combined.view(w, &shared).0, &fed(w)));
            scene.pass(&batch(turns.collect::<Vec<_>>()));
            let fresh = scene.open();
            scene.close(Layout::Combined.close(0, fresh, &mut shared).unwrap());
        }
        scene.check(&format!("500 short steps, {n_workers} workers"), 1e-4);
    }
}

#[test]
fn a_hidden_block_is_never_read() {
    for device in devices().into_iter().map(Arc::new) {
        let model = load(&device, &TinyModel::default(), "hidden", 512);
        for kv in [DType::F32, DType::F16, DType::BF16] {
            let run = |poisoned: bool, together: bool| {
                let mut engine = engine(&model, kv, 64);
                let pages = &mut engine.cache.pages;
                let [prompt, hidden, a, b] =
                    [pages.open(), pages.open(), pages.open(), pages.open()];
                let turns = [
                    turn(&[prompt], &tokens("prompt", 290)),
                    turn(&[hidden], &tokens("hidden", 33)),
                    turn(&[a], &tokens("a", 7)),
                    turn(&[b], &tokens("b", 20)),
                ];
                engine.pass(&batch(turns)).unwrap();
                engine.cache.pages.close(prompt);
                engine.cache.pages.close(hidden);
                if poisoned {
                    // All that worker a does not see, the rest of its pages and free ones too.
                    let seen = &slots(&engine, prompt) | &slots(&engine, a);
                    let size = slot_bytes(&engine);
                    // All bits set are a NaN in every float format.
                    let nan = vec![0xff; size];
                    for layer in 0..model.config().n_layers {
                        for tensor in engine.cache.layer(layer) {
                            for slot in (0..64 * PAGE).filter(|slot| !seen.contains(slot)) {
                                device.write(tensor, slot * size, &nan).unwrap();
                            }
                        }
                    }
                }
                let mut out = Vec::new();
                for pass in 0..3 {
                    let mut turns = vec![turn(&[prompt, a], &tokens(&format!("a{pass}"), 2))];
                    if together {
                        turns.push(turn(&[prompt, hidden, b], &tokens(&format!("b{pass}"), 3)));
                    }
                    let mut logits = engine.pass(&batch(turns)).unwrap();
                    let others = logits.split_off(2);
                    let is_nan = others.iter().flatten().any(|v| v.is_nan());
                    assert_eq!(
                        is_nan,
                        poisoned && together,
                        "who sees the poison, and only he, is poisoned"
                    );
                    out.extend(logits);
                }
                assert!(out.iter().flatten().all(|v| v.is_finite()), "a number");
                bits(&out)
            };
            let want = run(false, false);
            assert!(run(true, false) == want, "alone: hidden slots were read");
            assert!(run(true, true) == want, "together: hidden slots were read");
        }
    }
}

/// Two workers whose windows of 20 tokens end in the second page of a step: the prompt, the first page and all
/// that nobody sees may hold anything.
#[test]
fn what_lies_outside_every_window_is_never_read() {
    let run = |device: &Arc<Device>, shape: &TinyModel, poisoned: bool| {
        let model = load(device, shape, "outside", 512);
        let mut engine = engine(&model, DType::F16, 64);
        let pages = &mut engine.cache.pages;
        let [prompt, step, a, b] = [pages.open(), pages.open(), pages.open(), pages.open()];
        let turns = [
            turn(&[prompt], &tokens("prompt", 290)),
            turn(&[step], &tokens("step", 33)),
            turn(&[a], &tokens("a", 7)),
            turn(&[b], &tokens("b", 3)),
        ];
        engine.pass(&batch(turns)).unwrap();
        engine.cache.pages.close(prompt);
        engine.cache.pages.close(step);
        if poisoned {
            let mut seen = &slots(&engine, a) | &slots(&engine, b);
            seen.extend((16..33).map(|i| engine.cache.pages.slot(step, i)));
            let size = slot_bytes(&engine);
            for layer in 0..model.config().n_layers {
                for tensor in engine.cache.layer(layer) {
                    for slot in (0..64 * PAGE).filter(|slot| !seen.contains(slot)) {
                        device
                            .write(tensor, slot * size, &vec![0xff; size])
                            .unwrap();
                    }
                }
            }
        }
        let mut out = Vec::new();
        for pass in 0..3 {
            let turns = [
                turn(&[prompt, step, a], &tokens(&format!("a{pass}"), 2)),
                turn(&[prompt, step, b], &tokens(&format!("b{pass}"), 1)),
            ];
            out.extend(engine.pass(&batch(turns)).unwrap());
        }
        out
    };
    let window = TinyModel {
        window: Some(20),
        ..TinyModel::default()
    };
    for device in devices().into_iter().map(Arc::new) {
        let want = run(&device, &window, false);
        assert!(
            bits(&run(&device, &window, true)) == bits(&want),
            "slots outside were read"
        );
        let all = run(&device, &TinyModel::default(), true);
        let is_nan = |row: &Vec<f32>| row.iter().all(|v| v.is_nan());
        assert!(all.iter().all(is_nan), "without a window they are read");
    }
}

#[test]
fn a_narrow_cache_is_near_the_textbook_and_is_narrow() {
    let shape = TinyModel {
        layers: 3,
        ..TinyModel::default()
    };
    let (textbook, models) = models(&shape, "narrow", 512);
    let mut worst: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (kv, tolerance) in [(DType::F32, 1e-4), (DType::F16, 0.03), (DType::BF16, 0.25)] {
        let mut scene = Scene::new(&textbook, &models, kv, 128);
        play(&mut scene, Layout::Combined, [17, 3], "narrow");
        scene.check(&format!("a cache in {kv}"), tolerance);
        worst.insert(kv.name(), scene.worst);
    }
    for (i, f32) in worst["f32"].iter().enumerate() {
        let (f16, bf16) = (worst["f16"][i], worst["bf16"][i]);
        assert!(f16 > 10.0 * f32, "f16 is off by {f16}: it was not used");
        assert!(bf16 > 3.0 * f16, "bf16 is off by {bf16}: it was not used");
    }
}

/// The authors' kernel test: blocks of 500, 3, 20 and 20 keys, two workers with two new tokens each, heads
/// of QwQ-32B, everything in `[-2, 2]`, and their tolerances for the final output.
///
/// In theirs the queries come rotated for each block, as independent numbers; `published` gives them so,
/// with a row for each (block, query) and a rotation by zero. Else the op rotates one query for all blocks.
#[expect(
    clippy::too_many_lines,
    reason = "their numbers and ours, from top to bottom"
)]
fn authors(device: &Device, dtype: DType, far: i32, published: bool) -> [f64; 2] {
    const BLOCKS: [usize; 4] = [500, 3, 20, 20];
    const HEADS: usize = 40;
    const KV_HEADS: usize = 8;
    const DIM: usize = 128;
    // Of (worker, token) in each block.
    const LOCATIONS: [[i32; 4]; 4] = [[10, 11, 10, 11], [3, 4, 3, 4], [0, 1, 5, 6], [5, 6, 0, 1]];
    let rel = match dtype {
        DType::F32 => 1e-6,
        DType::F16 => 1e-3,
        _ => 0.05,
    };
    let mut random = Random::new(&format!("authors, {dtype}, {far}, {published}"));
    // A number in the input's type, and the bytes that hold it.
    #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
    let mut numbers = |n: usize| {
        let (mut values, mut bytes) = (Vec::new(), Vec::new());
        for _ in 0..n {
            let x = 4.0 * random.uniform() - 2.0;
            match dtype {
                DType::F32 => {
                    values.push(f64::from(x as f32));
                    bytes.extend((x as f32).to_le_bytes());
                }
                DType::F16 => {
                    values.push(f16::from_f64(x).to_f64());
                    bytes.extend(f16::from_f64(x).to_le_bytes());
                }
                _ => {
                    values.push(bf16::from_f64(x).to_f64());
                    bytes.extend(bf16::from_f64(x).to_le_bytes());
                }
            }
        }
        (values, bytes)
    };
    let row = |block: usize, query: usize| if published { block * 4 + query } else { query };
    let n_rows = if published { 16 } else { 4 };

    // Blocks start at pages, one page apart.
    let starts = [16, 560, 592, 640];
    let n_slots = 680;
    let (keys, key_bytes) = numbers(n_slots * KV_HEADS * DIM);
    let (values, value_bytes) = numbers(n_slots * KV_HEADS * DIM);
    let (q, _) = numbers(n_rows * HEADS * DIM);
    #[expect(clippy::cast_possible_truncation, reason = "the table is in f32")]
    let angles: Vec<[f32; 2]> = (0..512 * DIM / 2)
        .map(|i| {
            let (at, i) = (i / (DIM / 2), i % (DIM / 2));
            let angle = at as f64 * 1e6f64.powf(-2.0 * i as f64 / DIM as f64);
            let angle = if published { 0.0 } else { angle };
            [angle.cos() as f32, angle.sin() as f32]
        })
        .collect();

    // Work: splits of 256 keys, each for four rows; pairs in the order of the work.
    let (mut tiles, mut work, mut pair_rows, mut order) =
        (Vec::new(), Vec::new(), Vec::new(), vec![Vec::new(); 4]);
    let mut locations = vec![-1i32; 4 * n_rows];
    for (block, &len) in BLOCKS.iter().enumerate() {
        for (query, location) in LOCATIONS[block].into_iter().enumerate() {
            locations[block * n_rows + row(block, query)] = location + far;
        }
        for split in (0..len).step_by(SPLIT) {
            let first_tile = tiles.len();
            for first in (split..len.min(split + SPLIT)).step_by(TILE) {
                let keys = TILE.min(len - first);
                let keys = keys | (first - split) << 16;
                tiles.push([starts[block] + first, first, keys, block].map(u32_of));
            }
            work.push([first_tile, tiles.len(), pair_rows.len(), 4].map(u32_of));
            for (query, order) in order.iter_mut().enumerate() {
                order.push(u32_of(pair_rows.len()));
                pair_rows.push(u32_of(row(block, query)));
            }
        }
    }
    let n_pairs = pair_rows.len();
    let ranges: Vec<u32> = (0..=4).map(|query| u32_of(query * n_pairs / 4)).collect();
    assert!(rows_per_work(DIM, HEADS, KV_HEADS) >= 4, "a group of rows");

    let words = |shape: &[usize], data: &[u32]| device.upload(shape, DType::U32, data).unwrap();
    let f32s = |shape: &[usize]| device.tensor(shape, DType::F32).unwrap();
    #[expect(clippy::cast_possible_truncation, reason = "these are f32 already")]
    let q_f32: Vec<f32> = q.iter().map(|&v| v as f32).collect();
    let kv = [n_slots, KV_HEADS, DIM];
    let [keys_on_device, values_on_device] =
        [&key_bytes, &value_bytes].map(|bytes| device.upload(&kv, dtype, bytes).unwrap());
    let q_on_device = device
        .upload(&[n_rows, HEADS, DIM], DType::F32, &q_f32)
        .unwrap();
    let angles_on_device = device
        .upload(&[512, DIM / 2, 2], DType::F32, &angles)
        .unwrap();
    let [partial, stats] = [DIM, 2].map(|n| f32s(&[n_pairs, HEADS, n]));
    let output = f32s(&[4, HEADS * DIM]);
    let mut recording = Recording::default();
    attend(
        &mut recording,
        Work {
            tiles: &words(&[tiles.len(), 4], tiles.as_flattened()),
            work: &words(&[work.len(), 4], work.as_flattened()),
            pair_rows: &words(&[n_pairs], &pair_rows),
            locations: &words(
                &[4, n_rows],
                &locations
                    .iter()
                    .map(|l| l.cast_unsigned())
                    .collect::<Vec<_>>(),
            ),
            n_work: work.len(),
            n_rows,
            rows_per_work: 4,
            window: None,
        },
        &angles_on_device,
        &q_on_device,
        Arena {
            keys: &keys_on_device,
            values: &values_on_device,
        },
        [&partial, &stats],
        1.0 / (DIM as f32).sqrt(),
    );
    let order = [words(&[5], &ranges), words(&[n_pairs], &order.concat())];
    merge(
        &mut recording,
        [&order[0], &order[1]],
        [&partial, &stats],
        &output,
        4,
    );
    device.play(&recording).unwrap();
    let got = device.read_f32(&output, 4 * HEADS * DIM).unwrap();

    let (mut worst, mut share) = (0.0f64, 0.0f64);
    for query in 0..4 {
        for head in 0..HEADS {
            let mut seen: Vec<(f64, &[f64])> = Vec::new();
            for (block, &len) in BLOCKS.iter().enumerate() {
                let location = usize::try_from(LOCATIONS[block][query] + far).unwrap();
                let q = &q[(row(block, query) * HEADS + head) * DIM..][..DIM];
                let rotated: Vec<f64> = (0..DIM)
                    .map(|d| {
                        let half = DIM / 2;
                        let [cos, sin] = angles[location * half + d % half].map(f64::from);
                        let (a, b) = (q[d % half], q[d % half + half]);
                        if d < half {
                            a * cos - b * sin
                        } else {
                            b * cos + a * sin
                        }
                    })
                    .collect();
                for key in 0..len.min(location + 1) {
                    let at = ((starts[block] + key) * KV_HEADS + head / 5) * DIM;
                    let score: f64 = zip(&rotated, &keys[at..]).map(|(q, k)| q * k).sum();
                    seen.push((score / (DIM as f64).sqrt(), &values[at..at + DIM]));
                }
            }
            let most = seen.iter().map(|s| s.0).fold(f64::MIN, f64::max);
            let total: f64 = seen.iter().map(|s| (s.0 - most).exp()).sum();
            for d in 0..DIM {
                let sum: f64 = seen.iter().map(|s| (s.0 - most).exp() * s.1[d]).sum();
                let want = sum / total;
                let error = (f64::from(got[(query * HEADS + head) * DIM + d]) - want).abs();
                let allowed = 1e-5 + rel * want.abs();
                assert!(
                    error <= allowed,
                    "{query}, {head}, {d}: off by {error} in {dtype}"
                );
                worst = worst.max(error);
                share = share.max(error / allowed);
            }
        }
    }
    [worst, share]
}

fn u32_of(n: usize) -> u32 {
    u32::try_from(n).unwrap()
}

#[test]
fn attention_passes_the_authors_cuda_kernel_test() {
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (far, published) in [(500, true), (0, true), (500, false), (0, false)] {
                let [worst, share] = authors(&device, dtype, far, published);
                println!(
                    "parity with the authors' CUDA kernel: {dtype} on {}, locations +{far}, queries \
                     rotated {}: worst error {worst:.1e}, {:.0} % of what they allow",
                    device.name(),
                    if published { "before" } else { "by the op" },
                    100.0 * share
                );
                assert!(worst > 0.0, "f32 never equals f64, so nothing ran");
            }
        }
    }
}

#[test]
fn a_full_cache_is_an_error_that_changes_nothing() {
    for device in devices().into_iter().map(Arc::new) {
        let model = load(&device, &TinyModel::default(), "full", 256);
        let run = |fails: bool| {
            let mut engine = engine(&model, DType::F32, 5);
            let pages = &mut engine.cache.pages;
            let [prompt, a, b] = [pages.open(), pages.open(), pages.open()];
            let turns = [
                turn(&[prompt], &tokens("prompt", 30)),
                turn(&[a], &[1, 2, 3]),
            ];
            engine.pass(&batch(turns)).unwrap();
            let before = arena(&engine);
            if fails {
                // Two pages are free: there is room for the first and the second turn, not for the third.
                let c = engine.cache.pages.open();
                let turns = [
                    turn(&[prompt, a], &tokens("a", 20)),
                    turn(&[prompt, b], &tokens("b", 9)),
                    turn(&[prompt, c], &[4]),
                ];
                let error = engine.pass(&batch(turns)).unwrap_err();
                let full = Error::CacheFull {
                    need: 1,
                    free: 0,
                    pages: 5,
                };
                assert_eq!(error.to_string(), full.to_string(), "it says what is full");
                assert!(arena(&engine) == before, "nothing ran");
            }
            let pages = &engine.cache.pages;
            assert_eq!(
                [prompt, a, b].map(|block| pages.len(block)),
                [30, 3, 0],
                "lengths"
            );
            assert_eq!(pages.n_free(), 2, "free pages");
            let turns = [
                turn(&[prompt, b, a], &tokens("a", 20)),
                turn(&[prompt, a, b], &tokens("b", 9)),
            ];
            (bits(&engine.pass(&batch(turns)).unwrap()), arena(&engine))
        };
        assert!(run(true) == run(false), "a pass after the error differs");
    }
}

/// A pass so large that its partials fit no binding: refused when it is recorded, after the cache made room.
#[test]
fn a_pass_that_fits_no_device_changes_nothing() {
    for device in devices().into_iter().map(Arc::new) {
        let shape = TinyModel {
            heads: 8,
            kv_heads: 1,
            head_dim: 256,
            layers: 1,
            ..TinyModel::default()
        };
        let model = load(&device, &shape, "too large", 20_480);
        let mut engine = engine(&model, DType::F16, 1280);
        let pages = &mut engine.cache.pages;
        let [history, own] = [pages.open(), pages.open()];
        pages.extend(history, 16_000).unwrap();
        pages.close(history);
        let free = pages.n_free();
        // 4200 rows with 63 splits of history each are 2 GiB of partials.
        let turn = Turn {
            logits: Logits::None,
            ..turn(&[history, own], &tokens("rows", 4200))
        };
        let error = engine.pass(&batch([turn])).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }), "{error}");
        let pages = &engine.cache.pages;
        assert_eq!((pages.len(own), pages.n_free()), (0, free), "as before");
    }
}

/// Twenty-five workers in one pass, with 1 to 3 tokens each, who all see each other.
#[test]
fn more_rows_than_a_kernel_has_columns_agree_with_the_textbook() {
    let (textbook, models) = models(&wide_heads(), "rows", 512);
    let mut scene = Scene::new(&textbook, &models, DType::F32, 64);
    let shared = Shared {
        history: vec![scene.open()],
        header_others: scene.open(),
        header_own: scene.open(),
        own: (0..25).map(|_| scene.open()).collect(),
    };
    let headers = [shared.history[0], shared.header_others, shared.header_own];
    scene.pass(&batch(headers.map(|h| turn(&[h], &[8, 9, 10, 11]))));
    scene.close(shared.history[0]);
    for pass in 0..2 {
        let fed = |w: usize| tokens(&format!("{pass}, {w}"), 1 + (w + pass) % 3);
        let turns = (0..25).map(|w| turn(&Layout::Combined.view(w, &shared).0, &fed(w)));
        scene.pass(&batch(turns.collect::<Vec<_>>()));
    }
    scene.check("25 workers, 50 rows", 1e-4);
}

// Canaries: what this file must be able to see.

/// Two workers over a history of 20 and 9 tokens and a few of their own; then worker a feeds two tokens and
/// b four. Returns how far worker a's last logits are from a textbook whose row of a was spoiled.
fn spoiled(spoil: impl Fn(&mut Row), blocks: [usize; 5]) -> Vec<f64> {
    let (textbook, models) = models(&TinyModel::default(), "canary", 256);
    let mut scene = Scene::new(&textbook, &models, DType::F32, 32);
    let ids = [20, 9, 3, 7, 5].map(|n| {
        let block = scene.open();
        scene.pass(&batch([turn(&[block], &tokens(&format!("{n}"), n))]));
        block
    });
    let [prompt, step, header, b, a] = ids;
    scene.close(prompt);
    scene.close(step);
    let turn_b = turn(&[prompt, step, header, a, b], &[30, 31, 32, 33]);
    let right = batch([
        turn(&[prompt, step, header, b, a], &[40, 41]),
        turn_b.clone(),
    ]);
    let shown = batch([turn(&blocks.map(|i| ids[i]), &[40, 41]), turn_b]);
    let want = scene.expect(&right, |rows| spoil(&mut rows[0]));
    let distance_of = |engine: &mut Engine| {
        let got = engine.pass(&shown).unwrap();
        distance(&got[1..2], &want[1..2])
    };
    scene.engines.iter_mut().map(distance_of).collect()
}

#[test]
fn the_canaries_begin_with_what_is_right() {
    for d in spoiled(|_| {}, [0, 1, 2, 3, 4]) {
        assert!(d <= 1e-4, "off by {d}");
    }
}

#[test]
fn positions_that_the_others_do_not_advance_are_seen() {
    // The own block starts behind 20 + 9 + 3 + 7 tokens, as if b had not just said four more.
    let spoil = |row: &mut Row| {
        for seen in &mut row.view[20 + 9 + 3 + 11..] {
            seen.position -= 4;
        }
    };
    for d in spoiled(spoil, [0, 1, 2, 3, 4]) {
        println!("canary, positions not advanced: {d:.2}");
        assert!(d > 0.05, "only off by {d}");
    }
}

#[test]
fn blocks_in_the_wrong_order_are_seen() {
    for d in spoiled(|_| {}, [1, 0, 2, 3, 4]) {
        println!("canary, history in the wrong order: {d:.2}");
        assert!(d > 0.05, "only off by {d}");
    }
    for d in spoiled(|_| {}, [0, 1, 3, 2, 4]) {
        println!("canary, header behind the step: {d:.2}");
        assert!(d > 0.05, "only off by {d}");
    }
}

#[test]
fn a_key_index_off_by_one_is_seen() {
    let spoil = |row: &mut Row| {
        for seen in &mut row.view[..20] {
            seen.position += 1;
        }
    };
    for d in spoiled(spoil, [0, 1, 2, 3, 4]) {
        println!("canary, key index off by one: {d:.2}");
        assert!(d > 0.05, "only off by {d}");
    }
}

#[test]
fn tokens_of_others_that_a_worker_sees_change_its_bits() {
    for device in devices().into_iter().map(Arc::new) {
        let model = load(&device, &TinyModel::default(), "beside", 1024);
        let alone = bits(&beside(&model, Layout::Combined, 0));
        let together = bits(&beside(&model, Layout::Combined, 1));
        let same = zip(&alone, &together).filter(|(a, b)| a == b).count();
        assert_eq!(same, 0, "rows that saw nothing of the other");
    }
}

#[test]
fn a_block_that_is_missing_is_seen() {
    let spoil = |row: &mut Row| drop(row.view.drain(20..29));
    for d in spoiled(spoil, [0, 1, 2, 3, 4]) {
        println!("canary, a block is missing: {d:.2}");
        assert!(d > 0.05, "only off by {d}");
    }
}
