//! The cache of `huggingface_hub` on disk: which file is where, and what of a model is there. Asks nobody.
//!
//! Invariant: a link of the cache is followed only to a content of its own repository, or to the store of
//! contents that the repositories of this cache share; any other is an error that names it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::name::{RepoId, Revision, id_of, is_commit, is_hex, is_shard};
use crate::{Error, Result};

/// Files that every model needs, apart from its weights.
pub(super) const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];

/// Files that are read where a model has them.
pub(super) const OPTIONAL: [&str; 5] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The file of all weights, which goes before [`INDEX`], as where a model is loaded.
pub(super) const SINGLE: &str = "model.safetensors";

/// The file that names the files of the weights, if there are several.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Bytes of an index, and files that it may name.
const MAX_INDEX: u64 = 100_000_000;
const MAX_SHARDS: usize = 512;

/// Bytes of a `config.json` whose type a listing says.
const MAX_CONFIG: u64 = 1 << 20;

/// Levels of folders that a reference may have: `refs/pr/1` is three.
const MAX_DEPTH: usize = 6;

/// Time between two looks at a lock that another process holds.
const LOOK: Duration = Duration::from_millis(50);

/// The folder of one repository in a cache.
#[derive(Clone, Debug)]
pub(super) struct Repo {
    cache: PathBuf,
    name: String,
    folder: PathBuf,
}

/// One commit of a repository, as far as it is in the cache.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    repo: Repo,
    pub(super) commit: String,
    pub(super) folder: PathBuf,
}

impl Repo {
    pub(super) fn new(cache: &Path, id: &RepoId) -> Self {
        Self::in_folder(cache, id.folder())
    }

    fn in_folder(cache: &Path, name: String) -> Self {
        Self {
            cache: cache.to_owned(),
            folder: cache.join(&name),
            name,
        }
    }

    /// The commit that a revision was at when it was last asked for; `None` if it never was.
    pub(super) fn commit(&self, revision: &Revision) -> Result<Option<String>> {
        if revision.is_commit() {
            return Ok(Some(revision.to_string()));
        }
        read_ref(&self.folder.join("refs").join(revision.as_str()))
    }

    pub(super) fn snapshot(&self, commit: &str) -> Snapshot {
        Snapshot {
            repo: self.clone(),
            commit: commit.to_owned(),
            folder: self.folder.join("snapshots").join(commit),
        }
    }

    /// Where the content of a tag is, or will be.
    pub(super) fn blob(&self, tag: &str) -> PathBuf {
        self.folder.join("blobs").join(tag)
    }

    /// Whether the content of a tag is there, in its whole length.
    pub(super) fn has(&self, tag: &str, size: u64) -> bool {
        matches!(self.own(&self.blob(tag)), Ok(Some((_, len))) if len == size)
    }

