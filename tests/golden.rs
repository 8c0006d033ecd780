//! The engine against golden files made by transformers and by the authors' own code.
//!
//! Every case in `tests/golden` or `HOGWILD_GOLDEN_DIR` runs on the CPU path and on the adapter with an
//! f32 cache: all logits within 1e-4, all greedy tokens equal, and the cache itself within 1e-4. A case
//! whose model is not supported yet is listed by name.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    clippy::print_stdout,
    reason = "the numbers of every case are for people"
)]

#[path = "common/adapter.rs"]
mod adapter;
mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use common::golden::{self, Case, Event, Expected, HogwildCase, LogitsRows, PlainCase, Script};
use hogwild::Error;
use hogwild::cache::layout::View;
use hogwild::cache::pages::{BlockId, PAGE};
use hogwild::cache::plan::{Batch, Logits, Turn};
use hogwild::device::{DType, Device};
use hogwild::model::{Engine, Model, ModelFiles, RopeKind};

const TOLERANCE: f64 = 1e-4;

/// Positions of most engines here.
const CONTEXT: usize = 8192;

#[derive(Debug, Default)]
struct Tally {
    logits: usize,
    worst: f64,
    greedy: usize,
    wrong: usize,
    kv: usize,
    worst_kv: f64,
}

impl Tally {
    fn logits(&mut self, got: &[f32], want: &[f32], what: &str) {
        let d = distance(got.iter().map(|&v| f64::from(v)), want);
        assert!(d <= TOLERANCE, "{what}: a logit is off by {d}");
        self.logits += 1;
        self.worst = self.worst.max(d);
    }

    fn greedy(&mut self, got: &[f32], forbidden: &[u32], want: u32) {
        let allowed = got
            .iter()
            .zip(0u32..)
            .filter(|(_, id)| !forbidden.contains(id));
        let best = allowed.max_by(|a, b| a.0.total_cmp(b.0)).unwrap().1;
        self.greedy += 1;
        self.wrong += usize::from(best != want);
    }
}

/// Largest difference; infinite if anything is missing or not a number.
fn distance(got: impl ExactSizeIterator<Item = f64>, want: &[f32]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let worst = |worst: f64, d: f64| {
        if d.is_nan() {
            f64::INFINITY
        } else {
            worst.max(d)
        }
    };
    got.zip(want)
        .map(|(g, &w)| (g - f64::from(w)).abs())
        .fold(0.0, worst)
}

fn engine(device: &Arc<Device>, case: &Case) -> Result<Engine, Error> {
    engine_of(device, &case.model_dir(), case.prompt_len())
}

/// An engine for contexts of thousands of tokens; where a prompt of `prompt` tokens has the frequencies of
/// short texts, for no more than those are for.
fn engine_of(device: &Arc<Device>, dir: &Path, prompt: usize) -> Result<Engine, Error> {
    let files = ModelFiles::open(dir)?;
    let context = match files.config.rope.kind {
        RopeKind::LongRope { original, .. } if prompt <= original => CONTEXT.min(original),
        _ => CONTEXT,
    };
    let model = Model::load(device.clone(), &files, context, &mut |_| {})?;
    Engine::new(Arc::new(model), DType::F32, 1024, false)
}

fn run_plain(
    engine: &mut Engine,
    case: &PlainCase,
    expected: &BTreeMap<String, Expected>,
) -> Tally {
    let mut tally = Tally::default();
    let block = engine.cache.pages.open();
    let got = engine.prefill(block, &case.input_ids, Logits::All).unwrap();
    let want: Vec<&[f32]> = rows(&expected["prefill"]).collect();
    assert_eq!(got.len(), want.len(), "one row for each input");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        tally.logits(got, want, &format!("prefill {i}"));
    }
    let mut last = got.last().unwrap().clone();
    for (i, (&token, want)) in case
        .greedy_tokens
        .iter()
        .zip(rows(&expected["decode"]))
        .enumerate()
    {
        tally.greedy(&last, &[], token);
        last = engine
            .prefill(block, &[token], Logits::Last)
            .unwrap()
            .remove(0);
        tally.logits(&last, want, &format!("decode {i}"));
    }
    tally
}

