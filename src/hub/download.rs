//! One file from the hub: resumed where it stopped, held to its length and hash, whole or not at all.
//!
//! Invariant: what is under a content's name has passed the check of [`verify`]; until then it is under
//! `<tag>.incomplete`, which the next attempt, this process's or another's, goes on with.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::Watch;
use super::cache::{Repo, make_folder};
use super::name::is_hex;
use super::remote::{About, Failure, Remote, number, read_piece, text};
use crate::{Error, Result};

/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;

/// Downloads a content that the caller holds the lock of; `done` bytes are there of what was to come before it.
pub(super) fn download(
    remote: &Remote<'_>,
    repo: &Repo,
    commit: &str,
    about: &About,
    done: u64,
    watch: &mut dyn Watch,
) -> Result<()> {
    let path = repo.blob(&about.tag);
    if let Some(folder) = path.parent() {
        make_folder(folder)?;
    }
    let mut part = Part::open(incomplete(&path), about)?;
    let mut resumed = part.have > 0;
    loop {
        let mut attempts = remote.attempts();
        watch.at(done + part.have);
        while part.have < about.size {
            let before = part.have;
            let Err(failure) = part.go_on(remote, commit, about, &mut |n| watch.at(done + n))
            else {
                continue;
            };
            if part.have.saturating_sub(before) >= remote.limits().progress {
                attempts.renew();
            }
            attempts.next(failure, &mut |text| watch.note(text))?;
        }
        part.file.sync_all().map_err(Error::io(&part.path))?;
        match verify(&part.path, about)? {
            None => break,
            Some(problem) => {
                part.restart()?;
                let problem = format!("{}: {problem}", about.name);
                if !resumed {
                    // Nothing of it is worth keeping.
                    let _ = fs::remove_file(&part.path);
                    return Err(remote.error(problem));
                }
                watch.note(&format!("{problem}; what was there before is thrown away"));
                resumed = false;
            }
        }
    }
    let Part {
        path: from, file, ..
    } = part;
    // An open file cannot be renamed everywhere.
    drop(file);
    fs::rename(&from, &path).map_err(Error::io(path))
}

/// Where a content is while it is not whole.
fn incomplete(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    PathBuf::from(name)
}

/// A content that is not whole yet.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
    have: u64,
}

