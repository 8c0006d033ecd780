//! Models whose layers are on several devices: nothing of a run depends on where they are.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "common/adapter.rs"]
mod adapter;
mod common;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::tiny::{Random, TinyLatent, TinyModel};
use hogwild::Error;
use hogwild::cache::layout::View;
use hogwild::cache::pages::{BlockId, Pages};
use hogwild::cache::plan::{Batch, Logits, Turn};
use hogwild::device::{DType, Device, Tensor};
use hogwild::model::memory::{self, Need, Room};
use hogwild::model::{Engine, Model, ModelFiles, Placement, Wanted};
use hogwild::sampler::Sampling;
use serde_json::{Map, Value, json};

/// Five layers, of which some see a window; the head is the embedding.
fn tiny() -> TinyModel {
    TinyModel {
        layers: 5,
        bias: true,
        tied: true,
        window: Some(40),
        ..TinyModel::default()
    }
}

/// Five layers with a latent, four of them with experts.
fn latent() -> TinyModel {
    TinyModel {
        layers: 5,
        latent: Some(TinyLatent {
            q_rank: Some(24),
            rank: 32,
            nope: 16,
            rope: 8,
            v: 12,
            interleaved: true,
        }),
        ..TinyModel::default()
    }
}

/// A tiny model over devices, so many layers on each; weights are what was counted, and each told of once.
fn load(shape: &TinyModel, devices: &[&Arc<Device>], counts: &[usize]) -> Arc<Model> {
    let dir = tempfile::tempdir().unwrap();
    shape.write(dir.path(), "placement");
    let files = ModelFiles::open(dir.path()).unwrap();
    let placement = Placement::new(counts.to_vec(), 5).unwrap();
    let devices: Vec<_> = devices.iter().map(|&device| device.clone()).collect();
    let mut told = 0;
    let progress = &mut |bytes| told += bytes;
    let model = Model::load_over(&devices, &placement, &files, 512, progress).unwrap();
    assert_eq!(told, files.weight_bytes(), "each byte once");
    assert_eq!(model.placement(), placement, "as it was asked for");
    for stage in model.stages() {
        let counted = Need::of_layers(&files, stage.layers(), 512, DType::F32).weights;
        // A word that stands in for the scales of floats.
        let slack = stage.stored_bytes().abs_diff(counted);
        assert!(slack <= 4, "{:?}: {slack} bytes", stage.layers());
    }
    Arc::new(model)
}

/// All that a run leaves: logits, chosen ids, blocks, and the cache of every layer.
#[derive(Debug, PartialEq)]
struct Trace {
    logits: Vec<Vec<u32>>,
    ids: Vec<Option<u32>>,
    pages: Pages,
    cache: Vec<Vec<u8>>,
    n_ahead: u64,
}

fn turn(view: &[BlockId], tokens: &[u32], logits: Logits) -> Turn {
    Turn {
        view: View(view.to_vec()),
        tokens: tokens.to_vec(),
        logits,
    }
}

/// A prompt in two passes, workers who write beside each other, a step that is moved, tokens that are chosen in
/// passes that were recorded ahead, and one that was guessed wrong.
fn run(model: &Arc<Model>, checked: bool) -> Trace {
    let mut engine = Engine::new(model.clone(), DType::F32, 40, checked).unwrap();
    let sampling = Sampling {
        temperature: 0.9,
        ..Sampling::greedy()
    };
    engine.choose_by(sampling.rule(), &[3, 4]).unwrap();
    let mut random = Random::new("placement");
    let mut tokens = |n: usize| -> Vec<u32> {
        let token = |_| u32::try_from(random.below(96)).unwrap();
        (0..n).map(token).collect()
    };
    let [prompt, a, b, next] = [0; 4].map(|_| engine.cache.pages.open());
    let mut logits = engine.prefill(prompt, &tokens(270), Logits::Last).unwrap();
    engine.cache.pages.close(prompt);
    // Nothing is wanted of a pass.
    let turns = vec![turn(&[prompt, a], &tokens(7), Logits::None)];
    logits.extend(engine.pass(&Batch { turns }).unwrap());
    let turns = vec![
        turn(&[prompt, b, a], &tokens(3), Logits::All),
        turn(&[prompt, a, b], &tokens(1), Logits::All),
    ];
    logits.extend(engine.pass(&Batch { turns }).unwrap());
    engine.cache.pages.close(a);
    let mut ids = Vec::new();
    let mut now = [tokens(2), tokens(1)];
    let wanted = |tokens: &[Vec<u32>; 2], draw: u64| {
        let turns = vec![
            turn(&[prompt, a, b, next], &tokens[0], Logits::Last),
            turn(&[prompt, a, next, b], &tokens[1], Logits::Last),
        ];
        Wanted::new(Batch { turns }, vec![draw << 32, draw << 40])
    };
    for pass in 1..6 {
        let guess = if pass == 3 {
            [vec![0, 0], vec![0]]
        } else {
            [vec![0], vec![0]]
        };
        let guess = wanted(&guess, pass + 1);
        let chosen = engine.choose(&wanted(&now, pass), Some(guess)).unwrap();
        now = [0, 1].map(|i| vec![chosen[i].unwrap()]);
        ids.extend(chosen);
        if pass % 2 == 0 {
            engine.start(&wanted(&now, pass + 1));
        }
    }
    ids.push(engine.go_on(b, &tokens(5), 77, None).unwrap());
    let read = |t: &Tensor, layer: usize| {
        let device = model.stage_of(layer).device();
        device.read(t, 0, t.bytes()).unwrap()
    };
    let cache = (0..5).flat_map(|layer| engine.cache.layer(layer).map(|t| read(t, layer)));
    Trace {
        logits: logits
            .iter()
            .map(|row| row.iter().map(|v| v.to_bits()).collect())
            .collect(),
        ids,
        cache: cache.collect(),
        pages: engine.cache.pages.clone(),
        n_ahead: engine.n_ahead(),
    }
}

