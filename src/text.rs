//! Text to tokens and back: tokenizer, chat template, incremental decoding.
//!
//! [`Text`] reads a Hugging Face directory and is read-only afterwards: share it in an `Arc`. It sits
//! below `protocol`, which decides what is said, and knows nothing of workers.
//!
//! Invariant: text that a user wrote never becomes a control token. Protocol text goes through
//! [`Text::encode`], which recognises every added token; user text goes through
//! [`Text::encode_plain`], [`Text::encode_as_input`] or [`Text::render_chat`], which recognise none
//! that steers a model.

pub mod child;
mod guard;
pub mod template;

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Model as _;
use tokenizers::{
    AddedToken, AddedVocabulary, Encoding, ModelWrapper, OffsetType, PreTokenizer as _, Token,
    Tokenizer,
};

use crate::caught::caught;
use crate::files::read_small;
use crate::{Error, Result, TokenId};

pub use template::Date;

/// Longest `tokenizer.json` that is read, in bytes.
pub const MAX_TOKENIZER: u64 = 64 << 20;
/// Longest configuration file that is read, in bytes.
pub const MAX_CONFIG: u64 = 1 << 20;
/// JSON values that a `tokenizer.json` may hold; the largest published ones have some two million.
const MAX_VALUES: usize = 4_000_000;
/// Bytes of its longest text; that of the largest table of normalisation has less than a third.
const MAX_STRING: usize = 1 << 20;
/// The file of the vocabulary.
const TOKENIZER: &str = "tokenizer.json";
/// Times that the rules of a tokenizer may make a text longer; published ones have 12 and less.
const MAX_GROWTH: usize = 64;
/// What is said where the tokenizer library panics.
const GAVE_UP: &str = "the tokenizer library gave up on it";
/// Longest user text that a chat template is rendered with, in bytes.
pub const MAX_USER_TEXT: usize = 1 << 20;

/// A tokenizer with its chat template and the ids that its model directory names.
pub struct Text {
    tokenizer: Tokenizer,
    /// The added tokens that are ordinary text (see [`is_control`]).
    plain: AddedVocabulary,
    /// Added tokens that steer a model, longest first.
    control: Vec<String>,
    control_ids: HashSet<TokenId>,
    /// Id that stands for unknown characters.
    unknown: Option<TokenId>,
    template: Option<Template>,
    renderer: Box<Renderer>,
    /// `bos_token`, `eos_token`, …: variables of the template.
    named: Map<String, Value>,
    bos: Option<TokenId>,
    eos: Vec<TokenId>,
    vocab_size: usize,
}

struct Template {
    what: String,
    source: String,
}

/// What renders a chat template: its name for messages, its source, its variables, the day.
///
/// [`template::render`] does it in this process, [`child::render`] in one that can be ended.
pub type Renderer = dyn Fn(&str, &str, &Value, Date) -> Result<String> + Send + Sync;

/// One user message, to be rendered with a chat template.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chat<'a> {
    /// The user's message.
    pub user: &'a str,
    /// A system message before it.
    pub system: Option<&'a str>,
    /// The template's `enable_thinking`, where it is to be set.
    pub thinking: Option<bool>,
    /// What the template's `strftime_now` tells.
    pub today: Date,
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Text")
            .field("vocab_size", &self.vocab_size)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("template", &self.template.as_ref().map(|t| &t.what))
            .finish_non_exhaustive()
    }
}

impl Text {
    /// Loads `tokenizer.json` and, where they exist, `tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.jinja` and `chat_template.json`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::BadFile`] when a file is missing, too long or damaged;
    /// [`Error::Template`] when the template is too long or none of several is the default.
    pub fn load(dir: &Path) -> Result<Self> {
        let (_, bytes) = read_small(dir, TOKENIZER, MAX_TOKENIZER)?.ok_or_else(|| {
            Error::bad(
                dir.join(TOKENIZER),
                "file",
                "it does not exist; a model directory needs a tokenizer in Hugging Face's format",
            )
        })?;
        let config = read_object(dir, "tokenizer_config.json")?;
        let map = read_object(dir, "special_tokens_map.json")?;

        let template = find_template(dir, &config)?;
        Self::new(dir, &bytes, &config, &map, template)
    }

