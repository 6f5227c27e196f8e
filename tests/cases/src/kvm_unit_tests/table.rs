//! The results as a table for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::explained;
use super::run::{Machine, Outcome, Verdict};

/// The runs of one test, in the order of the machines.
#[derive(Debug)]
pub struct Row {
    /// The test.
    pub test: String,
    /// On each machine.
    pub outcomes: Vec<(Machine, Outcome)>,
}

impl Row {
    fn verdict(&self, machine: Machine) -> Option<Verdict> {
        let on_it = |(other, _): &&(Machine, Outcome)| *other == machine;
        self.outcomes
            .iter()
            .find(on_it)
            .map(|(_, outcome)| outcome.verdict)
    }

    /// Machines of ours that failed where QEMU did not and nobody has said why. Without QEMU's column, that
    /// failed at all.
    #[must_use]
    pub fn regressions(&self) -> Vec<Machine> {
        let expected = self.verdict(Machine::Qemu);
        let unexplained = |(machine, outcome): &&(Machine, Outcome)| {
            *machine != Machine::Qemu
                && outcome.verdict == Verdict::Fail
                && expected != Some(Verdict::Fail)
                && explained(&self.test, *machine, outcome).is_none()
        };
        let found = self.outcomes.iter().filter(unexplained);
        found.map(|(machine, _)| *machine).collect()
    }
}

/// The table, then what there is to say about its cells.
#[must_use]
pub fn text(rows: &[Row]) -> String {
    let mut text = String::new();
    let longest = rows.iter().map(|row| row.test.len()).max();
    let width = longest.unwrap_or_default().max("test".len()) + 2;
    let _ = write!(text, "{:<width$}", "test");
    for (machine, _) in rows.first().map_or(&[][..], |row| &row.outcomes) {
        let _ = write!(text, "{:<18}", machine.name());
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    for row in rows {
        let _ = write!(text, "{:<width$}", row.test);
        for (_, outcome) in &row.outcomes {
            let _ = write!(text, "{:<18}", cell(outcome));
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    let notes: Vec<String> = rows.iter().flat_map(notes).collect();
    if !notes.is_empty() {
        let _ = write!(text, "\n{}\n", notes.join("\n"));
    }
    let _ = writeln!(text, "\n{}", totals(rows));
    text
}

fn cell(outcome: &Outcome) -> String {
    let checks = outcome.passed + outcome.failed.len();
    match outcome.verdict {
        Verdict::Fail if checks > 0 => format!("fail {}/{checks}", outcome.failed.len()),
        Verdict::Pass if checks > 0 => format!("pass {}", outcome.passed),
        verdict => verdict.to_string(),
    }
}

fn notes(row: &Row) -> Vec<String> {
    let mut notes = Vec::new();
    for (machine, outcome) in &row.outcomes {
        let mut parts = outcome.failed.clone();
        if !outcome.note.is_empty() {
            parts.push(outcome.note.clone());
        }
        let reason = explained(&row.test, *machine, outcome);
        parts.extend(reason.map(|reason| format!("known: {reason}")));
        if !parts.is_empty() {
            notes.push(format!(
                "{} on {}: {}",
                row.test,
                machine.name(),
                parts.join("; ")
            ));
        }
    }
    notes
}

/// For each machine, how many tests ended how.
#[must_use]
pub fn totals(rows: &[Row]) -> String {
    let machines = rows.first().map_or(&[][..], |row| &row.outcomes);
    let count = |machine: Machine, verdict: Verdict| {
        let ended = |row: &&Row| row.verdict(machine) == Some(verdict);
        rows.iter().filter(ended).count()
    };
    let parts: Vec<_> = machines
        .iter()
        .map(|(machine, _)| {
            let [pass, skip, fail] = [Verdict::Pass, Verdict::Skip, Verdict::Fail]
                .map(|verdict| count(*machine, verdict));
            format!("{}: {pass} pass, {skip} skip, {fail} fail", machine.name())
        })
        .collect();
    parts.join(". ")
}

/// All of it for a program to read.
#[must_use]
pub fn to_json(rows: &[Row]) -> Value {
    let runs = rows.iter().flat_map(|row| {
        row.outcomes.iter().map(|(machine, outcome)| {
            json!({
                "test": row.test,
                "machine": machine.name(),
                "verdict": outcome.verdict.to_string(),
                "passed": outcome.passed,
                "failed": outcome.failed,
                "skipped": outcome.skipped,
                "note": outcome.note,
                "known": explained(&row.test, *machine, outcome),
                "seconds": outcome.took.as_secs_f64(),
            })
        })
    });
    Value::Array(runs.collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn outcome(verdict: Verdict, passed: usize, failed: &[&str]) -> Outcome {
        Outcome {
            verdict,
            passed,
            failed: failed.iter().map(|name| (*name).to_owned()).collect(),
            skipped: 0,
            note: String::new(),
            took: Duration::from_millis(1500),
        }
    }

    fn row(test: &str, verdicts: [Verdict; 3]) -> Row {
        let outcomes = Machine::ALL.into_iter().zip(verdicts);
        Row {
            test: test.to_owned(),
            outcomes: outcomes
                .map(|(machine, verdict)| (machine, outcome(verdict, 3, &[])))
                .collect(),
        }
    }

    #[test]
    fn a_failure_counts_where_qemu_has_none_and_nobody_knows_why() {
        use Verdict::{Fail, Pass, Skip};
        assert_eq!(row("tsc", [Pass, Pass, Pass]).regressions(), []);
        assert_eq!(
            row("tsc", [Fail, Skip, Pass]).regressions(),
            [Machine::Kernel]
        );
        assert_eq!(row("tsc", [Fail, Fail, Fail]).regressions(), []);
        assert_eq!(row("realmode", [Pass, Fail, Pass]).regressions(), []);
        let mut alone = row("tsc", [Pass, Fail, Pass]);
        alone.outcomes.pop();
        assert_eq!(alone.regressions(), [Machine::Split]);
    }

    #[test]
    fn the_table_says_what_failed() {
        let mut rows = vec![
            row("tsc", [Verdict::Pass; 3]),
            row("realmode", [Verdict::Skip; 3]),
        ];
        rows[1].outcomes[0].1 = outcome(Verdict::Fail, 2, &["sti inhibit"]);
        rows[1].outcomes[1].1 = outcome(Verdict::Fail, 2, &[]);
        let text = text(&rows);
        assert!(
            text.contains("\ntsc       pass 3            pass 3"),
            "{text}"
        );
        assert!(text.contains("fail 1/3"), "{text}");
        assert!(text.contains("realmode on kernel: sti inhibit\n"), "{text}");
        assert!(text.contains("realmode on split: known: "), "{text}");
        assert!(text.contains("split: 1 pass, 0 skip, 1 fail"), "{text}");
        let json = to_json(&rows);
        assert_eq!(json[3]["failed"][0], "sti inhibit");
        assert_eq!(json[4]["machine"], "split");
    }
}
