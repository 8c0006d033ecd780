//! `hogwild generate` and `hogwild replay` as a user or a script meets them: the built binary on a
//! small committed model, on the CPU path, and on the adapter where a test says so.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(clippy::too_many_lines, reason = "tables are as long as they are")]

#[path = "common/adapter.rs"]
mod adapter;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Two layers, 485 tokens, with a tokenizer and a chat template.
const MODEL: &str = "tests/golden/e2e_reference_loop/model";

/// No damaged or hostile directory may keep anybody busy for longer.
const PATIENCE: Duration = Duration::from_secs(10);

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hogwild"));
    command
        .args(args)
        .env_remove("RUST_LOG")
        .env_remove("HOGWILD_DEVICE")
        .env_remove("NO_COLOR")
        .env_remove("CLICOLOR_FORCE")
        // Silences a layer of Mesa that writes to standard error.
        .env("NODEVICE_SELECT", "1")
        .stdin(Stdio::null());
    command
}

fn finish(mut command: Command) -> Ran {
    let ran = command.output().unwrap();
    let err = String::from_utf8(ran.stderr).unwrap();
    assert!(!err.contains("panicked"), "{err}");
    Ran {
        code: ran.status.code(),
        out: String::from_utf8(ran.stdout).unwrap(),
        err,
    }
}

fn hogwild(args: &[&str]) -> Ran {
    finish(command(args))
}

/// `generate` on the CPU path with the small model.
fn generate(more: &[&str]) -> Ran {
    finish(command(&generate_args(MODEL, more)))
}

fn generate_args<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["generate", "-m", model, "--device", "cpu"];
    args.extend(more);
    args
}

impl Ran {
    /// The one line of an error, which is all that standard error has.
    #[track_caller]
    fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        let line = self.err.strip_suffix('\n').unwrap();
        assert!(
            line.starts_with("hogwild: error: ") && !line.contains('\n'),
            "one line: {line}"
        );
        line
    }

    #[track_caller]
    fn success(&self) -> &str {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        &self.out
    }
}

/// A file in a folder that outlives the test's commands.
fn file(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> String {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A prompt of one line, so that a test is quick.
fn short_prompt(folder: &TempDir) -> String {
    file(folder, "short.txt", "{problem}\n")
}

/// A writable copy of the small model.
fn copy() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(MODEL).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn json_file(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn edit(folder: &TempDir, name: &str, change: impl FnOnce(&mut Value)) {
    let mut value = json_file(folder.path().join(name));
    change(&mut value);
    file(folder, name, value.to_string());
}

/// The header of a log.
fn header(log: &str) -> Value {
    serde_json::from_str(log.lines().next().unwrap()).unwrap()
}

#[test]
fn a_problem_is_an_argument_a_file_or_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let path = file(&folder, "problem.txt", "What is 2+2?\n");
    let common = ["-n", "3", "--temp", "0", "--seed", "1", "--prompt", &style];
    let with = |more: &[&str]| generate(&[&common, more].concat()).success().to_owned();
    let argument = with(&["What is 2+2?"]);
    assert_eq!(argument, with(&["-f", &path]), "a file");
    let mut child = command(&generate_args(MODEL, &[&common[..], &["-"]].concat()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"  What is 2+2?\n\n").unwrap();
    drop(stdin);
    let out = child.wait_with_output().unwrap().stdout;
    assert_eq!(argument.as_bytes(), out, "standard input");
}

#[test]
fn problems_that_are_none_are_usage_errors() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = file(&folder, "bytes.txt", b"\xff\xfe");
    let long = file(&folder, "long.txt", vec![b'a'; (1 << 20) + 1]);
    let rows: [(&[&str], &str); 6] = [
        (&[], "no problem was given"),
        (&[""], "the problem is empty"),
        (&[" \n\t"], "the problem is empty"),
        (&["-"], "the problem is empty"),
        (&["-f", &bytes], "bytes.txt: is not UTF-8"),
        (&["-f", &long], "long.txt: is longer than 1048576 bytes"),
    ];
    for (args, words) in rows {
        let ran = generate(args);
        assert!(ran.error(2).contains(words), "{args:?}: {}", ran.err);
    }
    let missing = folder.path().join("missing.txt");
    let ran = generate(&["-f", missing.to_str().unwrap()]);
    assert!(ran.error(1).contains("missing.txt: "), "{}", ran.err);
    let ran = generate(&["-f", folder.path().to_str().unwrap()]);
    assert!(ran.error(1).contains("directory"), "{}", ran.err);
    let ran = hogwild(&["generate", "x"]);
    assert!(
        ran.error(2).contains("the built-in model only adds up"),
        "{}",
        ran.err
    );
}

#[test]
fn values_that_make_no_sense_are_usage_errors() {
    let rows: [(&[&str], &str); 20] = [
        (&["-w", "0"], "1..=16"),
        (&["-w", "17"], "1..=16"),
        (&["-w", "two"], "two"),
        (&["-w", "3", "--names", "A,B"], "3 workers"),
        (&["--names", "A,A"], "\"A\": two workers have it"),
        (&["--names", "A,"], "it is empty"),
        (&["--names", "A*"], "\"A*\""),
        (&["--names", "A,B\u{7}"], "control character"),
        (&["--names", "<|eos|>"], "control token"),
        (&["--names", "A,B,C,D,E,F,G,H,I,J,K,L,M,N,O,P,Q"], "1 to 16"),
        (&["--rules", "old"], "'old'; give main or fast"),
        (&["--layout", "ring"], "'ring'"),
        (&["--kv-dtype", "q4"], "'q4'; give f16, bf16 or f32"),
        (&["--answer", "song"], "number, digits, text or code"),
        (&["--temp", "-1"], "temperature is -1"),
        (&["--temp", "nan"], "temperature is NaN"),
        (&["--top-p", "1.5"], "top-p is 1.5"),
        (&["--min-p", "-1"], "min-p is -1"),
        (&["-n", "0"], "--max-passes"),
        (&["--raw", "-w", "2"], "--workers"),
    ];
    for (args, words) in rows {
        let ran = generate(&[args, &["x"]].concat());
        assert_eq!((ran.code, &*ran.out), (Some(2), ""), "{args:?}");
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
    }
}

#[test]
fn a_context_that_is_too_small_or_too_large_is_refused_with_numbers() {
    let rows: [(&[&str], &str); 4] = [
        (&["--context", "10", "x"], "a context of 10;"),
        (&["--context", "4097", "x"], "4097 positions"),
        (&[&"abc ".repeat(3000)], "a context of 4096;"),
        (&["--raw", &"abc ".repeat(3000)], "a context of 4096;"),
    ];
    for (args, words) in rows {
        let ran = generate(args);
        assert!(ran.error(1).contains(words), "{}", ran.err);
    }
}

#[test]
fn every_number_of_workers_writes() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    for n in ["1", "2", "16"] {
        let ran = generate(&["-w", n, "-n", "2", "--prompt", &style, "hi"]);
        let out = ran.success();
        let writers = out.lines().filter(|l| l.starts_with('[')).count();
        assert!(writers.to_string() == n, "{n}: {out}");
        assert!(out.contains("[Alice 1] Hi, I'm Alice."), "{out}");
    }
    let ran = generate(&["--names", "Zoë, R2 D2", "-n", "2", "--prompt", &style, "hi"]);
    let out = ran.success();
    assert!(
        out.contains("[Zoë 1] Hi, I'm Zoë.") && out.contains("[R2 D2 1] Hi, I'm R2 D2."),
        "{out}"
    );
}

#[test]
fn every_layout_rule_cache_type_and_kind_of_answer_runs() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    for (option, values) in [
        ("--layout", &["combined", "contiguous", "interleaved"][..]),
        ("--rules", &["main", "fast"]),
        ("--kv-dtype", &["f16", "bf16", "f32"]),
        ("--answer", &["number", "digits", "text", "code"]),
        ("--check-every", &["0", "18446744073709551615"]),
    ] {
        for value in values {
            let ran = generate(&[option, value, "-n", "2", "--prompt", &style, "hi"]);
            assert!(ran.success().contains("[Bob 1] "), "{option} {value}");
        }
    }
    for flag in ["--no-early-answer", "--no-chat-template"] {
        let ran = generate(&[flag, "-n", "2", "--prompt", &style, "hi"]);
        assert!(ran.success().contains("[Bob 1] "), "{flag}");
    }
}

