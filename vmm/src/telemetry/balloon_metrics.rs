//! A balloon's part of the metrics.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::metrics::{family, line};
use crate::devices::virtio::balloon::Info;

/// Adds what is known of a balloon; nothing without one.
pub(super) fn render(
    text: &mut String,
    counters: Option<&BTreeMap<String, u64>>,
    info: Option<&Info>,
) {
    if let Some(info) = info {
        for (name, help, value) in [
            (
                "target",
                "Memory that the guest is asked for.",
                info.target_bytes,
            ),
            (
                "actual",
                "Memory that the guest says it gave.",
                info.actual_bytes,
            ),
        ] {
            let name = format!("balloon_{name}_bytes");
            family(text, &name, "gauge", help);
            line(text, &name, "", value);
        }
        guest(text, info);
    }
    for (name, value) in counters.into_iter().flatten() {
        let name = format!("balloon_{name}_total");
        family(text, &name, "counter", "Of the balloon.");
        line(text, &name, "", *value);
    }
}

fn guest(text: &mut String, info: &Info) {
    let Some((stats, age)) = &info.stats else {
        return;
    };
    let name = "balloon_guest";
    family(
        text,
        name,
        "gauge",
        "What the guest last said of its memory.",
    );
    for (stat, value) in stats.named() {
        line(text, name, &format!("stat=\"{stat}\""), value);
    }
    let name = "balloon_guest_age_seconds";
    family(text, name, "gauge", "How long ago that was.");
    line(text, name, "", age.as_secs());
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::devices::virtio::balloon::Stats;

    #[test]
    fn a_balloon_is_told_and_one_that_is_not_there_is_not() {
        let mut text = String::new();
        render(&mut text, None, None);
        assert_eq!(text, "");
        let info = Info {
            target_bytes: 8192,
            actual_bytes: 4096,
            stats: Some((Stats::of(4, 77), Duration::from_millis(2900))),
        };
        let counters = BTreeMap::from([("discards".to_owned(), 3)]);
        render(&mut text, Some(&counters), Some(&info));
        for sample in [
            "berth_vmm_balloon_target_bytes 8192",
            "berth_vmm_balloon_actual_bytes 4096",
            "berth_vmm_balloon_guest{stat=\"free_memory\"} 77",
            "berth_vmm_balloon_guest_age_seconds 2",
            "berth_vmm_balloon_discards_total 3",
        ] {
            assert!(
                text.lines().any(|line| line == sample),
                "no {sample} in\n{text}"
            );
        }
    }
}
