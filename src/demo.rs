//! The built-in model, and its problems: lists of sums, posed, read and checked.
//!
//! The model was trained on this kind of problem and no other (`examples/demo_model/`): 2 to 9 sums of
//! unequal length, `a) 20+8+9; b) 41+4; …`, each of a number from 10 to 45 and one to six digits, each with
//! a result of two digits. Invariant: a [`Problem`] is one that the model was trained for.

use std::path::Path;

use crate::model::ModelFiles;
use crate::protocol::{AnswerKind, PromptStyle, Rules};
use crate::sampler::philox;
use crate::text::Text;
use crate::{Error, Result};

/// What stands for the built-in model's directory in messages and logs.
pub const NAME: &str = "(built-in)";

/// Most workers that the built-in model was trained for.
pub const MAX_WORKERS: usize = 4;

/// The built-in model.
///
/// # Errors
/// Never: a test loads it.
pub fn files() -> Result<ModelFiles> {
    ModelFiles::embedded(
        Path::new(NAME),
        include_bytes!("../examples/demo_model/model/config.json"),
        include_bytes!("../examples/demo_model/model/generation_config.json"),
        include_bytes!("../examples/demo_model/model/model.safetensors"),
    )
}

/// Its tokenizer.
///
/// # Errors
/// Never: a test loads it.
pub fn text() -> Result<Text> {
    Text::embedded(
        Path::new(NAME),
        include_bytes!("../examples/demo_model/model/tokenizer.json"),
        include_bytes!("../examples/demo_model/model/tokenizer_config.json"),
    )
}

/// Its prompt and opening words.
///
/// # Errors
/// Never: a test reads it.
pub fn style() -> Result<PromptStyle> {
    PromptStyle::parse(
        NAME,
        include_str!("../examples/demo_model/model/prompt.txt"),
    )
}

/// The rules it was trained under: those of `main`, with no questions, and any text in the box.
pub fn rules() -> Rules {
    Rules {
        check_every: 1_000_000,
        answer: AnswerKind::Balanced,
        ..Rules::main()
    }
}

/// Labels of the sums, in order.
pub const LABELS: [char; 9] = ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'];

/// An example of a problem, for messages.
pub const EXAMPLE: &str = "a) 20+8+9; b) 41+4; c) 13+5+6+2; d) 17+9";

/// Fewest sums of a problem.
const FEWEST: usize = 2;
/// The first number of a sum.
const FIRST: std::ops::RangeInclusive<u32> = 10..=45;
/// Most digits after it.
const MORE: usize = 6;

/// A list of sums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    sums: Vec<Vec<u32>>,
}

impl Problem {
    /// A problem of `n` sums that follows from a seed.
    ///
    /// # Panics
    /// If `n` is not from 2 to 9.
    pub fn random(seed: u64, n: usize) -> Self {
        assert!(
            (FEWEST..=LABELS.len()).contains(&n),
            "a problem has 2 to 9 sums"
        );
        #[expect(clippy::cast_possible_truncation, reason = "the halves of the seed")]
        let key = [seed as u32, (seed >> 32) as u32];
        let mut counter = 0;
        let mut below = |n: u32| {
            counter += 1;
            // The bias of the remainder is below 2^-26.
            philox([counter, 0, 0, 1], key)[0] % n
        };
        let mut sum = || {
            let mut terms = vec![FIRST.start() + below(FIRST.end() - FIRST.start() + 1)];
            for _ in 0..=below(6) {
                terms.push(1 + below(9));
            }
            terms
        };
        Self {
            sums: (0..n).map(|_| sum()).collect(),
        }
    }

    /// Reads `a) 20+8+9; b) 41+4`; labels may be left out, blanks and line breaks do not matter.
    ///
    /// # Errors
    /// [`Error::Usage`] that says what the built-in model solves, with an example.
    pub fn parse(text: &str) -> Result<Self> {
        let fail = |what: String| {
            Err(Error::Usage(format!(
                "the built-in model only adds up lists of sums, and {what}; try \"{EXAMPLE}\", \
                 or name another model with -m"
            )))
        };
        let mut sums = Vec::new();
        let parts = text
            .split([';', '\n'])
            .map(str::trim)
            .filter(|part| !part.is_empty());
        for part in parts {
            let Some(&label) = LABELS.get(sums.len()) else {
                return fail(format!("these are more than {}", LABELS.len()));
            };
            let sum = match part.split_once(')') {
                Some((name, sum)) if name.trim().eq_ignore_ascii_case(&label.to_string()) => sum,
                Some((name, _)) => {
                    let name: String = name.trim().chars().take(20).collect();
                    return fail(format!(
                        "sum {} is labelled '{name}', not {label}",
                        sums.len() + 1
                    ));
                }
                None => part,
            };
            let terms: Option<Vec<u32>> = sum
                .split('+')
                .map(|term| {
                    let term = term.trim();
                    let digits =
                        (1..=2).contains(&term.len()) && term.bytes().all(|b| b.is_ascii_digit());
                    digits.then(|| term.parse().ok()).flatten()
                })
                .collect();
            let Some(terms) = terms else {
                let part: String = part.chars().take(40).collect();
                return fail(format!("'{part}' is no sum of numbers"));
            };
            let (first, more) = (terms[0], &terms[1..]);
            if !FIRST.contains(&first) || !more.iter().all(|d| (1..=9).contains(d)) {
                return fail(format!(
                    "sum {label} is not of a number from 10 to 45 and digits from 1 to 9"
                ));
            }
            if more.is_empty() || more.len() > MORE {
                return fail(format!(
                    "sum {label} has {} digits after the first number, not 1 to {MORE}",
                    more.len()
                ));
            }
            sums.push(terms);
        }
        if sums.len() < FEWEST {
            return fail(format!("there must be at least {FEWEST} of them"));
        }
        Ok(Self { sums })
    }

