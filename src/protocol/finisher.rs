//! The finisher: makes a model answer from what was written, when the budget is spent.
//!
//! It runs on an ordinary sequence: the session's flat text is tokenised anew with a sentence that
//! opens a box, and a few tokens are chosen greedily, nothing suppressed. Invariant: control tokens
//! of its prompt are those of the session, whatever the text spells.

use std::sync::Arc;

use super::Protocol;
use super::answer::{Answer, AnswerKind, find_answer};
use super::rules::Search;
use crate::text::Text;
use crate::{Result, TokenId};

/// One forced answer.
#[derive(Clone, Debug)]
pub struct Finisher {
    text: Arc<Text>,
    /// What was written, the prompt included.
    flat: String,
    /// What was written, without the prompt.
    generated: String,
    suffix: String,
    prompt: Vec<TokenId>,
    tokens: Vec<TokenId>,
    ends: Vec<TokenId>,
    kind: AnswerKind,
    search: Search,
    max_tokens: usize,
    stops: bool,
}

impl Finisher {
    pub(super) fn new(protocol: &Protocol) -> Result<Self> {
        let (text, rules) = (&protocol.text, &protocol.rules);
        let ids = protocol.flat_tokens();
        let flat = text.decode(&ids);
        let whole = format!("{flat}{}", rules.finisher);
        let mut prompt = text.encode(&whole)?;
        let controls = |ids: &[TokenId]| ids.iter().filter(|&&id| text.is_control(id)).count();
        if controls(&prompt) != controls(&ids) {
            prompt = between_controls(text, &ids, &rules.finisher)?;
        }
        Ok(Self {
            generated: text.decode(&ids[protocol.opening.prompt.len()..]),
            flat,
            suffix: rules.finisher.clone(),
            prompt,
            tokens: Vec::new(),
            ends: protocol.ends.clone(),
            kind: rules.answer,
            search: rules.finisher_search,
            max_tokens: rules.finisher_tokens,
            stops: rules.finisher_stops,
            text: Arc::clone(text),
        })
    }

    /// The answer that was there already; then nothing needs to run.
    pub fn answer_before(&self) -> Option<Answer> {
        find_answer(self.kind, self.searched())
    }

    fn searched(&self) -> &str {
        match self.search {
            Search::WholeText => &self.flat,
            Search::Generated => &self.generated,
        }
    }

    /// The tokens to run, in a sequence of their own.
    pub fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    /// Whether a token is wanted after the prompt at all.
    pub fn wants_token(&self) -> bool {
        self.max_tokens > 0
    }

    /// Takes the next token; true when another one is wanted.
    ///
    /// An end token ends the answer, except as the first one.
    pub fn push(&mut self, token: TokenId) -> bool {
        if !self.tokens.is_empty() && self.ends.contains(&token) {
            return false;
        }
        if self.tokens.len() < self.max_tokens {
            self.tokens.push(token);
        }
        let enough = self.stops && find_answer(self.kind, &self.tail()).is_some();
        self.tokens.len() < self.max_tokens && !enough
    }

    /// The tokens that were taken.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The appended sentence and what followed it.
    pub fn tail(&self) -> String {
        format!("{}{}", self.suffix, self.text.decode(&self.tokens))
    }

    /// The whole text, prompt, sentence and answer.
    pub fn whole_text(&self) -> String {
        format!("{}{}", self.flat, self.tail())
    }

    /// The answer, after the tokens that were taken.
    pub fn answer(&self) -> Option<Answer> {
        find_answer(self.kind, &format!("{}{}", self.searched(), self.tail()))
    }
}

/// Tokenises the text of the stretches between control tokens, which stay as they are.
fn between_controls(text: &Text, ids: &[TokenId], suffix: &str) -> Result<Vec<TokenId>> {
    let mut out = Vec::new();
    let mut stretches = ids.split(|&id| text.is_control(id)).peekable();
    let mut at = 0;
    while let Some(stretch) = stretches.next() {
        let mut words = text.decode(stretch);
        at += stretch.len();
        let last = stretches.peek().is_none();
        if last {
            words.push_str(suffix);
        }
        out.extend(text.encode_plain(&words)?);
        if !last {
            out.push(ids[at]);
            at += 1;
        }
    }
    Ok(out)
}
