//! The arrows of the architecture, and no others: read from the paths that the sources name.
//!
//! Comments, strings and test modules are left out. A rule says what a module may not name; the last tests
//! plant lines that break each rule.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What the modules below the first may not name: modules of this crate, or others' crates and modules.
const FORBIDDEN: &[(&str, &[&str])] = &[
    // What runs dispatches knows no dispatch in particular.
    (
        "device",
        &[
            "ops", "cache", "model", "text", "protocol", "sampler", "session", "cli",
        ],
    ),
    // Shapes and numbers: no config, cache, worker.
    (
        "ops",
        &["cache", "model", "text", "protocol", "session", "cli"],
    ),
    (
        "cache",
        &[
            "ops", "model", "text", "protocol", "sampler", "session", "cli",
        ],
    ),
    // Tokens, slots and locations: no worker, step, prompt.
    ("model", &["text", "protocol", "sampler", "session", "cli"]),
    (
        "text",
        &[
            "ops", "cache", "model", "device", "protocol", "sampler", "session", "cli",
        ],
    ),
    // Names and files: nothing of what is in them.
    (
        "hub",
        &[
            "ops", "cache", "model", "text", "device", "protocol", "sampler", "session", "cli",
        ],
    ),
    // What is said, not who sees it or where it lives.
    (
        "protocol",
        &[
            "ops", "cache", "model", "device", "sampler", "session", "cli",
        ],
    ),
    (
        "sampler",
        &[
            "ops", "cache", "model", "device", "text", "protocol", "session", "cli",
        ],
    ),
    ("session", &["cli"]),
    ("main", &["session", "model", "ops", "cache", "protocol"]),
];

/// Modules that are pure: no device, clock, file, global.
const PURE: &[&str] = &[
    "protocol",
    "sampler",
    "cache::pages",
    "cache::layout",
    "cache::plan",
];

/// What a pure module does not name.
const IMPURE: &[&str] = &[
    "crate::device",
    "crate::cli",
    "std::env",
    "std::fs",
    "std::io",
    "std::net",
    "std::process",
    "std::sync::Mutex",
    "std::sync::RwLock",
    "std::sync::atomic",
    "std::thread",
    "std::time",
];

/// Names that say nothing.
const NAMELESS: &[&str] = &[
    "utils", "util", "helpers", "helper", "common", "manager", "misc",
];

/// The files with unsafe code, and how many sites each has.
const UNSAFE: &[(&str, usize)] = &[
    ("device/adapters.rs", 1),
    ("device/gpu.rs", 1),
    ("device/pipeline.rs", 1),
];

/// The words and signs of a source, without comments, strings, characters and test modules.
fn words(source: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let len = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(len) = quoted(rest, out.last()) {
            len
        } else if c.is_alphanumeric() || c == '_' {
            let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
            let len = end.unwrap_or(rest.len());
            out.push(rest[..len].to_owned());
            len
        } else if rest.starts_with("::") {
            out.push("::".to_owned());
            2
        } else {
            if !c.is_whitespace() {
                out.push(c.to_string());
            }
            c.len_utf8()
        };
        rest = &rest[len..];
    }
    without_tests(&out)
}

/// The length of a string or character literal at the start of `rest`; `before` may be its prefix.
fn quoted(rest: &str, before: Option<&String>) -> Option<usize> {
    let bytes = rest.as_bytes();
    let raw = before.is_some_and(|word| ["r", "br"].contains(&word.as_str()));
    let hashes = bytes.iter().take_while(|&&b| b == b'#').count();
    if raw && bytes.get(hashes) == Some(&b'"') {
        let end = format!("\"{}", "#".repeat(hashes));
        let from = hashes + 1;
        return Some(
            rest[from..]
                .find(&end)
                .map_or(rest.len(), |at| from + at + end.len()),
        );
    }
    match bytes[0] {
        b'"' => {
            let mut at = 1;
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            Some((at + 1).min(rest.len()))
        }
        b'\'' => {
            // 'x', '\n' and '\u{7f}' are characters, 'a is a lifetime.
            let escaped = bytes.get(1) == Some(&b'\\');
            let second = rest[1..].chars().next()?;
            let from = if escaped { 3 } else { 1 + second.len_utf8() };
            let end = rest.get(from..)?.find('\'')?;
            (escaped || end == 0).then_some(from + end + 1)
        }
        _ => None,
    }
}

