//! The hub: a server of the test's own, which also cuts, stalls, lies, refuses and sends people around.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "common/server.rs"]
mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hogwild::hub::{self, Limits, RepoId, Revision, Settings, Token};
use hogwild::model::ModelFiles;
use hogwild::{Error, Result};
use serde_json::{Value, json};
use server::{Reply, Request, Sending, Server};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SECRET: &str = "hf_TheSecretOfTheTest";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model that can be loaded.
const MODEL: &str = "tests/golden/e2e_reference_loop/model";

type Files = Vec<(String, Vec<u8>)>;

/// Bytes that look like nothing; the same for the same seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// The files of a model with one weight file of 300,000 bytes, and of what is left alone.
fn files() -> Files {
    let text = |name: &str, text: &str| (name.to_owned(), text.as_bytes().to_vec());
    vec![
        text(".gitattributes", "x"),
        text("README.md", "y"),
        text("config.json", "{\"model_type\":\"qwen3\"}"),
        text("generation_config.json", "{}"),
        text("tokenizer.json", "{\"version\":\"1.0\"}"),
        text("chat_template.jinja", "{{ messages }}"),
        (WEIGHTS.to_owned(), noise(300_000, 1)),
        text("pytorch_model.bin", "never"),
        text("consolidated.safetensors", "never"),
        text("original/model.safetensors", "never"),
        text("model.gguf", "never"),
        text("../../../../escaped", "never"),
    ]
}

/// The same with two weight files and an index.
fn sharded() -> Files {
    let shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let map = json!({ "a": shards[0], "b": shards[1], "c": shards[0] });
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    let mut files = files();
    files.retain(|(name, _)| name != WEIGHTS);
    files.push((INDEX.to_owned(), index.to_string().into_bytes()));
    files.push((shards[0].to_owned(), noise(100_000, 2)));
    files.push((shards[1].to_owned(), noise(50_000, 3)));
    files
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn git_hash(bytes: &[u8]) -> String {
    let mut hash = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    hash.update(bytes);
    hex(&hash.finalize())
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn bytes_of<'a>(files: &'a Files, name: &str) -> &'a [u8] {
    &files.iter().find(|(n, _)| n == name).unwrap().1
}

/// What a hub with one model answers.
fn hub_says(files: &Files, cdn: &str, request: &Request) -> Reply {
    let path = &request.path;
    if let Some(revision) = path.strip_prefix("/api/models/tiny/model/revision/") {
        if !["main", "v1", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            return Reply::new(404, "{}").with("x-error-code", "RevisionNotFound");
        }
        let siblings: Vec<_> = files
            .iter()
            .map(|(name, _)| json!({ "rfilename": name }))
            .collect();
        let listing =
            json!({ "id": "tiny/model", "sha": COMMIT, "siblings": siblings, "more": [1] });
        return Reply::new(200, listing.to_string());
    }
    let name = path.strip_prefix(&format!("/tiny/model/resolve/{COMMIT}/"));
    let found = name.and_then(|name| files.iter().find(|(n, _)| n == name));
    let Some((name, bytes)) = found else {
        return Reply::new(404, "{}").with("x-error-code", "RepoNotFound");
    };
    if is_large(name) {
        let hash = sha256(bytes);
        return Reply::new(302, "elsewhere")
            .with("location", format!("{cdn}/{hash}?signature=1"))
            .with("x-repo-commit", COMMIT)
            .with("x-linked-size", bytes.len())
            .with("x-linked-etag", format!("\"{hash}\""));
    }
    part(bytes, request)
        .with("x-repo-commit", COMMIT)
        .with("etag", format!("W/\"{}\"", git_hash(bytes)))
}

/// What the store of large files answers. It knows no HEAD.
fn cdn_says(files: &Files, request: &Request) -> Reply {
    let hash = request
        .path
        .split('?')
        .next()
        .unwrap()
        .trim_start_matches('/');
    let found = files.iter().find(|(_, bytes)| sha256(bytes) == hash);
    match found {
        Some((_, bytes)) if request.method == "GET" => part(bytes, request),
        _ => Reply::new(403, "signed for something else"),
    }
}

/// A file from where it is wanted.
fn part(bytes: &[u8], request: &Request) -> Reply {
    match request.from() {
        None => Reply::new(200, bytes),
        Some(from) if from < bytes.len() => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            Reply::new(206, &bytes[from..]).with("content-range", range)
        }
        Some(_) => Reply::new(416, ""),
    }
}

/// A hub, its store of large files, and a cache.
struct World {
    files: Arc<Files>,
    hub: Server,
    cdn: Server,
    folder: TempDir,
    settings: Settings,
}

/// Changes an answer; gets how many of the same request came before.
type Twist = Box<dyn Fn(&Request, usize, Reply) -> Reply + Send + Sync>;

fn as_it_is() -> Twist {
    Box::new(|_, _, reply| reply)
}

/// Changes the first answers to GET requests.
fn at_first(
    count: usize,
    change: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
) -> Twist {
    Box::new(move |request, before, reply| {
        if request.method == "GET" && before < count {
            change(request, reply)
        } else {
            reply
        }
    })
}

/// Changes every answer of one method whose path ends so.
fn whenever(
    method: &'static str,
    end: &'static str,
    change: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
) -> Twist {
    Box::new(move |request, _, reply| {
        if request.method == method && request.path.ends_with(end) {
            change(request, reply)
        } else {
            reply
        }
    })
}

impl World {
    fn new(files: Files) -> Self {
        Self::twisted(files, as_it_is(), as_it_is())
    }

