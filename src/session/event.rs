//! What happens in a session, as data: the log is the session.
//!
//! A log is a stream of JSON lines. The first is the [`Header`], which says all that a run depends on;
//! every other is an [`Event`], in order. Header and events with the same model give the same run again.
//! Format version: [`FORMAT`].

use serde::{Deserialize, Serialize};

use crate::TokenId;
use crate::cache::layout::Layout;

/// Version of the log format; a reader refuses any other.
pub const FORMAT: u32 = 1;

/// The first line of a log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of the program that wrote it.
    pub hogwild: String,
    /// The model.
    pub model: ModelName,
    /// Name of the device, or of several, comma-separated.
    pub device: String,
    /// How many layers each of several devices has; nothing of one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<usize>,
    /// How the session runs.
    pub settings: Settings,
    /// What its workers may say; `None` where a text is continued as it is.
    pub rules: Option<RulesName>,
    /// Names of the workers at the start.
    pub names: Vec<String>,
    /// The tokens it begins with.
    pub opening: OpeningIds,
}

/// Which model a log is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelName {
    /// The directory as it was given; only for people.
    pub directory: String,
    /// Hash of its config and of the headers of its weight files.
    pub hash: String,
}

/// How a session runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Who sees what.
    pub layout: Layout,
    /// Passes after which the session is asked for its answer.
    pub max_passes: u64,
    /// Tokens that the cache holds, and the furthest position.
    pub context: usize,
    /// Storage type of the cache: `f16`, `bf16` or `f32`.
    pub kv_dtype: String,
    /// Whether the session is made to answer when it ends without an answer.
    pub early_answer: bool,
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Most likely tokens that are kept; 0 keeps all.
    pub top_k: usize,
    /// Probability mass that is kept.
    pub top_p: f32,
    /// Least probability relative to the most likely token.
    pub min_p: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// Ids from here on are padding of the model's matrix and never chosen.
    pub vocab_limit: Option<usize>,
}

/// The rules by name, with the points that were overridden.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RulesName {
    /// `main` or `fast`.
    pub version: String,
    /// Tokens of all workers together between two check questions.
    pub check_every: usize,
    /// What counts as an answer: `number`, `digits`, `text` or `code`.
    pub answer: String,
    /// Tokens that the finisher may generate.
    pub finisher_tokens: usize,
    /// End tokens beside the tokenizer's own.
    pub more_ends: Vec<TokenId>,
}

/// The tokens that a session begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpeningIds {
    /// What everybody sees first.
    pub prompt: Vec<TokenId>,
    /// The header before the others' steps.
    pub header_others: Vec<TokenId>,
    /// The header before the worker's own step.
    pub header_own: Vec<TokenId>,
    /// The first words of each worker.
    pub words: Vec<Vec<TokenId>>,
    /// What a worker says first who joins later, where it differs from the published words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joining: Option<String>,
    /// Tokens that end a text which is continued as it is.
    #[serde(default)]
    pub ends: Vec<TokenId>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A command was taken, before the pass of this number.
    Command {
        /// The next pass, from 0.
        pass: u64,
        /// The command.
        command: Command,
    },
    /// Tokens were stored in a block that sees only itself, before the first pass.
    Prefill {
        /// Number of the block.
        block: u32,
        /// Tokens.
        tokens: usize,
    },
    /// A pass ran: these tokens were fed, all visible to each other.
    Pass {
        /// Its number, from 0.
        pass: u64,
        /// One row for each worker that had tokens.
        rows: Vec<Row>,
    },
    /// A worker chose a token.
    Token {
        /// The pass it was chosen in.
        pass: u64,
        /// The worker, from 0.
        worker: usize,
        /// The token.
        id: TokenId,
        /// The text that is complete with it; empty within a character.
        text: String,
    },
    /// The protocol or a person put words into a worker's mouth; they are fed in the next pass.
    Inserted {
        /// The next pass.
        pass: u64,
        /// The worker, from 0.
        worker: usize,
        /// Which words.
        what: Words,
        /// Their tokens.
        ids: Vec<TokenId>,
        /// Their text.
        text: String,
    },
    /// A worker's step is finished and part of the history.
    StepClosed {
        /// The pass it ended in.
        pass: u64,
        /// The worker, from 0.
        worker: usize,
        /// Its number, from 1.
        step: usize,
        /// The block that became history, where the layout has it so.
        block: Option<u32>,
    },
    /// The session was made to answer.
    Finisher {
        /// Tokens of its text.
        prompt_tokens: usize,
        /// Tokens that it chose.
        ids: Vec<TokenId>,
        /// Their text, after the sentence that opens the box.
        text: String,
    },
    /// The session is over.
    Finish {
        /// Passes that ran.
        pass: u64,
        /// Why.
        reason: Reason,
        /// The answer, if there is one.
        answer: Option<String>,
    },
}

/// The tokens of one worker in a pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The worker, from 0.
    pub worker: usize,
    /// Number of the block they went to.
    pub block: u32,
    /// Index in the block of the first of them.
    pub first: usize,
    /// The tokens.
    pub ids: Vec<TokenId>,
}

/// Words that no worker chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Words {
    /// The first words of a worker.
    Opening,
    /// The prefix of a step.
    Prefix,
    /// The prefix of a step and the question whether its author does redundant work.
    Check,
    /// A person's.
    Fed,
}

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A finished step holds the answer.
    Answer,
    /// A worker chose an end token.
    EndToken,
    /// All passes were used.
    Budget,
    /// The cache, or the model's range of positions, is full but for the early answer.
    Context,
    /// Nobody is left who could write.
    NobodyLeft,
    /// A command asked for the answer.
    Asked,
    /// A command, or an interrupt, ended it without an answer.
    Stopped,
}

/// What a session can be told between passes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    /// A new worker joins.
    Join {
        /// Its name.
        name: String,
    },
    /// A worker is given no turns until it is resumed; what it wrote stays visible.
    Hold {
        /// The worker, from 0.
        worker: usize,
    },
    /// A held worker goes on.
    Resume {
        /// The worker, from 0.
        worker: usize,
    },
    /// A worker is given no turns any more; what it wrote stays visible.
    Retire {
        /// The worker, from 0.
        worker: usize,
    },
    /// A person writes as a worker, into its current step.
    Feed {
        /// The worker, from 0.
        worker: usize,
        /// The words.
        text: String,
    },
    /// The session shall answer now.
    Finish,
    /// The session shall end at once.
    Stop,
}
