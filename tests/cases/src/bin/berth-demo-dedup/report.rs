//! The live table, and the outcome as a table and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::farm::OWN_MIB;
use crate::measure::Taken;

/// Lines of the live table are at least so far apart, unless the state changes.
const APART: Duration = Duration::from_secs(3);

/// One look at the tuner.
#[derive(Debug)]
struct Row {
    at: Duration,
    state: String,
    /// MiB saved of each guest.
    saved: Vec<u64>,
    total_mib: u64,
    scanner_cpu_s: f64,
}

/// What was seen while it merged.
#[derive(Debug)]
pub(crate) struct Timeline {
    names: Vec<String>,
    rows: Vec<Row>,
}

impl Timeline {
    pub(crate) fn new(names: &[String]) -> Self {
        Self {
            names: names.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Takes a status; whether it is worth a line.
    pub(crate) fn take(&mut self, at: Duration, status: &Value) -> bool {
        let of = |name: &String| {
            let vms = status["vms"].as_array().into_iter().flatten();
            let mut saved = vms.filter(|vm| vm["name"] == **name);
            saved
                .next()
                .and_then(|vm| vm["saved_mib"].as_u64())
                .unwrap_or(0)
        };
        let row = Row {
            at,
            state: status["state"].as_str().unwrap_or("?").to_owned(),
            saved: self.names.iter().map(of).collect(),
            total_mib: status["saved_mib"].as_u64().unwrap_or(0),
            scanner_cpu_s: status["scanner_cpu_s"].as_f64().unwrap_or(0.0),
        };
        let last = self.rows.last();
        let is_new = last.is_none_or(|last| at >= last.at + APART || last.state != row.state);
        if is_new {
            self.rows.push(row);
        }
        is_new
    }

    pub(crate) fn was_in(&self, state: &str) -> bool {
        self.rows.iter().any(|row| row.state == state)
    }

    pub(crate) fn header(&self) -> String {
        let mut line = format!("\n  MiB saved {:>9}", "");
        for name in &self.names {
            let _ = write!(line, "{name:>9}");
        }
        let _ = writeln!(line, "{:>9}   CPU of the scanner", "total");
        line
    }

    pub(crate) fn last_line(&self) -> String {
        self.rows.last().map_or_else(String::new, Row::line)
    }

    pub(crate) fn footer(&self, done: bool) -> String {
        match done {
            true => "  all that pays is merged; the scanner stands still\n\n".to_owned(),
            false => "  still merging: what is saved by now is what counts below\n\n".to_owned(),
        }
    }

    fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({ "seconds": row.at.as_secs_f64(), "state": row.state, "saved_mib": row.saved,
                    "total_saved_mib": row.total_mib, "scanner_cpu_s": row.scanner_cpu_s })
        };
        self.rows.iter().map(row).collect()
    }
}

impl Row {
    fn line(&self) -> String {
        let mut line = format!("  {:>6.0} s  {:<9}", self.at.as_secs_f64(), self.state);
        for saved in &self.saved {
            let _ = write!(line, "{saved:>9}");
        }
        let _ = writeln!(line, "{:>9}   {:.1} s", self.total_mib, self.scanner_cpu_s);
        line
    }
}

/// Whether this is what [`Outcome::json`] makes of a run that went well: figures for every guest that add up.
pub(crate) fn check_json(json: &Value) -> Result<()> {
    let count = json["guests"].as_u64().unwrap_or(0);
    ensure!(count >= 2, "guests: {}", json["guests"]);
    let total = |round: &str| -> Result<u64> {
        let guests = json[round].as_array().map_or(&[][..], Vec::as_slice);
        ensure!(guests.len() as u64 == count, "{round}: {}", json[round]);
        guests.iter().try_fold(0, |sum, guest| {
            let figure = |name: &str| guest[name].as_u64();
            let parts = ["vmm_kib", "disk_daemon_kib", "bookkeeping_kib"].map(figure);
            let all = parts.into_iter().sum::<Option<u64>>();
            ensure!(
                all.is_some_and(|all| all > 0) && all == figure("total_kib"),
                "{guest}"
            );
            Ok(sum + all.unwrap_or(0))
        })
    };
    let (shared, merged) = (total("shared")?, total("window_merged")?);
    total("window_before_merging")?;
    let each = &json["per_guest_kib"];
    ensure!(
        each["shared"] == shared / count && each["merged"] == merged / count && merged < shared,
        "per guest: {each}, of {shared} and {merged} KiB"
    );
    let rows = json["timeline"].as_array().map_or(0, Vec::len);
    ensure!(rows > 1, "timeline: {}", json["timeline"]);
    ensure!(
        json["tuner"]["saved_mib"].as_u64() > Some(0),
        "tuner: {}",
        json["tuner"]
    );
    ensure!(json["usr_md5"].as_str().is_some_and(|sum| sum.len() == 32));
    Ok(())
}

/// All that the demonstration found.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) host: String,
    /// Each guest on shared memory.
    pub(crate) shared: Vec<Taken>,
    /// Each guest of the second round before anything was merged.
    pub(crate) before: Vec<Taken>,
    /// The same when all was merged.
    pub(crate) merged: Vec<Taken>,
    pub(crate) timeline: Timeline,
    /// berth-tuner's at the end of merging.
    pub(crate) status: Value,
    /// MD5 over /usr, the same in all guests in both rounds and after merging.
    pub(crate) contents: String,
    pub(crate) total_seconds: f64,
}