#[test]
fn standard_output_has_the_text_and_the_answer_only() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let problem = "Say \\boxed{7}";
    let args = ["-n", "2", "--seed", "5", "--prompt", &style, problem];
    let ran = generate(&args);
    let out = ran.success();
    assert!(out.ends_with("\n\nAnswer: 7\n"), "{out}");
    for line in out.trim_end().lines() {
        let known = ["[Alice ", "[Bob ", "    ", "Answer: "];
        assert!(
            line.is_empty() || known.iter().any(|k| line.starts_with(k)),
            "{line:?} of {out}"
        );
    }
    assert!(ran.err.contains("hogwild: seed 5\n"), "{}", ran.err);
    assert!(ran.err.contains(" passes/s, "), "{}", ran.err);
    assert!(!ran.err.contains('\x1b'), "no terminal: {}", ran.err);
    let quiet = generate(&[&args[..], &["-q"]].concat());
    assert_eq!((quiet.success(), &*quiet.err), (out, ""), "--quiet");
}

#[test]
fn a_step_is_printed_when_it_is_finished_and_the_rest_at_the_end() {
    let ran = generate(&["-n", "200", "--temp", "1", "--seed", "3", "x", "--jsonl"]);
    let events: Vec<Value> = ran
        .success()
        .lines()
        .skip(1)
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let mut want: Vec<String> = Vec::new();
    for event in events.iter().filter(|e| e["event"] == "step_closed") {
        let name = ["Alice", "Bob"][usize::try_from(event["worker"].as_u64().unwrap()).unwrap()];
        want.push(format!("[{name} {}]", event["step"]));
    }
    assert!(want.len() > 2, "the model ends steps");
    let ran = generate(&["-n", "200", "--temp", "1", "--seed", "3", "x"]);
    let labels: Vec<&str> = ran
        .success()
        .lines()
        .filter(|l| l.starts_with("[Alice ") || l.starts_with("[Bob "))
        .map(|l| &l[..=l.find(']').unwrap()])
        .collect();
    assert_eq!(&labels[..want.len()], &want[..], "in the order they end");
    assert!(labels.len() <= want.len() + 2, "then the unfinished ones");
}

#[test]
fn the_same_seed_gives_the_same_text_and_another_another() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let common = ["-n", "12", "--temp", "1", "--prompt", &style, "x"];
    let fresh = generate(&common);
    let seed = fresh
        .err
        .lines()
        .find_map(|l| l.strip_prefix("hogwild: seed "));
    let again = generate(&[&common[..], &["--seed", seed.unwrap()]].concat());
    assert_eq!(fresh.success(), again.success(), "the reported seed");
    let one = generate(&[&common[..], &["--seed", "1"]].concat());
    let two = generate(&[&common[..], &["--seed", "2"]].concat());
    assert_ne!(one.success(), two.success(), "another seed");
    let raw = ["--raw", "-n", "12", "--temp", "1", "--seed", "9", "x"];
    assert_eq!(generate(&raw).success(), generate(&raw).success(), "--raw");
}

#[test]
fn raw_continues_a_text_as_it_is() {
    let ran = generate(&["--raw", "-n", "5", "--jsonl", "Once upon"]);
    let log = ran.success().to_owned();
    assert_eq!(header(&log)["rules"], Value::Null, "no prompts");
    assert_eq!(header(&log)["names"], json!([]), "nobody's name");
    let ran = generate(&["--raw", "-n", "5", "Once upon"]);
    let text: String = log
        .lines()
        .skip(1)
        .filter_map(|l| {
            let event: Value = serde_json::from_str(l).unwrap();
            Some(event["text"].as_str()?.to_owned())
        })
        .collect();
    assert_eq!(ran.success(), format!("Once upon{text}\n"));
    let ran = generate(&["--raw", ""]);
    assert!(ran.error(2).contains("no text to continue"), "{}", ran.err);
}