impl Part {
    fn open(path: PathBuf, about: &About) -> Result<Self> {
        // A link here would let the cache write elsewhere.
        if fs::symlink_metadata(&path).is_ok_and(|meta| !meta.is_file()) {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        let mut options = File::options();
        options.create(true).truncate(false).read(true).write(true);
        let mut file = options.open(&path).map_err(Error::io(&path))?;
        let have = file.seek(SeekFrom::End(0)).map_err(Error::io(&path))?;
        let mut part = Self { path, file, have };
        if part.have > about.size {
            part.restart()?;
        }
        Ok(part)
    }

    /// Throws away what is there.
    fn restart(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
        emptied.map_err(Error::io(&self.path))?;
        self.have = 0;
        Ok(())
    }

    /// One attempt to bring the rest.
    fn go_on(
        &mut self,
        remote: &Remote<'_>,
        commit: &str,
        about: &About,
        at: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let About { name, size, .. } = about;
        let again = |what: String| Failure::Passing(format!("{name}: {what}"), None);
        let mut response = remote.bytes(commit, name, self.have)?;
        let status = response.status().as_u16();
        if status == 200 && self.have > 0 {
            // It was asked for a range, but sends all.
            self.restart()?;
            at(0);
        }
        if status == 206 {
            let range = text(response.headers(), "content-range");
            if !range
                .as_ref()
                .is_some_and(|range| is_rest(range, self.have, *size))
            {
                self.restart()?;
                return Err(again(format!(
                    "another range than was asked for ({range:?})"
                )));
            }
        }
        if status == 416 {
            self.restart()?;
            return Err(again("there is no such range".to_owned()));
        }
        let announced = number(response.headers(), "content-length");
        if let Some(announced) = announced.filter(|n| *n != size - self.have) {
            let expected = size - self.have;
            return Err(again(format!(
                "{announced} bytes are announced, and {expected} are to come"
            )));
        }

        let mut body = response.body_mut().as_reader();
        let mut piece = vec![0; PIECE];
        let limits = remote.limits();
        let (mut since, mut mark) = (Instant::now(), self.have);
        loop {
            let n = read_piece(&mut body, &mut piece)
                .map_err(|e| again(format!("{e}, after {} of {size} bytes", self.have)))?;
            if n == 0 && self.have == *size {
                return Ok(());
            }
            if n == 0 {
                return Err(again(format!("ends after {} of {size} bytes", self.have)));
            }
            if n as u64 > size - self.have {
                self.restart()?;
                at(0);
                return Err(again(format!("is longer than its {size} bytes")));
            }
            self.file
                .write_all(&piece[..n])
                .map_err(|e| Failure::Final(Error::io(&self.path)(e)))?;
            self.have += n as u64;
            at(self.have);
            if since.elapsed() >= limits.stall {
                if self.have - mark < limits.crawl && self.have < *size {
                    return Err(again(format!(
                        "hardly moves, after {} of {size} bytes",
                        self.have
                    )));
                }
                (since, mark) = (Instant::now(), self.have);
            }
        }
    }
}

/// Whether a `Content-Range` is `bytes <from>-<size - 1>/<size>`; the size may be left open.
fn is_rest(range: &str, from: u64, size: u64) -> bool {
    let Some((span, total)) = range
        .strip_prefix("bytes ")
        .and_then(|range| range.split_once('/'))
    else {
        return false;
    };
    let whole = format!("{from}-{}", size.saturating_sub(1));
    span == whole && (total == "*" || total == size.to_string())
}

/// What is wrong with a downloaded file: by its length, and by its hash where the tag is one.
fn verify(path: &Path, about: &About) -> Result<Option<String>> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let len = file.metadata().map_err(Error::io(path))?.len();
    if len != about.size {
        return Ok(Some(format!("has {len} bytes, not {}", about.size)));
    }
    let tag = &about.tag;
    let hash = if is_hex(tag, 64) {
        hashed::<Sha256>(&mut file, &[])
    } else if is_hex(tag, 40) {
        hashed::<Sha1>(&mut file, format!("blob {len}\0").as_bytes())
    } else {
        log::warn!(
            "{}: the hub gives no hash of it (its tag is {tag:?}); only its length is checked",
            about.name
        );
        return Ok(None);
    };
    let hash = hash.map_err(Error::io(path))?;
    Ok((hash != *tag).then(|| format!("its hash is {hash}, and the hub announced {tag}")))
}

/// The hash of a prefix and a file, in hex.
fn hashed<D: Digest>(file: &mut File, prefix: &[u8]) -> std::io::Result<String> {
    use std::fmt::Write as _;

    let mut hash = D::new_with_prefix(prefix);
    let mut piece = vec![0; PIECE];
    loop {
        let n = file.read(&mut piece)?;
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_the_rest_of_the_file() {
        assert!(is_rest("bytes 3-9/10", 3, 10));
        assert!(is_rest("bytes 3-9/*", 3, 10));
        for other in [
            "bytes 0-9/10",
            "bytes 3-8/10",
            "bytes 3-9/11",
            "bytes */10",
            "3-9/10",
            "",
        ] {
            assert!(!is_rest(other, 3, 10), "{other}");
        }
    }

    #[test]
    fn tags_are_hashes_of_contents() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x");
        fs::write(&path, "hello\n").expect("written");
        let problem = |tag: &str, size| {
            let about = About {
                name: "x".to_owned(),
                tag: tag.to_owned(),
                size,
            };
            verify(&path, &about).expect("read")
        };
        // `git hash-object`, `sha256sum`.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(problem(git, 6), None);
        assert_eq!(problem(sha, 6), None);
        assert_eq!(problem("v1", 6), None, "only the length is known");
        assert!(problem(&git.replace('c', "d"), 6).is_some(), "another hash");
        assert!(problem(&sha.replace('5', "6"), 6).is_some(), "another hash");
        assert!(problem(sha, 7).is_some(), "another length");
    }
}
