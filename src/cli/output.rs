//! How workers' text reaches a person: harmless, coloured by worker, readable while it is written.
//!
//! [`Output`] prints a step when it is finished, as a paragraph `[Alice 2] text` on standard output. On
//! a terminal it also keeps an area at the bottom with one line for each worker, the tail of the step
//! that it is writing now, and a line of numbers; the area is drawn on standard error. Where only
//! standard error is a terminal, the area is the line of numbers. Invariant: no text reaches a terminal without [`neutralise`]; every escape sequence that is printed is from here.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Time between two drawings of the area: 15 a second.
const REDRAW: Duration = Duration::from_millis(66);

/// Time between two drawings of the numbers alone: 5 a second.
const REDRAW_ALONE: Duration = Duration::from_millis(200);

/// Indentation of a step's second and later lines.
const INDENT: &str = "    ";

/// Replaces what a terminal would obey by what it shows.
///
/// Control characters (all but `\n` and `\t`; also `\r`, which would overwrite the line) become their
/// pictures (`␛`); C1 controls, bidirectional marks, overrides and isolates, and the line and paragraph
/// separators become `<U+202E>`. So no text can move the cursor, change colours or the clipboard, or
/// be shown in another order than it has.
pub fn neutralise(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match u32::from(c) {
            _ if !is_control(c) => out.push(c),
            code @ 0..0x20 => out.extend(char::from_u32(0x2400 + code)),
            0x7f => out.push('\u{2421}'),
            code => {
                let _ = write!(out, "<U+{code:04X}>");
            }
        }
    }
    Cow::Owned(out)
}

fn is_control(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            true
        }
        _ => c.is_control(),
    }
}

/// What `--color` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Colour {
    /// On a terminal, unless `NO_COLOR` is set; anywhere if `CLICOLOR_FORCE` is.
    #[default]
    Auto,
    /// Anywhere.
    Always,
    /// Nowhere.
    Never,
}

/// Colours of 16 workers; more share them.
#[derive(Clone, Copy, Debug)]
pub struct Palette {
    on: bool,
}

/// The first six are the terminal's own colours, so that they follow its theme; the others come from
/// the 256 fixed ones and read on light and dark.
const COLOURS: [&str; 16] = [
    "\x1b[36m",
    "\x1b[33m",
    "\x1b[32m",
    "\x1b[35m",
    "\x1b[34m",
    "\x1b[31m",
    "\x1b[38;5;208m",
    "\x1b[38;5;37m",
    "\x1b[38;5;141m",
    "\x1b[38;5;106m",
    "\x1b[38;5;204m",
    "\x1b[38;5;75m",
    "\x1b[38;5;178m",
    "\x1b[38;5;71m",
    "\x1b[38;5;169m",
    "\x1b[38;5;245m",
];

const PLAIN: &str = "\x1b[0m";

impl Palette {
    /// The palette for an output that is a terminal, or is not; reads `NO_COLOR`, `CLICOLOR_FORCE`
    /// and `TERM`.
    pub fn new(colour: Colour, terminal: bool) -> Self {
        Self::decide(colour, terminal, |name| std::env::var(name).ok())
    }

    /// No colours.
    pub const fn none() -> Self {
        Self { on: false }
    }

    fn decide(colour: Colour, terminal: bool, env: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name| env(name).is_some_and(|v| !v.is_empty());
        let on = match colour {
            Colour::Always => true,
            Colour::Never => false,
            Colour::Auto if set("NO_COLOR") => false,
            Colour::Auto if env("CLICOLOR_FORCE").is_some_and(|v| !v.is_empty() && v != "0") => {
                true
            }
            Colour::Auto => terminal && env("TERM").is_none_or(|term| term != "dumb"),
        };
        Self { on }
    }

    /// What starts and what ends the colour of a worker.
    pub fn worker(self, worker: usize) -> (&'static str, &'static str) {
        if self.on {
            (COLOURS[worker % COLOURS.len()], PLAIN)
        } else {
            ("", "")
        }
    }
}