    fn twisted(files: Files, hub_twist: Twist, cdn_twist: Twist) -> Self {
        let files = Arc::new(files);
        let own = files.clone();
        let cdn = Server::start(move |request, before| {
            cdn_twist(request, before, cdn_says(&own, request))
        });
        let (own, url) = (files.clone(), cdn.url.clone());
        let hub = Server::start(move |request, before| {
            hub_twist(request, before, hub_says(&own, &url, request))
        });
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            cache: folder.path().join("hub"),
            endpoint: hub.url.clone(),
            token: Token::parse(SECRET),
            offline: false,
            proxy: false,
            limits: Limits {
                connect: Duration::from_secs(5),
                answer: Duration::from_secs(10),
                stall: Duration::from_secs(5),
                crawl: 64,
                tries: 4,
                progress: 1 << 20,
                wait: Duration::from_millis(1),
                longest_wait: Duration::from_secs(1),
                redirects: 5,
                listing: 100_000,
                lock: Duration::from_secs(20),
            },
        };
        Self {
            files,
            hub,
            cdn,
            folder,
            settings,
        }
    }

    fn repo(&self) -> PathBuf {
        self.settings.cache.join("models--tiny--model")
    }

    fn snapshot(&self) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT)
    }

    fn blob(&self, name: &str) -> PathBuf {
        let bytes = bytes_of(&self.files, name);
        let tag = if is_large(name) {
            sha256(bytes)
        } else {
            git_hash(bytes)
        };
        self.repo().join("blobs").join(tag)
    }

    fn incomplete(&self, name: &str) -> PathBuf {
        self.blob(name).with_extension("incomplete")
    }

    fn fetch(&self) -> Result<PathBuf> {
        self.fetch_at("main", &mut Seen::default())
    }

    fn fetch_at(&self, revision: &str, watch: &mut Seen) -> Result<PathBuf> {
        let started = Instant::now();
        let (id, revision) = (RepoId::parse("tiny/model"), Revision::parse(revision));
        let out = hub::fetch(&self.settings, &id.unwrap(), &revision.unwrap(), watch);
        assert!(started.elapsed() < Duration::from_secs(60), "it is bounded");
        out
    }

    /// The folder of the model, in which every file is what the hub has, and nothing is left over.
    #[track_caller]
    fn must_come(&self) -> PathBuf {
        let folder = self.fetch().unwrap();
        assert_eq!(folder, self.snapshot());
        self.must_be_whole();
        folder
    }

    #[track_caller]
    fn must_be_whole(&self) {
        let wanted = |name: &str| {
            let shard = name.starts_with("model-") && is_large(name);
            let known = [
                "config.json",
                "generation_config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "chat_template.jinja",
                WEIGHTS,
                INDEX,
            ];
            shard || known.contains(&name)
        };
        let mut names: Vec<_> = self.files.iter().map(|(name, _)| name.clone()).collect();
        names.retain(|name| wanted(name));
        names.sort();
        assert_eq!(in_folder(&self.snapshot()), names, "no more and no less");
        for name in names {
            let bytes = fs::read(self.snapshot().join(&name)).unwrap();
            assert!(bytes == bytes_of(&self.files, &name), "{name} is another");
            if cfg!(unix) {
                let target = fs::read_link(self.snapshot().join(&name)).unwrap();
                let tag = self.blob(&name).file_name().unwrap().to_owned();
                assert_eq!(target, Path::new("../../blobs").join(tag));
            }
        }
        self.must_hold_no_ruins();
    }

    /// Nothing half is in the cache, nothing beside it.
    #[track_caller]
    fn must_hold_no_ruins(&self) {
        for blob in in_folder(&self.repo().join("blobs")) {
            assert!(!blob.contains('.'), "{blob} was left");
        }
        assert!(
            in_folder(self.folder.path()).len() <= 1,
            "something is beside the cache"
        );
    }

    /// The error of a download, which names the model, and after which nothing stands for it.
    #[track_caller]
    fn must_fail(&self, words: &[&str]) -> String {
        let error = self.fetch().expect_err("it cannot come");
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "no '{word}' in: {text}");
        }
        assert!(!text.contains(SECRET), "the token is told: {text}");
        assert!(!text.contains("signature=1"), "a signature is told: {text}");
        for name in in_folder(&self.snapshot()) {
            let bytes = fs::read(self.snapshot().join(&name)).unwrap();
            assert!(bytes == bytes_of(&self.files, &name), "{name} was taken");
        }
        text
    }
}

#[derive(Default)]
struct Seen {
    notes: Vec<String>,
    total: (usize, u64),
    at: u64,
    accepted: usize,
    refuse: bool,
}

impl hub::Watch for Seen {
    fn accept(&mut self, folder: &Path) -> Result<()> {
        self.accepted += 1;
        assert!(
            folder.join("config.json").exists(),
            "small files come first"
        );
        if self.refuse {
            return Err(Error::unsupported(folder, "it", "take another"));
        }
        Ok(())
    }

    fn total(&mut self, files: usize, bytes: u64) {
        self.total = (files, bytes);
    }

    fn at(&mut self, bytes: u64) {
        self.at = bytes;
    }

    fn note(&mut self, text: &str) {
        self.notes.push(text.to_owned());
    }
}

