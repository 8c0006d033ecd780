//! Ratios of times on the software driver, each pair measured in turns in one process.
//!
//! What is compared is the processor time of all threads of this process: on a software driver that is
//! the work itself, whatever else the machine does. `cargo test --test ratios -- --nocapture` prints every
//! ratio beside its bound, and the wall time's.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    clippy::print_stdout,
    reason = "what a test measures is for people, too"
)]

#[path = "common/adapter.rs"]
mod adapter;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hogwild::cache::layout::{Layout, Shared};
use hogwild::cache::plan::{Batch, Logits, Turn, plan};
use hogwild::device::{DType, Device, Dispatch, Kernel, Recording, Run, Wgsl, always};
use hogwild::model::{Config, Engine, Model, RandomWeights, Scratch};
use hogwild::ops::linear::By;

use adapter::adapter;

/// One measurement at a time: the clock counts all threads.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Processor time of all threads of this process in seconds, and the wall clock's.
fn clocks(since: Instant) -> [f64; 2] {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let ran = |thread: std::io::Result<std::fs::DirEntry>| -> Option<f64> {
        // Nanoseconds on a processor, nanoseconds of waiting for one, time slices.
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    let nanoseconds: f64 = threads.filter_map(ran).sum();
    [nanoseconds / 1e9, since.elapsed().as_secs_f64()]
}

/// Median of a list.
fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// Time of the second over that of the first, in processor time: both run in turns, after a warm-up.
fn ratio(what: &str, bound: f64, rounds: usize, runs: [&mut dyn FnMut(); 2]) -> f64 {
    let started = Instant::now();
    let [first, second] = runs;
    let mut times = [const { Vec::new() }; 4];
    for round in 0..=rounds {
        for (i, run) in [&mut *first, &mut *second].into_iter().enumerate() {
            let before = clocks(started);
            run();
            let after = clocks(started);
            if round > 0 {
                times[i].push(after[0] - before[0]);
                times[2 + i].push(after[1] - before[1]);
            }
        }
    }
    let [a, b, wall_a, wall_b] = times.map(median);
    println!(
        "{what}: {:.1} ms over {:.1} ms is {:.3} (at most {bound}); wall {:.1} over {:.1}, {:.3}",
        b * 1e3,
        a * 1e3,
        b / a,
        wall_b * 1e3,
        wall_a * 1e3,
        wall_b / wall_a
    );
    b / a
}

fn config(json: &str) -> Config {
    Config::from_json(Path::new("ratios"), json.as_bytes()).unwrap()
}

/// One layer with the heads of QwQ-32B, and little else.
fn attention_config() -> Config {
    config(
        r#"{"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "tie_word_embeddings": true, "hidden_act": "silu"}"#,
    )
}

fn model(device: Device, config: &Config, dtype: DType) -> Arc<Model> {
    shared_model(Arc::new(device), config, dtype)
}

fn shared_model(device: Arc<Device>, config: &Config, dtype: DType) -> Arc<Model> {
    let weights = RandomWeights {
        dtype,
        shared: false,
    };
    Arc::new(Model::random(device, config, weights, 8192).unwrap())
}

/// A recorded pass over a history of closed blocks of the given lengths.
struct Pass {
    device: Arc<Device>,
    recording: Recording,
    /// Keeps the cache's and the pass's tensors alive.
    _engine: Engine,
    _scratch: Scratch,
}

impl Pass {
    fn new(model: &Arc<Model>, history: &[usize], workers: usize) -> Self {
        let pages: usize = history.iter().map(|n| n.div_ceil(16)).sum();
        let mut engine = Engine::new(model.clone(), DType::F16, pages + 16, false).unwrap();
        let cache = &mut engine.cache;
        let block = |n: usize, cache: &mut hogwild::cache::KvCache| {
            let block = cache.pages.open();
            cache.pages.extend(block, n).unwrap();
            block
        };
        let history: Vec<_> = history.iter().map(|&n| block(n, cache)).collect();
        for &block in &history {
            cache.pages.close(block);
        }
        let shared = Shared {
            history,
            header_others: block(3, cache),
            header_own: block(3, cache),
            own: (0..workers).map(|_| block(1, cache)).collect(),
        };
        let turns = (0..workers).map(|w| Turn {
            view: Layout::Combined.view(w, &shared),
            tokens: vec![7],
            logits: Logits::Last,
        });
        let batch = Batch {
            turns: turns.collect(),
        };
        let plan = plan(&cache.pages, &batch, model.rows_per_work(), model.windows());
        let mut scratch = Scratch::default();
        let recording = model
            .forward(&plan, By::Columns, cache, &mut scratch)
            .unwrap();
        Self {
            device: model.device().clone(),
            recording,
            _engine: engine,
            _scratch: scratch,
        }
    }

    /// Keeps only the dispatches of some ops.
    fn only(mut self, ops: &[&str]) -> Self {
        self.recording
            .dispatches
            .retain(|d| ops.contains(&d.op.name));
        assert!(
            self.recording.dispatches.len() >= ops.len(),
            "the pass has these ops"
        );
        self
    }

    /// Plays it and waits for the end.
    fn play(&self) {
        self.device.play(&self.recording).unwrap();
        let last = self.recording.dispatches.last().unwrap();
        self.device.read(last.args.last().unwrap(), 0, 4).unwrap();
    }
}

#[test]
fn a_history_of_500_short_steps_costs_what_one_block_costs() {
    let Some(device) = adapter() else { return };
    let _alone = alone();
    let model = model(device, &attention_config(), DType::F32);
    // Between 1 and 15 tokens, in no order.
    let steps: Vec<usize> = (0..500).map(|i| 1 + i * 7 % 15).collect();
    let total: usize = steps.iter().sum();
    let mut over = Vec::new();
    for workers in [1, 4] {
        let attention = |history: &[usize]| {
            let pass = Pass::new(&model, history, workers);
            pass.only(&["attend", "merge"])
        };
        let (one, many) = (attention(&[total]), attention(&steps));
        let what = format!("{workers} workers, {total} keys in 500 blocks over one block");
        let ratio = ratio(&what, 1.35, 9, [&mut || one.play(), &mut || many.play()]);
        if ratio > 1.35 {
            over.push(format!("{what}: {ratio:.2}"));
        }
    }
    assert!(over.is_empty(), "{}", over.join("; "));
}

/// A dense model whose weights are what a pass is about.
fn dense_config() -> Config {
    config(
        r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "tie_word_embeddings": true, "hidden_act": "silu"}"#,
    )
}

