//! `--config`: a TOML file. Everything has a default; a key that is not known is an error that names the nearest one.
//!
//! Merging is off until `merge.domain` names the one trust domain of this host whose guests may share pages.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folders and times.
    pub general: General,
    /// Merging of equal pages.
    pub merge: Merge,
    /// When the host is short of memory.
    pub pressure: Pressure,
    /// Taking memory from guests and giving it back.
    pub balloon: Balloon,
    /// Having the host swap guests' cold pages.
    pub reclaim: Reclaim,
}

/// Folders and times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct General {
    /// Folder of the VMs' API sockets, `NAME.sock` or `NAME`.
    pub vms: PathBuf,
    /// Where the tuner keeps its state and its own socket.
    pub run_dir: PathBuf,
    /// Milliseconds between two samples.
    pub interval_ms: u64,
}

impl Default for General {
    fn default() -> Self {
        Self {
            vms: "/run/berth".into(),
            run_dir: "/run/berth-tuner".into(),
            interval_ms: 1000,
        }
    }
}

/// Merging of equal pages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Merge {
    /// The trust domain whose guests may share pages; absent: nothing is merged.
    pub domain: Option<String>,
    /// CPU of the scanner while it is at work, as a part of one core.
    pub cpu_budget: f64,
    /// CPU of the scanner in the long run once nothing new is found, as a part of one core.
    pub settled_cpu: f64,
    /// Passes over all memory before a burst may end.
    pub min_passes: u64,
    /// Passes after which it ends.
    pub max_passes: u64,
    /// Pages saved for each second of CPU below which a burst ends.
    pub min_yield: f64,
    /// Seconds to the first look after a burst; each look that finds nothing doubles it.
    pub probe_first_s: u64,
    /// Most seconds between two looks.
    pub probe_last_s: u64,
    /// Whether pages of zeros become the zero page.
    pub use_zero_pages: bool,
    /// Whether pages are compared before memory is offered for merging, so that huge pages without equals stay whole.
    pub compare: bool,
    /// Part of a run's pages that must have equals for it to be offered.
    pub min_equal: f64,
    /// Seconds after which a VM that merging did not pay for is tried again.
    pub retry_s: u64,
    /// Copies of merged pages a second and core above which scanning stops.
    pub max_cow: u64,
    /// Places in which one page may be mapped at most, where the kernel's own number (256) shall not stay. It is set while no page is merged.
    pub max_page_sharing: Option<u64>,
    /// Whether memory that was offered is withdrawn when the tuner ends, as far as there is room for it.
    pub withdraw_at_end: bool,
}

impl Default for Merge {
    fn default() -> Self {
        Self {
            domain: None,
            cpu_budget: 0.5,
            settled_cpu: 0.01,
            min_passes: 3,
            max_passes: 12,
            min_yield: 5000.0,
            probe_first_s: 15,
            probe_last_s: 1200,
            use_zero_pages: true,
            compare: true,
            min_equal: 0.25,
            retry_s: 1800,
            max_cow: 2500,
            max_page_sharing: None,
            withdraw_at_end: true,
        }
    }
}

/// When the host is short of memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pressure {
    /// Part of memory that is available below which it is.
    pub available_low: f64,
    /// Part above which it no longer is.
    pub available_high: f64,
    /// Percent of the last ten seconds that tasks waited for memory above which it is.
    pub waiting: f64,
}

impl Default for Pressure {
    fn default() -> Self {
        Self {
            available_low: 0.10,
            available_high: 0.15,
            waiting: 5.0,
        }
    }
}

/// Taking memory from guests and giving it back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Balloon {
    /// Whether balloons are moved.
    pub enabled: bool,
    /// Part of a guest's memory that it keeps available.
    pub guest_keeps: f64,
    /// Part available below which a guest gets memory back at once.
    pub guest_low: f64,
    /// Part of a guest's memory that is taken at a time.
    pub step: f64,
    /// Seconds for which a guest that was short is left alone.
    pub calm_s: u64,
}

impl Default for Balloon {
    fn default() -> Self {
        Self {
            enabled: true,
            guest_keeps: 0.20,
            guest_low: 0.05,
            step: 0.05,
            calm_s: 60,
        }
    }
}

/// Having the host swap guests' cold pages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reclaim {
    /// Whether it does.
    pub enabled: bool,
    /// MiB at a time.
    pub step_mib: u64,
    /// Percent of time that a VM waits for memory above which it is left alone.
    pub waiting: f64,
}