    /// A tokenizer that is part of the program, without a chat template; `name` stands for its
    /// directory in messages.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn embedded(name: &Path, tokenizer: &[u8], config: &[u8]) -> Result<Self> {
        let config = parse_object(&name.join("tokenizer_config.json"), config)?;
        Self::new(name, tokenizer, &config, &Map::new(), None)
    }

    fn new(
        dir: &Path,
        bytes: &[u8],
        config: &Map<String, Value>,
        map: &Map<String, Value>,
        template: Option<Template>,
    ) -> Result<Self> {
        let path = dir.join(TOKENIZER);
        check_values(&path, bytes)?;
        let mut tokenizer = caught(|| Tokenizer::from_bytes(bytes))
            .ok_or_else(|| Error::bad(&path, "contents", GAVE_UP))?
            .map_err(|e| Error::bad(&path, "contents", shortened(&e)))?;
        check_growth(&path, &tokenizer)?;
        without_dropout(&mut tokenizer);
        tokenizer
            .with_truncation(None)
            .map_err(|e| Error::bad(&path, "truncation", shortened(&e)))?;
        tokenizer.with_padding(None);
        add_declared_tokens(&mut tokenizer, config).map_err(|e| {
            Error::bad(dir.join("tokenizer_config.json"), "added_tokens_decoder", e)
        })?;

        let named = named_tokens(config, map);
        let id = |key: &str| {
            let content = named.get(key)?.as_str()?;
            tokenizer.token_to_id(content)
        };
        let (bos, eos) = (id("bos_token"), id("eos_token").into_iter().collect());
        let vocab = tokenizer.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut sample: Vec<TokenId> = vocab.into_values().filter(|&id| id < 512).collect();
        sample.sort_unstable();
        // A decoder that cannot write some tokens would lose text without a word.
        caught(|| tokenizer.decode(&sample, false))
            .ok_or_else(|| Error::bad(&path, "decoder", GAVE_UP))?
            .map_err(|e| Error::bad(&path, "decoder", shortened(&e)))?;

        let (mut control, mut ordinary) = (Vec::new(), Vec::new());
        let mut control_ids = HashSet::new();
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            let in_model = tokenizer.get_model().token_to_id(&token.content) == Some(id);
            if is_control(&token, in_model) {
                control_ids.insert(id);
                control.push(token.content);
            } else {
                ordinary.push(token);
            }
        }
        control.retain(|content| !content.is_empty());
        control.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        ordinary.sort_by(|a, b| a.content.cmp(&b.content));
        let mut plain = AddedVocabulary::new();
        plain
            .add_tokens(ordinary, tokenizer.get_model(), tokenizer.get_normalizer())
            .map_err(|e| Error::bad(&path, "added_tokens", shortened(&e)))?;

        let unknown = match tokenizer.get_model() {
            ModelWrapper::BPE(bpe) => bpe.get_unk_token().clone(),
            _ => None,
        }
        .or_else(|| Some(named.get("unk_token")?.as_str()?.to_owned()))
        .and_then(|content| tokenizer.token_to_id(&content));

        Ok(Self {
            tokenizer,
            plain,
            control,
            control_ids,
            unknown,
            template,
            renderer: Box::new(template::render),
            named,
            bos,
            eos,
            vocab_size,
        })
    }

    /// The same tokenizer without a chat template.
    #[must_use]
    pub fn without_chat_template(self) -> Self {
        Self {
            template: None,
            ..self
        }
    }

    /// The same tokenizer, whose chat template is rendered in another way.
    #[must_use]
    pub fn with_renderer(
        self,
        renderer: impl Fn(&str, &str, &Value, Date) -> Result<String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            renderer: Box::new(renderer),
            ..self
        }
    }

    /// Tokens of protocol text: added tokens are recognised, none is put before or after.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer's own rules fail on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        let encoding = asked(|| self.tokenizer.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokens of text that a user wrote: `</think>` or `<|im_end|>` in it stay text.
    ///
    /// Added tokens are recognised only where they are ordinary words, that is listed as not special
    /// and part of the model's own vocabulary, and do not look like a tag.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer's own rules fail on the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<TokenId>> {
        let mut ids = Vec::new();
        let mut left = vec![text];
        while let Some(piece) = left.pop() {
            let encoding = self.encode_ordinary(piece)?;
            let unwanted =
                |id: &TokenId| self.control_ids.contains(id) && Some(*id) != self.unknown;
            if piece.chars().nth(1).is_none() || !encoding.get_ids().iter().any(unwanted) {
                ids.extend(encoding.get_ids());
                continue;
            }
            // A vocabulary without merges can find a control token whole: take each one apart.
            let mut cuts: Vec<usize> = encoding
                .get_ids()
                .iter()
                .zip(encoding.get_offsets())
                .filter(|(id, _)| unwanted(id))
                .filter_map(|(_, &(start, end))| {
                    let first = piece.get(start..end)?.chars().next()?;
                    Some(start + first.len_utf8())
                })
                .filter(|cut| *cut < piece.len())
                .collect();
            if cuts.is_empty() {
                let half = piece.chars().count() / 2;
                cuts.extend(piece.char_indices().nth(half).map(|(at, _)| at));
            }
            // Rules of a tokenizer may put a text into another order.
            cuts.sort_unstable();
            cuts.dedup();
            let mut end = piece.len();
            for cut in cuts.into_iter().rev() {
                left.push(&piece[cut..end]);
                end = cut;
            }
            left.push(&piece[..end]);
        }
        Ok(ids)
    }

    /// Tokens of a text that a model is to continue: [`Self::encode_plain`], and around it what
    /// `tokenizer.json` says stands around every input, as in Hugging Face's default encoding.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer's own rules fail on the text.
    pub fn encode_as_input(&self, text: &str) -> Result<Vec<TokenId>> {
        let token = |id| Token::new(id, String::new(), (0, 0));
        let plain = self.encode_plain(text)?.into_iter().map(token).collect();
        let plain = Encoding::from_tokens(plain, 0);
        let whole = asked(|| self.tokenizer.post_process(plain, None, true))?;
        Ok(whole.get_ids().to_vec())
    }

    /// Ids and byte ranges, with the ordinary added tokens only.
    fn encode_ordinary(&self, text: &str) -> Result<Encoding> {
        asked(|| {
            let mut pieces = self
                .plain
                .extract_and_normalize(self.tokenizer.get_normalizer(), text);
            if let Some(rule) = self.tokenizer.get_pre_tokenizer() {
                rule.pre_tokenize(&mut pieces)?;
            }
            let model = self.tokenizer.get_model();
            pieces.tokenize(|piece| model.tokenize(piece.get()))?;
            pieces.into_encoding(None, 0, OffsetType::Byte)
        })
    }

    /// Text of the tokens, special ones included; broken UTF-8 becomes U+FFFD, unknown ids nothing.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let decoded = caught(|| self.tokenizer.decode(ids, false));
        decoded
            .and_then(std::result::Result::ok)
            .unwrap_or_default()
    }

    /// The vocabulary's own string of a token; byte-level vocabularies write a space as `Ġ`.
    pub fn token_str(&self, id: TokenId) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Id of a token by the vocabulary's own string.
    pub fn id_of(&self, token: &str) -> Option<TokenId> {
        self.tokenizer.token_to_id(token)
    }

    /// Ids of all tokens, added ones included, whose own string contains `part`, ascending.
    pub fn ids_containing(&self, part: &str) -> Vec<TokenId> {
        let vocab = self.tokenizer.get_vocab(true);
        let mut ids: Vec<_> = vocab
            .iter()
            .filter(|(token, _)| token.contains(part))
            .map(|(_, &id)| id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// The highest id of the vocabulary, plus one; a model may have more rows, which are padding.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text, where the directory names one.
    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    /// The tokens that end a text; `generation_config.json` may name more.
    pub fn eos(&self) -> &[TokenId] {
        &self.eos
    }

    /// Whether the id is an added token that steers a model.
    pub fn is_control(&self, id: TokenId) -> bool {
        self.control_ids.contains(&id)
    }

    /// Whether the directory has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether the model writes its thoughts between `<think>` and `</think>`: its vocabulary has the
    /// tag, or its chat template speaks of it.
    pub fn knows_thoughts(&self) -> bool {
        let told = |template: &Template| template.source.contains("<think>");
        self.id_of("<think>").is_some() || self.template.as_ref().is_some_and(told)
    }

    /// A prompt that holds one user message and asks for the assistant's turn.
    ///
    /// # Errors
    /// [`Error::Template`] when there is no template or it fails, [`Error::Limit`] when the message
    /// is too long, [`Error::Tokenizer`] when the tokenizer refuses the text.
    pub fn render_chat(&self, chat: &Chat<'_>) -> Result<Prompt> {
        let template = self.template.as_ref().ok_or_else(|| Error::Template {
            what: "chat template".to_owned(),
            problem: "the model directory has none; give the prompt as plain text".to_owned(),
        })?;
        let mut marks = Marks::new(&template.source, chat);
        let mut messages = Vec::new();
        if let Some(system) = chat.system {
            messages.push(json!({"role": "system", "content": self.mark(system, &mut marks)?}));
        }
        messages.push(json!({"role": "user", "content": self.mark(chat.user, &mut marks)?}));

        let mut context = self.named.clone();
        context.insert("messages".to_owned(), Value::Array(messages));
        context.insert("add_generation_prompt".to_owned(), Value::Bool(true));
        context.insert("tools".to_owned(), Value::Null);
        context.insert("documents".to_owned(), Value::Null);
        if let Some(thinking) = chat.thinking {
            context.insert("enable_thinking".to_owned(), Value::Bool(thinking));
        }
        let context = Value::Object(context);
        let marked = (self.renderer)(&template.what, &template.source, &context, chat.today)?;
        Ok(Prompt { marked, marks })
    }

    /// Tokens of a rendered prompt and of protocol text after it.
    ///
    /// Whatever the user's message holds, no control token comes from it. A message that names none gets
    /// exactly the tokens of the whole text. A template that takes a message apart and puts it together
    /// anew could still form one; published templates do not.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses the text.
    pub fn encode_chat(&self, prompt: &Prompt, suffix: &str) -> Result<Vec<TokenId>> {
        let whole = format!("{}{suffix}", prompt.marked);
        let (mut ids, mut from) = (Vec::new(), 0);
        for (at, marker, text) in prompt.marks.found_in(&prompt.marked) {
            if at > from {
                ids.extend(self.encode(&whole[from..at])?);
            }
            ids.extend(self.encode_plain(text)?);
            from = at + marker.len_utf8();
        }
        if from < whole.len() {
            ids.extend(self.encode(&whole[from..])?);
        }
        Ok(ids)
    }

    /// The text with every stretch that would become a control token replaced by a marker.
    fn mark(&self, text: &str, marks: &mut Marks) -> Result<String> {
        if text.len() > MAX_USER_TEXT {
            return Err(Error::Limit {
                what: "a message".to_owned(),
                need: format!("{} bytes", text.len()),
                have: format!("room for {MAX_USER_TEXT}"),
                advice: "shorten the problem".to_owned(),
            });
        }
        let mut spans: Vec<(usize, usize)> = Vec::new();
        for content in &self.control {
            spans.extend(
                text.match_indices(content.as_str())
                    .map(|(at, m)| (at, at + m.len())),
            );
        }
        // Normalisation and stripping find more than the plain search.
        let encoding = asked(|| self.tokenizer.encode(text, false))?;
        for (id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            if self.control_ids.contains(id) && Some(*id) != self.unknown && start < end {
                // Trimming of white space may leave an offset within a character.
                let start = text.floor_char_boundary(start);
                spans.push((start, text.ceil_char_boundary(end)));
            }
        }
        spans.sort_unstable();
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        let mut spans = spans.into_iter().peekable();
        while let Some((start, mut end)) = spans.next() {
            while let Some((_, e)) = spans.next_if(|&(s, _)| s < end) {
                end = end.max(e);
            }
            out.push_str(&text[at..start]);
            out.push(marks.marker(&text[start..end])?);
            at = end;
        }
        out.push_str(&text[at..]);
        Ok(out)
    }
}

/// Whether an added token steers a model, so that users must not be able to write it.
///
/// Qwen lists `</think>` as not special, but not in the model's own vocabulary; small and older
/// vocabularies list ordinary words and blank lines as added tokens of their own.
fn is_control(token: &AddedToken, in_model: bool) -> bool {
    let c = token.content.as_str();
    let tag = (c.starts_with('<') && c.ends_with('>')) || (c.starts_with('[') && c.ends_with(']'));
    token.special || !in_model || tag
}

/// A rendered chat: text of the protocol in which the user's words steer nothing.
#[derive(Debug)]
pub struct Prompt {
    /// The text, with a marker for every stretch of the user's that would be a control token.
    marked: String,
    marks: Marks,
}

impl Prompt {
    /// Whether the template itself ended the prompt with this, white space aside.
    pub fn ends_with(&self, protocol: &str) -> bool {
        self.marked.trim_end().ends_with(protocol)
    }
}

/// Characters that stand for marked stretches of user text while a template renders.
#[derive(Debug)]
struct Marks {
    taken: HashSet<char>,
    next: u32,
    marked: Vec<(char, String)>,
}

impl Marks {
    const FIRST: u32 = 0xF_0000;
    const LAST: u32 = 0x10_FFFD;

    fn new(template: &str, chat: &Chat<'_>) -> Self {
        let texts = [template, chat.user, chat.system.unwrap_or("")];
        let taken = texts
            .iter()
            .flat_map(|text| text.chars())
            .filter(|&c| u32::from(c) >= Self::FIRST)
            .collect();
        Self {
            taken,
            next: Self::FIRST,
            marked: Vec::new(),
        }
    }

    /// A private-use character that occurs nowhere else, the same one for the same text.
    fn marker(&mut self, text: &str) -> Result<char> {
        if let Some((c, _)) = self.marked.iter().find(|(_, t)| t == text) {
            return Ok(*c);
        }
        while self.next <= Self::LAST {
            let c = char::from_u32(self.next);
            self.next += 1;
            match c {
                Some(c) if !self.taken.contains(&c) && self.next & 0xFFFF < 0xFFFE => {
                    self.marked.push((c, text.to_owned()));
                    return Ok(c);
                }
                _ => {}
            }
        }
        Err(Error::Tokenizer(
            "the message uses up every private-use character; remove them".to_owned(),
        ))
    }

    /// Every marker of a text: where it is, the marker, what it stands for.
    fn found_in<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, char, &'a str)> {
        let marks = text
            .char_indices()
            .filter(|&(_, c)| u32::from(c) >= Self::FIRST);
        marks.filter_map(|(at, c)| {
            let (_, marked) = self.marked.iter().find(|(marker, _)| *marker == c)?;
            Some((at, c, marked.as_str()))
        })
    }
}

