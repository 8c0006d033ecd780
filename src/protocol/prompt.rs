//! The prompt that explains the game: a text file with placeholders.
//!
//! A placeholder is a name in braces. Other braces are text, `{{name}}` is the text `{name}`. After a
//! line [`OPENING`] follow the workers' opening words, a line for each; the last one is for all others.
//! Invariant: a value is never searched for placeholders, so a problem may hold braces.

use super::names::enumerate_names;
use super::rules::{JOINING_WORDS, OPENING_WORDS, PAST_STEPS, Rules, step_prefix};
use crate::{Error, Result};

/// Longest prompt file, in bytes.
pub const MAX_STYLE: usize = 64 << 10;

/// The line after which a prompt file lists opening words.
pub const OPENING: &str = "--- opening words ---";

const PLACEHOLDERS: [&str; 9] = [
    "names",
    "n_workers",
    "first",
    "last",
    "past_steps",
    "others_header",
    "own_header",
    "final_answer",
    "problem",
];

/// A prompt file, read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptStyle {
    source: String,
    /// What each worker says first, after its step prefix; the last one is for all others.
    opening: Vec<String>,
}

impl Default for PromptStyle {
    fn default() -> Self {
        Self {
            source: include_str!("prompts/default.txt").to_owned(),
            opening: [OPENING_WORDS, JOINING_WORDS].map(str::to_owned).to_vec(),
        }
    }
}

enum Piece<'a> {
    Text(&'a str),
    Name(&'a str),
}

impl PromptStyle {
    /// Checks a prompt file's text; `what` names it in errors.
    ///
    /// Placeholders: `{names}`, `{n_workers}`, `{first}` and `{last}` (names), `{past_steps}`,
    /// `{others_header}` and `{own_header}` (titles), `{final_answer}` (a paragraph that the rules may
    /// leave out), `{problem}`, which must occur. Opening words have `{name}` alone; a file without them
    /// has those of the published versions.
    ///
    /// # Errors
    /// [`Error::Template`] when it is too long, names an unknown placeholder or lacks `{problem}`.
    pub fn parse(what: &str, source: &str) -> Result<Self> {
        let fail = |problem: String| {
            Err(Error::Template {
                what: what.to_owned(),
                problem,
            })
        };
        if source.len() > MAX_STYLE {
            return fail(format!(
                "{} bytes; a prompt file may have {MAX_STYLE}",
                source.len()
            ));
        }
        let (source, opening) = match split_opening(source) {
            Some((source, lines)) => (source, opening(lines)),
            None => (source, Self::default().opening),
        };
        for words in &opening {
            for piece in pieces(words) {
                if let Piece::Name(name) = piece
                    && name != "name"
                {
                    return fail(format!(
                        "unknown placeholder {{{name}}} in opening words; there is {{name}}"
                    ));
                }
            }
        }
        let mut has_problem = false;
        for piece in pieces(source) {
            if let Piece::Name(name) = piece {
                if !PLACEHOLDERS.contains(&name) {
                    return fail(format!(
                        "unknown placeholder {{{name}}}; there are {}; write {{{{{name}}}}} for the text",
                        PLACEHOLDERS.map(|p| format!("{{{p}}}")).join(", ")
                    ));
                }
                has_problem |= name == "problem";
            }
        }
        if !has_problem {
            return fail("it lacks {problem}: nobody would know what to solve".to_owned());
        }
        Ok(Self {
            source: source.to_owned(),
            opening,
        })
    }

    /// What the worker of this index says first, after its step prefix, with `{name}` for its name.
    pub fn opening(&self, worker: usize) -> &str {
        let last = self.joining();
        self.opening.get(worker).map_or(last, String::as_str)
    }

    /// The same for a worker who joins later.
    pub fn joining(&self) -> &str {
        self.opening.last().map_or("", String::as_str)
    }

    /// The prompt for these workers and this problem, without a trailing line break.
    pub fn fill<S: AsRef<str>>(&self, rules: &Rules, names: &[S], problem: &str) -> String {
        let title = |header: &str| header.trim().lines().last().unwrap_or("").to_owned();
        let name = |at: Option<&S>| at.map_or(String::new(), |name| name.as_ref().to_owned());
        let final_answer = if rules.final_answer {
            include_str!("prompts/final_answer.txt")
        } else {
            ""
        };
        let mut out = String::with_capacity(self.source.len() + problem.len());
        for piece in pieces(self.source.trim_end()) {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Name("names") => out.push_str(&enumerate_names(names)),
                Piece::Name("n_workers") => out.push_str(&names.len().to_string()),
                Piece::Name("first") => out.push_str(&name(names.first())),
                Piece::Name("last") => out.push_str(&name(names.last())),
                Piece::Name("past_steps") => out.push_str(PAST_STEPS),
                Piece::Name("others_header") => out.push_str(&title(&rules.header_others)),
                Piece::Name("own_header") => out.push_str(&title(&rules.header_own)),
                Piece::Name("final_answer") => out.push_str(final_answer),
                Piece::Name(_) => out.push_str(problem),
            }
        }
        out
    }
}

