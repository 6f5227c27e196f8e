//! Shares of vhost-net's speed, round by round, and the table of their medians.

use std::fmt::Write as _;

use crate::guests::Subject;
use crate::transfer::Direction;

/// The goal: no slower than vhost-net within 10 %.
const GOAL: f64 = 0.9;

/// One value for each subject, in their order.
pub(crate) type Row = [f64; Subject::ALL.len()];

/// What the rounds brought, each way.
#[derive(Debug, Default)]
pub(crate) struct Table {
    to_host: Vec<Row>,
    to_guest: Vec<Row>,
}

impl Table {
    /// Adds a round's seconds.
    pub(crate) fn add(&mut self, direction: Direction, took: Row) {
        let rounds = match direction {
            Direction::ToHost => &mut self.to_host,
            Direction::ToGuest => &mut self.to_guest,
        };
        rounds.push(shares(took));
    }

    /// Medians, smallest and largest, and the goal.
    pub(crate) fn text(&self, mib: u64) -> String {
        let mut text = format!(
            "TCP, {mib} MiB a transfer, {} rounds; speed as a share of vhost-net's in the same round: median (smallest..largest).\n\
             Time is emulated: shares compare, speeds do not.\n\n\
             | {:13} | {:9} | {:18} | {:23} | {:23} |\n|---|---|---|---|---|\n",
            self.to_host.len(),
            "subject",
            "machine",
            "card",
            "guest to host",
            "host to guest"
        );
        for (index, subject) in Subject::ALL.into_iter().enumerate() {
            let cells = [&self.to_host, &self.to_guest].map(|rounds| cell(subject, index, rounds));
            // Writing into a string cannot fail.
            let _ = writeln!(
                text,
                "| {:13} | {:9} | {:18} | {:23} | {:23} |",
                subject.name(),
                subject.machine(),
                subject.card(),
                cells[0],
                cells[1]
            );
        }
        text
    }
}

fn cell(subject: Subject, index: usize, rounds: &[Row]) -> String {
    let mut values: Vec<f64> = rounds.iter().map(|row| row[index]).collect();
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (values.first(), values.last()) else {
        return "-".to_owned();
    };
    let median = median(&values);
    let verdict = match (subject.has_goal(), median >= GOAL) {
        (false, _) => "",
        (true, true) => " met",
        (true, false) => " missed",
    };
    format!("{median:.2} ({least:.2}..{most:.2}){verdict}")
}

/// Of sorted values, at least one.
fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[half - 1], sorted[half])
    } else {
        sorted[half]
    }
}

/// Speeds as shares of the first subject's, vhost-net.
pub(crate) fn shares(took: Row) -> Row {
    took.map(|seconds| took[0] / seconds)
}

/// Names and values in a line.
pub(crate) fn line(row: &Row) -> String {
    let words: Vec<_> = Subject::ALL
        .iter()
        .zip(row)
        .map(|(subject, share)| format!("{} {share:.2}", subject.name()))
        .collect();
    words.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_of_vhost_net_in_the_same_round() {
        let mut table = Table::default();
        // Twice the time in a slow round is the same share.
        table.add(Direction::ToHost, [1.0, 2.0, 1.0, 1.25]);
        table.add(Direction::ToHost, [2.0, 4.0, 2.0, 2.5]);
        table.add(Direction::ToGuest, [1.0, 1.0, 0.5, 1.0]);
        let text = table.text(64);
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with('|')).collect();
        assert!(lines[3].contains("0.50 (0.50..0.50)  "), "{text}");
        assert!(lines[4].contains("1.00 (1.00..1.00) met"), "{text}");
        assert!(lines[4].contains("2.00 (2.00..2.00) met"), "{text}");
        assert!(lines[5].contains("0.80 (0.80..0.80) missed"), "{text}");
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert!((median(&[1.0, 2.0, 4.0, 8.0]) - 3.0).abs() < 1e-9);
        assert!((median(&[1.0, 2.0, 4.0]) - 2.0).abs() < 1e-9);
    }
}