fn in_folder(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[cfg(unix)]
fn link(target: impl AsRef<Path>, path: impl AsRef<Path>) {
    std::os::unix::fs::symlink(target, path).unwrap();
}

#[test]
fn a_model_comes_once_and_is_laid_out_as_elsewhere() {
    let world = World::new(files());
    let mut seen = Seen::default();
    world.fetch_at("main", &mut seen).unwrap();
    world.must_be_whole();
    let main = fs::read_to_string(world.repo().join("refs/main")).unwrap();
    assert_eq!(main, COMMIT);
    let absent = in_folder(&world.repo().join(".no_exist").join(COMMIT));
    let known = [
        "chat_template.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ];
    assert_eq!(absent, known, "what the model does not have");
    assert_eq!(seen.total.0, 5, "files");
    assert_eq!(
        (seen.total.1, seen.accepted),
        (seen.at, 1),
        "all bytes are counted"
    );
    assert!(seen.notes.is_empty(), "nothing to tell: {:?}", seen.notes);

    let asked = (world.hub.seen().len(), world.cdn.seen().len());
    world.must_come();
    world.fetch_at(COMMIT, &mut Seen::default()).unwrap();
    let again = (world.hub.seen().len(), world.cdn.seen().len());
    assert_eq!(asked, again, "nobody is asked for what is there");
}

#[test]
fn of_several_weight_files_those_of_the_index_come() {
    let world = World::new(sharded());
    world.must_come();
    assert_eq!(world.cdn.seen().len(), 2, "one request for each");
    let shard = world.blob("model-00002-of-00002.safetensors");
    fs::remove_file(&shard).unwrap();
    world.must_come();
    assert_eq!(
        world.cdn.seen().len(),
        3,
        "only what is missing comes again"
    );
}

#[test]
fn a_revision_is_a_branch_a_tag_a_reference_or_a_commit() {
    let world = World::new(files());
    for (n, revision) in ["v1", "refs/pr/1", COMMIT].into_iter().enumerate() {
        let folder = world.fetch_at(revision, &mut Seen::default()).unwrap();
        assert_eq!(folder, world.snapshot());
        let loads = world.cdn.seen().len();
        assert_eq!(loads, 1, "revision {n} has the same contents");
    }
    let refs = world.repo().join("refs");
    assert_eq!(fs::read_to_string(refs.join("refs/pr/1")).unwrap(), COMMIT);
    assert_eq!(fs::read_to_string(refs.join("v1")).unwrap(), COMMIT);
    assert!(!refs.join(COMMIT).exists(), "a commit needs no reference");

    let error = world.fetch_at("v2", &mut Seen::default()).unwrap_err();
    assert!(error.to_string().contains("no revision v2"), "{error}");
    assert_eq!(error.exit_code(), 5);
}

#[test]
fn a_useless_model_is_refused_before_its_weights_come() {
    let world = World::new(sharded());
    let mut seen = Seen {
        refuse: true,
        ..Seen::default()
    };
    let error = world.fetch_at("main", &mut seen).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(world.cdn.seen().is_empty(), "no weights");
}

#[test]
fn what_is_cut_goes_on_where_it_stopped() {
    let cut = |_: &Request, reply: Reply| reply.sent(Sending::Cut(100_000));
    let world = World::twisted(files(), as_it_is(), at_first(2, cut));
    world.must_come();
    let from: Vec<_> = world.cdn.seen().iter().map(Request::from).collect();
    assert_eq!(from, [None, Some(100_000), Some(200_000)]);
}

#[test]
fn a_small_file_is_resumed_too() {
    let cut = |request: &Request, reply: Reply| match request.path.ends_with("/tokenizer.json") {
        true => reply.sent(Sending::Cut(5)),
        false => reply,
    };
    let world = World::twisted(files(), at_first(1, cut), as_it_is());
    world.must_come();
    let asked = world.hub.asked("GET", "/tokenizer.json");
    let from: Vec<_> = asked.iter().map(Request::from).collect();
    assert_eq!(from, [None, Some(5)]);
}

#[test]
fn who_always_cuts_is_given_up_and_what_came_is_kept() {
    let cut = |_: &Request, reply: Reply| reply.sent(Sending::Cut(1000));
    let world = World::twisted(files(), as_it_is(), at_first(usize::MAX, cut));
    world.must_fail(&["tiny/model", WEIGHTS, "4000 of 300000"]);
    assert_eq!(world.cdn.seen().len(), 4, "as many attempts as there are");
    let len = fs::metadata(world.incomplete(WEIGHTS)).unwrap().len();
    assert_eq!(len, 4000, "for the next time");
    assert!(!world.blob(WEIGHTS).exists(), "it is not whole");
}

#[test]
fn a_good_piece_is_worth_more_attempts() {
    let cut = |_: &Request, reply: Reply| reply.sent(Sending::Cut(20_000));
    let mut world = World::twisted(files(), as_it_is(), at_first(usize::MAX, cut));
    world.settings.limits.progress = 20_000;
    world.must_come();
    assert_eq!(world.cdn.seen().len(), 15, "more than the four attempts");
}

#[test]
fn who_stalls_or_drips_is_left_and_asked_again() {
    for sending in [
        Sending::Stall(100_000),
        Sending::Drip(100_000),
        Sending::Stall(0),
    ] {
        let stall = move |_: &Request, reply: Reply| reply.sent(sending);
        let mut world = World::twisted(files(), as_it_is(), at_first(1, stall));
        world.settings.limits.stall = Duration::from_millis(400);
        world.settings.limits.tries = 20;
        world.must_come();
        assert!(world.cdn.seen().len() > 1, "{sending:?} is not waited for");
        let last = world.cdn.seen().last().unwrap().from().unwrap_or(0);
        let kept = if matches!(sending, Sending::Stall(0)) {
            0
        } else {
            100_000
        };
        assert!(last >= kept, "{sending:?}: it went on from {last}");
    }
}

#[test]
fn a_listing_that_never_ends_is_left() {
    for sending in [Sending::Stall(3), Sending::Drip(0), Sending::EndlessHeaders] {
        let slow = move |_: &Request, reply: Reply| reply.sent(sending);
        let mut world = World::twisted(files(), whenever("GET", "/main", slow), as_it_is());
        world.settings.limits.answer = Duration::from_millis(300);
        world.settings.limits.tries = 2;
        world.must_fail(&["tiny/model"]);
    }
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let world = World::new(files());
    world.must_come();
    let bearer = format!("Bearer {SECRET}");
    for request in world.hub.seen() {
        assert_eq!(
            request.header("authorization"),
            Some(&*bearer),
            "{request:?}"
        );
    }
    assert!(
        !world.cdn.seen().is_empty(),
        "the weights came from elsewhere"
    );
    for request in world.cdn.seen() {
        let secret = request
            .headers
            .iter()
            .any(|(_, value)| value.contains(SECRET));
        assert!(!secret && !request.path.contains(SECRET), "{request:?}");
    }

    // A hub that sends even its listing elsewhere, and a file through three others back to itself.
    let stranger = Server::start(|request, _| match request.path.as_str() {
        "/listing" => Reply::new(500, "no"),
        _ => Reply::new(404, "no"),
    });
    let url = stranger.url.clone();
    let away =
        move |_: &Request, _: Reply| Reply::new(302, "").with("location", format!("{url}/listing"));
    let world = World::twisted(files(), whenever("GET", "/main", away), as_it_is());
    world.must_fail(&["500"]);
    assert_eq!(stranger.seen().len(), 4, "it was followed");
    for request in stranger.seen() {
        assert_eq!(request.header("authorization"), None, "{request:?}");
    }
}

#[test]
fn redirections_are_followed_within_the_hub_and_bounded() {
    let renamed = |request: &Request, reply: Reply| match request.path.contains("/new") {
        true => reply,
        false => Reply::new(307, "").with("location", format!("{}/new", request.path)),
    };
    // The listing is under another name, as of a model that was renamed.
    let world = World::twisted(
        files(),
        Box::new(move |request, _, reply| {
            if request.path.ends_with("/main/new") {
                let mut old = request.clone();
                old.path = old.path.replace("/new", "");
                return hub_says(&files(), "", &old);
            }
            if request.path.ends_with("/main") {
                return renamed(request, reply);
            }
            reply
        }),
        as_it_is(),
    );
    world.must_come();

    let round = |request: &Request, _: Reply| Reply::new(302, "").with("location", &request.path);
    let world = World::twisted(files(), whenever("GET", "/main", round), as_it_is());
    world.must_fail(&["without an end"]);
    assert_eq!(world.hub.seen().len(), 6, "no longer than it is allowed");

    for bad in [
        "file:///etc/passwd",
        "ftp://x/y",
        "http://user:pass@127.0.0.1/",
        "http://",
    ] {
        let away = move |_: &Request, _: Reply| Reply::new(302, "").with("location", bad);
        let world = World::twisted(files(), whenever("GET", "/main", away), as_it_is());
        world.must_fail(&["tiny/model", "nothing may be asked"]);
    }
    let nowhere = |_: &Request, _: Reply| Reply::new(302, "");
    let world = World::twisted(files(), whenever("GET", "/main", nowhere), as_it_is());
    world.must_fail(&["leads nowhere"]);
}

#[test]
fn lies_about_length_are_found() {
    // The store announces another length than the hub.
    for lie in [299_999, 300_001, 0, u64::MAX] {
        let other = move |_: &Request, reply: Reply| reply.with("content-length", lie);
        let world = World::twisted(files(), as_it_is(), at_first(usize::MAX, other));
        world.must_fail(&[WEIGHTS]);
    }
    // The hub announces another length than the store sends.
    for lie in ["299999", "300001", "18446744073709551615"] {
        let other = move |_: &Request, mut reply: Reply| {
            reply.headers.retain(|(name, _)| *name != "x-linked-size");
            reply.with("x-linked-size", lie)
        };
        let world = World::twisted(files(), whenever("HEAD", WEIGHTS, other), as_it_is());
        world.must_fail(&[WEIGHTS, lie]);
    }
    // No length at all, and no end.
    let endless = |_: &Request, reply: Reply| reply.sent(Sending::Endless);
    let world = World::twisted(files(), as_it_is(), at_first(usize::MAX, endless));
    world.must_fail(&[WEIGHTS, "longer than its 300000"]);
    let len = fs::metadata(world.incomplete(WEIGHTS)).unwrap().len();
    assert_eq!(len, 0, "nothing of it is kept");
    // Once is forgiven.
    let world = World::twisted(files(), as_it_is(), at_first(1, endless));
    world.must_come();
}

#[test]
fn other_bytes_are_never_taken() {
    let other = |_: &Request, mut reply: Reply| {
        reply.body[1000] ^= 1;
        reply
    };
    let world = World::twisted(files(), as_it_is(), at_first(usize::MAX, other));
    let hash = sha256(bytes_of(&world.files, WEIGHTS));
    world.must_fail(&[WEIGHTS, &hash]);
    assert_eq!(
        world.cdn.seen().len(),
        1,
        "a whole wrong file is not asked for again"
    );
    world.must_hold_no_ruins();

    // Small files have git's hash.
    let other = |request: &Request, mut reply: Reply| {
        if request.path.ends_with("/config.json") {
            reply.body[3] ^= 1;
        }
        reply
    };
    let world = World::twisted(files(), at_first(usize::MAX, other), as_it_is());
    let hash = git_hash(bytes_of(&world.files, "config.json"));
    world.must_fail(&["config.json", &hash]);
}

#[test]
fn a_spoilt_beginning_is_thrown_away() {
    let world = World::new(files());
    fs::create_dir_all(world.repo().join("blobs")).unwrap();
    // Of another content; too long; as long as the whole.
    for (len, requests) in [(1000, 2), (300_001, 1), (300_000, 1)] {
        let before = world.cdn.seen().len();
        fs::write(world.incomplete(WEIGHTS), noise(len, 9)).unwrap();
        world.must_come();
        assert_eq!(world.cdn.seen().len() - before, requests, "{len} bytes");
        fs::remove_file(world.blob(WEIGHTS)).unwrap();
    }
    // The whole, but for its name.
    fs::write(world.incomplete(WEIGHTS), bytes_of(&world.files, WEIGHTS)).unwrap();
    let before = world.cdn.seen().len();
    world.must_come();
    assert_eq!(world.cdn.seen().len(), before, "nothing is left to ask for");
}

#[test]
fn ranges_that_are_ignored_refused_or_wrong_start_anew() {
    let ignored = |request: &Request, reply: Reply| match request.from() {
        Some(_) => Reply::new(200, bytes_of(&files(), WEIGHTS)),
        None => reply,
    };
    let refused = |request: &Request, reply: Reply| match request.from() {
        Some(_) => Reply::new(416, ""),
        None => reply,
    };
    let wrong = |request: &Request, reply: Reply| match request.from() {
        Some(from) => Reply::new(206, &bytes_of(&files(), WEIGHTS)[from + 1..])
            .with("content-range", format!("bytes {}-299999/300000", from + 1)),
        None => reply,
    };
    let unnamed = |request: &Request, mut reply: Reply| {
        if request.from().is_some() {
            reply.headers.clear();
        }
        reply
    };
    let twists: [fn(&Request, Reply) -> Reply; 4] = [ignored, refused, wrong, unnamed];
    for twist in twists {
        let world = World::twisted(files(), as_it_is(), at_first(usize::MAX, twist));
        fs::create_dir_all(world.repo().join("blobs")).unwrap();
        fs::write(
            world.incomplete(WEIGHTS),
            &bytes_of(&world.files, WEIGHTS)[..1000],
        )
        .unwrap();
        world.must_come();
        let first = world.cdn.seen()[0].from();
        assert_eq!(first, Some(1000), "it was tried");
    }
}

#[test]
fn refusals_say_what_to_do_and_are_not_repeated() {
    let says = |status: u16, code: &'static str, token: bool, words: &[&str]| {
        let refuse =
            move |_: &Request, _: Reply| Reply::new(status, "no").with("x-error-code", code);
        let mut world = World::twisted(files(), whenever("GET", "/main", refuse), as_it_is());
        if !token {
            world.settings.token = None;
        }
        let text = world.must_fail(words);
        assert!(text.contains("tiny/model"), "{text}");
        assert_eq!(world.hub.seen().len(), 1, "{status} will not change");
        assert_eq!(world.fetch().unwrap_err().exit_code(), 5);
    };
    says(
        401,
        "",
        false,
        &["401", "HF_TOKEN", "licence", "/tiny/model"],
    );
    says(401, "", true, &["401", "does not take the token"]);
    says(403, "GatedRepo", true, &["403", "licence", "/tiny/model"]);
    says(403, "GatedRepo", false, &["403", "HF_TOKEN"]);
    says(
        404,
        "RepoNotFound",
        true,
        &["404", "no such model", "check both names"],
    );
    says(404, "RevisionNotFound", true, &["no revision main"]);
    says(410, "", true, &["410"]);
    says(418, "", true, &["418"]);

    // Of a file, when the listing is public.
    for end in ["/config.json", WEIGHTS] {
        let gated = |_: &Request, _: Reply| Reply::new(403, "").with("x-error-code", "GatedRepo");
        let world = World::twisted(files(), whenever("HEAD", end, gated), as_it_is());
        world.must_fail(&["403", "licence"]);
    }
    let gone = |_: &Request, _: Reply| Reply::new(404, "").with("x-error-code", "EntryNotFound");
    let world = World::twisted(files(), whenever("HEAD", WEIGHTS, gone), as_it_is());
    world.must_fail(&[WEIGHTS, "not there"]);
    // Of the store, that the address is no longer valid: the hub gives another.
    let expired = |_: &Request, _: Reply| Reply::new(403, "expired");
    let world = World::twisted(files(), as_it_is(), at_first(1, expired));
    world.must_come();
    assert_eq!(
        world.hub.asked("GET", WEIGHTS).len(),
        2,
        "it was asked again"
    );
    let world = World::twisted(files(), as_it_is(), at_first(usize::MAX, expired));
    world.must_fail(&["403", &world.cdn.url]);
}

#[test]
fn failures_that_pass_are_waited_for() {
    for status in [408, 429, 500, 502, 503, 504] {
        let busy = move |_: &Request, _: Reply| Reply::new(status, "busy");
        let world = World::twisted(files(), at_first(2, busy), at_first(1, busy));
        let mut seen = Seen::default();
        world.fetch_at("main", &mut seen).unwrap();
        world.must_be_whole();
        let told = seen
            .notes
            .iter()
            .any(|note| note.contains(&status.to_string()));
        assert!(told, "a person is told: {:?}", seen.notes);
    }
    let busy = |_: &Request, _: Reply| Reply::new(500, "busy");
    let world = World::twisted(files(), at_first(usize::MAX, busy), as_it_is());
    world.must_fail(&["500"]);
    assert_eq!(world.hub.seen().len(), 4, "as many attempts as there are");
}

#[test]
fn the_hub_may_say_how_long_to_wait_but_not_for_ever() {
    let busy = |_: &Request, _: Reply| Reply::new(429, "").with("retry-after", 1);
    let world = World::twisted(
        files(),
        Box::new({
            let busy = at_first(1, busy);
            move |request, before, reply| match request.path.ends_with("/main") {
                true => busy(request, before, reply),
                false => reply,
            }
        }),
        as_it_is(),
    );
    let started = Instant::now();
    world.must_come();
    assert!(
        started.elapsed() >= Duration::from_secs(1),
        "as it was asked to"
    );

    for long in ["3600", "18446744073709551615"] {
        let busy = move |_: &Request, _: Reply| Reply::new(429, "").with("retry-after", long);
        let world = World::twisted(files(), at_first(usize::MAX, busy), as_it_is());
        world.must_fail(&["429", long]);
        assert_eq!(world.hub.seen().len(), 1, "nobody waits for so long");
    }
    // A date, or nonsense: the usual time.
    let busy = |_: &Request, _: Reply| {
        Reply::new(429, "").with("retry-after", "Wed, 21 Oct 2065 07:28:00 GMT")
    };
    let world = World::twisted(files(), at_first(1, busy), as_it_is());
    world.must_come();
}

#[test]
fn a_listing_that_is_none_is_refused() {
    let listing = |sha: &str, names: &[&str]| {
        let siblings: Vec<_> = names.iter().map(|n| json!({ "rfilename": n })).collect();
        json!({ "sha": sha, "siblings": siblings }).to_string()
    };
    let all = ["config.json", "tokenizer.json", WEIGHTS];
    for (body, words) in [
        ("<html>log in</html>".to_owned(), vec!["login page"]),
        (String::new(), vec!["login page"]),
        ("[".repeat(50_000), vec!["login page"]),
        ("{\"sha\":1}".to_owned(), vec!["login page"]),
        ("{\"siblings\":[]}".to_owned(), vec!["login page"]),
        (listing("main", &all), vec!["no commit"]),
        (listing("../../x", &all), vec!["no commit"]),
        (listing(&COMMIT[..39], &all), vec!["no commit"]),
        (listing(COMMIT, &[]), vec!["config.json"]),
        (
            listing(COMMIT, &["config.json", WEIGHTS]),
            vec!["no tokenizer.json"],
        ),
        (
            listing(COMMIT, &["config.json", "tokenizer.json"]),
            vec!["no weights"],
        ),
        (
            listing(COMMIT, &["config.json", "tokenizer.json", "x.Q4_K_M.gguf"]),
            vec!["no weights", "x.Q4_K_M.gguf"],
        ),
        (" ".repeat(100_001), vec!["over 100000 bytes"]),
    ] {
        let answer = body.clone();
        let other = move |_: &Request, _: Reply| Reply::new(200, answer.clone());
        let world = World::twisted(files(), whenever("GET", "/main", other), as_it_is());
        world.must_fail(&words);
        assert_eq!(world.hub.seen().len(), 1, "and nobody is asked again");
        assert!(!world.repo().exists(), "nothing is begun");
    }
    let endless = |_: &Request, _: Reply| Reply::new(200, "[1,").sent(Sending::Endless);
    let world = World::twisted(files(), whenever("GET", "/main", endless), as_it_is());
    world.must_fail(&["over 100000 bytes"]);
}

#[test]
fn hostile_names_lead_nowhere() {
    // In the index.
    for name in [
        "../../../../escaped.safetensors",
        "/tmp/escaped.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        ".hidden.safetensors",
        "x\0.safetensors",
        "config.json",
        "",
    ] {
        let mut files = sharded();
        files.retain(|(name, _)| name != INDEX);
        let index = json!({ "weight_map": { "a": name } }).to_string();
        files.push((INDEX.to_owned(), index.into_bytes()));
        files.push((name.to_owned(), b"never".to_vec()));
        let world = World::new(files);
        world.must_fail(&[INDEX, "weight_map"]);
        assert!(world.cdn.seen().is_empty(), "{name:?}: no weights");
        world.must_hold_no_ruins();
    }
    // The tag of a content is the name of its file.
    for tag in [
        "../../../escaped",
        "/tmp/escaped",
        "..",
        "",
        "a.incomplete",
        "a\\b",
        &"a".repeat(200),
    ] {
        for (end, header) in [("/config.json", "etag"), (WEIGHTS, "x-linked-etag")] {
            let tag = format!("\"{tag}\"");
            let other = move |_: &Request, mut reply: Reply| {
                reply.headers.retain(|(name, _)| *name != header);
                reply.with(header, &tag)
            };
            let world = World::twisted(files(), whenever("HEAD", end, other), as_it_is());
            world.must_fail(&["does not say what"]);
            world.must_hold_no_ruins();
        }
    }
    // Nothing that says what the content is.
    let bare = |_: &Request, mut reply: Reply| {
        reply.headers.retain(|(name, _)| *name != "etag");
        reply
    };
    let world = World::twisted(files(), whenever("HEAD", "/config.json", bare), as_it_is());
    world.must_fail(&["config.json", "tag is missing"]);
    // Another commit than was asked for.
    let other = |_: &Request, mut reply: Reply| {
        reply.headers.retain(|(name, _)| *name != "x-repo-commit");
        reply.with("x-repo-commit", "f".repeat(40))
    };
    let world = World::twisted(files(), whenever("HEAD", "/config.json", other), as_it_is());
    world.must_fail(&["another commit"]);
    // A small file that is none.
    let huge = |_: &Request, reply: Reply| reply.with("content-length", 1_u64 << 40);
    let world = World::twisted(
        files(),
        whenever("HEAD", "/tokenizer.json", huge),
        as_it_is(),
    );
    world.must_fail(&["tokenizer.json", "1099511627776"]);
}

#[test]
fn an_index_names_files_that_are_there() {
    let mut files = sharded();
    files.retain(|(name, _)| name != "model-00002-of-00002.safetensors");
    let world = World::new(files);
    world.must_fail(&["model-00002-of-00002.safetensors", INDEX]);
}

#[test]
fn a_tag_that_is_no_hash_is_checked_by_length() {
    let tagged = |_: &Request, mut reply: Reply| {
        reply.headers.retain(|(name, _)| *name != "etag");
        reply.with("etag", "\"version-7\"")
    };
    let world = World::twisted(
        files(),
        whenever("HEAD", "/config.json", tagged),
        as_it_is(),
    );
    world.fetch().unwrap();
    assert!(
        world.repo().join("blobs/version-7").exists(),
        "under its tag"
    );
}

#[test]
fn two_at_once_download_each_content_once() {
    let slow = |_: &Request, reply: Reply| {
        std::thread::sleep(Duration::from_millis(200));
        reply
    };
    let world = World::twisted(files(), as_it_is(), at_first(usize::MAX, slow));
    let notes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut seen = Seen::default();
                world.fetch_at("main", &mut seen).unwrap();
                notes.lock().unwrap().extend(seen.notes);
            });
        }
    });
    world.must_be_whole();
    assert_eq!(world.cdn.seen().len(), 1, "the others wait");
    let notes = notes.into_inner().unwrap();
    assert!(
        notes.iter().any(|n| n.contains("another process")),
        "{notes:?}"
    );
}

