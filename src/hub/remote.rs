//! A hub over HTTP: what a repository holds, what each file is, and its bytes.
//!
//! Invariants: the token goes to the endpoint's own scheme, host and port and nowhere else, whatever an answer
//! says; an encrypted conversation never goes on unencrypted; every wait, answer and number of attempts has
//! a bound from [`Limits`].

use std::io::{self, Read as _};
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

use super::name::{RepoId, Revision, escaped, is_commit, is_tag};
use super::settings::{Limits, Settings};
use crate::{Error, Result};

/// One repository of a hub.
#[derive(Debug)]
pub(super) struct Remote<'a> {
    settings: &'a Settings,
    id: &'a RepoId,
    agent: Agent,
    /// Attempts of a request.
    tries: u32,
}

/// The files of a commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) names: Vec<String>,
}

/// What a hub says of one file.
#[derive(Clone, Debug)]
pub(super) struct About {
    pub(super) name: String,
    /// The content's name: its SHA-256 for large files, git's SHA-1 of it for small ones.
    pub(super) tag: String,
    pub(super) size: u64,
}

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The next one may not; the hub may say how long to wait.
    Passing(String, Option<Duration>),
    /// No other will do better.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Counts the attempts of one request, and waits between them.
#[derive(Debug)]
pub(super) struct Attempts<'a> {
    id: &'a RepoId,
    limits: Limits,
    left: u32,
    wait: Duration,
}

impl<'a> Attempts<'a> {
    fn new(id: &'a RepoId, limits: Limits, tries: u32) -> Self {
        Self {
            id,
            limits,
            left: tries.saturating_sub(1),
            wait: limits.wait,
        }
    }

    /// After an attempt that brought a good piece: as many more.
    pub(super) fn renew(&mut self) {
        self.left = self.left.max(self.limits.tries);
        self.wait = self.limits.wait;
    }

    /// Waits for the next attempt.
    ///
    /// # Errors
    /// If there is none, or if the hub asks for too long a wait.
    pub(super) fn next(&mut self, failure: Failure, note: &mut dyn FnMut(&str)) -> Result<()> {
        let (problem, asked) = match failure {
            Failure::Passing(problem, asked) => (problem, asked),
            Failure::Final(error) => return Err(error),
        };
        let longest = self.limits.longest_wait;
        if self.left == 0 {
            return Err(hub_error(self.id, problem));
        }
        if let Some(asked) = asked.filter(|asked| *asked > longest) {
            let problem = format!("{problem}, and asks to wait {} s", asked.as_secs());
            return Err(hub_error(self.id, problem));
        }
        let wait = asked.unwrap_or(Duration::ZERO).max(self.wait.min(longest));
        self.left -= 1;
        self.wait = self.wait.saturating_mul(2);
        note(&format!("{problem}; again in {:.0?}", wait));
        std::thread::sleep(wait);
        Ok(())
    }
}

/// An [`Error::Hub`] of a repository.
pub(super) fn hub_error(id: &RepoId, problem: impl Into<String>) -> Error {
    Error::Hub {
        what: id.to_string(),
        problem: problem.into(),
    }
}