    /// What a path of this repository is once all links are followed, with its length; `None` where there is
    /// nothing.
    fn own(&self, path: &Path) -> Result<Option<(PathBuf, u64)>> {
        let meta = match fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(e) if is_absent(&e) => return Ok(None),
            Err(e) => return Err(Error::io(path)(e)),
        };
        let (real, meta) = if meta.is_symlink() {
            let real = match fs::canonicalize(path) {
                Ok(real) => real,
                Err(e) if is_absent(&e) => return Ok(None),
                Err(e) => return Err(Error::io(path)(e)),
            };
            if !self.is_content(&real) {
                let problem = format!(
                    "leads out of the model's own folder, to {}; delete it",
                    real.display()
                );
                return Err(Error::bad(path, "link", problem));
            }
            let meta = fs::metadata(&real).map_err(Error::io(&real))?;
            (real, meta)
        } else {
            (path.to_owned(), meta)
        };
        if !meta.is_file() {
            return Err(Error::bad(path, "file", "is not a regular file; delete it"));
        }
        Ok(Some((real, meta.len())))
    }

    /// Whether a path without links is a content: of this repository, `blobs/<tag>`, or of the store that
    /// newer versions of `huggingface_hub` share between repositories, `<cache>/blobs/<2 digits>/<64 digits>`.
    fn is_content(&self, real: &Path) -> bool {
        let is_in = |folder: PathBuf| {
            fs::canonicalize(folder).is_ok_and(|folder| real.parent() == Some(&folder))
        };
        let name = real.file_name().and_then(|name| name.to_str());
        let shared = name.filter(|name| is_hex(name, 64)).map(|name| &name[..2]);
        is_in(self.folder.join("blobs"))
            || shared.is_some_and(|prefix| is_in(self.cache.join("blobs").join(prefix)))
    }

    /// Makes a file of a snapshot stand for the content of a tag: by a link, or where the file system has none
    /// by the content itself, as `huggingface_hub` does.
    pub(super) fn place(&self, commit: &str, name: &str, tag: &str) -> Result<()> {
        self.place_by(commit, name, tag, symlink)
    }

    fn place_by(
        &self,
        commit: &str,
        name: &str,
        tag: &str,
        link: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> Result<()> {
        let folder = self.snapshot(commit).folder;
        make_folder(&folder)?;
        let (path, new) = (folder.join(name), unique(&folder, name));
        let target = Path::new("..").join("..").join("blobs").join(tag);
        let placed = match link(&target, &new) {
            // A rename is one step, and replaces a link that leads nowhere.
            Ok(()) => fs::rename(&new, &path),
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::StorageFull | ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                Err(e)
            }
            Err(_) => fs::rename(self.blob(tag), &path),
        };
        placed.map_err(|e| {
            // It may never have been made.
            let _ = fs::remove_file(&new);
            Error::io(path)(e)
        })
    }

    /// Notes that a revision is at a commit.
    pub(super) fn note_revision(&self, revision: &Revision, commit: &str) -> Result<()> {
        if revision.is_commit() {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision.as_str());
        let folder = path.parent().unwrap_or(&self.folder).to_owned();
        make_folder(&folder)?;
        let new = unique(&folder, "ref");
        let written = fs::write(&new, commit).and_then(|()| fs::rename(&new, &path));
        written.map_err(|e| {
            let _ = fs::remove_file(&new);
            Error::io(path)(e)
        })
    }

    /// Notes that a commit has no file of a name.
    pub(super) fn note_absent(&self, commit: &str, name: &str) -> Result<()> {
        let folder = self.folder.join(".no_exist").join(commit);
        make_folder(&folder)?;
        let path = folder.join(name);
        fs::write(&path, "").map_err(Error::io(path))
    }

    /// Keeps other processes from writing the content of a tag, while the file is open; `None` where the file
    /// system has no locks. `tell` is called once if another process holds it.
    pub(super) fn lock(
        &self,
        tag: &str,
        patience: Duration,
        tell: &mut dyn FnMut(),
    ) -> Result<Option<File>> {
        let folder = self.cache.join(".locks").join(&self.name);
        make_folder(&folder)?;
        let path = folder.join(format!("{tag}.lock"));
        let mut options = File::options();
        options.create(true).truncate(false).write(true);
        let file = options.open(&path).map_err(Error::io(&path))?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                    return Ok(None);
                }
                Err(TryLockError::Error(e)) => return Err(Error::io(path)(e)),
                Err(TryLockError::WouldBlock) => {}
            }
            if started.elapsed() > patience {
                let problem = "another process has held it for too long; end that process";
                return Err(Error::bad(path, "lock", problem));
            }
            if started.elapsed() < LOOK {
                tell();
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Snapshot {
    /// The length of a file, or `None` where it is not there.
    pub(super) fn len_of(&self, name: &str) -> Result<Option<u64>> {
        // A folder that is a link could make every file of the machine a part of the model.
        if fs::symlink_metadata(&self.folder).is_ok_and(|meta| meta.is_symlink()) {
            return Err(Error::bad(
                &self.folder,
                "link",
                "is to be a folder; delete it",
            ));
        }
        let own = self.repo.own(&self.folder.join(name))?;
        Ok(own.map(|(_, len)| len))
    }

    /// The files without which the model cannot be loaded, as far as they are not there.
    pub(super) fn missing(&self) -> Result<Vec<String>> {
        let mut out = Vec::new();
        for name in REQUIRED {
            if self.len_of(name)?.is_none() {
                out.push(name.to_owned());
            }
        }
        if self.len_of(SINGLE)?.is_some() {
            return Ok(out);
        }
        if self.len_of(INDEX)?.is_none() {
            out.push(SINGLE.to_owned());
            return Ok(out);
        }
        for name in self.shards()? {
            if self.len_of(&name)?.is_none() {
                out.push(name);
            }
        }
        Ok(out)
    }

    /// The weight files that the index names, in order.
    pub(super) fn shards(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }

        let path = self.folder.join(INDEX);
        let bytes = read_bounded(&path, MAX_INDEX)?;
        let index: Index =
            serde_json::from_slice(&bytes).map_err(|e| Error::bad(&path, "JSON", e.to_string()))?;
        let names: BTreeSet<String> = index.weight_map.into_values().collect();
        if names.is_empty() || names.len() > MAX_SHARDS {
            let problem = format!("names {} files, not 1 to {MAX_SHARDS}", names.len());
            return Err(Error::bad(path, "weight_map", problem));
        }
        if let Some(name) = names.iter().find(|name| !is_shard(name)) {
            let shown: String = name.chars().take(80).collect();
            let problem = format!("{shown:?} is not the plain name of a .safetensors file");
            return Err(Error::bad(path, "weight_map", problem));
        }
        Ok(names.into_iter().collect())
    }

    /// Whether it is known of every file that is read where it exists, whether it does.
    pub(super) fn is_settled(&self) -> Result<bool> {
        let absent = self.repo.folder.join(".no_exist").join(&self.commit);
        for name in OPTIONAL {
            if self.len_of(name)?.is_none() && !absent.join(name).exists() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A model in the cache.
#[derive(Clone, Debug)]
pub struct CachedModel {
    /// `owner/name`; very old ones have no owner.
    pub id: String,
    /// Bytes of all its files, those of unfinished downloads too.
    pub bytes: u64,
    /// Its commits, in the order of their ids.
    pub snapshots: Vec<CachedSnapshot>,
}

/// One commit of a model in the cache.
#[derive(Clone, Debug)]
pub struct CachedSnapshot {
    /// Its id.
    pub commit: String,
    /// The branches and tags that were at it when they were last asked for.
    pub revisions: Vec<String>,
    /// The folder that is the model's directory.
    pub folder: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// The files without which it cannot be loaded; empty if it is complete.
    pub missing: Vec<String>,
    /// What is wrong with it, besides.
    pub problem: Option<String>,
    /// `model_type` of its `config.json`.
    pub model_type: Option<String>,
}

/// The models in a cache, by name; none where there is no cache.
///
/// # Errors
/// If a folder cannot be read. A damaged model is listed with its problem.
pub fn list(cache: &Path) -> Result<Vec<CachedModel>> {
    let mut out = Vec::new();
    for folder in names_in(cache)? {
        let Some(id) = id_of(&folder) else {
            continue;
        };
        let repo = Repo::in_folder(cache, folder);
        if !repo.folder.is_dir() {
            continue;
        }
        let mut refs = BTreeMap::new();
        revisions(&repo.folder.join("refs"), "", 0, &mut refs);
        let mut snapshots = Vec::new();
        for commit in names_in(&repo.folder.join("snapshots"))? {
            if is_commit(&commit) {
                let at = refs.iter().filter(|(_, at)| **at == commit);
                let revisions = at.map(|(name, _)| name.clone()).collect();
                snapshots.push(cached(&repo.snapshot(&commit), revisions));
            }
        }
        // Each content once; and files of snapshots that are no links.
        let mut bytes = 0;
        for name in names_in(&repo.folder.join("blobs"))? {
            let len = fs::metadata(repo.blob(&name)).map_or(0, |meta| meta.len());
            bytes += len;
        }
        for snapshot in &snapshots {
            for name in names_in(&snapshot.folder)? {
                let meta = fs::symlink_metadata(snapshot.folder.join(name));
                bytes += meta.map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
            }
        }
        out.push(CachedModel {
            id,
            bytes,
            snapshots,
        });
    }
    Ok(out)
}

fn cached(snapshot: &Snapshot, revisions: Vec<String>) -> CachedSnapshot {
    let (missing, problem) = match snapshot.missing() {
        Ok(missing) => (missing, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let names = names_in(&snapshot.folder).unwrap_or_default();
    let lens = names.iter().map(|name| snapshot.len_of(name));
    let bytes = lens.filter_map(|len| len.ok().flatten()).sum();
    CachedSnapshot {
        commit: snapshot.commit.clone(),
        revisions,
        folder: snapshot.folder.clone(),
        bytes,
        missing,
        problem,
        model_type: model_type(snapshot),
    }
}

fn model_type(snapshot: &Snapshot) -> Option<String> {
    #[derive(Deserialize)]
    struct Config {
        model_type: Option<String>,
    }

    snapshot.len_of("config.json").ok()??;
    let bytes = read_bounded(&snapshot.folder.join("config.json"), MAX_CONFIG).ok()?;
    let config: Config = serde_json::from_slice(&bytes).ok()?;
    config
        .model_type
        .map(|text| text.chars().take(80).collect())
}

/// Adds the references below a folder, with the commits that they are at; unreadable ones are left out.
fn revisions(folder: &Path, prefix: &str, depth: usize, out: &mut BTreeMap<String, String>) {
    for name in names_in(folder).unwrap_or_default() {
        let (path, text) = (folder.join(&name), format!("{prefix}{name}"));
        let meta = fs::symlink_metadata(&path);
        if meta.is_ok_and(|meta| meta.is_dir()) {
            if depth < MAX_DEPTH {
                revisions(&path, &format!("{text}/"), depth + 1, out);
            }
        } else if let (Some(_), Ok(Some(commit))) = (Revision::parse(&text), read_ref(&path)) {
            out.insert(text, commit);
        }
    }
}

/// The commit in the file of a reference.
fn read_ref(path: &Path) -> Result<Option<String>> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Err(Error::bad(path, "file", "is not a regular file; delete it")),
        Err(e) if is_absent(&e) => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
    }
    let bytes = read_bounded(path, 1 << 10)?;
    let text = String::from_utf8_lossy(&bytes);
    if is_commit(text.trim()) {
        Ok(Some(text.trim().to_owned()))
    } else {
        Err(Error::bad(path, "commit", "holds no commit; delete it"))
    }
}

/// The bytes of a file that has at most `max`.
fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(max + 1).read_to_end(&mut bytes))
        .map_err(Error::io(path))?;
    if bytes.len() as u64 > max {
        return Err(Error::bad(path, "length", format!("is over {max} bytes")));
    }
    Ok(bytes)
}

/// The names in a folder in order, those that are no text left out; none where there is no folder.
fn names_in(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if is_absent(&e) => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(folder)(e)),
    };
    let mut out = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io(folder))?.file_name();
        out.extend(name.into_string());
    }
    out.sort_unstable();
    Ok(out)
}

