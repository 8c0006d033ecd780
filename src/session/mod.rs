//! A session: workers, one cache, one model; the loop that makes them write together.
//!
//! [`Session::step`] takes commands, runs one pass and tells what happened. The protocol decides what is
//! said, the layout who sees it, the engine computes. Invariant: a worker's pending tokens are those of
//! its text that are not in the cache yet; every other token of its step is.

mod event;
mod log;
mod raw;
mod replay;

use std::sync::Arc;

pub use event::{
    Command, Event, FORMAT, Header, ModelName, OpeningIds, Reason, Row, RulesName, Settings, Words,
};
pub use log::{Log, read_log};
pub use raw::Raw;
pub use replay::{Difference, Replayed, replay};

use crate::cache::layout::Shared;
use crate::cache::pages::{BlockId, PAGE, pages_for};
use crate::cache::plan::{Batch, Logits, Turn as Fed};
use crate::device::DType;
use crate::model::{Engine, Model, Wanted};
use crate::protocol::{
    AnswerKind, Ending, Finisher, JOINING_WORDS, Presence, Protocol, Rules, Turn, step_prefix,
};
use crate::sampler::Sampling;
use crate::text::Stream;
use crate::{Error, Result, TokenId};

/// Several workers writing together.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    protocol: Protocol,
    settings: Settings,
    sampling: Sampling,
    shared: Shared,
    workers: Vec<Worker>,
    /// Passes that ran.
    pass: u64,
    early: Early,
    /// Whether prompt and headers are in the cache.
    is_open: bool,
    /// Set once the session shall end, and cleared of nothing after that.
    ending: Option<Reason>,
    is_over: bool,
}

#[derive(Debug, Default)]
struct Worker {
    /// Tokens of its text that are to be fed next.
    pending: Vec<TokenId>,
    /// Whether the pending tokens are to be fed although the worker has no turn: a person's words, or
    /// the last token of one who retired.
    flush: bool,
    stream: Stream,
}

/// What the early answer took when it was measured last.
#[derive(Clone, Copy, Debug, Default)]
struct Early {
    /// Tokens that were written then.
    written: usize,
    /// Tokens of the whole text, tokenised anew, and of the answer.
    need: usize,
}

/// Most tokens that a chosen token becomes when the text is tokenised anew: a broken character is
/// written as U+FFFD, which has three bytes.
const GROWTH: usize = 4;

/// How full the cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Tokens in the session's blocks.
    pub tokens: usize,
    /// Tokens that it may have.
    pub context: usize,
}

/// Tokens of the whole text, tokenised anew for the early answer, and of the answer itself.
fn early_need(protocol: &Protocol) -> Result<usize> {
    let prompt = protocol.finisher()?.prompt().len();
    Ok(prompt.saturating_add(protocol.rules().finisher_tokens))
}

impl Settings {
    /// The sampler that these settings describe.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            limit: self.vocab_limit,
        }
    }

    /// The storage type of the cache.
    ///
    /// # Errors
    /// [`Error::Usage`] if it is none of `f16`, `bf16` and `f32`.
    pub fn kv_type(&self) -> Result<DType> {
        match self.kv_dtype.as_str() {
            "f16" => Ok(DType::F16),
            "bf16" => Ok(DType::BF16),
            "f32" => Ok(DType::F32),
            other => Err(Error::Usage(format!(
                "no cache is of type '{other}'; give f16, bf16 or f32"
            ))),
        }
    }

    /// An engine with a cache for these settings.
    ///
    /// # Errors
    /// If the device cannot hold the cache, or the model was loaded for a shorter context.
    pub fn engine(&self, model: Arc<Model>, checked: bool) -> Result<Engine> {
        if model.n_positions() < self.context {
            return Err(Error::Usage(format!(
                "a context of {} tokens needs a model loaded for it, not for {}",
                self.context,
                model.n_positions()
            )));
        }
        Engine::new(model, self.kv_type()?, pages_for(self.context), checked)
    }
}

impl RulesName {
    /// The name of rules, by which [`RulesName::rules`] finds them again.
    pub fn new(version: &str, rules: &Rules) -> Self {
        let answer = match rules.answer {
            AnswerKind::Number => "number",
            AnswerKind::Digits => "digits",
            AnswerKind::Balanced => "text",
            AnswerKind::Code => "code",
        };
        Self {
            version: version.to_owned(),
            check_every: rules.check_every,
            answer: answer.to_owned(),
            finisher_tokens: rules.finisher_tokens,
            more_ends: rules.more_ends.clone(),
        }
    }

