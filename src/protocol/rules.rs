//! The rules of a session as data: every point in which two published versions differ is a field.
//!
//! *Source*: the paper's appendix C and its two public versions: the one that its accuracy results
//! were made with ([`Rules::main`]) and the fast one ([`Rules::fast`]).

use super::answer::AnswerKind;
use crate::TokenId;

/// The blank line that ends a step.
pub const SEPARATOR: &str = "\n\n";
/// What stands after an unfinished step: more is coming.
pub const PIVOT: &str = "<...>";
/// The title of finished steps.
pub const PAST_STEPS: &str = "### Past steps";
/// The question that a worker is asked from time to time.
pub const CHECK: &str = "Quick check: am I doing redundant work? (yes/no): ";
/// Before the others' unfinished steps.
pub const HEADER_OTHERS: &str = "\n\n### Work in progress (others)\n\n";
/// Before a worker's own step.
pub const HEADER_OWN: &str = "<...>\n\n### Work in progress (own)\n\n";
/// What the first worker of a published version says first, after its step prefix.
pub const OPENING_WORDS: &str = "Hi, I'm {name}. Here's how we can";
/// What the others say first.
pub const JOINING_WORDS: &str = "Hi, I'm {name}.";
/// What the finisher appends to make a model answer.
pub const FINISHER: &str = "\n\nWait, given the limited time, I have to give an answer right now. \
    Considering all my previous attempts, I have to conclude that the final answer is \\boxed{";
/// The same for problems that ask for a program.
pub const FINISHER_CODE: &str = "\n\nWait, given the limited time, I have to give an answer right \
    now. Considering all my previous attempts, I have to conclude that the final solution is:\n\
    ```python\n";

/// What ends a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A finished step holds an answer.
    Answer,
    /// A worker chooses an end token.
    EndToken,
    /// Nothing but the budget.
    Never,
}

/// Where the finisher looks for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// In the whole text, the prompt included.
    WholeText,
    /// In what was generated.
    Generated,
}

/// What workers may say, and when the session ends.
#[derive(Clone, Debug, PartialEq)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is one point in which versions differ"
)]
pub struct Rules {
    /// Tokens of all workers together after which the next worker to end a step is asked [`CHECK`].
    pub check_every: usize,
    /// The question, with its trailing space.
    pub check: String,
    /// Tokens, by the vocabulary's own strings, that are never chosen.
    pub suppress: Vec<String>,
    /// Whether the tokens that begin and end a text are never chosen.
    pub suppress_ends: bool,
    /// What ends a session.
    pub stop: Stop,
    /// Whether a step goes on while a code or formula block is open.
    pub keep_open_blocks: bool,
    /// The header before the others' steps.
    pub header_others: String,
    /// The header before the worker's own step.
    pub header_own: String,
    /// Whether the prompt ends with the title of finished steps.
    pub past_steps: bool,
    /// Whether the prompt opens a thought where the model has them and its chat template opened none.
    pub open_think: bool,
    /// Whether the prompt says that any worker may give the final answer.
    pub final_answer: bool,
    /// What counts as an answer.
    pub answer: AnswerKind,
    /// What the finisher appends.
    pub finisher: String,
    /// Tokens that the finisher may generate.
    pub finisher_tokens: usize,
    /// Where the finisher looks for an answer.
    pub finisher_search: Search,
    /// Whether the finisher stops as soon as it has an answer.
    pub finisher_stops: bool,
    /// End tokens beside the tokenizer's own, as `generation_config.json` lists them.
    pub more_ends: Vec<TokenId>,
}

impl Rules {
    /// The rules that the paper's accuracy results were made with.
    pub fn main() -> Self {
        Self {
            check_every: 256,
            check: CHECK.to_owned(),
            suppress: vec!["#".to_owned(), "</think>".to_owned()],
            suppress_ends: true,
            stop: Stop::Answer,
            keep_open_blocks: false,
            header_others: HEADER_OTHERS.to_owned(),
            header_own: HEADER_OWN.to_owned(),
            past_steps: false,
            open_think: true,
            final_answer: true,
            answer: AnswerKind::Number,
            finisher: FINISHER.to_owned(),
            finisher_tokens: 16,
            finisher_search: Search::WholeText,
            finisher_stops: false,
            more_ends: Vec::new(),
        }
    }

    /// The rules of the fast version.
    pub fn fast() -> Self {
        Self {
            check_every: 1024,
            suppress: Vec::new(),
            suppress_ends: false,
            stop: Stop::EndToken,
            keep_open_blocks: true,
            header_others: HEADER_OTHERS.trim_start().to_owned(),
            past_steps: true,
            final_answer: false,
            finisher_search: Search::Generated,
            finisher_stops: true,
            ..Self::main()
        }
    }

    /// The same rules for problems that ask for a program.
    #[must_use]
    pub fn for_code(self) -> Self {
        Self {
            answer: AnswerKind::Code,
            finisher: FINISHER_CODE.to_owned(),
            finisher_tokens: 1024,
            ..self
        }
    }
}

/// The words that begin a step, with the trailing space.
pub fn step_prefix(name: &str, step: usize) -> String {
    format!("**{name} [{step}]:** ")
}
