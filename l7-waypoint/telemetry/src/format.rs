//! Envoy's format strings (`%REQ(:METHOD)%`), compiled once. Used for access logs and for header values.

use std::fmt::Write;
use std::time::SystemTime;

use time::OffsetDateTime;

mod operator;

use crate::record::Record;
use operator::Operator;
pub(crate) use operator::protocol;

/// A compiled format string.
#[derive(Debug, Clone)]
pub struct Format {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone)]
enum Piece {
    Text(String),
    Operator { operator: Operator, max: Option<usize> },
}

/// A format string that Envoy would refuse too.
#[derive(Debug, thiserror::Error)]
#[error("format {text:?}: {reason}")]
pub struct FormatError {
    text: String,
    reason: &'static str,
}

impl Format {
    /// Compiles `text`. Operators not known are kept and give `-`, which is what [`Format::unknown`] lists.
    pub fn parse(text: &str) -> Result<Self, FormatError> {
        let error = |reason| FormatError { text: text.to_owned(), reason };
        let (mut pieces, mut literal, mut rest) = (Vec::new(), String::new(), text);
        while let Some(start) = rest.find('%') {
            literal.push_str(&rest[..start]);
            rest = &rest[start + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let end = operator_end(rest).ok_or_else(|| error("an operator is not closed by `%`"))?;
            if !literal.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut literal)));
            }
            let (operator, max) = Operator::parse(&rest[..end]).map_err(error)?;
            pieces.push(Piece::Operator { operator, max });
            rest = &rest[end + 1..];
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            pieces.push(Piece::Text(literal));
        }
        Ok(Self { pieces })
    }

    /// The text when there is no operator in it.
    pub fn literal(&self) -> Option<&str> {
        match self.pieces.as_slice() {
            [] => Some(""),
            [Piece::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Operators that always give `-`, by name.
    pub fn unknown(&self) -> Vec<&str> {
        let unknown = |piece| match piece {
            &Piece::Operator { operator: Operator::Unknown(ref name), .. } => Some(name.as_str()),
            _ => None,
        };
        self.pieces.iter().filter_map(unknown).collect()
    }

    /// Appends the text for `record`.
    pub fn write(&self, record: &Record<'_>, out: &mut String) {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Operator { operator, max } => {
                    let start = out.len();
                    if !operator.write(record, out) {
                        out.push('-');
                    }
                    truncate(out, start, *max);
                }
            }
        }
    }

    /// The value as JSON: a lone operator keeps its type (numbers stay numbers) and is null when it has no value.
    pub fn json(&self, record: &Record<'_>) -> serde_json::Value {
        if let [Piece::Operator { operator, max }] = self.pieces.as_slice() {
            let mut text = String::new();
            if !operator.write(record, &mut text) {
                return serde_json::Value::Null;
            }
            truncate(&mut text, 0, *max);
            if operator.is_number()
                && let Ok(number) = text.parse::<u64>()
            {
                return number.into();
            }
            return text.into();
        }
        let mut text = String::new();
        self.write(record, &mut text);
        text.into()
    }
}

/// Position of the closing `%`, skipping one within parentheses (as in `%START_TIME(%s)%`).
fn operator_end(text: &str) -> Option<usize> {
    let mut depth = 0u32;
    for (position, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '%' if depth == 0 => return Some(position),
            _ => {}
        }
    }
    None
}

fn truncate(out: &mut String, start: usize, max: Option<usize>) {
    if let Some(max) = max
        && let Some((end, _)) = out[start..].char_indices().nth(max)
    {
        out.truncate(start + end);
    }
}

/// RFC 3339 in UTC with milliseconds, as Envoy writes `%START_TIME%`.
pub(crate) fn timestamp(at: SystemTime) -> String {
    let mut out = String::with_capacity(24);
    write_timestamp(at, &mut out);
    out
}

pub(crate) fn write_timestamp(at: SystemTime, out: &mut String) {
    let at = OffsetDateTime::from(at);
    let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
    let (hour, minute, second, milli) = (at.hour(), at.minute(), at.second(), at.millisecond());
    // Writing to a String can't fail.
    let _ = write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z");
}

#[cfg(test)]
pub(crate) mod tests;
