//! `hogwild models`: what is in the Hugging Face cache; and how a model's name becomes its directory.
//!
//! `--format json` prints one object; fields are only ever added:
//!
//! ```text
//! version  1
//! cache    the folder
//! models   [{ id, bytes, snapshots: [{ commit, revisions, directory, bytes, complete, missing,
//!             model_type, supported, problem }] }]
//! ```
//!
//! `supported` says whether this version loads the model, as far as the files that are there tell;
//! it is null where they tell nothing.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::{DecimalBytes, ProgressBar};
use serde_json::{Value, json};

use super::load::bar;
use super::output::neutralise;
use crate::hub::{self, CachedModel, CachedSnapshot, RepoId, Revision, Settings};
use crate::model::{Config, ModelFiles};
use crate::{Error, Result};

/// Arguments of `hogwild models`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What standard output says of each model
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Forms of the list.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Format {
    /// Columns for people
    #[default]
    Table,
    /// One JSON object
    Json,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let cache = Settings::from_env()?.cache;
    let models = hub::list(&cache)?;
    match args.format {
        Format::Json => super::print_json(&json!({
            "version": 1,
            "cache": cache.display().to_string(),
            "models": models.iter().map(to_json).collect::<Vec<_>>(),
        }))?,
        Format::Table if models.is_empty() => {
            super::note(&format!("no model is in {}", cache.display()));
        }
        Format::Table => super::print(&table(&models))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether this version loads a model, and if not, why; `None` where no file says.
fn supported(snapshot: &CachedSnapshot) -> Option<Result<()>> {
    let folder = &snapshot.folder;
    if snapshot.problem.is_some() {
        None
    } else if snapshot.missing.is_empty() {
        Some(ModelFiles::open(folder).map(drop))
    } else if snapshot.missing.iter().any(|name| name == "config.json") {
        None
    } else {
        Some(Config::open(folder).map(drop))
    }
}

fn to_json(model: &CachedModel) -> Value {
    let snapshot = |snapshot: &CachedSnapshot| {
        let supported = supported(snapshot);
        let problem = supported.as_ref().and_then(|s| s.as_ref().err());
        json!({
            "commit": snapshot.commit,
            "revisions": snapshot.revisions,
            "directory": snapshot.folder.display().to_string(),
            "bytes": snapshot.bytes,
            "complete": snapshot.missing.is_empty() && snapshot.problem.is_none(),
            "missing": snapshot.missing,
            "model_type": snapshot.model_type,
            "supported": supported.as_ref().map(Result::is_ok),
            "problem": snapshot.problem.clone().or(problem.map(Error::to_string)),
        })
    };
    json!({
        "id": model.id,
        "bytes": model.bytes,
        "snapshots": model.snapshots.iter().map(snapshot).collect::<Vec<_>>(),
    })
}

fn table(models: &[CachedModel]) -> String {
    let head = ["model", "revision", "size", "complete", "type", "supported"];
    let mut rows = vec![head.map(str::to_owned)];
    let mut notes = String::new();
    for model in models {
        let mut id = model.id.clone();
        if model.snapshots.is_empty() {
            let size = DecimalBytes(model.bytes).to_string();
            rows.push([&id, "-", &size, "no", "-", "-"].map(str::to_owned));
        }
        for snapshot in &model.snapshots {
            let mut revision = snapshot.revisions.join(", ");
            if revision.is_empty() {
                snapshot.commit[..12].clone_into(&mut revision);
            }
            let whole = snapshot.missing.is_empty() && snapshot.problem.is_none();
            let supported = supported(snapshot);
            let (says, why) = match &supported {
                None => ("-", snapshot.problem.clone()),
                Some(Ok(())) => ("yes", None),
                Some(Err(error)) => ("no", Some(error.to_string())),
            };
            if let Some(why) = why {
                let _ = writeln!(notes, "{} {revision}: {why}", model.id);
            }
            if !whole && !snapshot.missing.is_empty() {
                let missing = snapshot.missing.join(", ");
                let _ = writeln!(notes, "{} {revision}: lacks {missing}", model.id);
            }
            rows.push([
                std::mem::take(&mut id),
                revision,
                DecimalBytes(snapshot.bytes).to_string(),
                if whole { "yes" } else { "no" }.to_owned(),
                snapshot.model_type.clone().unwrap_or("-".to_owned()),
                says.to_owned(),
            ]);
        }
    }
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, text) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[column].chars().count()).max();
            let _ = write!(line, "{text:<0$}  ", width.unwrap_or(0));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    if !notes.is_empty() {
        out.push('\n');
        out.push_str(&notes);
    }
    neutralise(&out).into_owned()
}

/// The directory of a model: a path that is there, or what the hub calls so, downloaded if need be.
pub(super) fn locate(model: &Path, revision: Option<&str>, quiet: bool) -> Result<PathBuf> {
    let id = model.to_str().and_then(RepoId::parse);
    let Some(id) = id.filter(|_| model.symlink_metadata().is_err()) else {
        return match revision {
            None => Ok(model.to_owned()),
            Some(_) => Err(Error::Usage(format!(
                "--revision is for models of the hub, which are called OWNER/NAME; {} is a path",
                model.display()
            ))),
        };
    };
    let revision = match revision {
        None => Revision::default(),
        Some(text) => Revision::parse(text).ok_or_else(|| {
            Error::Usage(format!("--revision {text:?} is no branch, tag or commit"))
        })?,
    };
    let settings = Settings::from_env()?;
    let hidden = std::env::var_os("HF_HUB_DISABLE_PROGRESS_BARS").is_some_and(|v| v == "1");
    let mut watch = Watch {
        id: &id,
        quiet,
        bar: bar("downloading", 0, quiet || hidden),
    };
    let found = hub::fetch(&settings, &id, &revision, &mut watch);
    watch.bar.finish_and_clear();
    found.map_err(|error| match error {
        Error::Hub { what, problem } => Error::Hub {
            what,
            problem: format!("{problem} (no directory here is called so)"),
        },
        other => other,
    })
}

/// A download as a person sees it.
struct Watch<'a> {
    id: &'a RepoId,
    quiet: bool,
    bar: ProgressBar,
}

impl hub::Watch for Watch<'_> {
    fn accept(&mut self, folder: &Path) -> Result<()> {
        // Many gigabytes are not worth a model that cannot be loaded.
        Config::open(folder).map(drop)
    }

    fn total(&mut self, files: usize, bytes: u64) {
        self.bar.set_length(bytes);
        if self.bar.is_hidden() && files > 0 {
            let size = DecimalBytes(bytes);
            self.note(&format!("downloading {files} files of {}, {size}", self.id));
        }
    }

    fn at(&mut self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    fn note(&mut self, text: &str) {
        if !self.quiet {
            self.bar.suspend(|| super::note(text));
        }
    }
}