    /// The rules of this name.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such version or kind of answer.
    pub fn rules(&self) -> Result<Rules> {
        Ok(Rules {
            check_every: self.check_every,
            finisher_tokens: self.finisher_tokens,
            more_ends: self.more_ends.clone(),
            ..Self::published(&self.version, &self.answer)?
        })
    }

    /// The rules of a version for a kind of answer, nothing overridden.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such version or kind of answer.
    pub fn published(version: &str, answer: &str) -> Result<Rules> {
        let rules = match version {
            "main" => Rules::main(),
            "fast" => Rules::fast(),
            other => {
                return Err(Error::Usage(format!(
                    "no rules are called '{other}'; give main or fast"
                )));
            }
        };
        Ok(match answer {
            "number" => rules,
            "digits" => Rules {
                answer: AnswerKind::Digits,
                ..rules
            },
            "text" => Rules {
                answer: AnswerKind::Balanced,
                ..rules
            },
            "code" => rules.for_code(),
            other => {
                let all = "number, digits, text or code";
                return Err(Error::Usage(format!(
                    "no kind of answer is called '{other}'; give {all}"
                )));
            }
        })
    }
}

impl Session {
    /// A session that has not begun.
    ///
    /// # Errors
    /// [`Error::Limit`] if prompt, opening words and early answer do not fit the context;
    /// [`Error::Usage`] if a setting makes no sense.
    pub fn new(mut engine: Engine, protocol: Protocol, settings: Settings) -> Result<Self> {
        let sampling = settings.sampling();
        sampling.check()?;
        let pages = &mut engine.cache.pages;
        let shared = Shared {
            history: vec![pages.open()],
            header_others: pages.open(),
            header_own: pages.open(),
            own: (0..protocol.n_workers()).map(|_| pages.open()).collect(),
        };
        let words = &protocol.opening().words;
        let worker = |words: &Vec<TokenId>| Worker {
            pending: words.clone(),
            ..Worker::default()
        };
        let workers = words.iter().map(worker).collect();
        if let Some(me) = words.iter().position(Vec::is_empty) {
            return Err(Error::Usage(format!(
                "{} has no first words, and nothing to go on from",
                protocol.name(me)
            )));
        }
        let mut session = Self {
            engine,
            protocol,
            settings,
            sampling,
            shared,
            workers,
            pass: 0,
            early: Early::default(),
            is_open: false,
            ending: None,
            is_over: false,
        };
        let rule = session.sampling.rule();
        let suppressed = session.protocol.suppressed();
        session.engine.choose_by(rule, suppressed)?;
        session.measure_early()?;
        let opening = session.protocol.opening();
        let headers = opening.header_others.len() + opening.header_own.len();
        let words: usize = opening.words.iter().map(Vec::len).sum();
        let own = opening.prompt.len() + headers + words;
        let need = own.max(session.early_room(session.early.need));
        if need > session.settings.context {
            return Err(Error::Limit {
                what: format!("the prompt of {} tokens", opening.prompt.len()),
                need: format!("{need} tokens with headers, opening words and the early answer"),
                have: format!("a context of {}", session.settings.context),
                advice: "shorten the problem or raise --context".into(),
            });
        }
        Ok(session)
    }

    /// What the log says before the first event.
    pub fn header(&self, model: ModelName, rules: RulesName) -> Header {
        let opening = self.protocol.opening();
        Header {
            format: FORMAT,
            hogwild: env!("CARGO_PKG_VERSION").to_owned(),
            model,
            device: self.engine.model().device_names(),
            layers: self.engine.model().placement().split().to_vec(),
            settings: self.settings.clone(),
            rules: Some(rules),
            names: (0..self.protocol.n_workers())
                .map(|w| self.protocol.name(w).to_owned())
                .collect(),
            opening: OpeningIds {
                prompt: opening.prompt.clone(),
                header_others: opening.header_others.clone(),
                header_own: opening.header_own.clone(),
                words: opening.words.clone(),
                joining: Some(self.protocol.joining())
                    .filter(|&words| words != JOINING_WORDS)
                    .map(str::to_owned),
                ends: Vec::new(),
            },
        }
    }