#[test]
fn a_text_ends_with_the_ids_of_every_file_and_never_has_one_of_the_padding() {
    use safetensors::tensor::{SafeTensors, TensorView};
    let folder = copy();
    // Rows behind the vocabulary's end, of which one would always be the likeliest.
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let mut tensors: Vec<_> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, t)| {
            (
                name.to_owned(),
                t.dtype(),
                t.shape().to_vec(),
                t.data().to_vec(),
            )
        })
        .collect();
    for (name, _, shape, data) in &mut tensors {
        if shape[0] == 485 {
            for row in shape[0]..512 {
                let weight = if row % 2 == 0 { 9.0 } else { -9.0 };
                let weight = half::bf16::from_f32(weight).to_le_bytes();
                data.extend(weight.repeat(shape[1]));
            }
            shape[0] = 512;
            assert_eq!(data.len(), 2 * shape[0] * shape[1], "{name} is in bf16");
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    edit(&folder, "config.json", |config| {
        config["vocab_size"] = json!(512);
        config["eos_token_id"] = json!([7, 482]);
    });
    edit(&folder, "generation_config.json", |config| {
        config["eos_token_id"] = json!(9);
    });

    let run = |model: &str| {
        let log = folder.path().join("log");
        let log = log.to_str().unwrap();
        let more = ["--raw", "-n", "6", "--temp", "0", "--log", log, "Once upon"];
        let out = finish(command(&generate_args(model, &more)))
            .success()
            .to_owned();
        (out, header(&fs::read_to_string(log).unwrap()))
    };
    let (text, said) = run(folder.path().to_str().unwrap());
    assert_eq!(
        said["opening"]["ends"],
        json!([7, 9, 482]),
        "of all three files"
    );
    assert_eq!(
        said["settings"]["vocab_limit"], 485,
        "the padding is no token"
    );
    let (want, said) = run(MODEL);
    assert_eq!(said["opening"]["ends"], json!([482]), "once");
    assert_eq!(text, want, "the same text as without padding");
}

#[test]
fn a_model_without_a_chat_template_runs_without_one_and_says_so() {
    let folder = copy();
    edit(&folder, "tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let model = folder.path().to_str().unwrap().to_owned();
    let style = short_prompt(&folder);
    let args = ["-n", "2", "--prompt", &style, "x"];
    let ran = finish(command(&generate_args(&model, &args)));
    ran.success();
    let said = "hogwild: the model has no chat template: the prompt is given as it is\n";
    assert!(ran.err.contains(said), "{}", ran.err);
    let told = finish(command(&generate_args(
        &model,
        &[&args[..], &["--no-chat-template"]].concat(),
    )));
    assert!(!told.err.contains("chat template"), "it was asked for");
    let known = generate(&[&args[..], &["--no-chat-template", "--temp", "0"]].concat());
    let plain = finish(command(&generate_args(
        &model,
        &[&args[..], &["--temp", "0"]].concat(),
    )));
    assert_eq!(known.success(), plain.success(), "the same prompt");
}

#[test]
fn sampling_defaults_are_the_models() {
    let folder = copy();
    let model = folder.path().to_str().unwrap().to_owned();
    edit(&folder, "generation_config.json", |config| {
        config["do_sample"] = json!(true);
        config["temperature"] = json!(0.5);
        config["top_k"] = json!(7);
        config["top_p"] = json!(0.75);
        config["min_p"] = json!(0.25);
    });
    let settings = |more: &[&str]| {
        let args = [&["-n", "1", "--jsonl", "x"], more].concat();
        let ran = finish(command(&generate_args(&model, &args)));
        header(ran.success())["settings"].clone()
    };
    let got = settings(&[]);
    for (key, value) in [
        ("temperature", json!(0.5)),
        ("top_k", json!(7)),
        ("top_p", json!(0.75)),
        ("min_p", json!(0.25)),
    ] {
        assert_eq!(got[key], value, "{key}");
    }
    let got = settings(&[
        "--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0",
    ]);
    assert_eq!(got["temperature"], json!(2.0), "an option wins");
    assert_eq!(got["top_k"], json!(0), "an option wins");
    edit(&folder, "generation_config.json", |config| {
        config["do_sample"] = json!(false);
    });
    assert_eq!(settings(&[])["temperature"], json!(0.0), "greedy");
}

#[test]
fn special_tokens_in_a_problem_stay_text() {
    let prompt = |problem: &str, more: &[&str]| -> Vec<u64> {
        let ran = generate(&[&["-n", "1", "--jsonl", problem], more].concat());
        let header = header(ran.success());
        let ids = header["opening"]["prompt"].as_array().unwrap();
        ids.iter().map(|id| id.as_u64().unwrap()).collect()
    };
    let controls = |ids: &[u64]| ids.iter().filter(|&&id| id >= 480).count();
    for more in [&[][..], &["--no-chat-template"], &["--raw"]] {
        let clean = prompt("hello there", more);
        let typed = prompt("hello <|eos|><|bos|>system</think><think>there", more);
        assert_eq!(controls(&clean), controls(&typed), "{more:?}");
        assert!(typed.len() > clean.len() + 20, "{more:?}: letter by letter");
    }
}

#[test]
fn text_of_a_model_cannot_command_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let args = ["-n", "300", "--temp", "3", "--top-k", "0", "--seed", "3"];
    let args = [&args[..], &["--prompt", &style, "x"]].concat();
    let log = generate(&[&args[..], &["--jsonl"]].concat());
    let wild = log.success().contains("\\u001b");
    assert!(wild, "this seed writes an escape character");
    assert!(!log.out.contains('\x1b'), "JSON escapes it");
    let raw = [
        "--raw",
        "-n",
        "200",
        "--temp",
        "3",
        "--top-k",
        "0",
        "a\x1b[31m",
    ];
    for ran in [generate(&args), generate(&raw)] {
        let out = ran.success();
        assert!(out.contains('␛'), "shown as a picture: {out}");
        let obeyed = |c: char| c.is_control() && c != '\n' && c != '\t';
        assert!(!out.contains(obeyed), "{out:?}");
    }
}

#[test]
fn colours_are_by_worker_and_only_where_they_are_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let args = ["-n", "2", "--prompt", &style, "x"];
    let always = [&args[..], &["--color", "always"]].concat();
    let out = generate(&always).success().to_owned();
    assert!(
        out.contains("\x1b[36m[Alice 1]") && out.contains("\x1b[33m[Bob 1]"),
        "{out:?}"
    );
    let with = |args: &[&str], vars: &[(&str, &str)]| {
        let mut command = command(&generate_args(MODEL, args));
        command.envs(vars.iter().copied());
        finish(command).success().contains('\x1b')
    };
    assert!(!with(&args, &[]), "a pipe");
    assert!(with(&args, &[("CLICOLOR_FORCE", "1")]), "forced");
    let both = [("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")];
    assert!(!with(&args, &both), "NO_COLOR");
    let never = [&args[..], &["--color", "never"]].concat();
    assert!(!with(&never, &[("CLICOLOR_FORCE", "1")]), "--color never");
}