impl<'a> Remote<'a> {
    /// Opens no connection yet.
    pub(super) fn new(settings: &'a Settings, id: &'a RepoId, tries: u32) -> Self {
        let limits = &settings.limits;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here, where it is known who may see the token.
            .max_redirects(0)
            .user_agent(concat!("hogwild/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(limits.connect))
            .timeout_connect(Some(limits.connect))
            .timeout_recv_response(Some(limits.stall))
            .timeout_per_read(Some(limits.stall))
            .timeout_per_write(Some(limits.stall));
        if !settings.proxy {
            config = config.proxy(None);
        }
        Self {
            settings,
            id,
            agent: config.build().new_agent(),
            tries,
        }
    }

    pub(super) fn attempts(&self) -> Attempts<'a> {
        Attempts::new(self.id, self.settings.limits, self.tries)
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> Error {
        hub_error(self.id, problem)
    }

    fn with_attempts<T>(
        &self,
        note: &mut dyn FnMut(&str),
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T> {
        let mut attempts = self.attempts();
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => attempts.next(failure, note)?,
            }
        }
    }

    /// The commit that a revision is at, and its files.
    pub(super) fn listing(
        &self,
        revision: &Revision,
        note: &mut dyn FnMut(&str),
    ) -> Result<Listing> {
        #[derive(Deserialize)]
        struct Model {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }

        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }

        let (endpoint, id) = (&self.settings.endpoint, self.id);
        let revision_part = escaped(revision.as_str());
        let url = format!("{endpoint}/api/models/{id}/revision/{revision_part}");
        let most = self.settings.limits.listing;
        let bytes = self.with_attempts(note, || {
            let (mut response, linked) = self.ask("GET", &url, None)?;
            self.check(&response, &linked, revision)?;
            let body = response.body_mut().with_config().limit(most);
            body.read_to_vec().map_err(|error| match error {
                ureq::Error::BodyExceedsLimit(_) => {
                    let problem = format!("the listing of its files is over {most} bytes");
                    Failure::Final(self.error(problem))
                }
                other => self.failure(other, &url),
            })
        })?;
        let model: Model = serde_json::from_slice(&bytes).map_err(|e| {
            self.error(format!(
                "{endpoint} does not answer as a hub does ({e}); is it one, or a login page before it?"
            ))
        })?;
        if !is_commit(&model.sha) {
            return Err(self.error(format!("{endpoint} names no commit of {revision}")));
        }
        Ok(Listing {
            commit: model.sha,
            names: model.siblings.into_iter().map(|s| s.rfilename).collect(),
        })
    }

    /// Where a file of a commit is.
    pub(super) fn url(&self, commit: &str, name: &str) -> String {
        let (endpoint, id) = (&self.settings.endpoint, self.id);
        format!("{endpoint}/{id}/resolve/{commit}/{}", escaped(name))
    }

    /// What the hub says of a file of a commit.
    pub(super) fn about(
        &self,
        commit: &str,
        name: &str,
        note: &mut dyn FnMut(&str),
    ) -> Result<About> {
        let url = self.url(commit, name);
        let revision = Revision::parse(commit).unwrap_or_default();
        let (headers, linked) = self.with_attempts(note, || {
            let (response, linked) = self.ask("HEAD", &url, None)?;
            self.check(&response, &linked, &revision)?;
            Ok((response.headers().clone(), linked))
        })?;
        let says = linked.commit.or_else(|| text(&headers, "x-repo-commit"));
        if says.is_some_and(|says| says != commit) {
            return Err(self.error(format!("{name} is of another commit than was asked for")));
        }
        let tag = linked.tag.or_else(|| text(&headers, "etag"));
        let tag = tag.map(|tag| {
            let tag = tag.strip_prefix("W/").unwrap_or(&tag);
            tag.trim_matches('"').to_owned()
        });
        let size = linked.size.or_else(|| number(&headers, "content-length"));
        match (tag, size) {
            (Some(tag), Some(size)) if is_tag(&tag) => Ok(About {
                name: name.to_owned(),
                tag,
                size,
            }),
            (tag, size) => Err(self.error(format!(
                "the hub does not say what {name} is: its tag is {}, its length {}",
                tag.map_or("missing".to_owned(), |tag| format!("{:?}", short(&tag))),
                size.map_or("missing".to_owned(), |size| size.to_string()),
            ))),
        }
    }

    /// Asks for the bytes of a file from `from` on. The answer has status 200, 206 or 416.
    pub(super) fn bytes(
        &self,
        commit: &str,
        name: &str,
        from: u64,
    ) -> Result<Response<Body>, Failure> {
        let url = self.url(commit, name);
        let (response, linked) = self.ask("GET", &url, Some(from))?;
        if response.status() != 416 {
            let revision = Revision::parse(commit).unwrap_or_default();
            self.check(&response, &linked, &revision)?;
        }
        Ok(response)
    }

