//! Memory: what a model needs, what a loader takes, and what happens where there is not enough.

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
#[path = "../examples/collaboration/scenes.rs"]
mod scenes;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::packed::{self, Order, Packing, Style};
use common::tiny::{TinyLatent, TinyModel};
use hogwild::cache::layout::Layout;
use hogwild::demo::Problem;
use hogwild::device::{DType, Device};
use hogwild::model::memory::{self, Need, Room};
use hogwild::model::quantize::{Options, quantize};
use hogwild::model::{Model, ModelFiles};
use hogwild::protocol::NAMES;
use hogwild::session::{Event, Log, ModelName, RulesName, read_log};
use hogwild::{Error, demo};
use safetensors::Dtype;
use scenes::Stage;
use serde_json::{Map, json};

#[test]
fn weights_are_counted_as_they_are_stored() {
    let device = Arc::new(Device::cpu());
    let packing = |style, order, float| Packing {
        style,
        order,
        float,
        ..Packing::default()
    };
    let cases = [
        ("float", None),
        ("awq", Some(packing(Style::Awq, Order::Plain, &[]))),
        ("gptq", Some(packing(Style::Gptq, Order::Plain, &[]))),
        (
            "fp8",
            Some(Packing {
                rows: Some(64),
                group: Some(64),
                ..packing(Style::Fp8, Order::Plain, &[])
            }),
        ),
        (
            "a float among codes",
            Some(packing(Style::Awq, Order::Plain, &["k_proj.weight"])),
        ),
    ];
    for tied in [false, true] {
        for (name, packing) in &cases {
            let dir = tempfile::tempdir().unwrap();
            let [float, packed, twin] = ["float", "packed", "twin"].map(|n| dir.path().join(n));
            let model = TinyModel {
                hidden: 96,
                ff: 168,
                dtype: Dtype::F16,
                qk_norm: tied,
                tied,
                ..TinyModel::default()
            };
            model.write(&float, name);
            let at = match packing {
                None => &float,
                Some(packing) => {
                    packed::pack(&float, &packed, &twin, packing);
                    &packed
                }
            };
            let files = ModelFiles::open(at).unwrap();
            let model = Model::load(device.clone(), &files, 64, &mut |_| {}).unwrap();
            let counted = Need::of(&files, 64, DType::F16).weights;
            // A word that stands in for the scales of floats.
            let slack = counted.abs_diff(model.stored_bytes());
            assert!(
                slack <= 4,
                "{name}, tied {tied}: {counted} for {}",
                model.stored_bytes()
            );
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyModel {
        hidden: 512,
        ff: 2048,
        head_dim: 64,
        ..TinyModel::default()
    };
    model.write(dir.path(), "refused");
    let files = ModelFiles::open(dir.path()).unwrap();
    let said = |context, kv, have: u64| {
        let room = Room {
            device: "some device".to_owned(),
            bytes: Some(have),
            pool: 0,
        };
        let result = memory::place(&files, context, kv, None, &[room], Vec::new);
        result.map(drop).map_err(|error| error.to_string())
    };
    let need = |context, kv| Need::of(&files, context, kv);
    // What is needed is a sixteenth less than there must be.
    let enough = |need: Need| need.total() / 15 * 16 + 16;

    let full = need(100_000, DType::F32);
    assert_eq!(said(100_000, DType::F32, enough(full)), Ok(()), "it fits");
    let line = said(100_000, DType::F32, enough(full) - 1_000).unwrap_err();
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    for word in [
        "the model with a context of 100000 tokens".to_owned(),
        format!("needs {} (weights {}", gb(full.total()), gb(full.weights)),
        "free on some device".to_owned(),
        "--kv-dtype f16 would fit".to_owned(),
    ] {
        assert!(line.contains(&word), "no '{word}' in: {line}");
    }
    // The advice holds, and is the most that does.
    let number = |line: &str| -> usize {
        let at = line.find("--context ").unwrap() + 10;
        line[at..].split(' ').next().unwrap().parse().unwrap()
    };
    let have = enough(need(40_000, DType::F16));
    let line = said(100_000, DType::F16, have).unwrap_err();
    let most = number(&line);
    assert!((39_000..=41_000).contains(&most), "{line}");
    assert_eq!(said(most, DType::F16, have), Ok(()), "as advised");
    said(most + 600, DType::F16, have).expect_err("much more does not fit");

    // Weights alone are too many: quantised ones are not.
    let small = need(512, DType::F16);
    let have = enough(Need {
        weights: small.weights / 2,
        ..small
    });
    let line = said(512, DType::F16, have).unwrap_err();
    assert!(
        !line.contains("--context") && line.contains("`hogwild quantize --bits 8`"),
        "{line}"
    );
    let line = said(512, DType::F16, 1 << 20).unwrap_err();
    assert!(line.ends_with("use another --device"), "{line}");
    // Absurd numbers are large, not wrong.
    let line = said(1 << 28, DType::F32, u64::MAX / 1024 / 1024 / 1024 * 16).unwrap_err();
    assert!(line.contains("needs"), "{line}");
}

#[test]
fn the_command_refuses_before_it_loads() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyModel {
        head_dim: 256,
        kv_heads: 4,
        ..TinyModel::default()
    };
    model.write(dir.path(), "refused");
    let mut config = packed::config(dir.path());
    config["max_position_embeddings"] = json!(1 << 28);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::copy(
        "tests/golden/models/tokenizer/tokenizer.json",
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_hogwild"))
        .args([
            "generate",
            "--raw",
            "a",
            "--device",
            "cpu",
            "--context",
            "268435456",
            "--kv-dtype",
            "f32",
            "-m",
        ])
        .arg(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in [
        "a context of 268435456 tokens needs",
        "cache 5",
        "GB free on cpu",
        "--context",
    ] {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
    assert!(output.stdout.is_empty(), "nothing was written");
}

/// A checkpoint of zeros, which takes no room on disk: `F16` floats or the tensors of AWQ.
fn zeros(dir: &Path, awq: bool) {
    let (hidden, ff, layers, vocab, heads) = (1024usize, 4096usize, 5usize, 8192usize, 16usize);
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": ff, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocab, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true,
    });
    if awq {
        config["quantization_config"] =
            json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"});
    }
    let (mut header, mut at) = (Map::new(), 0);
    let mut add = |name: String, dtype: &str, size: usize, shape: &[usize]| {
        let end = at + size * shape.iter().product::<usize>();
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]});
        header.insert(name, entry);
        at = end;
    };
    add(
        "model.embed_tokens.weight".into(),
        "F16",
        2,
        &[vocab, hidden],
    );
    add("model.norm.weight".into(), "F16", 2, &[hidden]);
    for layer in 0..layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for norm in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            add(name(norm), "F16", 2, &[hidden]);
        }
        let square = [hidden, hidden];
        for (part, [n, k]) in [
            ("self_attn.q_proj", square),
            ("self_attn.k_proj", square),
            ("self_attn.v_proj", square),
            ("self_attn.o_proj", square),
            ("mlp.gate_proj", [ff, hidden]),
            ("mlp.up_proj", [ff, hidden]),
            ("mlp.down_proj", [hidden, ff]),
        ] {
            if awq {
                add(name(&format!("{part}.qweight")), "I32", 4, &[k, n / 8]);
                add(name(&format!("{part}.qzeros")), "I32", 4, &[k / 128, n / 8]);
                add(name(&format!("{part}.scales")), "F16", 2, &[k / 128, n]);
            } else {
                add(name(&format!("{part}.weight")), "F16", 2, &[n, k]);
            }
        }
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let text = serde_json::Value::Object(header).to_string();
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.set_len((8 + text.len() + at) as u64).unwrap();
}

