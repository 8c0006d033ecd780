//! Where the cache is, whom to ask, and for how long: the variables of `huggingface_hub`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

/// The hub of everybody.
const HUB: &str = "https://huggingface.co";

/// What a hub is asked with, and what is done with its answers.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder that holds the folders of the repositories.
    pub cache: PathBuf,
    /// URL of the hub, without a slash at its end.
    pub endpoint: String,
    /// Who asks; sent to the endpoint itself and to nobody else.
    pub token: Option<Token>,
    /// Whether nobody may be asked: what is not in the cache is missing.
    pub offline: bool,
    /// Whether the proxies that the environment names are used.
    pub proxy: bool,
    /// How long and how much is waited for.
    pub limits: Limits,
}

/// A secret, which no message and no log repeats.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token that a text is, without space around it: visible ASCII characters.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let fits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        fits.then(|| Self(text.to_owned()))
    }

    /// The value of the header `Authorization`.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Bounds of a conversation.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time to reach a host.
    pub connect: Duration,
    /// Time for a whole answer that is not a file.
    pub answer: Duration,
    /// Time without [`Limits::crawl`] new bytes after which a download is stalled.
    pub stall: Duration,
    /// Bytes within [`Limits::stall`] below which a download is stalled.
    pub crawl: u64,
    /// Attempts of a request; one that brings [`Limits::progress`] bytes of a file does not count.
    pub tries: u32,
    /// Bytes of a file that make an attempt worth as many more.
    pub progress: u64,
    /// Time before the second attempt; doubled before each later one.
    pub wait: Duration,
    /// The longest time between two attempts, also if the hub asks for more.
    pub longest_wait: Duration,
    /// Redirections of one request.
    pub redirects: usize,
    /// Bytes of a listing of files.
    pub listing: u64,
    /// Time to wait for another process that downloads the same file.
    pub lock: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(60),
            stall: Duration::from_secs(30),
            crawl: 1 << 10,
            tries: 5,
            progress: 1 << 20,
            wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(300),
            redirects: 10,
            listing: 32 << 20,
            lock: Duration::from_secs(3600),
        }
    }
}

impl Settings {
    /// As the environment says, with the variables of `huggingface_hub`:
    ///
    /// * cache: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `hub` in `HF_HOME`, else in
    ///   `$XDG_CACHE_HOME/huggingface`, else in `~/.cache/huggingface`;
    /// * endpoint: `HF_ENDPOINT`, else `https://huggingface.co`;
    /// * token: `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the file that `hf auth login` writes
    ///   (`HF_TOKEN_PATH`, else `token` in `HF_HOME`);
    /// * offline: `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`.
    ///
    /// # Errors
    /// [`Error::Usage`] if a variable cannot be what it says, and if no home directory is known;
    /// [`Error::Io`] if the file of the token cannot be read.
    pub fn from_env() -> Result<Self> {
        Self::read(|name| std::env::var_os(name).and_then(|v| v.into_string().ok()))
    }

    /// As [`Self::from_env`], with another environment.
    ///
    /// # Errors
    /// As [`Self::from_env`].
    pub fn read(env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        // An empty variable is one that is not set.
        let get = |name: &str| env(name).filter(|value| !value.trim().is_empty());
        let home = || {
            get("HOME")
                .or_else(|| get("USERPROFILE"))
                .map(PathBuf::from)
        };
        let path = |name: &str| {
            get(name).map(|value| match (value.strip_prefix('~'), home()) {
                (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with(['/', '\\']) => {
                    home.join(rest.trim_start_matches(['/', '\\']))
                }
                _ => PathBuf::from(value),
            })
        };
        let hf_home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| home().map(|home| home.join(".cache").join("huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| hf_home.as_ref().map(|home| home.join("hub")))
            .ok_or_else(|| {
                Error::Usage("no home directory is known; set HF_HOME to a folder".to_owned())
            })?;
        let token = match get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")) {
            Some(text) => Some(Token::parse(&text).ok_or_else(|| {
                let problem = "HF_TOKEN holds characters that no token has";
                Error::Usage(problem.to_owned())
            })?),
            None => path("HF_TOKEN_PATH")
                .or_else(|| hf_home.map(|home| home.join("token")))
                .map_or(Ok(None), |path| token_of(&path))?,
        };
        let yes = |name: &str| {
            let value = get(name).map(|value| value.trim().to_ascii_uppercase());
            value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str()))
        };
        Ok(Self {
            cache,
            endpoint: endpoint(get("HF_ENDPOINT").as_deref().unwrap_or(HUB))?,
            token,
            offline: yes("HF_HUB_OFFLINE") || yes("TRANSFORMERS_OFFLINE"),
            proxy: true,
            limits: Limits::default(),
        })
    }
}

