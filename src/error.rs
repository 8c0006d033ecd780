//! The one error type of the crate.
//!
//! A variant carries data; its text is a sentence that says what was found and what to do about it.
//! Programmer errors are panics (`assert!` with a message) and never reach this type.

use std::path::PathBuf;

/// Result with the crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Characters of a value or name from a file that a message repeats.
pub(crate) const MAX_SHOWN: usize = 160;

/// `text` as part of a one-line message: control characters escaped, and not too long.
pub(crate) fn shown(text: &str) -> String {
    let mut line = String::new();
    for c in text.chars().take(MAX_SHOWN + 1) {
        // The two separators end a line too.
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    if line.chars().count() > MAX_SHOWN {
        line = line.chars().take(MAX_SHOWN).collect();
        line.push('…');
    }
    line
}

/// Everything that files, users and machines can do to us.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A model file is damaged, or says something that cannot be true.
    #[error("{}: {field}: {problem}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// The key, tensor or byte offset inside it.
        field: String,
        /// What is wrong, and what to do.
        problem: String,
    },

    /// A model asks for something that this version does not compute.
    #[error("{}: {what} is not supported: {advice}", path.display())]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// What was found.
        what: String,
        /// What to do instead.
        advice: String,
    },

    /// The adapter that was asked for is not there.
    #[error(
        "no adapter matches '{wanted}'; seen: {seen}. `hogwild devices` lists them; `--device cpu` needs none"
    )]
    NoAdapter {
        /// What the user asked for.
        wanted: String,
        /// The adapters that exist, comma-separated.
        seen: String,
    },

    /// The device failed: lost, out of memory, or refused a command.
    #[error("device {device}: {problem}")]
    Device {
        /// The adapter's name.
        device: String,
        /// What happened, and what to do.
        problem: String,
    },

    /// Something does not fit a limit.
    #[error("{what} needs {need}, but there is only {have}; {advice}")]
    Limit {
        /// What is too large.
        what: String,
        /// What it needs, with its unit.
        need: String,
        /// What there is, with its unit.
        have: String,
        /// What to do.
        advice: String,
    },

    /// The shared cache has no free page left.
    #[error(
        "the cache is full: {need} more pages are needed and {free} of {pages} are free; raise --context"
    )]
    CacheFull {
        /// Pages that were asked for.
        need: usize,
        /// Pages that are free.
        free: usize,
        /// Pages in all.
        pages: usize,
    },

    /// A WGSL file does not compile.
    #[error("{file}:{line}: {message}")]
    Shader {
        /// The file the line is in.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What the compiler said.
        message: String,
    },

    /// A kernel and its reference disagree (checked runs).
    #[error("op {op}, kernel {kernel}, dispatch {dispatch}: {problem}")]
    Disagree {
        /// The op's name.
        op: String,
        /// The kernel's name.
        kernel: String,
        /// Index of the dispatch in the recording.
        dispatch: usize,
        /// The first element that differs, or the statistic that is out of bounds.
        problem: String,
    },

    /// The tokenizer refused a text or an id.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// A chat template or a prompt file could not be rendered.
    #[error("{what}: {problem}")]
    Template {
        /// Which template.
        what: String,
        /// What is wrong.
        problem: String,
    },

    /// A command or a value that makes no sense (usage).
    #[error("{0}")]
    Usage(String),

    /// A model of the hub is not in the cache, and could not be brought there.
    #[error("{what}: {problem}")]
    Hub {
        /// The model, `owner/name`.
        what: String,
        /// What happened, and what to do.
        problem: String,
    },

    /// A log cannot be replayed.
    #[error("{}:{line}: {problem}", path.display())]
    Log {
        /// The log file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },

    /// The model produced NaN or infinity.
    #[error(
        "pass {pass}: the logits of {worker} are not finite; try --kv-dtype f32, or --check to find the dispatch"
    )]
    NotFinite {
        /// The pass, from 0.
        pass: usize,
        /// The worker's name.
        worker: String,
    },
}

impl Error {
    /// Exit code of the process: 1 failure, 2 usage, 3 bad model file, 4 device, 5 hub.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::BadFile { .. }
            | Self::Unsupported { .. }
            | Self::Tokenizer(_)
            | Self::Template { .. } => 3,
            Self::NoAdapter { .. } | Self::Device { .. } | Self::NotFinite { .. } => 4,
            Self::Hub { .. } => 5,
            _ => 1,
        }
    }

    /// Says of a failed device which pass it was in, from 0.
    #[must_use]
    pub fn in_pass(self, pass: u64) -> Self {
        match self {
            Self::Device { device, problem } => Self::Device {
                device,
                problem: format!("in pass {pass}: {problem}"),
            },
            other => other,
        }
    }

    /// An [`Error::Io`] for `path`, ready for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// An [`Error::BadFile`].
    pub fn bad(
        path: impl Into<PathBuf>,
        field: impl Into<String>,
        problem: impl Into<String>,
    ) -> Self {
        Self::BadFile {
            path: path.into(),
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(
        path: impl Into<PathBuf>,
        what: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self::Unsupported {
            path: path.into(),
            what: what.into(),
            advice: advice.into(),
        }
    }
}