#[test]
fn four_workers_cost_at_most_three_times_one() {
    let Some(device) = adapter() else { return };
    let _alone = alone();
    let model = model(device, &dense_config(), DType::F16);
    let [one, four] = [1, 4].map(|workers| Pass::new(&model, &[256], workers));
    let what = "a pass of 4 workers over one of 1";
    let ratio = ratio(what, 3.0, 9, [&mut || one.play(), &mut || four.play()]);
    assert!(ratio <= 3.0, "{what}: {ratio:.2}");
}

/// The projection of one row by f16 weights and nothing else: no columns, no norm, no codes.
const ONE_ROW: &str = "// uses: project_op
@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let width = params.k / 8u;
    for (var i = subgroup; i < QUADS; i += num_subgroups) {
        let quad = group.x * QUADS + i;
        let rows = quad_rows(min(quad, n_quads() - 1u));
        var sums = vec4<f32>();
        for (var j = lane; j < width; j += lanes) {
            let a = x[j * 2u];
            let b = x[j * 2u + 1u];
            for (var r = 0u; r < 4u; r++) {
                let w = weight[rows[r] * width + j];
                sums[r] += dot(weight8_lo(w), a) + dot(weight8_hi(w), b);
            }
        }
        sums = subgroupAdd(sums);
        if lane == 0u && quad < n_quads() {
            finish(quad, 0u, sums);
        }
    }
}
";

#[test]
fn one_worker_costs_what_a_kernel_for_one_row_costs() {
    let Some(device) = adapter() else { return };
    let _alone = alone();
    let model = model(device, &dense_config(), DType::F16);
    let pass = Pass::new(&model, &[256], 1).only(&["project"]);
    // The widest that is added to its output: the projection down.
    let matrix = |d: &&Dispatch| d.args[2].shape() == [1024, 3072];
    let down = pass.recording.dispatches.iter().find(matrix).unwrap();
    let listed = model.device().kernel(down).unwrap().unwrap();
    let Run::Wgsl(wgsl) = &listed.run else {
        panic!("an adapter runs shaders")
    };
    let own = Kernel {
        name: "one row",
        run: Run::Wgsl(Wgsl {
            file: "one_row.wgsl",
            source: ONE_ROW,
            loads: None,
            ..*wgsl
        }),
        fits: always,
    };
    let (device, y) = (model.device(), &down.args[5]);
    let result = |kernel: &Kernel| {
        device.write(y, 0, &vec![0; y.bytes()]).unwrap();
        device.run(down, kernel).unwrap();
        device.read_f32(y, 1024).unwrap()
    };
    let (a, b) = (result(&own), result(listed));
    assert!(a.iter().any(|v| v.abs() > 0.1), "it computes something");
    assert!(
        a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3),
        "both compute the same"
    );
    let repeat = |kernel: &Kernel| {
        for _ in 0..10 {
            device.run(down, kernel).unwrap();
        }
        device.finish().unwrap();
    };
    let what = "a row by the kernel for any number over one by a kernel for one";
    let ratio = ratio(
        what,
        1.1,
        15,
        [&mut || repeat(&own), &mut || repeat(listed)],
    );
    assert!(ratio <= 1.1, "{what}: {ratio:.2}");
}

#[test]
fn codes_of_four_bits_cost_no_more_than_f16() {
    let Some(device) = adapter() else { return };
    let _alone = alone();
    let device = Arc::new(device);
    let pass = |dtype| {
        let model = shared_model(device.clone(), &dense_config(), dtype);
        Pass::new(&model, &[64], 1).only(&["project", "gate_up"])
    };
    let (halves, codes) = (pass(DType::F16), pass(DType::U4));
    let what = "matrices of a pass in int4 over those in f16";
    let ratio = ratio(what, 1.0, 9, [&mut || halves.play(), &mut || codes.play()]);
    assert!(ratio <= 1.0, "{what}: {ratio:.2}");
}
