//! The kernel's merging: whether it is there, and whether it is as it was.

use std::fs::{self, File};

use anyhow::{Context as _, Result, ensure};

const FOLDER: &str = "/sys/kernel/mm/ksm";
/// What berth-tuner changes.
const SETTINGS: [&str; 6] = [
    "run",
    "pages_to_scan",
    "sleep_millisecs",
    "use_zero_pages",
    "smart_scan",
    "advisor_mode",
];

/// Settings as they were.
pub(crate) struct Ksm(Vec<(&'static str, String)>);

impl Ksm {
    /// Whether pages can be merged here, and be counted by guest.
    pub(crate) fn check() -> Result<()> {
        let run = format!("{FOLDER}/run");
        File::options()
            .write(true)
            .open(&run)
            .with_context(|| format!("{run}: merging needs a kernel with CONFIG_KSM, and root"))?;
        ensure!(
            fs::exists("/proc/self/ksm_stat")?,
            "this kernel does not count merged pages by process: Linux 6.6 or newer is needed"
        );
        Ok(())
    }

    pub(crate) fn take() -> Result<Self> {
        let values = SETTINGS
            .into_iter()
            .filter_map(|name| Some((name, value(name)?)));
        Ok(Self(values.collect()))
    }

    /// What the tuner has changed is what it was.
    pub(crate) fn check_restored(&self) -> Result<()> {
        for (name, before) in &self.0 {
            let now = value(name);
            ensure!(
                now.as_ref() == Some(before),
                "{FOLDER}/{name} is {now:?} after the tuner's end, and was {before:?}"
            );
        }
        Ok(())
    }
}

/// None for what this kernel does not have.
fn value(name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("{FOLDER}/{name}")).ok()?;
    Some(text.trim().to_owned())
}
