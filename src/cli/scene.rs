//! Workers in the middle of a session that never was: what benches measure passes of.
//!
//! A context is not prefilled: blocks are given lengths, and the cache is filled on the device.

use std::sync::Arc;
use std::time::Instant;

use crate::Result;
use crate::cache::layout::{Layout, Shared, View};
use crate::cache::pages::PAGE;
use crate::cache::plan::{Batch, Logits, Plan, Turn, plan};
use crate::device::{DType, Device, Recording, Samples};
use crate::model::engine::Wanted;
use crate::model::{Engine, Model, Scratch};
use crate::ops::fill::{Contents, fill};
use crate::ops::linear::By;
use crate::sampler::Sampling;

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
    engine: Engine,
    /// Of recordings that are not the engine's, one for each stage of the model.
    scratch: Vec<Scratch>,
    shared: Shared,
    passes: usize,
}

/// Seconds of passes, each from the tokens of one to those of the next; and of what the host does for one:
/// plan, record, encode and submit. Recording ahead hides it behind the device's work.
pub(super) struct Times {
    pub(super) pass: Samples,
    pub(super) host: Samples,
}

/// Waits until every device of a model has done what it was told.
pub(super) fn finish(model: &Model) -> Result<()> {
    model.stages().iter().try_for_each(|s| s.device().finish())
}

impl Scene {
    /// Workers who see `context` tokens, in a history of `steps` blocks.
    pub(super) fn new(
        model: &Arc<Model>,
        kv_dtype: DType,
        [context, steps]: [usize; 2],
        workers: usize,
    ) -> Result<Self> {
        let closed = context.saturating_sub(6 + workers).max(1);
        let ends: Vec<usize> = (0..=steps).map(|i| closed * i / steps).collect();
        let history = ends.windows(2).map(|w| w[1] - w[0]);
        let history: Vec<usize> = history.filter(|&len| len > 0).collect();
        let pages: usize = history.iter().map(|len| len.div_ceil(PAGE)).sum();
        let open = workers * MOST_PASSES.div_ceil(PAGE) + 2;
        let shape = model.cache_shape(kv_dtype);
        let mut engine = Engine::new(model.clone(), kv_dtype, pages + open, false)?;
        engine.choose_by(Sampling::default().rule(), &[])?;
        let shared = Shared::after(&mut engine.cache.pages, &history, workers)?;
        let mut seed = 1;
        for layer in 0..shape.n_layers {
            for arena in engine.cache.layer(layer) {
                let mut r = Recording::default();
                let contents = Contents::Numbers {
                    mean: 0.0,
                    scale: 1.0,
                };
                fill(&mut r, arena, contents, seed);
                model.stage_of(layer).device().play(&r)?;
                seed += 1;
            }
        }
        finish(model)?;
        Ok(Self {
            engine,
            scratch: model.stages().iter().map(|_| Scratch::default()).collect(),
            shared,
            passes: 0,
        })
    }

    /// What every worker feeds in a pass of a number.
    fn batch(&self, pass: usize) -> Batch {
        let vocab = self.engine.model().config().vocab_size;
        let turn = |w: usize| Turn {
            view: Layout::Combined.view(w, &self.shared),
            tokens: vec![token(pass * 31 + w, vocab)],
            logits: Logits::Last,
        };
        Batch {
            turns: (0..self.shared.own.len()).map(turn).collect(),
        }
    }

    fn wanted(&self, pass: usize) -> Wanted {
        let draw = |w: usize| (pass * 16 + w) as u64 ^ 0x9e37_79b9_7f4a_7c15;
        Wanted::new(
            self.batch(pass),
            (0..self.shared.own.len()).map(draw).collect(),
        )
    }

    /// The plan of a pass in which every worker feeds its last token again.
    pub(super) fn planned(&self) -> Plan {
        let model = self.engine.model();
        plan(
            &self.engine.cache.pages,
            &self.batch(self.passes),
            model.rows_per_work(),
            model.windows(),
        )
    }

    /// The recording of a pass of a model that is on one device.
    pub(super) fn forward(&mut self, plan: &Plan) -> Result<Recording> {
        let (model, cache) = (self.engine.model(), &self.engine.cache);
        model.forward(plan, By::Columns, cache, &mut self.scratch[0])
    }

    /// The recording of the prefill of a new block, of a model that is on one device.
    pub(super) fn prefill(&mut self, tokens: usize) -> Result<Recording> {
        let model = self.engine.model().clone();
        let cache = &mut self.engine.cache;
        let block = cache.pages.open();
        cache.pages.extend(block, tokens)?;
        let vocab = model.config().vocab_size;
        let turn = Turn {
            view: View(vec![block]),
            tokens: (0..tokens).map(|i| token(i, vocab)).collect(),
            logits: Logits::Last,
        };
        let batch = Batch { turns: vec![turn] };
        let rows = model.rows_per_work();
        let plan = plan(&cache.pages, &batch, rows, model.windows());
        model.forward(&plan, By::Tiles, cache, &mut self.scratch[0])
    }

    /// Plays passes, at most a thousand in all, and takes their times.
    pub(super) fn times(&mut self, passes: usize) -> Result<Times> {
        let (mut pass, mut host) = (Vec::new(), Vec::new());
        for i in 0..passes + WARM_UP {
            let guess = self.wanted(self.passes + 1);
            let started = Instant::now();
            self.engine.choose(&self.wanted(self.passes), Some(guess))?;
            self.passes += 1;
            if i >= WARM_UP {
                pass.push(started.elapsed().as_secs_f64());
            }
        }
        let model = self.engine.model().clone();
        for i in 0..passes.min(10) + WARM_UP {
            let started = Instant::now();
            let plan = self.planned();
            for (stage, scratch) in model.stages().iter().zip(&mut self.scratch) {
                let recording = stage.forward(&plan, By::Columns, &self.engine.cache, scratch)?;
                // The CPU path computes while it plays.
                if !matches!(**stage.device(), Device::Cpu(_)) {
                    stage.device().play(&recording)?;
                }
            }
            if i >= WARM_UP {
                host.push(started.elapsed().as_secs_f64());
            }
            finish(&model)?;
        }
        Ok(Times {
            pass: Samples::new(pass),
            host: Samples::new(host),
        })
    }
}