fn same_bits(shape: &TinyModel, a: &Arc<Device>, b: &Arc<Device>) {
    let want = run(&load(shape, &[a], &[5]), false);
    assert_eq!(want.logits.len(), 1 + 4, "the rows that were wanted");
    assert_eq!(want.n_ahead, 3, "one guess of four was wrong");
    let distinct = want.logits.iter().flatten();
    let distinct: std::collections::BTreeSet<_> = distinct.collect();
    assert!(distinct.len() > 400, "the logits say something");
    for (devices, counts) in [
        (&[a, b][..], &[2, 3][..]),
        (&[a, b], &[4, 1]),
        (&[a, b, a], &[1, 3, 1]),
    ] {
        let got = run(&load(shape, devices, counts), false);
        let place = format!("{counts:?} on {}", a.name());
        assert_eq!(got.logits, want.logits, "{place}: the logits");
        assert!(got == want, "{place}: {:?} for {:?}", got.ids, want.ids);
    }
}

#[test]
fn logits_of_two_and_three_stages_of_the_cpu_are_those_of_one() {
    let [a, b] = [(); 2].map(|()| Arc::new(Device::cpu()));
    same_bits(&tiny(), &a, &b);
    same_bits(&latent(), &a, &b);
    let plain = load(&tiny(), &[&a], &[5]);
    let (plain, checked) = (plain, load(&tiny(), &[&a, &b], &[3, 2]));
    let (plain, checked) = (run(&plain, false), run(&checked, true));
    assert_eq!(checked.n_ahead, 0, "a checked run records nothing ahead");
    assert_eq!(checked.ids, plain.ids, "checked by the references");
}

#[test]
fn logits_of_two_and_three_stages_of_the_adapter_are_those_of_one() {
    let (Some(a), Some(b)) = (adapter::adapter(), adapter::adapter()) else {
        return;
    };
    let (a, b) = (Arc::new(a), Arc::new(b));
    same_bits(&tiny(), &a, &b);
    // A device that goes away takes the pass with it, and nothing else.
    let model = load(&tiny(), &[&a, &b], &[2, 3]);
    let mut engine = Engine::new(model, DType::F32, 4, false).unwrap();
    let block = engine.cache.pages.open();
    engine.prefill(block, &[5, 6, 7], Logits::None).unwrap();
    let before = engine.cache.pages.clone();
    b.lose();
    let error = engine.prefill(block, &[8], Logits::Last).unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error}");
    assert_eq!(engine.cache.pages, before, "the blocks are as they were");
}

#[test]
fn the_cpu_and_an_adapter_share_a_model() {
    let Some(adapter) = adapter::adapter() else {
        return;
    };
    let (cpu, adapter) = (Arc::new(Device::cpu()), Arc::new(adapter));
    let want = run(&load(&tiny(), &[&cpu], &[5]), false);
    for devices in [[&cpu, &adapter], [&adapter, &cpu]] {
        let got = run(&load(&tiny(), &devices, &[3, 2]), false);
        assert_eq!(got.ids, want.ids, "the same tokens");
        for (got, want) in got
            .logits
            .iter()
            .flatten()
            .zip(want.logits.iter().flatten())
        {
            let [got, want] = [got, want].map(|&bits| f32::from_bits(bits));
            assert!((got - want).abs() < 1e-4, "{got} for {want}");
        }
    }
}