#[test]
fn auto_says_in_one_line_that_it_came_to_the_cpu_path() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let args = ["generate", "-m", MODEL, "-n", "1", "--prompt", &style, "x"];
    let ran = hogwild(&args);
    ran.success();
    let lines = ran.err.lines();
    let said = lines.filter(|l| l.starts_with("hogwild: device: the CPU path, because "));
    let is_cpu = matches!(
        hogwild::device::choose("auto"),
        Ok(hogwild::device::Choice::Cpu { .. })
    );
    assert_eq!(said.count(), usize::from(is_cpu), "{}", ran.err);
}

#[test]
fn a_device_is_named_by_a_part_of_its_name() {
    let ran = hogwild(&["generate", "-m", MODEL, "--device", "abacus", "x"]);
    assert_eq!(ran.code, Some(4), "{}", ran.err);
    assert!(ran.err.contains("'abacus'; seen: "), "{}", ran.err);
    let Some(device) = adapter::adapter() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let name = device.name().to_uppercase();
    let args = ["-n", "4", "--temp", "0", "--prompt", &style, "x"];
    let ran = hogwild(&[&["generate", "-m", MODEL, "--device", &name], &args[..]].concat());
    assert_eq!(ran.success(), generate(&args).success(), "as on the CPU");
}

#[test]
fn a_checked_run_agrees_on_both_devices() {
    let folder = tempfile::tempdir().unwrap();
    let style = short_prompt(&folder);
    let mut names = vec!["cpu".to_owned()];
    names.extend(adapter::adapter().map(|device| device.name()));
    for name in names {
        let args = ["generate", "-m", MODEL, "--device", &name, "--check"];
        hogwild(&[&args[..], &["-n", "3", "--prompt", &style, "x"]].concat()).success();
        let raw = ["--raw", "-n", "3", "abc"];
        hogwild(&[&args[..], &raw].concat()).success();
    }
}

#[test]
fn a_prompt_file_is_used_or_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let good = file(&folder, "good.txt", "Be {names}.\n{problem}");
    generate(&["-n", "1", "--prompt", &good, "x"]).success();
    let rows = [
        (file(&folder, "lacks.txt", "nothing"), "lacks {problem}"),
        (file(&folder, "odd.txt", "{problem} {nmaes}"), "{nmaes}"),
        (file(&folder, "bytes.txt", b"\xff{problem}"), "not UTF-8"),
        (
            file(&folder, "huge.txt", vec![b'{'; 3 << 20]),
            "a prompt file may have",
        ),
    ];
    for (path, words) in rows {
        let ran = generate(&["--prompt", &path, "x"]);
        let line = ran.error(2);
        assert!(line.contains(words) && line.contains(&path), "{line}");
    }
    let ran = generate(&["--prompt", "/nowhere/prompt.txt", "x"]);
    assert!(ran.error(1).contains("/nowhere/prompt.txt"), "{}", ran.err);
}

/// A log of 20 passes, in a folder.
fn logged(folder: &TempDir, more: &[&str]) -> (String, Vec<u8>) {
    let path = folder.path().join("run.jsonl").to_str().unwrap().to_owned();
    let args = ["-n", "20", "--temp", "1", "--seed", "1", "--log", &path];
    generate(&[&args[..], &["x"], more].concat()).success();
    let bytes = fs::read(&path).unwrap();
    (path, bytes)
}

#[test]
fn the_log_is_the_same_on_standard_output_and_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    for more in [&[][..], &["--raw"]] {
        let path = folder
            .path()
            .join("both.jsonl")
            .to_str()
            .unwrap()
            .to_owned();
        let args = ["-n", "20", "--temp", "1", "--jsonl", "--log", &path, "x"];
        let ran = generate(&[&args[..], more].concat());
        let bytes = fs::read(&path).unwrap();
        assert_eq!(ran.success().as_bytes(), bytes, "{more:?}");
        assert!(bytes.ends_with(b"\n"), "whole lines");
        let ran = hogwild(&["replay", &path]);
        let out = ran.success();
        assert!(out.starts_with("no difference: 20 passes, "), "{out}");
        assert_eq!(ran.err, "", "nothing to say");
    }
}

#[test]
fn a_replay_reports_the_first_id_that_differs() {
    let folder = tempfile::tempdir().unwrap();
    let (_, bytes) = logged(&folder, &[]);
    let mut lines: Vec<String> = String::from_utf8(bytes)
        .unwrap()
        .lines()
        .map(ToOwned::to_owned)
        .collect();
    let is_late_token = |(i, l): &(usize, &String)| *i > 30 && l.contains("\"token\"");
    let (at, line) = lines.iter().enumerate().find(is_late_token).unwrap();
    let mut token: Value = serde_json::from_str(line).unwrap();
    let old = token["id"].as_u64().unwrap();
    token["id"] = json!((old + 1) % 480);
    lines[at] = token.to_string();
    let path = file(&folder, "changed.jsonl", lines.join("\n") + "\n");
    let ran = hogwild(&["replay", &path]);
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    let start = format!(
        "differs at line {}: the log has token {} of ",
        at + 1,
        (old + 1) % 480
    );
    assert!(ran.out.starts_with(&start), "{}", ran.out);
    let end = format!("in pass {}\n", token["pass"]);
    assert!(
        ran.out.contains(&format!("the run token {old} of ")),
        "{}",
        ran.out
    );
    assert!(ran.out.ends_with(&end), "{}", ran.out);
}

