//! A typed reader over a TOML table that remembers which keys were asked for.
//!
//! Each key is named once, where it is read, with its type and default. When a table is done, a key that nobody asked
//! for is refused with the nearest known one, so a misspelling can never fall back to a default in silence.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use toml::{Table, Value};

use super::Overrides;

/// The largest whole number, where a key has no bound of its own. 2^48 is beyond any sensible count and keeps products
/// of two of them inside u128, of one and a small number in u64.
pub(super) const MOST: u64 = 1 << 48;

/// The least and the greatest positive number of a key that is computed with in 32 bits: a smaller one would be zero
/// or lose digits, a greater one would be infinite.
pub(super) const POSITIVE: (f64, f64) = (f32::MIN_POSITIVE as f64, f32::MAX as f64);
/// The same for a key that may be zero; see [`is_zero_or_normal`].
pub(super) const NOT_NEGATIVE: (f64, f64) = (0.0, POSITIVE.1);
/// A decay rate: below 1 in 32 bits, too.
pub(super) const BELOW_ONE: (f64, f64) = (0.0, (1.0 - f32::EPSILON / 2.0) as f64);

/// Whether a number keeps its meaning in 32 bits.
pub(super) fn is_zero_or_normal(number: f64) -> bool {
    number == 0.0 || (number as f32).is_normal()
}

/// What is wrong with a job file, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file could not be read.
    #[error("cannot read job file {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The text is not TOML.
    #[error("{place} is not valid TOML: {source}")]
    Syntax {
        /// The file, or the `--set` argument.
        place: String,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key no part of Cairn knows.
    #[error("{place}: unknown key `{key}`{hint}")]
    UnknownKey {
        /// The file, or the `--set` argument.
        place: String,
        /// The dotted key.
        key: String,
        /// The nearest known key, as a sentence.
        hint: String,
    },
    /// A required key is missing.
    #[error("{place}: key `{key}` is missing: {wanted}")]
    Missing {
        /// The file.
        place: String,
        /// The dotted key.
        key: String,
        /// What it should hold.
        wanted: String,
    },
    /// A value of the wrong type or out of range.
    #[error("{place}: `{key}` is {found}, but must be {wanted}")]
    Value {
        /// The file.
        place: String,
        /// The dotted key.
        key: String,
        /// What was found.
        found: String,
        /// What would be right.
        wanted: String,
    },
}