    /// How it runs.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What was said so far.
    pub fn protocol(&self) -> &Protocol {
        &self.protocol
    }

    /// The model and the cache.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Passes that ran.
    pub fn passes(&self) -> u64 {
        self.pass
    }

    /// Whether the session is over.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// How full the cache is; the blocks of a session that is over are given back.
    pub fn usage(&self) -> Usage {
        Usage {
            tokens: if self.is_over { 0 } else { self.tokens() },
            context: self.settings.context,
        }
    }

    fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        let headers = [self.shared.header_others, self.shared.header_own];
        self.shared
            .history
            .iter()
            .copied()
            .chain(headers)
            .chain(self.shared.own.iter().copied())
    }

    fn tokens(&self) -> usize {
        self.blocks().map(|b| self.engine.cache.pages.len(b)).sum()
    }

    /// Tokens of the workers' texts, those included that are not in the cache yet.
    fn written(&self) -> usize {
        let p = &self.protocol;
        let current = (0..p.n_workers()).map(|w| p.current_tokens(w).len());
        p.history_tokens().len() + current.sum::<usize>()
    }

    /// Measures what the early answer takes: the whole text is tokenised anew.
    fn measure_early(&mut self) -> Result<()> {
        if self.settings.early_answer {
            self.early = Early {
                written: self.written(),
                need: early_need(&self.protocol)?,
            };
        }
        Ok(())
    }

    /// What the early answer may take after one more pass, if now it takes `need` tokens: each worker
    /// chooses a token and may begin a step, one of them with the question.
    fn early_room(&self, need: usize) -> usize {
        if !self.settings.early_answer {
            return 0;
        }
        let p = &self.protocol;
        let prefixes = (0..p.n_workers()).map(|w| step_prefix(p.name(w), p.step(w) + 1).len());
        let more = prefixes.map(|n| n + GROWTH).sum::<usize>() + p.rules().check.len();
        need.saturating_add(more)
    }

    /// Whether the early answer will fit after one more pass. It is measured again only where the
    /// growth since the last time might matter, so that a long text is tokenised a few times in all.
    fn early_fits(&mut self) -> Result<bool> {
        let grown = GROWTH * self.written().saturating_sub(self.early.written);
        let bound = self.early.need.saturating_add(grown);
        if self.early_room(bound) <= self.settings.context {
            return Ok(true);
        }
        self.measure_early()?;
        Ok(self.early_room(self.early.need) <= self.settings.context)
    }

    /// Takes commands, then runs one pass; tells what happened, in order.
    ///
    /// The first call also stores prompt and headers. When a pass ends the session, the early answer runs
    /// within the same call. Without a worker that could write, nothing runs.
    ///
    /// # Errors
    /// [`Error::Usage`] for a command that makes no sense and [`Error::Limit`] for words that do not
    /// fit: then none of the commands was taken and nothing ran. Those of the device;
    /// [`Error::NotFinite`] if the model computes no number.
    pub fn step(&mut self, commands: &[Command]) -> Result<Vec<Event>> {
        let pass = self.pass;
        self.run(commands).map_err(|error| error.in_pass(pass))
    }

    fn run(&mut self, commands: &[Command]) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        if self.is_over {
            return Ok(events);
        }
        self.rehearse(commands)?;
        if !self.is_open {
            self.open(&mut events)?;
        }
        for command in commands {
            self.command(command, &mut events)?;
        }
        self.check_budget();
        if self.ending.is_none() {
            self.run_pass(&mut events)?;
            self.check_budget();
        }
        if let Some(reason) = self.ending {
            self.end(reason, &mut events)?;
        }
        Ok(events)
    }

    /// Stores prompt and headers, each alone in its block.
    fn open(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let opening = self.protocol.opening().clone();
        let parts = [
            (self.shared.history[0], &opening.prompt),
            (self.shared.header_others, &opening.header_others),
            (self.shared.header_own, &opening.header_own),
        ];
        for (block, tokens) in parts {
            self.engine.prefill(block, tokens, Logits::None)?;
            events.push(Event::Prefill {
                block: block.0,
                tokens: tokens.len(),
            });
        }
        self.engine.cache.pages.close(self.shared.history[0]);
        for (worker, ids) in opening.words.iter().enumerate() {
            self.inserted(worker, Words::Opening, ids.clone(), events);
        }
        self.is_open = true;
        Ok(())
    }

    fn inserted(&self, worker: usize, what: Words, ids: Vec<TokenId>, events: &mut Vec<Event>) {
        let text = self.protocol.text().decode(&ids);
        events.push(Event::Inserted {
            pass: self.pass,
            worker,
            what,
            ids,
            text,
        });
    }

    /// Whether all of the commands make sense one after the other; nothing changes.
    fn rehearse(&self, commands: &[Command]) -> Result<()> {
        if commands.is_empty() {
            return Ok(());
        }
        let mut protocol = self.protocol.clone();
        let mut added = 0;
        for command in commands {
            match command {
                Command::Join { name } => added += protocol.join(name)?.len(),
                Command::Hold { worker } => protocol.hold(*worker)?,
                Command::Resume { worker } => protocol.resume(*worker)?,
                Command::Retire { worker } => protocol.retire(*worker)?,
                Command::Feed { worker, text } => added += protocol.feed(*worker, text)?.len(),
                Command::Finish | Command::Stop => {}
            }
        }
        if added == 0 {
            return Ok(());
        }
        let mut need = self.to_be_stored() + added;
        if self.settings.early_answer {
            need = need.max(early_need(&protocol)?);
        }
        if need > self.settings.context {
            return Err(Error::Limit {
                what: "a command".into(),
                need: format!("{need} tokens with all that was written"),
                have: format!("a context of {}", self.settings.context),
                advice: "say less or raise --context".into(),
            });
        }
        Ok(())
    }

    fn check_budget(&mut self) {
        if self.pass >= self.settings.max_passes {
            self.ending.get_or_insert(Reason::Budget);
        }
    }

    fn command(&mut self, command: &Command, events: &mut Vec<Event>) -> Result<()> {
        let event = Event::Command {
            pass: self.pass,
            command: command.clone(),
        };
        match command {
            Command::Join { name } => {
                let words = self.protocol.join(name)?;
                self.shared.own.push(self.engine.cache.pages.open());
                self.workers.push(Worker {
                    pending: words.clone(),
                    ..Worker::default()
                });
                events.push(event);
                self.inserted(self.workers.len() - 1, Words::Opening, words, events);
                return Ok(());
            }
            Command::Hold { worker } => self.protocol.hold(*worker)?,
            Command::Resume { worker } => {
                self.protocol.resume(*worker)?;
                self.repeat_last_token(*worker);
            }
            Command::Retire { worker } => {
                self.protocol.retire(*worker)?;
                // Its last token was chosen but not fed: the others shall see it.
                self.workers[*worker].flush = true;
            }
            Command::Feed { worker, text } => {
                let ids = self.protocol.feed(*worker, text)?;
                self.workers[*worker].pending.extend(&ids);
                self.workers[*worker].flush = true;
                events.push(event);
                self.inserted(*worker, Words::Fed, ids, events);
                return Ok(());
            }
            Command::Finish => {
                self.ending.get_or_insert(Reason::Asked);
            }
            Command::Stop => self.ending = Some(Reason::Stopped),
        }
        events.push(event);
        Ok(())
    }

    /// A worker whose tokens are all in the cache has nothing to be fed, and nothing to choose from: its
    /// last token is taken back and fed again.
    fn repeat_last_token(&mut self, worker: usize) {
        let own = self.shared.own[worker];
        let len = self.engine.cache.pages.len(own);
        if let (true, Some(&last)) = (
            self.workers[worker].pending.is_empty() && len > 0,
            self.protocol.current_tokens(worker).last(),
        ) {
            self.engine.cache.pages.truncate(own, len - 1);
            self.workers[worker].pending.push(last);
        }
    }

    fn is_active(&self, worker: usize) -> bool {
        self.protocol.presence(worker) == Presence::Active
    }

    /// Tokens of the cache once everything that waits has been fed.
    fn to_be_stored(&self) -> usize {
        let pending: usize = self.workers.iter().map(|w| w.pending.len()).sum();
        if self.is_open {
            return self.tokens() + pending;
        }
        let o = self.protocol.opening();
        o.prompt.len() + o.header_others.len() + o.header_own.len() + pending
    }

    /// Whether the next pass, and after it the early answer, still fit.
    fn fits(&mut self) -> Result<bool> {
        let pages: usize = self
            .workers
            .iter()
            .map(|w| w.pending.len().div_ceil(PAGE) + 1)
            .sum();
        Ok(self.to_be_stored() <= self.settings.context
            && pages <= self.engine.cache.pages.n_free()
            && self.early_fits()?)
    }

    /// Workers that are fed in the next pass.
    fn turns(&self) -> Vec<usize> {
        (0..self.workers.len())
            .filter(|&w| !self.workers[w].pending.is_empty())
            .filter(|&w| self.is_active(w) || self.workers[w].flush)
            .collect()
    }

    /// A pass that feeds workers the tokens that are theirs, and chooses for those that are active.
    fn wanted(&self, turns: &[usize], tokens: impl Fn(usize) -> Vec<TokenId>, pass: u64) -> Wanted {
        let fed = |&worker: &usize| Fed {
            view: self.settings.layout.view(worker, &self.shared),
            tokens: tokens(worker),
            logits: if self.is_active(worker) {
                Logits::Last
            } else {
                Logits::None
            },
        };
        let active = turns.iter().filter(|&&w| self.is_active(w));
        let batch = Batch {
            turns: turns.iter().map(fed).collect(),
        };
        Wanted::new(
            batch,
            active.map(|&w| self.sampling.draw(w, pass)).collect(),
        )
    }

    /// The pass that feeds what is pending.
    fn wanted_now(&self, turns: &[usize]) -> Wanted {
        self.wanted(turns, |w| self.workers[w].pending.clone(), self.pass)
    }

    fn run_pass(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let turns = self.turns();
        if turns.is_empty() {
            let all_retired =
                (0..self.workers.len()).all(|w| self.protocol.presence(w) == Presence::Retired);
            if all_retired {
                self.ending = Some(Reason::NobodyLeft);
            }
            return Ok(());
        }
        if !self.fits()? {
            self.ending = Some(Reason::Context);
            return Ok(());
        }
        let wanted = self.wanted_now(&turns);
        let fed = turns.iter().zip(&wanted.batch().turns);
        let rows: Vec<Row> = fed
            .map(|(&worker, turn)| {
                let own = self.shared.own[worker];
                Row {
                    worker,
                    block: own.0,
                    first: self.engine.cache.pages.len(own),
                    ids: turn.tokens.clone(),
                }
            })
            .collect();
        for &worker in &turns {
            self.workers[worker].pending.clear();
            self.workers[worker].flush = false;
        }
        let pass = self.pass;
        let active: Vec<usize> = turns.into_iter().filter(|&w| self.is_active(w)).collect();
        // Most passes are like this: everybody who is active speaks one token, and no step ends.
        let goes_on = pass + 1 < self.settings.max_passes && !active.is_empty();
        let guess = goes_on.then(|| self.wanted(&active, |_| vec![0], pass + 1));
        let chosen = self
            .engine
            .choose(&wanted, guess)
            .map_err(|e| e.in_pass(pass))?;
        events.push(Event::Pass { pass, rows });
        let chosen = active.iter().zip(chosen).map(|(&worker, token)| {
            token.ok_or_else(|| Error::NotFinite {
                pass: usize::try_from(pass).unwrap_or(usize::MAX),
                worker: self.protocol.name(worker).to_owned(),
            })
        });
        let chosen = chosen.collect::<Result<Vec<_>>>()?;
        self.pass += 1;
        for (worker, token) in active.into_iter().zip(chosen) {
            self.observe(worker, token, pass, events)?;
        }
        if self.ending.is_none() && self.pass < self.settings.max_passes {
            // The device goes on while people are told what it said; a command may still change it.
            let next = self.wanted_now(&self.turns());
            self.engine.start(&next);
        }
        Ok(())
    }

    /// Tells the protocol what a worker chose, and does what it says.
    fn observe(
        &mut self,
        worker: usize,
        id: TokenId,
        pass: u64,
        events: &mut Vec<Event>,
    ) -> Result<()> {
        let step = self.protocol.step(worker);
        let turn = self.protocol.observe(worker, id)?;
        let text = self.protocol.text().clone();
        let stream = &mut self.workers[worker].stream;
        let mut piece = stream.push(&text, id).unwrap_or_default();
        if !matches!(turn, Turn::Speak(_)) {
            piece.extend(stream.flush(&text));
        }
        events.push(Event::Token {
            pass,
            worker,
            id,
            text: piece,
        });
        match turn {
            Turn::Speak(token) => self.workers[worker].pending = vec![token],
            Turn::CloseStep { feed, check } => {
                self.close_step(worker, step, pass, events);
                let what = if check { Words::Check } else { Words::Prefix };
                self.inserted(worker, what, feed[1..].to_vec(), events);
                self.workers[worker].pending = feed;
            }
            Turn::Finish(ending) => {
                if self.protocol.step(worker) != step {
                    self.close_step(worker, step, pass, events);
                }
                self.ending.get_or_insert(match ending {
                    Ending::Answer(_) => Reason::Answer,
                    Ending::EndToken => Reason::EndToken,
                });
            }
        }
        Ok(())
    }

    /// Relabels a worker's block as history; it goes on in a fresh one.
    fn close_step(&mut self, worker: usize, step: usize, pass: u64, events: &mut Vec<Event>) {
        let mut block = None;
        if self.settings.layout.moves_steps() {
            let fresh = self.engine.cache.pages.open();
            let done = self.settings.layout.close(worker, fresh, &mut self.shared);
            block = done.map(|done| {
                self.engine.cache.pages.close(done);
                done.0
            });
        }
        events.push(Event::StepClosed {
            pass,
            worker,
            step,
            block,
        });
    }

    /// Ends the session: finds the answer, or makes the model give one.
    fn end(&mut self, reason: Reason, events: &mut Vec<Event>) -> Result<()> {
        if reason == Reason::Stopped {
            self.finish(reason, None, events);
            return Ok(());
        }
        let mut finisher = self.protocol.finisher()?;
        if let Some(answer) = finisher.answer_before() {
            self.finish(reason, Some(answer.text), events);
            return Ok(());
        }
        if !self.settings.early_answer || !finisher.wants_token() {
            self.finish(reason, None, events);
            return Ok(());
        }
        self.run_finisher(&mut finisher)?;
        let prompt_tokens = finisher.prompt().len();
        let text = self.protocol.text().decode(finisher.tokens());
        events.push(Event::Finisher {
            prompt_tokens,
            ids: finisher.tokens().to_vec(),
            text,
        });
        self.finish(reason, finisher.answer().map(|a| a.text), events);
        Ok(())
    }

    /// Runs the early answer greedily in a sequence of its own.
    fn run_finisher(&mut self, finisher: &mut Finisher) -> Result<()> {
        // The session's blocks are given back first: the flat text is as long as all of them.
        // Empty, they can still be asked for their length.
        let blocks: Vec<BlockId> = self.blocks().collect();
        for block in blocks {
            self.engine.cache.pages.truncate(block, 0);
        }
        let need = finisher.prompt().len();
        let need = need.saturating_add(self.protocol.rules().finisher_tokens);
        if need > self.settings.context {
            return Err(Error::Limit {
                what: "the early answer".into(),
                need: format!("{need} tokens, for the text tokenised longer the second time"),
                have: format!("a context of {}", self.settings.context),
                advice: "raise --context or give --no-early-answer".into(),
            });
        }
        let greedy = Sampling {
            limit: self.sampling.limit,
            ..Sampling::greedy()
        };
        self.engine.choose_by(greedy.rule(), &[])?;
        let prompt = finisher.prompt().to_vec();
        if prompt.is_empty() {
            let problem = "it cannot write the sentence that asks for the answer";
            return Err(Error::Tokenizer(problem.into()));
        }
        // Greedy choices draw nothing.
        let block = self.engine.cache.pages.open();
        let one = |token| Wanted::of_one(block, &[token], 0);
        let mut token = self.engine.go_on(block, &prompt, 0, Some(one(0)));
        loop {
            let chosen = token.map_err(|e| e.in_pass(self.pass))?;
            let id = chosen.ok_or_else(|| Error::NotFinite {
                pass: usize::try_from(self.pass).unwrap_or(usize::MAX),
                worker: "the early answer".into(),
            })?;
            if !finisher.push(id) {
                return Ok(());
            }
            let ids = self.engine.choose(&one(id), Some(one(0)));
            token = ids.map(|ids| ids[0]);
        }
    }

    fn finish(&mut self, reason: Reason, answer: Option<String>, events: &mut Vec<Event>) {
        self.is_over = true;
        events.push(Event::Finish {
            pass: self.pass,
            reason,
            answer,
        });
    }
}
