//! The prompt that explains the game: a text file with placeholders.
//!
//! A placeholder is a name in braces. Other braces are text, `{{name}}` is the text `{name}`.
//! Invariant: a value is never searched for placeholders, so a problem may hold braces.

use super::names::enumerate_names;
use super::rules::{PAST_STEPS, Rules};
use crate::{Error, Result};

/// Longest prompt file, in bytes.
pub const MAX_STYLE: usize = 64 << 10;

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
}

impl Default for PromptStyle {
    fn default() -> Self {
        Self {
            source: include_str!("prompts/default.txt").to_owned(),
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
    /// leave out), `{problem}`, which must occur.
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
        })
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
    use super::{MAX_STYLE, PromptStyle};
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
    fn unsound_prompt_files_are_refused() {
        for (source, word) in [
            ("{problem} {nmaes}", "{nmaes}"),
            ("nothing", "{problem}"),
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