/// Rooms of so many bytes, each a memory of its own.
fn rooms(bytes: &[u64]) -> Vec<Room> {
    let room = |(pool, &bytes)| Room {
        device: format!("GPU {pool}"),
        bytes: Some(bytes),
        pool,
    };
    bytes.iter().enumerate().map(room).collect()
}

/// Eight layers of half a gigabyte each, of zeros that take no room on disk.
fn large(dir: &Path) -> ModelFiles {
    let (hidden, ff, vocab) = (4096usize, 16_384usize, 32_768usize);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": ff, "num_hidden_layers": 8, "num_attention_heads": 32,
        "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false,
    });
    let (mut header, mut at) = (Map::new(), 0);
    let mut add = |name: String, shape: &[usize]| {
        let end = at + 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F16", "shape": shape, "data_offsets": [at, end]});
        header.insert(name, entry);
        at = end;
    };
    for outer in ["model.embed_tokens", "lm_head"] {
        add(format!("{outer}.weight"), &[vocab, hidden]);
    }
    add("model.norm.weight".into(), &[hidden]);
    for layer in 0..8 {
        for (part, shape) in [
            ("input_layernorm", &[hidden][..]),
            ("post_attention_layernorm", &[hidden]),
            ("self_attn.q_proj", &[hidden, hidden]),
            ("self_attn.k_proj", &[hidden, hidden]),
            ("self_attn.v_proj", &[hidden, hidden]),
            ("self_attn.o_proj", &[hidden, hidden]),
            ("mlp.gate_proj", &[ff, hidden]),
            ("mlp.up_proj", &[ff, hidden]),
            ("mlp.down_proj", &[hidden, ff]),
        ] {
            add(format!("model.layers.{layer}.{part}.weight"), shape);
        }
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let text = Value::Object(header).to_string();
    let mut file = fs::File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.set_len((8 + text.len() + at) as u64).unwrap();
    ModelFiles::open(dir).unwrap()
}

#[test]
fn layers_go_where_the_memory_is() {
    let dir = tempfile::tempdir().unwrap();
    let files = large(dir.path());
    let place = |rooms: &[Room]| memory::place(&files, 512, DType::F16, None, rooms, Vec::new);
    let whole = Need::of(&files, 512, DType::F16);
    // A sixteenth stays free.
    let enough = |bytes: u64| bytes / 15 * 16 + 16;
    let split = |bytes: &[u64]| place(&rooms(bytes)).unwrap().split().to_vec();
    let plenty = 1 << 36;
    assert_eq!(
        split(&[plenty, plenty]),
        [4, 4],
        "equal memory, equal parts"
    );
    assert_eq!(split(&[3 * plenty, plenty]), [6, 2], "by the memory");
    assert_eq!(split(&[plenty, plenty, 2 * plenty]), [2, 2, 4], "of three");
    assert_eq!(
        split(&[plenty, 1 << 40, 1 << 40]),
        [1, 4, 3],
        "one at least"
    );
    assert_eq!(split(&[plenty]), [0; 0], "of one there is no split");
    // What does not fit one fits two, tightly: embedding and head are counted where they are.
    let half = enough(whole.scratch + whole.weights.midpoint(whole.cache) + (1 << 20));
    let error = place(&rooms(&[half])).unwrap_err().to_string();
    assert!(error.contains("free on GPU 0"), "{error}");
    assert_eq!(split(&[half, half]), [4, 4], "two halves");
    // Of three there is one way only: 4 layers, 1, 3.
    let (outer, spare) = (32_768 * 4096 * 2, 1 << 20);
    let layer = (whole.weights - 2 * outer + whole.cache) / 8;
    let room = |tenths: u64, more: u64| enough(whole.scratch + more + layer / 10 * tenths + spare);
    let tight = [room(40, outer), room(19, 0), room(39, outer)];
    assert_eq!(split(&tight), [4, 1, 3], "tightly");
    let mut less = rooms(&tight);
    less[1].bytes = Some(room(9, 0));
    let error = place(&less).unwrap_err().to_string();
    assert!(error.contains("free on GPU"), "{error}");

    // Two devices of one memory have it together.
    let mut shared = rooms(&[half, half]);
    shared[1].pool = 0;
    let error = place(&shared).unwrap_err().to_string();
    for word in [
        "(layers 0 to 3 and 4 to 7)",
        "free on GPU 0 and GPU 1",
        "--bits 4",
    ] {
        assert!(error.contains(word), "no '{word}' in: {error}");
    }
    let unknown = Room {
        bytes: None,
        ..rooms(&[0])[0].clone()
    };
    assert_eq!(
        place(std::slice::from_ref(&unknown)).unwrap().split(),
        [0; 0],
        "who knows"
    );
    let both = [unknown, rooms(&[0, half]).remove(1)];
    assert_eq!(
        place(&both).unwrap().split(),
        [4, 4],
        "as much as the other"
    );
}