/// Asks the tokenizer library, which panics on some files that it has read without complaint.
fn asked<T>(call: impl FnOnce() -> std::result::Result<T, tokenizers::Error>) -> Result<T> {
    match caught(call) {
        Some(answer) => answer.map_err(|e| Error::Tokenizer(shortened(&e))),
        None => Err(Error::Tokenizer(GAVE_UP.to_owned())),
    }
}

/// Refuses a file whose values would take more memory or time than any vocabulary needs, before they do.
fn check_values(path: &Path, bytes: &[u8]) -> Result<()> {
    let (mut values, mut longest) = (0, 0);
    let mut opened: Option<usize> = None;
    let mut escaped = false;
    for (at, byte) in bytes.iter().enumerate() {
        match (opened, byte) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), b'\\') => escaped = true,
            (Some(from), b'"') => {
                longest = longest.max(at - from);
                opened = None;
            }
            (None, b'"') => opened = Some(at),
            (None, b',' | b'[' | b'{') => values += 1,
            _ => {}
        }
    }
    let problem = if values > MAX_VALUES {
        format!("more than {MAX_VALUES} values; no published file comes near")
    } else if longest > MAX_STRING {
        format!("a text of {longest} bytes; {MAX_STRING} are accepted")
    } else {
        return Ok(());
    };
    Err(Error::bad(path, "contents", problem))
}

