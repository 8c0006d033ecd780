//! What the workers of a session may say next: openings, step ends, checks, the end.
//!
//! [`Protocol`] is told every token that a worker chose and says what that worker is fed next. It
//! knows tokens and text and nothing of caches: who sees what is `cache::layout`'s business, and when
//! a pass runs is `session`'s. It is pure: the same tokens give the same turns.
//!
//! Two things are easily got wrong. The token that ends a step was chosen but not run, so it is fed
//! as the first token of the worker's *next* step, while the step's text in the history keeps it.
//! And the check question is due when *all* workers together have been fed more than
//! [`Rules::check_every`] tokens; the first worker to end a step gets it.
//!
//! Invariant: every token of every worker is in the history or in one worker's current step, once.

mod answer;
mod finisher;
mod names;
mod prompt;
mod rules;
mod step_end;

use std::sync::Arc;

pub use answer::{Answer, AnswerKind, Value, find_answer};
pub use finisher::Finisher;
pub use names::{MAX_WORKERS, NAMES, check_names, default_names};
pub use prompt::{MAX_STYLE, OPENING, PromptStyle, opening_words};
pub use rules::{
    CHECK, FINISHER, FINISHER_CODE, HEADER_OTHERS, HEADER_OWN, JOINING_WORDS, OPENING_WORDS,
    PAST_STEPS, PIVOT, Rules, SEPARATOR, Search, Stop, step_prefix,
};
pub use step_end::{BLOCK_BORDERS, SENTENCE_ENDS, StepEnd};

use crate::text::{Chat, Date, Text};
use crate::{Error, Result, TokenId};

/// What a worker does after a token.
#[derive(Clone, Debug, PartialEq)]
pub enum Turn {
    /// The step goes on: feed the token.
    Speak(TokenId),
    /// The step is over: relabel its block as history, then feed these tokens to a new block.
    CloseStep {
        /// The token that ended the step, the prefix of the next one, and perhaps the question.
        feed: Vec<TokenId>,
        /// Whether the question is among them.
        check: bool,
    },
    /// The session is over. The other workers' tokens of this pass are still to be observed.
    Finish(Ending),
}

/// Why a session is over.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// A finished step holds an answer.
    Answer(Answer),
    /// A worker chose an end token.
    EndToken,
}

/// The tokens that a session begins with; each part was tokenised on its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// What everybody sees first.
    pub prompt: Vec<TokenId>,
    /// The header before the others' steps.
    pub header_others: Vec<TokenId>,
    /// The header before the worker's own step.
    pub header_own: Vec<TokenId>,
    /// The first words of each worker.
    pub words: Vec<Vec<TokenId>>,
}

impl Opening {
    /// Tokenises given texts as they are; added tokens in them are recognised.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses a text.
    pub fn from_texts<S: AsRef<str>>(
        text: &Text,
        prompt: &str,
        header_others: &str,
        header_own: &str,
        words: &[S],
    ) -> Result<Self> {
        Ok(Self {
            prompt: text.encode(prompt)?,
            header_others: text.encode(header_others)?,
            header_own: text.encode(header_own)?,
            words: words
                .iter()
                .map(|words| text.encode(words.as_ref()))
                .collect::<Result<_>>()?,
        })
    }
}

/// What the workers are asked.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// The user's words; no control token comes from them.
    pub text: &'a str,
    /// The prompt around them.
    pub style: &'a PromptStyle,
    /// The chat template's `enable_thinking`, where it is to be set.
    pub thinking: Option<bool>,
    /// The day that the chat template may mention.
    pub today: Date,
}

/// Whether a worker takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is given turns.
    Active,
    /// It is given none until it is resumed; what it wrote stays visible.
    Held,
    /// It is given none any more; what it wrote stays visible.
    Retired,
}

#[derive(Clone, Debug)]
struct Worker {
    name: String,
    presence: Presence,
    /// Number of the current step, from 1.
    step: usize,
    /// Tokens of the current step, prefix included.
    current: Vec<TokenId>,
}

/// A finished step: whose it is and where it stands in the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Index of the worker.
    pub worker: usize,
    /// The worker's own count, from 1.
    pub number: usize,
    /// Its tokens in [`Protocol::history_tokens`].
    pub tokens: std::ops::Range<usize>,
}

/// What was written up to a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The finished steps.
    pub history: Vec<TokenId>,
    /// The current step of each worker.
    pub current: Vec<Vec<TokenId>>,
    /// Whether the session is over, or a current step already holds an answer that ends it.
    pub finished: bool,
}

