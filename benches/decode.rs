//! Passes per second of decoding with random weights: workers and context by row.
//!
//! `cargo bench --bench decode -- [--shape qwen3-0.6b|tiny] [--device cpu] [--weights bf16] [--workers 1,2,4]
//! [--context 1024] [--passes 10]`. Each row is a median with its spread, after a warm-up.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first problem")]
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use hogwild::cache::layout::{Layout, Shared};
use hogwild::cache::plan::{Batch, Logits, Turn};
use hogwild::device::{DType, Device};
use hogwild::model::{Config, Engine, Model};

#[derive(Parser)]
struct Args {
    /// `qwen3-0.6b` or `tiny`.
    #[arg(long, default_value = "qwen3-0.6b")]
    shape: String,
    /// `auto`, `cpu`, or part of an adapter's name.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Storage type of the weights: f32, f16 or bf16.
    #[arg(long, default_value = "bf16")]
    weights: String,
    /// Numbers of workers, comma-separated.
    #[arg(long, default_value = "1,2,4", value_delimiter = ',')]
    workers: Vec<usize>,
    /// Tokens in the history before the first measured pass.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Measured passes for each row.
    #[arg(long, default_value_t = 10)]
    passes: usize,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn config(shape: &str) -> Config {
    let json = match shape {
        "qwen3-0.6b" => {
            r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "max_position_embeddings": 40960, "tie_word_embeddings": true, "hidden_act": "silu"}"#
        }
        _ => {
            r#"{"model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 32, "vocab_size": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "max_position_embeddings": 40960, "tie_word_embeddings": true, "hidden_act": "silu"}"#
        }
    };
    Config::from_json(Path::new(shape), json.as_bytes()).unwrap()
}

fn main() {
    let args = Args::parse();
    let weights = match args.weights.as_str() {
        "f32" => DType::F32,
        "f16" => DType::F16,
        _ => DType::BF16,
    };
    let config = config(&args.shape);
    let device = Arc::new(Device::open(&args.device).unwrap());
    println!("{} {weights} on {}", args.shape, device.name());
    let started = Instant::now();
    let model = Model::random(device, &config, weights, args.context + 4096).unwrap();
    let model = Arc::new(model);
    println!("loaded in {:.1} s", started.elapsed().as_secs_f64());
    println!(
        "| workers | context | ms per pass | spread | passes/s | tokens/s | prefill tokens/s |"
    );
    println!("|--:|--:|--:|--:|--:|--:|--:|");
    for &workers in &args.workers {
        let pages = (args.context + 4096) / 16;
        let mut engine = Engine::new(model.clone(), DType::F16, pages, false).unwrap();
        let prompt = engine.cache.pages.open();
        let tokens: Vec<u32> = (0..args.context)
            .map(|i| u32::try_from(i * 37 % 4000).unwrap())
            .collect();
        let started = Instant::now();
        engine.prefill(prompt, &tokens, Logits::None).unwrap();
        let prefill = args.context as f64 / started.elapsed().as_secs_f64();
        engine.cache.pages.close(prompt);
        let shared = Shared {
            history: vec![prompt],
            header_others: engine.cache.pages.open(),
            header_own: engine.cache.pages.open(),
            own: (0..workers).map(|_| engine.cache.pages.open()).collect(),
        };
        let mut times = Vec::new();
        for pass in 0..args.passes + 2 {
            let turn = |w| Turn {
                view: Layout::Combined.view(w, &shared),
                tokens: vec![u32::try_from(pass * 31 + w).unwrap()],
                logits: Logits::Last,
            };
            let batch = Batch {
                turns: (0..workers).map(turn).collect(),
            };
            let started = Instant::now();
            let logits = engine.pass(&batch).unwrap();
            times.push(started.elapsed().as_secs_f64() * 1e3);
            assert!(
                logits.iter().flatten().all(|v| v.is_finite()),
                "logits are numbers"
            );
        }
        times.drain(..2);
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let spread = times[times.len() - 1] - times[0];
        println!(
            "| {workers} | {} | {median:.1} | {spread:.1} | {:.2} | {:.2} | {prefill:.1} |",
            args.context,
            1e3 / median,
            1e3 / median * workers as f64,
        );
    }
}