fn rows(tensor: &Expected) -> impl Iterator<Item = &[f32]> {
    tensor.data.chunks_exact(*tensor.shape.last().unwrap())
}

fn run_hogwild(
    engine: &mut Engine,
    case: &HogwildCase,
    expected: &BTreeMap<String, Expected>,
) -> Tally {
    let mut tally = Tally::default();
    let forbidden = case.forbidden();
    // A block of the script is a list of ours: a move relabels, it does not copy.
    let mut blocks: HashMap<String, Vec<BlockId>> = HashMap::new();
    for event in &case.events {
        match event {
            Event::Note {} => {}
            Event::Move(step) => {
                let fresh = engine.cache.pages.open();
                let moved = blocks.insert(step.src.clone(), vec![fresh]).unwrap();
                let len: usize = moved.iter().map(|&b| engine.cache.pages.len(b)).sum();
                assert_eq!(len, step.n_tokens, "tokens that move");
                for &block in &moved {
                    engine.cache.pages.close(block);
                }
                blocks.get_mut(&step.dst).unwrap().extend(moved);
            }
            Event::Forward(forward) => {
                let mut batch = Batch::default();
                for row in &forward.rows {
                    for name in &row.view {
                        blocks
                            .entry(name.clone())
                            .or_insert_with(|| vec![engine.cache.pages.open()]);
                    }
                    if row.worker.is_some() {
                        // The session closes the prompt once it is prefilled.
                        for &block in &blocks["common"] {
                            engine.cache.pages.close(block);
                        }
                    }
                    let view = row
                        .view
                        .iter()
                        .flat_map(|n| blocks[n].iter().copied())
                        .collect();
                    let logits = match row.logits_rows {
                        LogitsRows::All => Logits::All,
                        LogitsRows::Last => Logits::Last,
                    };
                    let tokens = row.tokens.clone();
                    batch.turns.push(Turn {
                        view: View(view),
                        tokens,
                        logits,
                    });
                }
                let mut got = engine.pass(&batch).unwrap().into_iter();
                for (i, row) in forward.rows.iter().enumerate() {
                    let what = format!("forward {}, row {i}", forward.index);
                    let mut last = Vec::new();
                    for want in rows(&expected[&row.logits]) {
                        last = got.next().unwrap();
                        tally.logits(&last, want, &what);
                    }
                    if let Some(want) = row.argmax_last {
                        tally.greedy(&last, &[], want);
                    }
                    if let Some(chosen) = &forward.chosen_tokens {
                        tally.greedy(&last, &forbidden, chosen[i]);
                    }
                }
                assert!(got.next().is_none(), "no more logits than wanted");
            }
        }
    }
    // A cache of latents has no keys of heads.
    let is_kept = |name: &str| name.starts_with("kv.") && engine.model().config().latent.is_none();
    for (name, want) in expected.iter().filter(|(name, _)| is_kept(name)) {
        let [_, block, layer, which] = name.split('.').collect::<Vec<_>>()[..] else {
            panic!("{name}")
        };
        let got = stored(engine, &blocks[block], layer.parse().unwrap(), which == "k");
        let d = distance(got.into_iter(), &want.data);
        assert!(d <= TOLERANCE, "{name} is off by {d}");
        tally.kv += 1;
        tally.worst_kv = tally.worst_kv.max(d);
    }
    tally
}

