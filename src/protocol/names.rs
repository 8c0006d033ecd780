//! The workers' names.
//!
//! A name is written into step prefixes, so it must not look like one, nor break a line.

use crate::{Error, Result};

/// Workers that one session may have.
pub const MAX_WORKERS: usize = 16;

/// Names for those who give none, in order.
pub const NAMES: [&str; MAX_WORKERS] = [
    "Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi", "Ivan", "Judy", "Karl",
    "Laura", "Mike", "Nina", "Oscar", "Peggy",
];

const MAX_NAME: usize = 64;

/// The first `n` default names.
///
/// # Panics
/// If there are not that many.
pub fn default_names(n: usize) -> Vec<String> {
    assert!(n <= MAX_WORKERS, "at most {MAX_WORKERS} workers, not {n}");
    NAMES[..n].iter().map(|&name| name.to_owned()).collect()
}

/// Checks the names of a session.
///
/// # Errors
/// [`Error::Usage`] that names what is wrong.
pub fn check_names<S: AsRef<str>>(names: &[S]) -> Result<()> {
    if !(1..=MAX_WORKERS).contains(&names.len()) {
        return Err(Error::Usage(format!(
            "{} workers: give 1 to {MAX_WORKERS}",
            names.len()
        )));
    }
    for (i, name) in names.iter().enumerate() {
        let name = name.as_ref();
        let wrong = |what: &str| Err(Error::Usage(format!("worker name {name:?}: {what}")));
        if name.trim().is_empty() {
            return wrong("it is empty");
        }
        if name.trim() != name {
            return wrong("it begins or ends with a space");
        }
        if name.len() > MAX_NAME {
            return wrong("it is too long; give at most 64 bytes");
        }
        if name
            .chars()
            .any(|c| c.is_control() || "*[]\u{2028}\u{2029}".contains(c))
        {
            return wrong("it holds a line break, a control character, '*', '[' or ']'");
        }
        if names[..i].iter().any(|other| other.as_ref() == name) {
            return wrong("two workers have it");
        }
    }
    Ok(())
}

/// "Alice", "Alice and Bob", "Alice, Bob and Carol".
pub(crate) fn enumerate_names<S: AsRef<str>>(names: &[S]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.as_slice() {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::{check_names, default_names, enumerate_names};

    #[test]
    fn names_must_be_told_apart_and_fit_a_prefix() {
        assert!(check_names(&default_names(16)).is_ok(), "the default ones");
        assert!(check_names(&["Zoë", "李", "R2 D2"]).is_ok(), "any script");
        for bad in [
            &["A", "A"][..],
            &[""],
            &[" "],
            &["A "],
            &["A\nB"],
            &["A*"],
            &["[A"],
            &["A]"],
            &["A\u{7}"],
            &[],
        ] {
            assert!(check_names(bad).is_err(), "{bad:?}");
        }
        assert!(check_names(&["x".repeat(65)]).is_err(), "too long");
    }

    #[test]
    fn names_are_enumerated_in_english() {
        let names = default_names(3);
        assert_eq!(enumerate_names(&names[..1]), "Alice", "one");
        assert_eq!(enumerate_names(&names[..2]), "Alice and Bob", "two");
        assert_eq!(enumerate_names(&names), "Alice, Bob and Carol", "three");
    }
}