fn sum(guests: &[Taken]) -> u64 {
    guests.iter().map(Taken::total_kib).sum()
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn saved_percent(shared_kib: u64, merged_kib: u64) -> f64 {
    100.0 - 100.0 * merged_kib as f64 / shared_kib.max(1) as f64
}

impl Outcome {
    /// Each guest takes less than the same guest on shared memory.
    pub(crate) fn check(&self) -> Result<()> {
        for (shared, merged) in self.shared.iter().zip(&self.merged) {
            ensure!(
                merged.total_kib() < shared.total_kib(),
                "{} takes {} KiB merged, and {} KiB on shared memory",
                shared.name,
                merged.total_kib(),
                shared.total_kib()
            );
        }
        Ok(())
    }

    pub(crate) fn json(&self) -> Value {
        let all = |guests: &[Taken]| guests.iter().map(Taken::json).collect::<Value>();
        let (shared, merged) = (sum(&self.shared), sum(&self.merged));
        let count = self.shared.len().max(1) as u64;
        json!({
            "host": self.host,
            "guests": self.shared.len(),
            "own_mib_of_each": OWN_MIB,
            "shared": all(&self.shared),
            "window_before_merging": all(&self.before),
            "window_merged": all(&self.merged),
            "per_guest_kib": { "shared": shared / count, "merged": merged / count },
            "saved_percent": saved_percent(shared, merged),
            "timeline": self.timeline.json(),
            "tuner": self.status,
            "usr_md5": self.contents,
            "total_seconds": self.total_seconds,
        })
    }

    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "\n  memory of the host that each guest takes, its disk's daemon included ({})\n\n",
            self.host
        );
        // Writing into a string cannot fail.
        let mut row = |name: &str, shared: u64, before: u64, merged: u64| {
            let _ = writeln!(
                text,
                "  {name:<10} {:>8.1} MiB {:>12.1} MiB {:>10.1} MiB   {:>5.1} % less",
                mib(shared),
                mib(before),
                mib(merged),
                saved_percent(shared, merged)
            );
        };
        for ((shared, before), merged) in self.shared.iter().zip(&self.before).zip(&self.merged) {
            row(
                &shared.name,
                shared.total_kib(),
                before.total_kib(),
                merged.total_kib(),
            );
        }
        let (shared, before, merged) = (sum(&self.shared), sum(&self.before), sum(&self.merged));
        row("all", shared, before, merged);
        let count = self.shared.len().max(1) as u64;
        row("per guest", shared / count, before / count, merged / count);
        let head = format!(
            "  {:<10} {:>12} {:>16} {:>14}\n",
            "", "shared=on", "mergeable=on", "merged"
        );
        let at = text.find("\n\n").map_or(0, |at| at + 2);
        text.insert_str(at, &head);
        let cost = self.status["cpu_ms_per_mib"].as_f64().unwrap_or(0.0);
        let _ = writeln!(
            text,
            "\n  CPU for each MiB saved, scanner and tuner: {cost:.1} ms; every guest read the same /usr before and after"
        );
        let _ = writeln!(text, "  whole demonstration: {:.0} s", self.total_seconds);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> Value {
        let guest = |kib: u64| {
            json!({ "name": "guest1", "vmm_kib": kib, "disk_daemon_kib": 20, "bookkeeping_kib": 0,
                    "total_kib": kib + 20 })
        };
        json!({
            "guests": 2,
            "shared": [guest(300), guest(400)],
            "window_before_merging": [guest(320), guest(420)],
            "window_merged": [guest(100), guest(200)],
            "per_guest_kib": { "shared": 370, "merged": 170 },
            "timeline": [{ "seconds": 0.0 }, { "seconds": 3.0 }],
            "tuner": { "saved_mib": 7 },
            "usr_md5": "0123456789abcdef0123456789abcdef",
        })
    }

    #[test]
    fn a_file_is_checked() {
        check_json(&outcome()).unwrap();
        for (at, wrong) in [
            ("/guests", json!(3)),
            ("/shared/0/vmm_kib", json!(5)),
            ("/window_merged/1/total_kib", Value::Null),
            ("/per_guest_kib/merged", json!(1)),
            ("/timeline", json!([])),
            ("/tuner/saved_mib", json!(0)),
            ("/usr_md5", Value::Null),
        ] {
            let mut json = outcome();
            *json.pointer_mut(at).unwrap() = wrong;
            assert!(check_json(&json).is_err(), "{at}");
        }
    }

    #[test]
    fn a_line_comes_with_time_or_a_new_state() {
        let status = |state: &str, saved: u64| {
            json!({ "state": state, "saved_mib": saved, "scanner_cpu_s": 1.25,
                    "vms": [{ "name": "guest1", "saved_mib": saved }] })
        };
        let mut timeline = Timeline::new(&["guest1".to_owned()]);
        let at = Duration::from_secs;
        assert!(timeline.take(at(0), &status("OFF", 0)));
        assert!(!timeline.take(at(1), &status("OFF", 0)));
        assert!(timeline.take(at(2), &status("BURST", 5)));
        assert!(timeline.take(at(5), &status("BURST", 9)));
        assert!(timeline.was_in("BURST") && !timeline.was_in("TRICKLE"));
        let line = timeline.last_line();
        assert!(line.contains("BURST") && line.contains('9'), "{line}");
    }
}
