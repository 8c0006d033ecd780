//! Instruments the source of a chat template, so that its growth can be bounded while it renders.
//!
//! A template from a model directory may double a string forty times: fuel does not notice, and the
//! allocation aborts the process. The engine has no hook on `~` and `+`, so the source gets one:
//! every operand of a growing or comparing operator, every filter's input, every slice and every
//! assigned value passes through the filter [`CAP`], which returns it unchanged after charging its
//! size to a budget (see `template.rs`). Invariant: a template that stays within the budget renders
//! to the same text with and without the insertions.

/// Name of the filter that charges a value to the budget.
pub(crate) const CAP: &str = "__cap";
/// Name of the filter that charges a factor of a repetition, `'x' * n`.
pub(crate) const FACTOR: &str = "__factor";

/// Operators, filters and brackets that one tag may hold; real templates stay below 60.
const MAX_OPERATORS_PER_TAG: usize = 1000;
/// Brackets that may be open at once in one tag.
const MAX_BRACKETS: usize = 100;

/// An instrumented source.
#[derive(Debug)]
pub(crate) struct Guarded {
    /// What to compile.
    pub(crate) source: String,
    /// Bytes of the longest stretch of plain text, which costs one unit of fuel whatever its length.
    pub(crate) longest_text: usize,
}

/// Instruments a template; the message says what is out of bounds.
pub(crate) fn guard(source: &str) -> Result<Guarded, String> {
    let mut out = String::with_capacity(source.len() * 2);
    let mut longest_text = 0;
    let mut rest = source;
    while let Some(at) = next_tag(rest) {
        longest_text = longest_text.max(at);
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let len = if rest.starts_with("{#") {
            let len = rest.find("#}").map_or(rest.len(), |end| end + 2);
            out.push_str(&rest[..len]);
            len
        } else if let Some(len) = raw_block(rest) {
            longest_text = longest_text.max(len);
            out.push_str(&rest[..len]);
            len
        } else if let Some((len, replacement)) = generation_tag(rest) {
            out.push_str(&replacement);
            len
        } else {
            Tag::new(rest, &mut out).copy()?
        };
        rest = &rest[len..];
    }
    out.push_str(rest);
    Ok(Guarded {
        source: out,
        longest_text: longest_text.max(rest.len()),
    })
}

fn next_tag(s: &str) -> Option<usize> {
    s.as_bytes()
        .windows(2)
        .position(|w| w[0] == b'{' && matches!(w[1], b'{' | b'%' | b'#'))
}

/// The parts of a tag without arguments, `{%- word -%}`: length, opening, word, closing.
fn bare_tag(s: &str) -> Option<(usize, &str, &str, &str)> {
    let inner = s.strip_prefix("{%")?;
    let end = inner.find("%}")?;
    let body = &inner[..end];
    let open = usize::from(body.starts_with(['-', '+']));
    let close = usize::from(body.len() > open && body.ends_with(['-', '+']));
    Some((
        end + 4,
        &s[..2 + open],
        body[open..body.len() - close].trim(),
        &s[2 + body.len() - close..end + 4],
    ))
}

/// Length of a whole `{% raw %}` … `{% endraw %}` block.
fn raw_block(s: &str) -> Option<usize> {
    let (mut at, _, word, _) = bare_tag(s)?;
    if word != "raw" {
        return None;
    }
    while let Some(next) = s[at..].find("{%") {
        at += next;
        match bare_tag(&s[at..]) {
            Some((len, _, "endraw", _)) => return Some(at + len),
            _ => at += 2,
        }
    }
    Some(s.len())
}

/// `{% generation %}` marks text for training; it becomes a block that does nothing but keeps the
/// trimming of white space around it.
fn generation_tag(s: &str) -> Option<(usize, String)> {
    let (len, open, word, close) = bare_tag(s)?;
    let word = match word {
        "generation" => "if true",
        "endgeneration" => "endif",
        _ => return None,
    };
    Some((len, format!("{open} {word} {close}")))
}

