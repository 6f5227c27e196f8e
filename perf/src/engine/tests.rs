use anyhow::bail;

use super::*;
use crate::results::Verdict;
use crate::scenario::{Better, Bound, Of};

const METRICS: &[Metric] = &[
    Metric {
        name: "rate",
        unit: "1/s",
        better: Better::More,
        about: "",
    },
    Metric {
        name: "calls",
        unit: "per request",
        better: Better::Less,
        about: "",
    },
];

/// Answers from a table, and keeps the turns.
struct Fake {
    subjects: Vec<Subject>,
    rates: Vec<Vec<f64>>,
    lost: f64,
    turns: Vec<(usize, u32)>,
}

impl Scenario for Fake {
    fn subjects(&self) -> Vec<Subject> {
        self.subjects.clone()
    }

    fn measure(&mut self, _: &Cell, subject: usize, round: u32) -> Result<Sample> {
        self.turns.push((subject, round));
        let Some(&rate) = self.rates[subject].get(round as usize) else {
            bail!("it died");
        };
        Ok(Sample::new().figure("rate", rate).lost(self.lost))
    }

    fn count(&mut self, _: &Cell, subject: usize) -> Result<Option<Sample>> {
        Ok((subject > 0).then(|| Sample::new().figure("calls", 0.5)))
    }
}

fn fake(rates: &[&[f64]]) -> Fake {
    Fake {
        subjects: vec![
            Subject::peer("peer"),
            Subject::ours("ours"),
            Subject::limit("limit"),
        ],
        rates: rates.iter().map(|rates| rates.to_vec()).collect(),
        lost: 0.0,
        turns: Vec::new(),
    }
}

fn order() -> Order {
    Order {
        subjects: Vec::new(),
        reference: None,
        rounds: None,
        quick: false,
        count: true,
    }
}

fn goal_cell(of: Of, bound: Bound) -> Cell {
    Cell::new("qd1", "QD1").rounds(3, 2).goal("rate", of, bound)
}

fn run(fake: &mut Fake, a_cell: &Cell) -> CellResult {
    let subjects = fake.subjects();
    cell(
        fake,
        &subjects,
        a_cell,
        METRICS,
        &order(),
        &mut Progress::default(),
    )
}

#[test]
fn all_take_turns_and_one_that_fails_is_left_out() {
    let mut fake = fake(&[&[1.0], &[4.0, 4.0, 4.0], &[8.0, 8.0, 8.0]]);
    let result = run(&mut fake, &Cell::new("c", "c").rounds(3, 2));
    // The limit first, as the others are ratios of it.
    let turns = [
        (2, 0),
        (0, 0),
        (1, 0),
        (2, 1),
        (0, 1),
        (1, 1),
        (2, 2),
        (1, 2),
    ];
    assert_eq!(fake.turns, turns);
    assert_eq!(
        result.series("peer").unwrap().failure.as_deref(),
        Some("it died")
    );
    assert_eq!(result.reference.as_deref(), Some("limit"));
    let ours = result.series("ours").unwrap();
    assert_eq!(ours.ratio["rate"].median, 0.5);
    assert_eq!(ours.counts["calls"], 0.5);
    assert!(result.series("limit").unwrap().counts.contains_key("calls"));
}

#[test]
fn warm_up_rounds_are_not_recorded() {
    let mut fake = fake(&[&[9.0, 1.0], &[9.0, 2.0], &[9.0, 4.0]]);
    let result = run(&mut fake, &Cell::new("c", "c").rounds(1, 1).warm_up(1));
    assert_eq!(result.series("ours").unwrap().samples["rate"], [Some(2.0)]);
    assert_eq!(fake.turns.len(), 6);
}

#[test]
fn ratios_are_of_the_same_round() {
    let mut fake = fake(&[&[1.0; 3], &[90.0, 190.0, 100.0], &[100.0, 200.0, 100.0]]);
    let result = run(&mut fake, &goal_cell(Of::Limit, Bound::AtLeast(0.95)));
    let ratio = result.series("ours").unwrap().ratio["rate"];
    assert_eq!((ratio.min, ratio.median, ratio.max), (0.9, 0.95, 1.0));
}

#[test]
fn goals_are_met_missed_or_undecided() {
    let verdict = |rates: [f64; 3], of, bound| {
        let mut fake = fake(&[&[50.0; 3], &rates, &[100.0; 3]]);
        let result = run(&mut fake, &goal_cell(of, bound));
        (result.goals[0].verdict, result.goals[0].goal.clone())
    };
    let (met, text) = verdict([95.0; 3], Of::Limit, Bound::AtLeast(0.95));
    assert_eq!(
        (met, text.as_str()),
        (Verdict::Met, "at least 0.95 of limit")
    );
    assert_eq!(
        verdict([94.0; 3], Of::Limit, Bound::AtLeast(0.95)).0,
        Verdict::Missed
    );
    assert_eq!(
        verdict([60.0, 95.0, 130.0], Of::Limit, Bound::AtLeast(0.95)).0,
        Verdict::TooNoisy
    );
    let (met, text) = verdict([45.0; 3], Of::BestPeer, Bound::AtMost(0.9));
    assert_eq!(
        (met, text.as_str()),
        (Verdict::Met, "at most 0.9 of the best peer (peer)")
    );
    assert_eq!(
        verdict([45.0; 3], Of::Itself, Bound::AtMost(44.0)).0,
        Verdict::Missed
    );
    let mut dead = fake(&[&[], &[], &[1.0; 3]]);
    let result = run(&mut dead, &goal_cell(Of::BestPeer, Bound::AtMost(0.9)));
    assert_eq!(result.goals[0].verdict, Verdict::NotMeasured);
}

#[test]
fn a_disturbed_run_has_no_verdict_on_what_is_timed_only() {
    let mut fake = fake(&[&[50.0; 3], &[95.0; 3], &[100.0; 3]]);
    fake.lost = 0.4;
    let cell =
        goal_cell(Of::Limit, Bound::AtLeast(0.9)).goal("calls", Of::Itself, Bound::AtMost(0.5));
    let result = run(&mut fake, &cell);
    assert!(result.too_noisy.is_some());
    let verdicts: Vec<Verdict> = result.goals.iter().map(|goal| goal.verdict).collect();
    assert_eq!(verdicts, [Verdict::TooNoisy, Verdict::Met]);
}

#[test]
fn two_builds_are_compared_round_by_round() {
    let build = |name: &str, number| Subject {
        build: Some(number),
        ..Subject::ours(name)
    };
    let mut fake = fake(&[&[100.0, 200.0, 100.0], &[110.0, 220.0, 110.0], &[1.0; 3]]);
    fake.subjects = vec![
        build("blk:a", 0),
        build("blk:b", 1),
        Subject::limit("limit"),
    ];
    let result = run(&mut fake, &Cell::new("c", "c").rounds(3, 3));
    let against = &result.series("blk:b").unwrap().against_first_build["rate"];
    assert!((against.min - 1.1).abs() < 1e-9 && (against.max - 1.1).abs() < 1e-9);
    assert!(
        result
            .series("blk:a")
            .unwrap()
            .against_first_build
            .is_empty()
    );
}