#[test]
fn offline_nobody_is_asked() {
    let mut world = World::new(files());
    world.settings.offline = true;
    let text = world.must_fail(&["tiny/model", "main", "HF_HUB_OFFLINE"]);
    assert!(
        text.contains(world.settings.cache.to_str().unwrap()),
        "{text}"
    );
    assert!(world.hub.seen().is_empty(), "nobody is asked");
    assert!(!world.settings.cache.exists(), "nothing is made");

    world.settings.offline = false;
    world.must_come();
    let asked = world.hub.seen().len();
    world.settings.offline = true;
    world.must_come();
    world.fetch_at(COMMIT, &mut Seen::default()).unwrap();
    for (name, blob) in [
        (WEIGHTS, world.blob(WEIGHTS)),
        ("config.json", world.blob("config.json")),
    ] {
        fs::rename(&blob, world.folder.path().join("away")).unwrap();
        let error = world.fetch().unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains("HF_HUB_OFFLINE"),
            "{error}"
        );
        fs::rename(world.folder.path().join("away"), &blob).unwrap();
    }
    // What a model can be without is not missed.
    fs::remove_file(world.snapshot().join("chat_template.jinja")).unwrap();
    world.fetch().unwrap();
    let error = world
        .fetch_at("v1", &mut Seen::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("v1"), "{error}");
    assert_eq!(world.hub.seen().len(), asked, "nobody is asked");
}

