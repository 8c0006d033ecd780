//! An HTTP server of the tests' own, which answers as it is told: also half, late, or never.

#![allow(unreachable_pub, reason = "a test binary has no outside")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What somebody asked.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With its query.
    pub path: String,
    /// The names in small letters.
    pub headers: Vec<(String, String)>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The first byte that a range asks for.
    pub fn from(&self) -> Option<usize> {
        let range = self.header("range")?;
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse()
            .ok()
    }
}

/// How the body is sent.
#[derive(Clone, Copy, Debug)]
pub enum Sending {
    Whole,
    /// So many bytes, then the connection is closed.
    Cut(usize),
    /// So many bytes, then nothing until the other side closes.
    Stall(usize),
    /// So many bytes, then one every few milliseconds until the other side closes.
    Drip(usize),
    /// The body again and again in chunks, without a length, until the other side closes.
    Endless,
    /// Headers without an end, until the other side closes.
    EndlessHeaders,
}

#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub sending: Sending,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            sending: Sending::Whole,
        }
    }

    pub fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    pub fn sent(mut self, sending: Sending) -> Self {
        self.sending = sending;
        self
    }
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Server {
    /// `http://127.0.0.1:<port>`
    pub url: String,
    seen: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    address: std::net::SocketAddr,
}

impl Server {
    /// `answer` gets a request, and how many of the same method and path came before it.
    pub fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (log, end, answer) = (seen.clone(), stop.clone(), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if end.load(Ordering::SeqCst) {
                    return;
                }
                let (log, answer) = (log.clone(), answer.clone());
                // Whoever hangs up early is not this side's failure.
                thread::spawn(move || drop(serve(&stream.unwrap(), &log, &*answer)));
            }
        });
        Self {
            url: format!("http://{address}"),
            seen,
            stop,
            address,
        }
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// The requests of a method whose path ends so.
    pub fn asked(&self, method: &str, end: &str) -> Vec<Request> {
        let mut all = self.seen();
        all.retain(|r| r.method == method && r.path.ends_with(end));
        all
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    mut stream: &TcpStream,
    log: &Mutex<Vec<Request>>,
    answer: &(dyn Fn(&Request, usize) -> Reply + Send + Sync),
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ');
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(());
    };
    let mut headers = Vec::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        headers,
    };
    let before = {
        let mut log = log.lock().unwrap();
        let same = |r: &&Request| r.method == request.method && r.path == request.path;
        let before = log.iter().filter(same).count();
        log.push(request.clone());
        before
    };
    let reply = answer(&request, before);
    let mut head = format!("HTTP/1.1 {} Said\r\nconnection: close\r\n", reply.status);
    let endless = matches!(reply.sending, Sending::Endless);
    if endless {
        head += "transfer-encoding: chunked\r\n";
    } else if !reply
        .headers
        .iter()
        .any(|(name, _)| *name == "content-length")
    {
        head += &format!("content-length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if matches!(reply.sending, Sending::EndlessHeaders) {
        stream.write_all(head.as_bytes())?;
        loop {
            stream.write_all(b"x-more: and more\r\n")?;
        }
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    let body = &reply.body;
    let up_to = |n: usize| &body[..n.min(body.len())];
    match reply.sending {
        Sending::Whole => stream.write_all(body),
        Sending::Cut(n) => stream.write_all(up_to(n)),
        Sending::Stall(n) => {
            stream.write_all(up_to(n))?;
            // Returns when the other side is gone.
            stream.read(&mut [0]).map(drop)
        }
        Sending::Drip(n) => {
            stream.write_all(up_to(n))?;
            for byte in &body[n.min(body.len())..] {
                stream.write_all(&[*byte])?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
        Sending::Endless => loop {
            stream.write_all(format!("{:x}\r\n", body.len()).as_bytes())?;
            stream.write_all(body)?;
            stream.write_all(b"\r\n")?;
        },
        Sending::EndlessHeaders => unreachable!("sent above"),
    }
}