/// The most memory that this process ever had, in bytes; none where the system does not say.
fn peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Set in the process that only loads: the folder.
const LOADER: &str = "HOGWILD_TEST_LOADER";

/// Set beside it if that process quantises: the folder to make.
const QUANTISED: &str = "HOGWILD_TEST_QUANTISED";

/// Loads or quantises a folder in a process of its own, and prints what it took.
#[test]
fn loader() {
    let Some(dir) = std::env::var_os(LOADER) else {
        return;
    };
    let device = Arc::new(Device::cpu());
    let files = ModelFiles::open(dir).unwrap();
    let before = peak().unwrap();
    if let Some(to) = std::env::var_os(QUANTISED) {
        quantize(&files, to.as_ref(), Options::default(), &mut |_| {}).unwrap();
        println!("TOOK {} 0", peak().unwrap() - before);
        return;
    }
    let model = Model::load(device, &files, 64, &mut |_| {}).unwrap();
    println!("TOOK {} {}", peak().unwrap() - before, model.stored_bytes());
}

/// What [`loader`] took at most, and what of it are weights; none where the system does not say.
fn took(dir: &Path, quantised: Option<&Path>) -> Option<(u64, u64)> {
    if peak().is_none() {
        println!("skipped: the system does not say how much memory a process had");
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "loader", "--nocapture"]);
    command.env(LOADER, dir);
    if let Some(to) = quantised {
        command.env(QUANTISED, to);
    }
    let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let line = said.lines().find_map(|line| line.split_once("TOOK "));
    let (_, numbers) = line.unwrap_or_else(|| panic!("said: {said}"));
    let (took, stored) = numbers.split_once(' ').unwrap();
    Some((took.parse().unwrap(), stored.parse().unwrap()))
}

