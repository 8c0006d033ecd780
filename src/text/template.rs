//! Renders one chat template in Hugging Face's settings, inside bounds.
//!
//! A template is a program that came with a model: it may be hostile. What bounds it:
//! its length ([`MAX_SOURCE`]), fuel, a recursion limit, operators per tag (`guard.rs`), and a budget
//! in bytes and seconds that every copying operation is charged to before it runs. It runs on a thread
//! of its own with a large stack, so that neither depth nor a panic of the template engine reaches the
//! caller. `tests/fuzz.rs` measures that this is enough; `child.rs` is for those who want no measurement.
//!
//! Invariant: a rendering that ends within its bounds is a pure function of source, context and date.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};

use super::guard::{CAP, FACTOR, guard};
use crate::caught::caught;
use crate::{Error, Result};

/// Longest template that is accepted, in bytes; the longest published ones have about 15 KiB.
pub const MAX_SOURCE: usize = 64 << 10;
/// Longest text that a template may render to, in bytes.
pub const MAX_OUTPUT: usize = 16 << 20;

const FUEL: usize = 200_000;
const RECURSION: usize = 200;
const STACK: usize = 64 << 20;
const MAX_DEPTH: usize = 64;
const MAX_REPEATS: usize = 1024;
const MAX_RANGE: usize = 10_000;
/// What an item of a list costs beside its own content, in bytes.
const ITEM: usize = 16;
/// How long a template may take.
const PATIENCE: Duration = Duration::from_secs(1);

type JinjaError = minijinja::Error;

/// The day that `strftime_now` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    /// Year of the common era.
    pub year: u16,
    /// Month, from 1.
    pub month: u8,
    /// Day of the month, from 1.
    pub day: u8,
}

impl Date {
    /// The date that many days after 1 January 1970, in the Gregorian calendar.
    ///
    /// *Source*: Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
    pub fn from_days(days: u64) -> Self {
        // Years begin in March, so that the leap day is the last; eras have 400 years.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        Self {
            year: u16::try_from(year).unwrap_or(u16::MAX),
            month: u8::try_from(month).unwrap_or(1),
            day: u8::try_from(day).unwrap_or(1),
        }
    }
}

impl Default for Date {
    /// 26 July 2024, the day that Llama's own templates fall back to.
    fn default() -> Self {
        Self {
            year: 2024,
            month: 7,
            day: 26,
        }
    }
}

impl Date {
    /// The date in C's `strftime` notation; the time of day is midnight.
    pub fn format(self, pattern: &str) -> String {
        const MONTHS: [&str; 12] = [
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ];
        const DAYS: [&str; 7] = [
            "Sunday",
            "Monday",
            "Tuesday",
            "Wednesday",
            "Thursday",
            "Friday",
            "Saturday",
        ];
        let month = MONTHS[usize::from(self.month.clamp(1, 12) - 1)];
        // Sakamoto's rule.
        let offset =
            [0u32, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4][usize::from(self.month.clamp(1, 12) - 1)];
        let y = u32::from(self.year.max(1)) - u32::from(self.month < 3);
        let weekday = (y + y / 4 - y / 100 + y / 400 + offset + u32::from(self.day)) % 7;
        let day_name = DAYS[weekday as usize];
        let mut out = String::new();
        let mut chars = pattern.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let code = chars.next().unwrap_or('%');
            let _ = match code {
                'Y' => write!(out, "{}", self.year),
                'y' => write!(out, "{:02}", self.year % 100),
                'm' => write!(out, "{:02}", self.month),
                'd' => write!(out, "{:02}", self.day),
                'e' => write!(out, "{:2}", self.day),
                'B' => write!(out, "{month}"),
                'b' | 'h' => write!(out, "{}", &month[..3]),
                'A' => write!(out, "{day_name}"),
                'a' => write!(out, "{}", &day_name[..3]),
                'F' => write!(out, "{}-{:02}-{:02}", self.year, self.month, self.day),
                'H' | 'M' | 'S' => write!(out, "00"),
                'I' => write!(out, "12"),
                'p' => write!(out, "AM"),
                '%' => write!(out, "%"),
                other => write!(out, "%{other}"),
            };
        }
        out
    }
}

/// Bytes that a rendering may still copy, and until when.
#[derive(Clone, Debug)]
struct Budget(Arc<AtomicI64>, Instant);