#[test]
fn what_another_program_left_out_is_brought_or_done_without() {
    let world = World::new(files());
    world.must_come();
    let template = world.snapshot().join("chat_template.jinja");
    let bring = |broken: bool| {
        fs::remove_file(&template).unwrap();
        fs::remove_dir_all(world.repo().join(".no_exist")).unwrap();
        let mut settings = world.settings.clone();
        if broken {
            settings.endpoint = world.cdn.url.clone();
        }
        let (id, mut seen) = (RepoId::parse("tiny/model").unwrap(), Seen::default());
        let folder = hub::fetch(&settings, &id, &Revision::default(), &mut seen).unwrap();
        assert_eq!(folder, world.snapshot());
        seen
    };
    let loads = world.cdn.seen().len();
    let seen = bring(false);
    world.must_be_whole();
    assert_eq!((seen.total.0, seen.accepted), (1, 0), "only this file");
    assert_eq!(world.cdn.seen().len(), loads, "no weights");
    let asked = world.hub.seen();
    let listing = asked.iter().rfind(|r| r.path.starts_with("/api")).unwrap();
    assert!(
        listing.path.ends_with(COMMIT),
        "of this commit, not a newer one"
    );

    let seen = bring(true);
    assert!(!template.exists(), "nobody had it");
    assert!(
        seen.notes[0].contains("as it is in the cache"),
        "{:?}",
        seen.notes
    );
}