/// The state of a session's text.
#[derive(Clone, Debug)]
pub struct Protocol {
    text: Arc<Text>,
    rules: Rules,
    step_end: StepEnd,
    suppressed: Vec<TokenId>,
    ends: Vec<TokenId>,
    opening: Opening,
    /// What a worker says first who joins later, with `{name}` for its name.
    joining: String,
    pivot: Vec<TokenId>,
    workers: Vec<Worker>,
    history: Vec<TokenId>,
    steps: Vec<Step>,
    /// Tokens fed since the last question.
    unchecked: usize,
    ending: Option<Ending>,
}

impl Protocol {
    /// Begins a session on a problem: prompt, chat template, headers, opening words.
    ///
    /// A model without a chat template gets its beginning token and the prompt as plain text.
    ///
    /// # Errors
    /// As [`Self::with_opening`], and [`Error::Template`] when the chat template fails.
    pub fn open<S: AsRef<str>>(
        text: Arc<Text>,
        rules: Rules,
        names: &[S],
        problem: &Problem<'_>,
    ) -> Result<Self> {
        check_names(names)?;
        let opening = Opening {
            prompt: prompt_tokens(&text, &rules, names, problem)?,
            header_others: text.encode(&rules.header_others)?,
            header_own: text.encode(&rules.header_own)?,
            words: names
                .iter()
                .enumerate()
                .map(|(i, name)| {
                    text.encode(&opening_words(name.as_ref(), problem.style.opening(i)))
                })
                .collect::<Result<_>>()?,
        };
        // Who has no token has nothing to choose the next one from.
        if opening.words.iter().any(Vec::is_empty) {
            let problem = "this vocabulary cannot write a worker's first words";
            return Err(Error::Tokenizer(problem.to_owned()));
        }
        Ok(Self {
            joining: problem.style.joining().to_owned(),
            ..Self::with_opening(text, rules, names, opening)?
        })
    }

    /// Begins a session with given tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] when a name is unsound or the opening has words for another number of
    /// workers; [`Error::Tokenizer`] when the vocabulary cannot write a blank line.
    pub fn with_opening<S: AsRef<str>>(
        text: Arc<Text>,
        rules: Rules,
        names: &[S],
        opening: Opening,
    ) -> Result<Self> {
        check_names(names)?;
        for name in names {
            check_written(&text, name.as_ref())?;
        }
        if names.len() != opening.words.len() {
            return Err(Error::Usage(format!(
                "{} workers, but opening words for {}",
                names.len(),
                opening.words.len()
            )));
        }
        let mut ends: Vec<_> = text.eos().iter().chain(&rules.more_ends).copied().collect();
        ends.sort_unstable();
        ends.dedup();
        let mut suppressed: Vec<_> = rules
            .suppress
            .iter()
            .filter_map(|token| text.id_of(token))
            .collect();
        if rules.suppress_ends {
            suppressed.extend(text.bos());
            suppressed.extend(&ends);
        }
        suppressed.sort_unstable();
        suppressed.dedup();
        let workers = names
            .iter()
            .zip(&opening.words)
            .map(|(name, words)| Worker::new(name.as_ref(), words))
            .collect();
        Ok(Self {
            step_end: StepEnd::new(&text, &rules)?,
            pivot: text.encode(&format!("{PIVOT}{SEPARATOR}"))?,
            text,
            rules,
            suppressed,
            ends,
            opening,
            joining: JOINING_WORDS.to_owned(),
            workers,
            history: Vec::new(),
            steps: Vec::new(),
            unchecked: 0,
            ending: None,
        })
    }

    /// The same session, in which those who join later say other words first.
    #[must_use]
    pub fn with_joining(self, words: &str) -> Self {
        Self {
            joining: words.to_owned(),
            ..self
        }
    }

    /// What a worker says first who joins later, with `{name}` for its name.
    pub fn joining(&self) -> &str {
        &self.joining
    }

    /// Takes the token that a worker chose and says what follows.
    ///
    /// Call it for every active worker of a pass, in ascending order. After [`Turn::Finish`] the
    /// worker's tokens are in place; nothing needs to be fed.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the vocabulary cannot write the next step's prefix.
    ///
    /// # Panics
    /// If there is no such worker, or it is not active.
    pub fn observe(&mut self, me: usize, token: TokenId) -> Result<Turn> {
        assert_eq!(
            self.workers[me].presence,
            Presence::Active,
            "worker {me} is observed but not active"
        );
        let worker = &mut self.workers[me];
        worker.current.push(token);
        if self.rules.stop == Stop::EndToken && self.ends.contains(&token) {
            self.unchecked += 1;
            self.ending.get_or_insert(Ending::EndToken);
            return Ok(Turn::Finish(Ending::EndToken));
        }
        if !self.step_end.ends(&self.text, &worker.current) {
            self.unchecked += 1;
            return Ok(Turn::Speak(token));
        }
        let answer = self.answer_in(&self.workers[me].current);
        let turn = self.close(me, &[token])?;
        match answer {
            Some(answer) => {
                let ending = Ending::Answer(answer);
                self.ending.get_or_insert(ending.clone());
                Ok(Turn::Finish(ending))
            }
            None => Ok(turn),
        }
    }