/// The token in a file, if there is one.
fn token_of(path: &Path) -> Result<Option<Token>> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Token::parse(&text).map(Some).ok_or_else(|| {
            let problem = "holds characters that no token has; write it anew, or delete it";
            Error::bad(path, "token", problem)
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => Ok(None),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// A URL that paths can be appended to.
fn endpoint(text: &str) -> Result<String> {
    let url = text.trim().trim_end_matches('/');
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"));
    let fits = rest.is_some_and(|rest| {
        !rest.is_empty()
            && !rest.starts_with('/')
            && rest.bytes().all(|b| b.is_ascii_graphic())
            && !rest.contains(['?', '#', '@', '\\', '"', '<', '>'])
    });
    if fits {
        Ok(url.to_owned())
    } else {
        // It may hold a password, so it is not repeated.
        let problem = "HF_ENDPOINT is not the URL of a hub, like https://huggingface.co: a scheme, a host, \
                       perhaps a path, and no user, query or fragment";
        Err(Error::Usage(problem.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(env: &[(&str, &str)]) -> Result<Settings> {
        Settings::read(|name| {
            let value = env.iter().find(|(key, _)| *key == name);
            value.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_cache_is_where_everybody_has_it() {
        let home = ("HOME", "/h");
        let xdg = ("XDG_CACHE_HOME", "/x");
        for (env, cache) in [
            (vec![home], "/h/.cache/huggingface/hub"),
            (vec![home, xdg], "/x/huggingface/hub"),
            (vec![home, xdg, ("HF_HOME", "/f")], "/f/hub"),
            (vec![home, ("HF_HOME", "~/f")], "/h/f/hub"),
            (vec![home, ("HF_HOME", "~")], "/h/hub"),
            (vec![home, ("HF_HOME", "~x")], "~x/hub"),
            (vec![home, ("HF_HOME", "")], "/h/.cache/huggingface/hub"),
            (
                vec![("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/o")],
                "/o",
            ),
            (
                vec![
                    ("HF_HOME", "/f"),
                    ("HUGGINGFACE_HUB_CACHE", "/o"),
                    ("HF_HUB_CACHE", "/c"),
                ],
                "/c",
            ),
        ] {
            let settings = read(&env).expect("settings");
            assert_eq!(settings.cache, Path::new(cache), "{env:?}");
            assert_eq!(settings.endpoint, HUB);
            assert_eq!((settings.token, settings.offline), (None, false));
        }
        assert!(matches!(read(&[]), Err(Error::Usage(_))), "no home");
    }

    #[test]
    fn offline_is_what_hugging_face_takes_for_true() {
        for (value, offline) in [
            ("1", true),
            ("true", true),
            ("Yes", true),
            ("ON", true),
            ("0", false),
            ("", false),
            ("false", false),
        ] {
            for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
                let settings = read(&[("HOME", "/h"), (name, value)]).expect("settings");
                assert_eq!(settings.offline, offline, "{name}={value}");
            }
        }
    }

    #[test]
    fn a_token_is_found_and_never_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("token");
        std::fs::write(&file, "hf_file\n").expect("written");
        let home = folder.path().to_str().expect("utf-8");
        let token = |env: &[(&str, &str)]| read(env).expect("settings").token;
        assert_eq!(token(&[("HF_HOME", home)]), Token::parse("hf_file"));
        assert_eq!(
            token(&[("HF_HOME", home), ("HF_TOKEN", " hf_env ")]),
            Token::parse("hf_env")
        );
        let elsewhere = [
            ("HF_HOME", "/nowhere"),
            ("HF_TOKEN_PATH", file.to_str().expect("utf-8")),
        ];
        assert_eq!(token(&elsewhere), Token::parse("hf_file"));
        let settings = read(&[("HF_HOME", home)]).expect("settings");
        assert!(!format!("{settings:?}").contains("hf_file"), "a secret");

        let bad = read(&[("HOME", "/h"), ("HF_TOKEN", "hf_a\r\nX: y")]).expect_err("bad");
        assert!(!bad.to_string().contains("hf_a"), "a secret: {bad}");
        std::fs::write(&file, "two words").expect("written");
        let bad = read(&[("HF_HOME", home)]).expect_err("bad");
        assert!(bad.to_string().contains("token"), "{bad}");
    }

    #[test]
    fn an_endpoint_is_a_plain_url() {
        let of = |url| read(&[("HOME", "/h"), ("HF_ENDPOINT", url)]).map(|s| s.endpoint);
        assert_eq!(
            of("http://[::1]:80/hf//").expect("one"),
            "http://[::1]:80/hf"
        );
        for bad in [
            "huggingface.co",
            "ftp://x",
            "https://",
            "https:///x",
            "https://u:p@x",
            "https://x?y",
            "https://x y",
        ] {
            let error = of(bad).expect_err(bad).to_string();
            assert!(
                error.contains("HF_ENDPOINT") && !error.contains("u:p"),
                "{error}"
            );
        }
    }
}