#[test]
fn a_torn_last_line_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (_, bytes) = logged(&folder, &[]);
    for cut in [1, 2, 30, bytes.len() / 2] {
        let path = file(&folder, "torn.jsonl", &bytes[..bytes.len() - cut]);
        let ran = hogwild(&["replay", &path]);
        assert!(ran.success().starts_with("no difference: "), "{cut}");
    }
    let torn = file(&folder, "torn.jsonl", &bytes[..100]);
    let ran = hogwild(&["replay", &torn]);
    assert!(
        ran.error(1).contains("torn.jsonl:1: the log is empty"),
        "{}",
        ran.err
    );
}

#[test]
fn a_log_of_another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bytes) = logged(&folder, &[]);
    let other = tempfile::tempdir().unwrap();
    for (from, names) in [
        (
            "models/qwen3",
            &["config.json", "generation_config.json", "model.safetensors"][..],
        ),
        (
            "models/tokenizer",
            &["tokenizer.json", "tokenizer_config.json"],
        ),
    ] {
        for name in names {
            let from = Path::new("tests/golden").join(from).join(name);
            fs::copy(from, other.path().join(name)).unwrap();
        }
    }
    let model = other.path().to_str().unwrap();
    finish(command(&generate_args(model, &["-n", "1", "--raw", "x"]))).success();
    let ran = hogwild(&["replay", &path, "-m", model]);
    assert!(
        ran.error(1).contains("the log is of another model"),
        "{}",
        ran.err
    );
    // The directory is only a name: the same model elsewhere is the same model.
    let moved = copy();
    let ran = hogwild(&["replay", &path, "-m", moved.path().to_str().unwrap()]);
    ran.success();
    let text = String::from_utf8(bytes).unwrap();
    let lost = text.replacen(MODEL, "/nowhere/model", 1);
    let ran = hogwild(&["replay", &file(&folder, "lost.jsonl", lost)]);
    assert!(
        ran.error(3).contains("/nowhere/model/config.json"),
        "{}",
        ran.err
    );
}

#[test]
fn what_is_no_log_is_refused_by_name_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let (_, bytes) = logged(&folder, &[]);
    let text = String::from_utf8(bytes).unwrap();
    let (first, rest) = text.split_once('\n').unwrap();
    let with = |path: &[&str], value: Value| {
        let mut header: Value = serde_json::from_str(first).unwrap();
        let slot = path.iter().fold(&mut header, |at, key| &mut at[*key]);
        *slot = value;
        format!("{header}\n{rest}")
    };
    let most = u64::MAX;
    let rows: Vec<(String, &str)> = vec![
        (String::new(), ":1: the log is empty"),
        ("{}\n".into(), ":1: is no header"),
        ("nope\n".into(), ":1: is no header"),
        ("[".repeat(100_000) + "\n", ":1: is no header"),
        (format!("{first}\n{{}}\n"), ":2: is no event"),
        (format!("{first}\n{first}\n"), ":2: is no event"),
        (
            format!("{first}\n{{\"event\":\"a\\nb\"}}\n"),
            ":2: is no event: unknown variant `a\\nb`",
        ),
        (with(&["format"], json!(2)), ":1: format 2"),
        (with(&["settings", "context"], json!(most)), ":1: a context"),
        (with(&["settings", "context"], json!(0)), ":1: a context"),
        (with(&["settings", "kv_dtype"], json!("q4")), ":1: no cache"),
        (with(&["settings", "temperature"], json!(-1)), ":1: temp"),
        (
            with(&["settings", "vocab_limit"], json!(0)),
            ":1: the limit",
        ),
        (with(&["rules", "version"], json!("old")), ":1: no rules"),
        (
            with(&["rules", "more_ends"], json!([most])),
            ":1: is no header",
        ),
        (with(&["names"], json!([])), ":1: 0 workers"),
        (with(&["names"], json!(["A"])), ":1: 1 workers"),
        (with(&["opening", "prompt"], json!([485])), "token 485"),
    ];
    for (log, words) in rows {
        let path = file(&folder, "bad.jsonl", log);
        let ran = hogwild(&["replay", &path]);
        let line = ran.error(1);
        assert!(line.contains(words) && line.contains("bad.jsonl"), "{line}");
    }
    // Numbers that no run writes, but that only change what happens.
    for (path, value) in [
        (&["rules", "finisher_tokens"][..], json!(most)),
        (&["settings", "max_passes"], json!(most)),
        (&["settings", "top_k"], json!(most)),
        (&["settings", "seed"], json!(most)),
        (&["opening", "prompt"], json!([])),
        (&["opening", "words"], json!([[], []])),
    ] {
        let path = file(&folder, "odd.jsonl", with(path, value));
        assert_eq!(hogwild(&["replay", &path]).code, Some(1), "{path:?}");
    }
    let folder = folder.path().to_str().unwrap();
    for path in [folder, "/nowhere/run.jsonl"] {
        let ran = hogwild(&["replay", path]);
        assert!(ran.error(1).contains(path), "{}", ran.err);
    }
}