/// What a library says, which may repeat a whole file.
fn shortened(message: &impl fmt::Display) -> String {
    let message = message.to_string();
    let end = message.floor_char_boundary(300);
    message[..end].replace(char::is_control, " ")
}

/// Refuses rules that could make a short text endless.
fn check_growth(path: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let rules = [
        ("normalizer", tokenizer.get_normalizer().map(json_of)),
        ("decoder", tokenizer.get_decoder().map(json_of)),
    ];
    for (field, rule) in rules {
        if growth(&rule.unwrap_or_default()).is_none_or(|times| times > MAX_GROWTH) {
            let problem = format!(
                "it replaces nothing by something, or makes a text more than {MAX_GROWTH} times longer"
            );
            return Err(Error::bad(path, field, problem));
        }
    }
    Ok(())
}

/// A rule of the tokenizer as its file has it; none that was read from JSON fails to become JSON.
fn json_of(rule: &impl serde::Serialize) -> Value {
    serde_json::to_value(rule).unwrap_or_default()
}

/// How many times longer a rule can make a text by what it writes; `None` without a bound.
fn growth(rule: &Value) -> Option<usize> {
    let parts = rule.get("normalizers").or_else(|| rule.get("decoders"));
    if let Some(Value::Array(parts)) = parts {
        let times = |all: usize, part| all.checked_mul(growth(part)?);
        return parts.iter().try_fold(1, times);
    }
    let len = |key: &str| Some(rule.get(key)?.as_str()?.len());
    if let Some(before) = len("prepend") {
        return Some(1 + before);
    }
    let Some(pattern) = rule.get("pattern") else {
        return Some(1);
    };
    let content = len("content").unwrap_or(0);
    match pattern.get("String").and_then(Value::as_str) {
        Some("") => None,
        Some(text) => Some(content.div_ceil(text.len()).max(1)),
        // A regular expression may match between any two characters.
        None => Some(1 + content),
    }
}

