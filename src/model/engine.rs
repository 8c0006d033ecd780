//! A model with a cache: plays passes.
//!
//! The engine knows tokens, blocks and views; not workers, steps or prompts. Invariant: a pass that
//! fails leaves every block as it was.

use std::sync::Arc;

use super::forward::{Model, Scratch};
use crate::cache::KvCache;
use crate::cache::layout::View;
use crate::cache::pages::BlockId;
use crate::cache::plan::{Batch, Logits, SPLIT, Turn, plan};
use crate::device::{DType, judge};
use crate::ops::linear::By;
use crate::{Error, Result, TokenId};

/// Most rows of one pass of a prefill.
const PREFILL_ROWS: usize = 256;

/// Most pairs of a split and a row in one pass of a prefill: bounds the memory of the partials.
const PREFILL_PAIRS: usize = 4096;

/// A model, its cache, and the memory that a pass works in.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    /// Blocks and arenas.
    pub cache: KvCache,
    scratch: Scratch,
    checked: bool,
}

impl Engine {
    /// An engine with an empty cache of `n_pages` pages.
    ///
    /// With `checked`, every dispatch is played by its reference too, and the first that disagrees ends
    /// the pass.
    ///
    /// # Errors
    /// If the device cannot hold the cache.
    pub fn new(model: Arc<Model>, kv_dtype: DType, n_pages: usize, checked: bool) -> Result<Self> {
        let cache = KvCache::new(model.device(), model.cache_shape(kv_dtype), n_pages)?;
        Ok(Self {
            model,
            cache,
            scratch: Scratch::default(),
            checked,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Feeds the tokens of a batch in one pass; returns the wanted logits, row by row.
    ///
    /// All turns' tokens are stored before any of them attends, so each sees the others' (the
    /// reference's section 3).
    ///
    /// # Errors
    /// [`Error::CacheFull`] or [`Error::Limit`] before anything runs, [`Error::Tokenizer`] for a token
    /// that the model does not have; those of the device. The blocks are then as before.
    pub fn pass(&mut self, batch: &Batch) -> Result<Vec<Vec<f32>>> {
        self.feed(batch, By::Columns)
    }

    fn feed(&mut self, batch: &Batch, by: By) -> Result<Vec<Vec<f32>>> {
        let vocab = self.model.config().vocab_size;
        let mut tokens = batch.turns.iter().flat_map(|turn| &turn.tokens);
        if let Some(id) = tokens.find(|&&id| id as usize >= vocab) {
            return Err(Error::Tokenizer(format!(
                "it knows token {id}, but the model has {vocab} tokens; do the files belong together?"
            )));
        }
        for (i, turn) in batch.turns.iter().enumerate() {
            if let Err(error) = self.cache.pages.extend(own(turn), turn.tokens.len()) {
                self.take_back(&batch.turns[..i]);
                return Err(error);
            }
        }
        let logits = self.run(batch, by);
        if logits.is_err() {
            self.take_back(&batch.turns);
        }
        logits
    }

    /// Plans, records and plays a batch that the blocks have room for.
    fn run(&mut self, batch: &Batch, by: By) -> Result<Vec<Vec<f32>>> {
        let plan = plan(&self.cache.pages, batch, self.model.rows_per_work());
        let recording = self
            .model
            .forward(&plan, by, &self.cache, &mut self.scratch)?;
        let device = self.model.device();
        if self.checked {
            judge::play_checked(device, &recording)?;
        } else {
            device.play(&recording)?;
        }
        let n_wanted = plan.wanted.len();
        let Some(logits) = self.scratch.logits().filter(|_| n_wanted > 0) else {
            return Ok(Vec::new());
        };
        let vocab = self.model.config().vocab_size;
        let all = device.read_f32(logits, n_wanted * vocab)?;
        Ok(all.chunks_exact(vocab).map(<[f32]>::to_vec).collect())
    }

    /// Undoes the extension of blocks, the last first, so that even the order of free pages is as before.
    fn take_back(&mut self, turns: &[Turn]) {
        for turn in turns.iter().rev() {
            let len = self.cache.pages.len(own(turn)) - turn.tokens.len();
            self.cache.pages.truncate(own(turn), len);
        }
    }

    /// Feeds tokens to the end of a block that sees nothing but itself, in as many passes as it takes;
    /// returns the wanted logits. Where it is cut changes no bit.
    ///
    /// # Errors
    /// Those of [`Engine::pass`].
    pub fn prefill(
        &mut self,
        block: BlockId,
        tokens: &[TokenId],
        logits: Logits,
    ) -> Result<Vec<Vec<f32>>> {
        let mut out = Vec::new();
        let mut rest = tokens;
        while !rest.is_empty() {
            let splits = self.cache.pages.len(block) / SPLIT + 2;
            let n = (PREFILL_PAIRS / splits)
                .clamp(16, PREFILL_ROWS)
                .min(rest.len());
            let (now, later) = rest.split_at(n);
            let wanted = match logits {
                Logits::Last if !later.is_empty() => Logits::None,
                other => other,
            };
            let view = View(vec![block]);
            let turn = Turn {
                view,
                tokens: now.to_vec(),
                logits: wanted,
            };
            out.extend(self.feed(&Batch { turns: vec![turn] }, By::Tiles)?);
            rest = later;
        }
        Ok(out)
    }
}

/// The block that a turn writes.
fn own(turn: &Turn) -> BlockId {
    *turn.view.0.last().expect("a view has a block")
}