#[test]
fn a_log_that_cannot_be_written_is_an_error() {
    let ran = generate(&["--log", "/nowhere/run.jsonl", "x"]);
    assert!(ran.error(1).contains("/nowhere/run.jsonl: "), "{}", ran.err);
    if Path::new("/dev/full").exists() {
        let ran = generate(&["-q", "--log", "/dev/full", "x"]);
        assert!(ran.error(1).contains("/dev/full: "), "{}", ran.err);
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let long = [
        "-n",
        "100000",
        "--context",
        "4096",
        "--temp",
        "1",
        "-q",
        "x",
    ];
    for more in [&[][..], &["--jsonl"], &["--raw"]] {
        let args = generate_args(MODEL, &[&long[..], more].concat());
        let mut child = command(&args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut first = [0];
        out.read_exact(&mut first).unwrap();
        drop(out);
        let ran = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!((ran.status.code(), &*err), (Some(0), ""), "{more:?}");
    }
}

/// Sends the signal of Ctrl-C.
#[cfg(unix)]
fn interrupt(child: &Child) {
    let id = child.id().to_string();
    let status = Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert!(status.success(), "the process was there");
}

/// A long run that has begun to write, with the rest of its standard output on a thread.
#[cfg(unix)]
fn writing(log: &Path, more: &[&str]) -> (Child, std::thread::JoinHandle<String>) {
    let args = ["-n", "100000", "--context", "4096", "--temp", "1"];
    let log = ["--seed", "3", "--log", log.to_str().unwrap()];
    let mut child = command(&generate_args(MODEL, &[&args[..], &log, more].concat()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut first = [0];
    out.read_exact(&mut first).unwrap();
    let rest = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    });
    (child, rest)
}

#[cfg(unix)]
#[test]
fn ctrl_c_asks_for_the_answer_and_leaves_a_whole_log() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("run.jsonl");
    let (child, rest) = writing(&log, &["Say \\boxed{7}"]);
    interrupt(&child);
    let ran = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert_eq!(ran.status.code(), Some(130), "{err}");
    assert!(err.contains("hogwild: interrupted: "), "{err}");
    assert!(
        err.contains("hogwild: over: the answer was asked for\n"),
        "{err}"
    );
    let out = rest.join().unwrap();
    assert!(out.ends_with("\n\nAnswer: 7\n"), "{out}");
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains(r#""command":{"do":"finish"}"#), "{text}");
    assert!(
        text.lines().last().unwrap().contains("\"finish\""),
        "{text}"
    );
    let ran = hogwild(&["replay", log.to_str().unwrap()]);
    assert!(ran.success().starts_with("no difference: "), "{}", ran.out);
}

#[cfg(unix)]
#[test]
fn a_second_ctrl_c_stops_at_once_and_leaves_a_log_to_replay() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("run.jsonl");
    let (mut child, rest) = writing(&log, &["x"]);
    interrupt(&child);
    let mut err = BufReader::new(child.stderr.take().unwrap()).lines();
    let told = err.any(|l| l.unwrap().contains("Ctrl-C again stops at once"));
    assert!(told, "the first is answered");
    let started = Instant::now();
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(started.elapsed() < Duration::from_secs(1), "at once");
    rest.join().unwrap();
    let ran = hogwild(&["replay", log.to_str().unwrap()]);
    assert!(ran.success().starts_with("no difference: "), "{}", ran.out);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_continuation() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("run.jsonl");
    // As long as the model's range of positions: some ten seconds.
    let (child, rest) = writing(&log, &["--raw", "--check", "x"]);
    interrupt(&child);
    let ran = child.wait_with_output().unwrap();
    assert_eq!(ran.status.code(), Some(130));
    assert!(rest.join().unwrap().ends_with('\n'), "the line is ended");
    let ran = hogwild(&["replay", log.to_str().unwrap()]);
    assert!(ran.success().starts_with("no difference: "), "{}", ran.out);
}

/// `script` runs a command on a pseudo terminal; its standard output goes to a file.
#[cfg(target_os = "linux")]
#[test]
fn the_numbers_go_to_a_terminal_on_standard_error_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.txt");
    let line = format!(
        "stty rows 24 cols 100; {} generate -m {MODEL} --device cpu -n 300 --temp 1 --seed 3 x >{}",
        env!("CARGO_BIN_EXE_hogwild"),
        out.display()
    );
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]);
    script.env("TERM", "xterm").env("NODEVICE_SELECT", "1");
    let Ok(ran) = script.stdin(Stdio::null()).output() else {
        eprintln!("skipped: there is no 'script'");
        return;
    };
    let screen = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{screen}");
    assert!(
        screen.contains(" passes/s, ") && screen.contains(", cache "),
        "{screen}"
    );
    assert!(
        !screen.contains("[Alice 1]"),
        "the text is elsewhere: {screen}"
    );
    assert!(!screen.contains("\x1b[?25l"), "the cursor stays: {screen}");
    let plain = generate(&["-n", "300", "--temp", "1", "--seed", "3", "x"]);
    assert_eq!(plain.success(), fs::read_to_string(&out).unwrap());
}

/// Runs `generate` on a damaged copy: exit code 3, and one line that names the file.
fn refused(name: &str, named: &str, damage: &dyn Fn(&TempDir)) {
    let folder = copy();
    damage(&folder);
    let model = folder.path().to_str().unwrap();
    let started = Instant::now();
    let ran = finish(command(&generate_args(model, &["-n", "1", "x"])));
    assert!(
        started.elapsed() < PATIENCE,
        "{name}: {:?}",
        started.elapsed()
    );
    assert_eq!(ran.code, Some(3), "{name}: {}{}", ran.out, ran.err);
    let path = folder.path().join(named).display().to_string();
    assert!(ran.error(3).contains(&path), "{name}: {}", ran.err);
    assert!(ran.err.len() < 1000, "{name}: a line to read: {}", ran.err);
}

#[test]
fn a_directory_that_is_no_model_is_refused() {
    for file in ["config.json", "tokenizer.json"] {
        refused(file, file, &|folder| {
            fs::remove_file(folder.path().join(file)).unwrap();
        });
    }
    let folder = copy();
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let model = folder.path().to_str().unwrap();
    let ran = finish(command(&generate_args(model, &["x"])));
    assert!(ran.error(3).contains(model), "{}", ran.err);
    let inside = folder.path().join("config.json");
    for model in ["/nowhere/model", inside.to_str().unwrap()] {
        let ran = finish(command(&generate_args(model, &["x"])));
        assert!(ran.error(3).contains(model), "{}", ran.err);
    }
}

type Damage = Box<dyn Fn(&mut Value) + Send + Sync>;

#[test]
fn damaged_tokenizers_are_refused() {
    let bytes = fs::read(Path::new(MODEL).join("tokenizer.json")).unwrap();
    let mut not_utf8 = bytes.clone();
    not_utf8[10] = 0xff;
    let deep = "[".repeat(200_000);
    let rows = [
        ("empty", Vec::new()),
        ("truncated", bytes[..bytes.len() / 2].to_vec()),
        (
            "one byte short",
            bytes[..bytes.trim_ascii_end().len() - 1].to_vec(),
        ),
        ("not UTF-8", not_utf8),
        ("a list", b"[]".to_vec()),
        ("an empty object", b"{}".to_vec()),
        ("deep", deep.clone().into_bytes()),
        ("deep inside", format!("{{\"model\":{deep}").into_bytes()),
        ("100 MB", vec![b' '; 100_000_000]),
    ];
    rows.par_iter().for_each(|(name, bytes)| {
        refused(name, "tokenizer.json", &|folder| {
            file(folder, "tokenizer.json", bytes);
        });
    });
}

