//! Replay: a log's run once more, compared id by id.

use std::sync::Arc;

use super::event::{Event, Header};
use super::{Raw, Session};
use crate::model::Model;
use crate::protocol::{Opening, Protocol};
use crate::text::Text;
use crate::{Error, Result, TokenId};

/// What a replay found.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed {
    /// Passes that ran.
    pub passes: u64,
    /// Tokens that were compared.
    pub tokens: usize,
    /// The first difference, if there is one.
    pub difference: Option<Difference>,
}

/// Where a run leaves its log.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Index of the event in the log, from 0.
    pub event: usize,
    /// The event in the log, if it has one there.
    pub logged: Option<Event>,
    /// The event of the run.
    pub ran: Option<Event>,
}

/// Runs a log again; `watch` sees every event of the run.
///
/// A log that breaks off is followed as far as it goes.
///
/// # Errors
/// [`Error::Usage`] if the log contradicts the model or itself; those of the run.
pub fn replay(
    header: &Header,
    logged: &[Event],
    model: Arc<Model>,
    text: Arc<Text>,
    checked: bool,
    watch: &mut dyn FnMut(&Event) -> Result<()>,
) -> Result<Replayed> {
    let vocab = model.config().vocab_size;
    let mut ids = logged.iter().flat_map(ids_of).chain(opening_ids(header));
    if let Some(id) = ids.find(|&id| id as usize >= vocab) {
        return Err(Error::Usage(format!(
            "the log holds token {id}, but the model has {vocab} tokens"
        )));
    }
    let engine = header.settings.engine(model, checked)?;
    let mut run = Run::new(header, engine, text)?;
    let mut out = Replayed {
        passes: 0,
        tokens: 0,
        difference: None,
    };
    let mut at = 0;
    while at < logged.len() {
        // Commands are logged before the pass that they precede.
        let first = logged[at..]
            .iter()
            .position(|e| !is_before_commands(e))
            .unwrap_or(0);
        let commands: Vec<_> = logged[at + first..]
            .iter()
            .map_while(|event| match event {
                Event::Command { command, .. } => Some(Some(command.clone())),
                Event::Inserted {
                    what: super::Words::Fed | super::Words::Opening,
                    ..
                } => Some(None),
                _ => None,
            })
            .flatten()
            .collect();
        let events = run.step(&commands)?;
        if events.is_empty() {
            let difference = Difference {
                event: at,
                logged: Some(logged[at].clone()),
                ran: None,
            };
            out.difference = Some(difference);
            break;
        }
        for event in events {
            watch(&event)?;
            let Some(expected) = logged.get(at) else {
                break;
            };
            if *expected != event {
                let (logged, ran) = (Some(expected.clone()), Some(event));
                out.difference = Some(Difference {
                    event: at,
                    logged,
                    ran,
                });
                out.passes = run.passes();
                return Ok(out);
            }
            out.tokens += usize::from(matches!(event, Event::Token { .. }));
            at += 1;
        }
    }
    out.passes = run.passes();
    Ok(out)
}

/// Events of the opening, which precede the first commands.
fn is_before_commands(event: &Event) -> bool {
    matches!(
        event,
        Event::Prefill { .. }
            | Event::Inserted {
                what: super::Words::Opening,
                ..
            }
    )
}

fn ids_of(event: &Event) -> Vec<TokenId> {
    match event {
        Event::Token { id, .. } => vec![*id],
        Event::Inserted { ids, .. } | Event::Finisher { ids, .. } => ids.clone(),
        Event::Pass { rows, .. } => rows.iter().flat_map(|r| r.ids.clone()).collect(),
        _ => Vec::new(),
    }
}

fn opening_ids(header: &Header) -> impl Iterator<Item = TokenId> + '_ {
    let o = &header.opening;
    let words = o.words.iter().flatten();
    o.prompt
        .iter()
        .chain(&o.header_others)
        .chain(&o.header_own)
        .chain(words)
        .copied()
}

enum Run {
    Session(Box<Session>),
    Raw(Box<Raw>, Arc<Text>),
}

impl Run {
    fn new(header: &Header, engine: crate::model::Engine, text: Arc<Text>) -> Result<Self> {
        let o = &header.opening;
        let settings = header.settings.clone();
        let Some(rules) = &header.rules else {
            let raw = Raw::new(engine, settings, o.prompt.clone(), o.ends.clone())?;
            return Ok(Self::Raw(Box::new(raw), text));
        };
        let opening = Opening {
            prompt: o.prompt.clone(),
            header_others: o.header_others.clone(),
            header_own: o.header_own.clone(),
            words: o.words.clone(),
        };
        let mut protocol = Protocol::with_opening(text, rules.rules()?, &header.names, opening)?;
        if let Some(words) = &o.joining {
            protocol = protocol.with_joining(words);
        }
        Ok(Self::Session(Box::new(Session::new(
            engine, protocol, settings,
        )?)))
    }

    fn step(&mut self, commands: &[super::Command]) -> Result<Vec<Event>> {
        match self {
            Self::Session(session) => session.step(commands),
            Self::Raw(raw, text) => raw.step(text),
        }
    }

    fn passes(&self) -> u64 {
        match self {
            Self::Session(session) => session.passes(),
            Self::Raw(raw, _) => raw.passes(),
        }
    }
}
