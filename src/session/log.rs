//! Logs on disk: JSON lines, written as they happen, read back with their torn end dropped.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use super::event::{Event, FORMAT, Header};
use crate::error::shown;
use crate::{Error, Result};

/// Longest line that a reader takes, in bytes: a header with some 600 thousand tokens. Hostile JSON takes
/// up to 60 times its length.
const MAX_LINE: u64 = 4 << 20;

/// Writes a log: the header, then every event, each line flushed when its pass is done.
#[derive(Debug)]
pub struct Log<W>(W);

impl<W: Write> Log<W> {
    /// Begins a log.
    ///
    /// # Errors
    /// Whatever the writer says.
    pub fn new(mut writer: W, header: &Header) -> std::io::Result<Self> {
        line(&mut writer, header)?;
        writer.flush()?;
        Ok(Self(writer))
    }

    /// Appends events and flushes.
    ///
    /// # Errors
    /// Whatever the writer says.
    pub fn append(&mut self, events: &[Event]) -> std::io::Result<()> {
        for event in events {
            line(&mut self.0, event)?;
        }
        self.0.flush()
    }
}

fn line(writer: &mut impl Write, value: &impl serde::Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    writer.write_all(&line)
}

/// Reads a log; a torn last line, as a killed process leaves it, is dropped.
///
/// # Errors
/// [`Error::Io`]; [`Error::Log`] with the line that is not understood.
pub fn read_log(path: &Path) -> Result<(Header, Vec<Event>)> {
    let fail = |line: usize, problem: String| Error::Log {
        path: path.to_owned(),
        line,
        problem: shown(&problem),
    };
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut reader = BufReader::new(file);
    let mut header: Option<Header> = None;
    let mut events = Vec::new();
    for number in 1.. {
        let mut bytes = Vec::new();
        let n = reader
            .by_ref()
            .take(MAX_LINE + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(Error::io(path))?;
        if n as u64 > MAX_LINE {
            return Err(fail(number, format!("is longer than {MAX_LINE} bytes")));
        }
        if bytes.last() != Some(&b'\n') {
            // The end of the file, or a torn line.
            break;
        }
        if header.is_none() {
            let value: serde_json::Value = serde_json::from_slice(&bytes)
                .map_err(|e| fail(number, format!("is no header: {e}")))?;
            match value.get("format").and_then(serde_json::Value::as_u64) {
                Some(format) if format == u64::from(FORMAT) => {}
                Some(format) => {
                    let problem =
                        format!("format {format} is not understood; this version reads {FORMAT}");
                    return Err(fail(number, problem));
                }
                None => return Err(fail(number, "is no header: it has no 'format'".into())),
            }
            let parsed = serde_json::from_value(value);
            header = Some(parsed.map_err(|e| fail(number, format!("is no header: {e}")))?);
        } else {
            let event = serde_json::from_slice(&bytes);
            events.push(event.map_err(|e| fail(number, format!("is no event: {e}")))?);
        }
    }
    let header = header.ok_or_else(|| fail(1, "the log is empty".into()))?;
    Ok((header, events))
}