/// Leaves out `#[cfg(test)] mod …  { … }`.
fn without_tests(words: &[String]) -> Vec<String> {
    let opens = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
    let mut out = Vec::new();
    let mut at = 0;
    while at < words.len() {
        if words[at..].iter().take(8).eq(opens.iter())
            && words.get(at + 9).is_some_and(|w| w == "{")
        {
            let mut depth = 0;
            at += 9;
            loop {
                depth += i32::from(words[at] == "{") - i32::from(words[at] == "}");
                at += 1;
                if depth == 0 {
                    break;
                }
            }
        } else {
            out.push(words[at].clone());
            at += 1;
        }
    }
    out
}

/// The module of a file: `cache::plan` for `cache/plan.rs`.
fn module_of(file: &str) -> String {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    path.replace('/', "::")
}

/// Every path that starts at `crate`, `super`, `self`, this crate's name or `std`, from the root on; groups
/// are spelled out.
fn paths(module: &str, words: &[String]) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    let mut last_end = 0;
    for (at, word) in words.iter().enumerate() {
        let follows = words.get(at + 1).is_some_and(|w| w == "::");
        let starts = at == 0 || words[at - 1] != "::";
        if at < last_end || !follows || !starts {
            continue;
        }
        let root = match word.as_str() {
            "crate" | "hogwild" => vec!["crate".to_owned()],
            "std" | "core" => vec!["std".to_owned()],
            "self" | "super" => {
                let mut here: Vec<String> = vec!["crate".to_owned()];
                if module != "lib" {
                    here.extend(module.split("::").map(str::to_owned));
                }
                if word == "super" {
                    here.pop();
                }
                here
            }
            _ => continue,
        };
        last_end = tree(words, at + 2, root, &mut out);
    }
    out
}

