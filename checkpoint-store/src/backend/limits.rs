//! How patient a store is, and how many requests it makes at once.
//!
//! A request has a time limit; one that fails without a verdict is repeated, after a pause that grows; and no more than
//! a set number are in flight, so that a thousand ranks do not drown a server. The numbers can be set by the
//! environment (`CAIRN_STORE_…`) and by options; a name that is not known is answered with the nearest one that is.

use std::time::Duration;

use crate::error::StoreError;

/// The prefix of the environment's variables.
const PREFIX: &str = "CAIRN_STORE_";
/// The names of the settings, as options; in the environment they are upper case after the prefix.
pub(super) const NAMES: [&str; 4] = ["request_timeout", "retries", "requests_in_flight", "part_mib"];
/// The longest pause before a request is repeated.
const MOST_PAUSE: Duration = Duration::from_secs(5);

/// Time limits and numbers of requests of a store in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The longest a request may take before it counts as failed.
    pub request_timeout: Duration,
    /// How often a request that failed without a verdict is repeated.
    pub retries: u32,
    /// Requests in flight at once, of all clones of a store together.
    pub requests_in_flight: usize,
    /// Objects up to this size are put in one request; larger ones in parts of at least this size.
    pub part_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_timeout: Duration::from_mins(1),
            retries: 6,
            requests_in_flight: 64,
            // Far above what servers ask of a part at least (5 MiB), and 10,000 of them make an object of 156 GiB.
            part_bytes: 16 << 20,
        }
    }
}

impl Limits {
    /// The defaults with what the environment says.
    pub fn from_env() -> Result<Self, StoreError> {
        Self::from_variables(
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    fn from_variables(variables: impl Iterator<Item = (String, String)>) -> Result<Self, StoreError> {
        let mut limits = Self::default();
        for (variable, value) in variables {
            let Some(name) = variable.strip_prefix(PREFIX) else { continue };
            let name = name.to_ascii_lowercase();
            if !limits.set(&name, &value)? {
                let near = nearest(&name, &NAMES).map(|near| format!("{PREFIX}{}", near.to_ascii_uppercase()));
                return Err(StoreError::Input(unknown(&format!("environment variable {variable}"), near.as_deref())));
            }
        }
        Ok(limits)
    }

    /// Sets one by its name; `false` if it is not one of ours.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<bool, StoreError> {
        match name {
            "request_timeout" => {
                let text = value.trim().trim_end_matches('s').trim_end();
                self.request_timeout = Duration::from_secs(number(name, text, 1, 3_600, "seconds")?);
            }
            "retries" => self.retries = number(name, value, 0, 100, "repetitions of a request")? as u32,
            "requests_in_flight" => {
                self.requests_in_flight = number(name, value, 1, 65_536, "requests")? as usize;
            }
            "part_mib" => self.part_bytes = number(name, value, 5, 4_096, "MiB")? << 20,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The pause before attempt `number`, counted from 1 for the first repetition.
    pub(super) fn pause(number: u32) -> Duration {
        Duration::from_millis(50 << (2 * number.min(4)).saturating_sub(2)).min(MOST_PAUSE)
    }
}

fn number(name: &str, text: &str, least: u64, most: u64, unit: &str) -> Result<u64, StoreError> {
    let value = text.trim().parse().ok().filter(|n| (least..=most).contains(n));
    value.ok_or_else(|| {
        let shown: String = text.chars().take(40).collect();
        StoreError::Input(format!("store option {name}: {shown:?} is not a number of {unit} from {least} to {most}"))
    })
}

/// The known name most like a wrong one, if any is like it.
pub(super) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let like = |known: &&str| strsim::jaro_winkler(name, known);
    let best = known.iter().copied().max_by(|a, b| like(a).total_cmp(&like(b)))?;
    (like(&best) > 0.75).then_some(best)
}

/// The message for a name that is not known.
pub(super) fn unknown(what: &str, near: Option<&str>) -> String {
    match near {
        Some(near) => format!("unknown {what}; did you mean {near}?"),
        None => format!("unknown {what}; docs/store.md lists what there is"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Limits, StoreError> {
        Limits::from_variables(variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
    }

    #[test]
    fn the_environment_sets_limits() {
        let set = from(&[
            ("CAIRN_STORE_REQUEST_TIMEOUT", "30s"),
            ("CAIRN_STORE_RETRIES", "0"),
            ("CAIRN_STORE_REQUESTS_IN_FLIGHT", "8"),
            ("CAIRN_STORE_PART_MIB", "64"),
            ("CAIRN_TOKEN_FILE", "/x"),
        ]);
        let right = Limits {
            request_timeout: Duration::from_secs(30),
            retries: 0,
            requests_in_flight: 8,
            part_bytes: 64 << 20,
        };
        assert_eq!(set.unwrap(), right);
    }

    #[test]
    fn wrong_names_and_values_say_what_would_be_right() {
        let message = |name, value| from(&[(name, value)]).unwrap_err().to_string();
        assert!(message("CAIRN_STORE_RETRYS", "1").contains("did you mean CAIRN_STORE_RETRIES?"));
        assert!(message("CAIRN_STORE_ZZZ", "1").contains("docs/store.md"));
        assert!(message("CAIRN_STORE_REQUESTS_IN_FLIGHT", "0").contains("from 1 to 65536"));
        assert!(message("CAIRN_STORE_REQUEST_TIMEOUT", "soon").contains("seconds from 1 to 3600"));
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let pauses: Vec<_> = (1..8).map(|n| Limits::pause(n).as_millis()).collect();
        assert_eq!(pauses, [50, 200, 800, 3_200, 3_200, 3_200, 3_200]);
    }
}
