//! Workers in the middle of a session that never was: what benches measure passes of.
//!
//! A context is not prefilled: blocks are given lengths, and the cache is filled on the device.

use std::sync::Arc;
use std::time::Instant;

use crate::Result;
use crate::cache::KvCache;
use crate::cache::layout::{Layout, Shared, View};
use crate::cache::pages::PAGE;
use crate::cache::plan::{Batch, Logits, Plan, Turn, plan};
use crate::device::{DType, Device, Recording, Samples};
use crate::model::{Model, Scratch};
use crate::ops::fill::{Contents, fill};
use crate::ops::linear::By;

/// Passes before the measured ones.
pub(super) const WARM_UP: usize = 2;

/// Passes that a scene has room for.
const MOST_PASSES: usize = 1024;

/// Some token of the vocabulary.
pub(super) fn token(i: usize, vocab: usize) -> u32 {
    let id = i.wrapping_mul(37) % vocab.min(4000);
    u32::try_from(id).expect("below 4000")
}

/// Workers in the middle of a session, over a cache whose contents no one computed.
pub(super) struct Scene {
    model: Arc<Model>,
    cache: KvCache,
    scratch: Scratch,
    shared: Shared,
    passes: usize,
}

/// Seconds of passes, and of them those of the host before it waits.
pub(super) struct Times {
    pub(super) pass: Samples,
    pub(super) host: Samples,
}

impl Scene {
    /// Workers who see `context` tokens, in a history of `steps` blocks.
    pub(super) fn new(
        model: &Arc<Model>,
        kv_dtype: DType,
        [context, steps]: [usize; 2],
        workers: usize,
    ) -> Result<Self> {
        let device = model.device();
        let closed = context.saturating_sub(6 + workers).max(1);
        let ends: Vec<usize> = (0..=steps).map(|i| closed * i / steps).collect();
        let history = ends.windows(2).map(|w| w[1] - w[0]);
        let history: Vec<usize> = history.filter(|&len| len > 0).collect();
        let pages: usize = history.iter().map(|len| len.div_ceil(PAGE)).sum();
        let open = workers * MOST_PASSES.div_ceil(PAGE) + 2;
        let shape = model.cache_shape(kv_dtype);
        let mut cache = KvCache::new(device, shape, pages + open)?;
        let shared = Shared::after(&mut cache.pages, &history, workers)?;
        let mut seed = 1;
        for layer in 0..shape.n_layers {
            for arena in cache.layer(layer) {
                let mut r = Recording::default();
                let contents = Contents::Numbers {
                    mean: 0.0,
                    scale: 1.0,
                };
                fill(&mut r, arena, contents, seed);
                device.play(&r)?;
                seed += 1;
            }
        }
        device.finish()?;
        Ok(Self {
            model: model.clone(),
            cache,
            scratch: Scratch::default(),
            shared,
            passes: 0,
        })
    }

    /// Takes one more token of every worker into its block.
    fn extend(&mut self) -> Result<()> {
        for &block in &self.shared.own {
            self.cache.pages.extend(block, 1)?;
        }
        self.passes += 1;
        Ok(())
    }

    /// The plan of a pass in which every worker writes a token.
    pub(super) fn planned(&self) -> Plan {
        let vocab = self.model.config().vocab_size;
        let turn = |w: usize| Turn {
            view: Layout::Combined.view(w, &self.shared),
            tokens: vec![token(self.passes * 31 + w, vocab)],
            logits: Logits::Last,
        };
        let batch = Batch {
            turns: (0..self.shared.own.len()).map(turn).collect(),
        };
        plan(&self.cache.pages, &batch, self.model.rows_per_work())
    }

    /// The recording of a pass.
    pub(super) fn forward(&mut self, plan: &Plan) -> Result<Recording> {
        self.model
            .forward(plan, By::Columns, &self.cache, &mut self.scratch)
    }

    /// The recording of the prefill of a block that is as long as the workers' room.
    pub(super) fn prefill(&mut self, tokens: usize) -> Result<Recording> {
        let block = self.cache.pages.open();
        self.cache.pages.extend(block, tokens)?;
        let vocab = self.model.config().vocab_size;
        let turn = Turn {
            view: View(vec![block]),
            tokens: (0..tokens).map(|i| token(i, vocab)).collect(),
            logits: Logits::Last,
        };
        let batch = Batch { turns: vec![turn] };
        let plan = plan(&self.cache.pages, &batch, self.model.rows_per_work());
        self.model
            .forward(&plan, By::Tiles, &self.cache, &mut self.scratch)
    }

    /// Plays passes, at most a thousand in all, and takes their times.
    pub(super) fn times(&mut self, passes: usize) -> Result<Times> {
        let device = self.model.device().clone();
        let on_cpu = matches!(*device, Device::Cpu(_));
        let (mut pass, mut host) = (Vec::new(), Vec::new());
        for i in 0..passes + WARM_UP {
            self.extend()?;
            let started = Instant::now();
            let plan = self.planned();
            let recording = self.forward(&plan)?;
            let recorded = started.elapsed().as_secs_f64();
            device.play(&recording)?;
            // The CPU path computes while it plays.
            let submitted = if on_cpu {
                recorded
            } else {
                started.elapsed().as_secs_f64()
            };
            if let Some(logits) = self.scratch.logits() {
                let n = plan.wanted.len() * self.model.config().vocab_size;
                device.read_f32(logits, n)?;
            }
            if i >= WARM_UP {
                pass.push(started.elapsed().as_secs_f64());
                host.push(submitted);
            }
        }
        Ok(Times {
            pass: Samples::new(pass),
            host: Samples::new(host),
        })
    }
}
