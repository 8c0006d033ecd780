//! JSON that may be hostile: bounded in depth, and in what it may repeat.
//!
//! Plain `serde_json` lets the last of two equal keys win, and follows 128 levels; a file that two
//! readers understand differently is refused here instead.

use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

pub(super) use crate::error::shown;
pub(super) use crate::files::{find, read_small};
use crate::{Error, Result};

/// Levels of brackets that a JSON file may open.
const MAX_DEPTH: usize = 64;

/// A JSON value as part of a one-line message.
pub(super) fn shown_value(value: &Value) -> String {
    shown(&value.to_string())
}

/// Checks that brackets are at most [`MAX_DEPTH`] deep and that the text is UTF-8, and gives it.
pub(super) fn text<'a>(path: &Path, field: &str, bytes: &'a [u8]) -> Result<&'a str> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let problem = format!("is not UTF-8 at byte {}", e.valid_up_to());
        Error::bad(path, field, problem)
    })?;
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'{' | b'[' if !quoted => {
                depth += 1;
                if depth > MAX_DEPTH {
                    let problem = format!("nests more than {MAX_DEPTH} levels deep, at byte {at}");
                    return Err(Error::bad(path, field, problem));
                }
            }
            b'}' | b']' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(text)
}

/// The object that a JSON file holds.
pub(super) fn object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    let text = text(path, "JSON", bytes)?;
    let mut json = serde_json::Deserializer::from_str(text);
    let value = Unique
        .deserialize(&mut json)
        .and_then(|value| json.end().map(|()| value))
        .map_err(|e| Error::bad(path, "JSON", shown(&e.to_string())))?;
    match value {
        Value::Object(map) => Ok(map),
        other => {
            let problem = format!("expected an object, found {}", shown_value(&other));
            Err(Error::bad(path, "JSON", problem))
        }
    }
}

/// Reads any value, and refuses an object that names a key twice.
struct Unique;

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v)
            .map(Value::Number)
            .ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(Self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Self)?;
            if values.contains_key(&key) {
                let problem = format!("key '{}' is there twice", shown(&key));
                return Err(A::Error::custom(problem));
            }
            values.insert(key, value);
        }
        Ok(Value::Object(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_there_twice_is_refused_at_any_level() {
        let error = object(Path::new("x.json"), br#"{"a": [{"b": 1, "b": 2}]}"#)
            .expect_err("equal keys must be refused");
        let line = error.to_string();
        assert!(line.contains("key 'b' is there twice"), "said: {line}");
    }

    #[test]
    fn brackets_inside_of_strings_do_not_nest() {
        let json = format!(r#"{{"a": "{}\" {}"}}"#, "[".repeat(100), "{".repeat(100));
        object(Path::new("x.json"), json.as_bytes()).expect("the brackets are text");
        let json = format!("{{\"a\": {}{}}}", "[".repeat(63), "]".repeat(63));
        object(Path::new("x.json"), json.as_bytes()).expect("64 levels are allowed");
        let json = format!("{{\"a\": {}{}}}", "[".repeat(64), "]".repeat(64));
        object(Path::new("x.json"), json.as_bytes()).expect_err("65 levels are not");
    }

    #[test]
    fn a_message_stays_on_one_line() {
        assert_eq!(
            shown("a\nb\0"),
            "a\\nb\\u{0}",
            "control characters are escaped"
        );
        assert!(
            shown(&"x".repeat(1000)).chars().count() <= crate::error::MAX_SHOWN + 1,
            "a long text is cut"
        );
    }
}