/// The prompt, and the lines after the line [`OPENING`], if there is one.
fn split_opening(source: &str) -> Option<(&str, &str)> {
    let mut at = 0;
    for line in source.split_inclusive('\n') {
        if line.trim_end() == OPENING {
            return Some((&source[..at], &source[at + line.len()..]));
        }
        at += line.len();
    }
    None
}

/// One entry for each line; nothing at all is one empty line, so only the prefix is said.
fn opening(lines: &str) -> Vec<String> {
    let lines = lines.trim_end_matches(['\r', '\n']).lines();
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    if lines.is_empty() {
        vec![String::new()]
    } else {
        lines
    }
}

/// A worker's first words: `template` with its name, after its step prefix.
pub fn opening_words(name: &str, template: &str) -> String {
    let mut out = step_prefix(name, 1);
    for piece in pieces(template) {
        out.push_str(match piece {
            Piece::Text(text) => text,
            Piece::Name(_) => name,
        });
    }
    out
}

/// Text and placeholders in order.
fn pieces(source: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = source;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let name_at = |at: usize| -> Option<&str> {
            let inside = rest.get(at..)?.strip_prefix('{')?;
            let (name, _) = inside.split_once('}')?;
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            (name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(word))
                .then_some(name)
        };
        if let Some(name) = name_at(0) {
            rest = &rest[name.len() + 2..];
            return Some(Piece::Name(name));
        }
        if let Some(name) = name_at(1).filter(|_| rest.starts_with("{{")) {
            let doubled = rest[name.len() + 3..].starts_with('}');
            if doubled {
                let text = &rest[1..name.len() + 3];
                rest = &rest[name.len() + 4..];
                return Some(Piece::Text(text));
            }
        }
        let first = rest.chars().next().map_or(1, char::len_utf8);
        let len = rest[first..].find('{').map_or(rest.len(), |at| first + at);
        let (text, more) = rest.split_at(len);
        rest = more;
        Some(Piece::Text(text))
    })
}

#[cfg(test)]
mod tests {
    use super::{MAX_STYLE, PromptStyle, opening_words};
    use crate::Result;
    use crate::protocol::{Rules, default_names};

    #[test]
    fn placeholders_are_filled_once() -> Result<()> {
        let style = PromptStyle::parse(
            "mine",
            "é{names} {n_workers} {first}/{last} {others_header} {own_header} {{names}} \\boxed{1} \
             {final_answer}|{problem}\n",
        )?;
        let got = style.fill(&Rules::fast(), &default_names(2), "what is {names}?");
        assert_eq!(
            got,
            "éAlice and Bob 2 Alice/Bob ### Work in progress (others) ### Work in progress (own) \
             {names} \\boxed{1} |what is {names}?",
            "the problem is not searched"
        );
        Ok(())
    }

    #[test]
    fn opening_words_are_part_of_the_file() -> Result<()> {
        let first = |source: &str, worker| -> Result<String> {
            let style = PromptStyle::parse("mine", source)?;
            assert_eq!(
                style.fill(&Rules::main(), &["A"], "7"),
                "7",
                "only the prompt"
            );
            Ok(opening_words("Bob", style.opening(worker)))
        };
        let two = "{problem}\n\n--- opening words ---\nI, {name}, begin.\n{name} here.\n";
        assert_eq!(first(two, 0)?, "**Bob [1]:** I, Bob, begin.");
        assert_eq!(first(two, 1)?, "**Bob [1]:** Bob here.");
        assert_eq!(
            first(two, 5)?,
            "**Bob [1]:** Bob here.",
            "the last line is for the others"
        );
        assert_eq!(
            first("{problem}\n--- opening words ---\n", 0)?,
            "**Bob [1]:** "
        );
        assert_eq!(
            first("{problem}", 0)?,
            "**Bob [1]:** Hi, I'm Bob. Here's how we can",
            "a file without them has the published ones"
        );
        assert_eq!(first("{problem}", 1)?, "**Bob [1]:** Hi, I'm Bob.");
        Ok(())
    }

    #[test]
    fn unsound_prompt_files_are_refused() {
        for (source, word) in [
            ("{problem} {nmaes}", "{nmaes}"),
            ("nothing", "{problem}"),
            ("{problem}\n--- opening words ---\n{problem}", "{problem}"),
            ("{{problem}}", "{problem}"),
            (&"x".repeat(MAX_STYLE + 1), "bytes"),
        ] {
            let e = PromptStyle::parse("file.txt", source).expect_err("unsound");
            assert!(e.to_string().contains(word), "{e}");
            assert!(e.to_string().contains("file.txt"), "{e}");
        }
    }

    #[test]
    fn the_default_prompt_is_sound() -> Result<()> {
        let style = PromptStyle::default();
        PromptStyle::parse("default.txt", &style.source)?;
        for n in [1, 2, 16] {
            let text = style.fill(&Rules::main(), &default_names(n), "1 + 1?");
            assert!(text.ends_with("1 + 1?"), "the problem comes last: {text}");
            assert!(text.contains("### Past steps"), "titles are explained");
            assert!(text.contains("may write it in a box"), "anyone may answer");
        }
        let text = style.fill(&Rules::fast(), &default_names(2), "1 + 1?");
        assert!(!text.contains("may write it in a box"), "left out");
        Ok(())
    }
}