    /// Moves a worker's step to the history and begins the next one after `left_over`.
    fn close(&mut self, me: usize, left_over: &[TokenId]) -> Result<Turn> {
        let worker = &self.workers[me];
        let mut words = step_prefix(&worker.name, worker.step + 1);
        let check = self.unchecked > self.rules.check_every;
        if check {
            words.push_str(&self.rules.check);
        }
        let words = self.text.encode(&words)?;

        let worker = &mut self.workers[me];
        let start = self.history.len();
        self.history.append(&mut worker.current);
        self.steps.push(Step {
            worker: me,
            number: worker.step,
            tokens: start..self.history.len(),
        });
        worker.step += 1;
        worker.current.clone_from(&words);
        let mut feed = left_over.to_vec();
        feed.extend(words);
        if check {
            self.unchecked = 0;
        }
        self.unchecked += feed.len();
        Ok(Turn::CloseStep { feed, check })
    }

    fn answer_in(&self, step: &[TokenId]) -> Option<Answer> {
        if self.rules.stop != Stop::Answer {
            return None;
        }
        find_answer(self.rules.answer, &self.text.decode(step))
    }

    /// Adds a worker and gives its opening words, to be fed to a new block.
    ///
    /// # Errors
    /// [`Error::Usage`] when the name is unsound or there is no room for another worker.
    pub fn join(&mut self, name: &str) -> Result<Vec<TokenId>> {
        let names: Vec<&str> = self.workers.iter().map(|w| w.name.as_str()).collect();
        check_names(&[names.as_slice(), &[name]].concat())?;
        check_written(&self.text, name)?;
        let words = self.text.encode(&opening_words(name, &self.joining))?;
        self.workers.push(Worker::new(name, &words));
        self.opening.words.push(words.clone());
        Ok(words)
    }

    /// Gives a worker no more turns until [`Self::resume`].
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such worker or it has retired.
    pub fn hold(&mut self, me: usize) -> Result<()> {
        self.present(me)?.presence = Presence::Held;
        Ok(())
    }

    /// Gives a held worker turns again.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such worker or it has retired.
    pub fn resume(&mut self, me: usize) -> Result<()> {
        self.present(me)?.presence = Presence::Active;
        Ok(())
    }

    /// Gives a worker no more turns; what it wrote stays.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such worker or it has retired before.
    pub fn retire(&mut self, me: usize) -> Result<()> {
        self.present(me)?.presence = Presence::Retired;
        Ok(())
    }

    /// Writes text into a worker's current step, as a person does, and gives the tokens to feed.
    ///
    /// They follow the worker's last token, which may still wait to be fed. The text ends no step,
    /// whatever it holds: see [`Self::end_step`]. No control token comes from it.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such worker or it has retired.
    pub fn feed(&mut self, me: usize, words: &str) -> Result<Vec<TokenId>> {
        self.present(me)?;
        let ids = self.text.encode_plain(words)?;
        self.workers[me].current.extend(&ids);
        self.unchecked += ids.len();
        Ok(ids)
    }

    /// Ends a worker's step where it stands and gives a [`Turn::CloseStep`] with the next prefix.
    ///
    /// Every token of the step must have been fed before.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such worker or it has retired.
    pub fn end_step(&mut self, me: usize) -> Result<Turn> {
        self.present(me)?;
        self.close(me, &[])
    }

    fn present(&mut self, me: usize) -> Result<&mut Worker> {
        let n = self.workers.len();
        match self.workers.get_mut(me) {
            None => Err(Error::Usage(format!(
                "there is no worker {me}; there are {n}, counted from 0"
            ))),
            Some(worker) if worker.presence == Presence::Retired => {
                Err(Error::Usage(format!("{} has retired", worker.name)))
            }
            Some(worker) => Ok(worker),
        }
    }

    /// The tokens that the session began with, and the opening words of those who joined.
    pub fn opening(&self) -> &Opening {
        &self.opening
    }

    /// The rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The tokenizer.
    pub fn text(&self) -> &Arc<Text> {
        &self.text
    }