/// Dropout of merges belongs to training: the same text has the same tokens here.
fn without_dropout(tokenizer: &mut Tokenizer) {
    if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
        && bpe.dropout.is_some()
    {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        tokenizer.with_model(bpe);
    }
}

fn read_object(dir: &Path, name: &str) -> Result<Map<String, Value>> {
    match read_small(dir, name, MAX_CONFIG)? {
        Some((path, bytes)) => parse_object(&path, &bytes),
        None => Ok(Map::new()),
    }
}

fn parse_object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::bad(path, "contents", "it is not a JSON object")),
        Err(e) => Err(Error::bad(path, "contents", shortened(&e))),
    }
}

/// Adds the tokens that only `tokenizer_config.json` lists, as `transformers` does.
fn add_declared_tokens(
    tokenizer: &mut Tokenizer,
    config: &Map<String, Value>,
) -> Result<(), String> {
    let Some(Value::Object(declared)) = config.get("added_tokens_decoder") else {
        return Ok(());
    };
    let known: HashSet<String> = tokenizer
        .get_added_tokens_decoder()
        .into_values()
        .map(|token| token.content)
        .collect();
    let mut missing = Vec::new();
    for (id, token) in declared {
        let id: TokenId = id
            .parse()
            .map_err(|_| format!("'{}' is no token id", shortened(id)))?;
        let token: AddedToken = serde_json::from_value(token.clone())
            .map_err(|e| format!("token {id}: {}", shortened(&e)))?;
        if !known.contains(&token.content) {
            missing.push((id, token));
        }
    }
    missing.sort_by_key(|(id, _)| *id);
    let missing = missing.into_iter().map(|(_, token)| token);
    tokenizer.add_tokens(missing).map_err(|e| e.to_string())?;
    Ok(())
}

