//! Models of the Hugging Face hub, by name: found in its cache, brought there where something is missing.
//!
//! The cache is that of `huggingface_hub`, so that programs share what each has downloaded:
//!
//! ```text
//! models--Qwen--Qwen3-0.6B/refs/main                  the commit that `main` was at
//!                          snapshots/<commit>/<file>  a link to ../../blobs/<tag>
//!                          blobs/<tag>                a content; <tag>.incomplete while it comes
//!                          .no_exist/<commit>/<file>  the commit has no such file
//! .locks/models--Qwen--Qwen3-0.6B/<tag>.lock          held by who brings the content
//! ```
//!
//! A model whose files are all there is used as it is, and nobody is asked (but once for small ones that
//! another program may have left out). Only files that a model is loaded
//! from are downloaded: configuration, tokenizer, chat template, and weights in safetensors. What comes from
//! the network, names included, may be hostile.

mod cache;
mod download;
mod name;
mod remote;
mod settings;

use std::path::{Path, PathBuf};

pub use cache::{CachedModel, CachedSnapshot, list};
pub use name::{RepoId, Revision};
pub use settings::{Limits, Settings, Token};

use crate::{Error, Result};
use cache::{INDEX, OPTIONAL, REQUIRED, Repo, SINGLE, Snapshot};
use remote::{About, Remote, hub_error};

/// Bytes of a file that is not weights.
const MAX_SMALL: u64 = 256 << 20;

/// Who watches a download.
pub trait Watch {
    /// The weights are about to come; the small files are in the folder already. An error ends it here.
    ///
    /// # Errors
    /// If the model is of no use.
    fn accept(&mut self, folder: &Path) -> Result<()> {
        let _ = folder;
        Ok(())
    }

    /// So many files with so many bytes are not there yet; grows once, when the weights are known.
    fn total(&mut self, files: usize, bytes: u64);

    /// So many of these bytes are there now; may go back where something is thrown away.
    fn at(&mut self, bytes: u64);

    /// Something to tell a person: why it waits, what is done again.
    fn note(&mut self, text: &str);
}

/// The folder of a model, every file of which is in the cache; downloads what is not there.
///
/// # Errors
/// [`Error::Hub`] if the hub refuses, fails, or is not to be asked; [`Error::Io`] and [`Error::BadFile`] if the cache
/// cannot be read or written, or holds links that lead out of it; what [`Watch::accept`] returns. A
/// download that fails goes on where it stopped when it is asked for again.
pub fn fetch(
    settings: &Settings,
    id: &RepoId,
    revision: &Revision,
    watch: &mut dyn Watch,
) -> Result<PathBuf> {
    let repo = Repo::new(&settings.cache, id);
    let commit = match repo.commit(revision) {
        // It is written anew.
        Err(error @ Error::BadFile { .. }) if !settings.offline => {
            watch.note(&error.to_string());
            None
        }
        other => other?,
    };
    let mut missing = None;
    if let Some(commit) = commit {
        let snapshot = repo.snapshot(&commit);
        let names = snapshot.missing()?;
        if names.is_empty() {
            if !settings.offline && !snapshot.is_settled()? {
                settle(settings, id, &snapshot, watch);
            }
            return Ok(snapshot.folder);
        }
        missing = Some(names);
    }
    if settings.offline {
        let what = match missing {
            Some(names) => format!("{} of {revision} is not in the cache", names.join(", ")),
            None => format!("{revision} of it is not in the cache"),
        };
        let cache = settings.cache.display();
        return Err(hub_error(
            id,
            format!("{what} {cache}, and HF_HUB_OFFLINE forbids to ask the hub"),
        ));
    }
    let remote = Remote::new(settings, id, settings.limits.tries);
    bring(&remote, &repo, id, revision, watch)
}

/// Brings the small files that a complete snapshot may lack, as other programs leave it; goes without them if
/// that fails.
fn settle(settings: &Settings, id: &RepoId, snapshot: &Snapshot, watch: &mut dyn Watch) {
    let repo = Repo::new(&settings.cache, id);
    let remote = Remote::new(settings, id, 1);
    let brought = Revision::parse(&snapshot.commit)
        .ok_or_else(|| hub_error(id, "no commit"))
        .and_then(|commit| bring(&remote, &repo, id, &commit, watch));
    if let Err(error) = brought {
        watch.note(&format!("{error}; the model is used as it is in the cache"));
    }
}