    /// The sums' terms.
    pub fn sums(&self) -> &[Vec<u32>] {
        &self.sums
    }

    /// The results, in order.
    pub fn results(&self) -> Vec<u32> {
        self.sums.iter().map(|terms| terms.iter().sum()).collect()
    }

    /// How many results of an answer such as `53, 39,67` are right; `None` if there are not as many
    /// as sums.
    pub fn right(&self, answer: &str) -> Option<usize> {
        let given: Vec<Option<u32>> = answer
            .split(',')
            .map(|part| part.split_whitespace().collect::<String>().parse().ok())
            .collect();
        (given.len() == self.sums.len()).then(|| {
            given
                .iter()
                .zip(self.results())
                .filter(|(given, want)| **given == Some(*want))
                .count()
        })
    }

    /// Whether an answer has every result.
    pub fn is_right(&self, answer: &str) -> bool {
        self.right(answer) == Some(self.sums.len())
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (terms, label)) in self.sums.iter().zip(LABELS).enumerate() {
            let terms: Vec<String> = terms.iter().map(u32::to_string).collect();
            write!(
                f,
                "{}{label}) {}",
                if i > 0 { "; " } else { "" },
                terms.join("+")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_model_is_sound_and_small() {
        let files = files().expect("the model");
        assert!(
            files.weight_bytes() <= 4 << 20,
            "{} bytes",
            files.weight_bytes()
        );
        let text = text().expect("the tokenizer");
        assert!(
            text.vocab_size() <= files.config.vocab_size,
            "they belong together"
        );
        assert!(style().is_ok(), "the prompt");
    }

    #[test]
    fn a_problem_is_read_as_it_is_written() {
        for n in FEWEST..=LABELS.len() {
            for seed in 0..50 {
                let problem = Problem::random(seed, n);
                assert_eq!(
                    Problem::parse(&problem.to_string()).expect("its own text"),
                    problem
                );
                assert!(
                    problem.results().iter().all(|r| (10..100).contains(r)),
                    "{problem}"
                );
            }
        }
    }

    #[test]
    fn blanks_labels_and_lines_do_not_matter() {
        let want = Problem::parse("a) 20+8+9; b) 41+4").expect("a problem");
        for text in ["20+8+9;41+4", " a)20 + 8+ 9 ;\nB) 41+4;\n", "20+8+9\n41+4"] {
            assert_eq!(Problem::parse(text).expect("the same"), want, "{text:?}");
        }
        assert_eq!(want.results(), [37, 45], "results");
    }

    #[test]
    fn other_texts_get_a_friendly_sentence() {
        let texts = [
            "",
            "hello",
            "a) 12+9",
            "a) 12; b) 13+4",
            "b) 12+9; a) 11+4",
            "a) 99+1; b) 12+3",
            "a) 12+0; b) 12+3",
            "a) 12+9-3; b) 12+3",
            "a) 12+1+1+1+1+1+1+1; b) 12+3",
            "a) ١٢+٣; b) 12+3",
            "a) 12+999999999999; b) 11+1",
            "10+1;10+1;10+1;10+1;10+1;10+1;10+1;10+1;10+1;10+1",
        ];
        for text in texts {
            let error = Problem::parse(text).expect_err(text).to_string();
            assert!(
                error.contains(EXAMPLE) && error.contains("-m"),
                "{text:?}: {error}"
            );
        }
    }

    #[test]
    fn answers_are_checked_sum_by_sum() {
        let problem = Problem::parse("a) 20+8+9; b) 41+4").expect("a problem");
        assert!(problem.is_right("37,  45"), "blanks do not count");
        assert_eq!(problem.right("37,44"), Some(1), "one of two");
        assert_eq!(problem.right("37"), None, "one is missing");
    }
}