/// Makes a folder and those above it.
pub(super) fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io(path))
}

/// A path in `folder` that no other thread or process takes.
fn unique(folder: &Path, name: &str) -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);

    let (id, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    folder.join(format!(".{name}.{id}-{n}.new"))
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_links_a_snapshot_holds_the_content_itself() {
        let cache = tempfile::tempdir().expect("a folder");
        let id = RepoId::parse("a/b").expect("an id");
        let (repo, commit) = (Repo::new(cache.path(), &id), "c".repeat(40));
        fs::create_dir_all(repo.folder.join("blobs")).expect("made");
        fs::write(repo.blob("t"), "text").expect("written");
        let none = |_: &Path, _: &Path| Err(ErrorKind::PermissionDenied.into());
        repo.place_by(&commit, "config.json", "t", none)
            .expect("placed");
        let snapshot = repo.snapshot(&commit);
        assert_eq!(snapshot.len_of("config.json").expect("own"), Some(4));
        assert!(!repo.blob("t").exists(), "it is on disk once");
        let full = |_: &Path, _: &Path| Err(ErrorKind::StorageFull.into());
        let error = repo.place_by(&commit, "x.json", "t", full);
        assert!(matches!(error, Err(Error::Io { .. })), "{error:?}");
    }

    #[test]
    fn a_lock_is_held_by_one() {
        let cache = tempfile::tempdir().expect("a folder");
        let repo = Repo::new(cache.path(), &RepoId::parse("a/b").expect("an id"));
        let take = |told: &mut usize| repo.lock("t", Duration::ZERO, &mut || *told += 1);
        let mut told = 0;
        let held = take(&mut told).expect("free");
        assert!(held.is_some(), "this file system has locks");
        let error = take(&mut told).expect_err("held").to_string();
        assert!(error.contains("t.lock"), "{error}");
        drop(held);
        assert!(take(&mut told).is_ok(), "free again");
    }
}
