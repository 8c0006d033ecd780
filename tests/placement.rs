//! Models whose layers are on several devices: nothing of a run depends on where they are.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "common/adapter.rs"]
mod adapter;
mod common;

use std::sync::Arc;

use common::tiny::{Random, TinyModel};
use hogwild::cache::layout::View;
use hogwild::cache::pages::{BlockId, Pages};
use hogwild::cache::plan::{Batch, Logits, Turn};
use hogwild::device::{DType, Device, Tensor};
use hogwild::model::{Engine, Model, ModelFiles, Placement, Wanted};
use hogwild::sampler::Sampling;

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

/// A tiny model over devices, so many layers on each.
fn load(devices: &[&Arc<Device>], counts: &[usize]) -> Arc<Model> {
    let dir = tempfile::tempdir().unwrap();
    tiny().write(dir.path(), "placement");
    let files = ModelFiles::open(dir.path()).unwrap();
    let placement = Placement::new(counts.to_vec(), 5).unwrap();
    let devices: Vec<_> = devices.iter().map(|&device| device.clone()).collect();
    let model = Model::load_over(&devices, &placement, &files, 512, &mut |_| {}).unwrap();
    assert_eq!(model.placement(), placement, "as it was asked for");
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
        let of = |s: &&hogwild::model::Stage| s.layers().contains(&layer);
        let stage = model.stages().iter().find(of).unwrap();
        stage.device().read(t, 0, t.bytes()).unwrap()
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

fn same_bits(a: &Arc<Device>, b: &Arc<Device>) {
    let want = run(&load(&[a], &[5]), false);
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
        let got = run(&load(devices, counts), false);
        let place = format!("{counts:?} on {}", a.name());
        assert_eq!(got.logits, want.logits, "{place}: the logits");
        assert!(got == want, "{place}: {:?} for {:?}", got.ids, want.ids);
    }
}

#[test]
fn logits_of_two_and_three_stages_of_the_cpu_are_those_of_one() {
    let [a, b] = [(); 2].map(|()| Arc::new(Device::cpu()));
    same_bits(&a, &b);
    let (plain, checked) = (load(&[&a], &[5]), load(&[&a, &b], &[3, 2]));
    let (plain, checked) = (run(&plain, false), run(&checked, true));
    assert_eq!(checked.n_ahead, 0, "a checked run records nothing ahead");
    assert_eq!(checked.ids, plain.ids, "checked by the references");
}

#[test]
fn logits_of_two_and_three_stages_of_the_adapter_are_those_of_one() {
    if let (Some(a), Some(b)) = (adapter::adapter(), adapter::adapter()) {
        same_bits(&Arc::new(a), &Arc::new(b));
    }
}

#[test]
fn the_cpu_and_an_adapter_share_a_model() {
    let Some(adapter) = adapter::adapter() else {
        return;
    };
    let (cpu, adapter) = (Arc::new(Device::cpu()), Arc::new(adapter));
    let want = run(&load(&[&cpu], &[5]), false);
    for devices in [[&cpu, &adapter], [&adapter, &cpu]] {
        let got = run(&load(&devices, &[3, 2]), false);
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
