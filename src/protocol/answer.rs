//! Finds the answer in a text: the rightmost box that holds one, or the last program.
//!
//! The published rule takes what stands between `\boxed{` and the next `}`; braces are not matched.
//! Invariant: the rightmost acceptable candidate wins, whatever stands after it.

use std::fmt;

use super::step_end::python_strip;

const BOX: &str = "\\boxed{";
const FENCE: &str = "```";
const PYTHON: &str = "```python";

/// What counts as an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerKind {
    /// A box that Python's `float` accepts, for ASCII digits.
    Number,
    /// A box with at least one ASCII digit; the answer is its digits (LIMO's rule).
    Digits,
    /// A box that is not empty, with its braces matched.
    Balanced,
    /// The last fenced Python program that may compile.
    ///
    /// Compiling is approximated: brackets match, strings are closed.
    Code,
}

/// An answer's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number, perhaps not a finite one.
    Number(f64),
    /// Digits without leading zeros.
    Digits(String),
    /// The text of the box.
    Text(String),
    /// The program.
    Code(String),
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// What comparisons take.
    pub value: Value,
    /// What to show: the box with its braces matched, or the program.
    pub text: String,
}

impl fmt::Display for Value {
    /// As Python prints the value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(x) if x.is_nan() => f.write_str("nan"),
            Self::Number(x) => {
                let text = format!("{x:?}");
                match text.split_once('e') {
                    None => f.write_str(&text),
                    Some((digits, exponent)) => {
                        let (sign, exponent) = match exponent.strip_prefix('-') {
                            Some(exponent) => ('-', exponent),
                            None => ('+', exponent),
                        };
                        let digits = digits.strip_suffix(".0").unwrap_or(digits);
                        write!(f, "{digits}e{sign}{exponent:0>2}")
                    }
                }
            }
            Self::Digits(s) | Self::Text(s) | Self::Code(s) => f.write_str(s),
        }
    }
}

/// The answer that a text holds.
pub fn find_answer(kind: AnswerKind, text: &str) -> Option<Answer> {
    if kind == AnswerKind::Code {
        return find_code(text);
    }
    text.rmatch_indices(BOX).find_map(|(at, _)| {
        let inside = &text[at + BOX.len()..];
        let short = inside.split_once('}').map(|(short, _)| short);
        let balanced = balanced(inside);
        let value = match kind {
            AnswerKind::Number => Value::Number(python_float(short?)?),
            AnswerKind::Digits => Value::Digits(digits(short?)?),
            AnswerKind::Balanced => {
                let whole = python_strip(balanced?);
                (!whole.is_empty()).then(|| Value::Text(whole.to_owned()))?
            }
            AnswerKind::Code => return None,
        };
        let text = python_strip(balanced.or(short)?).to_owned();
        Some(Answer { value, text })
    })
}

/// The text up to the brace that closes the box.
fn balanced(inside: &str) -> Option<&str> {
    let mut depth = 0_usize;
    let mut escaped = false;
    for (at, c) in inside.char_indices() {
        if escaped {
            escaped = false;
        } else {
            match c {
                '\\' => escaped = true,
                '{' => depth += 1,
                '}' if depth == 0 => return Some(&inside[..at]),
                '}' => depth -= 1,
                _ => {}
            }
        }
    }
    None
}

fn digits(text: &str) -> Option<String> {
    let all: String = text.chars().filter(char::is_ascii_digit).collect();
    let short = all.trim_start_matches('0');
    match (all.is_empty(), short.is_empty()) {
        (true, _) => None,
        (false, true) => Some("0".to_owned()),
        (false, false) => Some(short.to_owned()),
    }
}

/// Python's `float(text)`, for ASCII digits.
pub(crate) fn python_float(text: &str) -> Option<f64> {
    let text = python_strip(text);
    let bytes = text.as_bytes();
    let digit = |at: Option<usize>| {
        at.and_then(|at| bytes.get(at))
            .is_some_and(u8::is_ascii_digit)
    };
    let lone =
        |(at, b): (usize, &u8)| *b == b'_' && !(digit(at.checked_sub(1)) && digit(Some(at + 1)));
    if bytes.iter().enumerate().any(lone) {
        return None;
    }
    // What is left of Python's grammar is Rust's: sign, digits, point, exponent, inf, nan.
    text.replace('_', "").parse().ok()
}

fn find_code(text: &str) -> Option<Answer> {
    text.rmatch_indices(PYTHON).find_map(|(at, _)| {
        let (code, _) = text[at + PYTHON.len()..].split_once(FENCE)?;
        let sound = !python_strip(code).is_empty() && may_compile(code);
        sound.then(|| Answer {
            value: Value::Code(code.to_owned()),
            text: code.trim().to_owned(),
        })
    })
}

/// Whether brackets match and strings are closed.
fn may_compile(code: &str) -> bool {
    let mut open = Vec::new();
    let mut rest = code;
    while let Some(c) = rest.chars().next() {
        let mut len = c.len_utf8();
        match c {
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' if open.pop() != Some(c) => return false,
            '#' => len = rest.find('\n').unwrap_or(rest.len()),
            '\'' | '"' => match string_len(rest, c) {
                Some(string) => len = string,
                None => return false,
            },
            _ => {}
        }
        rest = &rest[len..];
    }
    open.is_empty()
}

/// Length of the Python string that begins here, if it is closed.
fn string_len(rest: &str, quote: char) -> Option<usize> {
    let triple: String = [quote; 3].iter().collect();
    let (start, end) = if rest.starts_with(&triple) {
        (3, triple.as_str())
    } else {
        (1, &triple[..1])
    };
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(start) {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if rest[at..].starts_with(end) {
            return Some(at + end.len());
        } else if c == '\n' && end.len() == 1 {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{AnswerKind, Value, find_answer, python_float};

    #[test]
    fn numbers_are_those_that_python_accepts() {
        for (text, want) in [
            (" 7 ", Some(7.0)),
            ("1_000.5", Some(1000.5)),
            ("+.5e-1", Some(0.05)),
            ("5.", Some(5.0)),
            ("-Infinity", Some(f64::NEG_INFINITY)),
            ("1__0", None),
            ("_1", None),
            ("1_", None),
            ("0x10", None),
            ("1 2", None),
            ("e5", None),
            (".", None),
            ("", None),
        ] {
            assert_eq!(python_float(text), want, "{text:?}");
        }
        assert!(python_float("nan").is_some_and(f64::is_nan), "not a number");
    }

    #[test]
    fn numbers_print_as_in_python() {
        for (x, want) in [
            (42.0, "42.0"),
            (1e16, "1e+16"),
            (1e22, "1e+22"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (-0.0, "-0.0"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(Value::Number(x).to_string(), want, "repr");
        }
    }

    #[test]
    fn what_is_shown_has_its_braces_matched() {
        let text = "so \\boxed{\\frac{1}{2}} it is";
        let answer = find_answer(AnswerKind::Balanced, text).expect("a box");
        assert_eq!(answer.text, "\\frac{1}{2}", "the whole box");
        let answer = find_answer(AnswerKind::Digits, text).expect("a digit");
        assert_eq!(answer.value, Value::Digits("1".to_owned()), "LIMO's rule");
        assert_eq!(answer.text, "\\frac{1}{2}", "the whole box");
        assert_eq!(find_answer(AnswerKind::Number, text), None, "no number");
        assert_eq!(
            find_answer(AnswerKind::Balanced, "\\boxed{ }"),
            None,
            "empty"
        );
    }
}