impl Budget {
    fn charge(&self, bytes: usize) -> Result<(), JinjaError> {
        if Instant::now() > self.1 {
            return Err(failure("the template takes too long"));
        }
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX / 2);
        if self.0.fetch_sub(bytes, Ordering::Relaxed) < bytes {
            // Keep it spent, so that no later, smaller charge passes.
            self.0.store(i64::MIN / 2, Ordering::Relaxed);
            return Err(failure("the text grows without bounds"));
        }
        Ok(())
    }

    /// Charges what a copy of the value, or of its text, takes.
    fn charge_value(&self, value: &Value, depth: usize) -> Result<(), JinjaError> {
        if depth > MAX_DEPTH {
            return Err(failure("a value is nested too deep"));
        }
        match value.kind() {
            ValueKind::String => self.charge(value.as_str().map_or(0, str::len) + 1),
            ValueKind::Bytes => self.charge(value.as_bytes().map_or(0, <[u8]>::len) + 1),
            ValueKind::Seq | ValueKind::Iterable => {
                let Some(len) = value.len() else {
                    return self.charge(1);
                };
                self.charge(len.saturating_mul(ITEM).saturating_add(1))?;
                for item in value.try_iter()? {
                    self.charge_value(&item, depth + 1)?;
                }
                Ok(())
            }
            ValueKind::Map => {
                self.charge(value.len().unwrap_or(0) * 2 * ITEM + 1)?;
                for key in value.try_iter()? {
                    self.charge_value(&key, depth + 1)?;
                    self.charge_value(&value.get_item(&key)?, depth + 1)?;
                }
                Ok(())
            }
            _ => self.charge(1),
        }
    }
}

fn failure(message: impl Into<String>) -> JinjaError {
    JinjaError::new(ErrorKind::InvalidOperation, message.into())
}

/// Renders a template as `transformers` does: blocks trimmed, Python's methods, loop controls.
///
/// `what` names the template in errors, `context` is an object with the template's variables.
///
/// # Errors
/// [`Error::Template`] when the template is too long, does not compile, raises, or runs out of its
/// bounds (see the module's page).
pub fn render(
    what: &str,
    source: &str,
    context: &serde_json::Value,
    today: Date,
) -> Result<String> {
    let fail = |problem: String| Error::Template {
        what: what.to_owned(),
        problem,
    };
    if source.len() > MAX_SOURCE {
        return Err(fail(format!(
            "the template has {} bytes; at most {MAX_SOURCE} are accepted",
            source.len()
        )));
    }
    let guarded = guard(source).map_err(fail)?;
    let context = from_json(context);
    let rendered = std::thread::scope(|scope| {
        let spawned = std::thread::Builder::new()
            .name("chat template".to_owned())
            .stack_size(STACK)
            .spawn_scoped(scope, || {
                let run = || run(&guarded.source, guarded.longest_text, &context, today);
                let out =
                    caught(run).unwrap_or_else(|| Err(failure("the template engine panicked")));
                // Values may nest deep: their drop belongs on this stack too.
                drop(context);
                out
            });
        match spawned {
            Ok(thread) => thread
                .join()
                .unwrap_or_else(|_| Err(failure("the template engine panicked"))),
            Err(e) => Err(failure(format!("no thread to render on: {e}"))),
        }
    });
    let out = rendered.map_err(|e| {
        let message = match e.detail() {
            Some(detail) if e.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
            Some(detail) => format!("{}: {detail}", e.kind()),
            None => e.kind().to_string(),
        };
        fail(match e.line() {
            Some(line) => format!("line {line}: {message}"),
            None => message,
        })
    })?;
    if out.len() > MAX_OUTPUT {
        return Err(fail(format!(
            "it renders to {} bytes; at most {MAX_OUTPUT} are accepted",
            out.len()
        )));
    }
    Ok(out)
}

