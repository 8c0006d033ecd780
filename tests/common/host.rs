//! What a pass costs the host: plan, record, encode, finish and submit on a backend that does nothing, against
//! bare dispatches of the same count in the same run.

#![allow(
    clippy::unwrap_used,
    reason = "a measurement stops at the first problem"
)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

use std::sync::Arc;
use std::time::Instant;

use hogwild::cache::KvCache;
use hogwild::cache::layout::{Layout, Shared};
use hogwild::cache::plan::{Batch, Logits, Turn, plan};
use hogwild::device::{DType, Device, Samples};
use hogwild::model::{Model, RandomWeights, Scratch, shapes};
use hogwild::ops::linear::By;

const WORKERS: usize = 4;
const CONTEXT: usize = 16_384;

/// Medians, in milliseconds.
pub struct Host {
    pub dispatches: usize,
    pub planned: f64,
    pub recorded: f64,
    pub played: f64,
    pub all: f64,
    /// As many dispatches that do nothing, each with a bind group of its own.
    pub bare: f64,
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            dispatches,
            planned,
            recorded,
            played,
            all,
            bare,
        } = self;
        write!(
            f,
            "QwQ-32B, {WORKERS} workers, {CONTEXT} tokens: {all:.2} ms of the host for {dispatches} dispatches \
             (plan {planned:.2}, record {recorded:.2}, encode and submit {played:.2}), {:.1} times the \
             {bare:.2} ms of bare ones",
            all / bare
        )
    }
}

/// Measures passes of QwQ-32B's shape in int4.
pub fn measure() -> Host {
    let device = Arc::new(Device::noop().unwrap());
    let weights = RandomWeights {
        dtype: DType::U4,
        shared: false,
    };
    let config = shapes::find("qwq-32b").unwrap();
    let model = Model::random(device.clone(), &config, weights, CONTEXT + 1024).unwrap();
    let shape = model.cache_shape(DType::F16);
    let mut cache = KvCache::new(&device, shape, CONTEXT / 16 + 256).unwrap();
    let history: Vec<usize> = (0..100).map(|i| 60 + i * 37 % 201).collect();
    let shared = Shared::after(&mut cache.pages, &history, WORKERS).unwrap();
    let mut scratch = Scratch::default();
    let (mut all, mut parts) = (Vec::new(), [const { Vec::new() }; 3]);
    let mut dispatches = 0;
    for pass in 0..60 {
        for &block in &shared.own {
            cache.pages.extend(block, 1).unwrap();
        }
        let started = Instant::now();
        let turn = |w| Turn {
            view: Layout::Combined.view(w, &shared),
            tokens: vec![7],
            logits: Logits::Last,
        };
        let batch = Batch {
            turns: (0..WORKERS).map(turn).collect(),
        };
        let plan = plan(&cache.pages, &batch, model.rows_per_work(), model.windows());
        let planned = started.elapsed().as_secs_f64();
        let recording = model
            .forward(&plan, By::Columns, &cache, &mut scratch)
            .unwrap();
        let recorded = started.elapsed().as_secs_f64();
        device.play(&recording).unwrap();
        let played = started.elapsed().as_secs_f64();
        // The first passes compile.
        if pass >= 10 {
            all.push(played);
            let times = [planned, recorded - planned, played - recorded];
            for (part, time) in parts.iter_mut().zip(times) {
                part.push(time);
            }
        }
        dispatches = recording.dispatches.len();
    }
    let bare = device.bare_dispatches(dispatches, 50).unwrap();
    let [all, bare] = [Samples::new(all), bare].map(|s| s.median() * 1e3);
    let [planned, recorded, played] = parts.map(|part| Samples::new(part).median() * 1e3);
    Host {
        dispatches,
        planned,
        recorded,
        played,
        all,
        bare,
    }
}