    /// Sends a request and follows where it is sent on to. `from` is the first byte of a file that is wanted;
    /// without it the whole answer has a time limit.
    fn ask(
        &self,
        method: &str,
        url: &str,
        from: Option<u64>,
    ) -> Result<(Response<Body>, Linked), Failure> {
        let bad = |url: &str| self.error(format!("{} is no URL", shown_url(url)));
        let mut at: Uri = url.parse().map_err(|_| bad(url))?;
        let mut linked = Linked::default();
        for _ in 0..=self.settings.limits.redirects {
            let request = match method {
                "HEAD" => self.agent.head(at.clone()),
                _ => self.agent.get(at.clone()),
            };
            let time = from.is_none().then_some(self.settings.limits.answer);
            let mut request = request.config().timeout_per_call(time).build();
            if let Some(from) = from.filter(|from| *from > 0) {
                request = request.header("range", format!("bytes={from}-"));
            }
            let here = at.to_string();
            linked.own = self.is_endpoint(&at);
            linked.from = shown_url(&here);
            if linked.own
                && let Some(token) = &self.settings.token
            {
                request = request.header("authorization", token.header());
            }
            let response = request.call().map_err(|e| self.failure(e, &here))?;
            if linked.own {
                linked.add(response.headers());
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, linked));
            }
            let Some(to) = text(response.headers(), "location") else {
                let problem = format!("{} leads nowhere", shown_url(&here));
                return Err(self.error(problem).into());
            };
            let next = resolve(&at, &to).ok_or_else(|| {
                let (here, to) = (shown_url(&here), shown_url(&to));
                self.error(format!("{here} leads to {to}, where nothing may be asked"))
            })?;
            // Where large files are need not answer to HEAD; what counts is said already.
            if method == "HEAD" && linked.is_whole() && !self.is_endpoint(&next) {
                return Ok((response, linked));
            }
            at = next;
        }
        let problem = format!("{} is sent on without an end", shown_url(url));
        Err(self.error(problem).into())
    }

    /// Whether a URL has the endpoint's scheme, host and port.
    fn is_endpoint(&self, url: &Uri) -> bool {
        let endpoint: Option<Uri> = self.settings.endpoint.parse().ok();
        endpoint.is_some_and(|endpoint| origin(&endpoint) == origin(url))
    }

    /// Judges the status of an answer.
    fn check(
        &self,
        response: &Response<Body>,
        linked: &Linked,
        revision: &Revision,
    ) -> Result<(), Failure> {
        let (endpoint, id) = (&self.settings.endpoint, self.id);
        let headers = response.headers();
        let (status, from) = (response.status().as_u16(), &linked.from);
        let code = text(headers, "x-error-code").unwrap_or_default();
        let problem = match status {
            200 | 206 | 301..=303 | 307 | 308 => return Ok(()),
            408 | 429 | 500 | 502 | 503 | 504 => {
                let wait = number(headers, "retry-after").map(Duration::from_secs);
                let what = format!("{} answers with status {status}", from);
                return Err(Failure::Passing(what, wait));
            }
            // The address of a large file is valid for a while only; the next attempt gets another.
            401 | 403 if !linked.own => {
                let what = format!("{from} answers with status {status}");
                return Err(Failure::Passing(what, None));
            }
            401 | 403 if self.settings.token.is_none() => format!(
                "{endpoint} gives it to nobody unknown (status {status}): check the name; if the model is gated \
                 or private, accept its licence at {endpoint}/{id} and set HF_TOKEN"
            ),
            401 => format!(
                "{endpoint} does not take the token (status 401): set HF_TOKEN to a valid one that may read \
                 {id}, and check the name"
            ),
            403 => format!(
                "the token may not read it (status 403): accept the model's licence at {endpoint}/{id} with the \
                 token's account, and give the token the right to read gated models"
            ),
            404 if code == "RevisionNotFound" => {
                format!("has no revision {revision}; see --revision")
            }
            404 if code == "EntryNotFound" => {
                format!("{} is not there", from)
            }
            404 => format!(
                "{endpoint} has no such model or no revision {revision} of it (status 404); check both names"
            ),
            _ => format!("{} answers with status {status}", from),
        };
        Err(self.error(problem).into())
    }

    /// Whether to try again after an error of the connection.
    pub(super) fn failure(&self, error: ureq::Error, url: &str) -> Failure {
        use ureq::Error as Http;

        let what = format!("{}: {error}", shown_url(url));
        match error {
            Http::Io(ref e) if e.kind() == io::ErrorKind::InvalidData => {
                Failure::Final(self.error(what))
            }
            Http::Io(_)
            | Http::Timeout(_)
            | Http::ConnectionFailed
            | Http::Protocol(_)
            | Http::BodyStalled => Failure::Passing(what, None),
            Http::HostNotFound => {
                let advice = "is the network up? HF_ENDPOINT names the hub";
                Failure::Final(self.error(format!("{what}; {advice}")))
            }
            _ => Failure::Final(self.error(what)),
        }
    }
}

