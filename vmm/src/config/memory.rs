//! `--memory` and the API's `memory`: what was asked for. [`crate::memory::Mode`] says what it comes to.

#![forbid(unsafe_code)]

use super::ArgError;
use super::keys::Keys;

/// Guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Its size.
    pub size_bytes: u64,
    /// Whether other processes can map it; none, as fits the devices.
    pub shared: Option<bool>,
    /// Whether KSM may merge its pages.
    pub mergeable: Mergeable,
    /// Backed by huge pages that the host has reserved.
    pub huge_pages: Option<HugePages>,
    /// Whether the host may back it with transparent huge pages.
    pub thp: bool,
    /// Whether all of it is there before the guest starts.
    pub prefault: bool,
    /// How much of it devices of other processes can reach, where the rest is mergeable; none, as fits.
    pub window_bytes: Option<u64>,
}

/// Whether KSM may merge pages of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mergeable {
    /// No.
    #[default]
    Off,
    /// Where somebody who may says so; the VMM itself advises nothing.
    Eligible,
    /// All that can be, from the start.
    Always,
}

/// Huge pages that the host reserves (hugetlbfs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugePages {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePages {
    /// Bytes of one.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Mib2 => 2 << 20,
            Self::Gib1 => 1 << 30,
        }
    }

    /// The kind of this size.
    pub const fn of(bytes: u64) -> Option<Self> {
        match bytes {
            0x20_0000 => Some(Self::Mib2),
            0x4000_0000 => Some(Self::Gib1),
            _ => None,
        }
    }
}

impl MemoryConfig {
    /// So much RAM, all else as without a word.
    pub const fn of(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            shared: None,
            mergeable: Mergeable::Off,
            huge_pages: None,
            thp: true,
            prefault: false,
            window_bytes: None,
        }
    }
}

const FLAG: &str = "--memory";

/// `--memory size=,shared=,mergeable=,hugepages=,hugepage_size=,thp=,prefault=,window=`, or `--memory 512M`.
pub fn parse(text: &str) -> Result<MemoryConfig, ArgError> {
    let known = [
        "size",
        "shared",
        "mergeable",
        "hugepages",
        "hugepage_size",
        "thp",
        "prefault",
        "window",
    ];
    let mut keys = Keys::parse(FLAG, text, &known)?;
    let size_bytes = match keys.take_bare() {
        Some(bare) => Keys::parse(FLAG, &format!("size={bare}"), &["size"])?.size("size")?,
        None => keys.size("size")?,
    };
    let missing = ArgError::Missing {
        flag: FLAG,
        key: "size",
    };
    Ok(MemoryConfig {
        size_bytes: size_bytes.ok_or(missing)?,
        shared: keys.on_off("shared")?,
        mergeable: match keys.text("mergeable") {
            Some("always") => Mergeable::Always,
            None | Some("off" | "false") => Mergeable::Off,
            Some("on" | "true") => Mergeable::Eligible,
            Some(other) => return Err(keys.bad("mergeable", other, "on, off or always")),
        },
        huge_pages: huge_pages(&keys)?,
        thp: keys.on_off("thp")?.unwrap_or(true),
        prefault: keys.on_off("prefault")?.unwrap_or(false),
        window_bytes: keys.size("window")?,
    })
}

fn huge_pages(keys: &Keys) -> Result<Option<HugePages>, ArgError> {
    let wanted = keys.on_off("hugepages")?.unwrap_or(false);
    let Some(bytes) = keys.size("hugepage_size")? else {
        return Ok(wanted.then_some(HugePages::Mib2));
    };
    if !wanted {
        return Err(ArgError::Unsupported {
            flag: FLAG,
            what: "hugepage_size= needs hugepages=on".into(),
        });
    }
    let text = keys.text("hugepage_size").unwrap_or_default();
    let bad = || keys.bad("hugepage_size", text, "2M or 1G");
    HugePages::of(bytes).map(Some).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_alone_leaves_all_else_as_it_is() {
        let plain = MemoryConfig::of(1 << 30);
        for text in [
            "1G",
            "size=1G",
            "size=1G,mergeable=off,hugepages=off,thp=on,prefault=off",
        ] {
            assert_eq!(parse(text).unwrap(), plain, "{text}");
        }
    }

    #[test]
    fn every_word_is_taken() {
        let all = parse("size=2G,shared=off,mergeable=always,thp=off,prefault=on,window=256M");
        let expected = MemoryConfig {
            size_bytes: 2 << 30,
            shared: Some(false),
            mergeable: Mergeable::Always,
            huge_pages: None,
            thp: false,
            prefault: true,
            window_bytes: Some(256 << 20),
        };
        assert_eq!(all.unwrap(), expected);
        let mergeable = |text| parse(text).unwrap().mergeable;
        assert_eq!(mergeable("1G,mergeable=on"), Mergeable::Eligible);
        let pages = |text| parse(text).unwrap().huge_pages;
        assert_eq!(pages("1G,hugepages=on"), Some(HugePages::Mib2));
        assert_eq!(
            pages("1G,hugepages=on,hugepage_size=1G"),
            Some(HugePages::Gib1)
        );
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (text, message) in [
            ("hugepages=on", "--memory: size= is missing"),
            (
                "1G,mergeable=maybe",
                "--memory: mergeable=maybe is not on, off or always",
            ),
            (
                "1G,hugepage_size=2M",
                "--memory: hugepage_size= needs hugepages=on",
            ),
            (
                "1G,hugepages=on,hugepage_size=4M",
                "--memory: hugepage_size=4M is not 2M or 1G",
            ),
            (
                "1G,windov=1G",
                "--memory: unknown key 'windov' (nearest: 'window')",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), message, "{text}");
        }
    }
}
