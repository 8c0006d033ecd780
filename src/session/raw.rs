//! A text continued as it is: one worker, one block, no prompts.

use super::event::{Event, Reason, Row, Settings};
use crate::cache::pages::BlockId;
use crate::model::{Engine, Wanted};
use crate::sampler::Sampling;
use crate::text::{Stream, Text};
use crate::{Error, Result, TokenId};

/// A continuation; the same events as a session's, of worker 0.
#[derive(Debug)]
pub struct Raw {
    engine: Engine,
    settings: Settings,
    sampling: Sampling,
    block: BlockId,
    pending: Vec<TokenId>,
    ends: Vec<TokenId>,
    stream: Stream,
    pass: u64,
    is_over: bool,
}

impl Raw {
    /// A continuation of `prompt` that ends at any of the tokens `ends`.
    ///
    /// # Errors
    /// [`Error::Limit`] if the prompt does not fit the context; [`Error::Usage`] if it is empty or a
    /// setting makes no sense.
    pub fn new(
        mut engine: Engine,
        settings: Settings,
        prompt: Vec<TokenId>,
        ends: Vec<TokenId>,
    ) -> Result<Self> {
        let sampling = settings.sampling();
        sampling.check()?;
        if prompt.is_empty() {
            return Err(Error::Usage(
                "there is no text to continue, and the model has no first token".into(),
            ));
        }
        if prompt.len() + 1 > settings.context {
            return Err(Error::Limit {
                what: "the text".into(),
                need: format!("{} tokens", prompt.len() + 1),
                have: format!("a context of {}", settings.context),
                advice: "shorten it or raise --context".into(),
            });
        }
        engine.choose_by(sampling.rule(), &[])?;
        let block = engine.cache.pages.open();
        let (stream, pending) = (Stream::new(), prompt);
        Ok(Self {
            engine,
            settings,
            sampling,
            block,
            pending,
            ends,
            stream,
            pass: 0,
            is_over: false,
        })
    }

    /// Passes that ran.
    pub fn passes(&self) -> u64 {
        self.pass
    }

    /// Whether the continuation is over.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Feeds what is pending and chooses one token.
    ///
    /// # Errors
    /// Those of the device; [`Error::NotFinite`] if the model computes no number.
    pub fn step(&mut self, text: &Text) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        if self.is_over {
            return Ok(events);
        }
        if self.settings.max_passes == 0 {
            self.finish(Reason::Budget, &mut events);
            return Ok(events);
        }
        let first = self.engine.cache.pages.len(self.block);
        let tokens = std::mem::take(&mut self.pending);
        let pass = self.pass;
        let draw = self.sampling.draw(0, pass);
        let guess = (pass + 1 < self.settings.max_passes).then(|| self.wanted(&[0], pass + 1));
        let id = if pass == 0 {
            self.engine.go_on(self.block, &tokens, draw, guess)
        } else {
            let wanted = self.wanted(&tokens, pass);
            self.engine.choose(&wanted, guess).map(|ids| ids[0])
        };
        let id = id.map_err(|e| e.in_pass(pass))?;
        let row = Row {
            worker: 0,
            block: self.block.0,
            first,
            ids: tokens,
        };
        events.push(Event::Pass {
            pass,
            rows: vec![row],
        });
        let id = id.ok_or_else(|| Error::NotFinite {
            pass: usize::try_from(pass).unwrap_or(usize::MAX),
            worker: "the text".into(),
        })?;
        self.pass += 1;
        let mut piece = String::new();
        let reason = if self.ends.contains(&id) {
            Some(Reason::EndToken)
        } else {
            piece = self.stream.push(text, id).unwrap_or_default();
            let len = self.engine.cache.pages.len(self.block) + 1;
            match (
                self.pass >= self.settings.max_passes,
                len >= self.settings.context,
            ) {
                (true, _) => Some(Reason::Budget),
                (_, true) => Some(Reason::Context),
                _ => None,
            }
        };
        if reason.is_some() {
            piece.extend(self.stream.flush(text));
        }
        events.push(Event::Token {
            pass,
            worker: 0,
            id,
            text: piece,
        });
        self.pending = vec![id];
        if let Some(reason) = reason {
            self.finish(reason, &mut events);
        } else {
            let wanted = self.wanted(&self.pending, self.pass);
            self.engine.start(&wanted);
        }
        Ok(events)
    }

    /// A pass that feeds some tokens and chooses one.
    fn wanted(&self, tokens: &[TokenId], pass: u64) -> Wanted {
        Wanted::of_one(self.block, tokens, self.sampling.draw(0, pass))
    }

    fn finish(&mut self, reason: Reason, events: &mut Vec<Event>) {
        self.is_over = true;
        events.push(Event::Finish {
            pass: self.pass,
            reason,
            answer: None,
        });
    }
}