/// What the hub's own answers say of a file that is somewhere else.
#[derive(Debug, Default)]
struct Linked {
    commit: Option<String>,
    tag: Option<String>,
    size: Option<u64>,
    /// Whether the last answer is the hub's own.
    own: bool,
    /// Where the last answer is from, as a message may say it.
    from: String,
}

impl Linked {
    fn add(&mut self, headers: &HeaderMap) {
        self.commit = self
            .commit
            .take()
            .or_else(|| text(headers, "x-repo-commit"));
        self.tag = self.tag.take().or_else(|| text(headers, "x-linked-etag"));
        self.size = self.size.or_else(|| number(headers, "x-linked-size"));
    }

    fn is_whole(&self) -> bool {
        self.tag.is_some() && self.size.is_some()
    }
}

/// A header as text.
pub(super) fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    Some(value.trim().to_owned())
}

/// A header as a number.
pub(super) fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.parse().ok()
}

/// Scheme, host and port.
fn origin(url: &Uri) -> Option<(String, String, u16)> {
    let scheme = url.scheme_str()?.to_ascii_lowercase();
    let default = if scheme == "https" { 443 } else { 80 };
    let port = url.port_u16().unwrap_or(default);
    Some((scheme, url.host()?.to_ascii_lowercase(), port))
}

/// Where a redirection from a URL leads to; `None` if nobody is to go there.
fn resolve(from: &Uri, to: &str) -> Option<Uri> {
    let to = to.split('#').next()?;
    let (scheme, authority) = (from.scheme_str()?, from.authority()?);
    let whole = if to.starts_with("//") {
        format!("{scheme}:{to}")
    } else if to.starts_with('/') {
        format!("{scheme}://{authority}{to}")
    } else if to.contains("://") {
        to.to_owned()
    } else {
        let folder = from.path().rsplit_once('/')?.0;
        format!("{scheme}://{authority}{folder}/{to}")
    };
    let url: Uri = whole.parse().ok()?;
    let fits = match url.scheme_str()? {
        "https" => true,
        "http" => scheme == "http",
        _ => false,
    };
    // A user in a URL would be sent as a password.
    let plain = url.authority().is_some_and(|a| !a.as_str().contains('@'));
    (fits && plain && url.host().is_some_and(|host| !host.is_empty())).then_some(url)
}

/// A URL for a message: without its query, which may hold a signature, and not too long.
fn shown_url(url: &str) -> String {
    short(url.split(['?', '#']).next().unwrap_or_default())
}

/// A text for a message.
fn short(text: &str) -> String {
    if text.chars().count() <= 120 {
        return text.to_owned();
    }
    text.chars().take(120).chain(['…']).collect()
}

/// Reads a piece of a body.
pub(super) fn read_piece(body: &mut ureq::BodyReader<'_>, piece: &mut [u8]) -> io::Result<usize> {
    loop {
        match body.read(piece) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirection_is_resolved() {
        let from: Uri = "https://hub.co:8/a/b/c?x".parse().expect("a URL");
        let to = |to| resolve(&from, to).map(|url| url.to_string());
        for (text, url) in [
            ("https://cdn.co/x?sig=1#f", "https://cdn.co/x?sig=1"),
            ("//cdn.co/x", "https://cdn.co/x"),
            ("/x/y?z", "https://hub.co:8/x/y?z"),
            ("d", "https://hub.co:8/a/b/d"),
        ] {
            assert_eq!(to(text).as_deref(), Some(url), "{text}");
        }
        for text in [
            "http://hub.co:8/x",
            "file:///etc/passwd",
            "ftp://x/y",
            "https://u:p@x/y",
            "https://",
            "http://a b",
        ] {
            assert_eq!(to(text), None, "{text}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a: &str, b: &str| {
            origin(&a.parse().expect("a URL")) == origin(&b.parse().expect("a URL"))
        };
        assert!(
            same("https://a.co/x", "https://A.CO:443/y"),
            "the same host"
        );
        for other in [
            "http://a.co",
            "https://a.co:444",
            "https://b.a.co",
            "https://a.co.b",
        ] {
            assert!(!same("https://a.co", other), "{other} is another host");
        }
    }

    #[test]
    fn signatures_are_not_shown() {
        assert_eq!(shown_url("https://a/b?X-Amz-Signature=1"), "https://a/b");
        assert_eq!(shown_url(&"x".repeat(500)).chars().count(), 121);
    }
}