/// Numbers of a run, for the last line of the area.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Passes so far.
    pub pass: usize,
    /// Passes per second.
    pub passes_per_s: f64,
    /// Tokens per second of all workers together.
    pub tokens_per_s: f64,
    /// Tokens per second by worker, in the order of workers.
    pub by_worker: Vec<f64>,
    /// Slots of the cache that are used.
    pub cache_used: usize,
    /// Slots of the cache.
    pub cache_total: usize,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "pass {}, {:.1} passes/s, {:.1} tokens/s",
            self.pass, self.passes_per_s, self.tokens_per_s
        )?;
        if self.by_worker.len() > 1 {
            let each: Vec<_> = self.by_worker.iter().map(|t| format!("{t:.1}")).collect();
            write!(f, " ({})", each.join(" + "))?;
        }
        write!(f, ", cache {} of {}", self.cache_used, self.cache_total)
    }
}

/// Prints the workers' steps: live on a terminal, plainly elsewhere.
///
/// A write to standard output that fails is an error (a closed pipe, too: see
/// [`super::is_closed_pipe`]); one to standard error is not.
pub struct Output {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    palette: Palette,
    workers: Vec<Step>,
    area: Option<Area>,
}

/// The step that a worker is writing.
#[derive(Clone, Debug, Default)]
struct Step {
    name: String,
    number: usize,
    text: String,
}

/// Lines at the bottom of the terminal that are drawn again and again.
#[derive(Debug)]
struct Area {
    /// Only the numbers are shown, on a line that is not ended: standard output is elsewhere, perhaps
    /// on this terminal by way of a pipe.
    alone: bool,
    /// Rows and columns of the terminal.
    size: fn() -> (usize, usize),
    /// Columns of each line on the screen.
    drawn: Vec<usize>,
    last: Option<Instant>,
    every: Duration,
    status: String,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output")
            .field("palette", &self.palette)
            .field("workers", &self.workers)
            .field("area", &self.area)
            .finish_non_exhaustive()
    }
}

impl Output {
    /// Prints to this process's standard output and error; live if both are terminals, and with a line
    /// of numbers if only standard error is.
    pub fn new(colour: Colour) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self::of_process(Palette::new(colour, terminal), terminal)
    }

    /// Prints the line of numbers, where it can be told from what somebody else writes to standard
    /// output; nothing else is to be printed with it.
    pub fn numbers() -> Self {
        let mut output = Self::of_process(Palette::none(), false);
        if std::io::stdout().is_terminal() {
            output.area = None;
        }
        output
    }

    fn of_process(palette: Palette, terminal: bool) -> Self {
        let err = std::io::stderr();
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let area = (err.is_terminal() && !dumb).then(|| {
            if terminal {
                Area::new(terminal_size)
            } else {
                Area::alone(terminal_size)
            }
        });
        Self {
            palette,
            out: Box::new(std::io::stdout()),
            err: Box::new(err),
            workers: Vec::new(),
            area,
        }
    }

    /// Prints plainly to `out`: every step when it is finished, and nothing else.
    pub fn plain(out: Box<dyn Write + Send>, palette: Palette) -> Self {
        Self {
            out,
            err: Box::new(std::io::sink()),
            palette,
            workers: Vec::new(),
            area: None,
        }
    }

    /// Whether the area is shown, so that the caller knows what [`Output::status`] is worth.
    pub fn is_live(&self) -> bool {
        self.area.is_some()
    }

    /// Adds a piece of text to a worker's step; another step number closes the step before.
    ///
    /// # Errors
    /// [`Error::Io`] if standard output cannot be written.
    pub fn step_text(&mut self, worker: usize, name: &str, step: usize, piece: &str) -> Result<()> {
        self.turn_to(worker, name, step)?;
        self.workers[worker].text.push_str(&neutralise(piece));
        self.draw(false);
        Ok(())
    }

    /// Prints a worker's step as a paragraph.
    ///
    /// # Errors
    /// [`Error::Io`] if standard output cannot be written.
    pub fn step_closed(&mut self, worker: usize, name: &str, step: usize) -> Result<()> {
        self.turn_to(worker, name, step)?;
        self.close(worker)
    }

    /// Tells the numbers of the run; shown in the area only.
    pub fn status(&mut self, status: &Status) {
        if let Some(area) = &mut self.area {
            area.status = status.to_string();
            self.draw(false);
        }
    }

    /// Prints a paragraph that is no worker's: the answer.
    ///
    /// # Errors
    /// [`Error::Io`] if standard output cannot be written.
    pub fn answer(&mut self, text: &str) -> Result<()> {
        let text = neutralise(text.trim_end());
        self.print(&format!("{text}\n"))
    }

    /// Prints a line on standard error, above the area.
    pub fn note(&mut self, text: &str) {
        self.erase();
        let _ = writeln!(self.err, "{}", neutralise(text));
        self.draw(true);
    }

    /// Prints the steps that are not finished and takes the area away.
    ///
    /// # Errors
    /// [`Error::Io`] if standard output cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        for worker in 0..self.workers.len() {
            if !self.workers[worker].text.trim().is_empty() {
                self.close(worker)?;
            }
        }
        self.erase();
        self.area = None;
        Ok(())
    }

    /// Makes `step` the worker's current one; what was left open before is closed.
    fn turn_to(&mut self, worker: usize, name: &str, step: usize) -> Result<()> {
        if self.workers.len() <= worker {
            self.workers.resize(worker + 1, Step::default());
        }
        let now = &self.workers[worker];
        if now.number != step && !now.text.trim().is_empty() {
            self.close(worker)?;
        }
        let now = &mut self.workers[worker];
        now.number = step;
        if now.name != name {
            name.clone_into(&mut now.name);
        }
        Ok(())
    }

    fn close(&mut self, worker: usize) -> Result<()> {
        let step = &mut self.workers[worker];
        let text = std::mem::take(&mut step.text);
        let paragraph = paragraph(&step.label(), &text, self.palette.worker(worker));
        self.print(&paragraph)
    }

    /// Prints above the area.
    fn print(&mut self, text: &str) -> Result<()> {
        self.erase();
        self.out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush())
            .map_err(Error::io("standard output"))?;
        match &mut self.area {
            // Whoever is between us and the terminal needs time to write it there.
            Some(area) if area.alone => area.last = Some(Instant::now()),
            _ => self.draw(true),
        }
        Ok(())
    }

    /// Draws the area, if it is time or must be.
    fn draw(&mut self, must: bool) {
        let Some(area) = &mut self.area else {
            return;
        };
        let now = Instant::now();
        if !must && area.last.is_some_and(|last| now - last < area.every) {
            return;
        }
        area.last = Some(now);
        let text = area.redrawn(&self.workers, self.palette);
        // A terminal that cannot be written takes no part in the run.
        let _ = self
            .err
            .write_all(text.as_bytes())
            .and_then(|()| self.err.flush());
    }

    fn erase(&mut self) {
        if let Some(area) = &mut self.area {
            let text = format!("{}\x1b[J", area.up());
            if !std::mem::take(&mut area.drawn).is_empty() {
                let _ = self
                    .err
                    .write_all(text.as_bytes())
                    .and_then(|()| self.err.flush());
            }
        }
    }
}