/// One level of brackets inside a tag.
struct Level {
    close: u8,
    /// Where the current operand starts in the output.
    start: usize,
    /// An operand is due: at the start, after an operator, after a comma.
    expect: bool,
    /// The filter for the current operand, which stands right of a growing operator.
    charged: Option<&'static str>,
    /// Where a slice would be wrapped: start and end of the sliced operand in the output.
    sliced: Option<(usize, usize)>,
}

/// Which part of a tag is being copied.
#[derive(PartialEq)]
enum Head {
    /// A `for` tag before its `in`.
    ForTarget,
    /// A `set` tag before its `=`.
    SetTarget,
    /// The value of a `set` tag, which is wrapped.
    SetValue,
    /// Any other expression.
    Plain,
}

/// Copies one tag, `{{ … }}` or `{% … %}`, with the insertions.
struct Tag<'a> {
    src: &'a str,
    at: usize,
    out: &'a mut String,
    levels: Vec<Level>,
    operators: usize,
    end: &'static str,
    head: Head,
    /// The last token was the name of a test, so that a bare argument may follow.
    after_test: bool,
}

impl<'a> Tag<'a> {
    fn new(src: &'a str, out: &'a mut String) -> Self {
        let end = if src.starts_with("{{") { "}}" } else { "%}" };
        Self {
            src,
            at: 0,
            out,
            levels: Vec::new(),
            operators: 0,
            end,
            head: Head::Plain,
            after_test: false,
        }
    }

    fn level(&mut self) -> &mut Level {
        self.levels
            .last_mut()
            .expect("the outermost level is never popped")
    }

    fn open(&mut self, close: u8, sliced: Option<(usize, usize)>) -> Result<(), String> {
        if self.levels.len() > MAX_BRACKETS {
            return Err(format!("more than {MAX_BRACKETS} brackets are open"));
        }
        self.levels.push(Level {
            close,
            start: self.out.len(),
            expect: true,
            charged: None,
            sliced,
        });
        Ok(())
    }

    fn take(&mut self, len: usize) {
        self.out.push_str(&self.src[self.at..self.at + len]);
        self.at += len;
    }

    fn space(&mut self) {
        let rest = &self.src[self.at..];
        self.take(rest.len() - rest.trim_start().len());
    }

    fn name_len(&self) -> usize {
        let rest = &self.src[self.at..];
        rest.find(|c: char| !(c.is_alphanumeric() || c == '_'))
            .unwrap_or(rest.len())
    }

    fn count(&mut self) -> Result<(), String> {
        self.operators += 1;
        if self.operators > MAX_OPERATORS_PER_TAG {
            return Err(format!(
                "one tag holds more than {MAX_OPERATORS_PER_TAG} operators"
            ));
        }
        Ok(())
    }

    fn charge(&mut self, filter: &str) {
        // Before the white space that was copied already, so that trimming marks stay last.
        let at = self.out.trim_end().len();
        self.out.insert_str(at, &format!("|{filter}"));
    }

    /// Ends the current operand at something that does not let it grow.
    fn finish_operand(&mut self) {
        let level = self.level();
        if let (Some(filter), false) = (level.charged.take(), level.expect) {
            self.charge(filter);
        }
    }

    /// A primary expression starts here, unless it is the argument of a test.
    fn primary(&mut self) {
        let start = self.out.len();
        let level = self.level();
        if level.expect {
            level.expect = false;
            level.start = start;
        }
    }

    /// Copies the tag and returns its length in the source.
    fn copy(mut self) -> Result<usize, String> {
        self.take(2);
        if self.src[self.at..].starts_with(['-', '+']) {
            self.take(1);
        }
        self.open(0, None)?;
        self.space();
        if self.end == "%}" {
            let len = self.name_len();
            let keyword = &self.src[self.at..self.at + len];
            self.head = match keyword {
                "for" => Head::ForTarget,
                "set" => Head::SetTarget,
                _ => Head::Plain,
            };
            self.take(len);
        }
        while self.at < self.src.len() {
            self.space();
            if self.step()? {
                break;
            }
        }
        Ok(self.at)
    }