impl Default for Reclaim {
    fn default() -> Self {
        Self {
            enabled: false,
            step_mib: 32,
            waiting: 1.0,
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// What it says.
    #[error("{}: {reason}", .path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Line and reason, in one line.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("{key} = {value} is not {expected}")]
    Value {
        /// Which key.
        key: &'static str,
        /// As given.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

impl Config {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|error| Error::Parse {
            path: path.to_owned(),
            reason: one_line(&error, text),
        })?;
        config.check()?;
        Ok(config)
    }

    /// Whether the values make sense together.
    pub fn check(&self) -> Result<(), Error> {
        let Self {
            general,
            merge,
            pressure,
            balloon,
            ..
        } = self;
        for (key, value, range) in [
            ("merge.cpu_budget", merge.cpu_budget, 0.001..=1.0),
            ("merge.settled_cpu", merge.settled_cpu, 0.0001..=1.0),
            ("merge.min_equal", merge.min_equal, 0.0..=1.0),
            ("pressure.available_low", pressure.available_low, 0.0..=1.0),
            (
                "pressure.available_high",
                pressure.available_high,
                0.0..=1.0,
            ),
            ("balloon.guest_keeps", balloon.guest_keeps, 0.0..=1.0),
            ("balloon.guest_low", balloon.guest_low, 0.0..=1.0),
            ("balloon.step", balloon.step, 0.0..=0.5),
        ] {
            if !range.contains(&value) {
                return Err(bad(key, value, "a part in its range (see --help)"));
            }
        }
        if !(100..=60_000).contains(&general.interval_ms) {
            let expected = "from 100 to 60000";
            return Err(bad("general.interval_ms", general.interval_ms, expected));
        }
        if merge.min_passes == 0 || merge.max_passes < merge.min_passes {
            return Err(bad(
                "merge.max_passes",
                merge.max_passes,
                "at least merge.min_passes, and that at least 1",
            ));
        }
        if merge.probe_first_s == 0 || merge.probe_last_s < merge.probe_first_s {
            return Err(bad(
                "merge.probe_last_s",
                merge.probe_last_s,
                "at least merge.probe_first_s, and that at least 1",
            ));
        }
        if pressure.available_high < pressure.available_low {
            return Err(bad(
                "pressure.available_high",
                pressure.available_high,
                "at least pressure.available_low",
            ));
        }
        if balloon.guest_keeps < balloon.guest_low {
            return Err(bad(
                "balloon.guest_keeps",
                balloon.guest_keeps,
                "at least balloon.guest_low",
            ));
        }
        if merge.max_page_sharing.is_some_and(|most| most < 2) {
            let value = merge.max_page_sharing.unwrap_or_default();
            return Err(bad("merge.max_page_sharing", value, "at least 2"));
        }
        if merge.domain.as_deref() == Some("") {
            return Err(bad("merge.domain", "\"\"", "a name"));
        }
        Ok(())
    }

    /// The file that says what holds without one.
    pub fn default_file() -> String {
        toml::to_string(&Self::default()).unwrap_or_default()
    }
}

fn bad(key: &'static str, value: impl ToString, expected: &'static str) -> Error {
    Error::Value {
        key,
        value: value.to_string(),
        expected,
    }
}

/// The parser's reason with its line, and for an unknown key the nearest that is known.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let line = error
        .span()
        .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let message = error.message().replace('\n', " ");
    let mut names = message.split('`').skip(1).step_by(2);
    let nearest = match (message.starts_with("unknown field"), names.next()) {
        (true, Some(unknown)) => names
            .max_by(|a, b| {
                strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b))
            })
            .map(|known| format!("unknown key {unknown}: did you mean {known}?")),
        _ => None,
    };
    let reason = nearest.unwrap_or(message);
    match line {
        Some(line) => format!("line {line}: {reason}"),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("t.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_default_and_merges_nothing() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert_eq!(Config::default().merge.domain, None);
        assert_eq!(parse(&Config::default_file()).unwrap(), Config::default());
    }

    #[test]
    fn wrong_keys_and_values_are_named() {
        for (text, expected) in [
            (
                "[merge]\ncpu_bugdet = 0.3\n",
                "t.toml: line 2: unknown key cpu_bugdet: did you mean cpu_budget?",
            ),
            (
                "[merg]\n",
                "t.toml: line 1: unknown key merg: did you mean merge?",
            ),
            (
                "[merge]\ncpu_budget = 3.0\n",
                "merge.cpu_budget = 3 is not a part in its range (see --help)",
            ),
            (
                "[merge]\nmax_passes = 1\n",
                "merge.max_passes = 1 is not at least merge.min_passes, and that at least 1",
            ),
            (
                "[merge]\ndomain = \"\"\n",
                "merge.domain = \"\" is not a name",
            ),
            (
                "[pressure]\navailable_high = 0.05\n",
                "pressure.available_high = 0.05 is not at least pressure.available_low",
            ),
            (
                "[merge]\nmax_page_sharing = 1\n",
                "merge.max_page_sharing = 1 is not at least 2",
            ),
            (
                "[general]\ninterval_ms = 1\n",
                "general.interval_ms = 1 is not from 100 to 60000",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err(), expected, "{text}");
        }
        assert!(parse("[merge]\ncpu_budget = nan\n").is_err());
        let error = parse("[general]\ninterval_ms = \"x\"\n").unwrap_err();
        assert!(error.starts_with("t.toml: line 2: "), "{error}");
    }
}