impl Drop for Output {
    /// Leaves a clean terminal behind, whatever ended the run.
    fn drop(&mut self) {
        self.erase();
    }
}

impl Step {
    fn label(&self) -> String {
        let name = neutralise(&self.name).replace(['\n', '\t'], " ");
        format!("[{name} {}]", self.number)
    }
}

impl Area {
    fn new(size: fn() -> (usize, usize)) -> Self {
        Self {
            alone: false,
            size,
            drawn: Vec::new(),
            last: None,
            every: REDRAW,
            status: String::new(),
        }
    }

    fn alone(size: fn() -> (usize, usize)) -> Self {
        Self {
            alone: true,
            every: REDRAW_ALONE,
            ..Self::new(size)
        }
    }

    /// What moves the cursor to the first line of the area; the terminal may have become narrower
    /// since it was drawn, and then its lines are broken into more rows.
    fn up(&self) -> String {
        let columns = (self.size)().1.max(1);
        let rows: usize = self.drawn.iter().map(|w| w.div_ceil(columns).max(1)).sum();
        match (rows, self.alone) {
            (0, _) => String::new(),
            (1, true) => "\r".to_owned(),
            (_, true) => format!("\x1b[{}A\r", rows - 1),
            (_, false) => format!("\x1b[{rows}A\r"),
        }
    }