#[cfg(unix)]
#[test]
fn what_is_spoilt_in_the_cache_is_brought_again_or_refused() {
    let world = World::new(files());
    world.must_come();
    let weights = world.snapshot().join(WEIGHTS);

    // A link to nowhere, a missing link, a reference that is none.
    fs::remove_file(&weights).unwrap();
    link("../../blobs/gone", &weights);
    world.must_come();
    fs::remove_file(&weights).unwrap();
    world.must_come();
    for text in ["", "main", "../../x", &"g".repeat(40), &"0".repeat(5000)] {
        fs::write(world.repo().join("refs/main"), text).unwrap();
        world.must_come();
    }
    assert_eq!(world.cdn.seen().len(), 1, "the contents were there");
    // A content of another length.
    fs::remove_file(&weights).unwrap();
    fs::write(world.blob(WEIGHTS), "short").unwrap();
    world.must_come();

    // Links that lead out, even to the very file.
    let outside = world.folder.path().join("hub/elsewhere");
    fs::write(&outside, bytes_of(&world.files, WEIGHTS)).unwrap();
    let asked = world.hub.seen().len();
    for target in [
        outside.as_path(),
        Path::new("/etc/passwd"),
        Path::new("../../../elsewhere"),
    ] {
        fs::remove_file(&weights).unwrap();
        link(target, &weights);
        let error = world.fetch().unwrap_err();
        assert!(matches!(error, Error::BadFile { .. }), "{error}");
        let error = error.to_string();
        assert!(
            error.contains(WEIGHTS) && error.contains("leads out"),
            "{error}"
        );
    }
    fs::remove_file(&weights).unwrap();
    fs::create_dir(&weights).unwrap();
    let error = world.fetch().unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    assert_eq!(world.hub.seen().len(), asked, "nobody is asked");
    fs::remove_dir(&weights).unwrap();
    world.must_come();

    // A snapshot that is a link.
    let away = world.folder.path().join("hub/away");
    fs::rename(world.snapshot(), &away).unwrap();
    link(&away, world.snapshot());
    let error = world.fetch().unwrap_err().to_string();
    assert!(error.contains(COMMIT) && error.contains("link"), "{error}");
    // What comes is not written through a link.
    fs::remove_file(world.snapshot()).unwrap();
    fs::rename(&away, world.snapshot()).unwrap();
    fs::remove_file(world.blob(WEIGHTS)).unwrap();
    fs::write(&outside, "mine").unwrap();
    link(&outside, world.incomplete(WEIGHTS));
    world.must_come();
    assert_eq!(fs::read(&outside).unwrap(), b"mine");
    // Nor are contents that are links.
    fs::remove_file(world.blob(WEIGHTS)).unwrap();
    link(&outside, world.blob(WEIGHTS));
    let error = world.fetch().unwrap_err().to_string();
    assert!(error.contains("leads out"), "{error}");
}

