//! Memory that a tuner moves: what may be merged, what is offered, and keyed hashes of pages. Ours alone.

use serde::{Deserialize, Serialize};

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// What the kernel is to do with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Advice {
    /// Merge pages with their equals.
    Mergeable,
    /// Merge none, and take merged ones apart.
    Unmergeable,
    /// Use huge pages.
    Thp,
    /// Use none.
    NoThp,
}

/// `PUT vm.memory-advice`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryAdvice {
    /// The VM's own trust domain, as who asks knows it.
    pub trust_domain: String,
    /// What is to be done.
    pub advice: Advice,
    /// With what; none: all that may be merged.
    #[serde(default)]
    pub ranges: Vec<MemoryRange>,
}

/// `GET vm.memory-sample`: memory that may be merged, and the part of it that is offered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMergeable {
    /// The VM's trust domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    /// All that may be merged.
    pub mergeable: Vec<MemoryRange>,
    /// What of it is offered.
    pub offered: Vec<MemoryRange>,
}

/// `PUT vm.memory-sample`: hashes are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySample {
    /// The VM's own trust domain, as who asks knows it.
    pub trust_domain: String,
    /// Key of the hashes: 32 hexadecimal digits.
    pub key: String,
    /// One page of so many, chosen by its content: the same in every guest.
    pub one_of: u32,
    /// Where; at most 1 GiB.
    pub range: MemoryRange,
}

/// Answer of `PUT vm.memory-sample`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryHashes {
    /// Pieces of 2 MiB or less, in order; those without a page in memory are left out.
    pub extents: Vec<MemoryExtent>,
}

/// A piece of memory and the pages of it that were chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryExtent {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Pages that are in memory.
    pub present: u32,
    /// SipHash-2-4 of the chosen pages; 0 for a page of zeros.
    pub hashes: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_written_as_documented() {
        let text = r#"{"trust_domain":"farm","advice":"no-thp","ranges":[{"start":0,"len":4096}]}"#;
        let advice: MemoryAdvice = serde_json::from_str(text).unwrap();
        assert_eq!(advice.advice, Advice::NoThp);
        assert_eq!(serde_json::to_string(&advice).unwrap(), text);
        let all: MemoryAdvice =
            serde_json::from_str(r#"{"trust_domain":"farm","advice":"mergeable"}"#).unwrap();
        assert_eq!(all.ranges, []);
    }
}