/// Downloads what is not there of a revision, notes where it is, and returns its folder.
fn bring(
    remote: &Remote<'_>,
    repo: &Repo,
    id: &RepoId,
    revision: &Revision,
    watch: &mut dyn Watch,
) -> Result<PathBuf> {
    let listing = remote.listing(revision, &mut |text| watch.note(text))?;
    let has = |name: &str| listing.names.iter().any(|n| n == name);
    let need = |name: &str| {
        let problem = format!("has no {name}; this version loads models in Hugging Face's format");
        hub_error(id, problem)
    };
    if let Some(name) = REQUIRED.iter().find(|name| !has(name)) {
        return Err(need(name));
    }
    let weights = [SINGLE, INDEX].into_iter().find(|name| has(name));
    let weights = weights.ok_or_else(|| {
        let others = [".gguf", ".bin", ".pt", ".pth", ".safetensors"];
        let other = listing
            .names
            .iter()
            .find(|name| others.iter().any(|end| name.ends_with(end)));
        let seen = other.map_or("none at all".to_owned(), |name| {
            name.chars().take(80).collect::<String>()
        });
        let problem = format!(
            "has no weights in {SINGLE}, nor {INDEX} (but {seen}); this version loads no others"
        );
        hub_error(id, problem)
    })?;

    let snapshot = repo.snapshot(&listing.commit);
    let mut bringing = Bringing {
        remote,
        repo,
        snapshot: &snapshot,
        watch,
        total: 0,
        files: 0,
        done: 0,
    };
    let small = REQUIRED
        .into_iter()
        .chain(OPTIONAL)
        .filter(|name| has(name));
    let index = (weights == INDEX).then_some(INDEX);
    let small = bringing.about(small.chain(index))?;
    if let Some(about) = small.iter().find(|about| about.size > MAX_SMALL) {
        let problem = format!(
            "its {} has {} bytes; {MAX_SMALL} are read",
            about.name, about.size
        );
        return Err(hub_error(id, problem));
    }
    repo.note_revision(revision, &listing.commit)?;
    bringing.all(&small)?;
    for name in OPTIONAL.into_iter().filter(|name| !has(name)) {
        // It saves a question at the next start, no more.
        if let Err(error) = repo.note_absent(&listing.commit, name) {
            log::debug!("{error}");
        }
    }
    let names = match index {
        Some(_) => snapshot.shards()?,
        None => vec![SINGLE.to_owned()],
    };
    if let Some(name) = names.iter().find(|name| !has(name)) {
        let problem = format!("has no {name}, which its {INDEX} names");
        return Err(hub_error(id, problem));
    }
    if !snapshot.missing()?.is_empty() {
        bringing.watch.accept(&snapshot.folder)?;
    }
    let large = bringing.about(names.iter().map(String::as_str))?;
    bringing.all(&large)?;
    Ok(snapshot.folder)
}

/// A download of several files.
struct Bringing<'a, 'w> {
    remote: &'a Remote<'a>,
    repo: &'a Repo,
    snapshot: &'a Snapshot,
    watch: &'w mut dyn Watch,
    total: u64,
    files: usize,
    done: u64,
}

impl Bringing<'_, '_> {
    /// What the hub says of the files that are not there; they count from now on.
    fn about<'n>(&mut self, names: impl Iterator<Item = &'n str>) -> Result<Vec<About>> {
        let mut out = Vec::new();
        for name in names {
            if self.snapshot.len_of(name)?.is_some() {
                continue;
            }
            let note = &mut |text: &str| self.watch.note(text);
            let about = self.remote.about(&self.snapshot.commit, name, note)?;
            self.total = self.total.saturating_add(about.size);
            self.files += 1;
            out.push(about);
        }
        self.watch.total(self.files, self.total);
        Ok(out)
    }

    fn all(&mut self, files: &[About]) -> Result<()> {
        for about in files {
            self.one(about)?;
            self.done += about.size;
            self.watch.at(self.done);
        }
        Ok(())
    }

    fn one(&mut self, about: &About) -> Result<()> {
        let (commit, name) = (&self.snapshot.commit, &about.name);
        let has = || self.repo.has(&about.tag, about.size);
        // Held until the file is placed, so that no other process replaces its content.
        let mut _held = None;
        if !has() {
            let watch = &mut *self.watch;
            let mut tell = || watch.note(&format!("another process brings {name}; waiting for it"));
            let patience = self.remote.limits().lock;
            _held = self.repo.lock(&about.tag, patience, &mut tell)?;
            // The other process may have brought it.
            if !has() {
                download::download(self.remote, self.repo, commit, about, self.done, self.watch)?;
            }
        }
        self.repo.place(commit, name, &about.tag)
    }
}