/// Keys or values of a script's block, `[n_kv_heads, len, head_dim]`; keys rotated from their index in
/// our block to that in the script's.
fn stored(engine: &Engine, blocks: &[BlockId], layer: usize, keys: bool) -> Vec<f64> {
    let config = engine.model().config();
    let (heads, dim) = (config.n_kv_heads, config.head_dim);
    let tensor = engine.cache.layer(layer)[usize::from(!keys)];
    let words = engine
        .model()
        .device()
        .read(tensor, 0, tensor.bytes())
        .unwrap();
    let arena: Vec<f32> = bytemuck::pod_collect_to_vec(&words);
    let (inv_freq, _) = config.inv_freq(engine.model().n_positions());
    let half = inv_freq.len();
    let order = config.head_order().unwrap_or_else(|| (0..dim).collect());
    let mut out = Vec::new();
    for head in 0..heads {
        let mut start = 0;
        for &block in blocks {
            let len = engine.cache.pages.len(block);
            for index in 0..len {
                let slot = engine.cache.pages.slot(block, index);
                assert_eq!(slot % PAGE, index % PAGE, "a page is contiguous");
                let at = (slot * heads + head) * dim;
                let mut token: Vec<f64> =
                    arena[at..at + dim].iter().map(|&v| f64::from(v)).collect();
                if keys {
                    let placed = token.clone();
                    for (&channel, number) in order.iter().zip(placed) {
                        token[channel] = number;
                    }
                    for (i, &inv_freq) in inv_freq.iter().enumerate() {
                        let (sin, cos) = (start as f64 * f64::from(inv_freq)).sin_cos();
                        let (a, b) = (token[i], token[i + half]);
                        token[i] = a * cos - b * sin;
                        token[i + half] = b * cos + a * sin;
                    }
                }
                out.extend(token);
            }
            start += len;
        }
    }
    out
}

fn run_all(device: Device) {
    let device = Arc::new(device);
    let (mut ran, mut unsupported) = (0, Vec::new());
    for case in golden::cases(&golden::dir()) {
        let mut engine = match engine(&device, &case) {
            Ok(engine) => engine,
            Err(error @ Error::Unsupported { .. }) => {
                println!("unsupported  {}: {error}", case.name);
                unsupported.push(case.name);
                continue;
            }
            Err(error) => panic!("{}: {error}", case.name),
        };
        let expected = case.expected();
        let tally = match &case.script {
            Script::Plain(plain) => run_plain(&mut engine, plain, &expected),
            Script::Hogwild(hogwild) => run_hogwild(&mut engine, hogwild, &expected),
        };
        println!("pass  {} on {}: {tally:?}", case.name, device.name());
        assert_eq!(tally.wrong, 0, "{}: greedy tokens differ", case.name);
        assert!(
            tally.logits > 0 && tally.greedy > 0,
            "{}: nothing was compared",
            case.name
        );
        ran += 1;
    }
    println!(
        "{ran} cases ran on {}, {} are unsupported",
        device.name(),
        unsupported.len()
    );
    assert!(ran > 0, "no case was found in {}", golden::dir().display());
}

#[test]
fn the_cpu_path_agrees_with_every_golden_case() {
    run_all(Device::cpu());
}

#[test]
fn the_adapter_agrees_with_every_golden_case() {
    if let Some(device) = adapter::adapter() {
        run_all(device);
    }
}

/// The built-in model's weights are stored in f16; the same numbers in f32 must give the same trace.
#[test]
fn the_trace_of_the_built_in_model_holds_for_f32_weights_too() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let cases = golden::cases("tests/golden".as_ref());
    let case = cases
        .iter()
        .find(|case| case.name == "demo_trace")
        .expect("the trace is committed");
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json"] {
        std::fs::copy(case.model_dir().join(name), folder.path().join(name)).unwrap();
    }
    let bytes = std::fs::read(case.model_dir().join("model.safetensors")).unwrap();
    let half = SafeTensors::deserialize(&bytes).unwrap();
    let widen = |data: &[u8]| -> Vec<u8> {
        let halves = data
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes([b[0], b[1]]));
        halves.flat_map(|v| v.to_f32().to_le_bytes()).collect()
    };
    let wide: Vec<(String, Vec<usize>, Vec<u8>)> = half
        .tensors()
        .iter()
        .map(|(name, t)| (name.clone(), t.shape().to_vec(), widen(t.data())))
        .collect();
    let views = wide.iter().map(|(name, shape, data)| {
        (
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), data).unwrap(),
        )
    });
    let file = folder.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &file).unwrap();
    let Script::Hogwild(script) = &case.script else {
        panic!("a run of workers")
    };
    for device in adapter::devices() {
        let mut engine = engine_of(&Arc::new(device), folder.path(), 0).unwrap();
        let tally = run_hogwild(&mut engine, script, &case.expected());
        assert!(tally.logits > 0 && tally.wrong == 0, "{tally:?}");
    }
}
