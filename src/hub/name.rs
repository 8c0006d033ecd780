//! Names of the hub: repositories, revisions, files. Whatever passes here is safe as a part of a path and
//! of a URL.

use std::fmt;

/// A model of the hub: `owner/name`.
///
/// As Hugging Face has it: letters, digits, `_`, `-` and `.`, the name at most 96 of them, none of the two
/// beginning or ending with `-` or `.`; no `--`, no `..`, no `.git` at the end. The old names without an owner are
/// not taken: they cannot be told from a mistyped directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RepoId(String);

impl RepoId {
    /// The id that a text is, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        let (owner, name) = text.split_once('/')?;
        let part = |part: &str| {
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            (1..=96).contains(&part.len())
                && part.chars().all(|c| word(c) || c == '-' || c == '.')
                && part.starts_with(word)
                && part.ends_with(word)
        };
        let whole = !text.contains("--") && !text.contains("..") && !text.ends_with(".git");
        (part(owner) && part(name) && whole).then(|| Self(text.to_owned()))
    }

    /// Its folder in the cache: `models--owner--name`.
    pub fn folder(&self) -> String {
        format!("{FOLDER}{}", self.0.replace('/', "--"))
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the folder of a model in the cache begins with.
pub(super) const FOLDER: &str = "models--";

/// The id that a folder of the cache is of, an old one without an owner too.
pub(super) fn id_of(folder: &str) -> Option<String> {
    let rest = folder.strip_prefix(FOLDER)?;
    (!rest.is_empty()).then(|| rest.replacen("--", "/", 1))
}

/// A branch, a tag, a commit, or a reference like `refs/pr/1`, as git allows them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Revision(String);

impl Revision {
    /// The revision that a text is, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        let part = |part: &str| {
            !part.is_empty() && !part.starts_with(['.', '-']) && !part.ends_with(".lock")
        };
        let odd = |c: char| c.is_control() || c == ' ' || "~^:?*[\\<>|\"".contains(c);
        let fits = text.len() <= 200
            && text.split('/').all(part)
            && !text.contains(odd)
            && !text.contains("..")
            && !text.contains("@{")
            && !text.ends_with('.');
        fits.then(|| Self(text.to_owned()))
    }

    /// Whether it is a whole commit id, which means the same for ever.
    pub fn is_commit(&self) -> bool {
        is_commit(&self.0)
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Revision {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `^[0-9a-f]{40}$`
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// Whether a text is `digits` small hexadecimal digits.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    text.len() == digits && text.bytes().all(digit)
}

/// Whether the tag of a content may be the name of its file: `^[A-Za-z0-9_-]{1,128}$`, so that no other
/// file of the folder (`.incomplete`) can be meant.
pub(super) fn is_tag(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    (1..=128).contains(&text.len()) && text.bytes().all(plain)
}

/// `^[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$`: a weight file in the folder itself, and not a hidden one.
pub(super) fn is_shard(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    text.len() <= 200
        && text
            .strip_suffix(".safetensors")
            .is_some_and(|stem| !stem.is_empty())
        && !text.starts_with('.')
        && text.bytes().all(plain)
}

/// A text as one segment of a URL's path.
pub(super) fn escaped(text: &str) -> String {
    use fmt::Write as _;

    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_as_hugging_face_has_them() {
        let long = "n".repeat(96);
        for good in [
            "Qwen/Qwen3-0.6B",
            "a/b",
            "Foo-BAR_foo.bar123/_x_",
            &format!("a/{long}"),
        ] {
            assert!(RepoId::parse(good).is_some(), "{good} is one");
        }
        for bad in [
            "",
            "a",
            "/",
            "a/",
            "/a",
            "./a/b",
            "./a",
            "a/.",
            "../a",
            "a/..",
            "a/b/c",
            "a//b",
            "a/b/",
            ".a/b",
            "-a/b",
            "a-/b",
            "a/b.",
            "a/b-",
            "a--b/c",
            "a/b--c",
            "a/b..c",
            "a/b.git",
            "a\\b/c",
            "a/b c",
            "a/b\n",
            "a/b\0",
            "~/models",
            "a/bé",
            "C:/models",
            &format!("a/{long}n"),
        ] {
            assert_eq!(RepoId::parse(bad), None, "{bad:?} is none");
        }
        let id = RepoId::parse("Qwen/Qwen3-0.6B").expect("one");
        assert_eq!(id.folder(), "models--Qwen--Qwen3-0.6B");
        assert_eq!(id_of(&id.folder()), Some(id.to_string()));
        assert_eq!(id_of("models--gpt2"), Some("gpt2".to_owned()));
        assert_eq!(id_of("datasets--a--b"), None);
    }

    #[test]
    fn revisions_are_as_git_has_them() {
        for good in [
            "main",
            "v1.0",
            "refs/pr/1",
            "feature/x_y-z",
            &"a".repeat(40),
        ] {
            assert!(Revision::parse(good).is_some(), "{good} is one");
        }
        for bad in [
            "",
            "/",
            "/main",
            "main/",
            "a//b",
            "..",
            "../main",
            "a/../b",
            "a/.b",
            ".",
            "a b",
            "a\0",
            "a\\b",
            "C:x",
            "main.lock",
            "x@{1}",
            "-x",
            "a?b",
            &"a".repeat(201),
        ] {
            assert_eq!(Revision::parse(bad), None, "{bad:?} is none");
        }
        assert!(Revision::parse(&"a".repeat(40)).is_some_and(|r| r.is_commit()));
        assert!(!Revision::default().is_commit(), "a branch moves");
    }

    #[test]
    fn files_stay_in_their_folder() {
        assert!(is_shard("model-00001-of-00002.safetensors"));
        for bad in [
            "../x.safetensors",
            "/x.safetensors",
            "a/x.safetensors",
            "a\\x.safetensors",
            ".safetensors",
            ".x.safetensors",
            "x\0.safetensors",
            "C:x.safetensors",
            "x.bin",
        ] {
            assert!(!is_shard(bad), "{bad:?}");
        }
        assert!(is_tag(&"a1".repeat(32)));
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "../a",
            "x.incomplete",
            "a\\b",
            "a b",
            &"a".repeat(129),
        ] {
            assert!(!is_tag(bad), "{bad:?}");
        }
        assert_eq!(escaped("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(escaped("é%&"), "%C3%A9%25%26");
    }
}