    /// Copies one token; true at the end of the tag.
    fn step(&mut self) -> Result<bool, String> {
        let rest = &self.src[self.at..];
        let Some(&first) = rest.as_bytes().first() else {
            return Ok(true);
        };
        if self.levels.len() == 1 {
            let trim = usize::from(matches!(first, b'-' | b'+'));
            if rest[trim..].starts_with(self.end) {
                self.finish_operand();
                if self.head == Head::SetValue {
                    self.out.push_str(")|");
                    self.out.push_str(CAP);
                    self.out.push(' ');
                }
                self.take(trim + 2);
                return Ok(true);
            }
        }
        let after_test = std::mem::take(&mut self.after_test);
        match first {
            b'\'' | b'"' => {
                self.primary();
                let len = string_len(rest);
                self.take(len);
            }
            b'0'..=b'9' => {
                self.primary();
                let digits = rest
                    .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                    .unwrap_or(rest.len());
                let more = rest[digits..]
                    .strip_prefix('.')
                    .map_or(0, |r| r.bytes().take_while(u8::is_ascii_digit).count());
                self.take(if more > 0 { digits + 1 + more } else { digits });
            }
            b'(' | b'[' | b'{' => self.bracket(first)?,
            b')' | b']' | b'}' => {
                if self.levels.len() == 1 || self.level().close != first {
                    return Err(format!("a '{}' closes nothing", char::from(first)));
                }
                self.finish_operand();
                self.levels.pop();
                self.take(1);
            }
            b'|' => {
                self.count()?;
                self.charge(CAP);
                self.take(1);
                self.space();
                let len = self.name_len();
                self.take(len);
            }
            b'.' if !self.level().expect => {
                self.count()?;
                self.take(1);
                self.space();
                let len = self.name_len();
                self.take(len);
            }
            _ if first == b'_' || first >= 0x80 || first.is_ascii_alphabetic() => {
                self.word(after_test)?;
            }
            _ => self.operator(rest)?,
        }
        Ok(false)
    }

    fn bracket(&mut self, first: u8) -> Result<(), String> {
        self.count()?;
        let expect = self.level().expect;
        let sliced = (first == b'[' && !expect).then(|| (self.level().start, self.out.len()));
        self.primary();
        self.take(1);
        let close = match first {
            b'(' => b')',
            b'[' => b']',
            _ => b'}',
        };
        self.open(close, sliced)
    }

    fn operator(&mut self, rest: &str) -> Result<(), String> {
        let growing = [
            "**", "//", "==", "!=", "<=", ">=", "+", "~", "*", "<", ">", "%",
        ]
        .iter()
        .find(|op| rest.starts_with(**op));
        if let Some(op) = growing {
            self.count()?;
            let filter = if *op == "*" { FACTOR } else { CAP };
            let level = self.level();
            let left = level.charged.filter(|f| *f == FACTOR).unwrap_or(filter);
            let has_left = !level.expect;
            level.charged = Some(filter);
            level.expect = true;
            if has_left {
                self.charge(left);
            }
            self.take(op.len());
            return Ok(());
        }
        let c = rest.chars().next().unwrap_or(' ');
        if c == '-' && self.level().expect {
            self.take(1); // A sign, not an operator.
            return Ok(());
        }
        self.count()?;
        self.finish_operand();
        if c == ':' && self.level().close == b'}' {
            self.charge(CAP); // The key of a dictionary is hashed.
        } else if c == ':' {
            self.wrap_slice();
        }
        self.take(c.len_utf8());
        if c == '=' && self.head == Head::SetTarget && self.levels.len() == 1 {
            self.head = Head::SetValue;
            self.out.push_str(" (");
        }
        self.level().expect = true;
        Ok(())
    }

    /// The subscript turned out to be a slice: `x[` becomes `(x|cap)[`, for a slice is a copy.
    fn wrap_slice(&mut self) {
        if let Some((start, end)) = self.level().sliced.take() {
            let tail = format!("|{CAP})");
            self.out.insert_str(end, &tail);
            self.out.insert(start, '(');
            self.level().start += tail.len() + 1;
        }
    }

