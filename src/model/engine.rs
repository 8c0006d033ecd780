//! A model with a cache: plays passes.
//!
//! The engine knows tokens, blocks and views; not workers, steps or prompts. While the device works on
//! a pass, the engine plans and records the next one, if it is told how that will look; a wrong guess
//! costs the time it took and nothing else. A model on several devices runs on one after the other; the
//! last chooses. Invariants: a pass that fails leaves every block as it was,
//! and no guess changes a block or a token.

use std::sync::Arc;

use super::Model;
use super::forward::Scratch;
use super::load::padded;
use super::relay::{Leg, Prepared, Relay, Running};
use crate::cache::KvCache;
use crate::cache::layout::View;
use crate::cache::pages::{BlockId, Pages};
use crate::cache::plan::{Batch, Logits, Plan, SPLIT, Turn, plan};
use crate::device::{DType, Tensor, Upload};
use crate::ops::linear::By;
use crate::ops::sample::{NONE, Rule, mask, sample};
use crate::{Error, Result, TokenId};

/// Most rows of one pass of a prefill.
pub(super) const PREFILL_ROWS: usize = 256;

/// Most pairs of a split and a row in one pass of a prefill: bounds the memory of the partials.
pub(super) const PREFILL_PAIRS: usize = 4096;

/// A model, its cache, and the memory that a pass works in.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    /// Blocks and arenas.
    pub cache: KvCache,
    /// Of each stage.
    scratch: Vec<Scratch>,
    checked: bool,
    choosing: Option<Choosing>,
    is_ahead: bool,
    n_ahead: u64,
    next: Option<Next>,
}

/// How tokens are chosen on the device.
#[derive(Debug)]
struct Choosing {
    rule: Rule,
    /// Bits of the ids that are never chosen.
    suppressed: Tensor,
    /// `[n, 2]` and `[n]`, for passes that want at most `n` rows.
    draws: Tensor,
    ids: Tensor,
}

/// What shall be chosen in a pass: one token for each row whose logits are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    batch: Batch,
    by: By,
    draws: Vec<u64>,
}

/// A pass that was recorded before its tokens were known.
#[derive(Debug)]
struct Next {
    /// The blocks when it was planned: it is of use only where they are the same.
    before: Pages,
    wanted: Wanted,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The tokens are missing; they go to this tensor.
    Recorded(Prepared, Tensor),
    /// The tokens are those of `wanted`.
    Started(Running),
}

