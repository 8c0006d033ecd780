//! The benches as a user meets them, on shapes so small that only the form of the answer counts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/adapter.rs"]
mod adapter;

use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn hogwild(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hogwild"))
        .args(args)
        .env_remove("RUST_LOG")
        .env_remove("HOGWILD_DEVICE")
        // Silences a layer of Mesa that writes to standard error.
        .env("NODEVICE_SELECT", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a run that must end well.
#[track_caller]
fn answer(args: &[&str]) -> String {
    let ran = hogwild(args);
    let err = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(0), "{err}");
    String::from_utf8(ran.stdout).unwrap()
}

#[track_caller]
fn problem(args: &[&str], code: i32) -> String {
    let ran = hogwild(args);
    let err = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(code), "{err}");
    err
}

const TINY: &[&str] = &["bench", "--shape", "tiny", "--device", "cpu", "--quick"];

fn tiny(more: &[&str]) -> Value {
    let answer = answer(&[TINY, &["--format", "json"], more].concat());
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn decode_is_measured_for_workers_and_contexts() {
    let json = tiny(&[
        "-w",
        "1,3",
        "-c",
        "64,200",
        "--passes",
        "2",
        "--weights",
        "awq",
    ]);
    assert_eq!(json["version"], 1);
    assert_eq!(json["model"], "tiny awq");
    assert!(
        json["copy_gb_per_s"].as_f64().unwrap() > 1e8,
        "bytes a second: {json}"
    );
    let rows = json["rows"].as_array().unwrap();
    let of = |row: usize, key: &str| rows[row][key].as_f64().unwrap();
    assert_eq!(rows.len(), 4, "two workers' counts, two contexts");
    for row in 0..4 {
        let workers = [1.0, 3.0][row % 2];
        let passes = of(row, "tokens_per_s") * of(row, "pass_s") / workers;
        assert!(
            (passes - 1.0).abs() < 1e-9,
            "a token of every worker a pass: {json}"
        );
        assert!(of(row, "host_s") <= of(row, "pass_s") * 10.0, "{json}");
    }
    let t1 = of(0, "pass_s") / of(1, "pass_s");
    assert!((of(1, "efficiency") - t1).abs() < 1e-9, "t1 / tW: {json}");
    assert!(
        (of(0, "efficiency") - 1.0).abs() < 1e-9,
        "one worker is the measure"
    );
}

#[test]
fn ops_attention_and_prefill_have_tables_of_their_own() {
    let ops = tiny(&["--per-op", "-w", "2", "-c", "64", "--passes", "1"]);
    let rows = ops["rows"].as_array().unwrap();
    let share: f64 = rows.iter().map(|r| r["share"].as_f64().unwrap()).sum();
    assert!(
        (share - 1.0).abs() < 1e-9,
        "the parts of a pass are the pass: {ops}"
    );
    assert!(
        rows.iter()
            .any(|r| r["op"] == "attend" && r["dispatches"] == 4.0),
        "{ops}"
    );

    let attention = tiny(&["attention", "-w", "2", "-c", "64", "--passes", "1"]);
    assert!(
        attention["rows"][0]["merge_s"].as_f64().unwrap() > 0.0,
        "{attention}"
    );
    assert_eq!(attention["layers_of_the_model"], 4.0, "one is measured");

    let prefill = tiny(&["prefill", "-c", "100", "--passes", "1"]);
    assert_eq!(prefill["rows"][0]["tokens"], 100.0);
}

#[test]
fn every_format_is_written_and_a_plot_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("plot.svg");
    let small = ["-w", "1", "-c", "64", "--passes", "1"];
    let plot = ["--svg", svg.to_str().unwrap(), "--format", "md"];
    let md = answer(&[TINY, &small, &plot].concat());
    assert!(md.contains("| context | workers | tokens/s |"), "{md}");
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(
        svg.starts_with("<svg") && svg.contains("1 workers"),
        "{svg}"
    );
    let csv = answer(&[TINY, &small, &["--format", "csv"]].concat());
    assert_eq!(csv.lines().count(), 2, "a header and a row: {csv}");
    assert!(
        answer(&["bench", "list"]).contains("\nqwq-32b\n"),
        "shapes are listed"
    );
}

#[test]
fn wrong_words_are_answered_with_the_right_ones() {
    let shape = problem(&["bench", "--shape", "qwen9", "--device", "cpu"], 2);
    assert!(
        shape.contains("qwen3-8b") && shape.contains(".json"),
        "{shape}"
    );
    let weights = problem(&["bench", "--weights", "fp3"], 2);
    assert!(
        weights.contains("awq, int8, fp8, f16, bf16 and f32"),
        "{weights}"
    );
    let file = problem(
        &[
            "bench",
            "--shape",
            "/nowhere/config.json",
            "--device",
            "cpu",
        ],
        3,
    );
    assert!(file.contains("/nowhere/config.json"), "{file}");
    let both = problem(&["kernels", "bench", "all", "--wgsl", "x.wgsl"], 2);
    assert!(both.contains("about one op"), "{both}");
}

const KERNELS: &[&str] = &[
    "kernels",
    "bench",
    "--shape",
    "tiny",
    "--weights",
    "f16",
    "-w",
    "1",
    "-c",
    "64",
    "--rounds",
    "1",
    "--format",
    "json",
];

#[test]
fn kernels_are_timed_on_what_a_pass_dispatches() {
    let json = answer(&[KERNELS, &["all", "--device", "cpu"]].concat());
    let json: Value = serde_json::from_str(&json).unwrap();
    let rows = json["rows"].as_array().unwrap();
    for op in hogwild::ops::OPS {
        // Queries and keys of this shape have norms, its channels are in their own order, and it has
        // neither experts nor latents.
        let elsewhere = [
            "qkv",
            "gather",
            "sample",
            "route",
            "expert_up",
            "expert_down",
            "heads",
            "latent",
        ];
        let elsewhere = elsewhere.contains(&op.name);
        assert_eq!(
            rows.iter().any(|r| r["op"] == op.name),
            !elsewhere,
            "{}",
            op.name
        );
    }
    assert!(
        rows.iter().all(|r| r["time_s"].as_f64().unwrap() > 0.0),
        "{json}"
    );
}

#[test]
fn a_file_is_timed_beside_its_kernel_if_it_computes_the_same() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.wgsl");
    let source = std::fs::read_to_string("shaders/rms_norm.wgsl").unwrap();
    let (name, file) = (device.name(), path.to_str().unwrap());
    let bench = [KERNELS, &["rms_norm", "--device", &name, "--wgsl", file]].concat();

    std::fs::write(&path, &source).unwrap();
    let json: Value = serde_json::from_str(&answer(&bench)).unwrap();
    let kernels: Vec<_> = json["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| &r["kernel"])
        .collect();
    assert_eq!(kernels[..2], ["row", "mine"], "side by side: {json}");

    std::fs::write(&path, source.replace("params.eps", "0.5")).unwrap();
    let refused = problem(&bench, 1);
    assert!(
        refused.contains("mine") && refused.contains("not timed"),
        "{refused}"
    );
}
