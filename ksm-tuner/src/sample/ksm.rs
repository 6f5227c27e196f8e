//! `/sys/kernel/mm/ksm`: what the kernel was told, and what it has done.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files::{Error, number, optional, text};

/// The kernel's merging.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ksm {
    /// What it was told.
    pub settings: Settings,
    /// Merged pages that exist.
    pub pages_shared: u64,
    /// Further places in which they are mapped: pages saved.
    pub pages_sharing: u64,
    /// Pages without an equal.
    pub pages_unshared: u64,
    /// Pages that change too fast.
    pub pages_volatile: u64,
    /// Times that all memory was gone through.
    pub full_scans: u64,
    /// Pages looked at, where the kernel counts them.
    pub pages_scanned: Option<u64>,
    /// Pages of zeros that are the zero page now.
    pub zero_pages: Option<u64>,
    /// Bytes saved less what the bookkeeping takes.
    pub general_profit: Option<i64>,
}

impl Ksm {
    /// Pages that were given back.
    pub fn saved_pages(&self) -> u64 {
        self.pages_sharing + self.zero_pages.unwrap_or(0)
    }
}

/// What the kernel can be told; `None`: not by this kernel, or left as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// 0: stands still and keeps what is merged; 1: scans; 2: takes all apart, which the tuner never asks for.
    pub run: u64,
    /// Pages between two sleeps.
    pub pages_to_scan: u64,
    /// Milliseconds of a sleep.
    pub sleep_millisecs: u64,
    /// Whether pages that found no equal are looked at less often.
    pub smart_scan: Option<u64>,
    /// Whether pages of zeros become the zero page.
    pub use_zero_pages: Option<u64>,
    /// Places in which one page may be mapped at most.
    pub max_page_sharing: Option<u64>,
    /// Whether the kernel chooses `pages_to_scan` itself: `none`, `scan-time`.
    pub advisor_mode: Option<String>,
}

/// Reads the folder.
pub(super) fn read(folder: &Path) -> Result<Ksm, Error> {
    let of = |name: &str| number(&folder.join(name));
    let some = |name: &str| optional(&folder.join(name));
    Ok(Ksm {
        settings: Settings {
            run: of("run")?,
            pages_to_scan: of("pages_to_scan")?,
            sleep_millisecs: of("sleep_millisecs")?,
            smart_scan: some("smart_scan"),
            use_zero_pages: some("use_zero_pages"),
            max_page_sharing: some("max_page_sharing"),
            advisor_mode: text(&folder.join("advisor_mode"))
                .ok()
                .and_then(|modes| chosen(&modes)),
        },
        pages_shared: of("pages_shared")?,
        pages_sharing: of("pages_sharing")?,
        pages_unshared: of("pages_unshared")?,
        pages_volatile: of("pages_volatile")?,
        full_scans: of("full_scans")?,
        pages_scanned: some("pages_scanned"),
        zero_pages: some("ksm_zero_pages"),
        general_profit: text(&folder.join("general_profit"))
            .ok()
            .and_then(|text| text.trim().parse().ok()),
    })
}

/// The word in brackets: `[none] scan-time`.
fn chosen(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    Some(mode.to_owned())
}