    fn word(&mut self, after_test: bool) -> Result<(), String> {
        let len = self.name_len();
        let word = &self.src[self.at..self.at + len];
        let expect = self.level().expect;
        match word {
            "" => {
                let c = self.src[self.at..].chars().next().unwrap_or_default();
                return Err(format!("{c:?} begins no name"));
            }
            "and" | "or" | "if" | "else" if !expect => {
                self.count()?;
                self.finish_operand();
                self.take(len);
                self.level().expect = true;
            }
            "not" if expect => self.take(len),
            "in" | "not" if !expect => {
                self.count()?;
                if self.head == Head::ForTarget {
                    self.head = Head::Plain;
                    self.take(len);
                    self.level().expect = true;
                    return Ok(());
                }
                self.charge(CAP);
                self.take(len);
                if word == "not" {
                    self.space();
                    if self.src[self.at..].starts_with("in") {
                        self.take(2);
                    }
                }
                let level = self.level();
                level.charged = Some(CAP);
                level.expect = true;
            }
            "is" if !expect => {
                self.count()?;
                self.charge(CAP);
                self.take(len);
                self.space();
                if self.src[self.at..self.at + self.name_len()] == *"not" {
                    self.take(3);
                    self.space();
                }
                let len = self.name_len();
                self.take(len);
                self.after_test = true;
            }
            _ => {
                if !expect && !after_test {
                    self.finish_operand();
                }
                self.primary();
                self.take(len);
            }
        }
        Ok(())
    }
}

/// Length of a string literal with its quotes; to the end where it is not closed.
fn string_len(s: &str) -> usize {
    let bytes = s.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b if b == bytes[0] => return at + 1,
            _ => at += 1,
        }
    }
    s.len()
}

#[cfg(test)]
mod tests {
    use super::guard;

    fn guarded(source: &str) -> String {
        guard(source).map(|g| g.source).expect("a sound template")
    }

    #[test]
    fn growing_operands_are_charged() {
        assert_eq!(
            guarded("{{ a ~ b.c }}"),
            "{{ a|__cap ~ b.c|__cap }}",
            "both operands"
        );
        assert_eq!(
            guarded("{%- set x = y if z else 'w' -%}"),
            "{%- set x = ( y if z else 'w' )|__cap -%}",
            "an assigned value"
        );
        assert_eq!(
            guarded("{{ m[::-1] }}{{ m['a'] }}"),
            "{{ (m|__cap)[::-1] }}{{ m['a'] }}",
            "a slice, not a subscript"
        );
        assert_eq!(
            guarded("{% for a in b|list if a is string and a in 'x' %}"),
            "{% for a in b|__cap|list if a|__cap is string and a|__cap in 'x'|__cap %}",
            "the `in` of a loop is no operator"
        );
    }

    #[test]
    fn text_comments_raw_blocks_and_strings_are_copied() {
        for source in [
            "plain { text }",
            "{# a ~ b #}",
            "{% raw %}{{ a ~ b }}{% endraw %}",
            "{{ 'a ~ b }}' }}",
        ] {
            assert_eq!(guarded(source), source, "nothing to charge");
        }
        assert_eq!(
            guarded("{{ {'a': {'b': n * 2 + 1}} }}"),
            "{{ {'a'|__cap: {'b'|__cap: n|__factor * 2|__factor + 1|__cap}} }}",
            "keys, factors and terms"
        );
        assert_eq!(
            guarded("{%- generation %}x{% endgeneration -%}"),
            "{%- if true %}x{% endif -%}",
            "generation tags keep their trimming"
        );
    }

    #[test]
    fn a_character_of_no_name_is_refused() {
        for c in ['\u{f0000}', '\u{fffd}', '→', '。'] {
            for tag in [format!("{{{{ {c} }}}}"), format!("{{% if a{c}b %}}")] {
                assert!(guard(&tag).is_err(), "{c:?} in {tag}");
            }
        }
        assert_eq!(
            guarded("{{ 'é→' ~ é }}"),
            "{{ 'é→'|__cap ~ é|__cap }}",
            "é is a letter"
        );
    }

    #[test]
    fn a_long_chain_is_refused() {
        assert!(
            guard(&format!("{{{{ a{} }}}}", "|e".repeat(2000))).is_err(),
            "2000 filters"
        );
        assert!(
            guard(&format!("{{{{ {} }}}}", "(".repeat(2000))).is_err(),
            "2000 parentheses"
        );
    }
}