/// Every `*_token` of the two files, by name, as the template sees it.
fn named_tokens(config: &Map<String, Value>, map: &Map<String, Value>) -> Map<String, Value> {
    let mut named = Map::new();
    for (key, value) in config.iter().chain(map) {
        if !key.ends_with("_token") || named.contains_key(key) {
            continue;
        }
        let content = value.as_str().or_else(|| value.get("content")?.as_str());
        if let Some(content) = content {
            named.insert(key.clone(), Value::from(content));
        }
    }
    named
}

fn find_template(dir: &Path, config: &Map<String, Value>) -> Result<Option<Template>> {
    let found = if let Some((path, bytes)) = read_small(dir, "chat_template.jinja", MAX_CONFIG)? {
        let source = String::from_utf8(bytes)
            .map_err(|_| Error::bad(&path, "contents", "it is not UTF-8"))?;
        Some((path, source))
    } else {
        let path = dir.join("chat_template.json");
        let own = read_object(dir, "chat_template.json")?;
        if own.contains_key("chat_template") {
            pick_template(&path, &own)?.map(|source| (path, source))
        } else {
            let path = dir.join("tokenizer_config.json");
            pick_template(&path, config)?.map(|source| (path, source))
        }
    };
    let Some((path, source)) = found else {
        return Ok(None);
    };
    let what = path.display().to_string();
    if source.len() > template::MAX_SOURCE {
        return Err(Error::Template {
            what,
            problem: format!(
                "the template has {} bytes; at most {} are accepted",
                source.len(),
                template::MAX_SOURCE
            ),
        });
    }
    Ok(Some(Template { what, source }))
}