/// Reads a use tree from `at`, below `root`; returns where it ends.
fn tree(
    words: &[String],
    mut at: usize,
    mut root: Vec<String>,
    out: &mut BTreeSet<String>,
) -> usize {
    loop {
        match words.get(at).map(String::as_str) {
            Some("{") => {
                at += 1;
                while at < words.len() && words[at] != "}" {
                    at = tree(words, at, root.clone(), out).max(at + 1);
                    if words.get(at).is_some_and(|w| w == "as") {
                        at += 2;
                    }
                    if words.get(at).is_some_and(|w| w == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            Some("super") => {
                root.pop();
            }
            Some("self") => {}
            Some(word) if word.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
                root.push(word.to_owned());
            }
            _ => {
                out.insert(root.join("::"));
                return at;
            }
        }
        at += 1;
        if words.get(at).is_none_or(|w| w != "::") {
            out.insert(root.join("::"));
            return at;
        }
        at += 1;
    }
}

/// Whether `path` is `of` or below it.
fn below(path: &str, of: &str) -> bool {
    path.strip_prefix(of)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Everything that is not as it should be, in files named from `src/` on.
fn violations(files: &BTreeMap<String, String>) -> Vec<String> {
    let mut out = Vec::new();
    for (file, source) in files {
        let module = module_of(file);
        let words = words(source);
        let paths = paths(&module, &words);
        let has = |word: &str| words.iter().any(|w| w == word);
        let mut say = |what: String| out.push(format!("src/{file} {what}"));

        for (from, targets) in FORBIDDEN.iter().filter(|(from, _)| below(&module, from)) {
            for target in *targets {
                let target = format!("crate::{target}");
                if let Some(path) = paths.iter().find(|path| below(path, &target)) {
                    say(format!("names {path}, which {from} does not know"));
                }
            }
        }
        let named = paths.iter().any(|path| below(path, "crate::hub")) || has("ureq");
        if named && !["hub", "cli"].iter().any(|of| below(&module, of)) {
            say("names the hub, as only cli does".to_owned());
        }
        for crate_name in ["wgpu", "naga", "ash"] {
            if has(crate_name) && !below(&module, "device") {
                say(format!("names {crate_name}, as only src/device/ does"));
            }
        }
        if PURE.iter().any(|pure| below(&module, pure)) {
            for path in &paths {
                let impure = IMPURE.iter().any(|of| below(path, of));
                if impure {
                    say(format!("names {path}, and is to be pure"));
                }
            }
            let mutable = words.windows(2).any(|w| w[0] == "static" && w[1] == "mut");
            if mutable || has("thread_local") {
                say("has a global, and is to be pure".to_owned());
            }
        }
        let imports = paths.iter().any(|path| below(path, "crate::session"));
        if imports
            && !["session", "cli", "serve"]
                .iter()
                .any(|of| below(&module, of))
        {
            say("imports session, as only cli does".to_owned());
        }
        if let Some(name) = module.split("::").find(|name| NAMELESS.contains(name)) {
            say(format!("is called {name}, which says nothing"));
        }
        let declared = words
            .windows(2)
            .filter(|w| w[0] == "mod")
            .map(|w| w[1].as_str());
        for name in declared.filter(|name| NAMELESS.contains(name)) {
            say(format!("has a module called {name}, which says nothing"));
        }

        let count = |attribute: &str| {
            let opening = [attribute, "(", "unsafe_code"];
            words
                .windows(3)
                .filter(|w| w.iter().eq(opening.iter()))
                .count()
        };
        let known = UNSAFE
            .iter()
            .find(|(of, _)| of == file)
            .map_or(0, |(_, n)| *n);
        let (sites, used) = (
            count("expect"),
            words.iter().filter(|w| *w == "unsafe").count(),
        );
        if sites != known || used != known {
            say(format!(
                "has {sites} sites and {used} uses of unsafe code, {known} are known"
            ));
        }
        if count("allow") > 0 {
            say("allows unsafe code, which is to be expected at a site".to_owned());
        }
    }
    out
}

/// All Rust sources, by their path below `src/`.
fn sources() -> BTreeMap<String, String> {
    let root = Path::new("src");
    let mut out = BTreeMap::new();
    let mut open = vec![PathBuf::from(root)];
    while let Some(here) = open.pop() {
        for entry in fs::read_dir(here).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path
                    .strip_prefix(root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .replace('\\', "/");
                out.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    out
}

#[test]
fn the_sources_follow_the_arrows() {
    let files = sources();
    assert!(files.len() > 20, "only {} sources were read", files.len());
    for module in PURE.iter().filter(|module| module.starts_with("cache")) {
        let found = files.keys().any(|file| module_of(file) == *module);
        assert!(found, "{module} is gone, and a rule with it");
    }
    for (file, _) in UNSAFE {
        assert!(
            files.contains_key(*file),
            "src/{file} is gone, and a rule with it"
        );
    }
    let found = violations(&files);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_paths_of_the_sources_are_read() {
    let files = sources();
    let named = |file: &str, path: &str| {
        let paths = paths(&module_of(file), &words(&files[file]));
        assert!(
            paths.contains(path),
            "src/{file} names {path}, not only {paths:?}"
        );
    };
    named("model/engine.rs", "crate::cache::plan::SPLIT");
    named("model/engine.rs", "crate::model::forward::Scratch");
    named("model/forward.rs", "crate::ops::attend::Work");
    named("cache/mod.rs", "crate::device::DType");
    named("ops/embed.rs", "crate::device::Caps");
}

/// One more line in a file, old or new, must be found, for the reason that holds a word.
#[track_caller]
fn must_be_found(file: &str, line: &str, word: &str) {
    let mut files = sources();
    let before = violations(&files).len();
    let source = files.entry(file.to_owned()).or_default();
    *source = format!("{line}\n{source}");
    let found = violations(&files);
    assert!(found.len() > before, "src/{file} may say: {line}");
    assert!(
        found.iter().any(|v| v.contains(word)),
        "unexpected reasons: {found:?}"
    );
}

#[test]
fn a_planted_line_is_found() {
    let gpu = "use wgpu::Buffer;";
    must_be_found("ops/attend.rs", gpu, "names wgpu");
    must_be_found("model/load.rs", "fn f(_: &naga::Module) {}", "names naga");
    must_be_found(
        "ops/merge.rs",
        "use crate::cache::plan::SPLIT;",
        "names crate::cache",
    );
    must_be_found(
        "ops/merge.rs",
        "use super::super::model::Config;",
        "names crate::model",
    );
    must_be_found(
        "ops/merge.rs",
        "use crate::{Result, text::Text};",
        "names crate::text",
    );
    must_be_found(
        "model/engine.rs",
        "use crate::protocol::Turn;",
        "names crate::protocol",
    );
    must_be_found(
        "model/engine.rs",
        "use crate::{cli, Error};",
        "names crate::cli",
    );
    must_be_found("device/gpu.rs", "use crate::ops::OPS;", "names crate::ops");
    must_be_found("protocol/mod.rs", "use crate::device::Device;", "pure");
    must_be_found(
        "protocol/finisher.rs",
        "use std::{time::Instant, fmt};",
        "pure",
    );
    must_be_found("sampler.rs", "static mut SEED: u64 = 0;", "global");
    must_be_found(
        "cache/plan.rs",
        "fn f() { std::fs::remove_file(\"x\"); }",
        "pure",
    );
    must_be_found("cache/layout.rs", "use std::env;", "pure");
    must_be_found(
        "cache/pages.rs",
        "use super::super::device::Tensor;",
        "pure",
    );
    must_be_found("text.rs", "use crate::session::Session;", "imports session");
    must_be_found(
        "main.rs",
        "use hogwild::session::Session;",
        "imports session",
    );
    must_be_found("hub/mod.rs", "use crate::model::Config;", "crate::model");
    must_be_found("model/mod.rs", "use crate::hub::fetch;", "names the hub");
    must_be_found("text.rs", "fn f(_: ureq::Agent) {}", "names the hub");
    must_be_found("model/utils.rs", "", "called utils");
    must_be_found("device/mod.rs", "mod helpers;", "called helpers");
    must_be_found("ops/dot.rs", "fn f() { unsafe { g() } }", "uses of unsafe");
    let site = "#[expect(unsafe_code, reason = \"fast\")]";
    must_be_found("device/adapters.rs", site, "2 sites");
    must_be_found("ops/dot.rs", "#![allow(unsafe_code)]", "allows unsafe");
}

#[test]
fn what_is_only_said_is_not_found() {
    let mut files = sources();
    for line in [
        "// use wgpu::Buffer;",
        "/* crate::session::Session */",
        "//! [`wgpu`] is named in crate::device.",
        "const TEXT: &str = \"unsafe { crate::session::x() } \\\" wgpu\";",
        "const RAW: &str = r#\"mod utils; \"wgpu\" \"#;",
        "const QUOTE: [char; 3] = ['\"', '\\'', '\\u{7f}']; // wgpu",
        "fn f<'a>(x: &'a str) -> &'a str { x }",
        "#[cfg(test)] mod tests { use crate::session::Session; fn f() { let wgpu = '}'; } }",
    ] {
        let source = files.get_mut("ops/dot.rs").unwrap();
        *source = format!("{line}\n{source}");
    }
    let found = violations(&files);
    assert!(found.is_empty(), "{}", found.join("\n"));
}