#[cfg(unix)]
#[test]
fn contents_that_repositories_share_are_found() {
    let world = running(as_it_is(), as_it_is());
    world.must_come();
    // As newer versions of huggingface_hub keep them.
    let name = "ab".repeat(32);
    let store = world.settings.cache.join("blobs/ab");
    fs::create_dir_all(&store).unwrap();
    fs::rename(world.blob(WEIGHTS), store.join(&name)).unwrap();
    link(format!("../../blobs/ab/{name}"), world.blob(WEIGHTS));
    let asked = world.hub.seen().len();
    let folder = world.must_come();
    assert_eq!(world.hub.seen().len(), asked, "nobody is asked");
    ModelFiles::open(folder).unwrap();
    let listed = &hub::list(&world.settings.cache).unwrap()[0];
    assert!(listed.snapshots[0].missing.is_empty(), "{listed:?}");
    let whole = bytes_of(&world.files, WEIGHTS).len() as u64;
    assert!(listed.bytes > whole, "{listed:?}");

    // Other files of the store are none.
    fs::remove_file(world.blob(WEIGHTS)).unwrap();
    fs::write(store.join("notes"), "x").unwrap();
    link("../../blobs/ab/notes", world.blob(WEIGHTS));
    assert!(world.fetch().is_err(), "no content");
    assert!(ModelFiles::open(world.snapshot()).is_err(), "no content");
}

#[test]
fn errors_of_the_disk_name_the_file() {
    let world = World::new(files());
    fs::write(&world.settings.cache, "a file").unwrap();
    let error = world.fetch().unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let cache = world.settings.cache.to_str().unwrap();
    assert!(error.to_string().contains(cache), "{error}");
    fs::remove_file(&world.settings.cache).unwrap();

    // The content's place is taken by a folder.
    fs::create_dir_all(world.blob(WEIGHTS).join("x")).unwrap();
    let error = world.fetch().unwrap_err().to_string();
    assert!(
        error.contains(&sha256(bytes_of(&world.files, WEIGHTS))),
        "{error}"
    );
}

#[test]
fn the_cache_lists_what_it_holds() {
    let world = World::new(files());
    assert!(
        hub::list(&world.settings.cache).unwrap().is_empty(),
        "no cache"
    );
    world.must_come();
    world.fetch_at("refs/pr/1", &mut Seen::default()).unwrap();
    fs::write(world.incomplete(WEIGHTS), "more").unwrap();
    // Other things that caches hold.
    for folder in [
        "datasets--a--b",
        ".locks",
        "models--",
        "models--gpt2/snapshots",
        "x",
    ] {
        fs::create_dir_all(world.settings.cache.join(folder)).unwrap();
    }
    fs::write(world.settings.cache.join("models--a--file"), "x").unwrap();
    let half = world
        .settings
        .cache
        .join("models--a--half/snapshots")
        .join(COMMIT);
    fs::create_dir_all(&half).unwrap();
    fs::write(half.join("config.json"), "{\"model_type\":\"gemma\"}").unwrap();
    let bad = world
        .settings
        .cache
        .join("models--a--bad/snapshots")
        .join(COMMIT);
    fs::create_dir_all(&bad).unwrap();
    fs::write(
        bad.join(INDEX),
        "{\"weight_map\":{\"a\":\"../x.safetensors\"}}",
    )
    .unwrap();

    let listed = hub::list(&world.settings.cache).unwrap();
    let ids: Vec<_> = listed.iter().map(|model| model.id.as_str()).collect();
    assert_eq!(ids, ["a/bad", "a/half", "gpt2", "tiny/model"]);
    let problem = listed[0].snapshots[0].problem.as_ref().unwrap();
    assert!(problem.contains("../x.safetensors"), "{problem}");
    let half = &listed[1].snapshots[0];
    assert_eq!(half.missing, ["tokenizer.json", WEIGHTS]);
    assert_eq!(half.model_type.as_deref(), Some("gemma"));
    assert_eq!((half.bytes, listed[1].bytes), (22, 22));
    assert!(listed[2].snapshots.is_empty(), "nothing of it came");
    let tiny = &listed[3].snapshots[0];
    assert_eq!(tiny.revisions, ["main", "refs/pr/1"]);
    assert_eq!(
        (tiny.commit.as_str(), &tiny.folder),
        (COMMIT, &world.snapshot())
    );
    assert!(
        tiny.missing.is_empty() && tiny.problem.is_none(),
        "{tiny:?}"
    );
    assert_eq!(listed[3].bytes, tiny.bytes + 4, "each content once");
}