/// A `chat_template` key: one text, or a list of named ones, of which the default is meant.
fn pick_template(path: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    let list = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => return Ok(Some(source.clone())),
        Some(Value::Array(list)) => list,
        Some(_) => {
            let problem = "it is neither a text nor a list of named texts";
            return Err(Error::bad(path, "chat_template", problem));
        }
    };
    let named: Vec<(&str, &str)> = list
        .iter()
        .filter_map(|entry| {
            Some((
                entry.get("name")?.as_str()?,
                entry.get("template")?.as_str()?,
            ))
        })
        .collect();
    let default = named.iter().find(|(name, _)| *name == "default");
    match (default, named.as_slice()) {
        (Some((_, source)), _) | (None, [(_, source)]) => Ok(Some((*source).to_owned())),
        (None, []) => Ok(None),
        (None, _) => {
            let names: Vec<_> = named.iter().map(|(name, _)| *name).collect();
            Err(Error::Template {
                what: path.display().to_string(),
                problem: format!(
                    "none of the templates {} is named 'default'",
                    names.join(", ")
                ),
            })
        }
    }
}

/// Incremental decoding of one worker's tokens: it emits whole characters only.
///
/// The state is owned, so that many streams share one [`Text`].
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// The tokens of the last emission: some decoders treat a first token differently.
    before: Vec<TokenId>,
    /// Tokens that are not emitted yet.
    pending: Vec<TokenId>,
}

impl Stream {
    /// Tokens of broken UTF-8 that are kept back; no character takes more than four.
    const PATIENCE: usize = 32;

    /// A stream at the start of a text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token; gives the text that is complete with it.
    pub fn push(&mut self, text: &Text, token: TokenId) -> Option<String> {
        self.pending.push(token);
        let new = self.new_text(text);
        if new.is_empty() || (new.ends_with('\u{FFFD}') && self.pending.len() < Self::PATIENCE) {
            return None;
        }
        self.before = std::mem::take(&mut self.pending);
        if new.ends_with('\u{FFFD}') {
            self.before.clear();
        }
        Some(new)
    }

    /// Gives what is left, broken characters as U+FFFD, and starts anew.
    pub fn flush(&mut self, text: &Text) -> Option<String> {
        let new = self.new_text(text);
        *self = Self::new();
        (!new.is_empty()).then_some(new)
    }

    fn new_text(&self, text: &Text) -> String {
        let all: Vec<TokenId> = self.before.iter().chain(&self.pending).copied().collect();
        let all = text.decode(&all);
        match all.strip_prefix(&text.decode(&self.before)) {
            Some(new) => new.to_owned(),
            None => text.decode(&self.pending),
        }
    }
}
