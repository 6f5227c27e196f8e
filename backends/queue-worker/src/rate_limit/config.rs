//! A rate limit as typed: `bw_size=100M,bw_refill_time=1000,ops_size=5000,ops_refill_time=1000`.
#![forbid(unsafe_code)]

use std::str::FromStr;

/// Every key, in the order of the help text.
const KEYS: [&str; 6] = [
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
];

/// Similarity from which a known key is offered for an unknown one.
const NEAR: f64 = 0.6;

/// Longest time in which a bucket may fill: a day.
const MAX_REFILL_TIME_MS: u64 = 86_400_000;

/// One token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Most tokens it holds, and how many it has at the start: bytes, or operations. Not 0.
    pub size: u64,
    /// Tokens that there are once, on top of that.
    pub one_time_burst: u64,
    /// In how many milliseconds an empty bucket fills. Not 0.
    pub refill_time_ms: u64,
}

/// Limits for a device, or for one direction of it. A value parser for clap (`FromStr`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes.
    pub bandwidth: Option<Bucket>,
    /// Requests, or packets.
    pub operations: Option<Bucket>,
}

/// What is wrong with a rate limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateLimitError {
    /// No `=`.
    #[error("'{0}' is not KEY=VALUE")]
    NoValue(String),
    /// A key that there is not.
    #[error("unknown key '{key}' ({hint})")]
    UnknownKey {
        /// What was typed.
        key: String,
        /// The nearest key, or all.
        hint: String,
    },
    /// The same key again.
    #[error("key '{0}' comes twice")]
    Twice(&'static str),
    /// Not a number, or none that makes sense.
    #[error("{key}={value}: expected {expected}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// What was typed.
        value: String,
        /// What makes sense.
        expected: &'static str,
    },
    /// Half a bucket.
    #[error("{given} needs {missing} beside it")]
    Missing {
        /// What is there.
        given: &'static str,
        /// What is not.
        missing: &'static str,
    },
    /// Nothing that limits.
    #[error("expected at least bw_size and bw_refill_time, or ops_size and ops_refill_time")]
    Nothing,
}

impl FromStr for RateLimit {
    type Err = RateLimitError;

    fn from_str(text: &str) -> Result<RateLimit, RateLimitError> {
        let mut values = [None; KEYS.len()];
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let no_value = || RateLimitError::NoValue(item.to_owned());
            let (key, value) = item.split_once('=').ok_or_else(no_value)?;
            let known = KEYS.iter().position(|name| *name == key);
            let at = known.ok_or_else(|| RateLimitError::UnknownKey {
                key: key.to_owned(),
                hint: hint(key),
            })?;
            let parsed = parse_value(KEYS[at], value)?;
            if values[at].replace(parsed).is_some() {
                return Err(RateLimitError::Twice(KEYS[at]));
            }
        }
        let limit = RateLimit {
            bandwidth: bucket(&values, 0)?,
            operations: bucket(&values, 3)?,
        };
        if limit.bandwidth.is_none() && limit.operations.is_none() {
            return Err(RateLimitError::Nothing);
        }
        Ok(limit)
    }
}

/// The bucket of the three keys from `first` on.
fn bucket(
    values: &[Option<u64>; KEYS.len()],
    first: usize,
) -> Result<Option<Bucket>, RateLimitError> {
    let [size, burst, refill] = [first, first + 1, first + 2];
    let missing = |given: usize, missing: usize| RateLimitError::Missing {
        given: KEYS[given],
        missing: KEYS[missing],
    };
    match (values[size], values[burst], values[refill]) {
        (None, None, None) => Ok(None),
        (None, Some(_), _) => Err(missing(burst, size)),
        (None, None, Some(_)) => Err(missing(refill, size)),
        (Some(_), _, None) => Err(missing(size, refill)),
        (Some(size), one_time_burst, Some(refill_time_ms)) => Ok(Some(Bucket {
            size,
            one_time_burst: one_time_burst.unwrap_or(0),
            refill_time_ms,
        })),
    }
}