fn run(
    source: &str,
    longest_text: usize,
    context: &Value,
    today: Date,
) -> Result<String, JinjaError> {
    let mut env = Environment::new();
    env.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    env.set_debug(false);
    // One unit of fuel emits one stretch of plain text.
    let fuel = (MAX_OUTPUT / longest_text.max(1)).clamp(2_000, FUEL);
    env.set_fuel(Some(fuel as u64));
    env.set_recursion_limit(RECURSION);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);

    let budget = Budget(
        Arc::new(AtomicI64::new(i64::MAX / 4)),
        Instant::now() + PATIENCE,
    );
    budget.charge_value(context, 0)?;
    let size = i64::MAX / 4 - budget.0.load(Ordering::Relaxed);
    let source_len = i64::try_from(source.len()).unwrap_or(i64::MAX / 1024);
    budget
        .0
        .store((8 << 20) + 64 * (size + source_len), Ordering::Relaxed);
    install_filters(&mut env, &budget);
    install_functions(&mut env, &budget, today);
    env.template_from_str(source)?.render(context)
}

/// The filters, with everything replaced that could grow a text unseen.
fn install_filters(env: &mut Environment<'_>, budget: &Budget) {
    for name in ["batch", "slice", "pprint", "format", "sum", "chain", "zip"] {
        env.remove_filter(name);
    }

    let b = budget.clone();
    env.add_filter(CAP, move |value: Value| {
        b.charge_value(&value, 0)?;
        Ok::<_, JinjaError>(value)
    });
    let b = budget.clone();
    env.add_filter(FACTOR, move |value: Value| {
        if value.is_number() {
            let count = f64::try_from(value.clone()).unwrap_or(f64::INFINITY);
            if count > MAX_REPEATS as f64 {
                return Err(failure(format!("a factor is above {MAX_REPEATS}")));
            }
        } else {
            b.charge(value.len().unwrap_or(1).saturating_mul(MAX_REPEATS))?;
            b.charge_value(&value, 0)?;
        }
        Ok(value)
    });
    let b = budget.clone();
    env.set_formatter(move |out, _, value| {
        b.charge_value(value, 0)?;
        match value.as_str() {
            Some(text) => out.write_str(text)?,
            None if value.is_undefined() => {}
            None => out.write_str(&python_text(value))?,
        }
        Ok(())
    });
    let b = budget.clone();
    env.add_filter("replace", move |value: &Value, from: &Value, to: &Value| {
        replace(&b, &text_of(value), &text_of(from), &text_of(to))
    });
    let b = budget.clone();
    env.add_filter(
        "join",
        move |value: &Value, separator: Option<&str>, kwargs: Kwargs| {
            let attribute: Option<String> = kwargs.get("attribute")?;
            let named: Option<String> = kwargs.get("d")?;
            kwargs.assert_all_used()?;
            let separator = separator.or(named.as_deref()).unwrap_or("");
            join(&b, separator, value, attribute.as_deref())
        },
    );
    let b = budget.clone();
    env.add_filter(
        "indent",
        move |value: &Value,
              width: Option<Value>,
              first: Option<bool>,
              blank: Option<bool>,
              kwargs: Kwargs| {
            let width = match width {
                Some(width) => width,
                None => kwargs
                    .get::<Option<Value>>("width")?
                    .unwrap_or(Value::from(4)),
            };
            let first = match first {
                Some(first) => first,
                None => kwargs.get::<Option<bool>>("first")?.unwrap_or(false),
            };
            let blank = match blank {
                Some(blank) => blank,
                None => kwargs.get::<Option<bool>>("blank")?.unwrap_or(false),
            };
            kwargs.assert_all_used()?;
            indent(&b, &text_of(value), &width, first, blank)
        },
    );
    let b = budget.clone();
    env.add_filter(
        "tojson",
        move |value: &Value, indent: Option<Value>, kwargs: Kwargs| {
            let indent = match indent {
                Some(indent) => Some(indent),
                None => kwargs.get::<Option<Value>>("indent")?,
            };
            let json = Json::new(indent, &kwargs)?;
            kwargs.assert_all_used()?;
            // An escape takes at most six bytes a character, an indentation one line a node.
            b.charge_value(value, 0)?;
            let mut out = String::new();
            json.write(&mut out, value, 0, &b)?;
            Ok::<_, JinjaError>(out)
        },
    );
}

/// The functions and methods that Hugging Face's environment has.
fn install_functions(env: &mut Environment<'_>, budget: &Budget, today: Date) {
    env.remove_global("debug");
    let b = budget.clone();
    env.add_function(
        "range",
        move |low: i64, high: Option<i64>, step: Option<i64>| range(&b, low, high, step),
    );
    env.add_function("raise_exception", |message: String| -> Result<Value, _> {
        Err(failure(message))
    });
    env.add_function("strftime_now", move |pattern: &str| today.format(pattern));
    let b = budget.clone();
    env.set_unknown_method_callback(move |state, value, method, args| {
        call_method(&b, state, value, method, args)
    });
}

