//! The built binary, as a user or a script meets it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "common/adapter.rs"]
mod adapter;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
        // Silences a layer of Mesa that writes to standard error.
        .env("NODEVICE_SELECT", "1")
        .stdin(Stdio::null());
    command
}

fn hogwild(args: &[&str]) -> Ran {
    let ran = command(args).output().unwrap();
    Ran {
        code: ran.status.code(),
        out: String::from_utf8(ran.stdout).unwrap(),
        err: String::from_utf8(ran.stderr).unwrap(),
    }
}

impl Ran {
    /// The one line of an error.
    #[track_caller]
    fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        let mut lines = self
            .err
            .lines()
            .filter(|l| l.starts_with("hogwild: error: "));
        let line = lines
            .next()
            .unwrap_or_else(|| panic!("no error: {}", self.err));
        assert_eq!(lines.next(), None, "an error is one line");
        line
    }

    #[track_caller]
    fn success(&self) -> &str {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        assert_eq!(self.err, "", "success is silent");
        &self.out
    }
}

/// The name of the adapter under test, as `--device` takes it.
fn adapter_name() -> Option<String> {
    adapter::adapter().map(|device| device.name())
}

/// A file in a folder that outlives the test's commands.
fn file(folder: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn check_file(path: &Path, device: &str) -> Ran {
    let path = path.to_str().unwrap();
    let args = [
        "kernels", "check", "rms_norm", "--device", device, "--wgsl", path,
    ];
    hogwild(&args)
}

const RMS_NORM: &str = include_str!("../shaders/rms_norm.wgsl");

#[test]
fn help_names_the_commands() {
    let ran = hogwild(&["--help"]);
    let out = ran.success();
    assert!(out.contains("devices") && out.contains("kernels"), "{out}");
}

#[test]
fn version_is_name_and_number() {
    let ran = hogwild(&["--version"]);
    assert_eq!(
        ran.success(),
        format!("hogwild {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn an_unknown_command_is_a_usage_error() {
    let ran = hogwild(&["gallop"]);
    assert_eq!(ran.code, Some(2));
    assert!(
        ran.err.contains("gallop") && ran.out.is_empty(),
        "{}",
        ran.err
    );
}

#[test]
fn devices_lists_the_cpu_and_says_what_auto_uses() {
    let ran = hogwild(&["devices"]);
    let out = ran.success();
    assert!(out.contains("\ncpu\n") || out.starts_with("cpu\n"), "{out}");
    let last = out.lines().last().unwrap();
    assert!(
        last.starts_with("--device auto uses ") && last.contains(": "),
        "{last}"
    );
}

#[test]
fn devices_as_json_is_one_object_that_agrees_with_the_library() {
    let ran = hogwild(&["devices", "--json"]);
    let json: serde_json::Value = serde_json::from_str(ran.success()).unwrap();
    assert_eq!(json["version"], 1);
    assert!(json["cpu"]["threads"].as_u64().unwrap() >= 1);
    let adapters = json["adapters"].as_array().unwrap();
    assert_eq!(adapters.len(), hogwild::device::adapters().len());
    for adapter in adapters {
        assert!(
            adapter["heaps"][0]["bytes"].as_u64().unwrap() > 0,
            "{adapter}"
        );
        assert!(adapter["features"]["subgroup"].is_boolean(), "{adapter}");
        assert!(adapter["subgroup"][1].as_u64().unwrap() >= 4, "{adapter}");
    }
    let auto = hogwild::device::choose("auto").unwrap();
    assert_eq!(json["auto"]["device"], auto.name());
    assert_eq!(json["auto"]["why"], auto.why());
}

#[test]
fn kernels_list_names_every_op() {
    let ran = hogwild(&["kernels", "list"]);
    let text = ran.success();
    let ran = hogwild(&["kernels", "list", "--json"]);
    let json: serde_json::Value = serde_json::from_str(ran.success()).unwrap();
    assert_eq!(
        json["ops"].as_array().unwrap().len(),
        hogwild::ops::OPS.len()
    );
    for op in hogwild::ops::OPS {
        assert!(
            text.contains(&format!("{}: {}", op.name, op.summary)),
            "{text}"
        );
    }
}

#[test]
fn the_rust_kernels_of_an_op_pass() {
    let ran = hogwild(&["kernels", "check", "rms_norm", "--device", "cpu"]);
    let out = ran.success();
    assert!(
        out.contains("pass         rms_norm / rows / eps decides: worst "),
        "{out}"
    );
    assert!(
        out.ends_with(" passed, 0 failed, 0 unsupported on cpu\n"),
        "{out}"
    );
}

#[test]
fn the_shaders_of_an_op_pass_on_the_adapter() {
    let Some(device) = adapter_name() else {
        return;
    };
    let ran = hogwild(&["kernels", "check", "rms_norm", "--device", &device]);
    let out = ran.success();
    assert!(out.contains("rms_norm / row / "), "{out}");
    assert!(out.contains(" 0 failed, 0 unsupported on "), "{out}");
    let ran = hogwild(&[
        "kernels", "check", "rms_norm", "--device", &device, "--kernel", "rows",
    ]);
    let error = ran.error(2);
    assert!(
        error.contains("no WGSL kernel 'rows'; there are: row"),
        "{error}"
    );
}

#[test]
fn a_file_takes_the_place_of_the_shader() {
    let Some(device) = adapter_name() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let ran = check_file(&file(&folder, "mine.wgsl", RMS_NORM), &device);
    let out = ran.success();
    assert!(
        out.contains("pass         rms_norm / mine / eps decides: "),
        "{out}"
    );
    // Parts and element types are there for a file, too: a copy of the projection needs them.
    let path = file(
        &folder,
        "other.wgsl",
        include_str!("../shaders/project.wgsl"),
    );
    let path = path.to_str().unwrap();
    let ran = hogwild(&[
        "kernels", "check", "project", "--device", &device, "--wgsl", path,
    ]);
    assert!(ran.success().contains(" 0 failed, "), "{}", ran.out);
    let uses = format!("// uses: rope, softmax_state\n{RMS_NORM}");
    check_file(&file(&folder, "uses.wgsl", &uses), &device).success();
}

#[test]
fn the_example_of_the_handbook_passes() {
    let Some(device) = adapter_name() else {
        return;
    };
    let handbook = include_str!("../shaders/README.md");
    let (_, example) = handbook.split_once("## An example").unwrap();
    let (_, text) = example.split_once("```wgsl\n").unwrap();
    let (text, _) = text.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    check_file(&file(&folder, "mine.wgsl", text), &device).success();
}

#[test]
fn an_error_in_a_file_names_the_file_and_the_line() {
    let Some(device) = adapter_name() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let at = 1 + RMS_NORM
        .lines()
        .position(|l| l.contains("var sum = 0.0;"))
        .unwrap();
    let broken = RMS_NORM.replace("var sum = 0.0;", "var sum = 0.0 +;");
    let path = file(&folder, "broken.wgsl", &broken);
    let ran = check_file(&path, &device);
    let error = ran.error(1);
    let place = format!("hogwild: error: {}:{at}: ", path.display());
    assert!(error.starts_with(&place), "{error}");
    // Bindings that are not the op's.
    let renamed = RMS_NORM.replace("eps", "epsilon");
    let path = file(&folder, "renamed.wgsl", &renamed);
    let ran = check_file(&path, &device);
    assert!(
        ran.error(1)
            .contains("renamed.wgsl:1: op rms_norm has the params")
    );
    let path = file(
        &folder,
        "parts.wgsl",
        &format!("// uses: magic\n{RMS_NORM}"),
    );
    let ran = check_file(&path, &device);
    assert!(
        ran.error(1)
            .contains("parts.wgsl:1: no part is called 'magic'")
    );
}

/// naga panics on a pointer to an element; the command must not.
#[test]
fn a_file_that_the_compiler_panics_on_is_an_error() {
    let Some(device) = adapter_name() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let text = RMS_NORM
        .replace(
            "@compute",
            "fn bump(p: ptr<function, f32>) { *p += 0.0; }\n\n@compute",
        )
        .replace(
            "var total = 0.0;",
            "var total = 0.0; var a = array<f32, 4>(); bump(&a[group.x & 3u]);",
        );
    let ran = check_file(&file(&folder, "pointer.wgsl", &text), &device);
    let error = ran.error(1);
    assert!(error.contains("pointer.wgsl:"), "{error}");
}

#[test]
fn a_file_that_computes_wrong_numbers_fails() {
    let Some(device) = adapter_name() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    // A mean over the padding: right in every case but one.
    let wrong = RMS_NORM.replace("f32(params.count)", "f32(params.dim)");
    let ran = check_file(&file(&folder, "wrong.wgsl", &wrong), &device);
    assert_eq!(ran.code, Some(1), "{}{}", ran.out, ran.err);
    let failed: Vec<_> = ran.out.lines().filter(|l| l.starts_with("FAIL")).collect();
    assert_eq!(failed.len(), 1, "{}", ran.out);
    assert!(
        failed[0].contains("rms_norm / wrong / padded rows: y[")
            && failed[0].contains("the reference says"),
        "{}",
        ran.out
    );
    assert!(
        ran.out.contains(" passed, 1 failed, 0 unsupported on "),
        "{}",
        ran.out
    );
}

#[test]
fn a_file_is_not_judged_without_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, "mine.wgsl", RMS_NORM);
    let ran = check_file(&path, "cpu");
    assert!(ran.error(2).contains("--wgsl runs on a Vulkan adapter"));
    if matches!(
        hogwild::device::choose("auto"),
        Ok(hogwild::device::Choice::Cpu { .. })
    ) {
        let ran = check_file(&path, "auto");
        assert!(ran.error(4).contains("`--device llvmpipe`"), "{}", ran.err);
    }
    let ran = check_file(&folder.path().join("missing.wgsl"), "cpu");
    assert!(ran.error(1).contains("missing.wgsl: "), "{}", ran.err);
    let args = ["kernels", "check", "all", "--wgsl", path.to_str().unwrap()];
    assert!(hogwild(&args).error(2).contains("one op"));
}

#[test]
fn an_unknown_device_is_answered_with_what_was_seen() {
    let ran = hogwild(&["kernels", "check", "rms_norm", "--device", "abacus"]);
    let error = ran.error(4);
    assert!(error.contains("'abacus'"), "{error}");
    let adapters = hogwild::device::adapters();
    for adapter in &adapters {
        assert!(error.contains(&adapter.name), "{error}");
    }
    assert!(
        !adapters.is_empty() || error.contains("no Vulkan adapter"),
        "{error}"
    );
}

#[test]
fn an_unknown_op_is_answered_with_those_there_are() {
    let ran = hogwild(&["kernels", "check", "fft", "--device", "cpu"]);
    let error = ran.error(2);
    for op in hogwild::ops::OPS {
        assert!(error.contains(op.name), "{error}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let commands: [&[&str]; 4] = [
        &["kernels", "list", "--json"],
        &["kernels", "check", "rms_norm", "--device", "cpu"],
        &["devices"],
        &["--help"],
    ];
    for args in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = command(args).stdout(writer).stderr(Stdio::piped()).spawn();
        let ran = child.unwrap().wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!((ran.status.code(), &*err), (Some(0), ""), "{args:?}");
    }
}