    /// The bytes that draw the area over the one before.
    fn redrawn(&mut self, workers: &[Step], palette: Palette) -> String {
        let mut out = self.up();
        self.drawn.clear();
        let (rows, columns) = (self.size)();
        // The last column stays empty: terminals differ in when they break the line there.
        let width = columns.saturating_sub(1);
        let room = if self.alone {
            0
        } else {
            rows.saturating_sub(2)
        };
        let writing = workers
            .iter()
            .enumerate()
            .filter(|(_, s)| !s.name.is_empty());
        for (worker, step) in writing.take(room) {
            let label = cut(&step.label(), width);
            let tail = tail(&step.text, width.saturating_sub(columns_of(&label) + 1));
            let (start, end) = palette.worker(worker);
            self.drawn.push(columns_of(&label) + 1 + columns_of(&tail));
            let _ = writeln!(out, "{start}{label} {tail}{end}\x1b[K");
        }
        if !self.status.is_empty() {
            let line = cut(&self.status, width);
            self.drawn.push(columns_of(&line));
            let end = if self.alone { "" } else { "\n" };
            let _ = write!(out, "{line}\x1b[K{end}");
        }
        out.push_str("\x1b[J");
        out
    }
}

/// Rows and columns of the terminal on standard error.
fn terminal_size() -> (usize, usize) {
    let (rows, columns) = console::Term::stderr().size();
    (rows.into(), columns.into())
}

/// A step as a paragraph: its label, its text, the lines after the first indented.
fn paragraph(label: &str, text: &str, (start, end): (&str, &str)) -> String {
    let mut out = format!("{start}{label}");
    for (i, line) in text.trim().lines().map(str::trim_end).enumerate() {
        if i == 0 {
            let _ = write!(out, " {line}");
        } else if line.is_empty() {
            let _ = write!(out, "{end}\n{start}");
        } else {
            let _ = write!(out, "{end}\n{start}{INDENT}{line}");
        }
    }
    out.push_str(end);
    out.push('\n');
    out
}

/// Columns that a character takes on a terminal.
fn width_of(c: char) -> usize {
    console::measure_text_width(c.encode_utf8(&mut [0; 4]))
}

fn columns_of(text: &str) -> usize {
    text.chars().map(width_of).sum()
}

/// The end of a text that fits `width` columns of one line, after `…` where something is left out.
fn tail(text: &str, width: usize) -> String {
    let mut kept = fitting(text.trim_end().chars().rev(), width);
    kept.reverse();
    kept.into_iter().collect()
}

/// The start of a text that fits `width` columns of one line, before `…` where something is left out.
fn cut(text: &str, width: usize) -> String {
    fitting(text.trim_end().chars(), width)
        .into_iter()
        .collect()
}