/// Python's methods on strings, lists and dictionaries, charged before they run.
fn call_method(
    budget: &Budget,
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, JinjaError> {
    budget.charge_value(value, 0)?;
    for arg in args {
        budget.charge_value(arg, 0)?;
    }
    if let Some(text) = value.as_str() {
        match (method, args) {
            ("replace", [from, to]) => {
                return replace(budget, text, &text_of(from), &text_of(to)).map(Value::from);
            }
            ("join", [items]) => return join(budget, text, items, None).map(Value::from),
            ("title", []) => return Ok(Value::from(title(text))),
            ("format", _) if text.contains(':') => {
                return Err(failure("format specifications are not supported"));
            }
            ("format", _) => {
                let args = Value::from(args);
                for _ in text.matches('{') {
                    budget.charge_value(&args, 0)?;
                }
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Python's `str.title`: upper case after everything that is no letter.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

fn replace(budget: &Budget, text: &str, from: &str, to: &str) -> Result<String, JinjaError> {
    let found = if from.is_empty() {
        text.len() + 1
    } else {
        text.matches(from).count()
    };
    budget.charge(text.len().saturating_add(found.saturating_mul(to.len())))?;
    Ok(text.replace(from, to))
}

fn join(
    budget: &Budget,
    separator: &str,
    items: &Value,
    attribute: Option<&str>,
) -> Result<String, JinjaError> {
    if items.is_undefined() || items.is_none() {
        return Ok(String::new());
    }
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        let item = match attribute {
            Some(name) => item.get_attr(name)?,
            None => item,
        };
        budget.charge_value(&item, 0)?;
        budget.charge(separator.len())?;
        if i > 0 {
            out.push_str(separator);
        }
        out.push_str(&text_of(&item));
    }
    Ok(out)
}

fn indent(
    budget: &Budget,
    text: &str,
    width: &Value,
    first: bool,
    blank: bool,
) -> Result<String, JinjaError> {
    let pad = if let Some(pad) = width.as_str() {
        pad.to_owned()
    } else {
        let width = width
            .as_usize()
            .ok_or_else(|| failure("indent: the width is no count"))?;
        budget.charge(width)?;
        " ".repeat(width)
    };
    let lines = text.matches('\n').count() + 1;
    budget.charge(text.len().saturating_add(lines.saturating_mul(pad.len())))?;
    let mut out = String::new();
    for (i, line) in text.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if (i > 0 && (blank || !line.is_empty())) || (i == 0 && first) {
            out.push_str(&pad);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn range(
    budget: &Budget,
    low: i64,
    high: Option<i64>,
    step: Option<i64>,
) -> Result<Value, JinjaError> {
    let (mut at, end) = high.map_or((0, low), |high| (low, high));
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(failure("range: the step is 0"));
    }
    let mut items = Vec::new();
    while (step > 0 && at < end) || (step < 0 && at > end) {
        if items.len() >= MAX_RANGE {
            return Err(failure(format!("range: more than {MAX_RANGE} numbers")));
        }
        items.push(Value::from(at));
        at = at.saturating_add(step);
    }
    budget.charge(items.len().saturating_mul(ITEM))?;
    Ok(Value::from(items))
}

/// Python's `str(value)`.
fn text_of(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => python_text(value),
    }
}

/// Python's `repr` of a value.
fn python_text(value: &Value) -> String {
    let items = |value: &Value| -> Vec<Value> {
        value.try_iter().map(Iterator::collect).unwrap_or_default()
    };
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Undefined => "Undefined".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') {
                '"'
            } else {
                '\''
            };
            let mut out = String::from(quote);
            for c in text.chars() {
                match c {
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    '\\' => out.push_str("\\\\"),
                    c if c == quote => {
                        out.push('\\');
                        out.push(c);
                    }
                    c if c.is_control() => {
                        let _ = write!(out, "\\x{:02x}", u32::from(c));
                    }
                    c => out.push(c),
                }
            }
            out.push(quote);
            out
        }
        ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
            let parts: Vec<_> = items(value).iter().map(python_text).collect();
            match (value.is_tuple(), parts.as_slice()) {
                (true, [one]) => format!("({one},)"),
                (true, _) => format!("({})", parts.join(", ")),
                (false, _) => format!("[{}]", parts.join(", ")),
            }
        }
        ValueKind::Map => {
            let parts: Vec<_> = items(value)
                .iter()
                .map(|key| {
                    let item = value.get_item(key).unwrap_or_default();
                    format!("{}: {}", python_text(key), python_text(&item))
                })
                .collect();
            format!("{{{}}}", parts.join(", "))
        }
        _ => value.to_string(),
    }
}