#[test]
fn quantising_holds_a_band_of_rows() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["from", "to"].map(|n| dir.path().join(n));
    fs::create_dir(&from).unwrap();
    zeros(&from, false);
    let Some((took, _)) = took(&from, Some(&to)) else {
        return;
    };
    let bytes = ModelFiles::open(&from).unwrap().weight_bytes();
    println!("{took} bytes to quantise {bytes}");
    assert!(
        took <= 96 << 20 && bytes > 2 * took,
        "{took} bytes of {bytes}"
    );
    hogwild::model::check(&to).unwrap();
}

#[test]
fn loading_takes_little_more_than_the_weights() {
    for awq in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        zeros(dir.path(), awq);
        let Some((took, stored)) = took(dir.path(), None) else {
            return;
        };
        let files = ModelFiles::open(dir.path()).unwrap();
        let tensors = files.checkpoint.tensors().values();
        let largest = tensors.map(|t| t.len).max().unwrap();
        println!(
            "awq {awq}: {took} bytes at most, {stored} of them weights, {largest} the largest tensor"
        );
        // The promise is 512 MiB beside the largest tensor; pieces are of 16 MiB.
        let most = stored + largest + (64 << 20);
        assert!(
            took <= most,
            "awq {awq}: {took} bytes, expected {most} at most"
        );
        // On the CPU path the weights are in this memory: the measure measures.
        assert!(
            took >= stored,
            "awq {awq}: {took} bytes for weights of {stored}"
        );
    }
}

#[test]
fn a_lost_device_ends_the_session_with_its_pass_and_leaves_the_log_whole() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let device = Arc::new(device);
    let stage = Stage::new(device.clone(), "f16").unwrap();
    let problem = Problem::random(7, 4);
    let mut session = stage
        .session(&problem, &NAMES[..2], Layout::Combined)
        .unwrap();
    let model = ModelName {
        directory: demo::NAME.to_owned(),
        hash: demo::files().unwrap().hash(),
    };
    let header = session.header(model, RulesName::new("main", &demo::rules()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    let mut log = Log::new(File::create(&path).unwrap(), &header).unwrap();
    let mut seen: Vec<Event> = Vec::new();
    for _ in 0..5 {
        let events = session.step(&[]).unwrap();
        log.append(&events).unwrap();
        seen.extend(events);
    }
    device.lose();
    let error = session.step(&[]).expect_err("there is no device any more");
    println!("{error}");
    assert!(matches!(error, Error::Device { .. }), "{error:?}");
    assert!(error.to_string().contains("in pass 5: was lost"), "{error}");
    assert_eq!(error.exit_code(), 4, "the exit code of devices");
    // Again is no panic either, and the log has all that happened.
    let _ = session.step(&[]);
    let (_, logged) = read_log(&path).unwrap();
    assert_eq!(logged, seen, "every event before the loss");
}