impl Engine {
    /// An engine with an empty cache of `n_pages` pages.
    ///
    /// With `checked`, every dispatch is played by its reference too, and the first that disagrees ends
    /// the pass.
    ///
    /// # Errors
    /// If a device cannot hold its part of the cache.
    pub fn new(model: Arc<Model>, kv_dtype: DType, n_pages: usize, checked: bool) -> Result<Self> {
        let cache = model.cache(kv_dtype, n_pages)?;
        Ok(Self {
            scratch: model.stages().iter().map(|_| Scratch::default()).collect(),
            model,
            cache,
            checked,
            choosing: None,
            is_ahead: true,
            n_ahead: 0,
            next: None,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Whether passes are recorded ahead; they are unless told otherwise. It changes no token.
    pub fn set_ahead(&mut self, is_ahead: bool) {
        self.is_ahead = is_ahead;
    }

    /// Passes whose recording was there before they were asked for.
    pub fn n_ahead(&self) -> u64 {
        self.n_ahead
    }

    /// Sets how [`Engine::choose`] chooses: by a rule, among all ids but those suppressed.
    ///
    /// # Errors
    /// If the device cannot hold a bit for each token.
    pub fn choose_by(&mut self, rule: Rule, suppressed: &[TokenId]) -> Result<()> {
        let device = self.model.last().device();
        let mask = mask(suppressed, self.model.config().vocab_size);
        self.next = None;
        self.choosing = Some(Choosing {
            rule,
            suppressed: device.upload(&[mask.len()], DType::U32, &mask)?,
            draws: device.tensor(&[1, 2], DType::U32)?,
            ids: device.tensor(&[1], DType::U32)?,
        });
        Ok(())
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
        self.next = None;
        self.extend(batch)?;
        let logits = self.run(batch, by);
        self.or_take_back(batch, logits)
    }

    /// Plans, records and plays a batch that the blocks have room for.
    fn run(&mut self, batch: &Batch, by: By) -> Result<Vec<Vec<f32>>> {
        let (plan, relay) = self.record(batch, by, None)?;
        relay.play(self.checked)?;
        let n_wanted = plan.wanted.len();
        let logits = self.scratch.last().and_then(Scratch::logits);
        let Some(logits) = logits.filter(|_| n_wanted > 0) else {
            return Ok(Vec::new());
        };
        let vocab = self.model.config().vocab_size;
        let all = self
            .model
            .last()
            .device()
            .read_f32(logits, n_wanted * vocab)?;
        Ok(all.chunks_exact(vocab).map(<[f32]>::to_vec).collect())
    }

    /// Feeds the tokens of a batch in one pass and chooses a token for each wanted row, by the rule of
    /// [`Engine::choose_by`]; none where there is no token to choose. Only the ids come back from the
    /// device.
    ///
    /// With `guess`, the pass that will probably follow is planned and recorded while this one runs;
    /// which tokens it feeds does not matter yet.
    ///
    /// # Errors
    /// Those of [`Engine::pass`].
    ///
    /// # Panics
    /// If there is no rule, or not a draw for each wanted row.
    pub fn choose(
        &mut self,
        wanted: &Wanted,
        guess: Option<Wanted>,
    ) -> Result<Vec<Option<TokenId>>> {
        let started = self.start(wanted).then(|| self.next.take()).flatten();
        self.extend(&wanted.batch)?;
        let ids = self.run_chosen(wanted, started, guess);
        self.or_take_back(&wanted.batch, ids)
    }

    /// Starts a pass that was recorded ahead, now that its tokens are known; whether it runs.
    ///
    /// It does not if it was not recorded, or if it is not the pass that was guessed. What runs is of no
    /// consequence until [`Engine::choose`] asks for the same pass.
    pub fn start(&mut self, wanted: &Wanted) -> bool {
        let Some(next) = self.next.take() else {
            return false;
        };
        if next.before != self.cache.pages || !next.wanted.is_like(wanted) {
            return false;
        }
        let state = match next.state {
            State::Started(running) if next.wanted.batch == wanted.batch => State::Started(running),
            State::Recorded(prepared, to) => {
                let turns = wanted.batch.turns.iter();
                let tokens: Vec<u32> = turns.flat_map(|t| t.tokens.iter().copied()).collect();
                if self.check(&wanted.batch).is_err() {
                    return false;
                }
                let bytes = bytemuck::cast_slice(&tokens).to_vec();
                // A device that fails will say so again.
                match prepared.submit(&[Upload { to, bytes }]) {
                    Ok(running) => State::Started(running),
                    Err(_) => return false,
                }
            }
            State::Started(_) => return false,
        };
        self.next = Some(Next {
            before: next.before,
            wanted: wanted.clone(),
            state,
        });
        true
    }

    /// Chooses for a batch that the blocks have room for, whose pass may have been started.
    fn run_chosen(
        &mut self,
        wanted: &Wanted,
        started: Option<Next>,
        guess: Option<Wanted>,
    ) -> Result<Vec<Option<TokenId>>> {
        let bytes = if self.checked {
            let (relay, [.., ids]) = self.record_chosen(wanted, None)?;
            relay.play(true)?;
            self.model
                .last()
                .device()
                .read(&ids, 0, 4 * wanted.draws.len())?
        } else {
            let running = if let Some(Next {
                state: State::Started(running),
                ..
            }) = started
            {
                self.n_ahead += 1;
                running
            } else {
                let (prepared, _) = self.prepare(wanted, None)?;
                prepared.submit(&[])?
            };
            // A guess that does not fit is no guess.
            self.next = guess
                .filter(|_| self.is_ahead)
                .and_then(|wanted| self.guess(wanted).ok());
            running.wait()?
        };
        let ids: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        Ok(ids
            .into_iter()
            .map(|id| Some(id).filter(|&id| id != NONE))
            .collect())
    }

    /// Records a pass whose tokens are not known; the blocks stay as they are.
    fn guess(&mut self, wanted: Wanted) -> Result<Next> {
        let before = self.cache.pages.clone();
        let mut pages = before.clone();
        for turn in &wanted.batch.turns {
            pages.extend(own(turn), turn.tokens.len())?;
        }
        let (prepared, tokens) = self.prepare(&wanted, Some(&pages))?;
        Ok(Next {
            before,
            wanted,
            state: State::Recorded(prepared, tokens),
        })
    }

    /// Records and prepares a pass; gives the tensor of its tokens too.
    fn prepare(&mut self, wanted: &Wanted, pages: Option<&Pages>) -> Result<(Prepared, Tensor)> {
        let (relay, [tokens, ids]) = self.record_chosen(wanted, pages)?;
        let prepared = relay.prepare((&ids, 4 * wanted.draws.len()))?;
        Ok((prepared, tokens))
    }

    /// Records a pass and the choice; gives the tensors of its tokens and of the chosen ids too.
    fn record_chosen(
        &mut self,
        wanted: &Wanted,
        pages: Option<&Pages>,
    ) -> Result<(Relay, [Tensor; 2])> {
        let (plan, mut relay) = self.record(&wanted.batch, wanted.by, pages)?;
        let n = plan.wanted.len();
        assert_eq!(n, wanted.draws.len(), "each wanted row has a draw");
        let device = self.model.last().device();
        let choosing = self.choosing.as_mut().expect("a rule was set");
        if choosing.ids.len() < n {
            let n = n.next_power_of_two();
            choosing.draws = device.tensor(&[n, 2], DType::U32)?;
            choosing.ids = device.tensor(&[n], DType::U32)?;
        }
        let logits = self.scratch.last().and_then(Scratch::logits);
        if let Some(logits) = logits.filter(|_| n > 0) {
            let recording = relay.last();
            recording.upload(&choosing.draws, &wanted.draws);
            sample(
                recording,
                &choosing.rule,
                logits,
                [&choosing.suppressed, &choosing.draws],
                &choosing.ids,
                n,
            );
        }
        let tokens = self.scratch[0].tokens().expect("a pass has tokens");
        Ok((relay, [tokens.clone(), choosing.ids.clone()]))
    }

    /// Plans and records a batch over blocks that were extended by it: those of the cache, or others.
    fn record(&mut self, batch: &Batch, by: By, pages: Option<&Pages>) -> Result<(Plan, Relay)> {
        let pages = pages.unwrap_or(&self.cache.pages);
        let model = &self.model;
        let plan = plan(pages, batch, model.rows_per_work(), model.windows());
        let furthest = plan.positions.iter().copied().max().unwrap_or(0) as usize;
        if furthest >= self.model.n_positions() {
            return Err(Error::Limit {
                what: "a pass".into(),
                need: format!("position {furthest}"),
                have: format!("{} of them", self.model.n_positions()),
                advice: "raise --context".into(),
            });
        }
        let legs = model.stages().iter().zip(&mut self.scratch);
        let legs = legs.map(|(stage, scratch)| {
            let recording = stage.forward(&plan, by, &self.cache, scratch)?;
            Ok(Leg {
                device: stage.device().clone(),
                recording,
                hidden: scratch.hidden().expect("a pass has rows").clone(),
            })
        });
        let relay = Relay {
            legs: legs.collect::<Result<_>>()?,
            bytes: plan.n_rows() * padded(model.config().hidden_size) * 4,
        };
        Ok((plan, relay))
    }

    /// Refuses tokens that the model does not have.
    fn check(&self, batch: &Batch) -> Result<()> {
        let vocab = self.model.config().vocab_size;
        let mut tokens = batch.turns.iter().flat_map(|turn| &turn.tokens);
        match tokens.find(|&&id| id as usize >= vocab) {
            Some(id) => Err(Error::Tokenizer(format!(
                "it knows token {id}, but the model has {vocab} tokens; do the files belong together?"
            ))),
            None => Ok(()),
        }
    }

    /// Makes room for a batch.
    fn extend(&mut self, batch: &Batch) -> Result<()> {
        self.check(batch)?;
        for (i, turn) in batch.turns.iter().enumerate() {
            if let Err(error) = self.cache.pages.extend(own(turn), turn.tokens.len()) {
                self.take_back(&batch.turns[..i]);
                return Err(error);
            }
        }
        Ok(())
    }

    fn or_take_back<T>(&mut self, batch: &Batch, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.take_back(&batch.turns);
        }
        result
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
            let (now, later) = rest.split_at(self.piece(block).min(rest.len()));
            let wanted = match logits {
                Logits::Last if !later.is_empty() => Logits::None,
                other => other,
            };
            out.extend(self.feed(&alone(block, now, wanted), By::Tiles)?);
            rest = later;
        }
        Ok(out)
    }

    /// Feeds tokens to the end of a block that sees nothing but itself, as [`Engine::prefill`] does, and
    /// chooses the next token as [`Engine::choose`] does, in the last of the passes.
    ///
    /// # Errors
    /// Those of [`Engine::pass`].
    ///
    /// # Panics
    /// If there is no token or no rule.
    pub fn go_on(
        &mut self,
        block: BlockId,
        tokens: &[TokenId],
        draw: u64,
        guess: Option<Wanted>,
    ) -> Result<Option<TokenId>> {
        assert!(!tokens.is_empty(), "there is a token to go on from");
        let mut rest = tokens;
        loop {
            let (now, later) = rest.split_at(self.piece(block).min(rest.len()));
            if later.is_empty() {
                let wanted = Wanted {
                    by: By::Tiles,
                    ..Wanted::of_one(block, now, draw)
                };
                return Ok(self.choose(&wanted, guess)?[0]);
            }
            self.feed(&alone(block, now, Logits::None), By::Tiles)?;
            rest = later;
        }
    }

    /// Tokens of the next pass of a prefill.
    fn piece(&self, block: BlockId) -> usize {
        let splits = self.cache.pages.len(block) / SPLIT + 2;
        (PREFILL_PAIRS / splits).clamp(16, PREFILL_ROWS)
    }
}

impl Wanted {
    /// A token for each row of a batch whose logits are wanted, by 64 random bits for each.
    pub fn new(batch: Batch, draws: Vec<u64>) -> Self {
        Self {
            batch,
            by: By::Columns,
            draws,
        }
    }

    /// One token, after `tokens` at the end of a block that sees nothing but itself.
    pub fn of_one(block: BlockId, tokens: &[TokenId], draw: u64) -> Self {
        Self::new(alone(block, tokens, Logits::Last), vec![draw])
    }

    /// What is fed.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Whether another pass differs in nothing but the tokens that it feeds.
    fn is_like(&self, other: &Self) -> bool {
        self.batch.is_like(&other.batch) && self.by == other.by && self.draws == other.draws
    }
}

/// A batch of one turn, of a block that sees nothing but itself.
fn alone(block: BlockId, tokens: &[TokenId], logits: Logits) -> Batch {
    let turn = Turn {
        view: View(vec![block]),
        tokens: tokens.to_vec(),
        logits,
    };
    Batch { turns: vec![turn] }
}

/// The block that a turn writes.
fn own(turn: &Turn) -> BlockId {
    *turn.view.0.last().expect("a view has a block")
}
