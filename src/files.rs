//! The files of a folder that came from elsewhere.
//!
//! Invariant: nothing outside of the folder is read, and nothing is waited for.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The regular file that `dir/name` means, or `None` where there is none.
///
/// A link is followed only in the layout of the Hugging Face cache, `snapshots/<revision>/name`,
/// and only to a content of that repository: a folder that was unpacked from elsewhere must not
/// be able to name other files of the machine.
pub(crate) fn find(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    let path = dir.join(name);
    let meta = match fs::symlink_metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
    };
    if meta.is_symlink() {
        let Ok(target) = fs::canonicalize(&path) else {
            return Err(Error::bad(
                path,
                "link",
                "leads to a file that is not there",
            ));
        };
        if !is_content(dir, &target) {
            return Err(Error::bad(
                path,
                "link",
                "leads outside of the model's own repository; put the file itself here",
            ));
        }
        let meta = fs::metadata(&target).map_err(Error::io(&target))?;
        return regular(path, &meta).map(Some);
    }
    regular(path, &meta).map(Some)
}

// Opening a pipe would wait for ever, so the kind is looked at before.
fn regular(path: PathBuf, meta: &fs::Metadata) -> Result<PathBuf> {
    if meta.is_file() {
        Ok(path)
    } else {
        Err(Error::bad(path, "file", "is not a regular file"))
    }
}

/// Whether `dir` is a snapshot in the Hugging Face cache, and `target` a content of its repository,
/// `blobs/<tag>`, or of the store that its newer versions share between repositories,
/// `<cache>/blobs/<2 digits>/<64 digits>`.
fn is_content(dir: &Path, target: &Path) -> bool {
    let is_in =
        |folder: PathBuf| fs::canonicalize(folder).is_ok_and(|f| target.parent() == Some(&f));
    let Ok(dir) = fs::canonicalize(dir) else {
        return false;
    };
    let snapshots = dir.parent().filter(|s| s.ends_with("snapshots"));
    let Some(repo) = snapshots.and_then(Path::parent) else {
        return false;
    };
    let name = target.file_name().and_then(|name| name.to_str());
    let digits = |name: &&str| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let shared = name.filter(digits).zip(repo.parent());
    is_in(repo.join("blobs"))
        || shared.is_some_and(|(name, cache)| is_in(cache.join("blobs").join(&name[..2])))
}

/// The bytes of a small file, or `None` where there is none.
pub(crate) fn read_small(dir: &Path, name: &str, max: u64) -> Result<Option<(PathBuf, Vec<u8>)>> {
    let Some(path) = find(dir, name)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    File::open(&path)
        .map_err(Error::io(&path))?
        .take(max + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(&path))?;
    if bytes.len() as u64 > max {
        let problem = format!("is larger than {max} bytes, which no model needs");
        return Err(Error::bad(path, "file length", problem));
    }
    Ok(Some((path, bytes)))
}