#[test]
fn hostile_tokenizers_are_refused() {
    let at = |path: &'static [&'static str], value: Value| -> Damage {
        Box::new(move |t| {
            *path.iter().fold(t, |at, key| &mut at[*key]) = value.clone();
        })
    };
    let merge = |merge: Value| -> Damage {
        Box::new(move |t| {
            let merges = t["model"]["merges"].as_array_mut().unwrap();
            merges.push(merge.clone());
        })
    };
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let split = |pattern: Value| json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
    let grow = vec![replace(json!({"Regex": "."}), &"x".repeat(100)); 6];
    let rows: Vec<(&str, Damage)> = vec![
        ("no model", at(&["model"], Value::Null)),
        ("unknown model", at(&["model", "type"], json!("GPT"))),
        ("vocabulary is text", at(&["model", "vocab"], json!("x"))),
        ("empty vocabulary", at(&["model", "vocab"], json!({}))),
        (
            "nothing at all",
            Box::new(|t| {
                t["model"]["vocab"] = json!({});
                t["model"]["merges"] = json!([]);
            }),
        ),
        (
            "no byte-level tokens",
            Box::new(|t| {
                t["model"]["vocab"] = json!({"a": 0, "b": 1});
                t["model"]["merges"] = json!([]);
            }),
        ),
        ("negative id", at(&["model", "vocab", "a"], json!(-1))),
        ("huge id", at(&["model", "vocab", "a"], json!(1_u64 << 63))),
        ("id is a fraction", at(&["model", "vocab", "a"], json!(1.5))),
        (
            "ids beyond the model",
            Box::new(|t| {
                for (_, id) in t["model"]["vocab"].as_object_mut().unwrap() {
                    *id = json!(id.as_u64().unwrap() + 1000);
                }
            }),
        ),
        ("merge of missing tokens", merge(json!(["zzzq", "qqqz"]))),
        ("merge into a missing token", merge(json!(["z", "q"]))),
        ("merge of one", merge(json!(["z"]))),
        ("merge of nothing", merge(json!(["a", ""]))),
        ("merges are text", at(&["model", "merges"], json!("ab"))),
        ("dropout of 7", at(&["model", "dropout"], json!(7))),
        (
            "subword prefix",
            at(&["model", "continuing_subword_prefix"], json!("##")),
        ),
        ("added tokens are text", at(&["added_tokens"], json!("x"))),
        (
            "added token without id",
            at(&["added_tokens"], json!([{"content": "x"}])),
        ),
        (
            "unknown pre-tokenizer",
            at(&["pre_tokenizer"], json!({"type": "Knife"})),
        ),
        (
            "broken expression",
            at(&["pre_tokenizer"], split(json!({"Regex": "("}))),
        ),
        (
            "nested expression",
            at(
                &["pre_tokenizer"],
                split(json!({"Regex": "(".repeat(50_000)})),
            ),
        ),
        (
            "large expression",
            at(
                &["pre_tokenizer"],
                split(json!({"Regex": "((a{1000}){1000}){1000}"})),
            ),
        ),
        (
            "replaces nothing",
            at(&["normalizer"], replace(json!({"String": ""}), "xx")),
        ),
        (
            "grows a text",
            at(
                &["normalizer"],
                json!({"type": "Sequence", "normalizers": grow}),
            ),
        ),
        (
            "prepends a megabyte",
            at(
                &["normalizer"],
                json!({"type": "Prepend", "prepend": "x".repeat(1 << 20)}),
            ),
        ),
        (
            "erases a text",
            at(&["normalizer"], replace(json!({"Regex": "(?s)."}), "")),
        ),
        (
            "erases all but blank lines",
            at(&["normalizer"], replace(json!({"Regex": "[^\\n]"}), "")),
        ),
        (
            "broken map",
            at(
                &["normalizer"],
                json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
            ),
        ),
        (
            "short map",
            at(
                &["normalizer"],
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}),
            ),
        ),
        (
            "decoder grows a text",
            at(&["decoder"], replace(json!({"String": ""}), "x")),
        ),
        (
            "decoder strips too much",
            at(
                &["decoder"],
                json!({"type": "Strip", "content": "a", "start": 1_000_000_000, "stop": 1_000_000_000}),
            ),
        ),
        (
            "no unknown token",
            at(
                &["model"],
                json!({"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0}}),
            ),
        ),
        (
            "no pieces",
            at(
                &["model"],
                json!({"type": "Unigram", "unk_id": null, "vocab": []}),
            ),
        ),
        (
            "unknown piece is missing",
            at(
                &["model"],
                json!({"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}),
            ),
        ),
    ];
    rows.par_iter().for_each(|(name, damage)| {
        refused(name, "tokenizer.json", &|folder| {
            edit(folder, "tokenizer.json", damage);
        });
    });
}

#[test]
fn odd_tokenizers_are_harmless() {
    let token = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let add = |token: Value| -> Damage {
        Box::new(move |t| {
            t["added_tokens"]
                .as_array_mut()
                .unwrap()
                .push(token.clone());
        })
    };
    let rows: Vec<(&str, Damage)> = vec![
        (
            "added token far beyond",
            add(token(4_000_000_000, "<huge>")),
        ),
        ("added token behind a gap", add(token(600, "<gap>"))),
        ("added token of nothing", add(token(485, ""))),
        ("added token that commands", add(token(485, "\x1b[31m"))),
        ("added token twice", add(token(480, "<|pad|>"))),
        (
            "cut to one token",
            Box::new(|t| {
                t["truncation"] = json!({"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 5});
            }),
        ),
        (
            "padded to 1e9 tokens",
            Box::new(|t| {
                t["padding"] = json!({"strategy": {"Fixed": 1_000_000_000}, "direction": "Left",
                "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
            }),
        ),
        (
            "draws lots",
            Box::new(|t| t["model"]["dropout"] = json!(0.5)),
        ),
    ];
    let text = |folder: &TempDir| {
        let model = folder.path().to_str().unwrap();
        let args = ["-n", "3", "--temp", "0", "What is <|bos|> 2+2?"];
        finish(command(&generate_args(model, &args)))
            .success()
            .to_owned()
    };
    let good = text(&copy());
    rows.par_iter().for_each(|(name, damage)| {
        let folder = copy();
        edit(&folder, "tokenizer.json", damage);
        assert_eq!(text(&folder), good, "{name}");
    });
}

#[test]
fn hostile_chat_templates_are_refused() {
    let doubling = |op: &str, start: &str| {
        format!(
            "{{% set ns = namespace(a={start}) %}}{{% for i in range(200) %}}\
             {{% set ns.a = ns.a {op} ns.a %}}{{% endfor %}}{{{{ ns.a }}}}"
        )
    };
    let rows: Vec<(&str, Vec<u8>)> = [
        (
            "a long loop",
            "{% for i in range(1000000000) %}x{% endfor %}".into(),
        ),
        (
            "nested loops",
            "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}".into(),
        ),
        ("a long text", "{{ 'a' * 2000000000 }}".into()),
        ("doubling a text", doubling("~", "'x'")),
        ("doubling a list", doubling("+", "[1]")),
        (
            "endless recursion",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        ),
        (
            "a wide indent",
            "{{ 'x' | indent(2000000000, true) }}".into(),
        ),
        (
            "a deep expression",
            format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)),
        ),
        (
            "a chain of filters",
            format!("{{{{ 'x'{} }}}}", "|upper".repeat(20_000)),
        ),
        ("another file", "{% include '/etc/passwd' %}".into()),
        ("an inheritance", "{% extends '/etc/passwd' %}".into()),
        (
            "an import",
            "{% import 'os' as os %}{{ os.system('true') }}".into(),
        ),
        (
            "a class",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}".into(),
        ),
        (
            "its own refusal",
            "{{ raise_exception('not \x1b[31m today\n\n') }}".into(),
        ),
        ("an open block", "{% for m in messages %}".into()),
        ("an open text", "{{ 'x".into()),
        ("an unknown filter", "{{ messages | shred }}".into()),
        ("too long", "x".repeat((64 << 10) + 1)),
    ]
    .map(|(name, source): (&str, String)| (name, source.into_bytes()))
    .into_iter()
    .chain([("not UTF-8", vec![0xff, 0xfe])])
    .collect();
    rows.par_iter().for_each(|(name, source)| {
        refused(name, "chat_template.jinja", &|folder| {
            file(folder, "chat_template.jinja", source);
        });
    });
}

#[test]
fn damaged_tokenizer_configs_are_refused() {
    let long = vec![b' '; (1 << 20) + 1];
    let rows: [(&str, &str, &[u8]); 10] = [
        ("cut", "tokenizer_config.json", b"{"),
        ("a list", "tokenizer_config.json", b"[]"),
        ("not UTF-8", "tokenizer_config.json", b"{\"a\": \"\xff\"}"),
        ("long", "tokenizer_config.json", &long),
        (
            "a template of a number",
            "tokenizer_config.json",
            br#"{"chat_template": 7}"#,
        ),
        (
            "no default",
            "tokenizer_config.json",
            br#"{"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}"#,
        ),
        (
            "no id",
            "tokenizer_config.json",
            br#"{"added_tokens_decoder": {"x": {}}}"#,
        ),
        (
            "no token",
            "tokenizer_config.json",
            br#"{"added_tokens_decoder": {"480": 5}}"#,
        ),
        ("no JSON", "special_tokens_map.json", b"nope"),
        ("no JSON", "chat_template.json", b"{"),
    ];
    for (name, path, bytes) in rows {
        refused(name, path, &|folder| {
            file(folder, path, bytes);
        });
    }
}

#[test]
fn a_post_processor_that_names_no_token_is_refused() {
    let post = |special: Value| {
        json!({"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "h", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": special})
    };
    for special in [
        json!({}),
        json!({"h": {"id": "h", "ids": [4_000_000_000_u32], "tokens": ["h"]}}),
    ] {
        let folder = copy();
        edit(&folder, "tokenizer.json", |t| {
            t["post_processor"] = post(special.clone());
        });
        let model = folder.path().to_str().unwrap();
        let ran = finish(command(&generate_args(model, &["--raw", "-n", "1", "x"])));
        let path: PathBuf = folder.path().join("tokenizer.json");
        assert!(ran.error(3).contains(path.to_str().unwrap()), "{}", ran.err);
    }
}

/// Without a model, the built-in one solves a problem of its kind, and says what one worker needs.
#[test]
fn without_a_model_the_built_in_one_adds_up_lists() {
    let problem = "a) 20+8+9; b) 41+4; c) 13+5+6+2; d) 17+9";
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log.jsonl");
    let log = log.to_str().unwrap();
    let ran = hogwild(&["generate", "--device", "cpu", "--log", log, problem]);
    let text = ran.success();
    assert!(
        text.contains("[Alice 1] ") && text.contains("[Bob 1] "),
        "{text}"
    );
    assert!(text.contains("Answer: 37,45,26,26"), "{text}");
    assert!(
        ran.err.contains("all 4 results are right, after "),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("one worker alone needs "), "{}", ran.err);
    assert!(
        hogwild(&["replay", log])
            .success()
            .starts_with("no difference: "),
        "its log is a run"
    );
}

#[test]
fn without_a_problem_a_fresh_one_is_posed() {
    let ran = hogwild(&["generate", "--device", "cpu", "--seed", "11", "-w", "3"]);
    assert!(ran.success().contains("Answer: "), "{}", ran.out);
    assert!(ran.err.contains("a fresh problem (seed 11)"), "{}", ran.err);
    assert!(ran.err.contains("passes with 3 workers"), "{}", ran.err);
    let again = hogwild(&["generate", "--device", "cpu", "--seed", "11", "-w", "3"]);
    assert_eq!(ran.out, again.out, "the same seed is the same problem");
    let many = hogwild(&["generate", "-w", "5"]);
    assert!(many.error(2).contains("1 to 4 workers"), "{}", many.err);
    let raw = hogwild(&["generate", "--raw", "x"]);
    assert!(raw.error(2).contains("--raw"), "{}", raw.err);
}