/// Python's `json.dumps` with the options that templates use.
struct Json {
    indent: Option<String>,
    ensure_ascii: bool,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl Json {
    fn new(indent: Option<Value>, kwargs: &Kwargs) -> Result<Self, JinjaError> {
        let indent = match indent {
            None => None,
            Some(v) if v.is_none() || v.is_undefined() => None,
            Some(v) => Some(match v.as_str() {
                Some(pad) if pad.len() <= 64 => pad.to_owned(),
                Some(_) => return Err(failure("tojson: the indentation is too wide")),
                None => match v.as_usize() {
                    Some(width) if width <= 64 => " ".repeat(width),
                    _ => return Err(failure("tojson: the indentation is too wide")),
                },
            }),
        };
        let mut separators = (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        );
        if let Some(given) = kwargs.get::<Option<Value>>("separators")?
            && !given.is_none()
        {
            separators = (
                text_of(&given.get_item(&Value::from(0))?),
                text_of(&given.get_item(&Value::from(1))?),
            );
        }
        Ok(Self {
            indent,
            ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
            item_separator: separators.0,
            key_separator: separators.1,
            sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        })
    }

    fn write(
        &self,
        out: &mut String,
        value: &Value,
        depth: usize,
        budget: &Budget,
    ) -> Result<(), JinjaError> {
        let before = out.len();
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let _ = write!(out, "{value}");
            }
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.block(out, ['[', ']'], depth, items.len(), |out, i| {
                    self.write(out, &items[i], depth + 1, budget)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<_> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.block(out, ['{', '}'], depth, keys.len(), |out, i| {
                    self.string(out, &text_of(&keys[i]));
                    out.push_str(&self.key_separator);
                    self.write(out, &value.get_item(&keys[i])?, depth + 1, budget)
                })?;
            }
            kind => return Err(failure(format!("tojson: {kind} is not JSON"))),
        }
        budget.charge(out.len() - before)
    }

    fn block(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        depth: usize,
        n: usize,
        mut item: impl FnMut(&mut String, usize) -> Result<(), JinjaError>,
    ) -> Result<(), JinjaError> {
        out.push(open);
        for i in 0..n {
            if i > 0 {
                out.push_str(&self.item_separator);
            }
            if let Some(pad) = &self.indent {
                out.push('\n');
                out.push_str(&pad.repeat(depth + 1));
            }
            item(out, i)?;
        }
        if let (Some(pad), true) = (&self.indent, n > 0) {
            out.push('\n');
            out.push_str(&pad.repeat(depth));
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn from_json(json: &serde_json::Value) -> Value {
    use serde_json::Value as J;
    match json {
        J::Null => Value::from(()),
        J::Bool(b) => Value::from(*b),
        J::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        J::String(s) => Value::from(s.as_str()),
        J::Array(items) => Value::from(items.iter().map(from_json).collect::<Vec<_>>()),
        J::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), from_json(v)))),
    }
}

#[cfg(test)]
mod tests {
    use super::{Date, render};
    use crate::Result;

    fn rendered(source: &str) -> Result<String> {
        let context = serde_json::json!({"x": "0123456789", "l": [1, "a"], "t": true});
        render("test", source, &context, Date::default())
    }

    #[test]
    fn dates_count_leap_days() {
        let date = |days| {
            let Date { year, month, day } = Date::from_days(days);
            (year, month, day)
        };
        assert_eq!(date(0), (1970, 1, 1), "the first day");
        assert_eq!(date(11_016), (2000, 2, 29), "a leap day of a century");
        assert_eq!(date(11_017), (2000, 3, 1), "the day after it");
        assert_eq!(date(20_777), (2026, 11, 20), "an ordinary day");
    }