    /// Tokens that no worker may choose, ascending.
    pub fn suppressed(&self) -> &[TokenId] {
        &self.suppressed
    }

    /// Number of workers, held and retired ones included.
    pub fn n_workers(&self) -> usize {
        self.workers.len()
    }

    /// A worker's name.
    ///
    /// # Panics
    /// If there is no such worker.
    pub fn name(&self, me: usize) -> &str {
        &self.workers[me].name
    }

    /// Index of the worker with this name.
    pub fn worker_named(&self, name: &str) -> Option<usize> {
        self.workers.iter().position(|w| w.name == name)
    }

    /// Whether a worker takes part.
    ///
    /// # Panics
    /// If there is no such worker.
    pub fn presence(&self, me: usize) -> Presence {
        self.workers[me].presence
    }

    /// Number of a worker's current step, from 1.
    ///
    /// # Panics
    /// If there is no such worker.
    pub fn step(&self, me: usize) -> usize {
        self.workers[me].step
    }

    /// Tokens of a worker's current step, its prefix included.
    ///
    /// # Panics
    /// If there is no such worker.
    pub fn current_tokens(&self, me: usize) -> &[TokenId] {
        &self.workers[me].current
    }

    /// Tokens of the finished steps, in the order in which they were finished.
    ///
    /// A cache holds the same tokens in another order: there, the token that ended a step begins its
    /// author's next one.
    pub fn history_tokens(&self) -> &[TokenId] {
        &self.history
    }

    /// The finished steps, in the order of the history.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Why the session is over, if it is.
    pub fn finished(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// What was written so far.
    pub fn snapshot(&self) -> Snapshot {
        let answered = |w: &Worker| self.answer_in(&w.current).is_some();
        Snapshot {
            history: self.history.clone(),
            current: self.workers.iter().map(|w| w.current.clone()).collect(),
            finished: self.ending.is_some() || self.workers.iter().any(answered),
        }
    }

    /// Everything as one flat sequence: prompt, history, the others' header, all current steps.
    pub fn flat_tokens(&self) -> Vec<TokenId> {
        let mut ids = self.opening.prompt.clone();
        ids.extend(&self.history);
        ids.extend(&self.opening.header_others);
        for worker in &self.workers {
            ids.extend(&worker.current);
            ids.extend(&self.pivot);
        }
        ids
    }

    /// [`Self::flat_tokens`] as text.
    pub fn flat_text(&self) -> String {
        self.text.decode(&self.flat_tokens())
    }

    /// The finisher for what was written so far.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text cannot be tokenised again.
    pub fn finisher(&self) -> Result<Finisher> {
        Finisher::new(self)
    }
}

impl Worker {
    fn new(name: &str, words: &[TokenId]) -> Self {
        Self {
            name: name.to_owned(),
            presence: Presence::Active,
            step: 1,
            current: words.to_vec(),
        }
    }
}

/// A name must be writable, and must not be a control token of this vocabulary.
fn check_written(text: &Text, name: &str) -> Result<()> {
    let ids = text.encode(&step_prefix(name, 1))?;
    if ids.iter().any(|&id| text.is_control(id)) {
        return Err(Error::Usage(format!(
            "worker name {name:?}: it holds a control token of the model"
        )));
    }
    Ok(())
}

fn prompt_tokens<S: AsRef<str>>(
    text: &Text,
    rules: &Rules,
    names: &[S],
    problem: &Problem<'_>,
) -> Result<Vec<TokenId>> {
    let user = problem.style.fill(rules, names, problem.text);
    let chat = Chat {
        user: &user,
        system: None,
        thinking: problem.thinking,
        today: problem.today,
    };
    let prompt = text.has_chat_template().then(|| text.render_chat(&chat));
    let prompt = prompt.transpose()?;
    let mut suffix = String::new();
    // A thought opens an assistant's turn; without a template there is none.
    let opened = prompt.as_ref().is_none_or(|p| p.ends_with("<think>"));
    let thinks = text.knows_thoughts() && problem.thinking != Some(false);
    if rules.open_think && thinks && !opened {
        suffix.push_str("<think>");
    }
    if rules.past_steps || !suffix.is_empty() {
        suffix.push('\n');
    }
    if rules.past_steps {
        suffix.push_str(PAST_STEPS);
        suffix.push_str(SEPARATOR);
    }
    let Some(prompt) = prompt else {
        let mut ids: Vec<_> = text.bos().into_iter().collect();
        ids.extend(text.encode_plain(&user)?);
        ids.extend(text.encode(&format!("{SEPARATOR}{suffix}"))?);
        return Ok(ids);
    };
    text.encode_chat(&prompt, &suffix)
}