/// The first characters that fit, spaces run together; the last is `…` where others follow.
fn fitting(text: impl Iterator<Item = char>, width: usize) -> Vec<char> {
    let (mut kept, mut used) = (Vec::new(), 0);
    for c in text {
        let c = if c.is_whitespace() { ' ' } else { c };
        if c == ' ' && kept.last() == Some(&' ') {
            continue;
        }
        // Marks without a width could be stacked without end.
        if used + width_of(c) > width || kept.len() > 4 * width {
            while let Some(&last) = kept.last()
                && (used + 1 > width || width_of(last) == 0)
            {
                used -= width_of(last);
                kept.pop();
            }
            if width > 0 {
                kept.push('…');
            }
            break;
        }
        used += width_of(c);
        kept.push(c);
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What was written to both streams, in order.
    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no test panics here").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Screen {
        fn take(&self) -> String {
            let bytes = std::mem::take(&mut *self.0.lock().expect("no test panics here"));
            String::from_utf8(bytes).expect("text")
        }

        fn live(&self, size: fn() -> (usize, usize), every: Duration) -> Output {
            Output {
                out: Box::new(self.clone()),
                err: Box::new(self.clone()),
                palette: Palette::none(),
                workers: Vec::new(),
                area: Some(Area {
                    every,
                    ..Area::new(size)
                }),
            }
        }
    }

    #[test]
    fn text_without_controls_is_borrowed() {
        let text = "a\tb\né 漢字 👩‍🚀 ∑ x²";
        assert!(matches!(neutralise(text), Cow::Borrowed(t) if t == text));
    }

    #[test]
    fn text_cannot_command_a_terminal() {
        assert_eq!(
            neutralise("\x1b[31mred\x1b]52;c;aGk=\x07"),
            "␛[31mred␛]52;c;aGk=␇"
        );
        assert_eq!(neutralise("a\rb\x08\x7f\0"), "a␍b␈␡␀");
        assert_eq!(neutralise("\u{9b}2J\u{85}"), "<U+009B>2J<U+0085>");
        for c in (0..0x11_0000).filter_map(char::from_u32) {
            let shown = neutralise(c.encode_utf8(&mut [0; 4])).into_owned();
            let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
            assert!(shown.chars().all(harmless), "{c:?} became {shown:?}");
        }
    }

    #[test]
    fn text_cannot_change_its_direction_or_its_lines() {
        let marks = ('\u{2028}'..='\u{202e}').chain('\u{2066}'..='\u{2069}');
        for c in marks.chain(['\u{200e}', '\u{200f}', '\u{61c}']) {
            let shown = neutralise(c.encode_utf8(&mut [0; 4])).into_owned();
            assert_eq!(shown, format!("<U+{:04X}>", u32::from(c)));
        }
        assert_eq!(neutralise("\u{200d}"), "\u{200d}", "a joiner is harmless");
    }

    #[test]
    fn no_color_and_a_pipe_mean_no_colour() {
        let on = |colour, terminal, vars: &[(&str, &str)]| {
            let find = |name: &str| vars.iter().find(|v| v.0 == name).map(|v| v.1.to_owned());
            !Palette::decide(colour, terminal, find)
                .worker(0)
                .0
                .is_empty()
        };
        assert!(on(Colour::Auto, true, &[]), "a terminal");
        assert!(!on(Colour::Auto, false, &[]), "a pipe");
        assert!(!on(Colour::Auto, true, &[("NO_COLOR", "1")]), "NO_COLOR");
        assert!(on(Colour::Auto, true, &[("NO_COLOR", "")]), "empty");
        assert!(!on(Colour::Auto, true, &[("TERM", "dumb")]), "dumb");
        assert!(on(Colour::Auto, false, &[("CLICOLOR_FORCE", "1")]), "force");
        assert!(!on(Colour::Auto, false, &[("CLICOLOR_FORCE", "0")]), "zero");
        assert!(on(Colour::Always, false, &[("NO_COLOR", "1")]), "always");
        assert!(!on(Colour::Never, true, &[]), "never");
    }

    #[test]
    fn sixteen_workers_have_sixteen_colours_and_the_next_shares() {
        let palette = Palette { on: true };
        let starts: std::collections::HashSet<_> = (0..16).map(|i| palette.worker(i).0).collect();
        assert_eq!(starts.len(), 16);
        assert_eq!(palette.worker(16), palette.worker(0));
        assert_eq!(Palette::none().worker(3), ("", ""));
    }

    #[test]
    fn a_step_is_printed_when_it_is_finished_and_the_rest_at_the_end() {
        let screen = Screen::default();
        let mut output = Output::plain(Box::new(screen.clone()), Palette::none());
        output
            .step_text(0, "Alice", 1, "Let x be")
            .expect("written");
        output
            .step_text(1, "Bob", 1, " I try\n\ny = 2.\n\n")
            .expect("written");
        assert_eq!(screen.take(), "", "nothing is finished");
        output.step_text(0, "Alice", 1, " 3.\n\n").expect("written");
        output.step_closed(0, "Alice", 1).expect("written");
        assert_eq!(screen.take(), "[Alice 1] Let x be 3.\n");
        output.step_closed(1, "Bob", 1).expect("written");
        assert_eq!(screen.take(), "[Bob 1] I try\n\n    y = 2.\n");
        output
            .step_text(0, "Alice", 2, "So\x1b[2J")
            .expect("written");
        output.status(&Status::default());
        output.finish().expect("written");
        output.answer("42\n").expect("written");
        assert_eq!(screen.take(), "[Alice 2] So␛[2J\n42\n");
    }

    #[test]
    fn a_new_step_closes_the_one_before() {
        let screen = Screen::default();
        let mut output = Output::plain(Box::new(screen.clone()), Palette::none());
        output.step_text(2, "Carol", 1, "one").expect("written");
        output.step_text(2, "Carol", 2, "two").expect("written");
        assert_eq!(screen.take(), "[Carol 1] one\n");
    }

    #[test]
    fn every_line_of_a_coloured_paragraph_is_coloured_alone() {
        assert_eq!(
            paragraph("[A 1]", "x\ny", ("<", ">")),
            "<[A 1] x>\n<    y>\n"
        );
    }

    #[test]
    fn the_area_is_drawn_over_itself_and_paragraphs_go_above_it() {
        let screen = Screen::default();
        let mut output = screen.live(|| (24, 20), Duration::ZERO);
        output.step_text(0, "Al", 1, "abc").expect("written");
        assert_eq!(screen.take(), "[Al 1] abc\x1b[K\n\x1b[J");
        output
            .step_text(0, "Al", 1, "\ndefghijklmnop")
            .expect("written");
        assert_eq!(screen.take(), "\x1b[1A\r[Al 1] …fghijklmnop\x1b[K\n\x1b[J");
        output.step_closed(0, "Al", 1).expect("written");
        assert_eq!(
            screen.take(),
            "\x1b[1A\r\x1b[J[Al 1] abc\n    defghijklmnop\n[Al 1] \x1b[K\n\x1b[J"
        );
        output.finish().expect("written");
        assert_eq!(screen.take(), "\x1b[1A\r\x1b[J");
        drop(output);
        assert_eq!(screen.take(), "", "the area is taken away once");
    }

    #[test]
    fn the_area_is_not_drawn_at_every_token() {
        let screen = Screen::default();
        let mut output = screen.live(|| (24, 80), Duration::from_hours(1));
        output.step_text(0, "Al", 1, "a").expect("written");
        screen.take();
        output.step_text(0, "Al", 1, "b").expect("written");
        output.status(&Status::default());
        assert_eq!(screen.take(), "", "too early");
    }

    #[test]
    fn an_area_on_a_terminal_that_became_narrow_is_taken_away_whole() {
        let mut area = Area::new(|| (24, 10));
        area.drawn = vec![25, 0, 10];
        assert_eq!(area.up(), "\x1b[5A\r");
    }

    #[test]
    fn the_numbers_alone_are_one_line_that_is_not_ended() {
        let screen = Screen::default();
        let mut output = screen.live(|| (24, 80), Duration::ZERO);
        output.area = Some(Area {
            every: Duration::ZERO,
            ..Area::alone(|| (24, 80))
        });
        let line = "pass 0, 0.0 passes/s, 0.0 tokens/s, cache 0 of 0";
        output.status(&Status::default());
        assert_eq!(screen.take(), format!("{line}\x1b[K\x1b[J"));
        output.step_text(0, "Al", 1, "a").expect("written");
        assert_eq!(screen.take(), format!("\r{line}\x1b[K\x1b[J"));
        output.step_closed(0, "Al", 1).expect("written");
        assert_eq!(screen.take(), "\r\x1b[J[Al 1] a\n", "not drawn at once");
        output.note("so");
        assert_eq!(screen.take(), format!("so\n{line}\x1b[K\x1b[J"));
        output.finish().expect("written");
        assert_eq!(screen.take(), "\r\x1b[J", "nothing is left");
        let mut area = Area::alone(|| (24, 10));
        area.drawn = vec![25];
        assert_eq!(area.up(), "\x1b[2A\r", "the terminal became narrow");
    }

    #[test]
    fn no_line_of_the_area_is_wider_than_the_terminal() {
        let text = "漢字漢字 e\u{301}e\u{301}e\u{301} \u{301}\u{301} ab\tcd  👩‍🚀 and so on, 漢字";
        for columns in 0..60 {
            for line in [tail(text, columns), cut(text, columns)] {
                assert!(columns_of(&line) <= columns, "{columns}: {line}");
            }
        }
        assert_eq!(tail("漢字漢字", 5), "…漢字");
        assert_eq!(tail("漢字漢字", 6), "…漢字");
        assert_eq!(tail("ends\n\n", 10), "ends");
        assert_eq!(cut("a status line", 8), "a statu…");
        assert!(tail(&"\u{301}".repeat(10_000), 10).chars().count() <= 41);
    }

    #[test]
    fn few_rows_show_few_workers_and_the_status() {
        let mut area = Area::new(|| (4, 80));
        area.status = Status {
            pass: 7,
            passes_per_s: 2.0,
            tokens_per_s: 4.0,
            by_worker: vec![2.0, 2.0],
            cache_used: 10,
            cache_total: 64,
        }
        .to_string();
        let step = |i: usize| Step {
            name: format!("W{i}"),
            number: 1,
            text: "x".into(),
        };
        let workers: Vec<_> = (0..5).map(step).collect();
        let text = area.redrawn(&workers, Palette::none());
        assert_eq!(
            text,
            "[W0 1] x\x1b[K\n[W1 1] x\x1b[K\n\
             pass 7, 2.0 passes/s, 4.0 tokens/s (2.0 + 2.0), cache 10 of 64\x1b[K\n\x1b[J"
        );
    }
}