    #[test]
    fn hostile_templates_end_in_an_error() {
        let doubling = |op: &str, one: &str| {
            format!(
                "{{% set ns = namespace(x={one}) %}}{{% for i in range(60) %}}\
                 {{% set ns.x = ns.x {op} ns.x %}}{{% endfor %}}{{{{ ns.x|length }}}}"
            )
        };
        let mut cases = vec![
            ("doubling with ~", doubling("~", "x")),
            ("doubling with +", doubling("+", "x")),
            ("a list that doubles", doubling("+", "[x]")),
            ("indent", "{{ x|indent(2000000000, true) }}".to_owned()),
            ("repetition", "{{ x * 2000000000 }}".to_owned()),
            (
                "range",
                "{% for i in range(1000000000) %}{% endfor %}".to_owned(),
            ),
            (
                "a long chain",
                format!("{{{{ x{} }}}}", "|e".repeat(20_000)),
            ),
            (
                "parentheses",
                format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)),
            ),
            ("too long", "x".repeat(70_000)),
            ("an include", "{% include '/etc/passwd' %}".to_owned()),
            ("dunder", "{{ x.__class__.__mro__ }}".to_owned()),
            ("raise", "{{ raise_exception('no') }}".to_owned()),
            (
                "a macro that calls itself",
                "{% macro m(a) %}{{ m(a ~ a) }}{% endmacro %}{{ m(x) }}".to_owned(),
            ),
        ];
        let grow = |body: &str| {
            format!(
                "{{% set ns = namespace(x=x) %}}{{% for i in range(60) %}}{body}{{% endfor %}}\
                 {{{{ ns.x|length }}}}"
            )
        };
        cases.push(("replace", grow("{% set ns.x = ns.x|replace('0', ns.x) %}")));
        cases.push((
            "replace as a method",
            grow("{% set ns.x = ns.x.replace('0', ns.x) %}"),
        ));
        cases.push(("join", grow("{% set ns.x = ns.x|join(ns.x) %}")));
        cases.push(("JSON in JSON", grow("{% set ns.x = [ns.x, ns.x]|tojson %}")));
        cases.push((
            "a captured block",
            grow("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        ));
        cases.push((
            "nesting",
            grow("{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}",
        ));
        cases.push((
            "nesting in depth",
            "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}\
             {% endfor %}{{ ns.x }}"
                .to_owned(),
        ));
        cases.push((
            "repetitions in a list",
            format!("{{{{ [{}]|length }}}}", "'a' * 9000000, ".repeat(900)),
        ));
        cases.push((
            "slices in a list",
            format!(
                "{{% set y = x * 1000 %}}{{{{ [{}]|length }}}}",
                "(y * 1000)[1:], ".repeat(300)
            ),
        ));
        cases.push((
            "comparing what shares its parts",
            format!(
                "{}{{{{ a is eq(a) }}}}{}",
                "{% with a = [a, a] %}".repeat(60),
                "{% endwith %}".repeat(60)
            ),
        ));
        cases.push((
            "plain text in loops",
            format!(
                "{{% for i in range(9999) %}}{{% for j in range(9999) %}}{}{{% endfor %}}{{% endfor %}}",
                "x".repeat(60_000)
            ),
        ));
        for (what, source) in &cases {
            assert!(rendered(source).is_err(), "{what} must be refused");
            if source.contains("range(60)") {
                let twice = source.replace("range(60)", "range(2)");
                assert!(rendered(&twice).is_ok(), "{what}, done twice, is harmless");
            }
        }
    }

    #[test]
    fn values_print_as_python_prints_them() -> Result<()> {
        assert_eq!(
            rendered("{{ t }} {{ none }} {{ l }} {{ nothing }}")?,
            "True None [1, 'a'] ",
            "str() of a value"
        );
        assert_eq!(
            rendered("{{ {'b': [1, 'é<']}|tojson(indent=2) }}")?,
            "{\n  \"b\": [\n    1,\n    \"é<\"\n  ]\n}",
            "json.dumps"
        );
        assert_eq!(
            rendered(
                "{{ {'b': 'é', 'a': 1}|tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}"
            )?,
            "{\"a\":1,\"b\":\"\\u00e9\"}",
            "json.dumps with options"
        );
        Ok(())
    }

    #[test]
    fn the_date_is_an_input() {
        let date = Date {
            year: 2025,
            month: 1,
            day: 2,
        };
        assert_eq!(
            date.format("%d %b %Y, %A %%"),
            "02 Jan 2025, Thursday %",
            "a Thursday"
        );
    }
}