/// A world with a model that runs, and its command line.
fn running(hub_twist: Twist, cdn_twist: Twist) -> World {
    let names = in_folder(Path::new(MODEL)).into_iter();
    let read = |name: String| {
        let bytes = fs::read(Path::new(MODEL).join(&name)).unwrap();
        (name, bytes)
    };
    World::twisted(names.map(read).collect(), hub_twist, cdn_twist)
}

impl World {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hogwild"));
        for name in [
            "RUST_LOG",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HUGGING_FACE_HUB_TOKEN",
        ] {
            command.env_remove(name);
        }
        for name in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        command
            .args(args)
            .env_remove("HF_HUB_OFFLINE")
            .env_remove("TRANSFORMERS_OFFLINE")
            .env("HF_HOME", self.folder.path())
            .env("HF_ENDPOINT", &self.hub.url)
            .env("HF_TOKEN", SECRET)
            .env("NODEVICE_SELECT", "1")
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn hogwild(&self, args: &[&str]) -> (i32, String, String) {
        said(self.command(args))
    }
}

fn said(mut command: Command) -> (i32, String, String) {
    let ran = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(ran.stdout), text(ran.stderr));
    assert!(!err.contains("panicked") && !err.contains(SECRET), "{err}");
    (ran.status.code().unwrap(), out, err)
}

const RAW: [&str; 9] = [
    "generate",
    "--device",
    "cpu",
    "--raw",
    "--max-passes",
    "3",
    "--temp",
    "0",
    "-m",
];

#[test]
fn the_command_line_takes_a_name_where_it_takes_a_directory() {
    let world = running(as_it_is(), as_it_is());
    let run = |more: &[&str]| world.hogwild(&[&RAW[..], more].concat());
    let (code, empty, err) = world.hogwild(&["models"]);
    assert_eq!((code, empty.as_str()), (0, ""), "{err}");
    assert!(err.contains("no model"), "{err}");

    let (code, first, err) = run(&["tiny/model", "--log", "log", "x"]);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("downloading 6 files of tiny/model"), "{err}");
    let asked = world.hub.seen().len();
    let by_path = world.snapshot();
    let (code, second, err) = run(&[by_path.to_str().unwrap(), "x"]);
    assert_eq!((code, &second), (0, &first), "{err}");
    let (code, third, err) = run(&["tiny/model", "--revision", "main", "x"]);
    assert_eq!((code, &third), (0, &first), "{err}");
    assert_eq!(world.hub.seen().len(), asked, "nobody is asked again");
    for args in [
        vec!["replay", "log"],
        vec!["replay", "log", "-m", "tiny/model"],
    ] {
        let (code, out, err) = world.hogwild(&args);
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("no difference"), "{out}");
    }
    let (code, _, err) = world.hogwild(&["quantize", "tiny/model", "small", "--bits", "8"]);
    assert_eq!(code, 0, "{err}");

    let (code, out, err) = world.hogwild(&["models"]);
    assert_eq!(code, 0, "{err}");
    let lines: Vec<Vec<_>> = out
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[0],
        ["model", "revision", "size", "complete", "type", "supported"]
    );
    assert_eq!(lines[1][..2], ["tiny/model", "main"]);
    assert_eq!(lines[1][4..].first(), Some(&"yes"), "{out}");
    assert_eq!(lines[1].last(), Some(&"yes"), "{out}");
    let (_, out, _) = world.hogwild(&["models", "--format", "json"]);
    let listed: Value = serde_json::from_str(&out).unwrap();
    let snapshot = &listed["models"][0]["snapshots"][0];
    assert_eq!(listed["models"][0]["id"], "tiny/model");
    assert_eq!(snapshot["commit"], COMMIT);
    assert_eq!(
        (&snapshot["complete"], &snapshot["supported"]),
        (&json!(true), &json!(true))
    );

    // What is there by that name goes first; what is a path never is a name.
    fs::create_dir_all(world.folder.path().join("tiny/model")).unwrap();
    let (code, _, err) = run(&["tiny/model", "x"]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("tiny/model/config.json"), "{err}");
    let (code, _, err) = run(&["./tiny/other", "x"]);
    assert_ne!(code, 5, "{err}");
    let (code, _, err) = run(&["tiny/model", "--revision", "main", "x"]);
    assert_eq!(code, 2, "{err}");
    let (code, _, err) = run(&["tiny/third", "--revision", "../x", "x"]);
    assert_eq!(code, 2, "{err}");
    assert_eq!(world.hub.seen().len(), asked, "nobody is asked");
    let (code, _, err) = run(&["tiny/none", "x"]);
    assert_eq!(code, 5, "{err}");
    assert!(
        err.contains("tiny/none") && err.contains("no directory"),
        "{err}"
    );
    let mut offline = world.command(&[&RAW[..], &["tiny/none", "x"]].concat());
    offline.env("HF_HUB_OFFLINE", "1");
    let (code, _, err) = said(offline);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("HF_HUB_OFFLINE"), "{err}");
    assert_eq!(world.hub.seen().len(), asked + 1, "offline nobody is asked");
}

#[test]
fn a_killed_download_goes_on() {
    let stalls = Arc::new(AtomicBool::new(true));
    let on = stalls.clone();
    let stall = move |_: &Request, reply: Reply| match on.load(Ordering::SeqCst) {
        true => reply.sent(Sending::Stall(50_000)),
        false => reply,
    };
    let world = running(as_it_is(), at_first(usize::MAX, stall));
    let args = [&RAW[..], &["tiny/model", "x"]].concat();
    let mut child = world.command(&args).spawn().unwrap();
    let started = Instant::now();
    let has = || fs::metadata(world.incomplete(WEIGHTS)).map_or(0, |meta| meta.len());
    while has() < 50_000 {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "it never came so far"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!world.snapshot().join(WEIGHTS).exists(), "it is not whole");
    let (_, out, _) = world.hogwild(&["models"]);
    assert!(out.contains("lacks model.safetensors"), "{out}");

    stalls.store(false, Ordering::SeqCst);
    let (code, _, err) = world.hogwild(&args);
    assert_eq!(code, 0, "{err}");
    assert_eq!(world.cdn.seen().last().unwrap().from(), Some(50_000));
    assert!(!world.incomplete(WEIGHTS).exists(), "it is whole");
}