#[test]
fn what_does_not_fit_several_devices_is_refused_with_what_would() {
    let dir = tempfile::tempdir().unwrap();
    let files = large(dir.path());
    let whole = Need::of(&files, 512, DType::F16);
    let enough = |bytes: u64| bytes / 15 * 16 + 16;
    let half = enough(whole.scratch + whole.weights.midpoint(whole.cache) + (1 << 20));
    let refusal = |layers: Option<&[usize]>, rooms: &[Room], seen: &[Room]| {
        let by_hand = layers.map(|counts| Placement::new(counts.to_vec(), 8).unwrap());
        let seen = || seen.to_vec();
        let result = memory::place(&files, 512, DType::F16, by_hand.as_ref(), rooms, seen);
        result.unwrap_err().to_string()
    };
    // By hand, what would fit in proportion.
    let error = refusal(Some(&[6, 2]), &rooms(&[half, half]), &[]);
    for word in [
        "(layers 0 to 5) needs",
        "free on GPU 0",
        "without --layers it would fit",
    ] {
        assert!(error.contains(word), "no '{word}' in: {error}");
    }
    // The second is named where it is the second that lacks.
    let error = refusal(Some(&[1, 7]), &rooms(&[half, half]), &[]);
    assert!(
        error.contains("(layers 1 to 7) needs") && error.contains("free on GPU 1"),
        "{error}"
    );
    // One of three GPUs: two would do.
    let three = rooms(&[half, half, half]);
    let error = refusal(None, &three[..1], &three);
    assert!(
        error.contains("--device \"GPU 0,GPU 1\" would fit"),
        "{error}"
    );
    let error = refusal(None, &rooms(&[1 << 20, 1 << 20]), &three[..2]);
    assert!(error.ends_with("name more devices"), "{error}");
    // Lists that are no placement.
    for (counts, says) in [
        (vec![3, 4], "--layers 3,4 are 7 layers, but the model has 8"),
        (vec![8, 0], "leaves a device without a layer"),
        (vec![usize::MAX, 9], "are more layers, but"),
    ] {
        let error = Placement::new(counts, 8).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let error = refusal(Some(&[4, 4]), &three, &[]);
    assert!(
        error.contains("--layers has 2 numbers for 3 devices"),
        "{error}"
    );
    let error = refusal(None, &rooms(&[half; 9]), &[]);
    assert!(
        error.contains("9 devices were named, but the model has 8 layers"),
        "{error}"
    );
}

/// Two layers, 485 tokens, with a tokenizer and a chat template.
const MODEL: &str = "tests/golden/e2e_reference_loop/model";

/// What a run of the program said: exit code, standard output, standard error.
fn hogwild(args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hogwild"));
    command.args(args).env("NODEVICE_SELECT", "1");
    let ran = command.env_remove("HOGWILD_DEVICE").output().unwrap();
    let [out, err] = [ran.stdout, ran.stderr].map(|b| String::from_utf8(b).unwrap());
    assert!(!err.contains("panicked"), "{err}");
    (ran.status.code(), out, err)
}

/// Runs a session of two workers; gives the header of its log, its events, and what it said of places.
fn session(prompt: &Path, more: &[&str]) -> (Value, String, String) {
    let args = "generate -n 20 --seed 1 --temp 0.8 --jsonl --check-every 9 -m";
    let mut args: Vec<_> = args.split(' ').chain([MODEL, "--prompt"]).collect();
    args.push(prompt.to_str().unwrap());
    args.extend(more);
    args.push("what is 5 + 7?");
    let (code, out, err) = hogwild(&args);
    assert_eq!(code, Some(0), "{err}");
    let (header, events) = out.split_once('\n').unwrap();
    let header = serde_json::from_str(header).unwrap();
    (header, events.to_owned(), err)
}

#[test]
fn a_run_on_two_devices_writes_the_same_events_and_is_replayed() {
    let names = [Some("cpu".to_owned()), adapter::adapter().map(|a| a.name())];
    let dir = tempfile::tempdir().unwrap();
    let [prompt, path] = ["prompt.txt", "log.jsonl"].map(|name| dir.path().join(name));
    fs::write(&prompt, "{problem}\n").unwrap();
    for name in names.into_iter().flatten() {
        let (one, want, said) = session(&prompt, &["--device", &name]);
        assert_eq!(one["device"], name, "the only device");
        assert!(one.get("layers").is_none(), "nothing of one");
        assert!(!said.contains("layers"), "{said}");
        let two = format!("{name}, {name}");
        let (header, events, said) = session(&prompt, &["--device", &two, "--layers", "1,1"]);
        assert_eq!(header["device"], format!("{name},{name}"), "both devices");
        assert_eq!(header["layers"], json!([1, 1]), "and their layers");
        let places = format!("layers 0 on {name}; layers 1 on {name}");
        assert!(said.contains(&places), "no '{places}' in: {said}");
        assert!(events == want, "the same events on {two}");
        assert!(
            want.contains("\"event\":\"step_closed\""),
            "a step is moved"
        );
        let replay = |header: &Value| {
            fs::write(&path, format!("{header}\n{events}")).unwrap();
            hogwild(&["replay", path.to_str().unwrap()])
        };
        let (code, out, said) = replay(&header);
        assert_eq!(
            (code, said.contains(&places)),
            (Some(0), true),
            "{out}{said}"
        );
        assert!(out.starts_with("no difference"), "{out}");
        // A log may say anything.
        let mut bad = header.clone();
        bad["layers"] = json!([7, 1]);
        let (code, _, said) = replay(&bad);
        assert!(
            code == Some(1) && said.contains("log.jsonl:1: --layers 7,1"),
            "{said}"
        );
    }
}

#[test]
fn lists_that_make_no_sense_are_refused_with_advice() {
    let many = ["cpu"; 65].join(",");
    let more = ["cpu"; 1000].join(",");
    for (list, layers, code, says) in [
        ("cpu,", "", 2, "a name is empty"),
        (",", "", 2, "a name is empty"),
        ("cpu,,cpu", "", 2, "a name is empty"),
        ("auto,cpu", "", 2, "auto stands alone"),
        ("cpu,abacus", "", 4, "no adapter matches 'abacus'"),
        (
            "cpu,cpu,cpu",
            "",
            2,
            "3 devices were named, but the model has 2 layers",
        ),
        (&many, "", 2, "64 devices at most"),
        (&more, "", 2, "64 devices at most"),
        ("cpu,cpu", "2", 2, "--layers has 1 numbers for 2 devices"),
        ("cpu", "1,1", 2, "--layers has 2 numbers for 1 devices"),
        ("cpu,cpu", "2,0", 2, "leaves a device without a layer"),
        ("cpu,cpu", "2,1", 2, "are 3 layers, but the model has 2"),
        ("cpu,cpu", "-1,3", 2, "invalid value"),
        ("cpu,cpu", "1;1", 2, "invalid value"),
        ("cpu,cpu", "18446744073709551615,3", 2, "are more layers"),
    ] {
        let mut args = vec!["generate", "-m", MODEL, "-n", "1", "--device", list, "x"];
        let layers = format!("--layers={layers}");
        if layers != "--layers=" {
            args.push(&layers);
        }
        let (got, out, err) = hogwild(&args);
        assert_eq!(got, Some(code), "{list} {layers}: {err}");
        assert!(
            err.contains(says) && out.is_empty(),
            "{list} {layers}: {err}"
        );
    }
    for what in [
        &["--shape", "tiny"][..],
        &["-m", MODEL, "--per-op"],
        &["attention", "-m", MODEL],
    ] {
        let (code, _, err) = hogwild(&[&["bench", "--device", "cpu,cpu"], what].concat());
        assert!(
            code == Some(2) && err.contains("name one with --device"),
            "{err}"
        );
    }
}

#[test]
fn whole_passes_are_measured_on_two_devices() {
    for what in ["decode", "prefill"] {
        let args = [
            "bench", what, "-m", MODEL, "--device", "cpu,cpu", "--quick", "-c", "64",
        ];
        let (code, out, err) = hogwild(&[&args[..], &["-w", "1", "--format", "json"]].concat());
        assert!(
            code == Some(0) && err.contains("layers 0 on cpu; layers 1 on cpu"),
            "{err}"
        );
        let table: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(table["device"], "cpu,cpu", "{table}");
        assert!(
            table["rows"][0]["tokens_per_s"].as_f64().unwrap() > 0.0,
            "{table}"
        );
    }
}