impl SpecError {
    /// Puts the blame on the `--set` that gave the key its value, if there is one: the job file may be right.
    pub(super) fn blame(mut self, overrides: &Overrides) -> Self {
        if let Self::UnknownKey { place, key, .. } | Self::Value { place, key, .. } = &mut self {
            let within = |inner: &str, outer: &str| {
                inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            // `--set a.b=…` gives `a.b`, everything within it and, if nothing else does, the section `a`.
            let related = overrides.iter().filter(|(set, _)| within(key, set) || within(set, key));
            if let Some((set, value)) = related.min_by_key(|(set, _)| set.len().abs_diff(key.len())) {
                *place = set_place(set, value);
            }
        }
        self
    }
}

/// The name of a `--set` argument in messages, cut short if it is long.
pub(super) fn set_place(key: &str, value: &str) -> String {
    format!("--set {key}={value}").chars().take(200).collect()
}

/// What a whole number should have been. The upper bound is left out where it is plainly not what was violated.
pub(super) fn whole_wanted(low: bool, range: &RangeInclusive<u64>) -> String {
    let (least, most) = (range.start(), range.end());
    if low && *most == MOST {
        format!("a whole number of at least {least}")
    } else {
        format!("a whole number from {least} to {most}")
    }
}

/// What a whole number that may be negative should have been.
pub(super) fn signed_wanted((least, most): (i64, i64)) -> String {
    format!("a whole number from {least} to {most}")
}

/// What a number should have been.
pub(super) fn number_wanted((low, high): (f64, f64)) -> String {
    let floats = format!("{:.1e} to {:.1e}, what a 32-bit float can hold", POSITIVE.0, POSITIVE.1);
    match (low, high) {
        range if range == POSITIVE => format!("a number greater than 0 (from {floats})"),
        range if range == NOT_NEGATIVE => format!("0 or a number greater than 0 (from {floats})"),
        (low, high) => format!("a number from {low} to {high}"),
    }
}

/// Whether a number lies in a range and keeps its meaning in 32 bits; not-a-number lies in none.
pub(super) fn is_within(number: f64, (low, high): (f64, f64)) -> bool {
    number >= low && number <= high && is_zero_or_normal(number)
}

/// Reads one table; see the module header.
pub(super) struct Reader<'a> {
    place: &'a str,
    prefix: String,
    table: Table,
    asked: BTreeSet<&'static str>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(place: &'a str, table: Table) -> Self {
        Self { place, prefix: String::new(), table, asked: BTreeSet::new() }
    }

    /// The sub-table `key`, empty if it is absent.
    pub(super) fn section(&mut self, key: &'static str) -> Result<Reader<'a>, SpecError> {
        let table = match self.take(key) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => return Err(self.wrong(key, &other, format!("a table, written [{key}]"))),
        };
        Ok(self.within(key, table))
    }

    /// A reader of the table that is the value of `key`.
    pub(super) fn within(&self, key: &str, table: Table) -> Reader<'a> {
        Reader { place: self.place, prefix: format!("{}{key}.", self.prefix), table, asked: BTreeSet::new() }
    }

    /// Takes a value out, noting that the key is known.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Value> {
        self.asked.insert(key);
        self.table.remove(key)
    }

    pub(super) fn text(&mut self, key: &'static str) -> Result<Option<String>, SpecError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, &other, "a string in quotes".into())),
        }
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> Result<bool, SpecError> {
        match self.take(key) {
            None => Ok(default),
            Some(Value::Boolean(value)) => Ok(value),
            Some(other) => Err(self.wrong(key, &other, "true or false".into())),
        }
    }

    /// A whole number of at least `least`.
    pub(super) fn whole(&mut self, key: &'static str, least: u64, default: u64) -> Result<u64, SpecError> {
        Ok(self.whole_if(key, least)?.unwrap_or(default))
    }

    pub(super) fn whole_if(&mut self, key: &'static str, least: u64) -> Result<Option<u64>, SpecError> {
        self.take(key).map(|value| self.as_whole(key, &value, least..=MOST)).transpose()
    }

    /// A whole number in `range`.
    pub(super) fn whole_in(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u64>,
        default: u64,
    ) -> Result<u64, SpecError> {
        self.take(key).map_or(Ok(default), |value| self.as_whole(key, &value, range))
    }

    pub(super) fn as_whole(&self, key: &str, value: &Value, range: RangeInclusive<u64>) -> Result<u64, SpecError> {
        let number = value.as_integer();
        if let Some(number) = number.and_then(|n| u64::try_from(n).ok()).filter(|n| range.contains(n)) {
            return Ok(number);
        }
        let low = number.is_some_and(|n| i128::from(n) < i128::from(*range.start()));
        Err(self.wrong(key, value, whole_wanted(low, &range)))
    }

    /// A whole number, which may be negative, from the first to the second of `range`.
    pub(super) fn signed_in(&mut self, key: &'static str, range: (i64, i64), default: i64) -> Result<i64, SpecError> {
        let Some(value) = self.take(key) else { return Ok(default) };
        let number = value.as_integer().filter(|number| (range.0..=range.1).contains(number));
        number.ok_or_else(|| self.wrong(key, &value, signed_wanted(range)))
    }

    pub(super) fn size(&mut self, key: &'static str, default: usize) -> Result<usize, SpecError> {
        Ok(self.whole(key, 1, default as u64)? as usize)
    }

    /// A number in `range`, which is given as its least and its greatest.
    pub(super) fn number(&mut self, key: &'static str, range: (f64, f64), default: f64) -> Result<f64, SpecError> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => self.as_number(key, &value, range),
        }
    }

    pub(super) fn as_number(&self, key: &str, value: &Value, range: (f64, f64)) -> Result<f64, SpecError> {
        let number = match value {
            Value::Float(number) => *number,
            Value::Integer(number) => *number as f64,
            other => return Err(self.wrong(key, other, "a number".into())),
        };
        if is_within(number, range) { Ok(number) } else { Err(self.wrong(key, value, number_wanted(range))) }
    }

    /// One of a fixed set of words.
    pub(super) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
        default: T,
    ) -> Result<T, SpecError> {
        let Some(value) = self.take(key) else { return Ok(default) };
        let known = value.as_str().and_then(|text| choices.iter().find(|(word, _)| *word == text));
        known.map(|(_, choice)| *choice).ok_or_else(|| {
            let words: Vec<_> = choices.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            let near = value.as_str().and_then(|text| nearest(text, choices.iter().map(|(word, _)| *word)));
            let near = near.map(|word| format!(" (did you mean \"{word}\"?)")).unwrap_or_default();
            self.wrong(key, &value, format!("one of {}{near}", words.join(", ")))
        })
    }

    pub(super) fn texts(&mut self, key: &'static str, default: &[&str]) -> Result<Vec<String>, SpecError> {
        let Some(value) = self.take(key) else { return Ok(default.iter().map(ToString::to_string).collect()) };
        let texts = value.as_array().and_then(|items| {
            items.iter().map(|item| item.as_str().map(str::to_string)).collect::<Option<Vec<String>>>()
        });
        texts.ok_or_else(|| self.wrong(key, &value, "a list of strings".into()))
    }

    /// A required key is absent; what is left over was refused before, see [`Reader::finish`].
    pub(super) fn missing(&self, key: &str, wanted: &str) -> SpecError {
        SpecError::Missing { place: self.place.into(), key: format!("{}{key}", self.prefix), wanted: wanted.into() }
    }

    pub(super) fn wrong(&self, key: &str, found: &Value, wanted: String) -> SpecError {
        self.refuse(key, describe(found), wanted)
    }

    pub(super) fn refuse(&self, key: &str, found: String, wanted: String) -> SpecError {
        SpecError::Value { place: self.place.into(), key: format!("{}{key}", self.prefix), found, wanted }
    }

    /// Refuses what is left over. Called when every known key was asked for, and before a required one is found
    /// missing: what is there under a wrong name is not missing, but misspelt.
    pub(super) fn finish(&self) -> Result<(), SpecError> {
        let Some(key) = self.table.keys().next() else { return Ok(()) };
        let hint = match nearest(key, self.asked.iter().copied()) {
            Some(near) => format!(" (did you mean `{}{near}`?)", self.prefix),
            None => {
                let known: Vec<_> = self.asked.iter().map(|key| format!("`{key}`")).collect();
                format!(" (known here: {})", known.join(", "))
            }
        };
        Err(SpecError::UnknownKey { place: self.place.into(), key: format!("{}{key}", self.prefix), hint })
    }
}

/// The candidate most like `text`, if any is like it at all.
fn nearest<'c>(text: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(text, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// A value in words, short enough for a message.
fn describe(value: &Value) -> String {
    let shown = match value {
        Value::Table(_) => return "a table".into(),
        Value::Array(_) => return "a list".into(),
        Value::String(text) => format!("the string {text:?}"),
        Value::Boolean(flag) => format!("the boolean {flag}"),
        other => other.to_string(),
    };
    shown.chars().take(80).collect()
}