fn parse_value(key: &'static str, value: &str) -> Result<u64, RateLimitError> {
    let bytes = matches!(key, "bw_size" | "bw_one_time_burst");
    let (parsed, range, expected) = if key.ends_with("_refill_time") {
        let expected = "milliseconds from 1 to 86400000";
        (value.parse().ok(), 1..=MAX_REFILL_TIME_MS, expected)
    } else if bytes {
        let smallest = u64::from(key == "bw_size");
        let expected = "a number of bytes such as 1048576 or 1M, a size above 0";
        (parse_bytes(value), smallest..=u64::MAX, expected)
    } else {
        let smallest = u64::from(key == "ops_size");
        let expected = "a number of operations, a size above 0";
        (value.parse().ok(), smallest..=u64::MAX, expected)
    };
    let in_range = parsed.filter(|number| range.contains(number));
    in_range.ok_or_else(|| RateLimitError::BadValue {
        key,
        value: value.to_owned(),
        expected,
    })
}

/// Bytes, with K, M, G or T for powers of 1024.
fn parse_bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'K' | 'k') => (&text[..at], 10),
        (at, 'M' | 'm') => (&text[..at], 20),
        (at, 'G' | 'g') => (&text[..at], 30),
        (at, 'T' | 't') => (&text[..at], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn hint(word: &str) -> String {
    let similarity = |key: &&str| strsim::jaro_winkler(word, key);
    let nearest = KEYS
        .into_iter()
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    match nearest.filter(|key| similarity(key) >= NEAR) {
        Some(key) => format!("nearest: '{key}'"),
        None => format!("known: {}", KEYS.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        text.parse::<RateLimit>().unwrap_err().to_string()
    }

    #[test]
    fn all_keys_are_read_each_in_its_unit() {
        let text = "bw_size=10M,bw_one_time_burst=4096,bw_refill_time=1000,\
                    ops_size=500,ops_one_time_burst=7,ops_refill_time=100";
        let limit: RateLimit = text.parse().unwrap();
        let bandwidth = Bucket {
            size: 10 << 20,
            one_time_burst: 4096,
            refill_time_ms: 1000,
        };
        let operations = Bucket {
            size: 500,
            one_time_burst: 7,
            refill_time_ms: 100,
        };
        assert_eq!(limit.bandwidth, Some(bandwidth));
        assert_eq!(limit.operations, Some(operations));
    }

    #[test]
    fn one_bucket_is_enough_and_a_burst_is_optional() {
        let limit: RateLimit = "ops_refill_time=50,ops_size=1".parse().unwrap();
        assert_eq!(limit.bandwidth, None);
        assert_eq!(limit.operations.map(|b| b.one_time_burst), Some(0));
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        assert_eq!(
            error("bw_sise=1"),
            "unknown key 'bw_sise' (nearest: 'bw_size')"
        );
        assert_eq!(
            error("iops_refill=1"),
            "unknown key 'iops_refill' (nearest: 'ops_refill_time')"
        );
        assert!(error("zzz=1").contains("known: bw_size, bw_one_time_burst"));
    }

    #[test]
    fn half_a_bucket_nothing_and_nonsense_are_refused() {
        assert_eq!(error("bw_size=1"), "bw_size needs bw_refill_time beside it");
        assert_eq!(
            error("ops_one_time_burst=1,ops_refill_time=1"),
            "ops_one_time_burst needs ops_size beside it"
        );
        assert_eq!(
            error("ops_refill_time=1"),
            "ops_refill_time needs ops_size beside it"
        );
        assert!(error("").starts_with("expected at least bw_size"));
        assert_eq!(error("bw_size"), "'bw_size' is not KEY=VALUE");
        assert_eq!(error("ops_size=1,ops_size=1"), "key 'ops_size' comes twice");
        for text in [
            "bw_size=0,bw_refill_time=1",
            "bw_size=1,bw_refill_time=0",
            "bw_size=1,bw_refill_time=86400001",
            "bw_size=99999999T,bw_refill_time=1",
            "bw_size=-1,bw_refill_time=1",
            "bw_size=M,bw_refill_time=1",
            "bw_size=,bw_refill_time=1",
            "ops_size=1K,ops_refill_time=1",
            "ops_size=0,ops_refill_time=1",
        ] {
            assert!(error(text).contains(": expected"), "{text}");
        }
    }
}
