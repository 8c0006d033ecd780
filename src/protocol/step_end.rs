//! When a reasoning step is over: a blank line after the end of a sentence.
//!
//! The rule first looks at the newest token, which is cheap, and only then decodes the whole step.
//! Invariant: the verdict depends on the step's tokens alone, prefix included.

use super::rules::{Rules, SEPARATOR};
use crate::text::Text;
use crate::{Error, Result, TokenId};

/// Characters that end a sentence; full-width marks are not among the published ones.
pub const SENTENCE_ENDS: [char; 16] = [
    '.', '?', '!', '。', '۔', '؟', '।', '॥', '…', '‽', '།', '᠃', '։', '჻', '¶', '❧',
];
/// What opens and closes a block that a step may not end in.
pub const BLOCK_BORDERS: [&str; 3] = ["```", "~~~", "$$"];

/// The step-end rule for one vocabulary.
#[derive(Clone, Debug)]
pub struct StepEnd {
    /// Tokens that may end a step, ascending.
    separators: Vec<TokenId>,
    /// The blank line is one token; otherwise the step's text must end with it.
    one_token: bool,
    keep_open_blocks: bool,
}

impl StepEnd {
    /// Finds the tokens that hold a blank line.
    ///
    /// A vocabulary that writes a blank line as several tokens (the published code refuses it) ends a
    /// step with the last of them.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer cannot write a blank line.
    pub fn new(text: &Text, rules: &Rules) -> Result<Self> {
        let ids = text.encode(SEPARATOR)?;
        let separators = match ids.as_slice() {
            [] => Vec::new(),
            [one] => text
                .token_str(*one)
                .map(|sep| text.ids_containing(&sep))
                .unwrap_or_default(),
            [.., last] => vec![*last],
        };
        if separators.is_empty() {
            return Err(Error::Tokenizer(
                "this vocabulary cannot write a blank line, which ends a step".to_owned(),
            ));
        }
        Ok(Self {
            separators,
            one_token: ids.len() == 1,
            keep_open_blocks: rules.keep_open_blocks,
        })
    }

    /// Tokens that may end a step, ascending.
    pub fn separators(&self) -> &[TokenId] {
        &self.separators
    }

    /// Whether the step is over with its newest token.
    pub fn ends(&self, text: &Text, step: &[TokenId]) -> bool {
        let Some(newest) = step.last() else {
            return false;
        };
        if self.separators.binary_search(newest).is_err() {
            return false;
        }
        let decoded = text.decode(step);
        if !self.one_token && !decoded.ends_with(SEPARATOR) {
            return false;
        }
        let open = |border: &&str| decoded.matches(*border).count() % 2 == 1;
        if self.keep_open_blocks && BLOCK_BORDERS.iter().any(open) {
            return false;
        }
        let before = decoded
            .rfind(SEPARATOR)
            .map_or(decoded.as_str(), |at| &decoded[..at]);
        python_strip(before).ends_with(SENTENCE_ENDS)
    }
}

/// Python's `str.strip()`, which also takes the four separators of ASCII for white space.
pub(crate) fn python_strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}
